"""Prompts and pairs of prompts: tokens of any length, named positions, answers. Plain values; no model is needed.

Prompts are kept ragged, one tensor a prompt. Nothing is ever padded: the engine runs prompts of equal length together,
so a result always equals running each prompt alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from mechkit._check import checked, is_whole_dtype, shown

Answer = str | int
AnswerSet = Answer | Sequence[Answer]
Answers = Sequence[tuple[AnswerSet, AnswerSet]] | tuple[AnswerSet, AnswerSet]  # a single pair's may be given bare


@runtime_checkable
class Tokenizes(Protocol):
    """What `from_text` needs of a model: `HookedModel` has it."""

    @property
    def d_vocab(self) -> int: ...

    def to_tokens(self, text: str, prepend_bos: bool | None = None) -> Tensor: ...
    def to_str_tokens(self, text: Any) -> list[str]: ...
    def to_single_token(self, text: str) -> int: ...


@checked
@dataclass(frozen=True, eq=False)
class Prompts:
    """Token sequences, one a prompt, possibly of different lengths.

    Attributes:
        tokens: One `[pos]` tensor of token ids a prompt.
        str_tokens: The same as text, for labels; `None` when there was no tokenizer.
    """

    tokens: tuple[Int[Tensor, "_pos"], ...]
    str_tokens: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("tokens: expected at least one prompt, got none")
        for i, row in enumerate(self.tokens):
            if row.ndim != 1 or not is_whole_dtype(row.dtype) or len(row) == 0:
                raise ValueError(
                    f"tokens[{i}]: expected a non-empty 1-D tensor of token ids, got {row.dtype} {list(row.shape)}"
                )
            if int(row.min()) < 0:
                raise ValueError(f"tokens[{i}]: expected ids of 0 or more, got {int(row.min())}")
        if self.str_tokens is not None and [len(s) for s in self.str_tokens] != [len(t) for t in self.tokens]:
            raise ValueError("str_tokens: expected one string for each token of each prompt")

    @classmethod
    @checked
    def from_tokens(cls, tokens: Tensor | Iterable[Tensor | Sequence[int]], model: Tokenizes | None = None) -> Prompts:
        """From a `[prompt pos]` tensor without padding, or a list of prompts of any lengths."""
        if isinstance(tokens, Tensor) and tokens.ndim != 2:
            raise ValueError(
                f"tokens: expected [prompt pos], got shape {list(tokens.shape)}{'; write tokens[None]' * (tokens.ndim == 1)}"
            )
        rows = tuple(_integers(row, f"tokens[{i}]") for i, row in enumerate(tokens))
        if model is not None:
            for i, row in enumerate(rows):
                if row.ndim != 1 or len(row) == 0 or not is_whole_dtype(row.dtype):
                    continue  # refused below
                if int(row.min()) < 0 or int(row.max()) >= model.d_vocab:
                    raise ValueError(f"tokens[{i}]: expected ids in 0..{model.d_vocab - 1}, got {row.tolist()}")
                if _begins_with_padding(model, row):
                    raise ValueError(
                        f"tokens[{i}]: begins with padding, which would be read as text. Pass each prompt unpadded: "
                        "prompts may differ in length"
                    )
        prompts = cls(rows)
        return replace(prompts, str_tokens=_labels(model, rows))

    @classmethod
    @checked
    def from_text(cls, model: Tokenizes, text: str | Sequence[str], prepend_bos: bool | None = None) -> Prompts:
        """Tokenizes each prompt by itself. `prepend_bos=None` follows the model's default, as in TransformerLens."""
        texts = [text] if isinstance(text, str) else list(text)
        return cls.from_tokens([model.to_tokens(t, prepend_bos=prepend_bos)[0] for t in texts], model)

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        first = "" if self.str_tokens is None else f"; first {shown(''.join(self.str_tokens[0]))}"
        return f"Prompts({_how_many(self, 'prompt')}{first})"

    def __getitem__(self, index: Sequence[int]) -> Prompts:
        """A subset, in the given order: see `chosen_prompts`."""
        index = chosen_prompts(index, len(self))
        return Prompts(
            tuple(self.tokens[i] for i in index),
            None if self.str_tokens is None else tuple(self.str_tokens[i] for i in index),
        )

    @property
    def lengths(self) -> Int[Tensor, "prompt"]:
        """Tokens in each prompt."""
        return torch.tensor([len(row) for row in self.tokens])

    def by_length(self) -> dict[int, list[int]]:
        """Length -> the indices of the prompts that have it."""
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(self.tokens):
            groups.setdefault(len(row), []).append(i)
        return groups

    def stack(self, ids: Sequence[int]) -> Int[Tensor, "prompt pos"]:
        """Some prompts as one tensor; raises `ValueError` unless they are of one length."""
        rows = [self.tokens[i] for i in ids]
        if len({len(row) for row in rows}) != 1:
            raise ValueError(f"ids: expected prompts of one length, got {sorted({len(row) for row in rows})}")
        return torch.stack(rows)

    def batches(
        self,
        at_once: Callable[[int, Sequence[int]], int] | None = None,
        *,
        order: Callable[[int], Any] | None = None,
        longest_first: bool = False,
    ) -> Iterator[Batch]:
        """All prompts, in batches of one length each: the one way in which prompts are run together. Nothing is padded.

        Args:
            at_once: From a length and the prompts of it that are still to come, how many of them the next batch takes; all of
                them by default.
            order: A key to sort prompts of one length by; they come as they are by default.
            longest_first: Whether lengths come from the longest to the shortest, rather than as they first occur.
        """
        groups = self.by_length()
        for length in sorted(groups, reverse=True) if longest_first else list(groups):
            ids = groups[length] if order is None else sorted(groups[length], key=order)
            while ids:
                n = len(ids) if at_once is None else at_once(length, ids)
                yield Batch(self, ids[:n], length)
                ids = ids[n:]

    def hash(self) -> str:
        """A short hash of all token ids, for provenance."""
        return _hash(self.tokens)

    def hashes(self) -> tuple[str, ...]:
        """A short hash of each prompt's token ids, by which it is known again."""
        return tuple(_hash([row]) for row in self.tokens)


