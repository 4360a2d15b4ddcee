"""Packed batches: rows that begin at different positions, of prompts of different lengths, in one call of each block.

A block's weights act on each token alone; its attention alone mixes positions. So all tokens that a batch needs are laid one
after the other, `[1 token d_model]`, without padding between rows, and the block runs on them as on one long prompt. Its
attention is a function of ours (`mechkit.engine._packed_attention`), which takes the tokens apart again: the rows of each chunk
of prompts find keys and values of the positions before their start where the run was recorded.

Edits of the stream and of `z` are made on the packed tokens. Blocks in which anything else is edited run as always, for rows that
begin at one position at a time (`Replayer`).

What this assumes beyond the replay by starts: the attention is reached through transformers' interface, once a block (looked at
in every call); nothing else in a block mixes tokens, or asks which of the call's tokens one is (the proof watches for that, since
few tokens may not show it); arguments of a block are masks, or belong to one position each. All of it the proof compares with
whole passes, on rows that begin at different positions and run together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechkit.engine._edits import EditGroup, EditPlan, write_tokens
from mechkit.engine._in_step import ByLayer
from mechkit.engine._packed_attention import Attention, Geometry, attending
from mechkit.engine._packing import PackedRows, tokens_from
from mechkit.engine._plain import PlainBlocks
from mechkit.engine._replay import KeysAndValues, Replayer, attached_edits
from mechkit.hooks._devices import to_device
from mechkit.hooks._record import CannotReplayError, stream_of

if TYPE_CHECKING:
    from mechkit.engine._chunk import Chunk

STREAM = ("resid_pre", "resid_post")  # sites that are written between blocks: no hook is needed
_PROJECTIONS: dict[str, Literal["q", "k", "v", "o"]] = {"q": "q", "k": "k", "v": "v", "z": "o"}


class PackedReplayer:
    """Replays rows of several recorded runs together. Counts the (block, token) pairs that it computes.

    Args:
        chunks: The prompts that were recorded.
    """

    def __init__(self, chunks: Sequence[Chunk], plain: PlainBlocks) -> None:
        self.chunks, self.model = list(chunks), chunks[0].state.model
        self.runs = [chunk.run for chunk in self.chunks]
        self.plain, self._tokens = plain, 0
        self.by_start = [Replayer(self.model, run, plain) for run in self.runs]
        if any(run.between for run in self.runs):
            raise CannotReplayError("the model adds to the residual stream between its blocks")
        if chunks[0].state.plan.in_tower:
            raise CannotReplayError("something is edited in a vision tower")
        self._tables: dict[tuple[int, ...], Tensor] = {}

    @property
    def block_tokens(self) -> int:
        return self._tokens + sum(one.block_tokens for one in self.by_start)

    def replay(self, plan: EditPlan, rows: PackedRows, read_last: bool) -> ByLayer[Float[Tensor, "token d_model"]]:
        """The final residual stream of edited rows, one after the other; only the last position of each if `read_last`. It is
        computed block by block.

        Args:
            plan: The cells.
            rows: Rows to compute.
            read_last: Whether only the last position is wanted.
        """
        # Rows of one chunk and start lie together all the way, wherever they join: attention takes them as they lie.
        order = np.lexsort((plan.entry[rows.cell], rows.start, rows.chunk))
        lying, n_layers = rows[order], self.model.n_layers
        entry = plan.entry[lying.cell]
        joined, hidden, geometry = np.zeros(len(rows), bool), self.recorded(0, rows[:0]), None
        here = lying[joined]
        for layer in range(min(int(entry.min()), n_layers), n_layers):
            yield layer
            now = entry <= layer
            if (fresh := now & ~joined).any():
                hidden = self._laid_together(hidden, joined, self.recorded(layer, lying[fresh]), fresh, lying.suffix)
                here, joined, geometry = lying[now], now, None
            hidden = hidden.to(self._device(layer))
            groups = plan.groups.get(layer, [])
            for group in groups:
                if group.site.name in STREAM:
                    self._write(group, here, hidden)
            groups = [group for group in groups if group.site.name not in STREAM]
            last = read_last and layer == n_layers - 1
            if groups and not self.writes_inside(layer, groups):
                # Rows that joined before have their edits behind them, unless a cell edits several layers.
                edited = entry[now] == layer
                if any(len(group.match(here.cell[~edited])[0]) for group in groups):
                    edited[:] = True
                hidden = self._edited_and_plain(layer, hidden, here, edited, groups, last)
                continue
            geometry = geometry or Geometry(here)
            hidden = (self._last_position if last else self._run)(layer, hidden, geometry, groups)
        ends = lying.at_the_end() if read_last else lying
        final = self.recorded(n_layers, ends[~joined])
        hidden = self._laid_together(hidden.to(final.device), joined, final, ~joined, ends.suffix)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        ends, first = (rows.at_the_end() if read_last else rows), ends.first
        hidden = hidden[to_device(tokens_from(first[place], ends.suffix), hidden.device)]
        for group in plan.groups.get(n_layers, ()):
            self._write(group, ends, hidden)
        return hidden

    def _laid_together(
        self, hidden: Tensor, joined: np.ndarray, new: Tensor, fresh: np.ndarray, suffix: np.ndarray
    ) -> Float[Tensor, "token d_model"]:
        """The tokens of rows that have joined and of rows that join now, in the order in which all rows lie."""
        pool = torch.cat([hidden.to(new.device), new])
        first = np.zeros(len(suffix), np.int64)
        first[joined] = np.cumsum(suffix[joined]) - suffix[joined]
        first[fresh] = len(hidden) + np.cumsum(suffix[fresh]) - suffix[fresh]
        both = joined | fresh
        return pool[to_device(tokens_from(first[both], suffix[both]), pool.device)]

    def _edited_and_plain(
        self,
        layer: int,
        hidden: Tensor,
        rows: PackedRows,
        edited: np.ndarray,
        groups: Sequence[EditGroup],
        last: bool,
    ) -> Float[Tensor, "token d_model"]:
        """One block for rows of which some are edited in it, at sites that a plain block does not show."""
        output = hidden.new_empty(len(rows), hidden.shape[-1]) if last else torch.empty_like(hidden)
        for which in (True, False):
            at = np.flatnonzero(edited == which)
            if len(at) == 0:
                continue
            some, tokens = rows[at], to_device(tokens_from(rows.first[at], rows.suffix[at]), hidden.device)
            if which:
                found = self._edited(layer, hidden[tokens], some, groups, last)
            else:
                found = (self._last_position if last else self._run)(layer, hidden[tokens], Geometry(some), ())
            output[to_device(at, hidden.device) if last else tokens] = found
        return output

    def unedited(self, layer: int, rows: PackedRows) -> Float[Tensor, "token d_model"]:
        """What a block makes of the recorded runs, for all tokens of some rows: where all is well, what the next block read."""
        return self._run(layer, self.recorded(layer, rows), Geometry(rows))

    def recorded(self, layer: int, rows: PackedRows) -> Float[Tensor, "token d_model"]:
        """The recorded streams at all tokens of some rows."""
        parts = []
        edges = np.flatnonzero(np.diff(rows.chunk)) + 1
        for at in np.split(np.arange(len(rows)), edges) if len(rows) else ():
            some = rows[at]
            stream = self.runs[int(some.chunk[0])].resid[layer]
            token = np.repeat(some.prompt * stream.shape[1], some.suffix) + some.position
            parts.append(stream.flatten(0, 1).index_select(0, to_device(token, stream.device)))
        return torch.cat(parts) if parts else self.runs[0].resid[layer][:0, 0]

    def _device(self, layer: int) -> torch.device:
        return self.runs[0].resid[layer].device

    def _write(self, group: EditGroup, rows: PackedRows, hidden: Tensor) -> None:
        for number, chunk in enumerate(self.chunks):
            at = np.flatnonzero(rows.chunk == number)
            if len(at):
                write_tokens(group, rows[at], rows.first[at], hidden, chunk.lookup)

    def writes_inside(self, layer: int, groups: Sequence[EditGroup]) -> bool:
        """Whether these edits can be made where a plain block computes their sites: no block with hook points is needed then."""
        return all(
            group.site.name in _PROJECTIONS and self.plain.projection(layer, _PROJECTIONS[group.site.name]) is not None
            for group in groups
        )

    @contextmanager
    def _written(self, layer: int, rows: PackedRows, groups: Sequence[EditGroup]) -> Iterator[None]:
        """Edits inside a plain block: of `z` in what its output projection reads, of `q`, `k`, `v` in what projections give."""
        unwritten = {group.site.name for group in groups}
        handles = []

        def write_site(site: str, flat: Tensor) -> None:
            by_head = flat.view(rows.n_tokens, -1, self.model.stack.width_of(site, layer))
            for group in groups:
                if group.site.name == site:
                    self._write(group, rows, by_head)
            unwritten.discard(site)

        for site in sorted(unwritten):
            projection = self.plain.projection(layer, _PROJECTIONS[site])
            assert projection is not None
            if site == "z":
                handle = projection.register_forward_pre_hook(lambda _, args: write_site("z", args[0]))
            else:
                handle = projection.register_forward_hook(lambda _, __, output, site=site: write_site(site, output))
            handles.append(handle)
        left: KeysAndValues | None = None
        try:
            yield
        except KeysAndValues as found:
            left = found
        finally:
            for handle in handles:
                handle.remove()
        if unwritten:
            raise CannotReplayError(f"{sorted(unwritten)} are not what projections of its attention read or give")
        if left is not None:
            raise left

    def _run(
        self,
        layer: int,
        hidden: Float[Tensor, "token d_model"],
        geometry: Geometry,
        groups: Sequence[EditGroup] = (),
    ) -> Float[Tensor, "token d_model"]:
        attention = Attention(self.runs, layer, geometry)
        with self._written(layer, geometry.rows, groups):
            return self._call(layer, hidden, geometry.rows, attention, geometry)

    def _last_position(
        self, layer: int, hidden: Tensor, geometry: Geometry, groups: Sequence[EditGroup]
    ) -> Float[Tensor, "row d_model"]:
        """A block's output at each row's last position: of the others, keys and values are all that it needs."""
        rows, attention = geometry.rows, Attention(self.runs, layer, geometry)
        ends = rows.at_the_end()
        if rows.n_tokens > len(rows):
            attention.leave = True
            try:
                with self._written(layer, rows, [group for group in groups if group.site.name in ("k", "v")]):
                    self._call(layer, hidden, rows, attention, geometry)
            except KeysAndValues as found:
                attention.given = found.args
            else:
                raise CannotReplayError("its attention is not reached through transformers' interface")
            attention.leave = False
            self._tokens -= len(rows)  # the last positions, which are counted again below
            hidden = hidden[to_device(rows.first + rows.suffix - 1, hidden.device)]
            groups = [group for group in groups if group.site.name in ("q", "z")]
        with self._written(layer, ends, groups):
            return self._call(layer, hidden, ends, attention, geometry if attention.given is None else None)

    def _call(
        self, layer: int, hidden: Tensor, rows: PackedRows, attention: Attention, geometry: Geometry | None
    ) -> Float[Tensor, "token d_model"]:
        self._tokens += len(hidden)
        arguments = {name: self._argument(name, layer, rows, geometry) for name in self.runs[0].calls[layer]}
        before = attention.calls
        with attending(attention):
            output = stream_of(self.plain(layer, hidden[None], arguments))[0]
        if attention.calls != before + 1:
            raise CannotReplayError("its attention is not reached through transformers' interface")
        return output

    def _argument(self, name: str, layer: int, rows: PackedRows, geometry: Geometry | None) -> Any:
        """A block's argument for packed tokens: what belongs to a position, for each token; no mask and no cache."""
        values = [run.calls[layer].get(name) for run in self.runs]
        first = values[0]
        if first is self.runs[0].cache or (isinstance(first, Tensor) and first.ndim == 4 and name == "attention_mask"):
            return None
        if isinstance(first, tuple) and first and all(isinstance(part, Tensor) for part in first):
            parts = zip(*values, strict=True)
            return tuple(self._at_tokens(name, part, rows, geometry) for part in parts)
        if isinstance(first, Tensor):
            return self._at_tokens(name, values, rows, geometry)
        if any(type(value) is not type(first) or value != first for value in values[1:]):
            raise CannotReplayError(f"its blocks take another {name!r} for prompts of another length")
        return first

    def _at_tokens(self, name: str, values: Sequence[Any], rows: PackedRows, geometry: Geometry | None) -> Tensor:
        key = tuple(map(id, values))
        if geometry is not None and key in geometry.gathered:
            return geometry.gathered[key]
        if key not in self._tables:
            parts = []
            for value, run in zip(values, self.runs, strict=True):
                if value.ndim == 1 and len(value) == run.length:  # cache_position
                    parts.append(value)
                elif (
                    name in ("position_ids", "position_embeddings") and value.ndim > 1 and value.shape[1] == run.length
                ):
                    parts.append(value[0])
                else:
                    raise CannotReplayError(
                        f"its blocks take an argument {name!r} {list(value.shape)} that cannot be packed"
                    )
            self._tables[key] = torch.cat(parts)
        table, lengths = self._tables[key], np.array([run.length for run in self.runs])
        token = np.repeat((np.cumsum(lengths) - lengths)[rows.chunk], rows.suffix) + rows.position
        found = table.index_select(0, to_device(token, table.device))
        found = found if values[0].ndim == 1 else found[None]
        if geometry is not None:
            geometry.gathered[key] = found
        return found

    def _edited(
        self, layer: int, hidden: Tensor, rows: PackedRows, groups: Sequence[EditGroup], last: bool
    ) -> Float[Tensor, "token d_model"]:
        """One block with edits in it, by the bridge's block, for rows that begin at one position at a time."""
        output = hidden.new_empty(len(rows), hidden.shape[-1]) if last else torch.empty_like(hidden)
        for at, chunk, some in rows.by_start():
            tokens = to_device(tokens_from(rows.first[at], rows.suffix[at]), hidden.device)
            mine = hidden[tokens].unflatten(0, (len(at), -1))
            with attached_edits(self.model, groups, some, self.chunks[chunk].lookup):
                found = self.by_start[chunk].hooked(layer, mine, some)
            if last:
                output[to_device(at, hidden.device)] = found[:, -1]
            else:
                output[tokens] = found.flatten(0, 1)
        return output
