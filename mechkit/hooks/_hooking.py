"""Attaching functions to sites, so that every listed site works on every architecture and nothing stays attached.

TransformerLens's hook points are used as they are, except for three kinds of site:

- `resid_mid`: Hugging Face blocks keep a second reference to this tensor for the residual connection, and a tensor
  *returned* by a hook replaces only what the MLP reads. Here the new value is written into the tensor itself, so that an
  edit changes the residual stream as well. For the same reason its gradient is the tensor's own, the sum of what comes
  back from the MLP and along the residual connection, and a new gradient replaces both.
- `result` (each head's own contribution to `attn_out`) is behind a flag in TransformerLens. Here it is computed from `z`
  and the output projection's matrix when requested, times the constant that the block multiplies its attention's output with
  (Granite), and an edit is added to the attention's output as a difference. An adapter on the projection is part of its matrix.
  Where the flag is on, the attention is computed from the results themselves, and TransformerLens's own hook point serves.
- `pattern` and `attn_scores` where TransformerLens leaves the attention to Hugging Face (GPT-J, GPT-Neo, OPT): there its
  hooks fire after the fact and edits are dropped. Here the softmax inside that attention is intercepted.

Functions on one site run in the order in which they were attached, each on what the one before returned.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from mechkit.hooks._lock import HOOKED, lock_of
from mechkit.hooks._seams import Direction, HookFunction, ResultSeam, SoftmaxSeam, Step, StreamSeam
from mechkit.hooks._sites import TOWER, parse_hook_name
from mechkit.hooks._tower import tower_of

# Where a bridge keeps why a layer's heads do not sum to what the layer's attention adds to the stream (`loading/heads.py`)
NOT_HEADS = "_mechkit_not_heads"


def hook_points(bridge: Any) -> dict[str, Any]:
    """All hook points by full name. TransformerLens builds this dictionary at each access, which takes longer than a block."""
    if "_mechkit_hook_points" not in bridge.__dict__:
        bridge.__dict__["_mechkit_hook_points"] = bridge.hook_dict
    points: dict[str, Any] = bridge.__dict__["_mechkit_hook_points"]
    return points


class Hooks:
    """A set of attached hooks; a context manager that removes them on the way out, exception or not.

    It holds the model's lock meanwhile: in another thread's forward passes these hooks would fire too.
    """

    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge
        self._removers: list[Callable[[], None]] = []
        self._held = lock_of(bridge).held(HOOKED)

    def __enter__(self) -> Hooks:
        self._held.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.remove()
        finally:
            self._held.__exit__(None, None, None)

    def remove(self) -> None:
        """Takes off everything that was attached through this object."""
        while self._removers:
            self._removers.pop()()

    def attach(self, name: str, fn: HookFunction, direction: Direction = "fwd") -> None:
        """Calls `fn(activation, hook=…)` whenever the activation at `name` (a full hook name) is computed.

        A forward function may return a new activation of the same shape. A backward one gets the gradient.
        """
        site, layer = parse_hook_name(name)
        if site is not None and site.stack == TOWER:
            tower, at = tower_of(self._bridge), int(layer or 0)
            if tower is None or at >= len(tower.blocks) or not tower.has(site, at):
                raise ValueError(f"hook name {name!r}: {self._bridge.cfg.architecture} has no such activation")
            step = Step(_checked(name, fn), _NamedPoint(name, at), direction)
            self._removers.append(tower.attach(site, at, step))
            return
        point = hook_points(self._bridge).get(name)
        if point is None:
            raise ValueError(f"hook name {name!r}: {self._bridge.cfg.architecture} has no such activation")
        checked = _checked(name, fn)
        if site is not None and site.name == "z" and (width := _width_of_values(self._bridge.blocks[layer].attn)):
            checked = _by_head(checked, width)
        step = Step(checked, point, direction)
        if site is not None and site.name == "result" and not _exposes_results(self._bridge.blocks[layer].attn):
            if (why := self._bridge.__dict__.get(NOT_HEADS, {}).get(layer)) is not None:
                raise ValueError(
                    f"site: 'result' is what a head adds to the residual stream, but {why}; patch 'z' instead"
                )
            heads = ResultSeam.of(self._bridge.blocks[layer], layer, int(self._bridge.cfg.n_heads))
            self._removers.append(heads.add(step))
        elif site is not None and site.name in ("pattern", "attn_scores") and self._is_delegated(layer):
            module = self._bridge.blocks[layer].attn.original_component
            seam = SoftmaxSeam.of(module, int(self._bridge.cfg.n_heads))
            self._removers.append(seam.add(step, before=site.name == "attn_scores"))
        elif site is not None and site.name == "resid_mid":
            self._removers.append(StreamSeam.of(point).add(Step(step.fn, _named(point, name), direction)))
        else:
            self._attach_to_point(name, step.fn, direction)
            if site is not None and site.name == "resid_post":
                self._attach_to_listed_output(self._bridge.blocks[layer], step)

    def _attach_to_listed_output(self, block: nn.Module, step: Step) -> None:
        """The same where a block returns a list (the first GPT), of which TransformerLens shows nothing at its hook point."""

        def show(module: Any, args: Any, output: Any) -> Any:
            return [step.apply(output[0]), *output[1:]] if isinstance(output, list) else None

        self._removers.append(block.register_forward_hook(show).remove)

    def _attach_to_point(self, name: str, fn: HookFunction, direction: Direction) -> None:
        point = hook_points(self._bridge)[name]
        handle = point.add_hook(fn, dir=direction, alias_names=[name])
        handles = point.fwd_hooks if direction == "fwd" else point.bwd_hooks

        def remove() -> None:
            handle.hook.remove()
            handles.remove(handle)

        self._removers.append(remove)

    def _is_delegated(self, layer: int | None) -> bool:
        from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

        return type(self._bridge.blocks[layer].attn).forward is AttentionBridge.forward


def _exposes_results(attention: Any) -> bool:
    """Whether TransformerLens itself computes this attention head by head (`bridge.set_use_attn_result(True)`)."""
    return bool(getattr(attention, "supports_attn_result", False)) and bool(
        getattr(attention.config, "use_attn_result", False)
    )


class _NamedPoint:
    """What a function on a site of a tower gets as its `hook`: what functions ask of TransformerLens's hook points."""

    def __init__(self, name: str, layer: int) -> None:
        self.name, self._layer = name, layer
        self.ctx: dict[str, Any] = {}

    def layer(self) -> int:
        return self._layer


