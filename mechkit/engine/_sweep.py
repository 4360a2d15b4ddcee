"""The sweep: many what-if questions of one base run, answered exactly, under a memory budget.

For each group of prompts of equal length, in chunks that fit the budget:

1. Run the base prompts and record them (`Run`); run the source prompts and keep the sites that will be written.
2. Find where each (cell, prompt) row starts to differ. Rows that differ nowhere, or only to the right of what the metric
   reads, have the base run's value and are not computed.
3. Prove the replay (`mechkit.engine._proof`): unedited blocks from every start that is used, and a few edited rows, against whole
   forward passes. Every sweep makes its own proof: a stored one would be wrong after a change of the model.
4. Replay the rest in batches, sorted by block: rows that start anywhere, of all prompts that were recorded together, or, where
   blocks cannot be packed, rows that start at the same position. A batch that does not fit the device is halved, and so is the
   budget. Nothing in between waits for the device: the answers are copied once per chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechkit._check import checked
from mechkit._progress import Progress
from mechkit._warnings import warn_of_task
from mechkit.engine._answers import AnswersInStep, Found, Ready, answers_by_start, packed_answers, unread
from mechkit.engine._checks import check_sweep
from mechkit.engine._chunk import Chunk, Derived, Recordings, State, Values
from mechkit.engine._edits import BEFORE, NEVER, Cell, EditPlan, Rows, TowerRun
from mechkit.engine._memory import SMALLEST, Budget
from mechkit.engine._packed import PackedReplayer
from mechkit.engine._proof import (
    BatchRefutedError,
    Examined,
    examined,
    proved_replayer,
)
from mechkit.engine._replay import Replayer, attach_edit, why_not
from mechkit.hooks._cache import ActivationCache
from mechkit.hooks._devices import out_of_memory
from mechkit.hooks._hooking import Hooks
from mechkit.hooks._lock import one_at_a_time
from mechkit.hooks._nonfinite import explanation, first_nonfinite, where_it_began
from mechkit.hooks._record import Run, record, taken_apart, tower_length
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
    recordings: Recordings | None = None,
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
        recordings: Shared by several sweeps of the same prompts, each with `derived` values of its own: they are run once.

    Raises:
        ValueError: wrong lengths or counts, training mode, a site or an index that does not exist, NaN in a run.
    """
    plan = EditPlan(cells, model.n_layers)
    runs = {base_is: "base", source_is: "source"} if source is not None else {base_is: "base"}
    room = Budget.of(model, budget)
    measured = as_metric(metric)
    state = State(
        model, base, source, source_sites, values or {}, derived or {}, plan, measured, runs, room, replay, recordings
    )
    check_sweep(state)
    bar = Progress(len(cells) * len(base), "row", progress)
    with bar:
        while True:
            try:
                _sweep_all(state, bar)
                break
            except BatchRefutedError as error:  # no row that was replayed is believed
                state.refute_batches(str(error))
                bar.reset()
    return Answers(
        state.values,
        state.base_metric,
        None if source is None else state.source_metric,
        Cost(state.block_tokens, len(cells) * _tokens_of_runs(state), state.proof.block_tokens - state.proof_before),
        "suffix" if state.fallback is None else f"full: {state.fallback}",
    )


def _tokens_of_runs(state: State) -> int:
    """(block, token) pairs of a whole pass of each prompt."""
    return int(state.base.lengths.sum()) * state.model.n_layers + int(state.tower_tokens.sum())


def _sweep_all(state: State, bar: Progress) -> None:
    """Prompts of one length after the other, the longest first, as many at a time as fit; their rows are packed together."""
    ready: list[Ready] = []
    state.all_fit = sum(len(one.ids) / _prompts_at_once(state, one.length) for one in state.base.batches()) <= 1
    room = 1.0  # the share of the memory for recorded runs that is left

    def answer() -> None:
        nonlocal room
        if ready:
            _answer_ready(state, ready, bar)
        ready.clear()
        room = 1.0

    for batch in state.base.batches(longest_first=True):
        length, todo = batch.length, batch.ids
        while todo:
            at_once = len(todo) if state.whole_set else _prompts_at_once(state, length)
            needs = min(len(todo), at_once) / at_once
            if needs > room:
                answer()
            try:
                ready.append(_ready(state, todo[:at_once], double=2 * len(todo) <= at_once))
                room, todo = room - needs, todo[at_once:]
                if state.fallback is not None or not (state.proof.candidates and state.proof.candidates[0].packs):
                    answer()
                continue
            except RuntimeError as error:  # while recording; batches look after themselves
                if not out_of_memory(error) or state.whole_set or (min(at_once, len(todo)) == 1 and not ready):
                    raise
            answer()  # out here the error is gone, and with it all that its frames held
            state.budget.halve()
    answer()


