"""Patterns as numbers and labels, ready to be drawn: one prompt, some heads, and the scale of their colours.

1. One prompt is chosen, or the result has none (it was averaged); positions that this prompt lacks are cut off at the end.
2. Cells that do not exist stay NaN. With baselines the numbers are effects, distances from the base run.
3. More cells than can be shown are pooled: a block of tokens is drawn as its largest value (the farthest from 0).
4. More cells than a page can hold as numbers are drawn as bytes, with their scale. The table has the numbers as they were.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from mechkit.plot._figure import Figure, Frame, Table
from mechkit.plot._labels import prompt_note
from mechkit.plot._scale import is_unsigned
from mechkit.plot._tables import table_of
from mechkit.plot._text import caption_of, number, plain
from mechkit.plot._theme import Theme, colourscale
from mechkit.result import Label, Result

_LETTERS = {"layer": "L", "head": "H"}


@dataclass(frozen=True)
class Patterns:
    """What is drawn.

    Attributes:
        values: `[panel dest src]`, a panel a head; NaN where a cell does not exist.
        layers, heads: The labels of each of those dims, `(None,)` without it; the panels are their combinations, heads fastest.
        dests, srcs: Labels of positions, any text.
        what: Name and unit of the values, for axes and hover texts.
        signed: Whether values have a sign, so that 0 is the middle of the colours.
        notes: What was chosen or done, for the caption.
        result: The same cells, as they were.
    """

    values: np.ndarray
    layers: tuple[Label | None, ...]
    heads: tuple[Label | None, ...]
    dests: tuple[str, ...]
    srcs: tuple[str, ...]
    what: str
    signed: bool
    notes: tuple[str, ...]
    result: Result

    @cached_property
    def names(self) -> list[str]:
        """`'L9H6'` of each panel; empty for a result that has neither layers nor heads."""
        return [_name(layer, head) for layer in self.layers for head in self.heads]

    @cached_property
    def largest(self) -> float:
        """The farthest value from 0; 1 if all are 0, for which any scale will do."""
        low, high = np.fmin.reduce(self.values, axis=None), np.fmax.reduce(self.values, axis=None)
        return float(max(abs(low), abs(high))) or 1.0

    def table(self) -> Table:
        """A row for each cell that exists: a column a dim, `"value"`, and the baselines if there are any."""
        table = table_of(self.result)
        present = ~np.isnan(table["value"])
        return {name: column[present] for name, column in table.items()}


@dataclass(frozen=True)
class Drawing:
    """A figure with its traces and axes, where it is, what its caption must say (empty: nothing), and its numbers."""

    figure: Figure
    frame: Frame
    notes: tuple[str, ...]
    table: Callable[[], Table]


def patterns_of(
    result: Result, *, layer: Label | None, head: Label | None, prompt: Label | None, only: bool
) -> tuple[Patterns, int]:
    """The patterns to draw, and which of them is to be seen first.

    Args:
        result: With dims `"dest"` and `"src"`, and perhaps `"layer"`, `"head"`, `"prompt"`.
        layer, head: A label of that dim; None is any.
        prompt: A label of the prompt dim; None is the first.
        only: Whether the other layers and heads are left out.

    Raises:
        ValueError: other dims, an unknown label, an infinite value, or nothing to draw.
    """
    _check(result)
    for dim, label in (("layer", layer), ("head", head), ("prompt", prompt)):
        if label is not None and label not in result.coords.get(dim, ()):
            known = ", ".join(map(repr, result.coords.get(dim, ()))) or f"none, for there is no dim {dim!r}"
            raise ValueError(f"{dim}: expected one of {known}; got {label!r}")
    notes: list[str] = []
    origin, n_prompts = result.provenance, result.provenance.get("n_prompts")
    averaged = isinstance(n_prompts, int) and n_prompts > 1 and result.unit != "p"
    if "prompt" in result.dims:
        labels = result.coords["prompt"]
        chosen = labels[0] if prompt is None else prompt
        notes, averaged, origin = [prompt_note(chosen, labels)], False, {**origin, "n_prompts": None}
        result = replace(result, coords={**result.coords, **_own_labels(result, chosen)}).sel(prompt=chosen)
    wanted = {dim: label for dim, label in (("layer", layer), ("head", head)) if label is not None}
    if only:
        result = result.sel(**{dim: [label] for dim, label in wanted.items()})
    shown = result.effect() if result.baseline else result
    order = [shown.dims.index(dim) for dim in ("layer", "head", "dest", "src") if dim in shown.dims]
    values = shown.values.permute(order).numpy(force=True)
    values = values.reshape(-1, *values.shape[-2:])
    absent = np.isnan(values)
    if np.isinf(values).any():
        raise ValueError("result: expected finite values, got an infinite one; leave its layer and head out with sel()")
    if absent.all():
        raise ValueError(f"result: expected at least one cell that exists, got NaN alone {notes or ''}".rstrip())
    n_dests, n_srcs = (_last(~absent.all(axis=axes)) for axes in ((0, 2), (0, 1)))
    change = f"change from the {result.base} run in " if result.baseline else ""
    metric = result.metric if result.unit in (result.metric, "") else f"{result.metric} ({result.unit})"
    patterns = Patterns(
        values=values[:, :n_dests, :n_srcs],
        layers=result.coords.get("layer", (None,)),
        heads=result.coords.get("head", (None,)),
        dests=tuple(map(str, result.coords["dest"][:n_dests])),
        srcs=tuple(map(str, result.coords["src"][:n_srcs])),
        what=f"{change}{metric}",
        signed=not is_unsigned(result) or bool((values < 0).any()),
        notes=(*caption_of(origin, averaged=averaged), *notes),
        result=result,
    )
    place = [
        labels.index(wanted[dim]) if dim in wanted and not only else 0
        for dim, labels in (("layer", patterns.layers), ("head", patterns.heads))
    ]
    return patterns, place[0] * len(patterns.heads) + place[1]


def _check(result: Result) -> None:
    if not isinstance(result, Result):
        raise ValueError(f"result: expected a Result, got {type(result).__name__}")
    known = {"layer", "head", "dest", "src", "prompt"}
    if not {"dest", "src"} <= set(result.dims) <= known:
        raise ValueError(
            f"result: expected dims 'dest' and 'src', and perhaps 'layer', 'head' and 'prompt'; got {result.dims}. "
            "attention_patterns() gives such a result; choose a label of another dim with sel()"
        )
    if 0 in result.shape:
        raise ValueError(f"result: expected at least one cell, got shape {result.shape} of dims {result.dims}")


def _own_labels(result: Result, prompt: Label) -> dict[str, tuple[Label, ...]]:
    """Positions on which the prompts differ, labelled with this prompt's own tokens, where the provenance has them."""
    rows = result.provenance.get("str_tokens")
    if not isinstance(rows, list) or not isinstance(prompt, int) or not 0 <= prompt < len(rows):
        return {}
    tokens = dict(enumerate(rows[prompt]))

    def own(label: Label) -> Label:
        bare = re.fullmatch(r"\d+", str(label))
        return f'"{tokens[int(label)]}" {label}' if bare and int(label) in tokens else label

    return {dim: tuple(map(own, result.coords[dim])) for dim in ("dest", "src")}


