"""A sweep does not wait for the device between its batches. Shown without a GPU, by counting the calls that would wait there.

What waits is a value that goes from the device to Python: `.item()`, `bool(tensor)`, `.tolist()`, `.cpu()`, `.numpy()`, and
what needs to know how many entries of a mask are true. The same sweep is run in few batches and in many: it may wait
no more often in many.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mechkit as mk
from helpers.tiny import LENGTH, make_model, make_pairs, model_of, whole_vocabulary
from mechkit.engine import _answers
from mechkit.engine._memory import Budget

aten = torch.ops.aten
WAITING_OPS = {aten._local_scalar_dense, aten.nonzero, aten.item, aten.equal, aten.is_nonzero, aten.masked_select}
WAITING_METHODS = {"cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__"}


class _Ops(TorchDispatchMode):
    def __init__(self, counts: Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in WAITING_OPS:
            self.counts[str(func)] += 1
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            self.counts["index by a mask"] += len(masks)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Calls that a CPU answers without an operation, but for which a GPU would have to finish its work."""

    def __init__(self, counts: Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in WAITING_METHODS:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def waits(run) -> Counter:
    counts: Counter = Counter()
    with _Methods(counts), _Ops(counts):
        run()
    return +counts


def counted(monkeypatch, rows_at_once: int, run) -> tuple[int, Counter]:
    """How many batches a sweep takes, and what it waits for."""
    batches = []

    def count(patch, name):
        answer_batch = getattr(_answers, name)

        def answer(chunk_or_state, replayer, rows):
            batches.append(len(rows))
            return answer_batch(chunk_or_state, replayer, rows)

        patch.setattr(_answers, name, answer)

    with monkeypatch.context() as patch:
        patch.setattr(Budget, "rows_at_once", lambda *_: rows_at_once)
        patch.setattr(Budget, "packed_rows_at_once", lambda *_: rows_at_once)
        count(patch, "_answer_batch")
        count(patch, "_answer_packed_batch")
        found = waits(run)
    return len(batches), found


@pytest.mark.parametrize(
    "plant",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
    ],
)
def test_the_counter_sees(plant):
    assert sum(waits(lambda: plant(torch.randn(3))).values()) > 0
    assert not waits(lambda: torch.randn(3)[torch.tensor([0, 2])] + 1)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
@pytest.mark.parametrize("site", ["z", "resid_pre", "pattern", "result"])
def test_many_batches_wait_no_more_often_than_few(family, site, monkeypatch):
    model, pairs = model_of(family), make_pairs(((LENGTH, 2), (LENGTH, 4)))
    over = "layer pos" if site == "resid_pre" else "layer pos head"

    def run():
        mk.activation_patching(model, pairs, mk.logit_diff(pairs), site=site, over=over, progress=False)

    run()  # what is found out once and kept (the weights' fingerprint) is found out here
    few, waited_in_few = counted(monkeypatch, 10_000, run)
    many, waited_in_many = counted(monkeypatch, 3, run)
    assert many > 2 * few
    assert waited_in_many == waited_in_few


@pytest.mark.parametrize("kind", ["kl_divergence", "log_prob", "accuracy", "prob_diff", "callable", "values"])
def test_metrics_and_given_values(kind, monkeypatch):
    model, pairs = make_model("llama"), make_pairs(((LENGTH, 2), (LENGTH, 4)))
    metric = getattr(mk, kind)(pairs) if hasattr(mk, kind) else mk.logit_diff(pairs)
    if kind == "callable":
        metric = lambda logits: logits[:, -1, 5] - logits[:, 0, 3]  # noqa: E731
    values = {"v": {("z", layer): torch.randn(2, 1, 4, 8, dtype=torch.float64) for layer in range(4)}}
    cells = [
        (mk.Edit("z", layer, "v", head=head, pos=pos),) for layer in range(4) for head in range(4) for pos in (1, 5)
    ]

    def run():
        if kind == "values":
            mk.sweep(model, pairs.clean, cells, metric, values=values, progress=False)
        else:
            mk.activation_patching(model, pairs, metric, over="layer pos head", progress=False)

    run()  # what is found out once and kept (the weights' fingerprint) is found out here
    few, waited_in_few = counted(monkeypatch, 10_000, run)
    many, waited_in_many = counted(monkeypatch, 4, run)
    assert many > 2 * few
    assert waited_in_many == waited_in_few


def test_a_planted_wait_is_seen(monkeypatch):
    """The control: a metric that asks for one value in each batch."""
    model, pairs = make_model("llama"), make_pairs(((LENGTH, 2), (LENGTH, 4)))
    plain = whole_vocabulary(pairs)

    def read(logits, prompt, reference):
        assert logits[0, 0].item() == logits[0, 0].item()
        return plain.read(logits, prompt, reference)

    metric = mk.Metric("m", "", len(pairs), plain.positions, None, read)

    def run():
        mk.activation_patching(model, pairs, metric, over="layer pos head", progress=False)

    run()  # what is found out once and kept (the weights' fingerprint) is found out here
    few, waited_in_few = counted(monkeypatch, 10_000, run)
    many, waited_in_many = counted(monkeypatch, 3, run)
    assert sum(waited_in_many.values()) >= sum(waited_in_few.values()) + 2 * (many - few)
