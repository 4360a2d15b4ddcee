"""The command line: every command, every exit code, and what Ctrl-C leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from filelock import FileLock
from typer.testing import CliRunner

import mechkit as mk
from helpers import studies
from helpers.families import D_VOCAB
from mechkit import cli, hooks
from mechkit.experiment.forecast import block_tokens
from mechkit.studies import InProcess, Processes, Ray
from mechkit.studies import _registry as registry

ROOT = Path(__file__).parents[2]
STUDY = """
store = "store"
retries = 0

[[model]]
name = "helpers.studies:tiny_llama"
label = "tiny"
dtype = "float64"

[[task]]
name = "helpers.studies:tiny_pairs"
label = "pairs"
n = 4
grid.seed = [0, 1]

[[technique]]
name = "activation_patching"
layers = [1, 2]

[[technique]]
name = "edge_attribution"
steps = 1
tasks = ["pairs seed=0"]

[[technique]]
name = "head_scores"
n = 2
length = 6
"""
BROKEN = '\n[[technique]]\nname = "helpers.studies:always_fails"\n'


def call(*arguments: str | Path, code: int = 0) -> str:
    """What a command prints on both streams; fails if it ends with another exit code."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def study(tmp_path: Path) -> Path:
    file = tmp_path / "study.toml"
    file.write_text(STUDY)
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was run; look, do not touch."""
    file = tmp_path_factory.mktemp("finished") / "study.toml"
    file.write_text(STUDY)
    call("run", file, "--allow-code", "--quiet")
    return file


# -- help --------------------------------------------------------------------------------------------------------------


def test_help_and_version():
    assert call("--version") == f"mechkit {mk.__version__}\n"
    shown = call("--help")
    for command in ("run", "status", "results", "info", "techniques"):
        assert command in shown
        assert "--help" in call(command, "--help")
    assert "Usage" in call(code=2)
    assert "No such command" in call("fly", code=2)


def test_the_help_imports_little():
    """What models and studies need is imported by the commands that use them, so that `mechkit --help` answers at once."""
    probe = "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    heavy = {
        "torch",
        "transformers",
        "numpy",
        "zarr",
        "pydantic",
        "pyarrow",
        "pandas",
        "plotly",
        "transformer_lens",
        "ray",
    }
    show = "mechkit.cli.app(['--help'], standalone_mode=False)"
    code = f"import sys, mechkit.cli; {show}; {probe}; import mechkit.studies; {probe}"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *_, before, after = (set(line.split()) for line in run.stdout.splitlines())
    assert "typer" in before
    assert before & heavy == set()
    assert {"torch", "pydantic"} <= after  # the probe sees


def test_techniques_are_the_registry():
    shown = call("techniques")
    for name in (*registry.TECHNIQUES, *registry.TASKS, *registry.METRICS):
        assert f" {name} " in shown
    assert "direction='denoise'" in shown
    assert "budget" not in shown  # what a study cannot set is not offered


# -- run, status, results ----------------------------------------------------------------------------------------------


def test_run_then_run_again(study):
    assert "4 shards computed, 0 kept" in call("run", study, "--allow-code")
    assert "0 shards computed, 4 kept" in call("run", study, "--allow-code")
    assert call("run", study, "--allow-code", "--quiet") == ""
    assert studies.records(study.parent / "store") != []


def test_only_and_another_store(study, tmp_path):
    other = tmp_path / "other"
    output = call(
        "run", study, "--allow-code", "--store", other, "--only", "technique=activation_patching", "--only", "seed=1"
    )
    assert "1 shards computed" in output
    assert not (tmp_path / "store").exists()
    found = json.loads(call("status", study, "--allow-code", "--store", other, "--json"))
    assert [job["state"] for job in found["jobs"]] == ["waiting", "done", "waiting", "waiting"]
    assert "jobs are pairs" not in call("run", study, "--allow-code", "--only", "seed=7", code=2)


def test_status(finished, study):
    table = call("status", finished, "--allow-code")
    assert table.count(" done ") >= 4
    assert "4 jobs: 4 done\n4 of 4 shards finished" in table
    assert call("status", finished.parent / "store") == table  # a store alone will do
    assert "4 of 4 shards finished" in call("status", finished, "--allow-code", "--verify")
    assert "4 of 4 shards finished" in call("status", finished, "--allow-code", "--watch")  # all is done: it ends
    found = json.loads(call("status", finished.parent / "store", "--json"))
    assert (found["shards_done"], found["shards_known"], found["at_work"], found["seconds_left"]) == (4, 4, False, 0.0)
    assert found["jobs"][0]["model"] == "tiny"
    assert found["jobs"][0]["task"] == "pairs seed=0"
    assert "4 waiting" in call("status", study, "--allow-code")  # the control: nothing was run here


def test_verify_sees_what_status_does_not(study):
    call("run", study, "--allow-code", "--quiet")
    store = study.parent / "store"
    name, data = next(iter(studies.chunks(store).items()))
    (store / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert "4 of 4 shards" in call("status", store)
    assert "3 of 4 shards" in call("status", store, "--verify")


def test_results_are_summed_up(finished):
    shown = call("results", finished, "--allow-code")
    whole = mk.Study.open(finished.parent / "store").results()
    patched = whole.result(technique="activation_patching", seed=0)
    for cell in patched.mean("prompt").top(3):
        assert f"{cell.label} {cell.value:.4g} ({cell.effect:+.4g})" in shown
    for edge in whole.result(technique="edge_attribution").top(3):
        assert f"{edge.name} {edge.score:+.4g}" in shown
    for cell in whole.result(technique="head_scores").top(3):
        assert f"{cell.label} {cell.value:.4g}" in shown
    chosen = call("results", finished.parent / "store", "--only", "seed=1")
    assert "pairs seed=1" in chosen
    assert "pairs seed=0" not in chosen


def test_results_are_written(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = finished.parent / "store"
    expected = mk.Study.open(store).results().to_dataframe()
    assert "study.parquet: 4 jobs" in call("results", finished, "--allow-code", "--to", "parquet")
    columns = ["task", "technique", "prompt", "layer", "head", "writer", "reader", "value"]
    written = pd.read_parquet("study.parquet")[columns]
    pd.testing.assert_frame_equal(
        written, expected[columns], check_dtype=False, check_categorical=False, check_exact=True
    )
    assert "store.csv: 4 jobs" in call("results", store, "--to", "csv")
    values = pd.read_csv("store.csv", dtype={"value": str})["value"].astype(float)  # pandas rounds as it reads numbers
    pd.testing.assert_series_equal(values, expected["value"], check_exact=True)
    call("results", store, "--to", "csv", "--out", "new/some.csv", "--only", "technique=head_scores")
    assert set(pd.read_csv("new/some.csv")["technique"]) == {"head_scores"}


def test_a_job_that_fails(study):
    study.write_text(STUDY + BROKEN)
    output = call("run", study, "--allow-code", code=1)
    assert "4 shards computed" in output
    assert "this technique always fails" in output
    assert "this technique always fails" in call("run", study, "--allow-code", "--quiet", code=1)
    shown = call("status", study, "--allow-code")
    assert "6 jobs: 4 done, 2 failed" in shown
    assert "this technique always fails" in shown
    assert "2 of 6 jobs are not finished" in call("results", study, "--allow-code")


def test_nothing_is_finished_yet(study):
    assert "4 of 4 jobs are not finished" in call("results", study, "--allow-code", code=1)
    assert "4 of 4 jobs" in call(
        "results", study, "--allow-code", "--to", "csv", "--out", study.parent / "x.csv", code=1
    )
    assert not (study.parent / "x.csv").exists()


def test_the_example_is_a_study():
    study = mk.Study.from_toml(ROOT / "examples" / "study.toml")
    assert len(study) == 9
    assert Path(study.store.url).resolve() == ROOT / "out" / "study"


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_bad_files(study, tmp_path):
    assert "there is no such file" in call("run", tmp_path / "none.toml", code=2)
    assert "name the study's file" in call("run", tmp_path, code=2)
    for command in ("run", "status", "results"):
        assert "allow it (--allow-code" in call(command, study, code=2)
    study.write_text("[[model]")
    assert "expected TOML" in call("run", study, code=2)
    study.write_text('[[model]]\nname = "gpt2"\n\n[[technique]]\nname = "activation_patchin"\n')
    output = call("run", study, code=2)
    assert "line 5" in output
    assert "did you mean 'activation_patching'?" in output
    assert not (tmp_path / "study.study").exists()


def test_a_model_that_is_not_there(study, tmp_path):
    study.write_text(STUDY.replace('name = "helpers.studies:tiny_llama"', 'name = "./nowhere"'))
    assert "there is no such folder" in call("run", study, "--allow-code", code=2)
    assert "there is no such folder" in call("info", tmp_path / "nowhere", code=2)


def test_stores_that_cannot_be_used(study, finished, tmp_path):
    (tmp_path / "store").mkdir()
    with FileLock(tmp_path / "store" / "lock"):
        assert "is at work on it" in call("run", study, "--allow-code", code=2)
    assert "expected a study in" in call("status", tmp_path, code=2)
    store = finished.parent / "store"
    assert "give one of them" in call("status", store, "--store", tmp_path, code=2)
    (tmp_path / "file").write_text("")
    assert "could not write" in call("run", study, "--allow-code", "--store", tmp_path / "file", code=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2"], "expected --executor processes"),
        (["--address", "auto"], "expected --executor ray"),
        (["--executor", "processes", "--workers", "3", "--device", "cpu"], "expected one for each --device"),
        (["--executor", "ray", "--device", "cuda:0"], "leave --device out"),
        (["--only", "task"], "expected KEY=VALUE"),
        (["--only", "seed=0", "--only", "seed=1"], "each key once"),
        (["--executor", "threads"], "threads"),
        (["--workers", "0"], "workers"),
    ],
)
def test_options_that_do_not_go_together(options, message, study):
    assert message in call("run", study, "--allow-code", *options, code=2)


def test_options_of_other_commands_that_do_not_go_together(finished, tmp_path):
    store = finished.parent / "store"
    assert "--watch or --json" in call("status", store, "--watch", "--json", code=2)
    assert "--out" in call("results", store, "--out", tmp_path / "x.csv", code=2)
    assert "expected one of 0, 1" in call("results", store, "--only", "seed=7", code=2)


def test_executors():
    assert isinstance(cli._executor(cli.Kind("in-process"), None, None, []), InProcess)
    assert cli._executor(cli.Kind("in-process"), 1, None, ["cpu"]).device == "cpu"
    two = cli._executor(cli.Kind("processes"), None, None, ["cpu", "cpu"])
    assert isinstance(two, Processes)
    assert two.devices == ["cpu", "cpu"]
    with pytest.raises(ValueError, match="device: expected"):
        cli._executor(cli.Kind("processes"), None, None, ["cuda:98", "cuda:99"])
    assert cli._executor(cli.Kind("processes"), 3, None, []).devices == ["cpu"] * 3
    pytest.importorskip("ray")
    cluster = cli._executor(cli.Kind("ray"), 4, "ray://head:10001", [])
    assert isinstance(cluster, Ray)
    assert (cluster.address, cluster.n_workers) == ("ray://head:10001", 4)


def test_only_is_json_but_names_are_text():
    given = [
        "seed=0",
        "site=z",
        "layers=[1,2]",
        "job=1234567890123456",
        "task=2024",
        'technique=["a","b"]',
        "metric=null",
    ]
    names = {"job": "1234567890123456", "task": "2024", "technique": ["a", "b"], "metric": None}
    assert cli._only(given) == {"seed": 0, "site": "z", "layers": [1, 2], **names}
    assert cli._only(None) is None


def test_labels_are_no_markup(study):
    study.write_text(STUDY.replace('label = "tiny"', 'label = "[red]tiny[/red] :smile:"'))
    assert "[red]tiny[/red] :smile:" in call("status", study, "--allow-code")


# -- info --------------------------------------------------------------------------------------------------------------


def differing_pairs(n: int, length: int) -> mk.PromptPairs:
    clean = torch.randint(3, D_VOCAB, (n, length), generator=torch.Generator().manual_seed(0))
    return mk.PromptPairs.from_tokens(clean, 3 + (clean - 2) % (D_VOCAB - 3), [(5, 7)] * n)


@pytest.mark.parametrize(("site", "over"), cli.SWEEPS)
@pytest.mark.parametrize("n", [1, 3])
def test_block_tokens_are_what_a_sweep_counts(site, over, n):
    model, pairs = studies.tiny_llama(), differing_pairs(n, 7)
    result = mk.activation_patching(model, pairs, mk.logit_diff(pairs), site=site, over=over, progress=False)
    assert result.provenance["replay"] == "suffix"
    rows = result.cost.block_tokens - result.cost.proof_block_tokens
    assert rows == block_tokens(model.n_layers, model.n_heads, over, n, 7)


def test_info(monkeypatch):
    model = studies.tiny_llama()
    asked = {}

    def load(name, **given):
        asked.update(name=name, **given)
        return model

    monkeypatch.setattr(hooks, "find_model", lambda name, **given: None)
    monkeypatch.setattr(mk.HookedModel, "from_pretrained", load)
    output = call("info", "some/model", "--prompts", "3", "--length", "7", "--dtype", "float64", "--revision", "abc")
    which = {"revision": "abc", "trust_remote_code": False}
    assert asked == {"name": "some/model", "device": None, "dtype": torch.float64, **which}
    parameters = sum(p.numel() for p in model.bridge.original_model.parameters())
    assert f"{parameters:,} parameters, {parameters * 8 / 1024:.4g} KiB" in output
    assert "4 layers of 4 heads (2 key-value heads); d_model 32" in output
    for site in model.sites:
        assert f" {hooks.SITES[site].hook} " in output
    assert "[prompts, 7, 2, 8]" in output  # k: of key-value heads
    recorded = (4 + 1 + 1) * 7 * 32 + 4 * 2 * 7 * 2 * 8 + 4 * 7 * 4 * 8  # streams of both runs, keys and values, z
    pairs = differing_pairs(3, 7)
    for site, over in cli.SWEEPS:
        cost = mk.activation_patching(model, pairs, mk.logit_diff(pairs), site=site, over=over, progress=False).cost
        row = next(
            line.split()
            for line in output.splitlines()
            if line.split()[: 1 + len(over.split())] == [site, *over.split()]
        )
        assert row[-3:-1] == [f"{cost.block_tokens - cost.proof_block_tokens:,}", f"{cost.naive_block_tokens:,}"]
        assert row[-5:-3] == [f"{recorded * 8 / 1024:.4g}", "KiB"]
    assert not model.has_hooks


def test_info_refuses_what_the_model_cannot_read(monkeypatch):
    monkeypatch.setattr(hooks, "find_model", lambda name, **given: None)
    monkeypatch.setattr(mk.HookedModel, "from_pretrained", lambda name, **given: studies.tiny_gpt2())
    assert "expected at most 64 tokens" in call("info", "gpt2", "--length", "65", code=2)


def test_info_foresees_a_sweep_without_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(mk.HookedModel, "from_pretrained", lambda *_, **__: pytest.fail("loads the model"))
    studies.tiny_llama().bridge.original_model.config.save_pretrained(tmp_path)
    sweep = [
        "--sweep",
        "z over layer head",
        "--prompts",
        "3",
        "--length",
        "7",
        "--first-difference",
        "2",
        "--device",
        "cpu",
    ]
    output = call("info", tmp_path, *sweep, "--budget", "2 MiB", "--rate", "50", "--dtype", "bfloat16")
    rows = 3 * 4 * (4 + 3 + 2 + 1) * 5
    assert f"block-tokens: {168 + rows:,} (168 for unedited runs, {rows:,} for rows)" in output
    assert "at 50 GFLOP/s" in output
    assert "the budget is 2 MiB" in output
    assert "GFLOP/s" not in call("info", tmp_path, *sweep)
    assert "sweep: expected SITE over AXES" in call("info", tmp_path, "--sweep", "z", code=2)
    assert "budget: expected bytes" in call("info", tmp_path, *sweep, "--budget", "much", code=2)


def test_bytes():
    assert [cli._bytes(n) for n in (7, 1023, 1024, 1536 * 2**20, 2**52)] == [
        "7 B",
        "1023 B",
        "1 KiB",
        "1.5 GiB",
        "4096 TiB",
    ]


# -- the real thing ----------------------------------------------------------------------------------------------------


def test_ctrl_c_and_going_on(tmp_path):
    """A study in a process of its own is interrupted, and goes on from there: what was finished is not run again."""
    log, gate, file = tmp_path / "log", tmp_path / "gate", tmp_path / "slow.toml"
    head = STUDY.partition("[[technique]]")[0].replace("grid.seed = [0, 1]", f"grid.seed = {list(range(8))}")
    technique = f'name = "helpers.studies:waits"\nlog = "{log}"\ngate = "{gate}"\nfree = 2\n'
    file.write_text(f"{head}[[technique]]\n{technique}")
    command = [sys.executable, "-m", "mechkit", "run", str(file), "--allow-code"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    begun = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
    )
    try:
        until = time.monotonic() + 120
        while studies.lines(log) < 3:  # the third call waits
            assert begun.poll() is None, begun.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        assert json.loads(call("status", tmp_path / "store", "--json"))["at_work"]
        begun.send_signal(signal.SIGINT)
        out, err = begun.communicate(timeout=60)
    finally:
        begun.kill()
    assert begun.returncode == 130, err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert "computed" not in out
    kept = len(studies.records(tmp_path / "store"))
    assert kept == 2
    assert not json.loads(call("status", tmp_path / "store", "--json"))["at_work"]
    assert studies.lines(log) == 3  # only the shard that was being computed is lost
    gate.touch()
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert f"{8 - kept} shards computed, {kept} kept" in again.stdout
    assert studies.lines(log) == 3 + 8 - kept
    assert "8 jobs: 8 done" in call("status", tmp_path / "store")
