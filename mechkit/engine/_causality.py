"""Whether two runs agree as long as they have read the same tokens: measured, never taken for granted.

Much of what is skipped rests on one property of causal attention: before the first token in which two prompts differ, their runs
are the same. It does not hold for models that attend in both directions (encoders, text models with bidirectional attention, the
prefix of a prefix language model), and neither a model's class nor its config shows that reliably. So whoever has two runs at
hand asks `agree_before_difference` of these very runs, every time: nothing is remembered, so that nothing goes stale when
somebody changes the model. Where they do not agree, the whole sequence counts.

The final residual stream is what is compared: it is the sum of all that was written, so that a difference anywhere in the stack
shows in it. A structural difference is no matter of rounding: the two runs make the same computations on the same numbers, and
agree in nearly every bit where they agree at all.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechkit._precision import tolerance


def same_so_far(tokens: Int[Tensor, "prompt pos"], others: Int[Tensor, "prompt pos"]) -> Bool[Tensor, "prompt pos"]:
    """At which positions two prompts have had the same tokens up to here."""
    return (tokens != others).cumsum(1) == 0


def agree_before_difference(
    tokens: Int[Tensor, "prompt pos"],
    others: Int[Tensor, "prompt pos"],
    stream: Float[Tensor, "prompt suffix d_model"],
    of_others: Float[Tensor, "prompt suffix d_model"],
) -> Bool[Tensor, "prompt"]:
    """For each pair of prompts, whether their runs end in the same residual stream wherever they have read the same tokens.

    Args:
        tokens, others: The prompts.
        stream, of_others: The final residual streams of their whole runs, or the last positions of these.

    Returns:
        True too where nothing can be seen: prompts that differ in no token, or from the first of these positions on.
    """
    shared = same_so_far(tokens, others)
    shared = (shared & ~shared.all(1, keepdim=True))[:, -stream.shape[1] :]  # equal prompts prove nothing
    scale = torch.maximum(stream.abs().amax(-1), of_others.abs().amax(-1))
    apart = (stream - of_others).abs().amax(-1)
    return ~(shared & ~(apart <= tolerance("runs", stream.dtype) * scale)).any(1)


def shows_later_positions(mask: Bool[Tensor, "*rows pos source"] | Float[Tensor, "*rows pos source"]) -> bool:
    """Whether an attention mask lets some position read a later one.

    Masks of floats are added to the scores: 0, or near the lowest number that there is. Of booleans the diagonal tells which of
    the two means that a position is read.
    """
    square = mask[..., : mask.shape[-2]]
    if square.dtype == torch.bool:
        own = square.diagonal(dim1=-2, dim2=-1)
        read = square if bool(own.all()) else ~square
    else:
        read = square > torch.finfo(square.dtype).min / 2
    return bool(read.triu(1).any())
