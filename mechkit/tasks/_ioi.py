"""Indirect object identification (Wang et al. 2022, https://arxiv.org/abs/2211.00593).

"After Mary and John met at the park, John handed a book to" continues with " Mary": the indirect object (IO), the name
that was said once, and not the subject (S), which was said twice.

1. Keep the names that are one token each for this model.
2. Draw IO, S, a third name C, a place and an object for each prompt. Templates take turns, and so do the two orders
   of the first two names: ABBA (IO first) and BABA (S first).
3. Corrupt by writing another name where S is said the second time (S2).
4. Find the names among the tokens, so that positions hold for any tokenizer and prompts of any length.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from mechkit.prompts import PromptPairs, Prompts, Tokenizes


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
        corruption: What stands in place of S2. `"name"`: a third name, so that no name is said twice and nothing tells
            the answers apart. `"swap"`: the IO's name, so that the wrong answer becomes the right one.
        prepend_bos: Whether to begin with the beginning-of-sequence token; `None` is the model's default.
        templates: Your own instead of the built-in ones. Each has `{A}`, `{B}` (the two names in either order) and `{S}`
            once, after a space, perhaps `{place}` and `{object}`, and ends just before the answer, without a space.

    Returns:
        Pairs with `positions` IO, S1, `S1+1` (the token after S1), S2 and END, which hold for the clean prompt. The
        corrupted prompt differs at S2 and nowhere else.

    Raises:
        ValueError: `n` below 1, an unknown corruption, a template that lacks a name, a model without a tokenizer, or
            one to which fewer than three of the names are single tokens.

    Example:
        >>> pairs = mk.tasks.ioi(model, n=32)
        >>> pairs.clean.str_tokens[0][pairs.positions["S2"][0]] == pairs.clean.str_tokens[0][pairs.positions["S1"][0]]
        True
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 pair, got {n}")
    if corruption not in ("name", "swap"):
        raise ValueError(f"corruption: expected 'name' or 'swap', got {corruption!r}")
    if getattr(model, "tokenizer", model) is None:
        raise ValueError("model: expected one with a tokenizer, because the prompts are text; this one has none")
    ids = _single_token_names(model)
    shuffled = _checked_templates(TEMPLATES if templates is None else templates)
    rng = random.Random(seed)
    rng.shuffle(shuffled)

    clean, corrupted, trios = [], [], []
    for i in range(n):
        template = shuffled[i % len(shuffled)]
        abba = (i + i // len(shuffled)) % 2 == 0  # alternates, and swaps at each round of the templates
        for _ in range(100):  # until it is a new prompt; with very few names there may be none left
            io, s, c = rng.sample(sorted(ids), 3)
            words = {"A": io if abba else s, "B": s if abba else io}
            words |= {"place": rng.choice(PLACES), "object": rng.choice(OBJECTS)}
            text = template.format(S=s, **words)
            if text not in clean:
                break
        s2 = c if corruption == "name" else io
        clean.append(text)
        corrupted.append(template.format(S=s2, **words))
        trios.append((ids[io], ids[s], ids[s2]))

    clean_prompts, corrupted_prompts = (Prompts.from_text(model, texts, prepend_bos) for texts in (clean, corrupted))
    positions: dict[str, list[int]] = {"IO": [], "S1": [], "S1+1": [], "S2": []}
    for a, b, (io_id, s_id, s2_id) in zip(clean_prompts.tokens, corrupted_prompts.tokens, trios, strict=True):
        for name, position in _find_names(a, b, io_id, s_id, s2_id).items():
            positions[name].append(position)
    answers = [(io_id, s_id) for io_id, s_id, _ in trios]
    return PromptPairs.from_tokens(
        clean_prompts, corrupted_prompts, answers, model=model, positions=positions, task="ioi"
    )


def _single_token_names(model: Tokenizes) -> dict[str, int]:
    """The names that are one token after a space, with its id. Names that share an id (unknown words do) are left out."""
    ids = {}
    for name in NAMES:
        try:
            ids[name] = model.to_single_token(f" {name}")
        except ValueError:
            continue
    uses = Counter(ids.values())
    ids = {name: token for name, token in ids.items() if uses[token] == 1}
    if len(ids) < 3:
        raise ValueError(
            f"model: expected a tokenizer to which at least 3 of the {len(NAMES)} names are single tokens (with a space "
            f"before them); got {len(ids)}: {', '.join(ids) or 'none'}. Build pairs with PromptPairs.from_text instead"
        )
    return ids


def _checked_templates(templates: Sequence[str]) -> list[str]:
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates: expected a non-empty list of templates, got {templates!r}")
    for i, template in enumerate(templates):
        if any(template.count(name) != 1 or f" {name}" not in template for name in ("{A}", "{B}", "{S}")):
            raise ValueError(f"templates[{i}]: expected {{A}}, {{B}} and {{S}} once each, after a space; got {template!r}")
        if template != template.rstrip():
            raise ValueError(f"templates[{i}]: expected no space at the end, since answers begin with it; got {template!r}")
        try:
            template.format(A="", B="", S="", place="", object="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"templates[{i}]: expected no fields but A, B, S, place and object; got {template!r} ({error!r})"
            ) from None
    return list(templates)


def _find_names(clean: Tensor, corrupted: Tensor, io: int, s: int, s2: int) -> dict[str, int]:
    """Where the names are, from the tokens. A tokenizer that joins a name to its neighbours is refused."""
    said_io, said_s = ((clean == token).nonzero().flatten().tolist() for token in (io, s))
    expected = clean.clone()
    if len(said_s) == 2:
        expected[said_s[1]] = s2
    if len(said_io) != 1 or len(said_s) != 2 or not expected.equal(corrupted):
        raise ValueError(
            f"model: expected its tokenizer to keep each name one token inside a prompt, with IO (token {io}) once, S "
            f"(token {s}) twice and token {s2} in place of the second S in the corrupted prompt; got {clean.tolist()} and "
            f"{corrupted.tolist()}"
        )
    return {"IO": said_io[0], "S1": said_s[0], "S1+1": said_s[0] + 1, "S2": said_s[1]}


# Names stand after a space, never at the start, where many tokenizers write a word differently.
TEMPLATES = (
    "After {A} and {B} met at the {place}, {S} handed a {object} to",
    "While {A} and {B} were waiting outside the {place}, {S} passed the {object} to",
    "This morning {A} and {B} walked to the {place} together. On the way there, {S} gave a {object} to",
    "Last summer {A} and {B} both worked at the {place}. Before going home, {S} gave a {object} to",
    "The {place} was almost empty when {A} and {B} arrived, so {S} showed the {object} to",
    "It was raining, and {A} sat next to {B} in the {place}. Then {S} offered a {object} to",
    "Everyone in the {place} saw {A} and {B} laughing when {S} threw a {object} to",
    "Nobody noticed {A} and {B} in the {place}, not even when {S} sold a {object} to",
    "At the back of the {place}, {A} and {B} found an old {object}, and {S} gave it to",
    "Once {A} and {B} had left the {place}, {S} returned the {object} to",
    "In a corner of the {place} stood {A} and {B}. Without a word, {S} slipped a {object} to",
    "Yesterday {A} had lunch with {B} near the {place}, and in the evening {S} sent a {object} to",
    "Two friends of mine, {A} and {B}, took the train to the {place}, where {S} lent a {object} to",
    "Tired from a long day at the {place}, {A} and {B} went home, and {S} told a story to",
    "Because {A} had never been to the {place}, {B} came along as well, and {S} brought a {object} for",
    "The teacher asked {A} and {B} to tidy the {place}, so {S} carried the {object} to",
)

NAMES = tuple(
    """Adam Alan Alex Alice Amy Andrew Anna Anthony Ben Brian Carl Carol Charles Chris Daniel David Diana Edward Elizabeth
    Emily Emma Eric Eva Frank Fred Gary George Helen Henry Ian Jack James Jane Jason Jennifer Jeremy Jessica Jim Joe John
    Jonathan Joseph Julia Karen Kate Kelly Kevin Laura Linda Lisa Louis Lucy Marie Maria Martin Mary Matthew Michael Mike
    Nancy Nicole Oliver Patrick Paul Peter Philip Rachel Rebecca Richard Robert Roger Ryan Sam Sarah Simon Stephen Steven
    Susan Thomas Tim Tom Tony Victoria William""".split()
)

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
