"""Integrated gradients, AtP* and RelP: each against a model or a property that determines its values; compare and verify."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mechkit as mk
from helpers.families import FAMILIES
from helpers.tiny import make_pairs, model_of, whole_vocabulary
from mechkit.attribution.atp_star import replaced_columns
from mechkit.engine import frozen_parameters
from mechkit.experiment.quadrature import quadrature
from mechkit.experiment.relevance import relevance_rules


def effects(result: mk.Result) -> torch.Tensor:
    return result.effect().values.nan_to_num()


METHODS = {
    "plain": mk.attribution_patching,
    "activation path": lambda *a: mk.integrated_gradients(*a, steps=1),
    "stretched": lambda *a: mk.integrated_gradients(*a, steps=2, rule="stretched"),
    "input path": lambda *a: mk.integrated_gradients(*a, steps=2, path="input"),
    "atp_star without GradDrop": lambda *a: mk.atp_star(*a, grad_drop=False),
    "relp": mk.relp,
}


@functools.cache
def linear() -> mk.zoo.Known:
    return mk.zoo.linear()


@functools.cache
def exact_on_a_linear_model(site: str, over: str) -> torch.Tensor:
    known = linear()
    return effects(mk.activation_patching(known.model, known.pairs, known.metric, site, over, progress=False))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_exact_on_a_linear_model(method):
    known = linear()
    question = known.model, known.pairs, known.metric
    for site, over in (
        ("z", "layer pos head"),
        ("v", "layer head"),
        ("mlp_post", "layer neuron"),
        ("mlp_out", "layer pos"),
        ("attn_out", "layer"),
        ("result", "layer pos head"),
    ):
        exact = exact_on_a_linear_model(site, over)
        found = effects(METHODS[method](*question, site, over))
        assert float(exact.abs().max()) > 0.1  # control
        assert float((found - exact).abs().max()) <= 1e-8, site


# -- integrated gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["left", "midpoint", "gauss-legendre", "stretched"])
def test_quadrature(rule):
    points, weights = quadrature(5, rule)
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    assert all(0 <= p < 1 for p in points)
    errors = []
    for steps in (5, 40):
        points, weights = quadrature(steps, rule)
        errors.append(abs(sum(w * math.exp(3 * p) for p, w in zip(points, weights, strict=True)) - math.expm1(3) / 3))
    assert errors[1] < errors[0] / 5 or errors[1] < 1e-12
    for steps, name in ((0, rule), (2.5, rule), (True, rule), (5, "simpson")):
        with pytest.raises(ValueError, match=r"steps|rule"):
            quadrature(steps, name)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gptj", "falcon"])
def test_a_layers_integrals_sum_to_its_exact_effect(family):
    """Completeness, which is also what `completeness_error` says it is."""
    model, pairs = model_of(family), make_pairs()
    metric = whole_vocabulary(pairs)
    for site in ("z", "mlp_post", "k"):
        exact = mk.activation_patching(model, pairs, metric, site, "layer", progress=False)
        gap = float((exact.baseline["clean"] - exact.baseline["corrupted"]).abs().mean())
        found = mk.integrated_gradients(model, pairs, metric, site, "layer", steps=100)
        error = (found.values - exact.values).abs().mean(-1).max()
        assert float(error) <= 0.01 * gap
        assert found.provenance["completeness_error"] == pytest.approx(float(error) / gap, abs=1e-4)
        few = mk.integrated_gradients(model, pairs, metric, site, "layer", steps=2)
        assert few.provenance["completeness_error"] > found.provenance["completeness_error"]  # control
        by_position = mk.integrated_gradients(model, pairs, metric, site, "layer pos", steps=2, budget=1)
        assert torch.allclose(by_position.effect().values.nansum(1), few.effect().values, atol=1e-8 * max(1, gap))


def test_the_completeness_error_of_a_balanced_set():
    """Two mirrored pairs, whose gaps cancel in the mean: the error is still a share of their size."""
    model, pairs = model_of("gpt2"), make_pairs(((7, 2),))
    a, b = pairs.clean.tokens[0], pairs.corrupted.tokens[0]
    both = mk.PromptPairs.from_tokens([a, b], [b, a], [(5, 7), (5, 7)])
    found = mk.integrated_gradients(model, both, mk.logit_diff(both), "z", "layer", steps=100)
    few = mk.integrated_gradients(model, both, mk.logit_diff(both), "z", "layer", steps=1, rule="left")
    assert found.provenance["completeness_error"] < 0.02
    assert 0.1 < few.provenance["completeness_error"] < 100


def test_the_input_path_is_complete_at_the_embeddings():
    model, pairs = model_of("gptj"), make_pairs()
    metric = whole_vocabulary(pairs)
    found = mk.integrated_gradients(
        model, pairs, metric, "resid_pre", "layer pos", steps=400, rule="midpoint", path="input"
    )
    gap = found.baseline["clean"] - found.baseline["corrupted"]
    assert torch.allclose(found.effect().values[0].nansum(0), gap, rtol=0.02, atol=0.02)
    assert found.provenance["completeness_error"] < 0.01
    # The embeddings' path is the same as that of the first block's input by itself.
    alone = mk.integrated_gradients(
        model, pairs, metric, "resid_pre", "layer pos", steps=400, rule="midpoint", layers=[0]
    )
    assert torch.allclose(alone.values[0], found.values[0], atol=1e-6, equal_nan=True)
    with pytest.raises(ValueError, match="path"):
        mk.integrated_gradients(model, pairs, metric, "embed", "pos", path="input")
    with pytest.raises(ValueError, match="path"):
        mk.integrated_gradients(model, pairs, metric, path="outputs")


# -- AtP* --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["layer head", "layer pos head"])
@pytest.mark.parametrize(("node", "site"), [("query", "q"), ("key", "k")])
def test_the_qk_fix_sees_through_a_saturated_softmax(node, site, over):
    known = mk.zoo.saturated_attention(node)
    question = known.model, known.pairs, known.metric, site, over
    exact = effects(mk.activation_patching(*question, progress=False))
    plain = effects(mk.attribution_patching(*question))
    fixed = effects(mk.atp_star(*question, grad_drop=False))
    largest = float(exact.abs().max())
    assert largest > 1
    assert float(plain.abs().max()) < 0.01 * largest
    assert float((fixed - exact).abs().max()) <= 1e-3
    assert torch.equal(effects(mk.atp_star(*question, qk_fix=False, grad_drop=False)), plain)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mixtral"])
def test_the_qk_fix_is_exact_up_to_the_pattern(family):
    """Each node patched alone, its new pattern times the gradient at the pattern: a row of one forward pass per node."""
    model, pairs = model_of(family), make_pairs(((6, 2), (6, 3)))
    metric = whole_vocabulary(pairs)
    if family == "olmo2":  # its heads' queries go through one norm together
        with pytest.raises(ValueError, match="qk_fix"):
            mk.atp_star(model, pairs, metric, "q", "layer head")
        return
    layer, patterns = 2, {}

    def patterns_with(edit, i, rows):
        kept = []
        hooks = [("blocks.2.attn.hook_pattern", lambda x, hook: kept.append(x.detach().clone()))]
        with torch.no_grad():
            model.run_with_hooks(pairs.corrupted.tokens[i].expand(rows, -1), [*edit, *hooks])
        return kept[0]

    for site in ("q", "k"):
        found = effects(mk.atp_star(model, pairs, metric, site, "layer pos head", grad_drop=False))[layer]
        together = effects(mk.atp_star(model, pairs, metric, site, "layer head", grad_drop=False))[layer]
        for i in range(len(pairs)):
            source = model.run_with_cache(pairs.clean.tokens[i][None], site)[1][site, layer]
            base = patterns_with([], i, 1)[0]
            leaf = base[None].clone().requires_grad_()
            logits = model.run_with_hooks(
                pairs.corrupted.tokens[i][None], [("blocks.2.attn.hook_pattern", lambda x, hook, leaf=leaf: leaf)]
            )
            value = metric.read(logits[:, -1], torch.tensor([i]), None).sum()
            gradient = torch.autograd.grad(value, leaf)[0][0]
            heads, everywhere = range(source.shape[2]), slice(None)
            nodes = [(head, pos) for head in heads for pos in (everywhere, *range(6))]

            def each_alone(x, hook, source=source, nodes=nodes):
                x = x.clone()
                for row, (head, positions) in enumerate(nodes):
                    x[row, positions, head] = source[0, positions, head]
                return x

            patched = patterns_with([(f"blocks.2.attn.hook_{site}", each_alone)], i, len(nodes))
            for (head, pos), new in zip(nodes, patched, strict=True):
                expected = float(((new - base) * gradient).sum())
                value = together[head, i] if pos == everywhere else found[pos, head, i]
                assert float(value) == pytest.approx(expected, abs=1e-5 * max(1, abs(expected)))
        patterns[site] = found
    assert all(float(found.abs().max()) > 1e-2 for found in patterns.values())  # control


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 30.0, 300.0]), st.integers(1, 6))
def test_replaced_columns(seed, size, n):
    """Each source's score replaced alone, by a softmax for each; saturated rows and masked sources included."""
    generator = torch.Generator().manual_seed(seed)
    scores, moved, gradient = (
        torch.randn(4, n, dtype=torch.float64, generator=generator) * s for s in (size, size, 1.0)
    )
    masked = torch.rand(4, n, generator=generator) < 0.3
    masked[:, 0] = False
    floor = torch.finfo(torch.float64).min
    scores, moved = scores.masked_fill(masked, floor), moved.masked_fill(masked, floor)
    found = replaced_columns(scores.softmax(-1), scores, moved, gradient)
    before = (scores.softmax(-1) * gradient).sum(-1)
    for j in range(n):
        replaced = scores.clone()
        replaced[:, j] = moved[:, j]
        expected = (replaced.softmax(-1) * gradient).sum(-1) - before
        assert torch.allclose(found[:, j], expected, atol=1e-9)


