"""Work: what a worker is given, and what it answers. Plain values, which go from process to process.

A unit is one model's jobs, of which is to be found out what is left to do (`_planner.py`), or one shard, which is to be computed
(`_worker.py`).
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass

from mechkit.studies._job import Job, ModelSpec


@dataclass(frozen=True)
class PlanWork:
    """To look at all jobs of one model: which shards are left to do."""

    model: ModelSpec
    jobs: tuple[Job, ...]
    attempt: int = 0


@dataclass(frozen=True)
class ShardWork:
    """To compute one shard. Each attempt after a worker was lost has half the budget of the one before."""

    job: Job
    shard: int
    attempt: int = 0
    lost: int = 0

    @property
    def model(self) -> ModelSpec:
        return self.job.model


Work = PlanWork | ShardWork


@dataclass(frozen=True)
class Planned:
    """The shards of each job that are left, how many it has, and the jobs that cannot be planned, with the error."""

    todo: Mapping[str, tuple[int, ...]]
    n_shards: Mapping[str, int]
    failed: Mapping[str, str]
    damage: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """A shard is computed and stored; how long that took."""

    seconds: float


@dataclass(frozen=True)
class Failed:
    """A unit of work was not done."""

    error: str


@dataclass(frozen=True)
class WorkerSettings:
    """What a run gives its workers."""

    store: str
    budget: int | None = None
    rows: int | None = None


def described(error: Exception) -> str:
    """An error in one line, with where it came from if it is none of the library's own sentences."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({last[0].name}, line {last[0].lineno})" if last and not isinstance(error, ValueError) else ""
    return f"{type(error).__name__}: {error}{where}"
