"""Circuits the naive way: one pair of prompts, whole forward passes with TransformerLens's own hooks and none of mechkit's code.

Several circuits, several edges, and the readers of one layer are rows of one pass: nothing is shared between rows, and
`test_zoo.py` compares them with passes of one row. A pass of which no logits are wanted ends where the last wanted value is.

Names. Writers: `input` (what enters block 0: token and position embedding together), `a1.h0` (a head), `m1` (an MLP).
Readers: `a1.h0<q>`, `a1.h0<k>`, `a1.h0<v>`, `m1` and `logits`; where query heads share key-value heads, `a1.kv0<k>` and
`a1.kv0<v>`. An edge is `"a0.h0->a1.h0<k>"`. In a parallel block the MLP reads what the attention reads, so no edge leads
from a layer's heads to its own MLP.

What a writer writes into the residual stream: a head its `z W_O`, in a block with a norm after the attention (Gemma 2 and 3,
OLMo 2) times what that norm multiplies with *in the same run*; an MLP its output, after such a norm. What the attention's bias
writes belongs to no head: it is the same in every run.

What a reader reads: hook_q, hook_k and hook_v come before rotary embeddings and before norms of queries and keys. So a head's q
is computed from the head's own input stream; a norm over all heads' queries (OLMo 2) then works on the q of this very run.

`run_circuits`: each reader's input is the corrupted run's, plus, for each of its edges that is in the circuit, what the writer
writes in *this very run* minus what it wrote in the corrupted run. All edges: the clean run. No edges: the corrupted run.

`patch_edges`: the exact effect of one edge. The base run, in which one reader sees one writer's value from the source run.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mechkit as mk
from mechkit.circuits.edge_scores import EdgeScores

Streams = dict[str, Tensor]  # reader -> its input [row pos d_model]; of a `Run` [pos d_model]


@dataclass
class Run:
    """One run: what each writer wrote, and what each reader read, `[pos d_model]`; q, k, v `[1 pos head d_head]`; logits."""

    wrote: dict[str, Tensor]
    read: Streams
    activations: dict[str, Tensor]
    logits: Tensor


def edge_names(model: Any) -> list[str]:
    """All edges, reader by reader from the bottom up."""
    bridge = _bridge(model)
    return [f"{w}->{r}" for r in reader_names(bridge) for w in writers_of(bridge, r)]


def writer_names(model: Any) -> list[str]:
    bridge = _bridge(model)
    names = ["input"]
    for layer in range(bridge.cfg.n_layers):
        names += [f"a{layer}.h{head}" for head in range(_n_heads(bridge))] + [f"m{layer}"]
    return names


def reader_names(model: Any) -> list[str]:
    bridge = _bridge(model)
    names = []
    for layer in range(bridge.cfg.n_layers):
        names += [name for _, _, name in _attention_readers(bridge, layer)] + [f"m{layer}"]
    return [*names, "logits"]


def writers_of(model: Any, reader: str) -> list[str]:
    """The writers that a reader's stream holds."""
    bridge, writers = _bridge(model), writer_names(model)
    if reader == "logits":
        return writers
    layer = int(reader[1:].partition(".")[0])
    own_heads = reader.startswith("m") and not _is_parallel(bridge)
    return writers[: 1 + layer * (_n_heads(bridge) + 1) + own_heads * _n_heads(bridge)]


def run_circuit(model: Any, clean_tokens: Tensor, corrupted_tokens: Tensor, edges: Collection[str]) -> Tensor:
    """Logits `[1 pos d_vocab]` of the run on `edges`; tokens are `[1 pos]`."""
    return run_circuits(model, clean_tokens, corrupted_tokens, [edges])


