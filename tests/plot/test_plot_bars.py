"""Bars: lengths and intervals are the result's, the rest adds up, and what does not add up is not summed."""

from __future__ import annotations

import html
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.pictures.bars import HOSTILE, caption, dla, examples, make, patched
from mechkit.plot._bars import bars
from mechkit.plot._theme import DARK, LIGHT
from mechkit.result import Result

NAN = float("nan")


# Lengths and intervals


def test_components_as_stored_with_their_intervals() -> None:
    result = dla()
    figure = bars(result)
    bar, table = figure.data[0], figure.table()
    np.testing.assert_array_equal(bar.x, result.mean("prompt").values)
    np.testing.assert_array_equal(table["value"], result.mean("prompt").values)
    assert tuple(table["label"]) == result.coords["component"] == figure.layout.yaxis.ticktext
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # the first on top
    assert bar.orientation == "h"
    interval = result.ci()
    for name, end in (("low", interval.low), ("high", interval.high)):
        np.testing.assert_allclose(table[name], end.values, rtol=1e-6)
    np.testing.assert_allclose(bar.x + bar.error_x.array, table["high"])
    np.testing.assert_allclose(bar.x - bar.error_x.arrayminus, table["low"])
    assert "95 % bootstrap interval over 8 prompts" in caption(figure)
    assert "mean over 8 prompts" in caption(figure)
    wide = bars(result, level=0.999).table()
    assert (wide["high"] > table["high"]).all()


def test_blue_is_positive_and_red_negative() -> None:
    for theme in (LIGHT, DARK):
        figure = bars(make(torch.tensor([1.0, -2.0, 0.0]), "layer"), theme=theme.name)
        assert figure.data[0].marker.color == (theme.positive, theme.negative, theme.positive)
        assert figure.layout.paper_bgcolor == theme.paper
        assert figure.data[0].error_x.color == theme.ink
    with pytest.raises(ValueError, match="theme: expected one of 'light', 'dark'"):
        bars(dla(), theme="blue")


def test_with_baselines_a_bar_is_the_effect() -> None:
    result = patched(3, 2)
    figure = bars(result)
    table = figure.table()
    expected = result.mean("prompt").effect().values.flatten()
    np.testing.assert_array_equal(figure.data[0].x, expected)
    np.testing.assert_array_equal(table["effect"], expected)
    np.testing.assert_array_equal(table["value"], result.mean("prompt").values.flatten())
    assert list(table["label"]) == ["L0H0", "L0H1", "L1H0", "L1H1", "L2H0", "L2H1"]
    interval = result.effect().ci()  # narrower than result.ci(), because base and edited run are paired
    np.testing.assert_allclose(table["low"], interval.low.values.flatten(), rtol=1e-5)
    assert (
        table["high"] - table["low"] < (result.ci().high.values - result.ci().low.values).flatten().numpy() - 0.1
    ).all()
    assert (
        "change in logit_diff (logits)<br>0 = corrupted run; blue is higher, red is lower"
        in figure.layout.xaxis.title.text
    )


def test_the_prompt_may_be_any_dim() -> None:
    result = patched(3, 2)
    turned = replace(result, values=result.values.permute(2, 1, 0), dims=("prompt", "head", "layer"))
    one, two = bars(result, k=6).table(), bars(turned, k=6).table()
    for name in ("value", "effect", "low", "high"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5)
    assert list(two["label"]) == list(one["label"])
    assert list(bars(turned).table()["label"]) == ["L0H0", "L1H0", "L2H0", "L0H1", "L1H1", "L2H1"]


def test_ragged_cells_are_compared_with_their_own_prompts() -> None:
    values = torch.tensor([[1.0, 101.0], [2.0, NAN], [NAN, NAN]])
    result = make(values, "pos prompt", baseline={"clean": torch.tensor([1.0, 100.0])}, base="clean")
    figure = bars(result)
    np.testing.assert_array_equal(figure.data[0].x, [0.5, 1.0])
    assert list(figure.table()["label"]) == ["pos 0", "pos 1"]
    assert np.isnan(figure.table()["low"][1])  # one prompt has no interval
    assert not np.isnan(figure.table()["low"][0])
    assert "averaged over the prompts that have it" in caption(figure)
    assert "1 cells exist in no prompt" in caption(figure)
    assert "averaged over the prompts" not in caption(bars(dla()))


