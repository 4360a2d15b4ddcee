"""Plain blocks on torch's fused attention: the same numbers, where it is used at all, and the bridge's blocks untouched."""

from __future__ import annotations

import pytest
import torch

import mechkit as mk
from helpers.families import FAMILIES, build_hf
from helpers.tiny import make_model, make_pairs, whole_vocabulary
from mechkit.engine import _plain, _proof

# Scores that are capped, biased by distance, or computed by a class of its own that has no fused form
EAGER = {"gemma2", "bloom", "gptj", "gpt_neo"}


def swept(model: mk.HookedModel, pairs: mk.PromptPairs, **arguments) -> mk.Result:
    metric = whole_vocabulary(pairs)
    return mk.activation_patching(model, pairs, metric, over="layer pos head", progress=False, **arguments)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Fused attention on a CPU too; and a list that grows with each call of it."""
    made: list[str] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        made.append("sdpa")
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(_plain, "FUSED_ON", ("cpu", "cuda"))
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_numbers(family, calls, monkeypatch):
    model, pairs = make_model(family), make_pairs()
    fused = swept(model, pairs)
    assert bool(calls) == (family not in EAGER)
    assert model.bridge.original_model.config._attn_implementation == "eager"
    assert not model.has_hooks
    monkeypatch.setattr(_plain, "FUSED_ON", ())
    n = len(calls)
    eager = swept(model, pairs)
    assert len(calls) == n
    assert fused.provenance["replay"] == eager.provenance["replay"] == "suffix"
    scale = float(eager.values.nan_to_num().abs().max()) if family == "mixtral" else 1.0
    tolerance = 1e-4 if family == "mixtral" else 1e-10
    assert float((fused.values - eager.values).nan_to_num().abs().max()) <= tolerance * scale


def test_half_precision(calls):
    """Not bit for bit, but as close as rounding is."""
    pairs, exact = make_pairs(), swept(make_model("llama", torch.float64), make_pairs())
    spread = float(exact.values.nan_to_num().abs().max())
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float32, 1e-4)):
        n = len(calls)
        found = swept(mk.HookedModel.from_hf(build_hf("llama", dtype)), pairs)
        assert len(calls) > n
        assert float((found.values - exact.values).nan_to_num().abs().max()) <= tolerance * spread


def test_one_that_is_wrong_is_refuted_and_not_used(calls, monkeypatch):
    model, pairs = make_model("llama"), make_pairs()
    expected = swept(model, pairs, replay=False)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: q * 0)
    used = []
    replayer = _proof._replayer
    monkeypatch.setattr(
        _proof,
        "_replayer",
        lambda several: used.append(several[0].chunk.state.proof.candidates[0].plain) or replayer(several),
    )
    found = swept(model, pairs)
    assert used[:4] == [_plain.PACKED_SDPA, "sdpa", "eager", "eager"]  # tried, tried, tried, and used
    assert float((found.values - expected.values).nan_to_num().abs().max()) <= 1e-10


def test_on_a_cpu_it_is_not_tried(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("fused attention on a CPU")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", never)
    assert swept(make_model("llama"), make_pairs()).provenance["replay"] == "suffix"
