"""Continuing prompts: each as it is continued alone, whatever else is in the batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import mechkit as mk
from helpers.words import TEXTS, build, make_tokenizer, padded


def greedy(plain: PreTrainedModel, row: Tensor, n: int = 6) -> list[int]:
    ids = row[None]
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, plain(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(row) :].tolist()


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "mistral", "gemma3", "gpt_neox", "bloom", "opt", "gpt_neo", "falcon"]
)
def test_each_prompt_is_continued_as_alone(family):
    plain = build(family)
    model = mk.HookedModel.from_hf(copy.deepcopy(plain), make_tokenizer())
    rows = [model.to_tokens(text)[0] for text in (*TEXTS, "x", "the bat lay in")]
    expected = [greedy(plain, row) for row in rows]
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        found = model.generate(ids, max_new_tokens=6, attention_mask=mask, stop_at_eos=False)
        assert torch.equal(found[:, : ids.shape[1]], ids)
        assert found[:, ids.shape[1] :].tolist() == expected
    assert (
        model.generate(ids, max_new_tokens=6, stop_at_eos=False)[:, ids.shape[1] :].tolist() == expected
    )  # right, unmasked
    texts = [*TEXTS, "x", "the bat lay in"]
    assert model.generate(texts, max_new_tokens=6) == [model.generate(text, max_new_tokens=6) for text in texts]


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return build()


@pytest.fixture(scope="module")
def model(plain) -> mk.HookedModel:
    return mk.HookedModel.from_hf(copy.deepcopy(plain), make_tokenizer())


def test_padding_on_the_left_without_a_mask_is_refused(model):
    ids, _ = padded([model.to_tokens(text)[0] for text in TEXTS], "left")
    with pytest.raises(ValueError, match="begin with padding"):
        model.generate(ids)


def test_a_prompt_ends_at_its_end(model, plain):
    rows = [model.to_tokens(text)[0] for text in TEXTS]
    expected = [greedy(plain, row, 12) for row in rows]
    end = expected[0][2]
    ids, mask = padded(rows, "right")
    found = model.generate(ids, max_new_tokens=12, attention_mask=mask, eos_token_id=[end, 7])[:, ids.shape[1] :]
    for row, full in zip(found.tolist(), expected, strict=True):
        n = next((i + 1 for i, token in enumerate(full) if token in (end, 7)), 12)
        assert row[:n] == full[:n]
        assert set(row[n:]) <= {model.tokenizer.pad_token_id}
    assert (
        model.generate(rows[0], max_new_tokens=12, eos_token_id=end).shape[1]
        == len(rows[0]) + expected[0].index(end) + 1
    )


def test_hooks_act_in_every_step(model, plain):
    def zero(z, hook):
        return torch.zeros_like(z)

    edited = copy.deepcopy(plain)
    edited.model.layers[1].self_attn.o_proj.weight.data.zero_()
    row = model.to_tokens(TEXTS[0])[0]
    with model.hooks([(("z", 1), zero)]):
        found = model.generate(row, max_new_tokens=6, stop_at_eos=False)[0, len(row) :].tolist()
    assert found == greedy(edited, row)
    assert found != greedy(plain, row)
    assert model.generate(row, max_new_tokens=6, stop_at_eos=False)[0, len(row) :].tolist() == greedy(plain, row)


def test_drawn_tokens_follow_the_models_probabilities(model, plain):
    row = model.to_tokens("a")[0]
    with torch.no_grad():
        logits = plain(row[None]).logits[0, -1]

    def shares(**how) -> Tensor:
        many = model.generate(row.repeat(4000, 1), max_new_tokens=1, do_sample=True, stop_at_eos=False, **how)
        return torch.bincount(many[:, -1], minlength=len(logits)).double() / 4000

    torch.manual_seed(0)
    assert float((shares() - logits.softmax(-1)).abs().max()) < 0.04
    assert float((shares(temperature=3.0) - (logits / 3).softmax(-1)).abs().max()) < 0.04
    top = logits.topk(3).indices
    expected = torch.zeros_like(logits).scatter(0, top, logits[top].softmax(-1))
    assert float((shares(top_k=3) - expected).abs().max()) < 0.04
    ordered, order = (logits / 3).softmax(-1).sort(descending=True)
    kept = order[: int((ordered.cumsum(-1) < 0.6).sum()) + 1]
    found = shares(temperature=3.0, top_p=0.6)
    assert set(found.nonzero().flatten().tolist()) <= set(kept.tolist())
    assert len(kept) > 1


def test_draws_are_repeatable_row_by_row(model):
    rows = [model.to_tokens(text)[0] for text in TEXTS]
    ids, mask = padded(rows, "right")
    how = {"max_new_tokens": 5, "do_sample": True, "temperature": 5.0, "stop_at_eos": False}
    together = model.generate(ids, attention_mask=mask, seed=3, **how)[:, ids.shape[1] :]
    assert torch.equal(together, model.generate(ids, attention_mask=mask, seed=3, **how)[:, ids.shape[1] :])
    assert not torch.equal(together, model.generate(ids, attention_mask=mask, seed=4, **how)[:, ids.shape[1] :])
    for i, row in enumerate(rows):
        assert torch.equal(together[i], model.generate(row, seed=3 + i, **how)[0, len(row) :])


WRONG = [
    ({"temperature": 0.5}, "temperature.*do_sample"),
    ({"top_k": 5}, "top_k.*do_sample"),
    ({"top_p": 0.5}, "top_p.*do_sample"),
    ({"do_sample": True, "temperature": 0.0}, "temperature"),
    ({"do_sample": True, "temperature": -1.0}, "temperature"),
    ({"do_sample": True, "top_k": 0}, "top_k"),
    ({"do_sample": True, "top_p": 1.5}, "top_p"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": 2.5}, "max_new_tokens"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_settings_without_effect_or_meaning_are_refused(model, arguments, words):
    with pytest.raises(ValueError, match=words):
        model.generate("a", **arguments)


def test_unknown_arguments_are_refused(model):
    with pytest.raises(TypeError, match="temprature"):
        model.generate("a", temprature=0.5)
    with pytest.raises(TypeError, match=r"names_filter: HookedModel.run_with_cache"):
        model.run_with_cache(torch.tensor([[3, 4]]), names_filter="z")


def test_an_encoder_does_not_continue_text():
    from transformers import AutoConfig, AutoModelForMaskedLM

    config = AutoConfig.for_model(
        "bert", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = mk.HookedModel.from_hf(
        AutoModelForMaskedLM.from_config(config, attn_implementation="eager").double().eval()
    )
    with pytest.raises(ValueError, match="does not continue text"):
        model.generate(torch.tensor([[3, 4, 5]]))
