"""How large a figure is: widths of journals and slides, fonts in points, and what that means in pixels.

1. Every figure is laid out as if its text were 12 pixels high, in the width that it then has (`Paper`), and enlarged or shrunk
   as a whole at the end (`zoom`). So a figure for a column is another layout than one for a page, not a smaller picture of it.
2. `redrawn` is on every drawing function. It makes the paper of the arguments `size`, `width`, `height`, `font_size` and
   `caption`, and keeps in the figure how to draw it again: with other sizes, or without menus and sliders (`again`).
3. What somebody has changed in a figure since it was drawn is found by comparison with a fresh one, and kept (`with_changes`).

A pixel is 1/96 inch, as in browsers and in SVG, a point 1/72 inch.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

if TYPE_CHECKING:
    from mechkit.plot._figure import Figure

CM = 96 / 2.54  # pixels
POINT = 96 / 72
_UNITS = {"px": 1.0, "pt": POINT, "mm": CM / 10, "cm": CM, "in": 96.0}
_LENGTH = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]+)\s*")
BODY = 12.0  # pixels of text in which everything is laid out
TALLEST = 1000.0  # pixels of a figure whose size nobody chose

Length = float | str  # pixels, or text with a unit
P = ParamSpec("P")


@dataclass(frozen=True)
class Preset:
    """A size by name: width in pixels, how tall at most, font size in points, and dots per inch of a PNG."""

    width: float
    tallest: float
    font_size: float
    dpi: float


PRESETS = {
    "column": Preset(8.5 * CM, 23.5 * CM, 8.0, 300.0),
    "page": Preset(17.5 * CM, 23.5 * CM, 8.0, 300.0),
    "slide": Preset(1280.0, 720.0, 16.0, 192.0),
}


@dataclass(frozen=True)
class Paper:
    """What a figure is laid out on, in pixels of a layout whose text is 12 pixels high.

    Attributes:
        width: Of the figure; `None`: as wide as it needs.
        height: Of the figure, if the caller chose.
        tallest: How tall it may be.
        zoom: Pixels of the figure for each of these.
        still: Whether it is a picture, without menus and sliders.
        caption: Whether the small print is written.
        dpi: Of a PNG.
    """

    width: float | None = None
    height: float | None = None
    tallest: float = TALLEST
    zoom: float = 1.0
    still: bool = False
    caption: bool = True
    dpi: float = 192.0

    @property
    def narrow(self) -> bool:
        """Whether there is no room beside the area: the colour bar is below, and titles begin at the edge."""
        return self.width is not None and self.width < 560

    @property
    def letters(self) -> int:
        """Of a label at most."""
        return 13 if self.narrow else 24

    def across(self, left: float, right: float, otherwise: float) -> float:
        """Pixels that an area may take, beside what stands to its left and right; `otherwise` if nobody chose a width."""
        return otherwise if self.width is None else max(self.width - left - right, 60.0)

    def down(self, otherwise: float, besides: float = 0.0) -> float:
        """Pixels that an area may take, besides title, labels and small print (and so many more); at most `otherwise`."""
        usual = 330 if self.narrow else 180 if self.width is not None else 250
        return max(min(otherwise, (self.height or self.tallest) - usual - besides), 60.0)

    def bar(self, right: float = 210) -> float:
        """Room to the right of the area for a colour bar with its title."""
        return 14 if self.narrow else right

    def up_to(self, cell: float) -> float:
        """Pixels of a cell at most: where the width is chosen, it is filled."""
        return cell if self.width is None else 2.4 * cell


def pixels(name: str, length: Length | None) -> float | None:
    """A length in pixels.

    Raises:
        ValueError: it is no length, or not positive.
    """
    if length is None:
        return None
    found: float | None = None
    if isinstance(length, str):
        match = _LENGTH.fullmatch(length)
        found = float(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else None
    elif isinstance(length, int | float) and not isinstance(length, bool):
        found = float(length)
    if found is None or not 0 < found < math.inf:
        raise ValueError(
            f"{name}: expected pixels (1/96 inch), or text with a unit, such as '8.5 cm', '3.3 in' or '240 pt'; got {length!r}"
        )
    return found


def paper_of(
    size: str | None,
    width: Length | None,
    height: Length | None,
    font_size: float | None,
    caption: bool = True,
    *,
    still: bool = False,
) -> Paper:
    """The paper of a figure's arguments.

    Raises:
        ValueError: no such preset, no length, or one that holds no figure.
    """
    if size is not None and size not in PRESETS:
        raise ValueError(f"size: expected one of {', '.join(map(repr, PRESETS))}, or None; got {size!r}")
    if font_size is not None and not (
        isinstance(font_size, int | float) and not isinstance(font_size, bool) and 2 <= font_size <= 200
    ):
        raise ValueError(f"font_size: expected points (1/72 inch) from 2 to 200, got {font_size!r}")
    preset = PRESETS[size] if size is not None else None
    points = font_size or (preset.font_size if preset else BODY / POINT)
    zoom = points * POINT / BODY
    wide, tall = pixels("width", width), pixels("height", height)
    if tall is not None and tall < 100:
        raise ValueError(f"height: expected a number of pixels of at least 100, got {height!r}")
    wide = wide if wide is not None else preset.width if preset else None
    if wide is not None and wide / zoom < 200:
        raise ValueError(
            f"width: expected at least {200 * zoom:.0f} pixels ({200 * zoom / CM:.1f} cm) at a font of {points:g} points, got "
            f"{wide:.0f}; make it wider, or font_size smaller"
        )
    tallest = preset.tallest if preset else TALLEST * max(zoom, 1.0)
    return Paper(
        width=None if wide is None else wide / zoom,
        height=None if tall is None else tall / zoom,
        tallest=tallest / zoom,
        zoom=zoom,
        still=still,
        caption=caption,
        dpi=preset.dpi if preset else 192.0,
    )


# -- drawing again -----------------------------------------------------------------------------------------------------

_WAS = {"curve": "axis"}  # what `size` meant before there were presets, by function
_ASKED = ("size", "width", "height", "font_size", "caption")


def redrawn(fn: Callable[P, Figure]) -> Callable[P, Figure]:
    """On a drawing function: what its `size` is inside is a `Paper`, made of all that was asked for."""

    @functools.wraps(fn)
    def draw(*args: P.args, **kwargs: P.kwargs) -> Figure:
        asked: dict[str, Any] = {name: kwargs.get(name) for name in _ASKED}
        asked["caption"] = asked["caption"] is not False  # of a curve it may be the small print itself
        if asked["size"] is not None and asked["size"] not in PRESETS and fn.__name__ in _WAS:
            kwargs[_WAS[fn.__name__]] = asked["size"]
            asked["size"] = None
        notes: Any = kwargs.get("annotations")
        rest: dict[str, Any] = {name: value for name, value in kwargs.items() if name not in (*_ASKED, "annotations")}
        if not isinstance(kwargs.get("caption", True), bool):
            rest["caption"] = kwargs["caption"]

        def again(paper: Paper, more: Mapping[Any, str] | None = None) -> Figure:
            figure = fn(*args, **{**rest, "size": paper})
            figure.annotate({**(notes or {}), **(more or {})})
            zoom(figure, paper.zoom)
            figure._paper, figure._again = paper, again
            figure._origins = tuple(_origins((*args, *kwargs.values())))
            return figure

        return again(asked.pop("size") if isinstance(asked["size"], Paper) else paper_of(**asked))

    return draw


def _origins(things: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    """Where the numbers of arguments come from, of those that know it."""
    for thing in things:
        if isinstance(origin := getattr(thing, "provenance", None), Mapping):
            yield origin
        elif isinstance(thing, Mapping | list | tuple):
            yield from _origins(thing.values() if isinstance(thing, Mapping) else thing)


def paper_in(size: str | Paper | None) -> Paper:
    """What `redrawn` has put in the place of `size`."""
    return size if isinstance(size, Paper) else paper_of(size, None, None, None)


def resized(figure: Figure, paper: Paper, annotations: Mapping[Any, str] | None = None, **changes: Any) -> Figure:
    """The figure on another paper, with what somebody has changed in it since it was drawn."""
    again, before = figure._again, figure._paper
    assert again is not None
    assert before is not None
    return with_changes(again(replace(paper, **changes), annotations), again(before), figure)


def with_changes(fresh: Figure, before: Figure, now: Figure) -> Figure:
    """`fresh`, with what distinguishes `now` from `before`: the same drawing as it was made, and as it is."""
    old, new = before.to_plotly_json(), now.to_plotly_json()
    for i, trace in enumerate(new["data"]):
        if i >= len(old["data"]):
            fresh.add_trace(trace)
        elif (changed := _changed(old["data"][i], trace)) and len(fresh.data) == len(old["data"]):
            fresh.data[i].update(changed, overwrite=True)
    changed = _changed(old["layout"], new["layout"])
    for name in ("annotations", "shapes", "images"):
        one, two = (list(each["layout"].get(name) or ()) for each in (old, new))
        changed.pop(name, None)
        for note in two[len(one) :]:
            fresh.add_layout_image(note) if name == "images" else getattr(fresh, f"add_{name[:-1]}")(note)
        if len(getattr(fresh.layout, name)) == len(two):
            for part, was, now_is in zip(getattr(fresh.layout, name), one, two, strict=False):
                part.update(_changed(was, now_is))
    fresh.update_layout(changed)
    return fresh


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What of `new` is not in `old`; `None` for what is gone."""
    found: dict[str, Any] = {name: None for name in old if name not in new}
    for name, value in new.items():
        was = old.get(name)
        if isinstance(value, Mapping) and isinstance(was, Mapping):
            if inner := _changed(was, value):
                found[name] = inner
        elif not _same(was, value):
            found[name] = value
    return found


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, np.ndarray) or isinstance(two, np.ndarray):
        one, two = np.asarray(one), np.asarray(two)
        if one.shape != two.shape:
            return False
        return bool(np.array_equal(one, two, equal_nan=one.dtype.kind == two.dtype.kind == "f"))
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_same(one[name], two[name]) for name in one)
    return bool(one == two) or (one != one and two != two)


