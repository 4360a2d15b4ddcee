"""First-order effects of pairs of all lengths together (`mechkit.engine._packed_gradients`), where that is possible and worth it.

1. Pairs are put into packs that fit the budget, whatever their lengths; each begins at its own first different token.
2. One forward and one backward pass for each pack. At each site `(source - base) * gradient`, token by token, is summed to the
   dims that were asked for.
3. Nothing is added to the experiment before the pack has proved itself. Where one is refuted, or cannot be run, nothing that was
   packed stands: all pairs are run one length at a time, which has a proof of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechkit._progress import Progress
from mechkit.engine import CANNOT_RUN, SITES_PACKED, PackedGradients, Pairs, read_metric, why_not
from mechkit.experiment.estimates import Experiment, Key, reduce_tokens
from mechkit.experiment.passes import check_reached, runs_of
from mechkit.hooks._devices import out_of_memory
from mechkit.metrics import Metric

MOST_SHARED = 0.25  # of all tokens: what equal beginnings may save at most, if they are run again for each pair
# Tokens in a pass from which on more at once are no faster (one core, SmolLM2: 4.1 ms a token at 32, 2.8 at 64, 2.4 from 128 on).
MANY = 128
LONGEST = 2**31


def first_order_packed(experiment: Experiment) -> list[int]:
    """Adds `(source - base) * gradient` of every node for pairs of all lengths together. Returns the pairs that are left to be
    run one length at a time; the experiment's `how` says why, where a pack was tried."""
    left = list(range(len(experiment.base)))
    if not _may_pack(experiment):
        return left
    with Progress(len(left), "gradient", experiment.progress) as bar:
        proved = False
        for pack in _packs(experiment):
            try:
                refuted = _add_pack(experiment, pack, proved)
            except CANNOT_RUN as error:
                if isinstance(error, RuntimeError) and out_of_memory(error):
                    raise
                refuted = why_not(error)
            except _MetricError as error:
                refuted = f"the metric raises {error} where prompts of several lengths are read together"
            if refuted is not None:
                experiment.how = f"suffix, one length at a time: {refuted}"
                experiment.forget()
                return list(range(len(experiment.base)))
            proved = True
            done = {int(i) for pairs in pack for i in pairs.ids}
            left = [i for i in left if i not in done]
            bar.update(len(done))
    return left


class _MetricError(Exception):
    """What a metric raised; it says which kind of error."""


def _may_pack(experiment: Experiment) -> bool:
    """Whether packing is worth a trial: what rules it out before anything is run."""
    model, base, source = experiment.model, experiment.base, experiment.source
    if source is None or base.inputs is not None or source.inputs is not None:
        return False
    if not isinstance(experiment.metric, Metric) or model.has_hooks or model.reads_pictures_alone:
        return False
    if any(site not in SITES_PACKED for site in experiment.axes):
        return False
    first, lengths, n_lengths = experiment.first_differences(), base.lengths.tolist(), len(base.groups())
    if sum(length - at for length, at in zip(lengths, first, strict=True)) >= MANY * n_lengths:
        return False  # each length by itself has enough
    return _shared(experiment) <= MOST_SHARED * sum(lengths)


def _shared(experiment: Experiment) -> int:
    """How many tokens before the first difference are the same as in another pair of the same length."""
    first, shared = experiment.first_differences(), 0
    for ids in experiment.base.groups():
        start = min(first[i] for i in ids)
        beginnings = {tuple(experiment.base.tokens[i][:start].tolist()) for i in ids}
        shared += start * (len(ids) - len(beginnings))
    return shared


