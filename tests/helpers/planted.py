"""Defects that are planted into the replay, one by one, to see whether its proof refutes them.

Each is a way in which recomputing a suffix can go wrong: a lost mask, a prefix of another prompt, positions that were not cut.
A defect is a context manager that patches the engine: the replay of rows that begin at one position (`BY_START`; nothing is
packed meanwhile) or that of packed rows (`PACKED`). `unproved` lets a sweep believe its replay without a proof, so that one
can see which defects move a cell at all; whole forward passes (`replay=False`) give what is right, and nothing that is patched
is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

import mechkit as mk
from mechkit._precision import Rounding
from mechkit.engine import _packed, _packed_attention, _proof, _replay, _sweep
from mechkit.engine._chunk import Candidate
from mechkit.engine._edits import NEVER
from mechkit.engine._in_step import ByLayer
from mechkit.engine._plain import PACKED as PACKED_BLOCKS
from mechkit.engine._replay import PrefixCache, Replayer

Defect = Callable[[], Any]


@contextmanager
def unproved() -> Iterator[None]:
    """Sweeps inside replay without looking whether they may."""

    def believed(chunk: Any, start: Any, absent: Any, unread: Any) -> Any:
        computed = (start < NEVER) & ~absent & (start <= unread)
        kind = PACKED_BLOCKS if _proof.may_pack(chunk) else "eager"
        chunk.state.proof.candidates = [Candidate(kind, Rounding.of(chunk.state.model.dtype))]
        moving = (start < NEVER) & ~absent
        return _proof.Examined(chunk, start, moving, computed, [], [], [], 0)

    with patch.object(_sweep, "examined", believed), patch.object(_sweep, "proved_replayer", _proof._replayer):
        yield


@contextmanager
def by_start() -> Iterator[None]:
    """No rows are packed inside."""
    with patch.object(_proof, "may_pack", lambda chunk: False):
        yield


def _without_packing(defect: Defect) -> Defect:
    @contextmanager
    def both() -> Iterator[None]:
        with by_start(), defect():
            yield

    return both


def _argument(change: Callable[[Replayer, str, Any, int, Any], Any]) -> Defect:
    """Block arguments, cut to a suffix, are changed: `change(replayer, name, whole value, start, cut value)`."""

    @contextmanager
    def defect() -> Iterator[None]:
        right = Replayer._suffix

        def wrong(self: Replayer, name: str, value: Any, start: int, n_rows: int) -> Any:
            return change(self, name, value, start, right(self, name, value, start, n_rows))

        with patch.object(Replayer, "_suffix", wrong):
            yield

    return defect


def _is_mask(self: Replayer, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[-2] == self.run.length


def _is_position(name: str, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and name in ("position_ids", "cache_position", "position_embeddings")


def _everything_seen(self: Replayer, name: str, value: Any, start: int, cut: Any) -> Any:
    return torch.zeros_like(cut) if _is_mask(self, value) and cut.is_floating_point() else cut


def _mask_at_first_key(self: Replayer, name: str, value: Any, start: int, cut: Any) -> Any:
    return value[:1, :, : cut.shape[2]] if _is_mask(self, value) else cut


def _window_ignored(self: Replayer, name: str, value: Any, start: int, cut: Any) -> Any:
    if not _is_mask(self, value) or not cut.is_floating_point():
        return cut
    seen = torch.ones(self.run.length, self.run.length, dtype=torch.bool, device=cut.device).tril()[start:]
    return torch.zeros_like(cut).masked_fill(~seen, torch.finfo(cut.dtype).min)


def _positions_not_cut(self: Replayer, name: str, value: Any, start: int, cut: Any) -> Any:
    if not _is_position(name, value):
        return cut
    axis = 0 if value.ndim == 1 else 1
    return value.narrow(axis, 0, cut.shape[axis]) if value.ndim == 1 else value[:1].narrow(axis, 0, cut.shape[axis])


def _wrong_rotation(self: Replayer, name: str, value: Any, start: int, cut: Any) -> Any:
    """Every position of a suffix, but its first, is rotated as the one before."""
    if not _is_position(name, value) or value.ndim == 1 or start == 0:
        return cut
    return torch.cat([cut[:, :1], cut[:, :-1]], 1)


def _patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Defect:
    @contextmanager
    def defect() -> Iterator[None]:
        with patch.object(owner, name, make(getattr(owner, name))):
            yield

    return defect


def _recorded(change: Callable[[Any], Any]) -> Defect:
    """What was recorded of the base run's blocks is changed afterwards."""

    def make(right: Any) -> Any:
        def wrong(*args: Any, **kwargs: Any) -> Any:
            run = right(*args, **kwargs)
            return change(run) if run.calls and run.cache is not None else run

        return wrong

    return _patched(_sweep, "record", make)


