"""A report: figures, tables, prompts, provenance and code on one page that can be sent to a colleague.

1. Every item becomes a section: its picture (`mechkit.plot._default`), its strongest cells as a table, and where it comes from.
   The picture's title is the section's heading, and is not written in the picture again.
2. A figure is stored as compressed JSON, which the page's script inflates and draws: the one nearest to the window first, then
   the others. Until then, and without scripts, its title and caption stand in its place; tables need no script.
3. The template escapes everything. The page forbids itself to load anything and to run a script but its own two, which it knows
   by their hashes: a token that is a tag stays a token even if an escape were forgotten.
4. On wide screens sections stand in two columns; one that needs the whole width has its picture on the left, the rest on the
   right (`_arranged`).
5. Items of several models or tasks are named in a warning at the top.
6. The same input gives the same bytes: there is no date, no path and no random name.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs
from torch import Tensor

from mechkit._check import checked
from mechkit._files import destination, expanded
from mechkit._version import __version__
from mechkit.plot._export import CONFIG
from mechkit.plot._figure import Figure
from mechkit.plot._text import number, plain, visible
from mechkit.plot._theme import Theme, theme_of
from mechkit.prompts import PromptPairs, Prompts
from mechkit.result import Result

_TOP = 10  # rows of a result's table
_ROWS = 200  # of any other table
_TOKENS = 20_000  # of prompts that are shown
_VALUE = 2_000  # characters of one value of the provenance
_HALF = 680  # pixels of a column, on a screen of 1440
_FITS = 1100  # pixels of a figure that is drawn anew for a column; a wider one needs both
_NO_TASKS = ("custom", "random tokens")  # names of prompts that are no task of their own
_UNRANKED = ({"dest", "src"}, {"d_model"})  # dims of results whose largest cells say nothing


@dataclass(frozen=True)
class _Table:
    """Columns of numbers (sorted as such) or of text, under a caption. `folded`: shown when asked for."""

    caption: str
    columns: Sequence[tuple[str, Sequence[Any]]]
    folded: bool = False

    @property
    def head(self) -> list[tuple[str, bool]]:
        """Name of each column, and whether it holds numbers."""
        return [(visible(name), all(map(_is_number, values))) for name, values in self.columns]

    @property
    def rows(self) -> list[list[tuple[str, str]]]:
        """What each cell shows, and its number in full (empty for text)."""
        columns = [
            [_cell(value, numeric) for value in values]
            for (_, numeric), (_, values) in zip(self.head, self.columns, strict=True)
        ]
        return [list(row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class _Drawing:
    """A figure as the page keeps it: zlib-compressed JSON in base64, its size in pixels, and what it is about."""

    data: str
    width: int
    height: int
    title: str
    caption: str


@dataclass(frozen=True)
class _Prompt:
    """A prompt, or a pair. Tokens are `(text, whether the partner has another, names of the position)`."""

    clean: list[tuple[str, bool, str]]
    corrupted: list[tuple[str, bool, str]]
    right: str = ""
    wrong: str = ""


@dataclass(frozen=True)
class _PromptTable:
    caption: str
    paired: bool
    rows: list[_Prompt]


@dataclass(frozen=True)
class _Section:
    """One item of the report; only the title is always there. `wide`: over both columns."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    drawing: _Drawing | None = None
    table: _Table | None = None
    prompts: _PromptTable | None = None
    provenance: list[tuple[str, str]] = field(default_factory=list)
    wide: bool = False

    @property
    def needs_width(self) -> bool:
        """Whether one of two columns is too narrow for it."""
        columns = 0 if self.table is None or self.table.folded else len(self.table.columns)
        is_text = self.drawing is None and self.table is None
        return is_text or columns > 8 or (self.drawing is not None and self.drawing.width > _HALF)


