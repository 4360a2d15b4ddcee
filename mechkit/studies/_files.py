"""Bytes by name, in a folder or under an object store's prefix: what a study's store is made of.

A file is written under another name and renamed when it is whole, so that readers see the old one or the new one. A process
that is killed in between leaves the other name; zarr does the same, with names of the same form.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import stat
import uuid

HALF_WRITTEN = re.compile(r"\.[0-9a-f]{32}\.partial$")


class StoreError(Exception):
    """The store cannot be used: no space, no permission, another run at work on it, another schema. A study stops at it."""


class Files:
    """Bytes by name, in a folder or under a prefix: whatever fsspec opens."""

    def __init__(self, url: str) -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self.url = url
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StoreError(f"store {url}: {error}") from error
        self.local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        return posixpath.join(self.root, name)

    def read(self, name: str) -> bytes | None:
        """`None` where there is no such file."""
        try:
            if self.local:
                path = self.path(name)
                if not stat.S_ISREG(os.stat(path).st_mode):
                    return b""  # a folder, or a pipe that would never end: torn, for whoever reads it
                with open(path, "rb") as file:
                    return file.read()
            return bytes(self.fs.cat_file(self.path(name)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError:
            return b""  # torn, for whoever reads it

    def write(self, name: str, data: bytes) -> None:
        """In one step: readers see the old file or the new one."""
        path = self.path(name)
        if not self.local:
            self.fs.pipe_file(path, data)
            return
        os.makedirs(posixpath.dirname(path), exist_ok=True)
        partial = f"{path}.{uuid.uuid4().hex}.partial"
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise

    def names(self, folder: str) -> list[str]:
        """Names in a folder, sorted; none if there is no such folder."""
        try:
            if self.local:
                found = os.listdir(self.path(folder))
            else:
                self.fs.invalidate_cache()
                found = [
                    posixpath.basename(str(path).rstrip("/")) for path in self.fs.ls(self.path(folder), detail=False)
                ]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name for name in found if name and not name.endswith(".partial"))

    def exists(self, name: str) -> bool:
        return bool(self.fs.exists(self.path(name)))

    def move(self, name: str, to: str) -> None:
        if self.local:
            os.makedirs(posixpath.dirname(self.path(to)), exist_ok=True)
            os.replace(self.path(name), self.path(to))
        else:
            self.fs.mv(self.path(name), self.path(to), recursive=True)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))
