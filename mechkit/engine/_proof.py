"""Checks what a replay relies on against whole forward passes, before any of its rows is used.

Nothing here compares the replay with itself, and every assumption is checked where a violation would show:

1. *The recording.* A whole pass of an unedited prompt, without a cache, must read in every block what was recorded
   (streams that are shifted by a layer, a cache that changes what is computed).
2. *The blocks.* Each block, given the recorded stream from a position on, must give what the next block read, at every position:
   for every position that a row of the sweep starts at, and every block that its rows run through (masks, windows, prefixes,
   position encodings, blocks without hook points). Where sites inside blocks are edited, the bridge's blocks are checked too.
3. *The edits.* Whole passes of a few edited rows of several prompts, which start and join early, in the middle and late. At the
   positions before the start each block must read what it read in the unedited run (causality), and the replay must end where
   the whole pass ends, at every position that it computes, and in the same logits. They include a row of each kind that is
   assumed to change nothing. The same rows are checked again where the sweep computes them, among many others
   (`check_batch`).
4. *The two runs* must end in the same stream wherever they have read the same tokens.

All of this is done for the first prompts of each length; blocks on packed tokens are checked for all lengths that are recorded
together at once, and so are their edited rows. For other prompts of that length only point 4 is checked, and point 2
at one start, a different one each time. Whole passes run before any replay, so that nothing that a replay leaves behind can
affect both.

Where something differs by more than rounding, other blocks are tried (on packed tokens; then on rows that start at one position:
with fused attention, with eager attention, the bridge's own), and then whole forward passes are run for all rows; the reason is
reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._precision import ObservedDtypes, Rounding
from mechkit.engine._causality import agree_before_difference, masks_of, sees
from mechkit.engine._chunk import Candidate, Chunk, State
from mechkit.engine._edits import NEVER, Rows
from mechkit.engine._in_step import ByLayer, at_once, in_step
from mechkit.engine._packed import STREAM, PackedReplayer
from mechkit.engine._packed_attention import TokensNumbered, may_pack
from mechkit.engine._packing import PackedRows
from mechkit.engine._plain import PACKED, PACKED_SDPA, Attention, PlainBlocks, can_fuse
from mechkit.engine._replay import CANNOT_RUN, Replayer, why_not
from mechkit.engine._whole import TOGETHER, Mask, Whole, advice, run_whole, sample, unedited
from mechkit.hooks._devices import out_of_memory, to_device
from mechkit.hooks._readout import unembeds_final_stream
from mechkit.hooks._streamed import streamed_of

Along = Callable[["Replayer | PackedReplayer"], Sequence[ByLayer[Any]]]


@dataclass(eq=False)
class Examined:
    """A recorded chunk of prompts that nothing spoke against so far, and what its replay is to be compared with.

    Attributes:
        chunk: The prompts.
        start: The first position that changes, `[cell prompt]`; `NEVER` if none does.
        moving: Which rows change anything, `[cell prompt]`.
        computed: Which rows are computed, `[cell prompt]`.
        still: Kinds of rows that are presumed to change nothing, each `[cell prompt]`.
        whole: Rows that were run whole.
        starts: Positions from which blocks are to be checked.
        prompt: The prompt that they are checked on, and from which on others are taken.
    """

    chunk: Chunk
    start: Int[np.ndarray, "cell prompt"]
    moving: Mask
    computed: Mask
    still: list[Mask]
    whole: list[Whole]
    starts: list[int]
    prompt: int

    def run_whole(self, few: bool) -> None:
        """Runs some rows whole, one that changes nothing among them."""
        chunk = self.chunk
        chosen = sample(chunk, self.start, self.moving, self.still, few)
        if not any(rows.start >= chunk.run.length for rows in chosen):
            chosen.append(unedited(chunk, self.prompt))
        self.whole = run_whole(chunk, chosen)
        chunk.finals.update(pair for row in self.whole for pair in row.finals())


def examined(chunk: Chunk, start: Int[np.ndarray, "cell prompt"], absent: Mask, unread: Any) -> Examined | None:
    """Looks at a recording, and runs whole passes to compare its replay with. `None` where whole passes must be run for all rows;
    `state.fallback` says why.

    Args:
        chunk: Prompts that were recorded.
        start: The first position that changes, `[cell prompt]`; `NEVER` if none does.
        absent: Whether the prompt lacks a position of the cell, `[cell prompt]`.
        unread: The position of each prompt behind which nothing is read; `NEVER` where everything is.
    """
    state, proof = chunk.state, chunk.state.proof
    before = state.block_tokens
    moving = (start < NEVER) & ~absent
    computed = moving & (start <= unread)
    still = [(start == NEVER) & ~absent, moving & ~computed]
    found = Examined(chunk, start, moving, computed, still, [], [], (proof.turn + 1) % len(chunk.ids))
    state.fallback = _refute_run(found, absent)
    proof.block_tokens += state.block_tokens - before
    return found if state.fallback is None else None


def _refute_run(one: Examined, absent: Mask) -> str | None:
    """Why no replay of these prompts is possible, whatever blocks it runs; `None` if nothing is found."""
    chunk, start = one.chunk, one.start
    state, proof = chunk.state, chunk.state.proof
    if chunk.run.refused is not None:
        return f"blocks cannot be replayed: {chunk.run.refused}"
    if not _equal_before_the_first_difference(chunk):
        return "the two runs differ before their first different token: not a causal model"
    if not unembeds_final_stream(state.model, chunk.run):
        return "the logits at a position are not a function of the last block's output there"
    first, new_kind = not proof.proved, chunk.run.rows.kind not in state.sampled
    if first:
        proof.candidates = _candidates(chunk)
    if absent.all():
        return None  # there are no rows
    state.sampled.add(chunk.run.rows.kind)
    if (shown := _sees_over(chunk, np.unique(start[one.moving]))) is not None:
        return f"the attention mask of block {shown} lets positions read later ones: not a causal model"
    # Whole passes first: what a replay may leave behind must not be in both.
    if new_kind:
        one.run_whole(few=not first)
        if (refuted := _refute_recording(one.whole)) is not None:
            return refuted
    one.starts = _starts_to_check(chunk, start, one.computed)
    proof.proved.setdefault(chunk.run.rows.kind, set()).update(one.starts)
    proof.turn += 1
    return None


def proved_replayer(several: Sequence[Examined], along: Along | None = None) -> Replayer | PackedReplayer | None:
    """A replayer of these prompts that was compared with whole passes, or `None` where whole passes must be run; `state.fallback`
    says why. Several chunks are only taken where their rows are packed together: without a reason, each is to be tried alone.

    Args:
        several: The prompts.
        along: Work with the replayer that goes through each block together with the checks. What comes of it counts only if the
            replayer is the one that is returned.
    """
    state = several[0].chunk.state
    proof, before = state.proof, state.block_tokens
    refuted: str | None = "no kind of block is left"
    replayer: Replayer | PackedReplayer | None = None
    while proof.candidates and (len(several) == 1 or proof.candidates[0].packs):
        refuted, replayer = _refute_candidate(several, along)
        if refuted is None:
            break
        proof.candidates.pop(0)
        for one in several:  # nothing was compared with the blocks that are tried next
            one.starts = np.unique(one.start[one.computed]).tolist()
            if not one.whole and one.computed.any():
                one.run_whole(few=False)
    proof.block_tokens += state.block_tokens - before
    if refuted is None:
        return replayer
    if not proof.candidates or len(several) == 1:
        state.fallback = refuted
    return None


def _sees_over(chunk: Chunk, starts: Int[np.ndarray, "start"]) -> int | None:
    """The first block whose mask lets a position before one of these starts read that start or what is behind it; or the first
    of a model in which nothing is out of reach of any change, so that there are no suffixes."""
    run = chunk.run
    starts = starts[starts < run.length]
    everywhere = run.length > 1 and not chunk.reach.any()
    found = []
    masks = {id(mask): (layer, mask) for layer, each in reversed(list(enumerate(masks_of(run)))) for mask in each}
    for layer, mask in masks.values():
        ahead = sees(mask).flatten(0, 1).any(0).triu(1).cpu()
        if ahead.any() and (everywhere or any(bool(ahead[:at, at:].any()) for at in starts.tolist())):
            found.append(layer)
    return min(found, default=None)


def _candidates(chunk: Chunk) -> list[Candidate]:
    """The kinds of block that may serve, the fastest first, and what counts as rounding in them."""
    model = chunk.state.model
    exact = Rounding.of(model.dtype)
    kinds: list[Attention | None] = ["eager", None]
    if can_fuse(model.bridge, chunk.run.calls):
        kinds.insert(0, "sdpa")
    if may_pack(chunk):
        kinds.insert(0, PACKED_SDPA if "sdpa" in kinds else PACKED)
    candidates = [Candidate(kind, exact) for kind in kinds]
    coarse = Rounding.of(_coarsest(chunk))
    return candidates if coarse == exact else [*candidates, Candidate(None, coarse)]


def _coarsest(chunk: Chunk) -> torch.dtype:
    """The coarsest floating type that a block computes in: some of a float64 model's norms and rotations are float32 inside."""
    if (streamed := streamed_of(chunk.state.model.bridge)) is not None:
        return streamed.coarsest  # seen when it was loaded
    with ObservedDtypes() as seen:
        first = to_device(np.zeros(1, np.int64), chunk.tokens.device)
        for layer in {0, chunk.state.model.n_layers - 1}:
            try:
                Replayer(chunk.state.model, chunk.run, None).unedited(layer, first, 0, hooked=True)
            except CANNOT_RUN as error:
                _cannot(error)
    return seen.coarsest(chunk.state.model.dtype)


