"""The command line: `mechkit run study.toml`, and commands that show its results.

1. Each command reads its arguments, calls what a script would call (`mechkit.Study`, `HookedModel.validate`), and prints.
2. What a user can fix (a bad file, a missing model, a store that cannot be used) is one message on stderr and exit code 2.
3. Tables are rich's. Nothing in them is read as markup, since labels may hold brackets.
4. Everything slow to import is imported by the command that needs it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from enum import StrEnum
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mechkit._bytes import shown_bytes as _bytes
from mechkit._extras import need_studies
from mechkit._version import __version__

need_studies("the command line")
import typer  # noqa: E402

if TYPE_CHECKING:
    import rich.console
    import rich.table

    from mechkit.hooks import HookedModel
    from mechkit.studies import Status, Study
    from mechkit.studies import Table as Results
    from mechkit.studies._executors import Executor

WIDTH = 200  # columns of a table that is not printed on a terminal
REFRESH = 2.0  # seconds between two looks of `status --watch`
NAMES = {"model", "task", "technique", "job", "metric", "dtype", "revision"}  # keys of --only whose values are text
SWEEPS = (("z", "layer head"), ("resid_pre", "layer pos"), ("z", "layer pos head"))  # what `info` estimates

# typer takes choices as enums; its older versions know no Literal
Kind = StrEnum("Kind", {"in_process": "in-process", "processes": "processes", "ray": "ray"})
Dtype = StrEnum("Dtype", ["float64", "float32", "bfloat16", "float16"])
Format = StrEnum("Format", ["parquet", "csv"])

StudyFile = Annotated[str, typer.Argument(metavar="STUDY.toml", help="The study's file.")]
StudyOrStore = Annotated[str, typer.Argument(metavar="STUDY.toml|STORE", help="The study's file, or its store.")]
Elsewhere = Annotated[str | None, typer.Option(metavar="STORE", help="Another store than the file's.")]
Only = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Jobs that fit: task=ioi. Repeatable.")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Run functions that the file names as module:function.")]

Stale = Annotated[
    bool, typer.Option("--stale", help="Of a store: take in jobs that its studies do not state any more.")
]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mechkit {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Studies of transformer language models: run them, look at them, and look at models."""


# -- run ---------------------------------------------------------------------------------------------------------------


@app.command()
def run(
    study: StudyFile,
    store: Elsewhere = None,
    executor: Annotated[Kind, typer.Option(help="Where shards are computed.")] = Kind.in_process,
    workers: Annotated[int | None, typer.Option(min=1, help="How many processes, or actors on Ray.")] = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster: ray://host:10001, or auto.")] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="Where models go: cuda:0. Repeat it: a process each.")
    ] = None,
    only: Only = None,
    allow_code: AllowCode = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No bar, and no report unless something went wrong.")] = False,
) -> None:
    """Compute what a study's store does not hold yet. Stop it at any time: the same command goes on.

    Exit code 0: all done. 1: some jobs failed. 2: the file, a model or the store cannot be used. 130: interrupted.
    """
    with _errors_as_messages(interrupted="interrupted: what was finished is kept; the same command goes on from there"):
        if Path(study).is_dir():
            raise ValueError(f"study: expected a TOML file, got the folder {study!r}; name the study's file")
        opened = _open(study, store, allow_code)
        report = opened.run(_executor(executor, workers, address, device or []), only=_only(only), progress=not quiet)
    if report.failed or report.damage or not quiet:
        typer.echo(str(report), err=quiet)
    if report.failed:
        raise typer.Exit(1)


def _executor(kind: Kind, workers: int | None, address: str | None, devices: Sequence[str]) -> Executor:
    """The executor that the options ask for; raises `ValueError` for options that do not go together."""
    from mechkit.studies import InProcess, Processes, Ray

    if address is not None and kind is not Kind.ray:
        raise ValueError(f"address: expected --executor ray with an address, got --executor {kind}")
    if kind is Kind.ray:
        if devices:
            raise ValueError("device: Ray chooses its actors' devices; leave --device out")
        return Ray(address, workers=workers)
    if kind is Kind.processes:
        if devices and workers not in (None, len(devices)):
            raise ValueError(f"workers: expected one for each --device ({len(devices)}), got {workers}; leave it out")
        return Processes(list(devices) or workers)
    if workers not in (None, 1) or len(devices) > 1:
        raise ValueError("workers, device: expected --executor processes (or ray) for more than one worker")
    return InProcess(devices[0] if devices else None)


