"""The dtype that numbers are computed in, and how much two computations of the same number may differ by rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Compared = Literal[
    "replay",
    "projection",
    "runs",
    "gradients",
    "norm",
    "readout",
    "heads",
    "weights",
    "lens",
    "direction",
    "edges",
    "circuit",
]
_OWN = 1e-5  # of a stream's size: what its own rounding comes to at most, but in half precision
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# How far rounding may take two ways to the same number apart, as a share of its size (logits: of their spread), by what is
# compared. Many Hugging Face models compute norms and softmaxes in float32, whatever their dtype: this is why 1e-5 and 1e-6.
_TOLERANCE: dict[str, tuple[float, float, float, float]] = {
    # blocks run by themselves, and whole forward passes: the same operations
    "replay": (1e-9, 1e-4, 0.05, 0.01),
    # a projection, and the matrix that it should multiply with
    "projection": (1e-6, 1e-4, 0.05, 0.01),
    # two runs, as long as they have read the same tokens (experts see other groups of rows)
    "runs": (1e-6, 1e-4, 0.05, 0.01),
    # gradients of packed prompts at one site, and those of whole runs
    "gradients": (1e-6, 1e-3, 0.2, 0.1),
    # a norm, and its formula with the scale held fixed; attention by its weights
    "norm": (1e-5, 1e-4, 0.05, 0.01),
    # the model's logits, and those read off its last residual stream
    "readout": (1e-5, 1e-4, 0.05, 0.01),
    # the sum of the heads, and what the block adds; the bridge, and the Hugging Face model
    "heads": (1e-6, 1e-3, 0.1, 0.02),
    # scores, values and outputs of attention, and what folded weights say
    "weights": (1e-4, 1e-4, 0.05, 0.02),
    # the stream after a block, and the sum of what was written into it
    "lens": (1e-6, 1e-3, 0.1, 0.05),
    # the metric, and the sum of its terms
    "direction": (1e-5, 1e-3, 0.1, 0.05),
    # the whole gradient, and the sum over the edges that it flows through
    "edges": (1e-5, 1e-3, 0.2, 0.1),
    # the model, and the circuit of all its edges
    "circuit": (1e-5, 1e-3, 0.1, 0.03),
}


def tolerance(compared: Compared, dtype: torch.dtype) -> float:
    """The largest difference that rounding explains in a model of this dtype, relative; see the table above. For a dtype that is
    not in it, the coarsest."""
    return _TOLERANCE[compared][_DTYPES.index(dtype)] if dtype in _DTYPES else max(_TOLERANCE[compared])


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What numbers are kept in that come from a model of this dtype: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """Half precision as float32, in which metrics and everything read off logits or weights is computed at least."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class Rounding:
    """How far apart rounding takes two ways to the same number.

    Attributes:
        of_block: Of one block's output, as a share of what it adds to the residual stream.
        of_logits: Of a whole run's final stream, or of its logits' spread.
        eps: The relative distance of neighbouring numbers.
    """

    of_block: float
    of_logits: float
    eps: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> Rounding:
        """What is allowed where everything is computed in `dtype`."""
        allowed = tolerance("replay", dtype)
        return cls(allowed, allowed, torch.finfo(dtype).eps)

    def off(
        self,
        found: Float[Tensor, "row pos d_model"],
        expected: Float[Tensor, "row pos d_model"],
        before: Float[Tensor, "row pos d_model"] | None = None,
        blocks: int = 0,
    ) -> float:
        """How far two residual streams are apart at the worst position, as a share of what was added to `before` there.

        A stream's own rounding (it may be much larger than what one block adds: a thousand times, at the first position of many
        models) is allowed in addition: of one sum, or of the sums of as many `blocks` as both streams have come through, where it
        grows as a random walk does. Without `before` it is a share of the stream.
        """
        own = max(2 * self.eps, min(4 * self.eps * blocks**0.5, _OWN))
        found, expected = found.double(), expected.to(found.device).double()
        added = expected if before is None else expected - before.to(found.device).double()
        allowed = added.norm(dim=-1) + own / self.of_block * expected.norm(dim=-1)
        apart = (found - expected).norm(dim=-1)
        return float((apart / allowed.clamp(min=torch.finfo(torch.float64).tiny)).max())

    def off_logits(self, found: Float[Tensor, "... d_vocab"], expected: Float[Tensor, "... d_vocab"]) -> float:
        """The largest difference of logits, as a share of their spread around each row's mean."""
        found, expected = (x.double() - x.double().mean(-1, keepdim=True) for x in (found, expected.to(found.device)))
        return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


class ObservedDtypes(TorchDispatchMode):
    """Watches which floating types are computed in while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor) and one.dtype in _DTYPES:
                self._seen.add(one.dtype)
        return out

    def coarsest(self, default: torch.dtype) -> torch.dtype:
        """The seen type with the coarsest numbers; `default` if none was seen."""
        return max({default, *self._seen}, key=lambda dtype: torch.finfo(dtype).eps)
