"""The logit-lens picture: what the model would say at each layer and position.

1. Lay the dims out: layer downwards, layer 0 at the top; positions to the right. Heads share the rows with the layer (`L9H6`) if
   there are positions, and otherwise run to the right.
2. `TopTokens`: write the most probable token of one prompt in each cell, and colour it by its probability, or by another reading
   of the same cells. A `Result` of `logit_lens`: colour alone, averaged over prompts, a panel for each token.
3. Write as much of a token as its cell holds, without the spaces that it begins with, in the ink that is legible on the cell's
   colour; nothing if cells are too small. Hover has the whole tokens, the k most probable ones.
4. Probabilities, entropies and divergences run from the paper's colour to dark blue; so do log-probabilities, from the lowest
   one up to 0. Ranks are logarithmic, dark being the top of the vocabulary. Logits have a sign: they are centred on 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
import plotly.graph_objects as go

from mechkit._check import checked
from mechkit.attribution import TopTokens
from mechkit.plot._figure import (
    Facts,
    Figure,
    Frame,
    Notes,
    Place,
    Table,
    dress,
    frame_cells,
    label_axis,
    labels_across,
    lay_bar,
    panels,
    room_left,
    title_axes,
)
from mechkit.plot._labels import (
    RAGGED,
    axis_title,
    choose_prompt,
    is_ragged,
    place_label,
    position_of,
    prompt_note,
    text_of,
)
from mechkit.plot._scale import Scale, choose_scale
from mechkit.plot._size import Length, Paper, paper_in, redrawn
from mechkit.plot._tables import table_of, to_numpy
from mechkit.plot._text import caption_of, display_width, fitted, number, plain, shortened, title_of, visible
from mechkit.plot._theme import MONOSPACE, Theme, theme_of
from mechkit.prompts import PromptPairs, Prompts
from mechkit.result import Label, Result
from mechkit.result._labels import cell_label

VALUES = ("logit", "log_prob", "prob", "rank", "entropy", "kl")
_PLACES = ("pos", "position", "patch")
_GAP = 46  # pixels between panels
_TOLD = 10  # tokens that hover lists
_COLUMN = 0.602  # width of a monospace character, in its size
_SMALLEST = (30, 12)  # pixels of a cell that holds a text


@dataclass(frozen=True)
class _Layout:
    """Which dims run over the panels, down and to the right, and their labels."""

    panels: str | None
    down: tuple[str, ...]
    right: str | None
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Panels, rows, columns."""
        return len(self.names) or 1, len(self.rows) or 1, len(self.columns) or 1

    def arrange(self, array: np.ndarray, dims: Sequence[str]) -> np.ndarray:
        """An array of these dims as `[panel row column k]`, the last of size 1 without a dim `"k"`."""
        order = [dims.index(dim) for dim in (self.panels, *self.down, self.right, "k") if dim in dims]
        return array.transpose(order).reshape(*self.shape, -1)

    def heads(self) -> np.ndarray:
        """What hover calls each cell, `[panel row column]`, as lines of plain text."""
        row = f"{self.down[0]} " if len(self.down) == 1 else ""
        parts = [self.names, [row + label for label in self.rows], [f"{self.right} {label}" for label in self.columns]]
        panel, down, right = ([f"{plain(text)}<br>" for text in part] or [""] for part in parts)
        heads = [f"{y}{x}{name}" for name, y, x in product(panel, down, right)]
        return np.array(heads, object).reshape(self.shape)


@dataclass(frozen=True)
class _Cells:
    """What is coloured (without prompts) and its name; `[panel row column]` values and hover texts; `[row column]` top tokens."""

    shown: Result
    name: str
    layout: _Layout
    values: np.ndarray
    hover: np.ndarray
    words: np.ndarray | None
    facts: Facts
    table: Callable[[], Table]


