"""Heat maps of one result or of several.

1. Average over prompts, if that is still to do.
2. Lay the dims out: layer downwards, layer 0 at the top; another dim to the right; a third one, or several results, as panels.
3. Colour the effect, the distance from the base run: a cell that does nothing is white, blue is higher and red is lower, as is
   usual in the field (and distinguished by colour-blind readers). What has no sign (probabilities, scores) runs from white to
   dark blue. All panels share the scale.
4. Say in the colour bar what white is and where the other run is, and in the caption where the numbers come from.

The module is named with an underscore because a submodule `heatmap` would take the place of the function
`mechkit.plot.heatmap` as soon as it is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import plotly.graph_objects as go
from torch import Tensor

from mechkit._check import checked
from mechkit.plot._figure import (
    Facts,
    Figure,
    Frame,
    Notes,
    Place,
    Table,
    dress,
    frame_cells,
    label_axis,
    labels_across,
    lay_bar,
    panels,
    room_left,
    title_axes,
)
from mechkit.plot._labels import RAGGED, axis_title, check_result, is_ragged
from mechkit.plot._parts import Parts
from mechkit.plot._patch_layout import Patch, places_of
from mechkit.plot._picture import embedded, enlarged
from mechkit.plot._scale import Scale, check_scale, scale_around_base
from mechkit.plot._size import Length, Paper, paper_in, redrawn
from mechkit.plot._tables import table_of, to_numpy
from mechkit.plot._text import caption_of, from_base, lines, number, plain, shortened, spaced, technique_of, title_of
from mechkit.plot._theme import Theme, theme_of
from mechkit.result import Label, Result
from mechkit.result._columns import are_whole
from mechkit.result._labels import cell_label

_GAP = 46  # pixels between panels
_NAMES = 15  # pixels that the names of an axis's parts take above a panel
_PICTURE = 72  # pixels of the longer side of a picture above its positions

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
    paper: Paper
    left: float

    @property
    def cell(self) -> tuple[float, float]:
        one = self.n_panels == 1
        most = self.paper.across(self.left, self.paper.bar(), 940)
        width = most if one else min(130.0 if self.paper.narrow else 200.0, most)
        tall = self.paper.down(480.0) if one else 216.0
        if self.paper.width is not None:  # panels fill the rows that they take
            columns = self._columns(width)
            width = (most - (columns - 1) * self.gap) / columns if not one else most
        if not one:
            rows = math.ceil(self.n_panels / self._columns(width))
            tall = min(tall, (self.paper.down(750.0) - (rows - 1) * _GAP) / rows)
        least = 1.0 if self.paper.width is None else 0.1
        wide = min(self.paper.up_to(34.0), max(width / self.n_columns, least))
        return wide, min(26.0, max(tall / self.n_rows, 1.0))

    def _columns(self, panel: float) -> int:
        room = self.paper.across(self.left, self.paper.bar(), 1040 - self.gap)
        return min(self.n_panels, max(1, int((room + self.gap + 1) // (panel + self.gap))))

    @property
    def gap(self) -> int:
        """Pixels between panels beside each other."""
        return 16 if self.paper.narrow else _GAP

    @property
    def panel(self) -> tuple[int, int]:
        least = 40 if self.paper.narrow else 120
        return max(least, int(self.cell[0] * self.n_columns)), max(26, round(self.cell[1] * self.n_rows))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of panels."""
        columns = self._columns(self.panel[0])
        return math.ceil(self.n_panels / columns), columns


