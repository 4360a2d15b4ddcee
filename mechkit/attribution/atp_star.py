"""AtP*: attribution patching with two repairs, for the two ways in which its first-order estimate misses an effect altogether.

1. *QK fix* (sites `q` and `k`). A saturated softmax has hardly any gradient, though another query or key would move the
   attention elsewhere. So the softmax is not linearized: the pattern is recomputed exactly with the source's query (or key), and
   `effect = sum((new pattern - pattern) * gradient at the pattern)`. With one key replaced, only its own score changes; all keys'
   patterns then follow from the scores in closed form, without a run for each.
2. *GradDrop*. A direct effect and an indirect one through a later layer can cancel in the gradient, although they really do not.
   So the backward pass is repeated with each layer's contribution dropped in turn (the gradient goes past the layer along the
   residual stream only), and a node's score is the mean of the absolute estimates: `sum over layers |estimate| / (layers - 1)`
   (a node has no estimate where its own layer is dropped). It has no sign.

Costs one backward pass, with GradDrop one more for each layer (from that layer down, so half as long on average), and for the QK
fix two or three attention patterns per layer.

Kramar, Lieberum, Shah and Nanda 2024, https://arxiv.org/abs/2403.00745.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechkit._check import checked
from mechkit.engine import frozen_parameters
from mechkit.experiment.axes import Chosen
from mechkit.experiment.estimates import (
    AnyMetric,
    Experiment,
    GradientChunk,
    Key,
    check_one_site,
    hook_name,
    make_experiment,
)
from mechkit.experiment.passes import check_reached, runs_of, tapped, unedited
from mechkit.experiment.patches import takes_patches
from mechkit.hooks import SITES, HookedModel, get_site, one_at_a_time
from mechkit.hooks._capture import keepers
from mechkit.prompts import PromptPairs
from mechkit.result import Result

# From the gradient at a node's tap to its effects, laid out as the site's activation is.
Effect = Callable[[Tensor], Tensor]


@checked
@one_at_a_time
@takes_patches
def atp_star(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    site: str = "z",
    over: str = "layer head",
    *,
    qk_fix: bool = True,
    grad_drop: bool = True,
    direction: Literal["denoise", "noise"] = "denoise",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | Sequence[str] | None = None,
    neurons: Sequence[int] | None = None,
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """Estimates how much patching each node changes the metric, with both of AtP*'s repairs or one of them.

    Args:
        model, pairs, metric, site, over, direction, layers, heads, positions, neurons: As for `attribution_patching`.
        budget, progress: As for `attribution_patching`.
        qk_fix: Recompute the softmax for queries and keys (`site="q"` and `"k"`; elsewhere there is nothing to fix).
        grad_drop: Guard against cancellation. The effects are then magnitudes, at least 0.

    Returns:
        A `Result` like `attribution_patching`'s, dims `(*over, "prompt")`. With `grad_drop` its `effect()` is a size without
        a sign (provenance `sign` is `"magnitude"`); `compare` holds it against the exact effect's size.

    Raises:
        ValueError: as `attribution_patching`; GradDrop on a model of one layer or in the residual stream; a QK fix where the
            pattern is not the softmax of the scores (attention sinks) or one head's query changes another's pattern (OLMo 2).
    """
    check_one_site(site)
    if qk_fix and get_site(site).name in ("q", "k") and "neuron" in over.split():
        raise ValueError(
            f"qk_fix: the softmax moves with a whole query or key, not with one entry of it; leave 'neuron' out of "
            f"over={over!r}, or use qk_fix=False"
        )
    if grad_drop and model.n_layers < 2:
        raise ValueError("grad_drop: expected a model of at least 2 layers, since a node's own layer is never dropped")
    if grad_drop and get_site(site).name in ("embed", "resid_pre", "resid_mid", "resid_post"):
        raise ValueError(
            f"grad_drop: expected a component's site (z, q, k, v, mlp_out, ...), whose own layer is left out; got "
            f"{site!r}, which belongs to the residual stream. Use grad_drop=False"
        )
    chosen: Chosen = {"layers": layers, "heads": heads, "positions": positions, "neurons": neurons}
    about = {
        "technique": "atp_star",
        "qk_fix": qk_fix,
        "grad_drop": grad_drop,
        "sign": "magnitude" if grad_drop else "signed",
    }
    experiment = make_experiment(model, pairs, metric, site, over, direction, chosen, budget, progress, about)
    experiment.gradients = 1 + (model.n_layers if grad_drop else 0)
    with frozen_parameters(model):
        for chunk in experiment.chunks():
            _attribute(experiment, chunk, qk_fix, grad_drop)
    return experiment.result(next(iter(experiment.axes)))


def _attribute(experiment: Experiment, chunk: GradientChunk, qk_fix: bool, grad_drop: bool) -> None:
    base_is, source_is = runs_of(experiment)
    source, _, source_final = unedited(experiment, chunk, source_is)
    base, hidden, base_final = unedited(experiment, chunk, base_is)
    chunk.keep_unedited({source_is: source_final, base_is: base_final})
    taps: dict[Key, Key] = {}  # node -> where its gradient is taken
    effects: dict[Key, Effect] = {}
    if qk_fix and experiment.keys[0][0] in ("q", "k"):
        _check_heads_are_apart(experiment, chunk, experiment.keys[0], base, hidden)
    for key in experiment.keys:
        if qk_fix and key[0] in ("q", "k"):
            taps[key] = ("pattern", key[1])
            fix = _query_fix if key[0] == "q" else _key_fix
            effects[key] = fix(experiment, chunk, key, source[key], hidden[key[1]])
        else:
            taps[key] = key
            effects[key] = partial(torch.mul, source[key] - base[key])
    silent = set(experiment.keys)

    def add(gradient: Tensor, tap: Key) -> None:
        for key in (key for key, at in taps.items() if at == tap):
            silent.discard(key)
            chunk.add(key, effects[key](gradient))

    read: dict[Key, Tensor] = {}  # what each block reads, in the graph
    hooks: list[tuple[str, Callable[..., Tensor | None]]] = [
        (hook_name(tap), lambda x, hook, tap=tap: tapped(x, partial(add, tap=tap)))
        for tap in dict.fromkeys(taps.values())
    ]
    n_layers = experiment.model.n_layers
    hooks += keepers([("resid_pre", layer) for layer in range(n_layers)], read, lambda activation, _: activation)
    leaf, final = chunk.runs.forward(chunk.inputs[base_is], chunk.everyone, hooks, leaf=True)
    assert leaf is not None
    value = chunk.metric(final).sum()
    if not grad_drop:
        torch.autograd.grad(value, leaf)
        check_reached(experiment, silent)
        return
    stream = {layer: activation for (_, layer), activation in read.items()}
    ends = [*(stream[i] for i in range(1, n_layers)), final]
    into_next = torch.autograd.grad(value, [leaf, *ends], retain_graph=True)[1:]  # the gradient at each block's output
    check_reached(experiment, silent)
    _drop_each_layer(experiment, chunk, leaf, stream, into_next)


def _drop_each_layer(
    experiment: Experiment, chunk: GradientChunk, leaf: Tensor, stream: dict[int, Tensor], at_output: Sequence[Tensor]
) -> None:
    """Replaces the experiment's plain estimates by the mean of their sizes over backward passes with one layer dropped each."""
    (site, axes), n_layers = next(iter(experiment.axes.items())), experiment.model.n_layers
    ids, working = chunk.ids, experiment.effects[site]
    plain = working[..., ids].clone()
    total = torch.zeros_like(plain)
    by_layer = axes.dims.index("layer")
    for dropped in range(n_layers):
        working[..., ids] = 0
        if any(layer < dropped for layer in axes.layers):
            torch.autograd.grad(stream[dropped], leaf, grad_outputs=at_output[dropped], retain_graph=True)
        estimate = working[..., ids]
        above = [i for i, layer in enumerate(axes.layers) if layer > dropped]
        if above:  # a layer below a node does not touch its gradient
            index = torch.tensor(above)
            estimate = estimate.index_copy(by_layer, index, plain.index_select(by_layer, index))
        total += estimate.abs()
        experiment.took_gradients(len(ids))
    working[..., ids] = total / (n_layers - 1)


