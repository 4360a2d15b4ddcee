"""A study's table needs no second look: arguments and effects are columns, and what was edited away is not in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import mechkit as mk
from helpers.studies import tiny_llama, tiny_pairs
from mechkit.studies._store import Store

LLAMA: dict[str, Any] = {"name": "helpers.studies:tiny_llama", "dtype": "float64", "label": "llama"}
SEEDS: dict[str, Any] = {"name": "helpers.studies:tiny_pairs", "n": 3, "label": "pairs", "grid": {"seed": [0, 1]}}
HEADS: dict[str, Any] = {"name": "activation_patching", "layers": [0, 2]}


def study(store: Path, techniques: Any, tasks: Any = (SEEDS,), **how: Any) -> mk.studies.Study:
    stated = mk.Study([LLAMA], tasks, techniques, store=store, retries=0, **how)
    report = stated.run(progress=False)
    assert not report.failed
    return stated


def test_arguments_are_columns(tmp_path: Path) -> None:
    modes = {"name": "ablation", "grid": {"mode": ["zero", "mean"]}, "layers": [1], "metric": "log_prob"}
    stated = study(tmp_path / "s", [HEADS, modes])
    frame = stated.results().to_dataframe()
    assert list(frame.columns)[:13] == [
        *(
            "job",
            "model",
            "revision",
            "dtype",
            "task",
            "technique",
            "metric",
            "unit",
            "base",
            "n",
            "seed",
            "mode",
            "layer",
        )
    ]
    assert (frame["n"].dtype, frame["seed"].dtype) == (pd.Int64Dtype(), pd.Int64Dtype())
    assert set(frame["n"]) == {3}
    assert frame["mode"].isna().sum() == (frame["technique"] == "activation_patching").sum()
    by_seed = frame[frame["technique"] == "activation_patching"].groupby("seed")["value"].mean()
    for seed in (0, 1):
        pairs = tiny_pairs(tiny_llama(), 3, seed)
        direct = mk.activation_patching(tiny_llama(), pairs, mk.logit_diff, layers=[0, 2], progress=False)
        assert by_seed[seed] == pytest.approx(direct.values.mean().item(), abs=1e-12)
    files = stated.results().to_parquet(tmp_path / "t.parquet"), stated.results().to_csv(tmp_path / "t.csv")
    assert pd.read_parquet(files[0])["seed"].tolist() == frame["seed"].tolist()
    assert pd.read_csv(files[1])["seed"].tolist() == frame["seed"].tolist()


def test_an_argument_whose_name_is_taken_says_whose_it_is(tmp_path: Path) -> None:
    """Both the task and `resample` have a seed; `layers` differ, and a list is text."""
    resample = {"name": "ablation", "mode": "resample", "grid": {"seed": [0, 5]}, "label": "r"}
    layers = {"name": "activation_patching", "grid": {"layers": [[0], [1, 2]]}}
    same_length = {"name": "helpers.studies:pairs_of_one_length", "label": "pairs", "grid": {"seed": [0, 1]}}
    frame = study(tmp_path / "s", [resample, layers], [same_length]).results().to_dataframe()
    assert {"task_seed", "technique_seed", "layers"} <= set(frame.columns)
    assert "seed" not in frame
    assert set(frame["technique_seed"].dropna()) == {0, 5}
    assert set(frame["layers"].dropna()) == {"[0]", "[1, 2]"}


def test_the_effect_is_the_value_less_the_unedited_runs(tmp_path: Path) -> None:
    edges = {"name": "edge_attribution", "steps": 1}
    frame = study(tmp_path / "s", [HEADS, edges, "hidden_states"], [SEEDS]).results().to_dataframe()
    patched = frame[frame["technique"] == "activation_patching"]
    np.testing.assert_array_equal(patched["effect"], patched["value"] - patched["baseline_corrupted"])
    assert patched["effect"].std() > 0
    scores = frame[frame["technique"] == "edge_attribution"]
    np.testing.assert_array_equal(scores["effect"], scores["value"])
    assert frame[frame["technique"] == "hidden_states"]["effect"].isna().all()


def test_a_study_edited_three_times_on_one_store_shows_what_is_current(tmp_path: Path) -> None:
    store = tmp_path / "s"
    for layers in ([0], [1], [0, 1], [2]):
        last = study(store, [{"name": "activation_patching", "layers": layers}])
        frame = mk.Study.open(store).results().to_dataframe()
        assert sorted(set(frame["layer"])) == layers
        assert frame["layer"].tolist() == last.results().to_dataframe()["layer"].tolist()
    assert (len(mk.Study.open(store)), len(mk.Study.open(store, stale=True))) == (2, 8)
    for opened in (last, mk.Study.open(store)):
        found = opened.status()
        assert (found.stale, len(found.jobs)) == (6, 2)
        assert "6 more jobs of earlier statements are in the store" in str(found)
    every = mk.Study.open(store, stale=True)
    assert (every.status().stale, "(stale)" in str(every.status())) == (0, False)
    frame = every.results().to_dataframe()
    stale = frame["technique"].astype(str).str.contains("(stale)", regex=False)
    assert sorted(set(frame[~stale]["layer"])) == [2]
    assert set(frame[stale]["layer"]) == {0, 1}
    # stated again as it was first: current again, and nothing is computed twice
    again = mk.Study([LLAMA], [SEEDS], [{"name": "activation_patching", "layers": [0]}], store=store)
    assert again.run(progress=False).computed == 0
    assert set(mk.Study.open(store).results().to_dataframe()["layer"]) == {0}


def test_another_study_in_the_store_is_not_stale(tmp_path: Path) -> None:
    store = tmp_path / "s"
    study(store, [HEADS], name="one")
    study(store, ["logit_lens"], name="two")
    assert len(mk.Study.open(store)) == 4
    opened = mk.Study.open(store, allow_code=True)
    opened.run(progress=False)  # going on with what is there states nothing
    study(store, [{**HEADS, "layers": [1]}], name="one")
    assert sorted({job.technique.name for job in mk.Study.open(store).jobs}) == ["activation_patching", "logit_lens"]
    assert mk.Study.open(store).status().stale == 2


def test_models_have_short_names_where_these_say_which(tmp_path: Path) -> None:
    def labels(*names: Any) -> list[str]:
        stated = mk.Study(list(names), [SEEDS], ["logit_lens"], store=tmp_path / "s")
        return list(dict.fromkeys(job.labels[0] for job in stated.jobs))

    assert labels("HuggingFaceTB/SmolLM2-135M", "gpt2", "/data/models/llama/") == ["SmolLM2-135M", "gpt2", "llama"]
    assert labels("one/llama", "two/llama") == ["one/llama", "two/llama"]
    assert labels({"name": "one/llama", "label": "mine"}, "two/llama") == ["mine", "llama"]
    assert labels({"name": "one/llama", "grid": {"dtype": ["float32", "float64"]}}) == [
        *("llama dtype=float32", "llama dtype=float64")
    ]
    assert mk.Study(["one/llama"], [SEEDS], ["logit_lens"], store=tmp_path / "s").jobs[0].model.name == "one/llama"


def test_sets_and_losses_can_be_stated(tmp_path: Path) -> None:
    cells = {"name": "ablation", "cells": [[[0, 1], [2, 3]], [[1, 0]]], "metric": "loss"}
    early = {"name": "ablation", "layers": [1], "metric": {"name": "in_context_score", "early": [0], "late": [1]}}
    table = study(tmp_path / "s", [cells, early], [{**SEEDS, "grid": {"seed": [1]}}]).results()
    pairs = tiny_pairs(tiny_llama(), 3, 1)
    sets = [[(0, 1), (2, 3)], [(1, 0)]]
    direct = mk.ablation(tiny_llama(), pairs, mk.loss(pairs), cells=sets, progress=False)
    torch.testing.assert_close(table.result(metric="loss").values, direct.values, rtol=0, atol=1e-12)
    assert table.result(metric="in_context_score").values.isfinite().all()


def test_a_store_of_before_keeps_its_jobs_current(tmp_path: Path) -> None:
    """Which study had which jobs was not recorded once."""
    store = tmp_path / "s"
    study(store, [HEADS], name="old")
    manifest = Store(store).good("manifest.json")
    assert manifest is not None
    Store(store).put("manifest.json", {key: value for key, value in manifest.items() if key != "current"})
    assert len(mk.Study.open(store)) == 2
    study(store, ["logit_lens"], name="new")
    assert (len(mk.Study.open(store)), mk.Study.open(store).status().stale) == (4, 0)
    study(store, [{**HEADS, "layers": [1]}], name="old")
    assert (len(mk.Study.open(store)), mk.Study.open(store).status().stale) == (4, 2)


def test_arguments_called_like_columns_keep_their_values(tmp_path: Path) -> None:
    odd = {
        "name": "helpers.studies:pairs_of_odd_arguments",
        "label": "odd",
        "baseline_clean": 3,
        "layer": 7,
        "task_layer": 9,
    }
    frame = study(tmp_path / "s", [HEADS], [odd]).results().to_dataframe()
    found = {name: set(frame[name]) for name in ("task_baseline_clean", "task_layer", "task_task_layer")}
    assert found == {"task_baseline_clean": {3}, "task_layer": {7}, "task_task_layer": {9}}
