"""Metrics: one number a prompt, read off the logits.

A metric says which position it reads in each prompt and which tokens it needs there, so that the engine unembeds those
alone. Metrics are computed in float32 at least, whatever the model's dtype.

A metric reads the answers of the pairs that it was made of, and belongs to them: every technique refuses it with others, and
with the same ones in another order (`MadeOf`). `metric[index]` belongs to `pairs[index]`. What cannot go wrong is to leave the
making to the technique: `metric=mk.logit_diff`, or `functools.partial(mk.kl_divergence, reference="corrupted")`. A function of
one's own that makes a metric of pairs is marked with `metric_factory`; any other function is taken for one of logits.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._check import checked
from mechkit.prompts import PromptPairs, Prompts, chosen_prompts

# logits at the metric's positions [row token], which prompt each row is [row], reference logits [row token] -> [row]
Reader = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Ids = tuple[tuple[int, ...], ...]  # for each prompt

_MAKES_A_METRIC = "__mechkit_metric_factory__"
_Factory = TypeVar("_Factory", bound=Callable[..., Any])


@dataclass(frozen=True)
class MadeOf:
    """What a metric was made of, as far as its values depend on it: one entry for each pair, in their order.

    Attributes:
        clean, corrupted: A hash of each prompt's tokens.
        right, wrong: The answers that are read; `None` if none are.
        position: The name of the position that is read.
    """

    clean: tuple[str, ...]
    corrupted: tuple[str, ...]
    right: Ids | None
    wrong: Ids | None
    position: str

    @classmethod
    def of(cls, pairs: PromptPairs, position: str, *, right: bool = True, wrong: bool = True) -> MadeOf:
        """Of all pairs; `right` and `wrong` say which answers are read."""
        return cls(
            pairs.clean.hashes(),
            pairs.corrupted.hashes(),
            _in_order(pairs.right) if right else None,
            _in_order(pairs.wrong) if wrong else None,
            position,
        )

    def __getitem__(self, index: Sequence[int]) -> MadeOf:
        def some(entries: Any) -> Any:
            return None if entries is None else tuple(entries[i] for i in index)

        clean, corrupted, right, wrong = map(some, (self.clean, self.corrupted, self.right, self.wrong))
        return MadeOf(clean, corrupted, right, wrong, self.position)

    def difference(self, prompts: PromptPairs | Prompts) -> str | None:
        """How so many prompts differ from those that the metric was made of; `None` if they do not.

        Plain prompts may be the clean ones or the corrupted ones, and have no answers to compare.
        """
        if isinstance(prompts, Prompts):
            return self._other_prompts(prompts.hashes())
        given = MadeOf.of(prompts, self.position, right=self.right is not None, wrong=self.wrong is not None)
        mine, theirs = self._keys(), given._keys()
        if mine == theirs:
            return None
        if sorted(mine) == sorted(theirs):
            return _another_order("pair", mine, theirs)
        if self.clean != given.clean:
            if given.clean == self.corrupted and given.corrupted == self.clean:
                return "clean and corrupted prompts have changed places"
            return _other_tokens("clean prompt", self.clean, given.clean)
        for side, before, now in (("right", self.right, given.right), ("wrong", self.wrong, given.wrong)):
            for i, (old, new) in enumerate(zip(before or (), now or (), strict=True)):
                if old != new:
                    return f"pair {i} has the {side} answers {list(new)} here, and {list(old)} in the metric"
        raise AssertionError("unreachable: the keys differ")

    def _keys(self) -> list[tuple[Any, ...]]:
        sides = [side for side in (self.clean, self.right, self.wrong) if side is not None]
        return list(zip(*sides, strict=True))

    def _other_prompts(self, given: tuple[str, ...]) -> str | None:
        if all(one in pair for one, pair in zip(given, zip(self.clean, self.corrupted, strict=True), strict=True)):
            return None
        for mine in (self.clean, self.corrupted):
            if sorted(mine) == sorted(given):
                return _another_order("prompt", list(mine), list(given))
        return _other_tokens("prompt", self.clean, given)


@checked
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
        made_of: The prompts themselves, so that others of the same lengths, and these in another order, can be refused; `None`
            takes any.
    """

    name: str
    unit: str
    n_prompts: int
    positions: Int[Tensor, "prompt"]
    tokens: Int[Tensor, "token"] | None
    read: Reader
    reference: Literal["clean", "corrupted"] | None = None
    lengths: Int[Tensor, "prompt"] | None = None
    made_of: MadeOf | None = None

    def __repr__(self) -> str:
        prompts = f"{self.n_prompts} prompt{'s' * (self.n_prompts != 1)}"
        where = "" if self.made_of is None else f" at {self.made_of.position}"
        reference = "" if self.reference is None else f"; compared with the {self.reference} run"
        return f"Metric({self.name} [{self.unit}] of {prompts}{where}{reference})"

    def __getitem__(self, index: Sequence[int]) -> Metric:
        """The metric of some of its prompts, for `pairs[index]`."""
        ids = chosen_prompts(index, self.n_prompts)
        chosen = torch.tensor(ids)

        def read(logits: Tensor, prompt: Tensor, reference: Tensor | None) -> Tensor:
            return self.read(logits, chosen.to(prompt.device, non_blocking=True)[prompt], reference)

        lengths = None if self.lengths is None else self.lengths[chosen]
        made_of = None if self.made_of is None else self.made_of[ids]
        positions = self.positions[chosen]
        return replace(self, n_prompts=len(ids), positions=positions, read=read, lengths=lengths, made_of=made_of)

    def check(self, prompts: PromptPairs | Prompts) -> None:
        """Raises `ValueError` if it was made for other prompts, or for these in another order."""
        lengths = (prompts.clean if isinstance(prompts, PromptPairs) else prompts).lengths
        whose = "the pairs that are given here" if isinstance(prompts, PromptPairs) else "pairs with these prompts"
        if self.n_prompts != len(prompts):
            raise ValueError(
                f"metric: it was made for {self.n_prompts} prompts, but there are {len(prompts)}; make it of {whose}"
            )
        different = None if self.made_of is None else self.made_of.difference(prompts)
        if self.lengths is not None and not torch.equal(self.lengths, lengths):
            only_order = different is not None and sorted(self.lengths.tolist()) == sorted(lengths.tolist())
            if not only_order:
                different = f"prompts of other lengths ({self.lengths.tolist()}) than these ({lengths.tolist()})"
        if different is None and self.made_of is not None and isinstance(prompts, PromptPairs):
            different = self._other_position(prompts, self.made_of.position)
        if different is not None:
            raise ValueError(
                f"metric: {self.name!r} was made for other prompts: {different}. Make it of {whose}, or pass the function that "
                "makes it, such as metric=mk.logit_diff"
            )

    def _other_position(self, pairs: PromptPairs, name: str) -> str | None:
        now = pairs.positions.get(name)  # pairs without that name contradict nothing
        if now is None or torch.equal(now, self.positions):
            return None
        i = int((now != self.positions).nonzero()[0])
        return f"position {name!r} of pair {i} is {int(now[i])} here, and {int(self.positions[i])} in the metric"


