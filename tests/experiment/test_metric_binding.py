"""A metric belongs to the prompts that it was made of: every technique refuses it with others, or makes one itself.

A function of logits belongs to all prompts in their order, also where a technique runs some of them."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import mechkit as mk
from helpers.techniques import EVEN, OF_READY_METRICS, PERMUTED, QUIET, RAGGED, WITH_METRIC, by_hand, circuit_of, family
from mechkit.metrics import as_metric, metric_for

SAME_LENGTH = EVEN[[0, 1, 2, 3]]  # prompts of one length and answers of their own
SWAPPED = mk.PromptPairs(SAME_LENGTH.corrupted, SAME_LENGTH.clean, SAME_LENGTH.right, SAME_LENGTH.wrong)
OTHER_ANSWERS = replace(SAME_LENGTH, right=SAME_LENGTH.right[::-1])
OTHER_WRONG = replace(SAME_LENGTH, wrong=SAME_LENGTH.wrong[::-1])
OTHER_POSITION = replace(SAME_LENGTH, positions={"at": torch.tensor([1, 1, 1, 1])})
OTHER_CORRUPTED = replace(SAME_LENGTH, corrupted=SAME_LENGTH.clean)
ANSWERS = [mk.logit_diff, mk.accuracy, mk.prob_diff]


def again(pairs: mk.PromptPairs) -> mk.PromptPairs:
    """Equal pairs, made again."""
    rows = [[row.tolist() for row in side.tokens] for side in (pairs.clean, pairs.corrupted)]
    answers = [(list(right)[::-1], list(wrong)) for right, wrong in pairs.answers]
    return mk.PromptPairs.from_tokens(*rows, answers, positions={k: v.tolist() for k, v in pairs.positions.items()})


# -- the metric by itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*ANSWERS, mk.log_prob, mk.kl_divergence])
def test_says_what_differs(make: Callable[..., mk.Metric]) -> None:
    metric = make(SAME_LENGTH)
    for pairs, message in (
        (SAME_LENGTH[[1, 0, 2, 3]], "the same in another order.*pair 0 here was number 1"),
        (EVEN[[0, 1, 2, 4]], "clean prompt 3 has other tokens.*1 of 4"),
        (SWAPPED, "clean and corrupted prompts have changed places"),
        (RAGGED[[0, 1, 2, 3]], "prompts of other lengths"),
        (EVEN, "made for 4 prompts, but there are 5"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.check(pairs)
    for prompts, message in (
        (SAME_LENGTH.clean[[0, 2, 1, 3]], "the same in another order.*prompt 1 here was number 2"),
        (EVEN.clean[[1, 2, 3, 4]], "prompt 0 has other tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.check(prompts)
    for same in (SAME_LENGTH, again(SAME_LENGTH), OTHER_CORRUPTED, SAME_LENGTH.clean, SAME_LENGTH.corrupted):
        metric.check(same)
    unbound = replace(metric, made_of=None)  # as one writes it by hand
    unbound.check(SAME_LENGTH[[1, 0, 2, 3]])


@pytest.mark.parametrize("make", ANSWERS)
@pytest.mark.parametrize(("other", "side"), [(OTHER_ANSWERS, "right"), (OTHER_WRONG, "wrong")])
def test_answers_are_what_it_reads(make: Any, other: mk.PromptPairs, side: str) -> None:
    with pytest.raises(ValueError, match=f"pair 0 has the {side} answers"):
        make(SAME_LENGTH).check(other)


def test_only_what_it_reads_counts() -> None:
    mk.log_prob(SAME_LENGTH).check(OTHER_WRONG)
    with pytest.raises(ValueError, match="right answers"):
        mk.log_prob(SAME_LENGTH).check(OTHER_ANSWERS)
    mk.kl_divergence(SAME_LENGTH).check(OTHER_ANSWERS)
    mk.logit_diff(SAME_LENGTH).check(OTHER_POSITION)  # reads the last position
    at = mk.logit_diff(SAME_LENGTH, position="at")
    at.check(SAME_LENGTH)
    at.check(replace(SAME_LENGTH, positions={}))  # nothing there says otherwise
    with pytest.raises(ValueError, match="position 'at' of pair 0 is 1 here, and 4 in the metric"):
        at.check(OTHER_POSITION)


@pytest.mark.parametrize(
    "index", [[2, 0], [-1, 1], (3,), slice(1, 3), [True, False, True, False], torch.tensor([False, True, True, False])]
)
def test_an_index_means_the_same_for_pairs_prompts_and_metrics(index: Any) -> None:
    metric, pairs = mk.logit_diff(SAME_LENGTH)[index], SAME_LENGTH[index]
    metric.check(pairs)
    assert metric.n_prompts == len(pairs) == len(SAME_LENGTH.clean[index])
    assert metric.made_of == mk.logit_diff(pairs).made_of
    rest = [i for i in range(4) if SAME_LENGTH.clean.tokens[i] is not pairs.clean.tokens[0]][: len(pairs)]
    with pytest.raises(ValueError, match="metric"):
        metric.check(SAME_LENGTH[rest])


@pytest.mark.parametrize(
    ("index", "kind", "message"),
    [
        ([4], ValueError, r"expected prompts in 0\.\.3"),
        ([-5], ValueError, r"expected prompts in 0\.\.3"),
        ([True, False], ValueError, "a mask of 4 booleans"),
        (2, TypeError, r"several prompts, such as \[2\]"),
        ("ab", TypeError, "several prompts"),
        ([0.5], TypeError, "whole numbers"),
        ([0, True], TypeError, "whole numbers"),
    ],
)
def test_a_bad_index(index: Any, kind: type[Exception], message: str) -> None:
    for indexed in (SAME_LENGTH, SAME_LENGTH.clean, mk.logit_diff(SAME_LENGTH)):
        with pytest.raises(kind, match=message):
            indexed[index]


# -- factories ---------------------------------------------------------------------------------------------------------


class AtTheName:
    @mk.metric_factory
    def __call__(self, pairs: mk.PromptPairs) -> mk.Metric:
        return mk.logit_diff(pairs, position="at")


@mk.metric_factory
def at_the_name(pairs: mk.PromptPairs) -> mk.Metric:
    return mk.logit_diff(pairs, position="at")


def test_factories_are_known_by_their_mark() -> None:
    kl = functools.partial(mk.kl_divergence, reference="corrupted")
    assert metric_for(kl, SAME_LENGTH).reference == "corrupted"  # type: ignore[union-attr]
    for make in (
        at_the_name,
        functools.partial(mk.logit_diff, position="at"),
        AtTheName(),
        functools.partial(AtTheName()),
    ):
        assert torch.equal(metric_for(make, SAME_LENGTH).positions, SAME_LENGTH.positions["at"])  # type: ignore[union-attr, arg-type]
    plain = by_hand(SAME_LENGTH)
    assert metric_for(plain, SAME_LENGTH).fn is plain  # type: ignore[union-attr]
    made = metric_for(mk.metric_factory(lambda pairs: by_hand(pairs)), SAME_LENGTH)  # a factory of functions of logits
    assert made.fn(torch.zeros(4, 7, 61)).shape == (4,)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("metric", "kind", "message"),
    [
        (functools.partial(mk.logit_diff, EVEN), TypeError, "called with the pairs alone"),
        (functools.partial(mk.logit_diff, pairs=EVEN), TypeError, "called with the pairs alone"),
        (mk.metric_factory(lambda pairs: 3), TypeError, "to make a Metric of pairs, got int"),
        (mk.metric_factory(lambda pairs: mk.logit_diff), TypeError, "to make a Metric"),
        (mk.metric_factory(lambda pairs: mk.logit_diff(pairs[PERMUTED])), ValueError, "in another order"),
        ("logit_diff", TypeError, "expected a CallableMetric or a Metric"),
        (None, TypeError, "expected a CallableMetric or a Metric"),
    ],
)
def test_what_makes_no_metric_of_these_pairs(metric: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        mk.activation_patching(family("gpt2"), EVEN, metric, **QUIET)


def test_factories_need_pairs_and_a_mark() -> None:
    model = family("gpt2")
    with pytest.raises(ValueError, match="makes a metric of PromptPairs, got Prompts"):
        mk.ablation(model, EVEN.clean, mk.logit_diff, mode="zero", **QUIET)
    with pytest.raises(TypeError, match="makes a metric of pairs; call it with pairs"):
        mk.sweep(model, EVEN.clean, [(mk.Edit("z", 0),)], mk.logit_diff)
    with pytest.raises(TypeError, match=r"unless it is marked with mk\.metric_factory"):
        mk.activation_patching(model, EVEN, lambda pairs: mk.logit_diff(pairs), **QUIET)
    with pytest.raises(TypeError, match="makes a metric of pairs"):
        as_metric(mk.logit_diff)
    with pytest.raises(TypeError, match="make: expected a function"):
        mk.metric_factory(3)  # type: ignore[type-var]


# -- techniques --------------------------------------------------------------------------------------------------------

MORE: dict[str, Callable[..., Any]] = {
    "acdc": lambda *a: mk.acdc(*a, threshold=1e9, **QUIET),
    "learn_mask": lambda *a: mk.learn_mask(*a, steps=1, **QUIET),
    "optimal_ablation": lambda *a: mk.optimal_ablation(*a, steps=1, writers=["m0"], **QUIET),
    "find_circuit": lambda *a: mk.find_circuit(*a, n_edges=3, steps=1, random=0, **QUIET),
    "faithfulness_curve": lambda *a: mk.faithfulness_curve(mk.edge_attribution, *a, fractions=(0.5,), **QUIET),
    "verify": lambda *a: mk.verify(mk.attribution_patching(a[0], a[1], mk.logit_diff), *a, **QUIET),
    "sweep": lambda model, pairs, metric: mk.sweep(
        model, pairs.clean, [(mk.Edit("z", 0),)], metric, source=pairs.corrupted
    ),
}


def values_of(found: Any) -> torch.Tensor:
    """The numbers of whatever a technique returns."""
    for held in ("values", "members", "gates", "probs"):
        if hasattr(found, held):
            found = getattr(found, held)
            return found if isinstance(found, torch.Tensor) else values_of(found)
    return values_of(next(getattr(found, held) for held in ("circuit", "runs", "base") if hasattr(found, held)))


@pytest.mark.parametrize("technique", sorted({*WITH_METRIC, *MORE} - {"sweep"}))
def test_every_technique_takes_a_metric_or_what_makes_it(technique: str) -> None:
    run = (WITH_METRIC | MORE)[technique]
    ready, made = (run(family("gpt2"), SAME_LENGTH, metric) for metric in (mk.logit_diff(SAME_LENGTH), mk.logit_diff))
    torch.testing.assert_close(values_of(ready), values_of(made), rtol=0, atol=0, equal_nan=True)


def test_metric_is_the_same_argument_everywhere() -> None:
    """A metric, a factory or a function of logits; `None` where a divergence stands in; where it must be linear, a direction."""
    kinds = {"AnyMetric", "AnyMetric | Sequence[AnyMetric]", "AnyMetric | None", "Direction"}
    found = {}
    for name in mk.__all__:
        if inspect.isfunction(function := getattr(mk, name)):
            metric = inspect.signature(function).parameters.get("metric")
            found[name] = metric and metric.annotation
    assert {name for name, kind in found.items() if kind == "AnyMetric | None"} == {
        "acdc",
        "learn_mask",
        "optimal_ablation",
    }
    assert {name for name, kind in found.items() if kind == "Direction"} == {
        "direct_logit_attribution",
        "dla_erasure_check",
    }
    assert {kind for kind in found.values() if kind} == kinds
    assert len([kind for kind in found.values() if kind]) > 20


@pytest.mark.parametrize("technique", [*WITH_METRIC, *OF_READY_METRICS, *MORE])
def test_every_technique_refuses_a_metric_of_other_pairs(technique: str) -> None:
    run = (WITH_METRIC | OF_READY_METRICS | MORE)[technique]
    others = [SAME_LENGTH[[2, 0, 3, 1]], EVEN[[1, 2, 3, 4]], *([OTHER_ANSWERS] if technique != "sweep" else [])]
    for other in others:
        with pytest.raises(ValueError, match="metric: 'logit_diff' was made for other prompts"):
            run(family("gpt2"), SAME_LENGTH, mk.logit_diff(other))


def test_plain_prompts_are_checked_too() -> None:
    model, metric = family("gpt2"), mk.logit_diff(SAME_LENGTH)
    shuffled = SAME_LENGTH.clean[[2, 0, 3, 1]]
    for run in (
        lambda: mk.ablation(model, shuffled, metric, mode="zero", **QUIET),
        lambda: mk.gradient_x_input(model, shuffled, metric),
        lambda: mk.attention_relevance(model, shuffled, metric, **QUIET),
        lambda: mk.direct_logit_attribution(model, shuffled, metric),
        lambda: mk.sweep(model, shuffled, [(mk.Edit("z", 0),)], metric, source=shuffled),
    ):
        with pytest.raises(ValueError, match="in another order"):
            run()
    mk.direct_logit_attribution(model, SAME_LENGTH.corrupted, metric)  # its own corrupted prompts are its own


# -- functions of logits where parts are run ---------------------------------------------------------------------------


def mixes(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 5] - logits[:, -1, 5].mean()


def members(circuit: mk.Circuit) -> set[str]:
    return {edge.name for edge in circuit}


def test_acdc_finds_the_same_circuit_with_a_plain_function() -> None:
    model, start = family("gpt2"), circuit_of(family("gpt2"))
    ready, called = (
        mk.acdc(model, SAME_LENGTH, metric, threshold=0.02, start=start, prune=False, **QUIET)
        for metric in (mk.logit_diff(SAME_LENGTH), by_hand(SAME_LENGTH))
    )
    assert members(ready) == members(called)
    assert 0 < len(ready) < len(start)


@pytest.mark.parametrize("objective", ["kl", "metric"])
def test_learned_masks_train_and_report_by_a_plain_function(objective: Any) -> None:
    model = family("llama")
    ready, called = (
        mk.learn_mask(model, EVEN, metric, objective=objective, steps=3, batch=8, **QUIET)
        for metric in (mk.logit_diff, by_hand(EVEN))
    )
    assert torch.allclose(ready.gates, called.gates, atol=1e-9)
    assert torch.allclose(ready.history.values, called.history.values, atol=1e-9)
    for one, other in ((ready.found_on, called.found_on), (ready.held_out, called.held_out)):
        assert torch.allclose(one.values, other.values, atol=1e-9)  # type: ignore[union-attr]


@pytest.mark.parametrize("batch", [None, 3])
def test_optimal_ablation_by_a_plain_function(batch: int | None) -> None:
    ready, called = (
        mk.optimal_ablation(
            family("llama"), EVEN, metric, objective="metric", writers=["a1.h1", "m0"], steps=3, batch=batch, **QUIET
        )
        for metric in (mk.logit_diff, by_hand(EVEN))
    )
    assert torch.allclose(ready.losses.values, called.losses.values, atol=1e-9)
    assert float(ready.losses.values.max()) > 1e-3


def test_circuits_are_found_and_curves_drawn_by_a_plain_function() -> None:
    model = family("gpt2")
    ready, called = (
        mk.find_circuit(model, EVEN, metric, n_edges=5, steps=1, random=0, **QUIET)
        for metric in (mk.logit_diff, by_hand(EVEN))
    )
    assert members(ready.circuit) == members(called.circuit)
    assert torch.allclose(ready.report.runs.values, called.report.runs.values, atol=1e-9)
    curves = [
        mk.faithfulness_curve(
            functools.partial(mk.edge_attribution, steps=1),
            model,
            EVEN,
            metric,
            fractions=(0.1, 0.5),
            random=0,
            **QUIET,
        )
        for metric in (mk.logit_diff, by_hand(EVEN))
    ]
    assert torch.allclose(curves[0].runs.values, curves[1].runs.values, atol=1e-9)


def test_a_function_that_joins_prompts_is_refused_where_parts_are_run() -> None:
    model = family("gpt2")
    for name in ("learn_mask", "optimal_ablation", "find_circuit", "faithfulness_curve"):
        with pytest.raises(ValueError, match=r"metric 'mixes': .* depends on that prompt's logits alone"):
            MORE[name](model, EVEN, mixes)
    whole = mk.activation_patching(model, EVEN, mixes, over="layer head", **QUIET)  # sees all of them: nothing is wrong
    assert float(whole.values.mean(-1).abs().max()) < 1e-9


# -- the gap -----------------------------------------------------------------------------------------------------------


def with_runs(clean: list[float], corrupted: list[float], metric: str = "logit_diff", cell: float = 1.0) -> mk.Result:
    runs = {"clean": torch.tensor(clean), "corrupted": torch.tensor(corrupted)}
    values = torch.full((2, len(clean)), cell)
    coords: dict[str, Any] = {"layer": (0, 1), "prompt": tuple(range(len(clean)))}
    return mk.Result(values, ("layer", "prompt"), coords, runs, "corrupted", metric, "logits", {})


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (with_runs([1.0, 0.0], [2.0, 3.0]).mean(), "wrong order: .* Clean 0.5, corrupted 2.5"),
        (with_runs([1.0, 4.0], [2.0, 3.0]), "wrong order for 1 of 2 .* Clean 1, corrupted 2"),
        (with_runs([2.001, 4.0], [2.0, 3.0]), "nearly the same for 1 of 2 .* Clean 2.001, corrupted 2"),
        (with_runs([2.001], [2.0]).mean(), "nearly the same, .* Clean 2.001, corrupted 2"),
        (with_runs([0.01], [-0.01], cell=7.0).mean(), "nearly the same"),
    ],
)
def test_normalizing_by_a_gap_that_is_no_measure_warns(result: mk.Result, message: str) -> None:
    with pytest.warns(mk.GapWarning, match=message):
        result.normalized()


def test_normalizing_by_a_good_gap_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_runs([3.0, 4.0], [2.0, 3.0]).normalized()
        with_runs([0.0, 4.0], [2.0, 1.0]).mean().normalized()
        with_runs([0.0, 0.0], [2.0, 1.0], "kl_divergence").mean().normalized()
