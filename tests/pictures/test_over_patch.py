"""`over` with `"patch"`: the cells of `"pos"` at the patches, whatever the technique; or one sentence that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mechkit as mk
from helpers.tiny import model_of
from helpers.vlm import make_pairs, pair_of_models

QUIET: dict[str, Any] = {"progress": False}
SMALL: dict[str, Any] = {"layers": [0, 2], **QUIET}
# A technique with the dim of positions left open: "pos" in one call, "patch" in the other.
BY_PLACE: dict[str, Callable[[Any, Any, str], Any]] = {
    "activation_patching": lambda m, p, at: mk.activation_patching(m, p, mk.logit_diff, "z", f"{at} layer", **SMALL),
    "ablation": lambda m, p, at: mk.ablation(m, p, mk.logit_diff, "z", f"layer {at}", mode="zero", **SMALL),
    "ablation, plain": lambda m, p, at: mk.ablation(
        m, p.clean, mk.logit_diff(p), "resid_pre", f"layer {at}", mode="mean", reference=p.corrupted, **SMALL
    ),
    "attribution_patching": lambda m, p, at: mk.attribution_patching(
        m, p, mk.logit_diff, "z", f"layer {at} head", **SMALL
    ),
    "integrated_gradients": lambda m, p, at: mk.integrated_gradients(
        m, p, mk.logit_diff, "resid_pre", f"layer {at}", steps=2, **SMALL
    ),
    "atp_star": lambda m, p, at: mk.atp_star(m, p, mk.logit_diff, "z", f"layer head {at}", **SMALL),
    "relp": lambda m, p, at: mk.relp(m, p, mk.logit_diff, "mlp_out", f"layer {at}", **SMALL),
    "neuron_attribution": lambda m, p, at: mk.neuron_attribution(
        m, p, mk.logit_diff, site="mlp_out", over=f"layer {at}", steps=2, **SMALL
    ),
    "logit_lens": lambda m, p, at: mk.logit_lens(m, p, over=f"layer {at}", **SMALL),
    "logit_lens, plain": lambda m, p, at: mk.logit_lens(m, p.clean, value="entropy", over=f"layer {at}", **SMALL),
    "top_tokens": lambda m, p, at: mk.top_tokens(m, p.clean, over=f"layer {at}", k=2, **SMALL).probs,
    "direct_logit_attribution": lambda m, p, at: mk.direct_logit_attribution(
        m, p, mk.logit_diff, f"layer head {at if at == 'patch' else 'src'}", **SMALL
    ),
    "path_patching": lambda m, p, at: mk.path_patching(
        m, p, mk.logit_diff, senders=f"layer head {at}", receivers=["m3"], **QUIET
    ),
}


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("name", BY_PLACE)
def test_patches_are_the_positions_of_the_picture(name, family):
    _, model = pair_of_models(family)
    pairs = make_pairs(family, model, (False, False))
    of_patches, of_positions = (BY_PLACE[name](model, pairs, at) for at in ("patch", "pos"))
    where = [at for s in pairs.clean.segments[0] if s.kind == "image" for at in s.positions]
    dim = "src" if "src" in of_positions.dims else "pos"
    assert of_patches.dims == tuple("patch" if one == dim else one for one in of_positions.dims)
    chosen = of_positions.sel(**{dim: [of_positions.coords[dim][at] for at in where]}).values
    assert torch.equal(of_patches.values.isnan(), chosen.isnan())
    assert float((of_patches.values - chosen).nan_to_num().abs().max()) <= 1e-12
    assert float(chosen.nan_to_num().abs().max()) > 1e-6  # the control: there is something to be equal to
    layout = of_patches.provenance["patches"]
    assert len(layout) == len(of_patches.coords["patch"]) == len(where)
    assert all(
        label.endswith(f"r{at['row']}c{at['column']}")
        for label, at in zip(of_patches.coords["patch"], layout, strict=True)
    )
    assert "patch" in of_patches.provenance["senders" if name == "path_patching" else "over"]
    assert of_patches.pictures is not None
    assert of_patches.plot().data


def test_some_patches():
    _, model = pair_of_models("llava")
    pairs = make_pairs("llava", model)
    some = mk.logit_lens(model, pairs, over="layer patch", positions=["r1c2", "r0c0"], **SMALL)
    every = mk.logit_lens(model, pairs, over="layer patch", **SMALL)
    assert some.coords["patch"] == ("r1c2", "r0c0")
    assert torch.equal(some.values, every.sel(patch=["r1c2", "r0c0"]).values)
    assert some.provenance["patches"][0]["box"] == [16, 8, 24, 16]


def test_estimates_at_patches_are_verified():
    _, model = pair_of_models("llava")
    pairs = make_pairs("llava", model)
    what: dict[str, Any] = {"site": "z", "over": "patch layer", **SMALL}
    approx = mk.attribution_patching(model, pairs, mk.logit_diff, **what)
    exact = mk.activation_patching(model, pairs, mk.logit_diff, **what)
    found = mk.verify(approx, model, pairs, mk.logit_diff, top=3, **QUIET)
    for cell in approx.top(3):
        mine, right = (one.sel(**cell.coords).values for one in (found, exact))
        assert torch.allclose(mine, right, atol=1e-12)
    assert found.provenance["verified"] == [cell.label for cell in approx.top(3)]
    assert mk.compare(approx, exact).n_cells == 18


def text() -> mk.PromptPairs:
    return mk.PromptPairs.from_tokens([[3, 4, 5, 6]], [[3, 7, 5, 6]], [(5, 7)])


REFUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "text": (
        lambda m, p: mk.logit_lens(model_of("llama"), text(), over="layer patch"),
        "over: 'patch' needs prompts with",
    ),
    "plain text": (
        lambda m, p: mk.ablation(model_of("llama"), text().clean, mk.logit_diff(text()), "z", "layer patch"),
        "over: 'patch' needs prompts with pictures",
    ),
    "a string": (lambda m, p: mk.logit_lens(m, "a", over="layer patch"), "over: 'patch' needs prompts with pictures"),
    "senders": (
        lambda m, p: mk.path_patching(model_of("llama"), text(), mk.logit_diff, senders="layer head patch"),
        "senders: 'patch' needs prompts with pictures",
    ),
    "senders' order": (
        lambda m, p: mk.path_patching(m, p, mk.logit_diff, senders="patch layer head"),
        "senders: expected .*; got 'patch layer head'",
    ),
    "direct": (
        lambda m, p: mk.direct_logit_attribution(m, p, mk.logit_diff, "layer patch"),
        "over: expected one of .*'layer head patch'.*; got 'layer patch'",
    ),
    "two kinds of place": (
        lambda m, p: mk.direct_logit_attribution(m, p, mk.logit_diff, "layer head src patch"),
        "over: expected one of 'pos', 'position' and 'patch'",
    ),
    "no layer": (lambda m, p: mk.relp(m, p, mk.logit_diff, "z", "patch"), "over: .*expected 'layer' .* got 'patch'"),
    "another dim": (
        lambda m, p: mk.activation_patching(m, p, mk.logit_diff, "z", "layer patch tile"),
        "over: expected dims among .*'tile' in 'layer patch tile'",
    ),
    "no such patch": (
        lambda m, p: mk.logit_lens(m, p, over="layer patch", positions=["r7c7"]),
        "positions: expected names among r0c0, .*got 'r7c7'",
    ),
    "a tower's site": (
        lambda m, p: mk.activation_patching(m, p, mk.logit_diff, "vision.z", "layer patch"),
        "over: .*the language model's patches are not its own",
    ),
    "rollout": (lambda m, p: mk.attention_rollout(m, p, over="patch"), "over: expected 'pos' or 'layer pos'.*'patch'"),
    "flow": (lambda m, p: mk.attention_flow(m, p, over="layer patch"), "over: expected 'pos' or 'layer pos'"),
    "relevance": (lambda m, p: mk.attention_relevance(m, p, mk.logit_diff, over="patch"), "over: expected 'pos' or"),
    "mask": (lambda m, p: mk.learn_mask(m, p, mk.logit_diff, over="patch"), "over: expected 'edge' or 'node'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name):
    call, sentence = REFUSED[name]
    _, model = pair_of_models("llava")
    with pytest.raises((ValueError, TypeError), match=f"(?s)^{sentence}"):
        call(model, make_pairs("llava", model))


def test_pictures_that_are_cut_otherwise_are_refused_by_every_technique():
    _, model = pair_of_models("qwen2_5_vl")
    pairs = make_pairs("qwen2_5_vl", model, (False, True))
    for call in BY_PLACE.values():
        with pytest.raises(ValueError, match=r"^(over|senders): 'patch' needs pictures that are cut alike"):
            call(model, pairs, "patch")