@checked
@redrawn
def lens(
    found: TopTokens | Result,
    *,
    color: Result | None = None,
    prompts: Prompts | PromptPairs | None = None,
    prompt: Label | None = None,
    title: str | None = None,
    size: Literal["column", "page", "slide"] | None = None,
    width: Length | None = None,
    height: Length | None = None,
    font_size: float | None = None,
    caption: bool = True,
    annotations: Notes | None = None,
    theme: str = "light",
) -> Figure:
    """Draw what a logit lens, a tuned lens or a patchscope reads, layer by position.

    Args:
        found: `TopTokens`: each cell shows its most probable token. Or a `Result` of `logit_lens`, with dims such as
            `("layer", "pos", "token", "prompt")`: colours alone, a panel for each token on a shared scale (or, without
            positions and heads, a column for each token).
        color: For `TopTokens`, what colours the cells in place of the top token's probability: a `Result` of `logit_lens` for
            the same prompts and cells, with one token at most (`sel(token=[" Mary"])` keeps its name for the colour bar).
        prompts: The prompts that were read: then the horizontal axis has the tokens of the prompt that is shown, also where
            prompts differ.
        prompt: The label of the prompt that is shown. By default `TopTokens` show the first one, and a `Result` is averaged.
        title: Of the figure, as plain text; made from the provenance by default.
        size, width, height, font_size, caption, annotations: See `Figure.resized`.
        theme: `"light"` or `"dark"`.

    Returns:
        A plotly figure; nothing is shown or written. Cells that the prompt lacks are grey. `table()` has a row for each cell,
        `value` being what is coloured; of `TopTokens` also `token`, `prob` and `id` of the most probable token, and `token 1`,
        … of the next ones.

    Raises:
        ValueError: other dims, another metric than a lens's, no cell or none that exists, an infinite value, a `color` of other
            cells, prompts or of several tokens, no such prompt, `prompts` that are not the result's, or of different texts for
            a result that is averaged over them.

    Example:
        >>> import torch
        >>> coords = {"layer": (0, 1), "pos": ('"I" 0', '" am" 1')}
        >>> entropy = Result(torch.rand(2, 2), ("layer", "pos"), coords, {}, "", "entropy", "nats", {})
        >>> lens(entropy, title="Entropy").layout.title.text
        'Entropy'
    """
    colours, paper = theme_of(theme), paper_in(size)
    if isinstance(found, TopTokens):
        cells = _of_tokens(found, color, prompts, prompt, title)
    elif color is not None:
        raise ValueError(
            "color: expected None with a Result, which has its own values, got one; it goes with TopTokens"
        )
    else:
        cells = _of_result(found, prompts, prompt, title)
    unit = "" if cells.shown.unit in cells.name else f" ({cells.shown.unit})"
    scale = choose_scale(cells.values, cells.shown, colours, f"{cells.name}{unit}")
    return _draw(cells, scale, colours, paper)


def _of_result(
    result: Result, prompts: Prompts | PromptPairs | None, prompt: Label | None, title: str | None
) -> _Cells:
    _check(result, "found")
    shown, notes, averaged = result, [], False
    if "prompt" in result.dims:
        labels, averaged = result.coords["prompt"], prompt is None
        chosen = choose_prompt(labels, prompt)
        shown = result.mean("prompt") if averaged else result.sel(prompt=chosen)
        notes = [RAGGED] * is_ragged(result) if averaged else [prompt_note(chosen, labels)]
    elif prompt is not None and prompts is None:
        raise ValueError(f"prompt: expected None for a result without a 'prompt' dim, got {prompt!r}")
    text = text_of(prompts, result, prompt)
    tokens = shown.coords.get("token", ())
    if len(tokens) == 1:
        shown = shown.sel(token=tokens[0])
    layout = _lay_out(shown, text)
    name = f"{shown.metric}{_of_token(tokens)}"
    values = layout.arrange(to_numpy(shown.values), shown.dims)[..., 0]
    hover = layout.heads()
    for at in np.ndindex(layout.shape):
        hover[at] += plain(_described(name, float(values[at]), shown.unit))
    origin = {**result.provenance, **({"n_prompts": None} if "prompt" in result.dims and not averaged else {})}
    dims = [dim for dim in (*layout.down, layout.right, layout.panels) if dim]
    heading = title_of(origin, name, dims) if title is None else title
    facts = Facts("lens", heading, (*caption_of(origin, averaged=result.unit != "p"), *notes))
    return _Cells(shown, name, layout, values, hover, None, facts, lambda: table_of(shown))


