"""How vision-language models cut pictures into patches: which patch stands where among a prompt's placeholder tokens.

A family's function gives, for the inputs of one prompt, its pieces in the order in which the model puts them in the place of the
placeholders: rectangles of patches, and single vectors that only mark a place (the end of a row). Read from transformers' models;
`Prompts.from_inputs` holds the number of positions against the prompt's placeholders, and each model against its own features.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mechkit.prompts import Box

Inputs = Mapping[str, Tensor]
PIXELS = "pixel_values"


@dataclass(frozen=True)
class Piece:
    """Consecutive positions that show one rectangle of a picture; without a grid they show none.

    Attributes:
        n: How many positions.
        grid: `(rows, columns)`.
        tile: Which tile of the picture; `None` for a view of the whole picture.
        box: What it covers, in pixels of the picture.
        image: Which picture.
    """

    n: int
    grid: tuple[int, int] | None = None
    tile: int | None = None
    box: Box | None = None
    image: int = 0


@dataclass(frozen=True)
class Family:
    """What a family's models take.

    Attributes:
        pieces: From the configuration and one prompt's inputs to its pieces.
        axes: The axes of `pixel_values`, for errors.
        needs: Other inputs that must come with the pixels.
    """

    pieces: Callable[[Any, Inputs], Iterator[Piece]]
    axes: str
    needs: tuple[str, ...] = ()


def rectangle(rows: int, columns: int, box: Box | None, tile: int | None = None, image: int = 0) -> Piece:
    return Piece(rows * columns, (rows, columns), tile, box, image)


def _whole(height: int, width: int) -> Box:
    return 0.0, 0.0, float(width), float(height)


def _llava(config: Any, inputs: Inputs) -> Iterator[Piece]:
    pixels, vision = inputs[PIXELS], config.vision_config
    for image, picture in enumerate(pixels):
        height, width = picture.shape[-2:]
        if "image_sizes" in inputs:  # Pixtral's tower: pictures of their own sizes, padded to one
            height, width = inputs["image_sizes"][image].tolist()
        if config.vision_feature_select_strategy == "full" and "clip" in vision.model_type:
            yield Piece(1, image=image)  # the tower's class token
        yield rectangle(height // vision.patch_size, width // vision.patch_size, _whole(height, width), image=image)


def _square(side: Callable[[Any], int]) -> Callable[[Any, Inputs], Iterator[Piece]]:
    """Each picture as one square of patches."""

    def pieces(config: Any, inputs: Inputs) -> Iterator[Piece]:
        n = side(config)
        for image, picture in enumerate(inputs[PIXELS]):
            yield rectangle(n, n, _whole(*picture.shape[-2:]), image=image)

    return pieces


def _any_resolution(limited: bool) -> Callable[[Any, Inputs], Iterator[Piece]]:
    """LLaVA-Next and OneVision: a view of the whole picture, then its tiles joined to one large grid without their padding, each
    row of it with an end. OneVision joins patches where there would be too many (`limited`)."""

    def pieces(config: Any, inputs: Inputs) -> Iterator[Piece]:
        vision, pixels = config.vision_config, inputs[PIXELS]
        side = vision.image_size // vision.patch_size
        for image, tiles in enumerate(pixels):
            height, width = inputs["image_sizes"][image].tolist()
            yield rectangle(side, side, _whole(height, width), image=image)
            n_tiles = _tiles(config, (height, width))
            if len(tiles) == 1 or n_tiles is None:
                yield Piece(1, image=image)
                continue
            rows, columns = _without_padding(side * n_tiles[0], side * n_tiles[1], height, width)
            if limited:
                most = int(str(getattr(config, "vision_aspect_ratio", "anyres_max_9")).removeprefix("anyres_max_"))
                ratio = math.sqrt(rows * columns / (most * side**2))
                if ratio > 1.1:
                    rows, columns = int(rows // ratio), int(columns // ratio)
            for row in range(rows):
                box = (0.0, row * height / rows, float(width), (row + 1) * height / rows)
                yield rectangle(1, columns, box, tile=0, image=image)
                yield Piece(1, image=image)

    return pieces


def _tiles(config: Any, size: tuple[int, int]) -> tuple[int, int] | None:
    """How many tiles a picture of this size is cut into, down and across: those of the resolution that loses least of it."""
    height, width = size
    best, found = (-1, math.inf), None
    for resolution in config.image_grid_pinpoints or ():
        down, across = resolution
        scale = min(across / width, down / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        wasted = down * across - used
        if used > best[0] or (used == best[0] and wasted < best[1]):
            best, found = (used, wasted), (down, across)
    side = config.vision_config.image_size
    return None if found is None else (found[0] // side, found[1] // side)


def tiles_of(config: Any, size: Sequence[int]) -> int:
    """How many views a picture of this size has where it is cut into tiles: these and the whole."""
    tiles = _tiles(config, (size[0], size[1])) if getattr(config, "image_grid_pinpoints", None) else None
    return 1 if tiles is None else 1 + tiles[0] * tiles[1]


def _without_padding(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    if width / height > columns / rows:
        return rows - 2 * ((rows - int(round(height * columns / width, 7))) // 2), columns
    return rows, columns - 2 * ((columns - int(round(width * rows / height, 7))) // 2)


def _idefics3(config: Any, inputs: Inputs) -> Iterator[Piece]:
    """Tiles of one size; with several, the last is the whole picture. Pictures of zeros alone are padding."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size // config.scale_factor
    tiles = [tile for tile in inputs[PIXELS].flatten(0, 1) if bool((tile != 0).any())]
    for i, tile in enumerate(tiles):
        whole = i == len(tiles) - 1
        yield rectangle(side, side, _whole(*tile.shape[-2:]) if whole else None, None if whole else i)


