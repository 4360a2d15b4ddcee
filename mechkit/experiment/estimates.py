"""Shared by the gradient methods: which nodes there are, from gradients to one number per node and prompt, and to a `Result`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._precision import wide_dtype
from mechkit._progress import Progress
from mechkit._warnings import warn_of_task
from mechkit.engine import Budget, GradientRuns, PackedRows, check_can_run, check_metric, metric_values
from mechkit.experiment.axes import Axes, Chosen, make_axes
from mechkit.experiment.positions import base_and_source, split_prompts
from mechkit.experiment.provenance import pictures_of, provenance_of
from mechkit.hooks import SITES, HookedModel
from mechkit.hooks._devices import to_device
from mechkit.hooks._nonfinite import where_it_began
from mechkit.hooks._sites import TOWER, by_prompt
from mechkit.metrics import AnyMetric as AnyMetric
from mechkit.metrics import CallableMetric, Metric, metric_for
from mechkit.prompts import PromptPairs, Prompts, Stacked, first_differences
from mechkit.result import Cost, Result

Key = tuple[str, int]  # site, layer
# What gives an estimate of `activation_patching`, cell by cell.
ESTIMATES = ("attribution_patching", "integrated_gradients", "atp_star", "relp")


@dataclass(eq=False)
class Experiment:
    """What a gradient method is asked, and the numbers that it has filled in so far.

    Attributes:
        base: The prompts whose gradient is taken; `base_is` names their run.
        source: The prompts whose activations they are compared with; `source_is` names their run. `None` for methods that
            compare with something else.
        axes: For each site, the dims of its result.
        effects: For each site `[*over prompt]`: the estimated effect of writing the source's activation into the base run.
        values: The metric of the unedited runs, by name.
    """

    model: HookedModel
    base: Prompts
    source: Prompts | None
    base_is: str
    source_is: str | None
    named: Mapping[str, Int[Tensor, "prompt"]]
    metric: Metric | CallableMetric
    axes: dict[str, Axes]
    budget: Budget
    provenance: dict[str, Any]
    effects: dict[str, Tensor] = field(init=False)
    values: dict[str, Tensor] = field(init=False)
    block_tokens: int = 0
    how: str = "suffix"
    proofs: dict[tuple[int, int], str | None] = field(default_factory=dict)
    defer_proof: bool = False  # whether the first unedited runs serve as the proof (`GradientRuns.proved`)
    progress: bool = False  # whether to show how far it is
    gradients: int = 1  # how many are taken for each prompt, for the progress
    bar: Progress | None = None  # while it runs
    task_checked: bool = False  # whether it was looked at if the model does the task

    def __post_init__(self) -> None:
        wide = wide_dtype(self.model.dtype)
        n = len(self.base)
        self.effects = {site: torch.zeros((*axes.shape, n), dtype=wide) for site, axes in self.axes.items()}
        runs = [run for run in (self.base_is, self.source_is) if run is not None]
        self.values = {run: torch.full((n,), torch.nan, dtype=wide) for run in runs}

    @property
    def keys(self) -> list[Key]:
        """Every `(site, layer)` that is attributed."""
        return [(site, layer) for site, axes in self.axes.items() for layer in axes.layers]

    def first_differences(self) -> list[int]:
        """For each prompt the first position at which base and source differ; 0 where there is no source."""
        if self.source is None:
            return [0] * len(self.base)
        return first_differences(self.base, self.source).tolist()

    def chunks(self, ids: Sequence[int] | None = None) -> Iterator[GradientChunk]:
        """Prompts that run together: of one length, as many as fit the budget. All of them, or those of `ids`."""
        left, every = list(range(len(self.base)) if ids is None else ids), self.first_differences()
        first = [every[i] for i in left]
        done = len(self.base) - len(left)

        def fit(length: int, some: Sequence[int]) -> int:
            suffix = length - min(first[some[0]], length - 1)
            return self.budget.prompts_with_gradients(self.model, length, suffix, self.keys)

        at_once = fit if isinstance(self.metric, Metric) else None  # a callable sees all prompts together
        with Progress(len(self.base) * self.gradients, "gradient", self.progress, done=done) as self.bar:
            # The longest first: a proof holds for shorter prompts too.
            for batch in self.base[left].batches(at_once, order=first.__getitem__, longest_first=True):
                mine = [left[i] for i in batch.ids]
                chunk = GradientChunk.of(self, mine, first[batch.ids[0]], fit(batch.length, batch.ids))
                yield chunk
                self.block_tokens += chunk.runs.block_tokens
                self.how = chunk.runs.how if chunk.runs.how != "suffix" else self.how
                done += len(batch)
                self.bar.reach(done * self.gradients)

    def took_gradients(self, n: int) -> None:
        """Counts gradients within a chunk of prompts, for the progress."""
        if self.bar is not None:
            self.bar.update(n)

    def check_task(self) -> None:
        """Warns where the model does not do the task, once all values are there."""
        if not self.task_checked and not any(bool(value.isnan().any()) for value in self.values.values()):
            self.task_checked = True
            if isinstance(self.metric, Metric):
                warn_of_task(self.metric.name, self.values)

    def add_sums(self, key: Key, sums: Float[Tensor, "some *over"], ids: Int[Tensor, "some"]) -> None:
        """Adds the effects of one layer's activations on some prompts, by the dims that are wanted but the layer."""
        (site, layer), axes = key, self.axes[key[0]]
        into = self.effects[site]
        if "layer" in axes.dims:
            into = into.select(axes.dims.index("layer"), list(axes.layers).index(layer))
        into[..., ids] += sums.movedim(0, -1).to(into)

    def forget(self) -> None:
        """Takes back all effects and values: nothing that was added stands."""
        for effects in self.effects.values():
            effects.zero_()
        for values in self.values.values():
            values.fill_(torch.nan)

    def result(self, site: str, **provenance: Any) -> Result:
        """The estimated metric of every patched run, `base + effect`, as `activation_patching` returns the exact one."""
        axes = self.axes[site]
        clean = self.base if self.source is None or self.base_is == "clean" else self.source
        naive = int(self.base.lengths.sum()) * self.model.n_layers * max(1, self.effects[site][..., 0].numel())
        return Result(
            values=self.values[self.base_is] + self.effects[site],
            dims=(*axes.dims, "prompt"),
            coords={**axes.coords, "prompt": tuple(range(len(self.base)))},
            baseline=self.values,
            base=self.base_is,
            metric=self.metric.name,
            unit=self.metric.unit,
            provenance=provenance_of(
                self.model,
                clean,
                site=site,
                over=" ".join(axes.dims),
                runs=self.how,
                **{**self.provenance, **provenance},
            ),
            cost=Cost(self.block_tokens, naive),
            pictures=None if axes.site.stack == TOWER else pictures_of(clean),
        )


