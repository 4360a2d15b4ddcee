"""The attention of packed tokens in few calls, for passes with gradients: rows of about the same lengths are padded.

In a sweep rows of different lengths never share a softmax (`mechkit.engine._packed_attention`), and each length has a call of its
own. With gradients a call costs several times as much, whatever its size, and there are as many again in the backward pass.
Here shorter rows are padded in their queries, whose outputs are dropped, and in their keys, which nothing sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit.engine._packed_attention import SHORT, Attention, Geometry, keys_of
from mechkit.engine._packing import PackedRows
from mechkit.hooks._devices import to_device
from mechkit.hooks._record import CannotReplayError, Run


class _Together:
    """Rows that attend in one call, among the tokens of all packed rows."""

    def __init__(self, rows: PackedRows, at: Int[np.ndarray, "row"], device: torch.device) -> None:
        self.chunk, self.prompt, self.length = rows.chunk[at], rows.prompt[at], rows.length[at]
        suffix, start = rows.suffix[at], rows.start[at]
        place = np.minimum(np.arange(int(suffix.max())), suffix[:, None] - 1)  # shorter rows repeat their last token
        self.position = start[:, None] + place
        self.width = (
            keys_of(int(self.length.max()), torch.float32) if len(set(self.length)) > 1 else int(self.length[0])
        )
        real = np.arange(place.shape[1]) < suffix[:, None]
        tokens = rows.first[at][:, None] + place
        self.tokens, self.own = to_device(tokens, device), to_device(tokens[real], device)
        self.real = to_device(np.flatnonzero(real), device)
        self.row, self.at = (to_device(x, device) for x in (np.nonzero(real)[0], self.position[real]))
        self.masks: dict[tuple[int, ...], Tensor | None] = {}

    def joined(
        self, runs: Sequence[Run], layer: int, which: str, new: Float[Tensor, "head token d"]
    ) -> Float[Tensor, "row head key d"]:
        """Keys or values: those of the source runs before each row's start, its own from there on, 0 behind its end."""
        past = new.new_zeros(len(self.prompt), self.width, new.shape[0], new.shape[2])
        for chunk in np.unique(self.chunk):
            mine = self.chunk == chunk
            kept = getattr(runs[chunk].cache.layers[layer], which)
            prompt = to_device(self.prompt[mine], kept.device)
            past[to_device(np.flatnonzero(mine), past.device), : kept.shape[2]] = kept[prompt].transpose(1, 2)
        return past.index_put((self.row, self.at), new[:, self.own].transpose(0, 1)).transpose(1, 2)

    def mask(self, runs: Sequence[Run], layer: int) -> Tensor | None:
        """What each query sees, `[row head query key]`, from the masks of the recorded runs."""
        masks = [runs[chunk].calls[layer].get("attention_mask") for chunk in self.chunk]
        key = tuple(map(id, masks))
        if key not in self.masks:
            rows = zip(masks, self.length.tolist(), self.position, strict=True)
            self.masks[key] = torch.stack([self._seen(*row) for row in rows])
        return self.masks[key]

    def _seen(self, mask: Any, length: int, position: Int[np.ndarray, "query"]) -> Float[Tensor, "head query key"]:
        if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2] != length:
            raise CannotReplayError("its blocks take no mask that says what each position sees")
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        seen = mask[0][:, to_device(position, mask.device)]
        return torch.nn.functional.pad(seen, (0, self.width - length), value=hidden)


class GeometryTogether(Geometry):
    """How the tokens of some rows are taken apart for attention: rows of any lengths that are about the same."""

    def __init__(self, rows: PackedRows, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(rows[:0])
        self.rows = rows
        length, size = rows.length, np.maximum(np.stack([rows.length, rows.suffix]), SHORT)
        # In double precision rows of several lengths stay apart: see `keys_of`.
        classes = np.stack([length, length * 0]) if dtype == torch.float64 else np.ceil(np.log2(size)).astype(np.int64)
        _, kind = np.unique(classes, axis=1, return_inverse=True)
        self.parts = [_Together(rows, np.flatnonzero(kind.reshape(-1) == one), device) for one in np.unique(kind)]
        self.back = torch.cat([part.own for part in self.parts]).argsort()


class AttentionTogether(Attention):
    """One block's attention over packed tokens, with as few calls as their lengths allow."""

    def __init__(self, runs: Sequence[Run], layer: int, geometry: GeometryTogether) -> None:
        super().__init__(runs, layer, geometry)
        self._parts, self._back = geometry.parts, geometry.back

    def __call__(
        self, function: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor:
        self.calls += 1
        outputs = []
        for part in self._parts:
            queries = query[0][:, part.tokens].transpose(0, 1)
            keys = part.joined(self.runs, self.layer, "keys", key[0])
            values = part.joined(self.runs, self.layer, "values", value[0])
            found = function(module, queries, keys, values, part.mask(self.runs, self.layer), **options)[0]
            outputs.append(found.flatten(0, 1)[part.real])
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)[self._back])[None]
