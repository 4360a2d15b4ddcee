"""Keys: hashes of all that decides a job's numbers and is known with its model at hand. Two equal keys, equal numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

from mechkit.hooks import HookedModel, beside_weights
from mechkit.prompts import PromptPairs, Prompts
from mechkit.studies import _registry as registry
from mechkit.studies._job import Job, canonical


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
    """Of all that a technique can see of the prompts: tokens, pictures and which positions are which of their patches, answers,
    named positions."""
    if isinstance(prompts, Prompts):
        segments = _segments(prompts)
        return (
            prompts.hash() if not segments else hashlib.sha256(canonical([prompts.hash(), segments])).hexdigest()[:16]
        )
    positions = {name: at.tolist() for name, at in prompts.positions.items()}
    seen = [prompts.clean.hash(), prompts.corrupted.hash(), prompts.right, prompts.wrong, positions]
    if segments := [_segments(prompts.clean), _segments(prompts.corrupted)] if prompts.clean.segments else []:
        seen.append(segments)
    return hashlib.sha256(canonical(seen)).hexdigest()[:16]


def _segments(prompts: Prompts) -> list[Any]:
    return [[asdict(segment) for segment in one] for one in prompts.segments or ()]


def of_code(job: Job, measured: Mapping[str, Any]) -> bool:
    """Whether somebody's code has changed since, or gives the prompts or the metric, which may then depend on anything."""
    gives = any(call is not None and registry.is_code(call.name) for call in (job.task, job.metric))
    return gives or measured["code"] != code_hash(job)
