"""Plain transformers models with PyTorch's own hooks: an oracle that has none of mechkit's code and none of TransformerLens's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Edit = tuple[nn.Module, Literal["in", "out"], Callable[[Tensor], Tensor]]


def layers(hf: Any) -> nn.ModuleList:
    """The model's blocks: the list that is as long as the configuration says."""
    return next(m for m in hf.modules() if isinstance(m, nn.ModuleList) and len(m) == hf.config.num_hidden_layers)


def run(hf: Any, tokens: Tensor, edits: Sequence[Edit] = (), grad: bool = False) -> Tensor:
    """Logits of one forward pass; an edit gets a copy of what goes into a module or comes out of it, and returns the new one."""
    handles = []
    for module, side, fn in edits:
        if side == "in":

            def before(_: Any, args: Any, kwargs: Any, fn: Any = fn) -> Any:
                if args:
                    return (fn(args[0].clone()), *args[1:]), kwargs
                return args, kwargs | {"hidden_states": fn(kwargs["hidden_states"].clone())}

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(_: Any, args: Any, out: Any, fn: Any = fn) -> Any:
                return (fn(out[0].clone()), *out[1:]) if isinstance(out, tuple) else fn(out.clone())

            handles.append(module.register_forward_hook(after))
    try:
        with torch.set_grad_enabled(grad):
            logits: Tensor = hf(tokens).logits
        return logits
    finally:
        for handle in handles:
            handle.remove()


def last_stream(hf: Any, tokens: Tensor) -> Tensor:
    """The last block's output."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.clone())
        return x

    run(hf, tokens, [(layers(hf)[-1], "out", keep)])
    return kept[0]