@dataclass(frozen=True)
class Batch:
    """Prompts of one length that run together.

    Attributes:
        prompts: Where they come from.
        ids: Which of those they are.
        length: Tokens in each.
    """

    prompts: Prompts
    ids: list[int]
    length: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> Int[Tensor, "prompt pos"]:
        """On the CPU."""
        return self.prompts.stack(self.ids)

    def split(self, n: int) -> Iterator[Batch]:
        """The same prompts, `n` at a time."""
        return (Batch(self.prompts, self.ids[i : i + n], self.length) for i in range(0, len(self.ids), n))


@checked
@dataclass(frozen=True, eq=False)
class PromptPairs:
    """Clean prompts, their corrupted partners, and the answers that tell the two apart.

    The two prompts of a pair have the same number of tokens; different pairs may differ.

    Attributes:
        clean, corrupted: The prompts; `clean` is the run in which the right answer is expected.
        right, wrong: For each pair the token ids that count as right, and as wrong. Usually one each.
        positions: Named positions, one index a pair: `{"S2": [10, 11, …]}`. Always has `"END"`, the last token.
        task: A name for captions and provenance.
    """

    clean: Prompts
    corrupted: Prompts
    right: tuple[tuple[int, ...], ...]
    wrong: tuple[tuple[int, ...], ...]
    positions: Mapping[str, Int[Tensor, "prompt"]] = field(default_factory=dict)
    task: str = "custom"

    def __post_init__(self) -> None:
        n = len(self.clean)
        for name, rows in (("corrupted", self.corrupted), ("right", self.right), ("wrong", self.wrong)):
            if len(rows) != n:
                raise ValueError(f"{name}: expected {n} rows, one for each clean prompt; got {len(rows)}")
        for i, (a, b) in enumerate(zip(self.clean.tokens, self.corrupted.tokens, strict=True)):
            if len(a) != len(b):
                raise ValueError(
                    f"pair {i}: expected a clean and a corrupted prompt of equal token length, got {len(a)} and "
                    f"{len(b)}. Reword one of them, or choose words that are one token each"
                )
        for i, (right, wrong) in enumerate(zip(self.right, self.wrong, strict=True)):
            if not right or not wrong:
                raise ValueError(
                    f"answers of pair {i}: expected at least one right and one wrong token, got an empty set"
                )
            if overlap := set(right) & set(wrong):
                raise ValueError(f"answers of pair {i}: tokens {sorted(overlap)} are both right and wrong")
            for name, ids in (("right", right), ("wrong", wrong)):
                if len(set(ids)) != len(ids):
                    raise ValueError(f"answers of pair {i}: a {name} token is listed twice: {list(ids)}")
        object.__setattr__(self, "positions", self._checked_positions())

    def _checked_positions(self) -> dict[str, Tensor]:
        lengths = self.clean.lengths
        named = {}
        for name, values in {**self.positions, "END": self.positions.get("END", lengths - 1)}.items():
            index = _integers(values, f"positions[{name!r}]")
            if not is_whole_dtype(index.dtype):
                raise ValueError(f"positions[{name!r}]: expected integers, got {index.dtype} {index.tolist()}")
            if index.shape != lengths.shape:
                raise ValueError(f"positions[{name!r}]: expected {len(lengths)} values, got shape {list(index.shape)}")
            index = torch.where(index < 0, index + lengths, index)
            for i in ((index < 0) | (index >= lengths)).nonzero().flatten().tolist():
                raise ValueError(
                    f"positions[{name!r}][{i}]: expected an index into {lengths[i]} tokens, got {values[i]}"
                )
            if name == "END" and (other := (index != lengths - 1).nonzero().flatten().tolist()):
                raise ValueError(
                    f"positions['END'][{other[0]}]: expected the last token, {lengths[other[0]] - 1}, got "
                    f"{index[other[0]]}. Give another name to a position that is not the end"
                )
            named[name] = index
        return named

    @classmethod
    @checked
    def from_text(
        cls,
        model: Tokenizes,
        clean: Sequence[str] | str,
        corrupted: Sequence[str] | str,
        answers: Answers,
        *,
        positions: Mapping[str, Sequence[int]] | None = None,
        prepend_bos: bool | None = None,
        task: str = "custom",
    ) -> PromptPairs:
        """Pairs from text.

        Args:
            model: Tokenizes; a `HookedModel`.
            clean, corrupted: The prompts. Each pair must come out at the same number of tokens.
            answers: `(right, wrong)` for each pair. Either side is one token (`" Mary"`, or its id) or several of them.
            positions: Named token positions, one index a pair, counted with the beginning-of-sequence token if there is
                one; negative counts from the end.
            prepend_bos: Whether to begin with the beginning-of-sequence token; `None` is the model's default.

        Raises:
            ValueError: with the number of the pair: unequal lengths, an answer that is not one token, an empty or
                overlapping pair of answer sets, no prompts.
        """
        return cls.from_tokens(
            Prompts.from_text(model, clean, prepend_bos),
            Prompts.from_text(model, corrupted, prepend_bos),
            answers,
            model=model,
            positions=positions,
            task=task,
        )

    @classmethod
    @checked
    def from_tokens(
        cls,
        clean: Prompts | Tensor | Sequence[Tensor | Sequence[int]],
        corrupted: Prompts | Tensor | Sequence[Tensor | Sequence[int]],
        answers: Answers,
        *,
        model: Tokenizes | None = None,
        positions: Mapping[str, Sequence[int]] | None = None,
        task: str = "custom",
    ) -> PromptPairs:
        """As `from_text`, from token ids. `model` is needed when answers are given as text, and for token labels."""
        clean, corrupted = (p if isinstance(p, Prompts) else Prompts.from_tokens(p, model) for p in (clean, corrupted))
        if isinstance(answers, tuple) and len(answers) == 2 and len(clean) == 1 and isinstance(answers[0], str | int):
            answers = [answers]  # a single pair's answers, given bare
        if len(answers) != len(clean):
            raise ValueError(f"answers: expected {len(clean)} pairs, one for each clean prompt; got {len(answers)}")
        right, wrong = [], []
        for i, pair in enumerate(answers):
            if isinstance(pair, str | int) or len(pair) != 2:
                raise ValueError(f"answers of pair {i}: expected (right, wrong), got {pair!r}")
            right.append(_answer_ids(model, pair[0], f"right answer of pair {i}"))
            wrong.append(_answer_ids(model, pair[1], f"wrong answer of pair {i}"))
        named = {name: _integers(index, f"positions[{name!r}]") for name, index in (positions or {}).items()}
        return cls(clean, corrupted, tuple(right), tuple(wrong), named, task)

    def __len__(self) -> int:
        return len(self.clean)

    def __repr__(self) -> str:
        return (
            f"PromptPairs({_how_many(self.clean, 'pair')}; task {self.task!r}; positions {', '.join(self.positions)})"
        )

    def __getitem__(self, index: Sequence[int]) -> PromptPairs:
        """A subset of the pairs, in the given order: see `chosen_prompts`."""
        index = chosen_prompts(index, len(self))
        return PromptPairs(
            self.clean[index],
            self.corrupted[index],
            tuple(self.right[i] for i in index),
            tuple(self.wrong[i] for i in index),
            {name: values[index] for name, values in self.positions.items()},
            self.task,
        )

    @property
    def answers(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """`(right ids, wrong ids)` of each pair."""
        return tuple(zip(self.right, self.wrong, strict=True))

    @property
    def first_difference(self) -> Int[Tensor, "prompt"]:
        """First position at which clean and corrupted differ; the prompt's length if they are the same."""
        return first_differences(self.clean.tokens, self.corrupted.tokens)


def chosen_prompts(index: Any, n: int) -> list[int]:
    """Which of `n` prompts an index stands for, in its order; prompts, pairs and metrics are all indexed by it.

    Args:
        index: Numbers (negative ones count from the end), a mask of `n` booleans, or a slice.

    Raises:
        TypeError: it is none of these.
        ValueError: a number out of range, a mask of another length, nothing chosen.
    """
    if isinstance(index, slice):
        index = range(n)[index]
    given = index.tolist() if hasattr(index, "tolist") else index
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise TypeError(f"index: expected several prompts, such as [{given!r}], got {given!r}")
    chosen = list(given)
    if chosen and all(isinstance(i, bool) for i in chosen):
        if len(chosen) != n:
            raise ValueError(f"index: expected a mask of {n} booleans, one for each prompt; got {len(chosen)}")
        chosen = [i for i, is_in in enumerate(chosen) if is_in]
    if odd := [i for i in chosen if isinstance(i, bool) or not hasattr(i, "__index__")]:
        raise TypeError(f"index: expected whole numbers, or a mask of {n} booleans; got {odd[0]!r} among them")
    if not chosen or any(not -n <= i < n for i in chosen):
        raise ValueError(f"index: expected prompts in 0..{n - 1}, at least one prompt; got {chosen}")
    return [i.__index__() % n for i in chosen]


def _how_many(prompts: Prompts, what: str) -> str:
    """`'1 prompt of 5 tokens'`, `'32 pairs of 14 to 19 tokens'`."""
    lengths = sorted({len(row) for row in prompts.tokens})
    tokens = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}"
    several, tokened = "s" * (len(prompts) != 1), "token" + "s" * (lengths[-1] != 1)
    return f"{len(prompts)} {what}{several} of {tokens} {tokened}"


