"""The kinds of nodes in a model's graph: the embedding, heads, MLPs and the logits. A new kind is one more entry of `KINDS`.

A kind says once what the rest of `mechkit/circuits/` asks of it, and nobody else asks which kind a node is:

1. In the graph: how many writers and readers it has in a layer, what they are called, which readers are inputs of which writer,
   and what they read: the stream before the block, or the stream within it, after the attention.
2. Recorded: the site that tells what its writers wrote, and how the activation there becomes what each adds to the stream.
3. Run: what its writers add when each of its readers reads something of its own (circuits).
4. Edited: where a reader's value is written, and what it is for a changed stream (edge and path patching).
5. With gradients: where they are kept, and how they are pulled back to what each reader reads (edge attribution).

The nodes of one kind in one layer are a `Group`: they read the same stream, and they write together.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechkit.hooks import SITES, HookedModel, Parts, Run

if TYPE_CHECKING:
    from mechkit.circuits.graph import Graph, Reader, Writer

Site = tuple[str, int]  # a site's name, and the layer
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer and each head's q, k, v -> z, [row pos head d_head]
_QKV: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class Group:
    """The nodes of one kind in one layer.

    Attributes:
        kind, layer: Of all of them; layer -1 is before the first block, `n_layers` behind the last.
        writers, readers: Where they are in the graph's.
        sees: How many of the graph's writers write before these readers read: the first so many, and no other.
        within: Whether they read within the block, after its attention; else the stream before it.
    """

    kind: Kind
    layer: int
    writers: slice
    readers: slice
    sees: int
    within: bool

    @property
    def writes(self) -> bool:
        return self.writers.stop > self.writers.start

    @property
    def reads(self) -> bool:
        return self.readers.stop > self.readers.start

    @property
    def recorded(self) -> Site:
        """The site that tells what its writers wrote."""
        return self.kind.recorded, max(self.layer, 0)

    @property
    def stream(self) -> Site:
        """The site of the stream that its readers read."""
        return ("resid_mid" if self.within else "resid_pre"), self.layer

    def read_in(self, run: Run) -> Float[Tensor, "prompt pos d_model"]:
        """What its readers read in a recorded run; within a block, `stream` must have been recorded."""
        return run.sites[self.stream] if self.within else run.resid[self.layer]


class Kind(ABC):
    """What nodes of one kind are. What is abstract here every kind says; of the rest only what is otherwise with it.

    Attributes:
        name: Of its writers, `Writer.kind`.
        many: Several of them, in words.
        reads: Its kinds of readers, `Reader.kind`, each with a word for it.
        dims: Of a grid of its writers; empty for a single one.
        recorded: The site that tells what its writers wrote.
        attention: Whether it is part of a block's attention: what reads within the block sees what it writes.
        adds_last: Whether its readers' values are what the block adds to the stream at its end, so that the stream behind the
            block changes by as much as they do.
        writer_names, reader_names: Patterns of names, in or out of a graph's range.
    """

    name: str
    many: str
    reads: ClassVar[Mapping[str, str]] = {}
    dims: tuple[str, ...] = ()
    recorded: str = ""
    attention: bool = False
    adds_last: bool = False
    writer_names: str = ""
    reader_names: str = ""

    @property
    def numbered(self) -> bool:
        """Whether a layer has several of them."""
        return len(self.dims) > 1

    # --- in the graph

    def layers(self, graph: Graph) -> range:
        """The layers that have such nodes; none if the model has none of them."""
        return range(graph.n_layers)

    @abstractmethod
    def n_writers(self, graph: Graph) -> int:
        """How many there are in a layer."""

    @abstractmethod
    def n_readers(self, graph: Graph) -> dict[str, int]:
        """How many of each kind of reader there are in a layer, in their order."""

    def within(self, graph: Graph) -> bool:
        """Whether its readers read within the block, after the attention."""
        return False

    def needs(self, model: HookedModel) -> list[str]:
        """Sites that every layer must have, if the model has such nodes."""
        return []

    def writer_name(self, writer: Writer) -> str:
        raise TypeError(f"{type(self).__name__}: such a kind must define this method")

    def reader_name(self, reader: Reader) -> str:
        raise TypeError(f"{type(self).__name__}: such a kind must define this method")

    def inputs(self, graph: Graph, writer: Writer) -> list[tuple[str, int | None]]:
        """The readers that are inputs of a writer: the kind and the head of each."""
        return [(kind, writer.head) for kind in self.n_readers(graph)]

    def canonical(self, name: str) -> str:
        """The name that another spelling stands for."""
        return name

    def expected(self, graph: Graph) -> tuple[str, str]:
        """Its writers' and its readers' names in words, for who gave a wrong one; `""` where it has none."""
        raise TypeError(f"{type(self).__name__}: such a kind must define this method")

    def meant(self, graph: Graph, name: str) -> str:
        """What is to be said to who asked for a reader that does not exist, if it is known what was meant."""
        return ""

    # --- recorded

    def written(self, parts: Parts, layer: int, activation: Tensor) -> Float[Tensor, "row writer pos d_model"]:
        """What each of a layer's writers adds to the stream, from the recorded activation."""
        return activation[:, None]

    def changes(self, parts: Parts, layer: int, here: Tensor, there: Tensor) -> Float[Tensor, "row writer pos d_model"]:
        """The same in one run less that in another, each from its activation."""
        return self.written(parts, layer, here) - self.written(parts, layer, there)

    def beside(self, parts: Parts, layer: int, activation: Tensor) -> Tensor | None:
        """What is added with its writers and belongs to none of them, such as the attention's output bias."""
        return None

    # --- run

    def run(
        self, parts: Parts, layer: int, reads: Float[Tensor, "row reader pos d_model"], attend: Attend
    ) -> Float[Tensor, "row writer pos d_model"]:
        """What a layer's writers add, given what each of its readers reads."""
        raise TypeError(f"{type(self).__name__}: such a kind must define this method")

    # --- edited

    def edited(self, reader: Reader) -> tuple[str, int, int | None]:
        """Where a reader's value is written: site, layer and head; without a head in place of the whole activation."""
        raise TypeError(f"{type(self).__name__}: such a kind must define this method")

    def values(
        self, parts: Parts, group: Group, base: Run, reads: Tensor, readers: Sequence[Reader], sites: Sequence[str]
    ) -> dict[str, Tensor]:
        """The activations at some of its sites where some readers of a group read `reads`, and the others what they read in the
        base run.

        Args:
            parts: Of the model.
            group: The nodes.
            base: The run that is edited. It has what they read there (`Group.read_in`), and what they add if that is added last.
            reads: `[variant prompt pos d_model]`, in the stream, at the positions that `base` has: each stands for itself.
            readers: Those that read it. Others' values need not be right where an edit names its head.
            sites: Those of `edited`.
        """
        raise TypeError(f"{type(self).__name__}: such a kind must define this method")

    # --- with gradients

    def gradients_at(self, layer: int) -> dict[str, str]:
        """Hooks at which gradients are kept, by a word for each."""
        return {}

    def pull_back(
        self, parts: Parts, layer: int, x: Tensor, gradients: Mapping[str, Tensor], frozen: bool
    ) -> Float[Tensor, "row pos reader d_model"]:
        """The gradient at what each reader reads.

        Args:
            parts, layer: Of the model.
            x: The stream that they read, `[row pos d_model]`.
            gradients: Those at the hooks of `gradients_at`, and under `"stream"` that at the stream behind the last block.
            frozen: Whether scales of norms count as constants.
        """
        raise TypeError(f"{type(self).__name__}: such a kind must define this method")


