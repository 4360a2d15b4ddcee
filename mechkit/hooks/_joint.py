"""Queries, keys and values that a model computes with one joint matrix, read from that matrix as it is now.

TransformerLens splits a joint projection (GPT-2's `c_attn`, GPT-NeoX's `query_key_value`, Phi-3's `gate_up_proj`) when it wraps a
model, into layers with parameters of their own. Those would stay behind when the model is trained, loaded into or moved. So

1. TransformerLens's split is applied to a matrix whose rows are numbered, which shows the rows of each part;
2. each part is replaced by a layer without parameters, whose weight is these rows. Where they are next to each other it is a
   view; where each head's three are (GPT-NeoX, BLOOM), the rows are gathered in each forward pass, so that they stay current.

Every part is compared with what TransformerLens made; where blocks are read when they are used (`_streamed.py`), with what it
makes of the block then, so that there are never copies of all blocks' matrices. One that differs is left as it was, and so are
joint projections that are no linear layers, and those whose weights are put away (`device_map`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mechkit.hooks._projections import is_plain_linear
from mechkit.hooks._streamed import StreamedBlocks, streamed_of

# The method that splits, the joint projection, and the parts, in a bridge's component.
_SPLITS = (
    ("split_qkv_matrix", "qkv", ("q", "k", "v")),
    ("split_gate_up_matrix", "gate_up", ("gate", "in")),
)


# A `Linear`, or GPT-2's `Conv1D`, which is no subclass of it and has its weight the other way round.
Joint = Any


class JointPart(nn.Linear):
    """Some outputs of a joint projection, as a layer of their own. It has no parameters: they are the joint projection's.

    Args:
        joint: The joint projection: a `Linear`, or GPT-2's `Conv1D`.
        rows: Which of its outputs.
        bias: What to add where the joint projection has no bias.
    """

    _joint: Joint
    _rows: slice | Tensor
    _own_bias: nn.Parameter | None

    def __init__(self, joint: Joint, rows: Int[Tensor, "out"], bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        first, n = int(rows[0]), len(rows)
        in_a_row = torch.equal(rows, torch.arange(first, first + n))
        self.__dict__["_joint"] = joint  # no child: it is one of the model's modules already
        self.__dict__["_rows"] = slice(first, first + n) if in_a_row else rows
        self.register_parameter("_own_bias", bias)
        self.out_features, self.in_features = n, int(self._outputs(joint.weight).shape[1])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self._part(self._joint.weight)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        bias = self._joint.bias
        return self._own_bias if bias is None else self._part(bias)

    def _outputs(self, x: Tensor) -> Tensor:
        """A weight with the outputs first."""
        return x if x.ndim == 1 or isinstance(self._joint, nn.Linear) else x.T

    def _part(self, x: Tensor) -> Tensor:
        if isinstance(self._rows, slice):
            return self._outputs(x)[self._rows]
        if self._rows.device != x.device:
            self.__dict__["_rows"] = self._rows.to(x.device)
        return self._outputs(x).index_select(0, self._rows)


def read_joint_projections(bridge: nn.Module) -> None:
    """Puts a `JointPart` in place of each part that TransformerLens has split off a joint projection."""
    numbered: dict[Any, list[Tensor] | None] = {}
    streamed = streamed_of(bridge)
    for component in list(bridge.modules()):
        for method, whole, names in _SPLITS:
            split = getattr(component, method, None)
            joint = _joint_of(component, whole)
            parts = [component._modules.get(name) for name in names]
            if not callable(split) or not _is_at_hand(joint, streamed) or None in parts:
                continue
            own: list[Any] = [getattr(part, "original_component", None) for part in parts]
            if not all(is_plain_linear(part) for part in own):
                continue
            key = type(component), joint.weight.shape, tuple(part.weight.shape for part in own)
            original = component._modules["_original_component"]
            if key not in numbered:
                numbered[key] = _rows(split, original, joint, own)
            put_away = streamed is not None and id(joint._parameters.get("weight")) in streamed.places
            made = list(split(original)) if put_away else own
            _replace(parts, made, joint, numbered[key], training=own[0].training)


def _joint_of(component: nn.Module, whole: str) -> Joint:
    """The joint projection: the one that TransformerLens has wrapped, or that it names and does not wrap (`gate_up_proj`)."""
    wrapped = component._modules.get(whole)
    if wrapped is not None:
        return getattr(wrapped, "original_component", None)
    return getattr(component._modules.get("_original_component"), str(getattr(component, "fused_attr", None)), None)


def _is_at_hand(joint: Any, streamed: StreamedBlocks | None) -> bool:
    from transformers.pytorch_utils import Conv1D

    weight = joint._parameters.get("weight") if isinstance(joint, nn.Linear | Conv1D) else None
    if weight is None:
        return False
    return weight.device.type != "meta" or (streamed is not None and id(weight) in streamed.places)


def _rows(split: Callable[[Any], Any], original: Any, joint: Joint, own: list[nn.Linear]) -> list[Tensor] | None:
    """Which outputs of the joint projection each part has; `None` if its weight is not some of the joint one's outputs."""
    n = joint.weight.shape[0 if isinstance(joint, nn.Linear) else 1]
    with _numbered(joint, n, any(part.bias is not None for part in own)), torch.random.fork_rng(devices=[]):
        try:
            parts = list(split(original))
        except Exception:
            return None
    rows = [part.weight.detach()[:, 0].round().long().cpu() for part in parts]
    return rows if all(bool(((one >= 0) & (one < n)).all()) for one in rows) else None


@contextmanager
def _numbered(joint: Joint, n: int, with_bias: bool) -> Iterator[None]:
    """The numbers of its outputs as the weight and the bias of a joint projection, inside."""
    before = dict(joint._parameters)
    weight, numbers = joint.weight, torch.arange(n, dtype=torch.float64)
    by_output = numbers[:, None] if isinstance(joint, nn.Linear) else numbers[None]
    joint._parameters["weight"] = nn.Parameter(by_output.expand(weight.shape), requires_grad=False)
    if with_bias:
        joint._parameters["bias"] = nn.Parameter(numbers, requires_grad=False)
    try:
        yield
    finally:
        joint._parameters.update(before)


def _replace(parts: list[Any], own: list[nn.Linear], joint: Joint, rows: list[Tensor] | None, training: bool) -> None:
    if rows is None or len(rows) != len(own):
        return
    new = [JointPart(joint, some, one.bias) for some, one in zip(rows, own, strict=True)]
    if all(_same(one, other) for one, other in zip(new, own, strict=True)):
        for part, one, before in zip(parts, new, own, strict=True):
            one._own_bias = before.bias if joint.bias is None else None
            part.set_original_component(one.train(training))


def _same(one: nn.Linear, other: nn.Linear) -> bool:
    if (one.bias is None) != (other.bias is None) or one.weight.shape != other.weight.shape:
        return False
    equal = torch.equal(one.weight, other.weight)
    return equal and (one.bias is None or torch.equal(one.bias, other.bias))
