"""Reading single tensors of safetensors files, whatever the files' size.

The `safetensors` package maps a whole file into memory, and holds Python's lock while it copies a tensor. Here a tensor is read
into memory of its own, and other threads run meanwhile: that is what blocks read ahead need (`streamed.py`). The format: eight
bytes with the length of what follows, a JSON object with each tensor's dtype, shape and place, and the numbers.
"""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PAGES = 2**20  # bytes of a tensor that gets pages of its own
_MOST = 100_000_000  # bytes of a header, as the `safetensors` package has it


@dataclass(frozen=True)
class Stored:
    """Where a tensor is.

    Attributes:
        path: The file.
        name: Its name there.
        dtype: As safetensors calls it.
        shape: Its shape.
        begin: The file's byte where it begins.
        changed: When the file was last changed, in nanoseconds, and its size.
    """

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    changed: tuple[int, int]

    @property
    def is_floating_point(self) -> bool:
        """Whether these are numbers that a weight may have here: others are quantized."""
        return self.dtype in _DTYPES and _DTYPES[self.dtype].is_floating_point

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor, in memory that nobody else has, and that the system has back as soon as nobody needs it.

        Raises:
            ValueError: the file is gone, shorter, or was changed since it was opened first; numbers of a kind not known here.
        """
        if self.dtype not in _DTYPES:
            raise ValueError(
                f"model: expected plain numbers, {self.name!r} in {Path(self.path).name} is {self.dtype}: load it without "
                "stream=True"
            )
        found = self._read(_memory(self.shape, _DTYPES[self.dtype]))
        return found if found.dtype == dtype else _memory(self.shape, dtype).copy_(found)

    def _read(self, tensor: Tensor) -> Tensor:
        if tensor.numel() == 0:
            return tensor
        bytes_of: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        into = memoryview(bytes_of)
        try:
            with open(self.path, "rb", buffering=0) as file:
                done, same = 0, _changed(file.fileno()) == self.changed
                file.seek(self.begin)
                while same and done < len(into):
                    n = file.readinto(into[done:])
                    same, done = bool(n), done + (n or 0)
        except OSError as error:
            raise ValueError(
                f"model: expected its weights in {self.path!r} as long as it is used: {error.strerror}"
            ) from error
        if not same:
            raise ValueError(f"model: {self.path!r} was changed after the model was loaded from it; load it again")
        return tensor


def _memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor to write to. The allocator of C keeps what is freed for later, in pieces that another block's tensors do not fit;
    so large ones get pages of their own from the system."""
    n_bytes = prod(shape) * dtype.itemsize
    if n_bytes < _PAGES:
        return torch.empty(shape, dtype=dtype)
    try:
        pages = mmap.mmap(-1, n_bytes)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"can't allocate memory: {n_bytes} bytes for a tensor of a block ({error})") from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def stored_tensors(path: str | Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name.

    Raises:
        ValueError: it is none, or is damaged.
    """
    try:
        with open(path, "rb") as file:
            changed = _changed(file.fileno())
            n = int.from_bytes(file.read(8), "little")
            if not 0 < n <= min(_MOST, changed[1] - 8):
                raise ValueError(f"a header of {n} bytes in a file of {changed[1]}")
            header = json.loads(file.read(n))
        found = {}
        for name, one in header.items():
            if name == "__metadata__":
                continue
            begin, end = one["data_offsets"]
            stored = Stored(str(path), name, one["dtype"], tuple(one["shape"]), 8 + n + begin, changed)
            if not 0 <= begin <= end <= changed[1] - 8 - n:
                raise ValueError(f"{name!r} lies outside of it")
            if one["dtype"] in _DTYPES and end - begin != prod(stored.shape) * _DTYPES[one["dtype"]].itemsize:
                raise ValueError(f"{name!r} is not as long as its shape says")
            found[name] = stored
    except OSError as error:
        raise ValueError(f"model: expected a file of weights at {str(path)!r}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model: expected a safetensors file at {str(path)!r}, it is damaged: {error}") from error
    return found


def _changed(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_mtime_ns, found.st_size
