"""Random tokens, repeated: nothing but the context predicts them the second time.

Olsson et al. 2022, https://arxiv.org/abs/2209.11895.
"""

from __future__ import annotations

from mechkit._check import checked
from mechkit._random_tokens import repeated_rows
from mechkit.hooks import HookedModel
from mechkit.prompts import Prompts


@checked
def repeated_tokens(model: HookedModel, n: int = 8, length: int = 50, *, times: int = 2, seed: int = 0) -> Prompts:
    """Prompts of random tokens that repeat.

    Args:
        model: Its vocabulary is drawn from, without special tokens.
        n: How many prompts.
        length: Different tokens in each, drawn independently for each prompt.
        times: How often they come, one sequence after the other.
        seed: Of the draw.

    Returns:
        `Prompts` of `times * length` tokens, and the beginning-of-sequence token before them if the model's default is to begin
        with one.

    Raises:
        ValueError: an argument out of range, or prompts longer than the model's learned positions.
    """
    return Prompts.from_tokens(repeated_rows(model, n, length, times, seed), model)
