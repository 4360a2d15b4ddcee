"""Attaching functions to sites, so that every listed site works on every architecture and nothing stays attached.

TransformerLens's hook points are used as they are, except for three kinds of site:

- `resid_mid`: Hugging Face blocks keep a second reference to this tensor for the residual connection, and a tensor
  *returned* by a hook replaces only what the MLP reads. Here the new value is written into the tensor itself, so that an
  edit changes the residual stream as well. For the same reason its gradient is the tensor's own, the sum of what comes
  back from the MLP and along the residual connection, and a new gradient replaces both.
- `result` (each head's own contribution to `attn_out`) is behind a flag in TransformerLens. Here it is computed from `z`
  and the output projection's matrix when requested, times the constant that the block multiplies its attention's output with
  (Granite), and an edit is added to the attention's output as a difference. An adapter on the projection is part of its matrix.
  Where the flag is on, the attention is computed from the results themselves, and TransformerLens's own hook point serves.
- `pattern` and `attn_scores` where TransformerLens leaves the attention to Hugging Face (GPT-J, GPT-Neo, OPT): there its
  hooks fire after the fact and edits are dropped. Here the softmax inside that attention is intercepted.

Functions on one site run in the order in which they were attached, each on what the one before returned.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Literal

import einops
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mechkit.hooks._lock import HOOKED, lock_of
from mechkit.hooks._projections import output_weight, write_scale
from mechkit.hooks._sites import TOWER, parse_hook_name
from mechkit.hooks._tower import tower_of

HookFunction = Callable[..., Tensor | None]  # fn(activation, hook=hook_point) -> new activation, or None to leave it
Direction = Literal["fwd", "bwd"]
# Where a bridge keeps why a layer's heads do not sum to what the layer's attention adds to the stream (`loading/heads.py`)
NOT_HEADS = "_mechkit_not_heads"


def hook_points(bridge: Any) -> dict[str, Any]:
    """All hook points by full name. TransformerLens builds this dictionary at each access, which takes longer than a block."""
    if "_mechkit_hook_points" not in bridge.__dict__:
        bridge.__dict__["_mechkit_hook_points"] = bridge.hook_dict
    points: dict[str, Any] = bridge.__dict__["_mechkit_hook_points"]
    return points


class Hooks:
    """A set of attached hooks; a context manager that removes them on the way out, exception or not.

    It holds the model's lock meanwhile: in another thread's forward passes these hooks would fire too.
    """

    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge
        self._removers: list[Callable[[], None]] = []
        self._held = lock_of(bridge).held(HOOKED)

    def __enter__(self) -> Hooks:
        self._held.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.remove()
        finally:
            self._held.__exit__(None, None, None)

    def remove(self) -> None:
        """Takes off everything that was attached through this object."""
        while self._removers:
            self._removers.pop()()

    def attach(self, name: str, fn: HookFunction, direction: Direction = "fwd") -> None:
        """Calls `fn(activation, hook=…)` whenever the activation at `name` (a full hook name) is computed.

        A forward function may return a new activation of the same shape. A backward one gets the gradient.
        """
        site, layer = parse_hook_name(name)
        if site is not None and site.stack == TOWER:
            tower, at = tower_of(self._bridge), int(layer or 0)
            if tower is None or at >= len(tower.blocks) or not tower.has(site, at):
                raise ValueError(f"hook name {name!r}: {self._bridge.cfg.architecture} has no such activation")
            step = _Step(_checked(name, fn), _NamedPoint(name, at), direction)
            self._removers.append(tower.attach(site, at, step))
            return
        point = hook_points(self._bridge).get(name)
        if point is None:
            raise ValueError(f"hook name {name!r}: {self._bridge.cfg.architecture} has no such activation")
        checked = _checked(name, fn)
        if site is not None and site.name == "z" and (width := _width_of_values(self._bridge.blocks[layer].attn)):
            checked = _by_head(checked, width)
        step = _Step(checked, point, direction)
        if site is not None and site.name == "result" and not _exposes_results(self._bridge.blocks[layer].attn):
            if (why := self._bridge.__dict__.get(NOT_HEADS, {}).get(layer)) is not None:
                raise ValueError(
                    f"site: 'result' is what a head adds to the residual stream, but {why}; patch 'z' instead"
                )
            heads = _ResultSeam.of(self._bridge.blocks[layer], layer, int(self._bridge.cfg.n_heads))
            self._removers.append(heads.add(step))
        elif site is not None and site.name in ("pattern", "attn_scores") and self._is_delegated(layer):
            module = self._bridge.blocks[layer].attn.original_component
            seam = _SoftmaxSeam.of(module, int(self._bridge.cfg.n_heads))
            self._removers.append(seam.add(step, before=site.name == "attn_scores"))
        elif site is not None and site.name == "resid_mid":
            self._removers.append(_StreamSeam.of(point).add(_Step(step.fn, _named(point, name), direction)))
        else:
            self._attach_to_point(name, step.fn, direction)
            if site is not None and site.name == "resid_post":
                self._attach_to_listed_output(self._bridge.blocks[layer], step)

    def _attach_to_listed_output(self, block: nn.Module, step: _Step) -> None:
        """The same where a block returns a list (the first GPT), of which TransformerLens shows nothing at its hook point."""

        def show(module: Any, args: Any, output: Any) -> Any:
            return [step.apply(output[0]), *output[1:]] if isinstance(output, list) else None

        self._removers.append(block.register_forward_hook(show).remove)

    def _attach_to_point(self, name: str, fn: HookFunction, direction: Direction) -> None:
        point = hook_points(self._bridge)[name]
        handle = point.add_hook(fn, dir=direction, alias_names=[name])
        handles = point.fwd_hooks if direction == "fwd" else point.bwd_hooks

        def remove() -> None:
            handle.hook.remove()
            handles.remove(handle)

        self._removers.append(remove)

    def _is_delegated(self, layer: int | None) -> bool:
        from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

        return type(self._bridge.blocks[layer].attn).forward is AttentionBridge.forward


def _exposes_results(attention: Any) -> bool:
    """Whether TransformerLens itself computes this attention head by head (`bridge.set_use_attn_result(True)`)."""
    return bool(getattr(attention, "supports_attn_result", False)) and bool(
        getattr(attention.config, "use_attn_result", False)
    )


class _Step:
    """One attached function: applied to an activation in a forward pass, whichever direction it is for."""

    def __init__(self, fn: HookFunction, point: Any, direction: Direction) -> None:
        self.fn, self.point, self.direction = fn, point, direction

    def apply(self, activation: Tensor) -> Tensor:
        if self.direction == "fwd":
            returned = self.fn(activation, hook=self.point)
            return activation if returned is None else returned
        if activation.requires_grad:
            activation = activation.clone()
            activation.register_hook(lambda gradient: self.fn(gradient, hook=self.point))
        return activation


class _NamedPoint:
    """What a function on a site of a tower gets as its `hook`: what functions ask of TransformerLens's hook points."""

    def __init__(self, name: str, layer: int) -> None:
        self.name, self._layer = name, layer
        self.ctx: dict[str, Any] = {}

    def layer(self) -> int:
        return self._layer


