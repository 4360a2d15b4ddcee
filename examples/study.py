# %% [markdown]
# # A study: do the same heads do three tasks, and is the gradient right about it?
#
# `examples/study.toml` states it: indirect objects, induction and greater-than on SmolLM2-135M, each by exact patching, by
# ablation and by attribution patching. Here it is run (or resumed: stop it whenever you like, and start it again), and read
# back as one table.
#
# 1. State, check, run.
# 2. One picture of all tasks: each head's clean output in the corrupted run.
# 3. Which heads two tasks share: correlations over heads.
# 4. How well the estimate agrees with exact patching, task by task.
# 5. The table as Parquet, for DuckDB, polars or pandas; and the store as xarray sees it.
#
# As a script: `python examples/study.py [--study examples/study.toml] [--only ioi] [--out out]`; `mechkit run
# examples/study.toml` does the first step alone.

# %%
import argparse
import itertools
from pathlib import Path

import numpy as np

import mechkit as mk

parser = argparse.ArgumentParser(description="Three tasks, three techniques, one table")
parser.add_argument("--study", type=Path, default=Path("examples/study.toml"))
parser.add_argument("--store", type=Path, help="where results are kept; default the file's own")
parser.add_argument("--only", help="one task of the file, to try things out")
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args([] if "get_ipython" in globals() else None)  # a notebook has no command line
args.out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## State, check, run
#
# The file is checked whole before anything runs. `run` computes what the store does not hold yet, so that a second call takes
# a second. Another executor is one argument: `mk.studies.Processes()` (one process per GPU) or `mk.studies.Ray("ray://…")`.

# %%
study = mk.Study.from_toml(args.study, store=args.store)
report = study.run(only={"task": args.only} if args.only else None)
print(study)
print(report)
print(study.status())

# %% [markdown]
# ## All tasks in one picture
#
# Each head's clean output, put into the corrupted run. 0 is the corrupted run and 1 the clean run of each task, so that tasks
# with other logits compare.

# %%
table = study.results()
tasks = list(dict.fromkeys(job.labels[1] for job in table.jobs))
exact = {task: table.result(task=task, technique="activation_patching") for task in tasks}
patched = {task: result.mean("prompt").normalized() for task, result in exact.items()}
for task, result in patched.items():
    print(f"{task:15}", ", ".join(f"{cell.label} {cell.value:.2f}" for cell in result.top(4)))
figure = mk.plot.heatmap(patched, title="One head's clean output in the corrupted run")
figure.save(args.out / "study_heads.html")
figure

# %% [markdown]
# ## Do tasks share heads?
#
# Correlation over all heads of what each restores. With the same few prompts per task, this is a first look and no more.

# %%
for a, b in itertools.combinations(tasks, 2):
    r = np.corrcoef(patched[a].values.flatten(), patched[b].values.flatten())[0, 1]
    print(f"{a} and {b}: correlation {r:+.2f} over {patched[a].values.numel()} heads")
needed = {task: table.result(task=task, technique="ablation").mean("prompt").effect() for task in tasks}
for task, result in needed.items():
    print(f"without them, {task:15}", ", ".join(f"{cell.label} {cell.effect:+.2f} logits" for cell in result.top(3)))
figure = mk.plot.heatmap(needed, title="A head's mean in its place: change of the logit difference")
figure.save(args.out / "study_ablation.html")
figure

# %% [markdown]
# ## How good is the estimate?

# %%
comparisons = {
    task: mk.compare(table.result(task=task, technique="attribution_patching"), exact[task]) for task in tasks
}
for task, comparison in comparisons.items():
    print(f"{task:15}", comparison)
figure = next(iter(comparisons.values())).plot()
figure.save(args.out / "study_estimate.html")
figure

# %% [markdown]
# ## The table, for other tools
#
# One row per cell and prompt, with what the job is, its labels, its value and its baselines. Parquet is read by DuckDB
# (`select task, layer, head, avg(value) from 'study.parquet' group by all`), polars and pandas alike.

# %%
path = table.to_parquet(args.out / "study.parquet")
frame = table.to_dataframe()
print(f"{path}: {len(frame):,} rows, {path.stat().st_size / 1e6:.1f} MB")
print(frame.groupby(["task", "technique"], observed=True)["value"].agg(["size", "mean"]).round(2))
tree = table.to_xarray()
print(tree.groups[-1], dict(tree[tree.groups[-1]].sizes))
