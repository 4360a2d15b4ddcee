"""A device's matrix-multiply rate and its memory. Part of `sweeps.py`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from shared import clock, peak_memory

GIB = 2**30
Figures = dict[str, Any]


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix multiplication. Frees its memory."""
    cuda = device.startswith("cuda")
    size = 8192 if cuda else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    out = torch.empty_like(a)

    def several() -> None:
        for _ in range(4):
            torch.mm(a, b, out=out)

    several()
    seconds = statistics.median(clock(device, several)[0] for _ in range(5))
    del a, b, out
    if cuda:
        torch.cuda.empty_cache()
    return 4 * 2 * size**3 / seconds


def free_memory(device: str) -> float:
    """Bytes; infinite where it is unknown."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(device)[0])
    if not Path("/proc/meminfo").exists():
        return float("inf")
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def start_counting(device: str) -> float:
    """Bytes held now; `peak_memory` is the peak from now on (on a CPU: since the process began)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    return peak_memory(device)