def _replayer(several: Sequence[Examined]) -> Replayer | PackedReplayer:
    chunk = several[0].chunk
    model, candidate = chunk.state.model, chunk.state.proof.candidates[0]
    plain = None if candidate.plain is None else PlainBlocks(model.stack, candidate.plain)
    if candidate.packs:
        assert plain is not None
        return PackedReplayer([one.chunk for one in several], plain)
    return Replayer(model, chunk.run, plain, chunk.tower_tokens)


def _equal_before_the_first_difference(chunk: Chunk) -> bool:
    """Whether base and source run end in the same residual stream wherever they have read the same tokens."""
    if chunk.source is None:
        return True
    base, source = chunk.run, chunk.source
    others = source.resid[-1].to(base.resid[-1].device)
    agree = agree_before_difference(base.rows, source.rows, base.resid[-1], others, chunk.reach)
    return bool(agree.all())


def _refute_recording(whole: Sequence[Whole]) -> str | None:
    """Why what was recorded is not what whole passes without a cache compute, edited ones before their edits; `None` if it is."""
    refuted = [(found, one) for one in whole if (found := one.refute_prefix())]
    if not refuted:
        return None
    for found, one in refuted:
        if one.changes_nothing:
            return f"what was recorded is not what a whole pass computes: {found}"
    return f"an edit changes what comes before it ({refuted[0][0]}): not a causal model"


