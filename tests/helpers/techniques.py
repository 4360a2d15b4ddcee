"""Every technique that takes pairs of prompts, as one call, and pairs for it: of several lengths, and of one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

import mechkit as mk
from helpers.families import build_hf
from mechkit.circuits import EdgeScores

QUIET = {"progress": False}
PERMUTED = [3, 0, 4, 2, 1]


@cache
def family(name: str) -> mk.HookedModel:
    return mk.HookedModel.from_hf(build_hf(name))


def make_pairs(lengths: tuple[int, ...], differ_at: tuple[int, ...] = (4, 1, 3, 2, 1)) -> mk.PromptPairs:
    """Pairs with answers of their own, and a named position that differs from pair to pair."""
    generator = torch.Generator().manual_seed(5)
    clean = [torch.randint(3, 61, (length,), generator=generator) for length in lengths]
    corrupted = [row.clone() for row in clean]
    for row, at in zip(corrupted, differ_at, strict=True):
        row[at] = (row[at] - 3 + 17) % 58 + 3
    answers = [(5 + i, 30 + 2 * i) for i in range(len(lengths))]
    return mk.PromptPairs.from_tokens(clean, corrupted, answers, positions={"at": differ_at})


RAGGED, EVEN = make_pairs((8, 6, 8, 6, 8)), make_pairs((7,) * 5)


def by_hand(pairs: mk.PromptPairs) -> Callable[[Tensor], Tensor]:
    """`logit_diff` as a plain function, which knows its prompts by their place alone."""
    right, wrong = (torch.tensor([ids[0] for ids in side]) for side in (pairs.right, pairs.wrong))
    rows = torch.arange(len(pairs))
    return lambda logits: logits[rows, -1, right] - logits[rows, -1, wrong]


def circuit_of(model: mk.HookedModel) -> mk.Circuit:
    return mk.Circuit.random(model, mk.Graph.of(model).n_edges // 2, 0)


def some_edges(model: mk.HookedModel) -> list[str]:
    return [edge.name for edge in list(mk.Graph.of(model).edges)[::60]]


# A technique: from model, pairs and metric to values whose last axis is the prompts'.
WITH_METRIC: dict[str, Callable[..., mk.Result | EdgeScores]] = {
    "activation_patching": lambda *a: mk.activation_patching(*a, site="z", over="layer head", **QUIET),
    "activation_patching, noise": lambda *a: mk.activation_patching(
        *a, "q", "layer position head", direction="noise", **QUIET
    ),
    "ablation": lambda *a: mk.ablation(*a, site="mlp_out", over="layer position", mode="zero", **QUIET),
    "attribution_patching": lambda *a: mk.attribution_patching(*a, "z", "layer position head"),
    "integrated_gradients": lambda *a: mk.integrated_gradients(*a, steps=2),
    "integrated_gradients, input": lambda *a: mk.integrated_gradients(*a, steps=2, path="input", direction="noise"),
    "relp": lambda *a: mk.relp(*a),
    "atp_star": lambda *a: mk.atp_star(*a, grad_drop=True),
    "atp_star, queries": lambda *a: mk.atp_star(*a, "q", "layer head", grad_drop=False),
    "neuron_attribution": lambda *a: mk.neuron_attribution(*a, site="mlp_out", over="layer", steps=2),
    "edge_attribution": lambda *a: mk.edge_attribution(*a, steps=2),
    "edge_attribution, activation": lambda *a: mk.edge_attribution(*a, steps=1, path="activation", direction="noise"),
    "edge_patching": lambda *a: mk.edge_patching(*a, some_edges(a[0]), **QUIET),
    "path_patching": lambda *a: mk.path_patching(*a, senders=["m0", "a1.h1"], freeze="heads", **QUIET),
    "evaluate_circuit": lambda *a: (
        mk.evaluate_circuit(circuit_of(a[0]), *a, random=1, sets=0, minimality=None, **QUIET).runs
    ),
    "evaluate_circuit, zero": lambda *a: (
        mk.evaluate_circuit(circuit_of(a[0]), *a, random=0, sets=0, minimality=None, ablation="zero", **QUIET).runs
    ),
    "attention_relevance": lambda *a: mk.attention_relevance(*a, **QUIET),
    "gradient_x_input": lambda *a: mk.gradient_x_input(*a),
    "token_integrated_gradients": lambda *a: mk.token_integrated_gradients(*a, steps=2),
}


OF_READY_METRICS = {
    "direct_logit_attribution": lambda *a: mk.direct_logit_attribution(*a, over="layer head"),
    "dla_erasure_check": lambda *a: mk.dla_erasure_check(*a, (1, 1)).written,
}
WITHOUT_METRIC = {
    "logit_lens": lambda model, pairs, _: mk.logit_lens(model, pairs, over="layer position", **QUIET),
    "hidden_states": lambda model, pairs, _: mk.hidden_states(model, pairs, position="at", **QUIET),
    "attention_rollout": lambda model, pairs, _: mk.attention_rollout(model, pairs, position="at", **QUIET),
}
