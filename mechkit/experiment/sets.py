"""Sets of places that are edited together: one cell of a sweep each. The one place that reads `cells=`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mechkit._check import is_whole
from mechkit.result._labels import cell_label

# By name or not; a place is a tuple of labels, one for each dim
Sets = Sequence[Any] | Mapping[str, Any]
Members = tuple[tuple[int | str, ...], ...]  # of a set: the indices of each place
Index = Mapping[str, Sequence[Any]]


def sets_of(dims: tuple[str, ...], index: Index, coords: Index, cells: Sets) -> dict[str, Members]:
    """Each set's label, and the indices of its members.

    Args:
        dims: Of a place.
        index: For each dim the indices (or names) that there are.
        coords: For each dim their labels.
        cells: As the user gave them.

    Raises:
        ValueError: no set, a set without a place, a place that there is not or that is in a set twice.
    """
    first = tuple(index[dim][0] for dim in dims)
    place, example = (dims[0], repr(first[0])) if len(dims) == 1 else (f"({', '.join(dims)})", repr(first))
    expected = f"cells: expected sets of places, each place {place}, such as [[{example}]] or {{'a name': [{example}]}}"
    named = cells.items() if isinstance(cells, Mapping) else ((None, one) for one in cells)
    sets: dict[str, Members] = {}
    for name, one in named:
        if isinstance(one, str | int | Mapping) or not isinstance(one, Iterable):
            raise ValueError(f"{expected}; got {one!r} for a set")
        members = tuple(_member(dims, index, coords, member, expected) for member in one)
        if not members or len(set(members)) != len(members):
            raise ValueError(f"cells: expected at least one place in each set, each place once; got {one!r}")
        if name is not None and not isinstance(name, str):
            raise ValueError(f"cells: expected names of sets as text, got {name!r}")
        label = _label(dims, members) if name is None else name
        sets[label if label not in sets else f"{label} ({len(sets)})"] = members
    if not sets:
        raise ValueError(f"{expected}; got none")
    return sets


def _member(dims: tuple[str, ...], index: Index, coords: Index, member: Any, expected: str) -> tuple[int | str, ...]:
    """One place as indices: from a tuple in the order of the dims, a single label for a single dim, or a cell of `Result.top`."""
    labelled = getattr(member, "coords", None)
    if isinstance(labelled, Mapping):
        if set(labelled) != set(dims):
            raise ValueError(f"{expected}; got {member!r}, which is a cell over {' '.join(labelled)!r}")
        member = tuple(labelled[dim] for dim in dims)
    labels = (member,) if isinstance(member, str) or is_whole(member) else member
    if not isinstance(labels, Sequence) or len(labels) != len(dims):
        raise ValueError(f"{expected}; got {member!r}")
    return tuple(_one(dim, list(index[dim]), list(coords[dim]), label) for dim, label in zip(dims, labels, strict=True))


def _one(dim: str, index: list[Any], coords: list[Any], label: Any) -> int | str:
    if isinstance(label, str) and label in coords:
        found: int | str = index[coords.index(label)]
        return found
    if is_whole(label) and not isinstance(index[0], str):
        at = label.__index__()
        at += max(index) + 1 if at < 0 else 0
        if at in index:
            return int(at)
    there = f"{index[0]} to {index[-1]}" if len(index) > 8 else ", ".join(map(str, index))
    raise ValueError(f"cells: expected a {dim} among {there}; got {label!r}")


def _label(dims: tuple[str, ...], members: Members) -> str:
    """`'L23H3 + L20H0'`; of a larger set its first place, and how many more."""
    names = [cell_label(dict(zip(dims, member, strict=True))) for member in members]
    return " + ".join(names) if len(names) <= 4 else f"{names[0]} + {len(names) - 1} more"