@checked
def report(
    path: str | os.PathLike[str],
    *items: Any,
    title: str = "Report",
    prompts: Prompts | PromptPairs | None = None,
    code: bool | str = True,
    theme: str = "light",
) -> Path:
    """Write a page with figures, tables, prompts, provenance and code: one file that loads nothing.

    Args:
        path: Where to, ending in `.html`; missing folders are made.
        *items: In this order: a `Result` or another object that has a default picture, a figure, a `pandas.DataFrame` (a table),
            prompts, text (paragraphs, which empty lines part), or `(title, item)` for one of these with a title of your own.
        title: Of the page, as plain text.
        prompts: Shown token by token at the end. Tokens that differ within a pair are marked.
        code: `True`: the file of the script that calls this is shown whole, whatever else it holds (nothing in a notebook, and
            nothing of installed packages). A string is shown instead; `False` shows none.
        theme: `"light"` or `"dark"`: of the page and of the pictures that are drawn for it.

    Returns:
        The path.

    Raises:
        ValueError: no items, one that cannot be drawn, another suffix than .html, or a theme that does not exist.

    Example:
        >>> report("ioi.html", heads, ("Where the answer is", by_position), title="IOI", prompts=pairs)  # doctest: +SKIP
    """
    colours, path = theme_of(theme), expanded(path)
    if path.suffix.lower() != ".html":
        raise ValueError(f"path: expected a name that ends in .html, got {str(path)!r}")
    if not items:
        raise ValueError("items: expected at least one result, figure, table, prompts or text; got none")
    if not isinstance(title, str):
        raise ValueError(f"title: expected text, got {title!r}")
    if prompts is not None and not isinstance(prompts, Prompts | PromptPairs):
        raise ValueError(f"prompts: expected Prompts or PromptPairs, got {type(prompts).__name__}")
    source = _source(_caller()) if code is True else ("Code", code) if code else None
    sections = [_section(i, item, theme) for i, item in enumerate(items)]
    if prompts is not None:
        sections.append(_Section("Prompts", prompts=_prompts(prompts)))
    path = destination(path, make_folders=True)
    page = _page(title, _about(items), _mixed(items, prompts), _arranged(sections), source, colours)
    path.write_bytes(page.encode("utf-8", "backslashreplace"))
    return path


