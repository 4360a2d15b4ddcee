"""Running text, every token on the colour of its value: attributions, a neuron's activations, the loss.

1. Choose one prompt, and find the text of each position: in the labels (`'" Mary" 3'`), or in the prompts themselves.
2. Lay the tokens out like a page: lines of up to 80 columns of a monospace font, a new line after a token with a newline. An
   east-asian character or an emoji takes two columns.
3. One result colours the tokens' background. Several are strips below the text, in the order given; those that share a unit share
   a scale.
4. Colours are centred on 0 (or on the base run), blue above and red below, as in heat maps. What has no sign (a loss, a
   probability, attention) runs from the paper's colour to dark blue.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mechkit._check import checked
from mechkit.plot._figure import Facts, Figure, Frame, Notes, Table, dress
from mechkit.plot._labels import check_result, choose_prompt, place_label, position_of, prompt_note, text_of, token_of
from mechkit.plot._scale import Scale, check_scale, choose_scale, what_is_coloured
from mechkit.plot._size import Length, Paper, paper_in, redrawn
from mechkit.plot._tables import table_of, to_numpy
from mechkit.plot._text import (
    caption_of,
    display_width,
    fitted,
    from_base,
    lines,
    number,
    plain,
    shortened,
    spaced,
    technique_of,
    title_of,
)
from mechkit.plot._theme import MONOSPACE, Theme, theme_of
from mechkit.prompts import PromptPairs, Prompts
from mechkit.result import Label, Result

_LINE = 80  # columns
_STRIP = 11  # pixels of a strip
_BAR = 62  # pixels of a colour bar with its title and ticks
_MAX_SCALES = 3


@dataclass(frozen=True)
class _Type:
    """The text's size, the pixels of one of its columns (DejaVu Sans Mono is the widest font) and of a line."""

    size: int
    column: float
    row: int

    def pitch(self, n_values: int) -> int:
        """Pixels from one line to the next."""
        return self.row + 2 if n_values == 1 else self.row + _STRIP * n_values + 12


_LARGE, _SMALL = _Type(14, 8.43, 24), _Type(12, 7.23, 19)  # where the width is chosen, text is as large as all other

Values = Result | Sequence[Result] | Mapping[str, Result]


@dataclass(frozen=True)
class _Page:
    """The tokens that are drawn, and where: one of each a token.

    Attributes:
        labels: Their labels in the results.
        words: Their text, as it is; `[3]` where it is unknown.
        names: What hover calls them: `'" Mary" 3'`.
        line, start, width: Line, first column, and columns.
    """

    labels: tuple[Label, ...]
    words: tuple[str, ...]
    names: tuple[str, ...]
    line: np.ndarray
    start: np.ndarray
    width: np.ndarray


