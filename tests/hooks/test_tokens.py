"""Tokenizers, padding, masks, loss and the context's length: what stands between a user's prompts and the model."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import mechkit as mk
from helpers.families import build_hf
from helpers.vlm import in_double
from helpers.words import BOS, D_VOCAB, EOS, TEXTS, build, make_tokenizer, padded


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return build()


@pytest.fixture(scope="module")
def model(plain) -> mk.HookedModel:
    return mk.HookedModel.from_hf(copy.deepcopy(plain), make_tokenizer(), name="tiny")


def state_of(tokenizer: Any) -> tuple[Any, ...]:
    return (
        tokenizer.backend_tokenizer.to_str(),
        dict(tokenizer.special_tokens_map),
        tokenizer.padding_side,
        tokenizer.truncation_side,
        tokenizer.chat_template,
        len(tokenizer),
        getattr(tokenizer, "add_bos_token", None),
        repr(sorted(tokenizer.init_kwargs.items(), key=str)),
    )


# -- tokenizers --------------------------------------------------------------------------------------------------------

ROLES: list[dict[str, Any]] = [
    {},
    {"puts_bos": True},
    {"puts_eos": True},
    {"puts_bos": True, "puts_eos": True},
    {"pad_token": None},
    {"bos_token": None, "pad_token": None},
    {"pad_token": "</s>"},
    {"bos_token": None, "eos_token": None, "pad_token": None},
]


@pytest.mark.parametrize("roles", ROLES, ids=str)
def test_the_users_tokenizer_is_used_and_left_as_it_is(roles):
    tokenizer = make_tokenizer(**roles)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template, tokenizer.padding_side = "X{{ messages }}", "left"
    before = state_of(tokenizer)
    hooked = mk.HookedModel.from_hf(build(), tokenizer)
    assert hooked.tokenizer is tokenizer
    bare = tokenizer("a<tool>b", add_special_tokens=False).input_ids
    assert 259 in bare
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    with_bos = bare if bos is None else [bos, *bare]
    assert hooked.to_tokens("a<tool>b")[0].tolist() == with_bos
    assert hooked.to_tokens("a<tool>b", prepend_bos=True)[0].tolist() == with_bos
    assert hooked.to_tokens("a<tool>b", prepend_bos=False)[0].tolist() == bare
    assert hooked.to_str_tokens("a<tool>b", prepend_bos=False) == ["a", "<tool>", "b"]
    assert hooked.to_string(hooked.to_tokens("a<tool>b", prepend_bos=False))[0] == "a<tool>b"
    ids = hooked.to_tokens(TEXTS)
    alone = [hooked.to_tokens(text)[0] for text in TEXTS]
    assert torch.equal(ids[0], alone[0])
    assert torch.equal(ids[1, : len(alone[1])], alone[1])
    with in_double():  # transformers takes norms and softmax in float32, whose rounding depends on lengths
        assert torch.allclose(hooked(TEXTS)[1, : len(alone[1])], hooked(alone[1])[0], atol=1e-10)
    hooked.generate(TEXTS, max_new_tokens=2)
    assert state_of(tokenizer) == before


def test_tokens_are_transformer_lenses(tmp_path):
    """As for a tokenizer that it reads from a folder itself."""
    from transformer_lens.model_bridge import TransformerBridge

    for roles in ({}, {"puts_bos": True}, {"puts_eos": True}):
        folder = tmp_path / str(roles)
        make_tokenizer(**roles).save_pretrained(folder)
        hooked = mk.HookedModel.from_hf(build(), AutoTokenizer.from_pretrained(folder))
        theirs = TransformerBridge.boot_transformers(
            "tiny", hf_model=build(), tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu"
        )
        for prepend in (None, True, False):
            for text in ("a dog", "x y", "x"):
                assert torch.equal(hooked.to_tokens(text, prepend), theirs.to_tokens(text, prepend_bos=prepend)), roles


def test_a_tokenizer_may_be_changed_later():
    hooked = mk.HookedModel.from_hf(build(), make_tokenizer())
    hooked.tokenizer.pad_token = "!"
    assert hooked.to_tokens(TEXTS)[1, -1] == hooked.tokenizer.convert_tokens_to_ids("!")


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(TypeError, match="tokenizer: expected a tokenizer of transformers"):
        mk.HookedModel.from_hf(build(), "gpt2")
    with pytest.raises(TypeError, match="tokenizer: expected a tokenizer of transformers"):
        mk.HookedModel.from_hf(build(), make_tokenizer().backend_tokenizer)


def test_two_beginnings_are_warned_of(model):
    rendered = "<s>user: hi"
    for call in (
        lambda: model.to_tokens(rendered),
        lambda: model(rendered),
        lambda: model(["a", rendered]),
        lambda: mk.Prompts.from_text(model, rendered),
        lambda: model.generate(rendered, max_new_tokens=1),
        lambda: model.run_with_cache(rendered, "z"),
    ):
        with pytest.warns(UserWarning, match=r"'<s>'.*twice.*prepend_bos=False"):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.to_tokens(rendered, prepend_bos=False)[0, :2].tolist() == [BOS, model.to_single_token("u")]
        model.to_tokens("user: <s>")


# -- padding, masks and loss -------------------------------------------------------------------------------------------


def alone_losses(plain: PreTrainedModel, row: Tensor) -> Tensor:
    with torch.no_grad():
        log_p = plain(row[None]).logits[0, :-1].log_softmax(-1)
    return -log_p.gather(-1, row[1:, None])[:, 0]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_counts_for_no_loss(side):
    plain = build(dtype=torch.float32)
    model = mk.HookedModel.from_hf(copy.deepcopy(plain), make_tokenizer())
    rows = [model.to_tokens(text)[0] for text in (*TEXTS, "x")]
    each = [alone_losses(plain, row) for row in rows]
    mean = float(torch.cat(each).mean())
    ids, mask = padded(rows, side)
    ways: list[tuple[Any, dict[str, Any]]] = [(ids, {"attention_mask": mask}), (ids, {"attention_mask": mask.bool()})]
    ways += [([*TEXTS, "x"], {}), (ids, {})] if side == "right" else []
    for given, more in ways:
        with torch.no_grad():
            assert float(model(given, return_type="loss", **more)) == pytest.approx(mean, abs=1e-5)
            logits, losses = model(given, return_type="both", loss_per_token=True, **more)
        assert logits.shape[:2] == ids.shape
        real = (mask[:, 1:] * mask[:, :-1]).bool()
        assert bool(losses[~real].isnan().all())
        assert not bool(losses[real].isnan().any())
        for row, expected in zip(losses, each, strict=True):
            assert torch.allclose(row[~row.isnan()], expected, atol=1e-5)


def test_a_loss_has_a_gradient_that_padding_leaves_alone(model):
    ids, mask = padded([model.to_tokens(text)[0] for text in TEXTS], "right")
    weight = model.bridge.original_model.model.layers[0].mlp.down_proj.weight
    with in_double():
        found = torch.autograd.grad(model(ids, return_type="loss", attention_mask=mask), weight)[0]
        alone = [
            model(row[real.bool()], return_type="both", loss_per_token=True)[1]
            for row, real in zip(ids, mask, strict=True)
        ]
    expected = torch.autograd.grad(torch.cat(alone, 1).mean(), weight)[0]
    assert torch.allclose(found, expected, atol=1e-12)


def test_where_padding_may_be_text_the_loss_wants_a_mask():
    hooked = mk.HookedModel.from_hf(build(), make_tokenizer(pad_token="</s>"))
    rows = [torch.tensor([BOS, 5, 6, 7]), torch.tensor([BOS, 5])]
    ids, mask = padded(rows, "right", EOS)
    with pytest.raises(ValueError, match=r"rows \[1\] end with token 257.*attention_mask"):
        hooked(ids, return_type="loss")
    with pytest.raises(ValueError, match="attention_mask"):
        hooked.generate(ids)
    hooked(ids, return_type="loss", attention_mask=mask)
    ended = torch.tensor([[BOS, 5, 6, EOS], [BOS, 5, 6, EOS]])  # every text with its end: there is nothing to doubt
    expected = torch.stack([alone_losses(hooked.bridge.original_model, row) for row in ended]).mean()
    assert float(hooked(ended, return_type="loss").detach()) == pytest.approx(float(expected))


def test_a_loss_needs_a_second_token(model):
    with pytest.raises(ValueError, match="at least two tokens"):
        model(torch.tensor([[BOS]]), return_type="loss")
    with pytest.raises(ValueError, match="return_type: expected one of 'logits', 'loss', 'both'; got 'predictions'"):
        model(torch.tensor([[BOS, 5]]), return_type="predictions")


IDS = torch.tensor([[BOS, 5, 6, 7], [BOS, 8, 9, 10]])
WRONG_MASKS = {
    "shorter": torch.ones(2, 3),
    "longer": torch.ones(2, 5),
    "one row": torch.ones(1, 4),
    "more rows": torch.ones(3, 4),
    "flat": torch.ones(4),
    "square": torch.ones(2, 1, 4, 4),
    "sevens": torch.full((2, 4), 7),
    "halves": torch.full((2, 4), 0.5),
    "NaN": torch.full((2, 4), torch.nan),
    "additive": torch.tensor([[0.0, 0, 0, -1e9]] * 2),
    "all zero": torch.zeros(2, 4),
    "one row all zero": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]),
    "a hole": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]),
}


@pytest.mark.parametrize("mask", WRONG_MASKS.values(), ids=WRONG_MASKS)
def test_a_mask_that_does_not_fit_is_refused(model, mask):
    for call in (
        lambda: model(IDS, attention_mask=mask),
        lambda: model(IDS, attention_mask=mask, return_type="loss"),
        lambda: model.run_with_cache(IDS, "z", attention_mask=mask),
        lambda: model.run_with_hooks(IDS, [], attention_mask=mask),
        lambda: model.generate(IDS, max_new_tokens=1, attention_mask=mask),
        lambda: model(["abc", "def"], attention_mask=mask),
    ):
        with pytest.raises(ValueError, match="attention_mask"):
            call()


def test_masks_that_fit(model):
    expected = model(IDS)
    for mask in (
        torch.ones(2, 4),
        torch.ones(2, 4).bool(),
        torch.ones(2, 4, dtype=torch.uint8),
        torch.ones(2, 4).half(),
    ):
        assert torch.equal(model(IDS, attention_mask=mask), expected)
    assert torch.equal(model(IDS[0], attention_mask=torch.ones(4)), expected[:1])
    with pytest.raises(TypeError, match=r"attention_mask.*list"):
        model(IDS, attention_mask=[[1, 1, 1, 1]] * 2)
    with pytest.raises(ValueError, match="attention_mask: 1 at the padding"):
        model(["a", "bcd"], attention_mask=torch.ones(2, 4))


def test_padding_on_the_left_in_float64_is_refused_where_it_would_give_nan(model):
    ids, mask = padded([model.to_tokens(text)[0] for text in TEXTS], "left")
    with pytest.raises(ValueError, match="float64"):
        model(ids, attention_mask=mask)


def test_an_architecture_that_reads_its_padding_is_refused_or_spared_the_mask():
    """RWKV knows no masks, and TransformerLens's OpenAI GPT sees what is ahead when it is given one."""
    rwkv = {
        "vocab_size": D_VOCAB,
        "hidden_size": 32,
        "attention_hidden_size": 32,
        "num_hidden_layers": 2,
        "context_length": 64,
    }
    gpt = {"vocab_size": D_VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    for kind, arguments in (("rwkv", rwkv), ("openai-gpt", gpt)):
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **arguments), attn_implementation="eager")
        for p in hf.parameters():
            torch.nn.init.normal_(p, std=0.35) if p.ndim > 1 else None
        plain = copy.deepcopy(hf.eval())
        hooked = mk.HookedModel.from_hf(hf, make_tokenizer())
        rows = [hooked.to_tokens(text)[0] for text in TEXTS]
        ids, mask = padded(rows, "right")
        with torch.no_grad():
            found, expected = hooked(ids, attention_mask=mask)[1, : len(rows[1])], plain(rows[1][None]).logits[0]
            assert torch.allclose(found, expected, atol=1e-4), kind
            assert torch.allclose(hooked(TEXTS)[1, : len(rows[1])], expected, atol=1e-4), kind
        ids, mask = padded(rows, "left")
        with pytest.raises(ValueError, match="attention_mask: this architecture reads padding on the left"):
            hooked(ids, attention_mask=mask)


