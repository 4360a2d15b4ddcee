"""The time of a sweep by part of the model, from torch's profiler. Part of `sweeps.py`."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from device import Figures
from shared import clock

PARTS = {"Attention": "attention", "MLP": "MLP", "Norm": "norms", "Unembed": "unembed"}  # by a module's class
MOVES = ("index", "cat", "copy", "gather", "scatter", "fill", "clone")


def profile(device: str, trace: Path, model: Any, sweep: Callable[[], Any]) -> Figures:
    """Profiles one sweep after two without the profiler, and writes a Chrome trace."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = device.startswith("cuda")
    sweep()
    seconds, _ = clock(device, sweep)
    with (
        marked(model),
        profiler(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found,
    ):
        profiled, result = clock(device, sweep)
    found.export_chrome_trace(str(trace))
    events = list(found.events())
    times: dict[str, float] = {}
    for event in events:
        times[part_of(event)] = times.get(part_of(event), 0.0) + time_of(event, cuda)
    busy = sum(times.values())
    waits = [e for e in events if "Synchronize" in e.name]
    return {
        "replay": result.provenance["replay"],
        "cells": result.values[..., 0].numel(),
        "block_tokens": result.cost.block_tokens,
        "seconds": seconds,
        "seconds_profiled": profiled,
        "seconds_busy": busy / 1e6,
        "shares": {part: time / busy for part, time in sorted(times.items(), key=lambda one: -one[1])},
        "kernel_launches": sum("LaunchKernel" in e.name for e in events),
        "synchronisations": dict(Counter(e.name for e in waits).most_common()),
        "synchronised_by": dict(Counter(outermost(e) for e in waits).most_common(10)),
        "copies": dict(Counter(e.name for e in events if e.name.startswith("Memcpy")).most_common()),
        "top": found.key_averages().table(
            sort_by="self_device_time_total" if cuda else "self_cpu_time_total", row_limit=20, max_name_column_width=60
        ),
    }


@contextmanager
def marked(model: Any) -> Iterator[None]:
    """Marks attention, MLPs, norms and the unembedding for the profiler inside the `with` block. It wraps the methods of their
    classes, since replays run shallow copies of the modules, and restores them afterwards."""
    changed: list[tuple[type, str, Any]] = []

    def mark(cls: type, method: str, part: str) -> None:
        plain = getattr(cls, method)

        @functools.wraps(plain)
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(f"part: {part}"):
                return plain(*args, **kwargs)

        changed.append((cls, method, cls.__dict__.get(method)))
        setattr(cls, method, run)

    try:
        mark(type(model), "unembed", "unembed")
        for cls in {type(module) for module in model.bridge.modules()}:
            if part := next((part for text, part in PARTS.items() if text in cls.__name__), None):
                mark(cls, "forward", part)
        yield
    finally:
        for cls, method, own in reversed(changed):
            if own is None:
                delattr(cls, method)
            else:
                setattr(cls, method, own)


def ancestry(event: Any) -> list[str]:
    """The names of an event and of its parents, the outermost last."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def part_of(event: Any) -> str:
    marks = [name.removeprefix("part: ") for name in ancestry(event) if name.startswith("part: ")]
    moves = any(text in event.name for text in MOVES)
    return (marks[-1] if marks else "elsewhere") + (", indexing and copying" if moves else "")


def outermost(event: Any) -> str:
    """The outermost operation that an event is part of."""
    return [event.name, *(name for name in ancestry(event) if name.startswith("aten::"))][-1]


def time_of(event: Any, cuda: bool) -> float:
    """Microseconds of an operation without its children: of its kernels, or of the CPU."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]

    if event.device_type != DeviceType.CPU or event.is_async:
        return 0.0
    if not cuda:
        return float(event.self_cpu_time_total)
    return float(sum(kernel.duration for kernel in event.kernels if not kernel.name.startswith("part: ")))


def print_profile(found: Figures) -> None:
    print(
        f"\n{found['top']}\n\n{found['seconds']:.3g} s, {found['seconds_profiled']:.3g} s under the profiler",
        end=", of which ",
    )
    print(f"{found['seconds_busy']:.3g} s in operations:")
    for part, share in found["shares"].items():
        print(f"{share:6.1%} {part}")
    for name in ("kernel_launches", "synchronisations", "synchronised_by", "copies"):
        print(f"{name.replace('_', ' ')}: {found[name]}")
