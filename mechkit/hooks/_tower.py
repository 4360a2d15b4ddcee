"""The vision tower of a vision-language model: its blocks, and where in them its sites are.

TransformerLens has hook points in some towers and in others none, and what is written at a block's output is lost there:
transformers takes the features from what the block itself gives. So the modules of transformers are hooked, in every family in
the same way, before anybody else sees what they give:

- The tower is the longest list of like blocks, each with an attention, among the modules that have to do with vision.
- A site is what goes into or comes out of one of a block's modules, or a third of it (queries, keys and values in one matrix).
- The pattern is what the softmax inside the attention gives, where there is one softmax for each tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mechkit.hooks._seams import SoftmaxSeam, Step
from mechkit.hooks._sites import SITES, TOWER, Site

_KEY = "_mechkit_tower"
_ATTENTIONS, _OUTPUTS = ("self_attn", "attn", "attention"), ("out_proj", "proj", "o_proj")
_INTO_NEURONS, _OUT_OF_NEURONS = ("fc1", "linear_fc1", "gate_proj"), ("fc2", "linear_fc2", "down_proj")


@dataclass(frozen=True, eq=False)
class Place:
    """Where a site is.

    Attributes:
        module: A module of transformers.
        side: Whether it is what goes in or what comes out.
        third: Which third of the last axis, where queries, keys and values are side by side; `None` is all of it.
    """

    module: nn.Module
    side: Literal["in", "out"]
    third: int | None = None


@dataclass(frozen=True, eq=False)
class Tower:
    """A vision tower.

    Attributes:
        blocks: Its blocks, as transformers made them.
        n_heads: In each block.
        flat: Whether the patches of all pictures are one row, without an axis for the batch.
    """

    blocks: list[nn.Module]
    n_heads: int
    flat: bool

    def place(self, site: Site, layer: int) -> Place | None:
        """Where a site is computed; `None` where there is no such module."""
        block = self.blocks[layer]
        attention, mlp = _part(block, _ATTENTIONS), _part(block, ("mlp",))
        name = site.name.removeprefix(f"{TOWER}.")
        if name in ("q", "k", "v"):
            joint = _part(attention, ("qkv",))
            if joint is not None:
                return Place(joint, "out", "qkv".index(name))
            return _at(_part(attention, (f"{name}_proj",)), "out")
        found: dict[str, tuple[Any, Literal["in", "out"]]] = {
            "resid_pre": (block, "in"),
            "z": (_part(attention, _OUTPUTS), "in"),
            "attn_out": (attention, "out"),
            "mlp_pre": (_part(mlp, _INTO_NEURONS), "out"),
            "mlp_post": (_part(mlp, _OUT_OF_NEURONS), "in"),
            "mlp_out": (mlp, "out"),
            "resid_post": (block, "out"),
        }
        return _at(*found[name]) if name in found else None

    def attach(self, site: Site, layer: int, step: Step) -> Callable[[], None]:
        """Applies a step whenever the site is computed; the function that is returned takes it off again."""
        if "src" in site.dims:
            attention = _part(self.blocks[layer], _ATTENTIONS)
            return SoftmaxSeam.of(attention, self.n_heads).add(step, before=site.name.endswith("attn_scores"))
        place = self.place(site, layer)
        assert place is not None  # the site would not be there
        heads = self.n_heads if "head" in site.dims else None
        return _Seam.of(place.module, place.side).add(_Write(step, place.third, heads, self.flat))

    def has(self, site: Site, layer: int) -> bool:
        """Whether the modules are there that a site needs. What a forward pass computes decides in the end."""
        return not self.flat if "src" in site.dims else self.place(site, layer) is not None


def tower_of(bridge: Any) -> Tower | None:
    """The vision tower of a model that reads text and pictures; `None` of any other."""
    if _KEY not in bridge.__dict__:
        bridge.__dict__[_KEY] = _find(bridge.original_model)
    found: Tower | None = bridge.__dict__[_KEY]
    return found


def _find(hf_model: Any) -> Tower | None:
    vision = getattr(getattr(hf_model, "config", None), "vision_config", None)
    if vision is None:
        return None
    lists = [
        [_inside(block) for block in module]
        for name, module in hf_model.named_modules()
        if isinstance(module, nn.ModuleList) and ("vision" in name or "visual" in name) and len(module)
    ]
    towers = [blocks for blocks in lists if all(_part(block, _ATTENTIONS) is not None for block in blocks)]
    heads = getattr(vision, "num_attention_heads", None) or getattr(vision, "num_heads", None)
    if not towers or not isinstance(heads, int):
        return None
    blocks = max(towers, key=len)
    return Tower(blocks, heads, flat=_part(_part(blocks[0], _ATTENTIONS), ("qkv",)) is not None)


def _inside(module: Any) -> Any:
    """A module of transformers, without TransformerLens's around it."""
    return getattr(module, "original_component", module)


def _part(module: Any, names: tuple[str, ...]) -> Any:
    """The first of these modules that there is in another one."""
    found = (getattr(module, name, None) for name in names)
    return next((_inside(one) for one in found if isinstance(one, nn.Module)), None)


def _at(module: nn.Module | None, side: Literal["in", "out"]) -> Place | None:
    return None if module is None else Place(module, side)


@dataclass(frozen=True, eq=False)
class _Write:
    """A step on a part of what goes through a module, shown as `[batch pos …]`."""

    step: Step
    third: int | None
    heads: int | None
    flat: bool

    def apply(self, stream: Tensor) -> Tensor:
        """`stream`, in which the part is what the step makes of it. What is given is not changed: others refer to it."""
        part = stream if self.third is None else stream.chunk(3, -1)[self.third]
        shown = part[None].clone() if self.flat else part.clone()
        shown = shown if self.heads is None else shown.unflatten(-1, (self.heads, -1))
        after = self.step.apply(shown).reshape(part.shape)
        if self.third is None:
            return after
        thirds = list(stream.chunk(3, -1))
        thirds[self.third] = after
        return torch.cat(thirds, -1)


class _Seam:
    """The functions on what goes into a module, or comes out of it, in the order in which they came. There while there are any;
    found on the module."""

    def __init__(self, module: nn.Module, side: Literal["in", "out"]) -> None:
        self._module, self._key = module, f"_mechkit_seam_{side}"
        self._writes: list[_Write] = []
        if side == "in":
            self._handle = module.register_forward_pre_hook(self._before, with_kwargs=True)
        else:  # first of all: transformers itself collects what blocks give
            self._handle = module.register_forward_hook(self._after, prepend=True)

    @classmethod
    def of(cls, module: nn.Module, side: Literal["in", "out"]) -> _Seam:
        key = f"_mechkit_seam_{side}"
        if key not in module.__dict__:
            module.__dict__[key] = cls(module, side)
        seam: _Seam = module.__dict__[key]
        return seam

    def add(self, write: _Write) -> Callable[[], None]:
        self._writes.append(write)

        def remove() -> None:
            self._writes.remove(write)
            if not self._writes:
                self._handle.remove()
                self._module.__dict__.pop(self._key, None)

        return remove

    def _all(self, stream: Tensor) -> Tensor:
        for write in self._writes:
            stream = write.apply(stream)
        return stream

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._all(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._all(kwargs["hidden_states"])}

    def _after(self, module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)([self._all(output[0]), *output[1:]])
        return self._all(output)


def sites_of(tower: Tower) -> list[tuple[Site, int]]:
    """The sites that a tower may have, with each layer."""
    return [
        (site, layer)
        for site in SITES.values()
        if site.stack == TOWER
        for layer in range(len(tower.blocks))
        if tower.has(site, layer)
    ]
