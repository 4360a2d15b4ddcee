"""Faithfulness curves: how much of the model's behaviour a circuit keeps, by how many edges it has.

1. The circuit's faithfulness at each size, with an interval as a band; random circuits of the same sizes in grey.
2. A line at 0, the corrupted run, and one at 1, the whole model: what the numbers are to be compared with.
3. The axis of sizes is logarithmic.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from torch import Tensor

from mechkit._check import checked
from mechkit.circuits import FaithfulnessCurve
from mechkit.plot._figure import Facts, Figure, Frame, Notes, axis_lines, dress
from mechkit.plot._points import points
from mechkit.plot._size import Length, Paper, paper_in, redrawn
from mechkit.plot._text import caption_of, number, plain
from mechkit.plot._theme import Theme, rgba, theme_of

Numbers = Sequence[float] | Tensor


def _drawn(found: FaithfulnessCurve, title: str | None, theme: str, paper: Paper) -> Figure:
    """A curve as it came from `faithfulness_curve`."""
    n = len(found.runs.coords["prompt"])
    seen = {None: [], 0: ["all held out"], n: ["the ones that were scored"]}.get(
        found.n_seen, [f"{found.n_seen} of them scored"]
    )
    caption = [*caption_of(found.runs.provenance), *seen]
    ends: dict[str, Any] = {}
    try:
        interval = found.runs.ci(0.95, normalized=True, method="studentized")
        ends["low"], ends["high"] = interval.low.values.tolist(), interval.high.values.tolist()
        caption.append("band: 95 % bootstrap interval over prompts")
        if found.caution:
            caption.append(f"it covers less often than that: {found.caution}")
    except ValueError:  # one prompt, or a gap that changes its sign among the resamples
        ends = {}
    if found.random is not None:
        random = found.random.mean("prompt").normalized().values.double()
        ends |= {"random": random.mean(0).tolist()}
        ends |= {"random_low": random.amin(0).tolist(), "random_high": random.amax(0).tolist()}
        caption.append(f"random circuits of the same sizes: mean and range of {len(random)}")
    title = found.title if title is None else title
    given = {"faithfulness": found.faithfulness, "kept": found.kept, **ends}
    return _draw(found.n_edges, given, title, "", "edges chosen", caption, theme_of(theme), paper)


@checked
@redrawn
def curve(
    n_edges: Numbers | FaithfulnessCurve,
    faithfulness: Numbers | None = None,
    *,
    low: Numbers | None = None,
    high: Numbers | None = None,
    random: Numbers | None = None,
    random_low: Numbers | None = None,
    random_high: Numbers | None = None,
    kept: Numbers | None = None,
    title: str | None = None,
    unit: str = "",
    axis: str = "edges kept",
    size: str | None = None,
    width: Length | None = None,
    height: Length | None = None,
    font_size: float | None = None,
    caption: Sequence[str] | bool = (),
    annotations: Notes | None = None,
    theme: str = "light",
) -> Figure:
    """Draw a faithfulness curve.

    Args:
        n_edges: How many edges each circuit has, ascending, at least 1 (the axis is logarithmic). Or a `FaithfulnessCurve`, with
            nothing else but a title, a size and a theme.
        faithfulness: Of each circuit: 0 is the corrupted run, 1 the whole model. NaN is left out.
        low, high: Ends of its interval, both or neither.
        random: Faithfulness of random circuits of the same sizes.
        random_low, random_high: Ends of its interval, both or neither.
        kept: How many edges each circuit has without its dead ends, if `n_edges` are those that were chosen: hover tells.
        title: Of the figure, as plain text.
        unit: What faithfulness is measured in, for the axis; empty if it is normalized. The lines at 0 and 1 are drawn in that
            case alone.
        axis: What the sizes are of: the axis's title.
        size, width, height, font_size, annotations: See `Figure.resized`. A `size` that is no preset is taken for `axis`.
        caption: Parts of the small print: model, task, number of prompts, what was ablated. `False`: none is written.
        theme: `"light"` or `"dark"`.

    Returns:
        A plotly figure; nothing is shown or written.

    Raises:
        ValueError: lists of different lengths, no points, sizes out of order or below 1, an infinite number, one end of an
            interval without the other, ends the wrong way round, or an interval of random circuits without these.
    """
    if isinstance(n_edges, FaithfulnessCurve):
        others = (faithfulness, low, high, random, random_low, random_high, kept)
        if (
            any(other is not None for other in others)
            or unit
            or not isinstance(caption, bool | tuple)
            or caption not in (*((), True, False),)
        ):
            raise ValueError(
                "n_edges: a FaithfulnessCurve has its own numbers; expected a title, a size and a theme alone with it"
            )
        return _drawn(n_edges, title, theme, paper_in(size))
    if faithfulness is None:
        raise ValueError("faithfulness: expected one number for each size, or a FaithfulnessCurve alone")
    given = {
        "faithfulness": faithfulness,
        "low": low,
        "high": high,
        "random": random,
        "random_low": random_low,
        "random_high": random_high,
        "kept": kept,
    }
    small_print = () if isinstance(caption, bool) else caption
    return _draw(n_edges, given, title, unit, axis, small_print, theme_of(theme), paper_in(size))


def _draw(
    n_edges: Numbers,
    given: Mapping[str, Numbers | None],
    title: str | None,
    unit: str,
    axis: str,
    caption: Sequence[str],
    colours: Theme,
    paper: Paper,
) -> Figure:
    x = _floats("n_edges", n_edges)
    if not x or not all(1 <= size < math.inf for size in x) or any(b <= a for a, b in itertools.pairwise(x)):
        raise ValueError(f"n_edges: expected ascending numbers of at least 1, got {x}")
    y = {name: _checked(name, values, len(x)) for name, values in given.items() if values is not None}
    if all(map(math.isnan, y["faithfulness"])):
        raise ValueError("faithfulness: expected at least one number, got NaN alone")
    if "random" not in y and y.keys() & {"random_low", "random_high"}:
        raise ValueError(
            "random: expected the faithfulness of random circuits with its interval, got the interval alone"
        )
    figure = Figure()
    if "random" in y:
        figure.add_traces(_band(x, y, "random_low", "random_high", rgba(colours.grey, 0.22)))
        figure.add_trace(_points(x, y["random"], "random circuits", colours.grey, "dash", "square", y, "random_"))
    figure.add_traces(_band(x, y, "low", "high", rgba(colours.positive, 0.20)))
    figure.add_trace(_points(x, y["faithfulness"], "circuit", colours.positive, "solid", "circle", y, ""))
    if not unit:
        _mark_ends(figure, colours, paper.narrow)
    left, right = 70, 20 if paper.narrow else 110
    wide = paper.across(left, right, 540)
    tall = paper.down(334.0 if paper.width is None else min(380.0, 0.75 * wide))
    _set_axes(figure, x, unit, axis, colours, tall)
    columns = {"n_edges": np.array(x), **{name: np.array(values) for name, values in y.items()}}
    facts = Facts("curve", title or "Faithfulness by circuit size", tuple(caption))
    places = {f"{size:g}": (math.log10(size), value, "") for size, value in zip(x, y["faithfulness"], strict=True)}
    frame = Frame(wide, tall, left=left, right=right, above=6 + 20 * paper.narrow)
    dress(figure, colours, frame, facts, lambda: columns, paper, places=lambda: places)
    legend = {"x": 1.0, "y": 1.02, "xanchor": "right", "yanchor": "bottom", "orientation": "h"}
    figure.update_layout(showlegend="random" in y, legend=legend)
    return figure


def _floats(name: str, values: Numbers) -> list[float]:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected a list of numbers, got {values!r}") from error


def _checked(name: str, values: Numbers, n: int) -> list[float]:
    floats = _floats(name, values)
    if len(floats) != n:
        raise ValueError(f"{name}: expected {n} numbers, one for each of n_edges; got {len(floats)}")
    if any(math.isinf(value) for value in floats):
        raise ValueError(f"{name}: expected finite numbers, got {floats}")
    return floats


def _band(x: list[float], y: dict[str, list[float]], low: str, high: str, colour: str) -> list[go.Scatter]:
    """An area between two lines: the second is filled down to the first."""
    if low not in y and high not in y:
        return []
    if low not in y or high not in y:
        raise ValueError(f"{low}, {high}: expected both or neither, got one of them")
    if any(b < a for a, b in zip(y[low], y[high], strict=True)):
        raise ValueError(f"{low}, {high}: expected {low} <= {high}, got {y[low]} and {y[high]}")
    kept = [i for i in range(len(x)) if not math.isnan(y[low][i]) and not math.isnan(y[high][i])]
    line = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, "x": [x[i] for i in kept]}
    return [
        go.Scatter(y=[y[low][i] for i in kept], **line),
        go.Scatter(y=[y[high][i] for i in kept], fill="tonexty", fillcolor=colour, **line),
    ]


def _points(
    x: list[float],
    values: list[float],
    name: str,
    colour: str,
    dash: str,
    symbol: str,
    y: dict[str, list[float]],
    prefix: str,
) -> go.Scatter:
    low, high = y.get(f"{prefix}low"), y.get(f"{prefix}high")
    sizes = [f"{size:,.0f} edges" for size in x]
    if "kept" in y:
        sizes = [f"{text} chosen, {kept:,.0f} without dead ends" for text, kept in zip(sizes, y["kept"], strict=True)]
    hover = [f"{name}, {size}<br>{number(value, 4)}" for size, value in zip(sizes, values, strict=True)]
    if low and high:
        hover = [f"{text} ({number(a)} to {number(b)})" for text, a, b in zip(hover, low, high, strict=True)]
    line = {"mode": "lines+markers", "line": {"color": colour, "width": 2, "dash": dash}}
    return points(x, values, hover, {"size": 7, "symbol": symbol}, name=name, showlegend=None, **line)


def _mark_ends(figure: Figure, theme: Theme, inside: bool) -> None:
    """A line at 0 and one at 1, with their names."""
    for height, name in ((0, "corrupted run"), (1, "whole model")):
        figure.add_hline(height, line={"color": theme.line, "width": 1, "dash": "dot"}, layer="below")
        figure.add_annotation(
            text=name,
            xref="paper",
            x=0.01 if inside and height else 1,
            y=height,
            xanchor="right" if inside and not height else "left",
            yanchor="bottom" if inside else "middle",
            xshift=0 if inside else 6,
            showarrow=False,
            font={"size": 11, "color": theme.ink},
        )


def _set_axes(figure: Figure, x: list[float], unit: str, size: str, theme: Theme, tall: float) -> None:
    figure.update_xaxes(
        **axis_lines(theme),
        type="log",
        title_text=plain(size),
        dtick=1 if x[-1] / x[0] > 20 else "D2",
        tickformat=",d",
        exponentformat="none",
    )
    name = f"faithfulness ({plain(unit)})" if unit else "faithfulness (0 = corrupted run, 1 = whole model)"
    parts = textwrap.wrap(name, max(round((tall + 60) / 8), 14))
    figure.update_yaxes(**axis_lines(theme) | {"zeroline": False}, title_text="<br>".join(parts), title_font_size=12)
