"""The graph's counts, order and names, against arithmetic done by hand and against the naive reference's own list of edges; and
`Parts`, which holds what a graph presumes about a model against what the model computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

import mechkit as mk
from helpers import reference_circuits as reference
from helpers.families import FAMILIES, PARALLEL
from helpers.tiny import make_model, model_of, n_hooks
from mechkit.circuits.graph import Edge, Graph, Reader, Writer
from mechkit.hooks import Parts

KV_HEADS = {"llama": 2, "llama_mqa": 1, "mistral": 2, "qwen2": 2, "qwen3": 2, "gemma2": 2, "gemma3": 2, "falcon": 1}
KV_HEADS |= {"olmo2": 2, "stablelm": 2, "mixtral": 2}
MHA, GQA = Graph(3, 4, 4), Graph(3, 4, 2)


# --- counts


@pytest.mark.parametrize(
    ("graph", "n_edges"),
    [
        (Graph(30, 9, 3), 70_651),  # SmolLM2-135M
        (Graph(12, 12, 12), 32_491),  # GPT-2 small
        (Graph(1, 1, 1, mlps=False), 3 + 2),  # input -> q, k, v; input and the head -> logits
        (Graph(1, 2, 1), 4 + 3 + 4),  # input -> two q, k, v; input and two heads -> m0; these and m0 -> logits
        (Graph(1, 2, 1, parallel=True), 4 + 1 + 4),  # m0 does not see its own layer's heads
    ],
)
def test_numbers_of_edges(graph, n_edges):
    assert graph.n_edges == n_edges == len(list(graph.edges)) == int(graph.exists.sum())
    assert f"{n_edges:,} edges" in str(graph)


def test_writers_and_readers_are_in_the_order_in_which_they_work():
    assert [w.name for w in Graph(2, 2, 2).writers] == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
    assert [r.name for r in Graph(1, 2, 1).readers] == [
        "a0.h0<q>",
        "a0.h1<q>",
        "a0.kv0<k>",
        "a0.kv0<v>",
        "m0",
        "logits",
    ]
    of_head = [f"a0.h{head}<{kind}>" for kind in "qkv" for head in (0, 1)]
    assert [r.name for r in Graph(1, 2, 2, mlps=False).readers] == [*of_head, "logits"]


@pytest.mark.parametrize("graph", [MHA, GQA, Graph(2, 4, 1, parallel=True), Graph(2, 3, 3, mlps=False)])
def test_places_of_a_layers_nodes(graph):
    heads, mlps = [graph.writers[graph.heads_at(1)], graph.writers[graph.mlp_at(1)]]
    assert heads == tuple(Writer(1, head) for head in range(graph.n_heads))
    assert mlps == (Writer(1),) * graph.mlps
    assert graph.layer_size == len(heads) + len(mlps)
    reads, mlp_reads = graph.readers[graph.attention_reads_at(1)], graph.readers[graph.mlp_reads_at(1)]
    assert "".join(r.kind for r in reads) == "q" * graph.n_heads + "k" * graph.n_kv_heads + "v" * graph.n_kv_heads
    assert {r.layer for r in reads} == {1}
    assert mlp_reads == (Reader("mlp", 1),) * graph.mlps
    assert graph.readers[graph.logits_at] == (Reader("logits", graph.n_layers),)
    assert [i for where in graph.writers_at for i in range(where.start, where.stop)] == list(range(len(graph.writers)))
    assert graph.n_cells == (len(graph.writers), len(graph.readers))


def test_kinds_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="kind: expected one of input, head, q, k, v, mlp, logits; got 'neuron'"):
        Reader("neuron", 1).name  # noqa: B018


@pytest.mark.parametrize("graph", [MHA, GQA, Graph(2, 4, 1, parallel=True), Graph(2, 3, 3, mlps=False)])
def test_edges_lead_from_earlier_writers_to_later_readers_and_nowhere_else(graph):
    """By layer and place alone: heads read at 0, write at 1; MLPs read at 2 (parallel: 0), write at 3."""

    def writes(w: Writer) -> tuple[int, int]:
        return (w.layer, 1 if w.head is not None else 3)

    def reads(r: Reader) -> tuple[int, int]:
        return (r.layer, 2 if r.kind == "mlp" and not graph.parallel else 0)

    expected = [Edge(w, r) for r in graph.readers for w in graph.writers if writes(w) < reads(r)]
    assert list(graph.edges) == expected
    exists = torch.zeros(len(graph.writers), len(graph.readers), dtype=torch.bool)
    for edge in expected:
        assert edge in graph
        exists[graph.index(edge)] = True
    assert torch.equal(graph.exists, exists)
    assert all(sum(e.reader == r for e in expected) == graph.n_writers(r) for r in graph.readers)
    assert not any(Edge(w, r) in graph for w in graph.writers for r in graph.readers if writes(w) >= reads(r))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_graph_is_the_naive_references(family):
    model = model_of(family)
    graph = Graph.of(model)
    assert [e.name for e in graph.edges] == reference.edge_names(model)
    assert [w.name for w in graph.writers] == reference.writer_names(model)
    assert [r.name for r in graph.readers] == reference.reader_names(model)
    assert graph == Graph(4, 4, KV_HEADS.get(family, 4), parallel=family in PARALLEL)


# --- names


@pytest.mark.parametrize("graph", [MHA, GQA, Graph(2, 2, 2, parallel=True), Graph(2, 2, 1, mlps=False)])
def test_names_lead_back_to_what_they_name(graph):
    for writer in graph.writers:
        assert graph.writer(writer.name) is writer
        assert graph.writers[graph.writer_index[writer.name]] is writer
    for reader in graph.readers:
        assert graph.reader(reader.name) == reader == graph.readers[graph.reader_index[reader.name]]
    for edge in graph.edges:
        assert graph.edge(edge.name) == edge
        assert str(edge) == edge.name == f"{edge.writer}->{edge.reader}"
    assert len({edge.name for edge in graph.edges}) == graph.n_edges


def test_labels_of_results_are_names():
    assert MHA.writer("L1H2") == MHA.writer("a1.h2")
    assert MHA.reader(" L1H2<q>") == MHA.reader("a1.h2<q>")
    assert MHA.edge("L0H1 -> logits") == MHA.edge("a0.h1->logits")
    for wrong in ("L9H9", "L1", "H2", "L1H2<q>"):
        with pytest.raises(ValueError, match="writer: expected"):
            MHA.writer(wrong)


def test_short_names():
    assert MHA.edge(" 1.3 -> 2.0<k> ") == MHA.edge("a1.h3->a2.h0<k>")
    assert MHA.edge("2.1 -> logits") == Edge(Writer(2, 1), Reader("logits", 3))
    assert MHA.edge("input->m0") == Edge(Writer(-1), Reader("mlp", 0))


def test_shared_keys_and_values_have_the_key_value_heads_name():
    assert GQA.shares
    assert not MHA.shares
    assert {r.name for r in GQA.readers if r.kind == "k"} == {
        f"a{layer}.kv{i}<k>" for layer in range(3) for i in (0, 1)
    }
    assert GQA.reader("a2.kv1<v>") == Reader("v", 2, 1, shared=True)
    with pytest.raises(ValueError, match=r"expected 'a1.kv1<k>', which head 3 uses, got 'a1.h3<k>'"):
        GQA.reader("a1.h3<k>")
    with pytest.raises(ValueError, match=r"a1.kv0<v>"):
        GQA.edge("input->a1.h1<v>")
    with pytest.raises(ValueError, match="out of range, or of another kind of model"):
        MHA.reader("a1.kv0<k>")


def test_components_and_their_inputs():
    head = GQA.writer("a2.h3")
    assert [r.name for r in GQA.readers_of(head)] == ["a2.h3<q>", "a2.kv1<k>", "a2.kv1<v>"]
    assert [r.name for r in MHA.readers_of(head)] == ["a2.h3<q>", "a2.h3<k>", "a2.h3<v>"]
    assert [r.name for r in GQA.readers_of(GQA.writer("m1"))] == ["m1"]
    assert GQA.readers_of(GQA.writer("input")) == ()
    for graph in (MHA, GQA, Graph(2, 4, 1)):
        assert graph.writers_of(graph.reader("logits")) == ()
        for reader in graph.readers[:-1]:
            owners = [w for w in graph.writers if reader in graph.readers_of(w)]
            assert list(graph.writers_of(reader)) == owners
            assert len(owners) == (graph.n_heads // graph.n_kv_heads if reader.kind in ("k", "v") else 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("input", "expected 'writer->reader'"),
        ("input->m0->logits", "expected 'writer->reader'"),
        ("a3.h0->logits", "writer: .*'a3.h0' is out of range"),
        ("a0.h4->logits", "writer: .*'a0.h4' is out of range"),
        ("logits->m0", "writer: .*'logits' is not a writer's name"),
        ("a0.h0<q>->logits", "writer: .*not a writer's name"),
        ("input->a0.h0", "reader: .*'a0.h0' is not a reader's name"),
        ("input->a0.h9<q>", "reader: .*out of range"),
        ("input->m3", "reader: .*out of range"),
        ("input->logit", "reader: .*not a reader's name"),
        ("m0->m0", "edge: m0 reads before m0 writes"),
        ("a1.h0->a1.h1<q>", "edge: a1.h1<q> reads before a1.h0 writes"),
        ("m2->a0.h0<k>", "edge: a0.h0<k> reads before m2 writes"),
        ("", "expected 'writer->reader'"),
    ],
)
def test_edges_that_do_not_exist_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        MHA.edge(name)


def test_edges_of_other_graphs_have_no_place():
    with pytest.raises(ValueError, match=r"'a1.h0->m1' is not in this graph"):
        Graph(2, 2, 2, parallel=True).index(Graph(2, 2, 2).edge("a1.h0->m1"))
    with pytest.raises(ValueError, match=r"is not in this graph"):
        MHA.index(GQA.edge("input->a0.kv0<k>"))
    with pytest.raises(ValueError, match=r"not a reader's name|out of range"):
        Graph(2, 2, 2, mlps=False).edge("input->m0")
    assert MHA.edge("a0.h3->m0") not in Graph(3, 3, 3)


def test_models_without_attention_have_no_graph():
    config = MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4, intermediate_size=32)
    model = mk.HookedModel.from_hf(MambaForCausalLM(config).eval(), name="mamba")
    with pytest.raises(ValueError, match=r"'q' does not exist in mamba .* shows no attention in it"):
        Graph.of(model)


# --- the pieces that a graph presumes


def prompts(n: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randint(3, 61, (n, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_piece_of_a_model_is_what_it_is_taken_for(family):
    parts = Parts(model_of(family))
    parts.check(prompts())
    assert parts.parallel == (family in PARALLEL)
    assert parts.has_mlp


def _more(forward: Callable[..., Any], bend: float) -> Callable[..., Any]:
    """A module's forward whose (first) output is no longer linear: no weight says what it computes then. (One that is only
    scaled is another matrix, which is read off it.)"""

    @functools.wraps(forward)
    def tampered(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        first = first + bend * first.abs()
        return (first, *output[1:]) if isinstance(output, tuple) else first

    return tampered


@pytest.mark.parametrize(
    ("module", "piece"),
    [
        ("attn.q", "to be linear"),
        ("attn.k", "to be linear"),
        ("attn.v", "to be linear"),
        ("attn.o", "to be linear"),
        ("", "the residual stream after layer 1 of .*is off by .*its edges are not known"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "stablelm"])
def test_a_model_that_computes_something_else_is_refused(family, module, piece, monkeypatch):
    model = make_model(family)
    pairs = mk.PromptPairs.from_tokens(prompts(1), prompts(2)[1:], [(5, 7)])
    block = model.bridge.blocks[1]
    for name in filter(None, module.split(".")):
        block = getattr(block, name)
    plain = block.original_component
    Parts(model).check(prompts())  # control: it is the change that is refused
    monkeypatch.setattr(plain, "forward", _more(plain.forward, 0.01))
    before = n_hooks(model)
    with pytest.raises(ValueError, match=rf"model: .*({piece})"):
        Parts(model).check(prompts())
    metric = mk.logit_diff(pairs)
    for technique in (mk.edge_attribution, mk.edge_patching, functools.partial(mk.acdc, threshold=0.1)):
        with pytest.raises(
            ValueError, match=r"to be linear|its edges are not known|add up to something else than the whole gradient"
        ):
            technique(model, pairs, metric)
    assert n_hooks(model) == before