def test_grad_drop_sees_through_a_cancellation():
    known = mk.zoo.cancellation()
    question = known.model, known.pairs, known.metric
    ((layer, head),) = known.roles["writer"]
    exact = mk.activation_patching(*question, progress=False).effect().values[layer, head]
    plain = mk.attribution_patching(*question).effect().values[layer, head]
    dropped = mk.atp_star(*question).effect().values[layer, head]
    assert bool((exact.abs() > 1).all())
    assert bool((plain.abs() < 0.01 * exact.abs()).all())
    assert bool((dropped > 0.5 * exact.abs()).all())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox", "gptj"])
@pytest.mark.parametrize(("site", "over"), [("z", "layer head"), ("mlp_post", "layer neuron"), ("k", "layer pos head")])
def test_grad_drop_is_the_mean_over_dropped_layers(family, site, over):
    """The naive way: each layer's attention and MLP outputs cut off from the graph in turn."""
    model, pairs = model_of(family), make_pairs(((6, 2), (6, 3)))
    metric = whole_vocabulary(pairs)
    found = effects(mk.atp_star(model, pairs, metric, site, over))
    total = torch.zeros_like(found)
    for dropped in range(model.n_layers):
        cut = [((name, dropped), lambda x, hook: x.detach()) for name in ("attn_out", "mlp_out")]
        # What is cut off from its input must still be a function of the node, so nodes of the dropped layer have no gradient.
        others = [layer for layer in range(model.n_layers) if layer != dropped]
        with model.hooks(cut):
            part = effects(mk.atp_star(model, pairs, metric, site, over, grad_drop=False, layers=others))
        total[others] += part.abs()
    expected = total / (model.n_layers - 1)
    assert float(expected.max()) > 1e-2  # control
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.max()))


