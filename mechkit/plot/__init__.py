"""Figures drawn from results. plotly is imported when the first one is drawn, not by `import mechkit.plot`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechkit.plot._circuit import circuit
    from mechkit.plot._curve import curve
    from mechkit.plot._export import read_table, write_html
    from mechkit.plot._figure import Figure
    from mechkit.plot._heatmap import heatmap

__all__ = ["Figure", "circuit", "curve", "heatmap", "read_table", "write_html"]
_WHERE = {
    "Figure": "_figure",
    "circuit": "_circuit",
    "curve": "_curve",
    "heatmap": "_heatmap",
    "read_table": "_export",
    "write_html": "_export",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"mechkit.plot.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
