"""What the engine assumes of prompts with pictures, each assumption broken on purpose: the proof must find it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

import mechkit as mk
from helpers.planted import unproved
from helpers.vlm import in_double, make_pairs, mixture, pair_of_models
from mechkit.engine import _chunk, _proof, _sweep
from mechkit.engine._causality import reach_of
from mechkit.engine._replay import Replayer

Defect = Callable[[], Any]


@contextmanager
def no_reach() -> Iterator[None]:
    """As if a change reached nothing before it."""
    with patch.object(_chunk, "reach_of", lambda run: np.arange(run.length)):
        yield


@contextmanager
def no_reach_and_no_look() -> Iterator[None]:
    """The same, and nobody compares the masks with where rows start."""
    with no_reach(), patch.object(_proof, "_sees_over", lambda chunk, starts: None):
        yield


@contextmanager
def one_patch_late() -> Iterator[None]:
    """A change reaches all patches of its picture but the first."""

    def late(run: Any) -> np.ndarray:
        reach = reach_of(run)
        return np.where(reach < np.arange(len(reach)), reach + 1, reach)

    with (
        patch.object(_chunk, "reach_of", late),
        patch.object(_proof, "_sees_over", lambda chunk, starts: None),
    ):
        yield


def recorded(change: Callable[[Any], Any]) -> Defect:
    @contextmanager
    def defect() -> Iterator[None]:
        right = _sweep.record

        def wrong(*args: Any, **kwargs: Any) -> Any:
            return change(right(*args, **kwargs))

        with patch.object(_sweep, "record", wrong):
            yield

    return defect


def _shifted(run: Any) -> Any:
    return replace(run, between={layer + 1: added for layer, added in run.between.items()})


def _of_another_prompt(run: Any) -> Any:
    return replace(run, between={layer: added.roll(1, 0) for layer, added in run.between.items()})


@contextmanager
def written_after() -> Iterator[None]:
    """What a block wrote is exchanged together with what is added behind it."""

    def after(self: Replayer, layer: int, group: Any, rows: Any, hidden: Any, prompt: Any, lookup: Any) -> Any:
        from mechkit.engine._edits import write

        write(group, rows, hidden, lookup)
        return hidden

    with patch.object(Replayer, "_write_before", after):
        yield


DEFECTS: dict[str, tuple[str, str, Defect]] = {  # family, site, defect
    "no reach": ("gemma3", "resid_pre", no_reach),
    "no reach, masks not looked at": ("gemma3", "resid_pre", no_reach_and_no_look),
    "no reach in a site of heads": ("gemma3", "v", no_reach_and_no_look),
    "reach begins one patch late": ("gemma3", "resid_pre", one_patch_late),
    "nothing between": ("qwen3_vl", "resid_pre", recorded(lambda run: replace(run, between={}))),
    "nothing between, resid_post": ("qwen3_vl", "resid_post", recorded(lambda run: replace(run, between={}))),
    "between one layer late": ("qwen3_vl", "resid_pre", recorded(_shifted)),
    "between of another prompt": ("qwen3_vl", "resid_pre", recorded(_of_another_prompt)),
    "written behind what is added": ("qwen3_vl", "resid_post", written_after),
}


def swept(model: mk.HookedModel, pairs: mk.PromptPairs, site: str, **more: Any) -> mk.Result:
    over = "layer pos head" if site == "v" else "layer pos"
    return mk.activation_patching(model, pairs, mixture(pairs), site=site, over=over, progress=False, **more)


def off(one: mk.Result, other: mk.Result) -> float:
    return float((one.values - other.values).nan_to_num().abs().max())


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_refused(name):
    family, site, defect = DEFECTS[name]
    with in_double():
        _, model = pair_of_models(family)
        pairs = make_pairs(family, model, (False, False, False))
        right = swept(model, pairs, site)
        assert right.provenance["replay"] == "suffix"
        with defect():
            found = swept(model, pairs, site)
            with unproved():
                moved = off(swept(model, pairs, site), right)
    assert moved > 1e-3  # the control: believed, it gives wrong numbers
    assert off(found, right) <= 1e-9
    assert found.provenance["replay"].startswith("full: ")


def test_an_addition_that_depends_on_the_stream_is_refused():
    """What a model adds between blocks is taken from the unedited run: an edit must not change it."""
    from helpers.vlm import build_hf

    with in_double():
        hf = build_hf("qwen3_vl")
        text = hf.model.language_model
        add = text._deepstack_process

        def gated(hidden: torch.Tensor, where: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
            return add(hidden, where, features * (1 + hidden[where].mean(-1, keepdim=True)))

        text._deepstack_process = gated
        model = mk.HookedModel.from_hf(hf)
        pairs = make_pairs("qwen3_vl", model, (False, False))
        found = swept(model, pairs, "resid_pre")
        assert found.provenance["replay"].startswith("full: ")
        whole = mk.activation_patching(
            model, pairs, mixture(pairs), site="resid_pre", over="layer pos", progress=False, budget=10**6
        )
    assert off(found, whole) <= 1e-9
