"""Heat maps of one result or of several.

1. Average over prompts, if that is still to do.
2. Lay the dims out: layer downwards, layer 0 at the top; another dim to the right; a third one, or several results, as panels.
3. Colour the distance from the base run: a cell that does nothing is white, blue is higher and red is lower, as is usual in the
   field (and told apart by colour-blind readers). What has no sign (probabilities, scores) runs from white to dark blue.
   All panels share the scale.
4. Say in the colour bar what white is, and in the caption where the numbers come from.

The module is named with an underscore because a submodule `heatmap` would take the place of the function
`mechkit.plot.heatmap` as soon as it is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from mechkit._check import checked
from mechkit.plot._figure import Facts, Figure, Frame, Table, dress, label_axis
from mechkit.plot._labels import RAGGED, check_result, is_ragged
from mechkit.plot._scale import check_scale, is_unsigned
from mechkit.plot._tables import table_of, to_numpy
from mechkit.plot._text import caption_of, lines, number, plain, shortened, title_of
from mechkit.plot._theme import Theme, colourscale, theme_of
from mechkit.result import Label, Result

_GAP = 46  # pixels between panels

Results = Result | Sequence[Result] | Mapping[str, Result]


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
        return max(120, round(self.cell[0] * self.n_columns)), max(26, round(self.cell[1] * self.n_rows))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of panels."""
        columns = min(self.n_panels, max(1, 1040 // (self.panel[0] + _GAP)))
        return math.ceil(self.n_panels / columns), columns


@dataclass(frozen=True)
class _Scale:
    """What colours mean: the value of white, the farthest one, and the title of the colour bar."""

    effects: bool  # whether distances from the base run are coloured, rather than values
    center: float
    zmax: float
    signed: bool
    title: str
    note: tuple[str, ...] = ()


@checked
def heatmap(
    result: Results,
    *,
    title: str | None = None,
    center: float | None = None,
    zmax: float | None = None,
    height: int | None = None,
    theme: str = "light",
) -> Figure:
    """Draw a result of one, two or three dims, such as layer × head, layer × pos or layer × pos × head; or several results.

    A `'prompt'` dim is averaged first. Of three dims one is drawn as panels: the position if there is one, otherwise
    the last that is not the layer. Cells that do not exist are grey.

    Args:
        result: What to draw. Several results (a list, or a mapping from a panel's title), of one or two dims and with the same
            labels and unit, become panels that share one scale.
        title: Of the figure, as plain text; made from the provenance by default.
        center: The value that is white; by default that of the base run, so that a cell which does nothing is white
            (0 for an effect and for a result without baselines). If the base run's value differs from cell to cell
            (prompts of different length) or from panel to panel, the effect is drawn.
        zmax: Distance from the centre at which the colour saturates; by default the largest one.
        height: Of the figure in pixels.
        theme: `"light"` or `"dark"` (in which the centre is black).

    Returns:
        A plotly figure; nothing is shown or written.

    Raises:
        ValueError: if there are no cells, no dims or more than three, a value is infinite, `zmax` is not positive, or several
            results do not go together.

    Example:
        >>> import torch
        >>> coords = {"layer": (0, 1), "head": (0, 1)}
        >>> scores = Result(torch.eye(2), ("layer", "head"), coords, {}, "", "induction", "score", {})
        >>> heatmap(scores, title="Scores").layout.title.text
        'Scores'
    """
    colours = theme_of(theme)
    check_scale(center, zmax)
    given = _named(result)
    results = {name: one.mean("prompt") if "prompt" in one.dims else one for name, one in given.items()}
    layout = _lay_out(results)
    if all(bool(one.values.isnan().all()) for one in results.values()):
        raise ValueError("heatmap: expected at least one cell that exists, got NaN alone; choose others with sel()")
    first = next(iter(results.values()))
    values = _panels(results, layout, effects=False)
    changes = _panels(results, layout, effects=True)
    scale = _choose_scale(results, values, changes, center, zmax, colours)
    shown = changes if scale.effects else values

    n_rows, n_columns = layout.grid
    titles = [f"{layout.panels} {label}" for label in _labels(first, layout.panels)] if layout.panels else list(results)
    figure = make_subplots(
        n_rows,
        n_columns,
        figure=Figure(),
        shared_xaxes="all",
        shared_yaxes="all",
        subplot_titles=[plain(name) for name in titles] if layout.n_panels > 1 else None,
        horizontal_spacing=_GAP / (n_columns * (layout.panel[0] + _GAP)),
        vertical_spacing=_GAP / (n_rows * (layout.panel[1] + _GAP)),
    )
    gap = 1 if min(layout.cell) >= 8 else 0
    for i in range(layout.n_panels):
        one = first if layout.panels else list(results.values())[i]
        hover = _hover(one, layout, i, values[i], changes[i])
        cells = go.Heatmap(z=shown[i], hovertext=hover, hoverinfo="text", coloraxis="coloraxis", xgap=gap, ygap=gap)
        figure.add_trace(cells, row=i // n_columns + 1, col=i % n_columns + 1)

    told = [part for one in results.values() for part in caption_of(one.provenance, averaged=one.unit != "p")]
    told += [*scale.note, *[RAGGED] * (any(map(is_ragged, given.values())) and not scale.note)]
    facts = Facts(
        "heatmap", title if title is not None else _default_title(results, layout), tuple(dict.fromkeys(told))
    )
    _style(figure, first, layout, scale, colours, facts, lambda: table_of(given), height)
    return figure


def _named(result: Results) -> dict[str, Result]:
    if isinstance(result, Result):
        return {"": result}
    if not isinstance(result, Mapping | Sequence) or isinstance(result, str):
        raise ValueError(f"result: expected a Result or several, got {type(result).__name__}")
    named = dict(result) if isinstance(result, Mapping) else {}
    for one in () if isinstance(result, Mapping) else result:
        check_result(one)
        name = title_of(one.provenance, one.metric)
        named[name if name not in named else f"{name} ({len(named)})"] = one
    if not named:
        raise ValueError("result: expected at least one Result, got none")
    first = next(iter(named.values()))
    for name, one in named.items():
        check_result(one, f"result[{name!r}]")
        if (one.base, set(one.baseline)) != (first.base, set(first.baseline)):
            raise ValueError(
                f"result: expected results that are compared with the same runs, to share a scale; the first has baselines "
                f"{tuple(first.baseline)} and base {first.base!r}, {name!r} has {tuple(one.baseline)} and {one.base!r}; draw "
                "them one by one, or the effect() of all"
            )
        if _shape(one) != _shape(first) or one.unit != first.unit:
            raise ValueError(
                f"result: expected results with the same labels and unit; got {_sizes(first)} in {first.unit!r} "
                f"and, as {name!r}, {_sizes(one)} in {one.unit!r}; draw them one by one"
            )
    return named


def _shape(result: Result) -> dict[str, tuple[Label, ...]]:
    return {dim: labels for dim, labels in result.coords.items() if dim != "prompt"}


def _sizes(result: Result) -> str:
    return " × ".join(f"{dim} {size}" for dim, size in zip(result.dims, result.shape, strict=True))


def _lay_out(results: Mapping[str, Result]) -> _Layout:
    result, several = next(iter(results.values())), len(results) > 1
    if not 1 <= len(result.dims) <= 3 - several:
        raise ValueError(
            f"heatmap: expected 1 to {3 - several} dims besides 'prompt', got {result.dims}; "
            "choose one label with sel(), or average over a dim with mean()"
        )
    if 0 in result.shape:
        raise ValueError(f"heatmap: expected at least one cell, got {_sizes(result)}")
    down: str | None = "layer" if "layer" in result.dims else result.dims[0]
    rest = [dim for dim in result.dims if dim != down]
    panels = next((dim for dim in rest if dim in ("pos", "position")), rest[-1]) if len(rest) == 2 else None
    right = next((dim for dim in rest if dim != panels), None)
    if right is None and down != "layer":  # a row
        down, right = None, down
    n_panels = len(results) if several else len(_labels(result, panels)) or 1
    n_rows, n_columns = (len(_labels(result, dim)) or 1 for dim in (down, right))
    return _Layout(panels, down, right, n_panels, n_rows, n_columns)


def _panels(results: Mapping[str, Result], layout: _Layout, *, effects: bool) -> np.ndarray:
    """`[panel row column]` in float64."""
    arrays = []
    for result in results.values():
        tensor: Tensor = result.effect().values if effects and result.baseline else result.values
        order = [result.dims.index(dim) for dim in (layout.panels, layout.down, layout.right) if dim]
        arrays.append(to_numpy(tensor.permute(order)))
    return np.stack(arrays).reshape(layout.n_panels, layout.n_rows, layout.n_columns)


def _choose_scale(
    results: Mapping[str, Result],
    values: np.ndarray,
    changes: np.ndarray,
    center: float | None,
    zmax: float | None,
    theme: Theme,
) -> _Scale:
    result = next(iter(results.values()))
    metrics = " / ".join(dict.fromkeys(one.metric for one in results.values()))
    name, run = plain(f"{metrics} ({result.unit})"), plain(f"{result.base} run")
    if result.unit == "normalized":
        name = f"{plain(metrics)}, normalized<br>0 = corrupted run, 1 = clean run"

    def scale(coloured: np.ndarray, middle: float, head: str, *, signed: bool = True, note: str = "") -> _Scale:
        distance = np.abs(coloured[~np.isnan(coloured)] - middle).max(initial=0)
        if not np.isfinite(distance):
            raise ValueError("heatmap: expected finite values, got an infinite one; choose others with sel()")
        ends = (
            "blue is higher, red is lower"
            if signed
            else "darker is higher"
            if theme.name == "light"
            else "brighter is higher"
        )
        farthest = zmax or distance or 1.0  # any scale will do when all is white
        return _Scale(
            coloured is changes, middle, farthest, signed, f"{head}<br>{ends}<br>&nbsp;", (note,) if note else ()
        )

    white = theme.neutral
    if center is not None:
        return scale(values, center, f"{name}<br>{white} = {number(center)}")
    if not result.baseline:
        signed = bool((values < 0).any()) or not all(map(is_unsigned, results.values()))
        return scale(values, 0.0, f"{name}<br>{white} = 0", signed=signed)
    bases = np.concatenate([to_numpy(one.baseline[one.base]).ravel() for one in results.values()])
    bases = bases[~np.isnan(bases)]
    if len(bases) and bases.min() != bases.max():
        panels = len(results) > 1 and all(one.baseline[one.base].numel() == 1 for one in results.values())
        note = "the panels' base runs differ; colour is the change from each"
        if not panels:
            note = f"each cell is averaged over the prompts that have it; colour is its change from the {run} on those"
        return scale(changes, 0.0, f"change in {name}<br>{white} = {run}", note=note)
    base = float(bases[0]) if len(bases) else 0.0
    if base == 0 and result.unit != "normalized":
        return scale(values, 0.0, f"change in {name}<br>{white} = {run}")
    return scale(values, base, f"{name}<br>{white} = {run} {number(base)}")


def _hover(result: Result, layout: _Layout, panel: int, values: np.ndarray, effects: np.ndarray) -> list[list[str]]:
    unit = "" if result.unit == "normalized" else f" {result.unit}"

    def text(row: int, column: int) -> str:
        places = ((layout.down, row), (layout.right, column), (layout.panels, panel))
        told = [f"{dim} {result.coords[dim][i]}" for dim, i in places if dim]
        if np.isnan(values[row, column]):
            return lines(*told, "not present")
        told += [f"{result.metric} {number(values[row, column], 5)}{unit}"]
        if result.baseline:
            told += [f"{number(effects[row, column], 5, sign='+')}{unit} from the {result.base} run"]
        return lines(*told)

    return [[text(row, column) for column in range(layout.n_columns)] for row in range(layout.n_rows)]


def _style(
    figure: Figure,
    result: Result,
    layout: _Layout,
    scale: _Scale,
    theme: Theme,
    facts: Facts,
    table: Callable[[], Table],
    height: int | None,
) -> None:
    n_rows, n_columns = layout.grid
    columns, rows = ([shortened(label) for label in _labels(result, dim)] for dim in (layout.right, layout.down))
    longest = max(map(len, columns), default=0)
    cell_width, cell_height = layout.cell
    slanted = longest * 7 + 6 > cell_width and any(isinstance(x, str) for x in _labels(result, layout.right))
    overhang = max((4.5 * len(tick) - i * cell_width for i, tick in enumerate(columns)), default=0) if slanted else 0
    left = max(56 + 7 * max(map(len, rows), default=0), round(overhang) + 20)
    inner = [n * size + (n - 1) * _GAP for n, size in zip((n_columns, n_rows), layout.panel, strict=True)]
    bar = min(max(inner[1], 170), 360)  # length of the colour bar with its title
    below = max((52 + (5 * longest if slanted else 12)) if columns else 20, bar - inner[1] + 10)

    figure.update_xaxes(**label_axis(columns, cell_width, 13 if slanted else 7 * longest + 6))
    figure.update_yaxes(**label_axis(rows, cell_height, 14), autorange="reversed", title_text="")
    figure.update_xaxes(tickangle=-50 if slanted else 0)
    figure.update_yaxes(title_text=_axis_title(layout.down), col=1)
    for i in range(max(0, layout.n_panels - n_columns), layout.n_panels):  # those with no panel below
        place = {"row": i // n_columns + 1, "col": i % n_columns + 1}
        figure.update_xaxes(title_text=_axis_title(layout.right), showticklabels=True, **place)
    figure.update_annotations(font_size=12)  # the titles of the panels
    figure.update_coloraxes(
        colorscale=colourscale(theme.diverging if scale.signed else theme.sequential),
        cmin=scale.center - scale.zmax if scale.signed else scale.center,
        cmax=scale.center + scale.zmax,
        colorbar={"thickness": 14, "outlinewidth": 0, "lenmode": "pixels", "len": bar, "y": 1, "yanchor": "top"},
        colorbar_title={"text": scale.title, "side": "top", "font_size": 12},
    )
    frame = Frame(inner[0], inner[1], left, 210, below, above=18 if layout.n_panels > 1 else 0)
    dress(figure, theme, frame, facts, table, height=height)
    figure.update_layout(plot_bgcolor=theme.absent)  # shows through where a cell does not exist, and between cells


def _labels(result: Result, dim: str | None) -> tuple[Label, ...]:
    return result.coords[dim] if dim else ()


def _axis_title(dim: str | None) -> str:
    return {None: "", "pos": "token and position", "position": "named position"}.get(dim, plain(dim or ""))


def _default_title(results: Mapping[str, Result], layout: _Layout) -> str:
    result = next(iter(results.values()))
    dims = [dim for dim in (layout.down, layout.right, layout.panels) if dim]
    if len(results) > 1:
        return f"{' / '.join(dict.fromkeys(one.metric for one in results.values()))} by {' and '.join(dims)}"
    return title_of(result.provenance, result.metric, dims)
