"""The layout's promises, read off the source: imports run one way, `import mechkit` is light, nothing unsafe is called.

Each rule is a function from one file's path and source to a list of complaints. Each is also run on sources that break
it, so that a rule which sees nothing fails here.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What each place of the package may import of mechkit, in addition to itself and the helpers (mechkit/_x.py), which import
# nothing of it. mechkit/__init__.py, the public surface, may import all. CONTRIBUTING.md has the same table in words.
_DATA = {"prompts", "metrics", "result"}
_SHARED = {"experiment", "engine", "hooks", *_DATA}
MAY_IMPORT: dict[str, set[str]] = {
    "prompts": set(),
    "metrics": {"prompts"},
    "result": set(),
    "hooks": _DATA,
    "engine": {"hooks", *_DATA},
    "experiment": {"engine", "hooks", *_DATA},
    "attribution": _SHARED,
    "circuits": _SHARED,
    "tasks": {"prompts", "hooks"},
    "zoo": {"hooks", "circuits", "prompts", "metrics"},
    "studies": {"zoo", "tasks", "circuits", "attribution", *_SHARED},
    "plot": {"attribution", "circuits", "prompts", "metrics", "result"},
    "cli": {"studies", "plot", "zoo", "tasks", "circuits", "attribution", *_SHARED},
    "__main__": {"cli"},
}
OWNERS = {
    "transformer_lens": "hooks",
    "plotly": "plot",
    "zarr": "studies",
    "ray": "studies",
}  # third-party package -> the one place that imports it
HEAVY = {
    "transformer_lens",
    "plotly",
    "pandas",
    "xarray",
    "scipy",
    "ray",
    "zarr",
    "pyarrow",
}  # imported by the function that needs them
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}


@dataclass(frozen=True)
class Import:
    """One imported name, in full (`from a.b import c` is `a.b.c`), and when the import runs."""

    name: str
    line: int
    at_import: bool  # when the file is imported, rather than when a function of it is called
    typing_only: bool  # never: it stands under `if TYPE_CHECKING:`

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


class _ImportFinder(ast.NodeVisitor):
    def __init__(self, package: str) -> None:
        self.package = package
        self.found: list[Import] = []
        self._functions = 0
        self._typing = 0

    def _add(self, name: str, line: int) -> None:
        self.found.append(Import(name, line, self._functions == 0, self._typing > 0))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = resolve_name("." * node.level + (node.module or ""), self.package)
        for alias in node.names:
            self._add(f"{module}.{alias.name}", node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self._add(resolve_name(name.value, self.package), node.lineno)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if getattr(node.test, "id", getattr(node.test, "attr", None)) != "TYPE_CHECKING":
            self.generic_visit(node)
            return
        self._typing += 1
        for child in node.body:
            self.visit(child)
        self._typing -= 1
        for child in node.orelse:
            self.visit(child)

    def _visit_function(self, node: ast.AST) -> None:
        self._functions += 1
        self.generic_visit(node)
        self._functions -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _visit_function


def imports(path: str, source: str) -> list[Import]:
    """Every import in the file, those inside functions and by literal `import_module` included."""
    finder = _ImportFinder(".".join(PurePosixPath(path).parent.parts))
    finder.visit(ast.parse(source, path))
    return finder.found


def place_of(path: str) -> str:
    """The row of the table that a file belongs to: `mechkit/hooks/_sites.py` is in `hooks`."""
    return PurePosixPath(path).parts[1].removesuffix(".py")


def is_helper(place: str) -> bool:
    """Whether it is a module directly in mechkit/ that is not in the table, such as mechkit/_text.py."""
    private = place.startswith("_") and not place.startswith("__")
    return place not in MAY_IMPORT and (private or (ROOT / "mechkit" / f"{place}.py").is_file())


def one_way(path: str, source: str) -> Iterator[str]:
    """Each place imports only what its row allows; imports for type checkers do not count."""
    place = place_of(path)
    if place == "__init__":
        return
    if place not in MAY_IMPORT and not is_helper(place):
        yield f"{path}: mechkit/{place}/ has no row in the table of imports"
        return
    allowed = MAY_IMPORT.get(place, set()) | {place}
    for found in imports(path, source):
        if found.top != "mechkit" or found.typing_only:
            continue
        target = found.name.partition(".")[2].partition(".")[0]
        if target not in MAY_IMPORT and not is_helper(target):
            yield f"{path}:{found.line}: imports {found.name} from the package; import it where it is defined"
        elif target not in allowed and not (is_helper(target) and not is_helper(place)):
            yield f"{path}:{found.line}: {place} may not import {target} ({found.name})"


def one_owner(path: str, source: str) -> Iterator[str]:
    """Each package of `OWNERS` is imported in one place of mechkit only."""
    for found in imports(path, source):
        owner = OWNERS.get(found.top)
        if owner and not found.typing_only and place_of(path) != owner:
            yield f"{path}:{found.line}: only mechkit/{owner}/ may import {found.top}"


def light(path: str, source: str) -> Iterator[str]:
    """No heavy package is imported with the module, but plotly by those that draw."""
    draws = place_of(path) == "plot" and PurePosixPath(path).name != "__init__.py"
    for found in imports(path, source):
        if found.top in HEAVY and found.at_import and not found.typing_only and not (draws and found.top == "plotly"):
            yield f"{path}:{found.line}: import {found.top} inside the function that needs it"


def no_pickle(path: str, source: str) -> Iterator[str]:
    """Nothing is read or written by a pickle, which can run code; `torch.load` is one."""
    torches = {"torch"}
    for found in imports(path, source):
        if found.top in PICKLES or found.name in ("torch.load", "torch.serialization.load"):
            yield f"{path}:{found.line}: imports {found.name}; use safetensors"
    tree = ast.parse(source, path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            torches |= {alias.asname for alias in node.names if alias.name == "torch" and alias.asname}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                bad = "pickle" in name
            case ast.keyword(arg=str(name), value=value):
                bad = "pickle" in name and not (isinstance(value, ast.Constant) and value.value is False)
            case _:
                continue
        if isinstance(node, ast.Attribute) and name == "load":
            bad = ast.unparse(node.value).partition(".")[0] in torches
        if bad:
            yield f"{path}:{node.lineno}: {name} reads or writes a pickle; use safetensors"


def _named_values(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Every value that is given a name: keywords, defaults, assignments, dictionary items."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg:
            yield node.arg, node.value
        elif isinstance(node, ast.arguments):
            positional = [*node.posonlyargs, *node.args]
            with_default = positional[len(positional) - len(node.defaults) :]
            arguments, defaults = [*with_default, *node.kwonlyargs], [*node.defaults, *node.kw_defaults]
            for argument, default in zip(arguments, defaults, strict=True):
                if default is not None:
                    yield argument.arg, default
        elif isinstance(node, ast.Assign):
            yield from ((ast.unparse(target), node.value) for target in node.targets)
        elif isinstance(node, ast.AnnAssign) and node.value:
            yield ast.unparse(node.target), node.value
        elif isinstance(node, ast.Dict):
            yield from ((ast.unparse(key), value) for key, value in zip(node.keys, node.values, strict=True) if key)


def no_remote_code(path: str, source: str) -> Iterator[str]:
    """Code that comes with a model runs only when the user says so: no call, default or setting turns it on."""
    for name, value in _named_values(ast.parse(source, path)):
        if "trust_remote_code" in name and isinstance(value, ast.Constant) and value.value is True:
            yield f"{path}:{value.lineno}: trust_remote_code=True; the user decides that"


def circles(sources: dict[str, str]) -> list[str]:
    """Modules that import one another, at import or later, directly or by way of others; each circle by one of its ways round."""
    modules = {".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(".__init__"): path for path in sources}

    def module_of(name: str) -> str:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    needs = {
        module: {module_of(found.name) for found in imports(path, sources[path]) if not found.typing_only}
        - {"", module}
        for module, path in modules.items()
    }
    complaints, done = [], set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        if module in way:
            complaints.append(" -> ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for needed in sorted(needs[module]):
                visit(needed, (*way, module))
            done.add(module)

    for module in sorted(modules):
        visit(module, ())
    return complaints


def no_test_imports_a_test(path: str, source: str) -> Iterator[str]:
    """What several test files need is in tests/helpers/, so that each file can be run, moved and deleted by itself."""
    for found in imports(path, source):
        if any(part.startswith("test_") or part == "conftest" for part in found.name.split(".")):
            yield f"{path}:{found.line}: imports {found.name}; put what both need into tests/helpers/"


Rule = Callable[[str, str], Iterator[str]]
RULES: list[Rule] = [one_way, one_owner, light, no_pickle, no_remote_code]


def files(*folders: str) -> dict[str, str]:
    """Path from the root -> source, of every Python file in these folders."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def complaints(rule: Rule, sources: dict[str, str]) -> list[str]:
    return [complaint for path, source in sources.items() for complaint in rule(path, source)]


