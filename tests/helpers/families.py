"""Tiny random models of the real architectures: the ground that every exactness test stands on.

Weights are drawn wide (normal, std 0.35 for matrices) so that attention is peaked and every component matters; a model
drawn at its default initialisation is nearly linear and would hide mistakes.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

N_LAYERS, N_HEADS, D_MODEL, D_MLP, D_VOCAB, N_CTX = 4, 4, 32, 48, 61, 64

COMMON = {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": N_CTX,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GQA = COMMON | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": D_VOCAB, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": N_CTX}

# name -> (model_type, config arguments). Sliding windows are 4, shorter than every test prompt.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2 | {"n_inner": D_MLP}),
    "llama": ("llama", GQA),
    "llama_mqa": ("llama", COMMON | {"num_key_value_heads": 1}),
    "mistral": ("mistral", GQA | {"sliding_window": 4}),
    "qwen2": ("qwen2", GQA),
    "qwen3": ("qwen3", GQA | {"head_dim": 8}),
    "gemma2": ("gemma2", GQA | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "gemma3_text",
        GQA | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    ),
    "gpt_neox": ("gpt_neox", COMMON | {"rotary_pct": 0.5}),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 4, "n_inner": D_MLP}),
    "phi": ("phi", COMMON | {"partial_rotary_factor": 0.5}),
    "opt": ("opt", COMMON | {"ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL}),
    "bloom": ("bloom", {"vocab_size": D_VOCAB, "hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS}),
    "gpt_neo": (
        "gpt_neo",
        {k: v for k, v in COMMON.items() if k not in ("num_hidden_layers", "num_attention_heads")}
        | {
            "num_layers": N_LAYERS,
            "num_heads": N_HEADS,
            "attention_types": [[["global", "local"], N_LAYERS // 2]],
            "window_size": 4,
        },
    ),
    "falcon": ("falcon", COMMON | {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True}),
    "olmo2": ("olmo2", GQA),
    "stablelm": ("stablelm", GQA | {"partial_rotary_factor": 0.5}),
    "mixtral": ("mixtral", GQA | {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None}),
}

PARALLEL = ("gpt_neox", "gptj", "phi", "falcon")  # attention and MLP read the same stream
FLOAT32_INSIDE = ("gemma2", "gemma3", "olmo2", "mixtral")  # norms, or all, in float32 whatever the model's dtype is


def build_hf(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A tiny random Hugging Face model of the family `name`, in evaluation mode."""
    return build_of(*FAMILIES[name], dtype=dtype, seed=seed)


def build_of(
    model_type: str,
    arguments: dict[str, Any],
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    auto: Any = AutoModelForCausalLM,
) -> PreTrainedModel:
    """The same for any architecture of transformers."""
    torch.manual_seed(seed)
    model = auto.from_config(AutoConfig.for_model(model_type, **arguments), attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.35)
        else:  # norm scales and biases: keep their default, perturbed, so that no symmetry hides a mistake
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()
