"""How long `import mechkit` and `mechkit --help` take, against importing torch and transformers alone.

    python benchmarks/package/import_time.py [--repeats 5] [--json out.json]

Each import runs in a fresh interpreter, in turn with the others; medians are compared. Times are processor time, so that other
work on the machine matters little. Also lists the heavy packages that `import mechkit` and its parts load: there should be none.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

PARTS = "from mechkit import attribution, circuits, hooks, plot, tasks, zoo"
STATEMENTS = {
    "import torch, transformers": "import torch, transformers",
    "import mechkit": "import mechkit",
    "all parts of mechkit": PARTS,
    "mechkit --help": "from mechkit import cli; cli.app(['--help'])",
}
HEAVY = ("plotly", "pandas", "ray", "playwright", "kaleido", "xarray", "scipy", "transformer_lens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()

    for statement in STATEMENTS.values():  # once, to fill the disk's cache
        seconds(statement)
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(args.repeats):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    medians = {name: statistics.median(found) for name, found in times.items()}
    heavy = {"import mechkit": heavy_after("import mechkit", (*HEAVY, "torch", "transformers"))}
    heavy["all parts of mechkit"] = heavy_after(PARTS, HEAVY)
    for name, median in medians.items():
        print(f"{name:26} {median:6.2f} s  ({min(times[name]):.2f} to {max(times[name]):.2f})")
    ratio = medians["all parts of mechkit"] / medians["import torch, transformers"]
    print(f"all parts against torch and transformers: {ratio:.2f}")
    for name, packages in heavy.items():
        print(f"heavy packages imported by {name}: {', '.join(packages) or 'none'}")
    if args.json:
        args.json.write_text(json.dumps({"cpu_seconds": times, "ratio": ratio, "heavy": heavy}, indent=1) + "\n")


def seconds(statement: str) -> float:
    """CPU seconds of a fresh interpreter that runs the statement."""
    before = cpu_seconds()
    subprocess.run([sys.executable, "-c", statement], check=True, stdout=subprocess.DEVNULL)
    return cpu_seconds() - before


def cpu_seconds() -> float:
    """CPU seconds of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def heavy_after(statement: str, packages: tuple[str, ...]) -> list[str]:
    """The packages that a fresh interpreter has loaded after the statement."""
    probe = f"{statement}; import sys; print(*[name for name in {packages!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True).stdout.split()


if __name__ == "__main__":
    main()
