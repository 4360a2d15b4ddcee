"""Positions as a user gives them (names, or indices from 0), and as labels of a result. The one place that resolves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mechkit.prompts import PromptPairs, Prompts


def split_prompts(prompts: PromptPairs | Prompts) -> tuple[Prompts, Mapping[str, torch.Tensor], str]:
    """The clean prompts, their named positions and the task, of pairs or of plain prompts."""
    if isinstance(prompts, PromptPairs):
        return prompts.clean, prompts.positions, prompts.task
    if isinstance(prompts, Prompts):
        return prompts, {"END": prompts.lengths - 1}, "custom"
    raise ValueError(f"prompts: expected PromptPairs or Prompts, got {type(prompts).__name__}")


def choose_positions(named: Mapping[str, torch.Tensor], chosen: Sequence[Any] | None) -> list[str]:
    """The named positions that a user chose; all of them for `None`."""
    if isinstance(chosen, str):
        raise ValueError(f"positions: expected a list of names, got {chosen!r}; write positions=[{chosen!r}]")
    names = list(named) if chosen is None else list(chosen)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"positions: expected at least one name, each once; got {names}")
    for name in names:
        if name not in named:
            raise ValueError(f"positions: expected names among {', '.join(named)}; got {name!r}")
    return names


def position_labels(prompts: Prompts, index: Sequence[int]) -> tuple[int | str, ...]:
    """Token and position (`'" Mary" 3'`) where all prompts agree on the token, else the position alone."""
    if prompts.str_tokens is None:
        return tuple(index)
    labels: list[int | str] = []
    for i in index:
        tokens = {row[i] for row in prompts.str_tokens if i < len(row)}
        labels.append(f'"{tokens.pop()}" {i}' if len(tokens) == 1 else str(i))
    return tuple(labels)
