"""Erasure check: what becomes of a head's direct effect in the rest of the model?

Direct logit attribution credits a head with what it wrote in the direction that the metric reads. A later component may read
that and take it out again, so that the head has no effect at all. So:

1. Run the prompts, and run them again with the head ablated.
2. *Direct effect*: what the head's own output loses, read along the metric's direction (the final norm's scale held fixed).
3. *Indirect effects*: what every later component's output loses, read in the same way. One that loses as much with the opposite
   sign wrote the opposite of what the head wrote: an eraser.
4. *Total effect*: what the metric loses. It is the sum of all these, and of a rest: the final norm's scale also changed.

Dao et al. 2023, https://arxiv.org/abs/2310.07325 (a 4-layer GELU model whose heads erase what an earlier one wrote).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechkit._check import checked
from mechkit._drawn import Drawn
from mechkit._progress import Progress
from mechkit.attribution._reading import Direction, as_direction, to_result
from mechkit.attribution._stream import StreamRun, labels, needed
from mechkit.attribution.ablation import position_means
from mechkit.engine import Budget, attached_hooks, check_can_run
from mechkit.experiment.positions import split_prompts
from mechkit.hooks import SITES, HookedModel, one_at_a_time
from mechkit.metrics import Metric
from mechkit.prompts import AnyPrompts, Prompts, as_prompts
from mechkit.result import Result


@dataclass(frozen=True)
class Erasure(Drawn):
    """What ablating one head takes away, and where.

    Attributes:
        head: `(layer, head)`.
        direct: Direct effect of each prompt, dims `("prompt",)`: positive where the head's own output pushed the metric up.
        total: Total effect: the metric of the run minus that of the run with the head ablated.
        written: The part of the total effect that every other head and MLP from the head's layer on wrote, dims
            `("component", "prompt")`; `"final norm"` is what the change of its scale (and of a soft cap's factor) adds. Where a
            block norms what it adds, other heads of the head's own layer change with that norm's scale.
        erased: Share of the direct effect that later components take back, from the means over prompts: 0 if nothing is erased,
            1 if all of it is, above 1 if more than it; NaN for a head without direct effect.
    """

    head: tuple[int, int]
    direct: Result
    total: Result
    written: Result
    erased: float

    @checked
    def erasers(self, k: int = 3) -> tuple[tuple[str, float], ...]:
        """The later components that wrote the opposite of the head, strongest first: names and mean effects."""
        direct = float(self.direct.mean("prompt").values)
        mean = self.written.mean("prompt").values
        order = (mean * (1 if direct > 0 else -1)).argsort(stable=True).tolist()
        names = self.written.coords["component"]
        opposite = [(str(names[i]), float(mean[i])) for i in order if names[i] != "final norm"]
        return tuple((name, value) for name, value in opposite if value * direct < 0)[:k]

    def __str__(self) -> str:
        unit = self.direct.unit
        direct, total = (float(r.mean("prompt").values) for r in (self.direct, self.total))
        by = ", ".join(f"{name} ({value:+.3g})" for name, value in self.erasers())
        share = f"take back {self.erased:.0%}" if self.erased >= 0 else f"add {-self.erased:.0%}"
        return (
            f"L{self.head[0]}H{self.head[1]}: direct effect {direct:+.3g} {unit}, total effect {total:+.3g}; later components "
            f"{share} of the direct effect{f'; the opposite is written by {by}' if by else ''}; the final norm's scale adds "
            f"{float(self.written.sel(component='final norm').mean('prompt').values):+.3g}"
        )


@checked
@one_at_a_time
def dla_erasure_check(
    model: HookedModel,
    prompts: AnyPrompts,
    metric: Direction,
    head: tuple[int, int],
    *,
    mode: Literal["zero", "mean", "position_mean"] = "zero",
    budget: int | None = None,
    progress: bool = True,
) -> Erasure:
    """Measures how much of a head's direct effect on the metric later components remove, and which of them.

    Args:
        model: In evaluation mode.
        prompts: The prompts to run: the clean ones of pairs.
        metric: As for `direct_logit_attribution`: linear in the logits, a token, or a direction.
        head: `(layer, head)`.
        mode: What the head's output is replaced with, as for `ablation`: `"zero"`; or, for a head whose output is mostly the
            same everywhere, `"mean"`, over all prompts and positions, or `"position_mean"`, over the prompts at each position
            counted from the start (those that are long enough).
        budget: Bytes of working memory; default half of what the device has free (1 GiB on a CPU).
        progress: Show a progress bar when it takes long.

    Returns:
        An `Erasure`. Effects are run minus ablated run: positive where the head (through that component) pushed the metric up.

    Raises:
        ValueError: no such head or mode; a mean over a single prompt; a metric that is not linear in the logits;
            training mode.
    """
    prompts = as_prompts(model, prompts)
    if not (isinstance(head, tuple | list) and len(head) == 2 and all(hasattr(i, "__index__") for i in head)):
        raise ValueError(f"head: expected (layer, head), two indices; got {head!r}")
    layer, index = (int(i) for i in head)
    if not (0 <= layer < model.n_layers and 0 <= index < model.n_heads):
        raise ValueError(
            f"head: expected (layer, head) within {model.n_layers} layers and {model.n_heads} heads, got {head}"
        )
    model.check_every_layer(["z", "attn_out"], "the erasure check")
    base, _, task = split_prompts(prompts)
    check_can_run(model, {"prompt": base})
    direction = as_direction(model, metric, prompts)
    longest = int(base.lengths.max())
    n_longest = int((base.lengths == longest).sum())
    if (mode == "mean" and len(base) < 2) or (mode == "position_mean" and n_longest < 2):
        which = "prompts" if mode == "mean" else f"prompts of {longest} tokens, so that each position has a mean"
        raise ValueError(f"mode: {mode!r} needs at least 2 {which}; use 'zero', or more prompts")
    names = _writers(model, (layer, index))
    direct, total = (torch.zeros(len(base), dtype=torch.float64) for _ in range(2))
    written = torch.zeros(len(names), len(base), dtype=torch.float64)
    room = Budget.of(model, budget)
    replacement = _replacement(model, base, (layer, index), mode, room)
    with Progress(len(base), "prompt", progress) as bar:
        for part in (batch.ids for batch in base.batches(lambda length, _: room.prompts_at_once(model, length, []))):
            change, total[part] = _what_ablation_takes(model, base, part, direction, (layer, index), replacement)
            direct[part] = change.pop(f"L{layer}H{index}")
            written[:, part] = torch.stack([change[name] for name in names])
            bar.update(len(part))
    written = torch.cat([written, (total - direct - written.sum(0))[None]])
    mean, taken = float(direct.mean()), float(written[:-1].mean(1).sum())
    mine = f"L{layer}H{index}"
    later = (*names, "final norm")

    def result(values: Tensor, coords: dict[str, tuple[int | str, ...]], what: str) -> Result:
        about = {"technique": "dla_erasure_check", "what": what, "head": mine, "mode": mode, "task": task}
        return to_result(values, coords, model, base, direction, runs=2, **about)

    return Erasure(
        head=(layer, index),
        direct=result(direct, {}, "direct effect"),
        total=result(total, {}, "total effect"),
        written=result(written, {"component": later}, "indirect effects"),
        erased=-taken / mean if mean else float("nan"),
    )


def _writers(model: HookedModel, head: tuple[int, int]) -> list[str]:
    """Everything that writes into the stream from the head's layer on, except the head itself."""
    names = []
    for layer in range(head[0], model.n_layers):
        names += [f"L{layer}H{i}" for i in range(model.n_heads) if (layer, i) != head]
        names += [f"L{layer} mlp"] if model.has_site("mlp_out") else []
    return names


def _replacement(
    model: HookedModel, prompts: Prompts, head: tuple[int, int], mode: str, budget: Budget
) -> Float[Tensor, "1 pos_or_1 d_head"]:
    """What is written in place of the head's output, for prompts of any length."""
    if mode == "zero":
        return torch.zeros(1, 1, 1, dtype=model.dtype, device=model.device)
    key = ("z", head[0])
    mean, count = (x[:, :, min(head[1], x.shape[2] - 1)] for x in position_means(model, [key], 1, prompts, budget)[key])
    if mode == "mean":
        mean = (mean * count).sum(1, keepdim=True) / count.sum()
    return mean.to(model.dtype)


@torch.no_grad()
def _what_ablation_takes(
    model: HookedModel,
    prompts: Prompts,
    ids: Sequence[int],
    direction: Metric | Tensor,
    head: tuple[int, int],
    replacement: Float[Tensor, "1 pos_or_1 d_head"],
) -> tuple[dict[str, Tensor], Tensor]:
    """By writer, what its term loses when the head is ablated; and what the metric loses. Both `[prompt]`, in float64."""

    def ablate(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, head[1]] = replacement[:, : z.shape[1]]
        return z

    layers = {"layer": range(head[0], model.n_layers), "head": range(model.n_heads)}
    also = needed(model, "layer head", layers)
    run = StreamRun(model, prompts, ids, direction, also)
    with attached_hooks(model, [(SITES["z"].hook_name(head[0]), ablate)]):
        ablated = StreamRun(model, prompts, ids, direction, also)
    total = run.reading.value - ablated.reading.value
    ablated.read_along(run.reading)
    change = dict(zip(labels(model, "component"), run.components() - ablated.components(), strict=True))
    for layer in layers["layer"]:
        heads = run.heads(layer, layers, {}) - ablated.heads(layer, layers, {})
        change |= {f"L{layer}H{i}": heads[i] for i in range(model.n_heads)}
    return {name: x.double().cpu() for name, x in change.items()}, total.double().cpu()
