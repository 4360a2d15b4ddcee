"""What makes a model another model: its fingerprint, and what is refused because of it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mechkit as mk
from helpers.families import FAMILIES, build_hf

TOKENS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(3))
PAIRS = mk.PromptPairs.from_tokens([[3, 5, 7, 11]], [[3, 5, 9, 11]], [(5, 9)])


def build(family: str, **changes) -> mk.HookedModel:
    """A model of the same weights whatever the changes to its configuration."""
    kind, arguments = FAMILIES[family]
    hf = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **(arguments | changes)), attn_implementation="eager"
    )
    torch.manual_seed(0)
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.35) if p.ndim > 1 else None
    return mk.HookedModel.from_hf(hf.double().eval())


CHANGES = [
    ("llama", {"rms_norm_eps": 0.5}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    ("mistral", {"sliding_window": 3}),
    ("gemma2", {"query_pre_attn_scalar": 64}),
    ("gemma2", {"attn_logit_softcapping": 0.5}),
    ("gemma2", {"final_logit_softcapping": 2.0}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"activation_function": "relu"}),
    ("gpt2", {"layer_norm_epsilon": 0.5}),
    ("gpt_neo", {"window_size": 2}),
    ("gpt_neox", {"use_parallel_residual": False}),
]


@pytest.mark.parametrize(("family", "changes"), CHANGES, ids=[f"{f}-{next(iter(c))}" for f, c in CHANGES])
@torch.no_grad()
def test_a_setting_that_changes_numbers_changes_the_fingerprint(family, changes):
    one, other = build(family), build(family, **changes)
    for p, q in zip(one.bridge.original_model.parameters(), other.bridge.original_model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert float((one(TOKENS) - other(TOKENS)).abs().max()) > 1e-3
    assert one.weights_hash != other.weights_hash


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "falcon"])
def test_what_changes_no_number_does_not(family, tmp_path):
    hf = build_hf(family, torch.float32)
    hf.save_pretrained(tmp_path)
    model = mk.HookedModel.from_hf(hf)
    fingerprint = model.weights_hash
    for length in (1, 40, 9):
        model(torch.arange(3, 3 + length)[None])
    with model.hooks([("z", lambda z, hook: None), ("pattern", lambda x, hook: None)]):
        assert model.weights_hash == fingerprint
    hf.config.use_cache, hf.config.pad_token_id = False, 5
    assert model.weights_hash == fingerprint
    assert copy.deepcopy(model).weights_hash == fingerprint
    back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="sdpa").eval()
    assert mk.HookedModel.from_hf(back).weights_hash == fingerprint


def _epsilon(model):
    model.bridge.original_model.model.layers[1].input_layernorm.original_component.variance_epsilon = 0.5


def _frequencies(model):
    model.bridge.original_model.model.rotary_emb.original_component.inv_freq.mul_(0.5)


def _scaling(model):
    model.bridge.blocks[1].attn.original_component.scaling *= 0.5


def _config(model):
    model.bridge.original_model.config.sliding_window = 2


@pytest.mark.parametrize("change", [_epsilon, _frequencies, _scaling, _config])
@torch.no_grad()
def test_a_change_in_place_is_noticed(change):
    model = build("mistral")
    before, logits = model.weights_hash, model(TOKENS)
    change(model)
    assert float((model(TOKENS) - logits).abs().max()) > 1e-3
    assert model.weights_hash != before


def test_every_bit_of_every_weight_counts():
    model = build("llama")
    weight = model.bridge.original_model.model.layers[1].mlp.down_proj.weight
    before = model.weights_hash
    with torch.no_grad():
        weight[3, 5] += 1e-15
    changed = model.weights_hash
    assert changed != before
    with torch.no_grad():
        weight[[3, 4]] = weight[[4, 3]]
    swapped = model.weights_hash
    assert swapped not in (before, changed)
    with torch.no_grad():  # within rows, where nothing is sampled
        weight[:, [5, 7]] = weight[:, [7, 5]]
    assert model.weights_hash not in (before, changed, swapped)


@torch.no_grad()
def test_where_a_number_stands_counts():
    """One entry of a matrix that is zero elsewhere, and two that change places in all the ways that keep a sum."""
    model, seen = build("llama"), set()
    weight = model.bridge.original_model.model.layers[1].mlp.down_proj.weight
    alone = [[(0, 0)], [(3, 5)], [(3, 6)], [(4, 5)], [(7, 1)], [(9, 11)], [(5, 3)]]
    two = [[(3, 6), (7, 2)], [(3, 2), (7, 6)], [(3, 1), (7, 7)], [(7, 1), (3, 7)], [(4, 6), (6, 2)], [(2, 6), (8, 2)]]
    for places in (*alone, *two):
        weight.zero_()
        for place in places:
            weight[place] = 1
        seen.add(model.weights_hash)
    assert len(seen) == len(alone) + len(two)


def test_the_dtype_belongs_to_the_model():
    assert mk.HookedModel.from_hf(build_hf("llama")).weights_hash != (
        mk.HookedModel.from_hf(build_hf("llama", torch.float32)).weights_hash
    )


def test_what_was_made_with_another_model_is_refused():
    one, other = build("mistral"), build("mistral", rms_norm_eps=0.5)
    metric = mk.logit_diff(PAIRS)
    cache = one.run_with_cache(torch.stack(list(PAIRS.clean.tokens)), ["z"])[1]
    circuit = mk.Circuit.from_scores(mk.edge_attribution(one, PAIRS, metric, steps=1), n_edges=20)
    lens = mk.TunedLens.fit(one, mk.Prompts.from_tokens(TOKENS), steps=1, progress=False)
    exact = mk.activation_patching(one, PAIRS, metric, source_cache=cache, progress=False)
    approximate = mk.attribution_patching(one, PAIRS, metric, site="z", over="layer head")
    mk.evaluate_circuit(circuit, build("mistral"), PAIRS, metric, progress=False)
    with pytest.raises(ValueError, match="source_cache"):
        mk.activation_patching(other, PAIRS, metric, source_cache=cache, progress=False)
    with pytest.raises(ValueError, match="circuit"):
        mk.evaluate_circuit(circuit, other, PAIRS, metric, progress=False)
    with pytest.raises(ValueError, match="weights"):
        mk.logit_lens(other, PAIRS.clean, tokens=[5], lens=lens)
    with pytest.raises(ValueError, match="weights_hash"):
        mk.verify(approximate, other, PAIRS, metric)
    there = mk.activation_patching(other, PAIRS, metric, progress=False)
    assert exact.provenance["weights_hash"] != there.provenance["weights_hash"]
