"""Activation patching: put one activation of one run into another, and see how far the answer follows.

1. The source run (the clean prompts, when denoising) is run once; the site's activations are kept.
2. For every cell of `over`, the base run is run with that one activation taken from the source run.
3. The metric of each such run is the cell's value.

Exact: each value equals a whole forward pass with a hook. See `mechkit.hooks` for why it costs a fraction of one.

Meng et al. 2022, https://arxiv.org/abs/2202.05262 (causal tracing); Wang et al. 2022, https://arxiv.org/abs/2211.00593;
Heimersheim and Nanda 2024, https://arxiv.org/abs/2404.15255 (denoising and noising, and what each can show).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, overload

from mechkit._check import checked
from mechkit._warnings import warn_of_task
from mechkit.attribution._across import ELSEWHERE, aligned_positions, check_across, metric_of, values_across
from mechkit.engine import Answers, Budget, metric_of_run, sweep
from mechkit.experiment.axes import Grid, make_grid, to_result
from mechkit.experiment.patches import takes_patches
from mechkit.experiment.positions import base_and_source
from mechkit.experiment.sets import Sets
from mechkit.hooks import ActivationCache, HookedModel, one_at_a_time
from mechkit.metrics import AnyMetric, CallableMetric, Metric, metrics_for
from mechkit.prompts import PromptPairs, Prompts
from mechkit.result import Result


@overload
def activation_patching(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    site: str = "z",
    over: str = "layer head",
    *,
    direction: Literal["denoise", "noise"] = "denoise",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | Sequence[str] | None = None,
    neurons: Sequence[int] | None = None,
    cells: Sets | None = None,
    source_cache: ActivationCache | None = None,
    source_model: HookedModel | None = None,
    budget: int | None = None,
    progress: bool = True,
    replay: bool = True,
) -> Result: ...


@overload
def activation_patching(
    model: HookedModel, pairs: PromptPairs, metric: Sequence[AnyMetric], *args: Any, **options: Any
) -> list[Result]: ...


@checked
@one_at_a_time
@takes_patches
def activation_patching(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric | Sequence[AnyMetric],
    site: str = "z",
    over: str = "layer head",
    *,
    direction: Literal["denoise", "noise"] = "denoise",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | Sequence[str] | None = None,
    neurons: Sequence[int] | None = None,
    cells: Sets | None = None,
    source_cache: ActivationCache | None = None,
    source_model: HookedModel | None = None,
    budget: int | None = None,
    progress: bool = True,
    replay: bool = True,
) -> Result | list[Result]:
    """Patches the source run's activation into the base run, one cell at a time.

    Args:
        model: In evaluation mode.
        pairs: Clean and corrupted prompts.
        metric: e.g. `logit_diff(pairs)`, made of these very pairs; the function that makes it, `logit_diff` itself (see
            `metric_factory`); or any callable on logits `[batch pos d_vocab]` that returns `[batch]`, for prompts of one length:
            it is given all prompts together and in their order, whatever is run at once. A list of metrics is read off the same
            runs.
        site: `"z"`, `"resid_pre"`, `"mlp_out"`, … (see `mechkit.hooks.SITES`), or a full hook name of one.
        over: The dims of the result: `"layer"`, `"layer pos"`, `"layer position"` (named positions, so that prompts of
            different wording average), `"layer head"`, `"layer pos head"`, `"layer neuron"`, … A dim that is not named is
            patched as a whole: `"layer head"` patches a head at all positions. For `k` and `v`, heads are key-value heads.
        direction: `"denoise"` puts clean activations into the corrupted run: a high value means that the activation
            suffices to bring the answer back. `"noise"` puts corrupted ones into the clean run: a low value means that the
            answer needs it.
        layers, heads, positions, neurons: Restrict those dims. `positions` are indices with `pos`, names with `position`.
        cells: Sets of places that are patched together, one cell each, instead of every place by itself:
            `[[(23, 3), (20, 0)], [(9, 6)]]` with `over="layer head"`, or with names, `{"movers": [(23, 3), (20, 0)]}`. Each place
            is a tuple in the order of `over`, or a cell of `Result.top`. The result's dims are then `("cell", "prompt")`.
        source_cache: The source run's activations, if one has them (from `run_with_cache` on those very prompts).
        source_model: Another model of the same shapes (the fine-tuned one, another checkpoint) in which the source prompts are
            run. To patch from one model into another on the same prompts, give pairs whose two prompts are the same.
        budget: Bytes of working memory; default half of the GPU's free memory, 1 GiB on a CPU.
        progress: Show a progress bar when it takes long.
        replay: `False` runs one whole forward pass for every row, for comparison.

    Returns:
        A `Result` with dims `(*over, "prompt")`: the metric of each patched run, in the metric's unit. Its baselines are
        both unpatched runs, so that `.mean("prompt").normalized()` is 0 at the corrupted run and 1 at the clean run in
        either direction. Positions that a shorter prompt lacks are NaN. For a list of metrics a list of Results, in their order;
        the cost of each is that of the one sweep.

    Raises:
        ValueError: unequal lengths, an unknown site or dim, training mode, NaN in a run, another model's cache.

    Example:
        >>> heads = activation_patching(model, pairs, logit_diff(pairs), site="z", over="layer head")
        >>> heads.mean("prompt").normalized().top(3)
    """
    base_is, source_is = base_and_source(pairs, direction, aligned=True)
    base, source = getattr(pairs, base_is), getattr(pairs, source_is)
    measured = metrics_for(metric, pairs)
    across = source_model is not None or pairs.align is not None
    grid = make_grid(
        model,
        pairs.clean if pairs.align is None else base,
        pairs.positions if pairs.align is None else aligned_positions(pairs, base_is),
        site,
        over,
        layers=layers,
        heads=heads,
        positions=positions,
        neurons=neurons,
        cells=cells,
        value=ELSEWHERE if across else "source",
    )
    if across:
        answers, more = _patch_across(
            model,
            source_model or model,
            pairs,
            measured,
            base_is,
            source_is,
            grid,
            source_cache,
            budget,
            progress,
            replay,
        )
    else:
        if source_cache is not None:
            _check_cache(source_cache, model, source, grid)
        answers, more = (
            sweep(
                model,
                base,
                grid.cells,
                measured,
                source=source,
                source_sites=source_cache,
                base_is=base_is,
                source_is=source_is,
                budget=budget,
                progress=progress,
                replay=replay,
            ),
            {},
        )
    return to_result(
        grid,
        answers,
        model,
        pairs.clean,
        measured,
        base=base_is,
        source=source_is,
        technique="activation_patching",
        direction=direction,
        task=pairs.task,
        **more,
    )


def _patch_across(
    model: HookedModel,
    source_model: HookedModel,
    pairs: PromptPairs,
    metric: Metric | CallableMetric,
    base_is: str,
    source_is: str,
    grid: Grid,
    source_cache: ActivationCache | None,
    budget: int | None,
    progress: bool,
    replay: bool,
) -> tuple[Answers, dict[str, str]]:
    """The answers where the source is of another length or another model, and what provenance says of it."""
    if source_cache is not None:
        raise ValueError("source_cache: expected none with source_model, or with pairs of aligned positions")
    check_across(pairs, model, source_model, grid)
    of_base, of_source = (metric_of(metric, pairs, run) for run in (base_is, source_is))
    base, source, room = getattr(pairs, base_is), getattr(pairs, source_is), Budget.of(model, budget)
    values = {ELSEWHERE: values_across(model, source_model, pairs, base_is, source_is, grid, room)}
    answers = sweep(
        model,
        base,
        grid.cells,
        of_base,
        values=values,
        base_is=base_is,
        budget=budget,
        progress=progress,
        replay=replay,
    )
    answers = replace(answers, source=metric_of_run(source_model, source, of_source, room).to(answers.base))
    if base_is == "corrupted" and isinstance(metric, Metric):  # else the sweep has looked at the clean run
        assert answers.source is not None
        for i, part in enumerate(metric.parts or (metric,)):
            at = (..., i) if metric.parts else ...
            warn_of_task(part.name, {"clean": answers.source[at], "corrupted": answers.base[at]})
    if source_model is model:
        return answers, {}
    return answers, {"source_model": source_model.name, "source_weights_hash": source_model.weights_hash}


def _check_cache(cache: ActivationCache, model: HookedModel, source: Prompts, grid: Grid) -> None:
    if cache.weights_hash != model.weights_hash:
        raise ValueError(
            f"source_cache: expected a cache of {model.name} with weights {model.weights_hash}, got one of a model with "
            f"weights {cache.weights_hash}. Make it again with model.run_with_cache"
        )
    expected = [row.tolist() for row in source.tokens]
    if cache.tokens is None or cache.tokens.tolist() != expected:
        got = "no tokens" if cache.tokens is None else f"tokens {list(cache.tokens.shape)}"
        raise ValueError(
            f"source_cache: expected a cache of exactly the {len(source)} source prompts, got one of {got}. Nothing is "
            "broadcast or aligned by guessing"
        )
    if cache.inputs_hash != source.stack(range(len(source))).inputs_hash():
        raise ValueError(
            "source_cache: expected a cache of the source prompts' own pictures, got one of other pictures (or of none)"
        )
    if not cache.whole:
        raise ValueError(
            "source_cache: expected all positions of a plain run, got a cache made with `positions`, with an attention mask "
            "or with hooks on the model"
        )
    for site, layer in {(edit.site, edit.layer) for cell in grid.cells for edit in cell}:
        if (site, layer) not in cache:
            raise ValueError(f"source_cache: it holds no {site!r} of layer {layer}; cache that site too")
        if (dtype := cache[site, layer].dtype) != model.dtype:
            raise ValueError(
                f"source_cache: expected {site!r} in the model's {model.dtype}, got {dtype}; record it without dtype="
            )
