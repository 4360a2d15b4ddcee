"""The public names: the table in `mechkit/__init__.py`, its twin for type checkers, and that loading late changes nothing."""

from __future__ import annotations

import ast
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import mechkit as mk

PACKAGE = Path(mk.__file__).parent
NAMES = [*mk._PACKAGES, *mk._MODULE_OF]
LATE = {"torch", "transformers", "numpy", "pandas", "plotly", "pydantic", "transformer_lens"}


def twin(source: str) -> dict[str, str]:
    """Name -> the module that it comes from, in a file of `from module import name as name`."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names), ast.unparse(node)  # or it is not exported
            found |= {alias.name: node.module or "" for alias in node.names}
    return found


def in_a_fresh_interpreter(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_table_and_its_twin_agree() -> None:
    table = {**dict.fromkeys(mk._PACKAGES, "mechkit"), **mk._MODULE_OF}
    assert twin((PACKAGE / "__init__.pyi").read_text()) == {**table, "__version__": "mechkit._version"}
    assert len(table) > 60


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_what_its_module_holds(name: str) -> None:
    value = getattr(mk, name)
    if name in mk._PACKAGES:
        assert isinstance(value, ModuleType)
        assert value is sys.modules[f"mechkit.{name}"]
    else:
        assert value is getattr(sys.modules[mk._MODULE_OF[name]], name)
        assert not isinstance(value, ModuleType)
    assert name in dir(mk)
    assert vars(mk)[name] is value  # asked once


def test_names_that_there_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'mechkit' has no attribute 'logit_dif'"):
        mk.logit_dif  # noqa: B018
    with pytest.raises(ImportError, match="logit_dif"):
        from mechkit import logit_dif  # noqa: F401
    run = subprocess.run([sys.executable, "-c", "import mechkit; mechkit.logit_dif"], capture_output=True, text=True)
    assert "Did you mean: 'logit_diff'" in run.stderr


def test_the_import_loads_nothing_else() -> None:
    probe = "import json, sys; print(json.dumps([name for name in sys.modules]))"
    loaded = set(json.loads(in_a_fresh_interpreter(f"import mechkit; mechkit.__version__; dir(mechkit); {probe}")))
    assert loaded & LATE == set()
    assert {name for name in loaded if name.startswith("mechkit")} == {"mechkit", "mechkit._drawn", "mechkit._version"}
    more = set(json.loads(in_a_fresh_interpreter(f"import mechkit; mechkit.logit_diff; {probe}")))
    assert {"torch", "mechkit.metrics"} <= more  # the probe sees
    assert "mechkit.circuits" not in more  # one name does not bring all


@pytest.mark.parametrize("name", sorted(mk._MODULES))
def test_modules_are_attributes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were when all was imported at once: `import mechkit as mk; mk.engine.Budget`."""
    getattr(mk, name)
    monkeypatch.delitem(vars(mk), name)
    assert getattr(mk, name) is sys.modules[f"mechkit.{name}"]


def test_ways_to_import() -> None:
    star = "from mechkit import *; print(len(set(globals()) & {*__import__('mechkit').__all__}))"
    assert int(in_a_fresh_interpreter(star)) == len(mk.__all__) > 60
    assert (
        in_a_fresh_interpreter("from mechkit import Result, plot, report; print(Result.__module__)")
        == "mechkit.result\n"
    )
    assert in_a_fresh_interpreter("import mechkit.plot; print(mechkit.plot.heatmap.__name__)") == "heatmap\n"


def test_public_functions_and_classes_are_pickled_by_name() -> None:
    """As a process pool sends them; read where nothing of the package is loaded yet."""
    things = [value for name in NAMES if isinstance(value := getattr(mk, name), FunctionType | type)]
    code = f"import pickle; print(len(pickle.loads(bytes.fromhex({pickle.dumps(things).hex()!r}))))"
    assert len(things) > 50
    assert in_a_fresh_interpreter(code) == f"{len(things)}\n"
    assert [one for one in pickle.loads(pickle.dumps(things)) if one not in things] == []


def test_shapes_are_checked_in_modules_that_are_loaded_late() -> None:
    """jaxtyping's hook, which tests install, sees every module of the package whenever it is loaded."""
    for name in NAMES:
        getattr(mk, name)
    loaded = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "mechkit"}
    missed = [name for name, module in loaded.items() if "jaxtyping" not in type(module.__spec__.loader).__module__]
    assert missed == []
    assert "mechkit.studies._table" in loaded
    assert "jaxtyping" not in type(json.__spec__.loader).__module__
