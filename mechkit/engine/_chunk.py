"""The state of a running sweep, and how it runs prompts and reads the metric off them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._precision import Rounding, wide_dtype, widen
from mechkit.engine._causality import reach_of
from mechkit.engine._edits import EditPlan, Rows, TowerRun
from mechkit.engine._measure import call_metric, logits_at_hand, read_metric
from mechkit.engine._memory import Budget
from mechkit.engine._plain import PACKED, PACKED_SDPA, Attention
from mechkit.engine._replay import attached_edits
from mechkit.hooks._cache import ActivationCache
from mechkit.hooks._devices import to_device
from mechkit.hooks._readout import head_device, unembedding_only
from mechkit.hooks._record import Run, watched_streams
from mechkit.hooks._sites import SITES, TOWER
from mechkit.metrics import CallableMetric, Metric
from mechkit.prompts import Prompts

if TYPE_CHECKING:
    from mechkit.engine._packing import PackedRows
    from mechkit.hooks._model import HookedModel

Values = Mapping[str, Mapping[tuple[str, int], Tensor]]


@dataclass(frozen=True, eq=False)
class Derived:
    """Values computed from the two unedited runs. They equal the base run's before the position where the prompts differ.

    Attributes:
        sites: The activations that `make` needs of both runs.
        make: `(base run, source run, ids, site, layer) -> [prompt, *dims]`, or `[variant, prompt, *dims]` for edits that name a
            variant; `ids` says which of all prompts these are. Called once for each site and layer, and each set of prompts
            that run together.
    """

    sites: tuple[tuple[str, int], ...]
    make: Callable[[Run, Run, np.ndarray, str, int], Tensor]


@dataclass(frozen=True)
class Candidate:
    """A kind of block that a replay may run where nothing is edited, and what counts as rounding in it.

    Attributes:
        plain: The attention of plain blocks; `None` for the bridge's own blocks.
        rounding: How far a right replay may be off.
    """

    plain: Attention | None
    rounding: Rounding

    @property
    def packs(self) -> bool:
        """Whether rows that begin at different positions run together."""
        return self.plain in (PACKED, PACKED_SDPA)


@dataclass(eq=False)
class Proof:
    """What a sweep has found out about its replay so far (see `mechkit.engine._proof`).

    Attributes:
        candidates: The kinds of block that have not been refuted, the fastest first.
        proved: For each kind of prompts (`Stacked.kind`) the starts whose blocks were checked.
        turn: How many checks there were: another prompt, start and row is taken each time.
        block_tokens: (block, token) pairs that the checks computed.
    """

    candidates: list[Candidate] = field(default_factory=list)
    proved: dict[Hashable, set[int]] = field(default_factory=dict)
    turn: int = 0
    block_tokens: int = 0


@dataclass(eq=False)
class Recordings:
    """The runs of one set of prompts, and what is known of their replay, for several sweeps that follow one another in one call.

    They are kept only where all prompts fit into the budget together. Between the sweeps nobody may change the model.

    Attributes:
        sites: The activations that some of the sweeps need of both runs.
        runs: Base and source run, by the prompts' indices.
        proof: What was found out so far. Each sweep still runs a few of its own rows whole.
    """

    sites: frozenset[tuple[str, int]]
    runs: dict[tuple[int, ...], tuple[Run, Run | None]] = field(default_factory=dict)
    proof: Proof = field(default_factory=Proof)


@dataclass(eq=False)
class State:
    """A sweep under way: its questions, and the answers so far."""

    model: HookedModel
    base: Prompts
    source: Prompts | None
    source_sites: ActivationCache | None
    constants: Values
    derived: Mapping[str, Derived]
    plan: EditPlan
    metric: Metric | CallableMetric
    runs: Mapping[str, str]  # "clean" or "corrupted" -> which of "base" and "source" it is
    budget: Budget
    replay: bool
    recordings: Recordings | None = None
    proof: Proof = field(default_factory=Proof)
    sampled: set[Hashable] = field(default_factory=set)  # kinds of prompts of which rows were run whole in this sweep
    packs: bool = True  # whether packed batches may be tried
    all_fit: bool = False  # whether the runs of all prompts fit into the budget together
    block_tokens: int = 0
    proof_before: int = 0  # block-tokens of the proof before this sweep
    fallback: str | None = None
    tower_tokens: np.ndarray = field(init=False)  # (block, position) pairs of the vision tower in each prompt's run
    task_checked: bool = False
    values: Tensor = field(init=False)
    base_metric: Tensor = field(init=False)
    source_metric: Tensor = field(init=False)

    def __post_init__(self) -> None:
        dtype = wide_dtype(self.model.dtype)
        if self.recordings is not None:
            self.proof, self.proof_before = self.recordings.proof, self.recordings.proof.block_tokens
        self.tower_tokens = np.zeros(len(self.base), np.int64)
        several = [len(self.metric.parts)] if isinstance(self.metric, Metric) and self.metric.parts else []
        self.values = torch.full((self.plan.n_cells, len(self.base), *several), torch.nan, dtype=dtype)
        self.base_metric, self.source_metric = (
            torch.full((len(self.base), *several), torch.nan, dtype=dtype) for _ in "bs"
        )

    def refute_batches(self, why: str) -> None:
        """Batches gave what whole passes do not: packed rows are run by their starts then, and rows by their starts whole."""
        if self.proof.candidates and self.proof.candidates[0].packs:
            self.packs = False
            self.proof.proved.clear()
            self.sampled.clear()
        else:
            self.fallback = why

    @property
    def whole_set(self) -> bool:
        """Whether the metric must see all prompts together."""
        return isinstance(self.metric, CallableMetric)

    @cached_property
    def read_tokens(self) -> Tensor | None:
        """The tokens whose logits the metric reads, where the unembedding is; `None` reads all."""
        tokens = getattr(self.metric, "tokens", None)
        device = head_device(self.model)
        return tokens if tokens is None or device is None else tokens.to(device)

    @cached_property
    def reads_last(self) -> bool:
        """Whether the metric reads nothing but each prompt's last position."""
        if not isinstance(self.metric, Metric) or self.metric.positions.ndim > 1:
            return False
        return bool((self.metric.positions == self.base.lengths - 1).all())


