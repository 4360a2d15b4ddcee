"""An approximation against the exact effects: how far an estimate can be trusted, cell by cell.

1. Take the effects, averaged over prompts, of the cells (or edges) that both have: approximate across, exact up.
2. Draw both axes on one scale with the identity line, on which a perfect approximation lies; and, dotted, the line through 0 that
   comes closest to the exact effects: its slope is what to multiply the approximation by.
3. Write the names of the worst cells next to them (`_points.py`). Say in the caption how well the two agree.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from dataclasses import dataclass
from typing import Literal

import numpy as np
import plotly.graph_objects as go
import torch

from mechkit._check import checked
from mechkit.attribution import Comparison
from mechkit.attribution import compare as compare_results
from mechkit.attribution.comparison import signs_agree, slope_of
from mechkit.circuits import EdgeScores
from mechkit.plot._figure import Facts, Figure, Frame, Notes, Table, axis_lines, dress
from mechkit.plot._points import MOST, ends_of, padded, points, thinned, write_labels
from mechkit.plot._size import Length, paper_in, redrawn
from mechkit.plot._tables import to_numpy
from mechkit.plot._text import caption_of, lines, number, plain, spaced, technique_of
from mechkit.plot._theme import Theme, theme_of
from mechkit.result import Result
from mechkit.result._columns import columns_of

_SIDE = 460  # pixels of the area
_NAMED = 10  # of the worst cells


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
@redrawn
def compare(
    approx: Comparison | Result | EdgeScores,
    exact: Result | EdgeScores | None = None,
    *,
    title: str | None = None,
    size: Literal["column", "page", "slide"] | None = None,
    width: Length | None = None,
    height: Length | None = None,
    font_size: float | None = None,
    caption: bool = True,
    annotations: Notes | None = None,
    theme: str = "light",
) -> Figure:
    """Draw approximate against exact effects, one point a cell.

    Args:
        approx: An `mk.Comparison`, alone; or an approximation (`attribution_patching`, `relp`, …) as a `Result`, or `EdgeScores`.
        exact: The exact result of the same cells, prompts and metric (`activation_patching`), or exact `EdgeScores`
            (`edge_patching`), of which the edges that both have are compared.
        title: Of the figure, as plain text; made from the techniques by default.
        size, width, height, font_size, caption, annotations: See `Figure.resized`.
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
    colours, paper = theme_of(theme), paper_in(size)
    agreement = _agreement(approx, exact)
    x, y = agreement.approx, agreement.exact
    error = np.abs(x - y)
    worst = [int(i) for i in np.argsort(-error, kind="stable")[:_NAMED] if error[i] > 0]
    drawn = np.union1d(thinned(np.maximum(np.maximum(np.abs(x), np.abs(y)), error), MOST), worst).astype(int)
    span = padded(*ends_of(x, y, zero=True))

    right = 60 if paper.width is None else 20
    side = min(paper.across(84, right, _SIDE), paper.down(_SIDE if paper.width is None else 1.15 * _SIDE))
    figure = Figure()
    _draw_lines(figure, agreement, span, colours)
    outline = {"width": 0.5, "color": colours.paper}
    marker = {"size": 7, "color": colours.positive, "opacity": 0.75, "line": outline}
    figure.add_trace(points(x[drawn], y[drawn], [_hover(agreement, i) for i in drawn.tolist()], marker))
    left_out = write_labels(figure, x, y, agreement.labels, worst, drawn, (side, side), (span, span), colours)
    for update, of in ((figure.update_xaxes, "approximate"), (figure.update_yaxes, "exact")):
        text = "<br>".join(map(plain, textwrap.wrap(f"{of} {agreement.what}", max(round((side + 40) / 7), 20))))
        update(**axis_lines(colours), range=span, title={"text": text, "font_size": 12, "standoff": 10})
        update(zerolinecolor=colours.grid, zerolinewidth=2)
    figure.update_yaxes(scaleanchor="x", constrain="domain")
    figure.update_layout(
        legend={
            "x": -0.18 if paper.narrow else 0,
            "y": 1.01,
            "xanchor": "left",
            "yanchor": "bottom",
            "orientation": "h",
            "itemclick": False,
        },
    )
    told = _caption(agreement, len(drawn), left_out)
    facts = Facts("compare", title if title is not None else _default_title(agreement), told)
    below = 56 + 15 * ("<br>" in text)
    frame = Frame(side, side, left=84, right=right, below=below, above=28 + 20 * paper.narrow)
    places = {name: (x_, y_, "") for name, x_, y_ in zip(agreement.labels, x, y, strict=True)}
    return dress(figure, colours, frame, facts, agreement.table, paper, places=lambda: places)


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
    compared = columns_of(found.approx).present()
    if not len(compared):
        raise ValueError("approx: expected a comparison of at least one cell, got none")
    x, y = (to_numpy(one.values).ravel()[compared.cells()] for one in (found.approx, found.exact))
    what = "size of the effect" if found.magnitude else "effect"
    unit = found.approx.unit
    return _Agreement(
        labels=tuple(compared.names()),
        approx=x,
        exact=y,
        pearson=found.pearson,
        spearman=found.spearman,
        slope=found.slope,
        sign_agreement=found.sign_agreement,
        magnitude=found.magnitude,
        what=f"{what} on {found.approx.metric} ({unit})",
        unit=spaced(unit),
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
        unit=spaced(approx.unit),
        origins=(approx.result, exact.result),
    )


def _draw_lines(figure: Figure, agreement: _Agreement, span: tuple[float, float], theme: Theme) -> None:
    ends = np.array(span)
    notes = [("exact = approximate", 1.0, "solid")]
    if not math.isnan(agreement.slope):
        notes.append((f"exact = {number(agreement.slope)} × approximate, the best fit", agreement.slope, "dot"))
    for name, slope, dash in notes:
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
    notes = list(dict.fromkeys(itertools.chain(*parts)))
    n = len(agreement.labels)
    error = np.abs(agreement.approx - agreement.exact)
    notes += [
        f"{n:,} {'edge' if '->' in agreement.labels[0] else 'cell'}{'s' if n != 1 else ''}",
        f"Pearson {_of(agreement.pearson)}",
        f"Spearman {_of(agreement.spearman)}",
        "sizes only"
        if agreement.magnitude
        else f"sign right in {100 * agreement.sign_agreement:.0f} % of those with at least 1 % of the largest exact effect",
        f"largest error {number(error.max())}{agreement.unit} ({agreement.labels[int(error.argmax())]})",
    ]
    if n_drawn < n:
        notes.append(f"{n_drawn:,} points are drawn: the largest, and an even sample of the others")
    if left_out:
        notes.append(f"{left_out} of the worst cells are not named for want of room")
    return tuple(notes)


def _of(correlation: float) -> str:
    return "undefined" if math.isnan(correlation) else f"{correlation:.3f}".replace("-", "−")
