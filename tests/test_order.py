"""A prompt's values do not depend on which other prompts there are, nor on their order: every technique, every family.

Chunks sort prompts by length and by their first difference, batches hold several edits of several prompts: whatever is run
together, results come back to their prompts. Each technique is run on a set of pairs of several lengths and first differences,
on the same set in another order, on its halves, and on a pair alone. Families take turns, so that each technique meets several
families and each family several techniques.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from families import FAMILIES, build_hf
from torch import Tensor

import mechkit as mk
from mechkit.circuits import EdgeScores

QUIET = {"progress": False}
PERMUTED = [3, 0, 4, 2, 1]
HALVES = ([0, 3], [1, 2, 4])
ALONE = [2]


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


# Of a technique: from model, pairs and metric to values whose last axis is the prompt's.
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
TECHNIQUES = WITH_METRIC | OF_READY_METRICS | WITHOUT_METRIC
NAMES = list(FAMILIES)
TOLERANCE = {"gpt_neo": 1e-5}  # its attention multiplies in float32 in any model, and rounds by the size of the batch
REFUSED = {"relp": {"mixtral"}, "dla_erasure_check": {"mixtral"}}  # reasons are tested where the technique is


def values_of(found: mk.Result | EdgeScores, longest: int = 8) -> Tensor:
    """`[*dims prompt]`; positions that the longest of the prompts lacks are NaN, as those that any prompt lacks."""
    result = found.result if isinstance(found, EdgeScores) else found
    values = result.values.double()
    for axis, dim in enumerate(result.dims):
        if dim in ("pos", "src"):
            shape = [longest - size if i == axis else size for i, size in enumerate(values.shape)]
            values = torch.cat([values, torch.full(shape, torch.nan, dtype=values.dtype)], axis)
    return values.movedim(result.dims.index("prompt"), -1)


def assert_same(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-10) -> None:
    assert found.shape == expected.shape, what
    assert torch.equal(found.isnan(), expected.isnan()), what
    off = float((found - expected).nan_to_num().abs().max())
    assert off <= tolerance * max(1.0, float(expected.nan_to_num().abs().max())), f"{what}: off by {off:.1e}"


def taking_turns(technique: str, n: int) -> list[str]:
    """Families of a technique: others for each."""
    at = list(TECHNIQUES).index(technique)
    turn = [NAMES[(n * at + k) % len(NAMES)] for k in range(len(NAMES))]
    return [name for name in turn if name != "mixtral" and name not in REFUSED.get(technique, ())][:n]


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_values_belong_to_their_prompts_whatever_is_run_together(technique: str) -> None:
    run = TECHNIQUES[technique]
    for name in taking_turns(technique, 2):
        model = family(name)
        whole = values_of(run(model, RAGGED, mk.logit_diff))
        spread = (whole - whole[..., :1]).nan_to_num().abs().amax()
        assert spread > 1e-3, "prompts that are alike would hide their order"
        for ids in (PERMUTED, *HALVES, ALONE):
            some = values_of(run(model, RAGGED[ids], mk.logit_diff))
            assert_same(some, whole[..., ids], f"{technique} of {name}, prompts {ids}", TOLERANCE.get(name, 1e-10))


@pytest.mark.parametrize("technique", WITH_METRIC)
def test_a_plain_function_sees_all_prompts_in_their_order(technique: str) -> None:
    run, name = WITH_METRIC[technique], taking_turns(technique, 3)[-1]
    model = family(name)
    ready = values_of(run(model, EVEN, mk.logit_diff(EVEN)))
    assert_same(values_of(run(model, EVEN, by_hand(EVEN))), ready, f"{technique} of {name}")
    other = EVEN[PERMUTED]
    assert_same(values_of(run(model, other, by_hand(other))), ready[..., PERMUTED], f"{technique} of {name}, permuted")
