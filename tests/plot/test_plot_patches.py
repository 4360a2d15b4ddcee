"""Values over pictures: each patch on its own pixels, row 0 at the top, whatever the grid, and what no picture may claim."""

from __future__ import annotations

import base64
import builtins
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import mechkit as mk
from helpers.pictures.patches import grid, labels_of, made_up, scene, tiled
from mechkit.plot import Figure, heatmap, patches
from mechkit.plot._picture import embedded, grey_of, read_picture, shrunk
from mechkit.plot._size import PRESETS
from mechkit.result import Result

NAN = float("nan")
CM = 96 / 2.54


def axes(figure: Figure, i: int) -> tuple[Any, Any]:
    pair = str(i + 1) if i else ""
    return figure.layout[f"xaxis{pair}"], figure.layout[f"yaxis{pair}"]


def coloured(figure: Figure, i: int = 0) -> list[go.Heatmap]:
    """The heat maps of a panel."""
    pair = str(i + 1) if i else ""
    return [trace for trace in figure.data if trace.type == "heatmap" and trace.xaxis == f"x{pair}"]


def at(trace: go.Heatmap, x: float, y: float, what: str = "z") -> Any:
    """What a heat map has at a pixel of the picture, counted from the upper left."""
    column, row = (int(np.searchsorted(edges, place, "right")) - 1 for edges, place in ((trace.x, x), (trace.y, y)))
    inside = 0 <= row < len(trace.y) - 1 and 0 <= column < len(trace.x) - 1
    return trace[what][row][column] if inside else None


def on_screen(figure: Figure, i: int, x: float, y: float) -> tuple[float, float]:
    """Shares of the drawn area, from its left and from its top, at which a point of a panel is."""
    across, down = axes(figure, i)

    def share(axis: Any, value: float) -> float:
        start, end = axis.range
        low, high = axis.domain
        return low + (value - start) / (end - start) * (high - low)

    return share(across, x), 1 - share(down, y)


def decoded(source: str) -> np.ndarray:
    """The bytes of an embedded PNG, read as the standard has it."""
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        (n,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + n]
        assert zlib.crc32(kind + body) == struct.unpack(">I", data[place + 8 + n : place + 12 + n])[0]
        chunks[kind] = body
        place += 12 + n
    columns, rows, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert depth == 8
    channels = {0: 1, 2: 3}[colour]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(rows, -1)
    assert set(lines[:, 0]) == {2}
    return lines[:, 1:].astype(int).cumsum(0).astype(np.uint8).reshape(rows, columns, channels)


def caption(figure: Figure) -> str:
    return " · ".join(figure.facts.caption)


# Where the patches are


@pytest.mark.parametrize(
    ("rows", "columns", "size"), [(3, 3, (24, 24)), (2, 5, (100, 30)), (6, 4, (56, 112)), (1, 1, (8, 8))]
)
@pytest.mark.parametrize("larger", [None, 1, 4])
def test_every_patch_is_on_its_own_pixels(rows: int, columns: int, size: tuple[int, int], larger: int | None) -> None:
    result = made_up(grid(rows, columns, size), 2)
    picture = None if larger is None else scene(size[0] * larger, size[1] * larger)
    figure = patches(result, picture)
    effects, by = result.effect().values, larger or 1
    for layer in range(2):
        (trace,) = coloured(figure, layer)
        for i, place in enumerate(result.provenance["patches"]):
            left, top, right, bottom = (side * by for side in place["box"])
            for x, y in (
                (left + 0.1, top + 0.1),
                (right - 0.1, bottom - 0.1),
                ((left + right) / 2, (top + bottom) / 2),
            ):
                assert at(trace, x, y) == effects[layer, i].item()
                assert f"patch r{place['row']}c{place['column']}<br>" in at(trace, x, y, "hovertext")
            assert at(trace, size[0] * by + 1, 1) is None  # nothing beyond the picture
        across, down = axes(figure, layer)
        assert list(across.range) == [0, size[0] * by]
        assert list(down.range) == [size[1] * by, 0]


def test_row_0_is_at_the_top_and_column_0_on_the_left() -> None:
    values = torch.zeros(1, 6)
    values[0, 0] = 5.0  # r0c0
    result = made_up(grid(2, 3, (30, 20)), 1, values=values, baseline={}, base="")
    figure = patches(result, scene(30, 20))
    (trace,) = coloured(figure)
    assert at(trace, 1, 1) == 5.0
    left, top = on_screen(figure, 0, 1, 1)
    right, bottom = on_screen(figure, 0, 29, 19)
    assert left < 0.1 < 0.9 < right
    assert top < 0.1 < 0.9 < bottom  # from the top
    (image,) = figure.layout.images
    assert (image.x, image.y, image.xanchor, image.yanchor) == (0, 0, "left", "top")
    assert (image.sizex, image.sizey, image.sizing, image.layer) == (30, 20, "stretch", "below")


