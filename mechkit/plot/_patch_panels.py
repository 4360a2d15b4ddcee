"""Where the panels of a picture's patches stand: as large as the paper allows, in the picture's proportions.

1. Each view (a picture, its whole, its tiles) has a panel for each layer; the picture itself may stand before its first.
2. A view begins a row of panels, and layers stand below each other; with one panel for each view, all stand in a row.
3. Rows are broken where that makes panels larger; of layouts with panels nearly as large, the one with the fewest rows is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mechkit.plot._patch_layout import View
from mechkit.plot._size import Paper

_LARGE = (
    0.6,
    0.5,
)  # of the width that panels could have, for the sake of fewer rows; the latter where each row is a view
_TITLE = 20  # pixels above a panel for its title
_BETWEEN = 12  # pixels between panels, besides titles and ticks


@dataclass(frozen=True)
class Panel:
    """A view at one layer (`at` None: the picture by itself), its title, and whether a row of panels begins with it."""

    view: int
    at: int | None
    title: str


def panels_of(views: Sequence[View], names: Sequence[str], beside: Mapping[int, Any]) -> list[Panel]:
    found, stands = [], set()
    for i, view in enumerate(views):
        if view.on_picture and view.image in beside and view.image not in stands:
            found.append(Panel(i, None, "the picture"))
            stands.add(view.image)
        found += [Panel(i, at, name) for at, name in enumerate(names)]
    return found


@dataclass(frozen=True)
class PanelLayout:
    """Pixels: of the whole area, around it, and `(left, top, width, height)` of each panel. `heads`: titles of panels; `sides`:
    what stands left of each; `begins`: panels that have ticks of rows; `ticks`: whether there are any.
    """

    width: float
    height: float
    left: float
    below: float
    above: float
    places: tuple[tuple[float, float, float, float], ...]
    heads: tuple[str, ...]
    sides: tuple[str, ...]
    begins: frozenset[int]
    ticks: bool


def lay_out(
    panels: Sequence[Panel], views: Sequence[View], names: Sequence[str], paper: Paper, ticks: bool
) -> PanelLayout:
    one_each = len(names) == 1 and not any(panel.at is None for panel in panels)
    rows: list[list[int | None]]
    if one_each:  # views beside each other
        rows = [[*range(len(panels))]]
        heads = [
            ", ".join(part for part in (views[panel.view].name, panel.title) if part) if len(panels) > 1 else ""
            for panel in panels
        ]
    else:  # a view begins a row, and layers stand below each other
        of_views = [[i for i, panel in enumerate(panels) if panel.view == view] for view in range(len(views))]
        longest = max(map(len, of_views))
        rows = [[*[None] * (longest - len(row)), *row] for row in of_views]
        heads = [panel.title for panel in panels]
    named = not one_each and len(views) > 1
    aspects = [views[panel.view].size[0] / views[panel.view].size[1] for panel in panels]
    ticks = ticks and any(len(view.tiles) == 1 for view in views)
    left = 12.0 + 20 * named + 34 * ticks + (0 if paper.width is not None else 18)
    head, foot = _TITLE * any(heads), 30 * ticks
    most = paper.across(left, paper.bar(), 900.0)
    tallest = paper.down(480.0 if len(panels) == 1 else 700.0)
    widest = most if len(panels) == 1 or paper.width is not None else 300.0
    choices = []
    for columns in range(1, max(map(len, rows)) + 1):
        broken = _broken(rows, columns)
        room = min((most - (columns - 1) * _BETWEEN) / columns, widest)
        needed = sum(room / min(aspects[i] for i in row if i is not None) for row in broken)
        free = tallest - len(broken) * (head + foot) - (len(broken) - 1) * _BETWEEN
        choices.append((room * min(1.0, max(free, 40.0 * len(broken)) / needed), columns, broken))
    largest = max(width for width, _, _ in choices)
    fine = [one for one in choices if one[0] >= _LARGE[len(rows) > 1] * largest]
    width, _, broken = min(fine, key=lambda one: (len(one[2]), -one[0]))  # few rows, of large panels
    places: dict[int, tuple[float, float, float, float]] = {}
    top = 0.0
    sides = ["" for _ in panels]
    begins = set()
    for n, row in enumerate(broken):
        top += (head + foot + _BETWEEN) * bool(n)
        there = [(j, i) for j, i in enumerate(row) if i is not None]
        for j, i in there:
            places[i] = (j * (width + _BETWEEN), top, width, width / aspects[i])
        top += max(width / aspects[i] for _, i in there)
        first = there[0][1]
        sides[first] = views[panels[first].view].name if named else ""
        begins.add(first)
    used = max(map(len, broken))
    return PanelLayout(
        used * width + (used - 1) * _BETWEEN,
        top,
        left,
        14 + foot,
        float(head),
        tuple(places[i] for i in range(len(panels))),
        tuple(heads),
        tuple(sides),
        frozenset(range(len(panels)) if one_each else begins) if ticks else frozenset(),
        ticks,
    )


def _broken(rows: Sequence[Sequence[int | None]], columns: int) -> list[list[int | None]]:
    """Rows of so many panels at most. An empty place at the beginning stays where nothing is broken."""
    found: list[list[int | None]] = []
    for row in rows:
        kept: list[int | None] = [i for i in row if i is not None or len(row) <= columns]
        found += [kept[i : i + columns] for i in range(0, len(kept), columns)]
    return found
