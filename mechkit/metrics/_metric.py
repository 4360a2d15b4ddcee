"""Metrics: one number per prompt, read off the logits.

A metric says which position it reads in each prompt and which tokens it needs there, so that the engine unembeds only
those. Metrics are computed in float32 at least, whatever the model's dtype.

A metric reads the answers of the pairs that it was made from, and belongs to them: every technique refuses it with other pairs,
or with the same pairs in another order (`MadeOf`). `metric[index]` belongs to `pairs[index]`. To avoid this, let the technique
make the metric: `metric=mk.logit_diff`, or `functools.partial(mk.kl_divergence, reference="corrupted")`. Mark your
own function from pairs to a metric with `metric_factory`; any other function is treated as a function of logits.
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

# logits at the metric's positions [row token] (or [row place token]), which prompt each row is [row], reference logits of the
# same shape -> [row]
Reader = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Ids = tuple[tuple[int, ...], ...]  # for each prompt

_MAKES_A_METRIC = "__mechkit_metric_factory__"
_TAKES_PROMPTS = "__mechkit_takes_prompts__"
_Factory = TypeVar("_Factory", bound=Callable[..., Any])


@dataclass(frozen=True)
class MadeOf:
    """What a metric was made of, as far as its values depend on it: one entry for each pair, in their order.

    Attributes:
        clean, corrupted: A hash of each prompt's tokens.
        right, wrong: The answers that are read; `None` if none are.
        position: The name of the position that is read; empty where several are.
        continuation: The answers of several tokens; `None` if none are read.
    """

    clean: tuple[str, ...]
    corrupted: tuple[str, ...]
    right: Ids | None
    wrong: Ids | None
    position: str
    continuation: Ids | None = None

    @classmethod
    def of(cls, pairs: PromptPairs, position: str, *, right: bool = True, wrong: bool = True) -> MadeOf:
        """For all pairs; `right` and `wrong` say which answers are read."""
        return cls(
            pairs.clean.hashes(),
            pairs.corrupted.hashes(),
            _in_order(pairs.right) if right else None,
            _in_order(pairs.wrong) if wrong else None,
            position,
        )

    @classmethod
    def of_prompts(cls, prompts: PromptPairs | Prompts) -> MadeOf:
        """Of prompts alone, of which several positions are read."""
        if isinstance(prompts, PromptPairs):
            return cls.of(prompts, "", right=False, wrong=False)
        return cls(prompts.hashes(), prompts.hashes(), None, None, "")

    def __getitem__(self, index: Sequence[int]) -> MadeOf:
        def some(entries: Any) -> Any:
            return None if entries is None else tuple(entries[i] for i in index)

        clean, corrupted, right, wrong = map(some, (self.clean, self.corrupted, self.right, self.wrong))
        return MadeOf(clean, corrupted, right, wrong, self.position, some(self.continuation))

    def difference(self, prompts: PromptPairs | Prompts) -> str | None:
        """How so many prompts differ from those that the metric was made of; `None` if they do not.

        Plain prompts may be the clean ones or the corrupted ones, and have no answers to compare.
        """
        if isinstance(prompts, Prompts):
            return self._other_prompts(prompts.hashes())
        given = MadeOf.of(prompts, self.position, right=self.right is not None, wrong=self.wrong is not None)
        if self.continuation is not None:
            given = replace(given, continuation=prompts.continuation)
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
        if self.continuation != given.continuation:
            return "their answers are divided from the prompts elsewhere, or end with other tokens"
        raise AssertionError("unreachable: the keys differ")

    def _keys(self) -> list[tuple[Any, ...]]:
        sides = [side for side in (self.clean, self.right, self.wrong, self.continuation) if side is not None]
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
    """What to read, and how to turn it into one number per prompt. Higher is better unless the docstring says otherwise.

    Attributes:
        name: For labels, e.g. `"logit_diff"`.
        unit: For axes, e.g. `"logits"`.
        n_prompts: How many prompts it was made for.
        positions: The position that is read in each prompt, `[prompt]`; or several, `[prompt place]`, where a prompt that has
            fewer than others names one of its own again.
        tokens: The token ids that are read (the logits' last axis, in this order); `None` reads the whole vocabulary.
        read: `(logits [row token], prompt [row], reference logits [row token] or None) -> [row]`; logits are `[row place token]`
            where several positions are read.
        reference: The unedited run whose logits `read` gets as a reference, if it needs one.
        lengths: The prompts' lengths, so that a sweep of other prompts can be refused; `None` takes any.
        in_corrupted: For pairs whose prompts differ in length: the position in the corrupted prompts, and their lengths.
        made_of: The prompts themselves, so that others of the same lengths, and these in another order, can be refused; `None`
            takes any.
        parts: Of several metrics that are read together, those metrics; `read` gives `[row metric]` then.
    """

    name: str
    unit: str
    n_prompts: int
    positions: Int[Tensor, "prompt"] | Int[Tensor, "prompt place"]
    tokens: Int[Tensor, "token"] | None
    read: Reader
    reference: Literal["clean", "corrupted"] | None = None
    lengths: Int[Tensor, "prompt"] | None = None
    made_of: MadeOf | None = None
    in_corrupted: Int[Tensor, "2 prompt"] | None = None
    parts: tuple[Metric, ...] = ()

    def __repr__(self) -> str:
        prompts = f"{self.n_prompts} prompt{'s' * (self.n_prompts != 1)}"
        where = "" if self.made_of is None else f" at {self.made_of.position}"
        reference = "" if self.reference is None else f"; compared with the {self.reference} run"
        return f"Metric({self.name} [{self.unit}] of {prompts}{where}{reference})"

    @property
    def n_places(self) -> int:
        """Positions that are read in each prompt."""
        return 1 if self.positions.ndim == 1 else self.positions.shape[1]

    @property
    def last_read(self) -> Int[Tensor, "prompt"]:
        """The last position that is read in each prompt: nothing behind it matters."""
        return self.positions if self.positions.ndim == 1 else self.positions.amax(1)

    @property
    def position(self) -> Int[Tensor, "prompt"]:
        """The one position that is read in each prompt.

        Raises:
            ValueError: there are several.
        """
        if self.positions.ndim > 1:
            raise ValueError(
                f"metric: expected one that reads one position of each prompt, such as mk.logit_diff; {self.name!r} reads "
                f"{self.n_places}"
            )
        return self.positions

    def of_corrupted(self) -> Metric:
        """The same, read off the corrupted prompts of pairs whose prompts differ in length."""
        assert self.in_corrupted is not None
        position, lengths = self.in_corrupted
        return replace(self, positions=position, lengths=lengths, in_corrupted=None)

    def __getitem__(self, index: Sequence[int]) -> Metric:
        """The metric of some of its prompts, for `pairs[index]`."""
        ids = chosen_prompts(index, self.n_prompts)
        chosen = torch.tensor(ids)

        def read(logits: Tensor, prompt: Tensor, reference: Tensor | None) -> Tensor:
            return self.read(logits, chosen.to(prompt.device, non_blocking=True)[prompt], reference)

        lengths = None if self.lengths is None else self.lengths[chosen]
        made_of = None if self.made_of is None else self.made_of[ids]
        positions = self.positions[chosen]
        corrupted = None if self.in_corrupted is None else self.in_corrupted[:, chosen]
        return replace(
            self,
            n_prompts=len(ids),
            positions=positions,
            read=read,
            lengths=lengths,
            made_of=made_of,
            in_corrupted=corrupted,
        )

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


def takes_prompts(make: _Factory) -> _Factory:
    """Marks a function that makes a metric of plain prompts too, which have no answers."""
    setattr(make, _TAKES_PROMPTS, True)
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
    name, function = getattr(make, "__name__", repr(make)), make
    while isinstance(function, functools.partial):
        function = function.func
    if not isinstance(prompts, PromptPairs) and not getattr(function, _TAKES_PROMPTS, False):
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
    """What a metric returned; raises `ValueError` unless it is one value per prompt (of each metric, where several are read)."""
    if isinstance(metric, Metric) and metric.parts:
        for i, part in enumerate(metric.parts):
            one_a_prompt(part, value[..., i], n_prompts)
        return value
    if isinstance(value, Tensor) and value.shape == (n_prompts,) and not value.is_complex():
        return value
    got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        f"metric {metric.name!r}: expected one real value per prompt, a tensor of shape [{n_prompts}], got {got}. Do not average "
        "inside the metric: results keep the prompt axis"
    )


def _in_order(answers: Ids) -> Ids:
    return tuple(tuple(sorted(ids)) for ids in answers)


def _another_order(what: str, mine: list[Any], given: list[Any]) -> str:
    i = next(i for i, (old, new) in enumerate(zip(mine, given, strict=True)) if old != new)
    return f"they are the same in another order ({what} {i} here was number {mine.index(given[i])})"


def _other_tokens(what: str, mine: tuple[str, ...], given: tuple[str, ...]) -> str:
    others = [i for i, (old, new) in enumerate(zip(mine, given, strict=True)) if old != new]
    return f"{what} {others[0]} has other tokens or another picture ({len(others)} of {len(mine)} have)"
