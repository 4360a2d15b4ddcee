"""How many rows and prompts go into memory at once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mechkit.engine._edits import EditPlan
from mechkit.hooks._sites import SITES, TOWER
from mechkit.hooks._streamed import streamed_of

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel

CPU_BUDGET = 2**30
# On a CPU a batch's intermediates should stay in the cache: measured, more tokens than this at once are slower.
CPU_TOKENS = 1024
SMALLEST = 2**20  # bytes of a budget that is not halved again
ROW_BYTES = 64  # indices of one row while it is scheduled


@dataclass
class Budget:
    """Bytes that a sweep may use in addition to the model: half for the recorded runs, half for the batch in replay; where rows
    wait for one another (`AnswersInStep`) a quarter for the runs, and one for the streams of rows that wait."""

    bytes: int
    tokens: int | None
    waits: bool = False

    @property
    def of_runs(self) -> int:
        return self.bytes // (4 if self.waits else 2)

    def tokens_waiting(self, model: HookedModel) -> int:
        """Tokens whose streams may wait: each twice for the moment in which rows join."""
        return max(1, self.bytes // 4 // (2 * model.d_model * _item_size(model)))

    @classmethod
    def of(cls, model: HookedModel, budget: int | None) -> Budget:
        """The user's, or half of what the device has free: of several GPUs, the one that has least."""
        if budget is not None and budget <= 0:
            raise ValueError(f"budget: expected a positive number of bytes, got {budget}")
        gpus = [device for device in model.devices if device.type == "cuda"]
        if budget is None:
            budget = min((_free(gpu) for gpu in gpus), default=2 * CPU_BUDGET) // 2
        waits = streamed_of(getattr(model, "bridge", None)) is not None
        return cls(budget, None if gpus else CPU_TOKENS, waits)

    def halve(self) -> None:
        """After the device ran out of memory."""
        self.bytes //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def rows_at_once(
        self, model: HookedModel, length: int, suffix: int, plan: EditPlan, logits: int = 0, tower_tokens: int = 0
    ) -> int:
        """Rows of `suffix` positions, of which `logits` logits each are made, that may run in one batch; with `tower_tokens`
        (block, position) pairs of a vision tower in each."""
        floats = _row_floats(model, length, suffix, plan, logits)
        positions = 0
        if tower_tokens:
            tower = model.stacks[TOWER]
            positions = tower_tokens // tower.n_layers
            seen = model.site_size(f"{TOWER}.resid_pre", "pos", length)  # by each patch: those of its tile
            floats = max(floats, positions * (10 * tower.d_model + 4 * tower.d_mlp + 4 * tower.n_heads * seen))
        fits = self.bytes // 2 // (floats * _item_size(model))
        if self.tokens is not None:
            fits = min(fits, self.tokens // max(suffix, positions))
        return max(1, fits)

    def packed_rows_at_once(
        self, model: HookedModel, length: np.ndarray, suffix: np.ndarray, plan: EditPlan, logits: int
    ) -> int:
        """How many of these rows, in their order, may run in one packed batch."""
        floats = np.cumsum(_row_floats(model, length, suffix, plan, logits))
        fits = int(np.searchsorted(floats, self.bytes // 2 // _item_size(model), "right"))
        if self.tokens is not None:
            fits = min(fits, int(np.searchsorted(np.cumsum(suffix), self.tokens, "right")))
        return max(1, fits)

    def prompts_at_once(
        self, model: HookedModel, length: int, sites: Collection[tuple[str, int]], n_cells: int = 0
    ) -> int:
        """Prompts whose recorded runs (with these sites), and the bookkeeping of their rows, may be kept together."""
        kv = 2 * model.n_kv_heads * model.d_head
        floats = length * model.n_layers * (model.d_model + kv)
        floats += sum(_site_floats(model, site, length) for site, _ in sites)
        floats += length * (4 * model.n_heads * length + 4 * (getattr(model.cfg, "d_mlp", None) or 4 * model.d_model))
        return max(1, self.of_runs // (floats * _item_size(model) + ROW_BYTES * n_cells))

    def prompts_with_gradients(
        self, model: HookedModel, length: int, suffix: int, sites: Collection[tuple[str, int]]
    ) -> int:
        """Prompts that may run together when the last `suffix` positions of each are kept for a backward pass."""
        heads, kv, head, width = model.n_heads, model.n_kv_heads, model.d_head, model.d_model
        neurons = getattr(model.cfg, "d_mlp", None) or 4 * width
        layer = suffix * (10 * width + 5 * neurons + 4 * heads * head + 4 * heads * length)
        layer += length * head * (4 * kv + 2 * heads)  # keys and values, and their copies for every query head
        floats = model.n_layers * layer + sum(_site_floats(model, site, length) * suffix // length for site, _ in sites)
        return max(1, self.bytes // (floats * _item_size(model)))


def _row_floats(model: HookedModel, length: Any, suffix: Any, plan: EditPlan, logits: int) -> Any:
    """Numbers that are in memory for one row of `suffix` positions; for many where these are arrays."""
    heads, kv, head, width = model.n_heads, model.n_kv_heads, model.d_head, model.d_model
    neurons = max(getattr(model.cfg, "d_mlp", None) or 0, 4 * width)
    floats = suffix * (10 * width + 4 * neurons + 4 * heads * length)  # residuals, MLP, scores and patterns
    floats = floats + length * head * (4 * kv + 2 * heads)  # keys and values, and their copies for every query head
    floats = floats + 4 * logits  # and their softmax
    if any(group.site.name == "result" for group in plan):
        floats = floats + suffix * 3 * heads * width
    return floats


def _site_floats(model: HookedModel, site: str, length: int) -> int:
    return prod(model.site_size(site, dim, length) for dim in SITES[site].dims)


def _item_size(model: HookedModel) -> int:
    return torch.empty((), dtype=model.dtype).element_size()


def _free(gpu: torch.device) -> int:
    """Bytes that can be had on a GPU: what nobody has, and what torch keeps of what it no longer uses."""
    return torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
