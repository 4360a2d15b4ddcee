"""The statement of a study: every error is reported before anything runs, with its line; an id says what a job is, no more."""

from __future__ import annotations

import json
import random
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mechkit as mk
from mechkit.studies import _spec as spec

ALLOWED = dict.fromkeys(("trust_remote_code",), True)
GOOD = """
store = "out"

[[model]]
name = "gpt2"

[[task]]
name = "ioi"

[[technique]]
name = "activation_patching"
"""


def read(folder: Path, text: str, *, allow_code: bool = False) -> mk.Study:
    path = folder / "study.toml"
    path.write_text(text)
    return mk.Study.from_toml(path, allow_code=allow_code)


def problems_of(folder: Path, text: str, **how: Any) -> list[str]:
    """The problems of a file that is refused, one per line. Nothing may have been written."""
    with pytest.raises(ValueError, match="nothing was run") as error:
        read(folder, text, **how)
    assert [path.name for path in folder.iterdir()] == ["study.toml"]
    first, *lines = str(error.value).splitlines()
    assert "study.toml" in first
    assert f"{len(lines)} problem" in first or len(lines) == 1
    return lines


def technique(lines: str, name: str = "activation_patching") -> str:
    """A good file whose technique (in line 11) has further lines (from line 12)."""
    return GOOD.replace('"activation_patching"\n', f'"{name}"\n{textwrap.dedent(lines).strip()}\n')


def study(
    models: Any = ("gpt2",), tasks: Any = ("ioi",), techniques: Any = ("activation_patching",), **settings: Any
) -> mk.Study:
    return mk.Study(models, tasks, techniques, **{"store": "out", **settings})


def ids(*args: Any, **settings: Any) -> list[str]:
    return [job.id for job in study(*args, **settings).jobs]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_the_good_file_is_good(tmp_path):
    good = read(tmp_path, GOOD)
    assert [str(job) for job in good.jobs] == ["gpt2 · ioi · activation_patching"]
    assert good.store.url == str(tmp_path / "out")  # relative to the file
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]  # nothing was run


