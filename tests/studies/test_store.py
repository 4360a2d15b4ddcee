"""A store that is damaged: it is noticed, message, and computed again where it must be; the table in the end has the same bytes.

Every damage is done to a copy of one undisturbed study (module fixture), which is then read (never a wrong number), run (only
what was lost is computed) and compared with the original, file by file.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mechkit as mk
from helpers import studies
from mechkit.studies import StoreError, _run
from mechkit.studies._job import canonical
from mechkit.studies._store import Store, sha256

TESTS = Path(__file__).parents[1]
STATED: dict[str, Any] = {
    "models": [{"name": "helpers.studies:tiny_llama", "dtype": "float64", "label": "llama"}],
    "tasks": [{"name": "helpers.studies:tiny_pairs", "n": 5, "label": "pairs", "grid": {"seed": [0, 1]}}],
    "techniques": [
        {"name": "activation_patching", "label": "heads"},
        {"name": "helpers.studies:quick", "label": "quick"},
    ],
    "shard": 8,
    "retries": 0,
}
SHARDS = 8  # of a job of activation patching: two pieces of the prompts, four of the layers
ALL = 2 * SHARDS + 2
NOT_NUMBERS = ("aside/", "run.json", "lock", "table.parquet")


def study(store: Path, **how: Any) -> mk.Study:
    return mk.Study(**{**STATED, **how}, store=store)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with studies.one_thread():
        report = study(folder / "store").run(progress=False)
    assert (report.computed, report.failed) == (ALL, {})
    studies.parquet(study(folder / "store"), folder / "table.parquet")
    return folder


@dataclass
class Copy:
    """A copy of the undisturbed store; `mine` is the first job of activation patching, `other` the second, `quick` the code."""

    store: Path
    original: Path

    def __post_init__(self) -> None:
        shutil.copytree(self.original / "store", self.store)
        jobs = study(self.store).jobs
        self.mine, self.other = (job.id for job in jobs if job.labels[2] == "heads")
        self.quick = next(job.id for job in jobs if job.labels[2] == "quick")

    def at(self, name: str) -> Path:
        return self.store / name.format(mine=self.mine, other=self.other, quick=self.quick)

    def assert_whole(self) -> None:
        """As good as new: the table, every chunk, every zarr.json, and nothing left to do."""
        table = studies.parquet(study(self.store), self.store.parent / "again.parquet")
        assert table == (self.original / "table.parquet").read_bytes()
        ours, theirs = (studies.files(at, but=NOT_NUMBERS) for at in (self.store, self.original / "store"))
        ours, theirs = ({k: v for k, v in files.items() if k.startswith("data/")} for files in (ours, theirs))
        assert {k for k, v in ours.items() if theirs.get(k) != v} == set()
        assert set(theirs) == set(ours)
        again = study(self.store).run(progress=False)
        assert (again.computed, again.kept, again.damage) == (0, ALL, [])
        assert study(self.store).status(verify=True).count("done") == 4


@pytest.fixture
def copy(tmp_path, undisturbed) -> Copy:
    return Copy(tmp_path / "store", undisturbed)


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path, at: int = 5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def gone(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def is_a_list(path: Path) -> None:
    path.write_text("[1]")


def is_no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00\x80")


def edited(**changes: Any) -> Callable[[Path], None]:
    """By hand: something else in a JSON file, whose digest stays what it was."""

    def edit(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def sealed(**changes: Any) -> Callable[[Path], None]:
    """By a program that knows the format: with a digest that fits."""

    def seal(path: Path) -> None:
        body = {**json.loads(path.read_text()), **changes}
        del body["digest"]
        path.write_text(json.dumps({**body, "digest": sha256(canonical(body))}))

    return seal


def codec(endian: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(path.read_text().replace('"little"', f'"{endian}"'))

    return change


def replaced_by(name: str) -> tuple[str, str]:
    return "replaced by", name


CHUNK, BASELINE = "data/{mine}/values/c/1/0/0", "data/{mine}/baseline_clean/c/0"
RECORD, LAYOUT, JOB = "shards/{mine}/3.json", "layout/{mine}.json", "jobs/{mine}.json"
GROUP, ARRAY, LABELS = "data/{mine}/zarr.json", "data/{mine}/values/zarr.json", "data/{mine}/layer/c/0"

# file, what is done to it, shards that are computed again, what is message, and what reading gives meanwhile:
# "refused" (a ValueError), "missing" (the job is not in the table) or "right"
DAMAGE: dict[str, tuple[str, Any, int, str, str]] = {
    "torn chunk": (CHUNK, torn, 1, "torn, changed", "refused"),
    "empty chunk": (CHUNK, empty, 1, "torn, changed", "refused"),
    "flipped byte in a chunk": (CHUNK, flipped, 1, "torn, changed", "refused"),
    "flipped byte in a chunk's crc": (CHUNK, lambda path: flipped(path, -1), 1, "torn, changed", "refused"),
    "another job's chunk": (CHUNK, replaced_by("data/{other}/values/c/1/0/0"), 1, "another job's", "refused"),
    "another shard's chunk": (CHUNK, replaced_by("data/{mine}/values/c/2/0/0"), 1, "another job's", "refused"),
    "deleted chunk": (CHUNK, gone, 1, "is missing", "refused"),
    "flipped byte in a baseline": (BASELINE, flipped, 1, "torn, changed", "refused"),
    "deleted baseline": (BASELINE, gone, 1, "is missing", "refused"),
    "torn record of a shard": (RECORD, torn, 1, "torn", "missing"),
    "empty record of a shard": (RECORD, empty, 1, "torn", "missing"),
    "record of a shard that is a list": (RECORD, is_a_list, 1, "not JSON of ours", "missing"),
    "record of a shard that is no text": (RECORD, is_no_text, 1, "not JSON of ours", "missing"),
    "edited record of a shard": (RECORD, edited(seconds=1.0), 1, "own digest", "missing"),
    "another job's record": (RECORD, replaced_by("shards/{other}/3.json"), 1, "another shard's", "missing"),
    "another shard's record": (RECORD, replaced_by("shards/{mine}/4.json"), 1, "another shard's", "missing"),
    "record of a foreign schema": (RECORD, sealed(schema=99), 1, "schema 99", "missing"),
    "record of a shard that there is not": (RECORD, sealed(shard=99), 1, "another shard's", "missing"),
    "deleted record of a shard": (RECORD, gone, 1, "", "missing"),
    "deleted manifest": ("manifest.json", gone, 0, "manifest.json was missing; 4 jobs", "right"),
    "torn manifest": ("manifest.json", torn, 0, "manifest.json is torn", "right"),
    "empty manifest": ("manifest.json", empty, 0, "manifest.json is torn", "right"),
    "manifest that is a list": ("manifest.json", is_a_list, 0, "not JSON of ours", "right"),
    "edited manifest": ("manifest.json", edited(name="mine"), 0, "own digest", "right"),
    "torn zarr.json of an array": (ARRAY, torn, 0, "not what describes", "right"),
    "deleted zarr.json of an array": (ARRAY, gone, 0, "was missing", "right"),
    "another array's zarr.json": (ARRAY, replaced_by("data/{mine}/baseline_clean/zarr.json"), 0, "not what", "right"),
    "zarr.json of another order of bytes": (ARRAY, codec("big"), 0, "not what describes", "right"),
    "torn zarr.json of a baseline": ("data/{mine}/baseline_clean/zarr.json", torn, 0, "not what describes", "right"),
    "torn zarr.json of a group": (GROUP, torn, 0, "not what describes", "right"),
    "deleted zarr.json of a group": (GROUP, gone, 0, "was missing", "right"),
    "torn zarr.json of all": ("data/zarr.json", torn, 0, "not what describes", "right"),
    "deleted zarr.json of all": ("data/zarr.json", gone, 0, "was missing", "right"),
    "flipped byte in labels": (LABELS, flipped, 0, "labels of an axis, is torn", "right"),
    "torn labels": (LABELS, torn, 0, "labels of an axis, is torn", "right"),
    "deleted labels": (LABELS, gone, 0, "was missing", "right"),
    "torn zarr.json of labels": ("data/{mine}/prompt/zarr.json", torn, 0, "not what describes", "right"),
    "deleted layout": (LAYOUT, gone, SHARDS, "the labels of its values, is lost", "missing"),
    "torn layout": (LAYOUT, torn, SHARDS, "torn", "missing"),
    "another job's layout": (LAYOUT, replaced_by("layout/{other}.json"), SHARDS, "another job's", "missing"),
    "deleted record of a job": (JOB, gone, SHARDS, "no record of their key", "missing"),
    "torn record of a job": (JOB, torn, SHARDS, "torn", "missing"),
    "another job's own record": (JOB, replaced_by("jobs/{other}.json"), SHARDS, "another job's", "missing"),
    "leftovers of a write": (
        "data/{mine}/values/c/1/0/0.a1b2.partial",
        lambda path: path.write_bytes(b"x"),
        0,
        "",
        "right",
    ),
    "leftovers of a record": ("shards/{mine}/3.json.a1b2.partial", lambda path: path.write_bytes(b"x"), 0, "", "right"),
    "nothing": (CHUNK, lambda path: None, 0, "", "right"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_reported_and_repaired(copy, what, monkeypatch):
    name, harm, lost, message, reading = DAMAGE[what]
    path = copy.at(name)
    if isinstance(harm, tuple):
        shutil.copy(copy.at(harm[1]), path)
    else:
        harm(path)
    wanted = study(copy.original / "store").results()
    table = study(copy.store).results()
    for job in table.jobs:  # every number that can be read is right
        if job.id == copy.mine and reading == "refused":
            with pytest.raises(ValueError, match=r"Run the study again"):
                table.result(job=job.id)
            with pytest.raises(ValueError, match=r"Run the study again"):
                table.to_parquet(copy.store.parent / "refused.parquet")
            with pytest.raises(ValueError, match=r"Run the study again"):
                table.to_xarray()["llama/pairs seed=0/heads"].to_dataset().load()
            continue
        found, right = table.result(job=job.id), wanted.result(job=job.id)
        np.testing.assert_array_equal(found.values, right.values)
        assert all(np.array_equal(found.baseline[k], right.baseline[k]) for k in right.baseline)
    assert [job.id for job in table.missing] == ([copy.mine] if reading == "missing" else [])
    assert not (copy.store.parent / "refused.parquet").exists()
    log = copy.store.parent / "log"
    _count(monkeypatch, log)
    report = study(copy.store).run(progress=False)
    assert (report.computed, report.kept, report.failed) == (lost, ALL - lost, {})
    assert studies.lines(log) == lost
    assert any(message in one for one in report.damage) if message else report.damage == []
    path.unlink() if path.name.endswith(".partial") else None
    copy.assert_whole()


def _count(monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    from dataclasses import replace

    from mechkit.studies import _registry as registry

    row = registry.TECHNIQUES["activation_patching"]
    counted = replace(row, function=studies.counted(row.function, log))
    monkeypatch.setitem(registry.TECHNIQUES, "activation_patching", counted)


@pytest.mark.parametrize("harm", [torn, codec("big"), gone], ids=["torn", "big endian", "gone"])
@pytest.mark.parametrize("array", ["values", "layer"])
def test_arrays_of_a_job_without_a_finished_shard_are_checked_too(copy, harm, array):
    """A run may have been killed before its first record, and what it made may have been damaged since."""
    shutil.rmtree(copy.at("shards/{mine}"))
    harm(copy.at(f"data/{{mine}}/{array}/zarr.json"))
    report = study(copy.store).run(progress=False)
    assert (report.computed, report.kept, report.failed) == (SHARDS, ALL - SHARDS, {})
    copy.assert_whole()


def test_labels_of_a_job_without_a_finished_shard_are_checked_too(copy):
    shutil.rmtree(copy.at("shards/{mine}"))
    flipped(copy.at(LABELS))
    study(copy.store).run(progress=False)
    copy.assert_whole()


def test_much_damage_at_once(copy):
    for name, harm in ((CHUNK, torn), (RECORD, torn), ("manifest.json", torn), (GROUP, gone), (LABELS, gone)):
        harm(copy.at(name))
    shutil.copy(copy.at("layout/{mine}.json"), copy.at("layout/{other}.json"))
    report = study(copy.store).run(progress=False)
    assert (report.computed, report.failed) == (SHARDS + 2, {})
    copy.assert_whole()


def test_what_is_set_aside_is_kept(copy):
    before = copy.at(RECORD).read_bytes()
    copy.at(RECORD).write_bytes(before + b" ")  # still good JSON: nothing is wrong with a blank
    assert study(copy.store).run(progress=False).damage == []
    copy.at(RECORD).write_bytes(torn_bytes := before[:-40])
    (message,) = study(copy.store).run(progress=False).damage
    (aside,) = (copy.store / "aside").iterdir()
    assert aside.name in message
    assert aside.read_bytes() == torn_bytes


def test_what_was_half_written_is_swept_away_and_nothing_else_is(copy):
    half = [f"{name}.{'0123456789abcdef' * 2}.partial" for name in (CHUNK, RECORD, GROUP, "data/zarr", "manifest.json")]
    others = ["", "data/", "mine.zarr/", "data/mine.zarr/c/"]  # another store's, or whatever the user has there
    mine = ["notes.partial", "data/table.parquet.1234.partial", *(f"{name}0.{'0' * 32}.partial" for name in others)]
    for name in (*half, *mine):
        copy.at(name).parent.mkdir(parents=True, exist_ok=True)
        copy.at(name).write_bytes(b"PAR")
    report = study(copy.store).run(progress=False)
    assert (report.computed, report.kept, report.damage) == (0, ALL, [])
    assert [copy.at(name).exists() for name in half] == [False] * len(half)
    for name in mine:
        assert copy.at(name).read_bytes() == b"PAR"
        copy.at(name).unlink()
    copy.assert_whole()


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [sealed(schema=99), edited(schema=99), sealed(schema="2")], ids=["new", "edited", "text"]
)
def test_a_store_of_another_schema_is_refused_and_not_touched(copy, change):
    change(copy.at("manifest.json"))
    copy.at(f"{RECORD}.{'0' * 32}.partial").touch()
    before = studies.files(copy.store, but=("lock",))
    for use in (lambda: study(copy.store).run(progress=False), lambda: mk.Study.open(copy.store, allow_code=True)):
        with pytest.raises((StoreError, ValueError), match=r"expected schema 1, got .* Nothing was touched"):
            use()
        assert studies.files(copy.store, but=("lock",)) == before


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """What root may do says nothing; so be somebody who may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_a_folder_that_cannot_be_written(undisturbed):
    with tempfile.TemporaryDirectory() as outer:
        os.chmod(outer, 0o755)
        copy = Copy(Path(outer) / "store", undisturbed)
        gone(copy.at(RECORD))
        for path in [copy.store, *copy.store.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        study(copy.store).results().to_dataframe()  # whatever is imported late is imported now
        before = studies.files(copy.store)
        with as_nobody():
            with pytest.raises(StoreError, match=r"store .*/store: could not write .*Permission denied"):
                study(copy.store).run(progress=False)
            status, table = study(copy.store).status(verify=True), study(copy.store).results()
            assert status.count("done") == 3
            assert not status.at_work
            assert len(table) == 3
            assert len(table.to_dataframe()) > 0
            assert len(mk.Study.open(copy.store, allow_code=True)) == 4
        assert studies.files(copy.store) == before
        for path in [copy.store, *copy.store.rglob("*")]:
            path.chmod(0o755)
        assert study(copy.store).run(progress=False).computed == 1
        copy.assert_whole()


# -- a full disk -------------------------------------------------------------------------------------------------------


class Disk:
    """Lets a number of files be written; what comes after is written by half."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, room: int) -> None:
        self.written, self.room, self.folder = 0, room, str(folder)
        really = io.open
        outer = self

        class Full(io.FileIO):
            def write(self, data: Any) -> int:
                super().write(bytes(data)[: len(bytes(data)) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)

        def opened(file: Any, mode: str = "r", *args: Any, **how: Any) -> Any:
            if set(mode) & set("wax+") and str(file).startswith(outer.folder):
                outer.written += 1
                if outer.written > outer.room:
                    return Full(file, mode.replace("b", ""))
            return really(file, mode, *args, **how)

        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)


# Two jobs that cost nothing.
SMALL: dict[str, Any] = {
    "tasks": ["helpers.studies:tiny_pairs"],
    "techniques": [{"name": "helpers.studies:quick"}, {"name": "helpers.studies:gives_nan"}],
}


def test_a_disk_that_is_full_at_any_write(tmp_path, monkeypatch):
    monkeypatch.setattr(_run, "BEAT_EVERY", 1000.0)  # so that every run has the same writes
    with monkeypatch.context() as patch:
        disk = Disk(patch, tmp_path / "good", 10**9)
        assert study(tmp_path / "good", **SMALL).run(progress=False).computed == 2
    wanted = {name: data for name, data in studies.files(tmp_path / "good").items() if name.startswith("data/")}
    assert disk.written > 12
    for room in range(disk.written - 1):  # the last write says that the run has ended, and may fail
        store = tmp_path / f"{room}"
        with monkeypatch.context() as patch:
            Disk(patch, store, room)
            with pytest.raises(StoreError, match=r"store .*: could not write .*No space left on device") as error:
                study(store, **SMALL).run(progress=False)
            assert "What was finished is kept" in str(error.value)
        done = len(studies.records(store))
        assert len(study(store, **SMALL).results()) == done
        report = study(store, **SMALL).run(progress=False)
        assert (report.computed, report.kept, report.failed, report.damage) == (2 - done, done, {}, []), room
        assert {name: data for name, data in studies.files(store).items() if name.startswith("data/")} == wanted


FULL = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
import mechkit as mk
study = mk.Study(**{stated!r}, store={store!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
try:
    study.run(progress=False)
except mk.studies.StoreError as error:
    print("refused:", error)
"""


def test_a_file_that_may_not_grow(tmp_path, copy):
    """For real: the system refuses what is longer than a limit. The records of jobs are the longest files."""
    store = tmp_path / "limited"
    room = 1024
    code = FULL.format(tests=str(TESTS), stated=STATED, store=str(store), room=room)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS.parent)
    assert "refused: store" in done.stdout, done.stderr[-2000:]
    assert "File too large" in done.stdout
    assert all(len(data) <= room for data in studies.files(store).values())
    assert len(study(store).results()) == 0
    assert study(store).run(progress=False).computed == ALL
    assert studies.parquet(study(store), tmp_path / "t.parquet") == (copy.original / "table.parquet").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert soft == hard  # ours was not touched


