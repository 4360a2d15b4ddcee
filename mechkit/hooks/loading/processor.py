"""From text and pictures to a model's inputs, by the processor of transformers that the model came with.

A whole processor is called as it is. Where it cannot be made (it asks for a video part, which needs torchvision), the image
processor alone will do: each placeholder in the text is then repeated here, once for each patch of its picture.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mechkit._check import shown
from mechkit.hooks.loading.pictures import arguments_of
from mechkit.prompts import Box, Segment

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel

Picture = Any  # a PIL image, an array [row, column, colour] of bytes, or a path
MOST_PIXELS = 2**27  # of a file: some 11,000 x 11,000; what is larger is taken for a decompression bomb


def processed(
    model: HookedModel, processor: Any, text: str, pictures: Sequence[Picture], what: str
) -> tuple[Tensor, dict[str, Tensor], list[Any]]:
    """Token ids, inputs, and the pictures as PIL images, of one prompt."""
    if not callable(processor):
        raise TypeError(
            f"processor: expected a processor or an image processor of transformers, got {shown(processor)}"
        )
    images = [as_image(one, f"{what}[{j}]") for j, one in enumerate(pictures)]
    if getattr(processor, "tokenizer", None) is not None:
        found = dict(_called(processor, what, text=[text], images=images or None))
        tokens = found.pop("input_ids")[0]
        found.pop("attention_mask", None)
    else:
        found = dict(_called(processor, what, images=images)) if images else {}
        tokens = model.to_tokens(text)[0].cpu() if text else None
    takes = arguments_of(model.bridge.original_model)
    inputs = {name: torch.as_tensor(value) for name, value in found.items() if name in takes and value is not None}
    if tokens is None:
        tokens = model.placeholders(inputs)
    elif getattr(processor, "tokenizer", None) is None and images:
        tokens = _repeated(model, tokens, inputs, len(images), what)
    return tokens, inputs, images


def _called(processor: Any, what: str, **given: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return processor(**{name: one for name, one in given.items() if one is not None}, return_tensors="pt")
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{what}: {type(processor).__name__} refuses it: {type(error).__name__}: {reason}") from error


def as_image(picture: Picture, what: str) -> Any:
    """A PIL image in colour.

    Raises:
        ValueError: no picture, a file that is none, or one of very many pixels (a decompression bomb).
    """
    try:
        from PIL import Image
    except ImportError:
        raise ValueError("images: pictures need Pillow: pip install mechkit[vision]") from None
    if isinstance(picture, str | Path):
        path = Path(picture)
        if not path.is_file():
            raise ValueError(f"{what}: expected a picture, or the path of one; there is no file {str(picture)[:200]!r}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as opened:
                    _check_size(opened.size, what)
                    return opened.convert("RGB")
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{what}: too many pixels for a picture ({str(error).split(',')[0]}); make it smaller"
            ) from None
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"{what}: expected a picture, got a file that is none: {type(error).__name__}") from None
    if isinstance(picture, Image.Image):
        _check_size(picture.size, what)
        return picture.convert("RGB")
    array = picture.detach().cpu().numpy() if isinstance(picture, Tensor) else picture
    if not isinstance(array, np.ndarray):
        raise ValueError(
            f"{what}: expected a PIL image, an array [row, column, colour], or a path; got {shown(picture)}"
        )
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ValueError(f"{what}: expected bytes [row, column, 3 colours], got {array.dtype} {list(array.shape)}")
    _check_size(array.shape[1::-1], what)
    return Image.fromarray(array)


def _check_size(size: Sequence[int], what: str) -> None:
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(f"{what}: too many pixels for a picture ({size[0]} x {size[1]}); make it smaller")


_PLACEHOLDERS_ALONE = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl")


def _repeated(model: HookedModel, tokens: Tensor, inputs: dict[str, Tensor], n: int, what: str) -> Tensor:
    """Each placeholder as often as its picture has patches."""
    if model._model_type not in _PLACEHOLDERS_ALONE:
        raise ValueError(
            f"processor: expected the whole processor of {model.name} (a {model._model_type!r}), which puts more into the text "
            f"than placeholders; an image processor alone does for {', '.join(_PLACEHOLDERS_ALONE)}"
        )
    at = model.placeholder_mask(tokens).nonzero()[:, 0].tolist()
    if len(at) != n:
        raise ValueError(
            f"{what}: expected one placeholder ({model.image_token_id}) in the text for each of {n} pictures, got {len(at)}"
        )
    counts = dict.fromkeys(range(n), 0)
    for piece in model._pieces(inputs, what):
        counts[piece.image] += piece.n
    parts, done = [], 0
    for place, count in zip(at, counts.values(), strict=True):
        parts += [tokens[done:place], tokens[place : place + 1].repeat(count)]
        done = place + 1
    return torch.cat([*parts, tokens[done:]])


def on_the_picture(
    model: HookedModel,
    processor: Any,
    inputs: dict[str, Tensor],
    tokens: Tensor,
    segments: Sequence[Segment],
    sizes: Sequence[tuple[int, int]],
) -> list[Segment]:
    """The segments with their boxes in pixels of the picture that was given."""
    image_processor = getattr(processor, "image_processor", processor)
    layout = _tile_layout(model, tokens, segments)
    if model._model_type in _TILES_THEN_WHOLE:
        return _tiles_then_whole(segments, layout, sizes)
    placed = []
    for segment in segments:
        if segment.kind == "image" and segment.image < len(sizes) and segment.box is not None:
            seen = _seen(image_processor, inputs, segment.image, *sizes[segment.image])
            segment = replace(segment, box=_moved(segment.box, *seen))
        placed.append(segment)
    return placed


_TILES_THEN_WHOLE = ("idefics3",)


def _tiles_then_whole(
    segments: Sequence[Segment], layout: dict[int, tuple[int, int]], sizes: Sequence[tuple[int, int]]
) -> list[Segment]:
    """Each picture's tiles, in their rows and columns, and then the whole of it (or that alone)."""
    views = [i for i, segment in enumerate(segments) if segment.kind == "image"]
    groups: list[list[int]] = [[]]
    for i in views:
        groups[-1].append(i)
        if i not in layout:
            groups.append([])
    placed = list(segments)
    for image, group in enumerate(group for group in groups if group):
        if image >= len(sizes):
            break
        height, width = sizes[image]
        rows, columns = (1 + max((layout[i][axis] for i in group if i in layout), default=0) for axis in (0, 1))
        for tile, i in enumerate(group):
            if i not in layout:
                placed[i] = replace(segments[i], image=image, tile=None, box=(0.0, 0.0, width, height))
                continue
            row, column = layout[i]
            left, top = column * width / columns, row * height / rows
            box = (left, top, left + width / columns, top + height / rows)
            placed[i] = replace(segments[i], image=image, tile=tile, box=box)
    return placed


