"""A kind of node that the library does not have, made here alone: each MLP as two nodes, halves of its neurons. Everything works
with it once it stands in the table (`mechkit.circuits._kinds.KINDS`), in a block whose MLP reads after its heads and in a
parallel one; and its numbers are those of whole passes with hooks, written without it, or of the two halves' MLP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import mechkit as mk
from helpers import reference_circuits as reference
from helpers.tiny import make_pairs, model_of, read, whole_vocabulary
from mechkit.circuits import Circuit, Constants, Graph, Reader, Writer, _kinds
from mechkit.circuits._evaluation import ABLATIONS, Evaluator
from mechkit.circuits._kinds import Attend, Embedding, Group, Heads, Kind, Logits
from mechkit.hooks import SITES, HookedModel, Parts, Run

FAMILIES = ("gpt2", "gpt_neox")  # the MLP reads after its layer's heads; beside them
MODULES = {"gpt2": ("c_fc", "c_proj"), "gpt_neox": ("dense_h_to_4h", "dense_4h_to_h")}


def matrices(model: HookedModel, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of an MLP: `[d_model neuron]`, `[neuron d_model]`, and the output bias."""
    mlp = model.stack.blocks[layer].mlp.original_component
    first, last = (getattr(mlp, name) for name in MODULES[model.name])
    inward, outward = (m.weight if model.name == "gpt2" else m.weight.T for m in (first, last))
    return inward.detach(), outward.detach(), last.bias.detach()


class Halves(Kind):
    """Each half of an MLP's neurons. The output bias belongs to neither."""

    name, many = "half", "halves of MLPs"
    reads: ClassVar = {"half": "half of an MLP"}
    dims = ("layer", "half")
    recorded = "mlp_post"
    adds_last = True
    writer_names = reader_names = r"m\d+\.n\d+"

    def n_writers(self, graph: Graph) -> int:
        return 2

    def n_readers(self, graph: Graph) -> dict[str, int]:
        return {"half": 2}

    def within(self, graph: Graph) -> bool:
        return not graph.parallel

    def needs(self, model: HookedModel) -> list[str]:
        return ["mlp_pre", "mlp_post", "mlp_out"]

    def writer_name(self, writer: Writer) -> str:
        return f"m{writer.layer}.n{writer.head}"

    def reader_name(self, reader: Reader) -> str:
        return f"m{reader.layer}.n{reader.head}"

    def expected(self, graph: Graph) -> tuple[str, str]:
        return f"half an MLP m0.n0 to m{graph.n_layers - 1}.n1", "half an MLP m0.n0"

    def written(self, parts: Parts, layer: int, activation: Tensor) -> Tensor:
        outward = matrices(parts.model, layer)[1]
        return torch.einsum("...phn,hnm->...hpm", activation.unflatten(-1, (2, -1)), outward.unflatten(0, (2, -1)))

    def beside(self, parts: Parts, layer: int, activation: Tensor) -> Tensor | None:
        return matrices(parts.model, layer)[2]

    def _by_half(self, parts: Parts, layer: int, x: Tensor) -> Tensor:
        """What each half adds where both read `x`: `[… half pos d_model]`."""
        mlp = parts.model.stack.blocks[layer].mlp.original_component
        inward = getattr(mlp, MODULES[parts.model.name][0])
        return self.written(parts, layer, mlp.act(inward(parts.mlp_input(layer, x))))

    def run(self, parts: Parts, layer: int, reads: Tensor, attend: Attend) -> Tensor:
        return torch.stack([self._by_half(parts, layer, reads[:, i])[:, i] for i in range(2)], 1)

    def edited(self, reader: Reader) -> tuple[str, int, int | None]:
        return "mlp_out", reader.layer, None

    def values(
        self, parts: Parts, group: Group, base: Run, reads: Tensor, readers: Sequence[Reader], sites: Sequence[str]
    ) -> dict[str, Tensor]:
        there, here = (self._by_half(parts, group.layer, x) for x in (reads, group.read_in(base)))
        changes = [there[..., reader.head, :, :] - here[..., reader.head, :, :] for reader in readers]
        return {"mlp_out": base.sites["mlp_out", group.layer] + torch.stack(changes).sum(0)}

    def gradients_at(self, layer: int) -> dict[str, str]:
        return {"neurons": SITES["mlp_pre"].hook_name(layer)}

    def pull_back(self, parts: Parts, layer: int, x: Tensor, gradients: Mapping[str, Tensor], frozen: bool) -> Tensor:
        inward = matrices(parts.model, layer)[0].unflatten(1, (2, -1))
        back = torch.einsum("bphn,mhn->bphm", gradients["neurons"].unflatten(-1, (2, -1)), inward)
        return parts.pull_back_mlp(layer, x, back, frozen)


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table with halves of MLPs in the place of MLPs."""
    monkeypatch.setattr(_kinds, "KINDS", (Embedding(), Heads(), Halves(), Logits()))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


# --- the naive way: whole passes with hooks, none of the kind's code


def half_of(model: HookedModel, tokens: Tensor, layer: int, half: int, stream: Tensor) -> Tensor:
    """What half an MLP adds, `[row pos d_model]`, in a whole pass in which the MLP reads `stream`, of the same shape."""
    edits = {f"blocks.{layer}.{reference._read_by_mlp(model.bridge)}": [(..., stream)]}
    post = f"blocks.{layer}.mlp.hook_post"
    with torch.no_grad():
        neurons = reference._run(model.bridge, tokens, edits, [post], logits=False)[1][post]
    return neurons.chunk(2, -1)[half] @ matrices(model, layer)[1].chunk(2)[half]


def whole_run(model: HookedModel, tokens: Tensor) -> reference.Run:
    """The reference's run, with what each half writes and reads."""
    run = reference.whole_run(model, tokens)
    for layer in range(model.n_layers):
        for half in range(2):
            run.read[f"m{layer}.n{half}"] = run.read[f"m{layer}"]
            run.wrote[f"m{layer}.n{half}"] = half_of(model, tokens, layer, half, run.read[f"m{layer}"][None])[0]
    return run


