"""The proof of the replay, put to the test: it must refute every defect that moves a cell, and accept the right replay."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from families import FAMILIES, build_hf
from planted import DEFECTS, SWEEPS, off, outcome, swept
from test_exact import make_pairs, whole_vocabulary

import mechkit as mk

# Windows (gemma2, gemma3, mistral), parallel blocks (gptj, gpt_neox, falcon), a bias by distance (bloom), learned positions (opt)
TRIED = [name for name in FAMILIES if name not in ("mixtral", "qwen2", "qwen3", "phi")]
TOLERANCE = 1e-8


@cache
def ground(family: str, seed: int, sweep: tuple[str, str], dtype: torch.dtype = torch.float64):
    model = build(family, seed, dtype)
    pairs = make_pairs(seed=seed)
    metric = whole_vocabulary(pairs)
    return model, pairs, metric, swept(model, pairs, metric, sweep, replay=False)


@cache
def build(family: str, seed: int, dtype: torch.dtype) -> mk.HookedModel:
    return mk.HookedModel.from_hf(build_hf(family, dtype, seed), name=family)


@pytest.mark.parametrize("family", TRIED)
def test_every_defect_that_moves_a_cell_is_refuted(family):
    """A covering sample: every defect in every family, every defect in every kind of sweep. `benchmarks/proof.py` tries all."""
    n, moving, missed = TRIED.index(family), 0, []
    for i, name in enumerate(DEFECTS):
        sweep = SWEEPS[(n + 3 * i) % len(SWEEPS)]
        model, pairs, metric, right = ground(family, n % 5, sweep)
        moved, left = outcome(model, pairs, metric, sweep, name, right)
        if left is not None and not left <= TOLERANCE:
            missed.append(f"{name}, {sweep}: off by {left:.1e} (unproved: {moved:.1e})")
        moving += moved > TOLERANCE
    assert not missed, "; ".join(missed)
    assert moving >= 5  # most defects do something nearly everywhere: the test would be empty otherwise


def test_every_defect_moves_a_cell_somewhere():
    """The control: without a proof each of them gives wrong numbers in one of two families."""
    for name in DEFECTS:
        worst = 0.0
        for family, sweep in (("gemma3", ("z", "layer pos head")), ("gemma3", ("mlp_out", "layer pos"))):
            model, pairs, metric, right = ground(family, 0, sweep)
            worst = max(worst, outcome(model, pairs, metric, sweep, name, right)[0])
        assert worst > 1e-3, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_half_precision(family, dtype):
    """The right replay is accepted, and defects that move cells by more than rounding does are refuted."""
    sweep = SWEEPS[0] if family in ("llama", "gpt2") else SWEEPS[1]
    model, pairs, metric, right = ground(family, 0, sweep, dtype)
    accepted = swept(model, pairs, metric, sweep)
    assert accepted.provenance["replay"] == "suffix"
    rounding, missed = off(accepted, right), []
    for name in DEFECTS:
        moved, left = outcome(model, pairs, metric, sweep, name, right)
        if left is not None and not left <= max(3 * rounding, 0.05):
            missed.append(f"{name}: off by {left:.1e} (unproved {moved:.1e})")
    assert not missed, f"rounding {rounding:.1e}: " + "; ".join(missed)


def test_float64_models_that_compute_partly_in_float32_are_held_to_float32():
    """Phi-3's rotations are float32: the hooked model's logits may be off by more than float64 rounds, but not by 1e-3."""
    from mechkit.hooks import _validate

    model = build("llama", 0, torch.float64)
    assert _validate._allowed(model, 1e-7) == 1e-6
    assert _validate._allowed(model, 2e-6) == 1e-4  # its norms are float32
    with pytest.raises(ValueError, match="expected at most 1e-04"):
        _validate._checked(model, "logits", 1e-3)
    assert _validate._allowed(build("gpt2", 0, torch.float64), 2e-6) in (1e-6, 1e-4)
