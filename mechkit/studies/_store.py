"""Where a study's results are kept: a zarr store with a manifest beside it, in a folder or under an object store's prefix.

    manifest.json            what the study is: its jobs, as they were stated
    jobs/<job>.json          the full key of a job (weights, tokens, arguments, versions), and how it is cut into shards
    layout/<job>.json        dims and labels of its values, known since its first shard
    shards/<job>/<n>.json    a finished shard: the checksum of every chunk that it wrote, its cost, its provenance
    failed/<job>/<n>.json    a shard that raised an error
    data/                    a zarr v3 hierarchy; data/<job>/values, baseline_*, and a coordinate array a dim. Read it with xarray
    aside/                   what was found damaged: it is moved there, and not deleted

1. One zarr chunk is one shard, so that no two writers share a chunk. Chunks end in a crc32c, which any zarr reader checks.
2. A shard counts as finished when its JSON is there, written after its chunks in one step (a rename; a put on object stores).
   It holds the SHA-256 of each chunk: a chunk that is torn, flipped, missing, or another job's is found out, set aside, and
   computed again.
3. Every JSON carries a digest of itself. Files that do not agree with theirs are set aside as well.

Own code, where zarr does not serve: a missing chunk reads as NaN in zarr, and a chunk of another array with a good crc32c
reads as good, hence the SHA-256; and zarr opens some 300 arrays a second, so that a table of 10,000 jobs is read from the
chunks directly (`read_chunk`, which zarr's own `bytes` and `crc32c` codecs make plain). icechunk would add transactions over
many arrays, but its stores open with icechunk alone, and a shard needs no more than its own chunks and one record.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import posixpath
import re
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mechkit._version import __version__
from mechkit.result import Label
from mechkit.result._columns import are_whole
from mechkit.studies._files import HALF_WRITTEN, Files, StoreError
from mechkit.studies._job import canonical

if TYPE_CHECKING:
    import zarr

SCHEMA = 1
BEAT = 60.0  # seconds after which a runner that says nothing counts as gone, where no lock can be asked
JOB = re.compile("[0-9a-f]{16}")  # a job's id
CRC = 4  # bytes of crc32c at the end of a chunk
log = logging.getLogger("mechkit.studies")


class DamagedError(Exception):
    """A file of the store is not what was written."""


@dataclass(frozen=True)
class Layout:
    """What a job's values look like.

    Attributes:
        dims, labels: As in a `Result`, in the order of storage.
        chunks: Labels of each dim in one chunk.
        dtype: `"float32"` or `"float64"`.
        baselines: Name -> its dims: none, the prompt, or those of the values.
        base, metric, unit: As in a `Result`.
        kind: `"result"`, or `"edge_scores"`.
        graph: Of edge scores.
    """

    dims: tuple[str, ...]
    labels: Mapping[str, tuple[Label, ...]]
    chunks: Mapping[str, int]
    dtype: str
    baselines: Mapping[str, tuple[str, ...]]
    base: str
    metric: str
    unit: str
    kind: str = "result"
    graph: Mapping[str, Any] | None = None

    def array_dims(self, array: str) -> tuple[str, ...]:
        return self.dims if array == "values" else self.baselines[array.removeprefix("baseline_")]

    def shape(self, array: str) -> tuple[int, ...]:
        return tuple(len(self.labels[dim]) for dim in self.array_dims(array))

    def chunk(self, array: str) -> tuple[int, ...]:
        return tuple(self.chunks[dim] for dim in self.array_dims(array))

    @property
    def arrays(self) -> list[str]:
        return ["values", *(f"baseline_{name}" for name in self.baselines)]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self)}

    @classmethod
    def from_json(cls, stated: Mapping[str, Any]) -> Layout:
        return cls(
            **{
                **stated,
                "dims": tuple(stated["dims"]),
                "labels": {dim: tuple(labels) for dim, labels in stated["labels"].items()},
                "baselines": {name: tuple(dims) for name, dims in stated["baselines"].items()},
            }
        )


class Store:
    """A study's folder."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.files = Files(os.fspath(url))
        self.damage: list[str] = []  # what was found, and what was done about it

    @property
    def url(self) -> str:
        return self.files.url

    # -- sealed JSON ---------------------------------------------------------------------------------------------------

    def put(self, name: str, body: Mapping[str, Any]) -> None:
        """Writes JSON that carries its schema and a digest of itself."""
        body = json.loads(json.dumps({"schema": SCHEMA, **body}))
        sealed = {**body, "digest": sha256(canonical(body))}
        with self._said(name):
            self.files.write(name, json.dumps(sealed, indent=1).encode())

    def get(self, name: str) -> dict[str, Any] | None:
        """What `put` wrote; `None` where there is nothing.

        Raises:
            DamagedError: it is not what was written, or not of this schema.
        """
        data = self.files.read(name)
        if data is None:
            return None
        try:
            body = json.loads(data)
            digest = body.pop("digest")
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise DamagedError(f"{name} is torn or not JSON of ours ({type(error).__name__})") from error
        if sha256(canonical(body)) != digest:
            raise DamagedError(f"{name} does not agree with its own digest")
        if body.get("schema") != SCHEMA:
            raise DamagedError(f"{name} has schema {body.get('schema')!r}, this mechkit reads {SCHEMA}")
        return dict(body)

    def good(self, name: str) -> dict[str, Any] | None:
        """`get`, for those who only read: what is damaged counts as missing."""
        try:
            return self.get(name)
        except DamagedError:
            return None

    def set_aside(self, name: str, why: str) -> None:
        """Moves something damaged out of the way, and remembers that it was."""
        taken = self.files.names("aside")
        to = next(to for i in range(len(taken) + 1) if (to := f"{i:04d}-{name.replace('/', '_')}") not in taken)
        self.say(f"{why}; set aside as aside/{to}")
        with self._said(name):
            self.files.move(name, f"aside/{to}")

    def say(self, what: str) -> None:
        """Remembers damage, and logs it."""
        log.warning("%s: %s", self.url, what)
        self.damage.append(what)

    def remove(self, name: str) -> None:
        """Takes away what is out of date, if it is there."""
        with self._said(name):
            self.files.remove(name)

    def remove_half_written(self) -> None:
        """Takes away the files of ours that processes left half written when they were killed. Object stores have none."""
        if not self.files.local:
            return
        for folder, folders, names in os.walk(self.files.root):
            inside = os.path.relpath(folder, self.files.root)
            if inside == ".":  # a user may keep other things beside ours
                folders[:] = {"jobs", "layout", "shards", "failed", "data"}.intersection(folders)
                names = [name for name in names if name.startswith(("manifest.json.", "run.json."))]
            elif inside == "data":
                folders[:] = [name for name in folders if JOB.fullmatch(name)]
                names = [name for name in names if name.startswith("zarr.")]
            for name in filter(HALF_WRITTEN.search, names):
                with contextlib.suppress(OSError):  # it does no harm
                    os.unlink(os.path.join(folder, name))

    @contextlib.contextmanager
    def _said(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"store {self.url}: could not write {name}: {error.strerror or error}. "
                "What was finished is kept; mend it and run again"
            ) from error

    # -- who is at work ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One runner at a time. In a folder by a lock of the system's, which goes with its process however that ends.

        Raises:
            StoreError: another run is at work, or the folder cannot be written.
        """
        import filelock

        if not self.files.local:
            self._check_beat()
            yield
            return
        with self._said("lock"):
            os.makedirs(self.files.root, exist_ok=True)
            lock = filelock.FileLock(self.files.path("lock"))
            try:
                lock.acquire(blocking=False)
            except filelock.Timeout:
                raise StoreError(f"store {self.url}: {self._who()} is at work on it; wait for it, or stop it") from None
        try:
            yield
        finally:
            lock.release()

    def _check_beat(self) -> None:
        if self.at_work() is not None:
            raise StoreError(f"store {self.url}: {self._who()} is at work on it; wait for it, or stop it")

    def _who(self) -> str:
        run = self.good("run.json") or {}
        return f"another run (process {run.get('pid', '?')} on {run.get('host', '?')})"

    def beat(self, running: Sequence[Sequence[Any]] | None, workers: int) -> None:
        """Says that a run is alive, and what it is at; `None` at its end."""
        self.put(
            "run.json",
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "beat": time.time(),
                "workers": workers,
                "running": None if running is None else [list(one) for one in running],
            },
        )

    def at_work(self) -> dict[str, Any] | None:
        """What `beat` last said, if that run is still there."""
        run = self.good("run.json")
        if run is None or run["running"] is None:
            return None
        if self.files.local and run["host"] == socket.gethostname():
            return run if _alive(run["pid"]) else None
        return run if time.time() - run["beat"] < BEAT else None

    # -- writing a shard -----------------------------------------------------------------------------------------------

    @cached_property
    def _zarr_store(self) -> Any:
        import zarr

        if self.files.local:
            return zarr.storage.LocalStore(self.files.path("data"))
        return zarr.storage.FsspecStore.from_url(f"{self.url.rstrip('/')}/data")

    def prepare(self, job: str, layout: Layout, attributes: Mapping[str, Any]) -> None:
        """Makes a job's group and arrays; those that are there are left alone. Any number of writers may do so at once."""
        import zarr

        with self._said(f"data/{job}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr: some of its data types have no final specification yet
            for path, attrs in (("", {"mechkit": __version__}), (job, dict(attributes))):
                if not self.files.exists(posixpath.join("data", path, "zarr.json")):
                    zarr.create_group(self._zarr_store, path=path, attributes=attrs, overwrite=False, zarr_format=3)
            for array in layout.arrays:
                if not self.files.exists(f"data/{job}/{array}/zarr.json"):
                    self._create(
                        f"{job}/{array}",
                        layout.shape(array),
                        layout.chunk(array),
                        layout.dtype,
                        layout.array_dims(array),
                    )
            for dim, labels in layout.labels.items():
                whole = are_whole(labels)
                if not self.files.exists(f"data/{job}/{dim}/zarr.json"):
                    kind = "int64" if whole else "str"
                    self._create(f"{job}/{dim}", (len(labels),), (max(1, len(labels)),), kind, (dim,))
                if not self.files.exists(chunk_name(job, dim, (0,))):
                    written = zarr.open_array(
                        self._zarr_store, path=f"{job}/{dim}", mode="r+", config={"write_empty_chunks": True}
                    )
                    as_text = [str(label) for label in labels]
                    written[:] = np.array(labels, dtype=np.int64) if whole else np.array(as_text, dtype=object)

    def label_files(self, job: str, layout: Layout) -> dict[str, str]:
        """The files of the coordinate arrays, and their SHA-256."""
        names = [chunk_name(job, dim, (0,)) for dim in layout.labels]
        return {name: sha256(data) for name in names if (data := self.files.read(name)) is not None}

    def _create(self, name: str, shape: Any, chunks: Any, dtype: str, dims: Sequence[str]) -> zarr.Array:
        import zarr
        from zarr.codecs import Crc32cCodec

        return zarr.create_array(
            self._zarr_store,
            name=name,
            shape=shape,
            chunks=chunks,
            dtype=str if dtype == "str" else dtype,
            fill_value="" if dtype == "str" else 0 if dtype == "int64" else np.nan,
            compressors=(Crc32cCodec(),),  # and no compression: numbers that look random have none
            dimension_names=tuple(dims),
            overwrite=False,
        )

    def write_chunk(
        self, job: str, array: str, layout: Layout, at: Sequence[int], block: np.ndarray
    ) -> tuple[str, str]:
        """Writes a whole chunk. Returns its file and the SHA-256 of what is in that file afterwards."""
        import zarr

        name = chunk_name(job, array, at)
        with self._said(name):
            self.files.remove(name)  # what a run that was killed left: zarr would read it first
            opened = zarr.open_array(
                self._zarr_store,
                path=f"{job}/{array}",
                mode="r+",
                config={
                    "write_empty_chunks": True
                },  # all NaN is a result too: a file that is not there is one that was lost
            )
            region = tuple(
                slice(i * size, i * size + n) for i, size, n in zip(at, layout.chunk(array), block.shape, strict=True)
            )
            opened[region] = block
            data = self.files.read(name)
        if data is None:
            raise StoreError(f"store {self.url}: {name} is not there after it was written")
        return name, sha256(data)

    # -- reading -------------------------------------------------------------------------------------------------------

    def read_chunk(self, name: str, sha: str, layout: Layout, array: str) -> np.ndarray:
        """A chunk, whole.

        Raises:
            DamagedError: the file is missing, or not what was written.
        """
        data = self.files.read(name)
        if data is None:
            raise DamagedError(f"{name} is missing")
        if sha256(data) != sha:
            raise DamagedError(f"{name} is torn, changed, or another job's: its checksum is not the recorded one")
        chunk = layout.chunk(array)
        kind = np.dtype(f"<{layout.dtype[0]}{int(layout.dtype[5:]) // 8}")
        return np.frombuffer(data, dtype=kind, count=math.prod(chunk)).reshape(chunk)


def chunk_name(job: str, array: str, at: Sequence[int]) -> str:
    return "/".join(["data", job, array, "c", *map(str, at)])


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
