"""A model's sizes, read off its configuration: no weights are loaded.

The model is built on torch's meta device, where parameters have shapes and no numbers, so that they are counted as they are.
Widths come from the configuration, under the names that transformers gives them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from mechkit.hooks import find_model
from mechkit.hooks._context import longest_prompt
from mechkit.hooks._record import _keeps_other_state
from mechkit.hooks.loading.pretrained import _model_class
from mechkit.hooks.loading.where import locate


@dataclass(frozen=True)
class Sizes:
    """A model's sizes: what a forecast needs of it, under the names by which `Budget` asks a model for them.

    Attributes:
        name: What it is called.
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp: As `HookedModel`'s.
        block_parameters: Of all blocks together; of a mixture of experts all experts.
        parameters: Of the whole model; a matrix that is used twice counts once.
        dtype: Of the weights.
        devices: Where it will run.
        experts: Whether the blocks are a mixture of experts, of which a token meets only some.
        longest: The most tokens that it has positions for; `None` where there is no such limit.
    """

    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    block_parameters: int
    parameters: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...] = (torch.device("cpu"),)
    experts: bool = False
    longest: int | None = None

    @property
    def cfg(self) -> Sizes:
        return self

    def site_size(self, site: str, dim: str, length: int) -> int:
        """How long the axis `dim` of a site's activation is, for prompts of `length` tokens."""
        heads = self.n_kv_heads if site in ("k", "v") else self.n_heads
        sizes = {"pos": length, "src": length, "head": heads, "neuron": self.d_mlp}
        return sizes.get(dim) or (self.d_head if dim == "d_head" else self.d_model)


def sizes_of(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Sizes:
    """The sizes of a model, from its configuration alone: no weights are read, nothing but the configuration is downloaded.

    Args:
        name: A hub's name, a folder, a `.gguf` file (whose header is read), or the alias `smollm2-135m`.
        dtype: That its weights would be loaded in.
        device: Where it would go; default the GPU if there is one.
        revision: The hub's revision.
        trust_remote_code: Run code that comes with the configuration.

    Raises:
        ValueError: there is no such model, or its rows cannot be replayed, as far as its configuration says.
    """
    from transformers import AutoConfig

    find_model(name, revision=revision, trust_remote_code=trust_remote_code)
    source, arguments = locate(name)
    which: dict[str, Any] = {**arguments, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(source, **which, **({} if revision is None else {"revision": revision}))
    with torch.device("meta"):
        empty = _model_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return replace(_sizes_of_hf(empty, name), dtype=dtype, devices=(torch.device(device),))


def _sizes_of_hf(hf: Any, name: str) -> Sizes:
    """The sizes of a transformers model, which may be on the meta device."""
    config = hf.config.get_text_config()
    standing_in: Any = SimpleNamespace(original_model=hf, cfg=SimpleNamespace(positional_embedding_type="standard"))
    keys = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    named: list[Any] = [getattr(config, key, None) for key in keys]
    n_layers, n_heads, d_model = named
    stacks = [m for m in hf.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n_layers]
    refused = _keeps_other_state(SimpleNamespace(bridge=standing_in))  # type: ignore[arg-type]  # all that it asks of a model
    if not hf.can_generate():
        refused = "it is no causal language model"
    elif getattr(config, "kv_lora_rank", None):
        refused = "its keys and values are made of a shared latent (multi-head latent attention)"
    elif refused is None and not (stacks and all(named)):
        refused = "its configuration does not name its layers, heads and width, or no list of its blocks is found"
    if refused is not None:
        raise ValueError(
            f"model: expected one whose blocks can be replayed and counted without its weights, got {name!r}: {refused}. "
            "Without a forecast of a sweep it is loaded and measured"
        )
    blocks = max(_parameters(stack) for stack in stacks)
    one_head = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    kv = (getattr(config, key, None) for key in ("num_key_value_heads", "num_kv_heads"))
    mlp = (getattr(config, key, None) for key in ("intermediate_size", "n_inner", "ffn_dim"))
    return Sizes(
        name,
        n_layers,
        n_heads,
        1 if one_head else next((n for n in kv if n), n_heads),
        d_model,
        getattr(config, "head_dim", None) or d_model // n_heads,
        next((n for n in mlp if isinstance(n, int)), 4 * d_model),
        blocks,
        _parameters(hf),
        hf.dtype,
        experts=any("experts" in key for key, _ in hf.named_modules()),
        longest=longest_prompt(standing_in),
    )


def _parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
