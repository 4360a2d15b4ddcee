"""Prompts: tokens of any length, and pictures among them. Plain values; no model is needed.

Prompts are kept ragged, one tensor per prompt. Nothing is ever padded: the engine runs prompts of equal length together,
so a result always equals running each prompt alone. Prompts with other inputs than tokens run together where these have the same
shapes and stand for the same positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from mechkit._check import checked, is_whole_dtype, shown
from mechkit._thumbnails import Thumbnails
from mechkit.prompts._segments import Segment, check_segments
from mechkit.prompts._stacked import Stacked

Inputs = Mapping[str, Tensor]


@runtime_checkable
class Tokenizes(Protocol):
    """What `from_text` needs of a model: `HookedModel` has it."""

    @property
    def d_vocab(self) -> int: ...

    def to_tokens(self, text: str, prepend_bos: bool | None = None) -> Tensor: ...
    def to_str_tokens(self, text: Any) -> list[str]: ...
    def to_single_token(self, text: str) -> int: ...


@runtime_checkable
class TakesInputs(Tokenizes, Protocol):
    """What `from_inputs` needs of a model: `HookedModel` has it."""

    def placeholders(self, inputs: Inputs) -> Tensor: ...
    def complete_inputs(self, tokens: Tensor, inputs: Inputs, what: str) -> Inputs: ...
    def segments_of(self, tokens: Tensor, inputs: Inputs, what: str) -> Sequence[Segment]: ...
    def check_segments(self, tokens: Tensor, segments: Sequence[Segment], what: str) -> None: ...
    def thumbnails_of(self, inputs: Inputs, segments: Sequence[Segment]) -> Thumbnails: ...
    def process(
        self, processor: Any, text: str, pictures: Sequence[Any], what: str
    ) -> tuple[Tensor, Inputs, Sequence[Segment], Thumbnails]: ...


@checked
@dataclass(frozen=True, eq=False)
class Prompts:
    """Token sequences, one per prompt, possibly of different lengths.

    Attributes:
        tokens: One `[pos]` tensor of token ids per prompt.
        str_tokens: The same as text, for labels; `None` when there was no tokenizer.
        inputs: What else the model reads of each prompt, by name, such as `{"pixel_values": [1, 3, 336, 336]}`: tensors whose
            first axis is the one along which the model takes one prompt after the other. `None` for prompts of tokens alone.
        segments: Which positions of each prompt are text, and which are the patches of a picture. `None` where all is text.
        thumbnails: Small copies of each prompt's pictures, for figures alone: no part of the hash.
    """

    tokens: tuple[Int[Tensor, "_pos"], ...]
    str_tokens: tuple[tuple[str, ...], ...] | None = None
    inputs: tuple[Mapping[str, Tensor], ...] | None = None
    segments: tuple[tuple[Segment, ...], ...] | None = None
    thumbnails: tuple[Thumbnails, ...] | None = None

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
        for name, rows in (
            ("inputs", self.inputs),
            ("segments", self.segments),
            ("thumbnails", self.thumbnails),
        ):
            if rows is not None and len(rows) != len(self.tokens):
                raise ValueError(f"{name}: expected {len(self.tokens)}, one for each prompt; got {len(rows)}")
        for i, inputs in enumerate(self.inputs or ()):
            for name, value in inputs.items():
                if value.ndim == 0 or not len(value):
                    raise ValueError(
                        f"inputs[{i}][{name!r}]: expected the tensor of one prompt as the model takes it, with an axis along "
                        f"which prompts follow one another; got shape {list(value.shape)}"
                    )
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    raise ValueError(f"inputs[{i}][{name!r}]: expected finite numbers, got NaN or inf")
        for i, segments in enumerate(self.segments or ()):
            check_segments(segments, len(self.tokens[i]), f"segments[{i}]")

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
    def from_inputs(
        cls,
        model: TakesInputs,
        tokens: Tensor | Sequence[Tensor | Sequence[int]] | None,
        inputs: Sequence[Mapping[str, Tensor]],
        segments: Sequence[Sequence[Segment]] | None = None,
    ) -> Prompts:
        """Prompts with pictures, without any processor: for models that one trains, and for tests.

        Args:
            model: Knows which tokens stand for pictures; a `HookedModel`.
            tokens: As for `from_tokens`; one placeholder token for each patch. `None` for models that read pictures alone.
            inputs: For each prompt the tensors that the model takes beside the tokens, as it takes them for one example, such as
                `{"pixel_values": [1, channel, row, column]}`.
            segments: Which positions are what; found from the model's placeholder token and the sizes of its patches by default.

        Raises:
            ValueError: the model takes no such inputs, their sizes are others than the model's, or the number of placeholders is
                not that of the patches.
        """
        given = [dict(one) for one in inputs]
        if tokens is None:
            tokens = [model.placeholders(one) for one in given]
        prompts = cls.from_tokens(tokens, model)
        if len(given) != len(prompts):
            raise ValueError(f"inputs: expected {len(prompts)}, one for each prompt; got {len(given)}")
        if segments is not None and len(segments) != len(prompts):
            raise ValueError(f"segments: expected {len(prompts)}, one list for each prompt; got {len(segments)}")
        whole, found, small = [], [], []
        for i, (row, one) in enumerate(zip(prompts.tokens, given, strict=True)):
            complete = model.complete_inputs(row, one, f"inputs[{i}]")
            whole.append({name: value.detach().cpu().clone() for name, value in complete.items()})
            own = model.segments_of(row, complete, f"inputs[{i}]") if segments is None else segments[i]
            model.check_segments(row, own, f"segments[{i}]")
            found.append(tuple(own))
            small.append(model.thumbnails_of(whole[-1], own))
        prompts = replace(prompts, inputs=tuple(whole), segments=tuple(found), thumbnails=tuple(small))
        return prompts if not bool((prompts.ends == 0).all()) else replace(prompts, str_tokens=_patch_labels(found))

    @classmethod
    @checked
    def from_processor(cls, model: TakesInputs, processor: Any, text: str | Sequence[str], images: Any) -> Prompts:
        """Prompts with pictures, by the model's processor.

        Args:
            model: A `HookedModel`.
            processor: transformers' processor of the model (`AutoProcessor.from_pretrained(name)`), or its image processor alone
                (`AutoImageProcessor.from_pretrained(name, backend="pil")`): then the text goes through the model's tokenizer, and
                the placeholder of each picture is repeated for its patches here. torchvision is never needed.
            text: One prompt, or several, with the placeholder of each picture (`"<image>"`, or what the chat template puts).
                `""` for a model that reads pictures alone.
            images: For each prompt one picture, or a list of several: PIL images, arrays `[row, column, 3]` of bytes, or paths.

        Raises:
            ValueError: what the processor refuses, no picture, one of very many pixels, placeholders that are not as many as the
                pictures.

        Example:
            >>> prompts = Prompts.from_processor(model, processor, "USER: <image> What is it? ASSISTANT:", ["cat.png"])
            >>> prompts.segments[0]
        """
        texts = [text] if isinstance(text, str) else list(text)
        given = list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]
        if len(given) != len(texts):
            raise ValueError(
                f"images: expected one, or a list of them, for each of {len(texts)} prompts; got {len(given)}"
            )
        rows, inputs, segments, thumbnails = [], [], [], []
        for i, (one, pictures) in enumerate(zip(texts, given, strict=True)):
            several = list(pictures) if isinstance(pictures, list | tuple) else [pictures]
            tokens, found, placed, small = model.process(processor, one, several, f"images[{i}]")
            rows.append(tokens)
            inputs.append(found)
            segments.append(placed)
            thumbnails.append(small)
        return replace(cls.from_inputs(model, rows, inputs, segments), thumbnails=tuple(thumbnails))

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
            None if self.inputs is None else tuple(self.inputs[i] for i in index),
            None if self.segments is None else tuple(self.segments[i] for i in index),
            None if self.thumbnails is None else tuple(self.thumbnails[i] for i in index),
        )

    @property
    def lengths(self) -> Int[Tensor, "prompt"]:
        """Tokens in each prompt."""
        return torch.tensor([len(row) for row in self.tokens])

    @property
    def ends(self) -> Int[Tensor, "prompt"]:
        """Where each prompt's answer is read: at the last token; of pictures alone at the first position, the class token."""
        lengths = self.lengths
        if self.segments is None:
            return lengths - 1
        alone = torch.tensor(  # it begins with the class token, and holds no text
            [len(s) > 1 and s[0].kind == "special" and all(one.kind != "text" for one in s) for s in self.segments]
        )
        return torch.where(alone, torch.zeros_like(lengths), lengths - 1)

    def by_length(self) -> dict[int, list[int]]:
        """Length -> the indices of the prompts that have it."""
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(self.tokens):
            groups.setdefault(len(row), []).append(i)
        return groups

    def kind_of(self, i: int) -> tuple[Any, ...]:
        """What a prompt must share with others to run together with them: its length; and, where it has other inputs than tokens,
        their shapes and the positions that are no text."""
        if self.inputs is None:
            return (len(self.tokens[i]),)
        shapes = tuple(sorted((name, tuple(value.shape)) for name, value in self.inputs[i].items()))
        segments = () if self.segments is None else self.segments[i]
        pictures = tuple((s.kind, s.start, s.stop, s.grid, s.tile, s.image) for s in segments if s.kind != "text")
        return len(self.tokens[i]), shapes, pictures

    def groups(self) -> list[list[int]]:
        """The indices of prompts that can run together, group by group, as they first occur."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i in range(len(self)):
            groups.setdefault(self.kind_of(i), []).append(i)
        return list(groups.values())

    def stack(self, ids: Sequence[int]) -> Stacked:
        """Some prompts as one tensor, with their other inputs; raises `ValueError` unless they are of one length, and of the same
        shapes."""
        rows = [self.tokens[i] for i in ids]
        if len({len(row) for row in rows}) != 1:
            raise ValueError(f"ids: expected prompts of one length, got {sorted({len(row) for row in rows})}")
        if self.inputs is None:
            return Stacked(torch.stack(rows))
        if len({self.kind_of(i) for i in ids}) != 1:
            raise ValueError("ids: expected prompts whose pictures have the same sizes and stand at the same positions")
        inputs = [self.inputs[i] for i in ids]
        segments = () if self.segments is None else self.segments[ids[0]]
        first = min((segment.start for segment in segments if segment.kind != "text"), default=0)
        return Stacked(
            torch.stack(rows), {name: torch.stack([one[name] for one in inputs]) for name in inputs[0]}, first
        )

    def batches(
        self,
        at_once: Callable[[int, Sequence[int]], int] | None = None,
        *,
        order: Callable[[int], Any] | None = None,
        longest_first: bool = False,
    ) -> Iterator[Batch]:
        """All prompts, in batches of one kind each (`kind_of`): the one way in which prompts are run together. Nothing is padded.

        Args:
            at_once: From a length and the prompts of it that are still to come, how many of them the next batch takes; all of
                them by default.
            order: A key to sort prompts of one length by; they come as they are by default.
            longest_first: Whether lengths come from the longest to the shortest, rather than as they first occur.
        """
        groups = self.groups()
        for ids in sorted(groups, key=lambda ids: -len(self.tokens[ids[0]])) if longest_first else groups:
            length, ids = len(self.tokens[ids[0]]), ids if order is None else sorted(ids, key=order)
            while ids:
                n = len(ids) if at_once is None else at_once(length, ids)
                yield Batch(self, ids[:n], length)
                ids = ids[n:]

    def hash(self) -> str:
        """A short hash of all token ids, and of all other inputs, for provenance."""
        return _hash(self.tokens, self.inputs)

    def hashes(self) -> tuple[str, ...]:
        """A short hash of each prompt's token ids and other inputs, by which it is known again."""
        inputs = self.inputs
        return tuple(_hash([row], None if inputs is None else [inputs[i]]) for i, row in enumerate(self.tokens))


