"""Path patching: what senders do by way of chosen receivers alone.

1. Run both prompts. A sender's *change* is what it wrote in the source run less what it wrote in the base run.
2. Let it reach the receivers: with everything else frozen (`freeze="all"`: along the direct edges), or with the heads frozen and
   the MLPs in between recomputed (`freeze="heads"`, as in the IOI paper). This gives each receiver a value: a head's query, key
   or value, what an MLP adds, or the final stream.
3. Write these values into the base run, and let it run on freely. Receivers keep the values of step 2, whatever earlier
   receivers do.

With one receiver and `freeze="all"` this is `edge_patching` of the one edge.

Wang et al. 2022, https://arxiv.org/abs/2211.00593; Goldowsky-Dill et al. 2023, https://arxiv.org/abs/2304.05969.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechkit._check import checked, naming
from mechkit.circuits import _kinds
from mechkit.circuits._kinds import Group, Site
from mechkit.circuits._reads import Changes, runs_agree
from mechkit.circuits.graph import Graph, Reader, Writer
from mechkit.engine import Cell, Derived, Edit, sweep
from mechkit.experiment.edges import chosen_positions, edge_experiment, where_it_counts
from mechkit.experiment.estimates import AnyMetric, Experiment
from mechkit.experiment.patches import takes_patches
from mechkit.experiment.positions import choose_positions, position_labels
from mechkit.experiment.provenance import circuit_provenance, pictures_of
from mechkit.hooks import HookedModel, Parts, Run, one_at_a_time
from mechkit.prompts import PromptPairs
from mechkit.result import Cost, Result

KEY = "path"  # the key of the values that are written


@checked
@one_at_a_time
@torch.no_grad()
@takes_patches
def path_patching(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    *,
    senders: str | Sequence[str] = "layer head",
    receivers: Sequence[str] = ("logits",),
    freeze: Literal["all", "heads"] = "all",
    direction: Literal["denoise", "noise"] = "denoise",
    positions: Sequence[int] | Sequence[str] | None = None,
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """Patches each sender into the receivers' inputs alone.

    Args:
        model, pairs, metric: As for `activation_patching`.
        senders: `"layer head"` (every head) or `"layer"` (every MLP), with `"pos"`, `"position"` or `"patch"` added for one
            position at a time; or names: `["input", "a9.h6", "m3"]` (`"L9H6"` is that head too, and its label in `top()` either
            way).
        receivers: Names of what is to see the change: queries, keys and values (`"a9.h6<q>"`, `"a9.kv2<k>"`), MLPs (`"m3"`), or
            `["logits"]` alone. All of them see it at once.
        freeze: What does not react on the way from sender to receivers: `"all"`, or `"heads"` (MLPs do).
        direction: `"denoise"`: the corrupted run, into which the sender's clean value is patched. `"noise"`: the reverse, as
            in the IOI paper.
        positions: Where the sender's change counts, indices or names; with `"pos"` or `"position"` among the senders' dims, the
            labels of that dim. Default: everywhere (all positions, all names).
        budget: Bytes of working memory; default half of what the device has free (1 GiB on a CPU).
        progress: Whether to show a progress bar.

    Returns:
        A `Result`, the metric of each patched run, with dims as in `senders`, then the prompt: `("layer", "head", "prompt")`,
        `("layer", "prompt")`, `("layer", "pos", "prompt")`, …; for names `("sender", "prompt")`. Of several receivers a
        sender's change reaches those that read after it. NaN where there is no path: for the heads or MLPs of `"layer head"`
        and `"layer"` that no receiver reads, and for a prompt that lacks a position of `"pos"`.

    Raises:
        ValueError: an unknown sender or receiver; a sender by name that no receiver reads, or none of all senders that one does
            (a later component, itself, a head of the same layer as the query); `"logits"` among other receivers (their effects
            would be overwritten); what `activation_patching` refuses.
    """
    if freeze not in ("all", "heads"):
        raise ValueError(f"freeze: expected 'all' or 'heads', got {freeze!r}")
    experiment = edge_experiment(model, pairs, metric, direction, budget)
    graph, parts = Graph.of(model), Parts(model)
    _refuse_ends(senders, receivers)
    reads = _receivers(graph, receivers)
    plan = _Plan.of(experiment, graph, senders, positions)
    reached = _reached(graph, [writer for writer, _ in plan.cells], reads, by_name=not isinstance(senders, str))
    parts.check(experiment.base.stack([0]))
    values, cost, how = [], Cost(0, 0), "suffix"
    per_sender = int(experiment.base.lengths.sum()) * model.d_model * 4 * (2 + len(reads))
    at_once = max(1, experiment.budget.bytes // 2 // per_sender)
    for first in range(0, len(plan.cells), at_once):
        some = plan.cells[first : first + at_once]
        answers = sweep(
            model,
            experiment.base,
            [_cell(graph, reads, writer, i) for i, (writer, _) in enumerate(some)],
            experiment.metric,
            source=experiment.source,
            derived={KEY: Derived(_sites(graph), _Values(experiment, graph, parts, reads, some, freeze).make)},
            base_is=experiment.base_is,
            source_is=str(experiment.source_is),
            budget=max(1, experiment.budget.bytes * 2),
            progress=progress,
        )
        for i, (_, at) in enumerate(some):
            if "pos" in plan.coords and at is not None:  # a prompt without that position has no answer
                answers.values[i, experiment.base.lengths <= int(at[0])] = torch.nan
        answers.values[~reached[first : first + at_once]] = torch.nan
        values.append(answers.values)
        cost = Cost(
            cost.block_tokens + answers.cost.block_tokens, cost.naive_block_tokens + answers.cost.naive_block_tokens
        )
        how = how if answers.replay == "suffix" else answers.replay
    assert answers.source is not None
    n = len(experiment.base)
    return Result(
        values=torch.cat(values).reshape(*(len(labels) for labels in plan.coords.values()), n),
        dims=(*plan.coords, "prompt"),
        coords={**plan.coords, "prompt": tuple(range(n))},
        baseline={experiment.base_is: answers.base, str(experiment.source_is): answers.source},
        base=experiment.base_is,
        metric=experiment.metric.name,
        unit=experiment.metric.unit,
        provenance=circuit_provenance(
            model,
            pairs.clean,
            pairs.corrupted,
            technique="path_patching",
            senders=senders if isinstance(senders, str) else list(senders),
            receivers=[reader.name for reader in reads],
            freeze=freeze,
            replay=how,
            positions=None if positions is None else list(positions),
            **experiment.provenance,
        ),
        cost=cost,
        pictures=pictures_of(pairs.clean),
    )


def _refuse_ends(senders: str | Sequence[Any], receivers: Sequence[Any]) -> None:
    """`ValueError` for a path that begins where paths end, or ends where they begin."""
    froms = [senders] if isinstance(senders, str) else list(senders)
    into = [receivers] if isinstance(receivers, str) else list(receivers)
    both = f"no path leads from {', '.join(map(str, froms))} to {', '.join(map(str, into))}"
    if "logits" in froms:
        raise ValueError(
            f"senders: expected components that write into the residual stream, got 'logits', which reads: {both}"
        )
    if odd := [name for name in into if name in ("input", "embed")]:
        raise ValueError(
            f"receivers: expected components that read the residual stream, got {odd[0]!r}, which writes: {both}"
        )


def _receivers(graph: Graph, names: Sequence[str]) -> list[Reader]:
    if isinstance(names, str):
        raise ValueError(f"receivers: expected a list of names, got {names!r}; write receivers=[{names!r}]")
    with naming("receivers"):
        readers = [graph.reader(name) for name in names_of("receivers", names)]
    if not readers or len(set(readers)) != len(readers):
        raise ValueError(f"receivers: expected at least one, each once; got {list(names)}")
    if len(readers) > 1 and any(reader.layer == graph.n_layers for reader in readers):
        raise ValueError(
            "receivers: expected 'logits' alone: the final stream keeps the value that it is given, so that nothing would be "
            f"left of what the other receivers do; got {list(names)}"
        )
    return readers


def _reached(
    graph: Graph, senders: Sequence[Writer], receivers: Sequence[Reader], by_name: bool
) -> Bool[Tensor, "sender"]:
    """Which senders some receiver reads. `ValueError` for one that none does and that was named, or if none does at all."""
    exists = graph.exists[:, [graph.reader_index[reader.name] for reader in receivers]].any(1)
    reached = exists[[graph.writer_index[writer.name] for writer in senders]]
    if bool(reached.all()) or (bool(reached.any()) and not by_name):
        return reached
    readers = ", ".join(reader.name for reader in receivers)
    missed = list(dict.fromkeys(w.name for w, there in zip(senders, reached.tolist(), strict=True) if not there))
    earlier = graph.writers[: int(exists.sum())]
    raise ValueError(
        f"senders: expected components that {readers} can read, got {', '.join(missed[:6])}{', …' if len(missed) > 6 else ''}: "
        f"no path leads from {missed[0]} to {readers}, which {'reads' if len(receivers) == 1 else 'read'} before it writes. "
        f"Senders may be {earlier[0].name}{f' to {earlier[-1].name}' if len(earlier) > 1 else ''}; later receivers see more"
    )


@dataclass(frozen=True)
class _Plan:
    """The cells: a sender, and the position where its change counts (an index, a name, or several, or everywhere)."""

    cells: list[tuple[Writer, tuple[Any, ...] | None]]
    coords: dict[str, tuple[Any, ...]]

    @classmethod
    def of(
        cls, experiment: Experiment, graph: Graph, senders: str | Sequence[str], positions: Sequence[Any] | None
    ) -> _Plan:
        if not isinstance(senders, str):
            with naming("senders"):
                writers = [graph.writer(name) for name in names_of("senders", senders)]
            if not writers or len(set(writers)) != len(writers):
                raise ValueError(f"senders: expected at least one, each once; got {list(senders)}")
            everywhere = chosen_positions(experiment, positions)
            return cls([(w, everywhere) for w in writers], {"sender": tuple(w.name for w in writers)})
        dims = senders.split()
        place = dims[-1] if dims and dims[-1] in ("pos", "position") else None
        components = dims[:-1] if place else dims
        kinds = {kind.dims: kind for kind in _kinds.KINDS if kind.dims}
        kind = kinds.get(tuple(components))
        if kind is None:
            choices = " or ".join(f"{' '.join(dims)!r} (all {kind.many})" for dims, kind in kinds.items())
            raise ValueError(
                f"senders: expected {choices}, perhaps followed by 'pos' or 'position', or a list of names; got {senders!r}"
            )
        if kind not in graph.kinds:
            raise ValueError(
                f"senders: {' '.join(components)!r} stands for {kind.many}, and this model has none; use 'layer head'"
            )
        writers = [writer for writer in graph.writers if writer.kind == kind.name]
        sizes = (graph.n_layers, kind.n_writers(graph))
        coords: dict[str, tuple[Any, ...]] = {dim: tuple(range(n)) for dim, n in zip(kind.dims, sizes, strict=False)}
        if place is None:
            everywhere = chosen_positions(experiment, positions)
            return cls([(w, everywhere) for w in writers], coords)
        if place == "pos":
            every = range(int(experiment.base.lengths.max())) if positions is None else positions
            where: list[Any] = list(chosen_positions(experiment, every) or ())
            coords["pos"] = position_labels(experiment.base, where)
        else:
            where = choose_positions(experiment.named, positions)
            coords["position"] = tuple(where)
        return cls([(w, (at,)) for w in writers for at in where], coords)


def names_of(argument: str, names: Sequence[Any]) -> list[str]:
    """Names that a user gave, or that `Writer` and `Reader` have."""
    found = [name.name if isinstance(name, Writer | Reader) else name for name in names]
    if odd := [name for name in found if not isinstance(name, str)]:
        raise ValueError(f"{argument}: expected names, such as 'a9.h6' or 'm3'; got {odd[0]!r}")
    return found


def _cell(graph: Graph, receivers: Sequence[Reader], writer: Writer, variant: int) -> Cell:
    """The edits of one sender: at the place of each receiver that comes after it."""
    after = [reader for reader in receivers if graph.writer_index[writer.name] < graph.n_writers(reader)]
    places = dict.fromkeys(graph.group_of(reader).kind.edited(reader) for reader in after)
    return tuple(Edit(site, layer, KEY, head=head, variant=variant) for site, layer, head in places)


def _sites(graph: Graph) -> tuple[Site, ...]:
    """What is to be recorded: what all writers wrote, and what those read and add that may react."""
    reacting = [group for group in graph.reading if group.kind.adds_last]
    sites = [*graph.recorded, *(_added(graph, group) for group in reacting)]
    return tuple(dict.fromkeys([*sites, *(group.stream for group in graph.reading if group.within)]))


def _added(graph: Graph, group: Group) -> Site:
    """The site of what a group that adds last adds."""
    site, layer, _ = group.kind.edited(graph.readers[group.readers.start])
    return site, layer


class _Values:
    """Makes the receivers' values from the two runs."""

    def __init__(
        self,
        experiment: Experiment,
        graph: Graph,
        parts: Parts,
        receivers: Sequence[Reader],
        cells: Sequence[tuple[Writer, tuple[Any, ...] | None]],
        freeze: str,
    ) -> None:
        self.experiment, self.graph, self.parts, self.cells, self.freeze = experiment, graph, parts, cells, freeze
        self.at: dict[Site, list[Reader]] = {}  # the receivers whose values are written there
        for reader in receivers:
            site, layer, _ = graph.group_of(reader).kind.edited(reader)
            together = self.at.setdefault((site, layer), [])
            together.append(reader)
            assert graph.group_of(together[0]) is graph.group_of(reader), "two kinds are written at one place"
        self.ids: np.ndarray | None = None
        self.streams: dict[int, Tensor] = {}

    def make(self, base: Run, source: Run, ids: np.ndarray, site: str, layer: int) -> Tensor:
        """`[sender prompt pos …]`."""
        if self.ids is not ids:
            self.ids = ids
            self.streams = self._reaching(base, source, ids)
        readers = self.at[site, layer]
        return self._values(base, self.graph.group_of(readers[0]), readers, self.streams, site)

    def _values(
        self, base: Run, group: Group, readers: Sequence[Reader], changes: dict[int, Tensor], site: str
    ) -> Tensor:
        """The values of some readers of a group, given how the streams change."""
        reads = group.read_in(base) + changes[group.sees]
        return group.kind.values(self.parts, group, base, reads, readers, [site])[site]

    def _reaching(self, base: Run, source: Run, ids: np.ndarray) -> dict[int, Tensor]:
        """By how much each sender changes the stream after the first so many writers, for all numbers that some reader sees."""
        graph = self.graph
        about = base.rows, source.rows, ids, runs_agree(base, source)
        counts = torch.stack([where_it_counts(self.experiment, at, *about) for _, at in self.cells])
        written = Changes(graph, self.parts, base, source, counts).of([writer for writer, _ in self.cells])
        change = torch.zeros_like(written)
        streams: dict[int, Tensor] = {}
        for group in graph.writing:
            streams.setdefault(group.sees, change)
            change = change + written * self._is_in(group)
            if self.freeze == "heads" and group.kind.adds_last:
                site, layer = _added(graph, group)
                values = self._values(base, group, graph.readers[group.readers], streams, site)
                change = change + (values - base.sites[site, layer])
        return {**streams, len(graph.writers): change}

    def _is_in(self, group: Group) -> Float[Tensor, "sender 1 1 1"]:
        chosen = torch.tensor([self.graph.group_of(writer) is group for writer, _ in self.cells])
        return chosen.to(self.experiment.model.device, self.experiment.model.dtype)[:, None, None, None]
