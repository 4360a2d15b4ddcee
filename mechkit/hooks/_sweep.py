"""The sweep: many what-if questions of one base run, answered exactly, under a memory budget.

For each group of prompts of equal length, in chunks that fit the budget:

1. Run the base prompts and record them (`Run`); run the source prompts and keep the sites that will be written.
2. Find where each (cell, prompt) row starts to differ. Rows that differ nowhere, or only to the right of what the metric
   reads, have the base run's value and are not computed.
3. Prove the replay on a sample: a few rows, chosen where a wrong assumption would show, are also answered by whole forward
   passes. Every sweep proves anew: a proof that is remembered goes stale when somebody patches the model.
4. Replay the rest in batches of rows that start at the same position, sorted by block. A batch that does not fit the
   device is halved, and so is the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mechkit.hooks._anatomy import unembeds_final_stream
from mechkit.hooks._cache import ActivationCache
from mechkit.hooks._checks import check_sweep
from mechkit.hooks._edits import NEVER, Cell, EditPlan, Rows
from mechkit.hooks._hooking import Hooks
from mechkit.hooks._memory import Budget, out_of_memory
from mechkit.hooks._precision import TOLERANCE, widen
from mechkit.hooks._replay import CannotReplayError, PlainBlocks, Replayer, Run, attach_edit, record
from mechkit.metrics import CallableMetric, Metric
from mechkit.prompts import Prompts
from mechkit.result import Cost

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel

Values = Mapping[str, Mapping[tuple[str, int], Tensor]]


@dataclass(frozen=True, eq=False)
class Answers:
    """What a sweep found.

    Attributes:
        values: The metric of every cell and prompt; NaN where a prompt lacks the cell's position.
        base: The metric of the unedited base run.
        source: The metric of the unedited source run, if there was one.
        cost: Block-tokens computed, and what one whole forward pass a cell would have taken.
        replay: How the rows were computed: `"suffix"`, or `"full: …"` with the reason for falling back.
    """

    values: Float[Tensor, "cell prompt"]
    base: Float[Tensor, "prompt"]
    source: Float[Tensor, "prompt"] | None
    cost: Cost
    replay: str


@torch.no_grad()
def sweep(
    model: HookedModel,
    base: Prompts,
    cells: Sequence[Cell],
    metric: Metric | CallableMetric,
    *,
    source: Prompts | None = None,
    source_sites: ActivationCache | None = None,
    values: Values | None = None,
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
        metric: What to read.
        source: Prompts whose activations `"source"` edits take; each as long as its base prompt.
        source_sites: The source run's activations, if they are at hand; they must be of exactly these prompts.
        values: `{key: {(site, layer): value}}` for edits with other keys; each value broadcastable to the activation
            `[prompt pos …]`, with a first axis of 1 or of all prompts.
        base_is, source_is: Which of `"clean"` and `"corrupted"` the two runs are, for metrics that compare with one of them.
        budget: Bytes of working memory to stay within; default half of what the device has free (1 GiB on a CPU).
        progress: Whether long sweeps show a progress bar.
        replay: `False` runs a whole forward pass for every row: the slow way, for comparison.

    Raises:
        ValueError: wrong lengths or counts, training mode, a site or an index that does not exist, NaN in a run.
    """
    plan = EditPlan(cells, model.n_layers)
    runs = {base_is: "base", source_is: "source"} if source is not None else {base_is: "base"}
    state = _State(
        model, base, source, source_sites, values or {}, plan, metric, runs, Budget.of(model, budget), replay
    )
    check_sweep(state)
    bar = tqdm(total=len(cells) * len(base), disable=None if progress else True, unit="row", leave=False, delay=2)
    with bar:
        for length, prompts in sorted(base.by_length().items(), reverse=True):  # a proof holds for shorter prompts too
            todo = list(prompts)
            while todo:
                at_once = len(todo)
                if not state.whole_set:
                    at_once = state.budget.prompts_at_once(model, length, plan.sites, plan.n_cells)
                try:
                    _sweep_chunk(state, todo[:at_once], bar)
                except RuntimeError as error:  # while recording; batches look after themselves
                    if not out_of_memory(error) or state.whole_set or min(at_once, len(todo)) == 1:
                        raise
                    state.budget.halve()
                    continue
                todo = todo[at_once:]
    return Answers(
        state.values,
        state.base_metric,
        None if source is None else state.source_metric,
        Cost(state.block_tokens, len(cells) * int(base.lengths.sum()) * model.n_layers),
        "suffix" if state.fallback is None else f"full: {state.fallback}",
    )


