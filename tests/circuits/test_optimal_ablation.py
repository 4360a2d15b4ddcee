"""Optimal ablation: never worse than its starts, the best there is where that is known, and usable wherever constants are."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import mechkit as mk
from helpers.families import FAMILIES, build_hf
from mechkit.circuits._evaluation import Constants, Evaluator
from mechkit.circuits._runs import CircuitRuns
from mechkit.circuits.circuit import Circuit
from mechkit.circuits.evaluation import evaluate_circuit
from mechkit.circuits.graph import Graph, Writer
from mechkit.circuits.optimal_ablation import OptimalConstants, _Search, optimal_ablation


@cache
def family(name: str) -> mk.HookedModel:
    dtype = torch.float32 if name == "mixtral" else torch.float64
    return mk.HookedModel.from_hf(build_hf(name, dtype), name=name)


@cache
def linear(n: int = 24) -> Any:
    return mk.zoo.linear(n=n)


def ragged(n: int = 4, seed: int = 0) -> mk.PromptPairs:
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted, answers = [], [], []
    for i in range(n):
        clean.append(torch.randint(3, 61, (5 + i % 2,), generator=generator))
        corrupted.append(torch.randint(3, 61, (5 + i % 2,), generator=generator))
        answers.append(tuple(torch.randperm(61, generator=generator)[:2].tolist()))
    return mk.PromptPairs.from_tokens(clean, corrupted, answers)


def optimal(model: mk.HookedModel, pairs: mk.PromptPairs, metric: Any = None, **arguments: Any) -> OptimalConstants:
    return optimal_ablation(model, pairs, metric, **{"steps": 5, "progress": False, **arguments})


def mean_losses(constants: OptimalConstants) -> dict[str, Tensor]:
    means = constants.losses.mean("prompt")
    return {name: means.sel(ablation=name).values for name in ("mean", "zero", "optimal")}


def naive_logits(model: mk.HookedModel, tokens: Tensor, writer: str, constants: Tensor) -> Tensor:
    """Last logits of whole forward passes in which one component writes a constant, `[1 d_model]` or `[row 1 d_model]`: its own
    output is taken out of the stream behind it."""
    batch = tokens.expand(len(constants), -1)

    def run(site: str, layer: int, own: Tensor | float | None = None) -> Tensor:
        def put(x: Tensor, hook: Any) -> Tensor:
            return torch.zeros_like(x) + constants if own is None else x - own + constants

        return model.run_with_hooks(batch, fwd_hooks=[((site, layer), put)])[:, -1]

    if writer == "input":
        return run("resid_pre", 0)
    layer = int(writer[1:].partition(".")[0])
    if writer.startswith("m"):
        return run("mlp_out", layer)
    head = int(writer.partition(".h")[2])
    _, cache = model.run_with_cache(tokens[None], [("z", layer)])
    return run("attn_out", layer, cache["z", layer][:, :, head] @ model.bridge.blocks[layer].attn.W_O[head].detach())


# -- what the losses are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["kl", "metric"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon", "llama_mqa", "gpt_neox"])
def test_losses_against_whole_forward_passes(name: str, objective: Any) -> None:
    model, pairs = family(name), ragged(3)
    graph = Graph.of(model)
    writers = ["input", "a0.h1", "m0", "a2.h3", "m3"]
    found = optimal(model, pairs, mk.logit_diff, objective=objective, writers=writers, steps=2)
    assert found.losses.coords["writer"] == tuple(writers)
    assert found.losses.coords["prompt"] == (0, 1, 2)
    means = Evaluator(model, pairs, mk.logit_diff(pairs), "mean")._mean_written()
    mean = torch.cat(means, 1)[0, :, 0]
    with torch.no_grad():
        cleans = [model(tokens[None])[0, -1] for tokens in pairs.clean.tokens]
    for w, writer in enumerate(writers):
        at = graph.writer_index[writer]
        kinds = {"mean": mean[at], "zero": torch.zeros_like(mean[at]), "optimal": found.values[at]}
        constants = torch.stack(list(kinds.values()))[:, None]
        with torch.no_grad():
            ablated = [naive_logits(model, tokens, writer, constants) for tokens in pairs.clean.tokens]
        for k, (kind, constant) in enumerate(kinds.items()):
            if writer == "input" and not constant.any() and name.startswith("llama"):
                continue  # without biases all that follows is exactly 0, a point from which any rounding error grows
            for i, clean in enumerate(cleans):
                logits = ablated[i][k]
                if objective == "kl":
                    p, q = clean.log_softmax(-1), logits.log_softmax(-1)
                    expected = (p.exp() * (p - q)).sum()
                else:
                    right, wrong = pairs.right[i][0], pairs.wrong[i][0]
                    expected = ((clean[right] - clean[wrong]) - (logits[right] - logits[wrong])) ** 2
                got = found.losses.sel(ablation=kind).values[w, i]
                assert got == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
    untouched = [i for i in range(len(graph.writers)) if graph.writers[i].name not in writers]
    assert torch.equal(found.values[untouched], mean[untouched])


@pytest.mark.parametrize("name", FAMILIES)
def test_never_worse_than_mean_or_zero_in_every_family(name: str) -> None:
    model, pairs = family(name), ragged(2)
    last = model.n_layers - 1
    for lr in (0.1, 100.0):  # steps that are far too long help nothing, and do no harm either
        means = mean_losses(
            optimal(model, pairs, writers=["input", "a0.h0", f"a{last}.h1", f"m{last}"], lr=lr, steps=4)
        )
        assert (means["optimal"] <= means["mean"]).all()
        assert (means["optimal"] <= means["zero"]).all()
        if lr < 1:
            assert (means["optimal"] < means["mean"]).all()  # a control: it does move
            assert (means["optimal"][1:] < torch.minimum(means["mean"], means["zero"])[1:]).any()
    assert not model.has_hooks


# -- the optimum -------------------------------------------------------------------------------------------------------


def as_linear(model: mk.HookedModel, pairs: mk.PromptPairs, writer: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each prompt the clean last logits, and `b`, `M` of ablated logits = b + M constant (the model is linear in it)."""
    maps = []
    for tokens in pairs.clean.tokens:
        with torch.no_grad():
            clean = model(tokens[None])[0, -1]

        probes = torch.cat([torch.zeros(1, model.d_model), torch.eye(model.d_model)])[:, None].double()
        with torch.no_grad():
            logits = naive_logits(model, tokens, writer, probes)
        maps.append((clean, logits[0], (logits[1:] - logits[0]).T))
    return maps


