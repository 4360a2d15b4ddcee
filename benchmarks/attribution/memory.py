"""How much memory attribution patching takes, against one forward and backward pass of the plain Hugging Face model.

    python benchmarks/attribution/memory.py [--model smollm2-135m] [--device cpu] [--json out.json]

There are 8 pairs of 128 random tokens. They differ from the second token on, so that no position can be skipped. The metric is a
logit difference at the last position; weights are frozen and the embeddings get a gradient. On a CPU every allocation of torch
is counted (`torch.profiler`), so that the figure is the same in every run; on a GPU it is the allocator's own peak.

The plain pass is measured with both kinds of attention, and with all logits or only the last position's, which the metric reads.
mechkit runs eager attention, whose patterns can be hooked, and computes only the last position's logits; it has to keep the
source run's activations at every site while the base run computes its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where shared.py is
from shared import held, machine, most_held

SITES = {
    "z, mlp_out": {"z": "layer head", "mlp_out": "layer"},
    "q, k, v, z, mlp_post, mlp_out": {
        **dict.fromkeys(("q", "k", "v", "z"), "layer head"),
        "mlp_post": "layer neuron",
        "mlp_out": "layer",
    },
}
BUDGETS = {"all pairs at once": 2**50, "default budget": None}
N_PAIRS, LENGTH = 8, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    report = {"machine": machine(args.device), "model": args.model, "memory": measure(args.model, args.device)}
    print_table(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(name: str, device: str) -> dict[str, dict[str, float]]:
    """Bytes used by `"plain"` passes and by `"mechkit"`'s attribution patching."""
    import mechkit as mk
    from mechkit.hooks.loading.pretrained import load_hf

    plain, tokenizer = load_hf(name, dtype=torch.float32, revision=None, trust_remote_code=False)
    plain = plain.to(device).requires_grad_(False)
    vocabulary, rng = plain.config.get_text_config().vocab_size, torch.Generator().manual_seed(0)
    clean, shift = (torch.randint(1, vocabulary, (N_PAIRS, LENGTH), generator=rng) for _ in range(2))
    corrupted = torch.cat([clean[:, :1], (clean + shift)[:, 1:] % vocabulary], 1)
    right, wrong = torch.randperm(vocabulary, generator=rng)[: 2 * N_PAIRS].reshape(2, -1).to(device)
    each = torch.arange(N_PAIRS, device=device)

    def forward_and_backward(**options: Any) -> None:
        embedded = plain.get_input_embeddings()(corrupted.to(device)).detach().requires_grad_()
        logits = plain(inputs_embeds=embedded, use_cache=False, **options).logits[:, -1]
        torch.autograd.grad((logits[each, right] - logits[each, wrong]).sum(), embedded)

    figures: dict[str, dict[str, float]] = {"plain": {}, "mechkit": {}}
    for attention in ("sdpa", "eager"):  # ends with the one that mechkit hooks
        plain.set_attn_implementation(attention)
        for label, options in (("all logits", {}), ("last logits", {"logits_to_keep": 1})):
            used = most_allocated(device, partial(forward_and_backward, **options))
            figures["plain"][f"{attention}, {label}"] = used
    model = mk.HookedModel.from_hf(plain, tokenizer, name=name)
    answers = list(zip(right.tolist(), wrong.tolist(), strict=True))
    pairs = mk.PromptPairs.from_tokens(list(clean), list(corrupted), answers, model=model)
    metric = mk.logit_diff(pairs)
    for label, sites in SITES.items():
        for room, budget in BUDGETS.items():
            run = partial(mk.attribution_patching, model, pairs, metric, sites, budget=budget)
            figures["mechkit"][f"{label}; {room}"] = most_allocated(device, run)
    return figures


def most_allocated(device: str, run: Callable[[], Any]) -> float:
    """Peak bytes of tensors during `run`, above those allocated before. Each of torch's allocations is counted, so that the
    number is the same in every run."""
    gc.collect()
    if device.startswith("cuda"):
        begin = held(device)
        run()
        return most_held(device) - begin
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        most = max(most, alive)
    return float(most)


def print_table(report: dict[str, Any]) -> None:
    found = report["memory"]
    print(f"{report['model']}, float32, {N_PAIRS} pairs of {LENGTH} random tokens, on {report['machine']}\n")
    print("Peak MiB, and its ratio to the plain forward and backward pass's (the aim is 1.5 or less):\n")
    print(f"| | MiB | {' | '.join(f'÷ {name}' for name in found['plain'])} |")
    print(f"| --- | --- |{' --- |' * len(found['plain'])}")
    for kind in ("plain", "mechkit"):
        for name, used in found[kind].items():
            ratios = " | ".join(f"{used / other:.2f}" for other in found["plain"].values())
            print(f"| {kind}: {name} | {used / 2**20:.0f} | {ratios} |")


if __name__ == "__main__":
    main()
