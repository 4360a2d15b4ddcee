"""Ablation: take one activation away, and see what is lost.

1. Choose the replacement: zero, the mean over a reference set, the mean at each position, or another prompt's activation.
2. For every cell of `over`, the clean run is run with that activation replaced.
3. The metric of each such run is the cell's value; `effect()` is the change from the clean run.

A zero is far from anything that the model ever sees there, so zero ablation also breaks what only passes through; the mean
keeps what all prompts share, and resampling keeps the distribution (Chan et al. 2022, causal scrubbing).

Wang et al. 2022, https://arxiv.org/abs/2211.00593 (mean ablation per position); Zhang and Nanda 2023,
https://arxiv.org/abs/2309.16042 (how the choice changes the answer).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from mechkit._check import checked
from mechkit.engine import Budget, check_can_run, sweep
from mechkit.experiment.axes import Grid, make_grid, to_result
from mechkit.experiment.patches import takes_patches
from mechkit.experiment.positions import split_prompts
from mechkit.experiment.sets import Sets
from mechkit.hooks import HookedModel, one_at_a_time, record
from mechkit.hooks._record import longest_at
from mechkit.hooks._sites import TOWER
from mechkit.metrics import AnyMetric, metrics_for
from mechkit.prompts import AnyPrompts, Prompts, as_prompts
from mechkit.result import Result

Mode = Literal["zero", "mean", "position_mean", "resample", "patch_mean", "blur"]
MODES: tuple[Mode, ...] = get_args(Mode)


@overload
def ablation(
    model: HookedModel,
    prompts: AnyPrompts,
    metric: AnyMetric,
    site: str = "z",
    over: str = "layer head",
    *,
    mode: Mode = "mean",
    reference: AnyPrompts | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | Sequence[str] | None = None,
    neurons: Sequence[int] | None = None,
    cells: Sets | None = None,
    seed: int = 0,
    budget: int | None = None,
    progress: bool = True,
    replay: bool = True,
) -> Result: ...


@overload
def ablation(
    model: HookedModel, prompts: AnyPrompts, metric: Sequence[AnyMetric], *args: Any, **options: Any
) -> list[Result]: ...


@checked
@one_at_a_time
@takes_patches
def ablation(
    model: HookedModel,
    prompts: AnyPrompts,
    metric: AnyMetric | Sequence[AnyMetric],
    site: str = "z",
    over: str = "layer head",
    *,
    mode: Mode = "mean",
    reference: AnyPrompts | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | Sequence[str] | None = None,
    neurons: Sequence[int] | None = None,
    cells: Sets | None = None,
    seed: int = 0,
    budget: int | None = None,
    progress: bool = True,
    replay: bool = True,
) -> Result | list[Result]:
    """Replaces one activation of the clean run, one cell at a time.

    Args:
        model: In evaluation mode.
        prompts: The prompts to run: the clean ones of pairs.
        metric: As for `activation_patching`.
        site, over, layers, heads, positions, neurons, cells: As for `activation_patching`.
        mode: `"zero"`; `"mean"`, over all prompts and positions of the reference; `"position_mean"`, over its prompts at each
            position counted from the start (those that are long enough); `"resample"`, the same place in another prompt
            of equal length. For prompts with pictures also `"patch_mean"`, over all patches of the reference's pictures, and
            `"blur"`, the same place in the prompt with its picture blurred (`HookedModel.blurred`).
        reference: Where means and samples come from: the clean prompts themselves by default. For `"resample"` a given
            reference must pair up with the prompts, one each, of equal lengths; by default the prompts are shuffled so
            that none meets itself.
        seed: Of the shuffle.
        budget, progress, replay: As for `activation_patching`.

    Returns:
        A `Result` with dims `(*over, "prompt")`: the metric of each ablated run. Its baseline is the clean run;
        `effect()` is ablated minus clean, so that a component that helps has a negative effect on a logit difference. For a
        list of metrics a list of Results.

    Raises:
        ValueError: an unknown mode, site or dim; a reference that is too short, or has nobody to swap with; training mode.
    """
    reference = None if reference is None else as_prompts(model, reference, "reference")
    prompts = as_prompts(model, prompts)
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}; got {mode!r}")
    measured = metrics_for(metric, prompts)
    base, named, task = split_prompts(prompts)
    others = base if reference is None else split_prompts(reference)[0]
    value = "source" if mode in ("resample", "blur") else mode
    grid = make_grid(
        model,
        base,
        named,
        site,
        over,
        layers=layers,
        heads=heads,
        positions=positions,
        neurons=neurons,
        value=value,
        cells=cells,
    )
    values: dict[str, dict[tuple[str, int], Tensor]] | None = None
    source = None
    if mode == "blur":
        if reference is not None:
            raise ValueError(
                "reference: expected none with mode='blur', whose runs are those of the prompts' own pictures"
            )
        source = model.blurred(base)
    elif mode == "resample":
        source = _shuffled(base, seed) if reference is None else others
    else:
        values = {mode: _replacements(model, grid, mode, others, base, budget)}
    answers = sweep(
        model,
        base,
        grid.cells,
        measured,
        source=source,
        values=values,
        base_is="clean",
        source_is="resampled",
        budget=budget,
        progress=progress,
        replay=replay,
    )
    return to_result(
        grid,
        answers,
        model,
        base,
        measured,
        base="clean",
        source=None,
        technique="ablation",
        mode=mode,
        task=task,
        reference="the prompts themselves" if reference is None else f"{len(others)} prompts {others.hash()}",
        seed=seed if mode == "resample" else None,
    )


def _replacements(
    model: HookedModel, grid: Grid, mode: str, reference: Prompts, base: Prompts, budget: int | None
) -> dict[tuple[str, int], Tensor]:
    """What each `(site, layer)` is replaced with, `[1 pos-or-1 …]`."""
    keys = sorted({(edit.site, edit.layer) for cell in grid.cells for edit in cell})
    if mode == "zero" and grid.site.name.endswith("attn_scores"):
        raise ValueError(
            "mode: a zero score is not zero attention, and scores of masked positions would become visible; expected another "
            f"mode, or site={grid.site.name.replace('attn_scores', 'pattern')!r}"
        )
    if mode == "zero":
        zero = torch.zeros(1, dtype=model.dtype, device=model.device)
        return {key: zero.reshape([1] * (1 + len(grid.site.dims))) for key in keys}
    if "src" in grid.site.dims and (
        mode in ("mean", "patch_mean")
        or (
            grid.site.stack == TOWER and len({one.kind_of(i) for one in (base, reference) for i in range(len(one))}) > 1
        )
        or len(reference.by_length() | base.by_length()) > 1
    ):
        alike = "pictures of one size" if grid.site.stack == TOWER else "prompts of one length"
        given = f"{mode!r} with {alike.replace('one', 'several')}s" if mode == "position_mean" else repr(mode)
        raise ValueError(
            f"mode: site {grid.site.name!r} has one value for each source position; expected 'position_mean' with {alike}, "
            f"'zero' or 'resample'; got {given}"
        )
    longest = [longest_at(model, grid.site.name, prompts) for prompts in (base, reference)]
    if mode == "position_mean" and longest[0] > longest[1]:
        raise ValueError(
            f"reference: expected prompts of at least {longest[0]} {'positions' if grid.site.stack == TOWER else 'tokens'}, "
            f"so that every position has a mean; the longest has {longest[1]}"
        )
    if mode == "patch_mean" and grid.site.stack == TOWER:
        raise ValueError(
            "mode: in the vision tower every position is a patch; expected 'mean' in place of 'patch_mean'"
        )
    if mode == "patch_mean":
        return _patch_means(model, keys, grid, reference, Budget.of(model, budget))
    means = position_means(model, keys, grid.site.axis("pos"), reference, Budget.of(model, budget))
    if mode == "position_mean":
        return {
            key: mean.narrow(grid.site.axis("pos"), 0, longest[0]).to(model.dtype) for key, (mean, _) in means.items()
        }
    axis = grid.site.axis("pos")
    return {
        key: ((mean * count).sum(axis, keepdim=True) / count.sum()).to(model.dtype)
        for key, (mean, count) in means.items()
    }


@torch.no_grad()
def _patch_means(
    model: HookedModel, keys: Sequence[tuple[str, int]], grid: Grid, reference: Prompts, budget: Budget
) -> dict[tuple[str, int], Tensor]:
    """For each `(site, layer)` the mean over all patches of the reference's pictures, `[1, 1, …]`."""
    if not all(any(s.kind == "image" for s in segments) for segments in reference.segments or [()]):
        raise ValueError("mode: 'patch_mean' needs pictures in each prompt of the reference, got some without")
    check_can_run(model, {"reference prompt": reference})
    axis, n = grid.site.axis("pos"), 0
    sums: dict[tuple[str, int], Tensor] = {}
    for batch in reference.batches(lambda length, _: budget.prompts_at_once(model, length, keys)):
        assert reference.segments is not None
        at = torch.tensor([i for s in reference.segments[batch.ids[0]] if s.kind == "image" for i in s.positions])
        n += len(at) * len(batch)
        for key, activation in record(model, batch.stacked, keys, blocks=False).sites.items():
            patches = activation.index_select(axis, at.to(activation.device))
            total = patches.sum((0, axis), keepdim=True, dtype=torch.float64)
            sums[key] = sums[key] + total if key in sums else total
    return {key: (total / n).to(model.dtype) for key, total in sums.items()}


