"""Attention pictures: every cell is where it belongs and has its value, what the mask hides is not drawn as zero, and no token
is read as markup."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plotly.utils import PlotlyJSONEncoder

import mechkit.plot._attention as drawing
from helpers.pictures.attention import HOSTILE, WORDS, examples, labels, make
from mechkit.plot._attention import attention
from mechkit.plot._attention_data import pooled
from mechkit.plot._export import find_browser, read_table
from mechkit.plot._figure import Figure
from mechkit.plot._scale import Scale
from mechkit.plot._theme import DARK, LIGHT, theme_of
from mechkit.result import Result

NAN = float("nan")


def one(values: torch.Tensor, **changes: Any) -> Result:
    """A result with dims dest and src alone."""
    n_dests, n_srcs = values.shape
    coords = {"dest": labels(WORDS, n_dests), "src": labels(WORDS, n_srcs)}
    return make(**{"values": values, "dims": ("dest", "src"), "coords": coords} | changes)


def maps(figure: Figure) -> list[go.Heatmap]:
    return [trace for trace in figure.data if trace.type == "heatmap"]


def caption(figure: Figure) -> str:
    return " · ".join(figure.facts.caption)


def bar(figure: Figure) -> str:
    return figure.layout.coloraxis.colorbar.title.text


def lines_of(figure: Figure) -> dict[str, float]:
    """What each drawn line says when the mouse is on it, and how strong it is."""
    found = {}
    for trace in figure.data:
        if trace.hovertext is not None and trace.mode == "lines":
            opacity = float(re.search(r"([\d.]+)\)$", trace.line.color)[1])  # type: ignore[index]
            found |= dict.fromkeys(trace.hovertext, opacity)
    return found


# Where the cells are


def test_destinations_are_down_and_sources_across_with_the_results_own_numbers() -> None:
    result = make()
    figure = attention(result)
    for i, trace in enumerate(maps(figure)):
        np.testing.assert_array_equal(trace.z, result.values[i // 3, i % 3])
        assert trace.z.dtype == np.float32
        assert trace.meta[0] == f"L{i // 3}H{i % 3}"
    assert len(maps(figure)) == 6
    assert figure.layout.xaxis2.title.text == "source (attended to)"
    assert figure.layout.yaxis2.title.text == "destination (attends)"
    assert attention(make(n=3)).layout.yaxis2.title.text == "destination"  # there is no room for more
    assert figure.layout.yaxis.range == (4.5, -0.5)  # the first token on top
    assert figure.layout.xaxis.range == (-0.5, 4.5)
    assert (figure.layout.xaxis2.matches, figure.layout.yaxis2.matches) == ("x", "y")


def test_the_order_of_dims_does_not_matter() -> None:
    result = make()
    turned = Result(
        **{
            **{name: getattr(result, name) for name in ("coords", "baseline", "base", "metric", "unit", "provenance")},
            "values": result.values.permute(3, 1, 0, 2),
            "dims": ("src", "head", "layer", "dest"),
        }
    )
    for style in ("pattern", "grid"):
        for mine, other in zip(maps(attention(result, style=style)), maps(attention(turned, style=style)), strict=True):
            np.testing.assert_array_equal(mine.z, other.z)
            assert mine.meta == other.meta
    assert lines_of(attention(turned, style="lines")) == lines_of(attention(result, style="lines"))


def test_some_destinations_alone_keep_their_labels() -> None:
    result = make(1, 2, 5)
    chosen = result.sel(dest=['" and" 3', '" John" 4'])
    for style in ("pattern", "grid"):
        figure = attention(chosen, style=style)
        np.testing.assert_array_equal(maps(figure)[1].z, result.values[0, 1, 3:])
        for axis in ("axis", "axis2"):
            assert figure.layout[f"y{axis}"].ticktext == ('" and" 3', '" John" 4')
            assert len(figure.layout[f"x{axis}"].ticktext) == (5 if style == "pattern" else 10)
            assert figure.layout[f"x{axis}"].ticktext[2] == '" Mary" 2'
    lines = attention(chosen, style="lines")
    assert lines.layout.yaxis.ticktext == ('" and" 3', '" John" 4')
    assert lines.layout.yaxis2.ticktext[2] == '" Mary" 2'
    assert all(re.search(r'destination "( and" 3| John" 4)<br>source', text) for text in lines_of(lines))


def test_the_table_has_every_cell_that_exists(tmp_path: Path) -> None:
    result = make()
    for style in ("pattern", "grid", "lines"):
        figure = attention(result, style=style)
        table = figure.table()
        assert len(table["value"]) == 6 * 15
        for i in (0, 17, 89):
            at = {dim: table[dim][i] for dim in result.dims}
            assert result.sel(**at).values.item() == table["value"][i]
        loaded = read_table(figure.save(tmp_path / f"{style}.json"))
        np.testing.assert_array_equal(loaded["value"], table["value"])
    assert table["drawn"].tolist() == (table["value"] >= 0.01).tolist()


def test_equal_tokens_are_separate_and_hover_has_every_label() -> None:
    figure = attention(make(1, 1, 100))
    assert list(figure.layout.xaxis.tickvals) == list(range(100))
    assert figure.layout.xaxis.ticktext[4] == figure.layout.yaxis.ticktext[4] == '" John" 4'
    assert figure.layout.xaxis.ticktext[10] == '" John" 10'
    assert figure.layout.xaxis.showticklabels is False
    shown = [int(place) for place in figure.layout.xaxis2.tickvals]
    assert 20 <= len(shown) < 100  # as many as fit
    assert figure.layout.xaxis2.ticktext[1] == figure.layout.xaxis.ticktext[shown[1]]
    assert figure.data[0].hovertemplate.split("<br>") == [
        "%{meta[0]}",
        "destination %{y}",
        "source %{x}",
        "%{meta[1]} %{z:.5~g}<extra></extra>",
    ]
    assert (figure.data[0].xaxis, figure.data[0].meta) == (None, ("L0H0", "attention"))  # on the axes with every label


def test_what_the_mask_hides_is_grey_and_not_zero() -> None:
    for theme in (LIGHT, DARK):
        figure = attention(make(), theme=theme.name)
        assert np.isnan(figure.data[0].z).sum() == 10
        assert figure.data[0].hoverongaps is False
        assert figure.layout.plot_bgcolor == theme.masked != figure.layout.paper_bgcolor == theme.paper
        assert "grey: no such cell" in bar(figure)
    assert "grey" not in bar(attention(one(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))))


def test_positions_that_a_prompt_lacks_are_cut_off() -> None:
    result = make(1, 2, 6, 2)
    result.values[:, :, 4:, :, 0] = NAN
    result.values[:, :, :, 4:, 0] = NAN
    assert maps(attention(result))[0].z.shape == (4, 4)
    assert len(attention(result).layout.xaxis.ticktext) == 4
    assert maps(attention(result, prompt=1))[0].z.shape == (6, 6)
    assert maps(attention(result, style="grid"))[0].z.shape == (4, 4)
    assert len(attention(result, head=0, style="lines", bos=True).layout.yaxis.ticktext) == 4
    holed = one(torch.tensor([[1.0, NAN, NAN], [NAN, NAN, NAN], [0.2, NAN, 0.8]]))
    assert maps(attention(holed))[0].z.shape == (3, 3)  # only the end is cut off


# One head at a time


def test_the_menu_shows_each_head_alone() -> None:
    figure = attention(make(), layer=1, head=2)
    (menu,) = figure.layout.updatemenus
    assert [button.label for button in menu.buttons] == ["L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2"]
    assert (menu.active, menu.x, figure.layout.title.text) == (5, 0, "Attention of L1H2")
    for i, button in enumerate(menu.buttons):
        visible, title = button.args[0]["visible"], button.args[1]["title.text"]
        assert visible == [j == i for j in range(6)] + [True]
        assert title == f"Attention of {button.label}"
    assert [trace.visible for trace in figure.data] == [False] * 5 + [True, None]
    assert attention(make(), head=2).layout.updatemenus[0].active == 2
    assert attention(make(), layer=1).layout.updatemenus[0].active == 3
    named = attention(make(), title="Mine")
    assert named.layout.title.text == "Mine"
    assert named.layout.updatemenus[0].buttons[1].args[1] == {}
    assert len(attention(make(1, 1)).layout.updatemenus) == 0
    assert len(attention(make().sel(layer=[1], head=[2])).layout.updatemenus) == 0
    assert attention(make().sel(layer=[1], head=[2])).layout.title.text == "Attention of L1H2"


def test_names_come_from_the_dims_that_there_are() -> None:
    assert attention(make().sel(layer=1)).data[1].meta[0] == "H1"
    assert attention(make().sel(head=1)).data[1].meta[0] == "L1"
    alone = attention(make().sel(layer=1, head=1))
    assert (alone.layout.title.text, len(alone.layout.updatemenus)) == ("Attention", 0)
    assert alone.data[0].hovertemplate.startswith("destination")
    rollout = make(1, 2, coords={**make(1, 2).coords, "head": ("mean", "max")})
    assert attention(rollout).data[1].meta[0] == "L0 max"


# Prompts


def test_one_prompt_is_shown_and_the_caption_says_which() -> None:
    result = make(1, 1, 4, 16)
    for prompt in (None, 0, 5):
        figure = attention(result, prompt=prompt)
        np.testing.assert_array_equal(figure.data[0].z, result.values[0, 0, :, :, prompt or 0])
        assert f"prompt {prompt or 0}, one of 16" in caption(figure)
        assert "16 prompts" not in caption(figure)
    mean = attention(result.mean("prompt"))
    np.testing.assert_allclose(mean.data[0].z, result.values[0, 0].mean(-1), rtol=1e-6)
    assert "mean over 16 prompts" in caption(mean)
    assert caption(mean).startswith("tiny-llama · ioi · mean over 16 prompts · attention patterns")


def test_a_prompt_has_its_own_tokens() -> None:
    own = [["When", " Mary", " and"], ["When", " Ann", " or"]]
    coords = {"dest": ('"When" 0', "1", "2"), "src": ('"When" 0', "1", "2"), "prompt": (0, 1)}
    result = make(1, 1, 3, 2, provenance={"str_tokens": own})
    result = Result(result.values[0, 0], tuple(coords), coords, {}, "", "attention", "attention", result.provenance)
    assert attention(result).layout.xaxis.ticktext == ('"When" 0', '" Mary" 1', '" and" 2')
    assert attention(result, prompt=1).layout.yaxis.ticktext == ('"When" 0', '" Ann" 1', '" or" 2')
    assert attention(result, prompt=1).table()["src"][-1] == '" or" 2'
    later = result.sel(prompt=[1], dest=["2"])  # labels say which prompt and position it was
    assert attention(later).layout.yaxis.ticktext == ('" or" 2',)
    assert attention(result.mean("prompt")).layout.xaxis.ticktext == ('"When" 0', "1", "2")


# What colours mean


def test_the_scale_goes_from_zero_to_the_largest_of_all_heads() -> None:
    result = make(2, 2, 4)
    result.values.mul_(0.5)
    result.values[1, 1, 3, 0] = 0.93
    figure = attention(result)
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0, pytest.approx(0.93))
    assert axis.colorbar.ticktext == ("0", "0.19", "0.37", "0.56", "0.74", "0.93")
    np.testing.assert_allclose(axis.colorbar.tickvals, np.linspace(0, 0.93, 6), rtol=1e-6)
    assert [colour for _, colour in axis.colorscale] == list(LIGHT.sequential)
    assert bar(figure).startswith("attention<br>white = 0, darker is higher")
    assert bar(attention(result, theme="dark")).startswith("attention<br>black = 0, brighter is higher")
    assert {trace.coloraxis for trace in maps(figure)} == {"coloraxis"}


def test_what_has_a_sign_is_centred_on_zero() -> None:
    scores = attention(make(metric="attention score", unit="logits"))
    axis = scores.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0, 1)
    assert [colour for _, colour in axis.colorscale] == list(LIGHT.diverging[5:])
    assert bar(scores).startswith("attention score (logits)<br>white = 0, blue is higher")
    assert scores.layout.title.text == "Attention score of L0H0"
    difference = attention(one(torch.tensor([[0.25, NAN], [-0.5, 0.1]])))
    assert difference.layout.coloraxis.cmin == -0.5
    patched = one(
        torch.tensor([[2.0, NAN], [5.0, 3.0]]),
        baseline={"clean": torch.tensor(4.0), "corrupted": torch.tensor(3.0)},
        base="corrupted",
        metric="logit_diff",
        unit="logits",
    )
    figure = attention(patched)
    np.testing.assert_array_equal(figure.data[0].z, [[-1, NAN], [2, 0]])
    assert bar(figure).startswith("change from the corrupted run in logit_diff (logits)<br>white = 0")
    assert figure.table()["value"].tolist() == [2.0, 5.0, 3.0]  # as it was
    assert figure.table()["baseline corrupted"].tolist() == [3.0] * 3


def test_all_zero_is_white_and_not_blank() -> None:
    figure = attention(one(torch.tensor([[0.0, NAN], [0.0, 0.0]])))
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)


# Many cells


def decoded(z: np.ndarray, scale: Scale) -> np.ndarray:
    """What the hover text says, as a number."""
    return z.astype(np.float64) / scale.steps * scale.high


@pytest.mark.parametrize("signed", [False, True])
def test_many_cells_are_drawn_as_bytes_with_their_scale(monkeypatch: pytest.MonkeyPatch, signed: bool) -> None:
    monkeypatch.setattr(drawing, "_EXACT", 50)
    result = make(2, 2, 6)
    tensor = result.values - 0.4 if signed else result.values * 0.93
    result, values = make(2, 2, 6, values=tensor), tensor.numpy()
    figure = attention(result)
    steps, low, kind = (127, -128, np.int8) if signed else (255, 0, np.uint8)
    largest = float(np.nanmax(np.abs(values)))
    assert figure.layout.coloraxis.cmin == low
    assert figure.layout.coloraxis.cmax == low + 255
    for trace, exact in zip(maps(figure), values.reshape(4, 6, 6), strict=True):
        assert trace.z.dtype == kind
        np.testing.assert_array_equal(trace.z == low, np.isnan(exact))  # absent cells stay absent, others never are
        shown = decoded(trace.z, Scale(-largest if signed else 0.0, largest, (), (), "", coded=True))
        error = np.abs(shown - exact)[~np.isnan(exact)]
        tiny = np.abs(exact[~np.isnan(exact)]) < 0.5 * largest / steps
        assert (error[~tiny] <= 0.5001 * largest / steps).all()
        assert (error[tiny] <= largest / steps).all()
        assert trace.hovertemplate.endswith(f"≈ %{{z}}/{steps} of {largest:.5g}<extra></extra>")
    assert f"in steps of 1/{steps} of {largest:.3g}" in caption(figure)
    assert "exact values in table()" in caption(figure)
    np.testing.assert_array_equal(figure.table()["value"], values[~np.isnan(values)])


def test_the_lowest_byte_has_a_colour_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_EXACT", 1)
    for values, first in ((make().values, 0.0), (make().values - 0.4, 1 / 255)):
        for theme in (LIGHT, DARK):
            scale = attention(make(values=values), theme=theme.name).layout.coloraxis.colorscale
            colours = theme.diverging if first else theme.sequential
            assert [colour for place, colour in scale if place < 0.5 / 255 + 1e-9][:2] == [theme.masked] * 2
            assert scale[1][0] == scale[2][0] == 0.5 / 255  # a sharp edge between the lowest byte and the next
            assert [colour for _, colour in scale[3:]] == list(colours)
            places = [place for place, _ in scale]
            assert places == sorted(places)
            if first:
                assert scale[3 + 5][0] == pytest.approx(128 / 255)  # 0 is the middle colour
    ticks = attention(make()).layout.coloraxis.colorbar
    np.testing.assert_allclose(ticks.tickvals, [0, 51, 102, 153, 204, 255])
    assert ticks.ticktext == ("0", "0.2", "0.4", "0.6", "0.8", "1")


def test_bytes_go_to_the_page_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_EXACT", 1)
    z = PlotlyJSONEncoder().encode(attention(make(1, 1, 40)).to_dict()["data"][0]["z"])
    assert '"u1"' in z
    assert len(z) < 40 * 40 * 1.4 + 100


def test_long_prompts_are_pooled_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_SIDE", 10)
    result = make(1, 1, 25)
    figure = attention(result)
    z, exact = figure.data[0].z, result.values[0, 0].numpy()
    assert z.shape == (9, 9)
    for i in range(9):
        for j in range(9):
            block = exact[3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            if np.isnan(block).all():
                assert np.isnan(z[i, j])
            else:
                assert z[i, j] == np.nanmax(block)
    assert "each cell shows the largest value of a block of 3 × 3 tokens" in caption(figure)
    assert figure.layout.xaxis.ticktext[:2] == ('"&#60;|endoftext|&#62;" 0 to " Mary" 2', '" and" 3 to " went" 5')
    assert figure.layout.yaxis.ticktext[8] == labels(WORDS, 25)[24].replace("<", "&#60;").replace(">", "&#62;")
    assert figure.layout.xaxis2.ticktext[1].startswith('" ')
    assert len(figure.table()["value"]) == 25 * 26 // 2
    monkeypatch.setattr(drawing, "_PAGE", 30)
    assert attention(result).data[0].z.shape == (5, 5)


def test_pooling_keeps_the_sign() -> None:
    values = np.array([[[1.0, -3.0], [2.0, np.nan]]])
    np.testing.assert_array_equal(pooled(values, 2), [[[-3.0]]])
    np.testing.assert_array_equal(pooled(-values, 2), [[[3.0]]])
    assert np.isnan(pooled(np.full((1, 2, 2), np.nan), 2)).all()
    assert pooled(values, 1) is values


def test_a_page_of_many_heads_stays_within_its_limit() -> None:
    """512 tokens × 144 heads are kept whole, at one byte per cell; twice the tokens are pooled."""
    assert drawing._factor((144, 512, 512), drawing._SIDE, drawing._PAGE) == 1
    assert drawing._factor((144, 1024, 1024), drawing._SIDE, drawing._PAGE) == 2
    assert drawing._factor((1, 720, 720), drawing._SIDE, drawing._PAGE) == 1
    assert drawing._factor((1, 4096, 4096), drawing._SIDE, drawing._PAGE) == 6


# All heads at once


def test_a_grid_has_layers_down_and_heads_across() -> None:
    result = make(12, 12, 14)
    figure = attention(result, style="grid")
    traces = maps(figure)
    assert len(traces) == 144
    for i in (0, 13, 143):
        np.testing.assert_array_equal(traces[i].z, result.values[i // 12, i % 12])
        assert traces[i].meta[0] == f"L{i // 12}H{i % 12}"
    assert len({trace.y0 for trace in traces[:12]}) == 1  # a row is a layer
    assert traces[12].x0 == traces[0].x0
    assert traces[12].y0 >= traces[0].y0 + 14
    assert traces[1].x0 >= traces[0].x0 + 14  # side by side, not over each other
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1] == -0.5  # layer 0 on top
    assert figure.layout.xaxis2.ticktext == tuple(f"H{i}" for i in range(12))
    assert figure.layout.yaxis2.ticktext == tuple(f"L{i}" for i in range(12))
    assert figure.layout.yaxis2.tickvals[3] == traces[36].y0 + 6.5
    assert "too small for tokens" in caption(figure)
    assert figure.layout.title.text == "Attention of 144 heads, L0H0 to L11H11"
    place = list(figure.layout.xaxis.tickvals).index(traces[5].x0 + 2)
    assert figure.layout.xaxis.ticktext[place] == '" Mary" 2'  # hover knows the tokens of every panel
    assert len(figure.layout.updatemenus) == 0
    (panels,) = figure.layout.shapes
    assert (panels.fillcolor, panels.layer, panels.path.count("M")) == (LIGHT.masked, "below", 144)
    assert figure.layout.width < 1300


def test_a_grid_of_one_layer_is_wrapped_and_names_each_panel() -> None:
    figure = attention(make(1, 9, 12), style="grid")
    names = figure.data[-1]
    assert names.text == tuple(f"L0H{i}" for i in range(9))
    assert len({trace.x0 for trace in maps(figure)}) == 3
    for i, trace in enumerate(maps(figure)):
        assert names.x[i] == pytest.approx(trace.x0 + 5.5)
        assert figure.layout.yaxis.range[1] <= names.y[i] < trace.y0 - 0.5  # above its panel, within the figure
    assert "too small" not in caption(figure)
    assert figure.layout.xaxis2.ticktext[0].startswith('"&#60;')
    tall = attention(make(9, 1, 12), style="grid")
    assert tall.data[-1].text == tuple(f"L{i}H0" for i in range(9))
    few = attention(make(2, 2, 4), style="grid")
    assert few.data[-1].text == ("L0H0", "L0H1", "L1H0", "L1H1")
    assert len({trace.y0 for trace in maps(few)}) == 2


def test_layer_and_head_choose_the_panels_of_a_grid() -> None:
    result = make(3, 4, 4)
    assert [trace.meta[0] for trace in maps(attention(result, style="grid", layer=1))] == [f"L1H{i}" for i in range(4)]
    assert [trace.meta[0] for trace in maps(attention(result, style="grid", head=2))] == ["L0H2", "L1H2", "L2H2"]
    (alone,) = maps(attention(result, style="grid", layer=1, head=2))
    np.testing.assert_array_equal(alone.z, result.values[1, 2])


@pytest.mark.parametrize(("n_layers", "n_heads", "n"), [(48, 16, 64), (30, 9, 200), (1, 64, 100), (1, 1, 1), (2, 2, 1)])
def test_grids_of_any_size_fit(n_layers: int, n_heads: int, n: int) -> None:
    figure = attention(make(n_layers, n_heads, n), style="grid")
    traces = maps(figure)
    assert len(traces) == n_layers * n_heads
    assert figure.layout.width <= 1300
    assert figure.layout.height <= 1900
    assert sum(trace.z.size for trace in traces) <= 400_000
    assert traces[-1].z[0, 0] == 1  # the largest of a block, and of a first token's attention to itself


# Lines


def test_lines_show_both_tokens_and_the_weight() -> None:
    result = make(1, 2, 4)
    titles = lines_of(attention(result, style="lines", layer=0, head=1, bos=True))
    values = result.values[0, 1]
    expected = {
        f"L0H1<br>destination {result.coords['dest'][i]}<br>source {result.coords['src'][j]}<br>attention {values[i, j]:.5g}"
        for i in range(4)
        for j in range(i + 1)
        if values[i, j] >= 0.01
    }
    assert {html.unescape(text) for text in titles} == expected


def test_a_line_goes_from_destination_to_source() -> None:
    figure = attention(one(torch.tensor([[1.0, NAN], [0.75, 0.25]])), style="lines", bos=True)
    places = {}
    for trace in figure.data:
        if trace.hovertext is not None:
            ends = np.flatnonzero(np.isnan(trace.x))
            for start, stop in zip([0, *(ends + 1)], ends, strict=False):
                points = list(zip(trace.x[start:stop], trace.y[start:stop], strict=True))
                assert len(points) > 10  # the mouse finds a line at its points
                places[trace.hovertext[start]] = (points[0], points[-1])
    assert len(places) == 3
    (slanted,) = (ends for text, ends in places.items() if "0.75" in text)
    assert slanted == ((0, 1), (1, 0))  # the second token on the left, the first on the right
    assert figure.layout.yaxis.title.text == "destination (attends)"
    assert figure.layout.yaxis2.title.text == "source (attended to)"
    assert figure.layout.yaxis2.side == "right"
    assert figure.layout.yaxis.range == figure.layout.yaxis2.range or figure.layout.yaxis2.matches == "y"
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]


def test_stronger_lines_are_stronger() -> None:
    strengths = {float(text.rsplit(" ", 1)[1]): opacity for text, opacity in lines_of(examples_lines()).items()}
    ordered = [strengths[weight] for weight in sorted(strengths)]
    assert ordered == sorted(ordered)
    assert ordered[-1] == 1.0 > ordered[0] > 0.1
    drawn = [trace.line.width for trace in examples_lines().data if trace.hovertext is not None]
    assert drawn == sorted(drawn)
    assert len(set(drawn)) > 4  # the strongest are drawn last, on top


def examples_lines() -> Figure:
    return attention(make(1, 1, 20), style="lines", bos=True)


def test_the_caption_says_what_is_left_out() -> None:
    values = torch.tensor([[1.0, NAN, NAN], [0.998, 0.002, NAN], [0.9, 0.0, 0.1]])
    figure = attention(one(values), style="lines", bos=True)
    assert "2 of 6 lines under 0.01 left out, 0.067 % of all attention" in caption(figure)
    assert len(lines_of(figure)) == 4
    every = attention(one(values), style="lines", min_weight=0.0, bos=True)
    assert len(lines_of(every)) == 5  # no attention is no line
    strong = attention(one(values), style="lines", min_weight=0.95, bos=True)
    assert "4 of 6 lines under 0.95 left out" in caption(strong)
    assert figure.table()["value"].tolist() == values[~values.isnan()].tolist()
    assert figure.table()["drawn"].tolist() == [True, True, False, True, False, True]


def test_the_first_token_does_not_drown_lines() -> None:
    """By default lines leave out a first token that takes far more than its share; `bos=False` does so in every style."""
    values = torch.full((6, 6), NAN)
    for i in range(6):
        values[i, : i + 1] = 0.1 / max(i, 1)
        values[i, 0] = 0.9 if i else 1.0
    result = one(values)
    figure = attention(result, style="lines")
    note = 'the first token, "<|endoftext|>" 0, is left out as a source: 92 % of all attention'
    assert note in caption(figure)
    assert not any(
        "source &#34;&#60;|endoftext|" in text or 'source "<|endoftext|>" 0' in text for text in lines_of(figure)
    )
    assert len(lines_of(figure)) == 15
    assert max(float(text.rsplit(" ", 1)[1]) for text in lines_of(figure)) == pytest.approx(0.1)
    assert (
        next(iter(lines_of(figure).values())) == 1.0 or max(lines_of(figure).values()) == 1.0
    )  # strength is of the rest
    assert len(figure.table()["value"]) == 21  # the numbers are all there
    assert len(lines_of(attention(result, style="lines", bos=True))) == 21
    even = values.clone()
    for i in range(6):
        even[i, : i + 1] = 1 / (i + 1)
    assert "left out as a source" not in caption(attention(one(even), style="lines"))  # the control: its fair share

    pattern = attention(result)
    assert "left out as a source" not in caption(pattern)
    hidden = attention(result, bos=False)
    assert note in caption(hidden)
    np.testing.assert_array_equal(hidden.data[0].z, values[1:, 1:])
    assert hidden.layout.coloraxis.cmax == pytest.approx(0.1)
    assert hidden.layout.xaxis.ticktext[0] == hidden.layout.yaxis.ticktext[0]
    assert hidden.layout.xaxis.ticktext[0].endswith(" 1")
    assert maps(attention(result, style="grid", bos=False))[0].z.shape == (5, 5)
    change = one(values, baseline={"clean": torch.tensor(0.0)}, base="clean")
    assert "% of all change" in caption(attention(change, bos=False))


def test_heads_have_a_colour_each() -> None:
    figure = attention(make(1, 3, 6), style="lines")
    keys = [trace for trace in figure.data if trace.showlegend]
    assert [(key.name, key.line.color[:12]) for key in keys] == [
        ("L0H0", "rgba(0,114,1"),
        ("L0H1", "rgba(230,159"),
        ("L0H2", "rgba(0,158,1"),
    ]
    assert {trace.legendgroup for trace in figure.data if trace.hovertext is not None} == {"L0H0", "L0H1", "L0H2"}
    assert figure.layout.title.text == "Attention of L0H0, L0H1, L0H2"
    single = attention(make(1, 1, 6), style="lines")
    assert [trace.name for trace in single.data if trace.showlegend] == ["0.25", "0.5", "1"]
    assert single.layout.legend.title.text == "attention "


# Themes and text


@pytest.mark.parametrize("style", ["pattern", "grid", "lines"])
def test_both_themes(style: Any) -> None:
    seen = {}
    for theme in ("light", "dark"):
        figure = attention(make(), style=style, theme=theme)
        assert figure.layout.paper_bgcolor == theme_of(theme).paper
        assert figure.layout.font.color == theme_of(theme).ink
        seen[theme] = figure.to_json()
    assert LIGHT.absent not in seen["dark"]
    assert LIGHT.ink not in seen["dark"].replace(DARK.line, "")
    before = make()
    attention(before, style=style)
    assert torch.equal(before.values.nan_to_num(-1), make().values.nan_to_num(-1))  # nothing is changed


def texts_of(figure: Figure) -> list[str]:
    """Every text of the page, line by line."""
    layout = figure.layout
    found = [layout.title.text, *(note.text for note in layout.annotations)]
    for axis in ("xaxis", "yaxis", "xaxis2", "yaxis2"):
        found += list((layout[axis].ticktext or ()) if axis in layout else ())
    found += [button.label for menu in layout.updatemenus for button in menu.buttons]
    found += [button.args[1]["title.text"] for menu in layout.updatemenus for button in menu.buttons]
    for trace in figure.data:
        found += [trace.name or "", *(trace.meta or ()), *(trace.text or ()), *(trace.hovertext or ())]
    if layout.coloraxis.colorbar.title.text:
        found.append(layout.coloraxis.colorbar.title.text.replace("&nbsp;", ""))
    return [line for text in found for line in text.split("<br>")]


@pytest.mark.parametrize("style", ["pattern", "grid", "lines"])
def test_hostile_text_is_shown_literally(style: Any) -> None:
    result = make(
        1,
        2,
        12,
        words=HOSTILE,
        metric="<i>%{x}</i>",
        unit="attention",
        coords={**make(1, 2, 12, words=HOSTILE).coords, "head": ("<b>0</b>", "%{z}")},
        provenance={"model": "<script>", "technique": "$x$"},
    )
    figure = attention(result, style=style)
    shown = texts_of(figure)
    assert not any(set("<>$\n\t\u202e") & set(text) for text in shown)
    assert any("&#60;script&#62;alert(1)" in text for text in shown)
    for trace in figure.data:  # templates have no foreign text, so nothing is read as a variable
        assert trace.hovertemplate is None or set(re.findall(r"%{([^}]*)}", trace.hovertemplate)) <= {
            "meta[0]",
            "meta[1]",
            "x",
            "y",
            "z:.5~g",
        }
    if style == "pattern":
        whole = [html.unescape(text) for text in figure.layout.xaxis.ticktext]
        assert whole[0] == '"<script>alert(1)</script>" 0'
        assert whole[10] == f'"{"a" * 60}" 10'
        assert whole[6:8] == ['"\\n" 6', '"\\t" 7']
        assert all(len(html.unescape(text)) <= 24 + 2 for text in figure.layout.xaxis2.ticktext)
        assert figure.layout.updatemenus[0].buttons[0].label == "L0 &#60;b&#62;0&#60;/b&#62;"


@given(token=st.text(min_size=1, max_size=20))
@settings(deadline=None, max_examples=20)
def test_any_token_is_one_line_of_plain_text(token: str) -> None:
    result = make(1, 1, 2, words=(token,))
    for style in ("pattern", "lines"):
        assert not any(set("<>\n\r\t$") & set(text) for text in texts_of(attention(result, style=style)))
    label = html.unescape(attention(result).layout.xaxis.ticktext[1])
    if token.isprintable():
        assert label.replace("\u200e", "") == f'"{token}" 1'.replace("\u200e", "")


@given(
    values=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30),
    signed=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_a_byte_is_within_a_step_of_its_value(values: list[float], signed: bool) -> None:
    exact = np.array(values, dtype=np.float32) - (0.5 if signed else 0)
    largest = float(np.abs(exact).max()) or 1.0
    scale = Scale(-largest if signed else 0.0, largest, (), (), "", coded=True)
    shown = decoded(scale.drawn(exact), scale)
    assert (np.abs(shown - exact) <= 1.001 * scale.high / scale.steps).all()
    assert (scale.drawn(np.array([np.nan])) == (-128 if signed else 0)).all()
    assert (scale.drawn(exact) != (-128 if signed else 0)).all()


# What is refused


def test_refusals() -> None:
    result = make(2, 3, 5, 2)
    refused: list[tuple[str, Any]] = [
        ("style: expected one of 'pattern', 'grid', 'lines'; got 'bars'", lambda: attention(result, style="bars")),  # type: ignore[arg-type]
        ("theme: expected one of", lambda: attention(result, theme="blue")),
        ("layer: expected one of 0, 1; got 2", lambda: attention(result, layer=2)),
        ("head: expected one of 0, 1, 2; got -1", lambda: attention(result, head=-1)),
        ("prompt: expected one of 0, 1; got 7", lambda: attention(result, prompt=7)),
        ("layer: expected one of none, for there is no dim 'layer'", lambda: attention(result.sel(layer=0), layer=0)),
        ("expected dims 'dest' and 'src'.*got.*'layer', 'head', 'src'", lambda: attention(result.mean("dest"))),
        ("result: expected a Result, got dict", lambda: attention({})),  # type: ignore[arg-type]
        ("min_weight: given together with style='pattern'", lambda: attention(result, min_weight=0.1)),
        ("at most 7 heads for lines, got 8.*layer= and head=", lambda: attention(make(2, 4), style="lines")),
        ("at most 100 tokens for lines, got 101.*style='pattern'", lambda: attention(make(1, 1, 101), style="lines")),
        ("min_weight: expected a number from 0 up", lambda: attention(make(1, 1), style="lines", min_weight=-0.1)),
        ("min_weight: expected a number from 0 up", lambda: attention(make(1, 1), style="lines", min_weight=NAN)),
        ("strongest is 1; lower it", lambda: attention(make(1, 1), style="lines", min_weight=1.5, bos=True)),
        ("expected attention, which is never below 0", lambda: attention(make(1, 1, unit="logits"), style="lines")),
        ("at least one cell that exists", lambda: attention(one(torch.full((2, 2), NAN)))),
        ("at least one cell, got shape", lambda: attention(one(torch.zeros(2, 0)))),
        ("expected finite values", lambda: attention(one(torch.tensor([[torch.inf]])))),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()


def test_height_is_the_callers() -> None:
    assert attention(make(), height=777).layout.height == 777


# In a browser


def test_hover_and_menu_in_a_browser(tmp_path: Path) -> None:
    """The texts that plotly puts together from a template, axes and cells are what they should be, hostile tokens included."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = find_browser()
    if browser is None:
        pytest.skip("there is no Chrome or Chromium on this machine")
    result = make(1, 2, 4, words=HOSTILE[:4])
    page_path = attention(result).save(tmp_path / "page.html")
    complaints: list[str] = []
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1000, "height": 800})
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(page_path.as_uri())
        page.wait_for_selector(".heatmaplayer image", state="attached")

        def hovered(dest: int, src: int) -> list[str]:
            box = page.evaluate(
                "() => { const r = document.querySelector('.heatmaplayer image').getBoundingClientRect();"
                " return [r.x, r.y, r.width, r.height]; }"
            )
            page.mouse.move(5, 5)
            page.wait_for_timeout(100)
            page.mouse.move(box[0] + box[2] * (src + 0.5) / 4, box[1] + box[3] * (dest + 0.5) / 4)
            page.wait_for_timeout(300)
            return list(
                page.evaluate(
                    "() => [...document.querySelectorAll('.hoverlayer .hovertext tspan.line')].map(e => e.textContent)"
                )
            )

        head, dest, src, value = hovered(3, 2)
        titles = [head, dest, src]
        assert titles == ["L0H0", 'destination "%{meta[0]}" 3', 'source "%{z}" 2']
        assert float(value.removeprefix("attention ")) == pytest.approx(float(result.values[0, 0, 3, 2]), rel=1e-4)
        assert hovered(0, 2) == []  # hidden by the mask
        page.click(".updatemenu-header")
        page.wait_for_timeout(400)
        page.locator(".updatemenu-dropdown-button").nth(1).click()
        page.wait_for_timeout(300)
        assert page.locator(".gtitle").text_content() == "Attention of L0H1"
        head, dest, src, value = hovered(1, 0)
        assert [head, src] == ["L0H1", 'source "<script>alert(1)</script>" 0']
        assert float(value.removeprefix("attention ")) == pytest.approx(float(result.values[0, 1, 1, 0]), rel=1e-4)
        chromium.close()
    assert complaints == []


def test_examples_are_cheap_and_drawn() -> None:
    figures = examples()
    assert len(figures) == 6
    for name, figure in figures.items():
        assert figure.facts.kind == "attention", name
        assert len(figure.table()["value"]) > 0, name
