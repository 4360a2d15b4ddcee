"""Results as files, pandas tables and xarray arrays."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from mechkit._files import decoding, read_tensors, write_tensors
from mechkit._thumbnails import PromptPictures
from mechkit.result._columns import columns_of, label_array
from mechkit.result._cost import Cost

if TYPE_CHECKING:
    import pandas
    import xarray

    from mechkit.result._result import Result

_SCHEMA_VERSION = 1


def write(result: "Result", path: str | os.PathLike[str]) -> Path:
    """A safetensors file of the values and baselines; all else is JSON in its header."""
    tensors = {"values": result.values, **{f"baseline.{name}": b for name, b in result.baseline.items()}}
    header = {
        "schema_version": _SCHEMA_VERSION,
        "coords": [[dim, result.coords[dim]] for dim in result.dims],
        "baselines": list(result.baseline),
        **{name: getattr(result, name) for name in ("base", "metric", "unit")},
        "provenance": dict(result.provenance),
        "cost": asdict(result.cost) if result.cost else None,
    }
    if result.pictures is not None:
        header["pictures"], thumbnails = result.pictures.stored()
        tensors |= thumbnails
    return write_tensors(path, tensors, "mechkit_result", header)


def read(cls: type["Result"], path: str | os.PathLike[str]) -> "Result":
    """The result in such a file, on the CPU; `ValueError` if it is another kind of file."""
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
            pictures=PromptPictures.restored(header["pictures"], tensors) if header.get("pictures") else None,
        )


def dataframe(result: "Result") -> "pandas.DataFrame":
    """A row for each cell and prompt, a column for each dim, and `'value'`."""
    import pandas as pd

    columns = columns_of(result)
    return pd.DataFrame({**{dim: columns.label(dim) for dim in result.dims}, "value": columns.value()})


def dataarray(result: "Result") -> "xarray.DataArray":
    """A `DataArray` with coords, `baseline_<name>` coords, and provenance as attributes."""
    import xarray as xr

    coords: dict[str, Any] = {dim: label_array(labels) for dim, labels in result.coords.items()}
    for name, baseline in result.baseline.items():
        coords[f"baseline_{name}"] = (result._baseline_dims(baseline), as_numpy(baseline))
    attrs = {key: x if type(x) in (int, float, str) else json.dumps(x) for key, x in result.provenance.items()}
    attrs |= {"unit": result.unit, "base": result.base}
    return xr.DataArray(as_numpy(result.values), coords=coords, dims=result.dims, name=result.metric, attrs=attrs)


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A copy, so that writing into it changes no result."""
    return tensor.numpy(force=True).copy()
