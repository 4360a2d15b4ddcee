"""Pictures of circuits.

1. Choose the edges to show: the strongest, and say how many were left out.
2. Lay out the components that have one: the embedding at the bottom, the logits on top, and between them a row for each
   layer, its heads side by side and its MLP at the right.
3. Draw each edge upward, as wide as its score is far from 0: blue where its clean value raises the metric and red where it lowers
   it (the heat map's colours); solid into values, MLPs and logits, dashed into queries, dotted into keys. What a head's query
   reads enters it on the left, what its key reads in the middle, and what its value reads on the right.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mechkit.circuits.circuit import Circuit
from mechkit.circuits.graph import Edge, Writer
from mechkit.plot._text import number as _number
from mechkit.plot._text import plain as _plain
from mechkit.plot._theme import FONT as _FONT
from mechkit.plot._theme import LIGHT

_COLOURS = LIGHT.diverging

_RED, _BLUE, _GREY, _INK = _COLOURS[1], _COLOURS[-2], "#8c8c8c", "#444444"
_DASHES = {"q": "dash", "k": "dot"}  # solid into everything else
_PORTS = {"q": -0.32, "v": 0.32}  # of a box's width, from its middle
_THIN, _THICK = 0.7, 6.0  # pixels
_BOX_HEIGHT = 19
_GAP = 16  # pixels between two boxes
_STEPS = 24  # points of an edge's curve, at which the mouse finds it

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


def circuit(
    circuit: Circuit, *, min_score: float | None = None, max_edges: int = 200, title: str | None = None
) -> go.Figure:
    """Draw a circuit.

    An edge into a key or value that several heads share leads to each of them that writes over an edge of the circuit.

    Args:
        circuit: What to draw. Without scores all edges are grey and equally wide.
        min_score: Leave out edges whose score is closer to 0 than this, in the scores' unit.
        max_edges: Show no more than so many: those that score furthest from 0, or without scores those nearest the logits.
        title: Of the figure, as plain text; by default how many edges there are.

    Returns:
        A plotly figure; nothing is shown or written.

    Raises:
        ValueError: there is nothing to show, `min_score` is given without scores, or either number is out of range.
    """
    shown = _choose(circuit, min_score, max_edges)
    if not shown:
        asked = "" if min_score is None else f" whose score is at least {min_score} away from 0"
        raise ValueError(f"circuit: expected at least one edge{asked}, got none among {len(circuit)}")
    lines = [
        _Line(edge, target, score)
        for edge, score in reversed(shown)  # the strongest on top
        for target in [writer.name for writer in circuit.targets(edge.reader)] or ["logits"]
    ]
    layout = _lay_out(circuit, lines)
    largest = max((abs(score) for _, score in shown if score is not None), default=0.0)
    unit = str(circuit.provenance.get("unit") or "")
    figure = go.Figure(
        [_trace(line, layout, largest, unit) for line in lines] + _legend(lines, circuit.provenance.get("metric"))
    )
    for name, (x, y) in layout.places.items():
        figure.add_annotation(**_box(name, x, y, layout, circuit, shown))
    _style(figure, layout, _default_title(circuit) if title is None else title, _caption(circuit, shown))
    return figure


def _choose(circuit: Circuit, min_score: float | None, max_edges: int) -> list[tuple[Edge, float | None]]:
    """The edges to show, the strongest first; those without a score last."""
    if max_edges < 1 or (min_score is not None and not min_score >= 0):
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


def _trace(line: _Line, layout: _Layout, largest: float, unit: str) -> go.Scatter:
    kind = line.edge.reader.kind
    strength = 0.2 if largest == 0 else abs(line.score or 0.0) / largest
    score = "no score" if line.score is None else f"{_number(line.score, 4, sign='+')} {unit}".strip()
    x, y = _route(line, layout)
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        line={
            "color": _colour(line.score),
            "width": _THIN + (_THICK - _THIN) * strength,
            "dash": _DASHES.get(kind, "solid"),
        },
        opacity=0.8,
        hoverinfo="text",
        hovertext=f"{_plain(line.edge.name)}<br>{_plain(score)}",
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
    y = np.unique([*np.linspace(y0, y1, _STEPS), *heights])
    return PchipInterpolator(heights, [points[height] for height in heights])(y), y


def _colour(score: float | None) -> str:
    return _GREY if score is None or score == 0 else _BLUE if score > 0 else _RED


def _legend(lines: list[_Line], metric: str | None) -> list[go.Scatter]:
    """Entries for what is in the picture, and for nothing else. Other packages' scores may have another sign."""
    colours = {_colour(line.score) for line in lines}
    names = {_BLUE: "positive score", _RED: "negative score", _GREY: "no score, or 0"}
    if metric is not None:
        names |= {_BLUE: "raises the metric", _RED: "lowers the metric"}
    entries = [(name, colour, "solid") for colour, name in names.items() if colour in colours and colours != {_GREY}]
    kinds = {line.edge.reader.kind for line in lines}
    solid = [what for kind, what in (("v", "value"), ("mlp", "MLP"), ("logits", "logits")) if kind in kinds]
    if kinds & set(_DASHES):
        entries += [(f"into {' / '.join(solid)}", _INK, "solid")] if solid else []
        entries += [
            (f"into {name}", _INK, _DASHES[kind]) for kind, name in (("q", "query"), ("k", "key")) if kind in kinds
        ]
    return [
        go.Scatter(x=[None], y=[None], mode="lines", name=name, line={"color": colour, "width": 2.5, "dash": dash})
        for name, colour, dash in entries
    ]