def _page(
    title: str,
    about: list[tuple[str, str]],
    warnings: list[str],
    sections: list[_Section],
    source: tuple[str, str] | None,
    theme: Theme,
) -> str:
    loader = jinja2.PackageLoader("mechkit.plot", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def file(name: str) -> str:
        return loader.get_source(environment, name)[0]

    scripts = (
        [get_plotlyjs(), file("report.js")] if any(section.drawing for section in sections) else [file("report.js")]
    )
    return environment.get_template("report.html.jinja").render(
        title=visible(title),
        about=about,
        warnings=warnings,
        sections=sections,
        source=source,
        theme=theme,
        css=Markup(file("report.css")),
        scripts=[Markup(script) for script in scripts],
        hashes=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
    )


def _section(i: int, item: Any, theme: str) -> _Section:
    titled = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
    name, thing = item if titled else ("", item)
    if isinstance(thing, str):
        return _Section(visible(name), [part.strip() for part in re.split(r"\n\s*\n", thing) if part.strip()])
    if isinstance(thing, Prompts | PromptPairs):
        return _Section(visible(name or "Prompts"), prompts=_prompts(thing))
    if _is_frame(thing):
        return _Section(visible(name or "Table"), table=_frame_table(thing))
    try:
        figure = thing if isinstance(thing, go.Figure) else _picture(thing, theme)
    except ValueError as error:
        raise ValueError(f"items: number {i}, of {type(thing).__name__}, cannot be drawn: {error}") from error
    drawing = _draw(figure, untitled=not name)
    table = _strongest(thing) if isinstance(thing, Result) else _figure_table(figure)
    return _Section(visible(name) or drawing.title or "Figure", [], drawing, table, None, _provenance(thing))


def _arranged(sections: Sequence[_Section]) -> list[_Section]:
    """Sections two by two, in order; one that needs the width, or has no neighbour, has both columns."""
    arranged: list[_Section] = []
    waiting: _Section | None = None
    for section in sections:
        if section.needs_width:
            arranged += [replace(waiting, wide=True)] if waiting is not None else []
            arranged.append(replace(section, wide=True))
            waiting = None
        elif waiting is None:
            waiting = section
        else:
            arranged += [waiting, section]
            waiting = None
    return arranged + ([replace(waiting, wide=True)] if waiting is not None else [])


def _picture(thing: Any, theme: str) -> go.Figure:
    from mechkit.plot._default import default

    figure = default(thing, theme=theme)
    if _HALF < figure.layout.width <= _FITS:
        return figure.resized(width=_HALF)
    return figure


def _draw(figure: go.Figure, untitled: bool = False) -> _Drawing:
    """The figure with a size, compressed; without its title, if that is to be the section's heading."""
    picture = figure.to_dict()
    layout = picture["layout"]
    layout["width"], layout["height"] = layout.get("width") or 900, layout.get("height") or 450
    choices = [button for menu in layout.get("updatemenus") or () for button in menu.get("buttons") or ()]
    changing = any("title.text" in part for button in choices for part in button.get("args") or ())
    written = re.sub("<[^>]*>", " ", (layout.get("title") or {}).get("text") or "")
    if untitled and written and not changing:
        lines = layout["title"]["text"].count("<br>") + 1
        spare = min(22 * (lines + 1), max((layout.get("margin") or {}).get("t", 100) - 24, 0))
        layout["title"] = {"text": ""}
        layout["margin"] = {**(layout.get("margin") or {}), "t": (layout.get("margin") or {}).get("t", 100) - spare}
        layout["height"] -= spare
    config = {**CONFIG, "toImageButtonOptions": {"filename": "figure", "scale": 2}}
    text = to_json_plotly({**picture, "config": config}, engine="json")
    data = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    try:
        facts = figure.facts if isinstance(figure, Figure) else None
    except ValueError:  # a copy that plotly made
        facts = None
    name = html.unescape(written)
    if facts and "".join(written.split()) == "".join(plain(facts.title).split()):
        name = facts.title  # as it was before it was wrapped
    if changing and untitled:  # the picture's own title says what is chosen
        name = "Attention patterns" if facts and facts.kind == "attention" else "Figure"
    return _Drawing(
        data, layout["width"], layout["height"], visible(name), visible(" · ".join(facts.caption)) if facts else ""
    )


# Tables


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any, numeric: bool) -> tuple[str, str]:
    if not numeric:
        absent = value is None or (isinstance(value, float) and np.isnan(value))
        return "–" if absent else visible(str(value)), ""
    shown = str(value) if isinstance(value, int) else "–" if np.isnan(value) else number(value, 5)
    return shown, json.dumps(value)


def _strongest(result: Result) -> _Table | None:
    """The cells farthest from the base run, with bootstrap intervals if there are prompts to resample."""
    if any(dims <= set(result.dims) for dims in _UNRANKED):
        return None
    cells = result.top(_TOP)
    if not cells:
        return None
    unit = f" ({result.unit})" if result.unit else ""
    columns: list[tuple[str, list[Any]]] = [("cell", [cell.label for cell in cells])]
    columns.append((f"{result.metric}{unit}", [cell.value for cell in cells]))
    what = f"effect: change from the {result.base} run"
    if result.baseline:
        columns.append((what, [cell.effect for cell in cells]))
    n_prompts = len(result.coords.get("prompt", ()))
    if n_prompts > 1:
        chosen = [result.sel(**cell.coords) for cell in cells]
        intervals = [(one.effect() if result.baseline else one).ci() for one in chosen]
        of = "effect" if result.baseline else result.metric
        columns.append((f"{of}, 95 % from", [interval.low.values.item() for interval in intervals]))
        columns.append(("to", [interval.high.values.item() for interval in intervals]))
    present = ~result.values.isnan()
    n = int((present.any(result.dims.index("prompt")) if n_prompts else present).sum())
    caption = f"The {len(cells)} of {n:,} cells farthest from {f'the {result.base} run' if result.baseline else '0'}"
    averaged = f"; means over {n_prompts} prompts, bootstrap intervals" if n_prompts > 1 else ""
    return _Table(visible(caption + averaged), columns)


