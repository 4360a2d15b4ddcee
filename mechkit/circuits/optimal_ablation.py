"""Optimal ablation: replace what a component writes by the constant that does the least harm.

1. A component (writer) w is ablated by a constant a_w: it writes a_w into the residual stream at every position of every prompt,
   whatever it would have written. So no information about the prompt is left in it, and nothing else is put in.
2. Zero and mean ablation do that with constants that may themselves throw the model off. Optimal ablation takes the best one:

       Delta(w) = min over a_w of  mean over prompts of loss(run with w ablated by a_w).

   `loss` is KL(clean || ablated) of next-token distributions at one position (by default the last), in nats, or
   (metric(ablated) - metric(clean))^2. Delta is the component's importance: the harm that no constant can avoid.
3. With a circuit, all edges outside it are ablated at once, and one set of constants is found for all writers together; a writer
   has the same constant for all its ablated edges.
4. Adam goes downhill from the mean over corrupted prompts and positions, each writer in units of how much its outputs vary. The
   constants with the least loss on all prompts are kept, mean and zero among them: neither is ever better than what is returned.

A constant of a head is any vector of the residual stream, not only one that its output matrix can write. Resample ablation may do
less harm than the best constant: a partner's value at the same position is no constant, and still says what the prompts share.

Li and Janson 2024, https://arxiv.org/abs/2409.09951.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechkit._check import checked
from mechkit._drawn import Drawn
from mechkit._progress import Progress
from mechkit.circuits._evaluation import CircuitChunk, Constants, Evaluator
from mechkit.circuits._objective import Objective, ObjectiveName, divergence, metric_maker, rows_of, turns
from mechkit.circuits._writings import Written
from mechkit.circuits.circuit import Circuit
from mechkit.circuits.graph import Graph, Writer
from mechkit.engine import frozen_parameters
from mechkit.experiment.provenance import circuit_provenance
from mechkit.hooks import HookedModel, one_at_a_time
from mechkit.metrics import AnyMetric
from mechkit.prompts import PromptPairs
from mechkit.result import Cost, Result

LOOK = 10  # steps between two looks at all prompts, where a step sees a part of them
STARTS = ("mean", "zero")


@dataclass(frozen=True, eq=False, kw_only=True)
class OptimalConstants(Constants, Drawn):
    """Constants for `ablation=`, and what they achieve.

    Attributes:
        values: `[writer d_model]`, of all writers of the graph; the mean for those that were not asked for.
        losses: The loss under `"mean"`, `"zero"` and `"optimal"` ablation, dims `("ablation", "writer", "prompt")`; without
            `"writer"` if everything outside a circuit is ablated at once. Its baseline is the clean run, whose loss is 0.
    """

    losses: Result

    @property
    def importance(self) -> Result:
        """The loss under the best constants, Delta: dims `("writer", "prompt")`, or `("prompt",)`."""
        return self.losses.sel(ablation="optimal")


@checked
@one_at_a_time
def optimal_ablation(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric | None = None,
    *,
    circuit: Circuit | None = None,
    writers: Sequence[Writer | str] | None = None,
    objective: ObjectiveName = "kl",
    position: str | None = None,
    steps: int = 100,
    batch: int | None = None,
    lr: float = 0.1,
    seed: int = 0,
    budget: int | None = None,
    progress: bool = True,
) -> OptimalConstants:
    """Finds the constants that do the least harm when they replace what components write.

    Args:
        model: In evaluation mode. Its parameters get no gradients.
        pairs: Clean prompts, which are run; the corrupted ones serve for the mean that it starts from.
        metric: For `objective="metric"`: as for `learn_mask`. For `"kl"` it says where the divergence is read.
        circuit: Ablate all edges outside of it at once. Default: each component by itself, all its edges.
        writers: Components to ablate, such as `["a9.h6", "m0"]`, each by itself. Default: all.
        objective: `"kl"`, KL(clean || ablated) in nats over the whole vocabulary; or `"metric"`, the squared distance of the
            metric from the clean run's.
        position: As for `learn_mask`: the name of the position where `"kl"` is read.
        steps: Of Adam; its rate falls linearly to 0.
        batch: Prompts a step; default all of them, which needs no draws.
        lr: Learning rate, in units of the standard deviation of what a component writes.
        seed: Of the batches.
        budget: Bytes of working memory; default half of what the device has free (1 GiB on a CPU).
        progress: Whether to show a progress bar.

    Returns:
        `OptimalConstants`, whose losses under `"optimal"` are, on average over the prompts, never above the others.

    Raises:
        ValueError: an argument out of range; a component that does not exist; a circuit of another model; a metric without
            gradient; an architecture whose edges are not known.
    """
    for name, value in (("steps", steps), ("lr", lr), ("batch", 1 if batch is None else batch)):
        if not (value >= 1 or (name == "lr" and value > 0)) or value == math.inf:
            raise ValueError(f"{name}: expected {'a positive number' if name == 'lr' else '1 or more'}, got {value!r}")
    if circuit is not None and writers is not None:
        raise ValueError("writers: expected None with a circuit, which says what is ablated; give one of the two")
    report = metric_maker(model, pairs, metric, objective, position)(list(range(len(pairs))))
    if circuit is not None:
        circuit.check(model)
    with frozen_parameters(model):
        task = Objective(
            Evaluator(
                model, pairs, divergence(pairs, report, position) if objective == "kl" else report, "mean", budget
            ),
            objective,
        )
        search = _Alone(task, _chosen(task.evaluator.graph, writers)) if circuit is None else _Together(task, circuit)
        values, losses = _descend(search, steps, batch, lr, seed, progress)
    units: dict[str, tuple[int | str, ...]] = {}
    if circuit is None:
        units["writer"] = tuple(writer.name for writer in search.writers)
    coords: dict[str, tuple[int | str, ...]] = {
        "ablation": (*STARTS, "optimal"),
        **units,
        "prompt": tuple(range(len(pairs))),
    }
    arguments = {"objective": objective, "steps": steps, "batch": batch, "lr": lr, "seed": seed}
    result = Result(
        values=losses if units else losses[:, 0],
        dims=tuple(coords),
        coords=coords,
        baseline={"clean": torch.zeros(len(pairs), dtype=losses.dtype)},
        base="clean",
        metric="kl_divergence" if objective == "kl" else f"{report.name} squared distance",
        unit=task.unit,
        provenance=circuit_provenance(
            model,
            pairs.clean,
            pairs.corrupted,
            technique="optimal_ablation",
            task=pairs.task,
            **arguments,
            n_edges=None if circuit is None else circuit.n_edges,
        ),
        cost=Cost(task.evaluator.block_tokens, search.naive_tokens(steps, batch or len(pairs))),
    )
    return OptimalConstants(values, search.graph, "optimal", tuple(result.provenance["prompts"]), losses=result)


def _chosen(graph: Graph, writers: Sequence[Writer | str] | None) -> list[Writer]:
    if writers is None:
        return list(graph.writers)
    if isinstance(writers, str | Writer):
        raise ValueError(f"writers: expected a list, got {writers!r}; write writers=[{str(writers)!r}]")
    chosen = [graph.writer(str(writer)) for writer in writers]
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"writers: expected at least one, each once; got {[w.name for w in chosen]}")
    return sorted(chosen, key=lambda writer: graph.writer_index[writer.name])


@torch.no_grad()
def _start(task: Objective) -> tuple[Float[Tensor, "writer d_model"], Float[Tensor, "writer 1"]]:
    """The means, and how much each writer's outputs vary around them."""
    squares, count, mean = torch.zeros(0), 0, torch.zeros(0)
    for chunk in task.chunks():
        if not count:
            mean = torch.cat(chunk.runs.ablated, 1)[0, :, 0].to(task.wide)
            squares = torch.zeros(len(mean), 1, dtype=task.wide, device=mean.device)
        for where, block in zip(task.evaluator.graph.writers_at, chunk.runs.clean, strict=True):
            off = block.to(task.wide) - mean[None, where, None]
            squares[where] += off.square().mean(-1).sum((0, 2))[:, None]
        count += len(chunk.ids) * (chunk.runs.run.length - chunk.runs.start)
    scale = (squares / count).sqrt()
    return mean, scale.clamp(min=float(scale.mean()) / 100)  # what hardly varies must still be able to move


