"""What a patching sweep will take, before it starts: counted from a model's sizes, without its weights.

1. *Sizes* of the model come from its configuration (`sizes.py`).
2. *Block-tokens.* A row whose edit enters at block l and changes position s first costs (n_layers - l) x (length - s). Rows
   that change nothing, because the pair has not differed yet, cost nothing. Two unedited runs come on top.
3. *Batches.* Rows are cut into chunks of prompts and batches by the engine's own `Budget`, in the engine's own order: by the
   block where they enter, then by start. What is counted is what runs where rows are packed; in models whose attention takes no
   packed tokens a batch has one start, and there are more of them.
4. *Weights.* A batch reads the blocks from its first row's on. How often all blocks are read is what a model that does not fit
   its device waits for.

All pairs are taken to have one length and to differ first at one position, and the metric to read the last one. Block-tokens are
then exactly those of a sweep but for its proof, of which there is only an estimate.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, prod
from typing import Any, NamedTuple

import torch

from mechkit._bytes import as_bytes, shown_bytes
from mechkit._check import naming
from mechkit.engine._edits import Edit, EditPlan
from mechkit.engine._memory import Budget, _row_floats
from mechkit.engine._whole import TOGETHER
from mechkit.experiment.axes import check_dims
from mechkit.experiment.sizes import Sizes, sizes_of
from mechkit.hooks import SITES, HookedModel, get_site, record
from mechkit.hooks._sites import TOWER

READ = 2  # logits of a row that are read, as for one pair of answers
WHOLE = 5  # rows that the proof runs whole, as a rule
PARTS = ("head", "neuron")  # dims that a place of the stream has more of


@dataclass(frozen=True)
class Forecast:
    """What a sweep will take.

    Attributes:
        sizes: Of the model.
        site, over: What is patched, and the dims of the result.
        prompts, length, first_difference: The pairs that are assumed.
        cells: Questions.
        rows: Cells times prompts that are computed; the others change nothing.
        runs: Block-tokens of the unedited runs.
        replayed: Block-tokens of the rows.
        proof: Block-tokens of the proof, an estimate.
        naive: Block-tokens of one whole pass for each cell and prompt.
        chunks: How many prompts are recorded together, chunk by chunk.
        recorded: Bytes that one pair's recorded runs take: streams, keys and values, the source run's site.
        budget: Bytes of working memory, half for what is recorded and half for a batch.
        batches: How many batches of rows there are.
        largest: Bytes that the largest batch takes, as `Budget` counts them.
        rows_at_once: Rows in the batch that has most.
        streamed: How often the blocks are read with `stream=True`, at most: once to record a chunk of prompts, once for the
            proof's whole passes, and once for as many batches as may wait for one another.
        recordings, proofs, replays: How often the weights of all blocks are read: to record runs, to prove the replay, and by
            batches, each of which begins at the block of its first row.
    """

    sizes: Sizes
    site: str
    over: str
    prompts: int
    length: int
    first_difference: int
    cells: int
    rows: int
    runs: int
    replayed: int
    proof: int
    naive: int
    chunks: tuple[int, ...]
    recorded: Mapping[str, int]
    budget: int
    batches: int
    largest: int
    rows_at_once: int
    streamed: int
    recordings: int
    proofs: int
    replays: float

    @property
    def block_tokens(self) -> int:
        """What `Cost` of such a sweep reports without its proof: `block_tokens - proof_block_tokens`."""
        return self.runs + self.replayed

    @property
    def flop_per_block_token(self) -> float:
        """Arithmetic of a block on one token: two operations a parameter; scores of a whole prompt, and their values' sum."""
        sizes = self.sizes
        return 2 * sizes.block_parameters / sizes.n_layers + 4 * sizes.n_heads * sizes.d_head * self.length

    @property
    def flop(self) -> float:
        """Arithmetic in all blocks, the proof's estimate included. In the last block less is done than is counted here."""
        return (self.block_tokens + self.proof) * self.flop_per_block_token

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.sizes.parameters * self.sizes.dtype.itemsize

    @property
    def weight_passes(self) -> float:
        """How often the weights of all blocks are read, batch after batch."""
        return self.recordings + self.proofs + self.replays

    def lines(self, gflops: float | None = None) -> Iterator[str]:
        """The forecast in words, a line for each question; with the seconds that it takes at so many GFLOP/s."""
        sizes, whole, asked = self.sizes, self.naive / (self.block_tokens + self.proof), self.cells * self.prompts
        pairs = f"{_count(self.prompts, 'pair')} of {self.length} tokens that differ from position {self.first_difference} on"
        yield f"{self.site} over {self.over!r} of {sizes.name}: {self.cells:,} cells for {pairs}"
        unchanged = f"; the other {asked - self.rows:,} change nothing" if self.rows < asked else ""
        yield f"rows: {asked:,}, of which {self.rows:,} are computed{unchanged}"
        yield (
            f"block-tokens: {self.block_tokens:,} ({self.runs:,} for unedited runs, {self.replayed:,} for rows), and about "
            f"{self.proof:,} for the proof; whole passes take {self.naive:,}, {whole:.1f} times as many"
        )
        each = f"2 × {sizes.block_parameters / sizes.n_layers / 1e6:.3g} million parameters"
        yield (
            f"arithmetic: {_flop(self.flop)} in the blocks, {_flop(self.flop_per_block_token)} a block-token ({each}"
            f"{', all experts' if sizes.experts else ''}, and attention); whole passes "
            f"{_flop(self.naive * self.flop_per_block_token)}"
        )
        if gflops is not None:
            yield f"time: {self.flop / gflops / 1e9:,.3g} s at {gflops:,g} GFLOP/s"
        parts = ", ".join(f"{name} {shown_bytes(size)}" for name, size in self.recorded.items())
        recorded, n = shown_bytes(max(self.chunks) * sum(self.recorded.values())), len(self.chunks)
        at_once = f"{_count(max(self.chunks), 'pair')} at once"
        yield f"recorded: {recorded} for {at_once}, in {_count(n, 'chunk')}; a pair has {parts}"
        yield (
            f"batches: {self.batches:,}, the largest of {_count(self.rows_at_once, 'row')}, {shown_bytes(self.largest)}; "
            f"the budget is {shown_bytes(self.budget)}, half of it for what is recorded"
        )
        read = f"{self.recordings} to record, {self.proofs} to prove, {self.replays:,.1f} by batches"
        in_blocks = shown_bytes(sizes.block_parameters * sizes.dtype.itemsize)
        yield (
            f"weights: {shown_bytes(self.weight_bytes)}, {in_blocks} of them in the blocks, which are read "
            f"{self.weight_passes:,.1f} times ({read}); with stream=True, where batches go through each block together, "
            f"{self.streamed} times"
        )


