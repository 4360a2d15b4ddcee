"""The exact effect of an edge: one reader sees one writer's value from the other run, and nobody else does.

1. Run both prompts. A writer's *change* is what it wrote in the source run less what it wrote in the base run.
2. Add it to the stream that the reader reads in the base run, and compute what the reader makes of that: a head's query, key or
   value, what an MLP adds, the final stream. All writers of a reader come at once.
3. Write this into the base run, and replay what comes after it (`mechkit.engine.sweep`: blocks from the reader on, positions from
   the first difference on, many edges a batch; proved on a sample in every call).

Nothing is approximated: behind the reader the model itself runs, norms and all. In models with a norm behind the attention (Gemma
2 and 3, OLMo 2) what a head wrote is measured with its own run's scale.

Goldowsky-Dill et al. 2023, https://arxiv.org/abs/2304.05969 (path patching of single edges); Conmy et al. 2023,
https://arxiv.org/abs/2304.14997.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mechkit._check import checked, naming
from mechkit._precision import tolerance
from mechkit._progress import Progress
from mechkit.circuits._reads import Changes, runs_agree, stream
from mechkit.circuits.circuit import Circuit
from mechkit.circuits.edge_scores import EdgeScores, ScoredEdge
from mechkit.circuits.graph import Edge, Graph, Reader, Writer
from mechkit.engine import Cell, Derived, Edit, sweep
from mechkit.experiment.edges import both_runs, chosen_positions, edge_experiment, where_it_counts
from mechkit.experiment.estimates import AnyMetric, Experiment
from mechkit.experiment.provenance import circuit_provenance, merged
from mechkit.hooks import HookedModel, Parts, Run, one_at_a_time
from mechkit.prompts import PromptPairs
from mechkit.result import Cost

KEY = "edge"  # the key of the values that are written
SAVE_EVERY = 30.0  # seconds
ROWS = 4096  # edges times prompts that are swept together


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
    parts.check(experiment.base.tokens[0][None].to(model.device))
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
        n = len(experiment.base) if per_prompt else 1
        wide = experiment.values[experiment.base_is].dtype
        self.values = torch.full((len(graph.writers), len(graph.readers), n), torch.nan, dtype=wide)

    def batches(self, edges: Sequence[Edge]) -> Iterator[list[Edge]]:
        """Edges whose values fit into a quarter of the budget, and not so many that progress is seldom seen and saved."""
        model, n_tokens = self.experiment.model, int(self.experiment.base.lengths.sum())
        room = self.experiment.budget.bytes // 2
        item = torch.empty((), dtype=model.dtype).element_size()
        attention = model.d_head * (model.n_heads + 2 * model.n_kv_heads) + 2 * model.d_model
        some: list[Edge] = []
        seen: set[tuple[Any, ...]] = set()
        for edge in sorted(edges, key=lambda e: (e.reader.layer, e.reader.kind == "mlp", self.graph.index(e))):
            variant = _variant(edge)
            if variant not in seen:
                needs = n_tokens * item * (attention if edge.reader.kind in "qkv" else 2 * model.d_model)
                if some and (needs > room or len(some) * len(self.experiment.base) >= ROWS):
                    yield some
                    some, seen, room = [], set(), self.experiment.budget.bytes // 2
                room -= needs
                seen.add(variant)
            some.append(edge)
        if some:
            yield some

    def patch(self, edges: Sequence[Edge]) -> None:
        """Computes the effects of some edges."""
        experiment, last = self.experiment, self.experiment.model.n_layers - 1
        variants: dict[tuple[str, int], dict[tuple[Any, ...], int]] = {}
        cells: list[Cell] = []
        for edge in edges:
            site, layer = place(edge.reader, last)
            stacked = variants.setdefault(("qkv", layer) if site in ("q", "k", "v") else (site, layer), {})
            i = stacked.setdefault(_variant(edge), len(stacked))
            cells.append((Edit(site, layer, KEY, head=edge.reader.head, variant=i),))
        asked = {
            key: [what for what, _ in sorted(of.items(), key=lambda item: item[1])] for key, of in variants.items()
        }
        layers = sorted({edge.writer.layer for edge in edges if edge.writer.layer >= 0})
        sites = set(self.parts.writer_sites(layers))
        if not self.graph.parallel:
            sites |= {("resid_mid", edge.reader.layer) for edge in edges if edge.reader.kind == "mlp"}
        sites |= {("mlp_out", edge.reader.layer) for edge in edges if edge.reader.kind == "mlp"}
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
        )
        assert answers.source is not None
        experiment.values[experiment.base_is], experiment.values[str(experiment.source_is)] = (
            answers.base,
            answers.source,
        )
        effects = answers.values - answers.base
        assert experiment.source is not None
        alike = [torch.equal(a, b) for a, b in zip(experiment.base.tokens, experiment.source.tokens, strict=True)]
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


def place(reader: Reader, last_layer: int) -> tuple[str, int]:
    """Where a reader's value is written: its query, key or value; else the stream after it, of which it changes nothing else."""
    if reader.kind == "logits":
        return "resid_post", last_layer
    return ("resid_post" if reader.kind == "mlp" else reader.kind), reader.layer


def _variant(edge: Edge) -> tuple[Any, ...]:
    """What tells the values apart that are written at one place. Queries, keys and values of a layer share a writer's."""
    kind = "qkv" if edge.reader.kind in ("q", "k", "v") else edge.reader.kind
    return edge.reader.layer, kind, edge.writer


class _Values:
    """Makes the values of a batch of edges from the two runs."""

    def __init__(self, work: _Work, asked: dict[tuple[str, int], list[tuple[Any, ...]]]) -> None:
        self.work, self.asked = work, asked
        self.ids: np.ndarray | None = None
        self.projected: dict[tuple[str, int], Tensor] = {}

    def make(self, base: Run, source: Run, ids: np.ndarray, site: str, layer: int) -> Tensor:
        """`[variant prompt pos …]`."""
        work = self.work
        counts = where_it_counts(
            work.experiment, work.positions, base.tokens, source.tokens, ids, runs_agree(base, source)
        )
        changes = Changes(work.parts, base, source, counts)
        if site == "resid_post":
            asked = self.asked[site, layer]
            return torch.cat([self._after(changes, kind, at, writers) for at, kind, writers in _runs(asked)])
        if self.ids is not ids:
            self.ids, self.projected = ids, {}
        if (site, layer) not in self.projected:
            writers = [writer for _, _, writer in self.asked["qkv", layer]]
            normed = self.work.parts.attention_input(layer, changes.base.resid[layer] + changes.of(writers))
            for which in ("q", "k", "v"):
                self.projected[which, layer] = self.work.parts.project(layer, which, normed)
        return self.projected.pop((site, layer))

    def _after(self, changes: Changes, kind: str, layer: int, writers: list[Writer]) -> Tensor:
        """The stream after an MLP, or the final one, if this reader alone sees the changes."""
        base, change = changes.base, changes.of(writers)
        if kind == "logits":
            return base.resid[-1] + change
        parts, graph = self.work.parts, self.work.graph
        reads = stream(graph, base, Reader("mlp", layer)) + change
        return base.resid[layer + 1] - base.sites["mlp_out", layer] + parts.mlp(layer, reads)


def _runs(asked: list[tuple[Any, ...]]) -> Iterator[tuple[int, str, list[Writer]]]:
    """Consecutive variants of one reader."""
    first = 0
    for i in range(1, len(asked) + 1):
        if i == len(asked) or asked[i][:2] != asked[first][:2]:
            yield asked[first][0], asked[first][1], [writer for *_, writer in asked[first:i]]
            first = i


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