def _of_tokens(
    found: TopTokens,
    color: Result | None,
    prompts: Prompts | PromptPairs | None,
    prompt: Label | None,
    title: str | None,
) -> _Cells:
    probs, ids, strings, text = found.probs, found.ids.numpy(force=True), found.strings, found.text
    if "k" not in probs.dims or "prompt" not in probs.dims:
        raise ValueError(f"found: expected TopTokens with dims 'k' and 'prompt', got {probs.dims}")
    _check(probs, "found.probs")
    labels, axis = probs.coords["prompt"], probs.dims.index("prompt")
    prompt = choose_prompt(labels, prompt)
    i = labels.index(prompt)
    probs, ids, strings = probs.sel(prompt=prompt), ids.take(i, axis), strings.take(i, axis)
    text = None if text is None else text.take(i, -1)
    top = probs.sel(k=probs.coords["k"][0])
    shown, name, told = top, "top token's probability", caption_of({**probs.provenance, "n_prompts": None})
    if color is not None:
        shown, name = _colour(color, top, found.probs, prompt)
        told = list(dict.fromkeys([*told, *caption_of({**color.provenance, "n_prompts": None})]))
    if top.values.isnan().all():
        raise ValueError(f"found: expected a cell that exists in prompt {prompt!r}, got none; choose another prompt=")
    layout = _lay_out(top, text_of(prompts, found.probs, prompt))
    values = layout.arrange(to_numpy(shown.values), shown.dims)[..., 0]
    likely, words = layout.arrange(to_numpy(probs.values), probs.dims), layout.arrange(strings, probs.dims)
    said = np.full(layout.shape, None) if text is None else layout.arrange(text, top.dims)[..., 0]
    quoted = {word: plain(f'"{word}"') for word in set(words.flat)}  # each once: there may be 100,000 of them
    hover = layout.heads()
    for at in np.ndindex(layout.shape):
        pairs = zip(words[at][:_TOLD], likely[at][:_TOLD], strict=True)
        notes = [f"{k}. {quoted[word]} {number(prob, 5)}" for k, (word, prob) in enumerate(pairs, 1)]
        notes += [plain(_described(name, float(values[at]), shown.unit))] if color is not None else []
        notes += [plain(f'continues "{fitted(str(said[at]), 100)}"')] if said[at] else []
        hover[at] += "not present" if np.isnan(likely[at][0]) else "<br>".join(notes)
    default = title_of(probs.provenance, "most probable token", top.dims)
    facts = Facts("lens", default if title is None else title, (*told, prompt_note(prompt, labels)))

    def table() -> Table:
        columns = dict(table_of(replace(shown, baseline={}, base="")))
        order = probs.dims.index("k")
        for k in range(len(probs.coords["k"])):
            end = f" {k}" if k else ""
            for column, array in (("token", strings), ("prob", probs.values.numpy(force=True)), ("id", ids)):
                columns[f"{column}{end}"] = array.take(k, order).ravel()
        return columns | ({} if text is None else {"text": text.ravel()})

    return _Cells(shown, name, layout, values, hover, words[0, :, :, 0], facts, table)


def _colour(color: Result, top: Result, found: Result, prompt: Label) -> tuple[Result, str]:
    """One number for each cell of `top`, and its name."""
    _check(color, "color")
    tokens = color.coords.get("token", ())
    if len(tokens) > 1:
        raise ValueError(
            f"color: expected one token, got {len(tokens)}; choose one with color.sel(token=[{tokens[0]!r}])"
        )
    hashes = [one.provenance.get("tokens_hash") for one in (color, found)]
    if None not in hashes and hashes[0] != hashes[1]:
        raise ValueError(f"color: expected the prompts of the top tokens (hash {hashes[1]}), got others ({hashes[0]})")
    if prompt not in color.coords.get("prompt", ()):
        raise ValueError(
            f"color: expected a 'prompt' dim with label {prompt!r}, got dims {color.dims}; give it unaveraged"
        )
    one = color.sel(prompt=prompt)
    one = one.sel(token=tokens[0]) if tokens else one
    if dict(one.coords) != dict(top.coords):
        sizes = [", ".join(f"{dim} {len(each.coords[dim])}" for dim in each.dims) for each in (top, one)]
        raise ValueError(
            f"color: expected the cells of the top tokens ({sizes[0]}), got others ({sizes[1]}); use the same over="
        )
    values = one.values.permute([one.dims.index(dim) for dim in top.dims])
    return replace(one, values=values, dims=top.dims, baseline={}, base=""), f"{one.metric}{_of_token(tokens)}"


