# %% [markdown]
# # Induction heads: which heads complete a repeated sequence, and what happens to in-context learning without them?
#
# Random tokens, repeated once, cannot be predicted the first time, and only from the context the second time.
#
# 1. The model's loss by position: it falls where the repetition begins.
# 2. Scores of all heads by their attention patterns: induction (to the token after the previous occurrence) and previous token.
# 3. Mean ablation of the five strongest induction heads together, and of five random heads of the same layers: what each does to
#    the loss on the repeated half.
# 4. The logit lens on the repeated half: in which layer does the right token come up?
#
# As a script: `python examples/induction.py [--model smollm2-135m] [--prompts 8] [--length 40] [--out out]`.
#
# Olsson et al. 2022, https://arxiv.org/abs/2209.11895.

# %%
import argparse
import random
from pathlib import Path

import torch

import mechkit as mk

parser = argparse.ArgumentParser(description="Induction heads, and in-context learning without them")
parser.add_argument("--model", default="smollm2-135m", help="a Hugging Face name, a folder, a .gguf file, or the alias")
parser.add_argument("--prompts", type=int, default=8)
parser.add_argument("--length", type=int, default=40, help="tokens before they repeat")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args([] if "get_ipython" in globals() else None)  # a notebook has no command line

# %%
model = mk.HookedModel.from_pretrained(args.model)
prompts = mk.tasks.repeated_tokens(model, n=args.prompts, length=args.length, seed=args.seed)
begin = int(prompts.lengths[0]) - args.length  # where the repetition starts
print(model)

# %% [markdown]
# ## Does the model learn from the context?

# %%
with torch.no_grad():
    loss = model(torch.stack(prompts.tokens), return_type="loss", loss_per_token=True)
print(
    f"Loss (nats per token): {float(loss[:, : begin - 1].mean()):.2f} on the first {args.length} random tokens, "
    f"{float(loss[:, begin:].mean()):.2f} on their repetition"
)

# %% [markdown]
# ## Which heads look at the token after the previous occurrence?

# %%
induction = mk.head_scores(model, "induction", prompts=prompts).mean("prompt")
previous = mk.head_scores(model, "previous_token", prompts=prompts).mean("prompt")
for name, scores in (("induction", induction), ("previous-token", previous)):
    print(f"{name} heads:", ", ".join(f"{cell.label} {cell.value:.2f}" for cell in scores.top(5, by="max")))

# %%
title = "Induction score: attention to the token after the previous occurrence"
induction_picture = mk.plot.heatmap(induction, title=title)
induction_picture

# %%
scatter = mk.plot.heads(previous, induction, title="Previous-token heads and induction heads")
scatter

# %%
layer, head = (int(induction.top(1, by="max")[0].coords[dim]) for dim in ("layer", "head"))
patterns = mk.attention_patterns(model, prompts[[0]], layers=[layer], heads=[head], progress=False)
pattern_picture = mk.plot.attention(patterns, title=f"L{layer}H{head} on repeated random tokens")
pattern_picture

# %% [markdown]
# ## What does the model lose without them?
#
# Mean ablation of five heads together, change of the loss on the repetition; random heads are of the same layers.


# %%
def random_heads(heads: list[tuple[int, int]], seed: int) -> list[tuple[int, int]]:
    """As many other heads, of the same layers as far as these have so many, then of any."""
    generator, chosen = random.Random(seed), []
    for layer, _ in heads:
        every = [(at, head) for at in range(model.n_layers) for head in range(model.n_heads)]
        free = [head for head in every if head not in heads + chosen]
        chosen.append(generator.choice([head for head in free if head[0] == layer] or free))
    return chosen


best = [(int(cell.coords["layer"]), int(cell.coords["head"])) for cell in induction.top(5, by="max")]
ablated = {"induction heads": best}
for draw in range(3):
    ablated[f"random heads, draw {draw + 1}"] = random_heads(best, args.seed + draw)
repetition = mk.loss(prompts, positions=slice(begin, None))
without = mk.ablation(model, prompts, repetition, cells=ablated).mean("prompt").effect()
for (name, heads), change in zip(ablated.items(), without.values, strict=True):
    print(f"  {name:22} {', '.join(f'L{layer}H{head}' for layer, head in heads):38} {float(change):+.2f} nats")

# %% [markdown]
# ## When does the right token come up?

# %%
lens = mk.logit_lens(model, prompts, "next", value="log_prob", over="layer pos")
second = lens.values[:, begin : int(prompts.lengths[0]) - 1].mean((1, 2, 3))
last = model.n_layers - 1
for layer in sorted({*range(0, last, max(1, last // 4)), *range(max(0, last - 5), last + 1)}):
    print(f"  {layer:3}  {float(second[layer]):7.2f}")

# %%
first = lens.sel(token="next", prompt=0)
title = "Log-probability of the right next token, by the logit lens (first prompt)"
lens_picture = mk.plot.heatmap(first, title=title)
lens_picture

# %% [markdown]
# ## To keep and to send

# %%
pictures = {
    "induction_scores.html": induction_picture,
    "induction_heads.html": scatter,
    "induction_pattern.html": pattern_picture,
    "induction_lens.html": lens_picture,
}
for name, picture in pictures.items():
    print("wrote", picture.save(args.out / name))
items = (induction, previous, scatter, patterns, first)
print("wrote", mk.report(args.out / "induction.html", *items, title="Induction heads"))