@dataclass(frozen=True, eq=False)
class Chunk:
    """Prompts that run together, and what their unedited runs computed.

    Attributes:
        finals: The final streams, `[pos d_model]`, of the rows that were run whole for the proof, by `(cell, prompt)`.
    """

    state: State
    ids: np.ndarray  # indices of its prompts in the whole set
    run: Run
    source: Run | None
    tower: TowerRun | None = None  # where something is edited in a vision tower
    made: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)  # derived values
    moved: dict[tuple[str, str, int], Tensor] = field(
        default_factory=dict
    )  # constants from elsewhere, on the model's device
    finals: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> Tensor:
        return self.run.tokens

    @property
    def tower_tokens(self) -> int:
        """(block, position) pairs of the vision tower in one of these prompts, where they count: where it is edited."""
        return 0 if self.tower is None else self.tower.length * self.state.model.stacks[TOWER].n_layers

    @property
    def tokens_of_run(self) -> int:
        """(block, token) pairs of a whole pass of one prompt."""
        return self.run.length * self.state.model.n_layers + self.tower_tokens

    @cached_property
    def reach(self) -> Int[np.ndarray, "pos"]:
        """For each position the first one that a change there can reach (`reach_of`)."""
        return reach_of(self.run)

    def lookup(self, key: str, site: str, layer: int) -> Tensor:
        """The value of an edit, `[prompt of this chunk, …]`."""
        if key == "source":
            assert self.source is not None
            return self.source.sites[site, layer]
        if key in self.state.derived:
            return self.made[key, site, layer]
        if (key, site, layer) in self.moved:
            return self.moved[key, site, layer]
        value = self.state.constants[key][site, layer]
        axis = value.ndim - 1 - len(SITES[site].dims)  # behind the variants, if there are several
        mine = value if value.shape[axis] == 1 else value.index_select(axis, to_device(self.ids, value.device))
        if value.device != self.tokens.device:  # moved once per chunk, not once per batch
            mine = self.moved[key, site, layer] = mine.to(self.tokens.device)
        return mine

    def make_derived(self) -> None:
        """Makes all derived values now: later there are hooks that `make` would run into."""
        for group in self.state.plan:
            key = (group.value, group.site.name, group.layer)
            if group.value in self.state.derived and key not in self.made:
                if self.source is None:
                    raise ValueError(
                        f"source: values {group.value!r} are made from two runs, but no source prompts were given"
                    )
                make = self.state.derived[group.value].make
                self.made[key] = make(self.run, self.source, self.ids, group.site.name, group.layer)

    def read(self, logits: Tensor, prompt: np.ndarray) -> Tensor:
        """The metric of rows, on the model's device, from their logits `[row token]` (or `[row place token]`) where it reads."""
        metric = self.state.metric
        assert isinstance(metric, Metric)
        reference = None
        if metric.reference is not None:
            reference = self.reference_logits[to_device(prompt, logits.device)]
        return read_metric(metric, logits, to_device(self.ids[prompt], logits.device), reference)

    def call(self, logits_of: Callable[[np.ndarray], Tensor], prompt: np.ndarray) -> Tensor:
        """A callable metric of rows, from `logits_of` some of them."""
        metric = self.state.metric
        assert isinstance(metric, CallableMetric)
        return call_metric(metric, logits_of, self.ids[prompt], len(self.state.base)).detach()

    @cached_property
    def reference_logits(self) -> Tensor:
        """The logits of the unedited run that the metric compares with, `[prompt token]` or `[prompt place token]`."""
        assert isinstance(self.state.metric, Metric)
        run = self.run if self.state.runs[str(self.state.metric.reference)] == "base" else self.source
        assert run is not None
        return widen(self.logits_of(run))

    def logits_of(self, run: Run) -> Tensor:
        """The logits that the metric reads in an unedited run, `[prompt token]` or `[prompt place token]`."""
        metric, everyone = self.state.metric, np.arange(len(self.ids))
        assert isinstance(metric, Metric)
        if self.state.fallback is None:
            return self.state.model.unembed(self.at_positions(run.resid[-1], everyone, 0), self.state.read_tokens)
        if self.state.reads_last:
            return self.chosen_tokens(run.last_logits)
        return self.chosen_tokens(self.at_positions(self.all_logits(run), everyone, 0))

    def baseline(self, run: Run) -> Tensor:
        """The metric of an unedited run, `[prompt]`."""
        if isinstance(self.state.metric, Metric):
            return self.read(self.logits_of(run), np.arange(len(self.ids))).cpu()
        return self.call(logits_at_hand(self.all_logits(run)), np.arange(len(self.ids))).cpu()

    def all_logits(self, run: Run) -> Float[Tensor, "prompt pos d_vocab"]:
        """The logits of an unedited run at every position; where nothing is replayed, by another whole pass."""
        if self.state.fallback is None:
            return self.state.model.unembed(run.resid[-1])
        self.state.block_tokens += len(run.tokens) * self.tokens_of_run
        return self.state.model.run(run.rows)

    def at_positions(self, per_position: Tensor, prompt: np.ndarray, start: int) -> Tensor:
        """`[row pos …]` -> `[row …]` where the metric reads, or `[row place …]` if it reads several positions; `start` is the
        position of the first. What stands before it is the unedited run's final stream."""
        metric, device = self.state.metric, per_position.device
        assert isinstance(metric, Metric)
        where, row = metric.positions.numpy()[self.ids[prompt]] - start, torch.arange(len(per_position), device=device)
        if metric.positions.ndim == 1:
            return per_position[row, to_device(where, device)]
        found = per_position[row[:, None], to_device(where.clip(0), device)]
        if not (where < 0).any():
            return found
        before = to_device((where < 0).astype(np.int64), device).bool()
        unedited = self.run.resid[-1].to(device)[to_device(prompt, device)[:, None], to_device(where + start, device)]
        return torch.where(before[..., None], unedited, found)

    def at_tokens(self, per_token: Tensor, rows: PackedRows, first: np.ndarray) -> Tensor:
        """The same of rows without padding between them, `[token …]`; `first` says where each one's tokens begin."""
        metric, device = self.state.metric, per_token.device
        assert isinstance(metric, Metric)
        where = metric.positions.numpy()[rows.prompt_id]
        begins, at = (x if where.ndim == 1 else x[:, None] for x in (rows.start, first))
        found = per_token[to_device(at + (where - begins).clip(0), device)]
        if not (where < begins).any():
            return found
        prompt = np.broadcast_to(rows.prompt if where.ndim == 1 else rows.prompt[:, None], where.shape)
        before = to_device((where < begins).astype(np.int64), device).bool()
        unedited = self.run.resid[-1].to(device)[to_device(prompt, device), to_device(where, device)]
        return torch.where(before[..., None], unedited, found)

    def chosen_tokens(self, logits: Tensor) -> Tensor:
        tokens = self.state.read_tokens
        return logits if tokens is None else logits[..., tokens.to(logits.device)]


