"""Whether heads sum to what their block adds to the residual stream. Checked when a model is loaded, and by `validate`.

1. `z W_O` of all heads and the bias must be what the output projection gives.
2. That, times the block's multiplier (Granite) and through the norm behind the attention (Gemma 2 and 3, OLMo 2), must be what
   the block adds to the stream, not a multiple of it. A block that does not add (BERT norms the sum) is exempt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._precision import tolerance
from mechkit.hooks._capture import capture
from mechkit.hooks._hooking import hook_points
from mechkit.hooks._parts import Parts
from mechkit.hooks._projections import head_bias, head_weight
from mechkit.hooks._sites import SITES
from mechkit.prompts import Stacked

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel

_NAMES = {site: SITES[site].hook for site in ("resid_pre", "attn_out", "mlp_out", "resid_mid", "resid_post")}
_NAMES |= {"z": "blocks.{layer}.attn.o.hook_in", "heads": "blocks.{layer}.attn.o.hook_out"}


Recorded = dict[int, dict[str, Tensor]]  # layer -> site -> activation


@torch.no_grad()
def heads_errors(model: HookedModel, recorded: Recorded) -> dict[int, float | str]:
    """For each layer with heads how far they are from what its attention adds, as a share of the largest entry; or, where that
    cannot be computed, why. `recorded` is what `record_heads` gives."""
    parts = Parts(model)
    errors: dict[int, float | str] = {}
    for layer, sites in recorded.items():
        if not {"z", "heads", "attn_out"} <= set(sites):
            continue
        try:
            errors[layer] = _error(parts, layer, sites)
        except ValueError as error:
            errors[layer] = str(error).removeprefix("model: ")
        except (RuntimeError, NotImplementedError, AttributeError):  # not attention as it is known here
            errors[layer] = "its attention has no output projection that can be split by head"
    return errors


def why_not_heads(model: HookedModel, recorded: Recorded) -> dict[int, str]:
    """For each layer whose heads are not what its block adds to the stream, why."""
    found = {}
    for layer, error in heads_errors(model, recorded).items():
        if isinstance(error, str):
            found[layer] = error
        elif not error <= tolerance("heads", model.dtype):
            found[layer] = (
                f"the heads of layer {layer} differ from what its block adds by {error:.1e} of the largest entry"
            )
    return found


@torch.no_grad()
def record_heads(
    model: HookedModel, rows: Stacked | Int[Tensor, "prompt pos"]
) -> tuple[Recorded, Float[Tensor, "prompt pos d_vocab"]]:
    """What heads are compared on, and the logits, of one forward pass."""
    points = hook_points(model.bridge)
    places = {
        template.format(layer=layer): (layer, site)
        for layer in range(model.n_layers)
        for site, template in _NAMES.items()
        if site not in SITES or model.has_site(site, layer)
    }
    with capture(model, [name for name in places if name in points], partly=True) as kept:
        logits = model.run(rows)
    found: dict[int, dict[str, Tensor]] = {layer: {} for layer in range(model.n_layers)}
    for name, activation in kept.items():
        layer, site = places[name]
        found[layer][site] = activation
    return found, logits


def _error(parts: Parts, layer: int, sites: Mapping[str, Tensor]) -> float:
    model, output = parts.model, sites["attn_out"]
    z = sites["z"].reshape(*output.shape[:-1], model.n_heads, -1)
    together, bias = torch.einsum("...hd,hdm->...m", z, head_weight(model, layer, "o")), head_bias(model, layer, "o")
    error = _relative(together if bias is None else together + bias, sites["heads"].reshape(output.shape))
    if (factor := _added(sites)) is None:
        return error
    written = parts.heads(layer, z).sum(-2) + parts.written_by_bias(layer, z)
    return max(error, _relative(written, output), abs(factor - 1))


def _added(sites: Mapping[str, Tensor]) -> float | None:
    """By which factor the block adds its attention's output; `None` where it adds something else, or that is not known."""
    output, before = sites["attn_out"], sites.get("resid_pre")
    after = sites.get("resid_mid", sites.get("resid_post"))
    if before is None or after is None:
        return None
    added = (after - before).double()
    if "resid_mid" not in sites and "mlp_out" in sites:
        added = added - sites["mlp_out"].double()
    output = output.double()
    size = float(output.pow(2).sum())
    if size == 0:
        return None
    factor = float((added * output).sum()) / size
    is_multiple = float((added - factor * output).abs().max()) <= 0.01 * float(added.abs().max())
    return factor if is_multiple else None


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-9))