@checked
@redrawn
def tokens(
    values: Values,
    *,
    prompts: Prompts | PromptPairs | None = None,
    prompt: Label | None = None,
    title: str | None = None,
    center: float | None = None,
    zmax: float | None = None,
    size: Literal["column", "page", "slide"] | None = None,
    width: Length | None = None,
    height: Length | None = None,
    font_size: float | None = None,
    caption: bool = True,
    annotations: Notes | None = None,
    theme: str = "light",
) -> Figure:
    """Draw a text with every token on the colour of its value; with several values a token, as strips below the text.

    Args:
        values: A result with dims `("pos",)` or `("pos", "prompt")`, of any unit. Or several of the same text (a list, or a
            mapping from a strip's name).
        prompts: The prompts that the values were computed on. Needed where the labels of positions do not tell the token: prompts
            that differ there, or that had no tokenizer. Unknown tokens are written as `[3]`, their position.
        prompt: The label of the prompt that is shown; by default the first. For values without a `"prompt"` dim: the index of
            the one among `prompts` whose text is shown.
        title: Of the figure, as plain text; made from the provenance by default.
        center: The value that is white; by default 0, or the base run, from which the change is then drawn.
        zmax: Distance from the centre at which the colour saturates; by default the largest one. What has no sign runs from 0
            to this.
        size, width, height, font_size, caption, annotations: See `Figure.resized`.
        theme: `"light"` or `"dark"` (in which the centre is black).

    Returns:
        A plotly figure; nothing is shown or written. Tokens without a value are grey; positions that the prompt lacks are not
        drawn. `table()` has a row for each token (and result): `pos`, `token`, `value`.

    Raises:
        ValueError: other dims, no value at all, an infinite one, results of different texts or of more than three units, no such
            prompt, prompts that are not the result's, a `zmax` that is not positive.

    Example:
        >>> import torch
        >>> labels = ('"When" 0', '" Mary" 1', '" and" 2')
        >>> loss = Result(torch.rand(3), ("pos",), {"pos": labels}, {}, "", "loss", "nats", {})
        >>> tokens(loss, title="Loss").table()["token"].tolist()
        ['When', ' Mary', ' and']
    """
    colours, paper = theme_of(theme), paper_in(size)
    check_scale(center, zmax)
    given = _named(values)
    first = next(iter(given.values()))
    note, picked = "", given
    if "prompt" in first.dims:
        prompt = choose_prompt(first.coords["prompt"], prompt)
        note = prompt_note(prompt, first.coords["prompt"])
        picked = {name: one.sel(prompt=prompt) for name, one in given.items()}
    elif prompt is not None and prompts is None:
        raise ValueError(f"prompt: expected None for values without a 'prompt' dim, got {prompt!r}; or pass prompts=")
    beside = 24 if len(given) == 1 else 24 + 6 * max(len(shortened(name)) for name in given)
    font = _LARGE if paper.width is None else _SMALL
    line = int(min(paper.across(beside, 16, _LINE * font.column) / font.column, _LINE if paper.width is None else 110))
    page = _page(picked, text_of(prompts, first, prompt), line, several=len(first.coords.get("prompt", ())) > 1)
    page, hidden = _fitting(page, font.pitch(len(given)), paper)
    picked = {name: one.sel(pos=page.labels) for name, one in picked.items()}
    shown = {name: one.effect() if one.baseline and center is None else one for name, one in picked.items()}

    scales = _scales(shown, colours, center, zmax)
    figure = Figure(layout={"barmode": "overlay", "dragmode": False})
    _draw(figure, page, picked, shown, scales, colours, font)

    origins = [{**one.provenance, **({"n_prompts": None} if note else {})} for one in given.values()]
    told = [part for origin in origins for part in caption_of(origin)] + [note] * bool(note)
    if any(name.startswith("[") for name in page.names):
        told.append("[3]: a position whose token is unknown here; prompts= tells it")
    if hidden:
        told.append(
            f"the first {len(page.words):,} of {len(page.words) + hidden:,} tokens: the others do not fit on this page"
        )
    if any(bool(one.values.isnan().any()) for one in shown.values()):
        told.append("grey: no value")
    default = title_of(first.provenance, first.metric) if len(given) == 1 else f"{', '.join(given)} of each token"
    facts = Facts("tokens", default if title is None else title, tuple(dict.fromkeys(told)))
    _style(figure, page, picked, scales, colours, facts, paper, font)
    return figure


def _named(values: Values) -> dict[str, Result]:
    if isinstance(values, Result):
        named = {"": values}
    elif isinstance(values, Mapping):
        named = {str(name): one for name, one in values.items()}
    elif not isinstance(values, Sequence):
        raise ValueError(f"values: expected a Result or several, got {type(values).__name__}")
    else:
        named = {}
        for one in values:
            name = (technique_of(one.provenance) or one.metric) if isinstance(one, Result) else ""
            name = name if name not in named else f"{name}: {one.metric}"
            named[name if name not in named else f"{name} ({len(named)})"] = one
    if not named:
        raise ValueError("values: expected at least one Result, got none")
    first = next(iter(named.values()))
    check_result(first, "values")
    for name, one in named.items():
        what = f"values{f'[{name!r}]' if name else ''}"
        if not isinstance(one, Result):
            raise ValueError(f"{what}: expected a Result, got {type(one).__name__}")
        if set(one.dims) - {"prompt"} != {"pos"}:
            raise ValueError(
                f"{what}: expected dims ('pos',) or ('pos', 'prompt'), got {one.dims}; choose one label of the others with sel()"
            )
        if (one.base, set(one.baseline)) != (first.base, set(first.baseline)) and len(named) > 1:
            raise ValueError(
                f"{what}: expected the runs that the first is compared with, {tuple(first.baseline)} from {first.base!r}, got "
                f"{tuple(one.baseline)} from {one.base!r}; give the effect() of all, or values without baselines"
            )
        hashes = {result.provenance.get("tokens_hash") for result in (first, one)} - {None}
        if dict(one.coords) != dict(first.coords) or len(hashes) > 1:
            raise ValueError(
                f"{what}: expected values of the same prompts and positions as the first, got others; draw them one by one"
            )
        if one.values.isinf().any():
            raise ValueError(f"{what}: expected finite values, got an infinite one")
        if one.values.isnan().all():
            raise ValueError(f"{what}: expected at least one value, got none that is a number")
    return named


