"""What every writer wrote in a run, kept small: a head as its z, until somebody asks what it adds to the stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechkit.hooks import HookedModel, Parts
from mechkit.hooks._capture import keepers

HookPairs = list[tuple[str, Any]]


@dataclass(eq=False)
class Writings:
    """The outputs of all writers, and the stream that they were read into, in one run of rows of equal length.

    Attributes:
        parts: Of the model.
        sites: `(site, layer)` -> activation: those of `Parts.writer_sites`, `z` as `[row pos head d_head]`; perhaps also
            `resid_pre` of every layer, which the block there read.
    """

    parts: Parts
    sites: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def hooks(self, *, every_hidden: bool = False) -> HookPairs:
        """Hooks that fill this in during a run, detached."""
        model: HookedModel = self.parts.model

        def by_head(activation: Tensor, key: tuple[str, int]) -> Tensor:
            heads = (model.n_heads, -1) if key[0] == "z" else activation.shape[2:]
            return activation.detach().reshape(*activation.shape[:2], *heads).clone()

        sites = self.parts.writer_sites()
        sites += [("resid_pre", layer) for layer in range(1, model.n_layers) if every_hidden]
        return keepers(sites, self.sites, by_head)

    def rows(self, which: slice) -> Writings:
        """Some of the rows."""
        return Writings(self.parts, {key: x[which] for key, x in self.sites.items()})

    @torch.no_grad()
    def changes(self, other: Writings, where: slice = slice(None)) -> Float[Tensor, "row writer pos d_model"]:
        """What each writer wrote here less what it wrote in `other`, at some positions, in the graph's order."""
        changes = []
        for site, layer in self.parts.writer_sites():
            here, there = (run.sites[site, layer][:, where] for run in (self, other))
            if site == "z":
                changes.append(self.parts.head_changes(layer, here, there).transpose(1, 2))
            else:
                changes.append((here - there)[:, None])
        return torch.cat(changes, 1)
