"""Warnings where two runs hardly differ, or the clean run does not do the task; and at which line of the user's they appear."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

LOWER_IS_BETTER = {"kl_divergence", "loss", "in_context_score"}
# Of mechkit's own metrics: the value up to which a run does not do the task, and those of which two runs should differ.
DONE_ABOVE = {"logit_diff": 0.0, "prob_diff": 0.0, "accuracy": 0.5}
DIFFERS = {"logit_diff", "log_prob", "prob_diff", "answer_log_prob"}
SMALL = 0.01  # of the runs' own metric, or of how far a cell is from the corrupted run


class GapWarning(UserWarning):
    """Clean and corrupted run hardly differ, the clean run's metric is below the corrupted one's, or the clean run does not do
    the task."""


def warn_of_gap(clean: Tensor, corrupted: Tensor, values: Tensor, metric: str) -> None:
    """Warns if values of a metric are divided by a gap of about 0, or of the wrong sign.

    Args:
        clean, corrupted: The metric of the two runs: as many axes as `values`, of the same size or 1.
        values: Of the edited runs; NaN where there is none.
        metric: Its name. That lower is better is known of mechkit's own alone.
    """
    clean, corrupted = torch.broadcast_tensors(clean.detach(), corrupted.detach())
    gap, far = clean - corrupted, (values.detach() - corrupted).abs().nan_to_num()
    shared = [axis for axis in range(gap.ndim) if gap.shape[axis] == 1]  # cells that are divided by the same gap
    far = far.amax(shared, keepdim=True) if shared else far
    small = gap.abs() < SMALL * torch.stack([clean.abs(), corrupted.abs(), far]).amax(0)
    below = (gap < 0) & ~small & (metric not in LOWER_IS_BETTER)
    for which, what in (
        (small, "are nearly the same{where}, and dividing by their difference blows every value up"),
        (
            below,
            "are in the wrong order{where}: the clean run is below the corrupted one, so that 1 is worse than 0. Clean and "
            "corrupted prompts, or right and wrong answers, may have changed places, or lower is better for this metric",
        ),
    ):
        if bool(which.any()):
            n, first = int(which.sum()), tuple(which.nonzero()[0].tolist())
            at = "" if gap.numel() == 1 else f" for {n} of {gap.numel()} prompts or cells (the first's are given)"
            warn_user(
                f"normalized: clean and corrupted {metric} {what.format(where=at)}. Clean {float(clean[first]):.4g}, corrupted "
                f"{float(corrupted[first]):.4g}",
                GapWarning,
            )


def warn_of_task(metric: str, values: Mapping[str, Tensor]) -> None:
    """Warns, before the long part of a call, if the clean run does not prefer the right answers, or both runs answer alike.

    Args:
        metric: Its name, of one of mechkit's own: of others it is not known what counts as doing the task.
        values: Of the unedited runs, by name (`"clean"`, `"corrupted"`), `[prompt]` each: of all prompts.
    """
    means = {run: float(value.detach().double().mean()) for run, value in values.items()}
    clean, corrupted = means.get("clean"), means.get("corrupted")
    if clean is None:
        return
    numbers = f"{metric} is {clean:.4g} in the clean run"
    numbers += "" if corrupted is None else f" and {corrupted:.4g} in the corrupted one"
    numbers += f", on average over {len(values['clean'])} prompt{'s' * (len(values['clean']) != 1)}"
    bar = DONE_ABOVE.get(metric)
    if bar is not None and clean <= bar:
        warn_user(
            f"task: the clean run does not do it, so there may be nothing to explain: {numbers} (the task is done above {bar:g})",
            GapWarning,
        )
    elif (
        metric in DIFFERS and corrupted is not None and abs(clean - corrupted) < SMALL * max(abs(clean), abs(corrupted))
    ):
        warn_user(
            f"task: clean and corrupted run answer alike, so there may be nothing to explain: {numbers}", GapWarning
        )


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line that called the outermost of mechkit's frames: frames of other libraries' decorators are between them, so
    that no fixed `stacklevel` would find it."""
    inside, frame, level, outermost = f"{Path(__file__).parent}{os.sep}", sys._getframe(), 1, 1
    while frame.f_back is not None:
        if frame.f_code.co_filename.startswith(inside):
            outermost = level
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=outermost + 1)
