"""The real model: mechkit's sweeps against TransformerLens's own, and a known experiment."""

from __future__ import annotations

import pytest
import torch

import mechkit as mk

NAMES = (("Mary", "John", "Tom"), ("Sarah", "James", "David"))
TEMPLATE = "When {} and {} went to the store, {} gave a drink to"


@pytest.fixture(scope="module")
def pairs(smollm2):
    return mk.PromptPairs.from_text(
        smollm2,
        [TEMPLATE.format(a, b, b) for a, b, _ in NAMES],
        [TEMPLATE.format(a, b, c) for a, b, c in NAMES],
        [(" " + a, " " + b) for a, b, _ in NAMES],
        prepend_bos=False,
    )


def test_validates(smollm2):
    report = smollm2.validate()
    assert report.logits is not None
    assert report.logits < 1e-4
    assert report.heads is not None
    assert report.heads < 1e-4


def test_equals_transformer_lens_sweeps(smollm2, pairs):
    """`benchmarks/patching/other_libraries.py` compares every cell; here a few layers, to save time."""
    import pandas
    from transformer_lens import patching

    clean, corrupted = (torch.stack(p.tokens) for p in (pairs.clean, pairs.corrupted))
    right, wrong = (torch.tensor([ids[0] for ids in side]) for side in (pairs.right, pairs.wrong))

    def metric(logits):
        return (logits[[0, 1], -1, right] - logits[[0, 1], -1, wrong]).mean()

    layers, bridge = [2, 23], smollm2.bridge
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        heads = pandas.DataFrame([{"layer": i, "head_index": h} for i in layers for h in range(smollm2.n_heads)])
        by_head = patching.generic_activation_patch(
            bridge, corrupted, cache, metric, patching.layer_head_vector_patch_setter, "z", index_df=heads
        )
        places = pandas.DataFrame([{"layer": i, "pos": p} for i in layers for p in range(clean.shape[1])])
        by_pos = patching.generic_activation_patch(
            bridge, corrupted, cache, metric, patching.layer_pos_patch_setter, "resid_pre", index_df=places
        )
    arguments = {"layers": layers, "progress": False}
    z = mk.activation_patching(smollm2, pairs, mk.logit_diff(pairs), site="z", **arguments)
    resid = mk.activation_patching(
        smollm2, pairs, mk.logit_diff(pairs), site="resid_pre", over="layer pos", **arguments
    )
    assert float((z.mean("prompt").values.flatten() - by_head.flatten()).abs().max()) <= 1e-4
    assert float((resid.mean("prompt").values.flatten() - by_pos.flatten()).abs().max()) <= 1e-4
    assert z.provenance["replay"] == "suffix"


def test_head_23_3_dominates(smollm2, pairs):
    heads = mk.activation_patching(smollm2, pairs, mk.logit_diff(pairs), layers=range(19, 29), progress=False)
    assert heads.mean("prompt").normalized().top(1)[0].label == "L23H3"
    assert heads.cost.speedup > 5


def test_results_survive_the_disk(smollm2, pairs, tmp_path):
    heads = mk.activation_patching(smollm2, pairs, mk.logit_diff(pairs), layers=[23], progress=False)
    heads.save(tmp_path / "heads.safetensors")
    again = mk.Result.load(tmp_path / "heads.safetensors")
    assert torch.equal(again.values, heads.values)
    assert dict(again.provenance) == dict(heads.provenance)


def test_bfloat16_is_close_and_metrics_are_float32(smollm2, pairs):
    """Half precision runs through the same engine; its metrics are accumulated in float32."""
    full = mk.activation_patching(smollm2, pairs, mk.logit_diff(pairs), layers=[23], progress=False)
    half = mk.HookedModel.from_pretrained("smollm2-135m", device="cpu", dtype=torch.bfloat16)
    found = mk.activation_patching(half, pairs, mk.logit_diff(pairs), layers=[23], progress=False)
    assert found.values.dtype == torch.float32
    assert torch.allclose(found.values, full.values, atol=1.0)
    assert found.mean("prompt").normalized().top(1)[0].label == "L23H3"
