"""All results of a study as one labelled table, read when they are asked for."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mechkit._check import checked
from mechkit._files import GUARDED, destination, replacing
from mechkit.circuits import EdgeScores
from mechkit.result import Result
from mechkit.result._columns import Columns, are_whole, label_array
from mechkit.studies._job import Job, canonical
from mechkit.studies._records import Stored
from mechkit.studies._registry import plain
from mechkit.studies._store import DamagedError, Store

if TYPE_CHECKING:
    import pandas
    import pyarrow
    import xarray

ROWS = 2**18  # rows that are written to a file at once
ABOUT = ("model", "revision", "dtype", "task", "technique", "metric", "unit", "base")


class Table:
    """The finished jobs of a study: labels at once, numbers when they are asked for, each checked as it is read.

    As a table (pandas, Parquet, CSV) it has a row for each cell and prompt, and these columns:

    - what the job is: `job`, `model`, `revision`, `dtype`, `task`, `technique`, `metric`, `unit`, `base`;
    - its arguments: those of the task that are numbers, texts or flags (`n`, `seed`), and those of technique and metric in which
      jobs of the same name differ (`mode`), so that `df.groupby("seed")` works. A name that is taken already has `task_`,
      `technique_` or `metric_` before it; an argument that is `None` is missing;
    - a column a dim, as in `Result`;
    - `value`; `effect`, which is the value less that of the unedited run (`base`) on the same prompt (an edge's score is an
      effect; what has no such run has none); a column a baseline.

    Args:
        store: Where they are.
        jobs: Which.
        partial: Take in jobs of which some shards are finished too; the rest of their cells is NaN.

    Attributes:
        jobs: The finished jobs.
        missing: Those that are not (with `partial`: of which nothing is).
    """

    def __init__(self, store: Store, jobs: Sequence[Job], *, partial: bool = False) -> None:
        self.store, self.partial = store, partial
        jobs = _told_apart(jobs)
        there = set(store.files.names("shards"))
        opened = {job.id: Stored.open(store, job) if job.id in there else None for job in jobs}
        self._stored = {key: one for key, one in opened.items() if one is not None and (partial or one.complete)}
        self.jobs = tuple(job for job in jobs if job.id in self._stored)
        self.missing = tuple(job for job in jobs if job.id not in self._stored)

    def __len__(self) -> int:
        return len(self.jobs)

    def __repr__(self) -> str:
        kinds = zip(self._labels(), ("model", "task", "technique"), strict=True)
        counts = ", ".join(counted(len({label for label in labels if label}), what) for labels, what in kinds)
        missing = f"; {len(self.missing)} jobs are not finished" if self.missing else ""
        return f"Table({counted(len(self), 'result')} of {counts}{missing})"

    def _labels(self) -> list[tuple[str, ...]]:
        return [tuple(job.labels[i] for job in self.jobs) for i in range(3)]

    @checked
    def sel(self, **wanted: Any) -> Table:
        """The jobs that fit.

        Args:
            **wanted: `model`, `task`, `technique`: a label or a name, or a list of them; `job`: an id; `metric`, `dtype`, or
                any argument of a task or technique (`seed=0`, `site="z"`): a value.

        Raises:
            ValueError: nothing fits; the message says what there is.
        """
        jobs = list(self.jobs)
        for key, value in wanted.items():
            fitting = [job for job in jobs if fits(job, key, value)]
            if not fitting:
                there = sorted({str(fact) for job in jobs for fact in facts(job).get(key, ())})
                if not jobs:
                    raise ValueError(f"{key}: expected finished jobs to choose among, there are none yet")
                keys = "a key among " + ", ".join(sorted({known for job in jobs for known in facts(job)}))
                raise ValueError(f"{key}: expected {'one of ' + ', '.join(there) if there else keys}, got {value!r}")
            jobs = fitting
        chosen = object.__new__(Table)
        chosen.store, chosen.partial, chosen.jobs, chosen.missing = self.store, self.partial, tuple(jobs), ()
        chosen._stored = {job.id: self._stored[job.id] for job in jobs}
        return chosen

    @checked
    def result(self, **wanted: Any) -> Result | EdgeScores:
        """The result of the one job that fits: what the technique would have returned.

        Args:
            **wanted: As for `sel`.

        Raises:
            ValueError: none fits, or several do; or what is in the store is not what was written (run the study again: it
                computes such shards anew).
        """
        chosen = self.sel(**wanted)
        if len(chosen) != 1:
            names = ", ".join(str(job) for job in chosen.jobs[:5])
            raise ValueError(
                f"expected what fits one job, got {len(chosen)} of them: {names}{', ...' if len(chosen) > 5 else ''}"
            )
        return self._read(chosen._stored[chosen.jobs[0].id], Stored.load)

    def results(self) -> Iterator[tuple[Job, Result | EdgeScores]]:
        """Every job and its result, read one at a time."""
        for job in self.jobs:
            yield job, self._read(self._stored[job.id], Stored.load)

    def _read(self, stored: Stored, read: Callable[[Stored], Any]) -> Any:
        try:
            return read(stored)
        except DamagedError as error:
            raise ValueError(
                f"store {self.store.url}: {error}. Run the study again: it computes such shards anew"
            ) from error

    # -- as other libraries have it ------------------------------------------------------------------------------------

    def to_dataframe(self) -> pandas.DataFrame:
        """Tidy long form, one row per cell and prompt, with the columns that the class lists. A dim or an argument that a job
        does not have is missing there."""
        return self._arrow().to_pandas(types_mapper=_nullable)

    @checked
    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """The same table as a Parquet file, job by job, so that it need not fit into memory. DuckDB, polars and pandas read
        it."""
        import pyarrow.parquet as parquet

        path = destination(path)
        with (
            replacing(path) as partial,
            parquet.ParquetWriter(str(partial), self._schema, compression="zstd") as writer,
        ):
            for part in self._batches():
                writer.write_table(part)
        return path

    @checked
    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """The same table as CSV. A text cell that a spreadsheet would run as a formula (`=`, `+`, `-`, `@`, tab or return at its
        beginning) has a `'` before it, as spreadsheets have it; `mechkit.plot.read_table` takes it away."""
        import pyarrow.csv as csv

        path = destination(path)
        with replacing(path) as partial, csv.CSVWriter(str(partial), self._text_schema) as writer:
            for part in self._batches():
                writer.write_table(_guarded(part.cast(self._text_schema)))
        return path

    def to_xarray(self) -> xarray.DataTree:
        """A tree with a dataset for every job, `/model/task/technique`: `values` with its coords, and `baseline_*`. Numbers
        are read, and checked, when they are used."""
        import xarray as xr

        return xr.DataTree.from_dict({path: _dataset(self._stored[job.id]) for path, job in _nodes(self.jobs).items()})

    @property
    def _dims(self) -> dict[str, bool]:
        """Every dim of any job, and whether all of its labels are whole numbers."""
        dims: dict[str, bool] = {}
        for stored in self._stored.values():
            for dim in stored.layout.dims:
                dims[dim] = dims.get(dim, True) and are_whole(stored.layout.labels[dim])
        return {
            **{dim: whole for dim, whole in dims.items() if dim != "prompt"},
            **{d: w for d, w in dims.items() if d == "prompt"},
        }

    @cached_property
    def _arguments(self) -> dict[str, dict[str, Any]]:
        """The columns of arguments: each job's value, by its id."""
        taken = {"job", *ABOUT, *self._dims, "value", "effect", *(f"baseline_{name}" for name in self._baselines)}
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for kind in ("task", "technique", "metric"):
            for name, values in _differing(self.jobs, kind).items():
                found[kind, name] = values
        counts, columns = Counter(name for _, name in found), {}
        for (kind, name), values in found.items():
            column = name if counts[name] == 1 and name not in taken else f"{kind}_{name}"
            while column in taken:
                column += "_"
            taken.add(column)
            columns[column] = values
        return columns

    @property
    def _baselines(self) -> list[str]:
        return sorted({name for stored in self._stored.values() for name in stored.layout.baselines})

    @property
    def _schema(self) -> pyarrow.Schema:
        import pyarrow as pa

        names = pa.dictionary(pa.int32(), pa.string())
        wide = any(stored.layout.dtype == "float64" for stored in self._stored.values())
        number = pa.float64() if wide else pa.float32()
        columns = [("job", names), *((name, names) for name in ABOUT)]
        columns += [(name, _type_of(values.values())) for name, values in self._arguments.items()]
        columns += [
            (f"dim_{dim}" if dim in ABOUT else dim, pa.int64() if whole else names) for dim, whole in self._dims.items()
        ]
        columns += [("value", number), ("effect", number), *((f"baseline_{name}", number) for name in self._baselines)]
        return pa.schema(columns)

    @property
    def _text_schema(self) -> pyarrow.Schema:
        import pyarrow as pa

        return pa.schema([(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type) for f in self._schema])

    def _arrow(self) -> pyarrow.Table:
        return _joined(list(self._parts())) if self.jobs else self._schema.empty_table()

    def _batches(self) -> Iterator[pyarrow.Table]:
        """Rows of several jobs, since a file of many small pieces is slow to write and to read."""
        batch: list[pyarrow.Table] = []
        rows = 0
        for part in self._parts():
            batch.append(part)
            rows += len(part)
            if rows >= ROWS:
                yield _joined(batch)
                batch, rows = [], 0
        if batch:
            yield _joined(batch)

    def _parts(self) -> Iterator[pyarrow.Table]:
        schema, dims, baselines, arguments = self._schema, self._dims, self._baselines, self._arguments
        for job in self.jobs:
            given = {name: values.get(job.id) for name, values in arguments.items()}
            yield self._read(
                self._stored[job.id], partial(_rows, schema=schema, arguments=given, dims=dims, baselines=baselines)
            )


