"""Moving small things to where they are used, without making anybody wait."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def to_device(array: Int[np.ndarray, "..."], device: torch.device) -> Int[Tensor, "..."]:
    """An index array on a device. A GPU fetches it from pinned memory when it comes to it: the caller goes on at once."""
    index = torch.from_numpy(np.ascontiguousarray(array))
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)
