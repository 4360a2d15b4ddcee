"""Relevance propagation: inside `relevance_rules`, gradients flow back by these rules instead of by derivatives:

- norms: the scale is held fixed (LN rule);
- activation functions, y = f(x): the coefficient is y / x instead of f'(x) (identity rule);
- products of two activations (gated MLPs): each factor gets half (half rule);
- attention: the softmax and its products keep their gradient (`attention="gradient"`), or patterns are held fixed and nothing
  flows through queries and keys (`"frozen"`, the AH rule).

Jafari et al. 2025, https://arxiv.org/abs/2508.21258; Achtibat et al. 2024 (AttnLRP), https://arxiv.org/abs/2402.05602.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mechkit.engine import attached_hooks
from mechkit.hooks import SITES, FrozenNorm, HookedModel, check_linear_readout, mlp_weight

_NORMS = ("ln1", "ln2", "ln1_post", "ln2_post")


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
    """Inside, the model computes what it always does, and gradients flow back by the rules of this module."""
    check_linear_readout(model, "relevance propagation")
    hooks: list[tuple[str, Callable[..., Tensor | None]]] = []
    final = getattr(model.bridge, "ln_final", None)
    norms = [] if final is None else [("ln_final", final)]
    for layer, block in enumerate(model.stack.blocks):
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