def _guarded(table: pyarrow.Table) -> pyarrow.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    for i, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            column = pc.replace_substring_regex(table.column(i), pattern=GUARDED, replacement=r"'\1")
            table = table.set_column(i, field, column)
    return table


def _joined(parts: list[pyarrow.Table]) -> pyarrow.Table:
    import pyarrow as pa

    return pa.concat_tables(parts).unify_dictionaries().combine_chunks()


def _told_apart(jobs: Sequence[Job]) -> list[Job]:
    """Several statements over one store may call two jobs the same: these get their ids as well."""
    counts = Counter(job.labels for job in jobs)
    return [
        job if counts[job.labels] == 1 else replace(job, labels=(*job.labels[:2], f"{job.labels[2]} {job.id[:6]}"))
        for job in jobs
    ]


def counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def facts(job: Job) -> dict[str, tuple[Any, ...]]:
    """What can be selected by: each key's values."""
    model, task, technique = job.labels
    found: dict[str, tuple[Any, ...]] = {
        "job": (job.id,),
        "model": (model, job.model.name),
        "task": (task, *([job.task.name] if job.task else [])),
        "technique": (technique, job.technique.name),
        "metric": (job.metric.name,) if job.metric else (),
        "dtype": (job.model.dtype,),
        "revision": (job.model.revision,),
    }
    calls = {"technique": job.technique, "task": job.task, "metric": job.metric}
    for what, call in calls.items():
        for name, value in call.arguments.items() if call else ():
            found[f"{what}.{name}"] = (value,)
            if what != "metric" and name not in ("model", "task", "technique", "metric", "job", "dtype", "revision"):
                found[name] = (value,)  # a task's, where both have one: `seed` is what the prompts are drawn with
    return found


