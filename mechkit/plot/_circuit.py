"""Pictures of circuits.

1. Choose the edges to show: the strongest, and say how many were left out.
2. Lay out the components that have one: the embedding at the bottom, the logits on top, and between them a row for each
   layer, its heads side by side and its MLP at the right.
3. Draw each edge upward, as wide as its score is far from 0: blue where its clean value raises the metric and red where it lowers
   it (the heat map's colours); solid into values, MLPs and logits, dashed into queries, dotted into keys. What a head's query
   reads enters it on the left, what its key reads in the middle, and what its value reads on the right.
4. A slider below hides the edges that score closer to 0 than a threshold, and fades the components that lose their last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mechkit._check import checked
from mechkit.circuits.circuit import Circuit
from mechkit.circuits.graph import Edge, Writer
from mechkit.plot._figure import Facts, Figure, Frame, Table, dress
from mechkit.plot._text import caption_of, lines, number, plain
from mechkit.plot._theme import Theme, theme_of

_DASHES = {"q": "8px,4px", "k": "2px,3px"}  # solid into everything else; in pixels: a wide line has no longer dashes
_PORTS = {"q": -0.32, "v": 0.32}  # of a box's width, from its middle
_THIN, _THICK = 0.7, 6.0  # pixels
_BOX_HEIGHT = 19
_GAP = 16  # pixels between two boxes
_POINTS = 24  # of an edge's curve, at which the mouse finds it
_THRESHOLDS = 16  # of the slider, at most

Place = tuple[float, float]


@dataclass(frozen=True)
class _Line:
    edge: Edge
    target: str  # an edge into a shared key or value is drawn to several components
    score: float | None


@dataclass(frozen=True)
class _Layout:
    """Where each component is, in pixels from the lower left; `rows` are the layers that have one, upwards."""

    places: dict[str, Place]
    rows: list[int]
    column: float
    row: float
    width: float
    height: float

    @property
    def box(self) -> float:
        return self.column - _GAP


@checked
def circuit(
    circuit: Circuit,
    *,
    min_score: float | None = None,
    max_edges: int = 200,
    title: str | None = None,
    theme: str = "light",
) -> Figure:
    """Draw a circuit.

    An edge into a key or value that several heads share leads to each of them that writes over an edge of the circuit.

    Args:
        circuit: What to draw. Without scores all edges are grey and equally wide, and there is no slider.
        min_score: Leave out edges whose score is closer to 0 than this, in the scores' unit.
        max_edges: Show no more than so many: those that score furthest from 0, or without scores those nearest the logits.
        title: Of the figure, as plain text; by default how many edges there are.
        theme: `"light"` or `"dark"`.

    Returns:
        A plotly figure; nothing is shown or written. Its `table` has all edges of the circuit, `shown` or not.

    Raises:
        ValueError: there is nothing to show, `min_score` is given without scores, or either number is out of range.
    """
    colours = theme_of(theme)
    if not isinstance(circuit, Circuit):
        raise ValueError(
            f"circuit: expected a Circuit, got {type(circuit).__name__}; EdgeScores draw themselves: plot()"
        )
    shown = _choose(circuit, min_score, max_edges)
    if not shown:
        asked = "" if min_score is None else f" whose score is at least {min_score} away from 0"
        raise ValueError(f"circuit: expected at least one edge{asked}, got none among {len(circuit)}")
    drawn = [
        _Line(edge, target, score)
        for edge, score in reversed(shown)  # the strongest on top
        for target in [writer.name for writer in circuit.targets(edge.reader)] or ["logits"]
    ]
    layout = _lay_out(circuit, drawn)
    largest = max((abs(score) for _, score in shown if score is not None), default=0.0)
    unit = str(circuit.provenance.get("unit") or "")
    figure = Figure(
        [_trace(line, layout, largest, unit, colours) for line in drawn]
        + _legend(drawn, circuit.provenance.get("metric"), colours)
    )
    for name, (x, y) in layout.places.items():
        figure.add_annotation(**_box(name, x, y, layout, circuit, shown, colours))
    slider = _slider(drawn, list(layout.places), len(figure.data), unit, colours)
    facts = Facts("circuit", _default_title(circuit) if title is None else title, tuple(_caption(circuit, shown)))
    _style(figure, layout, facts, slider, lambda: _table(circuit, shown), colours)
    return figure


def _choose(circuit: Circuit, min_score: float | None, max_edges: int) -> list[tuple[Edge, float | None]]:
    """The edges to show, the strongest first; those without a score last."""
    whole = isinstance(max_edges, int) and isinstance(min_score, int | float | None)
    if not whole or max_edges < 1 or (min_score is not None and not min_score >= 0):
        raise ValueError(
            f"max_edges, min_score: expected max_edges >= 1 and min_score >= 0, got {max_edges!r}, {min_score!r}"
        )
    if circuit.scores is None:
        if min_score is not None:
            raise ValueError("min_score: expected a circuit with scores, got one without; leave min_score out")
        unscored: list[tuple[Edge, float | None]] = [(edge, None) for edge in reversed(circuit.edges)]
        return unscored[:max_edges]
    values = [circuit.scores[circuit.graph.index(edge)].item() for edge in circuit]
    scored = [(edge, None if np.isnan(value) else value) for edge, value in zip(circuit, values, strict=True)]
    scored.sort(key=lambda pair: -1.0 if pair[1] is None else abs(pair[1]), reverse=True)
    if min_score is not None:
        scored = [(edge, score) for edge, score in scored if score is not None and abs(score) >= min_score]
    return scored[:max_edges]


def _lay_out(circuit: Circuit, lines: list[_Line]) -> _Layout:
    names = {name for line in lines for name in (line.edge.writer.name, line.target)}
    writers = [writer for writer in circuit.graph.writers if writer.name in names and writer.layer >= 0]
    rows = sorted({writer.layer for writer in writers})
    heads = {layer: [w for w in writers if w.layer == layer and w.head is not None] for layer in rows}
    most = max(1, *map(len, heads.values())) if heads else 1
    column = min(76.0, max(1000 / most, 60.0))
    row = min(76.0, max(1500 / (len(rows) + 1), 46.0))
    middle = (most - 1) / 2 * column
    places = {"input": (middle, 0.0)}
    for i, layer in enumerate(rows, 1):
        start = (most - len(heads[layer])) / 2
        places |= {head.name: ((start + j) * column, i * row) for j, head in enumerate(heads[layer])}
        raised = 0.0 if circuit.graph.parallel else 0.38 * row  # it reads what the heads of its layer write
        places[f"m{layer}"] = ((most + 0.2) * column, i * row + raised)
    places["logits"] = (middle, (len(rows) + 1.2) * row)
    places = {name: place for name, place in places.items() if name in names}
    has_mlp = any(writer == Writer(writer.layer) for writer in writers)
    return _Layout(places, rows, column, row, (most - 1 + 1.2 * has_mlp) * column, (len(rows) + 1.2) * row)


def _trace(line: _Line, layout: _Layout, largest: float, unit: str, theme: Theme) -> go.Scatter:
    kind = line.edge.reader.kind
    strength = 0.2 if largest == 0 else abs(line.score or 0.0) / largest
    score = "no score" if line.score is None else f"{number(line.score, 4, sign='+')} {unit}".strip()
    x, y = _route(line, layout)
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        line={
            "color": _colour(line.score, theme),
            "width": _THIN + (_THICK - _THIN) * strength,
            "dash": _DASHES.get(kind, "solid"),
        },
        opacity=0.8,
        hoverinfo="text",
        hovertext=lines(line.edge.name, score),
        name=line.edge.name,
        showlegend=False,
    )


def _route(line: _Line, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    """A curve from box to box that leaves and arrives upright, and passes boxes that stand in its way on the nearer side."""
    from scipy.interpolate import PchipInterpolator

    (x0, y0), (x1, y1) = layout.places[line.edge.writer.name], layout.places[line.target]
    x1 += _PORTS.get(line.edge.reader.kind, 0.0) * layout.box
    y0, y1 = y0 + _BOX_HEIGHT / 2, y1 - _BOX_HEIGHT / 2
    stub = min(7.0, 0.25 * (y1 - y0))
    aside = 1.8 * (sum(map(ord, line.edge.name)) % 5 - 2)  # so that lines through one gap do not become one
    points = {y0: x0, y0 + stub: x0, y1 - stub: x1, y1: x1}
    for box_x, box_y in layout.places.values():
        straight = x0 + (x1 - x0) * (box_y - y0) / (y1 - y0)
        if y0 + stub < box_y < y1 - stub and abs(straight - box_x) < layout.box / 2 + 2:
            points[box_y] = box_x + math.copysign(layout.column / 2, straight - box_x) + aside
    heights = sorted(points)
    y = np.unique([*np.linspace(y0, y1, _POINTS), *heights])
    return PchipInterpolator(heights, [points[height] for height in heights])(y), y


def _colour(score: float | None, theme: Theme) -> str:
    return theme.grey if not score else theme.positive if score > 0 else theme.negative


def _legend(drawn: list[_Line], metric: str | None, theme: Theme) -> list[go.Scatter]:
    """Entries for what is in the picture, and for nothing else. Other packages' scores may have another sign."""
    colours = {_colour(line.score, theme) for line in drawn}
    names = {theme.positive: "positive score", theme.negative: "negative score", theme.grey: "no score, or 0"}
    if metric is not None:
        names |= {theme.positive: "raises the metric", theme.negative: "lowers the metric"}
    entries = [
        (name, colour, "solid") for colour, name in names.items() if colour in colours and colours != {theme.grey}
    ]
    kinds = {line.edge.reader.kind for line in drawn}
    solid = [what for kind, what in (("v", "value"), ("mlp", "MLP"), ("logits", "logits")) if kind in kinds]
    if kinds & set(_DASHES):
        entries += [(f"into {' / '.join(solid)}", theme.line, "solid")] if solid else []
        entries += [
            (f"into {name}", theme.line, _DASHES[kind])
            for kind, name in (("q", "query"), ("k", "key"))
            if kind in kinds
        ]
    return [
        go.Scatter(x=[None], y=[None], mode="lines", name=name, line={"color": colour, "width": 2.5, "dash": dash})
        for name, colour, dash in entries
    ]


