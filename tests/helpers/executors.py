"""What the studies of `test_executors.py` name as code: workers in other processes import it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

import mechkit as mk
from helpers.families import build_hf


def tiny_llama() -> mk.HookedModel:
    return mk.HookedModel.from_hf(build_hf("llama"), name="tiny llama")


def tiny_pairs(model: mk.HookedModel, n: int = 6, seed: int = 0) -> mk.PromptPairs:
    """Random pairs of 5 to 7 tokens that differ in one of them."""
    generator = torch.Generator().manual_seed(seed)
    clean = [torch.randint(3, model.d_vocab, (5 + i % 3,), generator=generator) for i in range(n)]
    corrupted = [row.clone() for row in clean]
    for row in corrupted:
        row[2] = (row[2] - 2) % (model.d_vocab - 3) + 3
    return mk.PromptPairs.from_tokens(clean, corrupted, [(3 + i % 5, 20 + i % 7) for i in range(n)])


def dies_once(model: mk.HookedModel, pairs: mk.PromptPairs, metric: mk.Metric, flag: str = "") -> mk.Result:
    """Patches heads; the first process that comes by is killed in the middle of it."""
    found = mk.activation_patching(model, pairs, metric, progress=False)
    if not Path(flag).exists():
        Path(flag).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return found


def always_dies(model: mk.HookedModel, pairs: mk.PromptPairs, metric: mk.Metric) -> mk.Result:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def always_fails(model: mk.HookedModel, pairs: mk.PromptPairs, metric: mk.Metric) -> mk.Result:
    raise ValueError("this technique always fails")
