"""A norm with its scale held fixed: the one step that makes direct logit attribution and relevance propagation linear.

LayerNorm, RMSNorm and their variants (Gemma's gain of 1 + w, norms without a bias or without any weight) all compute

    y = scale(x) * gain * x + bias,    with x centred first in LayerNorm,

where only `scale` depends on x. What a module's gain and bias are, whether it centres, and whether it scales at all (an
`Identity` in a norm's place does not), is *measured* from the module itself, so that no list of classes is needed; a module
that is not a norm of this form is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechkit._precision import tolerance


class FrozenNorm:
    """The linear map that a norm is once its scale is held fixed.

    Attributes:
        gain, bias: `[d_model]`.
        centres: Whether the mean over `d_model` is subtracted first (LayerNorm) or not (RMSNorm).
        normalizes: Whether the output has a length of its own; else `scale` is 1 everywhere (a norm that does nothing).
    """

    def __init__(self, module: Any, like: Float[Tensor, "... d_model"], name: str = "norm") -> None:
        """Measures `module` (a bridge's norm, or any callable on `[... d_model]`; `None` stands for no norm) on vectors of the
        dtype and device of `like`.

        Raises:
            ValueError: it is not a norm of this form.
        """
        self._name = name
        if module is None:
            module = torch.nn.Identity()
        self._call = getattr(module, "original_component", None) or module  # without the bridge's hook points
        width, dtype, device = like.shape[-1], like.dtype, like.device
        with torch.no_grad():
            self.bias = self._call(torch.zeros(1, width, dtype=dtype, device=device))[0]
            # A long vector of mean 0 without small entries: the norm's epsilon does not matter, and its gain can be divided out.
            index = torch.arange(width, dtype=torch.float64, device=device)
            probe = torch.where(index % 2 == 0, 1.0, -1.0) * (1 + index / width)
            probe = (1000 * (probe - probe.mean())).to(like.dtype)
            rms = probe.double().pow(2).mean().sqrt()
            once, twice = ((self._call(x[None])[0] - self.bias).double() for x in (probe, 2 * probe))
            self.normalizes = bool((twice - once).abs().sum() <= (twice - 2 * once).abs().sum())
            self.gain = (once / probe.double() * (rms if self.normalizes else 1.0)).to(like.dtype)
            of_constant = (self._call(torch.ones(1, width, dtype=dtype, device=device))[0] - self.bias).abs().mean()
        self.centres = bool(of_constant < 0.5 * self.gain.abs().mean())

    def scale(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        """What the norm multiplies `x` with, `1 / std` or `1 / rms`. Raises `ValueError` if its output has another form."""
        with torch.no_grad():
            y = self._call(x)
            if not bool(torch.isfinite(y).all()):
                raise ValueError(
                    f"{self._name}: expected finite activations, got NaN or inf; the weights may hold NaN, or the dtype overflow"
                )
            shape = self._centred(x) * self.gain
            scale = _along(y - self.bias, shape) if self.normalizes else torch.ones_like(shape[..., :1])
            error = float((scale * shape + self.bias - y).abs().max() / y.abs().max().clamp(min=1e-30))
        if not error <= tolerance("norm", x.dtype):
            raise ValueError(
                f"{self._name}: expected a norm of the form scale(x) * gain * x + bias, but {type(self._call).__name__} differs "
                f"from it by {error:.1e} of its output, so that its scale cannot be held fixed"
            )
        return scale

    def live_scale(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        """The same in the graph, so that gradients flow through the scale. The form is taken on trust: `scale` checks it."""
        shape = self._centred(x) * self.gain
        return _along(self._call(x) - self.bias, shape) if self.normalizes else torch.ones_like(shape[..., :1])

    def linear(self, v: Float[Tensor, "... d_model"], scale: Float[Tensor, "... 1"]) -> Float[Tensor, "... d_model"]:
        """What `v`, as one term of the norm's input, adds to its output: `scale * gain * v`, without the bias."""
        return scale * self.gain * self._centred(v)

    def pull_back(self, u: Float[Tensor, "... d_model"], scale: Float[Tensor, "... 1"]) -> Float[Tensor, "... d_model"]:
        """The direction `r` with `<r, v> = <u, linear(v)>` for every `v` (the transpose of `linear`)."""
        return self._centred(scale * self.gain * u)

    def _centred(self, v: Tensor) -> Tensor:
        return v - v.mean(-1, keepdim=True) if self.centres else v


def _along(y: Float[Tensor, "... d_model"], shape: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
    """By which factor `y` is `shape`, by least squares; 0 where `shape` is 0. Squares of tiny numbers are not taken."""
    largest = shape.detach().abs().amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    unit = shape / largest
    size = unit.pow(2).sum(-1, keepdim=True)
    return (y * unit).sum(-1, keepdim=True) / torch.where(size > 0, size, torch.ones_like(size)) / largest