def patch_edge(model: HookedModel, base: reference.Run, source: reference.Run, tokens: Tensor, edge: str) -> Tensor:
    writer, _, reader = edge.partition("->")
    if ".n" not in reader:
        return reference.patch_edge(model, base, source, tokens, edge)
    layer, half = (int(number) for number in reader[1:].split(".n"))
    stream = base.read[reader] + source.wrote[writer] - base.wrote[writer]
    change = half_of(model, tokens, layer, half, stream[None])[0] - base.wrote[reader]

    def add(x: Tensor, hook: object) -> Tensor:
        return x.add_(change)

    with torch.no_grad():
        return model.bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.hook_mlp_out", add)])


@torch.no_grad()
def run_circuits(
    model: HookedModel, clean_tokens: Tensor, tokens: Tensor, circuits: list[set[str]], graph: Graph
) -> Tensor:
    """Logits `[circuit pos d_vocab]` of the runs on each circuit's edges, the corrupted run's values everywhere else."""
    corrupted, rows = whole_run(model, tokens), len(circuits)
    wrote = {"input": whole_run(model, clean_tokens).wrote["input"].expand(rows, -1, -1)}
    tokens = tokens.expand(rows, -1)

    def stream(reader: Reader) -> Tensor:
        found = corrupted.read[reader.name].repeat(rows, 1, 1)
        for writer in graph.writers[: graph.n_writers(reader)]:
            taken = torch.tensor([f"{writer.name}->{reader.name}" in edges for edges in circuits])
            found += taken[:, None, None] * (wrote[writer.name] - corrupted.wrote[writer.name])
        return found

    for layer in range(graph.n_layers):
        here = [reader for reader in graph.readers if reader.layer == layer]
        streams = {reader.name: stream(reader) for reader in here if reader.kind != "half"}
        inside = (model.bridge, layer, tokens)
        new = reference._heads(*inside, reference._qkv(*inside, streams))
        if graph.parallel:  # the halves do not see what the heads write
            new |= {f"m{layer}.n{i}": half_of(model, tokens, layer, i, stream(here[-2 + i])) for i in range(2)}
        wrote |= new
        if not graph.parallel:
            wrote |= {f"m{layer}.n{i}": half_of(model, tokens, layer, i, stream(here[-2 + i])) for i in range(2)}
    return reference._logits(model.bridge, tokens, stream(graph.readers[-1]))


def in_wholes(graph: Graph, whole: Graph) -> Tensor:
    """For each edge of `graph` (by reader and then by writer) where that of the whole MLPs is in a graph of these."""
    names = [[name.partition(".n")[0] for name in (edge.writer.name, edge.reader.name)] for edge in graph.edges]
    return torch.tensor([(whole.writer_index[writer], whole.reader_index[reader]) for writer, reader in names])


# --- the graph


