"""Runs with gradients, only on the positions that can matter.

Attribution methods compare two runs, of base prompts and of source prompts, and want the metric's gradient with respect to
activations of the base run. Before the first position at which the two prompts differ the runs are the same: an
activation there does not change, and its gradient is not needed. So:

1. Parameters are frozen: no gradient is computed for them, and their `.grad` stays as it was.
2. The base prompts' common beginnings are run once without gradients, for each layer's keys and values (skipped where little
   would be saved), equal beginnings once for all of them.
3. The blocks run again only on the positions from `start` on, with these keys and values as a prefix that is only read.
   Gradients flow back through these positions only.
4. Each call proves itself on its longest prompts: suffixes of one pair must end where the pair's whole runs end. And in each set
   of prompts the pair whose tokens differ first is run whole: its runs must agree until then. Where that fails (models that look
   ahead, state-space models, hooks of other code) whole forward passes are run, and `GradientRuns.how` says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._precision import Rounding, tolerance, widen
from mechkit.engine._causality import agree_before_difference, same_so_far
from mechkit.engine._measure import call_metric, read_metric
from mechkit.engine._replay import CANNOT_RUN, Replayer
from mechkit.hooks._capture import capture
from mechkit.hooks._devices import out_of_memory, to_device
from mechkit.hooks._hooking import Hooks
from mechkit.hooks._lock import lock_of
from mechkit.hooks._readout import check_logits_of_stream, unembedding_only, unembeds_final_stream
from mechkit.hooks._record import Run, record
from mechkit.hooks._seams import HookFunction
from mechkit.hooks._streamed import refuse_streamed
from mechkit.hooks.loading.pictures import PIXELS
from mechkit.metrics import CallableMetric, Metric
from mechkit.prompts import Stacked

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel


@contextmanager
def frozen_parameters(model: HookedModel) -> Iterator[None]:
    """No parameter gets a gradient inside; whatever happens, each one's `requires_grad` is what it was afterwards."""
    refuse_streamed(model.bridge, "gradients")
    with lock_of(model.bridge).held("takes gradients in it"):
        parameters = [p for p in model.bridge.original_model.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)


@contextmanager
def attached_hooks(model: HookedModel, hooks: Sequence[tuple[str, HookFunction]]) -> Iterator[None]:
    """Hooks by full name, attached inside. Unlike `model.hooks` it does not ask that each one fires."""
    with Hooks(model.bridge) as attached:
        for name, fn in hooks:
            attached.attach(name, fn)
        yield


# Tokens that are run for nothing rather than in a pass of their own: a pass of so few takes as long as reading the weights.
TOGETHER = 64


LOOKS_AHEAD = "two runs differ before their first different token: not a causal model"


