"""A study: models × tasks × techniques, stated once, run anywhere, and resumed after anything.

1. State it, in Python or in a TOML file. It is checked whole before anything runs (`_spec.py`).
2. `run` computes what its store does not hold yet (`_run.py`): a planner says what that is (`_planner.py`) and cuts each job into
   shards (`_shards.py`), workers compute them (`_worker.py`) in this process, in several, or on Ray (`_executors.py`), and write
   each into a zarr store with checksums (`_store.py`).
3. Kill it, and run it again: finished shards are kept, as long as their model, prompts, arguments and mechkit are the same.
4. `results` reads it all back as one labelled table (`_table.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mechkit._check import checked, plain
from mechkit._files import decoding
from mechkit._version import __version__
from mechkit.hooks import find_model
from mechkit.studies import _registry as registry
from mechkit.studies._executors import Executor, InProcess
from mechkit.studies._files import StoreError
from mechkit.studies._job import Job
from mechkit.studies._problems import Problems
from mechkit.studies._run import RunReport, check_schema, current_jobs, read_manifest, run, watching
from mechkit.studies._spec import Statement, check, read_toml
from mechkit.studies._status import Status, status
from mechkit.studies._store import Store
from mechkit.studies._table import Table, counted, fits
from mechkit.studies._work import WorkerSettings

Entry = str | Mapping[str, Any]


class Study:
    """Techniques on tasks on models.

    Args:
        models: Names (a hub's, a folder, a `.gguf` file, `"smollm2-135m"`), or tables: `{"name": …, "revision": …, "dtype":
            "bfloat16", "device_map": "auto"}`.
        tasks: Names of `mechkit.tasks`, or tables with its arguments: `{"name": "ioi", "n": 32, "seed": 0}`.
        techniques: Names of techniques, or tables with their arguments, and with `metric` (a name, or a table with its
            arguments; default `"logit_diff"`): `{"name": "ablation", "site": "z", "over": "layer head", "mode": "mean"}`.
            `tasks` and `models` in it restrict what it is run on.
        store: A folder, or an object store's URL (`"s3://bucket/prefix"`, with the fsspec package for it).
        name: Studies of several names may share a store. What is stated under one name replaces what was stated under it before.
        budget: Bytes of working memory (`2**30`, or `"1 GiB"`); default half of what a GPU has free, 1 GiB on a CPU.
        shard: About how many (cell, prompt) pairs to compute between two writes; default 4,096 on a CPU, 262,144 on a GPU.
        retries: How often a shard is tried again that raised an error.

    Any entry may have a `label`, and a `grid`: `{"name": "ioi", "grid": {"seed": [0, 1, 2]}}` is three tasks. A name may also
    be code, `"package.module:function"`: of a model, a function that returns a `HookedModel`; of a task, one of the model that
    returns `PromptPairs`; of a technique, one of `(model, pairs, metric, ...)` that returns a `Result`; of a metric, one of
    the pairs.

    Raises:
        ValueError: everything that is wrong with it, each with its key, before anything is run.

    Example:
        >>> model = HookedModel.from_pretrained("smollm2-135m")
        >>> study = Study(["smollm2-135m"], ["ioi"], ["activation_patching", "ablation"], store="out/study")
        >>> study.run(InProcess(loaded={"smollm2-135m": model}))  # or study.run(), which loads it
        >>> study.results().result(technique="ablation").mean("prompt").top(3)
    """

    @checked
    def __init__(
        self,
        models: Sequence[Entry],
        tasks: Sequence[Entry],
        techniques: Sequence[Entry],
        *,
        store: str | os.PathLike[str],
        name: str = "study",
        budget: int | str | None = None,
        shard: int | None = None,
        retries: int = 2,
    ) -> None:
        settings = {"name": name, "store": os.fspath(store), "budget": budget, "shard": shard, "retries": retries}
        parts = {"model": plain(models), "task": plain(tasks), "technique": plain(techniques)}
        self._take(check(settings, parts, Problems("study")))

    def _take(self, statement: Statement) -> None:
        self.name, self.jobs = statement.name, statement.jobs
        self.budget, self.shard, self.retries = statement.budget, statement.shard, statement.retries
        self.store = _store(statement.store)
        self._may_run_code = True  # whoever stated it was asked
        self._stated = True

    @classmethod
    @checked
    def from_toml(
        cls, path: str | os.PathLike[str], *, store: str | os.PathLike[str] | None = None, allow_code: bool = False
    ) -> Study:
        """A study from a file: `[[model]]`, `[[task]]` and `[[technique]]` tables, and `store`, `budget`, … above them.

        Args:
            path: The file. Paths in it are relative to it; without a `store`, results go into `NAME.study` beside it.
            store: Overrides the file's.
            allow_code: Whether names in it may be code, which is then run.

        Raises:
            ValueError: everything that is wrong with it, each with its line and key, before anything is run.
        """
        study = object.__new__(cls)
        study._take(read_toml(Path(path), allow_code=allow_code))
        if store is not None:
            study.store = _store(store)
        return study

    @classmethod
    @checked
    def open(cls, store: str | os.PathLike[str], *, stale: bool = False, allow_code: bool = False) -> Study:
        """The studies in a store, as each was stated last: to look at, or to go on with. How a model is put on devices, and
        whether its own code may run, are not in a store: say so in a statement.

        Args:
            store: Where it is.
            stale: Whether jobs of earlier statements are taken in too, which nobody states any more (an argument was changed, a
                technique was taken out, mechkit is another). Their technique is marked `(stale)`, and they are not run.
            allow_code: Whether `run` may run code that its jobs name.

        Raises:
            ValueError: there is no study in it.
        """
        opened = _store(store)
        try:
            entries = read_manifest(opened)
        except StoreError as error:
            raise ValueError(str(error)) from error
        if not entries:
            raise ValueError(f"store: expected a study in {opened.url}, there is none")
        with decoding(opened.url, "a study"):
            every = [Job.of(stated, labels) for _, stated, labels in entries]
        current = current_jobs(opened)
        marked = [_marked(job) if current is not None and job.id not in current else job for job in every]
        jobs = tuple(job for job in marked if stale or job.current)
        study = object.__new__(cls)
        name = (opened.good("manifest.json") or {}).get("name", "study")
        study._take(Statement(name, opened.url, None, None, 2, jobs))
        study._may_run_code, study._stated = allow_code, False
        return study

    def __len__(self) -> int:
        return len(self.jobs)

    def __repr__(self) -> str:
        counts = [len({job.labels[i] for job in self.jobs if job.labels[i]}) for i in range(3)]
        kinds = ", ".join(counted(n, what) for n, what in zip(counts, ("model", "task", "technique"), strict=True))
        return f"Study({self.name!r}: {counted(len(self), 'job')} of {kinds}, in {self.store.url})"

    @checked
    def check(self, *, loaded: Sequence[str] = ()) -> None:
        """Looks whether every model is there, without loading any. `run` does so first.

        Args:
            loaded: Names that need no looking for.

        Raises:
            ValueError: those that are not, all together.
        """
        problems = Problems(f"study {self.name!r}")
        models = {(job.model.name, job.model.revision): job.model for job in self.jobs}
        for i, ((name, _), model) in enumerate(models.items()):
            if name in loaded or registry.is_code(name):
                continue
            try:
                find_model(name, revision=model.revision, trust_remote_code=model.trust_remote_code)
            except ValueError as error:
                problems.add(("model", i, "name"), str(error).removeprefix("model: "))
        problems.raise_any()

    @checked
    def run(
        self,
        executor: Executor | None = None,
        *,
        only: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> RunReport:
        """Computes what is not there yet. An interrupt, a crash or a full disk costs at most the shards that were being computed.

        Args:
            executor: `InProcess()` (the default), `Processes()` or `Ray()`.
            only: What to run now, as for `Table.sel`: `{"task": "ioi"}`.
            progress: Whether to show a bar.

        Returns:
            What was computed, what was kept, what failed, and what was found damaged. A job that fails does not stop the others.

        Raises:
            ValueError: a model is missing.
            StoreError: the store cannot be written, was written by another schema, or another run is at work on it.
        """
        executor = executor or InProcess()
        if getattr(executor, "address", None) is None:  # else the cluster's nodes look for themselves
            self.check(loaded=list(getattr(executor, "loaded", {})))
        known = [job for job in self.jobs if job.current]
        jobs = known if only is None else _only(known, only)
        code = [name for job in jobs for name in _names(job) if registry.is_code(name)]
        if code and not self._may_run_code:
            raise ValueError(
                f"store: its jobs name code, {code[0]!r}, which would be run; open it with allow_code=True if you trust it"
            )
        if others := sorted({job.mechkit for job in jobs} - {__version__}):
            raise ValueError(
                f"store: it holds jobs of mechkit {', '.join(others)}, this is {__version__}; state the study again to compute "
                "them anew, or look at their results"
            )
        self.store.damage.clear()
        settings = WorkerSettings(self.store.url, self.budget, self.shard)
        with watching(progress) as watch:
            return run(
                jobs,
                self.store,
                executor,
                settings,
                name=self.name,
                retries=self.retries,
                watch=watch,
                known=known,
                stated=self._stated,
            )

    @checked
    def status(self, *, verify: bool = False) -> Status:
        """How far it is, from the store alone: also while another process runs it.

        Args:
            verify: Read every chunk, and count as finished only what is as it was written.
        """
        check_schema(self.store)
        return replace(status(self.store, self.jobs, verify=verify), stale=self._stale())

    @checked
    def results(self, *, partial: bool = False) -> Table:
        """The finished jobs as one table; numbers are read when they are asked for.

        Args:
            partial: Take in jobs that are finished in part, with NaN for the rest.
        """
        check_schema(self.store)
        return Table(self.store, self.jobs, partial=partial)

    def _stale(self) -> int:
        """How many jobs of earlier statements the store keeps, which this study does not have."""
        current = current_jobs(self.store)
        if current is None:
            return 0
        known = {job for job, _, _ in read_manifest(self.store)}
        return len(known - current - {job.id for job in self.jobs})


def _marked(job: Job) -> Job:
    """A job that nobody states any more."""
    model, task, technique = job.labels
    return replace(job, labels=(model, task, f"{technique} (stale)"), current=False)


def _store(store: str | os.PathLike[str]) -> Store:
    if not os.fspath(store).strip():
        raise ValueError(f"store: expected a folder or an object store's URL, got {os.fspath(store)!r}")
    try:
        return Store(store)
    except StoreError as error:
        raise ValueError(str(error)) from error


def _names(job: Job) -> list[str]:
    return [call.name for call in (job.model, job.task, job.technique, job.metric) if call is not None]


def _only(jobs: Sequence[Job], wanted: Mapping[str, Any]) -> list[Job]:
    chosen = [job for job in jobs if all(fits(job, key, value) for key, value in wanted.items())]
    if not chosen:
        raise ValueError(
            f"only: expected what fits a job, got {dict(wanted)!r}; jobs are {', '.join(map(str, jobs[:5]))}, ..."
        )
    return chosen
