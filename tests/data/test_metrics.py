"""The metrics against plain formulas on random logits, one prompt at a time. A NaN never becomes a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechkit.metrics import (
    CallableMetric,
    Metric,
    accuracy,
    as_metric,
    kl_divergence,
    log_prob,
    logit_diff,
    prob_diff,
)
from mechkit.prompts import PromptPairs

D_VOCAB, NAN, INF = 13, math.nan, math.inf
# one right and one wrong; several of each, in no order; many right and one wrong; ids 0 and the last one
SETS: list[Any] = [(3, 7), ([11, 2, 5], [7, 3]), ([0, 1, 4, 9], 12), (12, [0, 6])]
MAKE: list[Callable[..., Metric]] = [logit_diff, accuracy, log_prob, prob_diff, kl_divergence]


def make_pairs(answers: list[Any]) -> PromptPairs:
    tokens = [[1] * (i + 2) for i in range(len(answers))]  # ragged
    return PromptPairs.from_tokens(tokens, tokens, answers, positions={"first": [0] * len(answers)})


PAIRS = make_pairs(SETS)


def evaluate(metric: Metric, full: Tensor, prompt: list[int] | None = None, reference: Tensor | None = None) -> Tensor:
    """As the engine does it: full logits `[row d_vocab]`, of which the metric gets only the tokens that it reads."""
    rows = torch.arange(len(full)) if prompt is None else torch.tensor(prompt)
    columns = torch.arange(full.shape[-1]) if metric.tokens is None else metric.tokens
    assert (metric.reference is None) == (reference is None)
    return metric.read(full[:, columns], rows, None if reference is None else reference[:, columns])


def plain(name: str, logits: Tensor, right: tuple[int, ...], wrong: tuple[int, ...]) -> float:
    """One prompt's value, from its definition."""
    r, w = [logits[i] for i in right], [logits[i] for i in wrong]
    p = logits.exp() / logits.exp().sum()
    formulas = {
        "logit_diff": lambda: sum(r) / len(r) - sum(w) / len(w),
        "accuracy": lambda: float(max(r) > max(w)),
        "log_prob": lambda: torch.log(sum(p[i] for i in right)),
        "prob_diff": lambda: sum(p[i] for i in right) - sum(p[i] for i in wrong),
    }
    return float(formulas[name]())


def random_logits(seed: int, rows: int = len(SETS)) -> Tensor:
    return 3 * torch.randn(rows, D_VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=atol, equal_nan=True)


# -- values ------------------------------------------------------------------------------------------------------------


@st.composite
def questions(draw: Any) -> tuple[PromptPairs, Tensor]:
    """Pairs with random disjoint sets of answers, and logits for them."""
    n = draw(st.integers(1, 5))
    answers = []
    for _ in range(n):
        ids = draw(st.permutations(range(D_VOCAB)))
        middle = draw(st.integers(1, D_VOCAB - 1))
        answers.append((ids[:middle], ids[middle : draw(st.integers(middle + 1, D_VOCAB))]))
    return make_pairs(answers), random_logits(draw(st.integers(0, 10**6)), n)


@pytest.mark.parametrize("make", MAKE[:4])
@settings(deadline=None)
@given(question=questions())
def test_equals_the_plain_formula_on_any_sets_of_answers(
    make: Callable[..., Metric], question: tuple[PromptPairs, Tensor]
) -> None:
    pairs, logits = question
    metric = make(pairs)
    expected = [plain(metric.name, row, *answers) for row, answers in zip(logits, pairs.answers, strict=True)]
    close(evaluate(metric, logits), expected)


@pytest.mark.parametrize("make", MAKE[:4])
def test_a_batch_of_cells_reads_each_rows_own_prompt(make: Callable[..., Metric]) -> None:
    prompt = [2, 0, 0, 3, 1, 2]  # many rows of one prompt, in any order, as in a sweep
    logits = random_logits(0, len(prompt))
    metric = make(PAIRS)
    expected = [plain(metric.name, row, *PAIRS.answers[i]) for row, i in zip(logits, prompt, strict=True)]
    close(evaluate(metric, logits, prompt), expected)


@pytest.mark.parametrize("make", [log_prob, prob_diff, kl_divergence, logit_diff])
def test_a_constant_added_to_all_logits_changes_nothing(make: Callable[..., Metric]) -> None:
    reference = random_logits(9) if make is kl_divergence else None
    a, b = (evaluate(make(PAIRS), random_logits(1) + shift, reference=reference) for shift in (0.0, 1000.0))
    close(a, b, atol=1e-10)


