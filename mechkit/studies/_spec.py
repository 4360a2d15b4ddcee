"""A study as its author states it, checked before anything runs, and the jobs that it comes to.

1. The statement (TOML, or the same tables in Python) is a list of models, a list of tasks and a list of techniques.
2. `grid.KEY = [...]` in an entry makes one entry for each value of KEY.
3. Each technique meets each task (that it is for) on each model: a job. Every job has an id: a hash of all that is stated, and of
   mechkit's version.
4. All problems are collected and reported together, each with its key, and its line in the file.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mechkit._bytes import as_bytes
from mechkit._files import read_text
from mechkit.experiment.axes import check_dims
from mechkit.hooks import get_site
from mechkit.studies import _registry as registry
from mechkit.studies._job import Call, Job, ModelSpec, canonical
from mechkit.studies._problems import Key, Problems, line_of

MAX_JOBS = 100_000  # jobs of one study, at most: ten times what was tried
_FILE = 2**22  # bytes of a study file, at most


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    name: str
    label: str | None = None

    @property
    def more(self) -> dict[str, Any]:
        """The arguments: whatever is not a key of ours."""
        return dict(self.model_extra or {})


class _ModelEntry(_Entry):
    revision: str | None = None
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    device_map: str | None = None
    trust_remote_code: bool = False


class _TaskEntry(_Entry):
    pass


class _TechniqueEntry(_Entry):
    metric: str | dict[str, Any] | None = None
    tasks: list[str] | None = None
    models: list[str] | None = None


class _Settings(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str = "study"
    store: str = Field(min_length=1)
    budget: int | str | None = None
    shard: int | None = Field(default=None, ge=1)
    retries: int = Field(default=2, ge=0)


@dataclass(frozen=True)
class Statement:
    """A checked study: its settings and its jobs."""

    name: str
    store: str
    budget: int | None
    shard: int | None
    retries: int
    jobs: tuple[Job, ...]


# -- reading and checking ----------------------------------------------------------------------------------------------


def read_toml(path: Path, *, allow_code: bool) -> Statement:
    """A study from a TOML file. Paths in it (`store`, models that begin with `.`) are relative to the file.

    Raises:
        ValueError: everything that is wrong with it, with lines.
    """
    text = read_text(path, "a study file in TOML", limit=_FILE, encoding="utf-8-sig").replace("\r\n", "\n")
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        why = "its values are nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path}: expected TOML; nothing was run\n  {why}") from error
    singular = {"model": "models", "task": "tasks", "technique": "techniques"}
    for wrong in set(singular.values()) & set(tables):
        name = next(one for one, many in singular.items() if many == wrong)
        raise ValueError(f"{path}: expected [[{name}]] tables, got {wrong!r} (line {line_of(text, (wrong,))})")
    parts = {name: tables.pop(name, []) for name in singular}
    return check(
        tables, parts, Problems(str(path), text, allow_code=allow_code), folder=path.resolve().parent, stem=path.stem
    )


def check(
    settings: Mapping[str, Any],
    parts: Mapping[str, Any],
    problems: Problems,
    *,
    folder: Path | None = None,
    stem: str | None = None,
) -> Statement:
    """WorkerSettings and entries as a study. `folder` is what relative paths are relative to.

    Raises:
        ValueError: everything that is wrong.
    """
    given = {"store": f"{stem}.study", "name": stem, **settings} if stem else dict(settings)
    _count(parts, problems)
    checked = _validated(_Settings, given, (), problems)
    budget = _bytes(given.get("budget"), problems)
    models = _short(
        [_model(entry, key, problems, folder) for key, entry in _entries(_ModelEntry, "model", parts, problems)]
    )
    tasks = [_task(entry, key, problems) for key, entry in _entries(_TaskEntry, "task", parts, problems)]
    techniques = [
        (key, entry, *_technique(entry, key, problems))
        for key, entry in _entries(_TechniqueEntry, "technique", parts, problems)
    ]
    for what, named in (("model", models), ("technique", techniques)):
        if not named and not problems.found:
            problems.add((what,), f"expected at least one [[{what}]], got none")
    problems.raise_any()
    assert checked is not None
    jobs = _jobs(models, tasks, techniques, problems)
    problems.raise_any()
    store = checked.store
    if "\0" in store:
        problems.add(("store",), f"expected a folder or an object store's URL, got {_shown(store)}")
        problems.raise_any()
    if folder is not None and "://" not in store:
        store = os.path.realpath(folder / Path(store).expanduser())
    return Statement(checked.name, store, budget, checked.shard, checked.retries, tuple(jobs))


def _count(parts: Mapping[str, Any], problems: Problems) -> None:
    """Counts what the grids come to, before any is expanded."""
    counts = {}
    for what, entries in parts.items():
        listed = entries if isinstance(entries, Sequence) and not isinstance(entries, str) else []
        grids = [
            entry["grid"] for entry in listed if isinstance(entry, Mapping) and isinstance(entry.get("grid"), Mapping)
        ]
        sizes = [
            math.prod(len(values) for values in grid.values() if isinstance(values, Sequence | Set | range))
            for grid in grids
        ]
        counts[what] = len(listed) - len(grids) + sum(sizes)
    if (jobs := math.prod(max(1, count) for count in counts.values())) > MAX_JOBS:
        most = max(counts, key=lambda what: counts[what])
        problems.add(
            (most,),
            f"expected at most {MAX_JOBS:,} jobs, got {' × '.join(f'{n:,} {what}s' for what, n in counts.items())} = {jobs:,}; "
            "state fewer, or several studies",
        )
        problems.raise_any()


def _validated(kind: Any, value: Any, key: Key, problems: Problems) -> Any:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        for one in error.errors():
            # A union's branches each say what they wanted; the path to the value is the part that is in it.
            place = key + tuple(part for part in one["loc"] if not _is_branch(part, value))[:1]
            got = "" if one["type"] == "missing" else f", got {_shown(one['input'])}"
            message = {"extra_forbidden": "unknown key", "missing": "expected a value, there is none"}.get(one["type"])
            problems.add(place, f"{message or one['msg'][0].lower() + one['msg'][1:]}{got}")
        return None


def _is_branch(part: Any, value: Any) -> bool:
    return isinstance(part, str) and isinstance(value, Mapping) and part not in value and part in ("str", "int", "dict")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _bytes(budget: Any, problems: Problems) -> int | None:
    """`"512 MiB"` in bytes."""
    if budget is None:
        return None
    try:
        return as_bytes(budget)
    except ValueError as error:
        problems.add(("budget",), str(error))
        return None


def _entries(kind: type[_Entry], what: str, parts: Mapping[str, Any], problems: Problems) -> Iterator[tuple[Key, Any]]:
    """The entries of one list, one for each combination of its grid."""
    entries = parts.get(what, [])
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        problems.add((what,), f"expected a list of tables, [[{what}]], got {_shown(entries)}")
        return
    for i, entry in enumerate(entries):
        key: Key = (what, i)
        if isinstance(entry, str):
            entry = {"name": entry}
        if not isinstance(entry, Mapping):
            problems.add(key, f"expected a table, got {_shown(entry)}")
            continue
        entry = {name: registry.plain(value) for name, value in entry.items()}
        grid = entry.pop("grid", {})
        if not isinstance(grid, Mapping) or not all(isinstance(values, list) and values for values in grid.values()):
            problems.add((*key, "grid"), f"expected lists, such as grid.seed = [0, 1], got {_shown(grid)}")
            continue
        if twice := [name for name in grid if name in entry]:
            problems.add((*key, "grid"), f"expected {twice[0]!r} either in the entry or in its grid, got it in both")
            continue
        several = math.prod(len(values) for values in grid.values()) > 1
        for combination in itertools.product(*grid.values()):
            chosen = dict(zip(grid, combination, strict=True))
            found = _validated(kind, {**entry, **chosen}, key, problems)
            if found is None:
                break  # said once
            if several:
                base = found.label or found.name
                found.label = " ".join([base, *(f"{name}={_word(value)}" for name, value in chosen.items())])
            yield key, found


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _model(entry: _ModelEntry, key: Key, problems: Problems, folder: Path | None) -> tuple[Key, str, ModelSpec]:
    name = entry.name
    if folder is not None and name.startswith((".", "~")):
        name = str(folder / Path(name).expanduser())
    if entry.more and not registry.is_code(name):
        for one in entry.more:
            problems.add(
                (*key, one), "unknown key; a model has name, revision, dtype, device_map and trust_remote_code"
            )
    arguments = entry.more
    if registry.is_code(name):
        arguments = _checked(registry.from_code, name, entry.more, key, problems)
    spec = ModelSpec(name, entry.revision, entry.dtype, arguments, entry.device_map, entry.trust_remote_code)
    return key, entry.label or entry.name, spec


def _short(models: list[tuple[Key, str, ModelSpec]]) -> list[tuple[Key, str, ModelSpec]]:
    """Labels of models that are called by a path or a hub's name: its last part, unless another model ends in the same."""
    counts = Counter(_last(label, spec) for _, label, spec in models)
    return [
        (key, _last(label, spec) if counts[_last(label, spec)] == 1 else label, spec) for key, label, spec in models
    ]


