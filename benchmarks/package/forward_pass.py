"""The time of a plain forward pass, no hooks: mechkit against the bare Hugging Face model (GPT-2 small's shape, random weights).

    python benchmarks/package/forward_pass.py [--batch 4] [--length 64] [--repeats 15]

The two are timed alternately, and the median of the pairs' ratios is printed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config

import mechkit as mk


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    bare = AutoModelForCausalLM.from_config(GPT2Config(), attn_implementation="eager").eval().to(args.device)
    model = mk.HookedModel.from_hf(copy.deepcopy(bare), name="gpt2 shape")
    tokens = torch.randint(0, model.d_vocab, (args.batch, args.length)).to(args.device)
    bare(tokens), model(tokens)
    ratios = [seconds(args.device, model, tokens) / seconds(args.device, bare, tokens) for _ in range(args.repeats)]
    print(f"mechkit / Hugging Face: {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")


def seconds(device: str, model: Any, tokens: torch.Tensor) -> float:
    begin = time.perf_counter()
    model(tokens)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
