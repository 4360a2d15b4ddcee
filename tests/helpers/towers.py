"""An oracle for sites in vision towers: models of transformers as they come, with PyTorch's hooks on their own modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import mechkit as mk
from helpers.vlm import Oracle

N_HEADS = 3
SITES = ("resid_pre", "q", "k", "v", "z", "attn_out", "mlp_pre", "mlp_post", "mlp_out", "resid_post")
BLOCKS: dict[str, Callable[[Any], Any]] = {
    "llava": lambda hf: hf.model.vision_tower.encoder.layers,
    "llava_next": lambda hf: hf.model.vision_tower.encoder.layers,
    "llava_onevision": lambda hf: hf.model.vision_tower.encoder.layers,
    "gemma3": lambda hf: hf.model.vision_tower.encoder.layers,
    "idefics3": lambda hf: hf.model.vision_model.encoder.layers,
    "qwen2_5_vl": lambda hf: hf.model.visual.blocks,
    "qwen3_vl": lambda hf: hf.model.visual.blocks,
}


class TowerOracle:
    """One prompt at a time: each run is a whole forward pass of the untouched model."""

    def __init__(self, family: str, hf: Any) -> None:
        self.oracle, self.blocks, self.flat = Oracle(hf), BLOCKS[family](hf), "qwen" in family

    def place(self, site: str, layer: int) -> tuple[Any, str, slice]:
        """The module, the side of it, and which entries of the last axis."""
        block = self.blocks[layer]
        attention, mlp, everything = (block.attn if self.flat else block.self_attn), block.mlp, slice(None)
        if self.flat and site in ("q", "k", "v"):
            width = attention.proj.in_features
            i = "qkv".index(site)
            return attention.qkv, "out", slice(i * width, (i + 1) * width)
        into = getattr(mlp, "fc1", None) or getattr(mlp, "linear_fc1", None) or mlp.gate_proj
        out_of = getattr(mlp, "fc2", None) or getattr(mlp, "linear_fc2", None) or mlp.down_proj
        return {
            "resid_pre": (block, "in", everything),
            **{name: (getattr(attention, f"{name}_proj", None), "out", everything) for name in "qkv"},
            "z": (attention.proj if self.flat else attention.out_proj, "in", everything),
            "attn_out": (attention, "out", everything),
            "mlp_pre": (into, "out", everything),
            "mlp_post": (out_of, "in", everything),
            "mlp_out": (mlp, "out", everything),
            "resid_post": (block, "out", everything),
        }[site]

    def activations(self, prompts: mk.Prompts, i: int) -> dict[tuple[str, int], Tensor]:
        """`(site, layer)` -> `[position, entries]`, the positions of all tiles in one row."""
        kept: dict[tuple[str, int], Tensor] = {}

        def keep(key: tuple[str, int], part: slice) -> Callable[[Tensor], Tensor]:
            def fn(x: Tensor) -> Tensor:
                kept[key] = x[..., part].reshape(-1, x[..., part].shape[-1]).clone()
                return x

            return fn

        hooks = []
        for layer in range(len(self.blocks)):
            for site in SITES:
                module, side, part = self.place(site, layer)
                hooks.append((module, side, keep((site, layer), part)))
        self.run(prompts, i, hooks)
        return kept

    def patched(
        self,
        prompts: mk.Prompts,
        i: int,
        there: Tensor,
        site: str,
        layer: int,
        places: Sequence[tuple[int | None, int | None]],
    ) -> Tensor:
        """The last position's logits `[place d_vocab]` of runs in which one place each holds what `there` has at it."""
        module, side, part = self.place(site, layer)

        def edit(x: Tensor) -> Tensor:
            rows = x.reshape(len(places), -1, x.shape[-1]).clone()
            width = there.shape[-1] // N_HEADS
            for row, (pos, head) in zip(rows, places, strict=True):
                chosen = row[:, part].clone()
                entries = slice(None) if head is None else slice(head * width, (head + 1) * width)
                at = slice(None) if pos is None else pos
                chosen[at, entries] = there[at, entries]
                row[:, part] = chosen
            return rows.reshape(x.shape)

        return self.run(prompts, i, [(module, side, edit)], len(places))

    def slopes(self, prompts: mk.Prompts, i: int, weights: Tensor, site: str, layer: int) -> Tensor:
        """The gradient of `weights` times the last position's logits at a site, `[position, entries]`, by autograd."""
        module, side, part = self.place(site, layer)
        leaves: list[Tensor] = []

        def add(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            leaves.append(torch.zeros_like(rows[:, part]).requires_grad_())
            before = part.start or 0
            behind = rows.shape[-1] - before - leaves[0].shape[-1]
            return (rows + torch.nn.functional.pad(leaves[0], (before, behind))).reshape(x.shape)

        with torch.enable_grad():
            value = self.run(prompts, i, [(module, side, add)], grad=True)[0] @ weights
        found = torch.autograd.grad(value, leaves[0], allow_unused=True)[0]
        return torch.zeros_like(leaves[0]) if found is None else found

    def run(
        self,
        prompts: mk.Prompts,
        i: int,
        hooks: Sequence[tuple[Any, str, Callable[[Tensor], Tensor]]],
        n: int = 1,
        **more: Any,
    ) -> Tensor:
        """The last position's logits of `n` rows. Hooks come before those by which transformers collects a tower's outputs."""
        handles = [_attach(*hook) for hook in hooks]
        try:
            found: Tensor = self.oracle.logits(prompts, i, n, **more).logits[:, -1]
            return found
        finally:
            for handle in handles:
                handle.remove()


def _attach(module: Any, side: str, fn: Callable[[Tensor], Tensor]) -> Any:
    if side == "in":

        def before(_: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (fn(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": fn(kwargs["hidden_states"])}

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: Any, args: Any, out: Any) -> Any:
        return (fn(out[0]), *out[1:]) if isinstance(out, tuple) else fn(out)

    return module.register_forward_hook(after, prepend=True)
