'''The docstring task (Heimersheim and Janiak 2023, https://www.lesswrong.com/posts/u6KXXmKFbXfWzoAXn).

    def find(self, tree, boat, lamp, rain, desk, coin):
        """river early

        :param lamp: green paper
        :param rain: seven stones
        :param

continues with " desk": the docstring goes through the arguments in their order.

1. Keep the names that are one token each for this model.
2. Draw six arguments for each prompt: two that the docstring leaves out, A, B, C, and one more. The docstring has A and B;
   the right answer is C. Draw other names for the corruption.
3. Corrupt by writing the other names in place of A and B in the docstring, of A, B and C in the definition, or both.
4. Find the names among the tokens, so that positions hold for any tokenizer and prompts of any length.
'''

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mechkit._check import checked
from mechkit.prompts import PromptPairs, Prompts, Tokenizes
from mechkit.tasks._words import check_arguments, check_differences, places_of, single_token_words

Corruption = Literal["random_doc", "random_def", "both"]
_CHANGED = {
    "random_doc": ["A_doc", "B_doc"],
    "random_def": ["A_def", "B_def", "C_def"],
    "both": ["A_def", "B_def", "C_def", "A_doc", "B_doc"],
}
_N_ARGUMENTS, _N_OTHERS = 6, 5


@checked
def docstring(
    model: Tokenizes,
    n: int = 32,
    *,
    seed: int = 0,
    corruption: Corruption = "random_doc",
    prepend_bos: bool | None = None,
) -> PromptPairs:
    """Docstring prompts, their corrupted partners, and the answers: C is right, the five other arguments are wrong.

    Args:
        model: Tokenizes; a `HookedModel`.
        n: How many pairs.
        seed: The same arguments and seed give the same pairs. The clean prompts do not depend on the corruption.
        corruption: Which names become other names, which are nowhere else in the prompt. `"random_doc"`: A and B in the
            docstring, so that nothing shows which argument comes next. `"random_def"`: A, B and C in the definition, so
            that the docstring names arguments that do not exist, and the right answer is not in the prompt.
            `"both"`: all of them.
        prepend_bos: Whether to begin with the beginning-of-sequence token; `None` is the model's default.

    Returns:
        Pairs with `positions` A_def, B_def, C_def (in the definition), A_doc, B_doc (in the docstring) and END. The
        corrupted prompt differs at those that the corruption names and nowhere else. `mk.logit_diff(pairs)` is the logit of
        C minus the mean logit of the other arguments; `mk.accuracy(pairs)` compares it with the best of them.

    Raises:
        ValueError: `n` below 1, an unknown corruption, a model without a tokenizer, or one to which fewer than eleven of
            the names are single tokens.

    Example:
        >>> pairs = mk.tasks.docstring(model, n=32, corruption="both")
        >>> pairs.clean.str_tokens[0][pairs.positions["A_doc"][0]] == pairs.clean.str_tokens[0][pairs.positions["A_def"][0]]
        True
    """
    check_arguments(model, n)
    if corruption not in _CHANGED:
        raise ValueError(f"corruption: expected {', '.join(map(repr, _CHANGED))}, got {corruption!r}")
    ids = single_token_words(model, NAMES, at_least=_N_ARGUMENTS + _N_OTHERS, kind="argument names")
    drawn = _draw(sorted(ids), n, seed)
    clean = [d.text() for d in drawn]
    prompts = Prompts.from_text(model, clean, prepend_bos)
    positions: dict[str, list[int]] = {name: [] for name in _CHANGED["both"]}
    for d, tokens, text in zip(drawn, prompts.tokens, clean, strict=True):
        for name, position in _find_names(tokens, [ids[argument] for argument in d.arguments], text).items():
            positions[name].append(position)
    pairs = PromptPairs.from_tokens(
        prompts,
        Prompts.from_text(model, [d.text(corruption) for d in drawn], prepend_bos),
        [(ids[d.arguments[4]], [ids[d.arguments[i]] for i in (0, 1, 2, 3, 5)]) for d in drawn],
        model=model,
        positions=positions,
        task="docstring",
    )
    check_differences(pairs, _CHANGED[corruption])
    return pairs


