"""What all that look at edges are asked, checked: both runs, the metric, and where a writer's change counts."""

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
from mechkit.experiment.positions import choose_positions
from mechkit.hooks import HookedModel
from mechkit.metrics import metric_for
from mechkit.prompts import PromptPairs, Prompts


@torch.inference_mode(False)
def edge_experiment(
    model: HookedModel, pairs: PromptPairs, metric: AnyMetric, direction: str, budget: int | None, **provenance: Any
) -> Experiment:
    """Checks what the user asked for, for all that look at edges. `ValueError`s name the argument."""
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction: expected 'denoise' or 'noise', got {direction!r}")
    if not isinstance(pairs, PromptPairs):
        raise ValueError(f"pairs: expected PromptPairs, whose two runs are compared; got {type(pairs).__name__}")
    runs = ("corrupted", "clean") if direction == "denoise" else ("clean", "corrupted")
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
    if len(experiment.base.by_length()) > 1 and any(isinstance(at, int) and at < 0 for at in positions):
        raise ValueError(
            f"positions: an index from the end is another position in prompts of lengths {sorted(experiment.base.by_length())}; "
            "expected indices from 0, or names"
        )
    return tuple(choose_indices("positions", positions, int(experiment.base.lengths.max())))


def where_it_counts(
    experiment: Experiment,
    positions: Sequence[Any] | None,
    base: Int[Tensor, "prompt pos"],
    source: Int[Tensor, "prompt pos"],
    ids: Int[Tensor, "prompt"] | np.ndarray,
    agree: Bool[Tensor, "prompt"],
) -> Bool[Tensor, "prompt pos"]:
    """At which positions of some prompts (`ids`) a writer's change counts: at the chosen ones (`chosen_positions`), and not
    before base and source differ, where the two runs `agree` as long as the tokens do: not so if a model looks ahead."""
    moved = ~same_so_far(base, source)
    moved = moved | (moved.any(1) & ~agree)[:, None]
    if positions is None:
        return moved
    at, chosen = torch.arange(base.shape[1], device=base.device), torch.zeros_like(moved)
    for position in positions:
        place = experiment.named[position][ids] if isinstance(position, str) else torch.tensor([position])
        chosen |= at == place.reshape(-1, 1).to(at.device)
    return moved & chosen
