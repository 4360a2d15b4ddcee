"""IOI prompts: balanced, seeded, with exact positions, and SmolLM2 solves them. Real tokenizer and one of words."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.fake_tokenizer import FakeTokenizer
from mechkit import HookedModel, PromptPairs, logit_diff
from mechkit.tasks import ioi
from mechkit.tasks._ioi import NAMES, OBJECTS, PLACES, TEMPLATES

# Differ in what they name, where they put it and how long they are; the first names no place and no object.
OWN = ("So {A} met {B} and {S} spoke to", "In the {place} stood {A} by {B} . Then {S} gave a {object} to")


class WordTokenizer(FakeTokenizer):
    """One token per word or punctuation mark; learns them as they come. Names that are not in `single` are two tokens."""

    def __init__(self, single: tuple[str, ...] = NAMES, joins: str = "", unknown: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.single, self.joins, self.unknown = single, joins, unknown

    def _pieces(self, text: str) -> list[str]:
        pieces = []
        for word in re.findall(r"\w+|[^\w\s]", text):
            split = word in NAMES and word not in self.single
            pieces += [word[:1], word[1:]] if split else ["<unk>"] if word in self.unknown else [word]
        if self.joins:  # one token where `joins` follows a name, as if both were one word
            for i in range(len(pieces) - 1, 0, -1):
                if pieces[i] == self.joins and pieces[i - 1] in NAMES:
                    pieces[i - 1 : i + 1] = [pieces[i - 1] + self.joins]
        return pieces


def text_of(pairs: PromptPairs, side: str = "clean") -> list[str]:
    rows = getattr(pairs, side).str_tokens
    assert rows is not None
    return ["".join(row) for row in rows]


def at(pairs: PromptPairs, name: str, side: str = "clean", shift: int = 0) -> list[int]:
    """The token at a named position of each prompt."""
    rows = getattr(pairs, side).tokens
    return [int(row[i + shift]) for row, i in zip(rows, pairs.positions[name].tolist(), strict=True)]


def differing(pairs: PromptPairs) -> list[list[int]]:
    rows = zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)
    return [(a != b).nonzero().flatten().tolist() for a, b in rows]


def abba(pairs: PromptPairs) -> list[bool]:
    return (pairs.positions["IO"] < pairs.positions["S1"]).tolist()


# -- with the real tokenizer -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["name", "swap"])
def pairs(request: pytest.FixtureRequest, smollm2: HookedModel) -> PromptPairs:
    return ioi(smollm2, n=64, seed=1, corruption=request.param)


def test_positions_are_the_names(smollm2: HookedModel, pairs: PromptPairs) -> None:
    assert list(pairs.positions) == ["IO", "S1", "S1+1", "S2", "END"]
    assert pairs.task == "ioi"
    io, s = at(pairs, "IO"), at(pairs, "S1")
    assert at(pairs, "S2") == s
    assert at(pairs, "S1+1") == at(pairs, "S1", shift=1)
    assert all(a != b for a, b in zip(io, s, strict=True))
    names = {smollm2.to_single_token(f" {name}"): name for name in NAMES}
    assert set(io) | set(s) <= set(names)
    p = pairs.positions
    assert (torch.maximum(p["IO"], p["S1"]) < p["S2"]).all()
    assert (p["S2"] < p["END"]).all()
    assert torch.equal(p["END"], pairs.clean.lengths - 1)
    for row, text in enumerate(text_of(pairs)):
        assert text.count(f" {names[io[row]]}") == 1
        assert text.count(f" {names[s[row]]}") == 2


def test_right_is_the_indirect_object_and_wrong_is_the_subject(pairs: PromptPairs) -> None:
    assert pairs.right == tuple((token,) for token in at(pairs, "IO"))
    assert pairs.wrong == tuple((token,) for token in at(pairs, "S1"))


def test_corrupted_differs_at_s2_alone(pairs: PromptPairs) -> None:
    assert pairs.clean.lengths.tolist() == pairs.corrupted.lengths.tolist()
    assert differing(pairs) == [[i] for i in pairs.positions["S2"].tolist()]
    assert torch.equal(pairs.first_difference, pairs.positions["S2"])


def test_corruption_writes_a_third_name_or_the_indirect_object(smollm2: HookedModel) -> None:
    third, swapped = (ioi(smollm2, n=24, seed=3, corruption=kind) for kind in ("name", "swap"))  # type: ignore[arg-type]
    assert third.clean.hash() == swapped.clean.hash()  # the corruption does not change what is drawn
    assert at(swapped, "S2", "corrupted") == at(swapped, "IO")
    names = {smollm2.to_single_token(f" {name}") for name in NAMES}
    for new, io, s in zip(at(third, "S2", "corrupted"), at(third, "IO"), at(third, "S1"), strict=True):
        assert new in names - {io, s}


@pytest.mark.parametrize("n", [1, 2, 5, 16, 31, 32, 50])
def test_balanced_as_far_as_n_allows(smollm2: HookedModel, n: int) -> None:
    made = ioi(smollm2, n=n)
    assert len(made) == n
    assert abs(2 * sum(abba(made)) - n) <= 1


def test_prompts_are_all_different_and_ragged(pairs: PromptPairs) -> None:
    assert len(set(text_of(pairs))) == len(pairs)
    assert len(pairs.clean.by_length()) >= 5


def test_prompts_read_as_written(smollm2: HookedModel) -> None:
    made = ioi(smollm2, n=2, seed=4, templates=[f" {OWN[1]}"], prepend_bos=False)
    names = [smollm2.to_str_tokens(torch.tensor(ids))[0].strip() for ids in ((r[0],) for r in made.right + made.wrong)]
    for text, io, s, order in zip(text_of(made), names[:2], names[2:], abba(made), strict=True):
        place = next(p for p in PLACES if f"In the {p} stood" in text)
        thing = next(o for o in OBJECTS if text.endswith(f"gave a {o} to"))
        a, b = (io, s) if order else (s, io)
        assert text.strip() == OWN[1].format(A=a, B=b, S=s, place=place, object=thing)


def test_same_seed_same_pairs_and_another_seed_others(smollm2: HookedModel) -> None:
    a, b, c = (ioi(smollm2, n=16, seed=seed) for seed in (5, 5, 6))
    for name in ("clean", "corrupted"):
        assert getattr(a, name).hash() == getattr(b, name).hash()
        assert getattr(a, name).hash() != getattr(c, name).hash()
    assert a.answers == b.answers
    assert all(torch.equal(a.positions[name], b.positions[name]) for name in a.positions)


def test_smollm2_solves_it_and_the_corruption_takes_that_away(smollm2: HookedModel) -> None:
    pairs = ioi(smollm2, n=32, seed=0)
    clean, corrupted = (differences(smollm2, pairs, side) for side in ("clean", "corrupted"))
    assert clean.mean() > 2
    assert (clean > 0).float().mean() >= 0.9
    assert abs(corrupted.mean()) < 1  # nothing distinguishes the two names
    assert (corrupted > 0).float().mean() < 0.75
    swapped = differences(smollm2, ioi(smollm2, n=16, seed=0, corruption="swap"), "corrupted")
    assert swapped.mean() < -2  # the other name is right now
    assert (swapped < 0).float().mean() >= 0.9


def differences(model: HookedModel, pairs: PromptPairs, side: str) -> Tensor:
    prompts, metric = getattr(pairs, side), logit_diff(pairs)
    values = torch.full((len(pairs),), torch.nan)
    with torch.no_grad():
        for rows in prompts.by_length().values():
            logits = model(torch.stack([prompts.tokens[i] for i in rows]))[:, -1]
            values[rows] = metric.read(logits[:, metric.tokens], torch.tensor(rows), None)
    return values


# -- with tokenizers of words ------------------------------------------------------------------------------------------


def templates_used(pairs: PromptPairs) -> Counter[tuple[str, bool]]:
    """How often each template of `OWN` comes in each order; its first word identifies it."""
    assert pairs.clean.str_tokens is not None
    return Counter(zip((row[1] for row in pairs.clean.str_tokens), abba(pairs), strict=True))


@pytest.mark.parametrize("templates", [OWN[:1], OWN, (*OWN, "Now {A} or {B} , and {S} to"), TEMPLATES])
def test_every_template_comes_equally_often_in_either_order(templates: tuple[str, ...]) -> None:
    for n in (2 * len(templates), 6 * len(templates), 6 * len(templates) + 1):
        made = ioi(WordTokenizer(), n=n, templates=templates)
        assert abs(2 * sum(abba(made)) - n) <= 1
        if templates is not TEMPLATES:
            counts = templates_used(made)
            assert len(counts) == 2 * len(templates)
            assert max(counts.values()) - min(counts.values()) <= 1


def test_built_in_lists() -> None:
    assert len(TEMPLATES) >= 12
    assert len(NAMES) >= 60
    for words in (TEMPLATES, NAMES, PLACES, OBJECTS):
        assert len(set(words)) == len(words)
    rest = " ".join((*TEMPLATES, *PLACES, *OBJECTS)).replace(",", " ").replace(".", " ").split()
    assert not {word.lower() for word in rest} & {name.lower() for name in NAMES}  # no name but the three
    assert not [thing for thing in OBJECTS if thing[0] in "aeiou"]  # "a {object}"


def test_only_names_of_one_token_are_used() -> None:
    single = ("Amy", "Ben", "Mary", "Tom")
    made = ioi(WordTokenizer(single), n=40)
    assert made.clean.str_tokens is not None
    names = {word for row in (*made.clean.str_tokens, *(made.corrupted.str_tokens or ())) for word in row} & set(NAMES)
    assert names == set(single)
    assert len(set(text_of(made))) == 40


def test_names_that_the_tokenizer_does_not_know_are_not_used() -> None:
    known = ("Amy", "Ben", "Mary", "Tom")
    made = ioi(WordTokenizer(unknown=tuple(set(NAMES) - set(known))), n=20)
    assert made.clean.str_tokens is not None
    assert {word for row in made.clean.str_tokens for word in row} & {"<unk>", *NAMES} == set(known)


def test_beginning_of_sequence_shifts_positions_by_one() -> None:
    model = WordTokenizer()
    default, with_, without = (ioi(model, n=8, prepend_bos=bos) for bos in (None, True, False))
    assert default.clean.hash() == with_.clean.hash()
    assert (with_.clean.lengths - without.clean.lengths == 1).all()
    for name in ("IO", "S1", "S1+1", "S2", "END"):
        assert (with_.positions[name] - without.positions[name] == 1).all()
        assert at(with_, name) == at(without, name)


def test_prompts_repeat_only_when_there_are_no_more() -> None:
    few = WordTokenizer(("Amy", "Ben", "Tom"))  # 3 × 2 choices of IO and S, in two orders
    assert len(set(text_of(ioi(few, n=12, templates=OWN[:1])))) == 12
    assert len(set(text_of(ioi(few, n=14, templates=OWN[:1])))) == 12


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, r"n: expected 1 to 100,000 pairs, got 0"),
        ({"n": -3}, r"n: expected 1 to 100,000 pairs, got -3"),
        ({"corruption": "names"}, r"corruption: expected 'name' or 'swap', got 'names'"),
        ({"templates": []}, r"templates: expected a non-empty list"),
        ({"templates": OWN[0]}, r"templates: expected a list of strings"),
        ({"templates": [*OWN, "So {A} met {B} and spoke to"]}, r"templates\[2\]: expected \{A\}, \{B\} and \{S\} once"),
        ({"templates": ["So {A} met {B} , {S} and {S} to"]}, r"templates\[0\]: expected \{A\}, \{B\} and \{S\} once"),
        ({"templates": ["{A} met {B} and {S} spoke to"]}, r"templates\[0\]: .*with a space before"),
        ({"templates": ["So {S} met {A} and {B} and gave to"]}, r"templates\[0\]: expected \{S\} after both"),
        ({"templates": ["So {A} met {B} and {S} spoke to "]}, r"templates\[0\]: expected no space at the end"),
        ({"templates": ["So {A} met {B} at {time} ; {S} spoke to"]}, r"templates\[0\]: expected no fields but .*time"),
        ({"templates": ["So {A} met {B} and {} , {S} to"]}, r"templates\[0\]: expected no fields but "),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ioi(WordTokenizer(), **changes)


@pytest.mark.parametrize(("single", "found"), [((), "0: none"), (("Mary", "John"), "2: John, Mary")])
def test_refuses_a_tokenizer_with_fewer_than_three_names(single: tuple[str, ...], found: str) -> None:
    with pytest.raises(ValueError, match=rf"model: expected .*at least 3 of the {len(NAMES)} names.*got {found}\."):
        ioi(WordTokenizer(single))
    assert len(ioi(WordTokenizer(("Mary", "John", "Tom")), n=4)) == 4  # three will do


def test_refuses_a_model_without_a_tokenizer() -> None:
    model = WordTokenizer()
    model.tokenizer = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="model: expected one with a tokenizer"):
        ioi(model)


def test_refuses_where_the_names_cannot_be_found() -> None:
    with pytest.raises(ValueError, match=r"expected one name once and one twice among the tokens of 'So .*joins names"):
        ioi(WordTokenizer(joins="met"), templates=OWN[:1])
    only_three = WordTokenizer(("Amy", "Ben", "Tom"))
    with pytest.raises(ValueError, match=r"once and one twice among .*the template contains a name itself"):
        ioi(only_three, n=12, templates=["So Tom saw {A} and {B} and {S} spoke to"])