@torch.no_grad()
def run_circuits(
    model: Any,
    clean_tokens: Tensor,
    corrupted_tokens: Tensor,
    circuits: Sequence[Collection[str]],
    corrupted: Run | None = None,
) -> Tensor:
    """Logits `[circuit pos d_vocab]` of the runs on each circuit's edges; tokens are `[1 pos]`. `corrupted` is `whole_run`'s, for
    one who has it already."""
    bridge, circuits = _bridge(model), [set(edges) for edges in circuits]
    if unknown := set().union(*circuits) - set(edge_names(bridge)):
        raise ValueError(f"edges: the model has no {sorted(unknown)[:3]}")
    tokens = corrupted_tokens.expand(len(circuits), -1)
    base = corrupted or whole_run(bridge, corrupted_tokens)
    # What each writer writes in these runs, less what it wrote in the corrupted one: [circuit pos d_model]
    entering = _run(bridge, clean_tokens, {}, ["blocks.0.hook_resid_pre"], logits=False)[1]["blocks.0.hook_resid_pre"]
    changes = {"input": (entering - base.wrote["input"]).expand(len(circuits), -1, -1)}

    def stream(reader: str) -> Tensor:
        writers = writers_of(bridge, reader)
        taken = [[f"{writer}->{reader}" in edges for writer in writers] for edges in circuits]
        every = torch.stack([changes[writer] for writer in writers])
        return base.read[reader] + torch.einsum("rw,wrpd->rpd", torch.tensor(taken).to(every.dtype), every)

    def same(streams: Streams) -> Tensor:
        """In which rows all of these readers read what they read in the corrupted run."""
        return torch.stack([(value == base.read[name]).all(-1).all(-1) for name, value in streams.items()]).all(0)

    def write(wrote: dict[str, Tensor], unchanged: Tensor) -> None:
        for writer, value in wrote.items():
            changes[writer] = (value - base.wrote[writer]) * ~unchanged[:, None, None]

    for layer in range(bridge.cfg.n_layers):
        streams = {name: stream(name) for _, _, name in _attention_readers(bridge, layer)}
        heads = {name: value for name, value in base.wrote.items() if name.startswith(f"a{layer}.")}
        if not (unchanged := same(streams)).all():
            heads = _heads(bridge, layer, tokens, _qkv(bridge, layer, tokens, streams))
        write(heads, unchanged)
        mlp = f"m{layer}"
        streams = {mlp: stream(mlp)}
        unchanged = same(streams)
        write({mlp: base.wrote[mlp] if unchanged.all() else _mlp(bridge, layer, tokens, streams[mlp])}, unchanged)
    return _logits(bridge, tokens, stream("logits"))


def patch_edge(model: Any, base: Run, source: Run, tokens: Tensor, edge: str) -> Tensor:
    """`patch_edges` of one edge, `[1 pos d_vocab]`."""
    return patch_edges(model, base, source, tokens, [edge])


@torch.no_grad()
def patch_edges(model: Any, base: Run, source: Run, tokens: Tensor, edges: Sequence[str]) -> Tensor:
    """Logits `[edge pos d_vocab]` of the base run (of `tokens` `[1 pos]`), each with one edge carrying the source run's value.

    The runs are `whole_run`'s.
    """
    return write_edges(model, base, tokens, edges, [source.wrote[edge.partition("->")[0]] for edge in edges])


