"""Patches as a dim of results, and attention knockout, against untouched models of transformers."""

from __future__ import annotations

import itertools

import pytest
import torch

import mechkit as mk
from helpers.families import build_hf as build_text
from helpers.tiny import make_pairs as text_pairs
from helpers.tiny import model_of, whole_vocabulary
from helpers.vlm import FAMILIES, Oracle, in_double, make_pairs, make_prompts, mixture, pair_of_models, vision_models

QUIET = {"progress": False}


def patch_positions(prompts: mk.Prompts, i: int) -> list[int]:
    assert prompts.segments is not None
    return [at for segment in prompts.segments[i] if segment.kind == "image" for at in segment.positions]


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_are_their_positions(family):
    with in_double():
        _, model = pair_of_models(family)
        pairs = make_pairs(family, model)
        metric = mixture(pairs)
        by_position = mk.activation_patching(model, pairs, metric, "resid_pre", "layer pos", **QUIET)
        found = mk.image_patching(model, pairs, metric, **QUIET)
        places = patch_positions(pairs.clean, 0)
        assert found.dims == ("layer", "patch", "prompt")
        assert float((found.values - by_position.values[:, places]).abs().max()) <= 1e-12
        assert len(found.provenance["patches"]) == len(places) == len(found.coords["patch"])
        for technique in (mk.attribution_patching, mk.ablation, mk.integrated_gradients):
            one = technique(model, pairs, metric, site="mlp_out", over="layer patch")
            other = technique(model, pairs, metric, site="mlp_out", over="layer pos")
            assert float((one.values - other.values[:, places]).abs().max()) <= 1e-12


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl", "idefics3"])
def test_squares_of_patches(family):
    """All patches of a square at once, in an untouched model."""
    with in_double():
        hf, model = pair_of_models(family)
        oracle, pairs = Oracle(hf), make_pairs(family, model)
        metric = mixture(pairs)
        found = mk.image_patching(model, pairs, metric, group=2, layers=[0, 2], **QUIET)
        labels = [str(label) for label in found.coords["patch"]]
        layouts = mk.image_patching(model, pairs, metric, layers=[0], **QUIET).provenance["patches"]
        squares: dict[tuple, list[int]] = {}
        for place, at in zip(patch_positions(pairs.clean, 0), layouts, strict=True):
            squares.setdefault((at["image"], at["tile"], at["row"] // 2, at["column"] // 2), []).append(place)
        assert len(squares) == len(labels) < len(layouts)
        for i, (row, layer) in itertools.product(range(2), enumerate((0, 2))):
            there = oracle.activations(pairs.clean, i)["resid_pre", layer]
            for j, places in enumerate(squares.values()):

                def edit(x, places=places, there=there):
                    x[:, places] = there[places]
                    return x

                logits = oracle.logits(pairs.corrupted, i, 1, [(oracle.layers[layer], "in", edit)]).logits[:, -1]
                right = metric.read(logits, torch.tensor([i]), None)
                assert abs(float(found.values[row, j, i] - right)) <= 1e-9


def test_labels_and_boxes():
    _, model = pair_of_models("llava")
    pairs = make_pairs("llava", model)
    found = mk.image_patching(model, pairs, mixture(pairs), layers=[0], **QUIET)
    assert found.coords["patch"][:4] == ("r0c0", "r0c1", "r0c2", "r1c0")
    assert found.provenance["patches"][5] == {"image": 0, "tile": None, "row": 1, "column": 2, "box": [16, 8, 24, 16]}
    squares = mk.image_patching(model, pairs, mixture(pairs), layers=[0], group=2, **QUIET)
    assert squares.coords["patch"] == ("r0c0-r1c1", "r0c2-r1c2", "r2c0-r2c1", "r2c2")
    assert squares.provenance["patches"][1]["box"] == [16, 0, 24, 16]


def test_tiles_are_told_apart():
    _, model = pair_of_models("llava_next")
    pairs = make_pairs("llava_next", model)
    found = mk.image_patching(model, pairs, mixture(pairs), layers=[0], **QUIET)
    layout = found.provenance["patches"]
    assert [at for at in layout if at["tile"] is None] == layout[:4]  # the whole picture: 2 x 2
    rows, columns = (len({at[name] for at in layout[4:]}) for name in ("row", "column"))
    assert rows * columns == len(layout) - 4
    assert layout[0]["box"] == [0, 0, 12, 20]  # a picture of 24 x 40 pixels
    assert layout[-1]["box"][2:] == [24, 40]
    assert found.coords["patch"][0] == "whole r0c0"


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_knockout(family, replay):
    """From picture to text, and from text to the end, in windows of layers."""
    with in_double():
        hf, model = pair_of_models(family)
        oracle, pairs = Oracle(hf), make_pairs(family, model, (False, True, False))
        metric = mixture(pairs)
        for from_, to, window in (("image", "text", 2), ("text", "END", 1), (["image", "special"], "END", None)):
            if "special" in from_ and family not in ("llava_next", "llava_onevision"):
                from_ = "image"
            found = mk.attention_knockout(
                model, pairs, metric, from_=from_, to=to, window=window, replay=replay, **QUIET
            )
            if not replay:
                assert found.provenance["replay"] == "full: asked for"
            else:
                assert found.provenance["replay"] == "suffix"
            for i in range(len(pairs)):
                segments, length = pairs.clean.segments[i], len(pairs.clean.tokens[i])
                sources = [at for s in segments if s.kind in from_ for at in s.positions]
                targets = [length - 1] if to == "END" else [at for s in segments if s.kind == to for at in s.positions]
                blocked = torch.zeros(length, length, dtype=torch.bool)
                for source, target in itertools.product(sources, targets):
                    blocked[target, source] = source <= target and (to != "END" or from_ != "text" or True)
                n = model.n_layers
                windows = (
                    [range(n)]
                    if window is None
                    else [range(max(0, at - window // 2), at - window // 2 + window) for at in range(n)]
                )
                for at, layers in enumerate(windows):
                    logits = oracle.knocked_out(pairs.clean, i, [one for one in layers if one < n], blocked)
                    right = float(metric.read(logits, torch.tensor([i]), None))
                    mine = found.values[i] if window is None else found.values[at, i]
                    assert abs(float(mine) - right) <= 1e-9
            assert float((found.values - found.baseline["clean"]).abs().max()) > 1e-3  # the control


def test_knockout_of_words():
    """In a text: the same as an untouched model in which the mask forbids it."""
    with in_double():
        model, hf, pairs = mk.HookedModel.from_hf(build_text("llama")), build_text("llama"), text_pairs()
        hf.set_attn_implementation("eager")
        metric = whole_vocabulary(pairs)
        found = mk.attention_knockout(
            model, pairs, metric, from_=[1, 2], to=["END", 3], window=3, heads=[0, 2], **QUIET
        )
        every = mk.attention_knockout(model, pairs, metric, from_=[1, 2], to=["END", 3], window=3, **QUIET)
        assert float((found.values - every.values).abs().max()) > 1e-4
        for i, tokens in enumerate(pairs.clean.tokens):
            for at in range(model.n_layers):

                def forbid(_, args, kwargs, tokens=tokens):
                    mask = kwargs["attention_mask"].clone()
                    for target, source in itertools.product((3, len(tokens) - 1), (1, 2)):
                        mask[..., target, source] = torch.finfo(mask.dtype).min
                    return args, kwargs | {"attention_mask": mask}

                layers = [one for one in range(at - 1, at + 2) if 0 <= one < model.n_layers]
                handles = [
                    hf.model.layers[one].self_attn.register_forward_pre_hook(forbid, with_kwargs=True) for one in layers
                ]
                logits = hf(tokens[None]).logits[:, -1].detach()
                for handle in handles:
                    handle.remove()
                right = metric.read(logits, torch.tensor([i]), None)
                assert abs(float(every.values[at, i] - right)) <= 1e-9


REFUSALS = {
    "no picture": (
        lambda m, p: mk.image_patching(model_of("llama"), text_pairs(), mk.logit_diff(text_pairs())),
        "have none",
    ),
    "group": (lambda m, p: mk.image_patching(m, p, mk.logit_diff(p), group=0), "group: expected"),
    "over": (lambda m, p: mk.image_patching(m, p, mk.logit_diff(p), over="layer pos"), "over: expected 'patch'"),
    "pos and patch": (
        lambda m, p: mk.activation_patching(m, p, mk.logit_diff(p), "resid_pre", "layer pos patch"),
        "one of 'pos', 'position' and 'patch'",
    ),
    "no such segment": (
        lambda m, p: mk.attention_knockout(m, p, mk.logit_diff(p), from_="audio"),
        "no 'audio' segment",
    ),
    "no such position": (
        lambda m, p: mk.attention_knockout(m, p, mk.logit_diff(p), from_="S9"),
        "expected named positions",
    ),
    "nothing to forbid": (
        lambda m, p: mk.attention_knockout(m, p, mk.logit_diff(p), from_="END", to="image"),
        "of which the second attend to the first",
    ),
    "all forbidden": (
        lambda m, p: mk.attention_knockout(m, p, mk.logit_diff(p), from_=[0], to=[0]),
        "left with nothing",
    ),
    "window": (lambda m, p: mk.attention_knockout(m, p, mk.logit_diff(p), from_="image", window=0), "window: expected"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    call, sentence = REFUSALS[name]
    _, model = pair_of_models("llava")
    with pytest.raises(ValueError, match=sentence):
        call(model, make_pairs("llava", model))


def test_pictures_that_are_cut_otherwise():
    _, model = pair_of_models("qwen2_5_vl")
    pairs = make_pairs("qwen2_5_vl", model, (False, True))
    with pytest.raises(ValueError, match="cut alike; prompt 1 has 12 patches"):
        mk.image_patching(model, pairs, mk.logit_diff(pairs))
    small, large = (make_prompts("qwen2_5_vl", model, [0], [size]) for size in (False, True))
    with pytest.raises(ValueError, match="equal token length"):
        mk.PromptPairs.from_tokens(small, large, [(5, 7)])


@pytest.mark.parametrize(
    ("from_", "to"), [("image", "image"), ([5, 6], [3, 4, "END"]), ("r1c1", ["r0c0", "r0c1"]), ([6], [3])]
)
def test_knockout_where_patches_see_each_other(from_, to):
    """Gemma 3: edges to later patches of a picture are there, and are forbidden too. (Patch r0c0 is position 3.)"""
    with in_double():
        hf, model = pair_of_models("gemma3")
        oracle, pairs = Oracle(hf), make_pairs("gemma3", model, (False, False))
        metric = mixture(pairs)
        found = mk.attention_knockout(model, pairs, metric, from_=from_, to=to, window=None, **QUIET)
        length = len(pairs.clean.tokens[0])
        names = {"END": length - 1, "r0c0": 3, "r0c1": 4, "r1c0": 5, "r1c1": 6}

        def places(given):
            several = [given] if isinstance(given, str) else given
            several = [3, 4, 5, 6] if several == ["image"] else several
            return [names.get(one, one) for one in several]

        blocked = torch.zeros(length, length, dtype=torch.bool)
        for target, source in itertools.product(places(to), places(from_)):
            blocked[target, source] = True
        assert bool(blocked.triu(1).any())
        for i in range(2):
            for mask, equal in ((blocked, True), (blocked.tril(), False)):
                logits = oracle.knocked_out(pairs.clean, i, range(model.n_layers), mask)
                right = float(metric.read(logits, torch.tensor([i]), None))
                assert (abs(float(found.values[i]) - right) <= 1e-9) == equal


def test_knockout_in_a_vision_transformer():
    with in_double():
        _, model = vision_models("vit")
        generator = torch.Generator().manual_seed(1)
        prompts = mk.Prompts.from_inputs(
            model, None, [{"pixel_values": torch.randn(1, 3, 24, 24, generator=generator)} for _ in range(2)]
        )
        pairs = mk.PromptPairs.from_tokens(prompts, prompts, [(1, 2), (3, 4)])
        metric = mk.logit_diff(pairs)
        found = mk.attention_knockout(model, pairs, metric, from_="image", to="END", window=None, **QUIET)

        def to_itself_alone(pattern, hook):
            pattern[:, :, 0, 1:] = 0
            pattern[:, :, 0, 0] = 1
            return pattern

        with torch.no_grad(), model.hooks([("pattern", to_itself_alone)]):
            logits = model.run(prompts)[:, 0]
        right = torch.stack([logits[0, 1] - logits[0, 2], logits[1, 3] - logits[1, 4]])
        assert torch.allclose(found.values, right, atol=1e-9)
