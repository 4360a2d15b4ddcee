"""The logit-lens picture: every cell says what the tensor says, in its colour, its text and its hover."""

from __future__ import annotations

import html
import unicodedata
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.pictures.lens import HOSTILE, PROVENANCE, TOKENS, examples, read, top
from mechkit.attribution import TopTokens
from mechkit.plot._figure import Figure
from mechkit.plot._lens import lens
from mechkit.plot._scale import choose_scale
from mechkit.plot._text import display_width, fitted, visible
from mechkit.plot._theme import DARK, LIGHT
from mechkit.prompts import PromptPairs, Prompts
from mechkit.result import Result

NAN = float("nan")


def cells(figure: go.Figure) -> list[go.Heatmap]:
    return [trace for trace in figure.data if trace.type == "heatmap"]


def texts(figure: go.Figure) -> dict[tuple[int, int], str]:
    """What is written, by row and column."""
    (trace,) = [trace for trace in figure.data if trace.type == "scatter"]
    return {(int(y), int(x)): html.unescape(text) for x, y, text in zip(trace.x, trace.y, trace.text, strict=True)}


def bar(figure: go.Figure) -> str:
    return html.unescape(figure.layout.coloraxis.colorbar.title.text.replace("<br>", "\n"))


# -- where things are, and what they are --------------------------------------------------------------------------------


def test_each_cell_has_the_probability_and_the_token_of_the_first_prompt() -> None:
    found = top()
    figure = lens(found)
    (trace,) = cells(figure)
    np.testing.assert_array_equal(trace.z, found.probs.values[:, :, 0, 0].double())
    for (row, column), text in texts(figure).items():
        word = found.strings[row, column, 0, 0]
        assert text == (visible(word) if word != " " else '" "').lstrip(" ")
    assert len(texts(figure)) == 12
    assert tuple(figure.layout.yaxis.range) == (2.5, -0.5)  # layer 0 at the top
    assert tuple(figure.layout.xaxis.range) == (-0.5, 3.5)
    assert figure.layout.xaxis.ticktext == TOKENS  # equal tokens are separate
    assert figure.layout.xaxis.tickvals == (0, 1, 2, 3)
    assert "prompt 0, one of 2" in figure.facts.caption
    assert figure.facts.kind == "lens"


def test_another_prompt_can_be_shown() -> None:
    found = top()
    figure = lens(found, prompt=1)
    np.testing.assert_array_equal(cells(figure)[0].z, found.probs.values[:, :, 0, 1].double())
    assert "prompt 1, one of 2" in figure.facts.caption
    assert (figure.table()["id"] == found.ids[:, :, 0, 1].flatten().numpy()).all()


def test_hover_lists_the_top_tokens_with_their_probabilities() -> None:
    found = top(k=3)
    hover = cells(lens(found))[0].hovertext
    for row, column in np.ndindex(3, 4):
        lines = html.unescape(hover[row][column]).split("<br>")
        assert lines[:2] == [f"layer {row}", f"pos {TOKENS[column]}"]
        for k, line in enumerate(lines[2:]):
            rank, rest = line.split(". ", 1)
            token, number = rest.rsplit(" ", 1)
            assert int(rank) == k + 1
            assert token == f'"{visible(found.strings[row, column, k, 0])}"'
            assert float(number) == pytest.approx(float(found.probs.values[row, column, k, 0]), rel=1e-4)
        assert len(lines) == 5
    assert len(cells(lens(top(k=30)))[0].hovertext[0][0].split("<br>")) == 2 + 10


