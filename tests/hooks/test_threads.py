"""A model runs one call at a time, whichever threads call it."""

from __future__ import annotations

import copy
import inspect
import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import mechkit as mk
from helpers.families import FAMILIES

PAIRS = mk.PromptPairs.from_tokens(
    [[3, 5, 7, 11, 13, 17], [4, 6, 8, 10, 12, 14]], [[3, 5, 9, 11, 13, 17], [4, 6, 20, 10, 12, 14]], [(5, 9), (5, 9)]
)
CLEAN = torch.stack(list(PAIRS.clean.tokens))
METRIC = mk.logit_diff(PAIRS)


def tiny() -> mk.HookedModel:
    kind, arguments = FAMILIES["llama"]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(arguments | {"num_hidden_layers": 2}))
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.35) if p.ndim > 1 else None
    return mk.HookedModel.from_hf(hf.double().eval())


@pytest.fixture(scope="module")
def model() -> mk.HookedModel:
    return tiny()


def zeroed(model: mk.HookedModel) -> Tensor:
    with model.hooks([(("z", 0), lambda z, hook: torch.zeros_like(z))]):
        time.sleep(0.001)  # lets the others try
        return model(CLEAN).detach()


def gradient(model: mk.HookedModel) -> Tensor:
    seen: list[Tensor] = []
    with model.hooks((), [(("resid_pre", 1), lambda grad, hook: seen.append(grad.clone()))]):
        model(CLEAN)[:, -1, 5].sum().backward()
    return seen[0]


Call = Callable[[mk.HookedModel], Any]
CALLS: dict[str, Call] = {
    "forward": lambda m: m(CLEAN).detach(),
    "cache": lambda m: m.run_with_cache(CLEAN, "z")[1]["z"].detach(),
    "hooks": zeroed,
    "backward": gradient,
    "generate": lambda m: m.generate(CLEAN, max_new_tokens=3).double(),
    "patching": lambda m: mk.activation_patching(m, PAIRS, METRIC, site="z", over="layer head", progress=False).values,
    "ablation": lambda m: mk.ablation(m, PAIRS, METRIC, site="mlp_out", over="layer", progress=False).values,
    "attribution": lambda m: mk.attribution_patching(m, PAIRS, METRIC, site="resid_pre", over="layer pos").values,
    "edges": lambda m: mk.edge_attribution(m, PAIRS, METRIC, steps=1).values,
    "lens": lambda m: mk.logit_lens(m, PAIRS.clean, tokens=[5]).values,
    "dla": lambda m: mk.direct_logit_attribution(m, PAIRS, METRIC).values,
    "patterns": lambda m: mk.attention_patterns(m, PAIRS.clean).values,
}
CHEAP = ("forward", "cache", "hooks", "backward")


