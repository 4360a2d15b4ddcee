"""Activation patching of pictures: which patches carry what the answer depends on.

1. Every patch of the clean picture, or every square of neighbouring patches, is put into the run of the corrupted picture, at
   each layer of the language model.
2. The metric of each such run is the cell's value, exactly (`activation_patching`). Attention would only say what was looked at.

A patch's position holds what the vision tower made of the whole picture there; later also what the language model moved.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from mechkit._check import checked, is_whole
from mechkit.attribution.activation_patching import activation_patching
from mechkit.experiment.axes import check_dims, choose_indices, choose_layers
from mechkit.experiment.patches import Patches
from mechkit.hooks import HookedModel, get_site, one_at_a_time
from mechkit.hooks._sites import TOWER
from mechkit.metrics import AnyMetric
from mechkit.prompts import PromptPairs
from mechkit.result import Result


@checked
@one_at_a_time
def image_patching(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    site: str = "resid_pre",
    over: str = "layer patch",
    *,
    group: int = 1,
    direction: Literal["denoise", "noise"] = "denoise",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    budget: int | None = None,
    progress: bool = True,
    replay: bool = True,
) -> Result:
    """Patches the source picture's patches into the base run, one at a time or in squares.

    Args:
        model: Reads pictures; in evaluation mode.
        pairs: Whose pictures are cut alike (`Prompts.from_inputs`, `Prompts.from_processor`).
        metric: As for `activation_patching`.
        site: What is patched at a patch's position.
        over: `"layer patch"`, or `"layer patch head"` for sites of heads, in any order.
        group: Squares of so many times so many patches are patched together: 1 is each by itself.
        direction, layers, heads, budget, progress, replay: As for `activation_patching`.

    Returns:
        A `Result` with dims `(*over, "prompt")`, as `activation_patching` gives it. Patches are labelled by row and column
        (`"r0c2"`); `provenance["patches"]` has each one's box in pixels of the picture, by which `plot()` lays them over it.

    Raises:
        ValueError: prompts without pictures, pictures that are cut differently, what `activation_patching` refuses.

    Example:
        >>> patches = image_patching(model, pairs, logit_diff(pairs), group=2)
        >>> patches.mean("prompt").normalized().top(3)
    """
    if not is_whole(group) or group < 1:
        raise ValueError(f"group: expected a whole number of 1 or more, got {group!r}")
    if "patch" not in over.split():
        raise ValueError(f"over: expected 'patch' among the dims, such as 'layer patch'; got {over!r}")
    if get_site(site).stack == TOWER:
        raise ValueError(
            f"site: {site!r} is in the vision tower, whose patches are not the language model's; expected a site of that. "
            "activation_patching(…, over='layer pos') patches the tower's own positions"
        )
    given: dict[str, Any] = {"direction": direction, "budget": budget, "progress": progress, "replay": replay}
    if group == 1:
        result = activation_patching(model, pairs, metric, site, over, layers=layers, heads=heads, **given)
        assert isinstance(result, Result)
        return _named(result)
    dims = over.split()
    members, layout = Patches.of(pairs.clean).grouped(group)
    choices: dict[str, list[Any]] = {"patch": list(members)}
    found = get_site(site)
    if "layer" in dims:
        choices["layer"] = choose_layers(model, found, layers)
    if "head" in dims:
        choices["head"] = choose_indices("heads", heads, model.n_heads_at(found.name))
    elif heads is not None:
        raise ValueError(f"heads: given, but 'head' is not among the dims {over!r}")
    check_dims(found, tuple("position" if dim == "patch" else dim for dim in dims), over)
    cells: dict[str, list[tuple[Any, ...]]] = {}
    for at in itertools.product(*(choices[dim] for dim in dims)):
        place = dict(zip(dims, at, strict=True))
        cells[" ".join(map(str, at))] = [
            tuple(one if dim == "patch" else place[dim] for dim in dims) for one in members[place["patch"]]
        ]
    result = activation_patching(model, pairs, metric, site, over, cells=cells, **given)
    assert isinstance(result, Result)
    shape = [len(choices[dim]) for dim in dims]
    provenance = {name: one for name, one in result.provenance.items() if name != "cells"}
    return _named(
        replace(
            result,
            values=result.values.reshape(*shape, -1),
            dims=(*dims, "prompt"),
            coords={**{dim: tuple(choices[dim]) for dim in dims}, "prompt": result.coords["prompt"]},
            provenance={**provenance, "patches": list(layout), "group": group},
        )
    )


def _named(result: Result) -> Result:
    return replace(result, provenance={**result.provenance, "technique": "image_patching"})
