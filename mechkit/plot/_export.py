"""Figures on disk: pages, pictures, and the numbers themselves.

Pictures are made by kaleido, which drives a Chrome or Chromium that is already on the machine. Nothing is downloaded.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from mechkit._check import checked
from mechkit._files import decoding, destination, guarded, parse_json, read_text, unguarded
from mechkit._version import __version__

if TYPE_CHECKING:
    from mechkit.plot._figure import Figure

CONFIG = {
    "displaylogo": False,
    "plotlyServerURL": "",
    "showSendToCloud": False,
}  # of plotly, wherever a figure is shown
_SCHEMA_VERSION = 1
_LIMIT = 2**30  # bytes of a file
_PICTURES = (".png", ".svg", ".pdf")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


def save(figure: Figure, path: Path, scale: float | None) -> Path:
    """See `Figure.save`."""
    suffix = path.suffix.lower()
    if suffix not in (".html", ".json", ".csv", *_PICTURES):
        raise ValueError(
            f"path: expected a name that ends in .html, .png, .svg, .pdf, .json or .csv; got {str(path)!r}"
        )
    dpi = figure._paper.dpi if figure._paper is not None else 192.0
    scale = dpi / 96 if scale is None else scale
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: expected a positive number, got {scale!r}")
    if suffix == ".html":
        return write_html(figure, path)
    path = destination(path, make_folders=True)
    if suffix in _PICTURES:
        _write_picture(figure.still(), path, scale)
    elif suffix == ".json":
        facts = {"kind": figure.facts.kind, "title": figure.facts.title, "caption": list(figure.facts.caption)}
        columns = {name: _jsonable(column) for name, column in figure.table().items()}
        document = {"mechkit": __version__, "schema_version": _SCHEMA_VERSION, **facts, "columns": columns}
        path.write_bytes(json.dumps(document, allow_nan=False).encode())
    else:
        columns = {name: _wide(column).tolist() for name, column in figure.table().items()}
        cells = [
            [guarded(name) for name in columns],
            *([_cell(x) for x in row] for row in zip(*columns.values(), strict=True)),
        ]
        returns = any("\r" in cell for row in cells for cell in row if isinstance(cell, str))
        text = io.StringIO()  # Python's csv quotes no return of its own accord where lines end otherwise
        csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL).writerows(
            cells
        )
        path.write_bytes(text.getvalue().encode("utf-8", "backslashreplace"))
    return path


@checked
def write_html(figure: go.Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as one HTML file that needs no network and loads nothing.

    Args:
        figure: Any plotly figure.
        path: Where to; missing folders are made.

    Returns:
        The path.
    """
    path = destination(path, make_folders=True)
    html = figure.to_html(config=CONFIG, include_plotlyjs=True, include_mathjax=False, div_id="mechkit-figure")
    path.write_bytes(html.encode("utf-8", "backslashreplace"))
    return path


