"""A job, and what it is made of: values that say which model, which task, which technique, as plain as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mechkit._version import __version__


@dataclass(frozen=True)
class Call:
    """A function by name, and its arguments as JSON values."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def stated(self) -> dict[str, Any]:
        return {"name": self.name, "arguments": dict(self.arguments)}

    @classmethod
    def of(cls, stated: Mapping[str, Any] | None) -> Call | None:
        return None if stated is None else cls(stated["name"], stated["arguments"])

    def __hash__(self) -> int:
        return hash(canonical(self.stated()))


@dataclass(frozen=True)
class ModelSpec:
    """Which model. How it is put on devices, and whether its own code may run, is no part of what is stated."""

    name: str
    revision: str | None = None
    dtype: str = "float32"
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of a model that is code
    device_map: str | None = None
    trust_remote_code: bool = False

    def stated(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "revision": self.revision,
            "dtype": self.dtype,
            "arguments": dict(self.arguments),
        }

    def __hash__(self) -> int:
        return hash(canonical(self.stated()))


@dataclass(frozen=True)
class Job:
    """One technique on one task on one model.

    Attributes:
        model, task, technique, metric: What is run; no task where the model alone is looked at.
        labels: How model, task and technique are called in tables.
        current: Whether the study as it was stated last has it. A store keeps the jobs of earlier statements.
    """

    model: ModelSpec
    task: Call | None
    technique: Call
    metric: Call | None
    labels: tuple[str, str, str]
    mechkit: str = __version__
    current: bool = True

    def stated(self) -> dict[str, Any]:
        """All that decides the numbers, as far as it is known before the model is loaded."""
        return {
            "model": self.model.stated(),
            "task": None if self.task is None else self.task.stated(),
            "technique": self.technique.stated(),
            "metric": None if self.metric is None else self.metric.stated(),
            "mechkit": self.mechkit,
        }

    @cached_property
    def id(self) -> str:
        return hashlib.sha256(canonical(self.stated())).hexdigest()[:16]

    @classmethod
    def of(cls, stated: Mapping[str, Any], labels: Sequence[str], **how: Any) -> Job:
        """The inverse of `stated`; `how` are a model's device map and the like."""
        technique = Call.of(stated["technique"])
        assert technique is not None
        return cls(
            ModelSpec(**stated["model"], **how),
            Call.of(stated["task"]),
            technique,
            Call.of(stated["metric"]),
            (labels[0], labels[1], labels[2]),
            stated["mechkit"],
        )

    def __str__(self) -> str:
        return " · ".join(label for label in self.labels if label)


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
