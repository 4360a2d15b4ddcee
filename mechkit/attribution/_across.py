"""Patching across prompts of unequal length, and across models: values that a sweep cannot take from a run of its own.

1. The source prompts are run in their model; what the cells need is kept.
2. Values are put where the base prompts have them: at the aligned positions, or everywhere where both have the same positions.
3. The sweep writes them as constants. It presumes nothing of the source run: no cell is skipped because the prompts agree so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mechkit.engine import Budget, check_can_run
from mechkit.experiment.axes import Grid
from mechkit.hooks import HookedModel, record
from mechkit.hooks._record import longest_at
from mechkit.metrics import CallableMetric, Metric, joint
from mechkit.prompts import PromptPairs

ELSEWHERE = "elsewhere"  # the value that such cells write


def aligned_positions(pairs: PromptPairs, run: str) -> dict[str, Tensor]:
    """Where the named positions that both prompts of a pair have are in one of them."""
    assert pairs.align is not None
    return {name: at if run == "corrupted" else pairs.positions[name] for name, at in pairs.align.items()}


def check_across(pairs: PromptPairs, model: HookedModel, source_model: HookedModel, grid: Grid) -> None:
    """Raises `ValueError` for cells that name no place in both prompts, and for two models of different shapes."""
    if pairs.align is not None and "position" not in grid.over.split():
        raise ValueError(
            "over: the two prompts of a pair have only their named positions in common; expected 'position' among the dims, "
            f"such as over='layer position'; got {grid.over!r}"
        )
    if "src" in grid.site.dims and (pairs.align is not None or source_model is not model):
        raise ValueError(
            f"site: {grid.site.name!r} has one value for each source position, which belongs to its own run; expected another"
        )
    if source_model is model:
        return
    for layer in grid.layers:
        for what in ("n_layers", "d_vocab"):
            here, there = getattr(model, what), getattr(source_model, what)
            if here != there:
                raise ValueError(f"source_model: expected {what} {here}, as in the model that is patched; got {there}")
        stacks = [one.stack_of(grid.site.name) for one in (model, source_model)]
        sizes = [None if stack is None else stack.sites.get((grid.site.name, layer)) for stack in stacks]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"source_model: expected {grid.site.name!r} of layer {layer} to have the sizes {sizes[0]}, as in the model that "
                f"is patched; got {sizes[1]}"
            )


def metric_of(metric: Metric | CallableMetric, pairs: PromptPairs, run: str) -> Metric | CallableMetric:
    """The metric as it is read off one of the two runs."""
    if isinstance(metric, Metric) and metric.parts:
        found = [metric_of(part, pairs, run) for part in metric.parts]
        return joint([part for part in found if isinstance(part, Metric)])
    if isinstance(metric, Metric) and metric.reference not in (None, run):
        raise ValueError(
            f"metric: {metric.name!r} compares with the {metric.reference} run, which is of other prompts or another model than "
            "the run that is patched; expected one of a single run, such as mk.logit_diff"
        )
    if pairs.align is None or run == "clean":
        return metric
    if not isinstance(metric, Metric) or metric.in_corrupted is None:
        raise ValueError(
            "metric: expected one of mechkit's that reads a named position, such as mk.logit_diff, which knows where that is in "
            "the corrupted prompts"
        )
    return metric.of_corrupted()


@torch.no_grad()
def values_across(
    model: HookedModel,
    source_model: HookedModel,
    pairs: PromptPairs,
    base_is: str,
    source_is: str,
    grid: Grid,
    budget: Budget,
) -> dict[tuple[str, int], Tensor]:
    """For each `(site, layer)` the source's values at the base prompts' positions, `[prompt pos …]`; 0 where no cell reads."""
    base, source = getattr(pairs, base_is), getattr(pairs, source_is)
    check_can_run(source_model, {"source prompt": source})
    keys = sorted({(edit.site, edit.layer) for cell in grid.cells for edit in cell})
    axis, n, longest = grid.site.axis("pos"), len(base), longest_at(model, grid.site.name, base)
    values: dict[tuple[str, int], Tensor] = {}
    for batch in source.batches(lambda length, _: budget.prompts_at_once(source_model, length, keys)):
        run = record(source_model, batch.stacked, keys, blocks=False)
        for key in keys:
            found = run.sites[key].movedim(axis, 1).to("cpu", model.dtype)  # [prompt pos …]
            into = values.setdefault(key, found.new_zeros(n, longest, *found.shape[2:]))
            for row, i in enumerate(batch.ids):
                here, there = _places(pairs, base_is, source_is, grid, i, found.shape[1])
                into[i, here] = found[row, there]
    return {key: value.movedim(1, axis) for key, value in values.items()}


def _places(pairs: PromptPairs, base_is: str, source_is: str, grid: Grid, i: int, length: int) -> tuple[Tensor, Tensor]:
    """Positions of pair `i` in the base prompt, and those of the source prompt that belong to them; `length` is the site's."""
    if pairs.align is None:
        return torch.arange(length), torch.arange(length)
    both = (aligned_positions(pairs, run) for run in (base_is, source_is))
    here, there = (torch.stack([at[name][i] for name in grid.index["position"]]) for at in both)
    return here, there
