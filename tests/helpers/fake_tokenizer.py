"""A tokenizer that learns words as they come: for tasks, whose prompts must not depend on any real one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class FakeTokenizer(ABC):
    """What tasks need from a model, except how it splits a text."""

    d_vocab = 10_000
    tokenizer = "fake"

    def __init__(self) -> None:
        self.words = ["<bos>"]

    @abstractmethod
    def _pieces(self, text: str) -> list[str]:
        """The tokens of a text."""

    def _ids(self, text: str) -> list[int]:
        pieces = self._pieces(text)
        self.words += [piece for piece in dict.fromkeys(pieces) if piece not in self.words]
        return [self.words.index(piece) for piece in pieces]

    def to_tokens(self, text: str, prepend_bos: bool | None = None) -> Tensor:
        return torch.tensor([self._ids(text) if prepend_bos is False else [0, *self._ids(text)]])

    def to_str_tokens(self, text: Any) -> list[str]:
        return [self.words[i] for i in text]

    def to_single_token(self, text: str) -> int:
        ids = self._ids(text)
        if len(ids) != 1:
            raise ValueError(f"expected {text!r} to be a single token, but it is {len(ids)}")
        return ids[0]
