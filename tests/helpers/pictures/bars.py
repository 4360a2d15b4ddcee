"""Made-up results for `mechkit.plot.bars`, and what it draws of them."""

from __future__ import annotations

from typing import Any

import torch

from mechkit.plot._bars import bars
from mechkit.plot._figure import Figure
from mechkit.result import Result

HOSTILE = (
    "<script>alert(1)</script>",
    "a\nb",
    "\t",
    "%{x}",
    "$x$",
    "&lt;",
    "👩\u200d👧",
    '"שלום" 3',
    '" the" 1',
    '" the" 2',
    "w" * 60,
)


def caption(figure: Figure) -> str:
    return " · ".join(figure.facts.caption)


def make(values: torch.Tensor, dims: str, **changes: Any) -> Result:
    names = tuple(dims.split())
    coords = {dim: tuple(range(size)) for dim, size in zip(names, values.shape, strict=True)}
    fields = {
        "values": values,
        "dims": names,
        "coords": coords | changes.pop("coords", {}),
        "baseline": {},
        "base": "",
        "metric": "logit_diff",
        "unit": "logits",
        "provenance": {"model": "gpt2", "task": "ioi", "n_prompts": 8, **changes.pop("origin", {})},
    }
    return Result(**(fields | changes))


def dla(n_layers: int = 4, n: int = 8, over: str = "component", seed: int = 0) -> Result:
    """As direct_logit_attribution gives it: components that add up, or their running sum."""
    generator = torch.Generator().manual_seed(seed)
    inside = [f"L{layer} {kind}" for layer in range(n_layers) for kind in ("attn", "mlp")]
    labels = ("embed", *inside, "bias")
    size = torch.linspace(0.1, 1, len(labels))[:, None]
    values = size * torch.randn(len(labels), 1, generator=generator) + 0.3 * torch.randn(
        len(labels), n, generator=generator
    )
    if over == "cumulative":
        labels = ("embed", *(f"L{layer}" for layer in range(n_layers)), "bias")
        values = values.cumsum(0)[[*range(0, 2 * n_layers + 1, 2), -1]]
    origin = {"technique": "direct logit attribution", "over": over, "n_prompts": n, "caution": "direct effect only"}
    return make(values, "component prompt", coords={"component": labels}, origin=origin)


def patched(layers: int = 12, heads: int = 12, n: int = 8, base: str = "corrupted") -> Result:
    generator = torch.Generator().manual_seed(1)
    effect = 0.1 * torch.randn(layers, heads, 1, generator=generator) ** 3
    values = -3.25 + effect + 0.1 * effect.abs() * torch.randn(layers, heads, n, generator=generator)
    runs = {"clean": torch.linspace(3, 4, n), "corrupted": torch.linspace(-4, -2.5, n)}
    values = values + 3.25 + runs[base]
    origin = {"technique": "activation patching", "site": "z", "direction": "denoise", "n_prompts": n}
    return make(values, "layer head prompt", baseline=runs, base=base, origin=origin)


def examples() -> dict[str, Figure]:
    tokens = make(
        torch.linspace(-1, 2, len(HOSTILE)),
        "pos",
        coords={"pos": HOSTILE},
        origin={"technique": "gradient x input", "model": "<b>m</b>"},
    )
    return {
        "components": bars(dla(12)),
        "largest": bars(dla(12), k=8),
        "running sum": bars(dla(30, over="cumulative"), theme="dark"),
        "heads": bars(patched(), k=20, theme="dark"),
        "tokens": bars(tokens),
        "one": bars(make(torch.tensor([0.5]), "layer")),
    }
