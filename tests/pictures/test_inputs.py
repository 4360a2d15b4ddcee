"""Inputs beside tokens: how they go in, what is refused, and what tells two pictures apart."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import mechkit as mk
from helpers.tiny import model_of
from helpers.vlm import FAMILIES, IMAGE, build_hf, in_double, make_pairs, make_prompts, pair_of_models, picture
from mechkit.hooks.loading.pictures import tiles_of


def of_batch(prompts: mk.Prompts) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """As a user has them from a processor: of tokens and pixels alone."""
    rows = prompts.stack(range(len(prompts)))
    return rows.tokens, {name: one for name, one in rows.arguments.items() if "token_type" not in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_cache_and_hooks(family):
    with in_double():
        hf, model = pair_of_models(family)
        prompts = make_prompts(family, model, [0, 1])
        tokens, inputs = of_batch(prompts)
        arguments = {k: v.double() if v.is_floating_point() else v for k, v in prompts.stack([0, 1]).arguments.items()}
        with torch.no_grad():
            right = hf(tokens, **arguments).logits
            assert torch.allclose(model(tokens, inputs=inputs), right, atol=1e-9)
            logits, cache = model.run_with_cache(tokens, ["resid_pre", "z"], inputs=inputs)
            assert torch.allclose(logits, right, atol=1e-9)
            assert torch.equal(cache["z", 1], model.run_with_cache(tokens, ("z", 1), inputs=inputs)[1]["z", 1])
            zeroed = model.run_with_hooks(tokens, [(("z", 0), lambda z, hook: z * 0)], inputs=inputs)
            assert float((zeroed - right).abs().max()) > 1e-3
            with model.hooks([(("z", 0), lambda z, hook: z * 0)]):
                assert torch.equal(model(tokens, inputs=inputs), zeroed)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family):
    with in_double():
        hf, model = pair_of_models(family)
        prompts = make_prompts(family, model, [0, 1])
        tokens, inputs = of_batch(prompts)
        found = model.generate(tokens, 5, inputs=inputs, stop_at_eos=False)
        arguments = {k: v.double() if v.is_floating_point() else v for k, v in prompts.stack([0, 1]).arguments.items()}
        right = hf.generate(
            tokens,
            **arguments,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            attention_mask=torch.ones_like(tokens),
        )
        assert torch.equal(found, right)
        alone = model.generate(tokens[1:], 5, inputs=of_batch(prompts[[1]])[1], stop_at_eos=False)
        assert torch.equal(found[1:], alone)
        # The control: another picture is continued otherwise.
        other = of_batch(make_prompts(family, model, [20, 21]))[1]
        assert not torch.equal(model.generate(tokens, 5, inputs=other, stop_at_eos=False), found)


def call(family: str, change: Any = None, tokens: Any = None) -> Any:
    """`Prompts.from_inputs` of a right picture that was changed."""
    _, model = pair_of_models(family)
    right = make_prompts(family, model, [0])
    inputs = dict(picture(family, 0))
    return mk.Prompts.from_inputs(
        model, right.tokens if tokens is None else tokens, [change(inputs) if change else inputs]
    )


def pixels(change: Any) -> Any:
    return lambda inputs: inputs | {"pixel_values": change(inputs["pixel_values"])}


WRONG = {
    "three channels": ("llava", pixels(lambda x: x[:, :1]), "expected 3 channels, got 1"),
    "size": ("llava", pixels(lambda x: x[..., :16]), "expected pictures of 24 x 24 pixels, got 24 x 16"),
    "no axis of pictures": (
        "llava",
        pixels(lambda x: x[0]),
        r"expected \[picture, channel, row, column\], got shape \[3, 24, 24\]",
    ),
    "whole numbers": ("llava", pixels(lambda x: x.long()), "expected scaled pixels as floating-point numbers"),
    "NaN": ("llava", pixels(lambda x: x * torch.nan), "expected finite numbers"),
    "two pictures": (
        "llava",
        pixels(lambda x: x.repeat(2, 1, 1, 1)),
        r"for each of 18 patches, .* got 9 in the prompt",
    ),
    "an unknown input": ("llava", lambda inputs: inputs | {"pixels": torch.ones(1)}, "'pixels' is nothing that llava"),
    "labels": ("llava", lambda inputs: inputs | {"labels": torch.ones(1)}, "'labels' is nothing that llava"),
    "no sizes": (
        "llava_next",
        lambda inputs: {"pixel_values": inputs["pixel_values"]},
        "expected 'image_sizes' beside",
    ),
    "no tiles": ("llava_next", pixels(lambda x: x[0]), r"expected \[picture, tile, channel, row, column\]"),
    "no grid": (
        "qwen2_5_vl",
        lambda inputs: {"pixel_values": inputs["pixel_values"]},
        "expected 'image_grid_thw' beside",
    ),
    "a patch too few": ("qwen2_5_vl", pixels(lambda x: x[1:]), "image_grid_thw"),
    "numbers a patch": ("qwen3_vl", pixels(lambda x: x[:, 1:]), "expected 96 numbers a patch"),
    "videos": (
        "qwen2_5_vl",
        lambda inputs: {"pixel_values_videos": inputs["pixel_values"], "video_grid_thw": inputs["image_grid_thw"]},
        "'pixel_values_videos' is nothing that",
    ),
    "frames": (
        "qwen2_5_vl",
        lambda inputs: inputs | {"image_grid_thw": torch.tensor([[2, 4, 3]])},
        "of one frame each",
    ),
    "a grid of fractions": (
        "qwen3_vl",
        lambda inputs: inputs | {"image_grid_thw": torch.tensor([[1.0, 4.0, 6.0]])},
        "of whole numbers from 1 on",
    ),
    "kinds of tokens": (
        "qwen3_vl",
        lambda inputs: inputs | {"mm_token_type_ids": torch.zeros(1, 13, dtype=torch.long)},
        "expected 1 at the placeholders",
    ),
    "a size of 0": (
        "llava_next",
        lambda inputs: inputs | {"image_sizes": torch.tensor([[0, 24]])},
        "a height and width in whole pixels",
    ),
    "three numbers a size": (
        "llava_next",
        lambda inputs: inputs | {"image_sizes": torch.tensor([[40, 24, 1]])},
        "a height and width in whole pixels",
    ),
    "views too few": ("llava_next", pixels(lambda x: x[:, :2]), "expected 3 views"),
    "numbers of pictures": (
        "llava_onevision",
        lambda inputs: inputs | {"batch_num_images": torch.tensor([1])},
        "'batch_num_images' is nothing that",
    ),
    "layers": (
        "llava",
        lambda inputs: inputs | {"vision_feature_layer": torch.tensor([1])},
        "'vision_feature_layer' is nothing that",
    ),
    "an odd grid": (
        "qwen3_vl",
        lambda inputs: inputs | {"image_grid_thw": torch.tensor([[1, 3, 8]])},
        "in multiples of 2",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(name):
    family, change, sentence = WRONG[name]
    with pytest.raises(ValueError, match=sentence) as raised:
        call(family, change)
    assert len(str(raised.value).split("\n")) == 1


def test_placeholders():
    _, model = pair_of_models("llava")
    right = make_prompts("llava", model, [0]).tokens[0]
    with pytest.raises(ValueError, match=r"for each of 9 patches, .* got 8"):
        call("llava", tokens=[right[right != IMAGE].tolist() + [IMAGE] * 8])
    with pytest.raises(ValueError, match="side by side"):
        call("llava", tokens=[[3, *[IMAGE] * 4, 9, *[IMAGE] * 5, 7]])
    with pytest.raises(ValueError, match=r"9 tokens .* stand for patches"):
        model.forward(right[None])
    plain = mk.Prompts.from_tokens([right])
    with pytest.raises(ValueError, match="stand for patches"):
        mk.logit_lens(model, plain, tokens=[5], progress=False)
    with pytest.raises(ValueError, match=r"as a tensor|one after the other"):
        model.forward(right[None].expand(2, -1), inputs=picture("llava", 0))


def test_pictures_for_a_model_of_text():
    _, model = pair_of_models("llava")
    pairs = make_pairs("llava", model)
    with pytest.raises(ValueError, match="it reads text alone"):
        mk.Prompts.from_inputs(model_of("llama"), [[3, 4]], [{"pixel_values": torch.ones(1, 3, 24, 24)}])
    with pytest.raises(ValueError, match="it reads text alone"):
        mk.activation_patching(model_of("llama"), pairs, mk.logit_diff(pairs), progress=False)


def test_another_picture_is_another_prompt():
    """Caches, metrics and circuits of one picture are refused for another with the same tokens."""
    _, model = pair_of_models("llava")
    pairs, others = make_pairs("llava", model), make_pairs("llava", model)
    assert pairs.clean.inputs is not None
    changed = mk.Prompts.from_inputs(
        model, pairs.clean.tokens, [{"pixel_values": one["pixel_values"] + 0.5} for one in pairs.clean.inputs]
    )
    others = mk.PromptPairs(changed, pairs.corrupted, pairs.right, pairs.wrong)
    assert [row.tolist() for row in others.clean.tokens] == [row.tolist() for row in pairs.clean.tokens]
    assert others.clean.hash() != pairs.clean.hash()
    with pytest.raises(ValueError, match="metric"):
        mk.activation_patching(model, others, mk.logit_diff(pairs), progress=False)
    tokens, inputs = of_batch(pairs.clean[[0]])
    cache = model.run_with_cache(tokens, "z", inputs=inputs)[1]
    given: dict[str, Any] = {"source_cache": cache, "progress": False}
    one = pairs[[0]]
    found = mk.activation_patching(model, one, mk.logit_diff(one), **given)
    assert torch.equal(found.values, mk.activation_patching(model, one, mk.logit_diff(one), progress=False).values)
    with pytest.raises(ValueError, match="own pictures"):
        mk.activation_patching(model, others[[0]], mk.logit_diff(others[[0]]), **given)


def test_pairs_of_other_layouts():
    _, model = pair_of_models("llava")
    with_picture = make_prompts("llava", model, [0])
    text = mk.Prompts.from_tokens([torch.full((len(with_picture.tokens[0]),), 5)])
    with pytest.raises(ValueError, match="only the clean one has pictures"):
        mk.PromptPairs.from_tokens(with_picture, text, [(5, 7)])
    moved = with_picture.tokens[0].roll(1)
    other = mk.Prompts.from_inputs(model, [moved], [picture("llava", 1)])
    with pytest.raises(ValueError, match="same positions"):
        mk.PromptPairs.from_tokens(with_picture, other, [(5, 7)])


def test_segments_are_checked():
    for wrong, sentence in (
        ({"kind": "video", "start": 0, "stop": 1}, "kind: expected one of"),
        ({"kind": "image", "start": 2, "stop": 2}, "start < stop"),
        ({"kind": "image", "start": 0, "stop": 4, "grid": (2, 3)}, "4 patches"),
        ({"kind": "image", "start": 0, "stop": 4, "grid": (2, 2), "box": (0.0, 0.0, 0.0, 1.0)}, "left < right"),
    ):
        with pytest.raises((ValueError, TypeError), match=sentence):
            mk.Segment(**wrong)
    segment = mk.Segment("image", 3, 9, (2, 3), None, (0.0, 0.0, 30.0, 20.0))
    assert segment.patch_box(7) == (10.0, 10.0, 20.0, 20.0)
    with pytest.raises(ValueError, match=r"expected 3\.\.8, got 9"):
        segment.patch_box(9)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_installed_or_started(family, monkeypatch):
    """TransformerLens installs torchvision by itself on some ways of loading: here no process is started at all."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a process was started: {args}")

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, refuse)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not there, or broken
    assert mk.HookedModel.from_hf(build_hf(family)).n_layers == 4


