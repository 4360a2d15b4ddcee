"""Edge scores and circuits: selection against a naive one, set operations, files that others read, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechkit as mk
from helpers import families
from mechkit.circuits.circuit import Circuit
from mechkit.circuits.edge_scores import EdgeScores
from mechkit.circuits.graph import Edge, Graph

GRAPHS = {
    "mha": Graph(3, 3, 3),
    "gqa": Graph(3, 4, 2),
    "mqa": Graph(3, 4, 1),
    "gqa_of_three": Graph(2, 6, 2),
    "parallel": Graph(3, 2, 2, parallel=True),
    "parallel_gqa": Graph(2, 4, 2, parallel=True),
    "attention_only": Graph(3, 3, 3, mlps=False),
    "one_head": Graph(1, 1, 1, mlps=False),
}
SMALL = Graph(2, 2, 2)
NAN = float("nan")


def make(graph: Graph, values: torch.Tensor, n: int = 3, **changes: Any) -> EdgeScores:
    baseline = {"clean": torch.linspace(2.0, 4.0, n), "corrupted": torch.linspace(-1.0, 1.0, n)}
    fields: dict[str, Any] = {
        "baseline": baseline,
        "metric": "logit_diff",
        "unit": "logits",
        "provenance": {"model": "tiny", "weights_hash": "abc", "task": "ioi", "technique": "edge_attribution"},
        "prompts": values.ndim == 3,
    }
    return EdgeScores.of(graph, values, **(fields | changes))


def draw(graph: Graph, seed: int = 0, prompts: tuple[int, ...] = ()) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*graph.exists.shape, *prompts, generator=generator, dtype=torch.float64)


def rounded(graph: Graph, seed: int = 0) -> EdgeScores:
    """Scores -3 to 3, so that many are equal."""
    return make(graph, draw(graph, seed).mul(1.5).round().clamp(-3, 3))


# --- naive reference: sets of edges, searched again at every step


def score_of(scores: EdgeScores, edge: Edge) -> float:
    return scores.values[scores.graph.index(edge)].item()


def naive_prune(graph: Graph, edges: set[Edge]) -> set[Edge]:
    """Drop what is dead until nothing is."""
    while True:
        alive = set()
        for edge in edges:
            inputs = graph.readers_of(edge.writer)
            fed = edge.writer.name == "input" or any(other.reader in inputs for other in edges)
            owners = graph.writers_of(edge.reader)
            used = edge.reader.name == "logits" or any(other.writer in owners for other in edges)
            if fed and used:
                alive.add(edge)
        if alive == edges:
            return edges
        edges = alive


def naive_top(scores: EdgeScores, n: int, by: str) -> list[Edge]:
    key = (lambda edge: -abs(score_of(scores, edge))) if by == "abs" else (lambda edge: -score_of(scores, edge))
    return sorted(scores.graph.edges, key=key)[:n]  # Graph.edges are by reader and writer, and sorted() is stable


def naive_greedy(scores: EdgeScores, n: int, by: str) -> list[Edge]:
    graph, taken = scores.graph, []
    open_ = {"logits"}
    while len(taken) < n:
        best, best_key = None, float("-inf")
        for edge in graph.edges:
            score = score_of(scores, edge)
            key = abs(score) if by == "abs" else score
            if edge.reader.name in open_ and edge not in taken and key > best_key:
                best, best_key = edge, key
        if best is None:
            break
        taken.append(best)
        open_ |= {reader.name for reader in graph.readers_of(best.writer)}
    return taken


@pytest.mark.parametrize("by", ["abs", "value"])
@pytest.mark.parametrize("method", ["top", "greedy"])
@pytest.mark.parametrize("name", GRAPHS)
def test_selection_equals_the_naive_one(name: str, method: str, by: str) -> None:
    graph = GRAPHS[name]
    naive = {"top": naive_top, "greedy": naive_greedy}[method]
    dropped = 0
    for seed, share in enumerate((0.0, 0.05, 0.15, 0.3, 1.0)):
        scores, n = rounded(graph, seed), round(share * graph.n_edges)
        chosen = set(naive(scores, n, by))
        whole = Circuit.from_scores(scores, n_edges=n, method=method, by=by, prune=False)
        assert set(whole) == chosen
        pruned = Circuit.from_scores(scores, n_edges=n, method=method, by=by)
        assert set(pruned) == naive_prune(graph, chosen)
        assert pruned == whole.pruned()
        assert (f"; {len(pruned)} kept of {n};" in repr(pruned)) == (len(pruned) < n)
        selection = pruned.provenance["selection"]
        assert (selection["asked"], selection["chosen"], selection["kept"]) == (n, len(chosen), len(pruned))
        dropped += len(whole) - len(pruned)
    assert dropped > 0 or name == "one_head"  # there was something to prune


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("method", ["top", "greedy"])
def test_threshold(name: str, method: str) -> None:
    graph = GRAPHS[name]
    scores = rounded(graph)
    allowed = {edge for edge in graph.edges if abs(score_of(scores, edge)) >= 2}
    circuit = Circuit.from_scores(scores, threshold=2, method=method, prune=False)
    if method == "top":
        assert set(circuit) == allowed
    else:  # all that is reached over allowed edges
        order = naive_greedy(scores, graph.n_edges, "abs")
        strong = [i for i, edge in enumerate(order) if edge not in allowed]
        assert set(circuit) == set(order[: strong[0]] if strong else order)
    negative = Circuit.from_scores(scores, threshold=-1, by="value", prune=False)
    assert set(negative) == {edge for edge in graph.edges if score_of(scores, edge) >= -1}


def test_edges_that_were_not_computed_are_never_chosen() -> None:
    values = draw(SMALL)
    missing = [SMALL.index(edge) for i, edge in enumerate(SMALL.edges) if i % 3 == 0]
    for place in missing:
        values[place] = NAN
    scores = make(SMALL, values)
    n = SMALL.n_edges - len(missing)
    for method in ("top", "greedy"):
        chosen = Circuit.from_scores(scores, n_edges=n, method=method, prune=False)
        assert not any(chosen.members[place] for place in missing)
    assert len(Circuit.from_scores(scores, n_edges=n, prune=False)) == n
    with pytest.raises(ValueError, match=f"n_edges: expected 0 to {n}, as many as have a score; got {n + 1}"):
        Circuit.from_scores(scores, n_edges=n + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of them"),
        ({"n_edges": 3, "threshold": 0.1}, "exactly one of them"),
        ({"n_edges": -1}, "n_edges: expected 0 to"),
        ({"n_edges": 2.0}, "n_edges: expected a whole number"),
        ({"n_edges": True}, "n_edges: expected a whole number"),
        ({"threshold": NAN}, "threshold: expected a number"),
        ({"threshold": -1.0}, "at least 0"),
        ({"n_edges": 1, "method": "best"}, "method: expected 'top' or 'greedy'"),
        ({"n_edges": 1, "by": "max"}, "by: expected 'abs' or 'value'"),
    ],
)
def test_selection_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Circuit.from_scores(rounded(SMALL), **arguments)


def test_repr_counts_the_edges_that_pruning_dropped_until_edges_change() -> None:
    scores = rounded(SMALL)
    sizes = {n: Circuit.from_scores(scores, n_edges=n) for n in range(1, SMALL.n_edges)}
    n, circuit = next((n, circuit) for n, circuit in sizes.items() if 0 < len(circuit) < n)
    assert f"; {len(circuit)} kept of {n};" in repr(circuit)
    assert "kept of" not in repr(Circuit.from_scores(scores, n_edges=n, prune=False))
    edge = circuit.edges[0]
    for other in (circuit.without(edge), circuit.without(edge).with_edge(edge), circuit | circuit):
        assert "kept of" not in repr(other)


def test_circuit_knows_where_it_is_from() -> None:
    circuit = Circuit.from_scores(rounded(SMALL), n_edges=9)
    assert (circuit.model, circuit.weights_hash, circuit.task) == ("tiny", "abc", "ioi")
    assert circuit.provenance["technique"] == "edge_attribution"
    assert circuit.provenance["unit"] == "logits"
    assert "tiny; ioi" in repr(circuit)
    assert circuit.scores is not None
    assert circuit.scores[SMALL.exists].equal(rounded(SMALL).values[SMALL.exists])


# --- pruning, by paths


@pytest.mark.parametrize("name", [name for name in GRAPHS if "gqa" not in name and name != "mqa"])
def test_pruned_edges_are_those_on_a_path(name: str) -> None:
    import networkx as nx

    graph = GRAPHS[name]
    for seed in range(3):
        circuit = Circuit.random(graph, round(0.2 * graph.n_edges), seed, connected=False)
        drawn = circuit.to_networkx()
        on_path = {
            edge.name
            for edge in circuit
            if nx.has_path(drawn, "input", edge.writer.name)
            and nx.has_path(drawn, (graph.writers_of(edge.reader) or [edge.reader])[0].name, "logits")
        }
        assert {edge.name for edge in circuit.pruned()} == on_path
        assert circuit.pruned().pruned() == circuit.pruned()


def test_a_shared_key_feeds_every_head_of_its_group() -> None:
    graph = GRAPHS["gqa"]
    circuit = Circuit.from_edges(
        graph, ["input->a0.kv1<k>", "a0.h2->logits", "a0.h3->m1", "a0.h1->logits", "m1->logits"]
    )
    assert {edge.name for edge in circuit.pruned()} == {
        "input->a0.kv1<k>",
        "a0.h2->logits",
        "a0.h3->m1",
        "m1->logits",
    }
    one = Circuit.from_edges(graph, ["input->a0.kv1<v>", "a0.h3->logits"])
    assert one.pruned() == one
    assert [w.name for w in one.targets(graph.reader("a0.kv1<v>"))] == ["a0.h3"]
    assert list(one.to_networkx().edges(keys=True)) == [("input", "a0.h3", "v"), ("a0.h3", "logits", "logits")]
    dead = Circuit.from_edges(graph, ["input->a0.kv1<v>"])
    assert [w.name for w in dead.targets(graph.reader("a0.kv1<v>"))] == ["a0.h2", "a0.h3"]
    assert len(dead.pruned()) == 0


# --- as a set


def test_set_operations() -> None:
    rng = random.Random(0)
    edges = list(SMALL.edges)
    for _ in range(20):
        a, b = (set(rng.sample(edges, rng.randrange(len(edges)))) for _ in range(2))
        first, second = Circuit.from_edges(SMALL, a), Circuit.from_edges(SMALL, sorted(e.name for e in b))
        assert set(first | second) == a | b
        assert set(first & second) == a & b
        assert set(first - second) == a - b
        assert set(first ^ second) == a ^ b
        assert (first <= second) == (a <= b)
        assert (first >= second) == (a >= b)
        assert len(first) == first.n_edges == len(a)
        assert (first & second) <= first
        assert first.edges == tuple(edge for edge in edges if edge in a)
        assert (first == second) == (a == b)
        assert hash(first) == hash(Circuit.from_edges(SMALL, a))
        assert first.nodes == tuple(w for w in SMALL.writers if any(edge.writer == w for edge in a))
    assert Circuit.full(SMALL) == Circuit.full(SMALL).pruned()
    assert Circuit.full(SMALL).density == 1
    assert Circuit.empty(SMALL).density == 0
    assert Circuit.full(SMALL) != Circuit.full(GRAPHS["mha"])
    assert Circuit.full(SMALL) != "full"


def test_membership_and_changes() -> None:
    circuit = Circuit.from_edges(SMALL, ["0.1 -> logits", "input->a0.h1<v>"], task="by hand")
    assert "a0.h1->logits" in circuit
    assert SMALL.edge("0.1->logits") in circuit
    assert "m0->logits" not in circuit
    assert [edge.name for edge in circuit.with_edge("m0->logits")] == ["input->a0.h1<v>", "a0.h1->logits", "m0->logits"]
    assert circuit.with_edge("m0->logits", "input->m0").without("m0->logits", "input->m0") == circuit
    assert len(circuit) == 2  # unchanged
    assert circuit.without("m0->logits") == circuit
    with pytest.raises(ValueError, match="m0 reads before m1 writes"):
        _ = "m1->m0" in circuit
    with pytest.raises(ValueError, match="not a writer's name"):
        circuit.with_edge("head 3->m0")
    with pytest.raises(ValueError, match=r"Write edges=\['m0->logits'\]"):
        Circuit.from_edges(SMALL, "m0->logits")
    with pytest.raises(ValueError, match="circuits of the same graph"):
        circuit | Circuit.full(GRAPHS["mha"])
    with pytest.raises(ValueError, match="expected another circuit, got set"):
        circuit & {"m0->logits"}


def test_operations_keep_what_both_share() -> None:
    first = Circuit.from_scores(rounded(SMALL), n_edges=5)
    second = dataclasses.replace(Circuit.from_scores(rounded(SMALL, 1), n_edges=5), task="greater-than")
    both = first | second
    assert (both.model, both.weights_hash, both.task) == ("tiny", "abc", f"{first.task} and greater-than")
    unknown = dataclasses.replace(first, model="", weights_hash="")
    assert (unknown & second).weights_hash == "abc"
    with pytest.raises(ValueError, match="circuits of one model"):
        first | dataclasses.replace(second, weights_hash="def")
    assert both.provenance["operation"] == "|"
    assert both.scores is not None
    assert both.scores[SMALL.exists].equal(first.scores[SMALL.exists])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": torch.zeros(2, 2, dtype=torch.bool)}, r"members: expected a bool tensor \[7, 15\]"),
        ({"members": torch.zeros(7, 15)}, "members: expected a bool tensor"),
        ({"members": torch.ones(7, 15, dtype=torch.bool)}, "where a reader reads before the writer writes"),
        ({"scores": torch.zeros(7, 14)}, r"scores: expected a float tensor \[7, 15\]"),
        ({"scores": torch.full((7, 15), torch.inf)}, "scores: expected finite numbers"),
        ({"provenance": {"a": {1, 2}}}, "provenance: expected JSON values"),
    ],
)
def test_a_circuit_checks_itself(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Circuit(**({"graph": SMALL, "members": torch.zeros(7, 15, dtype=torch.bool)} | changes))


def test_a_circuit_does_not_share_its_tensor() -> None:
    members = torch.zeros_like(SMALL.exists)
    circuit = Circuit(SMALL, members)
    members[0, 0] = True
    assert len(circuit) == 0
    full = Circuit.full(SMALL)
    assert full.members.data_ptr() != SMALL.exists.data_ptr()
    assert copy.deepcopy(full) == full


# --- random circuits


@pytest.mark.parametrize("name", GRAPHS)
def test_random_circuits(name: str) -> None:
    graph = GRAPHS[name]
    before = torch.random.get_rng_state()
    sizes = {0, 1, 2, 3, graph.n_edges // 3, graph.n_edges - 1, graph.n_edges} & set(range(graph.n_edges + 1))
    for n in sorted(sizes):
        circuit = Circuit.random(graph, n, seed=n)
        assert len(circuit) == n
        assert circuit.pruned() == circuit
        assert circuit == Circuit.random(graph, n, seed=n)
        assert len(Circuit.random(graph, n, seed=n, connected=False)) == n
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="n_edges: expected 0 to"):
        Circuit.random(graph, graph.n_edges + 1, seed=0)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 17])
def test_small_random_circuits_of_a_large_graph(n: int) -> None:
    """Nearly every path that is found from the logits of 30 layers is longer than that."""
    graph = Graph(30, 9, 3)
    circuit = Circuit.random(graph, n, seed=0)
    assert len(circuit) == n
    assert circuit.pruned() == circuit


def test_random_circuits_differ_by_seed_and_by_kind() -> None:
    graph = GRAPHS["mha"]
    n = graph.n_edges // 4
    assert len({Circuit.random(graph, n, seed) for seed in range(10)}) == 10
    loose = [Circuit.random(graph, n, seed, connected=False) for seed in range(10)]
    assert any(circuit.pruned() != circuit for circuit in loose)  # the control of test_random_circuits
    shares = (
        torch.stack([Circuit.random(graph, n, seed, connected=False).members for seed in range(400)]).double().mean(0)
    )
    assert (shares[graph.exists] - n / graph.n_edges).abs().max() < 5 * (0.25 * 0.75 / 400) ** 0.5


# --- of a model


@pytest.mark.parametrize("family", families.FAMILIES)
def test_circuits_of_every_family(family: str, tmp_path: Path) -> None:
    dtype = torch.float32 if family == "mixtral" else torch.float64
    model = mk.HookedModel.from_hf(families.build_hf(family, dtype), None)
    full = Circuit.full(model, task="all")
    full.check(model)
    assert (full.model, full.weights_hash) == (model.name, model.weights_hash)
    assert full.pruned() == full
    assert full.graph == Graph.of(model)
    part = Circuit.random(model, full.n_edges // 2, seed=0)
    part.check(model)
    for format in ("mechkit", "mib"):
        part.to_json(tmp_path / "circuit.json", format)
        again = Circuit.from_json(tmp_path / "circuit.json", model)
        assert again == part
        assert again.model == model.name


def test_circuit_of_another_model(tmp_path: Path) -> None:
    model = mk.HookedModel.from_hf(families.build_hf("llama"), None)
    other = mk.HookedModel.from_hf(families.build_hf("llama", seed=1), None)
    mqa = mk.HookedModel.from_hf(families.build_hf("llama_mqa"), None)
    circuit = Circuit.full(model)
    with pytest.raises(ValueError, match="another model: expected weights"):
        circuit.check(other)
    dataclasses.replace(circuit, weights_hash="").check(other)
    with pytest.raises(ValueError, match="another model: expected Graph"):
        circuit.check(mqa)
    circuit.to_json(tmp_path / "circuit.json")
    with pytest.raises(ValueError, match="another model: expected weights"):
        Circuit.from_json(tmp_path / "circuit.json", other)
    with pytest.raises(ValueError, match="another model: expected Graph"):
        Circuit.from_json(tmp_path / "circuit.json", Graph(2, 2, 2))


# --- files


def eap_ig_names(n_layers: int, n_heads: int, parallel: bool = False) -> list[str]:
    """Names of all edges as EAP-IG lists them: component by component, from every one before it."""
    stream, names = ["input"], []
    for layer in range(n_layers):
        heads = [f"a{layer}.h{head}" for head in range(n_heads)]
        names += [f"{before}->{head}<{letter}>" for before in stream for head in heads for letter in "qkv"]
        into_mlp = stream if parallel else stream + heads
        names += [f"{before}->m{layer}" for before in into_mlp]
        stream = [*stream, *heads, f"m{layer}"]
    return names + [f"{before}->logits" for before in stream]


def eap_ig_file(
    path: Path, n_layers: int, n_heads: int, parallel: bool = False, single: bool = True, seed: int = 0
) -> dict[str, Any]:
    """A file of EAP-IG's form with random scores and a random circuit, pruned by nobody."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal(10**5) * 10.0 ** rng.integers(-12, 2, 10**5)
    scores = scores.astype(np.float32).astype(float) if single else scores
    names = eap_ig_names(n_layers, n_heads, parallel)
    edges = {
        name: {"score": float(score), "in_graph": bool(score < -0.01)}
        for name, score in zip(names, scores, strict=False)
    }
    members = [name for name, edge in edges.items() if edge["in_graph"]]
    writing = {name.split("->")[0] for name in members}
    reading = {name.split("->")[1].split("<")[0] for name in members} | {"input"}
    heads = [name for layer in range(n_layers) for name in [*(f"a{layer}.h{h}" for h in range(n_heads)), f"m{layer}"]]
    nodes = {name: {"in_graph": name in writing & reading} for name in ["input", *heads]}
    cfg = {"n_layers": n_layers, "n_heads": n_heads, "parallel_attn_mlp": parallel, "d_model": 768}
    content = {"cfg": cfg, "nodes": {**nodes, "logits": {"in_graph": True}}, "edges": edges}
    path.write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("single", [True, False], ids=["float32", "float64"])
