"""`benchmarks/gpu/sweeps.py`: it runs on a CPU, its shapes are the published ones, and what it computes is right."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mechkit as mk

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks/gpu"
CASE = {"shape": "tiny", "dtype": "float64", "sweep": "head", "prompts": 12, "kind": "sweep"}


@pytest.fixture(scope="module")
def gpu() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("sweeps")


@pytest.fixture(scope="module")
def model(gpu: Any) -> mk.HookedModel:
    return mk.HookedModel.from_hf(gpu.build_hf("tiny", "cpu", torch.float64), name="tiny")


@pytest.fixture
def args(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(device="cpu", budget=None, repeats=1, count=32, profile=tmp_path / "trace.json")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of one run as a user starts it. TransformerLens takes three prompts at a time, and then a smaller batch."""
    into = tmp_path_factory.mktemp("gpu") / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "sweeps.py"), "--device", "cpu", "--shapes", "tiny", "--prompts", "4"]
    command += [
        "--dtypes",
        "float32",
        "--libraries",
        "mechkit",
        "transformer_lens",
        "--peer-batch",
        "3",
        "--json",
        str(into),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| tiny | float32 | head | 4 | 12 |" in done.stdout
    return json.loads(into.read_text())


@pytest.mark.parametrize(
    ("shape", "parameters", "heads", "kv_heads"),
    [
        ("gpt2", 124_439_808, 12, 12),
        ("gpt2-xl", 1_557_611_200, 25, 25),
        ("llama-3.2-1b", 1_235_814_400, 32, 8),
        ("llama-3.1-8b", 8_030_261_248, 32, 8),
    ],
)
def test_shapes_are_the_published_ones(gpu, shape, parameters, heads, kv_heads):
    hf = gpu.build_hf(shape, "meta", torch.bfloat16)
    assert hf.num_parameters() == parameters
    assert {p.dtype for p in hf.parameters()} == {torch.bfloat16}
    assert hf.config.num_attention_heads == heads
    assert getattr(hf.config, "num_key_value_heads", heads) == kv_heads


def test_report_has_the_figures(report):
    (case,) = report["cases"]
    ours = case["libraries"]["mechkit"]
    assert {key: case[key] for key in ("shape", "dtype", "sweep", "prompts")} == {
        "shape": "tiny",
        "dtype": "float32",
        "sweep": "head",
        "prompts": 4,
    }
    positive = (
        "seconds_first seconds block_tokens block_tokens_a_second tflop tflops rate gib_before peak_gib spread cells"
    )
    for key in positive.split():
        assert ours[key] > 0, key
    assert ours["replay"] == "suffix"
    assert ours["cells"] == 12
    assert len(ours["seconds_each"]) == 3
    assert len(ours["matmul_tflops"]) == 2
    assert ours["block_tokens"] < ours["naive_block_tokens"] == 12 * 4 * 15 * 3
    assert ours["count_check"] == 0
    assert report["torch"] == torch.__version__
    assert report["device"]


def test_values_equal_transformer_lens(report):
    theirs = report["cases"][0]["libraries"]["transformer_lens"]
    assert "error" not in theirs
    assert theirs["cells_run"] == theirs["cells"] == 12
    assert theirs["batch"] == 3
    assert theirs["times_mechkit"] > 0
    assert theirs["relative_difference"] < 1e-4


def test_a_difference_is_reported(gpu):
    ours = {"values": [1.0, 3.0, 5.0], "seconds": 2.0}
    theirs = {"values": {"0": 1.0, "2": 5.5}, "seconds": 6.0}
    found = gpu.compare({"mechkit": ours, "transformer_lens": theirs, "nnsight": {"error": "none"}})["libraries"]
    assert found["transformer_lens"] == {
        "seconds": 6.0,
        "times_mechkit": 3.0,
        "largest_difference": 0.5,
        "relative_difference": pytest.approx(0.5 / (8 / 3) ** 0.5),
    }
    assert found["nnsight"] == {"error": "none"}


def test_prompts_differ_in_one_token(gpu):
    pairs, again = gpu.random_pairs(17, 200), gpu.random_pairs(17, 200)
    clean, corrupted = (torch.stack(p.tokens) for p in (pairs.clean, pairs.corrupted))
    assert clean.shape == (200, 15)
    assert (clean != corrupted).nonzero()[:, 1].tolist() == [10] * 200
    assert all(right != wrong for right, wrong in pairs.answers)
    assert (pairs.clean.hash(), pairs.corrupted.hash()) == (again.clean.hash(), again.corrupted.hash())


@pytest.mark.parametrize("sweep", ["head", "position-head"])
def test_arithmetic_is_extrapolated_from_fewer_prompts(gpu, model, args, sweep):
    pairs = gpu.random_pairs(model.d_vocab, 40)
    run = gpu.sweep_of(CASE | {"sweep": sweep}, args, model, pairs)
    block_tokens = run().cost.block_tokens
    counted, exact = gpu.count(run, 40, 40, block_tokens)
    extrapolated, error = gpu.count(run, 40, 16, block_tokens)
    assert exact == 0
    assert error == 0
    assert counted > 0
    # Of block-tokens it is exact; short rows are padded within attention, by how much depends on where batches are cut.
    assert extrapolated == pytest.approx(counted, rel=1e-12 if sweep == "head" else 0.03)
    assert gpu.count(run, 40, 16, 2 * block_tokens)[1] == pytest.approx(-0.5)  # a wrong line is reported


def test_profile(gpu, model, args):
    classes = {type(module) for module in model.bridge.modules()} | {type(model)}
    before = {cls: dict(vars(cls)) for cls in classes}
    sweep = gpu.sweep_of(CASE, args, model, gpu.random_pairs(model.d_vocab, 12))
    found = gpu.profile("cpu", args.profile, model, sweep)
    assert {cls: dict(vars(cls)) for cls in classes} == before
    assert found["replay"] == "suffix"
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert all(found["shares"][part] > 0 for part in ("attention", "MLP", "norms", "unembed", "elsewhere"))
    assert "aten::bmm" in found["top"]
    assert "part: attention" in {event.get("name") for event in json.loads(args.profile.read_text())["traceEvents"]}


def test_marks_are_taken_off_after_an_error(gpu, model):
    mlp = type(model.bridge.blocks[0].mlp)
    before = mlp.forward
    seen = []

    def fail() -> None:
        with sys.modules["time_by_part"].marked(model):
            seen.append(mlp.forward)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert seen[0] is not before
    assert mlp.forward is before


def test_a_model_that_does_not_fit_is_refused(gpu):
    with pytest.raises(SystemExit, match=r"its weights take 29\.9 GiB, 8\.0 GiB are free"):
        gpu.check_fits("llama-3.1-8b", torch.float32, 8 * 2**30)
    gpu.check_fits("llama-3.1-8b", torch.bfloat16, 16 * 2**30)


def test_a_batch_is_halved_until_it_fits(gpu):
    tried = []

    def run(size: int) -> None:
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert sys.modules["peer_sweeps"].fitting_batch(10, run) == 3
    assert tried == [10, 5, 3]
    with pytest.raises(torch.OutOfMemoryError):
        sys.modules["peer_sweeps"].fitting_batch(1, lambda size: run(4))
    with pytest.raises(ValueError, match="another"):
        sys.modules["peer_sweeps"].fitting_batch(4, lambda size: int("another"))


def test_a_worker_that_fails_leaves_a_reason(gpu, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweeps.py", "--shapes", "none"])
    assert "invalid choice: 'none'" in gpu.run_worker(CASE, argparse.Namespace(timeout=60))["error"]
    assert gpu.run_worker(CASE, argparse.Namespace(timeout=0.01)) == {"error": "took longer than 0.01 s"}


def test_cases(gpu):
    common = {"shapes": ["gpt2"], "dtypes": ["float32"], "sweeps": ["head"], "libraries": ["mechkit", "nnsight"]}
    plain = argparse.Namespace(**common, prompts=[4, 8], scaling=False, profile=None)
    assert [(c["prompts"], c["kind"], len(c["libraries"])) for c in gpu.cases(plain)] == [
        (4, "sweep", 2),
        (8, "sweep", 2),
    ]
    scaling = argparse.Namespace(**common, prompts=[4, 8], scaling=True, profile=None)
    found = [(c["prompts"], len(c.get("layers", range(12))), c["libraries"]) for c in gpu.cases(scaling)]
    assert found == [(n, layers, ["mechkit"]) for n, layers in [(4, 12), (8, 12), (8, 9), (8, 6), (8, 3)]]
    one = argparse.Namespace(**common, prompts=None, scaling=False, profile=Path("trace.json"))
    assert [(c["prompts"], c["kind"]) for c in gpu.cases(one)] == [(64, "profile")]