def test_normalized_is_the_ratio_of_the_means_with_its_interval() -> None:
    result = patched(3, 2)
    figure = bars(result, normalized=True)
    np.testing.assert_array_equal(figure.data[0].x, result.mean("prompt").normalized().values.flatten())
    interval = result.ci(normalized=True)
    np.testing.assert_allclose(figure.table()["low"], interval.low.values.flatten(), rtol=1e-6)
    assert "normalized<br>0 = corrupted run, 1 = clean run" in figure.layout.xaxis.title.text
    assert "logits" not in figure.data[0].hovertext[0]
    noising = patched(3, 2, base="clean")
    figure = bars(noising, normalized=True)
    np.testing.assert_allclose(figure.data[0].x, noising.mean("prompt").normalized().values.flatten() - 1, atol=1e-6)
    np.testing.assert_allclose(figure.table()["low"] + 1, noising.ci(normalized=True).low.values.flatten(), rtol=1e-6)
    assert "0 = clean run" in figure.layout.xaxis.title.text


def test_normalized_without_a_sure_gap_has_no_interval() -> None:
    runs = {"clean": torch.tensor([1.0, -0.9]), "corrupted": torch.zeros(2)}
    result = make(torch.rand(2, 2), "layer prompt", baseline=runs, base="corrupted")
    figure = bars(result, normalized=True)
    assert np.isnan(figure.table()["low"]).all()
    assert not figure.data[0].error_x.visible
    assert "no intervals" in caption(figure)


def test_no_interval_without_two_prompts() -> None:
    for result in (dla().mean("prompt"), dla(n=1)):
        figure = bars(result)
        assert np.isnan(figure.table()["low"]).all()
        assert not figure.data[0].error_x.visible
        assert "bootstrap" not in caption(figure)


# The largest, and the rest


def test_k_keeps_the_largest_and_sums_the_rest() -> None:
    result = dla()
    figure = bars(result, k=3)
    table, mean = figure.table(), result.mean("prompt")
    top = mean.top(3)
    assert list(table["label"][:3]) == [cell.label for cell in top]
    np.testing.assert_allclose(table["value"][:3], [cell.value for cell in top], rtol=1e-6)
    assert table["label"][3] == "everything else (7)"
    assert table["value"].sum() == pytest.approx(float(mean.values.double().sum()), abs=1e-5)
    assert figure.data[0].marker.color[-1] == LIGHT.grey
    others = [label for label in result.coords["component"] if label not in {cell.label for cell in top}]
    rest = result.sel(component=others).values.sum(0, keepdim=True)
    interval = make(rest, "component prompt").ci()
    assert table["low"][3] == pytest.approx(float(interval.low.values), rel=1e-5)
    assert "the 3 largest of 10 are shown · the grey bar is the sum of the other 7" in caption(figure)


def test_what_does_not_add_up_is_left_out_and_counted() -> None:
    ragged = dla()
    values = ragged.values.clone()
    values[0, 0] = NAN
    cumulative = dla(over="cumulative")
    runs = dla().values
    for result in (
        patched(3, 2),
        make(torch.randn(6), "pos"),
        make(
            values, "component prompt", coords={"component": ragged.coords["component"]}, origin=dict(ragged.provenance)
        ),
        make(runs.reshape(2, 5, 8), "layer head prompt", origin={**ragged.provenance, "over": "layer head src"}),
    ):
        figure = bars(result, k=2)
        assert len(figure.data[0].x) == 2
        assert "everything" not in str(figure.table()["label"])
        n = result.mean("prompt").values.numel() if "prompt" in result.dims else 6
        assert f"{n - 2} smaller ones are left out" in caption(figure)
    with pytest.raises(ValueError, match="running sum shows every component"):
        bars(cumulative, k=2)


def test_k_beyond_all_sorts_them() -> None:
    table = bars(dla(), k=50).table()
    assert len(table["value"]) == 10
    assert (np.diff(np.abs(table["value"])) <= 0).all()