@dataclass(frozen=True, eq=False)
class CallableMetric:
    """Any function of all logits: `[batch pos d_vocab] -> [batch]`, the batch being the prompts in their order."""

    fn: Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, "batch"]]
    name: str
    unit: str = ""

    def __repr__(self) -> str:
        return f"CallableMetric({self.name}{f' [{self.unit}]' if self.unit else ''})"


# A metric, a function that makes one of pairs (marked with `metric_factory`), or a function of logits.
AnyMetric = Metric | CallableMetric | Callable[[PromptPairs], Metric] | Callable[[Tensor], Tensor]


@checked
def metric_factory(make: _Factory) -> _Factory:
    """Marks a function that makes a metric of pairs, so that a technique can be given the function itself.

    Without the mark a function is taken for one of logits. `functools.partial` of a marked function is marked too, and mechkit's
    own (`mk.logit_diff`, …) are.

    Args:
        make: `PromptPairs -> Metric`; further arguments need defaults, or a `functools.partial`.

    Returns:
        The same function.

    Example:
        >>> @mk.metric_factory
        ... def at_the_name(pairs):
        ...     return mk.logit_diff(pairs, position="IO")
        >>> mk.activation_patching(model, pairs, at_the_name)
    """
    if not callable(make):
        raise TypeError(f"make: expected a function that makes a metric of pairs, got {make!r}")
    setattr(make, _MAKES_A_METRIC, True)
    return make


def makes_metrics(metric: object) -> bool:
    """Whether this is a function that makes metrics of pairs: marked, or a `functools.partial` of a marked one."""
    marked = getattr(metric, _MAKES_A_METRIC, False) or getattr(type(metric).__call__, _MAKES_A_METRIC, False)
    return marked is True or (isinstance(metric, functools.partial) and makes_metrics(metric.func))


def metric_for(metric: AnyMetric, prompts: PromptPairs | Prompts) -> Metric | CallableMetric:
    """The metric of these prompts, for any technique: checked, made by a factory, or a function of logits as it is.

    Raises:
        TypeError: what is given, or what a factory gives, is no metric.
        ValueError: a metric that was made for other prompts; a factory where there are no pairs to make one of.
    """
    if not isinstance(metric, Metric | CallableMetric) and makes_metrics(metric):
        metric = _made(metric, prompts)
    metric = as_metric(metric)
    if isinstance(metric, Metric):
        metric.check(prompts)
        if isinstance(prompts, PromptPairs) and metric.made_of is not None:  # these may have other corrupted prompts
            metric = replace(metric, made_of=replace(metric.made_of, corrupted=prompts.corrupted.hashes()))
    return metric


