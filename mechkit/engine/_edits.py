"""Edits and cells: what a what-if question changes in a run, and how many of them are written into one batch.

A *cell* is one question: a tuple of edits made together; where they overlap, the later one wins. Its answer for one prompt is
one *row* of a replayed batch.
`EditPlan` turns cells into index arrays, so that a batch of any size is written with one indexed assignment per site.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from mechkit.engine._operations import SET, Operation
from mechkit.hooks._devices import to_device
from mechkit.hooks._sites import SITES, TOWER, Site, get_site

if TYPE_CHECKING:
    from mechkit.engine._packing import PackedRows

SOURCE = "source"  # the value key that stands for the same activation in the source run
NEVER = np.iinfo(np.int64).max  # "start" of a row that changes nothing
BEFORE = -1  # the entry of what is edited before the first block: in a vision tower, or the embedding

# (value key, site, layer) -> the value, broadcastable to the site's activation [prompt, *dims]
ValueLookup = Callable[[str, str, int], Tensor]


@dataclass(frozen=True)
class Edit:
    """Changes one site's activation, or one head, position or unit of it: by default overwrites it.

    Attributes:
        site: Short site name.
        layer: The layer; 0 for sites outside the blocks.
        value: Where the new value comes from: `"source"` (the same place in the source run) or a key of the `values`
            that are given to the sweep.
        head: One head (a key-value head for `k` and `v`); `None` is all.
        pos: One position (a destination for `pattern`), or one for each prompt; `None` is all. A row whose prompt has no
            such position has no answer (NaN).
        neuron: One index of the last axis; `None` is all.
        variant: Which of several values, where they are stacked along a first axis under one key; `None` where they are not.
        operation: What is done with the activation and the value; `Set()` puts the value in its place.
    """

    site: str
    layer: int
    value: str = SOURCE
    head: int | None = None
    pos: int | tuple[int, ...] | None = None
    neuron: int | None = None
    variant: int | None = None
    operation: Operation = SET

    def __post_init__(self) -> None:
        site = get_site(self.site)
        object.__setattr__(self, "site", site.name)
        if isinstance(self.pos, np.integer):
            object.__setattr__(self, "pos", int(self.pos))
        for name in ("layer", "head", "neuron", "variant"):
            index = getattr(self, name)
            if index is not None and (not isinstance(index, int | np.integer) or index < 0):
                raise ValueError(f"{name}: expected an index of 0 or more, got {index!r}")
        if not isinstance(self.operation, Operation):
            raise TypeError(f"operation: expected an operation, such as Set(), got {self.operation!r}")
        if self.pos is not None and min(self.pos if isinstance(self.pos, tuple) else (self.pos,)) < 0:
            raise ValueError(f"pos: expected positions of 0 or more, got {self.pos}")
        if self.head is not None and "head" not in site.dims:
            raise ValueError(f"head: site {site.name!r} has axes {site.dims} and no heads")
        if self.neuron is not None and "src" in site.dims:
            raise ValueError(f"neuron: site {site.name!r} has axes {site.dims}; its last axis is no unit")


Cell = tuple[Edit, ...]


@dataclass(frozen=True)
class TowerRun:
    """What a sweep knows of a vision tower's part in some prompts' runs.

    Attributes:
        start: The first position of the text that a picture stands for; nothing before it can see what the tower computes.
        length: How many positions the tower has for each prompt.
        same: In which prompts base and source run see the same pictures, so that their towers compute the same.
    """

    start: int
    length: int
    same: Bool[np.ndarray, "prompt"]


@dataclass(frozen=True)
class EditGroup:
    """Edits of one site and layer that share a form (which axes are chosen), as columns sorted by cell."""

    site: Site
    layer: int
    value: str
    cell: Int[np.ndarray, "edit"]
    head: Int[np.ndarray, "edit"] | None
    pos: Int[np.ndarray, "edit prompt"] | None  # a second axis of 1 is the same for every prompt
    neuron: Int[np.ndarray, "edit"] | None
    variant: Int[np.ndarray, "edit"] | None
    operation: Operation

    def match(self, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For rows that answer these cells: the pairs `(row, edit)` to be written."""
        first, last = np.searchsorted(self.cell, cell, "left"), np.searchsorted(self.cell, cell, "right")
        count = last - first
        row = np.repeat(np.arange(len(cell)), count)
        within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        return row, np.repeat(first, count) + within


