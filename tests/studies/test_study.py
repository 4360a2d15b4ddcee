"""A study gives what direct calls give, reads back alike in every form, and computes nothing twice and nothing stale."""

from __future__ import annotations

import inspect
import itertools
import json
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import mechkit as mk
from helpers import studies
from helpers.families import D_VOCAB, build_hf
from mechkit.circuits import EdgeScores
from mechkit.studies import _registry as registry
from mechkit.studies import _run

LLAMA: dict[str, Any] = {"name": "helpers.studies:tiny_llama", "dtype": "float64", "label": "llama"}
GPT2: dict[str, Any] = {"name": "helpers.studies:tiny_gpt2", "dtype": "float64", "label": "gpt2"}
N = 5
PAIRS: dict[str, Any] = {"name": "helpers.studies:tiny_pairs", "n": N, "label": "pairs"}
HEADS: dict[str, Any] = {"name": "activation_patching", "label": "heads"}

# Arguments that a technique needs to be quick, or that make shards differ: ragged positions, labels, means, no prompt axis.
QUICK: dict[str, dict[str, Any]] = {
    "faithfulness_curve": {"fractions": [0.01, 0.1], "random": 1},
    "attention_knockout": {"from_": [0], "window": 2},
    "edge_patching": {"edges": ["input->a1.h1<q>", "a0.h2->m2", "m1->logits", "a1.h3->a3.h0<q>"]},
}
VARIANTS: list[dict[str, Any]] = [
    {"name": "activation_patching", "site": "resid_pre", "over": "layer pos", "direction": "noise"},
    {"name": "activation_patching", "site": "resid_pre", "over": "pos layer", "positions": [0, 3, 5]},
    {"name": "activation_patching", "site": "mlp_out", "over": "layer position", "positions": ["END", "CHANGED"]},
    {"name": "activation_patching", "site": "z", "over": "layer head", "layers": [3, 1], "heads": [2, 0]},
    {"name": "activation_patching", "site": "blocks.2.attn.hook_z", "over": "head layer pos"},
    {"name": "activation_patching", "site": "embed", "over": "pos", "metric": "kl_divergence"},
    {"name": "activation_patching", "metric": {"name": "log_prob", "position": "CHANGED"}},
    {"name": "ablation", "site": "mlp_post", "over": "layer neuron", "mode": "zero", "neurons": [0, 7]},
    {"name": "ablation", "site": "resid_mid", "over": "layer pos", "mode": "position_mean"},
    {"name": "ablation", "site": "z", "over": "layer head pos", "mode": "mean"},
    {"name": "attribution_patching", "site": "resid_pre", "over": "pos layer"},
    {"name": "atp_star", "site": "z", "over": "layer head pos"},
    {"name": "neuron_attribution", "over": "layer neuron pos", "steps": 2, "neurons": [0, 3]},
    {"name": "path_patching", "senders": "layer head pos", "receivers": ["a3.h0<q>"]},
    {"name": "path_patching", "senders": "layer pos", "direction": "noise"},
    {"name": "edge_attribution", "per_prompt": False},
    {"name": "edge_patching", "per_prompt": False, "edges": ["a0.h2->m2", "m1->logits"]},
    {"name": "composition_scores", "kind": "Q"},
]
OF_PICTURES = {"image_patching", "pixel_attribution"}  # tests/pictures/test_studies_of_pictures.py
ENTRIES = [{"name": name, **QUICK.get(name, {})} for name in registry.TECHNIQUES if name not in OF_PICTURES] + VARIANTS
CASES = [f"t{i:02d}" for i in range(len(ENTRIES))]
NAMES = [
    " ".join([str(entry["name"]), *(f"{v}" for k, v in entry.items() if k in ("over", "mode"))]) for entry in ENTRIES
]


def study(
    store: Any, techniques: Any = (HEADS,), *, models: Any = (LLAMA,), tasks: Any = (PAIRS,), **how: Any
) -> mk.Study:
    return mk.Study(models, tasks, techniques, **{"store": store, "shard": 8, "retries": 0, **how})


def direct(job: Any, model: mk.HookedModel, pairs: mk.PromptPairs) -> mk.Result | EdgeScores:
    """The job as anyone would call it."""
    row, given = registry.TECHNIQUES[job.technique.name], dict(job.technique.arguments)
    if row.works_on != "nothing":
        given["pairs" if row.works_on == "pairs" else "prompts"] = pairs
    if job.metric is not None:
        given["metric"] = registry.METRICS[job.metric.name](pairs, **job.metric.arguments)
    if "progress" in inspect.signature(row.function).parameters:
        given["progress"] = False
    return row.function(model, **given)


def plain(found: mk.Result | EdgeScores) -> mk.Result:
    return found.result if isinstance(found, EdgeScores) else found


