"""Attention patterns: one head large, all heads small, or lines from token to token.

1. Choose the prompt and the heads (`_attention_data.py`).
2. Draw destinations downwards and sources across, with their tokens. 0 is white; what the mask hides does not exist and is grey.
   All heads share one scale, which ends at the largest value.
3. `"pattern"` draws every head and shows one at a time, chosen from a menu. `"grid"` draws all of them side by side, layers
   downwards (layer 0 on top) and heads across. `"lines"` is in `_attention_lines.py`.
4. Each figure has two pairs of axes over each other. The one that can be seen has as many labels as fit. The hidden one has the
   label of every position, whole: the hover texts take their tokens from there, so that a page of many patterns need not hold a
   text for every cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from mechkit._check import checked
from mechkit.plot._attention_data import (
    Drawing,
    Patterns,
    block_labels,
    lay_colours,
    patterns_of,
    pooled,
    steps_note,
    value_template,
)
from mechkit.plot._attention_lines import draw_lines
from mechkit.plot._figure import Facts, Figure, Frame, Notes, Place, dress, label_axis, labels_across, room_left
from mechkit.plot._scale import Scale
from mechkit.plot._size import Length, Paper, paper_in, redrawn
from mechkit.plot._text import plain, shortened
from mechkit.plot._theme import Theme, theme_of
from mechkit.result import Label, Result

_SIDE = 720  # pixels of the large pattern, at most; cells too, so that none is smaller than a pixel
_CELL = 34  # pixels of a cell, at most
_LEAST = (140, 80)  # pixels of a pattern, across and down, at least
_EXACT = 400_000  # cells that are drawn as they are; more are drawn as bytes
_PAGE = 40_000_000  # cells that a page can hold as bytes (53 MB)
_GRID = (960, 750)  # pixels of a grid, across and down, about
_TILE = (4, 190)  # pixels of one of its patterns, at least and at most

Style = Literal["pattern", "grid", "lines"]


@checked
@redrawn
def attention(
    result: Result,
    *,
    layer: Label | None = None,
    head: Label | None = None,
    prompt: Label | None = None,
    style: Style = "pattern",
    min_weight: float | None = None,
    bos: bool | None = None,
    title: str | None = None,
    size: Literal["column", "page", "slide"] | None = None,
    width: Length | None = None,
    height: Length | None = None,
    font_size: float | None = None,
    caption: bool = True,
    annotations: Notes | None = None,
    theme: str = "light",
) -> Figure:
    """Draw attention patterns of one prompt: who attends (destination) downwards, to whom (source) across.

    Args:
        result: From `attention_patterns`, or any result with dims `"dest"` and `"src"`, and perhaps `"layer"`, `"head"` and
            `"prompt"`. Of several prompts one is drawn; for their mean pass `result.mean("prompt")`, which is for prompts of one
            length and structure. If there are baselines, the change from the base run is drawn.
        layer, head: Labels. `"pattern"` shows this head first, and has a menu with all others; the other styles draw these alone.
            For a page of one head without a menu, pass `result.sel(layer=[9], head=[6])`.
        prompt: Label of the prompt; the first by default.
        style: `"pattern"`: one head large. `"grid"`: all heads small, layers × heads, or wrapped if there is one layer or head.
            `"lines"`: tokens on both sides and lines between them, at most 100 tokens and 7 heads.
        min_weight: Of `"lines"`: weaker ones are left out, in the values' unit; default 0.01.
        bos: Whether attention to the first token (BOS, or what else stands there) is drawn. By default it is, but for `"lines"`
            where it is more than a quarter of all, and than twice its share of evenly spread attention. Without it the colours
            and widths are of the rest, which is not rescaled, and the caption says how much was left out.
        title: As plain text; made from the metric and the head by default.
        size, width, height, font_size, caption, annotations: See `Figure.resized`.
        theme: `"light"` or `"dark"`.

    Returns:
        A plotly figure; nothing is shown or written. Its table has every cell that exists as it was. More than 400,000 cells
        are drawn in 255 steps, and more than 720 tokens as blocks; the caption says so.

    Raises:
        ValueError: other dims, an unknown label, an infinite value, nothing to draw, or too much for lines.

    Example:
        >>> import torch
        >>> coords = {"dest": ('"a" 0', '"b" 1'), "src": ('"a" 0', '"b" 1')}
        >>> values = torch.tensor([[1.0, torch.nan], [0.25, 0.75]])
        >>> figure = attention(Result(values, ("dest", "src"), coords, {}, "", "attention", "attention", {}))
        >>> figure.data[0].z[1].tolist()
        [0.25, 0.75]
    """
    colours, paper = theme_of(theme), paper_in(size)
    if style not in ("pattern", "grid", "lines"):
        raise ValueError(f"style: expected 'pattern', 'grid' or 'lines', got {style!r}")
    if min_weight is not None and style != "lines":
        raise ValueError(f"min_weight: given together with style={style!r}, which draws every cell; leave it out")
    drawn = bos if bos is not None or style == "lines" else True
    patterns, first = patterns_of(result, layer=layer, head=head, prompt=prompt, only=style != "pattern", bos=drawn)
    if style == "lines":
        drawing = draw_lines(patterns, 0.01 if min_weight is None else min_weight, colours, paper)
    elif style == "grid":
        drawing = _draw_grid(patterns, colours, paper)
    else:
        drawing = _draw_pattern(patterns, first, title is None, colours, paper)
    heading = _heading(patterns, first if style == "pattern" else None) if title is None else title
    facts = Facts("attention", heading, (*patterns.notes, *filter(None, drawing.notes)))
    places = _places(patterns, style)
    figure = dress(drawing.figure, colours, drawing.frame, facts, drawing.table, paper, places=lambda: places)
    if style == "pattern":  # shows through where a cell does not exist, and between cells
        figure.update_layout(plot_bgcolor=colours.masked)
    return figure


def _places(patterns: Patterns, style: str) -> dict[str, Place]:
    """Where the cell of each destination and source is, of a single pattern: `'" to" 13 → " Mary" 1'`."""
    if style != "pattern":
        return {}
    factor = max(1, math.ceil(max(patterns.values.shape[1:]) / _SIDE))
    sides = [list(enumerate(labels)) for labels in (patterns.dests, patterns.srcs)]
    return {f"{d} → {s}": (j // factor, i // factor, "") for i, d in sides[0] for j, s in sides[1]}


def _heading(patterns: Patterns, panel: int | None) -> str:
    """`'Attention of L9H6'`; without a panel, of all of them."""
    names = patterns.names
    metric = patterns.result.metric
    what = metric[:1].upper() + metric[1:]
    if panel is None and len(names) > 1:
        some = f"{names[0]} to {names[-1]}" if len(names) > 3 else ", ".join(names)
        return f"{what} of {len(names)} heads, {some}" if len(names) > 3 else f"{what} of {some}"
    name = names[panel or 0]
    return f"{what} of {shortened(name)}" if name else what


# -- one head, large -------------------------------------------------------------------------------------------------------


def _draw_pattern(patterns: Patterns, first: int, retitle: bool, theme: Theme, paper: Paper) -> Drawing:
    left_of = room_left([shortened(label, paper.letters) for label in patterns.dests], labels_across([], 1), paper)
    most = paper.across(left_of, paper.bar(), _SIDE), paper.down(640.0)
    factor = _factor(patterns.values.shape, int(min(most)), _PAGE)
    values, names = patterns.values, patterns.names
    if paper.still:  # a picture shows one
        values, names, first = values[first : first + 1], names[first : first + 1], 0
    n_panels = len(names)
    shown = pooled(values, factor)
    dests, srcs = block_labels(patterns.dests, factor), block_labels(patterns.srcs, factor)
    cell = min(_CELL, max(0.5, min(most[0] / len(srcs), most[1] / len(dests))))
    width, height = max(_LEAST[0], round(cell * len(srcs))), max(_LEAST[1], round(cell * len(dests)))
    scale = patterns.scale(theme, coded=shown.size > _EXACT)
    gap = 1 if cell >= 8 else 0
    figure = Figure()
    for i, (name, pattern) in enumerate(zip(names, shown, strict=True)):
        cells = _cells(pattern, name, patterns.what, scale, visible=i == first, xgap=gap, ygap=gap)
        figure.add_trace(cells)
    down = _Axis("y", dests, patterns.dests[::factor], height / len(dests))
    across = _Axis("x", srcs, patterns.srcs[::factor], width / len(srcs))
    bottom, left = _label_axes(figure, down, across, paper)
    figure.update_layout(xaxis2_title_text="source (attended to)")
    figure.update_layout(yaxis2_title_text="destination (attends)" if height >= 140 else "destination")
    line = {"showline": True, "mirror": True, "linecolor": theme.line, "linewidth": 1}
    figure.update_layout(xaxis2=line, yaxis2=line)
    frame = Frame(width, height, left, paper.bar(), bottom, above=40 if n_panels > 1 else 0)
    frame = lay_colours(figure, scale, patterns.has_absent, paper, frame, theme)
    if n_panels > 1:
        figure.update_layout(updatemenus=[_menu(patterns, first, retitle, theme)])
    notes = (_pooling(factor, scale), steps_note(scale, patterns.has_absent))
    return Drawing(figure, frame, notes, patterns.table)


def _menu(patterns: Patterns, first: int, retitle: bool, theme: Theme) -> dict[str, Any]:
    """A dropdown with every head. The trace behind the labels stays visible."""
    buttons = []
    for i, name in enumerate(patterns.names):
        visible = [j == i for j in range(len(patterns.names))] + [True]
        title = {"title.text": plain(_heading(patterns, i))} if retitle else {}
        buttons.append({"method": "update", "label": plain(shortened(name)), "args": [{"visible": visible}, title]})
    light = theme.name == "light"  # plotly paints the chosen entry nearly white, whatever the theme
    return {
        "buttons": buttons,
        "active": first,
        "x": 0,
        "xanchor": "left",
        "y": 1,
        "yanchor": "bottom",
        "pad": {"b": 8, "t": 0, "l": 0, "r": 0},
        "bgcolor": theme.box if light else theme.line,
        "bordercolor": theme.line,
        "font": {"color": theme.ink if light else theme.paper, "size": 12},
    }


# -- all heads, small ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tiles:
    """Where each head's pattern is. Distances are in cells; a cell has `cell` pixels.

    Attributes:
        n_rows, n_columns: Of the grid.
        size: Cells of a pattern, down and across.
        cell: Pixels of a cell.
        named: Whether every pattern has its name above it, rather than the grid's edges theirs.
        labelled: Whether the tokens are written at the edges.
        space: Pixels between two patterns.
    """

    n_rows: int
    n_columns: int
    size: tuple[int, int]
    cell: float
    named: bool
    labelled: bool
    space: int

    @property
    def above(self) -> float:
        """Room above each pattern."""
        return (22 if self.named else self.space) / self.cell

    @property
    def rows(self) -> list[float]:
        """Where the first cell of each row of patterns is."""
        return [self.above + row * (self.size[0] + self.above) for row in range(self.n_rows)]

    @property
    def columns(self) -> list[float]:
        """Where the first cell of each column of patterns is."""
        return [column * (self.size[1] + self.space / self.cell) for column in range(self.n_columns)]

    @property
    def corners(self) -> list[tuple[float, float]]:
        """The first cell of each pattern: y, x."""
        return [(y, x) for y in self.rows for x in self.columns]


def _tiles(patterns: Patterns, paper: Paper) -> tuple[_Tiles, int]:
    """Rows are layers and columns heads; a grid with one of these alone is wrapped. And how many tokens become one cell."""
    n_rows, n_columns = len(patterns.layers), len(patterns.heads)
    wrapped = min(n_rows, n_columns) == 1
    if wrapped:
        n_panels = n_rows * n_columns
        n_rows = math.ceil(n_panels / max(4, math.ceil(math.sqrt(1.4 * n_panels))))
        n_columns = math.ceil(n_panels / n_rows)
    for words in (7 * max(len(shortened(label, paper.letters)) for label in patterns.dests), 20):
        room = paper.across(50 + words, paper.bar(), _GRID[0]), paper.down(_GRID[1])
        space = 5 if min(room[0] / n_columns, room[1] / n_rows) >= 25 else 2
        above = 22 if wrapped and n_rows * n_columns > 1 else space
        tile = int(min(_TILE[1], max(_TILE[0], min(room[0] / n_columns - space, room[1] / n_rows - above))))
        factor = _factor(patterns.values.shape, tile, _EXACT)
        n_dests, n_srcs = (math.ceil(side / factor) for side in patterns.values.shape[1:])
        cell = min(_CELL, tile / max(n_dests, n_srcs))
        labelled = cell >= 12
        if labelled:
            break
    named = (wrapped or labelled) and len(patterns.names) > 1
    return _Tiles(n_rows, n_columns, (n_dests, n_srcs), cell, named, labelled, space), factor


def _draw_grid(patterns: Patterns, theme: Theme, paper: Paper) -> Drawing:
    tiles, factor = _tiles(patterns, paper)
    shown = pooled(patterns.values, factor)
    scale = patterns.scale(theme, coded=shown.size > _EXACT)
    gap = 1 if tiles.cell >= 8 else 0
    figure = Figure()
    for name, pattern, (y, x) in zip(patterns.names, shown, tiles.corners, strict=False):
        cells = _cells(pattern, name, patterns.what, scale, x0=x, y0=y, dx=1, dy=1, xgap=gap, ygap=gap)
        figure.add_trace(cells)
    down = _Axis("y", block_labels(patterns.dests, factor), patterns.dests[::factor], tiles.cell, tuple(tiles.rows))
    across = _Axis("x", block_labels(patterns.srcs, factor), patterns.srcs[::factor], tiles.cell, tuple(tiles.columns))
    bottom, left = _label_axes(figure, down, across, paper)
    figure.add_shape(
        type="path",
        path=" ".join(_rectangle(corner, tiles.size) for corner in tiles.corners[: len(shown)]),
        layer="below",
        line={"color": theme.grey, "width": 1 if tiles.cell * max(tiles.size) >= 16 else 0},
        fillcolor=theme.masked,
        name="panels",
    )
    if not tiles.labelled:
        bottom, left = _name_edges(figure, patterns, tiles, paper)
    if tiles.named:
        figure.add_trace(_names(patterns, tiles, theme))
    height = (tiles.rows[-1] + tiles.size[0]) * tiles.cell
    width = (tiles.columns[-1] + tiles.size[1]) * tiles.cell
    frame = Frame(max(width, 90), height, left, paper.bar(), bottom, 0 if tiles.named else 36)
    frame = lay_colours(figure, scale, patterns.has_absent, paper, frame, theme)
    where = "destinations down, sources across"
    say = where if tiles.labelled else f"{where}; too small for tokens, which hover tells"
    notes = (say, _pooling(factor, scale), steps_note(scale, patterns.has_absent))
    return Drawing(figure, frame, notes, patterns.table)


def _names(patterns: Patterns, tiles: _Tiles, theme: Theme) -> go.Scatter:
    """Every pattern's name above it."""
    corners = tiles.corners[: len(patterns.names)]
    return go.Scatter(
        x=[x + (tiles.size[1] - 1) / 2 for _, x in corners],
        y=[y - 0.5 - 10 / tiles.cell for y, _ in corners],
        mode="text",
        text=[plain(shortened(name)) for name in patterns.names],
        textfont={"size": 11, "color": theme.ink},
        xaxis="x2",
        yaxis="y2",
        hoverinfo="skip",
        showlegend=False,
    )


