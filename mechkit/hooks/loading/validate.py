"""Checks that the hooked model computes what the Hugging Face model computes, and that its parts add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechkit._precision import ObservedDtypes, tolerance
from mechkit.hooks._record import record
from mechkit.hooks.loading.heads import heads_errors, record_heads
from mechkit.hooks.loading.probe import Probe
from mechkit.prompts import Stacked

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel

# The same for a float64 model that computes some of it in float32, as many do with norms, rotations or the softmax.
PARTLY_FLOAT32 = 1e-4
UNFAITHFUL = "This architecture is not computed faithfully"
CHANGED = (
    "They were the same when it was wrapped: one of the two was changed since (hooks that are on it; parameters that were "
    "exchanged, as by load_state_dict(assign=True); a module that was replaced, as for LoRA; a setting). Wrap it again with "
    "HookedModel.from_hf"
)


@dataclass(frozen=True)
class ValidationReport:
    """Largest differences found, each as a share of the largest value compared.

    Attributes:
        logits: Against the untouched Hugging Face model; `None` if there was none to compare with.
        heads: Σ heads + bias (times the block's multiplier, and through its norm on them, if it has these) against what the block
            adds to the residual stream, worst layer.
        padding: Prompts run alone against the same prompts padded on the left and on the right, with a mask.
        unembed: The logits read from the final residual stream against the model's own.
        tolerance: What each was allowed.
    """

    logits: float | None
    heads: float | None
    padding: float | None
    unembed: float
    tolerance: float


def check_logits(model: HookedModel, logits: Tensor, probe: Tensor, wrapped: bool = False) -> float:
    """The largest relative difference of logits from the Hugging Face model's; raises `ValueError` if it is not rounding.
    `wrapped` says that the two were compared before, and were the same then."""
    difference = _relative(logits, probe)
    if difference != difference and (where := _nonfinite_weight(model)) is not None:
        raise ValueError(
            f"model: expected finite weights; those of {model.name} hold NaN or infinite numbers, first in {where!r}. Is its "
            "file damaged?"
        )
    if not difference <= _allowed(model, difference) and (adapter := _adapter(model)) is not None:
        raise ValueError(
            f"model: with the adapter on {adapter!r} {model.name} ({model.cfg.architecture}) is not computed faithfully (logits "
            f"are off by {difference:.1e}). Merge it into the weights first (merge_and_unload() in peft)"
        )
    return _checked(model, "logits against the Hugging Face model", difference, CHANGED if wrapped else UNFAITHFUL)


def _nonfinite_weight(model: HookedModel) -> str | None:
    """The first parameter that holds a NaN or an infinite number."""
    for path, module in model.bridge.original_model.named_modules():
        for key in module._parameters:
            weight = getattr(module, key)  # which reads one that is not in memory, if it can be read
            if isinstance(weight, Tensor) and weight.device.type != "meta" and not bool(weight.isfinite().all()):
                return f"{path}.{key}".replace("._original_component", "")
    return None


def _adapter(model: HookedModel) -> str | None:
    """The first module that looks like an adapter library's layer."""
    modules = model.bridge.original_model.named_modules()
    return next((name for name, module in modules if hasattr(module, "base_layer") or "lora" in name.lower()), None)


@torch.no_grad()
def validate(model: HookedModel, probe: Probe | None, *, wrapped: bool = False) -> ValidationReport:
    """Runs all checks; `wrapped` is as for `check_logits`. Raises `ValueError` at the first that fails."""
    rows = (model._probe_rows() if probe is None else probe.rows).to(model.device)
    logits = model.run(rows)
    run = record(model, rows, blocks=False)
    of_logits = None if probe is None else check_logits(model, logits, probe.logits, wrapped)
    if probe is not None and probe.pictured is not None:
        pictured, expected = probe.pictured
        of_logits = max(of_logits or 0.0, check_logits(model, model.run(pictured), expected, wrapped))
    at = 0 if model.reads_pictures_alone else slice(None)
    unembedded = model.unembed(run.resid[-1][:, at]).reshape(logits.shape)
    return ValidationReport(
        logits=of_logits,
        heads=_check_heads(model, rows),
        padding=_check_padding(model, rows.tokens, logits),
        unembed=_checked(model, "logits read from the final residual", _relative(unembedded, logits)),
        tolerance=tolerance("heads", model.dtype),
    )


def _check_heads(model: HookedModel, rows: Stacked) -> float | None:
    if not model.has_site("result"):
        return None
    worst = 0.0
    for layer, error in heads_errors(model, record_heads(model, rows)[0]).items():
        if isinstance(error, str):
            raise ValueError(f"{model.name}: the heads of layer {layer} are not known: {error}")
        worst = max(worst, _checked(model, f"sum of heads in layer {layer}, and what the layer adds,", error))
    return worst


def _check_padding(model: HookedModel, tokens: Tensor, logits: Tensor) -> float | None:
    if getattr(model.cfg, "is_stateful", False) or model.reads_pictures_alone:
        return None  # a recurrent state reads its padding; mechkit never pads
    if model.n_ctx is not None and tokens.shape[1] > model.n_ctx - 3:
        return None  # no room for padding
    padding = torch.zeros(len(tokens), 3, dtype=tokens.dtype, device=tokens.device)
    ones, zeros = torch.ones_like(tokens), torch.zeros_like(padding)
    right = model.forward(torch.cat([tokens, padding], 1), attention_mask=torch.cat([ones, zeros], 1))[:, :-3]
    difference = _relative(right, logits)
    if model.dtype != torch.float64:  # there Hugging Face's own attention gives NaN on left padding: its mask overflows
        left = model.forward(torch.cat([padding, tokens], 1), attention_mask=torch.cat([zeros, ones], 1))[:, 3:]
        difference = max(difference, _relative(left, logits))
    return _checked(model, "logits of padded prompts", difference)


def _relative(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:  # several residual streams, say
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-9))


def _checked(model: HookedModel, what: str, difference: float, why: str = UNFAITHFUL) -> float:
    if not difference <= (allowed := _allowed(model, difference)):
        raise ValueError(
            f"{model.name}: {what} differ by {difference:.2e} of the largest value; expected at most "
            f"{allowed:.0e} in {model.dtype}. {why}"
        )
    return difference


def _allowed(model: HookedModel, difference: float) -> float:
    """What rounding explains, in the coarsest type that is computed in; looked for only where the model's own does not do."""
    allowed = tolerance("heads", model.dtype)
    if difference <= allowed or model.dtype != torch.float64:
        return allowed
    with torch.no_grad(), ObservedDtypes() as seen:
        model.run(model._probe_rows())
    return allowed if seen.coarsest(model.dtype) == torch.float64 else PARTLY_FLOAT32
