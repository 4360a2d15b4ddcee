"""`benchmarks/studies/overhead.py`: it runs as documented, and its study has the jobs and numbers that it times."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks/studies"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("overhead")


def test_without_arguments_it_measures_all(bench):
    assert bench.parsed([]).what == ["overhead", "jobs"]
    assert bench.parsed(["jobs", "--jobs", "20"]).what == ["jobs"]


def test_an_unknown_part_is_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.parsed(["overheads"])
    assert "expected overhead or jobs, got overheads" in capsys.readouterr().err


def test_many_jobs(bench, tmp_path, capsys):
    bench.main(["jobs", "--jobs", "20", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())["jobs"]
    assert (figures["n"], figures["rows"]) == (20, 20 * 4 * 4 * 2)
    assert set(figures["seconds"]) == {"expand", "run", "run_again", "status", "results", "one_result", "parquet"}
    assert "20 jobs: parquet" in capsys.readouterr().out


def test_overhead(bench, tmp_path, smollm2, monkeypatch):
    monkeypatch.setattr(bench.mk.HookedModel, "from_pretrained", lambda name: smollm2)
    args = bench.parsed(["overhead", "--prompts", "1", "--repeats", "1"])
    figures = bench.overhead(args, tmp_path)
    assert [row["difference"] for row in figures["rows"]] == [0.0]
    assert [row["block_tokens"] for row in figures["rows"]] == [1.0]  # one shard
    assert figures["median_ratio"] == figures["rows"][0]["ratio"] > 0