def _figure_table(figure: go.Figure) -> _Table | None:
    try:
        table = figure.table() if isinstance(figure, Figure) else {}
    except ValueError:  # a copy that plotly made
        return None
    n = len(next(iter(table.values()), ()))
    if n == 0:
        return None
    columns = [(name, np.asarray(column)[:_ROWS].tolist()) for name, column in table.items()]
    return _Table(f"The figure's numbers, {_amount(n)}", columns, folded=n > _TOP)


def _is_frame(thing: Any) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(thing, pandas.DataFrame)


def _frame_table(frame: Any) -> _Table:
    if not len(frame.columns) or not len(frame):
        raise ValueError(f"items: expected a table with rows and columns, got one of shape {frame.shape}")
    plain_index = list(frame.index) == list(range(len(frame)))
    shown = frame.head(_ROWS)
    columns = [] if plain_index else [(str(frame.index.name or ""), shown.index.tolist())]
    for i, name in enumerate(frame.columns):
        column = shown.iloc[:, i]
        columns.append((str(name), column.astype(object).where(column.notna(), float("nan")).tolist()))
    return _Table(_amount(len(frame)), columns)


def _amount(n: int) -> str:
    rows = f"{n:,} row{'s' if n != 1 else ''}"
    return rows if n <= _ROWS else f"{rows}, of which the first {_ROWS} are shown"


# Prompts


def _prompts(prompts: Prompts | PromptPairs) -> _PromptTable:
    clean, corrupted = (prompts.clean, prompts.corrupted) if isinstance(prompts, PromptPairs) else (prompts, None)
    ends = np.cumsum(clean.lengths.numpy()) * (2 if corrupted else 1)
    n = max(1, int((ends <= _TOKENS).sum()))
    known = {
        int(token): text
        for some in (clean, corrupted)
        if some is not None and some.str_tokens is not None
        for ids, texts in zip(some.tokens, some.str_tokens, strict=True)
        for token, text in zip(ids.tolist(), texts, strict=True)
    }
    known |= prompts.answer_text if isinstance(prompts, PromptPairs) else {}
    rows = []
    for i in range(n):
        if not isinstance(prompts, PromptPairs):
            rows.append(_Prompt(_tokens(prompts, i, None, {}), []))
            continue
        names: dict[int, list[str]] = {}
        for name, places in prompts.positions.items():
            names.setdefault(int(places[i]), []).append(name)
        left, right = prompts.clean, prompts.corrupted
        answers = (", ".join(_token(known, answer) for answer in ids) for ids in (prompts.right[i], prompts.wrong[i]))
        rows.append(_Prompt(_tokens(left, i, right, names), _tokens(right, i, left, names), *answers))
    task = f"Task {prompts.task}: " if isinstance(prompts, PromptPairs) and prompts.task else ""
    shown = "" if n == len(clean) else f", of which the first {n} are shown"
    what = f"{task}{len(clean):,} {'pair' if corrupted else 'prompt'}{'s' if len(clean) != 1 else ''}{shown}"
    return _PromptTable(visible(what), corrupted is not None, rows)


def _tokens(
    prompts: Prompts, i: int, partner: Prompts | None, names: Mapping[int, list[str]]
) -> list[tuple[str, bool, str]]:
    ids = prompts.tokens[i].tolist()
    texts = [str(token) for token in ids] if prompts.str_tokens is None else prompts.str_tokens[i]
    others = ids if partner is None else partner.tokens[i].tolist()
    return [
        (visible(text), token != other, visible(", ".join(names.get(pos, []))))
        for pos, (text, token, other) in enumerate(zip(texts, ids, others, strict=True))
    ]


def _token(known: Mapping[int, str], token: int) -> str:
    return f'"{visible(known[token])}"' if token in known else f"token {token}"