def test_gpt2_in_the_mib_format_survives_the_round_trip(tmp_path: Path, single: bool) -> None:
    content = eap_ig_file(tmp_path / "circuit.json", 12, 12, single=single)
    assert len(content["edges"]) == 32491
    circuit = Circuit.from_json(tmp_path / "circuit.json")
    assert circuit.graph == Graph(12, 12, 12)
    assert {edge.name for edge in circuit} == {name for name, edge in content["edges"].items() if edge["in_graph"]}
    assert circuit.scores is not None
    for edge in list(circuit.graph.edges)[::97]:
        assert circuit.scores[circuit.graph.index(edge)].item() == content["edges"][edge.name]["score"]
    circuit.to_json(tmp_path / "again.json", "mib")
    assert json.loads((tmp_path / "again.json").read_text()) == content
    circuit.to_json(tmp_path / "own.json")
    own = Circuit.from_json(tmp_path / "own.json")
    assert own == circuit
    assert own.scores is not None
    assert own.scores.equal(circuit.scores) or own.scores[own.graph.exists].equal(circuit.scores[own.graph.exists])


def test_parallel_models_in_the_mib_format(tmp_path: Path) -> None:
    content = eap_ig_file(tmp_path / "circuit.json", 2, 3, parallel=True)
    circuit = Circuit.from_json(tmp_path / "circuit.json")
    assert circuit.graph == Graph(2, 3, 3, parallel=True)
    assert json.loads(circuit.to_json(tmp_path / "again.json", "mib").read_text()) == content


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 2), (4, 1), (6, 2), (9, 3), (7, 1), (10, 2)])
def test_shared_keys_in_the_mib_format(tmp_path: Path, n_heads: int, n_kv_heads: int) -> None:
    graph = Graph(2, n_heads, n_kv_heads)
    size = n_heads // n_kv_heads
    content = eap_ig_file(tmp_path / "circuit.json", 2, n_heads)
    circuit = Circuit.from_json(tmp_path / "circuit.json", graph)
    assert circuit.scores is not None
    for writer in ("input", "a0.h1", "m0"):
        for reader, heads in (("a1.kv0<k>", range(size)), ("a1.h1<q>", [1]), ("logits", [None]), ("m1", [None])):
            names = [reader if head is None or "<q>" in reader else f"a1.h{head}<{reader[-2]}>" for head in heads]
            parts = [content["edges"][f"{writer}->{name}"] for name in names]
            at = graph.index(graph.edge(f"{writer}->{reader}"))
            assert circuit.scores[at].item() == pytest.approx(sum(part["score"] for part in parts), rel=1e-14)
            assert circuit.members[at].item() == any(part["in_graph"] for part in parts)
    # and back: nothing of the sums is lost, for any scores
    scored = dataclasses.replace(circuit, scores=draw(graph).exp() * draw(graph, 1).sign())
    written = json.loads(scored.to_json(tmp_path / "again.json", "mib").read_text())
    assert set(written["edges"]) == set(content["edges"])
    shares = [written["edges"][f"m0->a1.h{head}<v>"]["score"] for head in range(size)]
    assert shares == pytest.approx([shares[0]] * size, rel=1e-12)  # equal parts
    for model in (None, graph):  # the file says how many key-value heads there are
        again = Circuit.from_json(tmp_path / "again.json", model)
        assert again == scored
        assert again.scores is not None
        assert again.scores[graph.exists].equal(scored.scores[graph.exists])


