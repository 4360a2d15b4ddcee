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
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from mechkit._check import checked
from mechkit.hooks import HookedModel

ReaderKind = Literal["q", "k", "v", "mlp", "logits"]
_CELLS = 2**30  # pairs of a writer and a reader, at most: a gigabyte of masks
_READER = re.compile(r"a(\d+)\.(h|kv)(\d+)<([qkv])>|m(\d+)|logits")
_WRITER = re.compile(r"input|a(\d+)\.h(\d+)|m(\d+)")


@dataclass(frozen=True, order=True)
class Writer:
    """A component that adds to the residual stream.

    Attributes:
        layer: The layer; -1 for the embedding.
        head: The head; `None` for an MLP and for the embedding.
    """

    layer: int
    head: int | None = None

    @property
    def name(self) -> str:
        if self.layer < 0:
            return "input"
        return f"m{self.layer}" if self.head is None else f"a{self.layer}.h{self.head}"

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

    kind: ReaderKind
    layer: int
    head: int | None = None
    shared: bool = False

    @property
    def name(self) -> str:
        if self.kind == "logits":
            return "logits"
        if self.kind == "mlp":
            return f"m{self.layer}"
        return f"a{self.layer}.{'kv' if self.shared else 'h'}{self.head}<{self.kind}>"

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
        partly = [site for site in ("resid_mid", "mlp_out") if model.has_site(site)]
        model.check_every_layer(["q", "k", "v", "z", *partly], "a graph of edges")
        return cls(
            model.n_layers,
            model.n_heads,
            model.n_kv_heads,
            parallel=not model.has_site("resid_mid"),
            mlps=model.has_site("mlp_out"),
        )

    @cached_property
    def writers(self) -> tuple[Writer, ...]:
        """In the order in which they write: `input`, the heads of layer 0, its MLP, the heads of layer 1, …"""
        last: list[int | None] = [None] if self.mlps else []
        layers = (Writer(layer, head) for layer in range(self.n_layers) for head in (*range(self.n_heads), *last))
        return (Writer(-1), *layers)

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """In the order in which they read: queries, keys and values of layer 0, its MLP, …, `logits`."""
        readers = []
        for layer in range(self.n_layers):
            readers += [Reader("q", layer, head) for head in range(self.n_heads)]
            for kind in ("k", "v"):
                readers += [Reader(kind, layer, head, self.shares) for head in range(self.n_kv_heads)]
            readers += [Reader("mlp", layer)] * self.mlps
        return (*readers, Reader("logits", self.n_layers))

    @property
    def shares(self) -> bool:
        """Whether query heads share keys and values (GQA, MQA)."""
        return self.n_kv_heads != self.n_heads

    @property
    def n_cells(self) -> tuple[int, int]:
        """How many writers and how many readers there are, without making any."""
        readers = self.n_heads + 2 * self.n_kv_heads + self.mlps
        return 1 + self.n_layers * self.layer_size, 1 + self.n_layers * readers

    @property
    def layer_size(self) -> int:
        """Writers in one layer."""
        return self.n_heads + self.mlps

    def n_writers(self, reader: Reader) -> int:
        """How many writers write before a reader reads: it has an edge from each of the first so many, and from no other."""
        heads = self.n_heads if reader.kind == "mlp" and not self.parallel else 0
        return 1 + reader.layer * self.layer_size + heads

    def heads_at(self, layer: int) -> slice:
        """Where a layer's heads are in `writers`; its MLP, if there are any, comes right after them."""
        first = 1 + layer * self.layer_size
        return slice(first, first + self.n_heads)

    def mlp_at(self, layer: int) -> slice:
        """Where a layer's MLP is in `writers`: one place, or none."""
        first = self.heads_at(layer).stop
        return slice(first, first + self.mlps)

    def attention_reads_at(self, layer: int) -> slice:
        """Where a layer's queries, keys and values are in `readers`. They read the same stream."""
        size = self.n_heads + 2 * self.n_kv_heads
        first = layer * (size + self.mlps)
        return slice(first, first + size)

    def mlp_reads_at(self, layer: int) -> slice:
        """Where a layer's MLP is in `readers`: one place, or none."""
        first = self.attention_reads_at(layer).stop
        return slice(first, first + self.mlps)

    @property
    def logits_at(self) -> slice:
        """Where the unembedding is in `readers`."""
        return slice(len(self.readers) - 1, len(self.readers))

    @property
    def writers_at(self) -> list[slice]:
        """Where those that write together are in `writers`: the embedding, each layer's heads, and its MLP."""
        layers = ((self.heads_at(layer), self.mlp_at(layer)) for layer in range(self.n_layers))
        return [slice(0, 1), *(where for layer in layers for where in layer[: 1 + self.mlps])]

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
        name = _canonical(name)
        if name in self.writer_index:
            return self.writers[self.writer_index[name]]
        said = "out of range" if _WRITER.fullmatch(name) else "not a writer's name"
        raise ValueError(
            f"writer: expected 'input', a head 'a0.h0' to 'a{self.n_layers - 1}.h{self.n_heads - 1}'"
            f"{f' or an MLP m0 to m{self.n_layers - 1}' if self.mlps else ''}; {name!r} is {said}"
        )

    @checked
    def reader(self, name: str) -> Reader:
        """The reader of that name, `"a9.h6<q>"`, `"a9.kv2<k>"`, `"m3"` or `"logits"`; `"9.6<q>"` and `"L9H6<q>"` mean the first.

        Where query heads share keys and values, `"a9.h6<k>"` is refused: the name of the key-value head is needed.
        """
        name = _canonical(name)
        if name in self.reader_index:
            return self.readers[self.reader_index[name]]
        found = _READER.fullmatch(name)
        if found and found[4] in ("k", "v") and self.shares and found[2] == "h" and int(found[3]) < self.n_heads:
            group = int(found[3]) // (self.n_heads // self.n_kv_heads)
            raise ValueError(
                f"reader: query heads share keys and values in this model; expected 'a{found[1]}.kv{group}<{found[4]}>', which "
                f"head {found[3]} uses, got {name!r}"
            )
        said = "out of range, or of another kind of model" if found else "not a reader's name"
        raise ValueError(
            "reader: expected a query 'a0.h0<q>', a key or value "
            f"'a0.{'kv' if self.shares else 'h'}0<k>'{', an MLP m0' if self.mlps else ''} or 'logits', with layers below "
            f"{self.n_layers}; {name!r} is {said}"
        )

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
        if writer.layer < 0:
            return ()
        if writer.head is None:
            return (self.reader(writer.name),)
        group = writer.head // (self.n_heads // self.n_kv_heads)
        kv = f"a{writer.layer}.{'kv' if self.shares else 'h'}{group}"
        return (self.reader(f"{writer.name}<q>"), self.reader(f"{kv}<k>"), self.reader(f"{kv}<v>"))

    def writers_of(self, reader: Reader) -> tuple[Writer, ...]:
        """The components that an input belongs to: one head or MLP, or all heads of a key-value head; none for the logits."""
        if reader.kind == "logits":
            return ()
        if reader.kind == "mlp":
            return (Writer(reader.layer),)
        assert reader.head is not None
        if reader.kind == "q":
            return (Writer(reader.layer, reader.head),)
        size = self.n_heads // self.n_kv_heads
        return tuple(Writer(reader.layer, head) for head in range(reader.head * size, (reader.head + 1) * size))

    def __str__(self) -> str:
        return (
            f"Graph({self.n_layers} layers, {self.n_heads} heads, {self.n_kv_heads} key-value heads: "
            f"{len(self.writers)} writers, {len(self.readers)} readers, {self.n_edges:,} edges)"
        )


def _canonical(name: str) -> str:
    """`" 9.6<q> "` and `"L9H6<q>"`, as results of techniques label a head, -> `"a9.h6<q>"`."""
    return re.sub(r"^(?:(\d+)\.|L(\d+)H)(\d+)", lambda found: f"a{found[1] or found[2]}.h{found[3]}", name.strip())
