"""Scatter of two scores of the same cells: one point a head, such as its induction score against its patching effect.

1. Average each result over prompts and lay its cells out as one list (`cells_of`, which bars and comparisons share). With
   baselines a cell's number is its effect, the distance from the base run; without, it is the value itself.
2. Match the two by label, and colour each point by its layer.
3. Write the names of the points that are farthest from the middle of all next to them, where no other name or point is
   (`place_labels` in `_compare.py`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from torch import Tensor

from mechkit._check import checked
from mechkit.plot._compare import MOST, padded, thinned, write_labels
from mechkit.plot._figure import Facts, Figure, Frame, Table, axis_lines, dress
from mechkit.plot._labels import check_result
from mechkit.plot._tables import to_numpy
from mechkit.plot._text import caption_of, lines, number, plain
from mechkit.plot._theme import Theme, theme_of
from mechkit.result import Label, Result

_SIDE = 460  # pixels of the area


@dataclass(frozen=True)
class Cells:
    """The cells of a result as one list: those that exist, as stored.

    Attributes:
        labels: `L9H6`, as in `Result.top`.
        coords: Of each cell, by the result's dims.
        values: Mean over prompts, `[cell]` in float64.
        effects: Distance from the base run, in the same unit; the values themselves where there is none.
        index: Of each cell among all of the result's, its last dim fastest.
        others: The other baselines, as far from the base run as they are in every cell.
        axis: What the effects are and their unit, for an axis: `change in logit_diff (logits)`.
        zero: What 0 is, if it is a run: `0 = corrupted run`.
        unit: With a space in front; empty for normalized values.
    """

    labels: tuple[str, ...]
    coords: tuple[tuple[Label, ...], ...]
    values: np.ndarray
    effects: np.ndarray
    index: np.ndarray
    others: dict[str, float]
    axis: str
    zero: str
    unit: str


@dataclass(frozen=True)
class _Points:
    """The matched cells: `x` and `y`, the ends of their intervals (`None`: none), and the layers, if the cells have one."""

    labels: tuple[str, ...]
    coords: dict[str, np.ndarray]
    x: np.ndarray
    y: np.ndarray
    ends: dict[str, tuple[np.ndarray, np.ndarray] | None]

    def table(self) -> Table:
        columns = {"label": np.array(self.labels, dtype=object), **self.coords, "x": self.x, "y": self.y}
        for axis, ends in self.ends.items():
            if ends is not None:
                columns |= {f"{axis} low": ends[0], f"{axis} high": ends[1]}
        return columns


@checked
def heads(
    x: Result, y: Result, *, label: int = 10, level: float = 0.95, title: str | None = None, theme: str = "light"
) -> Figure:
    """Draw two scores of the same heads against each other, one point a head.

    Args:
        x, y: Results with the same dims and labels besides the prompt (usually layer and head), in any order; their prompts,
            metrics and units may differ. Where there are baselines the effect is drawn: how far a cell is from the base run.
        label: How many points get their names: those farthest from the middle (the two medians, each axis in its standard
            deviation).
        level: Of the bootstrap intervals over prompts, which are told when one points at a head.
        title: Of the figure, as plain text; the two metrics by default.
        theme: `"light"` or `"dark"`.

    Returns:
        A figure; `table()` has a row for each point: `label`, the dims, `x` and `y` (mean values or effects) and, where there are
        at least two prompts, the ends of their intervals.

    Raises:
        ValueError: the two have other dims or labels, no cell that exists in both, infinite numbers, or `label` below 0.

    Example:
        >>> import torch
        >>> coords = {"layer": (0, 1), "head": (0, 1)}
        >>> one, two = (Result(torch.eye(2) * i, ("layer", "head"), coords, {}, "", "m", "score", {}) for i in (1, 2))
        >>> heads(one, two).table()["y"].tolist()
        [2.0, 0.0, 0.0, 2.0]
    """
    colours = theme_of(theme)
    if isinstance(label, bool) or not hasattr(label, "__index__") or label < 0:
        raise ValueError(f"label: expected a whole number of at least 0, got {label!r}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level!r}")
    columns, rows = cells_of(x), cells_of(y)
    points, missing = _matched(x, y, columns, rows, level)
    distance = _from_the_middle(points.x, points.y)
    drawn = thinned(distance, MOST)
    notes = [f"{len(points.x):,} points"] + (
        [f"{missing:,} cells do not exist in both and are left out"] if missing else []
    )
    if len(drawn) < len(points.x):
        notes.append(f"{len(drawn):,} of them drawn, all that lie far out among them")
    if points.ends["x"] or points.ends["y"]:
        notes.append(f"intervals on pointing: {number(100 * level, 4)} % bootstrap over prompts")

    figure = Figure()
    ranges = [_range(points.x, columns), _range(points.y, rows)]
    figure.add_trace(
        go.Scatter(
            x=points.x[drawn],
            y=points.y[drawn],
            mode="markers",
            marker={"size": 8, "line": {"width": 0.5, "color": colours.line}, **_by_layer(points, drawn, colours)},
            hovertext=[_hover(points, x, y, columns, rows, i) for i in drawn.tolist()],
            hoverinfo="text",
            showlegend=False,
        )
    )
    farthest = [int(i) for i in np.argsort(-distance, kind="stable")[:label] if distance[i] > 0]
    left_out = write_labels(figure, points.x, points.y, points.labels, farthest, drawn, (_SIDE, _SIDE), ranges, colours)
    if left_out:
        notes.append(f"{left_out} of {len(farthest)} names left out for want of room")
    for axis, cells, span in (("x", columns, ranges[0]), ("y", rows, ranges[1])):
        _draw_runs(figure, axis, cells, span, colours)
    for update, cells, span in ((figure.update_xaxes, columns, ranges[0]), (figure.update_yaxes, rows, ranges[1])):
        text = "<br>".join(plain(part) for part in (cells.axis, cells.zero) if part)
        update(**axis_lines(colours), range=span, title={"text": text, "font_size": 12, "standoff": 10})
    facts = Facts("heads", f"{y.metric} against {x.metric}" if title is None else title, (*_caption(x, y), *notes))
    layered = "layer" in points.coords
    frame = Frame(_SIDE, _SIDE, left=84, right=110 if layered else 60, below=66, above=14)
    return dress(figure, colours, frame, facts, points.table)


# -- cells of a result: shared with bars and comparisons ----------------------------------------------------------------


def cells_of(result: Result, *, normalized: bool = False) -> Cells:
    """The cells of a result as one list, averaged over prompts. Those that exist in no prompt are left out.

    Args:
        result: Of any dims.
        normalized: Whether to take `result.mean("prompt").normalized()`.

    Raises:
        ValueError: no dim besides the prompt, no cell that exists, infinite numbers, or nothing to normalize by.
    """
    check_result(result)
    mean = result.mean("prompt") if "prompt" in result.dims else result
    if not mean.dims:
        raise ValueError(f"result: expected a dim besides 'prompt', got {result.dims}; one number needs no picture")
    if bool(mean.values.isinf().any()):
        raise ValueError("result: expected finite values, got an infinite one; choose others with sel()")
    mean = mean.normalized() if normalized else mean
    labels = {tuple(cell.coords.values()): cell.label for cell in mean.top(max(1, mean.values.numel()))}
    if not labels:
        raise ValueError(
            f"result: expected a cell that exists, got none among {mean.values.numel()}; choose others with sel()"
        )
    effects = mean.effect() if mean.baseline else mean
    places = itertools.product(*(mean.coords[dim] for dim in mean.dims))
    there = [(i, coords) for i, coords in enumerate(places) if coords in labels]
    index = np.array([i for i, _ in there])
    axis, zero = _axis(mean)
    return Cells(
        labels=tuple(labels[coords] for _, coords in there),
        coords=tuple(coords for _, coords in there),
        values=floats(mean.values)[index],
        effects=floats(effects.values)[index],
        index=index,
        others={name: float(b) for name, b in effects.baseline.items() if name != mean.base and b.numel() == 1},
        axis=axis,
        zero=zero,
        unit="" if mean.unit == "normalized" else f" {mean.unit}",
    )


def interval_of(shown: Result, level: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Ends of the bootstrap interval of the mean of every cell; `None` for fewer than two prompts."""
    if len(shown.coords.get("prompt", ())) < 2:
        return None
    interval = shown.ci(level)
    return floats(interval.low.values), floats(interval.high.values)


