"""What readers compute when what they read is changed: the values that edge and path patching write into a run.

A reader's value is a function of the stream that it reads: a head's query, key or value, what an MLP adds, the final stream.
Here it is computed for the base run's stream plus a change, such as one writer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechkit.circuits.graph import Graph, Reader, Writer
from mechkit.engine import agree_before_difference
from mechkit.hooks import Parts, Run


@dataclass(frozen=True, eq=False)
class Changes:
    """What writers wrote in the source run less what they wrote in the base run.

    Attributes:
        parts: Of the model.
        base, source: Runs recorded with `Parts.writer_sites`.
        counts: Where a change counts, `[prompt pos]`, or for each writer `[writer prompt pos]`; elsewhere it is 0.
    """

    parts: Parts
    base: Run
    source: Run
    counts: Tensor

    def of(self, writers: Sequence[Writer]) -> Float[Tensor, "writer prompt pos d_model"]:
        """The changes of some writers."""
        kept: dict[int, Tensor] = {}  # the heads of a layer come together
        return torch.stack([self._one(writer, kept) for writer in writers]) * self.counts[..., None]

    def _one(self, writer: Writer, kept: dict[int, Tensor]) -> Float[Tensor, "prompt pos d_model"]:
        if writer.layer < 0:
            return self.source.sites["resid_pre", 0] - self.base.sites["resid_pre", 0]
        if writer.head is None:
            return self.source.sites["mlp_out", writer.layer] - self.base.sites["mlp_out", writer.layer]
        if writer.layer not in kept:
            kept.clear()
            here, there = (self._z(run, writer.layer) for run in (self.source, self.base))
            kept[writer.layer] = self.parts.head_changes(writer.layer, here, there)
        return kept[writer.layer][:, :, writer.head]

    def _z(self, run: Run, layer: int) -> Float[Tensor, "prompt pos head d_head"]:
        z = run.sites["z", layer]
        return z.reshape(*z.shape[:2], self.parts.model.n_heads, -1)


def runs_agree(base: Run, source: Run) -> Bool[Tensor, "prompt"]:
    """For each pair of prompts, whether its two runs are the same as long as the tokens are: not so if a model looks ahead."""
    return agree_before_difference(base.tokens, source.tokens, base.resid[-1], source.resid[-1])


def stream(graph: Graph, run: Run, reader: Reader) -> Float[Tensor, "prompt pos d_model"]:
    """What a reader reads in a recorded run; an MLP that reads after its layer's heads needs the site `resid_mid`."""
    if reader.kind == "mlp" and not graph.parallel:
        return run.sites["resid_mid", reader.layer]
    return run.resid[reader.layer]