def _rectangle(corner: tuple[float, float], size: tuple[int, int]) -> str:
    top, left = corner[0] - 0.5, corner[1] - 0.5
    bottom, right = top + size[0], left + size[1]
    return f"M{left},{top} L{right},{top} L{right},{bottom} L{left},{bottom} Z"


def _edge(labels: Sequence[Label | None], letter: str) -> list[str]:
    return [f"{letter}{label}" if isinstance(label, int) else shortened(label or "") for label in labels]


def _name_edges(figure: Figure, patterns: Patterns, tiles: _Tiles, paper: Paper) -> tuple[float, float]:
    """Heads above the grid and layers to its left; nothing if each pattern has its own name.

    Returns:
        Pixels that this needs below and to the left.
    """
    longest = 0
    for axis, dim, labels, starts, size in (
        ("xaxis2", "head", patterns.heads, tiles.columns, tiles.size[1]),
        ("yaxis2", "layer", patterns.layers, tiles.rows, tiles.size[0]),
    ):
        names = [] if tiles.named else _edge(labels, dim[0].upper())
        longest = max(map(len, names), default=0)
        ticks = label_axis(names, size * tiles.cell, 14 if dim == "layer" else 7 * longest + 6)
        ticks["tickvals"] = [starts[i] + (size - 1) / 2 for i in ticks["tickvals"]]
        figure.update_layout({axis: {**ticks, "ticks": "", "title": {"text": dim if any(names) else ""}}})
    figure.update_layout(xaxis2_side="top", xaxis2_tickangle=0)
    bare = 44 if paper.width is not None else 58
    return 20, 30 if tiles.named else bare + 7 * longest