class Embedding(Kind):
    """Token embeddings, with positions where these are learned vectors: what the first block reads."""

    name, many = "input", "embeddings"
    recorded = "resid_pre"
    writer_names = "input"

    def layers(self, graph: Graph) -> range:
        return range(-1, 0)

    def n_writers(self, graph: Graph) -> int:
        return 1

    def n_readers(self, graph: Graph) -> dict[str, int]:
        return {}

    def writer_name(self, writer: Writer) -> str:
        return "input"

    def expected(self, graph: Graph) -> tuple[str, str]:
        return "'input'", ""


class Heads(Kind):
    """Attention heads: a query each; keys and values each, or shared by several (GQA, MQA)."""

    name, many = "head", "heads"
    reads: ClassVar = {"q": "query", "k": "key", "v": "value"}
    dims = ("layer", "head")
    recorded = "z"
    attention = True
    writer_names = r"a\d+\.h\d+"
    reader_names = r"a(\d+)\.(h|kv)(\d+)<([qkv])>"

    def n_writers(self, graph: Graph) -> int:
        return graph.n_heads

    def n_readers(self, graph: Graph) -> dict[str, int]:
        return {"q": graph.n_heads, "k": graph.n_kv_heads, "v": graph.n_kv_heads}

    def needs(self, model: HookedModel) -> list[str]:
        return ["q", "k", "v", "z"]

    def writer_name(self, writer: Writer) -> str:
        return f"a{writer.layer}.h{writer.head}"

    def reader_name(self, reader: Reader) -> str:
        return f"a{reader.layer}.{'kv' if reader.shared else 'h'}{reader.head}<{reader.kind}>"

    def inputs(self, graph: Graph, writer: Writer) -> list[tuple[str, int | None]]:
        assert writer.head is not None
        group = writer.head // (graph.n_heads // graph.n_kv_heads)
        return [("q", writer.head), ("k", group), ("v", group)]

    def canonical(self, name: str) -> str:
        """`"9.6<q>"` and `"L9H6<q>"`, as results of techniques label a head, -> `"a9.h6<q>"`."""
        return re.sub(r"^(?:(\d+)\.|L(\d+)H)(\d+)", lambda found: f"a{found[1] or found[2]}.h{found[3]}", name)

    def expected(self, graph: Graph) -> tuple[str, str]:
        writers = f"a head 'a0.h0' to 'a{graph.n_layers - 1}.h{graph.n_heads - 1}'"
        return writers, f"a query 'a0.h0<q>', a key or value 'a0.{'kv' if graph.shares else 'h'}0<k>'"

    def meant(self, graph: Graph, name: str) -> str:
        found = re.fullmatch(self.reader_names, name)
        if not found or not graph.shares or found[4] == "q" or found[2] == "kv" or int(found[3]) >= graph.n_heads:
            return ""
        group = int(found[3]) // (graph.n_heads // graph.n_kv_heads)
        return (
            f"query heads share keys and values in this model; expected 'a{found[1]}.kv{group}<{found[4]}>', which head "
            f"{found[3]} uses, got {name!r}"
        )

    def _by_head(self, parts: Parts, z: Tensor) -> Float[Tensor, "row pos head d_head"]:
        return z.reshape(*z.shape[:2], parts.model.n_heads, -1)

    def written(self, parts: Parts, layer: int, activation: Tensor) -> Float[Tensor, "row writer pos d_model"]:
        return parts.heads(layer, self._by_head(parts, activation)).transpose(1, 2)

    def changes(self, parts: Parts, layer: int, here: Tensor, there: Tensor) -> Tensor:
        return parts.head_changes(layer, self._by_head(parts, here), self._by_head(parts, there)).transpose(1, 2)

    def beside(self, parts: Parts, layer: int, activation: Tensor) -> Tensor | None:
        return parts.written_by_bias(layer, self._by_head(parts, activation))

    def run(self, parts: Parts, layer: int, reads: Float[Tensor, "row reader pos d_model"], attend: Attend) -> Tensor:
        normed = parts.attention_input(layer, reads).transpose(0, 1)  # [reader row pos d_model]
        n_q, n_kv = parts.model.n_heads, parts.model.n_kv_heads
        each = zip(_QKV, normed.split([n_q, n_kv, n_kv]), strict=True)
        q, k, v = (parts.project_each(layer, which, its_own) for which, its_own in each)
        return parts.heads(layer, attend(layer, q, k, v)).transpose(1, 2)

    def edited(self, reader: Reader) -> tuple[str, int, int | None]:
        return reader.kind, reader.layer, reader.head

    def values(
        self, parts: Parts, group: Group, base: Run, reads: Tensor, readers: Sequence[Reader], sites: Sequence[str]
    ) -> dict[str, Tensor]:
        normed = parts.attention_input(group.layer, reads)
        return {which: parts.project(group.layer, which, normed) for which in _QKV if which in sites}

    def gradients_at(self, layer: int) -> dict[str, str]:
        return {which: SITES[which].hook_name(layer) for which in _QKV}

    def pull_back(self, parts: Parts, layer: int, x: Tensor, gradients: Mapping[str, Tensor], frozen: bool) -> Tensor:
        back = []
        for which in _QKV:
            weight = parts.weight(layer, which)
            gradient = gradients[which].reshape(*x.shape[:2], len(weight), -1)
            back.append(torch.einsum("bphe,hme->bphm", gradient, weight))
        return parts.pull_back_attention(layer, x, torch.cat(back, 2), frozen)


