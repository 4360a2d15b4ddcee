"""What every writer wrote in a run: as it was recorded, and as what each adds to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechkit.circuits._kinds import Site
from mechkit.circuits.graph import Graph
from mechkit.hooks import Parts
from mechkit.hooks._capture import keepers

HookPairs = list[tuple[str, Any]]
# What each group of the graph's writers adds to the residual stream, `[prompt writer pos d_model]`, in the graph's order; axes of
# 1 where it is the same for all prompts or positions.
Written = list[Tensor]


@torch.no_grad()
def written(graph: Graph, parts: Parts, sites: dict[Site, Tensor], start: int = 0) -> Written:
    """From recorded activations (`Graph.recorded`), positions from `start` on."""
    return [group.kind.written(parts, group.layer, sites[group.recorded][:, start:]) for group in graph.writing]


@dataclass(eq=False)
class Writings:
    """The outputs of all writers, and the stream that they were read into, in one run of rows of equal length, kept small: as
    what was recorded, until somebody asks what it adds to the stream.

    Attributes:
        graph, parts: Of the model.
        sites: `(site, layer)` -> activation: those of `Graph.recorded`; perhaps also `resid_pre` of every layer, which the
            block there read.
    """

    graph: Graph
    parts: Parts
    sites: dict[Site, Tensor] = field(default_factory=dict)

    def hooks(self, *, every_hidden: bool = False) -> HookPairs:
        """Hooks that fill this in during a run, detached."""
        sites = self.graph.recorded
        sites += [("resid_pre", layer) for layer in range(1, self.graph.n_layers) if every_hidden]
        return keepers(sites, self.sites, lambda activation, _: activation.detach().clone())

    def rows(self, which: slice) -> Writings:
        """Some of the rows."""
        return Writings(self.graph, self.parts, {key: x[which] for key, x in self.sites.items()})

    @torch.no_grad()
    def changes(self, other: Writings, where: slice = slice(None)) -> Float[Tensor, "row writer pos d_model"]:
        """What each writer wrote here less what it wrote in `other`, at some positions, in the graph's order."""
        changes = []
        for group in self.graph.writing:
            here, there = (run.sites[group.recorded][:, where] for run in (self, other))
            changes.append(group.kind.changes(self.parts, group.layer, here, there))
        return torch.cat(changes, 1)