def whole_forward(chunk: Chunk, rows: Rows) -> Float[Tensor, "row pos d_vocab"]:
    """The logits of edited rows by whole forward passes: the slow way, which presumes nothing."""
    state = chunk.state
    whole = replace(rows, start=0)
    with attached_edits(state.model, tuple(state.plan), whole, chunk.lookup):
        logits = state.model.run(chunk.run.rows[to_device(rows.prompt, chunk.tokens.device)])
    state.block_tokens += len(rows) * chunk.tokens_of_run
    return logits


def whole_streams(
    chunk: Chunk, rows: Rows, read: Callable[[Tensor], Tensor]
) -> tuple[list[Float[Tensor, "row pos d_model"]], Float[Tensor, "row d_vocab"]]:
    """The same, with what every block read and the final stream, and the logits only where `read` takes the final stream from."""
    state, model = chunk.state, chunk.state.model
    with (
        attached_edits(model, tuple(state.plan), replace(rows, start=0), chunk.lookup),
        watched_streams(model) as streams,
        unembedding_only(model, lambda stream: read(stream)[:, None]) as taken,
    ):
        logits = taken(model.run(chunk.run.rows[to_device(rows.prompt, chunk.tokens.device)]))
    state.block_tokens += len(rows) * chunk.tokens_of_run
    return streams, logits[:, 0]