def test_what_a_wrong_layout_would_change_is_seen() -> None:
    """The control: rows for columns, upside down, or patches in another order are found by the same look at pixels."""
    result = made_up(grid(2, 3, (30, 20)), 1)
    (trace,) = coloured(patches(result))
    effects = result.effect().values[0]

    def right(z: Any) -> bool:
        changed = go.Heatmap(trace.to_plotly_json() | {"z": np.asarray(z)})
        places = result.provenance["patches"]
        return all(
            at(changed, p["box"][0] + 1, p["box"][1] + 1) == e.item() for p, e in zip(places, effects, strict=True)
        )

    assert right(trace.z)
    assert not right(np.asarray(trace.z)[::-1])
    assert not right(np.asarray(trace.z)[:, ::-1])
    assert not right(np.roll(np.asarray(trace.z), 1))
    moved = [
        {**place, "box": other["box"]}
        for place, other in zip(grid(2, 3, (30, 20)), grid(2, 3, (30, 20))[::-1], strict=True)
    ]
    (other,) = coloured(patches(made_up(moved, 1)))
    np.testing.assert_array_equal(other.z, np.asarray(trace.z)[::-1, ::-1])  # boxes say where, not the order of labels


def test_proportions_are_the_pictures() -> None:
    for width, height in ((400, 100), (100, 300), (64, 64)):
        for size in (None, "column", "page"):
            figure = patches(made_up(grid(4, 4, (width, height)), 3), scene(width, height), size=size)
            margin = figure.layout.margin
            inner = figure.layout.width - margin.l - margin.r, figure.layout.height - margin.t - margin.b
            for i in range(3):
                across, down = axes(figure, i)
                drawn = [(axis.domain[1] - axis.domain[0]) * n for axis, n in zip((across, down), inner, strict=True)]
                assert drawn[0] / drawn[1] == pytest.approx(width / height, rel=0.05)
                assert (down.scaleanchor, across.constrain, down.constrain) == (
                    f"x{i + 1 if i else ''}",
                    "domain",
                    "domain",
                )


def test_the_whole_and_the_tiles_are_panels_of_their_own() -> None:
    result = made_up(tiled(), 2)
    figure = patches(result, scene(960, 640))
    effects = result.effect().values
    assert len([trace for trace in figure.data if trace.type == "heatmap"]) == 4
    for panel, (tiles, layer) in enumerate([(False, 0), (False, 1), (True, 0), (True, 1)]):
        (trace,) = coloured(figure, panel)
        for i, place in enumerate(result.provenance["patches"]):
            if (place["tile"] is not None) == tiles:
                left, top, right, bottom = place["box"]
                assert (
                    at(trace, left + right, top + bottom) == effects[layer, i].item()
                )  # the middle, of a picture twice as large
                start = f"tile {place['tile']}" if tiles else "whole"
                assert f"layer {layer}<br>patch {start} r{place['row']}c" in at(
                    trace, left + right, top + bottom, "hovertext"
                )
    texts = [note.text for note in figure.layout.annotations]
    assert texts.count("layer 0") == 2
    assert {"whole", "tiles"} <= set(texts)
    lines = [shape for shape in figure.layout.shapes if shape.xref == "x3"]
    assert sorted((s.x0, s.y0, s.x1, s.y1) for s in lines) == [
        (x, y, x + 320, y + 320) for x in (0, 320, 640) for y in (0, 320)
    ]
    assert not [shape for shape in figure.layout.shapes if shape.xref == "x"]
    assert [note.text for note in patches(result.sel(layer=0), scene(960, 640)).layout.annotations][:2] == [
        "whole",
        "tiles",
    ]


def test_two_pictures_are_two_panels_with_their_own_pixels() -> None:
    places = grid(3, 3, (60, 60)) + grid(2, 4, (80, 20), image=1)
    result = made_up(places, None)
    figure = patches(result, [scene(60, 60), scene(160, 40)])
    effects = result.effect().values
    assert [image.sizex for image in figure.layout.images] == [60, 160]
    for panel, by in ((0, 1), (1, 2)):
        (trace,) = coloured(figure, panel)
        for i, place in enumerate(places):
            if place["image"] == panel:
                left, top, right, bottom = (by * side for side in place["box"])
                assert at(trace, (left + right) / 2, (top + bottom) / 2) == effects[i].item()
    assert [note.text for note in figure.layout.annotations][:2] == ["picture 0", "picture 1"]
    one = patches(result, [None, scene(160, 40)])
    assert [image.xref for image in one.layout.images] == ["x2"]
    assert patches(
        result.sel(patch=[label for label in result.coords["patch"] if "image 1" in label]), scene(80, 20)
    ).data