@checked
def read_table(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The numbers of a figure that `Figure.save` wrote as `.json`, exactly as they were, or the columns of a `.csv` file.

    In a `.csv` file, of `Figure.save` or of a study's table, a column of whole numbers, of numbers or of `True` and `False` is
    taken for one; in `.json` the kind is stated. The `'` that keeps spreadsheets from running a text as a formula is taken away.

    Returns:
        Columns by name: float64 (NaN where there was none), int64, bool, or text.

    Raises:
        ValueError: the file is something else, or of another version.
    """
    if Path(path).suffix.lower() == ".csv":
        return _read_csv(path)
    what = "a figure's numbers as Figure.save writes them to .json"
    document = parse_json(read_text(path, what, limit=_LIMIT, begins="{"), str(path), what)
    with decoding(path, what):
        version = document["schema_version"]
        if version == _SCHEMA_VERSION:
            columns = {name: _column(values["dtype"], values["values"]) for name, values in document["columns"].items()}
    if version != _SCHEMA_VERSION:
        raise ValueError(
            f"{path}: expected schema version {_SCHEMA_VERSION}, got {version!r}: read it with another mechkit"
        )
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError(f"{path}: expected {what}, its columns are not of one length")
    return columns


def _read_csv(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    what = "a table as CSV"
    text = read_text(path, what, limit=_LIMIT)
    with decoding(path, what):
        try:
            names, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        except csv.Error as error:
            raise ValueError(str(error)) from error
        if len(set(names)) != len(names) or any(len(row) != len(names) for row in rows):
            raise ValueError("expected distinct columns, and rows as long as there are columns")
        return {unguarded(name): _typed([row[i] for row in rows]) for i, name in enumerate(names)}


def _typed(cells: list[str]) -> np.ndarray:
    """A column of a CSV file as what its cells look like."""
    if cells and set(cells) <= {"True", "False"}:
        return np.array([cell == "True" for cell in cells])
    for kind, dtype in ((int, np.int64), (float, np.float64)):
        try:
            return np.array([kind(cell) if cell or kind is int else np.nan for cell in cells], dtype=dtype)
        except (ValueError, OverflowError):
            continue
    return np.array([unguarded(cell) for cell in cells], dtype=object)


def _cell(value: Any) -> Any:
    """What a CSV file has for a value: nothing for NaN; a text that no spreadsheet runs."""
    if isinstance(value, str):
        return guarded(value)
    return "" if value != value else value


def find_browser() -> str | None:
    """Path of a Chrome or Chromium on this machine: the environment's `BROWSER_PATH`, or one that can be found by name."""
    named = os.environ.get("BROWSER_PATH")
    return named or next((found for name in _BROWSERS if (found := shutil.which(name))), None)


def _write_picture(figure: go.Figure, path: Path, scale: float) -> None:
    browser = find_browser()
    if browser is None:
        raise RuntimeError(
            f"{path.name}: a picture is made by Chrome or Chromium, and there is none among {', '.join(_BROWSERS)}; install one "
            "(Debian: apt install chromium), or say where it is in the environment's BROWSER_PATH, or save as .html"
        )
    try:
        from kaleido import PageGenerator, calc_fig_sync
    except ImportError as error:
        raise RuntimeError(
            f"{path.name}: pictures need the package kaleido; `pip install 'mechkit[export]'`, or save as .html"
        ) from error
    kind = path.suffix[1:].lower()
    options = {"format": kind, "scale": scale if kind == "png" else 1}  # the others are as large as the figure
    page = PageGenerator(mathjax=False)
    page.header += "<style>@page { margin: 0 } img { display: block }</style>"  # else a PDF has a margin of 0.1 inch
    picture = calc_fig_sync(figure.to_dict(), options, kopts={"path": browser, "page_generator": page})
    path.write_bytes(_with_density(picture, 96 * scale) if kind == "png" else picture)


def _with_density(png: bytes, dpi: float) -> bytes:
    """A PNG that says how many pixels there are to the metre, so that it is as wide on paper as the figure was meant to be."""
    head = 8 + 4 + 4 + 13 + 4  # the signature, and the chunk that has to be first
    per_metre = round(dpi / 0.0254)
    body = b"pHYs" + per_metre.to_bytes(4, "big") * 2 + b"\x01"
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return png[:head] + chunk + png[head:]


def _wide(column: np.ndarray) -> np.ndarray:
    """float32 as float64, which writes it exactly."""
    return column.astype(np.float64) if column.dtype.kind == "f" else column


def _jsonable(column: np.ndarray) -> dict[str, Any]:
    kind = {"f": "float64", "i": "int64", "u": "int64", "b": "bool"}.get(column.dtype.kind, "text")
    if kind == "float64":
        values = [None if np.isnan(value) else value for value in column.astype(np.float64).tolist()]
    else:
        values = column.tolist() if kind != "text" else [str(value) for value in column.tolist()]
    return {"dtype": kind, "values": values}


def _column(kind: str, values: list[Any]) -> np.ndarray:
    types = {"float64": int | float | None, "int64": int, "bool": bool, "text": str}
    if kind not in types or not isinstance(values, list):
        raise ValueError(f"expected a column of {', '.join(types)}, got {kind!r} and {type(values).__name__}")
    for value in values:
        if not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise ValueError(f"expected values of {kind}, got {value!r}")
    if kind == "float64":
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return np.array(values, dtype={"int64": np.int64, "bool": bool}.get(kind, object))
