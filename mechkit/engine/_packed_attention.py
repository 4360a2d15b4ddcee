"""The attention of packed batches: for each chunk of prompts the architecture's own, over the keys and values of whole prompts.

A block calls it through `transformers.AttentionInterface`. Queries of rows that begin at different positions are padded to one
another, and what the padding gives is dropped. Rows of different lengths never share a softmax.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mechkit.engine._packing import PackedRows
from mechkit.engine._plain import PACKED, PACKED_SDPA
from mechkit.engine._replay import KeysAndValues
from mechkit.hooks._devices import to_device
from mechkit.hooks._record import CannotReplayError, Run

if TYPE_CHECKING:
    from mechkit.engine._chunk import Chunk

SHORT = 16  # rows of no more positions than this are padded to one another without further ado
VECTOR = 16  # numbers in a vector of the processor, as torch's softmax uses them


@dataclass(eq=False)
class Piece:
    """Rows of one chunk that attend together: where their queries, keys and values are among the batch's tokens.

    Attributes:
        chunk: Which chunk.
        prompt: The prompt of each row, in the chunk.
        start: Where all rows begin, or `None` if they begin at different positions.
        tokens: The tokens of each row, those of shorter rows repeated, `[row pos]`; `None` where they are `span` as it stands.
        span: The first token and the one behind the last, where the rows follow one another and are equally long.
        real: Which of `tokens` are no repetition, in their order; `None` where all are.
        position: The position of each of `tokens` in its prompt, `[row pos]`.
        rows: The rows among those of the batch: where their queries are, if only the last position of each asks.
    """

    chunk: int
    prompt: Int[np.ndarray, "row"]
    start: int | None
    tokens: Int[np.ndarray, "row pos"]
    span: tuple[int, int] | None
    real: Int[np.ndarray, "token"] | None
    position: Int[np.ndarray, "row pos"]
    rows: Int[np.ndarray, "row"]
    _moved: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)

    def index(self, name: str, device: torch.device) -> Tensor:
        """One of the index arrays on a device."""
        if (name, device) not in self._moved:
            array = {
                "prompt": lambda: self.prompt,
                "rows": lambda: self.rows,
                "tokens": lambda: self.tokens.reshape(-1),
                "real": lambda: self.real,
                "destination": lambda: self.tokens.reshape(-1)[self.real],
                "position": lambda: self.position,
                "row of real": lambda: self.real // self.tokens.shape[1],
                "position of real": lambda: self.position.reshape(-1)[self.real],
            }[name]()
            self._moved[name, device] = to_device(np.asarray(array, np.int64), device)
        return self._moved[name, device]

    def of(self, per_token: Float[Tensor, "head token d"]) -> Float[Tensor, "row head pos d"]:
        """The rows' own part."""
        n, width = self.tokens.shape
        if self.span is not None:
            mine = per_token[:, self.span[0] : self.span[1]]
        else:
            mine = per_token.index_select(1, self.index("tokens", per_token.device))
        return mine.unflatten(1, (n, width)).transpose(0, 1)

    def joined(
        self, past: Float[Tensor, "prompt head pos d"], new: Float[Tensor, "head token d"]
    ) -> Float[Tensor, "row head key d"]:
        """Keys or values of whole prompts: the recorded ones before each row's start, its own from there on."""
        n, length, width = len(self.prompt), past.shape[2], keys_of(past.shape[2], new.dtype)
        if self.start == 0 and width == length:
            return self.of(new)
        prompt = self.index("prompt", past.device)
        joined = new.new_empty(n, past.shape[1], width, past.shape[3])
        joined[:, :, length:] = 0
        if self.start is not None:
            joined[:, :, : self.start] = past[prompt, :, : self.start]
            joined[:, :, self.start : length] = self.of(new)
            return joined
        joined[:, :, :length] = past.index_select(0, prompt)
        tokens = new[:, self.index("destination", new.device)].transpose(0, 1)
        joined[self.index("row of real", past.device), :, self.index("position of real", past.device)] = tokens
        return joined


def keys_of(length: int, dtype: torch.dtype) -> int:
    """How many keys a row is given that has `length`: torch's softmax takes ten times as long over fewer than its vectors hold.
    In double precision none are added: where an architecture's softmax is in single precision, they would round differently."""
    return length if dtype == torch.float64 else max(length, VECTOR)


class Geometry:
    """How the tokens of some rows are taken apart for attention, and what belongs to each token of a block's arguments."""

    def __init__(self, rows: PackedRows) -> None:
        self.rows = rows
        self.pieces = list(self._cut(rows))
        self.gathered: dict[tuple[int, ...], Tensor] = {}
        self.masks: dict[tuple[int, int, bool], Tensor] = {}

    @staticmethod
    def _cut(rows: PackedRows) -> Iterator[Piece]:
        # Rows of about the same number of positions together: none is padded to more than twice what it is.
        size = np.ceil(np.log2(np.maximum(rows.suffix, SHORT))).astype(np.int64)
        key = rows.chunk * 64 + size
        for one in np.unique(key):
            at = np.flatnonzero(key == one)
            suffix, first, start = rows.suffix[at], rows.first[at], rows.start[at]
            width = int(suffix.max())
            place = np.minimum(np.arange(width)[None], suffix[:, None] - 1)
            even = bool((suffix == width).all())
            in_line = even and bool((np.diff(first) == width).all())
            real = None if even else np.flatnonzero((np.arange(width)[None] < suffix[:, None]).reshape(-1))
            yield Piece(
                chunk=int(rows.chunk[at[0]]),
                prompt=rows.prompt[at],
                start=int(start[0]) if even else None,
                tokens=first[:, None] + place,
                span=(int(first[0]), int(first[0]) + len(at) * width) if in_line else None,
                real=real,
                position=start[:, None] + place,
                rows=at,
            )


