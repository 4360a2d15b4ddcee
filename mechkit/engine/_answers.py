"""The rows of a sweep, in batches: how many run together, and their metric.

Rows of one chunk that begin at the same position run together (`answers_by_start`), or rows of several chunks that begin anywhere
(`packed_answers`). A batch that does not fit the device is halved, and so is the budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechkit._progress import Progress
from mechkit.engine._chunk import Chunk, State, whole_forward
from mechkit.engine._edits import NEVER, Rows, rows_by_start
from mechkit.engine._in_step import ByLayer, at_once, in_step
from mechkit.engine._measure import logits_at_hand
from mechkit.engine._packed import PackedReplayer
from mechkit.engine._packing import PackedRows
from mechkit.engine._proof import Examined, check_batch, check_packed_batch
from mechkit.engine._replay import Replayer
from mechkit.hooks._devices import out_of_memory, to_device
from mechkit.hooks._readout import read_logits
from mechkit.metrics import Metric

Found = list[tuple[np.ndarray, np.ndarray, Tensor]]  # rows that were computed: their cells, their prompts, their values


@dataclass(eq=False)
class Ready:
    """A chunk of prompts that was recorded, whose rows are to be computed.

    Attributes:
        chunk: The prompts.
        start: Where each row begins to differ, `[cell prompt]`.
        absent: Whether the prompt lacks a position of the cell.
        examined: What the proof knows of it; `None` where whole passes are run.
        attached: The hooks that the model had before.
    """

    chunk: Chunk
    start: np.ndarray
    absent: np.ndarray
    examined: Examined | None
    attached: Mapping[Any, int]

    @cached_property
    def unchanged(self) -> np.ndarray:
        """Whether the row is not computed, because nothing that is read changes."""
        return (self.start == NEVER) | (self.start > unread(self.chunk))

    @property
    def wanted(self) -> np.ndarray:
        return ~self.unchanged & ~self.absent


def unread(chunk: Chunk) -> Any:
    """The position behind which nothing is read, of each prompt."""
    metric = chunk.state.metric
    return metric.last_read.numpy()[chunk.ids] if isinstance(metric, Metric) else NEVER


def answers_by_start(state: State, one: Ready, replayer: Replayer | None, bar: Progress) -> Found:
    """The answers of one chunk's rows, those together that begin at the same position: cells, prompts and values."""
    found = []
    for rows in _batches(state, one, replayer is None):
        found.append((rows.cell, rows.prompt, _answer(one.chunk, replayer, rows)))
        bar.update(len(rows))
    return found


