"""Is a circuit any good? Run it with everything else ablated; compare it with the model, with its parts missing, and with chance.

Notation: m is the metric's mean over prompts; M the model, C the circuit, ∅ the empty circuit (everything ablated).

- *Faithfulness* `F(C) = (m(C) - m(∅)) / (m(M) - m(∅))`: 1 as good as the model, 0 as bad as nothing. Above 1 it is better than
  the model, which a faithful circuit is not either.
- *Completeness*: for sets K of the circuit's components, `F(C without K) - F(M without K)`: 0 if the model has nothing besides
  the circuit that steps in for K. To be without a component is to have all edges out of it ablated.
- *Minimality*: for each component (or edge) v, `F(C without v) - F(C)`: 0 if v does nothing in the circuit.
- *Random circuits* of as many edges: a faithfulness that they reach too means little. The circuit's rank is a p-value.
- *Held out*: prompts that the circuit was not found on. Where its provenance says on which it was, the two are reported apart.

Wang et al. 2022, https://arxiv.org/abs/2211.00593 (faithfulness in the metric's unit, completeness, minimality); Miller et al.
2024, https://arxiv.org/abs/2407.08734 (what such numbers depend on); Mueller et al. 2025 (MIB), https://arxiv.org/abs/2504.13151.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechkit._check import checked
from mechkit._drawn import Drawn
from mechkit._progress import Progress
from mechkit._statistics import caution
from mechkit._warnings import warn_user
from mechkit.circuits._evaluation import Ablation, Constants, Evaluator, provenance_of_ablation
from mechkit.circuits.circuit import Circuit
from mechkit.experiment.estimates import AnyMetric
from mechkit.experiment.provenance import circuit_provenance, merged, prompt_hashes
from mechkit.hooks import HookedModel, one_at_a_time
from mechkit.prompts import PromptPairs
from mechkit.result import Cost, Result

if TYPE_CHECKING:
    import pandas

_AT_ONCE = 64  # circuits whose masks are held together
ROUNDING = 100  # units in the last place of the metric's largest value, by which two runs of one circuit may differ


@dataclass(frozen=True)
class Ratio:
    """A faithfulness: a ratio of means over prompts.

    Attributes:
        value: The ratio.
        low, high: 95 % interval over prompts, by a studentized bootstrap (percentiles below 5 prompts); NaN where there are too
            few prompts, or the gap between model and empty circuit changes its sign among the resamples.
        n_prompts: How many prompts it is of.
        caution: Why the interval covers less often than 95 %: fewer than 30 prompts, or a few that carry most of the deviations
            (usual for losses, such as log probabilities and divergences). Empty where neither is so.
            `benchmarks/truth/intervals.py` has how often.
    """

    value: float
    low: float
    high: float
    n_prompts: int
    caution: str = ""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def warn(self) -> None:
        """Warns (`UserWarning`) if there is reason for caution."""
        warn_of_interval(self.caution)


def warn_of_interval(caution: str) -> None:
    """Warns that an interval covers too seldom, if there is a reason."""
    if caution:
        warn_user(f"faithfulness: the 95 % interval covers less often than that: {caution}")


@dataclass(frozen=True)
class Completeness:
    """What is left without a set of components.

    Attributes:
        without: Their names.
        circuit: Faithfulness of the circuit without them.
        model: Faithfulness of the whole model without them.
    """

    without: tuple[str, ...]
    circuit: float
    model: float

    @property
    def difference(self) -> float:
        """Circuit less model; 0 where the circuit is complete."""
        return self.circuit - self.model


@dataclass(frozen=True, eq=False)
class CircuitReport(Drawn):
    """How good a circuit is.

    Attributes:
        circuit: The circuit.
        runs: The metric of every run that was made, dims `("run", "prompt")`: `"circuit"`, `"random 0"`, …, `"without a9.h6"`, ….
            Its baselines: `"clean"`, the model, and `"corrupted"`, the empty circuit (in which everything is ablated).
        faithfulness: Over all prompts.
        found_on, held_out: Over the prompts that the circuit was found on, and over the others; `None` where there are none.
        random: Faithfulness of random circuits of as many edges; `random_p` is the circuit's rank among them.
        n_distinct: How many of the random circuits are different ones: of a few edges there are not many circuits.
        completeness: Of the whole circuit's component sets, by how far they are from complete.
        minimality: Name of a component (or edge) -> by how much faithfulness changes without it, the largest change first.
        cost: Block-tokens; one of a circuit's counts up to twice a plain block's work.
    """

    circuit: Circuit
    runs: Result
    faithfulness: Ratio
    found_on: Ratio | None
    held_out: Ratio | None
    random: tuple[float, ...]
    completeness: tuple[Completeness, ...]
    minimality: Mapping[str, float]
    cost: Cost = field(default_factory=lambda: Cost(0, 0))
    n_distinct: int = 0

    @property
    def gap(self) -> float:
        """`m(M) - m(C)`, in the metric's unit (the IOI paper's faithfulness is its absolute value)."""
        circuit = self.runs.sel(run="circuit")
        return float((circuit.baseline["clean"] - circuit.values).double().mean())

    @property
    def random_p(self) -> float:
        """How likely a random circuit of as many edges is as near to the model: the share, the circuit itself included, whose
        faithfulness is at most as far from 1, rounding aside. With n random circuits it is never below 1 / (n + 1); NaN if none
        was run."""
        if not self.random:
            return float("nan")
        off = abs(1 - self.faithfulness.value) + self._rounding
        return (1 + sum(abs(1 - one) <= off for one in self.random)) / (1 + len(self.random))

    @property
    def _rounding(self) -> float:
        """How far two runs of one circuit, in batches of other sizes, may be apart in faithfulness."""
        clean, empty = (float(self.runs.baseline[name].double().mean()) for name in ("clean", "corrupted"))
        size = max(abs(clean), abs(empty), float(self.runs.values.double().abs().max()))
        return ROUNDING * torch.finfo(self.runs.values.dtype).eps * size / abs(clean - empty)

    @property
    def incompleteness(self) -> float:
        """The mean absolute difference over the sets; NaN if none was tried."""
        return float(torch.tensor([abs(c.difference) for c in self.completeness], dtype=torch.float64).mean())

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a run: its name, mean metric and faithfulness."""
        frame = self.runs.mean("prompt").to_dataframe().rename(columns={"value": self.runs.metric})
        frame["faithfulness"] = self.runs.mean("prompt").normalized().values.tolist()
        return frame

    def __repr__(self) -> str:
        lines = [f"CircuitReport({self.circuit.n_edges:,} of {self.circuit.graph.n_edges:,} edges"]
        lines.append(f"faithfulness {self.faithfulness}, {self.gap:+.3f} {self.runs.unit} short of the model")
        if self.faithfulness.caution:
            lines.append(f"the interval covers less often than 95 %: {self.faithfulness.caution}")
        for name, ratio in (("prompts it was found on", self.found_on), ("held-out prompts", self.held_out)):
            if ratio is not None:
                lines.append(f"{name}: {ratio}, n = {ratio.n_prompts}")
        if self.random:
            spread = f"{min(self.random):.3f} to {max(self.random):.3f}"
            few = f" ({self.n_distinct} different ones)" if 0 < self.n_distinct < len(self.random) else ""
            lines.append(f"{len(self.random)} random circuits{few}: {spread}, p = {self.random_p:.2g}")
        if self.completeness:
            lines.append(f"incompleteness {self.incompleteness:.3f} over {len(self.completeness)} sets")
        if self.minimality:
            idle = sum(abs(change) < 0.01 for change in self.minimality.values())
            lines.append(f"minimality: {idle} of {len(self.minimality)} can go for less than 0.01 each")
        return "; ".join(lines) + ")"


