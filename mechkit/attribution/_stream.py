"""What every component wrote into the residual stream where a metric reads, in one run of prompts of equal length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import einops
import torch
from jaxtyping import Float
from torch import Tensor

from mechkit.attribution._cells import check_final_norm
from mechkit.attribution._reading import TOLERANCE, Reading, read_direction
from mechkit.hooks import SITES, FrozenNorm, HookedModel, record
from mechkit.metrics import Metric
from mechkit.prompts import Prompts


def labels(model: HookedModel, over: str) -> tuple[str, ...]:
    if over == "cumulative":
        return ("embed", *(f"L{layer}" for layer in range(model.n_layers)), "bias")
    kinds = [kind for kind, site in (("attn", "attn_out"), ("mlp", "mlp_out")) if model.has_site(site)]
    inside = [f"L{layer} {kind}" for layer in range(model.n_layers) for kind in kinds]
    return ("embed", *(["pos_embed"] if _has_positions(model) else []), *inside, "bias")


_POS_EMBED = "hook_pos_embed"


def _has_positions(model: HookedModel) -> bool:
    """Whether positions are learned vectors that are added to the embedding (not rotations, nor a bias of the scores)."""
    return (
        bool(model.cfg.positional_embedding_type == "standard") and getattr(model.bridge, "pos_embed", None) is not None
    )


def _post_norm(model: HookedModel, layer: int, which: str) -> Any | None:
    """The norm that a block applies to its attention's or MLP's output before it is added (Gemma 2 and 3, OLMo 2)."""
    return getattr(model.bridge.blocks[layer], which, None)


def needed(model: HookedModel, over: str, index: Mapping[str, Sequence[Any]]) -> list[str]:
    """The activations that a split needs beside every component's output."""
    names = []
    for layer in index.get("layer", ()):
        site, norm = ("mlp_post", "ln2_post") if "neuron" in index else ("z", "ln1_post")
        names.append(SITES[site].hook_name(layer))
        if _post_norm(model, layer, norm) is not None:
            names.append(f"blocks.{layer}.{norm}.hook_in")
        if over.startswith("layer head "):
            names += [SITES[site].hook_name(layer) for site in ("pattern", "v")]
    return names


