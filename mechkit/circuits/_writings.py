"""What every writer wrote in a run, kept small: a head as its z, until somebody asks what it adds to the stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechkit.hooks import SITES, HookedModel, Parts

HookPairs = list[tuple[str, Any]]


@dataclass(eq=False)
class Writings:
    """The outputs of all writers, and the stream that they were read into, in one run of rows of equal length.

    Attributes:
        parts: Of the model.
        hidden: What each block read, by layer; at least that of block 0, the embedding, `[row pos d_model]`.
        z: Each layer's heads, `[row pos head d_head]`.
        mlp: What each layer's MLP wrote, `[row pos d_model]`; empty for a model without MLPs.
    """

    parts: Parts
    hidden: dict[int, Tensor] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)

    def hooks(self, *, every_hidden: bool = False) -> HookPairs:
        """Hooks that fill this in during a run, detached."""
        model: HookedModel = self.parts.model
        hooks: HookPairs = []

        def keep(activation: Tensor, hook: Any, into: dict[int, Tensor], layer: int) -> None:
            into[layer] = activation.detach().clone()

        def keep_heads(activation: Tensor, hook: Any, layer: int) -> None:
            heads = (model.n_heads, activation.numel() // (activation.shape[0] * activation.shape[1] * model.n_heads))
            self.z[layer] = activation.detach().reshape(*activation.shape[:2], *heads).clone()

        for layer in range(model.n_layers):
            if every_hidden or layer == 0:
                hooks.append((SITES["resid_pre"].hook_name(layer), partial(keep, into=self.hidden, layer=layer)))
            hooks.append((SITES["z"].hook_name(layer), partial(keep_heads, layer=layer)))
            if self.parts.has_mlp:
                hooks.append((SITES["mlp_out"].hook_name(layer), partial(keep, into=self.mlp, layer=layer)))
        return hooks

    def rows(self, which: slice) -> Writings:
        """Some of the rows."""
        return Writings(
            self.parts, *({k: x[which] for k, x in kept.items()} for kept in (self.hidden, self.z, self.mlp))
        )

    @torch.no_grad()
    def changes(self, other: Writings, where: slice = slice(None)) -> Float[Tensor, "row writer pos d_model"]:
        """What each writer wrote here less what it wrote in `other`, at some positions, in the graph's order."""
        changes = [(self.hidden[0] - other.hidden[0])[:, None, where]]
        for layer in sorted(self.z):
            changes.append(self.head_changes(other, layer, where))
            if self.parts.has_mlp:
                changes.append((self.mlp[layer] - other.mlp[layer])[:, None, where])
        return torch.cat(changes, 1)

    def head_changes(
        self, other: Writings, layer: int, where: slice = slice(None)
    ) -> Float[Tensor, "row head pos d_model"]:
        """The same for one layer's heads."""
        here, there = self.z[layer][:, where], other.z[layer][:, where]
        if self.parts.heads_are_linear(layer):
            written = self.parts.heads(layer, here - there)
        else:  # a norm behind the attention: each run has its own scale
            written = self.parts.heads(layer, here) - self.parts.heads(layer, there)
        return written.transpose(1, 2)
