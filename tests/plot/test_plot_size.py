"""Sizes for papers and slides, pictures without widgets, and texts at labels: another layout, the same numbers."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from helpers.gallery import KINDS, figures, made_up, patterns
from mechkit.circuits import Circuit, EdgeScores, Graph
from mechkit.plot import Figure, attention, bars, circuit, curve, heatmap, tokens
from mechkit.plot._export import find_browser
from mechkit.plot._size import PRESETS, TALLEST, pixels
from mechkit.result import Result

CM = 96 / 2.54


def fonts(part: Any) -> Iterator[float]:
    """Every font size in a figure's JSON."""
    if isinstance(part, dict):
        for name, value in part.items():
            if name.endswith("font") and isinstance(value, dict) and "size" in value:
                yield value["size"]
            yield from fonts(value)
    elif isinstance(part, list | tuple):
        for one in part:
            yield from fonts(one)


def numbers(figure: go.Figure) -> list[Any]:
    """What is drawn and what hover says, whatever its place in pixels: what a colour is of, and texts."""
    return [
        (trace.z if trace.type == "heatmap" else trace.marker.color, trace.hovertext)
        for trace in figure.data
        if trace.hovertext is not None or trace.type == "heatmap"
    ]


# Presets


@pytest.mark.parametrize(
    "kind", KINDS
)  # not by figure: those are drawn when the test runs, not when tests are looked for
def test_every_figure_has_the_presets_size_and_the_same_numbers(kind: str) -> None:
    for name, figure in figures(kind).items():
        table = figure.table()
        for size in ("column", "page") if name == next(iter(figures(kind))) else ("column",):
            small = figure.resized(size)
            assert small.layout.width == pytest.approx(PRESETS[size].width), name
            assert small.layout.height <= PRESETS[size].tallest + 1 or kind == "tokens", name
            body, least = small.layout.font.size, min(fonts({"layout": small.layout.to_plotly_json()}), default=12)
            assert body == pytest.approx(8 * 96 / 72), name
            assert least >= 0.7 * body or kind == "circuit", name  # readable: 5.6 points
            assert not (small.layout.updatemenus and small.still().layout.updatemenus), name
            if kind not in ("tokens", "hidden"):  # fewer layers, or lines, in a column
                for column, values in small.table().items():
                    np.testing.assert_array_equal(values, table[column], err_msg=name)
        assert figure.layout.height <= TALLEST or kind == "tokens", name


def test_presets_are_those_of_journals_and_slides() -> None:
    figure = heatmap(made_up((12, 12), "layer head"))
    widths = {size: figure.resized(size).layout.width for size in ("column", "page", "slide")}
    assert widths == pytest.approx({"column": 8.5 * CM, "page": 17.5 * CM, "slide": 1280})
    slide = figure.resized("slide")
    assert slide.layout.font.size == pytest.approx(16 * 96 / 72)
    assert slide.layout.height <= 720
    assert figure.layout.width not in widths.values()  # the control, and the figure itself stays as it is


def test_hover_and_colours_are_unchanged() -> None:
    for kind in ("heatmap", "lens", "bars"):
        figure = next(iter(figures(kind).values()))
        for (drawn, hover), (again, same) in zip(numbers(figure), numbers(figure.resized("column")), strict=True):
            np.testing.assert_array_equal(np.asarray(drawn, object), np.asarray(again, object))
            np.testing.assert_array_equal(np.asarray(hover, object), np.asarray(same, object))
    result = made_up((3, 4), "layer head")
    (panel,) = result.plot(size="column").data
    for i, j in np.ndindex(3, 4):
        value, effect = (one.values[i, j].item() for one in (result, result.effect()))
        assert panel.z[i, j] == effect
        lines = panel.hovertext[i][j].replace("−", "-").split("<br>")
        assert float(lines[2].split()[-2]) == pytest.approx(value, rel=1e-4)
        assert float(lines[3].split()[0]) == pytest.approx(effect, rel=1e-3)


