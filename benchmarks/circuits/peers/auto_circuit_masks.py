"""auto-circuit (https://github.com/UFO-101/auto-circuit) on the pairs that `../other_libraries.py` writes.

    /path/to/python benchmarks/circuits/peers/auto_circuit_masks.py FOLDER    # a Python with auto-circuit, transformer-lens 2.x

Computes auto-circuit's mask gradients, which at mask 0 equal EAP at the clean run. (Its integrated gradients move all masks at
once, a different path from EAP-IG's.) Prompts are token ids; nothing in the package is replaced.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.utils.graph_utils import patchable_model
from hooked_transformer import begin, best_of, end, tokens


def main() -> None:
    folder = Path(sys.argv[1])
    model, run = begin(folder)
    random.seed(0)
    answers = torch.tensor(run["answers"], device=run["device"])
    data = PromptDataset(tokens(run, "clean"), tokens(run, "corrupted"), list(answers[:, :1]), list(answers[:, 1:]))
    n = len(run["clean"])
    loader = PromptDataLoader(data, seq_len=None, diverge_idx=0, batch_size=n, shuffle=False)
    patchable = patchable_model(
        model, factorized=True, slice_output="last_seq", separate_qkv=True, device=torch.device(run["device"])
    )
    tasks: dict[str, Any] = {}
    values: dict[str, dict[str, float]] = {}
    if "EAP" in run["tasks"]:
        # the gradient of -(right - wrong) by the mask, where mask 1 is corrupted: positive where clean supports the metric
        tasks["EAP"], scores = best_of(
            run,
            lambda: None,
            lambda _: mask_gradient_prune_scores(patchable, loader, None, "logit", "avg_diff", mask_val=0.0),
        )
        values["EAP"] = {name_of(edge): float(edge.prune_score(scores)) for edge in patchable.edges}
        tasks["EAP"]["edges"] = len(values["EAP"])
    end(folder, "auto-circuit", tasks, values)


def name_of(edge: Any) -> str:
    """`"A9.6->A11.2.Q"` as `"a9.h6->a11.h2<q>"`."""
    return f"{_node(edge.src.name)}->{_node(edge.dest.name)}"


def _node(name: str) -> str:
    if name in ("Resid Start", "Resid End"):
        return {"Resid Start": "input", "Resid End": "logits"}[name]
    if name.startswith("MLP "):
        return "m" + name[4:]
    layer, head, *which = name[1:].split(".")
    return f"a{layer}.h{head}" + (f"<{which[0].lower()}>" if which else "")


if __name__ == "__main__":
    main()