@checked
@one_at_a_time
@torch.no_grad()
def evaluate_circuit(
    circuit: Circuit,
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    *,
    ablation: Ablation | Constants = "resample",
    random: int = 100,
    sets: int = 10,
    minimality: Literal["node", "edge"] | None = "node",
    seed: int = 0,
    budget: int | None = None,
    progress: bool = True,
) -> CircuitReport:
    """Runs the circuit with everything else ablated, and says how much of the model's behaviour is left.

    Args:
        circuit: Of this model.
        model, pairs: As for `activation_patching`.
        metric: As there; `kl_divergence(pairs)` works too (faithfulness is then the share of the divergence that is gone).
        ablation: What a reader sees of a writer without an edge: `"resample"` (the corrupted run's value), `"zero"`, `"mean"`
            (over all corrupted prompts and positions), `"position_mean"` (at each position, over those that are long enough), or
            `Constants`, such as `optimal_ablation` gives.
        random: How many random circuits of as many edges are run too: the circuit's rank among them is a p-value.
        sets: How many random sets of the circuit's components are left out for completeness.
        minimality: Leave out each component (`"node"`), each edge, or nothing.
        seed: Of the random circuits and sets.
        budget: Bytes of working memory; default half of what the device has free (1 GiB on a CPU).
        progress: Whether to show a progress bar.

    Returns:
        A `CircuitReport`. A `UserWarning` says why the faithfulness's interval covers less often than 95 %, where it does (see
        `Ratio.caution`).

    Raises:
        ValueError: a circuit of another model; model and empty circuit have the same metric (there is nothing to be faithful to);
            an architecture whose edges are not known.
    """
    if not isinstance(circuit, Circuit):
        raise ValueError(
            f"circuit: expected a Circuit, got {type(circuit).__name__}; Circuit.from_edges(model, edges) makes one of names"
        )
    circuit.check(model)
    if minimality not in ("node", "edge", None):
        raise ValueError(f"minimality: expected 'node', 'edge' or None, got {minimality!r}")
    if any(not hasattr(n, "__index__") or isinstance(n, bool) or n < 0 for n in (random, sets)):
        raise ValueError(f"random, sets: expected whole numbers of 0 or more, got {random!r} and {sets!r}")
    evaluator = Evaluator(model, pairs, metric, ablation, budget)
    graph, generator = evaluator.graph, torch.Generator().manual_seed(seed)
    others = {f"random {i}": Circuit.random(graph, circuit.n_edges, seed + i).members for i in range(random)}
    runs: dict[str, Bool[Tensor, "writer reader"]] = {"circuit": circuit.members, **others}
    left_out = _component_sets(circuit, sets, generator)
    for i, names in enumerate(left_out):
        runs[f"circuit without set {i}"] = _without(circuit.members, circuit, names)
        runs[f"model without set {i}"] = _without(graph.exists, circuit, names)
    parts: dict[str, str] = {}  # what is left out -> its run
    if minimality == "node":
        parts = {writer.name: f"without {writer.name}" for writer in circuit.nodes if writer.layer >= 0}
        runs |= {run: _without(circuit.members, circuit, (name,)) for name, run in parts.items()}
    elif minimality == "edge":
        parts = {edge.name: f"without {edge.name}" for edge in circuit}
        runs |= {f"without {edge.name}": circuit.without(edge).members for edge in circuit}
    result = run_circuits(evaluator, runs, pairs, ablation, "evaluate_circuit", progress)
    faithful = dict(zip(runs, result.mean("prompt").normalized().values.double().tolist(), strict=True))
    # A random circuit may be the circuit: its number differs by what another batch rounds otherwise.
    faithful |= {name: faithful["circuit"] for name, one in others.items() if torch.equal(one, circuit.members)}
    constants = ablation.prompts if isinstance(ablation, Constants) else ()
    found_on, held_out = seen_prompts(circuit.provenance, pairs, constants)
    alone = result.sel(run=["circuit"])
    changes = {name: faithful[run] - faithful["circuit"] for name, run in parts.items()}
    complete = [
        Completeness(names, faithful[f"circuit without set {i}"], faithful[f"model without set {i}"])
        for i, names in enumerate(left_out)
    ]
    whole = ratio(alone)
    whole.warn()
    return CircuitReport(
        circuit,
        result,
        faithfulness=whole,
        found_on=ratio(alone.sel(prompt=found_on)) if found_on else None,
        held_out=ratio(alone.sel(prompt=held_out)) if held_out and found_on is not None else None,
        random=tuple(faithful[f"random {i}"] for i in range(random)),
        completeness=tuple(sorted(complete, key=lambda c: -abs(c.difference))),
        minimality=dict(sorted(changes.items(), key=lambda item: -abs(item[1]))),
        cost=result.cost or Cost(0, 0),
        n_distinct=len({one.numpy(force=True).tobytes() for one in others.values()}),
    )


