"""The checked arguments of techniques on edges: both runs, the metric, and where a writer's change counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechkit.engine import Budget
from mechkit.engine._causality import same_so_far
from mechkit.experiment.axes import choose_indices
from mechkit.experiment.estimates import AnyMetric, Experiment, check_experiment
from mechkit.experiment.positions import base_and_source, choose_positions, places_of, refuse_indices_from_end
from mechkit.hooks import HookedModel
from mechkit.metrics import metric_for
from mechkit.prompts import PromptPairs, Prompts, Stacked


@torch.inference_mode(False)
def edge_experiment(
    model: HookedModel, pairs: PromptPairs, metric: AnyMetric, direction: str, budget: int | None, **provenance: Any
) -> Experiment:
    """Checks what the user asked for, for all that look at edges. `ValueError`s name the argument."""
    runs = base_and_source(pairs, direction)
    base, source = (getattr(pairs, run) for run in runs)
    metric = metric_for(metric, pairs)
    check_experiment(model, metric, {runs[0]: base, runs[1]: source})
    provenance = {"task": pairs.task, "direction": direction, **provenance}
    room = Budget.of(model, budget)
    room.bytes //= 2  # half for the runs, half for readers' gradients and writers' changes
    return Experiment(model, base, source, *runs, pairs.positions, metric, {}, room, provenance)


def both_runs(experiment: Experiment) -> tuple[Prompts, Prompts]:
    """The clean and the corrupted prompts."""
    assert experiment.source is not None
    return (
        (experiment.base, experiment.source) if experiment.base_is == "clean" else (experiment.source, experiment.base)
    )


def chosen_positions(experiment: Experiment, positions: Sequence[Any] | None) -> tuple[Any, ...] | None:
    """The positions where a writer's change counts: names, or indices from 0; `None` is everywhere."""
    if positions is None:
        return None
    if isinstance(positions, str) or any(isinstance(at, str) for at in positions):
        return tuple(choose_positions(experiment.named, positions))
    refuse_indices_from_end(positions, experiment.base, "names")
    return tuple(choose_indices("positions", positions, int(experiment.base.lengths.max())))


def where_it_counts(
    experiment: Experiment,
    positions: Sequence[Any] | None,
    base: Stacked,
    source: Stacked,
    ids: Int[Tensor, "prompt"] | np.ndarray,
    agree: Bool[Tensor, "prompt"],
) -> Bool[Tensor, "prompt pos"]:
    """At which positions of some prompts (`ids`) a writer's change counts: at the chosen ones (`chosen_positions`), and not
    before base and source differ, where the two runs `agree` as long as the tokens do: not so if a model looks ahead."""
    moved = ~same_so_far(base, source)
    moved = moved | (moved.any(1) & ~agree)[:, None]
    if positions is None:
        return moved
    places = places_of(experiment.base.lengths, experiment.named, positions)[:, ids].to(moved.device)
    chosen = (torch.arange(moved.shape[1], device=moved.device) == places[..., None]).any(0)
    return moved & chosen
