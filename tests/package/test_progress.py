"""How far a long call is: what is shown where, and which public functions can be asked to show it."""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mechkit as mk
from helpers.families import build_hf
from mechkit import _progress
from mechkit._progress import Progress
from mechkit.engine import _memory

# --- the signatures

LONG = {"progress", "budget"}
DRAWN = {"progress", "budget", "seed"}
# Every public function, and what it takes of `progress` (it can take long), `budget` (its memory grows with the question) and
# `seed` (chance enters).
TAKES: dict[str, set[str]] = {
    "ablation": DRAWN,
    "accuracy": set(),
    "acdc": LONG,
    "activation_patching": LONG,
    "atp_star": LONG,
    "attention_flow": LONG,
    "attention_knockout": LONG,
    "attention_patterns": LONG,
    "attention_relevance": LONG,
    "attention_rollout": LONG,
    "attribution_patching": LONG,
    "compare": set(),
    "composition_scores": {"progress"},
    "direct_logit_attribution": LONG,
    "dla_erasure_check": LONG,
    "edge_attribution": LONG,
    "edge_patching": LONG,
    "evaluate_circuit": DRAWN,
    "faithfulness_curve": DRAWN,
    "find_circuit": DRAWN,
    "gradient_x_input": LONG,
    "head_scores": DRAWN,
    "hidden_states": LONG,
    "image_patching": LONG,
    "integrated_gradients": LONG,
    "answer_log_prob": set(),
    "in_context_score": set(),
    "kl_divergence": set(),
    "loss": set(),
    "learn_mask": DRAWN,
    "log_prob": set(),
    "logit_diff": set(),
    "logit_lens": LONG,
    "metric_factory": set(),
    "neuron_attribution": LONG,
    "optimal_ablation": DRAWN,
    "ov_circuit": set(),  # one head
    "pixel_attribution": LONG,
    "ov_svd": set(),
    "patchscope": LONG,
    "path_patching": LONG,
    "prob_diff": set(),
    "qk_circuit": set(),
    "relp": LONG,
    "report": set(),
    "sweep": LONG,
    "token_integrated_gradients": LONG,
    "top_tokens": LONG,
    "verify": LONG,
    "circuits.cmd": set(),
    "circuits.cpr": set(),
    "circuits.roc": set(),
    "tasks.docstring": {"seed"},
    "tasks.greater_than": {"seed"},
    "tasks.induction": {"seed"},
    "tasks.ioi": {"seed"},
    "tasks.repeated_tokens": {"seed"},
    "TunedLens.fit": DRAWN,
    "Circuit.random": {"seed"},
    "Result.ci": {"seed"},
    "Result.p_values": {"seed"},
    "EdgeScores.ci": {"seed"},
    "HookedModel.generate": {"seed"},  # `verbose` is TransformerLens's word for its progress
}


def public_functions() -> dict[str, Callable[..., Any]]:
    found = {name: getattr(mk, name) for name in mk.__all__}
    for package in ("circuits", "tasks"):
        module = getattr(mk, package)
        for name in vars(module):
            if not name.startswith("_") and not hasattr(mk, name):
                found[f"{package}.{name}"] = getattr(module, name)
    return {name: value for name, value in found.items() if inspect.isfunction(value)}


def test_the_table_has_every_public_function() -> None:
    assert set(public_functions()) == {name for name in TAKES if not name[0].isupper()}


@pytest.mark.parametrize("name", TAKES)
def test_a_function_takes_what_the_table_says(name: str) -> None:
    function: Any = mk
    for part in name.split("."):
        function = getattr(function, part)
    parameters = inspect.signature(function).parameters
    assert set(parameters) & DRAWN == TAKES[name]
    default = {"progress": True, "budget": None}
    for word in set(parameters) & set(default):
        assert parameters[word].default is default[word]
        assert parameters[word].kind is inspect.Parameter.KEYWORD_ONLY
        assert word in (function.__doc__ or "")


# --- what is shown


