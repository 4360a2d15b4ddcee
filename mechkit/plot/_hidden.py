"""Hidden states of many prompts, one small picture a layer: each prompt a point, in two dimensions out of many.

1. For each layer take the states of all prompts, `[prompt d_model]` in float64, less their mean.
2. Project them onto their first two principal axes (singular value decomposition, exact), or onto two random Gaussian directions
   that all layers share.
3. Fix what is arbitrary: a principal axis points to where its largest entry is positive. Signs and rotations still differ from
   layer to layer, and the caption says so.
4. Draw a panel a layer, both axes of a panel on one scale, so that distances are what they are; colour by label.

Where all prompts have the same state, such as at a token that all share in layer 0, differences are rounding, which principal
axes would blow up to a cloud: these points are drawn in one place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from mechkit._check import checked
from mechkit.plot._figure import Facts, Figure, Frame, Notes, Table, dress, write_below
from mechkit.plot._labels import check_result
from mechkit.plot._points import evenly, legend_entry, points
from mechkit.plot._scale import number_ramp
from mechkit.plot._size import Length, paper_in, redrawn
from mechkit.plot._tables import to_numpy
from mechkit.plot._text import caption_of, lines, number, plain, shortened
from mechkit.plot._theme import Theme, theme_of
from mechkit.result import Label, Result
from mechkit.result._columns import Columns

_PANELS = 12  # shown by default
_MOST = 12_000  # points of all panels together that a browser draws at once
_GAP = 48  # pixels between panels
_MARKS = ("circle", "square", "diamond", "cross")
_GROUPS = 28  # entries that a legend has room for, each so many pixels high
_ENTRY = 20
_ROUNDING = 100  # times the type's precision: states that differ by less are the same


@dataclass(frozen=True)
class _Projection:
    """One layer's points.

    Attributes:
        layer: Its label; `None` if the states are of one layer alone.
        points: `[prompt 2]`.
        shares: Of the variance, along the two axes; empty for a random projection.
        same: Whether all states are equal but for rounding.
    """

    layer: Label | None
    points: np.ndarray
    shares: tuple[float, ...]
    same: bool


@dataclass(frozen=True)
class _Prompts:
    """What is known of each prompt: its name; its label, a string or a number, and its symbol, where these are given."""

    names: Sequence[Label]
    labels: np.ndarray | None
    symbols: np.ndarray | None

    @property
    def given(self) -> dict[str, np.ndarray]:
        both = {"label": self.labels, "symbol": self.symbols}
        return {name: values for name, values in both.items() if values is not None}


@dataclass(frozen=True)
class _Group:
    """Prompts that are drawn alike."""

    key: str  # different for every group
    name: str
    colour: str | None  # None: by number
    mark: str
    prompts: np.ndarray


@checked
@redrawn
def hidden(
    states: Result,
    *,
    labels: Sequence[str] | Sequence[float] | Sequence[bool] | None = None,
    method: str = "pca",
    seed: int = 0,
    layers: Sequence[Label] | None = None,
    symbols: Sequence[str] | Sequence[bool] | None = None,
    title: str | None = None,
    size: Literal["column", "page", "slide"] | None = None,
    width: Length | None = None,
    height: Length | None = None,
    font_size: float | None = None,
    caption: bool = True,
    annotations: Notes | None = None,
    theme: str = "light",
) -> Figure:
    """Draw hidden states of many prompts in two dimensions, a panel a layer.

    Args:
        states: From `mk.hidden_states`: dims layer, d_model and prompt, in any order; the layer may be missing.
        labels: One a prompt. Strings (and true or false) get a colour each, numbers a colour bar.
        method: `"pca"`, the first two principal axes of each layer; or `"random"`, two Gaussian directions, the same for all
            layers, which keep squared distances on average.
        seed: Of the random directions.
        layers: Which layers to draw; by default all, or 12 that are evenly spaced (6 in a column).
        symbols: One string (or true or false) a prompt: points get a mark for each.
        title: Of the figure, as plain text.
        size, width, height, font_size, caption, annotations: See `Figure.resized`.
        theme: `"light"` or `"dark"`.

    Returns:
        A figure; more than 12,000 points are thinned out, which the caption says. `table()` has a row for each prompt and drawn
        layer: `layer`, `prompt`, `x`, `y`, and `label` and `symbol` where they are given.

    Raises:
        ValueError: other dims, fewer than 3 prompts, states that are missing or infinite, an unknown method or layer, labels or
            symbols that are not one a prompt, or more different ones than there are colours or marks.

    Example:
        >>> hidden(mk.hidden_states(model, pairs), labels=["ABBA", "BABA"] * 16)
    """
    colours, paper = theme_of(theme), paper_in(size)
    if method not in ("pca", "random"):
        raise ValueError(f"method: expected 'pca' or 'random', got {method!r}")
    by_layer, names = _states(states)
    chosen = _layers(names, layers, _PANELS if not paper.narrow else 6)
    n = len(states.coords["prompt"])
    prompts = _Prompts(states.coords["prompt"], _per_prompt("labels", labels, n), _per_prompt("symbols", symbols, n))
    tolerance = _ROUNDING * torch.finfo(states.values.dtype).eps
    projections = [_project(by_layer[i], names[i], method, seed, tolerance) for i in chosen]
    groups = _groups(prompts, colours)
    most = max(3, _MOST // len(chosen))
    drawn = evenly(n, most)

    columns = min(len(chosen), 2 if paper.narrow else 4 if len(chosen) > 4 else 3)
    rows = math.ceil(len(chosen) / columns)
    numbers = prompts.labels if prompts.labels is not None and prompts.labels.dtype.kind == "f" else None
    bar = 0 if numbers is None else 130
    beside = bar + 24 + _ENTRY * len(groups)  # what stands to the right of the panels
    longest = max([len(group.name) for group in groups] + [8 if bar else 0])
    right = 14 if paper.narrow else 60 + 7 * longest if longest else 30
    if paper.width is None:
        side: float = max({1: 420, 2: 300, 3: 250}.get(columns, 200), math.ceil(beside / rows))
    else:
        side = min((paper.across(60, right, 0) + _GAP) / columns - _GAP, 500)
    below_legend = (22 * len(groups) + 8 if any(group.name for group in groups) else 0) + (56 if bar else 0)
    below_legend *= paper.narrow
    side = max(min(side, (paper.down(1000.0 if paper.width else 720.0, below_legend) + _GAP) / rows - _GAP), 60)
    across, tall = columns * (side + _GAP) - _GAP, rows * (side + _GAP) - _GAP
    figure = make_subplots(
        rows,
        columns,
        figure=Figure(),
        subplot_titles=[_panel_title(projection) for projection in projections],
        horizontal_spacing=_GAP / across,
        vertical_spacing=_GAP / tall,
    )
    for i, projection in enumerate(projections):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        for group in groups:
            kept = group.prompts[np.isin(group.prompts, drawn)]
            figure.add_trace(_points(projection, group, kept, prompts, colours), **place)
        _style_panel(figure, projection, method, colours, place, last=i + columns >= len(chosen))
    figure.update_annotations(font_size=12)  # the titles of the panels
    figure.add_traces(_legend(groups, colours))
    if numbers is not None:
        ramp = number_ramp(numbers, bar, "label", colours)
        if paper.narrow:
            lying = {"orientation": "h", "x": 0, "xanchor": "left", "yanchor": "top", "thickness": 10, "xpad": 0}
            ramp["colorbar"] |= {**lying, "len": across, "ypad": 0}
            del ramp["colorbar"]["title"]
            write_below(figure, ["label"], 0, 46)
            figure._bars += (("coloraxis", 68),)
        figure.update_layout(coloraxis=ramp)
    below_bar = 1 - (bar + 24) / tall if bar else 1.0
    beneath = {"x": 0, "xanchor": "left", "y": -(44 + (56 if bar else 0)) / tall, "yanchor": "top"}
    figure.update_layout(
        legend=beneath if paper.narrow else {"x": 1 + 16 / across, "xanchor": "left", "y": below_bar, "yanchor": "top"},
        legend_itemsizing="constant",
        legend_tracegroupgap=0,
    )
    how = "principal axes" if method == "pca" else "a random projection"
    name = f"Hidden states of {states.metric}: {how}{' by layer' if len(chosen) > 1 else ''}"
    where = [f"position {at}"] if (at := states.provenance.get("position")) is not None else []
    told = (
        caption_of(states.provenance, averaged=False) + where + _notes(projections, names, method, seed, len(drawn), n)
    )
    facts = Facts("hidden", name if title is None else title, tuple(told))
    hanging = below_legend if paper.narrow or paper.width is None else max(0, beside - tall)
    frame = Frame(across, tall, left=60, right=right, below=48 + hanging, above=18)
    return dress(figure, colours, frame, facts, lambda: _table(projections, prompts), paper)


def _states(states: Result) -> tuple[np.ndarray, tuple[Label | None, ...]]:
    """`[layer prompt d_model]` in float64, and the layers' labels."""
    check_result(states, "states")
    if not {"d_model", "prompt"} <= set(states.dims) <= {"layer", "d_model", "prompt"}:
        raise ValueError(
            f"states: expected dims ('layer', 'd_model', 'prompt'), as hidden_states gives them, got {states.dims}"
        )
    if len(states.coords["prompt"]) < 3 or 0 in states.shape:
        raise ValueError(f"states: expected at least 3 prompts, which span two dimensions, got shape {states.shape}")
    if not bool(states.values.isfinite().all()):
        raise ValueError(
            "states: expected a finite state of every prompt, got NaN or inf; sel() the prompts that have one"
        )
    tensor = states.values if "layer" in states.dims else states.values[None]
    dims = [dim for dim in ("layer",) if dim not in states.dims] + list(states.dims)
    order = [dims.index(dim) for dim in ("layer", "prompt", "d_model")]
    return to_numpy(tensor.permute(order)), states.coords.get("layer", (None,))


