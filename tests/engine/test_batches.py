"""The same rows in batches of other sizes: the same answers, to a bound that the dtype states; and none is lost or changed when
the device runs out of memory in between."""

from __future__ import annotations

import pytest
import torch

import mechkit as mk
from helpers.families import build_hf
from helpers.tiny import LENGTH, SHAPES, make_model, make_pairs, whole_vocabulary
from mechkit._precision import tolerance
from mechkit.engine import _answers, _memory, _sweep
from mechkit.engine._memory import Budget

# Largest difference between two sweeps, as a share of the spread of the values (of 1 logit in float64)
BOUNDS = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    **{d: tolerance("replay", d) for d in (torch.bfloat16, torch.float16)},
}


def swept(model: mk.HookedModel, pairs: mk.PromptPairs, **arguments) -> mk.Result:
    arguments = {"metric": whole_vocabulary(pairs), "site": "z", "over": "layer pos head", **arguments}
    return mk.activation_patching(model, pairs, progress=False, **arguments)


TWO_OF_THREE = (("gpt2", "llama"), ("llama", "gemma2"), ("gemma2", "gpt2"))


@pytest.fixture
def batches(monkeypatch) -> list[int]:
    """The sizes of the batches that were run so far."""
    sizes: list[int] = []

    def count(name):
        answer = getattr(_answers, name)

        def counted(chunk_or_state, replayer, rows):
            sizes.append(len(rows))
            return answer(chunk_or_state, replayer, rows)

        monkeypatch.setattr(_answers, name, counted)

    count("_answer_batch")
    count("_answer_packed_batch")
    return sizes


def far_apart(one: torch.Tensor, other: torch.Tensor) -> float:
    assert torch.equal(one.isnan(), other.isnan())
    return float((one - other).nan_to_num().abs().max())


@pytest.mark.parametrize(
    ("family", "dtype"), [(family, dtype) for i, dtype in enumerate(BOUNDS) for family in TWO_OF_THREE[i % 3]]
)
def test_every_budget_gives_the_same_answers(family, dtype, batches):
    model, pairs = mk.HookedModel.from_hf(build_hf(family, dtype)), make_pairs((*SHAPES, (LENGTH, 3), (LENGTH, 2)))
    results, sizes, some = [], [], [0, 3]  # heads that go one by one: all of them would take as long as all else here
    for budget, heads in ((10**9, None), (10**6, None), (10**5, None), (1, some)):
        first = len(batches)
        found = swept(model, pairs, budget=budget, heads=heads).values
        results.append(found if heads is None else results[0].index_copy(2, torch.tensor(heads), found))
        sizes.append(len(batches) - first)
    assert sizes[0] < sizes[-1] / 5  # the control: they ran in batches of other sizes
    assert max(batches[-sizes[-1] :]) == 1
    largest = results[0].nan_to_num().abs().max()
    spread = 1.0 if dtype == torch.float64 else float(largest)
    for other in results[1:]:
        assert far_apart(results[0], other) <= BOUNDS[dtype] * spread
    effect = results[0] - results[0].nan_to_num().mean()
    assert float(effect.nan_to_num().abs().max()) > BOUNDS[dtype] * spread


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("replay", [True, False])
def test_half_precision_is_read_and_kept_in_float32(dtype, replay):
    """A metric gets float32 logits, and what it makes of them is not rounded to half precision anywhere."""
    model, pairs, seen = mk.HookedModel.from_hf(build_hf("llama", dtype)), make_pairs(), set()
    plain = whole_vocabulary(pairs)

    def read(logits, prompt, reference):
        seen.add((logits.dtype, None if reference is None else reference.dtype))
        return plain.read(logits, prompt, reference) * 0 + 1.0001

    for reference in (None, "clean"):
        metric = mk.Metric("m", "", len(pairs), plain.positions, None, read, reference)
        found = swept(model, pairs, metric=metric, replay=replay)
        assert found.values.dtype == torch.float32
        assert set(found.values[~found.values.isnan()].tolist()) == {float(torch.tensor(1.0001))}
        assert {value.dtype for value in found.baseline.values()} == {torch.float32}
    assert seen == {(torch.float32, None), (torch.float32, torch.float32)}
    assert float(torch.tensor(1.0001).to(dtype)) != float(torch.tensor(1.0001))  # the control: half precision rounds it
    same = mk.PromptPairs(pairs.clean[[0]], pairs.corrupted[[0]], pairs.right[:1], pairs.wrong[:1])
    called = swept(model, same, metric=lambda logits: seen.add(logits.dtype) or logits[:, -1, 5], replay=replay)
    assert torch.float32 in seen
    assert dtype not in seen
    assert called.values.dtype == torch.float32


@pytest.mark.parametrize("failing", [1, 2, 5])
@pytest.mark.parametrize("where", ["replay", "read"])
@pytest.mark.parametrize("kind", ["metric", "callable"])
def test_a_batch_that_runs_out_of_memory_changes_no_value(failing, where, kind, batches, monkeypatch):
    """The k-th batch fails, at once or when its metric is read: it is run again in halves, and the others stand."""
    shapes = ((LENGTH, 2), (LENGTH, 4))
    model, pairs = make_model("llama"), make_pairs(shapes if kind == "callable" else SHAPES)
    metric = whole_vocabulary(pairs) if kind == "metric" else lambda logits: logits[:, -1, 5] - logits[:, 0, 3]
    expected = swept(model, pairs, metric=metric)
    monkeypatch.setattr(_memory, "CPU_TOKENS", 40)  # packed rows would all fit into one batch
    before = len(batches)
    replayer = _answers.PackedReplayer if kind == "metric" else _answers.Replayer
    target, name = (replayer, "replay") if where == "replay" else (_answers, "read_logits")
    original, calls, halved = getattr(target, name), [], []
    halve = Budget.halve
    monkeypatch.setattr(Budget, "halve", lambda self: halved.append(1) or halve(self))

    def fails_once(*args, **kwargs):
        calls.append(len(batches) - before)
        if calls[-1] == failing and calls.count(failing) == 1 and not halved:
            raise torch.OutOfMemoryError("on purpose")
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, fails_once)
    found = swept(model, pairs, metric=metric)
    assert halved == [1]  # the control: it did fail
    assert far_apart(found.values, expected.values) <= 1e-11
    assert not model.has_hooks


def test_a_failed_batch_keeps_nothing_alive(monkeypatch):
    """When the budget is halved, what the failed batch and the failed recording had made is gone already."""
    import gc
    import weakref

    model, pairs = make_model("llama"), make_pairs(((LENGTH, 2), (LENGTH, 4), (LENGTH, 3), (LENGTH, 1)))
    made: list[weakref.ref] = []
    alive: list[int] = []
    halve = Budget.halve

    def halving(self):
        alive.append(sum(one() is not None for one in made))
        halve(self)

    def failing(target, name):
        original, calls = getattr(target, name), []

        def fail_once(*args, **kwargs):
            result = original(*args, **kwargs)
            calls.append(1)
            if len(calls) == 1:
                tensor = torch.zeros(1000)
                made.append(weakref.ref(tensor))
                raise torch.OutOfMemoryError("on purpose")
            return result

        return fail_once

    monkeypatch.setattr(Budget, "halve", halving)
    monkeypatch.setattr(_answers, "_answer_packed_batch", failing(_answers, "_answer_packed_batch"))
    monkeypatch.setattr(_sweep, "record", failing(_sweep, "record"))
    gc.disable()
    try:
        swept(model, pairs)
    finally:
        gc.enable()
    assert len(made) == 2
    assert alive == [0, 0]