# -- status ------------------------------------------------------------------------------------------------------------


@app.command()
def status(
    study: StudyOrStore,
    store: Elsewhere = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every number, and count only what is whole.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again until all is done, or until Ctrl-C.")] = False,
    stale: Stale = False,
    allow_code: AllowCode = False,
) -> None:
    """How far a study is: read from its store alone, also while it runs."""
    with _errors_as_messages():
        if watch and as_json:
            raise ValueError("watch: expected either --watch or --json, got both")
        opened = _open(study, store, allow_code, stale)
        if watch:
            _watch(opened, verify)
        elif as_json:
            typer.echo(json.dumps(_status_json(opened, opened.status(verify=verify)), indent=1))
        else:
            found = opened.status(verify=verify)
            _console().print(_status_table(found), str(found), sep="\n")


def _watch(study: Study, verify: bool) -> None:
    """The table, again and again; totals stand above it, where they are seen however long it is."""
    from rich.console import Group
    from rich.live import Live

    with contextlib.suppress(KeyboardInterrupt), Live(console=_console(), auto_refresh=False) as live:
        while True:
            found = study.status(verify=verify)
            live.update(Group(str(found), _status_table(found)), refresh=True)
            if found.count("done") == len(found.jobs):
                return
            time.sleep(REFRESH)


def _status_table(found: Status) -> rich.table.Table:
    from mechkit.studies._status import duration

    table = _table("model", "task", "technique", "state", "done#", "shards#", "time#", "error")
    colours = {"done": "green", "running": "cyan", "failed": "red", "partial": "yellow"}
    for one in found.jobs:
        shards = "?" if one.shards is None else str(one.shards)
        error = textwrap.shorten(one.error or "", 60, placeholder="…")  # whole below the table
        took = duration(one.seconds) if one.done else ""
        table.add_row(*one.job.labels, one.state, str(one.done), shards, took, error, style=colours.get(one.state))
    return table


def _status_json(study: Study, found: Status) -> dict[str, Any]:
    done, known = found.shards
    kinds = ("model", "task", "technique")
    jobs = [{**vars(one), **dict(zip(kinds, one.job.labels, strict=True)), "job": one.job.id} for one in found.jobs]
    about = {"study": study.name, "store": study.store.url, "shards_done": done, "shards_known": known}
    return {**about, **vars(found), "jobs": jobs}


# -- results -----------------------------------------------------------------------------------------------------------


@app.command()
def results(
    study: StudyOrStore,
    store: Elsewhere = None,
    to: Annotated[Format | None, typer.Option(help="Write them all, one row per cell and prompt.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file; default the study's name, here.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Take in jobs that are finished in part.")] = False,
    only: Only = None,
    stale: Stale = False,
    allow_code: AllowCode = False,
) -> None:
    """The finished jobs: written to a file, or each job's three strongest cells.

    Exit code 0: there are results (jobs that are not finished are counted on stderr). 1: there are none yet.
    """
    with _errors_as_messages():
        if to is None and out is not None:
            raise ValueError(f"out: expected --to parquet or csv with it, got --out {out} alone")
        opened = _open(study, store, allow_code, stale)
        table = opened.results(partial=partial)
        if table.missing:
            typer.echo(f"{len(table.missing)} of {len(opened)} jobs are not finished: left out", err=True)
        if len(table) == 0:
            raise typer.Exit(1)
        if wanted := _only(only):
            table = table.sel(**wanted)
        if to is None:
            return _console().print(_summary(table))
        path = out or Path(f"{Path(study.rstrip('/')).stem}.{to}")
        path.parent.mkdir(parents=True, exist_ok=True)
        (table.to_parquet if to is Format.parquet else table.to_csv)(path)
        typer.echo(f"{path}: {len(table)} jobs")


def _summary(table: Results) -> rich.table.Table:
    """One row per job. Cells are means over prompts, furthest from the unedited run first; edges by their scores."""
    from mechkit.circuits import EdgeScores

    shown = _table("model", "task", "technique", "metric", "cells", "strongest: value (distance from the base run)")
    for job, result in table.results():
        if isinstance(result, EdgeScores):
            inner, top = result.result, [f"{edge.name} {edge.score:+.4g}" for edge in result.top(3)]
        else:
            shape = "{0.label} {0.value:.4g} ({0.effect:+.4g})" if result.baseline else "{0.label} {0.value:.4g}"
            inner, top = result, [shape.format(cell) for cell in result.top(3)]
        sizes = " × ".join(f"{dim} {size}" for dim, size in zip(inner.dims, inner.shape, strict=True))
        metric = f"{inner.metric} [{inner.unit}]" if inner.unit else inner.metric
        shown.add_row(*job.labels, metric, sizes, "   ".join(top))
    return shown


