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
        sites: `(site, layer)` -> activation: those of `Parts.writer_sites`, `z` as `[row pos head d_head]`; perhaps also
            `resid_pre` of every layer, which the block there read.
    """

    parts: Parts
    sites: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def hooks(self, *, every_hidden: bool = False) -> HookPairs:
        """Hooks that fill this in during a run, detached."""
        model: HookedModel = self.parts.model

        def keep(activation: Tensor, hook: Any, key: tuple[str, int]) -> None:
            heads = (model.n_heads, -1) if key[0] == "z" else activation.shape[2:]
            self.sites[key] = activation.detach().reshape(*activation.shape[:2], *heads).clone()

        sites = self.parts.writer_sites()
        sites += [("resid_pre", layer) for layer in range(1, model.n_layers) if every_hidden]
        return [(SITES[site].hook_name(layer), partial(keep, key=(site, layer))) for site, layer in sites]

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
