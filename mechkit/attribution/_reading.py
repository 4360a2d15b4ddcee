"""A metric as a direction in the final residual stream: `metric = <direction, residual stream> + constant`.

1. The metric's gradient with respect to the logits says which logits it adds and subtracts. A metric that is not linear in
   them (a probability, a divergence) has no such direction and is refused.
2. What comes between residual stream and logits is held fixed: the final norm's scale, and the factor by which a soft cap
   shrinks each logit (Gemma 2). With these fixed the way from residual stream to metric is linear, and exact at this run.
3. The norm's bias and the unembedding's bias are the constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._precision import tolerance, widen
from mechkit.engine import check_metric
from mechkit.experiment.provenance import pictures_of, provenance_of
from mechkit.hooks import HookedModel, final_norm
from mechkit.metrics import CallableMetric, Metric, makes_metrics, metric_for
from mechkit.prompts import PromptPairs, Prompts
from mechkit.result import Cost, Result

Direction = Metric | Callable[[PromptPairs], Metric] | str | int | Sequence[str | int] | Tensor


@dataclass(frozen=True, eq=False)
class Reading:
    """What a metric reads off the final residual stream of some prompts, at one position each.

    Attributes:
        direction: What a vector added to the residual stream adds to the metric, per unit.
        constant: What the biases after the residual stream add.
        value: The metric.
        scale: The size of the logits that it is made of, to judge rounding by; where what they sum cancels, that of their terms.
    """

    direction: Float[Tensor, "prompt d_model"]
    constant: Float[Tensor, "prompt"]
    value: Float[Tensor, "prompt"]
    scale: float


def as_direction(model: HookedModel, direction: Direction, pairs: PromptPairs | Prompts) -> Metric | Tensor:
    """A metric, or a direction `[prompt d_model]` in the space that the unembedding reads (after the final norm).

    Raises:
        ValueError: it is none of these, or does not fit the prompts.
    """
    prompts = pairs.clean if isinstance(pairs, PromptPairs) else pairs
    n = len(prompts)
    if not isinstance(direction, Tensor) and makes_metrics(direction):
        direction = metric_for(direction, pairs)  # type: ignore[arg-type, assignment]
    if isinstance(direction, Metric):
        direction.check(pairs)
        _ = direction.position  # refuses several
        check_metric(model, prompts, direction, ("clean",))
        return direction
    if isinstance(direction, Tensor) and direction.is_floating_point():
        if direction.shape not in ((model.d_model,), (n, model.d_model)):
            raise ValueError(
                f"metric: expected a direction [{model.d_model}] or [{n}, {model.d_model}] (d_model), got "
                f"{list(direction.shape)}"
            )
        if not bool(direction.isfinite().all()):
            raise ValueError("metric: expected a direction of finite numbers, got NaN or infinity in it")
        return direction.to(model.device, model.dtype).expand(n, -1)
    if isinstance(direction, CallableMetric) or callable(direction):
        raise ValueError(
            "metric: direct logit attribution must know which logits are read, so it takes one of mechkit's metrics "
            "(mk.logit_diff(pairs)), a token, or a direction in the residual stream; got a callable"
        )
    if isinstance(direction, Tensor):
        direction = direction.tolist()  # token ids
    if not isinstance(direction, str | int | Sequence):
        raise ValueError(
            f"metric: expected one of mechkit's metrics, a token, a token for each prompt, or a direction; got {direction!r}"
        )
    answers = [direction] * n if isinstance(direction, str | int) else list(direction)
    if len(answers) != n:
        raise ValueError(f"metric: expected one token, or one for each of {n} prompts; got {len(answers)}")
    ids = torch.tensor([model.to_single_token(a) if isinstance(a, str) else int(a) for a in answers])
    if int(ids.min()) < 0 or int(ids.max()) >= model.d_vocab:
        raise ValueError(f"metric: expected token ids in 0..{model.d_vocab - 1}, got {ids.tolist()}")
    tokens, which = ids.unique(return_inverse=True)

    def read(logits: Tensor, prompt: Tensor, _: Tensor | None) -> Tensor:
        return logits.gather(-1, which.to(logits.device)[prompt, None])[:, 0]

    return Metric("logit", "logits", n, prompts.ends, tokens, read, lengths=prompts.lengths)


def to_result(
    values: Float[Tensor, "*dims prompt"],
    coords: Mapping[str, tuple[int | str, ...]],
    model: HookedModel,
    prompts: Prompts,
    direction: Metric | Tensor,
    *,
    runs: int = 1,
    **provenance: Any,
) -> Result:
    """Terms of a reading as a `Result` without baselines.

    Args:
        coords: Labels of every dim but the prompt.
        runs: Forward passes of each prompt that it took.
    """
    return Result(
        values=values,
        dims=(*coords, "prompt"),
        coords={**coords, "prompt": tuple(range(len(prompts)))},
        baseline={},
        base="",
        metric=direction.name if isinstance(direction, Metric) else "direction",
        unit=direction.unit if isinstance(direction, Metric) else "logits",
        provenance=provenance_of(model, prompts, **provenance),
        cost=Cost(*[runs * int(prompts.lengths.sum()) * model.n_layers] * 2),
        pictures=pictures_of(prompts),
    )


def read_direction(
    model: HookedModel,
    resid: Float[Tensor, "prompt d_model"],
    direction: Metric | Tensor,
    prompt: Int[Tensor, "prompt"],
) -> Reading:
    """The reading of the final residual stream `resid` of some `prompt`s (indices into those of the direction).

    Raises:
        ValueError: the metric is not linear in the logits, or the model does something between residual stream and logits
            that cannot be held fixed.
    """
    with torch.no_grad():
        norm = final_norm(model, resid)
        scale = norm.scale(resid)
        normed = norm.linear(resid, scale) + norm.bias
        if isinstance(direction, Tensor):
            u = direction[prompt.to(direction.device)]
            value, per_logit = (u * normed).sum(-1), torch.zeros(())
            size = max(float(value.abs().max()), float((u * normed).norm(dim=-1).max()))
            constant = torch.zeros_like(value)
        else:
            tokens = direction.tokens
            weight = model.W_U if tokens is None else model.W_U[:, tokens.to(model.W_U.device)]
            bias = model.b_U if tokens is None else model.b_U[tokens.to(model.b_U.device)]
            raw = normed @ weight + bias
            logits = widen(model.unembed(resid, tokens))
            terms = (normed.square() @ weight.square()).sqrt()  # as large as logits are, unless what they sum cancels
            size = max(float(logits.abs().max()), float(terms.max()))
            _check_same(widen(model.scale_logits(raw)), logits, size, model.dtype)
            per_logit = linear_gradient(direction, logits, prompt)
            value = direction.read(logits, prompt, None)
            # A soft cap multiplies each logit with a factor of its own, which is held fixed as the norm's scale is.
            small = torch.full_like(raw, 1e-3)
            factor = torch.where(raw.abs() > 1e-3, model.scale_logits(raw) / raw, model.scale_logits(small) / small)
            u = (per_logit.to(raw.dtype) * factor) @ weight.T
            constant = (per_logit.to(raw.dtype) * factor * bias).sum(-1)
        return Reading(
            direction=widen(norm.pull_back(u, scale)),
            constant=widen(constant) + widen(u * norm.bias).sum(-1),
            value=widen(value),
            scale=max(size, 1e-30),
        )


def linear_gradient(
    metric: Metric, logits: Float[Tensor, "prompt token"], prompt: Int[Tensor, "prompt"]
) -> Float[Tensor, "prompt token"]:
    """The metric's gradient with respect to the logits; raises `ValueError` if the metric is not a linear function of them."""
    if metric.reference is not None:
        raise ValueError(
            f"metric: expected one that is linear in the logits, such as mk.logit_diff; {metric.name!r} compares with another run"
        )

    def value_and_gradient(at: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            at = at.clone()
            at = at.detach().requires_grad_()
            value = metric.read(at, prompt, None)
            if not value.requires_grad:
                raise ValueError(
                    f"metric: {metric.name!r} has no gradient with respect to the logits (a step function, or computed outside "
                    "torch's autograd); use a differentiable one such as mk.logit_diff"
                )
            return value.detach(), torch.autograd.grad(value.sum(), at)[0]

    generator, size = torch.Generator().manual_seed(0), logits.abs().mean().clamp(min=1e-3)
    draws = [torch.randn(logits.shape, dtype=logits.dtype, generator=generator).to(logits.device) for _ in range(4)]
    value, gradient = value_and_gradient(logits)
    for at, found in ((logits, value), *((x * size, value_and_gradient(x * size)[0]) for x in (-logits, *draws))):
        off = (found - (gradient * at).sum(-1)).abs().max()
        if not off <= 1e-4 * (gradient.abs() * at.abs()).sum(-1).max().clamp(min=1e-6):
            raise ValueError(
                f"metric: expected one that is a linear function of the logits, such as mk.logit_diff; {metric.name!r} is not, "
                "so that no split of it into components sums to it"
            )
    return gradient


def _check_same(found: Tensor, logits: Tensor, size: float, dtype: torch.dtype) -> None:
    allowed = tolerance("direction", dtype) * max(size, 1e-30)
    off = float((found - logits).abs().max())
    if not off <= allowed:
        raise ValueError(
            f"model: its logits are not the unembedding of its final norm's output (they differ by {off:.1e}): its head is more "
            "than a norm and a matrix, so that they cannot be attributed to what is written into the residual stream"
        )
