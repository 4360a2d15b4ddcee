"""Values of a picture's patches, laid over the picture.

1. Average over prompts, choose layers, and find where each patch lies (`_patch_layout.py`). Each picture, its whole view and its
   tiles have panels of their own, one a layer. What they are laid over is given, or the small copy that the result has of it.
2. Lay the panels out (`_patch_panels.py`), in the picture's proportions; row 0 is at the top. The axes
   count the picture's pixels, or rows and columns of patches where their pixels are not known.
3. Colour as a heat map does: the effect, on one scale around the base run. Below the colours lies the picture, in greys, so that
   no colour of its own is taken for a value. Smoothed colours are a grid of finer cells; an invisible one above it has the hover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from mechkit._check import checked
from mechkit.plot._figure import Facts, Figure, Frame, Notes, Place, dress, frame_cells, lay_bar
from mechkit.plot._labels import RAGGED, check_result, is_ragged
from mechkit.plot._patch_layout import Patch, View, at_patches, places_of, views_of
from mechkit.plot._patch_panels import Panel, PanelLayout, lay_out, panels_of
from mechkit.plot._picture import embedded, enlarged, grey_of, read_picture, shrunk
from mechkit.plot._scale import check_scale, scale_around_base
from mechkit.plot._size import Length, paper_in, redrawn
from mechkit.plot._tables import table_of, to_numpy
from mechkit.plot._text import caption_of, from_base, lines, number, plain, spaced, title_of
from mechkit.plot._theme import Theme, theme_of
from mechkit.result import Label, Result
from mechkit.result._labels import cell_label

_LAYERS = 8  # panels of one view, where nobody says which layers
_PANELS = 12  # of all views, in that case
_MOST = 60  # panels at all
_ASPECT = 0.1  # by which a picture's proportions may differ from the patches', at most
_CONTRAST = 0.7  # of the picture below the colours
_FINE = 120  # cells along a side of a smoothed map, about


@checked
@redrawn
def patches(
    result: Result,
    picture: Any = None,
    *,
    layers: Sequence[int] | None = None,
    smooth: bool = False,
    opacity: float = 0.6,
    grey: bool = True,
    beside: bool = False,
    show: Literal["effect", "normalized", "value"] = "effect",
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
    """Draw values of a picture's patches over the picture, such as `image_patching` gives them: a panel for each layer.

    A result over positions (`'pos'`) of prompts with pictures is drawn at the patches, without its text. A `'prompt'` dim is
    averaged first. A view of the whole picture and the tiles that it is cut into are panels of their own, and
    so are several pictures. Where it is not known which part of the picture a tile shows, it is drawn by row and column.

    Args:
        result: With a dim `"patch"` or `"pos"`, and at most one other, such as `"layer"`.
        picture: What the patches are laid over. By default the result's own copy of its prompt's picture (of the clean prompt's,
            for pairs; of several prompts if all have the same); `False` draws the patches alone. Otherwise a PIL image, a path,
            or an array or tensor `[row, column, 3]` or `[3, row, column]`, whole numbers 0..255 or fractions 0..1; for prompts
            with several pictures a list of these (or `None`), one a picture. It must show what the model was given: of any
            resolution, but not cut off at other edges.
        layers: Those that are drawn, in this order. By default all, or, of many, some from the first to the last.
        smooth: Whether colours go over from patch to patch, within a picture or tile. In the middle of a patch the colour is
            its value in any case. By default each patch is a square of one colour.
        opacity: Of the colours over the picture: 0 shows the picture alone, 1 hides it. Without any picture it has no effect.
        grey: Whether the picture below the colours is in greys.
        beside: Whether the picture also stands beside the panels by itself, as it is.
        show, center, zmax: As for `heatmap`.
        title: Of the figure, as plain text; made from the provenance by default.
        size, width, height, font_size, caption, annotations: See `Figure.resized`.
        theme: `"light"` or `"dark"`.

    Returns:
        A plotly figure; nothing is shown or written. Its axes count the picture's pixels from the upper left.

    Raises:
        ValueError: a result without patches, or that does not say where they are; too many dims or panels; no such layer; no
            picture, one of other proportions, or another number of them; an `opacity` outside 0..1; no cell that exists, or an
            infinite value.
        RuntimeError: `picture` is a path, and Pillow is not installed.

    Example:
        >>> import torch
        >>> places = [{"image": 0, "tile": None, "row": i // 2, "column": i % 2, "box": None} for i in range(4)]
        >>> coords = {"patch": ("r0c0", "r0c1", "r1c0", "r1c1")}
        >>> found = Result(torch.eye(2).flatten(), ("patch",), coords, {}, "", "logit_diff", "logits", {"patches": places})
        >>> patches(found, title="Where it looks").layout.title.text
        'Where it looks'
    """
    colours, paper = theme_of(theme), paper_in(size)
    check_scale(center, zmax)
    if show not in ("effect", "normalized", "value"):
        raise ValueError(f"show: expected 'effect', 'normalized' or 'value', got {show!r}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected a number from 0 (the picture alone) to 1 (no picture), got {opacity!r}")
    result, beyond = at_patches(result)
    places = _places(result)
    mean = result.mean("prompt") if "prompt" in result.dims else result
    if show == "normalized" and mean.unit != "normalized":
        mean = mean.normalized()
    views = views_of(mean, places)
    mean, over, note = _chosen(mean, layers, len(views))
    given = result.sel(layer=list(mean.coords["layer"])) if over == "layer" else result
    own = _own(mean) if picture is None else {}
    views, pictures = (_on_own(views, mean, own), own) if own else _with_pictures(views, picture, places)
    grid = _grid(mean, over)
    values, changes = grid(mean), grid(mean.effect() if mean.baseline else mean)
    if np.isnan(values).all():
        raise ValueError("patches: expected at least one cell that exists, got NaN alone; choose others with sel()")
    if np.isinf(values).any() or np.isinf(changes).any():
        raise ValueError("patches: expected finite values, got an infinite one; choose others with sel()")
    around = scale_around_base([mean], values, changes, colours, center=center, zmax=zmax, as_values=show == "value")
    shown = changes if around.changes else values

    names = [f"{over} {label}" for label in mean.coords[over]] if over else [mean.metric if beside else ""]
    panels = panels_of(views, names, pictures if beside else {})
    if len(panels) > _MOST:
        raise ValueError(
            f"patches: expected {_MOST} panels at most, got {len(panels)}: {len(views)} views of pictures, each with "
            f"{len(names)}; choose fewer {'with layers=' if over == 'layer' else f'of {over!r} with sel()'}"
        )
    layout = lay_out(panels, views, names, paper, ticks=not pictures)
    figure = Figure()
    hover = _hover(mean, over, views, values, changes)
    few = len(panels) <= 2
    sources: dict[tuple[int, bool], str] = {}
    for i, panel in enumerate(panels):
        view = views[panel.view]
        pair = str(i + 1) if i else ""
        if view.on_picture and view.image in pictures:
            plain_grey = grey and panel.at is not None
            if (view.image, plain_grey) not in sources:
                small = shrunk(pictures[view.image], 1200 if few else 600)
                small = enlarged(small, 240) if own else small
                sources[view.image, plain_grey] = embedded(_pale(grey_of(small), colours) if plain_grey else small)
            _lay_picture(figure, sources[view.image, plain_grey], view, pair)
        # a value looks alike in panels with a picture and without
        _colour(figure, view, panel, shown, hover, pair, smooth=smooth, opacity=opacity if pictures else 1.0)
    _place(figure, panels, views, layout, colours, pictures)

    notes = [*caption_of(mean.provenance, averaged=mean.unit != "p"), *around.notes]
    notes += [RAGGED] * (around.alike and is_ragged(result)) + [note] * bool(note)
    notes += _remarks(mean, views, pictures, opacity, np.isnan(shown).any(), smooth, picture)
    notes += _left_out(mean, beyond)
    dims = [dim for dim in (over, "patch") if dim]
    heading = title if title is not None else title_of(mean.provenance, mean.metric, dims)
    facts = Facts("patches", heading, tuple(dict.fromkeys(notes)))
    frame = Frame(layout.width, layout.height, layout.left, paper.bar(), layout.below, above=layout.above)
    frame = lay_bar(figure, around.scale, paper, frame, colours)
    named = _named_places(mean, over, panels, views)
    dress(figure, colours, frame, facts, lambda: table_of(given), paper, places=lambda: named)
    figure.update_layout(plot_bgcolor=colours.absent)
    return figure


def _pale(greys: np.ndarray, theme: Theme) -> np.ndarray:
    """Greys near the paper's colour, which is that of no effect: a dark place of the picture must not look like a value."""
    white = 255 if theme.name == "light" else 0
    return np.rint(white + (greys - float(white)) * _CONTRAST).astype(np.uint8)


# -- what is drawn -----------------------------------------------------------------------------------------------------


def _places(result: Result) -> tuple[Patch, ...]:
    check_result(result)
    others = [dim for dim in result.dims if dim not in ("patch", "prompt")]
    if "patch" not in result.dims:
        raise ValueError(
            f"result: expected a dim 'patch', as image_patching gives it and other techniques with over='layer patch'; got "
            f"{result.dims}"
        )
    if len(others) > 1:
        raise ValueError(
            f"result: expected 'patch' and at most one other dim, such as 'layer', got {result.dims}; choose one label with "
            "sel(), or average over a dim with mean()"
        )
    if 0 in result.shape:
        raise ValueError(f"result: expected at least one cell, got a result of shape {list(result.shape)}")
    places = places_of(result)
    if places is None:
        raise ValueError(
            "result: expected provenance['patches'] to say where each patch is (image, tile, row, column, box), as "
            "image_patching writes it; got none that goes with the labels of 'patch'; draw it with mk.plot.heatmap"
        )
    return places


def _chosen(result: Result, layers: Sequence[int] | None, n_views: int) -> tuple[Result, str | None, str]:
    """The layers that are drawn, the dim of the panels, and what the caption says of the choice."""
    over = next((dim for dim in result.dims if dim != "patch"), None)
    known = result.coords.get("layer", ())
    if layers is not None:
        if over != "layer":
            raise ValueError(f"layers: expected None for a result without a dim 'layer', got {layers!r}")
        chosen: list[Label] = list(layers)
        if (
            not chosen
            or any(isinstance(one, bool) or one not in known for one in chosen)
            or len(set(chosen)) < len(chosen)
        ):
            raise ValueError(
                f"layers: expected some of the result's layers, each once: {', '.join(map(str, known))}; got {layers!r}"
            )
        return result.sel(layer=chosen), over, ""
    most = max(3, min(_LAYERS, _PANELS // n_views))
    if over != "layer" or len(known) <= most:
        return result, over, ""
    kept = [*known[: -1 : math.ceil((len(known) - 1) / (most - 1))], known[-1]]
    return result.sel(layer=kept), over, f"{len(kept)} of {len(known)} layers"


def _with_pictures(
    views: list[View], picture: Any, places: Sequence[Patch]
) -> tuple[list[View], dict[int, np.ndarray]]:
    """The views in their pictures' pixels, and the pictures by number."""
    if picture is None or picture is False:
        return views, {}
    images = sorted({one.image for one in places})
    if isinstance(picture, list | tuple):
        given = {image: one for image, one in zip(images, picture, strict=False) if one is not None}
        if len(picture) != len(images):
            raise ValueError(
                f"picture: expected {_pictures(len(images))}, for the patches are of {_pictures(len(images))}; got a list of "
                f"{len(picture)}"
            )
        names = {image: f"picture[{i}]" for i, image in enumerate(images)}
    elif len(images) > 1:
        raise ValueError(
            f"picture: expected a list of {_pictures(len(images))}, for the patches are of so many; got one "
            f"({type(picture).__name__}); give [first, second, …], None for one that is not to be drawn"
        )
    else:
        given, names = {images[0]: picture}, {images[0]: "picture"}
    pictures = {image: read_picture(one, names[image]) for image, one in given.items()}
    placed = []
    for view in views:
        if view.on_picture and view.image in pictures:
            rows, columns = pictures[view.image].shape[:2]
            if not view.spread:
                _check_proportions(names[view.image], view, columns, rows)
            view = view.scaled(columns, rows)
        placed.append(view)
    if not any(view.on_picture and view.image in pictures for view in placed) and pictures:
        raise ValueError(
            "picture: expected patches whose place on the picture is known, to lay them over it; these are only known by row "
            "and column of their tile; leave out picture, or choose patches of the whole view with sel(patch=…)"
        )
    return placed, pictures


def _own(result: Result) -> dict[int, np.ndarray]:
    """The result's own copies of its pictures, by number; of several prompts those that all have."""
    several = () if result.pictures is None else result.pictures.one.thumbnails[0]
    return {i: one.pixels.numpy(force=True) for i, one in enumerate(several) if one is not None}


def _on_own(views: list[View], result: Result, own: Mapping[int, np.ndarray]) -> list[View]:
    """The views with the sizes of the pictures that the result has; boxes are in their pixels."""
    assert result.pictures is not None
    thumbnails = result.pictures.one.thumbnails[0]
    placed = []
    for view in views:
        copy = thumbnails[view.image] if view.image in own else None
        if view.on_picture and copy is not None:
            view = view.scaled(*copy.size) if view.spread else replace(view, size=copy.size)
        placed.append(view)
    return placed


def _pictures(n: int) -> str:
    return f"{n} pictures" if n != 1 else "1 picture"


def _check_proportions(name: str, view: View, width: int, height: int) -> None:
    """Raises `ValueError` for a picture that cannot be what the patches were cut from."""
    across, down = view.size
    side = max(max((box[2] - box[0]) / across, (box[3] - box[1]) / down) for box in view.boxes)
    apart = abs(math.log(width / height * down / across))
    if apart > math.log1p(min(_ASPECT, side)):  # a processor's rounding to whole patches is no other picture
        there = f"{number(across, 6)} × {number(down, 6)}"
        raise ValueError(
            f"{name}: expected the picture as the model was given it, {there} pixels (width × height) or another resolution of "
            f"these proportions; got {width} × {height}; cut or stretch it as the processor does (Pillow: "
            f"picture.resize(({round(across)}, {round(down)})) where that stretches it)"
        )


def _grid(result: Result, over: str | None) -> Callable[[Result], np.ndarray]:
    """Values as `[panel patch]` in float64."""

    def grid(one: Result) -> np.ndarray:
        order = [one.dims.index(dim) for dim in (over, "patch") if dim]
        return to_numpy(one.values.permute(order)).reshape(-1, len(result.coords["patch"]))

    return grid


def _hover(
    result: Result, over: str | None, views: Sequence[View], values: np.ndarray, changes: np.ndarray
) -> list[list[str]]:
    """`[panel][patch]`: layer, patch, value with unit, distance from the base run, pixels."""
    unit = spaced(result.unit)
    pixels = {i: text for view in views for i, text in zip(view.index, view.pixels, strict=True)}
    found = []
    for panel, label in enumerate(result.coords[over] if over else ("",)):
        texts = []
        for i, patch in enumerate(result.coords["patch"]):
            notes = [f"{over} {label}"] * bool(over) + [f"patch {patch}"]
            if np.isnan(values[panel, i]):
                notes += ["not present"]
            else:
                notes += [f"{result.metric} {number(values[panel, i], 5)}{unit}"]
                if result.baseline:
                    notes += [from_base(changes[panel, i], unit, result.base)]
            texts.append(lines(*notes, *[pixels[i]] * bool(pixels[i])))
        found.append(texts)
    return found


def _remarks(
    result: Result,
    views: Sequence[View],
    pictures: Mapping[int, Any],
    opacity: float,
    absent: bool,
    smooth: bool,
    given: Any,
) -> list[str]:
    found = ["smoothed between patches"] * smooth
    if pictures:
        of = "clean " if given is None and "corrupted" in result.baseline else ""
        found += [f"colours at {number(100 * opacity)} % over the {of}picture"]
        if given is not None and result.provenance.get("n_prompts") not in (None, 1):
            found += ["the picture is an example"]
        if any(view.spread for view in views):
            found += ["patches laid evenly over the picture, whose cut is not known"]
    elif given is None and result.pictures is not None and result.pictures.one.differ:
        n = result.provenance.get("n_prompts", "its")
        found += [f"no picture: {n} prompts have different ones; choose one with sel(prompt=…), or give picture="]
    if any(not view.on_picture for view in views):
        found += ["by row and column, where the place on the picture is not known"]
    return found + ["no colour: no such cell" if pictures else "grey: no such cell"] * bool(absent)


# -- where it is drawn -------------------------------------------------------------------------------------------------


def _left_out(result: Result, beyond: Result | None) -> list[str]:
    """How many positions lie outside the pictures, and how large what is not seen there is."""
    if beyond is None or 0 in beyond.shape:
        return []
    away = beyond.mean("prompt") if "prompt" in beyond.dims else beyond
    away = away.effect() if away.baseline else away
    cells = away.top(1)
    n = len(beyond.coords["pos"])
    text = (
        f"{n} positions outside the picture are not drawn" if n > 1 else "1 position outside the picture is not drawn"
    )
    largest = f" (at most {number(abs(cells[0].value))}{spaced(result.unit)}, see heatmap)" if cells else ""
    return [text + largest]


def _lay_picture(figure: Figure, source: str, view: View, pair: str) -> None:
    figure.add_layout_image(
        source=source,
        xref=f"x{pair}",
        yref=f"y{pair}",
        x=0,
        y=0,
        sizex=view.size[0],
        sizey=view.size[1],
        xanchor="left",
        yanchor="top",
        sizing="stretch",
        layer="below",
    )


def _colour(
    figure: Figure,
    view: View,
    panel: Panel,
    shown: np.ndarray,
    hover: Sequence[Sequence[str]],
    pair: str,
    *,
    smooth: bool,
    opacity: float,
) -> None:
    axes: dict[str, Any] = {"xaxis": f"x{pair}", "yaxis": f"y{pair}"}
    if panel.at is None:  # axes want a trace
        figure.add_trace(go.Scatter(x=[None], y=[None], showlegend=False, hoverinfo="skip", **axes))
        return
    own = shown[panel.at]
    across, down, which = view.raster(np.arange(len(own), dtype=float))
    texts = np.array([[*hover[panel.at], ""]], object)[0][np.where(np.isnan(which), -1, which).astype(int)].tolist()
    z = np.where(np.isnan(which), np.nan, own[np.nan_to_num(which).astype(int)])
    told: dict[str, Any] = {"x": across, "y": down, "hovertext": texts, "hoverinfo": "text", "coloraxis": "coloraxis"}
    if smooth:
        n = max(len(across), len(down)) - 1
        sub = min(max(2 * (_FINE // n // 2) + 1, 3), 21)  # odd: the middle is the patch's own value
        x, y, fine = view.raster(own, sub)
        told_not: dict[str, Any] = {"coloraxis": "coloraxis", "hoverinfo": "skip", "zsmooth": "fast"}
        figure.add_trace(go.Heatmap(x=x, y=y, z=fine, opacity=opacity, **told_not, **axes))
    figure.add_trace(go.Heatmap(z=z, opacity=0.0 if smooth else opacity, **told, **axes))


def _place(
    figure: Figure,
    panels: Sequence[Panel],
    views: Sequence[View],
    layout: PanelLayout,
    theme: Theme,
    pictures: Mapping[int, Any],
) -> None:
    """Axes, frames, titles and the edges of tiles."""
    for i, (panel, (left, top, width, height)) in enumerate(zip(panels, layout.places, strict=True)):
        view, pair = views[panel.view], str(i + 1) if i else ""
        bare = {"showgrid": False, "zeroline": False, "showticklabels": False, "ticks": "", "constrain": "domain"}
        across = {"range": [0, view.size[0]], "anchor": f"y{pair}", "constraintoward": "left"}
        across["domain"] = [left / layout.width, min((left + width) / layout.width, 1.0)]
        down = {"range": [view.size[1], 0], "anchor": f"x{pair}", "constraintoward": "top", "scaleanchor": f"x{pair}"}
        down["domain"] = [max(1 - (top + height) / layout.height, 0.0), 1 - top / layout.height]
        figure.update_layout({f"xaxis{pair}": {**bare, **across}, f"yaxis{pair}": {**bare, **down}})
        if len(view.tiles) == 1:
            if i in layout.begins:
                figure.update_layout({f"yaxis{pair}": _ticks(view, "row", height)})
            if layout.ticks:
                figure.update_layout({f"xaxis{pair}": _ticks(view, "column", width)})
        elif panel.at is not None:
            _edges(figure, view, pair, theme)
        beyond = {**_LEFT, "xshift": -42 if layout.ticks else -4}
        for text, place in ((layout.heads[i], _ABOVE), (layout.sides[i], beyond)):
            if text:
                refs = {"xref": f"x{pair} domain", "yref": f"y{pair} domain"}
                figure.add_annotation(text=plain(text), showarrow=False, font={"size": 12}, **refs, **place)
    frame_cells(figure, theme)


_ABOVE = {"x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom", "yshift": 1, "xshift": -3}
_LEFT = {"x": 0, "y": 0.5, "xanchor": "right", "yanchor": "middle", "textangle": -90}


def _edges(figure: Figure, view: View, pair: str, theme: Theme) -> None:
    """A line around every tile."""
    for tile in view.tiles:
        left, top, right, bottom = view.outline(tile)
        figure.add_shape(
            type="rect",
            xref=f"x{pair}",
            yref=f"y{pair}",
            x0=left,
            y0=top,
            x1=right,
            y1=bottom,
            line={"width": 1, "color": theme.line},
        )


def _ticks(view: View, dim: Literal["row", "column"], pixels: float) -> dict[str, Any]:
    """Numbers of rows or columns at the middles of their patches; every n-th if all do not fit."""
    side = dim == "row"
    middles = {
        getattr(one, dim): (box[side] + box[side + 2]) / 2 for one, box in zip(view.patches, view.boxes, strict=True)
    }
    numbers = sorted(middles)
    spare = pixels / max(len(numbers), 1)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if step * spare >= (16 if side else 22))
    kept = [one for one in numbers if one % step == 0]
    return {
        "showticklabels": True,
        "tickmode": "array",
        "tickvals": [middles[one] for one in kept],
        "ticktext": [str(one) for one in kept],
        "ticks": "outside",
        "ticklen": 3,
        "tickfont": {"size": 11},
        "title": {"text": dim, "standoff": 4},
    }


def _named_places(result: Result, over: str | None, panels: Sequence[Panel], views: Sequence[View]) -> dict[str, Place]:
    """The middle of each patch at each layer, by its label."""
    labels: tuple[Label, ...] = result.coords["patch"]
    found: dict[str, Place] = {}
    for i, panel in enumerate(panels):
        if panel.at is None:
            continue
        view = views[panel.view]
        for patch, box in zip(view.index, view.boxes, strict=True):
            coords = {"patch": labels[patch], **({over: result.coords[over][panel.at]} if over else {})}
            middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            found[cell_label({dim: coords[dim] for dim in result.dims})] = (*middle, str(i + 1) if i else "")
    return found
