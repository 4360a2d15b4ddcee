"""Colours: two themes, each with a diverging map for what has a sign, a sequential one for what has none, and plain colours.

Colour-blind readers can distinguish both maps: blue against red (ColorBrewer's RdBu), and one hue whose lightness alone says
how much. The middle of the diverging map and the low end of the sequential one are the paper's colour, so that nothing looks like
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FONT = "Helvetica, Arial, Noto Sans, sans-serif"
MONOSPACE = "DejaVu Sans Mono, Menlo, Consolas, Noto Sans Mono, monospace"


@dataclass(frozen=True)
class Theme:
    """The colours of a figure.

    Attributes:
        paper, ink, muted, line, grid: Background, text, small print, axes, grid lines.
        absent, masked: Where a cell does not exist; where a mask hides it, in patterns half of which it hides.
        neutral: What the middle of the diverging map is called, in the colour bar's title.
        positive, negative, grey: Lines and marks above 0, below 0, and of neither.
        box, box_end: The boxes of a circuit, and those of its two ends and MLPs.
        diverging: From the lowest to the highest, an odd number.
        sequential: From nothing to most.
        series: For groups, in this order (Okabe and Ito's palette, black or white last).
    """

    name: str
    paper: str
    ink: str
    muted: str
    line: str
    grid: str
    absent: str
    masked: str
    neutral: str
    positive: str
    negative: str
    grey: str
    box: str
    box_end: str
    diverging: tuple[str, ...]
    sequential: tuple[str, ...]
    series: tuple[str, ...]


_OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7")
LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#222222",
    muted="#555555",
    line="#444444",
    grid="#ececec",
    absent="#d4d4d4",
    masked="#f1f1f1",
    neutral="white",
    positive="#2166ac",
    negative="#b2182b",
    grey="#8c8c8c",
    box="#ffffff",
    box_end="#f2f2f2",
    diverging=(
        *("#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#ffffff"),
        *("#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061"),
    ),
    sequential=("#ffffff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b"),
    series=(*_OKABE_ITO, "#222222"),
)
DARK = Theme(
    name="dark",
    paper="#111418",
    ink="#e6e6e6",
    muted="#a8adb3",
    line="#9aa0a6",
    grid="#2a2f36",
    absent="#4a4f57",
    masked="#23272d",
    neutral="black",
    positive="#6baed6",
    negative="#f4775f",
    grey="#8c8c8c",
    box="#1b2027",
    box_end="#2a3038",
    diverging=(
        *("#ffd0bd", "#fb9d80", "#e8694f", "#b23a33", "#621f22", "#111418"),
        *("#163a5c", "#1f649b", "#4393c3", "#7fbfe3", "#cfeaf9"),
    ),
    sequential=("#111418", "#12263c", "#14395c", "#19507f", "#2369a3", "#4184bd", "#6aa2cf", "#98c2e0", "#cbe2f0"),
    series=(*_OKABE_ITO, "#e6e6e6"),
)
_THEMES = {theme.name: theme for theme in (LIGHT, DARK)}


def theme_of(name: str) -> Theme:
    """The theme of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _THEMES:
        raise ValueError(f"theme: expected one of {', '.join(map(repr, _THEMES))}; got {name!r}")
    return _THEMES[name]


def colourscale(colours: Sequence[str]) -> list[list[float | str]]:
    """Evenly spaced, as plotly takes it."""
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def rgb(colour: str) -> tuple[int, ...]:
    """`'#2166ac'` as `(33, 102, 172)`."""
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def rgba(colour: str, opacity: float) -> str:
    """`'#2166ac'` as `'rgba(33,102,172,0.2)'`."""
    red, green, blue = rgb(colour)
    return f"rgba({red},{green},{blue},{opacity})"
