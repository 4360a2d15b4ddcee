"""Find a circuit: estimate all edges, verify the best exactly, keep what holds, and judge it on prompts that it has not seen.

1. Split the pairs. On one part, score all edges by `edge_attribution` (EAP-IG): seconds.
2. Measure the best of them by `edge_patching`: what an estimate overrates falls out here.
3. Build the circuit from the measured effects, from the logits upstream (`Circuit.from_scores(method="greedy")`), without dead
   ends; if a threshold is given, thin it out by `acdc`, starting from it.
4. Evaluate it on all pairs; the report tells the two parts apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mechkit._check import checked
from mechkit._drawn import Drawn
from mechkit.circuits._evaluation import Ablation, Constants
from mechkit.circuits.acdc import acdc
from mechkit.circuits.circuit import Circuit
from mechkit.circuits.edge_attribution import edge_attribution
from mechkit.circuits.edge_patching import edge_patching
from mechkit.circuits.edge_scores import EdgeScores, completeness_warning
from mechkit.circuits.evaluation import CircuitReport, evaluate_circuit, split
from mechkit.engine import check_metric, metric_of_some
from mechkit.hooks import HookedModel, one_at_a_time
from mechkit.metrics import AnyMetric, metric_for
from mechkit.prompts import PromptPairs


@dataclass(frozen=True, eq=False)
class FoundCircuit(Drawn):
    """A circuit and how it was found.

    Attributes:
        circuit: The circuit.
        estimates: Scores of all edges.
        verified: The exact effects of the candidates; NaN elsewhere.
        report: How good the circuit is; `report.held_out` is over the pairs that it was not found on.
    """

    circuit: Circuit
    estimates: EdgeScores
    verified: EdgeScores
    report: CircuitReport

    def __repr__(self) -> str:
        error = completeness_warning(self.estimates.provenance)
        agreement = f"estimates against exact effects: r = {self.agreement:.3f}"
        return f"FoundCircuit({self.report!r}; {agreement}{f', {error}' if error else ''})"

    @property
    def agreement(self) -> float:
        """Pearson correlation of estimates and exact effects over the candidates."""
        return self.estimates.correlation(self.verified)


@checked
@one_at_a_time
def find_circuit(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    *,
    n_edges: int,
    candidates: int | None = None,
    steps: int = 5,
    by: Literal["abs", "value"] = "abs",
    threshold: float | None = None,
    ablation: Ablation | Constants = "resample",
    held_out: float = 0.5,
    seed: int = 0,
    random: int = 100,
    budget: int | None = None,
    progress: bool = True,
) -> FoundCircuit:
    """Finds a circuit of at most `n_edges` edges.

    Args:
        model, pairs: As for `activation_patching`; at least 4 pairs.
        metric: As there. A callable's value for a prompt must depend on that prompt's logits alone, since parts are run.
        n_edges: How many edges to choose; pruning may leave fewer.
        candidates: How many of the best estimates to verify exactly; default four times `n_edges`.
        steps: Of the estimates' path.
        by: What is best: the largest effect (`"abs"`), or the largest that supports the metric (`"value"`).
        threshold: Thin the circuit out: `acdc` from it, by the metric, with this threshold.
        ablation, random, budget, progress: As for `evaluate_circuit`. Scores are always of resampled values.
        held_out: Share of the pairs that the circuit is not found on.
        seed: Of the split and of the random circuits.

    Raises:
        ValueError: what `edge_attribution`, `edge_patching` and `evaluate_circuit` refuse; a split that leaves a part empty.
    """
    if isinstance(n_edges, bool) or not hasattr(n_edges, "__index__") or n_edges < 1:
        raise ValueError(f"n_edges: expected a whole number of 1 or more, got {n_edges!r}")
    if not isinstance(pairs, PromptPairs):
        raise ValueError(f"pairs: expected PromptPairs, whose two runs are compared; got {type(pairs).__name__}")
    metric = metric_for(metric, pairs)
    check_metric(model, pairs.clean, metric, ("clean", "corrupted"))
    train, _ = split(len(pairs), held_out, seed)
    seen, measured = pairs[train], metric_of_some(model, pairs, metric, train)
    estimates = edge_attribution(
        model, seen, measured, steps=steps, direction="noise", budget=budget, progress=progress
    )
    n_candidates = 4 * n_edges if candidates is None else candidates
    if not n_edges <= n_candidates:
        raise ValueError(f"candidates: expected at least n_edges = {n_edges}, got {candidates!r}")
    signed: Literal["max", "min"] = "max" if estimates.orientation > 0 else "min"
    best = estimates.top(min(n_candidates, estimates.graph.n_edges), by="abs" if by == "abs" else signed)
    verified = edge_patching(model, seen, measured, best, direction="noise", budget=budget, progress=progress)
    prune = (
        ablation == "resample"
    )  # with other values a component that nothing feeds may write something else than its own
    circuit = Circuit.from_scores(verified, n_edges=min(n_edges, len(best)), method="greedy", by=by, prune=prune)
    if threshold is not None:
        circuit = acdc(
            model,
            seen,
            measured,
            threshold=threshold,
            start=circuit,
            ablation=ablation,
            budget=budget,
            progress=progress,
        )
    report = evaluate_circuit(
        circuit, model, pairs, metric, ablation=ablation, random=random, seed=seed, budget=budget, progress=progress
    )
    return FoundCircuit(circuit, estimates, verified, report)
