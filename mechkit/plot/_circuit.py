"""Pictures of circuits.

1. Choose the edges to show: the strongest, and say how many were left out.
2. Lay out the components that have one: the embedding at the bottom, the logits on top, and between them a row for each
   layer: its heads in columns from the left, its MLP in a column of its own at the right. A layer with more heads than there are
   columns takes several rows. If all that does not fit on a page, the weakest edges are left out too, and the caption says so.
3. Draw each edge upward, as wide as its score is far from 0: blue where its clean value raises the metric and red where it lowers
   it (the heat map's colours); solid into values, MLPs and logits, dashed into queries, dotted into keys. What a head's query
   reads enters it on the left, what its key reads in the middle, and what its value reads on the right.
4. Colour the boxes by role, if the caller names roles.
5. A slider below hides the edges that score closer to 0 than a threshold, and fades the components that lose their last one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from mechkit._check import checked
from mechkit.circuits.circuit import Circuit
from mechkit.circuits.graph import Edge, Writer
from mechkit.plot._figure import Facts, Figure, Frame, Notes, Table, dress
from mechkit.plot._points import legend_entry
from mechkit.plot._scale import sign_colour
from mechkit.plot._size import Length, Paper, paper_in, redrawn
from mechkit.plot._text import caption_of, lines, number, plain
from mechkit.plot._theme import Theme, rgb, rgba, theme_of

_DASHES = {"q": "8px,4px", "k": "2px,3px"}  # solid into everything else; in pixels: a wide line has no longer dashes
_PORTS = {"q": -0.32, "v": 0.32}  # of a box's width, from its middle
_THIN, _THICK = 0.7, 6.0  # pixels
_BOX_HEIGHT = 19
_GAP = 12  # pixels between two boxes
_LEAST = 17.0  # pixels from one row to the next
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
    rows: dict[int, float]  # where the middle of each layer's heads is
    column: float
    row: float
    width: float
    height: float
    n_columns: int
    n_others: int

    @property
    def box(self) -> float:
        return self.column - _GAP

    @property
    def tall(self) -> float:
        """Pixels of a box, from top to bottom."""
        return min(_BOX_HEIGHT, 0.72 * self.row)

    @property
    def font(self) -> int:
        return 11 if self.tall >= 16 else 10 if self.tall >= 14 else 9


@checked
@redrawn
def circuit(
    circuit: Circuit,
    *,
    min_score: float | None = None,
    max_edges: int = 200,
    roles: Mapping[str, str] | None = None,
    title: str | None = None,
    size: Literal["column", "page", "slide"] | None = None,
    width: Length | None = None,
    height: Length | None = None,
    font_size: float | None = None,
    caption: bool = True,
    annotations: Notes | None = None,
    theme: str = "light",
) -> Figure:
    """Draw a circuit.

    An edge into a key or value that several heads share leads to each of them that writes over an edge of the circuit.

    Args:
        circuit: What to draw. Without scores all edges are grey and equally wide, and there is no slider.
        min_score: Leave out edges whose score is closer to 0 than this, in the scores' unit.
        max_edges: Show no more than so many: those that score furthest from 0, or without scores those nearest the logits. Fewer
            where they would not fit on a page.
        roles: What components do, by name: `{"a9.h9": "name mover", "L8H6": "S-inhibition"}`. Boxes have a colour for each role
            (at most six), and the legend names it.
        title: Of the figure, as plain text; by default how many edges there are.
        size, width, height, font_size, caption, annotations: See `Figure.resized`.
        theme: `"light"` or `"dark"`.

    Returns:
        A plotly figure; nothing is shown or written. Its `table` has all edges of the circuit, `shown` or not.

    Raises:
        ValueError: there is nothing to show, `min_score` is given without scores, or either number is out of range.
    """
    colours, paper = theme_of(theme), paper_in(size)
    if not isinstance(circuit, Circuit):
        raise ValueError(
            f"circuit: expected a Circuit, got {type(circuit).__name__}; EdgeScores draw themselves: plot()"
        )
    named = _roles(circuit, roles, colours)
    shown = _choose(circuit, min_score, max_edges)
    if not shown:
        asked = "" if min_score is None else f" whose score is at least {min_score} away from 0"
        raise ValueError(f"circuit: expected at least one edge{asked}, got none among {len(circuit)}")
    drawn = _lines_of(circuit, shown)
    layout = _lay_out(circuit, drawn, paper)
    while layout.row < _LEAST and len(shown) > 1:
        shown = shown[: max(1, int(0.9 * len(shown)))]
        kept = {edge for edge, _ in shown}
        drawn = [line for line in drawn if line.edge in kept]
        layout = _lay_out(circuit, drawn, paper)
    largest = max((abs(score) for _, score in shown if score is not None), default=0.0)
    unit = str(circuit.provenance.get("unit") or "")
    entries = _legend(drawn, circuit, colours) + _role_entries(layout, named, colours)
    figure = Figure([_trace(line, layout, largest, unit, colours) for line in drawn] + entries)
    figure.layout.annotations = [  # all at once: plotly checks those that are there again for each that is added
        _box(name, x, y, layout, circuit, shown, named.get(name), colours) for name, (x, y) in layout.places.items()
    ]
    slider = None if paper.still else _slider(drawn, list(layout.places), len(figure.data), unit, colours)
    facts = Facts("circuit", _default_title(circuit) if title is None else title, tuple(_caption(circuit, shown)))
    _style(figure, layout, facts, slider, lambda: _table(circuit, shown), colours, paper, len(entries))
    return figure


def _lines_of(circuit: Circuit, shown: list[tuple[Edge, float | None]]) -> list[_Line]:
    return [
        _Line(edge, target, score)
        for edge, score in reversed(shown)  # the strongest on top
        for target in [writer.name for writer in circuit.targets(edge.reader)] or [edge.reader.name]
    ]


def _label(name: str) -> str:
    """What stands in a component's box: `L9H6` of `a9.h6`, `MLP 9` of `m9`; any other name as it is."""
    if match := re.fullmatch(r"a(\d+)\.h(\d+)", name):
        return f"L{match[1]}H{match[2]}"
    return f"MLP {name[1:]}" if re.fullmatch(r"m\d+", name) else name