@pytest.mark.parametrize(
    ("lines", "line", "key", "message"),
    [
        ("sight = 'z'", 12, "sight", "unknown; activation_patching takes site, over"),
        ("progress = false", 12, "progress", "unknown"),  # ours to say
        ("over = 3", 12, "over", "got 3"),
        ("over = true", 12, "over", "got true"),
        ("layers = 3", 12, "layers", "got 3"),
        ("layers = '0'", 12, "layers", 'got "0"'),
        ("layers = [0, '1']", 12, "layers", 'got [0, "1"]'),
        ("layers = [true]", 12, "layers", "got [true]"),
        ("layers = [1.0]", 12, "layers", "got [1.0]"),
        ("# a comment\n\nlayers = [\n 0,\n 'one',\n]", 14, "layers", "got"),
        ("direction = 'denoize'", 12, "direction", "denoise"),
        ("site = 'zz'", 12, "site", "zz"),
        ("site = 3", 12, "site", "got 3"),
        ("over = 'layer hed'", 12, "over", "hed"),
        ("site = 'resid_pre'\nover = 'layer head'", 13, "over", "head"),
        ("metric = 'logit_dif'", 12, "metric", "did you mean 'logit_diff'?"),
        ("metric = { name = 'log_prob', place = 'END' }", 12, "metric.place", "unknown"),
        ("metric = { name = 'log_prob', position = 1.5 }", 12, "metric.position", "got 1.5"),
        ("metric = { position = 'END' }", 12, "metric", "expected a metric's name"),
        ("grid = [1, 2]", 12, "grid", "expected lists"),
        ("grid.direction = 'noise'", 12, "grid", "expected lists"),
        ("grid.direction = []", 12, "grid", "expected lists"),
        ("grid.direction = ['noise', 'nose']", 12, "direction", 'got "nose"'),
        ("label = 'x'\ngrid.direction = [\n 'noise',\n 'nose',\n]", 13, "direction", 'got "nose"'),
        ("site = 'z'\ngrid.site = ['z', 'q']", 13, "grid", "in both"),
        ("label = 3", 12, "label", "got 3"),
        ("tasks = 'ioi'", 12, "tasks", "got 'ioi'"),
        ("tasks = ['docstring']", 12, "tasks", "got 'docstring'"),
        ("models = ['llama']", 12, "models", "got 'llama'"),
    ],
)
def test_a_techniques_problem_is_reported_with_line_and_key(tmp_path, lines, line, key, message):
    (problem,) = problems_of(tmp_path, technique(lines))
    assert problem.startswith(f"  line {line}, technique[0].{key}: "), problem
    assert message in problem


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "message"),
    [
        ('"activation_patching"', '"activation_patchng"', 11, "technique[0].name", "mean 'activation_patching'?"),
        ('"activation_patching"', '"weather"', 11, "technique[0].name", "there are activation_patching, ablation"),
        ('"ioi"', '"ioy"', 8, "task[0].name", "did you mean 'ioi'?"),
        ('"ioi"', '"ioi"\nn = "32"', 9, "task[0].n", 'got "32"'),
        ('"ioi"', '"ioi"\nn = true', 9, "task[0].n", "got true"),
        ('"ioi"', '"ioi"\nn = 1.0', 9, "task[0].n", "got 1.0"),
        ('"ioi"', '"ioi"\nm = 1', 9, "task[0].m", "unknown; ioi takes n, seed"),
        ('"ioi"', "3", 8, "task[0].name", "got 3"),
        ('"gpt2"', '"gpt2"\ndtype = "float8"', 6, "model[0].dtype", "got 'float8'"),
        ('"gpt2"', '"gpt2"\nrevision = 1', 6, "model[0].revision", "got 1"),
        ('"gpt2"', '"gpt2"\nfold_ln = true', 6, "model[0].fold_ln", "unknown key; a model has name, revision"),
        ('name = "gpt2"', 'label = "x"', 4, "model[0].name", "expected a value"),
        ('store = "out"', 'store = "out"\nbudjet = 1', 3, "budjet", "unknown key"),
        ('store = "out"', 'store = "out"\nbudget = "1 XB"', 3, "budget", "got '1 XB'"),
        ('store = "out"', 'store = "out"\nbudget = 0', 3, "budget", "positive"),
        ('store = "out"', 'store = "out"\nbudget = -5', 3, "budget", "got -5"),
        ('store = "out"', 'store = "out"\nshard = 0', 3, "shard", "got 0"),
        ('store = "out"', 'store = "out"\nshard = "4"', 3, "shard", "got '4'"),
        ('store = "out"', 'store = "out"\nretries = -1', 3, "retries", "got -1"),
        ('store = "out"', "store = 3", 2, "store", "got 3"),
    ],
)
def test_other_problems_are_reported_with_line_and_key(tmp_path, old, new, line, key, message):
    assert old in GOOD
    (problem,) = problems_of(tmp_path, GOOD.replace(old, new))
    assert problem.startswith(f"  line {line}, {key}: "), problem
    assert message in problem


@pytest.mark.parametrize("budget", ["true", "1.5", "[1]"])
def test_a_budget_of_the_wrong_type_is_refused(tmp_path, budget):
    problems = problems_of(tmp_path, GOOD.replace('store = "out"', f'store = "out"\nbudget = {budget}'))
    assert all(problem.startswith("  line 3, budget: ") for problem in problems), problems


@pytest.mark.parametrize("metric", ["3", "true", "['logit_diff']"])
def test_a_metric_of_the_wrong_type_is_refused(tmp_path, metric):
    problems = problems_of(tmp_path, technique(f"metric = {metric}"))
    assert all(problem.startswith("  line 12, technique[0].metric: ") for problem in problems), problems


@pytest.mark.parametrize(("budget", "size"), [(7, 7), ("7", 7), ("1 GiB", 2**30), ("1.5kb", 1500), ("2 MB", 2_000_000)])
def test_budgets(budget, size):
    assert study(budget=budget).budget == size


def test_lines_of_later_tables_inline_tables_and_quoted_keys(tmp_path):
    text = """
    # [[technique]] in a comment is none
    store = "out"
    model = [{ name = "gpt2", dtype = "float16" }]
    task = [
        { name = "ioi", n = 4 },   # the first
        { name = "docstring", n = "4" },
    ]

    [[technique]]
    name = "activation_patching"

    [[technique]]
    name = "ablation"
    site = "z"
    "mode" = "nil"
    """
    problems = problems_of(tmp_path, textwrap.dedent(text))
    assert any(problem.startswith("  line 16, technique[1].mode: ") for problem in problems), problems
    assert any("task[1].n: " in problem for problem in problems)
    assert len(problems) == 2


