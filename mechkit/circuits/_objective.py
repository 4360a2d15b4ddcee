"""What learned masks and optimal ablation share: a loss that says how far a run is from the clean one, its gradients in batches
that fit the budget, and turns of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit.circuits._evaluation import CircuitChunk, Evaluator
from mechkit.circuits._runs import CircuitRuns
from mechkit.engine import Budget, check_metric, check_parts, metric_of_some
from mechkit.hooks import HookedModel
from mechkit.hooks._devices import out_of_memory
from mechkit.metrics import AnyMetric, CallableMetric, Metric, kl_divergence, metric_for
from mechkit.prompts import PromptPairs

ObjectiveName = Literal["kl", "metric"]


def metric_maker(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric | None,
    objective: ObjectiveName,
    position: str | None = None,
) -> Callable[[list[int]], Metric | CallableMetric]:
    """What gives the metric of some of the pairs; without one the divergence at a named position."""
    if not isinstance(pairs, PromptPairs):
        raise ValueError(f"pairs: expected PromptPairs, whose two runs are compared; got {type(pairs).__name__}")
    if objective not in ("kl", "metric"):
        raise ValueError(f"objective: expected 'kl' or 'metric', got {objective!r}")
    if metric is None and objective == "metric":
        raise ValueError("metric: expected one, such as mk.logit_diff, since objective='metric' trains on it; got None")
    if position is not None and objective == "metric":
        raise ValueError(
            f"position: expected None with objective='metric', which reads where the metric does; got {position!r}"
        )
    whole = divergence(pairs, None, position) if metric is None else metric_for(metric, pairs)
    check_metric(model, pairs.clean, whole, ("clean", "corrupted"))
    if isinstance(whole, CallableMetric):  # minibatches see a part of the prompts
        check_parts(model, pairs, whole)
    return lambda ids: metric_of_some(model, pairs, whole, ids)


def divergence(pairs: PromptPairs, metric: Metric | CallableMetric | None, position: str | None) -> Metric:
    """The KL divergence from the clean run at a named position; by default where the metric reads, and where that is not known (a
    callable, or none) at each prompt's last position."""
    if position is not None or not isinstance(metric, Metric):
        return kl_divergence(pairs, position="END" if position is None else position)
    kl = kl_divergence(pairs)
    made_of = kl.made_of
    if made_of is not None and metric.made_of is not None:
        made_of = replace(made_of, position=metric.made_of.position)
    if metric.n_places == 1:
        return replace(kl, positions=metric.position, made_of=made_of)
    counts = torch.tensor([[at not in row[:i] for i, at in enumerate(row)] for row in metric.positions.tolist()])

    def read(logits: Tensor, prompt: Tensor, target: Tensor | None) -> Tensor:
        here = counts.to(logits.device)[prompt].to(logits.dtype)  # not where a place fills a row up
        places = kl.read(logits.flatten(0, 1), prompt, None if target is None else target.flatten(0, 1))
        return (places.unflatten(0, here.shape) * here).sum(1) / here.sum(1)

    return replace(kl, positions=metric.positions, read=read, made_of=made_of)


def read_at(metric: Metric | CallableMetric) -> str | list[int]:
    """Where a metric reads, for provenance: the position's name, or indices."""
    if not isinstance(metric, Metric):
        return "all positions"
    return metric.positions.tolist() if metric.made_of is None else metric.made_of.position