def _made(make: Any, prompts: PromptPairs | Prompts) -> Any:
    """What a factory makes of pairs."""
    name = getattr(make, "__name__", repr(make))
    if not isinstance(prompts, PromptPairs):
        raise ValueError(
            f"metric: {name} makes a metric of PromptPairs, got {type(prompts).__name__}, which have no answers; give pairs, or "
            "a metric that was made for these prompts"
        )
    try:
        inspect.signature(make).bind(prompts)
    except TypeError as error:
        raise TypeError(
            f"metric: {name} is called with the pairs alone, which it does not take ({error}); give its other arguments by name, "
            "as in functools.partial(mk.kl_divergence, reference='corrupted'), or call it and give the metric"
        ) from None
    made = make(prompts)
    if not isinstance(made, Metric | CallableMetric) and (makes_metrics(made) or not callable(made)):
        raise TypeError(f"metric: expected {name} to make a Metric of pairs, got {type(made).__name__}")
    return made


def as_metric(metric: Any) -> Metric | CallableMetric:
    """Wraps a bare function of logits; passes metrics through."""
    if isinstance(metric, Metric | CallableMetric):
        return metric
    if makes_metrics(metric):
        raise TypeError(
            f"metric: {metric!r} makes a metric of pairs; call it with pairs, or give it to a technique that has them"
        )
    if not callable(metric):
        raise TypeError(
            "metric: expected a Metric such as mk.logit_diff(pairs), a function that makes one such as mk.logit_diff, or a "
            f"callable on logits [batch pos d_vocab]; got {metric!r}"
        )
    return CallableMetric(metric, getattr(metric, "__name__", type(metric).__name__))


def one_a_prompt(metric: Metric | CallableMetric, value: Any, n_prompts: int) -> Tensor:
    """What a metric gave, or `ValueError` unless it is one value a prompt."""
    if isinstance(value, Tensor) and value.shape == (n_prompts,) and not value.is_complex():
        return value
    got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        f"metric {metric.name!r}: expected one real value a prompt, a tensor of shape [{n_prompts}], got {got}. Do not average "
        "inside the metric: results keep the prompt axis"
    )


@checked
@metric_factory
def logit_diff(pairs: PromptPairs, *, position: str = "END") -> Metric:
    """Logit of the right answer minus logit of the wrong one, in logits; > 0 where the model prefers the right answer.

    With several right or wrong answers, the mean logit of each set.
    """
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

    return Metric("log_prob", "nats", len(pairs), at, None, read, lengths=pairs.clean.lengths, made_of=made_of)


@checked
@metric_factory
def prob_diff(pairs: PromptPairs, *, position: str = "END") -> Metric:
    """Probability of the right answers minus that of the wrong ones, each summed over its set; from −1 to 1."""
    at, lengths, made_of = _position(pairs, position), pairs.clean.lengths, MadeOf.of(pairs, position)
    right, wrong = _padded(pairs.right), _padded(pairs.wrong)

    def read(logits: Tensor, prompt: Tensor, _: Tensor | None) -> Tensor:
        probs = logits.softmax(-1)
        return _gather(probs, right, prompt, fill=0.0).sum(-1) - _gather(probs, wrong, prompt, fill=0.0).sum(-1)

    return Metric("prob_diff", "probability", len(pairs), at, None, read, lengths=lengths, made_of=made_of)


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

    return Metric("kl_divergence", "nats", len(pairs), at, None, read, reference, lengths, made_of)


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
    tokens = torch.tensor(sorted({t for ids in pairs.right + pairs.wrong for t in ids}))
    right, wrong = (_padded(tuple(_locate(tokens, ids) for ids in side)) for side in (pairs.right, pairs.wrong))

    def read_rows(logits: Tensor, prompt: Tensor, _: Tensor | None) -> Tensor:
        return read(_gather(logits, right, prompt, fill), _gather(logits, wrong, prompt, fill), prompt)

    return Metric(name, unit, len(pairs), at, tokens, read_rows, lengths=pairs.clean.lengths, made_of=made_of)


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


def _in_order(answers: Ids) -> Ids:
    return tuple(tuple(sorted(ids)) for ids in answers)


def _another_order(what: str, mine: list[Any], given: list[Any]) -> str:
    i = next(i for i, (old, new) in enumerate(zip(mine, given, strict=True)) if old != new)
    return f"they are the same in another order ({what} {i} here was number {mine.index(given[i])})"


def _other_tokens(what: str, mine: tuple[str, ...], given: tuple[str, ...]) -> str:
    others = [i for i, (old, new) in enumerate(zip(mine, given, strict=True)) if old != new]
    return f"{what} {others[0]} has other tokens ({len(others)} of {len(mine)} have)"


def kl(log_p: Float[Tensor, "... outcome"], log_q: Float[Tensor, "... outcome"]) -> Float[Tensor, "..."]:
    """KL(p ‖ q) in nats; 0 log 0 = 0. Rounding may take it a little below 0."""
    return (log_p.exp() * (log_p - log_q)).masked_fill(log_p == -torch.inf, 0.0).sum(-1)