def _batches(state: State, one: Ready, whole: bool) -> Iterator[Rows]:
    """Cuts rows into batches that fit the budget as it stands; the consumer may shrink the budget by running out of memory."""
    length = one.chunk.run.length
    some, places = (state.metric.tokens, state.metric.n_places) if isinstance(state.metric, Metric) else (None, 1)
    logits = places * (len(some) if some is not None else state.model.d_vocab)
    logits = length * state.model.d_vocab if whole or state.whole_set else logits
    unit = len(state.base) if state.whole_set else 1  # a callable metric's cells stay whole
    for rows in rows_by_start(state.plan, one.chunk.ids, one.start, one.wanted):
        done = 0
        while done < len(rows):
            tower = int(state.tower_tokens[rows.prompt_id].max())
            fits = state.budget.rows_at_once(state.model, length, length - rows.start, state.plan, logits, tower)
            size = max(unit, fits // unit * unit)
            yield rows[done : done + size]
            done += size


def _answer(chunk: Chunk, replayer: Replayer | None, rows: Rows) -> Tensor:
    """The metric of each row, on the device. When the device runs out of memory: the budget is halved, and so is the batch."""
    state = chunk.state
    unit = len(chunk.ids) if state.whole_set else 1
    try:
        return at_once(_answer_batch(chunk, replayer, rows))
    except RuntimeError as error:
        if not out_of_memory(error) or len(rows) <= unit:
            raise
    state.budget.halve()
    half = max(unit, len(rows) // 2 // unit * unit)
    return torch.cat([_answer(chunk, replayer, rows[:half]), _answer(chunk, replayer, rows[half:])])


def _answer_batch(chunk: Chunk, replayer: Replayer | None, rows: Rows) -> ByLayer[Tensor]:
    state, metric = chunk.state, chunk.state.metric
    if isinstance(metric, Metric):
        if replayer is None:
            logits = chunk.chosen_tokens(chunk.at_positions(whole_forward(chunk, rows), rows.prompt, 0))
        else:
            resid = yield from replayer.replay(state.plan, rows, chunk.lookup, state.reads_last)
            check_batch(chunk, rows, resid)
            resid = resid[:, 0] if state.reads_last else chunk.at_positions(resid, rows.prompt, rows.start)
            logits = read_logits(state.model, resid, state.read_tokens)
        return chunk.read(logits, rows.prompt)
    if replayer is None:
        return chunk.call(logits_at_hand(whole_forward(chunk, rows)), rows.prompt)
    suffix = yield from replayer.replay(state.plan, rows, chunk.lookup, False)
    check_batch(chunk, rows, suffix)

    def logits_of(some: np.ndarray) -> Tensor:
        before = chunk.run.resid[-1][to_device(rows.prompt[some], suffix.device), : rows.start]
        return read_logits(state.model, torch.cat([before, suffix[to_device(some, suffix.device)]], 1))

    return chunk.call(logits_of, rows.prompt)


def packed_answers(state: State, ready: Sequence[Ready], replayer: PackedReplayer, bar: Progress) -> list[Found]:
    """The answers of rows that are packed, whatever chunk they are of and wherever they begin, by the block where they join."""
    found: list[Found] = [[] for _ in ready]
    for batch in _packed_batches(state, ready):
        for chunk, at, answer in _answer_packed(state, replayer, batch):
            found[chunk].append((batch.cell[at], batch.prompt[at], answer))
        bar.update(len(batch))
    return found


def _packed_batches(state: State, ready: Sequence[Ready]) -> Iterator[PackedRows]:
    """Cuts the rows of all chunks into batches that fit the budget as it stands."""
    parts = [
        (rows, number, one.chunk.run.length)
        for number, one in enumerate(ready)
        for rows in rows_by_start(state.plan, one.chunk.ids, one.start, one.wanted)
    ]
    if not parts:
        return
    rows = PackedRows.of(state.plan, parts)
    metric = state.metric
    assert isinstance(metric, Metric)
    logits = metric.n_places * (len(metric.tokens) if metric.tokens is not None else state.model.d_vocab)
    done = 0
    while done < len(rows):
        size = state.budget.packed_rows_at_once(state.model, rows.length[done:], rows.suffix[done:], state.plan, logits)
        yield rows[done : done + size]
        done += size


Answered = list[tuple[int, np.ndarray, Tensor]]  # for each chunk with rows in a batch: which rows, and their metric


def _answer_packed(state: State, replayer: PackedReplayer, rows: PackedRows) -> Answered:
    """The answers of a batch. Out of memory the batch is halved."""
    try:
        return at_once(_answer_packed_batch(state, replayer, rows))
    except RuntimeError as error:
        if not out_of_memory(error) or len(rows) <= 1:
            raise
    state.budget.halve()
    half = len(rows) // 2
    found = _answer_packed(state, replayer, rows[:half])
    found += [(chunk, at + half, answer) for chunk, at, answer in _answer_packed(state, replayer, rows[half:])]
    return found


def _answer_packed_batch(state: State, replayer: PackedReplayer, rows: PackedRows) -> ByLayer[Answered]:
    resid = yield from replayer.replay(state.plan, rows, state.reads_last)
    check_packed_batch(replayer, rows, resid, state.reads_last)
    found = []
    of_chunk = [np.flatnonzero(rows.chunk == number) for number in range(len(replayer.chunks))]
    streams = [
        chunk.at_tokens(resid, rows[at], rows.first[at]) if not state.reads_last else resid[to_device(at, resid.device)]
        for chunk, at in zip(replayer.chunks, of_chunk, strict=True)
    ]
    logits = read_logits(state.model, torch.cat(streams), state.read_tokens).split([len(at) for at in of_chunk])
    for number, (chunk, at, mine) in enumerate(zip(replayer.chunks, of_chunk, logits, strict=True)):
        if len(at):
            found.append((number, at, chunk.read(mine, rows.prompt[at])))
    return found


class AnswersInStep:
    """The answers of rows whose batches go through each block together, so that each block is fetched once for as many batches as
    the budget has room for: for models whose weights are not all in memory.

    Attributes:
        found: The answers so far, of each chunk.
    """

    def __init__(self, state: State, ready: Sequence[Ready]) -> None:
        self.state, self.ready = state, ready
        self.found: list[Found] = [[] for _ in ready]
        self._groups: list[list[Rows | PackedRows]] = []

    def begin(self, replayer: Replayer | PackedReplayer) -> list[ByLayer[None]]:
        """The first group's work; what was found by another replayer before is forgotten."""
        self.found = [[] for _ in self.ready]
        packs = isinstance(replayer, PackedReplayer)
        batches = _packed_batches(self.state, self.ready) if packs else _batches(self.state, self.ready[0], False)
        self._groups = list(self._grouped(batches))
        return self._work(replayer)

    def finish(self, replayer: Replayer | PackedReplayer) -> list[Found]:
        """The answers, those of the other groups too."""
        while self._groups:
            group, found = self._groups[0], [len(one) for one in self.found]
            try:
                in_step(self._work(replayer))
                continue
            except RuntimeError as error:
                if not out_of_memory(error) or (len(group) == 1 and len(group[0]) == 1):
                    raise
            for one, n in zip(self.found, found, strict=True):  # none of the group's stands
                del one[n:]
            self.state.budget.halve()
            whole = group if len(group) > 1 else [group[0][: len(group[0]) // 2], group[0][len(group[0]) // 2 :]]
            self._groups[:0] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
        return self.found

    def _grouped(self, batches: Iterable[Rows | PackedRows]) -> Iterator[list[Rows | PackedRows]]:
        """As many batches together as may wait for one another."""
        group: list[Rows | PackedRows] = []
        room = self.state.budget.tokens_waiting(self.state.model)
        waiting = 0
        for batch in batches:
            n = int(batch.n_tokens if isinstance(batch, PackedRows) else self._length(batch) * len(batch))
            if group and waiting + n > room:
                yield group
                group, waiting = [], 0
            group.append(batch)
            waiting += n
        if group:
            yield group

    def _length(self, rows: Rows) -> int:
        return self.ready[0].chunk.run.length - rows.start

    def _work(self, replayer: Replayer | PackedReplayer) -> list[ByLayer[None]]:
        return [self._answer(replayer, batch) for batch in (self._groups.pop(0) if self._groups else ())]

    def _answer(self, replayer: Replayer | PackedReplayer, batch: Rows | PackedRows) -> ByLayer[None]:
        into = self.found
        if isinstance(replayer, PackedReplayer):
            assert isinstance(batch, PackedRows)
            for chunk, at, answer in (yield from _answer_packed_batch(self.state, replayer, batch)):
                into[chunk].append((batch.cell[at], batch.prompt[at], answer))
        else:
            assert isinstance(batch, Rows)
            answer = yield from _answer_batch(self.ready[0].chunk, replayer, batch)
            into[0].append((batch.cell, batch.prompt, answer))
