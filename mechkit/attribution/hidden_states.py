"""Hidden states: what one site holds at one position of many prompts, at every layer.

1. Run the prompts of each length together; nothing is padded.
2. Keep one position of each prompt at every layer: the last one, another index, or a named position.

The numbers are those of `model.run_with_cache` on the same batches, bit for bit. Half precision is widened to float32, as in
every `Result`, which changes no number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mechkit._check import checked
from mechkit._progress import Progress
from mechkit.engine import Budget, check_can_run
from mechkit.experiment.axes import choose_indices
from mechkit.experiment.positions import place_in_every, split_prompts
from mechkit.experiment.provenance import provenance_of
from mechkit.hooks import SITES, HookedModel, get_site, one_at_a_time, parse_hook_name, record
from mechkit.hooks._capture import capture
from mechkit.hooks._nonfinite import where_it_began
from mechkit.prompts import AnyPrompts, Stacked, as_prompts
from mechkit.result import Cost, Result

_SITES = tuple(
    name for name, site in SITES.items() if site.in_block and site.dims == ("pos", "d_model") and site.stack == "text"
)


@checked
@one_at_a_time
@torch.no_grad()
def hidden_states(
    model: HookedModel,
    prompts: AnyPrompts,
    *,
    site: str = "resid_post",
    layers: Sequence[int] | None = None,
    position: int | str = -1,
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """The hidden states of many prompts at one position, for `mk.plot.hidden` and for probes.

    Args:
        model: In evaluation mode.
        prompts: Of any lengths. Of pairs, the clean prompts.
        site: `"resid_pre"`, `"resid_mid"`, `"resid_post"`, or what a layer adds to the stream: `"attn_out"`, `"mlp_out"`.
        layers: Which layers; by default all.
        position: An index into each prompt (-1 is the last token), or the name of one of the pairs' positions.
        budget: Bytes of working memory; default half of what the device has free (1 GiB on a CPU).
        progress: Show a progress bar when it takes long.

    Returns:
        A `Result` with dims `("layer", "d_model", "prompt")` and no baseline.

    Raises:
        ValueError: an unknown site, layer or position, a position that a prompt does not have, training mode, or activations that
            are not finite.

    Example:
        >>> states = hidden_states(model, pairs, position="S2")
    """
    prompts = as_prompts(model, prompts)
    found, named_layer = get_site(site), parse_hook_name(site)[1]
    if found.name not in _SITES:
        raise ValueError(f"site: expected one of {', '.join(_SITES)}, got {site!r}")
    if named_layer is not None:  # a full hook name means its own layer
        if layers is not None and list(layers) != [named_layer]:
            raise ValueError(
                f"layers: {site!r} is in layer {named_layer}; leave layers out, or use site={found.name!r}"
            )
        layers = [named_layer]
    base, named, task = split_prompts(prompts)
    check_can_run(model, {"prompt": base})
    chosen = choose_indices("layers", layers, model.n_layers)
    names = model.hook_names([(found.name, layer) for layer in chosen])  # raises if this architecture lacks the site
    at = place_in_every(base, named, position)
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    values = torch.empty(len(chosen), model.d_model, len(base), dtype=wide)
    room, sites = Budget.of(model, budget), [(found.name, layer) for layer in chosen]
    with Progress(len(base), "prompt", progress) as bar:
        for batch in base.batches(lambda length, _: room.prompts_at_once(model, length, sites)):
            ids, rows = batch.ids, batch.stacked.to(model.device)
            for i, kept in enumerate(_run(model, rows, names, at[ids])):
                if len(bad := (~kept.isfinite()).any(-1).nonzero().flatten().tolist()):
                    raise ValueError(
                        f"model: expected finite activations, got NaN or inf in {names[i]} of prompts "
                        f"{[ids[j] for j in bad[:5]]}; of prompt {ids[bad[0]]} {where_it_began(model, rows[[bad[0]]])}"
                    )
                values[i][:, ids] = kept.T.to(values)
            bar.update(len(ids))
    block_tokens = int(base.lengths.sum()) * model.n_layers
    return Result(
        values=values,
        dims=("layer", "d_model", "prompt"),
        coords={"layer": tuple(chosen), "d_model": tuple(range(model.d_model)), "prompt": tuple(range(len(base)))},
        baseline={},
        base="",
        metric=found.name,
        unit="activation",
        provenance=provenance_of(
            model, base, technique="hidden_states", site=found.name, position=position, over="layer d_model", task=task
        ),
        cost=Cost(block_tokens, block_tokens),
    )


def _run(model: HookedModel, prompts: Stacked, names: Sequence[str], at: Int[Tensor, "prompt"]) -> list[Tensor]:
    """`[prompt d_model]` for each hook name. One position is unembedded, not all."""

    def at_position(activation: Tensor, name: str) -> Tensor:
        rows = torch.arange(len(prompts), device=activation.device)
        return activation.expand(len(prompts), *activation.shape[1:])[rows, at.to(activation.device)]

    with capture(model, names, at_position) as kept:
        record(model, prompts, blocks=False)
    return [kept[name] for name in names]