class _Search(ABC):
    """What is ablated. A *unit* is what has a loss of its own: a component by itself, or everything outside a circuit.

    Attributes:
        writers: Those whose constants are sought.
        unit: For each writer of the graph the unit that it belongs to, or -1.
    """

    writers: list[Writer]
    unit: Int[Tensor, "writer"]
    n_units: int

    def __init__(self, task: Objective) -> None:
        self.task, self.graph = task, task.evaluator.graph
        self.model = task.evaluator.model

    def losses(
        self, values: Float[Tensor, "writer d_model"], prompts: Int[Tensor, "row"], slope: Tensor | None = None
    ) -> Float[Tensor, "unit row"]:
        """The loss of every unit on every row's prompt; adds the gradient of their sum to `slope`, if one is given."""
        found = torch.full((self.n_units, len(prompts)), torch.nan, dtype=self.task.wide)
        with torch.set_grad_enabled(slope is not None):
            for chunk in self.task.chunks():
                rows, prompt = rows_of(chunk, prompts)
                if len(rows):
                    self.add_losses(chunk, values, rows, prompt.to(self.model.device), found, slope)
        return found

    @abstractmethod
    def add_losses(
        self, chunk: CircuitChunk, values: Tensor, rows: Tensor, prompt: Tensor, found: Tensor, slope: Tensor | None
    ) -> None:
        """Fills in the losses of some rows, whose prompts are of one chunk; adds the gradient to `slope`, if one is given."""

    def run(
        self,
        chunk: CircuitChunk,
        gates: Tensor,
        prompt: Tensor,
        ablated: Written,
        leaf: Tensor,
        slope: Tensor | None,
        first_layer: int = 0,
    ) -> Float[Tensor, "row"]:
        """Losses of rows; adds the gradient at `leaf` to `slope`."""
        final = chunk.runs.final(gates, prompt, first_layer=first_layer, ablated=ablated)
        loss = self.task.loss(chunk, final, prompt)
        if slope is not None:
            if not bool(torch.isfinite(loss).all()):
                raise ValueError("metric: expected finite values of ablated runs, got NaN or inf; try a smaller lr")
            slope += torch.autograd.grad(loss.sum(), leaf)[0]
        return loss.detach().to("cpu", self.task.wide)

    def naive_tokens(self, steps: int, rows: int) -> int:
        pairs = self.task.evaluator.pairs
        length = int(pairs.clean.lengths.sum()) / len(pairs)
        return int(self.n_units * self.model.n_layers * length * (steps * rows + 2 * len(pairs)))


