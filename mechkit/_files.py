"""Files that a user names: checked before they are read or written, so that a wrong one gives a clear error.

1. `regular_file` refuses what is not there, folders, pipes and devices, and files above a size.
2. `read_text` refuses what is not text; `parse_json` what is not JSON, or is nested too deeply.
3. `read_tensors` reads safetensors files with a JSON header of our own, which `write_tensors` wrote: results and lenses.
4. `destination` refuses to write where there is no folder, or a folder instead of a file; `replacing` writes in one step.
5. An error in making an object of a file's content is the file's fault: `decoding` reports it with the file's name.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

Place = str | os.PathLike[str]
_HEADER = 2**24  # characters of a header of our own, at most
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


class NoSuchFileError(FileNotFoundError, ValueError):
    """There is no such file. A `FileNotFoundError`, and a `ValueError` as other wrong arguments are."""


def regular_file(path: Place, what: str, *, limit: int | None = None) -> Path:
    """The path of a file that is there and can be read.

    Args:
        path: The file.
        what: What it should be, for errors: `"a circuit as JSON"`.
        limit: Largest size in bytes.

    Raises:
        ValueError: it is something else.
    """
    path = expanded(path)
    try:
        about = path.stat()
    except FileNotFoundError:
        raise NoSuchFileError(f"{path}: expected {what}, there is no such file") from None
    except (OSError, ValueError) as error:  # a name too long, or with a NUL in it
        raise ValueError(f"{str(path)!r}: expected {what}, it cannot be read: {error}") from None
    if not stat.S_ISREG(about.st_mode):
        is_what = "a folder" if stat.S_ISDIR(about.st_mode) else "a pipe, a socket or a device"
        raise ValueError(f"{path}: expected {what}, it is {is_what}")
    if about.st_size == 0:
        raise ValueError(f"{path}: expected {what}, the file is empty")
    if limit is not None and about.st_size > limit:
        raise ValueError(f"{path}: expected {what}, of at most {_size(limit)}; the file has {_size(about.st_size)}")
    return path


def read_text(path: Place, what: str, *, limit: int, begins: str = "", encoding: str = "utf-8") -> str:
    """A text file's content.

    Args:
        path, what, limit: As for `regular_file`.
        begins: The first characters, one of which the text must begin with; any by default.
        encoding: Of the text.

    Raises:
        ValueError: it is no text, or begins otherwise.
    """
    path = regular_file(path, what, limit=limit)
    with opening(path, what), open(path, "rb") as file:
        head = file.read(1024)
        if b"\0" in head:
            raise ValueError(f"{path}: expected {what}, it is no text")
        start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        if begins and start[:1] not in [character.encode() for character in begins]:
            raise ValueError(f"{path}: expected {what}, it begins with {start[:20]!r}")
        try:
            return (head + file.read()).decode(encoding)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected {what}, it is no {encoding} text: {error}") from None


def parse_json(text: str, where: str, what: str, **options: Any) -> Any:
    """What `json.loads` makes of a text.

    Args:
        text: The text.
        where: The file's name, for errors.
        what: What it should be.
        **options: As of `json.loads`.

    Raises:
        ValueError: it is no JSON, or nested deeper than Python reads.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError(f"{where}: expected {what}, its JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: expected {what}, got something else: {error}") from None


@contextmanager
def opening(path: Place, what: str) -> Iterator[None]:
    """An operating system's error inside is a `ValueError` that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: expected {what}, it cannot be read: {error.strerror or error}") from error


@contextmanager
def decoding(path: Place, what: str) -> Iterator[None]:
    """Whatever goes wrong inside is a `ValueError` that names the file and what it is not."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: expected {what}, it lacks {error.args[0]!r}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: expected {what}, it is nested too deeply") from error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected {what}, it is damaged or something else: {error}") from error


def destination(path: Place, *, make_folders: bool = False) -> Path:
    """Where a file will be written; `~` at its beginning is the home folder.

    Args:
        path: The file.
        make_folders: Whether folders that are missing are made.

    Raises:
        ValueError: it is a folder, or there is no folder to put it into.
    """
    path = expanded(path)
    with _writing(path):
        if make_folders:
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise ValueError(f"path: expected a file to write, {str(path)!r} is a folder")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"path: there is no folder {str(path.absolute().parent)!r} to write {path.name!r} into")
    return path


def expanded(path: Place) -> Path:
    """A path whose `~`, if it begins with one, is the home folder."""
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError:  # of somebody who is not known here
        return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file next to `path`, which replaces it in one step if the block raises nothing.

    Raises:
        ValueError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with _writing(path):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """An operating system's error inside is a `ValueError` that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"path: {str(path)[:200]!r} cannot be written: {error.strerror or error}") from error


def write_tensors(path: Place, tensors: Mapping[str, Tensor], key: str, header: Mapping[str, Any]) -> Path:
    """Writes tensors, and the header under the metadata's `key`. An existing file is replaced in one step."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = destination(path)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        try:
            save_file(contiguous, partial, metadata={key: json.dumps(header)})
        except SafetensorError as error:  # names a file of its own
            raise OSError(str(error).split(" at path")[0]) from error
    return path


def read_tensors(
    path: Place, key: str, *, writer: str, names: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the header that `write_tensors` put there.

    Args:
        path: The file.
        key: Of the header.
        writer: What writes such files, for the error.
        names: The tensors to read; all of them by default.

    Raises:
        ValueError: it is another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    what = f"a file written by {writer}"
    path = regular_file(path, what)
    try:
        with opening(path, what), safe_open(path, framework="pt") as file:
            stated = (file.metadata() or {}).get(key)
            if stated is None:
                raise ValueError(
                    f"{path}: expected {what}, got safetensors of another program (no {key!r} in its header)"
                )
            if len(stated) > _HEADER:
                raise ValueError(f"{path}: expected {what}, its header is longer than {_size(_HEADER)}")
            header = parse_json(stated, str(path), what)
            if not isinstance(header, dict):
                raise ValueError(f"{path}: expected {what}, its header is no table: {str(header)[:40]}")
            there = set(file.keys())
            if missing := [name for name in names or () if name not in there]:
                raise ValueError(f"{path}: expected {what}, it lacks {', '.join(missing)}")
            tensors = {name: file.get_tensor(name) for name in (there if names is None else names)}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected {what}, got something else: {error}") from error
    return tensors, header


# How a text begins that a spreadsheet would take for a formula, with the signs as East Asian keyboards write them.
_FORMULA = r"[=+\-@\t\r\n＝＋－＠]"
# A text that reads as a number, or as True or False.
_TYPED = r"\s*(?:[\d_]*\.?[\d_]+(?:[eE][+-]?\d+)?|[\d_]+\.|(?i:nan|inf|infinity|true|false))\s*$"
_MARKED = re.compile(f"'*(?:{_FORMULA}|{_TYPED})")
GUARDED = f"^('*{_FORMULA}|'+{_TYPED})"  # for pyarrow: what must be marked so that it is not run, or taken for marked


def guarded(text: str) -> str:
    """A text cell of a CSV file such that no spreadsheet runs it, and that is read again as a text: `=1+1` becomes `'=1+1`, and
    `1e5` becomes `'1e5`. `unguarded` takes that back."""
    return f"'{text}" if _MARKED.match(text) else text


def unguarded(text: str) -> str:
    """The inverse of `guarded`."""
    return text[1:] if text.startswith("'") and _MARKED.match(text) else text


def _size(n: int) -> str:
    return next((f"{n / unit:.3g} {name}" for unit, name in _UNITS if n >= unit), f"{n} bytes")
