"""Every picture that there is an example of, by name: what the browser tests open.

1. Each module in `helpers/pictures` has `examples()` of its drawing function, figures of made-up results.
2. Heat maps, circuits and curves have theirs here; so does the report of twelve views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import plotly.graph_objects as go
import torch

from helpers.pictures import attention, bars, compare, heads, hidden, lens, patches, tokens
from mechkit.circuits import Circuit, EdgeScores, Graph
from mechkit.plot import circuit, curve, heatmap
from mechkit.result import Result

PROVENANCE = {"model": "gpt2-small", "task": "ioi", "n_prompts": 16, "technique": "activation_patching", "site": "z"}
WORDS = (" the", " cat", " the", " Mary", " and", " John", "\n", " store", ",", " gave", " a", " drink", " to", " 🙂")
HOSTILE = (
    *("<script>alert(1)</script>", "</script><script>alert(2)</script>", "<img src=x onerror=alert(3)>", "<!--", "]]>"),
    *("<b>bold</b>", '<a href="http://example.com">x</a>', "<br>", "a&b", "&lt;", "&#60;b&#62;", "&nbsp;", "%{z}"),
    *(
        "%{customdata[0]:.3f}",
        "$x^2$",
        "\n",
        "\t",
        "\r\n",
        "\u202e",
        "\u200b",
        "\ufeff",
        "\x00",
        "\u2028",
        "שלום",
        "مرحبا",
    ),
    *("🙂", "👩\u200d👧", "e\u0301", '"', "'", "\\n", "  ", "{{ 7 * 7 }}", "javascript:alert(4)", "é中"),
)


def made_up(shape: tuple[int, ...], dims: str, seed: int = 0, **changes: Any) -> Result:
    """A result of random numbers, a few of them large, as effects are."""
    names = dims.split()
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) ** 3 * 0.1 - 3.25
    coords: dict[str, tuple[int | str, ...]] = {dim: tuple(range(size)) for dim, size in zip(names, shape, strict=True)}
    if "pos" in names:
        coords["pos"] = tuple(f'"{WORDS[i % len(WORDS)]}" {i}' for i in range(shape[names.index("pos")]))
    fields = {
        "values": values,
        "dims": tuple(names),
        "coords": coords,
        "baseline": {"clean": torch.tensor(4.0), "corrupted": torch.tensor(-3.25)},
        "base": "corrupted",
        "metric": "logit_diff",
        "unit": "logits",
        "provenance": PROVENANCE,
    }
    return Result(**(fields | changes))


def hostile() -> Result:
    """A row of tokens that a page could read as something else."""
    return made_up((2, len(HOSTILE)), "layer pos", coords={"layer": (0, 1), "pos": HOSTILE})


def _heatmaps() -> dict[str, go.Figure]:
    return {
        "layer by head": heatmap(made_up((12, 12, 16), "layer head prompt").mean("prompt").normalized()),
        "layer by position, dark": heatmap(made_up((12, 24), "layer pos", 1), theme="dark"),
        "panels": heatmap(made_up((12, 12, 6), "layer head pos", 2)),
        "hostile tokens": heatmap(hostile()),
        "one cell": heatmap(made_up((1, 1), "layer pos", 3)),
        "48 layers, 512 tokens": heatmap(made_up((48, 512), "layer pos", 4)),
    }


def _scores(graph: Graph) -> EdgeScores:
    values = torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(0)) ** 3
    origin = {"model": "tiny", "task": "ioi", "technique": "edge_attribution", "n_prompts": 4}
    return EdgeScores.of(
        graph, values, baseline={}, metric="logit_diff", unit="logits", provenance=origin, prompts=False
    )


def _circuits() -> dict[str, go.Figure]:
    return {
        "edges": circuit(Circuit.from_scores(_scores(Graph(4, 6, 6)), n_edges=60, method="greedy")),
        "shared keys": circuit(Circuit.from_scores(_scores(Graph(3, 4, 2)), n_edges=40, method="greedy")),
    }


def _curves() -> dict[str, go.Figure]:
    sizes = [1, 3, 10, 30, 100, 300, 1000]
    faithful = [0.0, 0.05, 0.3, 0.6, 0.9, 1.05, 1.0]
    low, high = ([value + by for value in faithful] for by in (-0.1, 0.08))
    return {"curve": curve(sizes, faithful, low=low, high=high, random=[0.02 * i for i in range(7)])}


_KINDS: dict[str, Callable[[], Mapping[str, go.Figure]]] = {
    "heatmap": _heatmaps,
    "circuit": _circuits,
    "curve": _curves,
    "lens": lens.examples,
    "tokens": tokens.examples,
    "attention": attention.examples,
    "bars": bars.examples,
    "heads": heads.examples,
    "compare": compare.examples,
    "hidden": hidden.examples,
    "patches": patches.examples,
}
KINDS = tuple(_KINDS)


@cache
def figures(kind: str) -> Mapping[str, go.Figure]:
    """The examples of one drawing function, by a name that says what each shows."""
    return dict(_KINDS[kind]())


def patterns(n_layers: int = 12, n_heads: int = 12, n_tokens: int = 128) -> Result:
    """Attention patterns like a model's: a little noise, the token before, the first token; NaN where the mask is."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(n_layers, n_heads, n_tokens, n_tokens, generator=generator)
    scores[..., 0] += 3
    back = torch.randint(0, 4, (n_layers, n_heads), generator=generator)
    for layer in range(n_layers):
        for head in range(n_heads):
            scores[layer, head].diagonal(-int(back[layer, head])).add_(3.0)
    causal = torch.ones(n_tokens, n_tokens).tril().bool()
    values = scores.masked_fill(~causal, -torch.inf).softmax(-1).masked_fill(~causal, torch.nan)
    labels = tuple(f'"{WORDS[i % len(WORDS)]}" {i}' for i in range(n_tokens))
    coords = {"layer": tuple(range(n_layers)), "head": tuple(range(n_heads)), "dest": labels, "src": labels}
    origin = {"model": "gpt2-small", "technique": "attention patterns", "n_prompts": 1}
    return Result(values, ("layer", "head", "dest", "src"), coords, {}, "", "attention", "attention", origin)


def twelve_views() -> list[Any]:
    """What a study of a model of 12 layers and 12 heads on 128 tokens would show."""
    by_head, by_position = made_up((12, 12, 16), "layer head prompt"), made_up((12, 128), "layer pos", 1)
    stripes = torch.rand(12, 12, generator=torch.Generator().manual_seed(3)) ** 8
    plain = {"values": stripes, "baseline": {}, "base": "", "metric": "induction", "unit": "score"}
    scores = made_up((12, 12), "layer head", **plain)
    found = _scores(Graph(12, 12, 12))
    return [
        ("Which heads", by_head),
        ("Which heads, relative to the clean run", by_head.mean("prompt").normalized()),
        ("Where the answer is", by_position),
        ("Where the answer is, to the attention", made_up((12, 128), "layer pos", 2)),
        ("Every head at the last positions", made_up((12, 12, 8), "layer head pos", 4)),
        ("Induction heads", scores),
        ("Two methods", heatmap({"a": made_up((12, 128), "layer pos", 5), "b": made_up((12, 128), "layer pos", 6)})),
        ("Layers", made_up((12,), "layer", 7)),
        ("Circuit", Circuit.from_scores(found, n_edges=200, method="greedy")),
        ("Faithfulness", _curves()["curve"]),
        ("Attention", patterns()),
        ("Neurons", made_up((12, 3072), "layer neuron", 8)),
    ]
