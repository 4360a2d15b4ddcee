"""Attaching functions to sites, so that every listed site works on every architecture and nothing stays attached.

TransformerLens's hook points are used as they are, but for three kinds of site:

- `resid_mid`: Hugging Face blocks keep a second reference to this tensor for the residual connection, and a tensor
  *returned* by a hook replaces only what the MLP reads. Here the new value is written into the tensor itself, so that an
  edit of the residual stream is one.
- `result` (each head's own contribution to `attn_out`) is behind a flag in TransformerLens. Here it is computed from `z`
  and `W_O` when somebody asks, and an edit is added to the attention's output as a difference.
- `pattern` and `attn_scores` where TransformerLens leaves the attention to Hugging Face (GPT-J, GPT-Neo, OPT): there its
  hooks fire after the fact and edits are dropped. Here the softmax inside that attention is intercepted.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Self

import einops
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mechkit.hooks._sites import parse_hook_name

HookFunction = Callable[..., Tensor | None]  # fn(activation, hook=hook_point) -> new activation, or None to leave it


class Hooks:
    """A set of attached hooks; a context manager that removes them on the way out, exception or not."""

    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge
        self._removers: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Takes off everything that was attached through this object."""
        while self._removers:
            self._removers.pop()()

    def attach(self, name: str, fn: HookFunction, direction: Literal["fwd", "bwd"] = "fwd") -> None:
        """Calls `fn(activation, hook=…)` whenever the activation at `name` (a full hook name) is computed.

        A forward function may return a new activation of the same shape. A backward one gets the gradient.
        """
        site, layer = parse_hook_name(name)
        checked = _checked(name, fn)
        if site is not None and site.name == "result":
            self._attach_result(layer, name, checked, direction)
        elif site is not None and site.name in ("pattern", "attn_scores") and self._is_delegated(layer):
            self._attach_inside_softmax(layer, name, checked, direction)
        else:
            in_place = site is not None and site.name == "resid_mid" and direction == "fwd"
            self._attach_to_point(name, _writing_in_place(checked) if in_place else checked, direction)

    def _attach_to_point(self, name: str, fn: HookFunction, direction: Literal["fwd", "bwd"]) -> None:
        point = self._bridge.hook_dict[name]
        handle = point.add_hook(fn, dir=direction, alias_names=[name])
        handles = point.fwd_hooks if direction == "fwd" else point.bwd_hooks

        def remove() -> None:
            handle.hook.remove()
            handles.remove(handle)

        self._removers.append(remove)

    def _attach_result(self, layer: int | None, name: str, fn: HookFunction, direction: Literal["fwd", "bwd"]) -> None:
        attention = self._bridge.blocks[layer].attn
        prefix = name.removesuffix("hook_result")
        point = self._bridge.hook_dict.get(name)
        z_now: list[Tensor] = []

        def remember(z: Tensor, hook: Any) -> None:
            z_now[:] = [z]

        def add_difference(attn_out: Tensor, hook: Any) -> Tensor | None:
            weight = attention.W_O.to(attn_out.dtype)
            before = einops.einsum(z_now.pop(), weight, "... head d_head, head d_head d_model -> ... head d_model")
            after = before.clone()
            if direction == "bwd" and after.requires_grad:
                after.register_hook(lambda gradient: fn(gradient, hook=point))
            elif direction == "fwd":
                returned = fn(after, hook=point)
                after = after if returned is None else returned
                if not after.requires_grad and torch.equal(after, before):
                    return None  # only looked at: leave the output bit for bit as it was
            return attn_out + (after - before).sum(-2)

        self._attach_to_point(prefix + "hook_z", remember, "fwd")
        self._attach_to_point(prefix + "o.hook_out", add_difference, "fwd")

    def _is_delegated(self, layer: int | None) -> bool:
        from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

        return type(self._bridge.blocks[layer].attn).forward is AttentionBridge.forward

    def _attach_inside_softmax(
        self, layer: int | None, name: str, fn: HookFunction, direction: Literal["fwd", "bwd"]
    ) -> None:
        module: nn.Module = self._bridge.blocks[layer].attn.original_component
        point = self._bridge.hook_dict[name]
        before = name.endswith("attn_scores")
        inner = module.__dict__.get("forward")  # an instance attribute if another hook already wraps this module
        call = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _SoftmaxSeam(fn, point, before, direction):
                return call(*args, **kwargs)

        module.__dict__["forward"] = forward

        def remove() -> None:
            if inner is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = inner

        self._removers.append(remove)


class _SoftmaxSeam(TorchFunctionMode):
    """While active, passes the input (`before=True`) or output of each attention softmax through a hook function."""

    _SOFTMAXES = (torch.nn.functional.softmax, torch.softmax, Tensor.softmax)

    def __init__(self, fn: HookFunction, point: Any, before: bool, direction: str) -> None:
        super().__init__()
        self._fn, self._point, self._before, self._direction = fn, point, before, direction

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._SOFTMAXES:
            return func(*args, **kwargs)
        if self._before:
            return func(self._apply(args[0]), *args[1:], **kwargs)
        return self._apply(func(*args, **kwargs))

    def _apply(self, x: Tensor) -> Tensor:
        if self._direction == "bwd":
            if x.requires_grad:
                x = x.clone()
                x.register_hook(lambda gradient: self._fn(gradient, hook=self._point))
            return x
        new = self._fn(x, hook=self._point)
        return x if new is None else new


def _checked(name: str, fn: HookFunction) -> HookFunction:
    """`fn`, but a returned tensor of another shape is refused with the hook's name."""

    def call(activation: Tensor, hook: Any) -> Tensor | None:
        returned = fn(activation, hook=hook)
        if isinstance(returned, Tensor) and returned.shape != activation.shape:
            raise ValueError(
                f"hook on {name}: expected the returned activation to have shape {list(activation.shape)}, "
                f"got {list(returned.shape)}"
            )
        return returned

    return call


def _writing_in_place(fn: HookFunction) -> HookFunction:
    def call(activation: Tensor, hook: Any) -> Tensor | None:
        returned = fn(activation, hook=hook)
        if returned is not None and returned is not activation:
            activation.copy_(returned)
        return None

    return call