def _shifted(run: Any) -> Any:
    return replace(run, resid=[run.resid[0], *run.resid[:-2], run.resid[-1]])


def _stale_values(run: Any) -> Any:
    layer = run.cache.layers[len(run.cache.layers) // 2]
    layer.values = layer.values.roll(1, 2)
    return run


def _stale_stream(run: Any) -> Any:
    resid = list(run.resid)
    resid[2] = resid[2].clone()
    resid[2][:, -1] = resid[1][:, -1]
    return replace(run, resid=resid)


def _another_prompt(right: Any) -> Any:
    def wrong(self: Replayer, layer: int, prompt: torch.Tensor, start: int) -> Any:
        return right(self, layer, (prompt + 1) % len(self.run.tokens), start)

    return wrong


def _one_short(right: Any) -> Any:
    def wrong(self: PrefixCache, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        joined = right(self, past, new).clone()
        if self._start > 1:
            joined[:, :, self._start - 1] = joined[:, :, self._start - 2]
        return joined

    return wrong


def _norm_twice(right: Any) -> Any:
    def wrong(self: Replayer, *args: Any) -> ByLayer[torch.Tensor]:
        final = yield from right(self, *args)
        return self.model.bridge.ln_final.original_component(final)

    return wrong


def _last_position_only(right: Any) -> Any:
    """Only the last position of a block's output is passed on."""

    def wrong(self: Replayer, layer: int, hidden: Any, prompt: Any, rows: Any, *rest: Any) -> torch.Tensor:
        output = right(self, layer, hidden, prompt, rows, *rest).clone()
        output[:, :-1] = self.run.resid[layer + 1][prompt, rows.start :][:, : output.shape[1]][:, :-1]
        return output

    return wrong


@contextmanager
def _leaking() -> Iterator[None]:
    """Edits stay attached after the block in which they belong."""
    right = _replay.attached_edits
    with ExitStack() as left:

        @contextmanager
        def wrong(*args: Any) -> Iterator[None]:
            manager = right(*args)
            manager.__enter__()
            left.callback(manager.__exit__, None, None, None)
            yield

        with patch.object(_replay, "attached_edits", wrong):
            yield


def _edited_again(right: Any) -> Any:
    """What is written into a site of one block is written into the next one's too."""

    def wrong(self: Replayer, layer: int, hidden: Any, prompt: Any, rows: Any, groups: Any, *rest: Any) -> torch.Tensor:
        output = right(self, layer, hidden, prompt, rows, groups, *rest)
        for group in getattr(self, "_earlier", []):
            if group.site.dims == ("pos", "d_model") and output.shape[1] == hidden.shape[1]:
                _replay.write(group, rows, output, self._lookup)
        self._earlier, self._lookup = list(groups), rest[0]
        return output

    return wrong


def _edit_dropped(right: Any) -> Any:
    def wrong(self: Replayer, layer: int, hidden: Any, prompt: Any, rows: Any, groups: Any, *rest: Any) -> torch.Tensor:
        lookup, n_plain, last = rest
        groups, n_plain = ([], len(hidden)) if layer % 2 else (groups, n_plain)
        return right(self, layer, hidden, prompt, rows, groups, lookup, n_plain, last)

    return wrong


def _joins_prompt_0(right: Any) -> Any:
    def wrong(self: Replayer, plan: Any, rows: Any, *rest: Any) -> ByLayer[torch.Tensor]:
        resid = [x[:1].expand_as(x) for x in self.run.resid]
        run, self.run = self.run, replace(self.run, resid=[*resid[:-1], self.run.resid[-1]])
        try:
            return (yield from right(self, plan, rows, *rest))
        finally:
            self.run = run

    return wrong


def _position_too_early(right: Any) -> Any:
    """In the last block the position before the last is finished."""

    def wrong(self: Replayer, layer: int, hidden: torch.Tensor, prompt: Any, start: int) -> torch.Tensor:
        if hidden.shape[1] < 2:
            return right(self, layer, hidden, prompt, start)
        return self._whole_suffix(layer, hidden, prompt, start)[:, -2:-1]

    return wrong


def _neighbours_keys(right: Any) -> Any:
    """In large batches rows attend to the keys and values of the row before."""

    def wrong(self: PrefixCache, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        joined = right(self, past, new)
        return joined if len(joined) <= 6 else torch.cat([joined[:1], joined[:-1]])

    return wrong


def _rows_change_places(right: Any) -> Any:
    """In large batches the final streams are those of other rows."""

    def wrong(self: Any, *args: Any) -> ByLayer[torch.Tensor]:
        final = yield from right(self, *args)
        return final if len(final) <= 8 else final.roll(1, 0)

    return wrong


BY_START: dict[str, Defect] = {
    "no causal mask": _argument(_everything_seen),
    "mask aligned to the first key": _argument(_mask_at_first_key),
    "window ignored": _argument(_window_ignored),
    "positions not cut": _argument(_positions_not_cut),
    "rotary of the wrong positions": _argument(_wrong_rotation),
    "prefix of another prompt": _patched(Replayer, "_prefix", _another_prompt),
    "prefix one short": _patched(PrefixCache, "_joined", _one_short),
    "stream shifted by a layer": _recorded(_shifted),
    "stale stream at one place": _recorded(_stale_stream),
    "one layer's values stale": _recorded(_stale_values),
    "final norm twice": _patched(Replayer, "replay", _norm_twice),
    "last position only": _patched(Replayer, "_block", _last_position_only),
    "a hook that leaks": _leaking,
    "edit written again a block later": _patched(Replayer, "_block", _edited_again),
    "edits of odd layers dropped": _patched(Replayer, "_block", _edit_dropped),
    "rows join with prompt 0's stream": _patched(Replayer, "replay", _joins_prompt_0),
    "position before the last finished": _patched(Replayer, "_last_position", _position_too_early),
    "keys of another row in large batches": _patched(PrefixCache, "_joined", _neighbours_keys),
    "rows of large batches change places": _patched(Replayer, "replay", _rows_change_places),
}


# -- packed rows -------------------------------------------------------------------------------------------------------


def _keys_of_the_row_before(right: Any) -> Any:
    def wrong(self: Any, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return right(self, past, new).roll(1, 0)

    return wrong


def _keys_of_the_row_before_among_many(right: Any) -> Any:
    def wrong(self: Any, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        joined = right(self, past, new)
        return joined if len(joined) <= 6 else joined.roll(1, 0)

    return wrong


def _index(name: str, change: Callable[[Any], Any]) -> Defect:
    """One of the index arrays of a piece is changed."""

    def make(right: Any) -> Any:
        def wrong(self: Any, which: str, device: Any) -> torch.Tensor:
            found = right(self, which, device)
            return change(found) if which == name else found

        return wrong

    return _patched(_packed_attention.Piece, "index", make)


def _one_prompt_on(right: Any) -> Any:
    def wrong(self: Any, which: str, device: Any) -> torch.Tensor:
        found = right(self, which, device)
        return (found + 1) % 2 if which == "prompt" and len(found.unique()) > 1 else found

    return wrong


def _tokens_placed_late(right: Any) -> Any:
    """Arguments that belong to a token are those of the token before."""

    def wrong(self: Any, *args: Any) -> torch.Tensor:
        return right(self, *args).roll(1, -2 if right(self, *args).ndim > 2 else -1)

    return wrong


def _mask_of_the_position_before(right: Any) -> Any:
    def wrong(self: Any, piece: Any, last: bool) -> Any:
        mask = right(self, piece, last)
        return mask if mask is None or last else torch.cat([mask[:, :, :1], mask[:, :, :-1]], 2)

    return wrong


def _nothing_is_masked(right: Any) -> Any:
    def wrong(self: Any, piece: Any, last: bool) -> Any:
        mask = right(self, piece, last)
        return None if mask is None else torch.zeros_like(mask)

    return wrong


def _streams_of_prompt_0(right: Any) -> Any:
    """Rows that join late join with prompt 0's stream."""

    def wrong(self: Any, layer: int, rows: Any) -> torch.Tensor:
        return right(self, layer, replace(rows, prompt=rows.prompt * 0) if layer == 2 else rows)

    return wrong


def _written_one_token_late(right: Any) -> Any:
    def wrong(group: Any, rows: Any, first: Any, activation: torch.Tensor, lookup: Any) -> None:
        right(group, rows, (first + 1) % len(activation), activation, lookup)

    return wrong


def _not_written_in_odd_layers(right: Any) -> Any:
    def wrong(group: Any, *args: Any) -> None:
        if group.layer % 2 == 0:
            right(group, *args)

    return wrong


def _end_of_another(right: Any) -> Any:
    """In the last block the ends of rows are those of the rows before."""

    def wrong(self: Any, *args: Any) -> torch.Tensor:
        return right(self, *args).roll(1, 0)

    return wrong


def _edited_rows_change_places(right: Any) -> Any:
    def wrong(self: Any, layer: int, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        output = right(self, layer, hidden, *args)
        return output.roll(1, 0) if len(output) > 1 else output

    return wrong


PACKED: dict[str, Defect] = {
    "packed: keys of the row before": _patched(_packed_attention.Piece, "joined", _keys_of_the_row_before),
    "packed: keys of the row before, among many": _patched(
        _packed_attention.Piece, "joined", _keys_of_the_row_before_among_many
    ),
    "packed: prefix of another prompt": _patched(_packed_attention.Piece, "index", _one_prompt_on),
    "packed: queries of other tokens": _index("tokens", lambda index: index.roll(1)),
    "packed: outputs to other tokens": _index("destination", lambda index: index.roll(1)),
    "packed: the padding is kept": _index("real", lambda index: (index + 1) % (int(index.max()) + 1)),
    "packed: a prefix's last position overwritten": _index("position of real", lambda index: (index - 1).clip(0)),
    "packed: positions one late": _patched(_packed.PackedReplayer, "_at_tokens", _tokens_placed_late),
    "packed: mask of the position before": _patched(_packed_attention.Attention, "_mask", _mask_of_the_position_before),
    "packed: nothing is masked": _patched(_packed_attention.Attention, "_mask", _nothing_is_masked),
    "packed: joins with prompt 0's stream": _patched(_packed.PackedReplayer, "recorded", _streams_of_prompt_0),
    "packed: written one token late": _patched(_packed, "write_tokens", _written_one_token_late),
    "packed: not written in odd layers": _patched(_packed, "write_tokens", _not_written_in_odd_layers),
    "packed: final streams change places": _patched(_packed.PackedReplayer, "replay", _rows_change_places),
    "packed: the end of another row": _patched(_packed.PackedReplayer, "_last_position", _end_of_another),
    "packed: edited rows change places": _patched(_packed.PackedReplayer, "_edited", _edited_rows_change_places),
    "packed: one layer's values stale": _recorded(_stale_values),
    "packed: a stale stream": _recorded(_stale_stream),
}
DEFECTS = {name: _without_packing(defect) for name, defect in BY_START.items()} | PACKED

# The kinds of sweep: every way in which rows start, join and are written.
SWEEPS = (
    ("resid_pre", "layer pos"),
    ("z", "layer head"),
    ("resid_post", "layer"),
    ("mlp_out", "layer pos"),
    ("k", "layer pos head"),
    ("pattern", "layer head"),
    ("v", "layer head"),
    ("attn_out", "layer pos"),
    ("result", "layer head"),
    ("z", "layer pos head"),
)


NOTHING = 1e-12


def swept(model: mk.HookedModel, pairs: mk.PromptPairs, metric: Any, sweep: tuple[str, str], **more: Any) -> mk.Result:
    return mk.activation_patching(model, pairs, metric, site=sweep[0], over=sweep[1], progress=False, **more)


def off(found: mk.Result, right: mk.Result) -> float:
    """The largest difference of a cell, as a share of the largest effect (at least 1e-9 of a logit)."""
    a, b = found.values.double(), right.values.double()
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    return float((a - b).nan_to_num().abs().max() / b.nan_to_num().abs().max().clamp(min=1e-9))


def unproved_outcome(
    model: mk.HookedModel,
    pairs: mk.PromptPairs,
    metric: Any,
    sweep: tuple[str, str],
    name: str,
    right: mk.Result,
    **more: Any,
) -> float:
    """By how much a defect moves a cell where nothing is proved (infinity if it raises)."""
    before = model._attached()
    with DEFECTS[name]():
        try:
            with unproved():
                moved = off(swept(model, pairs, metric, sweep, **more), right)
        except Exception:
            moved = float("inf")
    assert model._attached() == before
    return moved


def outcome(
    model: mk.HookedModel,
    pairs: mk.PromptPairs,
    metric: Any,
    sweep: tuple[str, str],
    name: str,
    right: mk.Result,
    **more: Any,
) -> tuple[float, float | None]:
    """By how much a defect moves a cell where nothing is proved (infinity if it raises), and by how much where it is (`None` if
    the sweep refuses to answer; not tried if the defect moves nothing)."""
    moved = unproved_outcome(model, pairs, metric, sweep, name, right, **more)
    if moved <= NOTHING:
        return moved, moved
    before = model._attached()
    with DEFECTS[name]():
        try:
            left = off(swept(model, pairs, metric, sweep, **more), right)
        except RuntimeError as error:
            if "was left attached" not in str(error):
                raise
            left = None
    assert model._attached() == before
    return moved, left
