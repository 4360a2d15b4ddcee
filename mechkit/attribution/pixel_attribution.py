"""Which pixels of a picture the answer depends on, by gradients down to the model's pixel input.

1. `"gradient"`: the metric's gradient with respect to each pixel. `"gradient_x_input"`: that times the pixel.
2. `"integrated_gradients"`: the gradient averaged over the straight way from a picture without content to the picture, times the
   difference of the two. All pixels together sum to the metric's difference, to the error that is reported.

Pixels are as the model takes them: scaled by its processor, so that 0 is a mean grey, not black. Gradients say what a small
change does. What a patch carries is found by exchanging it (`image_patching`).

Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mechkit._check import checked, is_whole
from mechkit._precision import wide_dtype
from mechkit._progress import Progress
from mechkit.engine import Budget, call_metric, check_can_run, frozen_parameters, logits_at_hand, read_metric
from mechkit.experiment.positions import split_prompts
from mechkit.experiment.provenance import pictures_of, provenance_of
from mechkit.hooks import HookedModel, one_at_a_time
from mechkit.metrics import AnyMetric, CallableMetric, Metric, metric_for
from mechkit.prompts import PromptPairs, Prompts, Stacked
from mechkit.result import Result

Method = Literal["gradient", "gradient_x_input", "integrated_gradients"]
PIXELS = "pixel_values"


@checked
@one_at_a_time
@torch.inference_mode(False)
def pixel_attribution(
    model: HookedModel,
    prompts: PromptPairs | Prompts,
    metric: AnyMetric,
    method: Method = "integrated_gradients",
    *,
    baseline: Literal["zero", "blur"] | Prompts = "zero",
    steps: int = 50,
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """The metric's gradient at each pixel, summed over the colour channels.

    Args:
        model: Reads pictures; in evaluation mode.
        prompts: Whose pictures have one size; the clean prompts of pairs.
        metric: As for `gradient_x_input`; one with a gradient.
        method: `"gradient"`, `"gradient_x_input"` or `"integrated_gradients"`.
        baseline: Where integrated gradients begin: `"zero"` (a mean grey, for most processors), `"blur"` (the picture without its
            details), or the same prompts with other pictures.
        steps: How many gradients integrated gradients take, at the middles of as many equal parts.
        budget, progress: As for `activation_patching`.

    Returns:
        A `Result` with dims `("picture", "row", "column", "prompt")`, one picture for each tile or view that the model takes,
        rows from the top. Units are the metric's (for `"gradient"` the metric's per unit of a scaled pixel). Integrated gradients
        have `provenance["completeness_error"]`: the largest difference, over prompts, of the sum of all pixels from the metric's
        change, as a share of the largest change.

    Raises:
        ValueError: prompts without pictures or of several sizes, a metric without a gradient, a baseline of another form.

    Example:
        >>> pixels = pixel_attribution(model, pairs, logit_diff(pairs))
        >>> pixels.provenance["completeness_error"]
    """
    base, _, task = split_prompts(prompts)
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {', '.join(get_args(Method))}; got {method!r}")
    if not is_whole(steps) or steps < 1:
        raise ValueError(f"steps: expected a whole number of 1 or more, got {steps!r}")
    _check_pictures(model, base)
    measured = metric_for(metric, prompts)
    if isinstance(measured, Metric) and (measured.reference is not None or measured.parts):
        raise ValueError(f"metric: expected one that reads one run, got {measured.name!r}")
    start = _start(model, base, baseline) if method == "integrated_gradients" else None
    dtype = wide_dtype(model.dtype)
    values: list[Tensor] = [torch.empty(0)] * len(base)
    found = torch.empty(len(base), dtype=dtype)
    changes, sums = torch.zeros(len(base), dtype=dtype), torch.zeros(len(base), dtype=dtype)
    room, passes = Budget.of(model, budget), 0
    together = isinstance(measured, CallableMetric)
    with Progress(len(base), "prompt", progress) as bar, frozen_parameters(model):
        fit = None if together else lambda length, _: max(1, room.prompts_at_once(model, length, []) // 4)
        for batch in base.batches(fit):
            rows = batch.stacked.to(model.device)
            pixels = rows.inputs[PIXELS].to(model.dtype)
            if start is None:
                gradient, value = _gradient(model, rows, pixels, measured, batch.ids, len(base))
                attributed, passes = gradient if method == "gradient" else gradient * pixels, passes + len(batch)
            else:
                before = start.stack(batch.ids).to(model.device).inputs[PIXELS].to(model.dtype)
                gradient = torch.zeros_like(pixels)
                for step in range(steps):
                    at = before + (step + 0.5) / steps * (pixels - before)
                    gradient += _gradient(model, rows, at, measured, batch.ids, len(base))[0] / steps
                attributed = gradient * (pixels - before)
                with torch.no_grad():
                    value, none = (
                        _metric(model, _with(rows, at), measured, batch.ids, len(base)) for at in (pixels, before)
                    )
                changes[batch.ids] = (value - none).cpu().to(dtype)
                passes += len(batch) * (steps + 2)
            found[batch.ids] = value.detach().cpu().to(dtype)
            for i, one in zip(batch.ids, attributed.cpu().to(dtype), strict=True):
                sums[i] = one.sum()
                values[i] = torch.stack([picture.sum(0) for picture in model.pixel_maps(base, i, one)])
            bar.update(len(batch))
    if not bool(torch.stack(values).isfinite().all()):
        raise ValueError("gradient: expected finite numbers, got NaN or inf; the backward pass overflows in this dtype")
    error = float((sums - changes).abs().max() / changes.abs().max().clamp(min=1e-12))
    given: dict[str, Any] = (
        {} if start is None else {"completeness_error": error, "steps": steps, "baseline": _name(baseline)}
    )
    n_pictures, n_rows, n_columns = values[0].shape
    return Result(
        values=torch.stack(values, -1),
        dims=("picture", "row", "column", "prompt"),
        coords={
            "picture": tuple(range(n_pictures)),
            "row": tuple(range(n_rows)),
            "column": tuple(range(n_columns)),
            "prompt": tuple(range(len(base))),
        },
        baseline={},
        base="",
        metric=measured.name,
        unit=measured.unit if method != "gradient" else f"{measured.unit} per unit of a scaled pixel",
        provenance=provenance_of(
            model,
            base,
            technique="pixel_attribution",
            method=method,
            over="picture row column",
            task=task,
            passes=passes,
            **given,
        ),
        pictures=pictures_of(base),
    )


def _check_pictures(model: HookedModel, prompts: Prompts) -> None:
    check_can_run(model, {"prompt": prompts})
    if prompts.inputs is None or any(PIXELS not in one for one in prompts.inputs):
        raise ValueError("prompts: expected a picture in each of them, got some without")
    sizes = {
        tuple(tuple(p.shape) for p in model.pixel_maps(prompts, i, one[PIXELS])) for i, one in enumerate(prompts.inputs)
    }
    if len(sizes) > 1 or len(set(next(iter(sizes)))) > 1:
        raise ValueError(
            f"prompts: expected pictures of one size and number, got {sorted(sizes)}; give those of each size in one call"
        )


def _start(model: HookedModel, base: Prompts, baseline: str | Prompts) -> Prompts:
    from dataclasses import replace

    assert base.inputs is not None
    if isinstance(baseline, Prompts):
        _check_pictures(model, baseline)
        if len(baseline) != len(base):
            raise ValueError(f"baseline: expected {len(base)} prompts, one for each; got {len(baseline)}")
        for i in range(len(base)):
            if base.kind_of(i) != baseline.kind_of(i) or not torch.equal(base.tokens[i], baseline.tokens[i]):
                raise ValueError(
                    f"baseline: expected the words of prompt {i} with another picture that is cut alike, got others"
                )
            grids = [of.inputs[i].get("image_grid_thw") if of.inputs else None for of in (base, baseline)]
            if grids[0] is not None and grids[1] is not None and not torch.equal(grids[0], grids[1]):
                raise ValueError(
                    f"baseline: expected a picture of the grid {grids[0].tolist()}, got {grids[1].tolist()}"
                )
        pixels = [one[PIXELS] for one in baseline.inputs or ()]
        return replace(base, inputs=tuple({**one, PIXELS: p} for one, p in zip(base.inputs, pixels, strict=True)))
    if baseline == "blur":
        return model.blurred(base)
    if baseline != "zero":
        raise ValueError(f"baseline: expected 'zero', 'blur' or prompts, got {baseline!r}")
    # In Idefics3 a picture of zeros counts as padding.
    none = 1e-6 if model.pads_with_zeros else 0.0
    return replace(base, inputs=tuple({**one, PIXELS: torch.full_like(one[PIXELS], none)} for one in base.inputs))


def _name(baseline: str | Prompts) -> str:
    return f"prompts {baseline.hash()}" if isinstance(baseline, Prompts) else baseline


def _with(rows: Stacked, pixels: Tensor) -> Stacked:
    return Stacked(rows.tokens, {**rows.inputs, PIXELS: pixels}, rows.inputs_from)


def _metric(model: HookedModel, rows: Stacked, metric: Metric | CallableMetric, ids: list[int], n: int) -> Tensor:
    logits = model.run(rows)
    if isinstance(metric, CallableMetric):
        return call_metric(metric, logits_at_hand(logits), torch.tensor(ids).numpy(), n)
    at = metric.positions[ids].to(logits.device)
    row = torch.arange(len(ids), device=logits.device).reshape(-1, *[1] * (at.ndim - 1))
    read = logits[row, at]
    read = read if metric.tokens is None else read[..., metric.tokens.to(logits.device)]
    return read_metric(metric, read, torch.tensor(ids))


def _gradient(
    model: HookedModel, rows: Stacked, pixels: Tensor, metric: Metric | CallableMetric, ids: list[int], n: int
) -> tuple[Tensor, Tensor]:
    leaf = pixels.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = _metric(model, _with(rows.clone(), leaf), metric, ids, n)
        if not value.requires_grad:
            raise ValueError(
                f"metric {metric.name!r}: no gradient path from the pixels to its value; use one such as logit_diff"
            )
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return gradient, value.detach()