def _check_heads_are_apart(
    experiment: Experiment, chunk: GradientChunk, key: Key, base: Mapping[Key, Tensor], hidden: Mapping[int, Tensor]
) -> None:
    """Refuses models in which one head's query or key changes another's pattern: the fix recomputes all heads at once."""
    moved = base[key].clone()
    moved[:, :, 0] *= 2
    before = _pattern(experiment, chunk, key[1], hidden[key[1]])
    after = _pattern(experiment, chunk, key[1], hidden[key[1]], (hook_name(key), moved))
    group = experiment.model.n_heads // moved.shape[2]
    if before.shape[1] > group and float((after - before)[:, group:].abs().max()) > 1e-3:
        raise ValueError(
            f"qk_fix: in {experiment.model.name} ({experiment.model.cfg.architecture}) a head's {key[0]} changes the others' "
            "patterns (a norm over all heads together), so that the softmax cannot be recomputed head by head; use qk_fix=False"
        )


def _query_fix(experiment: Experiment, chunk: GradientChunk, key: Key, query: Tensor, hidden: Tensor) -> Effect:
    """Effects of replacing each query: its row of the pattern is recomputed."""
    pattern = _pattern(experiment, chunk, key[1], hidden)
    change = _pattern(experiment, chunk, key[1], hidden, (hook_name(key), query)) - pattern

    def effect(gradient: Tensor) -> Float[Tensor, "prompt pos head 1"]:
        return (change * gradient).sum(-1).transpose(1, 2)[..., None]

    return effect