def run_circuits(
    evaluator: Evaluator,
    runs: Mapping[str, Bool[Tensor, "writer reader"] | Float[Tensor, "writer reader"]],
    pairs: PromptPairs,
    ablation: Ablation | Constants,
    technique: str,
    progress: bool,
) -> Result:
    """The metric of every circuit, dims `("run", "prompt")`; baselines: the model (`"clean"`) and the empty circuit."""
    model, names = evaluator.model, list(runs)
    values = []
    with Progress(len(names), "circuit", progress) as bar:
        for first in range(0, len(names), _AT_ONCE):
            some = names[first : first + _AT_ONCE]
            values.append(evaluator.evaluate(torch.stack([runs[name] for name in some])))
            bar.update(len(some))
    clean, nothing = (evaluator.values[run].double().mean() for run in ("clean", "ablated"))
    if float((clean - nothing).abs()) <= 100 * torch.finfo(evaluator.values["clean"].dtype).eps * float(
        clean.abs() + nothing.abs()
    ):
        raise ValueError(
            f"metric: model and empty circuit have the same mean {evaluator.metric.name} ({float(clean):.4g}), so that there is "
            "nothing to be faithful to: give pairs whose runs differ, or another ablation"
        )
    naive = len(names) * int(pairs.clean.lengths.sum()) * model.n_layers
    return Result(
        values=torch.cat(values),
        dims=("run", "prompt"),
        coords={"run": tuple(names), "prompt": tuple(range(len(pairs)))},
        baseline={"clean": evaluator.values["clean"], "corrupted": evaluator.values["ablated"]},
        base="corrupted",
        metric=evaluator.metric.name,
        unit=evaluator.metric.unit,
        provenance=circuit_provenance(
            model,
            pairs.clean,
            pairs.corrupted,
            technique=technique,
            task=pairs.task,
            ablation=provenance_of_ablation(ablation),
        ),
        cost=Cost(evaluator.block_tokens, naive),
    )


