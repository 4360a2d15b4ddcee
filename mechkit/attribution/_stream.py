"""What every component wrote into the residual stream where a metric reads, in one run of prompts of equal length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import einops
import torch
from jaxtyping import Float
from torch import Tensor

from mechkit._precision import tolerance
from mechkit.attribution._reading import Reading, read_direction
from mechkit.hooks import (
    SITES,
    FrozenNorm,
    HookedModel,
    PostNorm,
    adds_positions,
    check_linear_readout,
    check_readout,
    head_bias,
    head_weight,
    into_post_norm,
    mlp_bias,
    mlp_weight,
    post_norm,
    record,
    write_scale,
)
from mechkit.hooks._capture import capture
from mechkit.metrics import Metric
from mechkit.prompts import Prompts


def labels(model: HookedModel, over: str) -> tuple[str, ...]:
    if over == "cumulative":
        return ("embed", *(f"L{layer}" for layer in range(model.n_layers)), "bias")
    inside = [f"L{layer} {kind}" for layer in range(model.n_layers) for kind, _ in written_in(model, layer)]
    return ("embed", *(["pos_embed"] if adds_positions(model) else []), *inside, "bias")


def written_in(model: HookedModel, layer: int) -> list[tuple[str, tuple[str, ...]]]:
    """What a layer writes into the residual stream, in turn: what that is called, and the full name of the hook that shows it.

    Where layers of a model differ, some have no attention, or nothing that shows what they write. What such a part writes is then
    the stream after it (the first of two hooks) less the stream before it.
    """
    here = {
        site for site in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out") if model.has_site(site, layer)
    }
    at = {site: SITES[site].hook_name(layer) for site in here}
    parts: list[tuple[str, tuple[str, ...]]] = []
    if len(model.layers_with("attn_out")) == model.n_layers:
        return [(kind, (at[site],)) for kind, site in (("attn", "attn_out"), ("mlp", "mlp_out")) if site in here]
    if not {"resid_mid", "mlp_out"} & here and {"resid_pre", "resid_post"} <= here:
        return [("block", (at["resid_post"], at["resid_pre"]))]
    if "attn_out" in here:
        parts.append(("attn", (at["attn_out"],)))
    elif {"resid_mid", "resid_pre"} <= here:
        parts.append(("mixer", (at["resid_mid"], at["resid_pre"])))
    if "mlp_out" in here:
        parts.append(("mlp", (at["mlp_out"],)))
    elif {"resid_mid", "resid_post"} <= here:
        parts.append(("mlp", (at["resid_post"], at["resid_mid"])))
    return parts


@dataclass(frozen=True)
class _Parts:
    """What an attention or an MLP consists of, where that is read, and what it sums to."""

    name: str
    site: str
    norm: PostNorm  # that a block may apply to the sum
    output: str
    output_name: str


_HEADS = _Parts("heads", "z", "ln1_post", "attn_out", "attention output")
_NEURONS = _Parts("neurons", "mlp_post", "ln2_post", "mlp_out", "MLP output")
_POS_EMBED = "hook_pos_embed"


def needed(model: HookedModel, over: str, index: Mapping[str, Sequence[Any]]) -> list[str]:
    """The activations that a split needs in addition to every component's output."""
    names = []
    for layer in index.get("layer", ()):
        part = _NEURONS if "neuron" in index else _HEADS
        names.append(SITES[part.site].hook_name(layer))
        if post_norm(model, layer, part.norm) is not None:
            names.append(into_post_norm(layer, part.norm))
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
        check_linear_readout(model, "direct logit attribution")
        rows = prompts.stack(ids).to(model.device)
        which = torch.tensor(ids)
        positions = direction.positions if isinstance(direction, Metric) else prompts.ends
        everyone, read_at = torch.arange(len(ids), device=model.device), positions[which].to(model.device)
        self.written = [[hooks for _, hooks in written_in(model, layer)] for layer in range(model.n_layers)]
        outputs = [name for layer in self.written for hooks in layer for name in hooks]
        model.check_site("resid_pre", [0])
        embedding = ["blocks.0.hook_resid_pre", *([_POS_EMBED] if adds_positions(model) else [])]

        def where_read(activation: Tensor, name: str) -> Tensor:
            if name.endswith("hook_v"):
                return activation.clone()
            if name.endswith("hook_pattern"):
                return activation[everyone, :, read_at]  # [prompt head source]
            return activation.expand(len(ids), *activation.shape[1:])[everyone, read_at]

        names = list(dict.fromkeys([*embedding, *outputs, *also]))
        with torch.no_grad(), capture(model, names, where_read) as self.kept:
            recorded = record(model, rows, blocks=False)
        check_readout(model, recorded, "direct logit attribution")
        self.final = recorded.resid[-1][everyone, read_at]
        self.reading = read_direction(model, self.final, direction, which)

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
            sizes = [len(layer) for layer in self.written]
            ends = [len(terms) - sum(sizes) - 2]  # the last term of the embedding
            for size in sizes:
                ends.append(ends[-1] + size)
            return terms.cumsum(0)[[*ends, len(terms) - 1]]
        split = self.neurons if "neuron" in index else self.heads
        return torch.stack([split(layer, index, named) for layer in index["layer"]])

    def components(self) -> Float[Tensor, "component prompt"]:
        """The term of every component, in the order of the labels. Their sum is the metric, or this raises `ValueError`."""
        embedding = [self.term(self.kept["blocks.0.hook_resid_pre"])]
        if _POS_EMBED in self.kept:
            positional = self.term(self.kept[_POS_EMBED])
            embedding = [embedding[0] - positional, positional]
        inside = [self.term_of(hooks) for layer in self.written for hooks in layer]
        terms = torch.stack([*embedding, *inside, self.reading.constant])
        self.check(
            terms.sum(0), self.reading.value, "its residual stream is not the sum of embedding and layers' outputs"
        )
        return terms

    def heads(
        self, layer: int, index: Mapping[str, Sequence[Any]], named: Mapping[str, Tensor]
    ) -> Float[Tensor, "head *src prompt"]:
        """Each head's term in one layer, or that split by source position."""
        direction, after = self.before_post_norm(layer, _HEADS.norm)
        scale = write_scale(self.model.stack.blocks[layer])
        weight = head_weight(self.model, layer, "o").detach().to(direction.dtype) * scale  # [head d_head d_model]
        reads = einops.einsum(weight, direction, "head d_head d_model, prompt d_model -> prompt head d_head")
        z = self.kept[SITES["z"].hook_name(layer)].to(reads.dtype)
        z = z.reshape(reads.shape)
        terms = (z * reads).sum(-1)  # [prompt head]
        self.check_parts(layer, _HEADS, terms, direction * scale, head_bias(self.model, layer, "o"), after)
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
        direction, after = self.before_post_norm(layer, _NEURONS.norm)
        weight, scale = mlp_weight(self.model, layer, "out"), write_scale(self.model.stack.blocks[layer])
        assert weight is not None  # looked at before anything is run
        activation = self.kept[SITES["mlp_post"].hook_name(layer)].to(direction.dtype).reshape(len(direction), -1)
        terms = scale * activation * (direction @ weight.detach().to(direction.dtype).T)  # [prompt neuron]
        self.check_parts(layer, _NEURONS, terms, direction * scale, mlp_bias(self.model, layer), after)
        return terms[:, index["neuron"]].T

    def before_post_norm(self, layer: int, which: PostNorm) -> tuple[Tensor, Tensor]:
        """The reading's direction in front of a block's norm on its own output, its scale held fixed, and what the norm's bias
        adds; the reading's own direction where there is no such norm."""
        module, direction = post_norm(self.model, layer, which), self.reading.direction
        if module is None:
            return direction, torch.zeros_like(self.reading.value)
        written = self.kept[into_post_norm(layer, which)]
        norm = FrozenNorm(module, written, f"{which} of layer {layer}")
        scale = norm.scale(written).to(direction.dtype)
        gained = norm.pull_back(direction.to(scale.dtype), scale).to(direction.dtype)
        return gained, direction @ norm.bias.to(direction.dtype)

    def term_of(self, hooks: tuple[str, ...]) -> Float[Tensor, "prompt"]:
        """The term of what a part of a layer wrote: of one activation, or of the first less the second."""
        first, *second = (self.term(self.kept[name]) for name in hooks)
        return first - second[0] if second else first

    def term(self, written: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "prompt"]:
        """What a vector in the residual stream adds to the metric."""
        return (self.reading.direction * written.to(self.reading.direction.dtype)).sum(-1)

    def check_parts(
        self,
        layer: int,
        parts: _Parts,
        terms: Float[Tensor, "prompt part"],
        direction: Float[Tensor, "prompt d_model"],
        bias: Float[Tensor, "d_model"] | None,
        after: Float[Tensor, "prompt"],
    ) -> None:
        """Refuses terms of all heads or neurons that, with the biases inside the block, do not sum to the block's output.

        Args:
            direction: The reading's, in front of the norm on the output, times the block's multiplier.
            bias: Of the attention or MLP, in front of that norm.
            after: What the norm's own bias adds to the metric.
        """
        rest = after if bias is None else after + direction @ bias.detach().to(direction.dtype)
        output = self.term(self.kept[SITES[parts.output].hook_name(layer)])
        what = f"the {parts.name} of layer {layer} do not sum to its {parts.output_name}"
        self.check(terms.sum(1) + rest, output, what)

    def check(self, found: Tensor, expected: Tensor, what: str) -> None:
        """Keeps the largest error of a sum, and refuses one that rounding does not explain."""
        error = float((found - expected).abs().max())
        size = max(self.reading.scale, float(expected.abs().max()))
        if not error <= tolerance("direction", self.model.dtype) * size:
            raise ValueError(
                f"model: {what} ({self.model.cfg.architecture}: the metric's terms are off by {error:.1e})"
            )
        self.error = max(self.error, error)