@dataclass(eq=False)
class _State:
    """A sweep under way: its questions, and the answers so far."""

    model: HookedModel
    base: Prompts
    source: Prompts | None
    source_sites: ActivationCache | None
    constants: Values
    plan: EditPlan
    metric: Metric | CallableMetric
    runs: Mapping[str, str]  # "clean" or "corrupted" -> which of "base" and "source" it is
    budget: Budget
    replay: bool
    proofs: dict[tuple[bool, ...], Proof] = field(default_factory=dict)
    block_tokens: int = 0
    fallback: str | None = None
    unembeds: bool = True
    values: Tensor = field(init=False)
    base_metric: Tensor = field(init=False)
    source_metric: Tensor = field(init=False)

    def __post_init__(self) -> None:
        dtype = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        self.values = torch.full((self.plan.n_cells, len(self.base)), torch.nan, dtype=dtype)
        self.base_metric, self.source_metric = (torch.full((len(self.base),), torch.nan, dtype=dtype) for _ in "bs")

    @property
    def whole_set(self) -> bool:
        """Whether the metric must see all prompts together."""
        return isinstance(self.metric, CallableMetric)

    @property
    def reads_last(self) -> bool:
        """Whether the metric reads nothing but each prompt's last position."""
        return isinstance(self.metric, Metric) and bool((self.metric.positions == self.base.lengths - 1).all())


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Prompts that run together, and what their unedited runs computed."""

    state: _State
    ids: np.ndarray  # indices of its prompts in the whole set
    run: Run
    source: Run | None

    @property
    def tokens(self) -> Tensor:
        return self.run.tokens

    def lookup(self, key: str, site: str, layer: int) -> Tensor:
        """The value of an edit, `[prompt of this chunk, …]`."""
        if key == "source":
            assert self.source is not None
            return self.source.sites[site, layer]
        value = self.state.constants[key][site, layer].to(self.tokens.device)
        return value if value.shape[0] == 1 else value[torch.from_numpy(self.ids)]

    def read(self, logits: Tensor, prompt: np.ndarray) -> Tensor:
        """The metric of rows, from their logits `[row token]` where the metric reads."""
        metric = self.state.metric
        assert isinstance(metric, Metric)
        reference = None
        if metric.reference is not None:
            reference = self.reference_logits[torch.from_numpy(prompt).to(logits.device)]
        return metric.read(widen(logits), torch.from_numpy(self.ids[prompt]).to(logits.device), reference).cpu()

    @cached_property
    def reference_logits(self) -> Tensor:
        """The logits of the unedited run that the metric compares with, `[prompt token]`."""
        assert isinstance(self.state.metric, Metric)
        run = self.run if self.state.runs[str(self.state.metric.reference)] == "base" else self.source
        assert run is not None
        return widen(self.logits_of(run))

    def logits_of(self, run: Run) -> Tensor:
        """The logits that the metric reads in an unedited run, `[prompt token]`."""
        metric, everyone = self.state.metric, np.arange(len(self.ids))
        assert isinstance(metric, Metric)
        if self.state.unembeds:
            return self.state.model.unembed(self.at_positions(run.resid[-1], everyone, 0), metric.tokens)
        return self.chosen_tokens(self.at_positions(self.state.model.bridge(run.tokens), everyone, 0))

    def baseline(self, run: Run) -> Tensor:
        """The metric of an unedited run, `[prompt]`."""
        if isinstance(self.state.metric, Metric):
            return self.read(self.logits_of(run), np.arange(len(self.ids)))
        return _call_metric(self.state.metric, widen(self.all_logits(run)), len(self.ids))

    def all_logits(self, run: Run) -> Tensor:
        return self.state.model.unembed(run.resid[-1]) if self.state.unembeds else self.state.model.bridge(run.tokens)

    def at_positions(self, per_position: Tensor, prompt: np.ndarray, start: int) -> Tensor:
        """`[row pos …]` -> `[row …]` where the metric reads; `start` is the position of the first."""
        assert isinstance(self.state.metric, Metric)
        where = self.state.metric.positions[torch.from_numpy(self.ids[prompt])] - start
        return per_position[torch.arange(len(per_position)), where.to(per_position.device)]

    def chosen_tokens(self, logits: Tensor) -> Tensor:
        tokens = getattr(self.state.metric, "tokens", None)
        return logits if tokens is None else logits[:, tokens.to(logits.device)]


def _call_metric(metric: CallableMetric, logits: Tensor, n_prompts: int) -> Tensor:
    value = metric.fn(logits)
    if not isinstance(value, Tensor) or value.shape != (n_prompts,):
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"metric {metric.name!r}: expected one value a prompt, a tensor of shape [{n_prompts}], got {got}. Do not average "
            "inside the metric: results keep the prompt axis"
        )
    return value.detach().cpu()


# -- one chunk of prompts ----------------------------------------------------------------------------------------------


def _sweep_chunk(state: _State, ids: Sequence[int], bar: tqdm) -> None:
    chunk = _run_chunk(state, np.array(ids))
    length = chunk.run.length
    start, absent = state.plan.starts(chunk.ids, length, _first_differences(state, chunk.ids))
    replayer = _proved_replayer(chunk, start, absent)
    if replayer is None:
        start = np.zeros_like(start)  # whole forward passes: nothing is skipped, no position is presumed unaffected
    if state.whole_set:
        # A callable needs all prompts of a cell together.
        start = np.broadcast_to(start.min(1, keepdims=True), start.shape)
        absent = absent | absent.any(1, keepdims=True)
    unread = NEVER if not isinstance(state.metric, Metric) else state.metric.positions.numpy()[chunk.ids]
    unchanged = (start == NEVER) | (start > unread)
    answer = torch.where(torch.from_numpy(unchanged), state.base_metric[ids], torch.nan)
    for rows in _rows_by_start(state.plan, chunk.ids, start, ~unchanged & ~absent):
        for part in _batches(state, rows, length, replayer is None, bar):
            answer[part.cell, part.prompt] = _answer(chunk, replayer, part).to(answer.dtype)
    answer[torch.from_numpy(absent)] = torch.nan
    bar.update(int(unchanged.sum()))
    _refuse_nan(state, chunk, answer, absent)
    state.values[:, ids] = answer
    if replayer is not None:
        state.block_tokens += replayer.block_tokens


def _run_chunk(state: _State, ids: np.ndarray) -> _Chunk:
    model = state.model

    def tokens(prompts: Prompts) -> Tensor:
        return torch.stack([prompts.tokens[i] for i in ids]).to(model.device)

    run = record(model, tokens(state.base))
    state.block_tokens += run.tokens.numel() * model.n_layers
    source = None
    if state.source is not None:
        at_hand = state.source_sites
        source = record(model, tokens(state.source), sorted(state.plan.sites) if at_hand is None else (), blocks=False)
        if at_hand is not None:
            source.sites.update({key: at_hand[key][ids].to(model.device) for key in state.plan.sites})
        state.block_tokens += run.tokens.numel() * model.n_layers
    chunk = _Chunk(state, ids, run, source)
    state.unembeds = unembeds_final_stream(model, run)
    for name, one, into in (("base", run, state.base_metric), ("source", source, state.source_metric)):
        if one is None:
            continue
        into[ids] = chunk.baseline(one).to(into.dtype)
        if not bool(torch.isfinite(into[ids]).all()):
            raise ValueError(f"{name} run: {_where_nan_began(model, one)}")
    return chunk


def _first_differences(state: _State, ids: np.ndarray) -> np.ndarray:
    if state.source is None:
        return np.zeros(len(ids), dtype=np.int64)
    pairs = [(state.base.tokens[i], state.source.tokens[i]) for i in ids]
    return np.array([int((a != b).nonzero()[0]) if bool((a != b).any()) else len(a) for a, b in pairs])


def _rows_by_start(plan: EditPlan, ids: np.ndarray, start: np.ndarray, wanted: np.ndarray) -> Iterator[Rows]:
    """The rows to compute, one set for each starting position, sorted by the block where they join."""
    cell, prompt = np.nonzero(wanted)
    order = np.lexsort((prompt, cell, plan.entry[cell], start[cell, prompt]))
    cell, prompt = cell[order], prompt[order]
    at = start[cell, prompt]
    for bounds in np.split(np.arange(len(cell)), np.nonzero(np.diff(at))[0] + 1):
        if len(bounds):
            yield Rows(cell[bounds], prompt[bounds], ids[prompt[bounds]], int(at[bounds[0]]))


def _batches(state: _State, rows: Rows, length: int, whole: bool, bar: tqdm) -> Iterator[Rows]:
    """Cuts rows into batches that fit the budget as it stands; the consumer may shrink the budget by running out of memory."""
    done = 0
    some = state.metric.tokens if isinstance(state.metric, Metric) else None
    logits = len(some) if some is not None else state.model.d_vocab
    logits = length * state.model.d_vocab if whole or state.whole_set else logits
    unit = len(state.base) if state.whole_set else 1  # a callable metric's cells stay whole
    while done < len(rows):
        fits = state.budget.rows_at_once(state.model, length, length - rows.start, state.plan, logits)
        size = max(unit, fits // unit * unit)
        yield rows[done : done + size]
        bar.update(min(size, len(rows) - done))
        done += size


def _answer(chunk: _Chunk, replayer: Replayer | None, rows: Rows) -> Tensor:
    """The metric of each row. When the device runs out of memory: the budget is halved, and so is the batch."""
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


def _answer_batch(chunk: _Chunk, replayer: Replayer | None, rows: Rows) -> Tensor:
    state, metric = chunk.state, chunk.state.metric
    if isinstance(metric, Metric):
        if replayer is None:
            logits = chunk.chosen_tokens(chunk.at_positions(_whole_forward(chunk, rows), rows.prompt, 0))
        else:
            resid = replayer.replay(state.plan, rows, chunk.lookup, state.reads_last)
            resid = resid[:, 0] if state.reads_last else chunk.at_positions(resid, rows.prompt, rows.start)
            logits = state.model.unembed(resid, metric.tokens)
        return chunk.read(logits, rows.prompt)
    if replayer is None:
        cells = _whole_forward(chunk, rows).split(len(chunk.ids))
        return torch.cat([_call_metric(metric, widen(logits), len(logits)) for logits in cells])
    answers = []
    for suffix in replayer.replay(state.plan, rows, chunk.lookup, False).split(len(chunk.ids)):
        resid = torch.cat([chunk.run.resid[-1][:, : rows.start], suffix], 1)
        answers.append(_call_metric(metric, widen(state.model.unembed(resid)), len(suffix)))
    return torch.cat(answers)


def _whole_forward(chunk: _Chunk, rows: Rows) -> Float[Tensor, "row pos d_vocab"]:
    """The logits of edited rows by whole forward passes: the slow way, which presumes nothing."""
    state = chunk.state
    whole = Rows(rows.cell, rows.prompt, rows.prompt_id, 0)
    with Hooks(state.model.bridge) as hooks:
        for group in state.plan:
            attach_edit(hooks, group, whole, chunk.lookup)
        logits = state.model.bridge(chunk.tokens[torch.from_numpy(rows.prompt)])
    state.block_tokens += len(rows) * chunk.run.length * state.model.n_layers
    return logits


# -- trust, but verify -------------------------------------------------------------------------------------------------


def _proved_replayer(chunk: _Chunk, start: np.ndarray, absent: np.ndarray) -> Replayer | None:
    """A replayer that was proved on a sample of these rows, or `None` where whole forward passes must be run."""
    state, model = chunk.state, chunk.state.model
    if not state.replay:
        state.fallback = "asked for"
    elif not state.unembeds:
        state.fallback = "the logits are not the final norm and unembedding of the last block's output"
    elif (state.plan.entry < 0).any():
        state.fallback = "an edit before the first block"
    elif model.has_hooks:
        state.fallback = "other hooks are attached to the model"
    else:
        skips = bool((start == NEVER).any()), bool(((start > 0) & (start < NEVER)).any())
        if skips not in state.proofs:
            proof = _prove(chunk, start, absent)
            if proof is None:
                return Replayer(model, chunk.run, None)  # all prompts lack the cells' positions: there are no rows
            state.proofs[skips] = proof
        if state.proofs[skips].refuted is None:
            return Replayer(model, chunk.run, PlainBlocks(model.bridge) if state.proofs[skips].plain else None)
        state.fallback = state.proofs[skips].refuted
    return None


@dataclass(frozen=True)
class Proof:
    """What was found when replayed rows were compared with whole forward passes.

    Attributes:
        plain: Whether plain blocks may be used where nothing is edited; else the bridge's own.
        refuted: Why replaying is not possible; `None` if it is.
    """

    plain: bool
    refuted: str | None


def _prove(chunk: _Chunk, start: np.ndarray, absent: np.ndarray) -> Proof | None:
    """Tries plain blocks first, then the bridge's. `None` if there was nothing to try."""
    moving, still = _sample(chunk, start, absent)
    if moving is None and still is None:
        return None
    if not _equal_before_the_first_difference(chunk):
        return Proof(plain=False, refuted="the two runs differ before their first different token: not a causal model")
    found = [_refute(chunk, moving, still, PlainBlocks(chunk.state.model.bridge))]
    if found[0] is not None:
        found.append(_refute(chunk, moving, still, None))
    return Proof(plain=found[0] is None, refuted=found[-1])


