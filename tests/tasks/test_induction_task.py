"""Induction pairs: which tokens they have and where, that a model known to do induction solves them, and that SmolLM2 does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mechkit as mk
from helpers.families import build_hf
from mechkit import HookedModel, PromptPairs
from mechkit.tasks import induction, repeated_tokens

N_ORDINARY = 49  # of the hand-written model: 50 tokens less BOS


@pytest.fixture(scope="module")
def known() -> mk.zoo.Known:
    return mk.zoo.induction(n=1)


def rows(pairs: PromptPairs, side: str = "clean") -> list[list[int]]:
    return [tokens.tolist() for tokens in getattr(pairs, side).tokens]


def last_logits(model: HookedModel, pairs: PromptPairs, side: str) -> Tensor:
    """`[prompt d_vocab]`."""
    return logits_of(model, getattr(pairs, side).tokens)


def logits_of(model: HookedModel, prompts: Sequence[Tensor]) -> Tensor:
    """By whole forward passes, of eight prompts at a time."""
    with torch.no_grad():
        return torch.cat([model(rows)[:, -1] for rows in torch.stack(list(prompts)).split(8)])


def answers(logits: Tensor, pairs: PromptPairs) -> tuple[Tensor, Tensor]:
    """Right minus wrong logit of each prompt, and the most likely token of all."""
    right, wrong = (torch.tensor([ids[0] for ids in side]) for side in (pairs.right, pairs.wrong))
    each = torch.arange(len(pairs))
    return logits[each, right] - logits[each, wrong], logits.argmax(1)


# -- what the pairs are ------------------------------------------------------------------------------------------------


def check(pairs: PromptPairs, n: int, length: int, begin: int) -> None:
    """Everything that the docstring says of tokens, answers and positions; `begin` tokens stand before the first half."""
    assert pairs.task == "induction"
    assert len(pairs) == n
    assert set(pairs.positions) == {"previous", "current", "END"}
    for i, (clean, corrupted) in enumerate(zip(rows(pairs), rows(pairs, "corrupted"), strict=True)):
        previous, current, end = (int(pairs.positions[name][i]) for name in ("previous", "current", "END"))
        assert len(clean) == len(corrupted) == begin + 2 * length - 1
        assert (current, previous, end) == (begin + length - 2, begin + length - 1, len(clean) - 1)
        first, second = clean[begin : begin + length], clean[begin + length :]
        assert len(set(first)) == length
        assert second == first[:-1]
        assert clean[:begin] == corrupted[:begin]
        assert not set(first) & set(clean[:begin])
        # the answers are what followed the last token the first time, in either prompt
        for row, answer in ((clean, pairs.right[i]), (corrupted, pairs.wrong[i])):
            assert [p for p, token in enumerate(row) if token == row[end]] == [current, end]
            assert answer == (row[current + 1],)
            assert row.count(answer[0]) == 1
        assert pairs.wrong[i][0] not in clean
        assert pairs.right[i][0] not in corrupted
        assert [p for p in range(len(clean)) if clean[p] != corrupted[p]] == [previous]
        assert int(pairs.first_difference[i]) == previous


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 12), length=st.integers(2, N_ORDINARY - 1), seed=st.integers(0, 2**40))
def test_properties(known: mk.zoo.Known, n: int, length: int, seed: int) -> None:
    pairs = induction(known.model, n, length, seed=seed)
    check(pairs, n, length, begin=0)  # no tokenizer: nothing comes before
    assert all(0 < token < 50 for row in rows(pairs) + rows(pairs, "corrupted") for token in row)


@pytest.mark.parametrize("length", [2, 20])
def test_properties_with_a_real_tokenizer(smollm2: HookedModel, length: int) -> None:
    pairs = induction(smollm2, 24, length, seed=7)
    check(pairs, 24, length, begin=1)
    assert {row[0] for row in rows(pairs)} == {smollm2.tokenizer.bos_token_id}
    special = {i for i, token in smollm2.tokenizer.added_tokens_decoder.items() if token.special}
    assert len(special) > 3
    assert not special & {token for row in rows(pairs) + rows(pairs, "corrupted") for token in row[1:]}
    assert pairs.clean.str_tokens is not None
    assert len(pairs.clean.str_tokens[0]) == 2 * length


def test_prompts_begin_as_those_of_repeated_tokens_do(smollm2: HookedModel) -> None:
    """Both tasks decide on the beginning-of-sequence token alike, and draw from the same tokens."""
    ours, theirs = induction(smollm2, 4, 10), repeated_tokens(smollm2, 4, 10)
    assert int(ours.clean.lengths[0]) == int(theirs.lengths[0]) - 1
    assert ours.clean.tokens[0][0] == theirs.tokens[0][0]


def test_same_seed_same_pairs_and_another_seed_others(known: mk.zoo.Known) -> None:
    made = [induction(known.model, 8, 12, seed=seed) for seed in (3, 3, 4)]
    a, b, c = ((pairs.clean.hash(), pairs.corrupted.hash(), pairs.answers) for pairs in made)
    assert a == b
    assert all(x != y for x, y in zip(a, c, strict=True))
    assert len({tuple(row) for row in rows(made[0])}) == 8  # the prompts of one set differ too
    # more pairs of the same seed begin with the same ones
    assert rows(induction(known.model, 20, 12, seed=3))[:8] == rows(made[0])


def test_every_token_is_drawn_in_every_role(known: mk.zoo.Known) -> None:
    pairs = induction(known.model, 2000, 6, seed=0)
    everything = set(range(1, 50))
    assert {token for row in rows(pairs) for token in row} == everything
    assert {ids[0] for ids in pairs.right} == {ids[0] for ids in pairs.wrong} == everything


def test_no_global_state_is_changed(known: mk.zoo.Known) -> None:
    before = torch.random.get_rng_state()
    induction(known.model, 3, 5)
    assert torch.equal(torch.random.get_rng_state(), before)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, -2])
def test_refuses_no_pairs(known: mk.zoo.Known, n: int) -> None:
    with pytest.raises(ValueError, match=f"n: expected at least 1 pair, got {n}"):
        induction(known.model, n)


@pytest.mark.parametrize("length", [-1, 0, 1, N_ORDINARY, 1000])
def test_refuses_a_length_that_the_vocabulary_does_not_allow(known: mk.zoo.Known, length: int) -> None:
    message = (
        rf"length: expected 2 to {N_ORDINARY - 1} different tokens, got {length}\. The vocabulary has {N_ORDINARY} "
    )
    with pytest.raises(ValueError, match=message):
        induction(known.model, 4, length)


def gpt2_of_64_positions() -> HookedModel:
    model = build_hf("gpt2")
    model.config.bos_token_id = model.config.eos_token_id = 0
    return HookedModel.from_hf(model, name="tiny")


def test_refuses_prompts_longer_than_the_learned_positions() -> None:
    model = gpt2_of_64_positions()
    assert int(induction(model, 2, 32).clean.lengths[0]) == 63  # the longest of odd length
    message = (
        r"length: expected prompts of at most 64 tokens, the model's learned positions; with length=33 they have 65"
    )
    with pytest.raises(ValueError, match=message):
        induction(model, 2, 33)


def test_rotary_positions_have_no_such_limit() -> None:
    model = HookedModel.from_hf(build_hf("llama"), name="tiny")
    assert int(induction(model, 2, 40).clean.lengths[0]) == 79


# -- who solves it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3, 20, N_ORDINARY - 1])
def test_the_hand_written_model_solves_it(known: mk.zoo.Known, length: int) -> None:
    """Its logits are 10 for the token that it finds and 0 for all others: the right one, and the wrong one when corrupted."""
    pairs = induction(known.model, 16, length, seed=1)
    for side, expected, found in (("clean", 10.0, pairs.right), ("corrupted", -10.0, pairs.wrong)):
        difference, best = answers(last_logits(known.model, pairs, side), pairs)
        assert (difference - expected).abs().max() < 1e-6
        assert best.tolist() == [ids[0] for ids in found]


def test_patching_finds_the_head_that_copies_and_ablation_the_one_that_finds_the_place(known: mk.zoo.Known) -> None:
    """As the docstring says: the two prompts differ in what is copied, which the previous-token head does not carry."""
    pairs = induction(known.model, 6, 12)
    metric = mk.logit_diff(pairs)
    heads = mk.activation_patching(known.model, pairs, metric, progress=False).mean("prompt").normalized().values
    expected = torch.zeros(2, 4, dtype=torch.float64)
    expected[1, 0] = 1
    assert torch.allclose(heads, expected, atol=1e-9)
    ablated = mk.ablation(known.model, pairs, metric, mode="zero", progress=False).effect().mean("prompt").values
    expected[0, 0] = expected[1, 0] = -10  # neither answer is left
    assert torch.allclose(ablated, expected, atol=1e-6)


def test_the_stream_carries_the_answer_from_previous_to_the_end(known: mk.zoo.Known) -> None:
    pairs = induction(known.model, 6, 12)
    names = ["current", "previous", "END"]
    result = mk.activation_patching(
        known.model, pairs, mk.logit_diff(pairs), "resid_post", "layer position", positions=names, progress=False
    )
    found = result.mean("prompt").normalized().values
    assert torch.allclose(found, torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize(("length", "at_least"), [(10, 7.0), (20, 10.0)])
def test_smollm2_does_it(smollm2: HookedModel, length: int, at_least: float) -> None:
    pairs = induction(smollm2, 16, length, seed=0)
    clean, best = answers(last_logits(smollm2, pairs, "clean"), pairs)
    corrupted, _ = answers(last_logits(smollm2, pairs, "corrupted"), pairs)
    assert clean.mean() > at_least
    assert corrupted.mean() < -at_least  # the mirror image
    for score in (clean, -corrupted):
        assert (score > 0).float().mean() >= 0.9
    if length >= 20:  # among all 49,152 tokens
        assert (best == torch.tensor(pairs.right)[:, 0]).float().mean() >= 0.5


def without_the_first_half(pairs: PromptPairs, length: int) -> list[Tensor]:
    return [torch.cat([row[:1], row[1 + length :]]) for row in pairs.clean.tokens]


def shuffled(pairs: PromptPairs, length: int) -> list[Tensor]:
    """Another token before the answer: x_k and x_{k+1} do not follow each other any more."""
    order = [*range(length - 1, -1, -1)]
    return [torch.cat([row[:1], row[1:][order], row[1 + length :]]) for row in pairs.clean.tokens]


@pytest.mark.parametrize("broken", [without_the_first_half, shuffled])
def test_control_without_the_repetition_smollm2_does_not(
    smollm2: HookedModel, broken: Callable[[PromptPairs, int], list[Tensor]]
) -> None:
    """Only the first occurrence gives the answer: without it, or in reversed order, the right token is not predicted."""
    pairs = induction(smollm2, 32, 20, seed=0)
    _, best = answers(logits_of(smollm2, broken(pairs, 20)), pairs)
    assert (best == torch.tensor(pairs.right)[:, 0]).float().mean() <= 0.1
