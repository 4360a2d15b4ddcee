"""A circuit: a set of a model's edges, with the task it is for and where it came from.

From scores it is made in two steps.

1. Choose edges: the n best (`"top"`), or the best that can be reached (`"greedy"`): begin at the logits; time and again take the
   best edge into a component that is already in, which brings its writer in.
2. Prune dead ends: drop edges whose writer is not fed from the embedding, directly or not, and edges into components that do
   not reach the logits. A head is fed if its query, key or value is.

Greedy construction and pruning as in Hanna et al. 2024, https://arxiv.org/abs/2403.17806 (EAP-IG), with one difference: where
query heads share a key and a value, an edge into those feeds all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechkit._check import checked, naming
from mechkit._drawn import Drawn
from mechkit.circuits import _circuit_json, _selection
from mechkit.circuits.edge_scores import EdgeScores, completeness_warning
from mechkit.circuits.graph import Edge, Graph, Reader, Writer
from mechkit.experiment.provenance import merged
from mechkit.hooks import HookedModel

if TYPE_CHECKING:
    import networkx  # type: ignore[import-untyped]


@checked
@dataclass(frozen=True, eq=False)
class Circuit(Drawn):
    """A set of edges. Two circuits are equal if their graphs and edges are.

    `a | b`, `a & b`, `a - b`, `a ^ b` and `a <= b` are set operations; scores are then the left one's. `len`, iteration (by
    reader and then by writer) and `edge in circuit` work as on sets.

    Attributes:
        graph: Of the model.
        members: `[writer reader]`, which edges are in.
        scores: `[writer reader]` of all edges, in the circuit or not; NaN where there is none. `None` if nothing was scored.
        model: The model's name, `""` if it is not known.
        weights_hash: Fingerprint of the model's weights, `""` if it is not known.
        task: What the circuit does.
        provenance: JSON values: where the scores came from, and how the edges were chosen.
    """

    graph: Graph
    members: Bool[Tensor, "writer reader"]
    scores: Float[Tensor, "writer reader"] | None = None
    model: str = ""
    weights_hash: str = ""
    task: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        exists = self.graph.exists
        members = self.members.detach().cpu().clone()
        if members.dtype != torch.bool or members.shape != exists.shape:
            raise ValueError(
                f"members: expected a bool tensor {list(exists.shape)} (writers, readers of {self.graph}), got {members.dtype} "
                f"{list(members.shape)}"
            )
        if n := int((members & ~exists).sum()):
            raise ValueError(
                f"members: expected edges of the graph, got {n} where a reader reads before the writer writes"
            )
        scores = self.scores
        if scores is not None:
            if not scores.is_floating_point() or scores.shape != exists.shape:
                raise ValueError(
                    f"scores: expected a float tensor {list(exists.shape)}, got {scores.dtype} {list(scores.shape)}"
                )
            scores = scores.detach().cpu().masked_fill(~exists, torch.nan)
            if scores.isinf().any():
                raise ValueError(f"scores: expected finite numbers, got {int(scores.isinf().sum())} infinite ones")
        try:
            provenance = json.loads(json.dumps(dict(self.provenance)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"provenance: expected JSON values, got {self.provenance!r}") from error
        checked = {"members": members, "scores": scores, "provenance": MappingProxyType(provenance)}
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        parts = (self.graph, self.members, self.scores, self.model, self.weights_hash, self.task, dict(self.provenance))
        return Circuit, parts

    # --- making one

    @classmethod
    @checked
    def from_scores(
        cls,
        scores: EdgeScores,
        *,
        n_edges: int | None = None,
        threshold: float | None = None,
        method: Literal["top", "greedy"] = "top",
        by: Literal["abs", "value"] = "abs",
        prune: bool = True,
    ) -> Circuit:
        """The edges that score best.

        Args:
            scores: Of the edges; averaged over prompts. Edges that were not computed are never chosen.
            n_edges: How many to choose; pruning may leave fewer, and `"greedy"` may find fewer. Give this or `threshold`.
            threshold: Choose all edges that score at least this, in the metric's unit.
            method: `"top"` chooses the best edges wherever they are; `"greedy"` goes upstream from the logits.
            by: Best is furthest from 0 (`"abs"`), or largest (`"value"`; smallest for a metric that is lower in the
                clean run, such as a divergence), which leaves out what works against the task. Ties go
                to the earlier reader, then to the earlier writer.
            prune: Whether to drop dead ends. They carry nothing where ablated values are resampled; with zero or mean ablation a
                component that nothing feeds may still write something else than its ablated value.

        Returns:
            A circuit whose `provenance["selection"]` says how many edges were `asked` for, `chosen` and `kept`.

        Raises:
            ValueError: not exactly one of `n_edges` and `threshold`, either out of range, or another `method` or `by`.
        """
        if method not in ("top", "greedy") or by not in ("abs", "value"):
            raise ValueError(
                f"method, by: expected 'top' or 'greedy', 'abs' or 'value'; got method={method!r} and by={by!r}"
            )
        if (n_edges is None) == (threshold is None):
            raise ValueError(
                f"n_edges, threshold: expected exactly one of them, got n_edges={n_edges!r} and threshold={threshold!r}"
            )
        if not isinstance(scores, EdgeScores):
            raise ValueError(f"scores: expected EdgeScores, got {type(scores).__name__}")
        values = scores.values.detach().cpu()
        keys = values.abs() if by == "abs" else values * scores.orientation
        computed = int((~keys.isnan()).sum())
        if n_edges is not None and (not _whole(n_edges) or not 0 <= n_edges <= computed):
            raise ValueError(f"n_edges: expected 0 to {computed}, as many as have a score; got {n_edges!r}")
        if threshold is not None and not (threshold >= 0 or (by == "value" and threshold < 0)):
            raise ValueError(f"threshold: expected a number{', at least 0' if by == 'abs' else ''}; got {threshold!r}")
        limit = computed if n_edges is None else n_edges
        lowest = float("-inf") if threshold is None else float(threshold)
        choose = _selection.top if method == "top" else _selection.greedy
        members = _selection.members_at(scores.graph, choose(scores.graph, keys, limit, lowest))
        chosen = int(members.sum())
        if prune:
            members = _selection.alive(scores.graph, members)
        selection = {
            "method": method,
            "by": by,
            "asked": None if n_edges is None else int(n_edges),
            "threshold": threshold,
            "pruned": prune,
            "chosen": chosen,
            "kept": int(members.sum()),
        }
        origin = scores.provenance
        return cls(
            scores.graph,
            members,
            values,
            model=str(origin.get("model") or ""),
            weights_hash=str(origin.get("weights_hash") or ""),
            task=str(origin.get("task") or ""),
            provenance={
                **origin,
                # Scores that are no effects on a metric (`score_is` says what they are) do not raise or lower it.
                "metric": None if "score_is" in origin else scores.metric,
                "unit": None if "score_is" in origin else scores.unit,
                "selection": selection,
            },
        )

    @classmethod
    @checked
    def from_edges(cls, model: HookedModel | Graph, edges: Iterable[Edge | str], *, task: str = "") -> Circuit:
        """A circuit by hand, as it stands: nothing is pruned.

        Args:
            model: The model, or its graph.
            edges: Edges or their names, such as `"a9.h9->logits"` or `"9.9 -> logits"`.
            task: What the circuit does.

        Raises:
            ValueError: an edge that does not exist, or a single name instead of a list.
        """
        if isinstance(edges, str):
            raise ValueError(f"edges: expected a list of edges, got {edges!r}; write [{edges!r}]")
        empty = cls.empty(model, task=task)
        with naming("edges"):
            members = _selection.members_at(empty.graph, [empty._index(edge) for edge in edges])
        return replace(empty, members=members, provenance={**empty.provenance, "selection": {"method": "by hand"}})

    @classmethod
    @checked
    def empty(cls, model: HookedModel | Graph, *, task: str = "") -> Circuit:
        """The circuit without edges, of a model or a graph."""
        known: dict[str, Any] = {}
        if isinstance(model, HookedModel):
            hash_, width = model.weights_hash, model.d_model
            known = {"model": model.name, "weights_hash": hash_, "provenance": {"d_model": width}}
        graph = model if isinstance(model, Graph) else Graph.of(model)
        return cls(graph, torch.zeros_like(graph.exists), task=task, **known)

    @classmethod
    @checked
    def full(cls, model: HookedModel | Graph, *, task: str = "") -> Circuit:
        """The circuit of all edges, of a model or a graph."""
        empty = cls.empty(model, task=task)
        return replace(empty, members=empty.graph.exists)

    @classmethod
    @checked
    def random(cls, model: HookedModel | Graph, n_edges: int, seed: int, *, connected: bool = True) -> Circuit:
        """A random circuit of exactly `n_edges` edges, to compare a circuit of that size with.

        Connected ones are built as `from_scores(method="greedy", prune=True)` builds them, from scores drawn uniformly at random:
        as many edges as leave no more than `n_edges` after pruning, or where that is none, a path by way of one component. What
        is then missing is drawn uniformly from the edges between components that are in. Not all such circuits are equally
        likely. With `connected=False` all sets of edges are, and most edges are dead ends.

        Args:
            model: The model, or its graph.
            n_edges: How many.
            seed: Of the draw.
            connected: Whether every edge must lie on a path from the embedding to the logits.

        Raises:
            ValueError: `n_edges` is negative or more than there are.
        """
        empty = cls.empty(model)
        graph = empty.graph
        if not _whole(n_edges) or not 0 <= n_edges <= graph.n_edges:
            raise ValueError(f"n_edges: expected 0 to {graph.n_edges}, got {n_edges!r}")
        generator = torch.Generator().manual_seed(seed)
        draw = _selection.random_connected if connected else _selection.random_edges
        members = draw(graph, n_edges, generator)
        selection = {"method": "random", "seed": int(seed), "connected": connected, "kept": int(n_edges)}
        return replace(empty, members=members, provenance={**empty.provenance, "selection": selection})

    # --- as a set

    @property
    def n_edges(self) -> int:
        return int(self.members.sum())

    def __len__(self) -> int:
        return self.n_edges

    def __iter__(self) -> Iterator[Edge]:
        places = self.members.T.nonzero().tolist()
        return (Edge(self.graph.writers[w], self.graph.readers[r]) for r, w in places)

    def __contains__(self, edge: Edge | str) -> bool:
        """Whether an edge is in; a name that is no edge of the graph is refused with a `ValueError`."""
        return bool(self.members[self._index(edge)])

    @property
    def edges(self) -> tuple[Edge, ...]:
        """By reader and then by writer."""
        return tuple(self)

    @property
    def nodes(self) -> tuple[Writer, ...]:
        """The components that write over an edge of the circuit, in the order in which they write."""
        return tuple(self.graph.writers[w] for w in self.members.any(1).nonzero().flatten().tolist())

    @property
    def density(self) -> float:
        """Share of the graph's edges that are in, 0 to 1."""
        return self.n_edges / self.graph.n_edges

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Circuit):
            return NotImplemented
        return self.graph == other.graph and torch.equal(self.members, other.members)

    def __hash__(self) -> int:
        return hash((self.graph, self.members.numpy().tobytes()))

    def __or__(self, other: Circuit) -> Circuit:
        return self._combine(other, "|", self.members | self._members_of(other))

    def __and__(self, other: Circuit) -> Circuit:
        return self._combine(other, "&", self.members & self._members_of(other))

    def __sub__(self, other: Circuit) -> Circuit:
        return self._combine(other, "-", self.members & ~self._members_of(other))

    def __xor__(self, other: Circuit) -> Circuit:
        return self._combine(other, "^", self.members ^ self._members_of(other))

    def __le__(self, other: Circuit) -> bool:
        return not bool((self.members & ~self._members_of(other)).any())

    def _members_of(self, other: Circuit) -> Tensor:
        if not isinstance(other, Circuit):
            raise ValueError(f"expected another circuit, got {type(other).__name__}")
        if other.graph != self.graph:
            raise ValueError(f"expected circuits of the same graph, got {self.graph} and {other.graph}")
        return other.members

    def _combine(self, other: Circuit, operation: str, members: Tensor) -> Circuit:
        if self.weights_hash and other.weights_hash and self.weights_hash != other.weights_hash:
            raise ValueError(
                f"expected circuits of one model, got {self.model or 'one'} ({self.weights_hash}) and {other.model or 'one'} "
                f"({other.weights_hash}): their weights differ"
            )
        same = {name: getattr(self, name) or getattr(other, name) for name in ("model", "weights_hash")}
        task = " and ".join(dict.fromkeys(task for task in (self.task, other.task) if task))
        prompts = merged(self.provenance.get("prompts"), other.provenance.get("prompts"))
        of = [dict(self.provenance), dict(other.provenance)]
        provenance = {**self.provenance, "operation": operation, "of": of, "prompts": prompts}
        return replace(self, members=members, provenance=provenance, task=task, **same)

    @checked
    def with_edge(self, *edges: Edge | str) -> Circuit:
        """The circuit with these edges in it too, given as edges or by name."""
        return self._changed(edges, True)

    @checked
    def without(self, *edges: Edge | str) -> Circuit:
        """The circuit without these edges; those that are not in it change nothing."""
        return self._changed(edges, False)

    def _changed(self, edges: Iterable[Edge | str], present: bool) -> Circuit:
        members = self.members.clone()
        for edge in edges:
            members[self._index(edge)] = present
        return replace(self, members=members, provenance={**self.provenance, "edited": True})

    def pruned(self) -> Circuit:
        """The circuit without dead ends: only edges on some path from the embedding to the logits."""
        return replace(self, members=_selection.alive(self.graph, self.members))

    def _index(self, edge: Edge | str) -> tuple[int, int]:
        return self.graph.index(self.graph.edge(edge) if isinstance(edge, str) else edge)

    @checked
    def targets(self, reader: Reader) -> tuple[Writer, ...]:
        """The components that an edge into this reader feeds, for drawing: none for the logits.

        Of the heads that share a key-value head, those that write over an edge of the circuit; all, if none does.
        """
        fed = self.graph.writers_of(reader)
        nodes = set(self.nodes) if len(fed) > 1 else set(fed)
        return tuple(writer for writer in fed if writer in nodes) or fed

    @checked
    def check(self, model: HookedModel) -> None:
        """Refuses a model that this is no circuit of.

        Raises:
            ValueError: the graphs differ, or the weights are known and differ.
        """
        if (graph := Graph.of(model)) != self.graph:
            raise ValueError(f"circuit: a circuit of another model: expected {graph} ({model.name}), got {self.graph}")
        if self.weights_hash and self.weights_hash != model.weights_hash:
            raise ValueError(
                f"circuit: a circuit of another model: expected weights {model.weights_hash} ({model.name}), got "
                f"{self.weights_hash} ({self.model or 'no name'}); "
                "if that is meant, use dataclasses.replace(circuit, weights_hash='')"
            )

    # --- elsewhere

    @checked
    def to_json(
        self, path: str | os.PathLike[str], format: Literal["mechkit", "mib"] = "mechkit", *, d_model: int | None = None
    ) -> Path:
        """Write the circuit as JSON; an existing file is replaced in one step.

        Args:
            path: Where to.
            format: `"mechkit"` keeps everything. `"mib"` is read by MIB and the EAP-IG package: all edges, with score and
                `in_graph`; scores are 0 if there are none. It has a key and a value for each query head: where these are
                shared, every head of the group gets an equal part of the score, and is in the graph if the edge is.
            d_model: Width of the residual stream, which the `"mib"` format states; known if the circuit came with its model.

        Raises:
            ValueError: another format; for `"mib"`, a model without MLPs, a score that is missing, or no `d_model`.
        """
        return _circuit_json.write(self, Path(path), format, d_model)

    @classmethod
    @checked
    def from_json(cls, path: str | os.PathLike[str], model: HookedModel | Graph | None = None) -> Circuit:
        """Read a circuit from either format of `to_json`.

        Scores of a `"mib"` file are taken as they are. What their sign means depends on how they were made: in MIB's own IOI file
        of GPT-2 the name movers' are negative.

        Args:
            path: Which file.
            model: If given, the circuit must be of this model (or graph). A `"mib"` file does not say which query heads share a
                key and a value: give the model, and the scores of a group are summed, and the edge is in if any is.

        Raises:
            ValueError: the file is something else or of another model, lacks edges, names unknown ones, or a score is no number.
        """
        return _circuit_json.read(Path(path), model, cls)

    def to_networkx(self) -> networkx.MultiDiGraph:
        """The circuit as a networkx graph from `input` to `logits`.

        Nodes are components (attributes `layer` and `head`), those of `nodes` and what they feed. Edges have the attributes
        `name`, `kind` (`"q"`, `"k"`, `"v"`, `"mlp"` or `"logits"`, also the key) and `score` (if there is one). An edge into
        a key or value that several heads share leads to each of them that is in the circuit, under the same `name`.

        Raises:
            ImportError: networkx is not installed.
        """
        try:
            import networkx as nx
        except ImportError as error:
            raise ImportError("to_networkx: expected networkx, which is not installed; pip install networkx") from error
        drawn = nx.MultiDiGraph()
        first, last = self.graph.writers[0], self.graph.readers[-1]
        drawn.add_node(first.name, layer=first.layer, head=first.head)
        for edge in self:
            score = None if self.scores is None else self.scores[self._index(edge)].item()
            attributes: dict[str, Any] = {"name": edge.name, "kind": edge.reader.kind}
            if score is not None and score == score:
                attributes["score"] = score
            for writer in {edge.writer, *self.targets(edge.reader)}:
                drawn.add_node(writer.name, layer=writer.layer, head=writer.head)
            for target in self.targets(edge.reader) or [edge.reader]:
                drawn.add_edge(edge.writer.name, target.name, key=edge.reader.kind, **attributes)
        drawn.add_node(last.name, layer=last.layer, head=last.head)
        return drawn

    def __repr__(self) -> str:
        size = f"{self.n_edges:,} of {self.graph.n_edges:,} edges, {len(self.nodes)} nodes"
        kept = _selection.kept_of(self.n_edges, self.provenance)
        parts = (size, kept, self.model, self.task, completeness_warning(self.provenance))
        return f"Circuit({'; '.join(part for part in parts if part)})"


def _whole(number: Any) -> bool:
    return hasattr(number, "__index__") and not isinstance(number, bool)
