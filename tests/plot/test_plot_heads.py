"""Heads: each point is at its two numbers, matched by label; names overlap nothing."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.pictures.bars import HOSTILE, caption, make, patched
from helpers.pictures.heads import examples, induction
from mechkit.plot._figure import Figure
from mechkit.plot._heads import heads
from mechkit.plot._points import place_labels, thinned
from mechkit.plot._theme import DARK, LIGHT
from mechkit.result import Result

NAN = float("nan")


def names_of(figure: Figure) -> list[Any]:
    return [note for note in figure.layout.annotations if note.name == "label"]


def test_points_are_the_means_and_effects() -> None:
    x, y = induction(), patched()
    figure = heads(x, y)
    table, points = figure.table(), figure.data[0]
    np.testing.assert_array_equal(points.x, x.mean("prompt").values.flatten())
    np.testing.assert_array_equal(points.y, y.mean("prompt").effect().values.flatten())
    np.testing.assert_array_equal(table["x"], points.x)
    np.testing.assert_array_equal(table["y"], points.y)
    assert table["label"][13] == "L1H1"
    assert (table["layer"][13], table["head"][13]) == (1, 1)
    np.testing.assert_allclose(table["x low"], x.ci().low.values.flatten(), rtol=1e-6)
    np.testing.assert_allclose(table["y high"], y.effect().ci().high.values.flatten(), rtol=1e-5)
    assert figure.layout.xaxis.title.text == "induction (attention)"
    assert figure.layout.yaxis.title.text == "change in logit_diff (logits)<br>0 = corrupted run"
    for axis, values in (("xaxis", points.x), ("yaxis", points.y)):
        low, high = figure.layout[axis].range
        assert low < min(values)
        assert max(values) < high


def test_labels_are_matched_not_places() -> None:
    x = make(torch.arange(6.0).reshape(2, 3), "layer head", coords={"layer": (3, 7)})
    y = make(10 * x.values.flip(0).T, "head layer", coords={"layer": (7, 3)})
    table = heads(x, y).table()
    np.testing.assert_array_equal(table["y"], 10 * table["x"])
    assert list(table["label"]) == ["L3H0", "L3H1", "L3H2", "L7H0", "L7H1", "L7H2"]
    wrong = make(10 * x.values.flip(0).T, "head layer", coords={"layer": (3, 7)})  # control
    assert (heads(x, wrong).table()["y"] != 10 * table["x"]).any()


def test_labels_in_the_table_are_those_of_the_result() -> None:
    coords = {"layer": (0, "last"), "head": (3, "a\0")}
    x = Result(torch.arange(4.0).reshape(2, 2), ("layer", "head"), coords, {}, "", "score", "score", {})
    table = heads(x, x).table()
    assert table["layer"].tolist() == [0, 0, "last", "last"]
    assert table["head"].tolist() == [3, "a\0", 3, "a\0"]


def test_cells_that_one_of_the_two_lacks_are_counted() -> None:
    x = make(torch.tensor([[1.0, NAN, 3.0]]), "layer head")
    y = make(torch.tensor([[1.0, 2.0, NAN]]), "layer head")
    figure = heads(x, y)
    assert list(figure.table()["label"]) == ["L0H0"]
    assert "2 cells do not exist in both and are left out" in caption(figure)


def test_colour_is_the_layer_in_steps() -> None:
    for theme in (LIGHT, DARK):
        figure = heads(induction(3, 2), patched(3, 2), theme=theme.name)
        marker = figure.data[0].marker
        assert list(marker.color) == [0, 0, 1, 1, 2, 2]
        assert (marker.cmin, marker.cmax) == (-0.5, 2.5)
        assert len({colour for _, colour in marker.colorscale}) == 3
        assert list(marker.colorbar.ticktext) == ["0", "1", "2"]
        assert marker.colorbar.title.text == "layer"
        assert figure.layout.paper_bgcolor == theme.paper
    deep = heads(induction(48, 2), patched(48, 2)).data[0].marker
    assert len(deep.colorbar.ticktext) == 12
    assert deep.colorscale[-1][0] == 1
    chosen = make(torch.rand(2, 2), "layer head", coords={"layer": (9, 5)})
    assert list(heads(chosen, chosen).data[0].marker.colorbar.ticktext) == ["5", "9"]
    assert list(heads(chosen, chosen).data[0].marker.color) == [1, 1, 0, 0]
    assert heads(make(torch.rand(3), "pos"), make(torch.rand(3), "pos")).data[0].marker.color == LIGHT.positive


def test_hover_shows_both_values() -> None:
    x, y = induction(2, 2), patched(2, 2)
    hover = heads(x, y).data[0].hovertext[3].split("<br>")
    assert hover[0] == "L1H1"
    assert hover[1].startswith(f"induction {float(x.mean().values[1, 1]):.5g} attention (")
    effect = f"{float(y.mean().effect().values[1, 1]):+.5g}".replace("-", "−")
    assert hover[2].startswith(f"logit_diff {effect} logits from the corrupted run (")
    plain = heads(x.mean(), y.mean()).data[0].hovertext[3].split("<br>")
    assert plain[1:] == [part[: part.index(" (")] for part in hover[1:]]


def test_caption_names_what_is_common_and_what_is_not() -> None:
    text = caption(heads(induction(), patched()))
    assert text.startswith(
        "gpt2 · across: random tokens, mean over 4 prompts, head scores · up: ioi, mean over 8 prompts"
    )
    assert "144 points" in text
    assert "95 % bootstrap" in text
    assert "bootstrap" not in caption(heads(induction().mean(), patched().mean()))


def test_the_other_run_is_a_line_where_it_is_near() -> None:
    runs = {"clean": torch.tensor(2.0), "corrupted": torch.tensor(0.0)}
    y = make(torch.tensor([[0.0, 1.9]]), "layer head", baseline=runs, base="corrupted")
    figure = heads(make(torch.rand(1, 2), "layer head"), y)
    assert [shape.y0 for shape in figure.layout.shapes] == [2]
    far = make(torch.tensor([[0.0, 0.1]]), "layer head", baseline=runs, base="corrupted")
    assert len(heads(make(torch.rand(1, 2), "layer head"), far).layout.shapes) == 0


# Names


def test_the_farthest_are_named() -> None:
    values = torch.zeros(4, 5)
    values[1, 2], values[3, 3] = 5.0, -4.0
    x, y = make(values, "layer head"), make(values.flip(1), "layer head")
    figure = heads(x, y, label=4)
    assert {note.text for note in names_of(figure)} == {"L1H2", "L3H3", "L3H1"}
    assert names_of(heads(x, y, label=0)) == []
    for note in names_of(figure):
        i = list(figure.table()["label"]).index(note.text)
        assert (note.x, note.y) == (figure.table()["x"][i], figure.table()["y"][i])


def boxes_of(points: np.ndarray, wanted: list[int], widths: list[float], places: list[Any]) -> list[np.ndarray]:
    """Left, bottom, right and top of each name, from where its nearest edges are."""
    made = []
    for i, width, place in zip(wanted, widths, places, strict=True):
        if place is not None:
            right, up, _ = place
            x, y = points[i] + (right, up)
            x -= width * (right < 0) + width / 2 * (right == 0)
            y -= 14 * (up < 0) + 7 * (up == 0)
            made.append(np.array([x, y, x + width, y + 14]))
    return made


@given(
    points=st.lists(st.tuples(st.floats(0, 460), st.floats(0, 460)), min_size=1, max_size=40),
    width=st.floats(8, 200),
)
@settings(deadline=None, max_examples=60)
def test_names_never_overlap_and_stay_inside(points: list[tuple[float, float]], width: float) -> None:
    at, n = np.array(points), min(15, len(points))
    places = place_labels(at, np.arange(len(at)), list(range(n)), [width] * n, (460, 460))
    assert places[0] is not None  # the first has the choice
    boxes = boxes_of(at, list(range(n)), [width] * n, places)
    for i, a in enumerate(boxes):
        assert (a[:2] >= -1e-6).all()
        assert (a[2:] <= 460 + 1e-6).all()
        for b in boxes[:i]:
            assert a[2] <= b[0] + 1e-6 or b[2] <= a[0] + 1e-6 or a[3] <= b[1] + 1e-6 or b[3] <= a[1] + 1e-6


def test_names_hide_no_point_where_there_is_room() -> None:
    at = np.array([[100.0, 100.0], [120.0, 100.0], [100.0, 118.0]])
    place = place_labels(at, np.arange(3), [0], [33.0], (460, 460))[0]
    assert place is not None
    box = boxes_of(at, [0], [33.0], [place])[0]
    assert not any(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in at)
    free = place_labels(at[:1], np.arange(1), [0], [33.0], (460, 460))[0]  # control: alone it would be to the right
    assert free is not None
    assert free[0] > 0
    assert free[1] == 0


def test_many_points_are_thinned_and_the_caption_says_so() -> None:
    x = make(torch.randn(50, 200), "layer neuron")
    figure = heads(x, x)
    assert len(figure.data[0].x) == 4000
    assert len(figure.table()["x"]) == 10_000
    assert set(np.argsort(-np.abs(figure.table()["x"]))[:50]) <= set(thinned(np.abs(figure.table()["x"]), 4000))
    assert "4,000 of them drawn" in caption(figure)
    np.testing.assert_array_equal(thinned(np.arange(5.0), 5), np.arange(5))
    assert len(set(thinned(np.random.default_rng(0).random(999), 100))) == 100


# Text and refusals


def test_hostile_labels_are_literal() -> None:
    figure = examples()["hostile"]
    shown = [*figure.data[0].hovertext, *(note.text for note in figure.layout.annotations), figure.layout.title.text]
    shown += [figure.layout.xaxis.title.text, figure.layout.yaxis.title.text]
    for text in shown:
        assert not set("<>$\n\t") & set(text.replace("<br>", ""))
    assert html.unescape(figure.data[0].hovertext[0].split("<br>")[0]) == HOSTILE[0]
    assert len(names_of(figure)) > 3
    assert figure.data[0].hovertemplate is None


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (
            induction(2, 2),
            make(torch.rand(2), "layer"),
            {},
            r"y: expected the dims of x, \('layer', 'head'\), got \('layer',\)",
        ),
        (induction(2, 2), induction(2, 3), {}, "the same head labels as x, but one of the two lacks 2"),
        (induction(3, 2), induction(2, 2), {}, "the same layer labels as x, but one of the two lacks 2; sel"),
        (
            make(torch.tensor([1.0, NAN]), "layer"),
            make(torch.tensor([NAN, 1.0]), "layer"),
            {},
            "in both results, got none",
        ),
        (make(torch.tensor([NAN]), "layer"), make(torch.tensor([1.0]), "layer"), {}, "a cell that exists, got none"),
        (make(torch.tensor([torch.inf]), "layer"), make(torch.tensor([1.0]), "layer"), {}, "infinite"),
        (induction(2, 2), induction(2, 2), {"label": -1}, "label: expected a whole number of at least 0, got -1"),
        (induction(2, 2), induction(2, 2), {"level": 0}, "level: expected a number between 0 and 1"),
        (induction(2, 2), induction(2, 2), {"theme": "x"}, "theme: expected one of"),
    ],
)
def test_refuses(x: Result, y: Result, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        heads(x, y, **options)


def test_examples_keep_their_numbers(tmp_path: Any) -> None:
    from mechkit.plot import read_table

    for name, figure in examples().items():
        table = read_table(figure.save(tmp_path / f"{name}.json"))
        for column, values in figure.table().items():
            np.testing.assert_array_equal(table[column], values)
        assert figure.facts.kind == "heads"
