"""Running text on the colours of its tokens' values."""

from __future__ import annotations

import html
import math
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.pictures.tokens import HOSTILE, PROVENANCE, TEXT, examples, labels_of, long_text, loss, make
from mechkit.plot._labels import position_of
from mechkit.plot._text import display_width, visible
from mechkit.plot._theme import DARK, LIGHT, MONOSPACE
from mechkit.plot._tokens import tokens
from mechkit.prompts import PromptPairs, Prompts
from mechkit.result import Result

NAN = float("nan")


def bars(figure: go.Figure) -> list[go.Bar]:
    return [trace for trace in figure.data if trace.type == "bar"]


def words(figure: go.Figure) -> go.Scatter:
    return next(trace for trace in figure.data if trace.type == "scatter" and trace.textfont.family == MONOSPACE)


def says(figure: go.Figure) -> list[str]:
    """What is written next to the colour bars."""
    return [html.unescape(note.text) for note in figure.layout.annotations if note.name == "scale"]


# -- where tokens are ---------------------------------------------------------------------------------------------------


def test_each_token_has_its_colour_text_and_hover() -> None:
    result = make()
    figure = tokens(result)
    (bar,) = bars(figure)
    np.testing.assert_array_equal(bar.marker.color, result.values.double())
    assert bar.marker.coloraxis == "coloraxis"
    assert list(bar.x) == [len(token) for token in TEXT]  # widths
    assert list(bar.base) == np.cumsum([0, *bar.x])[:-1].tolist()  # one after the other: repeated tokens are separate
    assert [html.unescape(text) for text in words(figure).text] == [token.lstrip() for token in TEXT]
    for i, hover in enumerate(bar.hovertext):
        place, value = html.unescape(hover).split("<br>")
        assert place == f'"{TEXT[i]}" {i}'
        name, number, unit = value.split(" ")
        assert (name, unit) == ("logit_diff", "logits")
        assert float(number.replace("−", "-")) == pytest.approx(float(result.values[i]), rel=1e-4)
    assert figure.layout.barmode == "overlay"
    assert figure.facts.kind == "tokens"
    assert figure.facts.title == "Gradient x input of resid_pre: logit_diff"
    assert figure.facts.caption == ("tiny-llama", "ioi", "1 prompt", "gradient x input", "site resid_pre")


def test_a_leading_space_is_room_before_the_text() -> None:
    figure = tokens(make(("  two", " one", "none")))
    assert list(words(figure).x) == [2, 6, 9]
    assert list(bars(figure)[0].base) == [0, 5, 9]
    assert words(figure).textposition == "middle right"


def test_lines_have_at_most_80_columns_and_end_with_newlines() -> None:
    text = [" word"] * 40 + ["\n"] + ["日本"] * 30 + [".\n\n", "end"]
    figure = tokens(make(text))
    (bar,) = bars(figure)
    ends = np.array(bar.base) + np.array(bar.x)
    lines = sorted(set(bar.y))
    assert ends.max() == 80
    assert [sum(y == line for y in bar.y) for line in lines] == [16, 16, 9, 20, 11, 1]
    assert [list(bar.y).index(line) for line in lines] == [0, 16, 32, 41, 61, 72]
    assert set(np.diff(lines)) == {26}
    assert all(bar.base[list(bar.y).index(line)] == 0 for line in lines)
    assert list(bar.x)[41] == 4  # two wide characters
    assert words(figure).text[40] == "\\n"
    top, bottom = figure.layout.yaxis.range
    assert top > max(lines) > min(lines) > bottom == 0  # downwards


def test_a_token_longer_than_a_line_is_shortened_in_the_picture_only() -> None:
    figure = tokens(make(("a" * 200, "b")))
    assert words(figure).text[0] == "a" * 79 + "…"
    assert "a" * 200 in bars(figure)[0].hovertext[0]
    assert figure.table()["token"].tolist() == ["a" * 200, "b"]
    assert len(set(bars(figure)[0].y)) == 2


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("abc", 3),
        ("日本", 4),
        ("é", 1),
        ("e\u0301", 1),
        ("👩", 2),
        ("👩\u200d👧", 4),
        ("\n", 2),
        ("\u200b", 6),
        ("שלום", 4),
    ],
)
def test_display_width(text: str, columns: int) -> None:
    assert display_width(text) == columns