def test_the_package_is_found() -> None:
    found = {place_of(path) for path in files("mechkit")}
    assert {"__init__", "prompts", "metrics", "result", "hooks"} <= found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps(rule: Rule) -> None:
    assert complaints(rule, files("mechkit")) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(files("mechkit")) == []


def test_circles_are_seen() -> None:
    late = {"mechkit/a.py": "from mechkit.b import x", "mechkit/b.py": "def f():\n    from mechkit.c import y"}
    assert circles({**late, "mechkit/c.py": "import mechkit.a"}) == ["mechkit.a -> mechkit.b -> mechkit.c -> mechkit.a"]
    assert circles({**late, "mechkit/c.py": "if TYPE_CHECKING:\n    import mechkit.a"}) == []


def test_scripts_and_tests_leave_remote_code_off() -> None:
    assert complaints(no_remote_code, files("examples", "benchmarks", "tests")) == []


def test_no_test_imports_a_test() -> None:
    found = files("tests", "benchmarks")
    assert len([path for path in found if PurePosixPath(path).name.startswith("test_")]) > 70
    assert complaints(no_test_imports_a_test, found) == []


# --- controls: what each rule must see, and what it must leave alone

BAD: list[tuple[Rule, str, str]] = [
    (one_way, "mechkit/prompts.py", "import mechkit.metrics"),
    (one_way, "mechkit/prompts.py", "from mechkit.hooks import HookedModel"),
    (one_way, "mechkit/result.py", "from mechkit.prompts import Prompts"),
    (one_way, "mechkit/metrics.py", "from . import result"),
    (one_way, "mechkit/hooks/_a.py", "from mechkit.attribution import activation_patching"),
    (one_way, "mechkit/hooks/_a.py", "def f():\n    from mechkit.plot import heatmap"),
    (one_way, "mechkit/hooks/__init__.py", "from .. import circuits"),
    (one_way, "mechkit/attribution/a.py", "from ..circuits._graph import Edge"),
    (one_way, "mechkit/attribution/a.py", "import mechkit"),
    (one_way, "mechkit/attribution/a.py", "from mechkit import HookedModel"),
    (one_way, "mechkit/attribution/a.py", "import importlib\nimportlib.import_module('mechkit.plot')"),
    (one_way, "mechkit/circuits/a.py", "import importlib\nimportlib.import_module('..tasks', __package__)"),
    (one_way, "mechkit/circuits/a.py", "from mechkit.tasks import ioi"),
    (one_way, "mechkit/circuits/a.py", "from mechkit.attribution import ablation"),
    (one_way, "mechkit/hooks/_a.py", "from mechkit.engine import sweep"),
    (one_way, "mechkit/engine/_a.py", "def f():\n    from mechkit.experiment.axes import make_axes"),
    (one_way, "mechkit/tasks/ioi.py", "from mechkit.metrics import logit_diff"),
    (one_way, "mechkit/zoo/a.py", "from mechkit.attribution import ablation"),
    (one_way, "mechkit/studies/a.py", "from mechkit.plot import heatmap"),
    (one_way, "mechkit/plot/a.py", "from mechkit.hooks import HookedModel"),
    (one_way, "mechkit/plot/a.py", "if not TYPE_CHECKING:\n    from mechkit.hooks import HookedModel"),
    (one_way, "mechkit/plot/a.py", "if TYPE_CHECKING:\n    pass\nelse:\n    from mechkit.hooks import HookedModel"),
    (one_way, "mechkit/_text.py", "from mechkit.prompts import Prompts"),
    (one_way, "mechkit/_text.py", "from mechkit._other import x"),
    (one_way, "mechkit/_drawn.py", "def f():\n    from mechkit.plot import heatmap"),
    (one_way, "mechkit/_drawn.py", "def f():\n    from mechkit.hooks import HookedModel"),
    (one_way, "mechkit/result.py", "def f():\n    from mechkit.plot import heatmap"),
    (one_way, "mechkit/newcomer/a.py", ""),
    (one_owner, "mechkit/attribution/a.py", "def f():\n    import transformer_lens.utilities as utils"),
    (one_owner, "mechkit/__init__.py", "from transformer_lens import TransformerBridge"),
    (one_owner, "mechkit/result.py", "def f():\n    import plotly.express as px"),
    (one_owner, "mechkit/cli.py", "def f():\n    import ray"),
    (one_way, "mechkit/hooks/_a.py", "from mechkit.studies import Study"),
    (one_way, "mechkit/studies/a.py", "from mechkit.cli import app"),
    (light, "mechkit/studies/a.py", "import zarr"),
    (light, "mechkit/hooks/_model.py", "import transformer_lens"),
    (light, "mechkit/hooks/_model.py", "import importlib\nbridge = importlib.import_module('transformer_lens')"),
    (light, "mechkit/result.py", "try:\n    import pandas as pd\nexcept ImportError:\n    pd = None"),
    (light, "mechkit/result.py", "class A:\n    import xarray"),
    (light, "mechkit/result.py", "from scipy.stats import bootstrap"),
    (light, "mechkit/studies/a.py", "import ray"),
    (light, "mechkit/plot/__init__.py", "import plotly.graph_objects as go"),
    (light, "mechkit/plot/a.py", "import pandas"),
    (no_pickle, "mechkit/result.py", "def f():\n    import pickle"),
    (no_pickle, "mechkit/result.py", "from pickle import loads"),
    (no_pickle, "mechkit/result.py", "x = torch.load('x.pt', weights_only=True)"),
    (no_pickle, "mechkit/result.py", "import torch as t\nx = t.load('x.pt')"),
    (no_pickle, "mechkit/result.py", "from torch import load"),
    (no_pickle, "mechkit/result.py", "frame.to_pickle('x')"),
    (no_pickle, "mechkit/result.py", "x = np.load('x.npy', allow_pickle=True)"),
    (no_remote_code, "mechkit/hooks/loading/pretrained.py", "AutoConfig.from_pretrained(name, trust_remote_code=True)"),
    (
        no_remote_code,
        "mechkit/hooks/loading/pretrained.py",
        "def load(name, *, revision=None, trust_remote_code=True): ...",
    ),
    (no_remote_code, "mechkit/hooks/loading/pretrained.py", "def load(name, trust_remote_code=True): ..."),
    (no_remote_code, "mechkit/hooks/loading/pretrained.py", "options = {'trust_remote_code': True}"),
    (no_remote_code, "mechkit/hooks/loading/pretrained.py", "options['trust_remote_code'] = True"),
    (no_remote_code, "mechkit/hooks/loading/pretrained.py", "trust_remote_code: bool = True"),
    (no_test_imports_a_test, "tests/engine/test_a.py", "from test_exact import make_pairs"),
    (no_test_imports_a_test, "tests/engine/test_a.py", "from .test_exact import make_pairs"),
    (no_test_imports_a_test, "tests/engine/test_a.py", "def test_b():\n    import test_exact"),
    (no_test_imports_a_test, "tests/engine/test_a.py", "from tests.engine import test_exact as exact"),
    (no_test_imports_a_test, "tests/engine/test_a.py", "from conftest import unchecked"),
    (no_test_imports_a_test, "tests/helpers/a.py", "import importlib\nimportlib.import_module('test_exact')"),
    (no_test_imports_a_test, "benchmarks/a.py", "def f():\n    from test_exact import make_pairs"),
]

