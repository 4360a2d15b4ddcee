"""What studies and the command line need is an extra: without it all the rest works, and they say what to install."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mechkit import _extras

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Stands for an environment in which some packages are not installed: nobody finds them.
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {missing!r} else find(name, package)
sys.meta_path.insert(0, Missing())
"""


def run_without(missing: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    whole = f"{WITHOUT.format(missing=missing)}\n{code}"
    return subprocess.run([sys.executable, "-c", whole], cwd=ROOT, capture_output=True, text=True, check=False)


def packages(lines: list[str]) -> set[str]:
    return {re.split(r"[<>=\[ ]", line)[0] for line in lines}


def test_the_extra_is_what_is_looked_for() -> None:
    extras = PROJECT["optional-dependencies"]
    assert packages(extras["studies"]) == set(_extras.STUDIES)
    assert packages(PROJECT["dependencies"]) & set(_extras.STUDIES) == set()
    assert "mechkit[studies]" in extras["ray"]
    assert any("studies" in line for line in extras["test"])


@pytest.mark.parametrize(
    "statement", ["import mechkit; mechkit.Study", "from mechkit import Study", "import mechkit.studies"]
)
def test_studies_name_what_is_missing(statement: str) -> None:
    run = run_without(("zarr", "pyarrow"), statement)
    assert run.returncode == 1
    message = "mechkit.Study needs pyarrow, zarr, which a plain installation lacks; pip install 'mechkit[studies]'"
    assert run.stderr.splitlines()[-1] == f"ModuleNotFoundError: {message}"


@pytest.mark.parametrize("missing", [("typer",), ("zarr",)])
def test_the_command_names_what_is_missing(missing: tuple[str, ...]) -> None:
    command = "sys.argv = ['mechkit', '--help']\nfrom mechkit.__main__ import main; main()"
    run = run_without(missing, command)
    assert run.returncode == 1
    expected = f"mechkit: the command line needs {missing[0]}, which a plain installation lacks; pip install 'mechkit[studies]'\n"
    assert run.stderr == expected
    assert "Usage" in run_without((), command).stdout  # control


def test_all_the_rest_works_without_them() -> None:
    code = """
from mechkit import *
import mechkit as mk
known = mk.zoo.serial_ioi()
heads = mk.activation_patching(known.model, known.pairs, known.metric, progress=False)
mk.report("report.html", heads)
print(heads.mean("prompt").top(1), mk.edge_attribution(known.model, known.pairs, known.metric).top(1))
"""
    # the other packages are also PyTorch's, transformers's or TransformerLens's own
    run = run_without(
        ("zarr",), f"import os, tempfile\nsys.path.insert(0, os.getcwd())\nos.chdir(tempfile.mkdtemp())\n{code}"
    )
    assert run.returncode == 0, run.stderr
    assert importlib.util.find_spec("zarr") is not None  # control: it is there otherwise
