"""What changes in the streams that readers read: what edge and path patching compute readers' values from (`Kind.values`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechkit.circuits._kinds import Group
from mechkit.circuits.graph import Graph, Writer
from mechkit.engine import agree_before_difference
from mechkit.hooks import SITES, Parts, Run


@dataclass(frozen=True, eq=False)
class Changes:
    """What writers wrote in the source run less what they wrote in the base run.

    Attributes:
        graph, parts: Of the model.
        base, source: Runs that have the sites of the writers' groups (`Group.recorded`).
        counts: Where a change counts, `[prompt pos]`, or for each writer `[writer prompt pos]`; elsewhere it is 0.
    """

    graph: Graph
    parts: Parts
    base: Run
    source: Run
    counts: Tensor

    def of(self, writers: Sequence[Writer], first: int = 0) -> Float[Tensor, "writer prompt pos d_model"]:
        """The changes of some writers, from position `first` on."""
        kept: dict[Group, Tensor] = {}  # the writers of a group come together
        return torch.stack([self._one(writer, kept, first) for writer in writers]) * self.counts[..., first:, None]

    def _one(self, writer: Writer, kept: dict[Group, Tensor], first: int) -> Float[Tensor, "prompt pos d_model"]:
        group = self.graph.group_of(writer)
        if group not in kept:
            kept.clear()
            here, there = (run.sites[group.recorded][:, first:] for run in (self.source, self.base))
            kept[group] = group.kind.changes(self.parts, group.layer, here, there)
        return kept[group][:, self.graph.writer_index[writer.name] - group.writers.start]


def at_positions(run: Run, positions: slice) -> Run:
    """What a run recorded of streams and sites at some positions."""
    sites = {}
    for (site, layer), value in run.sites.items():
        at = [slice(None)] * value.ndim
        at[SITES[site].axis("pos")] = positions
        sites[site, layer] = value[tuple(at)]
    between = {layer: added[:, positions] for layer, added in run.between.items()}
    return replace(run, resid=[stream[:, positions] for stream in run.resid], sites=sites, between=between)


def runs_agree(base: Run, source: Run) -> Bool[Tensor, "prompt"]:
    """For each pair of prompts, whether its two runs are the same as long as the tokens are: not so if a model looks ahead."""
    return agree_before_difference(base.rows, source.rows, base.resid[-1], source.resid[-1])