def _prompts_at_once(state: State, length: int) -> int:
    """How many prompts of a length may be recorded together."""
    of_both = {site for one in state.derived.values() for site in one.sites}
    if state.recordings is not None:
        of_both |= state.recordings.sites
    return state.budget.prompts_at_once(
        state.model, length, [*state.plan.sites, *of_both, *of_both], state.plan.n_cells
    )


# -- one chunk of prompts ----------------------------------------------------------------------------------------------


def _ready(state: State, ids: Sequence[int], double: bool) -> Ready:
    """Records prompts, and reads the metric of their unedited runs. With `double` there is room for two runs of them."""
    attached = state.model._attached()
    found = _recorded(state, np.array(ids), attached, double)
    _read_baselines(found.chunk)
    _warn_of_task(state)
    if state.whole_set:
        # A callable needs all prompts of a cell together.
        found.start = np.broadcast_to(found.start.min(1, keepdims=True), found.start.shape)
        found.absent = found.absent | found.absent.any(1, keepdims=True)
    return found


def _answer_ready(state: State, ready: list[Ready], bar: Progress) -> None:
    """Computes the rows of chunks that were recorded: packed together, or one chunk's, by start."""
    replayer, in_step = None, None
    if (several := [one.examined for one in ready if one.examined is not None]) and state.fallback is None:
        attached = state.model._attached()
        if state.budget.waits:
            in_step = AnswersInStep(state, ready)
        replayer = _proved(state, several, in_step)
        _refuse_leaks(state, attached)
        if replayer is None and len(several) > 1 and state.fallback is None:
            for one in ready:
                _answer_ready(state, [one], bar)
            return
    if replayer is None:
        for i, one in enumerate(ready):  # one after the other: each is run again without a cache
            ready[i] = one = one if one.examined is None else _for_whole_passes(state, one.chunk, one.attached)
            _read_baselines(one.chunk)
            _write_answers(state, one, answers_by_start(state, one, None, bar), bar)
    elif in_step is not None:
        for one, found in zip(ready, in_step.finish(replayer), strict=True):
            _write_answers(state, one, found, bar)
            bar.update(sum(len(part[0]) for part in found))
    elif isinstance(replayer, PackedReplayer):
        for one, found in zip(ready, packed_answers(state, ready, replayer, bar), strict=True):
            _write_answers(state, one, found, bar)
    else:
        _write_answers(state, ready[0], answers_by_start(state, ready[0], replayer, bar), bar)
    if replayer is not None:
        state.block_tokens += replayer.block_tokens


def _proved(state: State, several: list[Examined], in_step: AnswersInStep | None) -> Replayer | PackedReplayer | None:
    """A replayer that was compared with whole passes (`proved_replayer`). Where batches wait for one another the first of them
    run along with the proof, so that each block is fetched once for both; what does not fit is tried in half the budget."""
    if in_step is None:
        return proved_replayer(several)
    while True:
        try:
            return proved_replayer(several, in_step.begin)
        except RuntimeError as error:
            if not out_of_memory(error) or state.budget.bytes < SMALLEST:
                raise
        state.budget.halve()


def _write_answers(state: State, one: Ready, found: Found, bar: Progress) -> None:
    """Puts the answers of a chunk's rows, `(cells, prompts, values)`, where they belong."""
    answer = torch.full((*one.unchanged.shape, *state.values.shape[2:]), torch.nan, dtype=state.values.dtype)
    cell, prompt = one.unchanged.nonzero()
    answer[cell, prompt] = state.base_metric[one.chunk.ids][prompt]
    if found:  # copied once per chunk: each copy would wait for the device
        cell, prompt = (np.concatenate([part[i] for part in found]) for i in (0, 1))
        answer[cell, prompt] = torch.cat([part[2] for part in found]).cpu().to(answer.dtype)
    answer[torch.from_numpy(one.absent)] = torch.nan
    bar.update(int(one.unchanged.sum()))
    _refuse_leaks(state, one.attached)
    _refuse_nan(state, one.chunk, answer, one.absent)
    state.values[:, one.chunk.ids] = answer


def _refuse_leaks(state: State, attached: Mapping[Any, int]) -> None:
    """Raises where a run left a hook behind: what came after it may be wrong."""
    if state.model._attached() != attached:
        raise RuntimeError(
            "a hook of an edit was left attached to the model: this is a defect of mechkit; no value was returned"
        )