def _check(result: Result, what: str) -> None:
    """Raises `ValueError` unless it is what a lens reads, and something can be drawn."""
    if not isinstance(result, Result) or result.metric not in VALUES:
        got = f"metric {result.metric!r}" if isinstance(result, Result) else type(result).__name__
        raise ValueError(
            f"{what}: expected a Result of logit_lens, whose metric is one of {', '.join(VALUES)}; got {got}"
        )
    dims = set(result.dims) - ({"prompt"} if what != "found.probs" else {"prompt", "k"})
    if not dims or dims - {"layer", "head", *_PLACES, "token"}:
        raise ValueError(
            f"{what}: expected dims among layer, head, pos, position or patch, and token; got {result.dims}"
        )
    if result.values.isinf().any():
        raise ValueError(f"{what}: expected finite values, got an infinite one")
    if result.values.isnan().all():
        raise ValueError(f"{what}: expected at least one cell with a value, got none in shape {result.shape}")


def _lay_out(result: Result, text: Sequence[str] | None) -> _Layout:
    dims = result.dims
    right = next((dim for dim in (*_PLACES, "head", "token") if dim in dims), None)
    down = tuple(dim for dim in ("layer", "head") if dim in dims and dim != right)
    panels = "token" if "token" in dims and right != "token" else None
    columns = [str(label) for label in result.coords.get(right or "", ())]
    if right == "pos" and text is not None:
        places = [position_of(label) for label in columns]
        columns = [
            place_label(text[place], place) if place is not None and place < len(text) else label
            for place, label in zip(places, columns, strict=True)
        ]
    tokens = [_quoted(label) for label in result.coords.get("token", ())]
    columns = tokens if right == "token" else columns
    labels = product(*(result.coords[dim] for dim in down))
    rows = [cell_label(dict(zip(down, at, strict=True))) if len(down) > 1 else "".join(map(str, at)) for at in labels]
    return _Layout(
        panels, down, right, tuple(rows) if down else (), tuple(columns), tuple(f"token {x}" for x in tokens if panels)
    )


def _quoted(token: Label) -> str:
    return f'"{token}"' if isinstance(token, str) else f"id {token}"


def _of_token(tokens: Sequence[Label]) -> str:
    return f" of {_quoted(tokens[0])}" if len(tokens) == 1 else ""


def _described(name: str, value: float, unit: str) -> str:
    if np.isnan(value):
        return f"{name}: no value"
    return f"{name} {number(value, 5)}{'' if unit in name else f' {unit}'}"