class EditPlan:
    """All cells of a sweep as index arrays.

    Attributes:
        groups: Entry block -> the edit groups that are written there. `resid_post` of one block is what the next one
            reads, so it is written there, and nothing of its own block is recomputed. Block `n_layers` is the end.
        entry: The first block that each cell changes anything in.
    """

    def __init__(self, cells: Sequence[Cell], n_layers: int) -> None:
        self.n_cells = len(cells)
        self.groups: dict[int, list[EditGroup]] = {}
        self.entry = np.full(len(cells), n_layers, dtype=np.int64)
        forms: dict[tuple[Any, ...], list[tuple[int, Edit]]] = {}
        for i, cell in enumerate(cells):
            for edit, rank in zip(cell, _ranks(i, cell), strict=True):
                forms.setdefault((rank, edit.site, edit.layer, edit.value, edit.operation, *_form(edit)), []).append(
                    (i, edit)
                )
        # Groups are written in their order, so that of overlapping edits the later one stays.
        for form in sorted(forms, key=lambda form: form[0]):
            members = forms[form]
            group, entry = _columns(members), _entry_block(members[0][1])
            self.groups.setdefault(entry, []).append(group)
            np.minimum.at(self.entry, group.cell, entry)

    def __iter__(self) -> Iterator[EditGroup]:
        return (group for groups in self.groups.values() for group in groups)

    @property
    def sites(self) -> set[tuple[str, int]]:
        """Every `(site, layer)` whose source value is needed."""
        return {(g.site.name, g.layer) for g in self if g.value == SOURCE}

    @property
    def in_tower(self) -> bool:
        """Whether something is edited in a vision tower."""
        return any(group.site.stack == TOWER for group in self)

    @property
    def site_names(self) -> frozenset[str]:
        """The kinds of site that are edited."""
        return frozenset(group.site.name for group in self)

    def starts(
        self,
        prompts: Int[np.ndarray, "prompt"],
        length: int,
        first_difference: Int[np.ndarray, "prompt"],
        derived: Collection[str] = (),
        tower: TowerRun | None = None,
    ) -> tuple[Int[np.ndarray, "cell prompt"], Bool[np.ndarray, "cell prompt"]]:
        """For each cell and prompt: the first position that changes (`NEVER` if none does), and whether the prompt lacks a
        position that the cell names. Before `first_difference` the source run equals the base run, so that an edit there
        changes nothing, if its operation keeps what is equal; so for values that are `derived` from the two runs."""
        start = np.full((self.n_cells, len(prompts)), NEVER)
        absent = np.zeros((self.n_cells, len(prompts)), dtype=bool)
        for group in self:
            follows = (group.value == SOURCE or group.value in derived) and group.operation.keeps_equal
            begins = first_difference if follows else np.zeros_like(first_difference)
            in_tower = group.site.stack == TOWER
            if in_tower:
                assert tower is not None
                reached = np.where(tower.same, NEVER, tower.start) if follows else np.full(len(prompts), tower.start)
                where = np.broadcast_to(reached, (len(group.cell), len(prompts)))
                if group.pos is not None:
                    pos = group.pos[:, prompts] if group.pos.shape[1] > 1 else np.repeat(group.pos, len(prompts), 1)
                    np.logical_or.at(absent, group.cell, (pos < 0) | (pos >= tower.length))
            elif group.pos is None:
                where = np.broadcast_to(begins, (len(group.cell), len(prompts)))
            else:
                pos = group.pos[:, prompts] if group.pos.shape[1] > 1 else np.repeat(group.pos, len(prompts), 1)
                np.logical_or.at(absent, group.cell, (pos < 0) | (pos >= length))
                where = np.where(pos < begins, NEVER, pos)
            np.minimum.at(start, group.cell, where)
        return np.where(start >= length, NEVER, start), absent