def test_patches_of_unknown_pixels_lie_by_row_and_column() -> None:
    unknown = [*grid(3, 2, (20, 30)), *grid(2, 2, tile=0), *grid(2, 2, tile=1)]
    result = made_up(unknown, None)
    figure = patches(result)
    effects = result.effect().values
    assert len(figure.data) == 3  # no telling where the tiles are: one by one
    for tile in (0, 1):
        (trace,) = coloured(figure, tile + 1)
        for i, place in enumerate(unknown):
            if place["tile"] == tile:
                assert at(trace, place["column"] + 0.5, place["row"] + 0.5) == effects[i].item()
                assert "pixels" not in at(trace, place["column"] + 0.5, place["row"] + 0.5, "hovertext")
    assert "pixels 10–20 across, 20–30 down" in at(coloured(figure)[0], 15, 25, "hovertext")
    assert "where the place on the picture is not known" in caption(figure)
    over = patches(result, scene(20, 30))
    assert [image.xref for image in over.layout.images] == ["x"]  # only below what is known to lie on it
    assert {trace.opacity for trace in over.data} == {0.6}  # equal values look alike
    spread = made_up(grid(2, 4), None)
    figure = patches(spread, scene(80, 20))
    (trace,) = coloured(figure)
    for i, place in enumerate(grid(2, 4)):
        assert at(trace, 20 * place["column"] + 10, 10 * place["row"] + 5) == spread.effect().values[i].item()
    assert "laid evenly over the picture" in caption(figure)
    with pytest.raises(ValueError, match="picture: expected patches whose place on the picture is known"):
        patches(made_up([*grid(2, 2, tile=0), *grid(2, 2, tile=1)], None), scene(20, 20))


def test_frames_of_a_film_do_not_hide_each_other() -> None:
    second = [{**place, "row": place["row"] + 2} for place in grid(2, 2, (16, 16))]
    result = made_up(grid(2, 2, (16, 16)) + second, None)
    (trace,) = coloured(patches(result))
    np.testing.assert_array_equal(trace.z, result.effect().values.reshape(4, 2))


def test_some_of_the_patches_stay_where_they_were() -> None:
    result = made_up(grid(4, 4, (40, 40)), None)
    figure = patches(result.sel(patch=["r2c3", "r0c1"]), scene(40, 40))
    (trace,) = coloured(figure)
    assert list(figure.layout.xaxis.range) == [0, 40]
    for label, x, y in (("r2c3", 35, 25), ("r0c1", 15, 5)):
        assert at(trace, x, y) == result.effect().sel(patch=label).values.item()
    middle = at(trace, 25, 15)
    assert middle is None or np.isnan(middle)
    known = made_up(
        grid(4, 4, (40, 40)), None, provenance={"patches": grid(4, 4, (40, 40))[:1], "picture_sizes": [[40, 40]]}
    )
    first = Result(**{**vars_of(known), "values": known.values[:1], "coords": {"patch": ("r0c0",)}})
    figure = patches(first, scene(80, 80))
    assert list(figure.layout.xaxis.range) == [0, 80]
    assert list(coloured(figure)[0].x) == [0, 20]


def vars_of(result: Result) -> dict[str, Any]:
    names = ("values", "dims", "coords", "baseline", "base", "metric", "unit", "provenance")
    return {name: getattr(result, name) for name in names}


def test_squares_of_patches_are_as_large_as_they_are() -> None:
    places = [
        {"image": 0, "tile": None, "row": r, "column": c, "box": [20 * c, 20 * r, min(20 * c + 20, 30), 20 * r + 20]}
        for r in range(2)
        for c in range(2)
    ]
    names = ("r0c0-r1c1", "r0c2-r1c2", "r2c0-r3c1", "r2c2-r3c2")
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    result = Result(values, ("patch",), {"patch": names}, {}, "", "kl", "nats", {"patches": places, "group": 2})
    (trace,) = coloured(patches(result.sel(patch=["r2c2-r3c2", "r0c0-r1c1"])))
    assert (at(trace, 25, 30), at(trace, 10, 10)) == (4.0, 1.0)
    (trace,) = coloured(patches(result))
    np.testing.assert_array_equal(trace.z, values.reshape(2, 2))
    assert list(trace.x) == [0, 20, 30]


