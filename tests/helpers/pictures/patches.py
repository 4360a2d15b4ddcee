"""Made-up results for `mechkit.plot.patches`, pictures to lay them over, and what it draws of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from helpers.pictures.bars import HOSTILE
from mechkit.plot._figure import Figure
from mechkit.plot._patches import patches
from mechkit.result import Result

Place = dict[str, Any]
PROVENANCE = {
    "model": "tiny-vlm",
    "task": "what is it",
    "n_prompts": 4,
    "technique": "image_patching",
    "site": "resid_pre",
    "direction": "denoise",
}


def grid(
    rows: int,
    columns: int,
    size: tuple[float, float] | None = None,
    *,
    at: tuple[float, float] = (0.0, 0.0),
    tile: int | None = None,
    image: int = 0,
) -> list[Place]:
    """The patches of one rectangle, `size` its width and height in pixels (`None`: not known), its upper left corner `at`."""
    found = []
    for row in range(rows):
        for column in range(columns):
            box = None
            if size is not None:
                width, height = size[0] / columns, size[1] / rows
                box = [
                    at[0] + column * width,
                    at[1] + row * height,
                    at[0] + (column + 1) * width,
                    at[1] + (row + 1) * height,
                ]
            found.append({"image": image, "tile": tile, "row": row, "column": column, "box": box})
    return found


def labels_of(places: Sequence[Place]) -> tuple[str, ...]:
    """As `image_patching` names them."""
    images, tiles = ({place[name] for place in places} for name in ("image", "tile"))
    found = []
    for place in places:
        image = f"image {place['image']} " if len(images) > 1 else ""
        tile = ("whole " if place["tile"] is None else f"tile {place['tile']} ") if len(tiles) > 1 else ""
        found.append(f"{image}{tile}r{place['row']}c{place['column']}")
    return tuple(found)


def made_up(
    places: Sequence[Place], layers: int | None = 6, n: int | None = None, seed: int = 0, **changes: Any
) -> Result:
    """A result of these patches, a few of them large and more so in early layers; the object is in the middle of the picture."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (max(place[name] for place in places) + 1 for name in ("row", "column"))
    y, x = (
        torch.tensor([(place[name] + 0.5) / most for place in places])
        for name, most in (("row", rows), ("column", columns))
    )
    there = torch.exp(-((y - 0.62) ** 2 + (x - 0.55) ** 2) / 0.03) * 3 - torch.exp(
        -((y - 0.2) ** 2 + (x - 0.2) ** 2) / 0.02
    )
    shape = [layers or 1, len(places), n or 1]
    fall = torch.linspace(1, 0.1, shape[0])[:, None, None]
    values = there[None, :, None] * fall + 0.15 * torch.randn(shape, generator=generator) - 3.25
    dims, coords = ["layer", "patch", "prompt"], {"layer": tuple(range(shape[0])), "patch": labels_of(places)}
    if layers is None:
        values, dims = values[0], dims[1:]
    values, dims = (values[..., 0], dims[:-1]) if n is None else (values, dims)
    coords = {dim: coords.get(dim, tuple(range(n or 1))) for dim in dims}
    fields = {
        "values": values,
        "dims": tuple(dims),
        "coords": coords,
        "baseline": {"clean": torch.tensor(0.5), "corrupted": torch.tensor(-3.25)},
        "base": "corrupted",
        "metric": "logit_diff",
        "unit": "logits",
        "provenance": {**PROVENANCE, "patches": list(places)},
    }
    return Result(**(fields | changes))


def scene(width: int, height: int) -> np.ndarray:
    """A picture with a sun at the upper left, hills and a red house right of the middle: bytes `[row column 3]`."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    y, x = y / height, x / width
    picture = np.stack([0.45 + 0.4 * y, 0.65 + 0.25 * y, 0.95 - 0.1 * y], -1)
    hills = y > 0.6 + 0.08 * np.sin(9 * x)
    picture[hills] = np.stack([0.25 + 0.2 * x, 0.5 + 0.1 * np.sin(40 * y) ** 2, 0.2 + 0 * x], -1)[hills]
    picture[(x - 0.2) ** 2 + (y - 0.2) ** 2 * (height / width) ** 2 < 0.008] = (1.0, 0.9, 0.3)
    picture[(abs(x - 0.55) < 0.12) & (abs(y - 0.66) < 0.12)] = (0.75, 0.2, 0.15)
    picture[(y < 0.54) & (y > 0.4) & (abs(x - 0.55) < (y - 0.4))] = (0.35, 0.15, 0.1)
    picture[(abs(x - 0.55) < 0.03) & (abs(y - 0.72) < 0.06)] = (0.15, 0.1, 0.1)
    return (picture.clip(0, 1) * 255).astype(np.uint8)


def tiled() -> list[Place]:
    """A view of the whole picture and its 2 × 3 tiles."""
    places = grid(4, 6, (480, 320))
    for tile in range(6):
        places += grid(4, 4, (160, 160), at=(160.0 * (tile % 3), 160.0 * (tile // 3)), tile=tile)
    return places


def examples() -> dict[str, Figure]:
    two = grid(6, 6, (240, 240)) + grid(4, 8, (320, 160), image=1)
    hostile = made_up(grid(1, len(HOSTILE), (10.0 * len(HOSTILE), 10)), 2, metric="<i>a</i>", unit="$b$")
    return {
        "layers": patches(made_up(grid(8, 12, (480, 320)), 12, 3), scene(480, 320)),
        "one layer, dark": patches(made_up(grid(14, 14, (224, 224)), None), scene(224, 224), theme="dark"),
        "smooth": patches(made_up(grid(8, 8, (224, 224)), 3), scene(448, 448), smooth=True, beside=True),
        "tiles": patches(made_up(tiled(), 4), scene(960, 640), layers=[0, 3]),
        "two pictures": patches(made_up(two, 2), [scene(240, 240), scene(320, 160)]),
        "no picture": patches(made_up(grid(6, 9, (270, 180)), 3)),
        "hostile": patches(hostile, title="<script>alert(1)</script>"),
    }
