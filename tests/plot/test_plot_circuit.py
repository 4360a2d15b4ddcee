"""Pictures of circuits and faithfulness curves: every mark is where the numbers say, and nothing is left out in silence."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import plotly.graph_objects as go
import pytest
import torch

from mechkit.circuits.circuit import Circuit
from mechkit.circuits.edge_scores import EdgeScores
from mechkit.circuits.graph import Graph
from mechkit.plot._circuit import circuit as draw
from mechkit.plot._curve import curve

SMALL, GQA = Graph(2, 3, 3), Graph(3, 4, 2)
BLUE, RED, GREY = "#2166ac", "#b2182b", "#8c8c8c"
NAN = float("nan")


def scores(graph: Graph, seed: int = 0) -> EdgeScores:
    values = torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    provenance = {"model": "tiny", "task": "ioi", "technique": "edge_attribution", "n_prompts": 4}
    return EdgeScores.of(
        graph, values, baseline={}, metric="logit_diff", unit="logits", provenance=provenance, prompts=False
    )


def lines(figure: go.Figure) -> list[go.Scatter]:
    return [trace for trace in figure.data if trace.name and "->" in trace.name]


def legend(figure: go.Figure) -> dict[str, go.Scatter]:
    return {trace.name: trace for trace in figure.data if "->" not in (trace.name or "->")}


def boxes(figure: go.Figure) -> dict[str, Any]:
    """By the component's name, which hover has; what stands in them is a label."""
    return {re.split(",|<br>", box.hovertext)[0]: box for box in figure.layout.annotations[:-1]}


def caption(figure: go.Figure) -> str:
    return figure.layout.annotations[-1].text.replace("<br>", " ")


def test_every_edge_is_drawn_with_its_score() -> None:
    circuit = Circuit.from_scores(scores(SMALL), n_edges=40)
    figure = draw(circuit)
    assert [trace.name for trace in lines(figure)] == [
        edge.name
        for edge in sorted(circuit, key=lambda e: abs(circuit.scores[SMALL.index(e)]))  # the strongest on top
    ]
    largest = circuit.scores[circuit.members].abs().max().item()
    for trace in lines(figure):
        edge = SMALL.edge(trace.name)
        score = circuit.scores[SMALL.index(edge)].item()
        assert trace.line.color == (BLUE if score > 0 else RED)
        assert trace.line.width == pytest.approx(0.7 + 5.3 * abs(score) / largest)
        assert trace.line.dash == {"q": "8px,4px", "k": "2px,3px"}.get(edge.reader.kind, "solid")
        name, hover = trace.hovertext.split("<br>")
        assert name == edge.name.replace(">", "&#62;").replace("<", "&#60;")
        assert float(hover.removesuffix(" logits").replace("−", "-")) == pytest.approx(score, rel=1e-3)
    assert "left out" not in caption(figure)
    assert f"the widest {largest:.3g} logits" in caption(figure)
    assert figure.layout.title.text == f"Circuit: {len(circuit)} of {SMALL.n_edges} edges, ioi"


def test_layers_go_upward_and_boxes_are_where_the_lines_end() -> None:
    for graph in (SMALL, GQA, Graph(3, 2, 2, parallel=True), Graph(2, 3, 3, mlps=False)):
        circuit = Circuit.full(graph)
        figure = draw(circuit, max_edges=graph.n_edges)
        place = {name: (box.x, box.y) for name, box in boxes(figure).items()}
        assert set(place) == {*graph.writer_index, "logits"}
        assert len(set(place.values())) == len(place)
        drawn = set()
        for trace in lines(figure):
            assert all(b > a for a, b in zip(trace.y, trace.y[1:], strict=False))
            edge = graph.edge(trace.name)
            x, y = place[edge.writer.name]
            assert trace.x[0] == x
            assert trace.y[0] - y == pytest.approx(9.5)
            ends = [w.name for w in graph.writers_of(edge.reader)] or ["logits"]
            [end] = [
                e for e in ends if abs(place[e][0] - trace.x[-1]) < 28 and abs(place[e][1] - trace.y[-1] - 9.5) < 1e-6
            ]
            shift = trace.x[-1] - place[end][0]
            assert (shift < 0) == (edge.reader.kind == "q")
            assert (shift > 0) == (edge.reader.kind == "v")
            drawn.add((edge.name, end))
        assert drawn == {
            (e.name, end) for e in graph.edges for end in [w.name for w in graph.writers_of(e.reader)] or ["logits"]
        }
        for layer in range(graph.n_layers):
            heads = [place[f"a{layer}.h{head}"] for head in range(graph.n_heads)]
            assert sorted(heads) == heads
            assert len({y for _, y in heads}) == 1
            if graph.mlps:
                mlp = place[f"m{layer}"]
                assert mlp[0] > heads[-1][0]
                assert (mlp[1] == heads[0][1]) if graph.parallel else (mlp[1] > heads[0][1])