def assert_same(found: mk.Result | EdgeScores, wanted: mk.Result | EdgeScores, *, exact: bool = False) -> None:
    assert type(found) is type(wanted)
    a, b = plain(found), plain(wanted)
    assert (a.dims, dict(a.coords)) == (b.dims, dict(b.coords))
    assert (a.base, a.metric, a.unit, a.values.dtype) == (b.base, b.metric, b.unit, b.values.dtype)
    bound = 0.0 if exact else 1e-10
    assert torch.equal(a.values.isnan(), b.values.isnan())
    torch.testing.assert_close(a.values, b.values, atol=bound, rtol=0, equal_nan=True)
    assert set(found.baseline) == set(wanted.baseline)
    for name, numbers in wanted.baseline.items():
        assert found.baseline[name].shape == numbers.shape
        torch.testing.assert_close(found.baseline[name], numbers, atol=bound, rtol=0, equal_nan=True)
    if isinstance(found, EdgeScores) and isinstance(wanted, EdgeScores):
        assert found.graph == wanted.graph


def spied(monkeypatch: pytest.MonkeyPatch, log: Path, name: str = "activation_patching") -> Callable[[], int]:
    """Counts how often a technique is called: lines in a file."""
    row = registry.TECHNIQUES[name]
    monkeypatch.setitem(registry.TECHNIQUES, name, replace(row, function=studies.counted(row.function, log)))
    return lambda: len(log.read_text().splitlines()) if log.exists() else 0


# -- every technique ---------------------------------------------------------------------------------------------------


def _run_all(folder: Path, shard: int) -> mk.Study:
    labelled = [{"label": label, **entry} for label, entry in zip(CASES, ENTRIES, strict=True)]
    stated = study(folder, labelled, shard=shard)
    with studies.one_thread():
        report = stated.run(progress=False)
    assert not report.failed, str(report)
    assert report.computed == stated.status().shards[0] == stated.status().shards[1]
    return stated