def test_many_bars_are_thinned_or_refused() -> None:
    figure = bars(make(torch.randn(200), "neuron"))
    shown = len(figure.layout.yaxis.ticktext)
    assert 40 <= shown <= 100
    assert figure.layout.height / shown > 12
    assert figure.layout.height <= 1000
    with pytest.raises(ValueError, match="at most 200 bars, got 201; give a smaller k, such as k=30"):
        bars(make(torch.randn(201), "neuron"))
    with pytest.raises(ValueError, match="k: expected at most 200 bars, got 300"):
        bars(make(torch.randn(400), "neuron"), k=300)
    assert len(bars(make(torch.randn(10_000), "neuron"), k=20).table()["label"]) == 20


# Running sums


def test_running_sum() -> None:
    result = dla()
    figure = bars(result, cumulative=True)
    line, table = figure.data[-1], figure.table()
    expected = result.values.double().cumsum(0)
    np.testing.assert_allclose(line.y, expected.mean(1), atol=1e-12)
    np.testing.assert_array_equal(table["value"], line.y)
    assert line.y[-1] == pytest.approx(float(result.values.sum(0).mean()), abs=1e-5)
    interval = make(expected, "component prompt").ci()
    np.testing.assert_allclose(table["low"], interval.low.values)
    np.testing.assert_allclose(figure.data[0].y, [*table["low"], *table["high"][::-1]])  # the band
    assert figure.layout.xaxis.ticktext == result.coords["component"]
    assert "band: 95 % bootstrap" in caption(figure)


def test_a_cumulative_result_is_drawn_as_it_is() -> None:
    result = dla(over="cumulative")
    for figure in (bars(result), bars(result, cumulative=True)):
        np.testing.assert_array_equal(figure.data[-1].y, result.mean("prompt").values)
        np.testing.assert_allclose(figure.table()["low"], result.ci().low.values, rtol=1e-6)
    alone = bars(result.mean("prompt"))
    assert len(alone.data) == 1  # no band
    assert "running sum" in alone.facts.title


@pytest.mark.parametrize(
    "result",
    [patched(2, 2), make(torch.randn(3), "pos"), make(torch.randn(2, 2), "layer head", origin={"technique": "x"})],
    ids=["patching", "unknown", "heads"],
)
def test_running_sum_of_what_does_not_add_up_is_refused(result: Result) -> None:
    with pytest.raises(ValueError, match="cumulative: expected the parts of direct logit attribution"):
        bars(result, cumulative=True)


# What it says


def test_axis_says_unit_and_sign() -> None:
    def axis(result: Result) -> str:
        return bars(result).layout.xaxis.title.text

    assert axis(dla()) == "logit_diff (logits)<br>blue raises the metric, red lowers it"
    assert (
        axis(make(torch.tensor([1.0, 2.0]), "layer", metric="induction", unit="attention")) == "induction (attention)"
    )
    assert (
        axis(make(torch.tensor([1.0, -2.0]), "layer", unit="nats"))
        == "logit_diff (nats)<br>blue is above 0, red is below"
    )
    sizes = make(
        torch.rand(3), "layer", baseline={"clean": torch.tensor(0.0)}, base="clean", origin={"sign": "magnitude"}
    )
    assert axis(sizes) == "size of the change in logit_diff (logits)<br>0 = clean run; sizes only"


def test_the_other_run_is_a_line_where_it_is_near() -> None:
    runs = {"clean": torch.tensor(4.0), "corrupted": torch.tensor(1.0)}
    near = bars(make(torch.tensor([1.5, 3.5]), "layer", baseline=runs, base="corrupted"))
    assert [shape.x0 for shape in near.layout.shapes] == [0, 3]
    assert near.layout.annotations[0].text == "clean run"
    assert near.layout.xaxis.range[1] > 3
    far = bars(make(torch.tensor([1.5, 1.6]), "layer", baseline=runs, base="corrupted"))
    assert [shape.x0 for shape in far.layout.shapes] == [0]


def test_hover_shows_the_values() -> None:
    figure = bars(make(torch.tensor([[1.234567, NAN]]), "layer pos", coords={"pos": ('" Mary" 3', '"x" 4')}))
    assert figure.data[0].hovertext == ('L0 " Mary" 3<br>logit_diff 1.2346 logits',)
    result = patched(2, 2)
    hover = bars(result).data[0].hovertext[3].split("<br>")
    mean = result.mean("prompt")
    assert hover[0] == "L1H1"
    assert hover[1] == f"logit_diff {mean.values[1, 1]:.5g} logits".replace("-", "−")
    assert hover[2] == f"{mean.effect().values[1, 1]:+.5g} logits from the corrupted run".replace("-", "−")
    assert hover[3].startswith("interval ")


