"""What only some architectures have: norms behind attention and MLP, learned positions, a final norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel

PostNorm = Literal["ln1_post", "ln2_post"]


def post_norm(model: HookedModel, layer: int, which: PostNorm = "ln1_post") -> Any | None:
    """The norm that a block applies to its attention's (`"ln1_post"`) or its MLP's output (`"ln2_post"`) before it is added
    (Gemma 2 and 3, OLMo 2); the module itself, without the bridge's hook points. `None` in other architectures."""
    bridge = getattr(model.stack.blocks[layer], which, None)
    return None if bridge is None else bridge.original_component


def into_post_norm(layer: int, which: PostNorm = "ln1_post") -> str:
    """The full name of the hook in front of that norm, where there is one."""
    return f"blocks.{layer}.{which}.hook_in"


def adds_positions(model: HookedModel) -> bool:
    """Whether positions are learned vectors that are added to the embedding (not rotations, nor a bias of the scores)."""
    kind = model.cfg.positional_embedding_type
    return bool(kind == "standard") and getattr(model.bridge, "pos_embed", None) is not None