class Mlps(Kind):
    """MLPs, each as a whole: its output bias is its own."""

    name, many = "mlp", "MLPs"
    reads: ClassVar = {"mlp": "MLP"}
    dims = ("layer",)
    recorded = "mlp_out"
    adds_last = True
    writer_names = reader_names = r"m\d+"

    def layers(self, graph: Graph) -> range:
        return range(graph.n_layers if graph.mlps else 0)

    def n_writers(self, graph: Graph) -> int:
        return 1

    def n_readers(self, graph: Graph) -> dict[str, int]:
        return {"mlp": 1}

    def within(self, graph: Graph) -> bool:
        return not graph.parallel

    def needs(self, model: HookedModel) -> list[str]:
        return ["mlp_out"] if model.has_site("mlp_out") else []

    def writer_name(self, writer: Writer) -> str:
        return f"m{writer.layer}"

    def reader_name(self, reader: Reader) -> str:
        return f"m{reader.layer}"

    def expected(self, graph: Graph) -> tuple[str, str]:
        return f"an MLP m0 to m{graph.n_layers - 1}", "an MLP m0"

    def run(self, parts: Parts, layer: int, reads: Float[Tensor, "row reader pos d_model"], attend: Attend) -> Tensor:
        return parts.mlp(layer, reads[:, 0])[:, None]

    def edited(self, reader: Reader) -> tuple[str, int, int | None]:
        return "mlp_out", reader.layer, None

    def values(
        self, parts: Parts, group: Group, base: Run, reads: Tensor, readers: Sequence[Reader], sites: Sequence[str]
    ) -> dict[str, Tensor]:
        return {"mlp_out": parts.mlp(group.layer, reads)}

    def gradients_at(self, layer: int) -> dict[str, str]:
        return {"mlp": f"blocks.{layer}.mlp.hook_in"}

    def pull_back(self, parts: Parts, layer: int, x: Tensor, gradients: Mapping[str, Tensor], frozen: bool) -> Tensor:
        return parts.pull_back_mlp(layer, x, gradients["mlp"].reshape(x.shape)[:, :, None], frozen)