def test_mib_format_of_unscored_and_of_odd_circuits(tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    circuit = Circuit.from_edges(SMALL, ["input->logits"])
    written = json.loads(circuit.to_json(path, "mib", d_model=8).read_text())
    assert {edge["score"] for edge in written["edges"].values()} == {0.0}
    assert [name for name, edge in written["edges"].items() if edge["in_graph"]] == ["input->logits"]
    assert written["cfg"]["d_model"] == 8
    with pytest.raises(ValueError, match=r"give d_model=model\.d_model"):
        circuit.to_json(path, "mib")
    with pytest.raises(ValueError, match="and this model has none"):
        Circuit.full(GRAPHS["attention_only"]).to_json(path, "mib", d_model=8)
    holes = dataclasses.replace(circuit, scores=torch.full(SMALL.exists.shape, NAN))
    with pytest.raises(ValueError, match=f"a score for every edge, and {SMALL.n_edges} have none"):
        holes.to_json(path, "mib", d_model=8)
    with pytest.raises(ValueError, match="format: expected 'mechkit' or 'mib', got 'eap'"):
        circuit.to_json(path, "eap")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_own_format_keeps_everything(tmp_path: Path, dtype: torch.dtype) -> None:
    values = draw(SMALL).to(dtype)
    values[0, 0] = NAN
    circuit = Circuit(SMALL, SMALL.exists, values, "tiny", "abc", "ioi", {"seed": 3, "layers": [1, 2]})
    circuit = circuit.without("m0->logits")
    again = Circuit.from_json(circuit.to_json(tmp_path / "circuit.json"), SMALL)
    assert again == circuit
    for name in ("graph", "model", "weights_hash", "task", "provenance"):
        assert getattr(again, name) == getattr(circuit, name)
    assert again.scores is not None
    assert again.scores.dtype == dtype
    assert torch.equal(again.scores.isnan(), circuit.scores.isnan())
    assert torch.equal(again.scores.nan_to_num(), circuit.scores.nan_to_num())
    bare = Circuit.from_edges(SMALL, ["input->logits"])
    again = Circuit.from_json(bare.to_json(tmp_path / "bare.json"))
    assert again == bare
    assert again.scores is None


def broken(content: dict[str, Any], how: str) -> Any:
    edges = content["edges"]
    match how:
        case "missing edge":
            del edges["input->logits"]
        case "unknown edge":
            edges["input->a0.h9<q>"] = edges.pop("input->logits")
        case "backward edge":
            edges["m1->m0"] = {"score": 0.0, "in_graph": True}
        case "nan":
            edges["input->logits"]["score"] = NAN
        case "text":
            edges["input->logits"]["score"] = "0.5"
        case "no score":
            del edges["input->logits"]["score"]
        case "number for in_graph":
            edges["input->logits"]["in_graph"] = 1
        case "no cfg":
            del content["cfg"]
        case "no layers":
            del content["cfg"]["n_layers"]
        case "half a layer":
            content["cfg"]["n_layers"] = 1.5
        case "missing node":
            del content["nodes"]["m0"]
        case "neurons":
            content["nodes"]["m0"]["neurons"] = [True, False]
        case "odd groups":
            content["cfg"]["n_key_value_heads"] = 3
        case "edges in a list":
            content["edges"] = list(edges)
        case "list":
            return [content]
    return content


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing edge", r"expected the 46 edges .* got 45; missing: input->logits"),
        ("unknown edge", r"unknown: input->a0.h9<q>; missing: input->logits"),
        ("backward edge", "unknown: m1->m0"),
        ("nan", r"edges\['input->logits'\]: expected a finite score, got nan"),
        ("text", r"expected a finite score, got '0.5'"),
        ("no score", r"edges\['input->logits'\]: expected in_graph and score"),
        ("number for in_graph", r"edges\['input->logits'\]: expected in_graph and score"),
        ("no cfg", "keys 'cfg', 'nodes' and 'edges'"),
        ("no layers", "cfg: expected .* missing: n_layers"),
        ("half a layer", r"cfg\['n_layers'\]: expected a whole number, got 1.5"),
        ("missing node", "nodes: expected 8, .* missing: m0"),
        ("neurons", "got single neurons"),
        ("odd groups", "multiple of n_key_value_heads"),
        ("edges in a list", "edges: expected a mapping"),
        ("list", "it begins with"),
    ],
)
def test_broken_mib_files(tmp_path: Path, how: str, message: str) -> None:
    path = tmp_path / "circuit.json"
    content = eap_ig_file(path, 2, 2)
    assert len(Circuit.from_json(path)) > 0  # the control
    path.write_text(json.dumps(broken(content, how)))
    with pytest.raises(ValueError, match=message) as error:
        Circuit.from_json(path)
    assert str(path) in str(error.value)


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    path.write_text("edges")
    with pytest.raises(ValueError, match="expected a circuit as JSON"):
        Circuit.from_json(path)
    path.write_text('{"cfg": 1, "cfg": 2}')
    with pytest.raises(ValueError, match="expected each key once, got 'cfg' again"):
        Circuit.from_json(path)
    Circuit.full(SMALL).to_json(path)
    content = json.loads(path.read_text())
    for change, message in (
        ({"version": 2}, "expected version 1, got 2"),
        ({"graph": {"n_layers": 2}}, "graph: expected n_layers"),
        ({"dtype": "load"}, "dtype: expected a floating-point dtype"),
        ({"edges": {"m1->m0": {"in_graph": True}}}, "unknown: m1->m0"),
        ({"edges": {"m0->logits": {"score": NAN, "in_graph": True}}}, "expected a finite score"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            Circuit.from_json(path)
    del content["task"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="missing: task"):
        Circuit.from_json(path)
    eap_ig_file(path, 2, 4)
    with pytest.raises(ValueError, match="a circuit of another model"):
        Circuit.from_json(path, Graph(2, 4, 2, parallel=True))


# --- networkx


def test_networkx() -> None:
    circuit = Circuit.from_scores(rounded(SMALL), n_edges=20)
    drawn = circuit.to_networkx()
    assert {data["name"] for *_, data in drawn.edges(data=True)} == {edge.name for edge in circuit}
    assert drawn.number_of_edges() == len(circuit)
    for writer, _target, kind, data in drawn.edges(keys=True, data=True):
        edge = SMALL.edge(data["name"])
        assert (edge.writer.name, edge.reader.kind, data["kind"]) == (writer, kind, kind)
        assert data["score"] == score_of(rounded(SMALL), edge)
    assert Circuit.full(SMALL).to_networkx().nodes["a1.h0"] == {"layer": 1, "head": 0}
    assert set(Circuit.empty(SMALL).to_networkx()) == {"input", "logits"}
    unscored = Circuit.full(SMALL).to_networkx()
    assert not any("score" in data for *_, data in unscored.edges(data=True))


def test_networkx_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match="pip install networkx"):
        Circuit.full(SMALL).to_networkx()


# --- scores


def test_scores_by_prompt_and_averaged() -> None:
    values = draw(SMALL, prompts=(3,))
    scores = make(SMALL, values)
    exists = SMALL.exists
    assert scores.result.dims == ("writer", "reader", "prompt")
    assert scores.per_prompt[exists].equal(values[exists])
    assert scores.per_prompt[~exists].isnan().all()
    assert scores.values[exists].allclose(values.mean(2)[exists], rtol=1e-15)
    assert scores.result.baseline == {}
    assert scores.edges == tuple(SMALL.edges)
    assert scores.score("0.1 -> logits") == scores.values[SMALL.index(SMALL.edge("a0.h1->logits"))].item()
    assert scores.score(SMALL.edge("m0->logits")) == score_of(scores, SMALL.edge("m0->logits"))
    means = make(SMALL, values.mean(2))
    assert means.values[exists].equal(values.mean(2)[exists])
    with pytest.raises(ValueError, match="per_prompt: expected scores by prompt"):
        means.per_prompt  # noqa: B018
    with pytest.raises(ValueError, match="at least 2 prompts"):
        means.ci()
    assert (scores.metric, scores.unit, scores.provenance["task"], scores.cost) == ("logit_diff", "logits", "ioi", None)
    assert copy.deepcopy(scores).values[exists].equal(scores.values[exists])


def test_ci_is_that_of_each_edge() -> None:
    values = draw(SMALL, prompts=(6,))
    interval = make(SMALL, values, n=6).ci(seed=3)
    assert interval.low.dims == ("writer", "reader")
    alone = mk.Result(values[0, 0], ("prompt",), {"prompt": tuple(range(6))}, {}, "", "m", "u", {}).ci(seed=3)
    assert interval.low.values[0, 0].item() == pytest.approx(alone.low.values.item(), rel=1e-12)
    assert interval.high.values[0, 0].item() == pytest.approx(alone.high.values.item(), rel=1e-12)
    assert torch.equal(interval.low.values.isnan(), ~SMALL.exists)


@pytest.mark.parametrize("by", ["abs", "max", "min"])
def test_top(by: str) -> None:
    scores = rounded(GRAPHS["gqa"])
    key = {
        "abs": lambda e: -abs(score_of(scores, e)),
        "max": lambda e: -score_of(scores, e),
        "min": lambda e: score_of(scores, e),
    }
    expected = sorted(scores.graph.edges, key=key[by])
    top = scores.top(30, by=by)
    assert [scored.edge for scored in top] == expected[:30]
    assert [scored.score for scored in top] == [score_of(scores, edge) for edge in expected[:30]]
    assert top[0].name == expected[0].name
    assert len(scores.top(10**6)) == scores.graph.n_edges
    with pytest.raises(ValueError, match="top: expected k >= 1"):
        scores.top(0)
    with pytest.raises(ValueError, match="by: expected one of 'abs', 'max', 'min'; got 'value'"):
        scores.top(3, by="value")


def test_chosen_edges() -> None:
    values = torch.full(SMALL.exists.shape, NAN)
    values[SMALL.index(SMALL.edge("m0->logits"))] = -2.0
    values[SMALL.index(SMALL.edge("input->m0"))] = 1.0
    scores = make(SMALL, values)
    assert [edge.name for edge in scores.edges] == ["input->m0", "m0->logits"]
    assert [scored.name for scored in scores.top()] == ["m0->logits", "input->m0"]
    assert "2 of 46 edges; top m0->logits -2, input->m0 +1" in repr(scores)
    frame = scores.to_dataframe()
    assert frame.to_dict("list") == {"writer": ["input", "m0"], "reader": ["m0", "logits"], "score": [1.0, -2.0]}
    with pytest.raises(ValueError, match="'input->logits' was not computed"):
        scores.score("input->logits")
    with pytest.raises(ValueError, match="is not in this graph"):
        scores.score(Graph(3, 2, 2).edge("m2->logits"))
    nothing = make(SMALL, torch.full(SMALL.exists.shape, NAN))
    assert nothing.top() == ()
    assert nothing.edges == ()


def test_dataframe() -> None:
    scores = make(SMALL, draw(SMALL, prompts=(3,)))
    frame = scores.to_dataframe()
    assert list(frame) == ["writer", "reader", "score"]
    assert [f"{w}->{r}" for w, r in zip(frame.writer, frame.reader, strict=True)] == [e.name for e in SMALL.edges]
    assert frame.score.tolist() == [scores.score(edge) for edge in SMALL.edges]
    long = scores.to_dataframe(per_prompt=True)
    assert list(long) == ["writer", "reader", "prompt", "score"]
    assert len(long) == 3 * SMALL.n_edges
    row = long.iloc[7]
    edge = SMALL.edge(f"{row.writer}->{row.reader}")
    assert row.score == scores.per_prompt[(*SMALL.index(edge), row.prompt)].item()
    assert long.groupby(["writer", "reader"]).score.mean()["m0", "logits"] == pytest.approx(scores.score("m0->logits"))
    with pytest.raises(ValueError, match="per_prompt"):
        make(SMALL, draw(SMALL)).to_dataframe(per_prompt=True)


def test_correlation() -> None:
    from scipy.stats import pearsonr, spearmanr

    a, b = draw(SMALL), draw(SMALL, 1)
    a[0, 0] = b[0, 1] = NAN
    both = SMALL.exists & ~a.isnan() & ~b.isnan()
    first, second = make(SMALL, a), make(SMALL, b)
    x, y = a[both].numpy(), b[both].numpy()
    assert first.correlation(second) == pytest.approx(pearsonr(x, y).statistic, abs=1e-12)
    assert first.correlation(second, method="spearman") == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert first.correlation(make(SMALL, -2 * a)) == pytest.approx(-1)
    assert np.isnan(first.correlation(make(SMALL, torch.ones_like(a))))
    with pytest.raises(ValueError, match="expected scores of Graph"):
        first.correlation(rounded(GRAPHS["mha"]))
    with pytest.raises(ValueError, match="at least 2 edges that both have, got 0"):
        first.correlation(make(SMALL, torch.full_like(a, NAN)))
    with pytest.raises(ValueError, match="method: expected"):
        first.correlation(second, method="kendall")


def test_normalized() -> None:
    values = draw(SMALL, prompts=(3,))
    scores = make(SMALL, values)
    share = scores.normalized()
    assert share.unit == "normalized"
    assert share.values[SMALL.exists].allclose(
        values.mean(2)[SMALL.exists] / 3, rtol=1e-14
    )  # clean 3, corrupted 0 on average
    assert share.baseline["clean"].mean().item() == pytest.approx(1)
    assert share.baseline["corrupted"].mean().item() == pytest.approx(0, abs=1e-7)
    same = {"clean": torch.ones(3), "corrupted": torch.tensor([0.0, 1.0, 2.0])}
    with pytest.raises(ValueError, match="expected runs that differ, got means clean 1 and corrupted 1"):
        make(SMALL, values, baseline=same).normalized()
    with pytest.raises(ValueError, match="no corrupted"):
        make(SMALL, values, baseline={"clean": torch.ones(3)}).normalized()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_read_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    graph = GRAPHS["gqa"]
    values = draw(graph, prompts=(3,)).to(dtype) / 3
    values[0, 1] = NAN
    baseline = {"clean": torch.rand(3, dtype=dtype) / 3, "corrupted": torch.rand(3, dtype=dtype)}
    cost = mk.Cost(10, 20)
    for given in (values, values.mean(2)):
        scores = make(graph, given, baseline=baseline, cost=cost)
        again = EdgeScores.load(scores.save(tmp_path / "scores.safetensors"))
        assert again.graph == graph
        assert again.result.dims == scores.result.dims
        for name in ("metric", "unit", "provenance", "cost"):
            assert getattr(again, name) == getattr(scores, name)
        for a, b in [
            (again.result.values, scores.result.values),
            *((again.baseline[k], baseline[k]) for k in baseline),
        ]:
            assert a.dtype == b.dtype == dtype
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        assert mk.Result.load(tmp_path / "scores.safetensors").dims == scores.result.dims
    scores.result.save(tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match=r"expected a file written by EdgeScores\.save"):
        EdgeScores.load(tmp_path / "scores.safetensors")


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        (torch.zeros(6, 15), {}, r"values: expected shape \[7 15\]"),
        (torch.zeros(7, 15), {"prompts": True}, r"values: expected shape \[7 15 prompt\]"),
        (torch.zeros(7, 15, 3), {"prompts": False}, r"values: expected shape \[7 15\]"),
        (torch.zeros(7, 15, 2), {}, "baseline: expected 2 prompts, got 3"),
        (torch.zeros(7, 15), {"baseline": {"clean": torch.tensor(1.0)}}, "baseline: expected one number a prompt"),
        (torch.zeros(7, 15), {"baseline": {"clean": torch.ones(2), "corrupted": torch.ones(3)}}, "one number a prompt"),
        (torch.zeros(7, 15, dtype=torch.long), {}, "values: expected a floating-point"),
    ],
)
def test_scores_refuse(values: torch.Tensor, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(SMALL, values, **changes)


def test_scores_check_their_result() -> None:
    scores = make(SMALL, draw(SMALL))
    result = scores.result
    with pytest.raises(ValueError, match="expected the writers of Graph"):
        EdgeScores(GRAPHS["mha"], result, {})
    with pytest.raises(ValueError, match=r"use EdgeScores\.of"):
        EdgeScores(SMALL, dataclasses.replace(result, values=torch.zeros(7, 15)), {})
    with pytest.raises(ValueError, match="which have no baselines"):
        EdgeScores(SMALL, dataclasses.replace(result, baseline={"clean": torch.tensor(1.0)}, base="clean"), {})
    with pytest.raises(ValueError, match="expected dims"):
        EdgeScores(SMALL, result.sel(writer="input"), {})
