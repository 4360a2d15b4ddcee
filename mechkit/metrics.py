"""Metrics: one number a prompt, read off the logits.

A metric says which position it reads in each prompt and which tokens it needs there, so that the engine unembeds those
alone. Metrics are computed in float32 at least, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit.prompts import PromptPairs

# logits at the metric's positions [row token], which prompt each row is [row], reference logits [row token] -> [row]
Reader = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class Metric:
    """What to read, and how to turn it into one number a prompt. Higher is better unless the docstring says otherwise.

    Attributes:
        name: For labels, e.g. `"logit_diff"`.
        unit: For axes, e.g. `"logits"`.
        n_prompts: How many prompts it was made for.
        positions: The position that is read in each prompt.
        tokens: The token ids that are read (the logits' last axis, in this order); `None` reads the whole vocabulary.
        read: `(logits [row token], prompt [row], reference logits [row token] or None) -> [row]`.
        reference: The unedited run whose logits `read` gets as a reference, if it needs one.
        lengths: The prompts' lengths, so that a sweep of other prompts can be refused; `None` takes any.
    """

    name: str
    unit: str
    n_prompts: int
    positions: Int[Tensor, "prompt"]
    tokens: Int[Tensor, "token"] | None
    read: Reader
    reference: Literal["clean", "corrupted"] | None = None
    lengths: Int[Tensor, "prompt"] | None = None

    def __getitem__(self, index: Sequence[int]) -> Metric:
        """The metric of some of its prompts, for `pairs[index]`."""
        chosen = torch.as_tensor(list(index), dtype=torch.long)
        if len(chosen) == 0 or int(chosen.min()) < 0 or int(chosen.max()) >= self.n_prompts:
            raise ValueError(f"index: expected prompts in 0..{self.n_prompts - 1}, at least one; got {list(index)}")

        def read(logits: Tensor, prompt: Tensor, reference: Tensor | None) -> Tensor:
            return self.read(logits, chosen.to(prompt.device, non_blocking=True)[prompt], reference)

        lengths = None if self.lengths is None else self.lengths[chosen]
        return replace(self, n_prompts=len(chosen), positions=self.positions[chosen], read=read, lengths=lengths)


@dataclass(frozen=True, eq=False)
class CallableMetric:
    """Any function of all logits: `[batch pos d_vocab] -> [batch]`, the batch being the prompts in their order."""

    fn: Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, "batch"]]
    name: str
    unit: str = ""


def as_metric(metric: Metric | CallableMetric | Callable[[Tensor], Tensor]) -> Metric | CallableMetric:
    """Wraps a bare callable; passes metrics through."""
    if isinstance(metric, Metric | CallableMetric):
        return metric
    if not callable(metric):
        raise ValueError(f"metric: expected a Metric or a callable on logits [batch pos d_vocab], got {metric!r}")
    return CallableMetric(metric, getattr(metric, "__name__", type(metric).__name__))


def one_a_prompt(metric: Metric | CallableMetric, value: Any, n_prompts: int) -> Tensor:
    """What a metric gave, or `ValueError` unless it is one value a prompt."""
    if isinstance(value, Tensor) and value.shape == (n_prompts,):
        return value
    got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        f"metric {metric.name!r}: expected one value a prompt, a tensor of shape [{n_prompts}], got {got}. Do not average inside "
        "the metric: results keep the prompt axis"
    )


def logit_diff(pairs: PromptPairs, *, position: str = "END") -> Metric:
    """Logit of the right answer minus logit of the wrong one, in logits; > 0 where the model prefers the right answer.

    With several right or wrong answers, the mean logit of each set.
    """

    return _answer_metric("logit_diff", "logits", pairs, position, fill=0.0, read=_difference_of_means(pairs))


def accuracy(pairs: PromptPairs, *, position: str = "END") -> Metric:
    """1 where the best right answer has a higher logit than every wrong answer (not than the whole vocabulary), else 0."""

    def read(right: Tensor, wrong: Tensor, _: Tensor) -> Tensor:
        best_right, best_wrong = right.amax(-1), wrong.amax(-1)
        wins = (best_right > best_wrong).to(right.dtype)
        return wins.masked_fill(best_right.isnan() | best_wrong.isnan(), torch.nan)

    return _answer_metric("accuracy", "fraction", pairs, position, fill=-torch.inf, read=read)


def log_prob(pairs: PromptPairs, *, position: str = "END") -> Metric:
    """Log-probability (nats) of the right answers, summed in probability; ≤ 0."""
    right = _padded(pairs.right)

    def read(logits: Tensor, prompt: Tensor, _: Tensor | None) -> Tensor:
        return _gather(logits.log_softmax(-1), right, prompt, fill=-torch.inf).logsumexp(-1)

    return Metric("log_prob", "nats", len(pairs), _position(pairs, position), None, read, lengths=pairs.clean.lengths)


def prob_diff(pairs: PromptPairs, *, position: str = "END") -> Metric:
    """Probability of the right answers minus that of the wrong ones, each summed over its set; from −1 to 1."""
    right, wrong = _padded(pairs.right), _padded(pairs.wrong)

    def read(logits: Tensor, prompt: Tensor, _: Tensor | None) -> Tensor:
        probs = logits.softmax(-1)
        return _gather(probs, right, prompt, fill=0.0).sum(-1) - _gather(probs, wrong, prompt, fill=0.0).sum(-1)

    return Metric(
        "prob_diff", "probability", len(pairs), _position(pairs, position), None, read, lengths=pairs.clean.lengths
    )


def kl_divergence(
    pairs: PromptPairs, *, reference: Literal["clean", "corrupted"] = "clean", position: str = "END"
) -> Metric:
    """KL(reference ‖ edited run) of the next-token distributions, in nats; ≥ 0, and 0 where the edit restores the reference.

    Lower means closer to the reference run (the clean one by default).
    """
    if reference not in ("clean", "corrupted"):
        raise ValueError(f"reference: expected 'clean' or 'corrupted', got {reference!r}")

    def read(logits: Tensor, _: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None  # the engine supplies it, because `reference` is set
        p, q = target.log_softmax(-1), logits.log_softmax(-1)
        return (p.exp() * (p - q)).masked_fill(p == -torch.inf, 0.0).sum(-1)  # 0 log 0 = 0

    return Metric(
        "kl_divergence", "nats", len(pairs), _position(pairs, position), None, read, reference, pairs.clean.lengths
    )


def _difference_of_means(pairs: PromptPairs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    n_right, n_wrong = (torch.tensor([len(ids) for ids in side]) for side in (pairs.right, pairs.wrong))

    def read(right: Tensor, wrong: Tensor, prompt: Tensor) -> Tensor:
        right_n, wrong_n = (n.to(prompt.device, non_blocking=True)[prompt] for n in (n_right, n_wrong))
        return right.sum(-1) / right_n - wrong.sum(-1) / wrong_n

    return read


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
    tokens = torch.tensor(sorted({t for ids in pairs.right + pairs.wrong for t in ids}))
    right, wrong = (_padded(tuple(_locate(tokens, ids) for ids in side)) for side in (pairs.right, pairs.wrong))

    def read_rows(logits: Tensor, prompt: Tensor, _: Tensor | None) -> Tensor:
        return read(_gather(logits, right, prompt, fill), _gather(logits, wrong, prompt, fill), prompt)

    return Metric(name, unit, len(pairs), _position(pairs, position), tokens, read_rows, lengths=pairs.clean.lengths)


def _position(pairs: PromptPairs, name: str) -> Tensor:
    if name not in pairs.positions:
        raise ValueError(f"position: expected one of {', '.join(pairs.positions)}; got {name!r}")
    return pairs.positions[name]


def _locate(tokens: Tensor, ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.searchsorted(tokens, torch.tensor(ids)).tolist())


def _padded(sets: tuple[tuple[int, ...], ...]) -> Int[Tensor, "prompt k"]:
    """Ragged sets of indices as one tensor, −1 where a set is shorter."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sets], batch_first=True, padding_value=-1)


def _gather(logits: Tensor, index: Tensor, prompt: Tensor, fill: float) -> Float[Tensor, "row k"]:
    """Each row's own columns; `fill` where the row's set is shorter than the longest. A NaN of the model stays NaN."""
    columns = index.to(logits.device, non_blocking=True)[prompt]
    return logits.gather(-1, columns.clamp(min=0)).masked_fill(columns < 0, fill)
