"""The decorator that checks a function's arguments."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar, overload

from mechkit._check._kinds import Kind, arrays_of, in_range, kind_of, plain
from mechkit._check._sentences import ArgumentTypeError, check_passed, misfit, refusal

P = ParamSpec("P")
R = TypeVar("R")


@overload
def checked(fn: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def checked(
    *, passes: Callable[..., Any] | None = None, **ranges: tuple[float, float]
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def checked(fn: Any = None, /, *, passes: Callable[..., Any] | None = None, **ranges: tuple[float, float]) -> Any:
    """Checks the arguments of every call of a function or, of a class, its constructor's.

    Args:
        fn: The function, or a dataclass.
        passes: The function that `**kwargs` are handed on to, whose arguments they must be.
        **ranges: The lowest and highest number that an argument may be here, where its name alone does not say so.
    """
    if fn is None:
        return functools.partial(checked, passes=passes, **ranges)
    if isinstance(fn, type):
        fn.__init__ = _checked_constructor(fn)  # type: ignore[misc]
        return fn
    return _with_door(fn, _name_of(fn), passes, ranges)


def _checked_constructor(cls: type) -> Any:
    init: Any = cls.__init__  # type: ignore[misc]
    door = _with_door(init, cls.__name__, None, {}, vars(sys.modules[cls.__module__]))
    signature = inspect.signature(init)
    names = vars(sys.modules[cls.__module__])
    resolved = [p.replace(annotation=_resolved(p.annotation, names)) for p in signature.parameters.values()]
    door.__signature__ = signature.replace(parameters=resolved)  # for those who look for types at the constructor
    return door


def _with_door(
    fn: Any,
    called: str,
    passes: Callable[..., Any] | None,
    ranges: Mapping[str, tuple[float, float]],
    names: Mapping[str, Any] | None = None,
) -> Any:
    signature = inspect.signature(fn)

    @functools.cache
    def learned() -> tuple[dict[str, Kind], dict[str, tuple[type, ...]]]:
        """Each argument's kind, and the arrays that it may be. Annotations are resolved at the first call, when all modules are
        there."""
        raw = inspect.unwrap(fn)
        scope = _Names(raw.__globals__ if names is None else names)
        annotations = {name: _resolved(p.annotation, scope) for name, p in signature.parameters.items()}
        stated = {name: of for name, of in annotations.items() if of not in (Any, inspect.Parameter.empty)}
        kinds = {name: in_range(name, kind_of(of), ranges.get(name)) for name, of in stated.items()}
        return kinds, {name: arrays_of(of) for name, of in stated.items()}

    @functools.wraps(fn)
    def door(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise misfit(called, signature, passes, args, kwargs, error) from None
        kinds, arrays = learned()
        for name, value in list(bound.arguments.items()):
            parameter = signature.parameters[name]
            if parameter.kind is parameter.VAR_KEYWORD:
                if passes is not None:
                    check_passed(called, signature, passes, value)
                continue
            kind = kinds.get(name)
            if kind is None or value is parameter.default:
                continue
            several = parameter.kind is parameter.VAR_POSITIONAL
            taken = []
            for one in value if several else (value,):
                fault = kind.fault(one)
                simple = plain(one, arrays[name])
                if fault is not None and (simple is one or kind.fault(simple) is not None):
                    raise refusal(name, fault)
                taken.append(simple)
            bound.arguments[name] = tuple(taken) if several else taken[0]
        return fn(*bound.args, **bound.kwargs)

    return door


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """An error inside says which argument it is about."""
    try:
        yield
    except ValueError as error:
        kind = ArgumentTypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{argument}: {error}") from None


def _name_of(fn: Any) -> str:
    return str(getattr(fn, "__qualname__", fn)).removesuffix(".__init__")


class _Names(dict[str, Any]):
    """A module's names, and mechkit's public ones, which are loaded when they are looked up: a module that names a class for type
    checkers alone names it for this too, whether or not somebody has used that class by then."""

    def __missing__(self, name: str) -> Any:
        try:
            return getattr(sys.modules["mechkit"], name)
        except AttributeError:
            raise KeyError(name) from None


def _resolved(annotation: Any, names: Mapping[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, {}, names)  # our own source's annotation
    except Exception:  # a name that is there for type checkers alone
        return Any
