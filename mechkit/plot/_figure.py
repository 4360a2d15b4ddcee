"""A figure that knows its numbers: what every drawing function returns, and how it is dressed and written to disk.

1. A drawing function makes a `Figure`, adds traces, and calls `dress`, which sets title, caption, margins and colours.
2. `Figure.table` gives the numbers behind the marks, one row a mark, exactly as they were in the result, whatever was rounded or
   left out to draw them. `Figure.save` writes them (.json, .csv) or the picture (.html, .png, .svg, .pdf).
3. Nothing is fetched: a page holds plotly.js itself, and pictures are made by a browser on this machine.
4. How large it is, and how it is drawn again in another size or without menus and sliders, is in `_size.py`.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechkit._check import checked
from mechkit._files import expanded
from mechkit.plot import _export
from mechkit.plot._scale import Scale
from mechkit.plot._size import Length, Paper, paper_of, resized
from mechkit.plot._text import plain
from mechkit.plot._theme import FONT, LIGHT, Theme, rgba

Table = Mapping[str, np.ndarray]  # columns of equal length, by name
Place = tuple[float, float, str]  # x and y in the numbers of the axes, and which pair of these: "" or "2", …
Notes = Mapping[str | tuple[float, float], str]  # a text for a label, or for a point


@dataclass(frozen=True)
class Facts:
    """What a figure is about, as plain text.

    Attributes:
        kind: Name of the function that drew it.
        title: Its title.
        caption: Parts of its small print.
    """

    kind: str
    title: str
    caption: tuple[str, ...]


class Figure(go.Figure):
    """A plotly figure with the numbers that it shows. Everything that plotly can do with a figure works."""

    _facts: Facts | None = None
    _table: Callable[[], Table] | None = None
    _theme: Theme = LIGHT
    _places: Callable[[], Mapping[str, Place]] | None = None
    _bars: tuple[tuple[str, float], ...] = ()  # colour axes whose bars lie below the area, and how many pixels below
    _paper: Paper | None = None
    _origins: tuple[Mapping[str, Any], ...] = ()
    _again: Callable[..., Figure] | None = None

    @property
    def facts(self) -> Facts:
        """Kind, title and caption as plain text."""
        if self._facts is None:
            raise ValueError(
                "figure: expected one as a function of mechkit.plot returned it, got a copy without its facts"
            )
        return self._facts

    def table(self) -> Table:
        """The numbers behind the marks: columns of equal length, a row for each mark (cell, bar, point, edge or token).

        The numbers are the result's own, not rounded to what a screen can show.

        Raises:
            ValueError: the figure is a copy that plotly made, which does not have them.
        """
        if self._table is None:
            raise ValueError(
                "figure: expected one as a function of mechkit.plot returned it, got a copy without its numbers"
            )
        return self._table()

    @checked
    def annotate(self, annotations: Notes) -> Figure:
        """Write a text at a cell, bar, point or box, with a line to it.

        Args:
            annotations: From what is meant to the text, as plain text. What is meant is a label as `top()` and `table()` have
                it (`"L9H6"`, `'L5 " Mary" 3'`, a component's name), or `(x, y)` in the numbers of the axes; rows and columns of
                cells count from 0.

        Returns:
            This figure.

        Raises:
            ValueError: there is no such label.
        """
        known = self._places() if annotations and self._places is not None else {}
        for what, text in annotations.items():
            if isinstance(what, str) and what not in known:
                near = ", ".join(map(repr, get_close_matches(what, known, 3) or list(known)[:3])) or "(x, y)"
                raise ValueError(f"annotations: expected labels of what is drawn, such as {near}; got {what!r}")
            x, y, pair = known[what] if isinstance(what, str) else (*what, "")
            axis = self.layout[f"xaxis{pair}"]
            middle = sum(axis.range) / 2 if axis.range is not None and axis.type != "log" else x
            right = x <= middle
            self.add_annotation(
                x=x,
                y=y,
                xref=f"x{pair}",
                yref=f"y{pair}",
                text=plain(text),
                ax=22 if right else -22,
                ay=-20,
                xanchor="left" if right else "right",
                yanchor="bottom",
                arrowhead=0,
                arrowwidth=1,
                arrowcolor=self._theme.ink,
                font={"size": 12, "color": self._theme.ink},
                bgcolor=rgba(self._theme.paper, 0.85),
                borderpad=2,
                name="annotation",
            )
        return self

    @checked
    def resized(
        self,
        size: Literal["column", "page", "slide"] | None = None,
        *,
        width: Length | None = None,
        height: Length | None = None,
        font_size: float | None = None,
        caption: bool = True,
        annotations: Notes | None = None,
    ) -> Figure:
        """The same figure laid out anew in another size. Its numbers and hover texts are the same.

        Args:
            size: `"column"`: 8.5 cm wide, as a column of a journal, text of 8 points; `"page"`: 17.5 cm, 8 points; `"slide"`:
                1280 pixels, 16 points, at most 720 pixels tall. By default as wide as the figure needs.
            width, height: In pixels (1/96 inch), or text with a unit: `"8.5 cm"`, `"3.3 in"`, `"240 pt"`. A preset's width gives
                way to `width`. By default the height follows from what is drawn, and fits on a page.
            font_size: Of the text, in points (1/72 inch); labels and small print are somewhat smaller.
            caption: Whether the small print (model, task, prompts, technique) is written below the figure.
            annotations: More of them, as for `annotate`.

        Returns:
            A new figure. What was changed in this one since it was drawn (titles, ranges, annotations, traces) is changed there.

        Raises:
            ValueError: no such preset, no length, a width or height that holds no figure, or a copy that plotly made.
        """
        if self._again is None:
            raise ValueError(
                "figure: expected one as a function of mechkit.plot returned it, got a copy that cannot be drawn again"
            )
        paper = paper_of(size, width, height, font_size, caption)
        return resized(self, paper, annotations)

    @checked
    def save(
        self,
        path: str | os.PathLike[str],
        *,
        size: Literal["column", "page", "slide"] | None = None,
        width: Length | None = None,
        height: Length | None = None,
        font_size: float | None = None,
        caption: bool | None = None,
        annotations: Notes | None = None,
        scale: float | None = None,
    ) -> Path:
        """Write the figure or its numbers; missing folders are made.

        Pictures (`.png`, `.svg`, `.pdf`) have no menus and no sliders, nor room for them.

        Args:
            path: The suffix says what is written. `.html` is a page that loads nothing; `.png`, `.svg` and `.pdf` are pictures,
                made by Chrome or Chromium on this machine; `.json` (see `read_table`) and `.csv` are the numbers of `table`.
            size, width, height, font_size, caption, annotations: As for `resized`: the figure is laid out anew, and stays as it
                is itself. With none of them the size is the figure's own.
            scale: Pixels of a `.png` for each pixel of the figure. By default 2; with the presets for paper 3.125, which is 300
                dots per inch. The file says how many there are per inch.

        Returns:
            The path.

        Raises:
            ValueError: another suffix, a folder of that name, a scale that is not positive, or what `resized` refuses.
            RuntimeError: a picture was asked for and there is no Chrome or Chromium, or kaleido is not installed.
        """
        asked = (size, width, height, font_size, caption, annotations)
        figure = self
        if any(one is not None for one in asked):
            figure = self.resized(
                size,
                width=width,
                height=height,
                font_size=font_size,
                caption=caption is not False,
                annotations=annotations,
            )
        return _export.save(figure, expanded(path), scale)

    def write_image(self, *args: Any, **kwargs: Any) -> None:
        """As plotly's, without menus and sliders; `save` is for sizes, and looks for the browser."""
        super(Figure, self.still()).write_image(*args, **kwargs)

    def to_image(self, *args: Any, **kwargs: Any) -> bytes:
        """As plotly's, without menus and sliders."""
        picture: bytes = super(Figure, self.still()).to_image(*args, **kwargs)
        return picture

    def still(self) -> Figure:
        """This figure as a picture: without menus and sliders, and without room for them. Itself, if it has none."""
        if not (self.layout.updatemenus or self.layout.sliders):
            return self
        if self._again is None or self._paper is None:  # a copy that plotly made: the room stays
            copy = Figure(self)
            copy.layout.updatemenus = copy.layout.sliders = ()
            return copy
        return resized(self, self._paper, still=True)


@dataclass(frozen=True)
class Frame:
    """Where things are, in pixels.

    Attributes:
        width, height: Of the area that is drawn on.
        left: Room for ticks and title of the vertical axis.
        right: Room for the colour bar or the legend.
        below: Between the area and the caption: ticks, the axis's title, a slider.
        above: Between the area and the title: titles of panels, buttons.
    """

    width: float
    height: float
    left: float = 70
    right: float = 110
    below: float = 52
    above: float = 0


def dress(
    figure: Figure,
    theme: Theme,
    frame: Frame,
    facts: Facts,
    table: Callable[[], Table],
    paper: Paper,
    *,
    places: Callable[[], Mapping[str, Place]] | None = None,
) -> Figure:
    """Set title, caption, size, margins and colours, and what the figure knows of itself.

    Args:
        figure: With its traces.
        theme: Its colours.
        frame: Where things are.
        facts: Kind, title and caption, as plain text.
        table: Gives the numbers behind the marks.
        paper: How wide and tall it is, and whether the caption is written.
        places: Gives where each label is, for annotations.

    Returns:
        The same figure.

    Raises:
        ValueError: the title is no text.
    """
    if not isinstance(facts.title, str):
        raise ValueError(f"title: expected text, got {facts.title!r}")
    chosen = paper.width is not None
    width = paper.width if paper.width is not None else max(frame.left + frame.width + frame.right, 540)
    edge, size, per_letter = (8, 14, 8.6) if chosen else (frame.left, 17, 8.0)
    heading = textwrap.wrap(facts.title, max(round((width - edge - 4 * chosen) / per_letter), 10))
    small_print = textwrap.wrap(
        " · ".join(facts.caption) if paper.caption else "", max(round((width - edge - 20 + 12 * chosen) / 6.3), 10)
    )
    if chosen:
        top = 14 + 19 * len(heading) + 6 * bool(heading) + frame.above
    else:
        top = 40 + 22 * (len(heading) + 1) * bool(heading) + frame.above
    bottom = frame.below + 15 * len(small_print) + (12 if small_print or not chosen else 4)
    tallest = max(paper.tallest, top + bottom + 60)
    height = paper.height or min(round(top + frame.height + bottom), tallest)
    figure.add_annotation(
        text="<br>".join(map(plain, small_print)),
        xref="paper",
        yref="paper",
        x=0,
        y=0,
        xshift=edge - frame.left,
        yshift=-frame.below,
        xanchor="left",
        yanchor="top",
        align="left",
        showarrow=False,
        font={"size": 11, "color": theme.muted},
        name="caption",
    )
    figure.update_layout(
        title={
            "text": "<br>".join(map(plain, heading)),
            "font_size": size,
            "x": edge / width,
            "xanchor": "left",
            "y": 1 - (12 + 9 * max(len(heading) - 1, 0) if chosen else 40) / height,
            "yanchor": "top",
        },
        width=width if chosen else round(width),
        height=height,
        margin={"l": frame.left, "r": max(width - frame.left - frame.width, 0), "t": top, "b": bottom},
        font={"family": FONT, "size": 12, "color": theme.ink},
        hovermode="closest",
        hoverlabel={"font_family": FONT, "align": "left"},
        paper_bgcolor=theme.paper,
        plot_bgcolor=theme.paper,
    )
    if chosen:
        figure.update_xaxes(title_font_size=12)
        figure.update_yaxes(title_font_size=12)
    for name, lower in figure._bars:  # plotly wants shares
        place = figure.layout[name].colorbar
        place.yref, place.y = "container", max((bottom - lower) / height, 0.0)
    figure._facts, figure._table, figure._theme, figure._places = facts, table, theme, places
    return figure


def lay_bar(
    figure: Figure,
    scale: Scale,
    paper: Paper,
    frame: Frame,
    theme: Theme,
    *more: str,
    even: bool = False,
    axis: str = "coloraxis",
) -> Frame:
    """A colour axis, its bar right of the area; or, on narrow paper, below it.

    Args:
        figure: With its traces.
        scale: What colours mean.
        paper: What the figure is laid out on.
        frame: Where things are besides the bar.
        theme: Its colours.
        *more: Lines for the bar's title.
        even: Whether ticks are at equal shares of the farthest value.
        axis: The name of the colour axis.

    Returns:
        The frame with room for the bar.
    """
    if not paper.narrow:
        length = min(max(frame.height, 110 + 17 * (len(scale.title) + len(more))), 360)
        found = scale.axis(length, *more)
        if even:
            found["colorbar"] |= scale.even_ticks()
        figure.update_layout({axis: found})
        return replace(frame, below=max(frame.below, length - frame.height + 10))
    assert paper.width is not None
    length = min(max(frame.width, 180), paper.width - frame.left - 34)
    found = scale.axis(length, lying=True)
    if even:
        found["colorbar"] |= scale.even_ticks()
    room = paper.width - 16
    text = textwrap.wrap(" · ".join([*scale.title, *more]), max(round(room / 6.9), 20))
    top = frame.below + 6 + 15 * len(text)
    place = {"orientation": "h", "thickness": 10, "xpad": 0, "ypad": 0, "x": 0, "xanchor": "left", "yanchor": "top"}
    found["colorbar"] |= {**place, "ticklabeloverflow": "allow"}
    figure.update_layout({axis: found})
    write_below(figure, text, 8 - frame.left, frame.below)
    figure._bars += ((axis, top),)
    n_lines = max((str(text).count("<br>") + 1 for text in found["colorbar"].get("ticktext") or ("",)), default=1)
    return replace(frame, below=top + 10 + 8 + 15 * n_lines + 8)


def frame_cells(figure: Figure, theme: Theme) -> None:
    """A line around the cells of every panel, on all four sides."""
    line = {"showline": True, "mirror": True, "linecolor": theme.line, "linewidth": 1}
    figure.update_xaxes(**line)
    figure.update_yaxes(**line)


def write_below(figure: Figure, text: Sequence[str], right: float, down: float) -> None:
    """Lines of plain text below the area, so many pixels to the right of its left edge and down from its lower one."""
    figure.add_annotation(
        text="<br>".join(map(plain, text)),
        name="scale",
        showarrow=False,
        xref="paper",
        yref="paper",
        x=0,
        y=0,
        xshift=right,
        yshift=-down,
        xanchor="left",
        yanchor="top",
        align="left",
        font={"size": 12},
    )


def axis_lines(theme: Theme) -> dict[str, Any]:
    """An axis of numbers, for `update_xaxes` and `update_yaxes`: line, ticks and grid."""
    return {
        "showgrid": True,
        "gridcolor": theme.grid,
        "showline": True,
        "linecolor": theme.line,
        "ticks": "outside",
        "tickcolor": theme.line,
        "zerolinecolor": theme.line,
        "zerolinewidth": 1,
    }


def label_axis(labels: Sequence[object], pixels: float, needed: float) -> dict[str, Any]:
    """An axis of labels at 0, 1, 2, …, so that equal tokens stay separate; every n-th one if all do not fit.

    Args:
        labels: One an index, shortened if need be; any text.
        pixels: From one index to the next.
        needed: Pixels that a label takes.
    """
    step = next(step for step in _TICK_STEPS if step >= needed / pixels)
    return {
        "tickmode": "array",
        "tickvals": list(range(len(labels)))[::step],
        "ticktext": [plain(str(label)) for label in labels[::step]],
        "showgrid": False,
        "zeroline": False,
        "showline": False,
        "ticks": "outside" if labels else "",
        "ticklen": 3,
        "title_standoff": 10,
    }


@dataclass(frozen=True)
class Across:
    """Labels along the horizontal axis.

    Attributes:
        axis: For `update_xaxes`.
        slanted: Whether they are written aslant, because they do not fit side by side.
        longest: Characters of the longest.
        below: Pixels that they and the axis's title take.
        overhang: Pixels by which the first ones stick out on the left.
    """

    axis: dict[str, Any]
    slanted: bool
    longest: int
    below: int
    overhang: float


def labels_across(labels: Sequence[str], pixels: float, *, may_slant: bool = True) -> Across:
    """Labels at 0, 1, 2, … along the horizontal axis, aslant where that gives them room.

    Args:
        labels: One an index, shortened.
        pixels: From one index to the next.
        may_slant: Whether they may be; short numbers are left out instead, all but every n-th.
    """
    longest = max(map(len, labels), default=0)
    slanted = may_slant and 7 * longest + 6 > pixels
    axis = label_axis(labels, pixels, 15 if slanted else 7 * longest + 6) | {"tickangle": -50 if slanted else 0}
    below = 52 + (round(5.7 * longest) if slanted else 12) if labels else 20
    overhang = max((4.5 * len(label) - i * pixels for i, label in enumerate(labels)), default=0) if slanted else 0
    return Across(axis, slanted, longest, below, overhang)


def room_left(labels: Sequence[str], across: Across, paper: Paper | None = None) -> int:
    """Pixels to the left of the area: for the labels and the title of the vertical axis, and what sticks out of the other's."""
    chosen = paper is not None and paper.width is not None
    longest = max(map(len, labels), default=0)
    room = 44 + round(7.4 * longest) if chosen else 56 + 7 * longest
    return max(room, round(across.overhang) + 20)


def panels(grid: tuple[int, int], size: tuple[float, float], gap: tuple[float, float], titles: Sequence[str]) -> Figure:
    """A figure of panels that share their axes, so many pixels apart.

    Args:
        grid: Rows and columns.
        size: Of a panel in pixels, across and down.
        gap: Between two, across and down.
        titles: Of the panels, as plain text; of a single one it is not written.
    """
    rows, columns = grid
    return make_subplots(
        rows,
        columns,
        figure=Figure(),
        shared_xaxes="all",
        shared_yaxes="all",
        subplot_titles=[plain(title) for title in titles] if len(titles) > 1 else None,
        horizontal_spacing=gap[0] / (columns * (size[0] + gap[0])),
        vertical_spacing=gap[1] / (rows * (size[1] + gap[1])),
    )


def title_axes(figure: Figure, n_panels: int, n_columns: int, across: str, down: str) -> None:
    """Titles of the axes of panels: below those with no panel below, and left of the first column."""
    figure.update_yaxes(title_text=down, col=1)
    for i in range(max(0, n_panels - n_columns), n_panels):
        place = {"row": i // n_columns + 1, "col": i % n_columns + 1}
        figure.update_xaxes(title_text=across, showticklabels=True, **place)


_TICK_STEPS = [factor * 10**power for power in range(9) for factor in (1, 2, 5)]
