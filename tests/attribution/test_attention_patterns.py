"""Attention patterns against `run_with_cache`, a softmax of the scores, and the masks that each architecture should have."""

from __future__ import annotations

import pytest
import torch

import mechkit as mk
from helpers.families import D_VOCAB, FAMILIES, build_hf
from helpers.tiny import model_of
from mechkit.attribution.attention_patterns import attention_patterns
from mechkit.prompts import PromptPairs, Prompts

WINDOW = 4  # of the families below, in the layers given
SLIDING = {"mistral": (0, 1, 2, 3), "gemma2": (0, 2), "gemma3": (0, 2), "gpt_neo": (1, 3)}


@pytest.fixture(scope="module")
def gpt2_tiny() -> mk.HookedModel:
    return model_of("gpt2")


def ragged() -> Prompts:
    generator = torch.Generator().manual_seed(0)
    return Prompts.from_tokens([torch.randint(3, D_VOCAB, (n,), generator=generator) for n in (7, 5, 7, 1)])


def labelled(*rows: str) -> Prompts:
    """Words as tokens; equal words have equal ids."""
    words = sorted({word for row in rows for word in row.split("|")})
    ids = tuple(torch.tensor([3 + words.index(word) for word in row.split("|")]) for row in rows)
    return Prompts(ids, tuple(tuple(row.split("|")) for row in rows))


