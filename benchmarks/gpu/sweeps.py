"""mechkit's sweeps on a GPU: seconds, arithmetic, memory, time by part, and two other libraries on the same prompts.

    python benchmarks/gpu/sweeps.py [--shapes gpt2 llama-3.1-8b] [--dtypes float32 tf32 bfloat16]
        [--prompts 64 1000] [--json out.json]
    python benchmarks/gpu/sweeps.py --profile trace.json --shapes gpt2 --prompts 256      # one sweep under torch's profiler
    python benchmarks/gpu/sweeps.py --scaling --shapes gpt2       # against the number of prompts and of layers, in a fixed budget
    python benchmarks/gpu/sweeps.py --device cpu --shapes tiny --prompts 4        # does it run?

1. Models have published shapes and random weights, made on the device in the requested dtype. Nothing is downloaded. Weights
   have a larger standard deviation than at the start of training, so that heads matter. "tf32" is float32 in which matrix
   multiplications may use TF32.
2. Prompts are 15 random tokens, as long as in IOI. Clean and corrupted differ in one token, at position 10, where IOI's S2 is.
3. Each library runs each case in its own process, so that a case that does not fit the memory does not affect the others.
4. mechkit's first call is timed, then the median of `--repeats` more; ratios use the median. The other libraries are warmed up
   by one cell, then run one forward pass per cell on an even sample of `--cells` cells. Their time is scaled to all cells, plus
   the time of the source run. Prompts run in one batch, which is halved until it fits (`--peer-batch`).
5. "difference" is the largest difference of a cell's mean over prompts, as a share of the standard deviation over mechkit's
   cells. In bfloat16 rounding alone makes it tenths, in every library; float32 shows whether values agree.
6. Arithmetic is counted by torch's FlopCounterMode in separate runs. Above `--count` prompts it is extrapolated by the line
   through the counts for `--count` and half of it (a per cent or two off in sweeps by position, whose short rows are padded
   within attention); "count_check" is the same line's error on block-tokens, which are known.
   "rate" is arithmetic per second, as a share of a large matrix multiplication (same dtype, before and after, same process).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where shared.py is
from device import GIB, Figures, free_memory, matmul_rate, start_counting
from peer_sweeps import with_nnsight, with_transformer_lens
from shared import LIBRARIES, SWEEPS, clock, machine, peak_memory
from time_by_part import print_profile, profile

LENGTH, S2 = 15, 10
DTYPES = {"float64": torch.float64, "float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


def llama_3(n_layers: int, width: int, mlp: int, tied: bool, rope_factor: float) -> tuple[str, dict[str, Any]]:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": rope_factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    sizes = {"vocab_size": 128256, "num_hidden_layers": n_layers, "hidden_size": width, "intermediate_size": mlp}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": width // 32, "rms_norm_eps": 1e-5}
    rest = {
        "max_position_embeddings": 131072,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": tied,
    }
    return "llama", sizes | heads | rest | {"rope_parameters": rope}


def gpt2(n_layers: int, width: int, n_heads: int) -> tuple[str, dict[str, Any]]:  # tied embeddings by default
    return "gpt2", {"vocab_size": 50257, "n_positions": 1024, "n_layer": n_layers, "n_embd": width, "n_head": n_heads}


TINY = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {  # transformers' model type, and its config as published
    "gpt2": gpt2(12, 768, 12),
    "gpt2-xl": gpt2(48, 1600, 25),
    "llama-3.2-1b": llama_3(16, 2048, 8192, tied=True, rope_factor=32.0),
    "llama-3.1-8b": llama_3(32, 4096, 14336, tied=False, rope_factor=8.0),
    "tiny": ("llama", TINY | {"num_key_value_heads": 2, "max_position_embeddings": 64}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=["head"])
    parser.add_argument("--prompts", nargs="+", type=int, help="default 64 256 1000; 64 to 1024 with --scaling")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--cells", type=int, default=24, help="cells of each sweep that another library runs")
    parser.add_argument(
        "--peer-batch", "--tl-batch", type=int, help="prompts that another library runs at once; default all"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--count", type=int, default=32, help="most prompts for which arithmetic is counted")
    parser.add_argument(
        "--budget", type=float, help="GiB for mechkit's sweeps; default mechkit's own, 1 with --scaling"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one measurement")
    parser.add_argument("--profile", type=Path, help="profile only the first case, and write a Chrome trace there")
    parser.add_argument(
        "--scaling", action="store_true", help="measure only mechkit, for several numbers of prompts and layers"
    )
    parser.add_argument("--json", type=Path, help="write the figures there, after each case")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "tf32" in args.dtypes and not args.device.startswith("cuda"):
        parser.error(f"--dtypes: tf32 needs a CUDA device, not {args.device}")
    if args.worker:
        args.into.write_text(json.dumps(work(args.worker, args)))
        return
    todo = list(cases(args))
    print(f"{len(todo)} cases, prompts of {LENGTH} tokens, torch {torch.__version__}\n\n{HEAD}", flush=True)
    report: Figures = {"torch": torch.__version__, "arguments": sys.argv[1:], "cases": []}
    for case in todo:
        found = {name: run_worker(case | {"library": name}, args) for name in case["libraries"]}
        report["device"] = next((f["device"] for f in found.values() if "device" in f), report.get("device"))
        report["cases"].append({k: v for k, v in case.items() if k != "libraries"} | compare(found))
        print_case(report["cases"][-1])
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\non {report['device']}")
    for case in report["cases"]:
        print_remarks(case)


def cases(args: argparse.Namespace) -> Iterator[Figures]:
    """The cases to measure: the comparison; one case with --profile; a series for each with --scaling."""
    counts = args.prompts or ([64, 128, 256, 512, 1024] if args.scaling else [64, 256, 1000])
    alone = args.scaling or args.profile
    every: list[Figures] = [
        {"shape": shape, "dtype": dtype, "sweep": sweep, "prompts": n}
        | {"kind": "scaling" if args.scaling else "sweep", "libraries": ["mechkit"] if alone else args.libraries}
        for shape in args.shapes
        for dtype in args.dtypes
        for sweep in args.sweeps
        for n in counts
    ]
    if args.profile:
        yield every[0] | {"kind": "profile"}
        return
    for case in every:
        yield case
        if args.scaling and case["prompts"] == max(counts):
            _, sizes = SHAPES[case["shape"]]
            n = sizes.get("n_layer") or sizes["num_hidden_layers"]
            for first in sorted({n // 4, n // 2, 3 * n // 4} - {0}):
                yield case | {"layers": list(range(first, n))}


def run_worker(case: Figures, args: argparse.Namespace) -> Figures:
    """One measurement in its own process. A failure is returned as "error", and the other cases continue."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "figures.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", json.dumps(case), "--into", str(into)]
        environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"} | os.environ
        try:
            done = subprocess.run(
                command, env=environment, check=False, stderr=subprocess.PIPE, text=True, timeout=args.timeout
            )
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {args.timeout:g} s"}
        if done.returncode == 0:
            return json.loads(into.read_text())
    if done.returncode < 0:
        return {"error": f"killed by {signal.Signals(-done.returncode).name}, perhaps for memory"}
    lines = done.stderr.strip().splitlines()
    return {"error": lines[-1][:400] if lines else f"exit {done.returncode}"}


