"""Attention patterns as a labelled result: for every head, how much each position attends to each other one.

1. Prompts of equal length run together; nothing is padded.
2. Every layer's pattern (or its scores, before the softmax) is copied as the model computes it.
3. The scores show where the mask is: there the model puts a number so low that no query and key could give it. Such a cell does
   not exist, and neither does one at a position that a shorter prompt lacks: both are NaN. A source that is seen but gets
   nothing is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechkit._check import checked
from mechkit._precision import widen
from mechkit._progress import Progress
from mechkit.engine import Budget, check_can_run
from mechkit.experiment.axes import choose_indices
from mechkit.experiment.positions import position_labels, split_prompts
from mechkit.experiment.provenance import pictures_of, provenance_of
from mechkit.hooks import HookedModel, one_at_a_time, record
from mechkit.prompts import AnyPrompts, Stacked, as_prompts
from mechkit.result import Result

_MASKED = -1e8  # masks are -1e9, the dtype's lowest number or minus infinity; half precision has its own limit


@checked
@one_at_a_time
@torch.no_grad()
def attention_patterns(
    model: HookedModel,
    prompts: AnyPrompts,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    scores: bool = False,
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """The attention of every head, from each destination to each source position.

    The numbers are those that `model.run_with_cache(tokens, "pattern")` keeps for the same batch, bit for bit (half precision is
    widened). The result holds `layers * heads * length² * prompts` of them: 12 × 12 heads and 512 tokens are 151 MB per prompt
    in float32.

    Args:
        model: In evaluation mode. Hooks that are attached take part: the pattern is the one that the model then uses.
        prompts: Of any lengths. Of pairs, the clean prompts.
        layers, heads: Restrict those dims.
        scores: Give the scores before the softmax instead (with all that the model adds to them, such as ALiBi's slopes).
        budget: Bytes of working memory in addition to the result; default half of the GPU's free memory, 1 GiB on a CPU.
        progress: Show a progress bar when it takes long.

    Returns:
        A `Result` with dims `("layer", "head", "dest", "src", "prompt")` and no baseline, on the CPU: attention from 0 to 1
        (unit `"attention"`), or scores (unit `"logits"`). A destination's attention sums to 1 over its sources, except in models
        with attention sinks outside the prompt. NaN where the mask hides the source (later positions in a causal model, those
        outside the window in a sliding-window layer) and where a prompt lacks the position. Positions are labelled
        `'" Mary" 3'` where all prompts have that text, else by their number; with several prompts the provenance has each
        prompt's own tokens (`"str_tokens"`).

    Raises:
        ValueError: training mode, a model without patterns (state-space models), an index out of range, prompts that the model
            cannot read.

    Example:
        >>> mk.plot.attention(attention_patterns(model, pairs), layer=9, head=6)
    """
    prompts = as_prompts(model, prompts)
    check_can_run(model)
    rows, _, task = split_prompts(prompts)
    check_can_run(model, {"prompt": rows})
    chosen = choose_indices("layers", layers, model.n_layers), choose_indices("heads", heads, model.n_heads)
    # Raises if this architecture lacks them in one of the layers.
    model.hook_names([(site, layer) for layer in chosen[0] for site in ("pattern", "attn_scores")])
    longest = int(rows.lengths.max())
    shape = (*map(len, chosen), longest, longest, len(rows))
    values = torch.full(shape, torch.nan, dtype=widen(torch.zeros((), dtype=model.dtype)).dtype)
    memory = Budget.of(model, budget)
    with Progress(len(rows), "prompt", progress) as bar:
        for batch in rows.batches(lambda length, _: memory.prompts_at_once(model, length, [("pattern", 0)] * 3)):
            _run(model, batch.stacked, _Target(values, batch.ids, *chosen, scores))
            bar.update(len(batch))
    labels = position_labels(rows, range(longest))
    given: dict[str, Any] = {"technique": "attention_patterns", "task": task, "scores": scores}
    if len(rows) > 1 and rows.str_tokens is not None:
        given["str_tokens"] = [list(row) for row in rows.str_tokens]
    return Result(
        values=values,
        dims=("layer", "head", "dest", "src", "prompt"),
        coords={
            "layer": tuple(chosen[0]),
            "head": tuple(chosen[1]),
            "dest": labels,
            "src": labels,
            "prompt": tuple(range(len(rows))),
        },
        baseline={},
        base="",
        metric="attention score" if scores else "attention",
        unit="logits" if scores else "attention",
        provenance=provenance_of(model, rows, **given),
        pictures=pictures_of(rows),
    )


@dataclass(frozen=True)
class _Target:
    """Where one batch's patterns go: `values[:, :, :length, :length, ids]`."""

    values: Float[Tensor, "layer head dest src prompt"]
    ids: list[int]
    layers: list[int]
    heads: list[int]
    scores: bool


def _run(model: HookedModel, rows: Stacked, target: _Target) -> None:
    """Runs a batch and writes every layer's part as it is computed."""
    masks: dict[int, Bool[Tensor, "batch chosen dest src"]] = {}
    hooks: list[Any] = []
    for row, layer in enumerate(target.layers):
        hooks.append((("attn_scores", layer), partial(_keep_scores, row=row, target=target, masks=masks)))
        if not target.scores:
            hooks.append((("pattern", layer), partial(_keep_pattern, row=row, target=target, masks=masks)))
    with model.hooks(hooks):
        record(model, rows, blocks=False)


def _keep_scores(
    scores: Float[Tensor, "batch head dest src"], hook: Any, *, row: int, target: _Target, masks: dict[int, Tensor]
) -> None:
    lowest = max(torch.finfo(scores.dtype).min / 2, _MASKED)
    masks[row] = scores[:, target.heads] <= lowest
    if target.scores:
        _write(scores, masks.pop(row), row, target)


def _keep_pattern(
    pattern: Float[Tensor, "batch head dest src"], hook: Any, *, row: int, target: _Target, masks: dict[int, Tensor]
) -> None:
    _write(pattern, masks.pop(row), row, target)


def _write(
    activation: Float[Tensor, "batch head dest src"],
    masked: Bool[Tensor, "batch chosen dest src"],
    row: int,
    target: _Target,
) -> None:
    kept = activation[:, target.heads]
    n_batch, _, length, n_sources = kept.shape
    if n_batch != len(target.ids) or n_sources != length:
        raise ValueError(
            f"model: expected attention among the {length} tokens of {len(target.ids)} prompts in layer "
            f"{target.layers[row]}, got {list(kept.shape)} for [batch head dest src]: it attends to more than the prompt"
        )
    kept = kept.to(target.values.dtype).masked_fill(masked, torch.nan).cpu()
    target.values[row, :, :length, :length, target.ids] = kept.permute(1, 2, 3, 0)
