"""How near mechkit's sweeps come to the machine's limit at the shapes that they run: the time of their matrix products alone.

    python benchmarks/patching/limit.py [--model smollm2-135m] [--prompts 4] [--sweeps head resid edges] [--json out.json]

The rate of a large matrix multiplication is no limit for small batches, whose products are slower on any machine. So:

1. One sweep is watched: every matrix product of a linear layer (torch's `mm` and `addmm`), with its tokens, inputs and outputs.
   Recorded runs, the proof and all batches count, as they count in the sweep's seconds.
2. Each distinct shape is run by itself, `torch.nn.functional.linear` on random numbers of the same dtype, warm, and its time is
   multiplied by how often the sweep ran it. The sum is the time of the products alone: no norms, no attention, no activation, no
   copies, no Python. Weights stay in the cache between repetitions, which a sweep's, one layer after the other, do not.
3. "of its products" is that time as a share of the sweep's: 100 % would be a sweep that does nothing but multiply. "of the best
   rate" is the time of all arithmetic (attention's too, counted by torch's FlopCounterMode) at the rate of a large square
   product, as a share of the sweep's.

Sweep and products are timed in turn, `--rounds` times; seconds are medians. Without `--model` a tiny random model shows that the
script works, and its figures mean nothing. `edges` are an even sample of `--edges` edges. Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where shared.py is
from scaling import Point, random_model, random_pairs
from shared import SWEEPS, clock, fixed_pairs, machine, sample

TINY = Point("", 0, n_layers=3, n_heads=4, d_model=32, d_mlp=48, length=9)
Shape = tuple[int, int, int, torch.dtype]  # tokens, inputs, outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub's name, a folder or smollm2-135m; default a tiny random model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sweeps", nargs="+", choices=[*SWEEPS, "edges"], default=["head", "resid", "edges"])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--edges", type=int, default=200, help="how many edges are patched")
    parser.add_argument("--rounds", type=int, default=3, help="how often sweep and products are timed")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    report = measured(args)
    print_table(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    import mechkit as mk

    if args.model:
        model = mk.HookedModel.from_pretrained(args.model, device=args.device)
        pairs = fixed_pairs(mk, model, args.prompts)
    else:
        tiny = replace(TINY, prompts=args.prompts)
        model, pairs = random_model(tiny, args.device), random_pairs(tiny)
    sweeps = {name: measure(sweep_of(name, mk, model, pairs, args.edges), args) for name in args.sweeps}
    about = {"machine": machine(args.device), "model": model.name, "prompts": len(pairs), "dtype": str(model.dtype)}
    return about | {"threads": torch.get_num_threads(), "sweeps": sweeps}


def sweep_of(name: str, mk: Any, model: Any, pairs: Any, n_edges: int) -> Callable[[], Any]:
    """The sweep as a function that returns its result."""
    metric = mk.logit_diff(pairs)
    if name != "edges":
        site, over = SWEEPS[name]
        return lambda: mk.activation_patching(model, pairs, metric, site=site, over=over, progress=False)
    every = list(mk.Graph.of(model).edges)
    edges = [every[i] for i in sample(len(every), n_edges)]
    return lambda: mk.edge_patching(model, pairs, metric, edges, progress=False).result


def measure(sweep: Callable[[], Any], args: argparse.Namespace) -> dict[str, Any]:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, Products() as watched:
        result = sweep()
    total, shapes = counter.get_total_flops(), watched.counts
    sweeps, each, rates = [], [], []
    for _ in range(args.rounds):
        sweeps.append(clock(args.device, sweep)[0])
        each.append({shape: seconds_of(shape, args.device) for shape in shapes})
        rates.append(best_rate(args.device, next(iter(shapes))[-1]))
    seconds, rate = statistics.median(sweeps), statistics.median(rates)
    alone = {shape: statistics.median(one[shape] for one in each) for shape in shapes}
    products = sum(n * alone[shape] for shape, n in shapes.items())
    flop = sum(n * flop_of(shape) for shape, n in shapes.items())
    return {
        "cells": int(result.values[..., 0].isfinite().sum()),
        "block_tokens": result.cost.block_tokens,
        "seconds": seconds,
        "seconds_each": sweeps,
        "products": sum(shapes.values()),
        "products_seconds": products,
        "products_tflop": flop / 1e12,
        "of_its_products": products / seconds,
        "tflop": total / 1e12,
        "best_gflops": rate / 1e9,
        "best_seconds": total / rate,
        "of_the_best_rate": total / rate / seconds,
        "median_tokens": median_tokens(shapes),
        "shapes": [
            {"tokens": tokens, "in": inputs, "out": outputs, "times": shapes[shape], "seconds": alone[shape]}
            for shape in sorted(shapes, key=lambda shape: shape[:3])
            for tokens, inputs, outputs, _ in [shape]
        ],
    }


class Products(TorchDispatchMode):
    """Counts the matrix products of linear layers that run inside, by their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Shape] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.counts[left.shape[0], left.shape[1], right.shape[1], left.dtype] += 1
        return func(*args, **(kwargs or {}))