def test_atp_star_refuses():
    model, pairs = model_of("gpt2"), make_pairs()
    for site in ("q", "k"):
        with pytest.raises(ValueError, match="neuron"):
            mk.atp_star(model, pairs, mk.logit_diff(pairs), site, "layer head neuron", grad_drop=False)
    for method in (mk.atp_star, mk.relp, mk.integrated_gradients):
        with pytest.raises(ValueError, match="site: expected a string"):
            method(model, pairs, mk.logit_diff(pairs), {"z": "layer head"})
    with pytest.raises(ValueError, match="grad_drop"):
        mk.atp_star(model, pairs, mk.logit_diff(pairs), "resid_pre", "layer pos")
    with pytest.raises(ValueError, match="no gradient"):
        mk.atp_star(model, pairs, mk.accuracy(pairs))
    assert not model.has_hooks


# -- RelP --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "olmo2", "gemma3"])
def test_relevance_is_conserved_without_biases(family):
    """Coefficients times activations sum to the metric at every depth, and plain gradients do not."""
    model, pairs = model_of(family), make_pairs()
    tokens = pairs.clean.tokens[0][None]

    def sums() -> list[float]:
        kept: dict[int, torch.Tensor] = {}
        found = []

        def keep(x, hook):
            layer = int(hook.name.split(".")[1])
            kept[layer] = x if x.requires_grad else x.detach().requires_grad_()
            return kept[layer]

        with frozen_parameters(model):
            logits = model.run_with_hooks(tokens, [("resid_pre", keep)])
            value = logits[0, -1, 5] - logits[0, -1, 7]
            gradients = torch.autograd.grad(value, list(kept.values()))
            found = [float((x * g).sum().detach()) for x, g in zip(kept.values(), gradients, strict=True)]
        return [*found, float(value.detach())]

    *plain, value = sums()
    with relevance_rules(model, "frozen"):
        *relevance, same = sums()
    assert same == pytest.approx(value, abs=1e-6)
    assert relevance == pytest.approx([value] * model.n_layers, abs=1e-4 * max(1, abs(value)))
    assert max(abs(p - value) for p in plain) > 0.05 * abs(value)  # control
    assert not model.has_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_change_no_value(family):
    model, pairs = model_of(family), make_pairs()
    tokens = pairs.clean.tokens[0][None]
    if family == "mixtral":
        with pytest.raises(ValueError, match="experts"):
            mk.relp(model, pairs, mk.logit_diff(pairs))
        assert not model.has_hooks
        return
    expected = model(tokens)
    with relevance_rules(model, "frozen"):
        found = model(tokens)
    assert torch.allclose(found, expected, atol=1e-9)
    result = mk.relp(model, pairs, mk.logit_diff(pairs), "mlp_out", "layer pos")
    plain = mk.attribution_patching(model, pairs, mk.logit_diff(pairs), "mlp_out", "layer pos")
    assert float((effects(result) - effects(plain)).abs().max()) > 1e-2  # control: they do change the gradient
    for site in ("q", "k", "pattern", "attn_scores"):
        with pytest.raises(ValueError, match="relevance does not flow"):
            mk.relp(model, pairs, mk.logit_diff(pairs), site, "layer head", attention="frozen")
        assert float(effects(mk.relp(model, pairs, mk.logit_diff(pairs), site, "layer head")).abs().max()) > 1e-4


