"""Hidden states in two dimensions: principal axes against a naive reference, and arbitrary choices are fixed or reported."""

from __future__ import annotations

import html
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.pictures.bars import HOSTILE, caption
from helpers.pictures.hidden import KINDS, examples, make, states
from mechkit.plot._figure import Figure
from mechkit.plot._hidden import hidden
from mechkit.plot._theme import DARK, LIGHT

NAN = float("nan")


def panels(figure: Figure) -> list[Any]:
    """Traces with points, without the legend's."""
    return [trace for trace in figure.data if trace.x[0] is not None]


def titles(figure: Figure) -> list[str]:
    return [note.text for note in figure.layout.annotations if note.name != "caption"]


def naive_pca(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[prompt 2]` and the shares of variance, by the covariance's eigenvectors."""
    centred = points - points.mean(0)
    variances, axes = np.linalg.eigh(np.cov(centred.T))
    order = np.argsort(-variances)[:2]
    chosen = axes[:, order]
    chosen = chosen * np.sign(chosen[np.abs(chosen).argmax(0), [0, 1]])
    return centred @ chosen, variances[order] / variances.sum()


# Numbers


def test_pca_is_that_of_the_covariance() -> None:
    result = states()
    figure = hidden(result)
    table = figure.table()
    for layer in range(3):
        points, shares = naive_pca(result.values[layer].T.double().numpy())
        here = table["layer"] == layer
        np.testing.assert_allclose(np.stack([table["x"][here], table["y"][here]], 1), points, atol=1e-9)
        np.testing.assert_array_equal(figure.data[layer].x, table["x"][here])
        np.testing.assert_array_equal(figure.data[layer].y, table["y"][here])
        assert titles(figure)[layer] == f"layer {layer}: {100 * shares[0]:.0f} % + {100 * shares[1]:.0f} %"


def test_pca_of_data_with_a_known_answer() -> None:
    """Points on a plane of a four-dimensional space: three along one axis, and a pair across it."""
    along, across = torch.tensor([0.6, 0.0, -0.8, 0.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    places = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    values = (
        torch.tensor([5.0, 6.0, 7.0, 8.0])[:, None] + along[:, None] * places[:, 0] + across[:, None] * places[:, 1]
    )
    figure = hidden(make(values[None].double()))
    np.testing.assert_allclose(figure.data[0].x, -places[:, 0], atol=1e-6)  # the largest entry, -0.8, is made positive
    np.testing.assert_allclose(figure.data[0].y, places[:, 1], atol=1e-6)
    assert titles(figure) == ["layer 0: 90 % + 10 %"]


@given(seed=st.integers(0, 10_000), flip=st.booleans())
@settings(deadline=None, max_examples=15)
def test_order_of_prompts_and_sign_of_states(seed: int, flip: bool) -> None:
    """Principal axes do not depend on the order of the prompts; mirrored states give mirrored points."""
    result = states(1, seed=seed)
    order = np.random.default_rng(seed).permutation(40)
    a = hidden(result).data[0]
    b = hidden(make((-1 if flip else 1) * result.values[:, :, order])).data[0]
    for one, two in ((a.x, b.x), (a.y, b.y)):
        np.testing.assert_allclose(two, (-1 if flip else 1) * np.array(one)[order], atol=1e-8)


def test_random_projection_is_seeded_and_the_same_for_all_layers() -> None:
    result = states()
    figure = hidden(result, method="random", seed=3)
    directions = np.random.default_rng(3).standard_normal((16, 2)) / np.sqrt(2)
    for layer, trace in enumerate(figure.data):
        points = result.values[layer].T.double().numpy()
        expected = (points - points.mean(0)) @ directions
        np.testing.assert_allclose(np.stack([trace.x, trace.y], 1), expected, atol=1e-12)
    assert titles(figure) == ["layer 0", "layer 1", "layer 2"]
    assert "random Gaussian directions (seed 3)" in caption(figure)
    assert "arbitrary" not in caption(figure)
    assert list(hidden(result, method="random", seed=4).data[0].x) != list(figure.data[0].x)
    drawn = [hidden(states(1, width=64, n=60), method="random", seed=seed).table() for seed in range(40)]
    size = float(((v := states(1, width=64, n=60).values[0].T) - v.mean(0)).pow(2).sum(1).mean())
    assert np.mean([(t["x"] ** 2 + t["y"] ** 2).mean() for t in drawn]) == pytest.approx(size, rel=0.15)


def test_equal_states_are_one_point_not_a_cloud_of_rounding() -> None:
    values = states().values.clone()
    values[0] = torch.linspace(1, 2, 16)[:, None]
    values[1] = values[0] * (1 + 1e-7 * torch.randn(16, 40))
    figure = hidden(make(values))
    assert titles(figure)[:2] == ["layer 0: all the same", "layer 1: all the same"]
    assert set(figure.data[1].x) == {0}
    assert "all prompts have the same state but for rounding" in caption(figure)
    values[1] = values[0] * (1 + 1e-3 * torch.randn(16, 40))  # control: small, but not rounding
    assert "%" in titles(hidden(make(values)))[1]


def test_few_dimensions() -> None:
    figure = hidden(make(torch.tensor([[[1.0, 2.0, 6.0]]])))
    np.testing.assert_allclose(figure.data[0].x, [-2, -1, 3])
    np.testing.assert_array_equal(figure.data[0].y, [0, 0, 0])
    assert titles(figure) == ["layer 0: 100 % + 0 %"]


def test_dims_in_any_order() -> None:
    result = states()
    turned = replace(result, values=result.values.permute(2, 0, 1), dims=("prompt", "layer", "d_model"))
    np.testing.assert_array_equal(hidden(turned).table()["x"], hidden(result).table()["x"])
    alone = hidden(result.sel(layer=2))
    np.testing.assert_array_equal(alone.data[0].x, hidden(result).data[2].x)
    assert "layer" not in alone.table()


# Panels


def test_twelve_layers_by_default_and_the_caption_says_so() -> None:
    figure = hidden(states(30, 4, 5))
    assert len(figure.data) == 12
    shown = sorted(set(figure.table()["layer"]))
    assert (shown[0], shown[-1], len(shown)) == (0, 29, 12)
    assert set(np.diff(shown)) <= {2, 3}
    assert "12 of 30 layers shown" in caption(figure)
    assert "signs and rotations between panels are arbitrary" in caption(figure)
    chosen = hidden(states(30, 4, 5), layers=[7, 3])
    assert [title.split(":")[0] for title in titles(chosen)] == ["layer 7", "layer 3"]
    assert "shown" not in caption(hidden(states(12, 4, 5)))


def test_layer_0_is_first_and_scales_are_equal() -> None:
    figure = hidden(states(5))
    domains = [figure.layout[f"{axis}axis{i or ''}"].domain for axis in "xy" for i in (0, 2, 5)]
    assert domains[0][0] < domains[1][0]  # the second panel is to the right
    assert domains[3][0] > domains[5][0]  # the last one below
    for i in range(5):
        x, y = (figure.layout[f"{axis}axis{i + 1 if i else ''}"].range for axis in "xy")
        assert x[1] - x[0] == pytest.approx(y[1] - y[0])
        assert x[0] < min(figure.data[i].x)
        assert max(figure.data[i].y) < y[1]
    margin = figure.layout.margin
    width, height = figure.layout.width - margin.l - margin.r, figure.layout.height - margin.t - margin.b
    x, y = figure.layout.xaxis.domain, figure.layout.yaxis.domain
    assert (x[1] - x[0]) * width == pytest.approx((y[1] - y[0]) * height, rel=1e-3)


# Labels


def test_strings_are_colours_with_a_legend() -> None:
    for theme in (LIGHT, DARK):
        figure = hidden(states(), labels=KINDS * 20, theme=theme.name)
        points = panels(figure)
        assert len(points) == 6
        assert [trace.marker.color for trace in points[:2]] == list(theme.series[:2])
        legend = [trace for trace in figure.data if trace.x[0] is None]
        assert [trace.name for trace in legend] == KINDS
        assert [trace.legendgroup for trace in points[:2]] == [trace.legendgroup for trace in legend]
        assert legend[0].legendgroup != legend[1].legendgroup
        whole = hidden(states()).table()
        np.testing.assert_array_equal(points[1].x, whole["x"][1:40:2])
        assert list(figure.table()["label"][:3]) == ["ABBA", "BABA", "ABBA"]
        assert figure.layout.paper_bgcolor == theme.paper


def test_many_strings_have_colours_and_marks() -> None:
    labels = [f"name {i % 20}" for i in range(40)]
    points = panels(hidden(states(1), labels=labels))
    assert len({(trace.marker.color, trace.marker.symbol) for trace in points}) == 20
    with pytest.raises(ValueError, match="labels: expected at most 28 different strings, got 50; merge some"):
        hidden(states(1, n=50), labels=[str(i) for i in range(50)])
    with pytest.raises(ValueError, match="at most 7 different strings, got 20"):
        hidden(states(1), labels=labels, symbols=KINDS * 20)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_numbers_are_a_colour_bar(kind: Any) -> None:
    figure = hidden(states(), labels=kind([float(i) for i in range(40)]))
    points = panels(figure)
    assert len(points) == len(figure.data) == 3
    np.testing.assert_array_equal(points[0].marker.color, np.arange(40))
    assert points[0].marker.coloraxis == "coloraxis"
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 39)
    assert figure.layout.coloraxis.colorbar.title.text == "label"
    np.testing.assert_array_equal(figure.table()["label"][:40], np.arange(40))
    same = hidden(states(), labels=[2] * 40).layout.coloraxis
    assert same.cmin < same.cmax


def test_symbols() -> None:
    figure = hidden(states(1), labels=list(range(40)), symbols=KINDS * 20)
    points = panels(figure)
    assert [trace.marker.symbol for trace in points] == ["circle", "square"]
    np.testing.assert_array_equal(points[1].marker.color, np.arange(1, 40, 2))
    assert list(figure.table()["symbol"][:2]) == KINDS
    both = panels(hidden(states(1), labels=(["x"] * 20 + ["y"] * 20), symbols=KINDS * 20))
    assert len({(trace.marker.symbol, trace.marker.color) for trace in both}) == 4
    assert sum(len(trace.x) for trace in both) == 40
    truth = panels(hidden(states(1), labels=[True, False] * 20))
    assert [trace.name for trace in truth] == ["True", "False"]


def test_hover_shows_prompt_and_label() -> None:
    figure = hidden(states(), labels=KINDS * 20, symbols=["<s>"] * 40)
    trace = panels(figure)[1]
    assert trace.hovertext[0].split("<br>")[:4] == ["prompt 1", "label BABA", "symbol &#60;s&#62;", "layer 0"]
    at = f"at {trace.x[0]:.5g}, {trace.y[0]:.5g}".replace("-", "−")
    assert trace.hovertext[0].split("<br>")[4] == at
    number = panels(hidden(states(), labels=np.arange(40) / 7))[0]
    assert "label 0.14286" in number.hovertext[1]


def test_many_prompts_are_thinned_and_the_caption_says_so() -> None:
    result = states(12, 3, 1500)
    figure = hidden(result, labels=KINDS * 750)
    assert sum(len(trace.x) for trace in panels(figure)) == 12_000
    assert len(figure.table()["x"]) == 18_000
    assert "1,000 of 1,500 prompts drawn, evenly spaced" in caption(figure)
    trace = panels(figure)[0]
    prompt = int(trace.hovertext[-1].split("<br>")[0].removeprefix("prompt "))
    assert trace.x[-1] == figure.table()["x"][prompt]


def test_hostile_labels_are_literal() -> None:
    figure = examples()["hostile"]
    shown = [text for trace in panels(figure) for text in trace.hovertext]
    shown += [trace.name for trace in figure.data] + [note.text for note in figure.layout.annotations]
    shown += [figure.layout.title.text]
    for text in shown:
        assert not set("<>$\n\t") & set(text.replace("<br>", ""))
    names = [html.unescape(trace.name) for trace in figure.data if trace.x[0] is None]
    assert len(names) == len(HOSTILE)
    assert names[8:10] == ['" the" 1', '" the" 2']
    assert all(trace.hovertemplate is None for trace in figure.data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tsne"}, "method: expected 'pca' or 'random', got 'tsne'"),
        ({"layers": [9]}, r"layers: expected some of \[0, 1, 2\], got 9"),
        ({"layers": []}, "layers: expected at least one"),
        ({"labels": ["a"]}, "labels: expected one for each of 40 prompts, got 1"),
        ({"labels": "ABBA"}, "labels: expected"),
        ({"labels": ["a", 1] * 20}, r"labels\[1\]: expected a string"),
        ({"labels": [NAN] * 40}, "labels: expected finite numbers"),
        ({"symbols": [1] * 40}, r"symbols\[0\]: expected a string"),
        ({"symbols": [str(i) for i in range(40)]}, "symbols: expected at most 4 different strings, got 40"),
        ({"theme": "x"}, "theme: expected one of"),
    ],
)
def test_refuses_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hidden(states(), **options)


def test_refuses_states() -> None:
    values = states().values
    for result, message in (
        (make(values[..., :2]), "at least 3 prompts"),
        (make(values[:0]), "at least 3 prompts"),
        (states().mean("prompt"), "expected dims"),
        (states().mean("d_model"), "expected dims"),
        (make(values.masked_fill(values > 1, NAN)), "finite state of every prompt"),
        (make(values.masked_fill(values > 1, torch.inf)), "finite state of every prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            hidden(result)


def test_examples_keep_their_numbers(tmp_path: Any) -> None:
    from mechkit.plot import read_table

    for name, figure in examples().items():
        table = read_table(figure.save(tmp_path / f"{name}.json"))
        for column, values in figure.table().items():
            np.testing.assert_array_equal(table[column], values)
        assert figure.facts.kind == "hidden"


def test_caption_counts_the_points_and_claims_no_mean() -> None:
    found = caption(hidden(states()))
    assert "40 prompts" in found
    assert "mean over" not in found


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"layers": 3}, "layers: expected"), ({"labels": 5}, "labels: expected a list")],
)
def test_refuses_one_where_several_are_asked_for(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hidden(states(), **bad)
    assert hidden(states(), labels=[np.int64(i) for i in range(40)]).layout.coloraxis.cmax == 39