def _hash(rows: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(4, "little") + row.to("cpu", torch.int64).numpy().tobytes())
    return digest.hexdigest()[:16]


def _begins_with_padding(model: Tokenizes, row: Tensor) -> bool:
    padded_rows = getattr(model, "left_padded_rows", None)
    return padded_rows is not None and bool(padded_rows(row[None]))


def first_differences(ones: Iterable[Tensor], others: Iterable[Tensor]) -> Int[Tensor, "prompt"]:
    """For each two prompts of equal length, the first position at which they differ; their length if they are the same."""

    def first(one: Tensor, other: Tensor) -> int:
        different = (one != other).nonzero()
        return int(different[0]) if len(different) else len(one)

    return torch.tensor([first(one, other) for one, other in zip(ones, others, strict=True)])


def _integers(values: Any, where: str) -> Tensor:
    """On the CPU as 64-bit integers; what are no whole numbers stay as they are, for the caller to refuse."""
    try:
        tensor = torch.as_tensor(values).cpu()
    except (OverflowError, RuntimeError, TypeError, ValueError):  # 2**70
        raise ValueError(f"{where}: expected whole numbers of 64 bits, got {shown(values)}") from None
    return tensor.long() if is_whole_dtype(tensor.dtype) else tensor


def _labels(model: Tokenizes | None, rows: Sequence[Tensor]) -> tuple[tuple[str, ...], ...] | None:
    return None if model is None else tuple(tuple(model.to_str_tokens(row)) for row in rows)


def _answer_ids(model: Tokenizes | None, answer: AnswerSet, where: str) -> tuple[int, ...]:
    several = [answer] if isinstance(answer, str | int) else list(answer)
    ids = []
    for one in several:
        if isinstance(one, str):
            if model is None:
                raise ValueError(f"{where}: {one!r} is text; pass `model=` so that it can be tokenized, or give its id")
            try:
                one = model.to_single_token(one)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        one, n = int(one), 2**63 if model is None else model.d_vocab
        if not 0 <= one < n:
            wanted = "of 0 or more" if model is None and one < 0 else f"in 0..{n - 1}"
            raise ValueError(f"{where}: expected a token id {wanted}, got {one}")
        ids.append(one)
    return tuple(ids)
