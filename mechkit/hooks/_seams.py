"""Where functions are put into a model that has no hook point for them: one object a place, there while it holds a function.

- `StreamSeam`: the residual stream between attention and MLP, to which a block keeps a second reference.
- `ResultSeam`: what each head adds to its attention's output, which no block computes.
- `SoftmaxSeam`: the scores and the pattern inside an attention of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import einops
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mechkit.hooks._projections import output_weight, write_scale

HookFunction = Callable[..., Tensor | None]  # fn(activation, hook=hook_point) -> new activation, or None to leave it
Direction = Literal["fwd", "bwd"]


class Step:
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


class StreamSeam:
    """The functions on one layer's `resid_mid`, a tensor to which the block keeps a second reference."""

    _KEY = "_mechkit_stream_seam"

    def __init__(self, point: Any) -> None:
        self._point = point
        self._steps: list[Step] = []
        self._handle = point.register_forward_hook(lambda _, args, output: self._pass(output))

    @classmethod
    def of(cls, point: nn.Module) -> StreamSeam:
        if cls._KEY not in point.__dict__:
            point.__dict__[cls._KEY] = cls(point)
        seam: StreamSeam = point.__dict__[cls._KEY]
        return seam

    def add(self, step: Step) -> Callable[[], None]:
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


class ResultSeam:
    """The functions on one layer's `result`. There while there are any; found on the module that it serves."""

    _KEY = "_mechkit_result_seam"

    def __init__(self, block: Any, layer: int | None, n_heads: int) -> None:
        self._attention, self._scale = block.attn, write_scale(block)
        self._weight = partial(output_weight, block, layer, n_heads)
        self._n_heads = n_heads
        self._steps: list[Step] = []
        self._z: list[Tensor] = []
        output = block.attn.o
        self._handles = [
            output.original_component.register_forward_pre_hook(lambda _, args: self._z.append(args[0])),
            output.register_forward_hook(lambda _, args, output: self._output(output)),
        ]

    @classmethod
    def of(cls, block: Any, layer: int | None, n_heads: int) -> ResultSeam:
        attention = block.attn
        if cls._KEY not in attention.__dict__:
            attention.__dict__[cls._KEY] = cls(block, layer, n_heads)
        seam: ResultSeam = attention.__dict__[cls._KEY]
        return seam

    def add(self, step: Step) -> Callable[[], None]:
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


class SoftmaxSeam:
    """The functions on one Hugging Face attention's scores and pattern, called from inside its softmax."""

    _KEY = "_mechkit_softmax_seam"

    def __init__(self, module: nn.Module, n_heads: int) -> None:
        self._module, self.n_heads = module, n_heads
        self.before: list[Step] = []
        self.after: list[Step] = []
        self._inner = module.__dict__.get("forward")
        call = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _InterceptSoftmax(self):
                return call(*args, **kwargs)

        module.__dict__["forward"] = forward

    @classmethod
    def of(cls, module: nn.Module, n_heads: int) -> SoftmaxSeam:
        if cls._KEY not in module.__dict__:
            module.__dict__[cls._KEY] = cls(module, n_heads)
        seam: SoftmaxSeam = module.__dict__[cls._KEY]
        return seam

    def add(self, step: Step, before: bool) -> Callable[[], None]:
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

    def __init__(self, seam: SoftmaxSeam) -> None:
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


def _write_in_place(step: Step, activation: Tensor) -> None:
    """Calls a forward function, and writes what it returns into the activation itself."""
    # Under autograd the function gets a copy: what it saves for its own backward pass must not be overwritten.
    given = activation.clone() if torch.is_grad_enabled() and activation.requires_grad else activation
    returned = step.fn(given, hook=step.point)
    if returned is not None and returned is not activation:
        activation.copy_(returned)
    elif returned is None and given is not activation and not torch.equal(given, activation):
        activation.copy_(given)  # edited in place


def _like_the_gradient(step: Step, gradient: Tensor, shape: torch.Size) -> Tensor | None:
    """A backward function's answer to a gradient that it is shown in another shape."""
    returned = step.fn(gradient.reshape(shape), hook=step.point)
    return None if returned is None else returned.reshape(gradient.shape)
