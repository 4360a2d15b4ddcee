"""Pictures that results are drawn over: read from whatever holds one, as bytes `[row column 3]`, and embedded in a figure.

Pillow is imported where a file is to be read, and by nothing else: arrays, tensors and opened pictures need none of it.
"""

from __future__ import annotations

import base64
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mechkit._files import NoSuchFileError

_EXPECTED = (
    "a PIL image, a path, or an array or a tensor [row, column, 3] or [3, row, column], of whole numbers 0..255 or of "
    "fractions 0..1"
)


def read_picture(picture: Any, name: str = "picture") -> np.ndarray:
    """A picture as bytes `[row column 3]`.

    Args:
        picture: A PIL image, an array, a tensor or a path.
        name: The argument's, for errors.

    Raises:
        ValueError: it is none of these, has another shape or numbers that are no colours, or the file cannot be read.
        RuntimeError: a path, and Pillow is not installed.
    """
    if isinstance(picture, str | os.PathLike):
        picture = _open(Path(picture), name)
    if hasattr(picture, "convert") and hasattr(picture, "getpixel"):
        picture = np.asarray(picture.convert("RGB"))
    if isinstance(picture, Tensor):
        found = picture.detach().cpu()
        picture = (found.double() if found.is_floating_point() else found).numpy()
    if not isinstance(picture, np.ndarray):
        raise ValueError(f"{name}: expected {_EXPECTED}; got {type(picture).__name__}")
    shape = picture.shape
    if picture.ndim == 3 and shape[2] != 3 and shape[0] == 3:
        picture = np.moveaxis(picture, 0, -1)
    if picture.ndim != 3 or picture.shape[2] != 3 or 0 in shape:
        cure = ""
        if len(shape) == 4 and shape[0] == 1:
            cure = "; take the one picture of the batch, [0]"
        elif len(shape) == 2:
            cure = "; repeat the one colour three times: numpy.stack([picture] * 3, -1)"
        elif len(shape) == 3 and 4 in shape:
            cure = "; leave out the transparency"
        raise ValueError(f"{name}: expected {_EXPECTED}; got an array of shape {list(shape)}{cure}")
    kind = picture.dtype.kind
    if kind not in "iuf":
        raise ValueError(f"{name}: expected {_EXPECTED}; got {picture.dtype}")
    low, high = float(picture.min()), float(picture.max())
    most = 1 if kind == "f" else 255
    if not (low >= 0 and high <= most):  # also NaN
        cure = "numbers that a processor made are to be scaled back (times its image_std, plus its image_mean)"
        if kind == "f" and low >= 0 and high <= 255:
            cure = "divide by 255"
        raise ValueError(
            f"{name}: expected {'fractions 0..1' if kind == 'f' else 'whole numbers 0..255'}, got {low:.4g}..{high:.4g}; {cure}"
        )
    found = np.rint(picture * 255.0) if kind == "f" else picture
    return np.ascontiguousarray(found.astype(np.uint8))


def _open(path: Path, name: str) -> Any:
    path = path.expanduser()
    if not path.is_file():
        raise NoSuchFileError(f"{name}: expected the path of a picture; there is no file {str(path)!r}")
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise RuntimeError(
            f"{name}: to read {path.name} takes Pillow (`pip install pillow`); or give the picture as an array [row, column, 3]"
        ) from error
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: expected a picture that Pillow can read, got {str(path)!r}: {error}") from error


def grey_of(picture: np.ndarray) -> np.ndarray:
    """`[row column 3]` as brightness `[row column]`."""
    return np.rint(picture @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)


def shrunk(picture: np.ndarray, most: int) -> np.ndarray:
    """The picture with no more than so many pixels on its longer side, each the mean of those that it stands for."""
    by = max(picture.shape[:2]) / most
    if by <= 1:
        return picture
    found = picture.astype(np.float64)
    for axis in (0, 1):
        n = found.shape[axis]
        edges = np.linspace(0, n, max(round(n / by), 1) + 1).astype(int)
        widths = np.diff(edges).reshape([-1 if i == axis else 1 for i in range(found.ndim)])
        found = np.add.reduceat(found, edges[:-1], axis) / widths
    return np.rint(found).astype(np.uint8)


def enlarged(picture: np.ndarray, least: int) -> np.ndarray:
    """A small picture with each pixel as a square of several, so that its longer side has about so many: nothing is smoothed."""
    by = least // max(picture.shape[:2])
    return picture if by <= 1 else picture.repeat(by, 0).repeat(by, 1)


def embedded(picture: np.ndarray) -> str:
    """`[row column 3]`, or `[row column]` in greys, as a PNG in a `data:` address."""
    rows, columns = picture.shape[:2]
    lines = picture.reshape(rows, -1)
    changes = np.diff(lines, axis=0, prepend=np.zeros((1, lines.shape[1]), np.uint8))  # from the line above: filter 2
    coded = np.concatenate([np.full((rows, 1), 2, np.uint8), changes], 1)
    head = struct.pack(">IIBBBBB", columns, rows, 8, 2 if picture.ndim == 3 else 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(coded.tobytes(), 6)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()
