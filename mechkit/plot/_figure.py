"""A figure that knows its numbers: what every drawing function returns, and how it is dressed and written to disk.

1. A drawing function makes a `Figure`, adds traces, and calls `dress`, which sets title, caption, margins and colours.
2. `Figure.table` gives the numbers behind the marks, one row a mark, exactly as they were in the result, whatever was rounded or
   left out to draw them. `Figure.save` writes them (.json, .csv) or the picture (.html, .png, .svg, .pdf).
3. Nothing is fetched: a page holds plotly.js itself, and pictures are made by a browser on this machine.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mechkit._check import checked
from mechkit._files import expanded
from mechkit.plot import _export
from mechkit.plot._text import plain
from mechkit.plot._theme import FONT, Theme

Table = Mapping[str, np.ndarray]  # columns of equal length, by name


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
    def save(self, path: str | os.PathLike[str], *, scale: float = 2.0) -> Path:
        """Write the figure or its numbers; missing folders are made.

        Args:
            path: The suffix says what is written. `.html` is a page that loads nothing; `.png`, `.svg` and `.pdf` are pictures,
                made by Chrome or Chromium on this machine; `.json` (see `read_table`) and `.csv` are the numbers of `table`.
            scale: Pixels of a `.png` for each pixel of the figure.

        Returns:
            The path.

        Raises:
            ValueError: another suffix, a folder of that name, or a scale that is not positive.
            RuntimeError: a picture was asked for and there is no Chrome or Chromium, or kaleido is not installed.
        """
        return _export.save(self, expanded(path), scale)


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
    figure: Figure, theme: Theme, frame: Frame, facts: Facts, table: Callable[[], Table], *, height: int | None = None
) -> Figure:
    """Set title, caption, size, margins and colours, and what the figure knows of itself.

    Args:
        figure: With its traces.
        theme: Its colours.
        frame: Where things are.
        facts: Kind, title and caption, as plain text.
        table: Gives the numbers behind the marks.
        height: Of the whole figure in pixels, if it is not to follow from the frame.

    Returns:
        The same figure.

    Raises:
        ValueError: the title is no text, or the height no number of pixels.
    """
    if not isinstance(facts.title, str):
        raise ValueError(f"title: expected text, got {facts.title!r}")
    if height is not None and not (isinstance(height, int | float) and height >= 100):
        raise ValueError(f"height: expected a number of pixels of at least 100, got {height!r}")
    width = max(frame.left + frame.width + frame.right, 540)
    heading = textwrap.wrap(facts.title, max(round((width - frame.left) / 8), 10)) or [""]
    small_print = textwrap.wrap(" · ".join(facts.caption), max(round((width - frame.left - 20) / 6), 10))
    top = 62 + 22 * len(heading) + frame.above
    bottom = frame.below + 15 * len(small_print) + 12
    height = height or round(top + frame.height + bottom)
    figure.add_annotation(
        text="<br>".join(map(plain, small_print)),
        xref="paper",
        yref="paper",
        x=0,
        y=0,
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
            "font_size": 17,
            "x": frame.left / width,
            "xanchor": "left",
            "y": 1 - 40 / height,
            "yanchor": "top",
        },
        width=round(width),
        height=height,
        margin={"l": frame.left, "r": width - frame.left - frame.width, "t": top, "b": bottom},
        font={"family": FONT, "size": 12, "color": theme.ink},
        hovermode="closest",
        hoverlabel={"font_family": FONT, "align": "left"},
        paper_bgcolor=theme.paper,
        plot_bgcolor=theme.paper,
    )
    figure._facts, figure._table = facts, table
    return figure


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


_TICK_STEPS = [factor * 10**power for power in range(9) for factor in (1, 2, 5)]
