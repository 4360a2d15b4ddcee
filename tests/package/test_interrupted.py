"""Ctrl-C in the middle of any long call leaves the model as it was: no hook, the same logits, and the call can be made again."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import pytest
import torch

from helpers.valid_calls import Material, valid_calls
from mechkit._progress import Progress


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("calls"))


@pytest.mark.filterwarnings("ignore")
def test_every_call_with_progress_can_be_interrupted(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = material.model, torch.tensor([[4, 9, 11, 7]])
    calls = {
        name: (fn, good)
        for name, (fn, good) in valid_calls(material).items()
        if "progress" in inspect.signature(fn).parameters and name != "study"
    }
    assert len(calls) > 15
    before, hooks = model(tokens), model._attached()
    interrupted = set()

    def stop(self: Progress, *_: Any, **__: Any) -> None:
        interrupted.add(name)
        raise KeyboardInterrupt

    for name, (fn, good) in calls.items():
        with monkeypatch.context() as patch:
            for method in ("update", "reach"):
                patch.setattr(Progress, method, stop)
            with contextlib.suppress(KeyboardInterrupt):
                fn(**good)
        assert model._attached() == hooks, name
        assert torch.equal(model(tokens), before), name
        assert not any(p.requires_grad is False for p in model.bridge.parameters()), name
    assert set(calls) - interrupted == set()
    for fn, good in calls.values():
        fn(**good)
