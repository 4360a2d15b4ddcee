"""Metrics of single-token answers, and the divergence from another run: each read at one position of each prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._check import checked
from mechkit.metrics._metric import MadeOf, Metric, metric_factory
from mechkit.prompts import PromptPairs


@checked
@metric_factory
def logit_diff(pairs: PromptPairs, *, position: str = "END", pool: Literal["mean", "logsumexp"] = "mean") -> Metric:
    """Logit of the right answer minus logit of the wrong one, in logits; > 0 where the model prefers the right answer.

    A set of several answers counts as one: by the mean of its logits (`pool="mean"`: each answer weighs the same), or by the
    logarithm of the sum of their exponentials (`"logsumexp"`: the log odds of the two sets; likelier answers weigh more).
    """
    if pool not in ("mean", "logsumexp"):
        raise ValueError(f"pool: expected 'mean' or 'logsumexp', got {pool!r}")
    if pool == "logsumexp":

        def odds(right: Tensor, wrong: Tensor, _: Tensor) -> Tensor:
            return right.logsumexp(-1) - wrong.logsumexp(-1)

        return _answer_metric("logit_diff", "logits", pairs, position, fill=-torch.inf, read=odds)
    sizes = [torch.tensor([len(ids) for ids in side]) for side in (pairs.right, pairs.wrong)]

    def read(right: Tensor, wrong: Tensor, prompt: Tensor) -> Tensor:
        n_right, n_wrong = (n.to(prompt.device, non_blocking=True)[prompt] for n in sizes)
        return right.sum(-1) / n_right - wrong.sum(-1) / n_wrong

    return _answer_metric("logit_diff", "logits", pairs, position, fill=0.0, read=read)


@checked
@metric_factory
def accuracy(pairs: PromptPairs, *, position: str = "END") -> Metric:
    """1 where the best right answer has a higher logit than every wrong answer (not than the whole vocabulary), else 0."""

    def read(right: Tensor, wrong: Tensor, _: Tensor) -> Tensor:
        best_right, best_wrong = right.amax(-1), wrong.amax(-1)
        wins = (best_right > best_wrong).to(right.dtype)
        return wins.masked_fill(best_right.isnan() | best_wrong.isnan(), torch.nan)

    return _answer_metric("accuracy", "fraction", pairs, position, fill=-torch.inf, read=read)


@checked
@metric_factory
def log_prob(pairs: PromptPairs, *, position: str = "END") -> Metric:
    """Log-probability (nats) of the right answers, summed in probability; ≤ 0."""
    at, right = _position(pairs, position), _padded(pairs.right)
    made_of = MadeOf.of(pairs, position, wrong=False)

    def read(logits: Tensor, prompt: Tensor, _: Tensor | None) -> Tensor:
        return _gather(logits.log_softmax(-1), right, prompt, fill=-torch.inf).logsumexp(-1)

    return Metric(
        "log_prob",
        "nats",
        len(pairs),
        at,
        None,
        read,
        lengths=pairs.clean.lengths,
        made_of=made_of,
        in_corrupted=_in_corrupted(pairs, position),
    )


@checked
@metric_factory
def prob_diff(pairs: PromptPairs, *, position: str = "END") -> Metric:
    """Probability of the right answers minus that of the wrong ones, each summed over its set; from −1 to 1."""
    at, lengths, made_of = _position(pairs, position), pairs.clean.lengths, MadeOf.of(pairs, position)
    _need_both("prob_diff", pairs)
    right, wrong = _padded(pairs.right), _padded(pairs.wrong)

    def read(logits: Tensor, prompt: Tensor, _: Tensor | None) -> Tensor:
        probs = logits.softmax(-1)
        return _gather(probs, right, prompt, fill=0.0).sum(-1) - _gather(probs, wrong, prompt, fill=0.0).sum(-1)

    corrupted = _in_corrupted(pairs, position)
    return Metric(
        "prob_diff", "probability", len(pairs), at, None, read, lengths=lengths, made_of=made_of, in_corrupted=corrupted
    )


@checked
@metric_factory
def kl_divergence(
    pairs: PromptPairs, *, reference: Literal["clean", "corrupted"] = "clean", position: str = "END"
) -> Metric:
    """KL(reference ‖ edited run) of the next-token distributions, in nats; ≥ 0, and 0 where the edit restores the reference.

    Lower means closer to the reference run (the clean one by default).
    """
    if reference not in ("clean", "corrupted"):
        raise ValueError(f"reference: expected 'clean' or 'corrupted', got {reference!r}")
    at, lengths = _position(pairs, position), pairs.clean.lengths
    made_of = MadeOf.of(pairs, position, right=False, wrong=False)

    def read(logits: Tensor, _: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None  # the engine supplies it, because `reference` is set
        return kl(target.log_softmax(-1), logits.log_softmax(-1))

    corrupted = _in_corrupted(pairs, position)
    return Metric("kl_divergence", "nats", len(pairs), at, None, read, reference, lengths, made_of, corrupted)


def _answer_metric(
    name: str,
    unit: str,
    pairs: PromptPairs,
    position: str,
    *,
    fill: float,
    read: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Metric:
    """A metric of the answers' logits alone, so that only those tokens are unembedded.

    `read(right [row k], wrong [row k], prompt [row])` gets sets shorter than the longest filled up with `fill`.
    """
    at, made_of = _position(pairs, position), MadeOf.of(pairs, position)
    _need_both(name, pairs)
    tokens = torch.tensor(sorted({t for ids in pairs.right + pairs.wrong for t in ids}))
    right, wrong = (_padded(tuple(_locate(tokens, ids) for ids in side)) for side in (pairs.right, pairs.wrong))

    def read_rows(logits: Tensor, prompt: Tensor, _: Tensor | None) -> Tensor:
        return read(_gather(logits, right, prompt, fill), _gather(logits, wrong, prompt, fill), prompt)

    lengths, corrupted = pairs.clean.lengths, _in_corrupted(pairs, position)
    return Metric(
        name, unit, len(pairs), at, tokens, read_rows, lengths=lengths, made_of=made_of, in_corrupted=corrupted
    )


def _need_both(name: str, pairs: PromptPairs) -> None:
    if any(not ids for ids in pairs.wrong):
        raise ValueError(
            f"pairs: expected a right and a wrong answer of each pair, which {name} compares; teacher-forced pairs have no wrong "
            "ones. Use mk.answer_log_prob"
        )


def _position(pairs: PromptPairs, name: str) -> Tensor:
    if name not in pairs.positions:
        raise ValueError(f"position: expected one of {', '.join(pairs.positions)}; got {name!r}")
    return pairs.positions[name]


def _in_corrupted(pairs: PromptPairs, name: str) -> Tensor | None:
    """Where the metric reads the corrupted prompts of pairs whose prompts differ in length."""
    if pairs.align is None:
        return None
    if name not in pairs.align:
        raise ValueError(f"position: expected one that is aligned, {', '.join(pairs.align)}; got {name!r}")
    return torch.stack([pairs.align[name], pairs.corrupted.lengths])


def _locate(tokens: Tensor, ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.searchsorted(tokens, torch.tensor(ids)).tolist())


def _padded(sets: tuple[tuple[int, ...], ...]) -> Int[Tensor, "prompt k"]:
    """Ragged sets of indices as one tensor, −1 where a set is shorter."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sets], batch_first=True, padding_value=-1)


def _gather(logits: Tensor, index: Tensor, prompt: Tensor, fill: float) -> Float[Tensor, "row k"]:
    """Each row's own columns; `fill` where the row's set is shorter than the longest. A NaN of the model stays NaN."""
    columns = index.to(logits.device, non_blocking=True)[prompt]
    return logits.gather(-1, columns.clamp(min=0)).masked_fill(columns < 0, fill)


def kl(log_p: Float[Tensor, "... outcome"], log_q: Float[Tensor, "... outcome"]) -> Float[Tensor, "..."]:
    """KL(p ‖ q) in nats; 0 log 0 = 0. Rounding may take it a little below 0."""
    return (log_p.exp() * (log_p - log_q)).masked_fill(log_p == -torch.inf, 0.0).sum(-1)
