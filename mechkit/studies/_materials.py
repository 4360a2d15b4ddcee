"""Materials: what a worker's jobs are run with. The model, its prompts, metrics and the budget, kept from unit to unit of work.

One model is loaded at a time, and hashed when it is: no shard is stored under the key of another.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch

from mechkit.engine import Budget
from mechkit.hooks import HookedModel
from mechkit.metrics import as_metric
from mechkit.prompts import PromptPairs, Prompts
from mechkit.studies import _registry as registry
from mechkit.studies._job import Job, ModelSpec, canonical
from mechkit.studies._keys import code_hash, config_hash, prompts_hash, weights_digest

LEAST_BUDGET = 2**20


class Materials:
    """Makes what a job needs, once.

    Args:
        budget: Bytes of working memory; by default what the device has room for.
        device: Where models go; default the GPU if there is one. A model with a `device_map` is spread as that says.
        loaded: Models that are at hand, by name.
    """

    def __init__(
        self, budget: int | None = None, device: str | None = None, loaded: Mapping[str, HookedModel] | None = None
    ) -> None:
        self.device, self.at_hand = device, dict(loaded or {})
        self._model: tuple[ModelSpec, HookedModel] | None = None
        self._used = False  # whether a model has been loaded, or tried to be
        self._weights = self._config = ""  # their hashes, of when it was loaded
        self._prompts: dict[bytes, PromptPairs | Prompts] = {}
        self._stated = self._budget = budget

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
        self._budget = self._stated
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

    def metric(self, job: Job, prompts: PromptPairs | Prompts | None) -> Any:
        """The job's metric of these prompts."""
        if job.metric is None:
            return None
        return as_metric(registry.metric(job.metric.name)(prompts, **job.metric.arguments))

    def measured(self, job: Job) -> dict[str, Any]:
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

    def budget(self) -> int:
        """Bytes of working memory with the last model."""
        if self._budget is None:
            assert self._model is not None
            self._budget = Budget.of(self._model[1], None).bytes
        return self._budget

    def halve(self, budget: int) -> int:
        """Half of what was too much, from now on; memory that is no longer used goes back to the device."""
        self._budget = max(LEAST_BUDGET, budget // 2)
        _give_back_memory()
        return self._budget


def _give_back_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