def _layers(names: tuple[Label | None, ...], asked: Sequence[Label] | None, most: int) -> list[int]:
    """Indices of the layers to draw."""
    if asked is None:
        return evenly(len(names), most).tolist()
    if isinstance(asked, str | int) or not len(asked) or len(set(asked)) != len(asked):
        raise ValueError(f"layers: expected at least one layer, each once; got {asked!r}")
    for layer in asked:
        if layer not in names:
            raise ValueError(f"layers: expected some of {list(names)}, got {layer!r}")
    return [names.index(layer) for layer in asked]


def _per_prompt(name: str, given: Sequence[Any] | None, n: int) -> np.ndarray | None:
    """One string or one number a prompt: an array of objects, or of float64."""
    if given is None:
        return None
    if not hasattr(given, "__len__"):
        raise ValueError(f"{name}: expected a list of one for each of {n} prompts, got {given!r}")
    values = given.tolist() if hasattr(given, "tolist") else [getattr(x, "item", lambda x=x: x)() for x in given]
    if isinstance(given, str) or not isinstance(values, list) or len(values) != n:
        raise ValueError(
            f"{name}: expected one for each of {n} prompts, got {given if isinstance(given, str) else len(values)}"
        )
    if all(isinstance(value, str | bool) for value in values):
        return np.array([str(value) for value in values], dtype=object)
    if name == "labels" and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        if not np.isfinite(values).all():
            raise ValueError(
                f"labels: expected finite numbers, got {values}; draw the prompts that have one, with sel()"
            )
        return np.array(values, dtype=np.float64)
    kinds = "all strings or all numbers" if name == "labels" else "strings"
    raise ValueError(f"{name}: expected {kinds}, got {sorted({type(value).__name__ for value in values})}")


