"""Rotary embeddings that keep a state between forward passes: a prompt's values do not depend on what was run before it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mechkit as mk
from helpers.families import GQA
from helpers.tiny import make_pairs, whole_vocabulary

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 6,
    "factor": 2.0,
}
KINDS = {
    "dynamic": ("llama", GQA | {"max_position_embeddings": 6, "rope_parameters": DYNAMIC}),
    "longrope": ("llama", GQA | {"max_position_embeddings": 12, "rope_parameters": LONG}),
}


def fresh(kind: str):
    model_type, arguments = KINDS[kind]
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **arguments), attn_implementation="eager")
    for parameter in hf.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.35)
    return hf.double().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_comes_out_as_in_a_fresh_model(kind):
    pairs = make_pairs(((7, 2), (10, 4), (5, 1)))
    model = mk.HookedModel.from_hf(fresh(kind))
    with torch.no_grad():
        for i in (1, 0, 2, 0, 1):
            tokens = pairs.clean.tokens[i][None]
            assert torch.allclose(model(tokens), fresh(kind)(tokens).logits, atol=1e-6)
        # Control: without it, Hugging Face's own model depends on what it has seen.
        hf = fresh(kind)
        hf(pairs.clean.tokens[1][None])
        seen = hf(pairs.clean.tokens[0][None]).logits
        apart = float((seen - fresh(kind)(pairs.clean.tokens[0][None]).logits).abs().max())
    assert (apart > 1e-2) == (kind == "dynamic")


@pytest.mark.parametrize("kind", KINDS)
def test_sweeps_do_not_depend_on_the_set_nor_on_what_was_run_before(kind):
    pairs = make_pairs(((7, 2), (10, 4), (5, 1)))
    model = mk.HookedModel.from_hf(fresh(kind))
    before = model.weights_hash

    def swept(some: mk.PromptPairs) -> mk.Result:
        return mk.activation_patching(
            model, some, whole_vocabulary(some), site="resid_pre", over="layer pos", progress=False
        )

    together, shuffled = swept(pairs), swept(pairs[[1, 2, 0]])
    assert torch.allclose(together.values[..., [1, 2, 0]], shuffled.values, atol=1e-10, rtol=0, equal_nan=True)
    for i, length in enumerate((7, 10, 5)):
        alone = swept(pairs[[i]])
        assert torch.allclose(together.values[:, :length, i], alone.values[..., 0], atol=1e-10, rtol=0)
        assert torch.allclose(together.baseline["clean"][i], alone.baseline["clean"][0], atol=1e-10, rtol=0)
    assert model.weights_hash == before
    assert not model.has_hooks
