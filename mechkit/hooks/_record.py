"""Recording a run: what a replay, or a technique that looks at activations, keeps of an unedited forward pass.

Each block's input and its other arguments, the stream behind the last block, each layer's keys and values, and what sites were
asked for. Keys and values are kept only where that is all that a layer keeps from token to token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from mechkit.hooks._capture import capture
from mechkit.hooks._devices import out_of_memory
from mechkit.hooks._lock import one_at_a_time
from mechkit.hooks._readout import unembedding_only

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel


class CannotReplayError(ValueError):
    """This architecture's blocks cannot be called by themselves; the message says why."""


@dataclass(frozen=True, eq=False)
class Run:
    """One unedited run of prompts of equal length.

    Attributes:
        tokens: `[prompt pos]`.
        resid: The input of each block, and the last one's output, each `[prompt pos d_model]`. A run recorded for its sites
            alone has only the last.
        last_logits: The model's own logits at the last position, `[prompt d_vocab]`.
        sites: The activations that were asked for, by `(site, layer)`.
        calls: The other arguments of each block's call.
        cache: Keys and values.
        refused: Why none were kept, if they could not be.
    """

    tokens: Int[Tensor, "prompt pos"]
    resid: list[Float[Tensor, "prompt pos d_model"]]
    last_logits: Float[Tensor, "prompt d_vocab"]
    sites: dict[tuple[str, int], Tensor]
    calls: list[dict[str, Any]]
    cache: Any
    refused: str | None = None

    @property
    def length(self) -> int:
        return self.tokens.shape[1]


@one_at_a_time
def record(
    model: HookedModel,
    tokens: Int[Tensor, "prompt pos"],
    sites: Sequence[tuple[str, int]] = (),
    blocks: bool = True,
    cached: bool = True,
) -> Run:
    """Runs the model once and keeps what `Run` says; `blocks=False` keeps the sites and the final residual alone, and
    `cached=False` all but keys and values.

    Where keys and values cannot be kept (layers of another kind, a cache of their own) the model is run without keeping any.
    """
    if not blocks or not cached:
        return _record(model, tokens, sites, blocks=blocks)
    refused = _keeps_other_state(model)
    if refused is None:
        from transformers import DynamicCache

        try:  # the cache is made without the config: else sliding layers keep only their window
            return _record(model, tokens, sites, cache=DynamicCache())
        except Exception as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            refused = f"its layers do not run with a plain cache of keys and values ({_first_line(error)})"
    return replace(_record(model, tokens, sites), refused=refused)


def _keeps_other_state(model: HookedModel) -> str | None:
    """Why a model keeps more, or other things, from token to token than each layer's keys and values, as far as it says so."""
    config = getattr(model.bridge.original_model, "config", None)  # a model of TransformerLens's own has none
    kinds = getattr(config and config.get_text_config(), "layer_types", None) or ()
    if other := sorted({kind for kind in kinds if not str(kind).endswith("attention") or "linear" in str(kind)}):
        return f"some of its layers are no attention over keys and values ({', '.join(map(str, other))})"
    if getattr(model.bridge.original_model, "_is_stateful", False):
        return "some of its layers carry a recurrent state along the positions"
    return None


def _record(
    model: HookedModel,
    tokens: Int[Tensor, "prompt pos"],
    sites: Sequence[tuple[str, int]],
    cache: Any = None,
    blocks: bool = True,
) -> Run:
    calls: list[dict[str, Any]] = []
    handles = []

    def keep_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, named = _named_arguments(module, args, kwargs)
        calls.append(named)

    with capture(model, sites, partly=True) as kept:
        try:
            if blocks:
                for block in model.stack.blocks:
                    handles.append(block.register_forward_pre_hook(keep_call, with_kwargs=True))
            with watched_streams(model, blocks) as resid, unembedding_only(model, lambda stream: stream[:, -1:]):
                logits = model.run(tokens, **({} if cache is None else {"past_key_values": cache}))
        finally:
            for handle in handles:
                handle.remove()
    return Run(tokens, resid, logits[:, -1], kept, calls, cache)


@contextmanager
def watched_streams(model: HookedModel, blocks: bool = True) -> Iterator[list[Float[Tensor, "row pos d_model"]]]:
    """A list that, once a forward pass has run inside, holds what each block read (with `blocks`) and the final residual stream.

    The final stream is what the last block gives: a final norm may be called before the blocks too, or there may be none.
    """
    streams: list[Tensor] = []
    final: list[Tensor] = []

    def keep_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append(_named_arguments(module, args, kwargs)[0].clone())

    def keep_final(module: Any, args: tuple[Any, ...], output: Any) -> None:
        final[:] = [stream_of(output).clone()]

    handles = []
    try:
        if blocks:
            for block in model.stack.blocks:
                handles.append(block.register_forward_pre_hook(keep_input, with_kwargs=True))
        handles.append(model.stack.blocks[-1].register_forward_hook(keep_final))
        yield streams
        streams += final
    finally:
        for handle in handles:
            handle.remove()


def _named_arguments(
    block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Float[Tensor, "prompt pos d_model"], dict[str, Any]]:
    """A block's input, which comes first whatever it is called, and its other arguments by name, so that each can be cut to a
    suffix by what it is."""
    forward = inspect.unwrap(type(block.original_component).forward)
    names = [name for name in inspect.signature(forward).parameters if name != "self"]
    if len(args) > len(names):
        raise CannotReplayError(
            f"{type(block.original_component).__name__} is called with arguments that have no names"
        )
    named = dict(zip(names, args, strict=False)) | kwargs
    return named.pop(names[0] if names[0] in named else "hidden_states"), named


def stream_of(output: Any) -> Float[Tensor, "prompt pos d_model"]:
    """The residual stream in what a block returns, which may be more."""
    stream: Tensor = output[0] if isinstance(output, tuple | list) else output
    return stream


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
