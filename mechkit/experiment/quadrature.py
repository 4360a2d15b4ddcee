"""Integrals of gradients along a straight path between two activations: the basis of integrated gradients.

For a path `x(a) = start + a (end - start)`, a from 0 to 1, each entry's share is `(end - start) * integral of dm/dx at x(a)`. The
shares sum to `m(end) - m(start)`, exactly for the integral (*completeness*); how far a sum of few steps is from it is measured.

Sundararajan, Taly and Yan 2017, https://arxiv.org/abs/1703.01365.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit.experiment.estimates import GradientChunk, Key, hook_name
from mechkit.metrics import Metric

Rule = Literal["left", "right", "midpoint", "gauss-legendre", "stretched"]
RULES = ("left", "right", "midpoint", "gauss-legendre", "stretched")
_STRETCH = 2.0


def quadrature(steps: int, rule: str) -> tuple[list[float], list[float]]:
    """Where on the path gradients are taken (0 = start, 1 = end), and their weights, which sum to 1.

    `"left"` takes `steps` points from 0 on, `"right"` up to 1, and their error falls as 1 / steps; `"midpoint"` the middles of
    equal steps, as 1 / steps^2; `"gauss-legendre"` is exact for polynomials of degree 2 steps - 1: best for few steps and smooth
    paths.
    `"stretched"` is Gauss-Legendre in a variable that runs slower in the middle of the path (a sinh): between two embeddings or
    residual streams nearly all change happens there, where the direction turns fastest. All converge to the same integral.
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(map(repr, RULES))}; got {rule!r}")
    if isinstance(steps, bool) or not hasattr(steps, "__index__") or steps < 1:
        raise ValueError(f"steps: expected a whole number of 1 or more, got {steps!r}")
    steps = steps.__index__()
    if rule in ("gauss-legendre", "stretched"):
        at, weight = np.polynomial.legendre.leggauss(steps)
        if rule == "stretched":
            weight = weight * np.cosh(_STRETCH * at)
            weight *= 2 / weight.sum()  # so that a constant gradient is integrated exactly
            at = np.sinh(_STRETCH * at) / np.sinh(_STRETCH)
        return ((at + 1) / 2).tolist(), (weight / 2).tolist()
    first = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[rule]
    return [(first + k) / steps for k in range(steps)], [1 / steps] * steps


def batches(chunk: GradientChunk, points: list[float], weights: list[float]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows `(prompt, point, weight)` of all prompts at some points of the path, as many points at once as the budget allows.

    A callable metric is given the prompts in their order and nothing else, so that it sees one point at a time.
    """
    n = len(chunk.everyone)
    at_once = max(1, chunk.rows // n) if isinstance(chunk.experiment.metric, Metric) else 1
    dtype, device = torch.promote_types(chunk.experiment.model.dtype, torch.float32), chunk.everyone.device
    for first in range(0, len(points), at_once):
        some = slice(first, first + at_once)
        k = len(points[some])
        point, weight = (
            torch.tensor(x[some], dtype=dtype, device=device).repeat_interleave(n) for x in (points, weights)
        )
        yield chunk.everyone.repeat(k), point, weight
        chunk.experiment.took_gradients(n * k)


def along_activation(
    chunk: GradientChunk,
    key: Key,
    start: Float[Tensor, "prompt *dims"],
    end: Float[Tensor, "prompt *dims"],
    hidden: Mapping[int, Tensor] | None,
    points: list[float],
    weights: list[float],
) -> Float[Tensor, "prompt"]:
    """Adds the integral along one layer's activation, with the base run for everything before it, to the experiment's effects.

    Args:
        hidden: What each block of the base run reads; `None` runs whole forward passes.

    Returns:
        Each prompt's sum over all entries of the activation, to be compared with `m(end) - m(start)`.
    """
    change, wide = end - start, chunk.experiment.values[chunk.experiment.base_is].dtype
    total = torch.zeros(len(chunk.everyone), dtype=wide, device=chunk.everyone.device)
    for row, point, weight in batches(chunk, points, weights):
        shape = (-1, *[1] * (start.ndim - 1))
        at = (start[row] + point.reshape(shape) * change[row]).to(start.dtype).detach().requires_grad_()
        share = change[row] * _gradient(chunk, key, at, row, hidden) * weight.reshape(shape)
        chunk.add(key, share, row)
        total = total.index_add(0, row, share.flatten(1).sum(1).to(total))
    return total


def _gradient(
    chunk: GradientChunk, key: Key, at: Tensor, row: Int[Tensor, "row"], hidden: Mapping[int, Tensor] | None
) -> Tensor:
    value = metric_with(chunk, key, at, row, hidden)
    return torch.autograd.grad(value.sum(), at)[0]


def metric_with(
    chunk: GradientChunk, key: Key, at: Tensor, row: Int[Tensor, "row"], hidden: Mapping[int, Tensor] | None
) -> Float[Tensor, "row"]:
    """The metric of base prompts in which one layer's activation is replaced by `at`."""

    def replace(activation: Tensor, hook: Any) -> Tensor:
        return at

    rows = chunk.inputs[chunk.experiment.base_is][row]
    read = None if hidden is None else hidden[key[1]][row]
    _, final = chunk.runs.forward(rows, row, [(hook_name(key), replace)], hidden=read, layer=key[1])
    return chunk.metric(final, row)
