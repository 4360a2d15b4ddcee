"""RelP: attribution patching with the gradient replaced by a relevance coefficient (layer-wise relevance propagation).

A gradient says how the metric changes for an infinitely small step. Patching takes a large one, and the local slope of a norm,
an activation function or a product is a poor guide to it. Relevance propagation goes back with other coefficients:

- norms: the scale is held fixed (LN rule);
- activation functions, y = f(x): the coefficient is y / x instead of f'(x) (identity rule);
- products of two activations (gated MLPs): each factor gets half (half rule);
- attention: the softmax and its products keep their gradient (`attention="gradient"`), or patterns are held fixed and nothing
  flows through queries and keys (`"frozen"`, the AH rule).

With patterns frozen, a network without biases is accounted for in full, as a linear one is: coefficients times activations sum
to the metric at every depth. But a circuit that works by moving attention, as IOI's does, is then invisible. The rest is
`attribution_patching`: `effect = sum((source - base) * coefficient)`, one backward pass. Whether that is better than a gradient
depends on the model: `compare` it (on SmolLM2's IOI it is not, see the README).

Jafari et al. 2025, https://arxiv.org/abs/2508.21258; Achtibat et al. 2024 (AttnLRP), https://arxiv.org/abs/2402.05602.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mechkit._check import checked
from mechkit.attribution._cells import Chosen
from mechkit.attribution._nodes import AnyMetric, check_one_site, make_study
from mechkit.attribution.attribution_patching import first_order
from mechkit.hooks import (
    SITES,
    FrozenNorm,
    HookedModel,
    attached_hooks,
    check_linear_readout,
    frozen_parameters,
    get_site,
    mlp_weight,
    one_at_a_time,
)
from mechkit.prompts import PromptPairs
from mechkit.result import Result

_NORMS = ("ln1", "ln2", "ln1_post", "ln2_post")


@checked
@one_at_a_time
def relp(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    site: str = "z",
    over: str = "layer head",
    *,
    attention: Literal["gradient", "frozen"] = "gradient",
    direction: Literal["denoise", "noise"] = "denoise",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | Sequence[str] | None = None,
    neurons: Sequence[int] | None = None,
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """Estimates the metric after patching each node, with relevance coefficients in place of gradients.

    Args:
        model, pairs, metric, site, over, direction, layers, heads, positions, neurons: As for `attribution_patching`.
        budget, progress: As for `attribution_patching`.
        attention: What flows back through attention patterns: their `"gradient"`, or nothing (`"frozen"`).

    Returns:
        A `Result` like `attribution_patching`'s, dims `(*over, "prompt")`.

    Raises:
        ValueError: as `attribution_patching`; `site` is a query, key, score or pattern and these are frozen; a mixture of
            experts, for whose routing there is no rule; a norm that is neither a LayerNorm nor an RMSNorm.
    """
    check_one_site(site)
    if attention not in ("gradient", "frozen"):
        raise ValueError(f"attention: expected 'gradient' or 'frozen', got {attention!r}")
    if attention == "frozen" and get_site(site).name in ("q", "k", "attn_scores", "pattern"):
        raise ValueError(
            f"site: relevance does not flow through attention patterns, which are held fixed, so that {site!r} would get 0 "
            "everywhere; use attention='gradient', atp_star (its QK fix), or activation_patching"
        )
    chosen: Chosen = {"layers": layers, "heads": heads, "positions": positions, "neurons": neurons}
    about = {"technique": "relp", "attention": attention}
    study = make_study(model, pairs, metric, site, over, direction, chosen, budget, progress, about)
    with frozen_parameters(model):
        for chunk in study.chunks():
            with relevance_rules(model, attention):
                first_order(study, chunk)
    return study.result(next(iter(study.axes)))


class _Carried(torch.autograd.Function):
    """A value whose gradient goes back by given rules, whatever computed it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rules: Sequence[Callable[[Tensor], Tensor]], *inputs: Tensor) -> Tensor:
        ctx.rules = rules
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, None, *(rule(gradient) for rule in ctx.rules)


@contextmanager
def relevance_rules(model: HookedModel, attention: str) -> Iterator[None]:
    """Inside, the model computes what it always does, and gradients flow back by the rules above."""
    check_linear_readout(model, "relevance propagation")
    hooks: list[tuple[str, Callable[..., Tensor | None]]] = []
    final = getattr(model.bridge, "ln_final", None)
    norms = [] if final is None else [("ln_final", final)]
    for layer, block in enumerate(model.bridge.blocks):
        norms += [
            (f"blocks.{layer}.{name}", norm) for name in _NORMS if (norm := getattr(block, name, None)) is not None
        ]
        if attention == "frozen":
            hooks.append((SITES["pattern"].hook_name(layer), lambda pattern, hook: pattern.detach()))
        if model.has_site("mlp_post"):
            hooks += _mlp_rule(model, layer)
    for name, norm in norms:
        hooks += _norm_rule(model, name, norm)
    with attached_hooks(model, hooks):
        yield


def _norm_rule(model: HookedModel, name: str, module: Any) -> list[tuple[str, Callable[..., Tensor | None]]]:
    norm = FrozenNorm(module, torch.zeros(model.d_model, dtype=model.dtype, device=model.device), name)
    entering: list[Tensor] = []

    def keep(x: Tensor, hook: Any) -> None:
        entering[:] = [x]

    def carry(y: Tensor, hook: Any) -> Tensor | None:
        (x,) = entering
        entering.clear()
        if not x.requires_grad:
            return None
        return _Carried.apply(y, [partial(norm.pull_back, scale=norm.scale(x.detach()))], x)

    return [(f"{name}.hook_in", keep), (f"{name}.hook_out", carry)]


def _mlp_rule(model: HookedModel, layer: int) -> list[tuple[str, Callable[..., Tensor | None]]]:
    mlp = f"blocks.{layer}.mlp"
    if mlp_weight(model, layer, "out") is None:
        raise ValueError(
            f"model: {model.name} ({model.cfg.architecture}) routes its MLPs among experts, for which relevance propagation has "
            "no rule here; use attribution_patching or integrated_gradients"
        )
    inputs = [f"{mlp}.hook_pre"]
    if f"{mlp}.hook_pre_linear" in model.hook_names(lambda name: name.startswith(mlp)):
        inputs.append(f"{mlp}.hook_pre_linear")
    entering: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any, name: str) -> None:
        entering[name] = x

    def carry(y: Tensor, hook: Any) -> Tensor | None:
        values = [entering.pop(name) for name in inputs]
        if not values[0].requires_grad:
            return None
        shares = [_ratio(y.detach(), x.detach()) / len(values) for x in values]
        return _Carried.apply(y, [partial(torch.mul, share) for share in shares], *values)

    return [*((name, partial(keep, name=name)) for name in inputs), (f"{mlp}.hook_post", carry)]


def _ratio(y: Tensor, x: Tensor) -> Tensor:
    """y / x, and 0 where x is (nearly) 0 and carries nothing."""
    return torch.where(x.abs() > 1e-8, y / torch.where(x.abs() > 1e-8, x, torch.ones_like(x)), torch.zeros_like(y))
