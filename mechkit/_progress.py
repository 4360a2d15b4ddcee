"""The progress of long calls: a bar in a terminal or a notebook, a line every few seconds in a log, nothing for short calls."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any, Self

DELAY = 2.0  # seconds before a bar is drawn
EVERY = 5.0  # seconds before the first line of a log, and between two lines


def is_watched(stream: Any) -> bool:
    """Whether a bar can be drawn again and again on this stream: a terminal, or the output of a notebook's cell."""
    isatty = getattr(stream, "isatty", None)
    return (isatty is not None and isatty()) or type(stream).__module__.startswith("ipykernel")


class Progress:
    """Counts what is done and shows it on stderr: `with Progress(len(prompts), "prompt", progress) as bar: bar.update()`.

    Args:
        total: How many units there are; `None` if that is not known.
        unit: What is counted, in the singular.
        show: `False` shows nothing; so does the environment variable `TQDM_DISABLE=1`.
        done: How many are done already.
    """

    def __init__(self, total: int | None, unit: str, show: bool = True, *, done: int = 0) -> None:
        self.total, self.unit, self.done, self.note = total, unit, done, ""
        self._first, self._began, self._wrote = done, time.monotonic(), 0.0
        silenced = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")  # as for every other library's bars
        self._stream = sys.stderr if show and not silenced else None
        self._bar: Any = None
        if self._stream is not None and is_watched(self._stream):
            from tqdm import tqdm  # in notebooks too: its widget needs a package, and warns without

            self._bar = tqdm(total=total, initial=done, unit=unit, leave=False, delay=DELAY)

    def update(self, n: int = 1, note: str = "") -> None:
        """Counts `n` more units, never more than there are; `note` says how it goes, such as `"loss 0.31"`."""
        self.reach(self.done + n, note=note)

    def reach(self, done: int, total: int | None = None, note: str = "") -> None:
        """Sets how many units are done, where that is known at times only; it never goes back."""
        self.total = self.total if total is None else total
        done = max(self.done, done if self.total is None else min(done, self.total))
        step, self.done, self.note = done - self.done, done, note or self.note
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(step)
        elif self._stream is not None and time.monotonic() - max(self._began, self._wrote) >= EVERY:
            self._write_line()

    def reset(self) -> None:
        """Begins to count again, where all has to be done a second time."""
        self.done = self._first = 0
        if self._bar is not None:
            self._bar.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar away; a log that has lines gets a last one."""
        if self._bar is not None:
            self._bar.close()
        elif self._wrote and self._stream is not None:
            self._write_line()
        self._stream = None

    def _write_line(self) -> None:
        assert self._stream is not None
        self._wrote = time.monotonic()
        spent, here = self._wrote - self._began, self.done - self._first
        total = "" if self.total is None else f" of {self.total:,}"
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        left = (self.total - self.done) * spent / here if self.total and here else 0.0
        parts = [f"{self.done:,}{total} {_plural(self.unit)}{share}", _clock(spent)]
        parts += [f"about {_clock(left)} left"] if left else []
        parts += [self.note] if self.note else []
        try:
            print(f"mechkit: {', '.join(parts)}", file=self._stream, flush=True)
        except (OSError, ValueError):  # a log that was closed stops no computation
            self._stream = None


def _plural(unit: str) -> str:
    """`'rows'`; `'pairs of layers'` of `'pair of layers'`."""
    first, *rest = unit.split(" ", 1)
    return " ".join([f"{first}s", *rest])


def _clock(seconds: float) -> str:
    """`'42 s'`, `'3 min 05 s'`, `'2 h 07 min'`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