# -- both ------------------------------------------------------------------------------------------------------------------


def _factor(shape: tuple[int, ...], side: int, cells: int) -> int:
    """How many tokens become one cell, so that a side has at most `side` cells and all panels at most `cells`."""
    n_panels, n_dests, n_srcs = shape
    factor = max(1, math.ceil(max(n_dests, n_srcs) / max(side, 1)))
    while n_panels * math.ceil(n_dests / factor) * math.ceil(n_srcs / factor) > cells:
        factor += 1
    return factor


def _pooling(factor: int, scale: Scale) -> str:
    largest = "value farthest from 0" if scale.low < 0 else "largest value"
    return f"each cell shows the {largest} of a block of {factor} × {factor} tokens" if factor > 1 else ""


def _cells(pattern: np.ndarray, name: str, what: str, scale: Scale, **options: Any) -> go.Heatmap:
    """One head. The template takes its texts from elsewhere, so that nothing in them is read as a part of it."""
    first = "%{meta[0]}<br>" if name else ""
    return go.Heatmap(
        z=scale.drawn(pattern),
        meta=[plain(name), plain(what)],
        hovertemplate=f"{first}destination %{{y}}<br>source %{{x}}<br>%{{meta[1]}} {value_template(scale)}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis",
        **options,
    )