@given(text=st.lists(st.text(max_size=12), min_size=1, max_size=40))
@settings(deadline=None, max_examples=25)
def test_any_text_is_laid_out_in_order_without_overlap(text: list[str]) -> None:
    figure = tokens(make(text))
    (bar,) = bars(figure)
    assert figure.table()["token"].tolist() == text
    places = list(zip(bar.y, bar.base, strict=True))
    assert places == sorted(set(places))
    for i in range(1, len(text)):
        if bar.y[i] == bar.y[i - 1]:
            assert bar.base[i] == bar.base[i - 1] + bar.x[i - 1]
            assert "\n" not in text[i - 1]
    assert not any(set("<>\n\r\t$") & set(shown) for shown in words(figure).text)
    assert all(len(hover.split("<br>")) == 2 for hover in bar.hovertext)


def test_hostile_tokens_appear_literally() -> None:
    figure = tokens(make(HOSTILE, metric="<i>m</i>", unit="a&b"), title="<b>t</b>")
    (bar,) = bars(figure)
    shown = [*words(figure).text, figure.layout.title.text, *(note.text for note in figure.layout.annotations)]
    shown += [line for hover in bar.hovertext for line in hover.split("<br>")]
    assert not any(set("<>$\n\t\r\u202e\u200b") & set(text) for text in shown)
    assert bar.hovertemplate is None
    assert bar.texttemplate is None
    assert words(figure).texttemplate is None
    assert [html.unescape(hover.split("<br>")[0]) for hover in bar.hovertext] == [
        f'"{visible(token)}" {i}' for i, token in enumerate(HOSTILE)
    ]
    assert says(figure)[0].startswith("<i>m</i> (a&b)")
    assert figure.table()["token"].tolist() == list(HOSTILE)


def test_512_tokens() -> None:
    figure = tokens(loss(long_text()))
    assert len(bars(figure)[0].x) == len(figure.table()["value"]) == 512
    assert figure.layout.width < 800


# -- what colours mean --------------------------------------------------------------------------------------------------


def test_attributions_are_centred_on_0() -> None:
    result = make(values=torch.linspace(0.5, 2, 12))  # also if all are above it
    figure = tokens(result)
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0, 2)
    assert [colour for _, colour in axis.colorscale] == list(LIGHT.diverging[5:])
    assert says(figure) == ["logit_diff (logits) · white = 0 · blue is higher"]
    dark = tokens(result, theme="dark")
    assert [colour for _, colour in dark.layout.coloraxis.colorscale] == list(DARK.diverging[5:])
    assert "black = 0" in says(dark)[0]
    assert dark.layout.paper_bgcolor == DARK.paper
    chosen = tokens(result, center=1.0, zmax=0.25)
    assert (chosen.layout.coloraxis.cmin, chosen.layout.coloraxis.cmax) == (0.75, 1.25)
    assert "white = 1 " in says(chosen)[0]
    flat = tokens(make(values=torch.zeros(12)))
    assert flat.layout.coloraxis.cmin < 0 < flat.layout.coloraxis.cmax


@pytest.mark.parametrize(
    ("metric", "unit", "technique", "sequential"),
    [
        ("loss", "nats", None, True),
        ("attention_rollout", "fraction", "attention rollout", True),
        ("attention_flow", "capacity", "attention flow", True),
        ("entropy", "nats", "logit_lens", True),
        ("prob", "probability", "logit_lens", True),
        ("prob", "probability", "gradient x input", False),  # an attribution of a probability has a sign
        ("L4N133", "activation", None, False),
    ],
)
def test_what_has_no_sign_is_sequential(metric: str, unit: str, technique: str | None, sequential: bool) -> None:
    provenance = {"technique": technique} if technique else {}
    values = torch.linspace(0.1, 1, 12)
    axis = tokens(make(values=values, metric=metric, unit=unit, provenance=provenance)).layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0, 1)
    assert [colour for _, colour in axis.colorscale] == list(LIGHT.sequential if sequential else LIGHT.diverging[5:])
    signed = tokens(make(values=-values, metric=metric, unit=unit, provenance=provenance)).layout.coloraxis
    assert (signed.cmin, signed.cmax) == (-1, 0)  # a negative one is never off the scale
    assert [colour for _, colour in signed.colorscale] == list(LIGHT.diverging[:6])


