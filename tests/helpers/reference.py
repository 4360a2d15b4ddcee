"""The naive way: one whole forward pass a cell and prompt, with TransformerLens's own hooks and none of mechkit's code.

Two sites need care. `resid_mid` is written in place, because Hugging Face blocks keep a second reference to it. The
attention sites are answered through `z`: edited scores or pattern times the values, which is what they mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechkit.hooks import SITES

KV_SITES = ("k", "v")


def activations(bridge: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Every activation of one run."""
    with torch.no_grad():
        return {name: value.clone() for name, value in bridge.run_with_cache(tokens)[1].items()}


def patched_logits(
    bridge: Any,
    base: Tensor,
    base_cache: dict[str, Tensor],
    source_cache: dict[str, Tensor],
    site: str,
    layer: int,
    head: int | None,
    pos: int | None,
    neuron: int | None = None,
) -> Tensor:
    """Logits `[pos d_vocab]` of the base prompt `[1 pos]` with one activation replaced by the source run's."""
    where = f"blocks.{layer}."
    at_pos = slice(None) if pos is None else pos
    at_head = slice(None) if head is None else head
    if site == "result":
        weight = bridge.blocks[layer].attn.W_O
        change = source_cache[where + "attn.hook_z"] - base_cache[where + "attn.hook_z"]
        difference = torch.einsum("bphd,hdm->bphm", change, weight)[:, at_pos, at_head]
        difference = difference.sum(-2) if head is None else difference

        def edit(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[:, at_pos] += difference
            return x

        return _run(bridge, base, where + "attn.o.hook_out", edit)
    if site in ("pattern", "attn_scores"):
        z = _z_of_edited_attention(bridge, base_cache, source_cache, site, layer, head, pos)

        def edit(x: Tensor, hook: Any) -> Tensor:
            return z

        return _run(bridge, base, where + "attn.hook_z", edit)
    name = SITES[site].hook_name(layer)
    index: list[Any] = [slice(None)] * base_cache[name].ndim
    index[1] = at_pos
    if head is not None:
        index[2] = head
    if neuron is not None:
        index[-1] = neuron

    def edit(x: Tensor, hook: Any) -> Tensor:
        x[tuple(index)] = source_cache[name][tuple(index)]
        return x

    return _run(bridge, base, name, edit)


def _z_of_edited_attention(
    bridge: Any,
    base: dict[str, Tensor],
    source: dict[str, Tensor],
    site: str,
    layer: int,
    head: int | None,
    pos: int | None,
) -> Tensor:
    """`z` `[1 pos head d]` with a pattern (or the softmax of scores) taken from the source run at one head or position."""
    where = f"blocks.{layer}.attn."
    pattern, v = base[where + "hook_pattern"].clone(), base[where + "hook_v"]
    at_pos = slice(None) if pos is None else pos
    at_head = slice(None) if head is None else head
    # The source run's own pattern is the softmax of its scores, so that both sites replace the pattern's row.
    pattern[:, at_head, at_pos] = source[where + "hook_pattern"][:, at_head, at_pos]
    v = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
    return torch.einsum("bhqk,bkhd->bqhd", pattern, v)


def _run(bridge: Any, tokens: Tensor, name: str, edit: Any) -> Tensor:
    with torch.no_grad():
        return bridge.run_with_hooks(tokens, fwd_hooks=[(name, edit)])[0]
