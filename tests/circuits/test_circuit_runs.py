"""Running circuits against the naive way (`reference_circuits.run_circuit`, one hook at a time), the runs that circuits must
end in (all edges: clean; none: ablated), and gradients with respect to gates.

Norms of Gemma 2, Gemma 3 and OLMo 2 are float32 whatever the model's dtype is, and Mixtral is float32 altogether.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import mechkit as mk
from helpers import reference_circuits as reference
from helpers.families import FAMILIES, FLOAT32_INSIDE
from helpers.tiny import make_model, make_pairs, model_of, n_hooks, read, whole_vocabulary
from mechkit.circuits import Constants, Graph
from mechkit.circuits._evaluation import ABLATIONS, Evaluator
from mechkit.circuits._runs import CircuitRuns
from mechkit.circuits._writings import written
from mechkit.engine import frozen_parameters
from mechkit.hooks import Parts, record
from mechkit.prompts import Stacked


def random_circuits(graph: Graph, *shares: float, seed: int = 0) -> Tensor:
    """`[circuit writer reader]`, each with about such a share of all edges."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [(torch.rand(graph.exists.shape, generator=generator) < share) & graph.exists for share in shares]
    )


def full_and_empty(graph: Graph) -> Tensor:
    return torch.stack([graph.exists, torch.zeros_like(graph.exists)])


@functools.cache
def evaluator(family: str, ablation: str = "resample") -> Evaluator:
    pairs = make_pairs()
    return Evaluator(model_of(family), pairs, whole_vocabulary(pairs), ablation)


def names_of(graph: Graph, circuit: Tensor) -> list[str]:
    return [edge.name for edge in graph.edges if bool(circuit[graph.index(edge)])]


def oracle(model: mk.HookedModel, pairs: mk.PromptPairs, metric: mk.Metric, circuits: Tensor) -> Tensor:
    graph = Graph.of(model)
    values = torch.empty(len(circuits), len(pairs), dtype=torch.float64)
    names = [names_of(graph, circuit) for circuit in circuits]
    for j in range(len(pairs)):
        tokens = (pairs.clean.tokens[j][None], pairs.corrupted.tokens[j][None])
        logits = reference.run_circuits(model, *tokens, names)
        values[:, j] = torch.tensor([read(metric, of_circuit, j) for of_circuit in logits], dtype=torch.float64)
    return values


# --- the oracle


@pytest.mark.parametrize("family", FAMILIES)
def test_random_circuits(family):
    model, pairs = model_of(family), make_pairs()[[0, 2]]
    metric = whole_vocabulary(pairs)
    ev = Evaluator(model, pairs, metric)
    circuits = random_circuits(ev.graph, 0.8, 0.4)
    found, expected = ev.evaluate(circuits).double(), oracle(model, pairs, metric, circuits)
    size = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= (1e-5 if family in FLOAT32_INSIDE else 1e-8) * size
    gaps = [float((expected - ev.values[run]).abs().amax(1).min()) for run in ("clean", "corrupted")]
    assert min(gaps) > 1e-2  # control: they are neither of the two runs


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon"])
def test_whole_logits_of_random_circuits_at_every_position(family):
    """Not through the evaluator: the final stream itself, at all positions from the first difference on."""
    model, pairs = model_of(family), make_pairs(((7, 2), (7, 4)))
    graph, parts, start = Graph.of(model), Parts(model), 2
    clean, corrupted = (torch.stack(list(p.tokens)) for p in (pairs.clean, pairs.corrupted))
    ablated = written(graph, parts, record(model, corrupted, graph.recorded).sites, start)
    runs = CircuitRuns(model, graph, parts, Stacked(clean), ablated, start)
    circuits = random_circuits(graph, 0.8, 0.4, seed=1)
    with torch.no_grad():
        logits = model.unembed(runs.final(circuits, torch.tensor([0, 1])))
    for j in (0, 1):
        expected = reference.run_circuit(model, clean[j][None], corrupted[j][None], names_of(graph, circuits[j]))
        assert torch.allclose(logits[j], expected[0, start:], rtol=0, atol=1e-8)


