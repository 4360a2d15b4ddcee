"""A copy of a model's modules on the very same tensors: the copy is hooked, and the user's own model stays as it is.

1. Every module is copied, with the objects that it keeps: configurations, lists, others. Where these refer to a module of the
   model, their copies refer to its copy.
2. No tensor is copied. Parameters are the same objects. Buffers are in the same dictionaries: `model.to(...)` changes a parameter
   in place, but puts another tensor where a buffer was. Only modules whose buffers follow the prompt have their own.
3. Hooks that the user has put on the modules are on the copy too, and are the user's objects: the user gets what they collect.
   A function that remembers a module of the model (a `forward` that was replaced, say) remembers the copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from mechkit.hooks._copy import rebound
from mechkit.hooks._rotary import follows_the_prompt

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NO_INSIDES = (type, ModuleType, FunctionType, BuiltinFunctionType, str, bytes, int, float, type(None))


@contextmanager
def shared_tree(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of `model` that shares every parameter and buffer with it; what is put into the copy inside is not put into `model`.

    Raises:
        ValueError: the modules cannot be copied; the message gives Python's reason.
    """
    found = list(_reached(model))
    modules = [one for one in found if isinstance(one, nn.Module)]
    memo: dict[int, Any] = {id(one): one for one in found if isinstance(one, Tensor)}
    memo |= {id(fn): fn for module in modules for kind in _HOOKS for fn in vars(module)[kind].values()}
    memo, copied = _copied(model, memo, found)
    copies = {id(module): memo[id(module)] for module in modules if id(module) in memo}
    for one in list(copies.values()):
        own = vars(one)
        for kept in (own, *(own[kind] for kind in _HOOKS)):
            for key, fn in kept.items():
                if kept is not own or isinstance(fn, FunctionType):
                    kept[key] = rebound(fn, copies)
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    yield copied
    for parameter, data in before:
        if parameter.data_ptr() != data.data_ptr():
            _part_with(parameter, data, copied)
    for module in (one for one in modules if id(one) in copies):
        mine, theirs = copies[id(module)], module._buffers
        unchanged = mine._buffers.keys() == theirs.keys() and all(mine._buffers[key] is theirs[key] for key in theirs)
        if theirs and unchanged and not follows_the_prompt(module):
            mine.__dict__["_buffers"] = theirs
            if not hasattr(module, "_hf_hook"):  # accelerate may fetch them
                mine.register_forward_pre_hook(_check_buffers)


def _part_with(parameter: nn.Parameter, data: Tensor, copied: nn.Module) -> None:
    """Gives a copy a parameter of its own where TransformerLens has put other values into the shared one (Baichuan's head, whose
    rows it normalizes), and the user's model its values back."""
    own = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    parameter.data = data
    for module in copied.modules():
        for name in [name for name, one in module._parameters.items() if one is parameter]:
            module._parameters[name] = own


def _check_buffers(module: nn.Module, args: Any) -> None:
    """A hook before a module that raises `ValueError` if the user has put its buffers on the device "meta", where nothing is."""
    missing = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.device.type == "meta"]
    if missing:
        raise ValueError(
            f"model: expected the buffers of the model that was wrapped, which the hooked model shares; {missing[0]!r} of its "
            f"{type(module).__name__} is on the device 'meta', where hf_model.to('meta') put it. Load the model again and wrap it"
        )


def follow_weight(module: nn.Module, args: Any) -> None:
    """A hook before a head: the bias of zeros that TransformerLens gives to a head without one follows the head's weight when
    that is moved."""
    bias, weight = module._buffers.get("bias"), module.weight
    if bias is None or not isinstance(weight, Tensor) or weight.device.type == "meta":
        return
    if (bias.dtype, bias.device) != (weight.dtype, weight.device):
        module._buffers["bias"] = bias.to(weight)


def _copied(model: nn.Module, memo: dict[int, Any], found: list[Any]) -> tuple[dict[int, Any], nn.Module]:
    """`copy.deepcopy`, and what became of each object. What cannot be copied (a lock, a file) is shared as tensors are."""
    done = dict(memo)
    try:
        return done, copy.deepcopy(model, done)
    except Exception:
        done = memo | {id(one): one for one in found if isinstance(one, nn.Module)}
    shared = dict(memo)
    for one in reversed(found):  # what is inside of an object comes behind it
        if not isinstance(one, nn.Module | Tensor | dict | list | tuple | set | frozenset) and not _copies(one, done):
            shared[id(one)] = done[id(one)] = one
    done = shared
    try:
        return done, copy.deepcopy(model, done)
    except Exception as error:
        raise ValueError(
            f"hf_model: expected a model whose modules can be copied, since a copy of them is hooked (its weights are not); got "
            f"a {type(model).__name__} that cannot: {type(error).__name__}: {str(error)[:200]}. Take off what was put on it, "
            "so that copy.deepcopy(hf_model) works"
        ) from error


def _copies(one: Any, memo: dict[int, Any]) -> bool:
    """Whether an object can be copied, except for what `memo` has already."""
    try:
        copy.deepcopy(one, dict(memo))
    except Exception:
        return False
    return True


def _reached(start: Any) -> Iterator[Any]:
    """Every object that a copy of `start` would copy: what is in attributes and containers, but not what hooks remember."""
    seen, stack = set(), [start]
    while stack:
        one = stack.pop()
        if id(one) in seen or isinstance(one, _NO_INSIDES):
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, Tensor):
            continue
        if isinstance(one, dict):
            stack += one.values()
        elif isinstance(one, list | tuple | set | frozenset):
            stack += one
        elif isinstance(one, MethodType):
            stack.append(one.__self__)
        elif isinstance(one, nn.Module):
            stack += [value for key, value in vars(one).items() if key not in _HOOKS]
        elif isinstance(inside := getattr(one, "__dict__", None), dict):
            stack += inside.values()
