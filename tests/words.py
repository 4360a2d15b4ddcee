"""Small tokenizers made in memory: each byte is a token, and there are as few special tokens as one asks for."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

D_VOCAB = 260
BOS, EOS, PAD = 256, 257, 258


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
