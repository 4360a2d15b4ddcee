"""Made-up results for `mechkit.plot.attention`, and what it draws of them."""

from __future__ import annotations

from typing import Any

import torch

from mechkit.plot._attention import attention
from mechkit.plot._figure import Figure
from mechkit.result import Result

WORDS = ("<|endoftext|>", "When", " Mary", " and", " John", " went", " to", " the", " store", ",", " John", " gave")
HOSTILE = (
    "<script>alert(1)</script>",
    "<b>x</b>",
    "%{z}",
    "%{meta[0]}",
    "$x^2$",
    "&lt;",
    "\n",
    "\t",
    "שלום",
    "👩\u200d👧",
    "a" * 60,
    "\u202e",
)


def labels(words: tuple[str, ...], n: int) -> tuple[str, ...]:
    return tuple(f'"{words[i % len(words)]}" {i}' for i in range(n))


def make(
    n_layers: int = 2,
    n_heads: int = 3,
    n: int = 5,
    n_prompts: int = 0,
    words: tuple[str, ...] = WORDS,
    **changes: Any,
) -> Result:
    """Made-up causal patterns, with heads that look at the first, the previous and an earlier token, and at nothing much."""
    generator = torch.Generator().manual_seed(0)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    scores = 1.5 * torch.randn(max(n_prompts, 1), n_layers, n_heads, n, n, generator=generator)
    scores[..., 0] += 2
    for head in range(n_heads):
        scores[:, :, head] += 5 * (distance == (1, n // 2 + 1, n + 1)[head % 3])
    scores = scores.masked_fill(distance < 0, -torch.inf)
    values = scores.softmax(-1).masked_fill(distance < 0, torch.nan).movedim(0, -1)
    coords: dict[str, Any] = {"layer": tuple(range(n_layers)), "head": tuple(range(n_heads))}
    coords |= {"dest": labels(words, n), "src": labels(words, n)}
    if n_prompts:
        coords["prompt"] = tuple(range(n_prompts))
    fields: dict[str, Any] = {
        "values": values if n_prompts else values[..., 0],
        "dims": tuple(coords),
        "coords": coords,
        "baseline": {},
        "base": "",
        "metric": "attention",
        "unit": "attention",
        "provenance": {
            "model": "tiny-llama",
            "task": "ioi",
            "technique": "attention patterns",
            "n_prompts": n_prompts or 1,
        },
    }
    return Result(**(fields | changes))


def examples() -> dict[str, Figure]:
    """For the browser test: representative figures from made-up results."""
    return {
        "attention_pattern": attention(make(12, 12, 14, 16), layer=9, head=6, prompt=3),
        "attention_pattern_hostile_dark": attention(make(1, 2, 12, words=HOSTILE), theme="dark"),
        "attention_pattern_long": attention(make(1, 2, 450)),
        "attention_grid": attention(make(12, 12, 14), style="grid"),
        "attention_grid_dark": attention(make(1, 9, 12), style="grid", theme="dark"),
        "attention_lines": attention(make(1, 3, 14), style="lines"),
    }
