"""The matrices that a model's projections really multiply with, for any module in their place.

A projection is nearly always a `Linear` (or GPT-2's `Conv1D`), whose `weight` is its matrix. Where an adapter was put around it
(LoRA: its output is the base layer's plus a low-rank term), or a scale, or weights are stored in few bits, the module's `weight`
attribute is not. Then the matrix is read off the module as a function, `f(identity) - f(0)`, and checked on random inputs: a
module that is not linear is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechkit._precision import tolerance

if TYPE_CHECKING:
    from mechkit.hooks._facts import Facts

Which = Literal["q", "k", "v", "o"]


@dataclass(frozen=True, eq=False)
class Affine:
    """`f(x) = x @ weight.T + bias`."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, "out"] | None


def is_plain_linear(module: Any) -> bool:
    """Whether a module computes `x @ weight.T + bias` and nothing else, known from its class."""
    return _runs(module, nn.Linear)


def is_plain(module: Any) -> bool:
    """The same, or GPT-2's `Conv1D`, whose weight is transposed."""
    from transformers.pytorch_utils import Conv1D

    return is_plain_linear(module) or _runs(module, Conv1D)


def _runs(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a call of a module is `kind.forward` and nothing else."""
    replaced = module.__dict__.get("_old_forward") or module.__dict__.get(
        "forward"
    )  # accelerate keeps the class's own there
    own = replaced is None or getattr(replaced, "__func__", None) is kind.forward
    theirs = [fn for fn in module._forward_pre_hooks.values() if not only_looks(fn)]
    return type(module).forward is kind.forward and own and not module._forward_hooks and not theirs


def only_looks(fn: Any) -> bool:
    """Whether a hook is mechkit's own, which keep what a module reads and change nothing."""
    return str(getattr(fn, "__module__", "")).startswith("mechkit.")


def affine(module: Any, width: int, like: Tensor, what: str) -> Affine:
    """A module as a matrix and a bias.

    Args:
        module: Any callable on `[... width]`.
        width: Entries of its input.
        like: Of the dtype of its input; the device is that of the module's parameters.
        what: What errors call it.

    Raises:
        ValueError: it is not linear.
    """
    if is_plain(module):
        weight = module.weight if is_plain_linear(module) else module.weight.T
        return Affine(weight, module.bias)
    devices = [p.device for p in module.parameters() if p.device.type != "meta"]
    x = _probes(width).to(devices[0] if devices else like.device, like.dtype)
    with torch.no_grad():
        y = module(x)
    stored, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    fits = isinstance(stored, Tensor) and stored.shape == (y.shape[-1], width) and stored.is_floating_point()
    if isinstance(stored, Tensor) and fits and stored.device.type != "meta":
        bias = bias if isinstance(bias, Tensor) else None
        if _equal(nn.functional.linear(x, stored.to(x), None if bias is None else bias.to(x)), y, like.dtype):
            return Affine(stored, bias)
    zero = module(torch.zeros_like(x[:1]))[0]
    weight = (module(torch.eye(width, dtype=x.dtype, device=x.device)) - zero).T
    if not _equal(nn.functional.linear(x, weight, zero), y, like.dtype):
        raise ValueError(
            f"model: expected {what} to be linear in what it reads, so that it is a matrix; {type(module).__name__} is not. If "
            "an adapter is on it, merge that into the weights first (merge_and_unload() in peft) and wrap the model again"
        )
    return Affine(weight, zero if bool((zero != 0).any()) else None)


def _probes(width: int) -> Float[Tensor, "row width"]:
    """Vectors small and large, sparse and not centred."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, width, generator=generator) * torch.tensor([0.1, 1.0, 1.0, 30.0]).repeat(2)[:, None]
    x[4:] += 0.5
    x[2] *= torch.rand(width, generator=generator) < 0.3
    return x


def _equal(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    size = (
        expected.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    )  # each row by itself: small inputs count as large ones do
    return bool(((found - expected).abs() / size).max() <= tolerance("projection", dtype))


# -- attention's projections, by head ----------------------------------------------------------------------------------------


def _parts(model: Facts, layer: int, which: Which) -> tuple[Any, Any]:
    """A layer's attention, and one of its projections; raises `ValueError` where there is none."""
    attention = getattr(model.stack.blocks[layer], "attn", None)
    projection = None if attention is None else getattr(attention, which, None)
    if getattr(projection, "original_component", None) is None:
        raise ValueError(
            f"model: expected attention with weights by head in layer {layer} of {model.name} ({model.cfg.architecture}), got no "
            f"W_{which.upper()}"
        )
    return attention, projection


def head_weight(model: Facts, layer: int, which: Which) -> Float[Tensor, "head a b"]:
    """`W_Q`, `W_K`, `W_V` `[head d_model d_head]` (the last two by key-value head) or `W_O` `[head d_head d_model]` of one
    layer."""
    attention, projection = _parts(model, layer, which)
    if which == "o":
        return output_weight(
            model.stack.blocks[layer], layer, model.n_heads, model.n_heads * model.d_head, _like(model)
        )
    if is_plain(projection.original_component):
        weight: Tensor = getattr(attention, f"W_{which.upper()}")
        if weight.ndim != 3:
            raise ValueError(
                f"model: expected attention with weights by head in layer {layer} of {model.name} ({model.cfg.architecture}), "
                f"got W_{which.upper()} {list(weight.shape)}"
            )
        return weight
    weight = _affine(model, layer, which).weight
    heads = model.n_heads if which == "q" else model.n_kv_heads
    return weight.reshape(heads, -1, weight.shape[1])[:, : model.d_head].mT  # a query's gate, if any, comes behind it


def output_weight(
    block: Any, layer: int | None, n_heads: int, width: int, like: Tensor
) -> Float[Tensor, "head d_head d_model"]:
    """`W_O` of a block by head; `width` is that of all heads' z together."""
    projection = block.attn.o
    matrix = affine(
        projection.original_component, width, like, f"the projection {projection.name} of layer {layer}"
    ).weight
    return matrix.T.reshape(n_heads, -1, matrix.shape[0])


def head_bias(model: Facts, layer: int, which: Which) -> Float[Tensor, "head d_head"] | Float[Tensor, "d_model"] | None:
    """`b_Q`, `b_K` or `b_V` by head, or `b_O`; `None` where there is none."""
    attention, projection = _parts(model, layer, which)
    if is_plain(projection.original_component):
        bias: Tensor | None = getattr(attention, f"b_{which.upper()}", None)
        return bias
    bias = _affine(model, layer, which).bias
    if bias is None or which == "o":
        return bias
    return bias.reshape(model.n_heads if which == "q" else model.n_kv_heads, -1)[:, : model.d_head]


def _affine(model: Facts, layer: int, which: Which) -> Affine:
    _, projection = _parts(model, layer, which)
    width = model.n_heads * model.d_head if which == "o" else model.d_model
    what = f"the projection {projection.name} of layer {layer}"
    return affine(projection.original_component, width, _like(model), what)


def _like(model: Facts) -> Tensor:
    return torch.zeros((), dtype=model.dtype, device=model.device)


# -- other matrices ----------------------------------------------------------------------------------------------------------


def mlp_weight(model: Facts, layer: int, which: Literal["in", "gate", "out"]) -> Tensor | None:
    """`W_in` and `W_gate` `[d_model d_mlp]`, `W_out` `[d_mlp d_model]` of a layer; `None` where the bridge has none."""
    mlp = getattr(model.stack.blocks[layer], "mlp", None)
    module = getattr(getattr(mlp, which, None), "original_component", None)
    if module is None or is_plain(module):
        stored: Tensor | None = getattr(mlp, f"W_{which}", None)
        return stored
    width = int(getattr(module, "in_features", model.d_mlp)) if which == "out" else model.d_model
    return affine(module, width, _like(model), f"the projection {getattr(mlp, which).name} of layer {layer}").weight.T


def mlp_bias(model: Facts, layer: int) -> Float[Tensor, "d_model"] | None:
    """`b_out` of a layer's MLP; `None` where there is none."""
    mlp = model.stack.blocks[layer].mlp
    module = getattr(getattr(mlp, "out", None), "original_component", None)
    if module is None or is_plain(module):
        stored: Tensor | None = getattr(mlp, "b_out", None)
        return stored
    width = int(getattr(module, "in_features", model.d_mlp))
    return affine(module, width, _like(model), f"the projection {mlp.out.name} of layer {layer}").bias


def unembedding(model: Facts) -> Affine:
    """What the unembedding multiplies with. Raises `ValueError` where the head is not a matrix."""
    module = model.bridge.unembed.original_component
    return affine(module, model.d_model, _like(model), f"the head ({model.bridge.unembed.name})")


def embedding(model: Facts) -> Float[Tensor, "d_vocab d_model"]:
    """The rows that tokens are looked up in. Raises `ValueError` where something else than an `Embedding` looks them up."""
    module = model.bridge.embed.original_component
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    if not tables or tables[0] is module:
        stored: Tensor = model.bridge.W_E
        return stored
    rows: Tensor = module(torch.arange(model.d_vocab, device=tables[0].weight.device))
    if type(tables[0]).forward is not nn.Embedding.forward or rows.shape != tables[0].weight.shape:
        raise ValueError(
            f"model: expected tokens to be looked up in a table, got {type(module).__name__}. If an adapter is on the embedding, "
            "merge it into the weights first (merge_and_unload() in peft) and wrap the model again"
        )
    return rows


# -- whether they are still where they were ----------------------------------------------------------------------------------


Place = tuple[int, str, str]  # layer, part of the block, projection


def in_place(bridge: Any) -> dict[Place, Any]:
    """The projections that stand where the Hugging Face module has them, as a bridge or as they were; with the module itself
    where TransformerLens runs copies of its parts (queries, keys and values in one matrix)."""
    found: dict[Place, Any] = {}
    for layer, block in enumerate(getattr(bridge, "blocks", ())):
        for part in ("attn", "mlp"):
            container = getattr(block, part, None)
            inside = getattr(container, "original_component", None)
            for name, projection in dict(getattr(container, "submodules", {})).items():
                here = None if inside is None else _stands_there(inside, getattr(projection, "name", None))
                if here is not None and here in (projection, getattr(projection, "original_component", None)):
                    found[layer, part, name] = projection.original_component if name == "qkv" else None
    return found


def _stands_there(module: Any, name: str | None) -> Any:
    for part in (name or "").split("."):
        module = getattr(module, part, None) if part else None
    return module


def check_in_place(model: Any) -> None:
    """Raises `ValueError` if a projection was exchanged since the model was wrapped, such as for one with an adapter."""
    before, now = model._in_place, in_place(model.bridge)
    for (layer, part, name), module in before.items():
        if (layer, part, name) in now and now[layer, part, name] is module:
            if name == "o" and not is_plain(getattr(model.stack.blocks[layer], part).o.original_component):
                _check_flag(model, layer)
            continue
        container = getattr(model.stack.blocks[layer], part)
        projection = getattr(container, name)
        there = _stands_there(container.original_component, projection.name)
        kind = type(getattr(there, "original_component", there)).__name__
        if kind.endswith("Bridge"):
            raise ValueError(
                f"model: what {model.name} wraps was wrapped a second time, which put new hook points into it. Use the newer "
                "wrapper, or wrap a copy (copy.deepcopy) the second time"
            )
        raise ValueError(
            f"model: {projection.name!r} of layer {layer} was exchanged for a {kind} after the model was wrapped, so that hooks "
            "and weights are those of another model. Put adapters on before wrapping, or merge them (merge_and_unload() in "
            "peft), and wrap the model again"
        )


def _check_flag(model: Any, layer: int) -> None:
    """TransformerLens's own results are computed from the stored weight, and the whole model with them."""
    if getattr(getattr(model.stack.blocks[layer].attn, "config", None), "use_attn_result", False):
        raise ValueError(
            f"model: the output projection of layer {layer} is more than its stored weight (an adapter?), but TransformerLens "
            "computes with that alone where use_attn_result is set. Call bridge.set_use_attn_result(False): 'result' needs none"
        )


# -- what a block does to a projection's output ------------------------------------------------------------------------------


def write_scale(block: Any) -> float:
    """The constant that a block multiplies its attention's and its MLP's output with before adding it (Granite); mostly 1."""
    return float(getattr(block, "residual_contribution_scale", 1.0))
