"""Figures drawn from results, and reports made of them. plotly is imported when the first one is drawn, not by this module."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechkit.plot._attention import attention as attention
    from mechkit.plot._bars import bars as bars
    from mechkit.plot._circuit import circuit as circuit
    from mechkit.plot._compare import compare as compare
    from mechkit.plot._curve import curve as curve
    from mechkit.plot._default import default as default
    from mechkit.plot._export import read_table as read_table
    from mechkit.plot._export import write_html as write_html
    from mechkit.plot._figure import Figure as Figure
    from mechkit.plot._heads import heads as heads
    from mechkit.plot._heatmap import heatmap as heatmap
    from mechkit.plot._hidden import hidden as hidden
    from mechkit.plot._lens import lens as lens
    from mechkit.plot._notebook import html_of as html_of
    from mechkit.plot._notebook import notebook as notebook
    from mechkit.plot._patches import patches as patches
    from mechkit.plot._report import report as report
    from mechkit.plot._tokens import tokens as tokens

_WHERE = {
    "Figure": "_figure",
    "attention": "_attention",
    "bars": "_bars",
    "circuit": "_circuit",
    "compare": "_compare",
    "curve": "_curve",
    "default": "_default",
    "heads": "_heads",
    "heatmap": "_heatmap",
    "hidden": "_hidden",
    "lens": "_lens",
    "html_of": "_notebook",
    "notebook": "_notebook",
    "patches": "_patches",
    "read_table": "_export",
    "report": "_report",
    "tokens": "_tokens",
    "write_html": "_export",
}
__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"mechkit.plot.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
