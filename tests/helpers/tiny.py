"""A tiny model of each family, pairs of prompts for it, and a metric in which every logit counts."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import mechkit as mk
from helpers.families import D_VOCAB, build_hf

LENGTH = 7
# Pairs whose first differences lie at 2 and at 4, and a third of another length: rows start at different positions.
SHAPES = ((LENGTH, 2), (LENGTH, 4), (5, 1))


def make_model(family: str, dtype: torch.dtype | None = None) -> mk.HookedModel:
    dtype = dtype or (torch.float32 if family == "mixtral" else torch.float64)  # its kernels have no float64
    return mk.HookedModel.from_hf(build_hf(family, dtype), name=family)


@functools.cache
def model_of(family: str) -> mk.HookedModel:
    """A family's tiny model, made once a process. Nobody may change it."""
    return make_model(family)


def make_pairs(shapes: tuple[tuple[int, int], ...] = SHAPES, seed: int = 0) -> mk.PromptPairs:
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted = [], []
    for length, first_difference in shapes:
        a = torch.randint(3, D_VOCAB, (length,), generator=generator)
        b = torch.randint(3, D_VOCAB, (length,), generator=generator)
        b[:first_difference] = a[:first_difference]
        b[first_difference] = 3 + (a[first_difference] - 2) % (D_VOCAB - 3)
        clean.append(a)
        corrupted.append(b)
    return mk.PromptPairs.from_tokens(clean, corrupted, [(5, 7)] * len(shapes))


def whole_vocabulary(pairs: mk.PromptPairs, position: str = "END") -> mk.Metric:
    """Every logit counts: a random mixture of all of them."""
    weights = torch.randn(D_VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(9))

    def read(logits, prompt, reference):
        return logits @ weights.to(logits.dtype)

    return mk.Metric("mixture", "logits", len(pairs), pairs.positions[position], None, read)


def read(metric: mk.Metric, logits: Tensor, pair: int) -> float:
    """The metric of one prompt's logits `[1 pos d_vocab]` (a reference: the corrupted or clean run's own is not needed)."""
    row = logits.reshape(-1, logits.shape[-1])[metric.positions[pair]][None]
    return float(metric.read(row if metric.tokens is None else row[:, metric.tokens], torch.tensor([pair]), None))


def n_hooks(model: mk.HookedModel) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(module.__dict__[kind]) for module in model.bridge.modules() for kind in kinds)
