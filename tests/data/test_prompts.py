"""`Prompts` and `PromptPairs`: what they keep, and what they refuse, naming the row. No model: a tokenizer of words."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechkit.prompts import PromptPairs, Prompts

TEXT = "<bos> When Mary and John went to the store , gave a drink Tom later 1 2 3 4"
WORDS = TEXT.split()


class WordTokenizer:
    """One token per word, id 0 for the beginning of sequence (there by default), no unknown words."""

    d_vocab = len(WORDS)

    def to_tokens(self, text: str, prepend_bos: bool | None = None) -> Tensor:
        ids = [WORDS.index(word) for word in text.split()]
        return torch.tensor([ids if prepend_bos is False else [0, *ids]], dtype=torch.long)

    def to_str_tokens(self, text: Any) -> list[str]:
        return [WORDS[i] for i in text]

    def to_single_token(self, text: str) -> int:
        words = text.split()
        if len(words) != 1:
            raise ValueError(f"expected {text!r} to be a single token, but it is {len(words)}: {words}")
        return WORDS.index(words[0])


MODEL = WordTokenizer()
CLEAN = ["When Mary and John went to the store , John gave a drink to", "Mary and John went , Mary gave to"]
CORRUPTED = [text.replace(", John", ", Tom").replace(", Mary", ", Tom") for text in CLEAN]
ANSWERS: list[Any] = [(" Mary", " John"), (" John", " Mary")]
POSITIONS = {"IO": [2, 3], "S2": [-5, -3]}
MARY, JOHN = WORDS.index("Mary"), WORDS.index("John")


def pairs(**changes: Any) -> PromptPairs:
    arguments = {"clean": CLEAN, "corrupted": CORRUPTED, "answers": ANSWERS, "positions": POSITIONS} | changes
    return PromptPairs.from_text(MODEL, **arguments)


def id_pairs(answers: Any, clean: Any = ((1, 2), (3, 4, 5)), **keywords: Any) -> PromptPairs:
    clean = Prompts.from_tokens(clean)
    return PromptPairs.from_tokens(clean, clean, answers, **keywords)


# -- Prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_of_text_are_ragged_and_labelled() -> None:
    prompts = Prompts.from_text(MODEL, CLEAN)
    assert len(prompts) == 2
    assert prompts.lengths.tolist() == [15, 9]
    assert prompts.tokens[1].tolist() == [0, 2, 3, 4, 5, 9, 2, 10, 6]
    assert prompts.str_tokens is not None
    assert " ".join(prompts.str_tokens[1]) == f"<bos> {CLEAN[1]}"


def test_bos_follows_the_model_unless_given() -> None:
    assert Prompts.from_text(MODEL, "When Mary").tokens[0].tolist() == [0, 1, 2]
    assert Prompts.from_text(MODEL, "When Mary", prepend_bos=True).tokens[0].tolist() == [0, 1, 2]
    assert Prompts.from_text(MODEL, "When Mary", prepend_bos=False).tokens[0].tolist() == [1, 2]
    assert pairs(prepend_bos=False, positions={}).clean.lengths.tolist() == [14, 8]


def test_prompts_of_a_tensor_of_tokens_and_of_lists_are_the_same() -> None:
    rows = [[1, 2, 3], [4, 5, 6]]
    for given_ in (rows, torch.tensor(rows), [torch.tensor(row, dtype=torch.int32) for row in rows]):
        prompts = Prompts.from_tokens(given_)
        assert [row.tolist() for row in prompts.tokens] == rows
        assert all(row.dtype == torch.long for row in prompts.tokens)
        assert prompts.str_tokens is None


def test_subset_of_prompts_keeps_the_given_order() -> None:
    prompts = Prompts.from_text(MODEL, ["Mary", "John went", "Tom"])
    subset = prompts[[2, 0]]
    assert subset.str_tokens == (("<bos>", "Tom"), ("<bos>", "Mary"))
    assert subset.lengths.tolist() == [2, 2]
    assert Prompts.from_tokens([[1], [2]])[[1]].str_tokens is None


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 18), min_size=1, max_size=5), min_size=1, max_size=8))
def test_groups_by_length_hold_every_prompt_once(rows: list[list[int]]) -> None:
    groups = Prompts.from_tokens(rows).by_length()
    assert sorted(i for group in groups.values() for i in group) == list(range(len(rows)))
    assert all(len(rows[i]) == length for length, group in groups.items() for i in group)


@settings(deadline=None)
@given(*[st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=3)] * 2)
def test_hash_is_equal_exactly_where_the_tokens_are(a: list[list[int]], b: list[list[int]]) -> None:
    assert (Prompts.from_tokens(a).hash() == Prompts.from_tokens(b).hash()) == (a == b)


def test_hash_sees_where_one_prompt_ends_and_does_not_see_the_dtype() -> None:
    assert Prompts.from_tokens([[1, 2], [3]]).hash() != Prompts.from_tokens([[1], [2, 3]]).hash()
    narrow = Prompts((torch.tensor([1, 2], dtype=torch.int32),))
    assert narrow.hash() == Prompts.from_tokens([[1, 2]]).hash()
    assert len(narrow.hash()) == 16


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"tokens: expected at least one prompt, got none"),
        ([[1], []], r"tokens\[1\]: expected a non-empty 1-D tensor"),
        ([[1], [[2, 3]]], r"tokens\[1\]\[0\]: expected a whole number, got list \[2, 3\]"),
        (torch.zeros(2, 3), r"tokens\[0\]: expected a non-empty 1-D tensor of token ids, got torch.float32 \[3\]"),
        ([[1], [2.5]], r"tokens\[1\]\[0\]: expected a whole number, got float 2.5"),
    ],
)
def test_refuses_what_are_not_token_sequences(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompts.from_tokens(rows)


@pytest.mark.parametrize("token", [-1, len(WORDS)])
def test_refuses_a_token_out_of_vocabulary(token: int) -> None:
    with pytest.raises(ValueError, match=rf"tokens\[1\]: expected ids in 0\.\.18, got \[3, {token}\]"):
        Prompts.from_tokens([[1, 2], [3, token]], MODEL)
    assert len(Prompts.from_tokens([[1, 2], [3, len(WORDS) - 1]], MODEL)) == 2


def test_refuses_labels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="str_tokens: expected one string for each token of each prompt"):
        Prompts((torch.tensor([1, 2]),), (("one",),))


# -- PromptPairs: what they keep ---------------------------------------------------------------------------------------


def test_pairs_from_text() -> None:
    made = pairs(task="mine")
    assert len(made) == 2
    assert made.answers == (((MARY,), (JOHN,)), ((JOHN,), (MARY,)))
    assert (made.right, made.wrong) == (((MARY,), (JOHN,)), ((JOHN,), (MARY,)))
    assert made.first_difference.tolist() == [10, 6]
    assert made.clean.lengths.tolist() == made.corrupted.lengths.tolist() == [15, 9]
    assert made.task == "mine"
    assert pairs().task == "custom"


def test_negative_positions_count_from_each_prompts_own_end() -> None:
    positions = pairs().positions
    assert {name: index.tolist() for name, index in positions.items()} == {"IO": [2, 3], "S2": [10, 6], "END": [14, 8]}
    assert all(index.dtype == torch.long for index in positions.values())


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.data())
def test_a_position_counted_from_the_end_is_the_one_counted_from_the_start(lengths: list[int], data: Any) -> None:
    index = [data.draw(st.integers(0, length - 1)) for length in lengths]
    tokens = [[1] * length for length in lengths]
    from_start, from_end = (
        id_pairs([(1, 2)] * len(lengths), tokens, positions={"P": values}).positions["P"].tolist()
        for values in (index, [i - length for i, length in zip(index, lengths, strict=True)])
    )
    assert from_start == from_end == index


def test_end_is_always_there() -> None:
    assert {name: index.tolist() for name, index in pairs(positions=None).positions.items()} == {"END": [14, 8]}
    assert pairs(positions={"END": [-1, -1]}).positions["END"].tolist() == [14, 8]


def test_first_difference_is_the_length_where_nothing_differs() -> None:
    tokens = [[1, 2], [3, 4, 5]], [[1, 2], [9, 4, 6]]
    assert PromptPairs.from_tokens(*tokens, [(1, 2), (3, 4)]).first_difference.tolist() == [2, 0]


def test_answers_are_text_or_ids_or_sets_of_them() -> None:
    sets = [(" Mary", " John"), ([" 1", "2", WORDS.index("3")], (" 4", JOHN))]
    ids = [WORDS.index(word) for word in "1234"]
    assert pairs(answers=sets).answers[1] == (tuple(ids[:3]), (ids[3], JOHN))
    assert id_pairs([(7, 8), ([7, 8], [9])]).answers == (((7,), (8,)), ((7, 8), (9,)))


def test_one_pair_may_be_given_bare() -> None:
    made = PromptPairs.from_text(MODEL, "Mary and", "Tom and", (" Mary", " John"))
    assert made.answers == (((MARY,), (JOHN,)),)
    assert made.first_difference.tolist() == [1]


@pytest.mark.parametrize("index", [[1], [1, 0], [0, 0, 1], (-1,), range(2)])
def test_subset_of_pairs(index: Any) -> None:
    whole = pairs(task="mine")
    subset = whole[index]
    rows = [int(i) for i in index]
    assert len(subset) == len(rows)
    assert subset.task == "mine"
    for name in ("answers", "right", "wrong"):
        assert getattr(subset, name) == tuple(getattr(whole, name)[i] for i in rows)
    assert subset.clean.hash() == whole.clean[rows].hash()
    assert subset.corrupted.hash() == whole.corrupted[rows].hash()
    assert list(subset.positions) == list(whole.positions)
    for name, values in whole.positions.items():
        assert subset.positions[name].tolist() == [int(values[i]) for i in rows]


def test_empty_subset_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        pairs()[[]]


def test_pairs_are_frozen() -> None:
    made = pairs()
    for name in ("clean", "right", "positions", "task"):
        with pytest.raises(FrozenInstanceError):
            setattr(made, name, None)
    assert replace(made, task="other").task == "other"
    assert made.task == "custom"


# -- PromptPairs: what they refuse -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corrupted": [CORRUPTED[0], "Mary and John"]}, r"pair 1: .*equal token length, got 9 and 4.*[Rr]eword"),
        ({"corrupted": CORRUPTED[:1]}, r"corrupted: expected 2 rows, one for each clean prompt; got 1"),
        ({"clean": [], "corrupted": []}, r"clean: expected at least one, got \[\]"),
        ({"answers": ANSWERS[:1]}, r"answers: expected 2 pairs, one for each clean prompt; got 1"),
        ({"answers": ANSWERS * 2}, r"answers: expected 2 pairs, one for each clean prompt; got 4"),
        ({"answers": [ANSWERS[0], (" John", " later Tom")]}, r"wrong answer of pair 1: .*' later Tom'.*single token"),
        ({"answers": [(" later Tom", " John"), ANSWERS[1]]}, r"right answer of pair 0: .*' later Tom'.*single token"),
        ({"answers": [ANSWERS[0], ([" John", " a drink"], " Mary")]}, r"right answer of pair 1: .*' a drink'"),
        ({"answers": [ANSWERS[0], ([], " Mary")]}, r"answers of pair 1: .*at least one right and one wrong.*empty set"),
        ({"answers": [([1], []), ANSWERS[1]]}, r"answers of pair 0: .*at least one right and one wrong.*empty set"),
        (
            {"answers": [ANSWERS[0], (" John", "John")]},
            rf"answers of pair 1: tokens \[{JOHN}\] are both right and wrong",
        ),
        ({"answers": [([5, 6, 7], [8, 7, 5]), ANSWERS[1]]}, r"pair 0: tokens \[5, 7\] are both right and wrong"),
        ({"answers": [ANSWERS[0], ([5, 5], 6)]}, r"answers of pair 1: a right token is listed twice: \[5, 5\]"),
        ({"answers": [(5, [6, 7, 6]), ANSWERS[1]]}, r"answers of pair 0: a wrong token is listed twice: \[6, 7, 6\]"),
        ({"answers": [ANSWERS[0], (19, 1)]}, r"right answer of pair 1: expected a token id in 0\.\.18, got 19"),
        ({"answers": [(1, -1), ANSWERS[1]]}, r"wrong answer of pair 0: expected a token id in 0\.\.18, got -1"),
        ({"answers": [ANSWERS[0], (1, 2, 3)]}, r"answers of pair 1: expected \(right, wrong\), got \(1, 2, 3\)"),
        ({"answers": (" Mary", " John")}, r"answers of pair 0: expected \(right, wrong\), got ' Mary'"),
        ({"positions": {"S2": [1]}}, r"positions\['S2'\]: expected 2 values, got shape \[1\]"),
        (
            {"positions": {"S2": [[1], [2]]}},
            r"positions\['S2'\]\[0\]: expected a whole number or a string or .*got \[1\]",
        ),
        ({"positions": {"S2": [14, 9]}}, r"positions\['S2'\]\[1\]: expected an index into 9 tokens, got 9"),
        (
            {"positions": {"IO": [1, 1], "S2": [-16, 1]}},
            r"positions\['S2'\]\[0\]: expected an index into 15 tokens, got -16",
        ),
        (
            {"positions": {"S2": [1.5, 2.0]}},
            r"positions\['S2'\]\[0\]: expected a whole number or a string or .*got float 1.5",
        ),
        ({"positions": {"END": [14, 7]}}, r"positions\['END'\]\[1\]: expected the last token, 8, got 7"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs(**changes)


def test_refuses_text_answers_without_a_model_and_a_negative_id() -> None:
    with pytest.raises(ValueError, match=r"wrong answer of pair 1: ' Mary' is text; pass `model=`"):
        id_pairs([(1, 2), (3, " Mary")])
    with pytest.raises(ValueError, match=r"right answer of pair 1: expected a token id of 0 or more, got -3"):
        id_pairs([(1, 2), (-3, 4)])


def test_refuses_when_made_directly_too() -> None:
    made = pairs()
    with pytest.raises(ValueError, match=r"answers of pair 1: .*empty set"):
        replace(made, wrong=((JOHN,), ()))
    with pytest.raises(ValueError, match="wrong: expected 2 rows"):
        replace(made, wrong=((JOHN,),))
    with pytest.raises(ValueError, match=r"pair 0: .*equal token length, got 15 and 9"):
        replace(made, corrupted=made.corrupted[[1, 0]])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2**70]], r"tokens\[0\]: expected whole numbers of 64 bits, got \[1, 1180591620717411303424\]"),
        ([[1, -2]], r"tokens\[0\]: expected ids of 0 or more, got -2"),
        (torch.tensor([[True, False]]), r"tokens\[0\]: expected a non-empty 1-D tensor of token ids, got torch\.bool"),
        (torch.zeros(1, 1, 2, dtype=torch.long), r"tokens: expected \[prompt pos\], got shape \[1, 1, 2\]"),
    ],
    ids=str,
)
def test_what_is_no_token_id_is_refused(tokens: Any, message: str) -> None:
    for model in (None, WordTokenizer()):
        with pytest.raises(ValueError, match=message if model is None else r"tokens(\[0\])?: expected"):
            Prompts.from_tokens(tokens, model)


@pytest.mark.parametrize(
    ("answer", "expected"), [(-5, "of 0 or more, got -5"), (2**70, r"in 0\.\.9223372036854775807, got 11")]
)
def test_answers_are_token_ids(answer: int, expected: str) -> None:
    with pytest.raises(ValueError, match=f"right answer of pair 0: expected a token id {expected}"):
        PromptPairs.from_tokens([[1]], [[2]], [(answer, 6)])


def test_reprs_are_short_and_count_prompts_and_tokens() -> None:
    ragged = Prompts.from_tokens([[1, 2, 3], [4, 5], [6]])
    assert repr(ragged) == "Prompts(3 prompts of 1 to 3 tokens)"
    assert repr(ragged[[2]]) == "Prompts(1 prompt of 1 token)"
    pairs = PromptPairs.from_tokens([[1, 2, 3], [4, 5]], [[1, 9, 3], [8, 5]], [(1, 2), (3, 4)], positions={"S": [1, 0]})
    assert repr(pairs) == "PromptPairs(2 pairs of 2 to 3 tokens; task 'custom'; positions S, END)"
    text = Prompts.from_text(MODEL, "Mary and John " * 500)
    assert repr(text).startswith("Prompts(1 prompt of 1501 tokens; first '<bos>MaryandJohn")
    assert len(repr(text)) < 120
