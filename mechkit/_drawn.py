"""Objects with a default picture. They do not know how it is drawn: the drawing module registers itself in `DRAWERS`.

`mechkit/__init__.py` names the module that does so (`module`); it is loaded when the first picture is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechkit.plot import Figure

DRAWERS: dict[
    str, Callable[..., Any]
] = {}  # "figure": object, options -> figure; "html": figure -> fragment for a notebook
module = ""


def _drawer(name: str) -> Callable[..., Any]:
    if name not in DRAWERS:
        import_module(module)
    return DRAWERS[name]


class Drawn:
    """A mixin: `plot()`, and the picture in place of the text in a notebook."""

    def plot(self, **options: Any) -> Figure:
        """The default picture of this object; nothing is shown or written.

        Args:
            **options: Of the function of `mechkit.plot` that draws it (its name is `figure.facts.kind`), such as `title=`,
                `theme="dark"`, and of all of them: `size="column"`, `width=`, `height=`, `font_size=`, `caption=`, `annotations=`
                (see `Figure.resized`).

        Returns:
            A plotly figure: `.show()` it, or `.save()` it as .html, .png, .svg, .pdf, .json or .csv.

        Raises:
            ValueError: there is no picture of so many dims (choose labels with `sel()`), or an option is wrong.
        """
        return _drawer("figure")(self, **options)

    def _repr_html_(self) -> str | None:
        try:
            figure = self.plot()
        except ValueError:  # no default picture: notebooks show the text instead
            return None
        fragment: str = _drawer("html")(figure)
        return fragment
