"""`benchmarks/patching/other_libraries.py`: the batches that one would write by hand give mechkit's numbers."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import make_pairs, model_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks/patching"


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The script as a module. It puts the folder of what benchmarks share on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        spec = importlib.util.spec_from_file_location("patching_other_libraries", BENCHMARKS / "other_libraries.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        patch.setattr(module, "matmul_rate", lambda device: 1e9)  # takes seconds, and is not what is tested
        yield module


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
