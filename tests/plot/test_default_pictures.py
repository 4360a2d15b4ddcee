"""Every public technique's result has a default picture, of the right kind, and a notebook shows it."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

import mechkit as mk
from helpers.tiny import make_model, make_pairs
from helpers.vlm import in_double, pair_of_models
from helpers.vlm import make_pairs as pairs_with_pictures
from mechkit.plot import Figure

# What `import mechkit` offers that is no technique: it has no result to draw.
OTHERS = {
    *("HookedModel", "ActivationCache", "Prompts", "PromptPairs", "Result", "Cost", "Metric", "Edit", "Graph", "SITES"),
    "Segment",
    *("accuracy", "kl_divergence", "log_prob", "logit_diff", "metric_factory", "prob_diff", "report", "GapWarning"),
    *("answer_log_prob", "in_context_score", "loss"),
}
CLASSES = {
    *(
        "Circuit",
        "CircuitReport",
        "Comparison",
        "EdgeScores",
        "Erasure",
        "FaithfulnessCurve",
        "OVSVD",
        "Segment",
        "TopTokens",
    ),
}
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def question() -> tuple[mk.HookedModel, mk.PromptPairs, mk.Metric]:
    torch.set_num_threads(1)
    model = make_model("gpt2")
    pairs = make_pairs()
    return model, pairs, mk.logit_diff(pairs)


def techniques(model: mk.HookedModel, pairs: mk.PromptPairs, metric: mk.Metric) -> dict[str, Any]:
    """Public name -> kind of the default picture, and a result as the technique's defaults make it."""
    study = model, pairs, metric
    known, pictured = mk.zoo.serial_ioi(), mk.zoo.copied_patch(n=2)
    seen = pictured.model, pictured.pairs, pictured.metric
    small = known.model, known.pairs, known.metric
    edges = mk.edge_attribution(*small, steps=3)
    circuit = mk.Circuit.from_scores(edges, n_edges=20)
    approx, exact = mk.attribution_patching(*study), mk.activation_patching(*study, **QUIET)
    text = mk.Prompts.from_tokens(torch.randint(0, model.d_vocab, (6, 20), generator=torch.Generator().manual_seed(0)))
    with in_double():
        seeing = pair_of_models("llava")[1]
        pictures = pairs_with_pictures("llava", seeing)
        of_patches = mk.image_patching(seeing, pictures, mk.logit_diff(pictures), layers=[0, 1], **QUIET)
    return {
        "activation_patching": ("heatmap", exact),
        "image_patching": ("patches", of_patches),
        "attention_knockout": ("bars", mk.attention_knockout(*study, from_=1, **QUIET)),
        "ablation": ("heatmap", mk.ablation(*study, **QUIET)),
        "pixel_attribution": ("heatmap", mk.pixel_attribution(*seen, steps=2, **QUIET)),
        "attribution_patching": ("heatmap", approx),
        "atp_star": ("heatmap", mk.atp_star(*study)),
        "integrated_gradients": ("heatmap", mk.integrated_gradients(*study, steps=2)),
        "relp": ("heatmap", mk.relp(*study)),
        "compare": ("compare", mk.compare(approx, exact)),
        "verify": ("heatmap", mk.verify(approx, *study, top=2, **QUIET)),
        "direct_logit_attribution": ("bars", mk.direct_logit_attribution(*study)),
        "dla_erasure_check": ("bars", mk.dla_erasure_check(*study, head=(1, 2))),
        "logit_lens": ("lens", mk.logit_lens(model, pairs, **QUIET)),
        "top_tokens": ("lens", mk.top_tokens(model, pairs, **QUIET)),
        "patchscope": ("lens", mk.patchscope(model, pairs, [1, 2, 3], **QUIET)),
        "TunedLens": ("heatmap", mk.TunedLens.fit(model, text, steps=2, **QUIET)),
        "head_scores": ("heatmap", mk.head_scores(model, "previous_token", n=2, length=20, **QUIET)),
        "composition_scores": ("heatmap", mk.composition_scores(model)),
        "ov_circuit": ("heatmap", mk.ov_circuit(model, 0, 1, [3, 4, 5], [3, 4, 5])),
        "qk_circuit": ("heatmap", mk.qk_circuit(model, 0, 1, [3, 4, 5], [3, 4, 5])),
        "ov_svd": ("bars", mk.ov_svd(model, 0, 1, k=3, top=3)),
        "gradient_x_input": ("bars", mk.gradient_x_input(*study)),
        "token_integrated_gradients": ("bars", mk.token_integrated_gradients(*study, steps=2)),
        "neuron_attribution": ("heatmap", mk.neuron_attribution(*study, steps=2)),
        "attention_rollout": ("bars", mk.attention_rollout(model, pairs, **QUIET)),
        "attention_flow": ("bars", mk.attention_flow(model, pairs, **QUIET)),
        "attention_relevance": ("bars", mk.attention_relevance(*study, **QUIET)),
        "attention_patterns": ("attention", mk.attention_patterns(model, pairs.clean, **QUIET)),
        "hidden_states": ("hidden", mk.hidden_states(model, pairs.clean, **QUIET)),
        "sweep": ("heatmap", exact),
        "edge_attribution": ("circuit", edges),
        "edge_patching": ("circuit", mk.edge_patching(*small, edges=edges.top(5), **QUIET)),
        "path_patching": ("heatmap", mk.path_patching(*small, senders="layer head", receivers=["logits"], **QUIET)),
        "acdc": ("circuit", mk.acdc(*small, threshold=0.1, **QUIET)),
        "evaluate_circuit": ("bars", mk.evaluate_circuit(circuit, *small, random=2, sets=1, **QUIET)),
        "faithfulness_curve": (
            "curve",
            mk.faithfulness_curve(edges, *small, fractions=(0.05, 0.2, 1.0), random=2, **QUIET),
        ),
        "find_circuit": ("circuit", mk.find_circuit(*small, n_edges=10, random=1, **QUIET)),
        "learn_mask": ("circuit", mk.learn_mask(*small, steps=2, **QUIET)),
        "optimal_ablation": ("bars", mk.optimal_ablation(*small, writers=["a0.h0", "m0"], steps=2, **QUIET)),
    }


