"""The fingerprint's calls about edges and circuits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from family_material import BOTH, Call, Material, Named, called, calls, grid

import mechkit as mk


def edges(m: Material) -> Iterator[Call]:
    of = {"model": m.model, "pairs": m.pairs, "metric": m.metric}
    yield from called(
        mk.edge_attribution,
        of,
        grid(steps=(1, 2), path=("input",), direction=BOTH, gradient=("exact", "relp")),
        grid(steps=(1, 2), path=("activation",), direction=BOTH),
        [{"steps": 2, "rule": rule} for rule in ("left", "right", "midpoint", "gauss-legendre", "stretched")],
        [{"rule": "clean-corrupted"}, {"positions": ["S"]}, {"positions": [2, 4]}, {"per_prompt": False}],
        [{"metric": m.metric_named(name), "steps": 2} for name in ("log_prob", "prob_diff", "kl_divergence")],
    )
    best = Named("top 20", lambda: m.scores.top(20))
    yield from called(
        mk.edge_patching,
        {**of, "progress": False},
        grid(edges=(best, m.named("circuit")), direction=BOTH),
        [{"edges": best} | options for options in ({"positions": ["S"]}, {"positions": [4]}, {"per_prompt": False})],
        [{"edges": best, "metric": m.metric_named("kl_divergence")}],
    )
    named = {"senders": ["input", "a0.h1", "m1"], "receivers": ["m2"]}
    receivers = (["logits"], ["m1", "m2"], ["a2.h1<q>"])
    yield from called(
        mk.path_patching,
        {**of, "progress": False},
        grid(senders=("layer head", "layer"), receivers=receivers, freeze=("all", "heads")),
        [named | options for options in grid(freeze=("all", "heads"), direction=BOTH)],
        [{"senders": "layer head pos"}, {"senders": "layer position"}, {"positions": ["S"]}, {"direction": "noise"}],
    )
    yield from calls(
        "EdgeScores",
        lambda how: how(m.scores),
        {},
        [{"how": Named(f"top by {by}", lambda by=by: lambda s: s.top(12, by=by))} for by in ("abs", "max", "min")],
        [{"how": Named(name, lambda fn=fn: fn)} for name, fn in _OF_SCORES.items()],
    )


_OF_SCORES: dict[str, Callable[[Any], Any]] = {
    "normalized": lambda s: s.normalized(),
    "ci": lambda s: s.ci(n_resamples=50),
    "basic ci": lambda s: s.ci(0.8, n_resamples=50, method="basic", seed=1),
    "per prompt": lambda s: s.per_prompt,
    "orientation": lambda s: s.orientation,
    "score": lambda s: [s.score("input->m0"), s.score("m0->logits"), s.score("a1.h2->m2")],
}


def circuits(m: Material) -> Iterator[Call]:
    how = [{"n_edges": n, "prune": prune} for n in (20, 90) for prune in (True, False)] + [{"threshold": 0.05}]
    yield from calls(
        "Circuit.from_scores",
        lambda **options: mk.Circuit.from_scores(m.scores, **options),
        {},
        [options | more for options in how for more in grid(method=("top", "greedy"), by=("abs", "value"))],
    )
    yield from calls(
        "Circuit.random",
        lambda **options: mk.Circuit.random(m.model, **options),
        {},
        grid(n_edges=(15, 60), seed=(0, 1), connected=(True, False)),
    )
    yield from calls(
        "Circuit",
        lambda change: change(m.circuit),
        {},
        [{"change": Named(name, lambda fn=fn: fn)} for name, fn in _OF_CIRCUIT.items()],
    )
    yield from calls(
        "roc",
        lambda **options: mk.circuits.roc(m.scores, m.circuit, **options),
        {},
        grid(over=("edge", "node"), by=("abs", "value")),
    )
    yield from _judged(m)
    yield from _searched(m)


_OF_CIRCUIT: dict[str, Callable[[Any], Any]] = {
    "density": lambda c: [c.density, c.n_edges, len(c.nodes)],
    "with an edge": lambda c: c.with_edge("a0.h0->m2").pruned(),
    "without an edge": lambda c: c.without(c.edges[3], c.edges[5]),
    "targets": lambda c: [len(c.targets(edge.reader)) for edge in c.edges],
}


def _ablated(m: Material) -> list[dict[str, Any]]:
    values = ("resample", "zero", "mean", "position_mean", m.named("constants"))
    return [{"ablation": value} for value in values]


def _judged(m: Material) -> Iterator[Call]:
    of = {"model": m.model, "pairs": m.pairs, "metric": m.metric, "progress": False}

    def evaluated(**options: Any) -> Any:
        report = mk.evaluate_circuit(**options)
        return {"report": report, "summary": [report.gap, report.random_p, report.incompleteness]}

    yield from calls(
        "evaluate_circuit",
        evaluated,
        {**of, "random": 2, "sets": 2},
        [{"circuit": m.named("circuit")} | options for options in _ablated(m)],
        [{"circuit": m.named("circuit"), "minimality": kind, "seed": 1} for kind in (None, "edge")],
        [{"circuit": m.named("circuit"), "metric": m.metric_named(name)} for name in ("log_prob", "kl_divergence")],
        [{"circuit": Named(name, lambda make=make: make(m.model))} for name, make in _WHOLE.items()],
    )

    def curve(scores: Any, **options: Any) -> Any:
        found = mk.faithfulness_curve(scores, **options)
        return {"curve": found, "summary": [found.faithfulness, found.random_faithfulness, [found.cpr, found.cmd]]}

    scores = {"scores": m.named("scores")}
    scorer = {"scores": Named("scorer", lambda: mk.edge_attribution)}
    yield from calls(
        "faithfulness_curve",
        curve,
        {**of, "fractions": (0.05, 0.2, 0.6, 1.0), "random": 2},
        [scores | options for options in _ablated(m)],
        [scores | options for options in grid(method=("top", "greedy"), by=("abs", "value"))],
        [scorer | {"held_out": 0.5, "seed": seed} for seed in (0, 1)],
    )


_WHOLE = {"empty": mk.Circuit.empty, "full": mk.Circuit.full}


def _searched(m: Material) -> Iterator[Call]:
    of = {"model": m.model, "pairs": m.pairs, "progress": False}
    start = {"start": Named("best", lambda: mk.Circuit.from_scores(m.scores, n_edges=30))}
    yield from called(
        mk.acdc,
        of,
        [start | {"threshold": 0.02} | options for options in _ablated(m)],
        [start | {"threshold": 0.1, "metric": m.metric_named("logit_diff"), "prune": prune} for prune in (True, False)],
        [start | {"threshold": 0.0, "position": "S"}],
    )
    metric = {"metric": m.metric_named("factory")}
    yield from called(
        mk.learn_mask,
        {**of, "steps": 3, "batch": 2},
        [{"over": "edge"} | options for options in _ablated(m)],
        [{"over": "node", "ablation": "mean"}, {"over": "node", "target": 4}],
        [metric | {"objective": "metric", "over": over} for over in ("edge", "node")],
        [{"held_out": 0.0, "seed": 2, "position": "S", "temperature": 0.4, "penalty": 0.01}],
    )
    yield from called(
        mk.optimal_ablation,
        {**of, "steps": 2},
        [{}, {"writers": ["a1.h2", "m0"]}, {"circuit": m.named("circuit")}, {"batch": 2, "seed": 1, "writers": ["m2"]}],
        [metric | {"objective": "metric", "writers": ["a2.h0", "m2", "input"]}, {"position": "S", "writers": ["m1"]}],
    )

    def found(**options: Any) -> Any:
        result = mk.find_circuit(**options)
        return {"found": result, "agreement": result.agreement}

    yield from calls(
        "find_circuit",
        found,
        {**of, "metric": m.metric, "n_edges": 15, "candidates": 20, "steps": 2, "random": 1},
        [{"by": by} for by in ("abs", "value")],
        [{"threshold": 0.1}, {"ablation": "position_mean", "held_out": 0.25, "seed": 4}],
    )
