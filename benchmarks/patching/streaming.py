"""A model larger than the memory: the head sweep with blocks left in their files, in an address space that is limited.

    python benchmarks/patching/streaming.py [--layers 32] [--width 640] [--times 4] [--prompts 4] [--json out.json]

A random Llama is written to a temporary folder, block by block. A process of its own then allows itself only a part of the
weights' size beyond what it has when everything is imported (`--times 4`: a quarter), loads the model with `stream=True` and
sweeps it. Another one, with no limit, sweeps the same model from memory. Compared are the values (to the bit), the seconds, how
often each block was read in the sweep, and how long reading the weights takes by itself. Linux only: the limit is `RLIMIT_AS`.
C's allocator is told not to reserve addresses for each thread, which are no memory but would count.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where shared.py is
from shared import SWEEPS, machine

VOCAB, LENGTH = 1000, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument(
        "--times", type=float, default=4.0, help="how many times larger than what is allowed the blocks are"
    )
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--first-difference", type=int, default=3, help=f"of {LENGTH} tokens")
    parser.add_argument(
        "--budget", type=int, default=32 * 2**20, help="bytes for the sweep, in addition to the weights"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # "streamed" or "memory", and the folder
    args = parser.parse_args()
    if args.child:
        sweep(args, *args.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        n_bytes = write_model(Path(folder), args.layers, args.width)
        found = {}
        for how in ("memory", "streamed"):
            child = [sys.executable, __file__, *sys.argv[1:], "--child", how, folder]
            subprocess.run(child, check=True, env={**os.environ, "MALLOC_ARENA_MAX": "1"})
            found[how] = json.loads((Path(folder) / f"{how}.json").read_text())
        values = [torch.load(Path(folder) / f"{how}.pt", weights_only=True) for how in found]
    report = {
        "machine": machine("cpu"),
        "block_bytes": n_bytes,
        "equal_to_the_bit": torch.equal(*values),
        "largest_difference": float((values[0] - values[1]).abs().max()),
        **found,
    }
    memory, streamed = found["memory"], found["streamed"]
    print(f"{args.layers} blocks of together {n_bytes / 2**20:.0f} MiB, {args.prompts} pairs, on {report['machine']}\n")
    ratio = streamed["seconds"] / memory["seconds"]
    print(f"in memory {memory['seconds']:.1f} s; streamed {streamed['seconds']:.1f} s, {ratio:.2f} times")
    print(
        f"allowed beyond the start: {streamed['allowed'] / 2**20:.0f} MiB; reading all blocks once: {streamed['reading']:.1f} s"
    )
    print("in memory by", memory["replay"], "; streamed by", streamed["replay"])
    print(f"each block was read {streamed['reads']} times in the sweep; equal to the bit: {report['equal_to_the_bit']}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def write_model(folder: Path, layers: int, width: int) -> int:
    """Writes a random Llama, a file for each block; the bytes of all blocks."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    config.num_hidden_layers = 1
    index, n_bytes = {}, 0
    for layer in range(layers):
        torch.manual_seed(layer)
        one = LlamaForCausalLM(config).state_dict()
        block = {
            k.replace(".layers.0.", f".layers.{layer}."): v.contiguous() for k, v in one.items() if ".layers." in k
        }
        n_bytes += sum(v.nbytes for v in block.values())
        if layer == 0:
            block |= {k: v.contiguous() for k, v in one.items() if ".layers." not in k}
        save_file(block, folder / f"{layer}.safetensors", {"format": "pt"})
        index |= dict.fromkeys(block, f"{layer}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return n_bytes


def sweep(args: argparse.Namespace, how: str, folder: str) -> None:
    """One sweep, in this process; its figures and values are written into the folder."""
    import mechkit as mk
    from mechkit.engine._memory import Budget
    from mechkit.hooks._streamed import streamed_of

    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, VOCAB, (args.prompts, LENGTH), generator=generator)
    corrupted = clean.clone()
    corrupted[:, args.first_difference] = (clean[:, args.first_difference] + 1) % VOCAB
    pairs = mk.PromptPairs.from_tokens(list(clean), list(corrupted), [(1, 2)] * args.prompts)
    site, over = SWEEPS["head"]

    def run(model: Any, some: Any) -> Any:
        return mk.activation_patching(
            model, some, mk.logit_diff(some), site=site, over=over, budget=args.budget, progress=False
        )

    figures: dict[str, Any] = {}
    if how == "streamed":
        with tempfile.TemporaryDirectory() as small:  # imports, threads and their stacks: not what is measured
            write_model(Path(small), 2, 64)
            run(mk.HookedModel.from_pretrained(small, device="cpu", stream=True), pairs[:1])
        n_bytes = sum(one.stat().st_size for one in Path(folder).glob("*.safetensors"))
        figures["allowed"] = int(n_bytes / args.times)
        start = _address_space("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (start + figures["allowed"],) * 2)
    model = mk.HookedModel.from_pretrained(folder, device="cpu", stream=how == "streamed")
    if (
        how == "memory"
    ):  # as safetensors' files are mapped, tensors lie at odd addresses: kernels round in another order there
        for parameter in model.bridge.original_model.parameters():
            parameter.data = parameter.data.clone()
    streamed, halvings = streamed_of(model.bridge), []
    halve = Budget.halve
    Budget.halve = lambda budget: (
        halvings.append(1) or halve(budget)
    )  # when a batch does not fit: others are as right, not the same
    before = list(streamed.reads) if streamed else []
    begin = time.perf_counter()
    result = run(model, pairs)
    figures |= {"seconds": time.perf_counter() - begin, "block_tokens": result.cost.block_tokens}
    figures |= {"replay": result.provenance["replay"], "halvings": len(halvings)}
    if streamed:
        figures["addresses"] = _address_space("VmPeak") - start
        figures["reads"] = max(end - begun for end, begun in zip(streamed.reads, before, strict=True))
        begin = time.perf_counter()
        for layer in range(model.n_layers):
            streamed._read(layer)
        figures["reading"] = time.perf_counter() - begin
    torch.save(result.values, Path(folder) / f"{how}.pt")
    (Path(folder) / f"{how}.json").write_text(json.dumps(figures))


def _address_space(which: str) -> int:
    """Bytes of addresses that this process uses (`"VmSize"`), or that it used at most (`"VmPeak"`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) * 1024


if __name__ == "__main__":
    main()