def _packs(experiment: Experiment) -> Iterator[list[Pairs]]:
    """Pairs of all lengths, as many at a time as fit, the longest first."""
    model, metric, budget = experiment.model, experiment.metric, experiment.budget
    assert isinstance(metric, Metric)
    first = experiment.first_differences()
    read = metric.positions.reshape(len(first), -1).amin(1).tolist()
    lengths = experiment.base.lengths.tolist()
    start = [min(at, places, length - 1) for at, places, length in zip(first, read, lengths, strict=True)]
    pack: list[Pairs] = []
    room, tokens = 1.0, budget.tokens or LONGEST  # what is left of the budget, as a share, and of the tokens
    for ids in sorted(experiment.base.groups(), key=lambda ids: -lengths[ids[0]]):
        ids, taken = sorted(ids, key=start.__getitem__), 0
        for n, i in enumerate(ids):
            suffix = lengths[i] - start[i]
            at_once = budget.prompts_with_gradients(model, lengths[i], suffix, experiment.keys)
            at_once = min(at_once, budget.prompts_at_once(model, lengths[i], ()))
            if (pack or n > taken) and (1 / at_once > room or suffix > tokens):
                if n > taken:
                    pack.append(_pairs(experiment, ids[taken:n], start))
                yield pack
                room, tokens, pack, taken = 1.0, budget.tokens or LONGEST, [], n
            room, tokens = room - 1 / at_once, tokens - suffix
        pack.append(_pairs(experiment, ids[taken:], start))
    yield pack


def _pairs(experiment: Experiment, ids: Sequence[int], start: Sequence[int]) -> Pairs:
    assert experiment.source is not None
    base, source = (prompts.stack(ids).to(experiment.model.device) for prompts in (experiment.base, experiment.source))
    return Pairs(base, source, np.array(ids), np.array([start[i] for i in ids]))


def _add_pack(experiment: Experiment, pack: Sequence[Pairs], proved: bool) -> str | None:
    """Adds the effects of a pack. Returns why they cannot be computed like this, and adds nothing then."""
    runs = PackedGradients(experiment.model, pack, experiment.keys, trial=not proved)
    try:
        return _add_runs(experiment, runs)
    finally:
        experiment.block_tokens += runs.block_tokens


def _add_runs(experiment: Experiment, runs: PackedGradients) -> str | None:
    wide = torch.promote_types(experiment.model.dtype, torch.float32)
    base: dict[Key, Tensor] = {}
    slopes: dict[Key, Tensor] = {}
    sums: dict[Key, Tensor] = {}
    finite: list[Tensor] = []
    ids = torch.from_numpy(runs.rows.prompt_id)
    named = {name: at[ids] for name, at in experiment.named.items()}

    def tap(key: Key, activation: Tensor) -> None:
        base[key] = runs.shaped(key, activation.detach())
        if activation.requires_grad:
            activation.register_hook(lambda gradient: contract(key, gradient))

    def contract(key: Key, gradient: Tensor) -> None:
        slope = runs.shaped(key, gradient)
        slopes[key] = slope
        product = ((runs.source[key] - base[key]) * slope).to(wide)
        finite.append(torch.isfinite(product).all())
        sums[key] = reduce_tokens(experiment.axes[key[0]], product, runs.rows, named)

    leaf, final = runs.forward(tap)
    if (why := runs.refuted(base, final)) is not None:
        return why
    arriving: list[Tensor] = []
    final.register_hook(arriving.append)
    values = _values(experiment, runs, final)
    torch.autograd.grad(values[experiment.base_is].sum(), leaf)
    if (why := runs.gradients_refuted(base, slopes, final, arriving[-1])) is not None:
        return why
    check_reached(experiment, set(experiment.keys) - sums.keys())
    finite += [torch.isfinite(value).all() for value in values.values()]
    if not all(bool(one) for one in finite):
        return "a metric or an effect is not finite"
    for run, value in values.items():
        experiment.values[run][ids] = value.detach().to(experiment.values[run])
    experiment.check_task()
    for key in experiment.keys:
        experiment.add_sums(key, sums[key], ids)
    return None


def _values(experiment: Experiment, runs: PackedGradients, final: Tensor) -> dict[str, Float[Tensor, "row"]]:
    """The metric of both runs: in the graph that of the base run, whose final streams are given."""
    metric, ids = experiment.metric, torch.from_numpy(runs.rows.prompt_id)
    assert isinstance(metric, Metric)
    base_is, source_is = runs_of(experiment)
    ends = {source_is: runs.source_final, base_is: final}
    reference = None
    if metric.reference is not None:
        with torch.no_grad():
            reference = runs.logits(ends[metric.reference].detach(), metric.positions[ids], metric.tokens)
    logits = {run: runs.logits(end, metric.positions[ids], metric.tokens) for run, end in ends.items()}
    try:
        return {run: read_metric(metric, one, ids, reference) for run, one in logits.items()}
    except Exception as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        raise _MetricError(type(error).__name__) from error