def test_lines_where_a_value_looks_like_a_key(tmp_path):
    (problem,) = problems_of(tmp_path, technique("label = 'site = 3'\nsite = 'zz'"))
    assert problem.startswith("  line 13, technique[0].site: "), problem


def test_all_problems_are_reported_together(tmp_path):
    text = GOOD.replace('"gpt2"', '"gpt2"\ndtype = "float8"').replace('"ioi"', '"ioi"\nn = "32"\nm = 1')
    text = text.replace('"activation_patching"', '"ablation"\nmode = "nil"\nsite = "zz"')
    text = text.replace('store = "out"', 'store = "out"\nshard = 0\nbudget = "much"')
    problems = problems_of(tmp_path, text)
    keys = {problem.split(", ")[1].split(": ")[0] for problem in problems}
    wanted = {"shard", "budget", "model[0].dtype", "task[0].n", "task[0].m", "technique[0].mode", "technique[0].site"}
    assert keys == wanted
    assert len(problems) == len(wanted)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (GOOD + "site = \n", 12),
        (GOOD.replace('"gpt2"', '"gpt2'), 5),
        (GOOD + 'name = "again"\n', 12),
        (GOOD.replace("[[task]]", "[[task]"), 7),
    ],
)
def test_what_is_no_toml_is_reported_with_its_line(tmp_path, text, line):
    (problem,) = problems_of(tmp_path, text)
    assert f"line {line}, " in problem


