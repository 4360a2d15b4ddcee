"""Trust, but verify: replayed rows are compared with whole forward passes before any of them is believed.

1. A few rows are chosen where a wrong assumption would show (`_sample`).
2. Base and source run must end in the same residual stream wherever they have read the same tokens.
3. The rows are replayed, with plain blocks first (fused attention, then eager) and then with the bridge's own, and run whole.
   Their logits must agree to rounding; else whole forward passes are run for all rows, and the reason is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mechkit.hooks._chunk import Chunk, first_differences, whole_forward
from mechkit.hooks._edits import NEVER, Rows, rows_by_start
from mechkit.hooks._memory import out_of_memory
from mechkit.hooks._plain import Attention, PlainBlocks, can_fuse
from mechkit.hooks._precision import TOLERANCE
from mechkit.hooks._replay import CannotReplayError, Replayer

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel


def proved_replayer(chunk: Chunk, start: np.ndarray, absent: np.ndarray) -> Replayer | None:
    """A replayer that was proved on a sample of these rows, or `None` where whole forward passes must be run."""
    state, model = chunk.state, chunk.state.model
    if not state.replay:
        state.fallback = "asked for"
    elif not state.unembeds:
        state.fallback = "the logits are not the final norm and unembedding of the last block's output"
    elif (state.plan.entry < 0).any():
        state.fallback = "an edit before the first block"
    elif model.has_hooks:
        state.fallback = "other hooks are attached to the model"
    else:
        skips = bool((start == NEVER).any()), bool(((start > 0) & (start < NEVER)).any())
        if skips not in state.proofs:
            proof = _prove(chunk, start, absent)
            if proof is None:
                return Replayer(model, chunk.run, None)  # all prompts lack the cells' positions: there are no rows
            state.proofs[skips] = proof
        if state.proofs[skips].refuted is None:
            return Replayer(model, chunk.run, _blocks(model, state.proofs[skips].plain))
        state.fallback = state.proofs[skips].refuted
    return None


@dataclass(frozen=True)
class Proof:
    """What was found when replayed rows were compared with whole forward passes.

    Attributes:
        plain: The attention of the plain blocks that may be used where nothing is edited; `None` for the bridge's own blocks.
        refuted: Why replaying is not possible; `None` if it is.
    """

    plain: Attention | None
    refuted: str | None


def _prove(chunk: Chunk, start: np.ndarray, absent: np.ndarray) -> Proof | None:
    """Tries plain blocks first (with fused attention, then without), then the bridge's. `None` if there was nothing to try."""
    moving, still = _sample(chunk, start, absent)
    if moving is None and still is None:
        return None
    if not _equal_before_the_first_difference(chunk):
        return Proof(plain=None, refuted="the two runs differ before their first different token: not a causal model")
    model, refuted = chunk.state.model, None
    fused: tuple[Attention, ...] = ("sdpa",) if can_fuse(model.bridge, chunk.run.calls) else ()
    for plain in (*fused, "eager", None):
        refuted = _refute(chunk, moving, still, _blocks(model, plain))
        if refuted is None:
            return Proof(plain, None)
    return Proof(None, refuted)


def _blocks(model: HookedModel, plain: Attention | None) -> PlainBlocks | None:
    return None if plain is None else PlainBlocks(model.bridge, plain)


def _equal_before_the_first_difference(chunk: Chunk) -> bool:
    """Whether base and source run end in the same residual stream wherever they have read the same tokens."""
    if chunk.source is None:
        return True
    base, source = chunk.run.resid[-1], chunk.source.resid[-1]
    positions = torch.arange(chunk.run.length, device=base.device)
    shared = positions < torch.from_numpy(first_differences(chunk.state, chunk.ids)).to(base.device)[:, None]
    largest = (base - source).abs().amax(-1)[shared].max() if bool(shared.any()) else torch.zeros(())
    return not float(largest) > TOLERANCE[chunk.state.model.dtype] * float(base.abs().max())


def _refute(chunk: Chunk, moving: Rows | None, still: Rows | None, plain: PlainBlocks | None) -> str | None:
    """Why replaying does not give the logits of the sampled rows' whole forward passes; `None` if it does."""
    state, model = chunk.state, chunk.state.model
    try:
        replayer = Replayer(model, chunk.run, plain)
        pairs = []
        if moving is not None:
            resid = replayer.replay(state.plan, moving, chunk.lookup, state.reads_last)
            pairs.append((model.unembed(resid[:, -1]), whole_forward(chunk, moving)[:, -1]))
        if still is not None:
            pairs.append((chunk.run.last_logits[still.prompt], whole_forward(chunk, still)[:, -1]))
    except (CannotReplayError, TypeError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        return f"blocks cannot be replayed: {error}"
    state.block_tokens += replayer.block_tokens
    for replayed, expected in pairs:
        difference = _difference(replayed, expected)
        if difference > TOLERANCE[model.dtype]:
            return f"replayed rows differ from whole forward passes by {difference:.1e} of the logits' spread"
    return None


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of logits `[row d_vocab]`, as a share of their spread around each row's mean."""
    found, expected = (x.double() - x.double().mean(-1, keepdim=True) for x in (found, expected.to(found.device)))
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _sample(chunk: Chunk, start: np.ndarray, absent: np.ndarray) -> tuple[Rows | None, Rows | None]:
    """A few rows where a wrong assumption would show: of the rows that skip the most positions with the most blocks still
    to come, the first, a middle and the last to join, as one batch; and one row that is presumed to change nothing."""
    plan, moving, still = chunk.state.plan, None, None
    candidates = np.argwhere((start < NEVER) & ~absent)
    if len(candidates):
        entry, began = plan.entry[candidates[:, 0]], start[candidates[:, 0], candidates[:, 1]]
        deepest = began[np.lexsort((-began, entry))[0]]
        together = next(
            rows for rows in rows_by_start(plan, chunk.ids, start, (start == deepest) & ~absent) if len(rows)
        )
        n = len(together)
        moving = together[np.unique([0, n // 2, n - 1])]
    unmoved = np.argwhere((start == NEVER) & ~absent)
    if len(unmoved):
        cell, prompt = unmoved[np.argmin(plan.entry[unmoved[:, 0]])]
        still = Rows(np.array([cell]), np.array([prompt]), chunk.ids[[prompt]], 0)
    return moving, still
