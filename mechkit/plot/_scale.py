"""What colours mean: the scale of a set of numbers, chosen by what kind of numbers they are.

1. A rank is drawn as its logarithm, best first; a log-probability from the lowest to 0.
2. What has no sign (a probability, attention, an entropy) runs from the paper's colour at 0 to the darkest at the largest.
3. Everything else is centred on 0, or on what the caller says: blue above, red below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechkit.plot._text import number, technique_of
from mechkit.plot._theme import Theme, colourscale, rgb
from mechkit.result import Result

_UNSIGNED_UNITS = ("rank", "attention", "fraction", "capacity", "p")
_UNSIGNED_METRICS = ("prob", "entropy", "kl", "loss", "surprisal")  # where they are not what an attribution is of
_LENSES = ("logit lens", "top tokens", "patchscope", "tuned lens")


def check_scale(center: float | None, zmax: float | None) -> None:
    """Raises `ValueError` unless the caller's ends of a scale are finite numbers, `zmax` a positive one."""
    for name, value in (("center", center), ("zmax", zmax)):
        finite = isinstance(value, int | float) and math.isfinite(value)
        if value is not None and not (finite and (name == "center" or value > 0)):
            expected = "a positive number" if name == "zmax" else "a finite number"
            raise ValueError(f"{name}: expected {expected}, got {value!r}")


def is_unsigned(result: Result) -> bool:
    """Whether its values are never below 0, by what they are. An attribution of a probability has a sign."""
    if result.baseline:
        return False
    return result.unit in _UNSIGNED_UNITS or (result.metric in _UNSIGNED_METRICS and _is_reading(result))


def is_lens(result: Result) -> bool:
    """Whether a lens read it: its values are of a distribution itself, not of what adds to it."""
    return technique_of(result.provenance) in _LENSES


def _is_reading(result: Result) -> bool:
    """Also of a result that does not say where it comes from."""
    return is_lens(result) or not technique_of(result.provenance)


@dataclass(frozen=True)
class Scale:
    """What colours mean.

    Attributes:
        low, high: What is drawn at the two ends of the map.
        colours: From `low` to `high`.
        title: Lines of plain text: what is coloured, and which way it goes.
        logarithmic: Whether log10(1 + value) is drawn (ranks).
    """

    low: float
    high: float
    colours: tuple[str, ...]
    title: tuple[str, ...]
    logarithmic: bool = False

    def drawn(self, values: np.ndarray) -> np.ndarray:
        """What plotly is given for these values."""
        return np.log10(1 + values) if self.logarithmic else values

    def axis(self) -> dict[str, Any]:
        """A plotly colour axis, its bar without a place."""
        bar: dict[str, Any] = {"outlinewidth": 0, "lenmode": "pixels", "exponentformat": "power"}
        if self.logarithmic:
            ticks = np.array([0, *(10.0**power for power in range(0 if self.high < 1 else 1, 9))])
            ticks = ticks[np.log10(1 + ticks) <= self.high + 1e-9]
            bar |= {"tickvals": np.log10(1 + ticks).tolist(), "ticktext": [f"{tick:,.0f}" for tick in ticks]}
        return {"cmin": self.low, "cmax": self.high, "colorscale": colourscale(self.colours), "colorbar": bar}

    def inks(self, values: np.ndarray, theme: Theme) -> list[str]:
        """For each value the one of the theme's two colours of text that is easier to read on its colour."""
        place = (self.drawn(values).ravel() - self.low) / (self.high - self.low)
        stops = np.linspace(0, 1, len(self.colours))
        channels = np.array([rgb(colour) for colour in self.colours]).T
        painted = np.stack([np.interp(place, stops, channel) for channel in channels], -1)
        painted[np.isnan(place)] = rgb(theme.absent)
        background = _luminance(painted)
        ink, paper = (_luminance(np.array(rgb(colour))) for colour in (theme.ink, theme.paper))
        on_ink, on_paper = (
            (np.maximum(background, other) + 0.05) / (np.minimum(background, other) + 0.05) for other in (ink, paper)
        )
        return np.where(on_ink >= on_paper, theme.ink, theme.paper).tolist()


def choose_scale(
    values: np.ndarray,
    result: Result,
    theme: Theme,
    name: str,
    *,
    center: float | None = None,
    zmax: float | None = None,
    middle: str = "0",
) -> Scale:
    """The scale of values that go together.

    Args:
        values: All that are drawn; NaN is left out.
        result: Whose metric, unit and technique say what kind of numbers they are.
        theme: Its colours.
        name: What is coloured, for the colour bar.
        center, zmax: As the caller wants them.
        middle: What 0 is, if `center` is None.
    """
    present = values[~np.isnan(values)]
    most = "darker" if theme.name == "light" else "brighter"
    lowest, highest = (float(present.min()), float(present.max())) if len(present) else (0.0, 0.0)
    if center is None and result.unit == "rank" and lowest >= 0:
        end = float(np.log10(1 + (zmax or highest or 1.0)))
        told = (name, "0 = top of the vocabulary", f"{most} is a better (lower) rank", "logarithmic")
        return Scale(0.0, end, theme.sequential[::-1], told, logarithmic=True)
    if center is None and result.metric == "log_prob" and _is_reading(result) and highest <= 0:
        low = -zmax if zmax else lowest or -1.0
        return Scale(low, 0.0, theme.sequential, (name, f"{most} is higher", "0 = certain"))
    if center is None and is_unsigned(result) and lowest >= 0:
        return Scale(0.0, zmax or highest or 1.0, theme.sequential, (name, f"{theme.neutral} = 0", f"{most} is higher"))
    at = center or 0.0
    reach = zmax or max(abs(highest - at), abs(lowest - at)) or 1.0
    meaning = (f"{theme.neutral} = {middle if center is None else number(at)}", "blue is higher, red is lower")
    return Scale(at - reach, at + reach, theme.diverging, (name, *meaning))


def _luminance(rgb: np.ndarray) -> np.ndarray | np.float64:
    """Relative luminance, as WCAG 2.2 defines it, of `[… 3]` in 0..255."""
    part = rgb / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])
