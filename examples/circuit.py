# %% [markdown]
# # Which edges of the model carry the answer? Find a circuit, check every edge of it exactly, and see how good it is.
#
# On indirect-object-identification prompts, half of which are held out:
#
# 1. EAP-IG estimates the effect of every edge; the best ones are then measured by exact edge patching.
# 2. The circuit of the best measured edges is evaluated with everything else resampled: faithfulness on the pairs that it was
#    found on and on the others, completeness, minimality, and random circuits of the same size.
# 3. The faithfulness curve: how many edges does the estimate need to get the behaviour back?
#
# As a script: `python examples/circuit.py [--model smollm2-135m] [--pairs 16] [--edges 200] [--out out]`.
#
# Hanna et al. 2024, https://arxiv.org/abs/2403.17806; Wang et al. 2022, https://arxiv.org/abs/2211.00593.

# %%
import argparse
from pathlib import Path

import mechkit as mk

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

parser = argparse.ArgumentParser(description="Find a circuit, check every edge of it exactly, and see how good it is")
parser.add_argument("--model", default="smollm2-135m", help="a Hugging Face name, a folder, a .gguf file, or the alias")
parser.add_argument("--pairs", type=int, default=16)
parser.add_argument("--edges", type=int, default=200)
parser.add_argument("--random", type=int, default=2, help="random circuits of the same size")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args([] if "get_ipython" in globals() else None)  # a notebook has no command line

# %%
model = mk.HookedModel.from_pretrained(args.model)
pairs = mk.tasks.ioi(model, n=args.pairs, seed=args.seed)
metric = mk.logit_diff(pairs)
print(mk.Graph.of(model))

# %% [markdown]
# ## Find it, on half of the pairs

# %%
found = mk.find_circuit(model, pairs, metric, n_edges=args.edges, random=args.random, seed=args.seed)
circuit, report = found.circuit, found.report
print(
    f"{circuit.n_edges} of {circuit.graph.n_edges:,} edges, {len(circuit.nodes)} writers; metric {report.runs.metric}"
)
print(f"({report.runs.unit}), all other edges ablated ({report.runs.provenance['ablation']}).")
print(f"Estimates against exact effects of the {len(found.verified.edges)} best: r = {found.agreement:.3f}")
print("The strongest edges, by their exact effect:")
for edge in found.verified.top(15):
    print(f"  {edge.name:24} {edge.score:+.3f} {report.runs.unit}")

# %%
circuit_picture = mk.plot.circuit(circuit, max_edges=80)
circuit_picture

# %% [markdown]
# ## Is it any good?

# %%
print(f"faithfulness, pairs it was found on   {report.found_on}")
print(f"faithfulness, held-out pairs          {report.held_out}")
print(f"random circuits of {circuit.n_edges} edges          {', '.join(f'{f:.3f}' for f in report.random)}")
print(f"incompleteness (mean over {len(report.completeness)} sets)    {report.incompleteness:.3f}")
idle = sum(abs(change) < 0.01 for change in report.minimality.values())
print(f"components that can go for less than 0.01: {idle} of {len(report.minimality)}")
print("Components that it needs most (change of its faithfulness without them):")
for name, change in list(report.minimality.items())[:10]:
    print(f"  {name:10} {change:+.3f}")

# %% [markdown]
# ## How many edges does it take?

# %%
scores = {"fractions": FRACTIONS, "random": args.random, "seed": args.seed}
curve = mk.faithfulness_curve(mk.edge_attribution, model, pairs, metric, **scores)
print(f"On held-out pairs: CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f}")
print("edges chosen   without dead ends   faithfulness   random")
for n, kept, f, r in zip(curve.n_edges, curve.kept, curve.faithfulness, curve.random_faithfulness, strict=True):
    print(f"{n:12,} {kept:19,} {f:14.3f} {r:8.3f}")

# %%
curve_picture = mk.plot.curve(curve)
curve_picture

# %% [markdown]
# ## To keep and to send

# %%
print("wrote", circuit_picture.save(args.out / "circuit.html"))
print("wrote", curve_picture.save(args.out / "curve.html"))
circuit.to_json(args.out / "circuit.json")
report.to_dataframe().to_csv(args.out / "circuit_runs.csv", index=False)
items = (circuit, report, found.verified, curve)
print("wrote", mk.report(args.out / "circuit_report.html", *items, title="An IOI circuit", prompts=pairs))