class Clock:
    """A clock that advances only when the test sets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(_progress.time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(monkeypatch: pytest.MonkeyPatch, seconds: float, n: int, **options: Any) -> list[str]:
    """What a log shows of `n` steps of so many seconds each."""
    clock, log = Clock(monkeypatch), io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress(n, "prompt", **options) as bar:
        for _ in range(n):
            clock.now += seconds
            bar.update()
    return log.getvalue().splitlines()


def test_a_log_gets_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of(monkeypatch, 0.0078125, 7680)  # a minute
    assert len(lines) in (12, 13)
    assert lines[0].startswith("mechkit: 640 of 7,680 prompts (8%), 5 s, about 55 s left")
    assert lines[-1].startswith("mechkit: 7,680 of 7,680 prompts (100%), 1 min 00 s")


def test_slow_steps_get_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of(monkeypatch, 4000.0, 3)
    assert lines[0] == "mechkit: 1 of 3 prompts (33%), 1 h 06 min, about 2 h 13 min left"
    assert len(lines) == 4  # and one at the end


def test_short_calls_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(monkeypatch, 0.49, 10) == []
    assert lines_of(monkeypatch, 0.51, 10) != []


def test_nothing_is_shown_if_it_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(monkeypatch, 60.0, 10, show=False) == []
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert lines_of(monkeypatch, 60.0, 10) == []
    monkeypatch.setenv("TQDM_DISABLE", "0")
    assert lines_of(monkeypatch, 60.0, 10) != []


def test_what_was_done_before_took_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(monkeypatch), io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress(100, "edge", done=90) as bar:
        clock.now += 10
        bar.update(5, note="loss 0.5")
    assert log.getvalue().splitlines()[0] == "mechkit: 95 of 100 edges (95%), 10 s, about 10 s left, loss 0.5"


def test_counts_stay_within_the_total() -> None:
    bar = Progress(10, "row", show=False)
    bar.update(7)
    bar.update(7)
    assert bar.done == 10
    bar.reach(3)
    assert bar.done == 10
    bar.reset()
    assert bar.done == 0


def test_a_terminal_gets_a_bar_that_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "DELAY", 0.0)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress(4, "row") as bar:
        for _ in range(4):
            bar.update(note="loss 1")
        bar._bar.refresh()
    assert "4/4" in screen.getvalue()
    assert "mechkit:" not in screen.getvalue()
    assert screen.getvalue().rsplit("\r", 1)[-1] == ""


def test_a_cell_of_a_notebook_is_watched() -> None:
    out_stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    assert _progress.is_watched(out_stream())
    assert _progress.is_watched(Terminal())
    assert not _progress.is_watched(io.StringIO())


def test_a_log_that_cannot_be_written_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(monkeypatch), io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress(3, "row") as bar:
        log.close()
        for _ in range(3):
            clock.now += 60
            bar.update()
    assert bar.done == 3
    monkeypatch.setattr(sys, "stderr", None)  # a program without a console
    with Progress(1, "row") as bar:
        bar.update()


# --- and of real calls


@pytest.fixture(scope="module")
def model() -> mk.HookedModel:
    return mk.HookedModel.from_hf(build_hf("gpt2", torch.float32), name="tiny")


@pytest.fixture(scope="module")
def pairs() -> mk.PromptPairs:
    clean = [[4, 9, 11, 7, 5], [3, 8, 10, 6, 12], [3, 8, 10, 6]]
    corrupted = [[4, 9, 20, 7, 5], [3, 8, 21, 6, 12], [3, 2, 10, 6]]
    return mk.PromptPairs.from_tokens(clean, corrupted, [(5, 9), (14, 15), (1, 2)])


CALLS: dict[str, Callable[..., Any]] = {
    "attribution_patching": mk.attribution_patching,
    "integrated_gradients": mk.integrated_gradients,
    "integrated_gradients of inputs": lambda *of, **how: mk.integrated_gradients(*of, path="input", **how),
    "atp_star": mk.atp_star,
    "relp": mk.relp,
    "gradient_x_input": mk.gradient_x_input,
    "token_integrated_gradients": mk.token_integrated_gradients,
    "neuron_attribution": mk.neuron_attribution,
    "conductance": lambda *of, **how: mk.neuron_attribution(*of, path="input", **how),
    "direct_logit_attribution": mk.direct_logit_attribution,
    "dla_erasure_check": lambda *of, **how: mk.dla_erasure_check(*of, (0, 1), **how),
    "edge_attribution": mk.edge_attribution,
    "edge_attribution of activations": lambda *of, **how: mk.edge_attribution(*of, path="activation", **how),
    "activation_patching": mk.activation_patching,
    "attention_knockout": lambda *of, **how: mk.attention_knockout(*of, from_=[0, 1], **how),
    "evaluate_circuit": lambda model, *of, **how: mk.evaluate_circuit(
        mk.Circuit.random(model, 20, 0), model, *of, random=70, sets=2, **how
    ),
    "composition_scores": lambda model, *of, **how: mk.composition_scores(model, **how),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_counts_to_its_end_and_is_silent_without_progress(
    name: str, model: mk.HookedModel, pairs: mk.PromptPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "EVERY", 0.0)  # a line at every update
    monkeypatch.setattr(_memory, "CPU_TOKENS", 4)  # else all rows of so small a sweep are one batch
    shown = {}
    for progress in (True, False):
        log = io.StringIO()
        monkeypatch.setattr(sys, "stderr", log)
        CALLS[name](model, pairs, mk.logit_diff, progress=progress)
        shown[progress] = log.getvalue().splitlines()
    assert shown[False] == []
    counts = [line.removeprefix("mechkit: ").split(" ")[:3] for line in shown[True]]
    done, totals = [int(count[0]) for count in counts], {count[2] for count in counts}
    assert len(totals) == 1
    assert done == sorted(done)
    assert len(set(done)) > 1  # not at the end alone
    assert str(done[-1]) == totals.pop()
