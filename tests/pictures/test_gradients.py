"""Gradients at patches against autograd on untouched models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mechkit as mk
from helpers.tiny import make_pairs as text_pairs
from helpers.tiny import model_of
from helpers.vlm import FAMILIES, Oracle, in_double, make_pairs, mixture, pair_of_models
from mechkit.hooks.loading.pixels import from_pixels, to_pixels

SITES = ("resid_pre", "z", "mlp_out", "resid_post")


def gradient_at(
    oracle: Oracle, prompts: mk.Prompts, i: int, site: str, layer: int, at: Tensor, read: Callable[[Tensor], Tensor]
) -> Tensor:
    """The gradient of what `read` takes from the last logits, where the activation of one site is `at`."""
    leaf = at.clone().requires_grad_()
    module, side = oracle.place(site, layer)
    logits = oracle.logits(prompts, i, 1, [(module, side, lambda x: leaf[None])], grad=True).logits
    (found,) = torch.autograd.grad(read(logits[:, -1]).sum(), leaf)
    return found


def read_of(metric: mk.Metric, i: int) -> Callable[[Tensor], Tensor]:
    return lambda logits: metric.read(logits, torch.full((len(logits),), i), None)


@pytest.mark.parametrize("family", FAMILIES)
def test_attribution_patching(family):
    """`(clean - corrupted) * gradient`, at every position."""
    with in_double():
        hf, model = pair_of_models(family)
        oracle, pairs = Oracle(hf), make_pairs(family, model, (False, True, False))
        metric = mixture(pairs)
        for site in SITES:
            over = "layer pos head" if site == "z" else "layer pos"
            found = mk.attribution_patching(model, pairs, metric, site=site, over=over)
            effects = found.values - found.baseline["corrupted"]
            for i in range(len(pairs)):
                here, there = oracle.activations(pairs.corrupted, i), oracle.activations(pairs.clean, i)
                for layer in range(model.n_layers):
                    gradient = gradient_at(
                        oracle, pairs.corrupted, i, site, layer, here[site, layer], read_of(metric, i)
                    )
                    product = (there[site, layer] - here[site, layer]) * gradient
                    right = product.unflatten(-1, (model.n_heads, -1)).sum(-1) if site == "z" else product.sum(-1)
                    assert float((effects[layer, : len(right), ..., i] - right).abs().max()) <= 1e-9, (site, layer)
            if family != "qwen3_vl":  # where another picture adds something else between the blocks
                assert found.provenance["runs"] == "suffix"


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
def test_integrated_gradients_of_patches(family):
    """From the corrupted to the clean picture's patches, as the first block reads them: complete."""
    with in_double():
        hf, model = pair_of_models(family)
        oracle, pairs = Oracle(hf), make_pairs(family, model, (False, False))
        metric, steps = mixture(pairs), 4
        given: dict[str, Any] = {"site": "resid_pre", "over": "layer pos", "layers": [0], "path": "activation"}
        found = mk.integrated_gradients(model, pairs, metric, steps=steps, rule="midpoint", **given)
        for i in range(2):
            here, there = oracle.activations(pairs.corrupted, i), oracle.activations(pairs.clean, i)
            change, total = there["resid_pre", 0] - here["resid_pre", 0], 0
            for step in range(steps):
                at = here["resid_pre", 0] + (step + 0.5) / steps * change
                total = total + gradient_at(oracle, pairs.corrupted, i, "resid_pre", 0, at, read_of(metric, i)) / steps
            right = (change * total).sum(-1)
            assert float((found.values[0, :, i] - found.baseline["corrupted"][i] - right).abs().max()) <= 1e-9
        many = mk.integrated_gradients(model, pairs, metric, steps=64, **given)
        sums = (many.values[0] - many.baseline["corrupted"]).nansum(0)
        effect = many.baseline["clean"] - many.baseline["corrupted"]
        assert many.provenance["completeness_error"] < 0.03
        assert torch.allclose(sums, effect, atol=0.03 * float(effect.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_x_input(family):
    with in_double():
        hf, model = pair_of_models(family)
        oracle, pairs = Oracle(hf), make_pairs(family, model)
        metric = mixture(pairs)
        found = mk.gradient_x_input(model, pairs, metric)
        for i in range(len(pairs)):
            here = oracle.activations(pairs.clean, i)["resid_pre", 0]
            right = (here * gradient_at(oracle, pairs.clean, i, "resid_pre", 0, here, read_of(metric, i))).sum(-1)
            assert float((found.values[: len(right), i] - right).abs().max()) <= 1e-9


def pixel_gradient(
    oracle: Oracle, prompts: mk.Prompts, i: int, pixels: Tensor, read: Callable[[Tensor], Tensor]
) -> Tensor:
    leaf = pixels.double().clone().requires_grad_()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in prompts.inputs[i].items()} | {
        "pixel_values": leaf
    }
    with torch.enable_grad():
        logits = oracle.hf(prompts.tokens[i][None], **inputs).logits
        (found,) = torch.autograd.grad(read(logits[:, -1]).sum(), leaf)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels(family):
    with in_double():
        hf, model = pair_of_models(family)
        oracle, pairs = Oracle(hf), make_pairs(family, model)
        metric = mixture(pairs)
        for method in ("gradient", "gradient_x_input"):
            found = mk.pixel_attribution(model, pairs, metric, method, progress=False)
            for i in range(len(pairs)):
                pixels = pairs.clean.inputs[i]["pixel_values"].double()
                right = pixel_gradient(oracle, pairs.clean, i, pixels, read_of(metric, i))
                right = right if method == "gradient" else right * pixels
                maps = torch.stack([one.sum(0) for one in model.pixel_maps(pairs.clean, i, right)])
                assert float((found.values[..., i] - maps).abs().max()) <= 1e-9
                assert abs(float(found.values[..., i].sum() - right.sum())) <= 1e-9
        given = [{k: v for k, v in one.items() if "token_type" not in k} for one in pairs.corrupted.inputs]
        others = mk.Prompts.from_inputs(model, pairs.clean.tokens, given)
        integrated = mk.pixel_attribution(model, pairs, metric, baseline=others, steps=40, progress=False)
        error = integrated.provenance["completeness_error"]
        values = [
            metric.read(oracle.logits(of, 0).logits[:, -1], torch.tensor([0]), None) for of in (pairs.clean, others)
        ]
        assert error < 0.05
        assert abs(float(integrated.values[..., 0].sum() - (values[0] - values[1]))) <= 0.1 * abs(
            float(values[0] - values[1])
        )


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_pictures_and_back(family):
    """Patches lie where they belong: one bright pixel of the picture is in the patch that the model calls so."""
    _, model = pair_of_models(family)
    prompts = make_pairs(family, model).clean[[0]]
    config, inputs = model.bridge.original_model.config, prompts.inputs[0]
    (picture,) = to_pixels(config, inputs)
    still = from_pixels(config, [picture], inputs)
    assert torch.equal(to_pixels(config, {**inputs, "pixel_values": still})[0], picture)
    if family == "llava":
        assert torch.equal(still, inputs["pixel_values"])
        return
    bright = torch.zeros_like(picture)
    bright[1, 5, 18] = (
        1.0  # patches of 4 x 4 pixels, merged two by two: patch row 1, column 4 of 6; block row 0, column 2
    )
    flat = from_pixels(config, [bright], inputs)
    where = flat.nonzero()
    assert where[:, 0].unique().tolist() == [10]  # the third block of 4 patches: 8 + (1, 0) of 2 x 2
    assert len(where) == 2  # two frames


@pytest.mark.parametrize("mode", ["patch_mean", "blur", "resample", "zero"])
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl", "llava_next"])
def test_ablation_of_patches(family, mode):
    with in_double():
        hf, model = pair_of_models(family)
        oracle, pairs = Oracle(hf), make_pairs(family, model, (False, False))
        metric, clean = mixture(pairs), pairs.clean
        found = mk.ablation(model, pairs, metric, site="mlp_out", over="layer patch", mode=mode, progress=False)
        assert found.provenance["replay"] == "suffix"
        places = [at for s in clean.segments[0] if s.kind == "image" for at in s.positions]
        other = model.blurred(clean) if mode == "blur" else clean
        runs = [oracle.activations(other, i) for i in range(2)]
        for layer in (0, 3):
            mean = torch.stack([run["mlp_out", layer][places] for run in runs]).mean((0, 1))
            for i in range(2):
                there = runs[i if mode == "blur" else 1 - i]["mlp_out", layer]
                for j in (0, len(places) // 2, len(places) - 1):

                    def put(x, at=places[j], there=there, mean=mean):
                        x[:, at] = {"patch_mean": mean, "zero": torch.zeros_like(mean)}.get(mode, there[at])
                        return x

                    logits = oracle.logits(clean, i, 1, [(*oracle.place("mlp_out", layer), put)]).logits[:, -1]
                    right = metric.read(logits, torch.tensor([i]), None)
                    assert abs(float(found.values[layer, j, i] - right)) <= 1e-9


def test_blurring():
    _, model = pair_of_models("llava")
    prompts = make_pairs("llava", model).clean
    soft = model.blurred(prompts, sigma=2.0)
    for one, other in zip(prompts.inputs, soft.inputs, strict=True):
        assert other["pixel_values"].std() < 0.5 * one["pixel_values"].std()
        assert torch.allclose(model.blurred(soft, 1e-3).inputs[0]["pixel_values"], soft.inputs[0]["pixel_values"])
    flat = {"pixel_values": torch.full((1, 3, 24, 24), 0.7)}
    even = mk.Prompts.from_inputs(model, prompts.tokens[:1], [flat])
    assert torch.allclose(model.blurred(even).inputs[0]["pixel_values"], flat["pixel_values"], atol=1e-6)
    with pytest.raises(ValueError, match="sigma: expected"):
        model.blurred(prompts, sigma=0)


WRONG = {
    "method": ({"method": "lrp"}, "method: expected one of"),
    "steps": ({"steps": 0}, "steps: expected"),
    "baseline": ({"baseline": "noise"}, "baseline: expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refusals(name):
    given, sentence = WRONG[name]
    _, model = pair_of_models("llava")
    pairs = make_pairs("llava", model)
    with pytest.raises(ValueError, match=sentence):
        mk.pixel_attribution(model, pairs, mk.logit_diff(pairs), progress=False, **given)
    with pytest.raises(ValueError, match="no gradient path"):
        mk.pixel_attribution(model, pairs, mk.accuracy(pairs), progress=False)
    text = text_pairs()
    with pytest.raises(ValueError, match="a picture in each"):
        mk.pixel_attribution(model_of("llama"), text, mk.logit_diff(text), progress=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_baseline_runs(family):
    with in_double():
        _, model = pair_of_models(family)
        pairs = make_pairs(family, model)
        found = mk.pixel_attribution(model, pairs, mk.logit_diff(pairs), steps=2, progress=False)
        assert bool(found.values.isfinite().all())


def test_baselines_of_other_forms():
    _, model = pair_of_models("qwen2_5_vl")
    pairs = make_pairs("qwen2_5_vl", model)
    metric = mk.logit_diff(pairs)
    turned = [
        {"pixel_values": one["pixel_values"], "image_grid_thw": torch.tensor([[1, 6, 4]])} for one in pairs.clean.inputs
    ]
    with pytest.raises(ValueError, match="baseline: expected"):
        mk.pixel_attribution(
            model, pairs, metric, baseline=mk.Prompts.from_inputs(model, pairs.clean.tokens, turned), progress=False
        )
    with pytest.raises(ValueError, match="baseline: expected the words"):
        mk.pixel_attribution(model, pairs, metric, baseline=pairs.corrupted, progress=False)