# -- compare and verify ------------------------------------------------------------------------------------------------


def result(values, dims=("layer", "head", "prompt"), base=0.5, **provenance):
    values = torch.tensor(values, dtype=torch.float64)
    coords = {dim: tuple(range(n)) for dim, n in zip(dims, values.shape, strict=True)}
    baseline = {"corrupted": torch.full((values.shape[-1],), base, dtype=torch.float64)}
    return mk.Result(values + base, dims, coords, baseline, "corrupted", "logit_diff", "logits", provenance)


def test_compare_by_hand():
    exact = result([[[1.0, 3.0], [0.0, 0.0]], [[-1.0, -1.0], [0.5, 0.5]]])
    approx = result([[[1.0, 1.0], [0.0, 0.0]], [[-1.0, -1.0], [-0.5, -0.5]]])
    found = mk.compare(approx, exact, k=2)
    x, y = torch.tensor([1.0, 0, -1, -0.5]), torch.tensor([2.0, 0, -1, 0.5])
    assert found.pearson == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]))
    assert found.sign_agreement == pytest.approx(2 / 3)
    assert found.recall == 1
    assert found.max_error == pytest.approx(1)
    assert found.slope == pytest.approx(float((x * y).sum() / (x * x).sum()))
    assert {cell.label for cell in found.worst} == {"L0H0", "L1H1"}
    assert "Pearson" in str(found)
    same = mk.compare(exact, exact)
    assert (same.pearson, same.spearman, same.max_error, same.recall) == (pytest.approx(1), pytest.approx(1), 0, 1)
    one = mk.compare(approx.sel(prompt=[0]), exact.sel(prompt=[0]))
    assert one.max_error == pytest.approx(1)
    magnitude = mk.compare(result([[[1.0], [2.0]]], sign="magnitude"), result([[[-1.0], [2.0]]]))
    assert magnitude.pearson == pytest.approx(1)
    assert math.isnan(magnitude.sign_agreement)


