"""Faithfulness by the number of edges that are kept: circuits of the best edges, and random ones of the same sizes.

1. Score all edges, on one part of the pairs where a method is given, or beforehand.
2. For each share of the graph's edges: the circuit of the best so many, without dead ends.
3. Run all of these circuits, and random ones, with everything else ablated, in batches: on the pairs that were held out, and on
   the others.

Areas under the curve: Mueller et al. 2025 (MIB), https://arxiv.org/abs/2504.13151.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mechkit._check import checked
from mechkit._drawn import Drawn
from mechkit.circuits._evaluation import Ablation, Constants, Evaluator
from mechkit.circuits.areas import FRACTIONS, cmd, cpr
from mechkit.circuits.circuit import Circuit
from mechkit.circuits.edge_scores import EdgeScores
from mechkit.circuits.evaluation import (
    interval_caution,
    run_circuits,
    seen_prompts,
    split,
    warn_of_interval,
)
from mechkit.engine import metric_of_some
from mechkit.experiment.estimates import AnyMetric
from mechkit.hooks import HookedModel, one_at_a_time
from mechkit.metrics import metric_for
from mechkit.prompts import PromptPairs
from mechkit.result import Result

Scorer = Callable[[HookedModel, PromptPairs, Any], EdgeScores]


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve(Drawn):
    """Faithfulness against the number of edges kept.

    Attributes:
        fractions: Shares of the graph's edges.
        n_edges: How many edges that is.
        kept: How many of them the circuits have: without dead ends, which are dropped where ablated values are resampled.
        runs: The metric of each circuit, dims `("n_edges", "prompt")`; baselines as `CircuitReport.runs`.
        random: Of random circuits with as many edges as were kept, dims `("seed", "n_edges", "prompt")`; or `None`.
        scores: The scores.
        found_on: The same curve over the prompts that the scores come from, where others were held out.
        n_seen: How many of the prompts the scores (or the constants that were put in) come from; `None` if that is not known.
    """

    fractions: tuple[float, ...]
    n_edges: tuple[int, ...]
    kept: tuple[int, ...]
    runs: Result
    random: Result | None
    scores: EdgeScores
    found_on: FaithfulnessCurve | None = None
    n_seen: int | None = None

    @property
    def held_out(self) -> bool | None:
        """Whether none of the prompts had been seen when the edges were scored; `None` if that is not known."""
        return None if self.n_seen is None else self.n_seen == 0

    @property
    def faithfulness(self) -> tuple[float, ...]:
        """Of the circuit at each size."""
        return tuple(self.runs.mean("prompt").normalized().values.double().tolist())

    @property
    def random_faithfulness(self) -> tuple[float, ...]:
        """The mean over random circuits at each size."""
        if self.random is None:
            raise ValueError("random: no random circuits were run; give random=3 or so")
        return tuple(self.random.mean("prompt").normalized().values.double().mean(0).tolist())

    @property
    def cpr(self) -> float:
        """Area under the curve (MIB); 0.999 for circuits as good as the model."""
        return cpr(self.fractions, self.faithfulness)

    @property
    def cmd(self) -> float:
        """Area of the distance from 1 (MIB); 0 for circuits as good as the model."""
        return cmd(self.fractions, self.faithfulness)

    @property
    def caution(self) -> str:
        """Why the interval covers less often than it says; empty where there is no reason (see `Ratio.caution`)."""
        return interval_caution(self.runs)

    @checked
    def ci(self, level: float = 0.95) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Studentized bootstrap interval over prompts, low and high ends. A `UserWarning` says why it covers less often than it
        should, where it does (`caution`)."""
        warn_of_interval(self.caution)
        interval = self.runs.ci(level, normalized=True, method="studentized")
        return tuple(interval.low.values.tolist()), tuple(interval.high.values.tolist())

    @property
    def title(self) -> str:
        """Of a picture: which model and task, how many pairs, and whether they were seen."""
        n = len(self.runs.coords["prompt"])
        known = {None: "", 0: ", all held out", n: ", the ones that were scored"}
        seen = known.get(self.n_seen, f", {self.n_seen} of them scored")
        origin = self.runs.provenance
        name = " ".join(dict.fromkeys(str(origin[key]) for key in ("model", "task")))
        return f"{name}: {n} pairs{seen}"

    def __repr__(self) -> str:
        points = ", ".join(f"{n}: {f:.2f}" for n, f in zip(self.n_edges, self.faithfulness, strict=True))
        areas = f"CPR {self.cpr:.3f}, CMD {self.cmd:.3f}; " if len(self.n_edges) > 1 else ""
        return f"FaithfulnessCurve({areas}{points})"


