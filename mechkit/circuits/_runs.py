"""Running circuits: every reader sees, from each writer, its value in this very run if the edge is in the circuit, and an ablated
value if it is not. Many circuits a batch.

1. Record the clean run, and the ablated value of every writer. A writer's *difference* is what it writes in a run less its
   ablated value.
2. Layer by layer: a reader's input is the stream with everything ablated plus the differences of the writers that it has an edge
   from, one matrix product for all readers of a layer (`gates` may be numbers between 0 and 1, and have gradients).
3. Queries, keys and values are computed from their own inputs, each head from its own; the model's attention makes z of them
   (`Replayer.attend`); so on to the final stream.
4. Positions before the first difference of the two prompts are not run (resample ablation), where clean and ablated run are the
   same there, which is looked at. Layers below the first missing edge are not run either, where the caller says so.

All edges give the clean run, and none the ablated one: `CircuitRuns.check` holds both against the model in every call.
"""

from __future__ import annotations

from itertools import groupby

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechkit._precision import tolerance, widen
from mechkit.circuits._kinds import Group
from mechkit.circuits._writings import Written, written
from mechkit.circuits.graph import Graph
from mechkit.engine import Budget, Replayer
from mechkit.hooks import CannotReplayError, HookedModel, Parts, check_readout, record
from mechkit.prompts import Stacked


