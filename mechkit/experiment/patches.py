"""Patches of pictures as a dim of results: `over="layer patch"` is `over="layer position"`, each patch being a named position."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from mechkit._thumbnails import patch_labels, patches_in
from mechkit.experiment.positions import PlacedPrompts
from mechkit.prompts import PromptPairs, Prompts
from mechkit.result import Result


@dataclass(frozen=True, eq=False)
class Patches:
    """The patches of some prompts' pictures, which are cut alike.

    Attributes:
        labels: `"r0c2"`, by row and column; with the picture and the tile in front where there are several.
        positions: Where each one is in each prompt.
        layout: For each one what a plot must know: `image`, `tile`, `row`, `column`, and `box`, in pixels of the picture
            (`[left, top, right, bottom]`, or `None` where that is not known).
        whole: Width and height of each picture in those pixels, as far as they are known and the same for all prompts.
    """

    labels: tuple[str, ...]
    positions: Int[Tensor, "patch prompt"]
    layout: tuple[dict[str, Any], ...]
    whole: tuple[tuple[float, float] | None, ...] = ()

    @classmethod
    def of(cls, prompts: Prompts, argument: str = "over") -> Patches:
        """Of some prompts; `argument` is what asked for them.

        Raises:
            ValueError: prompts without pictures, or whose pictures are not cut alike.
        """
        of_each = [patches_in([asdict(segment) for segment in segments]) for segments in prompts.segments or ()]
        if not of_each or not of_each[0]:
            raise ValueError(f"{argument}: 'patch' needs prompts with pictures; these have none. Use 'pos'")
        first = [layout for layout, _ in of_each[0]]
        for i, one in enumerate(of_each):
            if [layout for layout, _ in one] != first:
                raise ValueError(
                    f"{argument}: 'patch' needs pictures that are cut alike; prompt {i} has {len(one)} patches in another layout "
                    f"than prompt 0, with {len(first)}. Resize the pictures to one size, give them in separate calls, or use "
                    "'pos'"
                )
        positions = torch.tensor([[position for _, position in one] for one in of_each]).T
        return cls(patch_labels(first), positions, tuple(first), _whole_sizes(prompts))

    def named(self) -> dict[str, Int[Tensor, "prompt"]]:
        """As named positions."""
        return dict(zip(self.labels, self.positions, strict=True))

    def sizes(self) -> list[list[float] | None]:
        """Width and height of each picture in the boxes' pixels: of the whole (a processor may cut its edges off), or as far as
        its patches reach; `None` where no box is known. A plot needs it to lay patches over the whole picture."""
        found: list[list[float] | None] = []
        for image in range(max(at["image"] for at in self.layout) + 1):
            boxes = [at["box"] for at in self.layout if at["image"] == image and at["box"] is not None]
            whole = self.whole[image] if image < len(self.whole) else None
            reach = [max(box[side] for box in boxes) for side in (2, 3)] if boxes else None
            found.append(reach if whole is None or reach is None else list(whole))
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


def _whole_sizes(prompts: Prompts) -> tuple[tuple[float, float] | None, ...]:
    sizes = {tuple(None if one is None else one.size for one in several) for several in prompts.thumbnails or ()}
    return next(iter(sizes)) if len(sizes) == 1 else ()


def patch_positions(prompts: Prompts) -> dict[str, Int[Tensor, "prompt"]]:
    """The patches as named positions; none for prompts without pictures, or with pictures that are not cut alike."""
    try:
        return Patches.of(prompts).named()
    except ValueError:
        return {}


T = TypeVar("T", bound=Callable[..., Any])


def takes_patches(technique: T) -> T:
    """A technique whose `over` (of path patching: `senders`) may have `"patch"` among its dims, where it knows `"position"`: one
    patch of a picture, wherever it stands in each prompt."""
    signature = inspect.signature(technique)
    prompts = list(signature.parameters)[1]
    argument = "over" if "over" in signature.parameters else "senders"

    @functools.wraps(technique)
    def door(*args: Any, **options: Any) -> Any:
        try:
            bound = signature.bind(*args, **options)
        except TypeError:
            return technique(*args, **options)  # which says what is wrong
        bound.apply_defaults()
        given, over = bound.arguments, bound.arguments[argument]
        if not isinstance(over, str) or "patch" not in over.split():
            return technique(*args, **options)
        if {"pos", "position", "src"} & set(over.split()):
            raise ValueError(f"{argument}: expected one of 'pos', 'position' and 'patch' at most; got {over!r}")
        given[prompts], patches = _with_places(given[prompts], argument)
        given[argument] = " ".join("position" if dim == "patch" else dim for dim in over.split())
        if given.get("cells") is None:
            given["positions"] = list(patches.labels if given["positions"] is None else given["positions"])
        try:
            found = technique(*bound.args, **bound.kwargs)
        except ValueError as error:
            if repr(given[argument]) in str(error):  # in the user's words
                raise ValueError(str(error).replace(repr(given[argument]), repr(over))) from None
            raise
        if isinstance(found, list):
            return [renamed(one, over, patches) for one in found]
        if not isinstance(found, Result):  # the top tokens of a lens
            return replace(found, probs=renamed(found.probs, over, patches))
        return renamed(found, over, patches, argument)

    return door  # type: ignore[return-value]


def _with_places(prompts: Any, argument: str) -> tuple[Any, Patches]:
    """The prompts with their patches as named positions."""
    if isinstance(prompts, PromptPairs):
        patches = Patches.of(prompts.clean, argument)
        return replace(prompts, positions=patches.named()), patches
    if not isinstance(prompts, Prompts):
        raise ValueError(
            f"{argument}: 'patch' needs prompts with pictures (Prompts.from_inputs, Prompts.from_processor), got "
            f"{type(prompts).__name__}; use 'pos' for text"
        )
    patches = Patches.of(prompts, argument)
    return PlacedPrompts.of(prompts, patches.named()), patches


def renamed(result: Result, over: str, patches: Patches, argument: str = "over") -> Result:
    """A result over named positions as one over patches."""
    dims = tuple("patch" if dim == "position" else dim for dim in result.dims)
    coords = {"patch" if dim == "position" else dim: labels for dim, labels in result.coords.items()}
    layout = dict(zip(patches.labels, patches.layout, strict=True))
    chosen = [layout[str(label)] for label in coords.get("patch", ())]
    provenance = {**result.provenance, argument: over, "patches": chosen, "picture_sizes": patches.sizes()}
    return replace(result, dims=dims, coords=coords, provenance=provenance)
