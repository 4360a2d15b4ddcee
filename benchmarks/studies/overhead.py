"""What a study costs in addition to its techniques, and how it copes with many jobs.

    python benchmarks/studies/overhead.py [overhead jobs] [--jobs 10000] [--repeats 5] [--json out.json]

"overhead" runs one sweep (SmolLM2-135M, heads, 16 IOI pairs) alternately by itself and as a study with the same loaded model. It
prints the median of the ratios of times, and two figures that other work on the machine does not affect: the ratio of
block-tokens, and the time spent outside of shards. "jobs" makes a study of many jobs (a grid of seeds over a tiny random
model) with a technique that costs nothing, and times expansion, status, results, and the table in Parquet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mechkit as mk

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where shared.py is
from shared import clock, machine

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where workers find this module
WHAT = ("overhead", "jobs")
HERE = Path(__file__).stem  # jobs name the functions below as `overhead:tiny_model`


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    figures: dict[str, Any] = {"machine": machine("cpu")}
    with tempfile.TemporaryDirectory() as folder:
        if "overhead" in args.what:
            figures["overhead"] = overhead(args, Path(folder))
        if "jobs" in args.what:
            figures["jobs"] = many_jobs(args.jobs, Path(folder))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="overhead, jobs; default both")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(argv)
    args.what = args.what or list(WHAT)  # with choices, argparse of Python 3.11 refuses its own default
    if unknown := set(args.what) - set(WHAT):
        parser.error(f"what: expected {' or '.join(WHAT)}, got {', '.join(sorted(unknown))}")
    return args


def overhead(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = mk.HookedModel.from_pretrained(args.model)
    pairs = mk.tasks.ioi(model, n=args.prompts, seed=0)
    metric = mk.logit_diff(pairs)
    arguments = {"site": "z", "over": "layer head"}

    def directly() -> Any:
        return mk.activation_patching(model, pairs, metric, **arguments, progress=False)

    def as_a_study(i: int) -> Any:
        study = mk.Study(
            [args.model],
            [{"name": "ioi", "n": args.prompts}],
            [{"name": "activation_patching", **arguments}],
            store=folder / f"overhead{i}",
        )
        report = study.run(mk.studies.InProcess(loaded={args.model: model}), progress=False)
        assert not report.failed, report
        return study, report

    directly()
    rows = []
    for i in range(args.repeats):
        alone, result = clock("cpu", directly)
        inside, (study, report) = clock("cpu", lambda i=i: as_a_study(i))
        stored = study.results().result()
        rows.append(
            {
                "alone": alone,
                "study": inside,
                "ratio": inside / alone,
                "outside_shards": inside - report.shard_seconds,
                "block_tokens": stored.cost.block_tokens / result.cost.block_tokens,
                "difference": float((stored.values - result.values).abs().max()),
            }
        )
        print(
            f"alone {alone:.1f} s, as a study of {report.computed} shards {inside:.1f} s, of which "
            f"{rows[-1]['outside_shards']:.2f} s outside of shards: {inside / alone:.3f} times"
        )
    ratio = statistics.median(row["ratio"] for row in rows)
    outside = statistics.median(row["outside_shards"] / row["alone"] for row in rows)
    print(
        f"{args.prompts} IOI pairs, heads of {args.model}: a study takes {ratio:.3f} times as long (median of {args.repeats}); "
        f"it computes {rows[0]['block_tokens']:.4f} times the block-tokens, and spends {outside:.1%} of the time outside shards"
    )
    return {
        "prompts": args.prompts,
        "model": args.model,
        "shards": report.computed,
        "median_ratio": ratio,
        "rows": rows,
    }


def many_jobs(n: int, folder: Path) -> dict[str, Any]:
    store = folder / "jobs"

    def make_study() -> mk.Study:
        return mk.Study(
            [{"name": f"{HERE}:tiny_model", "label": "tiny"}],
            [{"name": f"{HERE}:tiny_pairs", "label": "pairs", "grid": {"seed": list(range(n // 10))}}],
            [{"name": f"{HERE}:constant", "label": "constant", "grid": {"value": list(range(10))}}],
            store=store,
        )

    figures: dict[str, Any] = {}
    figures["expand"], study = clock("cpu", make_study)
    assert len(study) == n // 10 * 10
    figures["run"], report = clock("cpu", lambda: study.run(progress=False))
    assert not report.failed, report
    figures["run_again"], report = clock("cpu", lambda: study.run(progress=False))
    assert report.computed == 0
    figures["status"], status = clock("cpu", study.status)
    assert status.count("done") == len(study)
    figures["results"], table = clock("cpu", study.results)
    figures["one_result"], _ = clock("cpu", lambda: table.result(seed=n // 10 - 1, value=7))
    figures["parquet"], path = clock("cpu", lambda: table.to_parquet(folder / "table.parquet"))
    for what, seconds in figures.items():
        print(f"{len(study):,} jobs: {what} {seconds:.2f} s")
    return {"n": len(study), "rows": len(study) * 4 * 4 * 2, "parquet_bytes": path.stat().st_size, "seconds": figures}


# -- what the study of many jobs names -----------------------------------------------------------------------------------


def tiny_model() -> mk.HookedModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=4, n_head=4, n_positions=16)
    return mk.HookedModel.from_hf(GPT2LMHeadModel(config).eval(), name="tiny")


def tiny_pairs(model: mk.HookedModel, seed: int = 0) -> mk.PromptPairs:
    clean = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(seed))
    corrupted = clean.clone()
    corrupted[:, 2] = (clean[:, 2] + 1) % 50
    return mk.PromptPairs.from_tokens(clean, corrupted, [(1, 2), (3, 4)])


def constant(model: mk.HookedModel, pairs: mk.PromptPairs, value: int = 0) -> mk.Result:
    dims = {"layer": tuple(range(4)), "head": tuple(range(4)), "prompt": (0, 1)}
    baseline = {"corrupted": torch.zeros(2), "clean": torch.ones(2)}
    return mk.Result(torch.full((4, 4, 2), float(value)), tuple(dims), dims, baseline, "corrupted", "none", "", {})


if __name__ == "__main__":
    main()