def _roles(circuit: Circuit, roles: Mapping[str, str] | None, theme: Theme) -> dict[str, tuple[str, str]]:
    """Role and colour of components, by name.

    Raises:
        ValueError: there is no such component, or more roles than colours.
    """
    known = {writer.name: writer.name for writer in circuit.graph.writers}
    known |= {_label(name): name for name in known}
    kinds = list(dict.fromkeys((roles or {}).values()))
    if unknown := [name for name in roles or {} if name not in known]:
        near = get_close_matches(unknown[0], known, 3) or list(known)[:3]
        raise ValueError(
            f"roles: expected names of components, such as {', '.join(map(repr, near))}; got {unknown[0]!r}"
        )
    if len(kinds) >= len(theme.series):
        raise ValueError(
            f"roles: expected at most {len(theme.series) - 1} different ones, got {len(kinds)}; merge some"
        )
    return {known[name]: (role, theme.series[kinds.index(role)]) for name, role in (roles or {}).items()}


def _role_entries(layout: _Layout, roles: Mapping[str, tuple[str, str]], theme: Theme) -> list[go.Scatter]:
    """Entries of the legend for the roles that are in the picture."""
    found = dict.fromkeys(roles[name] for name in layout.places if name in roles)
    line = {"width": 2}
    return [
        legend_entry(
            plain(role),
            mode="markers",
            marker={"symbol": "square", "size": 11, "color": rgba(colour, 0.3), "line": {"color": colour, **line}},
        )
        for role, colour in found
    ]


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


def _lay_out(circuit: Circuit, lines: list[_Line], paper: Paper) -> _Layout:
    names = {name for line in lines for name in (line.edge.writer.name, line.target)}
    left, right = _beside(paper)
    graph = circuit.graph
    writers = [writer for writer in graph.writers if writer.name in names and writer.layer >= 0]
    rows = sorted({writer.layer for writer in writers})
    heads: dict[int, list[Writer]] = {layer: [] for layer in rows}
    others: dict[int, list[Writer]] = {layer: [] for layer in rows}  # at the right
    for writer in writers:
        (heads if graph.group_of(writer).kind.attention else others)[writer.layer].append(writer)
    most, most_others = max(1, *map(len, heads.values())) if rows else 1, max(map(len, others.values()), default=0)
    longest = max([6, *(len(_label(name)) for name in names)])
    least, room = 7.0 * longest + 6 + _GAP, paper.across(left, right, 1000.0)
    n_columns = max(1, min(most, int((room - _GAP) / least) - most_others))
    column = min(76.0, max(room / (n_columns + 0.2 + most_others), least))
    deep = {layer: max(1, math.ceil(len(heads[layer]) / n_columns)) for layer in rows}  # rows of its heads
    n_rows = sum(deep.values()) + 1.2
    row = min(60.0, paper.down(680.0) / n_rows)
    middle = (n_columns - 1) / 2 * column
    places, at, middles = {graph.writers[0].name: (middle, 0.0)}, 1.0, {}
    for layer in rows:
        for j, head in enumerate(heads[layer]):
            across, down = j % n_columns, j // n_columns
            places[head.name] = (across * column, (at + down) * row)
        middles[layer] = (at + (deep[layer] - 1) / 2) * row
        for j, other in enumerate(others[layer]):
            raised = 0.38 * row if graph.group_of(other).within else 0.0  # it reads what the heads of its layer write
            places[other.name] = ((n_columns + 0.2 + j) * column, (at + deep[layer] - 1) * row + raised)
        at += deep[layer]
    places[graph.readers[-1].name] = (middle, (at + 0.2) * row)
    places = {name: place for name, place in places.items() if name in names}
    width = (n_columns - 1 + (0.2 + most_others if most_others else 0)) * column
    return _Layout(places, middles, column, row, width, (at + 0.2) * row, n_columns, most_others)


