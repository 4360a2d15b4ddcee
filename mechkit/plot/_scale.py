"""What colours mean, in every figure: which map, where its middle and its ends are, and what the colour bar says.

1. A rank is drawn as its logarithm, best first; a log-probability from the lowest to 0.
2. What has no sign (a probability, attention, an entropy) runs from the paper's colour at 0 to the darkest at the largest.
3. Everything else is centred on 0, on the base run, or on what the caller says: blue above, red below, the farthest value from
   the middle in the darkest colour of its side, unless the caller says `zmax`. Equal distances have equal strength on both sides.
   The bar ends where the values do, so that no part of it is of colours that nothing has; it goes on to the other run if that is
   not far. Base run and other run are marked on it.
4. More cells than a page can hold as numbers are drawn as bytes (`Scale.coded`): steps from 0 to the ends, and one for no cell.
5. Layers are steps of the sequential map, other numbers (labels of prompts) a ramp from the lowest to the highest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechkit.plot._text import number, plain, technique_of
from mechkit.plot._theme import Theme, colourscale, rgb
from mechkit.result import Label, Result

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
        title: Lines of plain text: what is coloured, what white is, and which way it goes.
        absent: The colour of a cell that does not exist.
        stops: Where the colours are, from 0 (`low`) to 1 (`high`); evenly spaced if empty.
        marks: Values that the bar names, such as the clean run's.
        logarithmic: Whether log10(1 + value) is drawn (ranks).
        signed: Whether it has a middle, though perhaps only one side of it.
        coded: Whether bytes are drawn: `1..255` for `0..high` (`-127..127` for `low..high`, if there is a middle, 0), and the
            lowest byte for a cell that does not exist. So a value is within half a step of what is drawn; one below half a step
            above 0 within one.
    """

    low: float
    high: float
    colours: tuple[str, ...]
    title: tuple[str, ...]
    absent: str
    logarithmic: bool = False
    coded: bool = False
    stops: tuple[float, ...] = ()
    marks: tuple[tuple[float, str], ...] = ()
    signed: bool = False

    @property
    def colorscale(self) -> list[list[float | str]]:
        """As plotly takes it."""
        if not self.stops:
            return colourscale(self.colours)
        return [[place, colour] for place, colour in zip(self.stops, self.colours, strict=True)]

    @property
    def steps(self) -> int:
        """From 0 to `high`, of bytes."""
        return 127 if self.low < 0 else 255

    def drawn(self, values: np.ndarray) -> np.ndarray:
        """What plotly is given for these values."""
        if not self.coded:
            return np.log10(1 + values) if self.logarithmic else values
        levels = np.rint(values / self.high * self.steps)
        if self.low < 0:
            return np.where(np.isnan(values), -128, levels).astype(np.int8)
        return np.where(np.isnan(values), 0, np.maximum(levels, 1)).astype(np.uint8)

    def axis(self, pixels: float, *more: str, lying: bool = False) -> dict[str, Any]:
        """A plotly colour axis, with a bar of that length that has the title and perhaps more lines above it.

        A `lying` bar has no title: it is written beside it.
        """
        bar = colour_bar(pixels, *self.title, *more)
        bar["title"]["text"] += "<br>&nbsp;"  # room between the text and the bar
        bar["exponentformat"] = "power"
        if lying:
            del bar["title"], bar["y"], bar["yanchor"]
        if self.logarithmic:
            ticks = np.array([0, *(10.0**power for power in range(0 if self.high < 1 else 1, 9))])
            ticks = ticks[np.log10(1 + ticks) <= self.high + 1e-9]
            bar |= {"tickvals": np.log10(1 + ticks).tolist(), "ticktext": [f"{tick:,.0f}" for tick in ticks]}
        elif self.marks and not self.coded:
            bar |= self._marked(pixels if lying else pixels - 17 * (len(self.title) + len(more) + 1), lying)
        if not self.coded:
            return {"cmin": self.low, "cmax": self.high, "colorscale": self.colorscale, "colorbar": bar}
        edge = 0.5 / 255  # below it is the lowest byte alone
        first = 1 / 255 if self.low < 0 else 0.0
        places = [max(edge, first + (1 - first) * float(place)) for place, _ in colourscale(self.colours)]
        colours = [[0.0, self.absent], [edge, self.absent], [edge, self.colours[0]]]
        colours += [[place, colour] for place, colour in zip(places, self.colours, strict=True)]
        ends = (-128.0, 127.0) if self.low < 0 else (0.0, 255.0)
        return {"cmin": ends[0], "cmax": ends[1], "colorscale": colours, "colorbar": bar}

    def _marked(self, pixels: float, lying: bool) -> dict[str, Any]:
        """Ticks at round numbers and at the marks, which have their names; what would overlap a mark is left out.

        `pixels`: of the bar itself, without its title.
        """
        within = [(value, name) for value, name in self.marks if self.low <= value <= self.high]
        per_pixel = (self.high - self.low) / pixels
        apart = (46 if lying else 15) * per_pixel
        ticks = round_numbers(self.low, self.high, max(2, min(6, int(pixels / (60 if lying else 24)))))
        kept = [(tick, number(tick)) for tick in ticks if all(abs(tick - value) > apart for value, _ in within)]
        taken: list[float] = []
        for value, name in sorted(within):
            crowded = lying and any(abs(value - other) < 76 * per_pixel for other in taken)
            taken.append(value)
            words = f"{number(value)}<br>{'<br>' * crowded}{name}" if lying else f"{number(value)} = {name} run"
            kept.append((value, words))
        kept.sort()
        return {"tickvals": [value for value, _ in kept], "ticktext": [text for _, text in kept], "ticks": "outside"}

    def even_ticks(self) -> dict[str, Any]:
        """Ticks of a colour bar at equal shares of the farthest value, in few digits; of bytes too."""
        if self.low < 0 and self.low != -self.high:  # no more of the map than the values need: plotly's own ticks
            return {}
        shares = np.linspace(-1 if self.low < 0 else 0, 1, 5 if self.low < 0 else 6)
        notes = [number(share * self.high, 2 if abs(share) < 1 else 3) for share in shares]
        return {"tickvals": shares * (self.steps if self.coded else self.high), "ticktext": notes}

    def inks(self, values: np.ndarray, theme: Theme) -> list[str]:
        """For each value the one of the theme's two colours of text that is easier to read on its colour."""
        place = (self.drawn(values).ravel() - self.low) / (self.high - self.low)
        stops = self.stops or np.linspace(0, 1, len(self.colours))
        channels = np.array([rgb(colour) for colour in self.colours]).T
        painted = np.stack([np.interp(place, stops, channel) for channel in channels], -1)
        painted[np.isnan(place)] = rgb(self.absent)
        background = _luminance(painted)
        ink, paper = (_luminance(np.array(rgb(colour))) for colour in (theme.ink, theme.paper))
        on_ink, on_paper = (
            (np.maximum(background, other) + 0.05) / (np.minimum(background, other) + 0.05) for other in (ink, paper)
        )
        return np.where(on_ink >= on_paper, theme.ink, theme.paper).tolist()


