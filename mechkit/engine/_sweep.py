"""The sweep: many what-if questions of one base run, answered exactly, under a memory budget.

For each group of prompts of equal length, in chunks that fit the budget:

1. Run the base prompts and record them (`Run`); run the source prompts and keep the sites that will be written.
2. Find where each (cell, prompt) row starts to differ. Rows that differ nowhere, or only to the right of what the metric
   reads, have the base run's value and are not computed.
3. Prove the replay (`mechkit.engine._proof`): unedited blocks from every start that is used, and a few edited rows, against whole
   forward passes. Every sweep makes its own proof: a stored one would be wrong after a change of the model.
4. Replay the rest in batches of rows that start at the same position, sorted by block. A batch that does not fit the
   device is halved, and so is the budget. Nothing in between waits for the device: the answers are copied once per chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechkit._check import checked
from mechkit._progress import Progress
from mechkit._warnings import warn_of_task
from mechkit.engine._checks import check_sweep
from mechkit.engine._chunk import Chunk, Derived, State, Values, whole_forward
from mechkit.engine._edits import BEFORE, NEVER, Cell, EditPlan, Rows, TowerRun, rows_by_start
from mechkit.engine._measure import logits_at_hand
from mechkit.engine._memory import Budget
from mechkit.engine._proof import BatchRefutedError, check_batch, proved_replayer
from mechkit.engine._replay import Replayer, attach_edit, why_not
from mechkit.hooks._cache import ActivationCache
from mechkit.hooks._devices import out_of_memory, to_device
from mechkit.hooks._hooking import Hooks
from mechkit.hooks._lock import one_at_a_time
from mechkit.hooks._nonfinite import explanation, first_nonfinite, where_it_began
from mechkit.hooks._readout import read_logits
from mechkit.hooks._record import record, tower_length
from mechkit.hooks._sites import SITES, TOWER, by_prompt
from mechkit.metrics import AnyMetric, Metric, as_metric
from mechkit.prompts import Prompts, Stacked, first_differences
from mechkit.result import Cost

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel


@dataclass(frozen=True, eq=False)
class Answers:
    """What a sweep found.

    Attributes:
        values: The metric of every cell and prompt; NaN where a prompt lacks the cell's position. Where several metrics are read
            together, they are the last axis, here and below.
        base: The metric of the unedited base run.
        source: The metric of the unedited source run, if there was one.
        cost: Block-tokens computed, and what one whole forward pass per cell would have taken.
        replay: How the rows were computed: `"suffix"`, or `"full: …"` with the reason for falling back.
    """

    values: Float[Tensor, "cell prompt *metric"]
    base: Float[Tensor, "prompt *metric"]
    source: Float[Tensor, "prompt *metric"] | None
    cost: Cost
    replay: str


@checked
@one_at_a_time
@torch.no_grad()
def sweep(
    model: HookedModel,
    base: Prompts,
    cells: Sequence[Cell],
    metric: AnyMetric,
    *,
    source: Prompts | None = None,
    source_sites: ActivationCache | None = None,
    values: Values | None = None,
    derived: Mapping[str, Derived] | None = None,
    base_is: str = "corrupted",
    source_is: str = "clean",
    budget: int | None = None,
    progress: bool = True,
    replay: bool = True,
) -> Answers:
    """Answers every cell for every prompt.

    Args:
        model: In evaluation mode.
        base: The prompts that are edited.
        cells: The edits of each cell.
        metric: What to read: made for these prompts, or a callable on all of them together.
        source: Prompts whose activations `"source"` edits take; each as long as its base prompt.
        source_sites: The source run's activations, if they are already computed; they must be of exactly these prompts.
        values: `{key: {(site, layer): value}}` for edits with other keys; each value broadcastable to the activation
            `[prompt pos …]`, with a first axis of 1 or of all prompts (behind the axis of the variants, if edits name them).
        derived: `{key: Derived}` for edits whose values are made from the two runs; needs `source`.
        base_is, source_is: Which of `"clean"` and `"corrupted"` the two runs are, for metrics that compare with one of them.
        budget: Bytes of working memory to stay within; default half of what the device has free (1 GiB on a CPU).
        progress: Whether long sweeps show a progress bar.
        replay: `False` runs a whole forward pass for every row: the slow way, for comparison.

    Raises:
        ValueError: wrong lengths or counts, training mode, a site or an index that does not exist, NaN in a run.
    """
    plan = EditPlan(cells, model.n_layers)
    runs = {base_is: "base", source_is: "source"} if source is not None else {base_is: "base"}
    room = Budget.of(model, budget)
    measured = as_metric(metric)
    state = State(model, base, source, source_sites, values or {}, derived or {}, plan, measured, runs, room, replay)
    check_sweep(state)
    bar = Progress(len(cells) * len(base), "row", progress)
    with bar:
        try:
            _sweep_all(state, bar)
        except BatchRefutedError as error:  # no row that was replayed is believed
            state.fallback = str(error)
            bar.reset()
            _sweep_all(state, bar)
    return Answers(
        state.values,
        state.base_metric,
        None if source is None else state.source_metric,
        Cost(state.block_tokens, len(cells) * _tokens_of_runs(state), state.proof.block_tokens),
        "suffix" if state.fallback is None else f"full: {state.fallback}",
    )


def _tokens_of_runs(state: State) -> int:
    """(block, token) pairs of a whole pass of each prompt."""
    return int(state.base.lengths.sum()) * state.model.n_layers + int(state.tower_tokens.sum())


def _sweep_all(state: State, bar: Progress) -> None:
    """Prompts of one length after the other, the longest first, as many at a time as fit."""
    model, plan = state.model, state.plan
    for batch in state.base.batches(longest_first=True):
        length, todo = batch.length, batch.ids
        while todo:
            at_once = len(todo)
            if not state.whole_set:
                kept = [*plan.sites, *(site for one in state.derived.values() for site in 2 * one.sites)]
                at_once = state.budget.prompts_at_once(model, length, kept, plan.n_cells)
            try:
                _sweep_chunk(state, todo[:at_once], bar)
                todo = todo[at_once:]
                continue
            except RuntimeError as error:  # while recording; batches look after themselves
                if not out_of_memory(error) or state.whole_set or min(at_once, len(todo)) == 1:
                    raise
            state.budget.halve()  # out here the error is gone, and with it all that its frames held


# -- one chunk of prompts ----------------------------------------------------------------------------------------------


def _sweep_chunk(state: State, ids: Sequence[int], bar: Progress) -> None:
    attached = state.model._attached()
    chunk, start, absent, replayer = _recorded(state, np.array(ids))
    length = chunk.run.length
    _read_baselines(chunk)
    _warn_of_task(state)
    if replayer is None:
        start = np.zeros_like(start)  # whole forward passes: nothing is skipped, no position is presumed unaffected
    if state.whole_set:
        # A callable needs all prompts of a cell together.
        start = np.broadcast_to(start.min(1, keepdims=True), start.shape)
        absent = absent | absent.any(1, keepdims=True)
    unchanged = (start == NEVER) | (start > _unread(chunk))
    answer = torch.full((*unchanged.shape, *state.values.shape[2:]), torch.nan, dtype=state.values.dtype)
    cell, prompt = unchanged.nonzero()
    answer[cell, prompt] = state.base_metric[ids][prompt]
    done, found = [], []
    for rows in rows_by_start(state.plan, chunk.ids, start, ~unchanged & ~absent):
        for part in _batches(state, rows, length, replayer is None, bar):
            done.append(part)
            found.append(_answer(chunk, replayer, part))
    if done:  # copied once per chunk: each copy would wait for the device
        cell, prompt = (np.concatenate([getattr(part, of) for part in done]) for of in ("cell", "prompt"))
        answer[cell, prompt] = torch.cat(found).cpu().to(answer.dtype)
    answer[torch.from_numpy(absent)] = torch.nan
    bar.update(int(unchanged.sum()))
    _refuse_leaks(state, attached)
    _refuse_nan(state, chunk, answer, absent)
    state.values[:, ids] = answer
    if replayer is not None:
        state.block_tokens += replayer.block_tokens


def _refuse_leaks(state: State, attached: Mapping[Any, int]) -> None:
    """Raises where a run left a hook behind: what came after it may be wrong."""
    if state.model._attached() != attached:
        raise RuntimeError(
            "a hook of an edit was left attached to the model: this is a defect of mechkit; no value was returned"
        )


def _recorded(state: State, ids: np.ndarray) -> tuple[Chunk, np.ndarray, np.ndarray, Replayer | None]:
    """Prompts that were recorded; where each row begins to differ, and which rows there are not; and a proved replayer.

    Where there is none, the prompts are run as the rows will be: whole, and without a cache.
    """
    if state.fallback is None:
        state.fallback = _cannot_replay(state)
    chunk = None if state.fallback is not None else _run_chunk(state, ids)
    if chunk is not None and state.plan.in_tower and chunk.run.between:
        state.fallback = "the model adds features of the picture to the residual stream between its blocks"
    if chunk is not None and state.fallback is None:
        differs = np.zeros(len(ids), np.int64)
        if state.source is not None:
            differs = first_differences(state.base, state.source, ids.tolist()).numpy()
        reach = np.append(chunk.reach, chunk.run.length)
        start, absent = state.plan.starts(chunk.ids, chunk.run.length, reach[differs], state.derived, chunk.tower)
        start = np.where(start < NEVER, reach[np.minimum(start, chunk.run.length)], NEVER)
        attached = state.model._attached()
        replayer = proved_replayer(chunk, start, absent, _unread(chunk))
        _refuse_leaks(state, attached)
        if replayer is not None:
            return chunk, start, absent, replayer
    recorded_whole = chunk is not None and chunk.run.refused is not None
    whole = chunk if recorded_whole else _run_chunk(state, ids, blocks=False)
    assert whole is not None  # an error would have been raised
    start, absent = state.plan.starts(whole.ids, whole.run.length, np.zeros(len(ids), np.int64), tower=whole.tower)
    return whole, start, absent, None


def _cannot_replay(state: State) -> str | None:
    """What rules a replay out before anything is run."""
    if not state.replay:
        return "asked for"
    if state.model.reads_pictures_alone:
        return "each patch sees all others: not a causal model"
    if any(group.site.stack != TOWER for group in state.plan.groups.get(BEFORE, ())):
        return "an edit before the first block"
    if state.model.has_hooks:
        return "other hooks are attached to the model"
    return None


def _unread(chunk: Chunk) -> Any:
    """The position behind which nothing is read, of each prompt."""
    metric = chunk.state.metric
    return metric.last_read.numpy()[chunk.ids] if isinstance(metric, Metric) else NEVER


def _run_chunk(state: State, ids: np.ndarray, blocks: bool = True) -> Chunk | None:
    """Runs prompts and keeps what rows need; `None`, with the reason in `state.fallback`, where `blocks` cannot be recorded."""
    model = state.model

    def rows(prompts: Prompts) -> Stacked:
        return prompts.stack(ids.tolist()).to(model.device)

    derived = sorted({site for one in state.derived.values() for site in one.sites})
    try:
        # Derived values are made of streams in any case.
        run = record(model, rows(state.base), derived, blocks=blocks or bool(state.derived), cached=blocks)
    except Exception as error:
        if not blocks or (isinstance(error, RuntimeError) and out_of_memory(error)):
            raise
        state.fallback = f"its run cannot be recorded: {why_not(error)}"
        return None
    tower = _tower_run(state, ids, run.rows)
    source = None
    if state.source is not None:
        at_hand = state.source_sites
        sites = sorted({*(state.plan.sites if at_hand is None else ()), *derived})
        source = record(model, rows(state.source), sites, blocks=False)
        if at_hand is not None:
            for key in state.plan.sites:
                found = by_prompt(SITES[key[0]], at_hand[key], len(state.base))
                source.sites[key] = found[ids].to(model.device)
    chunk = Chunk(state, ids, run, source, tower)
    state.block_tokens += (1 + (source is not None)) * len(ids) * chunk.tokens_of_run
    chunk.make_derived()
    return chunk


def _tower_run(state: State, ids: np.ndarray, rows: Stacked) -> TowerRun | None:
    """What is known of the vision tower's part, where something is edited in it."""
    if not state.plan.in_tower:
        return None
    length, same = tower_length(state.model, rows), np.zeros(len(ids), bool)
    if state.source is not None:
        same = rows.same_inputs(state.source.stack(ids.tolist()).to(state.model.device)).cpu().numpy()
    state.tower_tokens[ids] = length * state.model.stacks[TOWER].n_layers
    return TowerRun(rows.inputs_from, length, same)


