"""Made-up results for `mechkit.plot.lens`, and what it draws of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mechkit.attribution import TopTokens
from mechkit.plot._figure import Figure
from mechkit.plot._lens import lens
from mechkit.result import Result

NAN = float("nan")
TOKENS = ('"When" 0', '" Mary" 1', '" and" 2', '" Mary" 3')
WORDS = (" the", " Mary", " John", ",", " store", "\n")
HOSTILE = (
    *("\n", "\t", " ", "", "<script>alert(1)</script>", "<b>", "&amp;", "&#60;", "%{z}", "$x^2$", "\u202e", "\u200b"),
    *("👩\u200d👧", "日本語", "שלום", "a" * 60),
)
PROVENANCE = {"model": "tiny-llama", "task": "ioi", "site": "resid_post", "lens": "logit lens", "tokens_hash": None}
UNITS = {"logit": "logits", "log_prob": "nats", "prob": "probability", "rank": "rank", "entropy": "nats", "kl": "nats"}


def sizes_of(over: str, sizes: dict[str, int], pos: tuple[Any, ...] | None = None) -> dict[str, tuple[Any, ...]]:
    coords: dict[str, tuple[Any, ...]] = {dim: tuple(range(sizes[dim])) for dim in over.split()}
    if pos is not None:
        coords["pos"] = pos
    if "position" in coords:
        coords["position"] = ("IO", "S1", "S2", "END")[: sizes["position"]]
    return coords


def top(
    over: str = "layer pos", *, k: int = 3, words: tuple[str, ...] = WORDS, text: bool = False, **sizes: Any
) -> TopTokens:
    """Top tokens from a seed; `pos_labels` names the positions."""
    pos = sizes.pop("pos_labels", None)
    sizes = {"layer": 3, "pos": len(pos or TOKENS), "position": 3, "head": 2, "prompt": 2} | sizes
    coords = sizes_of(over, sizes, pos or (TOKENS if sizes["pos"] == 4 and "pos" in over.split() else None))
    coords |= {"k": tuple(range(k)), "prompt": tuple(range(sizes["prompt"]))}
    shape = [len(labels) for labels in coords.values()]
    generator = torch.Generator().manual_seed(len(over) + k)
    probs = torch.rand(shape, generator=generator).sort(dim=-2, descending=True).values / k
    ids = torch.randint(len(words), shape, generator=generator)
    strings = np.array([words[i] for i in ids.flatten().tolist()], object).reshape(shape)
    provenance = {**PROVENANCE, "technique": "top_tokens", "n_prompts": sizes["prompt"]}
    result = Result(probs, tuple(coords), coords, {}, "", "prob", "probability", provenance)
    continuations = np.full([*shape[:-2], shape[-1]], " went <home>", object) if text else None
    return TopTokens(result, ids, strings, continuations)


def read(value: str = "prob", over: str = "layer pos", values: torch.Tensor | None = None, **sizes: Any) -> Result:
    """A result of `logit_lens`; `tokens` names a dim of tokens."""
    tokens = sizes.pop("tokens", None)
    sizes = {"layer": 3, "pos": 4, "position": 3, "head": 2, "prompt": 2} | sizes
    coords = sizes_of(over, sizes, TOKENS if sizes["pos"] == 4 and "pos" in over.split() else None)
    coords |= {"token": tokens} if tokens else {}
    coords["prompt"] = tuple(range(sizes["prompt"]))
    if values is None:
        values = torch.rand([len(x) for x in coords.values()], generator=torch.Generator().manual_seed(1))
        values = {"rank": (values * 1000).round(), "log_prob": -9 * values, "logit": 8 * values - 3}.get(value, values)
    provenance = {**PROVENANCE, "technique": "logit_lens", "n_prompts": sizes["prompt"]}
    return Result(values, tuple(coords), coords, {}, "", value, UNITS[value], provenance)


def examples() -> dict[str, Figure]:
    """For the browser tests too."""
    labels = tuple(f'"{word}" {i}' for i, word in enumerate(HOSTILE))
    return {
        "top tokens": lens(top(layer=6)),
        "hostile": lens(top(words=HOSTILE, pos_labels=labels, layer=4)),
        "by rank, dark": lens(top(layer=6), color=read("rank", layer=6, tokens=(" Mary",)), theme="dark"),
        "panels": lens(read("log_prob", layer=12, tokens=(" Mary", " John"))),
        "heads of a patchscope": lens(top("layer position head", layer=2, text=True), theme="dark"),
        "many": lens(top(layer=12, pos=128, prompt=1)),
    }