class GradientRuns:
    """Runs prompts of equal length from any block on, on positions from `start` on, with gradients where they are enabled.

    Attributes:
        start: The first position that is run.
        how: `"suffix"`, or `"full: …"` with the reason why whole forward passes are run.
        block_tokens: (block, token) pairs computed so far, forward passes alone.
    """

    def __init__(
        self,
        model: HookedModel,
        base: Stacked,
        source: Stacked | None,
        start: int,
        *,
        whole: str | None = None,
        proofs: dict[tuple[Any, int], str | None] | None = None,
        defer: bool = False,
        from_pixels: bool = False,
    ) -> None:
        """
        Args:
            model: In evaluation mode.
            base: The prompts whose keys and values serve as prefix.
            source: Prompts that equal the base prompts before `start`, if any will be run.
            start: First position to run; moved to 0 where that is cheaper.
            whole: A reason to run whole forward passes from the outset.
            proofs: What was found so far in the same call, by the prompts' kind (`Stacked.kind`) and their start: `None`, or why
                suffixes cannot be run (which then holds for all). What is found here is added.
            defer: Leave the proof to the caller's own first runs, which saves a pass: see `proved`.
            from_pixels: Whether the leaf of whole passes is the pictures, so that gradients come to the vision tower.
        """
        self._from_pixels = from_pixels
        self.model, self.base, self.block_tokens = model, base, 0
        self.how = "suffix"
        self._reads = False  # whether logits of whole runs were found to be those read off their final streams
        if whole is None and model.reads_pictures_alone:
            whole = "each patch sees all others: not a causal model"
        if whole is None and model.has_hooks:
            whole = "other hooks are attached to the model"
        length, self._kind = base.tokens.shape[1], base.kind
        self.start = start if 3 * start >= length and whole is None else 0
        self._replayer: Replayer | None = None
        self._prefix_of = torch.arange(
            len(base), device=base.tokens.device
        )  # which recorded prefix each base prompt has
        self._prefix_final: Tensor | None = None  # the final residual stream of those prefixes
        self._unproved = False
        self._sample_final: Tensor  # the final residual stream of the prompts that are the proof, by whole runs
        self._proofs = proofs = {} if proofs is None else proofs
        if whole is None:
            whole = next((refuted for refuted in proofs.values() if refuted is not None), None)
            if whole is None:
                whole = self._prepare(source, prove=(self._kind, self.start) not in proofs, defer=defer)
            proofs[self._kind, self.start] = whole
        if whole is not None:
            self.start, self._replayer, self.how = 0, None, f"full: {whole}"

    @torch.no_grad()
    def _prepare(self, source: Stacked | None, prove: bool, defer: bool) -> str | None:
        """Records what the suffix needs, and proves it. Returns why that cannot be done, or `None`."""
        model = self.model
        sample, pair = self._sample(source, prove)
        try:
            run = self._record(sample)
            if self.start and self._prefix_differs(sample, pair):
                return LOOKS_AHEAD
            if run.between:  # another picture adds something else
                return "the model adds to the residual stream between its blocks"
            self._replayer = Replayer(model, run, None)
            if not prove:
                return None
            if not unembeds_final_stream(model, run):
                return "the logits are not a function of the last block's output"
            if defer:
                self._unproved = True
                return None
            sample = sample[: 1 if source is None else 2]
            found = self.forward(sample, torch.zeros(len(sample), dtype=torch.long, device=sample.tokens.device))[1]
            return self._refuted(found)
        except CANNOT_RUN as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            return f"blocks cannot be run by themselves: {error}"
        return None

    def _sample(self, source: Stacked | None, prove: bool) -> tuple[Stacked, slice]:
        """The prompts that are run whole: the first pair, which is the proof, and the pair whose tokens differ first, which shows
        whether a model looks ahead; and which rows the latter is."""
        if source is None or (not prove and self.start == 0):
            return self.base[:1], slice(0, 0)
        first = int(same_so_far(self.base, source).sum(1).argmin())
        rows = Stacked.cat([self.base[:1], source[:1]])
        if first == 0:
            return rows, slice(0, 2)
        return Stacked.cat([rows, self.base[first : first + 1], source[first : first + 1]]), slice(2, 4)

    def _prefix_differs(self, sample: Stacked, pair: slice) -> bool:
        """Whether positions before `start` are something else in whole runs than in the prefix, which may have been run by
        itself, or something else in the source run of a pair than in its base run."""
        assert self._prefix_final is not None
        whole, prefix = self._sample_final[:1, : self.start], self._prefix_final[self._prefix_of[:1]]
        if not float((whole - prefix).abs().max() / whole.abs().max()) <= tolerance("runs", self.model.dtype):
            return True
        rows, finals = sample[pair], self._sample_final[pair]
        return len(rows) > 0 and not bool(agree_before_difference(rows[:1], rows[1:], finals[:1], finals[1:]))

    def _refuted(self, found: Float[Tensor, "row suffix d_model"]) -> str | None:
        """Why these final streams of the sample's suffixes are not those of its whole runs; `None` if they are."""
        expected = self._sample_final[: len(found), self.start :]
        rounding = Rounding.of(self.model.dtype)
        if not (off := rounding.off(found, expected)) <= rounding.of_logits:
            return f"suffixes of runs differ from whole runs by {off:.1e} of the residual stream"
        return None

    def proved(self, final: Float[Tensor, "2 suffix d_model"]) -> bool:
        """Makes up for a proof that was deferred, with the final streams of the first base and the first source prompt.

        Returns:
            Whether what was run so far stands. If not, whole forward passes are run from now on, and it must be run again.
        """
        if not self._unproved:
            return True
        self._unproved = False
        whole = self._refuted(final.detach())
        if whole is not None:
            self._run_whole(whole)
        return whole is None

    def refuted_by(self, error: Exception) -> bool:
        """Whether an error of the first runs says that suffixes cannot be run: whole forward passes are run from now on."""
        if not self._unproved or (isinstance(error, RuntimeError) and out_of_memory(error)):
            return False
        self._unproved = False
        self._run_whole(f"blocks cannot be run by themselves: {error}")
        return True

    def _run_whole(self, why: str) -> None:
        self._proofs[self._kind, self.start] = why
        self.start, self._replayer, self.how = 0, None, f"full: {why}"

    def _record(self, sample: Stacked) -> Run:
        """The blocks' arguments for prompts of this length, and the keys and values of all base prompts before `start`.

        Masks and position encodings are the same for all prompts of a length: the sample's serve. Equal beginnings are run once.
        """
        if self.start == 0:
            run = self._counted(sample)
            self._sample_final = run.resid[-1]
            return run
        base = self.base.tokens
        prefixes, inverse = base[:, : self.start].unique(dim=0, return_inverse=True)
        if self.base.inputs:  # a beginning may have part of a picture, which cannot be run: whole prompts are
            run = self._counted(Stacked.cat([sample, self.base]))
            self._sample_final, before = run.resid[-1][: len(sample)], run
            self._prefix_of = len(sample) + torch.arange(len(base), device=base.device)
        elif len(prefixes) * (base.shape[1] - self.start) <= TOGETHER:
            first = torch.stack([(inverse == i).nonzero()[0, 0] for i in range(len(prefixes))])
            others = first[first != 0]  # the first base prompt is in the sample
            run = self._counted(Stacked.cat([sample, self.base[others]]))
            self._sample_final, before = run.resid[-1][: len(sample)], run
            row = torch.zeros_like(first)
            row[first != 0] = len(sample) + torch.arange(len(others), device=row.device)
            self._prefix_of = row[inverse]
        else:
            run, before = self._counted(sample), self._counted(Stacked(prefixes))
            self._sample_final, self._prefix_of = run.resid[-1], inverse
        self._prefix_final = before.resid[-1][:, : self.start]
        calls = [{k: before.cache if v is run.cache else v for k, v in call.items()} for call in run.calls]
        return replace(run, calls=calls, cache=before.cache)

    def _counted(self, rows: Stacked) -> Run:
        self.block_tokens += rows.tokens.numel() * self.model.n_layers
        return record(self.model, rows)

    @torch.no_grad()
    def embed(self, rows: Stacked) -> Float[Tensor, "row suffix d_model"]:
        """What the first block reads, from `start` on. No block is run."""
        read = ("resid_pre", 0)
        with capture(self.model, [read], stop=read) as kept:
            self.model.run(rows)
        return kept[read][:, self.start :]

    def forward(
        self,
        rows: Stacked,
        prompt: Int[Tensor, "row"],
        hooks: Sequence[tuple[str, HookFunction]] = (),
        *,
        hidden: Float[Tensor, "row suffix d_model"] | None = None,
        layer: int = 0,
        leaf: bool = False,
    ) -> tuple[Tensor | None, Float[Tensor, "row suffix d_model"]]:
        """Runs rows to the end.

        Args:
            rows: The prompts to run; before `start` they are their base prompts.
            prompt: Which base prompt that is.
            hooks: `(full hook name, function)` pairs; activations begin at position `start`.
            hidden: What block `layer` reads, instead of the embedded tokens.
            layer: The first block to run, where `hidden` is given.
            leaf: Whether gradients are to flow back to the first thing that is computed, for `torch.autograd.grad`.

        Returns:
            That leaf (`None` without one), and the final residual stream.
        """
        if self._replayer is None:
            return self._whole(rows, hooks, hidden, layer, leaf)
        hidden = self.embed(rows) if hidden is None else hidden
        hidden = hidden.detach().requires_grad_() if leaf else hidden
        first = hidden if leaf else None
        with Hooks(self.model.bridge) as attached:
            for name, fn in hooks:
                attached.attach(name, fn)
            for i in range(layer, self.model.n_layers):
                hidden = self._replayer.block(i, hidden, self._prefix_of[prompt], self.start)
        self.block_tokens += hidden.shape[0] * hidden.shape[1] * (self.model.n_layers - layer)
        return first, hidden

    @torch.no_grad()
    def capture(
        self,
        rows: Stacked,
        prompt: Int[Tensor, "row"],
        hooks: Sequence[tuple[str, HookFunction]],
        name: str,
        *,
        hidden: Float[Tensor, "row suffix d_model"],
        layer: int,
    ) -> Tensor:
        """One activation (full hook name) of block `layer`, given what the block reads, and nothing that comes after it."""
        with capture(self.model, [name], stop=name, hooks=hooks) as kept:
            if self._replayer is None:
                self._whole(rows, (), hidden, layer, leaf=False)
            else:
                self.block_tokens += hidden.shape[0] * hidden.shape[1]
                self._replayer.block(layer, hidden, self._prefix_of[prompt], self.start)
        return kept[name]

    def _whole(
        self,
        rows: Stacked,
        hooks: Sequence[tuple[str, HookFunction]],
        hidden: Tensor | None,
        layer: int,
        leaf: bool,
    ) -> tuple[Tensor | None, Tensor]:
        """The same by a whole forward pass, in which `hidden` takes the place of what block `layer` reads."""
        kept: list[Tensor] = []
        leaves: list[Tensor] = []
        self.block_tokens += rows.tokens.numel() * self.model.n_layers

        def enter(activation: Tensor, hook: object) -> Tensor:
            entering = activation if hidden is None else hidden
            if leaf:
                entering = entering.detach().requires_grad_()
                leaves.append(entering)
            return entering

        def keep_final(module: object, args: object, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple | list) else output)

        if leaf and self._from_pixels:
            pixels = rows.inputs[PIXELS].to(self.model.dtype).detach().requires_grad_()
            rows, leaf = replace(rows, inputs={**rows.inputs, PIXELS: pixels}), False
            leaves.append(pixels)
        at = "hook_embed" if hidden is None and self.model.has_site("embed") else f"blocks.{layer}.hook_resid_pre"
        handles = []
        with Hooks(self.model.bridge) as attached:
            if leaf or hidden is not None:
                attached.attach(at, enter)
            for name, fn in hooks:
                attached.attach(name, fn)
            handles.append(self.model.stack.blocks[-1].register_forward_hook(keep_final))
            try:
                with unembedding_only(self.model, lambda stream: stream[:, -1:]):  # these logits are a check, no more
                    logits = self.model.run(rows)
            finally:
                for handle in handles:
                    handle.remove()
        if not self._reads:
            read = slice(0, 1) if self.model.reads_pictures_alone else slice(-logits.shape[1], None)
            final = kept[-1][:2, read].detach()
            check_logits_of_stream(self.model, final.flatten(0, 1), logits[:2].detach().flatten(0, 1), "a gradient")
            self._reads = True
        return leaves[0] if leaves else None, kept[-1]

    def logits(self, final: Tensor, positions: Tensor, tokens: Int[Tensor, "token"] | None) -> Tensor:
        """The logits of chosen tokens where each row is read, from what `forward` returned: `[row token]` for positions `[row]`,
        `[row place token]` for `[row place]`. None of them lies before `start`."""
        rows = torch.arange(len(final), device=final.device).reshape(-1, *[1] * (positions.ndim - 1))
        at = final[rows, positions.to(final.device) - self.start]
        return widen(self.model.unembed(at, tokens))

    def all_logits(self, final: Tensor, prompt: Int[Tensor, "row"]) -> Float[Tensor, "row pos d_vocab"]:
        """The logits at every position; those before `start` are the base run's."""
        if self.start:
            assert self._prefix_final is not None
            final = torch.cat([self._prefix_final[self._prefix_of[prompt]], final], 1)
        return widen(self.model.unembed(final))


