"""Edges and circuits in mechkit and in other libraries: seconds, memory, work, and whether they find the same numbers.

    python benchmarks/circuits/other_libraries.py [--model smollm2-135m] [--device cpu] [--threads 2] [--json out.json]
        [--eap-ig-python /path/to/python] [--auto-circuit-python /path/to/python]

Each library runs in its own process, one after the other, with the same number of threads, on the same model, pairs and metric
(logit difference, right minus wrong).

| task | what | compared with |
| --- | --- | --- |
| `EAP` | edge attribution patching of all edges, at the clean run | EAP-IG package; auto-circuit's mask gradients |
| `EAP-IG` | `--steps` points, from the corrupted run on, as the EAP-IG package places them | EAP-IG package |
| `clean-corrupted` | the mean of the gradients at both ends | EAP-IG package |
| `exact` | exact effects of an even sample of `--edges` edges | EAP-IG package, on `--peer-edges` of them |
| `ACDC` | on the `--candidates` best edges of EAP-IG | one run per edge (counted) |
| `ACDC-4-layers` | on all edges of a random model like GPT-2, 4 layers of 6 heads | one run per edge (counted) |
| `curve` | faithfulness of circuits of 10 sizes on 64 pairs; EAP's scores are not timed | (runs are counted) |
| `MHA-EAP` | all edges of a random model of GPT-2 small's shape, at the corrupted run | TransformerLens's `attribution_patch` |
| `MHA-path` | exact effects of head 0.0's edges to every later query | TransformerLens's `get_act_patch_direct_path` |
| `MHA-circuit` | the metric of the circuit of the `--candidates` best edges | TransformerLens's `faithfulness` |

The other packages need TransformerLens 2, which cannot be installed beside mechkit. The options name a Python that has each, and
the scripts in `peers/` run there. These packages split keys and values by query head (123,211 edges of SmolLM2, not 70,651);
their scores are summed over the heads that share a key or value. TransformerLens 4.3 has no edges on models whose heads share
keys and values, no integrated gradients, and no exact sweep over all edges. Its `attribution_patch` and `faithfulness` take one
pair per call and separate positions (summed here), and `faithfulness` runs again for each class of edges.

Seconds are the best of `--repeats` runs (`--peer-repeats` for the others). `cpu_seconds` (in the JSON) are the CPU time of all
threads of the process, which other work on the machine affects less. `exact` is compared per edge. Memory is the process's peak
above what it held before. A block-token is one block run on one token; in a circuit it costs up to twice as much.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where shared.py is
from mechkit_tasks import Figures, Values, Work, with_mechkit
from shared import clock, held, machine, most_held
from transformer_lens_tasks import export, with_transformer_lens

PEERS = {"eap_ig": "eap_ig.py", "auto_circuit": "auto_circuit_masks.py"}  # in other Pythons
LIBRARIES = ("mechkit", *PEERS, "transformer_lens")
TASKS = (
    "EAP",
    "EAP-IG",
    "clean-corrupted",
    "exact",
    "ACDC",
    "ACDC-4-layers",
    "curve",
    "MHA-EAP",
    "MHA-path",
    "MHA-circuit",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every library")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--eap-ig-python", metavar="PATH", help="a Python with eap and transformer-lens 2.x")
    parser.add_argument(
        "--auto-circuit-python", metavar="PATH", help="a Python with auto-circuit and transformer-lens 2.x"
    )
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--curve-pairs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="of EAP-IG")
    parser.add_argument("--edges", type=int, default=1000, help="in the sample of exact effects")
    parser.add_argument("--peer-edges", type=int, default=20, help="exact effects that the EAP-IG package computes")
    parser.add_argument(
        "--candidates", type=int, default=200, help="number of edges that ACDC begins with, and of the MHA circuit"
    )
    parser.add_argument("--threshold", type=float, default=0.003, help="of ACDC, nats of KL divergence")
    parser.add_argument("--shallow-threshold", type=float, default=0.003, help="of ACDC on the model of 4 layers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--worker", choices=("mechkit", "transformer_lens", "export"), help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    torch.set_num_threads(args.threads)
    if args.worker:
        {"mechkit": work, "transformer_lens": work, "export": export}[args.worker](args)
        return
    report: dict[str, Any] = {"machine": machine(args.device), "device": args.device, "threads": args.threads}
    report |= {"model": args.model, "pairs": args.pairs}
    found = {library: run_library(library, args) for library in args.libraries}
    report |= {"steps": args.steps, "libraries": {name: one[0] for name, one in found.items()}}
    compare(report, {name: one[1] for name, one in found.items()})
    print_table(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def run_library(library: str, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Values]]:
    """The library's figures, and its values by task."""
    python = {"eap_ig": args.eap_ig_python, "auto_circuit": args.auto_circuit_python}.get(library, sys.executable)
    if python is None:
        return {"error": f"give --{library.replace('_', '-')}-python, a Python that has it"}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        this = [sys.executable, __file__, *sys.argv[1:], "--into", name, "--worker"]
        peer = [python, str(Path(__file__).parent / "peers" / PEERS[library]), name] if library in PEERS else []
        for command in ([*this, "export"], peer) if peer else ([*this, library],):
            done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}, {}
        figures, values = (json.loads((folder / f"{file}.json").read_text()) for file in ("figures", "values"))
        return figures, values