def _last(present: np.ndarray) -> int:
    """How many there are up to the last that is present."""
    return int(np.flatnonzero(present)[-1]) + 1


def _name(layer: Label | None, head: Label | None) -> str:
    """`'L9H6'`; labels that are text are themselves."""
    parts = [(dim, label) for dim, label in (("layer", layer), ("head", head)) if label is not None]
    texts = [f"{_LETTERS[dim]}{label}" if isinstance(label, int) else label for dim, label in parts]
    return ("" if all(isinstance(label, int) for _, label in parts) else " ").join(texts)


# -- what is shown of it -----------------------------------------------------------------------------------------------


def pooled(values: np.ndarray, factor: int) -> np.ndarray:
    """`[panel dest src]` in blocks of `factor` × `factor`: the farthest from 0 of each; NaN if none of the block exists."""
    if factor == 1:
        return values
    n_panels, *sides = values.shape
    n_rows, n_columns = (-(-side // factor) for side in sides)
    shown = np.empty((n_panels, n_rows, n_columns), dtype=values.dtype)
    for panel, pattern in zip(shown, values, strict=True):  # one by one: the padded copy of all would be large
        padded = np.full((n_rows * factor, n_columns * factor), np.nan, dtype=values.dtype)
        padded[: sides[0], : sides[1]] = pattern
        blocks = padded.reshape(n_rows, factor, n_columns, factor)
        low, high = np.fmin.reduce(blocks, axis=(1, 3)), np.fmax.reduce(blocks, axis=(1, 3))
        panel[:] = np.where(-low > high, low, high)
    return shown


def block_labels(labels: Sequence[str], factor: int) -> list[str]:
    """A label for each block of tokens: the first and the last one."""
    blocks = [labels[i : i + factor] for i in range(0, len(labels), factor)]
    return [block[0] if len(block) == 1 else f"{block[0]} to {block[-1]}" for block in blocks]


@dataclass(frozen=True)
class PatternScale:
    """What colours mean, and how numbers become what is drawn.

    Attributes:
        what: Name and unit of the values.
        largest: The farthest value from 0, at which the colours end.
        signed: From `-largest` rather than from 0.
        coded: Values are drawn as bytes: `1..255` for `0..largest` (`-127..127` if signed), and the lowest byte for a cell that
            does not exist. So a value is within half a step of what is drawn; one below half a step above 0 within one.
        has_absent: Whether some cell does not exist.
    """

    what: str
    largest: float
    signed: bool
    coded: bool
    has_absent: bool

    @property
    def steps(self) -> int:
        return 127 if self.signed else 255

    def drawn(self, values: np.ndarray) -> np.ndarray:
        """As a trace takes it."""
        if not self.coded:
            return values
        levels = np.rint(values / self.largest * self.steps)
        if self.signed:
            return np.where(np.isnan(values), -128, levels).astype(np.int8)
        return np.where(np.isnan(values), 0, np.maximum(levels, 1)).astype(np.uint8)

    @property
    def hover(self) -> str:
        """The value's line of a hover template."""
        return f"≈ %{{z}}/{self.steps} of {number(self.largest, 5)}" if self.coded else "%{z:.5~g}"

    @property
    def note(self) -> str:
        """For the caption."""
        if not self.coded:
            return ""
        hidden = f", {'−128' if self.signed else '0'} where there is no cell" if self.has_absent else ""
        of = f"1/{self.steps} of {number(self.largest)}"
        return f"colours and hover in steps of {of}{hidden}; exact values in table()"

    def coloraxis(self, theme: Theme, length: float) -> dict[str, Any]:
        """The colours, with a bar of `length` pixels that says what they mean."""
        colours = colourscale(theme.diverging if self.signed else theme.sequential)
        low, high = (-self.largest if self.signed else 0.0), self.largest
        if self.coded:
            low, high = (-128.0, 127.0) if self.signed else (0.0, 255.0)
            edge = 0.5 / 255  # below it is the lowest byte alone
            first = 1 / 255 if self.signed else 0.0
            places = [max(edge, first + (1 - first) * float(place)) for place, _ in colours]
            kept = [[place, colour] for place, (_, colour) in zip(places, colours, strict=True)]
            colours = [[0.0, theme.absent], [edge, theme.absent], [edge, colours[0][1]], *kept]
        ends = np.linspace(-1 if self.signed else 0, 1, 5 if self.signed else 6)
        stronger = "darker" if theme.name == "light" else "brighter"
        meaning = "blue is higher, red is lower" if self.signed else f"{stronger} is more"
        grey = "<br>grey: no such cell" if self.has_absent else ""
        return {
            "colorscale": colours,
            "cmin": low,
            "cmax": high,
            "colorbar": {
                "thickness": 14,
                "outlinewidth": 0,
                "lenmode": "pixels",
                "len": length,
                "y": 1,
                "yanchor": "top",
                "tickvals": ends * (self.steps if self.coded else self.largest),
                "ticktext": [number(end * self.largest, 2 if abs(end) < 1 else 3) for end in ends],
                "title": {
                    "text": f"{plain(self.what)}<br>{theme.neutral} = 0, {meaning}{grey}<br>&nbsp;",
                    "side": "top",
                    "font": {"size": 12},
                },
            },
        }