@dataclass(eq=False)
class GradientChunk:
    """Prompts of equal length that run together.

    Attributes:
        ids: Their indices in the whole set.
        inputs: The prompts of each run, by its name.
        runs: What runs them.
        everyone: `arange(len(ids))`, on the model's device.
        rows: How many rows of its prompts' suffixes the budget allows at once.
        reference: The logits that the metric compares with, where it does.
    """

    experiment: Experiment
    ids: Int[Tensor, "prompt"]
    inputs: dict[str, Stacked]
    runs: GradientRuns
    everyone: Int[Tensor, "prompt"]
    rows: int
    reference: Tensor | None = None

    @classmethod
    def of(cls, experiment: Experiment, ids: Sequence[int], start: int, rows: int) -> GradientChunk:
        model, inputs = experiment.model, {}
        for run, prompts in ((experiment.base_is, experiment.base), (experiment.source_is, experiment.source)):
            if run is not None and prompts is not None:
                inputs[run] = prompts.stack(ids).to(model.device)
        base = inputs[experiment.base_is]
        if isinstance(experiment.metric, Metric):
            start = min(start, int(experiment.metric.positions[list(ids)].min()))
        towers = [axes.site.stack == TOWER for axes in experiment.axes.values()]
        if any(towers) and not all(towers):
            raise ValueError("site: expected sites of the vision tower or of the language model in one call, got both")
        whole = "an activation before the first block" if "embed" in experiment.axes or any(towers) else None
        source = inputs.get(experiment.source_is) if experiment.source_is is not None else None
        runs = GradientRuns(
            model,
            base,
            source,
            min(start, base.tokens.shape[1] - 1),
            whole=whole,
            proofs=experiment.proofs,
            defer=experiment.defer_proof,
            from_pixels=any(towers),
        )
        return cls(experiment, torch.tensor(ids), inputs, runs, torch.arange(len(ids), device=model.device), rows)

    def metric(self, final: Tensor, row: Int[Tensor, "row"] | None = None) -> Float[Tensor, "row"]:
        """The metric of rows, in the graph. `row` says which of the chunk's prompts each row is; all of them by default."""
        row = self.everyone if row is None else row
        reference = None if self.reference is None else self.reference[row]
        n, ids = len(self.experiment.base), self.ids[row.cpu()]
        return metric_values(self.runs, self.experiment.metric, final, ids, row, reference, n_prompts=n)

    @torch.no_grad()
    def keep_unedited(self, finals: Mapping[str, Tensor]) -> None:
        """Keeps the metric of the unedited runs, given what each ended in; raises `ValueError` where it is not finite."""
        metric = self.experiment.metric
        if isinstance(metric, Metric) and metric.reference is not None:
            final = finals[metric.reference].detach()
            self.reference = self.runs.logits(final, metric.positions[self.ids], metric.tokens)
        for run, final in finals.items():
            value = self.metric(final.detach())
            self.experiment.values[run][self.ids] = value.to(self.experiment.values[run])
            if len(bad := (~torch.isfinite(value)).nonzero().flatten().tolist()):
                raise ValueError(
                    f"{run} run: expected a finite metric, got NaN or inf for prompts {self.ids[bad].tolist()[:5]}; of prompt "
                    f"{int(self.ids[bad[0]])} {where_it_began(self.experiment.model, self.inputs[run][[bad[0]]])}"
                )
        self.experiment.check_task()

    def add(self, key: Key, per_entry: Float[Tensor, "row *dims"], row: Int[Tensor, "row"] | None = None) -> None:
        """Adds effects of one layer's activations (positions from `runs.start` on) to the experiment's."""
        site, layer = key
        per_entry = by_prompt(SITES[site], per_entry, len(self.ids) if row is None else len(row))
        per_entry = per_entry.to(torch.promote_types(per_entry.dtype, torch.float32))
        if not bool(torch.isfinite(per_entry).all()):  # NaN would look like a cell that does not exist
            raise ValueError(
                f"gradient: expected finite effects at {site!r} of layer {layer}, got NaN or inf, though the runs were finite; "
                f"the backward pass overflows in {str(self.experiment.model.dtype).removeprefix('torch.')}, or the metric has no "
                "gradient there"
            )
        if row is not None:
            summed = per_entry.new_zeros(len(self.ids), *per_entry.shape[1:])
            per_entry = summed.index_add(0, row, per_entry)
        named = {k: at[self.ids] for k, at in self.experiment.named.items()}
        sums = reduce_to(self.experiment.axes[site], per_entry, self.runs.start, named)
        self.experiment.add_sums(key, sums, self.ids)


