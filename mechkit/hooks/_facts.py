"""What a model says of itself: its sizes, where it is, and in what mode."""

from __future__ import annotations

from typing import Any

import torch

from mechkit.hooks._context import context_of
from mechkit.hooks._devices import input_device
from mechkit.hooks._stack import Stack


class Facts:
    """The part of `HookedModel` that everything else asks for sizes: those of its stack of blocks, and its own. `bridge` is the
    TransformerBridge, `name` the model's.
    """

    bridge: Any
    name: str
    stack: Stack

    @property
    def cfg(self) -> Any:
        """TransformerLens's config."""
        return self.bridge.cfg

    @property
    def n_layers(self) -> int:
        return self.stack.n_layers

    @property
    def n_heads(self) -> int:
        return self.stack.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key-value heads: fewer than `n_heads` in GQA models, 1 in MQA models."""
        return self.stack.n_kv_heads

    @property
    def d_model(self) -> int:
        return self.stack.d_model

    @property
    def d_head(self) -> int:
        """Entries of a head's `z` (its queries and keys may be wider in latent attention)."""
        return self.stack.d_head

    @property
    def d_mlp(self) -> int:
        return self.stack.d_mlp

    @property
    def d_vocab(self) -> int:
        return int(self.cfg.d_vocab)

    @property
    def n_ctx(self) -> int | None:
        """The context: for how many tokens the model's positions were made, if its configuration names a number."""
        return context_of(getattr(self.bridge.original_model, "config", self.cfg))

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return input_device(self.bridge.original_model)

    @property
    def devices(self) -> list[torch.device]:
        """Everywhere that its weights are (several with a `device_map`), and where token ids go in."""
        found = {p.device for p in self.bridge.original_model.parameters()} | {self.device}
        return sorted((device for device in found if device.type != "meta"), key=str)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.bridge.original_model.parameters()).dtype

    @property
    def training(self) -> bool:
        """Whether any part is in training mode (dropout on): experiments refuse such a model."""
        return any(module.training for module in self.bridge.original_model.modules())

    @property
    def tokenizer(self) -> Any:
        return self.bridge.tokenizer