def seconds_of(shape: Shape, device: str) -> float:
    """Seconds of one product of this shape, the median of three; short ones are timed several at a time."""
    tokens, inputs, outputs, dtype = shape
    tokens_in, weight = (torch.randn(n, inputs, device=device).to(dtype) for n in (tokens, outputs))

    def several(n: int) -> float:
        return clock(device, lambda: [torch.nn.functional.linear(tokens_in, weight) for _ in range(n)])[0] / n

    with torch.no_grad():
        several(1)
        once = several(1)
        at_a_time = max(1, min(50, int(0.005 / max(once, 1e-7))))
        return statistics.median(several(at_a_time) for _ in range(3))


def best_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square product."""
    size = 8192 if device.startswith("cuda") else 2048
    return flop_of((size, size, size, dtype)) / seconds_of((size, size, size, dtype), device)


def flop_of(shape: Shape) -> int:
    tokens, inputs, outputs, _ = shape
    return 2 * tokens * inputs * outputs


def median_tokens(shapes: Counter[Shape]) -> int:
    """Half of the arithmetic is in products of no more tokens than this."""
    half, done = sum(n * flop_of(shape) for shape, n in shapes.items()) / 2, 0.0
    for shape in sorted(shapes, key=lambda shape: shape[0]):
        done += shapes[shape] * flop_of(shape)
        if done >= half:
            break
    return shape[0]


def print_table(report: dict[str, Any]) -> None:
    about = f"{report['model']}, {report['dtype'].removeprefix('torch.')}, {report['prompts']} pairs"
    print(f"{about}, {report['threads']} threads, on {report['machine']}\n")
    columns = ["sweep", "cells", "seconds", "TFLOP", "products", "their tokens (median)", "their seconds"]
    print(f"| {' | '.join([*columns, 'of its products', 'seconds at the best rate', 'of the best rate'])} |")
    print("| --- |" + " ---: |" * (len(columns) + 2))
    for name, found in report["sweeps"].items():
        figures = [f"{found['cells']:,}", f"{found['seconds']:.3g}", f"{found['tflop']:.3g}", f"{found['products']:,}"]
        figures += [
            f"{found['median_tokens']:,}",
            f"{found['products_seconds']:.3g}",
            f"{found['of_its_products']:.0%}",
        ]
        figures += [f"{found['best_seconds']:.3g}", f"{found['of_the_best_rate']:.0%}"]
        print(f"| {name} | {' | '.join(figures)} |")
    for name, found in report["sweeps"].items():
        share = found["products_tflop"] / found["tflop"]
        print(
            f"\n{name}: {found['block_tokens']:,} block-tokens; {share:.0%} of the arithmetic is in linear layers; "
            f"{found['best_gflops']:.0f} GFLOP/s at best"
        )


if __name__ == "__main__":
    main()
