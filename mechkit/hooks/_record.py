"""Recording a run: what a replay, or a technique that looks at activations, keeps of an unedited forward pass.

These are each block's input and its other arguments, the stream after the last block, each layer's keys and values, and the
requested sites. Keys and values are kept only where that is all that a layer keeps from token to token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit.hooks._capture import capture
from mechkit.hooks._devices import out_of_memory
from mechkit.hooks._lock import one_at_a_time
from mechkit.hooks._readout import unembedding_only
from mechkit.hooks._sites import SITES, TOWER, by_prompt, get_site
from mechkit.prompts import Prompts, Stacked

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel


class CannotReplayError(ValueError):
    """This architecture's blocks cannot be called by themselves; the message says why."""


@dataclass(frozen=True, eq=False)
class Run:
    """One unedited run of prompts of equal length.

    Attributes:
        rows: The prompts, on the model's device.
        resid: The input of each block, and the last one's output, each `[prompt pos d_model]`. A run recorded for its sites
            alone has only the last.
        last_logits: The model's own logits at the last position, `[prompt d_vocab]`.
        sites: The activations that were asked for, `[prompt, *dims]`, by `(site, layer)`.
        calls: The other arguments of each block's call.
        cache: Keys and values.
        between: What the model itself adds to the stream between a block and the next one, by the block's number, where that is
            not zero: Qwen3-VL's DeepStack adds features of the picture. Looked for in prompts with other inputs than tokens.
        refused: Why none were kept, if they could not be.
    """

    rows: Stacked
    resid: list[Float[Tensor, "prompt pos d_model"]]
    last_logits: Float[Tensor, "prompt d_vocab"]
    sites: dict[tuple[str, int], Tensor]
    calls: list[dict[str, Any]]
    cache: Any
    refused: str | None = None
    between: dict[int, Float[Tensor, "prompt pos d_model"]] = field(default_factory=dict)

    @property
    def tokens(self) -> Int[Tensor, "prompt pos"]:
        return self.rows.tokens

    @property
    def length(self) -> int:
        return self.tokens.shape[1]


@one_at_a_time
def record(
    model: HookedModel,
    prompts: Stacked | Int[Tensor, "prompt pos"],
    sites: Sequence[tuple[str, int]] = (),
    blocks: bool = True,
    cached: bool = True,
) -> Run:
    """Runs the model once and keeps what `Run` says; `blocks=False` keeps the sites and the final residual alone, and
    `cached=False` all but keys and values.

    Where keys and values cannot be kept (layers of another kind, a cache of their own) the model is run without keeping any.
    """
    rows = (prompts if isinstance(prompts, Stacked) else Stacked(prompts)).to(model.device)
    if not blocks or not cached:
        return _record(model, rows, sites, blocks=blocks)
    refused = _keeps_other_state(model)
    if refused is None:
        from transformers import DynamicCache

        try:  # the cache is made without the config: else sliding layers keep only their window
            return _record(model, rows, sites, cache=DynamicCache())
        except Exception as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            refused = f"its layers do not run with a plain cache of keys and values ({_first_line(error)})"
    return replace(_record(model, rows, sites), refused=refused)


def taken_apart(run: Run, n: int) -> tuple[Run, Run]:
    """A run of prompts and of others behind them: the first `n` as a run of their own, and the rest's final streams and sites."""
    first, rest = slice(0, n), slice(n, None)
    calls = []
    for call in run.calls:
        calls.append({name: _of_first(name, value, n, len(run.rows)) for name, value in call.items()})
    for layer in getattr(run.cache, "layers", ()):  # copies: a view would keep what belongs to the others too
        if layer.keys is not None:
            layer.keys, layer.values = layer.keys[first].clone(), layer.values[first].clone()
    mine = replace(
        run,
        rows=run.rows[first],
        resid=[stream[first].clone() for stream in run.resid],
        last_logits=run.last_logits[first],
        sites={key: value[first] for key, value in run.sites.items()},
        calls=calls,
        between={layer: added[first] for layer, added in run.between.items()},
    )
    sites = {key: value[rest].clone() for key, value in run.sites.items()}
    others = Run(run.rows[rest], [run.resid[-1][rest].clone()], run.last_logits[rest], sites, [], None)
    return mine, others


# Arguments of a block that may be given for each prompt; masks, which are 4-D, may be too.
OF_ALL_PROMPTS = ("alibi", "position_ids", "position_embeddings")


def _of_first(name: str, value: Any, n: int, of: int) -> Any:
    """A block's argument for the first `n` of `of` prompts."""
    if isinstance(value, tuple) and value and all(isinstance(part, Tensor) for part in value):
        return tuple(_of_first(name, part, n, of) for part in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[0] % of or name == "position_bias":
        return value
    of_all = value.shape[0] == of or value.ndim == 4 or name in OF_ALL_PROMPTS
    return value[: value.shape[0] // of * n] if of_all else value


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
    rows: Stacked,
    sites: Sequence[tuple[str, int]],
    cache: Any = None,
    blocks: bool = True,
) -> Run:
    calls: list[dict[str, Any]] = []
    handles = []

    def keep_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, named = _named_arguments(module, args, kwargs)
        calls.append(named)

    written: list[Tensor] = []  # by each block, before anything is added to it
    with capture(model, sites, partly=True) as captured:
        try:
            if blocks:
                for block in model.stack.blocks[:-1] if rows.inputs else ():
                    handles.append(
                        block.register_forward_hook(lambda _, args, output: written.append(stream_of(output).clone()))
                    )
                for block in model.stack.blocks:
                    handles.append(block.register_forward_pre_hook(keep_call, with_kwargs=True))
            with watched_streams(model, blocks) as resid, unembedding_only(model, lambda stream: stream[:, -1:]):
                logits = model.run(rows, **({} if cache is None else {"past_key_values": cache}))
        finally:
            for handle in handles:
                handle.remove()
    kept = {(site, layer): by_prompt(SITES[site], one, len(rows)) for (site, layer), one in captured.items()}
    between = {}
    if len(written) == len(resid) - 2:  # each block ran once
        added = (after - before for before, after in zip(written, resid[1:], strict=False))
        between = {layer: more for layer, more in enumerate(added) if bool(more.any())}
    return Run(rows, resid, logits[:, -1], kept, calls, cache, between=between)


def tower_length(model: HookedModel, rows: Stacked) -> int:
    """How many positions the vision tower has for each of these prompts, all of their pictures' tiles together; what comes behind
    the tower's first block is not run."""
    read = (f"{TOWER}.resid_pre", 0)
    with torch.no_grad(), capture(model, [read], stop=read) as kept:
        model.run(rows[:1])
    return by_prompt(SITES[read[0]], kept[read], 1).shape[1]


def longest_at(model: HookedModel, site: str, prompts: Prompts) -> int:
    """The most positions that a site has in any of the prompts.

    Raises:
        ValueError: a site of the vision tower, and a prompt without a picture.
    """
    if get_site(site).stack != TOWER:
        return int(prompts.lengths.max())
    if prompts.inputs is None or (without := [i for i, one in enumerate(prompts.inputs) if not one]):
        which = "they have none" if prompts.inputs is None else f"prompt {without[0]} has none"
        raise ValueError(f"site: {site!r} is in the tower that reads pictures, so that each prompt needs one; {which}")
    return max(tower_length(model, batch.stacked) for batch in prompts.batches(lambda *_: 1))


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
