"""Made-up results for `mechkit.plot.compare`, and what it draws of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import mechkit as mk
from helpers.pictures.bars import HOSTILE, make
from mechkit.circuits import EdgeScores, Graph
from mechkit.plot._compare import compare
from mechkit.plot._figure import Figure
from mechkit.result import Result

NAN = float("nan")


def pair(layers: int = 12, heads: int = 12, n: int = 6, seed: int = 0, **origin: Any) -> tuple[Result, Result]:
    """An approximation with errors, and the exact effects."""
    generator = torch.Generator().manual_seed(seed)
    exact = 0.3 * torch.randn(layers, heads, 1, generator=generator, dtype=torch.float64) ** 3
    exact = exact + 0.1 * exact * torch.randn(layers, heads, n, generator=generator)
    approx = 0.7 * exact + 0.05 * torch.randn(exact.shape, generator=generator) * exact.abs().sqrt()
    runs = {
        "clean": torch.full((n,), 3.0, dtype=torch.float64),
        "corrupted": torch.full((n,), -2.0, dtype=torch.float64),
    }
    made = []
    for technique, effect in (("attribution patching", approx), ("activation patching", exact)):
        origins = {"technique": technique, "site": "z", "direction": "denoise", "n_prompts": n}
        origins |= origin if technique == "attribution patching" else {}
        values = runs["corrupted"] + effect
        made.append(make(values, "layer head prompt", baseline=runs, base="corrupted", origin=origins))
    return made[0], made[1]


def edges(seed: int, technique: str, skip: float = 0.0, **changes: Any) -> EdgeScores:
    generator = torch.Generator().manual_seed(seed)
    graph = Graph(3, 2, 2)
    values = torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(5)) ** 3
    values = values + 0.2 * torch.randn(values.shape, generator=generator)
    values = values.masked_fill(~graph.exists | (torch.rand(values.shape, generator=generator) < skip), NAN)
    fields = {
        "metric": "logit_diff",
        "unit": "logits",
        "provenance": {"model": "gpt2", "technique": technique},
        "prompts": False,
    }
    return EdgeScores.of(
        graph, values, baseline={"clean": torch.ones(2), "corrupted": torch.zeros(2)}, **(fields | changes)
    )


def hostile() -> tuple[Result, Result]:
    exact = make(torch.linspace(-1, 2, len(HOSTILE)), "pos", coords={"pos": HOSTILE}, metric="<b>m</b>", unit="$u$")
    runs = {"corrupted": torch.tensor(0.0)}
    exact = replace(exact, baseline=runs, base="corrupted")
    return replace(exact, values=exact.values.flip(0)), exact


def examples() -> dict[str, Figure]:
    approx, exact = pair()
    return {
        "heads": compare(approx, exact),
        "dark": compare(mk.compare(approx, exact), theme="dark"),
        "edges": compare(edges(1, "edge attribution"), edges(2, "edge patching", skip=0.3)),
        "sizes": compare(
            replace(
                approx, values=-2 + (approx.values + 2).abs(), provenance={**approx.provenance, "sign": "magnitude"}
            ),
            exact,
        ),
        "hostile": compare(*hostile()),
    }
