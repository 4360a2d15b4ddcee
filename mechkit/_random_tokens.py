"""Random tokens that repeat: what induction is measured on."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def repeated_rows(model: Any, n: int, length: int, times: int, seed: int) -> list[Int[Tensor, "pos"]]:
    """`n` rows of `length` different random tokens, `times` over, behind the beginning-of-sequence token if the model's default
    is to begin with one.

    Raises:
        ValueError: `n`, `length` or `times` out of range for the vocabulary or for the model's learned positions.
    """
    ordinary = ordinary_tokens(model)
    if n < 1 or times < 1 or not 2 <= length <= len(ordinary):
        raise ValueError(
            f"n, times, length: expected n >= 1, times >= 1 and a length from 2 to {len(ordinary)} (the vocabulary's "
            f"ordinary tokens); got n={n}, times={times} and length={length}"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        drawn = ordinary[torch.randperm(len(ordinary), generator=generator)[:length]]
        rows.append(torch.cat([_beginning(model), drawn.repeat(times)]))
    longest = model.cfg.n_ctx if model.cfg.positional_embedding_type == "standard" else None
    if longest is not None and len(rows[0]) > longest:
        raise ValueError(
            f"length: expected prompts of at most {longest} tokens, the model's learned positions; {length} tokens {times} times "
            f"are {len(rows[0])}. Pass a smaller length"
        )
    return rows


def ordinary_tokens(model: Any) -> Int[Tensor, "token"]:
    """Ids of the vocabulary that the tokenizer knows and does not call special."""
    if model.tokenizer is None:
        config = model.bridge.original_model.config.get_text_config()
        named = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
        special = {i for ids in named for i in (ids if isinstance(ids, list | tuple) else [ids])}
        known = model.d_vocab
    else:
        added = getattr(model.tokenizer, "added_tokens_decoder", {})
        special = {*model.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        known = min(model.d_vocab, len(model.tokenizer))
    special.add(getattr(model, "image_token_id", None))
    return torch.tensor([i for i in range(known) if i not in special], dtype=torch.long)


def _beginning(model: Any) -> Int[Tensor, "token"]:
    bos = getattr(model.tokenizer, "bos_token_id", None)
    begins = bos is not None and int(model.to_tokens("a")[0, 0]) == bos
    return torch.tensor([bos] if begins else [], dtype=torch.long)