def _form(edit: Edit) -> tuple[bool, str, bool, bool]:
    """Which axes are chosen: two edits of one form either write the same place or do not overlap."""
    pos = "all" if edit.pos is None else "one" if isinstance(edit.pos, int) else "each"
    return edit.head is None, pos, edit.neuron is None, edit.variant is None


def _ranks(number: int, cell: Cell) -> list[int]:
    """Which turn each edit of a cell is written in: 0, and one more wherever the form changes at a place."""
    last: dict[tuple[str, int], tuple[int, object]] = {}
    ranks, seen = [], set()
    for edit in cell:
        what = (edit.site, edit.layer, edit.head, edit.pos, edit.neuron)
        if what in seen:
            raise ValueError(f"cell {number}: {edit.site!r} in layer {edit.layer} is edited twice at the same place")
        seen.add(what)
        place, form = (edit.site, edit.layer), (_form(edit), edit.value, edit.operation)
        rank, before = last.get(place, (0, form))
        rank += form != before
        last[place] = rank, form
        ranks.append(rank)
    for site, layer in last:
        if site == "resid_post" and ("resid_pre", layer + 1) in last:
            raise ValueError(
                f"cell {number}: resid_post of layer {layer} and resid_pre of layer {layer + 1} are the same activation; "
                "edit one of them"
            )
    return ranks


def _entry_block(edit: Edit) -> int:
    if not SITES[edit.site].in_block or SITES[edit.site].stack == TOWER:
        return BEFORE
    return edit.layer + (edit.site == "resid_post")


def _columns(members: list[tuple[int, Edit]]) -> EditGroup:
    members.sort(key=lambda member: member[0])
    edits = [edit for _, edit in members]
    first = edits[0]
    pos = None if first.pos is None else np.array([[e.pos] if isinstance(e.pos, int) else e.pos for e in edits])
    return EditGroup(
        site=SITES[first.site],
        layer=first.layer,
        value=first.value,
        cell=np.array([i for i, _ in members]),
        head=None if first.head is None else np.array([e.head for e in edits]),
        pos=pos,
        neuron=None if first.neuron is None else np.array([e.neuron for e in edits]),
        variant=None if first.variant is None else np.array([e.variant for e in edits]),
        operation=first.operation,
    )


@dataclass(frozen=True)
class Rows:
    """Which cell and which prompt each row of a batch answers, and the position where all of them start.

    Attributes:
        cell: Index into the plan's cells.
        prompt: Index into the prompts of the run.
        prompt_id: The same prompts' indices in the whole set (edits that name one position per prompt are indexed by it).
        start: First position that is computed.
    """

    cell: Int[np.ndarray, "row"]
    prompt: Int[np.ndarray, "row"]
    prompt_id: Int[np.ndarray, "row"]
    start: int

    def __len__(self) -> int:
        return len(self.cell)

    def __getitem__(self, part: slice | np.ndarray) -> Rows:
        return Rows(self.cell[part], self.prompt[part], self.prompt_id[part], self.start)