@checked
@one_at_a_time
@torch.no_grad()
def faithfulness_curve(
    scores: EdgeScores | Scorer,
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    *,
    fractions: Sequence[float] = FRACTIONS,
    method: Literal["top", "greedy"] = "top",
    by: Literal["abs", "value"] = "abs",
    ablation: Ablation | Constants = "resample",
    random: int = 3,
    held_out: float = 0.5,
    seed: int = 0,
    budget: int | None = None,
    progress: bool = True,
) -> FaithfulnessCurve:
    """How faithful circuits of the best edges are, by how many edges are kept.

    Args:
        scores: Scores of all edges; or a function such as `edge_attribution` that makes them from `(model, pairs, metric)`. It is
            then given one part of the pairs, and the curve is of the other part (`found_on` has the first one's).
        model, pairs, metric, ablation, budget, progress: As for `evaluate_circuit`.
        fractions: Shares of the graph's edges, ascending; default MIB's grid. In a small graph several may be as many edges: such
            a size is run once, under the largest of these shares.
        method, by: As for `Circuit.from_scores`.
        random: How many random circuits at each size.
        held_out: Share of the pairs that a function of `scores` does not see.
        seed: Of the split and of the random circuits.

    Returns:
        A `FaithfulnessCurve`. Its `held_out` says whether the prompts are others than those of the scores (`None`: not known).

    Raises:
        ValueError: scores of another model; no gap between model and empty circuit; a split that leaves a part empty.
    """
    if isinstance(scores, EdgeScores) or not callable(scores):
        return _curve(scores, model, pairs, metric, fractions, method, by, ablation, random, seed, budget, progress)
    train, test = split(len(pairs), held_out, seed)
    measured = metric_for(metric, pairs)
    parts = [(pairs[ids], metric_of_some(model, pairs, measured, ids)) for ids in (train, test)]
    with torch.enable_grad():
        found = scores(model, *parts[0])
    seen, unseen = (
        _curve(found, model, *part, fractions, method, by, ablation, random, seed, budget, progress) for part in parts
    )
    return FaithfulnessCurve(
        unseen.fractions, unseen.n_edges, unseen.kept, unseen.runs, unseen.random, found, seen, unseen.n_seen
    )


def _curve(
    scores: EdgeScores,
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    fractions: Sequence[float],
    method: Literal["top", "greedy"],
    by: Literal["abs", "value"],
    ablation: Ablation | Constants,
    random: int,
    seed: int,
    budget: int | None,
    progress: bool,
) -> FaithfulnessCurve:
    if not isinstance(scores, EdgeScores):
        raise ValueError(f"scores: expected EdgeScores, or a function that makes them; got {type(scores).__name__}")
    if random < 0:
        raise ValueError(f"random: expected a number of 0 or more, got {random!r}")
    graph, fractions = scores.graph, [float(share) for share in fractions]
    if not fractions or any(not 0 < share <= 1 for share in fractions) or list(fractions) != sorted(set(fractions)):
        raise ValueError(f"fractions: expected ascending shares above 0 and at most 1, got {list(fractions)}")
    shares = {max(1, round(share * graph.n_edges)): share for share in fractions}  # of equal sizes the largest share
    sizes, fractions = list(shares), list(shares.values())
    prune = (
        ablation == "resample"
    )  # with other values a component that nothing feeds may write something else than its own
    circuits = [Circuit.from_scores(scores, n_edges=size, method=method, by=by, prune=prune) for size in sizes]
    circuits[0].check(model)
    evaluator = Evaluator(model, pairs, metric, ablation, budget)
    runs = {str(size): circuit.members for size, circuit in zip(sizes, circuits, strict=True)}
    for i in range(random):
        for size, circuit in zip(sizes, circuits, strict=True):
            runs[f"random {i} {size}"] = Circuit.random(graph, circuit.n_edges, seed + i).members
    result = run_circuits(evaluator, runs, pairs, ablation, "faithfulness_curve", progress)
    constants = ablation.prompts if isinstance(ablation, Constants) else ()
    found_on, _ = seen_prompts(scores.provenance, pairs, constants)
    return FaithfulnessCurve(
        tuple(fractions),
        tuple(sizes),
        tuple(circuit.n_edges for circuit in circuits),
        _reshaped(result, {"n_edges": tuple(sizes)}, 0),
        _reshaped(result, {"seed": tuple(range(seed, seed + random)), "n_edges": tuple(sizes)}, len(sizes))
        if random
        else None,
        scores,
        n_seen=None if found_on is None else len(found_on),
    )


def _reshaped(result: Result, coords: dict[str, tuple[int, ...]], first: int) -> Result:
    """Consecutive runs of a result as axes of their own."""
    shape = [len(labels) for labels in coords.values()]
    n = int(torch.tensor(shape).prod())
    return Result(
        values=result.values[first : first + n].reshape(*shape, -1),
        dims=(*coords, "prompt"),
        coords={**coords, "prompt": result.coords["prompt"]},
        baseline=result.baseline,
        base=result.base,
        metric=result.metric,
        unit=result.unit,
        provenance=result.provenance,
        cost=result.cost,
    )
