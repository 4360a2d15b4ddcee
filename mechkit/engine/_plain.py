"""The Hugging Face blocks inside a bridge's, without hook points. Most of a replay runs through them.

1. Each block is copied shallowly, and every bridge component in it is replaced by what it wraps. Parameters are shared.
2. Nothing reads these blocks' attention patterns, so that on a GPU they may use torch's fused
   `scaled_dot_product_attention`, which never stores a pattern. The copies get a copy of the config that selects it; the
   bridge's own blocks, in which edits are made, are not changed.

Neither is assumed to be equal: each sweep proves its blocks on a sample (`mechkit.engine._proof`), the fused ones first.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, Literal

from torch import nn

from mechkit.hooks._copy import rebound
from mechkit.hooks._devices import input_device
from mechkit.hooks._stack import Stack

Attention = Literal["sdpa", "eager", "mechkit_packed", "mechkit_packed_sdpa"]
# The attention of packed batches (`mechkit.engine._packed`), which calls the eager or the fused one for some rows at a time.
PACKED: Attention = "mechkit_packed"
PACKED_SDPA: Attention = "mechkit_packed_sdpa"

# Devices on which the fused attention is tried. On a CPU it was slower at a sweep's lengths: every head of SmolLM2, 4 prompts of
# 14 tokens, one thread, in turn: 26 s (median of 4) with eager attention, 35 s with the fused one. At 124 tokens neither won.
FUSED_ON = ("cuda",)


class PlainBlocks:
    """A stack's blocks without hook points, on the very same weights.

    Where nothing is edited the bridge's work for its hook points (it normalizes twice, to have something to show) would be a
    fifth of the time. The modules are shallow copies: they share parameters with the model and see it change.

    Args:
        stack: The model's blocks.
        attention: `"eager"` as the bridge has it, or `"sdpa"`, torch's fused attention: see `can_fuse`. `PACKED` and
            `PACKED_SDPA` run one or the other for some rows of packed tokens at a time.
    """

    def __init__(self, stack: Stack, attention: Attention = "eager") -> None:
        self._stack = stack
        self._copies: dict[int, nn.Module] = {}  # by the id of what was copied
        self._detached: set[int] = set()  # copies that no longer share their hooks with what was copied
        self._blocks = [_without_bridges(block.original_component, attention, self._copies) for block in stack.blocks]
        forward = inspect.signature(type(self._blocks[0]).forward)  # its own may be replaced by one that takes anything
        takes_any = any(p.kind is p.VAR_KEYWORD for p in forward.parameters.values())
        self._names = None if takes_any else set(forward.parameters)

    def __call__(self, layer: int, hidden: Any, arguments: dict[str, Any]) -> Any:
        known = {k: v for k, v in arguments.items() if self._names is None or k in self._names}
        return self._blocks[layer](hidden, **known)

    def projection(self, layer: int, which: Literal["q", "k", "v", "o"]) -> nn.Module | None:
        """A projection of a layer's attention, where it is a module of its own: `z` is what `o` reads, `q` what `q` gives."""
        attention = getattr(self._stack.blocks[layer], "attn", None)
        wrapped = {name: getattr(getattr(attention, name, None), "original_component", None) for name in "qkvo"}
        if sum(one is wrapped[which] for one in wrapped.values()) > 1:
            return None  # one module for several of them
        return self._own(wrapped[which])

    def at(self, layer: int, hook_point: Any) -> tuple[nn.Module, bool] | None:
        """The module of a layer that gives (`True`) or reads what TransformerLens shows at a hook point, if there is one."""
        for component in self._stack.blocks[layer].modules():
            for name in ("hook_out", "hook_in"):
                if component._modules.get(name) is hook_point:
                    found = self._own(getattr(component, "original_component", None))
                    return None if found is None else (found, name == "hook_out")
        return None

    def _own(self, wrapped: Any) -> nn.Module | None:
        """The copy of a module, to which hooks can be attached that are not attached to the model's own."""
        found = self._copies.get(id(wrapped))
        if found is not None and id(found) not in self._detached:
            for hooks in ("_forward_pre_hooks", "_forward_hooks"):
                setattr(found, hooks, getattr(found, hooks).copy())
            self._detached.add(id(found))
        return found


def _without_bridges(module: nn.Module, attention: Attention, copies: dict[int, nn.Module]) -> nn.Module:
    """A shallow copy of a module in which every bridge component is replaced by what it wraps."""
    plain = copies[id(module)] = copy.copy(module)
    plain._modules = {}
    for name in ("forward", "_old_forward"):
        if name in plain.__dict__:
            plain.__dict__[name] = rebound(plain.__dict__[name], {id(module): plain})
    if attention != "eager" and "config" in plain.__dict__:
        config: Any = copy.copy(plain.__dict__["config"])
        config._attn_implementation_internal = attention  # the setter would change nested configs, which are shared
        plain.__dict__["config"] = config
    for name, child in module._modules.items():
        if child is not None:
            original = child._modules.get("_original_component") or child
            plain._modules[name] = _without_bridges(original, attention, copies)
    return plain


def can_fuse(bridge: Any, calls: list[dict[str, Any]]) -> bool:
    """Whether torch's fused attention can stand in for the eager one in a model's blocks, given how they were called.

    It cannot cap scores (Gemma 2) nor give part of the attention to a sink (GPT-OSS); biases by distance (ALiBi) are left
    alone. Every layer must have been given its mask: without one, it would take the first key for the first query's own.
    """
    model = bridge.original_model
    if input_device(model).type not in FUSED_ON:
        return False
    if not getattr(model, "_supports_sdpa", False) or getattr(model.config, "attn_logit_softcapping", None):
        return False
    if any(hasattr(module, "sinks") for module in model.modules()):
        return False
    return all(call.get("attention_mask") is not None and call.get("alibi") is None for call in calls)