def visible(family: str, layer: int, length: int) -> torch.Tensor:
    """`[dest src]`: what a causal mask, and a window where the layer has one, leave."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < (WINDOW if layer in SLIDING.get(family, ()) else length))


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_cache_bit_for_bit_and_to_a_softmax_of_the_scores(family):
    model, prompts = model_of(family), ragged()
    result = attention_patterns(model, prompts, progress=False)
    scores = attention_patterns(model, prompts, scores=True, progress=False)
    assert result.dims == ("layer", "head", "dest", "src", "prompt")
    assert result.shape == scores.shape == (4, 4, 7, 7, 4)
    assert (result.unit, scores.unit) == ("attention", "logits")
    for length, ids in prompts.by_length().items():
        with torch.no_grad():
            batch = torch.stack([prompts.tokens[i] for i in ids])
            _, cache = model.run_with_cache(batch, ["pattern", "attn_scores"])
        for layer in range(4):
            seen = visible(family, layer, length)
            found = result.values[layer, :, :length, :length, ids].permute(3, 0, 1, 2)
            assert torch.equal(found.isnan(), ~seen.expand_as(found))
            assert torch.equal(found[:, :, seen], cache["pattern", layer][:, :, seen].to(found.dtype))
            assert not cache["pattern", layer][:, :, ~seen].any()  # what is left out was 0 in the model
            raw = scores.values[layer, :, :length, :length, ids].permute(3, 0, 1, 2)
            assert torch.equal(raw.isnan(), found.isnan())
            assert torch.equal(raw[:, :, seen], cache["attn_scores", layer][:, :, seen])
            naive = raw.double().nan_to_num(-torch.inf)
            naive = (naive - naive.amax(-1, keepdim=True)).exp()
            naive = naive / naive.sum(-1, keepdim=True)
            assert torch.allclose(
                found.double().nan_to_num(), naive, atol=1e-6, rtol=0
            )  # some take their softmax in float32
        assert bool(result.values[:, :, length:, :, ids].isnan().all())
        assert bool(result.values[:, :, :, length:, ids].isnan().all())
    assert float(result.values.nan_to_num().std()) > 0.1  # control: the patterns are not flat


def test_an_encoder_hides_nothing():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=D_VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    config._attn_implementation = "eager"
    model = mk.HookedModel.from_hf(BertForMaskedLM(config).eval(), name="bert")
    values = attention_patterns(model, Prompts.from_tokens([[3, 4, 5], [6, 7]]), progress=False).values
    assert not values[..., 0].isnan().any()
    assert values[..., 1].isnan().sum() == 2 * 2 * (9 - 4)


def test_a_source_that_gets_nothing_exists(gpt2_tiny):
    """0 by underflow is not a masked cell."""
    model, prompts = gpt2_tiny, Prompts.from_tokens([[5, 6, 7, 8]])

    def flatten(scores, hook):
        scores[:, :, 3, 1] = -5000.0
        return scores

    with model.hooks([("attn_scores", flatten)]):
        result = attention_patterns(model, prompts, progress=False)
    assert bool((result.values[:, :, 3, 1] == 0).all())
    assert torch.equal(result.values.isnan()[0, 0, :, :, 0], torch.ones(4, 4, dtype=torch.bool).triu(1))


def test_layers_and_heads_are_chosen(gpt2_tiny):
    prompts = ragged()
    whole = attention_patterns(gpt2_tiny, prompts, progress=False)
    part = attention_patterns(gpt2_tiny, prompts, layers=[-1, 1], heads=[2, 0], progress=False)
    assert (part.coords["layer"], part.coords["head"]) == ((3, 1), (2, 0))
    torch.testing.assert_close(part.values, whole.sel(layer=[3, 1], head=[2, 0]).values, rtol=0, atol=0, equal_nan=True)


def test_the_batches_do_not_matter(gpt2_tiny):
    prompts = ragged()
    whole, small = (attention_patterns(gpt2_tiny, prompts, budget=b, progress=False).values for b in (None, 1))
    torch.testing.assert_close(small, whole, rtol=0, atol=1e-12, equal_nan=True)


def test_positions_have_the_text_that_all_prompts_share(gpt2_tiny):
    prompts = labelled("When| Mary| and", "When| John| and| so")
    result = attention_patterns(gpt2_tiny, prompts, progress=False)
    assert result.coords["dest"] == result.coords["src"] == ('"When" 0', "1", '" and" 2', '" so" 3')
    assert result.provenance["str_tokens"] == [["When", " Mary", " and"], ["When", " John", " and", " so"]]
    alone = attention_patterns(gpt2_tiny, prompts[[1]], progress=False)
    assert alone.coords["src"][1] == '" John" 1'
    assert "str_tokens" not in alone.provenance
    bare = attention_patterns(gpt2_tiny, ragged(), progress=False)
    assert bare.coords["src"] == tuple(range(7))
    assert result.provenance["technique"] == "attention_patterns"
    assert result.provenance["n_prompts"] == 2


def test_pairs_mean_their_clean_prompts(gpt2_tiny):
    pairs = PromptPairs.from_tokens([[5, 6, 7]], [[5, 9, 7]], [(10, 11)])
    result = attention_patterns(gpt2_tiny, pairs, progress=False)
    clean = attention_patterns(gpt2_tiny, pairs.clean, progress=False)
    corrupted = attention_patterns(gpt2_tiny, pairs.corrupted, progress=False)
    torch.testing.assert_close(result.values, clean.values, rtol=0, atol=0, equal_nan=True)
    assert float((clean.values - corrupted.values).nan_to_num().abs().max()) > 1e-3
    assert result.provenance["task"] == "custom"


def test_half_precision_is_widened():
    model = mk.HookedModel.from_hf(build_hf("llama", torch.bfloat16), name="llama")
    prompts = Prompts.from_tokens([[5, 6, 7, 8, 9]])
    result = attention_patterns(model, prompts, progress=False)
    _, cache = model.run_with_cache(prompts.tokens[0], "pattern")
    assert result.values.dtype == torch.float32
    assert torch.equal(result.values[0, :, :, :, 0].nan_to_num(), cache["pattern", 0][0].float())
    assert result.values.isnan().sum() == 16 * 10
    assert attention_patterns(model, prompts, scores=True, progress=False).values.isnan().sum() == 16 * 10


def test_nothing_stays_attached(gpt2_tiny):
    attention_patterns(gpt2_tiny, ragged(), progress=False)
    assert not gpt2_tiny.has_hooks


def test_refusals(gpt2_tiny):
    prompts = ragged()
    with pytest.raises(ValueError, match="layers: expected indices into 4, got 4"):
        attention_patterns(gpt2_tiny, prompts, layers=[4], progress=False)
    with pytest.raises(ValueError, match="heads: expected at least one index"):
        attention_patterns(gpt2_tiny, prompts, heads=[], progress=False)
    with pytest.raises(ValueError, match=r"prompts: .* was loaded without a tokenizer"):
        attention_patterns(gpt2_tiny, "When Mary", progress=False)
    with pytest.raises(ValueError, match=r"prompt 0: expected token ids in 0\.\.60"):
        attention_patterns(gpt2_tiny, Prompts.from_tokens([[99]]), progress=False)
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=D_VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4, intermediate_size=32)
    mamba = mk.HookedModel.from_hf(MambaForCausalLM(config).eval(), name="mamba")
    with pytest.raises(ValueError, match="'pattern' does not exist in mamba"):
        attention_patterns(mamba, Prompts.from_tokens([[3, 4]]), progress=False)
    gpt2_tiny.train()
    try:
        with pytest.raises(ValueError, match="evaluation mode"):
            attention_patterns(gpt2_tiny, prompts, progress=False)
    finally:
        gpt2_tiny.eval()