def test_a_result_with_baselines_is_coloured_by_its_effect() -> None:
    result = make(baseline={"clean": torch.tensor(4.0), "corrupted": torch.tensor(-3.0)}, base="corrupted")
    figure = tokens(result)
    np.testing.assert_array_equal(bars(figure)[0].marker.color, result.effect().values.double())
    assert says(figure)[0].startswith("change in logit_diff (logits) · white = corrupted run")
    assert "from the corrupted run" in bars(figure)[0].hovertext[0]
    np.testing.assert_array_equal(figure.table()["value"], result.values)
    np.testing.assert_array_equal(figure.table()["baseline corrupted"], np.full(12, -3.0))
    centred = tokens(result, center=0.0)
    np.testing.assert_array_equal(bars(centred)[0].marker.color, result.values.double())


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_ink_differs_between_light_and_dark_backgrounds(theme: str) -> None:
    inks = words(tokens(make(("a", "b", "c"), torch.tensor([-1.0, 0.0, 1.0])), theme=theme)).textfont.color
    colours = LIGHT if theme == "light" else DARK
    assert list(inks) == [colours.paper, colours.ink, colours.paper]


def test_a_token_without_a_value_is_grey() -> None:
    figure = tokens(make(("a", "b", "c"), torch.tensor([NAN, 0.0, 1.0])))
    coloured, grey = bars(figure)
    assert list(coloured.marker.color) == [0, 1]
    assert (grey.marker.color, list(grey.base)) == (LIGHT.absent, [0])
    assert grey.hovertext[0].endswith("no value")
    assert list(words(figure).text) == ["a", "b", "c"]
    assert "grey: no value" in figure.facts.caption
    assert np.isnan(figure.table()["value"][0])


# -- several results ----------------------------------------------------------------------------------------------------


def test_several_results_are_strips_below_the_text() -> None:
    given_ = {"first": make(), "second": make(values=5 * torch.ones(12)), "loss": loss()}
    figure = tokens(given_)
    text, *strips = bars(figure)
    assert text.marker.color == LIGHT.paper
    assert [len(hover.split("<br>")) for hover in text.hovertext] == [4] * 12
    for strip, (name, result) in zip(strips, given_.items(), strict=True):
        np.testing.assert_array_equal(strip.marker.color, result.values.double())
        assert list(strip.base) == list(text.base)
        assert f"<br>{name}" in strip.hovertext[3]
    assert [strip.marker.coloraxis for strip in strips] == ["coloraxis", "coloraxis", "coloraxis2"]  # one a unit
    assert figure.layout.coloraxis.cmax == 5
    heights = [text.y[0], *(strip.y[0] for strip in strips)]
    assert heights == sorted(set(heights))
    names = [trace for trace in figure.data if trace.type == "scatter"][1:]
    assert [html.unescape(trace.text[0]).strip() for trace in names] == list(given_)
    assert len(says(figure)) == 2
    for axis in (figure.layout.coloraxis, figure.layout.coloraxis2):  # outside, plotly would shrink the text for them
        assert 0 < axis.colorbar.y < 1
    table = figure.table()
    assert table["result"].tolist() == [name for name in given_ for _ in TEXT]
    assert table["token"].tolist() == list(TEXT) * 3
    np.testing.assert_array_equal(table["value"], torch.cat([one.values for one in given_.values()]))


def test_a_list_is_named_by_its_techniques() -> None:
    rollout = make(unit="fraction", provenance={"technique": "attention_rollout"}, values=torch.rand(12))
    figure = tokens([make(), rollout, make(metric="prob_diff")])
    assert figure.facts.title == "gradient x input, attention rollout, gradient x input: prob_diff of each token"


# -- which prompt, and its text -----------------------------------------------------------------------------------------


def ragged() -> tuple[Result, Prompts]:
    """Two prompts of different length and text."""
    texts = (("When", " Mary", " and", " John"), ("When", " Anna", " met"))
    prompts = Prompts(tuple(torch.arange(len(row)) + i for i, row in enumerate(texts)), texts)
    values = torch.tensor([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], [4.0, NAN]])
    provenance = {**PROVENANCE, "n_prompts": 2, "tokens_hash": prompts.hash()}
    return make(values=values, labels=('"When" 0', "1", "2", '" John" 3'), provenance=provenance), prompts


def test_one_prompt_is_shown_with_its_own_tokens() -> None:
    result, prompts = ragged()
    first, second = tokens(result, prompts=prompts), tokens(result, prompts=prompts, prompt=1)
    assert first.table()["token"].tolist() == ["When", " Mary", " and", " John"]
    assert first.table()["value"].tolist() == [1, 2, 3, 4]
    assert "prompt 0, one of 2" in first.facts.caption
    assert second.table()["token"].tolist() == ["When", " Anna", " met"]  # position 3 is not in it
    assert second.table()["value"].tolist() == [5, 6, 7]
    assert "prompt 1, one of 2" in second.facts.caption
    assert '" Anna" 1' in bars(second)[0].hovertext[1]
    pairs = PromptPairs(
        Prompts(tuple(row + 9 for row in prompts.tokens), prompts.str_tokens), prompts, ((0,),) * 2, ((1,),) * 2
    )
    assert tokens(result, prompts=pairs).table()["token"].tolist() == ["When", " Mary", " and", " John"]
    alone = result.sel(prompt=1)
    assert tokens(alone, prompts=prompts, prompt=1).table()["token"].tolist() == ["When", " Anna", " met"]


