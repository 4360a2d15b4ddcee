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

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechkit._precision import tolerance, widen
from mechkit.circuits.graph import Graph
from mechkit.engine import Budget, Replayer
from mechkit.hooks import CannotReplayError, HookedModel, Parts, check_readout, record


@dataclass(frozen=True, eq=False)
class Written:
    """What every writer adds to the residual stream, each `[prompt … pos d_model]`; axes of 1 where it is the same for all.

    Attributes:
        embed: `[prompt 1 pos d_model]`.
        heads: For each layer `[prompt head pos d_model]`.
        mlps: For each layer `[prompt 1 pos d_model]`; empty for a model without MLPs.
    """

    embed: Tensor
    heads: list[Tensor]
    mlps: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, parts: Parts, sites: dict[tuple[str, int], Tensor], start: int = 0) -> Written:
        """From recorded activations (`Parts.writer_sites`), positions from `start` on."""
        model = parts.model

        def heads(layer: int) -> Tensor:
            z = sites["z", layer][:, start:]
            return parts.heads(layer, z.reshape(*z.shape[:2], model.n_heads, -1)).transpose(1, 2)

        mlps = [sites["mlp_out", i][:, None, start:] for i in range(model.n_layers)] if parts.has_mlp else []
        return cls(sites["resid_pre", 0][:, None, start:], [heads(i) for i in range(model.n_layers)], mlps)

    def stacked(self) -> list[Tensor]:
        """In the graph's order."""
        return [self.embed] + [x for i, h in enumerate(self.heads) for x in (h, *self.mlps[i : i + 1])]

    @classmethod
    def from_stacked(cls, blocks: list[Tensor], graph: Graph) -> Written:
        """The inverse of `stacked`."""
        size = 1 + graph.mlps
        return cls(blocks[0], blocks[1::size], blocks[2::size] if graph.mlps else [])

    def map(self, fn: Any) -> Written:
        return Written(fn(self.embed), [fn(x) for x in self.heads], [fn(x) for x in self.mlps])


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
        tokens: Int[Tensor, "prompt pos"],
        ablated: Written,
        start: int,
    ) -> None:
        """
        Args:
            model, graph, parts: The model, in evaluation mode.
            tokens: Clean prompts.
            ablated: The ablated value of every writer, positions from `start` on (or one for all).
            start: The first position at which clean and ablated values differ.

        Raises:
            ValueError: the architecture cannot be run block by block.
        """
        self.model, self.graph, self.parts, self.start, self.ablated = model, graph, parts, start, ablated
        with torch.no_grad():
            run = record(model, tokens, parts.writer_sites())
            self.run = run
            self.clean = Written.of(parts, run.sites, start)
            self.last_logits = run.last_logits
            self._bias = [self._written_by_bias(layer) for layer in range(model.n_layers)]
            run.sites.clear()
            self._ablated_streams = self._streams(ablated)
        try:
            self.replayer = Replayer(model, run, None)
        except CannotReplayError as error:
            raise ValueError(
                f"model: expected causal attention in blocks that can be run one by one; {model.name} "
                f"({model.cfg.architecture}): {error}"
            ) from error
        self.replayer.block_tokens = tokens.numel() * model.n_layers

    @property
    def n_prompts(self) -> int:
        return len(self.run.tokens)

    def rows_at_once(self, budget: Budget) -> int:
        """Circuits times prompts that fit the budget."""
        graph, model = self.graph, self.model
        readers = graph.n_heads + 2 * graph.n_kv_heads
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

        def read(stream: Tensor, readers: slice) -> Tensor:
            """What readers see, `[row reader pos d_model]`."""
            upto = graph.n_writers(graph.readers[readers.start])
            return _rows(stream, prompt)[:, None] + kept.through(gates[:, :upto, readers])

        kept.append(self.clean.embed[prompt] - _rows(ablated.embed, prompt))
        for layer in range(graph.n_layers):
            attention, mlp = graph.attention_reads_at(layer), graph.mlp_reads_at(layer)
            heads_seen, mlp_seen = any(seen[graph.heads_at(layer)]), any(seen[graph.mlp_at(layer)])
            changed = layer >= first_layer
            mlp_reads = None
            if mlp_seen and changed and parts.parallel:
                mlp_reads = read(streams[layer, "pre"], mlp)[:, 0]
            if not heads_seen:
                kept.append_unseen(graph.n_heads)
            else:
                heads = self.clean.heads[layer][prompt]
                if changed:
                    heads = self._heads(layer, read(streams[layer, "pre"], attention), prompt)
                kept.append(heads - _rows(ablated.heads[layer], prompt))
            if parts.has_mlp and not mlp_seen:
                kept.append_unseen(1)
            elif parts.has_mlp:
                if changed and not parts.parallel:
                    mlp_reads = read(streams[layer, "mid"], mlp)[:, 0]
                if mlp_reads is None:
                    written = self.clean.mlps[layer][prompt]
                else:
                    written = parts.mlp(layer, mlp_reads)[:, None]
                    if not heads_seen:  # else counted with the attention
                        self.replayer.block_tokens += mlp_reads.shape[0] * mlp_reads.shape[1]
                kept.append(written - _rows(ablated.mlps[layer], prompt))
        return read(streams[graph.n_layers, "pre"], graph.logits_at)[:, 0]

    def _streams(self, ablated: Written) -> dict[tuple[int, str], Tensor]:
        """The residual stream in front of each block, and within it, if every writer had its ablated value.

        It is summed from these values and from what biases write, not told from the clean run's stream by subtraction: what
        rounding leaves of that would be blown up by the norms where all values are 0.
        """
        streams: dict[tuple[int, str], Tensor] = {}
        everyone = torch.arange(self.n_prompts, device=self.model.device)
        stream = _rows(ablated.embed, everyone).sum(1)
        stream = widen(stream.expand(self.n_prompts, self.run.length - self.start, -1))
        for layer in range(self.graph.n_layers):
            streams[layer, "pre"] = stream.to(self.model.dtype)
            stream = stream + widen(ablated.heads[layer]).sum(1) + widen(self._bias[layer])
            if not self.parts.parallel:
                streams[layer, "mid"] = stream.to(self.model.dtype)
            if self.parts.has_mlp:
                stream = stream + widen(ablated.mlps[layer]).sum(1)
        streams[self.graph.n_layers, "pre"] = stream.to(self.model.dtype)
        return streams

    def _written_by_bias(self, layer: int) -> Tensor:
        """What a layer's attention adds beside its heads in the clean run; the same in every run, but for a norm's scale."""
        z = self.run.sites["z", layer][:, self.start :]
        return self.parts.written_by_bias(layer, z.reshape(*z.shape[:2], self.model.n_heads, -1))

    def _heads(self, layer: int, reads: Float[Tensor, "row reader pos d_model"], prompt: Tensor) -> Tensor:
        """What each head writes, `[row head pos d_model]`, given what each of the layer's readers reads."""
        graph, parts = self.graph, self.parts
        normed = parts.attention_input(layer, reads).transpose(0, 1)  # [reader row pos d_model]
        ends = (graph.n_heads, graph.n_heads + graph.n_kv_heads)
        q = parts.project_each(layer, "q", normed[: ends[0]])
        k = parts.project_each(layer, "k", normed[ends[0] : ends[1]])
        v = parts.project_each(layer, "v", normed[ends[1] :])
        return parts.heads(layer, self.replayer.attend(layer, q, k, v, prompt, self.start)).transpose(1, 2)

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
        """The sum over writers, each times its gate."""
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
    return torch.is_grad_enabled() and (gates.requires_grad or any(x.requires_grad for x in ablated.stacked()))
