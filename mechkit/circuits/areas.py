"""Two ways to put a number on how well edges were ranked: areas under a faithfulness curve, and a known circuit.

1. *Faithfulness areas* need no known circuit. Keep the best 0.1 %, 0.2 %, …, 100 % of the edges; f is the circuit's faithfulness
   (0 the corrupted run, 1 the whole model). CPR is the area under f, the larger the better; CMD that of |1 - f|, the smaller
   the better. Both are trapezoids over the share of edges kept, between the points of the grid alone: between two points on
   opposite sides of 1, CMD joins |1 - f| at one to |1 - f| at the other and does not go down to 0. The area left of the first
   point is not counted. So f = 1 everywhere has CPR 0.999 and CMD 0.
2. *ROC* against a known circuit: how often does an edge (or node) of the circuit score higher than one outside it?

Mueller et al. 2025 (MIB), https://arxiv.org/abs/2504.13151; Conmy et al. 2023 (ROC), https://arxiv.org/abs/2304.14997.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechkit._check import checked
from mechkit.circuits.circuit import Circuit
from mechkit.circuits.edge_scores import EdgeScores

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""MIB's grid: shares of the graph's edges that are kept."""


@checked
def cpr(fractions: Sequence[float] | Tensor, faithfulness: Sequence[float] | Tensor) -> float:
    """Area under the faithfulness curve ("integrated circuit performance ratio").

    Args:
        fractions: Share of the edges kept at each point, ascending, in (0, 1]; usually `FRACTIONS`.
        faithfulness: Of the circuit at each point: 0 the corrupted run, 1 the whole model.

    Returns:
        The area; 0.999 on `FRACTIONS` where the circuits are as good as the whole model. Higher is better.

    Raises:
        ValueError: different lengths, fewer than two points, fractions out of order or range, a number that is not finite.

    Example:
        >>> round(cpr(FRACTIONS, [1.0] * 10), 12)
        0.999
    """
    return _area(*_curve(fractions, faithfulness))


@checked
def cmd(fractions: Sequence[float] | Tensor, faithfulness: Sequence[float] | Tensor) -> float:
    """Area of the distance |1 - f| from the whole model ("integrated circuit-model distance").

    Args:
        fractions, faithfulness: As for `cpr`.

    Returns:
        The area; 0 where the circuits are as good as the whole model. Lower is better.

    Raises:
        ValueError: as `cpr`.

    Example:
        >>> round(cmd(FRACTIONS, FRACTIONS), 12)
        0.4990005
    """
    x, f = _curve(fractions, faithfulness)
    return _area(x, np.abs(1 - f))


def _curve(
    fractions: Sequence[float] | Tensor, faithfulness: Sequence[float] | Tensor
) -> tuple[np.ndarray, np.ndarray]:
    x, f = (
        (values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)).astype(np.float64)
        for values in (fractions, faithfulness)
    )
    if x.ndim != 1 or x.shape != f.shape or len(x) < 2:
        raise ValueError(
            f"fractions, faithfulness: expected two lists of equal length, at least 2, got {x.shape} and {f.shape}"
        )
    if not (np.diff(x) > 0).all() or not x[0] > 0 or not x[-1] <= 1:
        raise ValueError(f"fractions: expected ascending shares above 0 and at most 1, got {x.tolist()}")
    if not np.isfinite(f).all():
        raise ValueError(f"faithfulness: expected finite numbers, got {f.tolist()}")
    return x, f


def _area(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.trapezoid(y, x))


