"""Several metrics read off the same runs: one metric that reads all that they need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mechkit.metrics._metric import AnyMetric, CallableMetric, Metric, metric_for
from mechkit.prompts import PromptPairs, Prompts


def metrics_for(metric: AnyMetric | Sequence[AnyMetric], prompts: PromptPairs | Prompts) -> Metric | CallableMetric:
    """As `metric_for`; several become one that is read in one sweep (`joint`).

    Raises:
        ValueError: no metric at all; a plain function of logits among several; what `metric_for` and `joint` refuse.
    """
    if not isinstance(metric, Sequence):
        return metric_for(metric, prompts)
    parts = []
    for i, one in enumerate(metric):
        part = metric_for(one, prompts)
        if not isinstance(part, Metric):
            raise ValueError(
                f"metric[{i}]: expected one of mechkit's metrics, which know what they read; {part.name!r} is a plain function "
                "of all logits, which must be given alone"
            )
        parts.append(part)
    if not parts:
        raise ValueError("metric: expected at least one, got none")
    return joint(parts)


def joint(metrics: Sequence[Metric]) -> Metric:
    """A metric with a value for each of several, `[row metric]`, made for the same prompts.

    It reads the positions and the tokens of all of them, and each gets its own.

    Raises:
        ValueError: some compare with the clean run, others with the corrupted one.
    """
    parts = tuple(metrics)
    references = {one.reference for one in parts} - {None}
    if len(references) > 1:
        raise ValueError(
            "metric: expected metrics that compare with the same run; some compare with the clean one, some with the corrupted"
        )
    first = parts[0]
    same_place = all(one.positions.ndim == 1 and torch.equal(one.positions, first.positions) for one in parts)
    places = [one.positions.reshape(first.n_prompts, -1) for one in parts]
    ends = torch.tensor([at.shape[1] for at in places]).cumsum(0).tolist()
    whole = any(one.tokens is None for one in parts)
    tokens = None if whole else torch.cat([one.tokens for one in parts if one.tokens is not None]).unique()

    def read(logits: Tensor, prompt: Tensor, reference: Tensor | None) -> Tensor:
        values = []
        for one, at, end in zip(parts, places, ends, strict=True):

            def mine(of: Tensor, one: Metric = one, begin: int = end - at.shape[1], end: int = end) -> Tensor:
                of = of if same_place else of[:, begin] if one.positions.ndim == 1 else of[:, begin:end]
                if one.tokens is None:
                    return of
                column = one.tokens if tokens is None else torch.searchsorted(tokens, one.tokens)
                return of[..., column.to(of.device, non_blocking=True)]

            compared = None if reference is None or one.reference is None else mine(reference)
            values.append(one.read(mine(logits), prompt, compared))
        return torch.stack(values, -1)

    return Metric(
        name=", ".join(one.name for one in parts),
        unit="",
        n_prompts=first.n_prompts,
        positions=first.positions if same_place else torch.cat(places, 1),
        tokens=tokens,
        read=read,
        reference=next(iter(references), None),
        lengths=next((one.lengths for one in parts if one.lengths is not None), None),
        parts=parts,
    )
