"""What the tasks made of text share: which words are single tokens, and their positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from mechkit.prompts import PromptPairs, Tokenizes

_MOST = 100_000  # pairs


def check_arguments(model: Tokenizes, n: int) -> None:
    """Raises `ValueError` for `n` below 1 or above 100,000, and for a model without a tokenizer."""
    if not 1 <= n <= _MOST:
        raise ValueError(f"n: expected 1 to {_MOST:,} pairs, got {n:,}")
    if getattr(model, "tokenizer", model) is None:
        raise ValueError("model: expected one with a tokenizer, because the prompts are text; this one has none")


def single_token_words(model: Tokenizes, words: Sequence[str], *, at_least: int, kind: str) -> dict[str, int]:
    """The words that are one token after a space, and its id. Those that share one (unknown words do) are left out.

    Raises:
        ValueError: there are fewer than `at_least` of them. `kind` says what they are ("names").
    """
    ids = {}
    for word in words:
        try:
            ids[word] = model.to_single_token(f" {word}")
        except ValueError:
            continue
    uses = Counter(ids.values())
    ids = {word: token for word, token in ids.items() if uses[token] == 1}
    if len(ids) < at_least:
        raise ValueError(
            f"model: expected a tokenizer to which at least {at_least} of the {len(words)} {kind}, with a space before them, are "
            f"single tokens; got {len(ids)}: {', '.join(ids) or 'none'}. Build pairs with PromptPairs.from_text instead"
        )
    return ids


def places_of(tokens: Tensor, token: int) -> list[int]:
    """The positions of a token."""
    found: list[int] = (tokens == token).nonzero().flatten().tolist()
    return found


def check_differences(pairs: PromptPairs, names: Sequence[str]) -> None:
    """Raises `ValueError` unless each corrupted prompt differs from the clean one at the positions `names` and nowhere else."""
    for i, (clean, corrupted) in enumerate(zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)):
        expected = sorted(int(pairs.positions[name][i]) for name in names)
        if (different := (clean != corrupted).nonzero().flatten().tolist()) != expected:
            where = ", ".join(names) + f" ({', '.join(map(str, expected))})"
            raise ValueError(
                f"pair {i}: expected the corrupted prompt to differ at {where} alone; it differs at {different}. "
                f"The tokenizer joins names to the words around them: {clean.tolist()} and {corrupted.tolist()}"
            )