def reduce_to(
    axes: Axes, per_entry: Float[Tensor, "prompt *dims"], start: int, named: Mapping[str, Int[Tensor, "prompt"]]
) -> Float[Tensor, "prompt *over"]:
    """Sums a site's entries to the dims that are wanted (but the layer), in their order.

    Positions before `start` are 0: the two runs are the same there. Positions that the prompts lack are NaN.
    """
    x, dims = _summed(axes, per_entry, axes.site.dims)
    if "pos" in dims:
        end = torch.full((len(x),), start + per_entry.shape[axes.site.axis("pos")])
        x, dims = _at_positions(axes, x, dims, start, end, named)
    return x.permute(0, *(1 + dims.index(dim) for dim in axes.dims if dim != "layer"))


def reduce_tokens(
    axes: Axes, per_token: Float[Tensor, "token *dims"], rows: PackedRows, named: Mapping[str, Int[Tensor, "row"]]
) -> Float[Tensor, "row *over"]:
    """The same for the tokens of packed rows: `dims` are the site's without its first one, the position."""
    x, dims = _summed(axes, per_token, axes.site.dims[1:])
    row = to_device(np.repeat(np.arange(len(rows)), rows.suffix), x.device)
    if {"pos", "position"} & set(axes.dims):
        by_position = x.new_zeros(len(rows), int(rows.length.max()), *x.shape[1:])
        by_position[row, to_device(rows.position, x.device)] = x
        x, dims = _at_positions(axes, by_position, ["pos", *dims], 0, torch.from_numpy(rows.length), named)
    else:
        x = x.new_zeros(len(rows), *x.shape[1:]).index_add(0, row, x)
    return x.permute(0, *(1 + dims.index(dim) for dim in axes.dims if dim != "layer"))


