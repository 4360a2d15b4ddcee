"""Greater-than (Hanna, Liu and Variengien 2023, https://arxiv.org/abs/2305.00586).

"The drought lasted from the year 1732 to the year 17" continues with a year after 32.

1. See how the tokenizer writes the last two digits of a year: as one token (GPT-2), or digit by digit (SmolLM2, Gemma, Llama 2).
2. Draw a noun and a start year YY for each prompt.
3. Corrupt by writing 01 in place of YY, after which nearly every year is later.
4. Answers. Two-digit tokens: all years above YY are right, and all others, YY itself too, are wrong. Single digits: the
   next token is the tens digit. One above that of YY is right and one below is wrong; the same digit is neither, because
   the digit after it would decide. YY is drawn from 10 to 89, so that there are digits on both sides.
"""

from __future__ import annotations

import random

from mechkit._check import checked
from mechkit.prompts import PromptPairs, Prompts, Tokenizes
from mechkit.tasks._words import check_arguments

CORRUPTED = "01"
STEM = "The war lasted from the year 17"  # shows how a tokenizer splits years; any noun would do


@checked
def greater_than(
    model: Tokenizes,
    n: int = 32,
    *,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> PromptPairs:
    """Greater-than prompts, their corrupted partners, and the answers: many right and many wrong ones for each prompt.

    The paper's metric is `mk.prob_diff(pairs)`: the probability of all right answers minus that of all wrong ones.

    Args:
        model: Tokenizes; a `HookedModel`.
        n: How many pairs.
        seed: The same arguments and seed give the same pairs.
        prepend_bos: Whether to begin with the beginning-of-sequence token; `None` is the model's default.

    Returns:
        Pairs with `positions` YEAR (the last token of the start year) and END. The pair differs at YEAR alone. Where digits
        are tokens there is also TENS (the start year's tens digit), and the pair differs there and, unless YY ends with
        1, at YEAR. The answers are those of the clean prompt. No prompt comes twice unless nouns and years run out.

    Raises:
        ValueError: `n` below 1, a model without a tokenizer, or one that writes years neither way (in groups of three
            digits, say).

    Example:
        >>> pairs = mk.tasks.greater_than(model, n=32)
        >>> mk.activation_patching(model, pairs, mk.prob_diff(pairs), site="mlp_out", over="layer")
    """
    check_arguments(model, n)
    by_digit = _writes_digit_by_digit(model)
    years = [f"{y:02d}" for y in (range(10, 90) if by_digit else range(2, 99)) if _fits(model, f"{y:02d}", by_digit)]
    if not years or not _fits(model, CORRUPTED, by_digit):
        raise ValueError(_unsuitable(model))
    drawn = _draw(years, n, seed)
    texts = [f"The {noun} lasted from the year 17{year}" for noun, year in drawn]
    starts = Prompts.from_text(model, texts, prepend_bos)
    clean = Prompts.from_text(model, [f"{text} to the year 17" for text in texts], prepend_bos)
    corrupted = [f"{text[:-2]}{CORRUPTED} to the year 17" for text in texts]
    positions = {"YEAR": (starts.lengths - 1).tolist()}
    if by_digit:
        positions["TENS"] = (starts.lengths - 2).tolist()
    ids = _answers(model, by_digit)
    pairs = PromptPairs.from_tokens(
        clean,
        Prompts.from_text(model, corrupted, prepend_bos),
        [_right_and_wrong(ids, int(year[0] if by_digit else year), by_digit) for _, year in drawn],
        model=model,
        positions=positions,
        task="greater_than",
    )
    _check(pairs, starts, [year for _, year in drawn], by_digit)
    return pairs


def _writes_digit_by_digit(model: Tokenizes) -> bool:
    written = _continuation(model, "32")
    if written is None or len(written) > 2 or (len(written) == 2 and written[:1] != _continuation(model, "3")):
        raise ValueError(_unsuitable(model))
    return len(written) == 2


def _continuation(model: Tokenizes, digits: str) -> list[int] | None:
    """The tokens that `digits` add to `STEM`; `None` where they change what stands before them."""
    before, whole = (model.to_tokens(text, prepend_bos=False)[0].tolist() for text in (STEM, STEM + digits))
    return whole[len(before) :] if whole[: len(before)] == before else None


def _fits(model: Tokenizes, year: str, by_digit: bool) -> bool:
    """Whether this year is written as others are (1700, say, is one token in GPT-2)."""
    written = _continuation(model, year)
    return written is not None and len(written) == (2 if by_digit else 1)


def _answers(model: Tokenizes, by_digit: bool) -> list[int]:
    """The token of each digit 0 to 9, or of each pair of digits 00 to 99."""
    ids: list[int] = []
    for digits in (str(d) for d in range(10)) if by_digit else (f"{y:02d}" for y in range(100)):
        written = _continuation(model, digits)
        if written is None or len(written) != 1:  # 1700 may be one token: then as it is by itself
            try:
                written = [model.to_single_token(digits)]
            except ValueError:
                raise ValueError(_unsuitable(model)) from None
        ids += written
    if len(set(ids)) < len(ids):
        raise ValueError(_unsuitable(model))
    return ids


def _right_and_wrong(ids: list[int], start: int, by_digit: bool) -> tuple[list[int], list[int]]:
    return ids[start + 1 :], ids[:start] if by_digit else ids[: start + 1]


def _unsuitable(model: Tokenizes) -> str:
    whole = model.to_str_tokens(model.to_tokens(f"{STEM}32", prepend_bos=False)[0])
    return (
        "model: expected a tokenizer that writes the last two digits of a year as one token, or each digit as one token; "
        f"this one writes {STEM + '32'!r} as {whole}. Build pairs with PromptPairs.from_text instead"
    )


def _draw(years: list[str], n: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    everything = [(noun, year) for noun in NOUNS for year in years]
    rng.shuffle(everything)
    return [everything[i % len(everything)] for i in range(n)]


def _check(pairs: PromptPairs, starts: Prompts, years: list[str], by_digit: bool) -> None:
    """The prompt begins with the tokens of its beginning, and the pair differs at the year's digits alone."""
    rows = zip(pairs.clean.tokens, pairs.corrupted.tokens, starts.tokens, years, strict=True)
    for i, (clean, corrupted, start, year) in enumerate(rows):
        end = len(start) - 1
        differing = [end - 1, end] if by_digit else [end]
        if year[1] == CORRUPTED[1] and by_digit:
            differing = [end - 1]
        found = (clean != corrupted).nonzero().flatten().tolist()
        if found != differing or clean[: len(start)].tolist() != start.tolist():
            raise ValueError(
                f"pair {i}: expected clean and corrupted prompt to differ at the digits of the year ({differing}) alone; they "
                f"differ at {found}. The tokenizer joins digits to what is around them: {clean.tolist()} and {corrupted.tolist()}"
            )


NOUNS = (
    "drought", "famine", "siege", "epidemic", "rebellion", "truce", "monsoon", "migration", "friendship", "lawsuit",
    "voyage", "festival", "strike", "blockade", "partnership", "exile", "harvest", "winter", "romance", "pilgrimage",
    "occupation", "crisis", "trial", "experiment", "renovation", "tour", "marriage", "quarrel", "boycott", "gold rush",
    "debate", "custom", "peace", "ceasefire", "feud", "journey", "quarantine", "reign", "alliance", "inquiry",
)  # fmt: skip
