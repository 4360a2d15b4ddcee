"""The forward and backward passes of gradient methods: activations of both runs at the nodes, and gradients that arrive there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mechkit.engine import CANNOT_RUN
from mechkit.experiment.estimates import Experiment, GradientChunk, Key, hook_name
from mechkit.hooks._capture import keepers
from mechkit.hooks._sites import SITES, TOWER

Rules = Sequence[tuple[str, Callable[..., Tensor | None]]]  # hooks that change how a gradient flows back


def runs_of(experiment: Experiment) -> tuple[str, str]:
    """The names of the base and of the source run."""
    assert experiment.source_is is not None
    return experiment.base_is, experiment.source_is


@torch.no_grad()
def unedited(
    experiment: Experiment, chunk: GradientChunk, run: str
) -> tuple[dict[Key, Tensor], dict[int, Tensor], Tensor]:
    """One run's activations at the nodes, what each block read, and what the run ended in."""
    kept: dict[Key, Tensor] = {}
    hidden: dict[Key, Tensor] = {}
    inputs = [("resid_pre", layer) for layer in sorted({layer for _, layer in experiment.keys} | {0})]
    hooks = [*keepers(inputs, hidden), *keepers(experiment.keys, kept)]
    _, final = chunk.runs.forward(chunk.inputs[run], chunk.everyone, hooks)
    _check_kept(experiment, kept)
    return kept, {layer: read for (_, layer), read in hidden.items()}, final


def first_order(experiment: Experiment, chunk: GradientChunk, rules: Rules = ()) -> None:
    """Adds `(source - base) * gradient` of every node. `rules` are hooks that may change how the gradient flows back."""
    assert experiment.source_is is not None
    difference: dict[Key, Tensor] = {}
    silent = set(experiment.keys)

    def keep(activation: Tensor, hook: Any, key: Key) -> Tensor:
        difference[key].sub_(activation.detach())
        return tapped(activation, partial(contract, key=key))

    def contract(gradient: Tensor, key: Key) -> None:
        silent.discard(key)
        chunk.add(key, difference.pop(key) * gradient)

    hooks = [(hook_name(key), partial(keep, key=key)) for key in experiment.keys]
    base = chunk.inputs[experiment.base_is]
    for _ in range(2):  # the second time as whole passes, where suffixes do not end where the proof's whole runs do
        try:
            kept, source_final = source_activations(experiment, chunk)
            difference.clear()
            difference.update(kept)
            leaf, final = chunk.runs.forward(base, chunk.everyone, [*rules, *hooks], leaf=True)
        except CANNOT_RUN as error:
            if not chunk.runs.refuted_by(error):
                raise
            continue
        if chunk.runs.proved(torch.stack([final[0], source_final[0]])):
            break
    chunk.keep_unedited({experiment.source_is: source_final, experiment.base_is: final})
    assert leaf is not None
    torch.autograd.grad(chunk.metric(final).sum(), leaf)
    check_reached(experiment, silent)
    for key in silent:  # what no gradient came to, and rightly so: 0 where the prompts have a position, as elsewhere
        chunk.add(key, difference.pop(key).zero_())


def tapped(activation: Tensor, fn: Callable[[Tensor], None]) -> Tensor:
    """The activation, for a hook to return: `fn` gets the gradient that arrives at it. (A hook may be shown a reshaped copy
    that the model does not go on with unless it is returned.)"""
    if not activation.requires_grad:
        return activation
    seen = activation.view_as(activation)
    seen.register_hook(fn)
    return seen


@torch.no_grad()
def source_activations(experiment: Experiment, chunk: GradientChunk) -> tuple[dict[Key, Tensor], Tensor]:
    """The source run's activations at every node (from `start` on), and what it ended in."""
    kept: dict[Key, Tensor] = {}
    _, final = chunk.runs.forward(
        chunk.inputs[str(experiment.source_is)], chunk.everyone, keepers(experiment.keys, kept)
    )
    _check_kept(experiment, kept)
    return kept, final


def _check_kept(experiment: Experiment, kept: Mapping[Key, Tensor]) -> None:
    if missing := [hook_name(key) for key in experiment.keys if key not in kept]:
        raise ValueError(f"site: {', '.join(missing[:4])} is not computed in a forward pass of {experiment.model.name}")


def check_reached(experiment: Experiment, silent: set[Key]) -> None:
    """Refuses sites that no gradient came to: a 0 would look like a finding. It is one in the last layers of a vision tower,
    whose features are taken from an earlier one."""
    in_tower = {key for key in experiment.keys if SITES[key[0]].stack == TOWER}
    last_used = max(
        (layer for _, layer in in_tower - silent), default=experiment.model.stacks[TOWER].n_layers if in_tower else 0
    )
    silent = {key for key in silent if key not in in_tower or key[1] <= last_used}
    if silent:
        names = ", ".join(hook_name(key) for key in sorted(silent)[:4])
        raise ValueError(
            f"site: no gradient path from metric {experiment.metric.name!r} to {names} in {experiment.model.name}, so that "
            "nothing can be estimated there; use activation_patching, which needs no gradient"
        )