class _StreamSeam:
    """The functions on one layer's `resid_mid`, a tensor to which the block keeps a second reference."""

    _KEY = "_mechkit_stream_seam"

    def __init__(self, point: Any) -> None:
        self._point = point
        self._steps: list[_Step] = []
        self._handle = point.register_forward_hook(lambda _, args, output: self._pass(output))

    @classmethod
    def of(cls, point: nn.Module) -> _StreamSeam:
        if cls._KEY not in point.__dict__:
            point.__dict__[cls._KEY] = cls(point)
        seam: _StreamSeam = point.__dict__[cls._KEY]
        return seam

    def add(self, step: _Step) -> Callable[[], None]:
        self._steps.append(step)

        def remove() -> None:
            self._steps.remove(step)
            if not self._steps:
                self._handle.remove()
                self._point.__dict__.pop(self._KEY, None)

        return remove

    def _pass(self, stream: Tensor) -> None:
        conversion = self._point.hook_conversion  # OPT's blocks flatten their prompts here
        shown = (
            stream if conversion is None else conversion.convert(stream)
        )  # a view: what is written into it is written
        for step in self._steps:
            if step.direction == "fwd":
                _write_in_place(step, shown)
        for step in self._steps:  # of the tensor as it goes on, after all edits
            if step.direction == "bwd" and stream.requires_grad:
                stream.register_hook(partial(_like_the_gradient, step, shape=shown.shape))


class _ResultSeam:
    """The functions on one layer's `result`. There while there are any; found on the module that it serves."""

    _KEY = "_mechkit_result_seam"

    def __init__(self, block: Any, layer: int | None, n_heads: int) -> None:
        self._attention, self._scale = block.attn, write_scale(block)
        self._weight = partial(output_weight, block, layer, n_heads)
        self._n_heads = n_heads
        self._steps: list[_Step] = []
        self._z: list[Tensor] = []
        output = block.attn.o
        self._handles = [
            output.original_component.register_forward_pre_hook(lambda _, args: self._z.append(args[0])),
            output.register_forward_hook(lambda _, args, output: self._output(output)),
        ]

    @classmethod
    def of(cls, block: Any, layer: int | None, n_heads: int) -> _ResultSeam:
        attention = block.attn
        if cls._KEY not in attention.__dict__:
            attention.__dict__[cls._KEY] = cls(block, layer, n_heads)
        seam: _ResultSeam = attention.__dict__[cls._KEY]
        return seam

    def add(self, step: _Step) -> Callable[[], None]:
        self._steps.append(step)

        def remove() -> None:
            self._steps.remove(step)
            if not self._steps:
                for handle in self._handles:
                    handle.remove()
                self._attention.__dict__.pop(self._KEY, None)

        return remove

    def _output(self, attn_out: Tensor) -> Tensor | None:
        z = self._z.pop()
        weight = self._weight(z.shape[-1], attn_out).to(attn_out.dtype) * self._scale
        z = einops.rearrange(z, "... (head d_head) -> ... head d_head", head=self._n_heads)
        self._z.clear()
        before = einops.einsum(z, weight, "... head d_head, head d_head d_model -> ... head d_model")
        after = given = before.clone()
        version = None if given.is_inference() else given._version
        for step in self._steps:
            after = step.apply(after)
        edited = after is not given or version is None or given._version != version
        # Where something was written, comparing would make everybody wait for the device, for nothing.
        if not edited and not after.requires_grad and torch.equal(after, before):
            return None  # only looked at: leave the output bit for bit as it was
        return attn_out + (after - before).sum(-2) / self._scale


