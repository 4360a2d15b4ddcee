"""SmolLM2's random twin: its tokenizer, layers and heads on a residual stream an eighth as wide, so that an example which was
written for the real model runs in a tenth of the time. Its numbers mean nothing.

One layer is made by hand, since examples divide by the difference of the clean and the corrupted run: its heads look at all
tokens alike and write minus what they see, so that a token is the less likely the more often it was there. That does IOI: the
subject is there twice, the indirect object once.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mechkit as mk

BY_HAND = 23  # the layer


def twin_of(model: mk.HookedModel) -> mk.HookedModel:
    config = LlamaConfig(
        vocab_size=model.d_vocab,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_kv_heads,
        hidden_size=model.n_heads * 8,
        intermediate_size=128,
        max_position_embeddings=model.n_ctx,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        hf.model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(1))
        attention, width = hf.model.layers[BY_HAND].self_attn, 8 * model.n_kv_heads
        attention.q_proj.weight.zero_()
        attention.v_proj.weight.copy_(torch.eye(width, hf.config.hidden_size))
        attention.o_proj.weight.zero_()
        shared = model.n_heads // model.n_kv_heads
        for head in range(model.n_heads):
            first, strength = 8 * (head // shared), 4.0 if head % shared == 0 else 1.0
            attention.o_proj.weight[first : first + 8, 8 * head : 8 * head + 8] = -strength * torch.eye(8)
    return mk.HookedModel.from_hf(hf, model.tokenizer, name=model.name)


def load_real() -> mk.HookedModel:
    """From now on every load gives SmolLM2, loaded once."""
    model = mk.HookedModel.from_pretrained("smollm2-135m", device="cpu")
    mk.HookedModel.from_pretrained = lambda name, **_: model  # type: ignore[method-assign, assignment]
    return model


def load_twin() -> None:
    """From now on every load gives its twin."""
    model = mk.HookedModel.from_pretrained("smollm2-135m")
    twin = model if model.d_model < 100 else twin_of(model)
    mk.HookedModel.from_pretrained = lambda name, **_: twin  # type: ignore[method-assign, assignment]