@dataclass(frozen=True, eq=False)
class RocCurve:
    """How well scores tell what is in a circuit from what is not.

    Attributes:
        fpr: `[point]`, share of what is not in the circuit that scores at least the threshold; from 0 to 1.
        tpr: `[point]`, share of what is in it that does; from 0 to 1.
        thresholds: `[point]`, descending, the first one infinite. Equal scores are one point, so that their order cannot matter.
        auroc: Area under the curve: the probability that an edge (or node) of the circuit scores higher than another one, where
            equal scores count half. 1 is perfect, 0.5 chance.
        n_positive, n_negative: How many are in the circuit, and how many are not.
        over: `"edge"` or `"node"`.
    """

    fpr: Float[Tensor, "point"]
    tpr: Float[Tensor, "point"]
    thresholds: Float[Tensor, "point"]
    auroc: float
    n_positive: int
    n_negative: int
    over: Literal["edge", "node"]

    @checked
    def precision_at(self, k: int | None = None) -> float:
        """Share of the k best that are in the circuit; of as many as are in it by default.

        Among equal scores at the cut this is what is expected if they are taken at random.

        Raises:
            ValueError: `k` is not from 1 to the number of edges (nodes).
        """
        k = self.n_positive if k is None else k
        n = self.n_positive + self.n_negative
        if isinstance(k, bool) or not 1 <= k <= n:
            raise ValueError(f"k: expected 1 to {n}, got {k!r}")
        true = self.tpr.numpy() * self.n_positive
        kept = true + self.fpr.numpy() * self.n_negative
        return float(np.interp(k, kept, true)) / k

    def __repr__(self) -> str:
        sizes = f"{self.n_positive} of {self.n_positive + self.n_negative} {self.over}s are in the circuit"
        return f"RocCurve(AUROC {self.auroc:.4g}; {sizes}, precision at {self.n_positive}: {self.precision_at():.4g})"


@checked
def roc(
    scores: EdgeScores | Float[Tensor, "writer reader"],
    circuit: Circuit,
    *,
    over: Literal["edge", "node"] = "edge",
    by: Literal["abs", "value"] = "abs",
) -> RocCurve:
    """Receiver operating characteristic of scores against a known circuit.

    Args:
        scores: Of all edges; averaged over prompts. A tensor's entries where there is no edge are not looked at.
        circuit: What is known.
        over: `"edge"`; or `"node"`: heads and MLPs, in the circuit if they write over an edge of it, with the best score of the
            edges that they write over. The embedding and the logits are in every circuit and are left out.
        by: Best is furthest from 0 (`"abs"`), or largest (`"value"`).

    Returns:
        The curve with its area.

    Raises:
        ValueError: another graph, an edge without a score (its rank would be a guess), all edges (nodes) in the circuit or none,
            or another `over` or `by`.
    """
    if over not in ("edge", "node") or by not in ("abs", "value"):
        raise ValueError(f"over, by: expected 'edge' or 'node', 'abs' or 'value'; got over={over!r} and by={by!r}")
    graph = circuit.graph
    if isinstance(scores, EdgeScores) and scores.graph != graph:
        raise ValueError(f"scores: expected scores of {graph}, the circuit's, got scores of {scores.graph}")
    values = (scores.values if isinstance(scores, EdgeScores) else scores).detach().cpu().double()
    if values.shape != graph.exists.shape:
        raise ValueError(f"scores: expected shape {list(graph.exists.shape)}, got {list(values.shape)}")
    if n := int((values.isnan() & graph.exists).sum()):
        raise ValueError(
            f"scores: expected a score for each of {graph.n_edges} edges, {n} have none; compute them, or fill in what stands "
            "for 'not in the circuit', such as 0"
        )
    keys = (values.abs() if by == "abs" else values).masked_fill(~graph.exists, -torch.inf)
    if over == "edge":
        return _roc(keys[graph.exists], circuit.members[graph.exists], over)
    return _roc(keys.amax(1)[1:], circuit.members.any(1)[1:], over)


def _roc(keys: Tensor, positive: Tensor, over: Literal["edge", "node"]) -> RocCurve:
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        raise ValueError(
            f"circuit: expected some {over}s in the circuit and some outside, got {n_positive} of {len(positive)}"
        )
    distinct, place = keys.unique(return_inverse=True)  # ascending
    true = torch.bincount(place, weights=positive.double(), minlength=len(distinct)).flip(0).cumsum(0)
    false = torch.bincount(place, weights=(~positive).double(), minlength=len(distinct)).flip(0).cumsum(0)
    zero = torch.zeros(1, dtype=torch.float64)
    tpr, fpr = torch.cat([zero, true / n_positive]), torch.cat([zero, false / n_negative])
    thresholds = torch.cat([zero + torch.inf, distinct.flip(0)])
    auroc = _area(fpr.numpy(), tpr.numpy())
    return RocCurve(fpr, tpr, thresholds, auroc, n_positive, n_negative, over)
