"""A fingerprint of what the library computes: some six thousand results, which must be equal before and after code is moved.

    python benchmarks/fingerprint/fingerprint.py --out before.npz [--families gpt2 llama …] [--techniques ablation …]
    python benchmarks/fingerprint/fingerprint.py --compare before.npz after.npz

1. Tiny random models of eight families, in float64 and on one thread; prompts of two lengths with seeded tokens. Of a ninth,
   which reads pictures, what is computed at patches and pixels.
2. Every technique runs with its options, by public names only. What a call returns is split into arrays of numbers, stored
   under `technique|family|options|field`. Words (labels, provenance) and costs are omitted.
3. A call that the library refuses (an architecture without that site) is stored as `…|refused`, so that a change from refusing
   to answering, or back, is noticed.
4. Two fingerprints are compared array by array: equal to the bit; equal to 1e-12 of the array's largest number; different.
   The exit status is 1 if an array is different or missing.

Results are equal to the bit only on one machine with one build of torch: make both fingerprints there.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calls import calls_of
from family_material import FAMILIES, Call
from torch import Tensor

ROUNDING = 1e-12
_NO_VALUES = {
    "provenance",
    "cost",
    "coords",
    "graph",
    "edge",
    "pictures",
}  # fields that hold words, structure, or what is drawn

Arrays = dict[str, np.ndarray]


# --- from the result of a call to arrays


def values_of(found: Any) -> Arrays:
    """The numbers in an object, by their place in it. Words, and fields that hold no values, are omitted."""
    if isinstance(found, Tensor):
        return {"": found.detach().cpu().numpy()}
    if isinstance(found, bool | int | float | np.number) or (isinstance(found, np.ndarray) and found.dtype != object):
        return {"": np.asarray(found)}
    if is_dataclass(found) and not isinstance(found, type):
        inside = {f.name: getattr(found, f.name) for f in fields(found) if f.name not in _NO_VALUES}
        return _under(inside)
    if isinstance(found, Mapping):
        values = list(found.values())
        return values_of(values) if values and all(isinstance(v, int | float) for v in values) else _under(found)
    if isinstance(found, list | tuple):
        return _together([values_of(one) for one in found])
    return {}


def _under(inside: Mapping[str, Any]) -> Arrays:
    """Each part's arrays, with the part's name before their own."""
    return {
        f"{name}.{rest}" if rest else str(name): array
        for name, one in inside.items()
        for rest, array in values_of(one).items()
    }


def _together(parts: Sequence[Arrays]) -> Arrays:
    """Joins arrays of the same name: stacked, or flattened and concatenated where their shapes differ."""
    names = dict.fromkeys(name for part in parts for name in part)
    joined = {}
    for name in names:
        arrays = [part[name] for part in parts if name in part]
        same = len({array.shape for array in arrays}) == 1
        joined[name] = np.stack(arrays) if same else np.concatenate([array.ravel() for array in arrays])
    return joined


# --- making a fingerprint


def made(families: Sequence[str], techniques: Sequence[str] = (), log: Callable[[str], Any] = print) -> Arrays:
    """All arrays of these families; only of these techniques, if any are named."""
    torch.set_num_threads(1)
    found: Arrays = {}
    for family in families:
        began, before = time.process_time(), len(found)
        for call in calls_of(family):
            if techniques and call.technique not in techniques:
                continue
            for name, array in answered(call).items():
                key = f"{call.technique}|{family}|{call.options}|{name}"
                if key in found:
                    raise ValueError(f"two calls have the key {key}")
                found[key] = array
        log(f"{family}: {len(found) - before} arrays, {time.process_time() - began:.0f} s of CPU")
    return found


def answered(call: Call) -> Arrays:
    """The arrays that a call returns; one empty array named "refused" where the library refuses it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            values = values_of(call.run())
        except ValueError:
            return {"refused": np.empty(0)}
    return values or {"nothing": np.empty(0)}


def count(keys: Sequence[str]) -> tuple[Counter[str], Counter[str]]:
    """How many calls of each technique gave a result, and how many were refused."""
    whether = {key.rsplit("|", 1)[0]: key.endswith("|refused") for key in keys}
    given, refused = ([call.split("|")[0] for call, no in whether.items() if no is which] for which in (False, True))
    return Counter(given), Counter(refused)


# --- comparing two


@dataclass(frozen=True)
class Differences:
    """The keys of two fingerprints by the outcome of their comparison; unequal ones with their difference."""

    equal: list[str]
    rounding: dict[str, float]
    different: dict[str, str]
    missing: list[str]
    new: list[str]

    @property
    def ok(self) -> bool:
        return not (self.different or self.missing)


def compared_with(old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> Differences:
    """Compares each array of `old` with the one in `new`."""
    found = Differences([], {}, {}, [key for key in old if key not in new], [key for key in new if key not in old])
    for key in (key for key in old if key in new):
        a, b = old[key], new[key]
        if a.dtype != b.dtype or a.shape != b.shape:
            found.different[key] = f"{a.dtype} {list(a.shape)} became {b.dtype} {list(b.shape)}"
        elif a.tobytes() == b.tobytes():
            found.equal.append(key)
        elif (error := relative(a, b)) <= ROUNDING:
            found.rounding[key] = error
        else:
            found.different[key] = f"by {error:.2g} of the largest number"
    return found


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, as a share of the largest finite number in `a`; infinite where rounding cannot explain it."""
    if a.dtype.kind != "f":
        return float("inf")
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    size, error = np.abs(a[finite]).max(), np.abs(a[finite] - b[finite]).max()
    return float(error / size) if size else (float("inf") if error else 0.0)


def report(found: Differences) -> str:
    """The comparison as text, with one line for each array that is not equal to the bit."""
    lines = [f"equal to the bit: {len(found.equal)}", f"equal to {ROUNDING:g}: {len(found.rounding)}"]
    lines += [f"  {key}  {error:.2g}" for key, error in found.rounding.items()]
    lines += [f"different: {len(found.different)}", *(f"  {key}  {how}" for key, how in found.different.items())]
    for what, keys in (("missing", found.missing), ("new", found.new)):
        lines += [f"{what}: {len(keys)}", *(f"  {key}" for key in keys)]
    return "\n".join(lines)


def load(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the fingerprint (.npz)")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--techniques", nargs="+", default=(), help="only these, by the first part of their keys")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="compare two fingerprints instead"
    )
    args = parser.parse_args(argv)
    if args.compare:
        found = compared_with(*(load(path) for path in args.compare))
        print(report(found))
        return 0 if found.ok else 1
    arrays = made(args.families, args.techniques)
    given, refused = count(list(arrays))
    print("| technique | results | refused |\n| --- | --- | --- |")
    for name in dict.fromkeys((*given, *refused)):
        print(f"| {name} | {given[name]} | {refused[name]} |")
    print(f"{given.total()} results in {len(arrays)} arrays; {refused.total()} calls refused")
    if args.out:
        np.savez_compressed(args.out, **arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main())