def _last(label: str, spec: ModelSpec) -> str:
    if registry.is_code(spec.name) or not label.startswith(spec.name):
        return label
    return re.split(r"[/\\]", spec.name.rstrip("/\\"))[-1] + label.removeprefix(spec.name)


def _task(entry: _TaskEntry, key: Key, problems: Problems) -> tuple[Key, str, Call]:
    call = Call(entry.name, _checked(registry.task, entry.name, entry.more, key, problems))
    return key, entry.label or entry.name, call


def _technique(entry: _TechniqueEntry, key: Key, problems: Problems) -> tuple[str, Call, Call | None]:
    found: list[registry.Technique] = []

    def function(name: str) -> Callable[..., Any]:
        found.append(registry.technique(name))
        return found[0].function

    call = Call(entry.name, _checked(function, entry.name, entry.more, key, problems))
    metric = _metric(entry.metric, key, problems)
    if found and found[0].metric:
        metric = metric or _metric(registry.DEFAULT_METRIC, key, problems)
    elif found and metric is not None:
        problems.add((*key, "metric"), f"{entry.name} has no use for a metric; leave it out")
    _check_cells(Call(call.name, call.arguments or entry.more), key, problems)
    return entry.label or entry.name, call, metric


def _check_cells(call: Call, key: Key, problems: Problems) -> None:
    """What can be said of `site` and `over` without the model."""
    if registry.is_code(call.name) or not isinstance(site := call.arguments.get("site"), str):
        return
    try:
        found = get_site(site)
    except ValueError as error:
        problems.add((*key, "site"), str(error).removeprefix("site: "))
        return
    over = call.arguments.get("over")
    if isinstance(over, str) and call.name != "logit_lens":
        try:
            dims = tuple("position" if dim == "patch" else dim for dim in over.split())  # patches have positions
            check_dims(found, dims, over)
        except ValueError as error:
            problems.add((*key, "over"), str(error).removeprefix("over: "))