@dataclass(frozen=True)
class Batch:
    """Prompts of one kind that run together.

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
    def stacked(self) -> Stacked:
        """On the CPU."""
        return self.prompts.stack(self.ids)

    def split(self, n: int) -> Iterator[Batch]:
        """The same prompts, `n` at a time."""
        return (Batch(self.prompts, self.ids[i : i + n], self.length) for i in range(0, len(self.ids), n))


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


def _hash(rows: Iterable[Tensor], inputs: Iterable[Inputs] | None = None) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(4, "little") + row.to("cpu", torch.int64).numpy().tobytes())
    for one in inputs or ():
        for name in sorted(one):
            value = one[name].detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()[:16]


def _patch_labels(segments: Sequence[Sequence[Segment]]) -> tuple[tuple[str, ...], ...]:
    """For pictures alone, what stands for tokens: `"CLS"`, and each patch by row and column."""

    def of(segment: Segment) -> list[str]:
        if segment.grid is None:
            return ["CLS", *(f"special {i}" for i in range(1, len(segment)))]
        return [f"r{i // segment.grid[1]}c{i % segment.grid[1]}" for i in range(len(segment))]

    return tuple(tuple(label for segment in row for label in of(segment)) for row in segments)


def _begins_with_padding(model: Tokenizes, row: Tensor) -> bool:
    padded_rows = getattr(model, "left_padded_rows", None)
    return padded_rows is not None and bool(padded_rows(row[None]))


def _integers(values: Any, where: str) -> Tensor:
    """On the CPU as 64-bit integers; what are no whole numbers stay as they are, for the caller to refuse."""
    try:
        tensor = torch.as_tensor(values).cpu()
    except (OverflowError, RuntimeError, TypeError, ValueError):  # 2**70
        raise ValueError(f"{where}: expected whole numbers of 64 bits, got {shown(values)}") from None
    return tensor.long() if is_whole_dtype(tensor.dtype) else tensor


def _labels(model: Tokenizes | None, rows: Sequence[Tensor]) -> tuple[tuple[str, ...], ...] | None:
    return None if model is None else tuple(tuple(model.to_str_tokens(row)) for row in rows)
