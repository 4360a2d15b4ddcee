"""Attribution patching with integrated gradients: gradients along the way from the base to the source activation.

One gradient, at the base run, is a poor guide where the metric bends on the way. Here it is averaged over the path:

- `path="activation"`: each layer's activations move by themselves from the base to the source run's (Marks et al. 2024). The
  nodes of a layer sum to the exact effect of patching them all together, up to the error of the sum, which is reported
  (`completeness_error`). Costs `steps` backward passes per layer, from that layer on.
- `path="input"`: the embeddings move, and every node's gradient is averaged over these runs (Hanna et al. 2024, EAP-IG for
  nodes). Costs `steps` backward passes in all. Completeness holds for the embeddings and is reported for them.

Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365; Marks et al. 2024, https://arxiv.org/abs/2403.19647; Hanna et al.
2024, https://arxiv.org/abs/2403.17806.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mechkit._check import checked
from mechkit.engine import frozen_parameters
from mechkit.experiment.axes import Chosen
from mechkit.experiment.estimates import (
    AnyMetric,
    Experiment,
    GradientChunk,
    Key,
    check_one_site,
    hook_name,
    make_experiment,
)
from mechkit.experiment.passes import check_reached, runs_of, tapped, unedited
from mechkit.experiment.patches import takes_patches
from mechkit.experiment.quadrature import Rule, along_activation, batches, metric_with, quadrature
from mechkit.hooks import SITES, HookedModel, one_at_a_time
from mechkit.prompts import PromptPairs
from mechkit.result import Result


@checked
@one_at_a_time
@torch.inference_mode(False)
@takes_patches
def integrated_gradients(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    site: str = "z",
    over: str = "layer head",
    *,
    steps: int = 5,
    rule: Rule = "gauss-legendre",
    path: Literal["activation", "input"] = "activation",
    direction: Literal["denoise", "noise"] = "denoise",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | Sequence[str] | None = None,
    neurons: Sequence[int] | None = None,
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """Estimates the metric after patching each node, from gradients along the path from the base to the source run.

    Args:
        model, pairs, metric, site, over, direction, layers, heads, positions, neurons: As for `attribution_patching`.
        budget, progress: As for `attribution_patching`.
        steps: Gradients along the path.
        rule: How they are placed and weighted: `"left"` (from the base on, without the source's end), `"midpoint"`,
            `"gauss-legendre"` (the most accurate on smooth paths: heads' outputs, patterns), or `"stretched"`, the same with
            points closer together in the middle (the most accurate for embeddings and residual streams).
        path: What moves; see the module's docstring.

    Returns:
        A `Result` like `attribution_patching`'s, dims `(*over, "prompt")`. Provenance: `completeness_error`, the absolute
        error of the sum over all nodes of a layer (of the embeddings, for `path="input"`) as a share of the absolute gap
        between the two runs, both averaged over prompts; the largest of the layers'.

    Raises:
        ValueError: as `attribution_patching`; an unknown rule or path; fewer than one step.
    """
    check_one_site(site)
    if path not in ("activation", "input"):
        raise ValueError(f"path: expected 'activation' or 'input', got {path!r}")
    points, weights = quadrature(steps, rule)
    if path == "input" and site in ("embed", SITES["embed"].hook):
        raise ValueError("path: 'input' moves the embeddings themselves; for site='embed' use path='activation'")
    chosen: Chosen = {"layers": layers, "heads": heads, "positions": positions, "neurons": neurons}
    about = {"technique": "integrated_gradients", "path": path, "steps": steps, "rule": rule}
    experiment = make_experiment(model, pairs, metric, site, over, direction, chosen, budget, progress, about)
    experiment.gradients = len(points) * (len(experiment.keys) if path == "activation" else 1)
    errors = torch.zeros(len(experiment.keys), len(experiment.base), dtype=torch.float64)
    with frozen_parameters(model):
        for chunk in experiment.chunks():
            walk = _activation_paths if path == "activation" else _input_path
            errors[:, chunk.ids] = walk(experiment, chunk, points, weights).double().cpu()
    gap = (
        (experiment.values[runs_of(experiment)[1]] - experiment.values[experiment.base_is])
        .double()
        .abs()
        .mean()
        .clamp(min=1e-12)
    )
    return experiment.result(next(iter(experiment.axes)), completeness_error=float(errors.abs().mean(1).max() / gap))


def _activation_paths(
    experiment: Experiment, chunk: GradientChunk, points: list[float], weights: list[float]
) -> Tensor:
    """Adds every layer's integral. Returns its error for each layer and prompt."""
    base_is, source_is = runs_of(experiment)
    source, _, source_final = unedited(experiment, chunk, source_is)
    base, hidden, base_final = unedited(experiment, chunk, base_is)
    chunk.keep_unedited({source_is: source_final, base_is: base_final})
    errors = []
    for key in experiment.keys:
        enters = hidden if chunk.runs.how == "suffix" else None
        total = along_activation(chunk, key, base[key], source[key], enters, points, weights)
        with torch.no_grad():
            exact = metric_with(chunk, key, source[key], chunk.everyone, enters) - chunk.metric(base_final)
        errors.append(total - exact.to(total))
    return torch.stack(errors)


def _input_path(experiment: Experiment, chunk: GradientChunk, points: list[float], weights: list[float]) -> Tensor:
    """Adds the integral of every node's gradient over runs between the two embeddings. Returns the embeddings' error."""
    base_is, source_is = runs_of(experiment)
    difference, source_hidden, source_final = unedited(experiment, chunk, source_is)
    base, base_hidden, base_final = unedited(experiment, chunk, base_is)
    for key in experiment.keys:
        difference[key].sub_(base.pop(key))
    chunk.keep_unedited({source_is: source_final, base_is: base_final})
    change = source_hidden[0] - base_hidden[0]
    total, silent = change.new_zeros(len(chunk.everyone)), set(experiment.keys)
    for row, point, weight in batches(chunk, points, weights):

        def keep(activation: Tensor, hook: Any, key: Key, row: Tensor = row, weight: Tensor = weight) -> Tensor:
            def contract(gradient: Tensor) -> None:
                silent.discard(key)
                moved = difference[key][row] * gradient
                chunk.add(key, moved * weight.reshape(-1, *[1] * (moved.ndim - 1)), row)

            return tapped(activation, contract)

        hooks = [(hook_name(key), partial(keep, key=key)) for key in experiment.keys]
        hidden = (base_hidden[0][row] + point[:, None, None] * change[row]).to(change.dtype)
        leaf, final = chunk.runs.forward(chunk.inputs[base_is][row], row, hooks, hidden=hidden, leaf=True)
        assert leaf is not None
        slope = torch.autograd.grad(chunk.metric(final, row).sum(), leaf)[0]
        share = (change[row] * slope).flatten(1).sum(1) * weight
        total = total.index_add(0, row, share.to(total))
    check_reached(experiment, silent)
    gap = experiment.values[source_is] - experiment.values[base_is]
    return (total.cpu() - gap[chunk.ids].to(total.dtype)).expand(len(experiment.keys), -1)
