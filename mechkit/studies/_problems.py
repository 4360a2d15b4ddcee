"""What is wrong with a study, reported all together, each with its key and its line."""

from __future__ import annotations

import re

Key = tuple[str | int, ...]


class Problems:
    """What is wrong with a study, reported together."""

    def __init__(self, where: str, text: str | None = None, *, allow_code: bool = True) -> None:
        self.where, self.text, self.allow_code = where, text, allow_code
        self.found: list[tuple[Key, str]] = []

    def add(self, key: Key, message: str) -> None:
        if (key, message) not in self.found:  # each value of a grid would say it again
            self.found.append((key, message))

    def raise_any(self) -> None:
        if self.found:
            lines = "\n".join(f"  {self._place(key)}: {message}" for key, message in self.found)
            count = "1 problem" if len(self.found) == 1 else f"{len(self.found)} problems"
            raise ValueError(f"{self.where}: {count}; nothing was run\n{lines}")

    def _place(self, key: Key) -> str:
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")
        line = None if self.text is None else line_of(self.text, key)
        return name if line is None else f"line {line}, {name}"


def line_of(text: str, key: Key) -> int | None:
    """The line of a TOML file on which a key stands (`("technique", 1, "site")`), or its table; `None` if it is nowhere."""
    lines = text.splitlines()
    first, last = 0, len(lines)
    rest = list(key)
    if len(rest) >= 2 and isinstance(rest[1], int):
        heads = [i for i, line in enumerate(lines) if re.match(rf"\s*\[\[\s*{re.escape(str(rest[0]))}\s*\]\]", line)]
        if rest[1] >= len(heads):
            return None
        first = heads[rest[1]]
        last = next((i for i in range(first + 1, len(lines)) if re.match(r"\s*\[\[", lines[i])), len(lines))
        rest = rest[2:]
    names = [str(part) for part in rest if not isinstance(part, int)]
    for name in names[::-1]:
        for i in range(first, last):
            if re.match(
                rf"""\s*(?:grid\.|\w+\.)?["']?{re.escape(name)}["']?\s*[.=]|.*[{{,]\s*{re.escape(name)}\s*=|\s*\[+\s*{re.escape(name)}\s*\]""",
                lines[i],
            ):
                return i + 1
    return first + 1 if first or not names else None