def _equal_before_the_first_difference(chunk: _Chunk) -> bool:
    """Whether base and source run end in the same residual stream wherever they have read the same tokens."""
    if chunk.source is None:
        return True
    base, source = chunk.run.resid[-1], chunk.source.resid[-1]
    positions = torch.arange(chunk.run.length, device=base.device)
    shared = positions < torch.from_numpy(_first_differences(chunk.state, chunk.ids)).to(base.device)[:, None]
    largest = (base - source).abs().amax(-1)[shared].max() if bool(shared.any()) else torch.zeros(())
    return not float(largest) > TOLERANCE[chunk.state.model.dtype] * float(base.abs().max())


def _refute(chunk: _Chunk, moving: Rows | None, still: Rows | None, plain: PlainBlocks | None) -> str | None:
    """Why replaying does not give the logits of the sampled rows' whole forward passes; `None` if it does."""
    state, model = chunk.state, chunk.state.model
    try:
        replayer = Replayer(model, chunk.run, plain)
        pairs = []
        if moving is not None:
            resid = replayer.replay(state.plan, moving, chunk.lookup, state.reads_last)
            pairs.append((model.unembed(resid[:, -1]), _whole_forward(chunk, moving)[:, -1]))
        if still is not None:
            pairs.append((chunk.run.last_logits[still.prompt], _whole_forward(chunk, still)[:, -1]))
    except (CannotReplayError, TypeError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        return f"blocks cannot be replayed: {error}"
    state.block_tokens += replayer.block_tokens
    for replayed, expected in pairs:
        difference = _difference(replayed, expected)
        if difference > TOLERANCE[model.dtype]:
            return f"replayed rows differ from whole forward passes by {difference:.1e} of the logits' spread"
    return None


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of logits `[row d_vocab]`, as a share of their spread around each row's mean."""
    found, expected = (x.double() - x.double().mean(-1, keepdim=True) for x in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _sample(chunk: _Chunk, start: np.ndarray, absent: np.ndarray) -> tuple[Rows | None, Rows | None]:
    """A few rows where a wrong assumption would show: of the rows that skip the most positions with the most blocks still
    to come, the first, a middle and the last to join, as one batch; and one row that is presumed to change nothing."""
    plan, moving, still = chunk.state.plan, None, None
    candidates = np.argwhere((start < NEVER) & ~absent)
    if len(candidates):
        entry, began = plan.entry[candidates[:, 0]], start[candidates[:, 0], candidates[:, 1]]
        deepest = began[np.lexsort((-began, entry))[0]]
        together = next(
            rows for rows in _rows_by_start(plan, chunk.ids, start, (start == deepest) & ~absent) if len(rows)
        )
        n = len(together)
        moving = together[np.unique([0, n // 2, n - 1])]
    unmoved = np.argwhere((start == NEVER) & ~absent)
    if len(unmoved):
        cell, prompt = unmoved[np.argmin(plan.entry[unmoved[:, 0]])]
        still = Rows(np.array([cell]), np.array([prompt]), chunk.ids[[prompt]], 0)
    return moving, still


# -- refusing NaN ------------------------------------------------------------------------------------------------------


def _refuse_nan(state: _State, chunk: _Chunk, answer: Tensor, absent: np.ndarray) -> None:
    bad = (answer.isnan().numpy() & ~absent).nonzero()
    if len(bad[0]):
        raise ValueError(
            f"edited run: the metric is NaN for prompt {chunk.ids[bad[1][0]]} in cell {bad[0][0]} of {state.plan.n_cells}. The "
            "unedited run was finite, so the edit's value, or what it leads to in this dtype, is not"
        )


def _where_nan_began(model: HookedModel, run: Run) -> str:
    for layer, resid in enumerate(run.resid):
        bad = (~torch.isfinite(resid)).flatten(1).any(1).nonzero().flatten().tolist()
        if bad and len(run.resid) > 1:
            place = "the embedding" if layer == 0 else f"block {layer - 1}"
            return f"expected finite activations, got NaN or inf out of {place} for prompts {bad[:5]}"
    return "expected a finite metric, got NaN or inf; the weights may hold NaN, or the dtype overflow"
