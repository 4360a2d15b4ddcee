"""Areas under curves: MIB's grid, ROC against pair counting, ties, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mechkit.circuits.areas import FRACTIONS, RocCurve, cmd, cpr, roc
from mechkit.circuits.circuit import Circuit
from mechkit.circuits.edge_scores import EdgeScores
from mechkit.circuits.graph import Graph

SMALL = Graph(2, 2, 2)
NAN = float("nan")


def scored(values: torch.Tensor, graph: Graph = SMALL) -> EdgeScores:
    return EdgeScores.of(graph, values, baseline={}, metric="m", unit="u", provenance={}, prompts=values.ndim == 3)


def draw(seed: int, step: float = 0.0, graph: Graph = SMALL) -> torch.Tensor:
    values = torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values / step).round() * step if step else values


# --- faithfulness areas


def test_known_areas() -> None:
    assert FRACTIONS == (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    assert cpr(FRACTIONS, [1.0] * 10) == pytest.approx(0.999, abs=1e-15)
    assert cmd(FRACTIONS, [1.0] * 10) == 0
    assert cpr(FRACTIONS, FRACTIONS) == pytest.approx(0.4999995, abs=1e-15)
    assert cmd(FRACTIONS, FRACTIONS) == pytest.approx(0.4990005, abs=1e-15)
    assert cpr(FRACTIONS, [0.0] * 10) == 0
    assert cmd(FRACTIONS, [0.0] * 10) == pytest.approx(0.999, abs=1e-15)


def test_areas_equal_mibs_sum() -> None:
    f = np.random.default_rng(0).normal(0.8, 0.6, 10)  # on both sides of 1
    under = distance = 0.0
    for i in range(9):
        width = FRACTIONS[i + 1] - FRACTIONS[i]
        distance += width * ((abs(1.0 - f[i]) + abs(1.0 - f[i + 1])) / 2)
        under += width * ((f[i] + f[i + 1]) / 2)
    assert cpr(FRACTIONS, f.tolist()) == pytest.approx(under, rel=1e-14)
    assert cmd(FRACTIONS, torch.tensor(f)) == pytest.approx(distance, rel=1e-14)
    assert cmd(FRACTIONS, f.tolist()) != pytest.approx(0.999 - under)  # it is no mere complement
    assert cmd((0.5, 1.0), (0.0, 2.0)) == 0.5  # the curve crosses 1 half-way; the distance does not go down to 0 there


@pytest.mark.parametrize("area", [cpr, cmd])
@pytest.mark.parametrize(
    ("fractions", "faithfulness", "message"),
    [
        (FRACTIONS, [1.0] * 9, r"equal length, at least 2, got \(10,\) and \(9,\)"),
        ([1.0], [1.0], "at least 2"),
        ([[0.1, 1.0]], [[1.0, 1.0]], "fractions\\[0\\]: expected a number|two lists"),
        ([0.1, 0.1], [1.0, 1.0], "fractions: expected ascending"),
        ([1.0, 0.5], [1.0, 1.0], "fractions: expected ascending"),
        ([0.0, 0.5], [1.0, 1.0], "above 0"),
        ([10.0, 100.0], [1.0, 1.0], "at most 1"),
        ([NAN, 1.0], [1.0, 1.0], "fractions: expected ascending"),
        ([0.5, 1.0], [NAN, 1.0], "faithfulness: expected finite"),
    ],
)
def test_areas_refuse(area, fractions, faithfulness, message) -> None:
    with pytest.raises(ValueError, match=message):
        area(fractions, faithfulness)


# --- ROC


def naive_auroc(keys: torch.Tensor, positive: torch.Tensor) -> float:
    """Count the pairs."""
    wins = [
        1.0 if inside > outside else 0.5 if inside == outside else 0.0
        for inside, outside in itertools.product(keys[positive].tolist(), keys[~positive].tolist())
    ]
    return sum(wins) / len(wins)


@pytest.mark.parametrize("by", ["abs", "value"])
@pytest.mark.parametrize("step", [0.0, 0.5, 2.0])
def test_auroc_by_edge_counts_pairs(step: float, by: str) -> None:
    from scipy.stats import mannwhitneyu

    for seed in range(5):
        values, circuit = draw(seed, step), Circuit.random(SMALL, 12, seed)
        keys = (values.abs() if by == "abs" else values)[SMALL.exists]
        inside = circuit.members[SMALL.exists]
        curve = roc(scored(values), circuit, by=by)
        assert curve.auroc == pytest.approx(naive_auroc(keys, inside), abs=1e-12)
        u = mannwhitneyu(keys[inside], keys[~inside]).statistic / (12 * (SMALL.n_edges - 12))
        assert curve.auroc == pytest.approx(u, abs=1e-12)
        assert (curve.n_positive, curve.n_negative) == (12, SMALL.n_edges - 12)
        assert roc(values, circuit, by=by).auroc == curve.auroc


def test_auroc_by_node_counts_pairs() -> None:
    for graph in (SMALL, Graph(3, 4, 2), Graph(2, 3, 3, mlps=False)):
        for seed in range(5):
            values, circuit = draw(seed, 0.5, graph), Circuit.random(graph, 6, seed)
            best, inside = [], []
            for writer in graph.writers[1:]:
                written = [e for e in graph.edges if e.writer == writer]
                best.append(max(abs(values[graph.index(edge)].item()) for edge in written))
                inside.append(any(edge in circuit for edge in written))
            curve = roc(scored(values, graph), circuit, over="node")
            assert curve.auroc == pytest.approx(naive_auroc(torch.tensor(best), torch.tensor(inside)), abs=1e-12)
            assert curve.n_positive == sum(inside) == len(circuit.nodes) - ("input" in {w.name for w in circuit.nodes})
            assert curve.over == "node"


def test_points_of_the_curve() -> None:
    values, circuit = draw(0, 0.5), Circuit.random(SMALL, 12, 0)
    keys, inside = values.abs()[SMALL.exists], circuit.members[SMALL.exists]
    curve = roc(values, circuit)
    assert (curve.fpr[0], curve.tpr[0], curve.thresholds[0]) == (0, 0, torch.inf)
    assert (curve.fpr[-1], curve.tpr[-1]) == (1, 1)
    assert curve.thresholds[1:].tolist() == sorted(set(keys.tolist()), reverse=True)
    for threshold, fpr, tpr in zip(curve.thresholds, curve.fpr, curve.tpr, strict=True):
        assert tpr == (keys[inside] >= threshold).double().mean()
        assert fpr == (keys[~inside] >= threshold).double().mean()


def test_perfect_worst_and_constant_scores() -> None:
    circuit = Circuit.random(SMALL, 10, 0)
    perfect = circuit.members.double() * -3 + 1  # the sign does not matter: -2 inside, 1 outside
    assert roc(perfect, circuit).auroc == 1
    assert roc(perfect, circuit, by="value").auroc == 0
    assert roc(perfect, circuit, over="node").auroc == 1
    assert roc(torch.ones_like(perfect), circuit).auroc == pytest.approx(0.5)
    assert roc(perfect, circuit).precision_at() == 1
    assert roc(-perfect, circuit, by="value").precision_at(20) == 0.5
    assert roc(torch.ones_like(perfect), circuit).precision_at(3) == pytest.approx(10 / SMALL.n_edges)
    assert "AUROC 1; 10 of 46 edges are in the circuit, precision at 10: 1" in repr(roc(perfect, circuit))


def test_precision_is_that_of_random_orders_of_ties() -> None:
    values, circuit = draw(3, 1.0), Circuit.random(SMALL, 12, 1)
    keys, inside = values.abs()[SMALL.exists], circuit.members[SMALL.exists]
    curve, rng = roc(values, circuit), np.random.default_rng(0)
    for k in (1, 5, 12, 30, 46):
        found = []
        for _ in range(4000):
            shuffled = rng.permutation(len(keys))
            best = shuffled[np.argsort(-keys.numpy()[shuffled], kind="stable")[:k]]
            found.append(inside.numpy()[best].mean())
        assert curve.precision_at(k) == pytest.approx(np.mean(found), abs=0.03)
    assert curve.precision_at(46) == pytest.approx(12 / 46)
    for k in (0, 47, True):
        with pytest.raises(ValueError, match=r"k: expected (1 to 46|a whole number)"):
            curve.precision_at(k)


def test_prompts_are_averaged_first() -> None:
    values = torch.stack([draw(0), draw(1)], dim=2)
    circuit = Circuit.random(SMALL, 12, 0)
    assert roc(scored(values), circuit).auroc == roc(values.mean(2), circuit).auroc
    assert roc(scored(values), circuit).auroc != roc(values.abs().mean(2), circuit).auroc


def test_roc_refuses() -> None:
    circuit = Circuit.random(SMALL, 12, 0)
    assert isinstance(roc(draw(0), circuit), RocCurve)
    with pytest.raises(ValueError, match="expected scores of Graph"):
        roc(scored(draw(0, graph=Graph(3, 2, 2)), Graph(3, 2, 2)), circuit)
    with pytest.raises(ValueError, match=r"scores: expected shape \[7, 15\]"):
        roc(torch.zeros(7), circuit)
    with pytest.raises(ValueError, match="some edges in the circuit and some outside, got 46 of 46"):
        roc(draw(0), Circuit.full(SMALL))
    with pytest.raises(ValueError, match="some nodes in the circuit and some outside, got 0 of 6"):
        roc(draw(0), Circuit.from_edges(SMALL, ["input->logits"]), over="node")
    with pytest.raises(ValueError, match="over: expected 'edge' or 'node'"):
        roc(draw(0), circuit, over="head")
    values = draw(0)
    values[SMALL.index(SMALL.edge("m0->logits"))] = NAN
    with pytest.raises(ValueError, match="each of 46 edges, 1 have none"):
        roc(values, circuit)
    assert not scored(draw(0)).values[SMALL.exists].isnan().any()  # NaN where there is no edge is as it should be
