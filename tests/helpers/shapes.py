"""Which functions jaxtyping instruments in tests: those that state a shape. Checks of all others would double the suite's time.

jaxtyping's hook compiles two functions anew for each function of the package when its module is imported, and for each closure
whenever it is made. Here it leaves alone what has no array with a shape among its annotations.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
from jaxtyping import _import_hook

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


def instrument_shapes_alone() -> None:
    """From now on. Before the package is imported."""
    _import_hook.JaxtypingTransformer = ShapesAlone


@contextmanager
def unchecked() -> Iterator[None]:
    """Shape and type checks are off inside, so that a wrong argument reaches the library's own check."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
