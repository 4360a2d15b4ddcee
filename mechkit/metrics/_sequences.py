"""Metrics that read several positions of each prompt: the loss on its own tokens, the log-probability of a longer answer.

Such a metric's `positions` are `[prompt place]`. Where a prompt has fewer places than others, its first one fills the row up, and
does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._check import checked
from mechkit.metrics._metric import MadeOf, Metric, metric_factory, takes_prompts
from mechkit.prompts import PromptPairs, Prompts

Places = int | str | slice | range | Sequence[int | str]


@checked
@takes_prompts
@metric_factory
def loss(prompts: PromptPairs | Prompts, *, positions: Places | None = None) -> Metric:
    """Next-token loss, in nats a token: minus the mean log-probability of the tokens that follow in the prompt. Lower is better.
    TransformerLens's `return_type="loss"`, one number a prompt.

    Args:
        prompts: Prompts, or pairs: then the tokens of the clean prompt are predicted, whichever run is edited.
        positions: Where predictions are read; the token that is predicted there stands one place further. An index (negative
            from each prompt's end), a name of the pairs' positions, several of either, a `range` or a `slice`. By default every
            position but the last one, where nothing follows, and those that a patch of a picture follows. Indices that a
            prompt lacks are left out of its mean.

    Raises:
        ValueError: a prompt of which no position is left, a position without a next token, an unknown name.

    Example:
        >>> repeated = mk.tasks.repeated_tokens(model, n=8, length=40)
        >>> second_half = mk.loss(repeated, positions=slice(40, None))
        >>> mk.ablation(model, repeated, second_half, over="layer head")      # > base where the head helps
    """
    clean = prompts.clean if isinstance(prompts, PromptPairs) else prompts
    places = [_places(prompts, i, len(row), positions, "positions") for i, row in enumerate(clean.tokens)]
    targets = [[int(row[at + 1]) for at in chosen] for row, chosen in zip(clean.tokens, places, strict=True)]
    return _of_tokens("loss", prompts, places, targets, [[-1 / len(chosen)] * len(chosen) for chosen in places])


@checked
@takes_prompts
@metric_factory
def in_context_score(prompts: PromptPairs | Prompts, *, early: Places, late: Places) -> Metric:
    """Loss at late positions minus loss at early ones, in nats a token: how much worse (> 0) or better (< 0) tokens are predicted
    with more context (Olsson et al. 2022, https://arxiv.org/abs/2209.11895: 500th minus 50th token).

    Args:
        prompts: As for `loss`.
        early, late: Positions, each as for `loss`.

    Raises:
        ValueError: as for `loss`.
    """
    clean = prompts.clean if isinstance(prompts, PromptPairs) else prompts
    places, targets, weights = [], [], []
    for i, row in enumerate(clean.tokens):
        sides = [_places(prompts, i, len(row), *side) for side in ((early, "early"), (late, "late"))]
        places.append(sides[0] + sides[1])
        targets.append([int(row[at + 1]) for at in places[-1]])
        weights.append([1 / len(sides[0])] * len(sides[0]) + [-1 / len(sides[1])] * len(sides[1]))
    return _of_tokens("in_context_score", prompts, places, targets, weights)


@checked
@metric_factory
def answer_log_prob(pairs: PromptPairs, *, reduce: Literal["sum", "mean"] = "sum") -> Metric:
    """Log-probability (nats) of an answer of several tokens, each predicted after the right ones before it; ≤ 0.

    Args:
        pairs: Made by `PromptPairs.teacher_forced`.
        reduce: `"sum"` is the log-probability of the whole answer; `"mean"` is that a token, so that long answers compare with
            short ones.

    Raises:
        ValueError: other pairs.
    """
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce: expected 'sum' or 'mean', got {reduce!r}")
    if pairs.continuation is None:
        raise ValueError(
            "pairs: expected pairs whose prompts end with their answers; make them with mk.PromptPairs.teacher_forced(model, "
            "clean, corrupted, answers). For answers of one token there is mk.log_prob"
        )
    answers = [list(ids) for ids in pairs.continuation]
    ends = pairs.clean.lengths.tolist()
    places = [list(range(end - len(answer), end)) for end, answer in zip(ends, answers, strict=True)]
    weights = [[1.0 if reduce == "sum" else 1 / len(answer)] * len(answer) for answer in answers]
    return _of_tokens("answer_log_prob", pairs, places, answers, weights, pairs.continuation)


def _of_tokens(
    name: str,
    prompts: PromptPairs | Prompts,
    places: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    continuation: tuple[tuple[int, ...], ...] | None = None,
) -> Metric:
    """The sum of log-probabilities of `targets`, each predicted at its place and times its weight."""
    lengths = (prompts.clean if isinstance(prompts, PromptPairs) else prompts).lengths
    made_of = MadeOf.of_prompts(prompts)
    if continuation is not None:
        made_of = MadeOf(made_of.clean, made_of.corrupted, None, None, "", continuation)
    longest = max(map(len, places))
    at = torch.tensor([[*row, *[row[0]] * (longest - len(row))] for row in places])
    token = torch.tensor([[*row, *[0] * (longest - len(row))] for row in targets])
    weight = torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in weights], dtype=torch.float64)

    def read(logits: Float[Tensor, "row place token"], prompt: Int[Tensor, "row"], _: Tensor | None) -> Tensor:
        mine, share = (x.to(prompt.device, non_blocking=True)[prompt] for x in (token, weight.to(logits.dtype)))
        chosen = logits.gather(-1, mine[..., None])[..., 0] - logits.logsumexp(-1)
        return (chosen * share).masked_fill(share == 0, 0.0).sum(-1)

    return Metric(name, "nats", len(lengths), at, None, read, lengths=lengths, made_of=made_of)


def _places(prompts: PromptPairs | Prompts, i: int, length: int, positions: Places | None, argument: str) -> list[int]:
    """Where the loss of one prompt is read."""
    if positions is None:
        clean = prompts.clean if isinstance(prompts, PromptPairs) else prompts
        segments = clean.segments[i] if clean.segments else ()
        pictures = {at for segment in segments if segment.kind != "text" for at in segment.positions}
        positions = [at for at in range(length - 1) if at + 1 not in pictures]
    if isinstance(positions, slice):
        chosen = [at for at in range(length)[positions] if at < length - 1]
    else:
        several: list[int | str] = [positions] if isinstance(positions, int | str) else list(positions)
        chosen = []
        for one in several:
            at = _named(prompts, one, i, argument) if isinstance(one, str) else one.__index__()
            at += length if at < 0 else 0
            if at == length - 1:
                raise ValueError(
                    f"{argument}: expected positions with a next token; {one!r} is the last of the {length} tokens of prompt {i}"
                )
            chosen += [at] if 0 <= at < length else []
    if not chosen:
        raise ValueError(
            f"{argument}: expected at least one position with a next token in each prompt; prompt {i} of {length} tokens has "
            f"none among {positions!r}"
        )
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{argument}: expected each position once, got {positions!r}")
    return chosen


def _named(prompts: PromptPairs | Prompts, name: str, i: int, argument: str) -> int:
    named = prompts.positions if isinstance(prompts, PromptPairs) else {}
    if name not in named:
        known = ", ".join(named) or "none, for plain prompts"
        raise ValueError(f"{argument}: expected an index, or a name among {known}; got {name!r}")
    return int(named[name][i])