def _box(
    name: str, x: float, y: float, layout: _Layout, circuit: Circuit, shown: list[tuple[Edge, float | None]]
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
        "font": {"size": 11, "color": "#222222"},
        "bgcolor": "#f2f2f2" if ends or name.startswith("m") else "#ffffff",
        "bordercolor": "#777777",
        "borderwidth": 1,
        "borderpad": 1,
        "hovertext": f"{name}<br>edges shown: {reads} in, {writes} out",
    }


def _default_title(circuit: Circuit) -> str:
    what = f"Circuit: {circuit.n_edges:,} of {circuit.graph.n_edges:,} edges"
    return what + (f", {circuit.task}" if circuit.task else "")


def _caption(circuit: Circuit, shown: list[tuple[Edge, float | None]]) -> list[str]:
    origin = circuit.provenance
    technique = str(origin.get("technique") or "").replace("_", " ")
    n_prompts = origin.get("n_prompts")
    parts = [circuit.model, circuit.task, technique]
    parts.append(f"mean over {n_prompts} prompt{'s' if n_prompts != 1 else ''}" if n_prompts and technique else "")
    strongest = shown[0][1]
    if strongest:
        unit = f" {origin['unit']}" if origin.get("unit") else ""
        parts.append(f"width is |score|, the widest {_number(abs(strongest))}{unit}")
    if left := circuit.n_edges - len(shown):
        least = shown[-1][1]
        which = "those nearest the logits" if least is None else f"the strongest, |score| ≥ {_number(abs(least))}"
        parts.append(f"{len(shown):,} of {circuit.n_edges:,} edges shown ({which}); {left:,} left out")
    return [part for part in parts if part]


def _style(figure: go.Figure, layout: _Layout, title: str, caption: list[str]) -> None:
    left, right = 92, 48
    inner = max(layout.width + 2 * right, 330)
    width = left + inner + 190  # the legend's
    heading = textwrap.wrap(title, round((width - left) / 8)) or [""]
    small_print = textwrap.wrap(" · ".join(caption), round((width - left - 20) / 6))
    top, bottom = 46 + 22 * len(heading), 34 + 15 * len(small_print)
    tall = layout.height + 2 * _BOX_HEIGHT
    spare = (inner - layout.width) / 2
    height = round(top + tall + bottom)
    figure.update_xaxes(range=[-spare, layout.width + spare], visible=False, fixedrange=False)
    figure.update_yaxes(
        range=[-_BOX_HEIGHT, layout.height + _BOX_HEIGHT],
        tickmode="array",
        tickvals=[i * layout.row for i in range(1, len(layout.rows) + 1)],
        ticktext=[f"layer {layer}" for layer in layout.rows],
        showgrid=True,
        gridcolor="#eeeeee",
        zeroline=False,
    )
    figure.add_annotation(
        text="<br>".join(map(_plain, small_print)),
        xref="paper",
        yref="paper",
        x=0,
        y=0,
        yshift=-16,
        xanchor="left",
        yanchor="top",
        align="left",
        showarrow=False,
        font={"size": 11, "color": "#555555"},
    )
    figure.update_layout(
        title={
            "text": "<br>".join(map(_plain, heading)),
            "font_size": 17,
            "x": left / width,
            "xanchor": "left",
            "y": 1 - 26 / height,
            "yanchor": "top",
        },
        width=round(width),
        height=height,
        margin={"l": left, "r": 190, "t": top, "b": bottom},
        font={"family": _FONT, "size": 12, "color": "#222222"},
        legend={"x": 1.0, "y": 1.0, "xanchor": "left", "yanchor": "top", "itemclick": False, "itemdoubleclick": False},
        hovermode="closest",
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
    )