# --- the runs at both ends


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_edges_give_the_clean_run_and_none_the_corrupted_one(family, dtype):
    """At most 1e-4 off, as a share of the logits' spread; in float64 far less."""
    if family == "mixtral" and dtype == torch.float64:
        pytest.skip("its kernels have no float64")
    model = model_of(family) if dtype == torch.float64 else make_model(family, dtype)
    pairs = make_pairs(((7, 2), (7, 4), (7, 3)))
    graph, parts, start = Graph.of(model), Parts(model), 2
    clean, corrupted = (torch.stack(list(p.tokens)) for p in (pairs.clean, pairs.corrupted))
    ablated = written(graph, parts, record(model, corrupted, graph.recorded).sites, start)
    runs = CircuitRuns(model, graph, parts, Stacked(clean), ablated, start)
    with torch.no_grad():
        gates = full_and_empty(graph).repeat_interleave(3, 0)
        found = model.unembed(runs.final(gates, torch.arange(3).repeat(2)))
        expected = torch.cat([model(clean), model(corrupted)])[:, start:]
    off = (found - expected).abs().max() / (expected - expected.mean(-1, keepdim=True)).abs().max()
    assert float(off) <= (1e-10 if dtype == torch.float64 and family not in FLOAT32_INSIDE else 1e-4)
    assert float((expected[:3] - expected[3:]).abs().max()) > 1e-2  # control: the runs differ


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_edges_give_the_clean_metric_whatever_is_put_in(family, ablation):
    ev = evaluator(family, ablation)
    circuits = torch.cat([full_and_empty(ev.graph), random_circuits(ev.graph, 0.5)])
    full, empty, half = ev.evaluate(circuits)
    atol = (1e-4 if family in FLOAT32_INSIDE else 1e-9) * float(ev.values["clean"].abs().max())
    assert torch.allclose(full, ev.values["clean"], rtol=0, atol=atol)
    assert torch.allclose(empty, ev.values["ablated"], rtol=0, atol=atol)
    if ablation == "resample":
        assert torch.allclose(empty, ev.values["corrupted"], rtol=0, atol=atol)
    else:
        assert float((empty - ev.values["corrupted"]).abs().max()) > 1e-3
    assert float((half - full).abs().max()) > 1e-3
    assert float((empty - full).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_what_means_and_zeros_are(family):
    """The empty circuit reads the sum of all ablated values and what biases write; by hand, with the means of whole runs."""
    model, pairs = model_of(family), make_pairs()
    metric = whole_vocabulary(pairs)
    wrote = [reference.whole_run(model, tokens[None]).wrote for tokens in pairs.corrupted.tokens]
    clean = [reference.whole_run(model, tokens[None]) for tokens in pairs.clean.tokens]
    graph = Graph.of(model)

    def mean(name: str, j: int, ablation: str) -> Tensor:
        if ablation == "zero":
            return torch.zeros_like(wrote[j][name])
        if ablation == "position_mean":
            return torch.stack(
                [
                    torch.stack([w[name][at] for w in wrote if len(w[name]) > at]).mean(0)
                    for at in range(len(wrote[j][name]))
                ]
            )
        return torch.cat([w[name] for w in wrote]).mean(0).expand_as(wrote[j][name])

    for ablation in ("zero", "mean", "position_mean"):
        empty = evaluator(family, ablation).evaluate(full_and_empty(graph)[1:])[0]
        for j in range(3):
            change = sum(mean(w.name, j, ablation) - clean[j].wrote[w.name] for w in graph.writers)
            stream = clean[j].read["logits"] + change
            name = f"blocks.{model.n_layers - 1}.hook_resid_post"
            with torch.no_grad(), model.hooks([(name, lambda x, hook, stream=stream: stream[None])]):
                logits = model(pairs.clean.tokens[j][None])
            assert float(empty[j]) == pytest.approx(read(metric, logits, j), abs=1e-8)


def test_constants():
    """Given vectors. Zeros are the zero ablation; others are what readers of absent edges see."""
    model, pairs = model_of("llama"), make_pairs()
    graph, metric = Graph.of(model), whole_vocabulary(pairs)
    values = torch.randn(
        len(graph.writers), model.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    circuits = torch.cat([full_and_empty(graph), random_circuits(graph, 0.6)])
    zeros = Evaluator(model, pairs, metric, Constants(torch.zeros_like(values), graph))
    assert torch.equal(zeros.evaluate(circuits), evaluator("llama", "zero").evaluate(circuits))
    ev = Evaluator(model, pairs, metric, Constants(values, graph))
    full, empty, _ = ev.evaluate(circuits)
    assert torch.allclose(full, ev.values["clean"], rtol=0, atol=1e-9)
    for j in range(3):
        run = reference.whole_run(model, pairs.clean.tokens[j][None])
        stream = run.read["logits"] + sum(values[i] - run.wrote[w.name] for i, w in enumerate(graph.writers))
        with torch.no_grad(), model.hooks([("blocks.3.hook_resid_post", lambda x, hook, stream=stream: stream[None])]):
            logits = model(pairs.clean.tokens[j][None])
        assert float(empty[j]) == pytest.approx(read(metric, logits, j), abs=1e-8)
    # one edge removed: its reader alone sees the constant
    without = graph.exists.clone()
    without[graph.index(graph.edge("m0->a2.h1<q>"))] = False
    found = ev.evaluate(without[None])[0]
    for j in range(3):
        run = reference.whole_run(model, tokens := pairs.clean.tokens[j][None])
        source = reference.Run(
            run.wrote | {"m0": values[graph.writer_index["m0"]].expand(len(tokens[0]), -1)}, {}, {}, run.logits
        )
        logits = reference.patch_edge(model, run, source, tokens, "m0->a2.h1<q>")
        assert float(found[j]) == pytest.approx(read(metric, logits, j), abs=1e-8)


# --- what must not change anything


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gptj"])
def test_layers_below_the_first_missing_edge_may_be_skipped(family):
    ev = evaluator(family)
    list(ev.chunks())  # the unedited runs are recorded
    atol = 1e-4 if family in FLOAT32_INSIDE else 1e-9
    for layer in range(5):
        circuits = random_circuits(ev.graph, 0.5, 0.8, seed=layer)
        below = torch.tensor([reader.layer < layer for reader in ev.graph.readers])
        circuits |= ev.graph.exists & below
        before = ev.block_tokens
        whole = ev.evaluate(circuits)
        middle = ev.block_tokens
        short = ev.evaluate(circuits, first_layer=layer)
        assert torch.allclose(short, whole, rtol=0, atol=atol)
        assert (ev.block_tokens - middle) * 4 == (middle - before) * (4 - layer)  # and they are
    with_missing = random_circuits(ev.graph, 0.5, seed=9)
    wrong = ev.evaluate(with_missing, first_layer=2) - ev.evaluate(with_missing)
    assert float(wrong.abs().max()) > 1e-3  # control: that nothing is missing below matters


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("ablation", ["resample", "mean", "position_mean"])
def test_small_memory_and_pairs_by_themselves(family, ablation):
    model, pairs = model_of(family), make_pairs()
    ev = evaluator(family, ablation)
    circuits = random_circuits(ev.graph, 0.9, 0.6, 0.3)
    expected, atol = ev.evaluate(circuits), 1e-4 if family in FLOAT32_INSIDE else 1e-9
    little = Evaluator(model, pairs, whole_vocabulary(pairs), ablation, budget=2**14)
    assert torch.allclose(little.evaluate(circuits), expected, rtol=0, atol=atol)
    for run, values in little.values.items():
        assert torch.allclose(values, ev.values[run], rtol=0, atol=atol)
    one_by_one = torch.cat([ev.evaluate(circuit[None]) for circuit in circuits])
    assert torch.allclose(one_by_one, expected, rtol=0, atol=atol)
    if ablation == "resample":
        for j in range(3):
            alone = Evaluator(model, pairs[[j]], whole_vocabulary(pairs[[j]])).evaluate(circuits)[:, 0]
            assert torch.allclose(alone, expected[:, j], rtol=0, atol=atol)


def test_metrics_of_every_kind():
    """KL from the clean run, a callable, a metric that reads before the end: each against the oracle's logits."""
    model, pairs = model_of("llama"), make_pairs(((7, 3), (7, 2)))
    pairs = mk.PromptPairs(pairs.clean, pairs.corrupted, pairs.right, pairs.wrong, {"MIDDLE": torch.tensor([4, 5])})
    graph = Graph.of(model)
    circuits = random_circuits(graph, 0.8, 0.4)
    names = [names_of(graph, circuit) for circuit in circuits]
    tokens = zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)
    runs = [reference.run_circuits(model, c[None], x[None], names) for c, x in tokens]
    logits = torch.stack(runs, 1)  # [circuit prompt pos d_vocab]
    target = torch.stack([reference.whole_run(model, c[None]).logits[0, -1] for c in pairs.clean.tokens]).log_softmax(
        -1
    )
    kl = (target.exp() * (target - logits[:, :, -1].log_softmax(-1))).sum(-1)
    middle = logits[:, torch.arange(2), torch.tensor([4, 5])]
    mixture = whole_vocabulary(pairs, "MIDDLE")
    everywhere = logits[..., 5].mean(2)
    expected = {
        "kl": (mk.kl_divergence(pairs), kl),
        "logit_diff": (mk.logit_diff(pairs), logits[:, :, -1, 5] - logits[:, :, -1, 7]),
        "before the end": (mixture, torch.stack([mixture.read(m, torch.arange(2), None) for m in middle])),
        "callable": (lambda x: x[..., 5].mean(1), everywhere),
    }
    for what, (metric, values) in expected.items():
        ev = Evaluator(model, pairs, metric)
        assert torch.allclose(ev.evaluate(circuits), values, rtol=0, atol=1e-8), what
        assert torch.allclose(ev.evaluate(full_and_empty(graph)[:1])[0], ev.values["clean"], rtol=0, atol=1e-9), what


# --- gradients


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma2", "falcon"])
def gated(request: pytest.FixtureRequest) -> tuple[str, CircuitRuns, Tensor]:
    """A family, its runs on two prompts, and gates between 0 and 1."""
    model, pairs = model_of(request.param), make_pairs(((6, 2), (6, 3)))
    graph, parts, start = Graph.of(model), Parts(model), 2
    clean, corrupted = (torch.stack(list(p.tokens)) for p in (pairs.clean, pairs.corrupted))
    ablated = written(graph, parts, record(model, corrupted, graph.recorded).sites, start)
    runs = CircuitRuns(model, graph, parts, Stacked(clean), ablated, start)
    gates = torch.rand(2, *graph.exists.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return request.param, runs, gates * graph.exists


def test_runs_with_gradients_are_the_same_runs(gated):
    family, runs, gates = gated
    prompt = torch.arange(2)
    before = n_hooks(runs.model)
    with torch.no_grad():
        expected = runs.final(gates, prompt)
    with frozen_parameters(runs.model):
        found = runs.final(gates.clone().requires_grad_(), prompt)
    assert found.requires_grad
    assert torch.allclose(found, expected, rtol=0, atol=1e-4 if family == "gemma2" else 1e-10)
    assert n_hooks(runs.model) == before


def test_gradients_of_gates(gated):
    """Central differences along a random direction and along single gates."""
    family, runs, gates = gated
    prompt, generator = torch.arange(2), torch.Generator().manual_seed(1)
    weights = torch.randn(runs.final(gates, prompt).shape, dtype=torch.float64, generator=generator)
    with frozen_parameters(runs.model):
        leaf = gates.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((runs.final(leaf, prompt) * weights).sum(), leaf)
    exists = runs.graph.exists.double()
    directions = [torch.randn(gates.shape, dtype=torch.float64, generator=generator) * exists]
    for at in exists.nonzero()[torch.randperm(int(exists.sum()), generator=generator)[:5]].tolist():
        one = torch.zeros_like(gates)
        one[:, at[0], at[1]] = 1
        directions.append(one)
    rounded = family in ("gemma2", "llama")  # float32 inside the norms: larger steps, coarser agreement
    h = 1e-2 if rounded else 1e-4

    def value(gates: Tensor) -> float:
        with torch.no_grad():
            return float((runs.final(gates, prompt) * weights).sum())

    size = float(gradient.abs().max())
    for direction in directions:
        h_ = h / float(direction.norm())
        steps = [value(gates + k * h_ * direction) for k in (-2, -1, 1, 2)]
        slope = (steps[0] - 8 * steps[1] + 8 * steps[2] - steps[3]) / (12 * h_)
        assert float((gradient * direction).sum()) == pytest.approx(
            slope, abs=(1e-3 if rounded else 1e-7) * max(size, abs(slope))
        )
    assert float(gradient[:, ~runs.graph.exists].abs().max()) == 0
    assert size > 1e-2


def test_gradients_of_ablated_values():
    """As optimal ablation needs them: constants with gradients, against central differences."""
    model, pairs = model_of("gpt2"), make_pairs(((6, 2), (6, 3)))
    graph, parts = Graph.of(model), Parts(model)
    clean = torch.stack(list(pairs.clean.tokens))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(graph.writers), model.d_model, dtype=torch.float64, generator=generator)
    runs = CircuitRuns(model, graph, parts, Stacked(clean), Constants(values, graph).written(), 0)
    circuit = random_circuits(graph, 0.5, 0.5)
    direction = torch.randn(values.shape, dtype=torch.float64, generator=generator)
    weights = torch.randn(2, 6, model.d_model, dtype=torch.float64, generator=generator)

    def value(values: Tensor) -> Tensor:
        final = runs.final(circuit.double(), torch.arange(2), ablated=Constants(values, graph).written())
        return (final * weights).sum()

    leaf = values.clone().requires_grad_()
    with frozen_parameters(model):
        (gradient,) = torch.autograd.grad(value(leaf), leaf)
    h = 1e-4 / float(direction.norm())
    with torch.no_grad():
        steps = [float(value(values + k * h * direction).detach()) for k in (-2, -1, 1, 2)]
        again = float((runs.final(circuit.double(), torch.arange(2)) * weights).sum())
    slope = (steps[0] - 8 * steps[1] + 8 * steps[2] - steps[3]) / (12 * h)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6)
    assert again == pytest.approx(float(value(values).detach()), rel=1e-12)  # given later or at first: the same