def _between(below: float, score: float) -> float:
    """A short number that tells the two apart: above the one, and no more than the other."""
    for digits in range(3, 17):
        unit = 10.0 ** (math.floor(math.log10(score)) - digits + 1) if score > 0 else 1.0
        short = float(f"{math.floor(score / unit) * unit:.{digits}g}")
        if below < short <= score:
            return short
    return score


def _slider(drawn: list[_Line], boxes: list[str], n_traces: int, unit: str, theme: Theme) -> dict[str, Any] | None:
    """Thresholds at scores of edges, so that each step hides some; the first step shows all."""
    scores = sorted({abs(line.score or 0.0) for line in drawn})
    if len(scores) < 2:
        return None
    n = min(_THRESHOLDS, len(scores))
    steps = []
    for i in dict.fromkeys(round(j * (len(scores) - 1) / (n - 1)) for j in range(n)):
        threshold = _between(scores[i - 1] if i else 0.0, scores[i])
        kept = [abs(line.score or 0.0) >= threshold for line in drawn]
        ends = {
            name
            for line, keep in zip(drawn, kept, strict=True)
            if keep
            for name in (line.edge.writer.name, line.target)
        }
        edges = len({line.edge for line, keep in zip(drawn, kept, strict=True) if keep})
        faded = {f"annotations[{j}].opacity": 1.0 if name in ends else 0.25 for j, name in enumerate(boxes)}
        text = f"|score| ≥ {number(threshold, 15)}{' ' * bool(unit)}{unit}: {edges} edges"
        text = "all edges shown" if i == 0 else text
        visible = kept + [True] * (n_traces - len(drawn))
        steps.append({"method": "update", "args": [{"visible": visible}, faded], "label": plain(text)})
    return {
        "steps": steps,
        "active": 0,
        "currentvalue": {"prefix": "", "font": {"size": 12, "color": theme.ink}},
        "font": {"size": 1, "color": theme.paper},  # the steps' own labels would overlap; the current one is above
        "ticklen": 0,
        "minorticklen": 0,
        "bgcolor": theme.grid,
        "bordercolor": theme.line,
        "activebgcolor": theme.positive,
        "x": 0.0,
        "xanchor": "left",
        "y": 0,
        "yanchor": "top",
        "lenmode": "pixels",
        "len": 300,
        "pad": {"t": 14, "b": 0, "l": 0, "r": 0},
    }


