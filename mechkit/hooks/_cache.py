"""ActivationCache: what a run computed, by site name and layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from mechkit._check import checked, is_whole
from mechkit.hooks._sites import SITES, TOWER, Site, get_site


@checked
class ActivationCache(Mapping[str, Tensor]):
    """Activations of one run, under their full hook names.

    `cache["z", 9]`, `cache["z", -1]` (the last layer) and `cache["blocks.9.attn.hook_z"]` all work; `cache["z"]` gives
    all layers stacked, `[layer batch pos …]`. Shapes are TransformerLens's.
    """

    def __init__(
        self,
        activations: dict[str, Tensor],
        n_layers: int,
        *,
        tower_layers: int = 0,
        weights_hash: str = "",
        tokens: Int[Tensor, "batch pos"] | None = None,
        inputs_hash: str = "",
        whole: bool = False,
    ) -> None:
        self._activations = activations
        self.n_layers = n_layers
        self.tower_layers = tower_layers  # of the vision tower, where there is one
        self.weights_hash = weights_hash  # of the model that computed it, so that another's cache can be refused
        self.tokens = tokens
        self.inputs_hash = inputs_hash  # of what was read beside the tokens
        self.whole = whole  # every position of an unmasked run with nobody's hooks on it

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        name, layer = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        if not isinstance(name, str) or not (layer is None or is_whole(layer)):
            raise TypeError(f"expected cache[name], or cache[name, layer] such as cache['z', 9]; got cache[{key!r}]")
        site = SITES.get(name)
        if site is None:
            return self._lookup(name)
        if not site.in_block:
            return self._lookup(site.hook)
        if layer is None:
            return self.stack(name)
        return self._lookup(site.hook_name(self._layer(layer, site)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __contains__(self, key: object) -> bool:
        try:
            self[key]  # type: ignore[index]
        except (KeyError, TypeError, ValueError):
            return False
        return True

    def __repr__(self) -> str:
        return f"ActivationCache({len(self)} activations: {', '.join(list(self)[:4])}{', …' if len(self) > 4 else ''})"

    @checked
    def stack(self, name: str) -> Tensor:
        """One site at every cached layer, `[layer batch …]`."""
        site: Site = get_site(name)
        if not site.in_block:
            raise ValueError(f"name: {name!r} is in no layer; cache[{name!r}] is it")
        n_layers = self._n_layers(site)
        found = [self._activations.get(site.hook_name(layer)) for layer in range(n_layers)]
        present = [a for a in found if a is not None]
        if len(present) != n_layers or not present:
            raise KeyError(
                f"{name!r} was cached at {len(present)} of {n_layers} layers; ask for one with cache[{name!r}, layer]"
            )
        return torch.stack(present)

    @checked
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ActivationCache:
        """A copy on another device, or in another dtype."""
        check_dtype(dtype)
        moved = {name: a.to(device=device, dtype=dtype) for name, a in self._activations.items()}
        return ActivationCache(
            moved,
            self.n_layers,
            tower_layers=self.tower_layers,
            weights_hash=self.weights_hash,
            tokens=self.tokens,
            inputs_hash=self.inputs_hash,
            whole=self.whole,
        )

    def _n_layers(self, site: Site) -> int:
        """Of the model, or of the tower that a site is in."""
        return self.tower_layers if site.stack == TOWER else self.n_layers

    def _layer(self, layer: int, site: Site) -> int:
        layer, n_layers = int(layer), self._n_layers(site)
        if not -n_layers <= layer < n_layers:
            raise ValueError(f"layer: expected an index into {n_layers} layers, got {layer}")
        return layer % n_layers

    def _lookup(self, name: str) -> Tensor:
        if name not in self._activations:
            raise KeyError(f"{name!r} is not in this cache, which holds {', '.join(list(self)[:8])} …")
        return self._activations[name]


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises `ValueError` for a dtype in which activations would lose their fractions or their sense."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point dtype, such as torch.float32; got {dtype}")
