"""How often confidence intervals of faithfulness cover, and how often sign-flip tests reject: a simulation of both.

    python benchmarks/truth/intervals.py [--draws 400] [--json out.json]

1. Simulates populations of prompts with a known faithfulness: each prompt has a metric in the model, in the circuit and in the
   empty circuit. They are logit differences whose deviations are symmetric, or in proportion to the gap; and log probabilities
   of which some prompts lose more than others, or of which one prompt in twenty carries nearly all that the circuit loses.
2. Draws sets of 8, 16, 32 and 64 prompts from each, and makes intervals of level 0.95 by `Result.ci` (percentile and studentized
   bootstrap). Reports how often they contain the population's faithfulness, how wide they are, and how often there is a caution
   (`Ratio.caution`).
3. Runs sign-flip tests of effects whose mean is exactly 0, and reports how often p < .05 for symmetric and for skewed effects.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import mechkit as mk
from mechkit._statistics import caution

SIZES = (8, 16, 32, 64)
METHODS = ("percentile", "studentized")
PROMPTS = 200_000  # in a population

# The metric in the model, in the circuit, in the empty circuit, each [prompt]
Population = tuple[np.ndarray, np.ndarray, np.ndarray]


def symmetric(rng: np.random.Generator, n: int) -> Population:
    gap = rng.normal(4, 2, n)
    return gap, 0.8 * gap + rng.normal(0, 1.5, n), np.zeros(n)


def in_proportion(rng: np.random.Generator, n: int) -> Population:
    gap = rng.exponential(1, n) + 0.2
    return gap, gap * rng.uniform(0.5, 1.1, n), np.zeros(n)


def uneven(rng: np.random.Generator, n: int) -> Population:
    model = -rng.lognormal(-3, 1, n)
    return model, model - rng.lognormal(-2, 1.5, n), model - rng.lognormal(0.5, 0.5, n)


def rare(rng: np.random.Generator, n: int) -> Population:
    model = -rng.lognormal(-3, 1, n)
    lost = np.where(rng.random(n) < 0.05, rng.lognormal(1.5, 1, n), rng.lognormal(-3, 1, n))
    return model, model - lost, model - rng.lognormal(1, 0.5, n)


POPULATIONS: dict[str, Callable[[np.random.Generator, int], Population]] = {
    "logit difference, symmetric deviations": symmetric,
    "logit difference, deviations in proportion": in_proportion,
    "log probability, uneven": uneven,
    "log probability, rare prompts carry the loss": rare,
}
NULLS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "exponential": lambda rng, shape: rng.exponential(size=shape) - 1,
    "lognormal": lambda rng, shape: rng.lognormal(0, 1, shape) - np.exp(0.5),
}


def result_of(values: np.ndarray, **baseline: np.ndarray) -> mk.Result:
    """Sets of prompts, `[draw prompt]`, as the cells of one result."""
    coords = {dim: tuple(range(size)) for dim, size in zip(("draw", "prompt"), values.shape, strict=True)}
    runs = {name: torch.from_numpy(run) for name, run in baseline.items()}
    base = "corrupted" if runs else ""
    return mk.Result(torch.from_numpy(values), tuple(coords), coords, runs, base, "simulated", "", {})


def covered(population: Population, size: int, draws: int, rng: np.random.Generator) -> dict[str, object]:
    """How often each kind of interval covers, and its median width."""
    truth = float((population[1] - population[2]).mean() / (population[0] - population[2]).mean())
    at = rng.integers(0, PROMPTS, (draws, size))
    clean, circuit, empty = (run[at] for run in population)
    cautions = sum(bool(caution(c - e, m - e)) for m, c, e in zip(clean, circuit, empty, strict=True))
    row: dict[str, object] = {"prompts": size, "caution": cautions / draws}
    result = result_of(circuit, clean=clean, corrupted=empty)
    for method in METHODS:
        ends = result.ci(normalized=True, method=method)
        low, high = ends.low.values.numpy(), ends.high.values.numpy()
        row[method] = float(((low <= truth) & (truth <= high)).mean())
        row[f"{method} width"] = float(np.median(high - low))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--draws", type=int, default=400, help="sets of prompts for each number (standard error .01 at 400)"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    report: dict[str, object] = {"draws": args.draws, "level": 0.95, "coverage": [], "sign flips": []}
    print("| deviations | prompts | percentile covers | studentized covers | widths | caution |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, draw in POPULATIONS.items():
        population = draw(rng, PROMPTS)
        for size in SIZES:
            row = {"population": name, **covered(population, size, args.draws, rng)}
            report["coverage"].append(row)
            widths = ", ".join(f"{row[f'{method} width']:.2f}" for method in METHODS)
            print(
                f"| {name} | {size} | {row['percentile']:.2f} | {row['studentized']:.2f} | {widths} | {row['caution']:.0%} |",
                flush=True,
            )
    print("\n| effects of mean 0 | prompts | p < .05 |\n| --- | --- | --- |")
    for name, null in NULLS.items():
        for size in SIZES[:3]:
            p = result_of(null(rng, (5 * args.draws, size))).p_values(1999, fdr=False).values.numpy()
            row = {"effects": name, "prompts": size, "below .05": float((p < 0.05).mean())}
            report["sign flips"].append(row)
            print(f"| {name} | {size} | {row['below .05']:.3f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
