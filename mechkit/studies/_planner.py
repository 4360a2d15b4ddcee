"""The planner: what is left to do of one model's jobs, without computing any of it.

1. For every job the prompts are made, and the full key is compared with the recorded one. An equal key keeps the finished shards;
   another key sets them aside; no key makes a plan (`_shards.py`) and records it.
2. Where the files that a model is loaded from are those of the record, and all shards are finished, nothing is loaded.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from mechkit.hooks import fingerprint
from mechkit.studies import _registry as registry
from mechkit.studies._files import StoreError
from mechkit.studies._job import Job, canonical
from mechkit.studies._keys import of_code
from mechkit.studies._materials import Materials
from mechkit.studies._records import finished
from mechkit.studies._shards import Plan, make_plan
from mechkit.studies._store import DamagedError, Store
from mechkit.studies._work import Planned, PlanWork, described


class Planner:
    """Says which shards are to be computed, and keeps the record of each job's key and plan.

    Args:
        store: Where records and shards are.
        materials: Models and prompts.
        rows: About how many (cell, prompt) pairs a shard should have.
    """

    def __init__(self, store: Store, materials: Materials, rows: int | None) -> None:
        self.store, self.materials, self.rows = store, materials, rows
        self._plans: dict[str, Plan] = {}

    def plan(self, work: PlanWork) -> Planned:
        """What is left of all jobs of a model."""
        todo: dict[str, tuple[int, ...]] = {}
        sizes: dict[str, int] = {}
        failed: dict[str, str] = {}
        name = work.model.name
        source = (
            None if name in self.materials.at_hand or registry.is_code(name) else fingerprint(name, work.model.revision)
        )
        already = len(self.store.damage)
        for job in work.jobs:
            try:
                plan, done = self._planned(job, source)
            except StoreError:
                raise
            except Exception as error:
                failed[job.id] = described(error)
                continue
            self.store.remove(f"failed/{job.id}/plan.json")  # of an earlier run
            sizes[job.id] = plan.n_shards
            todo[job.id] = tuple(shard.number for shard in plan.shards if shard.number not in done)
        return Planned(todo, sizes, failed, tuple(self.store.damage[already:]))

    def plan_of(self, job: Job) -> Plan:
        """The plan that a worker made, for this very model and these prompts."""
        if job.id not in self._plans:
            self._plans[job.id] = self._recorded(job)
        return self._plans[job.id]

    def _recorded(self, job: Job) -> Plan:
        record = self.store.get(f"jobs/{job.id}.json")
        if record is None:
            raise ValueError(f"store: expected jobs/{job.id}.json, which was there when the job was planned")
        measured = self.materials.measured(job)
        if differ := [name for name, value in measured.items() if record["measured"].get(name) != value]:
            raise ValueError(
                f"{' and '.join(differ)}: expected what the job was planned with, got another here; a model must be the same for "
                "every worker, and a task give the same prompts whenever it is called"
            )
        return Plan.from_json(record["plan"])

    def _planned(self, job: Job, source: str | None) -> tuple[Plan, set[int]]:
        """The plan, and the shards that are finished and good."""
        record = self._record(job)
        if (
            record is not None
            and source is not None
            and record["source"] == source
            and not of_code(job, record["measured"])
        ):
            plan = Plan.from_json(record["plan"])
            done = finished(self.store, job, plan)
            if len(done) == plan.n_shards:
                return plan, done  # the same files: nothing is loaded
        key = self.materials.measured(job)
        if record is not None and record["measured"] != key:
            was = [name for name in key if record["measured"].get(name) != key[name]]
            self._forget(job, f"job {job.id} ({job}) was computed with another {' and '.join(was)}")
            record = None
        if record is None:
            prompts, model = self.materials.prompts(job), self.materials.model(job.model)
            metric = self.materials.metric(job, prompts)
            plan = make_plan(job, model, prompts, metric, budget=self.materials.budget(), rows=self.rows)
            plan = replace(plan, key=hashlib.sha256(canonical([job.stated(), key, plan.to_json()])).hexdigest()[:16])
            self.store.put(
                f"jobs/{job.id}.json",
                {
                    "job": job.id,
                    "stated": job.stated(),
                    "labels": list(job.labels),
                    "measured": key,
                    "source": source,
                    "plan": plan.to_json(),
                },
            )
            self._plans[job.id] = plan
            return plan, set()
        if record["source"] != source:
            self.store.put(
                f"jobs/{job.id}.json", {k: v for k, v in {**record, "source": source}.items() if k != "schema"}
            )
        plan = Plan.from_json(record["plan"])
        return plan, finished(self.store, job, plan)

    def _record(self, job: Job) -> dict[str, Any] | None:
        name = f"jobs/{job.id}.json"
        try:
            record = self.store.get(name)
            if record is not None and (
                record["job"] != job.id or canonical(record["stated"]) != canonical(job.stated())
            ):
                raise DamagedError(f"{name} is another job's")
        except DamagedError as error:
            self.store.set_aside(name, str(error))
            record = None
        if record is None and any(self.store.files.exists(f"{place}/{job.id}") for place in ("shards", "data")):
            self._forget(job, f"job {job.id} ({job}) had values but no record of their key")
        return record

    def _forget(self, job: Job, why: str) -> None:
        """Sets aside all that there is of a job."""
        for name in (
            f"jobs/{job.id}.json",
            f"layout/{job.id}.json",
            f"shards/{job.id}",
            f"failed/{job.id}",
            f"data/{job.id}",
        ):
            if self.store.files.exists(name):
                self.store.set_aside(name, why)