def ratio(run: Result) -> Ratio:
    """Faithfulness of one run with its interval."""
    value = float(run.mean("prompt").normalized().values.double().sum())
    n = len(run.coords["prompt"])
    why = interval_caution(run)
    try:
        interval = run.ci(normalized=True, method="studentized")
    except ValueError:  # one prompt, or a gap that changes its sign among the resamples
        return Ratio(value, float("nan"), float("nan"), n, why)
    return Ratio(value, float(interval.low.values.sum()), float(interval.high.values.sum()), n, why)


def interval_caution(runs: Result) -> str:
    """Why the intervals of runs' faithfulness cover too seldom; of several runs the first with a reason of its own."""
    clean, empty = (runs.baseline[name].double().cpu().numpy() for name in ("clean", "corrupted"))
    found = [
        caution(values - empty, clean - empty) for values in runs.values.double().cpu().reshape(-1, len(clean)).numpy()
    ]
    return max(found, key=len)


def _component_sets(circuit: Circuit, n: int, generator: torch.Generator) -> list[tuple[str, ...]]:
    """Random sets of a circuit's components: each is in with a probability that is itself drawn, so that sizes vary."""
    names = [writer.name for writer in circuit.nodes if writer.layer >= 0]
    found = []
    for _ in range(n if names else 0):
        chance = torch.rand(1, generator=generator)
        chosen = (torch.rand(len(names), generator=generator) < chance).tolist()
        some = tuple(name for name, is_in in zip(names, chosen, strict=True) if is_in)
        found.append(some or (names[int(torch.randint(len(names), (1,), generator=generator))],))
    return found


def _without(members: Bool[Tensor, "writer reader"], circuit: Circuit, names: Sequence[str]) -> Tensor:
    """All edges out of some components removed."""
    members = members.clone()
    members[[circuit.graph.writer_index[name] for name in names]] = False
    return members


def seen_prompts(
    provenance: Mapping[str, Any], pairs: PromptPairs, constants: Sequence[str] = ()
) -> tuple[list[int | str] | None, list[int | str]]:
    """Which of the pairs a circuit (or the constants that it is run with) was found on, and which not; `None`: not known.

    A pair was seen if its clean prompt was, as a clean or as a corrupted one: different pairs may share a corrupted prompt."""
    known = merged(provenance.get("prompts"), constants)
    if known is None:
        return None, []
    seen = [prompt in known for prompt in prompt_hashes(pairs.clean)]
    return [i for i, one in enumerate(seen) if one], [i for i, one in enumerate(seen) if not one]


def split(n: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Which prompts something is found on, and which are held out, at random."""
    if not isinstance(held_out, int | float) or not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share above 0 and below 1, got {held_out!r}")
    n_out = round(n * held_out)
    if not 0 < n_out < n:
        raise ValueError(f"held_out: {held_out} of {n} pairs leaves one part empty; give more pairs, or another share")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[n_out:]), sorted(order[:n_out])
