"""The loop: work is handed to workers until there is none, and whatever goes wrong with one unit does not stop the rest.

1. Under the store's lock, the manifest is written and every model's jobs are to be planned. What that gives is the shards to do.
2. A free worker gets the first work of the model that it has loaded, or else the first of all.
3. A shard that raises is tried again, `retries` times, and then recorded as failed. A shard whose worker was lost is tried
   again with half the budget. The next run tries what failed again.
4. A store that cannot be written ends the run; so does an interrupt. Both leave everything finished in its place.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mechkit._progress import Progress, is_watched
from mechkit.studies._executors import Executor, WorkerLostError
from mechkit.studies._files import StoreError
from mechkit.studies._job import Job, ModelSpec
from mechkit.studies._store import DamagedError, Store
from mechkit.studies._work import Failed, Finished, Planned, PlanWork, ShardWork, Work, WorkerSettings

BEAT_EVERY, BEAT_LEAST = 5.0, 0.5  # seconds between two signs of life, at most and at least
WAIT = 1.0


def described(failed: Iterable[tuple[str, str]]) -> list[str]:
    """A line an error, with the first of the jobs that it stopped."""
    jobs: dict[str, list[str]] = {}
    for job, error in failed:
        jobs.setdefault(error, []).append(job)
    more = {error: f" and {len(names) - 1} more" if len(names) > 1 else "" for error, names in jobs.items()}
    return [f"failed: {names[0]}{more[error]}: {error}" for error, names in jobs.items()]


@dataclass
class RunReport:
    """What a run did.

    Attributes:
        computed: Shards that were computed.
        kept: Shards that were finished before, and were not run again.
        failed: Job -> the last error, of jobs that have shards left because of it.
        retried: Attempts that failed and were followed by another.
        damage: What was found damaged in the store, and what was done about it.
        seconds: How long it took, and how much of that the shards did.
    """

    computed: int = 0
    kept: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    retried: int = 0
    damage: list[str] = field(default_factory=list)
    seconds: float = 0.0
    shard_seconds: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.computed} shards computed", f"{self.kept} kept", f"{self.seconds:.1f} s"]
        parts += [f"{self.retried} attempts repeated"] * bool(self.retried)
        lines = [", ".join(parts)]
        lines += [f"damaged: {what}" for what in self.damage]
        return "\n".join([*lines, *described(self.failed.items())])


@dataclass(frozen=True)
class Event:
    """What a run tells whoever watches: how many shards there are so far, how many are done, and what is being done."""

    done: int
    total: int
    doing: str


class _Queue:
    """Work that waits, a model's together."""

    def __init__(self) -> None:
        self.waiting: deque[Work] = deque()

    def take(self, loaded: ModelSpec | None) -> Work | None:
        """The first unit of the loaded model, else the first."""
        if not self.waiting:
            return None
        for i, work in enumerate(self.waiting):
            if work.model == loaded:
                del self.waiting[i]
                return work
            if i == 0 and loaded is None:
                break
        return self.waiting.popleft()


def run(
    jobs: Sequence[Job],
    store: Store,
    executor: Executor,
    settings: WorkerSettings,
    *,
    name: str,
    retries: int,
    watch: Callable[[Event], None] | None = None,
    known: Sequence[Job] | None = None,
    stated: bool = True,
) -> RunReport:
    """Computes what is left of the jobs. `known` are all jobs of the study, for its manifest, and `stated` whether somebody
    states them, rather than that they were read from the store.

    Raises:
        StoreError: the store cannot be written, or another run is at work on it.
        KeyboardInterrupt: as it came; the store can be resumed.
    """
    begin = time.perf_counter()
    report = RunReport()
    with store.locked():
        write_manifest(store, known or jobs, name, stated=stated)
        store.remove_half_written()
        executor.open(settings)
        try:
            _Loop(jobs, store, executor, retries, report, watch).go()
        finally:
            executor.close()
            with contextlib.suppress(StoreError):
                store.beat(None, executor.n_workers)
    report.damage = [*store.damage, *(said for said in report.damage if said not in store.damage)]
    report.seconds = time.perf_counter() - begin
    return report


