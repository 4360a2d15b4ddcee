"""What numbers are computed in, and how far rounding may take two ways to the same number apart."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest difference that rounding explains between blocks run by themselves and whole forward passes: of logits relative to
# their spread, of a residual stream relative to its largest entry.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What numbers are kept in that come from a model of this dtype: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """Half precision as float32, in which metrics and everything read off logits or weights is computed at least."""
    return x if x.dtype == torch.float64 else x.float()