def in_threads(works: list[Callable[[], Any]]) -> list[BaseException]:
    errors: list[BaseException] = []

    def guarded(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return errors


def test_four_threads_get_what_one_gets(model):
    alone = {name: torch.as_tensor(call(model)) for name, call in CALLS.items()}
    wrong: list[str] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        names = [*CALLS, *(draw.choice(CHEAP) for _ in range(50 - len(CALLS)))]
        draw.shuffle(names)
        for name in names:
            found = torch.as_tensor(CALLS[name](model))
            if float((found - alone[name]).nan_to_num().abs().max()) > 1e-12:
                wrong.append(name)

    assert in_threads([lambda seed=seed: work(seed) for seed in range(4)]) == []
    assert wrong == []
    assert not model.has_hooks
    assert all(p.requires_grad for p in model.bridge.original_model.parameters())


def test_hooks_would_fire_in_another_threads_run(model):
    """The control: the same edit, seen by a run of the model underneath, which takes no lock."""
    seen: list[Tensor] = []
    plain = model(CLEAN).detach()
    with model.hooks([(("z", 0), lambda z, hook: torch.zeros_like(z))]):
        assert in_threads([lambda: seen.append(model.bridge(CLEAN).detach())]) == []
    assert float((seen[0] - plain).abs().max()) > 0.1


def test_one_that_waits_for_open_hooks_says_so_and_may_come_back(model):
    model.lock.timeout = 0.2
    began = time.monotonic()
    try:
        with model.hooks([("z", lambda z, hook: None)]):
            errors = in_threads([lambda: model(CLEAN), lambda: mk.logit_lens(model, PAIRS.clean, tokens=[5])])
    finally:
        model.lock.timeout = 30.0
    assert time.monotonic() - began < 5
    assert len(errors) == 2
    for error in errors:
        assert isinstance(error, TimeoutError)
        assert all(words in str(error) for words in ("MainThread", "model.hooks", "0.2 s", "copy.deepcopy"))
    assert in_threads([lambda: model(CLEAN)]) == []


def test_one_that_waits_is_patient_with_a_holder_that_gets_on(model):
    model.lock.timeout = 0.2
    opened = threading.Event()

    def holder() -> None:
        with model.hooks([("z", lambda z, hook: None)]):
            opened.set()
            for _ in range(12):
                time.sleep(0.05)
                model(CLEAN)

    def waiter() -> None:
        opened.wait()
        model(CLEAN)

    try:
        assert in_threads([holder, waiter]) == []
    finally:
        model.lock.timeout = 30.0


def test_threads_take_turns(model):
    """First come, first served: a thread that calls without a pause does not keep others out."""
    order: list[str] = []
    start = threading.Barrier(2)

    def work(name: str) -> None:
        start.wait()
        for _ in range(20):
            with model.lock:  # so that the order is that of the turns, however late a thread goes on
                order.append(name)
                model(CLEAN)

    assert in_threads([lambda: work("a"), lambda: work("b")]) == []
    changes = sum(one != two for one, two in itertools.pairwise(order))
    assert changes >= 20


def test_a_technique_runs_inside_ones_own_hooks(model):
    plain = mk.activation_patching(model, PAIRS, METRIC, site="z", over="layer head", progress=False)
    with model.hooks([(("mlp_out", 0), lambda x, hook: torch.zeros_like(x))]):
        edited = mk.activation_patching(model, PAIRS, METRIC, site="z", over="layer head", progress=False)
        with model.hooks([("z", lambda z, hook: None)]), model.lock:
            again = mk.activation_patching(model, PAIRS, METRIC, site="z", over="layer head", progress=False)
    assert float((edited.values - plain.values).abs().max()) > 0.01
    assert torch.equal(edited.values, again.values)


def test_an_error_gives_the_lock_up(model):
    with pytest.raises(ValueError, match="no hook"), model.hooks([("nonsense", lambda x, hook: None)]):
        pass
    with pytest.raises(ZeroDivisionError), model.hooks([("z", lambda z, hook: None)]):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="site"):
        mk.activation_patching(model, PAIRS, METRIC, site="nonsense", progress=False)
    assert in_threads([lambda: model(CLEAN)]) == []


def test_hooks_may_be_left_in_another_thread(model):
    opened = model.hooks([("z", lambda z, hook: None)])
    opened.__enter__()
    assert in_threads([lambda: opened.__exit__(None, None, None)]) == []
    assert in_threads([lambda: model(CLEAN)]) == []
    assert not model.has_hooks


def test_a_thread_that_ended_with_its_hooks_open_is_named(model):
    left: list[Any] = []

    def forgets() -> None:
        left.append(model.hooks([("z", lambda z, hook: None)]))
        left[0].__enter__()

    assert in_threads([forgets]) == []
    model.lock.timeout = 0.1
    try:
        with pytest.raises(TimeoutError, match="has ended"):
            model(CLEAN)
    finally:
        model.lock.timeout = 30.0
        left[0].__exit__(None, None, None)
    model(CLEAN)


def test_wrappers_of_the_same_modules_share_a_lock_and_copies_have_their_own(model):
    assert mk.HookedModel.from_bridge(model.bridge).lock is model.lock
    other = copy.deepcopy(model)
    assert other.lock is not model.lock
    assert not other.has_hooks
    with model.hooks([(("z", 0), lambda z, hook: torch.zeros_like(z))]):
        found: list[Tensor] = []
        assert in_threads([lambda: found.append(other(CLEAN).detach())]) == []
    assert torch.equal(found[0], model(CLEAN).detach())
    patched = mk.activation_patching(other, PAIRS, METRIC, site="z", over="layer head", progress=False)
    assert patched.provenance["replay"] == "suffix"


def test_hooks_of_a_with_stay_on_no_copy(model):
    refused = pytest.raises(ValueError, match="model: it has hooks on it, which nobody would take off its copy")
    with model.hooks([(("z", 0), lambda z, hook: torch.zeros_like(z))]), refused:
        copy.deepcopy(model)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(CLEAN), model(CLEAN))
    assert not copied.has_hooks


def test_a_copy_waits_as_long(model):
    before = model.lock.timeout
    model.lock.timeout = 7.5
    try:
        assert copy.deepcopy(model).lock.timeout == 7.5
    finally:
        model.lock.timeout = before


def test_no_public_function_runs_a_model_without_its_lock():
    """Every public function whose signature has a `model`, and every classmethod that fits something."""
    functions = [mk.TunedLens.fit, *(thing for name in mk.__all__ if inspect.isfunction(thing := getattr(mk, name)))]
    with_model = [fn for fn in functions if "model" in inspect.signature(fn).parameters]
    assert len(with_model) > 30
    assert [fn.__qualname__ for fn in with_model if not hasattr(fn, "_one_at_a_time")] == []