class _Loop:
    def __init__(
        self,
        jobs: Sequence[Job],
        store: Store,
        executor: Executor,
        retries: int,
        report: RunReport,
        watch: Callable[[Event], None] | None,
    ) -> None:
        self.store, self.executor, self.retries, self.report, self.watch = store, executor, retries, report, watch
        self.jobs = {job.id: job for job in jobs}
        self.queue = _Queue()
        by_model: dict[ModelSpec, list[Job]] = {}
        for job in jobs:
            by_model.setdefault(job.model, []).append(job)
        self.queue.waiting.extend(PlanWork(model, tuple(mine)) for model, mine in by_model.items())
        self.total, self.done = 0, 0
        self.flying: dict[Any, tuple[int, Work]] = {}
        self.loaded: dict[int, ModelSpec | None] = dict.fromkeys(range(executor.n_workers))
        self.ended, self.news = threading.Event(), threading.Event()

    def go(self) -> None:
        heart = threading.Thread(target=self._beat, daemon=True)  # a shard in this process may take long
        heart.start()
        try:
            self._work()
        finally:
            self.ended.set()
            self.news.set()
            heart.join()

    def _work(self) -> None:
        while self.queue.waiting or self.flying:
            busy = {worker for worker, _ in self.flying.values()}
            for worker in self.loaded:
                if worker not in busy and (work := self.queue.take(self.loaded[worker])) is not None:
                    self.loaded[worker] = work.model
                    self.flying[self.executor.submit(worker, work)] = (worker, work)
                    self.news.set()
            self._show()
            for handle in self.executor.wait(list(self.flying), WAIT):
                self._settle(handle)

    def _settle(self, handle: Any) -> None:
        worker, work = self.flying[handle]
        try:
            outcome = self.executor.result(handle)
        except WorkerLostError as error:
            self.loaded[worker] = None
            outcome = Failed(f"its worker was lost: {error}")
            if isinstance(work, ShardWork):
                work = replace(work, lost=work.lost + 1)
            elif work.attempt < self.retries:
                del self.flying[handle]
                self.report.retried += 1
                self.queue.waiting.append(replace(work, attempt=work.attempt + 1))
                return
        del self.flying[handle]
        if isinstance(outcome, Failed):
            self._failed(work, outcome.error)
        elif isinstance(outcome, Planned) and isinstance(work, PlanWork):
            self._planned(work, outcome)
        elif isinstance(outcome, Finished):
            self.done += 1
            self.report.computed += 1
            self.report.shard_seconds += outcome.seconds

    def _planned(self, work: PlanWork, planned: Planned) -> None:
        self.report.damage += planned.damage
        for job, error in planned.failed.items():
            self._record(job, None, error, 1)
        shards = [ShardWork(self.jobs[job], shard) for job, numbers in planned.todo.items() for shard in numbers]
        total = sum(planned.n_shards.values())
        self.total += total
        self.done += total - len(shards)
        self.report.kept += total - len(shards)
        self.queue.waiting.extendleft(reversed(shards))

    def _failed(self, work: Work, error: str) -> None:
        if isinstance(work, PlanWork):  # the model itself: none of its jobs can be run
            for job in work.jobs:
                self._record(job.id, None, error, 1)
        elif work.attempt < self.retries:
            self.report.retried += 1
            self.queue.waiting.append(replace(work, attempt=work.attempt + 1))
        else:
            self._record(work.job.id, work.shard, error, work.attempt + 1)

    def _record(self, job: str, shard: int | None, error: str, attempts: int) -> None:
        self.report.failed[str(self.jobs[job])] = error
        name = f"failed/{job}/{'plan' if shard is None else shard}.json"
        self.store.put(name, {"job": job, "shard": shard, "error": error, "attempts": attempts})

    def _show(self) -> None:
        if self.watch is None:
            return
        doing = [
            str(work.job) if isinstance(work, ShardWork) else f"planning {work.model.name}" for _, work in self._at()
        ]
        self.watch(Event(self.done, self.total, doing[0] if doing else ""))

    def _at(self) -> list[tuple[int, Work]]:
        return list(self.flying.values())

    def _beat(self) -> None:
        while True:
            shards = [work for _, work in self._at() if isinstance(work, ShardWork)]
            with contextlib.suppress(StoreError):  # whoever computes will meet it too
                self.store.beat([[str(one.job), one.job.id, one.shard] for one in shards], self.executor.n_workers)
            if self.ended.wait(BEAT_LEAST):
                return
            self.news.wait(BEAT_EVERY)
            self.news.clear()


# -- the manifest ------------------------------------------------------------------------------------------------------