# -- info --------------------------------------------------------------------------------------------------------------


@app.command()
def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub's name, a folder, a .gguf file, smollm2-135m.")],
    revision: Annotated[str | None, typer.Option(help="The hub's revision.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights.")] = Dtype.float32,
    device: Annotated[str | None, typer.Option(help="Where to put it; default the GPU if there is one.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Pairs of prompts to assume.")] = 32,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 15,
    allow_remote_code: Annotated[bool, typer.Option("--allow-remote-code", help="Run code that it brings.")] = False,
    sweep: Annotated[str | None, typer.Option(help="Forecast one sweep, without weights: 'z over layer head'.")] = None,
    first_difference: Annotated[int, typer.Option(min=0, help="With --sweep: where pairs first differ.")] = 0,
    budget: Annotated[str | None, typer.Option(help="With --sweep: working memory, '4 GiB'.")] = None,
    rate: Annotated[
        float | None, typer.Option(min=1e-6, help="With --sweep: GFLOP/s, for an estimate of time.")
    ] = None,
) -> None:
    """A model: its sizes and sites, whether it is computed faithfully, and what sweeps of it would take."""
    with _errors_as_messages():
        import torch

        from mechkit.engine import check_tokens
        from mechkit.hooks import HookedModel, find_model
        from mechkit.studies._executors import check_device

        which: dict[str, Any] = {"revision": revision, "trust_remote_code": allow_remote_code}
        if sweep is not None:
            from mechkit.experiment.forecast import answer

            pairs = {"prompts": prompts, "length": length, "first_difference": first_difference}
            which |= {"dtype": getattr(torch, dtype), "device": device}
            return typer.echo(answer(model, sweep, **pairs, budget=budget, rate=rate, **which))
        find_model(model, **which)
        if device is not None:
            check_device(device)
        loaded = HookedModel.from_pretrained(model, device=device, dtype=getattr(torch, dtype), **which)
        check_tokens(loaded, torch.zeros(length, dtype=torch.long), "length")
        _console().print(_sizes(loaded), _sites(loaded, length), sep="\n")
        _console().print(_validation(loaded), _sweeps(loaded, prompts, length))


def _sizes(model: HookedModel) -> str:
    parameters = list(model.bridge.original_model.parameters())  # a matrix that is used twice counts once
    widths = [f"{name} {getattr(model.cfg, name)}" for name in ("d_model", "d_head", "d_mlp", "d_vocab", "n_ctx")]
    return (
        f"{model.name} ({model.cfg.architecture}), {str(model.dtype).removeprefix('torch.')} on {model.device}\n"
        f"{model.n_layers} layers of {model.n_heads} heads ({model.n_kv_heads} key-value heads); {', '.join(widths)}\n"
        f"{sum(p.numel() for p in parameters):,} parameters, {_bytes(sum(p.nbytes for p in parameters))}"
    )


def _sites(model: HookedModel, length: int) -> rich.table.Table:
    from mechkit.hooks import SITES

    table = _table("site", "hook", "axes", f"shape for prompts of {length} tokens")
    for name in [name for stack in model.stacks.values() for name in stack.site_names]:
        site = SITES[name]
        shape = ["prompts", *(str(model.site_size(name, dim, length)) for dim in site.dims)]
        table.add_row(name, site.hook, " ".join(["batch", *site.dims]), f"[{', '.join(shape)}]")
    return table


def _validation(model: HookedModel) -> rich.table.Table:
    """What was found; `validate` raises for a model that is not computed faithfully."""
    found = model.validate()
    table = _table("validate", f"largest difference (allowed: {found.tolerance:.0e} of the largest value)")
    compared = {"logits": "against Hugging Face's", "heads": "sum, against the attention's output"}
    compared |= {"padding": "prompts alone, against padded ones", "unembed": "final residual, against the logits"}
    for name, what in compared.items():
        difference = getattr(found, name)
        table.add_row(f"{name}: {what}", "not checked" if difference is None else f"{difference:.1e}")
    return table