@checked
@redrawn
def heatmap(
    result: Results,
    *,
    show: Literal["effect", "normalized", "value"] = "effect",
    title: str | None = None,
    center: float | None = None,
    zmax: float | None = None,
    size: Literal["column", "page", "slide"] | None = None,
    width: Length | None = None,
    height: Length | None = None,
    font_size: float | None = None,
    caption: bool = True,
    annotations: Notes | None = None,
    theme: str = "light",
) -> Figure:
    """Draw a result of one, two or three dims, such as layer × head, layer × pos or layer × pos × head; or several results.

    A `'prompt'` dim is averaged first. Of three dims one is drawn as panels: the position if there is one, otherwise
    the last that is neither the layer nor the patch. Cells that do not exist are grey. Lines part the patches of different
    pictures or tiles, and a picture's positions from the text; the picture stands above them.

    Args:
        result: What to draw. Several results (a list, or a mapping from a panel's title), of one or two dims and with the same
            labels and unit, become panels that share one scale.
        show: What is coloured where there are baselines. `"effect"`: how far each cell is from the base run, in the metric's
            unit. `"normalized"`: `result.mean("prompt").normalized()`, 0 the corrupted and 1 the clean run. `"value"`: the metric
            itself, white where the base run is. Hover has the metric and the effect in any case.
        title: Of the figure, as plain text; made from the provenance by default.
        center: The value that is white; the metric itself is drawn then. By default a cell that does nothing is white.
        zmax: Distance from the centre at which the colour saturates on both sides; by default the largest one, and the bar ends
            where the values do.
        size, width, height, font_size, caption, annotations: See `Figure.resized`.
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
    colours, paper = theme_of(theme), paper_in(size)
    check_scale(center, zmax)
    if show not in ("effect", "normalized", "value"):
        raise ValueError(f"show: expected 'effect', 'normalized' or 'value', got {show!r}")
    given = _named(result)
    results = {name: one.mean("prompt") if "prompt" in one.dims else one for name, one in given.items()}
    if show == "normalized":
        results = {name: one if one.unit == "normalized" else one.normalized() for name, one in results.items()}
    layout = _lay_out(results, paper)
    if all(bool(one.values.isnan().all()) for one in results.values()):
        raise ValueError("heatmap: expected at least one cell that exists, got NaN alone; choose others with sel()")
    first = next(iter(results.values()))
    values = _panels(results, layout, effects=False)
    changes = _panels(results, layout, effects=True)
    if np.isinf(values).any() or np.isinf(changes).any():
        raise ValueError("heatmap: expected finite values, got an infinite one; choose others with sel()")
    around = scale_around_base(
        list(results.values()), values, changes, colours, center=center, zmax=zmax, as_values=show == "value"
    )
    shown = changes if around.changes else values

    n_columns = layout.grid[1]
    titles = [f"{layout.panels} {label}" for label in _labels(first, layout.panels)] if layout.panels else list(results)
    figure = panels(layout.grid, layout.panel, (layout.gap, _GAP), titles)
    gap = 1 if min(layout.cell) >= 8 else 0
    for i in range(layout.n_panels):
        one = first if layout.panels else list(results.values())[i]
        hover = _hover(one, layout, i, values[i], changes[i])
        cells = go.Heatmap(z=shown[i], hovertext=hover, hoverinfo="text", coloraxis="coloraxis", xgap=gap, ygap=gap)
        figure.add_trace(cells, row=i // n_columns + 1, col=i % n_columns + 1)

    notes = [part for one in results.values() for part in caption_of(one.provenance, averaged=one.unit != "p")]
    notes += around.notes
    notes += [RAGGED] * (around.alike and any(map(is_ragged, given.values())))
    notes += [_absent(first)] * bool(np.isnan(shown).any())
    facts = Facts(
        "heatmap", title if title is not None else _default_title(results, layout), tuple(dict.fromkeys(notes))
    )
    _style(figure, first, layout, around.scale, colours, facts, lambda: table_of(given))
    return figure


def _absent(result: Result) -> str:
    """What grey is."""
    if technique_of(result.provenance) == "path patching":
        return "grey: no path leads from there to the receivers"
    return "grey: no such cell"


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


def _lay_out(results: Mapping[str, Result], paper: Paper) -> _Layout:
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
    panels = next((dim for dim in rest if dim in ("pos", "position")), None) if len(rest) == 2 else None
    if len(rest) == 2 and (panels is None or (panels == "pos" and Parts.of(result, "pos").parts)):
        panels = next(
            (dim for dim in reversed(rest) if dim not in ("patch", "pos")), rest[-1]
        )  # a panel a patch is too many
    right = next((dim for dim in rest if dim != panels), None)
    if right is None and down != "layer":  # a row
        down, right = None, down
    n_panels = len(results) if several else len(_labels(result, panels)) or 1
    n_rows, n_columns = (len(_labels(result, dim)) or 1 for dim in (down, right))
    rows = [shortened(label, paper.letters) for label in _shown(result, down)]
    left = room_left(rows, labels_across([], 1), paper)
    if right is not None and not are_whole(_labels(result, right)):  # labels aslant stick out on the left
        columns = [shortened(label, paper.letters) for label in _shown(result, right)]
        left = max(left, room_left(rows, labels_across(columns, 13), paper))
    return _Layout(panels, down, right, n_panels, n_rows, n_columns, paper, left)


def _panels(results: Mapping[str, Result], layout: _Layout, *, effects: bool) -> np.ndarray:
    """`[panel row column]` in float64."""
    arrays = []
    for result in results.values():
        tensor: Tensor = result.effect().values if effects and result.baseline else result.values
        order = [result.dims.index(dim) for dim in (layout.panels, layout.down, layout.right) if dim]
        arrays.append(to_numpy(tensor.permute(order)))
    return np.stack(arrays).reshape(layout.n_panels, layout.n_rows, layout.n_columns)


def _hover(result: Result, layout: _Layout, panel: int, values: np.ndarray, effects: np.ndarray) -> list[list[str]]:
    unit = spaced(result.unit)
    patches = _patches(result)
    parts = {dim: Parts.of(result, dim) for dim in (layout.down, layout.right, layout.panels)}
    missing = "no path to the receivers" if technique_of(result.provenance) == "path patching" else "not present"

    def text(row: int, column: int) -> str:
        places = ((layout.down, row), (layout.right, column), (layout.panels, panel))
        notes = [f"{dim} {result.coords[dim][i]}" for dim, i in places if dim]
        pixels = [patches[i].pixels for dim, i in places if dim == "patch" and patches and patches[i].box]
        pixels += [text for dim, i in places for text in parts[dim].hover(i)]
        if np.isnan(values[row, column]):
            return lines(*notes, missing, *pixels)
        notes += [f"{result.metric} {number(values[row, column], 5)}{unit}"]
        if result.baseline:
            notes += [from_base(effects[row, column], unit, result.base)]
        return lines(*notes, *pixels)

    return [[text(row, column) for column in range(layout.n_columns)] for row in range(layout.n_rows)]


def _patches(result: Result) -> tuple[Patch, ...] | None:
    """Where the patches of a picture are, if the result is of such."""
    return places_of(result) if "patch" in result.dims else None


def _part_views(figure: Figure, result: Result, layout: _Layout, theme: Theme) -> None:
    """A line between the patches of two pictures, of a picture and its tiles, and of two tiles."""
    patches = _patches(result) if "patch" in (layout.down, layout.right) else None
    for i, (one, other) in enumerate(zip(patches or (), (patches or ())[1:], strict=False)):
        if (one.image, one.tile) != (other.image, other.tile):
            line = {"line_width": 1.5, "line_color": theme.line, "row": "all", "col": "all"}
            figure.add_hline(i + 0.5, **line) if layout.down == "patch" else figure.add_vline(i + 0.5, **line)
    thin = {"line_width": 1, "line_color": theme.ink, "row": "all", "col": "all"}
    for part in Parts.of(result, layout.right).parts[1:]:
        figure.add_vline(part.first - 0.5, **thin)
    for part in Parts.of(result, layout.down).parts[1:]:
        figure.add_hline(part.first - 0.5, **thin)


def _name_parts(figure: Figure, parts: Parts, layout: _Layout, n_columns: int) -> None:
    """What the parts of the horizontal axis are, above each panel."""
    named = parts.named(layout.panel[0] / layout.n_columns)
    for i in range(layout.n_panels):
        pair = str(i + 1) if i else ""
        for part in named:
            figure.add_annotation(
                text=plain(part.name),
                showarrow=False,
                x=part.middle,
                y=1,
                xref=f"x{pair}",
                yref=f"y{pair} domain",
                yanchor="bottom",
                font={"size": 11},
                name="part",
            )


def _show_pictures(figure: Figure, result: Result, parts: Parts, layout: _Layout, theme: Theme) -> int:
    """The pictures above their positions, where these are a single panel; how many pixels they take."""
    several = () if result.pictures is None else result.pictures.one.thumbnails[0]
    width, done = layout.panel[0] / layout.n_columns, set()
    for part in sorted(parts.parts, key=lambda one: not one.whole):
        copy = several[part.image] if part.image is not None and part.image < len(several) else None
        if copy is None or part.image in done:
            continue
        done.add(part.image)
        across, down = _picture_size(copy.size)
        figure.add_layout_image(
            source=embedded(enlarged(copy.pixels.numpy(force=True), 240)),
            xref="x",
            yref="paper",
            x=max(part.middle, across / width / 2 - 0.5),
            y=1 + _NAMES / layout.panel[1],
            sizex=across / width,
            sizey=down / layout.panel[1],
            xanchor="center",
            yanchor="bottom",
            sizing="stretch",
        )
    return _PICTURE + 6 if done else 0


def _picture_size(size: tuple[float, float]) -> tuple[float, float]:
    """Pixels of a picture above a heat map."""
    by = _PICTURE / max(size)
    return size[0] * by, size[1] * by


def _style(
    figure: Figure,
    result: Result,
    layout: _Layout,
    scale: Scale,
    theme: Theme,
    facts: Facts,
    table: Callable[[], Table],
) -> None:
    n_rows, n_columns = layout.grid
    letters = layout.paper.letters
    columns, rows = ([shortened(name, letters) for name in _shown(result, dim)] for dim in (layout.right, layout.down))
    cell_width, cell_height = layout.panel[0] / layout.n_columns, layout.cell[1]
    across = labels_across(columns, cell_width, may_slant=not are_whole(_labels(result, layout.right)))
    left = max(room_left(rows, across, layout.paper), 0)
    inner = [
        n * size + (n - 1) * gap
        for n, size, gap in zip((n_columns, n_rows), layout.panel, (layout.gap, _GAP), strict=True)
    ]
    figure.update_xaxes(**across.axis)
    figure.update_yaxes(**label_axis(rows, cell_height, 14), autorange="reversed", title_text="")
    frame_cells(figure, theme)
    _part_views(figure, result, layout, theme)
    parts = Parts.of(result, layout.right)
    titles = [
        "token or patch" if Parts.of(result, dim).parts else axis_title(dim) for dim in (layout.right, layout.down)
    ]
    title_axes(figure, layout.n_panels, n_columns, *titles)
    figure.update_annotations(font_size=12)  # the titles of the panels
    above = 18 if layout.n_panels > 1 else 0
    if parts.parts:
        figure.update_annotations(yshift=_NAMES)
        above += _NAMES
        _name_parts(figure, parts, layout, n_columns)
        if layout.n_panels == 1:
            above += _show_pictures(figure, result, parts, layout, theme)
    frame = Frame(inner[0], inner[1], left, layout.paper.bar(), across.below, above=above)
    frame = lay_bar(figure, scale, layout.paper, frame, theme)
    dress(figure, theme, frame, facts, table, layout.paper, places=lambda: _places(result, layout))
    figure.update_layout(plot_bgcolor=theme.absent)  # shows through where a cell does not exist, and between cells


def _places(result: Result, layout: _Layout) -> dict[str, Place]:
    """Where each cell is, by its label; in panels of several results in the first."""
    found: dict[str, Place] = {}
    for panel in range(layout.n_panels if layout.panels else 1):
        pair = str(panel + 1) if panel else ""
        for row in range(layout.n_rows):
            for column in range(layout.n_columns):
                at = {layout.panels: panel, layout.down: row, layout.right: column}
                coords = {dim: result.coords[dim][at[dim]] for dim in result.dims}
                found[cell_label(coords)] = (column, row, pair)
    return found


def _labels(result: Result, dim: str | None) -> tuple[Label, ...]:
    return result.coords[dim] if dim else ()


def _shown(result: Result, dim: str | None) -> tuple[Label, ...]:
    """Labels as an axis has them: a picture's positions by row and column."""
    return Parts.of(result, dim).labels(_labels(result, dim))


def _default_title(results: Mapping[str, Result], layout: _Layout) -> str:
    result = next(iter(results.values()))
    dims = [dim for dim in (layout.down, layout.right, layout.panels) if dim]
    if len(results) > 1:
        return f"{' / '.join(dict.fromkeys(one.metric for one in results.values()))} by {' and '.join(dims)}"
    return title_of(result.provenance, result.metric, dims)
