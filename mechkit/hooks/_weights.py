"""Weights, stacked over layers and split by head, and what reads logits off the residual stream."""

from __future__ import annotations

from typing import Any, Literal

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._check import checked
from mechkit.hooks._facts import Facts
from mechkit.hooks._lock import one_at_a_time
from mechkit.hooks._projections import (
    Which,
    embedding,
    head_bias,
    head_weight,
    is_plain,
    mlp_weight,
    unembedding,
)
from mechkit.hooks._readable import readable_weights
from mechkit.hooks._readout import read_logits


@readable_weights
class Weights(Facts):
    """The part of `HookedModel` that holds its weights."""

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        return self._by_head("q")

    @property
    def W_K(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        return self._by_head("k")

    @property
    def W_V(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        return self._by_head("v")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        return self._by_head("o")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        return self._bias("q", self.n_heads, self.d_head)

    @property
    def b_K(self) -> Float[Tensor, "layer kv_head d_head"]:
        return self._bias("k", self.n_kv_heads, self.d_head)

    @property
    def b_V(self) -> Float[Tensor, "layer kv_head d_head"]:
        return self._bias("v", self.n_kv_heads, self.d_head)

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        return self._bias("o", self.d_model)

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        return self._of_mlps("in")

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"] | None:
        return self._of_mlps("gate")

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        return self._of_mlps("out")

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return embedding(self)

    @property
    def W_pos(self) -> Float[Tensor, "pos d_model"]:
        return self.bridge.W_pos

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return unembedding(self).weight.T

    @property
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        bias = unembedding(self).bias
        return torch.zeros(self.d_vocab, dtype=self.dtype, device=self.device) if bias is None else bias

    def _by_head(self, which: Which) -> Tensor:
        """A projection's weight in all layers: the bridge's own, or read off the modules where these are more than a matrix."""
        if self._all_plain("attn", which):
            stacked: Tensor = getattr(self.bridge, f"W_{which.upper()}")
            return stacked
        return torch.stack([head_weight(self, layer, which) for layer in range(self.n_layers)])

    def _bias(self, which: Which, *shape: int) -> Tensor:
        """A stacked bias; zeros where the model has none."""
        zeros = torch.zeros(self.n_layers, *shape, dtype=self.dtype, device=self.device)
        if self._all_plain("attn", which):
            stacked = getattr(self.bridge, f"b_{which.upper()}", None)
        else:
            found = [head_bias(self, layer, which) for layer in range(self.n_layers)]
            stacked = torch.stack([zeros[0] if one is None else one for one in found])
        return (
            zeros
            if stacked is None
            else einops.rearrange(stacked, "layer ... -> layer (...)").reshape(self.n_layers, *shape)
        )

    def _of_mlps(self, which: Literal["in", "gate", "out"]) -> Any:
        if self._all_plain("mlp", which):
            return getattr(self.bridge, f"W_{which}")
        return torch.stack([mlp_weight(self, layer, which) for layer in range(self.n_layers)])  # type: ignore[misc]

    def _all_plain(self, part: str, which: str) -> bool:
        modules = (getattr(getattr(block, part, None), which, None) for block in self.stack.blocks)
        components = (getattr(module, "original_component", None) for module in modules)
        return all(component is None or is_plain(component) for component in components)

    # -- reading logits off the residual stream ------------------------------------------------------------------------

    @checked
    @one_at_a_time
    def unembed(
        self, resid: Float[Tensor, "... d_model"], tokens: Int[Tensor, "token"] | None = None
    ) -> Float[Tensor, "... token"]:
        """The logits that a final residual stream gives, of `tokens` alone (all by default): final norm, unembedding, the
        architecture's scaling or soft cap of logits, and whatever else the model's own head computes.

        Raises:
            ValueError: a stream of another width, or of whole numbers; tokens that the vocabulary lacks.
        """
        check_stream(resid, self.d_model)
        if tokens is not None and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.d_vocab:
            raise ValueError(f"tokens: expected token ids in 0..{self.d_vocab - 1}, got {tokens.tolist()[:5]}")
        return read_logits(self, resid, tokens)  # type: ignore[arg-type]

    def scale_logits(self, logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What the architecture does to logits after the unembedding, entry by entry: scaling, or a soft cap."""
        transformed: Tensor = self.bridge.adapter.apply_output_logits_transform(logits)
        return transformed


def check_stream(resid: Tensor, d_model: int) -> None:
    """Raises `ValueError` unless a tensor can be a residual stream of this width."""
    if not resid.is_floating_point() or resid.shape[-1:] != (d_model,):
        raise ValueError(
            f"resid: expected floating-point numbers [... {d_model}] (d_model), got {resid.dtype} {list(resid.shape)}"
        )