def metric_values(
    runs: GradientRuns,
    metric: Metric | CallableMetric,
    final: Tensor,
    ids: Int[Tensor, "row"],
    prompt: Int[Tensor, "row"],
    reference: Tensor | None = None,
    *,
    n_prompts: int,
) -> Float[Tensor, "row"]:
    """The metric of each row, in the graph.

    Args:
        runs: What computed `final`.
        metric: What to read. A callable gets the logits of all prompts at once.
        final: From `runs.forward`.
        ids: Which of the metric's prompts each row is.
        prompt: Which of the runs' base prompts each row is.
        reference: The logits of the unedited run that the metric compares with, where it does.
        n_prompts: How many prompts the metric has in all.

    Raises:
        ValueError: the metric does not return one value per row, or the values have no gradient.
    """
    if isinstance(metric, Metric):
        value = read_metric(metric, runs.logits(final, metric.positions[ids], metric.tokens), ids, reference)
    else:

        def logits_of(rows: np.ndarray) -> Tensor:
            some = to_device(rows, final.device)
            return runs.all_logits(final[some], prompt[some])

        value = call_metric(metric, logits_of, ids.numpy(), n_prompts)
    if torch.is_grad_enabled() and final.requires_grad and not value.requires_grad:
        raise ValueError(
            f"metric {metric.name!r}: no gradient path from the logits to its value (a step function such as accuracy, or "
            "something computed outside torch's autograd); use a differentiable metric such as mk.logit_diff"
        )
    return value
