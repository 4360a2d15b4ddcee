"""Hidden states against run_with_cache, bit for bit, and against each prompt alone."""

from __future__ import annotations

import pytest
import torch

import mechkit as mk
from helpers.tiny import make_model, make_pairs, model_of
from mechkit.attribution.hidden_states import hidden_states

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("site", SITES)
def test_equal_to_the_cache_bit_for_bit(family: str, site: str) -> None:
    model, pairs = model_of(family), make_pairs()
    found = hidden_states(model, pairs, site=site, progress=False)
    assert found.dims == ("layer", "d_model", "prompt")
    assert found.shape == (model.n_layers, model.d_model, 3)
    for ids in pairs.clean.by_length().values():
        tokens = torch.stack([pairs.clean.tokens[i] for i in ids])
        _, cache = model.run_with_cache(tokens, [site])
        for layer in range(model.n_layers):
            assert torch.equal(found.values[layer][:, ids].T, cache[site, layer][:, -1])
    assert not torch.equal(found.values[0], found.values[1])  # control


def test_each_prompt_alone() -> None:
    """Prompts of other lengths in the batch change nothing; the corrupted prompts do."""
    model, pairs = make_model("llama"), make_pairs()
    found = hidden_states(model, pairs.clean, progress=False)
    for i, tokens in enumerate(pairs.clean.tokens):
        _, cache = model.run_with_cache(tokens[None], ["resid_post"])
        assert torch.allclose(found.values[:, :, i], cache["resid_post"][:, 0, -1], atol=1e-12)
    other = hidden_states(model, pairs.corrupted, progress=False)
    assert float((other.values - found.values).abs().max()) > 1e-2


@pytest.mark.parametrize("position", [0, 2, -1, -3, "S"])
def test_positions_and_layers(position: int | str) -> None:
    model = make_model("gpt2")
    named = {"S": torch.tensor([3, 1, 2])}
    made = make_pairs()
    pairs = mk.PromptPairs(made.clean, made.corrupted, made.right, made.wrong, named)
    found = hidden_states(model, pairs, layers=[3, 1], position=position, progress=False)
    assert found.coords["layer"] == (3, 1)
    assert found.provenance["position"] == position
    for i, tokens in enumerate(pairs.clean.tokens):
        at = int(named["S"][i]) if position == "S" else position
        _, cache = model.run_with_cache(tokens[None], ["resid_post"])
        for row, layer in enumerate((3, 1)):
            assert torch.allclose(found.values[row, :, i], cache["resid_post", layer][0, at], atol=1e-12)


def test_small_batches_and_half_precision() -> None:
    model, pairs = make_model("llama"), make_pairs()
    whole = hidden_states(model, pairs, progress=False)
    assert torch.allclose(hidden_states(model, pairs, budget=1, progress=False).values, whole.values, atol=1e-12)
    half = make_model("llama", torch.bfloat16)
    found = hidden_states(half, pairs, progress=False)
    _, cache = half.run_with_cache(pairs.clean.tokens[2][None], ["resid_post"])
    assert found.values.dtype == torch.float32
    assert torch.equal(found.values[:, :, 2], cache["resid_post"][:, 0, -1].float())


def test_full_hook_name_is_its_layer() -> None:
    model, pairs = make_model("gpt2"), make_pairs()
    found = hidden_states(model, pairs, site="blocks.2.hook_resid_pre", progress=False)
    assert found.coords["layer"] == (2,)
    assert found.metric == "resid_pre"
    same = hidden_states(model, pairs, site="resid_pre", layers=[-2], progress=False)
    assert torch.equal(found.values, same.values)
    with pytest.raises(ValueError, match="in layer 2"):
        hidden_states(model, pairs, site="blocks.2.hook_resid_pre", layers=[1])


def test_provenance_and_nothing_left_behind() -> None:
    model, pairs = make_model("gpt2"), make_pairs()
    found = hidden_states(model, pairs, progress=False)
    origin = found.provenance
    assert (origin["technique"], origin["site"], origin["position"]) == ("hidden_states", "resid_post", -1)
    assert (origin["n_prompts"], origin["weights_hash"]) == (3, model.weights_hash)
    assert origin["tokens_hash"] == pairs.clean.hash()
    assert (found.unit, dict(found.baseline)) == ("activation", {})
    assert found.cost is not None
    assert found.cost.block_tokens == 19 * model.n_layers
    assert not model.has_hooks
    assert not found.values.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "z"}, "site: expected one of resid_pre"),
        ({"site": "embed"}, "site: expected one of resid_pre"),
        ({"site": "nonsense"}, "site: expected one of"),
        ({"layers": [9]}, "layers"),
        ({"layers": []}, "at least one"),
        ({"position": 5}, "prompt 2 has 5 tokens, got 5"),
        ({"position": -6}, "prompt 2 has 5 tokens, got -6"),
        ({"position": "S2"}, "expected an index or one of END, got 'S2'"),
        ({"position": 1.5}, "expected"),
    ],
)
def test_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hidden_states(make_model("gpt2"), make_pairs(), **options)


def test_refuses_other_prompts_and_broken_models() -> None:
    model, pairs = make_model("gpt2"), make_pairs()
    with pytest.raises(ValueError, match=r"prompts\[0\]: expected a string, got list"):
        hidden_states(model, [[1, 2, 3]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="evaluation mode"):
        hidden_states(make_model("gpt2").train(), pairs)
    broken = make_model("gpt2")
    broken.bridge.blocks[1].mlp.original_component.c_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or inf in blocks.1.hook_resid_post of prompts \[0, 1\]"):
        hidden_states(broken, pairs, progress=False)
