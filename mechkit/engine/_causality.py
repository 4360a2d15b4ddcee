"""Whether two runs agree at the positions before their first different token: measured, never assumed.

Much of what is skipped rests on one property of causal attention: before the first token in which two prompts differ, their runs
are the same. It does not hold for models that attend in both directions (encoders, text models with bidirectional attention, the
prefix of a prefix language model), and neither a model's class nor its config shows that reliably. So every caller that has two
runs calls `agree_before_difference` on these same runs. The answer is not stored, because a change of the model could make it
wrong. Where the runs do not agree, the whole sequence is computed.

It compares the final residual stream, which is the sum of all that was written, so that a difference anywhere in the stack shows
in it. Rounding does not hide a structural difference: where the two runs do agree, they make the same computations on the same
numbers, and are equal in nearly every bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechkit._precision import tolerance
from mechkit.hooks._record import Run
from mechkit.prompts import Stacked


def same_so_far(rows: Stacked, others: Stacked) -> Bool[Tensor, "prompt pos"]:
    """At which positions two prompts have had the same tokens up to here, and no picture that may be another one."""
    others = others.to(rows.tokens.device)
    same = (rows.tokens != others.tokens).cumsum(1) == 0
    if rows.inputs or others.inputs:
        first = min(one.inputs_from for one in (rows, others) if one.inputs)
        same[~rows.same_inputs(others), first:] = False
    return same


def agree_before_difference(
    rows: Stacked,
    others: Stacked,
    stream: Float[Tensor, "prompt suffix d_model"],
    of_others: Float[Tensor, "prompt suffix d_model"],
    reach: Int[np.ndarray, "pos"] | None = None,
) -> Bool[Tensor, "prompt"]:
    """For each pair of prompts, whether their runs end in the same residual stream wherever they have read the same tokens.

    Args:
        rows, others: The prompts.
        stream, of_others: The final residual streams of their whole runs, or the last positions of these.
        reach: Which positions a difference reaches besides those behind it (`reach_of`); none by default.

    Returns:
        True too where nothing can be seen: prompts that differ in no token, or from the first of these positions on.
    """
    shared = same_so_far(rows, others)
    if reach is not None:
        length = shared.shape[1]
        until = torch.from_numpy(np.append(reach, length))[shared.sum(1).cpu()].to(shared.device)
        shared = torch.arange(length, device=shared.device) < until[:, None]
    shared = (shared & ~shared.all(1, keepdim=True))[:, -stream.shape[1] :]  # equal prompts prove nothing
    scale = torch.maximum(stream.abs().amax(-1), of_others.abs().amax(-1))
    apart = (stream - of_others).abs().amax(-1)
    return ~(shared & ~(apart <= tolerance("runs", stream.dtype) * scale)).any(1)


def reach_of(run: Run) -> Int[np.ndarray, "pos"]:
    """For each position the first one that a change there can reach, as far as the masks of a recorded run say: itself, in causal
    attention. Within a block of positions that see each other (a picture in Gemma 3, a prefix) it is the block's first.

    The positions behind a change are recomputed in any case, so that what counts is who looks ahead: if anybody before position p
    sees p or later, what is changed there reaches that position, and whoever sees that one or later.
    """
    length = run.length
    reach = np.arange(length)
    seen = torch.zeros(length, length, dtype=torch.bool)
    for mask in {id(mask): mask for masks in masks_of(run) for mask in masks}.values():
        seen |= sees(mask).flatten(0, 1).any(0).cpu()
    ahead = seen.triu(1).numpy()
    if not ahead.any():
        return reach
    first = np.where(ahead.any(0), ahead.argmax(0), reach)  # the first position that sees each one
    first = np.minimum.accumulate(first[::-1])[::-1]  # or one behind it
    while (further := np.minimum(reach, first[reach])).tolist() != reach.tolist():
        reach = further
    return reach


def masks_of(run: Run) -> list[list[Tensor]]:
    """The attention masks that each block was given, `[prompt or 1, head or 1, pos, source]`."""

    def is_mask(value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim == 4 and value.shape[-1] >= value.shape[-2] == run.length

    return [[value for value in call.values() if is_mask(value)] for call in run.calls]


def sees(mask: Bool[Tensor, "*rows pos source"] | Float[Tensor, "*rows pos source"]) -> Bool[Tensor, "*rows pos pos"]:
    """Which positions each position reads, by an attention mask.

    A float mask is added to the scores: 0, or near the lowest number of the dtype. In a boolean mask the diagonal shows which of
    the two values means that a position is read.
    """
    square = mask[..., : mask.shape[-2]]
    if square.dtype != torch.bool:
        return square > torch.finfo(square.dtype).min / 2
    own = square.diagonal(dim1=-2, dim2=-1)
    return square if bool(own.all()) else ~square
