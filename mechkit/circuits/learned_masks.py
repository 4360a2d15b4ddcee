"""Learned masks: a gate for each edge (or writer), trained until few are open and the model still does its task.

1. Every edge e has a gate z_e in [0, 1]: its reader sees `ablated + z_e (live - ablated)` of its writer (`CircuitRuns`). With
   `over="node"` all edges of a writer share one gate.
2. Gates are drawn from the hard concrete distribution, with one number log a_e to learn each. From u uniform in (0, 1)

       s_e = sigmoid((log u - log(1 - u) + log a_e) / t),    z_e = min(1, max(0, 1.2 s_e - 0.1)),

   t the temperature. So a gate is exactly 0 or exactly 1 with a probability above 0, and still has a gradient in between:
   P(z_e > 0) = sigmoid(log a_e - t log(0.1 / 1.1)).
3. Adam minimizes, by log a,

       mean over prompts and draws of loss(z) / loss(0)  +  penalty * expected open gates, the sum of P(z_e > 0).

   `loss` is the KL divergence KL(clean || circuit) of next-token distributions in nats, or (metric(circuit) - metric(clean))^2;
   `loss(0)` is its mean over the training prompts with everything ablated: 1 means as bad as no circuit at all. So the penalty is
   the price of a gate: the share of what there is to lose that it must save.
4. With a `target` only the open gates above what is wanted have a price, which changes in every step by a factor (expected open
   gates / wanted)^0.2 (with fewer than 200 steps by a larger one). What is wanted goes down from all gates to the target
   geometrically in the first half of the steps. At a price of 1 / target no more than that can pay; so it never exceeds ten times
   that (more than needed, since it saves steps), nor one half, so that what saves more than half of what there is to lose is
   never priced out. `log a` stays at its start or below: where P(z_e > 0) is 1 to rounding a price has no slope, and a gate that
   drifted there would be out of its reach. After three quarters of the steps all gates but the `target` that are most open are
   shut for good (at a tie those that save the least), and the rest of the steps trains what is left. So no more than `target` are
   open in the end; whether these suffice is for the faithfulness to say.
5. After training nothing is drawn: z_e = min(1, max(0, 1.2 sigmoid(log a_e) - 0.1)).

Every row of a minibatch has gates of its own draw, which makes the gradient less noisy at no cost. All draws come from one seed.

What is found is *a* small circuit that suffices. Of edges that do the same, one is enough; edges that cancel each other may go
together, and what saves less than its price goes too.

Gates: Louizos et al. 2018, https://arxiv.org/abs/1712.01312. Nodes: Cao et al. 2021 (subnetwork probing),
https://arxiv.org/abs/2104.03514. Edges: Bhaskar et al. 2024 (edge pruning), https://arxiv.org/abs/2406.16778; Li and Janson 2024
(UGS), https://arxiv.org/abs/2409.09951, whose constants `optimal_ablation` finds.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechkit._check import checked
from mechkit._drawn import Drawn
from mechkit._progress import Progress
from mechkit.circuits._evaluation import Ablation, Constants, Evaluator, provenance_of_ablation
from mechkit.circuits._objective import Objective, ObjectiveName, divergence, metric_maker, read_at, turns
from mechkit.circuits.circuit import Circuit
from mechkit.circuits.edge_scores import EdgeScores
from mechkit.circuits.evaluation import Ratio, ratio, run_circuits, split
from mechkit.circuits.graph import Graph
from mechkit.engine import frozen_parameters
from mechkit.experiment.provenance import circuit_provenance, merged
from mechkit.hooks import HookedModel, one_at_a_time
from mechkit.metrics import AnyMetric
from mechkit.prompts import PromptPairs
from mechkit.result import Cost, Result

LOW, HIGH = -0.1, 1.1  # the hard concrete's stretch
START = 3.0  # log a of every gate at the start: nine in ten are wide open
ASCENT, DEAREST = 0.2, 10.0  # how fast a target changes the price, and how far, in units of 1 / target
MOST = 0.5  # no price above it: what saves half of all there is to lose is never priced out
SHUT = -1000.0  # log a of a gate that is closed for good
CUT = 0.75  # share of the steps after which no more gates than the target are left
QUANTITIES = ("loss", "expected open", "penalty")


@dataclass(frozen=True, eq=False)
class LearnedMask(Drawn):
    """Gates that were learned, and how good they are.

    Attributes:
        gates: The gates to test with, `[writer reader]`, 0 to 1; 0 where there is no edge.
        scores: How likely each gate is open, P(z > 0); a writer's edges share it if nodes were masked.
        over: `"edge"` or `"node"`.
        history: Dims `("quantity", "step")`: `"loss"` (of the step's draws, 1 = everything ablated), `"expected open"` (number of
            gates, sum of P(z > 0)), `"penalty"` (for a gate, which a target changes).
        found_on: The metric on the training prompts, dims `("run", "prompt")`, of `"gates"` and of `"circuit"`, which is
            `circuit()`. Baselines: `"clean"`, the model, and `"corrupted"`, everything ablated.
        held_out: The same on the other prompts; `None` if none were held out.
        cost: Block-tokens of forward passes, training included; one of a circuit's counts up to twice a plain block's work.
    """

    gates: Float[Tensor, "writer reader"]
    scores: EdgeScores
    over: Literal["edge", "node"]
    history: Result
    found_on: Result
    held_out: Result | None
    cost: Cost

    @property
    def faithfulness(self) -> Ratio:
        """Of `circuit()`, on the held-out prompts; on the training prompts if there are none."""
        return ratio((self.held_out or self.found_on).sel(run=["circuit"]))

    @checked
    def circuit(self, *, threshold: float | None = None, n_edges: int | None = None, prune: bool = True) -> Circuit:
        """The edges whose gates are most likely open.

        Args:
            threshold: Of P(z > 0), above 0 and at most 1; default 0.5.
            n_edges: How many edges to choose instead (`over="edge"` alone).
            prune: Whether to drop dead ends. With constants as ablated values a component that nothing feeds may still write
                something else than its constant; `prune=False` keeps it.

        Raises:
            ValueError: both are given, either is out of range, or `n_edges` would cut a node in two.
        """
        if n_edges is not None and self.over == "node":
            raise ValueError(
                f"n_edges: expected None, since a node's edges share a gate; give threshold=, got {n_edges!r}"
            )
        threshold = 0.5 if n_edges is None and threshold is None else threshold
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"threshold: expected a probability above 0 and at most 1, got {threshold!r}")
        return Circuit.from_scores(self.scores, threshold=threshold, n_edges=n_edges, prune=prune)

    def __repr__(self) -> str:
        where = "training" if self.held_out is None else "held-out"
        size = f"one gate for each {self.over}; circuit of {self.circuit().n_edges:,} edges"
        found = self.faithfulness
        caution = f"; the interval covers less often than 95 %: {found.caution}" if found.caution else ""
        return f"LearnedMask({size}, faithfulness {found} on {where} prompts{caution})"


@checked
@one_at_a_time
def learn_mask(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric | None = None,
    *,
    over: Literal["edge", "node"] = "edge",
    objective: ObjectiveName = "kl",
    position: str | None = None,
    penalty: float = 5e-4,
    target: int | None = None,
    ablation: Ablation | Constants = "resample",
    steps: int = 200,
    batch: int = 8,
    lr: float = 0.3,
    temperature: float = 2 / 3,
    held_out: float = 0.5,
    seed: int = 0,
    budget: int | None = None,
    progress: bool = True,
) -> LearnedMask:
    """Learns which edges (or components) the model needs for a task.

    Args:
        model: In evaluation mode. Its parameters get no gradients.
        pairs: Clean prompts, and corrupted ones for the ablated values.
        metric: What to report faithfulness in, and what to train on if `objective` is `"metric"`: a metric of these pairs, the
            function that makes one (`mk.logit_diff`), or a callable on logits whose value for a prompt depends on that prompt's
            logits alone. Default: the KL divergence.
        over: One gate for each edge, or one for each writer (the embedding, heads, MLPs), shared by all edges out of it.
        objective: `"kl"`, KL(clean || circuit) over the whole vocabulary; or `"metric"`, the squared distance of the metric from
            the clean run's.
        position: Name of the position where `"kl"` is read. Default: where the metric reads; without a metric, or with a
            callable, each prompt's last position (`"END"`).
        penalty: The price of a gate, as a share of the loss with everything ablated. Larger gives fewer gates.
        target: How many gates may be open in the end, at most: the price starts as `penalty`, and follows; after three quarters
            of the steps all others are shut.
        ablation: What a reader sees of a writer whose gate is closed, as for `evaluate_circuit`.
        steps: Of Adam.
        batch: Rows a step: (prompt, draw of gates) pairs. Prompts take turns in random order.
        lr: Learning rate of Adam, in units of log a.
        temperature: Of the hard concrete distribution.
        held_out: Share of the pairs that is kept for the report; 0 trains on all of them.
        seed: Of the split, the batches and the draws.
        budget: Bytes of working memory; default half of what the device has free (1 GiB on a CPU). A step that needs more is
            split: the gradient is a sum over rows.
        progress: Whether to show a progress bar.

    Returns:
        A `LearnedMask`. The same seed on the same machine gives the same gates, bit for bit.

    Raises:
        ValueError: an argument out of range; a metric without gradient; clean and ablated runs that are the same for the
            objective (there is nothing to learn); what `evaluate_circuit` refuses.
    """
    settings = MaskSettings(over, objective, penalty, target, steps, batch, lr, temperature, held_out, seed)
    metric_of = metric_maker(model, pairs, metric, objective, position)
    train, test = split(len(pairs), held_out, seed) if held_out else (list(range(len(pairs))), [])
    found_on, report = pairs[train], metric_of(train)
    trained_on = divergence(found_on, report, position) if objective == "kl" else report
    with frozen_parameters(model):
        evaluator = Evaluator(model, found_on, trained_on, ablation, budget)
        gates = _Gates(evaluator.graph, settings)
        task = Objective(evaluator, objective)
        history = _train(task, gates, settings, progress)
    naive = steps * batch * int(found_on.clean.lengths.sum()) * model.n_layers // len(found_on)
    cost = Cost(evaluator.block_tokens, naive)
    about = {"technique": "learn_mask", "task": pairs.task, "ablation": provenance_of_ablation(ablation)}
    about |= {"score_is": "probability that the gate is open", "trained_at": read_at(trained_on)}
    provenance = circuit_provenance(model, found_on.clean, found_on.corrupted, **about, **asdict(settings))
    if isinstance(ablation, Constants):
        provenance["prompts"] = merged(provenance["prompts"], ablation.prompts)
    scores = gates.scores(provenance, cost)
    runs = {"gates": gates.final(), "circuit": Circuit.from_scores(scores, threshold=0.5).members}

    def evaluate(ids: list[int]) -> Result:
        evaluator = Evaluator(model, pairs[ids], metric_of(ids), ablation, budget)
        doubles = {k: v.double() for k, v in runs.items()}
        return run_circuits(evaluator, doubles, pairs[ids], ablation, "learn_mask", progress=False)

    coords: dict[str, Any] = {"quantity": QUANTITIES, "step": tuple(range(steps))}
    trained = Result(history, tuple(coords), coords, {}, "", "training", "", provenance, cost)
    on_others = evaluate(test) if test else None
    mask = LearnedMask(runs["gates"], scores, over, trained, evaluate(train), on_others, cost)
    mask.faithfulness.warn()
    return mask


@dataclass(frozen=True)
class MaskSettings:
    """The arguments of `learn_mask` that decide what is learned."""

    over: Literal["edge", "node"]
    objective: ObjectiveName
    penalty: float
    target: int | None
    steps: int
    batch: int
    lr: float
    temperature: float
    held_out: float
    seed: int

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("over", self.over in ("edge", "node"), "'edge' or 'node'"),
            ("penalty", 0 <= self.penalty < math.inf, "a number of 0 or more"),
            ("target", self.target is None or self.target >= 1, "a number of gates of 1 or more"),
            ("steps", self.steps >= 1, "1 or more"),
            ("batch", self.batch >= 1, "1 or more"),
            ("lr", 0 < self.lr < math.inf, "a positive number"),
            ("temperature", 0 < self.temperature < math.inf, "a positive number"),
        ):
            if not good:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


class _Gates:
    """What is learned: `log_alpha`, `[writer reader]` for edges (those that do not exist do nothing), `[writer 1]` for nodes.
    In float64 on the CPU: probabilities near 1 must still be distinguished, and draws be the same on every device."""

    def __init__(self, graph: Graph, settings: MaskSettings) -> None:
        self.graph, self.temperature, self.target = graph, settings.temperature, settings.target
        self.exists = graph.exists.double()
        self.counts = self.exists if settings.over == "edge" else torch.ones_like(self.exists[:, :1])
        self.n = int(self.counts.sum())
        if self.target is not None and self.target > self.n:
            raise ValueError(f"target: expected at most {self.n}, the number of gates, got {self.target}")
        self.log_alpha = torch.full_like(self.counts, START, requires_grad=True)
        self._saves = torch.zeros_like(self.counts)  # running mean of what each gate saves, to first order
        self._shut = torch.zeros_like(self.counts, dtype=torch.bool)

    def drawn(self, rows: int, generator: torch.Generator) -> Float[Tensor, "row writer reader"]:
        uniform = torch.rand(rows, *self.log_alpha.shape, dtype=torch.float64, generator=generator)
        s = torch.sigmoid((uniform.logit(1e-12) + self.log_alpha) / self.temperature)
        return (LOW + (HIGH - LOW) * s).clamp(0, 1) * self.exists

    def open_probability(self) -> Float[Tensor, "writer any"]:
        return torch.sigmoid(self.log_alpha - self.temperature * math.log(-LOW / HIGH))

    @torch.no_grad()
    def final(self) -> Float[Tensor, "writer reader"]:
        return (LOW + (HIGH - LOW) * self.log_alpha.sigmoid()).clamp(0, 1) * self.exists

    def scores(self, provenance: dict[str, Any], cost: Cost) -> EdgeScores:
        probability = self.open_probability().detach().expand(self.graph.exists.shape)
        about: dict[str, Any] = {"metric": "gate", "unit": "probability", "provenance": provenance, "cost": cost}
        return EdgeScores.of(self.graph, probability, baseline={}, prompts=False, **about)

    @torch.no_grad()
    def keep_to_target(self, slope: Float[Tensor, "writer reader"], progress: float) -> None:
        """After a step: keeps gates within reach of their price, and from `CUT` on no more of them than the target.

        Args:
            slope: The loss's mean gradient at the gates, times the gates.
            progress: The share of all steps that are done.
        """
        if self.target is None:
            return
        saved = -(slope if self.counts.shape == slope.shape else slope.sum(1, keepdim=True))
        self._saves = 0.9 * self._saves + 0.1 * saved
        self.log_alpha.clamp_(max=START)
        if progress >= CUT and not bool(self._shut.any()):
            places = self.counts.nonzero()
            at = tuple(places.unbind(1))
            order = np.lexsort((self._saves[at].numpy(), self.log_alpha[at].numpy()))
            self._shut[tuple(places[torch.from_numpy(order[: self.n - self.target])].unbind(1))] = True
        self.log_alpha[self._shut] = SHUT

    def wanted(self, progress: float) -> float:
        """How many gates should be open at a share of all steps."""
        done = min(1.0, 2 * progress)
        return self.n ** (1 - done) * (self.target or 0) ** done


def _train(task: Objective, gates: _Gates, settings: MaskSettings, progress: bool) -> Float[Tensor, "quantity step"]:
    steps, batch, scale = settings.steps, settings.batch, task.loss_of_nothing()
    generator = torch.Generator().manual_seed(settings.seed)
    prompts = turns(len(task.evaluator.pairs), batch, generator)
    adam = torch.optim.Adam([gates.log_alpha], lr=settings.lr)
    penalty, ascent = settings.penalty, ASCENT * max(1.0, 200 / steps)
    history = torch.zeros(len(QUANTITIES), steps, dtype=torch.float64)
    with Progress(steps, "step", progress) as bar:
        for step in range(steps):
            drawn = gates.drawn(batch, generator)
            total, slope = task.slope_of_gates(drawn.detach(), next(prompts))
            loss, n_open = total / batch / scale, (gates.open_probability() * gates.counts).sum()
            history[:, step] = torch.tensor([loss, n_open.item(), penalty], dtype=history.dtype)
            adam.zero_grad()
            drawn.backward(slope / (batch * scale))
            wanted = 0.0 if settings.target is None else gates.wanted(step / steps)
            (penalty * (n_open - wanted).relu()).backward()
            if settings.target is not None:
                penalty = min(penalty * (n_open.item() / wanted) ** ascent, DEAREST / settings.target, MOST)
            adam.step()
            gates.keep_to_target((slope * drawn.detach()).mean(0) / scale, (step + 1) / steps)
            bar.update(note=f"loss {loss:.3f}, {n_open.item():.0f} open")
    return history
