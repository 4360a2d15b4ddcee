"""Made-up results for `mechkit.plot.heads`, and what it draws of them."""

from __future__ import annotations

import torch

from helpers.pictures.bars import HOSTILE, make, patched
from mechkit.plot._figure import Figure
from mechkit.plot._heads import heads
from mechkit.result import Result


def induction(layers: int = 12, n_heads: int = 12, n: int = 4) -> Result:
    values = torch.rand(layers, n_heads, n, generator=torch.Generator().manual_seed(2)) ** 6
    origin = {"technique": "head scores", "task": "random tokens", "n_prompts": n}
    return make(values, "layer head prompt", metric="induction", unit="attention", origin=origin)


def examples() -> dict[str, Figure]:
    hostile = {"pos": HOSTILE}
    values = torch.linspace(-1, 1, len(HOSTILE))
    one, two = (
        make(values, "pos", coords=hostile, metric="<i>a</i>"),
        make(values**2, "pos", coords=hostile, unit="$b$"),
    )
    return {
        "heads": heads(induction(), patched()),
        "dark": heads(induction(30, 9), patched(30, 9).mean("prompt").normalized(), label=15, theme="dark"),
        "hostile": heads(one, two, label=20, title="<script>alert(1)</script>"),
        "one layer": heads(induction(1, 4), patched(1, 4)),
    }