# What is coloured


def test_smooth_colours_are_the_values_in_the_middles_and_between_them_elsewhere() -> None:
    result = made_up(grid(4, 6, (60, 40)), None)
    figure = patches(result, scene(60, 40), smooth=True)
    fine, hover = coloured(figure)
    effects = result.effect().values.double().numpy()
    for i, place in enumerate(grid(4, 6, (60, 40))):
        x, y = 10 * place["column"] + 5, 10 * place["row"] + 5
        assert at(fine, x, y) == pytest.approx(effects[i])
        assert at(hover, x, y) == effects[i]
        assert "patch" in at(hover, x, y, "hovertext")
    z = np.asarray(fine.z)
    assert z.shape[0] > 40
    assert effects.min() - 1e-12 <= z.min() <= z.max() <= effects.max() + 1e-12
    assert abs(np.diff(z, axis=1)).max() < abs(np.diff(effects.reshape(4, 6), axis=1)).max() / 4  # no jumps
    assert (fine.x[0], fine.x[-1], fine.y[0], fine.y[-1]) == (0, 60, 0, 40)  # and none over the border
    assert (hover.opacity, fine.hoverinfo) == (0, "skip")
    assert "smoothed" in caption(figure)
    assert "smoothed" not in caption(patches(result))


def test_smooth_colours_do_not_run_over_the_edge_of_a_tile() -> None:
    places = grid(2, 2, (20, 20), tile=0) + grid(2, 2, (20, 20), at=(20, 0), tile=1)
    values = torch.tensor([0.0] * 4 + [9.0] * 4)
    fine, _ = coloured(patches(made_up(places, None, values=values, baseline={}, base=""), smooth=True))
    z = np.asarray(fine.z)
    assert set(z[:, np.asarray(fine.x)[:-1] < 20].ravel()) == {0.0}
    assert set(z[:, np.asarray(fine.x)[:-1] >= 20].ravel()) == {9.0}
    joined, _ = coloured(
        patches(
            made_up(
                grid(2, 4, (40, 20)), None, values=values.reshape(2, 2, 2).movedim(0, 1).flatten(), baseline={}, base=""
            ),
            smooth=True,
        )
    )
    assert len(set(np.asarray(joined.z)[0])) > 4  # the control: in one tile they do


def test_smooth_colours_leave_out_what_does_not_exist() -> None:
    values = torch.tensor([1.0, NAN, 3.0, 4.0])
    result = made_up(grid(2, 2, (20, 20)), None, values=values, baseline={}, base="")
    for smooth in (False, True):
        figure = patches(result, scene(20, 20), smooth=smooth)
        trace = coloured(figure)[0]
        assert np.isnan(at(trace, 15, 5))
        assert np.isfinite(at(trace, 5, 5))
        assert "no colour: no such cell" in caption(figure)
        assert np.nanmin(np.asarray(trace.z)) == 1.0
    assert "grey: no such cell" in caption(patches(result))
    assert "not present" in at(coloured(patches(result))[0], 15, 5, "hovertext")


def test_colours_are_effects_on_one_scale_as_in_a_heat_map() -> None:
    result = made_up(grid(4, 6, (60, 40)), 3, 2)
    figure, flat = patches(result, scene(60, 40)), heatmap(result)
    assert (
        figure.layout.coloraxis.to_plotly_json()["colorscale"] == flat.layout.coloraxis.to_plotly_json()["colorscale"]
    )
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (
        flat.layout.coloraxis.cmin,
        flat.layout.coloraxis.cmax,
    )
    assert figure.layout.coloraxis.colorbar.title.text == flat.layout.coloraxis.colorbar.title.text
    assert "change in logit_diff (logits)" in figure.layout.coloraxis.colorbar.title.text
    np.testing.assert_array_equal(np.stack([np.asarray(t.z).ravel() for t in figure.data]), np.asarray(flat.data[0].z))
    value = patches(result, show="value")
    np.testing.assert_array_equal(np.asarray(value.data[1].z).ravel(), result.mean("prompt").sel(layer=1).values)
    share = patches(result, show="normalized")
    np.testing.assert_allclose(
        np.asarray(share.data[1].z).ravel(), result.mean("prompt").normalized().sel(layer=1).values
    )
    assert patches(result, zmax=9.0).layout.coloraxis.cmax == 9
    assert patches(result, center=-3.25, zmax=1.0).layout.coloraxis.cmin == -4.25
    assert patches(result, theme="dark").layout.paper_bgcolor == "#111418"


