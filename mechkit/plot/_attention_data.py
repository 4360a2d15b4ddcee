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

import numpy as np

from mechkit.plot._figure import Figure, Frame, Table, lay_bar
from mechkit.plot._labels import check_label, choose_prompt, place_label, prompt_note
from mechkit.plot._scale import Scale, choose_scale
from mechkit.plot._size import Paper
from mechkit.plot._text import caption_of, number
from mechkit.plot._theme import Theme
from mechkit.result import Label, Result
from mechkit.result._columns import columns_of
from mechkit.result._labels import cell_label


@dataclass(frozen=True)
class Patterns:
    """What is drawn.

    Attributes:
        values: `[panel dest src]`, a panel a head; NaN where a cell does not exist.
        layers, heads: The labels of each of those dims, `(None,)` without it; the panels are their combinations, heads fastest.
        dests, srcs: Labels of positions, any text.
        what: Name and unit of the values, for axes and hover texts.
        notes: What was chosen or done, for the caption.
        result: The same cells, as they were.
    """

    values: np.ndarray
    layers: tuple[Label | None, ...]
    heads: tuple[Label | None, ...]
    dests: tuple[str, ...]
    srcs: tuple[str, ...]
    what: str
    notes: tuple[str, ...]
    result: Result

    @cached_property
    def names(self) -> list[str]:
        """`'L9H6'` of each panel; empty for a result that has neither layers nor heads."""
        return [_name(layer, head) for layer in self.layers for head in self.heads]

    @cached_property
    def has_absent(self) -> bool:
        """Whether some cell does not exist."""
        return bool(np.isnan(self.values).any())

    def scale(self, theme: Theme, *, coded: bool = False) -> Scale:
        """The one scale of all heads; `coded`: for values that are drawn as bytes."""
        scale = choose_scale(self.values, self.result, theme, self.what, linear=True, whole=coded)
        return replace(scale, coded=coded, absent=theme.masked)

    def table(self) -> Table:
        """A row for each cell that exists: a column a dim, `"value"`, and the baselines if there are any."""
        return columns_of(self.result).present().table()


@dataclass(frozen=True)
class Drawing:
    """A figure with its traces and axes, where it is, what its caption must say (empty: nothing), and its numbers."""

    figure: Figure
    frame: Frame
    notes: tuple[str, ...]
    table: Callable[[], Table]


def patterns_of(
    result: Result,
    *,
    layer: Label | None,
    head: Label | None,
    prompt: Label | None,
    only: bool,
    bos: bool | None = True,
) -> tuple[Patterns, int]:
    """The patterns to draw, and which of them is to be seen first.

    Args:
        result: With dims `"dest"` and `"src"`, and perhaps `"layer"`, `"head"`, `"prompt"`.
        layer, head: A label of that dim; None is any.
        prompt: A label of the prompt dim; None is the first.
        only: Whether the other layers and heads are left out.
        bos: Whether attention to the first token is drawn; `None`: unless it is more than a quarter of all, and
            more than twice what it would be if all attention were spread evenly.

    Raises:
        ValueError: other dims, an unknown label, an infinite value, or nothing to draw.
    """
    _check(result)
    for dim, label in (("layer", layer), ("head", head), ("prompt", prompt)):
        check_label(dim, label, result.coords.get(dim, ()))
    notes: list[str] = []
    origin, n_prompts = result.provenance, result.provenance.get("n_prompts")
    averaged = isinstance(n_prompts, int) and n_prompts > 1 and result.unit != "p"
    if "prompt" in result.dims:
        labels = result.coords["prompt"]
        chosen = choose_prompt(labels, prompt)
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
    values, dests, srcs, sink = _without_sink(values, result, bos)
    notes += [sink] if sink else []
    absent = np.isnan(values)
    n_dests, n_srcs = (_last(~absent.all(axis=axes)) for axes in ((0, 2), (0, 1)))
    change = f"change from the {result.base} run in " if result.baseline else ""
    metric = result.metric if result.unit in (result.metric, "") else f"{result.metric} ({result.unit})"
    patterns = Patterns(
        values=values[:, :n_dests, :n_srcs],
        layers=result.coords.get("layer", (None,)),
        heads=result.coords.get("head", (None,)),
        dests=tuple(map(str, dests[:n_dests])),
        srcs=tuple(map(str, srcs[:n_srcs])),
        what=f"{change}{metric}",
        notes=(*caption_of(origin, averaged=averaged), *notes),
        result=result,
    )
    place = [
        labels.index(wanted[dim]) if dim in wanted and not only else 0
        for dim, labels in (("layer", patterns.layers), ("head", patterns.heads))
    ]
    return patterns, place[0] * len(patterns.heads) + place[1]


def _without_sink(
    values: np.ndarray, result: Result, bos: bool | None
) -> tuple[np.ndarray, Sequence[Label], Sequence[Label], str]:
    """`[panel dest src]`, the labels of destinations and sources, and a note: without the first source, if it is to go, and
    without the destinations that see nothing else. Most heads send most of their attention there, and drown the rest."""
    dests, srcs = result.coords["dest"], result.coords["src"]
    if bos or values.shape[-1] < 2 or np.isnan(values[..., 1:]).all():
        return values, dests, srcs, ""
    to_first, total = (float(np.nansum(np.abs(part), dtype=np.float64)) for part in (values[..., 0], values))
    share = to_first / total if total > 0 else 0.0
    seen = (~np.isnan(values[0])).sum(-1)
    evenly = float((1 / seen[seen > 0]).mean())  # of all, if every destination looked at all that it sees alike
    if bos is None and not share > max(0.25, 2 * evenly):
        return values, dests, srcs, ""
    there = ~np.isnan(values[..., 1:]).all(axis=(0, 2))
    kept = [dest for dest, some in zip(dests, there, strict=True) if some]
    what = "attention" if not result.baseline else "change"
    note = f"the first token, {srcs[0]}, is left out as a source: {100 * share:.0f} % of all {what}"
    return values[:, there, 1:], kept, srcs[1:], note


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
        return place_label(tokens[int(label)], label) if bare and int(label) in tokens else label

    return {dim: tuple(map(own, result.coords[dim])) for dim in ("dest", "src")}


def _last(present: np.ndarray) -> int:
    """How many there are up to the last that is present."""
    return int(np.flatnonzero(present)[-1]) + 1


def _name(layer: Label | None, head: Label | None) -> str:
    """`'L9H6'`; labels that are text are themselves."""
    return cell_label({dim: label for dim, label in (("layer", layer), ("head", head)) if label is not None})


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


def value_template(scale: Scale) -> str:
    """The value's line of a hover template."""
    return f"≈ %{{z}}/{scale.steps} of {number(scale.high, 5)}" if scale.coded else "%{z:.5~g}"


def steps_note(scale: Scale, has_absent: bool) -> str:
    """For the caption: what bytes mean, if cells are drawn as these."""
    if not scale.coded:
        return ""
    hidden = f", {'−128' if scale.low < 0 else '0'} where there is no cell" if has_absent else ""
    of = f"1/{scale.steps} of {number(scale.high)}"
    return f"colours and hover in steps of {of}{hidden}; exact values in table()"


def lay_colours(figure: Figure, scale: Scale, has_absent: bool, paper: Paper, frame: Frame, theme: Theme) -> Frame:
    """The colours, with a bar that says what they mean; the frame with room for it."""
    lined = replace(scale, title=(scale.title[0], ", ".join(scale.title[1:])))
    return lay_bar(figure, lined, paper, frame, theme, *["grey: no such cell"] * has_absent, even=True)