def _read_baselines(chunk: Chunk) -> None:
    """The metric of the unedited runs, which must be finite."""
    state, ids = chunk.state, chunk.ids
    for name, one, into in (("base", chunk.run, state.base_metric), ("source", chunk.source, state.source_metric)):
        if one is None:
            continue
        into[ids] = chunk.baseline(one).to(into.dtype)
        if len(bad := (~torch.isfinite(into[ids])).nonzero()):
            at = int(bad[0, 0])
            value = into[ids][tuple(bad[0])].item()
            raise ValueError(
                f"{name} run: expected a finite metric, got {value} for prompt {ids[at]}; "
                f"{where_it_began(state.model, one.rows[[at]])}"
            )


def _warn_of_task(state: State) -> None:
    """Warns where there is nothing to explain, as soon as all prompts were run unedited."""
    metric = state.metric
    if state.task_checked or not isinstance(metric, Metric) or bool(state.base_metric.isnan().any()):
        return
    state.task_checked = True
    tensors = {"base": state.base_metric, "source": state.source_metric}
    values = {run: tensors[which] for run, which in state.runs.items()}
    for i, part in enumerate(metric.parts or (metric,)):
        warn_of_task(part.name, {run: value[:, i] if metric.parts else value for run, value in values.items()})


def _batches(state: State, rows: Rows, length: int, whole: bool, bar: Progress) -> Iterator[Rows]:
    """Cuts rows into batches that fit the budget as it stands; the consumer may shrink the budget by running out of memory."""
    done = 0
    some, places = (state.metric.tokens, state.metric.n_places) if isinstance(state.metric, Metric) else (None, 1)
    logits = places * (len(some) if some is not None else state.model.d_vocab)
    logits = length * state.model.d_vocab if whole or state.whole_set else logits
    unit = len(state.base) if state.whole_set else 1  # a callable metric's cells stay whole
    while done < len(rows):
        tower = int(state.tower_tokens[rows.prompt_id].max())
        fits = state.budget.rows_at_once(state.model, length, length - rows.start, state.plan, logits, tower)
        size = max(unit, fits // unit * unit)
        yield rows[done : done + size]
        bar.update(min(size, len(rows) - done))
        done += size


def _answer(chunk: Chunk, replayer: Replayer | None, rows: Rows) -> Tensor:
    """The metric of each row, on the device. When the device runs out of memory: the budget is halved, and so is the batch."""
    state = chunk.state
    unit = len(chunk.ids) if state.whole_set else 1
    try:
        return _answer_batch(chunk, replayer, rows)
    except RuntimeError as error:
        if not out_of_memory(error) or len(rows) <= unit:
            raise
    state.budget.halve()
    half = max(unit, len(rows) // 2 // unit * unit)
    return torch.cat([_answer(chunk, replayer, rows[:half]), _answer(chunk, replayer, rows[half:])])


def _answer_batch(chunk: Chunk, replayer: Replayer | None, rows: Rows) -> Tensor:
    state, metric = chunk.state, chunk.state.metric
    if isinstance(metric, Metric):
        if replayer is None:
            logits = chunk.chosen_tokens(chunk.at_positions(whole_forward(chunk, rows), rows.prompt, 0))
        else:
            resid = replayer.replay(state.plan, rows, chunk.lookup, state.reads_last)
            check_batch(chunk, rows, resid)
            resid = resid[:, 0] if state.reads_last else chunk.at_positions(resid, rows.prompt, rows.start)
            logits = read_logits(state.model, resid, state.read_tokens)
        return chunk.read(logits, rows.prompt)
    if replayer is None:
        return chunk.call(logits_at_hand(whole_forward(chunk, rows)), rows.prompt)
    suffix = replayer.replay(state.plan, rows, chunk.lookup, False)
    check_batch(chunk, rows, suffix)

    def logits_of(some: np.ndarray) -> Tensor:
        before = chunk.run.resid[-1][to_device(rows.prompt[some], suffix.device), : rows.start]
        return read_logits(state.model, torch.cat([before, suffix[to_device(some, suffix.device)]], 1))

    return chunk.call(logits_of, rows.prompt)


# -- refusing NaN ------------------------------------------------------------------------------------------------------


def _refuse_nan(state: State, chunk: Chunk, answer: Tensor, absent: np.ndarray) -> None:
    """Raises for a NaN, and for an infinity that is not the metric's own: what the edit leads to is not finite."""
    values = answer.flatten(2).numpy() if answer.ndim > 2 else answer[..., None].numpy()  # [cell prompt metric]
    bad = ~np.isfinite(values) & ~absent[..., None]
    if not bad.any():
        return
    nan = np.isnan(values) & bad
    cell, at, which = map(int, np.argwhere(nan if nan.any() else bad)[0])
    rows = Rows(np.array([cell]), np.array([at]), chunk.ids[[at]], 0)
    groups = [group for group in state.plan if len(group.match(rows.cell)[0])]

    def attach(hooks: Hooks) -> None:
        for group in groups:
            attach_edit(hooks, group, rows, chunk.lookup)

    results = tuple(sorted({group.layer for group in groups if group.site.name == "result"}))
    found = first_nonfinite(state.model, chunk.run.rows[[at]], attach, results)
    if found is None and not nan.any():
        return  # a metric may be infinite where all logits are finite
    raise ValueError(
        f"edited run: the metric is {values[cell, at, which]} for prompt {chunk.ids[at]} in cell {cell} of {state.plan.n_cells}, "
        f"though the unedited run was finite; {explanation(found, state.model.dtype)}"
    )
