"""How a job is cut into shards: by prompts, and by cells. A plan is made once, recorded, and never changes.

1. Prompts are put in order of length where a job is cut by prompts, since those of equal length run together.
2. As many prompts go into a shard as keep it near `rows` (cell, prompt) pairs, so that a shard is long enough to be worth its
   own base runs and short enough to lose; and no more than leave room for its results in the budget.
3. Where few prompts have very many cells, the layers (or the readers of edges) are cut too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mechkit.circuits import Graph
from mechkit.experiment.axes import make_axes
from mechkit.experiment.patches import Patches
from mechkit.experiment.positions import position_labels
from mechkit.hooks import HookedModel
from mechkit.metrics import Metric
from mechkit.prompts import PromptPairs, Prompts
from mechkit.result import Label
from mechkit.studies import _registry as registry
from mechkit.studies._job import Job

ROWS_CPU, ROWS_GPU = 4096, 2**18
FEWEST = 4  # prompts that a shard has before its cells are cut: their base runs are shared by all cells


@dataclass(frozen=True)
class Shard:
    """A part of a job: for each dim that is cut, the labels from `start` up to `stop`."""

    number: int
    ranges: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Plan:
    """The shards of a job.

    Attributes:
        order: The prompts, in the order in which they are stored; empty for jobs without prompts.
        labels: All labels of the dims that are cut, and of `"pos"`, which depend on all prompts together.
        size: How many labels of each cut dim a shard has (the last one may have fewer).
        key: A hash of the job's full key, which every shard's record repeats.
    """

    order: tuple[int, ...]
    labels: Mapping[str, tuple[Label, ...]]
    size: Mapping[str, int]
    key: str = ""

    @property
    def shards(self) -> list[Shard]:
        pieces = [
            [(first, min(first + size, len(self.labels[dim]))) for first in range(0, len(self.labels[dim]), size)]
            for dim, size in self.size.items()
        ]
        return [
            Shard(number, dict(zip(self.size, ranges, strict=True)))
            for number, ranges in enumerate(itertools.product(*pieces))
        ]

    @property
    def n_shards(self) -> int:
        return math.prod(math.ceil(len(self.labels[dim]) / size) for dim, size in self.size.items())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stated: Mapping[str, Any]) -> Plan:
        labels = {dim: tuple(labels) for dim, labels in stated["labels"].items()}
        return cls(tuple(stated["order"]), labels, dict(stated["size"]), stated["key"])


def make_plan(
    job: Job,
    model: HookedModel,
    prompts: PromptPairs | Prompts | None,
    metric: Any,
    *,
    budget: int,
    rows: int | None,
) -> Plan:
    """Cuts a job.

    Args:
        job: What is run.
        model, prompts, metric: What it is run with.
        budget: Bytes of working memory.
        rows: About how many (cell, prompt) pairs a shard should have; default 4,096 on a CPU, 262,144 on a GPU.
    """
    row, arguments = registry.technique(job.technique.name), job.technique.arguments
    rows = rows or (ROWS_GPU if model.device.type == "cuda" else ROWS_CPU)
    if prompts is None:
        return Plan((), {}, {})
    clean = prompts.clean if isinstance(prompts, PromptPairs) else prompts
    n = len(clean)
    labels: dict[str, tuple[Label, ...]] = {}
    cells, layers = _cells(job, row, model, prompts)
    size = {"prompt": n}
    if "prompt" in row.split and isinstance(metric, Metric) and _prompts_are_independent(job):
        least = min(n, FEWEST if set(row.split) - {"prompt"} else 1)
        if _uses_means(job):  # every shard takes the means over all prompts anew: at most a fiftieth of its work
            least = min(n, max(least, math.ceil(100 * n / cells)))
        room = max(1, budget // 4 // (8 * cells))
        wanted = max(least, min(rows // cells, room))
        size["prompt"] = math.ceil(n / math.ceil(n / wanted))
    # A job that is not cut by prompts gets them in their own order, as a direct call would.
    by_length = sorted(range(n), key=lambda i: (len(clean.tokens[i]), i))
    order = tuple(by_length if size["prompt"] < n else range(n))
    labels["prompt"] = order
    asked = f"{arguments.get('over', '')} {arguments.get('senders', '')}".split()
    if "pos" in asked and size["prompt"] < n:  # a shard's own prompts may be shorter, and have more tokens in common
        labels["pos"] = _positions(job, prompts)
    for dim, all_labels in layers.items():
        each = size["prompt"] * cells / len(all_labels)
        if len(all_labels) * each > 2 * rows:
            wanted = max(1, int(rows // each))
            labels[dim] = all_labels
            size[dim] = math.ceil(len(all_labels) / math.ceil(len(all_labels) / wanted))
    return Plan(order, labels, size)


def _prompts_are_independent(job: Job) -> bool:
    """Whether a prompt's values are the same whichever other prompts are run with it."""
    arguments = job.technique.arguments
    if arguments.get("mode") == "resample" or arguments.get("per_prompt") is False:
        return False
    indices = arguments.get("positions")  # an index may lie behind the end of all prompts of a shard
    return not (indices and any(isinstance(at, int) for at in indices))