def test_table_has_a_row_for_each_cell_with_the_exact_numbers() -> None:
    found, color = top(k=2, text=True), read("rank", tokens=(" Mary",))
    table = lens(found, color=color, prompt=1).table()
    assert list(table) == ["layer", "pos", "value", "token", "prob", "id", "token 1", "prob 1", "id 1", "text"]
    np.testing.assert_array_equal(table["value"], color.values[:, :, 0, 1].flatten())
    np.testing.assert_array_equal(table["prob"], found.probs.values[:, :, 0, 1].flatten())
    np.testing.assert_array_equal(table["prob 1"], found.probs.values[:, :, 1, 1].flatten())
    assert table["token 1"].tolist() == found.strings[:, :, 1, 1].flatten().tolist()
    assert table["pos"].tolist() == list(TOKENS) * 3
    assert set(table["text"]) == {" went <home>"}


def test_numbers_survive_the_disk(tmp_path: Any) -> None:
    from mechkit.plot import read_table

    figure = lens(top(words=HOSTILE))
    again = read_table(figure.save(tmp_path / "lens.json"))
    for name, column in figure.table().items():
        assert again[name].tolist() == column.tolist()


@pytest.mark.parametrize(
    ("over", "rows", "columns"),
    [
        ("layer", ["0", "1", "2"], []),
        ("layer position", ["0", "1", "2"], ["IO", "S1", "S2"]),
        ("layer head", ["0", "1", "2"], ["0", "1"]),
        ("layer head pos", ["L0H0", "L0H1", "L1H0", "L1H1", "L2H0", "L2H1"], list(TOKENS)),
        ("layer pos head", ["L0H0", "L0H1", "L1H0", "L1H1", "L2H0", "L2H1"], list(TOKENS)),
        ("pos", [], list(TOKENS)),
    ],
)
def test_other_dims(over: str, rows: list[str], columns: list[str]) -> None:
    found = top(over)
    for figure in (lens(found), lens(read("entropy", over))):
        (trace,) = cells(figure)
        assert trace.z.shape == (len(rows) or 1, len(columns) or 1)
        assert list(figure.layout.yaxis.ticktext or []) == rows
        assert list(figure.layout.xaxis.ticktext or []) == columns
    probs = found.probs.values.select(-1, 0).select(-1, 0).double()
    expected = probs.transpose(1, 2) if over == "layer pos head" else probs
    np.testing.assert_array_equal(cells(lens(found))[0].z, expected.reshape(trace.z.shape))
    if len(rows) == 6:
        assert cells(lens(found))[0].hovertext[3][2].startswith('L1H1<br>pos " and" 2<br>')


def test_continuations_are_in_the_hover() -> None:
    assert 'continues " went &#60;home&#62;"' in cells(lens(top("layer position", text=True)))[0].hovertext[0][0]


def test_a_position_that_the_prompt_lacks_is_grey_and_empty() -> None:
    found = top()
    values, ids, strings = found.probs.values.clone(), found.ids.clone(), found.strings.copy()
    values[:, 3, :, 1], ids[:, 3, :, 1], strings[:, 3, :, 1] = NAN, -1, ""
    result = Result(values, found.probs.dims, found.probs.coords, {}, "", "prob", "probability", PROVENANCE)
    figure = lens(TopTokens(result, ids, strings), prompt=1)
    assert np.isnan(cells(figure)[0].z[:, 3]).all()
    assert len(texts(figure)) == 9
    assert cells(figure)[0].hovertext[0][3].endswith("not present")
    assert figure.layout.plot_bgcolor == LIGHT.absent
    assert "grey: no value" in figure.facts.caption
    assert "grey: no value" not in lens(TopTokens(result, ids, strings), prompt=0).facts.caption
    assert np.isnan(figure.table()["value"]).sum() == 3
    with pytest.raises(ValueError, match="cell that exists in prompt 1, got none"):
        lens(TopTokens(result.sel(pos=TOKENS[3:]), ids[:, 3:], strings[:, 3:]), prompt=1)


# -- another reading as the colour --------------------------------------------------------------------------------------


