"""Which functions jaxtyping instruments in tests: those that state a shape. Checks of all others would double the suite's time.

jaxtyping's hook compiles two functions for each function of the package when its module is imported, and for each closure
whenever it is made. Here it leaves alone what has no array with a shape among its annotations.

And what was found right is not looked at again: a call passes or fails by its arguments' types, by the shapes and dtypes of
arrays and by literals, so that one call of each kind (`kind_of`) tells about all of them. The same holds for what it returns.
Tiny models call the same functions with the same few shapes a thousand times, which took as long as what is tested. Where the
last 200 calls of a function brought nothing new, only one in ten is looked at from then on.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import re
import threading
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType
from typing import Any

import jaxtyping
import numpy as np
import torch
from jaxtyping import _decorator, _import_hook

# `Float[Tensor, "batch pos"]`, and the names of unions of such types
STATES_SHAPE = re.compile(r"\[(Tensor|torch\.Tensor|np\.ndarray), ['\"]|\bCircuits\b")


def states_shape(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether an argument, the returned value or a dataclass's field has a shape."""
    if isinstance(node, ast.ClassDef):
        annotations = [field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]
    else:
        arguments = node.args
        given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        annotations = [one.annotation for one in given if one is not None and one.annotation is not None]
        annotations += [node.returns] if node.returns is not None else []
    return any(STATES_SHAPE.search(ast.unparse(annotation)) for annotation in annotations)


class ShapesAlone(_import_hook.JaxtypingTransformer):
    """Decorates what states a shape."""

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        return super().visit_ClassDef(node) if states_shape(node) else self._inside(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        return super().visit_FunctionDef(node) if states_shape(node) else self._inside(node)

    def _inside(self, node: ast.AST) -> ast.AST:
        self._parents.append(node)
        self.generic_visit(node)
        self._parents.pop()
        return node


class _OthersError(Exception):
    """Of a value whose contents are not known: what holds it is checked each time."""


@functools.cache
def _is_opaque(kind: type) -> bool:
    """Whether values of a type pass or fail by their type alone: anything but a collection."""
    return not issubclass(kind, Collection)


def kind_of(value: Any) -> Hashable:
    """What decides whether a value is what an annotation says. Raises `_OthersError` where that is not known."""
    kind = type(value)
    if isinstance(value, torch.Tensor | np.ndarray):
        return kind, value.shape, value.dtype
    if kind is str:
        return value if len(value) < 50 else str  # one of a few literals, perhaps
    if kind is int:
        return (int, value) if -2 <= value <= 2 else int
    if kind in (tuple, list, torch.Size) and len(value) <= 64:
        return kind, tuple([kind_of(one) for one in value])
    if kind is dict and len(value) <= 64:
        return kind, tuple([(kind_of(key), kind_of(one)) for key, one in value.items()])
    if not _is_opaque(kind):
        raise _OthersError
    return kind


class Checks:
    """The checks of a function, or of all closures that are made of one piece of code: jaxtyping's own, once for each kind of
    call.

    Attributes:
        seen: The kinds of calls that were right, and of what they returned.
        alike: How many calls in a row brought no kind that was not seen before.
    """

    def __init__(self, fn: Callable[..., Any], typechecker: Any) -> None:
        self.seen: dict[Hashable, set[Hashable]] = {}
        self.alike = 0
        self._signature, self._scope = inspect.signature(fn), fn.__globals__
        self._names = {name: getattr(fn, name) for name in ("__name__", "__qualname__", "__module__")}
        self._typechecker = typechecker
        self._running = threading.local()  # .fn: the function, or what gives a value that was computed already

    @functools.cached_property
    def _checked(self) -> Callable[..., Any]:
        """Made at the first call."""

        def body(*args: Any, **kwargs: Any) -> Any:
            return self._running.fn(*args, **kwargs)

        def resolved(annotation: Any) -> Any:
            return _decorator._destring_annotation(annotation, self._scope)

        signature = self._signature
        parameters = [p.replace(annotation=resolved(p.annotation)) for p in signature.parameters.values()]
        returned = resolved(signature.return_annotation)
        body.__dict__["__signature__"] = signature.replace(parameters=parameters, return_annotation=returned)
        for name, value in self._names.items():
            setattr(body, name, value)
        return _decorator.jaxtyped(body, typechecker=self._typechecker)

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.alike += 1
        if self.alike > SETTLED and self.alike % 10:
            return fn(*args, **kwargs)
        try:
            given = kind_of((args, kwargs))
        except _OthersError:
            given = None
        run = fn
        if given in self.seen:
            returned = fn(*args, **kwargs)
            with suppress(_OthersError):
                if kind_of(returned) in self.seen[given]:
                    return returned
            run = functools.partial(_given, returned)
        self._running.fn, self.alike = run, 0
        returned = self._checked(*args, **kwargs)
        if given is not None:
            with suppress(_OthersError):
                self.seen.setdefault(given, set()).add(kind_of(returned))
        return returned


SETTLED = 200  # calls


def _given(value: Any, *_: Any, **__: Any) -> Any:
    return value


_CHECKS: dict[CodeType, Checks] = {}


def jaxtyped_once(fn: Any = None, *, typechecker: Any) -> Any:
    """In the place of `jaxtyping.jaxtyped`."""
    if fn is None:
        return functools.partial(jaxtyped_once, typechecker=typechecker)
    if not inspect.isfunction(fn) or (fn.__closure__ and (fn.__defaults__ or fn.__kwdefaults__)):
        return _decorator.jaxtyped(fn, typechecker=typechecker)  # (a closure's defaults would be kept alive)
    if fn.__code__ not in _CHECKS:
        _CHECKS[fn.__code__] = Checks(fn, typechecker)
    checks = _CHECKS[fn.__code__]

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        return checks.call(fn, args, kwargs)

    return call


def instrument_shapes_alone() -> None:
    """From now on. Before the package is imported. Bytecode is kept under this file's hash: a change here is a change of it."""
    mine = hashlib.md5(Path(__file__).read_bytes()).hexdigest()
    _import_hook.JaxtypingTransformer = ShapesAlone
    jaxtyping.jaxtyped = jaxtyped_once  # by this name the hook decorates
    _import_hook.Typechecker.get_hash = lambda checker: checker.hash + mine


@contextmanager
def unchecked() -> Iterator[None]:
    """Shape and type checks are off inside, so that a wrong argument reaches the library's own check."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