def test_the_graph_has_the_new_nodes(family, halves):
    model = model_of(family)
    graph = Graph.of(model)
    assert [w.name for w in graph.writers][:8] == ["input", *(f"a0.h{i}" for i in range(4)), "m0.n0", "m0.n1", "a1.h0"]
    assert [r.name for r in graph.readers][-3:] == ["m3.n0", "m3.n1", "logits"]
    assert graph.n_cells == (len(graph.writers), len(graph.readers)) == (1 + 4 * 6, 4 * 14 + 1)
    assert graph.edge("m0.n1->m1.n0") in graph
    assert (graph.n_writers(graph.reader("m1.n0")), graph.n_writers(graph.reader("logits"))) == (
        (7, 25) if graph.parallel else (11, 25)
    )
    assert graph.readers_of(graph.writer("m2.n1")) == (Reader("half", 2, 1),)
    assert graph.writers_of(graph.reader("m2.n1")) == (Writer(2, 1, "half"),)
    assert Writer(2, 1, "half") != Writer(2, 1)
    for name, message in (
        ("m0->logits", "half an MLP m0.n0 to m3.n1; 'm0' is not a"),
        ("m9.n0->logits", "out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            graph.edge(name)
    with pytest.raises(ValueError, match="reads before"):
        graph.edge("m1.n0->m1.n1")


def test_without_it_the_table_is_the_old_one(family):
    assert "m0" in Graph.of(model_of(family)).writer_index  # control: the fixture does not outlive a test


# --- edges


NAMES = ("input->m0.n1", "a0.h1->m2.n0", "m0.n0->a1.h2<k>", "m1.n1->m2.n0", "m1.n0->m3.n1", "m3.n1->logits")


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_edge_patching_is_what_whole_passes_give(family, halves, direction):
    model, pairs = model_of(family), make_pairs(((6, 2), (5, 1)))
    metric = whole_vocabulary(pairs)
    scores = mk.edge_patching(model, pairs, metric, NAMES, direction=direction, progress=False)
    found = reference.found_at(scores, list(NAMES))
    expected = torch.empty_like(found)
    base, source = (pairs.corrupted, pairs.clean) if direction == "denoise" else (pairs.clean, pairs.corrupted)
    for j in range(len(pairs)):
        tokens = base.tokens[j][None]
        runs = [whole_run(model, tokens), whole_run(model, source.tokens[j][None])]
        for i, name in enumerate(NAMES):
            patched = patch_edge(model, *runs, tokens, name)
            expected[i, j] = read(metric, patched, j) - read(metric, runs[0].logits, j)
    expected = expected if direction == "denoise" else -expected
    assert torch.allclose(found, expected, rtol=0, atol=1e-8)
    assert int((expected.abs() > 1e-3).sum()) >= 8  # control: of 12 numbers


@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 2, "path": "input"}])
def test_estimates_of_halves_add_up_to_their_mlps(family, options, monkeypatch):
    """EAP is linear in what writers write and in the gradients of readers."""
    model, pairs = model_of(family), make_pairs()
    whole = mk.edge_attribution(model, pairs, whole_vocabulary(pairs), **options)
    monkeypatch.setattr(_kinds, "KINDS", (Embedding(), Heads(), Halves(), Logits()))
    found = mk.edge_attribution(model, pairs, whole_vocabulary(pairs), **options)
    each = found.per_prompt.transpose(0, 1)[found.graph.exists.T]
    summed = torch.zeros_like(whole.per_prompt)
    summed.index_put_(tuple(in_wholes(found.graph, whole.graph).T), each, accumulate=True)
    exists = whole.graph.exists
    size = float(whole.per_prompt[exists].abs().max())
    assert torch.allclose(summed[exists], whole.per_prompt[exists], rtol=0, atol=1e-9 * size)
    one, other = (found.per_prompt[:, found.graph.reader_index[f"m3.n{i}"]].nan_to_num() for i in range(2))
    assert float((one - other).abs().max()) > 1e-3  # control: the halves are not alike


def test_rules_that_pass_the_kept_gradients_by_are_refused(halves):
    """RelP's rule of an MLP leads from its neurons' outputs to its input."""
    pairs = make_pairs()
    with pytest.raises(ValueError, match="no gradient path from 'mixture' to the neurons of layer"):
        mk.edge_attribution(model_of("gpt2"), pairs, whole_vocabulary(pairs), steps=1, gradient="relp")


