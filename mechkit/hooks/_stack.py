"""A stack: one tower of transformer blocks, one after the other, along one residual stream.

A decoder language model is one stack, `model.stack`, and its flat attributes (`model.n_layers`, `model.n_heads`, …) are that
stack's. Sites, recording, replay and its proof ask the stack for blocks and sizes, so that a model of several towers needs no
more than several stacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mechkit.hooks._sites import SITES, get_site

Sizes = dict[tuple[str, int], tuple[int, ...]]  # (site, layer) -> sizes of the activation's axes after the batch


@dataclass(frozen=True, eq=False)
class Stack:
    """One tower of blocks.

    What a forward pass showed of sizes comes before what TransformerLens's config says, which is not always so.

    Attributes:
        name: What it reads: `"text"`.
        blocks: TransformerLens's bridges of the blocks, in their order.
        cfg: TransformerLens's config.
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

    def hook_name(self, site: str, layer: int) -> str:
        """The full hook name of a site in a layer."""
        return SITES[site].hook_name(layer)
