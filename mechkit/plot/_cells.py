"""The cells of a result as one list, averaged over prompts, with their effects and intervals: what bars and scatters draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mechkit.plot._labels import check_result
from mechkit.plot._tables import to_numpy
from mechkit.plot._text import spaced
from mechkit.result import Label, Result
from mechkit.result._columns import columns_of


@dataclass(frozen=True)
class Cells:
    """The cells of a result as one list: those that exist, as stored.

    Attributes:
        labels: `L9H6`, as in `Result.top`.
        coords: Of each cell, by the result's dims.
        values: Mean over prompts, `[cell]` in float64.
        effects: Distance from the base run, in the same unit; the values themselves where there is none.
        index: Of each cell among all of the result's, its last dim fastest.
        others: The other baselines, as far from the base run as they are in every cell.
        axis: What the effects are and their unit, for an axis: `change in logit_diff (logits)`.
        zero: What 0 is, if it is a run: `0 = corrupted run`.
        unit: With a space in front; empty for normalized values.
    """

    labels: tuple[str, ...]
    coords: tuple[tuple[Label, ...], ...]
    values: np.ndarray
    effects: np.ndarray
    index: np.ndarray
    others: dict[str, float]
    axis: str
    zero: str
    unit: str


def cells_of(result: Result, *, normalized: bool = False) -> Cells:
    """The cells of a result as one list, averaged over prompts. Those that exist in no prompt are left out.

    Args:
        result: Of any dims.
        normalized: Whether to take `result.mean("prompt").normalized()`.

    Raises:
        ValueError: no dim besides the prompt, no cell that exists, infinite numbers, or nothing to normalize by.
    """
    check_result(result)
    mean = result.mean("prompt") if "prompt" in result.dims else result
    if not mean.dims:
        raise ValueError(f"result: expected a dim besides 'prompt', got {result.dims}; one number needs no picture")
    if bool(mean.values.isinf().any()):
        raise ValueError("result: expected finite values, got an infinite one; choose others with sel()")
    mean = mean.normalized() if normalized else mean
    effects = mean.effect() if mean.baseline else mean
    there = columns_of(effects).present()
    if not len(there):
        raise ValueError(
            f"result: expected a cell that exists, got none among {mean.values.numel()}; choose others with sel()"
        )
    index = there.cells()
    axis, zero = _axis(mean)
    return Cells(
        labels=tuple(there.names()),
        coords=tuple(tuple(coords.values()) for coords in there.coords()),
        values=floats(mean.values)[index],
        effects=floats(effects.values)[index],
        index=index,
        others={name: float(b) for name, b in effects.baseline.items() if name != mean.base and b.numel() == 1},
        axis=axis,
        zero=zero,
        unit=spaced(mean.unit),
    )


def interval_of(shown: Result, level: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Ends of the bootstrap interval of the mean of every cell; `None` for fewer than two prompts."""
    if len(shown.coords.get("prompt", ())) < 2:
        return None
    interval = shown.ci(level)
    return floats(interval.low.values), floats(interval.high.values)


def floats(values: Tensor) -> np.ndarray:
    """All numbers in one row, in float64."""
    return to_numpy(values).ravel()


def _axis(mean: Result) -> tuple[str, str]:
    name, run = f"{mean.metric} ({mean.unit})", f"0 = {mean.base} run"
    if mean.unit == "normalized":
        name = f"{mean.metric}, normalized"
        if mean.base == "corrupted":
            return name, f"{run}, 1 = clean run"
        return f"change in {name}", f"{run}, −1 = corrupted run" if mean.base == "clean" else run
    if mean.baseline and mean.provenance.get("sign") == "magnitude":
        return f"size of the change in {name}", f"{run}; sizes only"
    return (f"change in {name}", run) if mean.baseline else (name, "")
