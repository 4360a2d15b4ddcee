"""Choosing edges: the best, the best that can be reached, those that are no dead ends, random ones.

An edge is a pair of places, (writer, reader), in the graph's tuples. `keys` are `[writer reader]`, the larger the better; an edge
whose key is NaN is never chosen. `members` are `[writer reader]`, true where an edge is in.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechkit.circuits.graph import Graph

_DRAWS = 200  # how often the exact number of edges is tried for


def members_at(graph: Graph, places: Sequence[Sequence[int]]) -> Tensor:
    members = torch.zeros_like(graph.exists)
    if places:
        members[tuple(torch.tensor(places).unbind(1))] = True
    return members


def top(graph: Graph, keys: Tensor, limit: int, lowest: float) -> list[tuple[int, int]]:
    """The best edges, best first; ties by reader and then by writer."""
    reader, writer = (keys >= lowest).T.nonzero().unbind(1)  # false where NaN
    best = keys[writer, reader].argsort(descending=True, stable=True)[:limit]
    return list(zip(writer[best].tolist(), reader[best].tolist(), strict=True))


def greedy(graph: Graph, keys: Tensor, limit: int, lowest: float) -> list[tuple[int, int]]:
    """The best edges that can be reached from the logits, in the order in which they are taken."""
    inputs = graph.inputs
    n_candidates = (keys >= lowest).sum(0).tolist()
    order = keys.nan_to_num(nan=-torch.inf).sort(dim=0, descending=True, stable=True)
    ranked, writers = order.values.T.tolist(), order.indices.T.tolist()  # by reader: its edges, best first
    frontier: list[tuple[float, int, int, int]] = []  # the best edge left of each reader that is in

    def offer(reader: int, rank: int) -> None:
        if rank < n_candidates[reader]:
            heapq.heappush(frontier, (-ranked[reader][rank], reader, writers[reader][rank], rank))

    last = len(graph.readers) - 1
    offer(last, 0)
    taken: list[tuple[int, int]] = []
    reached = {last}
    while frontier and len(taken) < limit:
        _, reader, writer, rank = heapq.heappop(frontier)
        taken.append((writer, reader))
        offer(reader, rank + 1)
        for fresh in inputs[writer]:
            if fresh not in reached:
                reached.add(fresh)
                offer(fresh, 0)
    return taken


def _pairs(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """Components and their inputs as two columns: a component, and one of its inputs."""
    component = np.repeat(np.arange(len(graph.inputs)), [len(inputs) for inputs in graph.inputs])
    return component, np.array([reader for inputs in graph.inputs for reader in inputs])


def alive(graph: Graph, members: Tensor) -> Tensor:
    """The edges on a path from a component without inputs (the embedding) to an input of no component (the logits)."""
    component, reader = _pairs(graph)
    edges = members.cpu().numpy()
    fed, useful = np.ones(edges.shape[0], dtype=bool), np.ones(edges.shape[1], dtype=bool)
    fed[component] = useful[reader] = False
    fresh_fed, fresh_useful = fed.copy(), useful.copy()
    while fresh_fed.any() or fresh_useful.any():  # only what was found last can lead to more
        more_fed, more_useful = np.zeros_like(fed), np.zeros_like(useful)
        more_fed[component[np.any(edges[fresh_fed], axis=0)[reader]]] = True
        more_useful[reader[np.any(edges[:, fresh_useful], axis=1)[component]]] = True
        fresh_fed, fresh_useful = more_fed & ~fed, more_useful & ~useful
        fed |= fresh_fed
        useful |= fresh_useful
    kept = fed[:, None] & useful
    return members & torch.from_numpy(kept).to(members.device)


def random_edges(graph: Graph, n_edges: int, generator: torch.Generator) -> Tensor:
    places = graph.exists.nonzero()
    return members_at(graph, places[torch.randperm(len(places), generator=generator)[:n_edges]].tolist())


def random_connected(graph: Graph, n_edges: int, generator: torch.Generator) -> Tensor:
    for _ in range(_DRAWS):
        keys = torch.rand(graph.exists.shape, generator=generator).masked_fill(~graph.exists, torch.nan)
        members = _largest_alive(graph, keys, n_edges)
        if n_edges >= 2 and not members.any():  # the first path that was found is longer than that
            members = _short_path(graph, generator)
        writes = members.any(1)
        writes[0] = True
        reads = torch.zeros(len(graph.readers), dtype=torch.bool)
        reads[[reader for writer in writes.nonzero().flatten().tolist() for reader in graph.inputs[writer]]] = True
        reads[-1] = True
        open_ = (graph.exists & ~members & writes[:, None] & reads).nonzero()
        missing = n_edges - int(members.sum())
        if missing <= len(open_):
            extra = open_[torch.randperm(len(open_), generator=generator)[:missing]]
            return members | members_at(graph, extra.tolist())
    raise ValueError(f"n_edges: found no connected circuit of {n_edges} edges in {_DRAWS} draws; try connected=False")


def _short_path(graph: Graph, generator: torch.Generator) -> Tensor:
    """From the embedding to the logits by way of one component: any of its inputs, all being equally likely."""
    reader = int(torch.randint(len(graph.readers) - 1, (), generator=generator))
    owners = graph.writers_of(graph.readers[reader])
    owner = owners[int(torch.randint(len(owners), (), generator=generator))]
    return members_at(graph, [(0, reader), (graph.writer_index[owner.name], len(graph.readers) - 1)])


def _largest_alive(graph: Graph, keys: Tensor, n_edges: int) -> Tensor:
    """The greedy circuit of the most edges of which no more than `n_edges` are left when it is pruned."""
    limit, order = 2 * n_edges, []
    while True:
        order = greedy(graph, keys, limit, -torch.inf)
        if len(order) < limit or int(alive(graph, members_at(graph, order)).sum()) > n_edges:
            break
        limit = 2 * limit + 1
    low, high = 0, len(order) + 1  # low fits, high does not (or there is no such circuit)
    while high - low > 1:
        middle = (low + high) // 2
        fits = int(alive(graph, members_at(graph, order[:middle])).sum()) <= n_edges
        low, high = (middle, high) if fits else (low, middle)
    return alive(graph, members_at(graph, order[:low]))


def kept_of(n_edges: int, provenance: Mapping[str, Any]) -> str:
    """`'71 kept of 100'` where a circuit has fewer edges than were asked for; `''` if not, or if they were changed since."""
    selection = provenance.get("selection") or {}
    wanted = selection.get("asked") or selection.get("chosen") or 0
    changed = "edited" in provenance or "operation" in provenance or selection.get("kept") != n_edges
    return "" if changed or n_edges >= wanted else f"{n_edges:,} kept of {wanted:,}"