def _refute_candidate(
    several: Sequence[Examined], along: Along | None
) -> tuple[str | None, Replayer | PackedReplayer | None]:
    """Why the first candidate does not compute what whole passes compute; `None`, and a replayer of its kind, if it does."""
    state, tried, used, raised = several[0].chunk.state, None, None, None
    try:
        tried = _replayer(several)
        checks: list[ByLayer[str | None]]
        if isinstance(tried, PackedReplayer):
            checks = [_refute_packed_blocks(several, tried), _refute_packed_rows(several, tried)]
        else:
            (one,) = several
            checks = [_refute_blocks(one, tried), *(row.refute(tried) for row in one.whole)]
        found: Iterator[str | None]
        if along is None:
            found = map(at_once, checks)
        else:
            used = _replayer(several)
            checked, raised = _checked_in_step(checks, along(used))
            found = iter(checked)
        refuted = next((why for why in found if why is not None), None)
    except CANNOT_RUN as error:
        refuted = _cannot(error)
    finally:
        state.block_tokens += 0 if tried is None else tried.block_tokens
    if refuted is None and raised is not None:
        raise raised  # the user's metric did, or batches were refuted
    if refuted is None:
        return None, used or _replayer(several)
    state.block_tokens += 0 if used is None else used.block_tokens
    return refuted, None


