"""Induction (Olsson et al. 2022, https://arxiv.org/abs/2209.11895): random tokens, repeated, up to one that has a follower.

    x_0 … x_k x_{k+1} x_0 … x_k

continues with x_{k+1}: it followed x_k the first time, and only the context shows it.

1. Draw `length` different ordinary tokens x_0 … x_{length-1} for each prompt, and one more, y.
2. Write them once, and then again up to x_k, the last but one (k = length - 2). The beginning-of-sequence token comes first if
   that is the model's default.
3. Corrupt by writing y in place of x_{k+1}, the token after the first x_k. Now y follows x_k.

The two prompts mirror each other: the right answer of one is the wrong answer of the other. k is the same for all prompts, so
that all have one length, and named positions are the same in all of them.

What differs is the token that is copied, and not where it stands. Patching shows which heads read and copy it. It does not show
which find the place (the previous-token heads, whose output at that place is the same in both prompts): ablate for that.
"""

from __future__ import annotations

import torch

from mechkit._check import checked
from mechkit._random_tokens import _beginning, ordinary_tokens
from mechkit.hooks import HookedModel
from mechkit.prompts import PromptPairs, Prompts


@checked
def induction(model: HookedModel, n: int = 32, length: int = 20, *, seed: int = 0) -> PromptPairs:
    """Induction prompts, their corrupted partners, and the answers: what followed the last token the first time is right.

    Tokens are drawn uniformly from the vocabulary without special tokens, independently for each prompt. Those of a prompt's
    first half are all different, and the wrong answer is none of them.

    The pair differs in the token that is copied, so that patching shows the heads that copy it. Previous-token heads write the
    same at that place in both prompts: ablation shows them, patching does not.

    Args:
        model: Its vocabulary is drawn from. Without a tokenizer, prompts begin with no special token.
        n: How many pairs.
        length: Tokens in the first half, 2 or more. Prompts are `2 * length - 1` tokens, and the beginning-of-sequence token
            before them if the model's default is to begin with one.
        seed: The same arguments and seed give the same pairs.

    Returns:
        Pairs with `positions` current (where the last token stands the first time), previous (the place after it, with the right
        answer in the clean prompt and the wrong one in the corrupted prompt: what an induction head attends to) and END (the
        last token). They hold for both prompts of a pair, which differ at previous and nowhere else.

    Raises:
        ValueError: `n` below 1, a `length` out of range for the vocabulary, or prompts longer than the model's learned
            positions.

    Example:
        >>> pairs = mk.tasks.induction(model, n=32, length=20)
        >>> int(pairs.clean.tokens[0][pairs.positions["previous"][0]]) == pairs.right[0][0]
        True
    """
    ordinary, begin = ordinary_tokens(model), _beginning(model).tolist()
    _check(model, n, length, len(ordinary), len(begin) + 2 * length - 1)
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted, answers = [], [], []
    for _ in range(n):
        drawn = ordinary[torch.randperm(len(ordinary), generator=generator)[: length + 1]].tolist()
        first, other = drawn[:length], drawn[length]
        clean.append([*begin, *first, *first[:-1]])
        corrupted.append([*begin, *first[:-1], other, *first[:-1]])
        answers.append((first[-1], other))
    previous = len(begin) + length - 1
    return PromptPairs.from_tokens(
        Prompts.from_tokens(clean, model),
        Prompts.from_tokens(corrupted, model),
        answers,
        model=model,
        positions={"previous": [previous] * n, "current": [previous - 1] * n},
        task="induction",
    )


def _check(model: HookedModel, n: int, length: int, n_tokens: int, needed: int) -> None:
    if n < 1:
        raise ValueError(f"n: expected at least 1 pair, got {n}")
    if not 2 <= length < n_tokens:
        raise ValueError(
            f"length: expected 2 to {n_tokens - 1} different tokens, got {length}. The vocabulary has {n_tokens} ordinary ones, "
            "and the wrong answer is one more"
        )
    longest = model.cfg.n_ctx if model.cfg.positional_embedding_type == "standard" else None
    if longest is not None and needed > longest:
        raise ValueError(
            f"length: expected prompts of at most {longest} tokens, the model's learned positions; with length={length} they "
            f"have {needed}. Pass a smaller length"
        )
