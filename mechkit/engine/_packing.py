"""Rows that begin at different positions, of prompts of different lengths, whose tokens follow one another without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int

from mechkit.engine._edits import EditPlan, Rows


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of a batch, in the order in which they join; each begins where it does.

    Attributes:
        cell: Index into the plan's cells.
        chunk: Which of the chunks that are replayed together the prompt is in.
        prompt: Index into the prompts of the chunk.
        prompt_id: The same prompts' indices in the whole set.
        start: First position that is computed.
        length: The prompt's length.
    """

    cell: Int[np.ndarray, "row"]
    chunk: Int[np.ndarray, "row"]
    prompt: Int[np.ndarray, "row"]
    prompt_id: Int[np.ndarray, "row"]
    start: Int[np.ndarray, "row"]
    length: Int[np.ndarray, "row"]

    @classmethod
    def of(cls, plan: EditPlan, parts: Sequence[tuple[Rows, int, int]]) -> PackedRows:
        """Rows that begin at one position each, with the number of their chunk and the length of its prompts."""
        columns = [
            (
                rows.cell,
                np.full(len(rows), chunk),
                rows.prompt,
                rows.prompt_id,
                np.full(len(rows), rows.start),
                np.full(len(rows), length),
            )
            for rows, chunk, length in parts
        ]
        joined = cls(*(np.concatenate(column) for column in zip(*columns, strict=True)))
        order = (joined.prompt, joined.cell, joined.start, joined.chunk, plan.entry[joined.cell])
        return joined[np.lexsort(order)]

    def __len__(self) -> int:
        return len(self.cell)

    def __getitem__(self, part: slice | np.ndarray) -> PackedRows:
        columns = (self.cell, self.chunk, self.prompt, self.prompt_id, self.start, self.length)
        return PackedRows(*(column[part] for column in columns))

    @cached_property
    def suffix(self) -> Int[np.ndarray, "row"]:
        """How many tokens each row has."""
        return self.length - self.start

    @cached_property
    def first(self) -> Int[np.ndarray, "row"]:
        """Where each row's tokens begin."""
        return np.cumsum(self.suffix) - self.suffix

    @property
    def n_tokens(self) -> int:
        return int(self.suffix.sum())

    @cached_property
    def position(self) -> Int[np.ndarray, "token"]:
        """The position of each token in its prompt."""
        return np.arange(self.n_tokens) - np.repeat(self.first - self.start, self.suffix)

    def at_the_end(self) -> PackedRows:
        """The same rows, of which only the last position is left."""
        return PackedRows(self.cell, self.chunk, self.prompt, self.prompt_id, self.length - 1, self.length)

    def by_start(self) -> Iterator[tuple[np.ndarray, int, Rows]]:
        """Which rows share a chunk and a start: their places, the chunk, and the rows."""
        key = self.chunk * (int(self.start.max(initial=0)) + 1) + self.start
        for one in np.unique(key):
            at = np.flatnonzero(key == one)
            rows = Rows(self.cell[at], self.prompt[at], self.prompt_id[at], int(self.start[at[0]]))
            yield at, int(self.chunk[at[0]]), rows


def tokens_from(first: Int[np.ndarray, "row"], suffix: Int[np.ndarray, "row"]) -> Int[np.ndarray, "token"]:
    """The tokens of rows that begin at `first`, row by row."""
    return np.arange(int(suffix.sum())) - np.repeat(np.cumsum(suffix) - suffix - first, suffix)
