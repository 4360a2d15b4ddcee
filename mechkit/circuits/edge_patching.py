"""The exact effect of an edge: one reader sees one writer's value from the other run, and nobody else does.

1. Run both prompts. A writer's *change* is what it wrote in the source run less what it wrote in the base run.
2. Add it to the stream that the reader reads in the base run, and compute what the reader makes of that: a head's query, key or
   value, what an MLP adds, the final stream. All writers of a reader come at once.
3. Write this into the base run, and replay what comes after it (`mechkit.engine.sweep`: blocks from the reader on, positions from
   the first difference on, many edges a batch). A call runs the prompts and proves the blocks once where memory allows; each
   sweep of some thousands of edges runs a few of its own rows whole.

Nothing is approximated: behind the reader the model itself runs, norms and all. In models with a norm behind the attention (Gemma
2 and 3, OLMo 2) what a head wrote is measured with its own run's scale.

Goldowsky-Dill et al. 2023, https://arxiv.org/abs/2304.05969 (path patching of single edges); Conmy et al. 2023,
https://arxiv.org/abs/2304.14997.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mechkit._check import checked, naming
from mechkit._precision import tolerance
from mechkit._progress import Progress
from mechkit.circuits._kinds import Group, Site
from mechkit.circuits._reads import Changes, at_positions, runs_agree
from mechkit.circuits.circuit import Circuit
from mechkit.circuits.edge_scores import EdgeScores, ScoredEdge
from mechkit.circuits.graph import Edge, Graph, Reader, Writer
from mechkit.engine import Cell, Derived, Edit, Recordings, sweep
from mechkit.experiment.edges import both_runs, chosen_positions, edge_experiment, where_it_counts
from mechkit.experiment.estimates import AnyMetric, Experiment
from mechkit.experiment.provenance import circuit_provenance, merged
from mechkit.hooks import HookedModel, Parts, Run, one_at_a_time
from mechkit.prompts import PromptPairs
from mechkit.result import Cost

KEY = "edge"  # the key of the values that are written
SAVE_EVERY = 30.0  # seconds
ROWS = 4096  # edges times prompts that are swept together, at least
ROW_BYTES = (
    2**17
)  # and as many as the budget has times this: a sweep more costs a second, one less shows progress later


@checked
@one_at_a_time
@torch.no_grad()
def edge_patching(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    edges: Iterable[Edge | ScoredEdge | str] | Circuit | None = None,
    *,
    direction: Literal["denoise", "noise"] = "denoise",
    positions: Sequence[int] | Sequence[str] | None = None,
    per_prompt: bool = True,
    checkpoint: str | Path | None = None,
    budget: int | None = None,
    progress: bool = True,
) -> EdgeScores:
    """The true effect of each edge: what its clean value adds to the metric.

    Args:
        model, pairs, metric: As for `activation_patching`.
        edges: Which: edges, names such as `"a9.h9->logits"`, what `EdgeScores.top` gives, or a circuit. Default: all of them.
        direction: `"denoise"`: the corrupted run, in which this edge alone carries its clean value. `"noise"`: the clean run, in
            which it alone carries its corrupted value. The sign is the same: positive where the clean value supports the metric.
        positions: Where the writer's change counts: indices, or names such as `"S2"`. Default: everywhere.
        per_prompt: Keep each prompt's effects, or their mean alone (less memory for all edges of large graphs).
        checkpoint: A file that is written every half minute, and from which the same call goes on if it was interrupted.
        budget: Bytes of working memory; default half of what the device has free (1 GiB on a CPU).
        progress: Whether to show a progress bar.

    Returns:
        `EdgeScores` in the metric's unit; NaN for edges that were not asked for. Identical prompts have 0 exactly.

    Raises:
        ValueError: an edge that does not exist, or twice; a circuit of another model; an architecture whose edges are not known;
            a checkpoint of another study; what `activation_patching` refuses.
    """
    edges = edges if edges is None or isinstance(edges, Circuit | str) else list(edges)
    experiment = edge_experiment(model, pairs, metric, direction, budget)
    graph, parts = Graph.of(model), Parts(model)
    wanted = chosen_edges(graph, model, edges)
    where = chosen_positions(experiment, positions)
    if checkpoint is not None and not Path(checkpoint).absolute().parent.is_dir():
        raise ValueError(f"checkpoint: there is no folder {str(Path(checkpoint).absolute().parent)!r} to write it into")
    parts.check(experiment.base.stack([0]))
    work = _Work(experiment, graph, parts, where, per_prompt)
    saved = None if checkpoint is None else _Checkpoint(Path(checkpoint), work)
    todo = [edge for edge in wanted if saved is None or not saved.has(edge)]
    with Progress(len(wanted), "edge", progress, done=len(wanted) - len(todo)) as bar:
        for some in work.batches(todo):
            work.patch(some)
            bar.update(len(some))
            if saved is not None and time.monotonic() - saved.at > SAVE_EVERY:
                saved.save()
    if saved is not None:
        saved.save()
    result = work.result(wanted)
    chosen_on = merged(result.provenance["prompts"], *_chosen_on(edges))
    return replace(result, result=replace(result.result, provenance={**result.provenance, "prompts": chosen_on}))


def _chosen_on(edges: Any) -> list[Any]:
    """The prompts on which somebody chose these edges: a circuit's, or those of scores. Names are taken as given by hand."""
    if isinstance(edges, Circuit):
        return [edges.provenance.get("prompts")]
    return list({id(edge.prompts): edge.prompts for edge in edges or () if isinstance(edge, ScoredEdge)}.values())


