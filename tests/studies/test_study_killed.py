"""A study that is killed at any moment resumes: the same bytes in the end, and at most one shard per kill computed twice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

import mechkit as mk
from helpers import studies
from mechkit.studies._keys import weights_digest

STATED: dict[str, Any] = {
    "models": [{"name": "helpers.studies:tiny_llama", "dtype": "float64", "label": "llama"}],
    "tasks": [{"name": "helpers.studies:tiny_pairs", "n": 5, "label": "pairs", "grid": {"seed": [0, 1]}}],
    "techniques": [
        {"name": "activation_patching", "label": "heads"},
        {"name": "activation_patching", "label": "residual", "site": "resid_pre", "over": "layer pos"},
    ],
    "shard": 8,
    "retries": 0,
}
KILLS = 20


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    study = mk.Study(**STATED, store=folder / "store")
    with studies.one_thread():
        shared, fresh = (weights_digest(model) for model in (studies.tiny_llama(), studies.fresh_llama()))
        assert shared == fresh  # or a test has changed it, and the processes below have another
        report = study.run(progress=False)
    assert not report.failed
    assert report.computed > 20
    studies.parquet(study, folder / "table.parquet")
    return folder


def start(store: Path, log: Path) -> Any:
    """A process that runs the study, up to the moment at which it begins."""
    started = studies.lines(f"{log}.started")
    process = studies.forkserver().Process(target=studies.run_in_process, args=(str(store), STATED, str(log)))
    process.start()
    studies.wait_for(lambda: studies.lines(f"{log}.started") > started or not process.is_alive())
    return process


def stopped(process: Any, by: signal.Signals, status: int) -> bool:
    """Sends a signal. Whether it ended the process, with this status; one that ended by itself meanwhile was not stopped."""
    alive = process.is_alive()
    if alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, by)
    process.join()
    assert process.exitcode in ((0, status) if alive else (0,))
    return bool(process.exitcode == status)


def assert_like(store: Path, undisturbed: Path) -> None:
    """The table, and every file of data, byte by byte."""
    study = mk.Study.open(store, allow_code=True)
    table = mk.Study(**STATED, store=store)
    assert len(study) == len(table) == len(table.results())
    assert studies.parquet(table, store.parent / "table.parquet") == (undisturbed / "table.parquet").read_bytes()
    mine, theirs = (
        {k: v for k, v in studies.files(at).items() if k.startswith("data/")} for at in (store, undisturbed / "store")
    )
    assert mine.keys() == theirs.keys()
    assert mine == theirs
    assert studies.chunks(store)
    assert table.status(verify=True).count("done") == len(table)


def test_a_study_killed_twenty_times_ends_as_one_that_was_not(tmp_path, undisturbed):
    chance = random.Random(0)
    kills = finished = 0
    total = len(studies.records(undisturbed / "store"))
    while kills < KILLS:
        store, log = tmp_path / f"{finished}" / "store", tmp_path / f"{finished}.log"
        store.parent.mkdir()
        mine, process = 0, start(store, log)
        while kills < KILLS:
            process.join(chance.uniform(0.0, 0.4))
            if not process.is_alive():
                break
            if not stopped(process, signal.SIGKILL, -signal.SIGKILL):
                break
            kills, mine = kills + 1, mine + 1
            assert studies.lines(log) - len(studies.records(store)) <= mine
            assert not mk.Study(**STATED, store=store).status().at_work
            process = start(store, log)
        process.join()
        assert process.exitcode == 0  # the last one was left alone
        assert total <= studies.lines(log) <= total + mine
        report = mk.Study(**STATED, store=store).run(progress=False)
        assert (report.computed, report.kept, report.damage) == (0, total, [])
        assert_like(store, undisturbed)
        finished += 1
    assert kills == KILLS


def test_an_interrupt_leaves_a_store_that_goes_on(tmp_path, undisturbed):
    total = len(studies.records(undisturbed / "store"))
    for attempt in range(20):  # a process may end before it is interrupted, if this one was held up
        store, log = tmp_path / f"{attempt}" / "store", tmp_path / f"{attempt}.log"
        store.parent.mkdir()
        if all(interrupted(store, log, after, total) for after in (0, 3, 9)):
            break
    else:
        pytest.fail("no study was interrupted three times")
    calls, done = studies.lines(log), len(studies.records(store))
    assert calls - done <= 3
    report = mk.Study(**STATED, store=store).run(progress=False)
    assert (report.computed, report.kept, report.damage) == (total - done, done, [])
    assert_like(store, undisturbed)


def interrupted(store: Path, log: Path, after: int, total: int) -> bool:
    """Whether a run was interrupted after so many calls, and not done before; what is left then can go on."""
    process = start(store, log)
    studies.wait_for(lambda: studies.lines(log) > after or not process.is_alive())
    if not stopped(process, signal.SIGINT, 1):  # KeyboardInterrupt, as it came
        return False
    if len(studies.records(store)) == total:  # it was about to end
        return False
    status = mk.Study(**STATED, store=store).status()
    assert not status.at_work
    assert status.running == ()
    return True


def test_an_interrupt_within_a_technique(tmp_path):
    entry = {"name": "helpers.studies:interrupts", "log": str(tmp_path / "log"), "label": "interrupts"}
    quick = {"name": "helpers.studies:quick", "log": str(tmp_path / "quick"), "label": "quick"}
    study = mk.Study(STATED["models"], ["helpers.studies:tiny_pairs"], [quick, entry], store=tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        study.run(progress=False)
    assert [one.state for one in study.status().jobs] == ["done", "waiting"]
    assert not study.status().at_work
    report = study.run(progress=False)
    assert (report.computed, report.kept) == (1, 1)
    assert studies.lines(tmp_path / "quick") == 1