def _page(picked: Mapping[str, Result], text: Sequence[str] | None, most: int, *, several: bool) -> _Page:
    labels = next(iter(picked.values())).coords["pos"]
    places = [position_of(label) for label in labels]
    present = np.any([~np.isnan(to_numpy(one.values)) for one in picked.values()], 0)
    if text is not None:
        kept = [i for i, place in enumerate(places) if place is not None and place < len(text)]
    else:  # a prompt that is shorter than others ends with positions that have no value
        kept = list(range(present.nonzero()[0].max(initial=-1) + 1 if several else len(labels)))
    if not present[kept].any():
        raise ValueError("values: expected some in the prompt that is shown, got none; choose another prompt=")
    placed, line, column = [], 0, 0
    for i in kept:
        known = text is not None or token_of(labels[i]) != str(labels[i])
        word = text[places[i] or 0] if text is not None else token_of(labels[i]) if known else f"[{labels[i]}]"
        width = min(max(display_width(word), 1), most)
        if column + width > most:
            line, column = line + 1, 0
        placed.append((labels[i], word, place_label(word, places[i] or 0) if known else word, line, column, width))
        line, column = (line + 1, 0) if "\n" in word else (line, column + width)
    found, words, names, *numbers = zip(*placed, strict=True)
    return _Page(found, words, names, *map(np.array, numbers))


def _fitting(page: _Page, pitch: int, paper: Paper) -> tuple[_Page, int]:
    """The lines that fit where the size is chosen, and how many tokens there are beyond them."""
    if paper.width is None and paper.height is None:
        return page, 0
    most = max(1, int(((paper.height or paper.tallest) - 230) / pitch))
    n = int((page.line < most).sum())
    cut = _Page(page.labels[:n], page.words[:n], page.names[:n], page.line[:n], page.start[:n], page.width[:n])
    return cut, len(page.words) - n


