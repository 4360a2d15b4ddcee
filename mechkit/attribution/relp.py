"""RelP: attribution patching with the gradient replaced by a relevance coefficient (layer-wise relevance propagation).

A gradient says how the metric changes for an infinitely small step. Patching takes a large one, and the local slope of a norm,
an activation function or a product is a poor guide to it. Relevance propagation goes back with other coefficients: a norm's scale
is held fixed, an activation function goes by y / x, a product gives each factor half, and attention keeps its gradient or its
patterns are held fixed (`mechkit.experiment.relevance` has the rules).

With patterns frozen, a network without biases is accounted for in full, as a linear one is: coefficients times activations sum
to the metric at every depth. But a circuit that works by moving attention, as IOI's does, is then invisible. The rest is
`attribution_patching`: `effect = sum((source - base) * coefficient)`, one backward pass. Whether that is better than a gradient
depends on the model: `compare` it (on SmolLM2's IOI it is not, see the README).

Jafari et al. 2025, https://arxiv.org/abs/2508.21258; Achtibat et al. 2024 (AttnLRP), https://arxiv.org/abs/2402.05602.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mechkit._check import checked
from mechkit.engine import frozen_parameters
from mechkit.experiment.axes import Chosen
from mechkit.experiment.estimates import AnyMetric, check_one_site, make_experiment
from mechkit.experiment.passes import first_order
from mechkit.experiment.patches import takes_patches
from mechkit.experiment.relevance import relevance_rules
from mechkit.hooks import HookedModel, get_site, one_at_a_time
from mechkit.prompts import PromptPairs
from mechkit.result import Result


@checked
@one_at_a_time
@takes_patches
def relp(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    site: str = "z",
    over: str = "layer head",
    *,
    attention: Literal["gradient", "frozen"] = "gradient",
    direction: Literal["denoise", "noise"] = "denoise",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | Sequence[str] | None = None,
    neurons: Sequence[int] | None = None,
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """Estimates the metric after patching each node, with relevance coefficients in place of gradients.

    Args:
        model, pairs, metric, site, over, direction, layers, heads, positions, neurons: As for `attribution_patching`.
        budget, progress: As for `attribution_patching`.
        attention: What flows back through attention patterns: their `"gradient"`, or nothing (`"frozen"`).

    Returns:
        A `Result` like `attribution_patching`'s, dims `(*over, "prompt")`.

    Raises:
        ValueError: as `attribution_patching`; `site` is a query, key, score or pattern and these are frozen; a mixture of
            experts, for whose routing there is no rule; a norm that is neither a LayerNorm nor an RMSNorm.
    """
    check_one_site(site)
    if attention not in ("gradient", "frozen"):
        raise ValueError(f"attention: expected 'gradient' or 'frozen', got {attention!r}")
    if attention == "frozen" and get_site(site).name in ("q", "k", "attn_scores", "pattern"):
        raise ValueError(
            f"site: relevance does not flow through attention patterns, which are held fixed, so that {site!r} would get 0 "
            "everywhere; use attention='gradient', atp_star (its QK fix), or activation_patching"
        )
    chosen: Chosen = {"layers": layers, "heads": heads, "positions": positions, "neurons": neurons}
    about = {"technique": "relp", "attention": attention}
    experiment = make_experiment(model, pairs, metric, site, over, direction, chosen, budget, progress, about)
    with frozen_parameters(model):
        for chunk in experiment.chunks():
            with relevance_rules(model, attention):
                first_order(experiment, chunk)
    return experiment.result(next(iter(experiment.axes)))