def floats(values: Tensor) -> np.ndarray:
    """All numbers in one row, in float64."""
    return to_numpy(values).ravel()


def _axis(mean: Result) -> tuple[str, str]:
    name, run = f"{mean.metric} ({mean.unit})", f"0 = {mean.base} run"
    if mean.unit == "normalized":
        name = f"{mean.metric}, normalized"
        if mean.base == "corrupted":
            return name, f"{run}, 1 = clean run"
        return f"change in {name}", f"{run}, −1 = corrupted run" if mean.base == "clean" else run
    if mean.baseline and mean.provenance.get("sign") == "magnitude":
        return f"size of the change in {name}", f"{run}; sizes only"
    return (f"change in {name}", run) if mean.baseline else (name, "")


# -- this figure --------------------------------------------------------------------------------------------------------


def _matched(x: Result, y: Result, columns: Cells, rows: Cells, level: float) -> tuple[_Points, int]:
    """The cells that exist in both, in x's order; and how many of one do not exist in the other."""
    dims = [dim for dim in x.dims if dim != "prompt"]
    others = [dim for dim in y.dims if dim != "prompt"]
    if set(dims) != set(others):
        raise ValueError(f"y: expected the dims of x, {tuple(dims)}, got {tuple(others)}")
    for dim in dims:
        if lacking := set(x.coords[dim]) ^ set(y.coords[dim]):
            some = ", ".join(sorted(map(str, lacking))[:8])
            raise ValueError(
                f"y: expected the same {dim} labels as x, but one of the two lacks {some}; sel() those that both have"
            )
    order = [others.index(dim) for dim in dims]
    where = {tuple(coords[i] for i in order): j for j, coords in enumerate(rows.coords)}
    both = np.array([(i, where[c]) for i, c in enumerate(columns.coords) if c in where], dtype=int).reshape(-1, 2)
    if not len(both):
        raise ValueError("y: expected cells that exist in both results, got none")
    i, j = both.T
    ends: dict[str, tuple[np.ndarray, np.ndarray] | None] = {}
    for name, result, cells, kept in (("x", x, columns, i), ("y", y, rows, j)):
        found = interval_of(_before_averaging(result), level)
        ends[name] = found and (found[0][cells.index[kept]], found[1][cells.index[kept]])
    coords = {dim: np.array([columns.coords[k][axis] for k in i]) for axis, dim in enumerate(dims)}
    points = _Points(tuple(columns.labels[k] for k in i), coords, columns.effects[i], rows.effects[j], ends)
    return points, len(columns.labels) + len(rows.labels) - 2 * len(i)


