"""The forward and backward passes of gradient methods: activations of both runs at the nodes, and gradients that arrive there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mechkit.experiment.estimates import Chunk, Key, Study, hook_name
from mechkit.hooks._capture import keepers

Rules = Sequence[tuple[str, Callable[..., Tensor | None]]]  # hooks that change how a gradient flows back


def runs_of(study: Study) -> tuple[str, str]:
    """The names of the base and of the source run."""
    assert study.source_is is not None
    return study.base_is, study.source_is


@torch.no_grad()
def unedited(study: Study, chunk: Chunk, run: str) -> tuple[dict[Key, Tensor], dict[int, Tensor], Tensor]:
    """One run's activations at the nodes, what each block read, and what the run ended in."""
    kept: dict[Key, Tensor] = {}
    hidden: dict[Key, Tensor] = {}
    inputs = [("resid_pre", layer) for layer in sorted({layer for _, layer in study.keys} | {0})]
    hooks = [*keepers(inputs, hidden), *keepers(study.keys, kept)]
    _, final = chunk.runs.forward(chunk.tokens[run], chunk.everyone, hooks)
    _check_kept(study, kept)
    return kept, {layer: read for (_, layer), read in hidden.items()}, final


def first_order(study: Study, chunk: Chunk, rules: Rules = ()) -> None:
    """Adds `(source - base) * gradient` of every node. `rules` are hooks that may change how the gradient flows back."""
    assert study.source_is is not None
    difference, source_final = source_activations(study, chunk)
    silent = set(study.keys)

    def keep(activation: Tensor, hook: Any, key: Key) -> Tensor:
        difference[key].sub_(activation.detach())
        return tapped(activation, partial(contract, key=key))

    def contract(gradient: Tensor, key: Key) -> None:
        silent.discard(key)
        chunk.add(key, difference.pop(key) * gradient)

    hooks = [(hook_name(key), partial(keep, key=key)) for key in study.keys]
    base = chunk.tokens[study.base_is]
    leaf, final = chunk.runs.forward(base, chunk.everyone, [*rules, *hooks], leaf=True)
    chunk.keep_unedited({study.source_is: source_final, study.base_is: final})
    assert leaf is not None
    torch.autograd.grad(chunk.metric(final).sum(), leaf)
    check_reached(study, silent)


def tapped(activation: Tensor, fn: Callable[[Tensor], None]) -> Tensor:
    """The activation, for a hook to return: `fn` gets the gradient that arrives at it. (A hook may be shown a reshaped copy
    that the model does not go on with unless it is returned.)"""
    if not activation.requires_grad:
        return activation
    seen = activation.view_as(activation)
    seen.register_hook(fn)
    return seen


@torch.no_grad()
def source_activations(study: Study, chunk: Chunk) -> tuple[dict[Key, Tensor], Tensor]:
    """The source run's activations at every node (from `start` on), and what it ended in."""
    kept: dict[Key, Tensor] = {}
    _, final = chunk.runs.forward(chunk.tokens[str(study.source_is)], chunk.everyone, keepers(study.keys, kept))
    _check_kept(study, kept)
    return kept, final


def _check_kept(study: Study, kept: Mapping[Key, Tensor]) -> None:
    if missing := [hook_name(key) for key in study.keys if key not in kept]:
        raise ValueError(f"site: {', '.join(missing[:4])} is not computed in a forward pass of {study.model.name}")


def check_reached(study: Study, silent: set[Key]) -> None:
    """Refuses sites that no gradient came to: a 0 would look like a finding."""
    if silent:
        names = ", ".join(hook_name(key) for key in sorted(silent)[:4])
        raise ValueError(
            f"site: no gradient path from metric {study.metric.name!r} to {names} in {study.model.name}, so that nothing can be "
            "estimated there; use activation_patching, which needs no gradient"
        )
