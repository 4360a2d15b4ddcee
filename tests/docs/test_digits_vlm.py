"""The example that trains a vision-language model: what it found at full size, and that a short run works."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import mechkit as mk

jupytext = pytest.importorskip("jupytext")

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits_vlm.py"


def printed() -> str:
    cells = jupytext.read(EXAMPLE.with_suffix(".ipynb")).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def named_right(text: str) -> float:
    found = re.search(r"held-out digits named right: ([\d.]+)%", text)
    assert found is not None
    return float(found[1]) / 100


def test_what_it_found_at_full_size() -> None:
    text = printed()
    assert named_right(text) >= 0.95
    parts = text.split("logit difference")[1:]
    assert len(parts) == 2
    for part in parts:
        quarters = re.findall(r"((?:upper|lower) (?:left|right)) +([+-][\d.]+)\n", part)[:4]
        effects = {name: float(value) for name, value in quarters}
        assert len(effects) == 4
        assert max(effects, key=effects.__getitem__) == "lower left"
        left, right = (
            sum(value for name, value in effects.items() if name.endswith(side)) for side in ("left", "right")
        )
        assert left > 0.5
        assert left > 4 * abs(right)


def test_a_short_run(tmp_path, monkeypatch, capsys) -> None:
    """A few steps do for most digits."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (make test installs it)")
    n_threads, state = torch.get_num_threads(), torch.get_rng_state()
    options = ["--steps", "120", "--pairs", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options])
    try:
        found = runpy.run_path(str(EXAMPLE))
    finally:
        torch.set_num_threads(n_threads)
        torch.set_rng_state(state)
    assert named_right(capsys.readouterr().out) >= 0.7
    for patches in found["results"].values():
        assert isinstance(patches, mk.Result)
        assert patches.dims == ("layer", "patch", "prompt")
        assert set(patches.coords["patch"]) == set(found["QUARTERS"])
        assert bool((patches.baseline["clean"] > patches.baseline["corrupted"]).all())
    assert len(list(tmp_path.glob("*.html"))) == 3
