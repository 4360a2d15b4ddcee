"""What runs in a worker: it does one unit of work after the other, and keeps the record.

1. Of a model's jobs, the planner says what is left (`_planner.py`).
2. Of a shard, the technique's public function is called with the shard's prompts and cells, and what it returns is written at
   once, with the record that makes the shard a finished one.
3. When the device runs out of memory, the budget is halved and the shard tried again.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mechkit.circuits import EdgeScores
from mechkit.hooks import HookedModel, out_of_memory
from mechkit.metrics import Metric
from mechkit.result import Result
from mechkit.studies import _registry as registry
from mechkit.studies._files import StoreError
from mechkit.studies._job import Job
from mechkit.studies._materials import LEAST_BUDGET, Materials
from mechkit.studies._planner import Planner
from mechkit.studies._records import save
from mechkit.studies._shards import Plan, Shard, shard_arguments
from mechkit.studies._store import Store
from mechkit.studies._work import Failed, Finished, Planned, PlanWork, ShardWork, Work, WorkerSettings, described


class Worker:
    """Does units of work, one at a time.

    Args:
        settings: Of the run.
        device, loaded: As `Materials` takes them.
    """

    def __init__(
        self, settings: WorkerSettings, device: str | None = None, loaded: Mapping[str, HookedModel] | None = None
    ) -> None:
        self.store = Store(settings.store)
        self.materials = Materials(settings.budget, device, loaded)
        self.planner = Planner(self.store, self.materials, settings.rows)

    def run(self, work: Work) -> Planned | Finished | Failed:
        """One unit. Errors come back as `Failed`, but for a store that cannot be used, which ends the study."""
        try:
            return self.planner.plan(work) if isinstance(work, PlanWork) else self._compute(work)
        except StoreError:
            raise
        except Exception as error:
            return Failed(described(error))

    def _compute(self, work: ShardWork) -> Finished:
        begin = time.perf_counter()
        job, model = work.job, self.materials.model(work.model)
        plan = self.planner.plan_of(job)
        shard = plan.shards[work.shard]
        found = self._call(job, plan, shard, model, work.lost)
        facts = {
            "attempt": work.attempt,
            "device": _device_name(model),
            "torch": torch.__version__,
            "budget": self.materials.budget(),
        }
        now = self.store.good(f"jobs/{job.id}.json")
        if now is None or now["plan"]["key"] != plan.key:
            raise ValueError(
                "store: the job was planned anew while this shard was computed, with another key; the shard is dropped"
            )
        save(self.store, job, plan, shard, found, {**facts, "seconds": time.perf_counter() - begin})
        return Finished(time.perf_counter() - begin)

    def _call(self, job: Job, plan: Plan, shard: Shard, model: HookedModel, lost: int) -> Result | EdgeScores:
        """The technique's own function on the shard's prompts and cells."""
        row, given = registry.technique(job.technique.name), shard_arguments(job, plan, shard, model)
        whole = self.materials.prompts(job)
        if whole is not None:
            start, stop = shard.ranges["prompt"]
            prompts = whole[list(plan.order[start:stop])]
            if row.works_on != "nothing":
                given["pairs" if row.works_on == "pairs" else "prompts"] = prompts
            if job.metric is not None and registry.is_code(job.metric.name):  # it may look at all of its prompts
                found = self.materials.metric(job, whole)
                given["metric"] = found[plan.order[start:stop]] if isinstance(found, Metric) else found
            elif job.metric is not None:
                given["metric"] = self.materials.metric(job, prompts)
            if given.get("mode") in ("mean", "position_mean"):
                given["reference"] = whole
        ours = not registry.is_code(job.technique.name)
        room = max(LEAST_BUDGET, self.materials.budget() >> lost)
        given |= _taken(row.function, ours, progress=False, budget=room)
        while True:
            try:
                found = row.function(model, **given)
                break
            except (RuntimeError, MemoryError) as error:
                known = isinstance(error, MemoryError) or out_of_memory(error)
                if not known or "budget" not in given or given["budget"] <= LEAST_BUDGET:
                    raise
            given["budget"] = self.materials.halve(given["budget"])
        if not isinstance(found, Result | EdgeScores):
            raise ValueError(f"technique: expected {job.technique.name!r} to give a Result, got {type(found).__name__}")
        return found


def _taken(function: Callable[..., Any], ours: bool, **arguments: Any) -> dict[str, Any]:
    """Those arguments that a function takes; what ours pass on, they take."""
    parameters = inspect.signature(function).parameters
    anything = ours and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name: value for name, value in arguments.items() if anything or name in parameters}


def _device_name(model: HookedModel) -> str:
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
