"""Points, in every figure that has some: which are drawn, how wide the axes are, what they look like, and names beside them.

1. A browser draws some thousand points at once: of more, the most important and an even sample of the others (`thinned`).
2. An axis shows all points, and 0 where that is a run, with room at both ends (`padded(*ends_of(…))`). Points are where their
   numbers are: none is moved aside.
3. Hover texts are plain text, one a point (`points`).
4. Names are written next to their points, where no other name or point is (`write_labels`): eight places around the point are
   tried, then places farther off, with a line to the point.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mechkit.plot._figure import Figure
from mechkit.plot._text import plain, shortened
from mechkit.plot._theme import Theme, rgba

MOST = 4000  # points that a browser draws at once
_LINE = 14  # pixels: the height of a point's name
_AROUND = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
_FARTHER = (0, 12, 26, 42)  # pixels beyond the point's edge


# -- which points, and where -------------------------------------------------------------------------------------------


def evenly(n: int, most: int) -> np.ndarray:
    """`most` of n indices, evenly spaced, the first and the last among them; all of them if there are no more."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).round().astype(int)


def thinned(importance: np.ndarray, most: int) -> np.ndarray:
    """Which of many points to draw: all, or the most important half of `most` and an even sample of the others; in order."""
    n = len(importance)
    if n <= most:
        return np.arange(n)
    order = np.argsort(-importance, kind="stable")
    rest = np.sort(order[most // 2 :])
    sample = rest[evenly(len(rest), most - most // 2)]
    return np.sort(np.concatenate([order[: most // 2], sample]))


def padded(low: float, high: float, share: float = 0.08) -> tuple[float, float]:
    """An axis's range with room at both ends."""
    room = share * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def ends_of(*values: np.ndarray, zero: bool) -> tuple[float, float]:
    """The lowest and the highest of all, NaN left out; of 0 as well, if that is to be seen."""
    ends = np.concatenate([*values, [0.0] * zero])
    return float(np.nanmin(ends)), float(np.nanmax(ends))


# -- how they look -----------------------------------------------------------------------------------------------------


def points(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    hover: Sequence[str],
    marker: Mapping[str, Any],
    **how: Any,
) -> go.Scatter:
    """A trace of points, each with its hover text.

    Args:
        x, y: Where they are.
        hover: One a point, as plotly takes it (`lines` makes it of plain text).
        marker: Size, colour and outline.
        **how: What else the trace has: a name in the legend, lines from point to point.
    """
    drawn = {"mode": "markers", "showlegend": False, **how}
    return go.Scatter(x=x, y=y, marker=marker, hovertext=hover, hoverinfo="text", **drawn)


def legend_entry(name: str, **how: Any) -> go.Scatter:
    """An entry of the legend for what is drawn by other traces."""
    return go.Scatter(x=[None], y=[None], name=name, **how)


def mark_run(figure: Figure, axis: str, at: float, name: str, theme: Theme, *, shift: int = 8) -> None:
    """A dotted line at what a run has on that axis, with its name at the end, so many pixels off."""
    style = {"line": {"color": theme.muted, "width": 1, "dash": "dot"}, "layer": "below"}
    notes = {"text": plain(f"{name} run"), "showarrow": False, "yshift": shift, "font_color": theme.muted}
    if axis == "x":
        figure.add_vline(at, **style)
        figure.add_annotation(x=at, y=1, yref="paper", **notes)
    else:
        figure.add_hline(at, **style)
        figure.add_annotation(y=at, x=1, xref="paper", xanchor="right", **notes)


# -- names beside them -------------------------------------------------------------------------------------------------


def write_labels(
    figure: Figure,
    x: np.ndarray,
    y: np.ndarray,
    labels: Sequence[str],
    wanted: Sequence[int],
    drawn: np.ndarray,
    area: tuple[float, float],
    ranges: Sequence[tuple[float, float]],
    theme: Theme,
) -> int:
    """Write names next to points, where there is room.

    Args:
        x, y, labels: Of all points.
        wanted: Which names to write, the most important first.
        drawn: Which points are in the figure; names keep off these.
        area: Pixels of the area, across and down.
        ranges: What the two axes show.

    Returns:
        For how many there was no room.
    """
    pixels = [(v - low) / (high - low) * size for v, (low, high), size in zip((x, y), ranges, area, strict=True)]
    names = [shortened(labels[i]) for i in wanted]
    places = place_labels(np.stack(pixels, 1), drawn, wanted, [_pixels(name) for name in names], area)
    for i, name, place in zip(wanted, names, places, strict=True):
        if place is None:
            continue
        right, up, near = place
        figure.add_annotation(
            x=x[i],
            y=y[i],
            text=plain(name),
            showarrow=not near,
            arrowhead=0,
            arrowwidth=0.8,
            arrowcolor=theme.muted,
            standoff=4,
            xanchor="left" if right > 0 else "right" if right < 0 else "center",
            yanchor="bottom" if up > 0 else "top" if up < 0 else "middle",
            font={"size": 11, "color": theme.ink},
            bgcolor=rgba(theme.paper, 0.7),
            borderpad=0,
            name="label",
            **({"xshift": right, "yshift": up} if near else {"ax": right, "ay": -up}),
        )
    return sum(place is None for place in places)


def place_labels(
    points: np.ndarray, drawn: np.ndarray, wanted: Sequence[int], widths: Sequence[float], area: tuple[float, float]
) -> list[tuple[float, float, bool] | None]:
    """Where names go so that no two overlap, and they hide no point if that can be.

    Args:
        points: `[point 2]` in pixels from the lower left.
        drawn: Which points there are to be hidden.
        wanted: The points to be named, in order: an earlier one has the choice.
        widths: Pixels that each of these names takes.
        area: What names may not leave, in pixels.

    Returns:
        For each name how far it is to the right of its point and above it, and whether it is next to it (else a line leads
        there). What is that far away is its nearest edge, or its middle where the number is 0. `None` where there is no room.
    """
    taken: list[tuple[float, float, float, float]] = []  # left, right, bottom, top
    found: list[tuple[float, float, bool] | None] = []
    for i, width in zip(wanted, widths, strict=True):
        others = points[drawn[drawn != i]]
        best, fewest = None, math.inf
        for farther, (right, up) in itertools.product(_FARTHER, _AROUND):
            off = (4 if right and up else 6) + farther
            middle = points[i] + (right * (width / 2 + off), up * (_LINE / 2 + off))
            box = (middle[0] - width / 2, middle[0] + width / 2, middle[1] - _LINE / 2, middle[1] + _LINE / 2)
            inside = box[0] >= 0 and box[1] <= area[0] and box[2] >= 0 and box[3] <= area[1]
            free = all(box[1] <= t[0] or box[0] >= t[1] or box[3] <= t[2] or box[2] >= t[3] for t in taken)
            if not inside or not free:
                continue
            across = (others[:, 0] > box[0] - 4) & (others[:, 0] < box[1] + 4)
            hidden = int((across & (others[:, 1] > box[2] - 4) & (others[:, 1] < box[3] + 4)).sum())
            if hidden < fewest:
                best, fewest = ((right * off, up * off, farther == 0), box), hidden
            if hidden == 0:
                break
        found.append(best[0] if best else None)
        taken += [best[1]] if best else []
    return found


def _pixels(text: str) -> float:
    """About how wide a point's name is."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    broad = sum(letter in "mwMW@%…" or letter.isupper() for letter in text)
    return 6 * len(text) + 6 * wide + 3 * broad + 4
