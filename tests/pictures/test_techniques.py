"""Every technique on prompts with pictures: what it gives is of the picture that it was given, whatever else runs with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

import mechkit as mk
from helpers.techniques import OF_READY_METRICS, WITH_METRIC, WITHOUT_METRIC
from helpers.vlm import FAMILIES, IMAGE, in_double, make_pairs, pair_of_models, picture

ALL = {**WITH_METRIC, **OF_READY_METRICS, **WITHOUT_METRIC}
# Qwen3-VL adds features of the picture between its first blocks, which no edge stands for.
REFUSED = {("qwen3_vl", name) for name in ALL if name.startswith(("edge_attribution", "evaluate_circuit"))}


def pairs_of(family: str, model: mk.HookedModel) -> mk.PromptPairs:
    pairs = make_pairs(family, model, (False, True, False))
    answers = [(5, 7), (6, 8), (9, 11)]
    return mk.PromptPairs.from_tokens(pairs.clean, pairs.corrupted, answers, positions={"at": [5, 6, 4]})


@contextmanager
def no_picture_is_lost(model: mk.HookedModel) -> Iterator[None]:
    """Whenever the model runs on placeholders their pictures come along."""
    bridge = type(model.bridge)
    right = bridge.forward

    def forward(self: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tokens, torch.Tensor) and tokens.shape[-1] > 1 and bool((tokens == IMAGE).any()):
            assert "pixel_values" in kwargs
        return right(self, tokens, *args, **kwargs)

    with patch.object(bridge, "forward", forward):
        yield


def values(found: Any) -> torch.Tensor:
    """`[*dims prompt]`."""
    result = getattr(found, "result", found)
    moved: torch.Tensor = result.values.movedim(result.dims.index("prompt"), -1)
    return moved


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl"])
def test_prompts_by_themselves_and_together(family, name):
    """Chunks, batches and sorting mix up no pictures: each prompt's value is what it is alone."""
    with in_double():
        _, model = pair_of_models(family)
        pairs = pairs_of(family, model)
        if (family, name) in REFUSED:
            with pytest.raises(ValueError, match=r"do not add up|cannot be run"):
                ALL[name](model, pairs, mk.logit_diff(pairs))
            return
        with no_picture_is_lost(model):
            together = values(ALL[name](model, pairs, mk.logit_diff(pairs)))
        for i in range(len(pairs)):
            one = pairs[[i]]
            alone = values(ALL[name](model, one, mk.logit_diff(one)))[..., 0]
            mine = together[..., i]
            mine = mine[tuple(slice(0, n) for n in alone.shape)]
            assert torch.equal(mine.isnan(), alone.isnan())
            assert float((mine - alone).nan_to_num().abs().max()) <= 1e-9


@pytest.mark.parametrize("name", ALL)
def test_the_picture_counts(name):
    """The control: with another picture in both prompts every technique gives other values."""
    with in_double():
        _, model = pair_of_models("llava")
        pairs = pairs_of("llava", model)
        assert pairs.clean.inputs is not None
        assert pairs.corrupted.inputs is not None
        others = [
            mk.Prompts.from_inputs(
                model, prompts.tokens, [{"pixel_values": 1.5 - one["pixel_values"]} for one in prompts.inputs]
            )
            for prompts in (pairs.clean, pairs.corrupted)
        ]
        other = mk.PromptPairs.from_tokens(*others, pairs.answers, positions=dict(pairs.positions))
        here, there = (values(ALL[name](model, each, mk.logit_diff(each))) for each in (pairs, other))
        assert float((here - there).nan_to_num().abs().max()) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_hashes_tell_pictures_apart(family):
    _, model = pair_of_models(family)
    pairs = make_pairs(family, model)
    assert pairs.clean.tokens[0].tolist() == pairs.corrupted.tokens[0].tolist()
    assert pairs.clean.hashes()[0] != pairs.corrupted.hashes()[0]
    assert pairs.clean.hash() != pairs.corrupted.hash()
    assert pairs.clean[[0]].hash() == make_pairs(family, model).clean[[0]].hash()


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl"])
def test_patchscope_reads_the_targets_picture(family):
    """A prompt's own state, put back where it was, is answered as the prompt is; and it goes on as `generate` goes on."""
    with in_double():
        _, model = pair_of_models(family)
        prompts = pairs_of(family, model).clean[[0]]
        given: dict[str, Any] = {"target_position": -1, "layers": [1], "k": 3, "max_new_tokens": 3, "progress": False}
        found = mk.patchscope(model, prompts, prompts, **given)
        with torch.no_grad():
            own = model.run(prompts)[0, -1].topk(3).indices
        assert found.ids.flatten().tolist() == own.tolist()
        other = mk.Prompts.from_inputs(
            model,
            prompts.tokens,
            [
                {k: v * 2 for k, v in picture(family, 5).items() if v.is_floating_point()}
                | {k: v for k, v in picture(family, 5).items() if not v.is_floating_point()}
            ],
        )
        changed = mk.patchscope(model, prompts, other, **given | {"target_position": 0, "max_new_tokens": 0})
        assert changed.ids.flatten().tolist() != own.tolist()
        with pytest.raises(ValueError, match="stand for patches"):
            mk.patchscope(model, prompts, prompts.tokens[0], progress=False)


def test_patches_are_no_repeated_tokens():
    with in_double():
        _, model = pair_of_models("llava")
        prompts = pairs_of("llava", model).clean
        for kind in ("duplicate_token", "induction"):
            found = mk.head_scores(model, kind, prompts=prompts, progress=False)
            assert bool(found.values.isnan().all())  # no word stands twice
        words = mk.Prompts.from_inputs(
            model,
            [torch.cat([row, row[-2:]]) for row in prompts.tokens],
            [{k: v for k, v in one.items() if "token_type" not in k} for one in prompts.inputs or ()],
        )
        found = mk.head_scores(model, "duplicate_token", prompts=words, progress=False)
        assert not bool(found.values.isnan().any())