def _checked_in_step(
    checks: Sequence[ByLayer[str | None]], others: Sequence[ByLayer[Any]]
) -> tuple[list[str | None], Exception | None]:
    """What the checks find, and what other work raised first: it is of interest where they find nothing."""
    found = in_step([*checks, *map(_caught, others)])
    return found[: len(checks)], next((error for error in found[len(checks) :] if error is not None), None)


def _caught(work: ByLayer[Any]) -> ByLayer[Exception | None]:
    try:
        yield from work
    except Exception as error:
        return error
    return None


def _cannot(error: Exception) -> str:
    if isinstance(error, RuntimeError) and out_of_memory(error):
        raise error
    return f"blocks cannot be replayed: {why_not(error)}"


class BatchRefutedError(Exception):
    """Rows that were replayed among others do not end where whole passes do; the message says by how much."""


def check_batch(chunk: Chunk, rows: Rows, found: Float[Tensor, "row pos d_model"]) -> None:
    """Compares the rows of a batch that were run whole for the proof: a batch is where rows could be taken for one another.

    Args:
        chunk: The prompts.
        rows: The batch.
        found: Their final streams, the last positions of them.

    Raises:
        BatchRefutedError: they differ by more than rounding.
    """
    for (cell, prompt), expected in chunk.finals.items():
        for i in np.flatnonzero((rows.cell == cell) & (rows.prompt == prompt)):
            _check_final(chunk, found[i], expected)


def check_packed_batch(
    replayer: PackedReplayer, rows: PackedRows, found: Float[Tensor, "token d_model"], last: bool
) -> None:
    """The same for a packed batch, where each row's tokens follow those of the row before; only the last of each with `last`."""
    for number, chunk in enumerate(replayer.chunks):
        for (cell, prompt), expected in chunk.finals.items():
            for i in np.flatnonzero((rows.cell == cell) & (rows.prompt == prompt) & (rows.chunk == number)):
                begin, n = (int(i), 1) if last else (int(rows.first[i]), int(rows.suffix[i]))
                _check_final(chunk, found[begin : begin + n], expected)


def _check_final(chunk: Chunk, found: Float[Tensor, "pos d_model"], expected: Float[Tensor, "all_pos d_model"]) -> None:
    rounding = chunk.state.proof.candidates[0].rounding
    off = rounding.off(found[None], expected[None, -len(found) :])
    if not off <= rounding.of_logits:
        raise BatchRefutedError(
            f"rows replayed in batches differ from whole forward passes by {off:.1e} of the residual stream"
        )


# -- blocks, one by one ------------------------------------------------------------------------------------------------


def _starts_to_check(chunk: Chunk, start: Int[np.ndarray, "cell prompt"], computed: Mask) -> list[int]:
    """The starts that were not checked on prompts of this length; if all were, one of them again, on this recording."""
    proof, used = chunk.state.proof, np.unique(start[computed]).tolist()
    fresh = [at for at in used if at not in proof.proved.get(chunk.run.rows.kind, ())]
    return fresh or used[proof.turn % max(1, len(used)) :][:1]


def _refute_blocks(one: Examined, replayer: Replayer) -> ByLayer[str | None]:
    """Why blocks that run by themselves do not give what was recorded behind them; `None` if they do."""
    chunk, plan, n_layers = one.chunk, one.chunk.state.plan, one.chunk.state.model.n_layers
    hooked = {layer for layer, groups in plan.groups.items() if any(g.site.name not in STREAM for g in groups)}
    entries = [max(0, int(plan.entry[((one.start == at) & one.computed).any(1)].min())) for at in one.starts]
    for layer in range(min(entries, default=n_layers), n_layers):
        yield layer
        for turn, begin in enumerate(one.starts):
            if entries[turn] > layer:
                continue
            # Blocks in which something is edited run with their hook points: checked too, with many starts at one of them.
            both = replayer.plain is not None and layer in hooked and layer % len(one.starts) == turn
            for kind in (False, True) if both else (replayer.plain is None and layer in hooked,):
                prompt = (one.prompt + turn) % len(chunk.ids)
                if (refuted := _refute_block(chunk, replayer, layer, prompt, begin, kind)) is not None:
                    return refuted
    return None


