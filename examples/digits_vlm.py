# %% [markdown]
# # A vision-language model of one's own: which patch tells an 8 from a 3?
#
# 1. Handwritten digits of 8 x 8 pixels, and a small LLaVA (a SigLIP tower, a projector, a Llama) with random weights.
# 2. Train it to name the digit behind a picture. Held-out digits say whether it does.
# 3. Pairs of an 8 and a 3. Put each patch of the one into the run of the other: which one changes the answer?
# 4. Does attention say the same?
#
# As a script: `python examples/digits_vlm.py [--steps 1200] [--pairs 24] [--seed 0] [--out out]`. It takes about 80 seconds on
# one core. Nothing is downloaded: the digits come with scikit-learn (`pip install scikit-learn`).

# %%
import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

import mechkit as mk

parser = argparse.ArgumentParser(description="Which patch tells an 8 from a 3?")
parser.add_argument("--steps", type=int, default=1200, help="of training, 64 pictures each")
parser.add_argument("--pairs", type=int, default=24)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args([] if "get_ipython" in globals() else None)  # a notebook has no command line
torch.manual_seed(args.seed)
torch.set_num_threads(1)  # sums in one order: a seed gives the same model again

# %% [markdown]
# ## Digits
#
# scikit-learn's 1,797 handwritten digits.

# %%
data = load_digits()
pictures, labels = torch.tensor(data.images).float()[:, None] / 16, torch.tensor(data.target).long()
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))
train, held_out = order[:-400], order[-400:]
print(f"{len(train)} pictures to train on, {len(held_out)} held out")
for row in range(8):
    of_each = [pictures[labels == digit][0, 0, row] for digit in (3, 8)]
    print("  |", "   ".join("".join(" .:*#"[int(4.999 * x)] * 2 for x in line) for line in of_each), "|")

# %% [markdown]
# ## The model
#
# Pictures are cut into 2 x 2 patches of 4 x 4 pixels. A prompt is `BOS <4 patches> ASK`, and the next token names the digit.

# %%
BOS, ASK, IMAGE = 10, 11, 12  # tokens 0 to 9 are the digits
vision = SiglipVisionConfig(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_channels=1,
    image_size=8,
    patch_size=4,
    vision_use_head=False,
)
text = LlamaConfig(
    vocab_size=13,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=32,
    bos_token_id=BOS,
    eos_token_id=None,
    pad_token_id=None,
)
hf = LlavaForConditionalGeneration(
    LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
)
prompt = torch.tensor([BOS, *[IMAGE] * 4, ASK])
print(f"{sum(p.numel() for p in hf.parameters()):,} parameters")


def answers(chosen: torch.Tensor) -> torch.Tensor:
    """Logits behind each picture."""
    tokens = prompt.expand(len(chosen), -1)
    return hf(input_ids=tokens, pixel_values=pictures[chosen], logits_to_keep=1, use_cache=False).logits[:, -1]


# %%
draws = torch.Generator().manual_seed(args.seed)
optimizer = torch.optim.AdamW(hf.parameters(), lr=2e-3, weight_decay=0.05)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps)
hf.train()
for step in range(args.steps):
    chosen = train[torch.randint(len(train), (64,), generator=draws)]
    loss = cross_entropy(answers(chosen), labels[chosen])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % (args.steps // 5) == 0 or step == args.steps - 1:
        print(f"  step {step:5}  loss {float(loss.detach()):.4f}")
hf.eval()
with torch.no_grad():
    named = answers(held_out).argmax(-1)
right = named == labels[held_out]
print(f"held-out digits named right: {float(right.float().mean()):.1%}")

# %% [markdown]
# ## Pairs of an 8 and a 3
#
# Held-out pictures that the model names right. The prompts are the same but for the picture.

# %%
model = mk.HookedModel.from_hf(hf, name="digits")


def prompts_of(digit: int) -> mk.Prompts:
    chosen = held_out[right & (labels[held_out] == digit)].tolist()
    if not chosen:
        raise SystemExit(f"No held-out {digit} is named right: train for more --steps")
    inputs = [{"pixel_values": pictures[chosen[i % len(chosen)]][None]} for i in range(args.pairs)]
    return mk.Prompts.from_inputs(model, [prompt] * args.pairs, inputs)


eights, threes = prompts_of(8), prompts_of(3)
both = {
    "an 8's patch in a 3": mk.PromptPairs.from_tokens(eights, threes, [(8, 3)] * args.pairs, task="digits"),
    "a 3's patch in an 8": mk.PromptPairs.from_tokens(threes, eights, [(3, 8)] * args.pairs, task="digits"),
}
print(f"{args.pairs} pairs; {model}")

# %% [markdown]
# ## Which patch tells them apart?
#
# 0 is the answer without the patch, 1 that of the picture which it comes from. An 8 is closed on the left where a 3 is open,
# above and below, so that is where the difference should be. By which of the two gaps a model goes is a matter of its seed: of
# three, one went by the lower one (this), two by the upper one; on a processor that rounds otherwise this one went by both.

# %%
QUARTERS = {"r0c0": "upper left", "r0c1": "upper right", "r1c0": "lower left", "r1c1": "lower right"}
results = {}
for name, pairs in both.items():
    patches = results[name] = mk.image_patching(model, pairs, mk.logit_diff(pairs), progress=False)
    without, other = (float(patches.baseline[run].mean()) for run in ("corrupted", "clean"))
    print(f"{name}: logit difference {without:+.2f} without it, {other:+.2f} in the picture that it comes from")
    for cell in patches.sel(layer=0).mean("prompt").normalized().top(4):
        print(f"  {QUARTERS[str(cell.coords['patch'])]:12} {cell.value:+.3f}")

# %% [markdown]
# Where a patch turns white from one layer to the next, what the model needs of it has left the patch's position.

# %%
eight = (255 * (1 - eights.inputs[0]["pixel_values"][0, 0])).byte()[..., None].expand(-1, -1, 3)
to_eight = results["an 8's patch in a 3"].mean("prompt").normalized()
to_eight_picture = to_eight.plot(picture=eight)
to_eight_picture

# %%
three = (255 * (1 - threes.inputs[0]["pixel_values"][0, 0])).byte()[..., None].expand(-1, -1, 3)
to_three = results["a 3's patch in an 8"].mean("prompt").normalized()
to_three_picture = to_three.plot(picture=three)
to_three_picture

# %% [markdown]
# ## Does attention say the same?
#
# Where the last position looks, on average over layers and heads, beside what patching found.

# %%
patterns = mk.attention_patterns(model, eights, progress=False)
looks = patterns.mean("prompt").values[:, :, -1, 1:5].mean((0, 1))
effects = to_eight.sel(layer=0).values
print("patch           attention   effect")
for i in effects.argsort(descending=True).tolist():
    print(f"  {QUARTERS[to_eight.coords['patch'][i]]:12} {float(looks[i]):9.3f} {float(effects[i]):+8.3f}")

# %% [markdown]
# ## To keep and to send

# %%
for name, picture in {"digits_to_eight.html": to_eight_picture, "digits_to_three.html": to_three_picture}.items():
    print("wrote", picture.save(args.out / name))
report = mk.report(
    args.out / "digits.html", to_eight, to_three, title="An 8 or a 3?", prompts=both["an 8's patch in a 3"]
)
print("wrote", report)