# Provenance and code


_FACTS = {"model": "model", "task": "task", "prompts": "n_prompts"}


def _about(items: Sequence[Any]) -> list[tuple[str, str]]:
    """What all of the page is about: models, tasks and numbers of prompts, each named once."""
    facts = {name: visible(", ".join(_named(items, key))) for name, key in _FACTS.items()}
    return [(name, value) for name, value in {**facts, "mechkit": __version__}.items() if value]


def _named(items: Sequence[Any], key: str) -> list[str]:
    """The different values of a fact of the items' provenance, in order."""
    things = [item[1] if isinstance(item, tuple) and len(item) == 2 else item for item in items]
    origins: list[Mapping[str, Any]] = []
    for thing in things:
        if isinstance(origin := getattr(thing, "provenance", None), Mapping):
            origins.append(origin)
        origins += thing._origins if isinstance(thing, Figure) else ()
    return list(dict.fromkeys(str(origin[key]) for origin in origins if origin.get(key) not in (None, "")))


def _mixed(items: Sequence[Any], prompts: Prompts | PromptPairs | None) -> list[str]:
    """Warnings of a page on which numbers stand together that do not belong together."""
    pairs = [item[1] if isinstance(item, tuple) and len(item) == 2 else item for item in (*items, prompts)]
    tasks = [*_named(items, "task"), *(one.task for one in pairs if isinstance(one, PromptPairs))]
    tasks = [task for task in dict.fromkeys(tasks) if task not in _NO_TASKS]
    models, weights = _named(items, "model"), _named(items, "weights_hash")
    warnings = []
    if len(models) > 1:
        warnings.append(f"This report mixes {len(models)} models: {', '.join(models)}.")
    elif len(weights) > 1:
        warnings.append(
            f"This report mixes {len(weights)} versions of the weights of {', '.join(models) or 'a model'}."
        )
    if len(tasks) > 1:
        warnings.append(f"This report mixes {len(tasks)} tasks: {', '.join(tasks)}.")
    return [
        visible(f"{warning} Its numbers can be compared only where model and task are the same.")
        for warning in warnings
    ]


def _provenance(thing: Any) -> list[tuple[str, str]]:
    facts: dict[str, Any] = {}
    if isinstance(thing, Result):
        sizes = " × ".join(f"{dim} {size}" for dim, size in zip(thing.dims, thing.shape, strict=True))
        facts = {"metric": thing.metric, "unit": thing.unit, "shape": sizes, "cost": thing.cost and str(thing.cost)}
        for name, baseline in thing.baseline.items():
            base = " (what effects are measured from)" if name == thing.base else ""
            facts[f"{name} run"] = f"{_mean(baseline)}{base}"
    origin = getattr(thing, "provenance", None)
    for name, value in origin.items() if isinstance(origin, Mapping) else ():
        facts[f"{name} (provenance)" if name in facts else name] = value
    return [(visible(str(name)), _shown(value)) for name, value in facts.items() if value is not None and value != ""]


def _mean(baseline: Tensor) -> str:
    return number(float(baseline.double().nanmean()), 5)


def _shown(value: Any) -> str:
    text = visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= _VALUE else f"{text[:_VALUE]}… ({len(text):,} characters in all)"


def _caller() -> Mapping[str, Any]:
    """The globals of whoever called `report`, behind the door that checks its arguments."""
    frame: Any = sys._getframe(2)
    while str(frame.f_globals.get("__name__", "")).startswith("mechkit._check"):
        frame = frame.f_back
    return frame.f_globals


def _source(caller: Mapping[str, Any]) -> tuple[str, str] | None:
    """Name and text of the script that calls, if it is a file and no part of an installed package."""
    file = caller.get("__file__")
    if not isinstance(file, str) or not file.endswith(".py"):
        return None
    path = Path(file).resolve()
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
    if any(path.is_relative_to(folder) for folder in installed) or not path.is_file():
        return None
    return path.name, path.read_text(encoding="utf-8", errors="replace")
