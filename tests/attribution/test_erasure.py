"""The erasure check: exact on a hand-written writer and eraser, and its parts sum to the total on every family."""

from __future__ import annotations

import math

import pytest
import torch

import mechkit as mk
from helpers.families import FAMILIES
from helpers.tiny import make_model, make_pairs, model_of, whole_vocabulary


def test_a_writer_and_an_eraser():
    known = mk.zoo.writer_and_eraser()
    question = known.model, known.pairs, known.metric
    (writer,), (eraser,), (bystander,) = (known.roles[role] for role in ("writer", "eraser", "bystander"))
    dla = mk.direct_logit_attribution(*question, over="layer head")
    found = mk.dla_erasure_check(*question, head=writer)
    credited = dla.values[writer]
    assert bool((credited > 1).all())  # what direct logit attribution credits the writer with
    assert torch.allclose(found.direct.values, credited, atol=1e-8)
    assert torch.allclose(found.total.values, torch.zeros_like(credited), atol=1e-8)
    assert found.erased == pytest.approx(1, abs=1e-8)
    name = f"L{eraser[0]}H{eraser[1]}"
    assert torch.allclose(found.written.sel(component=name).values, -credited, atol=1e-8)
    assert [eraser_name for eraser_name, _ in found.erasers()] == [name]
    assert name in str(found)
    # Control: nobody erases the bystander.
    kept = mk.dla_erasure_check(*question, head=bystander)
    assert torch.allclose(kept.total.values, kept.direct.values, atol=1e-8)
    assert float(kept.direct.values.abs().min()) > 0.5
    assert kept.erased == pytest.approx(0, abs=1e-8)
    assert kept.erasers() == ()


@pytest.mark.parametrize("mode", ["zero", "mean", "position_mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_sum_to_the_total_effect(family, mode):
    model, pairs = model_of(family), make_pairs(((7, 2), (7, 4)))
    metric = whole_vocabulary(pairs)
    head = (1, 2)
    found = mk.dla_erasure_check(model, pairs, metric, head, mode=mode)
    tolerance = 1e-3 if family == "mixtral" else 1e-4
    exact = mk.ablation(model, pairs, metric, "z", "layer head", mode=mode, progress=False)
    total = -exact.effect().values[head]
    size = max(1.0, float(total.abs().max()))
    assert torch.allclose(found.total.values, total.double(), atol=tolerance * size)
    parts = found.direct.values + found.written.values.sum(0)
    assert torch.allclose(parts, found.total.values, atol=1e-6 * size)
    if mode == "zero":
        dla = mk.direct_logit_attribution(model, pairs, metric, over="layer head").values[head]
        if family not in ("gemma2", "gemma3", "olmo2"):  # there the block's own norm has another scale without the head
            assert torch.allclose(found.direct.values, dla.double(), atol=tolerance * size)
    assert float(found.written.values[:-1].abs().max()) > 1e-3  # control
    assert not model.has_hooks


def test_last_layer_and_ragged_prompts():
    model, pairs = make_model("gpt2"), make_pairs()
    found = mk.dla_erasure_check(model, pairs, mk.logit_diff(pairs), (3, 0), budget=1)
    assert "L3 mlp" in found.written.coords["component"]
    assert len(found.written.coords["component"]) == 3 + 1 + 1
    one_by_one = [
        mk.dla_erasure_check(model, pairs[[i]], mk.logit_diff(pairs[[i]]), (3, 0)).total.values[0] for i in range(3)
    ]
    assert torch.allclose(found.total.values, torch.stack(one_by_one), atol=1e-10)


@pytest.mark.parametrize("mode", ["mean", "position_mean"])
def test_a_mean_is_that_of_ablation_whatever_the_lengths(mode):
    model, pairs = make_model("llama"), make_pairs(((7, 2), (5, 1), (7, 4), (6, 2)))
    metric, head = mk.logit_diff(pairs), (1, 2)
    found = mk.dla_erasure_check(model, pairs, metric, head, mode=mode)
    exact = mk.ablation(model, pairs, metric, mode=mode, progress=False).effect().values[head]
    assert torch.allclose(found.total.values, -exact.double(), atol=1e-9)
    small = mk.dla_erasure_check(model, pairs, metric, head, mode=mode, budget=1)
    assert torch.allclose(found.written.values, small.written.values, atol=1e-9)
    alone = mk.dla_erasure_check(model, pairs[[0, 2]], mk.logit_diff, head, mode=mode)  # control: others count
    assert not torch.allclose(found.total.values[[0, 2]], alone.total.values, atol=1e-6)


def test_bad_arguments():
    model, pairs = make_model("gpt2"), make_pairs()
    metric = mk.logit_diff(pairs)
    for arguments, match in (
        ({"head": (4, 0)}, "head"),
        ({"head": (0, 4)}, "head"),
        ({"head": (0, 0), "mode": "resample"}, "mode"),
    ):
        with pytest.raises(ValueError, match=match):
            mk.dla_erasure_check(model, pairs, metric, **arguments)
    with pytest.raises(ValueError, match="mode: 'mean' needs"):
        mk.dla_erasure_check(model, pairs[[0]], mk.logit_diff, (0, 0), mode="mean")
    with pytest.raises(ValueError, match="mode: 'position_mean' needs at least 2 prompts of 7 tokens"):
        mk.dla_erasure_check(model, make_pairs(((7, 2), (5, 1))), mk.logit_diff, (0, 0), mode="position_mean")
    with pytest.raises(ValueError, match="linear"):
        mk.dla_erasure_check(model, pairs, mk.log_prob(pairs), (0, 0))
    silent = mk.dla_erasure_check(model, pairs, torch.zeros(model.d_model, dtype=torch.float64), (0, 0))
    assert math.isnan(silent.erased)
