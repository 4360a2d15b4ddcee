"""One score an edge: a dense tensor whose axes are named after a graph's writers and readers.

1. A score is what the edge's clean value adds to the metric, in the metric's unit: positive where the edge supports the metric.
2. Scores are kept prompt by prompt where the technique gives them so, and averaged by whoever reads.
3. NaN marks what is no edge, and edges that were not computed.

A score is no metric of a run, so that `EdgeScores.result` has no baselines; those of the unedited runs stand beside it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechkit._check import checked
from mechkit._drawn import Drawn
from mechkit._files import decoding
from mechkit._warnings import warn_of_gap
from mechkit.circuits.graph import Edge, Graph
from mechkit.result import Cost, Interval, Result
from mechkit.result._columns import Columns

if TYPE_CHECKING:
    import pandas

POOR = 0.1  # the completeness error from which estimates are called poor
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
}
_KEY = "edge_scores"  # in the provenance of a saved file: the graph and the baselines


@dataclass(frozen=True)
class ScoredEdge:
    """An edge and its score, averaged over prompts, in the metric's unit; and which prompts these are (`None`: not known)."""

    edge: Edge
    score: float
    prompts: tuple[str, ...] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """`"a9.h9->logits"`."""
        return self.edge.name

    def __repr__(self) -> str:
        return f"ScoredEdge({self.name}: {self.score:+.4g})"


