"""What runs in a worker: it loads a model once, plans that model's jobs, and computes shards.

1. `plan`: for every job the prompts are made, and the full key is compared with the recorded one. An equal key keeps the
   finished shards; another key sets them aside; no key makes a plan and records it.
2. `shard`: the technique's public function is called with the shard's prompts and cells, and what it returns is written at once.
3. When the device runs out of memory, the budget is halved and the shard tried again.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from mechkit.circuits import EdgeScores
from mechkit.engine import Budget
from mechkit.hooks import HookedModel, beside_weights, fingerprint, out_of_memory
from mechkit.metrics import Metric, as_metric
from mechkit.prompts import PromptPairs, Prompts
from mechkit.result import Result
from mechkit.studies import _registry as registry
from mechkit.studies._files import StoreError
from mechkit.studies._job import Job, ModelSpec, canonical
from mechkit.studies._plan import Plan, Shard, make_plan, shard_arguments
from mechkit.studies._records import finished, save
from mechkit.studies._store import DamagedError, Store

LEAST_BUDGET = 2**20


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
    """What a plan task found: the shards of each job that are left, and the jobs that cannot be planned, with the error."""

    todo: Mapping[str, tuple[int, ...]]
    n_shards: Mapping[str, int]
    failed: Mapping[str, str]
    damage: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    seconds: float


@dataclass(frozen=True)
class Failed:
    error: str


@dataclass(frozen=True)
class WorkerSettings:
    """What a run gives its workers."""

    store: str
    budget: int | None = None
    rows: int | None = None


class Worker:
    """Computes tasks, one at a time.

    Args:
        settings: Of the run.
        device: Where models go; default the GPU if there is one. A model with a `device_map` is spread as that says.
        loaded: Models that are at hand, by name.
    """

    def __init__(
        self, settings: WorkerSettings, device: str | None = None, loaded: Mapping[str, HookedModel] | None = None
    ) -> None:
        self.settings, self.device = settings, device
        self.store = Store(settings.store)
        self.at_hand = dict(loaded or {})
        self._model: tuple[ModelSpec, HookedModel] | None = None
        self._used = False  # whether a model has been loaded, or tried to be
        self._weights = self._config = ""  # their hashes, of when it was loaded
        self._prompts: dict[bytes, PromptPairs | Prompts] = {}
        self._plans: dict[str, Plan] = {}
        self._budget = settings.budget

    def run(self, task: Work) -> Planned | Finished | Failed:
        """One task. Errors come back as `Failed`, but for a store that cannot be used, which ends the study."""
        try:
            return self._plan(task) if isinstance(task, PlanWork) else self._shard(task)
        except StoreError:
            raise
        except Exception as error:
            return Failed(_told(error))

    # -- models and prompts --------------------------------------------------------------------------------------------

    def model(self, spec: ModelSpec) -> HookedModel:
        """The model, loaded unless it was the last."""
        if self._model is not None and self._model[0] == spec:
            return self._model[1]
        if self._used:  # one at a time; one whose loading failed has left something too
            self._model = None
            self._prompts.clear()
            _give_back_memory()
        self._used = True
        model = self._load(spec)
        self._weights = weights_digest(model)
        self._config = config_hash(model)
        self._budget = self.settings.budget
        self._model = (spec, model)
        return model

    def _load(self, spec: ModelSpec) -> HookedModel:
        dtype = getattr(torch, spec.dtype)
        if spec.name in self.at_hand:
            found = self.at_hand[spec.name]
            if spec.arguments or (spec.revision is not None and spec.revision != found.revision):
                raise ValueError(
                    f"loaded: expected {spec.name!r} as it is stated (revision {spec.revision!r}, arguments "
                    f"{dict(spec.arguments)}), got a model of revision {found.revision!r}; leave it out of loaded"
                )
        elif registry.is_code(spec.name):
            found = registry.from_code(spec.name)(**spec.arguments)
        else:
            where = {"device_map": spec.device_map} if spec.device_map else {"device": self.device}
            return HookedModel.from_pretrained(
                spec.name, dtype=dtype, revision=spec.revision, trust_remote_code=spec.trust_remote_code, **where
            )
        if not isinstance(found, HookedModel):
            raise ValueError(f"model: expected {spec.name!r} to give a HookedModel, got {type(found).__name__}")
        if found.dtype != dtype:
            raise ValueError(
                f"model: {spec.name!r} is stated as {spec.dtype}, and is {found.dtype}; state its own dtype"
            )
        return found

    def prompts(self, job: Job) -> PromptPairs | Prompts | None:
        """The job's prompts, made by its task for its model."""
        if job.task is None:
            return None
        key = canonical(job.task.stated())
        if key not in self._prompts:
            made = registry.task(job.task.name)(self.model(job.model), **job.task.arguments)
            if not isinstance(made, PromptPairs | Prompts):
                raise ValueError(
                    f"task: expected {job.task.name!r} to give PromptPairs or Prompts, got {type(made).__name__}"
                )
            self._prompts[key] = made
        return self._prompts[key]

    # -- planning ------------------------------------------------------------------------------------------------------

    def _plan(self, task: PlanWork) -> Planned:
        todo: dict[str, tuple[int, ...]] = {}
        sizes: dict[str, int] = {}
        failed: dict[str, str] = {}
        name = task.model.name
        source = None if name in self.at_hand or registry.is_code(name) else fingerprint(name, task.model.revision)
        already = len(self.store.damage)
        for job in task.jobs:
            try:
                plan, done = self._planned(job, source)
            except StoreError:
                raise
            except Exception as error:
                failed[job.id] = _told(error)
                continue
            self.store.remove(f"failed/{job.id}/plan.json")  # of an earlier run
            sizes[job.id] = plan.n_shards
            todo[job.id] = tuple(shard.number for shard in plan.shards if shard.number not in done)
        return Planned(todo, sizes, failed, tuple(self.store.damage[already:]))

    def _planned(self, job: Job, source: str | None) -> tuple[Plan, set[int]]:
        """The plan, and the shards that are finished and good."""
        record = self._record(job)
        if (
            record is not None
            and source is not None
            and record["source"] == source
            and not _of_code(job, record["measured"])
        ):
            plan = Plan.from_json(record["plan"])
            done = finished(self.store, job, plan)
            if len(done) == plan.n_shards:
                return plan, done  # the same files: nothing is loaded
        key = self._measured(job)
        if record is not None and record["measured"] != key:
            was = [name for name in key if record["measured"].get(name) != key[name]]
            self._forget(job, f"job {job.id} ({job}) was computed with another {' and '.join(was)}")
            record = None
        if record is None:
            prompts, model = self.prompts(job), self.model(job.model)
            metric = self._metric(job, prompts)
            plan = make_plan(job, model, prompts, metric, budget=self._bytes(model), rows=self.settings.rows)
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

    def _measured(self, job: Job) -> dict[str, Any]:
        """What of the key is known with the model at hand."""
        self.model(job.model)
        prompts = self.prompts(job)
        return {
            "weights": self._weights,
            "config": self._config,
            "code": code_hash(job),
            "prompts": None if prompts is None else prompts_hash(prompts),
            "n_prompts": None if prompts is None else len(prompts),
        }

    def _metric(self, job: Job, prompts: PromptPairs | Prompts | None) -> Any:
        if job.metric is None:
            return None
        return as_metric(registry.metric(job.metric.name)(prompts, **job.metric.arguments))

    def _bytes(self, model: HookedModel) -> int:
        if self._budget is None:
            self._budget = Budget.of(model, None).bytes
        return self._budget

    # -- computing -----------------------------------------------------------------------------------------------------

    def _shard(self, task: ShardWork) -> Finished:
        begin = time.perf_counter()
        job, model = task.job, self.model(task.model)
        plan = self._plans.get(job.id)
        if plan is None:
            plan = self._plans[job.id] = self._recorded_plan(job)
        shard = plan.shards[task.shard]
        found = self._call(job, plan, shard, model, task.lost)
        facts = {
            "attempt": task.attempt,
            "device": _device_name(model),
            "torch": torch.__version__,
            "budget": self._bytes(model),
        }
        now = self.store.good(f"jobs/{job.id}.json")
        if now is None or now["plan"]["key"] != plan.key:
            raise ValueError(
                "store: the job was planned anew while this shard was computed, with another key; the shard is dropped"
            )
        save(self.store, job, plan, shard, found, {**facts, "seconds": time.perf_counter() - begin})
        return Finished(time.perf_counter() - begin)

    def _recorded_plan(self, job: Job) -> Plan:
        """The plan that a worker made: for this very model, and these prompts."""
        record = self.store.get(f"jobs/{job.id}.json")
        if record is None:
            raise ValueError(f"store: expected jobs/{job.id}.json, which was there when the job was planned")
        measured = self._measured(job)
        if differ := [name for name, value in measured.items() if record["measured"].get(name) != value]:
            raise ValueError(
                f"{' and '.join(differ)}: expected what the job was planned with, got another here; a model must be the same for "
                "every worker, and a task give the same prompts whenever it is called"
            )
        return Plan.from_json(record["plan"])

    def _call(self, job: Job, plan: Plan, shard: Shard, model: HookedModel, lost: int) -> Result | EdgeScores:
        """The technique's own function on the shard's prompts and cells."""
        row, given = registry.technique(job.technique.name), shard_arguments(job, plan, shard, model)
        whole = self.prompts(job)
        if whole is not None:
            start, stop = shard.ranges["prompt"]
            prompts = whole[list(plan.order[start:stop])]
            if row.works_on != "nothing":
                given["pairs" if row.works_on == "pairs" else "prompts"] = prompts
            if job.metric is not None and registry.is_code(job.metric.name):  # it may look at all of its prompts
                found = self._metric(job, whole)
                given["metric"] = found[plan.order[start:stop]] if isinstance(found, Metric) else found
            elif job.metric is not None:
                given["metric"] = self._metric(job, prompts)
            if given.get("mode") in ("mean", "position_mean"):
                given["reference"] = whole
        ours = not registry.is_code(job.technique.name)
        room = max(LEAST_BUDGET, self._bytes(model) >> lost)
        given |= _taken(row.function, ours, progress=False, budget=room)
        while True:
            try:
                found = row.function(model, **given)
                break
            except (RuntimeError, MemoryError) as error:
                known = isinstance(error, MemoryError) or out_of_memory(error)
                if not known or "budget" not in given or given["budget"] <= LEAST_BUDGET:
                    raise
            given["budget"] = self._budget = max(LEAST_BUDGET, given["budget"] // 2)
            _give_back_memory()
        if not isinstance(found, Result | EdgeScores):
            raise ValueError(f"technique: expected {job.technique.name!r} to give a Result, got {type(found).__name__}")
        return found


def _give_back_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _taken(function: Callable[..., Any], ours: bool, **arguments: Any) -> dict[str, Any]:
    """Those arguments that a function takes; what ours pass on, they take."""
    parameters = inspect.signature(function).parameters
    anything = ours and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name: value for name, value in arguments.items() if anything or name in parameters}


