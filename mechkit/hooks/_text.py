"""Between text and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechkit._check import checked
from mechkit.hooks._facts import Facts
from mechkit.hooks._lock import one_at_a_time

Input = str | Sequence[str] | Tensor


class Text(Facts):
    """The part of `HookedModel` that turns text into token ids and back, and continues text."""

    @checked
    @one_at_a_time
    def to_tokens(self, text: str | Sequence[str], prepend_bos: bool | None = None) -> Int[Tensor, "batch pos"]:
        """Token ids. `prepend_bos=None` is the model's default (in TransformerLens nearly always yes). Several texts of
        different lengths are padded on the right."""
        self._need_tokenizer()
        if not isinstance(text, str):
            text = list(text)
        return self.bridge.to_tokens(text, prepend_bos=prepend_bos, padding_side="right", truncate=False)

    @checked
    @one_at_a_time
    def to_str_tokens(self, text: str | Tensor, prepend_bos: bool | None = None) -> list[str]:
        """Each token as text; without a tokenizer, its id."""
        if self.tokenizer is None and isinstance(text, Tensor):
            return [str(int(t)) for t in text.flatten()]
        tokens = self.to_tokens(text, prepend_bos)[0] if isinstance(text, str) else text
        if tokens.ndim == 2 and len(tokens) == 1:
            tokens = tokens[0]
        if tokens.ndim != 1:
            raise ValueError(f"text: expected one sequence of tokens, got shape {list(tokens.shape)}")
        return self.bridge.to_str_tokens(tokens[None])

    @checked
    def to_string(self, tokens: Tensor | Sequence[int]) -> str | list[str]:
        """Text of token ids; a list of texts for a batch."""
        self._need_tokenizer()
        return self.bridge.to_string(torch.as_tensor(tokens))

    @checked
    def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token; raises `ValueError` otherwise, with the tokens that it is."""
        self._need_tokenizer()
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            pieces = [self.tokenizer.decode([i]) for i in ids]
            raise ValueError(f"expected {text!r} to be a single token, but it is {len(ids)}: {pieces}")
        return int(ids[0])

    def _need_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise ValueError(f"{self.name} was loaded without a tokenizer; pass token ids, or load it with one")

    def _tokens_and_mask(
        self, input: Input, prepend_bos: bool | None, mask: Tensor | None
    ) -> tuple[Int[Tensor, "batch pos"], Tensor | None]:
        if isinstance(input, Tensor):
            tokens = (input[None] if input.ndim == 1 else input).to(self.device)
            if tokens.ndim != 2 or tokens.is_floating_point():
                raise ValueError(f"input: expected token ids [batch pos], got {tokens.dtype} {list(tokens.shape)}")
            if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.d_vocab):
                raise ValueError(
                    f"input: expected token ids in 0..{self.d_vocab - 1}, got {int(tokens.min())}..{int(tokens.max())}"
                )
            if mask is None and (rows := self.left_padded_rows(tokens)):
                raise ValueError(
                    f"input: rows {rows[:5]} begin with padding. Without attention_mask the model would read the padding "
                    "as text; pass attention_mask, or give the prompts unpadded, one by one"
                )
            return tokens, None if mask is None else mask.to(self.device)
        texts = [input] if isinstance(input, str) else list(input)
        rows_ = [self.to_tokens(text, prepend_bos)[0] for text in texts]
        lengths = torch.tensor([len(row) for row in rows_])
        pad = self.tokenizer.pad_token_id or 0
        tokens = torch.nn.utils.rnn.pad_sequence(rows_, batch_first=True, padding_value=pad).to(self.device)
        if mask is None and int(lengths.min()) < int(lengths.max()):
            mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        return tokens, None if mask is None else mask.to(self.device)

    def left_padded_rows(self, tokens: Tensor) -> list[int]:
        """Rows of `[batch pos]` token ids that begin with padding. One leading token that is also the beginning-of-sequence
        token (GPT-2 has one id for both) is not padding."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        if pad is None or tokens.shape[1] < 2:
            return []
        leading = (tokens == pad).long().cumprod(1).sum(1)
        allowed = 1 if pad == self.tokenizer.bos_token_id else 0
        return (leading > allowed).nonzero().flatten().tolist()

    @checked
    @one_at_a_time
    def generate(self, input: Input, max_new_tokens: int = 10, *, do_sample: bool = False, **kwargs: Any) -> Any:
        """Continues the input, greedily by default; run it inside `hooks()` to intervene. Keyword arguments are
        TransformerBridge.generate's. Returns text for text, token ids for token ids."""
        kwargs.setdefault("verbose", False)
        return self.bridge.generate(
            input if isinstance(input, str | Tensor) else list(input),
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            **kwargs,
        )