@dataclass(frozen=True)
class _Piece:
    """Writers that write together (`Graph.writing`).

    Attributes:
        place: Which one it is of `Graph.writers_at`.
        where: All of its writers in the graph.
        chosen: Those that are ablated.
        first_layer: The first layer whose input is changed by it.
    """

    place: int
    where: slice
    chosen: list[int]
    first_layer: int


class _Alone(_Search):
    """Each writer by itself: all others write what they write in this very run."""

    def __init__(self, task: Objective, writers: list[Writer]) -> None:
        super().__init__(task)
        self.writers, self.n_units = writers, len(writers)
        index = [self.graph.writer_index[writer.name] for writer in writers]
        self.unit = torch.full((len(self.graph.writers),), -1)
        self.unit[index] = torch.arange(len(writers))
        pieces = []
        for place, where in enumerate(self.graph.writers_at):
            first_layer = next(group.layer for group in self.graph.reading if group.sees > where.start)
            chosen = [i for i in index if where.start <= i < where.stop]
            pieces.append(_Piece(place, where, chosen, first_layer))
        self.pieces = [piece for piece in pieces if piece.chosen]

    def add_losses(
        self, chunk: CircuitChunk, values: Tensor, rows: Tensor, prompt: Tensor, found: Tensor, slope: Tensor | None
    ) -> None:
        for piece in self.pieces:
            self._add_piece(piece, chunk, values, rows, prompt, found, slope)

    def _add_piece(
        self,
        piece: _Piece,
        chunk: CircuitChunk,
        values: Tensor,
        rows: Tensor,
        prompt: Tensor,
        found: Tensor,
        slope: Tensor | None,
    ) -> None:
        exists = self.graph.exists.to(self.model.device, self.model.dtype)
        writer = torch.tensor(piece.chosen).repeat_interleave(len(rows))  # a row for each writer and prompt
        row, at = torch.arange(len(rows)).repeat(len(piece.chosen)), prompt.repeat(len(piece.chosen))

        def add(some: slice) -> None:
            leaf = values[piece.where].detach().requires_grad_(slope is not None)
            blocks = list(chunk.runs.clean)  # whose ablated value is the clean one is not ablated
            blocks[piece.place] = leaf[None, :, None].to(self.model.dtype)
            gates = exists.repeat(len(writer[some]), 1, 1)
            gates[torch.arange(len(gates)), writer[some]] = 0
            into = None if slope is None else slope[piece.where]
            loss = self.run(chunk, gates, at[some], blocks, leaf, into, piece.first_layer)
            found[self.unit[writer[some]], rows[row[some]]] = loss

        self.task.in_batches(chunk, len(writer), add, piece.first_layer)


