"""Evaluation of circuits: numbers by hand, known circuits, held-out prompts, curves."""

from __future__ import annotations

import math

import pytest
import torch

import mechkit as mk
from helpers.tiny import make_model, make_pairs, whole_vocabulary
from mechkit.circuits._evaluation import Constants, Evaluator
from mechkit.circuits.evaluation import split

SIX = ((7, 2), (7, 4), (7, 2), (6, 3), (7, 3), (6, 2))


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(SIX)


@pytest.fixture(scope="module")
def exact(llama, pairs):
    return mk.edge_patching(llama, pairs, whole_vocabulary(pairs), direction="noise", progress=False)


def faithfulness(evaluator: Evaluator, members: torch.Tensor) -> float:
    value = evaluator.evaluate(members[None].double())[0].mean()
    clean, nothing = evaluator.values["clean"].mean(), evaluator.values["ablated"].mean()
    return float((value - nothing) / (clean - nothing))


@pytest.mark.parametrize("ablation", ["resample", "zero", "mean", "position_mean"])
def test_the_numbers_are_what_their_definitions_say(llama, pairs, exact, ablation):
    metric = whole_vocabulary(pairs)
    circuit = mk.Circuit.from_scores(exact, n_edges=100)
    report = mk.evaluate_circuit(
        circuit, llama, pairs, metric, ablation=ablation, random=2, sets=3, minimality="node", progress=False
    )
    evaluator = Evaluator(llama, pairs, metric, ablation)
    whole = faithfulness(evaluator, circuit.members)
    assert report.faithfulness.value == pytest.approx(whole, abs=1e-9)
    assert report.gap == pytest.approx(
        float((evaluator.values["clean"] - evaluator.evaluate(circuit.members[None])[0]).mean()), abs=1e-9
    )
    graph = circuit.graph
    for part in report.completeness:
        out = [graph.writer_index[name] for name in part.without]
        members, model = circuit.members.clone(), graph.exists.clone()
        members[out], model[out] = False, False
        assert part.circuit == pytest.approx(faithfulness(evaluator, members), abs=1e-9)
        assert part.model == pytest.approx(faithfulness(evaluator, model), abs=1e-9)
    assert set(report.minimality) == {writer.name for writer in circuit.nodes if writer.layer >= 0}
    name, change = next(iter(report.minimality.items()))
    members = circuit.members.clone()
    members[graph.writer_index[name]] = False
    assert change == pytest.approx(faithfulness(evaluator, members) - whole, abs=1e-9)
    assert [abs(x) for x in report.minimality.values()] == sorted(map(abs, report.minimality.values()), reverse=True)
    for i, f in enumerate(report.random):
        assert f == pytest.approx(faithfulness(evaluator, mk.Circuit.random(graph, len(circuit), i).members), abs=1e-9)


def test_full_and_empty_circuits(llama, pairs):
    metric = whole_vocabulary(pairs)
    for ablation in ("resample", "zero", "mean", "position_mean"):
        full = mk.evaluate_circuit(
            mk.Circuit.full(llama), llama, pairs, metric, ablation=ablation, random=0, sets=0, minimality=None
        )
        assert full.faithfulness.value == pytest.approx(1, abs=1e-9)
        empty = mk.evaluate_circuit(
            mk.Circuit.empty(llama), llama, pairs, metric, ablation=ablation, random=0, sets=0, minimality=None
        )
        assert empty.faithfulness.value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("make", [mk.zoo.serial_ioi, mk.zoo.greater_than, mk.zoo.induction, mk.zoo.saturated_attention])
def test_a_known_circuit_is_faithful_complete_and_minimal(make):
    known = make()
    circuit = mk.Circuit.from_edges(known.model, known.circuit)
    report = mk.evaluate_circuit(
        circuit, known.model, known.pairs, known.metric, random=3, sets=5, minimality="edge", progress=False
    )
    assert report.faithfulness.value == pytest.approx(1, abs=1e-8)
    assert report.incompleteness == pytest.approx(0, abs=1e-8)
    assert min(map(abs, report.minimality.values())) > 0.02
    assert "held-out" not in repr(report)  # nobody says what it was found on
    # Control: half a circuit is neither.
    half = circuit.without(next(iter(circuit)))
    worse = mk.evaluate_circuit(half, known.model, known.pairs, known.metric, random=0, sets=0, minimality=None)
    assert worse.faithfulness.value < 0.98


