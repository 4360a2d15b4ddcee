"""Where a model's weights are, and moving small tensors to where they are used without waiting for the device.

A model that was loaded with a `device_map` has layers on several devices, and perhaps weights that are loaded when they are
needed (until then they are on torch's device "meta"). accelerate's hooks move a module's inputs to where it runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn


def to_device(array: Int[np.ndarray, "..."], device: torch.device) -> Int[Tensor, "..."]:
    """An index array on a device. A GPU fetches it from pinned memory when it comes to it: the caller goes on at once."""
    index = torch.from_numpy(np.ascontiguousarray(array))
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go in: with the first weight, or where accelerate runs a module whose weights it has put away."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    hooks = (hook for module in model.modules() for hook in _accelerate_hooks(module))
    return torch.device(next((found for hook in hooks if (found := hook.execution_device) is not None), "cpu"))


def at_hand(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The values of a module's parameter; fetched, if they were put away."""
    if parameter.device.type != "meta":
        return parameter
    maps = [hook.weights_map for hook in _accelerate_hooks(module) if hook.weights_map is not None]
    values: Tensor = maps[0][name] if maps else parameter
    return values


def _accelerate_hooks(module: nn.Module) -> list[Any]:
    """The hooks of a module that say where it runs and where its weights are."""
    hook = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", [hook]) if hasattr(one, "execution_device")]


_CPU_AND_MPS = ("can't allocate memory", "out of memory")


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an exception means that the device ran out of memory (a GPU's own error type, or the CPU allocator's text)."""
    return isinstance(error, torch.OutOfMemoryError) or any(t in str(error) for t in _CPU_AND_MPS)