def chosen_edges(
    graph: Graph, model: HookedModel, edges: Iterable[Edge | ScoredEdge | str] | Circuit | None
) -> list[Edge]:
    """The edges that a user chose, in the order in which they are read."""
    if edges is None:
        return list(graph.edges)
    if isinstance(edges, str):
        raise ValueError(f"edges: expected a list of edges, got {edges!r}; write edges=[{edges!r}]")
    if isinstance(edges, Circuit):
        edges.check(model)
        if not len(edges):
            raise ValueError("edges: expected at least one edge, got a circuit without any")
        return sorted(edges, key=lambda edge: graph.index(edge)[::-1])
    edges = list(edges)
    if odd := [edge for edge in edges if not isinstance(edge, str | Edge | ScoredEdge)]:
        raise ValueError(f"edges: expected edges or their names, got {odd[0]!r}")
    with naming("edges"):
        found = [graph.edge(edge if isinstance(edge, str) else edge.name) for edge in edges]
    if not found:
        raise ValueError("edges: expected at least one edge, got none")
    if len(set(found)) != len(found):
        twice = next(edge for edge in found if found.count(edge) > 1)
        raise ValueError(f"edges: expected each edge once, got {twice.name!r} more than once")
    return sorted(found, key=lambda edge: graph.index(edge)[::-1])