@pytest.mark.parametrize("make", [mk.zoo.serial_ioi, mk.zoo.greater_than, mk.zoo.induction, mk.zoo.cancellation])
def test_discovery_finds_known_circuits(make):
    known = make()
    true = mk.Circuit.from_edges(known.model, known.circuit)
    args = known.model, known.pairs, known.metric
    exact = mk.edge_patching(*args, progress=False)
    estimated = mk.edge_attribution(*args, steps=20)
    pruned = mk.acdc(*args, threshold=1e-3, progress=False)
    assert mk.circuits.roc(exact, true).auroc == 1
    assert mk.circuits.roc(estimated, true).auroc == pytest.approx(1, abs=1e-12)
    assert mk.circuits.roc(pruned.scores, true).auroc == 1
    assert {edge.name for edge in pruned} == known.circuit
    assert mk.circuits.roc(exact, true, over="node").auroc == 1


def test_seen_and_unseen_prompts_are_distinguished(llama, pairs):
    metric = whole_vocabulary(pairs)
    train = [0, 2, 4]
    scores = mk.edge_attribution(llama, pairs[train], metric[train], steps=1)
    circuit = mk.Circuit.from_scores(scores, n_edges=120)
    args = {"random": 0, "sets": 0, "minimality": None, "progress": False}
    report = mk.evaluate_circuit(circuit, llama, pairs, metric, **args)
    assert (report.found_on.n_prompts, report.held_out.n_prompts) == (3, 3)
    alone = mk.evaluate_circuit(circuit, llama, pairs[[1, 3, 5]], metric[[1, 3, 5]], **args)
    assert alone.found_on is None
    assert alone.held_out.value == pytest.approx(report.held_out.value, abs=1e-9)
    again = mk.evaluate_circuit(circuit, llama, pairs[train], metric[train], **args)
    assert again.held_out is None
    assert again.found_on.value == pytest.approx(report.found_on.value, abs=1e-9)
    by_hand = mk.evaluate_circuit(mk.Circuit.full(llama), llama, pairs, metric, **args)
    assert by_hand.found_on is by_hand.held_out is None


def test_curves(llama, pairs, exact):
    metric = whole_vocabulary(pairs)
    fractions = (0.05, 0.2, 0.5, 1.0)
    curve = mk.faithfulness_curve(exact, llama, pairs, metric, fractions=fractions, random=2, progress=False)
    assert curve.n_edges == tuple(max(1, round(f * 343)) for f in fractions)
    evaluator = Evaluator(llama, pairs, metric)
    for n, f in zip(curve.n_edges, curve.faithfulness, strict=True):
        assert f == pytest.approx(faithfulness(evaluator, mk.Circuit.from_scores(exact, n_edges=n).members), abs=1e-9)
    assert curve.faithfulness[-1] == pytest.approx(1, abs=1e-9)
    assert curve.random_faithfulness[-1] == pytest.approx(1, abs=1e-9)
    assert curve.held_out is False  # these are the prompts that were scored
    assert curve.cpr == pytest.approx(mk.circuits.cpr(fractions, curve.faithfulness))
    figure = mk.plot.curve(curve)
    assert len(figure.data) >= 2
    assert figure.layout.xaxis.title.text == "edges chosen"


def test_a_curve_of_a_method_holds_prompts_out(llama, pairs):
    metric = whole_vocabulary(pairs)
    curve = mk.faithfulness_curve(
        mk.edge_attribution, llama, pairs, metric, fractions=(0.1, 1.0), random=0, held_out=0.5, progress=False
    )
    assert curve.held_out is True
    assert curve.found_on.held_out is False
    assert len(curve.runs.coords["prompt"]) == len(curve.found_on.runs.coords["prompt"]) == 3
    train, test = split(6, 0.5, 0)
    assert not set(train) & set(test)
    assert curve.scores.provenance["tokens_hash"] == pairs[train].clean.hash()


def test_cost_of_a_ten_point_curve(llama, pairs, exact):
    """One clean and one corrupted run of each prompt, and at most ten patched ones, plus the self-check of two rows."""
    curve = mk.faithfulness_curve(
        exact,
        llama,
        pairs,
        whole_vocabulary(pairs),
        random=0,
        progress=False,
        fractions=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0),
    )
    tokens = int(pairs.clean.lengths.sum()) * llama.n_layers
    assert curve.runs.cost.block_tokens <= (2 + 10) * tokens + 4 * 2 * 7 * llama.n_layers


def test_find_circuit(llama, pairs):
    metric = whole_vocabulary(pairs)
    found = mk.find_circuit(llama, pairs, metric, n_edges=60, threshold=0.05, random=1, progress=False)
    assert 0 < found.circuit.n_edges <= 60
    assert found.report.held_out.n_prompts == found.report.found_on.n_prompts == 3
    train, _ = split(6, 0.5, 0)
    check = mk.edge_patching(
        llama, pairs[train], metric[train], found.verified.top(5), direction="noise", progress=False
    )
    for edge in check.edges:
        assert check.score(edge) == pytest.approx(found.verified.score(edge), abs=1e-9)
    assert "r = " in repr(found)