@checked
@dataclass(frozen=True, eq=False)
class EdgeScores(Drawn):
    """What each edge adds to a metric. Make it with `EdgeScores.of`.

    Attributes:
        graph: Whose edges these are.
        result: Dims `("writer", "reader", "prompt")`, or `("writer", "reader")` for means over prompts; coords are the names.
            NaN where there is no edge, and where an edge was not computed. Its `baseline` is empty.
        baseline: Metric of the unedited runs, `clean` and `corrupted`, each `[prompt]`.
    """

    graph: Graph
    result: Result
    baseline: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        named = {"writer": tuple(self.graph.writer_index), "reader": tuple(self.graph.reader_index)}
        if self.result.dims not in (("writer", "reader"), ("writer", "reader", "prompt")):
            raise ValueError(f"result: expected dims ('writer', 'reader') and perhaps 'prompt', got {self.result.dims}")
        for dim, names in named.items():
            if self.result.coords[dim] != names:
                raise ValueError(
                    f"result: expected the {dim}s of {self.graph}, in its order; got {self.result.coords[dim]}"
                )
        if self.result.baseline:
            raise ValueError("result: expected scores, which have no baselines; give those of the runs as baseline=")
        if not self.result.values[~self.graph.exists.to(self.result.values.device)].isnan().all():
            raise ValueError("result: expected NaN where there is no edge; use EdgeScores.of, which sees to it")
        object.__setattr__(self, "baseline", MappingProxyType(self._checked_baseline()))

    def _checked_baseline(self) -> dict[str, Tensor]:
        baseline = {name: torch.as_tensor(b).detach() for name, b in self.baseline.items()}
        sizes = {name: tuple(b.shape) for name, b in baseline.items()}
        if any(len(size) != 1 for size in sizes.values()) or len(set(sizes.values())) > 1:
            raise ValueError(f"baseline: expected one number a prompt for each run, got shapes {sizes}")
        if "prompt" in self.result.dims and (wrong := set(sizes.values()) - {self.result.shape[2:]}):
            raise ValueError(f"baseline: expected {self.result.shape[2]} prompts, got {wrong.pop()[0]}")
        return baseline

    def __reduce__(self) -> tuple[Any, ...]:
        return EdgeScores, (self.graph, self.result, dict(self.baseline))

    @classmethod
    @checked
    def of(
        cls,
        graph: Graph,
        values: Float[Tensor, "writer reader ..."],
        *,
        baseline: Mapping[str, Tensor],
        metric: str,
        unit: str,
        provenance: Mapping[str, Any],
        prompts: bool,
        cost: Cost | None = None,
    ) -> EdgeScores:
        """Scores from a tensor.

        Args:
            graph: Whose edges.
            values: `[writer reader prompt]`, or `[writer reader]` for means over prompts; positive where the edge supports the
                metric. What stands where there is no edge is dropped; NaN at an edge means that it was not computed.
            baseline: Metric of the unedited runs, `clean` and `corrupted`, each `[prompt]`.
            metric, unit: Name of the metric, and the scores' unit.
            provenance: Model, prompts, technique and its arguments.
            prompts: Whether `values` has a prompt axis.
            cost: What the scores took to compute.

        Raises:
            ValueError: the shapes do not fit the graph or each other.
        """
        shape = (len(graph.writers), len(graph.readers))
        if tuple(values.shape[:2]) != shape or values.ndim != 2 + prompts:
            wanted = f"[{shape[0]} {shape[1]}{' prompt' if prompts else ''}]"
            raise ValueError(f"values: expected shape {wanted} (writers, readers of {graph}), got {list(values.shape)}")
        if not values.is_floating_point():
            raise ValueError(f"values: expected a floating-point tensor, got {values.dtype}")
        exists = graph.exists.to(values.device)
        coords: dict[str, tuple[int | str, ...]] = {
            "writer": tuple(graph.writer_index),
            "reader": tuple(graph.reader_index),
        }
        if prompts:
            exists = exists[..., None]
            coords["prompt"] = tuple(range(values.shape[2]))
        result = Result(
            values=values.detach().masked_fill(~exists, torch.nan),
            dims=tuple(coords),
            coords=coords,
            baseline={},
            base="",
            metric=metric,
            unit=unit,
            provenance=provenance,
            cost=cost,
        )
        return cls(graph, result, baseline)

    @cached_property
    def values(self) -> Float[Tensor, "writer reader"]:
        """Scores averaged over prompts."""
        return self.result.mean("prompt").values if "prompt" in self.result.dims else self.result.values

    @property
    def per_prompt(self) -> Float[Tensor, "writer reader prompt"]:
        """Scores of each prompt.

        Raises:
            ValueError: only means over prompts were computed.
        """
        if "prompt" not in self.result.dims:
            raise ValueError("per_prompt: expected scores by prompt, got means over prompts; compute them per prompt")
        return self.result.values

    @property
    def orientation(self) -> int:
        """1 where the metric is higher in the clean run (or it is not known), -1 where it is lower, as a divergence is."""
        if not {"clean", "corrupted"} <= set(self.baseline):
            return 1
        return -1 if float((self.baseline["clean"] - self.baseline["corrupted"]).double().mean()) < 0 else 1

    @property
    def metric(self) -> str:
        return self.result.metric

    @property
    def unit(self) -> str:
        return self.result.unit

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.result.provenance

    @property
    def cost(self) -> Cost | None:
        return self.result.cost

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The edges that were computed, by reader and then by writer."""
        return tuple(self._edge(w, r) for r, w in self._computed(self.values).tolist())

    def _edge(self, writer: int, reader: int) -> Edge:
        return Edge(self.graph.writers[writer], self.graph.readers[reader])

    @staticmethod
    def _computed(values: Tensor) -> Tensor:
        """`[number 2]`: reader and writer of every number, by reader and then by writer."""
        return (~values.isnan()).T.nonzero()

    @checked
    def score(self, edge: Edge | str) -> float:
        """The score of one edge, averaged over prompts; the edge may be given by its name.

        Raises:
            ValueError: there is no such edge, or it was not computed.
        """
        edge = self.graph.edge(edge) if isinstance(edge, str) else edge
        score = self.values[self.graph.index(edge)].item()
        if np.isnan(score):
            raise ValueError(f"edge: {edge.name!r} was not computed; compute it, or choose one of .edges")
        return score

    @checked
    def top(self, k: int = 10, by: Literal["abs", "max", "min"] = "abs") -> tuple[ScoredEdge, ...]:
        """The k most extreme edges, averaged over prompts, best first; ties by reader and then by writer.

        Args:
            k: How many, at most.
            by: `"abs"` furthest from 0, `"max"` largest, `"min"` smallest.

        Raises:
            ValueError: `k` is not positive, or `by` is something else.
        """
        if not hasattr(k, "__index__") or k < 1 or by not in ("abs", "max", "min"):
            raise ValueError(f"top: expected k >= 1 and by in 'abs', 'max', 'min', got k={k!r} and by={by!r}")
        values = self.values.cpu()
        places = self._computed(values)
        scores = values[places[:, 1], places[:, 0]]
        keys = {"abs": scores.abs(), "max": scores, "min": -scores}[by]
        best = keys.argsort(descending=True, stable=True)[:k]
        known = self.provenance.get("prompts")
        prompts = None if known is None else tuple(known)
        return tuple(
            ScoredEdge(self._edge(w, r), score, prompts)
            for (r, w), score in zip(places[best].tolist(), scores[best].tolist(), strict=True)
        )

    @checked
    def ci(
        self,
        level: float = 0.95,
        *,
        n_resamples: int = 1000,
        seed: int = 0,
        method: Literal["percentile", "basic", "studentized"] = "percentile",
    ) -> Interval:
        """Bootstrap interval of every edge's mean over prompts, as `Result.ci`.

        Raises:
            ValueError: only means over prompts were computed, there are fewer than two prompts, or an argument is out of range.
        """
        return self.result.ci(level, n_resamples=n_resamples, seed=seed, method=method)

    def normalized(self) -> EdgeScores:
        """Scores as a share of the gap between the runs, mean clean - mean corrupted: of all that there is to explain.

        Raises:
            ValueError: a baseline is missing, or the gap is 0 to rounding.
        """
        if missing := {"clean", "corrupted"} - set(self.baseline):
            raise ValueError(
                f"normalized: expected baselines clean and corrupted, got no {' and no '.join(sorted(missing))}"
            )
        clean, corrupted = (self.baseline[name].double().mean() for name in ("clean", "corrupted"))
        gap = clean - corrupted
        eps = torch.finfo(self.baseline["clean"].dtype).eps
        if not gap.isfinite() or gap.abs() <= 100 * eps * (clean.abs() + corrupted.abs()):
            raise ValueError(
                f"normalized: expected runs that differ, got means clean {clean:.4g} and corrupted {corrupted:.4g}; "
                "use the scores as they are"
            )
        warn_of_gap(clean, corrupted, corrupted, self.result.metric)
        values = self.result.values / gap.to(self.result.values)
        baseline = {
            name: ((b.double() - corrupted.to(b.device)) / gap.to(b.device)).to(b) for name, b in self.baseline.items()
        }
        return EdgeScores(self.graph, replace(self.result, values=values, unit="normalized"), baseline)

    @checked
    def correlation(self, other: EdgeScores, *, method: Literal["pearson", "spearman"] = "pearson") -> float:
        """Correlation of the mean scores over the edges that both have; NaN if either does not vary.

        Raises:
            ValueError: another graph, fewer than two edges in common, or another method.
        """
        if method not in ("pearson", "spearman"):
            raise ValueError(f"method: expected 'pearson' or 'spearman', got {method!r}")
        if other.graph != self.graph:
            raise ValueError(f"other: expected scores of {self.graph}, got scores of {other.graph}")
        mine, others = (scores.values.double().cpu() for scores in (self, other))
        both = ~(mine.isnan() | others.isnan())
        if both.sum() < 2:
            raise ValueError(f"correlation: expected at least 2 edges that both have, got {int(both.sum())}")
        x, y = mine[both].numpy(), others[both].numpy()
        if method == "spearman":
            from scipy.stats import rankdata

            x, y = rankdata(x), rankdata(y)
        if (x == x[0]).all() or (y == y[0]).all():
            return float("nan")
        return float(np.corrcoef(x, y)[0, 1])

    @checked
    def to_dataframe(self, *, per_prompt: bool = False) -> pandas.DataFrame:
        """One row per computed edge, by reader and then by writer: columns `writer`, `reader`, `score` (mean over prompts).

        Args:
            per_prompt: One row per edge and prompt instead, with a column `prompt` before `score`.

        Raises:
            ValueError: `per_prompt`, but only means over prompts were computed.
        """
        import pandas as pd

        values = (self.per_prompt if per_prompt else self.values).transpose(0, 1).numpy(force=True)
        labels = {**self.result.coords, "prompt": range(values.shape[-1])}
        edges = Columns(("reader", "writer", "prompt")[: values.ndim], labels, values).present()
        dims = ("writer", "reader", "prompt")[: values.ndim]
        return pd.DataFrame({**{dim: edges.label(dim) for dim in dims}, "score": edges.value()})

    @checked
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file that `load` reads back bit for bit; `Result.load` reads the scores alone."""
        extra = {
            "graph": asdict(self.graph),
            "baseline": {
                name: {"dtype": str(b.dtype).removeprefix("torch."), "values": b.tolist()}
                for name, b in self.baseline.items()
            },
        }
        return replace(self.result, provenance={**self.result.provenance, _KEY: extra}).save(path)

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str]) -> EdgeScores:
        """Read what `save` wrote, onto the CPU.

        Raises:
            ValueError: the file is something else, or was written by a newer mechkit.
        """
        result = Result.load(path)
        provenance = dict(result.provenance)
        extra = provenance.pop(_KEY, None)
        if extra is None:
            raise ValueError(f"{path}: expected a file written by EdgeScores.save, got another result; use Result.load")
        with decoding(path, "a file written by EdgeScores.save"):
            baseline = {
                name: torch.tensor(b["values"], dtype=_DTYPES[b["dtype"]]) for name, b in extra["baseline"].items()
            }
            graph = Graph(**extra["graph"])
            if (cells := result.values.shape[:2]) != (n := graph.n_cells):
                raise ValueError(f"graph: expected one of {tuple(cells)} writers and readers, got {n}")
            return cls(graph, replace(result, provenance=provenance), baseline)

    def __repr__(self) -> str:
        values = self.values
        n_computed, n_edges = int((~values.isnan()).sum()), self.graph.n_edges
        edges = f"{n_computed:,} edges" if n_computed == n_edges else f"{n_computed:,} of {n_edges:,} edges"
        top = ", ".join(f"{e.name} {e.score:+.4g}" for e in self.top(3))
        error = completeness_warning(self.provenance)
        return f"EdgeScores({self.metric} [{self.unit}]; {edges}{f'; top {top}' if top else ''}{f'; {error}' if error else ''})"


def completeness_warning(provenance: Mapping[str, Any]) -> str:
    """How far estimates are from adding up to what they explain, where that is so far that they mean little; else nothing."""
    error = provenance.get("completeness_error")
    if not isinstance(error, int | float) or error <= POOR:
        return ""
    return f"completeness error {error:.2f}: scores are far from adding up, try more steps or edge_patching"