# -- enlarging and shrinking -------------------------------------------------------------------------------------------

_IN_PIXELS = {
    *("width", "height", "l", "r", "t", "b", "pad", "size", "thickness", "standoff", "xshift", "yshift", "ax", "ay"),
    *("ticklen", "tickwidth", "linewidth", "gridwidth", "zerolinewidth", "outlinewidth", "borderwidth", "borderpad"),
    *("arrowwidth", "xpad", "ypad", "xgap", "ygap", "tracegroupgap", "itemwidth"),
}
_DASH = re.compile(r"(\d+(?:\.\d+)?)px")


def zoom(figure: Figure, by: float) -> None:
    """Multiply all that is measured in pixels. Data, and what is measured in data or in shares, stays."""
    if by == 1.0:
        return
    for trace in figure.data:
        trace.update(_zoomed(trace.to_plotly_json(), by, {"width", "x", "y", "z", "base", "text", "hovertext"}))
    for name in ("annotations", "shapes"):
        for one in getattr(figure.layout, name):
            one.update(_zoomed(one.to_plotly_json(), by))
    layout = figure.layout.to_plotly_json()
    for name in ("annotations", "shapes"):
        layout.pop(name, None)
    figure.update_layout(_zoomed(layout, by))


def _zoomed(part: Mapping[str, Any], by: float, skipped: set[str] | frozenset[str] = frozenset()) -> dict[str, Any]:
    """The properties that change, with their new values."""
    found: dict[str, Any] = {}
    for name, value in part.items():
        if name in skipped:
            continue
        if isinstance(value, Mapping):
            if inner := _zoomed(value, by):
                found[name] = inner
        elif name == "size" and isinstance(value, int | float | np.number):
            found[name] = max(float(value) * by, 1.0)
        elif name in _IN_PIXELS and isinstance(value, int | float | np.number) and not isinstance(value, bool):
            found[name] = type(value)(value * by) if isinstance(value, np.number) else value * by
        elif name == "size" and isinstance(value, list | tuple | np.ndarray):
            found[name] = [float(one) * by for one in value]
        elif name == "len" and part.get("lenmode") == "pixels":
            found[name] = value * by
        elif name == "dash" and isinstance(value, str) and "px" in value:
            found[name] = _DASH.sub(lambda match: f"{float(match[1]) * by:g}px", value)
        elif name in ("updatemenus", "sliders") and isinstance(value, list | tuple):
            found[name] = [_zoomed(one, by) for one in value]  # plotly merges them one by one
    return found
