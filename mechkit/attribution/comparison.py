"""How far to trust an approximation here: compares it with exact patching, and replaces its strongest cells.

`compare` takes two results for the same cells, `verify` computes the exact value of the strongest cells of an approximation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mechkit._check import checked
from mechkit._drawn import Drawn
from mechkit.engine import sweep
from mechkit.experiment.axes import make_grid
from mechkit.experiment.estimates import ESTIMATES
from mechkit.experiment.patches import Patches
from mechkit.experiment.positions import position_labels
from mechkit.hooks import HookedModel, one_at_a_time
from mechkit.metrics import AnyMetric, metric_for
from mechkit.prompts import PromptPairs
from mechkit.result import Cost, Label, Result

_SAME = ("weights_hash", "tokens_hash", "site", "direction")
_LEAST = 0.01  # cells with an effect below this share of the largest have no sign to agree on


@dataclass(frozen=True)
class WorstCell:
    """A cell where approximation and exact effect are far apart."""

    label: str
    approx: float
    exact: float
    coords: Mapping[str, Label] = field(hash=False)

    def __repr__(self) -> str:
        return f"WorstCell({self.label}: approx {self.approx:+.4g}, exact {self.exact:+.4g})"


@dataclass(frozen=True)
class Comparison(Drawn):
    """How an approximation's effects, averaged over prompts, agree with the exact ones.

    Attributes:
        pearson: Correlation of the effects; NaN if either does not vary.
        spearman: Correlation of their ranks.
        slope: By how much to multiply the approximate effects to come closest to the exact ones (least squares, through 0).
        sign_agreement: Share of the cells whose sign is right, among those with an exact effect of at least 1 % of the largest;
            NaN for magnitudes, which have no sign.
        recall: Share of the k strongest exact cells that are among the approximation's k strongest.
        k: That k.
        max_error: Largest absolute difference, in the metric's unit.
        relative_error: Root mean square difference as a share of the root mean square exact effect.
        n_cells: How many cells were compared.
        worst: The cells that differ most.
        magnitude: Whether sizes were compared, because the approximation has no signs.
        approx, exact: The numbers themselves: mean effects (for magnitudes mean sizes) with the approximation's dims and labels,
            without the prompt; NaN in cells that were not compared.
    """

    pearson: float
    spearman: float
    slope: float
    sign_agreement: float
    recall: float
    k: int
    max_error: float
    relative_error: float
    n_cells: int
    worst: tuple[WorstCell, ...]
    magnitude: bool
    approx: Result = field(repr=False, compare=False)
    exact: Result = field(repr=False, compare=False)

    def __str__(self) -> str:
        sign = "sizes only" if self.magnitude else f"sign right in {self.sign_agreement:.0%}"
        return (
            f"{self.n_cells} cells: Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f}, {sign}, "
            f"top-{self.k} recall {self.recall:.0%}, largest error {self.max_error:.3g}; worst: "
            + ", ".join(f"{cell.label} ({cell.approx:+.3g} for {cell.exact:+.3g})" for cell in self.worst[:3])
        )


@checked
def compare(approx: Result, exact: Result, *, k: int = 10) -> Comparison:
    """Holds an approximation (`attribution_patching`, `relp`, …) against `activation_patching` of the same cells.

    Args:
        approx: The approximation.
        exact: The exact result for the same model, prompts, site and direction; its cells may be in another order, and it may
            have more cells.
        k: How many of the strongest cells must be found, and how many of the worst are named.

    Returns:
        A `Comparison` of effects averaged over prompts. Select one prompt first (`sel(prompt=[3])`) to compare on it alone.

    Raises:
        ValueError: the two are of different models, prompts, sites, directions, metrics or cells.
    """
    if k < 1:
        raise ValueError(f"k: expected 1 or more, got {k}")
    for name in _SAME:
        if approx.provenance.get(name) != exact.provenance.get(name):
            raise ValueError(
                f"exact: expected a result with the approximation's {name}, {approx.provenance.get(name)!r}; got "
                f"{exact.provenance.get(name)!r}"
            )
    for name in ("metric", "unit", "base"):
        if getattr(approx, name) != getattr(exact, name):
            raise ValueError(f"exact: expected {name} {getattr(approx, name)!r}, got {getattr(exact, name)!r}")
    if set(approx.dims) != set(exact.dims):
        raise ValueError(f"exact: expected dims {approx.dims}, got {exact.dims}")
    n_prompts = [result.provenance.get("n_prompts") for result in (approx, exact)]
    if "prompt" not in approx.dims and n_prompts[0] != n_prompts[1]:
        raise ValueError(f"exact: expected a mean over the same {n_prompts[0]} prompts, got one over {n_prompts[1]}")
    for run in approx.baseline:
        _check_baseline(approx.baseline[run], exact.baseline.get(run), run, approx.values.dtype)
    if (
        approx.provenance.get("sign") == "magnitude"
        and "prompt" not in approx.dims
        and approx.provenance.get("n_prompts") != 1
    ):
        raise ValueError(
            "approx: magnitudes are compared prompt by prompt, with the size of each exact effect; expected results with their "
            "'prompt' dim, got averages"
        )
    lacking = {dim: [x for x in labels if x not in exact.coords[dim]] for dim, labels in approx.coords.items()}
    if missing := {dim: labels for dim, labels in lacking.items() if labels}:
        raise ValueError(f"exact: expected all cells of the approximation, but it lacks {missing}")
    exact = exact.sel(**{dim: list(labels) for dim, labels in approx.coords.items()})
    mean_approx, mean_exact = (r.mean("prompt") if "prompt" in r.dims else r for r in (approx, exact))
    found = mean_approx.effect().values
    truth = mean_exact.effect().values.permute([mean_exact.dims.index(dim) for dim in mean_approx.dims])
    magnitude = approx.provenance.get("sign") == "magnitude"
    if magnitude:  # the mean size over prompts, not the size of the mean
        sizes = exact.effect().values.abs()
        sizes = sizes.nanmean(exact.dims.index("prompt")) if "prompt" in exact.dims else sizes
        truth = sizes.permute([mean_exact.dims.index(dim) for dim in mean_approx.dims])
    there = ~(found.isnan() | truth.isnan())
    if not bool(there.any()):
        raise ValueError("exact: expected a cell that exists in both results, got none: prompts lack these positions")
    x, y = found[there].double(), truth[there].double()
    k = min(k, len(x))
    best = [set(v.abs().argsort(descending=True, stable=True)[:k].tolist()) for v in (x, y)]
    order = (x - y).abs().argsort(descending=True, stable=True)[:k].tolist()
    cells = there.nonzero().tolist()
    worst = tuple(_worst(mean_approx, cells[i], float(x[i]), float(y[i])) for i in order)
    size = y.pow(2).mean().sqrt().clamp(min=1e-30)
    return Comparison(
        pearson=_correlation(x, y),
        spearman=_correlation(_ranks(x), _ranks(y)),
        slope=slope_of(x, y),
        sign_agreement=math.nan if magnitude else signs_agree(x, y),
        recall=len(best[0] & best[1]) / k,
        k=k,
        max_error=float((x - y).abs().max()),
        relative_error=float((x - y).pow(2).mean().sqrt() / size),
        n_cells=len(x),
        worst=worst,
        magnitude=magnitude,
        approx=_effects(mean_approx, found, there, approx),
        exact=_effects(mean_approx, truth, there, exact),
    )


@checked
@one_at_a_time
def verify(
    approx: Result,
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    *,
    top: int = 10,
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """Runs the exact engine on an approximation's strongest cells, and returns it with these cells corrected.

    Args:
        approx: From `attribution_patching`, `integrated_gradients`, `atp_star` or `relp`, with its `"prompt"` dim.
        model, pairs, metric: Those that it was made with.
        top: How many cells, by the size of their effect averaged over prompts.
        budget, progress: As for `activation_patching`.

    Returns:
        The approximation, dims `(*over, "prompt")`, with exact values in those cells. Provenance: `verified`, their labels,
        strongest first, and `verified_error`, the largest error that they had, averaged over prompts. Where the approximation
        has magnitudes only, so have they.

    Raises:
        ValueError: the approximation is of another model, other prompts or another metric, or has no cells to verify.
    """
    metric = metric_for(metric, pairs)
    base, source = (pairs.clean, pairs.corrupted) if approx.base == "clean" else (pairs.corrupted, pairs.clean)
    origin = approx.provenance
    if origin.get("technique") not in ESTIMATES:
        raise ValueError(
            f"approx: expected a result whose technique is one of {', '.join(map(repr, ESTIMATES))}; got "
            f"{origin.get('technique')!r}"
        )
    expected = {"weights_hash": model.weights_hash, "tokens_hash": pairs.clean.hash()}
    for name, value in expected.items():
        if origin.get(name) != value:
            raise ValueError(
                f"approx: expected a result with {name} {value!r}, as given here; got {origin.get(name)!r}"
            )
    if approx.metric != metric.name or approx.dims[-1] != "prompt":
        raise ValueError(
            f"approx: expected values of {metric.name!r} with the prompt as their last dim, got {approx.metric!r} and "
            f"{approx.dims}"
        )
    over, named = str(origin["over"]), pairs.positions
    if "patch" in over.split():
        over, named = over.replace("patch", "position"), Patches.of(pairs.clean).named()
    grid = make_grid(
        model,
        pairs.clean,
        named,
        str(origin["site"]),
        over,
        **_restrictions(approx, pairs.clean),
    )
    best = approx.top(top)
    shape = approx.shape[:-1]
    labels = [{dim: i for i, dim in enumerate(approx.coords[name])} for name in approx.dims[:-1]]
    index = [[where[cell.coords[dim]] for where, dim in zip(labels, approx.dims[:-1], strict=True)] for cell in best]
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    flat = [sum(i * stride for i, stride in zip(at, strides, strict=True)) for at in index]
    runs = (approx.base, "corrupted" if approx.base == "clean" else "clean")
    answers = sweep(
        model,
        base,
        [grid.cells[i] for i in flat],
        metric,
        source=source,
        base_is=runs[0],
        source_is=runs[1],
        budget=budget,
        progress=progress,
    )
    _check_baseline(approx.baseline[runs[0]], answers.base, runs[0], approx.values.dtype)
    _check_baseline(approx.baseline[runs[1]], answers.source, runs[1], approx.values.dtype)
    exact = answers.values.to(approx.values)
    if origin.get("sign") == "magnitude":
        exact = answers.base + (exact - answers.base).abs()
    values = approx.values.flatten(0, -2).clone()
    error = (values[flat] - exact).nanmean(1).abs().max()
    values[flat] = exact
    cost = approx.cost or Cost(0, 0)
    return replace(
        approx,
        values=values.reshape(approx.shape),
        provenance={**origin, "verified": [cell.label for cell in best], "verified_error": float(error)},
        cost=Cost(cost.block_tokens + answers.cost.block_tokens, cost.naive_block_tokens),
    )


def _check_baseline(approx: Tensor, exact: Tensor | None, run: str, dtype: torch.dtype) -> None:
    """The unedited runs have the same metric: else the other prompts of the pairs, or their answers, are not the same."""
    tolerance = 1e-6 if dtype == torch.float64 else 2e-3
    if (
        exact is None
        or approx.shape != exact.shape
        or not torch.allclose(approx, exact.to(approx), rtol=tolerance, atol=tolerance, equal_nan=True)
    ):
        raise ValueError(
            f"exact: the unedited {run} run has another metric than the approximation's, so that its pairs or their "
            "answers are not the same (or the metric is not); make both from the same pairs and metric"
        )


def _restrictions(approx: Result, prompts: Any) -> dict[str, Any]:
    """The arguments that make a grid of exactly the approximation's cells, in its order."""
    chosen: dict[str, Any] = {}
    arguments = {"layer": "layers", "head": "heads", "neuron": "neurons", "position": "positions", "patch": "positions"}
    for dim, argument in arguments.items():
        if dim in approx.coords:
            chosen[argument] = approx.coords[dim]
    if "pos" in approx.coords:
        every = position_labels(prompts, range(int(prompts.lengths.max())))
        chosen["positions"] = [every.index(label) for label in approx.coords["pos"]]
    return chosen


