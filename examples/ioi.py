# %% [markdown]
# # Indirect object identification: which heads move the name, and where is it in the residual stream?
#
# 1. Prompts such as "When Mary and John went to the store, John gave a drink to", and the same with another subject.
# 2. Does the model do it? Logit difference and accuracy on clean and corrupted prompts.
# 3. Patch every head, and the residual stream at every named position, from the clean into the corrupted run.
# 4. Ablate the strongest heads, and compare each with the head of its layer that patching found weakest.
#
# As a script: `python examples/ioi.py [--model smollm2-135m] [--pairs 16] [--out out]`.
#
# Wang et al. 2022, https://arxiv.org/abs/2211.00593.

# %%
import argparse
from pathlib import Path

import mechkit as mk

parser = argparse.ArgumentParser(description="Which heads move the name, and where is it in the residual stream?")
parser.add_argument("--model", default="smollm2-135m", help="a Hugging Face name, a folder, a .gguf file, or the alias")
parser.add_argument("--pairs", type=int, default=16)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args([] if "get_ipython" in globals() else None)  # a notebook has no command line

# %%
model = mk.HookedModel.from_pretrained(args.model)
pairs = mk.tasks.ioi(model, n=args.pairs, seed=args.seed)
metric = mk.logit_diff(pairs)
print(model)
print(f"{len(pairs)} pairs, {int(pairs.clean.lengths.min())} to {int(pairs.clean.lengths.max())} tokens. The first:")
print("  clean    ", model.to_string(pairs.clean.tokens[0]))
print("  corrupted", model.to_string(pairs.corrupted.tokens[0]))

# %% [markdown]
# ## Does the model do it?
#
# Every result knows the metric of the unedited runs, so one sweep of a single layer gives both.

# %%
last = {"site": "resid_pre", "over": "layer", "layers": [model.n_layers - 1], "progress": False}
logit_diff = mk.activation_patching(model, pairs, metric, **last)
accuracy = mk.activation_patching(model, pairs, mk.accuracy(pairs), **last)
print("            logit difference   accuracy")
for run in ("clean", "corrupted"):
    print(f"  {run:10} {float(logit_diff.baseline[run].mean()):+12.3f} {float(accuracy.baseline[run].mean()):14.0%}")

# %% [markdown]
# ## Which heads bring the answer back?
#
# 0 is the corrupted run, 1 the clean run; 95 % intervals over prompts, and p-values with the false-discovery rate controlled over
# all heads.

# %%
heads = mk.activation_patching(model, pairs, metric, site="z", over="layer head")
normalized, interval, p = heads.mean("prompt").normalized(), heads.ci(normalized=True), heads.p_values()
top = normalized.top(8)
for cell in top:
    low, high, significance = (float(r.sel(**cell.coords).values) for r in (interval.low, interval.high, p))
    print(f"  {cell.label:8} {cell.value:+.3f}  [{low:+.3f}, {high:+.3f}]  p = {significance:.1e}")
print(f"  cost: {heads.cost}")

# %%
heads_picture = mk.plot.heatmap(normalized, title="Patching one head from the clean into the corrupted run")
heads_picture

# %% [markdown]
# ## Where is the name?

# %%
resid = mk.activation_patching(model, pairs, metric, site="resid_pre", over="layer position")
print(f"  cost: {resid.cost}")
resid_picture = mk.plot.heatmap(resid.mean("prompt").normalized(), title="Patching the residual stream")
resid_picture

# %% [markdown]
# ## Does the model need these heads?
#
# Mean ablation of the strongest heads, one by one (change of the clean run's logit difference), each beside the head of its layer
# that patching found weakest.

# %%
layers = sorted({int(cell.coords["layer"]) for cell in top})
knockout = mk.ablation(model, pairs, metric, mode="mean", layers=layers)
effect = knockout.effect().mean("prompt")
for cell in top:
    layer = int(cell.coords["layer"])
    control = int(normalized.sel(layer=layer).values.abs().argmin())
    change, idle = (float(effect.sel(layer=layer, head=head).values) for head in (cell.coords["head"], control))
    print(f"  {cell.label:8} {change:+.3f}      L{layer}H{control:<4} {idle:+.3f}")

# %%
ablation_picture = mk.plot.heatmap(effect, title="Mean ablation of one head")
ablation_picture

# %% [markdown]
# ## What the strongest head looks at

# %%
layer, head = (int(top[0].coords[dim]) for dim in ("layer", "head"))
patterns = mk.attention_patterns(model, pairs.clean[[0]], layers=[layer], heads=[head], progress=False)
pattern_picture = patterns.plot()
pattern_picture

# %% [markdown]
# ## To keep and to send

# %%
pictures = {
    "ioi_heads.html": heads_picture,
    "ioi_residual.html": resid_picture,
    "ioi_ablation.html": ablation_picture,
    "ioi_pattern.html": pattern_picture,
}
for name, picture in pictures.items():
    print("wrote", picture.save(args.out / name))
print("wrote", heads.save(args.out / "ioi_heads.safetensors"))
print("wrote", mk.report(args.out / "ioi.html", normalized, resid, knockout, patterns, title="IOI", prompts=pairs))