def test_hostile_labels_are_literal() -> None:
    for figure in (
        examples()["tokens"],
        bars(make(torch.ones(11), "pos", coords={"pos": HOSTILE}, unit="<i>"), title="<b>"),
    ):
        shown = [*figure.layout.yaxis.ticktext, *figure.data[0].hovertext, figure.layout.title.text]
        shown += [figure.layout.xaxis.title.text, figure.layout.annotations[-1].text]
        for text in shown:
            assert not set("<>$\n\t") & set(text.replace("<br>", ""))
        assert len(figure.layout.yaxis.ticktext) == len(HOSTILE)  # " the" twice
        assert html.unescape(figure.data[0].hovertext[0].split("<br>")[0]) == HOSTILE[0]
        assert figure.data[0].hovertemplate is None
        assert len(figure.layout.yaxis.ticktext[-1]) <= 24
        assert list(figure.table()["label"]) == list(HOSTILE)


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    k=st.one_of(st.none(), st.integers(1, 40)),
)
@settings(deadline=None, max_examples=40)
def test_bars_are_within_the_axis_and_sum_to_the_whole(values: list[float], k: int | None) -> None:
    origin = {"technique": "direct logit attribution", "over": "component"}
    labels = {"component": tuple(f"c{i}" for i in range(len(values)))}
    result = make(torch.tensor(values), "component", coords=labels, origin=origin)
    figure = bars(result, k=k)
    x = figure.data[0].x
    low, high = figure.layout.xaxis.range
    assert low <= min(0, *x)
    assert high >= max(0, *x)
    assert low < high
    assert sum(x) == pytest.approx(sum(values), abs=1e-2)


@pytest.mark.parametrize(
    ("values", "dims", "options", "message"),
    [
        (torch.zeros(3), "prompt", {}, "expected a dim besides 'prompt'"),
        (torch.zeros(0), "layer", {}, "expected a cell that exists, got none among 0"),
        (torch.full((2,), NAN), "layer", {}, "expected a cell that exists, got none among 2"),
        (torch.tensor([1.0, torch.inf]), "layer", {}, "infinite"),
        (torch.tensor([[1.0, torch.inf]]), "layer prompt", {}, "infinite"),
        (torch.zeros(3), "layer", {"k": 0}, "k: expected a whole number of at least 1, got 0"),
        (torch.zeros(3), "layer", {"k": 1.5}, "k: expected a whole number"),
        (torch.zeros(3), "layer", {"level": 1.0}, "level: expected a number between 0 and 1, got 1.0"),
        (torch.zeros(3), "layer", {"normalized": True}, "clean"),
    ],
)
def test_refuses(values: torch.Tensor, dims: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bars(make(values, dims), **options)


def test_examples_are_drawn_and_keep_their_numbers(tmp_path: Any) -> None:
    from mechkit.plot import read_table

    for name, figure in examples().items():
        table = read_table(figure.save(tmp_path / f"{name}.json"))
        for column, values in figure.table().items():
            np.testing.assert_array_equal(table[column], values)
        assert len(figure.data[-1].x) == len(table["label"]) > 0
        assert figure.facts.kind == "bars"
    assert bars(dla(), height=777, title="Mine").layout.height == 777


def test_normalized_bars_of_a_third_base_run_start_there() -> None:
    values = torch.tensor([[1.0, 1.1, 1.2], [1.9, 2.0, 2.0]])
    baseline = {
        "clean": torch.tensor([2.0, 2.1, 2.2]),
        "corrupted": torch.tensor([0.0, 0.1, 0.2]),
        "other": torch.tensor([1.5, 1.6, 1.4]),
    }
    coords = {"layer": (0, 1), "prompt": (0, 1, 2)}
    result = Result(values, ("layer", "prompt"), coords, baseline, "other", "logit_diff", "logits", {})
    figure = bars(result, normalized=True)
    table = figure.table()
    assert (table["low"] <= table["effect"] + 1e-6).all()
    assert (table["effect"] <= table["high"] + 1e-6).all()
    interval, base = result.ci(normalized=True), result.mean().normalized().baseline["other"]
    np.testing.assert_allclose(table["low"], interval.low.values - base, atol=1e-6)
    assert "0 = other run" in figure.layout.xaxis.title.text