def test_a_line_passes_the_boxes_in_its_way() -> None:
    names = ["input->a0.h0<q>", "a0.h0->a1.h0<q>", "a1.h0->a2.h1<v>", "a2.h1->logits", "input->logits"]
    figure = draw(Circuit.from_edges(Graph(3, 2, 2, mlps=False), names))
    [trace] = [trace for trace in lines(figure) if trace.name == "input->logits"]
    for name in ("a0.h0", "a1.h0", "a2.h1"):
        box = boxes(figure)[name]
        crossing = [x for x, y in zip(trace.x, trace.y, strict=True) if abs(y - box.y) < 1]
        assert crossing
        assert all(abs(x - box.x) > box.width / 2 for x in crossing)
    alone = draw(Circuit.from_edges(Graph(3, 2, 2, mlps=False), ["input->logits"]))
    assert len(set(lines(alone)[0].x)) == 1  # the control: nothing in the way


def test_only_what_has_an_edge_is_shown() -> None:
    circuit = Circuit.from_edges(SMALL, ["input->a0.h1<v>", "a0.h1->m1", "m1->logits"])
    figure = draw(circuit)
    assert set(boxes(figure)) == {"input", "a0.h1", "m1", "logits"}
    assert [boxes(figure)[name].text for name in ("a0.h1", "m1", "input")] == ["L0H1", "MLP 1", "input"]
    assert boxes(figure)["a0.h1"].hovertext == "a0.h1<br>edges shown: 1 in, 1 out"
    assert boxes(figure)["logits"].hovertext == "logits<br>edges shown: 1 in, 0 out"
    assert set(legend(figure)) == set()  # no scores, one kind of line
    assert {trace.line.color for trace in lines(figure)} == {GREY}
    assert {trace.line.width for trace in lines(figure)} == {0.7 + 0.2 * 5.3}
    assert lines(figure)[0].hovertext.endswith("no score")


def test_roles_colour_boxes_and_are_named() -> None:
    circuit = Circuit.from_edges(
        SMALL, ["input->a0.h1<v>", "a0.h1->m1", "a0.h1->a1.h0<v>", "a1.h0->logits", "m1->logits"]
    )
    figure = draw(circuit, roles={"a0.h1": "name <b>mover", "L1H0": "inhibition", "a1.h2": "not shown"})
    one, two, none = (boxes(figure)[name] for name in ("a0.h1", "a1.h0", "m1"))
    assert len({box.bordercolor for box in (one, two, none)}) == 3
    assert one.hovertext == "a0.h1, name &#60;b&#62;mover<br>edges shown: 1 in, 2 out"
    entries = legend(figure)
    assert {"name &#60;b&#62;mover", "inhibition"} <= set(entries)
    assert "not shown" not in entries
    assert entries["inhibition"].marker.line.color == two.bordercolor
    with pytest.raises(ValueError, match=r"roles: expected names of components, such as .*; got 'a9\.h9'"):
        draw(circuit, roles={"a9.h9": "x"})
    with pytest.raises(ValueError, match="roles: expected at most 6 different ones, got 8"):
        draw(Circuit.full(Graph(2, 4, 4)), roles={f"a{i}.h{j}": f"{i}{j}" for i in range(2) for j in range(4)})