@torch.no_grad()
def position_means(
    model: HookedModel, keys: Sequence[tuple[str, int]], pos_axis: int, reference: Prompts, budget: Budget
) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """For each `(site, layer)`: the mean over the prompts that have the position, and how many those are, in float64."""
    longest = longest_at(model, keys[0][0], reference)
    check_can_run(model, {"reference prompt": reference})
    sums: dict[tuple[str, int], Tensor] = {}
    counts = torch.zeros(longest, dtype=torch.float64, device=model.device)
    for batch in reference.batches(lambda length, _: budget.prompts_at_once(model, length, keys)):
        for i, (key, activation) in enumerate(record(model, batch.stacked, keys, blocks=False).sites.items()):
            length = activation.shape[pos_axis]
            if i == 0:
                counts[:length] += len(batch)
            total = activation.sum(0, keepdim=True, dtype=torch.float64)
            if key not in sums:
                shape = list(total.shape)
                shape[pos_axis] = longest
                sums[key] = torch.zeros(shape, dtype=torch.float64, device=total.device)
            sums[key].narrow(pos_axis, 0, length).add_(total)
    shape = [1] * next(iter(sums.values())).ndim
    shape[pos_axis] = longest
    return {
        key: (total / counts.to(total.device).reshape(shape), counts.to(total.device).reshape(shape))
        for key, total in sums.items()
    }


def _shuffled(prompts: Prompts, seed: int) -> Prompts:
    """The prompts in another order, in which each meets another one of its own length."""
    generator = torch.Generator().manual_seed(seed)
    order = list(range(len(prompts)))
    for batch in prompts.batches():
        members = batch.ids
        if len(members) == 1:
            raise ValueError(
                f"prompts: prompt {members[0]} is the only one of {batch.length} tokens, so it has nobody to swap with; pass "
                "`reference`, or more prompts of its length"
            )
        ring = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        for here, there in zip(ring, ring[1:] + ring[:1], strict=True):
            order[here] = there
    return prompts[order]
