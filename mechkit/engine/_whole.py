"""Whole forward passes of a few rows, with which a replay is compared: which rows, and what was computed in them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechkit.engine._causality import masks_of
from mechkit.engine._chunk import Chunk, whole_streams
from mechkit.engine._edits import Rows
from mechkit.engine._in_step import ByLayer
from mechkit.engine._replay import Replayer
from mechkit.hooks._devices import to_device
from mechkit.metrics import Metric

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel

Mask = Bool[np.ndarray, "cell prompt"]
_Where = Literal["first", "middle", "behind it", "last"]  # among the blocks where rows join
TOGETHER = 1024  # tokens of whole passes that run together


def run_whole(chunk: Chunk, sample: Sequence[Rows]) -> list[Whole]:
    """Whole passes of rows, as many together as fit; those that start at the same position stay together."""
    found: list[Whole] = []
    todo = list(sample)
    while todo:
        n = 1
        while n < len(todo) and sum(map(len, todo[: n + 1])) * chunk.run.length <= TOGETHER:
            n += 1
        some, todo = todo[:n], todo[n:]
        cell, prompt, prompt_id = (
            np.concatenate([getattr(rows, of) for rows in some]) for of in ("cell", "prompt", "prompt_id")
        )
        together = Whole(chunk, Rows(cell, prompt, prompt_id, 0))
        at = 0
        for rows in some:
            found.append(together.part(rows, slice(at, at + len(rows))))
            at += len(rows)
    return found


def unedited(chunk: Chunk, prompt: int) -> Rows:
    """A row of no cell, in which nothing is edited."""
    at = np.array([prompt])
    return Rows(np.full(1, -1), at, chunk.ids[at], chunk.run.length)


class Whole:
    """Whole forward passes of some rows that start at the same position, and what was computed in them.

    Attributes:
        rows: The rows; `rows.start` is the prompts' length where they are presumed to change nothing.
        streams: What each block read, and the final stream, `[row pos d_model]` each.
        logits: Where the metric reads (at the last position, for a callable), `[row d_vocab]`.
    """

    def __init__(self, chunk: Chunk, rows: Rows) -> None:
        self.chunk, self.rows = chunk, rows
        metric = chunk.state.metric
        last = np.full(len(rows), chunk.run.length - 1)
        self._where = metric.last_read.numpy()[rows.prompt_id] if isinstance(metric, Metric) else last
        self.streams, self.logits = whole_streams(chunk, rows, self.read)

    def part(self, rows: Rows, which: slice) -> Whole:
        """Some of these rows, with the position where they start."""
        found = copy.copy(self)
        found.rows, found._where = rows, self._where[which]
        found.streams, found.logits = [stream[which] for stream in self.streams], self.logits[which]
        return found

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

    def refute(self, replayer: Replayer) -> ByLayer[str | None]:
        """Why a replay does not end where the whole passes do; `None` if it does."""
        if self.changes_nothing:
            return None  # there is nothing to replay
        state = self.chunk.state
        found = yield from replayer.replay(state.plan, self.rows, self.chunk.lookup, state.reads_last)
        return self.refute_final(found)

    def refute_final(self, found: Float[Tensor, "row pos d_model"]) -> str | None:
        """Why these are not the final streams of the whole passes, at the last positions of them; `None` if they are."""
        state, model, rows = self.chunk.state, self.chunk.state.model, self.rows
        rounding = state.proof.candidates[0].rounding
        differences = {"the residual stream": rounding.off(found, self.streams[-1][:, -found.shape[1] :])}
        if not isinstance(state.metric, Metric) or rows.start <= self._where.min():
            differences["the logits' spread"] = rounding.off_logits(model.unembed(self.read(found)), self.logits)
        for what, off in differences.items():
            if not off <= rounding.of_logits:
                return f"replayed rows differ from whole forward passes by {off:.1e} of {what}{advice(model)}"
        return None


def sample(
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


def advice(model: HookedModel) -> str:
    """What a user may do about blocks that do not replay, if that is known."""
    implementation = getattr(model.bridge.original_model.config, "_attn_implementation", "eager")
    if implementation in ("eager", None):
        return ""
    return (
        f'; model.bridge.original_model.set_attn_implementation("eager") makes it replay (it is {implementation!r} now)'
    )
