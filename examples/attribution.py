# %% [markdown]
# # Which component wrote the answer, when does the model believe it, and how far can a gradient be trusted?
#
# On indirect-object-identification prompts:
#
# 1. Direct logit attribution: what each layer, and each head at each named position, wrote into the logit difference; and whether
#    later components take the strongest head's contribution out again (the erasure check).
# 2. Logit lens: how probable are the right and the wrong name, layer by layer?
# 3. Attribution patching against exact activation patching: heads, and MLPs, where it fails; integrated gradients and RelP there;
#    the strongest cells of the estimate corrected by exact patching.
#
# As a script: `python examples/attribution.py [--model smollm2-135m] [--pairs 8] [--out out]`.
#
# Wang et al. 2022, https://arxiv.org/abs/2211.00593; Kramar et al. 2024, https://arxiv.org/abs/2403.00745.

# %%
import argparse
from pathlib import Path

import mechkit as mk

parser = argparse.ArgumentParser(
    description="Direct logit attribution, logit lens, and attribution against exact patching"
)
parser.add_argument("--model", default="smollm2-135m", help="a Hugging Face name, a folder, a .gguf file, or the alias")
parser.add_argument("--pairs", type=int, default=8)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args([] if "get_ipython" in globals() else None)  # a notebook has no command line

# %%
model = mk.HookedModel.from_pretrained(args.model)
pairs = mk.tasks.ioi(model, n=args.pairs, seed=args.seed)
metric = mk.logit_diff(pairs)
print(model)

# %% [markdown]
# ## Who wrote it?

# %%
parts = mk.direct_logit_attribution(model, pairs, metric)
by_head = mk.direct_logit_attribution(model, pairs, metric, over="layer head").mean("prompt")
by_source = mk.direct_logit_attribution(model, pairs, metric, over="layer head position").mean("prompt")
total, off = parts.provenance["total"], parts.provenance["residual_error"]
print(f"Who wrote the logit difference of {total:.2f}? (all terms sum to it, to {off:.0e})")
for what, result in (("layers", parts.mean("prompt")), ("heads", by_head), ("heads, by what they read", by_source)):
    print(f"  {what:25}", ", ".join(f"{cell.label} {cell.value:+.2f}" for cell in result.top(5)))
strongest = by_head.top(1)[0].coords
erasure = mk.dla_erasure_check(model, pairs, metric, (int(strongest["layer"]), int(strongest["head"])))
print("  erasure check:", erasure)

# %%
dla_picture = mk.plot.heatmap(by_head, title="Direct logit attribution by head, in logits")
dla_picture

# %% [markdown]
# ## When is it known?
#
# The logit lens at the last position, in nats.

# %%
lens = mk.logit_lens(model, pairs, value="log_prob", over="layer").mean("prompt")
last = model.n_layers - 1
for layer in sorted({*range(0, last, max(1, last // 4)), *range(max(0, last - 5), last + 1)}):
    right, wrong = (float(lens.sel(layer=layer, token=token).values) for token in ("right", "wrong"))
    print(f"  {layer:3}  {right:8.2f}  {wrong:8.2f}")

# %%
top_tokens = mk.top_tokens(model, pairs.clean[[0]])  # the whole first prompt
lens_picture = mk.plot.lens(top_tokens, title="What the model would say after each layer")
lens_picture

# %% [markdown]
# ## How far to trust a gradient?

# %%
both = mk.attribution_patching(model, pairs, metric, {"z": "layer head", "mlp_out": "layer"})
exact = {
    site: mk.activation_patching(model, pairs, metric, site, result.provenance["over"]) for site, result in both.items()
}
print("Attribution patching against exact patching:")
comparisons = {site: mk.compare(result, exact[site]) for site, result in both.items()}
for site, comparison in comparisons.items():
    print(f"  {site:8}", comparison)

# %%
compare_picture = mk.plot.compare(comparisons["z"], title="Attribution patching of heads against the exact effects")
compare_picture

# %% [markdown]
# Better estimates for the MLPs, where the first order fails:

# %%
integrated = mk.integrated_gradients(model, pairs, metric, "mlp_out", "layer", steps=5, rule="stretched")
print("  integrated gradients", mk.compare(integrated, exact["mlp_out"]))
print("  RelP                ", mk.compare(mk.relp(model, pairs, metric, "mlp_out", "layer"), exact["mlp_out"]))
corrected = mk.verify(both["mlp_out"], model, pairs, metric, top=5)
print("  top 5 verified      ", mk.compare(corrected, exact["mlp_out"]))

# %% [markdown]
# ## To keep and to send

# %%
pictures = {
    "attribution_dla_heads.html": dla_picture,
    "attribution_lens.html": lens_picture,
    "attribution_compare.html": compare_picture,
}
for name, picture in pictures.items():
    print("wrote", picture.save(args.out / name))
items = (parts, by_head, erasure, top_tokens, comparisons["z"], comparisons["mlp_out"])
print("wrote", mk.report(args.out / "attribution.html", *items, title="Attribution on IOI", prompts=pairs))
