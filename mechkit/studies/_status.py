"""How far a study is: read from its store alone, by anyone, while it runs or not."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mechkit._check import checked
from mechkit.studies._job import Job
from mechkit.studies._records import errors, finished, shard_names
from mechkit.studies._run import described
from mechkit.studies._shards import Plan
from mechkit.studies._store import Store


@dataclass(frozen=True)
class JobStatus:
    """One job.

    Attributes:
        job: Which.
        state: `"done"`, `"running"`, `"failed"` (a shard is left because of an error), `"partial"` or `"waiting"`.
        shards: How many it has; `None` before it was planned.
        done: How many are finished.
        error: The last one, of a job that failed.
        seconds: What the finished shards took.
    """

    job: Job
    state: str
    shards: int | None
    done: int
    error: str | None
    seconds: float


@dataclass(frozen=True)
class Status:
    """How far a study is.

    Attributes:
        jobs: One entry a job, in the study's order.
        running: What is being computed now, `(job, shard)`, if a run is at work.
        at_work: Whether one is.
        seconds_left: An estimate from the shards that are finished; `None` before any is, 0 when all are.
        stale: Jobs of earlier statements that the store keeps, and that are not among these.
    """

    jobs: tuple[JobStatus, ...]
    running: tuple[tuple[str, int], ...]
    at_work: bool
    seconds_left: float | None
    stale: int = 0

    @checked
    def count(self, state: str) -> int:
        """How many jobs are in a state."""
        return sum(one.state == state for one in self.jobs)

    @property
    def shards(self) -> tuple[int, int]:
        """Finished shards, and all that are known."""
        return sum(one.done for one in self.jobs), sum(one.shards or 0 for one in self.jobs)

    @property
    def failed(self) -> tuple[JobStatus, ...]:
        return tuple(one for one in self.jobs if one.error is not None)

    def __str__(self) -> str:
        states = ("done", "running", "failed", "partial", "waiting")
        counts = ", ".join(f"{n} {state}" for state in states if (n := self.count(state)))
        done, known = self.shards
        unplanned = sum(one.shards is None for one in self.jobs)
        more = f", {unplanned} jobs not planned yet" if unplanned else ""
        lines = [f"{len(self.jobs)} jobs: {counts or 'none'}", f"{done} of {known} shards finished{more}"]
        if self.seconds_left:
            lines.append(
                f"about {duration(self.seconds_left)} left{'' if self.at_work else ', once it is started again'}"
            )
        if self.stale:
            lines.append(
                f"{self.stale} more jobs of earlier statements are in the store, left out here and in results "
                "(Study.open(store, stale=True) has them)"
            )
        lines += [f"running: {job}, shard {shard}" for job, shard in self.running]
        return "\n".join([*lines, *described((str(one.job), str(one.error)) for one in self.failed)])


def duration(seconds: float) -> str:
    """`"2 h 05 min"`, `"3 min"`, `"12 s"`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def status(store: Store, jobs: Sequence[Job], *, verify: bool = False) -> Status:
    """Reads the records of all jobs. `verify` reads every chunk too, and counts as finished only what is as it was written."""
    run = store.at_work()
    flying = [(label, job, shard) for label, job, shard in (run["running"] if run else ())]
    busy = {job for _, job, _ in flying}
    planned = {name.removesuffix(".json") for name in store.files.names("jobs")}
    troubled = set(store.files.names("failed"))
    found = [_job(store, job, job.id in planned, job.id in busy, job.id in troubled, verify) for job in jobs]
    workers = run["workers"] if run else 1
    return Status(
        tuple(found),
        tuple((label, shard) for label, _, shard in flying),
        run is not None,
        _seconds_left(found, max(1, workers)),
    )


def _job(store: Store, job: Job, planned: bool, busy: bool, troubled: bool, verify: bool) -> JobStatus:
    record = store.good(f"jobs/{job.id}.json") if planned else None
    plan = None if record is None else Plan.from_json(record["plan"])
    done: set[int] = set()
    seconds = 0.0
    if plan is not None:
        good = finished(store, job, plan, mend=False) if verify else None
        for name in shard_names(store, job.id):
            shard = store.good(f"shards/{job.id}/{name}")
            if shard is not None and (good is None or shard["shard"] in good):
                done.add(shard["shard"])
                seconds += float(shard["seconds"])
    reported = errors(store, job.id, done) if troubled else []
    n = None if plan is None else plan.n_shards
    state = "waiting"
    stale = any(one["shard"] is None for one in reported)  # planned once, and not any more
    if n is not None and len(done) == n and not stale:
        state, reported = "done", []
    elif busy:
        state = "running"
    elif reported:
        state = "failed"
    elif done:
        state = "partial"
    return JobStatus(job, state, n, len(done), reported[-1]["error"] if reported else None, seconds)


def _seconds_left(jobs: Sequence[JobStatus], workers: int) -> float | None:
    """From the mean shard of the same technique on the same model, of the technique, or of all."""
    left = [one for one in jobs if one.state not in ("done",)]
    if not left:
        return 0.0
    known: dict[Any, list[float]] = {}
    sizes: dict[Any, list[int]] = {}
    for one in jobs:
        for key in _alike(one.job):
            if one.done:
                known.setdefault(key, []).append(one.seconds / one.done)
            if one.shards:
                sizes.setdefault(key, []).append(one.shards)
    if not known:
        return None
    total = 0.0
    for one in left:
        key = next(key for key in _alike(one.job) if key in known)
        shards = one.shards if one.shards is not None else statistics.mean(sizes[key])
        total += (shards - one.done) * statistics.mean(known[key])
    return total / workers


def _alike(job: Job) -> list[Any]:
    return [(job.model.stated()["name"], job.technique.name), job.technique.name, None]
