"""Results as columns: what `Figure.table` gives for figures that show whole results."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from mechkit.plot._figure import Table
from mechkit.result import Result
from mechkit.result._columns import columns_of


def to_numpy(values: Tensor) -> np.ndarray:
    """Values in float64, on the CPU."""
    return values.numpy(force=True).astype(np.float64)


def table_of(results: Result | Mapping[str, Result]) -> Table:
    """A row for each cell (and prompt): a column a dim, `"value"`, and the baselines `"baseline clean"`, ….

    Args:
        results: One, or several with the same dims and baselines, distinguished by a first column `"result"`.
    """
    several = {"": results} if isinstance(results, Result) else dict(results)
    tables = [columns_of(result).table() for result in several.values()]
    joined = {column: np.concatenate([table[column] for table in tables]) for column in tables[0]}
    if len(several) == 1:
        return joined
    names = np.concatenate(
        [np.full(len(table["value"]), name, object) for name, table in zip(several, tables, strict=True)]
    )
    return {"result": names, **joined}
