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
from typing import Literal

from mechkit._check import checked
from mechkit.engine import sweep
from mechkit.experiment.axes import Grid, make_grid, to_result
from mechkit.hooks import ActivationCache, HookedModel, one_at_a_time
from mechkit.metrics import AnyMetric, metric_for
from mechkit.prompts import PromptPairs, Prompts
from mechkit.result import Result


@checked
@one_at_a_time
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
    source_cache: ActivationCache | None = None,
    budget: int | None = None,
    progress: bool = True,
    replay: bool = True,
) -> Result:
    """Patches the source run's activation into the base run, one cell at a time.

    Args:
        model: In evaluation mode.
        pairs: Clean and corrupted prompts.
        metric: e.g. `logit_diff(pairs)`, made of these very pairs; the function that makes it, `logit_diff` itself (see
            `metric_factory`); or any callable on logits `[batch pos d_vocab]` that returns `[batch]`, for prompts of one length:
            it is given all prompts together and in their order, whatever is run at once.
        site: `"z"`, `"resid_pre"`, `"mlp_out"`, … (see `mechkit.hooks.SITES`), or a full hook name of one.
        over: The dims of the result: `"layer"`, `"layer pos"`, `"layer position"` (named positions, so that prompts of
            different wording average), `"layer head"`, `"layer pos head"`, `"layer neuron"`, … A dim that is not named is
            patched as a whole: `"layer head"` patches a head at all positions. For `k` and `v`, heads are key-value heads.
        direction: `"denoise"` puts clean activations into the corrupted run: a high value means that the activation
            suffices to bring the answer back. `"noise"` puts corrupted ones into the clean run: a low value means that the
            answer needs it.
        layers, heads, positions, neurons: Restrict those dims. `positions` are indices with `pos`, names with `position`.
        source_cache: The source run's activations, if one has them (from `run_with_cache` on those very prompts).
        budget: Bytes of working memory; default half of the GPU's free memory, 1 GiB on a CPU.
        progress: Show a progress bar when it takes long.
        replay: `False` runs one whole forward pass for every row, for comparison.

    Returns:
        A `Result` with dims `(*over, "prompt")`: the metric of each patched run, in the metric's unit. Its baselines are
        both unpatched runs, so that `.mean("prompt").normalized()` is 0 at the corrupted run and 1 at the clean run in
        either direction. Positions that a shorter prompt lacks are NaN.

    Raises:
        ValueError: unequal lengths, an unknown site or dim, training mode, NaN in a run, another model's cache.

    Example:
        >>> heads = activation_patching(model, pairs, logit_diff(pairs), site="z", over="layer head")
        >>> heads.mean("prompt").normalized().top(3)
    """
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction: expected 'denoise' or 'noise', got {direction!r}")
    if not isinstance(pairs, PromptPairs):
        raise ValueError(f"pairs: expected PromptPairs, got {type(pairs).__name__}")
    metric = metric_for(metric, pairs)
    denoise = direction == "denoise"
    base, source = (pairs.corrupted, pairs.clean) if denoise else (pairs.clean, pairs.corrupted)
    grid = make_grid(
        model,
        pairs.clean,
        pairs.positions,
        site,
        over,
        layers=layers,
        heads=heads,
        positions=positions,
        neurons=neurons,
    )
    if source_cache is not None:
        _check_cache(source_cache, model, source, grid)
    answers = sweep(
        model,
        base,
        grid.cells,
        metric,
        source=source,
        source_sites=source_cache,
        base_is="corrupted" if denoise else "clean",
        source_is="clean" if denoise else "corrupted",
        budget=budget,
        progress=progress,
        replay=replay,
    )
    return to_result(
        grid,
        answers,
        model,
        pairs.clean,
        metric,
        base="corrupted" if denoise else "clean",
        source="clean" if denoise else "corrupted",
        technique="activation_patching",
        direction=direction,
        task=pairs.task,
    )


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
