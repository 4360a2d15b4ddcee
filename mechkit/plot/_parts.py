"""Parts of an axis of positions: which of them are text, and which are the patches of a picture.

1. A result of prompts with pictures knows its segments (`Result.pictures`), if they are the same in all of its prompts.
   Positions of one text, or of one view or tile of a picture, are a part; the ends of a picture's rows belong to it.
2. Between parts is a thin line, and the name of a part is written where it has room. A patch is called by its row and column.
3. The picture itself stands above its positions. plotly shows no pictures in hover texts (an `<img>` with a `data:` address is
   left out): there a patch is named by its row, column, tile and pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mechkit._thumbnails import Described, patches_in
from mechkit.plot._labels import position_of
from mechkit.plot._patch_layout import Patch
from mechkit.result import Label, Result

LETTER = 6.2  # pixels of a letter of a part's name


@dataclass(frozen=True)
class Part:
    """Cells `first` to `last` of an axis, what they are called, and which picture they show, if any."""

    name: str
    first: int
    last: int
    image: int | None = None
    whole: bool = False

    @property
    def middle(self) -> float:
        return (self.first + self.last) / 2


@dataclass(frozen=True)
class Parts:
    """Of one axis; none of a text's.

    Attributes:
        parts: In their order.
        patches: The patch at each index of the axis, where there is one.
    """

    parts: tuple[Part, ...] = ()
    patches: tuple[Patch | None, ...] = ()

    @classmethod
    def of(cls, result: Result, dim: str | None) -> Parts:
        """Of a dim `"pos"` of prompts with pictures."""
        if dim != "pos" or result.pictures is None:
            return cls()
        segments = result.pictures.one.segments[0]
        places = {
            position: Patch(
                at["image"], at["tile"], at["row"], at["column"], None if at["box"] is None else tuple(at["box"])
            )
            for at, position in patches_in(segments)
        }
        keys = _keys(segments)
        positions = [position_of(label) for label in result.coords[dim]]
        if not places or not any(position in places for position in positions):
            return cls()
        several = _several(keys.values())
        parts: list[Part] = []
        last: Any = None
        for i, position in enumerate(positions):
            key = keys.get(position, ("",)) if position is not None else ("",)  # behind a shorter prompt's end
            if parts and key == last:
                parts[-1] = Part(parts[-1].name, parts[-1].first, i, parts[-1].image, parts[-1].whole)
            else:
                image = key[1] if key[0] == "image" else None
                parts.append(Part(_name(key, several), i, i, image, key[0] == "image" and key[2] is None))
            last = key
        return cls(tuple(parts), tuple(None if at is None else places.get(at) for at in positions))

    def labels(self, labels: Sequence[Label]) -> tuple[Label, ...]:
        """The axis's labels, with patches by row and column."""
        if not self.parts:
            return tuple(labels)
        inside = {i for part in self.parts if part.image is not None for i in range(part.first, part.last + 1)}
        return tuple(
            ("end" if i in inside else label) if patch is None else f"r{patch.row}c{patch.column}"
            for i, (label, patch) in enumerate(zip(labels, self.patches, strict=True))
        )

    def hover(self, index: int) -> list[str]:
        """What a patch's hover says of it besides its label."""
        patch = self.patches[index] if self.patches else None
        if patch is None:
            return []
        part = next(part for part in self.parts if part.first <= index <= part.last)
        return [f"{part.name}: row {patch.row}, column {patch.column}", *[patch.pixels] * bool(patch.box)]

    def named(self, pixels: float) -> list[Part]:
        """The parts whose names have room, so many pixels from cell to cell; the largest first."""
        taken: list[tuple[float, float]] = []
        found = []
        for part in sorted((part for part in self.parts if part.name), key=lambda one: one.first - one.last):
            half = len(part.name) * LETTER / 2 + 3
            ends = (part.middle + 0.5) * pixels - half, (part.middle + 0.5) * pixels + half
            if all(ends[1] <= left or right <= ends[0] for left, right in taken):
                taken.append(ends)
                found.append(part)
        return found


def _keys(segments: Sequence[Described]) -> dict[int, tuple[Any, ...]]:
    """Which part each position belongs to."""
    found: dict[int, tuple[Any, ...]] = {}
    before: tuple[Any, ...] = ()
    for i, segment in enumerate(segments):
        key: tuple[Any, ...] = (segment["kind"], i)
        if segment["kind"] == "image":
            key = ("image", segment["image"], segment["tile"])
        elif segment["kind"] == "special" and before[:1] == ("image",):  # the end of a row
            key = before
        found |= dict.fromkeys(range(segment["start"], segment["stop"]), key)
        before = key
    return found


def _several(keys: Any) -> tuple[bool, bool]:
    """Whether there are several pictures, and whether some picture has several views."""
    views = {key[1:] for key in keys if key[0] == "image"}
    return len({image for image, _ in views}) > 1, len(views) > len({image for image, _ in views})


def _name(key: tuple[Any, ...], several: tuple[bool, bool]) -> str:
    if key[0] != "image":
        return str(key[0])
    image = f"image {key[1]}" if several[0] else "image"
    if not several[1]:
        return image
    view = "whole" if key[2] is None else f"tile {key[2]}"
    return f"{image}, {view}" if several[0] else view
