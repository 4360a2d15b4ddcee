"""Positions as a user gives them to a technique (names, or indices from 0), and as labels of a result.

They are chosen, checked and resolved here. What a name stands for is in the pairs (`mechkit/prompts/_pairs.py`, which also finds
positions by their text).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechkit._check import is_whole
from mechkit.prompts import PromptPairs, Prompts

_NAMED = 12  # names that an error lists: a picture may have hundreds of patches


@dataclass(frozen=True, eq=False)
class PlacedPrompts(Prompts):
    """Plain prompts with named positions."""

    places: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, prompts: Prompts, places: Mapping[str, Tensor]) -> PlacedPrompts:
        return cls(**{one.name: getattr(prompts, one.name) for one in fields(Prompts)}, places=places)


def split_prompts(prompts: PromptPairs | Prompts) -> tuple[Prompts, Mapping[str, Tensor], str]:
    """The clean prompts, their named positions and the task, of pairs or of plain prompts."""
    if isinstance(prompts, PromptPairs):
        return prompts.clean, prompts.positions, prompts.task
    if isinstance(prompts, Prompts):
        return prompts, prompts.places if isinstance(prompts, PlacedPrompts) else {"END": prompts.ends}, "custom"
    raise ValueError(f"prompts: expected PromptPairs or Prompts, got {type(prompts).__name__}")


def base_and_source(pairs: Any, direction: Any, *, aligned: bool = False) -> tuple[str, str]:
    """The names of the run that is edited, and of the run whose activations are written into it. Pairs whose prompts differ in
    length are refused, unless `aligned`."""
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction: expected 'denoise' or 'noise', got {direction!r}")
    if not isinstance(pairs, PromptPairs):
        raise ValueError(f"pairs: expected PromptPairs, whose two runs are compared; got {type(pairs).__name__}")
    if not aligned:
        pairs.check_position_by_position("the two runs are compared position by position")
    return ("corrupted", "clean") if direction == "denoise" else ("clean", "corrupted")


def choose_positions(named: Mapping[str, Tensor], chosen: Sequence[Any] | None) -> list[str]:
    """The named positions that a user chose; all of them for `None`."""
    if isinstance(chosen, str):
        raise ValueError(f"positions: expected a list of names, got {chosen!r}; write positions=[{chosen!r}]")
    names = list(named) if chosen is None else list(chosen)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"positions: expected at least one name, each once; got {names}")
    for name in names:
        if name not in named:
            known = ", ".join(list(named)[:_NAMED]) + ", …" * (len(named) > _NAMED)
            raise ValueError(f"positions: expected names among {known}; got {name!r}")
    return names


def places_of(
    lengths: Int[Tensor, "prompt"], named: Mapping[str, Tensor], chosen: Sequence[int | str]
) -> Int[Tensor, "place prompt"]:
    """Where each of `chosen` is in each prompt: names, or indices, negative ones from the prompt's end; -1 where it has no such
    position."""
    rows = []
    for one in chosen:
        at = named[one] if isinstance(one, str) else torch.full_like(lengths, one)
        at = torch.where(at < 0, at + lengths, at)
        rows.append(torch.where((at >= 0) & (at < lengths), at, -1))
    return torch.stack(rows)


def place_in_every(prompts: Prompts, named: Mapping[str, Tensor], position: Any) -> Int[Tensor, "prompt"]:
    """Where one position, a name or an index, is in each prompt. Refuses one that some prompt does not have."""
    if isinstance(position, str) and position not in named:
        raise ValueError(f"position: expected an index or one of {', '.join(named)}, got {position!r}")
    if not isinstance(position, str) and not is_whole(position):
        raise ValueError(f"position: expected an index or a name, got {position!r}")
    chosen = position if isinstance(position, str) else position.__index__()
    at = places_of(prompts.lengths, named, [chosen])[0]
    for i in (at < 0).nonzero().flatten().tolist():
        raise ValueError(
            f"position: expected an index that every prompt has; prompt {i} has {prompts.lengths[i]} tokens, got {position}. "
            f"Use one of the named positions, {', '.join(named)}, or leave it out"
        )
    return at


def refuse_indices_from_end(positions: Sequence[Any], prompts: Prompts, instead: str) -> None:
    """Refuses negative indices where prompts differ in length: one label would name several positions."""
    lengths = sorted(set(prompts.lengths.tolist()))
    if len(lengths) > 1 and any(isinstance(one, int) and one < 0 for one in positions):
        raise ValueError(
            f"positions: an index from the end is another position in prompts of lengths {lengths}; expected indices from 0, "
            f"or {instead}"
        )


def position_labels(prompts: Prompts, index: Sequence[int]) -> tuple[int | str, ...]:
    """Token and position (`'" Mary" 3'`) where all prompts agree on the token, else the position alone."""
    if prompts.str_tokens is None:
        return tuple(index)
    labels: list[int | str] = []
    for i in index:
        tokens = {row[i] for row in prompts.str_tokens if i < len(row)}
        labels.append(f'"{tokens.pop()}" {i}' if len(tokens) == 1 else str(i))
    return tuple(labels)
