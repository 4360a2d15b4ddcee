"""Where shards are computed: in this process, in a process a device, or on Ray.

An executor owns workers, numbered from 0, each of which does one unit of work at a time. It does not choose which (`_run.py`
hands them out) and it does not schedule: processes are concurrent.futures', actors are Ray's.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch

from mechkit.hooks import HookedModel
from mechkit.studies._files import StoreError
from mechkit.studies._work import Failed, Finished, Planned, Work, WorkerSettings
from mechkit.studies._worker import Worker

Outcome = Planned | Finished | Failed


class WorkerLostError(Exception):
    """A worker died over its work; there is a new one in its place."""


@runtime_checkable
class Executor(Protocol):
    """What `_run.py` needs of an executor."""

    n_workers: int

    def open(self, settings: WorkerSettings) -> None: ...
    def close(self) -> None: ...
    def submit(self, worker: int, work: Work) -> Any: ...
    def wait(self, handles: Sequence[Any], seconds: float) -> list[Any]: ...
    def result(self, handle: Any) -> Outcome: ...


class _Opens:
    """`with executor.opened(settings):`."""

    def opened(self, settings: WorkerSettings) -> _Opens:
        self.open(settings)  # type: ignore[attr-defined]
        return self

    def __enter__(self) -> _Opens:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()  # type: ignore[attr-defined]


class InProcess(_Opens):
    """One worker, in this process.

    Args:
        device: Where models go; default the GPU if there is one.
        loaded: Models that are at hand, by the name that the study calls them; these are not loaded again.
    """

    n_workers = 1

    def __init__(self, device: str | None = None, *, loaded: Mapping[str, HookedModel] | None = None) -> None:
        self.device, self.loaded = device, dict(loaded or {})
        if device is not None:
            check_device(device)
        self._worker: Worker | None = None

    def open(self, settings: WorkerSettings) -> None:
        self._worker = Worker(settings, self.device, self.loaded)

    def close(self) -> None:
        self._worker = None

    def submit(self, worker: int, work: Work) -> Any:
        return work

    def wait(self, handles: Sequence[Any], seconds: float) -> list[Any]:
        return list(handles)

    def result(self, handle: Any) -> Outcome:
        assert self._worker is not None
        return self._worker.run(handle)


def check_device(device: str) -> None:
    """`ValueError` unless models can be put there."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected one such as 'cpu' or 'cuda:0', got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one of the {torch.cuda.device_count()} GPUs of this machine, got {device!r}"
        )


class Processes(_Opens):
    """A process a device, each with its own model.

    Args:
        devices: `["cuda:0", "cuda:1"]`, or how many processes to share the CPU among; default one for each GPU.

    Raises:
        ValueError: no device was given and there is no GPU.
    """

    def __init__(self, devices: Sequence[str] | int | None = None) -> None:
        if devices is None:
            devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
            if not devices:
                raise ValueError(
                    "devices: expected at least one GPU, there is none; say how many processes, as Processes(2)"
                )
        if isinstance(devices, int):
            devices = ["cpu"] * devices
        self.devices = list(devices)
        if isinstance(devices, str) or not self.devices:
            raise ValueError(f"devices: expected a list such as ['cuda:0'], or a number of processes, got {devices!r}")
        for device in self.devices:
            check_device(device)
        self.n_workers = len(self.devices)
        self._pools: list[concurrent.futures.ProcessPoolExecutor] = []
        self._of: dict[concurrent.futures.Future[Outcome], int] = {}

    def open(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._pools = [self._pool(device) for device in self.devices]

    def _pool(self, device: str) -> concurrent.futures.ProcessPoolExecutor:
        """One process: a pool of its own, so that its death is nobody else's."""
        threads = max(1, (os.cpu_count() or 1) // self.n_workers) if device == "cpu" else 0
        threads = min(threads, torch.get_num_threads())
        return concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _begin, (self._settings, device, threads)
        )

    def close(self) -> None:
        busy = {worker for handle, worker in self._of.items() if not handle.done()}
        for worker, pool in enumerate(self._pools):
            if worker in busy:  # the run was interrupted: what it was computing is lost in any case
                for process in list((pool._processes or {}).values()):
                    process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)
        self._pools, self._of = [], {}

    def submit(self, worker: int, work: Work) -> Any:
        try:
            handle = self._pools[worker].submit(_compute, work)
        except BrokenProcessPool:  # it died while it had nothing to do
            self._pools[worker] = self._pool(self.devices[worker])
            handle = self._pools[worker].submit(_compute, work)
        self._of[handle] = worker
        return handle

    def wait(self, handles: Sequence[Any], seconds: float) -> list[Any]:
        done, _ = concurrent.futures.wait(handles, seconds, concurrent.futures.FIRST_COMPLETED)
        return list(done)

    def result(self, handle: Any) -> Outcome:
        worker = self._of.pop(handle)
        try:
            return handle.result()
        except BrokenProcessPool as error:
            self._pools[worker].shutdown(wait=False)
            self._pools[worker] = self._pool(self.devices[worker])
            raise WorkerLostError("its process ended (out of memory, perhaps, or a crash)") from error