def _qwen(config: Any, inputs: Inputs) -> Iterator[Piece]:
    vision = config.vision_config
    for image, (frames, rows, columns) in enumerate(inputs["image_grid_thw"].tolist()):
        box, merged = _whole(rows * vision.patch_size, columns * vision.patch_size), vision.spatial_merge_size
        for _ in range(frames):
            yield rectangle(rows // merged, columns // merged, box, image=image)


def _vit(config: Any, inputs: Inputs) -> Iterator[Piece]:
    height, width = inputs[PIXELS].shape[-2:]
    size = config.patch_size
    down, across = size if isinstance(size, list | tuple) else (size, size)
    yield Piece(2 if config.model_type == "deit" else 1)  # the class token, and DeiT's second one
    yield rectangle(height // down, width // across, _whole(height, width))


def arguments_of(hf_model: Any) -> set[str]:
    """What a model's forward pass takes."""
    return set(inspect.signature(inspect.unwrap(type(hf_model).forward)).parameters)


def kinds_of_tokens(hf_model: Any, patches: Bool[Tensor, "*row pos"]) -> dict[str, Tensor]:
    """The inputs by which some families are told which tokens are `patches`: masks and positions depend on it."""
    takes, kind = arguments_of(hf_model), getattr(hf_model.config, "model_type", "")
    names = [
        name for name, of in (("mm_token_type_ids", kind), ("token_type_ids", "gemma3")) if name in takes and kind == of
    ]
    return {name: patches.long() for name in names}


def dummy_pictures(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """The inputs of one prompt with one small picture of noise."""
    kind, vision = config.model_type, getattr(config, "vision_config", config)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if "qwen" in kind:
        rows = columns = 2 * vision.spatial_merge_size
        numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {PIXELS: noise(rows * columns, numbers), "image_grid_thw": torch.tensor([[1, rows, columns]])}
    size = vision.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    if kind in ("llava_next", "llava_onevision"):
        tiles = _tiles(config, (height, width)) or (0, 0)
        sizes = torch.tensor([[height, width]])
        return {PIXELS: noise(1, 1 + tiles[0] * tiles[1], channels, height, width), "image_sizes": sizes}
    if kind in ("idefics3", "smolvlm"):
        return {PIXELS: noise(1, 1, channels, height, width)}
    if "pixtral" in str(getattr(vision, "model_type", "")):
        return {PIXELS: noise(1, channels, height, width), "image_sizes": torch.tensor([[height, width]])}
    return {PIXELS: noise(1, channels, height, width)}


_OF_ONE = "[picture, channel, row, column]"
_OF_TILES = "[picture, tile, channel, row, column]"
FAMILIES: dict[str, Family] = {
    "llava": Family(_llava, _OF_ONE),
    "llava_next": Family(_any_resolution(limited=False), _OF_TILES, ("image_sizes",)),
    "llava_onevision": Family(_any_resolution(limited=True), _OF_TILES, ("image_sizes",)),
    "gemma3": Family(_square(lambda config: math.isqrt(config.mm_tokens_per_image)), _OF_ONE),
    "idefics3": Family(_idefics3, "[1, tile, channel, row, column]"),
    "qwen2_5_vl": Family(_qwen, "[patch, number]", ("image_grid_thw",)),
    "qwen3_vl": Family(_qwen, "[patch, number]", ("image_grid_thw",)),
    "vit": Family(_vit, "[1, channel, row, column]"),
    "deit": Family(_vit, "[1, channel, row, column]"),
}
