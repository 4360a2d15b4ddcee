"""Automatic circuit discovery: from the logits down, remove every edge that the output does not miss.

1. Start with all edges. Go through the readers from the top down, and through each one's writers from the latest to the first.
2. Remove the edge (its reader then sees the writer's ablated value). If the distance from the full model grows by less than the
   threshold, the edge stays out; else it is put back. Components that nobody reads any more lose all their inputs untested.

Two things make it fast, and neither changes the outcome. Below the reader at hand nothing has been removed yet, so that only the
blocks from its layer on are run. And edges are tried in batches on the bet that all of them go: row j has the first j edges of
the batch removed. Up to the first edge that has to stay these are the very runs that the one-by-one procedure makes; what comes
after it is thrown away and tried again. The batch is as large as the odds allow.

Conmy et al. 2023, https://arxiv.org/abs/2304.14997.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechkit._check import checked
from mechkit._progress import Progress
from mechkit.circuits._evaluation import Ablation, Constants, Evaluator, provenance_of_ablation
from mechkit.circuits._objective import divergence, read_at
from mechkit.circuits.circuit import Circuit
from mechkit.circuits.graph import Edge
from mechkit.experiment.estimates import AnyMetric
from mechkit.experiment.provenance import circuit_provenance, merged
from mechkit.hooks import HookedModel, one_at_a_time
from mechkit.metrics import metric_for
from mechkit.prompts import PromptPairs
from mechkit.result import Cost

_FIRST_BATCH = 4
_MEMORY = 0.9  # of a batch, by the next one
_STAKE = 0.25  # batch size, as a share of the edges that go for each one that stays


@checked
@one_at_a_time
@torch.no_grad()
def acdc(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric | None = None,
    *,
    threshold: float,
    position: str | None = None,
    start: Circuit | None = None,
    ablation: Ablation | Constants = "resample",
    prune: bool | None = None,
    budget: int | None = None,
    progress: bool = True,
) -> Circuit:
    """Removes all edges whose removal costs less than `threshold`, one after the other, from the logits down.

    Args:
        model, pairs: As for `activation_patching`.
        metric: What must not change: the distance is the mean over prompts of its absolute difference from the full model's.
            Default: the Kullback-Leibler divergence (nats) of the circuit's next-token distribution from the full model's.
        threshold: How much the distance may grow with each edge, in the metric's unit (or nats); at least 0.
        position: Name of the position where the divergence is read, without a metric. Default: each prompt's last (`"END"`).
        start: Edges to begin with, such as another method's circuit that is to be thinned out. Default: all.
        ablation: What a reader sees of a removed edge: see `evaluate_circuit`.
        prune: Whether to drop dead ends at the end. Default: if ablated values are resampled, since then they carry nothing (a
            component that nothing feeds writes its ablated value); with other values they may.
        budget: Bytes of working memory; default half of what the device has free (1 GiB on a CPU).
        progress: Whether to show a progress bar.

    Returns:
        The circuit. Its `scores` are by how much the distance grew when each edge was tried (0 for those that went untested).
        Provenance: `distance`, the circuit's own; `cost`, against the same procedure with one whole run an edge.

    Raises:
        ValueError: a threshold below 0; a circuit of another model; what `evaluate_circuit` refuses.
    """
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not threshold >= 0:
        raise ValueError(f"threshold: expected a number of 0 or more, got {threshold!r}")
    if not isinstance(pairs, PromptPairs):
        raise ValueError(f"pairs: expected PromptPairs, whose two runs are compared; got {type(pairs).__name__}")
    if start is not None:
        start.check(model)
    if metric is not None and position is not None:
        raise ValueError(f"position: expected None with a metric, which says itself where it reads; got {position!r}")
    measured = divergence(pairs, None, position) if metric is None else metric_for(metric, pairs)
    search = _Search(Evaluator(model, pairs, measured, ablation, budget), threshold, metric is None, start)
    with Progress(int(search.members.sum()), "edge", progress) as bar:
        for group in search.groups():
            search.thin(group, bar)
    evaluator, graph = search.evaluator, search.evaluator.graph
    n_tested = int((~search.growth.isnan()).sum())
    naive = max(n_tested, 1) * int(pairs.clean.lengths.sum()) * model.n_layers
    cost = Cost(evaluator.block_tokens, naive)
    circuit = Circuit(
        graph,
        search.members,
        scores=search.growth.nan_to_num(0.0),
        model=model.name,
        weights_hash=model.weights_hash,
        task=pairs.task,
        provenance=circuit_provenance(
            model,
            pairs.clean,
            pairs.corrupted,
            technique="acdc",
            distance_of=measured.name,
            distance_at=read_at(measured),
            score_is="growth of the distance when the edge is removed",
            threshold=threshold,
            ablation=provenance_of_ablation(ablation),
            distance=search.distance,
            start=None if start is None else start.n_edges,
            n_tested=n_tested,
            cost=str(cost),
            block_tokens=cost.block_tokens,
            naive_block_tokens=cost.naive_block_tokens,
        ),
    )
    before = [] if start is None else [start.provenance.get("prompts")]
    before += [ablation.prompts] if isinstance(ablation, Constants) else []
    prompts = merged(circuit.provenance["prompts"], *before)
    circuit = replace(circuit, provenance={**circuit.provenance, "prompts": prompts})
    return circuit.pruned() if (ablation == "resample" if prune is None else prune) else circuit


class _Search:
    """The edges that are left, and how far they are from the full model."""

    def __init__(self, evaluator: Evaluator, threshold: float, kl: bool, start: Circuit | None) -> None:
        self.evaluator, self.threshold, self.kl = evaluator, threshold, kl
        graph = evaluator.graph
        self.whole = start is None  # then nothing is missing below the reader at hand
        self.members: Bool[Tensor, "writer reader"] = (graph.exists if start is None else start.members).clone()
        self.growth: Float[Tensor, "writer reader"] = torch.full(graph.exists.shape, torch.nan)
        self.distance = float(self._distances(self.members[None], graph.n_layers if self.whole else 0)[0])
        self._size = _FIRST_BATCH
        self._kept, self._decided = 0.0, 0.0  # edges that had to stay, of those tried lately

    def groups(self) -> Iterator[list[Edge]]:
        """Edges into readers that read the same stream, from the top down. None decides about another's component."""
        graph = self.evaluator.graph
        for group in reversed(graph.reading):
            readers, writers = reversed(graph.readers[group.readers]), graph.writers[: group.sees][::-1]
            yield self._alive([Edge(writer, reader) for reader in readers for writer in writers])

    def _alive(self, group: list[Edge]) -> list[Edge]:
        """Drops the inputs of components that nobody reads, and leaves out edges that are gone already."""
        graph, left = self.evaluator.graph, []
        for edge in group:
            at = graph.index(edge)
            components = graph.writers_of(edge.reader)
            read = not components or any(bool(self.members[graph.writer_index[w.name]].any()) for w in components)
            if not read:
                self.members[at] = False
            elif self.members[at]:
                left.append(edge)
        return left

    def thin(self, edges: list[Edge], bar: Progress) -> None:
        """Decides about some edges, in their order."""
        while edges:
            some = edges[: self._size]
            where = [self.evaluator.graph.index(edge) for edge in some]
            rows = self.members.repeat(len(some), 1, 1)
            for i, at in enumerate(where):
                rows[i:, at[0], at[1]] = False  # row i has the first i + 1 edges removed
            distances = self._distances(rows, some[0].reader.layer if self.whole else 0)
            decided = self._decide(where, distances)
            bar.update(decided)
            kept = sum(bool(self.members[at]) for at in where[:decided])
            self._kept, self._decided = _MEMORY * self._kept + kept, _MEMORY * self._decided + decided
            # The bet is that none of the batch must stay; its odds are what was seen lately.
            odds = self._decided / max(self._kept, 0.01)
            self._size = max(1, min(int(_STAKE * odds), 2 * self._size))
            edges = edges[decided:]

    def _decide(self, where: list[tuple[int, int]], distances: list[float]) -> int:
        """Removes edges up to the first that must stay. Returns how many are decided about, that one included."""
        for i, (at, distance) in enumerate(zip(where, distances, strict=True)):
            growth = distance - self.distance
            self.growth[at] = growth
            if not growth < self.threshold:
                return i + 1
            self.members[at] = False
            self.distance = distance
        return len(where)

    def _distances(self, circuits: Bool[Tensor, "circuit writer reader"], first_layer: int) -> list[float]:
        values = self.evaluator.evaluate(circuits, first_layer=first_layer)
        off = values if self.kl else (values - self.evaluator.values["clean"]).abs()
        return [float(x) for x in off.double().mean(1)]
