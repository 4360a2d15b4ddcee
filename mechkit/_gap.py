"""The gap between clean and corrupted run, by which normalized values are divided: warned about where it is no measure."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

LOWER_IS_BETTER = {"kl_divergence"}
SMALL = 0.01  # of the runs' own metric, or of how far a cell is from the corrupted run


class GapWarning(UserWarning):
    """Clean and corrupted run hardly differ, or the clean run's metric is below the corrupted one's."""


def warn_of_gap(clean: Tensor, corrupted: Tensor, values: Tensor, metric: str, stacklevel: int) -> None:
    """Warns if values of a metric are divided by a gap of about 0, or of the wrong sign.

    Args:
        clean, corrupted: The metric of the two runs: as many axes as `values`, of the same size or 1.
        values: Of the edited runs; NaN where there is none.
        metric: Its name. That lower is better is known of mechkit's own alone.
        stacklevel: Of whom to name, as for `warnings.warn`, counted from the caller.
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
            warnings.warn(
                f"normalized: clean and corrupted {metric} {what.format(where=at)}. Clean {float(clean[first]):.4g}, corrupted "
                f"{float(corrupted[first]):.4g}",
                GapWarning,
                stacklevel=stacklevel + 1,
            )
