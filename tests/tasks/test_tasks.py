"""Greater-than and docstring prompts: seeded, with exact positions and answers, and SmolLM2 solves them.

With the real tokenizer, which writes numbers digit by digit, and with small ones that write years in other ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.fake_tokenizer import FakeTokenizer
from mechkit import HookedModel, Metric, PromptPairs, accuracy, logit_diff, prob_diff
from mechkit.tasks import docstring, greater_than
from mechkit.tasks._docstring import FUNCTIONS, NAMES, WORDS
from mechkit.tasks._greater_than import NOUNS

TWO_DIGITS = r"1700|17(?=\d\d)|17\b|\d\d"  # as GPT-2: "17" and "32", but 1700 is one token
DIGITS = r"\d"
THREE_DIGITS = r"\d{1,3}"  # as Llama 3: "173" and "2"
CHANGED = {
    "random_doc": ["A_doc", "B_doc"],
    "random_def": ["A_def", "B_def", "C_def"],
    "both": ["A_def", "B_def", "C_def", "A_doc", "B_doc"],
}


class SmallTokenizer(FakeTokenizer):
    """One token per word, line break or punctuation mark; numbers as `numbers` says. Learns words as they come."""

    def __init__(self, numbers: str = TWO_DIGITS, single: tuple[str, ...] = NAMES, joins: str = "") -> None:
        self.pattern = re.compile(rf"{joins}{'|' if joins else ''}{numbers}|\w+|[^\w\s]|\n")
        super().__init__()
        self.single = single

    def _pieces(self, text: str) -> list[str]:
        pieces = []
        for word in self.pattern.findall(text):
            pieces += [word[:1], word[1:]] if word in NAMES and word not in self.single else [word]
        return pieces


def at(pairs: PromptPairs, name: str, side: str = "clean") -> list[int]:
    rows = getattr(pairs, side).tokens
    return [int(row[i]) for row, i in zip(rows, pairs.positions[name].tolist(), strict=True)]


def differing(pairs: PromptPairs) -> list[list[int]]:
    rows = zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)
    return [(a != b).nonzero().flatten().tolist() for a, b in rows]


def text_of(pairs: PromptPairs, side: str = "clean", between: str = "") -> list[str]:
    return [between.join(row) for row in getattr(pairs, side).str_tokens]


def final_logits(model: HookedModel, pairs: PromptPairs, side: str) -> Tensor:
    """`[prompt d_vocab]`."""
    prompts = getattr(pairs, side)
    found: dict[int, Tensor] = {}
    with torch.no_grad():
        for rows in prompts.by_length().values():
            logits = model(torch.stack([prompts.tokens[i] for i in rows]))[:, -1]
            found |= dict(zip(rows, logits, strict=True))
    return torch.stack([found[i] for i in range(len(pairs))])


def score(logits: Tensor, metric: Metric) -> Tensor:
    read = logits if metric.tokens is None else logits[:, metric.tokens]
    return metric.read(read, torch.arange(len(logits)), None)


MAKE = {
    "greater_than": greater_than,
    "random_doc": lambda *args, **kwargs: docstring(*args, corruption="random_doc", **kwargs),
    "random_def": lambda *args, **kwargs: docstring(*args, corruption="random_def", **kwargs),
    "both": lambda *args, **kwargs: docstring(*args, corruption="both", **kwargs),
}


# -- both tasks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", MAKE)
def test_same_seed_same_pairs_and_another_seed_others(smollm2: HookedModel, task: str) -> None:
    a, b, c = (MAKE[task](smollm2, 16, seed=seed) for seed in (5, 5, 6))
    for name in ("clean", "corrupted"):
        assert getattr(a, name).hash() == getattr(b, name).hash()
        assert getattr(a, name).hash() != getattr(c, name).hash()
    assert a.answers == b.answers
    assert all(torch.equal(a.positions[name], b.positions[name]) for name in a.positions)
    assert len(set(text_of(a))) == 16
    assert len(a.clean.by_length()) > 1  # ragged


@pytest.mark.parametrize("task", MAKE)
def test_beginning_of_sequence_shifts_positions_by_one(smollm2: HookedModel, task: str) -> None:
    default, with_, without = (MAKE[task](smollm2, 8, prepend_bos=bos) for bos in (None, True, False))
    assert default.clean.hash() == with_.clean.hash()
    assert (with_.clean.lengths - without.clean.lengths == 1).all()
    for name in with_.positions:
        assert (with_.positions[name] - without.positions[name] == 1).all()
        assert at(with_, name) == at(without, name)


@pytest.mark.parametrize("make", [greater_than, docstring])
def test_refuses(make: Callable[..., PromptPairs]) -> None:
    for n in (0, -3):
        with pytest.raises(ValueError, match=f"n: expected 1 to 100,000 pairs, got {n}"):
            make(SmallTokenizer(), n=n)
    model = SmallTokenizer()
    model.tokenizer = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="model: expected one with a tokenizer"):
        make(model)


def test_built_in_lists() -> None:
    for words in (NOUNS, NAMES, FUNCTIONS, WORDS):
        assert len(set(words)) == len(words) >= 16
        assert all(word == word.lower().strip() for word in words)
    assert not set(NAMES) & {*FUNCTIONS, *WORDS, "def", "self", "param"}


# -- greater-than ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["smollm2", "digits"])
def test_greater_than_digit_by_digit(request: pytest.FixtureRequest, model: str) -> None:
    tokenizer = request.getfixturevalue("smollm2") if model == "smollm2" else SmallTokenizer(DIGITS)
    pairs = greater_than(tokenizer, n=200, seed=1)
    assert pairs.task == "greater_than"
    assert set(pairs.positions) == {"YEAR", "TENS", "END"}
    assert (pairs.positions["YEAR"] - pairs.positions["TENS"] == 1).all()
    digits = [tokenizer.to_single_token(str(d)) for d in range(10)]
    tens, ones = ([digits.index(token) for token in at(pairs, name)] for name in ("TENS", "YEAR"))
    assert set(tens) == set(range(1, 9))
    assert set(ones) == set(range(10))
    for i, digit in enumerate(tens):
        assert pairs.right[i] == tuple(digits[digit + 1 :])
        assert pairs.wrong[i] == tuple(digits[:digit])  # the same digit is neither: the one after it would decide
        where = [pairs.positions["TENS"][i], pairs.positions["YEAR"][i]]
        assert differing(pairs)[i] == [int(p) for p in where[: 1 if ones[i] == 1 else 2]]
    assert {*at(pairs, "TENS", "corrupted")} == {digits[0]}
    assert {*at(pairs, "YEAR", "corrupted")} == {digits[1]}


def test_greater_than_with_two_digit_tokens() -> None:
    tokenizer = SmallTokenizer()
    pairs = greater_than(tokenizer, n=400, seed=1)
    assert set(pairs.positions) == {"YEAR", "END"}
    years = [tokenizer.to_single_token(f"{y:02d}") for y in range(100)]
    start = [years.index(token) for token in at(pairs, "YEAR")]
    assert min(start) == 2
    assert max(start) == 98
    for i, year in enumerate(start):
        assert pairs.right[i] == tuple(years[year + 1 :])
        assert pairs.wrong[i] == tuple(years[: year + 1])
        assert differing(pairs)[i] == [int(pairs.positions["YEAR"][i])]
    assert {*at(pairs, "YEAR", "corrupted")} == {years[1]}
    assert "1700" not in tokenizer.to_str_tokens(torch.cat(pairs.clean.tokens))


def test_greater_than_reads_as_written(smollm2: HookedModel) -> None:
    pairs = greater_than(smollm2, n=20, seed=2, prepend_bos=False)
    for clean, corrupted in zip(text_of(pairs), text_of(pairs, "corrupted"), strict=True):
        found = re.fullmatch(r"The ([a-z ]+) lasted from the year 17([1-8]\d) to the year 17", clean)
        assert found is not None
        assert found[1] in NOUNS
        assert corrupted == f"The {found[1]} lasted from the year 1701 to the year 17"


@pytest.mark.parametrize("numbers", [THREE_DIGITS, r"\d+", r"1732|\d"])
def test_greater_than_refuses_other_ways_of_writing_years(numbers: str) -> None:
    with pytest.raises(
        ValueError, match=r"model: expected a tokenizer that writes the last two digits .*this one writes 'The war"
    ):
        greater_than(SmallTokenizer(numbers))


def test_greater_than_leaves_out_years_that_are_written_otherwise() -> None:
    """As in the 18th century with GPT-2: some years are one token, and are not used."""
    some = [f"{y:02d}" for y in range(40, 99)]
    tokenizer = SmallTokenizer("|".join(f"17{year}" for year in some) + f"|{TWO_DIGITS}")
    pairs = greater_than(tokenizer, n=300)
    assert {*tokenizer.to_str_tokens(torch.tensor(at(pairs, "YEAR")))} == {f"{y:02d}" for y in (*range(2, 40),)}
    with pytest.raises(ValueError, match="model: expected a tokenizer that writes the last two digits"):
        greater_than(SmallTokenizer(f"1701|{TWO_DIGITS}"))  # the corrupted prompt's own year


def test_greater_than_refuses_where_the_year_cannot_be_found() -> None:
    with pytest.raises(
        ValueError, match=r"pair 0: expected clean and corrupted prompt to differ at the digits of the year"
    ):
        greater_than(SmallTokenizer(DIGITS, joins=r"\d to"), n=4)


def test_greater_than_repeats_only_when_there_is_no_more() -> None:
    tokenizer = SmallTokenizer()
    n = 97 * len(NOUNS)
    texts = text_of(greater_than(tokenizer, n=n + 3))
    assert len(set(texts[:n])) == n
    assert texts[n:] == texts[:3]


def test_smollm2_knows_what_is_greater_and_the_corruption_takes_that_away(smollm2: HookedModel) -> None:
    pairs = greater_than(smollm2, n=48, seed=0)
    metric = prob_diff(pairs)
    clean, corrupted = (score(final_logits(smollm2, pairs, side), metric) for side in ("clean", "corrupted"))
    assert clean.mean() > 0.5
    assert (clean > 0).float().mean() >= 0.95
    assert corrupted.mean() < 0
    assert (clean > corrupted).float().mean() >= 0.95


# -- docstring ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["random_doc", "random_def", "both"])
def documented(request: pytest.FixtureRequest, smollm2: HookedModel) -> tuple[str, PromptPairs]:
    return request.param, docstring(smollm2, n=48, seed=1, corruption=request.param)


def test_docstring_positions_answers_and_corruption(smollm2: HookedModel, documented: tuple[str, PromptPairs]) -> None:
    corruption, pairs = documented
    assert pairs.task == "docstring"
    assert set(pairs.positions) == {"A_def", "B_def", "C_def", "A_doc", "B_doc", "END"}
    a, b, c = (at(pairs, f"{name}_def") for name in "ABC")
    assert at(pairs, "A_doc") == a
    assert at(pairs, "B_doc") == b
    assert pairs.right == tuple((token,) for token in c)
    assert all((pairs.positions[first] < pairs.positions[second]).all() for first, second in
               (("A_def", "B_def"), ("B_def", "C_def"), ("C_def", "A_doc"), ("A_doc", "B_doc"), ("B_doc", "END")))  # fmt: skip
    names = {smollm2.to_single_token(f" {name}") for name in NAMES if _is_single(smollm2, name)}
    for i, tokens in enumerate(pairs.clean.tokens):
        named = [int(token) for token in tokens if int(token) in names]
        assert len(named) == 8
        assert named[6:] == [a[i], b[i]] == named[2:4]
        assert set(pairs.wrong[i]) == set(named) - {c[i]}
        assert len(pairs.wrong[i]) == 5
        changed = [int(pairs.positions[name][i]) for name in CHANGED[corruption]]
        assert differing(pairs)[i] == changed
        new = [int(pairs.corrupted.tokens[i][p]) for p in changed]
        assert len(set(new)) == len(new)
        assert set(new) <= names - set(named)


def _is_single(model: HookedModel, name: str) -> bool:
    return len(model.tokenizer.encode(f" {name}", add_special_tokens=False)) == 1


def test_docstring_reads_as_written(smollm2: HookedModel) -> None:
    pattern = re.compile(
        r'def (\w+)\(self, (\w+), (\w+), (\w+), (\w+), (\w+), (\w+)\):\n    """(\w+) (\w+)\n\n'
        r"    :param (\w+): (\w+) (\w+)\n    :param (\w+): (\w+) (\w+)\n    :param"
    )
    pairs = docstring(smollm2, n=12, seed=3, corruption="both", prepend_bos=False)
    for i, (clean, corrupted) in enumerate(zip(text_of(pairs), text_of(pairs, "corrupted"), strict=True)):
        found, other = pattern.fullmatch(clean), pattern.fullmatch(corrupted)
        assert found is not None
        assert other is not None
        assert (found[4], found[5]) == (found[10], found[13])
        assert smollm2.to_string(list(pairs.right[i])) == f" {found[6]}"
        for group in (1, 2, 3, 7, 8, 9, 11, 12, 14, 15):
            assert found[group] == other[group]
        for group in (4, 5, 6, 10, 13):
            assert found[group] != other[group]
            assert other[group] not in found.groups()


