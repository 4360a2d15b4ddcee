"""Where a NaN or an inf began: the first activation of a forward pass that holds one.

1. The whole prompt is run once more, by itself, with the edits of its cell attached if it was an edited run.
2. Every site of the model is checked when it is computed, and so is what each block reads, the final norm's output
   and the logits. Edits of a site take effect before it is checked.
3. The first that holds a NaN or an inf is named: site, layer, positions, heads. What it was made from was finite, so the
   cause (weights or overflow) is between that activation and the one before.

Masked attention scores are -inf, or the dtype's lowest number, by design. A row of scores counts only where its softmax
would not be finite: if it holds a NaN or +inf, or if nothing in it is left unmasked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mechkit.hooks._hooking import Hooks
from mechkit.hooks._sites import SITES
from mechkit.prompts import Stacked

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel

Attach = Callable[[Hooks], None]  # attaches a cell's edits
LISTED = 5  # positions and heads that are listed one by one

BLOCK_INPUT, FINAL_NORM, LOGITS = "block input", "final norm", "logits"


@dataclass(frozen=True)
class NonFinite:
    """The first activation of a forward pass that holds a NaN or an inf.

    Attributes:
        site: A site's short name, or `"block input"`, `"final norm"` or `"logits"`.
        layer: Its layer; `None` outside the blocks.
        kind: `"NaN"`, `"inf"`, or `"NaN and inf"` (an infinity often becomes NaN within the same sum).
        positions: Where (destinations for `attn_scores` and `pattern`).
        heads: In which heads; `None` for a site without heads.
        n_heads: How many heads the site has.
    """

    site: str
    layer: int | None
    kind: str
    positions: tuple[int, ...]
    heads: tuple[int, ...] | None = None
    n_heads: int = 0

    def __str__(self) -> str:
        place = self.site if self.layer is None else f"{self.site} of layer {self.layer}"
        heads = ""
        if self.heads is not None:
            heads = ", all heads" if len(self.heads) == self.n_heads else f", {_listed('head', self.heads)}"
        return f"{self.kind} in {place}{heads}, {_listed('position', self.positions)}"


def first_nonfinite(
    model: HookedModel, prompt: Stacked, attach: Attach | None = None, result_layers: tuple[int, ...] = ()
) -> NonFinite | None:
    """Runs one prompt and returns the first activation that holds a NaN or an inf; `None` if all are finite.

    Args:
        model: The model; hooks that others attached to it stay, and take part.
        prompt: The prompt, as one row.
        attach: Attaches edits. They come first, so that what they write is seen.
        result_layers: Layers whose `result` is looked at too (it is large, so only where it is edited).
    """
    found: list[NonFinite] = []

    def look(site: str, layer: int | None, activation: Any) -> None:
        if not found and isinstance(activation, Tensor) and (what := _describe(site, layer, activation)) is not None:
            found.append(what)

    def look_at_site(name: str, layer: int | None) -> Callable[..., None]:
        return lambda activation, hook: look(name, layer, activation)

    def look_at_input(layer: int) -> Callable[..., None]:
        return lambda _, args, kwargs: look(BLOCK_INPUT, layer, args[0] if args else kwargs.get("hidden_states"))

    bridge, handles = model.bridge, []
    with torch.no_grad(), Hooks(bridge) as hooks:
        if attach is not None:
            attach(hooks)
        for name in [name for stack in model.stacks.values() for name in stack.site_names]:
            layers = model.layers_with(name) if SITES[name].in_block else [None]
            for layer in layers if name != "result" else result_layers:
                hooks.attach(SITES[name].hook_name(layer), look_at_site(name, layer))
        try:
            for layer, block in enumerate(bridge.blocks):
                handles.append(block.register_forward_pre_hook(look_at_input(layer), with_kwargs=True))
            if getattr(bridge, "ln_final", None) is not None:
                handles.append(bridge.ln_final.register_forward_hook(lambda _, args, out: look(FINAL_NORM, None, out)))
            look(LOGITS, None, model.run(prompt))
        finally:
            for handle in handles:
                handle.remove()
    return found[0] if found else None


def where_it_began(model: HookedModel, prompt: Stacked) -> str:
    """The end of an error about an unedited run that is not finite: where that began, and how to fix it."""
    return explanation(first_nonfinite(model, prompt), model.dtype)


def explanation(found: NonFinite | None, dtype: torch.dtype) -> str:
    """The same, from what `first_nonfinite` found."""
    if found is None:
        return (
            "every activation and all logits of this prompt run by itself are finite, so that the metric is not finite of its "
            "own, or overflows only beside other prompts; use a metric that stays finite, or try dtype=torch.float32"
        )
    return f"the first is {found}; everything computed before that is finite. {_remedy(found, dtype)}"


def _remedy(found: NonFinite, dtype: torch.dtype) -> str:
    if dtype == torch.float16 and "inf" in found.kind:
        return "float16 ends at 65504: load the model with dtype=torch.bfloat16 or torch.float32"
    return "Either the weights there (or what an edit writes there) are not finite, or the dtype overflows"


def _describe(site: str, layer: int | None, activation: Tensor) -> NonFinite | None:
    """What is not finite in an activation `[1, *dims]`."""
    dims = SITES[site].dims if site in SITES else ("pos", "d_model")
    bad = _bad_scores(activation) if site.endswith("attn_scores") else ~torch.isfinite(activation)
    if not bool(bad.any()):
        return None
    blamed = activation[bad]
    nan, inf = bool(blamed.isnan().any()), bool(blamed.isinf().any())
    where = bad.reshape(-1, *bad.shape[-len(dims) :])[0] if bad.ndim > len(dims) else bad
    heads = _indices(where, dims.index("head")) if "head" in dims and where.ndim == len(dims) else None
    n_heads = where.shape[dims.index("head")] if heads is not None else 0
    kind = "NaN and inf" if nan and inf else "NaN" if nan else "inf"
    return NonFinite(site, layer, kind, _indices(where, dims.index("pos")), heads, n_heads)


def _bad_scores(scores: Tensor) -> Bool[Tensor, "batch head dest src"]:
    """Scores whose row has no finite softmax. Masked ones are as low as the dtype goes, or -inf."""
    broken = scores.isnan() | scores.isposinf()
    lowest = torch.finfo(scores.dtype).min / 2
    nothing_left = (scores <= lowest).all(-1, keepdim=True) & scores.isneginf()
    return broken | nothing_left


def _indices(where: Tensor, axis: int) -> tuple[int, ...]:
    others = [i for i in range(where.ndim) if i != axis]
    return tuple(where.movedim(axis, 0).flatten(1).any(1).nonzero().flatten().tolist() if others else where.nonzero())


def _listed(what: str, where: tuple[int, ...]) -> str:
    if len(where) == 1:
        return f"{what} {where[0]}"
    listed = ", ".join(map(str, where[:LISTED]))
    return f"{what}s {listed}{f' and {len(where) - LISTED} more' if len(where) > LISTED else ''}"
