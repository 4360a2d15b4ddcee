"""Direct logit attribution: how much of a metric each component wrote, straight into the final residual stream.

1. The final residual stream is a sum: embedding, positional embedding, and each layer's attention and MLP output.
2. With the final norm's scale held fixed, a logit difference is linear in it: `<direction, stream> + constant` (`_reading.py`).
3. Each component's term is its output times that direction. A head's output is `z W_O`, a neuron's is its activation times its
   row of `W_out`, and a head's share from one source position is `pattern * v W_O`. Where a block normalizes what it has
   computed before adding it (Gemma 2 and 3, OLMo 2), that norm's scale is held fixed too.

The terms of `over="component"` sum to the metric, and heads, sources and neurons to their component; how far they do not is
measured in every call, kept in the provenance (`residual_error`), and refused beyond rounding.

A caution. "Direct" is all that this sees: a later component may read what a head wrote and remove it, so that a head with a
large direct effect has no effect at all. `dla_erasure_check` measures that for a head.

Elhage et al. 2021, https://transformer-circuits.pub/2021/framework; the caution: Dao et al. 2023,
https://arxiv.org/abs/2310.07325.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import einops
import torch
from jaxtyping import Float
from torch import Tensor

from mechkit.attribution._cells import choose_indices, choose_positions, position_labels, provenance_of, split_prompts
from mechkit.attribution._reading import Direction, as_direction, read_direction
from mechkit.hooks import SITES, Budget, FrozenNorm, HookedModel, check_tokens, record
from mechkit.metrics import Metric
from mechkit.prompts import PromptPairs, Prompts
from mechkit.result import Cost, Result

OVER = ("component", "cumulative", "layer head", "layer head src", "layer head position", "layer neuron")
CAUTION = "direct effect only: later components may remove it (see dla_erasure_check)"
# Largest error of a sum of terms that rounding explains, relative to the logits' size.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def direct_logit_attribution(
    model: HookedModel,
    prompts: PromptPairs | Prompts,
    metric: Direction,
    over: str = "component",
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    positions: Sequence[int] | Sequence[str] | None = None,
    budget: int | None = None,
) -> Result:
    """Splits a metric into what each component wrote into the final residual stream, at the position that the metric reads.

    Args:
        model: In evaluation mode.
        prompts: The prompts to run: the clean ones of pairs.
        metric: One that is linear in the logits (`mk.logit_diff(pairs)`), a token (text or id) or one token for each prompt
            whose logit is meant, or a direction `[d_model]` or `[prompt d_model]` after the final norm (as a column of `W_U`
            is). Tokens and directions are read at each prompt's last position.
        over: What to split into:
            `"component"`: embedding, positional embedding where there is one, each layer's attention and MLP, and what the
            biases after the last layer add; these sum to the metric.
            `"cumulative"`: the reading of the residual stream after the embedding, after each layer, and with the biases
            (which is the metric).
            `"layer head"`: each head, without the attention's output bias.
            `"layer head src"`: each head, split by the source position whose value it moved; `"layer head position"` the same
            at the prompts' named positions.
            `"layer neuron"`: each MLP neuron, without the MLP's output bias.
        layers, heads, neurons, positions: Restrict these dims; positions are sources.
        budget: Bytes of working memory; default half of what the device has free (1 GiB on a CPU).

    Returns:
        A `Result` in the metric's unit with dims `("component", "prompt")`, or `(*over, "prompt")`. Positive: the component
        pushed the metric up. NaN at source positions that a prompt lacks. Provenance: `total`, the metric's mean, and
        `residual_error`, the largest error of the sums. See the module's docstring for what direct attribution cannot see.

    Raises:
        ValueError: a metric that is not linear in the logits; an architecture whose residual stream, heads or neurons do not
            sum to what they should (the message says where and by how much); training mode.
    """
    if over not in OVER:
        raise ValueError(f"over: expected one of {', '.join(map(repr, OVER))}; got {over!r}")
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode (dropout would be on). Call model.eval()")
    base, named, task = split_prompts(prompts)
    direction = as_direction(model, metric, base)
    for i, tokens in enumerate(base.tokens):
        check_tokens(model, tokens, f"prompt {i}")
    index = _chosen(model, base, named, over, layers, heads, neurons, positions)
    coords = {dim: tuple(labels) for dim, labels in index.items()}
    if over in ("component", "cumulative"):
        coords = {"component": _labels(model, over)}
    if "src" in coords:
        coords["src"] = position_labels(base, index["src"])
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    values = torch.full((*(len(labels) for labels in coords.values()), len(base)), torch.nan, dtype=wide)
    totals, error = torch.zeros(len(base)), 0.0
    room = Budget.of(model, budget)
    for length, ids in base.by_length().items():
        at_once = room.prompts_at_once(
            model, length, [("v", layer) for layer in index.get("layer", ()) if "src" in index]
        )
        for part in (ids[first : first + at_once] for first in range(0, len(ids), at_once)):
            run = _Run(model, base, part, direction, _needed(model, over, index))
            values[..., part] = run.split(over, index, {name: at[part] for name, at in named.items()}).to(values)
            totals[part], error = run.reading.value.cpu().float(), max(error, run.error)
    return Result(
        values=values,
        dims=(*coords, "prompt"),
        coords={**coords, "prompt": tuple(range(len(base)))},
        baseline={},
        base="",
        metric=direction.name if isinstance(direction, Metric) else "direction",
        unit=direction.unit if isinstance(direction, Metric) else "logits",
        provenance=provenance_of(
            model,
            base,
            technique="direct logit attribution",
            over=over,
            task=task,
            total=float(totals.mean()),
            residual_error=error,
            caution=CAUTION,
        ),
        cost=Cost(*[int(base.lengths.sum()) * model.n_layers] * 2),
    )


def _chosen(
    model: HookedModel,
    prompts: Prompts,
    named: Mapping[str, Tensor],
    over: str,
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    neurons: Sequence[int] | None,
    positions: Sequence[Any] | None,
) -> dict[str, Sequence[Any]]:
    """The indices of each dim of `over` (names for `position`); none for components."""
    dims = () if over in ("component", "cumulative") else tuple(over.split())
    given = (("layers", layers, {"layer"}), ("heads", heads, {"head"}), ("neurons", neurons, {"neuron"}))
    for name, chosen, wanted in (*given, ("positions", positions, {"src", "position"})):
        if chosen is not None and not wanted & set(dims):
            raise ValueError(f"{name}: given, but {' or '.join(sorted(wanted))} is not among the dims {over!r}")
    if "neuron" in dims and getattr(getattr(model.bridge.blocks[0], "mlp", None), "W_out", None) is None:
        raise ValueError(
            f"over: the MLPs of {model.name} ({model.cfg.architecture}) have no single output matrix whose rows are neurons, so "
            "they cannot be split into neurons; over='component' gives each MLP's total"
        )
    index: dict[str, Sequence[Any]] = {}
    for dim in dims:
        if dim == "position":
            index[dim] = choose_positions(named, positions)
        elif dim == "src":
            index[dim] = choose_indices("positions", positions, int(prompts.lengths.max()))
        elif dim == "neuron":
            index[dim] = choose_indices("neurons", neurons, model.width_of("mlp_post"))
        else:
            sizes = {"layer": (layers, model.n_layers), "head": (heads, model.n_heads)}
            index[dim] = choose_indices(dim + "s", *sizes[dim])
    return index


def _labels(model: HookedModel, over: str) -> tuple[str, ...]:
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


def _needed(model: HookedModel, over: str, index: Mapping[str, Sequence[Any]]) -> list[str]:
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


class _Run:
    """One run of prompts of equal length: what was written into the residual stream where the metric reads, and the reading.

    Attributes:
        kept: Activations by hook name, `[prompt …]` where the metric reads; `v` at all positions.
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
        self.reading = read_direction(model, final, direction, which)

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
