"""What prompts of several lengths cost: the head sweep on IOI pairs of many lengths, against as many pairs of one length.

    python benchmarks/patching/lengths.py [--prompts 64] [--rounds 3] [--model smollm2-135m] [--json out.json]

Both sweeps run in one process, in turn, after a warm-up; the medians are compared per block-token, since the prompts differ in
how much of them a change can reach. `apart` is the same sweep with each length by itself: what running prompts together saves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where shared.py is
from shared import SWEEPS, clock, machine, make_pairs


def main() -> None:
    import mechkit as mk

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    model = mk.HookedModel.from_pretrained(args.model, device=args.device)
    site, over = SWEEPS["head"]

    def sweep(pairs: Any) -> Any:
        return mk.activation_patching(model, pairs, mk.logit_diff(pairs), site=site, over=over, progress=False)

    many, one = (make_pairs(mk, model, kind, args.prompts) for kind in ("ioi", "plain"))
    groups = [many[ids] for ids in many.clean.by_length().values()]
    ways = {
        "several lengths": lambda: [sweep(many)],
        "apart": lambda: [sweep(group) for group in groups],
        "one length": lambda: [sweep(one)],
    }
    sweep(one[list(range(min(4, len(one))))])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens = {}
    for _ in range(args.rounds):
        for name, run in ways.items():
            took, results = clock(args.device, run)
            seconds[name].append(took)
            tokens[name] = sum(result.cost.block_tokens for result in results)
    figures = {
        name: {
            "seconds": statistics.median(seconds[name]),
            "block_tokens": tokens[name],
            "microseconds_per_block_token": statistics.median(seconds[name]) / tokens[name] * 1e6,
        }
        for name in ways
    }
    report = {
        "machine": machine(args.device),
        "model": args.model,
        "prompts": args.prompts,
        "lengths": sorted(set(many.clean.lengths.tolist())),
        "sweeps": figures,
    }
    print(f"{args.model}, {args.prompts} IOI pairs, lengths {report['lengths']}, on {report['machine']}\n")
    print("| prompts | seconds | block-tokens | us a block-token |\n| --- | --- | --- | --- |")
    for name, of in figures.items():
        print(f"| {name} | {of['seconds']:.1f} | {of['block_tokens']:,} | {of['microseconds_per_block_token']:.1f} |")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
