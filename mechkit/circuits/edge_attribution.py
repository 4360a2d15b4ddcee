"""Edge attribution patching: an estimate of every edge's effect from a few forward and backward passes.

1. Run clean and corrupted prompts, and keep what every writer wrote (heads as their z).
2. Run the base prompts (or runs on the way from their embeddings to the others') with gradients, and keep the metric's gradient
   at every head's query, key and value, at every MLP's input, and at the final stream.
3. Pull each of these back through its weights and the norm in front of them, at the residual stream that this very reader reads.
4. An edge's score is the change of its writer times the gradient of its reader, summed over positions.

No copies of the stream are made for the readers: step 3 replaces them. Positions before the first difference are not run where
the two runs agree there, and parameters have no gradients (see `mechkit.engine._gradients`).

EAP: Syed, Rager and Conmy 2023, https://arxiv.org/abs/2310.10348. EAP-IG: Hanna, Pezzelle and Belinkov 2024,
https://arxiv.org/abs/2403.17806; for activations, Marks et al. 2024, https://arxiv.org/abs/2403.19647. With the rules of RelP:
Jafari et al. 2025, https://arxiv.org/abs/2508.21258.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechkit._check import checked
from mechkit._precision import tolerance
from mechkit.circuits._kinds import Group
from mechkit.circuits._writings import HookPairs, Writings
from mechkit.circuits.edge_scores import EdgeScores
from mechkit.circuits.graph import Graph
from mechkit.engine import agree_before_difference, frozen_parameters
from mechkit.experiment.edges import both_runs, chosen_positions, edge_experiment, where_it_counts
from mechkit.experiment.estimates import AnyMetric, Experiment, GradientChunk
from mechkit.experiment.passes import tapped
from mechkit.experiment.provenance import circuit_provenance
from mechkit.experiment.quadrature import Rule, batches, quadrature
from mechkit.experiment.relevance import relevance_rules
from mechkit.hooks import SITES, HookedModel, Parts, one_at_a_time
from mechkit.hooks._capture import keepers
from mechkit.hooks._parts import CHECKED
from mechkit.prompts import PromptPairs, Stacked
from mechkit.result import Cost

Path = Literal["input", "activation"]


@checked
@one_at_a_time
@torch.inference_mode(False)
def edge_attribution(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    *,
    steps: int = 5,
    rule: Rule | Literal["clean-corrupted"] | None = None,
    path: Path = "input",
    direction: Literal["denoise", "noise"] = "denoise",
    gradient: Literal["exact", "relp"] = "exact",
    positions: Sequence[int] | Sequence[str] | None = None,
    per_prompt: bool = True,
    budget: int | None = None,
    progress: bool = True,
) -> EdgeScores:
    """Estimates what each edge's clean value adds to the metric.

    Args:
        model, pairs: As for `activation_patching`.
        metric: A differentiable metric, or a callable `[batch pos d_vocab] -> [batch]` for prompts of one length.
        steps: Gradients along the path; 1 is EAP.
        rule: How they are placed, from the base run (0) to the other (1): `"left"`, `"right"`, `"midpoint"`, `"gauss-legendre"`,
            `"stretched"` (see `mechkit.experiment.quadrature`), or `"clean-corrupted"`: one at each end, whatever `steps` says.
            Default: the base run for one step, else `"stretched"`, the most accurate between embeddings.
        path: What moves. `"input"`: the embeddings, `steps` backward passes in all. `"activation"`: the output of each layer's
            heads, of each MLP, and the embedding, each by itself, with the base run before it: about 2 `n_layers` as many.
        direction: `"denoise"`: from the corrupted run (one step: its gradient) towards the clean one. `"noise"`: from the clean
            run, as in the papers. The sign is the same in both: positive where the clean value supports the metric.
        gradient: `"exact"`, or `"relp"`: by the rules of relevance propagation (norms' scales and activation functions' ratios
            held fixed).
        positions: Where the writer's change counts: indices, or names such as `"S2"`. Default: everywhere.
        per_prompt: Keep each prompt's scores, or their mean alone (less memory for large graphs).
        budget: Bytes for activations kept for the backward pass; default half of what the device has free (1 GiB on a CPU).
        progress: Show a progress bar when it takes long.

    Returns:
        `EdgeScores`, in the metric's unit. Provenance: `gradient_at`, and `completeness_error`: how far the scores of the
        embedding's edges are from adding up to the difference of the two runs, prompt by prompt, as a share of it (only for
        `path="input"`, exact gradients, all positions). Identical prompts score 0 exactly.

    Raises:
        ValueError: a metric without a gradient, an architecture whose edges are not known, training mode, NaN in a run.
    """
    rule = rule or ("left" if steps == 1 else "stretched")
    ask = _asked(steps, rule, path, gradient)
    experiment = edge_experiment(model, pairs, metric, direction, budget)
    experiment.defer_proof, experiment.progress = True, progress
    graph, parts = Graph.of(model), Parts(model)
    experiment.gradients = len(ask[0]) * (len(graph.writing) if path == "activation" else 1)
    scores = _Scores(graph, experiment, per_prompt, positions)
    errors = torch.full((len(pairs),), torch.nan, dtype=torch.float64)
    with frozen_parameters(model):
        for i, chunk in enumerate(experiment.chunks()):
            work = _Work(chunk, parts, graph, scores, relp=gradient == "relp")
            work.keep_runs(every_hidden=path == "activation", check=i == 0)
            if path == "input":
                errors[chunk.ids] = work.along_input(*ask).double().cpu()
            else:
                work.along_activations(*ask)
    share = {}
    if path == "input" and gradient == "exact" and positions is None:
        gap = (experiment.values["clean"] - experiment.values["corrupted"]).double().abs().mean().clamp(min=1e-12)
        share = {"completeness_error": float(errors.abs().mean() / gap)}
    return scores.result(
        steps=len(ask[0]),
        rule=rule,
        path=path,
        gradient=gradient,
        gradient_at=experiment.base_is
        if ask[0] == [0.0]
        else "clean and corrupted"
        if ask[0] == [0.0, 1.0]
        else "between",
        **share,
    )


def _asked(steps: int, rule: str, path: str, gradient: str) -> tuple[list[float], list[float]]:
    for name, value, choices in (("path", path, ("input", "activation")), ("gradient", gradient, ("exact", "relp"))):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}; got {value!r}")
    if rule == "clean-corrupted":
        return [0.0, 1.0], [0.5, 0.5]
    return quadrature(steps, rule)


class _Scores:
    """The scores so far, and from them the result."""

    def __init__(self, graph: Graph, experiment: Experiment, per_prompt: bool, positions: Sequence[Any] | None) -> None:
        self.graph, self.experiment, self.per_prompt = graph, experiment, per_prompt
        shape = (len(graph.writers), len(graph.readers), len(experiment.base) if per_prompt else 1)
        wide = experiment.values[experiment.base_is].dtype
        self.values = torch.zeros(shape, dtype=wide)
        self.positions = chosen_positions(experiment, positions)

    def add(
        self, prompt: Int[Tensor, "prompt"], writers: slice, readers: slice, part: Float[Tensor, "prompt writer reader"]
    ) -> None:
        sign = 1 if self.experiment.base_is == "corrupted" else -1
        part = sign * part.to("cpu", self.values.dtype).permute(1, 2, 0)
        into = self.values[writers, readers]
        if self.per_prompt:
            into[..., prompt] += part
        else:
            into += part.sum(-1, keepdim=True) / len(self.experiment.base)

    def counts(
        self,
        chunk: GradientChunk,
        base: Float[Tensor, "prompt suffix d_model"],
        source: Float[Tensor, "prompt suffix d_model"],
    ) -> Bool[Tensor, "prompt suffix"]:
        """At which positions, from the chunk's start on, a change of a writer counts: not before the prompts differ, where the
        two runs agree as long (`base` and `source` are what they ended in)."""
        rows, others = (chunk.inputs[str(run)] for run in (self.experiment.base_is, self.experiment.source_is))
        agree = agree_before_difference(rows, others, base, source)
        return where_it_counts(self.experiment, self.positions, rows, others, chunk.ids, agree)[:, chunk.runs.start :]

    def result(self, **provenance: Any) -> EdgeScores:
        experiment = self.experiment
        naive = int(experiment.base.lengths.sum()) * experiment.model.n_layers * self.graph.n_edges
        return EdgeScores.of(
            self.graph,
            self.values if self.per_prompt else self.values[..., 0],
            baseline=experiment.values,
            metric=experiment.metric.name,
            unit=experiment.metric.unit,
            provenance=circuit_provenance(
                experiment.model,
                *both_runs(experiment),
                technique="edge_attribution",
                runs=experiment.how,
                **{**experiment.provenance, **provenance},
                positions=None if self.positions is None else list(self.positions),
            ),
            cost=Cost(experiment.block_tokens, naive),
            prompts=self.per_prompt,
        )


Gradients = dict[Group, dict[str, Tensor]]  # the metric's, where readers' values are: by `Kind.gradients_at`
Streams = dict[tuple[str, int], Tensor]  # what readers read, by `Group.stream`


class _Work:
    """One chunk of prompts."""

    def __init__(self, chunk: GradientChunk, parts: Parts, graph: Graph, scores: _Scores, relp: bool) -> None:
        self.chunk, self.parts, self.graph, self.scores, self.relp = chunk, parts, graph, scores, relp
        self.model: HookedModel = chunk.experiment.model

    @torch.no_grad()
    def keep_runs(self, every_hidden: bool, check: bool) -> None:
        """Both unedited runs, in one batch; and whether the attention is what its weights say."""
        chunk, experiment = self.chunk, self.chunk.experiment
        assert experiment.source_is is not None
        n = len(chunk.ids)
        both = Writings(self.graph, self.parts)
        first: dict[tuple[str, int], Tensor] = {}  # what the first prompt's attention did
        checked = [(kind, layer) for layer in range(self.model.n_layers if check else 0) for kind in CHECKED]
        hooks = both.hooks(every_hidden=every_hidden)
        hooks += keepers(checked, first, lambda activation, _: activation[:1].clone())
        rows = Stacked.cat([chunk.inputs[experiment.base_is], chunk.inputs[experiment.source_is]])
        _, final = chunk.runs.forward(rows, chunk.everyone.repeat(2), hooks)
        if not chunk.runs.proved(final[[0, n]]):
            self.keep_runs(every_hidden, check)
            return
        for layer in range(self.model.n_layers if check else 0):
            self.parts.check_attention(layer, first)
        self.base, self.source = both.rows(slice(0, n)), both.rows(slice(n, None))
        self.final_change = final[n:] - final[:n]
        self.counts = self.scores.counts(chunk, final[:n], final[n:])
        chunk.keep_unedited({experiment.base_is: final[:n], experiment.source_is: final[n:]})

    def along_input(self, points: list[float], weights: list[float]) -> Float[Tensor, "prompt"]:
        """Adds all scores. Returns by how much those of the embedding's edges miss the difference of the two runs."""
        start = self.base.sites["resid_pre", 0]
        change = self.source.sites["resid_pre", 0] - start
        everyone = slice(0, len(self.graph.writers))
        mean, total = _Mean(self, everyone), torch.zeros_like(self.chunk.everyone, dtype=self.scores.values.dtype)
        for row, point, weight in batches(self.chunk, points, weights):
            hidden = (start[row] + point[:, None, None] * change[row]).to(change.dtype)
            slope, streams, gradients = self._backward(row, hidden, 0, ())
            total = total.index_add(0, row, ((change[row] * slope).flatten(1).sum(1) * weight).to(total))
            mean.add(row, weight, streams, gradients)
        self._check_covered(*mean.contract(), total)
        values = self.chunk.experiment.values
        gap = (values[str(self.chunk.experiment.source_is)] - values[self.chunk.experiment.base_is])[self.chunk.ids]
        return total - gap.to(total)

    def check_written(self, changes: Float[Tensor, "prompt writer pos d_model"], where: slice) -> None:
        """The changes of all writers add up to that of the final stream: else a writer is missing in the graph."""
        expected = self.final_change[:, where]
        error, size = float((changes.sum(1) - expected).abs().max()), float(expected.abs().max())
        if not error <= tolerance("edges", self.model.dtype) * max(size, float(changes.abs().max()), 1e-6):
            raise ValueError(
                f"model: embedding, heads and MLPs do not add up to the residual stream of {self.model.name} "
                f"({self.model.cfg.architecture}): off by {error:.1e} of {size:.1e}, so that its edges are not known"
            )

    def _check_covered(
        self, of_embedding: Float[Tensor, "prompt"], sizes: Float[Tensor, "prompt"], total: Float[Tensor, "prompt"]
    ) -> None:
        """What the embedding adds through all of its edges is what it adds at all: else a reader is missing in the graph.
        (Where only some positions count, the sum says nothing.)"""
        if not bool(torch.isfinite(total).all()):
            raise ValueError(
                f"metric: expected a finite gradient, got NaN or inf from {self.chunk.experiment.metric.name!r} for prompts "
                f"{self.chunk.ids[~torch.isfinite(total).cpu()].tolist()[:5]}"
            )
        error, size = float((of_embedding - total).abs().max()), float(sizes.max())
        sums = not self.relp and self.scores.positions is None
        if sums and not error <= tolerance("edges", self.model.dtype) * max(size, 1e-6):
            raise ValueError(
                f"model: the scores of the embedding's edges add up to something else than the whole gradient says (off by "
                f"{error:.1e} of {size:.1e}): something besides heads and MLPs reads the residual stream of {self.model.name} "
                f"({self.model.cfg.architecture})"
            )

    def along_activations(self, points: list[float], weights: list[float]) -> None:
        """Adds the scores of each layer's heads, of each MLP, and of the embedding, from paths of their own."""
        whole = self.chunk.runs.how != "suffix"
        for group in self.graph.writing:
            site, layer = group.recorded
            start, end = self.base.sites[site, layer], self.source.sites[site, layer]
            mean = _Mean(self, group.writers)
            for row, point, weight in batches(self.chunk, points, weights):
                at = (start[row] + point.reshape(-1, *[1] * (start.ndim - 1)) * (end - start)[row]).to(start.dtype)

                def replace(activation: Tensor, hook: Any, at: Tensor = at) -> Tensor:
                    return at

                hidden = None if whole and site != "resid_pre" else self.base.sites["resid_pre", layer][row]
                hooks: HookPairs = [] if site == "resid_pre" else [(SITES[site].hook_name(layer), replace)]
                hidden = at if site == "resid_pre" else hidden
                mean.add(row, weight, *self._backward(row, hidden, layer, hooks)[1:])
            mean.contract()

    def _backward(
        self, row: Int[Tensor, "row"], hidden: Tensor | None, layer: int, edits: Sequence[tuple[str, Any]]
    ) -> tuple[Tensor, Streams, Gradients]:
        """One forward and backward pass from block `layer` on.

        Returns:
            The gradient at what the first block reads; what the readers of every later group read, and the gradients there.
        """
        groups = [group for group in self.graph.reading if group.layer >= layer]
        streams: Streams = {}
        gradients: Gradients = {group: {} for group in groups}

        def keep_gradient(activation: Tensor, hook: Any, kept: dict[str, Tensor], name: str) -> Tensor:
            def keep(gradient: Tensor | None) -> None:  # None where another rule leads past it
                if gradient is not None:
                    kept[name] = gradient

            return tapped(activation, keep)

        read = dict.fromkeys(group.stream for group in groups if group.layer < self.model.n_layers)
        hooks: HookPairs = [*edits, *keepers(list(read), streams, lambda activation, _: activation.detach())]
        for group in groups:
            places = group.kind.gradients_at(group.layer).items()
            hooks += [(hook, partial(keep_gradient, kept=gradients[group], name=name)) for name, hook in places]
        rows = self.chunk.inputs[self.chunk.experiment.base_is][row]
        with relevance_rules(self.model, "gradient") if self.relp else nullcontext():
            leaf, final = self.chunk.runs.forward(rows, row, hooks, hidden=hidden, layer=layer, leaf=True)
            assert leaf is not None
            final = tapped(final, partial(gradients[groups[-1]].__setitem__, "stream"))
            (slope,) = torch.autograd.grad(self.chunk.metric(final, row).sum(), leaf)
        return slope, streams, gradients


