"""Small copies of prompts' pictures, and which positions show which part of them: for figures that lay values over a picture.

1. `Prompts` make thumbnails when they are made: of the picture that the processor was given, else of the model's pixels.
2. A `Result` keeps those of its prompts, with the prompts' segments as plain values. Selecting prompts selects theirs.
3. A mean over prompts has a picture if it is the same in all of them; otherwise it knows that they differ.

Nothing here enters a hash, or a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

LONGEST = 256  # pixels of a thumbnail's longer side, at most
MOST = 64  # different thumbnails that a result keeps; some 12 MB if all are of the largest size

Described = Mapping[str, Any]  # a segment: kind, start, stop, grid, tile, box, image


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """A small copy of a picture.

    Attributes:
        pixels: Red, green and blue, 0..255, rows from the top.
        size: Width and height of the whole picture, in the pixels in which segments have their boxes.
    """

    pixels: UInt8[Tensor, "row column 3"]
    size: tuple[float, float]

    def __repr__(self) -> str:
        rows, columns = self.pixels.shape[:2]
        return f"Thumbnail({columns} x {rows} pixels of a picture of {self.size[0]:g} x {self.size[1]:g})"

    def same_as(self, other: Thumbnail) -> bool:
        return self is other or (self.size == other.size and torch.equal(self.pixels, other.pixels))


Thumbnails = tuple[Thumbnail | None, ...]  # of one prompt, by the number of the picture


@dataclass(frozen=True, eq=False)
class PromptPictures:
    """The pictures of a result's prompts.

    Attributes:
        segments: For each prompt which positions are what, as `Prompts.segments` has it, each segment as a mapping of its
            attributes. Of a mean over prompts one entry; empty if prompts differ in it.
        thumbnails: For each prompt its pictures, by number; `None` where there is no copy. Of a mean over prompts one entry, with
            `None` for a picture that differs among them.
        differ: Whether this is of a mean over prompts whose pictures differ.
    """

    segments: tuple[tuple[Described, ...], ...]
    thumbnails: tuple[Thumbnails, ...]
    differ: bool = False

    def __post_init__(self) -> None:
        if len(self.segments) != len(self.thumbnails):
            raise ValueError(
                f"pictures: expected segments and thumbnails of as many prompts, got {len(self.segments)} and "
                f"{len(self.thumbnails)}"
            )

    def __repr__(self) -> str:
        return f"PromptPictures({len(self)} prompts{', pictures differ' * self.differ})"

    def __len__(self) -> int:
        """Of how many prompts."""
        return len(self.segments)

    @property
    def one(self) -> PromptPictures:
        """As of a mean over all prompts."""
        if len(self) == 1:
            return self
        common = self.segments[0] if len(self) and all(one == self.segments[0] for one in self.segments) else ()
        n = max(map(len, self.thumbnails), default=0)
        shared = tuple(_shared([one[i] if i < len(one) else None for one in self.thumbnails]) for i in range(n))
        return PromptPictures((common,), (shared,), not common or None in shared)

    def chosen(self, prompts: Sequence[int]) -> PromptPictures:
        """Those of some prompts, in the given order."""
        return PromptPictures(
            tuple(self.segments[i] for i in prompts), tuple(self.thumbnails[i] for i in prompts), self.differ
        )

    def stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON values, and tensors by name; equal segments and pictures once."""
        layouts: list[tuple[Described, ...]] = []
        kept: list[Thumbnail] = []
        for one in self.segments:
            if one not in layouts:
                layouts.append(one)

        def number(one: Thumbnail | None) -> int | None:
            if one is None:
                return None
            for i, other in enumerate(kept):
                if one.same_as(other):
                    return i
            kept.append(one)
            return len(kept) - 1

        header = {
            "layouts": [[dict(segment) for segment in one] for one in layouts],
            "layout": [layouts.index(one) for one in self.segments],
            "thumbnails": [[number(one) for one in several] for several in self.thumbnails],
            "sizes": [list(one.size) for one in kept],
            "differ": self.differ,
        }
        return header, {f"thumbnail.{i}": one.pixels for i, one in enumerate(kept)}

    @classmethod
    def restored(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PromptPictures:
        """The inverse of `stored`."""
        layouts = [tuple(described(segment) for segment in one) for one in header["layouts"]]
        kept = [Thumbnail(tensors[f"thumbnail.{i}"], (size[0], size[1])) for i, size in enumerate(header["sizes"])]
        return cls(
            tuple(layouts[i] for i in header["layout"]),
            tuple(tuple(None if i is None else kept[i] for i in several) for several in header["thumbnails"]),
            bool(header["differ"]),
        )


def patches_in(segments: Sequence[Described]) -> list[tuple[dict[str, Any], int]]:
    """Each patch's layout (`image`, `tile`, `row`, `column`, `box`) and position. Rows that the model lists one by one (each with
    an end) are one grid."""
    found, rows = [], dict[tuple[int, int | None], int]()
    for segment in segments:
        if segment["kind"] != "image" or segment["grid"] is None:
            continue
        which = segment["image"], segment["tile"]
        above = rows.get(which, 0)
        n_rows, n_columns = segment["grid"]
        rows[which] = above + n_rows
        for position in range(segment["start"], segment["stop"]):
            row, column = divmod(position - segment["start"], n_columns)
            box = None
            if segment["box"] is not None:
                left, top, right, bottom = segment["box"]
                width, height = (right - left) / n_columns, (bottom - top) / n_rows
                box = [left + column * width, top + row * height, left + (column + 1) * width, top + (row + 1) * height]
            at = {"image": which[0], "tile": which[1], "row": above + row, "column": column, "box": box}
            found.append((at, position))
    return found


def patch_labels(layouts: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """`"r0c2"`, by row and column; with the picture and the tile in front where there are several."""
    images, tiles = ({at[name] for at in layouts} for name in ("image", "tile"))

    def label(at: Mapping[str, Any]) -> str:
        image = f"image {at['image']} " if len(images) > 1 else ""
        tile = ("whole " if at["tile"] is None else f"tile {at['tile']} ") if len(tiles) > 1 else ""
        return f"{image}{tile}r{at['row']}c{at['column']}"

    return tuple(map(label, layouts))


def described(segment: Mapping[str, Any]) -> dict[str, Any]:
    """A segment's attributes as JSON gives them back, with tuples for its lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in segment.items()}


def limited(thumbnails: Sequence[Thumbnails]) -> tuple[Thumbnails, ...]:
    """The first different ones, `MOST` of them; `None` for those after them."""
    kept: list[Thumbnail] = []

    def known(one: Thumbnail | None) -> Thumbnail | None:
        if one is None:
            return None
        for other in kept:
            if one.same_as(other):
                return other
        if len(kept) >= MOST:
            return None
        kept.append(one)
        return one

    return tuple(tuple(known(one) for one in several) for several in thumbnails)


def _shared(several: Sequence[Thumbnail | None]) -> Thumbnail | None:
    first = several[0]
    if first is None or not all(one is not None and one.same_as(first) for one in several):
        return None
    return first
