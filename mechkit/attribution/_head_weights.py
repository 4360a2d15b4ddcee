"""A head's weights with the norms around them folded in, and the check that the model computes with them.

Used by `head_circuits` and `head_scores`. Norms are measured from their modules (`FrozenNorm`), and so is the attention's scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._precision import tolerance, widen
from mechkit._version import __version__
from mechkit.engine import check_can_run
from mechkit.hooks import (
    SITES,
    FrozenNorm,
    HookedModel,
    adds_positions,
    head_bias,
    head_weight,
    post_norm,
    record,
    write_scale,
)
from mechkit.hooks import final_norm as frozen_final_norm
from mechkit.hooks._capture import capture
from mechkit.result import Result

CHUNK = 4096  # tokens embedded at once
_PROBES = 16
_WHICH: dict[str, Literal["q", "k", "v", "o"]] = {"Q": "q", "K": "k", "V": "v", "O": "o"}


@dataclass(frozen=True, eq=False)
class FoldedWeights:
    """One layer's attention weights with the norms' gains folded in, float32 at least. Every query head has its own copy of
    its key-value head's."""

    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "head d_model d_head"]
    W_V: Float[Tensor, "head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]


# -- from tokens to the residual stream and back -------------------------------------------------------------------------


@torch.no_grad()
def embeddings(model: HookedModel, tokens: Int[Tensor, "token"]) -> Float[Tensor, "token d_model"]:
    """What each token puts into the residual stream: what enters the first block of a one-token prompt, with the model's own
    scaling or norm of embeddings, less the positional embedding where it is added."""
    position, stream = "pos_embed.hook_out", SITES["resid_pre"].hook_name(0)
    added = adds_positions(model)
    with capture(model, [position, stream] if added else [stream], stop=stream) as kept:
        model.run(tokens[:, None].to(model.device))
    found = kept[stream][:, 0]
    return found - kept[position][:, 0] if added else found


def final_norm(model: HookedModel, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    """The final norm's gain and centring, with scale 1 and without its bias."""
    return _linear(frozen_final_norm(model, _like(model, model.d_model)), x)  # its form: see `check_linear_readout`


def read(model: HookedModel, layer: int, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """What the attention of `layer` reads if `x` is in the residual stream: the block's norm, exactly."""
    module = getattr(model.stack.blocks[layer], "ln1", None)
    return x if module is None else module.original_component(x)


def embedded_chunks(model: HookedModel, tokens: Tensor) -> Iterator[Tensor]:
    return (embeddings(model, part) for part in tokens.split(CHUNK))


def through_ov(
    model: HookedModel, layer: int, head: int, x: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row d_model"]:
    """What a head writes when it attends fully to `x` in the stream; of a norm behind the attention, gain and centring."""
    v = project(model, layer, x, "V")[:, head // (model.n_heads // model.n_kv_heads)]
    scale = write_scale(model.stack.blocks[layer])
    return _behind(model, layer, scale * (widen(v) @ widen(weight_of(model, layer, "W_O")[head])))


def _behind(model: HookedModel, layer: int, written: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    norm = post_norm(model, layer)
    return (
        written if norm is None else _linear(_frozen(model, norm, model.d_model, f"ln1_post of layer {layer}"), written)
    )


def block_norm(model: HookedModel, layer: int) -> FrozenNorm | None:
    module = getattr(model.stack.blocks[layer], "ln1", None)
    return None if module is None else _frozen(model, module, model.d_model, f"ln1 of layer {layer}")


def normed(norm: FrozenNorm | None, x: Tensor) -> Tensor:
    """`x` times the norm's scale. Centring and gain are in the folded weights."""
    return widen(x) if norm is None else widen(x) * widen(norm.scale(x))


def project(
    model: HookedModel, layer: int, x: Float[Tensor, "row d_model"], which: Literal["Q", "K", "V"]
) -> Float[Tensor, "row head d_head"]:
    """Queries, keys or values of every head for `x` in the stream; of each key-value head for K and V."""
    projected = einops.einsum(
        read(model, layer, x), weight_of(model, layer, f"W_{which}"), "row m, head m d -> row head d"
    )
    bias = head_bias(model, layer, _WHICH[which])
    projected = projected if bias is None else projected + bias
    return _across(_qk_norm(model, layer, which), projected, lambda module, y: module(y))


def _qk_norm(model: HookedModel, layer: int, which: str) -> Any | None:
    bridge = getattr(model.stack.blocks[layer].attn, f"{which.lower()}_norm", None)
    return None if bridge is None or which == "V" else bridge.original_component


def _across(norm: Any | None, x: Float[Tensor, "... head d"], apply: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """Applies a query or key norm: to each head by itself, or to all of them in one row (OLMo 2), as its weight is long."""
    if norm is None:
        return x
    weight = getattr(norm, "weight", None)
    if weight is None or weight.numel() == x.shape[-1]:
        return apply(norm, x)
    if weight.numel() != x.shape[-2] * x.shape[-1]:
        raise ValueError(
            f"model: expected query and key norms with {x.shape[-1]} or {x.shape[-2]} x {x.shape[-1]} weights, got "
            f"{list(weight.shape)} ({type(norm).__name__}): its queries and keys cannot be computed from its weights"
        )
    return apply(norm, x.flatten(-2)).reshape(x.shape)


def soft_capped(model: HookedModel, layer: int, scores: Tensor) -> Tensor:
    cap = _soft_cap(model, layer)
    return scores if cap is None else cap * torch.tanh(scores / cap)


def _soft_cap(model: HookedModel, layer: int) -> float | None:
    return getattr(model.stack.blocks[layer].attn.original_component, "attn_logit_softcapping", None)


# -- weights ---------------------------------------------------------------------------------------------------------------


def folded_weights(model: HookedModel, layers: Sequence[int]) -> Iterator[FoldedWeights]:
    """The folded weights of each layer in turn (see the module's docstring)."""
    shared = model.n_heads // model.n_kv_heads
    for layer in layers:
        norm = block_norm(model, layer)
        folded = {}
        for which in ("Q", "K", "V"):
            weight = widen(weight_of(model, layer, f"W_{which}"))
            weight = weight if norm is None else norm.pull_back(weight.mT, _one(weight)).mT
            weight = _across(_qk_norm(model, layer, which), weight.transpose(0, 1), _fold(model)).transpose(0, 1)
            folded[which] = weight if which == "Q" else weight.repeat_interleave(shared, 0)
        scale = write_scale(model.stack.blocks[layer])
        written = _behind(model, layer, scale * widen(weight_of(model, layer, "W_O")))
        yield FoldedWeights(W_Q=folded["Q"], W_K=folded["K"], W_V=folded["V"], W_O=written)


def weight_of(model: HookedModel, layer: int, name: str) -> Tensor:
    """`W_Q`, `W_K`, `W_V` `[head d_model d_head]` or `W_O` `[head d_head d_model]` of one layer."""
    return head_weight(model, layer, _WHICH[name[-1]]).detach()


def _fold(model: HookedModel) -> Callable[[Any, Tensor], Tensor]:
    return lambda module, x: _linear(_frozen(model, module, x.shape[-1], type(module).__name__), x)


def _frozen(model: HookedModel, module: Any, width: int, name: str) -> FrozenNorm:
    """A norm with its scale held fixed. Raises `ValueError` for one that is not of that form, as random vectors show."""
    norm = FrozenNorm(module, _like(model, width), name)
    noise = torch.randn(4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm.scale((noise * torch.tensor([0.1, 1.0, 3.0, 30.0])[:, None]).to(_like(model, width)))
    return norm


@torch.no_grad()
def probe_attention(model: HookedModel, layers: Sequence[int]) -> dict[int, float]:
    """Runs random vectors through each layer's attention, in prompts of one token, and checks it against its weights.

    Returns:
        The factor by which each layer multiplies the product of query and key.

    Raises:
        ValueError: training mode; queries, keys, values, scores or outputs that are not what the weights say.
    """
    check_can_run(model)
    first = torch.arange(_PROBES) % model.d_vocab
    noise = torch.randn(_PROBES, model.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = float(embeddings(model, first).double().pow(2).mean().sqrt()) or 1.0
    x = (noise * size).to(model.device, model.dtype)

    def first_position(activation: Tensor, name: tuple[str, int]) -> Tensor:
        return (activation[:, 0] if name[0] != "attn_scores" else activation[:, :, 0, 0]).clone()

    sites = [(site, layer) for layer in layers for site in ("v", "attn_scores", "z", "attn_out")]
    probes = [(SITES["resid_pre"].hook_name(layer), lambda _, hook: x[:, None].clone()) for layer in layers]
    with capture(model, sites, first_position, hooks=probes) as kept:
        record(model, first[:, None].to(model.device), blocks=False)
    scales = {}
    for layer in layers:
        q, k, v = project(model, layer, x, "Q"), project(model, layer, x, "K"), project(model, layer, x, "V")
        z = kept["z", layer].reshape(_PROBES, model.n_heads, model.d_head)
        written = einops.einsum(z, weight_of(model, layer, "W_O"), "row head d, head d m -> row m")
        bias, norm = head_bias(model, layer, "o"), post_norm(model, layer)
        written = (written if bias is None else written + bias) * write_scale(model.stack.blocks[layer])
        products = (widen(q) * widen(k).repeat_interleave(model.n_heads // model.n_kv_heads, 1)).sum(-1)
        scores = widen(kept["attn_scores", layer])
        scales[layer] = _scale(products, scores, _soft_cap(model, layer))
        _check(model, layer, "values", kept["v", layer].reshape(v.shape), v)
        _check(model, layer, "scores", scores, soft_capped(model, layer, scales[layer] * products))
        _check(model, layer, "output", kept["attn_out", layer], written if norm is None else norm(written))
    return scales


def _scale(products: Tensor, scores: Tensor, cap: float | None) -> float:
    """The factor between them, by least squares over those that are not capped. 1 where all are 0."""
    if cap is not None:
        free = scores.abs() < 0.9 * cap
        products, scores = products[free], cap * torch.atanh(scores[free] / cap)
    products, scores = products.double(), scores.double()
    total = float(products.pow(2).sum())
    return float((products * scores).sum()) / total if total > 0 else 1.0


def _check(model: HookedModel, layer: int, what: str, found: Tensor, expected: Tensor) -> None:
    error, size = float((found - expected).abs().max()), float(expected.abs().max())
    if not error <= tolerance("weights", model.dtype) * max(size, 1e-12):
        raise ValueError(
            f"model: the attention {what} of layer {layer} of {model.name} ({model.cfg.architecture}) differ from what its "
            f"weights say by {error:.1e} (largest {size:.1e}), so that its circuits cannot be read off its weights"
        )


def _like(model: HookedModel, width: int) -> Tensor:
    return torch.zeros(1, width, dtype=model.dtype, device=model.device)


def _one(x: Tensor) -> Tensor:
    return torch.ones(1, dtype=x.dtype, device=x.device)


def _linear(norm: FrozenNorm, x: Tensor) -> Tensor:
    return norm.linear(x, _one(x))


# -- results -----------------------------------------------------------------------------------------------------------


def weights_result(
    values: Tensor,
    coords: dict[str, tuple[Any, ...]],
    model: HookedModel,
    metric: str,
    unit: str,
    *,
    technique: str,
    baseline: dict[str, Tensor] | None = None,
    **given: Any,
) -> Result:
    """A result that was computed from weights alone."""
    return Result(
        values=values,
        dims=tuple(coords),
        coords=coords,
        baseline=baseline or {},
        base=next(iter(baseline), "") if baseline else "",
        metric=metric,
        unit=unit,
        provenance={
            "model": model.name,
            "revision": model.revision,
            "weights_hash": model.weights_hash,
            "dtype": str(model.dtype).removeprefix("torch."),
            "mechkit": __version__,
            "technique": technique,
            **given,
        },
    )
