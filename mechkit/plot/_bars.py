"""Bars: a number for each component, head, token or run, with its interval over prompts; and running sums of components.

1. Average over prompts. With baselines a bar is an effect, the distance from the base run; without, it is the value itself.
2. Lay all dims out as one list, as stored (layer 0 at the top): `L9H6`, `L3 attn`, `" Mary" 3`. With `k` the largest, by size.
3. What `k` leaves out becomes one grey bar if the parts add up, and a number in the caption if they do not.
4. Draw blue to the right of 0 and red to the left, with the bootstrap interval over prompts; say on the axis what 0 is.
5. A running sum is drawn as a line upon the components instead, its interval as a band.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Literal

import numpy as np
import plotly.graph_objects as go
from torch import Tensor

from mechkit._check import checked
from mechkit.plot._cells import Cells, cells_of, floats, interval_of
from mechkit.plot._figure import Facts, Figure, Frame, Notes, Table, axis_lines, dress, label_axis, labels_across
from mechkit.plot._points import ends_of, mark_run, points
from mechkit.plot._scale import sign_colour
from mechkit.plot._size import Length, Paper, paper_in, redrawn
from mechkit.plot._text import caption_of, from_base, lines, number, plain, shortened, technique_of, title_of
from mechkit.plot._theme import Theme, rgba, theme_of
from mechkit.result import Result

_MOST = 200  # bars that can be distinguished
_DIRECT = "direct logit attribution"  # its parts add up
_ATTRIBUTIONS = (
    _DIRECT,
    "gradient x input",
    "token integrated gradients",
    "neuron attribution",
)  # positive raises the metric
_NOT_A_SUM = "expected the parts of direct logit attribution (over='component'), which add up to the metric"


@dataclass(frozen=True)
class _Shown:
    """What is drawn: lengths, in order, with the ends of their intervals (NaN: none)."""

    labels: list[str]
    lengths: np.ndarray
    low: np.ndarray
    high: np.ndarray
    metric: np.ndarray | None  # the mean metric of a cell whose effect is drawn
    rest: int  # how many cells the last bar stands for; 0 if it is one of them
    notes: tuple[str, ...]

    def table(self) -> Table:
        names = np.array(self.labels, dtype=object)
        drawn = {"value": self.lengths} if self.metric is None else {"value": self.metric, "effect": self.lengths}
        return {"label": names, **drawn, "low": self.low, "high": self.high}


@checked
@redrawn
def bars(
    result: Result,
    *,
    k: int | None = None,
    cumulative: bool = False,
    normalized: bool = False,
    level: float = 0.95,
    title: str | None = None,
    size: Literal["column", "page", "slide"] | None = None,
    width: Length | None = None,
    height: Length | None = None,
    font_size: float | None = None,
    caption: bool = True,
    annotations: Notes | None = None,
    theme: str = "light",
) -> Figure:
    """Draw a result as horizontal bars, one for each component, layer, head, token or run; or as a running sum.

    Args:
        result: With a dim besides `'prompt'`, or several, whose cells become one list (`L9H6`). With baselines the bars are
            effects: how far each cell is from the base run, in the metric's unit. A prompt dim of two or more prompts gives
            bootstrap intervals of the mean (`Result.ci`). Cells that exist in no prompt are left out.
        k: Draw the k cells that are furthest from 0, the largest first, and one grey bar for all others together if the parts
            add up (direct logit attribution). By default all cells, in the order in which they are stored.
        cumulative: Draw the running sum of the components of direct logit attribution, from the embedding on, as a line. A
            result of its `over="cumulative"` is a running sum already, and always drawn so.
        normalized: Draw `result.mean("prompt").normalized()`: 0 is the corrupted run and 1 the clean run, and bars start at the
            base run.
        level: Of the intervals.
        title: Of the figure, as plain text; made from the provenance by default.
        size, width, height, font_size, caption, annotations: See `Figure.resized`.
        theme: `"light"` or `"dark"`.

    Returns:
        A figure; `table()` has a row for each bar: `label`, `value` (the mean metric; where there are baselines `effect` is
        the bar's length), and the ends of its interval, `low` and `high`.

    Raises:
        ValueError: no dim besides the prompt, no cells, infinite values, more than 200 bars, `k` below 1, `k` with a running
            sum, or a running sum of what does not add up.

    Example:
        >>> import torch
        >>> scores = Result(torch.tensor([0.5, -2.0]), ("layer",), {"layer": (0, 1)}, {}, "", "logit_diff", "logits", {})
        >>> bars(scores).table()["value"].tolist()
        [0.5, -2.0]
    """
    colours, paper = theme_of(theme), paper_in(size)
    if k is not None and (isinstance(k, bool) or not hasattr(k, "__index__") or k < 1):
        raise ValueError(f"k: expected a whole number of at least 1, got {k!r}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level!r}")
    over = str(result.provenance.get("over"))
    runs_up = technique_of(result.provenance) == _DIRECT and over == "cumulative"
    line = cumulative or runs_up
    if line and (k is not None or normalized):
        raise ValueError(
            "k, normalized: a running sum shows every component; leave them out, or give a result of over='component'"
        )
    cells = cells_of(result, normalized=normalized)
    shown = _running(result, cells, level, runs_up) if line else _chosen(result, cells, k, level, normalized)
    told = caption_of(result.provenance, averaged=result.unit != "p")
    facts = Facts("bars", _default_title(result, line) if title is None else title, (*told, *shown.notes))
    hover = _hover(shown, result, cells.unit)
    axis = (cells.axis, "" if line else _meaning(result, cells, shown))
    draw = _draw_line if line else _draw_bars
    figure = Figure()
    frame = draw(figure, shown, hover, cells.others, colours, axis, paper)
    places = {
        label: (i, y, "") if line else (y, i, "")
        for i, (label, y) in enumerate(zip(shown.labels, shown.lengths, strict=True))
    }
    return dress(figure, colours, frame, facts, shown.table, paper, places=lambda: places)


def _interval_note(what: str, level: float, result: Result) -> str:
    """`'bars: 95 % bootstrap interval over 8 prompts'`."""
    return f"{what}: {number(100 * level, 4)} % bootstrap interval over {len(result.coords['prompt'])} prompts"


def _by_cell(result: Result, index: np.ndarray) -> Tensor:
    """`[cell prompt]`, or `[cell]` without prompts: the effects of some cells."""
    shown = result.effect() if result.baseline else result
    if "prompt" not in result.dims:
        return shown.values.flatten()[index]
    return shown.values.movedim(result.dims.index("prompt"), -1).flatten(0, -2)[index]


def _listed(values: Tensor, result: Result) -> Result:
    """`[cell prompt]` as a result without baselines."""
    coords = {"cell": tuple(range(len(values))), "prompt": tuple(range(values.shape[1]))}
    return Result(values, ("cell", "prompt"), coords, {}, "", result.metric, result.unit, {})


def _chosen(result: Result, cells: Cells, k: int | None, level: float, normalized: bool) -> _Shown:
    """All cells, or the k largest with what is left."""
    n = len(cells.labels)
    kept = np.arange(n) if k is None else np.argsort(-np.abs(cells.effects), kind="stable")[:k]
    if len(kept) > _MOST:
        raise ValueError(
            f"{'result' if k is None else 'k'}: expected at most {_MOST} bars, got {len(kept)}; give a smaller k, such as k=30, "
            "to draw the largest, choose some with sel(), or draw a heatmap"
        )
    labels, lengths = [cells.labels[i] for i in kept], cells.effects[kept]
    notes, rest = [], 0
    ragged = bool(_by_cell(result, cells.index).isnan().any())
    if ragged:
        notes.append("each cell is averaged over the prompts that have it")
    if left := result.values.numel() // (len(result.coords.get("prompt", ())) or 1) - n:
        notes.append(f"{left:,} cells exist in no prompt and are left out")
    low, high = _ends(result, cells, kept, level, normalized, notes)
    if len(kept) < n:
        others = np.setdiff1d(np.arange(n), kept)
        notes.append(f"the {len(kept):,} largest of {n:,} are shown")
        if _adds_up(result) and not ragged and not result.baseline:
            rest = len(others)
            total = _by_cell(result, cells.index[others]).double().sum(0, keepdim=True)
            ends = interval_of(_listed(total, result), level) if total.ndim == 2 else None
            labels.append(f"everything else ({rest:,})")
            lengths = np.append(lengths, float(total.mean()))
            low = np.append(low, ends[0] if ends else np.nan)
            high = np.append(high, ends[1] if ends else np.nan)
            notes.append(f"the grey bar is the sum of the other {rest:,}")
        else:
            notes.append(f"{len(others):,} smaller ones are left out")
    metric = cells.values[kept] if result.baseline else None
    return _Shown(labels, lengths, low, high, metric, rest, tuple(notes))


def _ends(
    result: Result, cells: Cells, kept: np.ndarray, level: float, normalized: bool, notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the intervals of the kept cells; NaN where there are none. Adds to the notes what they are."""
    none = np.full(len(kept), np.nan)
    if len(result.coords.get("prompt", ())) < 2:
        return none, none
    if not normalized:
        ends = interval_of(_listed(_by_cell(result, cells.index[kept]), result), level)
        assert ends is not None
        notes.insert(0, _interval_note("whiskers", level, result))
        return ends
    try:
        interval = result.ci(level, normalized=True)
    except ValueError:  # the gap between the runs changes its sign among the resamples
        notes.insert(0, "no intervals: the gap between clean and corrupted runs is not sure to be of one sign")
        return none, none
    notes.insert(0, _interval_note("whiskers", level, result))
    base = float(result.mean("prompt").normalized().baseline[result.base].nanmean())
    low, high = (floats(end.values)[cells.index[kept]] - base for end in (interval.low, interval.high))
    return low, high


def _running(result: Result, cells: Cells, level: float, runs_up: bool) -> _Shown:
    """The running sum over a result's one dim."""
    dims = [dim for dim in result.dims if dim != "prompt"]
    if not runs_up and (dims != ["component"] or not _adds_up(result) or result.baseline):
        what = technique_of(result.provenance) or "a result of an unknown technique"
        raise ValueError(f"cumulative: {_NOT_A_SUM}; got {what} over {', '.join(dims)}")
    if len(dims) != 1 or bool(result.values.isnan().any()):
        raise ValueError(f"cumulative: expected a component dim whose cells all exist, got dims {result.dims}")
    values = _by_cell(result, cells.index).double()
    values = values if runs_up else values.cumsum(0)
    ends = interval_of(_listed(values, result), level) if values.ndim == 2 else None
    none = np.full(len(values), np.nan)
    notes = [
        "each point is the metric read off the residual stream there"
        if runs_up
        else "running sum of what these components write, in this order"
    ]
    notes += [_interval_note("band", level, result)] if ends else []
    lengths = cells.effects if runs_up else floats(values.mean(1) if values.ndim == 2 else values)
    low, high = ends or (none, none)
    return _Shown(list(cells.labels), lengths, low, high, None, 0, tuple(notes))


def _adds_up(result: Result) -> bool:
    """Whether the cells are parts of one sum, all dims of the split being there."""
    dims = {dim for dim in result.dims if dim != "prompt"}
    over = str(result.provenance.get("over"))
    return technique_of(result.provenance) == _DIRECT and over != "cumulative" and dims == set(over.split())


def _meaning(result: Result, cells: Cells, shown: _Shown) -> str:
    """What 0, blue and red stand for."""
    negative = bool((shown.lengths < 0).any())
    if result.provenance.get("sign") == "magnitude":
        return cells.zero
    if cells.zero:
        return f"{cells.zero}; blue is higher, red is lower"
    if technique_of(result.provenance) in _ATTRIBUTIONS:
        return "blue raises the metric, red lowers it"
    return "blue is above 0, red is below" if negative else ""


def _default_title(result: Result, line: bool) -> str:
    title = title_of(result.provenance, result.metric, [dim for dim in result.dims if dim != "prompt"])
    return f"{title}, running sum" if line else title


def _hover(shown: _Shown, result: Result, unit: str) -> list[str]:
    notes = []
    for i, label in enumerate(shown.labels):
        parts = [label]
        if shown.metric is None:
            is_sum = shown.rest > 0 and i == len(shown.labels) - 1
            parts += [f"{'sum of ' if is_sum else ''}{result.metric} {number(shown.lengths[i], 5)}{unit}"]
        else:
            parts += [f"{result.metric} {number(shown.metric[i], 5)}{unit}"]
            parts += [from_base(shown.lengths[i], unit, result.base)]
        if not math.isnan(shown.low[i]):
            parts += [f"interval {number(shown.low[i], 4)} to {number(shown.high[i], 4)}"]
        notes.append(lines(*parts))
    return notes


def _draw_bars(
    figure: Figure,
    shown: _Shown,
    hover: list[str],
    others: dict[str, float],
    theme: Theme,
    axis: tuple[str, str],
    paper: Paper,
) -> Frame:
    n = len(shown.lengths)
    pitch = min(24.0, max(paper.down(720.0) / n, 2.0))
    colours = [sign_colour(length, theme, zero=theme.positive) for length in shown.lengths]  # the rest is grey
    if shown.rest:
        colours[-1] = theme.grey
    whiskers = {
        "type": "data",
        "symmetric": False,
        "array": shown.high - shown.lengths,
        "arrayminus": shown.lengths - shown.low,
        "color": theme.ink,
        "thickness": 1,
        "width": 3 if pitch > 10 else 1.5,
        "visible": not np.isnan(shown.low).all(),
    }
    figure.add_trace(
        go.Bar(
            x=shown.lengths,
            y=np.arange(n),
            orientation="h",
            marker={"color": colours, "line_width": 0, "opacity": 0.8},  # so that whiskers are seen on them
            error_x=whiskers,
            hovertext=hover,
            hoverinfo="text",
            showlegend=False,
        )
    )
    figure.add_vline(0, line={"color": theme.line, "width": 1})
    low, high = _range(shown)
    for name, at in others.items():
        if 2 * low <= at <= 2 * high:  # near enough not to squeeze the bars
            mark_run(figure, "x", at, name, theme, shift=9)
            low, high = min(low, at), max(high, at)
    names = [shortened(label, 15 if paper.narrow else 24) for label in shown.labels]
    if shown.rest and paper.narrow:
        names[-1] = f"others ({shown.rest:,})"
    room = 0.04 * (high - low)
    longest = max(map(len, names))
    left, right = (28 + 7 * longest, 40) if paper.width is None else (30 + round(7.4 * longest), 20)
    wide = paper.across(left, right, 460)
    letters = max(round((wide + 2 * min(left, right)) / 7.2), 20)  # the title is centred below the bars
    title = [part for text in axis if text for part in textwrap.wrap(text, letters)]
    figure.update_xaxes(**axis_lines(theme), title_text="<br>".join(map(plain, title)))
    figure.update_xaxes(title_font_size=12, title_standoff=8)
    figure.update_xaxes(range=[low - room * (low < 0), high + room * (high > 0)])
    small = {} if pitch >= 13 else {"tickfont": {"size": max(8.0, 0.95 * pitch)}}  # rather than no name
    figure.update_yaxes(**label_axis(names, pitch, 13 if pitch >= 13 else 8.2), **small)
    figure.update_yaxes(range=[n - 0.4, -0.6], title_text="")
    figure.update_layout(bargap=0.25 if pitch > 10 else 0.15)
    return Frame(wide, pitch * n, left, right, below=38 + 16 * len(title), above=14 * bool(others))


def _draw_line(
    figure: Figure,
    shown: _Shown,
    hover: list[str],
    others: dict[str, float],
    theme: Theme,
    axis: tuple[str, str],
    paper: Paper,
) -> Frame:
    n = len(shown.lengths)
    left, right = 84, 20 if paper.width is not None else 40
    pitch = min(48.0, max(760 / n, 6.0)) if paper.width is None else paper.across(left, right, 760) / n
    x = np.arange(n)
    if not np.isnan(shown.low).all():
        figure.add_trace(
            go.Scatter(
                x=np.concatenate([x, x[::-1]]),
                y=np.concatenate([shown.low, shown.high[::-1]]),
                fill="toself",
                fillcolor=rgba(theme.positive, 0.2),
                line_width=0,
                hoverinfo="skip",
                showlegend=False,
            )
        )
    line = {"mode": "lines+markers", "line": {"color": theme.positive, "width": 2}}
    figure.add_trace(points(x, shown.lengths, hover, {"size": 6 if pitch > 10 else 4}, **line))
    names = [shortened(label) for label in shown.labels]
    ticks = labels_across(names, pitch)
    low, high = _range(shown)
    room = 0.05 * (high - low)
    figure.update_xaxes(**ticks.axis, range=[-0.5, n - 0.5])
    figure.update_yaxes(
        **axis_lines(theme), title_text=plain(axis[0]), title_font_size=12, range=[low - room, high + room]
    )
    below = 24 + (6 * ticks.longest if ticks.slanted else 14)
    return Frame(max(pitch * n, 300 if paper.width is None else 60), paper.down(300.0), left, right, below)


def _range(shown: _Shown) -> tuple[float, float]:
    """From the lowest to the highest end of a bar or an interval, 0 included."""
    low, high = ends_of(shown.lengths, shown.low, shown.high, zero=True)
    return (low, high) if low < high else (-1.0, 1.0)  # all bars are 0
