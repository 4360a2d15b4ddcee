"""Made-up results for `mechkit.plot.hidden`, and what it draws of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from helpers.pictures.bars import HOSTILE
from mechkit.plot._figure import Figure
from mechkit.plot._hidden import hidden
from mechkit.result import Result

KINDS = ["ABBA", "BABA"]


def make(values: torch.Tensor, **changes: Any) -> Result:
    """`[layer d_model prompt]` as hidden_states gives it."""
    layers, width, n = values.shape
    origin = {"model": "gpt2", "task": "ioi", "n_prompts": n, "technique": "hidden states", "position": "END"}
    fields = {
        "values": values,
        "dims": ("layer", "d_model", "prompt"),
        "coords": {"layer": tuple(range(layers)), "d_model": tuple(range(width)), "prompt": tuple(range(n))},
        "baseline": {},
        "base": "",
        "metric": "resid_post",
        "unit": "activation",
        "provenance": origin,
    }
    return Result(**(fields | changes))


def states(layers: int = 3, width: int = 16, n: int = 40, seed: int = 0) -> Result:
    """Two clouds that move apart from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(layers, width, n, generator=generator)
    side = torch.tensor([1.0, -1.0]).repeat(n)[:n]
    apart = torch.randn(width, 1, generator=generator) * side
    return make(noise + 0.5 * torch.arange(layers)[:, None, None] * apart)


def examples() -> dict[str, Figure]:
    n = len(HOSTILE)
    return {
        "clouds": hidden(states(30), labels=KINDS * 20),
        "numbers": hidden(states(), labels=np.linspace(0, 9, 40), symbols=KINDS * 20, theme="dark"),
        "random": hidden(states(6), method="random", theme="dark"),
        "hostile": hidden(states(2, n=2 * n), labels=[*HOSTILE, *HOSTILE], title="<script>alert(1)</script>"),
        "one layer": hidden(states().sel(layer=2), labels=KINDS * 20),
    }
