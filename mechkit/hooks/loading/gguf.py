"""GGUF files, each converted once: reading one takes millions of Python calls, reading the same as safetensors hardly any.

1. The first load reads the file as transformers does, and keeps the result (weights, configuration, tokenizer; safetensors
   and JSON, no pickle) in a folder of the user's cache, named after the file's SHA-256 and the dtype.
2. Before the folder is moved to its place it is read back and compared with what was read from the file: every bit of every
   tensor, the configuration, the tokenizer. Where they differ, nothing is kept.
3. A later load computes the file's SHA-256, finds the folder, and computes the SHA-256 of every file in it. A folder with
   other contents, or written by other versions of the libraries, is not read but written again.
4. A cache that cannot be written (read-only, full) is no error: the file is read each time.

The cache is the folder `$MECHKIT_CACHE`, by default `mechkit` in `$XDG_CACHE_HOME` or in `~/.cache`. With
`MECHKIT_CACHE=` (empty) no copies are kept or read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Loaded = tuple[Any, Any]  # a transformers model and its tokenizer
Read = Callable[[str, dict[str, str]], Loaded]  # from a folder; the second argument names a GGUF file in it

FORMAT = 1  # of the folders; one of another format is written again
STATEMENT = "mechkit.json"  # in each folder: what it was made of and by, and the SHA-256 of its other files
_PARTIAL = ".partial-"  # how folders that are being written begin
_STALE = 86_400.0  # seconds after which such a folder is taken for one that a killed process left
_VERSIONS = ("gguf", "safetensors", "tokenizers", "torch", "transformers")
_TRAITS = (  # what a tokenizer does that its `tokenizer.json` does not state
    "add_bos_token", "add_eos_token", "chat_template", "clean_up_tokenization_spaces", "model_input_names", "model_max_length",
    "padding_side", "special_tokens_map", "truncation_side",
)  # fmt: skip


def load_gguf(path: Path, dtype: torch.dtype, read: Read) -> Loaded:
    """The model and the tokenizer of a GGUF file, from the cache where they are there.

    Args:
        path: The file.
        dtype: That `read` loads weights in.
        read: Loads a folder, or a GGUF file in it.
    """
    cache = cache_folder()
    if cache is None:
        return _read_file(path, read)
    digest = _sha256(path)
    expected = {"format": FORMAT, "gguf": digest, "dtype": str(dtype), "versions": {n: version(n) for n in _VERSIONS}}
    folder = cache / "gguf" / f"{digest[:32]}-{str(dtype).removeprefix('torch.')}"
    if _is_whole(folder, expected):
        with suppress(Exception):  # whatever it is, the file itself can still be read
            return _named(read(str(folder), {}), path)
    loaded = _read_file(path, read)
    with suppress(Exception):  # a cache that cannot be written, a model that cannot be saved: it is loaded all the same
        _keep(loaded, folder, expected, read, lambda: _sha256(path) == digest)
    return loaded


def cache_folder() -> Path | None:
    """Where copies are kept; `None` for nowhere."""
    chosen = os.environ.get("MECHKIT_CACHE")
    if chosen is not None:
        return Path(chosen).expanduser() if chosen else None
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "mechkit"
    except RuntimeError:  # a user without a home
        return None


def _read_file(path: Path, read: Read) -> Loaded:
    """As transformers reads it. Its weights are plain numbers from then on, and the model says so."""
    model, tokenizer = read(str(path.parent), {"gguf_file": path.name})
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)
    return _named((model, tokenizer), path)


def _named(loaded: Loaded, path: Path) -> Loaded:
    """After the GGUF file's folder, wherever it was read from."""
    model, tokenizer = loaded
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = str(path.parent)
    return loaded


# Keeping


def _keep(loaded: Loaded, folder: Path, expected: dict[str, Any], read: Read, unchanged: Callable[[], bool]) -> None:
    """Writes the folder, in one step, if it holds what was loaded and the file is still the same."""
    model, tokenizer = loaded
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder.parent)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if shutil.disk_usage(folder.parent).free < 2 * size:
        return
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if _same(loaded, read(str(partial), {})) and unchanged():
            files = {file.name: _sha256(file) for file in sorted(partial.iterdir())}
            (partial / STATEMENT).write_text(json.dumps({**expected, "files": files}, indent=1), encoding="utf-8")
            _put(partial, folder, expected)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(partial: Path, folder: Path, expected: dict[str, Any]) -> None:
    """Renames one to the other; what stands there is moved away, unless it is whole (another process was first)."""
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) or _is_whole(folder, expected):
            return
        old = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder.parent))
        try:
            folder.rename(old / "old")
            partial.rename(folder)
        finally:
            shutil.rmtree(old, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    for left in parent.glob(f"{_PARTIAL}*"):
        if time.time() - left.stat().st_mtime > _STALE:
            shutil.rmtree(left, ignore_errors=True)


# Checking


def _is_whole(folder: Path, expected: dict[str, Any]) -> bool:
    """Whether the folder holds the files that were written for this, every byte of them, and nothing else."""
    try:
        there = {file.name: file for file in folder.iterdir()}
        if any(not stat.S_ISREG(file.lstat().st_mode) for file in there.values()):
            return False
        stated = json.loads(there.pop(STATEMENT).read_text(encoding="utf-8"))
        files = stated.pop("files")
        return stated == expected and files == {name: _sha256(file) for name, file in there.items()}
    except (OSError, ValueError, LookupError, AttributeError, TypeError):  # not there, or no such statement
        return False


def _same(one: Loaded, other: Loaded) -> bool:
    """Whether two models and their tokenizers are the same to the bit."""
    return _described(*one) == _described(*other) and all(
        _same_bits(mine, theirs) for mine, theirs in zip(_tensors(one[0]), _tensors(other[0]), strict=True)
    )


def _described(model: Any, tokenizer: Any) -> list[Any]:
    config = {
        key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "architectures")
    }
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    traits = [getattr(tokenizer, name, None) for name in _TRAITS]
    generation = None if model.generation_config is None else model.generation_config.to_dict()
    return [type(model), config, generation, names, type(tokenizer), tokenizer.backend_tokenizer.to_str(), traits]


def _tensors(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.detach().reshape(-1).view(torch.uint8), other.detach().reshape(-1).view(torch.uint8))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