# -- two at once -------------------------------------------------------------------------------------------------------


def _waiter(folder: Path) -> dict[str, Any]:
    """A study of one shard, which is at work until there is a file `gate`."""
    slow = {"name": "helpers.studies:waits", "gate": str(folder / "gate"), "log": str(folder / "log"), "label": "slow"}
    return {**STATED, "tasks": ["helpers.studies:tiny_pairs"], "techniques": [slow]}


def test_two_runs_at_once(tmp_path):
    stated, store, log = _waiter(tmp_path), tmp_path / "store", tmp_path / "log"
    process = studies.forkserver().Process(
        target=studies.run_in_process, args=(str(store), stated, str(tmp_path / "first"))
    )
    process.start()
    studies.wait_for(lambda: studies.lines(log) == 1)
    half = store / f"manifest.json.{'0' * 32}.partial"
    half.touch()  # as if the other were writing
    before = studies.files(store, but=("run.json",))
    with pytest.raises(StoreError, match=rf"another run \(process {process.pid} on .*\) is at work on it"):
        study(store, **stated).run(progress=False)
    assert studies.files(store, but=("run.json",)) == before
    assert study(store, **stated).status().at_work
    (tmp_path / "gate").touch()
    process.join()
    assert process.exitcode == 0
    assert studies.lines(log) == 1
    report = study(store, **stated).run(progress=False)
    assert (report.computed, report.kept, report.damage) == (0, 1, [])
    assert not half.exists()


def test_the_lock_of_a_run_that_was_killed_is_free(tmp_path):
    stated, store, log = _waiter(tmp_path), tmp_path / "store", tmp_path / "log"
    process = studies.forkserver().Process(
        target=studies.run_in_process, args=(str(store), stated, str(tmp_path / "first"))
    )
    process.start()
    studies.wait_for(lambda: studies.lines(log) == 1)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (tmp_path / "gate").touch()
    assert json.loads((store / "run.json").read_text())["pid"] == process.pid
    assert not study(store, **stated).status().at_work
    assert study(store, **stated).run(progress=False).computed == 1
    assert studies.lines(log) == 2


def test_looking_does_not_stop_a_run_from_starting(copy, monkeypatch):
    """Whoever asks for the lock, even for a moment, could keep a run from having it."""
    import filelock

    Store(copy.store).beat([], 1)  # as if a run were there
    monkeypatch.setattr(filelock.FileLock, "acquire", lambda *_, **__: pytest.fail("the lock was asked for"))
    assert study(copy.store).status().at_work
    assert len(study(copy.store).results()) == 4
