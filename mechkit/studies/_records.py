"""A shard's result into the store, and a job's result out of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from mechkit.circuits import EdgeScores, Graph
from mechkit.result import Cost, Label, Result
from mechkit.studies._job import Job
from mechkit.studies._shards import Plan, Shard
from mechkit.studies._store import DamagedError, Layout, Store, chunk_name, sha256

# Of one shard's prompts alone: the job's are the record's.
OF_A_SHARD = ("n_prompts", "tokens_hash", "corrupted_hash", "budget", "prompts")


# -- in ----------------------------------------------------------------------------------------------------------------


def save(
    store: Store, job: Job, plan: Plan, shard: Shard, found: Result | EdgeScores, facts: Mapping[str, Any]
) -> None:
    """Writes what a shard found: its chunks, and then the record that makes it finished.

    Raises:
        ValueError: it does not fit what the job's other shards found.
        StoreError: it cannot be written.
    """
    result = found.result if isinstance(found, EdgeScores) else found
    baselines = dict(found.baseline)
    layout = _layout(plan, found, result, baselines)
    _agree(store, job, layout)
    store.prepare(job.id, layout, attributes(job, layout))
    files = {}
    for array in layout.arrays:
        dims = layout.array_dims(array)
        if any(start for dim, (start, _) in shard.ranges.items() if dim not in dims):
            continue  # another shard writes it
        numbers = (result.values if array == "values" else baselines[array.removeprefix("baseline_")]).numpy(force=True)
        at, block = _block(layout, dims, plan, shard, numbers)
        name, sha = store.write_chunk(job.id, array, layout, at, block)
        files[name] = sha
    store.put(
        f"shards/{job.id}/{shard.number}.json",
        {
            "job": job.id,
            "shard": shard.number,
            "key": plan.key,
            "files": files,
            "labels": store.label_files(job.id, layout),
            "provenance": dict(result.provenance),
            "cost": asdict(result.cost) if result.cost else None,
            **facts,
        },
    )
    store.remove(f"failed/{job.id}/{shard.number}.json")


def _layout(plan: Plan, found: Result | EdgeScores, result: Result, baselines: Mapping[str, torch.Tensor]) -> Layout:
    """Of the whole job, from one shard's result and the plan."""
    labels = {dim: plan.labels.get(dim, labels) for dim, labels in result.coords.items()}
    if "prompt" in labels and not _cut_by_prompts(plan):
        labels["prompt"] = result.coords["prompt"]  # a technique may hold some prompts out, or bring its own
    chunks = {dim: plan.size.get(dim, len(labels)) for dim, labels in labels.items()}
    if "prompt" in labels and not _cut_by_prompts(plan):
        chunks["prompt"] = max(1, len(labels["prompt"]))
    dims: dict[str, tuple[str, ...]] = {}
    for name, baseline in baselines.items():
        # of edge scores each baseline is [prompt], also where scores are means over prompts
        dims[name] = ("prompt",) if isinstance(found, EdgeScores) else result._baseline_dims(baseline)
    if isinstance(found, EdgeScores) and "prompt" not in labels:
        labels["prompt"], chunks["prompt"] = plan.order, len(plan.order)
    cut = [dim for dim, size in plan.size.items() if size < len(plan.labels[dim])]
    if "prompt" in cut and (gone := [name for name in dims if "prompt" not in dims[name]]):
        raise ValueError(f"baseline {gone[0]!r}: expected one number a prompt of a job that is cut by prompts")
    if missing := [dim for dim in cut if dim not in result.dims]:
        raise ValueError(f"dims: the job is cut along {missing[0]!r}, but its result has dims {result.dims}")
    return Layout(
        dims=result.dims,
        labels=labels,
        chunks=chunks,
        dtype=str(result.values.dtype).removeprefix("torch."),
        baselines=dims,
        base=result.base,
        metric=result.metric,
        unit=result.unit,
        kind="edge_scores" if isinstance(found, EdgeScores) else "result",
        graph=asdict(found.graph) if isinstance(found, EdgeScores) else None,
    )


def _cut_by_prompts(plan: Plan) -> bool:
    return plan.size.get("prompt", 0) < len(plan.order)


