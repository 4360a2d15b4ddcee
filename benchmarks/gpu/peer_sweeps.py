"""The same sweep in TransformerLens and nnsight: one forward pass per cell, on a sample of cells. Part of `sweeps.py`."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from device import GIB, Figures, start_counting
from shared import SWEEPS, cells, clock, peak_memory, sample, tensors


def with_transformer_lens(case: Figures, args: argparse.Namespace, model: Any, pairs: Any) -> Figures:
    import pandas
    from transformer_lens import patching

    site, over = SWEEPS[case["sweep"]]
    setter = {
        "layer head": patching.layer_head_vector_patch_setter,
        "layer pos": patching.layer_pos_patch_setter,
        "layer pos head": patching.layer_pos_head_vector_patch_setter,
    }[over]

    def prepare(batch: Any) -> Callable[[list[dict[str, int]]], list[float]]:
        clean, corrupted, metric = tensors(SimpleNamespace(device=args.device), batch)
        _, cache = model.bridge.run_with_cache(clean, names_filter=lambda name: name.endswith(f"hook_{site}"))

        def run(some: list[dict[str, int]]) -> list[float]:
            frame = pandas.DataFrame(some).rename(columns={"head": "head_index"})
            values = patching.generic_activation_patch(
                model.bridge, corrupted, cache, lambda logits: metric(last(logits)), setter, site, index_df=frame
            )
            return values.flatten().tolist()

        return run

    return with_peer(args, pairs, cells(model, len(pairs.clean.tokens[0]), over), prepare)


def with_nnsight(case: Figures, args: argparse.Namespace, hf: Any, pairs: Any) -> Figures:
    """nnsight on the Hugging Face model, as its tutorials patch: one trace per cell."""
    import nnsight

    site, over = SWEEPS[case["sweep"]]
    model, config = nnsight.NNsight(hf), hf.config
    gpt2 = config.model_type == "gpt2"
    layers = model.transformer.h if gpt2 else model.model.layers
    outputs = [layer.attn.c_proj if gpt2 else layer.self_attn.o_proj for layer in layers]
    modules = outputs if site == "z" else list(layers)
    width = config.hidden_size // config.num_attention_heads
    sizes = SimpleNamespace(n_layers=config.num_hidden_layers, n_heads=config.num_attention_heads)

    # nnsight reads the source of each `with … trace` body: keep them plain.
    def prepare(batch: Any) -> Callable[[list[dict[str, int]]], list[float]]:
        clean, corrupted, metric = tensors(SimpleNamespace(device=args.device), batch)
        with model.trace(clean):
            saved = nnsight.save([module.input for module in modules])
        source = list(saved)

        def patched(at: dict[str, int]) -> torch.Tensor:
            rows = slice(None) if "pos" not in at else at["pos"]
            units = slice(None) if "head" not in at else slice(at["head"] * width, (at["head"] + 1) * width)
            module, value = modules[at["layer"]], source[at["layer"]]
            with model.trace(corrupted):
                module.input[:, rows, units] = value[:, rows, units]
                logits = model.lm_head.output.save()
            return logits

        return lambda some: [float(metric(last(patched(at)))) for at in some]

    return with_peer(args, pairs, cells(sizes, len(pairs.clean.tokens[0]), over), prepare)


def last(logits: torch.Tensor) -> torch.Tensor:
    """The last position's logits, in float32 at least, as mechkit computes metrics."""
    return logits[:, -1:] if logits.dtype == torch.float64 else logits[:, -1:].float()


@torch.no_grad()
def with_peer(
    args: argparse.Namespace,
    pairs: Any,
    grid: list[dict[str, int]],
    prepare: Callable[[Any], Callable[..., list[float]]],
) -> Figures:
    """Times another library. `prepare(batch)` runs the source and returns a function from cells to their values."""
    n = len(pairs)
    chosen = sample(len(grid), args.cells)
    some = [grid[i] for i in chosen]
    batch = fitting_batch(min(args.peer_batch or n, n), lambda size: prepare(pairs[range(size)])(some[:1]))
    held = start_counting(args.device)
    source_seconds, cell_seconds, sums = 0.0, 0.0, torch.zeros(len(some), dtype=torch.float64)
    for begin in range(0, n, batch):
        part = pairs[range(begin, min(begin + batch, n))]
        seconds, run = clock(args.device, functools.partial(prepare, part))
        source_seconds += seconds
        seconds, values = clock(args.device, functools.partial(run, some))
        cell_seconds += seconds
        sums += len(part) * torch.tensor(values, dtype=torch.float64)
        del run  # and the source run's activations
    return {
        "seconds": source_seconds + cell_seconds * len(grid) / len(some),
        "seconds_source": source_seconds,
        "seconds_run": cell_seconds,
        "cells": len(grid),
        "cells_run": len(some),
        "batch": batch,
        "gib_before": held / GIB,
        "peak_gib": peak_memory(args.device) / GIB,
        "values": dict(zip(map(str, chosen), (sums / n).tolist(), strict=True)),
    }


def fitting_batch(size: int, run: Callable[[int], Any]) -> int:
    """The first of size, size / 2, … prompts that fits the device's memory."""
    while True:
        try:
            run(size)
            return size
        except Exception as error:  # nnsight raises its own type
            if size == 1 or "out of memory" not in str(error):
                raise
        size = (size + 1) // 2
        torch.cuda.empty_cache()