def _scales(
    shown: Mapping[str, Result], theme: Theme, center: float | None, zmax: float | None
) -> list[tuple[Scale, list[str]]]:
    """Scales, and the names of the results that share each."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, one in shown.items():
        alone = choose_scale(to_numpy(one.values), one, theme, center=center, zmax=zmax)
        groups.setdefault((one.unit, one.base, alone.signed, alone.logarithmic), []).append(name)
    if len(groups) > _MAX_SCALES:
        units = ", ".join(repr(shown[names[0]].unit) for names in groups.values())
        raise ValueError(f"values: expected results with at most {_MAX_SCALES} scales, got units {units}; draw fewer")
    scales = []
    for names in groups.values():
        together = [shown[name] for name in names]
        values, first = np.concatenate([to_numpy(one.values) for one in together]), together[0]
        change, middle = ("change in ", f"{first.base} run") if first.baseline and center is None else ("", None)
        what = f"{change}{what_is_coloured(together)}"
        scales.append((choose_scale(values, together, theme, what, center=center, zmax=zmax, middle=middle), names))
    return scales


def _draw(
    figure: Figure,
    page: _Page,
    picked: Mapping[str, Result],
    shown: Mapping[str, Result],
    scales: Sequence[tuple[Scale, list[str]]],
    theme: Theme,
    font: _Type,
) -> None:
    """Bars for backgrounds and strips, and the text on them: across in columns, down in pixels from the top."""
    top, strips = page.line * font.pitch(len(shown)), len(shown) > 1
    notes = {name: _described(name, picked[name], shown[name]) for name in shown}
    inks = [theme.ink] * len(page.words)
    everyone = np.ones(len(inks), bool)
    if strips:
        hover = [lines(*texts) for texts in zip(page.names, *notes.values(), strict=True)]
        _bars(figure, page, everyone, top + font.row / 2, font.row, hover, {"color": theme.paper}, theme)
    for i, name in enumerate(shown):
        values, place = to_numpy(shown[name].values), next(k for k, (_, names) in enumerate(scales) if name in names)
        scale, present = scales[place][0], ~np.isnan(values)
        middle, height = (top + font.row + _STRIP * (i + 0.5), _STRIP) if strips else (top + font.row / 2, font.row)
        inks = inks if strips else scale.inks(values, theme)
        hover = [lines(*texts) for texts in zip(page.names, notes[name], strict=True)]
        marker = {"color": scale.drawn(values[present]), "coloraxis": _axis_name(place)}
        _bars(figure, page, present, middle, height, hover, marker, theme)
        _bars(figure, page, ~present, middle, height, hover, {"color": theme.absent}, theme)
    bare = [word.lstrip(" ") for word in page.words]
    indent = np.array([len(word) - len(rest) for word, rest in zip(page.words, bare, strict=True)])
    room = (page.width - indent).tolist()
    text = [fitted(word, columns) for word, columns in zip(bare, room, strict=True)]
    _write(
        figure,
        page.start + indent,
        top + font.row / 2,
        text,
        "right",
        {"family": MONOSPACE, "size": font.size, "color": inks},
    )
    if strips:
        below = np.unique(page.line) * font.pitch(len(shown)) + font.row
        names = [f"{shortened(name)}\u00a0" for name in shown]
        for i, name in enumerate(names):
            small = {"size": 10, "color": theme.muted}
            _write(figure, 0 * below, below + _STRIP * (i + 0.5), [name] * len(below), "left", small)


def _bars(
    figure: Figure,
    page: _Page,
    part: np.ndarray,
    middle: np.ndarray,
    height: float,
    hover: Sequence[str],
    marker: Mapping[str, Any],
    theme: Theme,
) -> None:
    """A bar for each token of a part, if there are any."""
    if part.any():
        where = {"base": page.start[part], "x": page.width[part], "y": middle[part], "width": height - 1}
        marker = {**marker, "line": {"color": theme.grid, "width": 1}}
        notes = np.array(hover, object)[part]
        figure.add_bar(
            **where,
            orientation="h",
            marker=marker,
            hovertext=notes,
            hoverinfo="text",
            textposition="none",
            showlegend=False,
        )


def _write(figure: Figure, x: np.ndarray, y: np.ndarray, text: Sequence[str], side: str, font: dict[str, Any]) -> None:
    """Text to one side of each point."""
    fixed = {"mode": "text", "hoverinfo": "skip", "cliponaxis": False, "showlegend": False}
    figure.add_scatter(
        x=x, y=y, text=[plain(one) for one in text], textposition=f"middle {side}", textfont=font, **fixed
    )


def _described(name: str, picked: Result, shown: Result) -> list[str]:
    """What hover says of each value."""
    unit = spaced(shown.unit)
    head = f"{name}: {picked.metric}" if name and name != picked.metric else picked.metric
    notes = []
    for value, change in zip(to_numpy(picked.values), to_numpy(shown.values), strict=True):
        text = "no value" if np.isnan(value) else f"{number(value, 5)}{unit}"
        if shown is not picked and not np.isnan(value):
            text += f", {from_base(change, unit, picked.base)}"
        notes.append(f"{head} {text}")
    return notes


def _style(
    figure: Figure,
    page: _Page,
    picked: Mapping[str, Result],
    scales: Sequence[tuple[Scale, list[str]]],
    theme: Theme,
    facts: Facts,
    paper: Paper,
    font: _Type,
) -> None:
    """Axes, and the colour bars below the text: inside the area that is drawn on, so that plotly makes no room for them."""
    left = 24 if len(picked) == 1 else 24 + 6 * max(len(shortened(name)) for name in picked)
    least = 40 if paper.width is None else min(40, int(paper.across(left, 16, 0) / font.column))
    columns, text = max(int((page.start + page.width).max()), least), (int(page.line[-1]) + 1) * font.pitch(len(picked))
    titles = [textwrap.wrap(" · ".join(scale.title), max(int(columns * font.column / 7), 30)) for scale, _ in scales]
    starts = np.cumsum([0] + [_BAR + 15 * (len(title) - 1) for title in titles]).tolist()
    height = text + starts[-1]
    figure.update_xaxes(range=[0, columns], visible=False, fixedrange=True)
    figure.update_yaxes(range=[height, 0], visible=False, fixedrange=True)
    for i, (scale, _) in enumerate(scales):
        top, title = text + 14 + starts[i], "<br>".join(map(plain, titles[i]))
        axis = scale.axis(min(320, columns * font.column - 20), lying=True)
        place = {"x": 0, "xanchor": "left", "yanchor": "top"}
        bar = {
            "orientation": "h",
            "thickness": 10,
            "xpad": 0,
            "ypad": 0,
            "y": 1 - (top + 5 + 15 * len(titles[i])) / height,
        }
        figure.update_layout({_axis_name(i): {**axis, "colorbar": axis["colorbar"] | bar | place}})
        place |= {"xref": "paper", "yref": "paper", "y": 1 - top / height, "xshift": -2}
        figure.add_annotation(text=title, name="scale", showarrow=False, align="left", **place)

    def table() -> Table:
        numbers = dict(table_of(picked))
        return {"pos": numbers.pop("pos"), "token": np.tile(np.array(page.words, object), len(picked)), **numbers}

    at = {
        str(label): (float(page.start[i]), float(page.line[i] * font.pitch(len(picked)) + font.row / 2), "")
        for i, label in enumerate(page.labels)
    }
    if paper.width is None and paper.height is None:
        paper = replace(paper, tallest=math.inf)  # a page of text is as long as the text
    dress(
        figure, theme, Frame(columns * font.column, height, left, 24, below=10), facts, table, paper, places=lambda: at
    )


def _axis_name(i: int) -> str:
    return f"coloraxis{i + 1 if i else ''}"
