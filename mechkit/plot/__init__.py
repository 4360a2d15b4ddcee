"""Figures drawn from a `Result`. plotly is imported when the first one is drawn, not by `import mechkit.plot`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechkit.plot._heatmap import heatmap, write_html

__all__ = ["heatmap", "write_html"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from mechkit.plot import _heatmap

        return getattr(_heatmap, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
