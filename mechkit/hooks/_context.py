"""How long a prompt may be.

A configuration names the length that a model's positions were made for. Where positions are a table (learned ones, or angles
computed beforehand), a longer prompt has no positions there; rotary models and those without positions accept it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# Names that configurations have for it.
_NAMES = ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
_TABLES = ("embed_positions",)  # buffers: GPT-J, CodeGen
_EXTRA = 2  # OPT's table has two rows more than positions


def context_of(config: Any) -> int | None:
    """The context's length that a Hugging Face configuration (or TransformerLens's) names, if it names one."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(config, name, None) for name in _NAMES)
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def longest_prompt(bridge: Any) -> int | None:
    """The most tokens that a bridge's model has positions for; `None` if it runs on longer prompts too."""
    model = bridge.original_model
    n = context_of(getattr(model, "config", bridge.cfg))
    if n is None:
        return None
    standard = getattr(bridge.cfg, "positional_embedding_type", None) == "standard"
    learned = standard and any(
        isinstance(module, nn.Embedding) and n <= module.num_embeddings <= n + _EXTRA for module in model.modules()
    )
    table = any(name in module._buffers for module in model.modules() for name in _TABLES)
    biases = getattr(getattr(model, "config", None), "model_type", "") == "mpt"  # made for so many positions
    return n if learned or table or biases or not hasattr(model, "config") else None


def check_length(model: Any, n: int, what: str) -> None:
    """Raises `ValueError` for more tokens than the model has positions for.

    Args:
        model: The `HookedModel`.
        n: How many tokens will be run.
        what: What the error calls them.
    """
    context = model.n_ctx
    if context is None or n <= context:
        return
    longest = longest_prompt(model.bridge)
    if longest is not None and n > longest:
        raise ValueError(
            f"{what}: expected at most {longest} tokens, the model's context (n_ctx: it has no positions beyond), got {n}. "
            "Give it shorter prompts or fewer new tokens"
        )