def fits(job: Job, key: str, value: Any) -> bool:
    """Whether a job is among those that `key=value` selects."""
    value, there = plain(value), facts(job).get(key, ())
    return value in there or (isinstance(value, list) and any(option in there for option in value))


def _differing(jobs: Sequence[Job], kind: str) -> dict[str, dict[str, Any]]:
    """The arguments of a kind of call (`"task"`, …), by job: a task's that are numbers, texts or flags, and those of others in
    which calls of the same function differ."""
    calls = {job.id: call for job in jobs if (call := getattr(job, kind)) is not None}
    values: dict[str, dict[str, Any]] = {}
    for job, call in calls.items():
        for name, value in call.arguments.items():
            values.setdefault(name, {})[job] = value
    kept = {}
    for name, of in values.items():
        by_function: dict[str, set[bytes]] = {}
        for job, value in of.items():
            by_function.setdefault(calls[job].name, set()).add(canonical(value))
        plain_value = any(isinstance(value, str | int | float) for value in of.values())
        if any(len(several) > 1 for several in by_function.values()) or (kind == "task" and plain_value):
            kept[name] = of
    return kept


def _type_of(values: Iterable[Any]) -> pyarrow.DataType:
    """The type of a column of arguments: whole numbers, numbers, flags, or text where they are mixed."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    return pa.float64() if kinds <= {int, float} else pa.dictionary(pa.int32(), pa.string())


def _argument(value: Any, n: int, kind: pyarrow.DataType) -> Any:
    import pyarrow as pa

    if value is None:
        return pa.nulls(n, kind)
    text = value if isinstance(value, str) else json.dumps(value)
    return _constant(text, n) if pa.types.is_dictionary(kind) else pa.repeat(pa.scalar(value, kind), n)


def _rows(
    stored: Stored,
    schema: pyarrow.Schema,
    arguments: Mapping[str, Any],
    dims: Mapping[str, bool],
    baselines: Sequence[str],
) -> pyarrow.Table:
    """One job's rows."""
    import pyarrow as pa

    job, layout = stored.job, stored.layout
    values = stored.array("values")
    runs = {name: (of, stored.array(f"baseline_{name}")) for name, of in layout.baselines.items()}
    cells = Columns(layout.dims, stored.labels, values, runs)
    n = len(cells)
    about = [
        job.labels[0],
        job.model.revision,
        job.model.dtype,
        job.labels[1] or None,
        job.labels[2],
        layout.metric,
        layout.unit,
    ]
    columns = [_constant(text, n) for text in (job.id, *about, layout.base or None)]
    columns += [_argument(value, n, schema.field(name).type) for name, value in arguments.items()]
    for dim, whole in dims.items():
        if dim not in cells.dims:
            columns.append(pa.nulls(n, pa.int64() if whole else pa.dictionary(pa.int32(), pa.string())))
        elif whole:
            columns.append(pa.array(cells.label(dim)))
        else:
            names = pa.array([str(label) for label in cells.labels[dim]], pa.string())
            columns.append(pa.DictionaryArray.from_arrays(pa.array(cells.index(dim)), names))
    columns.append(pa.array(cells.value()).cast(schema.field("value").type))
    effect = cells.value() if layout.kind == "edge_scores" else np.full(n, np.nan)
    effect = cells.value() - cells.baseline(layout.base) if layout.base in runs else effect
    columns.append(pa.array(effect).cast(schema.field("effect").type))
    for name in baselines:
        kind = schema.field(f"baseline_{name}").type
        columns.append(pa.array(cells.baseline(name)).cast(kind) if name in runs else pa.nulls(n, kind))
    return pa.Table.from_arrays(columns, schema=schema)