def test_color_is_another_reading_of_the_same_cells() -> None:
    color = read("rank", tokens=(" Mary",))
    figure = lens(top(), color=color)
    np.testing.assert_allclose(cells(figure)[0].z, np.log10(1 + color.values[:, :, 0, 0].double().numpy()))
    assert bar(figure).startswith('rank of " Mary"\n0 = top of the vocabulary\ndarker is a better (lower) rank')
    assert figure.layout.coloraxis.colorscale[0][1] == LIGHT.sequential[-1]  # rank 0 is dark
    assert figure.layout.coloraxis.colorbar.ticktext == ("0", "10", "100")
    np.testing.assert_allclose(figure.layout.coloraxis.colorbar.tickvals, np.log10([1, 11, 101]))
    rank = int(color.values[2, 1, 0, 0])
    assert html.unescape(cells(figure)[0].hovertext[2][1]).endswith(f'rank of " Mary" {rank}')
    np.testing.assert_array_equal(cells(lens(top(), color=color.sel(token=" Mary")))[0].z, cells(figure)[0].z)
    swapped = Result(
        color.values.transpose(0, 1), ("pos", "layer", "token", "prompt"), color.coords, {}, "", "rank", "rank", {}
    )
    np.testing.assert_array_equal(cells(lens(top(), color=swapped))[0].z, cells(figure)[0].z)