def _summed(axes: Axes, x: Float[Tensor, "some *dims"], dims: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Sums over the dims that are not wanted, and takes the heads and neurons that are; and the dims that are left."""
    left = list(dims)
    if "neuron" in axes.dims:
        left[-1] = "neuron"
    kept = {"pos" if dim == "position" else dim for dim in axes.dims}
    for i in reversed(range(len(left))):
        if left[i] not in kept:
            x = x.sum(1 + i)
            left.pop(i)
    for dim in ("head", "neuron"):
        if dim in axes.dims:
            x = x.index_select(1 + left.index(dim), torch.tensor(axes.index[dim], device=x.device))
    return x, left


def _at_positions(
    axes: Axes,
    x: Float[Tensor, "prompt *dims"],
    dims: list[str],
    start: int,
    end: Int[Tensor, "prompt"],
    named: Mapping[str, Int[Tensor, "prompt"]],
) -> tuple[Tensor, list[str]]:
    """The positions that are wanted, of activations that begin at `start`: 0 before it, NaN from each prompt's `end` on."""
    axis = 1 + dims.index("pos")
    x = torch.cat([x.new_zeros(*x.shape[:axis], 1, *x.shape[axis + 1 :]), x], axis)  # entry 0: before the start
    if "pos" in axes.dims:
        at = torch.tensor(axes.index["pos"]).expand(len(x), -1)
    else:
        at = torch.stack([named[name] for name in axes.index["position"]], -1)
    absent = (at >= end[:, None]).to(x.device)
    at = (at - start + 1).clamp(min=0, max=x.shape[axis] - 1).to(x.device)
    shape = [len(x), *(at.shape[1] if i == axis else 1 for i in range(1, x.ndim))]
    x = x.gather(axis, at.reshape(shape).expand(*x.shape[:axis], -1, *x.shape[axis + 1 :]))
    left = [("position" if "position" in axes.dims else "pos") if dim == "pos" else dim for dim in dims]
    return x.masked_fill(absent.reshape(shape), torch.nan), left


def check_one_site(site: Any) -> None:
    """Refuses several sites, for methods that take one."""
    if not isinstance(site, str):
        raise ValueError(
            f"site: expected one site; several from one backward pass are attribution_patching's alone. Got {site!r}"
        )


@torch.inference_mode(False)
def make_experiment(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    site: str | Mapping[str, str],
    over: str,
    direction: Literal["denoise", "noise"],
    chosen: Chosen,
    budget: int | None,
    progress: bool,
    provenance: Mapping[str, Any],
    towers: bool = False,
) -> Experiment:
    """Checks what the user asked for. `ValueError`s name the argument. `provenance`: the technique, and its own arguments."""
    runs = base_and_source(pairs, direction)
    base, source = (getattr(pairs, run) for run in runs)
    wanted = {site: over} if isinstance(site, str) else dict(site)
    if not wanted:
        raise ValueError("site: expected at least one site, got none")
    axes = {}
    for name, dims in wanted.items():
        one = make_axes(model, pairs.clean, pairs.positions, name, dims, **chosen, towers=towers)
        if one.site.name in axes:
            raise ValueError(
                f"site: {one.site.name!r} is given twice; expected each site once, with layers=[...] to choose layers"
            )
        axes[one.site.name] = one
    metric = metric_for(metric, pairs)
    check_experiment(model, metric, {runs[0]: base, runs[1]: source})
    return Experiment(
        model,
        base,
        source,
        *runs,
        pairs.positions,
        metric,
        axes,
        Budget.of(model, budget),
        {"task": pairs.task, "direction": direction, **provenance},
        progress=progress,
    )


@torch.inference_mode(False)
def make_single_experiment(
    model: HookedModel,
    prompts: PromptPairs | Prompts,
    metric: AnyMetric,
    site: str,
    over: str,
    *,
    budget: int | None = None,
    progress: bool = False,
    **chosen: Unpack[Chosen],
) -> Experiment:
    """The same for methods that look at one run: the clean prompts of pairs."""
    base, named, task = split_prompts(prompts)
    axes = make_axes(model, base, named, site, over, **chosen)
    metric = metric_for(metric, prompts)
    check_experiment(model, metric, {"clean": base})
    room = Budget.of(model, budget)
    axes_of, about = {axes.site.name: axes}, {"task": task}
    return Experiment(model, base, None, "clean", None, named, metric, axes_of, room, about, progress=progress)


def check_experiment(model: HookedModel, metric: Metric | CallableMetric, runs: Mapping[str, Prompts]) -> None:
    """Refuses a model in training mode, tokens that it cannot read, and a metric made for other prompts."""
    check_can_run(model, {f"{name} prompt": prompts for name, prompts in runs.items()})
    check_metric(model, next(iter(runs.values())), metric, runs)


def hook_name(key: Key) -> str:
    """The full hook name of `(site, layer)`."""
    return SITES[key[0]].hook_name(key[1])