def test_probabilities_sum_to_one() -> None:
    everything = make_pairs([([i for i in range(D_VOCAB) if i != 4], 4)] * 3)
    rest, wrong = everything, make_pairs([(4, [i for i in range(D_VOCAB) if i != 4])] * 3)
    logits = random_logits(2, 3)
    close(evaluate(log_prob(rest), logits).exp() + evaluate(log_prob(wrong), logits).exp(), torch.ones(3))
    close(evaluate(prob_diff(rest), logits), -evaluate(prob_diff(wrong), logits))
    certain = torch.full((3, D_VOCAB), -50.0, dtype=torch.float64).index_fill(1, torch.tensor([4]), 50.0)
    close(evaluate(prob_diff(wrong), certain), torch.ones(3))
    close(evaluate(log_prob(wrong), certain), torch.zeros(3))


@pytest.mark.parametrize("make", [logit_diff, prob_diff])
def test_changes_sign_when_right_and_wrong_change_places(make: Callable[..., Metric]) -> None:
    swapped = make_pairs([(wrong, right) for right, wrong in SETS])
    close(evaluate(make(PAIRS), random_logits(3)), -evaluate(make(swapped), random_logits(3)))


def test_accuracy_compares_with_the_wrong_answers_alone_and_a_tie_is_no_win() -> None:
    logits = torch.zeros(4, D_VOCAB)
    logits[:, 8] = 100.0  # in nobody's answers
    logits[0, 3] = 1.0
    logits[1, 5] = logits[1, 3] = 1.0
    logits[2, [0, 12]] = torch.tensor([-1.0, -2.0])
    logits[3, 12] = -1.0
    close(evaluate(accuracy(PAIRS), logits), [1.0, 0.0, 1.0, 0.0])


def test_accuracy_of_infinite_logits() -> None:
    pairs = make_pairs([(0, 1)] * 4)
    logits = torch.tensor([[INF, -INF], [-INF, INF], [0.0, -INF], [-INF, -INF]])
    close(evaluate(accuracy(pairs), logits), [1.0, 0.0, 1.0, 0.0])


# -- KL ----------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_kl_is_the_sum_over_the_vocabulary_and_is_not_negative(seed: int) -> None:
    logits, reference = random_logits(seed), random_logits(seed + 1)
    values = evaluate(kl_divergence(PAIRS), logits, reference=reference)
    p, q = (x.exp() / x.exp().sum(-1, keepdim=True) for x in (reference, logits))
    close(values, scipy.special.rel_entr(p.numpy(), q.numpy()).sum(-1), atol=1e-10)
    assert (values > 0).all()


def test_kl_of_a_run_to_itself_is_zero_and_of_another_is_not() -> None:
    logits = random_logits(4)
    metric = kl_divergence(PAIRS)
    close(evaluate(metric, logits, reference=logits), torch.zeros(len(logits)))
    nudged = logits + 0.01 * random_logits(5)
    assert (evaluate(metric, nudged, reference=logits) > 1e-7).all()  # the control
    backwards = evaluate(metric, logits, reference=random_logits(5))
    assert not torch.allclose(backwards, evaluate(metric, random_logits(5), reference=logits))  # KL has a direction


def test_kl_counts_tokens_that_cannot_come_as_nothing() -> None:
    logits, reference = random_logits(6), random_logits(7)
    logits[:, 2] = reference[:, 2] = -INF
    kept = [i for i in range(D_VOCAB) if i != 2]
    metric = kl_divergence(PAIRS)
    close(
        evaluate(metric, logits, reference=reference),
        evaluate(metric, logits[:, kept], reference=reference[:, kept]),
    )
    close(evaluate(metric, reference, reference=reference), torch.zeros(len(reference)))


def test_kl_says_which_run_is_its_reference() -> None:
    assert kl_divergence(PAIRS).reference == "clean"
    assert kl_divergence(PAIRS, reference="corrupted").reference == "corrupted"
    assert all(make(PAIRS).reference is None for make in MAKE[:4])
    with pytest.raises(ValueError, match="reference: expected 'clean' or 'corrupted', got 'patched'"):
        kl_divergence(PAIRS, reference="patched")  # type: ignore[arg-type]


