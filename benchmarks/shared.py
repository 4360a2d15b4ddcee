"""What several benchmarks share: prompts, the cells of a sweep, a clock, memory, the machine's name.

Imports nothing of mechkit, because `circuits/peers/` runs in a Python that does not have it: callers pass the module as `mk`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

NAMES = ("Mary", "John", "Tom", "Anna", "Paul", "Mark", "Sarah", "James", "David", "Kate", "Peter", "Jack")
TEMPLATE = "When {} and {} went to the store, {} gave a drink to"
SWEEPS = {
    "head": ("z", "layer head"),
    "resid": ("resid_pre", "layer pos"),
    "position-head": ("z", "layer pos head"),
}
LIBRARIES = {"mechkit": "mechkit", "transformer_lens": "transformer-lens", "nnsight": "nnsight"}  # package names


# -- prompts -----------------------------------------------------------------------------------------------------------


def make_pairs(mk: Any, model: Any, kind: str, n: int) -> Any:
    """Pairs of IOI prompts: `"ioi"` takes `mk.tasks.ioi`'s templates, `"plain"` one template and random names."""
    if kind == "ioi":
        return mk.tasks.ioi(model, n=n, seed=0, prepend_bos=False)
    rng = random.Random(0)
    return _from_template(mk, model, [rng.sample(NAMES, 3) for _ in range(n)], prepend_bos=False)


def fixed_pairs(mk: Any, model: Any, n: int, prepend_bos: bool | None = False) -> Any:
    """Pairs from one template, with four triples of names in turn."""
    triples = [NAMES[i : i + 3] for i in range(0, len(NAMES), 3)]
    return _from_template(mk, model, [triples[i % len(triples)] for i in range(n)], prepend_bos)


def _from_template(mk: Any, model: Any, names: Sequence[Sequence[str]], prepend_bos: bool | None) -> Any:
    return mk.PromptPairs.from_text(
        model,
        [TEMPLATE.format(a, b, b) for a, b, _ in names],
        [TEMPLATE.format(a, b, c) for a, b, c in names],
        [(" " + a, " " + b) for a, b, _ in names],
        prepend_bos=prepend_bos,
    )


def tensors(model: Any, pairs: Any) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """The clean and the corrupted tokens, and the mean logit difference as a function of logits, for other libraries."""
    clean, corrupted = (torch.stack(p.tokens).to(model.device) for p in (pairs.clean, pairs.corrupted))
    right, wrong = (torch.tensor([ids[0] for ids in side]).to(model.device) for side in (pairs.right, pairs.wrong))
    each = torch.arange(len(pairs)).to(model.device)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[each, -1, right] - logits[each, -1, wrong]).mean()

    return clean, corrupted, metric


# -- cells -------------------------------------------------------------------------------------------------------------


def cells(model: Any, length: int, over: str) -> list[dict[str, int]]:
    """All cells of a sweep over these dims, in the order of `mk.activation_patching`'s values."""
    sizes = {"layer": model.n_layers, "pos": length, "head": model.n_heads}
    grid: list[dict[str, int]] = [{}]
    for dim in over.split():
        grid = [at | {dim: i} for at in grid for i in range(sizes[dim])]
    return grid


def sample(n: int, most: int) -> list[int]:
    """Evenly spaced indices below `n`: at most `most` of them."""
    return list(range(n)) if n <= most else [round(i * (n - 1) / (most - 1)) for i in range(most)]


# -- time and memory ---------------------------------------------------------------------------------------------------


def clock(device: str, run: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock seconds of a call, and what it returned."""
    synchronize(device)
    begin = time.perf_counter()
    found = run()
    synchronize(device)
    return time.perf_counter() - begin, found


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_memory(device: str) -> float:
    """Bytes: of the process on a CPU (it never shrinks), of allocations on a GPU."""
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held(device: str) -> float:
    """Bytes in use now; resets the peak that `most_held` reads."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system, so that using it again counts
    Path("/proc/self/clear_refs").write_text("5")
    return field("VmRSS")


def most_held(device: str) -> float:
    """The most bytes in use since `held`: allocations on a GPU, the resident set on a CPU (Linux)."""
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated())
    return field("VmHWM") if Path("/proc/self/clear_refs").exists() else float("nan")


def field(name: str) -> float:
    """Bytes in one line of Linux's `/proc/self/status`, such as `VmRSS`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith(name))


# -- the machine -------------------------------------------------------------------------------------------------------


def machine(device: str) -> str:
    """The device's name, and torch's version where it is a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{os.cpu_count()} cores of {model}, torch {torch.__version__}"
