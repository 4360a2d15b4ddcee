"""Prompts of one length as one tensor, with whatever else a model reads beside their tokens (pictures, say)."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Stacked:
    """Rows that run together in one forward pass. Indexing takes rows, in any order and as often as wanted.

    Attributes:
        tokens: `[row pos]`.
        inputs: The model's other inputs, by name: `[row, *shape of one prompt's]`. Their first two axes are joined when the model
            is called: a model takes them as one prompt after the other.
        inputs_from: The first position that these other inputs stand for, the same in all rows.
    """

    tokens: Int[Tensor, "row pos"]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    inputs_from: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Stacked:
        return Stacked(self.tokens[rows], {name: value[rows] for name, value in self.inputs.items()}, self.inputs_from)

    def to(self, device: torch.device | str) -> Stacked:
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return Stacked(self.tokens.to(device), inputs, self.inputs_from)

    def clone(self) -> Stacked:
        """A copy that autograd may keep, wherever the rows were made."""
        return Stacked(self.tokens.clone(), {name: one.clone() for name, one in self.inputs.items()}, self.inputs_from)

    def and_one(self, tokens: Int[Tensor, "row"]) -> Stacked:
        """Rows with one more token each, which is text."""
        inputs = {  # what says of each token what it is grows too
            name: torch.cat([value, torch.zeros_like(value[..., :1])], -1) if "token_type" in name else value
            for name, value in self.inputs.items()
        }
        return Stacked(torch.cat([self.tokens, tokens[:, None]], 1), inputs, self.inputs_from)

    def split(self, n: int) -> list[Stacked]:
        """The same rows, `n` at a time."""
        return [self[i : i + n] for i in range(0, len(self), n)]

    @property
    def kind(self) -> Hashable:
        """What rows have in common whose blocks are called with the same masks and positions."""
        if not self.inputs:
            return self.tokens.shape[1]
        return (
            self.tokens.shape[1],
            self.inputs_from,
            tuple(sorted((k, tuple(v.shape[1:])) for k, v in self.inputs.items())),
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """The other inputs as a model takes them, for `model(tokens, **arguments)`."""
        return {name: value.flatten(0, 1) for name, value in self.inputs.items()}

    @staticmethod
    def cat(several: Sequence[Stacked]) -> Stacked:
        """Rows of several, one after the other; all have the same inputs."""
        tokens = torch.cat([one.tokens for one in several])
        inputs = {name: torch.cat([one.inputs[name] for one in several]) for name in several[0].inputs}
        return Stacked(tokens, inputs, several[0].inputs_from)

    def inputs_hash(self) -> str:
        """A short hash of the other inputs; `""` where there are none."""
        digest = hashlib.sha256()
        for name in sorted(self.inputs):
            value = self.inputs[name].detach().cpu().contiguous()
            digest.update(
                f"{name} {value.dtype} {list(value.shape)}".encode() + value.view(torch.uint8).numpy().tobytes()
            )
        return digest.hexdigest()[:16] if self.inputs else ""

    def same_inputs(self, others: Stacked) -> Bool[Tensor, "row"]:
        """In which rows the other inputs are those of `others`, which has as many rows."""
        same = torch.full((len(self),), set(self.inputs) == set(others.inputs), device=self.tokens.device)
        for name in set(self.inputs) & set(others.inputs):
            mine, theirs = self.inputs[name], others.inputs[name].to(same.device)
            same &= (mine == theirs).flatten(1).all(1) if mine.shape == theirs.shape else torch.zeros_like(same)
        return same
