"""The loss of predicting each next token. Padding is no token: it is neither predicted nor predicted from."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def next_token_losses(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None,
) -> Float[Tensor, "batch pos-1"]:
    """The loss of each token but the first, in nats; NaN where it, or the one before it, is padding."""
    next_tokens = tokens[:, 1:, None].to(logits.device)
    losses = -torch.log_softmax(logits, dim=-1)[:, :-1].gather(-1, next_tokens)[..., 0]
    if mask is None:
        return losses
    real = (mask[:, 1:] * mask[:, :-1]).to(losses.device).bool()
    return losses.masked_fill(~real, torch.nan)


def mean_loss(losses: Float[Tensor, "batch next"], mask: Int[Tensor, "batch pos"] | None) -> Float[Tensor, ""]:
    """The mean of `next_token_losses` over tokens, all of equal weight.

    Raises:
        ValueError: no prompt has a second token.
    """
    real = losses if mask is None else losses[(mask[:, 1:] * mask[:, :-1]).to(losses.device).bool()]
    if real.numel() == 0:
        raise ValueError(
            "input: expected at least two tokens in some prompt, to predict the second from the first; got one in each"
        )
    return real.mean()
