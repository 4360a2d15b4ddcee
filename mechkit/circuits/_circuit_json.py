"""Circuits as JSON files: mechkit's own format, and that of MIB and the EAP-IG package.

| | mechkit | MIB |
| --- | --- | --- |
| edges | those that are in the circuit or have a score | all |
| a key or value that heads share | once | once for each head |
| model, task, provenance | yes | shape alone (`cfg`) |

EAP-IG: https://github.com/hannamw/EAP-IG. MIB: Mueller et al. 2025, https://arxiv.org/abs/2504.13151.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechkit._files import decoding, destination, parse_json, read_text, replacing
from mechkit.circuits.graph import Graph
from mechkit.hooks import HookedModel

if TYPE_CHECKING:
    from mechkit.circuits.circuit import Circuit

_FORMAT, _VERSION = "mechkit circuit", 1
_WHAT = "a circuit as JSON"
_LIMIT = 2**30  # bytes of a file
# Bytes of memory that a file may ask for: so many, or more if it is large itself.
_ROOM, _ROOM_PER_BYTE = 2**27, 64
_SCORED, _UNSCORED = 26, 3  # bytes that a pair of a writer and a reader takes while it is read
_MIB_KINDS = ("input", "head", "mlp", "logits")
_CFG = ("n_layers", "n_heads", "parallel_attn_mlp")


def write(circuit: Circuit, path: Path, format: str, d_model: int | None) -> Path:
    if format not in ("mechkit", "mib"):
        raise ValueError(f"format: expected 'mechkit' or 'mib', got {format!r}")
    content = _as_mechkit(circuit) if format == "mechkit" else _as_mib(circuit, d_model)
    path = destination(path)
    with replacing(path) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")
    return path


def read(path: Path, model: HookedModel | Graph | None, kind: type[Circuit]) -> Circuit:
    """The circuit in a file, of class `kind`."""
    text = read_text(path, _WHAT, limit=_LIMIT, begins="{")
    content = parse_json(text, str(path), _WHAT, object_pairs_hook=_without_repeats)
    room = max(_ROOM, _ROOM_PER_BYTE * len(text))
    del text
    with decoding(path, _WHAT):
        if isinstance(content, dict) and content.get("format") == _FORMAT:
            circuit = kind(**_from_mechkit(content, room))
        elif isinstance(content, dict) and {"cfg", "nodes", "edges"} <= set(content):
            return kind(**_from_mib(content, model, room))
        else:
            raise ValueError(
                "expected a circuit of mechkit (key 'format') or of MIB and EAP-IG (keys 'cfg', 'nodes' and 'edges'), got "
                f"{f'keys {list(content)[:10]}' if isinstance(content, dict) else type(content).__name__}"
            )
        if isinstance(model, HookedModel):
            circuit.check(model)
        elif model is not None and model != circuit.graph:
            raise ValueError(f"a circuit of another model: expected {model}, got {circuit.graph}")
    return circuit


def _check_room(graph: Graph, room: int, *, scored: bool) -> None:
    """Raises `ValueError` for a graph that is larger than the file that asks for it can need."""
    writers, readers = graph.n_cells
    needed = writers * readers * (_SCORED if scored else _UNSCORED)
    if needed > room:
        raise ValueError(
            f"graph: expected one that a file of this size can need, got {graph.n_layers} layers of {graph.n_heads} heads: "
            f"{writers:,} writers and {readers:,} readers"
        )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"expected each key once, got {next(key for key in keys if keys.count(key) > 1)!r} again")
    return found


def _as_mechkit(circuit: Circuit) -> dict[str, Any]:
    edges: dict[str, dict[str, Any]] = {}
    scores = None if circuit.scores is None else circuit.scores.tolist()
    members = circuit.members.tolist()
    graph = circuit.graph
    for edge in graph.edges:
        w, r = graph.writer_index[edge.writer.name], graph.reader_index[edge.reader.name]
        score = {} if scores is None or math.isnan(scores[w][r]) else {"score": scores[w][r]}
        if score or members[w][r]:
            edges[edge.name] = {**score, "in_graph": members[w][r]}
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "graph": asdict(graph),
        **{name: getattr(circuit, name) for name in ("model", "weights_hash", "task")},
        "provenance": dict(circuit.provenance),
        "dtype": None if circuit.scores is None else str(circuit.scores.dtype).removeprefix("torch."),
        "edges": edges,
    }


def _from_mechkit(content: Mapping[str, Any], room: int) -> dict[str, Any]:
    if content.get("version") != _VERSION:
        raise ValueError(
            f"expected version {_VERSION}, got {content.get('version')!r}: read it with the mechkit that wrote it"
        )
    wanted = ("graph", "model", "weights_hash", "task", "provenance", "dtype", "edges")
    if missing := [key for key in wanted if key not in content]:
        raise ValueError(f"expected keys {', '.join(wanted)}; missing: {', '.join(missing)}")
    shape = content["graph"]
    if not isinstance(shape, dict) or set(shape) != {f.name for f in fields(Graph)}:
        raise ValueError(f"graph: expected {', '.join(f.name for f in fields(Graph))}, got {shape!r}")
    sizes = {key: _whole(f"graph[{key!r}]", shape[key]) for key in ("n_layers", "n_heads", "n_kv_heads")}
    if unsure := [key for key in ("parallel", "mlps") if not isinstance(shape[key], bool)]:
        raise ValueError(f"graph[{unsure[0]!r}]: expected true or false, got {shape[unsure[0]]!r}")
    graph = Graph(**sizes, parallel=shape["parallel"], mlps=shape["mlps"])
    _check_room(graph, room, scored=content["dtype"] is not None)
    dtypes = {None: None, "float32": torch.float32, "float64": torch.float64, "float16": torch.float16}
    if (name := content["dtype"]) not in dtypes and name != "bfloat16":
        raise ValueError(f"dtype: expected a floating-point dtype or null, got {name!r}")
    dtype = torch.bfloat16 if name == "bfloat16" else dtypes[name]
    members, scores = _edges(graph, content["edges"], score_needed=False, scored=dtype is not None)
    origin = {key: content[key] for key in ("model", "weights_hash", "task", "provenance")}
    return {"graph": graph, "members": members, "scores": None if dtype is None else scores.to(dtype), **origin}


def _as_mib(circuit: Circuit, d_model: int | None) -> dict[str, Any]:
    graph = circuit.graph
    if not graph.mlps:
        raise ValueError("format: the 'mib' format has an MLP in every layer, and this model has none; use 'mechkit'")
    if others := [kind.many for kind in graph.kinds if kind.name not in _MIB_KINDS]:
        raise ValueError(f"format: the 'mib' format has heads and MLPs, and no {', '.join(others)}; use 'mechkit'")
    d_model = circuit.provenance.get("d_model") if d_model is None else d_model
    if d_model is None:
        raise ValueError(
            "d_model: the 'mib' format states the width of the residual stream; give d_model=model.d_model"
        )
    scores = torch.zeros(graph.exists.shape) if circuit.scores is None else circuit.scores
    if n := int((scores.isnan() & graph.exists).sum()):
        raise ValueError(f"format: the 'mib' format has a score for every edge, and {n} have none; use 'mechkit'")
    many = _ungrouped(graph)
    parts = _share(graph, many, scores.double()).tolist()
    members = circuit.members[:, _reader_of(graph, many)].tolist()
    edges = {}
    for edge in many.edges:
        w, r = many.writer_index[edge.writer.name], many.reader_index[edge.reader.name]
        edges[edge.name] = {"score": parts[w][r], "in_graph": members[w][r]}
    alive = {"input", *(edge_reader for edge in circuit for edge_reader in _names(circuit, edge.reader))}
    writes = {writer.name for writer in circuit.nodes}
    nodes = {writer.name: {"in_graph": writer.name in writes & alive} for writer in graph.writers}
    cfg: dict[str, Any] = {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": graph.parallel}
    cfg |= {"d_model": d_model} | ({"n_key_value_heads": graph.n_kv_heads} if graph.shares else {})
    return {"cfg": cfg, "nodes": {**nodes, "logits": {"in_graph": True}}, "edges": edges}


def _names(circuit: Circuit, reader: Any) -> list[str]:
    return [writer.name for writer in circuit.graph.writers_of(reader)]


def _from_mib(content: Mapping[str, Any], model: HookedModel | Graph | None, room: int) -> dict[str, Any]:
    cfg, nodes = content["cfg"], content["nodes"]
    if not isinstance(cfg, dict) or (missing := [key for key in _CFG if key not in cfg]):
        raise ValueError(
            f"cfg: expected {', '.join(_CFG)}; missing: {', '.join(missing) if isinstance(cfg, dict) else cfg}"
        )
    n_layers, n_heads = (_whole(f"cfg[{key!r}]", cfg[key]) for key in _CFG[:2])
    if (parallel := cfg["parallel_attn_mlp"]) not in (True, False):
        raise ValueError(f"cfg['parallel_attn_mlp']: expected true or false, got {parallel!r}")
    n_kv_heads = _whole("cfg['n_key_value_heads']", cfg.get("n_key_value_heads") or n_heads)
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(f"cfg: expected n_heads to be a multiple of n_key_value_heads, got {n_heads} and {n_kv_heads}")
    graph = Graph(n_layers, n_heads, n_kv_heads, parallel=bool(parallel))
    known: dict[str, Any] = {}
    if model is not None:
        wanted = model if isinstance(model, Graph) else Graph.of(model)
        known = {} if isinstance(model, Graph) else {"model": model.name}
        if wanted not in (graph, _grouped(graph, wanted)):
            raise ValueError(f"a circuit of another model: expected {wanted}, got {graph}")
        graph = wanted
    many = _ungrouped(graph)
    if not isinstance(nodes, dict) or many.n_cells[0] > 10 * len(nodes) + 100:  # before anything of that size is made
        raise ValueError(f"nodes: expected those of {n_layers} layers of {n_heads} heads, got {str(nodes)[:60]}")
    _check_room(many, room, scored=True)
    names = {*many.writer_index, "logits"}
    if set(nodes) != names:
        raise ValueError(f"nodes: expected {len(names)}, those of {many}; {_difference(names, nodes)}")
    if any(isinstance(node, dict) and "neurons" in node for node in nodes.values()):
        raise ValueError(
            "nodes: expected whole heads and MLPs, got single neurons, which a circuit of edges cannot hold"
        )
    members, scores = _edges(many, content["edges"], score_needed=True)
    place = _reader_of(graph, many)
    grouped_members, grouped_scores = (
        torch.zeros_like(graph.exists),
        torch.zeros(graph.exists.shape, dtype=torch.float64),
    )
    for r, shared in enumerate(place.tolist()):  # in the order of the heads: `_share` counts on it
        grouped_members[:, shared] |= members[:, r]
        grouped_scores[:, shared] += scores[:, r]
    d_model = {"d_model": cfg["d_model"]} if "d_model" in cfg else {}
    provenance = {**d_model, "selection": {"method": "MIB file"}}
    return {"graph": graph, "members": grouped_members, "scores": grouped_scores, "provenance": provenance, **known}


def _edges(graph: Graph, edges: Any, *, score_needed: bool, scored: bool = True) -> tuple[Tensor, Tensor]:
    """Members and scores, `[writer reader]`, of edges by name; NaN where a score is missing, if none is needed. Scores are
    empty where none may be."""
    if not isinstance(edges, dict):
        raise ValueError(f"edges: expected a mapping from names, got {type(edges).__name__}")
    places = {name: place for name in edges if (place := _place(graph, name)) is not None}
    if len(places) != len(edges) or (score_needed and len(edges) != graph.n_edges):
        wanted = (
            {edge.name for edge in graph.edges} if score_needed and graph.n_edges <= 10 * len(edges) else set(places)
        )
        raise ValueError(
            f"edges: expected {f'the {graph.n_edges:,}' * score_needed or 'some'} edges of {graph}, got {len(edges):,}; "
            f"{_difference(wanted, edges, score_needed)}"
        )
    members = torch.zeros_like(graph.exists)
    scores = torch.full(graph.exists.shape if scored else (0,), torch.nan, dtype=torch.float64)
    for name, edge in edges.items():
        needed = {"in_graph", "score"} if score_needed else {"in_graph"}
        if not isinstance(edge, dict) or not needed <= set(edge) or not isinstance(edge["in_graph"], bool):
            raise ValueError(f"edges[{name!r}]: expected {' and '.join(sorted(needed))} (true or false), got {edge!r}")
        members[places[name]] = edge["in_graph"]
        if "score" in edge:
            score = edge["score"]
            if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
                raise ValueError(f"edges[{name!r}]: expected a finite score, got {score!r}")
            if not scored:
                raise ValueError(f"edges[{name!r}]: expected no score where dtype is null, got {score!r}")
            scores[places[name]] = score
    return members, scores


def _place(graph: Graph, name: str) -> tuple[int, int] | None:
    """Where the edge of a name is in `[writer reader]`; `None` if there is none."""
    writer, _, reader = name.partition("->")
    w, r = graph.writer_index.get(writer), graph.reader_index.get(reader)
    return (w, r) if w is not None and r is not None and w < graph.n_writers(graph.readers[r]) else None


def _difference(wanted: set[str], got: Any, all_needed: bool = True) -> str:
    names = set(got) if isinstance(got, dict) else set()
    parts = [(sorted(names - wanted), "unknown"), (sorted(wanted - names) if all_needed else [], "missing")]
    return "; ".join(f"{word}: {', '.join(some[:3])}{' …' * (len(some) > 3)}" for some, word in parts if some)


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    return value


def _ungrouped(graph: Graph) -> Graph:
    """The same graph with a key and a value for each query head."""
    return Graph(graph.n_layers, graph.n_heads, graph.n_heads, parallel=graph.parallel, mlps=graph.mlps)


def _grouped(graph: Graph, like: Graph) -> Graph:
    """`graph` with as many key-value heads as another, if it does not say how many it has."""
    n_kv_heads = graph.n_kv_heads if graph.shares else like.n_kv_heads
    return Graph(graph.n_layers, graph.n_heads, n_kv_heads, parallel=graph.parallel, mlps=graph.mlps)


def _reader_of(graph: Graph, many: Graph) -> Tensor:
    """For each reader of the ungrouped graph, the place of the reader of `graph` that it is a copy of."""
    size = graph.n_heads // graph.n_kv_heads
    places = {(r.kind, r.layer, r.head): i for i, r in enumerate(graph.readers)}
    keys = [
        (r.kind, r.layer, r.head // size if r.kind in ("k", "v") and r.head is not None else r.head)
        for r in many.readers
    ]
    return torch.tensor([places[key] for key in keys])


def _share(graph: Graph, many: Graph, scores: Tensor) -> Tensor:
    """Scores of the ungrouped graph: each head gets an equal part, the last one what is left: the sum is exactly the whole."""
    size = graph.n_heads // graph.n_kv_heads
    place = _reader_of(graph, many)
    shared = [i for i, r in enumerate(many.readers) if r.kind in ("k", "v")]
    parts = scores[:, place]
    if size == 1:
        return parts
    whole = parts[:, shared]
    part = whole / size
    before = torch.zeros_like(whole)
    for _ in range(size - 1):
        before = before + part
    last = torch.tensor([(many.readers[i].head or 0) % size == size - 1 for i in shared])
    parts[:, shared] = torch.where(last, whole - before, part)
    return parts
