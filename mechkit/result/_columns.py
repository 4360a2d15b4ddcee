"""A labelled array as columns of equal length: every table of one is made here, for pandas, Parquet, CSV, figures and reports.

1. A row is a cell. Rows are in the array's order, its last dim changing fastest.
2. A column a dim comes first, in the order of the dims (the prompt is one of them), then the values, then a column a baseline.
3. A dim's labels are int64 if all of them are whole numbers. Otherwise they are objects, each as it is: numpy's own strings would
   make text of whole numbers among them, and lose a NUL at their end.
4. A baseline that is one number, or one a prompt, is repeated in every cell that it holds for. One a prompt beside values that
   are means over prompts is its mean.
5. A cell that does not exist is a row whose value is NaN; `present` leaves these rows out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from mechkit.result._labels import Label, cell_label

if TYPE_CHECKING:
    from mechkit.result._result import Result


@dataclass(frozen=True, eq=False)
class Columns:
    """An array's columns, each made when it is asked for.

    Args:
        dims: Of the values.
        labels: Of each dim, one an index.
        values: `[*dims]`.
        baselines: By name: dims, which are some of the values' or `("prompt",)`, and numbers.
        rows: Which cells are rows, as indices into the flattened array; `None` is all of them.
    """

    dims: tuple[str, ...]
    labels: Mapping[str, Sequence[Label]]
    values: np.ndarray
    baselines: Mapping[str, tuple[tuple[str, ...], np.ndarray]] = field(default_factory=dict)
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return self.values.size if self.rows is None else len(self.rows)

    def present(self) -> "Columns":
        """The rows whose value is a number."""
        return replace(self, rows=np.flatnonzero(~np.isnan(self.values)))

    def cells(self) -> np.ndarray:
        """Which cell each row is, as an index into the flattened array."""
        return np.arange(self.values.size) if self.rows is None else self.rows

    def index(self, dim: str) -> np.ndarray:
        """Which of the dim's labels each row has, int32."""
        axis = self.dims.index(dim)
        along = np.arange(self.values.shape[axis], dtype=np.int32)
        return self._spread(along.reshape([-1 if i == axis else 1 for i in range(self.values.ndim)]))

    def label(self, dim: str) -> np.ndarray:
        """A dim's column."""
        return label_array(self.labels[dim])[self.index(dim)]

    def value(self) -> np.ndarray:
        """The column of values: a copy, in their type."""
        return self._spread(self.values)

    def baseline(self, name: str) -> np.ndarray:
        """A baseline's column, in its type."""
        dims, numbers = self.baselines[name]
        if not set(dims) <= set(self.dims):
            return self._spread(numbers.mean())
        sizes = zip(self.dims, self.values.shape, strict=True)
        return self._spread(numbers.reshape([size if dim in dims else 1 for dim, size in sizes]))

    def table(self) -> dict[str, np.ndarray]:
        """All columns: the dims, `"value"`, `"baseline clean"`, …."""
        labels = {dim: self.label(dim) for dim in self.dims}
        return {**labels, "value": self.value(), **{f"baseline {name}": self.baseline(name) for name in self.baselines}}

    def coords(self) -> list[dict[str, Label]]:
        """Each row's labels by dim."""
        columns = [[self.labels[dim][i] for i in self.index(dim)] for dim in self.dims]
        return [dict(zip(self.dims, row, strict=True)) for row in zip(*columns, strict=True)]

    def names(self) -> list[str]:
        """What each row's cell is called: `'L9H6'`."""
        return [cell_label(coords) for coords in self.coords()]

    def _spread(self, numbers: np.ndarray) -> np.ndarray:
        whole = np.broadcast_to(numbers, self.values.shape)
        return whole.flatten() if self.rows is None else whole.ravel()[self.rows]


def columns_of(result: "Result") -> Columns:
    """The columns of a result, its numbers on the CPU."""
    baselines = {name: (result._baseline_dims(b), b.numpy(force=True)) for name, b in result.baseline.items()}
    return Columns(result.dims, result.coords, result.values.numpy(force=True), baselines)


def are_whole(labels: Sequence[Label]) -> bool:
    """Whether a dim's labels are all whole numbers."""
    return all(isinstance(label, int) for label in labels)


def label_array(labels: Sequence[Label]) -> np.ndarray:
    """Labels as int64 or, if one is text, as objects."""
    return np.array(labels, dtype=np.int64 if are_whole(labels) else object)
