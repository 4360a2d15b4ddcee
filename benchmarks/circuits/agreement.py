"""How well estimates of edges' effects agree with the exact effects of all edges.

    python benchmarks/circuits/agreement.py --exact-all exact.safetensors [--direction noise]     # resumes where it stopped
    python benchmarks/circuits/agreement.py --exact exact.safetensors [another.safetensors …] [--json out.json]

The pairs and the metric are those of the exact effects, and the file names their direction: "denoise" puts one edge's clean
value into the corrupted run, "noise" its corrupted value into the clean run. Scores and effects are means over the pairs. "Top"
are the `TOP` edges with the largest absolute exact effects; one column gives the share of them among the estimate's own top. The
completeness error is the difference between the sum of the scores of the embedding's edges and the gap between the two runs, as a
share of the gap (`mk.edge_attribution`; only exact gradients between embeddings have one).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where shared.py is
from shared import clock, machine, make_pairs

TOP = 200
ESTIMATES: dict[str, dict[str, Any]] = {
    "EAP, gradient at clean": {"steps": 1, "direction": "noise"},
    "EAP, gradient at corrupted": {"steps": 1, "direction": "denoise"},
    "EAP at both ends (clean-corrupted)": {"rule": "clean-corrupted"},
    "EAP-IG, 5 steps of the EAP-IG package": {"steps": 5, "rule": "left"},
    "EAP-IG, 5 steps": {"steps": 5},
    "EAP-IG, 5 Gauss-Legendre steps": {"steps": 5, "rule": "gauss-legendre"},
    "EAP-IG, 20 steps": {"steps": 20},
    "EAP-IG, 50 midpoints": {"steps": 50, "rule": "midpoint"},
    "RelP-style, at clean": {"steps": 1, "direction": "noise", "gradient": "relp"},
    "RelP-style, at corrupted": {"steps": 1, "direction": "denoise", "gradient": "relp"},
    "EAP-IG on activations, 3 steps, from clean": {"steps": 3, "path": "activation", "direction": "noise"},
    "EAP-IG on activations, 3 steps, from corrupted": {"steps": 3, "path": "activation", "direction": "denoise"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument(
        "--exact-all", type=Path, metavar="FILE", help="compute every edge's exact effect into this file"
    )
    parser.add_argument("--direction", choices=("denoise", "noise"), default="denoise", help="of --exact-all")
    parser.add_argument(
        "--exact",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="compare estimates with what --exact-all or EdgeScores.save wrote",
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    if not (args.exact_all or args.exact):
        parser.error("give --exact-all FILE, to compute exact effects, or --exact FILE, to compare estimates with them")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"machine": machine(args.device), "device": args.device, "threads": args.threads}
    report |= {"model": args.model, "pairs": args.pairs}
    if args.exact_all:
        report["exact_all"] = exact_all(args)
    if args.exact:
        report["agreement"] = agreement(args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def exact_all(args: argparse.Namespace) -> dict[str, Any]:
    """Computes and saves the exact effects of all edges. Seconds are of this call only."""
    import mechkit as mk

    model, pairs = load(mk, args)
    before = 0
    if args.exact_all.exists():
        before = len(mk.EdgeScores.load(args.exact_all).edges)
    cpu = time.process_time()
    seconds, scores = clock(
        args.device,
        lambda: mk.edge_patching(
            model, pairs, mk.logit_diff(pairs), direction=args.direction, checkpoint=args.exact_all, progress=True
        ),
    )
    done = len(scores.edges)
    figures = {"direction": args.direction, "edges": done, "edges_in_this_call": done - before, "seconds": seconds}
    figures |= {"cpu_seconds": time.process_time() - cpu, "replay": scores.provenance["replay"], "block_tokens": None}
    if not before:  # the file does not record the cost of earlier calls
        figures |= {"block_tokens": scores.cost.block_tokens, "naive_block_tokens": scores.cost.naive_block_tokens}
    print(f"{done - before:,} of {done:,} edges in {seconds:.0f} s ({seconds / 60:.1f} minutes): {scores}")
    return figures


def agreement(args: argparse.Namespace) -> dict[str, Any]:
    """Correlations of each estimate with each file of exact effects."""
    import mechkit as mk

    model, pairs = load(mk, args)
    exact = {str(path): read(mk, path, pairs) for path in args.exact}
    found: dict[str, Any] = {"top": TOP, "estimates": {}, "exact": {}}
    for name, options in ESTIMATES.items():
        seconds, scores = clock(
            args.device, lambda options=options: mk.edge_attribution(model, pairs, mk.logit_diff(pairs), **options)
        )
        found["estimates"][name] = {
            "seconds": seconds,
            "block_tokens": scores.cost.block_tokens,
            "completeness_error": scores.provenance.get("completeness_error"),
        }
        for effects in exact.values():
            direction = effects.provenance["direction"]
            figures = found["exact"].setdefault(direction, {"edges": len(effects.edges), "agreement": {}})
            figures["agreement"][name] = correlations(mk, scores, effects)
    print_tables(args, found)
    return found


def load(mk: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    model = mk.HookedModel.from_pretrained(args.model, device=args.device)
    return model, make_pairs(mk, model, "plain", args.pairs)


def read(mk: Any, path: Path, pairs: Any) -> Any:
    scores = mk.EdgeScores.load(path)
    if scores.provenance["tokens_hash"] != pairs.clean.hash():
        raise SystemExit(f"{path}: these exact effects are of other prompts than the {len(pairs)} pairs here")
    return scores


def correlations(mk: Any, scores: Any, exact: Any) -> dict[str, float]:
    """Correlations over the edges that have an exact effect, and over the `TOP` of them."""
    top = largest(exact.values, ~exact.values.isnan())
    some = mk.EdgeScores.of(
        exact.graph,
        exact.values.masked_fill(~top, torch.nan),
        baseline=exact.baseline,
        metric=exact.metric,
        unit=exact.unit,
        provenance=exact.provenance,
        prompts=False,
    )
    methods = ("pearson", "spearman")
    found = {method: scores.correlation(exact, method=method) for method in methods}
    found |= {f"{method}_top": scores.correlation(some, method=method) for method in methods}
    return found | {"top_found": float((top & largest(scores.values, ~exact.values.isnan())).sum() / top.sum())}


def largest(values: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """True for the `TOP` largest absolute values."""
    size = values.abs().masked_fill(~among, -1).flatten()
    chosen = torch.zeros(values.numel(), dtype=torch.bool)
    chosen[size.argsort(descending=True, stable=True)[:TOP]] = True
    return chosen.reshape(values.shape) & among


def print_tables(args: argparse.Namespace, found: dict[str, Any]) -> None:
    titles = (
        "estimate",
        "Pearson",
        "Spearman",
        f"Pearson, top {TOP}",
        f"Spearman, top {TOP}",
        f"of the top {TOP}",
        "completeness error",
        "seconds",
    )
    for direction, figures in found["exact"].items():
        run = "the corrupted run" if direction == "denoise" else "the clean run"
        print(f"\n{args.model}, {args.pairs} pairs: against the exact effects in {run} of {figures['edges']:,} edges\n")
        print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
        for name, c in figures["agreement"].items():
            numbers = [c[key] for key in ("pearson", "spearman", "pearson_top", "spearman_top")]
            shown = " | ".join(f"{number:.3f}" for number in numbers)
            estimate = found["estimates"][name]
            off = "" if estimate["completeness_error"] is None else f"{estimate['completeness_error']:.2%}"
            print(f"| {name} | {shown} | {c['top_found']:.0%} | {off} | {estimate['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
