"""Whether the proof of the replay detects planted defects, and what the proof costs.

    python benchmarks/truth/replay_proof.py [--seeds 0 1 2 3 4] [--families gpt2 llama …]
        [--dtypes float64 bfloat16 float16] [--json out.json]
    python benchmarks/truth/replay_proof.py --cost [--json out.json]

Defects (`tests/helpers/planted.py`) are planted into the replay, one by one, in every kind of sweep on tiny random models of
every family and seed. Whole forward passes give the right values. A defect *moves* a sweep if some cell is off by more than
`--tolerance` without the proof. It is *refuted* if the values with the proof are right, or if the sweep refuses to answer. In
half precision a cell may be off by three times the right replay's own rounding error; a defect that moves less cannot be
distinguished from rounding, and is listed.

`--cost` counts the block-tokens of the proof in three sweeps of SmolLM2: every head, the stream by position, heads by position.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import mechkit as mk

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where shared.py is
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # for tests/helpers
from shared import SWEEPS, fixed_pairs

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    from helpers.families import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    known = [f for f in FAMILIES if f != "mixtral"]
    parser.add_argument(
        "--families", nargs="+", choices=[*known, "smollm2"], default=known, help="smollm2: the real model"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float64"])
    parser.add_argument("--tolerance", type=float, default=1e-8, help="share of the largest value, in float64")
    parser.add_argument("--cost", action="store_true", help="count what the proof costs on SmolLM2 instead")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = cost() if args.cost else defects(args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


# -- defects -----------------------------------------------------------------------------------------------------------


def defects(args: argparse.Namespace) -> dict[str, Any]:
    from helpers.planted import DEFECTS

    began, report = time.perf_counter(), {}
    for dtype in args.dtypes:
        tried, moving, refuted, missed, within = (Counter() for _ in range(5))
        accepted: Counter[str] = Counter()
        for family in args.families:
            for seed in args.seeds:
                for sweep, name, moved, left, rounding, how in one_model(family, seed, DTYPES[dtype]):
                    accepted[how] += name is None
                    if name is None:
                        continue
                    allowed = args.tolerance if dtype == "float64" else max(3 * rounding, 1e-4)
                    tried[name] += 1
                    if moved <= allowed:
                        within[name] += moved > 1e-12
                        continue
                    moving[name] += 1
                    right = left is None or left <= allowed
                    refuted[name] += right
                    if not right:
                        missed[f"{name}: {family}, seed {seed}, {' over '.join(sweep)}: off by {left:.1e}"] += 1
            print(f"{dtype} {family}: {sum(refuted.values())} of {sum(moving.values())} refuted so far", flush=True)
        print(f"\n{dtype}: right replays {dict(accepted)}\n")
        print(
            "| defect | sweeps tried | moves a cell | refuted | moves less than rounding |\n| --- | --- | --- | --- | --- |"
        )
        for name in DEFECTS:
            print(f"| {name} | {tried[name]} | {moving[name]} | {refuted[name]} | {within[name]} |")
        print(*missed, sep="\n")
        report[dtype] = {
            "right replays": dict(accepted),
            "defects": {n: [tried[n], moving[n], refuted[n], within[n]] for n in DEFECTS},
            "columns": ["sweeps tried", "moves a cell", "refuted", "moves less than rounding"],
            "missed": list(missed),
        }
    print(f"{time.perf_counter() - began:.0f} s")
    return {"families": args.families, "seeds": args.seeds, "tolerance": args.tolerance} | report


def one_model(family: str, seed: int, dtype: torch.dtype) -> Any:
    from helpers.families import build_hf
    from helpers.planted import DEFECTS, off, outcome, swept
    from helpers.planted import SWEEPS as TINY_SWEEPS
    from helpers.tiny import make_pairs, whole_vocabulary

    if family == "smollm2":
        model = mk.HookedModel.from_pretrained("smollm2-135m", device="cpu", dtype=dtype)
        pairs, more = fixed_pairs(mk, model, 2, prepend_bos=None), {"layers": [12, 25, 28]}
        metric, sweeps = mk.logit_diff(pairs), [("resid_pre", "layer pos"), ("z", "layer head")]
    else:
        model = mk.HookedModel.from_hf(build_hf(family, dtype, seed), name=family)
        pairs, more = make_pairs(seed=seed), {}
        metric, sweeps = whole_vocabulary(pairs), [sweep for sweep in TINY_SWEEPS if model.has_site(sweep[0])]
    for sweep in sweeps:
        right = swept(model, pairs, metric, sweep, replay=False, **more)
        found = swept(model, pairs, metric, sweep, **more)
        rounding = off(found, right)
        yield sweep, None, rounding, rounding, rounding, found.provenance["replay"]
        for name in DEFECTS:
            yield (sweep, name, *outcome(model, pairs, metric, sweep, name, right, **more), rounding, "")


# -- cost --------------------------------------------------------------------------------------------------------------


def cost() -> dict[str, Any]:
    """Block-tokens of the README's sweeps, and of the proof in them."""
    model = mk.HookedModel.from_pretrained("smollm2-135m", device="cpu")
    pairs = fixed_pairs(mk, model, 4)
    print("| sweep | block-tokens | of the proof | share |\n| --- | --- | --- | --- |")
    report = {}
    for name, (site, over) in SWEEPS.items():
        cells = grid(model, site, over, len(pairs.clean.tokens[0]))
        answers = mk.sweep(model, pairs.corrupted, cells, mk.logit_diff(pairs), source=pairs.clean, progress=False)
        total, proof = answers.cost.block_tokens, answers.cost.proof_block_tokens
        print(f"| {name} | {total:,} | {proof:,} | {proof / total:.1%} | {answers.replay}", flush=True)
        report[name] = {"block_tokens": total, "proof": proof, "replay": answers.replay}
    return report


def grid(model: mk.HookedModel, site: str, over: str, length: int) -> list[tuple[mk.Edit, ...]]:
    heads = range(model.n_heads) if "head" in over else [None]
    positions = range(length) if "pos" in over else [None]
    return [
        (mk.Edit(site, layer, head=head, pos=pos),)
        for layer in range(model.n_layers)
        for pos in positions
        for head in heads
    ]


if __name__ == "__main__":
    main()
