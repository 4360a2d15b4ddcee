"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mechkit as mk

README = Path(__file__).parents[2] / "README.md"


def test_code_blocks_run(smollm2, monkeypatch, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 1
    go = pytest.importorskip("plotly.graph_objects")
    shown = []
    monkeypatch.setattr(go.Figure, "show", lambda figure, *_: shown.append(figure))
    monkeypatch.setattr(mk.HookedModel, "from_pretrained", lambda name: smollm2)
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks).replace("n=32", "n=4")  # fewer prompts, to save time
    exec(compile(code, str(README), "exec"), {})
    assert len(shown) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"ioi_heads.safetensors"}


def test_is_one_screen():
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    assert lines.index("```python") < 40
