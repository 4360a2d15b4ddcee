"""From annotations to kinds: what an argument must be, in words, and a function that finds what is wrong with a value."""

from __future__ import annotations

import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import AbstractArray

_ITEMS = 10_000  # items of one argument that are looked at
# Ranges of numbers, by the argument's name, unless a function states its own range.
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "held_out": (0, 1),
    "lr": (0, 1e6),
    "d_model": (1, math.inf),
    **dict.fromkeys(("block_tokens", "naive_block_tokens", "max_new_tokens"), (0, math.inf)),
}
# The same for what is stated before the function is called: all of these are refused by it.
STATED = {**dict.fromkeys(("batch", "k", "length", "n", "n_resamples", "times", "top"), (1, math.inf)), **_RANGES}
_NEVER_EMPTY = ("answers", "clean", "corrupted", "fractions", "input", "names", "receivers", "senders", "text")


class Fault(NamedTuple):
    """What is wrong with a value: at which item of it (`"[3]"`), whether its type is, what was expected, and what is there."""

    where: str
    wrong_type: bool
    expected: str
    value: Any


class Kind(NamedTuple):
    """What a value must be, in words, and what finds fault with one."""

    expected: str
    fault: Callable[[Any], Fault | None]


def kind_of(annotation: Any) -> Kind:
    """What values of an annotation are, and what finds fault with others."""
    if annotation is Any or annotation is object:
        return Kind("anything", lambda value: None)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        named_device = torch.device in arguments  # a string is a device's name then
        return _any_of([kind_of(one) for one in arguments if not (named_device and one is str)])
    if origin is Literal:
        return _literal(arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(*(kind_of(one) for one in arguments))
    if origin is tuple and Ellipsis not in arguments:
        return _tuple([kind_of(one) for one in arguments])
    if origin is type:
        return _instance(type, "a class")
    if origin is os.PathLike:
        return _of_class(os.PathLike)
    if origin is Callable or annotation is Callable or (isinstance(origin, type) and issubclass(origin, Callable)):  # type: ignore[arg-type]
        return _callable()
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return _several(
            kind_of(arguments[0]), ordered=issubclass(origin, Sequence), exhaustible=issubclass(Iterator, origin)
        )
    if isinstance(annotation, type):
        return _of_class(annotation)
    return _nothing() if annotation is None else Kind("anything", lambda value: None)


def _of_class(annotation: type) -> Kind:
    if annotation is type(None):
        return _nothing()
    if annotation is bool:
        return _simple("True or False", lambda value: isinstance(value, bool | np.bool_))
    if annotation is int:
        return _simple("a whole number", is_whole)
    if annotation is float:
        return _number()
    if annotation is str:
        return _simple("a string", lambda value: isinstance(value, str))
    if issubclass(annotation, AbstractArray):  # of jaxtyping: shapes are checked in tests, and by the function
        array = getattr(annotation, "array_type", torch.Tensor)
        return _simple("a tensor" if array is torch.Tensor else "an array", lambda value: isinstance(value, array))
    if annotation is torch.Tensor:
        return _instance(annotation, "a tensor")
    if annotation is os.PathLike or annotation.__name__ == "Path":
        return _simple("a path", lambda value: isinstance(value, os.PathLike))
    if annotation is torch.device:
        return Kind("a device", _device_fault)
    name = "HookedModel" if annotation.__name__ == "Tokenizes" else annotation.__name__
    article = "" if name.endswith("s") else "an " if name[0] in "AEIOU" else "a "  # Prompts, PromptPairs are several
    return _instance(annotation, f"{article}{name}")


def arrays_of(annotation: Any) -> tuple[type, ...]:
    """The classes of arrays that a value of an annotation may be, or be made of."""
    if annotation in (Any, object) or isinstance(annotation, typing.TypeVar):
        return (np.generic, np.ndarray, torch.Tensor)
    if annotation in (torch.Tensor, np.ndarray):
        return (annotation,)
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return (getattr(annotation, "array_type", torch.Tensor),)
    inside = () if typing.get_origin(annotation) is Literal else typing.get_args(annotation)
    return tuple(dict.fromkeys(found for one in inside for found in arrays_of(one)))


def plain(value: Any, keep: tuple[type, ...] = ()) -> Any:
    """Numbers of numpy, torch and pandas, alone or in lists, as Python's (theirs are no seeds, no dict keys and no JSON),
    fractions as floats, a dict's keys as a list; the value itself if there are none. Arrays of the classes `keep` stay."""
    if isinstance(value, keep):
        return value
    if isinstance(value, KeysView | ValuesView):
        return plain(list(value), keep)
    if isinstance(value, np.generic | np.ndarray | torch.Tensor) or type(value).__module__.startswith("pandas"):
        large = isinstance(value, np.ndarray | torch.Tensor) and math.prod(value.shape) > _ITEMS
        return value.tolist() if hasattr(value, "tolist") and not large else value
    if isinstance(value, numbers.Real) and not isinstance(value, int | float):
        return float(value)
    if type(value) in (list, tuple) and len(value) <= _ITEMS:
        items = [plain(one, keep) for one in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else type(value)(items)
    if type(value) is dict and len(value) <= _ITEMS:
        changed = {key: plain(one, keep) for key, one in value.items()}
        return value if all(changed[key] is value[key] for key in value) else changed
    return value


def is_whole(value: Any) -> bool:
    """Whether it is a whole number of any library's, and no bool."""
    if isinstance(value, bool | np.bool_):
        return False
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.ndim == 0 and hasattr(value, "__index__") and "int" in str(value.dtype)
    return hasattr(type(value), "__index__")


def is_whole_dtype(dtype: torch.dtype) -> bool:
    """Whether tensors of a dtype hold whole numbers, and no booleans."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _simple(expected: str, fits: Callable[[Any], bool]) -> Kind:
    return Kind(expected, lambda value: None if fits(value) else Fault("", True, expected, value))


def _instance(cls: type, expected: str) -> Kind:
    return _simple(expected, lambda value: isinstance(value, cls) and (cls is type or not isinstance(value, type)))


def _device_fault(value: Any) -> Fault | None:
    if not isinstance(value, str | torch.device):
        return Fault("", True, "a device, such as 'cpu' or 'cuda:0'", value)
    try:
        device = torch.device(value)
    except RuntimeError:
        return Fault("", False, "a device, such as 'cpu' or 'cuda:0'", value)
    if device.type == "meta":
        return Fault("", False, "a device that holds numbers", value)
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    expected = f"a device that is there (this machine has no {device.type.upper()})"
    return Fault("", False, expected, value) if missing else None


def _nothing() -> Kind:
    return _simple("None", lambda value: value is None)


def _number() -> Kind:
    def fault(value: Any) -> Fault | None:
        number = isinstance(value, numbers.Real) or (isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0)
        if not number or isinstance(value, bool | np.bool_):
            return Fault("", True, "a number", value)
        return None

    return Kind("a number", fault)


def _callable() -> Kind:
    def fits(value: Any) -> bool:
        a_model = type(value).__name__ == "HookedModel" or isinstance(value, torch.nn.Module)
        return callable(value) and not isinstance(value, type) and not a_model

    return _simple("a function", fits)


def _literal(choices: tuple[Any, ...]) -> Kind:
    words = [repr(choice) for choice in choices]
    expected = f"one of {', '.join(words)}" if len(words) > 2 else " or ".join(words)
    allowed = {(type(choice), choice) for choice in choices}

    def fault(value: Any) -> Fault | None:
        plain = str(value) if isinstance(value, str) else value
        right_type = any(type(plain) is type(choice) for choice in choices)
        if not right_type:
            return Fault("", True, expected, value)
        return None if (type(plain), plain) in allowed else Fault("", False, expected, value)

    return Kind(expected, fault)


def _any_of(kinds: list[Kind]) -> Kind:
    words = [kind.expected for kind in kinds if kind.expected != "None"]
    words = sorted(words, key=_order)
    expected = " or ".join(dict.fromkeys(words + ["None"] * (len(words) < len(kinds))))

    def fault(value: Any) -> Fault | None:
        found = []
        for kind in kinds:
            one = kind.fault(value)
            if one is None:
                return None
            found.append(one)
        inside = [one for one in found if one.where or not one.wrong_type]  # its own type was right
        wrong_type = not inside or inside[0].wrong_type
        if inside and all(one.where for one in inside):
            return inside[0]
        return Fault("", wrong_type, expected, value)

    return Kind(expected, fault)


def _order(word: str) -> tuple[bool, str]:
    """Choices first, then classes by name, then the rest as it is."""
    name = word.removeprefix("an ").removeprefix("a ")
    return word[:1] not in "'o", name if name[:1].isupper() else "~"


def _several(item: Kind, *, ordered: bool, exhaustible: bool) -> Kind:
    plural = item.expected in ("a string", "a number", "a whole number")
    expected = f"a list of {item.expected[2:]}s" if plural else f"a list (each {item.expected})"

    def fault(value: Any) -> Fault | None:
        if isinstance(value, torch.Tensor | np.ndarray):
            listed = isinstance(value, np.ndarray) or (value.layout == torch.strided and not value.is_nested)
            of_numbers = isinstance(value, torch.Tensor) or value.dtype.kind not in "OSU"
            fits = listed and value.ndim > 0 and not (of_numbers and item.expected == "a string")
        else:
            sized = exhaustible or (hasattr(value, "__len__") and (hasattr(value, "__getitem__") or not ordered))
            fits = isinstance(value, Iterable) and sized and not isinstance(value, str | bytes | Mapping)
        if not fits:
            return Fault("", True, expected, value)
        if isinstance(value, list | tuple | torch.Tensor | np.ndarray):
            for i, one in enumerate(value[:_ITEMS]):
                if (found := item.fault(one)) is not None:
                    return found._replace(where=f"[{i}]{found.where}")
        return None

    return Kind(expected, fault)


def _tuple(items: list[Kind]) -> Kind:
    expected = f"({', '.join(item.expected for item in items)})"

    def fault(value: Any) -> Fault | None:
        if not isinstance(value, tuple | list):
            return Fault("", True, expected, value)
        if len(value) != len(items):
            return Fault("", False, f"{len(items)} of them, {expected}", value)
        for i, (item, one) in enumerate(zip(items, value, strict=True)):
            if (found := item.fault(one)) is not None:
                return found._replace(where=f"[{i}]{found.where}")
        return None

    return Kind(expected, fault)


def _mapping(key: Kind, item: Kind) -> Kind:
    expected = f"a mapping from {key.expected} to {item.expected}"

    def fault(value: Any) -> Fault | None:
        if not isinstance(value, Mapping):
            return Fault("", True, expected, value)
        for name, one in list(value.items())[:_ITEMS]:
            if (found := key.fault(name)) is not None:
                return found._replace(where=f"{found.where} (a key)")
            if (found := item.fault(one)) is not None:
                return found._replace(where=f"[{name!r}]{found.where}")
        return None

    return Kind(expected, fault)


def in_range(name: str, kind: Kind, bounds: tuple[float, float] | None) -> Kind:
    """The same kind; numbers of it are in the range of the argument's name."""
    low, high = bounds or _RANGES.get(name, (-math.inf, math.inf))
    if name in _NEVER_EMPTY:
        text = name in ("input", "text")  # an empty text is the beginning-of-sequence token alone

        def empty(value: Any) -> bool:
            if getattr(value, "ndim", 1) == 0:
                return False
            return hasattr(value, "__len__") and len(value) == 0 and not (text and isinstance(value, str))

        return _with(kind, empty, "at least one")
    if name == "path" and "a path" in kind.expected:
        return _with(kind, lambda value: os.fspath(value).strip() == "" or "\0" in os.fspath(value), "a file's name")
    if (low, high) == (-math.inf, math.inf):
        return kind
    limits = [f"of {low:,} or more" if low > -math.inf else "", f"of {high:,} at most" if high < math.inf else ""]
    what = "a whole number" if "whole number" in kind.expected else "a number"
    expected = f"{what} from {low:,} to {high:,}" if all(limits) else f"{what} {''.join(limits)}"

    return _with(kind, lambda value: isinstance(value, numbers.Real) and not low <= float(value) <= high, expected)


def _with(kind: Kind, wrong: Callable[[Any], bool], expected: str) -> Kind:
    """The same kind without some of its values."""

    def fault(value: Any) -> Fault | None:
        found = kind.fault(value)
        return Fault("", False, expected, value) if found is None and wrong(value) else found

    return Kind(kind.expected, fault)
