"""The EAP-IG package (https://github.com/hannamw/EAP-IG) on the pairs that `../other_libraries.py` writes.

    /path/to/python benchmarks/circuits/peers/eap_ig.py FOLDER      # a Python with `eap` and `transformer-lens` 2.x

Computes EAP at the clean run; EAP-IG on inputs, at points with clean parts 0, 1/n, … (n-1)/n; gradients at both ends; and the
exact effects of some edges, each removed from the whole graph. The package's sign is corrupted minus clean, which is reversed
here. It always divides by the number of examples, so it is given a metric that sums over them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import eap.attribute
import eap.evaluate
import eap.utils
import torch
from eap.attribute import attribute
from eap.evaluate import evaluate_graph
from eap.graph import Graph
from hooked_transformer import begin, best_of, end

METHODS = {"EAP": "EAP", "EAP-IG": "EAP-IG-inputs", "clean-corrupted": "clean-corrupted"}


def main() -> None:
    folder = Path(sys.argv[1])
    model, run = begin(folder)
    feed_token_ids(run["device"])
    examples = [(run["clean"], run["corrupted"], torch.tensor(run["answers"], device=run["device"]))]  # one batch
    tasks: dict[str, Any] = {}
    values: dict[str, dict[str, float]] = {}
    for task in (task for task in run["tasks"] if task in METHODS):
        options = {"ig_steps": run["steps"]} if task == "EAP-IG" else {}

        def prepare() -> Graph:
            model.zero_grad(set_to_none=True)
            return Graph.from_model(model)

        def score(graph: Graph, task: str = task, options: dict[str, int] = options) -> Graph:
            attribute(model, graph, examples, metric_sum, method=METHODS[task], quiet=True, **options)
            return graph

        tasks[task], graph = best_of(run, prepare, score)
        values[task] = {name: -float(edge.score) for name, edge in graph.edges.items()}
        tasks[task]["edges"] = len(values[task])
    if "exact" in run["tasks"]:
        tasks["exact"], values["exact"] = exact(model, run, examples)
    end(folder, "eap", tasks, values)


def exact(model: Any, run: dict[str, Any], examples: list[Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Effects of the edges that `run` names; an edge of a key-value head is all of its query heads' edges together."""
    graph = Graph.from_model(model)

    def value(without: list[str]) -> float:
        graph.in_graph[:] = graph.real_edge_mask  # reset: evaluate_graph prunes its argument
        for name in without:
            graph.edges[name].in_graph = False
        return float(evaluate_graph(model, graph, examples, metric_each, quiet=True).mean())

    whole = value([])
    figures, found = best_of(
        run | {"repeats": 1},
        lambda: None,
        lambda _: {name: whole - value(parts) for name, parts in run["exact"].items()},
    )
    return figures | {"edges": len(found)}, found


def metric_each(logits: torch.Tensor, _: Any, lengths: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    chosen = logits[torch.arange(len(logits)), lengths - 1].gather(-1, answers)
    return chosen[:, 0] - chosen[:, 1]


def metric_sum(*arguments: Any) -> torch.Tensor:
    return metric_each(*arguments).sum()


def feed_token_ids(device: str) -> None:
    """Replaces two parts of the package: it tokenizes texts with a BOS, where this script has token ids, and it puts its scores
    on "cuda" whatever the model's device is."""

    def tokenize(model: Any, inputs: Any, max_length: int | None = None) -> tuple[Any, Any, Any, int]:
        ids = torch.tensor(inputs, device=device)
        mask = torch.ones_like(ids)
        return ids, mask, mask.sum(1), ids.shape[1]

    for module in (eap.utils, eap.attribute, eap.evaluate):
        module.tokenize_plus = tokenize
    if not device.startswith("cuda"):
        zeros = torch.zeros
        torch.zeros = lambda *size, **kw: zeros(
            *size, **(kw | {"device": device} if kw.get("device") == "cuda" else kw)
        )


if __name__ == "__main__":
    main()