def test_unknown_tokens_are_their_positions() -> None:
    result, _ = ragged()
    figure = tokens(result, prompt=1)
    assert list(words(figure).text) == ["When", "[1]", "[2]"]  # the prompt ends there
    assert any(part.startswith("[3]: a position") for part in figure.facts.caption)
    numbers = tokens(make(labels=tuple(range(12))))
    assert list(words(numbers).text)[:2] == ["[0]", "[1]"]
    assert not any("[3]" in part for part in tokens(make()).facts.caption)
    assert tokens(make(("[1]",))).table()["token"].tolist() == ["[1]"]


def test_a_token_with_quotes_and_digits_is_read_back() -> None:
    tricky = ('" 3', "7", '"', '\n" 5')
    assert tokens(make(tricky)).table()["token"].tolist() == list(tricky)
    assert [position_of(label) for label in labels_of(tricky)] == [0, 1, 2, 3]
    assert [position_of(label) for label in (3, "4", "IO", '"x" y')] == [3, 4, None, None]


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (
            Result(torch.rand(2), ("layer",), {"layer": (0, 1)}, {}, "", "m", "u", {}),
            {},
            r"values: expected dims \('pos',\)",
        ),
        (make(values=torch.full((12,), torch.inf)), {}, "values: expected finite values"),
        (make(values=torch.full((12,), NAN)), {}, "values: expected at least one value"),
        (make((), torch.rand(0)), {}, "values: expected at least one value"),
        (make(), {"zmax": 0.0}, "zmax: expected a positive number, got 0"),
        (make(), {"prompt": 0}, "prompt: expected None for values without a 'prompt' dim"),
        (ragged()[0], {"prompt": 9}, "prompt: expected one of 0, 1; got 9"),
        (ragged()[0], {"prompts": ragged()[1][[1, 0]]}, "prompts: expected those that the values were computed on"),
        (make(), {"theme": "pink"}, "theme: expected one of"),
        ([], {}, "values: expected at least one Result, got none"),
        ([make(), "x"], {}, "expected a Result, got str"),
        ({"a": make(), "b": make(TEXT[:3])}, {}, r"values\['b'\]: expected values of the same prompts and positions"),
        ({str(i): make(unit=str(i)) for i in range(4)}, {}, "at most 3 scales, got units '0', '1', '2', '3'"),
    ],
)
def test_refusals(values: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens(values, **options)


def test_a_prompt_without_values_and_other_prompts_are_refused() -> None:
    result, _ = ragged()
    nothing = replace(result, values=torch.tensor([[1.0, NAN]] * 4))
    tokens(nothing)
    with pytest.raises(ValueError, match="values: expected some in the prompt that is shown, got none"):
        tokens(nothing, prompt=1)
    other = replace(make(), provenance={"tokens_hash": "bbbb"})
    with pytest.raises(ValueError, match="expected values of the same prompts"):
        tokens({"a": replace(make(), provenance={"tokens_hash": "aaaa"}), "b": other})


def test_numbers_survive_the_disk_and_examples_are_drawn(tmp_path: Any) -> None:
    from mechkit.plot import read_table

    for name, figure in examples().items():
        again = read_table(figure.save(tmp_path / "tokens.json"))
        for column, numbers in figure.table().items():
            assert again[column].tolist() == numbers.tolist(), name


def test_values_that_are_compared_with_other_runs_are_not_drawn_together() -> None:
    labels = ('"a" 0', '"b" 1')
    bare = Result(torch.tensor([1.0, 2.0]), ("pos",), {"pos": labels}, {}, "", "loss", "nats", {})
    based = Result(
        torch.tensor([1.0, 2.0]), ("pos",), {"pos": labels}, {"clean": torch.tensor(0.5)}, "clean", "loss", "nats", {}
    )
    for several in ([bare, based], [based, bare]):
        with pytest.raises(ValueError, match="expected the runs that the first is compared with"):
            tokens(several)
    assert len(tokens([based, based]).table()["baseline clean"]) == 4
    for bad in ({"zmax": math.inf}, {"center": math.nan}):
        with pytest.raises(ValueError, match="expected"):
            tokens(bare, **bad)
