"""From activations to logits, a few rows at a time: what the lenses share. All logits are never in memory at once.

1. The model runs once on prompts of equal length (again for more layers, where one prompt's activations exceed the budget).
   It unembeds one position. Only the positions that are read are kept, at each site.
2. A *row* is one position of one prompt. Rows go through the norm and the unembedding in chunks whose logits fit the budget,
   every layer and head of a chunk in turn.
3. Each cell's logits are reduced at once to the few numbers that were asked for.

Residual-stream sites get the model's own final norm and unembedding. Components (`attn_out`, `mlp_out`, a head's `result`) get
what they add to the logits: the final norm without its bias and with its scale held fixed at that row's final residual stream,
as in direct logit attribution. A soft cap of logits is held fixed at the same place, and so is the norm that a block applies
to its own output (Gemma 2 and 3, OLMo 2).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from mechkit._precision import tolerance, wide_dtype, widen
from mechkit._progress import Progress
from mechkit.engine import Budget, check_can_run
from mechkit.experiment.axes import Axes
from mechkit.experiment.positions import places_of
from mechkit.hooks import (
    SITES,
    FrozenNorm,
    HookedModel,
    check_linear_readout,
    check_readout,
    final_norm,
    into_post_norm,
    post_norm,
    record,
    write_scale,
)
from mechkit.hooks._capture import capture
from mechkit.hooks._nonfinite import where_it_began
from mechkit.prompts import Prompts

RESIDUAL = ("embed", "resid_pre", "resid_mid", "resid_post")
COMPONENTS = ("attn_out", "mlp_out", "result")
# Tensors of a chunk's logits that are alive at once: logits, log-probabilities, probabilities, the final layer's.
COPIES = 6

Logits = Callable[[Tensor | None], Tensor]  # token ids, or None for all of them -> this cell's logits [row token]


@runtime_checkable
class Translator(Protocol):
    """What a lens does to a residual stream before it is read (a `TunedLens`)."""

    def translate(self, layer: int, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]: ...


@dataclass(eq=False)
class LensChunk:
    """Some positions of some prompts, and what all cells read there share.

    Attributes:
        prompt: Index among all prompts.
        place: Index along the positions that are read.
        pos: The position in the prompt.
        final: The final residual stream there.
    """

    model: HookedModel
    prompt: Int[Tensor, "row"]
    place: Int[Tensor, "row"]
    pos: Int[Tensor, "row"]
    final: Float[Tensor, "row d_model"]

    @cached_property
    def norm(self) -> tuple[FrozenNorm, Tensor]:
        """The final norm and its scale at each row."""
        norm = final_norm(self.model, self.final)
        return norm, norm.scale(self.final)

    @cached_property
    def final_log_probs(self) -> Float[Tensor, "row d_vocab"]:
        """The model's own next-token distribution at each row."""
        return widen(self.model.unembed(self.final)).log_softmax(-1)

    def component_logits(self, written: Float[Tensor, "row d_model"], tokens: Tensor | None) -> Tensor:
        """What a vector in the residual stream adds to the logits `[row token]`, everything else being as it was."""
        norm, scale = self.norm
        weight, bias = self.model.W_U.detach(), self.model.b_U.detach()
        if tokens is not None:
            weight, bias = weight[:, tokens.to(weight.device)], bias[tokens.to(bias.device)]
        added = norm.linear(written, scale) @ weight
        probe = torch.tensor([1.0, 100.0], dtype=torch.float64)
        low, high = (self.model.scale_logits(probe) / probe).tolist()
        if low == high:
            return added * low
        raw = (norm.linear(self.final, scale) + norm.bias) @ weight + bias
        # Below 1e-3 the cap's factor is all but constant; so nothing is divided by 0.
        raw = torch.where(raw.abs() > 1e-3, raw, 1e-3)
        return added * (self.model.scale_logits(raw) / raw)


# (one cell's logits, the chunk) -> numbers [row width], and token ids [row width] if it has any
Reader = Callable[[Logits, LensChunk], tuple[Tensor, Tensor | None]]