def test_metrics_of_some_prompts(pairs):
    metric, some = whole_vocabulary(pairs), [4, 1]
    logits = torch.randn(2, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = metric.read(logits, torch.tensor(some), None)
    part = metric[some].read(logits, torch.tensor([0, 1]), None)
    assert torch.equal(whole, part)
    assert metric[some].positions.tolist() == [metric.positions[4], metric.positions[1]]
    with pytest.raises(ValueError, match=r"index: expected prompts in 0\.\.5"):
        metric[[6]]


def test_wrong_input(llama, pairs, exact):
    metric, full = whole_vocabulary(pairs), mk.Circuit.full(llama)
    other = make_model("gpt2")
    refused = [
        (lambda: mk.evaluate_circuit(full, other, pairs, metric), "another model|model"),
        (lambda: mk.evaluate_circuit(full, llama, pairs, metric, ablation="noise"), "ablation: expected one of"),
        (lambda: mk.evaluate_circuit(full, llama, pairs, metric, minimality="head"), "minimality: expected"),
        (lambda: mk.evaluate_circuit(full, llama, pairs, metric, random=-1), "random, sets: expected"),
        (lambda: mk.evaluate_circuit(full, llama, pairs.clean, metric), "pairs: expected PromptPairs"),
        (lambda: mk.faithfulness_curve(exact, llama, pairs, metric, fractions=(0.5, 0.1)), "fractions: expected"),
        (lambda: mk.faithfulness_curve(mk.edge_attribution, llama, pairs, metric, held_out=0), "held_out: expected"),
        (
            lambda: mk.faithfulness_curve(mk.edge_attribution, llama, pairs, lambda x: x[:, -1, 5]),
            "prompts of one length",
        ),
        (lambda: mk.find_circuit(llama, pairs, metric, n_edges=10, candidates=5), "candidates: expected at least"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
    same = mk.PromptPairs.from_tokens(pairs.clean.tokens, pairs.clean.tokens, [(5, 7)] * len(pairs))
    with pytest.raises(ValueError, match="metric: model and empty circuit have the same mean"):
        mk.evaluate_circuit(full, llama, same, whole_vocabulary(same), random=0, sets=0, minimality=None)
    llama.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            mk.evaluate_circuit(full, llama, pairs, metric)
    finally:
        llama.eval()
    assert not llama.has_hooks


def test_constants_of_zero_are_zero_ablation(llama, pairs):
    metric, graph = whole_vocabulary(pairs), mk.Graph.of(llama)
    members = mk.Circuit.random(graph, 150, 3).members[None]
    zeros = Constants(torch.zeros(len(graph.writers), llama.d_model, dtype=torch.float64), graph)
    by_name, given = (Evaluator(llama, pairs, metric, how).evaluate(members) for how in ("zero", zeros))
    assert torch.allclose(by_name, given, atol=1e-12)
    with pytest.raises(ValueError, match="ablation: expected constants for"):
        Evaluator(make_model("gpt2"), pairs, metric, zeros)


def test_callable_metrics_see_whole_prompts(llama):
    pairs = make_pairs(((7, 2), (7, 4), (7, 3)))
    weights = torch.randn(61, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    circuit = mk.Circuit.random(llama, 200, 1)
    args = {"random": 0, "sets": 0, "minimality": None, "progress": False}
    known = mk.evaluate_circuit(circuit, llama, pairs, whole_vocabulary(pairs), **args)
    called = mk.evaluate_circuit(circuit, llama, pairs, lambda logits: logits[:, -1] @ weights, **args)
    assert torch.allclose(known.runs.values, called.runs.values, atol=1e-9)
    assert math.isclose(known.faithfulness.value, called.faithfulness.value, abs_tol=1e-9)


def test_constants_are_numbers_of_the_models_width(llama, pairs):
    graph, width = mk.Graph.of(llama), llama.d_model
    bad = torch.zeros(len(graph.writers), width, dtype=torch.float64)
    bad[2, 3] = torch.nan
    with pytest.raises(
        ValueError, match=f"values: expected finite numbers, got NaN or infinite ones for '{graph.writers[2].name}'"
    ):
        Constants(bad, graph)
    narrow = Constants(torch.zeros(len(graph.writers), 7, dtype=torch.float64), graph)
    with pytest.raises(ValueError, match=rf"ablation: expected constants of {width} numbers each \(d_model\)"):
        mk.evaluate_circuit(mk.Circuit.full(llama), llama, pairs, whole_vocabulary(pairs), ablation=narrow)