class _Work:
    """One experiment of edges: the effects so far."""

    def __init__(
        self, experiment: Experiment, graph: Graph, parts: Parts, positions: Sequence[Any] | None, per_prompt: bool
    ) -> None:
        self.experiment, self.graph, self.parts, self.positions, self.per_prompt = (
            experiment,
            graph,
            parts,
            positions,
            per_prompt,
        )
        self.tokens, self.naive, self.how = 0, 0, "suffix"
        self.rows = max(ROWS, experiment.budget.bytes // ROW_BYTES)
        self.recordings: Recordings | None = None
        n = len(experiment.base) if per_prompt else 1
        wide = experiment.values[experiment.base_is].dtype
        self.values = torch.full((len(graph.writers), len(graph.readers), n), torch.nan, dtype=wide)

    def batches(self, edges: Sequence[Edge]) -> Iterator[list[Edge]]:
        """Edges whose values fit into a quarter of the budget, and not so many that progress is seldom seen and saved."""
        model, n_tokens = self.experiment.model, int(self.experiment.base.lengths.sum())
        room = self.experiment.budget.bytes // 2
        item = torch.empty((), dtype=model.dtype).element_size()
        attention = model.d_head * (model.n_heads + 2 * model.n_kv_heads) + 2 * model.d_model
        self.recordings = Recordings(frozenset(site for edge in edges for site in self.sites_of(edge)))
        some: list[Edge] = []
        seen: set[_Variant] = set()
        for edge in sorted(edges, key=lambda e: (self.graph.group_of(e.reader).readers.start, self.graph.index(e))):
            variant = self.variant(edge)
            if variant not in seen:
                needs = n_tokens * item * (2 * model.d_model if variant.reader else attention)
                if some and (needs > room or len(some) * len(self.experiment.base) >= self.rows):
                    yield some
                    some, seen, room = [], set(), self.experiment.budget.bytes // 2
                room -= needs
                seen.add(variant)
            some.append(edge)
        if some:
            yield some

    def place(self, reader: Reader) -> tuple[str, int, int | None]:
        """Where a reader's value is written: site, layer, head. What is added last goes into the stream behind the block, of
        which it changes nothing else."""
        kind = self.graph.group_of(reader).kind
        return ("resid_post", reader.layer, None) if kind.adds_last else kind.edited(reader)

    def variant(self, edge: Edge) -> _Variant:
        *_, head = self.place(edge.reader)
        return _Variant(self.graph.group_of(edge.reader), edge.reader if head is None else None, edge.writer)

    def sites_of(self, edge: Edge) -> set[Site]:
        """The activations of both runs from which an edge's value is made."""
        group = self.graph.group_of(edge.reader)
        sites = {self.graph.group_of(edge.writer).recorded}
        if group.within:
            sites.add(group.stream)
        if group.kind.adds_last:
            sites.add(group.kind.edited(edge.reader)[:2])
        return sites

    def patch(self, edges: Sequence[Edge]) -> None:
        """Computes the effects of some edges."""
        experiment = self.experiment
        asked: dict[Site, dict[_Variant, int]] = {}
        stacks: dict[Any, dict[_Variant, int]] = {}
        cells: list[Cell] = []
        sites: set[Site] = set()
        for edge in edges:
            group, variant = self.graph.group_of(edge.reader), self.variant(edge)
            site, layer, head = self.place(edge.reader)
            # Heads' values are for all of them, and share a stack.
            stack = asked[site, layer] = stacks.setdefault((site, layer) if head is None else group, {})
            cells.append((Edit(site, layer, KEY, head=head, variant=stack.setdefault(variant, len(stack))),))
            sites |= self.sites_of(edge)
        answers = sweep(
            experiment.model,
            experiment.base,
            cells,
            experiment.metric,
            source=experiment.source,
            derived={KEY: Derived(tuple(sorted(sites)), _Values(self, asked).make)},
            base_is=experiment.base_is,
            source_is=str(experiment.source_is),
            budget=max(1, experiment.budget.bytes * 2),
            progress=False,
            recordings=self.recordings,
        )
        assert answers.source is not None
        experiment.values[experiment.base_is], experiment.values[str(experiment.source_is)] = (
            answers.base,
            answers.source,
        )
        effects = answers.values - answers.base
        assert experiment.source is not None
        hashes = experiment.base.hashes(), experiment.source.hashes()  # of tokens and pictures
        alike = [one == other for one, other in zip(*hashes, strict=True)]
        effects[:, alike] = 0  # whole passes of other batches round differently
        effects = effects if experiment.base_is == "corrupted" else -effects
        effects = effects if self.per_prompt else effects.mean(1, keepdim=True)
        where = torch.tensor([self.graph.index(edge) for edge in edges])
        self.values[where[:, 0], where[:, 1]] = effects.to(self.values)
        self.tokens += answers.cost.block_tokens
        self.naive += answers.cost.naive_block_tokens
        self.how = self.how if answers.replay == "suffix" else answers.replay

    def result(self, wanted: Sequence[Edge] | None = None) -> EdgeScores:
        """Of the wanted edges, or of all that were computed."""
        experiment, values = self.experiment, self.values
        if wanted is not None:
            where = torch.tensor([self.graph.index(edge) for edge in wanted])
            values = torch.full_like(self.values, torch.nan)
            values[where[:, 0], where[:, 1]] = self.values[where[:, 0], where[:, 1]]
        return EdgeScores.of(
            self.graph,
            values if self.per_prompt else values[..., 0],
            baseline=experiment.values,
            metric=experiment.metric.name,
            unit=experiment.metric.unit,
            provenance=self.provenance(),
            cost=Cost(self.tokens, self.naive) if self.tokens else None,
            prompts=self.per_prompt,
        )

    def provenance(self) -> dict[str, Any]:
        experiment = self.experiment
        clean, corrupted = both_runs(experiment)
        positions = None if self.positions is None else list(self.positions)
        return circuit_provenance(
            experiment.model,
            clean,
            corrupted,
            technique="edge_patching",
            replay=self.how,
            corrupted_hash=corrupted.hash(),
            metric=experiment.metric.name,
            **experiment.provenance,
            positions=positions,
            positions_at=[experiment.named[at].tolist() if isinstance(at, str) else at for at in positions or ()],
        )


class _Variant(NamedTuple):
    """What tells the values apart that are written at one place; the edits of a head share those of all heads."""

    group: Group
    reader: Reader | None
    writer: Writer


class _Values:
    """Makes the values of a batch of edges from the two runs."""

    def __init__(self, work: _Work, asked: dict[Site, dict[_Variant, int]]) -> None:
        self.work, self.asked = work, asked
        self.ids: np.ndarray | None = None
        self.made: dict[Site, Tensor] = {}

    def make(self, base: Run, source: Run, ids: np.ndarray, site: str, layer: int) -> Tensor:
        """`[variant prompt pos …]`."""
        if self.ids is not ids:
            self.ids, self.made = ids, {}
        if (site, layer) not in self.made:
            self._make(base, source, ids, self.asked[site, layer])
        return self.made.pop((site, layer))

    def _make(self, base: Run, source: Run, ids: np.ndarray, stack: dict[_Variant, int]) -> None:
        """The values of a stack, at all places that have it."""
        work = self.work
        agree = runs_agree(base, source)
        counts = where_it_counts(work.experiment, work.positions, base.rows, source.rows, ids, agree)
        changes = Changes(work.graph, work.parts, base, source, counts)
        places = [place for place, of in self.asked.items() if of is stack]
        parts: dict[Site, list[Tensor]] = {place: [] for place in places}
        first = int(counts.flatten(0, -2).any(0).long().argmax())  # before it, all variants are as in the base run
        behind, ahead = at_positions(base, slice(first, None)), at_positions(base, slice(first))
        for (group, reader), variants in groupby(stack, key=lambda variant: variant[:2]):
            sites = [site for site, _ in places]
            reads = group.read_in(behind) + changes.of([variant.writer for variant in variants], first)
            values = self._values(behind, group, reader, reads, sites)
            if first:
                before = self._values(ahead, group, reader, group.read_in(ahead)[None], sites)
                values = {
                    site: torch.cat([before[site].expand(len(value), *before[site].shape[1:]), value], 2)
                    for site, value in values.items()
                }
            for site, layer in places:
                parts[site, layer].append(values[site])
        self.made |= {place: some[0] if len(some) == 1 else torch.cat(some) for place, some in parts.items()}

    def _values(
        self, base: Run, group: Group, reader: Reader | None, reads: Tensor, sites: list[str]
    ) -> dict[str, Tensor]:
        """What readers make of `reads`, `[variant prompt pos d_model]`, at the positions of `base`."""
        parts, graph = self.work.parts, self.work.graph
        if reader is None:
            return group.kind.values(parts, group, base, reads, graph.readers[group.readers], sites)
        site, layer, _ = group.kind.edited(reader)
        value = group.kind.values(parts, group, base, reads, [reader], [site])[site]
        if group.kind.adds_last:
            return {"resid_post": base.resid[layer + 1] - base.sites[site, layer] + value}
        return {site: value}


class _Checkpoint:
    """The file that an interrupted call goes on from."""

    def __init__(self, path: Path, work: _Work) -> None:
        self.path, self.work, self.at = path, work, time.monotonic()
        if not path.exists():
            return
        saved = EdgeScores.load(path)
        theirs, ours = dict(saved.provenance), work.provenance()
        for key in sorted({*theirs, *ours} - {"replay", "mechkit"}):
            if theirs.get(key) != ours.get(key):
                raise ValueError(
                    f"checkpoint: {path} is of another study: its {key} is {theirs.get(key)!r}, here it is {ours.get(key)!r}. "
                    "Give another file, or delete it"
                )
        if ("prompt" in saved.result.dims) != work.per_prompt:
            raise ValueError(
                f"checkpoint: {path} was written with per_prompt={not work.per_prompt}; give the same, or another file"
            )
        values = (saved.result.values if work.per_prompt else saved.values[..., None]).to(work.values)
        self._same_numbers(saved, values)
        work.values = values

    def _same_numbers(self, saved: EdgeScores, values: Tensor) -> None:
        """Computes a few of the saved edges again: what a metric reads shows in its numbers alone."""
        edges = saved.edges
        some = [edges[i] for i in sorted({0, len(edges) // 2, len(edges) - 1})]
        self.work.patch(some)
        experiment, graph = self.work.experiment, self.work.graph
        pairs = [(experiment.values[run], saved.baseline[run]) for run in experiment.values]
        pairs += [(self.work.values[graph.index(edge)], values[graph.index(edge)]) for edge in some]
        scale = max(1e-6, *(float(value.abs().max()) for value in experiment.values.values()))
        error = max(float((ours.to(theirs) - theirs).abs().max()) for ours, theirs in pairs)
        if not error <= 10 * tolerance("replay", experiment.model.dtype) * scale:
            raise ValueError(
                f"checkpoint: {self.path} is of another study: its numbers differ by {error:.1e} from those of this metric. Give "
                "another file, or delete it"
            )

    def has(self, edge: Edge) -> bool:
        return not bool(self.work.values[self.work.graph.index(edge)].isnan().any())

    def save(self) -> None:
        self.work.result().save(self.path)
        self.at = time.monotonic()
