"""Patching between prompts of unequal length at aligned positions, and between two models: against whole passes with hooks."""

from __future__ import annotations

import pytest
import torch

import mechkit as mk
from helpers.families import D_VOCAB, FAMILIES, build_hf
from helpers.reference import activations
from helpers.tiny import make_pairs, model_of

LENGTHS = ((7, 5), (4, 7), (6, 6), (7, 7))  # clean, corrupted
SUBJECT = ([2, 1, 3, -2], [1, 4, 2, -3])


def unequal_pairs() -> mk.PromptPairs:
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = (
        [torch.randint(3, D_VOCAB, (pair[side],), generator=generator) for pair in LENGTHS] for side in (0, 1)
    )
    return mk.PromptPairs.from_tokens(
        clean, corrupted, [(5, 7)] * 4, positions={"subject": SUBJECT[0]}, align={"subject": SUBJECT[1]}
    )


def naive(model, source_model, base, source, cells):
    """Logits `[cell d_vocab]` at the last position of the base prompt's whole pass, each row with one value from the source's: at
    a hook `(name, position in the base prompt, position in the source prompt, head or None)`."""
    values = activations(source_model.bridge, source[None])

    def writing(name):
        def write(x, hook):
            x = x.clone()
            for row, (place, here, there, head) in enumerate(cells):
                if place == name:
                    which = () if head is None else (head,)
                    x[row, here, *which] = values[name][0, there, *which]
            return x

        return name, write

    hooks = [writing(name) for name in dict.fromkeys(cell[0] for cell in cells)]
    with torch.no_grad():
        return model.bridge.run_with_hooks(base.expand(len(cells), -1), fwd_hooks=hooks)[:, -1]


def difference(logits):
    return float((logits[5] - logits[7]).detach())


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_aligned_positions_in_every_family(family, direction):
    model, pairs = model_of(family), unequal_pairs()
    tolerance = {"mixtral": 1e-4, "gptj": 1e-5, "gpt_neo": 1e-5}.get(family, 1e-10)
    site, over = ("z", "layer position head") if direction == "denoise" else ("resid_post", "layer position")
    found = mk.activation_patching(
        model, pairs, mk.logit_diff, site=site, over=over, direction=direction, layers=[0, 2], progress=False
    )
    assert found.provenance["replay"] == "suffix"
    assert found.coords["position"] == ("subject", "END")
    base, source = (pairs.corrupted, pairs.clean) if direction == "denoise" else (pairs.clean, pairs.corrupted)
    here, there = (SUBJECT[1], SUBJECT[0]) if direction == "denoise" else SUBJECT
    for i in range(4):
        with torch.no_grad():
            for prompts, run in ((pairs.clean, "clean"), (pairs.corrupted, "corrupted")):
                own = difference(model.bridge(prompts.tokens[i][None])[0, -1])
                assert abs(float(found.baseline[run][i]) - own) <= max(tolerance, 1e-9)
        cells, places = [], []
        for layer in (0, 2):
            name = f"blocks.{layer}.attn.hook_z" if site == "z" else f"blocks.{layer}.hook_resid_post"
            for at, pair in (("subject", (here[i], there[i])), ("END", (-1, -1))):
                for head in range(model.n_heads) if site == "z" else [None]:
                    cells.append((name, *pair, head))
                    places.append({"layer": layer, "position": at} | ({} if head is None else {"head": head}))
        patched = naive(model, model, base.tokens[i], source.tokens[i], cells)
        for where, logits in zip(places, patched, strict=True):
            got = float(found.sel(**where, prompt=i))
            assert abs(got - difference(logits)) <= tolerance * max(1, abs(got)), (where, i)
    assert float((found.values - found.baseline[found.base]).abs().max()) > 1e-3


def test_sets_of_aligned_positions_and_the_slow_way():
    model, pairs = model_of("llama"), unequal_pairs()
    options = {"site": "resid_mid", "over": "layer position", "cells": {"both": [(1, "subject"), (1, "END")]}}
    found = mk.activation_patching(model, pairs, mk.log_prob, **options, progress=False)
    slow = mk.activation_patching(model, pairs, mk.log_prob, **options, progress=False, replay=False)
    assert slow.provenance["replay"].startswith("full")
    assert torch.allclose(found.values, slow.values, atol=1e-10)
    some = mk.activation_patching(model, pairs[[3, 1]], mk.log_prob, **options, progress=False)
    assert torch.allclose(some.values, found.values[:, [3, 1]], atol=1e-10)