def test_heads_and_mlps_stand_in_columns() -> None:
    figure = draw(Circuit.full(GQA), max_edges=GQA.n_edges)
    place = {name: (box.x, box.y) for name, box in boxes(figure).items()}
    assert len({place[f"m{layer}"][0] for layer in range(3)}) == 1
    assert [place[f"a{layer}.h2"][0] for layer in range(3)] == [place["a0.h2"][0]] * 3
    assert place["m0"][0] > max(place[f"a{layer}.h{head}"][0] for layer in range(3) for head in range(4))
    wide = draw(Circuit.full(Graph(1, 32, 32, mlps=False)), max_edges=10_000, size="column")
    rows = {box.y for name, box in boxes(wide).items() if name.startswith("a")}
    assert len(rows) == 8  # of four: a layer that is too wide takes several rows


def test_legend_names_what_is_in_the_picture() -> None:
    circuit = Circuit.from_scores(scores(SMALL), n_edges=40)
    names = legend(draw(circuit))
    assert set(names) == {
        "raises the metric",
        "lowers the metric",
        "into value / MLP / logits",
        "into query",
        "into key",
    }
    assert names["raises the metric"].line.color == BLUE
    assert names["lowers the metric"].line.color == RED
    assert (names["into query"].line.dash, names["into key"].line.dash) == ("8px,4px", "2px,3px")
    unknown = dataclasses.replace(circuit, provenance={})  # of another package: the sign may mean something else
    assert {"positive score", "negative score"} <= set(legend(draw(unknown)))
    queries = Circuit.from_edges(SMALL, ["input->a0.h1<q>"])
    assert set(legend(draw(queries))) == {"into query"}


def test_edges_that_are_left_out_are_counted() -> None:
    circuit = Circuit.from_scores(scores(SMALL), n_edges=40)
    sizes = sorted((abs(circuit.scores[SMALL.index(e)].item()) for e in circuit), reverse=True)
    figure = draw(circuit, max_edges=10)
    assert {e.name for e in circuit if abs(circuit.scores[SMALL.index(e)]) >= sizes[9]} == {
        t.name for t in lines(figure)
    }
    left = len(circuit) - 10
    assert f"10 of {len(circuit)} edges shown (the strongest, |score| ≥ {sizes[9]:.3g}); {left} left out" in caption(
        figure
    )
    cut = draw(circuit, min_score=sizes[4])
    assert len(lines(cut)) == 5
    assert f"5 of {len(circuit)} edges shown" in caption(cut)
    unscored = draw(Circuit.full(SMALL), max_edges=5)
    assert all(trace.name.endswith("->logits") for trace in lines(unscored))
    assert f"5 of {SMALL.n_edges} edges shown (those nearest the logits)" in caption(unscored)


def test_a_shared_key_is_drawn_to_the_heads_of_the_circuit() -> None:
    names = ["input->a0.kv1<k>", "a0.h3->logits"]
    assert [t.name for t in lines(draw(Circuit.from_edges(GQA, names)))].count("input->a0.kv1<k>") == 1
    both = draw(Circuit.from_edges(GQA, [*names, "a0.h2->logits"]))
    assert [t.name for t in lines(both)].count("input->a0.kv1<k>") == 2
    assert {"a0.h2", "a0.h3"} < set(boxes(both))


def test_edges_without_a_score_come_last_and_are_grey() -> None:
    values = torch.full(SMALL.exists.shape, NAN)
    values[SMALL.index(SMALL.edge("m0->logits"))] = 2.0
    circuit = Circuit(SMALL, SMALL.exists, values)
    figure = draw(circuit, max_edges=3)
    assert [trace.line.color for trace in lines(figure)] == [GREY, GREY, BLUE]
    assert "no score, or 0" in legend(figure)
    zeros = draw(dataclasses.replace(circuit, scores=torch.zeros(SMALL.exists.shape)))
    assert {trace.line.color for trace in lines(zeros)} == {GREY}


