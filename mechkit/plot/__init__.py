"""Figures drawn from results. plotly is imported when the first one is drawn, not by `import mechkit.plot`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechkit.plot._circuit import circuit
    from mechkit.plot._curve import curve
    from mechkit.plot._heatmap import heatmap, write_html

__all__ = ["circuit", "curve", "heatmap", "write_html"]
_WHERE = {"circuit": "_circuit", "curve": "_curve", "heatmap": "_heatmap", "write_html": "_heatmap"}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"mechkit.plot.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