def test_aligned_pairs_of_equal_length_are_plain_pairs():
    """What presumes that the source run equals the base run before the tokens differ, and what does not, agree."""
    model, plain = model_of("gpt2"), make_pairs()
    positions = {"first": torch.tensor([0, 1, 0])}
    both = [
        mk.PromptPairs(plain.clean, plain.corrupted, plain.right, plain.wrong, positions, align=align)
        for align in (None, positions)
    ]
    found = [
        mk.activation_patching(model, pairs, mk.logit_diff, site="resid_post", over="layer position", progress=False)
        for pairs in both
    ]
    assert torch.allclose(found[0].values, found[1].values, atol=1e-10)
    for run in ("clean", "corrupted"):
        assert torch.allclose(found[0].baseline[run], found[1].baseline[run], atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_one_model_into_another(family):
    """A base model and its fine-tune: everywhere, and before the two prompts differ too, since the models differ."""
    tolerance = {"mixtral": 1e-4, "gptj": 1e-5, "gpt_neo": 1e-5}.get(family, 1e-10)
    dtype = torch.float32 if family == "mixtral" else torch.float64
    model, tuned = model_of(family), mk.HookedModel.from_hf(build_hf(family, dtype, seed=1), name="tuned")
    pairs = make_pairs()
    found = mk.activation_patching(
        model, pairs, mk.logit_diff, site="z", over="layer pos head", layers=[1], source_model=tuned, progress=False
    )
    assert found.provenance["replay"] == "suffix"
    assert found.provenance["source_model"] == "tuned"
    assert found.provenance["source_weights_hash"] == tuned.weights_hash != found.provenance["weights_hash"]
    for i, (clean, corrupted) in enumerate(zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)):
        with torch.no_grad():
            own = difference(tuned.bridge(clean[None])[0, -1])
        assert abs(float(found.baseline["clean"][i]) - own) <= max(tolerance, 1e-9)
        cells = [
            ("blocks.1.attn.hook_z", pos, pos, head) for pos in range(len(clean)) for head in (0, model.n_heads - 1)
        ]
        for (_, pos, _, head), logits in zip(cells, naive(model, tuned, corrupted, clean, cells), strict=True):
            got = float(found.sel(layer=1, head=head, prompt=i).values[pos])
            assert abs(got - difference(logits)) <= tolerance * max(1, abs(got)), (i, pos, head)
    before = found.values[0, 0].nan_to_num() - found.baseline["corrupted"]
    assert float(before.abs().max()) > 1e-3  # position 0, where the tokens are the same


def test_the_same_prompts_in_two_models():
    model, tuned = model_of("llama"), mk.HookedModel.from_hf(build_hf("llama", torch.float64, seed=1), name="tuned")
    plain = make_pairs()
    pairs = mk.PromptPairs(plain.clean, plain.clean, plain.right, plain.wrong)
    found = mk.activation_patching(
        model, pairs, mk.logit_diff, site="resid_post", over="layer", source_model=tuned, progress=False
    )
    last = found.sel(layer=model.n_layers - 1)
    expected = [
        difference(model.unembed(activations(tuned.bridge, row[None])["blocks.3.hook_resid_post"][0, -1]))
        for row in plain.clean.tokens
    ]
    assert torch.allclose(last.values, torch.tensor(expected, dtype=torch.float64), atol=1e-9)
    alone = mk.activation_patching(model, pairs, mk.logit_diff, site="z", over="layer head", progress=False)
    with_itself = mk.activation_patching(
        model, pairs, mk.logit_diff, site="z", over="layer head", source_model=model, progress=False
    )
    assert torch.allclose(alone.values, with_itself.values, atol=1e-10)


def test_refusals():
    model, pairs, plain = model_of("llama"), unequal_pairs(), make_pairs()
    metric = mk.logit_diff(pairs)
    with pytest.raises(ValueError, match="'position' among the dims"):
        mk.activation_patching(model, pairs, metric, site="z", over="layer head", progress=False)
    with pytest.raises(ValueError, match="has one value for each source position"):
        mk.activation_patching(model, pairs, metric, site="pattern", over="layer position", progress=False)
    with pytest.raises(ValueError, match="compares with the clean run"):
        mk.activation_patching(model, pairs, mk.kl_divergence, site="resid_mid", over="layer position", progress=False)
    with pytest.raises(ValueError, match="reads a named position"):
        mk.activation_patching(model, pairs, mk.loss, site="resid_mid", over="layer position", progress=False)
    with pytest.raises(ValueError, match="positions: expected names among subject, END"):
        mk.activation_patching(
            model, pairs, metric, site="resid_mid", over="layer position", positions=["S"], progress=False
        )
    for technique in (mk.attribution_patching, mk.edge_attribution, mk.edge_patching, mk.path_patching):
        more = {"edges": ["input->logits"]} if technique is mk.edge_patching else {}
        with pytest.raises(ValueError, match="two prompts of equal length in each pair"):
            technique(model, pairs, metric, **more, progress=False)
    circuit = mk.Circuit.from_edges(model, ["input->logits"])
    with pytest.raises(ValueError, match="two prompts of equal length in each pair"):
        mk.evaluate_circuit(circuit, model, pairs, metric, progress=False)
    with pytest.raises(ValueError, match="two prompts of equal length in each pair"):
        _ = pairs.first_difference
    with pytest.raises(ValueError, match=r"pass align= with"):
        mk.PromptPairs(pairs.clean, pairs.corrupted, pairs.right, pairs.wrong)
    with pytest.raises(ValueError, match="align: expected names among"):
        mk.PromptPairs(plain.clean, plain.corrupted, plain.right, plain.wrong, align={"S": torch.tensor([0, 0, 0])})
    with pytest.raises(ValueError, match=r"align\['subject'\]\[0\]: expected an index into 5 tokens, got 6"):
        mk.PromptPairs.from_tokens(
            pairs.clean, pairs.corrupted, [(5, 7)] * 4, positions={"subject": [0] * 4}, align={"subject": [6, 0, 0, 0]}
        )
    other = mk.PromptPairs.from_tokens(pairs.clean, pairs.corrupted, [(5, 7)] * 4, positions={"S": [0] * 4}, align={})
    with pytest.raises(ValueError, match="position: expected one that is aligned"):
        mk.logit_diff(other, position="S")
    small = model_of("gpt2")
    with pytest.raises(ValueError, match="source_model: expected"):
        mk.activation_patching(
            model_of("llama_mqa"), plain, mk.logit_diff, site="k", source_model=model, progress=False
        )
    cache = model.run_with_cache(torch.stack(make_pairs(((7, 2),)).clean.tokens), "z")[1]
    with pytest.raises(ValueError, match="source_cache: expected none"):
        mk.activation_patching(
            small, make_pairs(((7, 2),)), mk.logit_diff, source_cache=cache, source_model=small, progress=False
        )
