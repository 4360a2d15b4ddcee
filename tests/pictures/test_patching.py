"""Patching prompts with pictures, at every position and site, against untouched models of transformers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

import mechkit as mk
from helpers.vlm import FAMILIES, Oracle, in_double, make_pairs, mixture, pair_of_models
from mechkit.hooks import SITES

TOLERANCE = 1e-9


def expected(
    oracle: Oracle,
    base: mk.Prompts,
    source: mk.Prompts,
    metric: mk.Metric,
    site: str,
    over: str,
    heads: Sequence[int | None],
) -> torch.Tensor:
    """`[layer pos (head) prompt]`; NaN where a prompt has no such position."""
    longest = int(base.lengths.max())
    values = torch.full((len(oracle.layers), longest, len(heads), len(base)), torch.nan, dtype=torch.float64)
    for i in range(len(base)):
        here, there = oracle.activations(base, i), oracle.activations(source, i)
        cells = list(itertools.product(range(len(base.tokens[i])), heads))
        for layer in range(len(oracle.layers)):
            logits = oracle.patched(base, i, here, there, site, layer, cells)
            value = metric.read(logits, torch.full((len(cells),), i), None)
            values[layer, : len(base.tokens[i]), :, i] = value.reshape(-1, len(heads))
    return values if "head" in over else values[:, :, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_and_position(family):
    with in_double():
        hf, model = pair_of_models(family)
        oracle, pairs = Oracle(hf), make_pairs(family, model, (False, True, False))
        metric = mixture(pairs)
        for site in model.sites:
            if not SITES[site].in_block:
                continue
            by_head = "head" in SITES[site].dims
            over, heads = ("layer pos head", [0, model.n_heads_at(site) - 1]) if by_head else ("layer pos", None)
            direction = "noise" if site in ("resid_post", "v") else "denoise"
            found = mk.activation_patching(
                model, pairs, metric, site=site, over=over, heads=heads, direction=direction, progress=False
            )
            assert found.provenance["replay"] == "suffix", (site, found.provenance["replay"])
            base, source = (pairs.clean, pairs.corrupted) if direction == "noise" else (pairs.corrupted, pairs.clean)
            right = expected(oracle, base, source, metric, site, over, heads or [None])
            assert torch.equal(found.values.isnan(), right.isnan())
            assert float((found.values - right).nan_to_num().abs().max()) <= TOLERANCE, site
            unedited = found.baseline["clean" if direction == "noise" else "corrupted"]
            assert float((found.values - unedited).nan_to_num().abs().max()) > 1e-3, site