def test_estimates_are_derivatives_of_whole_passes(family, halves):
    """Central differences of the metric where one reader sees a little of one writer's change."""
    model, pairs = model_of(family), make_pairs(((6, 2),))
    metric, step = whole_vocabulary(pairs), 1e-4
    scores = mk.edge_attribution(model, pairs, metric, steps=1)
    tokens = pairs.corrupted.tokens[0][None]
    base, source = whole_run(model, tokens), whole_run(model, pairs.clean.tokens[0][None])
    for name in NAMES:
        writer = name.partition("->")[0]
        values = []
        for sign in (1, -1):
            little = base.wrote[writer] + sign * step * (source.wrote[writer] - base.wrote[writer])
            run = reference.Run(base.wrote | {writer: little}, base.read, base.activations, base.logits)
            values.append(read(metric, patch_edge(model, base, run, tokens, name), 0))
        assert scores.score(name) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-6), name


def test_estimates_along_activations_move_both_halves_together(family, halves):
    """One layer's halves are one group: with many steps its edges to the logits add up to what they do to the final stream."""
    model, pairs = model_of(family), make_pairs(((6, 2),))
    metric = whole_vocabulary(pairs)
    scores = mk.edge_attribution(model, pairs, metric, steps=30, rule="gauss-legendre", path="activation")
    base, source = (whole_run(model, p.tokens[0][None]) for p in (pairs.corrupted, pairs.clean))
    change = sum(source.wrote[f"m3.n{i}"] - base.wrote[f"m3.n{i}"] for i in range(2))
    with torch.no_grad():
        patched = reference._logits(model.bridge, pairs.corrupted.tokens[0][None], (base.read["logits"] + change)[None])
    effect = read(metric, patched, 0) - read(metric, base.logits, 0)
    assert sum(scores.score(f"m3.n{i}->logits") for i in range(2)) == pytest.approx(effect, rel=1e-6)
    assert abs(effect) > 1e-2


# --- circuits


def test_circuits_are_what_whole_passes_give(family, halves):
    model, pairs = model_of(family), make_pairs(((6, 2), (5, 1)))
    metric = whole_vocabulary(pairs)
    ev = Evaluator(model, pairs, metric)
    graph = ev.graph
    generator = torch.Generator().manual_seed(0)
    circuits = torch.stack(
        [(torch.rand(graph.exists.shape, generator=generator) < s) & graph.exists for s in (0.8, 0.4)]
    )
    found = ev.evaluate(circuits)
    edges = [{edge.name for edge in graph.edges if bool(circuit[graph.index(edge)])} for circuit in circuits]
    for j in range(len(pairs)):
        tokens = (pairs.clean.tokens[j][None], pairs.corrupted.tokens[j][None])
        for i, logits in enumerate(run_circuits(model, *tokens, edges, graph)):
            expected = read(metric, logits, j)
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-8)
            assert all(abs(expected - float(ev.values[run][j])) > 1e-3 for run in ("clean", "corrupted"))  # control


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_all_edges_give_the_clean_run_and_none_the_ablated_one(family, halves, ablation):
    pairs = make_pairs()
    ev = Evaluator(model_of(family), pairs, whole_vocabulary(pairs), ablation)
    full, empty = ev.evaluate(torch.stack([ev.graph.exists, torch.zeros_like(ev.graph.exists)]))
    assert torch.allclose(full, ev.values["clean"], rtol=0, atol=1e-9)
    assert torch.allclose(empty, ev.values["ablated"], rtol=0, atol=1e-9)
    if ablation == "resample":
        assert torch.allclose(empty, ev.values["corrupted"], rtol=0, atol=1e-9)
    assert float((full - empty).abs().max()) > 1e-2


def test_halves_that_go_together_are_their_mlp(family, monkeypatch):
    """Under two ablations. (Zero ablation takes a whole MLP's bias away, which is neither half's.)"""
    model, pairs = model_of(family), make_pairs()
    metric = whole_vocabulary(pairs)
    wholes = {ablation: Evaluator(model, pairs, metric, ablation) for ablation in ("resample", "mean")}
    whole = wholes["resample"].graph
    assert "m0" in whole.writer_index
    assert "m0" in whole.reader_index
    members = (torch.rand(whole.exists.shape, generator=torch.Generator().manual_seed(1)) < 0.6) & whole.exists
    expected = {ablation: ev.evaluate(members[None]) for ablation, ev in wholes.items()}
    monkeypatch.setattr(_kinds, "KINDS", (Embedding(), Heads(), Halves(), Logits()))
    for ablation, values in expected.items():
        ev = Evaluator(model, pairs, metric, ablation)
        circuit = torch.zeros_like(ev.graph.exists)
        circuit.T[ev.graph.exists.T] = members[tuple(in_wholes(ev.graph, whole).T)]
        found = ev.evaluate(circuit[None])
        assert torch.allclose(found, values, rtol=0, atol=1e-8)
        assert float((found - ev.values["clean"]).abs().max()) > 1e-3


