"""Objects with a default picture. They do not know how it is drawn: `mechkit.plot` is looked up when one is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechkit.plot import Figure


class Drawn:
    """A mixin: `plot()`, and the picture in place of the text in a notebook."""

    def plot(self, **options: Any) -> Figure:
        """The default picture of this object; nothing is shown or written.

        Args:
            **options: Of the function of `mechkit.plot` that draws it (its name is `figure.facts.kind`), such as `title=`,
                `theme="dark"`.

        Returns:
            A plotly figure: `.show()` it, or `.save()` it as .html, .png, .svg, .pdf, .json or .csv.

        Raises:
            ValueError: there is no picture of so many dims (choose labels with `sel()`), or an option is wrong.
        """
        return import_module("mechkit.plot").default(self, **options)

    def _repr_html_(self) -> str | None:
        try:
            figure = self.plot()
        except ValueError:  # no default picture: notebooks show the text instead
            return None
        return import_module("mechkit.plot").html_of(figure)