def _recorded(state: State, ids: np.ndarray, attached: Mapping[Any, int], double: bool) -> Ready:
    """Prompts that were recorded and examined; where nothing can be replayed they are run as the rows will be: with no cache."""
    if state.fallback is None:
        state.fallback = _cannot_replay(state)
    chunk = None if state.fallback is not None else _run_chunk(state, ids, double=double)
    if chunk is not None and state.plan.in_tower and chunk.run.between:
        state.fallback = "the model adds features of the picture to the residual stream between its blocks"
    if chunk is not None and state.fallback is None:
        differs = np.zeros(len(ids), np.int64)
        if state.source is not None:
            differs = first_differences(state.base, state.source, ids.tolist()).numpy()
        reach = np.append(chunk.reach, chunk.run.length)
        start, absent = state.plan.starts(chunk.ids, chunk.run.length, reach[differs], state.derived, chunk.tower)
        start = np.where(start < NEVER, reach[np.minimum(start, chunk.run.length)], NEVER)
        found = examined(chunk, start, absent, unread(chunk))
        _refuse_leaks(state, attached)
        if found is not None:
            return Ready(chunk, start, absent, found, attached)
    return _for_whole_passes(state, chunk, attached, ids)


def _for_whole_passes(
    state: State, chunk: Chunk | None, attached: Mapping[Any, int], ids: np.ndarray | None = None
) -> Ready:
    """Prompts whose rows are run whole: nothing is skipped, no position is presumed unaffected."""
    recorded_whole = chunk is not None and chunk.run.refused is not None
    if not recorded_whole:
        mine = chunk.ids if chunk is not None else ids
        assert mine is not None
        chunk = _run_chunk(state, mine, blocks=False)
    assert chunk is not None  # an error would have been raised
    start, absent = state.plan.starts(
        chunk.ids, chunk.run.length, np.zeros(len(chunk.ids), np.int64), tower=chunk.tower
    )
    if state.whole_set:
        absent = absent | absent.any(1, keepdims=True)
    return Ready(chunk, np.zeros_like(start), absent, None, attached)


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


def _run_chunk(state: State, ids: np.ndarray, blocks: bool = True, double: bool = False) -> Chunk | None:
    """Runs prompts and keeps what rows need; `None`, with the reason in `state.fallback`, where `blocks` cannot be recorded.

    With `double` base and source prompts run together.
    """
    kept, key = state.recordings if blocks else None, tuple(ids.tolist())
    at_hand = kept is not None and key in kept.runs
    try:
        run, source = kept.runs[key] if kept is not None and at_hand else _run_both(state, ids, blocks, double)
    except Exception as error:
        if not blocks or (isinstance(error, RuntimeError) and out_of_memory(error)):
            raise
        state.fallback = f"its run cannot be recorded: {why_not(error)}"
        return None
    if kept is not None and state.all_fit:
        kept.runs[key] = run, source
    chunk = Chunk(state, ids, run, source, _tower_run(state, ids, run.rows))
    if not at_hand:
        state.block_tokens += (1 + (source is not None)) * len(ids) * chunk.tokens_of_run
    chunk.make_derived()
    return chunk


def _run_both(state: State, ids: np.ndarray, blocks: bool, double: bool) -> tuple[Run, Run | None]:
    """The runs of base and source prompts, with the sites that are needed."""
    model = state.model

    def rows(prompts: Prompts) -> Stacked:
        return prompts.stack(ids.tolist()).to(model.device)

    of_base = sorted({site for one in state.derived.values() for site in one.sites})
    if state.recordings is not None:
        of_base = sorted({*of_base, *state.recordings.sites})
    of_source = sorted({*(state.plan.sites if state.source_sites is None else ()), *of_base})
    base = rows(state.base)
    if double and blocks and state.source is not None and (others := rows(state.source)).kind == base.kind:
        run, source = taken_apart(record(model, Stacked.cat([base, others]), of_source), len(ids))
        run = replace(run, sites={key: run.sites[key] for key in of_base})
    else:  # derived values are made of streams in any case
        run = record(model, base, of_base, blocks=blocks or bool(state.derived), cached=blocks)
        if state.source is None:
            return run, None
        source = record(model, rows(state.source), of_source, blocks=False)
    if (at_hand := state.source_sites) is not None:
        for key in state.plan.sites:
            found = by_prompt(SITES[key[0]], at_hand[key], len(state.base))
            source.sites[key] = found[ids].to(model.device)
    return run, source


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
