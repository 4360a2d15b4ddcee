"""Approximate against exact: the points are a Comparison's cells, both axes are one scale, the caption has its numbers."""

from __future__ import annotations

import copy
import html
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import mechkit as mk
from helpers.pictures.bars import HOSTILE, caption
from helpers.pictures.compare import edges, examples, pair
from mechkit.circuits import EdgeScores, Graph
from mechkit.plot._compare import compare
from mechkit.plot._figure import Figure
from mechkit.result import Result

NAN = float("nan")


def names_of(figure: Figure) -> list[str]:
    return [note.text for note in figure.layout.annotations if note.name == "label"]


# The cells of a Comparison


def test_comparison_has_its_numbers() -> None:
    approx, exact = pair(2, 3)
    shuffled = replace(
        exact.sel(layer=[1, 0]),
        values=exact.sel(layer=[1, 0]).values.transpose(0, 1),
        dims=("head", "layer", "prompt"),
    )
    found = mk.compare(approx, shuffled)
    assert found.approx.dims == found.exact.dims == ("layer", "head")
    assert found.approx.coords == found.exact.coords
    assert torch.equal(found.approx.values, approx.mean("prompt").effect().values)
    assert torch.equal(found.exact.values, exact.mean("prompt").effect().values)
    assert found.exact.provenance["technique"] == "activation patching"
    assert found.approx.provenance["technique"] == "attribution patching"
    assert float(found.approx.baseline["corrupted"]) == 0
    assert torch.equal(found.exact.effect().values, found.exact.values)
    assert (found.approx.unit, found.exact.metric) == ("logits", "logit_diff")
    assert found.max_error == float((found.approx.values - found.exact.values).abs().max())
    assert len(repr(found)) < 700
    assert "Result(" not in repr(found)
    assert found == mk.compare(approx, shuffled)  # by its numbers
    assert copy.deepcopy(found).pearson == pickle.loads(pickle.dumps(found)).pearson == found.pearson


def test_cells_that_were_not_compared_are_nan() -> None:
    approx, exact = pair(1, 3)
    lacking = replace(exact, values=exact.values.masked_fill(torch.tensor([False, True, False])[:, None], NAN))
    found = mk.compare(approx, lacking)
    assert found.n_cells == 2
    assert found.approx.values.isnan().tolist() == found.exact.values.isnan().tolist() == [[False, True, False]]
    assert list(compare(found).table()["label"]) == ["L0H0", "L0H2"]


def test_magnitudes_are_mean_sizes() -> None:
    approx, exact = pair(2, 2)
    sizes = replace(
        approx,
        values=-2 + (approx.values + 2).abs(),
        provenance={**approx.provenance, "sign": "magnitude"},
    )
    found = mk.compare(sizes, exact)
    np.testing.assert_allclose(found.exact.values, (exact.values + 2).abs().mean(-1))
    figure = compare(found)
    assert (figure.table()["exact"] >= 0).all()
    assert "sizes only" in caption(figure)
    assert "sign right" not in caption(figure)
    assert figure.layout.xaxis.title.text == "approximate size of the effect on logit_diff (logits)"


# The figure


def test_points_are_the_cells_and_the_axes_are_equal() -> None:
    approx, exact = pair()
    found = mk.compare(approx, exact)
    for figure in (compare(found), compare(approx, exact), compare(found, theme="dark")):
        points, table = figure.data[-1], figure.table()
        np.testing.assert_array_equal(points.x, found.approx.values.flatten())
        np.testing.assert_array_equal(points.y, found.exact.values.flatten())
        np.testing.assert_array_equal(table["approx"], points.x)
        np.testing.assert_array_equal(table["exact"], points.y)
        assert table["label"][13] == "L1H1"
        assert figure.layout.xaxis.range == figure.layout.yaxis.range
        assert figure.layout.yaxis.scaleanchor == "x"
        low, high = figure.layout.xaxis.range
        assert low < min(0, *points.x, *points.y)
        assert high > max(0, *points.x, *points.y)
        margin = figure.layout.margin
        inner = (figure.layout.width - margin.l - margin.r, figure.layout.height - margin.t - margin.b)
        assert inner == (460, 460)


def test_lines_are_the_identity_and_the_fitted_slope() -> None:
    found = mk.compare(*pair())
    identity, fitted = compare(found).data[:2]
    np.testing.assert_array_equal(identity.x, identity.y)
    assert identity.line.dash == "solid"
    np.testing.assert_allclose(fitted.y, found.slope * np.array(fitted.x))
    assert fitted.line.dash == "dot"
    assert f"exact = {found.slope:.3g} × approximate" in fitted.name
    approx, exact = pair(1, 2)
    nothing = compare(replace(approx, values=torch.full_like(approx.values, -2)), exact)
    assert len(nothing.data) == 2  # no slope to draw
    assert "Pearson undefined" in caption(nothing)


def test_caption_has_the_agreement() -> None:
    found = mk.compare(*pair())
    text = caption(compare(found))
    for part in (
        "gpt2 · ioi · mean over 6 prompts · attribution patching",
        "activation patching",
        "144 cells",
        f"Pearson {found.pearson:.3f}",
        f"Spearman {found.spearman:.3f}",
        f"sign right in {100 * found.sign_agreement:.0f} %",
        f"largest error {found.max_error:.3g} logits ({found.worst[0].label})",
    ):
        assert part in text