@pytest.mark.parametrize("writer", ["a2.h3", "m2"])
def test_least_squares_on_a_linear_model(writer: str) -> None:
    known = linear()
    model, pairs = known.model, known.pairs
    maps = as_linear(model, pairs, writer)
    rights, wrongs = ([ids[0] for ids in side] for side in (pairs.right, pairs.wrong))
    # No direction that hardly does anything (those of the ballast, see `mechkit.zoo._build`) is used.
    rows = torch.stack([m[r] - m[w] for (_, _, m), r, w in zip(maps, rights, wrongs, strict=True)])
    gaps = torch.stack([(c - b)[r] - (c - b)[w] for (c, b, _), r, w in zip(maps, rights, wrongs, strict=True)])
    best = torch.linalg.lstsq(rows, gaps[:, None], rcond=1e-6, driver="gelsd").solution[:, 0]
    least = float((rows @ best - gaps).square().mean())
    found = optimal(model, pairs, mk.logit_diff, objective="metric", writers=[writer], steps=300)
    means = mean_losses(found)
    assert least > 1e-3  # no constant is perfect
    assert float(means["optimal"]) == pytest.approx(least, rel=1e-3)
    assert float(means["mean"]) > 1.2 * least  # a control: the mean is not the optimum


def test_least_divergence_on_a_linear_model() -> None:
    """KL is convex in logits, and these are linear in the constant: Newton's method finds the one optimum."""
    known = linear()
    model, pairs = known.model, known.pairs
    maps = as_linear(model, pairs, "a2.h3")
    clean, start, slope = (torch.stack(part) for part in zip(*maps, strict=True))

    def loss(constant: Tensor) -> Tensor:
        q = (start + slope @ constant).log_softmax(-1)
        p = clean.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean()

    at = torch.zeros(model.d_model, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(loss, at)
        curvature = torch.autograd.functional.hessian(loss, at)
        at = at - torch.linalg.pinv(curvature, rtol=1e-10, hermitian=True) @ gradient
    least = float(loss(at))
    found = optimal(model, pairs, writers=["a2.h3"], steps=100)
    assert float(mean_losses(found)["optimal"]) == pytest.approx(least, rel=1e-3)
    assert float(mean_losses(found)["optimal"]) >= least * (1 - 1e-6)
    assert float(mean_losses(found)["mean"]) > 1.2 * least
    constant = found.values[Graph.of(model).writer_index["a2.h3"]]
    assert float(loss(constant)) == pytest.approx(float(mean_losses(found)["optimal"]), rel=1e-6)


def test_other_prompts_values_do_more_harm_and_a_partners_may_do_less() -> None:
    """What a random prompt's run holds at a random position is a constant that knows nothing of the prompt it is put into: on
    average it does no less harm than the best one. A partner's value at the same position may know all that matters."""
    known = linear(8)
    model, pairs = known.model, known.pairs
    found = optimal(model, pairs, writers=["a0.h1"], steps=30)
    least = float(mean_losses(found)["optimal"])
    generator, drawn = torch.Generator().manual_seed(0), []
    w_o = model.bridge.blocks[0].attn.W_O[1].detach()
    for _ in range(6):
        i = int(torch.randint(len(pairs), (1,), generator=generator))
        _, cache = model.run_with_cache(pairs.corrupted.tokens[i][None], [("z", 0)])
        constant = cache["z", 0][0, int(torch.randint(6, (1,), generator=generator)), 1] @ w_o
        drawn.append(_kl(model, pairs, "a0.h1", constant))
    assert sum(drawn) / len(drawn) > least
    without = Graph.of(model).exists.clone()
    without[Graph.of(model).writer_index["a0.h1"]] = False
    agreeing = mk.PromptPairs.from_tokens(pairs.clean, pairs.clean, list(pairs.answers))
    resampled = Evaluator(model, agreeing, mk.kl_divergence(agreeing)).evaluate(without[None])
    assert resampled.abs().max() < 1e-10 < least


def _kl(model: mk.HookedModel, pairs: mk.PromptPairs, writer: str, constant: Tensor) -> float:
    total = 0.0
    with torch.no_grad():
        for tokens in pairs.clean.tokens:
            p = model(tokens[None])[0, -1].log_softmax(-1)
            q = naive_logits(model, tokens, writer, constant[None])[0].log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
    return total / len(pairs)


def test_what_does_nothing_has_no_importance() -> None:
    known = mk.zoo.serial_ioi(4)
    found = optimal(known.model, known.pairs, steps=15)
    importance = found.importance.mean("prompt")
    names = found.losses.coords["writer"]
    matters = {name for name, value in zip(names, importance.values.tolist(), strict=True) if value > 1e-6}
    assert matters == {"input", "a0.h0", "a1.h0", "a2.h0"}
    assert found.importance.dims == ("writer", "prompt")


# -- circuits, and constants elsewhere ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon", "gemma2", "mixtral"])
def test_constants_for_a_circuit(name: str) -> None:
    model, pairs = family(name), ragged(4)
    circuit = Circuit.random(model, 60, seed=1)
    found = optimal(model, pairs, circuit=circuit, steps=30)
    assert found.losses.dims == ("ablation", "prompt")
    means = {kind: float(found.losses.sel(ablation=kind).mean("prompt").values) for kind in ("mean", "zero", "optimal")}
    assert means["optimal"] < 0.8 * min(means["mean"], means["zero"])
    assert found.losses.provenance["n_edges"] == 60
    for ablation, kind in ((found, "optimal"), ("mean", "mean"), ("zero", "zero")):
        values = Evaluator(model, pairs, mk.kl_divergence(pairs), ablation).evaluate(circuit.members[None])[0]  # type: ignore[arg-type]
        assert torch.allclose(values, found.losses.sel(ablation=kind).values.to(values), rtol=1e-3, atol=1e-5)


def test_constants_are_taken_wherever_ablation_is() -> None:
    model, pairs = family("gpt2"), ragged(4)
    found = optimal(model, pairs)
    assert isinstance(found, Constants)
    assert found.name == "optimal"
    report = evaluate_circuit(
        Circuit.random(model, 60, seed=1),
        model,
        pairs,
        mk.logit_diff(pairs),
        ablation=found,
        random=0,
        sets=0,
        progress=False,
    )
    assert report.runs.provenance["ablation"] == "optimal"
    mask = mk.circuits.learned_masks.learn_mask(model, pairs, ablation=found, steps=2, held_out=0, progress=False)
    assert mask.scores.provenance["ablation"] == "optimal"
    for writer in ("a1.h2", "m2"):  # by themselves, their losses are those of a circuit of all other writers' edges
        keep = Graph.of(model).exists.clone()
        w = Graph.of(model).writer_index[writer]
        keep[w] = False
        values = Evaluator(model, pairs, mk.kl_divergence(pairs), found).evaluate(keep[None])[0]
        assert torch.allclose(values, found.importance.sel(writer=writer).values, rtol=1e-8)


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_batches_are_drawn_by_seed_and_the_best_is_kept() -> None:
    model, pairs = family("gpt2"), ragged(6)
    state = torch.random.get_rng_state()
    arguments: dict[str, Any] = {"writers": ["a2.h0", "m3"], "batch": 2, "steps": 15}
    first, again, other = (optimal(model, pairs, seed=seed, **arguments) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.values, other.values)
    means = mean_losses(first)
    assert (means["optimal"] < torch.minimum(means["mean"], means["zero"])).all()
    whole = [optimal(model, pairs, seed=seed, writers=["a0.h0"]) for seed in (1, 2)]
    assert torch.equal(whole[0].values, whole[1].values)  # nothing is drawn


def test_a_small_budget_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = family("gpt2"), ragged(4)
    sizes: list[int] = []
    final = CircuitRuns.final

    def counted(self: CircuitRuns, gates: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(len(gates))
        return final(self, gates, *args, **kwargs)

    monkeypatch.setattr(CircuitRuns, "final", counted)
    circuit = Circuit.random(model, 60, seed=1)
    for arguments in ({"writers": ["a0.h0", "a0.h1", "m3"]}, {"circuit": circuit}):
        roomy = optimal(model, pairs, **arguments)  # type: ignore[arg-type]
        sizes.clear()
        tight = optimal(model, pairs, budget=1000, **arguments)  # type: ignore[arg-type]
        assert set(sizes) <= {1, 2}  # 2: each recording's own check
        assert (tight.values - roomy.values).abs().max() < 1e-8


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = family("gpt2"), ragged(2)
    parameters = list(model.bridge.original_model.parameters())
    before = [p.requires_grad for p in parameters]
    with torch.inference_mode():
        inside = optimal(model, pairs, writers=["m0"])
    assert torch.equal(inside.values, optimal(model, pairs, writers=["m0"]).values)

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("in the middle")

    monkeypatch.setattr(_Search, "run", broken)
    with pytest.raises(KeyError, match="in the middle"):
        optimal(model, pairs, writers=["m0"])
    assert [p.requires_grad for p in parameters] == before
    assert any(before)
    assert all(p.grad is None for p in parameters)
    assert torch.is_grad_enabled()
    assert not model.has_hooks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "loss"}, "objective: expected 'kl' or 'metric', got 'loss'"),
        ({"objective": "metric"}, "metric: expected one"),
        ({"metric": mk.accuracy, "objective": "metric"}, "metric: 'accuracy' has no gradient"),
        ({"steps": 0}, "steps: expected 1 or more, got 0"),
        ({"batch": 0}, "batch: expected 1 or more, got 0"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        ({"lr": math.inf}, "lr: expected a number from 0 to"),
        ({"budget": -1}, "budget: expected a positive number"),
        ({"writers": "m0"}, r"writers: expected a list .*Write writers=\['m0'\]"),
        ({"writers": []}, "writers: expected at least one"),
        ({"writers": ["m0", Writer(0)]}, "writers: expected at least one, each once"),
        ({"writers": ["m9"]}, "writer: expected .* 'm9' is out of range"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimal(family("gpt2"), ragged(2), **arguments)


def test_refuses_another_models_circuit_and_training_mode() -> None:
    model, pairs = family("gpt2"), ragged(2)
    circuit = Circuit.random(family("llama"), 20, seed=0)
    with pytest.raises(ValueError, match="a circuit of another model"):
        optimal(model, pairs, circuit=circuit)
    with pytest.raises(ValueError, match="writers: expected None with a circuit"):
        optimal(model, pairs, circuit=Circuit.full(model), writers=["m0"])
    with pytest.raises(ValueError, match="pairs: expected PromptPairs"):
        optimal(model, pairs.clean)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ablation: expected constants for"):
        Evaluator(family("llama"), pairs, mk.kl_divergence(pairs), optimal(model, pairs, writers=["m0"], steps=1))
    model.train()
    try:
        with pytest.raises(ValueError, match="model: expected evaluation mode"):
            optimal(model, pairs)
    finally:
        model.eval()