class _Together(_Search):
    """Everything outside a circuit at once."""

    def __init__(self, task: Objective, circuit: Circuit) -> None:
        super().__init__(task)
        self.writers, self.n_units = list(self.graph.writers), 1
        self.unit = torch.zeros(len(self.writers), dtype=torch.long)
        self.members: Bool[Tensor, "writer reader"] = circuit.members

    def add_losses(
        self, chunk: CircuitChunk, values: Tensor, rows: Tensor, prompt: Tensor, found: Tensor, slope: Tensor | None
    ) -> None:
        gates = self.members.to(self.model.device, self.model.dtype)

        def add(some: slice) -> None:
            leaf = values.detach().requires_grad_(slope is not None)
            ablated = Constants(leaf.to(self.model.dtype), self.graph).written()
            every = gates.expand(len(prompt[some]), -1, -1)
            found[0, rows[some]] = self.run(chunk, every, prompt[some], ablated, leaf, slope)

        self.task.in_batches(chunk, len(rows), add)


def _descend(
    search: _Search, steps: int, batch: int | None, lr: float, seed: int, progress: bool
) -> tuple[Float[Tensor, "writer d_model"], Float[Tensor, "ablation unit prompt"]]:
    """The best constants that were seen, and the losses of the two starts and of these."""
    n = len(search.task.evaluator.pairs)
    everyone = torch.arange(n)
    batch = n if batch is None else batch
    mean, scale = _start(search.task)
    starts = [mean, torch.zeros_like(mean)]
    at_start = torch.stack([search.losses(values, everyone) for values in starts])
    best = _Best(search, mean, at_start[0])
    best.see(starts[1], at_start[1])
    moved = torch.zeros_like(mean, requires_grad=True)
    adam = torch.optim.Adam([moved], lr=lr)
    prompts = turns(n, batch, torch.Generator().manual_seed(seed))
    with Progress(steps, "step", progress) as bar:
        for step in range(steps):
            values = (mean + scale * moved).detach()
            rows = everyone if batch >= n else next(prompts)
            slope = torch.zeros_like(values)
            losses = search.losses(values, rows, slope)
            if batch >= n:
                best.see(values, losses)
            elif step % LOOK == 0 and step:
                best.see(values, search.losses(values, everyone))
            moved.grad = slope * scale / len(rows)
            for group in adam.param_groups:
                group["lr"] = lr * (1 - step / steps)
            adam.step()
            bar.update(note=f"loss {best.losses.mean().item():.4g}")
    values = (mean + scale * moved).detach()
    best.see(values, search.losses(values, everyone))
    return best.values.cpu(), torch.cat([at_start, best.losses[None]])


class _Best:
    """The constants with the least loss so far, unit by unit."""

    def __init__(self, search: _Search, values: Tensor, losses: Float[Tensor, "unit prompt"]) -> None:
        self.unit, self.values, self.losses = search.unit, values.clone(), losses.clone()

    def see(self, values: Tensor, losses: Float[Tensor, "unit prompt"]) -> None:
        better = losses.mean(1) < self.losses.mean(1)  # false where NaN
        better |= ~torch.isfinite(self.losses.mean(1)) & torch.isfinite(losses.mean(1))
        self.losses[better] = losses[better]
        of_better = ((self.unit >= 0) & better[self.unit.clamp(min=0)]).to(values.device)
        self.values[of_better] = values[of_better]