class _Mean:
    """Gradients at the residual stream of all readers of some writers, averaged over a path; and their products with these
    writers' changes."""

    def __init__(self, work: _Work, writers: slice) -> None:
        self.work, self.writers = work, writers
        self.readers: dict[Group, Tensor] = {}  # [prompt reader pos d_model]

    def add(self, row: Tensor, weight: Tensor, streams: Streams, gradients: Gradients) -> None:
        for group, kept in gradients.items():
            if group.sees > self.writers.start:  # some of them read the first of the writers
                self._add(group, row, weight, self._pulled_back(group, streams, kept))

    def _add(
        self, group: Group, row: Tensor, weight: Tensor, gradients: Float[Tensor, "row pos reader d_model"]
    ) -> None:
        gradients = gradients.to(weight.dtype) * weight[:, None, None, None]
        n = len(self.work.chunk.ids)
        if len(row) != n:  # several points of the path; else rows are the prompts in their order
            gradients = gradients.new_zeros(n, *gradients.shape[1:]).index_add(0, row, gradients)
        summed = gradients.transpose(1, 2)
        self.readers[group] = self.readers[group] + summed if group in self.readers else summed

    def _pulled_back(
        self, group: Group, streams: Streams, kept: dict[str, Tensor]
    ) -> Float[Tensor, "row pos reader d_model"]:
        missing = [which for which in group.kind.gradients_at(group.layer) if which not in kept]
        if missing:
            raise ValueError(
                f"metric: no gradient path from {self.work.chunk.experiment.metric.name!r} to the {missing[0]} of layer "
                f"{group.layer} of {self.work.model.name}, so that edges cannot be estimated there; use edge_patching, which "
                "needs none"
            )
        x = (
            streams[group.stream] if group.stream in streams else kept["stream"]
        )  # behind the last block nothing is in between
        return group.kind.pull_back(self.work.parts, group.layer, x, kept, self.work.relp)

    @torch.no_grad()
    def contract(self) -> tuple[Float[Tensor, "prompt"], Float[Tensor, "prompt"]]:
        """Adds the scores, from changes of a few positions at a time. Returns the first writer's sums, and sums of sizes."""
        work = self.work
        n, n_positions = work.counts.shape
        first, sizes = (work.scores.values.new_zeros(n, device=work.chunk.everyone.device) for _ in range(2))
        for where in self._position_blocks(n_positions):
            changes = work.source.changes(work.base, where)
            work.check_written(changes, where)
            changes = (changes * work.counts[:, None, where, None]).to(work.scores.values.dtype).flatten(2)
            for group, gradients in self.readers.items():
                writers = slice(self.writers.start, min(group.sees, self.writers.stop))
                gradients = gradients[:, :, where].to(changes.dtype).flatten(2)
                part = torch.bmm(changes[:, writers], gradients.mT)
                first += part[:, 0].sum(-1)
                sizes += part[:, 0].abs().sum(-1)
                work.scores.add(work.chunk.ids, writers, group.readers, part)
        return first, sizes

    def _position_blocks(self, n_positions: int) -> Iterator[slice]:
        """Positions whose changes fit into a quarter of the budget at once."""
        work = self.work
        a_position = len(work.chunk.ids) * len(work.graph.writers) * work.model.d_model * work.scores.values.itemsize
        size = max(1, work.chunk.experiment.budget.bytes // 4 // a_position)
        return (slice(first, min(first + size, n_positions)) for first in range(0, n_positions, size))
