"""An approximation against the exact effects: how far an estimate can be trusted, cell by cell.

1. Take the effects, averaged over prompts, of the cells (or edges) that both have: approximate across, exact up.
2. Draw both axes on one scale with the identity line, on which a perfect approximation lies; and, dotted, the line through 0 that
   comes closest to the exact effects: its slope is what to multiply the approximation by.
3. Write the names of the worst cells next to them, where no other name or point is (`place_labels`): eight places around the
   point are tried, then places farther off, with a line to the point. Say in the caption how well the two agree.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import torch

from mechkit._check import checked
from mechkit.attribution import Comparison
from mechkit.attribution import compare as compare_results
from mechkit.attribution.comparison import signs_agree, slope_of
from mechkit.circuits import EdgeScores
from mechkit.plot._figure import Facts, Figure, Frame, Table, axis_lines, dress
from mechkit.plot._tables import to_numpy
from mechkit.plot._text import caption_of, lines, number, plain, shortened, technique_of
from mechkit.plot._theme import Theme, rgba, theme_of
from mechkit.result import Result

MOST = 4000  # points that a browser draws at once
_SIDE = 460  # pixels of the area
_NAMED = 10  # of the worst cells
_LINE = 14  # pixels: the height of a point's name
_AROUND = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
_FARTHER = (0, 12, 26, 42)  # pixels beyond the point's edge


@dataclass(frozen=True)
class _Agreement:
    """What is drawn: `[cell]` each, and how well the two agree."""

    labels: tuple[str, ...]
    approx: np.ndarray
    exact: np.ndarray
    pearson: float
    spearman: float
    slope: float
    sign_agreement: float
    magnitude: bool
    what: str  # effects or scores of what, and the unit
    unit: str
    origins: tuple[Result, Result]

    def table(self) -> Table:
        return {"label": np.array(self.labels, dtype=object), "approx": self.approx, "exact": self.exact}


@checked
def compare(
    approx: Comparison | Result | EdgeScores,
    exact: Result | EdgeScores | None = None,
    *,
    title: str | None = None,
    theme: str = "light",
) -> Figure:
    """Draw approximate against exact effects, one point a cell.

    Args:
        approx: An `mk.Comparison`, alone; or an approximation (`attribution_patching`, `relp`, …) as a `Result`, or `EdgeScores`.
        exact: The exact result of the same cells, prompts and metric (`activation_patching`), or exact `EdgeScores`
            (`edge_patching`), of which the edges that both have are compared.
        title: Of the figure, as plain text; made from the techniques by default.
        theme: `"light"` or `"dark"`.

    Returns:
        A figure; `table()` has a row for each cell: `label`, `approx` and `exact`, mean effects in the metric's unit (sizes,
        where the approximation has magnitudes only).

    Raises:
        ValueError: the two do not go together (see `mk.compare`), a comparison comes with something else, or there is nothing to
            compare.

    Example:
        >>> compare(mk.compare(approx, exact))  # the same as compare(approx, exact)
    """
    colours = theme_of(theme)
    agreement = _agreement(approx, exact)
    x, y = agreement.approx, agreement.exact
    error = np.abs(x - y)
    worst = [int(i) for i in np.argsort(-error, kind="stable")[:_NAMED] if error[i] > 0]
    drawn = np.union1d(thinned(np.maximum(np.maximum(np.abs(x), np.abs(y)), error), MOST), worst).astype(int)
    span = padded(float(min(x.min(), y.min(), 0)), float(max(x.max(), y.max(), 0)))

    figure = Figure()
    _draw_lines(figure, agreement, span, colours)
    figure.add_trace(
        go.Scatter(
            x=x[drawn],
            y=y[drawn],
            mode="markers",
            marker={
                "size": 7,
                "color": colours.positive,
                "opacity": 0.75,
                "line": {"width": 0.5, "color": colours.paper},
            },
            hovertext=[_hover(agreement, i) for i in drawn.tolist()],
            hoverinfo="text",
            showlegend=False,
        )
    )
    left_out = write_labels(figure, x, y, agreement.labels, worst, drawn, (_SIDE, _SIDE), (span, span), colours)
    for update, of in ((figure.update_xaxes, "approximate"), (figure.update_yaxes, "exact")):
        text = plain(f"{of} {agreement.what}")
        update(**axis_lines(colours), range=span, title={"text": text, "font_size": 12, "standoff": 10})
        update(zerolinecolor=colours.grid, zerolinewidth=2)
    figure.update_yaxes(scaleanchor="x", constrain="domain")
    figure.update_layout(
        legend={"x": 0, "y": 1.01, "xanchor": "left", "yanchor": "bottom", "orientation": "h", "itemclick": False},
    )
    caption = _caption(agreement, len(drawn), left_out)
    facts = Facts("compare", title if title is not None else _default_title(agreement), caption)
    frame = Frame(_SIDE, _SIDE, left=84, right=60, below=56, above=28)
    return dress(figure, colours, frame, facts, agreement.table)


def _agreement(approx: Comparison | Result | EdgeScores, exact: Result | EdgeScores | None) -> _Agreement:
    if isinstance(approx, Comparison):
        if exact is not None:
            raise ValueError("exact: expected nothing besides a Comparison, which has both; got another result")
        return _of_cells(approx)
    if isinstance(approx, Result) and isinstance(exact, Result):
        return _of_cells(compare_results(approx, exact))
    if isinstance(approx, EdgeScores) and isinstance(exact, EdgeScores):
        return _of_edges(approx, exact)
    raise ValueError(
        "approx, exact: expected a Comparison alone, two Results or two EdgeScores; "
        f"got {type(approx).__name__} and {type(exact).__name__}"
    )


def _of_cells(found: Comparison) -> _Agreement:
    cells = found.approx.top(max(1, found.approx.values.numel()))  # with the labels that results have everywhere
    order = {
        coords: i for i, coords in enumerate(itertools.product(*(found.approx.coords[d] for d in found.approx.dims)))
    }
    at = sorted((order[tuple(cell.coords.values())], cell.label) for cell in cells)
    if not at:
        raise ValueError("approx: expected a comparison of at least one cell, got none")
    index = [i for i, _ in at]
    x, y = (to_numpy(one.values).ravel()[index] for one in (found.approx, found.exact))
    what = "size of the effect" if found.magnitude else "effect"
    unit = found.approx.unit
    return _Agreement(
        labels=tuple(label for _, label in at),
        approx=x,
        exact=y,
        pearson=found.pearson,
        spearman=found.spearman,
        slope=found.slope,
        sign_agreement=found.sign_agreement,
        magnitude=found.magnitude,
        what=f"{what} on {found.approx.metric} ({unit})",
        unit="" if unit == "normalized" else f" {unit}",
        origins=(found.approx, found.exact),
    )


def _of_edges(approx: EdgeScores, exact: EdgeScores) -> _Agreement:
    """Scores of the edges that both have, averaged over prompts."""
    for name in ("metric", "unit"):
        if getattr(approx, name) != getattr(exact, name):
            raise ValueError(
                f"exact: expected the approximation's {name}, {getattr(approx, name)!r}; got {getattr(exact, name)!r}"
            )
    for name in ("weights_hash", "tokens_hash"):
        one, two = (scores.provenance.get(name) for scores in (approx, exact))
        if one != two:
            raise ValueError(f"exact: expected scores with the approximation's {name}, {one!r}; got {two!r}")
    pearson, spearman = (approx.correlation(exact, method=method) for method in ("pearson", "spearman"))
    mine, theirs = (to_numpy(scores.values) for scores in (approx, exact))
    edges = [edge for edge in approx.edges if not math.isnan(theirs[approx.graph.index(edge)])]
    at = tuple(np.array([approx.graph.index(edge) for edge in edges]).T)
    x, y = mine[at], theirs[at]
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    return _Agreement(
        labels=tuple(edge.name for edge in edges),
        approx=x,
        exact=y,
        pearson=pearson,
        spearman=spearman,
        slope=slope_of(*tensors),
        sign_agreement=signs_agree(*tensors),
        magnitude=False,
        what=f"score of an edge, {approx.metric} ({approx.unit})",
        unit="" if approx.unit == "normalized" else f" {approx.unit}",
        origins=(approx.result, exact.result),
    )


def _draw_lines(figure: Figure, agreement: _Agreement, span: tuple[float, float], theme: Theme) -> None:
    ends = np.array(span)
    told = [("exact = approximate", 1.0, "solid")]
    if not math.isnan(agreement.slope):
        told.append((f"exact = {number(agreement.slope)} × approximate, the best fit", agreement.slope, "dot"))
    for name, slope, dash in told:
        figure.add_trace(
            go.Scatter(
                x=ends,
                y=slope * ends,
                mode="lines",
                name=name,
                line={"color": theme.muted, "width": 1.5, "dash": dash},
                hoverinfo="skip",
            )
        )


def _hover(agreement: _Agreement, i: int) -> str:
    x, y, unit = agreement.approx[i], agreement.exact[i], agreement.unit
    sign = "" if agreement.magnitude else "+"
    return lines(
        agreement.labels[i],
        f"approximate {number(x, 5, sign=sign)}{unit}",
        f"exact {number(y, 5, sign=sign)}{unit}",
        f"error {number(x - y, 4, sign='+')}{unit}",
    )


def _default_title(agreement: _Agreement) -> str:
    names = [technique_of(result.provenance) for result in agreement.origins]
    one, two = names if all(names) and names[0] != names[1] else ("approximate effects", "exact effects")
    title = f"{one} against {two}"
    return title[:1].upper() + title[1:]


def _caption(agreement: _Agreement, n_drawn: int, left_out: int) -> tuple[str, ...]:
    parts = [caption_of(result.provenance) for result in agreement.origins]
    told = list(dict.fromkeys(itertools.chain(*parts)))
    n = len(agreement.labels)
    error = np.abs(agreement.approx - agreement.exact)
    told += [
        f"{n:,} {'edge' if '->' in agreement.labels[0] else 'cell'}{'s' if n != 1 else ''}",
        f"Pearson {_of(agreement.pearson)}",
        f"Spearman {_of(agreement.spearman)}",
        "sizes only"
        if agreement.magnitude
        else f"sign right in {100 * agreement.sign_agreement:.0f} % of those with at least 1 % of the largest exact effect",
        f"largest error {number(error.max())}{agreement.unit} ({agreement.labels[int(error.argmax())]})",
    ]
    if n_drawn < n:
        told.append(f"{n_drawn:,} points are drawn: the largest, and an even sample of the others")
    if left_out:
        told.append(f"{left_out} of the worst cells are not named for want of room")
    return tuple(told)


def _of(correlation: float) -> str:
    return "undefined" if math.isnan(correlation) else f"{correlation:.3f}".replace("-", "−")


# -- names beside points: shared with heads -----------------------------------------------------------------------------


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


def thinned(importance: np.ndarray, most: int) -> np.ndarray:
    """Which of many points to draw: all, or the most important half of `most` and an even sample of the others; in order."""
    n = len(importance)
    if n <= most:
        return np.arange(n)
    order = np.argsort(-importance, kind="stable")
    rest = np.sort(order[most // 2 :])
    sample = rest[np.linspace(0, len(rest) - 1, most - most // 2).round().astype(int)]
    return np.sort(np.concatenate([order[: most // 2], sample]))


def padded(low: float, high: float, share: float = 0.08) -> tuple[float, float]:
    """An axis's range with room at both ends."""
    room = share * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room
