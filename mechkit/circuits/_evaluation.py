"""The metric of many circuits on a set of pairs: ablated values, prompts in chunks that fit the budget, circuits in batches.

Ablated values (what a reader sees of a writer whose edge is missing):

| name | value |
| --- | --- |
| `"resample"` | the writer's in the corrupted run |
| `"zero"` | nothing (an MLP's own output bias goes too; that of the attention, which is of no head, stays) |
| `"mean"` | its mean over all corrupted prompts and positions |
| `"position_mean"` | its mean over the corrupted prompts at each position counted from the start (those that are long enough) |
| `Constants` | given vectors, such as `optimal_ablation` finds |
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechkit._check import checked
from mechkit._precision import wide_dtype, widen
from mechkit._warnings import warn_of_task
from mechkit.circuits._runs import CircuitRuns
from mechkit.circuits._writings import Written, written
from mechkit.circuits.graph import Graph
from mechkit.engine import Budget, agree_before_difference, call_metric, logits_at_hand, read_metric
from mechkit.experiment.estimates import AnyMetric, check_experiment
from mechkit.hooks import HookedModel, Parts, Run, record
from mechkit.hooks._devices import out_of_memory
from mechkit.hooks._nonfinite import where_it_began
from mechkit.metrics import CallableMetric, Metric, metric_for
from mechkit.prompts import PromptPairs

Ablation = Literal["resample", "zero", "mean", "position_mean"]
Circuits = Bool[Tensor, "circuit writer reader"] | Float[Tensor, "circuit writer reader"]  # masks, or gates from 0 to 1
ABLATIONS = ("resample", "zero", "mean", "position_mean")


@checked
@dataclass(frozen=True, eq=False)
class Constants:
    """One ablated value for each writer, whatever the prompt and the position.

    Attributes:
        values: `[writer d_model]`, in the graph's order: what the writer adds to the residual stream.
        graph: Of the model that they are for.
        name: For provenance, such as `"optimal"`.
        prompts: Fingerprints of the prompts that they were found on; empty if they were not.
    """

    values: Float[Tensor, "writer d_model"]
    graph: Graph
    name: str = "constants"
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.values.is_floating_point() or self.values.ndim != 2 or len(self.values) != self.graph.n_cells[0]:
            raise ValueError(
                f"values: expected floating-point [{self.graph.n_cells[0]} d_model], one row a writer, got {self.values.dtype} "
                f"{list(self.values.shape)}"
            )
        if not bool(self.values.isfinite().all()):
            row = int((~self.values.isfinite()).any(1).nonzero()[0])
            raise ValueError(
                f"values: expected finite numbers, got NaN or infinite ones for {self.graph.writers[row].name!r}"
            )

    def written(self) -> Written:
        """As the ablated values of runs, `[1 writer 1 d_model]`."""
        return [self.values[None, where, None] for where in self.graph.writers_at]


@dataclass(eq=False)
class CircuitChunk:
    """Prompts of equal length whose circuits run together.

    Attributes:
        ids: Their indices in the whole set.
        runs: Their circuits' runs.
        reference: The logits that the metric compares with, if it does, `[prompt token]`.
    """

    owner: Evaluator
    ids: Int[Tensor, "prompt"]
    runs: CircuitRuns
    reference: Tensor | None

    def logits(self, final: Float[Tensor, "row pos d_model"], prompt: Int[Tensor, "row"]) -> Tensor:
        """The logits of the metric's tokens where it reads, `[row token]` or `[row place token]`."""
        metric = self.owner.metric
        assert isinstance(metric, Metric)
        at = metric.positions[self.ids].to(final.device)[prompt] - self.runs.start
        rows = torch.arange(len(final), device=final.device).reshape(-1, *[1] * (at.ndim - 1))
        return widen(self.owner.model.unembed(final[rows, at], metric.tokens))

    def value(self, final: Float[Tensor, "row pos d_model"], prompt: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        """The metric of each row, in the graph."""
        metric, model = self.owner.metric, self.owner.model
        if isinstance(metric, Metric):
            reference = None if self.reference is None else self.reference[prompt]
            return read_metric(metric, self.logits(final, prompt), self.ids.to(final.device)[prompt], reference)
        clean, start = self.runs.run.resid[-1], self.runs.start

        def logits_of(rows: np.ndarray) -> Tensor:
            return model.unembed(torch.cat([clean[prompt[rows], :start], final[rows]], 1))

        def others() -> Tensor:
            return model.unembed(clean[self.ids.argsort().to(clean.device)])

        return call_metric(metric, logits_of, self.ids[prompt.cpu()].numpy(), len(self.ids), others)


class Evaluator:
    """Runs circuits on pairs and reads the metric.

    Attributes:
        values: The metric of the unedited runs, `"clean"` and `"corrupted"`, and of the empty circuit, `"ablated"`.
        block_tokens: Computed so far; a circuit's counts up to twice a plain block's work.
    """

    def __init__(
        self,
        model: HookedModel,
        pairs: PromptPairs,
        metric: AnyMetric,
        ablation: Ablation | Constants = "resample",
        budget: int | None = None,
    ) -> None:
        if not isinstance(pairs, PromptPairs):
            raise ValueError(f"pairs: expected PromptPairs, whose two runs are compared; got {type(pairs).__name__}")
        pairs.check_position_by_position("circuits put one run's values into the other, position by position")
        if not isinstance(ablation, Constants) and ablation not in ABLATIONS:
            raise ValueError(
                f"ablation: expected one of {', '.join(map(repr, ABLATIONS))} or Constants, got {ablation!r}"
            )
        self.model, self.pairs, self.ablation = model, pairs, ablation
        self.metric: Metric | CallableMetric = metric_for(metric, pairs)
        check_experiment(model, self.metric, {"clean": pairs.clean, "corrupted": pairs.corrupted})
        self.graph, self.parts, self.budget = Graph.of(model), Parts(model), Budget.of(model, budget)
        if isinstance(ablation, Constants) and ablation.graph != self.graph:
            raise ValueError(f"ablation: expected constants for {self.graph}, got some for {ablation.graph}")
        if isinstance(ablation, Constants) and ablation.values.shape[1] != model.d_model:
            raise ValueError(
                f"ablation: expected constants of {model.d_model} numbers each (d_model), got {list(ablation.values.shape)}"
            )
        self.parts.check(pairs.clean.stack([0]))
        wide = wide_dtype(model.dtype)
        runs = ("clean", "corrupted", "ablated")
        self.values = {run: torch.full((len(pairs),), torch.nan, dtype=wide) for run in runs}
        self.block_tokens = 0
        self.task_checked = False  # whether it was looked at if the model does the task
        self._checked: set[tuple[int, bool]] = set()  # lengths, and whether something is left out before the start
        self._looks_ahead = False  # whether some pair's runs were found to differ before their tokens do
        self._means: Written | None = None
        self._kept: list[CircuitChunk] = []

    def chunks(self) -> Iterator[CircuitChunk]:
        """All prompts, in chunks. Their unedited runs are recorded once, if all of them fit the budget together."""
        if self._kept:
            yield from self._kept
            return
        first = self.pairs.first_difference.tolist()
        fit = self._fit if isinstance(self.metric, Metric) else None  # a callable sees all prompts together
        plan = [batch.ids for batch in self.pairs.clean.batches(fit, order=first.__getitem__, longest_first=True)]
        keep = sum(len(ids) * self._bytes(ids) for ids in plan) <= self.budget.bytes // 2
        kept = []
        for ids in plan:
            chunk = self._record(ids)
            self.block_tokens += chunk.runs.replayer.block_tokens
            chunk.runs.replayer.block_tokens = 0
            if keep:
                kept.append(chunk)
            yield chunk
        self._kept = kept

    @torch.no_grad()
    def evaluate(self, circuits: Circuits, *, first_layer: int = 0) -> Float[Tensor, "circuit prompt"]:
        """The metric of every circuit on every prompt. `circuits` are masks or gates from 0 to 1."""
        answers = torch.full((len(circuits), len(self.pairs)), torch.nan, dtype=self.values["clean"].dtype)
        order = circuits.sum((1, 2)).argsort()  # sparse ones together, dense ones together: they are run differently
        for chunk in self.chunks():
            values = self.evaluate_chunk(chunk, circuits[order], first_layer=first_layer).to(answers)
            answers[order[:, None], chunk.ids] = values
        return answers

    @torch.no_grad()
    def evaluate_chunk(
        self, chunk: CircuitChunk, circuits: Circuits, *, first_layer: int = 0
    ) -> Float[Tensor, "circuit prompt"]:
        """The same for one chunk."""
        n, device = len(chunk.ids), self.model.device
        circuit = torch.arange(len(circuits)).repeat_interleave(n)
        prompt = torch.arange(n).repeat(len(circuits))
        unit = n if isinstance(self.metric, CallableMetric) else 1  # a callable sees all prompts of a circuit together
        done, found = 0, []
        while done < len(circuit):
            size = max(unit, chunk.runs.rows_at_once(self.budget) // unit * unit)
            rows = slice(done, done + size)
            at = prompt[rows].to(device)
            try:
                final = chunk.runs.final(circuits[circuit[rows]].to(device), at, first_layer=first_layer)
            except RuntimeError as error:
                if not out_of_memory(error) or size <= unit:
                    raise
                self.budget.halve()
                continue
            found.append(chunk.value(final, at).detach().cpu())
            done += size
        self.block_tokens += chunk.runs.replayer.block_tokens
        chunk.runs.replayer.block_tokens = 0
        values = torch.cat(found).reshape(len(circuits), n)
        if not bool(torch.isfinite(values).all()):
            bad = (~torch.isfinite(values)).nonzero()[0].tolist()
            raise ValueError(
                f"circuit of {int((circuits[bad[0]] != 0).sum())} edges: expected a finite metric, got NaN or inf for prompt "
                f"{int(chunk.ids[bad[1]])}; what the ablated values lead to in this dtype is not finite"
            )
        return values

    def _fit(self, length: int, ids: Sequence[int]) -> int:
        return max(1, self.budget.bytes // 2 // self._bytes(ids))

    def _bytes(self, ids: Sequence[int]) -> int:
        """What is kept of each of these prompts, which have one length: clean and ablated values, streams, keys and values."""
        model, length = self.model, int(self.pairs.clean.lengths[ids[0]])
        floats = (length - self._start(ids, length)) * model.d_model * 2 * len(self.graph.writers)
        floats += length * model.n_layers * (3 * model.d_model + 2 * model.n_kv_heads * model.d_head)
        return floats * torch.empty((), dtype=model.dtype).element_size()

    def _start(self, ids: Sequence[int], length: int) -> int:
        """The first position to run: that of the first difference, where the corrupted run is put in and agrees until then."""
        if self.ablation != "resample" or self._looks_ahead:
            return 0
        start = min(int(self.pairs.first_difference[i]) for i in ids)
        read = int(self.metric.positions[list(ids)].min()) if isinstance(self.metric, Metric) else length - 1
        return min(start, read, length - 1)

    @torch.no_grad()
    def _record(self, ids: list[int]) -> CircuitChunk:
        clean, corrupted = (
            prompts.stack(ids).to(self.model.device) for prompts in (self.pairs.clean, self.pairs.corrupted)
        )
        start = self._start(ids, clean.tokens.shape[1])
        sites = self.graph.recorded if self.ablation == "resample" else ()
        other = record(self.model, corrupted, sites, blocks=False)
        self.block_tokens += corrupted.tokens.numel() * self.model.n_layers
        ablated = self._ablated(other, clean.tokens.shape[1], start)
        runs = CircuitRuns(self.model, self.graph, self.parts, clean, ablated, start)
        if start and not bool(agree_before_difference(clean, corrupted, runs.run.resid[-1], other.resid[-1]).all()):
            self._looks_ahead = True
            self.block_tokens += runs.replayer.block_tokens
            return self._record(ids)
        owner: Evaluator = weakref.proxy(self)  # no cycle: the recorded runs go when the evaluator goes
        chunk = CircuitChunk(owner, torch.tensor(ids), runs, None)
        if (kind := (runs.run.length, bool(start))) not in self._checked:
            runs.check(other.last_logits[0] if self.ablation == "resample" else None)
            self._checked.add(kind)
        self._keep_unedited(chunk, runs.run, other)
        return chunk

    def _ablated(self, corrupted: Run, length: int, start: int) -> Written:
        if self.ablation == "resample":
            return written(self.graph, self.parts, corrupted.sites, start)
        constants = self.ablation
        if constants == "zero":
            constants = Constants(torch.zeros(len(self.graph.writers), self.model.d_model), self.graph)
        if isinstance(constants, Constants):
            return [x.to(self.model.device, self.model.dtype) for x in constants.written()]
        if self._means is None:
            self._means = self._mean_written()
        return [x[..., :length, :] for x in self._means]  # one position is the mean over all

    @torch.no_grad()
    def _mean_written(self) -> Written:
        """Means over the corrupted prompts, at each position (over the prompts that have it), or over all positions."""
        sums: list[Tensor] = []
        by_position = self.ablation == "position_mean"
        sites, fit = self.graph.recorded, self.budget.prompts_at_once
        counts = torch.zeros(int(self.pairs.corrupted.lengths.max()) if by_position else 1, dtype=torch.float64)
        for batch in self.pairs.corrupted.batches(lambda length, _: fit(self.model, length, sites)):
            run = record(self.model, batch.stacked, sites, blocks=False)
            self.block_tokens += run.tokens.numel() * self.model.n_layers
            values = written(self.graph, self.parts, run.sites)
            summed = [x.double().sum((0,) if by_position else (0, 2), keepdim=True) for x in values]
            sums = sums or [x.new_zeros(*x.shape[:2], len(counts), x.shape[3]) for x in summed]
            for total, more in zip(sums, summed, strict=True):
                total[:, :, : more.shape[2]] += more
            counts[: batch.length if by_position else 1] += len(batch) * (1 if by_position else batch.length)
        return [(total / counts[:, None].to(total.device)).to(self.model.dtype) for total in sums]

    @torch.no_grad()
    def _keep_unedited(self, chunk: CircuitChunk, clean: Run, corrupted: Run) -> None:
        """The metric of the unedited runs and of the empty circuit."""
        everyone = torch.arange(len(chunk.ids), device=self.model.device)
        start = chunk.runs.start
        finals = {"clean": clean.resid[-1][:, start:], "corrupted": corrupted.resid[-1][:, start:]}
        metric = self.metric
        if isinstance(metric, Metric) and metric.reference is not None:
            chunk.reference = chunk.logits(finals[metric.reference], everyone)
        nothing = torch.zeros(len(everyone), *self.graph.exists.shape, device=self.model.device)
        finals["ablated"] = finals["corrupted"]
        if self.ablation != "resample":
            finals["ablated"] = chunk.runs.final(nothing, everyone)
        for run, final in finals.items():
            whole = self._value_of_run(chunk, run, final, everyone, corrupted)
            self.values[run][chunk.ids] = whole.cpu().to(self.values[run])
            if not bool(torch.isfinite(whole).all()):
                bad = (~torch.isfinite(whole)).nonzero().flatten().tolist()
                prompts = self.pairs.clean if run == "clean" else self.pairs.corrupted
                at_fault = prompts.stack([int(chunk.ids[bad[0]])])
                raise ValueError(
                    f"{run} run: expected a finite metric, got NaN or inf for prompts {[int(chunk.ids[i]) for i in bad[:5]]}; of "
                    f"prompt {int(chunk.ids[bad[0]])} {where_it_began(self.model, at_fault)}"
                )
        unedited = {run: self.values[run] for run in ("clean", "corrupted")}
        if not self.task_checked and not any(bool(value.isnan().any()) for value in unedited.values()):
            self.task_checked = True
            if isinstance(metric, Metric):
                warn_of_task(metric.name, unedited)

    def _value_of_run(self, chunk: CircuitChunk, run: str, final: Tensor, everyone: Tensor, corrupted: Run) -> Tensor:
        if isinstance(self.metric, Metric) or run != "corrupted":
            return chunk.value(final, everyone)
        logits = self.model.unembed(corrupted.resid[-1])
        return call_metric(self.metric, logits_at_hand(logits), chunk.ids.numpy(), len(chunk.ids))


def provenance_of_ablation(ablation: Ablation | Constants) -> Any:
    return ablation.name if isinstance(ablation, Constants) else ablation
