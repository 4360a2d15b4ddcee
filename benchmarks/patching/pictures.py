"""Patching pictures in seven families: a sweep over layers and patches against a whole pass of the untouched model for each cell.

    python benchmarks/patching/pictures.py [--families llava gemma3 …] [--layers 12] [--width 128] [--pairs 2] [--json out.json]

Models have random weights and the proportions of a published checkpoint (`PUBLISHED`): how wide and deep the vision tower is
beside the language model, and how many of its patches make one position. Only the language model's width and depth, and the
pictures (36 to 108 positions), are small. Whole passes of the untouched transformers model with a hook are timed on a sample
of cells, each cell's prompts in one batch, and must give the same numbers. They run the tower in each pass, mechkit once for
a prompt; "tower left out" counts only the whole passes' time behind it, as of somebody who keeps the tower's output. Times
are of one run, in turn: the ratio and the block-tokens count. Needs the clone's `tests/`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import mechkit as mk

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from helpers import vlm


@dataclass(frozen=True)
class Proportions:
    """Of a checkpoint, the language model's depth and width being 1.

    Attributes:
        checkpoint: Whose they are.
        mlp: How many neurons for an entry of the residual stream.
        kv_heads: Heads of keys and values for 4 of queries.
        tower: The tower's width, depth, and neurons for each entry of its own stream.
        patch: Side of a patch in pixels of the pictures here, so that as many patches as in the checkpoint make one position.
    """

    checkpoint: str
    mlp: float
    kv_heads: int
    tower: tuple[float, float, float]
    patch: int


PUBLISHED = {
    "llava": Proportions("llava-1.5-7b", 11008 / 4096, 4, (1024 / 4096, 24 / 32, 4), 8),
    "llava_next": Proportions("llava-v1.6-mistral-7b", 14336 / 4096, 1, (1024 / 4096, 24 / 32, 4), 12),
    "llava_onevision": Proportions("llava-onevision-qwen2-0.5b", 4864 / 896, 1, (1152 / 896, 26 / 24, 4304 / 1152), 12),
    "gemma3": Proportions("gemma-3-4b", 10240 / 2560, 2, (1152 / 2560, 27 / 34, 4304 / 1152), 4),
    "idefics3": Proportions("SmolVLM-256M", 1536 / 576, 1, (768 / 576, 12 / 30, 4), 4),
    "qwen2_5_vl": Proportions("Qwen2.5-VL-3B", 11008 / 2048, 1, (1280 / 2048, 32 / 36, 3420 / 1280), 4),
    "qwen3_vl": Proportions("Qwen3-VL-2B", 6144 / 2048, 2, (1024 / 2048, 24 / 28, 4), 4),
}


def build(family: str, layers: int, width: int) -> Any:
    make, name = vlm.FAMILIES[family]
    config, like = make(), PUBLISHED[family]
    text, vision = config.get_text_config(), config.vision_config
    text.num_hidden_layers, text.hidden_size, text.intermediate_size = layers, width, round(like.mlp * width)
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, like.kv_heads, width // 4
    text.max_position_embeddings = 1024
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i % len(text.layer_types)] for i in range(layers)]
    wide, deep = 16 * round(like.tower[0] * width / 16), round(like.tower[1] * layers)
    vision.hidden_size, vision.intermediate_size = wide, round(like.tower[2] * wide)
    if family in ("qwen2_5_vl", "qwen3_vl"):
        vision.out_hidden_size, vision.depth, vision.num_heads = width, deep, 4
        rope = dict(text.rope_parameters)
        rope["mrope_section"] = [width // 32, 3 * width // 64, width // 8 - width // 32 - 3 * width // 64]
        text.rope_parameters = rope
        if family == "qwen3_vl":
            vision.num_position_embeddings = 256
            vision.deepstack_visual_indexes = [deep * i // 4 for i in (1, 2, 3)]
        else:
            vision.fullatt_block_indexes = [i for i in range(deep) if i % 3 == 2]
    else:
        vision.num_hidden_layers, vision.num_attention_heads, vision.patch_size = deep, 4, like.patch
        vision.image_size = {"llava": 80, "gemma3": 96, "idefics3": 96}.get(family, 72)
        if family == "gemma3":
            config.mm_tokens_per_image, text.query_pre_attn_scalar, text.sliding_window = 36, width // 4, 64
        if family == "idefics3":
            config.scale_factor = 4
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
def naive(hf: Any, pairs: mk.PromptPairs, cells: list[tuple[int, int]]) -> tuple[torch.Tensor, float, float]:
    """`[cell prompt]`, one whole pass with a hook for each cell; the seconds of one, and those of them behind the tower."""
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
    values, behind = [], 0.0
    starts: list[float] = []
    clock = layers[0].register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    begin = time.perf_counter()
    for layer, position in cells:

        def put(_: Any, args: Any, kwargs: Any, layer: int = layer, position: int = position) -> Any:
            hidden = read(args, kwargs).clone()
            hidden[:, position] = kept[layer][:, position]
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        handle = layers[layer].register_forward_pre_hook(put, with_kwargs=True)
        logits = hf(corrupted.tokens, **corrupted.arguments).logits[:, -1]
        behind += time.perf_counter() - starts[-1]
        handle.remove()
        values.append(logits[:, 5] - logits[:, 9])
    seconds = time.perf_counter() - begin
    clock.remove()
    return torch.stack(values), seconds / len(cells), behind / len(cells)


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
    right, per_cell, behind = naive(hf, pairs, [(layer, places[i]) for layer, i in cells])
    begin = time.perf_counter()
    found = mk.image_patching(model, pairs, metric, progress=False)
    seconds = time.perf_counter() - begin
    mine = torch.stack([found.values[layer, i] for layer, i in cells])
    return {
        "family": family,
        "proportions": PUBLISHED[family].checkpoint,
        "layers": layers,
        "width": width,
        "pairs": n,
        "cells": len(grid),
        "mechkit_s": seconds,
        "whole_passes_s": per_cell * len(grid),
        "times_faster": per_cell * len(grid) / seconds,
        "times_faster_tower_left_out": behind * len(grid) / seconds,
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
    titles = ["proportions of", "cells", "mechkit, s", "whole passes, s", "times faster", "tower left out"]
    print("|", " | ".join([*titles, "times fewer block-tokens", "off by", "of"]), "|")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for family in args.families:
        one = measured(family, args.layers, args.width, args.pairs, args.sample)
        figures.append(one)
        seconds = f"{one['mechkit_s']:.2f} | {one['whole_passes_s']:.1f}"
        ratios = (
            f"{one['times_faster']:.1f} | {one['times_faster_tower_left_out']:.1f} | {one['fewer_block_tokens']:.2f}"
        )
        off = f"{one['largest_difference']:.1e} | {one['spread']:.2f}"
        print(f"| {one['proportions']} | {one['cells']:,} | {seconds} | {ratios} | {off} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