# -- one library on one case, in its own process ------------------------------------------------------------------


def work(case: Figures, args: argparse.Namespace) -> Figures:
    version = importlib.metadata.version(LIBRARIES[case["library"]])  # before the model is made, which takes a while
    if case["library"] == "nnsight":
        import nnsight  # noqa: F401
    import mechkit as mk

    if case["dtype"] == "tf32":
        torch.set_float32_matmul_precision("high")
    check_fits(case["shape"], DTYPES[case["dtype"]], free_memory(args.device))
    seconds, hf = clock(args.device, lambda: build_hf(case["shape"], args.device, DTYPES[case["dtype"]]))
    common = {
        "version": version,
        "device": machine(args.device),
        "parameters": hf.num_parameters(),
        "seconds_to_build": seconds,
    }
    pairs = random_pairs(hf.config.vocab_size, case["prompts"])
    if case["library"] == "nnsight":
        return common | with_nnsight(case, args, hf, pairs)
    model = mk.HookedModel.from_hf(hf, name=case["shape"])
    if case["library"] == "transformer_lens":
        return common | with_transformer_lens(case, args, model, pairs)
    if case["kind"] == "profile":
        return common | profile(args.device, args.profile, model, sweep_of(case, args, model, pairs))
    return common | with_mechkit(case, args, model, pairs)


