"""Which component wrote the answer, when does the model believe it, and how far can a gradient be trusted to tell?

    python examples/attribution.py [--model smollm2-135m] [--pairs 8] [--out out]

On indirect-object-identification prompts:

1. Direct logit attribution: what each layer, and each head at each named position, wrote into the logit difference; and whether
   later components take the strongest head's contribution out again (the erasure check).
2. Logit lens: how probable are the right and the wrong name, layer by layer?
3. Attribution patching against exact activation patching: heads, and MLPs, where it fails; integrated gradients and RelP there;
   the strongest cells of the estimate corrected by exact patching.

Wang et al. 2022, https://arxiv.org/abs/2211.00593; Kramar et al. 2024, https://arxiv.org/abs/2403.00745.
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
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    model = timed("load", lambda: mk.HookedModel.from_pretrained(args.model))
    print(model)
    pairs = mk.tasks.ioi(model, n=args.pairs, seed=args.seed)
    metric = mk.logit_diff(pairs)

    heads_wrote = who_wrote_it(model, pairs, metric)
    lens = when_is_it_known(model, pairs)
    approx, exact = how_far_to_trust_a_gradient(model, pairs, metric)

    pictures = {
        "attribution_dla_heads.html": (heads_wrote, "Direct logit attribution by head, in logits"),
        "attribution_lens.html": (lens, "Log-probability of the two names at the end, by the logit lens"),
        "attribution_approx.html": (approx, "Attribution patching: estimated effect of patching a head"),
        "attribution_exact.html": (exact, "Activation patching: exact effect of patching a head"),
    }
    print()
    for name, (result, title) in pictures.items():
        print("wrote", mk.plot.write_html(mk.plot.heatmap(result, title=title), args.out / name))


def who_wrote_it(model: mk.HookedModel, pairs: mk.PromptPairs, metric: mk.Metric) -> mk.Result:
    """Direct logit attribution, and the erasure check on its strongest head."""
    parts = timed("direct logit attribution", lambda: mk.direct_logit_attribution(model, pairs, metric))
    by_head = mk.direct_logit_attribution(model, pairs, metric, over="layer head").mean("prompt")
    by_source = mk.direct_logit_attribution(model, pairs, metric, over="layer head position").mean("prompt")
    total, off = parts.provenance["total"], parts.provenance["residual_error"]
    print(f"\nWho wrote the logit difference of {total:.2f}? (all terms sum to it, to {off:.0e})")
    for what, result in (("layers", parts.mean("prompt")), ("heads", by_head), ("heads, by what they read", by_source)):
        print(f"  {what:25}", ", ".join(f"{cell.label} {cell.value:+.2f}" for cell in result.top(5)))
    strongest = by_head.top(1)[0].coords
    head = (int(strongest["layer"]), int(strongest["head"]))
    print("  erasure check:", mk.dla_erasure_check(model, pairs, metric, head))
    return by_head


def when_is_it_known(model: mk.HookedModel, pairs: mk.PromptPairs) -> mk.Result:
    """The logit lens at the last position: dims `("layer", "token")`."""
    lens = timed("logit lens", lambda: mk.logit_lens(model, pairs, value="log_prob", over="layer")).mean("prompt")
    print("\nLog-probability (nats) of the right and the wrong name at the end, by the logit lens after each layer:")
    last = model.n_layers - 1
    for layer in sorted({*range(0, last, max(1, last // 4)), *range(max(0, last - 5), last + 1)}):
        right, wrong = (float(lens.sel(layer=layer, token=token).values) for token in ("right", "wrong"))
        print(f"  {layer:3}  {right:8.2f}  {wrong:8.2f}")
    return lens


def how_far_to_trust_a_gradient(
    model: mk.HookedModel, pairs: mk.PromptPairs, metric: mk.Metric
) -> tuple[mk.Result, mk.Result]:
    """Attribution patching, its better variants, and the exact answer. Returns the estimated and the exact effects of heads."""
    both = timed(
        "attribution patching (heads and MLPs)",
        lambda: mk.attribution_patching(model, pairs, metric, {"z": "layer head", "mlp_out": "layer"}),
    )
    exact = timed(
        "exact patching (heads and MLPs)",
        lambda: {
            site: mk.activation_patching(model, pairs, metric, site, result.provenance["over"])
            for site, result in both.items()
        },
    )
    print("\nAttribution patching against exact patching:")
    for site, result in both.items():
        print(f"  {site:8}", mk.compare(result, exact[site]))
    print("\nBetter estimates for the MLPs, where the first order fails:")
    integrated = timed(
        "integrated gradients, 5 steps",
        lambda: mk.integrated_gradients(model, pairs, metric, "mlp_out", "layer", steps=5, rule="stretched"),
    )
    print("  integrated gradients", mk.compare(integrated, exact["mlp_out"]))
    print("  RelP                ", mk.compare(mk.relp(model, pairs, metric, "mlp_out", "layer"), exact["mlp_out"]))
    corrected = mk.verify(both["mlp_out"], model, pairs, metric, top=5)
    print("  top 5 verified      ", mk.compare(corrected, exact["mlp_out"]))
    return both["z"].mean("prompt").effect(), exact["z"].mean("prompt").effect()


def timed(what, work):
    """Runs `work` and says how long it took."""
    begin = time.perf_counter()
    found = work()
    print(f"[{what}: {time.perf_counter() - begin:.1f} s]")
    return found


if __name__ == "__main__":
    main()