def test_hover_has_layer_patch_value_with_unit_and_pixels() -> None:
    result = made_up(grid(2, 2, (20, 20)), 2)
    (trace,) = coloured(patches(result, scene(40, 40)), 1)
    value, effect = (one.sel(layer=1, patch="r1c0").values.item() for one in (result, result.effect()))
    first, second, third, fourth, fifth = at(trace, 5, 25, "hovertext").replace("−", "-").split("<br>")
    assert (first, second, fifth) == ("layer 1", "patch r1c0", "pixels 0–20 across, 20–40 down")
    assert third.startswith("logit_diff ")
    assert third.endswith(" logits")
    assert float(third.split()[1]) == pytest.approx(value, rel=1e-4)
    assert fourth.endswith(" logits from the corrupted run")
    assert float(fourth.split()[0]) == pytest.approx(effect, rel=1e-3)


def test_the_table_has_the_numbers_and_labels_their_places() -> None:
    result = made_up(grid(2, 3, (30, 20)), 12, 2)
    figure = patches(result, annotations={"L2 r1c2": "here"})
    table = figure.table()
    chosen = [0, 2, 4, 6, 8, 10, 11]
    assert sorted(set(table["layer"])) == chosen
    np.testing.assert_array_equal(np.sort(table["value"]), np.sort(result.sel(layer=chosen).values.flatten()))
    assert "7 of 12 layers" in caption(figure)
    (note,) = [note for note in figure.layout.annotations if note.name == "annotation"]
    assert (note.x, note.y, note.xref) == (25, 15, "x2")
    assert [trace.xaxis for trace in patches(result, layers=[3, 1]).data] == ["x", "x2"]
    assert [note.text for note in patches(result, layers=[3, 1]).layout.annotations][:2] == ["layer 3", "layer 1"]
    assert len(patches(result, layers=range(12)).data) == 12


# The picture


def test_opacity_leaves_the_picture_to_be_seen() -> None:
    result, picture = made_up(grid(2, 3, (30, 20)), None), scene(30, 20)
    assert coloured(patches(result, picture))[0].opacity == 0.6
    assert coloured(patches(result, picture, opacity=0.25))[0].opacity == 0.25
    assert coloured(patches(result, opacity=0.25))[0].opacity == 1.0  # nothing below to be seen
    assert "colours at 60 % over the picture" in caption(patches(result, picture))
    shown = decoded(patches(result, picture, grey=False).layout.images[0].source)
    np.testing.assert_array_equal(shown, picture)
    pale = decoded(patches(result, picture).layout.images[0].source)[..., 0].astype(float)
    grey = grey_of(picture).astype(float)
    assert np.corrcoef(pale.ravel(), grey.ravel())[0, 1] > 0.999
    assert pale.min() > 70  # near the paper's white, which is that of no effect
    dark = decoded(patches(result, picture, theme="dark").layout.images[0].source)
    assert dark.max() < 185


def test_the_picture_beside_is_as_it_is() -> None:
    result, picture = made_up(tiled(), 2), scene(480, 320)
    figure = patches(result, picture, beside=True)
    assert [image.xref for image in figure.layout.images] == ["x", "x2", "x3", "x4", "x5"]
    np.testing.assert_array_equal(decoded(figure.layout.images[0].source), picture)
    assert coloured(figure, 0) == []
    assert axes(figure, 1)[0].domain == axes(figure, 3)[0].domain  # layers below each other
    alone = patches(made_up(grid(2, 3, (30, 20)), None), scene(30, 20), beside=True)
    assert [note.text for note in alone.layout.annotations][:2] == ["the picture", "logit_diff"]


def test_pictures_of_every_kind_are_the_same() -> None:
    picture = scene(30, 20)
    tensor = torch.from_numpy(picture)
    same = [
        *(picture, tensor, picture / 255, tensor.movedim(-1, 0), tensor.movedim(-1, 0) / 255, picture.astype(np.int64)),
        *((tensor / 255).double().numpy(), np.asfortranarray(picture), (tensor / 255).requires_grad_()),
    ]
    for one in same:
        np.testing.assert_array_equal(read_picture(one), picture)
    half = read_picture((tensor / 255).to(torch.bfloat16)).astype(int)
    assert abs(half - picture.astype(int)).max() <= 1
    for one in (picture, grey_of(picture)):
        np.testing.assert_array_equal(decoded(embedded(one)).reshape(one.shape), one)


