"""Published numbers for GPT-2 small. Its weights are on the hub: these are skipped where they are not in the local cache,
and nothing is called reproduced that was not run."""

from __future__ import annotations

import pytest
import torch

import mechkit as mk

pytestmark = pytest.mark.hub

# TransformerLens's exploratory demo: prompts, names and the logit difference of each of the eight.
PROMPTS = (
    ("When John and Mary went to the shops,{} gave the bag to", " Mary", " John"),
    ("When Tom and James went to the park,{} gave the ball to", " Tom", " James"),
    ("When Dan and Sid went to the shops,{} gave an apple to", " Dan", " Sid"),
    ("After Martin and Amy went to the park,{} gave a drink to", " Martin", " Amy"),
)
LOGIT_DIFFS = (3.3368, 3.2018, 2.7098, 3.7976, 1.7206, 5.2815, 2.6010, 5.7676)
NAME_MOVERS = {"L9H9", "L9H6", "L10H0"}
NEGATIVE_NAME_MOVERS = {"L10H7", "L11H10"}


@pytest.fixture(scope="module")
def pairs(gpt2):
    clean, corrupted, answers = [], [], []
    for template, one, other in PROMPTS:
        for right, wrong in ((one, other), (other, one)):
            clean.append(template.format(wrong))
            corrupted.append(template.format(right))
            answers.append((right, wrong))
    return mk.PromptPairs.from_text(gpt2, clean, corrupted, answers)


def test_logit_differences_of_the_eight_prompts(gpt2, pairs):
    heads = mk.activation_patching(gpt2, pairs, mk.logit_diff(pairs), layers=[11], progress=False)
    assert torch.allclose(heads.baseline["clean"], torch.tensor(LOGIT_DIFFS), atol=2e-3)


def test_name_movers_and_negative_name_movers(gpt2, pairs):
    heads = mk.activation_patching(gpt2, pairs, mk.logit_diff(pairs), progress=False).mean("prompt").normalized()
    strongest = {cell.label: cell.value for cell in heads.top(12)}
    assert set(strongest) >= {"L9H9", "L10H7"}
    assert all(strongest[label] > 0 for label in NAME_MOVERS & set(strongest))
    assert all(strongest[label] < 0 for label in NEGATIVE_NAME_MOVERS & set(strongest))


def test_path_patching_to_the_logits(gpt2):
    """Wang et al. 2022, figure 3b: name movers write the answer directly, negative ones against it."""
    pairs = mk.tasks.ioi(gpt2, n=24, seed=0)
    paths = mk.path_patching(
        gpt2, pairs, mk.logit_diff(pairs), receivers=["logits"], freeze="heads", direction="noise", progress=False
    )
    effects = {cell.label: cell.effect for cell in paths.top(8)}
    assert all(effects.get(label, 0) < 0 for label in NAME_MOVERS & set(effects))
    assert all(effects.get(label, 0) > 0 for label in NEGATIVE_NAME_MOVERS & set(effects))
    assert {"L9H9", "L10H7"} <= set(effects)


def test_validates(gpt2):
    assert gpt2.validate().logits < 1e-4
