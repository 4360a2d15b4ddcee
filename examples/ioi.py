"""Indirect object identification on a real model: which heads move the name, and where is it in the residual stream?

    python examples/ioi.py [--model smollm2-135m] [--pairs 16] [--out out]

1. Prompts such as "When Mary and John went to the store, John gave a drink to", and the same with another subject.
2. Does the model do it? Logit difference and accuracy on clean and corrupted prompts.
3. Patch every head, and the residual stream at every named position, from the clean into the corrupted run.
4. Ablate the strongest heads, and compare each with the head of its layer that patching found weakest.

Wang et al. 2022, https://arxiv.org/abs/2211.00593.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import mechkit as mk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="smollm2-135m", help="a Hugging Face name, a folder, a .gguf file, or the alias"
    )
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    model = timed("load", lambda: mk.HookedModel.from_pretrained(args.model))
    print(model)
    pairs = mk.tasks.ioi(model, n=args.pairs, seed=args.seed)
    metric = mk.logit_diff(pairs)
    print(
        f"\n{len(pairs)} pairs, {int(pairs.clean.lengths.min())} to {int(pairs.clean.lengths.max())} tokens. The first:"
    )
    print("  clean    ", model.to_string(pairs.clean.tokens[0]))
    print("  corrupted", model.to_string(pairs.corrupted.tokens[0]))

    heads = timed("head sweep", lambda: mk.activation_patching(model, pairs, metric, site="z", over="layer head"))
    behaviour(model, pairs, heads)

    print(
        "\nHeads that bring the answer back (0 = corrupted run, 1 = clean run), with 95 % intervals over prompts, and"
    )
    print("p-values with the false-discovery rate controlled over all heads:")
    normalized, interval, p = heads.mean("prompt").normalized(), heads.ci(normalized=True), heads.p_values()
    top = normalized.top(8)
    for cell in top:
        low, high, significance = (float(r.sel(**cell.coords).values) for r in (interval.low, interval.high, p))
        print(f"  {cell.label:8} {cell.value:+.3f}  [{low:+.3f}, {high:+.3f}]  p = {significance:.1e}")
    print(f"  cost: {heads.cost}")

    resid = timed(
        "residual sweep",
        lambda: mk.activation_patching(model, pairs, metric, site="resid_pre", over="layer position"),
    )
    print(f"  cost: {resid.cost}")

    print(
        "\nMean ablation of the strongest heads, one by one (change of the clean run's logit difference), each beside the"
    )
    print("head of its layer that patching found weakest:")
    layers = sorted({int(cell.coords["layer"]) for cell in top})
    knockout = timed("ablation", lambda: mk.ablation(model, pairs, metric, mode="mean", layers=layers))
    effect = knockout.effect().mean("prompt")
    for cell in top:
        layer = int(cell.coords["layer"])
        control = int(normalized.sel(layer=layer).values.abs().argmin())
        change, idle = (float(effect.sel(layer=layer, head=head).values) for head in (cell.coords["head"], control))
        print(f"  {cell.label:8} {change:+.3f}      L{layer}H{control:<4} {idle:+.3f}")

    pictures = {
        "ioi_heads.html": (normalized, "Patching one head from the clean into the corrupted run"),
        "ioi_residual.html": (resid.mean("prompt").normalized(), "Patching the residual stream"),
        "ioi_ablation.html": (effect, "Mean ablation of one head"),
    }
    print()
    for name, (result, title) in pictures.items():
        print("wrote", mk.plot.write_html(mk.plot.heatmap(result, title=title), args.out / name))
    heads.save(args.out / "ioi_heads.safetensors")
    print("wrote", args.out / "ioi_heads.safetensors")


def behaviour(model: mk.HookedModel, pairs: mk.PromptPairs, heads: mk.Result) -> None:
    """Prints whether the model does the task at all."""
    right = mk.activation_patching(
        model, pairs, mk.accuracy(pairs), site="resid_pre", over="layer", layers=[model.n_layers - 1], progress=False
    )
    print("\n            logit difference   accuracy")
    for run in ("clean", "corrupted"):
        print(f"  {run:10} {float(heads.baseline[run].mean()):+12.3f} {float(right.baseline[run].mean()):14.0%}")


def timed(what, work):
    """Runs `work` and says how long it took."""
    begin = time.perf_counter()
    found = work()
    print(f"[{what}: {time.perf_counter() - begin:.1f} s]")
    return found


if __name__ == "__main__":
    main()
