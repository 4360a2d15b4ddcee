"""How the cost of exact sweeps grows: seconds, block-tokens and memory of `mk.activation_patching` on random Llama-shaped models.

    python benchmarks/patching/scaling.py [--sections layers budget] [--json out.json] [--quick] [--device cpu]

1. Each section varies one thing (cells, prompts, layers, length, heads, positions) and fixes the rest. The two prompts of a pair
   differ at one token, in the middle.
2. Each point runs in its own process (on a CPU). After a short warm-up, one sweep is timed, and a second one if the first was
   short. The section `budget` measures memory instead: the peak of the resident set above what was resident before the sweep
   (Linux), or of allocations on a GPU.
3. Block-tokens are counted by the sweep, and computed independently by `block_tokens` from the rule alone: a row that starts at
   layer l and position p costs (n_layers - l) x (length - p).
4. For each section, block-tokens and seconds are fitted twice: y = c x^a (a line through the logarithms: the exponent and its
   standard error), and y = fixed + slope x (R^2: the share of the variance that the line explains). The same two fits are made
   for seconds as a function of block-tokens over all sections.

Seconds on a CPU are processor time of one thread, the least over the sweeps of all `--rounds`. The JSON also has wall-clock time,
which other work on the machine increases. `--quick` runs tiny models in one process to check that the script works; its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where shared.py is

MIB = 2**20


@dataclass(frozen=True)
class Point:
    """One sweep of one model. `layers`, `heads` and `positions` restrict it; `None` takes all."""

    section: str
    x: int  # what the section varies
    n_layers: int = 8
    n_heads: int = 8
    d_model: int = 256
    d_mlp: int = 512
    prompts: int = 8
    length: int = 64
    site: str = "z"
    over: str = "layer head"
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    budget_mib: int = 256

    @property
    def first(self) -> int:
        """Where the two prompts of a pair differ."""
        return self.length // 2


VARIES = {
    "cells-layers": "cells (layers= 2 to 16 of 16)",
    "cells-heads": "cells (heads= 1 to 8 of 8)",
    "prompts": "prompts",
    "layers": "layers of the model",
    "length": "tokens of a prompt",
    "heads": "heads of the model",
    "positions": "positions of `layer pos`",
    "positions-length": "tokens of a prompt, `layer pos`",
    "budget": "prompts",
}


def points(quick: bool) -> list[Point]:
    """All points of all sections."""
    small: dict[str, Any] = {"d_model": 32, "d_mlp": 48, "n_layers": 4, "n_heads": 4, "prompts": 2, "length": 16}
    base = Point("", 0, **(small if quick else {}))
    depth, few = (8, 2) if quick else (16, 4)
    doubled = [4, 8, 16] if quick else [4, 8, 16, 32]
    found = []

    def add(section: str, x: int, **settings: Any) -> None:
        found.append(replace(base, section=section, x=x, **settings))

    for n in (1, 2, 4) if quick else (1, 2, 4, 8):
        layers = symmetric(2 * n, depth)
        add("cells-layers", 2 * n * base.n_heads, n_layers=depth, prompts=few, layers=layers)
        add("cells-heads", n * base.n_layers, heads=tuple(range(n)))
    for n in (2, 4, 8) if quick else (4, 8, 16, 32, 64):
        add("prompts", n, prompts=n)
    for n in (2, 4, 8) if quick else (4, 8, 16, 32):
        add("layers", n, n_layers=n, prompts=few)
    for n in (8, 16, 32) if quick else (16, 32, 64, 128):
        add("length", n, length=n)
        add("positions-length", n, length=n, prompts=few, site="resid_pre", over="layer pos")
    for n in doubled:
        add("heads", n, n_heads=n)
    half = base.length - base.first
    for n in (2, 4, 8) if quick else (4, 8, 16, 32):
        where = tuple(base.first + place for place in symmetric(n, half))
        add("positions", n, site="resid_pre", over="layer pos", positions=where)
    for budget in (8, 32, 128) if quick else (16, 64, 256):
        for n in (2, 8) if quick else (4, 16, 64):
            add("budget", n, prompts=n, budget_mib=budget)
    return found


def symmetric(n: int, of: int) -> tuple[int, ...]:
    """`n` of `of` indices, evenly spaced and symmetric around the middle, so that their mean does not depend on `n`."""
    lower = [int((i + 0.5) * of / n) for i in range(n // 2)]
    return tuple(lower + [of - 1 - i for i in reversed(lower)])


def block_tokens(point: Point) -> int:
    """The expected cost of a sweep without its proof: two runs of each prompt, and its rows."""
    depth, length, n = point.n_layers, point.length, point.prompts
    layers = point.layers or range(depth)
    every_pos = "pos" in point.over.split()
    places = (point.positions or range(length)) if every_pos else [point.first]
    starts = [p for p in places if p >= point.first]  # before it, the two runs are the same
    heads = len(point.heads or range(point.n_heads)) if "head" in point.over.split() else 1
    runs = 2 * n * depth * length
    rows = n * heads * sum((depth - layer) * (length - p) for layer in layers for p in starts)
    return runs + rows


# -- one point, in its own process --------------------------------------------------------------------------------


def measure(point: Point, device: str) -> dict[str, Any]:
    """Runs the sweep, and returns its time, memory and cost."""
    from shared import clock, held, machine, most_held

    import mechkit as mk

    model = random_model(point, device)
    pairs = random_pairs(point)
    metric = mk.logit_diff(pairs)

    def sweep(**restricted: Any) -> mk.Result:
        chosen = {name: getattr(point, name) for name in ("layers", "heads", "positions") if getattr(point, name)}
        options = {"budget": point.budget_mib * MIB, "progress": False} | chosen | restricted
        return mk.activation_patching(model, pairs, metric, point.site, point.over, **options)

    sweep(layers=[point.n_layers - 1], budget=MIB)  # libraries load and keep memory at their first use
    before = held(device)
    seconds, processor = [], []
    while not seconds or (len(seconds) == 1 and processor[0] < 5 and point.section != "budget"):
        began = time.process_time()
        wall, result = clock(device, sweep)
        processor.append(time.process_time() - began)
        seconds.append(wall)
    memory = {"used_mib": (most_held(device) - before) / MIB} if point.section == "budget" else {}
    return {
        "machine": machine(device),
        "cells": result.values[..., 0].numel(),
        "block_tokens": result.cost.block_tokens,
        "proof_block_tokens": result.cost.proof_block_tokens,
        "naive_block_tokens": result.cost.naive_block_tokens,
        "replay": result.provenance["replay"],
        "wall_seconds": min(seconds),
        "seconds": min(processor if device == "cpu" else seconds),
    } | memory


def random_model(point: Point, device: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import mechkit as mk

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=point.d_model,
        intermediate_size=point.d_mlp,
        num_hidden_layers=point.n_layers,
        num_attention_heads=point.n_heads,
        num_key_value_heads=point.n_heads // 2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        attn_implementation="eager",
    )
    return mk.HookedModel.from_hf(LlamaForCausalLM(config).to(device).eval(), name="random llama")


def random_pairs(point: Point) -> Any:
    import torch

    import mechkit as mk

    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(3, 512, (point.prompts, point.length), generator=generator)
    corrupted = clean.clone()
    corrupted[:, point.first] = 3 + (clean[:, point.first] - 3 + 1) % 509  # another token, not a special one
    return mk.PromptPairs.from_tokens(clean, corrupted, [(10, 20)] * point.prompts)


def in_a_process(point: Point, device: str) -> dict[str, Any]:
    """Forks, so that libraries are loaded once and each point starts with the same memory."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, (point, device))