def test_text_is_never_markup() -> None:
    circuit = dataclasses.replace(Circuit.from_edges(SMALL, ["input->logits"], task="<b>$x$"), model="a<i>")
    figure = draw(circuit)
    assert "<b>" not in figure.layout.title.text
    assert "$" not in figure.layout.title.text
    assert "<i>" not in caption(figure)
    assert draw(circuit, title="Mine").layout.title.text == "Mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_edges": 0}, "expected max_edges >= 1"),
        ({"min_score": -1.0}, "min_score >= 0"),
        ({"min_score": NAN}, "min_score >= 0"),
        ({"min_score": 100.0}, "score is at least 100.0 away from 0, got none among"),
    ],
)
def test_circuit_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(Circuit.from_scores(scores(SMALL), n_edges=40), **arguments)


def test_circuit_refuses_what_has_nothing_to_show() -> None:
    with pytest.raises(ValueError, match="expected at least one edge, got none among 0"):
        draw(Circuit.empty(SMALL))
    with pytest.raises(ValueError, match="min_score: expected a circuit with scores"):
        draw(Circuit.full(SMALL), min_score=0.1)


# --- curves

N = [10, 100, 1000]
F = [0.1, 0.5, 1.0]


def named(figure: go.Figure) -> dict[str, go.Scatter]:
    return {trace.name: trace for trace in figure.data if trace.name}


def test_curve() -> None:
    figure = curve(N, torch.tensor(F), title="<b>")
    assert set(named(figure)) == {"circuit"}
    trace = named(figure)["circuit"]
    assert list(trace.x) == N
    assert list(trace.y) == pytest.approx(F)
    assert trace.hovertext[1] == "circuit, 100 edges<br>0.5"
    assert figure.layout.xaxis.type == "log"
    assert [(line.y0, line.y1) for line in figure.layout.shapes] == [(0, 0), (1, 1)]
    assert [a.text for a in figure.layout.annotations] == ["corrupted run", "whole model", ""]  # no caption
    assert "<b>" not in figure.layout.title.text
    assert not figure.layout.showlegend
    assert curve(N, F).layout.title.text == "Faithfulness by circuit size"


def test_curve_with_bands_and_random_circuits() -> None:
    low, high = [0.0, 0.4, 0.9], [0.2, 0.6, 1.1]
    figure = curve(
        N, F, low=low, high=high, random=[0.0, 0.1, 1.0], random_low=[-0.1, 0.0, 1.0], random_high=[0.1, 0.2, 1.0]
    )
    assert list(named(figure)) == ["random circuits", "circuit"]
    filled = [i for i, trace in enumerate(figure.data) if trace.fill == "tonexty"]
    assert [list(figure.data[i].y) for i in filled] == [[0.1, 0.2, 1.0], high]
    assert [list(figure.data[i - 1].y) for i in filled] == [[-0.1, 0.0, 1.0], low]
    assert named(figure)["circuit"].hovertext[2] == "circuit, 1,000 edges<br>1 (0.9 to 1.1)"
    assert figure.layout.showlegend


def test_curve_in_the_metrics_unit_has_no_lines_at_0_and_1() -> None:
    figure = curve(N, [1.0, 2.0, 4.0], unit="logits")
    assert not figure.layout.shapes
    assert figure.layout.yaxis.title.text == "faithfulness (logits)"


def test_curve_leaves_out_what_is_missing() -> None:
    figure = curve(N, [0.1, NAN, 1.0], low=[0.0, NAN, 0.9], high=[0.2, NAN, 1.1])
    assert math.isnan(named(figure)["circuit"].y[1])
    assert list(figure.data[1].x) == [10, 1000]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_edges": []}, "n_edges: expected ascending"),
        ({"n_edges": [0, 1, 2]}, "of at least 1"),
        ({"n_edges": [1, 1, 2]}, "n_edges: expected ascending"),
        ({"n_edges": ["a", 1, 2]}, "n_edges.*expected a"),
        ({"faithfulness": [1.0]}, "faithfulness: expected 3 numbers, one for each of n_edges; got 1"),
        ({"faithfulness": [1.0, math.inf, 0.0]}, "faithfulness: expected finite"),
        ({"low": F}, "low, high: expected both or neither"),
        ({"low": [1.0, 1.0, 1.0], "high": F}, "expected low <= high"),
        ({"random": F, "random_high": F}, "random_low, random_high: expected both"),
        ({"random_low": F, "random_high": F}, "got the interval alone"),
    ],
)
def test_curve_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curve(**({"n_edges": N, "faithfulness": F} | arguments))


