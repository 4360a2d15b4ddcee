"""Gradients of base prompts of several lengths in one forward and one backward pass over packed tokens.

`GradientRuns` runs prompts of one length at a time. Where lengths are many, each of its passes has few tokens, and a processor
takes nearly as long for few as for many. Here

1. the *source* prompts are run whole, those of each length together, by the model itself. That gives what is read of them, and,
   since a base prompt is its source prompt until their first different token, each base prompt's keys and values before that;
2. the base prompts run from their own first different token on, all of them packed (`mechkit.engine._packed`), with gradients.

What this assumes beyond `GradientRuns`: what `PackedReplayer` does; that the sites are what modules of a plain block read or
give; and that gradients flow through all of it. So the base prompt of each length that differs first is run whole too, by the
model itself, with its hook points (others too: `PackedGradients._sampled`): its run must agree with the source prompt's until
they differ, and the packed run must give what it gives, at the end and at each site (`PackedGradients.refuted`). And in each call
prompts of one length, which begin at different positions if any do, are run whole with gradients: given the same gradient at
their ends, the same must arrive at each site (`PackedGradients.gradients_refuted`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._precision import Compared, Rounding, tolerance, widen
from mechkit.engine._causality import agree_before_difference, same_so_far
from mechkit.engine._gradients import LOOKS_AHEAD, GradientRuns
from mechkit.engine._packed import _PROJECTIONS, PackedReplayer
from mechkit.engine._packed_attention import TokensNumbered, register
from mechkit.engine._packed_together import AttentionTogether, GeometryTogether
from mechkit.engine._packing import PackedRows
from mechkit.engine._plain import PACKED, PlainBlocks
from mechkit.engine._replay import Replayer
from mechkit.hooks._capture import capture, keepers
from mechkit.hooks._devices import to_device
from mechkit.hooks._hooking import Hooks, hook_points
from mechkit.hooks._readout import unembeds_final_stream
from mechkit.hooks._record import CannotReplayError, Run, record
from mechkit.hooks._sites import SITES
from mechkit.prompts import Stacked

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel

Key = tuple[str, int]  # site, layer
Tap = Callable[[Key, Tensor], None]

_BETWEEN = ("resid_pre", "resid_post")  # what a block reads and gives
_BY_MODULE = ("attn_out", "resid_mid", "mlp_pre", "mlp_post", "mlp_out")  # what some module in it reads or gives
SITES_PACKED = (*_BETWEEN, *_BY_MODULE, *_PROJECTIONS)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of one length that are recorded together.

    Attributes:
        base, source: Their prompts, on the model's device.
        ids: Which of all prompts they are.
        start: The first position of each at which anything may differ, not descending.
    """

    base: Stacked
    source: Stacked
    ids: Int[np.ndarray, "prompt"]
    start: Int[np.ndarray, "prompt"]

    @property
    def length(self) -> int:
        return self.base.tokens.shape[1]


@dataclass(frozen=True, eq=False)
class _Sample:
    """A base prompt's whole run, from where it is packed on.

    Attributes:
        row: Which of the packed rows it is.
        sites: Its activations, `[pos *dims]`.
        final: What it ends in.
    """

    row: int
    sites: dict[Key, Float[Tensor, "pos ..."]]
    final: Float[Tensor, "pos d_model"]


