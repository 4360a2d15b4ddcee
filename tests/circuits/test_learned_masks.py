"""Learned masks: gates of hand-written models, gradients against finite differences, gates in between against a naive run."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import mechkit as mk
from helpers import reference_circuits as naive
from helpers.families import FAMILIES, build_hf
from mechkit.circuits._evaluation import Evaluator
from mechkit.circuits._objective import Objective, rows_with_gradients
from mechkit.circuits._runs import CircuitRuns
from mechkit.circuits.areas import roc
from mechkit.circuits.circuit import Circuit
from mechkit.circuits.evaluation import evaluate_circuit
from mechkit.circuits.graph import Graph
from mechkit.circuits.learned_masks import LearnedMask, MaskSettings, _Gates, learn_mask
from mechkit.engine import frozen_parameters

KNOWN: dict[str, Callable[[], Any]] = {
    "induction": lambda: mk.zoo.induction(4, n_tokens=6),
    "serial_ioi": mk.zoo.serial_ioi,
    "greater_than": mk.zoo.greater_than,
    "saturated query": lambda: mk.zoo.saturated_attention("query"),
    "saturated key": lambda: mk.zoo.saturated_attention("key"),
}


@cache
def family(name: str) -> mk.HookedModel:
    dtype = torch.float32 if name == "mixtral" else torch.float64
    return mk.HookedModel.from_hf(build_hf(name, dtype), name=name)


def ragged(n: int = 4, seed: int = 0) -> mk.PromptPairs:
    """Pairs of 6 and 7 tokens that differ from position 2 or 3 on."""
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted, answers = [], [], []
    for i in range(n):
        a = torch.randint(3, 61, (6 + i % 2,), generator=generator)
        b = a.clone()
        b[2 + i % 2 :] = 3 + (b[2 + i % 2 :] + 11) % 58
        clean.append(a)
        corrupted.append(b)
        answers.append(tuple(torch.randperm(61, generator=generator)[:2].tolist()))
    return mk.PromptPairs.from_tokens(clean, corrupted, answers)


def objective(model: mk.HookedModel, pairs: mk.PromptPairs, name: Any = "kl", **arguments: Any) -> Objective:
    metric = mk.kl_divergence(pairs) if name == "kl" else mk.logit_diff(pairs)
    return Objective(Evaluator(model, pairs, metric, **arguments), name)


def random_gates(graph: Graph, rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, *graph.exists.shape, dtype=torch.float64, generator=generator) * graph.exists


# -- known circuits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_gates_are_the_known_circuit(name: str) -> None:
    known = KNOWN[name]()
    mask = learn_mask(known.model, known.pairs, mk.logit_diff, steps=50, progress=False)
    truth = Circuit.from_edges(known.model, known.circuit)
    assert roc(mask.scores, truth).auroc == 1
    assert mask.circuit() == truth
    assert mask.circuit(n_edges=truth.n_edges) == truth
    assert mask.faithfulness.value == pytest.approx(1, abs=1e-6)
    gates = mask.gates[mask.scores.graph.exists]
    assert set(gates.tolist()) == {0.0, 1.0}  # nothing is left in between
    loss, n_open = (mask.history.sel(quantity=q).values for q in ("loss", "expected open"))
    assert n_open[0] > 0.9 * truth.graph.n_edges
    assert n_open[-1] < 2 * truth.n_edges
    assert loss[-10:].mean() < 0.05


def test_a_price_above_what_is_saved_closes_gates_and_a_lower_one_opens_them() -> None:
    """The MLP takes 0.2 of up to 4 logits back: half a percent of the divergence, and it needs two of 46 gates."""
    known = mk.zoo.cancellation()
    truth = Circuit.from_edges(known.model, known.circuit)
    dear = learn_mask(known.model, known.pairs, steps=50, penalty=0.02, progress=False)
    assert {edge.name for edge in dear.circuit()} == {"input->a0.h0<v>", "a0.h0->logits"}
    assert 0.98 < dear.faithfulness.value < 1 - 1e-4
    cheap = learn_mask(known.model, known.pairs, steps=100, penalty=1e-4, progress=False)
    assert cheap.circuit() == truth
    assert roc(cheap.scores, truth).auroc == 1
    assert cheap.faithfulness.value == pytest.approx(1, abs=1e-6)


def test_edges_that_cancel_each_other_go_together() -> None:
    """Why the AUROC is no aim here: writer and eraser are in the known circuit, but without both nothing is missing."""
    known = mk.zoo.writer_and_eraser()
    mask = learn_mask(known.model, known.pairs, mk.logit_diff, steps=120, progress=False)
    assert {edge.name for edge in mask.circuit()} == {"input->a0.h1<v>", "a0.h1->logits"}
    assert mask.faithfulness.value == pytest.approx(1, abs=1e-6)
    truth = Circuit.from_edges(known.model, known.circuit)
    assert mask.circuit() <= truth
    both = evaluate_circuit(truth, known.model, known.pairs, known.metric, random=0, sets=0, progress=False)
    assert both.faithfulness.value == pytest.approx(1, abs=1e-6)  # the larger one is no better


@pytest.mark.parametrize("objective_name", ["kl", "metric"])
def test_nodes(objective_name: Any) -> None:
    known = mk.zoo.serial_ioi()
    mask = learn_mask(
        known.model, known.pairs, mk.logit_diff, over="node", objective=objective_name, steps=50, progress=False
    )
    graph = mask.scores.graph
    open_ = {w.name for i, w in enumerate(graph.writers) if mask.gates[i].max() == 1}
    assert open_ == {"input", "a0.h0", "a1.h0", "a2.h0"}
    for gates in (mask.gates, mask.scores.values.nan_to_num()):  # one gate per writer
        for w in range(len(graph.writers)):
            assert len(set(gates[w][graph.exists[w]].tolist())) == 1
    expected = graph.exists & torch.tensor([w.name in open_ for w in graph.writers])[:, None]
    assert torch.equal(mask.circuit(prune=False).members, expected)
    assert mask.circuit().n_edges < int(expected.sum())
    assert mask.faithfulness.value == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="n_edges: expected None, since a node's edges share a gate"):
        mask.circuit(n_edges=3)


def test_metric_objective_and_target() -> None:
    known = mk.zoo.greater_than()
    truth = Circuit.from_edges(known.model, known.circuit)
    mask = learn_mask(
        known.model, known.pairs, known.metric, objective="metric", target=truth.n_edges, steps=50, progress=False
    )
    assert mask.circuit() == truth
    assert mask.history.sel(quantity="expected open").values[-1] == pytest.approx(truth.n_edges, rel=0.2)
    price = mask.history.sel(quantity="penalty").values
    assert price[0] == 5e-4
    assert price.max() > 5e-4
    assert (price > 0).all()
    larger = learn_mask(known.model, known.pairs, target=20, steps=50, progress=False)
    n_open = larger.history.sel(quantity="expected open").values
    assert truth.n_edges - 0.1 < n_open[-1] < 21  # at most the target: what is not needed may close
    assert truth <= larger.circuit(threshold=0.5, prune=False)
    assert larger.history.sel(quantity="penalty").values.max() <= 10 / 20


def test_no_more_gates_than_the_target() -> None:
    """On a random model, where every component does something: too high a price cannot be reached by gates that are wide open."""
    model, pairs = family("gpt2"), ragged(6)
    mask = learn_mask(model, pairs, over="node", target=8, steps=45, batch=6, held_out=0, progress=False)
    open_ = mask.scores.values.nan_to_num().amax(1)
    assert 0 < int((open_ > 0.5).sum()) <= 8
    assert 0 < int((mask.gates.amax(1) > 0).sum()) <= 8
    assert len({edge.writer for edge in mask.circuit()}) <= 8
    assert open_.max() < 0.999  # nothing out of the price's reach
    found = mask.found_on.sel(run="gates")
    assert found.values.mean() < 0.9 * found.baseline["corrupted"].mean()  # they are not just any
    edges = learn_mask(model, pairs, target=25, steps=12, batch=6, held_out=0, progress=False)
    assert 0 < int((edges.gates > 0).sum()) <= 25
    assert int((edges.scores.values.nan_to_num() > 0).sum()) == 25  # the others are shut for good


def test_it_trains_where_the_metric_reads() -> None:
    model, pairs = family("gpt2"), ragged(4)
    early = mk.PromptPairs.from_tokens(
        pairs.clean.tokens,
        pairs.corrupted.tokens,
        [(5, 7)] * 4,
        positions={"MID": [int(n) - 2 for n in pairs.clean.lengths]},
    )
    quiet: dict[str, Any] = {"steps": 3, "batch": 4, "held_out": 0, "progress": False}
    by_metric = learn_mask(model, early, mk.logit_diff(early, position="MID"), **quiet)
    by_name = learn_mask(model, early, position="MID", **quiet)
    by_divergence = learn_mask(model, early, mk.kl_divergence(early, position="MID"), **quiet)
    assert torch.equal(by_metric.gates, by_name.gates)
    assert torch.equal(by_metric.gates, by_divergence.gates)
    assert torch.equal(by_name.found_on.values, by_divergence.found_on.values)  # what is reported is read there too
    assert by_metric.scores.provenance["trained_at"] == "MID"
    last = learn_mask(model, early, **quiet)
    assert last.scores.provenance["trained_at"] == "END"
    assert not torch.equal(last.gates, by_name.gates)
    constants = [
        mk.optimal_ablation(model, early, m, position=p, writers=["m1"], steps=2, progress=False)
        for m, p in ((None, "MID"), (mk.logit_diff(early, position="MID"), None), (None, None))
    ]
    assert torch.equal(constants[0].values, constants[1].values)
    assert not torch.equal(constants[0].values, constants[2].values)
    circuits = [
        mk.acdc(model, early, m, threshold=0.3, position=p, progress=False)
        for m, p in ((None, "MID"), (mk.kl_divergence(early, position="MID"), None), (None, None))
    ]
    assert circuits[0].provenance["distance"] == pytest.approx(circuits[1].provenance["distance"])
    assert [c.provenance["distance_at"] for c in circuits] == ["MID", "MID", "END"]
    with pytest.raises(ValueError, match="position: expected None with a metric"):
        mk.acdc(model, early, mk.logit_diff, threshold=0.3, position="MID")
    with pytest.raises(ValueError, match="position: expected None with objective='metric'"):
        learn_mask(model, early, mk.logit_diff, objective="metric", position="MID", **quiet)


# -- gradients and gates in between ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kl", "metric"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "falcon", "llama", "gemma2", "olmo2", "bloom", "phi", "gptj"])
def test_gradient_of_gates_against_finite_differences(name: str, loss: str) -> None:
    """The first three compute in float64 throughout; the others take norms, rotations or the softmax in float32."""
    step, tolerance = (1e-3, 1e-8) if name in ("gpt2", "gpt_neox", "falcon") else (2e-2, 2e-4)
    model, pairs = family(name), ragged(2)
    with frozen_parameters(model):
        task = objective(model, pairs, loss)
        graph, prompts = task.evaluator.graph, torch.tensor([1, 0, 1])
        gates = 0.1 + 0.8 * random_gates(graph, 3)
        total, slope = task.slope_of_gates(gates, prompts)
        generator = torch.Generator().manual_seed(1)
        for i in range(3):
            way = torch.randn(gates.shape, dtype=torch.float64, generator=generator) * graph.exists
            way = (slope if i == 0 else way) / (slope if i == 0 else way).norm()

            def difference(h: float, way: Tensor = way) -> float:
                return sum(sign * task.slope_of_gates(gates + sign * h * way, prompts)[0] for sign in (1, -1)) / (2 * h)

            found = (4 * difference(step) - difference(2 * step)) / 3  # Richardson: the error is of fourth order
            assert abs(found - float((slope * way).sum())) < tolerance * float(slope.norm())
    assert total > 0
    assert int((slope != 0).sum()) > 0.9 * 3 * graph.n_edges  # a control: nearly every gate matters in these models
    assert not slope[:, ~graph.exists].any()


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon", "gemma2"])
def test_gates_in_between_against_a_naive_run(name: str) -> None:
    model, pairs = family(name), ragged(2)
    with torch.no_grad():
        task = objective(model, pairs, "metric")
        graph = task.evaluator.graph
        gates = random_gates(graph, 1)
        for chunk in task.chunks():
            final = chunk.runs.final(gates, torch.tensor([0]))
            (i,) = chunk.ids.tolist()
            expected = _naive_gates(
                model, pairs.clean.tokens[i][None], pairs.corrupted.tokens[i][None], gates[0], graph
            )
            got = model.unembed(final)[0]
            assert (got - expected[0, chunk.runs.start :]).abs().max() < 1e-5 * expected.abs().max()
            far = naive.run_circuit(model, pairs.clean.tokens[i][None], pairs.corrupted.tokens[i][None], [])
            assert (got - far[0, chunk.runs.start :]).abs().max() > 1e-2 * expected.abs().max()


def _naive_gates(model: mk.HookedModel, clean: Tensor, corrupted: Tensor, gates: Tensor, graph: Graph) -> Tensor:
    """`reference_circuits.run_circuit` with numbers in place of edges."""
    bridge = model.bridge
    base = naive.whole_run(bridge, corrupted)
    wrote = {"input": naive.whole_run(bridge, clean).wrote["input"]}

    def stream(reader: str) -> Tensor:
        r = graph.reader_index[reader]
        return base.read[reader][None] + sum(
            gates[graph.writer_index[w], r] * (wrote[w] - base.wrote[w]) for w in naive.writers_of(bridge, reader)
        )

    for layer in range(bridge.cfg.n_layers):
        streams = {reader: stream(reader) for _, _, reader in naive._attention_readers(bridge, layer)}
        wrote |= naive._heads(bridge, layer, corrupted, naive._qkv(bridge, layer, corrupted, streams))
        wrote[f"m{layer}"] = naive._mlp(bridge, layer, corrupted, stream(f"m{layer}"))
    return naive._logits(bridge, corrupted, stream("logits"))


@pytest.mark.parametrize("ablation", ["resample", "zero", "mean", "position_mean"])
def test_open_gates_give_the_clean_run_and_closed_ones_the_ablated_run(ablation: Any) -> None:
    model, pairs = family("gpt2"), ragged(3)
    with frozen_parameters(model):
        task = objective(model, pairs, ablation=ablation)
        graph, everyone = task.evaluator.graph, torch.arange(3)
        whole, slope = task.slope_of_gates(graph.exists.double().repeat(3, 1, 1), everyone)
        nothing, _ = task.slope_of_gates(torch.zeros(3, *graph.exists.shape, dtype=torch.float64), everyone)
    assert abs(whole) < 1e-12
    assert slope.abs().max() < 1e-5  # the clean run is where the divergence is least
    assert nothing / 3 == pytest.approx(task.loss_of_nothing(), rel=1e-10)
    assert nothing > 0.1


# -- the distribution --------------------------------------------------------------------------------------------------


def test_hard_concrete_gates() -> None:
    graph = Graph(2, 2, 2)
    gates = _Gates(graph, settings(temperature=0.5))
    with torch.no_grad():
        gates.log_alpha.copy_(torch.linspace(-4, 4, graph.exists.numel()).reshape(graph.exists.shape))
    drawn = gates.drawn(20_000, torch.Generator().manual_seed(0))[:, graph.exists].detach()
    assert drawn.min() == 0
    assert drawn.max() == 1
    assert ((drawn > 0) & (drawn < 1)).any()
    probability = gates.open_probability()[graph.exists].detach()
    assert ((drawn > 0).double().mean(0) - probability).abs().max() < 0.015
    a, t = gates.log_alpha[graph.exists].detach(), 0.5
    assert torch.allclose(probability, 1 / (1 + torch.exp(t * math.log(0.1 / 1.1) - a)))
    wide_open = 1 - 1 / (1 + torch.exp(a - t * math.log(11)))  # s above 11 / 12, by symmetry of the logistic
    assert ((drawn == 1).double().mean(0) - wide_open).abs().max() < 0.015
    final = gates.final()
    assert torch.allclose(final[graph.exists], (1.2 / (1 + torch.exp(-a)) - 0.1).clamp(0, 1))
    assert not final[~graph.exists].any()


def settings(**changes: Any) -> MaskSettings:
    arguments = {"over": "edge", "objective": "kl", "penalty": 1.0, "target": None, "steps": 10, "batch": 4, "lr": 0.3}
    return MaskSettings(**{**arguments, "temperature": 2 / 3, "held_out": 0.5, "seed": 0, **changes})


# -- the rest ----------------------------------------------------------------------------------------------------------


def learn(model: mk.HookedModel, pairs: mk.PromptPairs, metric: Any = None, **arguments: Any) -> LearnedMask:
    return learn_mask(model, pairs, metric, **{"steps": 4, "batch": 5, "progress": False, **arguments})


def test_the_seed_decides_everything() -> None:
    model, pairs = family("gpt2"), ragged(4)
    state = torch.random.get_rng_state()
    first, again, other = (learn(model, pairs, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.gates, again.gates)
    assert torch.equal(first.history.values, again.history.values)
    assert torch.equal(first.scores.values.nan_to_num(), again.scores.values.nan_to_num())
    assert not torch.equal(first.gates, other.gates)
    assert first.gates.dtype == torch.float64


def test_training_and_held_out_prompts() -> None:
    model, pairs = family("llama"), ragged(5)
    mask = learn(model, pairs, mk.logit_diff, held_out=0.4)
    assert mask.held_out is not None
    assert (mask.found_on.shape, mask.held_out.shape) == ((2, 3), (2, 2))
    assert mask.found_on.coords["run"] == ("gates", "circuit")
    report = evaluate_circuit(
        mask.circuit(), model, pairs, mk.logit_diff(pairs), random=0, sets=0, minimality=None, progress=False
    )
    assert report.found_on is not None
    assert report.held_out is not None
    assert (report.found_on.n_prompts, report.held_out.n_prompts) == (3, 2)
    assert report.held_out.value == pytest.approx(mask.faithfulness.value)
    everything = learn(model, pairs, held_out=0)
    assert everything.held_out is None
    assert everything.found_on.shape == (2, 5)
    assert everything.found_on.metric == "kl_divergence"
    assert "training prompts" in repr(everything)
    assert "held-out prompts" in repr(mask)
    assert mask.cost.block_tokens > 0
    assert mask.cost == mask.scores.cost


def test_gates_run_as_they_are() -> None:
    """The reported metric of `gates` is that of a run with these gates."""
    model, pairs = family("gpt2"), ragged(4)
    mask = learn(model, pairs, mk.logit_diff, held_out=0, lr=1.0)
    gates = mask.gates
    assert ((gates > 0.01) & (gates < 0.99)).any()
    values = Evaluator(model, pairs, mk.logit_diff(pairs)).evaluate(gates[None])[0]
    assert torch.allclose(values, mask.found_on.sel(run="gates").values)
    assert not torch.allclose(values, mask.found_on.sel(run="circuit").values)


def test_a_metric_or_what_makes_one() -> None:
    model, pairs = family("gpt2"), ragged(4)
    made, maker = (learn(model, pairs, metric, objective="metric") for metric in (mk.logit_diff(pairs), mk.logit_diff))
    assert torch.equal(made.gates, maker.gates)


@pytest.mark.parametrize("ablation", ["resample", "mean"])
def test_a_small_budget_gives_the_same_gates(ablation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = family("gpt2"), ragged(4)
    sizes: list[int] = []
    final = CircuitRuns.final

    def counted(self: CircuitRuns, gates: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(len(gates)) if gates.requires_grad else None
        return final(self, gates, *args, **kwargs)

    monkeypatch.setattr(CircuitRuns, "final", counted)
    roomy = learn(model, pairs, ablation=ablation, held_out=0)
    assert max(sizes) > 1
    sizes.clear()
    tight = learn(model, pairs, ablation=ablation, held_out=0, budget=1000)
    assert set(sizes) == {1}
    assert (tight.gates - roomy.gates).abs().max() < 1e-8
    assert tight.cost.block_tokens > roomy.cost.block_tokens  # runs are recorded again in every step


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon", "gemma2", "mixtral"])
def test_what_the_backward_pass_keeps_fits_what_is_counted(name: str) -> None:
    model, pairs = family(name), ragged(1)
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with frozen_parameters(model):
        task = objective(model, pairs, ablation="mean")
        (chunk,) = task.chunks()
        kept = []
        for rows in (8, 16):
            sizes.clear()
            gates = random_gates(task.evaluator.graph, rows).to(model.dtype).requires_grad_()
            everyone = torch.zeros(rows, dtype=torch.long)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                loss = task.loss(chunk, chunk.runs.final(gates, everyone), everyone)
            kept.append(sum(sizes.values()))
            del loss
    task.evaluator.budget.bytes = 2**40
    a_row = 2**39 / rows_with_gradients(chunk.runs, task.evaluator.budget)
    assert 1.2 < a_row / ((kept[1] - kept[0]) / 8) < 4


def test_memory_that_runs_out_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = family("gpt2"), ragged(4)
    expected = learn(model, pairs)
    final, failures = CircuitRuns.final, [2]

    def failing(self: CircuitRuns, gates: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if gates.requires_grad and len(gates) > 1 and failures[0]:
            failures[0] -= 1
            raise torch.OutOfMemoryError("out of memory")
        return final(self, gates, *args, **kwargs)

    monkeypatch.setattr(CircuitRuns, "final", failing)
    found = learn(model, pairs)
    assert not failures[0]
    assert (found.gates - expected.gates).abs().max() < 1e-8


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    model, pairs = family(name), ragged(2)
    mask = learn(model, pairs, held_out=0, steps=2, batch=2)
    assert torch.isfinite(mask.gates).all()
    assert mask.history.values[0, 0] > 0
    assert not mask.gates[~mask.scores.graph.exists].any()
    assert not model.has_hooks
    assert mask.scores.values[mask.scores.graph.exists].min() > 0


def test_works_under_inference_mode() -> None:
    model, pairs = family("gpt2"), ragged(4)
    with torch.inference_mode():
        inside = learn(model, pairs)
    assert torch.equal(inside.gates, learn(model, pairs).gates)


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = family("gpt2"), ragged(4)
    parameters = list(model.bridge.original_model.parameters())
    parameters[0].requires_grad_(False)
    before = [p.requires_grad for p in parameters]
    assert any(before)
    learn(model, pairs)

    def broken(*_: Any) -> None:
        raise KeyError("in the middle of training")

    monkeypatch.setattr(Objective, "loss", broken)
    with pytest.raises(KeyError, match="in the middle"):
        learn(model, pairs)
    assert [p.requires_grad for p in parameters] == before
    assert all(p.grad is None for p in parameters)
    assert torch.is_grad_enabled()
    assert not model.has_hooks
    parameters[0].requires_grad_(True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"over": "neuron"}, "over: expected 'edge' or 'node', got 'neuron'"),
        ({"objective": "loss"}, "objective: expected 'kl' or 'metric', got 'loss'"),
        ({"objective": "metric"}, "metric: expected one, such as mk.logit_diff"),
        ({"metric": 3}, "metric: expected a Metric"),
        ({"metric": lambda logits: 3}, "needs prompts of one length"),
        (
            {"metric": mk.metric_factory(lambda pairs: 3)},
            "metric: expected <lambda> to make a Metric of pairs, got int",
        ),
        ({"penalty": -1.0}, "penalty: expected a number of 0 or more, got -1.0"),
        ({"penalty": math.nan}, "penalty: expected"),
        ({"target": 0}, "target: expected a number of gates of 1 or more, got 0"),
        ({"target": 10**6}, "target: expected at most"),
        ({"steps": 0}, "steps: expected 1 or more, got 0"),
        ({"batch": 0}, "batch: expected 1 or more, got 0"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"held_out": 1.0}, "held_out: expected a share"),
        ({"held_out": 0.01}, "held_out: .* leaves one part empty"),
        ({"ablation": "median"}, "ablation: expected one of"),
        ({"budget": 0}, "budget: expected a positive number"),
        ({"metric": mk.accuracy, "objective": "metric"}, "metric: 'accuracy' has no gradient"),
        ({"metric": mk.logit_diff(ragged(3))}, "metric: it was made for 3 prompts, but there are 4"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        learn(family("gpt2"), ragged(4), **arguments)


def test_refuses_runs_that_do_not_differ_and_models_in_training_mode() -> None:
    model, pairs = family("gpt2"), ragged(4)
    same = mk.PromptPairs.from_tokens(pairs.clean, pairs.clean, list(pairs.answers))
    for arguments in ({}, {"objective": "metric", "metric": mk.logit_diff}):
        with pytest.raises(ValueError, match="pairs: expected clean and ablated runs that differ, got"):
            learn(model, same, **arguments)
    with pytest.raises(ValueError, match="pairs: expected PromptPairs"):
        learn(model, pairs.clean)  # type: ignore[arg-type]
    model.train()
    try:
        with pytest.raises(ValueError, match="model: expected evaluation mode"):
            learn(model, pairs)
    finally:
        model.eval()


def test_circuit_refuses() -> None:
    mask = learn(family("gpt2"), ragged(4))
    for arguments, message in (
        ({"threshold": 0.0}, "threshold: expected a probability above 0"),
        ({"threshold": 1.5}, "threshold: expected a probability above 0"),
        ({"threshold": 0.5, "n_edges": 3}, "expected exactly one of them"),
        ({"n_edges": -1}, "n_edges: expected 0 to"),
    ):
        with pytest.raises(ValueError, match=message):
            mask.circuit(**arguments)
    assert mask.circuit(n_edges=10, prune=False).n_edges == 10