def test_a_file_that_is_not_there_or_is_not_text(tmp_path):
    with pytest.raises(ValueError, match=r"study\.toml: expected a study file"):
        mk.Study.from_toml(tmp_path / "study.toml")
    (tmp_path / "study.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"study\.toml: expected a study file"):
        mk.Study.from_toml(tmp_path / "study.toml")


def test_plural_tables_are_distinguished_from_singular_ones(tmp_path):
    with pytest.raises(ValueError, match=r"expected \[\[model\]\] tables, got 'models' \(line 4\)"):
        read(tmp_path, GOOD.replace("[[model]]", "[[models]]"))


@pytest.mark.parametrize("what", ["model", "technique"])
def test_a_study_of_nothing_is_refused(what):
    parts: dict[str, Any] = {"models": ["gpt2"], "tasks": ["ioi"], "techniques": ["ablation"], f"{what}s": []}
    with pytest.raises(ValueError, match=rf"expected at least one \[\[{what}\]\]"):
        mk.Study(**parts, store="out")


def test_a_technique_that_needs_a_task_is_refused_without(tmp_path):
    text = GOOD.replace('[[task]]\nname = "ioi"\n', "")
    (problem,) = problems_of(tmp_path, text)
    assert problem.startswith("  line 8, technique[0]: ")
    assert "needs a task" in problem
    # control: the model alone needs none
    assert len(read(tmp_path, text.replace("activation_patching", "head_scores"))) == 1


def test_a_technique_that_needs_pairs_is_refused_on_prompts(tmp_path):
    text = GOOD.replace('"ioi"', '"repeated_tokens"')
    (problem,) = problems_of(tmp_path, text)
    assert problem.startswith("  line 10, technique[0]: ")
    assert "needs pairs" in problem
    # control: what needs prompts alone is fine, and `tasks` chooses
    assert len(read(tmp_path, text.replace("activation_patching", "logit_lens"))) == 1
    both = text + "tasks = ['ioi']\n" + "[[task]]\nname = 'ioi'\n"
    assert [job.labels[1] for job in read(tmp_path, both).jobs] == ["ioi"]


def test_a_metric_where_none_is_used_is_refused(tmp_path):
    (problem,) = problems_of(tmp_path, technique("metric = 'logit_diff'", "attention_patterns"))
    assert problem.startswith("  line 12, technique[0].metric: ")
    assert "no use for a metric" in problem


def test_a_duplicate_job_is_refused_also_where_a_default_is_written_out(tmp_path):
    for again in ("", "site = 'z'\nmetric = 'logit_diff'", "layers = [0]\nlabel = 'other'"):
        first = "layers = [0]\n" if "layers" in again else ""
        text = GOOD + first + '\n[[technique]]\nname = "activation_patching"\n' + again
        (problem,) = problems_of(tmp_path, text)
        assert "technique[1]: duplicate job" in problem
        assert problem.startswith(f"  line {13 + bool(first)}, ")
    # control: another argument is another job
    assert len(read(tmp_path, GOOD + '\n[[technique]]\nname = "activation_patching"\nsite = "q"\n')) == 2


def test_a_duplicate_job_by_a_grid_is_refused(tmp_path):
    (problem,) = problems_of(tmp_path, technique("grid.site = ['z', 'q', 'z']"))
    assert "duplicate" in problem


@pytest.mark.parametrize("what", ["model", "task"])
def test_duplicate_labels_are_refused(tmp_path, what):
    name = {"model": "gpt2-medium", "task": "docstring"}[what]
    first = {"model": "gpt2", "task": "ioi"}[what]
    text = GOOD + f'\n[[{what}]]\nname = "{name}"\nlabel = "{first}"\n'
    (problem,) = problems_of(tmp_path, text)
    assert f"line 13, {what}[1]: duplicate: 2 entries are called '{first}'" in problem
    assert len(read(tmp_path, text.replace("label", "#"))) == 2


def test_techniques_that_would_be_called_the_same_get_different_labels():
    jobs = study(techniques=["ablation", {"name": "ablation", "mode": "zero"}, "logit_lens"]).jobs
    assert [job.labels[2] for job in jobs] == ["ablation mode=mean", "ablation mode=zero", "logit_lens"]


# -- models and code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "./nowhere.gguf", "nobody/no-such-model-of-mechkit"]
)
def test_a_model_that_is_missing_is_reported_before_anything_runs(tmp_path, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stated = read(tmp_path, GOOD.replace("gpt2", name))  # a file may be written before its models are there
    for look in (stated.check, lambda: stated.run(progress=False)):
        with pytest.raises(ValueError, match=r"1 problem; nothing was run") as error:
            look()
        assert "model[0].name" in str(error.value)
        assert name.split("/")[-1] in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


def test_all_missing_models_are_reported_together(tmp_path):
    stated = study(["./nowhere", "./nor/here", "helpers.studies:tiny_llama"], store=tmp_path / "out")
    with pytest.raises(ValueError, match="2 problems"):
        stated.check()
    with pytest.raises(ValueError, match="1 problem;"):
        stated.check(loaded=["./nowhere"])


CODE = """
import pathlib
pathlib.Path({path!r}).write_text("imported")
def thing(model, pairs=None, metric=None): ...
"""


@pytest.mark.parametrize("what", ["model", "task", "technique", "metric"])
def test_code_is_refused_and_not_imported_unless_allowed(tmp_path, monkeypatch, what):
    module = f"code_of_a_{what}"
    (tmp_path / "lib").mkdir()
    (tmp_path / "file").mkdir()
    (tmp_path / "lib" / f"{module}.py").write_text(CODE.format(path=str(tmp_path / "imported")))
    monkeypatch.syspath_prepend(tmp_path / "lib")
    old = {"model": '"gpt2"', "task": '"ioi"', "technique": '"activation_patching"', "metric": '"activation_patching"'}
    new = f'"{module}:thing"' if what != "metric" else f'"ablation"\nmetric = "{module}:thing"'
    text = GOOD.replace(old[what], new)
    (problem,) = problems_of(tmp_path / "file", text)
    assert "is code, which would be run" in problem
    line = {"model": 5, "task": 8, "technique": 11, "metric": 12}[what]
    assert problem.startswith(f"  line {line}, {what.replace('metric', 'technique')}[0].")
    assert not (tmp_path / "imported").exists()
    assert module not in sys.modules
    read(tmp_path / "file", text, allow_code=True)  # the control
    assert (tmp_path / "imported").exists()
    sys.modules.pop(module)


def test_code_that_is_not_there_is_reported(tmp_path):
    for name in ("helpers.studies:nothing", "no_such_module_at_all:nothing", "helpers.studies:LENGTHS"):
        (problem,) = problems_of(tmp_path, GOOD.replace("activation_patching", name), allow_code=True)
        assert problem.startswith("  line 11, technique[0].name: expected ")


def test_codes_arguments_are_checked_too(tmp_path):
    text = GOOD.replace('"ioi"', '"helpers.studies:tiny_pairs"\nn = "6"\nm = 1')
    problems = problems_of(tmp_path, text, allow_code=True)
    assert [problem.split(": ")[0] for problem in problems] == ["  line 10, task[0].m", "  line 9, task[0].n"]


# -- ids, grids and labels ---------------------------------------------------------------------------------------------


def test_the_same_statement_has_the_same_ids(tmp_path):
    assert ids() == ids() == [job.id for job in read(tmp_path, GOOD).jobs]
    # defaults, labels, restrictions, budgets, stores and how a model is loaded are no part of what a job is
    same: list[list[str]] = [
        ids(techniques=[{"name": "activation_patching", "site": "z", "over": "layer head", "metric": "logit_diff"}]),
        ids(techniques=[{"name": "activation_patching", "metric": {"name": "logit_diff", "position": "END"}}]),
        ids(techniques=[{"name": "activation_patching", "layers": None, "label": "mine", "tasks": ["ioi"]}]),
        ids(tasks=[{"name": "ioi", "n": 32, "label": "words"}]),
        ids([{"name": "gpt2", "device_map": "auto", **ALLOWED, "dtype": "float32", "label": "small"}]),
        ids(store="elsewhere", budget=1, shard=1, retries=0, name="other"),
    ]
    assert all(one == ids() for one in same)


def test_whatever_is_changed_changes_the_id():
    changed = [
        ids(),
        ids(["gpt2-medium"]),
        ids([{"name": "gpt2", "dtype": "bfloat16"}]),
        ids([{"name": "gpt2", "revision": "main"}]),
        ids([{"name": "helpers.studies:llama_of_file", "path": "a"}]),
        ids([{"name": "helpers.studies:llama_of_file", "path": "b"}]),
        ids(tasks=["docstring"]),
        ids(tasks=[{"name": "ioi", "seed": 1}]),
        ids(tasks=[{"name": "ioi", "n": 33}]),
        ids(tasks=[{"name": "ioi", "corruption": "swap"}]),
        ids(techniques=["attribution_patching"]),
        ids(techniques=[{"name": "activation_patching", "site": "q"}]),
        ids(techniques=[{"name": "activation_patching", "layers": [0]}]),
        ids(techniques=[{"name": "activation_patching", "layers": [0, 1]}]),
        ids(techniques=[{"name": "activation_patching", "layers": [1, 0]}]),
        ids(techniques=[{"name": "activation_patching", "metric": "log_prob"}]),
        ids(techniques=[{"name": "activation_patching", "metric": {"name": "logit_diff", "position": "S2"}}]),
    ]
    job = study().jobs[0]
    changed.append([replace(job, mechkit="0.0.0").id])
    flat = [one for found in changed for one in found]
    assert len(set(flat)) == len(flat)
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in flat)