def test_the_tower_by_full_names():
    with in_double():
        _, model = pair_of_models("llava")
        tokens, inputs = of_batch(make_prompts("llava", model, [0, 1]))
        name = "vision_encoder.encoder_layers.0.attn.hook_pattern"
        with torch.no_grad():
            logits, cache = model.run_with_cache(tokens, name, inputs=inputs)
            assert cache[name].shape == (2, 3, 10, 10)
            assert torch.allclose(cache[name].sum(-1), torch.ones(2, 3, 10, dtype=torch.float64))
            where = [("vision_encoder.encoder_layers.0.mlp.hook_out", lambda x, hook: x * 0)]
            edited = model.run_with_hooks(tokens, where, inputs=inputs)
        assert float((edited - logits).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("size", [(1000, 30), (30, 1000), (48, 24), (24, 24), (33, 47), (100, 10)])
def test_pictures_of_any_proportions(family, size):
    """As many positions as the model itself has features."""
    hf, model = pair_of_models(family)
    n_views = tiles_of(hf.config, size)
    inputs = {"pixel_values": torch.randn(1, n_views, 3, 24, 24), "image_sizes": torch.tensor([list(size)])}
    with torch.no_grad():
        features = hf.model.get_image_features(inputs["pixel_values"].double(), inputs["image_sizes"]).pooler_output
    n = sum(len(one) for one in features)
    prompts = mk.Prompts.from_inputs(model, [[3, *[IMAGE] * n, 7]], [inputs])
    assert sum(len(s) for s in prompts.segments[0] if s.kind != "text") == n


def test_prompts_go_in_as_they_are():
    with in_double():
        _, model = pair_of_models("llava")
        prompts = make_prompts("llava", model, [0, 1])
        tokens, inputs = of_batch(prompts)
        with torch.no_grad():
            assert torch.equal(model(prompts), model(tokens, inputs=inputs))
            assert torch.equal(
                model.run_with_cache(prompts, ("z", 1))[1]["z", 1],
                model.run_with_cache(tokens, ("z", 1), inputs=inputs)[1]["z", 1],
            )
        assert torch.equal(model.generate(prompts, 3), model.generate(tokens, 3, inputs=inputs))
        with pytest.raises(ValueError, match="expected none beside Prompts"):
            model(prompts, inputs=inputs)


def test_placeholders_alone_end_at_the_last_token():
    _, model = pair_of_models("llava")
    prompts = mk.Prompts.from_inputs(model, [[IMAGE] * 9], [picture("llava", 0)])
    assert prompts.ends.tolist() == [8]
    assert prompts.str_tokens is not None
    assert prompts.str_tokens[0][0] == str(IMAGE)


def test_segments_that_contradict_the_tokens():
    _, model = pair_of_models("llava")
    right = make_prompts("llava", model, [0])
    wrong = [mk.Segment("text", 0, 3), mk.Segment("image", 3, 12, (3, 3))]
    with pytest.raises(ValueError, match="placeholders of the prompt and nowhere else"):
        mk.Prompts.from_inputs(model, right.tokens, [picture("llava", 0)], [wrong])
    with pytest.raises(ValueError, match="segments: expected 1"):
        mk.Prompts.from_inputs(model, right.tokens, [picture("llava", 0)], [])


def test_a_changed_tensor_changes_no_prompts():
    _, model = pair_of_models("llava")
    inputs = picture("llava", 0)
    prompts = mk.Prompts.from_inputs(model, make_prompts("llava", model, [0]).tokens, [inputs])
    before = prompts.hash()
    inputs["pixel_values"].zero_()
    assert prompts.hash() == before