def _agree(store: Store, job: Job, layout: Layout) -> None:
    """Records the layout, or checks it against the one that another shard recorded."""
    name = f"layout/{job.id}.json"
    stated = {"job": job.id, "layout": layout.to_json()}
    try:
        there = store.get(name)
    except DamagedError as error:
        store.set_aside(name, str(error))
        there = None
    if there is None:
        store.put(name, stated)
        return
    other = Layout.from_json(there["layout"])
    if other != layout:
        differ = [key for key, value in vars(layout).items() if getattr(other, key) != value]
        raise ValueError(
            f"{', '.join(differ)}: expected what the job's other shards have, got another; the technique's result must "
            "not depend on which prompts and cells it is given"
        )


def attributes(job: Job, layout: Layout) -> dict[str, Any]:
    """For readers without mechkit: what this is."""
    model, task, technique = job.labels
    about = {"model": model, "task": task, "technique": technique, "metric": layout.metric, "unit": layout.unit}
    return {**about, "base": layout.base, "key": job.stated()}


def _block(
    layout: Layout, dims: tuple[str, ...], plan: Plan, shard: Shard, numbers: np.ndarray
) -> tuple[tuple[int, ...], np.ndarray]:
    """Which chunk of an array, and all that goes into it. Behind a shorter `pos` axis, NaN."""
    at, sizes = [], []
    for dim in dims:
        start, stop = shard.ranges.get(dim, (0, len(layout.labels[dim])))
        if dim == "prompt" and not _cut_by_prompts(plan):
            start, stop = 0, len(layout.labels[dim])
        at.append(start // layout.chunks[dim])
        sizes.append(stop - start)
    if "reader" in shard.ranges and "reader" in dims:  # scores of all readers come back, and only these were computed
        start, stop = shard.ranges["reader"]
        numbers = np.take(numbers, range(start, stop), axis=dims.index("reader"))
    for dim, size, got in zip(dims, sizes, numbers.shape, strict=True):
        if got != size and not (dim == "pos" and got < size):
            raise ValueError(f"{dim}: expected {size} labels in this shard, got {got}")
    block = np.full(sizes, np.nan, dtype=layout.dtype)
    block[tuple(slice(0, n) for n in numbers.shape)] = numbers
    return tuple(at), block


# -- what is there -----------------------------------------------------------------------------------------------------


def finished(store: Store, job: Job, plan: Plan, *, mend: bool = True) -> set[int]:
    """The shards whose chunks are all there, and as they were written. Damaged ones are set aside (`mend`), to be run again."""
    layout = layout_of(store, job.id, mend=mend)
    done: dict[int, dict[str, Any]] = {}
    for name in shard_names(store, job.id):
        path = f"shards/{job.id}/{name}"
        try:
            record = shard_record(store, job.id, path, plan)
            if layout is None:
                raise DamagedError(f"layout/{job.id}.json, the labels of its values, is lost")
            for file, sha in record["files"].items():
                _check_chunk(store, file, sha, layout, mend)
        except DamagedError as error:
            if mend:
                store.set_aside(path, f"{job}, shard {name.removesuffix('.json')} is computed again: {error}")
        else:
            done[record["shard"]] = record
    if mend and layout is not None:
        _mend_arrays(store, job, layout, next(iter(done.values()))["labels"] if done else None)
    return set(done)


def shard_names(store: Store, job: str) -> list[str]:
    """The files of its shards' records; what else lies there (a file manager's notes) is let lie."""
    return [name for name in store.files.names(f"shards/{job}") if name.removesuffix(".json").isdigit()]


def _check_chunk(store: Store, file: str, sha: str, layout: Layout, mend: bool) -> None:
    try:
        store.read_chunk(file, sha, layout, file.split("/")[2])
    except DamagedError as error:
        if mend and store.files.exists(file):
            store.set_aside(file, str(error))
        raise


def shard_record(store: Store, job: str, path: str, plan: Plan) -> dict[str, Any]:
    """A finished shard's record.

    Raises:
        DamagedError: it is torn, or another shard's.
    """
    record = store.get(path)
    if record is None:
        raise DamagedError(f"{path} is missing")
    mine = f"data/{job}/"
    number = record["shard"]
    if record["job"] != job or path != f"shards/{job}/{number}.json" or not 0 <= number < plan.n_shards:
        raise DamagedError(f"{path} is another shard's")
    if record["key"] != plan.key:
        raise DamagedError(f"{path} was computed with another key (other weights, prompts, or code)")
    if not all(file.startswith(mine) and ".." not in file for file in record["files"]):
        raise DamagedError(f"{path} names files of another job")
    return record


def layout_of(store: Store, job: str, *, mend: bool = False) -> Layout | None:
    """A job's layout; `None` before its first shard."""
    name = f"layout/{job}.json"
    try:
        stated = store.get(name)
        if stated is not None and stated["job"] != job:
            raise DamagedError(f"{name} is another job's")
    except DamagedError as error:
        if mend:
            store.set_aside(name, str(error))
        return None
    return None if stated is None else Layout.from_json(stated["layout"])


def _mend_arrays(store: Store, job: Job, layout: Layout, labels: Mapping[str, str] | None) -> None:
    """What tells zarr what the chunks mean is set aside if it is wrong, and written again. `labels` are the checksums of the
    axes' labels; `None` before the first finished shard, when a run may have been killed before all this was written."""
    paths = {"data/zarr.json": "", f"data/{job.id}/zarr.json": ""}
    paths |= {f"data/{job.id}/{name}/zarr.json": name for name in (*layout.arrays, *layout.dims)}
    for path, name in paths.items():
        data = store.files.read(path)
        if data is None and labels is not None:
            store.say(f"{path} was missing; written again")
        elif data is not None and not _describes(data, name, layout):
            store.set_aside(path, f"{path} is not what describes this array; written again")
    if labels is None:  # nothing says what they should be
        for dim in layout.dims:
            store.files.remove(chunk_name(job.id, dim, (0,)))
    for file, sha in (labels or {}).items():
        data = store.files.read(file)
        if data is None:
            store.say(f"{file} was missing; written again")
        elif sha256(data) != sha:
            store.set_aside(file, f"{file}, labels of an axis, is torn or changed; written again")
    store.prepare(job.id, layout, attributes(job, layout))


def _describes(data: bytes, name: str, layout: Layout) -> bool:
    """Whether a zarr.json is that of the group (no name), of the array or of the coordinates called so."""
    try:
        found = json.loads(data)
        if not name:
            return bool(found["node_type"] == "group")
        n = len(layout.labels.get(name, ()))
        shape: tuple[int, ...] = (n,)
        chunk: tuple[int, ...] = (max(1, n),)
        if name in layout.arrays:
            shape, chunk = layout.shape(name), layout.chunk(name)
            if found["data_type"] != layout.dtype:
                return False
        dims = layout.array_dims(name) if name in layout.arrays else (name,)
        plain: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
        text = found["data_type"] == "string" and name not in layout.arrays
        return bool(
            found["shape"] == list(shape)
            and found["chunk_grid"]["configuration"]["chunk_shape"] == list(chunk)
            and found["codecs"] == [{"name": "vlen-utf8", "configuration": {}} if text else plain, {"name": "crc32c"}]
            and (found.get("dimension_names") or []) == list(dims)  # of a single number, none
        )
    except (ValueError, KeyError, TypeError, IndexError):
        return False


# -- out ---------------------------------------------------------------------------------------------------------------


class Stored:
    """A job as it lies in the store, opened but not read.

    Attributes:
        job, plan, layout: What it is.
        shards: The records of its finished shards, by number.
    """

    def __init__(
        self, store: Store, job: Job, plan: Plan, layout: Layout, shards: Mapping[int, Mapping[str, Any]]
    ) -> None:
        self.store, self.job, self.plan, self.layout, self.shards = store, job, plan, layout, shards

    @classmethod
    def open(cls, store: Store, job: Job) -> Stored | None:
        """`None` if nothing of the job is finished."""
        record, layout = store.good(f"jobs/{job.id}.json"), layout_of(store, job.id)
        if record is None or record["job"] != job.id or layout is None:
            return None
        plan = Plan.from_json(record["plan"])
        shards = {}
        for name in shard_names(store, job.id):
            try:
                found = shard_record(store, job.id, f"shards/{job.id}/{name}", plan)
            except DamagedError:
                continue  # the next run says so and computes it again
            shards[found["shard"]] = found
        return cls(store, job, plan, layout, shards) if shards else None

    @property
    def complete(self) -> bool:
        return len(self.shards) == self.plan.n_shards

    def array(self, array: str) -> np.ndarray:
        """One array whole, each chunk checked; NaN where a shard is not finished. Prompts are in their own order again.

        Raises:
            DamagedError: a chunk is not what was written.
        """
        layout, dims = self.layout, self.layout.array_dims(array)
        whole = np.full(layout.shape(array), np.nan, dtype=layout.dtype)
        for record in self.shards.values():
            for file, sha in record["files"].items():
                parts = file.split("/")
                if parts[2] != array:
                    continue
                chunk = self.store.read_chunk(file, sha, layout, array)
                corner = [int(i) * size for i, size in zip(parts[4:], layout.chunk(array), strict=True)]
                region = tuple(slice(c, c + s) for c, s in zip(corner, chunk.shape, strict=True))
                fits = tuple(slice(0, n) for n in whole[region].shape)
                whole[region] = chunk[fits]
        if "prompt" in dims and _cut_by_prompts(self.plan):
            whole = np.take(whole, np.argsort(self.plan.order), axis=dims.index("prompt"))
        if array == "values" and "prompt" in dims and not self.complete:
            for name, of in layout.baselines.items():  # a cell whose prompt has no baseline yet is not finished either
                if of == ("prompt",):
                    gone = np.isnan(self.array(f"baseline_{name}"))
                    whole[(slice(None),) * dims.index("prompt") + (gone,)] = np.nan
        return whole

    @property
    def labels(self) -> dict[str, tuple[Label, ...]]:
        """Of each dim of the values, prompts in their own order."""
        labels = {dim: self.layout.labels[dim] for dim in self.layout.dims}
        if "prompt" in labels and _cut_by_prompts(self.plan):
            labels["prompt"] = tuple(sorted(self.plan.order))
        return labels

    def load(self) -> Result | EdgeScores:
        """The job's result, as the technique would have returned it."""
        layout = self.layout
        baseline = {name: torch.from_numpy(self.array(f"baseline_{name}")) for name in layout.baselines}
        edges = layout.kind == "edge_scores"
        result = Result(
            values=torch.from_numpy(self.array("values")),
            dims=layout.dims,
            coords=self.labels,
            baseline={} if edges else baseline,
            base="" if edges else layout.base,
            metric=layout.metric,
            unit=layout.unit,
            provenance=self.provenance(),
            cost=self.cost(),
        )
        return EdgeScores(Graph(**dict(layout.graph or {})), result, baseline) if edges else result

    def provenance(self) -> dict[str, Any]:
        """What all shards say; lists where they differ; the largest of numbers that are called errors."""
        records = [self.shards[number]["provenance"] for number in sorted(self.shards)]
        merged: dict[str, Any] = {}
        for key in dict.fromkeys(itertools.chain.from_iterable(records)):
            values = [record[key] for record in records if key in record]
            distinct = [value for i, value in enumerate(values) if value not in values[:i]]
            if len(distinct) == 1:
                merged[key] = distinct[0]
            elif key not in OF_A_SHARD:
                numbers = all(isinstance(value, float) for value in distinct)
                merged[key] = max(distinct) if numbers and key.endswith("error") else distinct
        record = self.store.good(f"jobs/{self.job.id}.json") or {}
        measured = record.get("measured", {})
        return {
            **merged,
            "n_prompts": measured.get("n_prompts"),
            "prompts_hash": measured.get("prompts"),
            "study": {
                "job": self.job.id,
                "shards": self.plan.n_shards,
                "finished": len(self.shards),
                **self.job.stated(),
            },
        }

    def cost(self) -> Cost | None:
        costs = [record["cost"] for record in self.shards.values() if record["cost"]]
        if not costs:
            return None
        counts = ("block_tokens", "naive_block_tokens", "proof_block_tokens")
        return Cost(*(sum(c.get(of, 0) for c in costs) for of in counts))


def errors(store: Store, job: str, shards: Collection[int]) -> list[dict[str, Any]]:
    """Recorded failures of a job that are not in `shards`, the finished ones."""
    found = []
    for name in store.files.names(f"failed/{job}"):
        record = store.good(f"failed/{job}/{name}")
        if record is not None and record["shard"] not in shards:
            found.append(record)
    return found