@pytest.fixture(scope="module")
def cut(tmp_path_factory) -> mk.Study:
    """Every technique, in shards as small as they come."""
    return _run_all(tmp_path_factory.mktemp("cut"), 8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> mk.Study:
    """Every technique, each in one shard."""
    return _run_all(tmp_path_factory.mktemp("whole"), 10**9)


@pytest.fixture(scope="module")
def wanted() -> dict[str, mk.Result | EdgeScores]:
    """Every technique, called directly."""
    model = studies.tiny_llama()
    labelled = [{"label": label, **entry} for label, entry in zip(CASES, ENTRIES, strict=True)]
    pairs = studies.tiny_pairs(model, N)
    with studies.one_thread():
        return {job.labels[2]: direct(job, model, pairs) for job in study("unused", labelled).jobs}


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_study_gives_what_a_direct_call_gives(cut, whole, wanted, case):
    row = registry.TECHNIQUES[ENTRIES[CASES.index(case)]["name"]]
    assert_same(whole.results().result(technique=case), wanted[case], exact=True)
    assert_same(cut.results().result(technique=case), wanted[case])
    shards = {study: {one.job.labels[2]: one.shards for one in study.status().jobs}[case] for study in (cut, whole)}
    assert shards[whole] == 1
    per_prompt = ENTRIES[CASES.index(case)].get("per_prompt", True)
    by_index = any(isinstance(at, int) for at in ENTRIES[CASES.index(case)].get("positions", ()))
    if row.split and per_prompt and not by_index:  # the control: these were cut
        assert shards[cut] > 1


def test_all_readers_of_edges_in_shards(tmp_path):
    stated = study(tmp_path, ["edge_patching"], shard=200, tasks=[{**PAIRS, "n": 5}])
    assert stated.run(progress=False).computed > 4
    pairs = studies.tiny_pairs(studies.tiny_llama(), 5)
    assert_same(stated.results().result(), direct(stated.jobs[0], studies.tiny_llama(), pairs))


@pytest.mark.parametrize("n", [1, 2])
def test_few_prompts(tmp_path, n):
    techniques = [
        HEADS,
        {"name": "attribution_patching", "site": "resid_pre", "over": "layer pos"},
        {"name": "ablation"},
    ]
    stated = study(tmp_path, techniques, tasks=[{**PAIRS, "n": n}])
    assert not stated.run(progress=False).failed
    for job, found in stated.results().results():
        assert_same(found, direct(job, studies.tiny_llama(), studies.tiny_pairs(studies.tiny_llama(), n)))


def test_every_result_says_where_it_came_from(cut):
    for job, found in cut.results().results():
        stored = plain(found).provenance
        assert stored["study"]["job"] == job.id
        assert stored["study"]["shards"] == stored["study"]["finished"]
        assert stored["study"]["technique"] == job.technique.stated()
        assert stored["study"]["mechkit"] == mk.__version__
        assert stored["n_prompts"] == (None if job.task is None else N)
        json.dumps(dict(stored))


def test_a_cost_is_the_sum_of_its_shards(cut, whole, wanted):
    for case in CASES:
        costs = [
            plain(one).cost for one in (cut.results().result(technique=case), whole.results().result(technique=case))
        ]
        direct_cost = plain(wanted[case]).cost
        assert costs[1] == direct_cost
        assert (costs[0] is None) == (direct_cost is None)
        if costs[0] is not None and direct_cost is not None:
            assert costs[0].block_tokens >= direct_cost.block_tokens / 2


# -- the table ---------------------------------------------------------------------------------------------------------


def _rows(result: mk.Result | EdgeScores) -> tuple[list[tuple[Any, ...]], np.ndarray, dict[str, np.ndarray]]:
    """Labels, values and baselines in long form, the slow way."""
    found = plain(result)
    labels = list(itertools.product(*(found.coords[dim] for dim in found.dims)))
    values = np.array([float(found.sel(**dict(zip(found.dims, at, strict=True))).values) for at in labels])
    baselines = {}
    for name, numbers in result.baseline.items():
        if numbers.ndim == 0 or "prompt" not in found.dims:
            baselines[name] = np.full(len(labels), float(numbers.mean()))
        elif numbers.ndim == 1:
            where = found.dims.index("prompt")
            baselines[name] = np.array([float(numbers[at[where]]) for at in labels])
        else:
            baselines[name] = numbers.numpy().ravel()
    return labels, values, baselines


def _small(cases: list[str]) -> list[str]:
    """Without the techniques that have very many cells."""
    many = ("edge_", "neuron_", "faithfulness", "hidden", "patterns")
    return [case for case, name in zip(CASES, NAMES, strict=True) if case in cases and not any(m in name for m in many)]


def test_the_dataframe_has_every_number_once(cut):
    frame = cut.results().to_dataframe()
    assert len(frame) == sum(plain(found).values.numel() for _, found in cut.results().results())
    assert set(frame["model"]) == {"llama"}
    for case in _small(CASES):
        job = next(job for job in cut.jobs if job.labels[2] == case)
        mine = frame[frame["technique"] == case]
        found = cut.results().result(technique=case)
        labels, values, baselines = _rows(found)
        np.testing.assert_array_equal(mine["value"].to_numpy(), values)
        for i, dim in enumerate(plain(found).dims):
            assert [str(label) for label in mine[dim]] == [str(at[i]) for at in labels], (case, dim)
        for name, numbers in baselines.items():
            np.testing.assert_allclose(mine[f"baseline_{name}"].to_numpy(), numbers, rtol=1e-14)
        others = [column for column in frame if column.startswith("baseline_") and column[9:] not in baselines]
        assert mine[others].isna().all().all()
        about = {"job": job.id, "dtype": "float64", "metric": plain(found).metric, "unit": plain(found).unit}
        assert all((mine[column] == value).all() for column, value in about.items())
        assert mine["revision"].isna().all()
        assert mine["task"].isna().all() if job.task is None else (mine["task"] == "pairs").all()


def test_whole_numbers_stay_whole(tmp_path):
    stated = study(
        tmp_path, [HEADS, {"name": "composition_scores"}, {"name": "path_patching", "senders": ["m0", "m1"]}]
    )
    assert not stated.run(progress=False).failed
    frame = stated.results().to_dataframe()
    assert {str(frame[dim].dtype) for dim in ("layer", "head", "prompt")} == {"Int64"}
    assert frame["layer"].isna().any()


def test_parquet_csv_and_the_dataframe_agree(cut, tmp_path):
    table = cut.results()
    frame = table.to_dataframe()
    again = pd.read_parquet(table.to_parquet(tmp_path / "t.parquet"))
    assert list(again) == list(frame)
    text = pd.read_csv(table.to_csv(tmp_path / "t.csv"), dtype=str, keep_default_na=False)
    assert list(text) == list(frame)
    for column in frame:
        gone = frame[column].isna().to_numpy()
        np.testing.assert_array_equal(again[column].isna().to_numpy(), gone)
        np.testing.assert_array_equal(text[column].isin(["", "nan"]).to_numpy(), gone)
        if column in ("value", "effect") or column.startswith("baseline"):
            for other in (again[column][~gone], text[column][~gone].astype(float)):
                np.testing.assert_array_equal(other.to_numpy(), frame[column][~gone].to_numpy())
        else:
            wanted = [str(one) for one in frame[column][~gone]]
            if set(wanted) <= {"True", "False"}:
                assert list(text[column][~gone].str.title()) == wanted
                continue
            assert [str(int(one)) if isinstance(one, float) else str(one) for one in again[column][~gone]] == wanted
            assert list(text[column][~gone]) == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv", "t.parquet"]


def test_the_tree_of_xarray_agrees(cut):
    tree = cut.results().to_xarray()
    assert len(list(tree.leaves)) == len(CASES)
    for job, found in cut.results().results():
        node = tree["/".join(label or "no task" for label in job.labels)]
        assert node["values"].dims == plain(found).dims
        np.testing.assert_array_equal(node["values"].values, plain(found).values.numpy())
        assert {k: tuple(v.values.tolist()) for k, v in node.coords.items()} == dict(plain(found).coords)
        for name, numbers in found.baseline.items():
            np.testing.assert_array_equal(node[f"baseline_{name}"].values, numbers.numpy())
        assert json.loads(node.attrs["key"]) == job.stated()
    one = tree["llama/pairs/t00"]["values"]
    assert float(one.sel(layer=2, head=1, prompt=3)) == float(
        plain(cut.results().result(technique="t00")).sel(layer=2, head=1, prompt=3).values
    )


READER = """
import sys, json
import numpy as np, xarray as xr
found = {}
for job, out in json.loads(sys.argv[2]).items():
    data = xr.open_zarr(sys.argv[1], group=job, consolidated=False)
    if "prompt" in data.coords:
        data = data.sortby("prompt")
    np.savez(out, **{name: data[name].values for name in data.data_vars})
    found[job] = [data.attrs["model"], data.attrs["task"], data.attrs["technique"], data.attrs["key"],
                  {dim: [str(one) for one in data[dim].values] for dim in data["values"].dims}]
assert not any(name.split(".")[0] in ("mechkit", "torch") for name in sys.modules)
print(json.dumps(found))
"""


def test_the_store_is_read_by_plain_xarray(cut, tmp_path):
    outs = {job.id: str(tmp_path / f"{job.id}.npz") for job in cut.jobs}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READER), f"{cut.store.url}/data", json.dumps(outs)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    stored = json.loads(done.stdout)
    for job, found in cut.results().results():
        numbers = np.load(outs[job.id])
        np.testing.assert_array_equal(numbers["values"], plain(found).values.numpy())
        for name, baseline in found.baseline.items():
            if "prompt" in plain(found).dims:
                np.testing.assert_array_equal(numbers[f"baseline_{name}"], baseline.numpy())
        assert tuple(stored[job.id][:3]) == job.labels
        assert stored[job.id][3] == job.stated()
        assert stored[job.id][4] == {dim: [str(one) for one in labels] for dim, labels in plain(found).coords.items()}


