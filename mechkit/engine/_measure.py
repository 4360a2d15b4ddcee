"""How every technique reads a metric off logits. No other module does.

1. A metric is checked against the prompts that are run (`check_metric`).
2. A `Metric` reads each row independently, and is given the row's prompt (`read_metric`).
3. Any other function of logits gets all prompts of the set together, each once and in order (`call_metric`). Techniques
   sort prompts and run them in chunks and batches, several edits at a time; so rows are first sorted into sets. A set that lacks
   prompts is completed with unedited runs: then the function must treat each prompt independently, which is tested
   (`check_takes_prompts_apart`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._precision import widen
from mechkit.engine._memory import Budget
from mechkit.hooks._devices import to_device
from mechkit.metrics import CallableMetric, Metric, one_a_prompt
from mechkit.prompts import PromptPairs, Prompts, chosen_prompts

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel


def check_metric(model: HookedModel, prompts: Prompts, metric: Metric | CallableMetric, runs: Collection[str]) -> None:
    """Raises `ValueError` unless the metric was made for these prompts and this vocabulary, and what it compares with is run.
    A callable, which knows of none of these, needs prompts of one length.

    Args:
        runs: Which of `"clean"` and `"corrupted"` are run.
    """
    if isinstance(metric, CallableMetric):
        if len(found := sorted(prompts.by_length())) > 1:
            raise ValueError(
                f"metric: a plain callable needs prompts of one length, got lengths {found}. Use one of mechkit's metrics, "
                "which know where each prompt ends, or pass prompts of one length"
            )
        if len(prompts.groups()) > 1:
            raise ValueError(
                "metric: a plain callable needs prompts that run together, got pictures of several sizes or at several "
                "positions. Use one of mechkit's metrics, or pass prompts with pictures of one size at one place"
            )
        return
    metric.check(prompts)
    lengths = prompts.lengths
    read_at = metric.positions.reshape(len(lengths), -1)
    if not bool(((read_at >= 0) & (read_at < lengths[:, None])).all()):
        raise ValueError(
            f"metric: expected positions within the prompts (lengths {lengths.tolist()}), got {metric.positions.tolist()}"
        )
    if metric.tokens is not None and int(metric.tokens.max()) >= model.d_vocab:
        raise ValueError(
            f"metric: expected answer tokens in 0..{model.d_vocab - 1} (the model's vocabulary), got "
            f"{int(metric.tokens.max())}"
        )
    if metric.reference is not None and metric.reference not in runs:
        raise ValueError(
            f"metric: {metric.name!r} compares with the {metric.reference} run, but only {' and '.join(runs)} is run here"
        )


def read_metric(
    metric: Metric,
    logits: Float[Tensor, "row token"] | Float[Tensor, "row place token"],
    ids: Int[Tensor, "row"],
    reference: Float[Tensor, "row token"] | Float[Tensor, "row place token"] | None = None,
) -> Float[Tensor, "row *metric"]:
    """The metric of each row, in the graph; of several that are read together, each.

    Args:
        metric: What to read.
        logits: Of the metric's tokens, where it reads.
        ids: Which of the metric's prompts each row is.
        reference: The logits of the unedited run that the metric compares with, where it does.
    """
    value = metric.read(widen(logits), ids.to(logits.device, non_blocking=True), reference)
    return one_a_prompt(metric, value, len(ids))


def call_metric(
    metric: CallableMetric,
    logits_of: Callable[[np.ndarray], Float[Tensor, "some pos d_vocab"]],
    ids: Int[np.ndarray, "row"],
    n_prompts: int,
    others: Callable[[], Float[Tensor, "prompt pos d_vocab"]] | None = None,
) -> Float[Tensor, "row"]:
    """A function of logits for each row, in the graph; it is called once for each set of rows.

    Args:
        metric: The function.
        logits_of: The logits of some of the rows (indices), in the order that is asked for.
        ids: Which of all prompts each row is. The k-th rows of all prompts are a set.
        n_prompts: How many prompts there are in all.
        others: The logits of all prompts, in their order, for what a set lacks; without it, no set may lack any.

    Raises:
        ValueError: the function does not return one value per prompt.
    """
    order, values = _sets(ids), []
    for rows in order:
        logits = widen(logits_of(rows))
        lacking = len(rows) < n_prompts
        if lacking:
            assert others is not None, "a callable sees all prompts of a set together"
            logits = widen(others()).index_copy(0, to_device(ids[rows], logits.device), logits)
        value = one_a_prompt(metric, metric.fn(logits), n_prompts)
        values.append(value[to_device(ids[rows], value.device)] if lacking else value)
    found = torch.cat(values)
    return found[to_device(np.concatenate(order).argsort(), found.device)]


def _sets(ids: Int[np.ndarray, "row"]) -> list[np.ndarray]:
    """Rows that belong together: the first row of every prompt, the second, and so on; each set in the prompts' order."""
    order = ids.argsort(kind="stable")
    by_prompt = ids[order]
    times = np.arange(len(ids)) - np.searchsorted(by_prompt, by_prompt)  # how often the prompt came before
    return [order[times == k] for k in range(times.max() + 1)]


