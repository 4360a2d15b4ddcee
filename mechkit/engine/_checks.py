"""Checks that refuse what would make a sweep wrong: each error names what was expected, what was given, and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from mechkit.engine._edits import SOURCE, EditGroup
from mechkit.engine._measure import check_metric
from mechkit.hooks._context import check_length
from mechkit.hooks._projections import check_in_place
from mechkit.hooks._record import longest_at
from mechkit.hooks._sites import TOWER
from mechkit.prompts import Prompts

if TYPE_CHECKING:
    from mechkit.engine._chunk import State
    from mechkit.hooks._model import HookedModel


def check_sweep(state: State) -> None:
    """Raises `ValueError` for anything that would make a sweep wrong, before anything is run."""
    model, base, source = state.model, state.base, state.source
    check_can_run(model, {"base prompt": base} | ({} if source is None else {"source prompt": source}))
    if source is not None and len(source) != len(base):
        raise ValueError(f"source: expected {len(base)} prompts, one for each base prompt; got {len(source)}")
    if source is not None and bool((different := base.lengths != source.lengths).any()):
        row = int(different.nonzero()[0])
        raise ValueError(
            f"source: expected prompts as long as the base prompts; number {row} has {int(source.lengths[row])} tokens, and "
            f"its base prompt {int(base.lengths[row])}"
        )
    check_metric(model, base, state.metric, state.runs)
    if state.plan.n_cells == 0:
        raise ValueError("cells: expected at least one, got none")
    for group in state.plan:
        check_group(state, group)


def check_can_run(model: HookedModel, prompts: Mapping[str, Prompts] | None = None) -> None:
    """Raises `ValueError` for a model in training mode, and for prompts that it cannot read.

    Args:
        prompts: What will be run. A key is what the error calls one of these prompts, such as `"base prompt"`.
    """
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode (dropout would be on). Call model.eval()")
    check_in_place(model)
    for name, several in (prompts or {}).items():
        for i, tokens in enumerate(several.tokens):
            check_tokens(model, tokens, f"{name} {i}")
            if several.inputs is None:
                model.check_placeholders(tokens, f"{name} {i}")
            else:
                model.check_names(several.inputs[i], f"{name} {i}")


def check_tokens(model: HookedModel, tokens: Tensor, what: str) -> None:
    """Raises `ValueError` for ids outside the vocabulary and for prompts longer than the model's context."""
    if int(tokens.max()) >= model.d_vocab or int(tokens.min()) < 0:
        raise ValueError(f"{what}: expected token ids in 0..{model.d_vocab - 1}, got {tokens.tolist()}")
    check_length(model, len(tokens), what)


def check_group(state: State, group: EditGroup) -> None:
    """Every edit's indices and value fit the model and the prompts."""
    model, site, n = state.model, group.site, len(state.base)
    model.hook_names((site.name, group.layer) if site.in_block else site.name)
    if group.head is not None and group.head.max() >= (heads := model.n_heads_at(site.name)):
        raise ValueError(f"head: site {site.name!r} has {heads} heads, got index {group.head.max()}")
    if group.neuron is not None and group.neuron.max() >= (width := model.width_of(site.name, group.layer)):
        raise ValueError(
            f"neuron: the last axis of site {site.name!r} has {width} entries, got index {group.neuron.max()}"
        )
    if group.pos is not None and group.pos.shape[1] not in (1, n):
        raise ValueError(f"pos: expected one position, or one for each of {n} prompts; got {group.pos.shape[1]}")
    if group.value == SOURCE:
        if state.source is None:
            raise ValueError("source: an edit takes its value from the source run, but no source prompts were given")
        return
    if group.value in state.derived:
        return  # made from the two runs: checked when it is
    value = state.constants.get(group.value, {}).get((site.name, group.layer))
    if value is None:
        raise ValueError(f"values: there is none under {group.value!r} for {(site.name, group.layer)}")
    longest = longest_at(model, site.name, state.base)
    full = [n, *(model.site_size(site.name, dim, longest, group.layer) for dim in site.dims)]
    if site.stack == TOWER:
        full[site.axis("pos")] = longest
    if group.variant is not None:
        if value.ndim != len(full) + 1 or group.variant.max() >= len(value):
            raise ValueError(
                f"values[{group.value!r}][{(site.name, group.layer)}]: expected more than {group.variant.max()} variants along a "
                f"first axis, got shape {list(value.shape)}"
            )
        value = value[0]
    if value.ndim != len(full) or any(have not in (1, want) for have, want in zip(value.shape, full, strict=True)):
        axes = ("prompt", *site.dims)
        raise ValueError(
            f"values[{group.value!r}][{(site.name, group.layer)}]: expected axes {axes} of sizes {full}, or 1 where the value is "
            f"the same for all; got shape {list(value.shape)}"
        )
