"""A prompt's values do not depend on which other prompts there are, nor on their order: every technique, every family.

Chunks sort prompts by length and by their first difference, batches hold several edits of several prompts: whatever is run
together, results come back to their prompts. Each technique is run on a set of pairs of several lengths and first differences,
on the same set in another order, on its halves, and on a pair alone. Families take turns, so that each technique meets several
families and each family several techniques.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mechkit as mk
from helpers.families import FAMILIES
from helpers.techniques import (
    EVEN,
    OF_READY_METRICS,
    PERMUTED,
    RAGGED,
    WITH_METRIC,
    WITHOUT_METRIC,
    by_hand,
    family,
)
from mechkit.circuits import EdgeScores

HALVES = ([0, 3], [1, 2, 4])
ALONE = [2]


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
