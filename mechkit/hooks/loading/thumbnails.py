"""Small copies of pictures, for figures: of a picture that a processor was given, or of the pixels that a model takes.

A model's pixels are scaled by its processor, which is not at hand where prompts are made of tensors. Numbers within 0..1 stay as
they are, those within -1..1 with 0 as the middle grey (SigLIP's and ViT's), all others are stretched from the least to the
largest: colours are then about right, and shapes are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from mechkit._thumbnails import LONGEST, Thumbnail
from mechkit.hooks.loading.pictures import PIXELS
from mechkit.hooks.loading.pixels import to_pixels
from mechkit.prompts import Segment

Inputs = Mapping[str, Tensor]
_TILED = ("llava_next", "llava_onevision")  # the first view of each picture is the whole of it, squeezed into a square
_WHOLE_LAST = ("idefics3",)


def of_image(image: Any) -> Thumbnail:
    """Of a PIL image in colour."""
    import numpy as np

    small = image.copy()
    small.thumbnail((LONGEST, LONGEST))
    return Thumbnail(torch.from_numpy(np.array(small)), (float(image.width), float(image.height)))


def of_inputs(config: Any, inputs: Inputs, segments: Sequence[Segment]) -> tuple[Thumbnail | None, ...]:
    """Of a prompt's pixels, by the number of the picture; `None` for one of which no whole view is known."""
    n = 1 + max((segment.image for segment in segments if segment.kind == "image"), default=-1)
    if PIXELS not in inputs or not n:
        return ()
    views = _whole_views(config, inputs, n)
    found: list[Thumbnail | None] = []
    for image in range(n):
        size = _size([segment for segment in segments if segment.kind == "image" and segment.image == image])
        view = views[image] if image < len(views) else None
        if view is None or view.ndim != 3 or view.shape[0] not in (1, 3):
            found.append(None)
        else:
            width, height = size or (float(view.shape[2]), float(view.shape[1]))
            found.append(Thumbnail(_bytes(_shrunk(view.detach().cpu().float(), width / height)), (width, height)))
    return tuple(found)


def _whole_views(config: Any, inputs: Inputs, n: int) -> list[Tensor | None]:
    """Each picture as `[channel row column]`."""
    kind, pixels = getattr(config, "model_type", ""), inputs[PIXELS]
    if kind in _TILED and pixels.ndim == 5:
        return [views[0] for views in pixels]
    if kind in _WHOLE_LAST and pixels.ndim == 5:
        there = [tile for tile in pixels.flatten(0, 1) if bool((tile != 0).any())]
        return [there[-1]] if n == 1 and there else [None] * n  # of several, no one says which tile is whose
    if pixels.ndim == 4 or (pixels.ndim == 2 and "image_grid_thw" in inputs):
        views = to_pixels(config, inputs)
        if kind == "llava" and "image_sizes" in inputs:  # Pixtral's tower: padded to one size
            sizes = inputs["image_sizes"].tolist()
            return [view[:, :rows, :columns] for view, (rows, columns) in zip(views, sizes, strict=False)]
        return list(views)
    return [None] * n


def _size(segments: Sequence[Segment]) -> tuple[float, float] | None:
    """Width and height as far as patches reach, in their boxes' pixels."""
    boxes = [segment.box for segment in segments if segment.box is not None]
    return (max(box[2] for box in boxes), max(box[3] for box in boxes)) if boxes else None


def _shrunk(view: Float[Tensor, "channel _ _"], proportions: float) -> Float[Tensor, "channel _ _"]:
    """A view in its picture's proportions (width by height), and no larger than a thumbnail."""
    side = min(LONGEST, max(view.shape[1:]))
    columns, rows = (side, side / proportions) if proportions >= 1 else (side * proportions, side)
    size = max(1, round(rows)), max(1, round(columns))
    return view if size == tuple(view.shape[1:]) else interpolate(view[None], size, mode="area")[0]


def _bytes(view: Float[Tensor, "channel row column"]) -> UInt8[Tensor, "row column 3"]:
    low, high = float(view.min()), float(view.max())
    if low < 0 and low >= -1 and high <= 1:
        low, high = -1.0, 1.0
    elif low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = (view - low) / (high - low) if high > low else torch.full_like(view, 0.5)
    return (scaled * 255).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).contiguous()
