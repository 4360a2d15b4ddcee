"""Work that goes through a model's blocks, as generators that stop before each block: `yield layer` says which one is next.

Run to its end at once, one after the other, work is as fast as it gets where all weights are in memory. Where each block must be
fetched first (`mechkit.hooks._streamed`), all work goes through one block before the next one is fetched. What is computed is the
same, to the bit.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
ByLayer = Generator[int, None, T]


def at_once(work: ByLayer[T]) -> T:
    """The result of work that does not wait for others."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


def in_step(several: Sequence[ByLayer[Any]]) -> list[Any]:
    """The results of work that goes through each block together: none runs a block before all others have run the one before."""
    results: list[Any] = [None] * len(several)
    waits_for: dict[int, int] = {}

    def advance(i: int) -> None:
        try:
            waits_for[i] = next(several[i])
        except StopIteration as end:
            results[i] = end.value
            waits_for.pop(i, None)

    for i in range(len(several)):
        advance(i)
    while waits_for:
        layer = min(waits_for.values())
        for i in [i for i, at in waits_for.items() if at == layer]:
            advance(i)
    return results
