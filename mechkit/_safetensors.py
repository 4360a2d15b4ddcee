"""Safetensors files with a JSON header of our own: what results and lenses are saved as."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], key: str, header: Mapping[str, Any]) -> Path:
    """Writes tensors, and the header under the metadata's `key`. An existing file is replaced in one step."""
    from safetensors.torch import save_file

    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial, metadata={key: json.dumps(header)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read(
    path: str | os.PathLike[str], key: str, *, writer: str, names: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the header that `write` put there.

    Args:
        writer: What writes such files, for the error.
        names: The tensors to read; all of them by default.

    Raises:
        ValueError: it is another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[key])
            tensors = {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a file written by {writer}, got something else: {error}") from error
    return tensors, header
