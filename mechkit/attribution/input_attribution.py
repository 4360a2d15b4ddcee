"""Which input tokens, and which neurons, a metric rests on: gradients at one run, or along a path from a baseline to it.

*Gradient times input* (Shrikumar et al. 2016, https://arxiv.org/abs/1605.01713):

1. Take the gradient of the metric with respect to what the first block reads at each position (`resid_pre` of layer 0).
2. A position's value is the inner product of the two. One backward pass; the values need not sum to anything.

*Integrated gradients* of the input (Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365):

1. Choose a baseline: what the first block reads when every token's embedding is replaced (by zero, the vocabulary's mean, or
   one token's). Positional embeddings, and whatever else the model does to embeddings, stay: only the tokens' identity counts.
2. Move from the baseline to the actual input in a straight line, and average the gradients on the way.
3. A position's value is the inner product of that average and the change. The values sum to `m(actual) - m(baseline)`.

*Neurons*, likewise (or heads, or any other site inside the blocks), in two ways:

- `path="activation"`: each layer's activations move by themselves from zero to their values in the run (Dai et al. 2022,
  https://arxiv.org/abs/2104.08696, with all neurons of a layer at once). A layer sums to what zeroing all of it takes away.
- `path="input"`: the embeddings move, as above, and the neurons follow. A neuron's *conductance* is the integral of the gradient
  at the neuron over the neuron's own change (Dhamdhere et al. 2019, https://arxiv.org/abs/1805.12233; summed as in Shrikumar et
  al. 2018, https://arxiv.org/abs/1807.09946): the part of the input's attribution that flows through it. A layer through which
  everything flows (`resid_pre`, `resid_mid`, `resid_post`) sums to `m(actual) - m(baseline)`; others have a bypass.

A metric may bend a lot on the way: norms jump next to zero, and the first position's attention sink switches on at once (`keep`
it). `completeness_error` in the provenance says how far the sums are from what they should be: near 1, they mean nothing.

captum has these methods and is the reference in the tests. It is not used here: the sums are a few lines on paths that other
methods share, which do all layers in the same runs, unembed the metric's tokens alone, and need no plotting library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._check import checked
from mechkit.attribution._baseline import Baseline
from mechkit.engine import frozen_parameters
from mechkit.experiment.axes import Chosen
from mechkit.experiment.estimates import AnyMetric, Experiment, GradientChunk, Key, hook_name, make_single_experiment
from mechkit.experiment.passes import check_reached, tapped, unedited
from mechkit.experiment.patches import takes_patches
from mechkit.experiment.provenance import pictures_of, provenance_of
from mechkit.experiment.quadrature import Rule, along_activation, batches, metric_with, quadrature
from mechkit.hooks import HookedModel, get_site, one_at_a_time
from mechkit.hooks._capture import keepers
from mechkit.metrics import Metric, metric_for
from mechkit.prompts import AnyPrompts, PromptPairs, Prompts, as_prompts
from mechkit.result import Cost, Result

_INPUT: Key = ("resid_pre", 0)  # what the first block reads
_CUTS = ("resid_pre", "resid_mid", "resid_post")  # everything that a later layer gets flows through these


@checked
@one_at_a_time
def gradient_x_input(
    model: HookedModel,
    prompts: AnyPrompts,
    metric: AnyMetric,
    *,
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """The embedding at each position times the metric's gradient there: how the metric grows as the embedding is scaled up.

    First order at one point, and blind to what is saturated there. The embedding is all that the first block reads, positional
    embeddings included.

    Args:
        model: In evaluation mode. Its parameters are frozen meanwhile and get no gradient.
        prompts: Of any lengths. Of pairs, the clean prompts.
        metric: A differentiable metric of one run, e.g. `logit_diff(pairs)`; or a callable `[batch pos d_vocab] -> [batch]` for
            prompts of one length.
        budget: Bytes for activations kept for the backward pass; default half of what the device has free (1 GiB on a CPU).
        progress: Show a progress bar when it takes long.

    Returns:
        A `Result` with dims `("pos", "prompt")` and no baseline, in the metric's unit: positive where more of this embedding
        raises the metric. Positions after the one that the metric reads have 0; those that a shorter prompt lacks are NaN.

    Raises:
        ValueError: a metric without a gradient, that compares with another run, or that was made for other prompts; training
            mode; a metric or a gradient that is not finite.

    Example:
        >>> gradient_x_input(model, pairs, logit_diff(pairs)).mean("prompt").top(3)
    """
    prompts = as_prompts(model, prompts)
    reader = metric_for(metric, prompts)
    if isinstance(reader, Metric) and reader.reference is not None:
        raise ValueError(
            f"metric: expected one of a single run, such as mk.logit_diff; {reader.name!r} compares with the "
            f"{reader.reference} run, and at that run itself its gradient is 0. token_integrated_gradients can use it"
        )
    experiment = _input_experiment(model, prompts, reader, budget, progress)
    with frozen_parameters(model):
        for chunk in experiment.chunks():
            actual = _actual(experiment, chunk)
            # Integrated gradients from zero with one point, at the end of the path: (actual - 0) * gradient at actual.
            zero, enters = torch.zeros_like(actual), _enters(chunk, {0: actual})
            _check_finite(along_activation(chunk, _INPUT, zero, actual, enters, [1.0], [1.0]), "gradient at the input")
    return _result(experiment, passes=1, technique="gradient_x_input")


@checked
@one_at_a_time
@torch.inference_mode(False)
def token_integrated_gradients(
    model: HookedModel,
    prompts: AnyPrompts,
    metric: AnyMetric,
    *,
    baseline: str | int = "zero",
    keep: Sequence[int] | None = None,
    steps: int = 50,
    rule: Rule = "midpoint",
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """Integrated gradients of the input tokens: how much each position adds to the metric, from a baseline to the actual prompt.

    Args:
        model, prompts, metric, budget, progress: As for `gradient_x_input`. `kl_divergence(pairs)` is allowed: the baseline's
            divergence from the actual run is what is shared out, with a minus sign.
        baseline: What stands for "no token" at every position that is not kept: `"zero"` (the zero vector in place of the
            token's embedding), `"mean"` (the mean embedding of the whole vocabulary), or a token, by its id or its text (a token
            whose text is "zero" or "mean" by its id). Positional embeddings and embedding norms stay as they are. A common
            token such as `" the"` makes the smoothest path: it is a prompt that the model can read.
        keep: Positions that have their own token in the baseline too, and so get exactly 0. Default: the first one if it is the
            tokenizer's beginning-of-sequence token, otherwise none; `()` for none. Many models use the first token, whatever it
            is, as an attention sink, and do not work without it: `keep=[0]` then.
        steps: Gradients along the path, each a forward and a backward pass.
        rule: Where they are taken: `"midpoint"` (never at the ends themselves), `"left"`, `"gauss-legendre"` (best for smooth
            paths, worst for others), or `"stretched"` (closer together in the middle).

    Returns:
        A `Result` with dims `("pos", "prompt")` and no baseline, in the metric's unit: positive where the token, instead of the
        baseline, raises the metric. The values of a prompt sum to `m(actual) - m(baseline)`. Provenance: `metric_actual` and
        `metric_baseline`, averaged over prompts, and `completeness_error`: how far the sums are from that, averaged over
        prompts without sign, as a share of the average of `|m(actual) - m(baseline)|`. Positions after the one that the metric
        reads have 0; those that a shorter prompt lacks are NaN.

    Raises:
        ValueError: as `gradient_x_input`; an unknown baseline or rule; no steps; a position to keep that a prompt lacks.

    Example:
        >>> tokens = token_integrated_gradients(model, pairs, logit_diff(pairs), baseline=" the")
        >>> tokens.mean("prompt").top(3), tokens.provenance["completeness_error"]
    """
    prompts = as_prompts(model, prompts)
    points, weights = quadrature(steps, rule)
    experiment = _input_experiment(model, prompts, metric, budget, progress)
    experiment.gradients = len(points)
    without, sums = Baseline.of(experiment, baseline, keep), _Sums(experiment, [_INPUT])
    with frozen_parameters(model):
        for chunk in experiment.chunks():
            actual = _actual(experiment, chunk)
            start = without.start(chunk, actual)
            found = along_activation(chunk, _INPUT, start, actual, _enters(chunk, {0: actual}), points, weights)
            sums.keep(chunk, found[None], _metric_from(chunk, start)[None])
    asked = {"baseline": without.stand_in, "keep": without.keep, "steps": len(points), "rule": rule}
    end = {"metric_baseline": sums.starts_at(), "completeness_error": max(sums.errors())}
    return _result(experiment, passes=len(points), technique="token_integrated_gradients", **asked, **end)


@checked
@one_at_a_time
@torch.inference_mode(False)
@takes_patches
def neuron_attribution(
    model: HookedModel,
    prompts: AnyPrompts,
    metric: AnyMetric,
    *,
    site: str = "mlp_post",
    over: str = "layer neuron",
    path: Literal["activation", "input"] = "activation",
    baseline: str | int = "zero",
    keep: Sequence[int] | None = None,
    steps: int = 20,
    rule: Rule = "midpoint",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    positions: Sequence[int] | Sequence[str] | None = None,
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """How much each neuron (or head, or position of a layer) adds to the metric, by integrated gradients.

    Args:
        model, prompts, metric, budget, progress: As for `token_integrated_gradients`.
        site: Whose entries: `"mlp_post"` (neurons), `"z"`, `"mlp_out"`, `"resid_pre"`, or any other site inside the blocks but
            `"attn_scores"`, where zero does not mean nothing.
        over: The dims of the result, as for `activation_patching`: `"layer neuron"`, `"layer position neuron"`, for `z`
            `"layer head"`, … Dims that are not named are summed over.
        path: `"activation"` moves each layer's activations from zero to their values, with everything before them as in the
            actual run: `steps` runs of every layer from there on. `"input"` moves the embeddings and gives conductances: twice
            `steps` runs in all.
        baseline, keep: For `path="input"`, where the embeddings begin; as for `token_integrated_gradients`.
        steps, rule: As for `token_integrated_gradients`. For `path="input"` each gradient is multiplied by the neuron's change
            over the stretch of the path that its weight stands for.
        layers, heads, neurons, positions: Restrict these dims. `positions` are indices with `pos`, names with `position`.

    Returns:
        A `Result` with dims `(*over, "prompt")` and no baseline, in the metric's unit: positive where the activation, as it is in
        the run, raises the metric. Positions that a shorter prompt lacks are NaN. Provenance: `metric_actual`, averaged over
        prompts, and `completeness_error`, the largest of `completeness_errors`. For `path="activation"` these say for each layer
        how far the sum over its whole activation is from `m(actual) - m(layer zeroed)`; for `path="input"` how far the sum over
        the embeddings is from `m(actual) - m(baseline)` (`metric_baseline`), and for the residual stream that of each layer.
        All are averaged over prompts without sign, as a share of the average size of these differences. Where a norm follows
        (`z`, `mlp_post` in Gemma 2, Gemma 3, OLMo 2) the path from zero jumps at its start, and hundreds of steps have an error
        near 1: use `attn_out` and `mlp_out` there.

    Raises:
        ValueError: as `token_integrated_gradients`; an unknown site, dim or path; a site that this architecture lacks.

    Example:
        >>> neurons = neuron_attribution(model, pairs, logit_diff(pairs), layers=[20, 21])
        >>> neurons.mean("prompt").top(10)
    """
    prompts = as_prompts(model, prompts)
    if path not in ("activation", "input"):
        raise ValueError(f"path: expected 'activation' or 'input', got {path!r}")
    if path == "activation" and (baseline != "zero" or keep is not None):
        raise ValueError(f"baseline, keep: expected none but for path='input', got {baseline!r} and {keep!r}")
    points, weights = quadrature(steps, rule)
    _check_site(site)
    chosen: Chosen = {"layers": layers, "heads": heads, "neurons": neurons, "positions": positions}
    experiment = make_single_experiment(model, prompts, metric, site, over, budget=budget, progress=progress, **chosen)
    experiment.gradients = len(points) * (len(experiment.keys) if path == "activation" else 1)
    without = Baseline.of(experiment, baseline, keep)
    whole = path == "activation" or get_site(site).name in _CUTS  # whether a layer's sum is known
    sums = _Sums(experiment, [*(experiment.keys if whole else []), *([_INPUT] if path == "input" else [])])
    with frozen_parameters(model):
        for chunk in experiment.chunks():
            if path == "activation":
                _grow_activations(experiment, chunk, points, weights, sums)
            else:
                _conduct(experiment, chunk, without, points, weights, sums)
    asked: dict[str, Any] = {"path": path, "baseline": without.stand_in, "steps": len(points), "rule": rule}
    asked |= {"keep": without.keep, "metric_baseline": sums.starts_at()} if path == "input" else {}
    found = {"completeness_error": max(sums.errors()), "completeness_errors": sums.errors()}
    passes = len(points) * (2 if path == "input" else len(experiment.keys))
    return _result(experiment, passes=passes, technique="neuron_attribution", **asked, **found)


def _input_experiment(
    model: HookedModel, prompts: PromptPairs | Prompts, metric: AnyMetric, budget: int | None, progress: bool
) -> Experiment:
    """An experiment on what the first block reads. Its effects have a layer axis of length one."""
    return make_single_experiment(
        model, prompts, metric, "resid_pre", "layer pos", layers=[0], budget=budget, progress=progress
    )


def _check_site(site: str) -> None:
    found = get_site(site)
    if not found.in_block or found.name == "attn_scores":
        raise ValueError(
            f"site: expected one inside the blocks where zero means nothing, got {found.name!r}; for the embeddings use "
            "token_integrated_gradients, for attention 'pattern'"
        )


def _enters(chunk: GradientChunk, hidden: dict[int, Tensor]) -> dict[int, Tensor] | None:
    """What blocks read, for runs that can begin at a block."""
    return hidden if chunk.runs.how == "suffix" else None


def _actual(experiment: Experiment, chunk: GradientChunk) -> Float[Tensor, "prompt pos d_model"]:
    """What the first block reads in the unedited run, whose metric is kept."""
    _, hidden, final = unedited(experiment, chunk, experiment.base_is)
    chunk.keep_unedited({experiment.base_is: final})
    return hidden[0]


@torch.no_grad()
def _metric_from(chunk: GradientChunk, start: Float[Tensor, "prompt pos d_model"]) -> Float[Tensor, "prompt"]:
    """The metric of runs that begin with `start` instead of the embeddings."""
    return metric_with(chunk, _INPUT, start, chunk.everyone, _enters(chunk, {0: start}))


def _grow_activations(
    experiment: Experiment, chunk: GradientChunk, points: list[float], weights: list[float], sums: _Sums
) -> None:
    """Adds the integral of every layer from zero to its activations."""
    kept, hidden, final = unedited(experiment, chunk, experiment.base_is)
    chunk.keep_unedited({experiment.base_is: final})
    enters, totals, zeroed = _enters(chunk, hidden), [], []
    for key in experiment.keys:
        zero = torch.zeros_like(kept[key])
        totals.append(along_activation(chunk, key, zero, kept[key], enters, points, weights))
        with torch.no_grad():
            zeroed.append(metric_with(chunk, key, zero, chunk.everyone, enters))
    sums.keep(chunk, torch.stack(totals), torch.stack(zeroed))


def _conduct(
    experiment: Experiment,
    chunk: GradientChunk,
    without: Baseline,
    points: list[float],
    weights: list[float],
    sums: _Sums,
) -> None:
    """Adds, for every stretch of the embeddings' path, the gradients at its point times the activations' change along it."""
    actual, keys = _actual(experiment, chunk), list(dict.fromkeys([*experiment.keys, _INPUT]))
    start, n, silent = without.start(chunk, actual), len(chunk.everyone), set(experiment.keys)
    # Where the stretches end; the first begins at 0.
    ends = [sum(weights[: k + 1]) / sum(weights) for k in range(len(weights))]
    before = _activations(chunk, keys, start, chunk.everyone)
    totals = torch.zeros(len(sums.keys), n, dtype=sums.dtype, device=start.device)
    for row, point, end in batches(chunk, points, ends):
        along = [(start[row] + at[:, None, None] * (actual - start)[row]).to(start.dtype) for at in (point, end)]
        after = _activations(chunk, keys, along[1], row)  # rows of one point stand together
        change = {key: x - torch.cat([before[key], x[:-n]]) for key, x in after.items()}
        before = {key: x[-n:].clone() for key, x in after.items()}
        del after

        def contract(gradient: Tensor, key: Key, row: Tensor = row, change: dict[Key, Tensor] = change) -> None:
            silent.discard(key)
            share = change.pop(key) * gradient
            if key in sums.keys:
                totals[sums.keys.index(key)].index_add_(0, row, share.flatten(1).sum(1).to(totals))
            if key in experiment.keys:
                chunk.add(key, share, row)

        def keep(activation: Tensor, hook: Any, fn: Callable[[Tensor], None]) -> Tensor:
            return tapped(activation, fn)

        hooks = [(hook_name(key), partial(keep, fn=partial(contract, key=key))) for key in keys]
        rows = chunk.inputs[experiment.base_is][row]
        leaf, final = chunk.runs.forward(rows, row, hooks, hidden=along[0], leaf=True)
        assert leaf is not None
        torch.autograd.grad(chunk.metric(final, row).sum(), leaf)
    check_reached(experiment, silent)
    sums.keep(chunk, totals, _metric_from(chunk, start).expand(len(sums.keys), -1))


@torch.no_grad()
def _activations(
    chunk: GradientChunk, keys: Sequence[Key], hidden: Float[Tensor, "row pos d_model"], row: Int[Tensor, "row"]
) -> dict[Key, Tensor]:
    """The activations at `keys` of runs whose first block reads `hidden`."""
    kept: dict[Key, Tensor] = {}
    chunk.runs.forward(chunk.inputs[chunk.experiment.base_is][row], row, keepers(keys, kept), hidden=hidden)
    return kept


class _Sums:
    """For each key and prompt the sum of all shares, and the metric at the start of the path, for the error of completeness."""

    def __init__(self, experiment: Experiment, keys: Sequence[Key]) -> None:
        self.keys, self._study = list(dict.fromkeys(keys)), experiment
        self.dtype = experiment.values[experiment.base_is].dtype
        self._total, self._start = (
            torch.zeros(len(self.keys), len(experiment.base), dtype=self.dtype) for _ in range(2)
        )

    def keep(
        self, chunk: GradientChunk, total: Float[Tensor, "key prompt"], start: Float[Tensor, "key prompt"]
    ) -> None:
        """Stores a chunk's values; raises `ValueError` where they are not finite."""
        _check_finite(start, "metric at the start of the path")
        _check_finite(total, "gradients along the path")
        self._total[:, chunk.ids], self._start[:, chunk.ids] = (x.detach().cpu().to(self.dtype) for x in (total, start))

    def starts_at(self) -> float:
        """The metric at the start of the path, averaged over prompts."""
        return float(self._start[-1].mean())

    def errors(self) -> list[float]:
        """|sum of shares - (m(end) - m(start))| as a share of |m(end) - m(start)|, each averaged over prompts; for each key."""
        gap = self._study.values[self._study.base_is] - self._start
        return ((self._total - gap).abs().mean(1) / gap.abs().mean(1).clamp(min=1e-12)).tolist()


def _check_finite(values: Tensor, what: str) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{what}: expected finite numbers, got NaN or inf; load the model in a wider dtype")


def _result(experiment: Experiment, *, passes: int, **provenance: Any) -> Result:
    """The experiment's effects. `passes`: whole forward passes that the plain way takes."""
    axes = next(iter(experiment.axes.values()))
    values, dims = experiment.effects[axes.site.name], axes.dims
    if provenance["technique"] != "neuron_attribution":  # its one layer is no dim
        values, dims = values[0], ("pos",)
    return Result(
        values=values,
        dims=(*dims, "prompt"),
        coords={**{dim: axes.coords[dim] for dim in dims}, "prompt": tuple(range(len(experiment.base)))},
        baseline={},
        base="",
        metric=experiment.metric.name,
        unit=experiment.metric.unit,
        provenance=provenance_of(
            experiment.model,
            experiment.base,
            site=axes.site.name,
            over=" ".join(dims),
            runs=experiment.how,
            metric_actual=float(experiment.values[experiment.base_is].mean()),
            **{**experiment.provenance, **provenance},
        ),
        cost=Cost(experiment.block_tokens, int(experiment.base.lengths.sum()) * experiment.model.n_layers * passes),
        pictures=pictures_of(experiment.base),
    )