# The slider


def make_circuit() -> Circuit:
    return Circuit.from_scores(scores(SMALL), n_edges=40)


def slider_steps(figure: go.Figure) -> list[go.layout.slider.Step]:
    return list(figure.layout.sliders[0].steps)


def test_slider_hides_weak_edges_and_fades_components_that_lose_all() -> None:
    whole = make_circuit()
    figure = draw(whole)
    steps = slider_steps(figure)
    assert steps[0].label == "all edges shown"
    assert all(steps[0].args[0]["visible"])
    drawn = [trace for trace in figure.data if trace.x[0] is not None]
    sizes = {edge.name: abs(whole.scores[whole.graph.index(edge)].item()) for edge in whole}
    shown_before = len(drawn) + 1
    for step in steps[1:]:
        visible = step.args[0]["visible"]
        assert len(visible) == len(figure.data)
        assert all(visible[len(drawn) :])  # the legend stays
        kept = {trace.name for trace, on in zip(drawn, visible, strict=False) if on}
        threshold = min(sizes[name] for name in kept)
        assert kept == {trace.name for trace in drawn if sizes[trace.name] >= threshold}
        assert 0 < len(kept) < shown_before
        shown_before = len(kept)
        assert step.label.endswith(f": {len(kept)} edges")
        ends = {name for trace in drawn if trace.name in kept for name in trace.name.split("->")[:1]}
        for i, note in enumerate(figure.layout.annotations[:-1]):
            opacity = step.args[1][f"annotations[{i}].opacity"]
            assert opacity in (0.25, 1.0)
            assert note.hovertext.split("<br>")[0] not in ends or opacity == 1.0
    assert any(0.25 in step.args[1].values() for step in steps)


def test_no_slider_without_scores_to_choose_by() -> None:
    whole = make_circuit()
    assert not draw(dataclasses.replace(whole, scores=None)).layout.sliders
    flat = torch.ones_like(whole.scores)
    assert not draw(dataclasses.replace(whole, scores=flat)).layout.sliders


def test_table_has_every_edge_shown_or_not() -> None:
    whole = make_circuit()
    table = draw(whole, max_edges=5).table()
    assert [f"{a}->{b}" for a, b in zip(table["writer"], table["reader"], strict=True)] == [e.name for e in whole]
    assert table["shown"].sum() == 5
    for edge, score in zip(whole, table["score"], strict=True):
        assert score == whole.scores[whole.graph.index(edge)].item()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes(theme: str) -> None:
    figure = draw(make_circuit(), theme=theme)
    assert (figure.layout.paper_bgcolor == "#ffffff") == (theme == "light")
    line = curve([1, 10], [0.1, 1.0], theme=theme, caption=["gpt2", "ioi"])
    assert line.facts.caption == ("gpt2", "ioi")
    assert list(line.table()["faithfulness"]) == [0.1, 1.0]


def test_a_threshold_is_what_it_says() -> None:
    """Labels are short, and an edge is shown exactly if its score is at least the label's number."""
    whole = make_circuit()
    figure = draw(whole)
    sizes = [abs(whole.scores[whole.graph.index(edge)].item()) for edge in whole]
    for step in slider_steps(figure)[1:]:
        threshold, shown = re.fullmatch(r"\|score\| ≥ (\S+) logits: (\d+) edges", step.label).groups()
        assert sum(size >= float(threshold) for size in sizes) == int(shown)


def test_curve_shows_what_is_left_without_dead_ends() -> None:
    figure = curve([10, 40], [0.1, 0.5], kept=[2, 31])
    assert named(figure)["circuit"].hovertext[0] == "circuit, 10 edges chosen, 2 without dead ends<br>0.1"
    assert list(figure.table()["kept"]) == [2, 31]
    with pytest.raises(ValueError, match="faithfulness: expected at least one number"):
        curve([1, 2], [NAN, NAN])
    with pytest.raises(ValueError, match="circuit: expected a Circuit, got int"):
        draw(3)