class StreamRun:
    """One run of prompts of equal length: what was written into the residual stream where the metric reads, and the reading.

    Attributes:
        kept: Activations by hook name, `[prompt …]` where the metric reads; `v` at all positions.
        final: The final residual stream where the metric reads, `[prompt d_model]`.
        reading: The metric as a direction.
        error: The largest error, so far, of a sum of terms that should be exact.
    """

    def __init__(
        self,
        model: HookedModel,
        prompts: Prompts,
        ids: Sequence[int],
        direction: Metric | Tensor,
        also: Sequence[str] = (),
    ) -> None:
        self.model, self.error = model, 0.0
        check_final_norm(model, "direct logit attribution")
        tokens = torch.stack([prompts.tokens[i] for i in ids]).to(model.device)
        which = torch.tensor(ids)
        positions = direction.positions if isinstance(direction, Metric) else prompts.lengths - 1
        everyone, read_at = torch.arange(len(ids), device=model.device), positions[which].to(model.device)
        sites = [site for site in ("attn_out", "mlp_out") if model.has_site(site)]
        self.outputs = [SITES[site].hook_name(layer) for layer in range(model.n_layers) for site in sites]
        embedding = ["blocks.0.hook_resid_pre", *([_POS_EMBED] if _has_positions(model) else [])]
        self.kept: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any, name: str) -> None:
            if name.endswith("hook_v"):
                self.kept[name] = activation.clone()
            elif name.endswith("hook_pattern"):
                self.kept[name] = activation[everyone, :, read_at]  # [prompt head source]
            else:
                self.kept[name] = activation.expand(len(ids), *activation.shape[1:])[everyone, read_at]

        names = dict.fromkeys([*embedding, *self.outputs, *also])
        with torch.no_grad(), model.hooks([(name, partial(keep, name=name)) for name in names]):
            final = record(model, tokens, blocks=False).resid[-1][everyone, read_at]
        self.final = final
        self.reading = read_direction(model, final, direction, which)

    def read_along(self, reading: Reading) -> None:
        """Reads this run along another run's direction: the value is then what its final stream gives there."""
        value = (reading.direction * self.final.to(reading.direction.dtype)).sum(-1) + reading.constant
        self.reading = replace(reading, value=value)

    @torch.no_grad()
    def split(self, over: str, index: Mapping[str, Sequence[Any]], named: Mapping[str, Tensor]) -> Tensor:
        """The metric's terms, `[*over prompt]`."""
        terms = self.components()
        if over == "component":
            return terms
        if over == "cumulative":
            a_layer = len(self.outputs) // self.model.n_layers
            first = len(terms) - len(self.outputs) - 2  # the last term of the embedding
            ends = [first + a_layer * layer for layer in range(self.model.n_layers + 1)]
            return terms.cumsum(0)[[*ends, len(terms) - 1]]
        split = self.neurons if "neuron" in index else self.heads
        return torch.stack([split(layer, index, named) for layer in index["layer"]])

    def components(self) -> Float[Tensor, "component prompt"]:
        """The term of every component, in the order of the labels. Their sum is the metric, or this raises `ValueError`."""
        embedding = [self.term(self.kept["blocks.0.hook_resid_pre"])]
        if _POS_EMBED in self.kept:
            positional = self.term(self.kept[_POS_EMBED])
            embedding = [embedding[0] - positional, positional]
        terms = torch.stack([*embedding, *(self.term(self.kept[name]) for name in self.outputs), self.reading.constant])
        self.check(
            terms.sum(0), self.reading.value, "its residual stream is not the sum of embedding and layers' outputs"
        )
        return terms

    def heads(
        self, layer: int, index: Mapping[str, Sequence[Any]], named: Mapping[str, Tensor]
    ) -> Float[Tensor, "head *src prompt"]:
        """Each head's term in one layer, or that split by source position."""
        attention = self.model.bridge.blocks[layer].attn
        direction, bias = self.before_post_norm(layer, "ln1_post")
        weight = attention.W_O.detach().to(direction.dtype)  # [head d_head d_model]
        reads = einops.einsum(weight, direction, "head d_head d_model, prompt d_model -> prompt head d_head")
        z = self.kept[SITES["z"].hook_name(layer)].to(reads.dtype)
        z = z.reshape(reads.shape)
        terms = (z * reads).sum(-1)  # [prompt head]
        b_O = getattr(attention, "b_O", None)
        rest = bias if b_O is None else bias + direction @ b_O.detach().to(direction.dtype)
        self.check(
            terms.sum(1) + rest,
            self.term(self.kept[SITES["attn_out"].hook_name(layer)]),
            f"the heads of layer {layer} do not sum to its attention output",
        )
        if "src" not in index and "position" not in index:
            return terms[:, index["head"]].T
        pattern = self.kept[SITES["pattern"].hook_name(layer)].to(reads.dtype)
        v = self.kept[SITES["v"].hook_name(layer)].to(reads.dtype)  # [prompt src kv_head d_head]
        v = v.reshape(*v.shape[:2], -1, reads.shape[-1]).repeat_interleave(reads.shape[1] // self.model.n_kv_heads, 2)
        sources = pattern * einops.einsum(v, reads, "prompt src head d_head, prompt head d_head -> prompt head src")
        self.check(sources.sum(-1), terms, f"a head's output in layer {layer} is not its pattern times its values")
        if "position" in index:
            at = torch.stack([named[name] for name in index["position"]], -1).to(sources.device)  # [prompt position]
            chosen = sources.gather(-1, at[:, None].expand(-1, sources.shape[1], -1))
        else:
            there = [i for i in index["src"] if i < sources.shape[-1]]
            chosen = sources.new_full((*sources.shape[:2], len(index["src"])), torch.nan)
            chosen[..., [k for k, i in enumerate(index["src"]) if i < sources.shape[-1]]] = sources[..., there]
        return chosen[:, index["head"]].permute(1, 2, 0)

    def neurons(
        self, layer: int, index: Mapping[str, Sequence[Any]], named: Mapping[str, Tensor]
    ) -> Float[Tensor, "neuron prompt"]:
        """Each neuron's term in one layer."""
        mlp = self.model.bridge.blocks[layer].mlp
        direction, bias = self.before_post_norm(layer, "ln2_post")
        activation = self.kept[SITES["mlp_post"].hook_name(layer)].to(direction.dtype).reshape(len(direction), -1)
        terms = activation * (direction @ mlp.W_out.detach().to(direction.dtype).T)  # [prompt neuron]
        b_out = getattr(mlp, "b_out", None)
        rest = bias if b_out is None else bias + direction @ b_out.detach().to(direction.dtype)
        self.check(
            terms.sum(1) + rest,
            self.term(self.kept[SITES["mlp_out"].hook_name(layer)]),
            f"the neurons of layer {layer} do not sum to its MLP output",
        )
        return terms[:, index["neuron"]].T

    def before_post_norm(self, layer: int, which: str) -> tuple[Tensor, Tensor]:
        """The reading's direction in front of a block's norm on its own output, its scale held fixed, and what the norm's bias
        adds; the reading's own direction where there is no such norm."""
        module = _post_norm(self.model, layer, which)
        direction = self.reading.direction
        if module is None:
            return direction, torch.zeros_like(self.reading.value)
        written = self.kept[f"blocks.{layer}.{which}.hook_in"]
        norm = FrozenNorm(module, written, f"{which} of layer {layer}")
        scale = norm.scale(written).to(direction.dtype)
        gained = norm.pull_back(direction.to(scale.dtype), scale).to(direction.dtype)
        return gained, direction @ norm.bias.to(direction.dtype)

    def term(self, written: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "prompt"]:
        """What a vector in the residual stream adds to the metric."""
        return (self.reading.direction * written.to(self.reading.direction.dtype)).sum(-1)

    def check(self, found: Tensor, expected: Tensor, what: str) -> None:
        """Keeps the largest error of a sum, and refuses one that rounding does not explain."""
        error = float((found - expected).abs().max())
        size = max(self.reading.scale, float(expected.abs().max()))
        if not error <= TOLERANCE[self.model.dtype] * size:
            raise ValueError(
                f"model: {what} ({self.model.cfg.architecture}: the metric's terms are off by {error:.1e})"
            )
        self.error = max(self.error, error)
