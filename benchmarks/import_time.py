"""How long `import mechkit` takes, against importing torch and transformers alone.

    python benchmarks/import_time.py [--repeats 5] [--json out.json]

Each import runs in a fresh interpreter, the two taking turns; medians are compared. Also lists the heavy packages that the import
brought in: there should be none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

STATEMENTS = {"torch and transformers": "import torch, transformers", "mechkit": "import mechkit"}
HEAVY = ("plotly", "pandas", "ray", "playwright", "kaleido", "xarray", "scipy", "transformer_lens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()

    for statement in STATEMENTS.values():  # once for the disk's cache
        seconds(statement)
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(args.repeats):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    medians = {name: statistics.median(found) for name, found in times.items()}
    probe = f"import mechkit, sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    heavy = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True).stdout.split()
    ratio = medians["mechkit"] / medians["torch and transformers"]
    for name, median in medians.items():
        print(f"import {name:24} {median:6.2f} s  ({min(times[name]):.2f} to {max(times[name]):.2f})")
    print(f"ratio {ratio:.2f}; heavy packages imported by mechkit: {', '.join(heavy) or 'none'}")
    if args.json:
        args.json.write_text(json.dumps({"seconds": times, "ratio": ratio, "heavy": heavy}, indent=1) + "\n")


def seconds(statement: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