# -- NaN ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKE)
@settings(deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_a_nan_that_is_read_stays_nan_and_touches_no_other_row(
    make: Callable[..., Metric], seed: int, data: st.DataObject
) -> None:
    logits = random_logits(seed)
    row = data.draw(st.integers(0, len(SETS) - 1))
    answers_only = make in (logit_diff, accuracy)
    read = sorted({*PAIRS.right[row], *PAIRS.wrong[row]}) if answers_only else range(D_VOCAB)
    column = data.draw(st.sampled_from(list(read)))
    broken = logits.clone()
    broken[row, column] = NAN
    reference = random_logits(seed + 1) if make is kl_divergence else None
    values, whole = (evaluate(make(PAIRS), x, reference=reference) for x in (broken, logits))
    others = torch.arange(len(SETS)) != row
    assert values[row].isnan()
    assert not whole.isnan().any()
    close(values[others], whole[others])


@pytest.mark.parametrize("make", MAKE)
def test_a_row_of_nan_is_nan_and_so_is_a_nan_reference(make: Callable[..., Metric]) -> None:
    logits, broken = random_logits(0), torch.full((len(SETS), D_VOCAB), NAN)
    reference = logits if make is kl_divergence else None
    assert evaluate(make(PAIRS), broken, reference=reference).isnan().all()
    if reference is not None:
        assert evaluate(make(PAIRS), logits, reference=broken).isnan().all()


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [logit_diff, accuracy])
def test_metrics_of_answers_read_those_tokens_alone(make: Callable[..., Metric]) -> None:
    tokens = make(PAIRS).tokens
    assert tokens is not None
    assert tokens.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 12]  # sorted, once each; neither 8 nor 10
    assert make(make_pairs([(9, 4)])).tokens.tolist() == [4, 9]  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [log_prob, prob_diff, kl_divergence])
def test_metrics_of_probabilities_read_the_whole_vocabulary(make: Callable[..., Metric]) -> None:
    assert make(PAIRS).tokens is None


@pytest.mark.parametrize(
    ("make", "name", "unit"),
    [
        (logit_diff, "logit_diff", "logits"),
        (accuracy, "accuracy", "fraction"),
        (log_prob, "log_prob", "nats"),
        (prob_diff, "prob_diff", "probability"),
        (kl_divergence, "kl_divergence", "nats"),
    ],
)
def test_says_its_name_and_unit_and_where_it_reads(make: Callable[..., Metric], name: str, unit: str) -> None:
    metric = make(PAIRS)
    assert (metric.name, metric.unit, metric.n_prompts) == (name, unit, len(PAIRS))
    assert metric.positions.tolist() == [1, 2, 3, 4]  # the last token of each
    assert make(PAIRS, position="first").positions.tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="position: expected one of first, END; got 'S2'"):
        make(PAIRS, position="S2")


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_logits_dtype_is_kept_and_the_metric_is_differentiable(
    make: Callable[..., Metric], dtype: torch.dtype
) -> None:
    logits = random_logits(8).to(dtype).requires_grad_()
    reference = random_logits(9).to(dtype) if make is kl_divergence else None
    values = evaluate(make(PAIRS), logits, reference=reference)
    assert values.dtype == dtype
    if make is not accuracy:
        values.sum().backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert (logits.grad != 0).any(1).all()


# -- any callable ------------------------------------------------------------------------------------------------------


def test_any_callable_is_a_metric_and_metrics_pass_through() -> None:
    def last_logit(logits: Tensor) -> Tensor:
        return logits[:, -1, 0]

    wrapped = as_metric(last_logit)
    assert isinstance(wrapped, CallableMetric)
    assert wrapped.fn is last_logit
    assert wrapped.name == "last_logit"
    assert as_metric(wrapped) is wrapped
    metric = logit_diff(PAIRS)
    assert as_metric(metric) is metric
    assert as_metric(torch.nn.Identity()).name == "Identity"


def test_refuses_what_is_no_metric() -> None:
    with pytest.raises((ValueError, TypeError), match="metric"):
        as_metric("logit_diff")  # type: ignore[arg-type]


def test_reprs_name_what_is_measured_and_where() -> None:
    assert repr(logit_diff(PAIRS)) == "Metric(logit_diff [logits] of 4 prompts at END)"
    assert repr(logit_diff(PAIRS, position="first")[[1]]) == "Metric(logit_diff [logits] of 1 prompt at first)"
    kl = kl_divergence(PAIRS, reference="corrupted")
    assert repr(kl) == "Metric(kl_divergence [nats] of 4 prompts at END; compared with the corrupted run)"
    assert repr(CallableMetric(lambda logits: logits[:, -1, 0], "first_token")) == "CallableMetric(first_token)"