class Attention:
    """One block's attention over packed tokens: what our attention function finds when the block comes to it."""

    def __init__(self, runs: Sequence[Run], layer: int, geometry: Geometry) -> None:
        self.runs, self.layer, self.geometry = runs, layer, geometry
        self.calls = 0
        self.leave = False  # whether keys and values are all that is wanted
        self.given: tuple[Tensor, Tensor] | None = None  # of all tokens, where only the last position of each row asks

    def __call__(
        self, function: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor:
        self.calls += 1
        if self.leave:
            raise KeysAndValues(key, value)
        last = self.given is not None
        keys, values = (key, value) if self.given is None else self.given
        pieces, output = self.geometry.pieces, None
        for piece in pieces:
            kept = self.runs[piece.chunk].cache.layers[self.layer]
            asks = (
                query[0].index_select(1, piece.index("rows", query.device))[:, :, None].transpose(0, 1)
                if last
                else None
            )
            found = function(
                module,
                piece.of(query[0]) if asks is None else asks,
                piece.joined(kept.keys, keys[0]),
                piece.joined(kept.values, values[0]),
                self._mask(piece, last),
                **options,
            )[0]
            flat = found.reshape(-1, *found.shape[2:])
            if len(pieces) == 1 and (last or piece.span is not None):
                return flat[None]
            if output is None:
                output = flat.new_empty(query.shape[2], *flat.shape[1:])
            if last:
                output[piece.index("rows", flat.device)] = flat
            elif piece.span is not None:
                output[piece.span[0] : piece.span[1]] = flat
            elif piece.real is None:
                output[piece.index("tokens", flat.device)] = flat
            else:
                output[piece.index("destination", flat.device)] = flat[piece.index("real", flat.device)]
        assert output is not None
        return output[None]

    def _mask(self, piece: Piece, last: bool) -> Tensor | None:
        run = self.runs[piece.chunk]
        mask = run.calls[self.layer].get("attention_mask")
        if mask is None and run.length == 1:
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2] != run.length:
            raise CannotReplayError("its blocks take no mask that says what each position sees")
        key, n = (id(piece), id(mask), last), len(piece.prompt)
        masks = self.geometry.masks
        if key not in masks:
            if last:
                masks[key] = mask[:1, :, -1:].expand(n, -1, -1, -1)
            elif piece.start is not None:
                masks[key] = mask[:1, :, piece.start :].expand(n, -1, -1, -1)
            else:
                masks[key] = mask[0][:, piece.index("position", mask.device)].transpose(0, 1)
            if (more := keys_of(run.length, run.resid[self.layer].dtype) - run.length) > 0:
                hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
                masks[key] = torch.nn.functional.pad(masks[key], (0, more), value=hidden)
        return masks[key]


_NOW: ContextVar[Attention | None] = ContextVar("packed attention", default=None)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    fused: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    """What plain blocks of packed batches call for their attention (`transformers.AttentionInterface`)."""
    now = _NOW.get()
    if now is None:
        raise CannotReplayError("attention over packed tokens was asked for outside a packed batch")
    return now(_sdpa() if fused else _eager_of(module), module, query, key, value, options), None


def _eager_of(module: Any) -> Any:
    """The eager attention function of the architecture that an attention module is of."""
    for kind in type(module).__mro__:
        if (found := getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)) is not None:
            return found
    raise CannotReplayError("its attention is no function that could be called for some rows alone")


def _sdpa() -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


@contextmanager
def attending(attention: Attention) -> Iterator[None]:
    token = _NOW.set(attention)
    try:
        yield
    finally:
        _NOW.reset(token)


class TokensNumbered(TorchDispatchMode):
    """Watches, while it is entered, for blocks that number the tokens of a call: packed, a token's number is not its position.

    Where that matters is not seen in a few rows: Llama 4 scales queries by the number only from some thousandth token on.
    """

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self._n_tokens = n_tokens

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.arange and out.numel() == self._n_tokens:
            raise CannotReplayError("its blocks number the tokens of a call")
        return out


def may_pack(chunk: Chunk) -> bool:
    """Whether packed batches are worth a trial: what rules them out before anything is run."""
    state = chunk.state
    if not state.packs or state.whole_set or state.plan.in_tower or chunk.run.between:
        return False
    register()
    return True


def register() -> None:
    """Makes the attention of packed batches known to transformers, by the names under which plain blocks ask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionInterface.register(PACKED_SDPA, partial(packed_attention, fused=True))
