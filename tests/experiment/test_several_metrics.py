"""Several metrics read off one sweep: each equals a sweep of its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import mechkit as mk
from helpers.families import FAMILIES, build_hf
from helpers.tiny import model_of


@pytest.fixture(scope="module")
def model() -> mk.HookedModel:
    return mk.HookedModel.from_hf(build_hf("llama"))


@pytest.fixture(scope="module")
def pairs(model: mk.HookedModel) -> mk.PromptPairs:
    """Prompts of two lengths; the read position differs from metric to metric."""
    generator = torch.Generator().manual_seed(0)
    clean = [torch.randint(model.d_vocab, (n,), generator=generator) for n in (5, 5, 7)]
    corrupted = [row.clone() for row in clean]
    for row, at in zip(corrupted, (1, 2, 3), strict=True):
        row[at] = (row[at] + 1) % model.d_vocab
    return mk.PromptPairs.from_tokens(
        clean, corrupted, [(3, 5), ([4, 9], 7), (11, [2, 6])], positions={"early": [3, 4, 4]}
    )


def metrics(pairs: mk.PromptPairs) -> dict[str, list]:
    at_early = mk.logit_diff(pairs, position="early")
    return {
        "same place": [mk.logit_diff, mk.log_prob, mk.accuracy],
        "same place, whole vocabulary": [mk.logit_diff, mk.kl_divergence, mk.prob_diff],
        "other places": [mk.logit_diff, at_early],
        "many places": [mk.loss, at_early, mk.logit_diff(pairs, pool="logsumexp")],
        "one alone": [mk.logit_diff],
    }


@pytest.mark.parametrize(
    "which", ["same place", "same place, whole vocabulary", "other places", "many places", "one alone"]
)
@pytest.mark.parametrize("replay", [True, False])
def test_each_is_as_if_it_were_alone(model: mk.HookedModel, pairs: mk.PromptPairs, which: str, replay: bool) -> None:
    together = metrics(pairs)[which]
    for technique in (
        partial(mk.activation_patching, site="resid_pre", over="layer pos"),
        partial(mk.activation_patching, site="z", over="layer head", direction="noise"),
        partial(mk.ablation, site="mlp_out", over="layer"),
    ):
        results = technique(model, pairs, together, progress=False, replay=replay)
        assert len(results) == len(together)
        for metric, result in zip(together, results, strict=True):
            alone = technique(model, pairs, metric, progress=False, replay=replay)
            assert (result.metric, result.unit, result.dims, result.coords) == (
                alone.metric,
                alone.unit,
                alone.dims,
                alone.coords,
            )
            torch.testing.assert_close(result.values, alone.values, rtol=1e-12, atol=1e-12, equal_nan=True)
            assert result.values.nan_to_num(7).std() > 0 or metric is mk.accuracy
            for run, value in alone.baseline.items():
                torch.testing.assert_close(result.baseline[run], value, rtol=1e-12, atol=1e-12)
            assert {**result.provenance, "created": 0} == {**alone.provenance, "created": 0}
            assert replay is (result.provenance["replay"] == "suffix")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_is_as_if_it_were_alone_in_every_family(family: str, pairs: mk.PromptPairs) -> None:
    model, together = model_of(family), [mk.logit_diff, mk.logit_diff(pairs, position="early"), mk.kl_divergence]
    results = mk.activation_patching(model, pairs, together, site="resid_pre", over="layer pos", progress=False)
    for metric, result in zip(together, results, strict=True):
        alone = mk.activation_patching(model, pairs, metric, site="resid_pre", over="layer pos", progress=False)
        # Mixtral's experts are in float32, and get other groups of rows where the last position alone is read
        bound = 1e-5 if family == "mixtral" else 1e-10
        size = alone.values.nan_to_num(0).abs().max()
        torch.testing.assert_close(result.values, alone.values, rtol=0, atol=bound * size + 1e-12, equal_nan=True)
        assert result.provenance["replay"] == "suffix"


def test_one_sweep_costs_one_sweep(model: mk.HookedModel, pairs: mk.PromptPairs) -> None:
    """Which is the reason to do it."""
    both = mk.activation_patching(model, pairs, [mk.logit_diff, mk.log_prob])
    assert both[0].cost == mk.activation_patching(model, pairs, mk.logit_diff).cost


def test_sets_lengths_and_budgets(model: mk.HookedModel, pairs: mk.PromptPairs) -> None:
    cells = {"two": [(0, 0), (1, 1)], "one": [(0, 1)]}
    small, large = (
        mk.activation_patching(model, pairs, [mk.logit_diff, mk.loss], cells=cells, budget=budget)
        for budget in (1, None)
    )
    for one, other in zip(small, large, strict=True):
        assert one.dims == ("cell", "prompt")
        torch.testing.assert_close(one.values, other.values, rtol=1e-12, atol=1e-12)


def test_across_prompts_of_other_lengths(model: mk.HookedModel) -> None:
    clean, corrupted = [torch.tensor([3, 4, 5, 6])], [torch.tensor([3, 9, 5, 6, 8])]
    pairs = mk.PromptPairs.from_tokens(clean, corrupted, [(1, 2)], positions={"it": [1]}, align={"it": [2]})
    together = mk.activation_patching(model, pairs, [mk.logit_diff, mk.log_prob], "resid_pre", "layer position")
    for metric, result in zip((mk.logit_diff, mk.log_prob), together, strict=True):
        alone = mk.activation_patching(model, pairs, metric, "resid_pre", "layer position")
        torch.testing.assert_close(result.values, alone.values, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.baseline["clean"], alone.baseline["clean"], rtol=1e-12, atol=1e-12)


def test_what_cannot_be_read_together_is_refused(model: mk.HookedModel, pairs: mk.PromptPairs) -> None:
    some = pairs[[0, 1]]
    for wrong, message in (
        ([mk.logit_diff, lambda logits: logits[:, -1, 0]], r"metric\[1\]: expected one of mechkit's metrics"),
        ([], "metric: expected at least one, got none"),
        ([mk.kl_divergence, partial(mk.kl_divergence, reference="corrupted")], "compare with the same run"),
        ([mk.logit_diff, 3], r"metric\[1\]"),
        ([mk.logit_diff(pairs[[1, 0]])], "another order"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            mk.activation_patching(model, some, wrong)
    with pytest.raises((ValueError, TypeError), match="metric"):
        mk.attribution_patching(model, some, [mk.logit_diff, mk.log_prob])  # its gradient is of one metric
