"""A labelled, immutable result: one number per cell and prompt, what it is compared with, and where it came from.

1. A technique fills a `Result`: the metric of every edited run, with one axis per dim and one label per index.
2. `baseline` holds the metric of the unedited runs, so that `effect` and `normalized` need nothing else.
3. The prompt axis is kept to the end. `mean`, `ci` and `p_values` are the three ways to get rid of it.

A cell that does not exist (a position that a shorter prompt lacks) is NaN and is left out of every average. The
baselines are then averaged over the same prompts as the cell, so that no cell is compared with prompts it is not in.

References: percentile bootstrap, Efron and Tibshirani (1993), chapter 13; sign-flip permutation test, Good (2005),
section 3.2; false-discovery control, Benjamini and Hochberg (1995).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechkit._check import checked, plain
from mechkit._drawn import Drawn
from mechkit._thumbnails import PromptPictures
from mechkit._warnings import warn_of_gap
from mechkit.result._checks import as_float, as_json, as_labels, check_axes, check_finite
from mechkit.result._cost import Cost
from mechkit.result._export import as_numpy, dataarray, dataframe, read, write
from mechkit.result._inference import bootstrap_bounds, check_prompts, p_values
from mechkit.result._labels import Label, cell_label, find, in_order
from mechkit.result._top import TopCell, top_cells

if TYPE_CHECKING:
    import pandas
    import xarray


@dataclass(frozen=True, eq=False)
class Interval:
    """A bootstrap interval: `low` and `high` have the dims of the result without `'prompt'`, and no baselines."""

    low: "Result"
    high: "Result"
    level: float


@checked
@dataclass(frozen=True, eq=False)
class Result(Drawn):
    """Values with labelled axes, the baselines that they are compared with, and their provenance.

    Args:
        values: one axis per dim, float32 or float64 (half precision is widened). NaN marks a cell that does not exist.
        dims: names of the axes, such as `('layer', 'head', 'prompt')`.
        coords: for every dim, one distinct label (int or str) per index.
        baseline: metric of the unedited runs, by the run's name (`'clean'`, `'corrupted'`). Each is `[prompt]`, or a
            scalar that holds for all cells, or has the shape of `values` (see `mean`). Empty for results that are
            compared with nothing, such as head scores.
        base: the baseline that the edits were made to; `''` if there is none.
        metric: name of the metric, such as `'logit_diff'`.
        unit: unit of the values, such as `'logits'`.
        provenance: JSON values: model, revision, technique, arguments, ...
        cost: what the result took to compute.
        pictures: small copies of the prompts' pictures and which positions show which part of them, for figures alone; one entry
            a prompt, or a single one without a dim `'prompt'`. `None` for text.

    Raises:
        ValueError: if these do not fit together.

    Example:
        >>> import torch
        >>> result = Result(torch.eye(2), ("layer", "head"), {"layer": (0, 1), "head": (0, 1)},
        ...                 {"clean": torch.tensor(0.25)}, "clean", "logit_diff", "logits", {})
        >>> result.top(1)
        (TopCell(L0H0: value 1, effect +0.75),)
    """

    values: Float[Tensor, "..."]
    dims: tuple[str, ...]
    coords: Mapping[str, tuple[Label, ...]]
    baseline: Mapping[str, Tensor]
    base: str
    metric: str
    unit: str
    provenance: Mapping[str, Any]
    cost: Cost | None = None
    pictures: PromptPictures | None = None

    def __post_init__(self) -> None:
        values = as_float(self.values, "values")
        normalised = {
            "values": values,
            "dims": tuple(self.dims),
            "coords": MappingProxyType({dim: as_labels(labels, dim) for dim, labels in self.coords.items()}),
            "baseline": MappingProxyType({k: as_float(b, k).to(values.device) for k, b in self.baseline.items()}),
            "provenance": MappingProxyType(as_json(self.provenance)),
        }
        for name, value in normalised.items():
            object.__setattr__(self, name, value)
        check_axes(self.shape, self.dims, self.coords)
        self._check_baselines()
        n = len(self.coords["prompt"]) if "prompt" in self.dims else 1
        if self.pictures is not None and len(self.pictures) != n:
            raise ValueError(f"pictures: expected those of {n} prompts, got those of {len(self.pictures)}")

    def _check_baselines(self) -> None:
        if self.base not in (self.baseline or ("",)):
            raise ValueError(f"base: expected one of {tuple(self.baseline) or ('',)}, got {self.base!r}")
        for name in self.baseline:
            if (self._cells(name).isnan() & ~self.values.isnan()).any():
                raise ValueError(f"baseline {name!r}: expected a number wherever values has one, got NaN")

    def __reduce__(self) -> tuple[Any, ...]:  # a mappingproxy can be neither pickled (by Ray) nor deep-copied
        parts = (getattr(self, f.name) for f in fields(self))
        return Result, tuple(dict(part) if isinstance(part, MappingProxyType) else part for part in parts)

    def __repr__(self) -> str:
        sizes = " x ".join(f"{dim} {size}" for dim, size in zip(self.dims, self.shape, strict=True))
        what = f"{self.metric} [{self.unit}]" if self.dims else f"{self.metric} {self.values.item():.4g} [{self.unit}]"
        baselines = [
            f"{name} {baseline.nanmean().item():.4g}{' (base)' if name == self.base else ''}"
            for name, baseline in self.baseline.items()
        ]
        cost = [str(self.cost)] if self.cost else []
        return f"Result({'; '.join([what, sizes or 'scalar', *baselines, *cost])})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of every dim."""
        return tuple(self.values.shape)

    def item(self) -> float:
        """The number of a result that has one, such as `result.mean("prompt").sel(layer=9, head=6)`; `float(result)` is the same.

        Raises:
            ValueError: there are several values, or none.
        """
        if self.values.numel() != 1:
            sizes = " x ".join(f"{dim} {size}" for dim, size in zip(self.dims, self.shape, strict=True))
            raise ValueError(
                f"item: expected a result with one value, got {self.values.numel():,} ({sizes}); choose one with sel(), or "
                "average with mean()"
            )
        return self.values.item()

    def __float__(self) -> float:
        return self.item()

    @checked
    def numpy(self, dims: str | Sequence[str] | None = None) -> np.ndarray:
        """The values as a numpy array, its axes in an order that is asked for by name.

        Args:
            dims: The names of all dims in the wanted order, such as `"prompt layer d_model"`. Default: that of `self.dims`.

        Returns:
            A copy `[*dims]`, float32 or float64; NaN where a cell does not exist.

        Raises:
            ValueError: `dims` does not name each dim of the result once.

        Example:
            >>> states = mk.hidden_states(model, prompts).numpy("prompt layer d_model")
        """
        order = range(len(self.dims)) if dims is None else in_order(self.dims, dims)
        return as_numpy(self.values.permute(*order)) if self.dims else as_numpy(self.values)

    @checked
    def mean(self, dim: str = "prompt") -> "Result":
        """Average over one dim, leaving out cells that do not exist.

        Over `'prompt'` the baselines are averaged too, to scalars. If some cells exist in some prompts only, each
        baseline gets the shape of the values: for every cell, the mean over the prompts that have it. So effects and
        normalized values always compare the same prompts.

        Args:
            dim: the dim that goes.

        Returns:
            A result without `dim`; NaN where none of the averaged cells existed.

        Raises:
            ValueError: if there is no such dim, or a number is infinite.
        """
        self._check_dim(dim, "dim")
        check_finite({"values": self.values, **self.baseline})
        axis, absent = self.dims.index(dim), self.values.isnan()
        ragged = bool((absent.any(axis) & ~absent.all(axis)).any())

        def average(name: str) -> Tensor:
            dims = self._baseline_dims(self.baseline[name])
            if dim not in dims:
                return self.baseline[name]
            if len(dims) == 1 and not ragged:
                return self.baseline[name].nanmean()
            return self._cells(name).expand(self.shape).masked_fill(absent, torch.nan).nanmean(axis)

        baseline = {name: average(name) for name in self.baseline}
        return self._without(dim, self.shape[axis], values=self.values.nanmean(axis), baseline=baseline)

    def effect(self) -> "Result":
        """How far each cell is from the unedited base run: `value - baseline[base]`, in the metric's unit.

        Returns:
            A result with the same dims, its baselines shifted by as much: that of the base run is 0.

        Raises:
            ValueError: if there is no baseline, or a number is infinite.
        """
        base = self._cells(self.base)
        check_finite({"values": self.values, **self.baseline})
        shifted = {name: self._compact(self._cells(name) - base) for name in self.baseline}
        return replace(self, values=self.values - base, baseline=shifted)

    def normalized(self) -> "Result":
        """`(value - corrupted) / (clean - corrupted)`: 0 is the corrupted run, 1 the clean run.

        With a prompt dim this is one ratio per prompt, which blows up for a prompt whose two runs are nearly alike.
        Prefer `result.mean("prompt").normalized()`: the ratio of the means.

        Warns with a `GapWarning` where the two runs hardly differ (by less than a hundredth of their metric, or of what one
        cell moves), and where the clean run is below the corrupted one (but for the KL divergence, of which less is better).

        Returns:
            A result with the same dims, baselines 0 and 1, and unit `'normalized'`.

        Raises:
            ValueError: if a baseline is missing, a number is infinite, or clean and corrupted are equal to rounding.
        """
        clean, corrupted = self._cells("clean"), self._cells("corrupted")
        check_finite({"values": self.values, **self.baseline})
        gap = clean - corrupted
        tiny = gap.abs() <= 100 * torch.finfo(gap.dtype).eps * (clean.abs() + corrupted.abs())
        if tiny.any():
            raise ValueError(
                f"normalized: expected clean and corrupted baselines that differ, got equal ones{self._where(tiny)}; "
                "leave these out with sel(), or average over prompts first"
            )
        warn_of_gap(clean, corrupted, self.values, self.metric)
        scaled = {name: self._compact((self._cells(name) - corrupted) / gap) for name in self.baseline}
        return replace(self, values=(self.values - corrupted) / gap, baseline=scaled, unit="normalized")

    @checked
    def top(self, k: int = 10, by: Literal["abs", "max", "min"] = "abs") -> tuple[TopCell, ...]:
        """The k most extreme cells, averaged over prompts first; cells that do not exist never appear.

        Args:
            k: how many, at most.
            by: `'abs'` largest distance from the base run (from 0 if there are no baselines), `'max'` largest
                value, `'min'` smallest value.

        Raises:
            ValueError: if `k` is not positive, `by` is something else, or a number is infinite.
        """
        return top_cells(self, k, by)

    @checked
    def sel(self, **labels: Label | list[Label] | tuple[Label, ...] | slice) -> "Result":
        """Select by label. One label drops its dim; a list, a tuple or a slice keeps it.

        Slices include both ends, as in pandas and xarray: `result.sel(layer=slice(3, 5), head=0)`.

        Raises:
            ValueError: if there is no such dim or label; the message names those that exist.
        """
        result = self
        for dim, wanted in labels.items():
            result = result._sel(dim, wanted)
        return result

    def _sel(self, dim: str, wanted: Any) -> "Result":
        self._check_dim(dim, "sel")
        wanted = plain(wanted)
        many = isinstance(wanted, (list, tuple, slice, range, set, frozenset))
        indices = find(self.coords[dim], list(wanted) if many and not isinstance(wanted, slice) else wanted, dim)

        def take(tensor: Tensor, dims: tuple[str, ...]) -> Tensor:
            if dim not in dims:
                return tensor
            index = torch.tensor(indices, dtype=torch.long, device=tensor.device)
            taken = tensor.index_select(dims.index(dim), index)
            return taken if many else taken.squeeze(dims.index(dim))

        values = take(self.values, self.dims)
        baseline = {name: take(b, self._baseline_dims(b)) for name, b in self.baseline.items()}
        pictures = self.pictures if dim != "prompt" or self.pictures is None else self.pictures.chosen(indices)
        if not many:
            return self._without(dim, 1, values=values, baseline=baseline, pictures=pictures)
        coords = {**self.coords, dim: tuple(self.coords[dim][i] for i in indices)}
        provenance = self._counting(dim, len(indices))
        return replace(self, values=values, coords=coords, baseline=baseline, provenance=provenance, pictures=pictures)

    @checked
    def ci(
        self,
        level: float = 0.95,
        *,
        n_resamples: int = 1000,
        seed: int = 0,
        method: Literal["percentile", "basic", "studentized"] = "percentile",
        normalized: bool = False,
    ) -> Interval:
        """Bootstrap interval of the mean over prompts.

        Whole prompts are resampled, the same ones for all cells. For the interval of the effect, which is narrower
        because base and edited run are paired, use `result.effect().ci()`.

        Args:
            level: probability that the interval should cover.
            n_resamples: how many sets of prompts are drawn.
            seed: of the draw; the same seed gives the same interval.
            method: `'percentile'`; `'basic'` (the percentile interval reflected about the mean); or `'studentized'` (each
                resample in units of its own standard error), which is wider and covers more often where prompts are few
                or a few of them carry the mean. None covers as often as `level` below some 30 prompts, or where the mean
                hangs on rare prompts (`benchmarks/truth/intervals.py`).
            normalized: give the interval of `mean("prompt").normalized()` instead: a ratio of means.

        Returns:
            An `Interval`; NaN for cells that exist in fewer than two prompts.

        Raises:
            ValueError: if there are fewer than two prompts, an argument is out of range, or (normalized) the gap
                between clean and corrupted changes its sign too often among the resamples.
        """
        check_prompts(self, "ci")
        numerator, denominator, unit = self.values, torch.ones_like(self.values), self.unit
        if normalized:
            self.mean("prompt").normalized()  # refuses missing baselines and gaps of 0
            corrupted, unit = self._cells("corrupted"), "normalized"
            numerator, denominator = self.values - corrupted, self._cells("clean") - corrupted
        bounds = bootstrap_bounds(self, numerator, denominator, level, n_resamples, seed, method)
        low, high = (self._statistic(bound, unit) for bound in bounds)
        return Interval(low, high, level)

    @checked
    def p_values(self, n_resamples: int = 9999, *, seed: int = 0, fdr: bool = True) -> "Result":
        """Two-sided sign-flip permutation test, for each cell, that prompts' effects are symmetric about 0.

        The null hypothesis is that each prompt's effect is as likely as its opposite. That is "the mean effect is 0" for
        symmetric effects alone: of skewed effects whose mean is 0, 6 to 14 % have p < .05 (`benchmarks/truth/intervals.py`).
        Exact (all sign flips) when there are no more than `n_resamples + 1` of them, at random otherwise. With n
        prompts no p-value is below 2 / 2^n. Without baselines the values themselves are tested against 0. A small
        effect that is the same in every prompt is significant: look at `ci` for its size.

        Args:
            n_resamples: how many random sign flips.
            seed: of the flips.
            fdr: adjust for the number of cells by Benjamini and Hochberg's procedure.

        Returns:
            A result without `'prompt'` and without baselines, unit `'p'`; NaN where a cell does not exist.

        Raises:
            ValueError: if there are fewer than two prompts, `n_resamples < 1` or more than memory holds, or a number is infinite.
        """
        return self._statistic(p_values(self, n_resamples, seed, fdr), "p")

    @checked
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file that `load` reads back bit for bit; an existing file is replaced in one step."""
        return write(self, path)

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str]) -> "Result":
        """Read what `save` wrote, onto the CPU.

        Raises:
            ValueError: if the file is something else, or was written by a newer mechkit.
        """
        return read(cls, path)

    def to_dataframe(self) -> "pandas.DataFrame":
        """Tidy long form: one row per cell and prompt (NaN ones too), a column per dim, and `'value'`."""
        return dataframe(self)

    def to_xarray(self) -> "xarray.DataArray":
        """A `DataArray` named after the metric, with coords, `baseline_<name>` coords, and provenance as attrs.

        Attributes that are neither a number nor a string are JSON, so that netCDF takes them.
        """
        return dataarray(self)

    def _baseline_dims(self, baseline: Tensor) -> tuple[str, ...]:
        """A baseline's dims are read off its shape: none, the prompt, or those of the values."""
        n_prompts = len(self.coords["prompt"]) if "prompt" in self.dims else None
        if baseline.ndim == 0:
            return ()
        if baseline.shape == (n_prompts,):
            return ("prompt",)
        if baseline.shape == self.values.shape:
            return self.dims
        raise ValueError(
            f"baseline: expected shape () or {self.shape}{f' or [{n_prompts}]' if n_prompts else ''}, "
            f"got {tuple(baseline.shape)}"
        )

    def _cells(self, name: str) -> Tensor:
        """The baseline of every cell, as a tensor that broadcasts against `values`."""
        if name not in self.baseline:
            raise ValueError(f"expected a baseline {name or 'run'!r}, got baselines {tuple(self.baseline)}")
        dims = self._baseline_dims(self.baseline[name])
        sizes = [size if dim in dims else 1 for dim, size in zip(self.dims, self.shape, strict=True)]
        return self.baseline[name].reshape(sizes)

    def _compact(self, cells: Tensor) -> Tensor:
        """The inverse of `_cells`: the smallest of the shapes that a baseline may have."""
        varying = {dim for dim, size in zip(self.dims, cells.shape, strict=True) if size > 1}
        if not varying:
            return cells.reshape([1] if "prompt" in self.dims and self.shape[self.dims.index("prompt")] == 1 else [])
        return cells.flatten() if varying == {"prompt"} else cells.expand(self.shape)

    def _check_dim(self, dim: str, where: str) -> None:
        if dim not in self.dims:
            raise ValueError(f"{where}: expected one of the dims {self.dims}, got {dim!r}")

    def _counting(self, dim: str, size: int) -> Mapping[str, Any]:
        return {**self.provenance, "n_prompts": size} if dim == "prompt" else self.provenance

    def _without(self, dim: str, size: int, **changes: Any) -> "Result":
        """This result with `dim` gone, of which `size` labels went into each value."""
        dims = tuple(other for other in self.dims if other != dim)
        coords = {other: self.coords[other] for other in dims}
        if dim == "prompt" and self.pictures is not None:
            changes = {"pictures": self.pictures.one, **changes}
        return replace(self, dims=dims, coords=coords, provenance=self._counting(dim, size), **changes)

    def _statistic(self, numbers: np.ndarray, unit: str) -> "Result":
        shape = [size for dim, size in zip(self.dims, self.shape, strict=True) if dim != "prompt"]
        values = torch.as_tensor(numbers.reshape(shape), dtype=self.values.dtype, device=self.values.device)
        size = len(self.coords["prompt"])
        return self._without("prompt", size, values=values, baseline={}, base="", unit=unit)

    def _coords_at(self, index: Sequence[Any]) -> dict[str, Label]:
        return {dim: self.coords[dim][i] for dim, i in zip(self.dims, index, strict=True)}

    def _where(self, mask: Tensor) -> str:
        """Names the places where a mask, which broadcasts against the values, is true."""
        varying = [dim for dim, size in zip(self.dims, mask.shape, strict=True) if size > 1]
        labels = [cell_label({d: self._coords_at(i)[d] for d in varying}) for i in mask.nonzero().tolist()]
        return f" at {', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}" if varying else ""