def _width_of_values(attention: Any) -> int | None:
    """How wide a head's values are in multi-head latent attention, where TransformerLens cuts `z` into heads of another width."""
    return getattr(getattr(attention, "original_component", None), "v_head_dim", None)


def _by_head(fn: HookFunction, width: int) -> HookFunction:
    """`fn` on `z` cut into heads of `width` entries, whatever it is cut into where it comes from."""

    def call(activation: Tensor, hook: Any) -> Tensor | None:
        returned = fn(activation.reshape(*activation.shape[:2], -1, width), hook=hook)
        return None if returned is None else returned.reshape(activation.shape)

    return call


def _checked(name: str, fn: HookFunction) -> HookFunction:
    """`fn`, but what it returns must fit; the error says which hook it was."""

    def call(activation: Tensor, hook: Any) -> Tensor | None:
        returned = fn(activation, hook=hook)
        if returned is None:
            return None
        if not isinstance(returned, Tensor):
            raise ValueError(f"hook on {name}: expected a tensor or None to be returned, got {type(returned).__name__}")
        if returned.shape != activation.shape or returned.dtype != activation.dtype:
            raise ValueError(
                f"hook on {name}: expected the returned activation to be {activation.dtype} {list(activation.shape)}, "
                f"got {returned.dtype} {list(returned.shape)}"
            )
        return returned

    return call


def _named(point: Any, name: str) -> Any:
    """A hook point under one of its other names, as TransformerLens shows it to a hook."""
    from transformer_lens.hook_points import _AliasedHookPoint

    return _AliasedHookPoint(name, point)
