"""Whether a sweep stays within its memory budget, for several numbers of cells and prompts.

    python benchmarks/patching/memory.py [--model smollm2-135m] [--json out.json]

For each budget and sweep, it prints how far the process's resident memory (Linux) or the GPU's allocated memory rose during the
sweep. The budget covers what a sweep adds; the overhead of Python and of the allocator is extra.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

import torch

import mechkit as mk

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where shared.py is
from shared import field

SWEEPS = {
    "270 cells (layer head), 8 prompts": ("z", "layer head", 8, {}),
    "270 cells (layer head), 64 prompts": ("z", "layer head", 64, {"layers": range(20, 30)}),
    "2,500 cells (layer pos head), 8 prompts": ("z", "layer pos head", 8, {"layers": range(18, 30)}),
    "3,072 cells (layer neuron), 8 prompts": ("mlp_post", "layer neuron", 8, {"layers": [28, 29]}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 256, 1024], help="MiB")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = mk.HookedModel.from_pretrained(args.model)
    warm = mk.tasks.ioi(model, n=2, seed=1)  # libraries load and keep memory at their first use
    mk.activation_patching(model, warm, mk.logit_diff(warm), layers=[29], budget=2**25, progress=False)
    figures = []
    print("| sweep | budget, MiB | most used, MiB |\n| --- | --- | --- |")
    for name, (site, over, n, restrict) in SWEEPS.items():
        pairs = mk.tasks.ioi(model, n=n, seed=0)
        for budget in args.budgets:
            before = used_since(model, None)
            arguments = {"budget": budget * 2**20, "progress": False, **restrict}
            mk.activation_patching(model, pairs, mk.logit_diff(pairs), site=site, over=over, **arguments)
            used = used_since(model, before) / 2**20
            figures.append({"sweep": name, "budget_mib": budget, "used_mib": used})
            print(f"| {name} | {budget} | {used:.0f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def used_since(model: mk.HookedModel, begin: float | None) -> float:
    """With `None`: resets the peak and returns the bytes in use. With these bytes: the peak since then, above them."""
    gc.collect()
    if model.device.type == "cuda":
        if begin is None:
            torch.cuda.reset_peak_memory_stats()
            return float(torch.cuda.memory_allocated())
        return torch.cuda.max_memory_allocated() - begin
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("on a CPU this needs Linux's /proc")
    if begin is None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
        return field("VmRSS")
    return field("VmHWM") - begin


if __name__ == "__main__":
    main()