def test_compare_refuses_what_is_not_comparable():
    exact = result([[[1.0], [2.0]]], site="z")
    for other, match in (
        (result([[[1.0], [2.0]]], site="q"), "site"),
        (result([[[1.0], [2.0]]], site="z", tokens_hash="x"), "tokens_hash"),
        (result([[[1.0], [2.0], [3.0]]], site="z"), "lacks"),
        (result([[1.0, 2.0]], dims=("layer", "prompt"), site="z"), "dims"),
    ):
        with pytest.raises(ValueError, match=match):
            mk.compare(other, exact)
    assert mk.compare(exact, result([[[1.0], [2.0], [3.0]]], site="z")).n_cells == 2
    with pytest.raises(ValueError, match="k:"):
        mk.compare(exact, exact, k=0)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("over", ["layer head", "layer pos head", "layer head position"])
def test_verify_corrects_the_strongest_cells(over, direction):
    model, pairs = model_of("llama"), make_pairs()
    metric = mk.logit_diff(pairs)
    exact = mk.activation_patching(model, pairs, metric, "z", over, direction=direction, progress=False)
    layers = {"layers": [3, 1, 2]}
    approx = mk.attribution_patching(model, pairs, metric, "z", over, direction=direction, **layers)
    verified = mk.verify(approx, model, pairs, metric, top=4, progress=False)
    labels = [cell.label for cell in approx.top(4)]
    assert verified.provenance["verified"] == labels
    truth = exact.sel(layer=[3, 1, 2])
    changed = 0
    for cell in approx.top(4):
        a, b, before = (r.sel(**cell.coords).values for r in (verified, truth, approx))
        assert torch.allclose(a, b, atol=1e-9, equal_nan=True)
        changed += int(not torch.allclose(a, before, atol=1e-6, equal_nan=True))
    assert changed > 0  # control: the approximation was wrong somewhere
    different = (verified.values != approx.values) & ~verified.values.isnan()
    assert int(different.any(-1).sum()) <= 4
    assert verified.cost.block_tokens > approx.cost.block_tokens
    whole = mk.verify(approx, model, pairs, metric, top=10_000, progress=False)
    assert torch.allclose(whole.values, truth.values, atol=1e-9, equal_nan=True)
    assert mk.compare(whole, exact).max_error < 1e-9


def test_pairs_that_differ_in_the_other_prompt_or_the_answers_are_refused():
    model, pairs = model_of("llama"), make_pairs()
    approx = mk.attribution_patching(model, pairs, mk.logit_diff(pairs))
    other_base = mk.PromptPairs(pairs.clean, make_pairs(seed=3).corrupted, pairs.right, pairs.wrong)
    other_answers = mk.PromptPairs(pairs.clean, pairs.corrupted, ((9,),) * 3, ((11,),) * 3)
    for other in (other_base, other_answers):
        metric = mk.logit_diff(other)
        exact = mk.activation_patching(model, other, metric, progress=False)
        with pytest.raises(ValueError, match="not the same"):
            mk.compare(approx, exact)
        with pytest.raises(ValueError, match="not the same"):
            mk.verify(approx, model, other, metric, progress=False)
    star = mk.atp_star(model, pairs, mk.logit_diff(pairs))
    exact = mk.activation_patching(model, pairs, mk.logit_diff(pairs), progress=False)
    assert mk.compare(star, exact).magnitude
    with pytest.raises(ValueError, match="prompt by prompt"):
        mk.compare(star.mean("prompt"), exact.mean("prompt"))


def test_verify_refuses_other_prompts_and_models():
    model, pairs = model_of("llama"), make_pairs()
    metric = mk.logit_diff(pairs)
    approx = mk.attribution_patching(model, pairs, metric)
    with pytest.raises(ValueError, match="weights_hash"):
        mk.verify(approx, model_of("gpt2"), pairs, metric)
    other = make_pairs(seed=5)
    with pytest.raises(ValueError, match="tokens_hash"):
        mk.verify(approx, model, other, mk.logit_diff(other))
    with pytest.raises(ValueError, match="values of"):
        mk.verify(approx, model, pairs, mk.log_prob(pairs))
    with pytest.raises(ValueError, match="technique"):
        mk.verify(mk.ablation(model, pairs, metric, progress=False), model, pairs, metric)
    magnitude = mk.atp_star(model, pairs, metric)
    corrected = mk.verify(magnitude, model, pairs, metric, top=3, progress=False)
    assert float(corrected.effect().values.min()) >= -1e-12