def _before_averaging(result: Result) -> Result:
    return result.effect() if result.baseline else result


def _from_the_middle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of each point from the medians, each axis in its standard deviation."""
    parts = [(v - np.median(v)) / (v.std() or 1.0) for v in (x, y)]
    return np.hypot(*parts)


def _by_layer(points: _Points, drawn: np.ndarray, theme: Theme) -> dict[str, Any]:
    """A marker's colours: one step of the sequential map for each layer."""
    if "layer" not in points.coords:
        return {"color": theme.positive}
    layers = list(dict.fromkeys(points.coords["layer"].tolist()))
    layers = sorted(layers) if all(isinstance(layer, int) for layer in layers) else layers
    n = len(layers)
    steps = sample_colorscale(list(theme.sequential[3:]), np.linspace(0, 1, n) if n > 1 else [1.0])
    every = math.ceil(n / 12)
    return {
        "color": [layers.index(layer) for layer in points.coords["layer"][drawn].tolist()],
        "colorscale": [[end / n, step] for i, step in enumerate(steps) for end in (i, i + 1)],
        "cmin": -0.5,
        "cmax": n - 0.5,
        "showscale": True,
        "colorbar": {
            "title": {"text": "layer", "side": "top", "font_size": 12},
            "tickvals": list(range(0, n, every)),
            "ticktext": [plain(str(layer)) for layer in layers[::every]],
            "thickness": 14,
            "outlinewidth": 0,
            "lenmode": "pixels",
            "len": min(300, max(60, 24 * n + 40)),
            "y": 1,
            "yanchor": "top",
        },
    }


def _hover(points: _Points, x: Result, y: Result, columns: Cells, rows: Cells, i: int) -> str:
    told = [points.labels[i]]
    for name, result, cells, value in (("x", x, columns, points.x[i]), ("y", y, rows, points.y[i])):
        sign, far = ("+", f" from the {result.base} run") if result.baseline else ("", "")
        text = f"{result.metric} {number(value, 5, sign=sign)}{cells.unit}{far}"
        if (ends := points.ends[name]) is not None and not np.isnan(ends[0][i]):
            text += f" ({number(ends[0][i], 4)} to {number(ends[1][i], 4)})"
        told.append(text)
    return lines(*told)


def _range(values: np.ndarray, cells: Cells) -> tuple[float, float]:
    """All points, and the base run's 0."""
    ends = [*values, 0.0] if cells.zero else values
    return padded(float(np.min(ends)), float(np.max(ends)))


def _draw_runs(figure: Figure, axis: str, cells: Cells, span: tuple[float, float], theme: Theme) -> None:
    """Dotted lines at the other runs that are within the picture; the base run is the line at 0."""
    for name, at in ((f"{name} run", at) for name, at in cells.others.items() if span[0] <= at <= span[1]):
        style = {"line": {"color": theme.muted, "width": 1, "dash": "dot"}, "layer": "below"}
        if axis == "x":
            figure.add_vline(at, **style)
            figure.add_annotation(
                x=at, y=1, yref="paper", yshift=8, text=plain(name), showarrow=False, font_color=theme.muted
            )
        else:
            figure.add_hline(at, **style)
            place = {"x": 1, "xref": "paper", "xanchor": "right", "yshift": 8}
            figure.add_annotation(y=at, text=plain(name), showarrow=False, font_color=theme.muted, **place)


def _caption(x: Result, y: Result) -> list[str]:
    """What both have in common, and then what each has to itself."""
    one, two = (caption_of(result.provenance, averaged=result.unit != "p") for result in (x, y))
    told = [part for part in one if part in two]
    for name, mine, theirs in (("across", one, two), ("up", two, one)):
        if own := [part for part in mine if part not in theirs]:
            told.append(f"{name}: {', '.join(own)}")
    return told
