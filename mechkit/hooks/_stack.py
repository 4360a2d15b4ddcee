"""A stack: one tower of transformer blocks, one after the other, along one residual stream.

A decoder language model is one stack, `model.stack`, and its flat attributes (`model.n_layers`, `model.n_heads`, …) are that
stack's. Recording, replay and its proof ask the stack for blocks and sizes. A vision-language model also has its tower's stack,
`model.stacks["vision"]`; a site belongs to one stack (`model.stack_of(site)`).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from mechkit.hooks._sites import SITES, TOWER, get_site

Sizes = dict[tuple[str, int], tuple[int, ...]]  # (site, layer) -> sizes of the activation's axes after the batch


@dataclass(frozen=True, eq=False)
class Stack:
    """One tower of blocks.

    What a forward pass showed of sizes comes before what TransformerLens's config says, which is not always so.

    Attributes:
        name: What it reads: `"text"`, or `"vision"` for a vision-language model's tower.
        blocks: TransformerLens's bridges of the blocks, in their order; of a tower, transformers' own blocks.
        cfg: TransformerLens's config; of a tower, what its forward pass showed.
        causal: Whether each position is made to predict the next one, as far as TransformerLens knows. The engine does not
            rely on it: it measures.
        sites: For every `(site, layer)` that is there (layer 0 for sites outside the blocks) the sizes of its axes.
    """

    name: str
    blocks: Any
    cfg: Any
    causal: bool
    sites: Sizes

    @classmethod
    def of(cls, bridge: Any, sites: Sizes) -> Stack:
        """The one stack of a TransformerBridge."""
        return cls("text", bridge.blocks, bridge.cfg, bool(bridge.adapter.supports_causal_loss), sites)

    @classmethod
    def of_tower(cls, blocks: Any, n_heads: int, sites: Sizes) -> Stack:
        """The stack of a vision tower, whose sizes are those of its sites."""
        first = {name: sizes for (name, layer), sizes in reversed(sites.items()) if layer == 0}
        width = first[f"{TOWER}.resid_pre"][-1]
        neurons = first.get(f"{TOWER}.mlp_post", (0,))[-1]
        cfg = SimpleNamespace(
            n_heads=n_heads, n_key_value_heads=None, d_model=width, d_head=width // n_heads, d_mlp=neurons
        )
        return cls(TOWER, blocks, cfg, False, sites)

    def __repr__(self) -> str:
        return f"Stack({self.name!r}, {self.n_layers} layers of {self.n_heads} heads, d_model {self.d_model})"

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def n_heads(self) -> int:
        return int(self.cfg.n_heads)

    @property
    def n_kv_heads(self) -> int:
        """Key-value heads: fewer than `n_heads` in GQA models, 1 in MQA models."""
        found = self._measured("k", 1) or self._measured("v", 1)
        return found or int(self.cfg.n_key_value_heads or self.n_heads)

    @property
    def d_model(self) -> int:
        return int(self.cfg.d_model)

    @property
    def d_head(self) -> int:
        """Entries of a head's `z` (its queries and keys may be wider in latent attention)."""
        return self._measured("z", 2) or int(self.cfg.d_head)

    @property
    def d_mlp(self) -> int:
        return int(self.cfg.d_mlp)

    def _measured(self, site: str, axis: int) -> int | None:
        """The size of a site's axis (counted without the batch) in the first layer that has it."""
        return next((sizes[axis] for (name, _), sizes in self.sites.items() if name == site), None)

    @property
    def site_names(self) -> list[str]:
        """Short names of the sites that some layer has, in the order in which a block computes them."""
        return [name for name in SITES if self.layers_with(name)]

    def layers_with(self, site: str) -> tuple[int, ...]:
        """The layers that compute a site: all of them nearly always, some in hybrids; `(0,)` for a site outside the layers."""
        return tuple(layer for name, layer in self.sites if name == site)

    def has_site(self, site: str, layer: int | None = None) -> bool:
        """Whether some layer (or this one) computes the site."""
        site = get_site(site).name
        return bool(self.layers_with(site)) if layer is None else (site, layer) in self.sites

    def width_of(self, site: str, layer: int | None = None) -> int:
        """Entries of a site's last axis; the most of any layer if none is given."""
        site = get_site(site).name
        layers = self.layers_with(site) if layer is None else (layer,)
        return max((self.sites[site, at][-1] for at in layers if (site, at) in self.sites), default=0)
