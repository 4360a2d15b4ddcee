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

All of this is done for the first prompts of each length. For other prompts of that length only point 4 is checked, and point 2
at one start, a different one each time. Whole passes run before any replay, so that nothing that a replay leaves behind can
affect both.

Where something differs by more than rounding, other blocks are tried (fused attention, then eager, then the bridge's own), and
then whole forward passes are run for all rows; the reason is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechkit._precision import ObservedDtypes, Rounding
from mechkit.engine._causality import agree_before_difference, masks_of, sees
from mechkit.engine._chunk import Candidate, Chunk, whole_streams
from mechkit.engine._edits import NEVER, Rows
from mechkit.engine._plain import Attention, PlainBlocks, can_fuse
from mechkit.engine._replay import Replayer, why_not
from mechkit.hooks._devices import out_of_memory, to_device
from mechkit.hooks._readout import unembeds_final_stream
from mechkit.metrics import Metric

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel

Mask = Bool[np.ndarray, "cell prompt"]
_Where = Literal["first", "middle", "behind it", "last"]  # among the blocks where rows join

STREAM = ("resid_pre", "resid_post")  # sites that are written between blocks: no hook is needed
_BROKEN = (ValueError, TypeError, AttributeError, AssertionError, IndexError, KeyError, RuntimeError)  # ours among them


def proved_replayer(chunk: Chunk, start: Int[np.ndarray, "cell prompt"], absent: Mask, unread: Any) -> Replayer | None:
    """A replayer that was checked on these prompts, or `None` where whole forward passes must be run; `state.fallback` says why.

    Args:
        chunk: Prompts that were recorded.
        start: The first position that changes, `[cell prompt]`; `NEVER` if none does.
        absent: Whether the prompt lacks a position of the cell, `[cell prompt]`.
        unread: The position of each prompt behind which nothing is read; `NEVER` where everything is.
    """
    state = chunk.state
    if state.fallback is not None:
        return None
    before = state.block_tokens
    state.fallback = _refute(chunk, start, absent, unread)
    state.proof.block_tokens += state.block_tokens - before
    return None if state.fallback is not None else _replayer(chunk)


def _refute(chunk: Chunk, start: Int[np.ndarray, "cell prompt"], absent: Mask, unread: Any) -> str | None:
    """Why replaying these prompts is not possible with any kind of block; `None` if it is."""
    state, proof = chunk.state, chunk.state.proof
    proof.finals = {}
    if chunk.run.refused is not None:
        return f"blocks cannot be replayed: {chunk.run.refused}"
    if not _equal_before_the_first_difference(chunk):
        return "the two runs differ before their first different token: not a causal model"
    if not unembeds_final_stream(state.model, chunk.run):
        return "the logits at a position are not a function of the last block's output there"
    if absent.all():
        return None  # there are no rows
    first, new_kind = not proof.proved, chunk.run.rows.kind not in proof.proved
    if first:
        proof.candidates = _candidates(chunk)
    prompt, moving = (proof.turn + 1) % len(chunk.ids), (start < NEVER) & ~absent
    computed = moving & (start <= unread)
    still = [(start == NEVER) & ~absent, moving & ~computed]
    if (shown := _sees_over(chunk, np.unique(start[moving]))) is not None:
        return f"the attention mask of block {shown} lets positions read later ones: not a causal model"
    # Whole passes first: what a replay may leave behind must not be in both.
    whole = [_Whole(chunk, rows) for rows in _sample(chunk, start, moving, still, few=not first)] if new_kind else []
    proof.finals = {key: final for one in whole for key, final in one.finals()}
    if new_kind and (refuted := _refute_recording(chunk, whole, prompt)) is not None:
        return refuted
    starts, refuted = _starts_to_check(chunk, start, computed), None
    while proof.candidates:
        refuted = _refute_candidate(chunk, whole, starts, prompt, start, computed)
        if refuted is None:
            break
        proof.candidates.pop(0)
    proof.proved.setdefault(chunk.run.rows.kind, set()).update(starts)
    proof.turn += 1
    return refuted


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
    kinds: tuple[Attention | None, ...] = (
        ("sdpa", "eager", None) if can_fuse(model.bridge, chunk.run.calls) else ("eager", None)
    )
    candidates = [Candidate(kind, exact) for kind in kinds]
    coarse = Rounding.of(_coarsest(chunk))
    return candidates if coarse == exact else [*candidates, Candidate(None, coarse)]


def _coarsest(chunk: Chunk) -> torch.dtype:
    """The coarsest floating type that a block computes in: some of a float64 model's norms and rotations are float32 inside."""
    with ObservedDtypes() as seen:
        first = to_device(np.zeros(1, np.int64), chunk.tokens.device)
        for layer in {0, chunk.state.model.n_layers - 1}:
            try:
                Replayer(chunk.state.model, chunk.run, None).unedited(layer, first, 0, hooked=True)
            except _BROKEN as error:
                _cannot(error)
    return seen.coarsest(chunk.state.model.dtype)


def _replayer(chunk: Chunk) -> Replayer:
    model, plain = chunk.state.model, chunk.state.proof.candidates[0].plain
    return Replayer(model, chunk.run, None if plain is None else PlainBlocks(model.stack, plain), chunk.tower_tokens)


def _equal_before_the_first_difference(chunk: Chunk) -> bool:
    """Whether base and source run end in the same residual stream wherever they have read the same tokens."""
    if chunk.source is None:
        return True
    base, source = chunk.run, chunk.source
    others = source.resid[-1].to(base.resid[-1].device)
    agree = agree_before_difference(base.rows, source.rows, base.resid[-1], others, chunk.reach)
    return bool(agree.all())


def _refute_recording(chunk: Chunk, whole: Sequence[_Whole], prompt: int) -> str | None:
    """Why what was recorded is not what whole passes without a cache compute, edited ones before their edits; `None` if it is."""
    refuted = next((found for one in whole if (found := one.refute_prefix())), None)
    if refuted is None and any(one.changes_nothing for one in whole):
        return None  # that row's streams were compared at every position
    at = np.array([prompt])
    unedited = _Whole(chunk, Rows(np.zeros(1, np.int64), at, chunk.ids[at], chunk.run.length), edited=False)
    if (why := unedited.refute_prefix()) is not None:
        return f"what was recorded is not what a whole pass computes: {why}"
    return None if refuted is None else f"an edit changes what comes before it ({refuted}): not a causal model"


def _refute_candidate(
    chunk: Chunk,
    whole: Sequence[_Whole],
    starts: Sequence[int],
    prompt: int,
    start: Int[np.ndarray, "cell prompt"],
    computed: Mask,
) -> str | None:
    """Why the first candidate does not compute what whole passes compute; `None` if it does."""
    state, replayer = chunk.state, None
    try:
        replayer = _replayer(chunk)
        refuted = _refute_blocks(chunk, replayer, starts, prompt, start, computed)
        return refuted or next((found for one in whole if (found := one.refute(replayer))), None)
    except _BROKEN as error:
        return _cannot(error)
    finally:
        state.block_tokens += 0 if replayer is None else replayer.block_tokens


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
    proof = chunk.state.proof
    for (cell, prompt), expected in proof.finals.items():
        for i in np.flatnonzero((rows.cell == cell) & (rows.prompt == prompt)):
            rounding = proof.candidates[0].rounding
            off = rounding.off(found[i : i + 1], expected[None, -found.shape[1] :])
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


def _refute_blocks(
    chunk: Chunk,
    replayer: Replayer,
    starts: Sequence[int],
    prompt: int,
    start: Int[np.ndarray, "cell prompt"],
    computed: Mask,
) -> str | None:
    """Why blocks that run by themselves do not give what was recorded behind them; `None` if they do."""
    plan, n_layers = chunk.state.plan, chunk.state.model.n_layers
    hooked = {layer for layer, groups in plan.groups.items() if any(g.site.name not in STREAM for g in groups)}
    for turn, begin in enumerate(starts):
        first = max(0, int(plan.entry[((start == begin) & computed).any(1)].min()))
        for layer in range(first, n_layers):
            # Blocks in which something is edited run with their hook points: checked too, with many starts at one of them.
            both = replayer.plain is not None and layer in hooked and layer % len(starts) == turn
            kinds = (False, True) if both else (replayer.plain is None and layer in hooked,)
            for kind in kinds:
                one = (prompt + turn) % len(chunk.ids)
                if (refuted := _refute_block(chunk, replayer, layer, one, begin, kind)) is not None:
                    return refuted
    return None


def _refute_block(chunk: Chunk, replayer: Replayer, layer: int, prompt: int, start: int, hooked: bool) -> str | None:
    at, resid = to_device(np.array([prompt]), chunk.tokens.device), chunk.run.resid
    rounding = chunk.state.proof.candidates[0].rounding
    found = replayer.unedited(layer, at, start, hooked)
    read, expected = (resid[i][prompt, start:][None] for i in (layer, layer + 1))
    if not (off := rounding.off(found, expected, read)) <= rounding.of_block:
        return (
            f"block {layer}, run by itself from position {start} on, differs from the whole pass by {off:.1e} of what it adds to "
            f"the residual stream{_advice(chunk.state.model)}"
        )
    return None


def _advice(model: HookedModel) -> str:
    implementation = getattr(model.bridge.original_model.config, "_attn_implementation", "eager")
    if implementation in ("eager", None):
        return ""
    return (
        f'; model.bridge.original_model.set_attn_implementation("eager") makes it replay (it is {implementation!r} now)'
    )


# -- edited rows, as a whole -------------------------------------------------------------------------------------------


class _Whole:
    """Whole forward passes of some rows that start at the same position, and what was computed in them.

    Attributes:
        rows: The rows; `rows.start` is the prompts' length where they are presumed to change nothing.
        streams: What each block read, and the final stream, `[row pos d_model]` each.
        logits: Where the metric reads (at the last position, for a callable), `[row d_vocab]`.
    """

    def __init__(self, chunk: Chunk, rows: Rows, edited: bool = True) -> None:
        self.chunk, self.rows = chunk, rows
        metric = chunk.state.metric
        last = np.full(len(rows), chunk.run.length - 1)
        self._where = metric.last_read.numpy()[rows.prompt_id] if isinstance(metric, Metric) else last
        self.streams, self.logits = whole_streams(chunk, rows, self.read, edited)

    def read(self, per_position: Float[Tensor, "row pos *rest"]) -> Float[Tensor, "row *rest"]:
        """What stands where the metric reads; the last of `per_position` is the prompts' last position."""
        offset = self.chunk.run.length - per_position.shape[1]
        at = to_device(np.maximum(self._where - offset, 0), per_position.device)
        return per_position[torch.arange(len(at), device=at.device), at]

    def finals(self) -> Iterator[tuple[tuple[int, int], Float[Tensor, "pos d_model"]]]:
        """The final stream of each row, by `(cell, prompt)`."""
        keys = zip(self.rows.cell.tolist(), self.rows.prompt.tolist(), strict=True)
        return zip(keys, self.streams[-1], strict=True)

    @property
    def changes_nothing(self) -> bool:
        """Whether no position of these rows is presumed to change."""
        return self.rows.start >= self.chunk.run.length

    def refute_prefix(self) -> str | None:
        """Why the positions before the start are not those of the recorded run; `None` if they are."""
        run, start, prompt = self.chunk.run, self.rows.start, self.rows.prompt
        rounding, recorded = self.chunk.state.proof.candidates[-1].rounding, None
        if start == 0:
            return None
        if len(self.streams) != len(run.resid):
            return f"{len(run.resid)} residual streams where a whole pass has {len(self.streams)}"
        for layer, found in enumerate(self.streams):
            before, recorded = recorded, run.resid[layer][prompt, :start]
            if not (off := rounding.off(found[:, :start], recorded, before, blocks=layer)) <= rounding.of_block:
                return (
                    f"what block {layer} reads at positions before {start} differs by {off:.1e} of what was added there"
                )
        if self.changes_nothing:
            off = rounding.off_logits(self.chunk.state.model.unembed(self.read(run.resid[-1][prompt])), self.logits)
            if not off <= rounding.of_logits:
                return f"the logits are not its last residual stream's, unembedded (off by {off:.1e} of their spread)"
        return None

    def refute(self, replayer: Replayer) -> str | None:
        """Why a replay does not end where the whole passes do; `None` if it does."""
        state, model, rows = self.chunk.state, self.chunk.state.model, self.rows
        if self.changes_nothing:
            return None  # there is nothing to replay
        rounding = state.proof.candidates[0].rounding
        found = replayer.replay(state.plan, rows, self.chunk.lookup, state.reads_last)
        differences = {"the residual stream": rounding.off(found, self.streams[-1][:, -found.shape[1] :])}
        if not isinstance(state.metric, Metric) or rows.start <= self._where.min():
            differences["the logits' spread"] = rounding.off_logits(model.unembed(self.read(found)), self.logits)
        for what, off in differences.items():
            if not off <= rounding.of_logits:
                return f"replayed rows differ from whole forward passes by {off:.1e} of {what}{_advice(model)}"
        return None


def _sample(
    chunk: Chunk, start: Int[np.ndarray, "cell prompt"], moving: Mask, still: Sequence[Mask], few: bool
) -> list[Rows]:
    """A few rows where a wrong assumption would show, those that start at the same position together.

    1. Rows that start early and join at the first block and one behind the middle; one that starts and joins in the middle (two
       neighbouring blocks, since what is wrong may be so in every other one); one that starts and joins late (an edit of the last
       block at an early position would show nowhere).
    2. A row of each kind that is presumed to change nothing: no position changes, or only such as are not read.
    3. Where some block has no mask that could be looked at, what it reads is not known: then a row of every start.
    4. A row of each site that is edited, and in prompts with pictures one that starts inside each kind of segment and joins
       early, where it would be seen if positions of a segment see each other.

    With `few` two rows of 1 are enough.
    """
    plan, turn = chunk.state.plan, chunk.state.proof.turn
    chosen: list[tuple[int, int]] = []
    taken = np.zeros(len(chunk.ids), np.int64)
    taken[0] = 1

    def choose(wanted: Mask, where: _Where) -> None:
        """One of the wanted rows, of those that join at the first block, in the middle, a block later, or at the last."""
        cell, prompt = np.nonzero(wanted)
        if len(cell):
            entry = np.unique(plan.entry[cell])
            last, middle = len(entry) - 1, (len(entry) - 1) // 2
            at = {"first": 0, "middle": middle, "behind it": min(middle + 1, last), "last": last}[where]
            of_entry = np.flatnonzero(plan.entry[cell] == entry[at])
            # Chosen from the prompts that were taken least often (always the first one would hide rows mistaken for the first
            # prompt's), and not always the same head.
            of_entry = of_entry[taken[prompt[of_entry]] == taken[prompt[of_entry]].min()]
            one = of_entry[(5 * turn + 3 * len(chosen)) % len(of_entry)]
            chosen.append((int(cell[one]), int(prompt[one])))
            taken[prompt[one]] += 1

    if len(used := np.unique(start[moving])):
        # Not all at an even distance, which may be where blocks of positions that see each other begin.
        early, middle, late = (moving & (start == used[i]) for i in (0, min(len(used) // 2 | 1, len(used) - 1), -1))
        kinds: list[tuple[Mask, _Where]] = [(middle, "middle"), (early, "behind it"), (late, "last")]
        for wanted, where in [(early, "first"), *([kinds[turn % 3]] if few else kinds)]:
            choose(wanted, where)
    if not all(masks_of(chunk.run)):
        for begin in np.setdiff1d(used, [start[row] for row in chosen]):
            choose(moving & (start == begin), "first")
    if len(plan.site_names) > 1 and not few:
        for site in sorted(plan.site_names):
            of_site = np.zeros(len(moving), bool)
            of_site[np.concatenate([group.cell for group in plan if group.site.name == site])] = True
            if not any(of_site[cell] for cell, _ in chosen):
                choose(moving & of_site[:, None], "middle")
    for begin, end in _segments(chunk):
        inside = moving & (start > begin) & (start < end)  # behind its first position, which may see the others
        if not any(inside[row] and plan.entry[row[0]] <= 0 for row in chosen):
            choose(inside, "first")
    for wanted in () if few and chosen else still:
        choose(wanted, "first")
    # An order in which rows join: the replay wants them sorted.
    at = {row: min(int(start[row]), chunk.run.length) for row in sorted(chosen, key=lambda row: plan.entry[row[0]])}
    found = []
    for begin in sorted(set(at.values())):
        cell, prompt = (np.array(column) for column in zip(*(row for row in at if at[row] == begin), strict=True))
        found.append(Rows(cell, prompt, chunk.ids[prompt], begin))
    return found


def _segments(chunk: Chunk) -> list[tuple[int, int]]:
    """Where the segments of these prompts' pictures, and of the text around them, begin and end; one of each kind and picture."""
    segments = chunk.state.base.segments
    found = {(s.kind, s.image, s.tile): (s.start, s.stop) for s in (segments[int(chunk.ids[0])] if segments else ())}
    return list(found.values())