def test_every_public_technique_has_a_default_picture(question) -> None:
    found = techniques(*question)
    public = {name for name in mk.__all__ if not inspect.ismodule(getattr(mk, name)) and name not in OTHERS | CLASSES}
    assert public == set(found)
    drawn = {}
    for name, (_, result) in found.items():
        figure = result.plot()
        assert isinstance(figure, Figure)
        assert figure.data, name
        drawn[name] = figure.facts.kind
        assert figure.facts.title, name
        if name not in ("acdc",):
            assert any(np.isfinite(column).any() for column in figure.table().values() if column.dtype.kind == "f"), (
                name
            )
        assert result.plot(theme="dark").layout.paper_bgcolor != figure.layout.paper_bgcolor
    assert drawn == {name: kind for name, (kind, _) in found.items()}


def test_options_go_to_the_figure(question) -> None:
    result = mk.head_scores(question[0], "previous_token", n=2, length=20, **QUIET)
    assert result.plot(title="Mine").layout.title.text == "Mine"
    assert result.plot(zmax=2.0).layout.coloraxis.cmax == 2.0
    with pytest.raises(ValueError, match="theme"):
        result.plot(theme="beige")
    with pytest.raises(ValueError, match=r"k: heatmap\(\) has no such argument"):
        result.plot(k=3)


def test_partly_computed_edges_and_few_hidden_states(question) -> None:
    known = mk.zoo.serial_ioi()
    edges = mk.edge_attribution(known.model, known.pairs, known.metric, steps=2)
    some = mk.edge_patching(known.model, known.pairs, known.metric, edges=edges.top(5), **QUIET)
    assert "of which 5 were computed" in some.plot().facts.title
    assert "computed" not in edges.plot().facts.title
    two = mk.hidden_states(question[0], question[1].clean[[0, 1]], **QUIET)
    assert two.plot().facts.kind == "heatmap"


def test_values_of_a_text_are_drawn_as_that_text() -> None:
    coords = {"pos": ('"the" 0', '" cat" 1', '"the" 2')}
    result = mk.Result(torch.tensor([1.0, -2.0, 3.0]), ("pos",), coords, {}, "", "logit_diff", "logits", {})
    assert result.plot().facts.kind == "tokens"
    other = mk.Result(torch.tensor([1.0, -2.0]), ("pos",), {"pos": (0, 1)}, {}, "", "logit_diff", "logits", {})
    assert other.plot().facts.kind == "bars"


def test_notebooks_show_the_picture_or_the_text() -> None:
    coords = {"layer": (0, 1), "head": (0, 1)}
    result = mk.Result(torch.eye(2), ("layer", "head"), coords, {}, "", "induction", "score", {})
    assert "<div" in result._repr_html_()
    assert "Plotly" in result._repr_html_()
    scalar = mk.Result(torch.tensor(1.0), (), {}, {}, "", "induction", "score", {})
    assert scalar._repr_html_() is None  # the text, then
    with pytest.raises(ValueError, match="dims"):
        scalar.plot()


def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"plot: expected one of Result, .*TopTokens.*; got int"):
        mk.plot.default(3)