def test_width_height_and_font_size_are_the_callers() -> None:
    result = made_up((6, 8), "layer head")
    figure = heatmap(result, width="12 cm", height=300, font_size=9)
    assert figure.layout.width == pytest.approx(12 * CM)
    assert figure.layout.height == pytest.approx(300)
    assert figure.layout.font.size == pytest.approx(12)
    wider = heatmap(result, size="column", width="9 cm")
    assert (wider.layout.width, wider.layout.font.size) == pytest.approx((9 * CM, 8 * 96 / 72))
    for fn in (bars, heatmap):
        assert fn(result.sel(head=0), font_size=18).layout.font.size == pytest.approx(24)
    large = heatmap(result, font_size=18)
    assert large.layout.width == pytest.approx(2 * heatmap(result).layout.width)  # everything twice as large
    assert large.layout.margin.l == pytest.approx(2 * heatmap(result).layout.margin.l)
    assert large.data[0].xgap == 2
    np.testing.assert_array_equal(large.data[0].z, heatmap(result).data[0].z)


def test_lengths() -> None:
    for length in (96, 96.0, "1 in", "2.54cm", "25.4 mm", "72 pt", "96px"):
        assert pixels("width", length) == pytest.approx(96)
    for wrong in ("8.5", "cm", "-1 cm", "1 km", 0, -3, float("nan"), True, [3]):
        with pytest.raises(ValueError, match=r"width: expected pixels .*such as '8.5 cm'"):
            pixels("width", wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": "colum"}, r"size: expected one of 'column', 'page', 'slide'.*'column'"),
        ({"width": "8.5 miles"}, "width: expected pixels"),
        ({"width": "1 cm"}, r"width: expected at least 200 pixels \(5.3 cm\) at a font of 9 points, got 38"),
        ({"height": 20}, "height: expected a number of pixels of at least 100, got 20"),
        ({"font_size": 0.5}, "font_size: expected points"),
        ({"annotations": {"L0H99": "x"}}, r"annotations: expected labels of what is drawn, such as 'L0H\d', .*'L0H99'"),
    ],
)
def test_refusals_name_the_argument(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    figure = heatmap(made_up((2, 4), "layer head"))
    for call in (
        lambda: heatmap(made_up((2, 4), "layer head"), **wrong),
        lambda: figure.resized(**wrong),
        lambda: figure.save(tmp_path / "x.html", **wrong),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="copy that cannot be drawn again"):
        Figure(figure).resized("column")


def test_a_curves_size_may_still_be_its_axis() -> None:
    assert curve([1, 10], [0.1, 0.9], size="edges chosen").layout.xaxis.title.text == "edges chosen"
    assert curve([1, 10], [0.1, 0.9], axis="heads").layout.xaxis.title.text == "heads"
    column = curve([1, 10], [0.1, 0.9], size="column", caption=["small print"])
    assert column.layout.width == pytest.approx(8.5 * CM)
    assert column.layout.annotations[-1].text == "small print"


def test_narrow_figures_have_their_colour_bar_below() -> None:
    figure = heatmap(made_up((12, 12), "layer head"))
    assert figure.layout.coloraxis.colorbar.orientation is None
    column = figure.resized("column")
    bar = column.layout.coloraxis.colorbar
    assert (bar.orientation, bar.yref) == ("h", "container")
    assert 0 < bar.y * column.layout.height < column.layout.margin.b  # below the cells, inside the figure
    assert bar.len <= column.layout.width
    (title,) = [note.text for note in column.layout.annotations if note.name == "scale"]
    assert title.replace("<br>", " ").startswith("change in logit_diff (logits) · white = corrupted run")


def test_every_bar_has_its_name_on_a_slide() -> None:
    figure = bars(made_up((12, 12), "layer head"), k=20, size="slide")
    assert list(figure.layout.yaxis.ticktext) == figure.table()["label"].tolist()
    assert figure.layout.yaxis.tickfont.size >= 8 * 16 / 9  # points: 10.7


def test_the_caption_can_be_left_out() -> None:
    result = made_up((2, 3), "layer head")
    with_it, without = heatmap(result), heatmap(result, caption=False)
    assert with_it.layout.annotations[-1].text
    assert not without.layout.annotations[-1].text
    assert without.layout.height < with_it.layout.height
    assert without.facts.caption == with_it.facts.caption  # the figure still knows


# Pictures


def test_pictures_have_no_widgets_and_no_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    menu = attention(patterns(2, 2, 6), layer=1, head=1)
    assert len(menu.layout.updatemenus) == 1
    still = menu.still()
    assert not still.layout.updatemenus
    heat = [trace for trace in still.data if trace.type == "heatmap"]
    assert [trace.meta[0] for trace in heat] == ["L1H1"]  # the head that was chosen, alone
    assert still.layout.title.text == "Attention of L1H1"
    assert still.layout.margin.t == menu.layout.margin.t - 40
    slider = next(iter(figures("circuit").values()))
    assert len(slider.layout.sliders) == 1
    bare = slider.still()
    assert not bare.layout.sliders
    assert bare.layout.margin.b == slider.layout.margin.b - 58
    assert len(bare.data) == len(slider.data)
    plain = heatmap(made_up((2, 2), "layer head"))
    assert plain.still() is plain
    drawn = []  # plotly's own ways to a picture
    monkeypatch.setattr(go.Figure, "to_image", lambda figure, **how: drawn.append((figure, how)) or b"")
    monkeypatch.setattr(go.Figure, "write_image", lambda figure, path: drawn.append((figure, path)))
    assert slider.to_image(format="png") == b""
    slider.write_image("x.png")
    assert [(len(figure.layout.sliders), how) for figure, how in drawn] == [(0, {"format": "png"}), (0, "x.png")]
    copy = Figure(slider)  # plotly's own: the widget goes all the same
    assert not copy.still().layout.sliders
    assert len(copy.layout.sliders) == 1


def test_changes_to_a_figure_are_kept() -> None:
    figure = heatmap(made_up((4, 5), "layer head"))
    figure.update_layout(title_text="Mine", xaxis_title_text="which head")
    figure.add_annotation(x=1, y=2, text="here")
    figure.add_vline(2.5)
    figure.data[0].opacity = 0.5
    figure.add_scatter(x=[0], y=[0], name="added")
    for changed in (figure.resized("column"), figure.resized("column").resized("page")):
        assert changed.layout.title.text == "Mine"
        assert changed.layout.xaxis.title.text == "which head"
        assert [note.text for note in changed.layout.annotations][-1] == "here"
        assert len(changed.layout.shapes) == 1
        assert (changed.data[0].opacity, changed.data[-1].name) == (0.5, "added")
    assert figure.resized("column").layout.annotations[-2].name == "caption"


def test_annotations_are_where_their_labels_are() -> None:
    result = made_up((4, 5), "layer head")
    for figure in (
        heatmap(result, annotations={"L2H3": "name <b>mover", (0, 1): "there"}),
        heatmap(result).annotate({"L2H3": "name <b>mover", (0, 1): "there"}),
        heatmap(result).resized("column", annotations={"L2H3": "name <b>mover", (0, 1): "there"}),
        heatmap(result, annotations={"L2H3": "name <b>mover", (0, 1): "there"}).resized("page"),
    ):
        label, place = [note for note in figure.layout.annotations if note.name == "annotation"]
        assert (label.x, label.y, label.text) == (3, 2, "name &#60;b&#62;mover")
        assert (place.x, place.y, place.text) == (0, 1, "there")
    shown = bars(result, k=3)
    label = shown.table()["label"][1]
    (note,) = [note for note in shown.annotate({label: "second"}).layout.annotations if note.name == "annotation"]
    assert (note.x, note.y) == (shown.table()["value" if "effect" not in shown.table() else "effect"][1], 1)
    with pytest.raises(ValueError, match="annotations"):
        tokens(made_up((3,), "pos"), annotations={"nowhere": "x"})


@pytest.mark.skipif(find_browser() is None, reason="there is no Chrome or Chromium on this machine")
def test_pictures_are_as_wide_as_a_column(tmp_path: Path) -> None:
    pytest.importorskip("kaleido")
    menu = attention(patterns(1, 2, 6))
    png = menu.save(tmp_path / "new" / "a.png", size="column").read_bytes()
    assert len(png) > 5_000
    assert png.startswith(b"\x89PNG")
    width, _ = struct.unpack(">II", png[16:24])
    assert width == pytest.approx(8.5 / 2.54 * 300, abs=2)
    at = png.index(b"pHYs")
    assert struct.unpack(">II", png[at + 4 : at + 12]) == (11811, 11811)  # 300 dots per inch
    svg = menu.save(tmp_path / "a.svg", size="column").read_text()
    assert float(re.search(r'<svg[^>]* width="([\d.]+)"', svg).group(1)) == pytest.approx(8.5 * CM, abs=1)
    assert "updatemenu-header" not in svg
    assert "Attention of L0H0" in svg
    pdf = menu.save(tmp_path / "a.pdf", size="column").read_bytes()
    box = [float(number) for number in re.search(rb"/MediaBox ?\[([^\]]*)\]", pdf).group(1).split()]
    assert box[2] - box[0] == pytest.approx(8.5 / 2.54 * 72, abs=1.5)


# One page


def test_a_large_model_fits_on_a_page() -> None:
    """30 layers, 32 heads, 200 tokens."""
    graph = Graph(30, 32, 8)
    values = torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(0)) ** 3
    scores = EdgeScores.of(graph, values, baseline={}, metric="logit_diff", unit="logits", provenance={}, prompts=False)
    large = patterns(30, 32, 4)
    drawn = {
        "heads": heatmap(made_up((30, 32), "layer head")),
        "positions": heatmap(made_up((30, 200), "layer pos")),
        "panels": heatmap(made_up((30, 32, 5), "layer head position")),
        "bars": bars(made_up((30, 32), "layer head"), k=120),
        "pattern": attention(patterns(1, 1, 200)),
        "grid": attention(large, style="grid"),
        "lines": attention(patterns(1, 1, 100), style="lines"),
        "circuit": circuit(Circuit.from_scores(scores, n_edges=250, prune=False)),
        "circuit of one layer": circuit(Circuit.full(Graph(1, 32, 32)), max_edges=100),
    }
    for name, figure in drawn.items():
        assert figure.layout.height <= TALLEST, name
        assert figure.layout.width <= 1300, name
        for size in {"grid": ["page"], "panels": ["column", "page"]}.get(name, ["column"]):
            one = figure.resized(size)
            assert one.layout.height <= 23.5 * CM + 1, (name, size)
            assert one.layout.width == pytest.approx(PRESETS[size].width), (name, size)
            area = [getattr(one.layout.margin, side) for side in "lrtb"]
            assert one.layout.width - area[0] - area[1] >= 40, (name, size)
            assert one.layout.height - area[2] - area[3] >= 40, (name, size)
    shown = drawn["circuit"].facts.caption[-1]
    assert int(re.match(r"([\d,]+) of", shown).group(1)) == drawn["circuit"].table()["shown"].sum()
    heat = heatmap(made_up((30, 9), "layer head"))
    assert 400 <= heat.layout.height <= 700
    assert len(heat.layout.yaxis.tickvals) == 30


def test_cells_have_a_frame_on_all_four_sides() -> None:
    for kind in ("heatmap", "lens"):
        for figure in figures(kind).values():
            for axis in (figure.layout.xaxis, figure.layout.yaxis):
                assert (axis.showline, axis.mirror) == (True, True), kind
    pattern = attention(patterns(1, 1, 6))
    for axis in (pattern.layout.xaxis2, pattern.layout.yaxis2):
        assert (axis.showline, axis.mirror) == (True, True)


def test_figure_is_still_plain_data() -> None:
    figure = heatmap(made_up((3, 4), "layer head")).resized("column")
    assert json.loads(figure.to_json())["layout"]["width"] == pytest.approx(8.5 * CM)
    assert isinstance(made_up((2, 2), "layer head"), Result)
