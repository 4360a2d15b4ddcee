"""Where the patches of a result lie: on which picture, in which tile of it, and on which of its pixels.

1. `places_of` finds each label's place in `provenance["patches"]`, also where only some labels are left of it.
2. A picture's whole view is drawn by itself, and its tiles together where it is known which part of the picture each shows. Tiles
   of unknown place are drawn one by one. Each of these is a `View`.
3. `View.raster` fills a grid with the patches' values: each patch its own rectangle, whatever else is next to it. Smoothed
   values go from patch to patch within a tile, never over its edge: they are the patch's own in its middle, and lie between its
   neighbours' elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mechkit._thumbnails import patch_labels, patches_in
from mechkit.plot._labels import position_of
from mechkit.plot._text import number
from mechkit.result import Label, Result

Box = tuple[float, float, float, float]  # left, top, right, bottom
_LABEL = re.compile(r"(?:image (\d+) )?(whole |tile (\d+) )?r(\d+)c(\d+)(?:-r\d+c\d+)?")
_DIGITS = 6  # of an edge's place in pixels: what differs by less is one edge


@dataclass(frozen=True)
class Patch:
    """Where a patch lies.

    Attributes:
        image: Which picture.
        tile: Which tile of it; `None` in a view of the whole picture.
        row, column: In the grid of its tile.
        box: In pixels of the picture, or `None` where that is not known.
    """

    image: int
    tile: int | None
    row: int
    column: int
    box: Box | None

    @property
    def pixels(self) -> str:
        """`'pixels 8–16 across, 0–8 down'`; empty where they are not known."""
        if self.box is None:
            return ""
        left, top, right, bottom = (number(round(side, 1), 6) for side in self.box)
        return f"pixels {left}–{right} across, {top}–{bottom} down"


def at_patches(result: Result) -> tuple[Result, Result | None]:
    """A result over positions as one over patches, and what of it is of no patch; one that has patches as it is.

    It stays as it is too where nothing says which position is which patch, the same in all prompts.
    """
    if "patch" in result.dims or "pos" not in result.dims or result.pictures is None:
        return result, None
    where = {position: at for at, position in patches_in(result.pictures.one.segments[0])}
    labels = result.coords["pos"]
    inside = [label for label in labels if position_of(label) in where]
    if not inside:
        return result, None
    chosen, beyond = (result.sel(pos=[one for one in labels if (one in inside) == which]) for which in (True, False))
    layout = [where[position_of(label)] for label in inside]  # type: ignore[index]
    coords = {"patch" if dim == "pos" else dim: of for dim, of in chosen.coords.items()}
    return (
        replace(
            chosen,
            dims=tuple("patch" if dim == "pos" else dim for dim in chosen.dims),
            coords=coords | {"patch": patch_labels(layout)},
            provenance={**chosen.provenance, "patches": layout},
        ),
        beyond,
    )


def places_of(result: Result) -> tuple[Patch, ...] | None:
    """The place of each label of the dim `"patch"`; `None` where the result does not say."""
    known = known_of(result)
    labels = result.coords.get("patch", ())
    if not known or not labels:
        return None
    size = result.provenance.get("group", 1)
    found = [_find(label, known, size if isinstance(size, int) and size > 0 else 1) for label in labels]
    if all(found):
        return tuple(one for one in found if one is not None)
    return tuple(known) if len(known) == len(labels) else None


def known_of(result: Result) -> list[Patch]:
    """All patches that the provenance lists, those that `sel` has left out too; none if it lists none that can be read."""
    listed = result.provenance.get("patches")
    found = []
    for at in listed if isinstance(listed, list | tuple) else ():
        try:
            box = None if at["box"] is None else tuple(float(side) for side in at["box"])
            tile = None if at["tile"] is None else int(at["tile"])
            one = Patch(int(at["image"]), tile, int(at["row"]), int(at["column"]), box)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError):
            return []
        if box is not None and not (len(box) == 4 and box[0] < box[2] and box[1] < box[3]):
            return []
        found.append(one)
    return found


def _find(label: Label, known: Sequence[Patch], size: int) -> Patch | None:
    """The one patch of a label, which need not name picture and tile where there is but one."""
    match = _LABEL.fullmatch(str(label))
    if match is None:
        return None
    image, view, tile, row, column = match.groups()
    fits = [
        one
        for one in known
        if (one.row, one.column) == (int(row) // size, int(column) // size)
        and (image is None or one.image == int(image))
        and (view is None or one.tile == (None if tile is None else int(tile)))
    ]
    return fits[0] if len(fits) == 1 else None


@dataclass(frozen=True)
class View:
    """Patches that are drawn together.

    Attributes:
        name: What it shows, for a panel's title; empty if there is no other.
        image: Which picture.
        index: The patches' places among the result's labels.
        patches: Their places, with boxes in pixels of a picture of `size`.
        size: Width and height of the area.
        on_picture: Whether the boxes are places on the picture. Otherwise they are rows and columns.
        spread: Whether they are so only because a whole view is taken to cover the picture evenly.
        pixels: What hover says of each patch's pixels.
    """

    name: str
    image: int
    index: tuple[int, ...]
    patches: tuple[Patch, ...]
    size: tuple[float, float]
    on_picture: bool
    spread: bool
    pixels: tuple[str, ...]

    @property
    def tiles(self) -> list[list[int]]:
        """Which of the patches are of each tile."""
        found: dict[int | None, list[int]] = {}
        for i, patch in enumerate(self.patches):
            found.setdefault(patch.tile, []).append(i)
        return list(found.values())

    @property
    def boxes(self) -> list[Box]:
        return [patch.box for patch in self.patches if patch.box is not None]

    def outline(self, tile: Sequence[int]) -> Box:
        """The rectangle that a tile's patches cover."""
        sides = np.array([self.boxes[i] for i in tile])
        left, top = sides[:, :2].min(0).tolist()
        right, bottom = sides[:, 2:].max(0).tolist()
        return left, top, right, bottom

    def scaled(self, width: float, height: float) -> View:
        """The same on a picture of that size."""
        across, down = width / self.size[0], height / self.size[1]
        boxes = [(box[0] * across, box[1] * down, box[2] * across, box[3] * down) for box in self.boxes]
        patches = tuple(replace(one, box=box) for one, box in zip(self.patches, boxes, strict=True))
        pixels = tuple(one.pixels for one in patches) if self.on_picture and not self.spread else self.pixels
        return replace(self, patches=patches, size=(width, height), pixels=pixels)

    def raster(self, values: np.ndarray, sub: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Edges of columns, edges of rows, and the cells between them (NaN where no patch is).

        Args:
            values: Of each of the result's labels; numbers or, with `sub` 1, places.
            sub: Into how many parts, along each side, a patch is cut; more than 1 smoothes.
        """
        if sub == 1:
            pieces = [(box, values[[i]][None]) for box, i in zip(self.boxes, self.index, strict=True)]
        else:
            pieces = [piece for tile in self.tiles for piece in self._smoothed(tile, values, sub)]
        columns = [np.linspace(box[0], box[2], sub + 1) for box, _ in pieces]
        rows = [np.linspace(box[1], box[3], sub + 1) for box, _ in pieces]
        across, down = (np.unique(np.concatenate(edges).round(_DIGITS)) for edges in (columns, rows))
        cells = np.full((len(down) - 1, len(across) - 1), np.nan)
        for x, y, (_, part) in zip(columns, rows, pieces, strict=True):
            at_x, at_y = np.searchsorted(across, x.round(_DIGITS)), np.searchsorted(down, y.round(_DIGITS))
            for i in range(sub):
                for j in range(sub):
                    cells[at_y[i] : at_y[i + 1], at_x[j] : at_x[j + 1]] = part[i, j]
        return across, down, cells

    def _smoothed(self, tile: Sequence[int], values: np.ndarray, sub: int) -> list[tuple[Box, np.ndarray]]:
        """Each patch's box and its `sub` times `sub` parts."""
        places = np.array([(self.patches[i].row, self.patches[i].column) for i in tile])
        places -= places.min(0)
        grid = np.full(places.max(0) + 1, np.nan)
        own = values[[self.index[i] for i in tile]]
        grid[places[:, 0], places[:, 1]] = own
        there = ~np.isnan(grid)
        fine, weight = (_between(_between(one, sub).T, sub).T for one in (np.where(there, grid, 0.0), there * 1.0))
        fine = np.where(weight > 0, fine / np.where(weight > 0, weight, 1.0), np.nan)
        found = []
        for i, (row, column), value in zip(tile, places, own, strict=True):
            part = fine[row * sub : (row + 1) * sub, column * sub : (column + 1) * sub]
            found.append((self.boxes[i], np.full_like(part, np.nan) if np.isnan(value) else part))
        return found


def _between(rows: np.ndarray, sub: int) -> np.ndarray:
    """`[row …]` as `sub` times as many rows, each between its two neighbours; beyond the first and the last nothing changes."""
    n = len(rows)
    places = np.clip((np.arange(n * sub) + 0.5) / sub - 0.5, 0, n - 1)
    above = np.floor(places).astype(int)
    share = (places - above)[:, None]
    return rows[above] * (1 - share) + rows[np.minimum(above + 1, n - 1)] * share


def views_of(result: Result, places: Sequence[Patch]) -> list[View]:
    """The views of a result's patches: picture by picture, the whole before its tiles."""
    known = known_of(result)
    images = sorted({one.image for one in places})
    found: list[View] = []
    for image in images:
        of_image = [i for i, one in enumerate(places) if one.image == image]
        whole = [i for i in of_image if places[i].tile is None]
        tiles = [i for i in of_image if places[i].tile is not None]
        groups: dict[str, list[int]] = {"whole": whole}
        if all(places[i].box is not None for i in tiles):
            groups["tiles"] = tiles
        else:
            for i in tiles:
                groups.setdefault(f"tile {places[i].tile}", []).append(i)
        groups = {name: group for name, group in groups.items() if group}
        for name, group in groups.items():
            names = [f"picture {image}"] * (len(images) > 1) + [name] * (len(groups) > 1)
            found.append(_view(", ".join(names), group, places, known, _size(result.provenance, image)))
    return found


def _size(provenance: Mapping[str, Any], image: int) -> tuple[float, float] | None:
    """Width and height of the picture in the boxes' pixels, if it is stated."""
    sizes = provenance.get("picture_sizes")
    size = sizes[image] if isinstance(sizes, list | tuple) and image < len(sizes) else None
    return (float(size[0]), float(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else None


def _view(
    name: str, group: Sequence[int], places: Sequence[Patch], known: Sequence[Patch], stated: tuple[float, float] | None
) -> View:
    patches = [places[i] for i in group]
    first, tiles = patches[0], {one.tile for one in patches}
    others = [one for one in known if one.image == first.image and one.tile in tiles] or patches
    boxes = [one.box for one in others]
    pixels = tuple(one.pixels for one in patches)
    distinct = len(set(boxes)) == len(boxes)  # frames of a film lie on each other
    if all(box is not None for box in boxes) and distinct:
        right, bottom = (max(box[side] for box in boxes if box is not None) for side in (2, 3))
        if stated is not None and stated[0] >= right and stated[1] >= bottom:
            right, bottom = stated
        return View(name, first.image, tuple(group), tuple(patches), (right, bottom), True, False, pixels)
    laid = tuple(replace(one, box=(one.column, one.row, one.column + 1.0, one.row + 1.0)) for one in patches)
    size = max(one.column for one in others) + 1.0, max(one.row for one in others) + 1.0
    spread = tiles == {None} and None in boxes
    return View(name, first.image, tuple(group), laid, size, spread, spread, pixels)