def test_prompts_are_stored_by_length_and_read_in_their_own_order(cut):
    job = next(job for job in cut.jobs if job.labels[2] == "t00")
    record = json.loads((Path(cut.store.url) / "jobs" / f"{job.id}.json").read_text())
    lengths = [studies.LENGTHS[i] for i in record["plan"]["order"]]
    assert lengths == sorted(lengths)
    assert record["plan"]["order"] != list(range(N))  # the control
    assert plain(cut.results().result(technique="t00")).coords["prompt"] == tuple(range(N))


def test_selecting(cut):
    table = cut.results()
    assert len(table) == len(CASES)
    assert len(table.sel(technique="ablation")) == sum(entry["name"] == "ablation" for entry in ENTRIES)
    assert [job.labels[2] for job in table.sel(technique=["t00", "t01"]).jobs] == ["t00", "t01"]
    assert len(table.sel(model="llama", task="helpers.studies:tiny_pairs")) + len(table.sel(task="")) == len(CASES)
    noise = table.sel(technique="activation_patching", direction="noise")
    assert [job.technique.arguments["direction"] for job in noise.jobs] == ["noise"]
    assert len(table.sel(positions=[0, 3, 5])) == 1
    assert len(table.sel(job=cut.jobs[3].id)) == 1
    assert table.sel(technique="t03").to_dataframe()["technique"].unique().tolist() == ["t03"]
    for wrong in ({"technique": "t99"}, {"task": "ioi"}, {"layer": 0}, {"model": ["gpt2"]}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected (one of|a key among)"):
            table.sel(**wrong)
    with pytest.raises(ValueError, match="expected what fits one job, got"):
        table.result(technique="ablation")
    assert f"Table({len(CASES)} results of 1 model, " in repr(table)


def test_an_empty_table(tmp_path):
    table = study(tmp_path / "none").results()
    assert (len(table), len(table.missing), len(table.to_dataframe())) == (0, 1, 0)
    assert len(pd.read_parquet(table.to_parquet(tmp_path / "t.parquet"))) == 0
    table.to_csv(tmp_path / "t.csv")
    with pytest.raises(ValueError, match="technique: expected finished jobs"):
        table.result(technique="heads")
    assert not (tmp_path / "none").exists()


def test_labels_with_slashes_and_two_models(tmp_path):
    models = [{**LLAMA, "label": "a/b"}, {**GPT2, "label": "a/c"}]
    stated = study(tmp_path, models=models, tasks=[PAIRS, {**PAIRS, "seed": 1, "label": "other/pairs"}])
    assert not stated.run(progress=False).failed
    frame, tree = stated.results().to_dataframe(), stated.results().to_xarray()
    assert len(list(tree.leaves)) == 4
    for model, name in ((studies.tiny_llama(), "a/b"), (studies.tiny_gpt2(), "a/c")):
        for seed, task in ((0, "pairs"), (1, "other/pairs")):
            wanted = mk.activation_patching(model, pairs := studies.tiny_pairs(model, N, seed), mk.logit_diff(pairs))
            assert_same(stated.results().result(model=name, task=task), wanted)
            mine = frame[(frame["model"] == name) & (frame["task"] == task)]
            assert len(mine) == wanted.values.numel()


def test_nan_is_a_result(tmp_path):
    stated = study(tmp_path, ["helpers.studies:gives_nan"])
    assert stated.run(progress=False).computed == 1
    assert stated.run(progress=False).kept == 1  # a chunk of nothing but NaN is not a chunk that is missing
    values = plain(stated.results().result()).values
    assert values.isnan()[0].all()
    assert values.isnan()[:, 0].all()
    assert not values.isnan()[1, 1:].any()
    assert len(stated.results().missing) == 0


# -- nothing twice, nothing stale --------------------------------------------------------------------------------------


def test_finished_shards_are_not_run_again(tmp_path, monkeypatch):
    calls = spied(monkeypatch, tmp_path / "log")
    stated = study(tmp_path / "store")
    first = stated.run(progress=False)
    assert (first.computed, first.kept) == (calls(), 0)
    assert calls() > 2
    before = studies.files(tmp_path / "store", but=("run.json", "lock"))
    second = study(tmp_path / "store").run(progress=False)
    assert (second.computed, second.kept, second.damage) == (0, first.computed, [])
    assert calls() == first.computed
    assert studies.files(tmp_path / "store", but=("run.json", "lock")) == before


def test_what_is_added_is_computed_and_nothing_else(tmp_path, monkeypatch):
    calls = spied(monkeypatch, tmp_path / "log")
    quick = {"name": "helpers.studies:quick", "log": str(tmp_path / "quick")}
    n = study(tmp_path / "store").run(progress=False).computed
    assert calls() == n
    grown: list[tuple[dict[str, Any], int]] = [
        ({"techniques": [quick, HEADS]}, 0),  # a technique, in front of the other
        ({"techniques": [HEADS, quick], "tasks": [{**PAIRS, "seed": 3, "label": "more"}, PAIRS]}, n),
        ({"techniques": [HEADS], "models": [GPT2, LLAMA]}, n),
    ]
    for more, new in grown:
        before = calls()
        report = study(tmp_path / "store", **more).run(progress=False)
        assert not report.failed
        assert calls() - before == new
    assert len(Path(tmp_path / "quick").read_text().splitlines()) == 2
    assert len(mk.Study.open(tmp_path / "store")) == 2  # as it was stated last
    everything = mk.Study.open(tmp_path / "store", stale=True, allow_code=True)
    assert len(everything) == 5
    assert len(everything.results()) == 5
    assert everything.run(progress=False).computed == 0
    assert study(tmp_path / "store").results().jobs == study(tmp_path / "store").jobs


def test_how_a_job_is_cut_is_settled_once(tmp_path, monkeypatch):
    calls = spied(monkeypatch, tmp_path / "log")
    study(tmp_path / "store").run(progress=False)
    n = calls()
    assert study(tmp_path / "store", shard=10**6, budget="64 MiB").run(progress=False).kept == n
    assert calls() == n


@pytest.mark.parametrize("what", ["weights", "prompts"])
def test_what_has_changed_is_computed_again(tmp_path, monkeypatch, what):
    calls = spied(monkeypatch, tmp_path / "log")
    file = tmp_path / "number"
    model, task = LLAMA, PAIRS
    if what == "weights":
        model = {**LLAMA, "name": "helpers.studies:llama_of_file", "path": str(file)}
    else:
        task = {"name": "helpers.studies:pairs_of_file", "path": str(file)}

    def run(number: str) -> mk.studies.RunReport:
        file.write_text(number)
        return study(tmp_path / "store", models=[model], tasks=[task]).run(progress=False)

    def result() -> mk.Result:
        return plain(study(tmp_path / "store", models=[model], tasks=[task]).results().result())

    def wanted(number: str) -> mk.Result:
        at = studies._model("llama", float(number) if what == "weights" else 1.0)
        pairs = studies.tiny_pairs(at, 4, int(number)) if what == "prompts" else studies.tiny_pairs(at, N)
        return mk.activation_patching(at, pairs, mk.logit_diff(pairs))

    first = run("1")
    n = calls()
    assert n == first.computed
    assert_same(result(), wanted("1"))
    assert run("1").kept == n  # the control
    second = run("2")
    assert calls() == 2 * n
    assert (second.computed, second.kept) == (n, 0)
    assert any(what in stored for stored in second.damage)
    assert_same(result(), wanted("2"))
    assert not torch.allclose(wanted("1").values, wanted("2").values)  # the control
    assert run("2").kept == n


def test_another_mechkit_reuses_nothing(tmp_path, monkeypatch):
    calls = spied(monkeypatch, tmp_path / "log")
    old = study(tmp_path / "store")
    old.jobs = tuple(replace(job, mechkit="0.0.0") for job in old.jobs)
    with pytest.raises(ValueError, match=r"jobs of mechkit 0\.0\.0"):
        old.run(progress=False)
    with monkeypatch.context() as then:
        then.setattr("mechkit.studies.study.__version__", "0.0.0")
        old.run(progress=False)
    n = calls()
    new = study(tmp_path / "store")
    assert len(new.results()) == 0
    assert new.run(progress=False).computed == n
    assert calls() == 2 * n
    assert len(new.results()) == 1
    assert {job.mechkit for job in mk.Study.open(tmp_path / "store").jobs} == {mk.__version__}
    assert {job.mechkit for job in mk.Study.open(tmp_path / "store", stale=True).jobs} == {"0.0.0", mk.__version__}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model in a folder, with a tokenizer of whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    build_hf("llama", torch.float32).save_pretrained(tmp_path / "model")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(D_VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_in_a_folder_is_not_loaded_when_all_is_done(folder, tmp_path, monkeypatch):
    stated = study(
        tmp_path / "store", models=[str(folder)], tasks=["repeated_tokens"], techniques=["attention_patterns"]
    )
    report = stated.run(progress=False)
    assert not report.failed
    monkeypatch.setattr(mk.HookedModel, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    assert stated.run(progress=False).kept == report.computed


def test_a_changed_config_is_computed_again(folder, tmp_path):
    def run() -> mk.studies.RunReport:
        return study(tmp_path / "store", models=[str(folder)], tasks=[PAIRS]).run(progress=False)

    first = run()
    assert not first.failed
    before = study(tmp_path / "store", models=[str(folder)], tasks=[PAIRS]).results().result()
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 0.5  # the same weights, other numbers
    (folder / "config.json").write_text(json.dumps(config))
    assert run().computed == first.computed
    after = plain(study(tmp_path / "store", models=[str(folder)], tasks=[PAIRS]).results().result())
    assert not torch.allclose(plain(before).values, after.values)


def test_changed_prompts_of_a_model_in_a_folder_are_noticed(folder, tmp_path):
    """The model's files are the same, and what the task makes is not."""
    file = tmp_path / "number"

    def run(number: str) -> mk.studies.RunReport:
        file.write_text(number)
        task = {"name": "helpers.studies:pairs_of_file", "path": str(file)}
        return study(tmp_path / "store", models=[str(folder)], tasks=[task]).run(progress=False)

    first = run("1")
    assert run("1").kept == first.computed
    assert run("2").computed == first.computed


# -- what fails --------------------------------------------------------------------------------------------------------


def test_what_fails_does_not_stop_the_rest(tmp_path):
    techniques = [
        {"name": "helpers.studies:always_fails", "log": str(tmp_path / "always"), "label": "always"},
        {"name": "helpers.studies:fails_once", "log": str(tmp_path / "once"), "times": 2, "label": "once"},
        {"name": "helpers.studies:not_a_result", "label": "nothing"},
        {"name": "helpers.studies:quick", "label": "quick"},
    ]
    tasks = [{"name": "helpers.studies:no_pairs", "label": "no"}, PAIRS]

    def again() -> mk.Study:
        return study(tmp_path / "store", techniques, tasks=tasks, retries=2)

    report = again().run(progress=False)
    assert report.computed == 2
    assert report.retried == 2 + 2 + 2
    failed = {"llama · pairs · always", "llama · pairs · nothing"} | {f"llama · no · {t['label']}" for t in techniques}
    assert set(report.failed) == failed
    assert "this technique always fails" in report.failed["llama · pairs · always"]
    assert "to give a Result, got int" in report.failed["llama · pairs · nothing"]
    assert "this task cannot be made" in report.failed["llama · no · quick"]
    assert "this technique always fails" in str(report)
    state = again().status()
    assert {str(one.job): one.state for one in state.jobs if one.state != "failed"} == {
        "llama · pairs · once": "done",
        "llama · pairs · quick": "done",
    }
    assert {str(one.job) for one in state.failed} == failed
    assert "this technique always fails" in str(state)
    assert [job.labels[2] for job in again().results().jobs] == ["once", "quick"]
    assert len((tmp_path / "always").read_text().splitlines()) == 3
    second = again().run(progress=False)  # tries again, and what is done is done
    assert (second.computed, second.kept) == (0, 2)
    assert len((tmp_path / "always").read_text().splitlines()) == 6
    assert len((tmp_path / "once").read_text().splitlines()) == 3


def test_what_failed_and_then_works_is_no_failure_any_more(tmp_path):
    once = {"name": "helpers.studies:fails_once", "log": str(tmp_path / "once"), "label": "once"}
    stated = study(tmp_path / "store", [once])
    assert stated.run(progress=False).failed
    assert stated.status().jobs[0].state == "failed"
    assert not stated.run(progress=False).failed
    assert stated.status().jobs[0].state == "done"
    assert not list((tmp_path / "store" / "failed").rglob("*.json"))


def test_a_plan_that_failed_and_then_works_is_no_failure_any_more(tmp_path):
    file = tmp_path / "number"  # not there yet: the task raises
    task = {"name": "helpers.studies:pairs_of_file", "path": str(file)}
    interrupted = {"name": "helpers.studies:interrupts", "log": str(tmp_path / "log")}
    stated = study(tmp_path / "store", [interrupted], tasks=[task])
    assert "number" in next(iter(stated.run(progress=False).failed.values()))
    assert stated.status().jobs[0].state == "failed"
    file.write_text("1")
    with pytest.raises(KeyboardInterrupt):
        stated.run(progress=False)
    assert stated.status().jobs[0].state == "waiting"
    assert stated.run(progress=False).computed == 1


@pytest.mark.parametrize("lost", [(1, 6), (4,)], ids=["cells", "the shard with the baselines"])
def test_results_in_part(tmp_path, monkeypatch, lost):
    row = registry.TECHNIQUES["activation_patching"]
    seen: list[int] = []

    def breaks(model: mk.HookedModel, *args: Any, **given: Any) -> mk.Result:
        seen.append(len(seen))
        if seen[-1] in lost:
            raise RuntimeError("planted")
        return row.function(model, *args, **given)

    breaks.__wrapped__ = row.function  # type: ignore[attr-defined]
    monkeypatch.setitem(registry.TECHNIQUES, "activation_patching", replace(row, function=breaks))
    stated = study(tmp_path)
    report = stated.run(progress=False)
    assert (report.computed, len(report.failed)) == (8 - len(lost), 1)
    assert len(stated.results()) == 0
    assert len(stated.results().missing) == 1
    found = plain(stated.results(partial=True).result())
    pairs = studies.tiny_pairs(studies.tiny_llama(), N)
    wanted = plain(direct(stated.jobs[0], studies.tiny_llama(), pairs))
    gone = torch.zeros_like(wanted.values, dtype=torch.bool)
    order = json.loads((tmp_path / "jobs" / f"{stated.jobs[0].id}.json").read_text())["plan"]["order"]
    for shard in lost:  # three prompts and then two; a layer at a time
        prompts, layer = order[:3] if shard < 4 else order[3:], shard % 4
        gone[slice(None) if shard == 4 else layer, :, prompts] = True  # without baselines, none of its prompts' values
    assert torch.equal(found.values.isnan(), gone)
    torch.testing.assert_close(found.values[~gone], wanted.values[~gone], atol=1e-10, rtol=0)
    assert found.provenance["study"]["finished"] == 8 - len(lost)
    frame = stated.results(partial=True).to_dataframe()
    assert (len(frame), int(frame["value"].isna().sum())) == (gone.numel(), int(gone.sum()))
    one = stated.status().jobs[0]
    assert (one.state, one.done, one.shards) == ("failed", 8 - len(lost), 8)
    assert stated.run(progress=False).computed == len(lost)
    assert_same(stated.results().result(), wanted)


def test_running_out_of_memory_halves_the_budget(tmp_path, monkeypatch):
    row, seen = registry.TECHNIQUES["activation_patching"], []
    monkeypatch.setitem(
        registry.TECHNIQUES,
        "activation_patching",
        replace(row, function=studies.out_of_memory(row.function, 3, seen)),
    )
    stated = study(tmp_path, budget=2**24)
    report = stated.run(progress=False)
    assert (report.failed, report.retried) == ({}, 0)
    assert seen[:4] == [2**24, 2**23, 2**22, 2**21]
    assert set(seen[4:]) == {2**21}  # and not up again
    assert len(seen) == report.computed + 3
    pairs = studies.tiny_pairs(studies.tiny_llama(), N)
    assert_same(stated.results().result(), mk.activation_patching(studies.tiny_llama(), pairs, mk.logit_diff(pairs)))


def test_running_out_of_memory_for_ever_is_a_failure(tmp_path, monkeypatch):
    row, seen = registry.TECHNIQUES["activation_patching"], []
    monkeypatch.setitem(
        registry.TECHNIQUES,
        "activation_patching",
        replace(row, function=studies.out_of_memory(row.function, 10**6, seen)),
    )
    stated = study(tmp_path, [HEADS, "helpers.studies:quick"], budget=2**23, shard=10**6)
    report = stated.run(progress=False)
    assert seen == [2**23, 2**22, 2**21, 2**20]
    assert list(report.failed) == ["llama · pairs · heads"]
    assert "out of memory" in report.failed["llama · pairs · heads"]
    assert report.computed == 1


def test_another_error_halves_nothing(tmp_path, monkeypatch):
    """The control."""
    row, seen = registry.TECHNIQUES["activation_patching"], []

    def breaks(model: mk.HookedModel, *args: Any, budget: int, **given: Any) -> mk.Result:
        seen.append(budget)
        raise RuntimeError("shapes do not fit")

    breaks.__wrapped__ = row.function  # type: ignore[attr-defined]
    monkeypatch.setitem(registry.TECHNIQUES, "activation_patching", replace(row, function=breaks))
    assert study(tmp_path, budget=2**23, shard=10**6, retries=2).run(progress=False).failed
    assert seen == [2**23] * 3


# -- the study's own ways ----------------------------------------------------------------------------------------------


def test_only(tmp_path):
    techniques = [{"name": "helpers.studies:quick", "label": label, "log": str(tmp_path / label)} for label in "abc"]
    stated = study(tmp_path / "store", techniques)
    assert stated.run(only={"technique": "b"}, progress=False).computed == 1
    assert [one.state for one in stated.status().jobs] == ["waiting", "done", "waiting"]
    assert stated.run(only={"technique": ["a", "b"], "model": "llama"}, progress=False).computed == 1
    assert [one.state for one in stated.status().jobs] == ["done", "done", "waiting"]
    assert len(mk.Study.open(tmp_path / "store", allow_code=True)) == 3  # the manifest has them all
    with pytest.raises(ValueError, match="only: expected what fits a job"):
        stated.run(only={"technique": "d"}, progress=False)
    assert stated.run(progress=False).computed == 1


def test_opening_a_store(tmp_path):
    stated = study(tmp_path / "store", [HEADS, "composition_scores"], name="mine")
    stated.run(progress=False)
    opened = mk.Study.open(tmp_path / "store", allow_code=True)
    assert [(job.id, job.labels) for job in opened.jobs] == [(job.id, job.labels) for job in stated.jobs]
    assert opened.name == "mine"
    assert_same(opened.results().result(technique="heads"), stated.results().result(technique="heads"), exact=True)
    assert opened.run(progress=False).computed == 0
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["name"] == "mine"
    looked_at = mk.Study.open(tmp_path / "store")  # what is code may be looked at, and not run
    assert len(looked_at.results()) == looked_at.status().count("done") == 2
    with pytest.raises(ValueError, match=r"helpers.studies:tiny_llama.*code"):
        looked_at.run(progress=False)
    for nothing in (tmp_path / "empty", tmp_path):
        with pytest.raises(ValueError, match="there is none"):
            mk.Study.open(nothing, allow_code=True)
    assert not (tmp_path / "empty").exists()


def test_states(tmp_path, monkeypatch):
    monkeypatch.setattr(_run, "BEAT_EVERY", 0.02)
    row = registry.TECHNIQUES["activation_patching"]
    seen: list[Any] = []

    def looks(model: mk.HookedModel, *args: Any, **given: Any) -> mk.Result:
        shard = (("llama · pairs · heads", len(seen)),)
        studies.wait_for(lambda: mk.Study.open(tmp_path / "store", allow_code=True).status().running == shard)
        seen.append(mk.Study.open(tmp_path / "store", allow_code=True).status())
        return row.function(model, *args, **given)

    looks.__wrapped__ = row.function  # type: ignore[attr-defined]
    monkeypatch.setitem(registry.TECHNIQUES, "activation_patching", replace(row, function=looks))
    stated = study(tmp_path / "store", [HEADS, "helpers.studies:quick"])
    assert [one.state for one in stated.status().jobs] == ["waiting", "waiting"]
    assert stated.status().seconds_left is None
    assert not (tmp_path / "store").exists()
    n = stated.run(progress=False).computed - 1
    assert len(seen) == n
    assert all(one.at_work for one in seen)
    assert [one.jobs[0].state for one in seen] == ["running"] * n
    assert [one.jobs[0].done for one in seen] == list(range(n))
    assert [one.running for one in seen] == [(("llama · pairs · heads", i),) for i in range(n)]
    assert all(one.jobs[0].shards == n for one in seen)
    assert seen[0].seconds_left is None
    assert all(one.seconds_left > 0 for one in seen[1:])
    last = stated.status(verify=True)
    assert [one.state for one in last.jobs] == ["done", "done"]
    assert (last.at_work, last.running, last.seconds_left, last.shards) == (False, (), 0.0, (n + 1, n + 1))
    assert "2 jobs: 2 done" in str(last)


def test_a_store_under_a_url(tmp_path):
    import fsspec

    url = f"memory://{uuid.uuid4().hex}/study"
    stated = study(url, [HEADS, "composition_scores"])
    first = stated.run(progress=False)
    assert not first.failed
    pairs = studies.tiny_pairs(studies.tiny_llama(), N)
    assert_same(stated.results().result(technique="heads"), direct(stated.jobs[0], studies.tiny_llama(), pairs))
    assert study(url, [HEADS, "composition_scores"]).run(progress=False).kept == first.computed
    sizes = [plain(found).values.numel() for _, found in stated.results().results()]
    assert len(mk.Study.open(url, allow_code=True).results().to_dataframe()) == sum(sizes)
    memory, root = fsspec.core.url_to_fs(url)
    chunk = next(path for path in memory.find(root) if f"{stated.jobs[0].id}/values/c/" in path)
    data = bytearray(memory.cat_file(chunk))
    data[3] ^= 1
    memory.pipe_file(chunk, bytes(data))
    with pytest.raises(ValueError, match="Run the study again"):
        stated.results().result(technique="heads")
    third = stated.run(progress=False)
    assert (third.computed, third.kept) == (1, first.computed - 1)
    assert len(third.damage) == 2  # the chunk, and the record of the shard
    assert_same(stated.results().result(technique="heads"), direct(stated.jobs[0], studies.tiny_llama(), pairs))
    assert stated.status(verify=True).count("done") == 2


def test_two_studies_in_one_store(tmp_path, monkeypatch):
    calls = spied(monkeypatch, tmp_path / "log")
    one = study(tmp_path / "store", [HEADS, {"name": "helpers.studies:quick", "label": "quick"}])
    other = [{**HEADS, "label": "the same"}, {"name": "composition_scores", "label": "weights"}]
    two = study(tmp_path / "store", other, name="two")
    one.run(progress=False)
    n = calls()
    assert two.run(progress=False).kept == n  # the same job, under another label
    assert calls() == n
    assert [job.labels[2] for job in one.results().jobs] == ["heads", "quick"]
    assert [job.labels[2] for job in two.results().jobs] == ["the same", "weights"]
    assert_same(one.results().result(technique="heads"), two.results().result(technique="the same"), exact=True)
    assert {job.labels[2] for job in mk.Study.open(tmp_path / "store", allow_code=True).jobs} >= {"quick", "weights"}
    assert len(mk.Study.open(tmp_path / "store", allow_code=True)) == 3


def test_models_at_hand(tmp_path):
    model = studies.tiny_gpt2()
    stated = study(tmp_path, models=[{"name": "at-hand", "dtype": "float64"}])
    assert not stated.run(mk.studies.InProcess(loaded={"at-hand": model}), progress=False).failed
    assert_same(stated.results().result(), direct(stated.jobs[0], model, studies.tiny_pairs(model, N)))
    wrong = study(tmp_path / "other", models=["at-hand"])
    report = wrong.run(mk.studies.InProcess(loaded={"at-hand": model}), progress=False)
    assert "stated as float32, and is torch.float64" in next(iter(report.failed.values()))
