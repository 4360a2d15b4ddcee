"""Results as columns: what `Figure.table` gives for figures that show whole results."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from mechkit.plot._figure import Table
from mechkit.result import Result


def to_numpy(values: Tensor) -> np.ndarray:
    """Values in float64, on the CPU."""
    return values.numpy(force=True).astype(np.float64)


def table_of(results: Result | Mapping[str, Result]) -> Table:
    """A row for each cell (and prompt): a column a dim, `"value"`, and the baselines `"baseline clean"`, ….

    Args:
        results: One, or several with the same dims and baselines, told apart by a first column `"result"`.
    """
    several = {"": results} if isinstance(results, Result) else dict(results)
    tables = [_one(result) for result in several.values()]
    joined = {column: np.concatenate([table[column] for table in tables]) for column in tables[0]}
    if len(several) == 1:
        return joined
    names = np.concatenate(
        [np.full(len(table["value"]), name, object) for name, table in zip(several, tables, strict=True)]
    )
    return {"result": names, **joined}


def _one(result: Result) -> dict[str, np.ndarray]:
    shape = result.values.shape
    columns: dict[str, np.ndarray] = {}
    for axis, dim in enumerate(result.dims):
        labels = result.coords[dim]
        labels_array = np.array(labels, dtype=np.int64 if all(isinstance(x, int) for x in labels) else object)
        columns[dim] = np.broadcast_to(
            labels_array.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape
        ).ravel()
    columns["value"] = result.values.numpy(force=True).ravel()
    for name, baseline in result.baseline.items():
        cells = baseline.numpy(force=True)
        if baseline.ndim == 1 and "prompt" in result.dims and shape != tuple(baseline.shape):
            axis = result.dims.index("prompt")
            cells = cells.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        columns[f"baseline {name}"] = np.broadcast_to(cells, shape).ravel()
    return columns