def _sweeps(model: HookedModel, prompts: int, length: int) -> rich.table.Table:
    """What activation patching takes at most: pairs that differ later, or cells that are left out, make it less."""
    from mechkit.engine import Budget
    from mechkit.experiment.forecast import block_tokens, recorded_of

    title = f"{prompts} pairs of {length} tokens that differ from the first token on. Block-token: a block's work on a token"
    numbers = ("cells#", "prompts at once#", "recorded per pair#", "block-tokens#", "naive#", "fewer#")
    table = _table("patching", "over", *numbers, title=title)
    for site, over in SWEEPS:
        if not model.has_site(site):
            continue
        places = length if "pos" in over else 1
        cells = model.n_layers * places * (model.n_heads if "head" in over else 1)
        sites = [(site, layer) for layer in range(model.n_layers)]
        at_once = min(prompts, Budget.of(model, None).prompts_at_once(model, length, sites, cells))
        ours = block_tokens(model.n_layers, model.n_heads, over, prompts, length)
        naive = cells * prompts * length * model.n_layers
        counted = (f"{ours:,}", f"{naive:,}", f"{naive / ours:.1f}×")
        table.add_row(site, over, f"{cells:,}", str(at_once), _bytes(recorded_of(model, sites, length)), *counted)
    return table


# -- techniques --------------------------------------------------------------------------------------------------------


@app.command()
def techniques() -> None:
    """What a study may name: techniques with their arguments, tasks, metrics."""
    from mechkit.studies import _registry as registry

    table = _table("technique", "works on", "metric", "shards by", "arguments")
    for name, row in registry.TECHNIQUES.items():
        cut = ", ".join(row.split) or "–"
        table.add_row(name, row.works_on, "yes" if row.metric else "–", cut, _arguments(row.function))
    _console().print(table)
    for what, functions in (("task", registry.TASKS), ("metric", registry.METRICS)):
        table = _table(what, "arguments")
        for name, function in functions.items():
            table.add_row(name, _arguments(function))
        _console().print(table)


def _arguments(function: Any) -> str:
    """Those that a study may set, with their defaults."""
    from mechkit.studies._registry import _settable

    defaults = [(name, parameter.default) for name, parameter in _settable(function).items()]
    return ", ".join(name if value is Parameter.empty else f"{name}={value!r}" for name, value in defaults)


# -- shared ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _errors_as_messages(interrupted: str = "interrupted") -> Iterator[None]:
    """What a user can fix becomes a message on stderr and exit code 2; Ctrl-C, a line and 130."""
    try:
        from mechkit.studies import StoreError

        try:
            yield
        except (ValueError, StoreError, OSError) as error:
            typer.echo(f"mechkit: {error}", err=True)
            raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo(interrupted, err=True)
        raise typer.Exit(130) from None


def _open(path: str, store: str | None, allow_code: bool, stale: bool = False) -> Study:
    """The study of a file, or all that a store knows; raises `ValueError` for a file that is wrong, or no study."""
    from mechkit.studies import Study

    if allow_code and "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # functions are looked for in this folder, as `python -m` does
    if "://" not in path and not Path(path).is_dir():
        return Study.from_toml(path, store=store, allow_code=allow_code)
    if store is not None:
        raise ValueError(f"store: expected a study's file with --store, got the store {path!r}; give one of them")
    return Study.open(path, stale=stale)


def _only(given: Sequence[str] | None) -> dict[str, Any] | None:
    """`["task=ioi", "seed=0"]` as keys and values: JSON where it is JSON, but names are text, whatever they look like."""
    wanted: dict[str, Any] = {}
    given = given or []
    for one in given:
        key, equals, text = one.partition("=")
        if not key or not equals or key in wanted:
            raise ValueError(f"only: expected KEY=VALUE, each key once, such as task=ioi or seed=0; got {list(given)}")
        try:
            wanted[key] = json.loads(text)
        except ValueError:
            wanted[key] = text
        if key in NAMES and not isinstance(wanted[key], list | None):
            wanted[key] = text.strip('"')
    return wanted or None


def _console() -> rich.console.Console:
    from rich.console import Console

    width = None if Console().is_terminal else WIDTH
    return Console(width=width, markup=False, emoji=False, highlight=False)


def _table(*columns: str, title: str | None = None) -> rich.table.Table:
    """An empty table; columns whose names end with `#` are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in columns:
        table.add_column(column.rstrip("#"), justify="right" if column.endswith("#") else "left", overflow="fold")
    return table
