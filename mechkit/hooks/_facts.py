"""A model's sizes, where it is, in what mode; and the one call that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mechkit.hooks._context import context_of
from mechkit.hooks._devices import input_device
from mechkit.hooks._lock import one_at_a_time
from mechkit.hooks._sites import get_site
from mechkit.hooks._stack import Stack
from mechkit.hooks.loading.probe import reads_pictures_alone
from mechkit.prompts import Prompts, Stacked


class Facts:
    """The part of `HookedModel` that everything else asks for sizes: those of its stack of blocks, and its own. `bridge` is the
    TransformerBridge, `name` the model's.
    """

    bridge: Any
    name: str
    stack: Stack
    stacks: dict[str, Stack]  # by name: `stack` itself, and a vision-language model's tower

    @one_at_a_time
    def run(self, prompts: Prompts | Stacked | Tensor, ids: Sequence[int] | None = None, **more: Any) -> Tensor:
        """One forward pass as it is, hooks and all: the one call by which anything in mechkit runs the model.

        Args:
            prompts: Prompts, of which `ids` (default all) are run together; or rows of prompts that were stacked; or token ids
                `[batch pos]`, on the model's device.
            **more: For TransformerLens's bridge, such as `attention_mask` or `past_key_values`.

        Returns:
            What the bridge returns: logits `[batch pos d_vocab]`. Of a model that reads pictures alone, the classes' logits
            `[batch 1 class]`.
        """
        if isinstance(prompts, Prompts):
            prompts = prompts.stack(range(len(prompts)) if ids is None else ids)
        if isinstance(prompts, Stacked):
            return self._run_stacked(prompts.to(self.device), more)
        found: Tensor = self.bridge(prompts, **more)
        return found

    def _run_stacked(self, rows: Stacked, more: dict[str, Any]) -> Tensor:
        dtype = self.dtype
        given = {name: one.to(dtype) if one.is_floating_point() else one for name, one in rows.arguments.items()}
        if self.reads_pictures_alone:
            more = {name: one for name, one in more.items() if name != "past_key_values"}
            classes: Tensor = self.bridge(given.pop("pixel_values"), **given, **more)
            return classes[:, None]
        found: Tensor = self.bridge(rows.tokens, **given, **more)
        return found

    @property
    def reads_pictures_alone(self) -> bool:
        """Whether it is a vision transformer, which takes no tokens."""
        return reads_pictures_alone(getattr(self.bridge.original_model, "config", None))

    @property
    def cfg(self) -> Any:
        """TransformerLens's config."""
        return self.bridge.cfg

    def stack_of(self, site: str) -> Stack | None:
        """The stack that a site is in; `None` where the model has no such stack."""
        return self.stacks.get(get_site(site).stack)

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
        """How many logits there are at a position: tokens, or the classes of a model that reads pictures alone."""
        if self.reads_pictures_alone:
            return int(self.bridge.original_model.config.num_labels)
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