@pytest.mark.parametrize(
    ("color", "message"),
    [
        (
            read("rank", tokens=(" Mary", " John")),
            r"color: expected one token, got 2; choose .*sel\(token=\[' Mary'\]\)",
        ),
        (read("entropy", layer=2), "color: expected the cells of the top tokens .layer 3, pos 4., got others .layer 2"),
        (read("entropy", "layer"), "color: expected the cells of the top tokens"),
        (read("entropy").mean("prompt"), "color: expected a 'prompt' dim with label 0"),
        (read("entropy", values=torch.full((3, 4, 2), torch.inf)), "color: expected finite values"),
        (read("entropy", values=torch.full((3, 4, 2), NAN)), "color: expected at least one cell with a value"),
        (top(), "color: expected a Result or None, got a TopTokens"),
    ],
)
def test_a_color_of_other_cells_is_refused(color: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lens(top(), color=color)


def test_a_color_of_other_prompts_is_refused() -> None:
    def with_hash(result: Result, tokens_hash: str) -> Result:
        fields = {
            name: getattr(result, name) for name in ("values", "dims", "coords", "baseline", "base", "metric", "unit")
        }
        return Result(**fields, provenance={**result.provenance, "tokens_hash": tokens_hash})

    found = top()
    found = TopTokens(with_hash(found.probs, "aaaa"), found.ids, found.strings)
    lens(found, color=with_hash(read("entropy"), "aaaa"))
    with pytest.raises(
        ValueError, match=r"color: expected the prompts of the top tokens \(hash aaaa\), got others \(bbbb\)"
    ):
        lens(found, color=with_hash(read("entropy"), "bbbb"))
    with pytest.raises(ValueError, match="color: expected None with a Result"):
        lens(read(), color=read())


# -- results alone ------------------------------------------------------------------------------------------------------


def test_tokens_are_panels_on_one_scale_averaged_over_prompts() -> None:
    result = read("prob", tokens=(" Mary", " John", 17))
    figure = lens(result)
    assert len(cells(figure)) == 3
    for i, panel in enumerate(cells(figure)):
        np.testing.assert_allclose(panel.z, result.values[:, :, i].double().mean(-1), rtol=1e-6)
        assert panel.coloraxis == "coloraxis"
    assert [note.text for note in figure.layout.annotations[:3]] == ['token " Mary"', 'token " John"', "token id 17"]
    assert "mean over 2 prompts" in figure.facts.caption
    np.testing.assert_array_equal(figure.table()["value"], result.mean("prompt").values.flatten())
    one = lens(result, prompt=1)
    np.testing.assert_array_equal(cells(one)[2].z, result.values[:, :, 2, 1].double())
    assert "prompt 1, one of 2" in one.facts.caption
    assert not any("mean" in part for part in one.facts.caption)
    assert cells(one)[0].hovertext[1][2].split("<br>")[:3] == ["layer 1", 'pos " and" 2', 'token " Mary"']


def test_without_positions_tokens_are_columns() -> None:
    result = read("logit", "layer", tokens=("right", "wrong"))
    figure = lens(result)
    np.testing.assert_allclose(cells(figure)[0].z, result.values.double().mean(-1), rtol=1e-6)
    assert figure.layout.xaxis.ticktext == ('"right"', '"wrong"')
    assert figure.layout.xaxis.title.text == "token"


@pytest.mark.parametrize(
    ("value", "low", "high", "colours", "says"),
    [
        ("prob", 0, "max", "sequential", "white = 0\ndarker is higher"),
        ("entropy", 0, "max", "sequential", "entropy (nats)\nwhite = 0"),
        ("kl", 0, "max", "sequential", "kl (nats)\nwhite = 0"),
        ("log_prob", "min", 0, "sequential", "darker is higher\n0 = certain"),
        ("logit", "min", "max", "diverging", "white = 0\nblue is higher, red is lower"),
    ],
)
def test_scales(value: str, low: Any, high: Any, colours: str, says: str) -> None:
    result = read(value, tokens=None if value in ("entropy", "kl") else (" Mary",))
    figure = lens(result, prompt=0)
    shown = result.values[..., 0].double()
    ends = {"min": float(shown.min()), "max": float(shown.abs().max()), "-max": -float(shown.abs().max())}
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == pytest.approx((ends.get(low, low), ends.get(high, high)))
    middle = len(LIGHT.diverging) // 2  # of a map with two sides only what is used
    drawn = [colour for _, colour in axis.colorscale]
    if colours == "diverging":
        assert {LIGHT.diverging[middle], LIGHT.diverging[-1]} <= set(drawn)
    else:
        assert drawn == list(getattr(LIGHT, colours))
    assert says in bar(figure)
    dark = lens(result, theme="dark")
    if colours == "sequential":
        assert [colour for _, colour in dark.layout.coloraxis.colorscale] == list(getattr(DARK, colours))
    assert "black = 0" in bar(dark) or value == "log_prob"
    assert dark.layout.paper_bgcolor == DARK.paper


@pytest.mark.parametrize(
    ("found", "options", "message"),
    [
        (read("prob", values=torch.full((3, 4, 2), NAN)), {}, "found: expected at least one cell with a value"),
        (read("prob", values=torch.full((3, 4, 2), torch.inf)), {}, "found: expected finite values"),
        (read("prob", values=torch.rand(0, 4, 2), layer=0), {}, "at least one cell"),
        (read().sel(layer=0, pos=TOKENS[0]), {}, "expected dims among layer, head, pos, position or patch, and token"),
        (top().probs, {}, "expected dims among"),
        (read(), {"prompt": 5}, "prompt: expected one of 0, 1; got 5"),
        (read().sel(prompt=0), {"prompt": 0}, "prompt: expected None for a result without"),
        (top(), {"prompt": "x"}, "prompt: expected one of 0, 1; got 'x'"),
        (top(), {"theme": "pink"}, "theme: expected one of 'light', 'dark'"),
        ("text", {}, "found: expected a Result or TopTokens, got str"),
    ],
)
def test_refusals(found: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lens(found, **options)
    with pytest.raises(ValueError, match=r"whose metric is one of .*got metric 'logit_diff'"):
        lens(Result(torch.rand(2), ("layer",), {"layer": (0, 1)}, {}, "", "logit_diff", "logits", {}))


# -- text in cells ------------------------------------------------------------------------------------------------------


def test_text_is_left_out_of_cells_that_are_too_small_and_the_caption_says_so() -> None:
    small = lens(top(layer=32, pos=200, prompt=1))
    assert [trace.type for trace in small.data] == ["heatmap"]
    assert "cells are too small for their tokens, which hover shows" in small.facts.caption
    assert small.layout.width < 1400
    squeezed = lens(top(layer=32), height=300)
    assert squeezed.layout.height == 300
    assert len(squeezed.data) == 1
    large = lens(top(layer=48, pos=20))
    assert len(texts(large)) == 48 * 20
    assert large.layout.height < 1300
    assert not any("too small" in part for part in large.facts.caption)


def test_text_fits_its_cell() -> None:
    figure = lens(top(words=(" " + "extraordinarily" * 3, "日本語" * 9, "the"), pos=24))
    margin = figure.layout.margin
    cell = (figure.layout.width - margin.l - margin.r) / 24
    (trace,) = [trace for trace in figure.data if trace.type == "scatter"]
    for text in texts(figure).values():
        assert display_width(text) * trace.textfont.size * 0.602 <= cell
        assert text == "the" or text.endswith("…")
    assert trace.textfont.size >= 8
    assert "tokens that end in … are longer" in figure.facts.caption


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("value", ["prob", "rank", "logit"])
def test_ink_is_legible(theme: Any, value: str) -> None:
    """Whatever the cell's colour, the text's contrast is at least that of the better one of the theme's two inks, and 3."""

    def luminance(colour: tuple[float, ...]) -> float:
        parts = [x / 255 for x in colour]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: float, b: float) -> float:
        return (max(a, b) + 0.05) / (min(a, b) + 0.05)

    result = read(value, values=torch.linspace(0, 1000, 101).reshape(1, 101, 1), layer=1, pos=101, prompt=1)
    scale = choose_scale(result.values.flatten().numpy(), result, theme, "x")
    numbers = np.linspace(0, 1000, 101)
    for number, ink in zip(numbers, scale.inks(numbers, theme), strict=True):
        place = float((scale.drawn(np.array(number)) - scale.low) / (scale.high - scale.low)) * (len(scale.colours) - 1)
        below = min(int(place), len(scale.colours) - 2)
        two = [[int(scale.colours[below + i][j : j + 2], 16) for j in (1, 3, 5)] for i in (0, 1)]
        background = luminance(tuple(a + (b - a) * (place - below) for a, b in zip(*two, strict=True)))
        choices = [luminance(tuple(int(c[j : j + 2], 16) for j in (1, 3, 5))) for c in (theme.ink, theme.paper)]
        got = luminance(tuple(int(ink[j : j + 2], 16) for j in (1, 3, 5)))
        assert contrast(background, got) >= max(3.0, max(contrast(background, one) for one in choices) - 1e-9)


def test_hostile_tokens_appear_literally() -> None:
    labels = tuple(f'"{word}" {i}' for i, word in enumerate(HOSTILE))
    found = top(words=HOSTILE, pos_labels=labels, k=2)
    color = read("rank", values=torch.zeros(3, len(HOSTILE), 1, 2), pos=len(HOSTILE), tokens=("<b>%{z}",))
    color = Result(color.values, color.dims, {**color.coords, "pos": labels}, {}, "", "rank", "rank", {})
    figure = lens(found, color=color, title="<i>t</i>")
    (words,) = [trace for trace in figure.data if trace.type == "scatter"]
    hover = [line for row in cells(figure)[0].hovertext for text in row for line in text.split("<br>")]
    shown = [*words.text, *figure.layout.xaxis.ticktext, figure.layout.title.text, *hover]
    shown += figure.layout.coloraxis.colorbar.title.text.split("<br>")
    assert not any(set("<>$\n\t\u202e\u200b") & set(text) for text in shown)
    assert cells(figure)[0].hovertemplate is None
    assert words.texttemplate is None
    assert html.unescape(cells(figure)[0].hovertext[0][4]).split("<br>")[1] == 'pos "<script>alert(1)</script>" 4'
    for (row, column), text in texts(figure).items():
        word = found.strings[row, column, 0, 0]
        assert text.endswith("…") or text == (visible(word) if word.strip(" ") else f'"{word}"')


@given(token=st.text(max_size=30))
@settings(deadline=None, max_examples=25)
def test_any_token_is_one_line_that_fits(token: str) -> None:
    for columns in (1, 5, 12):
        short = fitted(token, columns)
        assert display_width(short) <= columns
        assert short == token or (short.endswith("…") and token.startswith(short[:-1]))
    figure = lens(top(words=(token,), layer=1, pos=1, prompt=1, k=1))
    lines = cells(figure)[0].hovertext[0][0].split("<br>")
    assert len(lines) == 3
    assert not set("<>\n\r\t") & set(lines[2])
    (text,) = texts(figure).values()
    assert display_width(text) >= 1 or unicodedata.category(token.strip()[0])[0] == "M"


# -- the prompts' own tokens on the axis --------------------------------------------------------------------------------


def two_prompts() -> Prompts:
    texts_ = (("When", " Mary", " and", " John"), ("When", " Anna", " met"))
    return Prompts(tuple(torch.arange(len(row)) for row in texts_), texts_)


def test_prompts_give_the_tokens_of_the_axis() -> None:
    found, prompts = top(pos_labels=('"When" 0', "1", 2, "3")), two_prompts()
    assert lens(found).layout.xaxis.ticktext == ('"When" 0', "1", "2", "3")
    first = ('"When" 0', '" Mary" 1', '" and" 2', '" John" 3')
    assert lens(found, prompts=prompts).layout.xaxis.ticktext == first
    second = ('"When" 0', '" Anna" 1', '" met" 2', "3")  # the last one is not in that prompt
    assert lens(found, prompts=prompts, prompt=1).layout.xaxis.ticktext == second
    pairs = PromptPairs(prompts, prompts, ((0,), (0,)), ((1,), (1,)))
    assert lens(found, prompts=pairs).layout.xaxis.ticktext == first
    assert lens(read(), prompts=prompts, prompt=1).layout.xaxis.ticktext[1] == '" Anna" 1'
    with pytest.raises(ValueError, match="prompt: expected the one of 2 different texts"):
        lens(read(), prompts=prompts)


def test_prompts_that_are_not_the_results_are_refused() -> None:
    found, prompts = read(), two_prompts()
    fields = {name: getattr(found, name) for name in ("values", "dims", "coords", "baseline", "base", "metric", "unit")}
    known = Result(**fields, provenance={"tokens_hash": prompts.hash()})
    assert lens(known, prompts=prompts, prompt=0).layout.xaxis.ticktext[3] == '" John" 3'
    with pytest.raises(ValueError, match="prompts: expected those that the values were computed on"):
        lens(known, prompts=prompts[[1, 0]], prompt=0)
    with pytest.raises(ValueError, match="prompts: expected tokens as text, got ids alone"):
        lens(found, prompts=Prompts(prompts.tokens), prompt=0)
    with pytest.raises(ValueError, match="prompt: expected an index into 2 prompts, got 7"):
        lens(found.sel(prompt=0), prompts=prompts, prompt=7)


def test_nothing_is_changed_and_examples_are_drawn() -> None:
    found = top()
    before, words = found.probs.values.clone(), found.strings.copy()
    lens(found, theme="dark")
    assert torch.equal(found.probs.values, before)
    assert (found.strings == words).all()
    for name, figure in examples().items():
        assert isinstance(figure, Figure), name
        assert len(figure.table()["value"]) > 0
        assert figure.layout.template.layout.paper_bgcolor != figure.layout.paper_bgcolor or "dark" not in name
    assert lens(found, title="Mine", height=500).layout.title.text == "Mine"
    assert lens(found).facts.title == "Top tokens of resid_post: most probable token by layer and pos"