def _metric(stated: str | Mapping[str, Any] | None, key: Key, problems: Problems) -> Call | None:
    if stated is None:
        return None
    given = {"name": stated} if isinstance(stated, str) else dict(stated)
    name = given.pop("name", None)
    if not isinstance(name, str):
        problems.add((*key, "metric"), f"expected a metric's name, or a table with one, got {_shown(stated)}")
        return None
    return Call(name, _checked(registry.metric, name, given, (*key, "metric"), problems, named=False))


def _checked(
    find: Callable[[str], Callable[..., Any]],
    name: str,
    given: Mapping[str, Any],
    key: Key,
    problems: Problems,
    named: bool = True,
) -> dict[str, Any]:
    """The arguments of the call of a name. What is wrong with them, or with it, is added to the problems."""
    place = (*key, "name") if named else key
    if registry.is_code(name) and not problems.allow_code:  # before it is imported, which would run it
        problems.add(
            place, f"{name!r} is code, which would be run; allow it (--allow-code, allow_code=True) if you trust it"
        )
        return {}
    try:
        return registry.arguments(find(name), given)
    except registry.BadArguments as error:
        for argument, problem in error.problems.items():
            problems.add((*key, argument), problem)
    except ValueError as error:
        problems.add(place, str(error))
    return {}