class Objective:
    """How far a run is from the clean one, with gradients: the KL divergence, or the squared distance of the metric.

    Attributes:
        evaluator: Of the training pairs; its metric is the KL divergence to the clean run, or the metric.
        unit: Of the loss.
        wide: The dtype of losses: float32, or float64 if the model's is.
    """

    def __init__(self, evaluator: Evaluator, name: ObjectiveName) -> None:
        self.evaluator, self.name = evaluator, name
        self.unit = evaluator.metric.unit if name == "kl" else f"{evaluator.metric.unit}^2"
        self.wide, self.device = evaluator.values["clean"].dtype, evaluator.model.device
        self._kept: list[CircuitChunk] | None = []
        held = 0
        for chunk in evaluator.chunks():  # all of them: the unedited runs' metric comes with it
            held += _bytes(chunk)
            if held > evaluator.budget.bytes // 2 or self._kept is None:
                self._kept = None  # recorded anew in every step
            else:
                self._kept.append(chunk)

    def chunks(self) -> Iterator[CircuitChunk]:
        yield from self.evaluator.chunks() if self._kept is None else self._kept

    def loss(
        self, chunk: CircuitChunk, final: Float[Tensor, "row pos d_model"], prompt: Int[Tensor, "row"]
    ) -> Float[Tensor, "row"]:
        """One value per row, 0 or more; in the graph.

        Raises:
            ValueError: the metric has no gradient.
        """
        value = chunk.value(final, prompt)
        if final.requires_grad and not value.requires_grad:
            raise ValueError(
                f"metric: {self.evaluator.metric.name!r} has no gradient (a step function such as accuracy?); train on a "
                "differentiable one such as mk.logit_diff, or with objective='kl'"
            )
        return value if self.name == "kl" else (value - self.of(chunk, "clean")[prompt]).square()

    def of(self, chunk: CircuitChunk, run: str) -> Float[Tensor, "prompt"]:
        """An unedited run's metric of a chunk's prompts."""
        return self.evaluator.values[run][chunk.ids].to(self.device)

    def loss_of_nothing(self) -> float:
        """The mean loss with everything ablated.

        Raises:
            ValueError: it is 0 to rounding.
        """
        clean, ablated = (self.evaluator.values[run] for run in ("clean", "ablated"))
        rounding = 100 * torch.finfo(clean.dtype).eps
        if self.name == "kl":
            mean, least = ablated.mean(), torch.tensor(rounding)
        else:
            mean = (ablated - clean).square().mean()
            least = (rounding * (ablated.abs() + clean.abs())).square().mean()
        if not mean > least:
            raise ValueError(
                f"pairs: expected clean and ablated runs that differ, got {self.evaluator.metric.name} "
                f"{clean.mean().item():.4g} and {ablated.mean().item():.4g}; there is nothing to learn from"
            )
        return mean.item()

    def slope_of_gates(
        self, gates: Float[Tensor, "row writer reader"], prompts: Int[Tensor, "row"]
    ) -> tuple[float, Float[Tensor, "row writer reader"]]:
        """The sum of the rows' losses, and its gradient. `prompts` says which of the training pairs each row is."""
        slope, total = torch.zeros_like(gates), 0.0
        for chunk in self.chunks():
            rows, prompt = rows_of(chunk, prompts)

            def add(some: slice, chunk: CircuitChunk = chunk, rows: Tensor = rows, prompt: Tensor = prompt) -> None:
                nonlocal total
                leaf = gates[rows[some]].to(self.device, self.wide).requires_grad_()
                at = prompt[some].to(self.device)
                loss = self.loss(chunk, chunk.runs.final(leaf, at), at).sum()
                if not bool(torch.isfinite(loss)):
                    raise ValueError("metric: expected finite values of partly ablated runs, got NaN or inf")
                slope[rows[some]] = torch.autograd.grad(loss, leaf)[0].to(slope)
                total += loss.item()

            self.in_batches(chunk, len(rows), add)
        return total, slope

    def in_batches(
        self, chunk: CircuitChunk, n_rows: int, compute: Callable[[slice], None], first_layer: int = 0
    ) -> None:
        """Calls `compute` with as many rows at a time as the budget has room for, gradients included."""
        done, budget = 0, self.evaluator.budget
        while done < n_rows:
            size = rows_with_gradients(chunk.runs, budget, first_layer)
            try:
                compute(slice(done, min(done + size, n_rows)))
            except RuntimeError as error:
                if not out_of_memory(error) or size == 1:
                    raise
                budget.halve()
                continue
            done += size
        self.evaluator.block_tokens += chunk.runs.replayer.block_tokens
        chunk.runs.replayer.block_tokens = 0


def rows_of(chunk: CircuitChunk, prompts: Int[Tensor, "row"]) -> tuple[Int[Tensor, "some"], Int[Tensor, "some"]]:
    """Which rows are of a chunk's prompts, and which of them each is."""
    return (prompts[:, None] == chunk.ids).nonzero().unbind(1)  # type: ignore[return-value]


def turns(n: int, batch: int, generator: torch.Generator) -> Iterator[Int[Tensor, "batch"]]:
    """Prompts in random order, each as often as any other, `batch` at a time, for ever."""
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < batch:
            left = torch.cat([left, torch.randperm(n, generator=generator)])
        yield left[:batch]
        left = left[batch:]


def rows_with_gradients(runs: CircuitRuns, budget: Budget, first_layer: int = 0) -> int:
    """How many rows may run together if all that the backward pass needs is kept: half the budget is for it."""
    graph, model = runs.graph, runs.model
    readers, heads = graph.most_readers, graph.n_heads
    neurons = getattr(model.cfg, "d_mlp", None) or 4 * model.d_model
    # What each reader reads, what each head writes, the stream; and gradients of them
    streams = 2 * readers + 2 * heads + 8
    a_layer = streams * model.d_model + 4 * neurons + (3 * runs.run.length + 6 * model.d_head) * heads
    a_token = 2 * len(graph.writers) * model.d_model + (graph.n_layers - first_layer) * a_layer
    a_row = a_token * (runs.run.length - runs.start) + 2 * graph.exists.numel()
    item = torch.empty((), dtype=model.dtype).element_size()
    return max(1, budget.bytes // 2 // (a_row * item))


def _bytes(chunk: CircuitChunk) -> int:
    """What a chunk holds in memory, but for what all of them share."""
    runs = chunk.runs
    tensors = [*runs.run.resid, *runs.clean, *runs.ablated]
    tensors += [x for layer in runs.run.cache.layers for x in (layer.keys, layer.values)]
    return 2 * sum(x.numel() * x.element_size() for x in tensors)  # twice: streams of ablated values, calls' arguments
