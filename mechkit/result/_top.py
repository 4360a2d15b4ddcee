"""The most extreme cells of a result."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mechkit.result._labels import Label, cell_label

if TYPE_CHECKING:
    from mechkit.result._result import Result


@dataclass(frozen=True)
class TopCell:
    """One cell of `Result.top`: its label (`'L9H6'`), value, effect on the base run, and coordinates."""

    label: str
    value: float
    effect: float
    coords: Mapping[str, Label] = field(hash=False)

    def __repr__(self) -> str:
        return f"TopCell({self.label}: value {self.value:.4g}, effect {self.effect:+.4g})"


def top_cells(result: "Result", k: int, by: str) -> tuple[TopCell, ...]:
    """The cells that `Result.top` describes."""
    if k < 1 or by not in ("abs", "max", "min"):
        raise ValueError(f"top: expected k >= 1 and by in 'abs', 'max', 'min', got k={k!r} and by={by!r}")
    cells = result.mean("prompt") if "prompt" in result.dims else result
    values = cells.values.flatten()
    effects = cells.effect().values.flatten() if cells.baseline else values
    keys = {"abs": effects.abs(), "max": values, "min": -values}[by]
    present = (~keys.isnan()).nonzero().flatten()
    best = present[keys[present].argsort(descending=True, stable=True)][:k].tolist()
    coords = [cells._coords_at(np.unravel_index(i, cells.shape)) for i in best]
    return tuple(
        TopCell(cell_label(c), values[i].item(), effects[i].item(), c) for i, c in zip(best, coords, strict=True)
    )