def write_edges(model: Any, base: Run, tokens: Tensor, edges: Sequence[str], values: Sequence[Tensor]) -> Tensor:
    """The same with any values `[pos d_model]` of the edges' writers, and with gradients where they are enabled.

    For each edge there is a whole forward pass in which the reader's q, k, v or MLP output is
    replaced, after one in which all of the model reads what the reader does.
    """
    bridge = _bridge(model)
    rows = tokens.expand(len(edges), -1)
    read: Edits = {}
    final: Edits = {}
    made: dict[str, list[Any]] = {}  # hook name -> the parts that readers make of what they read
    for i, (edge, value) in enumerate(zip(edges, values, strict=True)):
        writer, _, reader = edge.partition("->")
        stream = base.read[reader] + value - base.wrote[writer]
        if reader == "logits":
            final.setdefault(f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post", []).append((i, stream))
            continue
        where = f"blocks.{reader[1:].partition('.')[0]}."
        if reader.startswith("m"):
            read.setdefault(where + _read_by_mlp(bridge), []).append((i, stream))
            made.setdefault(where + "hook_mlp_out", []).append(i)
        else:
            read.setdefault(where + "hook_resid_pre", []).append((i, stream))
            head = int(reader.partition(".")[2].strip("hkv").partition("<")[0])
            made.setdefault(f"{where}attn.hook_{reader[-2]}", []).append((i, slice(None), head))
    found = _run(bridge, rows, read, list(made), logits=False)[1] if made else {}
    edits = {name: [(part, found[name][part]) for part in parts] for name, parts in made.items()}
    return _run(bridge, rows, edits | final)[0]


@torch.no_grad()
def whole_run(model: Any, tokens: Tensor) -> Run:
    """An ordinary run of one prompt `[1 pos]`, taken to pieces."""
    bridge = _bridge(model)
    n_layers = bridge.cfg.n_layers
    names = []
    for layer in range(n_layers):
        where = f"blocks.{layer}."
        names += [where + "attn." + hook for hook in ("hook_q", "hook_k", "hook_v", "hook_z", "o.hook_out")]
        names += [where + hook for hook in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")]
        names += [] if _is_parallel(bridge) else [where + "hook_resid_mid"]
    logits, cache = _run(bridge, tokens, {}, names)
    wrote = {"input": cache["blocks.0.hook_resid_pre"][0]}
    read: Streams = {"logits": cache[f"blocks.{n_layers - 1}.hook_resid_post"][0]}
    for layer in range(n_layers):
        where = f"blocks.{layer}."
        for head, value in enumerate(_by_head(bridge, layer, cache)):
            wrote[f"a{layer}.h{head}"] = value[0]
        wrote[f"m{layer}"] = cache[where + "hook_mlp_out"][0]
        for _, _, name in _attention_readers(bridge, layer):
            read[name] = cache[where + "hook_resid_pre"][0]
        read[f"m{layer}"] = cache[where + ("hook_resid_pre" if _is_parallel(bridge) else "hook_resid_mid")][0]
    return Run(wrote, read, cache, logits)


def _qkv(bridge: Any, layer: int, tokens: Tensor, streams: Streams) -> dict[str, Tensor]:
    """q, k and v of a layer, each head's computed from its own stream: one pass, in which each reader has its own rows."""
    readers, rows = _attention_readers(bridge, layer), len(tokens)
    hooks = [f"blocks.{layer}.attn.hook_{site}" for site in "qkv"]
    edits = {f"blocks.{layer}.hook_resid_pre": [(..., torch.cat([streams[name] for _, _, name in readers]))]}
    found = _run(bridge, tokens.repeat(len(readers), 1), edits, hooks, logits=False)[1]
    values = {hook: torch.full_like(found[hook][:rows], torch.nan) for hook in hooks}
    for i, (site, head, _) in enumerate(readers):
        hook = f"blocks.{layer}.attn.hook_{site}"
        values[hook][:, :, head] = found[hook][i * rows : (i + 1) * rows, :, head]
    return values


def _heads(bridge: Any, layer: int, tokens: Tensor, qkv: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a layer's heads write, given their q, k and v."""
    where = f"blocks.{layer}."
    names = [where + "attn.hook_z", where + "attn.o.hook_out", where + "hook_attn_out"]
    cache = _run(bridge, tokens, {name: [(..., value)] for name, value in qkv.items()}, names, logits=False)[1]
    return {f"a{layer}.h{head}": value for head, value in enumerate(_by_head(bridge, layer, cache))}


def _mlp(bridge: Any, layer: int, tokens: Tensor, stream: Tensor) -> Tensor:
    """What an MLP writes, given its input stream `[row pos d_model]`."""
    where = f"blocks.{layer}."
    writes = where + "hook_mlp_out"
    return _run(bridge, tokens, {where + _read_by_mlp(bridge): [(..., stream)]}, [writes], logits=False)[1][writes]


def _read_by_mlp(bridge: Any) -> str:
    return "hook_resid_pre" if _is_parallel(bridge) else "hook_resid_mid"


def _logits(bridge: Any, tokens: Tensor, stream: Tensor) -> Tensor:
    return _run(bridge, tokens, {f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post": [(..., stream)]})[0]


def _by_head(bridge: Any, layer: int, cache: dict[str, Tensor]) -> list[Tensor]:
    """Each head's contribution to the stream `[row pos d_model]`, without the bias."""
    attention = bridge.blocks[layer].attn
    z, projected = cache[f"blocks.{layer}.attn.hook_z"], cache[f"blocks.{layer}.attn.o.hook_out"]
    attn_out = cache[f"blocks.{layer}.hook_attn_out"]
    written = torch.einsum("bphd,hdm->hbpm", z, attention.W_O)
    if torch.equal(projected, attn_out):
        return list(written)
    # A norm (RMS: linear once its scale is fixed) is between them: it multiplied each entry with the ratio of the two.
    if getattr(attention.o.original_component, "bias", None) is not None or bool((projected == 0).any()):
        raise ValueError(f"layer {layer}: a norm after an attention output with a bias or with zeros is not covered")
    return list(written * (attn_out / projected))


Edits = dict[str, list[tuple[Any, Tensor]]]  # hook name -> parts of the activation, and what is put there


class _Enough(Exception):
    """Ends a pass of which no more is wanted."""


def _run(
    bridge: Any, tokens: Tensor, edits: Edits, keep: Collection[str] = (), logits: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward pass with edits; the logits (nothing, without `logits`), and the activations named in `keep`."""
    kept: dict[str, Tensor] = {}
    edited: set[str] = set()

    def put(x: Tensor, hook: Any, name: str) -> Tensor:
        edited.add(name)
        for part, value in edits[name]:
            assert x[part].shape == value.shape, (name, x[part].shape, value.shape)
            x[part] = value  # in place: Hugging Face blocks keep a second reference to the middle stream
        return x

    def look(x: Tensor, hook: Any, name: str) -> None:
        kept[name] = x.clone()
        if not logits and len(kept) == len(keep):
            raise _Enough

    hooks: list[tuple[str, Any]] = [(name, partial(put, name=name)) for name in edits]
    hooks += [(name, partial(look, name=name)) for name in keep]
    said = tokens.new_empty(0)
    with suppress(_Enough):
        said = bridge.run_with_hooks(tokens, fwd_hooks=hooks).clone()
    assert edited == set(edits), set(edits) - edited
    assert kept.keys() == set(keep), set(keep) - kept.keys()
    return said, kept


def _attention_readers(bridge: Any, layer: int) -> list[tuple[str, int, str]]:
    """`("k", 0, "a1.kv0<k>")` and so on: site, head, name."""
    n_heads, n_kv = _n_heads(bridge), _n_kv_heads(bridge)
    shared = "kv" if n_kv < n_heads else "h"
    readers = [("q", head, f"a{layer}.h{head}<q>") for head in range(n_heads)]
    return readers + [(site, head, f"a{layer}.{shared}{head}<{site}>") for site in "kv" for head in range(n_kv)]


def _n_heads(bridge: Any) -> int:
    return int(bridge.cfg.n_heads)


def _n_kv_heads(bridge: Any) -> int:
    """Asked of the model itself: some configs say nothing."""
    if "_reference_n_kv" not in bridge.__dict__:
        token = torch.zeros(1, 1, dtype=torch.long)
        with torch.no_grad():
            bridge.__dict__["_reference_n_kv"] = int(
                _run(bridge, token, {}, [k := "blocks.0.attn.hook_k"])[1][k].shape[2]
            )
    n_kv: int = bridge.__dict__["_reference_n_kv"]
    return n_kv


def _is_parallel(bridge: Any) -> bool:
    return "blocks.0.hook_resid_mid" not in bridge.__dict__.setdefault("_reference_hooks", set(bridge.hook_dict))


def _bridge(model: Any) -> Any:
    return getattr(model, "bridge", model)


def found_at(scores: EdgeScores, names: list[str]) -> Tensor:
    """`[edge prompt]`."""
    return torch.stack([scores.per_prompt[scores.graph.index(scores.graph.edge(name))] for name in names]).double()


def some_names(model: mk.HookedModel, n: int, seed: int = 0) -> list[str]:
    """Random edges; at least one into each kind of reader, and one from each kind of writer."""
    names, rng = edge_names(model), random.Random(seed)
    kinds = [[x for x in names if x.endswith(end)] for end in ("<q>", "<k>", "<v>", "m2", "logits")]
    kinds += [[x for x in names if x.startswith(start)] for start in ("input", "a1", "m1")]
    chosen = dict.fromkeys(rng.choice(some) for some in kinds)
    rest = [x for x in names if x not in chosen]
    return [*chosen, *rng.sample(rest, max(0, n - len(chosen)))][:n]