# -- which scale -------------------------------------------------------------------------------------------------------


def choose_scale(
    values: np.ndarray,
    results: Result | Sequence[Result],
    theme: Theme,
    *names: str,
    center: float | None = None,
    zmax: float | None = None,
    middle: str | None = None,
    linear: bool = False,
    whole: bool = False,
    marks: Mapping[str, float] | None = None,
) -> Scale:
    """The scale of values that go together.

    Args:
        values: All that are drawn; NaN is left out.
        results: Whose metric, unit and technique say what kind of numbers they are: one, or several that share the scale.
        theme: Its colours.
        *names: What is coloured, for the colour bar: lines of plain text.
        center, zmax: As the caller wants them.
        middle: What the centre is called, if not by its number.
        linear: Whether ranks and log-probabilities are drawn as other numbers are.
        whole: Whether a scale with a middle reaches as far on both sides.
        marks: Runs by name, and where they are on the scale.
    """
    several = [results] if isinstance(results, Result) else list(results)
    first = several[0]
    most = "darker" if theme.name == "light" else "brighter"
    lowest, highest = _ends(values)
    if center is None and not linear and first.unit == "rank" and lowest >= 0:
        end = float(np.log10(1 + (zmax or highest or 1.0)))
        notes = (*names, "0 = top of the vocabulary", f"{most} is a better (lower) rank", "logarithmic")
        return Scale(0.0, end, theme.sequential[::-1], notes, theme.absent, logarithmic=True)
    if center is None and not linear and first.metric == "log_prob" and _is_reading(first) and highest <= 0:
        notes = (*names, f"{most} is higher", "0 = certain")
        return Scale(-zmax if zmax else lowest or -1.0, 0.0, theme.sequential, notes, theme.absent)
    if center is None and lowest >= 0 and all(map(is_unsigned, several)):
        notes = (*names, f"{theme.neutral} = 0", f"{most} is higher")
        return Scale(0.0, zmax or highest or 1.0, theme.sequential, notes, theme.absent)
    at = center or 0.0
    reach = zmax or max(abs(highest - at), abs(lowest - at)) or 1.0  # any will do where all is white
    white = f"{theme.neutral} = {number(at) if middle is None else middle}"
    found = dict(marks or {})
    if whole or zmax is not None or highest <= lowest or not math.isfinite(reach):
        ends, sides = (at - reach, at + reach), "blue is higher, red is lower"
    else:
        low, high = min(lowest, at), max(highest, at)
        for value in found.values():  # as far as the other run, if no more than half of the bar is then without values
            if high - low >= 0.5 * (max(high, value) - min(low, value)):
                low, high = min(low, value), max(high, value)
        reach, ends = max(high - at, at - low), (low, high)
        sides = "blue is higher, red is lower" if low < at < high else "blue is higher" if high > at else "red is lower"
    named = first.unit != "normalized"  # its runs are named in any case
    beyond = [
        f"{name} run = {number(value)}, off this bar"
        for name, value in found.items()
        if named and not inside(value, ends)
    ]
    stops, colours = _cut(theme.diverging, at, reach, ends)
    return Scale(
        *ends,
        colours,
        (*names, white, sides, *beyond),
        theme.absent,
        signed=True,
        stops=stops,
        marks=tuple((v, n) for n, v in found.items()),
    )


