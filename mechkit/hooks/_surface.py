"""What can be read and edited in a model: which sites it computes, in which layers and of what size, and their full names.

There is no table of architectures. One forward pass of a few tokens, when the model is wrapped, shows it: a site is there in a
layer if that layer computes it once, with the axes that the site has. In hybrids, whose layers differ, most sites are only in
some layers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mechkit._check import checked, is_whole
from mechkit.hooks._capture import capture
from mechkit.hooks._facts import Facts
from mechkit.hooks._hooking import Hooks, hook_points
from mechkit.hooks._projections import is_plain
from mechkit.hooks._sites import SITES, TOWER, Site, get_site
from mechkit.hooks._stack import Sizes, Stack
from mechkit.hooks._tower import sites_of, tower_of
from mechkit.hooks.loading.probe import pictured_probe

Names = str | tuple[str, int] | Sequence[str | tuple[str, int]] | Callable[[str], bool]


class Surface(Facts):
    """The part of `HookedModel` that knows its sites and the names of its hooks."""

    @checked
    def hook_names(self, names: Names) -> list[str]:
        """The full hook names that `names` stands for: a short site name (every layer that has it), `(site, layer)`, a full
        hook name, a list of these, or a function on full names. Raises `ValueError` where a name matches nothing."""
        if callable(names):
            found = [name for name in self._known_names() if names(name)]
            if not found:
                raise ValueError(
                    f"names: the given function is true for none of the model's {len(self._known_names())} hooks"
                )
            return found
        if isinstance(names, str | tuple) and not (isinstance(names, tuple) and isinstance(names[0], tuple)):
            names = [names]
        return list(dict.fromkeys(full for name in names for full in self._resolve(name)))

    def _resolve(self, name: str | tuple[str, int]) -> list[str]:
        short, layer = name if isinstance(name, tuple) else (name, None)
        if not isinstance(short, str) or not (layer is None or is_whole(layer)):
            raise ValueError(f"names: expected a site and a layer, such as ('z', 3); got {name!r}")
        stack = self.stack_of(short) if short in SITES else self.stack
        n_layers = self.n_layers if stack is None else stack.n_layers
        if layer is not None and not -n_layers <= layer < n_layers:
            raise ValueError(f"names: layer: expected an index into {n_layers} layers, got {layer}")
        if short in SITES:
            site = SITES[short]
            self.check_site(short, None if layer is None else [layer % n_layers])
            layers = self.layers_with(short) if layer is None else [layer % n_layers]
            return [site.hook_name(i) for i in layers] if site.in_block else [site.hook]
        known = self._known_names()
        if short not in known:
            names = [*SITES, *known]
            if short.startswith(f"{TOWER}."):  # not TransformerLens's hooks in the tower, where edits are lost
                names = [name for name in names if name.startswith(f"{TOWER}.")]
            near = difflib.get_close_matches(short, names, n=3, cutoff=0.5)
            raise ValueError(
                f"names: hook name {short!r}: no hook has this name. {'Near: ' + ', '.join(near) if near else ''}"
            )
        return [short]

    def _known_names(self) -> Mapping[str, Any]:
        in_tower = self.stacks[TOWER].sites if TOWER in self.stacks else ()
        return {**hook_points(self.bridge), **{SITES[name].hook_name(layer): None for name, layer in in_tower}}

    def layers_with(self, site: str) -> tuple[int, ...]:
        """The layers that compute a site: all of them nearly always, some in hybrids; `(0,)` for a site outside the layers."""
        stack = self.stack_of(site)
        return () if stack is None else stack.layers_with(get_site(site).name)

    @checked
    def has_site(self, site: str, layer: int | None = None) -> bool:
        """Whether some layer (or this one) computes the site. Parallel blocks have no `resid_mid`, attention-only models no
        MLP, state-space models no heads."""
        stack = self.stack_of(site)
        return stack is not None and stack.has_site(site, layer)

    def check_site(self, site: str, layers: Sequence[int] | None = None) -> None:
        """Raises `ValueError` unless this model has the site, in each of the `layers` if any are given."""
        there, stack = self.layers_with(site), self.stack_of(site) or self.stack
        if not there:
            raise ValueError(
                f"hook name {SITES[site].hook_name(0)!r}: {site!r} does not exist in {self.name} ({self.cfg.architecture}). "
                f"{self._why_not(site)}Its sites are {', '.join(stack.site_names)}"
            )
        if SITES[site].in_block and (missing := [layer for layer in layers or () if layer not in there]):
            raise ValueError(
                f"layers: site {site!r} does not exist in {_listed(missing)} of {self.name} ({self.cfg.architecture}); "
                f"it is in {_listed(there)}. Choose among these with layers=[…]"
            )

    def check_every_layer(self, sites: Sequence[str], what: str) -> None:
        """Raises `ValueError` unless every layer computes each of the sites, for `what` needs them all."""
        for site in sites:
            self.check_site(site)
            if missing := [layer for layer in range(self.n_layers) if not self.has_site(site, layer)]:
                raise ValueError(
                    f"model: {what} needs {site!r} in every layer; {self.name} ({self.cfg.architecture}) has none in "
                    f"{_listed(missing)}"
                )

    def _why_not(self, site: str) -> str:
        """A sentence on why the site is missing, if the reason is known."""
        if SITES[site].stack == TOWER:
            if TOWER not in self.stacks:
                return "It has no vision tower. "
            return "Its tower computes the attention of each picture by itself. " if "src" in SITES[site].dims else ""
        if "head" not in SITES[site].dims:
            return ""
        attentions = [getattr(block, "attn", None) for block in self.stack.blocks]
        if all(attention is None for attention in attentions):
            return "TransformerLens shows no attention in it, so that there are no heads to be read or edited. "
        if site in ("q", "k", "v") and any(hasattr(attention, "hook_kv_latent") for attention in attentions):
            return "Its keys and values are made of a shared latent (multi-head latent attention). "
        return ""

    def never_fired(self, names: Sequence[str]) -> str:
        """What is wrong where hooks with these full names were attached, and a forward pass called none of them."""
        fault = f"hooks on {', '.join(names[:4])} never fired: "
        if all(name.startswith(f"{TOWER}.") for name in names):
            return f"{fault}{self.name} runs its vision tower where a prompt has a picture; expected one with inputs=…, got none"
        return f"{fault}{self.name} does not compute that activation in a forward pass. Its sites are {', '.join(self.sites)}"

    @checked
    def n_heads_at(self, site: str) -> int:
        """Heads of a site: key-value heads for `k` and `v`."""
        stack = self.stack_of(site) or self.stack
        return stack.n_kv_heads if get_site(site).name in ("k", "v") else stack.n_heads

    @checked
    def width_of(self, site: str, layer: int | None = None) -> int:
        """Entries of a site's last axis: `d_model`, `d_head`, or the MLP's neurons; the most of any layer if none is given."""
        stack = self.stack_of(site)
        return 0 if stack is None else stack.width_of(site, layer)

    def site_size(self, site: str, dim: str, length: int, layer: int | None = None) -> int:
        """How long the axis `dim` of a site's activation is, for prompts of `length` tokens; of a tower, for one picture of the
        smallest kind."""
        if dim in ("pos", "src"):
            stack, found = self.stack_of(site), get_site(site)
            if stack is None or found.stack == self.stack.name:
                return length
            sizes = next(sizes for (name, _), sizes in stack.sites.items() if name == found.name)
            return sizes[found.dims.index(dim)]
        return self.n_heads_at(site) if dim == "head" else self.width_of(site, layer)

    @property
    def sites(self) -> list[str]:
        """Short names of all sites that this model has, be it in some layers alone (see `layers_with`); those of a vision tower
        are `model.stacks["vision"].site_names`."""
        return self.stack.site_names


def measure_blocks(bridge: Any, run: Callable[[int], Any], length: int | None = None) -> tuple[Sizes, int | None]:
    """Runs a model once on a few tokens, and looks which sites it computes.

    Args:
        bridge: The model.
        run: Runs it on a prompt of so many tokens.
        length: How many positions its stream has, if that is not for us to choose.

    Returns:
        For every `(site, layer)` that is there (layer 0 for sites outside the blocks) the sizes of its axes after the batch.
        The position's is that of this run. And how many things the last block returns, where that is a tuple.

    Raises:
        ValueError: TransformerLens does not present the model as one list of blocks.
    """
    if not len(getattr(bridge, "blocks", ())):
        raise ValueError(
            f"model: expected a stack of blocks, one after the other; TransformerLens shows none in {bridge.cfg.architecture}, "
            "so that its residual stream has no layers. mechkit cannot run experiments on it"
        )
    n_heads, n_layers = int(bridge.cfg.n_heads), len(bridge.blocks)
    # Not as many tokens as heads, so that the two axes cannot be taken for each other.
    n_tokens = length or min(3 if n_heads == 2 else 2, int(getattr(bridge.cfg, "n_ctx", None) or 2))
    seen: dict[tuple[str, int], list[tuple[int, ...]]] = {}

    def note(activation: Any, hook: Any, key: tuple[str, int]) -> None:
        seen.setdefault(key, []).append(tuple(activation.shape) if isinstance(activation, Tensor) else ())

    known, returned = hook_points(bridge), []
    handle = bridge.blocks[-1].register_forward_hook(lambda module, args, output: returned.append(output))
    with Hooks(bridge) as hooks, torch.no_grad():
        for name, site in SITES.items():
            for layer in range(n_layers) if site.in_block else (0,):
                if name != "result" and site.stack != TOWER and site.hook_name(layer) in known:
                    hooks.attach(site.hook_name(layer), partial(note, key=(name, layer)))
        try:
            run(n_tokens)
        finally:
            handle.remove()
    sizes = {"batch": 1, "pos": n_tokens, "src": n_tokens, "d_model": int(bridge.cfg.d_model), "head": n_heads}
    found = {
        key: shapes[0][1:]
        for key, shapes in seen.items()
        if len(shapes) == 1 and _fits(SITES[key[0]], shapes[0], sizes)
    }
    for layer in range(n_layers):
        if ("z", layer) in found and _splits_by_head(bridge.blocks[layer].attn, found["z", layer][-1], sizes):
            found["result", layer] = (n_tokens, n_heads, sizes["d_model"])
    several = len(returned[-1]) if returned and isinstance(returned[-1], tuple | list) else None
    return {key: found[key] for site in SITES for layer in range(n_layers) if (key := (site, layer)) in found}, several


def measure_tower(model: Any) -> Stack | None:
    """The stack of a vision-language model's tower, whose sites are those that a prompt with one small picture shows; `None` of a
    model without a tower, or whose patches are not known. What lies behind the tower is not run."""
    tower, rows = tower_of(model.bridge), pictured_probe(model.bridge.original_model)
    if tower is None or rows is None or model.reads_pictures_alone:
        return None
    seen: dict[tuple[str, int], list[tuple[int, ...]]] = {}

    def note(activation: Tensor, hook: Any, key: tuple[str, int]) -> None:
        seen.setdefault(key, []).append(tuple(activation.shape))

    hooks = [(site.hook_name(layer), partial(note, key=(site.name, layer))) for site, layer in sites_of(tower)]
    read = ("resid_pre", 0)
    with torch.no_grad(), capture(model, [read], stop=read, hooks=hooks, partly=True):
        model.run(rows)
    found = {
        (site.name, layer): seen[site.name, layer][0][1:]
        for site, layer in sites_of(tower)
        if len(seen.get((site.name, layer), ())) == 1 and len(seen[site.name, layer][0]) == 1 + len(site.dims)
    }
    return Stack.of_tower(tower.blocks, tower.n_heads, found) if (f"{TOWER}.resid_pre", 0) in found else None


def _fits(site: Site, shape: tuple[int, ...], sizes: Mapping[str, int]) -> bool:
    """Whether an activation has the axes of its site. Keys and values have some number of heads that divides the others'."""
    if len(shape) != 1 + len(site.dims):
        return False
    for dim, size in zip(("batch", *site.dims), shape, strict=True):
        if dim == "head" and site.name in ("k", "v"):
            if size < 1 or sizes["head"] % size:
                return False
        elif dim in sizes and size != sizes[dim]:
            return False
    return True


def _splits_by_head(attention: Any, width: int, sizes: Mapping[str, int]) -> bool:
    """Whether the attention's output weight can be had by head."""
    projection = getattr(getattr(attention, "o", None), "original_component", None)
    if projection is not None and not is_plain(projection):
        return True  # an adapter, say: whether it is linear is found when its heads are asked for (`loading/heads.py`)
    try:
        weight = attention.W_O
        shape = None if getattr(attention.o, "original_component", None) is None else tuple(weight.shape)
    except Exception:  # TransformerLens has several ways to say that it has none
        return False
    return shape == (sizes["head"], width, sizes["d_model"])


def _listed(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
