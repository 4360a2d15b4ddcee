"""A model as a graph: who writes into the residual stream, who reads from it, and every edge between them.

1. *Writers* add to the residual stream: the embedding (`input`; positions included, where they are learned vectors), each head
   (`a9.h6`), each MLP (`m3`).
2. *Readers* take the sum of what was written before them: the query of each head (`a9.h6<q>`), the key and the value of each
   key-value head (`a9.kv2<k>`, or `a9.h6<k>` where heads share none), each MLP (`m3`), and the unembedding (`logits`).
   Grids of heads label the same head `L9H6`, as TransformerLens does; wherever a name is asked for, that is read too.
3. An *edge* joins a writer to a reader that comes after it. Writers are sorted by when they write, so that the writers of a
   reader are always the first so many: `Graph.n_writers(reader)`.

What the attention's output bias writes is the same whatever is read: it belongs to no head. An MLP's belongs to the MLP.

Elhage et al. 2021, https://transformer-circuits.pub/2021/framework; names as in Mueller et al. 2025 (MIB),
https://arxiv.org/abs/2504.13151, and the EAP-IG package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from mechkit._check import checked
from mechkit.circuits import _kinds
from mechkit.circuits._kinds import Group, Kind, Site
from mechkit.hooks import HookedModel

_CELLS = 2**30  # pairs of a writer and a reader, at most: a gigabyte of masks


@dataclass(frozen=True, order=True)
class Writer:
    """A component that adds to the residual stream.

    Attributes:
        layer: The layer; -1 for the embedding.
        head: The head; `None` for an MLP and for the embedding.
        kind: `"input"`, `"head"` or `"mlp"`: found from the other two if it is not given.
    """

    layer: int
    head: int | None = None
    kind: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        found = "input" if self.layer < 0 else "mlp" if self.head is None else "head"
        object.__setattr__(self, "kind", self.kind or found)

    @cached_property
    def name(self) -> str:
        return _kinds.of_writer(self.kind).writer_name(self)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Reader:
    """An input that is read off the residual stream.

    Attributes:
        kind: `"q"`, `"k"`, `"v"`, `"mlp"` or `"logits"`.
        layer: The layer; the number of layers for the logits.
        head: The query head of a `"q"`, the key-value head of a `"k"` or `"v"`, else `None`.
        shared: Whether several query heads use this key-value head (which only its name shows).
    """

    kind: str
    layer: int
    head: int | None = None
    shared: bool = False

    @cached_property
    def name(self) -> str:
        return _kinds.of_reader(self.kind).reader_name(self)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Edge:
    """What one writer adds to what one reader reads."""

    writer: Writer
    reader: Reader

    @property
    def name(self) -> str:
        """`"a0.h3->a4.h1<k>"`."""
        return f"{self.writer.name}->{self.reader.name}"

    def __str__(self) -> str:
        return self.name


@checked
@dataclass(frozen=True)
class Graph:
    """All writers, readers and edges of a model. Two graphs are equal if they have the same shape.

    Args:
        n_layers, n_heads, n_kv_heads: As the model's.
        parallel: Whether attention and MLP of a layer read the same stream, so that no head writes to its own layer's MLP.
        mlps: Whether there are MLPs.

    Example:
        >>> graph = Graph(n_layers=12, n_heads=12, n_kv_heads=12)
        >>> graph.n_edges
        32491
        >>> graph.edge("a9.h9->logits")
        Edge(writer=Writer(layer=9, head=9), reader=Reader(kind='logits', layer=12, head=None, shared=False))
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool = False
    mlps: bool = True

    def __post_init__(self) -> None:
        sizes = (self.n_layers, self.n_heads, self.n_kv_heads)
        if any(isinstance(n, bool) or not hasattr(n, "__index__") or n < 1 for n in sizes):
            raise ValueError(f"n_layers, n_heads, n_kv_heads: expected whole numbers of 1 or more, got {sizes}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads: expected a number that divides the {self.n_heads} heads, since each one serves equally many; got "
                f"{self.n_kv_heads}"
            )
        writers, readers = self.n_cells
        if writers * readers > _CELLS:
            raise ValueError(
                f"n_layers, n_heads: expected a graph of at most {_CELLS:,} pairs of a writer and a reader, got {sizes}, which "
                f"has {writers * readers:,}"
            )

    @classmethod
    @checked
    def of(cls, model: HookedModel) -> Graph:
        """A model's graph.

        Raises:
            ValueError: some layer lacks queries, keys, values or heads' outputs (state-space models, hybrids, latent attention).
        """
        needed = [site for kind in _kinds.KINDS for site in kind.needs(model)]
        within = ["resid_mid"] if model.has_site("resid_mid") else []
        model.check_every_layer([*needed, *within], "a graph of edges")
        return cls(
            model.n_layers,
            model.n_heads,
            model.n_kv_heads,
            parallel=not model.has_site("resid_mid"),
            mlps=model.has_site("mlp_out"),
        )

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of its nodes."""
        return tuple(kind for kind in _kinds.KINDS if kind.layers(self))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The nodes of each layer and kind, in the order in which they read and write: the embedding, the heads of layer 0, its
        MLP, the heads of layer 1, …, the logits."""
        return tuple(_kinds.groups_of(self))

    @cached_property
    def writing(self) -> tuple[Group, ...]:
        """The groups that have writers."""
        return tuple(group for group in self.groups if group.writes)

    @cached_property
    def reading(self) -> tuple[Group, ...]:
        """The groups that have readers."""
        return tuple(group for group in self.groups if group.reads)

    @property
    def recorded(self) -> list[Site]:
        """The activations that tell what all writers wrote, in the order of `writing`."""
        return [group.recorded for group in self.writing]

    @cached_property
    def writers(self) -> tuple[Writer, ...]:
        """In the order in which they write: `input`, the heads of layer 0, its MLP, the heads of layer 1, …"""
        return tuple(
            Writer(group.layer, i if group.kind.numbered else None, group.kind.name)
            for group in self.writing
            for i in range(group.kind.n_writers(self))
        )

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """In the order in which they read: queries, keys and values of layer 0, its MLP, …, `logits`."""
        return tuple(
            Reader(kind, group.layer, i if group.kind.numbered else None, n < group.kind.n_writers(self))
            for group in self.reading
            for kind, n in group.kind.n_readers(self).items()
            for i in range(n)
        )

    @property
    def shares(self) -> bool:
        """Whether query heads share keys and values (GQA, MQA)."""
        return self.n_kv_heads != self.n_heads

    @property
    def n_cells(self) -> tuple[int, int]:
        """How many writers and how many readers there are, without making any."""
        writers = readers = 0
        for kind in self.kinds:
            layers = kind.layers(self).stop - kind.layers(self).start
            writers += layers * kind.n_writers(self)
            readers += layers * sum(kind.n_readers(self).values())
        return writers, readers

    def group_of(self, node: Writer | Reader) -> Group:
        """The group that a writer or a reader is in."""
        group = self._group_at.get((node.kind, node.layer))
        if group is None:
            raise ValueError(f"node: {node.name!r} is not in this graph")
        return group

    @cached_property
    def _group_at(self) -> dict[tuple[str, int], Group]:
        """By the kind of its writers and those of its readers, and the layer."""
        return {(kind, group.layer): group for group in self.groups for kind in (group.kind.name, *group.kind.reads)}

    def n_writers(self, reader: Reader) -> int:
        """How many writers write before a reader reads: it has an edge from each of the first so many, and from no other."""
        return self.group_of(reader).sees

    @property
    def most_readers(self) -> int:
        """Readers of the group that has the most."""
        return max(group.readers.stop - group.readers.start for group in self.groups)

    @property
    def layer_size(self) -> int:
        """Writers in one layer."""
        return sum(group.writers.stop - group.writers.start for group in self.writing if group.layer == 0)

    def heads_at(self, layer: int) -> slice:
        """Where a layer's heads are in `writers`; its MLP, if there are any, comes right after them."""
        return self._group_at["head", layer].writers

    def mlp_at(self, layer: int) -> slice:
        """Where a layer's MLP is in `writers`: one place, or none."""
        heads = self.heads_at(layer)
        return self._group_at["mlp", layer].writers if self.mlps else slice(heads.stop, heads.stop)

    def attention_reads_at(self, layer: int) -> slice:
        """Where a layer's queries, keys and values are in `readers`. They read the same stream."""
        return self._group_at["head", layer].readers

    def mlp_reads_at(self, layer: int) -> slice:
        """Where a layer's MLP is in `readers`: one place, or none."""
        attention = self.attention_reads_at(layer)
        return self._group_at["mlp", layer].readers if self.mlps else slice(attention.stop, attention.stop)

    @property
    def logits_at(self) -> slice:
        """Where the unembedding is in `readers`."""
        return self.groups[-1].readers

    @property
    def writers_at(self) -> list[slice]:
        """Where those that write together are in `writers`: the embedding, each layer's heads, and its MLP."""
        return [group.writers for group in self.writing]

    @cached_property
    def exists(self) -> Bool[Tensor, "writer reader"]:
        """Which edges there are."""
        first = torch.tensor([self.n_writers(reader) for reader in self.readers])
        return torch.arange(len(self.writers))[:, None] < first

    @property
    def n_edges(self) -> int:
        return sum(self.n_writers(reader) for reader in self.readers)

    @property
    def edges(self) -> Iterator[Edge]:
        """Every edge, by reader and then by writer."""
        return (Edge(w, reader) for reader in self.readers for w in self.writers[: self.n_writers(reader)])

    @cached_property
    def writer_index(self) -> dict[str, int]:
        """Writer's name -> its place in `writers`."""
        return {writer.name: i for i, writer in enumerate(self.writers)}

    @cached_property
    def reader_index(self) -> dict[str, int]:
        """Reader's name -> its place in `readers`."""
        return {reader.name: i for i, reader in enumerate(self.readers)}

    @checked
    def writer(self, name: str) -> Writer:
        """The writer of that name, `"input"`, `"a9.h6"` or `"m3"`; `"9.6"` and `"L9H6"` mean `"a9.h6"`."""
        name = self._canonical(name)
        if name in self.writer_index:
            return self.writers[self.writer_index[name]]
        known = any(re.fullmatch(kind.writer_names, name) for kind in _kinds.KINDS)
        said = "out of range" if known else "not a writer's name"
        raise ValueError(f"writer: expected {self._expected(0)}; {name!r} is {said}")

    @checked
    def reader(self, name: str) -> Reader:
        """The reader of that name, `"a9.h6<q>"`, `"a9.kv2<k>"`, `"m3"` or `"logits"`; `"9.6<q>"` and `"L9H6<q>"` mean the first.

        Where query heads share keys and values, `"a9.h6<k>"` is refused: the name of the key-value head is needed.
        """
        name = self._canonical(name)
        if name in self.reader_index:
            return self.readers[self.reader_index[name]]
        if meant := [why for kind in self.kinds if (why := kind.meant(self, name))]:
            raise ValueError(f"reader: {meant[0]}")
        known = any(re.fullmatch(kind.reader_names, name) for kind in _kinds.KINDS)
        said = "out of range, or of another kind of model" if known else "not a reader's name"
        raise ValueError(f"reader: expected {self._expected(1)}, with layers below {self.n_layers}; {name!r} is {said}")

    def _canonical(self, name: str) -> str:
        name = name.strip()
        for kind in self.kinds:
            name = kind.canonical(name)
        return name

    def _expected(self, which: int) -> str:
        """Names of writers (0) or readers (1) in words."""
        *others, last = [words for kind in self.kinds if (words := kind.expected(self)[which])]
        return f"{', '.join(others)} or {last}"

    @checked
    def edge(self, name: str) -> Edge:
        """The edge of that name, such as `"a9.h9->logits"` or `"9.9 -> logits"`.

        Raises:
            ValueError: there is no such writer or reader, or the reader comes before the writer.
        """
        ends = name.split("->")
        if len(ends) != 2:
            raise ValueError(f"edge: expected 'writer->reader', such as 'a0.h3->a4.h1<q>'; got {name!r}")
        edge = Edge(self.writer(ends[0]), self.reader(ends[1]))
        if edge not in self:
            raise ValueError(
                f"edge: {edge.reader.name} reads before {edge.writer.name} writes; there is no {edge.name!r}"
            )
        return edge

    def index(self, edge: Edge) -> tuple[int, int]:
        """Where an edge is in a tensor `[writer reader]`."""
        if edge not in self:
            raise ValueError(f"edge: {edge.name!r} is not in this graph")
        return self.writer_index[edge.writer.name], self.reader_index[edge.reader.name]

    def __contains__(self, edge: Edge) -> bool:
        w, r = self.writer_index.get(edge.writer.name), self.reader_index.get(edge.reader.name)
        return w is not None and r is not None and w < self.n_writers(self.readers[r])

    def readers_of(self, writer: Writer) -> tuple[Reader, ...]:
        """The inputs of a component: a head's query, key and value, an MLP's one; nothing for the embedding."""
        return tuple(self.readers[i] for i in self.inputs[self.writer_index[self.writer(writer.name).name]])

    def writers_of(self, reader: Reader) -> tuple[Writer, ...]:
        """The components that an input belongs to: one head or MLP, or all heads of a key-value head; none for the logits."""
        return self._owners.get((reader.kind, reader.layer, reader.head), ())

    @cached_property
    def inputs(self) -> tuple[tuple[int, ...], ...]:
        """For each writer, where its inputs are in `readers`."""
        places = {_key(reader): i for i, reader in enumerate(self.readers)}
        found = []
        for writer in self.writers:
            inputs = self.group_of(writer).kind.inputs(self, writer)
            found.append(tuple(places[kind, writer.layer, head] for kind, head in inputs))
        return tuple(found)

    @cached_property
    def _owners(self) -> dict[tuple[str, int, int | None], tuple[Writer, ...]]:
        owners: dict[tuple[str, int, int | None], tuple[Writer, ...]] = {}
        for writer, inputs in zip(self.writers, self.inputs, strict=True):
            for reader in inputs:
                key = _key(self.readers[reader])
                owners[key] = (*owners.get(key, ()), writer)
        return owners

    def __str__(self) -> str:
        return (
            f"Graph({self.n_layers} layers, {self.n_heads} heads, {self.n_kv_heads} key-value heads: "
            f"{len(self.writers)} writers, {len(self.readers)} readers, {self.n_edges:,} edges)"
        )


def _key(reader: Reader) -> tuple[str, int, int | None]:
    return reader.kind, reader.layer, reader.head