def _jobs(
    models: Sequence[tuple[Key, str, ModelSpec]],
    tasks: Sequence[tuple[Key, str, Call]],
    techniques: Sequence[tuple[Key, _TechniqueEntry, str, Call, Call | None]],
    problems: Problems,
) -> list[Job]:
    """Every technique on every task that it is for, on every model."""
    for what, labels in (("model", [label for _, label, _ in models]), ("task", [label for _, label, _ in tasks])):
        for label, count in Counter(labels).items():
            if count > 1:
                where = [key for key, other, _ in (*models, *tasks) if other == label and key[0] == what]
                problems.add(where[1], f"duplicate: {count} entries are called {label!r}; give them a label each")
    if problems.found:
        return []
    names = _distinct(techniques)
    jobs: dict[str, tuple[Key, Job]] = {}
    for (key, entry, _, call, metric), label in zip(techniques, names, strict=True):
        row = registry.technique(call.name)
        mine = _chosen(models, entry.models, (*key, "models"), problems)
        for_tasks: Sequence[tuple[Key, str, Call | None]] = _chosen(tasks, entry.tasks, (*key, "tasks"), problems)
        if row.works_on == "nothing":
            if entry.tasks is not None:
                problems.add((*key, "tasks"), f"{call.name} looks at the model alone; leave tasks out")
            for_tasks = [((), "", None)]
        elif not for_tasks and not problems.found:
            why = "its own `tasks` names none" if entry.tasks is not None else "there is no [[task]]"
            problems.add(key, f"{call.name} needs a task; {why}")
        for (_, model_label, model), (_, task_label, task) in itertools.product(mine, for_tasks):
            if (
                task is not None
                and task.name in registry.GIVES_PROMPTS
                and (row.works_on == "pairs" or metric is not None)
            ):
                with_pairs = json.dumps([other for _, other, one in tasks if one.name not in registry.GIVES_PROMPTS])
                problems.add(
                    key,
                    f"{call.name} needs pairs of prompts, and task {task_label!r} has none; name those it is for: "
                    f"tasks = {with_pairs}",
                )
                continue
            job = Job(model, task, call, metric, (model_label, task_label, label))
            if job.id in jobs:
                first, other = jobs[job.id]
                again = f"{first[0]}[{first[1]}]"
                problems.add(key, f"duplicate job: '{job}' is the same as '{other}' of {again}, argument by argument")
            jobs.setdefault(job.id, (key, job))
    return [job for _, job in jobs.values()]


def _distinct(techniques: Sequence[tuple[Key, _TechniqueEntry, str, Call, Call | None]]) -> list[str]:
    """Labels of techniques: where two would be called the same, what they differ in is added."""

    def said(call: Call, metric: Call | None) -> dict[str, Any]:
        of_metric = {f"metric.{name}": value for name, value in metric.arguments.items()} if metric else {}
        return {"name": call.name, "metric": metric.name if metric else None, **of_metric, **call.arguments}

    alike: dict[str, list[dict[str, Any]]] = {}
    for _, _, label, call, metric in techniques:
        alike.setdefault(label, []).append(said(call, metric))
    labels = []
    for _, _, label, call, metric in techniques:
        mine, others = said(call, metric), alike[label]
        differ = [name for name in mine if len(others) > 1 and len({canonical(one.get(name)) for one in others}) > 1]
        labels.append(" ".join([label, *(f"{name}={_word(mine[name])}" for name in differ)]))
    return labels


def _chosen(entries: Sequence[Any], names: list[str] | None, key: Key, problems: Problems) -> list[Any]:
    if names is None:
        return list(entries)
    known = {label: label for _, label, _ in entries}
    for name in names:
        if name not in known and not any(call.name == name for _, _, call in entries):
            problems.add(key, f"expected labels or names among {', '.join(known) or 'none'}, got {name!r}")
    return [entry for entry in entries if entry[1] in names or entry[2].name in names]
