"""From the last block's output to the model's logits: the one reader of "logits from the last stream".

1. Nearly always a norm, a matrix and an entrywise map (a soft cap, a scale) connect the two. Then only the requested tokens
   are unembedded.
2. Some models have more there: a transform in front of the unembedding (BERT, ModernBERT), a head that is more than a matrix, a
   scale of the stream. Then the model's own code runs (`own_logits`): all of the model but its blocks, each of which returns
   its input, except the last, which returns the stream.
3. Which of the two applies is found by comparing them on random streams (`is_norm_and_head`), again after a module is replaced;
   so is whether the logits at a position are read from the stream there and from nothing else (`is_positionwise`). Where they
   are, runs unembed only the requested positions (`unembedding_only`).

Neither is trusted without a check: every technique compares what it reads with the logits of the model's own forward pass
(`unembeds_final_stream`, `check_readout`).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechkit._precision import tolerance, widen
from mechkit.hooks._copy import rebound
from mechkit.hooks._devices import out_of_memory
from mechkit.hooks._norms import FrozenNorm
from mechkit.hooks._projections import is_plain_linear, only_looks

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel
    from mechkit.hooks._record import Run

_AT_ONCE = 2**24  # logits that `own_logits` holds at once where only some tokens are wanted


def read_logits(
    model: HookedModel, resid: Float[Tensor, "... d_model"], tokens: Int[Tensor, "token"] | None = None
) -> Float[Tensor, "... token"]:
    """The logits that the model gives where its last block's output is `resid`; of `tokens` alone, or of all."""
    if is_norm_and_head(model):
        return simple_logits(model, resid, tokens)
    rows = resid.reshape(-1, resid.shape[-1])
    if tokens is None:
        logits = own_logits(model, rows)
    else:
        parts = rows.split(max(1, _AT_ONCE // model.d_vocab))
        logits = torch.cat([own[:, tokens.to(own.device)] for own in (own_logits(model, part) for part in parts)])
    return logits.reshape(*resid.shape[:-1], -1)


# -- norm, matrix, entrywise map -----------------------------------------------------------------------------------------


def simple_logits(
    model: HookedModel, resid: Float[Tensor, "... d_model"], tokens: Int[Tensor, "token"] | None = None
) -> Float[Tensor, "... token"]:
    """Final norm, unembedding of `tokens` alone, and the architecture's scaling or soft cap of logits."""
    norm = getattr(model.bridge, "ln_final", None)
    normed = resid if norm is None else norm(resid)
    head = model.bridge.unembed.original_component
    if not is_plain_linear(head) or head.weight.device.type == "meta":
        # More than a matrix, which expects [row pos d_model]; or offloaded, and accelerate fetches the weights when it is called.
        logits = head(normed.reshape(-1, 1, normed.shape[-1])).reshape(*normed.shape[:-1], -1)
        return model.scale_logits(logits if tokens is None else logits[..., tokens.to(logits.device)])
    weight, bias = head.weight, getattr(head, "bias", None)
    if tokens is not None:
        chosen = tokens.to(weight.device)
        weight, bias = weight[chosen], None if bias is None else bias[chosen]
    return model.scale_logits(nn.functional.linear(normed.to(weight.device), weight, bias))


class _Found(NamedTuple):
    """What random streams show of what stands between the last block and the logits.

    Attributes:
        simple: Whether it is a norm, a matrix and an entrywise map.
        positionwise: Whether each position's logits are read from the stream there alone; `None` if that cannot be tried.
    """

    simple: bool
    positionwise: bool | None


def is_norm_and_head(model: HookedModel) -> bool:
    """Whether `simple_logits` is what the model computes, found on random streams and kept until a module is exchanged."""
    return _found(model).simple


def is_positionwise(model: HookedModel) -> bool | None:
    """Whether the logits at each position are read from the stream there alone, and alike at all; `None` if that cannot be tried
    without running the blocks."""
    return _found(model).positionwise


@contextmanager
def unembedding_only(model: HookedModel, read: Callable[[Tensor], Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, the model unembeds only what `read` takes of what its unembedding reads, where that is the same.

    Args:
        model: Runs inside.
        read: `[row pos …] -> [row some …]`.

    Yields:
        What takes the same of the logits that the model returns.
    """
    if not is_positionwise(model):
        yield read
        return
    handle = model.bridge.unembed.register_forward_pre_hook(lambda module, args: (read(args[0]), *args[1:]))
    try:
        yield lambda logits: logits
    finally:
        handle.remove()


def _found(model: HookedModel) -> _Found:
    components = [getattr(model.bridge, name, None) for name in ("ln_final", "unembed")]
    inside = [getattr(component, "original_component", None) for component in components]
    in_place = [_by_name(model.bridge.original_model, getattr(component, "name", None)) for component in components]
    state = tuple(_state(module) for module in (*components, *inside, *in_place))
    if model._readout is None or model._readout[0] != state:
        model._readout = (state, _tried(model))
    found: _Found = model._readout[1]
    return found


def _by_name(model: Any, name: str | None) -> Any:
    """What now stands in the place of a component of that name."""
    for part in (name or "").split("."):
        model = getattr(model, part, None) if part else None
    return model


def _state(module: Any) -> tuple[Any, ...]:
    """What changes when a module is exchanged or hooked."""
    if not isinstance(module, nn.Module):
        return ()
    hooks = len(module._forward_hooks), sum(not only_looks(fn) for fn in module._forward_pre_hooks.values())
    return id(module), type(module), *hooks, id(module.__dict__.get("forward"))


def head_device(model: HookedModel) -> torch.device | None:
    """Where the unembedding's weights are; `None` where they are offloaded, or it has none."""
    weights = list(model.bridge.unembed.original_component.parameters())
    return weights[0].device if weights and weights[0].device.type != "meta" else None


@torch.no_grad()
def _tried(model: HookedModel) -> _Found:
    rows = _random_streams(model)
    try:
        own = own_logits(model, rows)
    except Exception as error:  # whatever a model's code may raise on streams without blocks
        _raise_if_full(error)
        return _Found(True, None)  # every technique compares with the model's own logits
    rounding = tolerance("replay", model.dtype)
    try:
        simple = _difference(simple_logits(model, rows), own) <= rounding
    except Exception as error:  # a matrix of another width, say
        _raise_if_full(error)
        simple = False
    length = min(3, model.n_ctx or 3)
    prompts = rows[: len(rows) // length * length].unflatten(0, (-1, length))
    try:
        together = _of_prompts(model, prompts).flatten(0, 1)
    except Exception as error:
        _raise_if_full(error)
        return _Found(simple, None)
    return _Found(simple, _difference(together, own[: len(together)]) <= rounding)


def _raise_if_full(error: Exception) -> None:
    if isinstance(error, RuntimeError) and out_of_memory(error):
        raise error


def _random_streams(model: HookedModel) -> Float[Tensor, "row d_model"]:
    """Streams small and large, so that caps and thresholds show."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, model.d_model, generator=generator) * torch.tensor([0.1, 1.0, 20.0]).repeat(4)[:, None]
    rows[1::3] += 1.0  # not centred
    norm = getattr(model.bridge, "ln_final", None)
    weights = [] if norm is None else [p for p in norm.parameters() if p.device.type != "meta"]
    device = weights[0].device if weights else model.device
    return rows.to(device, model.dtype)


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the logits' spread; infinite for another shape or NaN."""
    if found.shape != expected.shape:
        return torch.inf
    found, expected = widen(found), widen(expected.to(found.device))
    spread = (expected - expected.mean(-1, keepdim=True)).abs().max().clamp(min=1e-12)
    off = float((found - expected).abs().max() / spread)
    return torch.inf if off != off else off


# -- the model's own code ------------------------------------------------------------------------------------------------


def own_logits(model: HookedModel, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    """The model's logits where its last block's output is `resid`, by its own code. Gradients flow through.

    Each row is a prompt of one token.
    """
    return _of_prompts(model, resid[:, None])[:, 0]


def _of_prompts(model: HookedModel, resid: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_vocab"]:
    """The same of whole prompts, by a shallow copy of the model, which shares its weights and everything else but its blocks and
    hook points. Nothing of the model itself is changed."""
    blocks = list(model.stack.blocks)
    returns = model._block_returns
    instead: dict[int, nn.Module] = {id(block): _Through(block, returns, None) for block in blocks[:-1]}
    instead[id(blocks[-1])] = _Through(blocks[-1], returns, resid)
    twin = _twin(model.bridge.original_model, instead)
    output = twin(torch.zeros(resid.shape[:2], dtype=torch.long, device=model.device))
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


class _Through(nn.Module):
    """Stands in for a block: returns what it is given, or a stream of its own."""

    def __init__(self, block: nn.Module, returns: int | None, stream: Tensor | None) -> None:
        super().__init__()
        self.__dict__["_stands_for"] = block  # not as a submodule
        self._returns, self._stream = returns, stream

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # such as the kind of its attention
            return getattr(self.__dict__["_stands_for"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self._stream if self._stream is not None else next(iter((*args, *kwargs.values())))
        return given if self._returns is None else (given, *[None] * (self._returns - 1))


def _twin(module: nn.Module, instead: Mapping[int, nn.Module], made: dict[int, nn.Module] | None = None) -> nn.Module:
    """A shallow copy of a module and its submodules, without anybody's functions on hook points, and with some replaced."""
    made = {} if made is None else made
    if id(module) in instead:
        return instead[id(module)]
    if id(module) not in made:
        made[id(module)] = twin = copy.copy(module)
        for name in ("forward", "_old_forward"):
            if name in twin.__dict__:
                twin.__dict__[name] = rebound(twin.__dict__[name], {id(module): twin})
        if hasattr(type(module), "add_hook") and hasattr(module, "fwd_hooks"):  # a hook point
            twin._forward_hooks, twin._forward_pre_hooks, twin._backward_hooks = (OrderedDict() for _ in range(3))
            twin.__dict__.update(fwd_hooks=[], bwd_hooks=[])
        twin._modules = {
            name: None if child is None else _twin(child, instead, made) for name, child in module._modules.items()
        }
    return made[id(module)]


# -- where it is a norm, a matrix and an entrywise map -----------------------------------------------------------------------


def final_norm(model: HookedModel, like: Float[Tensor, "... d_model"]) -> FrozenNorm:
    """The norm in front of the unembedding with its scale held fixed; one that does nothing where there is none."""
    return FrozenNorm(getattr(model.bridge, "ln_final", None), like, "final norm")


def why_not_linear(model: HookedModel) -> str | None:
    """Why logits are not `scale_logits(final norm @ W_U + b_U)`, so that they cannot be split among what is written into the
    stream; `None` where they are."""
    rows = _random_streams(model)
    with torch.no_grad():
        try:
            norm = final_norm(model, rows)
            normed = norm.linear(rows, norm.scale(rows)) + norm.bias
            weight, bias = model.W_U, model.b_U
        except ValueError as error:
            return str(error).removeprefix("model: ")
        if weight.shape[0] != normed.shape[-1]:
            return f"its unembedding reads {weight.shape[0]} features, and the residual stream has {normed.shape[-1]}"
        raw = normed.to(weight.device) @ weight.to(normed.dtype) + bias.to(normed.dtype)
        off = _difference(model.scale_logits(raw), model.unembed(rows))
    if off <= tolerance("readout", model.dtype):
        return None
    return f"between its last block and its logits stands more than a norm and a matrix (off by {off:.1e} of the logits' spread)"


def is_linear_readout(model: HookedModel) -> bool:
    """Whether the logits are linear in the final stream, up to the scale of the final norm and an entrywise map of logits."""
    return why_not_linear(model) is None


def check_linear_readout(model: HookedModel, what: str) -> None:
    """Raises `ValueError` for a model whose head is not a norm, a matrix and an entrywise map of logits."""
    if (why := why_not_linear(model)) is not None:
        raise ValueError(
            f"model: {what} needs logits that are linear in the residual stream behind the final norm, and the head of "
            f"{model.name} ({model.cfg.architecture}) is not: {why}. The logit lens of the stream and patching apply such a head "
            "as it is"
        )


# -- against the model's own forward pass --------------------------------------------------------------------------------


@torch.no_grad()
def readout_error(model: HookedModel, run: Run, n: int = 4) -> float:
    """How far the reader is from the logits of the model's own forward pass, as a share of their spread: in the last position
    of a recorded run's first prompts, from its last block's output; and in all positions of the first prompt, unless the head is
    known to be the same at all. Infinite where it is known not to be."""
    known = is_positionwise(model)
    if known is False:
        return torch.inf
    off = _difference(model.unembed(run.resid[-1][:n, _read_at(model)]), run.last_logits[:n])
    if known is None and off < torch.inf and not model.reads_pictures_alone:
        off = max(off, _difference(model.unembed(run.resid[-1][:1]), model.run(run.rows[:1])))
    return off


def unembeds_final_stream(model: HookedModel, run: Run, allowed: float | None = None, n: int = 4) -> bool:
    """Whether `model.unembed` of the final residual stream of a run's first `n` prompts gives the model's own logits (default: as
    blocks that are run by themselves must agree with whole passes)."""
    allowed = tolerance("replay", model.dtype) if allowed is None else allowed
    if readout_error(model, run, n) <= allowed:
        return True
    model._readout = None  # a module may have been exchanged where this was not seen
    return readout_error(model, run, n) <= allowed


def check_readout(model: HookedModel, run: Run, what: str) -> None:
    """Raises `ValueError` unless the model's logits are a function of its last block's output that can be computed by itself."""
    unembeds_final_stream(model, run, tolerance("readout", model.dtype))
    check_logits_of_stream(model, run.resid[-1][:4, _read_at(model)], run.last_logits[:4], what)


def _read_at(model: HookedModel) -> int:
    """The position of the stream that a run's last logits are read from."""
    return 0 if model.reads_pictures_alone else -1


@torch.no_grad()
def check_logits_of_stream(
    model: HookedModel, final: Float[Tensor, "row d_model"], logits: Float[Tensor, "row d_vocab"], what: str
) -> None:
    """The same, given the last block's output and the model's own logits somewhere."""
    if not bool(torch.isfinite(final).all()):
        return  # others say where it began
    off = torch.inf if is_positionwise(model) is False else _difference(model.unembed(final), logits)
    if not off <= tolerance("readout", model.dtype):
        raise ValueError(
            f"model: {what} reads logits off the residual stream, but the head of {model.name} ({model.cfg.architecture}) is not "
            "a function of the last block's output at the same position alone: read from that, its logits are off by "
            f"{off:.1e} of their spread"
        )