def _refute_packed_blocks(several: Sequence[Examined], replayer: PackedReplayer) -> ByLayer[str | None]:
    """The same of blocks that run on all starts of several chunks together."""
    state = several[0].chunk.state
    parts, entries = [], []
    for number, one in enumerate(several):
        chunk, n = one.chunk, len(one.starts)
        prompt = (one.prompt + np.arange(n)) % len(chunk.ids)
        zeros = np.zeros(n, np.int64)
        parts.append(
            (zeros, zeros + number, prompt, chunk.ids[prompt], np.array(one.starts, np.int64), zeros + chunk.run.length)
        )
        entries += [
            max(0, int(state.plan.entry[((one.start == begin) & one.computed).any(1)].min())) for begin in one.starts
        ]
    everyone, entry = PackedRows(*map(np.concatenate, zip(*parts, strict=True))), np.array(entries, np.int64)
    for layer in range(int(entry.min(initial=state.model.n_layers)), state.model.n_layers):
        yield layer
        rows = everyone[entry <= layer]
        while len(rows):
            size = max(1, int(np.searchsorted(np.cumsum(rows.suffix), TOGETHER, "right")))
            if (refuted := _refute_packed_block(state, replayer, layer, rows[:size])) is not None:
                return refuted
            rows = rows[size:]
        inside = [group for group in state.plan.groups.get(layer, ()) if group.site.name not in STREAM]
        if not inside or replayer.writes_inside(layer, inside):
            continue
        for one, by_start in zip(
            several, replayer.by_start, strict=True
        ):  # blocks with hook points, from one start each
            if not one.starts:
                continue
            turn = layer % len(one.starts)
            if state.plan.entry[((one.start == one.starts[turn]) & one.computed).any(1)].min() <= layer:
                at = (one.prompt + turn) % len(one.chunk.ids)
                refuted = _refute_block(one.chunk, by_start, layer, at, one.starts[turn], True)
                if refuted is not None:
                    return refuted
    return None


def _refute_packed_block(state: State, replayer: PackedReplayer, layer: int, rows: PackedRows) -> str | None:
    rounding = state.proof.candidates[0].rounding
    with TokensNumbered(rows.n_tokens):
        found = replayer.unedited(layer, rows)[None]
    read, expected = (replayer.recorded(i, rows)[None] for i in (layer, layer + 1))
    if not (off := rounding.off(found, expected, read)) <= rounding.of_block:
        return f"block {layer}, run on packed tokens, differs from the whole pass by {off:.1e} of what it adds"
    return None


def _refute_block(chunk: Chunk, replayer: Replayer, layer: int, prompt: int, start: int, hooked: bool) -> str | None:
    at, resid = to_device(np.array([prompt]), chunk.tokens.device), chunk.run.resid
    rounding = chunk.state.proof.candidates[0].rounding
    found = replayer.unedited(layer, at, start, hooked)
    read, expected = (resid[i][prompt, start:][None] for i in (layer, layer + 1))
    if not (off := rounding.off(found, expected, read)) <= rounding.of_block:
        return (
            f"block {layer}, run by itself from position {start} on, differs from the whole pass by {off:.1e} of what it adds to "
            f"the residual stream{advice(chunk.state.model)}"
        )
    return None


def _refute_packed_rows(several: Sequence[Examined], replayer: PackedReplayer) -> ByLayer[str | None]:
    """Why a replay of rows that begin at different positions, all together, does not end where whole passes do."""
    state = several[0].chunk.state
    moving = [(number, row) for number, one in enumerate(several) for row in one.whole if not row.changes_nothing]
    if not moving:
        return None
    rows = PackedRows.of(state.plan, [(row.rows, number, row.chunk.run.length) for number, row in moving])
    final = yield from replayer.replay(state.plan, rows, state.reads_last)
    found = final.split([1] * len(rows) if state.reads_last else rows.suffix.tolist())
    keys = zip(rows.chunk.tolist(), rows.cell.tolist(), rows.prompt.tolist(), strict=True)
    place = {key: i for i, key in enumerate(keys)}
    for number, row in moving:
        mine = zip(row.rows.cell.tolist(), row.rows.prompt.tolist(), strict=True)
        if (refuted := row.refute_final(torch.stack([found[place[number, *key]] for key in mine]))) is not None:
            return refuted
    return None
