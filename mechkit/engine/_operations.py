"""What an edit does with an activation and a value: frozen values with one method, `apply`.

An operation also states what the engine may conclude from it, so that the engine assumes nothing about it:

- `keeps_equal`: where the value equals the activation, nothing changes. Then an edit that writes the source run's activation
  changes nothing before the two runs' first different token, and rows start there.
- `looks`: what it gives depends on the activation that it is applied to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


class Operation(ABC):
    """One kind of edit. Two operations that are equal are one: edits of equal operations are made together."""

    keeps_equal: ClassVar[bool]
    looks: ClassVar[bool]

    @abstractmethod
    def apply(self, x: Tensor, operand: Tensor) -> Tensor:
        """What takes the place of `x`, from `x` and the edit's value; both have the shape of what is edited.

        Where `looks` is false `x` may be anything of that shape.
        """


@dataclass(frozen=True)
class Set(Operation):
    """Overwrites: the value takes the activation's place."""

    keeps_equal: ClassVar[bool] = True
    looks: ClassVar[bool] = False

    def apply(self, x: Tensor, operand: Tensor) -> Tensor:
        return operand


SET = Set()
