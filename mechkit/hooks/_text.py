"""Between text and token ids. The user's tokenizer is used as it is: never changed, and never read again from its folder.

As in TransformerLens, a beginning-of-sequence token is put first unless the tokenizer puts one there itself or the model is
better without it, and an end-of-sequence token that the tokenizer appends is removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechkit._check import checked, is_whole_dtype
from mechkit._warnings import warn_user
from mechkit.hooks._context import check_length
from mechkit.hooks._facts import Facts
from mechkit.hooks._lock import one_at_a_time
from mechkit.hooks._padding import checked_mask, left_padded_rows, padding_on_the_right
from mechkit.prompts import Prompts

Input = str | Sequence[str] | Tensor | Prompts


class Text(Facts):
    """The part of `HookedModel` that turns text into token ids and back."""

    @checked
    @one_at_a_time
    def to_tokens(
        self, text: str | Sequence[str], prepend_bos: bool | None = None, truncate: bool = True
    ) -> Int[Tensor, "batch pos"]:
        """Token ids. Several texts of different lengths are padded on the right.

        Args:
            text: One text, or several.
            prepend_bos: Whether each begins with the beginning-of-sequence token; `None` is the model's default (in
                TransformerLens nearly always yes).
            truncate: Whether texts longer than the model's context are cut to it, with a warning.
        """
        rows = self._rows([text] if isinstance(text, str) else list(text), prepend_bos)
        longest = max((len(row) for row in rows), default=0)
        if truncate and self.n_ctx is not None and longest > self.n_ctx:
            warn_user(
                f"text: cut from {longest} tokens to {self.n_ctx}, the model's context (n_ctx); truncate=False leaves it whole"
            )
            rows = [row[: self.n_ctx] for row in rows]
        return self._padded(rows)

    @checked
    @one_at_a_time
    def to_str_tokens(self, text: str | Tensor, prepend_bos: bool | None = None) -> list[str]:
        """Each token as text; without a tokenizer, its id."""
        if isinstance(text, Tensor) and not is_whole_dtype(text.dtype):
            raise ValueError(f"text: expected a text or token ids, got {text.dtype} {list(text.shape)}")
        if self.tokenizer is None and isinstance(text, Tensor):
            return [str(int(t)) for t in text.flatten()]
        tokens = self.to_tokens(text, prepend_bos)[0] if isinstance(text, str) else text
        if tokens.ndim == 2 and len(tokens) == 1:
            tokens = tokens[0]
        if tokens.ndim != 1:
            raise ValueError(f"text: expected one sequence of tokens, got shape {list(tokens.shape)}")
        return self._decoded([[int(token)] for token in tokens])

    @checked
    def to_string(self, tokens: Tensor | Sequence[int]) -> str | list[str]:
        """Text of token ids; a list of texts for a batch."""
        self._need_tokenizer()
        ids = torch.as_tensor(tokens)
        if ids.ndim > 2:
            raise ValueError(f"tokens: expected token ids [pos] or [batch pos], got shape {list(ids.shape)}")
        texts = self._decoded(ids.reshape(-1, ids.shape[-1] if ids.ndim else 1).tolist())
        return texts if ids.ndim == 2 else texts[0]

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

    def _decoded(self, rows: list[list[int]], skip_special_tokens: bool = False) -> list[str]:
        self._need_tokenizer()
        return self.tokenizer.batch_decode(
            rows, clean_up_tokenization_spaces=False, skip_special_tokens=skip_special_tokens
        )

    # -- special tokens, as TransformerLens reads a tokenizer that lacks some -------------------------------------------

    @property
    def _bos_id(self) -> int | None:
        found = getattr(self.tokenizer, "bos_token_id", None)
        return self._eos_id if found is None else int(found)

    @property
    def _eos_id(self) -> int | None:
        found = getattr(self.tokenizer, "eos_token_id", None)
        return None if found is None else int(found)

    @property
    def _pad_id(self) -> int | None:
        found = getattr(self.tokenizer, "pad_token_id", None)
        return self._eos_id if found is None else int(found)

    def _rows(self, texts: list[str], prepend_bos: bool | None) -> list[Int[Tensor, "_"]]:
        """The token ids of each text, uncut."""
        self._need_tokenizer()
        if not texts:
            raise ValueError("text: expected a text or several, got none")
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise TypeError(
                f"text: expected a text or several, got {type(wrong[0]).__name__}; token ids go in as a tensor"
            )
        wanted = bool(getattr(self.cfg, "default_prepend_bos", True)) if prepend_bos is None else prepend_bos
        before, after = _puts_around(self.tokenizer)
        if after == [self._eos_id]:
            after = []  # the model is to go on from here
        if wanted and not before and self._bos_id is not None:
            before = [self._bos_id]
        elif not wanted:
            before = before[1:]
        bare = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        if before[:1] == [self._bos_id] and any(map(self._brings_bos, texts, bare)):
            warn_user(
                f"text: begins with {self.tokenizer.decode([before[0]])!r}, the beginning-of-sequence token, which is also put "
                "in front of it: the model reads it twice. For texts that bring their own (a rendered chat template), pass "
                "prepend_bos=False"
            )
        return [torch.tensor([*before, *ids, *after], dtype=torch.long) for ids in bare]

    def _brings_bos(self, text: str, ids: list[int]) -> bool:
        """Whether a text begins with the beginning-of-sequence token itself, not with an unknown word that reads so."""
        return ids[:1] == [self._bos_id] and text.lstrip().startswith(self.tokenizer.convert_ids_to_tokens(ids[0]))

    def _padded(self, rows: list[Int[Tensor, "_"]]) -> Int[Tensor, "batch pos"]:
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad_id or 0)
        return padded.to(self.device)

    # -- what a run is given -------------------------------------------------------------------------------------------

    def _tokens_and_mask(
        self, input: Input, prepend_bos: bool | None, mask: Any
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None]:
        """Token ids, and where they are padding if some are."""
        if isinstance(input, Prompts):
            input = input.stack(range(len(input))).tokens
        if isinstance(input, Tensor):
            if prepend_bos:
                raise ValueError(
                    "prepend_bos: token ids are run as they are; leave it out, or put the id in front of them"
                )
            tokens = self._checked_tokens(input)
            if mask is not None and input.ndim == 1 and isinstance(mask, Tensor) and mask.ndim == 1:
                mask = mask[None]
            if mask is None and (rows := self.left_padded_rows(tokens)):
                raise ValueError(
                    f"input: rows {rows[:5]} begin with padding. Without attention_mask the model would read the padding "
                    "as text; pass attention_mask, or give the prompts unpadded, one by one"
                )
            return tokens, None if mask is None else checked_mask(mask, tokens)
        rows_ = self._rows([input] if isinstance(input, str) else list(input), prepend_bos)
        lengths = torch.tensor([len(row) for row in rows_])
        if not int(lengths.min()):
            raise ValueError("input: expected at least one token a text, got none in an empty text without prepend_bos")
        tokens = self._padded(rows_)
        check_length(self, tokens.shape[1], "input")
        real = (torch.arange(tokens.shape[1]) < lengths[:, None]).long().to(tokens.device)
        if mask is not None and bool((checked_mask(mask, tokens) > real).any()):
            raise ValueError(
                "attention_mask: 1 at the padding of the shorter texts; leave it out, it is known for texts"
            )
        if mask is None and int(lengths.min()) == int(lengths.max()):
            return tokens, None
        return tokens, real if mask is None else checked_mask(mask, tokens)

    def _checked_tokens(self, input: Tensor) -> Int[Tensor, "batch pos"]:
        if input.is_nested or input.layout != torch.strided or input.device.type == "meta":
            raise ValueError(f"input: expected token ids [batch pos], got a {input.layout} tensor on {input.device}")
        tokens = input[None] if input.ndim == 1 else input
        if tokens.ndim != 2 or not is_whole_dtype(tokens.dtype) or tokens.numel() == 0:
            raise ValueError(f"input: expected token ids [batch pos], got {tokens.dtype} {list(tokens.shape)}")
        tokens = tokens.to(self.device, torch.long)
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.d_vocab:
            raise ValueError(
                f"input: expected token ids in 0..{self.d_vocab - 1}, got {int(tokens.min())}..{int(tokens.max())}"
            )
        check_length(self, tokens.shape[1], "input")
        return tokens

    def left_padded_rows(self, tokens: Int[Tensor, "batch pos"]) -> list[int]:
        """Rows of `[batch pos]` token ids that begin with padding. One leading token that is also the beginning-of-sequence
        token (GPT-2 has one id for both) is not padding."""
        return left_padded_rows(tokens, self._pad_id, self._bos_id)

    def _padding_of(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"] | None
    ) -> Int[Tensor, "batch pos"] | None:
        """The mask, or the one that can be read off the ids; raises `ValueError` where that is uncertain."""
        if mask is not None:
            return mask
        return padding_on_the_right(tokens, self._pad_id, (self._bos_id, self._eos_id))


def _puts_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text of its own accord."""
    bare, framed = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    n = len(framed) - len(bare)
    at = next((i for i in range(n + 1) if framed[i : i + len(bare)] == bare), 0 if n <= 0 else n)
    return framed[:at], framed[at + len(bare) :]
