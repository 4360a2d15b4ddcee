"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mechkit as mk

README = Path(__file__).parents[1] / "README.md"


def test_code_blocks_run(smollm2, monkeypatch, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 7
    go = pytest.importorskip("plotly.graph_objects")
    shown = []
    monkeypatch.setattr(go.Figure, "show", lambda figure, *_: shown.append(figure))
    monkeypatch.setattr(mk.HookedModel, "from_pretrained", lambda name: smollm2)
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks).replace("n=32", "n=4")  # fewer prompts, to save time
    exec(compile(code, str(README), "exec"), {})
    assert len(shown) == 1
    written = {path.name for path in tmp_path.iterdir()}
    assert {"ioi_heads.safetensors", "L23H3.html", "lens.html", "heads.html", "ioi.html"} <= written
    assert (tmp_path / "ioi.html").stat().st_size < 8_000_000
