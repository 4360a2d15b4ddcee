"""The naive way: a whole forward pass for each cell and prompt, with TransformerLens's own hooks and none of mechkit's code.

Two sites need care. `resid_mid` is written in place, because Hugging Face blocks keep a second reference to it. The
attention sites are answered through `z`: edited scores or pattern times the values, which is what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechkit.hooks import SITES

KV_SITES = ("k", "v")


def activations(bridge: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Every activation of one run."""
    with torch.no_grad():
        return {name: value.clone() for name, value in bridge.run_with_cache(tokens)[1].items()}


@dataclass(frozen=True)
class Cell:
    """One head, position or neuron of a site in one layer; all of them where it is `None`."""

    layer: int
    head: int | None = None
    pos: int | None = None
    neuron: int | None = None

    def index(self, head_axis: bool = True) -> tuple[Any, ...]:
        """The part of an activation `[pos ...]`, or `[pos head ...]`."""
        heads = () if self.head is None or not head_axis else (self.head,)
        neurons = () if self.neuron is None else (..., self.neuron)
        return (slice(None) if self.pos is None else self.pos, *heads, *neurons)


def patched_logits(
    bridge: Any,
    base: Tensor,
    base_cache: dict[str, Tensor],
    source_cache: dict[str, Tensor],
    site: str,
    cells: Sequence[Cell],
) -> Tensor:
    """Logits `[cell pos d_vocab]` of the base prompt `[1 pos]`, each with one cell of a site replaced by the source run's.

    A cell is a row of one whole forward pass; nothing is shared between rows. `test_exact.py` compares rows with passes of one.
    """
    hooks = []
    for layer in sorted({cell.layer for cell in cells}):
        mine = [i for i, cell in enumerate(cells) if cell.layer == layer]
        hooks.append(_edit(bridge, base_cache, source_cache, site, layer, mine, [cells[i] for i in mine]))
    with torch.no_grad():
        return bridge.run_with_hooks(base.expand(len(cells), -1), fwd_hooks=hooks)


def _edit(
    bridge: Any,
    base_cache: dict[str, Tensor],
    source_cache: dict[str, Tensor],
    site: str,
    layer: int,
    rows: list[int],
    cells: list[Cell],
) -> tuple[str, Callable[..., Tensor]]:
    """The hook, with its name, that edits the cells of one layer, each in its own row."""
    where = f"blocks.{layer}."
    if site == "result":
        weight = bridge.blocks[layer].attn.W_O.detach()
        change = source_cache[where + "attn.hook_z"] - base_cache[where + "attn.hook_z"]
        by_head = torch.einsum("phd,hdm->phm", change[0], weight)

        def edit(x: Tensor, hook: Any) -> Tensor:
            difference = torch.zeros_like(x)
            for row, cell in zip(rows, cells, strict=True):
                written, at = (
                    by_head.sum(1) if cell.head is None else by_head[:, cell.head],
                    cell.index(head_axis=False),
                )
                difference[row, *at] = written[at]
            return x + difference

        return where + "attn.o.hook_out", edit
    if site in ("pattern", "attn_scores"):
        z = torch.stack([_z_of_edited_attention(base_cache, source_cache, layer, cell) for cell in cells])

        def edit(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[rows] = z
            return x

        return where + "attn.hook_z", edit
    name = SITES[site].hook_name(layer)

    def edit(x: Tensor, hook: Any) -> Tensor:
        for row, cell in zip(rows, cells, strict=True):
            x[row, *cell.index()] = source_cache[name][0][cell.index()]
        return x

    return name, edit


def _z_of_edited_attention(base: dict[str, Tensor], source: dict[str, Tensor], layer: int, cell: Cell) -> Tensor:
    """`z` `[pos head d]` with a pattern (or the softmax of scores) taken from the source run at one head or position."""
    where = f"blocks.{layer}.attn."
    pattern, v = base[where + "hook_pattern"][0].clone(), base[where + "hook_v"][0]
    at = (slice(None) if cell.head is None else cell.head, slice(None) if cell.pos is None else cell.pos)
    # The source run's own pattern is the softmax of its scores, so that both sites replace the pattern's row.
    pattern[at] = source[where + "hook_pattern"][0][at]
    v = v.repeat_interleave(pattern.shape[0] // v.shape[1], dim=1)
    return torch.einsum("hqk,khd->qhd", pattern, v)