class _SoftmaxSeam:
    """The functions on one Hugging Face attention's scores and pattern, called from inside its softmax."""

    _KEY = "_mechkit_softmax_seam"

    def __init__(self, module: nn.Module, n_heads: int) -> None:
        self._module, self.n_heads = module, n_heads
        self.before: list[_Step] = []
        self.after: list[_Step] = []
        self._inner = module.__dict__.get("forward")
        call = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _InterceptSoftmax(self):
                return call(*args, **kwargs)

        module.__dict__["forward"] = forward

    @classmethod
    def of(cls, module: nn.Module, n_heads: int) -> _SoftmaxSeam:
        if cls._KEY not in module.__dict__:
            module.__dict__[cls._KEY] = cls(module, n_heads)
        seam: _SoftmaxSeam = module.__dict__[cls._KEY]
        return seam

    def add(self, step: _Step, before: bool) -> Callable[[], None]:
        steps = self.before if before else self.after
        steps.append(step)

        def remove() -> None:
            steps.remove(step)
            if not self.before and not self.after:
                del self._module.__dict__["forward"], self._module.__dict__[self._KEY]
                if self._inner is not None:
                    self._module.__dict__["forward"] = self._inner

        return remove


class _InterceptSoftmax(TorchFunctionMode):
    _SOFTMAXES = (torch.nn.functional.softmax, torch.softmax, Tensor.softmax)

    def __init__(self, seam: _SoftmaxSeam) -> None:
        super().__init__()
        self._seam = seam

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._SOFTMAXES or not args or args[0].ndim not in (3, 4):
            return func(*args, **kwargs)  # a router's softmax over experts has two axes
        shape, by_head = args[0].shape, args[0]
        if len(shape) == 3:  # [batch * head, dest, src] in XGLM
            by_head = by_head.unflatten(0, (-1, self._seam.n_heads))
        for step in self._seam.before:
            by_head = step.apply(by_head)
        by_head = func(by_head.reshape(shape), *args[1:], **kwargs).reshape(by_head.shape)
        for step in self._seam.after:
            by_head = step.apply(by_head)
        return by_head.reshape(shape)


def _width_of_values(attention: Any) -> int | None:
    """How wide a head's values are in multi-head latent attention, where TransformerLens cuts `z` into heads of another width."""
    return getattr(getattr(attention, "original_component", None), "v_head_dim", None)


def _by_head(fn: HookFunction, width: int) -> HookFunction:
    """`fn` on `z` cut into heads of `width` entries, whatever it is cut into where it comes from."""

    def call(activation: Tensor, hook: Any) -> Tensor | None:
        returned = fn(activation.reshape(*activation.shape[:2], -1, width), hook=hook)
        return None if returned is None else returned.reshape(activation.shape)

    return call


def _checked(name: str, fn: HookFunction) -> HookFunction:
    """`fn`, but what it returns must fit; the error says which hook it was."""

    def call(activation: Tensor, hook: Any) -> Tensor | None:
        returned = fn(activation, hook=hook)
        if returned is None:
            return None
        if not isinstance(returned, Tensor):
            raise ValueError(f"hook on {name}: expected a tensor or None to be returned, got {type(returned).__name__}")
        if returned.shape != activation.shape or returned.dtype != activation.dtype:
            raise ValueError(
                f"hook on {name}: expected the returned activation to be {activation.dtype} {list(activation.shape)}, "
                f"got {returned.dtype} {list(returned.shape)}"
            )
        return returned

    return call


def _write_in_place(step: _Step, activation: Tensor) -> None:
    """Calls a forward function, and writes what it returns into the activation itself."""
    # Under autograd the function gets a copy: what it saves for its own backward pass must not be overwritten.
    given = activation.clone() if torch.is_grad_enabled() and activation.requires_grad else activation
    returned = step.fn(given, hook=step.point)
    if returned is not None and returned is not activation:
        activation.copy_(returned)
    elif returned is None and given is not activation and not torch.equal(given, activation):
        activation.copy_(given)  # edited in place


def _like_the_gradient(step: _Step, gradient: Tensor, shape: torch.Size) -> Tensor | None:
    """A backward function's answer to a gradient that it is shown in another shape."""
    returned = step.fn(gradient.reshape(shape), hook=step.point)
    return None if returned is None else returned.reshape(gradient.shape)


def _named(point: Any, name: str) -> Any:
    """A hook point under one of its other names, as TransformerLens shows it to a hook."""
    from transformer_lens.hook_points import _AliasedHookPoint

    return _AliasedHookPoint(name, point)
