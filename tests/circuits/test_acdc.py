"""ACDC against the procedure done one edge at a time: on small models with the naive reference's circuit runs and none of
mechkit's engine; on the families' four-layer models with the evaluator, which `test_circuit_runs.py` compares with the reference.

Both naive versions begin with all edges (or those given), go through the readers from the last to the first and through each
one's writers from the last to the first, and remove an edge if the distance grows by less than the threshold. Components that
nobody reads lose their inputs untested. Which circuits the procedure measures depends on what it measured before. So that they
need not run one after the other, those that it measures if ACDC's answer is right are run together beforehand; a circuit that is
not among them, because the answer is wrong, runs by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import mechkit as mk
from helpers import reference_circuits as reference
from helpers.families import FAMILIES
from helpers.tiny import make_pairs, model_of, read, whole_vocabulary
from mechkit.circuits import Circuit, Graph
from mechkit.circuits._evaluation import Evaluator
from mechkit.circuits._runs import CircuitRuns

Edges = Collection[str]
Distance = Callable[[Edges], float]
Distances = Callable[[Sequence[Edges]], list[float]]
SMALL = {
    "gpt2": {"n_layer": 2, "n_head": 2},
    "llama": {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gptj": {"n_layer": 2, "n_head": 2, "rotary_dim": 4},
}


@functools.cache
def small(family: str) -> mk.HookedModel:
    """Two layers of two heads, with a shared key and value in Llama's case."""
    kind, arguments = FAMILIES[family]
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **arguments | SMALL[family])
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in plain.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.35)
    return mk.HookedModel.from_hf(plain.double().eval(), name=f"small {family}")


def naive_acdc(
    model: mk.HookedModel, distance: Distance, threshold: float, start: Collection[str] | None = None
) -> tuple[set[str], int]:
    """By names alone. Returns the edges that are left, and how many were tried."""
    edges = set(reference.edge_names(model)) if start is None else set(start)
    now, tried = distance(edges), 0
    for reader in reversed(reference.reader_names(model)):
        mine = [f"{writer}->{reader}" for writer in reversed(reference.writers_of(model, reader))]
        owners = owners_of(model, reader)
        if owners and not any(edge.partition("->")[0] in owners for edge in edges):
            edges -= set(mine)
            continue
        for edge in mine:
            if edge not in edges:
                continue
            without, tried = distance(edges - {edge}), tried + 1
            if without - now < threshold:
                edges, now = edges - {edge}, without
    return edges, tried


def prepared(
    model: mk.HookedModel, distances: Distances, answer: set[str], start: Collection[str] | None = None
) -> Distance:
    """The distance of one circuit; it is there already for all that the procedure measures if it ends in `answer`."""
    asked: list[frozenset[str]] = []

    def missing(edges: Edges) -> float:
        asked.append(frozenset(edges))
        return len(answer.difference(edges))

    naive_acdc(model, missing, 0.5, start)  # removes what is not in the answer, and nothing else
    known = dict(zip(asked, distances(asked), strict=True))

    def distance(edges: Edges) -> float:
        edges = frozenset(edges)
        if edges not in known:
            known[edges] = distances([edges])[0]
        return known[edges]

    return distance


def owners_of(model: mk.HookedModel, reader: str) -> set[str]:
    """The components that an input belongs to."""
    if reader == "logits":
        return set()
    if reader.startswith("m"):
        return {reader}
    layer, _, rest = reader.partition(".")
    number = int("".join(filter(str.isdigit, rest)))
    if not rest.startswith("kv"):
        return {f"{layer}.h{number}"}
    size = model.n_heads // model.n_kv_heads
    return {f"{layer}.h{head}" for head in range(number * size, (number + 1) * size)}


def distances_by_reference(model: mk.HookedModel, pairs: mk.PromptPairs, metric: mk.Metric | None) -> Distances:
    """The mean over prompts of the KL divergence from the clean run, or of the metric's absolute difference from it."""
    clean = [reference.whole_run(model, tokens[None]).logits for tokens in pairs.clean.tokens]

    def one(logits: Tensor, j: int) -> float:
        if metric is not None:
            return abs(read(metric, logits, j) - read(metric, clean[j], j))
        p, q = clean[j][0, -1].log_softmax(-1), logits[-1].log_softmax(-1)
        return float((p.exp() * (p - q)).sum())

    def distances(circuits: Sequence[Edges]) -> list[float]:
        found = torch.zeros(len(circuits), dtype=torch.float64)
        for j in range(len(pairs)):
            tokens = (pairs.clean.tokens[j][None], pairs.corrupted.tokens[j][None])
            logits = reference.run_circuits(model, *tokens, circuits)
            found += torch.tensor([one(of_circuit, j) for of_circuit in logits], dtype=torch.float64)
        return (found / len(pairs)).tolist()

    return distances