def test_docstring_prompts_do_not_depend_on_the_corruption(smollm2: HookedModel) -> None:
    made = [MAKE[corruption](smollm2, 12, seed=4) for corruption in CHANGED]
    assert len({pairs.clean.hash() for pairs in made}) == 1
    assert len({pairs.corrupted.hash() for pairs in made}) == 3
    assert len({pairs.answers for pairs in made}) == 1


def test_docstring_refuses() -> None:
    with pytest.raises(ValueError, match="corruption: expected one of 'random_doc', 'random_def', 'both'; got 'doc'"):
        docstring(SmallTokenizer(), corruption="doc")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=rf"model: expected .*at least 11 of the {len(NAMES)} argument names.*got 10: "
    ):
        docstring(SmallTokenizer(single=NAMES[:10]))
    assert len(docstring(SmallTokenizer(single=NAMES[:11]), n=4)) == 4  # eleven will do
    with pytest.raises(ValueError, match=r"expected each argument once .*The tokenizer joins names to what is around"):
        docstring(SmallTokenizer(joins=r"\w+:"))


def test_docstring_uses_names_of_one_token_alone() -> None:
    single = NAMES[5:17]
    pairs = docstring(SmallTokenizer(single=single), n=40, corruption="both")
    named = {word for side in ("clean", "corrupted") for row in getattr(pairs, side).str_tokens for word in row}
    assert named & set(NAMES) == set(single)


def test_smollm2_solves_the_docstring_task_and_the_corruptions_take_that_away(smollm2: HookedModel) -> None:
    pairs = {corruption: MAKE[corruption](smollm2, 12, seed=0) for corruption in CHANGED}
    metrics = logit_diff(pairs["both"]), accuracy(pairs["both"])  # the answers do not depend on the corruption
    logits = final_logits(smollm2, pairs["both"], "clean")
    difference, right = (score(logits, metric) for metric in metrics)
    assert difference.mean() > 2.5
    assert (difference > 0).float().mean() >= 0.9
    assert right.mean() > 0.5  # the best of six; chance is 1/6
    for corruption, made in pairs.items():
        logits = final_logits(smollm2, made, "corrupted")
        difference, right = (score(logits, metric) for metric in metrics)
        assert difference.mean() < 0.5, corruption
        assert right.mean() < 0.2, corruption
