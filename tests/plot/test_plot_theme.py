"""Colours as a contract: what a colour-blind reader, and one who prints in grey, can still distinguish."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import mechkit.plot
from mechkit.plot._theme import DARK, LIGHT, Theme, colourscale, rgba, theme_of

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    ),
}
THEMES = pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)


def lab(colour: str, seen: np.ndarray = BLINDNESS["none"]) -> np.ndarray:
    """CIE L*a*b* of a colour as someone sees it."""
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(seen @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear / np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(a: str, b: str) -> float:
    """WCAG's contrast ratio."""

    def luminance(colour: str) -> float:
        srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return float(
            np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
        )

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@THEMES
def test_sequential_map_is_readable_by_lightness_alone(theme: Theme) -> None:
    lightness = [lab(colour)[0] for colour in theme.sequential]
    steps = np.diff(lightness) * (1 if theme is DARK else -1)
    assert (steps > 3).all()  # monotonic, and no step too small to see
    assert theme.sequential[0] == theme.paper  # nothing looks like nothing


@THEMES
@pytest.mark.parametrize("blindness", BLINDNESS)
def test_both_ends_of_the_diverging_map_are_distinguishable(theme: Theme, blindness: str) -> None:
    colours = theme.diverging
    assert len(colours) % 2 == 1
    middle = len(colours) // 2
    assert colours[middle] == theme.paper
    seen = [lab(colour, BLINDNESS[blindness]) for colour in colours]
    for i in range(middle):  # a value and its negative
        if i < middle - 1:
            assert np.linalg.norm(seen[i] - seen[-1 - i]) > 12, (i, blindness)
    for side in (range(middle + 1), range(len(colours) - 1, middle - 1, -1)):  # from the end to the middle
        lightness = [seen[i][0] for i in side]
        assert (np.diff(lightness) * (1 if theme is LIGHT else -1) > 2).all()


@THEMES
def test_sides_of_the_diverging_map_are_equally_strong(theme: Theme) -> None:
    middle = len(theme.diverging) // 2
    for i in range(middle):
        low, high = (lab(theme.diverging[j])[0] for j in (i, -1 - i))
        assert abs(low - high) < 14


@THEMES
@pytest.mark.parametrize("blindness", BLINDNESS)
def test_series_and_signs_are_distinguishable(theme: Theme, blindness: str) -> None:
    seen = [lab(colour, BLINDNESS[blindness]) for colour in theme.series]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 9
    positive, negative = (lab(colour, BLINDNESS[blindness]) for colour in (theme.positive, theme.negative))
    assert np.linalg.norm(positive - negative) > 25


@THEMES
def test_text_can_be_read(theme: Theme) -> None:
    assert contrast(theme.ink, theme.paper) > 7
    assert contrast(theme.muted, theme.paper) > 4.5
    assert contrast(theme.ink, theme.box) > 7
    for colour in (theme.positive, theme.negative):
        assert contrast(colour, theme.paper) > 3


def test_control_rainbow_is_not_readable_by_lightness() -> None:
    rainbow = ["#000080", "#0000ff", "#00ffff", "#ffff00", "#ff0000", "#800000"]
    assert not (np.diff([lab(colour)[0] for colour in rainbow]) > 3).all()


def test_helpers() -> None:
    assert colourscale(("#000000", "#888888", "#ffffff")) == [[0.0, "#000000"], [0.5, "#888888"], [1.0, "#ffffff"]]
    assert rgba("#2166ac", 0.2) == "rgba(33,102,172,0.2)"
    assert theme_of("dark") is DARK
    with pytest.raises(ValueError, match="theme: expected one of 'light', 'dark'; got 'beige'"):
        theme_of("beige")


def test_only_one_file_makes_scales() -> None:
    """`_scale.py` decides what colours mean: no other file has the ends or the colours of a colour axis."""
    folder = Path(mechkit.plot.__file__).parent
    makers = {path.name for path in folder.glob("*.py") if re.search(r"\bcm(in|ax)\b|\bcolorscale\b", path.read_text())}
    assert makers == {"_scale.py"}