# --- path patching


def test_path_patching_into_both_halves_is_into_their_mlp(family, monkeypatch):
    """With everything frozen and with the halves in between reacting; alone, a half does something else."""
    model, pairs = model_of(family), make_pairs()

    def patched(receivers: list[str], freeze: str, senders: Sequence[str] | str = ("input", "a0.h1")) -> Tensor:
        more = {"senders": senders, "receivers": receivers, "freeze": freeze}
        return mk.path_patching(model, pairs, whole_vocabulary(pairs), **more, progress=False).values

    wholes = {freeze: patched(["m2", "a3.h1<q>"], freeze) for freeze in ("all", "heads")}
    monkeypatch.setattr(_kinds, "KINDS", (Embedding(), Heads(), Halves(), Logits()))
    for freeze, values in wholes.items():
        found = patched(["m2.n0", "m2.n1", "a3.h1<q>"], freeze)
        assert torch.allclose(found, values, rtol=0, atol=1e-9)
        assert float((patched(["m2.n0", "a3.h1<q>"], freeze) - values).abs().max()) > 1e-4
    assert patched(["logits"], "all", "layer half").shape == (4, 2, len(pairs))
    with pytest.raises(ValueError, match="'layer half' \\(all halves of MLPs\\)"):
        patched(["logits"], "all", "half")


# --- the rest


def test_searches_tables_files_and_pictures_work_with_it(family, halves, tmp_path):
    model, pairs = model_of(family), make_pairs(((6, 2), (5, 1)))
    metric = whole_vocabulary(pairs)
    scores = mk.edge_attribution(model, pairs, metric, steps=1)
    circuit = Circuit.from_scores(scores, n_edges=40, method="greedy")
    assert any(".n" in node.name for node in circuit.nodes)
    assert Circuit.from_json(circuit.to_json(tmp_path / "circuit.json"), model) == circuit
    with pytest.raises(ValueError, match="has heads and MLPs, and no halves of MLPs"):
        circuit.to_json(tmp_path / "mib.json", "mib")
    assert (
        mk.EdgeScores.load(scores.save(tmp_path / "scores.safetensors")).graph.writer_index == scores.graph.writer_index
    )
    drawn = circuit.to_networkx()
    assert {node.name for node in circuit.nodes} <= set(drawn)
    boxes = {box.text for box in circuit.plot().layout.annotations}
    assert {re.sub(r"^a(\d+)\.h(\d+)$", r"L\1H\2", node.name) for node in circuit.nodes} <= boxes
    thinned = mk.acdc(model, pairs, metric, threshold=0.05, start=circuit, progress=False)
    assert thinned <= circuit
    found = mk.optimal_ablation(model, pairs, writers=["m1.n0", "a0.h1"], steps=3, progress=False)
    assert found.losses.coords["writer"] == ("a0.h1", "m1.n0")
    assert torch.equal(found.importance.values, found.importance.values.clamp(min=0))
    mask = mk.learn_mask(model, pairs, metric, steps=2, progress=False)
    assert mask.gates.shape == scores.graph.exists.shape


def test_a_half_that_writes_a_constant(family, halves):
    """By hand: every edge of one half is ablated by a vector, which its half writes in a whole pass."""
    model, pairs = model_of(family), make_pairs(((6, 2),))
    metric = whole_vocabulary(pairs)
    graph = Graph.of(model)
    values = torch.randn(
        len(graph.writers), model.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    ev = Evaluator(model, pairs, metric, Constants(values, graph))
    half = graph.writer_index["m1.n1"]
    circuit = graph.exists.clone()
    circuit[half] = False
    tokens = pairs.clean.tokens[0][None]
    change = values[half] - whole_run(model, tokens).wrote["m1.n1"]

    def add(x: Tensor, hook: object) -> Tensor:
        return x.add_(change)

    with torch.no_grad():
        logits = model.bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_out", add)])
    assert float(ev.evaluate(circuit[None])) == pytest.approx(read(metric, logits, 0), abs=1e-8)