def write_manifest(store: Store, jobs: Sequence[Job], name: str, *, stated: bool = True) -> None:
    """Says what the study is. Jobs of an earlier statement of it stay listed and stored, but are not current any more.

    Args:
        store: Where it is.
        jobs: All of the study.
        name: Its name. Studies of several names may share a store; each has its own current jobs.
        stated: Whether this is the study as somebody states it, rather than one that was read from the store.

    Raises:
        StoreError: the store was written by another schema.
    """
    listed = {job: (stated, labels) for job, stated, labels in read_manifest(store, mend=True)}
    wanted = {job.id: (job.stated(), list(job.labels)) for job in jobs}
    merged = {**{job: entry for job, entry in listed.items() if job not in wanted}, **wanted}
    there = store.good("manifest.json")
    before = [] if there is None else [job for job, _, _ in _entries(there)]
    current = {} if there is None else dict(there.get("current", {there["name"]: before}))
    if stated:
        current[name] = [job.id for job in jobs]
    new = {
        "format": "mechkit study",
        "name": name,
        "jobs": [{"job": job, "stated": stated, "labels": labels} for job, (stated, labels) in merged.items()],
        "current": current,
    }
    if there is None or any(there.get(key) != value for key, value in new.items()):
        store.put("manifest.json", new)


def current_jobs(store: Store) -> set[str] | None:
    """The ids of the jobs that the studies in a store had when each was stated last; `None` where that is not recorded."""
    recorded = (store.good("manifest.json") or {}).get("current")
    return None if not recorded else {job for jobs in recorded.values() for job in jobs}


def read_manifest(store: Store, *, mend: bool = False) -> list[tuple[str, dict[str, Any], list[str]]]:
    """Every job that the store knows: its id, statement and labels. A manifest that is lost is put together from the jobs'
    records.

    Raises:
        StoreError: the store was written by another schema.
    """
    check_schema(store)
    there: dict[str, Any] | None = None
    try:
        there = store.get("manifest.json")
        lost = "manifest.json was missing" if there is None and store.files.names("jobs") else None
    except DamagedError as error:
        lost = str(error)
        if mend:
            store.set_aside("manifest.json", lost)
    if there is not None:
        return _entries(there)
    found = []
    for name in store.files.names("jobs"):
        record = store.good(f"jobs/{name}")
        if record is not None:
            found.append((record["job"], record["stated"], record["labels"]))
    if lost and mend:
        store.say(f"{lost}; {len(found)} jobs were found by their own records")
    return found


def _entries(manifest: dict[str, Any]) -> list[tuple[str, dict[str, Any], list[str]]]:
    try:
        return [(entry["job"], entry["stated"], entry["labels"]) for entry in manifest["jobs"]]
    except (KeyError, TypeError) as error:
        raise StoreError(f"manifest.json: expected the jobs of a study, it lacks {error}") from error


def check_schema(store: Store) -> None:
    """Refuses a store of another schema, whatever else is in it."""
    import json

    from mechkit.studies._store import SCHEMA

    data = store.files.read("manifest.json")
    try:
        schema = SCHEMA if data is None else json.loads(data).get("schema", SCHEMA)
    except (ValueError, AttributeError, RecursionError):
        return  # torn: put together again
    if schema != SCHEMA:
        raise StoreError(
            f"store {store.url}: expected schema {SCHEMA}, got {schema!r}: it was written by another mechkit. Nothing "
            "was touched; use that mechkit, or another store"
        )


def _lines(shown: contextlib.ExitStack) -> Callable[[Event], None]:
    """Watches a run by lines. It counts from the first event on: what was kept from earlier runs took no time."""
    bars: list[Progress] = []

    def watch(event: Event) -> None:
        if not bars:
            bars.append(shown.enter_context(Progress(event.total or None, "shard", done=event.done)))
        bars[0].reach(event.done, event.total or None, note=event.doing[:60])

    return watch


@contextlib.contextmanager
def watching(progress: bool) -> Iterator[Callable[[Event], None] | None]:
    """A bar on the terminal, for as long as the study runs; in a log a line every few seconds."""
    if not progress:
        yield None
        return
    if not is_watched(sys.stderr):
        with contextlib.ExitStack() as shown:
            yield _lines(shown)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("", total=None)

        def watch(event: Event) -> None:
            bars.update(bar, completed=event.done, total=event.total or None, description=event.doing[:60])

        yield watch