class Opened:
    """What Pillow's images have."""

    def __init__(self, picture: np.ndarray) -> None:
        self.picture, self.size = picture, picture.shape[1::-1]

    def getpixel(self, at: tuple[int, int]) -> Any:
        return self.picture[at[::-1]]

    def convert(self, mode: str) -> np.ndarray:
        assert mode == "RGB"
        return self.picture


def test_an_opened_image_needs_no_pillow_and_a_path_says_that_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, result = scene(30, 20), made_up(grid(2, 3, (30, 20)), None)
    np.testing.assert_array_equal(
        decoded(patches(result, Opened(picture), grey=False).layout.images[0].source), picture
    )
    file = tmp_path / "it.png"
    file.write_bytes(base64.b64decode(embedded(picture).split(",")[1]))
    imported = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return imported(name, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        with pytest.raises(RuntimeError, match=r"picture: to read it.png takes Pillow \(`pip install pillow`\)"):
            patches(result, file)
    with pytest.raises(ValueError, match=r"picture: expected the path of a picture; there is no file .*nowhere"):
        patches(result, tmp_path / "nowhere.png")


def test_files_are_read_by_pillow(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    picture = scene(30, 20)
    image.fromarray(picture).save(tmp_path / "it.png")
    for given in (tmp_path / "it.png", str(tmp_path / "it.png"), image.open(tmp_path / "it.png")):
        np.testing.assert_array_equal(read_picture(given), picture)
    np.testing.assert_array_equal(
        np.asarray(image.open(io.BytesIO(base64.b64decode(embedded(picture).split(",")[1])))), picture
    )
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="picture: expected a picture that Pillow can read"):
        read_picture(tmp_path / "no.png")


def test_large_pictures_are_made_small() -> None:
    picture = np.zeros((1500, 3000, 3), np.uint8)
    picture[:, 1500:] = 200
    small = shrunk(picture, 300)
    assert small.shape == (150, 300, 3)
    assert (small[:, :150] == 0).all()
    assert (small[:, 150:] == 200).all()
    figure = patches(made_up(grid(2, 4, (40, 20)), 5), picture)
    assert decoded(figure.layout.images[0].source).shape[1] == 600
    assert list(figure.layout.xaxis.range) == [0, 3000]  # of the picture that was given
    assert shrunk(picture, 5000) is picture


# Sizes, reports, defaults


@pytest.mark.parametrize("size", ["column", "page", "slide"])
@pytest.mark.parametrize("n", [None, 3, 40])
def test_presets(size: str, n: int | None) -> None:
    figure = patches(made_up(grid(6, 9, (90, 60)), n), scene(90, 60), size=size)  # type: ignore[arg-type]
    assert figure.layout.width == pytest.approx(PRESETS[size].width)
    assert figure.layout.height <= PRESETS[size].tallest + 1
    margin = figure.layout.margin
    inner = figure.layout.width - margin.l - margin.r, figure.layout.height - margin.t - margin.b
    places = []
    for i in range(len(figure.data)):
        across, down = axes(figure, i)
        drawn = [(axis.domain[1] - axis.domain[0]) * n for axis, n in zip((across, down), inner, strict=True)]
        assert min(drawn) > 35
        places.append((*across.domain, *down.domain))
    for i, one in enumerate(places):  # none on another
        for other in places[:i]:
            assert one[0] >= other[1] or one[1] <= other[0] or one[2] >= other[3] or one[3] <= other[2]


def test_result_plot_draws_patches_where_there_are_any() -> None:
    result, picture = made_up(grid(2, 3, (30, 20)), 3, 2), scene(30, 20)
    for one in (result, result.mean("prompt"), result.sel(layer=0), result.mean("prompt").normalized()):
        assert one.plot().facts.kind == "patches"
        figure = one.plot(picture=picture, size="column")
        assert (figure.facts.kind, len(figure.layout.images)) == ("patches", len(figure.data))
    assert result.sel(patch="r0c0").plot().facts.kind == "bars"
    bare = Result(**{**vars_of(result.mean("prompt")), "provenance": {}})
    assert bare.plot().facts.kind == "heatmap"
    by_pos = Result(torch.rand(2, 3), ("layer", "pos"), {"layer": (0, 1), "pos": (0, 1, 2)}, {}, "", "kl", "nats", {})
    assert by_pos.plot().facts.kind == "heatmap"
    with pytest.raises(ValueError, match="picture"):
        by_pos.plot(picture=picture)
    assert patches(result, picture).layout.images[0].source.startswith("data:image/png")
    assert "layer 0" in result._repr_html_()


def test_reports_hold_the_picture(tmp_path: Path) -> None:
    result = made_up(grid(2, 3, (30, 20)), 3, 2)
    page = mk.report(tmp_path / "it.html", result, result.plot(picture=scene(30, 20)), code=False).read_text()
    assert page.count("Image patching of resid_pre: logit_diff by layer and patch") >= 2
    assert "img-src data:" in page
    saved = patches(result, scene(30, 20)).save(tmp_path / "it.csv")
    assert saved.read_text().startswith("layer,patch,prompt,value")


def test_heat_maps_part_pictures_and_tiles_and_say_the_pixels() -> None:
    places = grid(2, 2, (20, 20)) + grid(1, 2, (20, 10), tile=0) + grid(1, 2, (20, 10), at=(0, 10), tile=1)
    figure = heatmap(made_up(places, 2))
    assert [(line.x0, line.x1) for line in figure.layout.shapes] == [(3.5, 3.5), (5.5, 5.5)]
    assert "patch tile 1 r0c1<br>" in figure.data[0].hovertext[0][7]
    assert figure.data[0].hovertext[0][7].endswith("<br>pixels 10–20 across, 10–20 down")
    assert not heatmap(made_up(grid(2, 2, (20, 20)), 2)).layout.shapes
    assert len(heatmap(made_up(places, None)).layout.shapes) == 2
    by_pos = Result(torch.rand(2, 3), ("layer", "pos"), {"layer": (0, 1), "pos": (0, 1, 2)}, {}, "", "kl", "nats", {})
    assert not heatmap(by_pos).layout.shapes
    assert "pixels" not in heatmap(by_pos).data[0].hovertext[0][0]


def test_patches_of_a_tiny_model() -> None:
    from helpers.vlm import in_double, make_pairs, pair_of_models

    with in_double():
        _, model = pair_of_models("llava")
        pairs = make_pairs("llava", model)
        metric = mk.logit_diff(pairs)
        result = mk.image_patching(model, pairs, metric, layers=[0, 2], progress=False)
        squares = mk.image_patching(model, pairs, metric, layers=[0], group=2, progress=False)
        some = mk.activation_patching(
            model, pairs, metric, "resid_pre", "layer patch", positions=["r0c0"], layers=[0], progress=False
        )
    assert [len(one) for one in (result.coords["patch"], squares.coords["patch"])] == [9, 4]
    picture = scene(48, 48)
    figure = result.plot(picture=picture)
    assert figure.facts.title == "Image patching of resid_pre: logit_diff by layer and patch"
    effects = result.mean("prompt").effect().values
    (trace,) = coloured(figure, 1)
    for row in range(3):
        for column in range(3):
            assert at(trace, 16 * column + 8, 16 * row + 8) == effects[1, 3 * row + column].item()
    (trace,) = coloured(squares.plot(picture=picture))
    assert list(trace.x) == [0, 32, 48]
    (trace,) = coloured(some.plot(picture=picture))
    assert list(trace.x) == [0, 16]  # a third of the picture, though it is the only patch
    assert some.plot(picture=picture).layout.xaxis.range == (0, 48)


# What is refused


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"opacity": 1.5}, r"opacity: expected a number from 0 .* to 1 .*, got 1.5"),
        ({"opacity": -0.1}, "opacity: expected a number from 0"),
        ({"opacity": NAN}, "opacity"),
        ({"opacity": "half"}, "opacity: expected a number"),
        ({"smooth": "yes"}, "smooth: expected True or False, got str 'yes'"),
        ({"smooth": 1}, "smooth: expected True or False"),
        ({"grey": "no"}, "grey: expected True or False"),
        ({"beside": 2}, "beside: expected True or False"),
        ({"layers": []}, "layers: expected"),
        ({"layers": [7]}, r"layers: expected some of the result's layers, each once: 0, 1; got \[7\]"),
        ({"layers": [0, 0]}, "layers: expected"),
        ({"show": "all"}, "show: expected"),
        ({"zmax": 0.0}, "zmax: expected a positive number"),
        ({"theme": "beige"}, "theme: expected"),
        ({"size": "poster"}, "size: expected"),
        ({"pictures": None}, "pictures: .*'picture'"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        patches(made_up(grid(2, 3, (30, 20)), 2), scene(30, 20), **wrong)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (3, r"picture: expected a PIL image, a path, or an array .*; got int"),
        (np.zeros((20, 30)), r"got an array of shape \[20, 30\]; repeat the one colour three times"),
        (np.zeros((20, 30, 4), np.uint8), r"got an array of shape \[20, 30, 4\]; leave out the transparency"),
        (torch.zeros(1, 3, 20, 30), r"got an array of shape \[1, 3, 20, 30\]; take the one picture of the batch"),
        (np.zeros((0, 30, 3)), r"got an array of shape \[0, 30, 3\]"),
        (np.full((20, 30, 3), 200.0), r"expected fractions 0..1, got 200..200; divide by 255"),
        (
            torch.full((3, 20, 30), -1.5),
            r"expected fractions 0..1, got -1.5..-1.5; .* a processor made are to be scaled back",
        ),
        (np.full((20, 30, 3), NAN), r"expected fractions 0..1, got nan"),
        (np.full((20, 30, 3), 300), r"expected whole numbers 0..255, got 300..300"),
        (np.zeros((20, 30, 3), bool), r"got bool"),
        (
            scene(30, 30),
            r"expected the picture as the model was given it, 30 × 20 pixels .*; got 30 × 30; .*resize\(\(30, 20\)\)",
        ),
        (scene(20, 30), "got 20 × 30"),
        ([scene(30, 20)] * 2, r"picture: expected 1 picture, .*; got a list of 2"),
        ([np.zeros((20, 30))], r"picture\[0\]: expected"),
        ([], r"got a list of 0"),
    ],
)
def test_wrong_pictures(picture: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patches(made_up(grid(2, 3, (30, 20)), 2), picture)


def test_a_picture_rounded_to_whole_patches_is_the_picture() -> None:
    result = made_up(grid(17, 23, (644, 476)), None)
    assert patches(result, scene(640, 480)).layout.images
    with pytest.raises(ValueError, match="got 640 × 640"):
        patches(result, scene(640, 640))


def test_wrong_results() -> None:
    by_pos = Result(torch.rand(2, 3), ("layer", "pos"), {"layer": (0, 1), "pos": (0, 1, 2)}, {}, "", "kl", "nats", {})
    with pytest.raises(
        ValueError, match=r"result: expected a dim 'patch', as image_patching gives it .*\('layer', 'pos'\)"
    ):
        patches(by_pos)
    with pytest.raises(TypeError, match="result: expected a Result, got int"):
        patches(3)  # type: ignore[arg-type]
    good = made_up(grid(2, 2, (20, 20)), 2)
    parts = vars_of(good)
    for listed in (None, [], [{"image": 0}], grid(3, 1), "r0c0", [{**grid(1, 1)[0], "box": [0, 0, 0, 1]}]):
        with pytest.raises(ValueError, match=r"result: expected provenance\['patches'\] to say where each patch is"):
            patches(Result(**{**parts, "provenance": {"patches": listed}}))
        assert heatmap(Result(**{**parts, "provenance": {"patches": listed}})).data
    coords = {**parts["coords"], "head": (0, 1)}
    heads = Result(**{**parts, "values": torch.rand(2, 4, 2), "dims": ("layer", "patch", "head"), "coords": coords})
    with pytest.raises(ValueError, match=r"result: expected 'patch' and at most one other dim.*sel\(\)"):
        patches(heads)
    assert heads.plot().facts.kind == "heatmap"
    assert [note.text for note in patches(heads.sel(layer=0)).layout.annotations][:2] == ["head 0", "head 1"]
    with pytest.raises(ValueError, match="layers: expected None for a result without a dim 'layer'"):
        patches(heads.sel(layer=0), layers=[0])
    with pytest.raises(ValueError, match="expected at least one cell that exists"):
        patches(Result(**{**parts, "values": torch.full((2, 4), NAN)}))
    endless = {"values": torch.full((2, 4), float("inf")), "baseline": {}, "base": ""}
    with pytest.raises(ValueError, match="patches: expected finite values"):
        patches(Result(**{**parts, **endless}))
    two = made_up(grid(1, 1, (8, 8)) + grid(1, 1, (8, 8), image=1), None)
    with pytest.raises(ValueError, match=r"picture: expected a list of 2 pictures, .*got one \(ndarray\)"):
        patches(two, scene(8, 8))
    with pytest.raises(ValueError, match=r"expected 60 panels at most, got 100: .*layers="):
        patches(made_up(grid(1, 1, (8, 8)), 100), layers=range(100))


def test_labels_that_are_no_grids_are_taken_in_order() -> None:
    places = grid(1, 2, (20, 10))
    result = Result(
        torch.tensor([1.0, 2.0]), ("patch",), {"patch": ("left", "right")}, {}, "", "kl", "nats", {"patches": places}
    )
    (trace,) = coloured(patches(result))
    assert (at(trace, 5, 5), at(trace, 15, 5)) == (1.0, 2.0)
    assert labels_of(places) == ("r0c0", "r0c1")
