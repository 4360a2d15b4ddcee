"""Every result's default picture: which function draws what.

1. Objects of a technique's own (a circuit, a comparison, the top tokens of a lens) have a row in `_OBJECTS`.
2. A `Result` is judged by its dims: a pattern is drawn as a pattern, hidden states as points, values of a text's tokens as that
   text, those of a picture's patches over the picture, one dim as bars, two or three as a heat map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mechkit import attribution, circuits
from mechkit._check import checked
from mechkit._drawn import DRAWERS
from mechkit.plot._attention import attention
from mechkit.plot._bars import bars
from mechkit.plot._circuit import circuit
from mechkit.plot._compare import compare
from mechkit.plot._curve import curve
from mechkit.plot._figure import Figure
from mechkit.plot._heatmap import heatmap
from mechkit.plot._hidden import hidden
from mechkit.plot._labels import token_of
from mechkit.plot._lens import lens
from mechkit.plot._notebook import html_of
from mechkit.plot._patch_layout import at_patches, places_of
from mechkit.plot._patches import patches
from mechkit.plot._scale import is_lens
from mechkit.plot._tokens import tokens
from mechkit.result import Result

_FEW = 60  # bars that one looks through; of more, the longest are shown
_CLOUD = 3  # points that can be projected
_VIEWS = 12  # of a picture, for a dim that is no layer
_EDGES = 100  # of scores that are drawn as a circuit


@checked
def default(thing: Any, **options: Any) -> Figure:
    """The default picture of a result or of another object that a technique returns.

    Args:
        thing: A `Result`, `TopTokens`, `Comparison`, `Erasure`, `OVSVD`, `TunedLens`, `EdgeScores`, `Circuit`, `CircuitReport`,
            `FoundCircuit`, `FaithfulnessCurve`, `LearnedMask` or `OptimalConstants`.
        **options: Of the function that draws it; for patches `picture=`, what they are laid over.

    Returns:
        A plotly figure; nothing is shown or written.

    Raises:
        ValueError: there is no picture of such a thing, or of so many dims.
    """
    draw = (
        _of_result
        if isinstance(thing, Result)
        else next((_OBJECTS[kind] for kind in _OBJECTS if isinstance(thing, kind)), None)
    )
    if draw is not None:
        try:
            return draw(thing, options)
        except TypeError as error:
            if "unexpected keyword" in str(error):  # the function that draws this has no such option
                raise ValueError(f"options: {error}; see the function of mechkit.plot of that name") from None
            raise
    known = ", ".join(["Result", *(kind.__name__ for kind in _OBJECTS)])
    raise ValueError(f"plot: expected one of {known}; got {type(thing).__name__}")


def _with(options: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    return {**defaults, **options}


def _of_result(result: Result, options: dict[str, Any]) -> Figure:
    dims = [dim for dim in result.dims if dim != "prompt"]
    if {"dest", "src"} <= set(dims):
        return attention(result, **options)
    if dims == ["layer", "d_model"] and len(result.coords.get("prompt", ())) >= _CLOUD:
        return hidden(result, **options)
    if "patch" in dims and _few_panels(result, dims) and 0 not in result.shape and places_of(result):
        return patches(result, **options)
    if is_lens(result) and "k" not in dims and len(dims) > 1:
        return lens(result, **options)
    if dims == ["pos"] and places_of(at_patches(result)[0]):
        return patches(result, **options)
    if dims == ["pos"] and any(token_of(label) != str(label) for label in result.coords["pos"]):
        return tokens(result, **options)
    if {"row", "column"} <= set(dims) <= {"picture", "row", "column"}:
        return _pixels(result, options)
    if len(dims) == 1:
        n = len(result.coords[dims[0]])
        return bars(result, **_with(options, **({"k": _FEW} if n > _FEW else {})))
    if set(dims) == {"layer", "head", "to_layer", "to_head"}:
        result = _head_by_head(result.mean("prompt") if "prompt" in result.dims else result)
    return heatmap(result, **options)


def _few_panels(result: Result, dims: Sequence[str]) -> bool:
    """Whether patches can be laid over their picture: alone, by layer, or by another dim that has no more than a few labels."""
    others = [dim for dim in dims if dim != "patch"]
    return not others or others == ["layer"] or (len(others) == 1 and len(result.coords[others[0]]) <= _VIEWS)


def _pixels(result: Result, options: dict[str, Any]) -> Figure:
    """Pixels as they lie in the picture, in units of pixels; a panel for each picture, tile or view."""
    result = result.mean("prompt") if "prompt" in result.dims else result
    if "picture" in result.dims and len(result.coords["picture"]) == 1:
        result = result.sel(picture=result.coords["picture"][0])
    dims = [dim for dim in ("row", "column", "picture") if dim in result.dims]
    order = [result.dims.index(dim) for dim in dims]
    figure = heatmap(replace(result, values=result.values.permute(order), dims=tuple(dims)), **options)
    figure.update_xaxes(constrain="domain")
    figure.update_yaxes(scaleanchor="x", constrain="domain")
    return figure


def _head_by_head(result: Result) -> Result:
    """Scores of pairs of heads, as a table of the heads that write by those that read."""
    dims = ("layer", "head", "to_layer", "to_head")
    layers, heads, to_layers, to_heads = (result.coords[dim] for dim in dims)
    order = [result.dims.index(dim) for dim in dims]
    coords = {
        "from head": tuple(f"L{layer}H{head}" for layer in layers for head in heads),
        "to head": tuple(f"L{layer}H{head}" for layer in to_layers for head in to_heads),
    }
    shape = [len(labels) for labels in coords.values()]
    baseline = {name: b.permute(order).reshape(shape) if b.ndim else b for name, b in result.baseline.items()}
    return replace(
        result, values=result.values.permute(order).reshape(shape), dims=tuple(coords), coords=coords, baseline=baseline
    )


RANDOM = 5  # random circuits of an evaluation that are drawn


def _report(report: circuits.CircuitReport, options: dict[str, Any]) -> Figure:
    name = f"Faithfulness of {report.circuit.n_edges:,} edges, and without parts of them"
    runs = report.runs
    if len(report.random) > RANDOM:
        nearest = sorted(range(len(report.random)), key=lambda i: abs(1 - report.random[i]))[:RANDOM]
        shown = {f"random {i}" for i in nearest}
        others = {f"random {i}" for i in range(len(report.random))}
        runs = runs.sel(run=[run for run in runs.coords["run"] if run in shown or run not in others])
        name += f"; of {len(report.random)} random circuits the {RANDOM} nearest to the model"
    return bars(runs, **_with(options, normalized=True, title=name))


def _erasure(found: attribution.Erasure, options: dict[str, Any]) -> Figure:
    layer, head = found.head
    direct, total = (float(one.values.double().mean()) for one in (found.direct, found.total))
    name = f"What ablating L{layer}H{head} changes elsewhere: direct effect {direct:.3g}, total {total:.3g} {found.total.unit}"
    return bars(found.written, **_with(options, k=20, title=name))


def _tuned(lens: attribution.TunedLens, options: dict[str, Any]) -> Figure:
    kl = lens.provenance.get("validation_kl")
    if not kl:
        raise ValueError("plot: expected a tuned lens that knows its validation_kl, as fit() makes it; got one without")
    lenses = ("logit_lens", "tuned_lens")
    values = torch.tensor([kl[name] for name in lenses], dtype=torch.float64)
    coords = {"lens": ("logit lens", "tuned lens"), "layer": tuple(kl["layer"])}
    origin = {**{k: v for k, v in lens.provenance.items() if k != "validation_kl"}, "technique": "tuned lens"}
    result = Result(values, ("lens", "layer"), coords, {}, "", "KL to the final layer's prediction", "nats", origin)
    return heatmap(result, **options)


def _scores(scores: circuits.EdgeScores, options: dict[str, Any]) -> Figure:
    n = min(_EDGES, int((~scores.values.isnan()).sum()))
    chosen = circuits.Circuit.from_scores(scores, n_edges=n, prune=False)
    computed = int((~scores.values.isnan()).sum())
    known = "" if computed == scores.graph.n_edges else f", of which {computed:,} were computed"
    name = f"The {chosen.n_edges:,} strongest of {scores.graph.n_edges:,} edges{known}"
    return circuit(chosen, **_with(options, title=name))


_OBJECTS: dict[type, Callable[[Any, dict[str, Any]], Figure]] = {
    attribution.TopTokens: lambda thing, options: lens(thing, **options),
    attribution.Comparison: lambda thing, options: compare(thing, **options),
    attribution.Erasure: _erasure,
    attribution.OVSVD: lambda thing, options: bars(thing.singular_values, **options),
    attribution.TunedLens: _tuned,
    circuits.EdgeScores: _scores,
    circuits.Circuit: lambda thing, options: circuit(thing, **options),
    circuits.CircuitReport: _report,
    circuits.FoundCircuit: lambda thing, options: circuit(thing.circuit, **options),
    circuits.FaithfulnessCurve: lambda thing, options: curve(thing, **options),
    circuits.LearnedMask: lambda thing, options: circuit(thing.circuit(), **options),
    circuits.OptimalConstants: lambda thing, options: bars(thing.importance, **_with(options, k=20)),
}

DRAWERS.update(figure=default, html=html_of)