def answer(
    name: str,
    sweep: str,
    *,
    prompts: int,
    length: int,
    first_difference: int = 0,
    budget: str | int | None = None,
    rate: float | None = None,
    **which: Any,
) -> str:
    """The forecast of a sweep that is written as `"z over layer head"`, in words.

    Args:
        name: The model, with `which` of `sizes_of`'s other arguments.
        sweep: The site and the dims.
        prompts, length, first_difference: As for `forecast`.
        budget: Bytes, or text such as `"4 GiB"`.
        rate: GFLOP/s, for an estimate of time.

    Raises:
        ValueError: what `sizes_of` and `forecast` refuse; a sweep or a budget that cannot be read.
    """
    site, over = (part.strip() for part in sweep.partition(" over ")[::2])
    if not over:
        raise ValueError(f"sweep: expected SITE over AXES, such as 'z over layer head', got {sweep!r}")
    with naming("budget"):
        room = None if budget is None else as_bytes(budget)
    pairs = {"prompts": prompts, "length": length, "first_difference": first_difference}
    return "\n".join(forecast(sizes_of(name, **which), site, over, **pairs, budget=room).lines(rate))


def forecast(
    sizes: Sizes,
    site: str,
    over: str,
    *,
    prompts: int,
    length: int,
    first_difference: int = 0,
    budget: int | None = None,
) -> Forecast:
    """What `activation_patching(model, pairs, metric, site, over)` will take.

    Args:
        sizes: The model's.
        site: Short name of a site in the blocks.
        over: Dims as in `activation_patching`, such as `"layer head"`.
        prompts: How many pairs.
        length: Tokens of each.
        first_difference: The first position at which clean and corrupted prompt differ.
        budget: Bytes of working memory; default half of what the device has free, 1 GiB on a CPU.

    Raises:
        ValueError: an unknown site or dim, a site outside the blocks, named positions, or pairs that cannot be.
    """
    found, dims = get_site(site), tuple(over.split())
    if found.stack == TOWER or not found.in_block:
        raise ValueError(f"site: expected one in the language model's blocks, such as 'z' or 'resid_pre', got {site!r}")
    check_dims(found, dims, over)
    if "position" in dims or "layer" not in dims:
        raise ValueError(
            f"over: expected 'layer' among the dims, and 'pos' for positions (names are the prompts' own), got {over!r}"
        )
    if not 0 <= first_difference < length:
        raise ValueError(
            f"first_difference: expected a position of the {length} tokens (0 to {length - 1}), got {first_difference}"
        )
    if sizes.longest is not None and length > sizes.longest:
        raise ValueError(f"length: expected at most {sizes.longest} tokens, the model's context, got {length}")
    starts = range(first_difference, length) if "pos" in dims else [first_difference]
    entries = [layer + (found.name == "resid_post") for layer in range(sizes.n_layers)]
    each = prod(
        sizes.site_size(found.name, found.dims[-1] if dim == "neuron" else dim, length) for dim in dims if dim in PARTS
    )
    cells = sizes.n_layers * (length if "pos" in dims else 1) * each
    model: Any = sizes
    room = Budget.of(model, budget)
    sites = [(found.name, layer) for layer in range(sizes.n_layers)]
    chunks, recordings = _chunks(prompts, room.prompts_at_once(model, length, sites, cells))
    batches = {
        n: _batches(sizes, room, found.name, length, [(*at, n * each) for at in product(entries, starts)])
        for n in set(chunks)
    }
    proved = [
        length - at for at in starts
    ]  # tokens from each start, which run through all blocks behind the first edit
    waiting = replace(room, waits=True).tokens_waiting(model)
    return Forecast(
        sizes=sizes,
        site=found.name,
        over=" ".join(dims),
        prompts=prompts,
        length=length,
        first_difference=first_difference,
        cells=cells,
        rows=prompts * each * len(entries) * len(starts),
        runs=2 * prompts * sizes.n_layers * length,
        replayed=prompts * each * sum(sizes.n_layers - entry for entry in entries) * sum(proved),
        proof=_proof(sizes.n_layers, length, entries, starts, len(chunks)),
        naive=cells * prompts * length * sizes.n_layers,
        chunks=chunks,
        recorded=_recorded(sizes, found.name, length),
        budget=room.bytes,
        batches=sum(batches[n].number for n in chunks),
        largest=max(one.bytes for one in batches.values()),
        rows_at_once=max(one.rows for one in batches.values()),
        streamed=2 * len(chunks) + sum(ceil(n * each * len(entries) * sum(proved) / waiting) for n in chunks),
        recordings=recordings,
        proofs=ceil(WHOLE * length / TOGETHER) + ceil(sum(proved) / TOGETHER) + len(chunks),
        replays=sum(batches[n].blocks for n in chunks) / sizes.n_layers,
    )


