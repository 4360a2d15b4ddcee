"""Attribution patching: activation patching's answer for every node at once, to first order, from one backward pass.

1. Run the source prompts and keep the activations of the chosen sites.
2. Run the base prompts with gradients, and take the difference at each site: `source - base`.
3. One backward pass. Where the gradient of the metric arrives at a site: `effect = sum(difference * gradient)` over what the
   node holds. That is the first term of the Taylor series of what `activation_patching` computes exactly.

How good the first term is depends on the model and the site. It is poor where a softmax is saturated, where effects cancel,
and for large changes (early residual stream). `compare` says how far to trust it here, `verify` replaces the strongest cells
by exact ones, and `integrated_gradients`, `atp_star` and `relp` are better approximations at a higher price.

Nanda 2023, https://www.neelnanda.io/mechanistic-interpretability/attribution-patching; Syed et al. 2023,
https://arxiv.org/abs/2310.10348.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Unpack, overload

from mechkit._check import checked
from mechkit.engine import frozen_parameters
from mechkit.experiment.axes import Chosen
from mechkit.experiment.estimates import AnyMetric, make_experiment
from mechkit.experiment.packed import first_order_packed
from mechkit.experiment.passes import first_order
from mechkit.experiment.patches import takes_patches
from mechkit.hooks import HookedModel, one_at_a_time
from mechkit.prompts import PromptPairs
from mechkit.result import Result


class Options(Chosen, total=False):
    """The arguments that mean the same for one site and for several."""

    direction: Literal["denoise", "noise"]
    budget: int | None
    progress: bool


@overload
def attribution_patching(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    site: str = ...,
    over: str = ...,
    **options: Unpack[Options],
) -> Result: ...
@overload
def attribution_patching(
    model: HookedModel, pairs: PromptPairs, metric: AnyMetric, site: Mapping[str, str], **options: Unpack[Options]
) -> dict[str, Result]: ...
@checked
@one_at_a_time
@takes_patches
def attribution_patching(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    site: str | Mapping[str, str] = "z",
    over: str = "layer head",
    *,
    direction: Literal["denoise", "noise"] = "denoise",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | Sequence[str] | None = None,
    neurons: Sequence[int] | None = None,
    budget: int | None = None,
    progress: bool = True,
) -> Result | dict[str, Result]:
    """Estimates, for every node at once, the metric after patching it from the source run into the base run.

    Args:
        model: In evaluation mode. Its parameters are frozen meanwhile and get no gradient.
        pairs: Clean and corrupted prompts, of any lengths.
        metric: A differentiable metric, or a callable `[batch pos d_vocab] -> [batch]` for prompts of one length.
        site: What is patched, by any name that `activation_patching` knows; or several with their own `over`, such as
            `{"z": "layer head", "mlp_out": "layer"}`, all from the same backward pass.
        over: As for `activation_patching`.
        direction: `"denoise"`: gradient at the corrupted run, differences towards the clean run. `"noise"`: the reverse.
        layers, heads, positions, neurons: Restrict these dims.
        budget: Bytes for activations kept for the backward pass; default half of what the device has free (1 GiB on a CPU).
        progress: Show a progress bar when it takes long.

    Returns:
        A `Result` like `activation_patching`'s, dims `(*over, "prompt")`: its values are the base run's metric plus the
        estimated effect, so that `effect()` and `normalized()` mean the same. A dict of them, by site, for several sites.

    Raises:
        ValueError: a metric without a gradient or that gives one number for all prompts; an unknown site or dim; training
            mode; NaN in a run.
    """
    chosen: Chosen = {"layers": layers, "heads": heads, "positions": positions, "neurons": neurons}
    about = {"technique": "attribution_patching"}
    experiment = make_experiment(model, pairs, metric, site, over, direction, chosen, budget, progress, about, True)
    experiment.defer_proof = True
    with frozen_parameters(model):
        if left := first_order_packed(experiment):
            for chunk in experiment.chunks(left):
                first_order(experiment, chunk)
    results = {name: experiment.result(name) for name in experiment.axes}
    return results if isinstance(site, Mapping) else results[next(iter(results))]
