"""Direct logit attribution: how much of a metric each component wrote, straight into the final residual stream.

1. The final residual stream is a sum: embedding, positional embedding, and each layer's attention and MLP output.
2. With the final norm's scale held fixed, a logit difference is linear in it: `<direction, stream> + constant` (`_reading.py`).
3. Each component's term is its output times that direction. A head's output is `z W_O`, a neuron's is its activation times its
   row of `W_out`, and a head's share from one source position is `pattern * v W_O`. Where a block normalizes what it has
   computed before adding it (Gemma 2 and 3, OLMo 2), that norm's scale is held fixed too.

The terms of `over="component"` sum to the metric, and heads, sources and neurons to their component; how far they do not is
measured in every call, kept in the provenance (`residual_error`), and refused beyond rounding.

A caution. "Direct" is all that this sees: a later component may read what a head wrote and remove it, so that a head with a
large direct effect has no effect at all. `dla_erasure_check` measures that for a head.

Elhage et al. 2021, https://transformer-circuits.pub/2021/framework; the caution: Dao et al. 2023,
https://arxiv.org/abs/2310.07325.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechkit._check import checked
from mechkit._precision import wide_dtype
from mechkit._progress import Progress
from mechkit.attribution._reading import Direction, as_direction, to_result
from mechkit.attribution._stream import StreamRun, labels, needed
from mechkit.engine import Budget, check_can_run
from mechkit.experiment.axes import choose_indices, choose_layers, common_width
from mechkit.experiment.patches import takes_patches
from mechkit.experiment.positions import choose_positions, position_labels, split_prompts
from mechkit.hooks import SITES, HookedModel, mlp_weight, one_at_a_time
from mechkit.prompts import AnyPrompts, Prompts, as_prompts
from mechkit.result import Result

OVER = (
    "component",
    "cumulative",
    "layer head",
    "layer head src",
    "layer head position",
    "layer head patch",
    "layer neuron",
)
CAUTION = "direct effect only: later components may remove it (see dla_erasure_check)"


@checked
@one_at_a_time
@takes_patches
def direct_logit_attribution(
    model: HookedModel,
    prompts: AnyPrompts,
    metric: Direction,
    over: str = "component",
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    positions: Sequence[int] | Sequence[str] | None = None,
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """Splits a metric into what each component wrote into the final residual stream, at the position that the metric reads.

    Args:
        model: In evaluation mode.
        prompts: The prompts to run: the clean ones of pairs.
        metric: One that is linear in the logits (`mk.logit_diff(pairs)`, or `mk.logit_diff` itself), a token (text or id) or one
            token for each prompt whose logit is meant, or a direction `[d_model]` or `[prompt d_model]` after the final norm (as
            a column of `W_U` is). Tokens and directions are read at each prompt's last position.
        over: What to split into:
            `"component"`: embedding, positional embedding where there is one, each layer's attention and MLP, and what the
            biases after the last layer add; these sum to the metric.
            `"cumulative"`: the reading of the residual stream after the embedding, after each layer, and with the biases
            (which is the metric).
            `"layer head"`: each head, without the attention's output bias.
            `"layer head src"`: each head, split by the source position whose value it moved; `"layer head position"` the same
            at the prompts' named positions, `"layer head patch"` at the patches of their pictures.
            `"layer neuron"`: each MLP neuron, without the MLP's output bias.
        layers, heads, neurons, positions: Restrict these dims; positions are sources.
        budget: Bytes of working memory; default half of what the device has free (1 GiB on a CPU).
        progress: Show a progress bar when it takes long.

    Returns:
        A `Result` in the metric's unit with dims `("component", "prompt")`, or `(*over, "prompt")`. Positive: the component
        pushed the metric up. NaN at source positions that a prompt lacks. Provenance: `total`, the metric's mean, and
        `residual_error`, the largest error of the sums. See the module's docstring for what direct attribution cannot see.

    Raises:
        ValueError: a metric that is not linear in the logits; an architecture whose residual stream, heads or neurons do not
            sum to what they should (the message says where and by how much); training mode.
    """
    prompts = as_prompts(model, prompts)
    if over not in OVER:
        raise ValueError(f"over: expected one of {', '.join(map(repr, OVER))}; got {over!r}")
    base, named, task = split_prompts(prompts)
    check_can_run(model, {"prompt": base})
    direction = as_direction(model, metric, prompts)
    index = _chosen(model, base, named, over, layers, heads, neurons, positions)
    coords = {dim: tuple(labels) for dim, labels in index.items()}
    if over in ("component", "cumulative"):
        coords = {"component": labels(model, over)}
    if "src" in coords:
        coords["src"] = position_labels(base, index["src"])
    wide = wide_dtype(model.dtype)
    values = torch.full((*(len(labels) for labels in coords.values()), len(base)), torch.nan, dtype=wide)
    totals, error = torch.zeros(len(base), dtype=wide), 0.0
    room = Budget.of(model, budget)
    kept = [("v", layer) for layer in index.get("layer", ()) if "src" in index]
    with Progress(len(base), "prompt", progress) as bar:
        for batch in base.batches(lambda length, _: room.prompts_at_once(model, length, kept)):
            run, part = StreamRun(model, base, batch.ids, direction, needed(model, over, index)), batch.ids
            values[..., part] = run.split(over, index, {name: at[part] for name, at in named.items()}).to(values)
            totals[part], error = run.reading.value.to(totals), max(error, run.error)
            bar.update(len(batch))
    return to_result(
        values,
        coords,
        model,
        base,
        direction,
        technique="direct_logit_attribution",
        over=over,
        task=task,
        total=float(totals.mean()),
        residual_error=error,
        caution=CAUTION,
    )


def _chosen(
    model: HookedModel,
    prompts: Prompts,
    named: Mapping[str, Tensor],
    over: str,
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    neurons: Sequence[int] | None,
    positions: Sequence[Any] | None,
) -> dict[str, Sequence[Any]]:
    """The indices of each dim of `over` (names for `position`); none for components."""
    dims = () if over in ("component", "cumulative") else tuple(over.split())
    given = (("layers", layers, {"layer"}), ("heads", heads, {"head"}), ("neurons", neurons, {"neuron"}))
    for name, chosen, wanted in (*given, ("positions", positions, {"src", "position"})):
        if chosen is not None and not wanted & set(dims):
            raise ValueError(f"{name}: given, but {' or '.join(sorted(wanted))} is not among the dims {over!r}")
    index: dict[str, Sequence[Any]] = {}
    if dims:
        part = SITES["mlp_post" if "neuron" in dims else "z"]
        model.check_site(part.name)
        index["layer"] = choose_layers(model, part, layers)
    for site in ("pattern", "v") if {"src", "position"} & set(dims) else ():
        model.check_site(site, index["layer"])
    if "neuron" in dims and (lacking := [layer for layer in index["layer"] if mlp_weight(model, layer, "out") is None]):
        raise ValueError(
            f"over: the MLPs of {model.name} ({model.cfg.architecture}) have no single output matrix whose rows are neurons in "
            f"layers {', '.join(map(str, lacking))}, so they cannot be split; over='component' gives each MLP's total"
        )
    for dim in dims:
        if dim == "position":
            index[dim] = choose_positions(named, positions)
        elif dim == "src":
            index[dim] = choose_indices("positions", positions, int(prompts.lengths.max()))
        elif dim == "neuron":
            index[dim] = choose_indices("neurons", neurons, common_width(model, part, index["layer"]))
        elif dim == "head":
            index[dim] = choose_indices("heads", heads, model.n_heads)
    return index