def test_the_worst_cells_are_named() -> None:
    found = mk.compare(*pair())
    names = names_of(compare(found))
    assert len(names) >= 8
    assert set(names) <= {cell.label for cell in found.worst}
    assert found.worst[0].label in names
    _, exact = pair()
    assert names_of(compare(exact, exact)) == []


def test_hover_shows_both_values() -> None:
    found = mk.compare(*pair(2, 2))
    x, y = float(found.approx.values[1, 0]), float(found.exact.values[1, 0])
    assert compare(found).data[-1].hovertext[2].replace("−", "-").split("<br>") == [
        "L1H0",
        f"approximate {x:+.5g} logits",
        f"exact {y:+.5g} logits",
        f"error {x - y:+.4g} logits",
    ]


def test_edges_that_both_have() -> None:
    approx, exact = edges(1, "edge attribution"), edges(2, "edge patching", skip=0.5)
    figure = compare(approx, exact)
    table = figure.table()
    assert list(table["label"]) == [edge.name for edge in exact.edges]
    for i in (0, 5, len(exact.edges) - 1):
        assert table["approx"][i] == approx.score(table["label"][i])
        assert table["exact"][i] == exact.score(table["label"][i])
    text = caption(figure)
    assert f"{len(exact.edges)} edges" in text
    assert f"Pearson {approx.correlation(exact):.3f}" in text
    assert f"Spearman {approx.correlation(exact, method='spearman'):.3f}" in text
    strong = np.abs(table["exact"]) >= 0.01 * np.abs(table["exact"]).max()
    right = (np.sign(table["approx"]) == np.sign(table["exact"]))[strong].mean()
    assert f"sign right in {100 * right:.0f} %" in text
    assert figure.facts.title == "Edge attribution against edge patching"


def test_many_edges_are_thinned_and_the_caption_says_so() -> None:
    graph = Graph(12, 8, 8)
    values = torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~graph.exists, NAN)
    made = EdgeScores.of(
        graph, values, baseline={"clean": torch.ones(1)}, metric="m", unit="u", provenance={}, prompts=False
    )
    figure = compare(made, made)
    assert len(figure.table()["label"]) == graph.n_edges > 4000
    assert len(figure.data[-1].x) == 4000
    assert "4,000 points are drawn" in caption(figure)


def test_hostile_labels_are_literal() -> None:
    figure = examples()["hostile"]
    shown = [*figure.data[-1].hovertext, *(note.text for note in figure.layout.annotations), figure.layout.title.text]
    shown += [figure.layout.xaxis.title.text]
    for text in shown:
        assert not set("<>$\n\t") & set(text.replace("<br>", ""))
    assert html.unescape(figure.data[-1].hovertext[0].split("<br>")[0]) == HOSTILE[0]
    assert names_of(figure)
    assert figure.data[-1].hovertemplate is None


def test_refuses() -> None:
    approx, exact = pair(2, 2)
    found = mk.compare(approx, exact)
    for given, message in (
        ((found, exact), "exact: expected nothing besides a Comparison"),
        ((approx,), "expected a Comparison alone, two Results or two EdgeScores; got Result and NoneType"),
        ((approx, edges(1, "x")), "got Result and EdgeScores"),
        ((approx, pair(2, 3)[0].sel(head=[1, 2])), "lacks"),
        ((edges(1, "x"), edges(1, "x", metric="kl")), "expected the approximation's metric, 'logit_diff'; got 'kl'"),
        (
            (edges(1, "x"), edges(1, "x", provenance={"tokens_hash": "1"})),
            "expected scores with the approximation's tokens_hash",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            compare(*given)
    with pytest.raises(ValueError, match="theme: expected one of"):
        compare(found, theme="x")


def test_examples_keep_their_numbers(tmp_path: Any) -> None:
    from mechkit.plot import read_table

    for name, figure in examples().items():
        table = read_table(figure.save(tmp_path / f"{name}.json"))
        for column, values in figure.table().items():
            np.testing.assert_array_equal(table[column], values)
        assert figure.facts.kind == "compare"


def test_means_over_other_prompts_or_units_are_refused() -> None:
    def made(values: torch.Tensor, unit: str = "logits", n: int = 2) -> Result:
        coords, baseline = {"layer": (0, 1)}, {"clean": torch.tensor(0.0)}
        return Result(values, ("layer",), coords, baseline, "clean", "logit_diff", unit, {"n_prompts": n})

    one = made(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="expected a mean over the same 2 prompts, got one over 3"):
        compare(one, made(torch.tensor([1.0, 2.0]), n=3))
    with pytest.raises(ValueError, match="expected unit 'logits', got 'nats'"):
        compare(one, made(torch.tensor([1.0, 2.0]), unit="nats"))
    with pytest.raises(ValueError, match="expected a cell that exists in both"):
        compare(made(torch.tensor([1.0, float("nan")])), made(torch.tensor([float("nan"), 2.0])))


def test_the_worst_are_drawn_among_many() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = 10 + torch.randn(6000, generator=generator).abs()
    approx = exact + 0.001 * torch.randn(6000, generator=generator)
    base = {"clean": torch.tensor(0.0)}
    coords = {"neuron": tuple(range(6000))}
    pair = (Result(x, ("neuron",), coords, base, "clean", "logit_diff", "logits", {}) for x in (approx, exact))
    figure = compare(*pair)
    points = next(trace for trace in figure.data if trace.mode == "markers")
    drawn = {text.split("<br>")[0] for text in points.hovertext}
    worst = (approx - exact).abs().argsort(descending=True)[:5]
    assert {f"N{i}" for i in worst.tolist()} <= drawn
