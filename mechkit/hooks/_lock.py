"""One call at a time: hooks that one thread has attached would fire in another thread's forward passes.

1. Each model has one lock. It belongs to the Hugging Face modules inside, or to the user's model of the same weights, so that
   all wrappers of the same modules or weights share it.
2. Code that runs the model, attaches hooks to it or changes its state holds the lock meanwhile; the thread that holds it may
   take it again. Public techniques hold it from beginning to end (`one_at_a_time`), `model.hooks()` until its body is left.
3. Other threads wait their turn, first come, first served. They wait as long as the holder makes progress. If it does
   nothing with the model for `ModelLock.timeout` seconds while the user's own code runs (the body of `model.hooks()`), or for
   twenty times as long within a call, those that wait raise `TimeoutError`, which names the thread and what it holds.

Locks are stored by module and nowhere else: a copied or unpickled model has other modules, and therefore its own lock.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from torch import nn

P = ParamSpec("P")
R = TypeVar("R")

TIMEOUT = 30.0  # seconds without a sign of life, in the user's own code
_WITHIN_A_CALL = 20  # times as long: one forward pass may take minutes
_BY_USER = "holds model.lock"
HOOKED = "has hooks on it"
_LOOK_AGAIN = 1.0  # seconds after which one that waits looks whether the holder's thread still lives


class _Hold:
    """One reason to hold a lock."""

    def __init__(self, what: str, idle: bool) -> None:
        self.what = what
        self.idle = idle  # whether the user's own code runs meanwhile, rather than ours


class ModelLock:
    """A lock that one thread holds, perhaps several times over; the others wait their turn, but not for ever.

    `with model.lock:` makes several calls one, as far as other threads are concerned.

    Attributes:
        timeout: Seconds that others wait for a holder that does nothing with the model.
    """

    def __init__(self) -> None:
        self.timeout = TIMEOUT
        self._changed = threading.Condition()
        self._owner: threading.Thread | None = None
        self._holds: list[_Hold] = []
        self._queue: deque[object] = deque()
        self._active = time.monotonic()  # when the holder last took or gave up a hold

    def __enter__(self) -> ModelLock:
        self._take(_BY_USER, idle=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._give_up(next(hold for hold in reversed(self._holds) if hold.what == _BY_USER))

    @contextmanager
    def held(self, what: str, *, idle: bool = False) -> Iterator[None]:
        """Holds the lock. The body may be left in another thread than the one that entered it.

        Args:
            what: What the holder does, as the end of "this model is in use by thread X, which …".
            idle: Whether the user's own code runs in the body.

        Raises:
            TimeoutError: another thread holds the lock and does nothing with the model.
        """
        hold = self._take(what, idle)
        try:
            yield
        finally:
            self._give_up(hold)

    def is_held(self, what: str) -> bool:
        """Whether it is held for this reason."""
        with self._changed:
            return any(hold.what == what for hold in self._holds)

    def _take(self, what: str, idle: bool) -> _Hold:
        hold, me = _Hold(what, idle), threading.current_thread()
        with self._changed:
            if self._owner is not me:
                self._wait_for_turn(hold)
            self._owner = me
            self._holds.append(hold)
            self._active = time.monotonic()
        return hold

    def _wait_for_turn(self, ticket: object) -> None:
        self._queue.append(ticket)
        came = time.monotonic()
        try:
            while self._holds or self._queue[0] is not ticket:
                if self._holds:
                    self._check_holder(came)
                self._changed.wait(min(_LOOK_AGAIN, self.timeout))
        finally:
            self._queue.remove(ticket)
            self._changed.notify_all()

    def _check_holder(self, came: float) -> None:
        """Raises `TimeoutError` if the holder has not got on since somebody came to wait."""
        assert self._owner is not None
        last, thread, alive = self._holds[-1], self._owner.name, self._owner.is_alive()
        patience = self.timeout if last.idle or not alive else self.timeout * _WITHIN_A_CALL
        if time.monotonic() - max(self._active, came) <= patience:
            return
        state = f"and has done nothing with the model for {patience:.3g} s" if alive else "and has ended meanwhile"
        raise TimeoutError(
            f"this model is in use by thread {thread!r}, which {last.what} {state}. A model runs one call at a time, since hooks "
            "of one thread would fire in the other's runs. Leave that call or `with` before another thread calls the model, make "
            "all these calls in one thread, or give each thread a copy.deepcopy of the model. To wait longer, set "
            "model.lock.timeout (seconds)"
        )

    def _give_up(self, hold: _Hold) -> None:
        with self._changed:
            self._holds.remove(hold)
            self._active = time.monotonic()
            if not self._holds:
                self._owner = None
                self._changed.notify_all()


_locks: weakref.WeakKeyDictionary[nn.Module, ModelLock] = weakref.WeakKeyDictionary()
_finding = threading.Lock()


def lock_of(bridge: Any) -> ModelLock:
    """The lock of a bridge's model."""
    module = _innermost(bridge)
    with _finding:
        found = _locks.get(module)
        if found is None:
            found = _locks[module] = ModelLock()
    return found


def share_lock(bridge: Any, hf_model: nn.Module) -> None:
    """Makes the lock of a bridge that of the user's model whose weights it shares: all that wrap it wait for each other."""
    with _finding:
        _locks[_innermost(bridge)] = _locks.setdefault(hf_model, ModelLock())


def _innermost(bridge: Any) -> nn.Module:
    """A module that all wrappers of the same weights share: the first block itself (the whole model if it has no blocks)."""
    blocks = getattr(bridge, "blocks", None)
    module = bridge.original_model if blocks is None or not len(blocks) else blocks[0]
    while isinstance(inner := module._modules.get("_original_component"), nn.Module):
        module = inner
    return module


def one_at_a_time(fn: Callable[P, R]) -> Callable[P, R]:
    """Holds the lock of the `HookedModel` that `fn` is given, from beginning to end."""

    @wraps(fn)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        given = (*args[:2], kwargs.get("model"))  # a classmethod or a method has its model second
        bridges = (one.__dict__.get("bridge") for one in given if hasattr(one, "__dict__"))
        bridge = next((one for one in bridges if isinstance(one, nn.Module)), None)
        if bridge is None:
            return fn(*args, **kwargs)  # it will say that this is no model
        with lock_of(bridge).held(f"runs {fn.__name__}"):
            return fn(*args, **kwargs)

    alone.__dict__["_one_at_a_time"] = True  # for the test that no public function was forgotten
    return alone
