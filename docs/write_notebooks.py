"""Writes the examples' notebooks with their outputs: `make notebooks`, or `python docs/write_notebooks.py ioi circuit`.

1. Cells are the script's (jupytext), and are run from first to last, at full size, in an empty kernel.
2. Pictures are PNG: they are seen wherever the notebook is, and a notebook stays small. The live figures are the script's.
3. What belongs to this machine or this moment (execution counts' times, progress on stderr) is not kept.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PICTURES = """
import tempfile
from pathlib import Path

from IPython.display import Image, display

from mechkit._drawn import Drawn
from mechkit.plot import Figure


def _png(figure):
    with tempfile.TemporaryDirectory() as folder:
        return figure.save(Path(folder) / "figure.png", scale=1.25).read_bytes()


def _show(figure, *_, **__):
    display(Image(data=_png(figure)))


def _default(drawn):
    try:
        return _png(drawn.plot())
    except ValueError:  # no default picture: the text is shown
        return None


Figure.show = Figure._ipython_display_ = _show
get_ipython().display_formatter.formatters["image/png"].for_type(Drawn, _default)
"""


def written(script: Path) -> Any:
    """The notebook of a script, with the outputs of a run."""
    notebook = jupytext.read(script)
    n = len(notebook.cells)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(PICTURES))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    nbclient.NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(ROOT)}}).execute(
        env=environment
    )
    del notebook.cells[0]
    assert len(notebook.cells) == n
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.metadata.pop("execution", None)
        cell.execution_count = number + 1
        cell.outputs = [kept for output in cell.outputs if (kept := _kept(output, number + 1)) is not None]
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
    notebook.metadata.pop("language_info", None)  # the version of Python here
    return notebook


def _kept(output: Any, number: int) -> Any | None:
    if output.output_type == "stream":
        output.text = output.text.replace(f"{ROOT}{os.sep}", "")
        return output if output.name == "stdout" else None
    if output.output_type == "error":
        raise RuntimeError(f"{output.ename}: {output.evalue}")
    if "execution_count" in output:
        output.execution_count = number
    if "image/png" in output.data:
        output.data = {"image/png": output.data["image/png"], "text/plain": "a figure"}
        output.metadata = {}
    elif output.output_type == "display_data":
        return None  # a bar of progress
    output.data.pop("text/html", None)
    return output


def main(names: list[str]) -> None:
    for script in sorted(EXAMPLES.glob("*.py")):
        if names and script.stem not in names:
            continue
        notebook = written(script)
        path = script.with_suffix(".ipynb")
        nbformat.write(notebook, path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
