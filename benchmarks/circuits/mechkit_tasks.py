"""What `other_libraries.py` times in mechkit, and what it shares with the other libraries' files."""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from shared import make_pairs, sample

Values = dict[str, float]  # by name of an edge, a size or a pair
Figures = dict[str, Any]
# What is timed, and what reads figures and values off its result.
Work = tuple[Callable[[], Any], Callable[[Any], tuple[Figures, Values]]]


def with_mechkit(args: argparse.Namespace) -> dict[str, Work]:
    import mechkit as mk

    model = mk.HookedModel.from_pretrained(args.model, device=args.device)
    pairs, many = (make_pairs(mk, model, "plain", n) for n in (args.pairs, args.curve_pairs))
    mha, mha_pairs = random_model(args, pairs)
    shallow, shallow_pairs = random_model(args, pairs, n_layer=4, n_head=6, n_embd=384)
    metric, mha_metric, many_metric = mk.logit_diff(pairs), mk.logit_diff(mha_pairs), mk.logit_diff(many)
    graph, quiet, ig = mk.Graph.of(model), {"progress": False}, {"steps": args.steps, "rule": "left"}
    sampled = even(list(graph.edges), args.edges)
    queries = [f"a0.h0->a{layer}.h{head}<q>" for layer in range(1, mha.n_layers) for head in range(mha.n_heads)]
    scores = mk.edge_attribution(model, pairs, metric, **ig, per_prompt=False)
    best = best_edges(mk, scores, args.candidates)
    circuit = mha_circuit(mk, mha, mha_pairs, args.candidates)

    def eap(**options: Any) -> Work:
        return lambda: mk.edge_attribution(model, pairs, metric, **options), of_scores

    def acdc(model: Any, pairs: Any, start: Any, threshold: float) -> Work:
        n = mk.Graph.of(model).n_edges if start is None else start.n_edges

        def read(found: Any) -> tuple[Figures, Values]:
            keys = ("block_tokens", "naive_block_tokens", "n_tested", "distance", "threshold")
            return {"edges": n, "kept": found.n_edges} | {key: found.provenance[key] for key in keys}, {}

        return lambda: mk.acdc(model, pairs, threshold=threshold, start=start, prune=False, **quiet), read

    def curve() -> tuple[Any, collections.Counter[int]]:
        with counted_runs(model) as rows:
            return mk.faithfulness_curve(scores, model, many, many_metric, random=0, **quiet), rows

    def of_curve(found: tuple[Any, collections.Counter[int]]) -> tuple[Figures, Values]:
        curve, rows = found
        runs = {str(length): n / len(many) for length, n in sorted(rows.items())}
        figures = {"circuits": len(curve.n_edges), "pairs": len(many), "runs_by_positions": runs}
        values = dict(zip(map(str, curve.n_edges), curve.faithfulness, strict=True))
        return figures | {"cpr": curve.cpr, "cmd": curve.cmd} | of_cost(curve.runs.cost), values

    def of_report(report: Any) -> tuple[Figures, Values]:
        values = report.runs.sel(run="circuit").values.double().tolist()
        return {"edges": circuit.n_edges} | of_cost(report.cost), by_pair(values)

    alone = {"random": 0, "sets": 0, "minimality": None}
    return {
        "EAP": eap(steps=1, direction="noise"),
        "EAP-IG": eap(**ig),
        "clean-corrupted": eap(rule="clean-corrupted"),
        "exact": (
            lambda: mk.edge_patching(model, pairs, metric, sampled, direction="noise", **quiet),
            lambda found: (of_scores(found)[0] | {"all_edges": graph.n_edges}, of_scores(found)[1]),
        ),
        "ACDC": acdc(model, pairs, best, args.threshold),
        "ACDC-4-layers": acdc(shallow, shallow_pairs, None, args.shallow_threshold),
        "curve": (curve, of_curve),
        "MHA-EAP": (lambda: mk.edge_attribution(mha, mha_pairs, mha_metric, steps=1), of_scores),
        "MHA-path": (lambda: mk.edge_patching(mha, mha_pairs, mha_metric, queries, **quiet), of_scores),
        "MHA-circuit": (
            lambda: mk.evaluate_circuit(circuit, mha, mha_pairs, mha_metric, **alone, **quiet),
            of_report,
        ),
    }


def even(edges: list[Any], most: int) -> list[Any]:
    """An evenly spaced sample of edges, which are ordered by reader and then by writer."""
    return [edges[i] for i in sample(len(edges), most)]


def random_model(args: argparse.Namespace, pairs: Any, **shape: int) -> tuple[Any, Any]:
    """A model of GPT-2 small's shape (except for the given `shape`) with random weights, and the pairs' token ids for it. The
    weights' standard deviation is five times the usual one, so that all parts of the model matter."""
    from transformers import AutoModelForCausalLM, GPT2Config

    import mechkit as mk

    torch.manual_seed(0)
    config = GPT2Config(**shape, initializer_range=0.1)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(args.device)
    model = mk.HookedModel.from_hf(plain, name=f"gpt2 shape, {config.n_layer} layers")
    answers = [(right[0], wrong[0]) for right, wrong in zip(pairs.right, pairs.wrong, strict=True)]
    sides = (list(pairs.clean.tokens), list(pairs.corrupted.tokens))
    return model, mk.PromptPairs.from_tokens(*sides, answers, model=model)


def mha_circuit(mk: Any, model: Any, pairs: Any, n_edges: int) -> Any:
    scores = mk.edge_attribution(model, pairs, mk.logit_diff(pairs), steps=1, per_prompt=False)
    return best_edges(mk, scores, n_edges)


def best_edges(mk: Any, scores: Any, n_edges: int) -> Any:
    """The best edges without dead ends: fewer than `n_edges`."""
    return mk.Circuit.from_scores(scores, n_edges=min(n_edges, scores.graph.n_edges))


def of_scores(scores: Any) -> tuple[Figures, Values]:
    frame = scores.to_dataframe()
    values = dict(zip(frame["writer"] + "->" + frame["reader"], map(float, frame["score"]), strict=True))
    return {"edges": len(values)} | of_cost(scores.cost), values


def of_cost(cost: Any) -> Figures:
    return {"block_tokens": cost.block_tokens, "naive_block_tokens": cost.naive_block_tokens}


def by_pair(values: list[float]) -> Values:
    return {f"pair {i}": float(value) for i, value in enumerate(values)}


@contextmanager
def counted_runs(model: Any) -> Iterator[collections.Counter[int]]:
    """Counts the rows that go through the first layer's MLP, by number of positions: one per run of a prompt, edited or not."""
    rows: collections.Counter[int] = collections.Counter()

    def count(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        rows[inputs[0].shape[-2]] += inputs[0][..., 0, 0].numel()

    handle = model.bridge.blocks[0].mlp.register_forward_pre_hook(count)
    try:
        yield rows
    finally:
        handle.remove()
