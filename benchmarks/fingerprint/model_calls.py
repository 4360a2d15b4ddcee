"""The fingerprint's calls of sweeps, results, tasks and the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from family_material import METRICS, N_LAYERS, Call, Material, Named, called, calls, grid, of_logits
from torch import Tensor

import mechkit as mk


def sweeps(m: Material) -> Iterator[Call]:
    edit = mk.Edit
    last = N_LAYERS - 1
    cells = {
        "two heads": [(edit("z", last, head=0), edit("z", last, head=2)), (edit("z", 1, head=1),)],
        "head and stream": [(edit("z", 1, head=0), edit("resid_post", 1, pos=3)), (edit("mlp_out", 0),)],
        "overlapping": [(edit("mlp_out", 1), edit("mlp_out", 1, pos=2, value="mine")), ()],
        "a position a prompt": [(edit("resid_pre", 2, pos=(0, 1, 2, 3)),), (edit("resid_pre", 0, pos=5),)],
        "units": [(edit("mlp_post", layer, neuron=unit),) for layer in (0, last) for unit in (1, 7)],
        "variants": [(edit("mlp_out", 2, value="both", variant=which),) for which in (0, 1)],
    }
    half = torch.full((1, 1, m.model.d_model), 0.5, dtype=torch.float64)
    values = {"mine": {("mlp_out", 1): half}, "both": {("mlp_out", 2): torch.stack([half, -half])}}
    fixed = {
        "model": m.model,
        "base": m.pairs.corrupted,
        "source": m.pairs.clean,
        "metric": m.metric,
        "progress": False,
    }
    yield from called(
        mk.sweep,
        {**fixed, "values": values},
        [
            {"cells": Named(name, lambda some=some: some), "replay": replay}
            for name, some in cells.items()
            for replay in (True, False)
        ],
    )
    yield from calls(
        "metrics",
        mk.sweep,
        {**fixed, "cells": [(edit("resid_post", last, pos=3),), (edit("mlp_out", 0),)]},
        grid(metric=[m.metric_named(name) for name in METRICS if name != "factory"]),
    )


def results(m: Material) -> Iterator[Call]:
    yield from calls(
        "Result",
        lambda of, how: how(of),
        {},
        [
            {"of": of, "how": Named(name, lambda fn=fn: fn)}
            for of in map(m.named, ("exact", "estimated", "by_position"))
            for name, fn in _OF_RESULT.items()
        ],
        [{"of": m.named("far_apart"), "how": Named(name, lambda fn=fn: fn)} for name, fn in _OF_GAP.items()],
    )


_OF_RESULT: dict[str, Callable[[Any], Any]] = {
    "mean": lambda r: r.mean("prompt"),
    "mean over layers": lambda r: r.mean("layer"),
    "effect": lambda r: r.effect(),
    "effect of mean": lambda r: r.mean().effect(),
    "normalized": lambda r: r.mean().normalized(),
    "normalized prompts": lambda r: r.normalized(),
    "top": lambda r: r.top(7),
    "top by max": lambda r: r.top(7, by="max"),
    "top by min": lambda r: r.top(7, by="min"),
    "sel": lambda r: r.sel(layer=[2, 1], prompt=2),
    "sel slice": lambda r: r.sel(layer=slice(1, 2)),
    "ci": lambda r: r.ci(n_resamples=60),
    "basic ci": lambda r: r.ci(0.8, n_resamples=60, seed=1, method="basic"),
    "studentized ci": lambda r: r.ci(n_resamples=60, method="studentized"),
    "p values": lambda r: r.p_values(99),
    "p values without fdr": lambda r: r.p_values(99, seed=2, fdr=False),
    "dataframe": lambda r: r.to_dataframe()["value"].to_numpy(),
    "xarray": lambda r: r.to_xarray().to_numpy(),
}


_OF_GAP: dict[str, Callable[[Any], Any]] = {
    "normalized": lambda r: r.normalized(),
    "normalized ci": lambda r: r.ci(n_resamples=60, normalized=True),
    "studentized normalized ci": lambda r: r.ci(n_resamples=60, normalized=True, method="studentized"),
}


def running(m: Material) -> Iterator[Call]:
    model, tokens = m.model, m.tokens
    padded = torch.nn.utils.rnn.pad_sequence(list(m.pairs.clean.tokens), batch_first=True, padding_value=2)
    mask = (torch.arange(padded.shape[1]) < m.pairs.clean.lengths[:, None]).long()
    fixed = {"input": tokens}
    marked = {"input": Named("padded", lambda: padded), "attention_mask": Named("mask", lambda: mask)}
    with_loss = grid(return_type=("loss", "both"), loss_per_token=(False, True))
    yield from calls(
        "forward", model.forward, fixed, [{}, marked], with_loss, [marked | options for options in with_loss]
    )
    yield from calls(
        "generate",
        model.generate,
        {**fixed, "max_new_tokens": 3},
        [
            {},
            {"do_sample": True, "seed": 3, "temperature": 0.7},
            {"do_sample": True, "seed": 3, "top_k": 5, "top_p": 0.9},
        ],
        [marked],
    )
    sites = grid(names=list(mk.SITES))
    yield from calls("run_with_cache", lambda **options: _cached(model, **options), fixed, sites)
    some = [{"names": "resid_post", "positions": positions} for positions in (-1, [0, 2])]
    yield from calls("run_with_cache", lambda **options: _cached(model, **options), fixed, some)
    yield from calls("gradients", lambda site: _gradients(m, site), {}, grid(site=list(mk.SITES)))
    halved = Named("halved", lambda: [("mlp_out", lambda x, hook: x / 2)])
    silenced = Named("silenced", lambda: [(("resid_mid", 1), lambda x, hook: torch.zeros_like(x))])
    yield from calls("run_with_hooks", model.run_with_hooks, fixed, grid(fwd_hooks=(halved, silenced)))


def _cached(model: mk.HookedModel, **options: Any) -> Any:
    logits, cache = model.run_with_cache(**options)
    return {"logits": logits, "cache": dict(cache)}


def _gradients(m: Material, site: str) -> dict[str, Any]:
    """The gradients that a hook sees at every layer of a site."""
    found: dict[str, Any] = {}

    def keep(gradient: Tensor, hook: Any) -> None:
        found[f"{len(found)}"] = gradient.clone()

    with m.model.hooks(bwd_hooks=[(site, keep)]):
        of_logits(m.model(m.tokens)).sum().backward()
    m.hf.zero_grad(set_to_none=True)
    return found


def made_tasks(m: Material) -> Iterator[Call]:
    def ids(pairs: Any) -> Any:
        prompts = [pairs] if isinstance(pairs, mk.Prompts) else [pairs.clean, pairs.corrupted]
        return [torch.cat(some.tokens) for some in prompts]

    some = grid(n=(1, 3), length=(4, 6), seed=(0, 1))
    yield from calls("tasks.induction", lambda **options: ids(mk.tasks.induction(m.model, **options)), {}, some)
    yield from calls(
        "tasks.repeated_tokens", lambda **options: ids(mk.tasks.repeated_tokens(m.model, **options)), {}, some
    )
