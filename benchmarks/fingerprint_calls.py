"""The fingerprint's calls: every technique, with its options, on the material of one family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from fingerprint_material import METRICS, N_LAYERS, Call, Material, Named, called, calls, grid, of_logits
from torch import Tensor

import mechkit as mk

# --- the calls: nodes


HEADS, STREAM = ("q", "k", "v", "z", "result"), ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
BOTH, NOISED = ("denoise", "noise"), ("k", "z", "pattern", "mlp_out")


def overs(m: Material, *more: dict[str, Any]) -> list[dict[str, Any]]:
    """Every site that exists in some family, with the cells that are usually made of it; and some more."""
    cells = [
        *grid(site=HEADS, over=("layer head",)),
        *grid(site=STREAM, over=("layer", "layer pos")),
        *grid(site=("pattern", "attn_scores"), over=("layer head",)),
        *grid(site=("mlp_pre", "mlp_post"), over=("layer",)),
        *more,
    ]
    return [options | m.layers(options["site"]) for options in cells]


FINER = [
    *grid(site=("z", "k"), over=("layer pos head",)),
    *grid(site=("z", "v"), over=("layer", "layer position head")),
    *grid(site=("resid_post", "mlp_out"), over=("layer position",)),
    *grid(site=("mlp_post",), over=("layer neuron", "layer pos neuron"), neurons=([1, 30],)),
    *grid(site=("z",), over=("layer head neuron",), neurons=([0, 5],)),
    *grid(site=("embed",), over=("pos", "position")),
]


def activation_patching(m: Material) -> Iterator[Call]:
    of = {"model": m.model, "pairs": m.pairs, "metric": m.metric, "progress": False}
    some = m.layers("z")
    yield from called(
        mk.activation_patching,
        of,
        overs(m, *FINER),
        [options | {"direction": "noise"} for options in overs(m) if options["site"] in NOISED],
        [some | options for options in grid(metric=[m.metric_named(name) for name in METRICS])],
        [some | {"replay": False}, {"site": "resid_pre", "replay": False, "over": "layer pos"}],
        [{"site": "mlp_out", "over": "layer", "replay": False}, {"site": "blocks.1.attn.hook_z"}],
        grid(layers=([1], [2, 1]), heads=([0], [2, 1])),
        [{"site": "resid_pre", "over": "layer pos", "positions": [0, 3]}],
        [{"site": "resid_pre", "over": "layer position", "positions": ["S"]}],
        [some | {"budget": 2**18}],
    )
    same = {**of, "pairs": m.equal}
    cache = Named("of clean", lambda: m.model.run_with_cache(m.tokens, "z")[1])
    function = Named("of_logits", lambda: of_logits)
    yield from called(
        mk.activation_patching,
        {**same, "metric": mk.logit_diff},
        [some | {"source_cache": cache}, some | {"pairs": Named("equal", lambda: m.equal)}],
        [some | {"metric": function}, {"metric": function, "site": "mlp_out", "over": "layer pos"}],
    )


def ablation(m: Material) -> Iterator[Call]:
    on = {"model": m.model, "prompts": m.pairs, "metric": m.metric, "progress": False}
    modes = ("zero", "mean", "position_mean", "resample")
    sites = grid(site=("z", "v"), over=("layer head",))
    sites += grid(site=("resid_pre", "attn_out", "mlp_out", "mlp_post"), over=("layer",))
    yield from called(
        mk.ablation,
        on,
        [options | m.layers(options["site"]) | {"mode": mode} for options in sites for mode in modes],
        [options | m.layers(options["site"]) | {"mode": "mean"} for options in FINER],
        [{"mode": "zero", "site": site} | m.layers("z") for site in ("pattern", "result")],
        [{"mode": "resample", "seed": 3} | m.layers("z"), {"mode": "zero", "replay": False} | m.layers("z")],
        [{"mode": mode, "reference": m.named("text")} | m.layers("z") for mode in modes[1:3]],
        [{"mode": "resample", "reference": Named("corrupted", lambda: m.pairs.corrupted)} | m.layers("z")],
        [{"mode": "mean", "metric": m.metric_named(name)} | m.layers("z") for name in ("log_prob", "kl_divergence")],
    )


def estimates(m: Material) -> Iterator[Call]:
    of = {"model": m.model, "pairs": m.pairs, "metric": m.metric}
    z, sites = m.layers("z"), overs(m, *FINER)
    yield from called(
        mk.attribution_patching,
        of,
        sites,
        [options | {"direction": "noise"} for options in sites if options["site"] in NOISED],
        [z | {"metric": m.metric_named(name)} for name in METRICS],
        [z | {"site": {"z": "layer head", "v": "layer"}}, {"site": {"mlp_out": "layer", "resid_pre": "layer pos"}}],
        [z | {"budget": 2**16}, {"layers": [2, 1], "heads": [2, 1]}],
    )
    of_heads = [m.layers(site) | {"site": site} for site in ("q", "k", "v", "z")]
    few = [*of_heads, {"site": "mlp_out", "over": "layer"}]
    yield from called(
        mk.atp_star,
        of,
        [site | how for site in few for how in grid(qk_fix=(True, False), grad_drop=(True, False))],
        [site | {"direction": "noise"} for site in few],
        [m.layers("k") | {"site": site, "over": "layer pos head"} for site in ("q", "k")],
    )
    rules = ("left", "midpoint", "gauss-legendre", "stretched")
    few += [{"site": "resid_pre", "over": "layer pos"}, {"site": "pattern"} | m.layers("pattern")]
    yield from called(
        mk.integrated_gradients,
        of,
        [site | how for site in few for how in grid(path=("activation", "input"), steps=(2,))],
        [site | {"direction": "noise", "steps": 2} for site in few[3:5]],
        [z | how for how in grid(rule=rules, steps=(1, 2))],
        [z | {"metric": m.metric_named(name), "steps": 2} for name in ("log_prob", "kl_divergence")],
    )
    yield from called(
        mk.relp,
        of,
        [site | {"direction": direction} for site in few for direction in BOTH],
        [site | {"attention": "frozen", "direction": direction} for site in few[2:6] for direction in BOTH],
    )


def compared(m: Material) -> Iterator[Call]:
    exact, estimated = m.named("exact"), m.named("estimated")
    one = Named("prompt 2", lambda: m.estimated.sel(prompt=[2]))
    same = Named("prompt 2", lambda: m.exact.sel(prompt=[2]))
    size = m.named("magnitudes")
    yield from called(
        mk.compare,
        {"exact": None},
        [{"approx": estimated, "exact": exact, "k": k} for k in (1, 3)],
        [{"approx": one, "exact": same, "k": 2}, {"approx": size, "exact": exact, "k": 3}],
    )
    of = {"model": m.model, "pairs": m.pairs, "metric": m.metric, "progress": False}
    yield from called(mk.verify, of, [{"approx": approx, "top": top} for approx in (estimated, size) for top in (1, 3)])


# --- the calls: reading


def lenses(m: Material) -> Iterator[Call]:
    look = {"model": m.model, "prompts": m.pairs, "progress": False}
    lens, values = m.named("lens"), ("logit", "log_prob", "prob", "rank", "entropy", "kl")
    streams = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    yield from called(
        mk.logit_lens,
        look,
        [m.layers(o["site"]) | o for o in grid(site=streams, value=("logit", "prob", "kl"))],
        grid(value=values, over=("layer", "layer position")),
        grid(value=values, lens=(lens,)),
        grid(tokens=([4, 9], "next"), value=("log_prob", "rank")),
        [{"site": "result", "over": "layer pos head", "value": value} | m.layers("result") for value in values],
        [{"site": "embed", "over": "pos"}, {"layers": [2], "positions": [1, 4]}],
    )
    yield from called(
        mk.top_tokens,
        {**look, "k": 3},
        [{"site": "resid_pre"}, {"over": "layer position"}, {"over": "layer"}, {"lens": lens}, {"k": 1, "layers": [1]}],
        [{"site": "attn_out"} | m.layers("attn_out"), {"site": "result", "over": "layer head"} | m.layers("result")],
    )
    fit = {"model": m.model, "prompts": m.text, "progress": False}
    yield from calls(
        "TunedLens.fit",
        mk.TunedLens.fit,
        fit,
        [{"steps": 0}, {"steps": 3, "seed": 1}, {"steps": 3, "vocabulary": 16, "skip_first": 1, "batch": 8}],
        [{"layers": [1], "steps": 2, "validation": 0.4}],
    )
    resid = Named("ramp", lambda: torch.linspace(-1, 1, m.model.d_model, dtype=torch.float64))
    yield from calls(
        "TunedLens.translate",
        lambda layer, resid: m.lens.translate(layer, resid),
        {},
        grid(layer=range(m.model.n_layers), resid=(resid,)),
    )


def direct(m: Material) -> Iterator[Call]:
    on = {"model": m.model, "prompts": m.pairs, "metric": m.metric}
    ways = ("component", "cumulative", "layer head", "layer head src", "layer head position", "layer neuron")
    column = Named("column", lambda: m.model.W_U[:, 7])
    yield from called(
        mk.direct_logit_attribution,
        on,
        grid(over=ways),
        grid(over=("component", "layer head"), metric=(9, column, m.metric_named("logit_diff at S"))),
        [{"over": "layer head", "layers": [1, 2], "heads": [2]}, {"over": "layer neuron", "neurons": [3, 40]}],
        [{"over": "layer head src", "positions": [0, 2], "layers": [2]}],
    )
    places = [(layer, head) for layer in range(m.model.n_layers) for head in (0, 3)]
    yield from called(mk.dla_erasure_check, on, grid(head=places, mode=("zero", "position_mean")))


WEIGHTS = (
    "W_Q",
    "W_K",
    "W_V",
    "W_O",
    "b_Q",
    "b_K",
    "b_V",
    "b_O",
    "W_in",
    "W_gate",
    "W_out",
    "W_E",
    "W_pos",
    "W_U",
    "b_U",
)


def weights(m: Material) -> Iterator[Call]:
    of = {"model": m.model}
    for fn, names in (
        (mk.ov_circuit, ("source_tokens", "output_tokens")),
        (mk.qk_circuit, ("dest_tokens", "source_tokens")),
    ):
        tokens = [{names[0]: [3, 9, 20], names[1]: [5, 6]}, {names[0]: [4], names[1]: None}]
        places = grid(layer=range(m.model.n_layers), head=(0, 3))
        yield from called(fn, of, [place | some for place in places for some in tokens])
    yield from called(mk.ov_svd, {**of, "k": 2, "top": 3}, grid(layer=range(m.model.n_layers), head=(1, 2)))
    yield from called(mk.composition_scores, of, grid(kind=("Q", "K", "V")))
    yield from calls("weights", lambda name: getattr(m.model, name), {}, grid(name=WEIGHTS))


def heads(m: Material) -> Iterator[Call]:
    of, z = {"model": m.model, "progress": False}, m.layers("z")
    patterns = ("previous_token", "duplicate_token", "induction", "prefix_matching")
    yield from called(
        mk.head_scores,
        of,
        [z | options for options in grid(kind=patterns, n=(2,), length=(5, 7), seed=(0, 1))],
        [z | {"kind": kind, "prompts": m.named("pairs")} for kind in (*patterns, "name_mover_copy")],
        [z | {"kind": "name_mover_copy", "sign": -1, "n": 2, "length": 9}, z | {"kind": "copying"}],
        [z | {"kind": "name_mover_copy", "prompts": m.named("pairs"), "positions": ("S", "END")}],
        [{"kind": "induction", "layers": [2], "heads": [1, 2], "n": 2, "length": 5}],
    )
    look = {**of, "prompts": m.pairs}
    yield from called(
        mk.attention_patterns,
        look,
        [z | {"scores": scores} for scores in (False, True)],
        [{"layers": [1, 2], "heads": [2], "scores": scores} for scores in (False, True)],
    )
    ways = grid(over=("pos", "layer pos"), head_fusion=("mean", "max"), position=("END", "S"))
    ways += [{"residual": share, "position": 1} for share in (0.0, 0.3, 1.0)]
    for fn in (mk.attention_rollout, mk.attention_flow):
        yield from called(fn, look, ways)
    yield from called(
        mk.attention_relevance,
        {**look, "metric": m.metric},
        grid(
            over=("pos", "layer pos"), metric=[m.metric_named(name) for name in ("logit_diff", "log_prob", "prob_diff")]
        ),
    )


def states(m: Material) -> Iterator[Call]:
    look = {"model": m.model, "prompts": m.pairs, "progress": False}
    yield from called(
        mk.hidden_states,
        look,
        [m.layers(o["site"]) | o for o in grid(site=STREAM, position=(-1, 1, "S"))],
        [{"layers": [2, 0]}],
    )
    yield from called(
        mk.patchscope,
        {**look, "target": [3, 14, 15, 9], "k": 3},
        grid(site=("resid_pre", "resid_post", "mlp_out"), target_position=(1, -1)),
        grid(target_layer=(0, 2), positions=("S", ["S", "END"], [0, 3])),
        [{"max_new_tokens": 2, "layers": [1]}],
    )


def inputs(m: Material) -> Iterator[Call]:
    on = {"model": m.model, "prompts": m.pairs, "metric": m.metric}
    metrics = [m.metric_named(name) for name in ("logit_diff", "log_prob", "prob_diff", "kl_divergence")]
    yield from called(mk.gradient_x_input, on, grid(metric=metrics[:3]))
    rules = ("left", "midpoint", "gauss-legendre", "stretched")
    yield from called(
        mk.token_integrated_gradients,
        {**on, "steps": 4},
        grid(baseline=("zero", "mean", 6), rule=rules),
        grid(metric=metrics, keep=([0], ())),
    )
    yield from called(
        mk.neuron_attribution,
        {**on, "steps": 3},
        [
            {"site": site, "path": "activation", "over": "layer"}
            for site in ("mlp_post", "mlp_out", "mlp_pre", "resid_mid")
        ],
        grid(site=("mlp_post", "mlp_out"), path=("input",), baseline=("zero", "mean", 6)),
        [{"site": "z", "over": "layer head", "path": path} | m.layers("z") for path in ("activation", "input")],
        [{"rule": rule, "layers": [1]} for rule in rules],
        [{"over": "layer pos", "keep": [0], "path": "input"}, {"neurons": [3, 40]}],
    )


# --- the calls: circuits


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


# --- the calls: sweeps, results, the model itself


def sweeps(m: Material) -> Iterator[Call]:
    edit = mk.Edit
    last = N_LAYERS - 1
    cells = {
        "two heads": [(edit("z", last, head=0), edit("z", last, head=2)), (edit("z", 1, head=1),)],
        "head and stream": [(edit("z", 1, head=0), edit("resid_post", 1, pos=3)), (edit("mlp_out", 0),)],
        "overlapping": [(edit("mlp_out", 1), edit("mlp_out", 1, pos=2, value="mine")), ()],
        "a position a prompt": [(edit("resid_pre", 2, pos=(0, 1, 2, 3)),), (edit("resid_pre", 0, pos=5),)],
        "units": [(edit("mlp_post", layer, neuron=unit),) for layer in (0, last) for unit in (1, 7)],
        "variants": [(edit("mlp_out", 2, value="both", variant=which),) for which in (0, 1)],
    }
    half = torch.full((1, 1, m.model.d_model), 0.5, dtype=torch.float64)
    values = {"mine": {("mlp_out", 1): half}, "both": {("mlp_out", 2): torch.stack([half, -half])}}
    fixed = {
        "model": m.model,
        "base": m.pairs.corrupted,
        "source": m.pairs.clean,
        "metric": m.metric,
        "progress": False,
    }
    yield from called(
        mk.sweep,
        {**fixed, "values": values},
        [
            {"cells": Named(name, lambda some=some: some), "replay": replay}
            for name, some in cells.items()
            for replay in (True, False)
        ],
    )
    yield from calls(
        "metrics",
        mk.sweep,
        {**fixed, "cells": [(edit("resid_post", last, pos=3),), (edit("mlp_out", 0),)]},
        grid(metric=[m.metric_named(name) for name in METRICS if name != "factory"]),
    )


def results(m: Material) -> Iterator[Call]:
    yield from calls(
        "Result",
        lambda of, how: how(of),
        {},
        [
            {"of": of, "how": Named(name, lambda fn=fn: fn)}
            for of in map(m.named, ("exact", "estimated", "by_position"))
            for name, fn in _OF_RESULT.items()
        ],
        [{"of": m.named("far_apart"), "how": Named(name, lambda fn=fn: fn)} for name, fn in _OF_GAP.items()],
    )


_OF_RESULT: dict[str, Callable[[Any], Any]] = {
    "mean": lambda r: r.mean("prompt"),
    "mean over layers": lambda r: r.mean("layer"),
    "effect": lambda r: r.effect(),
    "effect of mean": lambda r: r.mean().effect(),
    "normalized": lambda r: r.mean().normalized(),
    "normalized prompts": lambda r: r.normalized(),
    "top": lambda r: r.top(7),
    "top by max": lambda r: r.top(7, by="max"),
    "top by min": lambda r: r.top(7, by="min"),
    "sel": lambda r: r.sel(layer=[2, 1], prompt=2),
    "sel slice": lambda r: r.sel(layer=slice(1, 2)),
    "ci": lambda r: r.ci(n_resamples=60),
    "basic ci": lambda r: r.ci(0.8, n_resamples=60, seed=1, method="basic"),
    "studentized ci": lambda r: r.ci(n_resamples=60, method="studentized"),
    "p values": lambda r: r.p_values(99),
    "p values without fdr": lambda r: r.p_values(99, seed=2, fdr=False),
    "dataframe": lambda r: r.to_dataframe()["value"].to_numpy(),
    "xarray": lambda r: r.to_xarray().to_numpy(),
}


_OF_GAP: dict[str, Callable[[Any], Any]] = {
    "normalized": lambda r: r.normalized(),
    "normalized ci": lambda r: r.ci(n_resamples=60, normalized=True),
    "studentized normalized ci": lambda r: r.ci(n_resamples=60, normalized=True, method="studentized"),
}


def running(m: Material) -> Iterator[Call]:
    model, tokens = m.model, m.tokens
    padded = torch.nn.utils.rnn.pad_sequence(list(m.pairs.clean.tokens), batch_first=True, padding_value=2)
    mask = (torch.arange(padded.shape[1]) < m.pairs.clean.lengths[:, None]).long()
    fixed = {"input": tokens}
    marked = {"input": Named("padded", lambda: padded), "attention_mask": Named("mask", lambda: mask)}
    with_loss = grid(return_type=("loss", "both"), loss_per_token=(False, True))
    yield from calls(
        "forward", model.forward, fixed, [{}, marked], with_loss, [marked | options for options in with_loss]
    )
    yield from calls(
        "generate",
        model.generate,
        {**fixed, "max_new_tokens": 3},
        [
            {},
            {"do_sample": True, "seed": 3, "temperature": 0.7},
            {"do_sample": True, "seed": 3, "top_k": 5, "top_p": 0.9},
        ],
        [marked],
    )
    sites = grid(names=list(mk.SITES))
    yield from calls("run_with_cache", lambda **options: _cached(model, **options), fixed, sites)
    some = [{"names": "resid_post", "positions": positions} for positions in (-1, [0, 2])]
    yield from calls("run_with_cache", lambda **options: _cached(model, **options), fixed, some)
    yield from calls("gradients", lambda site: _gradients(m, site), {}, grid(site=list(mk.SITES)))
    halved = Named("halved", lambda: [("mlp_out", lambda x, hook: x / 2)])
    silenced = Named("silenced", lambda: [(("resid_mid", 1), lambda x, hook: torch.zeros_like(x))])
    yield from calls("run_with_hooks", model.run_with_hooks, fixed, grid(fwd_hooks=(halved, silenced)))


def _cached(model: mk.HookedModel, **options: Any) -> Any:
    logits, cache = model.run_with_cache(**options)
    return {"logits": logits, "cache": dict(cache)}


def _gradients(m: Material, site: str) -> Arrays:
    """The gradients that a hook sees at every layer of a site."""
    found: dict[str, Any] = {}

    def keep(gradient: Tensor, hook: Any) -> None:
        found[f"{len(found)}"] = gradient.clone()

    with m.model.hooks(bwd_hooks=[(site, keep)]):
        of_logits(m.model(m.tokens)).sum().backward()
    m.hf.zero_grad(set_to_none=True)
    return found


def made_tasks(m: Material) -> Iterator[Call]:
    def ids(pairs: Any) -> Any:
        prompts = [pairs] if isinstance(pairs, mk.Prompts) else [pairs.clean, pairs.corrupted]
        return [torch.cat(some.tokens) for some in prompts]

    some = grid(n=(1, 3), length=(4, 6), seed=(0, 1))
    yield from calls("tasks.induction", lambda **options: ids(mk.tasks.induction(m.model, **options)), {}, some)
    yield from calls(
        "tasks.repeated_tokens", lambda **options: ids(mk.tasks.repeated_tokens(m.model, **options)), {}, some
    )


TECHNIQUES: tuple[Callable[[Material], Iterator[Call]], ...] = (
    activation_patching,
    ablation,
    estimates,
    compared,
    lenses,
    direct,
    weights,
    heads,
    states,
    inputs,
    edges,
    circuits,
    sweeps,
    results,
    running,
    made_tasks,
)