@torch.no_grad()
def read_cells(
    model: HookedModel,
    prompts: Prompts,
    axes: Axes,
    named: Mapping[str, Tensor],
    read: Reader,
    *,
    width: int,
    n_logits: int,
    lens: Translator | None = None,
    budget: int | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor, int]:
    """Reads every cell of `axes` in every prompt.

    Args:
        axes: Of one of the sites above; without `pos` or `position` the last position is read.
        named: Named positions, for `position`.
        read: Reduces one cell's logits to `width` numbers per row.
        n_logits: Logits of a row that `read` asks for at most.
        lens: Translates residual streams first.

    Returns:
        Numbers `[*axes width prompt]` (NaN where a prompt lacks a position), token ids of the same shape (-1 there), and how
        many block-tokens were computed.

    Raises:
        ValueError: a model that these numbers would be wrong for, or NaN in its activations.
    """
    _check_model(model, prompts, axes)
    places = _places(axes, prompts, named)
    heads: Sequence[int | None] = axes.index.get("head", [None])
    shape = (len(axes.layers), len(heads), len(places), width, len(prompts))
    values = torch.full(shape, torch.nan, dtype=wide_dtype(model.dtype))
    ids = torch.full(shape, -1)
    room, computed = Budget.of(model, budget), 0
    rows = int((places >= 0).sum())
    with Progress(rows * shape[0], "row", progress) as bar:
        for group, members, length in _batches(model, prompts, axes, len(heads), len(places), room):
            computed += len(members) * length * model.n_layers
            kept = _Kept(model, prompts, axes, [axes.layers[i] for i in group], members, places)
            step = max(1, room.bytes // 2 // (COPIES * n_logits * values.element_size()))
            for first in range(0, len(kept.prompt), step):
                part = slice(first, first + step)
                chunk = LensChunk(model, kept.prompt[part], kept.place[part], kept.pos[part], kept.final[part])
                for i in group:
                    for j, head in enumerate(heads):
                        logits = kept.logits(chunk, part, axes.layers[i], head, lens)
                        found, tokens = read(logits, chunk)
                        where = (i, j, chunk.place, slice(None), chunk.prompt)
                        values[where] = found.to(values)
                        if tokens is not None:
                            ids[where] = tokens.cpu()
                    bar.update(len(chunk.prompt))
    return _ordered(values, axes, places), _ordered(ids, axes, places), computed


class _Kept:
    """One run's activations at the rows that are read."""

    def __init__(
        self,
        model: HookedModel,
        prompts: Prompts,
        axes: Axes,
        layers: Sequence[int],
        members: Sequence[int],
        places: Int[Tensor, "place prompt"],
    ) -> None:
        self.model, self.site = model, axes.site.name
        there = places[:, list(members)].T  # [member place]
        member, self.place = (there >= 0).nonzero(as_tuple=True)
        self.prompt, self.pos = torch.tensor(list(members))[member], there[member, self.place]
        heads, of_site = axes.index.get("head"), [self._name(layer) for layer in layers]

        def where_read(activation: Tensor, name: str) -> Tensor:
            at = activation[member.to(activation.device), self.pos.to(activation.device)]
            return at if heads is None or name not in of_site else at[:, heads]

        names = list(of_site)
        if axes.site.name == "result":
            names += [into_post_norm(layer) for layer in layers if post_norm(model, layer) is not None]
        self._heads = {head: j for j, head in enumerate(heads or ())}
        rows = prompts.stack(members).to(model.device)
        with capture(model, names, where_read) as self._activations:
            run = record(model, rows, blocks=False)
        self.final = run.resid[-1][member.to(run.resid[-1].device), self.pos.to(run.resid[-1].device)]
        for name, activation in (*self._activations.items(), ("the final residual stream", self.final)):
            if len(bad := (~torch.isfinite(activation)).flatten(1).any(1).nonzero().flatten().tolist()):
                at = int(member[bad[0]])
                raise ValueError(
                    f"model: expected finite activations, got NaN or inf in {name} of prompt {members[at]}; "
                    f"{where_it_began(model, rows[[at]])}"
                )
        check_readout(model, run, "a lens")

    def logits(self, chunk: LensChunk, part: slice, layer: int, head: int | None, lens: Translator | None) -> Logits:
        """A function that gives one cell's logits at a chunk's rows."""
        activation = self._activations[self._name(layer)][part].to(chunk.final.device)
        if self.site in RESIDUAL:
            resid = activation if lens is None else lens.translate(layer, activation)
            return partial(self.model.unembed, resid)
        if head is not None:
            activation = self._after_post_norm(activation[:, self._heads[head]], layer, part)
        return partial(chunk.component_logits, activation)

    def _after_post_norm(self, written: Float[Tensor, "row d_model"], layer: int, part: slice) -> Tensor:
        """What a head adds to the residual stream: its output, through the block's norm on it where there is one."""
        module = post_norm(self.model, layer)
        if module is None:
            return written
        whole = self._activations[into_post_norm(layer)][part].to(written.device)
        norm = FrozenNorm(module, whole, f"ln1_post of layer {layer}")
        return norm.linear(written, norm.scale(whole))

    def _name(self, layer: int) -> str:
        return SITES[self.site].hook_name(layer)


def _places(axes: Axes, prompts: Prompts, named: Mapping[str, Tensor]) -> Int[Tensor, "place prompt"]:
    """The position that each place is in each prompt; -1 where the prompt has none."""
    chosen = axes.index.get("position", axes.index.get("pos", [-1]))
    return places_of(prompts.lengths, named, chosen)


def _batches(
    model: HookedModel, prompts: Prompts, axes: Axes, n_heads: int, n_places: int, room: Budget
) -> Iterator[tuple[list[int], list[int], int]]:
    """Which layers (indices along the axis) and prompts go into one run, and those prompts' length."""
    size = torch.empty((), dtype=model.dtype).element_size()
    site, n_layers = axes.site.name, len(axes.layers)
    for batch in prompts.batches():
        length = batch.length
        a_layer = min(length, n_places) * n_heads * model.d_model * size
        at_once = max(1, min(n_layers, room.bytes // 2 // a_layer))
        for group in (list(range(i, min(i + at_once, n_layers))) for i in range(0, n_layers, at_once)):
            fits = room.prompts_at_once(model, length, [(site, axes.layers[i]) for i in group])
            fits = max(1, min(fits, room.bytes // 4 // (model.d_vocab * size)))  # their last positions are unembedded
            for part in batch.split(fits):
                yield group, part.ids, length


def _ordered(canonical: Num[Tensor, "layer head place width prompt"], axes: Axes, places: Tensor) -> Tensor:
    """`[*axes width prompt]`, in the order that the user wrote."""
    where = {"layer": 0, "head": 1, "pos": 2, "position": 2}
    order = [where[dim] for dim in axes.dims]
    absent = [axis for axis in range(3) if axis not in order]
    return canonical.permute(*absent, *order, 3, 4).reshape(*axes.shape, *canonical.shape[3:])


# -- refusing what would be wrong --------------------------------------------------------------------------------------


def _check_model(model: HookedModel, prompts: Prompts, axes: Axes) -> None:
    site = axes.site.name
    if site not in RESIDUAL + COMPONENTS:
        raise ValueError(f"site: expected one of {', '.join(RESIDUAL + COMPONENTS)}, got {site!r}")
    if (site == "result") != ("head" in axes.dims) or "neuron" in axes.dims:
        raise ValueError(
            f"over: expected {'' if site == 'result' else 'no '}'head' and no 'neuron' among the dims at site {site!r}, got "
            f"{' '.join(axes.dims)!r}. A head's contribution is at site 'result'"
        )
    check_can_run(model, {"prompt": prompts})
    if site in COMPONENTS:
        check_linear_readout(model, f"a lens of {site!r}")
        _check_parts(model, prompts, axes)


def _check_parts(model: HookedModel, prompts: Prompts, axes: Axes) -> None:
    """Whether attention and MLP outputs are what a block adds to the residual stream, and heads what they consist of."""
    sites = [site for site in ("resid_pre", "resid_post", "attn_out", "mlp_out") if model.has_site(site)]
    sites += ["result"] * (axes.site.name == "result")
    model.check_every_layer(["resid_pre", "resid_post"], "the lens of components")
    names = [SITES[s].hook_name(at) for s, at in itertools.product(sites, axes.layers) if model.has_site(s, at)]
    shortest = prompts.stack([min(range(len(prompts)), key=lambda i: len(prompts.tokens[i]))])
    with capture(model, names, lambda activation, _: activation[0, -1].clone()) as kept:
        record(model, shortest, blocks=False)
    for layer in axes.layers:
        at = {site: kept[SITES[site].hook_name(layer)] for site in sites if model.has_site(site, layer)}
        outputs = sum(at[site] for site in ("attn_out", "mlp_out") if site in at)
        stream = at["resid_post"] - at["resid_pre"]
        _check_close(model, outputs, stream, f"block {layer} does not add its attention's and its MLP's output")
        if "result" in at:
            scale = write_scale(model.stack.blocks[layer])
            heads = at["result"].sum(0) + model.b_O[layer].to(stream.device) * scale
            norm = post_norm(model, layer)
            heads = heads if norm is None else norm(heads[None])[0]
            _check_close(
                model, heads, at["attn_out"], f"the heads of layer {layer} do not sum to its attention's output"
            )


def _check_close(model: HookedModel, found: Any, expected: Tensor, what: str) -> None:
    error = float((found - expected.to(found.device)).abs().max())
    if not error <= tolerance("lens", model.dtype) * float(expected.abs().max()):
        raise ValueError(
            f"model: {what} ({model.cfg.architecture}: off by {error:.1e}), so a lens would show another model"
        )