class CircuitRuns:
    """Runs circuits on clean prompts of equal length.

    Attributes:
        start: The first position that is run.
        clean: What every writer wrote in the clean run, from `start` on.
        replayer: Its `block_tokens` counts the (block, token) pairs that were run. One of them costs up to twice a plain block's,
            because every reader has an input of its own.
    """

    def __init__(
        self,
        model: HookedModel,
        graph: Graph,
        parts: Parts,
        rows: Stacked,
        ablated: Written,
        start: int,
    ) -> None:
        """
        Args:
            model, graph, parts: The model, in evaluation mode.
            rows: Clean prompts.
            ablated: The ablated value of every writer, positions from `start` on (or one for all).
            start: The first position at which clean and ablated values differ.

        Raises:
            ValueError: the architecture cannot be run block by block.
        """
        self.model, self.graph, self.parts, self.start, self.ablated = model, graph, parts, start, ablated
        with torch.no_grad():
            run = record(model, rows, graph.recorded)
            self.run = run
            self.clean = written(graph, parts, run.sites, start)
            self.last_logits = run.last_logits
            # What is added beside the writers is the same in every run, but for the scale of a norm behind it.
            recorded = [(group, run.sites[group.recorded][:, start:]) for group in graph.writing]
            self._beside = [group.kind.beside(parts, group.layer, x) for group, x in recorded]
            run.sites.clear()
            self._ablated_streams = self._streams(ablated)
        try:
            self.replayer = Replayer(model, run, None)
        except CannotReplayError as error:
            raise ValueError(
                f"model: expected causal attention in blocks that can be run one by one; {model.name} "
                f"({model.cfg.architecture}): {error}"
            ) from error
        self.replayer.block_tokens = rows.tokens.numel() * model.n_layers

    @property
    def n_prompts(self) -> int:
        return len(self.run.tokens)

    def rows_at_once(self, budget: Budget) -> int:
        """Circuits times prompts that fit the budget."""
        graph, model = self.graph, self.model
        readers = graph.most_readers
        a_token = model.d_model * (2 * len(graph.writers) + 6 * readers) + 4 * model.n_heads * self.run.length
        item = torch.empty((), dtype=model.dtype).element_size()
        suffix = self.run.length - self.start
        fits = budget.bytes // 2 // (a_token * item * suffix)
        if budget.tokens is not None:
            fits = min(fits, budget.tokens // suffix)
        return max(1, fits)

    def final(
        self,
        gates: Bool[Tensor, "row writer reader"] | Float[Tensor, "row writer reader"],
        prompt: Int[Tensor, "row"],
        *,
        first_layer: int = 0,
        ablated: Written | None = None,
    ) -> Float[Tensor, "row pos d_model"]:
        """The final stream that the unembedding reads, from `start` on.

        Args:
            gates: For each edge how much of the writer's difference passes: 1 in the circuit, 0 not.
            prompt: Which prompt each row is.
            first_layer: Layers below it are taken from the clean run: say so only if no edge into them is missing.
            ablated: Other ablated values than this object's, with gradients perhaps.
        """
        graph, parts = self.graph, self.parts
        streams = self._ablated_streams if ablated is None else self._streams(ablated)
        ablated = self.ablated if ablated is None else ablated
        gates = gates.to(self.model.dtype)
        keep = not _has_gradient(gates, ablated)
        kept = _Differences(graph, len(prompt), self.run.length - self.start, self.model, keep)
        # Writers that no reader sees need not be run (with gradients their gates may be 0 and still matter).
        seen = (gates != 0).any(2).any(0).tolist() if keep else [True] * len(graph.writers)

        def read(group: Group) -> Float[Tensor, "row reader pos d_model"]:
            """What the readers of a group see."""
            return _rows(streams[group.sees], prompt)[:, None] + kept.through(gates[:, : group.sees, group.readers])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.replayer.attend(layer, q, k, v, prompt, self.start)

        counted = -1  # the last layer whose block-tokens were counted
        writing = zip(graph.writing, self.clean, ablated, strict=True)
        for _, together in groupby(writing, key=lambda each: each[0].sees):
            step = list(together)  # in a parallel block its MLP reads before its heads write
            used = {group: not group.reads or any(seen[group.writers]) for group, _, _ in step}
            runs = [group for group in used if used[group] and group.reads and group.layer >= first_layer]
            reads = {group: read(group) for group in runs}
            for group, clean, other in step:
                if not used[group]:
                    kept.append_unseen(group.writers.stop - group.writers.start)
                    continue
                live = group.kind.run(parts, group.layer, reads.pop(group), attend) if group in reads else clean[prompt]
                kept.append(live - _rows(other, prompt))
                if group in runs and group.layer > counted:
                    if not group.kind.attention:  # that the replayer counts itself
                        self.replayer.block_tokens += len(prompt) * live.shape[2]
                    counted = group.layer
        return read(graph.groups[-1])[:, 0]

    def _streams(self, ablated: Written) -> dict[int, Tensor]:
        """The residual stream after the first so many writers, for all numbers that some reader sees, if every writer had its
        ablated value.

        It is summed from these values and from what biases write, not computed from the clean run's stream by subtraction: what
        rounding leaves of that would be blown up by the norms where all values are 0.
        """
        streams: dict[int, Tensor] = {}
        sees = {group.sees for group in self.graph.reading}
        shape = self.n_prompts, self.run.length - self.start, self.model.d_model
        stream: Tensor | None = None
        for group, values, beside in zip(self.graph.writing, ablated, self._beside, strict=True):
            added = widen(values).sum(1)
            stream = added.expand(shape) if stream is None else stream + added
            stream = stream if beside is None else stream + widen(beside)
            if group.writers.stop in sees:
                streams[group.writers.stop] = stream.to(self.model.dtype)
        return streams

    @torch.no_grad()
    def check(self, corrupted_logits: Float[Tensor, "d_vocab"] | None) -> None:
        """All edges give the clean run's logits at the first prompt's last position, and no edges those of the ablated run; and
        logits are read off the final stream at each position.

        Raises:
            ValueError: they do not: the message says by how much.
        """
        check_readout(self.model, self.run, "a circuit")
        prompt = torch.zeros(2, dtype=torch.long, device=self.model.device)
        every = self.graph.exists.to(self.model.device)
        final = self.final(torch.stack([every, torch.zeros_like(every)]), prompt)
        found = self.model.unembed(final[:, -1])
        expected = {"full circuit": self.last_logits[0], "empty circuit": corrupted_logits}
        for got, (what, logits) in zip(found, expected.items(), strict=True):
            if logits is None:
                continue
            spread = (logits - logits.mean()).abs().max().clamp(min=1e-12)
            off = float(((got - got.mean()) - (logits - logits.mean())).abs().max() / spread)
            if not off <= tolerance("circuit", self.model.dtype):
                run = "clean" if what == "full circuit" else "ablated"
                raise ValueError(
                    f"model: the {what} differs from the {run} run by {off:.1e} of the logits' spread: circuits of "
                    f"{self.model.name} ({self.model.cfg.architecture}) cannot be run"
                )


class _Differences:
    """The writers' differences so far, and what readers see of them.

    Without gradients, only the writers that some reader sees (or, where these are more, that some reader lacks) are multiplied
    with their gates: the matrix product is bound by reading the differences from memory.
    """

    def __init__(self, graph: Graph, rows: int, positions: int, model: HookedModel, keep: bool) -> None:
        self._blocks: list[Tensor] = []
        self._n = 0
        self._all: Tensor | None = None
        if keep:  # no gradients: one tensor that is filled
            shape = (rows, len(graph.writers), positions, model.d_model)
            self._all = torch.empty(shape, dtype=model.dtype, device=model.device)
            self._sum = torch.zeros(rows, positions, model.d_model, dtype=model.dtype, device=model.device)

    def append(self, block: Float[Tensor, "row writer pos d_model"]) -> None:
        if self._all is None:
            self._blocks.append(block)
        else:
            self._all[:, self._n : self._n + block.shape[1]] = block
            self._sum += block.sum(1)
        self._n += block.shape[1]

    def append_unseen(self, n: int) -> None:
        """The next `n` writers are seen by nobody, so that their differences need not be known."""
        assert self._all is not None
        self._all[:, self._n : self._n + n] = 0
        self._n += n

    def through(self, gates: Float[Tensor, "row writer reader"]) -> Float[Tensor, "row reader pos d_model"]:
        """The sum over writers, all that were appended, each times its gate."""
        if self._all is not None:
            return self._selected(gates, self._all[:, : gates.shape[1]])
        total, first = None, 0
        for block in self._blocks:
            if first >= gates.shape[1]:
                break
            part = gates[:, first : first + block.shape[1]]
            seen = torch.bmm(part.mT, block.expand(len(gates), -1, -1, -1).flatten(2)).unflatten(2, block.shape[2:])
            total = seen if total is None else total + seen
            first += block.shape[1]
        assert total is not None
        return total

    def _selected(self, gates: Float[Tensor, "row writer reader"], differences: Tensor) -> Tensor:
        seen, lacked = ((gates != all_or_none).any(2).any(0) for all_or_none in (0, 1))
        fewer_lacked = int(lacked.sum()) < int(seen.sum())
        which, weights = (lacked, gates - 1) if fewer_lacked else (seen, gates)
        if int(which.sum()) < 0.7 * len(which):
            weights, differences = weights[:, which], differences[:, which]
        product = torch.bmm(weights.mT, differences.flatten(2)).unflatten(2, differences.shape[2:])
        return product + self._sum[:, None] if fewer_lacked else product


def _rows(x: Tensor, prompt: Tensor) -> Tensor:
    """What belongs to each row's prompt; an axis of 1 is the same for all."""
    return x if x.shape[0] == 1 else x[prompt]


def _has_gradient(gates: Tensor, ablated: Written) -> bool:
    return torch.is_grad_enabled() and (gates.requires_grad or any(x.requires_grad for x in ablated))
