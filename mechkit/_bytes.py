"""Numbers of bytes, as they are shown and as they are written."""

from __future__ import annotations

import re
from typing import Any

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def shown_bytes(size: float) -> str:
    """`"1.5 MiB"`."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"


def as_bytes(given: Any) -> int:
    """`"512 MiB"`, or a number, in bytes; raises `ValueError` for what is neither, or not positive."""
    text = repr(given)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(given))
    if isinstance(given, bool) or match is None or match[2].lower() not in UNITS:
        raise ValueError(f"expected bytes, such as 1073741824 or '1 GiB', got {text}")
    wanted = float(match[1]) * UNITS[match[2].lower()]
    size = int(wanted) if wanted < 2**63 else 0
    if size < 1:
        raise ValueError(
            f"expected a positive number of bytes below 2^63, got {text if len(text) < 80 else f'{text[:77]}...'}"
        )
    return size
