"""From `over="layer head"` to cells, and from a sweep's answers to a `Result`. Shared by all techniques that sweep."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import torch

from mechkit._check import is_whole
from mechkit.engine import Answers, Cell, Edit
from mechkit.experiment.positions import choose_positions, position_labels, refuse_indices_from_end
from mechkit.experiment.provenance import pictures_of, provenance_of
from mechkit.experiment.sets import Members, Sets, sets_of
from mechkit.hooks import HookedModel, Site, get_site, parse_hook_name
from mechkit.hooks._record import longest_at
from mechkit.hooks._sites import TOWER
from mechkit.metrics import CallableMetric, Metric
from mechkit.prompts import Prompts
from mechkit.result import Result

DIMS = ("layer", "pos", "position", "head", "neuron")


class Chosen(TypedDict, total=False):
    """What restricts the dims of a result: arguments of nearly every technique. `None` is all there are."""

    layers: Sequence[int] | None
    heads: Sequence[int] | None
    positions: Sequence[int] | Sequence[str] | None
    neurons: Sequence[int] | None


@dataclass(frozen=True)
class Axes:
    """The dims of a result, and what they index in a site's activations.

    Attributes:
        site: What is edited or attributed.
        dims: As the user wrote them, e.g. `("layer", "head")`.
        index: For each dim (and the layer, if the site has one) its indices; names for `"position"`.
        coords: Labels of each dim.
    """

    site: Site
    dims: tuple[str, ...]
    index: dict[str, Sequence[Any]]
    coords: dict[str, tuple[int | str, ...]]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(self.coords[dim]) for dim in self.dims)

    @property
    def layers(self) -> Sequence[int]:
        """The layers, or `[0]` for a site outside them."""
        return self.index.get("layer", [0])


@dataclass(frozen=True)
class Grid(Axes):
    """Axes, and the cells of a sweep: one a combination of indices, the last dim fastest; or the sets that a user gave.

    Attributes:
        over: The dims as the user wrote them; for sets, `dims` is `("cell",)`.
        sets: For sets, what is in each of them: label -> one tuple of labels for each member.
    """

    cells: list[Cell]
    over: str
    sets: Mapping[str, Members] | None = None


def make_axes(
    model: HookedModel,
    prompts: Prompts,
    named: Mapping[str, torch.Tensor],
    site: str,
    over: str,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | Sequence[str] | None = None,
    neurons: Sequence[int] | None = None,
    towers: bool = False,
) -> Axes:
    """The axes that `over` asks for. `layers`, `heads`, `positions` and `neurons` restrict their dims. Sites of a vision
    tower are refused unless the technique takes them (`towers`); their positions are the tower's own.

    Raises:
        ValueError: an unknown dim or one that the site does not have, an index out of range, a position that has no name.
    """
    found = get_site(site)
    if found.stack == TOWER and not towers:
        raise ValueError(
            f"site: {site!r} is in the vision tower; expected one of the language model. activation_patching, ablation and "
            "attribution_patching take sites of towers"
        )
    if not isinstance(over, str):
        raise ValueError(f"over: expected dims in one string, such as 'layer head'; got {over!r}")
    dims = tuple(over.split())
    check_dims(found, dims, over)
    named_layer = parse_hook_name(site)[1]
    if named_layer is not None:  # a full hook name means its own layer
        if layers is not None and list(layers) != [named_layer]:
            raise ValueError(
                f"layers: site {site!r} is in layer {named_layer}; leave layers out, or use site={found.name!r}"
            )
        layers = [named_layer]
    if "pos" in dims and positions is not None and found.stack == TOWER:
        if behind := [at for at in positions if is_whole(at) and int(at) < 0]:
            raise ValueError(
                "positions: expected indices from the start at sites of the vision tower, where prompts may have different "
                f"numbers of patches; got {behind[0]}"
            )
    elif "pos" in dims and positions is not None:
        refuse_indices_from_end(positions, prompts, "over='layer position' with a named one such as 'END'")
    if "position" in dims and found.stack == TOWER:
        raise ValueError(
            f"over: {site!r} is in the vision tower, where no position has a name and the language model's patches are not its "
            "own; use 'pos', which counts the tower's positions"
        )
    model.check_site(found.name)  # raises if this architecture lacks the site
    longest = longest_at(model, found.name, prompts)
    sizes: dict[str, tuple[Sequence[Any] | None, int]] = {
        "head": (heads, model.n_heads_at(found.name)),
        "pos": (positions, longest),
    }
    index: dict[str, Sequence[Any]] = {}
    for dim in ("layer", *(d for d in dims if d != "layer")):
        if dim == "position":
            index[dim] = choose_positions(named, positions)
        elif dim == "layer" and found.in_block:
            index[dim] = choose_layers(model, found, layers)
        elif dim == "neuron":
            index[dim] = choose_indices("neurons", neurons, common_width(model, found, index.get("layer", [0])))
        elif dim in dims:
            index[dim] = choose_indices("positions" if dim == "pos" else f"{dim}s", *sizes[dim])
    if "layer" not in dims and found.in_block:
        raise ValueError(f"over: site {found.name!r} is in every layer; expected 'layer' among the dims, got {over!r}")
    given = {"layers": layers, "heads": heads, "neurons": neurons, "positions": positions}
    for name, chosen in given.items():
        choices = {"pos", "position"} if name == "positions" else {name.removesuffix("s")}
        if chosen is not None and not choices & set(dims):
            raise ValueError(f"{name}: given, but {' or '.join(sorted(choices))} is not among the dims {over!r}")
    coords = {dim: tuple(index[dim]) for dim in dims}
    if "pos" in coords:
        coords["pos"] = tuple(index["pos"]) if found.stack == TOWER else position_labels(prompts, index["pos"])
    return Axes(found, dims, index, coords)


def make_grid(
    model: HookedModel,
    prompts: Prompts,
    named: Mapping[str, torch.Tensor],
    site: str,
    over: str,
    *,
    value: str = "source",
    cells: Sets | None = None,
    **chosen: Unpack[Chosen],
) -> Grid:
    """The cells of a sweep over the axes that `make_axes` gives, each writing the value called `value`; with `cells` one for each
    set of places."""
    axes = make_axes(model, prompts, named, site, over, **chosen, towers=True)

    def edit(labels: Sequence[Any]) -> Edit:
        at = dict(zip(axes.dims, labels, strict=True))
        pos = tuple(named[at["position"]].tolist()) if "position" in at else at.get("pos")
        return Edit(axes.site.name, at.get("layer", 0), value, head=at.get("head"), pos=pos, neuron=at.get("neuron"))

    if cells is None:
        every = itertools.product(*(axes.index[dim] for dim in axes.dims))
        return Grid(axes.site, axes.dims, axes.index, axes.coords, [(edit(labels),) for labels in every], over)
    if given := [name for name, one in chosen.items() if one is not None]:
        raise ValueError(f"{given[0]}: given beside cells, which name every place themselves; expected one of the two")
    sets = sets_of(axes.dims, axes.index, axes.coords, cells)
    index = {**axes.index, "cell": list(sets)}
    chosen_cells = [tuple(edit(member) for member in members) for members in sets.values()]
    return Grid(axes.site, ("cell",), index, {"cell": tuple(sets)}, chosen_cells, over, sets)


def to_result(
    grid: Grid,
    answers: Answers,
    model: HookedModel,
    prompts: Prompts,
    metric: Metric | CallableMetric,
    *,
    base: str,
    source: str | None,
    **provenance: Any,
) -> Result | list[Result]:
    """Answers as a labelled `Result`: dims of the grid, then the prompt. Where several metrics were read, one `Result` for each,
    in their order; the cost of each is that of the whole sweep."""
    if isinstance(metric, Metric) and metric.parts:
        several = []
        for i, part in enumerate(metric.parts):
            source_metric = None if answers.source is None else answers.source[..., i].clone()
            mine = replace(
                answers, values=answers.values[..., i].clone(), base=answers.base[..., i].clone(), source=source_metric
            )
            one = to_result(grid, mine, model, prompts, part, base=base, source=source, **provenance)
            assert isinstance(one, Result)
            several.append(one)
        return several
    shape = [len(grid.coords[dim]) for dim in grid.dims]
    if grid.sets is not None:
        provenance["cells"] = {label: [list(member) for member in members] for label, members in grid.sets.items()}
    baseline = {base: answers.base}
    if source is not None and answers.source is not None:
        baseline[source] = answers.source
    return Result(
        values=answers.values.reshape(*shape, len(prompts)),
        dims=(*grid.dims, "prompt"),
        coords={**grid.coords, "prompt": tuple(range(len(prompts)))},
        baseline=baseline,
        base=base,
        metric=metric.name,
        unit=metric.unit,
        provenance=provenance_of(
            model, prompts, site=grid.site.name, over=" ".join(grid.over.split()), replay=answers.replay, **provenance
        ),
        cost=answers.cost,
        pictures=None if grid.site.stack == TOWER else pictures_of(prompts),  # a tower's positions are its own
    )


def check_dims(site: Site, dims: tuple[str, ...], over: str) -> None:
    if unknown := [dim for dim in dims if dim not in DIMS]:
        raise ValueError(
            f"over: expected dims among {', '.join(DIMS)}, separated by spaces; got {unknown[0]!r} in {over!r}"
        )
    if not dims or len(set(dims)) != len(dims) or {"pos", "position"} <= set(dims):
        raise ValueError(f"over: expected each dim once, and one of 'pos' and 'position' at most; got {over!r}")
    if "layer" in dims and not site.in_block:
        raise ValueError(f"over: site {site.name!r} is outside the layers; leave out 'layer', got {over!r}")
    for dim, axis in (("head", "head"), ("pos", "pos"), ("position", "pos")):
        if dim in dims and axis not in site.dims:
            raise ValueError(f"over: site {site.name!r} has axes {site.dims} and no {dim!r}; got {over!r}")
    if "neuron" in dims and site.name in ("pattern", "attn_scores"):
        raise ValueError(f"over: site {site.name!r} has axes {site.dims} and no 'neuron'; got {over!r}")


def choose_indices(argument: str, chosen: Sequence[Any] | None, size: int) -> list[int]:
    """The indices that a user chose out of `size`, counted from 0; all of them for `None`."""
    if isinstance(chosen, int | str):
        raise ValueError(f"{argument}: expected several indices, such as [{chosen}], got {chosen!r}")
    indices = list(range(size)) if chosen is None else list(chosen)
    for i in indices:
        if isinstance(i, bool) or not hasattr(i, "__index__") or not -size <= i < size:
            raise ValueError(f"{argument}: expected indices into {size}, got {i!r}")
    indices = [i.__index__() % size for i in indices]
    if not indices or len(set(indices)) != len(indices):
        raise ValueError(f"{argument}: expected at least one index, each once; got {chosen}")
    return indices


def choose_layers(model: HookedModel, site: Site, chosen: Sequence[int] | None) -> list[int]:
    """The layers that a user chose, each of which must have the site; all that have it for `None`."""
    if chosen is None:
        return list(model.layers_with(site.name))
    stack = model.stack_of(site.name) or model.stack
    layers = choose_indices("layers", chosen, stack.n_layers)
    model.check_site(site.name, layers)
    return layers


def common_width(model: HookedModel, site: Site, layers: Sequence[int]) -> int:
    """How many neurons (entries of the last axis) a site has, the same in all the layers; else `ValueError`."""
    widths = {layer: model.width_of(site.name, layer) for layer in layers}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"over: 'neuron' needs layers of one width; {site.name!r} has "
            f"{', '.join(f'{width} entries in layer {layer}' for layer, width in widths.items())}. Choose with layers=[…]"
        )
    return next(iter(widths.values()))
