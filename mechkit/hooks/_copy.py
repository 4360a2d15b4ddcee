"""Copying a wrapped model, so that the copy shares nothing with it.

`copy.deepcopy` alone fails on what the last run left behind (TransformerLens keeps an attention pattern, with its graph), and
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
            module.__dict__["forward"] = _rebound(forward, memo)
    lock_of(copied["bridge"]).timeout = lock_of(bridge).timeout
    return copied


def _rebound(fn: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """A function that remembers the copies of the objects that `fn` remembers."""

    def copied(cell: CellType) -> CellType:
        inner = cell.cell_contents
        return CellType(_rebound(inner, memo) if isinstance(inner, FunctionType) else memo.get(id(inner), inner))

    closure = None if fn.__closure__ is None else tuple(copied(cell) for cell in fn.__closure__)
    again = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, closure)
    again.__dict__.update(fn.__dict__)
    again.__kwdefaults__ = fn.__kwdefaults__
    return again


def rebound(forward: Any, module: nn.Module, plain: nn.Module) -> Any:
    """A replaced `forward` of a module, as one of its copy: else the copy would run the module with its bridges.

    TransformerLens replaces Falcon's with a bound method; accelerate wraps those of modules that it moves in a `partial`.
    """
    if isinstance(forward, MethodType) and forward.__self__ is module:
        return MethodType(forward.__func__, plain)
    if isinstance(forward, partial) and forward.args and forward.args[0] is module:
        return partial(forward.func, plain, *forward.args[1:], **forward.keywords)
    return forward