def _effects(cells: Result, effects: Tensor, there: Tensor, origin: Result) -> Result:
    """Effects of the compared `cells` as a result: their base run is at 0."""
    base = {name: effects.new_zeros(()) for name in (cells.base,) if name}
    provenance = {**origin.provenance, **{k: v for k, v in cells.provenance.items() if k == "n_prompts"}}
    values = effects.masked_fill(~there.to(effects.device), torch.nan)
    return replace(cells, values=values, baseline=base, provenance=provenance, cost=origin.cost)


def _worst(result: Result, index: list[int], approx: float, exact: float) -> WorstCell:
    at = {dim: result.coords[dim][i] for dim, i in zip(result.dims, index, strict=True)}
    label = result.sel(**{dim: [value] for dim, value in at.items()}).top(1)[0].label
    return WorstCell(label, approx, exact, at)


def slope_of(x: Tensor, y: Tensor) -> float:
    """By how much to multiply x to come closest to y (least squares, through 0); NaN if x is 0 everywhere."""
    return float((x * y).sum() / x.pow(2).sum()) if bool((x != 0).any()) else math.nan


def signs_agree(x: Tensor, y: Tensor) -> float:
    """Share of the values of y that have x's sign, among those with at least 1 % of the size of the largest."""
    strong = y.abs() >= _LEAST * y.abs().max()
    return float((x.sign() == y.sign())[strong].double().mean())


def _correlation(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = x.norm() * y.norm()
    return float((x * y).sum() / size) if float(size) > 0 else math.nan


def _ranks(x: Tensor) -> Tensor:
    """Ranks, ties sharing their mean."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]