def _uses_means(job: Job) -> bool:
    return job.technique.arguments.get("mode") in ("mean", "position_mean")


def _positions(job: Job, prompts: PromptPairs | Prompts) -> tuple[Label, ...]:
    """As the technique would label all positions of all prompts."""
    labelled = prompts.clean if isinstance(prompts, PromptPairs) else prompts
    if (
        isinstance(prompts, PromptPairs) and "senders" in job.technique.arguments
    ):  # path patching: its base run's tokens
        labelled = prompts.corrupted if job.technique.arguments["direction"] == "denoise" else prompts.clean
    return position_labels(labelled, range(int(labelled.lengths.max())))


def _cells(
    job: Job, row: registry.Technique, model: HookedModel, prompts: PromptPairs | Prompts
) -> tuple[int, dict[str, tuple[Label, ...]]]:
    """How many runs a prompt takes, and the labels of the dim along which they may be cut."""
    arguments = job.technique.arguments
    if row.passes is not None:
        return row.passes, {}
    if arguments.get("cells") is not None:
        return len(arguments["cells"]), {}
    if "layer" in row.split:
        pairs = isinstance(prompts, PromptPairs)
        clean = prompts.clean if isinstance(prompts, PromptPairs) else prompts
        named = prompts.positions if isinstance(prompts, PromptPairs) else {"END": prompts.ends}
        chosen: Any = {name: arguments.get(name) for name in ("layers", "heads", "positions", "neurons")}
        over, group = str(arguments["over"]).split(), int(arguments.get("group", 1))
        together = 1.0  # patches that are one cell
        if "patch" in over:
            patches = Patches.of(clean)
            named, over = patches.named(), ["position" if dim == "patch" else dim for dim in over]
            together = len(patches.labels) / len(patches.grouped(group)[0])
            chosen["positions"] = patches.labels if chosen["positions"] is None else chosen["positions"]
        axes = make_axes(model, clean, named, arguments["site"], " ".join(over), **chosen)
        cells = max(1, int(np.prod(axes.shape) / together))
        return cells, {"layer": axes.coords["layer"]} if "layer" in axes.dims and pairs is not None else {}
    if "reader" in row.split:
        graph = Graph.of(model)
        if arguments.get("edges") is not None:
            return len(arguments["edges"]), {}
        return graph.n_edges, {"reader": tuple(graph.reader_index)}
    return 1, {}


def shard_arguments(job: Job, plan: Plan, shard: Shard, model: HookedModel) -> dict[str, Any]:
    """The technique's arguments for one shard."""
    arguments = dict(job.technique.arguments)
    if "layer" in shard.ranges:
        start, stop = shard.ranges["layer"]
        arguments["layers"] = list(plan.labels["layer"][start:stop])
    if "reader" in shard.ranges:
        start, stop = shard.ranges["reader"]
        wanted = set(plan.labels["reader"][start:stop])
        arguments["edges"] = [edge for edge in Graph.of(model).edges if edge.reader.name in wanted]
    return arguments
