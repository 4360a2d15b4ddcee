"""What a result is made of, checked when it is made."""

import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mechkit.result._labels import Label


def check_axes(shape: tuple[int, ...], dims: tuple[str, ...], coords: Mapping[str, tuple[Label, ...]]) -> None:
    """Raises `ValueError` unless every axis has a name of its own, and every index of it a label of its own."""
    if len(dims) != len(shape):
        raise ValueError(f"dims: expected one per axis of values {shape}, got {dims}")
    if len(set(dims)) != len(dims) or "value" in dims:
        raise ValueError(f"dims: expected distinct names, none of them 'value', got {dims}")
    if set(coords) != set(dims):
        raise ValueError(f"coords: expected labels for exactly the dims {dims}, got {tuple(coords)}")
    for dim, size in zip(dims, shape, strict=True):
        labels = coords[dim]
        if len(labels) != size:
            raise ValueError(f"coords[{dim!r}]: expected {size} labels, the size of that axis, got {len(labels)}")
        if len(set(labels)) != size:
            repeated = sorted({str(label) for label in labels if labels.count(label) > 1})
            raise ValueError(f"coords[{dim!r}]: expected distinct labels, got repeated ones: {repeated}")


def as_labels(labels: Sequence[Any], dim: str) -> tuple[Label, ...]:
    try:
        return tuple(str(label) if isinstance(label, str) else operator.index(label) for label in labels)
    except TypeError as error:
        raise ValueError(f"coords[{dim!r}]: expected labels that are int or str, got {labels!r}") from error


def as_float(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point torch.Tensor, got {getattr(value, 'dtype', type(value))}")
    value = value.detach()
    return value.float() if value.dtype.itemsize < 4 else value


def as_json(provenance: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in provenance.items():
        try:
            json.dumps({key: value})
        except (TypeError, ValueError) as error:
            raise ValueError(f"provenance[{key!r}]: expected a JSON value, got {value!r}") from error
    return json.loads(json.dumps(dict(provenance)))  # as load() would give it: lists for tuples, and a copy


def check_finite(tensors: dict[str, Tensor]) -> None:
    """Raises `ValueError` for an infinity: it would become NaN in a sum, and so a cell that seems not to exist."""
    for name, tensor in tensors.items():
        if tensor.isinf().any():
            raise ValueError(
                f"{name}: expected finite numbers, got {int(tensor.isinf().sum())} infinite ones; "
                "use a metric that stays finite, or sel() the cells that are"
            )
