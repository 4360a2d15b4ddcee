"""A labelled, immutable result: one number per cell and prompt, what it is compared with, and where it came from.

1. A technique fills a `Result`: the metric of every edited run, with one axis per dim and one label per index.
2. `baseline` holds the metric of the unedited runs, so that `effect` and `normalized` need nothing else.
3. The prompt axis is kept to the end. `mean`, `ci` and `p_values` are the three ways to get rid of it.

A cell that does not exist (a position that a shorter prompt lacks) is NaN and is left out of every average. The
baselines are then averaged over the same prompts as the cell, so that no cell is compared with prompts it is not in.

References: percentile bootstrap, Efron and Tibshirani (1993), chapter 13; sign-flip permutation test, Good (2005),
section 3.2; false-discovery control, Benjamini and Hochberg (1995).
"""

import json
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechkit._check import checked, plain
from mechkit._drawn import Drawn
from mechkit._files import decoding, read_tensors, write_tensors
from mechkit._gap import warn_of_gap
from mechkit._statistics import bootstrap, sign_flip_test

if TYPE_CHECKING:
    import pandas
    import xarray

Label = int | str
_SCHEMA_VERSION = 1
_DRAWS = 2**29  # prompts that are drawn in all resamples together, at most: 4 GiB of counts
_PREFIXES = {"layer": "L", "head": "H", "neuron": "N"}


@checked
@dataclass(frozen=True)
class Cost:
    """The arithmetic behind a result, counted and not timed.

    Args:
        block_tokens: (block, token) pairs that were computed, base runs included.
        naive_block_tokens: what one full forward per cell would have computed.
        proof_block_tokens: how many of `block_tokens` went into checking the replay against whole forward passes.
    """

    block_tokens: int
    naive_block_tokens: int
    proof_block_tokens: int = 0

    @property
    def speedup(self) -> float:
        """How many times fewer block-tokens than one full forward per cell."""
        return self.naive_block_tokens / self.block_tokens if self.block_tokens else float("inf")

    def __str__(self) -> str:
        return f"{self.block_tokens:,} of {self.naive_block_tokens:,} block-tokens ({self.speedup:.1f}x fewer)"


