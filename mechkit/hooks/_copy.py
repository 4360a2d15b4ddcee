"""Copying a wrapped model, so that the copy shares nothing with it.

`copy.deepcopy` by itself fails on what the last run left behind (TransformerLens keeps an attention pattern, with its graph), and
where TransformerLens has replaced a module's `forward` by a function that remembers the module, the copy would run the original.
Hooks of a `with model.hooks(...)` would stay on the copy, so that there is none meanwhile.
"""

from __future__ import annotations

import copy
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from mechkit.hooks._lock import HOOKED, lock_of


def deep_copy(bridge: nn.Module, attributes: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """A deep copy of a HookedModel's attributes, of which `bridge` is one.

    Raises:
        ValueError: hooks are on the model for the length of a `with`, which would be on the copy for ever.
    """
    if lock_of(bridge).is_held(HOOKED):
        raise ValueError(
            "model: it has hooks on it, which nobody would take off its copy. Copy it outside `with model.hooks(...)`"
        )
    for module in bridge.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(attributes, memo)
    for module in copied["bridge"].modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, FunctionType):
            module.__dict__["forward"] = rebound(forward, memo)
    lock_of(copied["bridge"]).timeout = lock_of(bridge).timeout
    return copied


def rebound(fn: Any, copies: dict[int, Any]) -> Any:
    """A function, method or partial that remembers the copies of the objects that `fn` remembers; `fn` itself if there are none.

    Args:
        fn: The function. Anything else is looked up.
        copies: The id of an object -> its copy.
    """
    if id(fn) in copies:
        return copies[id(fn)]
    if isinstance(fn, MethodType):
        owner = copies.get(id(fn.__self__), fn.__self__)
        return fn if owner is fn.__self__ else MethodType(fn.__func__, owner)
    if isinstance(fn, partial):
        inside = (fn.func, *fn.args, *fn.keywords.values())
        func, *values = (rebound(one, copies) for one in inside)
        if all(new is old for new, old in zip((func, *values), inside, strict=True)):
            return fn
        n = len(fn.args)
        return partial(func, *values[:n], **dict(zip(fn.keywords, values[n:], strict=True)))
    return _function(fn, copies) if isinstance(fn, FunctionType) else fn


def _function(fn: FunctionType, copies: dict[int, Any]) -> FunctionType:
    copies[id(fn)] = fn  # it may remember itself
    cells, defaults = fn.__closure__ or (), fn.__defaults__ or ()
    named, further = fn.__kwdefaults__ or {}, fn.__dict__
    inside = (*(_content(cell) for cell in cells), *defaults, *named.values(), *further.values())
    values = [rebound(one, copies) for one in inside]
    if all(new is old for new, old in zip(values, inside, strict=True)):
        return fn
    # A cell whose content stays is kept itself: others may write to it.
    n, m, k = len(cells), len(cells) + len(defaults), len(cells) + len(defaults) + len(named)
    closure = tuple(
        cell if new is old else CellType(new) for cell, new, old in zip(cells, values[:n], inside[:n], strict=True)
    )
    again = FunctionType(fn.__code__, fn.__globals__, fn.__name__, tuple(values[n:m]) or None, closure or None)
    again.__kwdefaults__ = dict(zip(named, values[m:k], strict=True)) or None
    again.__dict__.update(zip(further, values[k:], strict=True))
    again.__module__, again.__qualname__, again.__doc__ = fn.__module__, fn.__qualname__, fn.__doc__
    copies[id(fn)] = again
    return again


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was put there yet
        return None
