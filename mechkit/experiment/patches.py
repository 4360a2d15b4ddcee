"""Patches of pictures as a dim of results: `over="layer patch"` is `over="layer position"`, each patch being a named position."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from mechkit.prompts import PromptPairs, Prompts, Segment
from mechkit.result import Result


@dataclass(frozen=True, eq=False)
class Patches:
    """The patches of some prompts' pictures, which are cut alike.

    Attributes:
        labels: `"r0c2"`, by row and column; with the picture and the tile in front where there are several.
        positions: Where each one is in each prompt.
        layout: For each one what a plot must know: `image`, `tile`, `row`, `column`, and `box`, in pixels of the picture
            (`[left, top, right, bottom]`, or `None` where that is not known).
    """

    labels: tuple[str, ...]
    positions: Int[Tensor, "patch prompt"]
    layout: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, prompts: Prompts) -> Patches:
        """
        Raises:
            ValueError: prompts without pictures, or whose pictures are not cut alike.
        """
        of_each = [_patches(segments) for segments in prompts.segments or ()]
        if not of_each or not of_each[0]:
            raise ValueError("over: 'patch' needs prompts with pictures; these have none. Use 'pos'")
        first = [layout for layout, _ in of_each[0]]
        for i, one in enumerate(of_each):
            if [layout for layout, _ in one] != first:
                raise ValueError(
                    f"over: 'patch' needs pictures that are cut alike; prompt {i} has {len(one)} patches in another layout than "
                    f"prompt 0, with {len(first)}. Resize the pictures to one size, give them in separate calls, or use 'pos'"
                )
        several = len({layout["image"] for layout in first}) > 1, len({layout["tile"] for layout in first}) > 1
        positions = torch.tensor([[position for _, position in one] for one in of_each]).T
        return cls(tuple(_label(layout, *several) for layout in first), positions, tuple(first))

    def named(self) -> dict[str, Int[Tensor, "prompt"]]:
        """As named positions."""
        return dict(zip(self.labels, self.positions, strict=True))

    def sizes(self) -> list[list[float] | None]:
        """Width and height of each picture in the boxes' pixels, as far as its patches reach; `None` where no box is known.
        A plot of some of the patches needs it to lay them over the whole picture."""
        found: list[list[float] | None] = []
        for image in range(max(at["image"] for at in self.layout) + 1):
            boxes = [at["box"] for at in self.layout if at["image"] == image and at["box"] is not None]
            found.append([max(box[side] for box in boxes) for side in (2, 3)] if boxes else None)
        return found

    def grouped(self, size: int) -> tuple[dict[str, list[str]], tuple[dict[str, Any], ...]]:
        """Squares of `size` times `size` neighbouring patches (smaller at the edges): the members' labels of each, by its label;
        and their layout."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, at in enumerate(self.layout):
            groups.setdefault((at["image"], at["tile"], at["row"] // size, at["column"] // size), []).append(i)
        members, layouts = {}, []
        for group in groups.values():
            first, last = self.layout[group[0]], self.layout[group[-1]]
            label = (
                self.labels[group[0]] if len(group) == 1 else f"{self.labels[group[0]]}-r{last['row']}c{last['column']}"
            )
            members[label] = [self.labels[i] for i in group]
            boxes = [first["box"], last["box"]]
            box = None if None in boxes else [*first["box"][:2], *last["box"][2:]]
            layouts.append({**first, "row": first["row"] // size, "column": first["column"] // size, "box": box})
        return members, tuple(layouts)


def _patches(segments: Sequence[Segment]) -> list[tuple[dict[str, Any], int]]:
    """Each patch's layout and position. Rows that the model lists one by one (each with an end) are one grid."""
    found, rows = [], dict[tuple[int, int | None], int]()
    for segment in segments:
        if segment.kind != "image" or segment.grid is None:
            continue
        which = segment.image, segment.tile
        above = rows.get(which, 0)
        rows[which] = above + segment.grid[0]
        for position in segment.positions:
            row, column = divmod(position - segment.start, segment.grid[1])
            box = None if segment.box is None else list(segment.patch_box(position))
            at = {"image": segment.image, "tile": segment.tile, "row": above + row, "column": column, "box": box}
            found.append((at, position))
    return found


def _label(at: Mapping[str, Any], several_images: bool, several_tiles: bool) -> str:
    image = f"image {at['image']} " if several_images else ""
    tile = ("whole " if at["tile"] is None else f"tile {at['tile']} ") if several_tiles else ""
    return f"{image}{tile}r{at['row']}c{at['column']}"


def patch_positions(prompts: Prompts) -> dict[str, Int[Tensor, "prompt"]]:
    """The patches as named positions; none for prompts without pictures, or with pictures that are not cut alike."""
    try:
        return Patches.of(prompts).named()
    except ValueError:
        return {}


T = TypeVar("T", bound=Callable[..., Any])


def takes_patches(technique: T) -> T:
    """A technique on pairs whose `over` may have `"patch"` among its dims: one patch of a picture, wherever it stands in each
    prompt."""
    signature = inspect.signature(technique)
    prompts = list(signature.parameters)[1]

    @functools.wraps(technique)
    def door(*args: Any, **options: Any) -> Any:
        try:
            bound = signature.bind(*args, **options)
        except TypeError:
            return technique(*args, **options)  # which says what is wrong
        bound.apply_defaults()
        given, over = bound.arguments, bound.arguments["over"]
        if not isinstance(over, str) or "patch" not in over.split():
            return technique(*args, **options)
        if {"pos", "position"} & set(over.split()):
            raise ValueError(f"over: expected one of 'pos', 'position' and 'patch' at most; got {over!r}")
        pairs = given[prompts]
        if not isinstance(pairs, PromptPairs):
            raise ValueError(
                f"over: 'patch' needs PromptPairs, got {type(pairs).__name__}; use 'pos' for plain prompts"
            )
        patches = Patches.of(pairs.clean)
        given[prompts] = replace(pairs, positions=patches.named())
        given["over"] = " ".join("position" if dim == "patch" else dim for dim in over.split())
        if given.get("cells") is None:
            given["positions"] = list(patches.labels if given["positions"] is None else given["positions"])
        found = technique(*bound.args, **bound.kwargs)
        if isinstance(found, list):
            return [renamed(one, over, patches) for one in found]
        return renamed(found, over, patches)

    return door  # type: ignore[return-value]


def renamed(result: Result, over: str, patches: Patches) -> Result:
    """A result over named positions as one over patches."""
    dims = tuple("patch" if dim == "position" else dim for dim in result.dims)
    coords = {"patch" if dim == "position" else dim: labels for dim, labels in result.coords.items()}
    layout = dict(zip(patches.labels, patches.layout, strict=True))
    chosen = [layout[str(label)] for label in coords.get("patch", ())]
    provenance = {**result.provenance, "over": over, "patches": chosen, "picture_sizes": patches.sizes()}
    return replace(result, dims=dims, coords=coords, provenance=provenance)