def write(group: EditGroup, rows: Rows, activation: Tensor, lookup: ValueLookup) -> None:
    """Makes a group's edits, in place, in an activation `[row, *dims]` that begins at position `rows.start`."""
    row, edit = group.match(rows.cell)
    pos = None
    if group.pos is not None:
        pos = group.pos[edit, rows.prompt_id[row] if group.pos.shape[1] > 1 else 0]
        changes = pos >= rows.start  # an edit left of the start is one that changes nothing
        row, edit, pos = row[changes], edit[changes], pos[changes]
    if len(row) == 0:
        return
    value = lookup(group.value, group.site.name, group.layer)
    target: list[slice | Tensor] = [slice(None)] * activation.ndim
    source: list[slice | Tensor] = [slice(None)] * activation.ndim
    sizes = value.shape if group.variant is None else value.shape[1:]

    def choose(axis: int, here: np.ndarray, there: np.ndarray) -> None:
        target[axis] = to_device(here, activation.device)
        source[axis] = to_device(there if sizes[axis] > 1 else np.zeros_like(there), value.device)

    choose(0, row, rows.prompt[row])
    pos_axis = group.site.axis("pos")
    if pos is not None:
        choose(pos_axis, pos - rows.start, pos)
    elif sizes[pos_axis] > 1:
        source[pos_axis] = slice(rows.start, rows.start + activation.shape[pos_axis])
    if group.head is not None:
        choose(group.site.axis("head"), group.head[edit], group.head[edit])
    if group.neuron is not None:
        choose(activation.ndim - 1, group.neuron[edit], group.neuron[edit])
    if "src" in group.site.dims and sizes[-1] > activation.shape[-1]:
        source[-1] = slice(0, activation.shape[-1])  # of the longest prompt's sources, those that these prompts have
    if group.variant is not None:
        source.insert(0, to_device(group.variant[edit], value.device))
    operand, where = value[tuple(source)].to(activation), tuple(target)
    activation[where] = group.operation.apply(activation[where] if group.operation.looks else operand, operand)


def write_tokens(
    group: EditGroup, rows: PackedRows, first: Int[np.ndarray, "row"], activation: Tensor, lookup: ValueLookup
) -> None:
    """Makes a group's edits, in place, in an activation `[token, *dims]` of rows (`PackedRows` of one chunk), which follow one
    another without padding; `first` says where each row's tokens begin. For sites whose first axis is the position."""
    row, edit = group.match(rows.cell)
    if group.pos is not None:
        pos = group.pos[edit, rows.prompt_id[row] if group.pos.shape[1] > 1 else 0]
        changes = pos >= rows.start[row]
        row, edit, pos = row[changes], edit[changes], pos[changes]
    else:
        count = rows.suffix[row]
        row, edit = np.repeat(row, count), np.repeat(edit, count)
        pos = rows.start[row] + np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    if len(row) == 0:
        return
    value = lookup(group.value, group.site.name, group.layer)
    lead = 0 if group.variant is None else 1
    device = value.device

    def there(axis: int, index: np.ndarray) -> Tensor:
        return to_device(index if value.shape[lead + axis] > 1 else np.zeros_like(index), device)

    source: list[Tensor | slice] = [] if group.variant is None else [to_device(group.variant[edit], device)]
    source += [there(0, rows.prompt[row]), there(1, pos)]
    target: list[Tensor | slice] = [to_device(first[row] + pos - rows.start[row], activation.device)]
    for dim, chosen in (("head", group.head), (group.site.dims[-1], group.neuron)):
        if chosen is not None:
            axis = group.site.axis(dim)
            source += [slice(None)] * (axis + lead - len(source)) + [there(axis, chosen[edit])]
            target += [slice(None)] * (axis - 1 - len(target)) + [to_device(chosen[edit], activation.device)]
    operand, where = value[tuple(source)].to(activation), tuple(target)
    activation[where] = group.operation.apply(activation[where] if group.operation.looks else operand, operand)


def rows_by_start(plan: EditPlan, ids: np.ndarray, start: np.ndarray, wanted: np.ndarray) -> Iterator[Rows]:
    """The rows to compute, one set for each starting position, sorted by the block where they join."""
    cell, prompt = np.nonzero(wanted)
    order = np.lexsort((prompt, cell, plan.entry[cell], start[cell, prompt]))
    cell, prompt = cell[order], prompt[order]
    at = start[cell, prompt]
    for bounds in np.split(np.arange(len(cell)), np.nonzero(np.diff(at))[0] + 1):
        if len(bounds):
            yield Rows(cell[bounds], prompt[bounds], ids[prompt[bounds]], int(at[bounds[0]]))