def _beside(paper: Paper) -> tuple[int, int]:
    """Pixels to the left and to the right of the components."""
    return (58, 30) if paper.narrow else (92, 190)


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
            "color": sign_colour(line.score, theme),
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
    y0, y1 = y0 + layout.tall / 2, y1 - layout.tall / 2
    if y1 - y0 < 2:  # a box beside it, hardly higher: from middle to middle, behind the boxes
        return np.array([x0, x1]), np.array([y0 - layout.tall / 2, y1 + layout.tall / 2])
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


def _legend(drawn: list[_Line], circuit: Circuit, theme: Theme) -> list[go.Scatter]:
    """Entries for what is in the picture, and for nothing else. Other packages' scores may have another sign."""
    colours = {sign_colour(line.score, theme) for line in drawn}
    names = {theme.positive: "positive score", theme.negative: "negative score", theme.grey: "no score, or 0"}
    if circuit.provenance.get("metric") is not None:
        names |= {theme.positive: "raises the metric", theme.negative: "lowers the metric"}
    entries = [
        (name, colour, "solid") for colour, name in names.items() if colour in colours and colours != {theme.grey}
    ]
    kinds = {line.edge.reader.kind for line in drawn}
    words = {r: word for kind in circuit.graph.kinds for r, word in kind.reads.items() if r in kinds}
    solid = [word for reads, word in words.items() if reads not in _DASHES]
    if len(solid) < len(words):
        entries += [(f"into {' / '.join(solid)}", theme.line, "solid")] if solid else []
        entries += [(f"into {words[reads]}", theme.line, dash) for reads, dash in _DASHES.items() if reads in words]
    return [
        legend_entry(name, mode="lines", line={"color": colour, "width": 2.5, "dash": dash})
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
    role: tuple[str, str] | None,
    theme: Theme,
) -> dict[str, Any]:
    """A component's box, as an annotation: those are drawn above the edges."""
    graph = circuit.graph
    writes = sum(edge.writer.name == name for edge, _ in shown)
    reads = sum(name in ([w.name for w in graph.writers_of(edge.reader)] or [edge.reader.name]) for edge, _ in shown)
    ends = name in (graph.writers[0].name, graph.readers[-1].name)
    head = not ends and graph.group_of(graph.writer(name)).kind.attention
    look = {"bgcolor": theme.box if head else theme.box_end, "bordercolor": theme.grey, "borderwidth": 1}
    if role is not None:
        mixed = [round(0.7 * a + 0.3 * b) for a, b in zip(rgb(theme.box), rgb(role[1]), strict=True)]
        look = {"bgcolor": "#{:02x}{:02x}{:02x}".format(*mixed), "bordercolor": role[1], "borderwidth": 2}
    played = f", {plain(role[0])}" if role is not None else ""
    return {
        "x": x,
        "y": y,
        "text": plain(_label(name)),
        "width": layout.box + 4 * ends,
        "height": layout.tall - 4,
        "showarrow": False,
        "font": {"size": layout.font, "color": theme.ink},
        **look,
        "borderpad": 1,
        "hovertext": f"{plain(name)}{played}<br>edges shown: {reads} in, {writes} out",
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
    paper: Paper,
    n_entries: int,
) -> None:
    left, right = _beside(paper)
    inner = max(layout.width + layout.column, 330 if paper.width is None else paper.across(left, right, 330))
    spare = (inner - layout.width) / 2
    figure.update_xaxes(range=[-spare, layout.width + spare], visible=False, fixedrange=False)
    figure.update_yaxes(
        range=[-_BOX_HEIGHT, layout.height + _BOX_HEIGHT],
        tickmode="array",
        tickvals=list(layout.rows.values()),
        ticktext=[str(layer) if paper.narrow else f"layer {layer}" for layer in layout.rows],
        title={"text": "layer" if paper.narrow else "", "font": {"size": 12}, "standoff": 6},
        showgrid=True,
        gridcolor=theme.grid,
        zeroline=False,
    )
    where = {"x": 1.0, "y": 1.0, "xanchor": "left", "yanchor": "top"}
    below, height = 74 if slider else 16, layout.height + 2 * _BOX_HEIGHT
    if paper.narrow:
        where = {"x": 0.0, "y": -(below - 8) / height, "xanchor": "left", "yanchor": "top"}
        below += 10 + 21 * n_entries
    frame = Frame(inner, height, left=left, right=right, below=below, above=0 if paper.width is not None else -16)
    places = {name: (x, y, "") for name, (x, y) in layout.places.items()}
    places |= {_label(name): place for name, place in places.items()}
    dress(figure, theme, frame, facts, table, paper, places=lambda: places)
    figure.update_layout(
        sliders=[slider] if slider else [],
        legend={**where, "itemclick": False, "itemdoubleclick": False},
    )