def _constant(text: str | None, n: int) -> Any:
    import pyarrow as pa

    if text is None:
        return pa.nulls(n, pa.dictionary(pa.int32(), pa.string()))
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, dtype=np.int32)), pa.array([text], pa.string()))


def _nullable(kind: Any) -> Any:
    """Whole numbers of a dim that some jobs lack stay whole numbers."""
    import pandas as pd
    import pyarrow as pa

    return pd.Int64Dtype() if pa.types.is_int64(kind) else None


# -- xarray ------------------------------------------------------------------------------------------------------------


def _nodes(jobs: Sequence[Job]) -> dict[str, Job]:
    """Each job's place in a tree of three levels."""
    nodes: dict[str, Job] = {}
    for job in jobs:
        model, task, technique = (label.replace("/", "∕") for label in job.labels)
        path = f"/{model}/{task or 'no task'}/{technique}"
        nodes[path if path not in nodes else f"{path} {job.id}"] = job
    return nodes


def _dataset(stored: Stored) -> xarray.Dataset:
    import xarray as xr

    layout, labels = stored.layout, stored.labels
    coords: dict[str, Any] = {dim: label_array(labels[dim]) for dim in layout.dims}
    arrays = {array: (layout.array_dims(array), _lazy(stored, array)) for array in layout.arrays}
    attributes = {"job": stored.job.id, "metric": layout.metric, "unit": layout.unit, "base": layout.base}
    return xr.Dataset(arrays, coords=coords, attrs={**attributes, "key": json.dumps(stored.job.stated())})


def _lazy(stored: Stored, array: str) -> Any:
    """The array as xarray reads it lazily: whole, and checked, the first time that a number of it is used."""
    from xarray.backends import BackendArray
    from xarray.core import indexing

    class Checked(BackendArray):
        shape = stored.layout.shape(array)
        dtype = np.dtype(stored.layout.dtype)

        def __getitem__(self, key: Any) -> Any:
            return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._get)

        def _get(self, key: Any) -> np.ndarray:
            try:
                return np.asarray(stored.array(array)[key])
            except DamagedError as error:
                raise ValueError(f"store {stored.store.url}: {error}. Run the study again") from error

    return indexing.LazilyIndexedArray(Checked())
