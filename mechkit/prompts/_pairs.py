"""Pairs of prompts: clean and corrupted, with answers and named positions. Plain values; no model is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from jaxtyping import Int
from torch import Tensor

from mechkit._check import checked, is_whole, is_whole_dtype, naming
from mechkit.prompts._prompts import Prompts, TakesInputs, Tokenizes, _how_many, _integers, chosen_prompts

Answer = str | int
AnswerSet = Answer | Sequence[Answer]
# A position in each prompt: its index, or the text that ends there (with which occurrence of it, from 0, if there are several).
Position = int | str | tuple[str, int]
Positions = Mapping[str, Sequence[Position] | str | tuple[str, int]]  # one text stands for all prompts
Answers = Sequence[tuple[AnswerSet, AnswerSet]] | tuple[AnswerSet, AnswerSet]  # a single pair's may be given bare


@checked
@dataclass(frozen=True, eq=False)
class PromptPairs:
    """Clean prompts, their corrupted partners, and the answers that distinguish the two.

    The two prompts of a pair have the same number of tokens; different pairs may differ. Where they do not, `align` says which
    named positions of the two belong together.

    Attributes:
        clean, corrupted: The prompts; `clean` is the run in which the right answer is expected.
        right, wrong: For each pair the token ids that count as right, and as wrong. Usually one each.
        positions: Named positions, one index per pair: `{"S2": [10, 11, …]}`. Always has `"END"`, the last token.
        task: A name for captions and provenance.
        align: For pairs whose prompts may differ in length: where named positions are in the corrupted prompts. Names as in
            `positions`; always has `"END"`. Such pairs are for `activation_patching` over `"layer position"`.
        continuation: For pairs made by `teacher_forced`, the answer's tokens: all but the last end both prompts of the pair.
        answer_text: The answers' tokens as text, by id, for reports; empty where there was no tokenizer.
    """

    clean: Prompts
    corrupted: Prompts
    right: tuple[tuple[int, ...], ...]
    wrong: tuple[tuple[int, ...], ...]
    positions: Mapping[str, Int[Tensor, "prompt"]] = field(default_factory=dict)
    task: str = "custom"
    continuation: tuple[tuple[int, ...], ...] | None = None
    align: Mapping[str, Int[Tensor, "prompt"]] | None = None
    answer_text: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.clean)
        for name, rows in (("corrupted", self.corrupted), ("right", self.right), ("wrong", self.wrong)):
            if len(rows) != n:
                raise ValueError(f"{name}: expected {n} rows, one for each clean prompt; got {len(rows)}")
        for i, (a, b) in enumerate(zip(self.clean.tokens, self.corrupted.tokens, strict=True)):
            if len(a) != len(b) and self.align is None:
                raise ValueError(
                    f"pair {i}: expected a clean and a corrupted prompt of equal token length, got {len(a)} and "
                    f"{len(b)}. Reword one of them, choose words that are one token each, or pass align= with the corrupted "
                    "prompts' positions, to patch named positions across"
                )
            if self.align is None and (why := _other_layout(self.clean, self.corrupted, i)):
                raise ValueError(
                    f"pair {i}: expected pictures of the same sizes at the same positions in both prompts, {why}"
                )
        for i, (right, wrong) in enumerate(zip(self.right, self.wrong, strict=True)):
            if not right or (not wrong and self.continuation is None):
                raise ValueError(
                    f"answers of pair {i}: expected at least one right and one wrong token, got an empty set"
                )
            if overlap := set(right) & set(wrong):
                raise ValueError(f"answers of pair {i}: tokens {sorted(overlap)} are both right and wrong")
            for name, ids in (("right", right), ("wrong", wrong)):
                if len(set(ids)) != len(ids):
                    raise ValueError(f"answers of pair {i}: a {name} token is listed twice: {list(ids)}")
        object.__setattr__(self, "positions", _checked_positions(self.positions, self.clean, "positions"))
        if self.align is not None:
            object.__setattr__(self, "align", _checked_positions(self.align, self.corrupted, "align"))
            if unknown := [name for name in self.align if name not in self.positions]:
                raise ValueError(
                    f"align: expected names among the clean prompts' positions, {', '.join(self.positions)}; got {unknown[0]!r}"
                )
        if self.continuation is not None:
            self._check_continuation(self.continuation)

    def _check_continuation(self, continuation: tuple[tuple[int, ...], ...]) -> None:
        if len(continuation) != len(self.clean):
            raise ValueError(f"continuation: expected {len(self.clean)} answers, one a pair; got {len(continuation)}")
        for i, answer in enumerate(continuation):
            forced = list(answer[:-1])
            for prompt in (self.clean.tokens[i], self.corrupted.tokens[i]):
                if not answer or len(forced) >= len(prompt) or prompt[len(prompt) - len(forced) :].tolist() != forced:
                    raise ValueError(
                        f"continuation[{i}]: expected an answer of which all tokens but the last end both prompts; got "
                        f"{list(answer)}. PromptPairs.teacher_forced makes such pairs"
                    )

    def check_position_by_position(self, why: str) -> None:
        """Raises `ValueError` for pairs with aligned positions, which most techniques cannot take."""
        if self.align is not None:
            raise ValueError(
                f"pairs: expected two prompts of equal length in each pair, since {why}; these have positions that are aligned "
                "(align=), for activation_patching over 'layer position'"
            )

    @classmethod
    @checked
    def from_text(
        cls,
        model: Tokenizes,
        clean: Sequence[str] | str,
        corrupted: Sequence[str] | str,
        answers: Answers,
        *,
        positions: Positions | None = None,
        align: Positions | None = None,
        prepend_bos: bool | None = None,
        task: str = "custom",
    ) -> PromptPairs:
        """Pairs from text.

        Args:
            model: Tokenizes; a `HookedModel`.
            clean, corrupted: The prompts. Each pair must come out at the same number of tokens.
            answers: `(right, wrong)` for each pair. Either side is one token (`" Mary"`, or its id) or several of them.
            positions: Named token positions, one per pair. An index counts the beginning-of-sequence token, if there is one;
                negative counts from the end. A text, such as `" keys"`, is the last token of that text in the clean prompt, where
                it must stand once; `(" keys", 1)` is its second occurrence. One of these alone serves all pairs.
            align: Where the same names are in the corrupted prompts, if the two prompts of a pair may differ in length.
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
            align=align,
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
        positions: Positions | None = None,
        align: Positions | None = None,
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
        named = _indices(model, positions or {}, clean, "positions")
        aligned = None if align is None else _indices(model, align, corrupted, "align")
        text = _answer_text(model, [*right, *wrong])
        return cls(clean, corrupted, tuple(right), tuple(wrong), named, task, align=aligned, answer_text=text)

    @classmethod
    @checked
    def teacher_forced(
        cls,
        model: Tokenizes,
        clean: Sequence[str] | str | Prompts,
        corrupted: Sequence[str] | str | Prompts,
        continuations: Sequence[str | Sequence[int]],
        *,
        positions: Positions | None = None,
        prepend_bos: bool | None = None,
        task: str = "custom",
    ) -> PromptPairs:
        """Pairs whose answers are several tokens, for `mk.answer_log_prob`. Both prompts of a pair go on with its answer, so that
        each of the answer's tokens is predicted from the right ones before it.

        Args:
            model: Tokenizes; a `HookedModel`.
            clean, corrupted: The prompts up to the answer. Each pair must come out at the same number of tokens.
            continuations: The answer to each clean prompt, as text (tokenized by itself: begin it with a space where the prompt
                ends with a word) or as token ids.
            positions: As for `from_text`; places in the prompts without their answers.
            prepend_bos: Whether to begin with the beginning-of-sequence token; `None` is the model's default.
            task: A name for captions and provenance.

        Returns:
            Pairs that end with the answer but its last token. Positions are those given, `"ANSWER"` (the prompt's last token,
            where the answer's first token is predicted) and `"END"` (where its last one is). There are no wrong answers.

        Raises:
            ValueError: with the number of the pair: unequal lengths, an empty answer, a position that there is not.

        Example:
            >>> pairs = mk.PromptPairs.teacher_forced(model, "The Eiffel Tower is in", "The Colosseum is in", [" Paris, France"])
            >>> mk.activation_patching(model, pairs, mk.answer_log_prob(pairs), over="layer head")
        """
        before, other = (
            p if isinstance(p, Prompts) else Prompts.from_text(model, p, prepend_bos) for p in (clean, corrupted)
        )
        given = list(continuations)
        if len(given) != len(before):
            raise ValueError(f"continuations: expected {len(before)}, one for each clean prompt; got {len(given)}")
        continuation = []
        if "ANSWER" in (positions or {}):
            raise ValueError(
                "positions: 'ANSWER' is where the answer's first token is predicted; expected another name"
            )
        for i, answer in enumerate(given):
            with naming(f"continuations[{i}]"):
                ids = (
                    model.to_tokens(answer, prepend_bos=False)[0].tolist() if isinstance(answer, str) else list(answer)
                )
            if not ids:
                raise ValueError(f"continuations[{i}]: expected at least one token, got {answer!r}")
            continuation.append(_answer_ids(model, ids, f"continuations[{i}]"))
        named = _indices(model, positions or {}, before, "positions")
        last, none = tuple(ids[-1:] for ids in continuation), ((),) * len(given)
        at = dict(
            cls(before, other, last, none, named, task, last).positions
        )  # checked before the answers move the ends
        at["ANSWER"] = at.pop("END")

        def forced(prompts: Prompts) -> Prompts:
            rows = zip(prompts.tokens, continuation, strict=True)
            tokens = [torch.cat([row, row.new_tensor(ids[:-1])]) for row, ids in rows]
            if prompts.inputs is None:
                return Prompts.from_tokens(tokens, model)
            assert isinstance(model, TakesInputs)
            given = [{k: v for k, v in one.items() if "token_type" not in k} for one in prompts.inputs]
            longer = Prompts.from_inputs(model, tokens, given, prompts.segments)  # which says anew what each token is
            return replace(longer, thumbnails=prompts.thumbnails)

        text = _answer_text(model, continuation)
        return cls(forced(before), forced(other), last, none, at, task, tuple(continuation), answer_text=text)

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
            None if self.continuation is None else tuple(self.continuation[i] for i in index),
            None if self.align is None else {name: values[index] for name, values in self.align.items()},
            self.answer_text,
        )

    @property
    def answers(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """`(right ids, wrong ids)` of each pair."""
        return tuple(zip(self.right, self.wrong, strict=True))

    @property
    def first_difference(self) -> Int[Tensor, "prompt"]:
        """First position at which clean and corrupted differ; the prompt's length if they are the same.

        Raises:
            ValueError: pairs with aligned positions.
        """
        self.check_position_by_position("its prompts are compared position by position")
        return first_differences(self.clean, self.corrupted)


# What techniques that run one prompt at a time take; text is tokenized by the model.
AnyPrompts = PromptPairs | Prompts | str | Sequence[str]


def as_prompts(model: Tokenizes, prompts: AnyPrompts, argument: str = "prompts") -> PromptPairs | Prompts:
    """Prompts as they are, or made of text: one prompt, or several. Text is tokenized as by `Prompts.from_text`.

    Raises:
        ValueError: what `Prompts.from_text` refuses, with the name of the `argument`.
    """
    if isinstance(prompts, PromptPairs | Prompts):
        return prompts
    with naming(argument):
        return Prompts.from_text(model, prompts)


def _answer_text(model: Tokenizes | None, answers: Sequence[tuple[int, ...]]) -> dict[int, str]:
    """The tokens of answers as text, by id."""
    ids = sorted({token for answer in answers for token in answer})
    return {} if model is None or not ids else dict(zip(ids, model.to_str_tokens(torch.tensor(ids)), strict=True))


def _other_layout(clean: Prompts, corrupted: Prompts, i: int) -> str | None:
    """What pictures of the two prompts of a pair do not have in common, so that their patches cannot be exchanged."""
    if clean.inputs is None and corrupted.inputs is None:
        return None
    if clean.inputs is None or corrupted.inputs is None:
        return f"but only the {'corrupted' if clean.inputs is None else 'clean'} one has pictures"
    if clean.kind_of(i) == corrupted.kind_of(i):
        return None
    shapes, grids = (
        [
            {name: list(value.shape) for name, value in prompts.inputs[i].items()}
            for prompts in (clean, corrupted)
            if prompts.inputs is not None
        ],
        [
            [(s.start, s.grid) for s in prompts.segments[i] if s.kind == "image"]
            for prompts in (clean, corrupted)
            if prompts.segments is not None
        ],
    )
    if shapes[0] != shapes[1]:
        return f"got inputs {shapes[0]} and {shapes[1]}. Resize or crop the pictures to one size"
    return f"got patches (start, grid) {grids[0]} and {grids[-1]}"


def _checked_positions(given: Mapping[str, Any], prompts: Prompts, argument: str) -> dict[str, Tensor]:
    lengths = prompts.lengths
    named = {}
    ends = prompts.ends
    for name, values in {**given, "END": given.get("END", ends)}.items():
        what = f"{argument}[{name!r}]"
        index = _integers(values, what)
        if not is_whole_dtype(index.dtype):
            raise ValueError(f"{what}: expected integers, got {index.dtype} {index.tolist()}")
        if index.shape != lengths.shape:
            raise ValueError(f"{what}: expected {len(lengths)} values, got shape {list(index.shape)}")
        index = torch.where(index < 0, index + lengths, index)
        for i in ((index < 0) | (index >= lengths)).nonzero().flatten().tolist():
            raise ValueError(f"{what}[{i}]: expected an index into {lengths[i]} tokens, got {values[i]}")
        if name == "END" and (other := (index != ends).nonzero().flatten().tolist()):
            raise ValueError(
                f"{argument}['END'][{other[0]}]: expected the last token, {ends[other[0]]}, got {index[other[0]]}. Give "
                "another name to a position that is not the end"
            )
        named[name] = index
    return named


def _indices(model: Tokenizes | None, given: Positions, prompts: Prompts, argument: str) -> dict[str, Tensor]:
    """Positions as indices: text is looked for in each prompt."""
    named = {}
    for name, places in given.items():
        what = f"{argument}[{name!r}]"
        if isinstance(places, str) or _is_occurrence(places):
            places = [places] * len(prompts)
        if isinstance(places, Sequence) and any(isinstance(one, str | tuple) for one in places):
            if len(places) != len(prompts):
                raise ValueError(f"{what}: expected {len(prompts)} places, one for each prompt; got {len(places)}")
            places = [
                one if not isinstance(one, str | tuple) else _find(model, one, prompts.tokens[i], i, f"{what}[{i}]")
                for i, one in enumerate(places)
            ]
        named[name] = _integers(places, what)
    return named


def _is_occurrence(place: Any) -> TypeGuard[tuple[str, int]]:
    """Whether it is `(" keys", 1)`, rather than a place for each of two prompts."""
    return isinstance(place, tuple) and len(place) == 2 and isinstance(place[0], str) and is_whole(place[1])


def _find(model: Tokenizes | None, wanted: str | tuple[str, int], row: Tensor, i: int, what: str) -> int:
    """The token with which a text ends in prompt `i`, whose tokens are `row`."""
    text, which = (wanted, None) if isinstance(wanted, str) else wanted
    if model is None:
        raise ValueError(f"{what}: {text!r} is text, which needs a tokenizer; pass `model=`, or give an index")
    if not text:
        raise ValueError(f"{what}: expected a text of at least one token, got {text!r}")
    # Where each token ends in the prompt's text; many tokenizers decode a token alone without the space before it.
    decode = getattr(model, "to_string", None) or (lambda ids: "".join(model.to_str_tokens(ids)))
    with naming(what):
        before = [str(decode(row[:n])) for n in range(1, len(row) + 1)]
    whole = before[-1]
    # A character of several tokens is there only with the last of them: what is decoded until then is another text.
    ends = [len(one) if whole.startswith(one) else -1 for one in before]
    begins = {0, *ends[:-1]} - {-1}
    begins |= {at + 1 for at in begins if whole[at : at + 1].isspace()}  # "keys" is the token " keys"
    found = [at for at in range(len(whole)) if whole.startswith(text, at)]
    places = [ends.index(at + len(text)) for at in found if at in begins and at + len(text) in ends]
    if not places:
        why = "only inside tokens (begin and end it where tokens do)" if found else "nowhere"
        tokens = " ".join(map(repr, model.to_str_tokens(row)))
        raise ValueError(f"{what}: {text!r} stands {why} in prompt {i}, whose tokens are {tokens}")
    if which is None and len(places) > 1:
        raise ValueError(
            f"{what}: {text!r} stands {len(places)} times in prompt {i} (at {', '.join(map(str, places))}); expected which of "
            f"them, as in ({text!r}, {len(places) - 1}) for the last"
        )
    if which is not None and not -len(places) <= which < len(places):
        raise ValueError(
            f"{what}: {text!r} stands {len(places)} times in prompt {i}; got occurrence {which}, counted from 0"
        )
    return places[0 if which is None else which]


def first_differences(ones: Prompts, others: Prompts, ids: Sequence[int] | None = None) -> Int[Tensor, "prompt"]:
    """For each two prompts of equal length, the first position at which they differ; their length if they are the same. Prompts
    with different pictures differ at the first position of a picture, whatever their tokens say.

    Args:
        ids: Which of the prompts; all by default.
    """
    found = []
    for i in range(len(ones)) if ids is None else ids:
        one, other = ones.tokens[i], others.tokens[i]
        different = (one != other).nonzero()
        first = int(different[0]) if len(different) else len(one)
        found.append(min(first, _first_other_input(ones, others, i)))
    return torch.tensor(found)


def _same_inputs(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _first_other_input(ones: Prompts, others: Prompts, i: int) -> int:
    """The first position that another input than tokens can make differ between two prompts; their length if none does."""
    length = len(ones.tokens[i])
    mine, theirs = (None if prompts.inputs is None else prompts.inputs[i] for prompts in (ones, others))
    if mine is None and theirs is None:
        return length
    if mine is not None and theirs is not None and _same_inputs(mine, theirs):
        return length
    starts = [
        s.start for prompts in (ones, others) if prompts.segments for s in prompts.segments[i] if s.kind != "text"
    ]
    return min(starts, default=0)


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