def _of_code(job: Job, measured: Mapping[str, Any]) -> bool:
    """Whether somebody's code has changed since, or gives the prompts or the metric, which may then depend on anything."""
    gives = any(call is not None and registry.is_code(call.name) for call in (job.task, job.metric))
    return gives or measured["code"] != code_hash(job)


def code_hash(job: Job) -> str | None:
    """Of the files in which the job's own code stands; `None` if all of it is mechkit's."""
    names = [call.name for call in (job.model, job.task, job.technique, job.metric) if call is not None]
    digest = hashlib.sha256()
    for name in (names := [name for name in names if registry.is_code(name)]):
        digest.update(registry.source_of(registry.from_code(name)))
    return digest.hexdigest()[:16] if names else None


def weights_digest(model: HookedModel) -> str:
    """Of every byte of every weight, and of all that decides a model's numbers beside them (`weights_hash` sees less of the
    weights): the same on any device, with any number of threads."""
    parameters = list(model.bridge.original_model.named_parameters())
    if any(p.device.type == "meta" for _, p in parameters):  # put away by accelerate
        return model.weights_hash
    different: dict[Any, tuple[str, torch.Tensor]] = {}
    for name, p in parameters:  # tied ones, or the same under another name, once
        different.setdefault((p.data_ptr(), p.shape, p.stride(), p.dtype), (name, p.detach()))

    def digest(named: tuple[str, torch.Tensor]) -> bytes:
        name, weight = named
        found = hashlib.sha256(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        found.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return found.digest()

    with ThreadPoolExecutor(4) as pool:  # hashing lets other threads run; few, since each may hold a copy of a weight
        parts = [*pool.map(digest, different.values()), beside_weights(model.bridge).encode()]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def config_hash(model: HookedModel) -> str:
    """Of what decides a model's numbers beside its weights: how many heads, which positions, which scales."""
    config = model.bridge.original_model.config.to_dict()
    ours = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
    return hashlib.sha256(json.dumps(ours, sort_keys=True, default=str).encode()).hexdigest()[:16]


def prompts_hash(prompts: PromptPairs | Prompts) -> str:
    """Of all that a technique can see of the prompts: tokens, answers, named positions."""
    if isinstance(prompts, Prompts):
        return prompts.hash()
    positions = {name: at.tolist() for name, at in prompts.positions.items()}
    seen = [prompts.clean.hash(), prompts.corrupted.hash(), prompts.right, prompts.wrong, positions]
    return hashlib.sha256(canonical(seen)).hexdigest()[:16]


def _told(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({last[0].name}, line {last[0].lineno})" if last and not isinstance(error, ValueError) else ""
    return f"{type(error).__name__}: {error}{where}"


def _device_name(model: HookedModel) -> str:
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
