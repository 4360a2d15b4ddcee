"""How well estimates of patching effects agree with exact patching, and how nearly their sums equal the gap between the runs.

    python benchmarks/attribution/agreement.py [--model smollm2-135m] [--pairs 8] [--json out.json]

1. Correlation with exact activation patching on IOI, by site: attribution patching, RelP (with and without attention's gradient),
   integrated gradients. Effects are averaged over prompts. "but layer 0" omits the first layer, whose MLP represents the token.
2. Completeness of integrated gradients: absolute error of the sums, as a share of the absolute gap between the two runs.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import mechkit as mk

SITES = {
    "mlp_out": "layer",
    "attn_out": "layer",
    "z": "layer head",
    "resid_pre": "layer position",
}
METHODS = {
    "attribution patching": mk.attribution_patching,
    "RelP": mk.relp,
    "RelP, attention frozen": partial(mk.relp, attention="frozen"),
    "integrated gradients, 5 stretched": partial(mk.integrated_gradients, steps=5, rule="stretched"),
}
RULES = ((50, "midpoint"), (5, "gauss-legendre"), (5, "stretched"), (6, "stretched"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    model = mk.HookedModel.from_pretrained(args.model)
    pairs = mk.tasks.ioi(model, n=args.pairs, seed=0)
    metric = mk.logit_diff(pairs)
    report = {"model": args.model, "pairs": args.pairs, "correlation": [], "completeness": []}
    print("\n| site | method | Pearson | but layer 0 | Spearman | sign right | top-10 recall |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    later = list(range(1, model.n_layers))
    for site, over in SITES.items():
        exact = mk.activation_patching(model, pairs, metric, site, over, progress=False)
        for name, method in METHODS.items():
            approx = method(model, pairs, metric, site, over)
            c = mk.compare(approx, exact)
            rest = mk.compare(approx.sel(layer=later), exact.sel(layer=later)).pearson
            print(
                f"| {site} by {over} | {name} | {c.pearson:.3f} | {rest:.3f} | {c.spearman:.3f} | {c.sign_agreement:.0%} | "
                f"{c.recall:.0%} |",
                flush=True,
            )
            row = {"site": site, "over": over, "method": name, "pearson": c.pearson, "pearson_but_layer_0": rest}
            report["correlation"].append(row | {"spearman": c.spearman, "sign": c.sign_agreement, "recall": c.recall})
    print("\n| integrated gradients of | steps | completeness error |\n| --- | --- | --- |")
    for site, layers in (("z", list(range(0, model.n_layers, 6))), ("resid_pre", [0])):
        for steps, rule in RULES:
            found = mk.integrated_gradients(model, pairs, metric, site, "layer", steps=steps, rule=rule, layers=layers)
            error = found.provenance["completeness_error"]
            what = "heads' outputs" if site == "z" else "the embeddings"
            print(f"| {what} | {steps} {rule} | {error:.2%} |", flush=True)
            report["completeness"].append({"site": site, "steps": steps, "rule": rule, "error": error})
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
