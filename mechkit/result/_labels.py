"""Labels of a result: how `sel` finds them, dims in another order, and how labels are written for readers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

Label = int | str
_PREFIXES = {"layer": "L", "head": "H", "neuron": "N"}
_SENDER = re.compile(r"a(\d+)\.h(\d+)")  # a head's name in a graph


def find(labels: tuple[Label, ...], wanted: Any, dim: str) -> list[int]:
    """The indices of one label, a list of labels, a mask of booleans, or a slice that includes both ends."""
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


def in_order(dims: tuple[str, ...], wanted: str | Sequence[str]) -> list[int]:
    """The axis of each wanted dim, in the wanted order; `wanted` is `"prompt layer"`, or a list of names.

    Raises:
        ValueError: it does not name each of the dims once.
    """
    names = wanted.split() if isinstance(wanted, str) else list(wanted)
    if sorted(names) != sorted(dims):
        hint = (
            "; average a dim away with mean(), or choose one label of it with sel()" if set(names) < set(dims) else ""
        )
        raise ValueError(f"dims: expected each of {' '.join(dims)!r} once, in any order; got {' '.join(names)!r}{hint}")
    return [dims.index(name) for name in names]


def cell_label(coords: Mapping[str, Label]) -> str:
    """`'L9H6'`, `'L9 " Mary" 3'`, `'L9H6 IO'`, `'L4N133'`; an int of any other dim is spelled out: `'L9 pos 3'`.

    A head that path patching was given by name, `'a9.h6'`, has the label that it has among all heads: `'L9H6'`.
    """
    if isinstance(sender := coords.get("sender"), str):
        coords = {**coords, "sender": _SENDER.sub(r"L\1H\2", sender)}
    short = [dim for dim in _PREFIXES if isinstance(coords.get(dim), int)]
    rest = [label if isinstance(label, str) else f"{dim} {label}" for dim, label in coords.items() if dim not in short]
    return " ".join(["".join(f"{_PREFIXES[dim]}{coords[dim]}" for dim in short)] * bool(short) + rest)