# -- the context's length ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings"), ("gptj", "n_positions")]
)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_short_contexts_load_and_longer_prompts_are_refused(family, name, n):
    plain = build(family, vocab_size=61, bos_token_id=0, eos_token_id=1, **{name: n})
    model = mk.HookedModel.from_hf(copy.deepcopy(plain))
    assert model.n_ctx == n
    model.validate()
    ids = torch.tensor([[7, 11, 13][:n]])
    with torch.no_grad():
        assert torch.allclose(model(ids), plain(ids).logits, atol=1e-10)
    pairs = mk.PromptPairs.from_tokens(ids, [[20, 21, 22][:n]], [(5, 9)])
    mk.activation_patching(model, pairs, mk.logit_diff(pairs), site="resid_pre", over="layer pos", progress=False)
    longer = torch.arange(3, 4 + n)[None]
    two = mk.PromptPairs.from_tokens(longer, longer + 1, [(5, 9)])
    for call in (
        lambda: model(longer),
        lambda: model.run_with_cache(longer, "z"),
        lambda: model.run_with_hooks(longer),
        lambda: model.generate(ids, max_new_tokens=2),
        lambda: mk.activation_patching(model, two, mk.logit_diff(two), progress=False),
        lambda: mk.logit_lens(model, two.clean, tokens=[5]),
    ):
        with pytest.raises(ValueError, match=rf"at most {n} tokens.*context"):
            call()
    assert model.generate(ids, max_new_tokens=1).shape[1] == n + 1


def test_a_long_text_is_cut_with_a_warning():
    hooked = mk.HookedModel.from_hf(build("gpt2", n_positions=16), make_tokenizer())
    with pytest.warns(UserWarning, match="cut from 41 tokens to 16"):
        ids = hooked.to_tokens("x" * 40)
    assert ids.shape == (1, 16)
    assert torch.equal(ids, hooked.to_tokens("x" * 15))
    assert hooked.to_tokens("x" * 40, truncate=False).shape == (1, 41)
    with pytest.raises(ValueError, match="at most 16 tokens"):
        hooked("x" * 40)


def test_rotary_models_run_on_beyond_their_context():
    plain = build_hf("llama")
    model, ids = mk.HookedModel.from_hf(copy.deepcopy(plain)), torch.arange(3, 83)[None] % 61
    with torch.no_grad():
        assert torch.allclose(model(ids), plain(ids).logits, atol=1e-10)
