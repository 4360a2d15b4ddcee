"""Attention attribution: how much of each input position reaches a position of the last layer, by the patterns only.

Three ways to chain the patterns A of the layers, averaged over their heads, with the residual stream as an identity:

*Rollout* (Abnar and Zuidema 2020, https://arxiv.org/abs/2005.00928):

1. Each layer passes on `residual * I + (1 - residual) * A`, the rows being destinations. Its rows sum to 1.
2. The matrices are multiplied from the first layer up to the last; the row of the position asked about is the value.

*Flow* (the same paper):

1. The same numbers are the capacities of a graph with a node for each layer and position.
2. The value of an input position is the largest flow between it and the position asked about: the capacity of the
   smallest cut. Rollout multiplies along paths, flow takes each path's narrowest edge.

*Relevance* (Chefer, Gur and Wolf 2021, https://arxiv.org/abs/2103.15679, the rule for self-attention):

1. The gradient of the metric with respect to each head's pattern says which of its entries raise the metric.
2. R = I. For each layer from the first to the last: Ā = mean over heads of max(0, gradient * pattern); R = R + Ā R.
3. The row of the position that the metric reads is the value.

These are heuristics: attention is not explanation (Jain and Wallace 2019, https://arxiv.org/abs/1902.10186). Rollout and
flow ignore what the heads write, the MLPs, and what was predicted; relevance includes these only through a gradient. Use them to
find where to look, and `activation_patching` to test whether a position matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._check import checked
from mechkit._precision import wide_dtype, widen
from mechkit._progress import Progress
from mechkit.engine import Budget, call_metric, check_can_run, check_metric, logits_at_hand, read_metric
from mechkit.experiment.positions import place_in_every, position_labels, split_prompts
from mechkit.experiment.provenance import pictures_of, provenance_of
from mechkit.hooks import HookedModel, one_at_a_time
from mechkit.hooks._capture import capture
from mechkit.metrics import AnyMetric, CallableMetric, Metric, metric_for
from mechkit.prompts import AnyPrompts, PromptPairs, Prompts, Stacked, as_prompts
from mechkit.result import Result

Over = Literal["pos", "layer pos"]
HeadFusion = Literal["mean", "max"]

_STEPS = 2**30  # flow is found in whole steps of 2^-30, the finest that 32 bits hold


@checked
@one_at_a_time
def attention_rollout(
    model: HookedModel,
    prompts: AnyPrompts,
    *,
    position: str | int = "END",
    over: Over = "pos",
    residual: float = 0.5,
    head_fusion: HeadFusion = "mean",
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """Attention rollout: how much of each input position is mixed into a position of the last layer.

    It ignores values and MLPs; `activation_patching` is the causal check. In a deep causal model it gathers at the first
    position, which passes on nothing but itself: look at fewer layers (`over="layer pos"`).

    Args:
        model: In evaluation mode.
        prompts: Of any lengths. Of pairs, the clean prompts.
        position: The position asked about: a name (`"END"`, or one of the pairs' `positions`), or an index into every prompt
            (negative counts from each prompt's end).
        over: `"pos"` is the rollout of all layers; `"layer pos"` also that of the first 1, 2, … layers, each under the
            label of the last layer that it holds.
        residual: The share of the residual stream, from 0 (attention alone) to 1 (the residual stream alone).
        head_fusion: How a layer's heads are joined: their `"mean"`, or the `"max"` of each entry (its rows are then divided by
            their sums, so that they sum to 1 again).
        budget: Bytes of working memory; default half of the GPU's free memory, 1 GiB on a CPU.
        progress: Show a progress bar when it takes long.

    Returns:
        A `Result` with dims `("pos", "prompt")` or `("layer", "pos", "prompt")` and no baseline: the share, from 0 to 1, of
        each input position. The shares of a prompt's positions sum to 1 (patterns' rows are scaled to sum to 1 exactly,
        which takes away the rounding of the model's softmax). Positions that the model cannot see from
        `position` have 0; positions that a shorter prompt lacks are NaN.

    Raises:
        ValueError: training mode, a model without patterns, patterns whose rows do not sum to 1 (attention sinks outside the
            prompt), a position that a prompt lacks, an unknown option.

    Example:
        >>> attention_rollout(model, pairs).mean("prompt").top(3)
    """
    prompts = as_prompts(model, prompts)
    rule = _Rule("attention_rollout", "fraction", _rollout, _mixing(residual, head_fusion))
    return _attributed(
        rule, model, prompts, position, over, budget, progress, residual=residual, head_fusion=head_fusion
    )


@checked
@one_at_a_time
def attention_flow(
    model: HookedModel,
    prompts: AnyPrompts,
    *,
    position: str | int = "END",
    over: Over = "pos",
    residual: float = 0.5,
    head_fusion: HeadFusion = "mean",
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """Attention flow: the largest flow between each input position and a position of the last layer.

    An edge's capacity is `residual * I + (1 - residual) * pattern`, as in `attention_rollout`. Each input position has the
    whole graph to itself, so its flow is at least its rollout, at most 1, and the flows of a prompt sum to 1 or more. In a
    causal model early positions have more paths and therefore more flow: compare prompts rather than positions.

    It ignores values and MLPs; `activation_patching` is the causal check.

    Args:
        model, prompts, position, over, residual, head_fusion, budget, progress: As for `attention_rollout`.

    Returns:
        A `Result` with dims `("pos", "prompt")` or `("layer", "pos", "prompt")` and no baseline: the flow, from 0 to 1.
        Capacities are rounded down to steps of 2^-30 to find each smallest cut, whose capacity is then added up unrounded:
        a value is never too small, and too large by less than 1e-9 for each edge of that cut (and usually by nothing).
        Positions that the model cannot see from `position` have 0; positions that a shorter prompt lacks are NaN.

    Raises:
        ValueError: as `attention_rollout`.
    """
    prompts = as_prompts(model, prompts)
    rule = _Rule("attention_flow", "capacity", _flow, _mixing(residual, head_fusion))
    return _attributed(
        rule, model, prompts, position, over, budget, progress, residual=residual, head_fusion=head_fusion
    )


@checked
@one_at_a_time
def attention_relevance(
    model: HookedModel,
    prompts: AnyPrompts,
    metric: AnyMetric,
    *,
    position: str | int | None = None,
    over: Over = "pos",
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """Gradient-weighted attention relevance: which input positions the metric rests on, by the patterns and their gradients.

    Only entries whose increase would raise the metric count. It knows of values and MLPs by the gradient alone, which holds
    for small changes; `activation_patching` is the causal check.

    Args:
        model: In evaluation mode. Its parameters may be frozen or not; they are left as they are, without gradients.
        prompts: Of any lengths. Of pairs, the clean prompts.
        metric: A differentiable metric, e.g. `logit_diff(pairs)`; or any callable on logits `[batch pos d_vocab]` that returns
            `[batch]`, for prompts of one length (all of them in one batch), each value depending on its own prompt alone.
        position: The row of R, for a callable only (default `"END"`); other metrics know where they read.
        over: `"pos"` is R after the last layer; `"layer pos"` R after each layer.
        budget, progress: As for `attention_rollout`.

    Returns:
        A `Result` with dims `("pos", "prompt")` or `("layer", "pos", "prompt")` and no baseline: relevance, ≥ 0, in arbitrary
        units (sums of powers of the metric's unit; compare positions of one prompt). The position itself begins with 1, by
        the rule's `R = I`. Positions that the model cannot see from there have 0; those that a prompt lacks are NaN.

    Raises:
        ValueError: training mode, a model without patterns, a metric without a gradient (`accuracy`), one that compares with
            another run (`kl_divergence`), or one that was made for other prompts; NaN; an unknown option.

    Example:
        >>> attention_relevance(model, pairs, logit_diff(pairs)).mean("prompt").top(3)
    """
    prompts = as_prompts(model, prompts)
    metric = metric_for(metric, prompts)
    where = _reading_position(model, split_prompts(prompts)[0], metric, position)

    def matrices(model: HookedModel, rows: Stacked, ids: list[int]) -> Matrices:
        weighted = _weighted_patterns(model, rows, metric, ids)
        return torch.eye(rows.tokens.shape[1], dtype=weighted.dtype) + weighted  # R + Ā R = (I + Ā) R

    whole = isinstance(metric, CallableMetric)
    rule = _Rule("attention_relevance", "arbitrary units", _rollout, matrices, gradients=True, whole=whole)
    return _attributed(rule, model, prompts, where, over, budget, progress, of_metric=metric.name, of_unit=metric.unit)


# -- the rules --------------------------------------------------------------------------------------------------------

Matrices = Float[Tensor, "layer prompt dest src"]  # in float64


@dataclass(frozen=True)
class _Rule:
    """How a result is called, and how its values are made: `matrices` of the model, the tokens of some prompts and the
    numbers of these prompts; `chain` of the matrices, each prompt's target position, and whether every depth is wanted or
    the last alone. `gradients`: the matrices take a backward pass. `whole`: all prompts must run together."""

    name: str
    unit: str
    chain: Callable[[Matrices, Int[Tensor, "prompt"], bool], Float[Tensor, "depth prompt src"]]
    matrices: Callable[[HookedModel, Stacked, list[int]], Matrices]
    gradients: bool = False
    whole: bool = False


def _rollout(matrices: Matrices, target: Int[Tensor, "prompt"], every: bool) -> Float[Tensor, "depth prompt src"]:
    """The targets' rows of the product, the last layer's matrix being the leftmost."""
    product = torch.eye(matrices.shape[-1], dtype=matrices.dtype).expand_as(matrices[0])
    rows = []
    for layer in matrices:
        product = layer @ product
        rows.append(product[torch.arange(len(target)), target])
    return torch.stack(rows if every else rows[-1:])


def _flow(matrices: Matrices, target: Int[Tensor, "prompt"], every: bool) -> Float[Tensor, "depth prompt src"]:
    """The largest flows between the targets and each input position."""
    depths = range(1, len(matrices) + 1) if every else [len(matrices)]
    flows = [_flows(matrices[:, i].numpy(), depths, int(target[i])) for i in range(len(target))]
    return torch.from_numpy(np.stack(flows, axis=1))


def _flows(capacities: np.ndarray, depths: Sequence[int], target: int) -> Float[np.ndarray, "depth src"]:
    """The flows of one prompt, from the capacities `[layer dest src]` of its edges.

    Node `(depth, pos)` has the number `depth * length + pos`; edges lead from a layer's destinations to its sources.
    """
    from scipy.sparse import csr_array

    length = capacities.shape[-1]
    layer, dest, src = np.nonzero(capacities)
    head, tail, capacity = (layer + 1) * length + dest, layer * length + src, capacities[layer, dest, src]
    steps = np.floor(capacity * _STEPS).astype(np.int32)
    wide = steps > 0
    graph = csr_array((steps[wide], (head[wide], tail[wide])), shape=2 * ((len(capacities) + 1) * length,))
    flows = np.zeros((len(depths), length))
    for row, depth in enumerate(depths):
        for pos in range(length):
            above = _source_side(graph, depth * length + target, pos)
            flows[row, pos] = capacity[above[head] & ~above[tail]].sum()
    return flows


def _source_side(graph: Any, source: int, sink: int) -> np.ndarray:
    """Which nodes are on the source's side of a minimum cut: those to which more could flow."""
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    left = graph - maximum_flow(graph, source, sink).flow
    left.eliminate_zeros()
    side = np.zeros(graph.shape[0], dtype=bool)
    side[breadth_first_order(left, source, return_predecessors=False)] = True
    assert not side[sink]  # or the flow would not be the largest
    return side


# -- patterns and gradients of one batch of prompts -------------------------------------------------------------------


def _mixing(residual: float, head_fusion: HeadFusion) -> Callable[[HookedModel, Stacked, list[int]], Matrices]:
    """What gives `residual * I + (1 - residual) * A` of every layer, where A joins the heads. The rows sum to 1."""
    if isinstance(residual, bool) or not isinstance(residual, int | float) or not 0 <= residual <= 1:
        raise ValueError(f"residual: expected a share from 0 to 1, got {residual!r}")
    if head_fusion not in ("mean", "max"):
        raise ValueError(f"head_fusion: expected 'mean' or 'max', got {head_fusion!r}")

    def matrices(model: HookedModel, rows: Stacked, ids: list[int]) -> Matrices:
        def joined(pattern: Tensor, name: tuple[str, int]) -> Tensor:
            shares = _shares(pattern, name[1])
            one = shares.mean(1) if head_fusion == "mean" else shares.amax(1)
            return one / one.sum(-1, keepdim=True)  # of a mean too, so that rounding does not add up over the layers

        patterns = [("pattern", layer) for layer in range(model.n_layers)]
        with torch.no_grad(), capture(model, patterns, joined) as found:
            model.run(rows)
        identity = torch.eye(rows.tokens.shape[1], dtype=torch.float64)
        return residual * identity + (1 - residual) * torch.stack([found[name] for name in patterns])

    return matrices


def _shares(pattern: Tensor, layer: int) -> Float[Tensor, "batch head dest src"]:
    """A pattern in float64, if its rows are shares."""
    wide = pattern.detach().to("cpu", torch.float64)
    sums = wide.sum(-1)
    off = (sums - 1).abs().max()
    if not (off <= max(1e-5, 4 * torch.finfo(pattern.dtype).eps) and bool((wide >= 0).all())):
        raise ValueError(
            f"pattern of layer {layer}: expected rows that are shares (from 0 to 1, sum 1), got sums from "
            f"{float(sums.min()):.4g} to {float(sums.max()):.4g}. With attention sinks outside the prompt, or with edited "
            "patterns, shares of the input are not defined; attention_relevance needs none"
        )
    return wide


def _weighted_patterns(model: HookedModel, rows: Stacked, metric: Metric | CallableMetric, ids: list[int]) -> Matrices:
    """Mean over heads of max(0, gradient * pattern), for every layer.

    The gradient is that of a zero that is added to each pattern: it exists whether or not the parameters are frozen, and
    no parameter is touched. Prompts do not see each other, so the gradient of their sum holds each prompt's own.
    """
    patterns: dict[int, Tensor] = {}
    zeros: dict[int, Tensor] = {}

    def add_zero(pattern: Tensor, hook: Any, layer: int) -> Tensor:
        patterns[layer] = pattern.detach()
        zeros[layer] = torch.zeros_like(pattern, requires_grad=True)
        return pattern + zeros[layer]

    layers = range(model.n_layers)
    with torch.inference_mode(False), torch.enable_grad():
        with model.hooks([(("pattern", layer), partial(add_zero, layer=layer)) for layer in layers]):
            logits = model.run(rows.clone())  # a tensor that autograd may keep, wherever it was made
        value = _read(metric, widen(logits), ids)
        gradients = torch.autograd.grad(value.sum(), [zeros[layer] for layer in layers], allow_unused=True)
    weighted = []
    for layer, gradient in zip(layers, gradients, strict=True):
        if gradient is None:
            raise ValueError(
                f"pattern of layer {layer}: expected the metric to depend on it, but no gradient reaches it"
            )
        product = gradient.to("cpu", torch.float64) * patterns[layer].to("cpu", torch.float64)
        if not bool(product.isfinite().all()):
            raise ValueError(f"pattern of layer {layer}: expected finite gradients, got NaN or inf; load a wider dtype")
        weighted.append(product.clamp(min=0).mean(1))
    return torch.stack(weighted)


def _read(metric: Metric | CallableMetric, logits: Tensor, ids: list[int]) -> Float[Tensor, "prompt"]:
    """The metric of each prompt of a batch, ready for a gradient."""
    prompt = torch.tensor(ids)
    if isinstance(metric, CallableMetric):
        value = call_metric(metric, logits_at_hand(logits), np.array(ids), len(ids))
    else:
        rows = logits[torch.arange(len(ids), device=logits.device), metric.position[prompt].to(logits.device)]
        if metric.tokens is not None:
            rows = rows[:, metric.tokens.to(logits.device)]
        value = read_metric(metric, rows, prompt)
    if not bool(value.isfinite().all()):
        raise ValueError(f"metric {metric.name!r}: expected finite values, got {value.tolist()}")
    if not value.requires_grad:
        raise ValueError(
            f"metric {metric.name!r}: expected one with a gradient, got none (it counts, or was detached). Use logit_diff"
        )
    return value


# -- prompts in, Result out -------------------------------------------------------------------------------------------


def _attributed(
    rule: _Rule,
    model: HookedModel,
    prompts: Prompts | PromptPairs,
    position: str | int | Tensor,
    over: Over,
    budget: int | None,
    progress: bool,
    **given: Any,
) -> Result:
    """The rule's values for all prompts, those of one length together as far as memory allows; NaN where a prompt ends."""
    tokens, named, task = split_prompts(prompts)
    check_can_run(model, {"prompt": tokens})
    if over not in ("pos", "layer pos"):
        raise ValueError(f"over: expected 'pos' or 'layer pos', got {over!r}")
    model.hook_names("pattern")  # raises if this architecture lacks it in some layer
    target = position if isinstance(position, Tensor) else place_in_every(tokens, named, position)
    memory, every, longest = Budget.of(model, budget), over == "layer pos", int(tokens.lengths.max())
    dtype = wide_dtype(model.dtype)
    values = torch.full((model.n_layers if every else 1, longest, len(tokens)), torch.nan, dtype=dtype)
    with Progress(len(tokens), "prompt", progress) as bar:
        fit = None if rule.whole else lambda length, _: _prompts_at_once(model, length, memory, rule.gradients)
        for batch in tokens.batches(fit):
            matrices = rule.matrices(model, batch.stacked.to(model.device), batch.ids)
            found = rule.chain(matrices, target[batch.ids], every)
            values[:, : batch.length, batch.ids] = found.transpose(1, 2).to(dtype)
            bar.update(len(batch))
    given |= {"position": target.tolist() if isinstance(position, Tensor) else position, "task": task}
    given |= {"technique": rule.name, "site": "pattern", "over": over}
    coords = {"pos": position_labels(tokens, range(longest)), "prompt": tuple(range(len(tokens)))}
    return Result(
        values=values if every else values[0],
        dims=(*over.split(), "prompt"),
        coords={"layer": tuple(range(model.n_layers)), **coords} if every else coords,
        baseline={},
        base="",
        metric=rule.name,
        unit=rule.unit,
        provenance=provenance_of(model, tokens, **given),
        pictures=pictures_of(tokens),
    )


def _prompts_at_once(model: HookedModel, length: int, budget: Budget, gradients: bool) -> int:
    """Prompts that fit: logits, the activations of one layer (of all, for a gradient), and the kept matrices in float64."""
    neurons = max(getattr(model.cfg, "d_mlp", None) or 0, 4 * model.d_model)
    activations = length * (10 * model.d_model + 4 * neurons + 4 * model.n_heads * length)
    floats = 4 * length * model.d_vocab + activations * (model.n_layers if gradients else 1)
    doubles = length * length * (2 * model.n_layers + 4 * model.n_heads)
    fits = budget.bytes // (floats * torch.empty((), dtype=model.dtype).element_size() + 8 * doubles)
    return max(1, fits if budget.tokens is None else min(fits, budget.tokens // length))


def _reading_position(
    model: HookedModel, prompts: Prompts, metric: Metric | CallableMetric, position: str | int | None
) -> str | int | Tensor:
    """Where a metric reads, as far as it knows; refuses one that does not fit."""
    if isinstance(metric, Metric) and position is not None:
        raise ValueError(
            f"position: expected none, got {position!r}; make {metric.name!r} with the position that it shall read"
        )
    if isinstance(metric, Metric) and metric.reference is not None:
        raise ValueError(
            f"metric: {metric.name!r} compares with the {metric.reference} run; expected one of a single run, such as logit_diff "
            "(compared with itself, a run's divergence is 0, and so is its gradient)"
        )
    check_metric(model, prompts, metric, ("clean",))
    if isinstance(metric, Metric):
        return metric.position
    return "END" if position is None else position