def _draw(cells: _Cells, scale: Scale, theme: Theme, paper: Paper) -> Figure:
    layout, (n_panels, n_rows, n_columns) = cells.layout, cells.layout.shape
    columns, rows = ([shortened(name, paper.letters) for name in names] for names in (layout.columns, layout.rows))
    slant = {"may_slant": not all(label.isdigit() for label in columns)}
    left = room_left(rows, labels_across(columns, 13 if slant["may_slant"] else 60, **slant), paper)
    width = _cell_width(cells, paper, left)
    ticks = labels_across(columns, width, **slant)

    panel_width = max(60 if paper.narrow else 130, int(width * n_columns))
    room = paper.across(left, paper.bar(), 1040 - _GAP)
    across = min(n_panels, max(1, int((room + _GAP + 1) // (panel_width + _GAP))))
    down = -(-n_panels // across)
    tall = _cell_height(cells, down, None if paper.height is None else paper.height - ticks.below - 160, paper)
    panel_height = max(26, round(tall * n_rows))
    inner = (across * panel_width + (across - 1) * _GAP, down * panel_height + (down - 1) * _GAP)

    figure = panels((down, across), (panel_width, panel_height), (_GAP, _GAP), layout.names)
    figure.update_annotations(font_size=12)
    gap = 1 if min(width, tall) >= 8 else 0
    for i in range(n_panels):
        style = {"hoverinfo": "text", "coloraxis": "coloraxis", "xgap": gap, "ygap": gap}
        trace = go.Heatmap(z=scale.drawn(cells.values[i]), hovertext=cells.hover[i], **style)
        figure.add_trace(trace, row=i // across + 1, col=i % across + 1)
    notes = _write(figure, cells, scale, theme, panel_width / n_columns, panel_height / n_rows)
    notes += ["grey: no value"] * bool(np.isnan(cells.values).any())
    facts = replace(cells.facts, caption=(*cells.facts.caption, *notes))

    figure.update_xaxes(**ticks.axis, range=[-0.5, n_columns - 0.5])
    figure.update_yaxes(**label_axis(rows, tall, 14), range=[n_rows - 0.5, -0.5], title_text="")
    title_axes(figure, n_panels, across, axis_title(layout.right), " and ".join(layout.down))
    frame_cells(figure, theme)
    frame = Frame(*inner, room_left(rows, ticks, paper), paper.bar(), ticks.below, above=18 if n_panels > 1 else 0)
    frame = lay_bar(figure, scale, paper, frame, theme)
    dress(figure, theme, frame, facts, cells.table, paper, places=lambda: _places(layout))
    figure.update_layout(plot_bgcolor=theme.absent)  # shows through where a cell does not exist, and between cells
    return figure


def _places(layout: _Layout) -> dict[str, Place]:
    """Where each cell is: by its row and column, as hover calls them, in the first panel."""
    rows, columns = layout.rows or ("",), layout.columns or ("",)
    names = {(i, j): f"{row} {column}".strip() for i, row in enumerate(rows) for j, column in enumerate(columns)}
    led = "L" if layout.down == ("layer",) else ""
    return {f"{led}{name}": (j, i, "") for (i, j), name in names.items()}


def _cell_width(cells: _Cells, paper: Paper, left: float) -> float:
    n_panels, _, n_columns = cells.layout.shape
    most = paper.across(left, paper.bar(), 1150)
    if cells.words is not None and most / n_columns >= _SMALLEST[0]:
        needed = 10 + 7 * max(display_width(word) for word in cells.words.flat)
        return min(max(needed, 44), 84 if paper.width is None else 130, most / n_columns)
    beside = 940.0 if n_panels == 1 else 300.0
    if paper.width is not None:
        beside = most if n_panels == 1 or paper.narrow else min(300.0, most)
    return min(paper.up_to(34.0), max(min(beside, most) / n_columns, 1.0))


def _cell_height(cells: _Cells, down: int, inner: float | None, paper: Paper) -> float:
    """`inner`: pixels for all panels, one below the other, if the caller chose."""
    n_panels, n_rows, _ = cells.layout.shape
    if inner is not None:
        return max((inner - _GAP * (down - 1)) / (down * n_rows), 1.0)
    most, room = (22.0, 660.0) if cells.words is not None else (26.0, 480.0 if n_panels == 1 else 300.0)
    room = min(room, (paper.down(750.0) - _GAP * (down - 1)) / down)
    return min(most, max(room / n_rows, 1.0))


def _write(figure: Figure, cells: _Cells, scale: Scale, theme: Theme, width: float, height: float) -> list[str]:
    """The top tokens, as much of each as its cell holds; gives what the caption says of that."""
    if cells.words is None:
        return []
    if width < _SMALLEST[0] or height < _SMALLEST[1]:
        return ["cells are too small for their tokens, which hover shows"]
    size = min(max((width - 4) / (6 * _COLUMN), 8), 11, height - 3)
    columns = int((width - 4) / (size * _COLUMN))
    row, column = (~np.isnan(cells.values[0]) | (cells.words != "")).nonzero()
    words = [word.lstrip(" ") if visible(word).strip() else f'"{word}"' for word in cells.words[row, column]]
    short = [fitted(word, columns) for word in words]
    inks = scale.inks(cells.values[0][row, column], theme)
    font = {"family": MONOSPACE, "size": size, "color": inks}
    text, fixed = [plain(word) for word in short], {"hoverinfo": "skip", "showlegend": False}
    figure.add_scatter(x=column, y=row, mode="text", text=text, textfont=font, **fixed)
    return ["tokens that end in … are longer"] if short != words else []