def _key_fix(experiment: Experiment, chunk: GradientChunk, key: Key, keys: Tensor, hidden: Tensor) -> Effect:
    """Effects of replacing keys: one by one where the result is over positions, else all of a head's together."""
    pattern = _pattern(experiment, chunk, key[1], hidden)
    edit, group = (hook_name(key), keys), experiment.model.n_heads // experiment.model.n_kv_heads
    by_position = {"pos", "position"} & set(experiment.axes[key[0]].dims)
    suffix = keys.shape[1]
    if not by_position:
        change = _pattern(experiment, chunk, key[1], hidden, edit) - pattern

        def together(gradient: Tensor) -> Float[Tensor, "prompt pos kv_head 1"]:
            per_head = (change * gradient).flatten(2).sum(-1)
            placed = per_head.new_zeros(len(per_head), suffix, per_head.shape[1])
            placed[:, 0] = per_head  # the sum over positions is what counts
            return placed.unflatten(2, (-1, group)).sum(3)[..., None]

        return together
    scores = _pattern(experiment, chunk, key[1], hidden, site="attn_scores")
    moved = _pattern(experiment, chunk, key[1], hidden, edit, site="attn_scores")
    off = float((scores.softmax(-1) - pattern).abs().max())
    narrowest = min(x.dtype.itemsize for x in (pattern, scores, hidden))
    if not off <= (0.02 if narrowest < 4 else 1e-4):
        raise ValueError(
            f"qk_fix: expected the pattern of layer {key[1]} to be the softmax of its scores, but it differs by {off:.1e} "
            "(attention sinks?); use qk_fix=False, or over='layer head', which patches all keys of a head together"
        )

    def one_by_one(gradient: Tensor) -> Float[Tensor, "prompt pos kv_head 1"]:
        per_key = replaced_columns(pattern, scores, moved, gradient).sum(2)[..., -suffix:]  # over destinations
        return per_key.transpose(1, 2).unflatten(2, (-1, group)).sum(3)[..., None]

    return one_by_one


def replaced_columns(
    pattern: Float[Tensor, "*rows src"],
    scores: Float[Tensor, "*rows src"],
    moved: Float[Tensor, "*rows src"],
    gradient: Float[Tensor, "*rows src"],
) -> Float[Tensor, "*rows src"]:
    """For each source j: how `sum(gradient * pattern)` of a row changes when score j alone becomes `moved[j]`.

    With `m` the mean of the gradient over the other sources (weighted by the pattern) and `w` the new attention to j, it
    becomes `w g_j + (1 - w) m`. The mean and the normalizer of the others follow from those of the whole row by leaving j out,
    which loses nothing unless j holds nearly everything; so the row's strongest source is left out by a softmax of its own.
    """
    wide = torch.promote_types(pattern.dtype, gradient.dtype)  # some softmaxes are float32 whatever the model's dtype
    pattern, scores, moved, gradient = (x.to(wide) for x in (pattern, scores, moved, gradient))
    whole = (gradient * pattern).sum(-1, keepdim=True)
    others = (1 - pattern).clamp(min=torch.finfo(pattern.dtype).tiny)
    mean = (whole - gradient * pattern) / others
    log_others = scores.logsumexp(-1, keepdim=True) + others.log()
    strongest = pattern.argmax(-1, keepdim=True)
    rest = scores.scatter(-1, strongest, torch.finfo(scores.dtype).min)
    # Where the row sees one source there is nothing to share.
    alone = rest.amax(-1, keepdim=True) <= torch.finfo(scores.dtype).min / 2
    rest_mean = (gradient * rest.softmax(-1)).sum(-1, keepdim=True)
    mean = mean.scatter(-1, strongest, rest_mean)
    log_others = log_others.scatter(-1, strongest, rest.logsumexp(-1, keepdim=True))
    weight = torch.sigmoid(moved - log_others)
    change = weight * gradient + (1 - weight) * mean - whole
    return change.masked_fill(alone, 0.0)


def _pattern(
    experiment: Experiment,
    chunk: GradientChunk,
    layer: int,
    hidden: Tensor,
    edit: tuple[str, Tensor] | None = None,
    site: str = "pattern",
) -> Float[Tensor, "prompt head pos src"]:
    """The base run's pattern (or scores) in one layer, with its queries or keys replaced if an edit is given."""
    hooks = [] if edit is None else [(edit[0], lambda x, hook, new=edit[1]: new)]
    rows = chunk.inputs[experiment.base_is]
    name = SITES[site].hook_name(layer)
    return chunk.runs.capture(rows, chunk.everyone, hooks, name, hidden=hidden, layer=layer)