def _project(states: np.ndarray, layer: Label | None, method: str, seed: int, tolerance: float) -> _Projection:
    """One layer's `[prompt d_model]` in two dimensions."""
    centred = states - states.mean(0)
    size = float(np.sqrt((states**2).sum(1).mean()))
    same = float(np.sqrt((centred**2).sum(1).mean())) <= tolerance * size
    if same:
        return _Projection(layer, np.zeros((len(states), 2)), (math.nan, math.nan) if method == "pca" else (), True)
    if method == "random":
        directions = np.random.default_rng(seed).standard_normal((states.shape[1], 2)) / math.sqrt(2)
        return _Projection(layer, centred @ directions, (), False)
    left, singular, axes = np.linalg.svd(centred, full_matrices=False)
    signs = np.where(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)[:, 0] < 0, -1.0, 1.0)
    points = (left * (singular * signs))[:, :2]
    shares = singular**2 / (singular**2).sum()
    if points.shape[1] == 1:  # states of one number
        points, shares = np.pad(points, ((0, 0), (0, 1))), np.pad(shares, (0, 1))
    return _Projection(layer, points, (float(shares[0]), float(shares[1])), False)


def _groups(prompts: _Prompts, theme: Theme) -> list[_Group]:
    """Prompts by label and symbol, in the order in which they come."""
    n, values, marks = len(prompts.names), prompts.labels, prompts.symbols
    kinds = [] if values is None or values.dtype.kind == "f" else list(dict.fromkeys(values))
    symbols = [] if marks is None else list(dict.fromkeys(marks))
    n_colours = len(theme.series)
    for name, found, most in (("labels", kinds, n_colours if symbols else _GROUPS), ("symbols", symbols, len(_MARKS))):
        if len(found) > most:
            raise ValueError(f"{name}: expected at most {most} different strings, got {len(found)}; merge some")
    by_number = values is not None and not kinds
    groups = []
    for i, kind in enumerate(kinds or [None]):
        for j, symbol in enumerate(symbols or [None]):
            here = np.ones(n, dtype=bool) if kind is None else values == kind
            here = here if symbol is None else here & (marks == symbol)
            name = ", ".join(part for part in (kind, symbol) if part is not None)
            colour = None if by_number else theme.series[i % n_colours] if kinds else theme.positive
            if here.any():
                mark = _MARKS[j if symbols else i // n_colours]
                groups.append(_Group(f"{i} {j}", shortened(name), colour, mark, here.nonzero()[0]))
    return groups


def _table(projections: list[_Projection], prompts: _Prompts) -> Table:
    layers = [projection.layer for projection in projections if projection.layer is not None]
    labels: dict[str, Sequence[Label]] = {**({"layer": layers} if layers else {}), "prompt": prompts.names}
    points = np.stack([projection.points for projection in projections])
    cells = Columns(tuple(labels), labels, points[..., 0] if layers else points[0, :, 0])
    drawn = {dim: cells.label(dim) for dim in labels} | {"x": points[..., 0].ravel(), "y": points[..., 1].ravel()}
    return drawn | {name: values[cells.index("prompt")] for name, values in prompts.given.items()}


def _points(projection: _Projection, group: _Group, kept: np.ndarray, prompts: _Prompts, theme: Theme) -> go.Scatter:
    colour: dict[str, Any] = {"color": group.colour}
    if group.colour is None and prompts.labels is not None:
        colour = {"color": prompts.labels[kept], "coloraxis": "coloraxis"}
    size, outline = 7 if len(projection.points) <= 100 else 5, {"width": 0.4, "color": theme.line}
    marker = {"size": size, "symbol": group.mark, "opacity": 0.85, "line": outline, **colour}
    hover = [_hover(projection, prompt, prompts) for prompt in kept.tolist()]
    x, y = projection.points[kept].T
    return points(x, y, hover, marker, name=plain(group.name), legendgroup=group.key)


def _legend(groups: list[_Group], theme: Theme) -> list[go.Scatter]:
    """An entry a group; pointing at it hides or shows that group in all panels."""
    return [
        legend_entry(
            plain(group.name),
            mode="markers",
            marker={"size": 9, "symbol": group.mark, "color": group.colour or theme.grey},
            legendgroup=group.key,
        )
        for group in groups
        if group.name
    ]


def _style_panel(
    figure: Figure, projection: _Projection, method: str, theme: Theme, place: dict[str, int], *, last: bool
) -> None:
    """Equal scales on both axes, around the middle of the points. `last`: whether there is no panel below."""
    low, high = projection.points.min(0), projection.points.max(0)
    middle, half = (low + high) / 2, 0.56 * float((high - low).max()) or 1.0
    ten = 10.0 ** math.floor(math.log10(half))
    step = next(ten * n for n in (0.5, 1, 2, 5) if half <= 2.5 * ten * n)
    axis = {
        "showgrid": False,
        "showline": True,
        "mirror": True,
        "linecolor": theme.grid,
        "zerolinecolor": theme.grid,
        "dtick": step,
        "tickfont": {"size": 10, "color": theme.muted},
        "showticklabels": not projection.same,
        "title": {"font_size": 11, "standoff": 4},
    }
    name = "axis" if method == "pca" else "direction"
    figure.update_xaxes(**axis, range=[middle[0] - half, middle[0] + half], **place)
    figure.update_yaxes(**axis, range=[middle[1] - half, middle[1] + half], **place)
    if last:
        figure.update_xaxes(title_text=f"first {name}", **place)
    if place["col"] == 1:
        figure.update_yaxes(title_text=f"second {name}", **place)


def _panel_title(projection: _Projection) -> str:
    parts = [] if projection.layer is None else [f"layer {projection.layer}"]
    if projection.same:
        parts.append("all the same")
    elif projection.shares:
        parts.append(" + ".join(f"{100 * share:.0f} %" for share in projection.shares))
    return plain(": ".join(parts))


def _hover(projection: _Projection, prompt: int, prompts: _Prompts) -> str:
    notes = [f"prompt {prompts.names[prompt]}"]
    for name, values in prompts.given.items():
        notes.append(f"{name} {values[prompt] if values.dtype.kind == 'O' else number(values[prompt], 5)}")
    if projection.layer is not None:
        notes.append(f"layer {projection.layer}")
    return lines(*notes, "at " + ", ".join(number(value, 5) for value in projection.points[prompt]))


def _notes(
    projections: list[_Projection], names: Sequence[Label | None], method: str, seed: int, n_drawn: int, n: int
) -> list[str]:
    several = len(projections) > 1
    if method == "pca":
        notes = ["the first two principal axes of the states in each panel, with their shares of the variance"]
        notes += ["signs and rotations between panels are arbitrary"] if several else []
    else:
        notes = [f"two random Gaussian directions (seed {seed}), which keep squared distances on average"]
        notes += ["the same directions in all panels"] if several else []
    notes.append(f"{'each panel has its own scale, ' if several else ''}equal across and up")
    if len(projections) < len(names):
        notes.append(f"{len(projections)} of {len(names)} layers shown")
    if n_drawn < n:
        notes.append(f"{n_drawn:,} of {n:,} prompts drawn, evenly spaced; the axes are those of all")
    if any(projection.same for projection in projections):
        notes.append("where all prompts have the same state but for rounding, they are in one place")
    return notes
