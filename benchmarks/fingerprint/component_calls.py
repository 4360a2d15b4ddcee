"""The fingerprint's calls of techniques that score components, tokens and weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from family_material import BOTH, METRICS, Call, Material, Named, called, calls, grid, of_logits

import mechkit as mk

# --- nodes

HEADS, STREAM = ("q", "k", "v", "z", "result"), ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
NOISED = ("k", "z", "pattern", "mlp_out")


def overs(m: Material, *more: dict[str, Any]) -> list[dict[str, Any]]:
    """Every site that exists in some family, with its usual dims; and `more` options."""
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


def knockout(m: Material) -> Iterator[Call]:
    yield from called(
        mk.attention_knockout,
        {"model": m.model, "pairs": m.pairs, "metric": m.metric, "progress": False, "from_": [0, 1]},
        [{}, {"window": 2}, {"window": None}, {"to": [-1, -2], "heads": [1]}, {"layers": [1], "replay": False}],
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


# --- reading


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
