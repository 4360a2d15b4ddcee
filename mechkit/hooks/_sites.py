"""Sites: the named places in a transformer whose activations can be read and edited.

A site has a short name (`"z"`), as in TransformerLens, and one full hook name per layer (`"blocks.9.attn.hook_z"`).
Both are understood everywhere. This module knows the names and the axes; it touches no model.

Sites of a vision-language model's tower have `vision.` before their names (`"vision.z"`, `"vision.blocks.9.attn.hook_z"`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Site:
    """A kind of activation.

    Attributes:
        name: Short name, e.g. `"z"`.
        hook: Full hook name with `{layer}` in it; sites outside the blocks have no `{layer}`.
        dims: The activation's axes after the batch. `"pos"` is the position that the activation belongs to (for
            `pattern` and `attn_scores` the destination), `"head"` a query or key-value head.
        stack: The tower of blocks that it is in: `"text"` (the model's own) or `"vision"`.
    """

    name: str
    hook: str
    dims: tuple[str, ...]
    stack: str = "text"

    @property
    def in_block(self) -> bool:
        """Whether there is one such activation per layer."""
        return "{layer}" in self.hook

    def axis(self, dim: str) -> int:
        """The axis of `dim` in an activation `[batch, *dims]`; raises `ValueError` if the site has no such axis."""
        if dim not in self.dims:
            raise ValueError(f"site {self.name!r} has axes ('batch', {', '.join(map(repr, self.dims))}); got {dim!r}")
        return 1 + self.dims.index(dim)

    def hook_name(self, layer: int | None) -> str:
        """The full hook name at `layer` (`None` for a site outside the blocks)."""
        return self.hook.format(layer=layer) if self.in_block else self.hook


_RESIDUAL = ("pos", "d_model")
_HEADS = ("pos", "head", "d_head")
_ATTENTION = ("head", "pos", "src")
_NEURONS = ("pos", "neuron")

SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site("embed", "hook_embed", _RESIDUAL),
        Site("resid_pre", "blocks.{layer}.hook_resid_pre", _RESIDUAL),
        Site("q", "blocks.{layer}.attn.hook_q", _HEADS),
        Site("k", "blocks.{layer}.attn.hook_k", _HEADS),
        Site("v", "blocks.{layer}.attn.hook_v", _HEADS),
        Site("attn_scores", "blocks.{layer}.attn.hook_attn_scores", _ATTENTION),
        Site("pattern", "blocks.{layer}.attn.hook_pattern", _ATTENTION),
        Site("z", "blocks.{layer}.attn.hook_z", _HEADS),
        Site("result", "blocks.{layer}.attn.hook_result", ("pos", "head", "d_model")),
        Site("attn_out", "blocks.{layer}.hook_attn_out", _RESIDUAL),
        Site("resid_mid", "blocks.{layer}.hook_resid_mid", _RESIDUAL),
        Site("mlp_pre", "blocks.{layer}.mlp.hook_pre", _NEURONS),
        Site("mlp_post", "blocks.{layer}.mlp.hook_post", _NEURONS),
        Site("mlp_out", "blocks.{layer}.hook_mlp_out", _RESIDUAL),
        Site("resid_post", "blocks.{layer}.hook_resid_post", _RESIDUAL),
    )
}

TOWER = "vision"  # the stack that reads pictures, and what the names of its sites begin with
_IN_TOWERS = (
    "resid_pre",
    "q",
    "k",
    "v",
    "attn_scores",
    "pattern",
    "z",
    "attn_out",
    "mlp_pre",
    "mlp_post",
    "mlp_out",
    "resid_post",
)
SITES |= {
    f"{TOWER}.{name}": replace(SITES[name], name=f"{TOWER}.{name}", hook=f"{TOWER}.{SITES[name].hook}", stack=TOWER)
    for name in _IN_TOWERS
}

_BY_HOOK = {site.hook: site for site in SITES.values()}
_BLOCK = re.compile(rf"^((?:{TOWER}\.)?)blocks\.(\d+)\.")


def parse_hook_name(name: str) -> tuple[Site | None, int | None]:
    """The site and the layer that a full hook name stands for; `(None, layer)` for a hook that is not a listed site."""
    found = _BLOCK.match(name)
    layer = int(found.group(2)) if found else None
    template = _BLOCK.sub(r"\1blocks.{layer}.", name)
    return _BY_HOOK.get(template), layer


def get_site(name: str) -> Site:
    """The site called `name` (short name or full hook name); raises `ValueError` naming the known ones."""
    site = SITES.get(name) or parse_hook_name(name)[0]
    if site is None:
        raise ValueError(f"site: expected one of {', '.join(SITES)}, or a full hook name of one; got {name!r}")
    return site


def by_prompt(site: Site, activation: Tensor, n_prompts: int) -> Tensor:
    """An activation as `[prompt, *dims]`. In a tower a picture's tiles are rows of the batch, or the patches of all pictures
    are one row: here the positions of a prompt's tiles follow one another."""
    if site.stack != TOWER:
        return activation
    axis = site.axis("pos")
    positions_first = activation.movedim(axis, 1)
    rows = positions_first.reshape(n_prompts, -1, *positions_first.shape[2:])
    return rows.movedim(1, axis)


def as_computed(site: Site, of_prompts: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`by_prompt` undone: the activation in the `shape` in which the model computes it."""
    if site.stack != TOWER:
        return of_prompts
    axis = site.axis("pos")
    rest = [size for i, size in enumerate(shape) if i not in (0, axis)]
    return of_prompts.movedim(axis, 1).reshape(shape[0], shape[axis], *rest).movedim(1, axis)
