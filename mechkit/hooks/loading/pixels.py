"""Pixels in the form in which a model takes them, as pictures `[channel, row, column]` and back.

Most models take pictures, or tiles of them, as they are. Qwen's take a list of patches, each flattened, in the order in which
neighbours are merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechkit.hooks.loading.pictures import PIXELS

Inputs = Mapping[str, Tensor]


def to_pixels(config: Any, inputs: Inputs) -> list[Tensor]:
    """One prompt's pictures, or tiles: each `[channel, row, column]`, scaled as the model takes them."""
    pixels = inputs[PIXELS]
    if pixels.ndim > 2:
        return list(pixels.reshape(-1, *pixels.shape[-3:]))
    pictures, done = [], 0
    for grid in inputs["image_grid_thw"].tolist():
        frames, rows, columns = grid
        n = frames * rows * columns
        pictures.append(_unflattened(config.vision_config, pixels[done : done + n], grid))
        done += n
    return pictures


def from_pixels(config: Any, pictures: Sequence[Tensor], like: Inputs) -> Tensor:
    """The inverse: what a model takes as its pixels, in the form of `like`."""
    if like[PIXELS].ndim > 2:
        return torch.stack(list(pictures)).reshape(like[PIXELS].shape)
    grids = like["image_grid_thw"].tolist()
    return torch.cat([_flattened(config.vision_config, one, grid) for one, grid in zip(pictures, grids, strict=True)])


def _unflattened(vision: Any, patches: Tensor, grid: Sequence[int]) -> Tensor:
    """A picture of the first frame of each patch (a still picture's frames are equal)."""
    frames, rows, columns = grid
    merge, size = vision.spatial_merge_size, vision.patch_size
    split = patches.reshape(frames, rows // merge, columns // merge, merge, merge, vision.in_channels, -1, size, size)
    picture = split[0].permute(4, 5, 0, 2, 6, 1, 3, 7)  # channel frame row-of-blocks row y column-of-blocks column x
    return picture.reshape(vision.in_channels, -1, rows * size, columns * size)[:, 0]


def _flattened(vision: Any, picture: Tensor, grid: Sequence[int]) -> Tensor:
    frames, rows, columns = grid
    merge, size, times = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
    split = picture.reshape(vision.in_channels, rows // merge, merge, size, columns // merge, merge, size)
    one = split.permute(1, 4, 2, 5, 0, 3, 6)[..., None, :, :].expand(*[-1] * 5, times, -1, -1)
    return one.reshape(rows * columns, -1).repeat(frames, 1)


def sum_over_frames(config: Any, gradients: Tensor, like: Inputs) -> list[Tensor]:
    """Numbers of each input pixel as pictures; those of several frames of one picture are summed."""
    if gradients.ndim > 2:
        return to_pixels(config, {**like, PIXELS: gradients})
    vision, pictures, done = config.vision_config, [], 0
    for frames, rows, columns in like["image_grid_thw"].tolist():
        n = frames * rows * columns
        part = gradients[done : done + n].reshape(frames, rows * columns, vision.in_channels, -1, vision.patch_size**2)
        summed = part.sum((0, 3), keepdim=True).expand(1, -1, -1, part.shape[3], -1).reshape(rows * columns, -1)
        pictures.append(_unflattened(vision, summed, (1, rows, columns)))
        done += n
    return pictures


def blurred(picture: Tensor, sigma: float) -> Tensor:
    """A picture `[channel, row, column]` behind a Gaussian filter; its edges are continued."""
    reach = max(1, round(3 * sigma))
    at = torch.arange(-reach, reach + 1, dtype=picture.dtype)
    weights = torch.exp(-(at**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    for axis in (1, 2):
        n = picture.shape[axis]
        index = torch.arange(-reach, n + reach).clamp(0, n - 1)
        windows = picture.index_select(axis, index).unfold(axis, 2 * reach + 1, 1)
        picture = (windows * weights).sum(-1)
    return picture