# -- one library, in its own process ------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    library = args.worker
    version = importlib.metadata.version(library.replace("_", "-"))  # before the model is loaded, which takes a while
    tasks = (with_mechkit if library == "mechkit" else with_transformer_lens)(args)
    repeats = args.repeats if library == "mechkit" else args.peer_repeats
    figures: dict[str, Figures] = {}
    values: dict[str, Values] = {}
    for task in (task for task in TASKS if task in args.tasks and task in tasks):
        try:
            figures[task], values[task] = measure(args.device, tasks[task], repeats)
        except Exception as error:  # a failed task does not stop the others
            figures[task] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    found = {"version": version, "torch": torch.__version__, "threads": torch.get_num_threads(), "tasks": figures}
    (args.into / "figures.json").write_text(json.dumps(found))
    (args.into / "values.json").write_text(json.dumps(values))


def measure(device: str, work: Work, repeats: int) -> tuple[Figures, Values]:
    run, read = work
    begin, seconds, cpu_seconds = held(device), [], []
    for _ in range(repeats):
        found = None  # frees the last repetition's result
        cpu = time.process_time()
        took, found = clock(device, run)
        seconds.append(took)
        cpu_seconds.append(time.process_time() - cpu)
    figures = {"seconds": min(seconds), "all_seconds": seconds, "cpu_seconds": min(cpu_seconds)}
    figures["peak_memory_gb"] = (most_held(device) - begin) / 1e9
    more, values = read(found)
    return figures | more, values


# -- showing -----------------------------------------------------------------------------------------------------------


def compare(report: dict[str, Any], values: dict[str, dict[str, Values]]) -> None:
    """Adds how far each library's values are from mechkit's, on the edges (or pairs) that both have."""
    ours = values.get("mechkit", {})
    for library, found in values.items():
        for task in found.keys() & ours.keys() if library != "mechkit" else ():
            theirs, figures = grouped(found[task], ours[task]), report["libraries"][library]["tasks"][task]
            both = sorted(theirs.keys() & ours[task].keys())
            figures["compared"], figures["only_there"] = len(both), len(theirs.keys() - ours[task].keys())
            x, y = (np.array([side[name] for name in both]) for side in (ours[task], theirs))
            if both:
                figures["largest_difference"] = float(np.abs(x - y).max())
                figures["largest_value"] = float(np.abs(x).max())
            if len(both) > 2:
                figures["correlation"] = float(np.corrcoef(x, y)[0, 1])