def distances_by_evaluator(ev: Evaluator, kl: bool) -> Distances:
    """The evaluator itself is compared with the reference in test_circuit_runs.py."""
    places = {edge.name: ev.graph.index(edge) for edge in ev.graph.edges}

    def distances(circuits: Sequence[Edges]) -> list[float]:
        members = torch.zeros(len(circuits), *ev.graph.exists.shape, dtype=torch.bool)
        for circuit, edges in zip(members, circuits, strict=True):
            circuit[tuple(torch.tensor([places[name] for name in edges]).reshape(-1, 2).T)] = True
        values = ev.evaluate(members)
        return (values if kl else (values - ev.values["clean"]).abs()).double().mean(1).tolist()

    return distances


def names_of(circuit: Circuit) -> set[str]:
    return {edge.name for edge in circuit}


# --- the naive procedure


@pytest.mark.parametrize(
    ("family", "task_metric", "thresholds"),
    [
        ("gpt2", False, (0.01, 0.1)),
        ("gpt2", True, (0.3,)),
        ("llama", False, (0.1,)),
        ("llama", True, (0.3,)),
        ("gptj", False, (0.1,)),
    ],
)
def test_a_small_model_against_the_reference(family, task_metric, thresholds):
    model, pairs = small(family), make_pairs(((5, 2), (4, 1)))
    metric = mk.logit_diff(pairs) if task_metric else None
    distances = distances_by_reference(model, pairs, metric)
    for threshold in thresholds:
        circuit = mk.acdc(model, pairs, metric, threshold=threshold, prune=False, progress=False)
        distance = prepared(model, distances, names_of(circuit))
        expected, tried = naive_acdc(model, distance, threshold)
        assert names_of(circuit) == expected
        assert circuit.provenance["n_tested"] == tried
        assert circuit.provenance["distance"] == pytest.approx(distance(expected), rel=1e-5)  # float32 inside
        assert 0 < len(expected) < Graph.of(model).n_edges  # control: there was something to decide


@pytest.mark.parametrize(
    ("family", "threshold", "metric", "ablation"),
    [
        ("gpt2", 0.1, None, "resample"),
        ("gpt2", 1.0, whole_vocabulary, "resample"),
        ("llama", 0.05, None, "resample"),
        ("llama", 0.3, mk.logit_diff, "zero"),
        ("gptj", 0.3, None, "position_mean"),
        ("gemma2", 0.2, None, "resample"),
        ("llama_mqa", 0.5, mk.logit_diff, "mean"),
    ],
)
def test_four_layers_against_one_circuit_at_a_time(family, threshold, metric, ablation):
    model, pairs = model_of(family), make_pairs(((6, 2), (5, 1)))
    measured = None if metric is None else metric(pairs)
    circuit = mk.acdc(model, pairs, measured, threshold=threshold, ablation=ablation, prune=False, progress=False)
    ev = Evaluator(model, pairs, measured or mk.kl_divergence(pairs), ablation)
    distance = prepared(model, distances_by_evaluator(ev, measured is None), names_of(circuit))
    expected, tried = naive_acdc(model, distance, threshold)
    assert names_of(circuit) == expected
    assert circuit.provenance["n_tested"] == tried
    assert circuit.provenance["distance"] == pytest.approx(distance(expected), rel=1e-4, abs=1e-5)
    assert 0 < len(expected) < Graph.of(model).n_edges
    assert circuit.scores is not None
    assert bool((circuit.scores[circuit.members] >= threshold).all())  # what is left costs as much
    pruned = mk.acdc(model, pairs, measured, threshold=threshold, ablation=ablation, progress=False)
    assert pruned == (circuit.pruned() if ablation == "resample" else circuit)  # else dead ends may carry something


