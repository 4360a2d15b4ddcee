"""A tiny model of each family, pairs of prompts for it, and a metric in which every logit counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mechkit as mk
from helpers.families import D_VOCAB, build_hf

LENGTH = 7
# Pairs whose first differences are at 2 and at 4, and a third of another length: rows start at different positions.
SHAPES = ((LENGTH, 2), (LENGTH, 4), (5, 1))


def make_model(family: str, dtype: torch.dtype | None = None) -> mk.HookedModel:
    """A new model of a family, for a test that changes it: float64, or what its kernels have."""
    dtype = dtype or (torch.float32 if family == "mixtral" else torch.float64)
    return mk.HookedModel.from_hf(build_hf(family, dtype), name=family)


def model_of(family: str, dtype: torch.dtype | None = None) -> mk.HookedModel:
    """The same, made once for all tests that only run it. A test that leaves a change on it fails (`conftest.py`)."""
    key = (family, dtype)
    if key not in SHARED:
        model = make_model(family, dtype)
        SHARED[key] = model, state_of(model)
    USED.add(key)
    return SHARED[key][0]


SHARED: dict[tuple[str, torch.dtype | None], tuple[mk.HookedModel, list[Any]]] = {}
USED: set[tuple[str, torch.dtype | None]] = set()  # since the last look at what has changed


def state_of(model: mk.HookedModel) -> list[Any]:
    """What a test could leave changed: modes, hooks, functions put in the place of others, weights and their gradients.

    Hooks are those that `has_hooks` counts: TransformerLens leaves some of its own with its first `run_with_cache`.
    """
    modules = [(m.training, "forward" in m.__dict__) for m in model.bridge.modules()]
    weights = [(id(p), p._version, p.requires_grad, p.grad is None) for p in model.bridge.parameters()]
    return [model.has_hooks, *modules, *weights]


def changed_models() -> list[str]:
    """Families whose shared model a test has changed; it is made again next time."""
    changed = [key for key in USED if state_of(SHARED[key][0]) != SHARED[key][1]]
    USED.clear()
    for key in changed:
        del SHARED[key]
    return [family for family, _ in changed]


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