@dataclass(frozen=True)
class _Drawn:
    """One prompt: its arguments in their order (A, B and C are the third to the fifth), other names, and words."""

    arguments: tuple[str, ...]
    others: tuple[str, ...]
    function: str
    words: tuple[str, ...]

    def text(self, corruption: Corruption | None = None) -> str:
        defined, documented = list(self.arguments), list(self.arguments[2:4])
        if corruption in ("random_def", "both"):
            defined[2:5] = self.others[:3]
        if corruption in ("random_doc", "both"):
            documented = list(self.others[3:])
        w = self.words
        return (
            f"def {self.function}(self, {', '.join(defined)}):\n"
            f'    """{w[0]} {w[1]}\n\n'
            f"    :param {documented[0]}: {w[2]} {w[3]}\n"
            f"    :param {documented[1]}: {w[4]} {w[5]}\n"
            f"    :param"
        )


def _draw(names: list[str], n: int, seed: int) -> list[_Drawn]:
    rng = random.Random(seed)
    drawn = []
    for _ in range(n):
        chosen = rng.sample(names, _N_ARGUMENTS + _N_OTHERS)
        words = tuple(rng.sample(WORDS, 6))
        function = rng.choice(FUNCTIONS)
        drawn.append(_Drawn(tuple(chosen[:_N_ARGUMENTS]), tuple(chosen[_N_ARGUMENTS:]), function, words))
    return drawn


def _find_names(tokens: Tensor, arguments: list[int], text: str) -> dict[str, int]:
    """Where A, B and C are, from the tokens: A and B occur twice, the other arguments once."""
    places = [places_of(tokens, argument) for argument in arguments]
    if [len(place) for place in places] != [1, 1, 2, 2, 1, 1]:
        raise ValueError(
            f"expected each argument once and the third and fourth twice among the tokens of {text!r}; got tokens {arguments} "
            f"{[len(place) for place in places]} times in {tokens.tolist()}. The tokenizer joins names to what is around them"
        )
    a, b, c = places[2:5]
    return {"A_def": a[0], "B_def": b[0], "C_def": c[0], "A_doc": a[1], "B_doc": b[1]}


# Argument names stand after a space and before a comma, a bracket or a colon. None of them is among the other words.
NAMES = (
    "apple", "arm", "bank", "bell", "bird", "boat", "bone", "bread", "bridge", "brush", "cake", "camp", "card", "cat",
    "chain", "chair", "clock", "cloud", "coat", "coin", "cup", "desk", "dog", "door", "dress", "drum", "egg", "eye",
    "farm", "fish", "flag", "floor", "fruit", "garden", "gate", "glass", "gold", "grass", "hair", "hall", "hat",
    "heart", "hill", "horse", "house", "ice", "island", "king", "knee", "lake", "lamp", "leg", "lock", "meal", "milk",
    "moon", "mouth", "nose", "ocean", "oil", "paint", "pen", "pig", "pipe", "plant", "pool", "rain", "ring", "river",
    "roof", "rope", "salt", "sand", "sea", "ship", "shoe", "shop", "snow", "soil", "star", "stone", "storm", "sugar",
    "sun", "tail", "tea", "tooth", "tower", "toy", "train", "tree", "wall", "wheel", "wind", "wine", "wing", "wood",
)  # fmt: skip

FUNCTIONS = (
    "find", "load", "open", "send", "move", "count", "merge", "check", "read", "draw", "build", "close", "split", "join",
    "store", "fetch",
)  # fmt: skip

WORDS = (
    "early", "green", "paper", "seven", "quiet", "letter", "north", "simple", "music", "broken", "winter", "small",
    "number", "second", "travel", "bright", "people", "market", "empty", "yellow", "history", "double", "doctor", "heavy",
    "language", "modern", "village", "open", "secret", "summer", "theory", "warm", "window", "silent", "report", "narrow",
)  # fmt: skip