def logits_at_hand(
    logits: Float[Tensor, "row pos d_vocab"],
) -> Callable[[np.ndarray], Float[Tensor, "some pos d_vocab"]]:
    """Logits that are already computed, for `call_metric`."""
    return lambda rows: logits[to_device(rows, logits.device)]


@torch.inference_mode(False)
@torch.no_grad()
def metric_of_some(
    model: HookedModel, pairs: PromptPairs, metric: Metric | CallableMetric, index: Sequence[int]
) -> Metric | CallableMetric:
    """The metric of `pairs[index]`.

    A function of logits still sees all prompts: those that are left out as they are in the unedited clean run.

    Raises:
        ValueError: a function that does not take each prompt by itself.
    """
    ids = chosen_prompts(index, len(pairs))
    if isinstance(metric, Metric):
        return metric[ids]
    if ids == list(range(len(pairs))):
        return metric
    clean = _logits(model, pairs.clean, metric)
    check_takes_prompts_apart(metric, clean)

    def some(logits: Tensor) -> Tensor:
        return call_metric(metric, logits_at_hand(logits), np.array(ids), len(pairs), lambda: clean)

    return CallableMetric(some, metric.name, metric.unit)


@torch.inference_mode(False)
@torch.no_grad()
def check_parts(model: HookedModel, pairs: PromptPairs, metric: CallableMetric) -> None:
    """Raises `ValueError` for a function of logits that does not take each prompt by itself, before parts of them are run."""
    check_takes_prompts_apart(metric, _logits(model, pairs.clean, metric))


def check_takes_prompts_apart(metric: CallableMetric, logits: Float[Tensor, "prompt pos d_vocab"]) -> None:
    """Raises `ValueError` if a prompt's value changes with the logits of others."""
    n = len(logits)
    odd = torch.arange(n, device=logits.device) % 2 == 1
    plain = one_a_prompt(metric, metric.fn(logits), n)
    for mine in (odd, ~odd):
        others_changed = torch.where(mine[:, None, None], logits, logits.flip(-1))
        value = one_a_prompt(metric, metric.fn(others_changed), n)
        mine = mine.to(value.device)
        if not torch.allclose(value[mine], plain[mine], rtol=1e-4, atol=1e-5, equal_nan=True):
            raise ValueError(
                f"metric {metric.name!r}: expected a function whose value for a prompt depends on that prompt's logits alone, "
                "since parts of the prompts are run; got one that changes with the other prompts' logits. Leave out what joins "
                "prompts (a mean over the batch, a rank among them), or use one of mechkit's metrics"
            )


@torch.no_grad()
def metric_of_run(
    model: HookedModel, prompts: Prompts, metric: Metric | CallableMetric, budget: Budget
) -> Float[Tensor, "prompt *metric"]:
    """The metric of an unedited run, by whole forward passes. One that compares with another run is refused."""
    check_metric(model, prompts, metric, ())
    if isinstance(metric, CallableMetric):
        value = call_metric(
            metric, logits_at_hand(_logits(model, prompts, metric)), np.arange(len(prompts)), len(prompts)
        )
        return value.cpu()
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    for batch in prompts.batches(lambda length, _: budget.prompts_at_once(model, length, [])):
        logits = model.run(batch.stacked)
        at = metric.positions[batch.ids].to(logits.device)
        row = torch.arange(len(batch), device=logits.device).reshape(-1, *[1] * (at.ndim - 1))
        rows = logits[row, at]
        rows = rows if metric.tokens is None else rows[..., metric.tokens.to(logits.device)]
        for i, value in zip(batch.ids, read_metric(metric, rows, torch.tensor(batch.ids)).cpu(), strict=True):
            found[i] = value
    return torch.stack(found)


def _logits(model: HookedModel, prompts: Prompts, metric: CallableMetric) -> Float[Tensor, "prompt pos d_vocab"]:
    """All logits of an unedited run, as many prompts at a time as fit."""
    check_metric(model, prompts, metric, ("clean",))
    at_once = Budget.of(model, None).prompts_at_once(model, len(prompts.tokens[0]), [])
    rows = prompts.stack(range(len(prompts)))
    return torch.cat([widen(model.run(some)) for some in rows.split(at_once)])
