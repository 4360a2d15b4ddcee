"""Weights, stacked over layers and split by head, and what reads logits off the residual stream."""

from __future__ import annotations

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit.hooks._facts import Facts
from mechkit.hooks._lock import one_at_a_time


class Weights(Facts):
    """The part of `HookedModel` that holds its weights."""

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        return self.bridge.W_Q

    @property
    def W_K(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        return self.bridge.W_K

    @property
    def W_V(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        return self.bridge.W_V

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        return self.bridge.W_O

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        return self._bias("b_Q", self.n_heads, self.d_head)

    @property
    def b_K(self) -> Float[Tensor, "layer kv_head d_head"]:
        return self._bias("b_K", self.n_kv_heads, self.d_head)

    @property
    def b_V(self) -> Float[Tensor, "layer kv_head d_head"]:
        return self._bias("b_V", self.n_kv_heads, self.d_head)

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        return self._bias("b_O", self.d_model)

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        return self.bridge.W_in

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"] | None:
        return self.bridge.W_gate

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        return self.bridge.W_out

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.bridge.W_E

    @property
    def W_pos(self) -> Float[Tensor, "pos d_model"]:
        return self.bridge.W_pos

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.bridge.W_U

    @property
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        return self.bridge.b_U

    def _bias(self, name: str, *shape: int) -> Tensor:
        """A stacked bias; zeros where the model has none."""
        try:
            stacked = getattr(self.bridge, name)
        except AttributeError:
            return torch.zeros(self.n_layers, *shape, dtype=self.dtype, device=self.device)
        return einops.rearrange(stacked, "layer ... -> layer (...)").reshape(self.n_layers, *shape)

    # -- reading logits off the residual stream ------------------------------------------------------------------------

    @one_at_a_time
    def unembed(
        self, resid: Float[Tensor, "... d_model"], tokens: Int[Tensor, "token"] | None = None
    ) -> Float[Tensor, "... token"]:
        """The logits that a final residual stream gives: final norm, unembedding of `tokens` alone (all by default), and
        the architecture's scaling or soft cap of logits."""
        normed = self.bridge.ln_final(resid)
        head = self.bridge.unembed.original_component
        bias = getattr(head, "bias", None)
        if head.weight.device.type == "meta":  # offloaded: accelerate fetches the weights when the module is called
            logits = head(normed)
            return self.scale_logits(logits if tokens is None else logits[..., tokens.to(logits.device)])
        normed = normed.to(head.weight.device)
        if tokens is None:
            logits = torch.nn.functional.linear(normed, head.weight, bias)
        else:
            chosen = tokens.to(head.weight.device)
            logits = torch.nn.functional.linear(normed, head.weight[chosen], None if bias is None else bias[chosen])
        return self.scale_logits(logits)

    def scale_logits(self, logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What the architecture does to logits after the unembedding, entry by entry: scaling, or a soft cap."""
        config = self.bridge.original_model.config.get_text_config()
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = cap * torch.tanh(logits / cap)
        return logits