def inside(value: float, ends: tuple[float, float]) -> bool:
    """Whether a number is on a scale."""
    return ends[0] <= value <= ends[1]


def _cut(
    colours: Sequence[str], at: float, reach: float, ends: tuple[float, float]
) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """The part of a diverging map from `ends[0]` to `ends[1]`, the whole of which goes from `at - reach` to `at + reach`."""
    places = np.linspace(at - reach, at + reach, len(colours))
    if ends == (at - reach, at + reach):
        return (), tuple(colours)
    low, high = ends
    channels = np.array([rgb(colour) for colour in colours], dtype=float).T
    kept = [low, *(place for place in places.tolist() if low < place < high), high]
    mixed = np.stack([np.interp(kept, places, channel) for channel in channels], -1).round().astype(int)
    stops = tuple((place - low) / (high - low) for place in kept)
    return (0.0, *stops[1:-1], 1.0), tuple(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in mixed.tolist())


def round_numbers(low: float, high: float, n: int) -> list[float]:
    """About `n` round numbers from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / n
    ten = 10.0 ** math.floor(math.log10(rough))
    step = next(ten * by for by in (1, 2, 5, 10) if rough <= ten * by * 1.0001)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _ends(values: np.ndarray) -> tuple[float, float]:
    """The lowest and the highest; 0 and 0 where there is no number. No copy: attention may have 40 million."""
    if not values.size:
        return 0.0, 0.0
    low, high = (float(end.reduce(values, axis=None)) for end in (np.fmin, np.fmax))
    return (0.0, 0.0) if math.isnan(low) else (low, high)


@dataclass(frozen=True)
class Around:
    """The scale of results that are compared with a base run, and whether their changes from it are drawn rather than the values.

    `notes` say in the caption what the runs' own metric is, and why changes are drawn where that is not plain. `alike`: whether
    all cells are compared with the same number.
    """

    scale: Scale
    changes: bool = False
    notes: tuple[str, ...] = ()
    alike: bool = True


def scale_around_base(
    results: Sequence[Result],
    values: np.ndarray,
    changes: np.ndarray,
    theme: Theme,
    *,
    center: float | None = None,
    zmax: float | None = None,
    as_values: bool = False,
) -> Around:
    """The scale on which a cell that does nothing is white: of changes from the base run, whose colour bar says where the other
    run is. Ranks and log-probabilities are as other numbers here.

    Args:
        results: Without prompts, of one unit and compared with the same runs.
        values, changes: All of their values, and of their distances from the base run.
        theme: Its colours.
        center, zmax: As the caller wants them.
        as_values: Whether the metric itself is to be drawn, if all cells are compared with the same number.
    """
    first = results[0]
    name, run = what_is_coloured(results), f"{first.base} run"
    lines: tuple[str, ...] = (name,)
    if first.unit == "normalized":
        metrics = " / ".join(dict.fromkeys(one.metric for one in results))
        lines = (f"{metrics}, normalized", "0 = corrupted run, 1 = clean run")
    changed = (f"change in {lines[0]}", *lines[1:])
    own: dict[str, Any] = {"zmax": zmax, "linear": True}
    if not first.baseline:
        return Around(choose_scale(values, results, theme, *lines, center=center, **own))
    runs = _runs(results)
    if center is not None:
        return Around(choose_scale(values, results, theme, *lines, center=center, marks=runs, **own))
    if first.base not in runs:
        panels = len(results) > 1 and all(one.baseline[one.base].numel() == 1 for one in results)
        note = f"each cell is averaged over the prompts that have it; colour is its change from the {run} on those"
        note = "the panels' base runs differ; colour is the change from each" if panels else note
        return Around(choose_scale(changes, results, theme, *changed, middle=run, **own), True, (note,), alike=False)
    base = runs[first.base]
    if first.unit == "normalized" or as_values:
        middle = f"{run} {number(base)}"
        return Around(choose_scale(values, results, theme, *lines, center=base, middle=middle, marks=runs, **own))
    marks = {name: value - base for name, value in runs.items()}
    scale = choose_scale(changes, results, theme, *changed, middle=run, marks=marks, **own)
    told = ", ".join(f"{name} run {number(value)}" for name, value in runs.items())
    return Around(scale, True, () if base == 0 else (f"{told} {first.unit}",))


def _runs(results: Sequence[Result]) -> dict[str, float]:
    """The runs of which all cells of all results have the same metric, the base run first."""
    found = {}
    for name in sorted(results[0].baseline, key=lambda name: name != results[0].base):
        numbers = np.concatenate([one.baseline[name].numpy(force=True).astype(np.float64).ravel() for one in results])
        numbers = numbers[~np.isnan(numbers)]
        if not len(numbers) or numbers.min() == numbers.max():
            found[name] = float(numbers[0]) if len(numbers) else 0.0
    return found


def what_is_coloured(results: Sequence[Result]) -> str:
    """`'logit_diff / prob (logits)'`."""
    return f"{' / '.join(dict.fromkeys(one.metric for one in results))} ({results[0].unit})"


# -- colour bars and single colours ------------------------------------------------------------------------------------


def colour_bar(pixels: float, *title: str) -> dict[str, Any]:
    """A colour bar of that length at the upper right, with lines of plain text above it."""
    return {
        "title": {"text": "<br>".join(map(plain, title)), "side": "top", "font": {"size": 12}},
        "thickness": 14,
        "outlinewidth": 0,
        "lenmode": "pixels",
        "len": pixels,
        "y": 1,
        "yanchor": "top",
    }


def layer_steps(layers: Sequence[Label], theme: Theme) -> dict[str, Any]:
    """Of markers whose colour is an index into the layers: a step of the sequential map for each, with its name at the bar."""
    from plotly.colors import sample_colorscale

    n = len(layers)
    steps = sample_colorscale(list(theme.sequential[3:]), np.linspace(0, 1, n) if n > 1 else [1.0])
    every = math.ceil(n / 12)
    names = {"tickvals": list(range(0, n, every)), "ticktext": [plain(str(layer)) for layer in layers[::every]]}
    return {
        "colorscale": [[end / n, step] for i, step in enumerate(steps) for end in (i, i + 1)],
        "cmin": -0.5,
        "cmax": n - 0.5,
        "colorbar": {**colour_bar(min(300, max(60, 24 * n + 40)), "layer"), **names},
    }


def layers_lying(marker: dict[str, Any], pixels: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `layer_steps` says, as a marker that refers to a colour axis, and that axis, whose bar lies below the area."""
    bar = colour_bar(pixels) | {name: marker["colorbar"][name] for name in ("tickvals", "ticktext")}
    bar |= {"orientation": "h", "thickness": 10, "xpad": 0, "ypad": 0, "x": 0, "xanchor": "left"}
    axis = {name: marker[name] for name in ("colorscale", "cmin", "cmax")} | {"colorbar": bar}
    return {"color": marker["color"], "coloraxis": "coloraxis"}, axis


def number_ramp(values: np.ndarray, pixels: float, title: str, theme: Theme) -> dict[str, Any]:
    """A colour axis from the lowest of any numbers, which is not the paper's colour since it is not nothing, to the highest."""
    low, high = float(values.min()), float(values.max())
    return {
        "colorscale": colourscale(theme.sequential[2:]),
        "cmin": low,
        "cmax": high if high > low else low + 1,
        "colorbar": {**colour_bar(pixels, title), "x": 1.0, "xpad": 16},
    }


def sign_colour(value: float | None, theme: Theme, *, zero: str | None = None) -> str:
    """Of lines and bars, as in the diverging map: blue above 0, red below; 0 and no value are grey, or what `zero` says."""
    return (zero or theme.grey) if not value else theme.positive if value > 0 else theme.negative


def _luminance(rgb: np.ndarray) -> np.ndarray | np.float64:
    """Relative luminance, as WCAG 2.2 defines it, of `[… 3]` in 0..255."""
    part = rgb / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])