@dataclass(frozen=True)
class TopCell:
    """One cell of `Result.top`: its label (`'L9H6'`), value, effect on the base run, and coordinates."""

    label: str
    value: float
    effect: float
    coords: Mapping[str, Label] = field(hash=False)

    def __repr__(self) -> str:
        return f"TopCell({self.label}: value {self.value:.4g}, effect {self.effect:+.4g})"


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

    Raises:
        ValueError: if these do not fit together.

    Example:
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

    def __post_init__(self) -> None:
        values = _as_float(self.values, "values")
        normalised = {
            "values": values,
            "dims": tuple(self.dims),
            "coords": MappingProxyType({dim: _as_labels(labels, dim) for dim, labels in self.coords.items()}),
            "baseline": MappingProxyType({k: _as_float(b, k).to(values.device) for k, b in self.baseline.items()}),
            "provenance": MappingProxyType(_as_json(self.provenance)),
        }
        for name, value in normalised.items():
            object.__setattr__(self, name, value)
        self._check_axes()
        self._check_baselines()

    def _check_axes(self) -> None:
        if len(self.dims) != self.values.ndim:
            raise ValueError(f"dims: expected one per axis of values {self.shape}, got {self.dims}")
        if len(set(self.dims)) != len(self.dims) or "value" in self.dims:
            raise ValueError(f"dims: expected distinct names, none of them 'value', got {self.dims}")
        if set(self.coords) != set(self.dims):
            raise ValueError(f"coords: expected labels for exactly the dims {self.dims}, got {tuple(self.coords)}")
        for dim, size in zip(self.dims, self.shape, strict=True):
            labels = self.coords[dim]
            if len(labels) != size:
                raise ValueError(f"coords[{dim!r}]: expected {size} labels, the size of that axis, got {len(labels)}")
            if len(set(labels)) != size:
                repeated = sorted({str(label) for label in labels if labels.count(label) > 1})
                raise ValueError(f"coords[{dim!r}]: expected distinct labels, got repeated ones: {repeated}")

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
        baselines = [
            f"{name} {baseline.nanmean().item():.4g}{' (base)' if name == self.base else ''}"
            for name, baseline in self.baseline.items()
        ]
        cost = [str(self.cost)] if self.cost else []
        return f"Result({'; '.join([f'{self.metric} [{self.unit}]', sizes or 'scalar', *baselines, *cost])})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of every dim."""
        return tuple(self.values.shape)

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
        self._check_finite()
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
        self._check_finite()
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
        self._check_finite()
        gap = clean - corrupted
        tiny = gap.abs() <= 100 * torch.finfo(gap.dtype).eps * (clean.abs() + corrupted.abs())
        if tiny.any():
            raise ValueError(
                f"normalized: expected clean and corrupted baselines that differ, got equal ones{self._where(tiny)}; "
                "leave these out with sel(), or average over prompts first"
            )
        warn_of_gap(clean, corrupted, self.values, self.metric, stacklevel=2)
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
        if k < 1 or by not in ("abs", "max", "min"):
            raise ValueError(f"top: expected k >= 1 and by in 'abs', 'max', 'min', got k={k!r} and by={by!r}")
        cells = self.mean("prompt") if "prompt" in self.dims else self
        values = cells.values.flatten()
        effects = cells.effect().values.flatten() if cells.baseline else values
        keys = {"abs": effects.abs(), "max": values, "min": -values}[by]
        present = (~keys.isnan()).nonzero().flatten()
        best = present[keys[present].argsort(descending=True, stable=True)][:k].tolist()
        coords = [cells._coords_at(np.unravel_index(i, cells.shape)) for i in best]
        return tuple(
            TopCell(_cell_label(c), values[i].item(), effects[i].item(), c) for i, c in zip(best, coords, strict=True)
        )

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
        indices = _find(self.coords[dim], list(wanted) if many and not isinstance(wanted, slice) else wanted, dim)

        def take(tensor: Tensor, dims: tuple[str, ...]) -> Tensor:
            if dim not in dims:
                return tensor
            index = torch.tensor(indices, dtype=torch.long, device=tensor.device)
            taken = tensor.index_select(dims.index(dim), index)
            return taken if many else taken.squeeze(dims.index(dim))

        values = take(self.values, self.dims)
        baseline = {name: take(b, self._baseline_dims(b)) for name, b in self.baseline.items()}
        if not many:
            return self._without(dim, 1, values=values, baseline=baseline)
        coords = {**self.coords, dim: tuple(self.coords[dim][i] for i in indices)}
        provenance = self._counting(dim, len(indices))
        return replace(self, values=values, coords=coords, baseline=baseline, provenance=provenance)

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
                hangs on rare prompts (`benchmarks/coverage.py`).
            normalized: give the interval of `mean("prompt").normalized()` instead: a ratio of means.

        Returns:
            An `Interval`; NaN for cells that exist in fewer than two prompts.

        Raises:
            ValueError: if there are fewer than two prompts, an argument is out of range, or (normalized) the gap
                between clean and corrupted changes its sign too often among the resamples.
        """
        self._check_prompts("ci")
        if not 0 < level < 1 or n_resamples < 1 or method not in ("percentile", "basic", "studentized"):
            raise ValueError(
                "ci: expected 0 < level < 1, n_resamples >= 1 and method 'percentile', 'basic' or 'studentized', "
                f"got {level!r}, {n_resamples!r} and {method!r}"
            )
        self._check_draws(n_resamples)
        numerator, denominator, unit = self.values, torch.ones_like(self.values), self.unit
        if normalized:
            self.mean("prompt").normalized()  # refuses missing baselines and gaps of 0
            corrupted, unit = self._cells("corrupted"), "normalized"
            numerator, denominator = self.values - corrupted, self._cells("clean") - corrupted
        quantiles = ((1 - level) / 2, (1 + level) / 2)
        n_prompts = len(self.coords["prompt"])
        draws = np.random.default_rng(seed).multinomial(n_prompts, [1 / n_prompts] * n_prompts, size=n_resamples)
        bounds = bootstrap(self._by_prompt(numerator), self._by_prompt(denominator), draws, quantiles, method)
        low, high = (self._statistic(bound, unit) for bound in bounds)
        return Interval(low, high, level)

    @checked
    def p_values(self, n_resamples: int = 9999, *, seed: int = 0, fdr: bool = True) -> "Result":
        """Two-sided sign-flip permutation test, for each cell, that prompts' effects are symmetric about 0.

        The null hypothesis is that each prompt's effect is as likely as its opposite. That is "the mean effect is 0" for
        symmetric effects alone: of skewed effects whose mean is 0, 6 to 14 % have p < .05 (`benchmarks/coverage.py`).
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
        from scipy.stats import false_discovery_control

        self._check_prompts("p_values")
        if n_resamples < 1:
            raise ValueError(f"p_values: expected n_resamples >= 1, got {n_resamples!r}")
        self._check_draws(min(n_resamples, 2 ** len(self.coords["prompt"])))
        effects = self._by_prompt(self.effect().values if self.baseline else self.values)
        p = sign_flip_test(effects, n_resamples, np.random.default_rng(seed))
        present = ~np.isnan(p)
        if fdr and present.any():
            p[present] = false_discovery_control(p[present])
        return self._statistic(p, "p")

    @checked
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file that `load` reads back bit for bit; an existing file is replaced in one step."""
        tensors = {"values": self.values, **{f"baseline.{name}": b for name, b in self.baseline.items()}}
        header = {
            "schema_version": _SCHEMA_VERSION,
            "coords": [[dim, self.coords[dim]] for dim in self.dims],
            "baselines": list(self.baseline),
            **{name: getattr(self, name) for name in ("base", "metric", "unit")},
            "provenance": dict(self.provenance),
            "cost": asdict(self.cost) if self.cost else None,
        }
        return write_tensors(path, tensors, "mechkit_result", header)

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str]) -> "Result":
        """Read what `save` wrote, onto the CPU.

        Raises:
            ValueError: if the file is something else, or was written by a newer mechkit.
        """
        tensors, header = read_tensors(path, "mechkit_result", writer="Result.save")
        if header.get("schema_version") != _SCHEMA_VERSION:
            raise ValueError(
                f"{path}: expected schema version {_SCHEMA_VERSION}, got {header.get('schema_version')!r}: "
                "read it with the mechkit that wrote it"
            )
        with decoding(path, "a file written by Result.save"):
            return cls(
                values=tensors["values"],
                dims=tuple(dim for dim, _ in header["coords"]),
                coords={dim: tuple(labels) for dim, labels in header["coords"]},
                baseline={name: tensors[f"baseline.{name}"] for name in header["baselines"]},
                **{name: header[name] for name in ("base", "metric", "unit", "provenance")},
                cost=Cost(**header["cost"]) if header["cost"] else None,
            )

    def to_dataframe(self) -> "pandas.DataFrame":
        """Tidy long form: one row per cell and prompt (NaN ones too), a column per dim, and `'value'`."""
        import pandas as pd

        columns = {
            dim: _label_array(self.coords[dim])[index.ravel()]
            for dim, index in zip(self.dims, np.indices(self.shape), strict=True)
        }
        return pd.DataFrame({**columns, "value": _numpy(self.values).ravel()})

    def to_xarray(self) -> "xarray.DataArray":
        """A `DataArray` named after the metric, with coords, `baseline_<name>` coords, and provenance as attrs.

        Attributes that are neither a number nor a string are JSON, so that netCDF takes them.
        """
        import xarray as xr

        coords: dict[str, Any] = {dim: _label_array(labels) for dim, labels in self.coords.items()}
        for name, baseline in self.baseline.items():
            coords[f"baseline_{name}"] = (self._baseline_dims(baseline), _numpy(baseline))
        attrs = {key: x if type(x) in (int, float, str) else json.dumps(x) for key, x in self.provenance.items()}
        attrs |= {"unit": self.unit, "base": self.base}
        return xr.DataArray(_numpy(self.values), coords=coords, dims=self.dims, name=self.metric, attrs=attrs)

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

    def _check_draws(self, n: int) -> None:
        """Raises `ValueError` for more resamples than fit into a few gigabytes."""
        most = _DRAWS // len(self.coords["prompt"])
        if n > most:
            raise ValueError(
                f"n_resamples: expected at most {most:,} for {len(self.coords['prompt'])} prompts, got {n:,}"
            )

    def _check_finite(self) -> None:
        """An infinity would become NaN in a sum or a difference, and so a cell that seems not to exist."""
        for name, tensor in {"values": self.values, **self.baseline}.items():
            if tensor.isinf().any():
                raise ValueError(
                    f"{name}: expected finite numbers, got {int(tensor.isinf().sum())} infinite ones; "
                    "use a metric that stays finite, or sel() the cells that are"
                )

    def _check_prompts(self, what: str) -> None:
        if len(self.coords.get("prompt", ())) < 2:
            raise ValueError(f"{what}: expected a result with at least 2 prompts, got dims {self.dims} of {self.shape}")
        self._check_finite()

    def _counting(self, dim: str, size: int) -> Mapping[str, Any]:
        return {**self.provenance, "n_prompts": size} if dim == "prompt" else self.provenance

    def _without(self, dim: str, size: int, **changes: Any) -> "Result":
        """This result with `dim` gone, of which `size` labels went into each value."""
        dims = tuple(other for other in self.dims if other != dim)
        coords = {other: self.coords[other] for other in dims}
        return replace(self, dims=dims, coords=coords, provenance=self._counting(dim, size), **changes)

    def _statistic(self, numbers: np.ndarray, unit: str) -> "Result":
        shape = [size for dim, size in zip(self.dims, self.shape, strict=True) if dim != "prompt"]
        values = torch.as_tensor(numbers.reshape(shape), dtype=self.values.dtype, device=self.values.device)
        size = len(self.coords["prompt"])
        return self._without("prompt", size, values=values, baseline={}, base="", unit=unit)

    def _by_prompt(self, tensor: Tensor) -> np.ndarray:
        """`[prompt cell]` in float64."""
        by_prompt = tensor.expand(self.shape).movedim(self.dims.index("prompt"), 0)
        return _numpy(by_prompt).astype(np.float64).reshape(len(by_prompt), -1)

    def _coords_at(self, index: Sequence[Any]) -> dict[str, Label]:
        return {dim: self.coords[dim][i] for dim, i in zip(self.dims, index, strict=True)}

    def _where(self, mask: Tensor) -> str:
        """Names the places where a mask, which broadcasts against the values, is true."""
        varying = [dim for dim, size in zip(self.dims, mask.shape, strict=True) if size > 1]
        labels = [_cell_label({d: self._coords_at(i)[d] for d in varying}) for i in mask.nonzero().tolist()]
        return f" at {', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}" if varying else ""


def _as_float(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point torch.Tensor, got {getattr(value, 'dtype', type(value))}")
    value = value.detach()
    return value.float() if value.dtype.itemsize < 4 else value


def _as_labels(labels: Sequence[Any], dim: str) -> tuple[Label, ...]:
    try:
        return tuple(str(label) if isinstance(label, str) else operator.index(label) for label in labels)
    except TypeError as error:
        raise ValueError(f"coords[{dim!r}]: expected labels that are int or str, got {labels!r}") from error


def _as_json(provenance: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in provenance.items():
        try:
            json.dumps({key: value})
        except (TypeError, ValueError) as error:
            raise ValueError(f"provenance[{key!r}]: expected a JSON value, got {value!r}") from error
    return json.loads(json.dumps(dict(provenance)))  # as load() would give it: lists for tuples, and a copy


def _find(labels: tuple[Label, ...], wanted: Any, dim: str) -> list[int]:
    positions = {label: i for i, label in enumerate(labels)}
    ends = [wanted.start, wanted.stop] if isinstance(wanted, slice) else []
    asked = wanted if isinstance(wanted, list) else [end for end in ends if end is not None]
    asked = asked if isinstance(wanted, (list, slice)) else [wanted]
    if asked and all(isinstance(label, bool) for label in asked) and isinstance(wanted, list):
        if len(asked) != len(labels):
            raise ValueError(f"sel: expected a mask of {len(labels)} booleans for {dim!r}, got {len(asked)}")
        return [i for i, is_in in enumerate(asked) if is_in]
    # True is 1 to a dict, and is no label
    unknown = [label for label in asked if isinstance(label, bool | list | dict) or label not in positions]
    if unknown or (isinstance(wanted, slice) and wanted.step is not None):
        raise ValueError(f"sel: expected labels of {dim!r}, which are {list(labels)}, got {unknown or wanted!r}")
    if isinstance(wanted, slice):
        start, stop = (None if end is None else positions[end] for end in ends)
        return list(range(len(labels)))[start : None if stop is None else stop + 1]
    return [positions[label] for label in asked]


def _cell_label(coords: Mapping[str, Label]) -> str:
    """`'L9H6'`, `'L9 " Mary" 3'`, `'L9H6 IO'`, `'L4N133'`; an int of any other dim is spelled out: `'L9 pos 3'`."""
    short = [dim for dim in _PREFIXES if isinstance(coords.get(dim), int)]
    rest = [label if isinstance(label, str) else f"{dim} {label}" for dim, label in coords.items() if dim not in short]
    return " ".join(["".join(f"{_PREFIXES[dim]}{coords[dim]}" for dim in short)] * bool(short) + rest)


def _label_array(labels: tuple[Label, ...]) -> np.ndarray:
    """A numpy string array would turn ints into strings and drop trailing NULs."""
    return np.array(labels, dtype=np.int64 if all(isinstance(label, int) for label in labels) else object)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.numpy(force=True).copy()