GOOD: list[tuple[Rule, str, str]] = [
    (one_way, "mechkit/__init__.py", "from mechkit.plot import heatmap"),
    (one_way, "mechkit/metrics.py", "from mechkit.prompts import PromptPairs"),
    (one_way, "mechkit/hooks/_a.py", "from mechkit import prompts\nfrom . import _b\nfrom ._c import d"),
    (one_way, "mechkit/hooks/_a.py", "if typing.TYPE_CHECKING:\n    from mechkit.attribution import ablation"),
    (one_way, "mechkit/circuits/a.py", "from mechkit._text import plural\nimport mechkit.experiment.axes"),
    (one_way, "mechkit/plot/a.py", "from ..result import Result\nfrom ..circuits import Circuit"),
    (one_way, "mechkit/_text.py", "import re\nimport torch"),
    (
        one_owner,
        "mechkit/hooks/loading/pretrained.py",
        "def f():\n    from transformer_lens.model_bridge import TransformerBridge",
    ),
    (one_owner, "mechkit/plot/_heatmap.py", "import plotly.graph_objects as go"),
    (light, "mechkit/plot/_heatmap.py", "import plotly.graph_objects as go"),
    (light, "mechkit/result.py", "if TYPE_CHECKING:\n    import pandas\ndef f():\n    import pandas as pd"),
    (no_pickle, "mechkit/result.py", "# no pickle\nx = Result.load('x')\ny = np.load('y', allow_pickle=False)"),
    (
        no_remote_code,
        "mechkit/hooks/loading/pretrained.py",
        "def f(*, trust_remote_code=False): g(trust_remote_code=False)",
    ),
    (
        no_remote_code,
        "mechkit/hooks/loading/pretrained.py",
        "raise ValueError('this model needs trust_remote_code=True')",
    ),
    (
        no_test_imports_a_test,
        "tests/engine/test_a.py",
        "import pytest\nfrom helpers.tiny import make_pairs, whole_vocabulary",
    ),
]