def grouped(values: Values, like: Values) -> Values:
    """Sums the scores of keys and values by query head, `a9.h6<k>`, over heads that share one, if `like` names `a9.kv2<k>`."""
    heads = [int(m[1]) for name in values if (m := re.fullmatch(r".+->a\d+\.h(\d+)<[kv]>", name))]
    shared = [int(m[1]) for name in like if (m := re.fullmatch(r".+->a\d+\.kv(\d+)<[kv]>", name))]
    if not heads or not shared:
        return values
    size = (max(heads) + 1) // (max(shared) + 1)
    found: Values = {}
    for name, value in values.items():
        m = re.fullmatch(r"(.+->a\d+\.)h(\d+)(<[kv]>)", name)
        name = f"{m[1]}kv{int(m[2]) // size}{m[3]}" if m else name
        found[name] = found.get(name, 0.0) + value
    return found


def print_table(report: dict[str, Any]) -> None:
    print(f"{report['model']}, float32, {report['pairs']} pairs, {report['threads']} threads, on {report['machine']}\n")
    titles = (
        "task",
        "edges",
        "library",
        "seconds",
        "times mechkit",
        "correlation",
        "largest difference",
        "of values up to",
    )
    print(f"| {' | '.join((*titles, 'extra GB'))} |\n|{' --- |' * (len(titles) + 1)}")
    ours = report["libraries"].get("mechkit", {}).get("tasks", {})
    for task in TASKS:
        for library, figures in report["libraries"].items():
            found = figures.get("tasks", {}).get(task)
            if found is None:
                continue
            name = f"{library} {figures['version']}"
            if "error" in found:
                print(f"| {task} | | {name} | failed: {found['error']} | | | | | |")
                continue
            own = ours.get(task, {}) if library != "mechkit" else {}
            ratio = found["seconds"] / own["seconds"] if "seconds" in own else None
            if ratio and task == "exact":  # per edge, since the libraries ran different numbers of edges
                ratio *= own["edges"] / found["edges"]
            agreement = (
                (key, form)
                for key, form in (("correlation", ".6f"), ("largest_difference", ".1e"), ("largest_value", ".2g"))
            )
            cells = [f"{found[key]:{form}}" if key in found else "" for key, form in agreement]
            if found.get("only_there"):
                cells[0] += f" ({found['only_there']} edges that mechkit lacks)"
            cells = [f"{ratio:.1f}" if ratio else "", *cells, f"{found['peak_memory_gb']:.2f}"]
            print(f"| {task} | {found.get('edges', '')} | {name} | {found['seconds']:.2f} | {' | '.join(cells)} |")
    for library, figures in report["libraries"].items():
        if "error" in figures:
            print(f"\n{library}: not measured ({figures['error']})")
    for task, found in ours.items():
        if "block_tokens" in found:
            print(f"\n{task}: {describe(found)}")


def describe(found: Figures) -> str:
    times = found["naive_block_tokens"] / found["block_tokens"]
    text = f"{found['block_tokens']:,} block-tokens; one whole run each takes {found['naive_block_tokens']:,}, {times:.3g} times"
    if "all_edges" in found:
        minutes = found["seconds"] / found["edges"] * found["all_edges"] / 60
        text += f"; {found['edges'] / found['seconds']:.0f} edges per second, so {minutes:.1f} minutes for {found['all_edges']:,}"
    if "kept" in found:
        text += f"; {found['n_tested']} edges tried, {found['kept']} of {found['edges']} kept, {found['distance']:.3g} nats off"
    if "runs_by_positions" in found:
        runs = ", ".join(f"{n:.2f} of {length} positions" for length, n in found["runs_by_positions"].items())
        text += f"; runs of all {found['pairs']} pairs for {found['circuits']} circuits: {runs}"
    return text


if __name__ == "__main__":
    main()
