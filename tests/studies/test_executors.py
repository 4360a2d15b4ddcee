"""Executors: processes and Ray compute what one process computes, bit for bit, and outlive their workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import mechkit as mk
from mechkit.studies import InProcess, Processes, Ray

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import `helpers.executors`, on as many threads as this process."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", params=["processes", "ray"])
def executor(request: pytest.FixtureRequest):
    """Two workers; one Ray for all tests of it, since it is slow to start."""
    if request.param == "processes":
        yield lambda: Processes(2)
        return
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home folder
        ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
        try:
            yield lambda: Ray(workers=2)
        finally:
            ray.shutdown()


def study(store: Path, *techniques: str | dict, seeds: tuple[int, ...] = (0, 1)) -> mk.Study:
    return mk.Study(
        [{"name": "helpers.executors:tiny_llama", "dtype": "float64", "label": "llama"}],
        [{"name": "helpers.executors:tiny_pairs", "label": "pairs", "grid": {"seed": list(seeds)}}],
        [{"name": "activation_patching", "over": "layer pos head"}, *techniques],
        store=store,
        shard=60,
    )


def table(one: mk.Study, folder: Path) -> bytes:
    """The final table, without the techniques that name code of the tests' own."""
    return one.results().sel(technique="activation_patching").to_parquet(folder / "table.parquet").read_bytes()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Computed in this process."""
    folder = tmp_path_factory.mktemp("expected")
    one = study(folder / "store")
    report = one.run(InProcess(), progress=False)
    assert report.computed == sum(status.shards or 0 for status in one.status().jobs) > 10
    return table(one, folder)


def test_equal_to_one_process(executor, expected: bytes, tmp_path: Path) -> None:
    one = study(tmp_path / "store")
    report = one.run(executor(), progress=False)
    assert report.failed == {}
    assert report.retried == 0
    assert table(one, tmp_path) == expected


def test_a_worker_is_lost(executor, expected: bytes, tmp_path: Path) -> None:
    """One worker is killed in mid-study: its shard is computed again, and nothing else."""
    flag = tmp_path / "flag"
    one = study(
        tmp_path / "store", {"name": "helpers.executors:dies_once", "flag": str(flag), "tasks": ["pairs seed=0"]}
    )
    report = one.run(executor(), progress=False)
    assert flag.exists()
    assert int(flag.read_text()) != os.getpid()
    assert report.retried == 1
    assert report.failed == {}
    done, known = one.status().shards
    assert done == known == report.computed
    assert table(one, tmp_path) == expected
    assert one.results().result(technique="helpers.executors:dies_once").dims == ("layer", "head", "prompt")


def test_a_shard_that_always_fails_or_kills(executor, expected: bytes, tmp_path: Path) -> None:
    """The rest is computed all the same, and what failed is reported."""
    first = {"tasks": ["pairs seed=0"]}
    bad = [{"name": f"helpers.executors:{name}", **first} for name in ("always_dies", "always_fails")]
    one = study(tmp_path / "store", *bad)
    one.retries = 1
    report = one.run(executor(), progress=False)
    assert len(report.failed) == 2
    assert report.retried == 2
    assert table(one, tmp_path) == expected
    errors = {status.job.technique.name: status.error for status in one.status().failed}
    assert "worker was lost" in str(errors["helpers.executors:always_dies"])
    assert errors["helpers.executors:always_fails"] == "ValueError: this technique always fails"


def test_devices_are_asked_for() -> None:
    with pytest.raises(ValueError, match="devices: expected"):
        Processes([])
    with pytest.raises(ValueError, match="devices: expected"):
        Processes("cuda:0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="workers: expected at least 1"):
        Ray(workers=0)
