"""Refusing models whose weights are not plain floating-point matrices: packed, scaled or stored in eight bits and fewer.

Such a model runs, in the kernels of the library that made it. What mechkit reads off its weights (heads' outputs, unembeddings,
the weights by head) would be the stored numbers, not what they stand for, and gradients do not flow through them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Names under which GPTQ, AWQ and their like keep packed weights, in buffers of whole numbers.
_PACKED = ("qweight", "weight_packed", "qzeros")


def check_plain_weights(hf_model: Any) -> None:
    """Raises `ValueError` for quantized weights; the message names the first one."""
    for name, parameter in hf_model.named_parameters():
        kind = parameter.dtype if parameter.dtype not in PLAIN else type(parameter.data)
        if kind not in (*PLAIN, Tensor) and kind is not nn.Parameter:
            _refuse(hf_model, name, kind)
    for name, module in hf_model.named_modules():
        weight = getattr(module, "weight", None)
        if callable(weight) and not isinstance(
            weight, nn.Module
        ):  # torch's quantized modules unpack theirs when it is called
            _refuse(hf_model, f"{name}.weight", type(module))
        for packed in _PACKED:
            if isinstance(getattr(module, packed, None), Tensor):
                _refuse(hf_model, f"{name}.{packed}", getattr(module, packed).dtype)


def _refuse(hf_model: Any, name: str, kind: Any) -> None:
    described = str(kind) if isinstance(kind, torch.dtype) else f"{kind.__module__}.{kind.__name__}"
    raise ValueError(
        f"model: expected weights in float64, float32, bfloat16 or float16; {name!r} of {type(hf_model).__name__} is quantized "
        f"({described.removeprefix('torch.')}). Load the model unquantized, or call hf_model.dequantize() first where "
        "transformers offers it"
    )
