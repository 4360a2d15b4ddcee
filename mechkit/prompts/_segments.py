"""Segments: which positions of a prompt are text, and which are the patches of which picture. Plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mechkit._check import checked, is_whole

Kind = Literal["text", "image", "audio", "special"]
Box = tuple[float, float, float, float]  # left, top, right, bottom


@checked
@dataclass(frozen=True)
class Segment:
    """Positions of a prompt that belong together: a text, or a rectangle of a picture, cut into patches.

    Attributes:
        kind: `"text"`, `"image"` (patches), `"audio"`, or `"special"` (what only marks a place, such as the end of a row).
        start, stop: The positions `start <= position < stop`.
        grid: For an image, how many `(rows, columns)` of patches there are; they are listed row by row from the upper left.
        tile: Which of the tiles that a picture is cut into, from 0; `None` where the segment shows the whole picture.
        box: The part of the picture that the grid covers, in pixels of the picture: `(left, top, right, bottom)`.
        image: Which of the prompt's pictures, from 0.
    """

    kind: Kind
    start: int
    stop: int
    grid: tuple[int, int] | None = None
    tile: int | None = None
    box: Box | None = None
    image: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}; got {self.kind!r}")
        if not 0 <= self.start < self.stop:
            raise ValueError(f"stop: expected positions start < stop, from 0 on; got {self.start} and {self.stop}")
        for name, number in (("tile", self.tile), ("image", self.image)):
            if number is not None and (not is_whole(number) or number < 0):
                raise ValueError(f"{name}: expected a number from 0 on, got {number!r}")
        if self.grid is not None and (min(self.grid) < 1 or self.grid[0] * self.grid[1] != len(self)):
            raise ValueError(
                f"grid: expected rows and columns of {len(self)} patches, one for each position; got {self.grid[0]} x "
                f"{self.grid[1]}"
            )
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise ValueError(f"box: expected left < right and top < bottom, got {self.box}")

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def positions(self) -> range:
        return range(self.start, self.stop)

    def patch_box(self, position: int) -> Box:
        """The pixels of the picture that the patch at a position was cut from (or that stand for it).

        Raises:
            ValueError: the segment has no grid or no box, or does not hold the position.
        """
        if self.grid is None or self.box is None:
            raise ValueError(
                f"position: the segment at {self.start}..{self.stop - 1} has no grid of patches on a picture"
            )
        if not self.start <= position < self.stop:
            raise ValueError(f"position: expected {self.start}..{self.stop - 1}, got {position}")
        row, column = divmod(position - self.start, self.grid[1])
        left, top, right, bottom = self.box
        width, height = (right - left) / self.grid[1], (bottom - top) / self.grid[0]
        return left + column * width, top + row * height, left + (column + 1) * width, top + (row + 1) * height


def check_segments(segments: Sequence[Segment], length: int, what: str) -> None:
    """Raises `ValueError` unless segments follow one another and are within a prompt of `length` tokens."""
    before = 0
    for segment in segments:
        if segment.start < before or segment.stop > length:
            raise ValueError(
                f"{what}: expected segments in order, apart, and within {length} tokens; got one at {segment.start}.."
                f"{segment.stop - 1} behind position {before - 1}"
            )
        before = segment.stop
