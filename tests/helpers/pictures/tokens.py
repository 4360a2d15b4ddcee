"""Made-up results for `mechkit.plot.tokens`, and what it draws of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mechkit.plot._figure import Figure
from mechkit.plot._tokens import tokens
from mechkit.result import Result

NAN = float("nan")
TEXT = ("<|bos|>", "When", " Mary", " and", " John", " went", ",", " Mary", " gave", " a", " drink", " to")
HOSTILE = (
    *("\n", "\t", " ", "", "<script>alert(1)</script>", "<b>", "&amp;", "&#60;", "%{z}", "$x^2$", "\u202e", "\u200b"),
    *("👩\u200d👧", "日本語", "שלום", "a" * 200, "\r\n", '" 3'),
)
PROVENANCE = {
    "model": "tiny-llama",
    "task": "ioi",
    "n_prompts": 1,
    "technique": "gradient x input",
    "site": "resid_pre",
}


def labels_of(text: Sequence[str]) -> tuple[str, ...]:
    return tuple(f'"{token}" {i}' for i, token in enumerate(text))


def make(text: Sequence[str] = TEXT, values: torch.Tensor | None = None, **changes: Any) -> Result:
    """Attributions of one text."""
    if values is None:
        values = torch.randn(len(text), generator=torch.Generator().manual_seed(len(text)))
    given_ = {"metric": "logit_diff", "unit": "logits", "baseline": {}, "base": "", "provenance": PROVENANCE} | changes
    dims = ("pos", "prompt")[: values.ndim]
    coords: dict[str, Any] = {"pos": given_.pop("labels", labels_of(text))}
    coords |= {"prompt": tuple(range(values.shape[1]))} if values.ndim == 2 else {}
    return Result(values, dims, coords, **given_)


def loss(text: Sequence[str] = TEXT) -> Result:
    values = 8 * torch.rand(len(text), generator=torch.Generator().manual_seed(0))
    return make(text, values, metric="loss", unit="nats", provenance={"model": "tiny-llama"})


def long_text(n: int = 512) -> list[str]:
    line = ("It", " was", " the", " best", " of", " times", ",", " it", " was", " the", " worst", ".", "\n")
    return (list(line) * (n // len(line) + 1))[:n]


def examples() -> dict[str, Figure]:
    """For the browser tests too."""
    several = {"gradient x input": make(), "loss": loss(), "L4N133": make(values=torch.rand(12), unit="activation")}
    return {
        "attribution": tokens(make()),
        "hostile": tokens(make(HOSTILE)),
        "loss of 512 tokens": tokens(loss(long_text())),
        "several, dark": tokens(several, theme="dark"),
    }