@pytest.mark.parametrize(("rule", "path", "source"), BAD)
def test_rule_sees(rule: Rule, path: str, source: str) -> None:
    assert list(rule(path, source)), f"{rule.__name__} lets {path} do: {source}"


@pytest.mark.parametrize(("rule", "path", "source"), GOOD)
def test_rule_allows(rule: Rule, path: str, source: str) -> None:
    assert list(rule(path, source)) == []


# --- and once for real

PROBE = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


def loaded_by(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after `statement`."""
    command = [sys.executable, "-c", f"{statement}; {PROBE}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_import_is_light() -> None:
    loaded = loaded_by("import mechkit")
    assert "mechkit" in loaded
    assert loaded & (HEAVY | {"torch", "transformers"}) == set()


def test_import_of_every_part_is_light() -> None:
    parts = "attribution, circuits, engine, experiment, hooks, plot, studies, tasks, zoo"
    loaded = loaded_by(f"from mechkit import {parts}")
    assert "torch" in loaded
    assert loaded & HEAVY == set()


def test_import_probe_sees() -> None:
    assert {"scipy", "pandas"} <= loaded_by("import mechkit, scipy.stats, pandas")


def test_version_is_the_projects() -> None:
    import mechkit

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert mechkit.__version__ == project["version"]


def test_nothing_that_a_run_wrote_is_kept() -> None:
    """Data and pictures belong to nobody's checkout: a documentation block run in the root once left 140 files there."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    kept = [PurePosixPath(name) for name in listed if name]
    assert not [str(path) for path in kept if path.suffix in {".safetensors", ".parquet", ".zarr", ".csv", ".pt"}]
    at_root = {path.parts[0] for path in kept}
    assert at_root <= {
        *(".ci", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile"),
        *("README.md", "benchmarks", "constraints.txt", "docs", "examples", "mechkit", "mkdocs.yml", "pyproject.toml"),
        "tests",
    }
