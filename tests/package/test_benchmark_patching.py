"""`benchmarks/patching`: batches that one would write by hand give mechkit's numbers, and the limit is of what a sweep runs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny import make_pairs, model_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks/patching"


def module_of(name: str) -> Any:
    """A script as a module, under a name of its own: other folders have scripts of the same names."""
    spec = importlib.util.spec_from_file_location(f"patching_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))  # scripts add the folder of what they share
        module = module_of("other_libraries")
        patch.setattr(module, "matmul_rate", lambda device: 1e9)  # takes seconds, and is not what is tested
        yield module


@pytest.fixture(scope="module")
def limit() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        yield module_of("limit")


@pytest.mark.parametrize("sweep", ["head", "resid", "position-head"])
@pytest.mark.parametrize("most", [450, 2])
def test_batches_by_hand_give_the_same_numbers(script, sweep, most):
    model, pairs = model_of("llama"), make_pairs(((7, 2), (7, 4)))
    args = argparse.Namespace(device="cpu", cells=most)
    ours = script.with_mechkit(args, model, pairs, *script.SWEEPS[sweep])
    theirs = script.with_batches(args, model, pairs, *script.SWEEPS[sweep])
    difference = script.difference_from(ours, theirs)
    assert theirs["cells"] == ours["cells"] == len(ours["values"])
    assert theirs["cells_run"] < theirs["cells"] if most == 2 else theirs["cells_run"] == theirs["cells"]
    assert theirs["largest_difference"] < 1e-10, difference
    assert max(ours["values"]) - min(ours["values"]) > 1e-3  # there is something to get wrong


def test_each_library_has_a_function_and_a_package(script):
    assert set(script.LIBRARIES) == {"mechkit", "transformer_lens", "transformer_lens_batched", "nnsight"}
    assert script.LIBRARIES["transformer_lens_batched"] == script.LIBRARIES["transformer_lens"]


# -- limit.py ----------------------------------------------------------------------------------------------------------


def test_limit_of_a_tiny_model(tmp_path):
    """As a user starts it."""
    into = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "limit.py"), "--device", "cpu", "--prompts", "2", "--edges", "5"]
    done = subprocess.run([*command, "--rounds", "1", "--json", str(into)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(into.read_text())
    assert {name: found["cells"] for name, found in report["sweeps"].items()} == {"head": 12, "resid": 27, "edges": 5}
    for name, found in report["sweeps"].items():
        assert f"| {name} | {found['cells']} |" in done.stdout
        assert found["products"] == sum(one["times"] for one in found["shapes"])
        assert found["products_seconds"] == pytest.approx(sum(one["times"] * one["seconds"] for one in found["shapes"]))
        assert found["of_its_products"] == pytest.approx(found["products_seconds"] / found["seconds"])
        assert 0 < found["products_tflop"] < found["tflop"]  # attention is counted in the second alone
        assert found["best_seconds"] == pytest.approx(found["tflop"] * 1e3 / found["best_gflops"])


def test_the_products_of_a_sweep_are_those_of_its_block_tokens(limit):
    """Every block-token goes through an MLP's first matrix once, but in the last block only positions that are read."""
    import mechkit as mk

    model = limit.random_model(limit.TINY, "cpu")
    pairs = limit.random_pairs(limit.TINY)
    with limit.Products() as watched:
        cost = limit.sweep_of("head", mk, model, pairs, 0)().cost
    into_mlp = sum(
        tokens * n for (tokens, inputs, outputs, _), n in watched.counts.items() if (inputs, outputs) == (32, 48)
    )
    assert cost.block_tokens / 2 < into_mlp / 2 <= cost.block_tokens  # of the two that its MLP has, gate and up


def test_products_are_counted_by_shape(limit):
    linear, bare = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5, bias=False)
    with limit.Products() as watched:
        for _ in range(2):
            linear(torch.ones(2, 4, 3))
        bare(torch.ones(7, 3))
        torch.ones(2, 4, 3) @ torch.ones(2, 3, 4)  # between activations: no linear layer's
    assert watched.counts == {(8, 3, 5, torch.float32): 2, (7, 3, 5, torch.float32): 1}
    assert limit.median_tokens(watched.counts) == 8
    assert limit.flop_of((8, 3, 5, torch.float32)) == 240
    assert limit.seconds_of((8, 3, 5, torch.float32), "cpu") > 0