def _seen(
    image_processor: Any, inputs: dict[str, Tensor], image: int, height: int, width: int
) -> tuple[Box, tuple[float, float]]:
    """The part of the picture that the model sees, and the size `(height, width)` in which boxes count it."""
    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs:
        size = image_processor.patch_size
        _, rows, columns = inputs["image_grid_thw"][image].tolist()
        return (0.0, 0.0, width, height), (rows * size, columns * size)
    if "image_sizes" in inputs and pixels.ndim == 5:  # boxes are in pixels of the picture already
        rows, columns = inputs["image_sizes"][image].tolist()
        return (0.0, 0.0, width, height), (rows, columns)
    there = float(pixels.shape[-2]), float(pixels.shape[-1])
    edge = _shortest_edge(image_processor)
    if not getattr(image_processor, "do_center_crop", False) or edge is None:
        return (0.0, 0.0, width, height), there
    # The shorter edge is scaled to `edge`, and the middle is cut out.
    scale = edge / min(height, width) if getattr(image_processor, "do_resize", True) else 1.0
    shown_height, shown_width = there[0] / scale, there[1] / scale
    left, top = (width - shown_width) / 2, (height - shown_height) / 2
    return (left, top, left + shown_width, top + shown_height), there


def _shortest_edge(image_processor: Any) -> float | None:
    size: Any = getattr(image_processor, "size", None)
    found = size.get("shortest_edge") if hasattr(size, "get") else getattr(size, "shortest_edge", None)
    return None if found is None else float(found)


def _moved(box: Box, to: Box, size: tuple[float, float]) -> Box:
    """A box in a picture of `size` (height, width) as one in the part `to` of another."""
    across, down = (to[2] - to[0]) / size[1], (to[3] - to[1]) / size[0]
    return to[0] + box[0] * across, to[1] + box[1] * down, to[0] + box[2] * across, to[1] + box[3] * down


def _tile_layout(model: HookedModel, tokens: Tensor, segments: Sequence[Segment]) -> dict[int, tuple[int, int]]:
    """Idefics3 and SmolVLM: in which row and column of tiles a tile stands, from the tokens in front of it (`<row_1_col_2>`)."""
    if model.tokenizer is None or model._model_type not in _TILES_THEN_WHOLE:
        return {}
    found: dict[int, tuple[int, int]] = {}
    for i, segment in enumerate(segments):
        if segment.kind == "image" and segment.start:
            before = "".join(model.to_str_tokens(tokens[max(0, segment.start - 3) : segment.start]))
            if (match := re.search(r"row_(\d+)_col_(\d+)\D*$", before)) is not None:
                found[i] = int(match[1]) - 1, int(match[2]) - 1
    return found