def build_hf(shape: str, device: str, dtype: torch.dtype) -> Any:
    """A random model of a published shape, made on the device and in the dtype, so that the host never holds a larger copy."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = SHAPES[shape]
    config = AutoConfig.for_model(kind, **sizes)
    config.initializer_range = (
        1.3 / config.hidden_size**0.5
    )  # 0.02 in the largest shape, as published; more in the others
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def check_fits(shape: str, dtype: torch.dtype, free: float) -> None:
    """Exits if the weights alone do not fit: a host that runs out of memory may kill other processes too."""
    needed = build_hf(shape, "meta", dtype).num_parameters() * dtype.itemsize
    if needed > free:
        raise SystemExit(f"does not fit: its weights take {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free")


def random_pairs(d_vocab: int, n: int) -> Any:
    """Pairs of random tokens that differ only at S2, the same in every process. Answers are 16 tokens in turn, as IOI's are a
    list of names, so that the number of unembedded tokens does not grow with the prompts."""
    import mechkit as mk

    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, d_vocab, (n, LENGTH), generator=generator)
    corrupted = clean.clone()
    corrupted[:, S2] = (clean[:, S2] + torch.randint(1, d_vocab, (n,), generator=generator)) % d_vocab
    names = torch.randperm(d_vocab, generator=generator)[:16].tolist()
    answers = [(names[2 * i % 16], names[2 * i % 16 + 1]) for i in range(n)]
    return mk.PromptPairs.from_tokens(clean, corrupted, answers, positions={"S2": [S2] * n})


def sweep_of(case: Figures, args: argparse.Namespace, model: Any, pairs: Any) -> Callable[..., Any]:
    """mechkit's sweep over the first n prompts, all by default."""
    import mechkit as mk

    site, over = SWEEPS[case["sweep"]]
    gib = args.budget or (1.0 if case["kind"] == "scaling" else None)
    budget = None if gib is None else int(gib * GIB)

    def sweep(n: int | None = None) -> Any:
        some = pairs if n is None else pairs[range(n)]
        metric = mk.logit_diff(some)
        layers = case.get("layers")
        return mk.activation_patching(model, some, metric, site, over, layers=layers, budget=budget, progress=False)

    return sweep


def with_mechkit(case: Figures, args: argparse.Namespace, model: Any, pairs: Any) -> Figures:
    sweep = sweep_of(case, args, model, pairs)
    before = matmul_rate(args.device, DTYPES[case["dtype"]])
    held = start_counting(args.device)
    first, result = clock(args.device, sweep)  # the first call also warms up the device's libraries
    again = [clock(args.device, sweep)[0] for _ in range(args.repeats)]
    peak = peak_memory(args.device)
    after = matmul_rate(args.device, DTYPES[case["dtype"]])
    seconds = statistics.median(again)
    figures = {
        "cells": result.values[..., 0].numel(),
        "replay": result.provenance["replay"],
        "seconds_first": first,
        "seconds": seconds,
        "seconds_each": again,
        "block_tokens": result.cost.block_tokens,
        "naive_block_tokens": result.cost.naive_block_tokens,
        "block_tokens_a_second": result.cost.block_tokens / seconds,
        "gib_before": held / GIB,
        "peak_gib": peak / GIB,
        "matmul_tflops": [before / 1e12, after / 1e12],
        "values": result.mean("prompt").values.flatten().tolist(),
    }
    if case["kind"] != "scaling":
        flop, check = count(sweep, len(pairs), args.count, result.cost.block_tokens)
        figures |= {"tflop": flop / 1e12, "count_check": check, "tflops": flop / seconds / 1e12}
        figures["rate"] = flop / seconds / ((before + after) / 2)
    return figures