def _box(
    name: str,
    x: float,
    y: float,
    layout: _Layout,
    circuit: Circuit,
    shown: list[tuple[Edge, float | None]],
    theme: Theme,
) -> dict[str, Any]:
    """A component's box, as an annotation: those are drawn above the edges."""
    writes = sum(edge.writer.name == name for edge, _ in shown)
    reads = sum(name in [w.name for w in circuit.graph.writers_of(edge.reader)] for edge, _ in shown)
    if name == "logits":
        reads = sum(edge.reader.kind == "logits" for edge, _ in shown)
    ends = name in ("input", "logits")
    return {
        "x": x,
        "y": y,
        "text": name,
        "width": layout.box + 16 * ends,
        "height": _BOX_HEIGHT - 4,
        "showarrow": False,
        "font": {"size": 11, "color": theme.ink},
        "bgcolor": theme.box_end if ends or name.startswith("m") else theme.box,
        "bordercolor": theme.grey,
        "borderwidth": 1,
        "borderpad": 1,
        "hovertext": f"{name}<br>edges shown: {reads} in, {writes} out",
    }


def _default_title(circuit: Circuit) -> str:
    what = f"Circuit: {circuit.n_edges:,} of {circuit.graph.n_edges:,} edges"
    return what + (f", {circuit.task}" if circuit.task else "")


