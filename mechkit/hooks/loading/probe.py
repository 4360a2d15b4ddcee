"""What models are compared on when they are loaded."""

from __future__ import annotations

import torch
from torch import Tensor


def probe_tokens(d_vocab: int, context: int | None = None) -> Tensor:
    """Two short sequences of fixed pseudo-random tokens, to compare models with; no longer than the model's context."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, d_vocab, (2, 8), generator=generator)[:, :context]
