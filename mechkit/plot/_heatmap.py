"""Heat maps of a `Result`.

1. Average over prompts, if that is still to do.
2. Lay the dims out: layer downwards, layer 0 at the top; another dim to the right; a third one as panels.
3. Colour the distance from the base run: a cell that does nothing is white, blue is higher and red is lower, as is
   usual in the field (and told apart by colour-blind readers). All panels share the scale.
4. Say in the colour bar what white is, and in the caption where the numbers come from.

The module is named with an underscore because a submodule `heatmap` would take the place of the function
`mechkit.plot.heatmap` as soon as it is imported.
"""

import math
import os
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from mechkit.result import Label, Result

# ColorBrewer's RdBu with a middle that is white.
_COLOURS = ["#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#ffffff"]
_COLOURS += ["#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061"]
_ABSENT = "#d4d4d4"  # shows through where a cell does not exist, and in the lines between cells
_FONT = "Helvetica, Arial, Noto Sans, sans-serif"
_MAX_LABEL = 24  # characters of a tick label
_GAP = 46  # pixels between panels
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]+")
_TICK_STEPS = [factor * 10**power for power in range(9) for factor in (1, 2, 5)]


@dataclass(frozen=True)
class _Layout:
    """Which dim runs over the panels, down and to the right (None: a single one), and the size of a cell in pixels."""

    panels: str | None
    down: str | None
    right: str | None
    n_panels: int
    n_rows: int
    n_columns: int

    @property
    def cell(self) -> tuple[float, float]:
        width, height = (940, 660) if self.n_panels == 1 else (200, 270)
        return min(34.0, max(width / self.n_columns, 1.0)), min(26.0, max(height / self.n_rows, 1.0))

    @property
    def panel(self) -> tuple[int, int]:
        return max(90, round(self.cell[0] * self.n_columns)), max(26, round(self.cell[1] * self.n_rows))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of panels."""
        columns = min(self.n_panels, max(1, 1040 // (self.panel[0] + _GAP)))
        return math.ceil(self.n_panels / columns), columns


def heatmap(
    result: Result,
    *,
    title: str | None = None,
    center: float | None = None,
    zmax: float | None = None,
    height: int | None = None,
) -> go.Figure:
    """Draw a result of one, two or three dims, such as layer × head, layer × pos or layer × pos × head.

    A `'prompt'` dim is averaged first. Of three dims one is drawn as panels: the position if there is one, otherwise
    the last that is not the layer. Cells that do not exist are grey.

    Args:
        result: what to draw.
        title: of the figure, as plain text; made from the provenance by default.
        center: the value that is white; by default that of the base run, so that a cell which does nothing is white
            (0 for an effect and for a result without baselines). If the base run's value differs from cell to cell
            (prompts of different length), the effect is drawn.
        zmax: distance from the centre at which the colour saturates; by default the largest one.
        height: of the figure in pixels.

    Returns:
        A plotly figure; nothing is shown or written.

    Raises:
        ValueError: if there are no cells, no dims or more than three, a value is infinite, or `zmax` is not positive.

    Example:
        >>> import torch
        >>> coords = {"layer": (0, 1), "head": (0, 1)}
        >>> scores = Result(torch.eye(2), ("layer", "head"), coords, {}, "", "induction", "score", {})
        >>> heatmap(scores, title="Scores").layout.title.text
        'Scores'
    """
    if zmax is not None and not zmax > 0:
        raise ValueError(f"zmax: expected a positive number, got {zmax!r}")
    averaged = "prompt" in result.dims
    result = result.mean("prompt") if averaged else result
    layout = _lay_out(result)
    effects = result.effect().values if result.baseline else result.values
    coloured, center, white, note = _choose_colours(result, effects, center)
    values, changes, shown = (_panels(result, layout, tensor) for tensor in (result.values, effects, coloured))
    distance = np.abs(shown[~np.isnan(shown)] - center).max(initial=0)
    if not np.isfinite(distance):
        raise ValueError("heatmap: expected finite values, got an infinite one")
    zmax = zmax or distance or 1.0  # any scale will do when all is white

    n_rows, n_columns = layout.grid
    figure = make_subplots(
        n_rows,
        n_columns,
        shared_xaxes="all",
        shared_yaxes="all",
        subplot_titles=[_plain(f"{layout.panels} {label}") for label in _labels(result, layout.panels)],
        horizontal_spacing=_GAP / (n_columns * (layout.panel[0] + _GAP)),
        vertical_spacing=_GAP / (n_rows * (layout.panel[1] + _GAP)),
    )
    gap = 1 if min(layout.cell) >= 8 else 0
    for i in range(layout.n_panels):
        hover = _hover(result, layout, i, values[i], changes[i])
        cells = go.Heatmap(z=shown[i], hovertext=hover, hoverinfo="text", coloraxis="coloraxis", xgap=gap, ygap=gap)
        figure.add_trace(cells, row=i // n_columns + 1, col=i % n_columns + 1)
    _style(figure, result, layout, title, height, _caption(result, averaged) + note)
    figure.update_coloraxes(
        colorscale=[[i / (len(_COLOURS) - 1), colour] for i, colour in enumerate(_COLOURS)],
        cmin=center - zmax,
        cmax=center + zmax,
        colorbar_title={"text": f"{white}<br>blue is higher, red is lower<br> ", "side": "top"},
    )
    return figure


def write_html(figure: go.Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as one HTML file that needs no network and loads nothing.

    Args:
        figure: any plotly figure.
        path: where to; missing folders are made.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {"displaylogo": False, "plotlyServerURL": "", "showSendToCloud": False}
    html = figure.to_html(config=config, include_plotlyjs=True, include_mathjax=False, div_id="mechkit-figure")
    path.write_text(html, encoding="utf-8")
    return path


def _lay_out(result: Result) -> _Layout:
    if not 1 <= len(result.dims) <= 3:
        raise ValueError(
            f"heatmap: expected 1 to 3 dims besides 'prompt', got {result.dims}; "
            "choose one label with sel(), or average over a dim with mean()"
        )
    if 0 in result.shape:
        raise ValueError(
            f"heatmap: expected at least one cell, got {dict(zip(result.dims, result.shape, strict=True))}"
        )
    down = "layer" if "layer" in result.dims else result.dims[0]
    rest = [dim for dim in result.dims if dim != down]
    panels = next((dim for dim in rest if dim in ("pos", "position")), rest[-1]) if len(rest) == 2 else None
    right = next((dim for dim in rest if dim != panels), None)
    as_row = right is None and down != "layer"
    dims = (panels, None, down) if as_row else (panels, down, right)
    return _Layout(*dims, *(len(_labels(result, dim)) or 1 for dim in dims))


def _choose_colours(result: Result, effects: Tensor, center: float | None) -> tuple[Tensor, float, str, list[str]]:
    """What to colour, the value that is white, the title of the colour bar and what to add to the caption."""
    name, run = _plain(f"{result.metric} ({result.unit})"), _plain(f"{result.base} run")
    if result.unit == "normalized":
        name = f"{_plain(result.metric)}, normalized<br>0 = corrupted run, 1 = clean run"
    if center is not None:
        return result.values, center, f"{name}<br>white = {_number(center)}", []
    if not result.baseline:
        return result.values, 0.0, f"{name}<br>white = 0", []
    base = result.baseline[result.base]
    base = base[~base.isnan()]
    if base.numel() and base.min() != base.max():
        note = [f"each cell is averaged over the prompts that have it; colour is its change from the {run} on those"]
        return effects, 0.0, f"change in {name}<br>white = {run}", note
    center = base.flatten()[0].item() if base.numel() else 0.0
    if center == 0 and result.unit != "normalized":
        return result.values, 0.0, f"change in {name}<br>white = {run}", []
    return result.values, center, f"{name}<br>white = {run} {_number(center)}", []


def _panels(result: Result, layout: _Layout, tensor: Tensor) -> np.ndarray:
    """`[panel row column]` in float64."""
    order = [result.dims.index(dim) for dim in (layout.panels, layout.down, layout.right) if dim]
    array = tensor.permute(order).numpy(force=True).astype(np.float64)
    return array.reshape(layout.n_panels, layout.n_rows, layout.n_columns)


def _hover(result: Result, layout: _Layout, panel: int, values: np.ndarray, effects: np.ndarray) -> list[list[str]]:
    unit = "" if result.unit == "normalized" else f" {result.unit}"

    def text(row: int, column: int) -> str:
        places = ((layout.down, row), (layout.right, column), (layout.panels, panel))
        lines = [f"{dim} {result.coords[dim][i]}" for dim, i in places if dim]
        if np.isnan(values[row, column]):
            return "<br>".join(map(_plain, [*lines, "not present"]))
        lines += [f"{result.metric} {_number(values[row, column], 5)}{unit}"]
        if result.baseline:
            lines += [f"{_number(effects[row, column], 5, sign='+')}{unit} from the {result.base} run"]
        return "<br>".join(map(_plain, lines))

    return [[text(row, column) for column in range(layout.n_columns)] for row in range(layout.n_rows)]


def _style(
    figure: go.Figure, result: Result, layout: _Layout, title: str | None, height: int | None, caption: list[str]
) -> None:
    n_rows, n_columns = layout.grid
    columns, rows = _ticks(result, layout.right), _ticks(result, layout.down)
    longest = max(map(len, columns), default=0)
    cell_width, cell_height = layout.cell
    slanted = longest * 7 + 6 > cell_width and any(isinstance(x, str) for x in _labels(result, layout.right))
    overhang = max((4.5 * len(tick) - i * cell_width for i, tick in enumerate(columns)), default=0) if slanted else 0
    left = max(56 + 7 * max(map(len, rows), default=0), round(overhang) + 20)
    inner = [n * size + (n - 1) * _GAP for n, size in zip((n_columns, n_rows), layout.panel, strict=True)]
    width = max(left + inner[0] + 210, 540)
    heading = textwrap.wrap(_default_title(result, layout) if title is None else title, (width - left) // 8) or [""]
    small_print = textwrap.wrap(" · ".join(caption), (width - left - 20) // 6)
    top = 62 + 22 * len(heading) + (18 if layout.panels else 0)
    scale = min(max(inner[1], 170), 360)  # length of the colour bar with its title
    below = max((52 + (5 * longest if slanted else 12)) if columns else 20, scale - inner[1] + 10)
    bottom = below + 15 * len(small_print) + 12
    height = height or top + inner[1] + bottom

    figure.update_xaxes(**_axis(columns, (13 if slanted else 7 * longest + 6) / cell_width))
    figure.update_yaxes(**_axis(rows, 14 / cell_height), autorange="reversed", title_text="")
    figure.update_xaxes(tickangle=-50 if slanted else 0)
    figure.update_yaxes(title_text=_axis_title(layout.down), col=1)
    for i in range(max(0, layout.n_panels - n_columns), layout.n_panels):  # those with no panel below
        place = {"row": i // n_columns + 1, "col": i % n_columns + 1}
        figure.update_xaxes(title_text=_axis_title(layout.right), showticklabels=True, **place)
    figure.update_annotations(font_size=12)  # the titles of the panels
    figure.add_annotation(
        text="<br>".join(map(_plain, small_print)),
        xref="paper",
        yref="paper",
        x=0,
        y=0,
        yshift=-below,
        xanchor="left",
        yanchor="top",
        align="left",
        showarrow=False,
        font={"size": 11, "color": "#555555"},
    )
    figure.update_coloraxes(
        colorbar={"thickness": 14, "outlinewidth": 0, "lenmode": "pixels", "len": scale, "y": 1, "yanchor": "top"},
        colorbar_title_font_size=12,
    )
    figure.update_layout(
        title={
            "text": "<br>".join(map(_plain, heading)),
            "font_size": 17,
            "x": left / width,
            "xanchor": "left",
            "y": 1 - 40 / height,
            "yanchor": "top",
        },
        width=width,
        height=height,
        margin={"l": left, "r": width - left - inner[0], "t": top, "b": bottom},
        font={"family": _FONT, "size": 12, "color": "#222222"},
        paper_bgcolor="#ffffff",
        plot_bgcolor=_ABSENT,
    )


def _axis(ticks: Sequence[str], cells_per_tick: float) -> dict[str, Any]:
    """A numeric axis with labels, so that equal tokens stay separate cells; every n-th label if all do not fit."""
    step = next(step for step in _TICK_STEPS if step >= cells_per_tick)
    return {
        "tickmode": "array",
        "tickvals": list(range(len(ticks)))[::step],
        "ticktext": [_plain(tick) for tick in ticks[::step]],
        "showgrid": False,
        "zeroline": False,
        "showline": False,
        "ticks": "outside" if ticks else "",
        "ticklen": 3,
        "title_standoff": 10,
    }


def _labels(result: Result, dim: str | None) -> tuple[Label, ...]:
    return result.coords[dim] if dim else ()


def _ticks(result: Result, dim: str | None) -> list[str]:
    labels = [str(label) for label in _labels(result, dim)]
    return [label if len(label) <= _MAX_LABEL else f"{label[: _MAX_LABEL - 9]}…{label[-8:]}" for label in labels]


def _axis_title(dim: str | None) -> str:
    return {None: "", "pos": "token and position", "position": "named position"}.get(dim, _plain(dim or ""))


def _default_title(result: Result, layout: _Layout) -> str:
    technique = str(result.provenance.get("technique") or "").replace("_", " ").capitalize()
    site = f" of {result.provenance['site']}" if technique and result.provenance.get("site") else ""
    dims = [dim for dim in (layout.down, layout.right, layout.panels) if dim]
    what = f"{result.metric} by {' and '.join(', '.join(dims).rsplit(', ', 1))}"
    return f"{technique}{site}: {what}" if technique else what


def _caption(result: Result, averaged: bool) -> list[str]:
    known = {key: str(value) for key, value in result.provenance.items() if value is not None}
    n_prompts = known.get("n_prompts")
    prompts = f"{'mean over ' if averaged else ''}{n_prompts} prompt{'s' if n_prompts != '1' else ''}"
    details = [f"{key} {known[key]}" for key in ("site", "direction", "mode") if key in known]
    parts = [known.get("model"), known.get("task"), prompts if n_prompts else None]
    return [
        part for part in [*parts, known.get("technique", "").replace("_", " "), *details, known.get("caution")] if part
    ]


def _number(number: float, digits: int = 3, *, sign: str = "") -> str:
    return f"{number + 0.0:{sign}.{digits}g}".replace("-", "−")  # + 0.0: no negative zero


def _plain(text: str) -> str:
    """Text that plotly shows as it is: no tags, entities or TeX, and nothing that breaks a line or turns it around."""

    def visible(character: str) -> str:
        joins_emoji = character == "\u200d"
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and not joins_emoji
        return character.encode("unicode_escape").decode() if hidden else character

    shown = "".join(map(visible, text))
    shown = _RIGHT_TO_LEFT.sub("\\g<0>\u200e", shown)  # the position after such a token stays to its right
    return re.sub(r"[&<>$]", lambda match: f"&#{ord(match[0])};", shown)