def test_a_job_is_made_again_from_what_is_stated():
    stated = study([{"name": "gpt2", "dtype": "float16"}], techniques=["edge_attribution", "head_scores"])
    for job in stated.jobs:
        again = spec.Job.of(json.loads(json.dumps(job.stated())), job.labels)
        assert (again.id, again.labels, again.stated()) == (job.id, job.labels, job.stated())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def shuffled(value: Any, seed: int) -> Any:
    """The same value, the keys of all its tables in another order."""
    if isinstance(value, list):
        return [shuffled(one, seed) for one in value]
    if not isinstance(value, dict):
        return value
    keys = list(value)
    random.Random(seed).shuffle(keys)
    return {key: shuffled(value[key], seed) for key in keys}


@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=5), st.integers(0, 99))
def test_ids_do_not_depend_on_the_order_of_keys(arguments, seed):
    model = spec.ModelSpec("gpt2", arguments=arguments)
    job = spec.Job(model, spec.Call("t", arguments), spec.Call("a", arguments), spec.Call("m", arguments), ("", "", ""))
    other = shuffled(job.stated(), seed)
    assert spec.Job.of(other, job.labels).id == job.id
    assert spec.Job.of(other, job.labels) == job
    assert hash(spec.Job.of(other, job.labels).model) == hash(job.model)


