"""Attention as lines from token to token, after the head view of BertViz (Vig 2019, https://arxiv.org/abs/1906.05714).

1. Destinations are listed on the left and sources on the right, the first token on top.
2. A line joins a destination with each source that it attends to; it is the stronger and wider the more attention there is.
3. Lines weaker than `min_weight` are left out, and the caption says how many, and how much attention that is.
4. Several heads have a colour each; a click on a head's name in the legend hides it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from mechkit.plot._attention_data import Drawing, Patterns
from mechkit.plot._figure import Figure, Frame, Table
from mechkit.plot._points import legend_entry
from mechkit.plot._size import Paper
from mechkit.plot._text import lines, number, plain, shortened
from mechkit.plot._theme import Theme, rgba

_MOST_TOKENS = 100
_STRENGTHS = 12  # steps of the lines' strength: plotly draws lines of one look at once
_POINTS = 14  # of a line, at which the mouse finds it
_WIDTH = 340  # pixels between the two lists


@dataclass(frozen=True)
class _Lines:
    """The cells that exist, one after the other, and which of them are drawn."""

    panel: np.ndarray
    dest: np.ndarray
    src: np.ndarray
    weight: np.ndarray
    drawn: np.ndarray


def draw_lines(patterns: Patterns, min_weight: float, theme: Theme, paper: Paper) -> Drawing:
    """Lines of all given heads.

    Args:
        patterns: At most 100 tokens, and as many heads as there are colours; no value below 0.
        min_weight: Lines below it are left out.
        theme: Its colours.
        paper: What it is laid out on.

    Raises:
        ValueError: too many tokens or heads, a value or `min_weight` below 0, or no line that strong.
    """
    scale = patterns.scale(theme)
    found = _lines(patterns, min_weight, len(theme.series), signed=scale.signed)
    largest, names = scale.high, patterns.names
    colours = theme.series if len(names) > 1 else (theme.positive,)
    figure = Figure()
    strength = np.ceil(found.weight / largest * _STRENGTHS).clip(1, _STRENGTHS).astype(int)
    for step in range(1, _STRENGTHS + 1):  # the strongest last, and so on top
        for panel, name in enumerate(names):
            chosen = np.flatnonzero(found.drawn & (found.panel == panel) & (strength == step))
            if len(chosen):
                figure.add_trace(_trace(patterns, found, chosen, name, colours[panel], step / _STRENGTHS))
    if len(names) == 1:
        for share in (0.25, 0.5, 1.0):
            figure.add_trace(_key(number(share * largest), colours[0], share, None))
    else:
        for panel, name in enumerate(names):
            figure.add_trace(_key(name, colours[panel], 1.0, name))
    frame = _axes(figure, patterns, paper)
    notes = _notes(found, min_weight, patterns, largest)
    notes = ("from destinations (left) to sources (right)", *notes) if paper.narrow else notes
    return Drawing(figure, frame, notes, lambda: _table(patterns, min_weight))


def _lines(patterns: Patterns, min_weight: float, most_heads: int, *, signed: bool) -> _Lines:
    n_panels, n_dests, n_srcs = patterns.values.shape
    if not 0 <= min_weight < np.inf:
        raise ValueError(f"min_weight: expected a number from 0 up, got {min_weight!r}")
    if max(n_dests, n_srcs) > _MOST_TOKENS:
        raise ValueError(
            f"style: expected at most {_MOST_TOKENS} tokens for lines, got {max(n_dests, n_srcs)}; draw style='pattern', or "
            "choose positions with sel(dest=[...], src=[...])"
        )
    if n_panels > most_heads:
        raise ValueError(
            f"style: expected at most {most_heads} heads for lines, got {n_panels}; choose one with layer= and head=, or some "
            "with sel(layer=[...], head=[...])"
        )
    panel, dest, src = np.nonzero(~np.isnan(patterns.values))
    weight = patterns.values[panel, dest, src]
    if signed:
        raise ValueError(
            f"style: expected attention, which is never below 0, for lines; got {patterns.what} from {number(weight.min())} to "
            f"{number(weight.max())}; draw style='pattern'"
        )
    drawn = _strong(weight, min_weight)
    if not drawn.any():
        raise ValueError(
            f"min_weight: expected some line at least as strong, got {min_weight!r} where the strongest is "
            f"{number(weight.max())}; lower it"
        )
    return _Lines(panel, dest, src, weight, drawn)


def _trace(
    patterns: Patterns, found: _Lines, chosen: np.ndarray, name: str, colour: str, strength: float
) -> go.Scatter:
    """All lines of one head and one strength, with points on them for the mouse."""
    along = np.append(np.linspace(0, 1, _POINTS), np.nan)
    x = np.tile(along, len(chosen))
    dest, src = found.dest[chosen, None], found.src[chosen, None]
    y = (dest + (src - dest) * along).ravel()
    texts = []
    for i in chosen:
        notes = [f"destination {patterns.dests[found.dest[i]]}", f"source {patterns.srcs[found.src[i]]}"]
        notes = [name, *notes] if name else notes
        texts += [lines(*notes, f"{patterns.what} {number(found.weight[i], 5)}")] * len(along)
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        line={"color": rgba(colour, round(0.12 + 0.88 * strength, 3)), "width": _pixels(strength)},
        hoverinfo="text",
        hovertext=texts,
        name=plain(shortened(name)),
        legendgroup=plain(name),
        showlegend=False,
    )


def _pixels(strength: float) -> float:
    return round(0.6 + 2.6 * strength, 2)


def _key(text: str, colour: str, strength: float, group: str | None) -> go.Scatter:
    """An entry of the legend, which hides the lines of its group."""
    line = {"color": rgba(colour, round(0.12 + 0.88 * strength, 3)), "width": _pixels(strength)}
    grouped = None if group is None else plain(group)
    how = {"mode": "lines", "showlegend": True, "hoverinfo": "skip"}
    return legend_entry(plain(shortened(text)), line=line, legendgroup=grouped, **how)


def _axes(figure: Figure, patterns: Patterns, paper: Paper) -> Frame:
    """Destinations as ticks on the left, sources on the right."""
    several = len(patterns.names) > 1
    n_rows = max(len(patterns.dests), len(patterns.srcs))
    row = min(22.0, paper.down(700.0) / n_rows)
    sides = [
        [shortened(label, min(paper.letters, 12 if paper.narrow else 24)) for label in labels]
        for labels in (patterns.dests, patterns.srcs)
    ]
    every = 1 if row >= 12.5 else 2 if row >= 6.5 else 5
    common = {"tickmode": "array", "showgrid": False, "zeroline": False, "ticks": "", "range": [n_rows - 0.5, -0.5]}
    for axis, labels, title in (
        ("yaxis", sides[0], "destination (attends)"),
        ("yaxis2", sides[1], "source (attended to)"),
    ):
        shown = {
            "tickvals": list(range(0, len(labels), every)),
            "ticktext": [plain(label) for label in labels[::every]],
        }
        titled = {} if paper.narrow else {"title": {"text": title, "standoff": 10}}
        small = {"tickfont": {"size": 12 if row >= 15 else 11}, **titled}
        figure.update_layout({axis: {**common, **shown, **small}})
    figure.update_layout(
        yaxis2={"overlaying": "y", "matches": "y", "side": "right"},
        xaxis={"range": [-0.015, 1.015], "visible": False, "fixedrange": True},
        legend={
            "x": 0,
            "y": 1,
            "xanchor": "left",
            "yanchor": "bottom",
            "orientation": "h",
            "traceorder": "grouped" if several else "normal",
            "title": {"text": "" if several else f"{plain(patterns.what)} ", "side": "left", "font": {"size": 12}},
            "itemclick": "toggle" if several else False,
            "itemdoubleclick": "toggleothers" if several else False,
        },
        showlegend=True,
    )
    figure.add_trace(go.Scatter(x=[None], y=[None], yaxis="y2", hoverinfo="skip", showlegend=False))
    left, right = ((14 if paper.narrow else 66) + 7 * max(map(len, labels)) for labels in sides)
    wide = min(paper.across(left, right, _WIDTH), 1.6 * _WIDTH)
    tall = max(row * n_rows, 40)
    if not paper.narrow:
        return Frame(wide, tall, left, right, below=18, above=34)
    n_entries = len(patterns.names) if several else 3
    figure.update_layout(
        legend={"orientation": "v", "y": -10 / tall, "yanchor": "top", "tracegroupgap": 0}, legend_title_side="top"
    )
    return Frame(wide, tall, left, right, below=28 + 20 * n_entries + 18 * (not several))


def _notes(found: _Lines, min_weight: float, patterns: Patterns, largest: float) -> tuple[str, ...]:
    weights = found.weight.astype(np.float64)
    left_out = ~found.drawn
    parts = [f"lines as strong and wide as the {patterns.what}, up to {number(largest)}"]
    if left_out.any():
        share = weights[left_out].sum() / weights.sum()
        under = f"under {number(min_weight)}" if min_weight > 0 else "of 0"
        parts.append(
            f"{int(left_out.sum()):,} of {len(weights):,} lines {under} left out, {100 * share:.2g} % of all "
            f"{patterns.what}"
        )
    return tuple(parts)


def _table(patterns: Patterns, min_weight: float) -> Table:
    """A row for each cell that exists, and whether it is drawn."""
    table = patterns.table()
    return {**table, "drawn": _strong(table["value"], min_weight)}


def _strong(weights: np.ndarray, min_weight: float) -> np.ndarray:
    """Which lines are drawn: one of no attention never is."""
    drawn: np.ndarray = (weights >= min_weight) & (weights > 0)
    return drawn
