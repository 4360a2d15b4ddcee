"""Indirect object identification (Wang et al. 2022, https://arxiv.org/abs/2211.00593).

"After Mary and John met at the park, John handed a book to" continues with " Mary": the indirect object (IO), the name
that occurs once, and not the subject (S), which occurs twice.

1. Keep the names that are one token each for this model.
2. Draw IO, S, a third name C, a place and an object for each prompt. Templates take turns, and so do the two orders
   of the first two names: ABBA (IO first) and BABA (S first).
3. Corrupt by writing another name where S occurs the second time (S2).
4. Find the names among the tokens, so that positions hold for any tokenizer and prompts of any length.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mechkit._check import checked
from mechkit.prompts import PromptPairs, Prompts, Tokenizes
from mechkit.tasks._words import check_arguments, check_differences, places_of, single_token_words


@checked
def ioi(
    model: Tokenizes,
    n: int = 32,
    *,
    seed: int = 0,
    corruption: Literal["name", "swap"] = "name",
    prepend_bos: bool | None = None,
    templates: Sequence[str] | None = None,
) -> PromptPairs:
    """IOI prompts, their corrupted partners, and the answers: IO's name is right and S's is wrong.

    As many prompts are ABBA as BABA, and every template is used equally often, as far as `n` allows. No prompt comes
    twice unless templates and names run out.

    Args:
        model: Tokenizes; a `HookedModel`.
        n: How many pairs.
        seed: The same arguments and seed give the same pairs.
        corruption: What stands in place of S2. `"name"`: a third name, so that no name occurs twice and nothing
            distinguishes the answers. `"swap"`: the IO's name, so that the wrong answer becomes the right one.
        prepend_bos: Whether to begin with the beginning-of-sequence token; `None` is the model's default.
        templates: Your own instead of the built-in ones. Each has `{A}` and `{B}` (the two names in either order) and
            then `{S}`, once each and with a space before; perhaps `{place}` and `{object}`; and it ends just before
            the answer, without a space.

    Returns:
        Pairs with `positions` IO, S1, `S1+1` (the token after S1), S2 and END, which hold for the clean prompt. The
        corrupted prompt differs at S2 and nowhere else.

    Raises:
        ValueError: `n` below 1, an unknown corruption, a template that does not fit, a model without a tokenizer, or
            one to which fewer than three of the names are single tokens.

    Example:
        >>> pairs = mk.tasks.ioi(model, n=32)
        >>> pairs.clean.str_tokens[0][pairs.positions["S2"][0]] == pairs.clean.str_tokens[0][pairs.positions["S1"][0]]
        True
    """
    check_arguments(model, n)
    if corruption not in ("name", "swap"):
        raise ValueError(f"corruption: expected 'name' or 'swap', got {corruption!r}")
    ids = single_token_words(model, NAMES, at_least=3, kind="names")
    drawn = _draw(sorted(ids), _checked_templates(TEMPLATES if templates is None else templates), n, seed)
    clean, corrupted = [], []
    for d in drawn:
        clean.append(d.text(d.s))
        corrupted.append(d.text(d.c if corruption == "name" else d.io))
    prompts = Prompts.from_text(model, clean, prepend_bos)
    positions: dict[str, list[int]] = {"IO": [], "S1": [], "S1+1": [], "S2": []}
    for d, tokens, text in zip(drawn, prompts.tokens, clean, strict=True):
        for name, position in _find_names(tokens, ids[d.io], ids[d.s], text).items():
            positions[name].append(position)
    pairs = PromptPairs.from_tokens(
        prompts,
        Prompts.from_text(model, corrupted, prepend_bos),
        [(ids[d.io], ids[d.s]) for d in drawn],
        model=model,
        positions=positions,
        task="ioi",
    )
    check_differences(pairs, ["S2"])
    return pairs


@dataclass(frozen=True)
class _Drawn:
    """One filled template: everything but the name at S2."""

    io: str
    s: str
    c: str
    abba: bool
    template: str
    place: str
    object: str

    def text(self, s2: str) -> str:
        first, second = (self.io, self.s) if self.abba else (self.s, self.io)
        return self.template.format(A=first, B=second, S=s2, place=self.place, object=self.object)


def _draw(names: list[str], templates: list[str], n: int, seed: int) -> list[_Drawn]:
    rng = random.Random(seed)
    rng.shuffle(templates)
    drawn: dict[int, _Drawn] = {}
    seen: set[str] = set()
    for i in range(n):
        turn, template = divmod(i, len(templates))
        abba = (turn + template) % 2 == 0  # a template has the other order at its next turn
        for _ in range(100):  # until it is a new prompt; with few names there may be none left
            io, s, c = rng.sample(names, 3)
            drawn[i] = _Drawn(io, s, c, abba, templates[template], rng.choice(PLACES), rng.choice(OBJECTS))
            if drawn[i].text(s) not in seen:
                break
        seen.add(drawn[i].text(drawn[i].s))
    return list(drawn.values())


def _checked_templates(templates: Sequence[str]) -> list[str]:
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates: expected a non-empty list of templates, got {templates!r}")
    for i, template in enumerate(templates):
        if problem := _problem(template):
            raise ValueError(f"templates[{i}]: expected {problem}; got {template!r}")
    return list(templates)


def _problem(template: str) -> str:
    if any(template.count(f) != 1 or f" {f}" not in template for f in ("{A}", "{B}", "{S}")):
        return "{A}, {B} and {S} once each, with a space before them"
    if template.index("{S}") < max(template.index("{A}"), template.index("{B}")):
        return "{S} after both {A} and {B}"
    if template != template.rstrip():
        return "no space at the end, because the answers begin with one"
    try:
        template.format(A="", B="", S="", place="", object="")
    except (KeyError, IndexError, ValueError) as error:
        return f"no fields but A, B, S, place and object ({error!r})"
    return ""


def _find_names(tokens: Tensor, io: int, s: int, text: str) -> dict[str, int]:
    """Where the names are, from the tokens."""
    places_io, places_s = places_of(tokens, io), places_of(tokens, s)
    if len(places_io) != 1 or len(places_s) != 2:
        raise ValueError(
            f"expected one name once and one twice among the tokens of {text!r}; got tokens {io} and {s} "
            f"{len(places_io)} and {len(places_s)} times in {tokens.tolist()}. Either the tokenizer joins names to the "
            "words around them, or the template contains a name itself"
        )
    return {"IO": places_io[0], "S1": places_s[0], "S1+1": places_s[0] + 1, "S2": places_s[1]}


# Names stand after a space, never at the start, where many tokenizers write a word differently.
TEMPLATES = (
    "After {A} and {B} met at the {place}, {S} decided to give a {object} to",
    "While {A} and {B} were waiting outside the {place}, {S} offered the {object} to",
    "This morning {A} and {B} walked to the {place} together. On the way there, {S} gave a {object} to",
    "Last summer {A} and {B} both worked at the {place}. Before going home, {S} gave a {object} to",
    "The {place} was almost empty when {A} and {B} arrived, so {S} gave the {object} to",
    "It was raining, and {A} sat next to {B} in the {place}. Then {S} offered a {object} to",
    "Everyone in the {place} saw {A} and {B} laughing when {S} threw a {object} to",
    "At the back of the {place}, {A} and {B} found an old {object}, and {S} gave it to",
    "In a corner of the {place} stood {A} and {B}. Without a word, {S} slipped a {object} to",
    "Yesterday {A} had lunch with {B} near the {place}. Later that day, {S} gave a {object} to",
    "Two friends of mine, {A} and {B}, took the train to the {place}, where {S} lent a {object} to",
    "Tired from a long day at the {place}, {A} and {B} went home, and {S} told a story to",
    "Even though {A} and {B} had only just met at the {place}, {S} wanted to give a {object} to",
    "The teacher sent {A} and {B} to the {place}. When they got there, {S} handed the {object} to",
    "Everybody knows that {A} and {B} argued at the {place}, and that afterwards {S} apologized to",
    "It was getting dark at the {place}, and {A} and {B} were cold. So {S} gave a {object} to",
)

NAMES = (
    "Adam", "Alan", "Alex", "Alice", "Amy", "Andrew", "Anna", "Anthony", "Ben", "Brian", "Carl", "Carol", "Charles",
    "Chris", "Daniel", "David", "Diana", "Edward", "Elizabeth", "Emily", "Emma", "Eric", "Eva", "Frank", "Fred",
    "Gary", "George", "Helen", "Henry", "Ian", "Jack", "James", "Jane", "Jason", "Jennifer", "Jeremy", "Jessica",
    "Jim", "Joe", "John", "Jonathan", "Joseph", "Julia", "Karen", "Kate", "Kelly", "Kevin", "Laura", "Linda",
    "Lisa", "Louis", "Lucy", "Marie", "Maria", "Martin", "Mary", "Matthew", "Michael", "Mike", "Nancy", "Nicole",
    "Oliver", "Patrick", "Paul", "Peter", "Philip", "Rachel", "Rebecca", "Richard", "Robert", "Roger", "Ryan",
    "Sam", "Sarah", "Simon", "Stephen", "Steven", "Susan", "Thomas", "Tim", "Tom", "Tony", "Victoria", "William",
)  # fmt: skip

PLACES = (
    "park", "market", "museum", "library", "hospital", "restaurant", "bakery", "train station", "garden", "theater",
    "swimming pool", "post office", "zoo", "harbor", "castle", "gym", "bookshop", "town hall", "farm", "football field",
    "coffee shop", "beach", "bus stop", "church",
)  # fmt: skip

OBJECTS = (
    "book", "basket", "camera", "ring", "sandwich", "ticket", "guitar", "bottle of water", "key", "map", "postcard",
    "lamp", "pencil", "jacket", "box of chocolates", "toy", "flashlight", "necklace", "bicycle", "painting", "blanket",
    "cup of tea", "knife", "newspaper",
)  # fmt: skip
