"""What is attached to a model: hooks, and `forward` methods that were put in the place of others. By it one sees whether anybody
else's functions take part in a run, and whether an edit was left behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mechkit.hooks._hooking import hook_points

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")  # where torch keeps a module's


def attachments(bridge: Any) -> dict[tuple[str, str], int]:
    """How many hooks there are on each module, without those that the two libraries put on for their own ends."""
    points = {id(point) for point in hook_points(bridge).values()}
    found: dict[tuple[str, str], int] = {}
    for name, module in _hooked(bridge):  # by name: a copy of the model has other objects
        for kind in _HOOKS:
            for fn in module.__dict__[kind].values():
                theirs = str(getattr(fn, "__module__", "")).startswith(("transformers.", "transformer_lens."))
                if id(module) in points or not theirs:
                    found[name, kind] = found.get((name, kind), 0) + 1
        if "forward" in module.__dict__:
            found[name, f"forward {_code_of(module.__dict__['forward'])}"] = 1
    return found


def _hooked(root: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules with hooks or with another `forward` in place of their own, as `named_modules()` names and orders them. Sweeps ask
    often: this takes a third of its time, since no other module's name is put together."""
    # Each with the parts of its name: ((((), "blocks"), "0"), "attn")
    left: list[tuple[Any, torch.nn.Module]] = [((), root)]
    seen: set[torch.nn.Module] = set()
    while left:
        path, module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        inside = module.__dict__
        before, after, backward = inside["_forward_pre_hooks"], inside["_forward_hooks"], inside["_backward_hooks"]
        if before or after or backward or "forward" in inside:
            parts, rest = [], path
            while rest:
                rest, part = rest
                parts.append(part)
            yield ".".join(reversed(parts)), module
        for key, one in reversed(inside["_modules"].items()):
            if one is not None:
                left.append(((path, key), one))


def _code_of(fn: Any) -> int:
    """A key that distinguishes one replaced method from another, also in a copy of the model."""
    fn = getattr(fn, "func", fn)  # accelerate's are partial
    return id(getattr(fn, "__code__", fn))