def test_starting_from_a_circuit():
    """Another method's circuit is thinned out; edges below may be missing already."""
    model, pairs = model_of("llama"), make_pairs(((6, 2), (5, 1)))
    members = torch.rand(Graph.of(model).exists.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    start = Circuit(
        Graph.of(model), members & Graph.of(model).exists, model=model.name, weights_hash=model.weights_hash
    )
    circuit = mk.acdc(model, pairs, threshold=0.02, start=start, prune=False, progress=False)
    distances = distances_by_evaluator(Evaluator(model, pairs, mk.kl_divergence(pairs)), True)
    distance = prepared(model, distances, names_of(circuit), names_of(start))
    expected, tried = naive_acdc(model, distance, 0.02, names_of(start))
    assert names_of(circuit) == expected
    assert expected < names_of(start)
    assert circuit.provenance["start"] == len(start)
    assert circuit.provenance["n_tested"] == tried
    model = small("llama")
    whole = mk.acdc(model, pairs, threshold=0.02, start=Circuit.full(model), prune=False, progress=False)
    assert whole == mk.acdc(model, pairs, threshold=0.02, prune=False, progress=False)
    assert 0 < len(whole) < whole.graph.n_edges  # control


# --- thresholds


LATE, EARLY = ((12, 8), (12, 9)), ((7, 2), (7, 4), (5, 1))  # where the prompts of a pair begin to differ


@pytest.mark.parametrize("shapes", [LATE, EARLY], ids=["late", "early"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_block_tokens(family, shapes):
    """Naive: one whole forward pass (all blocks, all positions) for each edge that is tried.

    Measured: 0.10 to 0.20 where the prompts begin alike, as tasks' prompts do, and up to 0.47 where they differ early.
    """
    model, pairs = model_of(family), make_pairs(shapes)
    sizes, n_edges, a_pass = [], Graph.of(model).n_edges, int(pairs.clean.lengths.sum()) * 4
    for threshold in (0.03, 0.1, 1.0, 100.0):
        circuit = mk.acdc(model, pairs, threshold=threshold, prune=False, progress=False)
        done, tried = circuit.provenance["block_tokens"], circuit.provenance["n_tested"]
        print(f"{threshold}: {len(circuit)} of {n_edges} left, {tried} tried, {done / tried / a_pass:.2f} of naive")
        assert circuit.provenance["naive_block_tokens"] == tried * a_pass
        assert done <= 0.5 * tried * a_pass
        sizes.append(len(circuit))
    assert sizes[0] == max(sizes) > 0
    assert sizes[-1] == 0  # nothing costs as much


def test_no_threshold_removes_nothing_that_costs_nothing():
    """With threshold 0 an edge goes only if the distance falls: identical prompts lose none."""
    model, pairs = model_of("llama"), make_pairs(((5, 2),))
    same = mk.PromptPairs(pairs.clean, pairs.clean, pairs.right, pairs.wrong)
    circuit = mk.acdc(model, same, mk.logit_diff(same), threshold=0, prune=False, progress=False)
    assert circuit.provenance["distance"] == pytest.approx(0, abs=1e-9)
    lost = mk.acdc(model, same, mk.logit_diff(same), threshold=1e-6, prune=False, progress=False)
    assert len(lost) == 0


def test_small_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    model, pairs = small("gpt2"), make_pairs()
    sizes: list[int] = []
    final = CircuitRuns.final

    def counted(self: CircuitRuns, gates: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(len(gates))
        return final(self, gates, *args, **kwargs)

    monkeypatch.setattr(CircuitRuns, "final", counted)
    whole = mk.acdc(model, pairs, threshold=0.1, prune=False, progress=False)
    assert max(sizes) >= 8
    sizes.clear()
    little = mk.acdc(model, pairs, threshold=0.1, prune=False, budget=2**15, progress=False)
    assert max(sizes) <= 2  # control: it is little
    assert 0 < len(whole) < whole.graph.n_edges
    assert whole == little
    assert whole.provenance["distance"] == pytest.approx(little.provenance["distance"], abs=1e-9)


def test_what_the_circuit_says_of_itself():
    model, pairs = model_of("llama"), make_pairs()
    circuit = mk.acdc(model, pairs, threshold=0.1, progress=False)
    assert circuit.model == model.name
    assert circuit.weights_hash == model.weights_hash
    assert circuit.provenance["threshold"] == 0.1
    assert circuit.provenance["ablation"] == "resample"
    assert circuit.provenance["technique"] == "acdc"
    ev = Evaluator(model, pairs, mk.kl_divergence(pairs))
    assert circuit.provenance["distance"] == pytest.approx(float(ev.evaluate(circuit.members[None]).mean()), abs=1e-8)
    circuit.check(model)
    assert not model.has_hooks


# --- refusals


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), "0.1", None, True])
def test_thresholds_that_are_refused(threshold):
    model, pairs = model_of("llama"), make_pairs()
    with pytest.raises(ValueError, match="threshold: expected a number"):
        mk.acdc(model, pairs, threshold=threshold)


def test_refusals():
    model, pairs = model_of("llama"), make_pairs()
    with pytest.raises(ValueError, match="circuit: a circuit of another model"):
        mk.acdc(model, pairs, threshold=0.1, start=Circuit.full(model_of("gpt2")))
    with pytest.raises(ValueError, match="circuit: a circuit of another model: expected weights"):
        mk.acdc(model, pairs, threshold=0.1, start=Circuit.full(model_of("qwen2")))
    with pytest.raises(ValueError, match="ablation: expected one of"):
        mk.acdc(model, pairs, threshold=0.1, ablation="noise")
    with pytest.raises(ValueError, match="pairs: expected PromptPairs"):
        mk.acdc(model, pairs.clean, whole_vocabulary(pairs), threshold=0.1)
    with pytest.raises(ValueError, match="pairs: expected PromptPairs"):
        mk.acdc(model, pairs.clean, threshold=0.1)
    with pytest.raises(ValueError, match="lengths"):
        mk.acdc(model, pairs, lambda logits: logits[:, -1, 5], threshold=0.1)
    with pytest.raises(TypeError, match="threshold"):
        mk.acdc(model, pairs)
    model.bridge.original_model.train()
    try:
        with pytest.raises(ValueError, match="model: expected evaluation mode"):
            mk.acdc(model, pairs, threshold=0.1)
    finally:
        model.bridge.original_model.eval()
    assert not model.has_hooks