# --- SmolLM2


def test_smollm2(smollm2):
    """The issue's bar: at most 1e-4."""
    pairs = mk.tasks.ioi(smollm2, n=4, seed=0)
    ev = Evaluator(smollm2, pairs, mk.logit_diff(pairs))
    full, empty = ev.evaluate(full_and_empty(ev.graph))
    assert float((full - ev.values["clean"]).abs().max()) <= 1e-4
    assert float((empty - ev.values["corrupted"]).abs().max()) <= 1e-4
    for run in ("clean", "corrupted"):
        with torch.no_grad():
            logits = [smollm2(tokens[None])[0, -1] for tokens in getattr(pairs, run).tokens]
        for j, (right, wrong) in enumerate(pairs.answers):
            assert float(ev.values[run][j]) == pytest.approx(float(logits[j][right[0]] - logits[j][wrong[0]]), abs=1e-4)
    assert float((full - empty).abs().mean()) > 0.5
    assert ev.graph.n_edges == 70_651
    for chunk in ev.chunks():
        runs, n = chunk.runs, len(chunk.ids)
        with torch.no_grad():
            final = runs.final(full_and_empty(ev.graph).repeat_interleave(n, 0), torch.arange(n).repeat(2))
            found = smollm2.unembed(final[:, -1])
            for i, run in enumerate(("clean", "corrupted")):
                tokens = torch.stack([getattr(pairs, run).tokens[j] for j in chunk.ids])
                logits = smollm2(tokens)[:, -1]
                off = (found[i * n : (i + 1) * n] - logits).abs().max()
                print(
                    f"{run}: logits off by {float(off):.1e}, spread {float((logits - logits.mean(-1, True)).abs().max()):.1f}"
                )
                assert float(off / (logits - logits.mean(-1, keepdim=True)).abs().max()) <= 1e-4


# --- refusals


def test_refusals():
    model, pairs = model_of("llama"), make_pairs()
    metric = whole_vocabulary(pairs)
    with pytest.raises(ValueError, match="pairs: expected PromptPairs"):
        Evaluator(model, pairs.clean, metric)
    with pytest.raises(ValueError, match="ablation: expected one of 'resample', 'zero'"):
        Evaluator(model, pairs, metric, "noise")
    other = Graph.of(model_of("gpt2"))
    with pytest.raises(ValueError, match="ablation: expected constants for"):
        Evaluator(model, pairs, metric, Constants(torch.zeros(len(other.writers), 32), other))
    with pytest.raises(ValueError, match="lengths"):
        Evaluator(model, pairs, lambda logits: logits[:, -1, 5])
    huge = torch.full((len(Graph.of(model).writers), 32), 1e308, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"finite|nan"):
        Evaluator(model, pairs, metric, Constants(huge, Graph.of(model))).evaluate(full_and_empty(Graph.of(model)))
    model.bridge.original_model.train()
    try:
        with pytest.raises(ValueError, match="model: expected evaluation mode"):
            Evaluator(model, pairs, metric)
    finally:
        model.bridge.original_model.eval()
    assert not model.has_hooks