@given(
    st.permutations([("site", "q"), ("over", "layer head"), ("layers", [1]), ("direction", "noise"), ("heads", [0])])
)
def test_a_studys_ids_do_not_depend_on_the_order_of_its_keys(items):
    again = {"name": "activation_patching", "site": "q", "direction": "noise", "layers": [1], "heads": [0]}
    assert ids(techniques=[dict(items) | {"name": "activation_patching"}]) == ids(techniques=[again])


def test_grids_make_an_entry_for_every_combination():
    stated = study(
        [{"name": "gpt2", "grid": {"dtype": ["float32", "float64"]}}],
        [{"name": "ioi", "grid": {"seed": [0, 1], "n": [4, 8]}}],
        [{"name": "ablation", "label": "knockout", "grid": {"mode": ["zero", "mean"], "layers": [[0], [0, 1]]}}],
    )
    assert len(stated) == 2 * 4 * 4 == len({job.id for job in stated.jobs}) == len({job.labels for job in stated.jobs})
    models, tasks, techniques = (list(dict.fromkeys(job.labels[i] for job in stated.jobs)) for i in range(3))
    assert models == ["gpt2 dtype=float32", "gpt2 dtype=float64"]
    assert tasks == ["ioi seed=0 n=4", "ioi seed=0 n=8", "ioi seed=1 n=4", "ioi seed=1 n=8"]
    assert techniques[:2] == ["knockout mode=zero layers=[0]", "knockout mode=zero layers=[0,1]"]
    found = {job.labels[1]: (job.task.arguments["seed"], job.task.arguments["n"]) for job in stated.jobs if job.task}
    assert found["ioi seed=1 n=4"] == (1, 4)
    # the same jobs, written out one by one
    one = study([{"name": "gpt2", "dtype": "float64"}], [{"name": "ioi", "seed": 1, "n": 4}], ["ablation"])
    assert one.jobs[0].id not in {job.id for job in stated.jobs}  # the control: it has all layers
    one = study(
        [{"name": "gpt2", "dtype": "float64"}],
        [{"name": "ioi", "seed": 1, "n": 4}],
        [{"name": "ablation", "mode": "mean", "layers": [0, 1]}],
    )
    assert one.jobs[0].id in {job.id for job in stated.jobs}


def test_a_grid_of_one_value_changes_no_label():
    assert study(tasks=[{"name": "ioi", "grid": {"seed": [3]}}]).jobs[0].labels[1] == "ioi"


def test_tasks_and_models_restrict_a_technique():
    stated = study(
        ["gpt2", {"name": "gpt2-medium", "label": "medium"}],
        ["ioi", {"name": "ioi", "seed": 1, "label": "again"}],
        [{"name": "ablation", "tasks": ["again"], "models": ["gpt2"]}, {"name": "logit_lens", "tasks": ["ioi"]}],
    )
    assert [job.labels for job in stated.jobs if job.labels[2] == "ablation"] == [("gpt2", "again", "ablation")]
    assert len([job for job in stated.jobs if job.labels[2] == "logit_lens"]) == 4  # a name means all of that name


def test_what_looks_at_the_model_alone_has_one_job_a_model():
    stated = study(["gpt2", "gpt2-medium"], ["ioi", "docstring"], ["head_scores"])
    assert [job.labels for job in stated.jobs] == [("gpt2", "", "head_scores"), ("gpt2-medium", "", "head_scores")]
    with pytest.raises(ValueError, match="leave tasks out"):
        study(techniques=[{"name": "head_scores", "tasks": ["ioi"]}])


def test_ten_thousand_jobs_expand_in_seconds():
    begin = time.perf_counter()
    stated = study(
        [{"name": "gpt2", "grid": {"revision": [f"step{i}" for i in range(10)]}}],
        [{"name": "ioi", "grid": {"seed": list(range(100))}}],
        [{"name": "ablation", "grid": {"layers": [[i] for i in range(10)]}}],
    )
    n = len({job.id for job in stated.jobs})
    assert n == 10_000
    assert time.perf_counter() - begin < 10
