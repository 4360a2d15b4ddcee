"""The prompts on which models are compared when they are loaded: a few tokens, and a picture where the model reads pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechkit.hooks.loading.pictures import FAMILIES, dummy_pictures, kinds_of_tokens
from mechkit.prompts import Stacked


@dataclass(frozen=True, eq=False)
class Probe:
    """What a model computes before anything is done to it.

    Attributes:
        rows: What every model is tried on: a few tokens; pictures where it reads nothing else.
        logits: Its logits there.
        pictured: A prompt with a picture, and the logits there, for a model that reads both and whose patches are known.
    """

    rows: Stacked
    logits: Tensor
    pictured: tuple[Stacked, Tensor] | None = None


def probe_tokens(d_vocab: int, context: int | None = None, placeholder: int | None = None) -> Tensor:
    """Two short sequences of fixed pseudo-random tokens, to compare models with; no longer than the model's context, and without
    the token that stands for a patch."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, d_vocab, (2, 8), generator=generator)[:, :context]
    return tokens if placeholder is None else torch.where(tokens == placeholder, (tokens + 1) % d_vocab, tokens)


def placeholder_of(config: Any) -> int | None:
    """The token that stands for one patch of a picture in a prompt; `None` for a model that reads none among tokens."""
    found = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    return next((int(one) for one in found if one is not None), None)


def reads_pictures_alone(config: Any) -> bool:
    """Whether it is a vision transformer, which takes no tokens."""
    kind = getattr(config, "model_type", "")
    return kind in FAMILIES and placeholder_of(config) is None


def pictured_probe(hf_model: Any) -> Stacked | None:
    """A prompt with one picture of noise, for a model whose patches are known; two pictures for one that reads nothing else."""
    config = getattr(hf_model, "config", None)
    kind = getattr(config, "model_type", "")
    if config is None or kind not in FAMILIES:
        return None
    generator = torch.Generator().manual_seed(0)
    placeholder = placeholder_of(config)
    if placeholder is None:
        pictures = [dummy_pictures(config, generator) for _ in range(2)]
        n = sum(piece.n for piece in FAMILIES[kind].pieces(config, pictures[0]))
        return Stacked(
            torch.zeros(2, n, dtype=torch.long), {k: torch.stack([one[k] for one in pictures]) for k in pictures[0]}
        )
    inputs = dummy_pictures(config, generator)
    n = sum(piece.n for piece in FAMILIES[kind].pieces(config, inputs))
    text = probe_tokens(config.get_text_config().vocab_size, None, placeholder)[0]
    tokens = torch.cat([text[:2], torch.full((n,), placeholder), text[2:5]])[None]
    inputs |= kinds_of_tokens(hf_model, tokens == placeholder)
    return Stacked(tokens, {name: value[None] for name, value in inputs.items()}, 2)
