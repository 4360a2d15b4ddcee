"""Small tokenizers made in memory, each byte a token, with as few special tokens as one asks for; and models of their tokens."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from helpers.families import FAMILIES

D_VOCAB = 260
BOS, EOS, PAD = 256, 257, 258
TEXTS = ["the cat sat on", "a dog"]


def make_tokenizer(puts_bos: bool = False, puts_eos: bool = False, **special: str | None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with `<s>`, `</s>` and `<pad>`, which plays for `special` (`None` takes a role away).

    Args:
        puts_bos: Whether it puts `<s>` before a text of its own accord.
        puts_eos: Whether it puts `</s>` behind it.
        **special: `bos_token`, `eos_token`, `pad_token`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<pad>")])
    if puts_bos or puts_eos:
        template = f"{'<s> ' if puts_bos else ''}$A{' </s>' if puts_eos else ''}"
        inner.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    roles: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **{role: token for role, token in roles.items() if token is not None}
    )


def build(family: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """A tiny model of these tokens; `changes` go to its configuration."""
    kind, arguments = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, **(arguments | {"vocab_size": D_VOCAB, "bos_token_id": BOS, "eos_token_id": EOS} | changes)
    )
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.35) if p.ndim > 1 else None
    return hf.to(dtype).eval()


def padded(rows: list[Tensor], side: str, by: int = PAD) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), by), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), None)
        ids[i, where], mask[i, where] = row, 1
    return ids, mask