# -- fits --------------------------------------------------------------------------------------------------------------


def fits(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The exponent of y = c x^a with its standard error, and the line y = fixed + slope x with its R^2."""
    log_x, log_y = [math.log(v) for v in x], [math.log(v) for v in y]
    exponent, intercept = statistics.linear_regression(log_x, log_y)
    left = sum((b - intercept - exponent * a) ** 2 for a, b in zip(log_x, log_y, strict=True))
    spread = sum((a - statistics.fmean(log_x)) ** 2 for a in log_x)
    error = math.sqrt(left / (len(x) - 2) / spread)
    slope, fixed = statistics.linear_regression(x, y)
    r2 = statistics.correlation(x, y) ** 2
    return {"exponent": exponent, "standard_error": error, "slope": slope, "fixed": fixed, "r2_line": r2}


# -- all of it ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=VARIES, default=list(VARIES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=1, help="number of times that all points are measured")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models in one process, to check that the script works"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    report = run(args.sections, args.device, args.quick, args.rounds)
    print_tables(report)
    print_fits(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def run(sections: Sequence[str], device: str, quick: bool, rounds: int) -> dict[str, Any]:
    """Measures all points of these sections in each round, and keeps the least time and the most memory of each."""
    import torch

    torch.set_num_threads(1)  # a process that has started more must not be forked
    chosen = [point for point in points(quick) if point.section in sections]
    rows: dict[Point, dict[str, Any]] = {}
    random_model(Point("", 0, n_layers=1, d_model=32, d_mlp=32), "cpu")  # loads libraries once, before any fork
    for turn in range(rounds):
        for point in chosen:
            found = in_a_process(point, device) if device == "cpu" and not quick else measure(point, device)
            rows[point] = merged(rows[point], found) if turn else found
            print(f"round {turn + 1}, {point.section} {point.x}: {found['seconds']:.2f} s", file=sys.stderr, flush=True)
    machine = next(iter(rows.values()))["machine"]
    report: dict[str, Any] = {"machine": machine, "threads": 1, "rounds": rounds, "device": device, "quick": quick}
    report["sections"] = {name: section_of(name, rows) for name in dict.fromkeys(point.section for point in chosen)}
    timed = [row for point, row in rows.items() if point.section != "budget"]
    if timed:
        x, y = ([row[name] for row in timed] for name in ("block_tokens", "seconds"))
        report["seconds_of_block_tokens"] = fits(x, y)
    return report


def merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Merges two measurements of the same point."""
    merge = {"wall_seconds": min, "seconds": min, "used_mib": max}
    for name in a.keys() - merge.keys():
        assert a[name] == b[name], name  # counts must be equal
    return a | {name: choose(a[name], b[name]) for name, choose in merge.items() if name in a}


def section_of(name: str, rows: dict[Point, dict[str, Any]]) -> dict[str, Any]:
    found = []
    for point, row in rows.items():
        if point.section == name:
            row = {key: value for key, value in row.items() if key != "machine"}
            named = {"x": point.x, "budget_mib": point.budget_mib, "expected_block_tokens": block_tokens(point)}
            found.append(named | row | {"point": asdict(point)})
    section: dict[str, Any] = {"varies": VARIES[name], "points": found}
    if name != "budget":
        x = [row["x"] for row in found]
        section["fits"] = {y: fits(x, [row[y] for row in found]) for y in ("block_tokens", "seconds")}
    return section


# -- showing -----------------------------------------------------------------------------------------------------------


def print_tables(report: dict[str, Any]) -> None:
    for name, section in report["sections"].items():
        print(f"\n{name}\n")
        print(f"| {section['varies']} | cells | block-tokens | seconds | µs each | budget, MiB | most used, MiB |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for row in section["points"]:
            each = row["seconds"] / row["block_tokens"] * 1e6
            print(
                f"| {row['x']} | {row['cells']} | {row['block_tokens']:,} | {row['seconds']:.2f} | {each:.1f} |", end=""
            )
            print(f" {row['budget_mib']} | {round(row['used_mib']) if 'used_mib' in row else ''} |")


def print_fits(report: dict[str, Any]) -> None:
    rows = [row for section in report["sections"].values() for row in section["points"]]
    beside_proof = [row["block_tokens"] - row["proof_block_tokens"] for row in rows]
    as_expected = sum(n == row["expected_block_tokens"] for n, row in zip(beside_proof, rows, strict=True))
    print(f"\n{report['machine']}, {report['threads']} thread")
    print(f"Counted block-tokens equal the formula's at {as_expected} of {len(rows)} points\n")
    print("| | block-tokens: exponent | R² of a line | seconds: exponent | R² of a line |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, section in report["sections"].items():
        if "fits" in section:
            each = [section["fits"][y] for y in ("block_tokens", "seconds")]
            cells = [f"{f['exponent']:.2f} ± {f['standard_error']:.2f} | {f['r2_line']:.4f} |" for f in each]
            print(f"| {name} |", *cells)
    if found := report.get("seconds_of_block_tokens"):
        line = f"{found['slope'] * 1e6:.1f} µs per block-token + {found['fixed']:.2f} s (R² {found['r2_line']:.4f})"
        print(f"\nseconds of all sections: {line}; exponent {found['exponent']:.2f} ± {found['standard_error']:.2f}")


if __name__ == "__main__":
    main()