class Logits(Kind):
    """The unembedding, which reads the final stream."""

    name, many = "logits", "logits"
    reads: ClassVar = {"logits": "logits"}
    reader_names = "logits"

    def layers(self, graph: Graph) -> range:
        return range(graph.n_layers, graph.n_layers + 1)

    def n_writers(self, graph: Graph) -> int:
        return 0

    def n_readers(self, graph: Graph) -> dict[str, int]:
        return {"logits": 1}

    def reader_name(self, reader: Reader) -> str:
        return "logits"

    def expected(self, graph: Graph) -> tuple[str, str]:
        return "", "'logits'"

    def edited(self, reader: Reader) -> tuple[str, int, int | None]:
        return "resid_post", reader.layer - 1, None

    def values(
        self, parts: Parts, group: Group, base: Run, reads: Tensor, readers: Sequence[Reader], sites: Sequence[str]
    ) -> dict[str, Tensor]:
        return {"resid_post": reads}

    def pull_back(self, parts: Parts, layer: int, x: Tensor, gradients: Mapping[str, Tensor], frozen: bool) -> Tensor:
        return gradients["stream"][:, :, None]


KINDS: tuple[Kind, ...] = (Embedding(), Heads(), Mlps(), Logits())  # in the order in which they write within a layer


def of_writer(kind: str) -> Kind:
    """The kind of the writers that have this `Writer.kind`."""
    return _only([one for one in KINDS if one.name == kind], kind)


def of_reader(kind: str) -> Kind:
    """The kind of the readers that have this `Reader.kind`."""
    return _only([one for one in KINDS if kind in one.reads], kind)


def _only(found: list[Kind], kind: str) -> Kind:
    if not found:
        names = dict.fromkeys(name for one in KINDS for name in (one.name, *one.reads))
        raise ValueError(f"kind: expected one of {', '.join(names)}; got {kind!r}")
    return found[0]


def groups_of(graph: Graph) -> list[Group]:
    """All nodes by layer and kind, in the order in which they read and write: in a layer the attention first, then what reads
    what it reads, then what reads what it wrote."""
    groups: list[Group] = []
    n_writers = n_readers = 0
    for layer in range(-1, graph.n_layers + 1):
        here = [kind for kind in graph.kinds if layer in kind.layers(graph)]
        here.sort(key=lambda kind: (not kind.attention, kind.within(graph)))
        before = n_writers
        after_attention = before + sum(kind.n_writers(graph) for kind in here if kind.attention)
        for kind in here:
            writers = slice(n_writers, n_writers + kind.n_writers(graph))
            readers = slice(n_readers, n_readers + sum(kind.n_readers(graph).values()))
            within = kind.within(graph)
            groups.append(Group(kind, layer, writers, readers, after_attention if within else before, within))
            n_writers, n_readers = writers.stop, readers.stop
    return groups