_worker: Worker | None = None  # of this process, if it is one of `Processes`


def _begin(settings: WorkerSettings, device: str, threads: int) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the runner's, which ends us
    threading.Thread(target=_end_with_the_runner, daemon=True).start()
    if threads:
        torch.set_num_threads(threads)
    _worker = Worker(settings, device)


def _end_with_the_runner() -> None:
    """Should the runner be killed, nobody else would end its processes."""
    runner = multiprocessing.parent_process()
    if runner is not None:
        runner.join()
        os._exit(1)


def _compute(work: Work) -> Outcome:
    assert _worker is not None
    return _worker.run(work)


class Ray(_Opens):
    """Actors on a Ray cluster (`pip install mechkit[ray]`).

    Args:
        address: `"ray://host:10001"` or `"auto"` for a cluster that is running; default one on this machine, started and
            stopped with the run (a Ray that this process has begun already is used as it is).
        workers: How many actors; default as many as the cluster's GPUs, or CPUs, allow.
        gpus, cpus: What one actor takes; default one GPU where the cluster has any, else one CPU.
        options: Further options for Ray's actors, such as `{"runtime_env": {...}}`.

    Models, and the store, must be within reach of every node: a shared folder, or an object store's URL.

    Raises:
        ValueError: Ray is not installed.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        workers: int | None = None,
        gpus: float | None = None,
        cpus: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import ray  # noqa: F401
        except ImportError:
            raise ValueError("executor: Ray is not installed; pip install 'mechkit[ray]'") from None
        if workers is not None and workers < 1:
            raise ValueError(f"workers: expected at least 1, got {workers}")
        self.address, self.gpus, self.cpus, self.options = address, gpus, cpus, dict(options or {})
        self.n_workers = workers or 0
        self._ours = False
        self._actors: list[Any] = []
        self._of: dict[Any, int] = {}

    def open(self, settings: WorkerSettings) -> None:
        import ray

        if not ray.is_initialized():
            ray.init(
                address=self.address, log_to_driver=False, include_dashboard=False if self.address is None else None
            )
            self._ours = True
        has = ray.cluster_resources()
        gpus = (1.0 if has.get("GPU") else 0.0) if self.gpus is None else self.gpus
        cpus = 1.0 if self.cpus is None else self.cpus
        if not self.n_workers:
            self.n_workers = max(1, int(has.get("GPU", 0) // gpus if gpus else has.get("CPU", 1) // cpus))
        options = {"num_gpus": gpus, "num_cpus": cpus, **self.options}
        self._make = lambda: ray.remote(Worker).options(**options).remote(settings)
        self._actors = [self._make() for _ in range(self.n_workers)]

    def close(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._ours:
            ray.shutdown()
            self._ours = False

    def submit(self, worker: int, work: Work) -> Any:
        handle = self._actors[worker].run.remote(work)
        self._of[handle] = worker
        return handle

    def wait(self, handles: Sequence[Any], seconds: float) -> list[Any]:
        import ray

        done, _ = ray.wait(list(handles), num_returns=1, timeout=seconds)
        return list(done)

    def result(self, handle: Any) -> Outcome:
        import ray

        worker = self._of.pop(handle)
        try:
            return ray.get(handle)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StoreError):
                raise error.cause from None
            return Failed(f"{type(error.cause).__name__}: {error.cause}")
        except ray.exceptions.RayError as error:
            self._actors[worker] = self._make()
            raise WorkerLostError(f"its actor was lost ({type(error).__name__})") from error
