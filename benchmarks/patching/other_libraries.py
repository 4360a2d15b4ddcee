"""The same activation-patching sweeps in mechkit, in TransformerLens and in nnsight: seconds, agreement, memory.

    python benchmarks/patching/other_libraries.py [--model smollm2-135m] [--device cpu]
        [--sweeps head resid position-head] [--json out.json]

Each library runs in its own process, one after the other, on the same model, prompts and metric; values are compared cell by
cell. TransformerLens and nnsight run one forward pass per cell. Where that would take more than `--cells` forward passes, they
run an even sample of cells and the time is scaled (the table marks it). nnsight is optional: `pip install mechkit[bench]`.

"transformer_lens_batched" is what a careful user writes by hand with TransformerLens instead of calling its functions: cells that
differ in the last dim alone (the heads of a layer, the positions of a layer) are one batch, rows = cells x prompts, in which one
hook patches each cell's rows; the clean run keeps only the site, and logits are computed at the last position alone.

"rate" is the arithmetic of mechkit's sweep (counted exactly by torch's FlopCounterMode in a separate run) divided by its
seconds, as a share of the rate of a 2048 x 2048 matrix multiplication, measured in the same process just before and after it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where shared.py is
from shared import LIBRARIES as AS_THEY_COME
from shared import SWEEPS, cells, clock, fixed_pairs, machine, peak_memory, sample, tensors

LIBRARIES = AS_THEY_COME | {"transformer_lens_batched": "transformer-lens"}  # package names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--cells", type=int, default=450, help="most forward passes of another library per sweep")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        args.into.write_text(json.dumps(work(args)))
        return
    figures = {name: run_worker(name) for name in args.libraries}
    report = {"machine": machine(args.device), "model": args.model, "prompts": args.prompts, "libraries": figures}
    print_table(report)
    if args.json:
        args.json.write_text(json.dumps(strip(report), indent=1) + "\n")


def run_worker(library: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "figures.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", library, "--into", str(into)]
        environment = os.environ | {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
        done = subprocess.run(command, env=environment, check=False, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return json.loads(into.read_text())
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}


# -- one library, in its own process ------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> dict[str, Any]:
    version = importlib.metadata.version(LIBRARIES[args.worker])  # before the model is loaded, which takes a while
    if args.worker == "nnsight":
        import nnsight  # noqa: F401
    import mechkit as mk

    model = mk.HookedModel.from_pretrained(args.model, device=args.device)
    pairs = fixed_pairs(mk, model, args.prompts)
    prepare = {
        "mechkit": with_mechkit,
        "transformer_lens": with_transformer_lens,
        "transformer_lens_batched": with_batches,
        "nnsight": with_nnsight,
    }[args.worker]
    sweeps = {}
    for name in args.sweeps:
        memory = peak_memory(args.device)
        sweeps[name] = prepare(args, model, pairs, *SWEEPS[name])
        sweeps[name]["peak_memory_gb"] = (peak_memory(args.device) - memory) / 1e9
    return {"version": version, "sweeps": sweeps}


def with_mechkit(args: argparse.Namespace, model: Any, pairs: Any, site: str, over: str) -> dict[str, Any]:
    from torch.utils.flop_counter import FlopCounterMode

    import mechkit as mk

    def sweep() -> mk.Result:
        return mk.activation_patching(model, pairs, mk.logit_diff(pairs), site=site, over=over, progress=False)

    peak = matmul_rate(args.device)
    seconds, result = clock(args.device, sweep)  # the first call also proves the replay on a sample of rows
    again, _ = clock(args.device, sweep)
    peak = (peak + matmul_rate(args.device)) / 2
    with FlopCounterMode(display=False) as counter:
        sweep()
    return {
        "seconds": seconds,
        "seconds_again": again,
        "cells": result.values[..., 0].numel(),
        "block_tokens": result.cost.block_tokens,
        "naive_block_tokens": result.cost.naive_block_tokens,
        "tflop": counter.get_total_flops() / 1e12,
        "gflops": counter.get_total_flops() / again / 1e9,
        "matmul_gflops": peak / 1e9,
        "rate": counter.get_total_flops() / again / peak,
        "values": result.mean("prompt").values.flatten().tolist(),
    }


def with_transformer_lens(args: argparse.Namespace, model: Any, pairs: Any, site: str, over: str) -> dict[str, Any]:
    import pandas
    from transformer_lens import patching

    clean, corrupted, metric = tensors(model, pairs)
    grid = cells(model, clean.shape[1], over)
    chosen = sample(len(grid), args.cells)
    columns = {"layer": "layer", "pos": "pos", "head": "head_index"}
    frame = pandas.DataFrame([grid[i] for i in chosen]).rename(columns=columns)
    setter = {
        "layer head": patching.layer_head_vector_patch_setter,
        "layer pos": patching.layer_pos_patch_setter,
        "layer pos head": patching.layer_pos_head_vector_patch_setter,
    }[over]

    def sweep() -> torch.Tensor:
        with torch.no_grad():
            _, cache = model.bridge.run_with_cache(clean)
            return patching.generic_activation_patch(
                model.bridge, corrupted, cache, metric, setter, site, index_df=frame[list(frame.columns)]
            )

    seconds, values = clock(args.device, sweep)
    return sampled(seconds, values.flatten().tolist(), chosen, len(grid))


def with_batches(args: argparse.Namespace, model: Any, pairs: Any, site: str, over: str) -> dict[str, Any]:
    """TransformerLens by hand: one forward pass for all cells that differ in the last dim alone."""
    clean, corrupted, metric = tensors(model, pairs)
    grid, n = cells(model, clean.shape[1], over), len(pairs)
    last = over.split()[-1]
    numbered = itertools.groupby(enumerate(grid), lambda one: {dim: i for dim, i in one[1].items() if dim != last})
    batches = [list(batch) for _, batch in numbered]
    chosen = [batches[i] for i in sample(len(batches), args.cells)]

    def patched(batch: list[tuple[int, dict[str, int]]], source: torch.Tensor) -> list[float]:
        def patch(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            for rows, (_, at) in zip(activation.split(n), batch, strict=True):
                where = (slice(None), at.get("pos", slice(None)), at.get("head", slice(None)))
                rows[where] = source[where]
            return activation

        layer = batch[0][1]["layer"]
        hooks = [(f"blocks.{layer}.{'attn.hook_z' if site == 'z' else f'hook_{site}'}", patch)]
        logits = model.bridge.run_with_hooks(corrupted.repeat(len(batch), 1), fwd_hooks=hooks, logits_to_keep=1)
        return [float(metric(rows)) for rows in logits.split(n)]

    def sweep() -> list[float]:
        with torch.no_grad():
            _, cache = model.bridge.run_with_cache(clean, names_filter=lambda name: name.endswith(f"hook_{site}"))
            return [value for batch in chosen for value in patched(batch, cache[site, batch[0][1]["layer"]])]

    seconds, values = clock(args.device, sweep)
    return sampled(seconds, values, [i for batch in chosen for i, _ in batch], len(grid))


def with_nnsight(args: argparse.Namespace, model: Any, pairs: Any, site: str, over: str) -> dict[str, Any]:
    """nnsight on the Hugging Face model: one trace per cell, as its tutorials patch."""
    from nnsight import LanguageModel
    from transformers import AutoModelForCausalLM

    config = model.bridge.original_model.config
    if config.model_type != "llama":
        raise SystemExit("the nnsight benchmark knows the module names of Llama-shaped models only")
    clean, corrupted, metric = tensors(model, pairs)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(args.device).eval()
    from mechkit.hooks.loading.pretrained import load_hf

    hf, tokenizer = load_hf(args.model, dtype=torch.float32, revision=None, trust_remote_code=False)
    plain.load_state_dict(hf.state_dict())
    language_model = LanguageModel(plain, tokenizer=tokenizer)
    layers, width = language_model.model.layers, model.d_head
    grid = cells(model, clean.shape[1], over)
    chosen = sample(len(grid), max(1, args.cells // 6))

    # nnsight reads the source of each `with … trace` body: keep them plain.
    def activations(tokens: torch.Tensor) -> list[torch.Tensor]:
        kept = []
        for layer in layers:
            with language_model.trace(tokens):
                value = (layer.self_attn.o_proj.input if site == "z" else layer.input).save()
            kept.append(value.detach())
        return kept

    def patched(at: dict[str, int], source: torch.Tensor) -> torch.Tensor:
        rows = slice(None) if "pos" not in at else at["pos"]
        units = slice(None) if "head" not in at else slice(at["head"] * width, (at["head"] + 1) * width)
        layer = layers[at["layer"]]
        with language_model.trace(corrupted):
            if site == "z":
                layer.self_attn.o_proj.input[:, rows, units] = source[:, rows, units]
            else:
                layer.input[:, rows, units] = source[:, rows, units]
            logits = language_model.lm_head.output.save()
        return logits

    def sweep() -> list[float]:
        with torch.no_grad():
            return [float(metric(patched(grid[i], source[grid[i]["layer"]]))) for i in chosen]

    with torch.no_grad():
        source = activations(clean)
    seconds, values = clock(args.device, sweep)
    return sampled(seconds, values, chosen, len(grid))


def sampled(seconds: float, values: list[float], chosen: list[int], n: int) -> dict[str, Any]:
    return {
        "seconds": seconds * n / len(chosen),
        "cells": n,
        "cells_run": len(chosen),
        "values": dict(zip(map(str, chosen), values, strict=True)),
    }


def matmul_rate(device: str, size: int = 2048) -> float:
    """Floating-point operations per second of a float32 matrix multiplication."""
    a = torch.randn(size, size, device=device)
    rates = []
    for _ in range(8):
        seconds, _ = clock(device, lambda: a @ a)
        rates.append(2 * size**3 / seconds)
    return sorted(rates)[len(rates) // 2]


# -- showing -----------------------------------------------------------------------------------------------------------


def print_table(report: dict[str, Any]) -> None:
    print(f"{report['model']}, float32, {report['prompts']} IOI pairs, on {report['machine']}\n")
    print("| sweep | cells | library | seconds | times mechkit | largest difference | extra memory, GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    ours = report["libraries"].get("mechkit", {}).get("sweeps", {})
    for name in SWEEPS:
        for library, figures in report["libraries"].items():
            if "error" in figures:
                continue
            found = figures["sweeps"].get(name)
            if found is None:
                continue
            n = found["cells"]
            scaled = f" (from {found['cells_run']} cells)" if found.get("cells_run", n) < n else ""
            ratio = f"{found['seconds'] / ours[name]['seconds']:.1f}" if name in ours else ""
            difference = difference_from(ours.get(name), found) if library != "mechkit" else ""
            seconds = f"{found['seconds']:.1f}{scaled}"
            memory = f"{found['peak_memory_gb']:.2f}"
            print(f"| {name} | {n} | {library} {figures['version']} | {seconds} | {ratio} | {difference} | {memory} |")
    for library, figures in report["libraries"].items():
        if "error" in figures:
            print(f"\n{library}: not measured ({figures['error']})")
    for name, found in ours.items():
        print(
            f"\n{name}: {found['block_tokens']:,} block-tokens, where one forward pass per cell takes "
            f"{found['naive_block_tokens']:,}; {found['tflop']:.2f} TFLOP at {found['gflops']:.0f} GFLOP/s, "
            f"{found['rate']:.0%} of the machine's matrix multiplication ({found['matmul_gflops']:.0f})"
        )


def difference_from(ours: dict[str, Any] | None, theirs: dict[str, Any]) -> str:
    if ours is None:
        return ""
    theirs["largest_difference"] = max(abs(ours["values"][int(i)] - v) for i, v in theirs["values"].items())
    return f"{theirs['largest_difference']:.1e}"


def strip(report: dict[str, Any]) -> dict[str, Any]:
    """The report without the values themselves."""
    for figures in report["libraries"].values():
        for found in figures.get("sweeps", {}).values():
            found.pop("values", None)
    return report


if __name__ == "__main__":
    main()