def _proof(n_layers: int, length: int, entries: Sequence[int], starts: Sequence[int], n_chunks: int) -> int:
    """About what the proof computes: some rows whole, all but one of them again by replay, and the blocks from every start; in
    further chunks from one start each."""
    half = (len(entries) - 1) // 2
    again = [(0, 0), (half, len(starts) // 2), (min(half + 1, len(entries) - 1), 0), (-1, -1)]
    each = [(n_layers - entries[0]) * (length - at) for at in starts]
    replayed = sum((n_layers - entries[entry]) * (length - starts[at]) for entry, at in again)
    further = sum(each[i % len(each)] for i in range(1, n_chunks))
    return WHOLE * n_layers * length + replayed + sum(each) + further


def _chunks(prompts: int, at_once: int) -> tuple[tuple[int, ...], int]:
    """How many prompts are recorded together, chunk by chunk, and in how many passes: one where both runs of a chunk fit."""
    chunks, passes = [], 0
    while prompts:
        passes += 1 if 2 * prompts <= at_once else 2
        chunks.append(min(prompts, at_once))
        prompts -= chunks[-1]
    return tuple(chunks), passes


class _Batches(NamedTuple):
    """How the rows of a chunk are cut: the number of batches, the blocks that they run through, and the largest of them."""

    number: int
    blocks: int
    rows: int
    bytes: int


def _batches(sizes: Sizes, budget: Budget, site: str, length: int, places: Sequence[tuple[int, int, int]]) -> _Batches:
    """The batches of rows that enter at a block, begin at a position, and are so many; in their order."""
    model: Any = sizes
    plan = EditPlan([(Edit(site, 0),)], sizes.n_layers)
    whole = budget.bytes // 2 // sizes.dtype.itemsize, budget.tokens or sys.maxsize
    number = blocks = rows = most_rows = most = 0
    left = (0, 0)  # of the batch that is being filled: numbers, and tokens
    for entry, start, n in places:
        row = _row_floats(model, length, length - start, plan, READ), length - start
        while n:
            fits = min(left[0] // row[0], left[1] // row[1])
            if not fits:  # a batch has one row at least
                left, rows, number, blocks = whole, 0, number + 1, blocks + sizes.n_layers - entry
                fits = max(1, min(left[0] // row[0], left[1] // row[1]))
            take = min(n, fits)
            n, rows, left = n - take, rows + take, (left[0] - take * row[0], left[1] - take * row[1])
            most_rows, most = max(most_rows, rows), max(most, whole[0] - left[0])
    return _Batches(number, blocks, most_rows, most * sizes.dtype.itemsize)


def _recorded(sizes: Sizes, site: str, length: int) -> dict[str, int]:
    """Bytes that are kept of one pair, by what they are."""
    sites = sizes.n_layers * prod(sizes.site_size(site, dim, length) for dim in SITES[site].dims)
    streams = (sizes.n_layers + 2) * length * sizes.d_model  # the base run's, and the source run's last one
    keys = 2 * sizes.n_layers * length * sizes.n_kv_heads * sizes.d_head
    item = sizes.dtype.itemsize
    return {"streams": streams * item, "keys and values": keys * item, site: sites * item}


def _flop(n: float) -> str:
    """`"1.5 GFLOP"`."""
    units = ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"]
    while n >= 1000 and len(units) > 1:
        n, units = n / 1000, units[1:]
    return f"{n:.3g} {units[0]}"


def _count(n: int, what: str) -> str:
    return f"1 {what}" if n == 1 else f"{n:,} {what}s"


# -- of a model that is loaded ------------------------------------------------------------------------------------------


def recorded_of(model: HookedModel, sites: Sequence[tuple[str, int]], length: int) -> int:
    """Bytes that the recorded runs of one pair take. Two short pairs are recorded as a sweep does it, and counted; residuals,
    keys, values and z grow with the length by as much for every token."""

    def counted(n: int) -> int:
        tokens = torch.zeros(1, n, dtype=torch.long, device=model.device)
        with torch.no_grad():
            base, source = record(model, tokens), record(model, tokens, sites, blocks=False)
        kept = [*base.resid, *source.resid, *source.sites.values()]
        kept += [part for layer in base.cache.layers for part in (layer.keys, layer.values) if part is not None]
        return sum(part.nbytes for part in kept)

    two, one = counted(2), counted(1)
    return one + (length - 1) * (two - one)


def block_tokens(n_layers: int, n_heads: int, over: str, prompts: int, length: int) -> int:
    """What an exact sweep computes where pairs differ from the first token on and the metric reads the last position: two runs
    a prompt, and every cell's row, from its block and position on. What the proof takes comes on top, a few per cent."""
    starts = range(length) if "pos" in over else [0]
    heads = n_heads if "head" in over else 1
    runs = 2 * prompts * n_layers * length
    rows = prompts * heads * sum((n_layers - layer) * (length - at) for layer in range(n_layers) for at in starts)
    return runs + rows
