"""Scatter of two scores of the same cells: one point a head, such as its induction score against its patching effect.

1. Average each result over prompts and lay its cells out as one list (`_cells.py`). With baselines a cell's number is its effect,
   the distance from the base run; without, it is the value itself.
2. Match the two by label, and colour each point by its layer.
3. Write the names of the points that are farthest from the middle of all next to them (`_points.py`).
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mechkit._check import checked
from mechkit.plot._cells import Cells, cells_of, interval_of
from mechkit.plot._figure import Facts, Figure, Frame, Notes, Table, axis_lines, dress, write_below
from mechkit.plot._points import MOST, ends_of, mark_run, padded, points, thinned, write_labels
from mechkit.plot._scale import layer_steps, layers_lying
from mechkit.plot._size import Length, paper_in, redrawn
from mechkit.plot._text import caption_of, from_base, lines, number, plain
from mechkit.plot._theme import Theme, theme_of
from mechkit.result import Result
from mechkit.result._columns import are_whole, label_array

_SIDE = 460  # pixels of the area


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
@redrawn
def heads(
    x: Result,
    y: Result,
    *,
    label: int = 10,
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
    """Draw two scores of the same heads against each other, one point a head.

    Args:
        x, y: Results with the same dims and labels besides the prompt (usually layer and head), in any order; their prompts,
            metrics and units may differ. Where there are baselines the effect is drawn: how far a cell is from the base run.
        label: How many points get their names: those farthest from the middle (the two medians, each axis in its standard
            deviation).
        level: Of the bootstrap intervals over prompts, which are shown when one points at a head.
        title: Of the figure, as plain text; the two metrics by default.
        size, width, height, font_size, caption, annotations: See `Figure.resized`.
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
    colours, paper = theme_of(theme), paper_in(size)
    if isinstance(label, bool) or not hasattr(label, "__index__") or label < 0:
        raise ValueError(f"label: expected a whole number of at least 0, got {label!r}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level!r}")
    columns, rows = cells_of(x), cells_of(y)
    matched, missing = _matched(x, y, columns, rows, level)
    distance = _from_the_middle(matched.x, matched.y)
    drawn = thinned(distance, MOST)
    notes = [f"{len(matched.x):,} points"] + (
        [f"{missing:,} cells do not exist in both and are left out"] if missing else []
    )
    if len(drawn) < len(matched.x):
        notes.append(f"{len(drawn):,} of them drawn, all that lie far out among them")
    if matched.ends["x"] or matched.ends["y"]:
        notes.append(f"intervals on pointing: {number(100 * level, 4)} % bootstrap over prompts")

    figure = Figure()
    ranges = [padded(*ends_of(v, zero=bool(cells.zero))) for v, cells in ((matched.x, columns), (matched.y, rows))]
    layered = "layer" in matched.coords
    right = 20 if paper.narrow else 110 if layered else 60
    wide = paper.across(84, right, _SIDE)
    area = (min(wide, 1.4 * _SIDE), paper.down(min(_SIDE, wide)))
    by_layer = _by_layer(matched, drawn, colours)
    if layered and paper.narrow:
        by_layer, layers = layers_lying(by_layer, area[0])
        figure.update_layout(coloraxis=layers)
        write_below(figure, ["layer"], 0, 56)
        figure._bars += (("coloraxis", 78),)
    marker = {"size": 8, "line": {"width": 0.5, "color": colours.line}, **by_layer}
    hover = [_hover(matched, x, y, columns, rows, i) for i in drawn.tolist()]
    figure.add_trace(points(matched.x[drawn], matched.y[drawn], hover, marker))
    farthest = [int(i) for i in np.argsort(-distance, kind="stable")[:label] if distance[i] > 0]
    left_out = write_labels(figure, matched.x, matched.y, matched.labels, farthest, drawn, area, ranges, colours)
    if left_out:
        notes.append(f"{left_out} of {len(farthest)} names left out for want of room")
    for axis, cells, span in (("x", columns, ranges[0]), ("y", rows, ranges[1])):
        _draw_runs(figure, axis, cells, span, colours)
    for axis, cells, span in (("x", columns, ranges[0]), ("y", rows, ranges[1])):
        update = figure.update_xaxes if axis == "x" else figure.update_yaxes
        letters = round((area[axis == "y"] + 40) / 7)
        parts = [line for part in (cells.axis, cells.zero) if part for line in textwrap.wrap(part, max(letters, 20))]
        text = "<br>".join(map(plain, parts))
        update(**axis_lines(colours), range=span, title={"text": text, "font_size": 12, "standoff": 10})
    facts = Facts("heads", f"{y.metric} against {x.metric}" if title is None else title, (*_caption(x, y), *notes))
    frame = Frame(*area, left=84, right=right, below=66 + 52 * (layered and paper.narrow), above=14)
    places = {name: (x_, y_, "") for name, x_, y_ in zip(matched.labels, matched.x, matched.y, strict=True)}
    return dress(figure, colours, frame, facts, matched.table, paper, places=lambda: places)


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
    coords = {dim: label_array([columns.coords[k][axis] for k in i]) for axis, dim in enumerate(dims)}
    matched = _Points(tuple(columns.labels[k] for k in i), coords, columns.effects[i], rows.effects[j], ends)
    return matched, len(columns.labels) + len(rows.labels) - 2 * len(i)


def _before_averaging(result: Result) -> Result:
    return result.effect() if result.baseline else result


def _from_the_middle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of each point from the medians, each axis in its standard deviation."""
    parts = [(v - np.median(v)) / (v.std() or 1.0) for v in (x, y)]
    return np.hypot(*parts)


def _by_layer(matched: _Points, drawn: np.ndarray, theme: Theme) -> dict[str, Any]:
    """A marker's colours: one step of the sequential map for each layer."""
    if "layer" not in matched.coords:
        return {"color": theme.positive}
    layers = list(dict.fromkeys(matched.coords["layer"].tolist()))
    layers = sorted(layers) if are_whole(layers) else layers
    places = [layers.index(layer) for layer in matched.coords["layer"][drawn].tolist()]
    return {"color": places, "showscale": True, **layer_steps(layers, theme)}


def _hover(matched: _Points, x: Result, y: Result, columns: Cells, rows: Cells, i: int) -> str:
    notes = [matched.labels[i]]
    for name, result, cells, value in (("x", x, columns, matched.x[i]), ("y", y, rows, matched.y[i])):
        far = from_base(value, cells.unit, result.base) if result.baseline else f"{number(value, 5)}{cells.unit}"
        text = f"{result.metric} {far}"
        if (ends := matched.ends[name]) is not None and not np.isnan(ends[0][i]):
            text += f" ({number(ends[0][i], 4)} to {number(ends[1][i], 4)})"
        notes.append(text)
    return lines(*notes)


def _draw_runs(figure: Figure, axis: str, cells: Cells, span: tuple[float, float], theme: Theme) -> None:
    """Dotted lines at the other runs that are within the picture; the base run is the line at 0."""
    for name, at in cells.others.items():
        if span[0] <= at <= span[1]:
            mark_run(figure, axis, at, name, theme)


def _caption(x: Result, y: Result) -> list[str]:
    """What both have in common, and then what each has to itself."""
    one, two = (caption_of(result.provenance, averaged=result.unit != "p") for result in (x, y))
    notes = [part for part in one if part in two]
    for name, mine, theirs in (("across", one, two), ("up", two, one)):
        if own := [part for part in mine if part not in theirs]:
            notes.append(f"{name}: {', '.join(own)}")
    return notes