def count(sweep: Callable[[int], Any], n: int, most: int, block_tokens: int) -> tuple[float, float]:
    """Floating-point operations of a sweep over n prompts, and the relative error of the same extrapolation for block-tokens.

    A sweep has a cost per prompt and a fixed cost (the proof), so two small counts give the line. Both counts have all answers.
    """
    from torch.utils.flop_counter import FlopCounterMode

    found = []
    for size in [n] if n <= most else [max(1, most // 2), most]:
        with FlopCounterMode(display=False) as counter:
            result = sweep(size)
        found.append((size, counter.get_total_flops(), result.cost.block_tokens))
    (low, *at_low), (high, *at_high) = found[0], found[-1]
    share = (n - low) / (high - low) if high > low else 0.0
    flop, tokens = (a + share * (b - a) for a, b in zip(at_low, at_high, strict=True))
    return flop, tokens / block_tokens - 1


# -- showing -----------------------------------------------------------------------------------------------------------

COLUMNS = (
    *(
        "shape",
        "dtype",
        "sweep",
        "prompts",
        "cells",
        "first, s",
        "again, s",
        "block-tokens",
        "per second",
        "TFLOP",
        "TFLOP/s",
    ),
    *("rate", "model, GiB", "peak, GiB", "× TransformerLens", "× nnsight", "difference"),
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"


def compare(found: dict[str, Figures]) -> Figures:
    """Compares the libraries' figures: times, and differences of values as a share of their spread."""
    ours = found.get("mechkit", {})
    values = ours.pop("values", None)
    for figures in found.values():
        theirs = figures.pop("values", None)
        if figures is ours or theirs is None or values is None:
            continue
        figures["times_mechkit"] = figures["seconds"] / ours["seconds"]
        figures["largest_difference"] = max(abs(values[int(i)] - v) for i, v in theirs.items())
        figures["relative_difference"] = figures["largest_difference"] / statistics.pstdev(values)
    if values is not None:
        ours["spread"] = statistics.pstdev(values)
    return {"libraries": found}


def print_case(case: Figures) -> None:
    ours = case["libraries"].get("mechkit", {})
    peers = [case["libraries"].get(name, {}) for name in ("transformer_lens", "nnsight")]
    layers = f", layers from {case['layers'][0]}" if "layers" in case else ""

    def text(key: str, form: str, figures: Figures = ours) -> str:
        return format(figures[key], form) if key in figures else "–"

    forms = {
        "cells": ",",
        "seconds_first": ".3g",
        "seconds": ".3g",
        "block_tokens": ",",
        "block_tokens_a_second": ",.0f",
    }
    forms |= {"tflop": ".4g", "tflops": ".3g", "rate": ".0%", "gib_before": ".2f", "peak_gib": ".2f"}
    row = [case["shape"], case["dtype"], case["sweep"] + layers, f"{case['prompts']:,}"]
    row += [text(key, form) for key, form in forms.items()]
    row += [text("times_mechkit", ".1f", peer) for peer in peers]
    differences = [peer["relative_difference"] for peer in peers if "relative_difference" in peer]
    print(f"| {' | '.join(row)} | {f'{max(differences):.1e}' if differences else '–'} |", flush=True)


def print_remarks(case: Figures) -> None:
    """Prints what the table omits: what was not measured, not replayed or scaled; and a profile."""
    name = f"{case['shape']}, {case['dtype']}, {case['sweep']}, {case['prompts']} prompts"
    for library, found in case["libraries"].items():
        if "error" in found:
            print(f"{name}: {library} was not measured: {found['error']}")
        if found.get("replay", "suffix") != "suffix":
            print(f"{name}: whole forward passes were run: {found['replay']}")
        if found.get("cells_run", 0) < found.get("cells", 0) and "cells_run" in found:
            print(
                f"{name}: {library} ran {found['cells_run']} of {found['cells']} cells, {found['batch']} prompts at once"
            )
        if "shares" in found:
            print_profile(found)


if __name__ == "__main__":
    main()
