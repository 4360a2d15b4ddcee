"""How good estimates of edges' effects are: each held against the exact effects of all edges.

    python benchmarks/circuits.py --exact-all exact.safetensors [--direction noise]      # may be stopped and called again
    python benchmarks/circuits.py --agreement --exact exact.safetensors [another.safetensors …]

The same pairs and metric as in the exact effects, whose direction is read off the file: "denoise" puts one edge's clean value
into the corrupted run, "noise" its corrupted value into the clean one. Scores and effects are means over the pairs. "Top" are
the `TOP` edges whose exact effects are furthest from 0; one column says how many of them are among the estimate's own. The
completeness error is how far the scores of the embedding's edges are from adding up to the gap between the two runs, as a share
of it (`mk.edge_attribution`; exact gradients between embeddings alone have one).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from attribution import make_pairs
from patching import clock

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


def exact_all(args: argparse.Namespace) -> dict[str, Any]:
    """Computes and saves the exact effects of all edges; seconds are those of this call."""
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
    if not before:  # the file does not say what the calls before this one ran
        figures |= {"block_tokens": scores.cost.block_tokens, "naive_block_tokens": scores.cost.naive_block_tokens}
    print(f"{done - before:,} of {done:,} edges in {seconds:.0f} s ({seconds / 60:.1f} minutes): {scores}")
    return figures


def agreement(args: argparse.Namespace) -> dict[str, Any]:
    """By file of exact effects and estimate, correlations."""
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
        raise SystemExit(f"{path}: exact effects of other prompts than these {len(pairs)} pairs")
    return scores


def correlations(mk: Any, scores: Any, exact: Any) -> dict[str, float]:
    """Over the edges that have an exact effect, and over the `TOP` of them."""
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
    """Which are the `TOP` furthest from 0."""
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
