"""A Llama-shaped model as a `HookedTransformer` of TransformerLens 2.x, for packages that need one.

Runs in a separate Python without mechkit. Its inputs are in a folder that `../other_libraries.py` wrote:

| file | what |
| --- | --- |
| `model.safetensors`, `config.json` | weights and `LlamaConfig` |
| `run.json` | token ids of the pairs, `[right, wrong]` answers, the model's own metric on them, what to run, device, threads |

The scripts write `figures.json` (seconds, version) and `values.json` into the same folder: for each task, values by edge, with
mechkit's sign (positive where the clean value supports the metric), as means over the pairs. Keys and values are by query head:
`a9.h6<k>`.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/, where shared.py is
from shared import clock, held, most_held

N_CONTEXT = 128  # the size of the mask and the rotary buffers; does not affect prompts that fit


def begin(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Returns the model, and what to run."""
    run = json.loads((folder / "run.json").read_text())
    torch.set_num_threads(run["threads"])
    if max(map(len, run["clean"])) > N_CONTEXT:
        raise SystemExit(f"prompts longer than {N_CONTEXT} tokens")
    model = load(folder, run["device"])
    off = max(
        float((metric(model, run, side) - torch.tensor(run["metric"][side])).abs().max())
        for side in ("clean", "corrupted")
    )
    if not off < 1e-3:
        raise SystemExit(f"TransformerLens's model is not the same: its metric is off by {off:.1e}")
    return model, run


@torch.no_grad()
def load(folder: Path, device: str) -> Any:
    """Builds the config here, since TransformerLens 2 does not know the model (and reads rotary base 10000 from a folder)."""
    config = LlamaConfig(**json.loads((folder / "config.json").read_text()))
    plain = LlamaForCausalLM(config).eval()
    missing, unknown = plain.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if unknown or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"config.json does not fit the weights: {missing[:3]}, {unknown[:3]}")
    plain.tie_weights()
    cfg = HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_head=config.hidden_size // config.num_attention_heads,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads
        if config.num_key_value_heads != config.num_attention_heads
        else None,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=N_CONTEXT,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=config.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_base=int(config.rope_theta),
        rotary_dim=config.hidden_size // config.num_attention_heads,
        rotary_adjacent_pairs=False,
        use_attn_result=True,
        use_split_qkv_input=True,
        use_hook_mlp_in=True,
        ungroup_grouped_query_attention=config.num_key_value_heads != config.num_attention_heads,
        device=device,
        dtype=torch.float32,
    )
    model = HookedTransformer(cfg)
    as_it_is = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    model.load_and_process_state_dict(convert_llama_weights(plain, cfg), **as_it_is)
    return model.eval()


def tokens(run: dict[str, Any], side: str) -> torch.Tensor:
    return torch.tensor(run[side], device=run["device"])


@torch.no_grad()
def metric(model: Any, run: dict[str, Any], side: str) -> torch.Tensor:
    logits = model(tokens(run, side))
    chosen = logits[:, -1].gather(-1, torch.tensor(run["answers"], device=logits.device))
    return (chosen[:, 0] - chosen[:, 1]).cpu()


def best_of(run: dict[str, Any], prepare: Callable[[], Any], work: Callable[[Any], Any]) -> tuple[dict[str, Any], Any]:
    """The best seconds of several runs of `work`, each on a new result of `prepare`, which is not timed."""
    before, seconds, cpu_seconds, found = held(run["device"]), [], [], None
    for _ in range(run["repeats"]):
        prepared = prepare()
        cpu = time.process_time()
        took, found = clock(run["device"], partial(work, prepared))
        seconds.append(took)
        cpu_seconds.append(time.process_time() - cpu)
    figures = {"seconds": min(seconds), "all_seconds": seconds, "cpu_seconds": min(cpu_seconds)}
    return figures | {"peak_memory_gb": (most_held(run["device"]) - before) / 1e9}, found


def end(folder: Path, package: str, tasks: dict[str, Any], values: dict[str, dict[str, float]]) -> None:
    versions = (
        f"{importlib.metadata.version(package)}, TransformerLens {importlib.metadata.version('transformer-lens')}"
    )
    figures = {"version": versions, "torch": torch.__version__, "threads": torch.get_num_threads(), "tasks": tasks}
    (folder / "figures.json").write_text(json.dumps(figures))
    (folder / "values.json").write_text(json.dumps(values))