@dataclass(frozen=True)
class _Axis:
    """Positions along one side of the patterns.

    Attributes:
        letter: `"x"` or `"y"`.
        labels: Of each cell, whole.
        short: The same for the eye: of a block of tokens its first.
        cell: Pixels of a cell.
        starts: Where each pattern begins.
    """

    letter: str
    labels: Sequence[str]
    short: Sequence[str]
    cell: float
    starts: tuple[float, ...] = (0.0,)


def _label_axes(figure: Figure, down: _Axis, across: _Axis, paper: Paper) -> tuple[float, float]:
    """Hidden axes with every label, and axes over them with as many as fit.

    Returns:
        Pixels that the labels need below and to the left.
    """
    ticks = labels_across([shortened(label, paper.letters) for label in across.short], across.cell)
    rows = [shortened(label, paper.letters) for label in down.short]
    for axis, seen in ((across, ticks.axis), (down, label_axis(rows, down.cell, 12))):
        ends = [-0.5, axis.starts[-1] + len(axis.labels) - 0.5]
        hidden = {
            "tickmode": "array",
            "tickvals": [start + i for start in axis.starts for i in range(len(axis.labels))],
            "ticktext": [plain(label) for label in axis.labels] * len(axis.starts),
            "range": ends if axis.letter == "x" else ends[::-1],
        }
        places = [start + i for start in axis.starts for i in seen["tickvals"]]
        seen = {**seen, "tickvals": places, "ticktext": seen["ticktext"] * len(axis.starts)}
        bare = {"showticklabels": False, "ticks": "", "showgrid": False, "zeroline": False}
        figure.update_layout({f"{axis.letter}axis": {**hidden, **bare}})
        over = {
            "overlaying": axis.letter,
            "matches": axis.letter,
            "ticklabeloverflow": "allow",
        }  # not measured at every switch
        figure.update_layout({f"{axis.letter}axis2": {**seen, **over}})
    figure.add_trace(go.Scatter(x=[None], y=[None], xaxis="x2", yaxis="y2", hoverinfo="skip", showlegend=False))
    return ticks.below, room_left(rows, ticks, paper)