class PackedGradients(PackedReplayer):
    """Base prompts from their first different tokens on, packed, and what their source prompts' runs have there.

    Args:
        model: In evaluation mode.
        pairs: Pairs of each length.
        keys: Which activations are wanted, by `(site, layer)`; sites that are among `SITES_PACKED`.
        trial: Whether to try one row first, before all are recorded.

    Attributes:
        rows: The packed rows: one for each pair, in the order of `pairs`.
        source: The source runs' activations at the rows' tokens, `[token *dims]`.
        source_final: What the source runs end in there.

    Raises:
        CannotReplayError: or another of `CANNOT_RUN`, where the model's blocks cannot be run like this.
    """

    def __init__(self, model: HookedModel, pairs: Sequence[Pairs], keys: Sequence[Key], trial: bool = True) -> None:
        register()
        self.model, self.pairs, self.keys = model, pairs, list(keys)
        self.plain, self._tokens = PlainBlocks(model.stack, PACKED), 0
        self.chunks, self.by_start, self.runs, self._tables = [], [], [], {}
        self._whole_tokens = 0
        one = [np.full(len(some.ids), number) for number, some in enumerate(pairs)]
        chunk = np.concatenate(one)
        self.rows = PackedRows(
            cell=np.zeros(len(chunk), np.int64),
            chunk=chunk,
            prompt=np.concatenate([np.arange(len(some.ids)) for some in pairs]),
            prompt_id=np.concatenate([some.ids for some in pairs]),
            start=np.concatenate([some.start for some in pairs]),
            length=np.array([some.length for some in pairs])[chunk],
        )
        self._modules = {key: self._module(*key) for key in self.keys if key[0] not in _BETWEEN}
        self._samples: list[_Sample] = []
        self._read = min(layer for _, layer in self.keys)  # the first block that gradients are wanted of
        recorded = []
        for number in range(len(pairs)):
            recorded.append(self._recorded(number))
            if number == 0 and trial:
                self._try(recorded[0][0])
        self._embedded = torch.cat([embedded for embedded, *_ in recorded])
        self.source_final = torch.cat([final for _, final, _ in recorded])
        self.source = {key: torch.cat([sites.pop(key) for *_, sites in recorded]) for key in self.keys}

    @property
    def block_tokens(self) -> int:
        return self._whole_tokens + self._tokens

    # -- whole runs ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _recorded(self, number: int) -> tuple[Tensor, Tensor, dict[Key, Tensor]]:
        """Runs the source prompts of one length, and some base prompts (`_sampled`). Returns, at the rows' tokens, what the first
        block reads of the base prompts, what the source runs end in, and their activations."""
        some, mine = self.pairs[number], np.flatnonzero(self.rows.chunk == number)
        n, rows = len(mine), self.rows[mine]
        sampled = self._sampled(number)
        base = some.base[torch.from_numpy(sampled)]
        each, whole = rows[sampled], np.arange(n, n + len(sampled))
        row = np.append(np.repeat(np.arange(n), rows.suffix), np.repeat(whole, each.suffix))
        pos = np.append(rows.position, each.position)
        kept: dict[Key, Tensor] = {}

        def at_tokens(activation: Tensor, name: object) -> Tensor:
            if activation.shape[:2] != (n + len(sampled), some.length):
                raise CannotReplayError(f"{name} is not computed for each token")
            return activation[to_device(row, activation.device), to_device(pos, activation.device)]

        with Hooks(self.model.bridge) as attached:
            for name, fn in keepers(self.keys, kept, at_tokens):
                attached.attach(name, fn)
            run = record(self.model, Stacked.cat([some.source, base]))
        self._whole_tokens += run.tokens.numel() * self.model.n_layers
        self._check(run, base, some.source, sampled)
        entering = ("resid_pre", 0)
        with capture(self.model, [entering], at_tokens_of(rows), stop=entering) as embedded:
            self.model.run(some.base)
        final = at_tokens(run.resid[-1], "the final stream")
        n_tokens = rows.n_tokens
        for one, first, size in zip(sampled, each.first + n_tokens, each.suffix, strict=True):
            at = slice(int(first), int(first + size))
            self._samples.append(_Sample(int(mine[one]), {key: kept[key][at].clone() for key in kept}, final[at]))
        small = [stream[:1, :1].clone() for stream in run.resid]  # the rest of them is not needed
        self.runs.append(replace(run, resid=small, last_logits=run.last_logits[:1]))
        return embedded[entering], final[:n_tokens], {key: value[:n_tokens] for key, value in kept.items()}

    def _sampled(self, number: int) -> Int[np.ndarray, "sample"]:
        """Which base prompts of a length are run whole: the one that differs first and, if that is at once, the first of those
        that have a beginning in common with their source prompt, since only they show what a beginning is taken for; and of the
        last length the one whose tokens come last, since a block that numbers them gives the first ones the right numbers."""
        some = self.pairs[number]
        same = same_so_far(some.base, some.source).sum(1).cpu().numpy()
        chosen = [int(same.argmin())]
        later = np.flatnonzero((same > 0) & (some.start > 0))
        if some.start[chosen[0]] == 0 and len(later):
            chosen.append(int(later[same[later].argmin()]))
        if number == len(self.pairs) - 1:
            chosen.append(len(same) - 1)
        return np.unique(chosen)

    def _check(self, run: Run, base: Stacked, sources: Stacked, sampled: Int[np.ndarray, "sample"]) -> None:
        Replayer(self.model, run, None)  # refuses what cannot be replayed
        if run.between:
            raise CannotReplayError("the model adds to the residual stream between its blocks")
        source, final = sources[torch.from_numpy(sampled)], run.resid[-1]
        others = final[to_device(sampled, final.device)]
        if not bool(agree_before_difference(base, source, final[-len(sampled) :], others).all()):
            raise CannotReplayError(LOOKS_AHEAD)
        if not unembeds_final_stream(self.model, run, n=1):
            raise CannotReplayError("the logits are not a function of the last block's output")

    # -- packed runs ---------------------------------------------------------------------------------------------------

    def forward(self, tap: Tap) -> tuple[Tensor, Float[Tensor, "token d_model"]]:
        """Runs the base prompts from where each starts. Gradients flow back to the first block that has one of the sites.

        Args:
            tap: Is given each site and what it is at the packed tokens: the very tensor that the block goes on with.

        Returns:
            What that block reads, for `torch.autograd.grad`, and what the runs end in.
        """
        hidden, wanted, leaf = self._embedded, set(self.keys), None
        geometry = GeometryTogether(self.rows, self.model.dtype, hidden.device)
        for layer in range(self.model.n_layers):
            hidden = hidden.to(self._device(layer))
            if layer == self._read:
                leaf = hidden = hidden.detach().requires_grad_()
            if ("resid_pre", layer) in wanted:
                tap(("resid_pre", layer), hidden)
            with torch.set_grad_enabled(leaf is not None), self._tapped(layer, tap):
                hidden = self._together(layer, hidden, geometry)
            if ("resid_post", layer) in wanted:
                tap(("resid_post", layer), hidden)
        assert leaf is not None
        return leaf, hidden

    def _together(self, layer: int, hidden: Tensor, geometry: GeometryTogether) -> Float[Tensor, "token d_model"]:
        return self._call(layer, hidden, geometry.rows, AttentionTogether(self.runs, layer, geometry), geometry)

    @torch.no_grad()
    def _try(self, embedded: Float[Tensor, "token d_model"]) -> None:
        """Runs the first length's sample packed, before all others are recorded; raises where that is of no use."""
        one = self._samples[0]
        hidden, row = embedded[self._tokens_of(one.row)], self.rows[np.array([one.row])]
        geometry = GeometryTogether(row, self.model.dtype, hidden.device)
        with TokensNumbered(row.n_tokens):
            for layer in range(self.model.n_layers):
                hidden = self._together(layer, hidden.to(self._device(layer)), geometry)
        if (why := self._other_end(hidden, one)) is not None:
            raise CannotReplayError(why)

    def shaped(self, key: Key, activation: Float[Tensor, "... token width"]) -> Float[Tensor, "token *dims"]:
        """An activation (or its gradient) of packed tokens with the axes of its site behind the tokens'."""
        flat = activation.reshape(self.rows.n_tokens, -1)
        return flat.unflatten(1, (-1, self.model.stack.width_of(*key))) if "head" in SITES[key[0]].dims else flat

    def _module(self, site: str, layer: int) -> tuple[Any, bool]:
        """The plain module that gives (`True`) or reads a site."""
        found: tuple[Any, bool] | None
        if site in _PROJECTIONS:
            projection = self.plain.projection(layer, _PROJECTIONS[site])
            found = None if projection is None else (projection, site != "z")
        else:
            found = self.plain.at(layer, hook_points(self.model.bridge).get(SITES[site].hook_name(layer)))
        if found is None:
            raise CannotReplayError(f"{site!r} is not what a module of its blocks reads or gives")
        return found

    @contextmanager
    def _tapped(self, layer: int, tap: Tap) -> Iterator[None]:
        """Calls `tap` inside, as the plain block computes its sites."""
        left = {key for key in self._modules if key[1] == layer}
        handles = []

        def seen(key: Key, activation: Any) -> None:
            activation = activation[0] if isinstance(activation, tuple | list) else activation
            if key not in left or activation.numel() % self.rows.n_tokens:
                raise CannotReplayError(f"{key[0]!r} is not computed once for each token")
            left.discard(key)
            tap(key, activation)

        for key in sorted(left):
            module, gives = self._modules[key]
            if gives:
                handle = module.register_forward_hook(lambda _, __, output, key=key: seen(key, output))
            else:
                handle = module.register_forward_pre_hook(
                    lambda _, args, named, key=key: seen(key, args[0] if args else next(iter(named.values()))),
                    with_kwargs=True,
                )
            handles.append(handle)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if left:
            raise CannotReplayError(f"{sorted(left)} are not computed by its blocks on packed tokens")

    def logits(
        self, final: Float[Tensor, "at d_model"], positions: Tensor, tokens: Int[Tensor, "token"] | None
    ) -> Float[Tensor, "row *place unembedded"]:
        """The logits of chosen tokens where each row is read; `positions` are `[row]` or `[row place]`, none before its start."""
        before = torch.from_numpy(self.rows.first - self.rows.start).reshape(-1, *[1] * (positions.ndim - 1))
        return widen(self.model.unembed(final[(positions.cpu() + before).to(final.device)], tokens))

    # -- their proof ---------------------------------------------------------------------------------------------------

    def refuted(self, sites: Mapping[Key, Float[Tensor, "token ..."]], final: Tensor) -> str | None:
        """Why these activations and final streams of the packed rows are not those of whole runs; `None` if they are."""
        return next((why for one in self._samples if (why := self._differs(one, sites, final)) is not None), None)

    def _differs(self, one: _Sample, sites: Mapping[Key, Tensor], final: Tensor) -> str | None:
        mine = self._tokens_of(one.row)
        if (why := self._other_end(final[mine].detach(), one)) is not None:
            return why
        return _apart("", {key: sites[key][mine] for key in self.keys}, one.sites, "replay", self.model.dtype)

    def _other_end(self, final: Float[Tensor, "pos d_model"], one: _Sample) -> str | None:
        rounding = Rounding.of(self.model.dtype)
        if not (off := rounding.off(final[None], one.final[None])) <= rounding.of_logits:
            return f"packed rows differ from whole runs by {off:.1e} of the residual stream"
        return None

    def _tokens_of(self, row: int) -> slice:
        first = int(self.rows.first[row])
        return slice(first, first + int(self.rows.suffix[row]))

    def gradients_refuted(
        self,
        sites: Mapping[Key, Float[Tensor, "token ..."]],
        gradients: Mapping[Key, Float[Tensor, "token ..."]],
        final: Float[Tensor, "token d_model"],
        arriving: Float[Tensor, "token d_model"],
    ) -> str | None:
        """Why these gradients of packed rows are not those of whole runs, as far as the prompts of one length show; `None` if
        they are. Their whole runs are given the gradient that arrives at the packed rows' ends (`arriving`)."""
        number, which = self._shown()
        some, rows = self.pairs[number], np.flatnonzero(self.rows.chunk == number)[which]
        base = some.base[torch.from_numpy(which)]
        whole = GradientRuns(self.model, base, None, 0, whole="a proof")
        kept: dict[Key, Tensor] = {}
        slopes: dict[Key, Tensor] = {}

        def keep(activation: Tensor, hook: Any, key: Key) -> Tensor:
            kept[key] = activation.detach().clone()
            seen = activation.view_as(activation)  # a hook may be shown a reshaped copy, which has to be returned
            seen.register_hook(partial(slopes.__setitem__, key))
            return seen

        hooks = [(SITES[key[0]].hook_name(key[1]), partial(keep, key=key)) for key in self.keys]
        leaf, ends = whole.forward(base, torch.arange(len(which), device=base.tokens.device), hooks, leaf=True)
        self._whole_tokens += whole.block_tokens
        given = torch.zeros_like(ends)
        for i, row in enumerate(rows):
            given[i, int(self.rows.start[row]) :] = arriving[self._tokens_of(int(row))].to(given)
        assert leaf is not None
        torch.autograd.grad(ends, leaf, given)
        dtype = self.model.dtype
        for i, row in enumerate(rows):
            at, start = self._tokens_of(int(row)), int(self.rows.start[row])
            sample = _Sample(int(row), {key: value[i, start:] for key, value in kept.items()}, ends[i, start:].detach())
            if (why := self._differs(sample, sites, final)) is not None:
                return why
            expected = {key: slope[i, start:] for key, slope in slopes.items()}
            found = {key: slope[at] for key, slope in gradients.items()}
            if (why := _apart("gradients of ", found, expected, "gradients", dtype)) is not None:
                return why
        return None

    def _shown(self) -> tuple[int, Int[np.ndarray, "prompt"]]:
        """A length in which rows are padded behind which others follow, if there is one: its number, and its first prompt and the
        last one to start. The shortest whose prompts start at three positions, or at two; or the shortest."""
        starts = [len(np.unique(some.start)) for some in self.pairs]
        number = min(range(len(starts)), key=lambda one: (-min(starts[one], 3), self.pairs[one].length))
        last = len(self.pairs[number].start) - 1
        return number, np.array([0, last] if starts[number] > 1 else [0])


def at_tokens_of(rows: PackedRows) -> Callable[[Tensor, object], Tensor]:
    """What `capture` keeps of an activation `[prompt pos …]` of all prompts of one length: the tokens of their packed rows."""
    prompt = np.repeat(rows.prompt, rows.suffix)
    return lambda activation, _: activation[
        to_device(prompt, activation.device), to_device(rows.position, activation.device)
    ].clone()


def _apart(
    what: str, found: Mapping[Key, Tensor], expected: Mapping[Key, Tensor], compared: Compared, dtype: torch.dtype
) -> str | None:
    """Which of the activations are apart by more than rounding, as a share of their size; `None` if none is."""
    if found.keys() != expected.keys():
        return f"{what}{sorted(found.keys() ^ expected.keys())[:3]} are not what whole runs have"
    for key, one in found.items():
        other = expected[key].to(one.device)
        if one.shape != other.shape:
            return f"{what}{key[0]!r} on packed tokens is of another shape"
        allowed = tolerance(compared, dtype) * float(other.norm())
        if not (off := float((one - other).norm())) <= allowed:
            return f"{what}{key[0]!r} of layer {key[1]} on packed tokens differ from whole runs by {off:.1e}"
    return None
