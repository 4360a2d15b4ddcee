"""Additions to the API reference that cannot be read off the source."""

from __future__ import annotations

import re
from typing import Any

from griffe import Alias, Extension, Module, Object


class Mechkit(Extension):
    """Two things:

    1. Google style's `Example:` is an admonition to griffe; `Examples:` is a section, whose `>>>` lines are code.
    2. Where a package imports a function from a module of the same name, Python's name is the function, and griffe's the module.
    """

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^(\s*)Example:$", r"\1Examples:", obj.docstring.value)

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        for name, target in pkg.imports.items():
            module = _member(pkg, target)
            if isinstance(module, Module) and name in module.members and name in pkg.members:
                pkg.members[name] = Alias(name, f"{module.path}.{name}", parent=pkg)


def _member(pkg: Module, path: str) -> Any:
    found: Any = pkg
    for part in path.split(".")[1:]:
        if not isinstance(found, Module) or part not in found.members:
            return None
        found = found.members[part]
    return found
