"""Patching pictures in seven families: a sweep over layers and patches against a whole pass of the untouched model for each cell.

    python benchmarks/patching/pictures.py [--families llava gemma3 …] [--layers 12] [--width 128] [--pairs 2] [--json out.json]

Models are those of the tests with random weights, deepened, with pictures of 36 to 120 patches. Whole passes of the untouched
transformers model with a hook are timed on a sample of cells, each cell's prompts in one batch, and must give the same numbers.
Times are of one run, in turn: the ratio and the block-tokens count. Needs the clone's `tests/`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import mechkit as mk

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from helpers import vlm


def build(family: str, layers: int, width: int) -> Any:
    make, name = vlm.FAMILIES[family]
    config = make()
    text = config.get_text_config()
    text.num_hidden_layers = layers
    text.hidden_size, text.intermediate_size, text.num_attention_heads, text.num_key_value_heads = (
        width,
        2 * width,
        4,
        4,
    )
    text.head_dim, text.max_position_embeddings = width // 4, 1024
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i % len(text.layer_types)] for i in range(layers)]
    vision = config.vision_config
    if family in ("qwen2_5_vl", "qwen3_vl"):
        vision.out_hidden_size = width
        rope = dict(text.rope_parameters)
        rope["mrope_section"] = [width // 32, 3 * width // 64, width // 8 - width // 32 - 3 * width // 64]
        text.rope_parameters = rope
        if family == "qwen3_vl":
            vision.num_position_embeddings = 256
    else:
        vision.image_size = {"llava": 80, "gemma3": 96, "idefics3": 96}.get(family, 72)
        if family == "gemma3":
            config.mm_tokens_per_image, text.query_pre_attn_scalar, text.sliding_window = 36, width // 4, 64
        if hasattr(config, "image_grid_pinpoints"):
            config.image_grid_pinpoints = [[72, 144], [144, 72], [144, 144]]
    torch.manual_seed(0)
    hf = getattr(tf, name)(config)
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.ndim >= 2:
                weight.normal_(0, 0.05)
    hf.eval().set_attn_implementation("eager")
    return hf


def picture(family: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    def noise(*shape: int) -> torch.Tensor:
        return 2 * torch.randn(*shape, generator=generator)

    if family in ("qwen2_5_vl", "qwen3_vl"):
        return {"pixel_values": noise(16 * 20, 96), "image_grid_thw": torch.tensor([[1, 16, 20]])}
    if family in ("llava_next", "llava_onevision"):
        return {"pixel_values": noise(1, 3, 3, 72, 72), "image_sizes": torch.tensor([[140, 72]])}
    if family == "idefics3":
        return {"pixel_values": noise(1, 2, 3, 96, 96)}
    size = {"llava": 80, "gemma3": 96}[family]
    return {"pixel_values": noise(1, 3, size, size)}


def make_pairs(family: str, model: mk.HookedModel, n: int) -> mk.PromptPairs:
    generator = torch.Generator().manual_seed(0)

    def prompts() -> mk.Prompts:
        inputs = [picture(family, generator) for _ in range(n)]
        tokens = [vlm.tokens_for(family, model, one, (7, 11, 5)) for one in inputs]
        return mk.Prompts.from_inputs(model, tokens, inputs)

    return mk.PromptPairs.from_tokens(prompts(), prompts(), [(5, 9)] * n)


@torch.no_grad()
def naive(hf: Any, pairs: mk.PromptPairs, cells: list[tuple[int, int]]) -> tuple[torch.Tensor, float]:
    """`[cell prompt]`, one whole pass with a hook for each cell; and the seconds of one."""
    clean, corrupted = (prompts.stack(range(len(pairs))) for prompts in (pairs.clean, pairs.corrupted))
    layers, kept = vlm.decoder_layers(hf), dict[int, torch.Tensor]()

    def read(args: Any, kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        return found

    def keep(_: Any, args: Any, kwargs: Any, layer: int) -> None:
        kept[layer] = read(args, kwargs).clone()

    handles = []
    for layer, block in enumerate(layers):
        handles.append(
            block.register_forward_pre_hook(lambda *of, layer=layer: keep(*of, layer=layer), with_kwargs=True)
        )
    hf(clean.tokens, **clean.arguments)
    for handle in handles:
        handle.remove()
    values = []
    begin = time.perf_counter()
    for layer, position in cells:

        def put(_: Any, args: Any, kwargs: Any, layer: int = layer, position: int = position) -> Any:
            hidden = read(args, kwargs).clone()
            hidden[:, position] = kept[layer][:, position]
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        handle = layers[layer].register_forward_pre_hook(put, with_kwargs=True)
        logits = hf(corrupted.tokens, **corrupted.arguments).logits[:, -1]
        handle.remove()
        values.append(logits[:, 5] - logits[:, 9])
    return torch.stack(values), (time.perf_counter() - begin) / len(cells)


def measured(family: str, layers: int, width: int, n: int, sample: int) -> dict[str, Any]:
    hf = build(family, layers, width)
    model = mk.HookedModel.from_hf(hf, name=family)
    pairs = make_pairs(family, model, n)
    assert pairs.clean.segments is not None
    places = [at for s in pairs.clean.segments[0] if s.kind == "image" for at in s.positions]
    grid = [(layer, i) for layer in range(layers) for i in range(len(places))]
    cells = grid[:: max(1, len(grid) // sample)]
    metric = mk.logit_diff(pairs)
    mk.image_patching(model, pairs, metric, layers=[layers - 1], progress=False)  # everything is loaded
    naive(hf, pairs, [(0, places[0])])
    right, per_cell = naive(hf, pairs, [(layer, places[i]) for layer, i in cells])
    begin = time.perf_counter()
    found = mk.image_patching(model, pairs, metric, progress=False)
    seconds = time.perf_counter() - begin
    mine = torch.stack([found.values[layer, i] for layer, i in cells])
    return {
        "family": family,
        "layers": layers,
        "width": width,
        "pairs": n,
        "cells": len(grid),
        "mechkit_s": seconds,
        "whole_passes_s": per_cell * len(grid),
        "times_faster": per_cell * len(grid) / seconds,
        "fewer_block_tokens": found.cost.speedup,
        "replay": found.provenance["replay"],
        "largest_difference": float((mine - right).abs().max()),
        "spread": float(found.values.max() - found.values.min()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(vlm.FAMILIES), choices=list(vlm.FAMILIES))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=128, help="of the language model's residual stream")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--sample", type=int, default=48, help="cells of which whole passes are timed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore", mk.GapWarning)  # random weights know no answer
    figures = []
    print("| family | cells | mechkit, s | whole passes, s | times faster | times fewer block-tokens | off by | of |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for family in args.families:
        one = measured(family, args.layers, args.width, args.pairs, args.sample)
        figures.append(one)
        print(
            f"| {family} | {one['cells']:,} | {one['mechkit_s']:.2f} | {one['whole_passes_s']:.1f} | {one['times_faster']:.1f} | "
            f"{one['fewer_block_tokens']:.2f} | {one['largest_difference']:.1e} | {one['spread']:.2f} |",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
