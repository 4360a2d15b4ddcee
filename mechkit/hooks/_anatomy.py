"""What an architecture has, beside what all of them have: norms behind attention and MLP, learned positions, a final norm,
logits that are that norm's output unembedded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mechkit.hooks._precision import TOLERANCE

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel
    from mechkit.hooks._replay import Run

PostNorm = Literal["ln1_post", "ln2_post"]


def post_norm(model: HookedModel, layer: int, which: PostNorm = "ln1_post") -> Any | None:
    """The norm that a block applies to its attention's (`"ln1_post"`) or its MLP's output (`"ln2_post"`) before it is added
    (Gemma 2 and 3, OLMo 2); the module itself, without the bridge's hook points. `None` in other architectures."""
    bridge = getattr(model.bridge.blocks[layer], which, None)
    return None if bridge is None else bridge.original_component


def into_post_norm(layer: int, which: PostNorm = "ln1_post") -> str:
    """The full name of the hook in front of that norm, where there is one."""
    return f"blocks.{layer}.{which}.hook_in"


def adds_positions(model: HookedModel) -> bool:
    """Whether positions are learned vectors that are added to the embedding (not rotations, nor a bias of the scores)."""
    kind = model.cfg.positional_embedding_type
    return bool(kind == "standard") and getattr(model.bridge, "pos_embed", None) is not None


def has_final_norm(model: HookedModel) -> bool:
    """Whether there is a norm between the residual stream and the unembedding."""
    return getattr(model.bridge, "ln_final", None) is not None


def unembeds_final_stream(model: HookedModel, run: Run) -> bool:
    """Whether `model.unembed` of a run's final residual stream gives the model's own logits (encoders have more in between)."""
    if not has_final_norm(model):
        return False
    found, own = model.unembed(run.resid[-1][:1, -1]), run.last_logits[:1]
    own = own.to(found.device)
    if found.shape != own.shape:
        return False
    spread = (own - own.mean()).abs().max().clamp(min=1e-12)
    return float((found - own).abs().max() / spread) <= TOLERANCE[model.dtype]
