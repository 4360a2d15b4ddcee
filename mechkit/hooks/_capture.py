"""Keeping what a run computes at some sites: the one way in which mechkit looks at activations.

    with capture(model, [("z", 3), "ln_final.hook_normalized"]) as kept:
        model.run(tokens)
    kept["z", 3]

`keepers` returns only the hooks, for a run that takes a list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from mechkit.hooks._hooking import Hooks
from mechkit.hooks._seams import HookFunction
from mechkit.hooks._sites import SITES

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel

Name = TypeVar("Name", str, tuple[str, int])  # a full hook name, or (site, layer)
Take = Callable[[Tensor, Any], Tensor]


class LeaveError(Exception):
    """Ends a run in its middle; carries out what was wanted of it."""


def copied(activation: Tensor, name: object) -> Tensor:
    """All of an activation. (A view would keep, and see changed, what the model works on.)"""
    return activation.clone()


def keepers(names: Sequence[Name], kept: dict[Name, Tensor], take: Take = copied) -> list[tuple[str, HookFunction]]:
    """Hooks, by full name, that put what `take(activation, name)` gives into `kept[name]`."""

    def keeper(name: Name) -> HookFunction:
        def keep(activation: Tensor, hook: Any) -> None:
            kept[name] = take(activation, name)

        return keep

    return [(_full_name(name), keeper(name)) for name in names]


@contextmanager
def capture(
    model: HookedModel,
    names: Sequence[Name],
    take: Take = copied,
    *,
    stop: Name | None = None,
    hooks: Sequence[tuple[str, HookFunction]] = (),
    partly: bool = False,
) -> Iterator[dict[Name, Tensor]]:
    """Runs the body with hooks that keep activations; the dict that it gives is full when the body is done.

    Args:
        names: What to keep: full hook names or `(site, layer)`, which are also the keys.
        take: What of an activation is kept, from the activation and the name; default a copy of all of it.
        stop: One of the names: when it is computed it is kept, and the body ends there (the rest of the run is not computed).
        hooks: Others to attach before, by full name.
        partly: Whether some of the names may be left out by the model.

    Raises:
        ValueError: the model does not compute a name.
    """
    if not partly:
        model.hook_names(list(names))  # raises, with the reason, for a site that the model lacks
    kept: dict[Name, Tensor] = {}
    ended = LeaveError()
    with Hooks(model.bridge) as attached:
        for full_name, fn in hooks:
            attached.attach(full_name, fn)
        for name, (full_name, fn) in zip(names, keepers(names, kept, take), strict=True):
            attached.attach(full_name, fn)
            if name == stop:
                attached.attach(full_name, _leaving(ended))
        try:
            yield kept
        except LeaveError as left:
            if left is not ended:
                raise
    if stop is None and not partly and (missing := [_full_name(name) for name in names if name not in kept]):
        raise ValueError(model.never_fired(missing))
    if stop is not None and stop not in kept:
        raise ValueError(f"{_full_name(stop)}: {model.name} does not compute that activation in a forward pass")


def _leaving(ended: LeaveError) -> HookFunction:
    def leave(activation: Tensor, hook: Any) -> None:
        raise ended

    return leave


def _full_name(name: str | tuple[str, int]) -> str:
    return name if isinstance(name, str) else SITES[name[0]].hook_name(name[1])