def _caption(circuit: Circuit, shown: list[tuple[Edge, float | None]]) -> list[str]:
    origin = {**circuit.provenance, "model": circuit.model, "task": circuit.task}
    parts = caption_of(origin)
    strongest = shown[0][1]
    if strongest:
        unit = f" {origin['unit']}" if origin.get("unit") else ""
        parts.append(f"width is |score|, the widest {number(abs(strongest))}{unit}")
    if left := circuit.n_edges - len(shown):
        least = shown[-1][1]
        which = "those nearest the logits" if least is None else f"the strongest, |score| ≥ {number(abs(least))}"
        parts.append(f"{len(shown):,} of {circuit.n_edges:,} edges shown ({which}); {left:,} left out")
    return parts


def _table(circuit: Circuit, shown: list[tuple[Edge, float | None]]) -> Table:
    edges, drawn = list(circuit), {edge for edge, _ in shown}
    scores = [np.nan if circuit.scores is None else circuit.scores[circuit.graph.index(edge)].item() for edge in edges]
    return {
        "writer": np.array([edge.writer.name for edge in edges], dtype=object),
        "reader": np.array([edge.reader.name for edge in edges], dtype=object),
        "score": np.array(scores, dtype=np.float64),
        "shown": np.array([edge in drawn for edge in edges]),
    }


def _style(
    figure: Figure,
    layout: _Layout,
    facts: Facts,
    slider: dict[str, Any] | None,
    table: Callable[[], Table],
    theme: Theme,
) -> None:
    inner = max(layout.width + 96, 330)
    spare = (inner - layout.width) / 2
    figure.update_xaxes(range=[-spare, layout.width + spare], visible=False, fixedrange=False)
    figure.update_yaxes(
        range=[-_BOX_HEIGHT, layout.height + _BOX_HEIGHT],
        tickmode="array",
        tickvals=[i * layout.row for i in range(1, len(layout.rows) + 1)],
        ticktext=[f"layer {layer}" for layer in layout.rows],
        showgrid=True,
        gridcolor=theme.grid,
        zeroline=False,
    )
    frame = Frame(inner, layout.height + 2 * _BOX_HEIGHT, left=92, right=190, below=74 if slider else 16, above=-16)
    dress(figure, theme, frame, facts, table)
    figure.update_layout(
        sliders=[slider] if slider else [],
        legend={"x": 1.0, "y": 1.0, "xanchor": "left", "yanchor": "top", "itemclick": False, "itemdoubleclick": False},
    )
