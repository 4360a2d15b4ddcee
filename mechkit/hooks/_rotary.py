"""Rotary embeddings with state: what one prompt leaves behind must not change the next one's values.

With `rope_type="dynamic"` transformers' module computes its frequencies for the longest prompt that it has seen beyond the
trained length, and keeps them, so that a prompt's value depends on which prompts were run before; with `"longrope"` it keeps
those of the last prompt. Here the module is put back to its original frequencies before and after each forward pass: every
prompt gets the values of a model that was just loaded.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_MARK = "_mechkit_forgets"


def forget_lengths(model: nn.Module) -> None:
    """Makes every rotary embedding of a model forget the prompts that it has seen. A second call does nothing."""
    for module in model.modules():
        if _kinds(module) and _MARK not in module.__dict__:
            module.__dict__[_MARK] = True
            module.register_forward_pre_hook(_before)
            module.register_forward_hook(_after)
            _reset(module)


def follows_the_prompt(module: nn.Module) -> bool:
    """Whether a module's buffers are those of the last or the longest prompt: transformers' rotary embeddings of these kinds, and
    others (of code that comes with a model) that keep tables and grow them."""
    keeps_a_length = "max_seq_len_cached" in vars(module) and not hasattr(module, "rope_type")
    return bool(_kinds(module)) or keeps_a_length


def _kinds(module: nn.Module) -> dict[str, str]:
    """Prefix of the attributes' names -> kind of rotary embedding, of those that keep something."""
    kind = getattr(module, "rope_type", None)
    kinds = {f"{layer}_": one for layer, one in kind.items()} if isinstance(kind, dict) else {"": kind}
    return {
        prefix: one
        for prefix, one in kinds.items()
        if isinstance(one, str)
        and ("dynamic" in one or one == "longrope")
        and hasattr(module, f"{prefix}original_inv_freq")
    }


def _before(module: nn.Module, args: Any) -> None:
    _reset(module)


def _after(module: nn.Module, args: Any, output: Any) -> None:
    _reset(module)


def _reset(module: nn.Module) -> None:
    for prefix, kind in _kinds(module).items():
        now, original = (getattr(module, f"{prefix}{name}") for name in ("inv_freq", "original_inv_freq"))
        if now is not original:
            # A copy: with "longrope" transformers writes into the buffer.
            module._buffers[f"{prefix}inv_freq"] = original.to(device=now.device).clone()
        if "dynamic" in kind and hasattr(module, "original_max_seq_len"):
            for name in (f"{prefix}max_seq_len_cached", "max_seq_len_cached"):
                if hasattr(module, name):
                    setattr(module, name, module.original_max_seq_len)
