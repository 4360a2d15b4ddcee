"""Edge attribution against its definition: the derivative, at the base run, of the metric of a run in which one reader sees
base + t (source - base) of one writer. That run is the naive reference's (`patch_edge`), and is derived by autograd and by
finite differences. Then identities, known answers, and what must not change the numbers.

Gemma 2, Gemma 3 and OLMo 2 take their norms in float32 whatever the model's dtype is, and Mixtral is float32 altogether: these
agree to float32's rounding, the others to 1e-8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import mechkit as mk
from helpers import reference_circuits as reference
from helpers.families import FAMILIES, FLOAT32_INSIDE, PARALLEL
from helpers.reference_circuits import found_at, some_names
from helpers.refusals import WRONG_FOR_EDGES
from helpers.tiny import make_model, make_pairs, model_of, n_hooks, whole_vocabulary
from mechkit import zoo
from mechkit.circuits.edge_scores import EdgeScores

POST_NORMS = ("gemma2", "gemma3", "olmo2")
# Their norms are float32 inside too. The same input gives the same rounding, so that they agree with autograd's oracle exactly
# enough; but a finite difference, and a gradient that is pulled back in another order, see the rounding.
RMS_NORMS = ("llama", "llama_mqa", "mistral", "qwen2", "qwen3")


def tolerance(family: str) -> float:
    """As a share of the largest score."""
    return 2e-5 if family in FLOAT32_INSIDE else 1e-8


def assert_equal(found: Tensor, expected: Tensor, bound: float) -> None:
    size = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= bound * size
    assert size > 1e-2  # control: something is there to be found


@functools.cache
def eap(family: str) -> EdgeScores:
    """All edges of a family's model on the three ragged pairs."""
    pairs = make_pairs()
    return mk.edge_attribution(model_of(family), pairs, whole_vocabulary(pairs), steps=1)


# --- the definition

# (site, layer, from 0 to 1): an activation that is somewhere between the base run's and the source run's
Moved = tuple[str, int, float]


def values_at(
    model: mk.HookedModel,
    pairs: mk.PromptPairs,
    metric: mk.Metric,
    j: int,
    names: list[str],
    moved: Moved | None,
    t: Tensor,
) -> Tensor:
    """The metric `[edge]` where one reader sees `t` `[edge]` of one writer's change, in the corrupted run with `moved`."""
    tokens, clean_tokens = pairs.corrupted.tokens[j][None], pairs.clean.tokens[j][None]
    base, clean = _runs(model, model.has_hooks, tuple(tokens[0].tolist()), tuple(clean_tokens[0].tolist()))
    writers = [name.partition("->")[0] for name in names]
    changes = [clean.wrote[writer] - base.wrote[writer] for writer in writers]
    hooks = []
    if moved is not None:
        site, layer, point = moved
        full = f"blocks.{layer}.{'attn.' if site == 'z' else ''}hook_{site}"
        start, end = (_cache(model, x, full) for x in (tokens, clean_tokens))
        hooks = [(full, lambda x, hook: torch.zeros_like(x) + start + point * (end - start))]
    with model.hooks(hooks):
        base = base if moved is None else reference.whole_run(model, tokens)
        values = [base.wrote[w] + x * change for w, x, change in zip(writers, t, changes, strict=True)]
        with torch.set_grad_enabled(t.requires_grad):
            logits = reference.write_edges(model, base, tokens, names, values)
            return metric.read(logits[:, metric.positions[j]], torch.full((len(names),), j), None)


@functools.lru_cache(maxsize=8)
def _runs(model: mk.HookedModel, hooked: bool, *rows: tuple[int, ...]) -> tuple[reference.Run, ...]:
    return tuple(reference.whole_run(model, torch.tensor(row)[None]) for row in rows)


@torch.no_grad()
def _cache(model: mk.HookedModel, tokens: Tensor, name: str) -> Tensor:
    return model.run_with_cache(tokens, [name])[1][name]


def derivatives(
    model: mk.HookedModel,
    pairs: mk.PromptPairs,
    metric: mk.Metric,
    j: int,
    names: list[str],
    moved: Moved | None = None,
) -> Tensor:
    """The derivatives `[edge]` of `values_at` by autograd, at t = 0."""
    t = torch.zeros(len(names), dtype=model.dtype, requires_grad=True)
    return torch.autograd.grad(values_at(model, pairs, metric, j, names, moved, t).sum(), t)[0].double()


def finite_differences(
    model: mk.HookedModel, pairs: mk.PromptPairs, metric: mk.Metric, j: int, names: list[str], h: float = 2e-4
) -> Tensor:
    """The same by the five-point rule, whose error is of order h^4."""
    steps = torch.tensor([-2 * h, -h, h, 2 * h], dtype=torch.float64)
    t = steps.repeat_interleave(len(names))
    values = values_at(model, pairs, metric, j, 4 * names, None, t).double().reshape(4, -1)
    return (torch.tensor([1, -8, 8, -1], dtype=torch.float64)[:, None] * values).sum(0) / (12 * h)


@pytest.mark.parametrize("family", FAMILIES)
def test_eap_is_the_derivative_of_each_edge(family):
    model, pairs = model_of(family), make_pairs()
    metric, names = whole_vocabulary(pairs), some_names(model, 12)
    expected = torch.stack([derivatives(model, pairs, metric, j, names) for j in (0, 2)], 1)
    assert_equal(found_at(eap(family), names)[:, [0, 2]], expected, tolerance(family))
    assert eap(family).provenance["gradient_at"] == "corrupted"
    assert eap(family).provenance["runs"] == "suffix"


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon"])
def test_eap_agrees_with_finite_differences(family):
    """Autograd might be wrong in both places. (The other families' norms or softmax are float32 inside: too rough for this.)"""
    model, pairs = model_of(family), make_pairs()
    metric, names = whole_vocabulary(pairs), some_names(model, 10, seed=1)
    expected = finite_differences(model, pairs, metric, 1, names)
    assert_equal(found_at(eap(family), names)[:, 1], expected, 1e-6)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("gpt2", "gpt_neox", "falcon")])
def test_eap_agrees_with_finite_differences_in_float32(family):
    """The same where norms or softmax are float32 inside: larger steps, coarser agreement."""
    model, pairs = model_of(family), make_pairs()
    metric, names = whole_vocabulary(pairs), some_names(model, 8, seed=1)
    expected = finite_differences(model, pairs, metric, 1, names, h=1e-2)
    assert_equal(found_at(eap(family), names)[:, 1], expected, 1e-3)


def points(rule: str, steps: int) -> tuple[list[float], list[float]]:
    """By the rules' own words, not the library's code."""
    if rule == "clean-corrupted":
        return [0.0, 1.0], [0.5, 0.5]
    if rule == "gauss-legendre":
        x, w = np.polynomial.legendre.leggauss(steps)
        return ((x + 1) / 2).tolist(), (w / 2).tolist()
    first = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[rule]
    return [(first + k) / steps for k in range(steps)], [1 / steps] * steps


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        ("gpt2", "left"),
        ("llama", "right"),
        ("falcon", "midpoint"),
        ("gemma2", "gauss-legendre"),
        ("llama", "clean-corrupted"),
        ("gptj", "clean-corrupted"),
    ],
)
def test_eap_ig_on_inputs_is_the_mean_of_derivatives_between_the_embeddings(family, rule):
    model, pairs = model_of(family), make_pairs(((6, 2), (5, 1)))
    metric, names = whole_vocabulary(pairs), some_names(model, 7, seed=2)
    scores = mk.edge_attribution(model, pairs, metric, steps=3, rule=rule)
    at, weights = points(rule, 3)
    expected = torch.zeros(len(names), dtype=torch.float64)
    for j in (0, 1):
        for x, weight in zip(at, weights, strict=True):
            expected[j::2] += weight * derivatives(model, pairs, metric, j, names[j::2], ("resid_pre", 0, x))
    assert_equal(found_at(scores, names)[torch.arange(7), torch.arange(7) % 2], expected, tolerance(family))
    ends = {"clean-corrupted": "clean and corrupted"}
    assert scores.provenance["gradient_at"] == ends.get(rule, "between")
    assert scores.provenance["steps"] == len(at)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "gemma2"])
def test_eap_ig_on_activations_moves_one_layers_heads_or_one_mlp_at_a_time(family):
    model, pairs = model_of(family), make_pairs(((6, 2), (5, 1)))
    metric, names = whole_vocabulary(pairs), some_names(model, 8, seed=3)
    scores = mk.edge_attribution(model, pairs, metric, steps=2, rule="midpoint", path="activation")
    expected = torch.zeros(len(names), 2, dtype=torch.float64)
    for i, name in enumerate(names):
        writer = name.partition("->")[0]
        site = "resid_pre" if writer == "input" else "mlp_out" if writer.startswith("m") else "z"
        layer = 0 if writer == "input" else int(writer[1:].partition(".")[0])
        for j in (0, 1):
            moved = [derivatives(model, pairs, metric, j, [name], (site, layer, x)) for x in (0.25, 0.75)]
            expected[i, j] = sum(moved) / 2
    assert_equal(found_at(scores, names), expected, tolerance(family))
    by_input = mk.edge_attribution(model, pairs, metric, steps=2, rule="midpoint")
    assert float((found_at(by_input, names) - expected).abs().max()) > 1e-3  # control: it is another path


# --- what must hold


@pytest.mark.parametrize(
    ("family", "gradient"),
    [(f, g) for f in FAMILIES for g in ("exact", "relp") if (f, g) != ("mixtral", "relp")],  # refused: see below
)
def test_the_edges_of_a_writer_add_up_to_its_node(family, gradient):
    """Whatever a component does, it does through its edges: so with the rules of relevance propagation too.

    Behind an attention norm (Gemma 2 and 3, OLMo 2) a patched z has the base run's scale and an edge its own run's: MLPs alone.
    """
    model, pairs = model_of(family), make_pairs()
    metric = whole_vocabulary(pairs)
    scores = mk.edge_attribution(model, pairs, metric, steps=1, gradient=gradient)
    by_writer = scores.per_prompt.nan_to_num().sum(1)
    bound = 1e-4 if family in FLOAT32_INSIDE else 1e-6 if family in RMS_NORMS else 1e-9
    index = scores.graph.writer_index
    node = functools.partial(mk.attribution_patching if gradient == "exact" else mk.relp, model, pairs, metric)
    sites = [("mlp_out", "layer"), ("resid_pre", "layer")] + ([] if family in POST_NORMS else [("z", "layer head")])
    for site, over in sites:
        nodes = node(site=site, over=over)
        effects = (nodes.values - nodes.baseline["corrupted"]).flatten(0, -2)
        names = {"mlp_out": [f"m{i}" for i in range(4)], "resid_pre": ["input"]}
        names["z"] = [f"a{i}.h{head}" for i in range(4) for head in range(4)]
        found = by_writer[[index[name] for name in names[site]]]
        assert_equal(found, effects[: len(found)], bound)
    if gradient == "relp":
        assert float((scores.per_prompt - eap(family).per_prompt).nan_to_num().abs().max()) > 1e-3  # control
        assert "completeness_error" not in scores.provenance


@pytest.fixture(scope="module")
def linear() -> zoo.Known:
    return zoo.linear()


def test_a_linear_models_scores_are_the_exact_effects(linear):
    exact = mk.edge_patching(linear.model, linear.pairs, linear.metric, progress=False)
    variants = [
        {"steps": 1},
        *({"steps": 3, "rule": rule} for rule in ("left", "right", "midpoint", "gauss-legendre", "stretched")),
        {"rule": "clean-corrupted"},
        {"steps": 2, "path": "activation"},
        {"steps": 1, "gradient": "relp"},
        {"steps": 2, "direction": "noise"},
        {"steps": 1, "direction": "noise"},
    ]
    for variant in variants:
        scores = mk.edge_attribution(linear.model, linear.pairs, linear.metric, **variant)
        assert torch.allclose(scores.per_prompt, exact.per_prompt, rtol=0, atol=1e-8, equal_nan=True), variant
    assert float(exact.values.nan_to_num().abs().max()) > 0.1
    noised = mk.edge_patching(linear.model, linear.pairs, linear.metric, direction="noise", progress=False)
    assert torch.allclose(noised.per_prompt, exact.per_prompt, rtol=0, atol=1e-8, equal_nan=True)


def test_noise_is_denoise_with_the_prompts_swapped_and_the_sign_turned():
    model, pairs = model_of("llama"), make_pairs()
    metric = whole_vocabulary(pairs)
    swapped = mk.PromptPairs(pairs.corrupted, pairs.clean, pairs.right, pairs.wrong)
    noised = mk.edge_attribution(model, pairs, metric, steps=1, direction="noise")
    back = mk.edge_attribution(model, swapped, metric, steps=1)
    assert torch.equal(noised.per_prompt.nan_to_num(), -back.per_prompt.nan_to_num())
    assert noised.provenance["gradient_at"] == "clean"
    assert torch.equal(noised.baseline["clean"], back.baseline["corrupted"])
    assert float((noised.per_prompt - eap("llama").per_prompt).nan_to_num().abs().max()) > 1e-3  # control


@pytest.mark.parametrize("family", ["falcon", "gpt_neox"])
def test_the_embeddings_edges_add_up_to_the_gap_between_the_runs(family):
    """Completeness, at most 1 % off at 50 steps, and what the result says about its own error."""
    model, pairs = model_of(family), make_pairs()
    scores = mk.edge_attribution(model, pairs, whole_vocabulary(pairs), steps=50, rule="midpoint")
    gap = scores.baseline["clean"] - scores.baseline["corrupted"]
    off = scores.per_prompt[0].sum(0) - gap
    assert float((off / gap).abs().max()) <= 0.01
    reported = scores.provenance["completeness_error"]
    assert reported == pytest.approx(float(off.abs().mean() / gap.abs().mean()), abs=1e-9)
    one = mk.edge_attribution(model, pairs, whole_vocabulary(pairs), steps=1)
    assert one.provenance["completeness_error"] > 0.1  # control


@pytest.mark.parametrize("variant", [{"steps": 1}, {"steps": 3}, {"steps": 2, "path": "activation"}])
def test_identical_prompts_score_nothing(variant):
    pairs = make_pairs()
    same = mk.PromptPairs(pairs.clean, pairs.clean, pairs.right, pairs.wrong)
    scores = mk.edge_attribution(model_of("llama"), same, whole_vocabulary(same), **variant)
    effects = scores.per_prompt[scores.graph.exists]
    assert torch.equal(effects, torch.zeros_like(effects))
    mixed = mk.PromptPairs.from_tokens(
        list(pairs.clean.tokens), [*pairs.clean.tokens[:1], *pairs.corrupted.tokens[1:]], pairs.answers
    )
    scores = mk.edge_attribution(model_of("llama"), mixed, whole_vocabulary(mixed), **variant)
    assert float(scores.per_prompt[scores.graph.exists][:, 0].abs().max()) == 0
    assert float(scores.per_prompt[scores.graph.exists][:, 1:].abs().max()) > 1e-2  # control


@pytest.mark.parametrize("variant", [{"steps": 1}, {"steps": 3}, {"steps": 2, "path": "activation"}])
def test_positions_add_up(variant):
    model, pairs = model_of("llama"), make_pairs()
    named = {"S": torch.tensor([5, 5, 3]), "T": torch.tensor([4, 6, 2])}
    pairs = mk.PromptPairs(pairs.clean, pairs.corrupted, pairs.right, pairs.wrong, named)
    score = functools.partial(mk.edge_attribution, model, pairs, whole_vocabulary(pairs), **variant)
    whole = score().per_prompt.nan_to_num()
    parts = [score(positions=at).per_prompt.nan_to_num() for at in ([0, 1, 2, 3], [4], [5, 6])]
    assert torch.allclose(sum(parts), whole, rtol=0, atol=1e-10)
    assert all(float(part.abs().max()) > 1e-2 for part in parts)
    two = score(positions=["S", "T"])
    one_by_one = [score(positions=[name]).per_prompt.nan_to_num() for name in ("S", "T")]
    assert torch.allclose(sum(one_by_one), two.per_prompt.nan_to_num(), rtol=0, atol=1e-10)
    last = score(positions=[3]).per_prompt.nan_to_num()
    assert torch.allclose(one_by_one[0][..., 2], last[..., 2], rtol=0, atol=1e-12)
    assert "completeness_error" not in two.provenance


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "falcon"])
@pytest.mark.parametrize("variant", [{"steps": 1}, {"steps": 3}, {"steps": 2, "path": "activation"}])
def test_ragged_pairs_small_memory_and_means(family, variant):
    model, pairs = model_of(family), make_pairs()
    metric = whole_vocabulary(pairs)
    whole = mk.edge_attribution(model, pairs, metric, **variant)
    size = float(whole.per_prompt.nan_to_num().abs().max())
    atol = (1e-5 if family == "gemma2" else 1e-10) * size
    alone = [mk.edge_attribution(model, pairs[[j]], whole_vocabulary(pairs[[j]]), **variant) for j in range(3)]
    expected = torch.cat([one.per_prompt for one in alone], 2)
    assert torch.allclose(whole.per_prompt, expected, rtol=0, atol=atol, equal_nan=True)
    little = mk.edge_attribution(model, pairs, metric, budget=2**16, **variant)
    assert torch.allclose(whole.per_prompt, little.per_prompt, rtol=0, atol=atol, equal_nan=True)
    means = mk.edge_attribution(model, pairs, metric, per_prompt=False, **variant)
    assert means.result.dims == ("writer", "reader")
    assert torch.allclose(means.values, whole.per_prompt.mean(2), rtol=0, atol=atol, equal_nan=True)
    for run in ("clean", "corrupted"):
        assert torch.allclose(
            means.baseline[run], whole.baseline[run], rtol=0, atol=1e-5 if family == "gemma2" else 1e-10
        )


def test_prompts_that_differ_from_the_beginning_have_no_common_prefix():
    model, pairs = model_of("llama"), make_pairs(((6, 0), (6, 3)))
    metric, names = whole_vocabulary(pairs), some_names(model, 6, seed=4)
    expected = torch.stack([derivatives(model, pairs, metric, j, names) for j in (0, 1)], 1)
    scores = mk.edge_attribution(model, pairs, metric, steps=1)
    assert_equal(found_at(scores, names), expected, 1e-8)


def test_metrics_read_before_the_end_and_against_a_run():
    model, pairs = model_of("qwen3"), make_pairs()
    pairs = mk.PromptPairs(pairs.clean, pairs.corrupted, pairs.right, pairs.wrong, {"MIDDLE": torch.tensor([3, 5, 2])})
    metric, names = whole_vocabulary(pairs, "MIDDLE"), some_names(model, 10, seed=5)
    expected = torch.stack([derivatives(model, pairs, metric, j, names) for j in range(3)], 1)
    scores = mk.edge_attribution(model, pairs, metric, steps=1)
    assert_equal(found_at(scores, names), expected, 1e-8)
    # clean-run KL falls along each edge as the cross-entropy of the clean run's distribution does
    kl = mk.edge_attribution(model, pairs, mk.kl_divergence(pairs), steps=1)
    with torch.no_grad():
        targets = [model(tokens[None])[0, -1].softmax(-1) for tokens in pairs.clean.tokens]
    against = mk.Metric(
        "cross entropy",
        "nats",
        3,
        pairs.positions["END"],
        None,
        lambda logits, prompt, _: -(torch.stack(targets)[prompt] * logits.log_softmax(-1)).sum(-1),
    )
    same = mk.edge_attribution(model, pairs, against, steps=1)
    assert torch.allclose(kl.per_prompt, same.per_prompt, rtol=0, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("variant", [{"steps": 1}, {"steps": 3}, {"steps": 2, "path": "activation"}])
def test_a_callable_metric(variant):
    model, pairs = model_of("llama"), make_pairs(((7, 2), (7, 4)))
    metric = whole_vocabulary(pairs)

    def mixture(logits: Tensor) -> Tensor:
        assert logits.shape == (2, 7, 61)
        return metric.read(logits[:, -1], torch.arange(2), None)

    found = mk.edge_attribution(model, pairs, mixture, **variant)
    expected = mk.edge_attribution(model, pairs, metric, **variant)
    assert torch.allclose(found.per_prompt, expected.per_prompt, rtol=0, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(context):
    model, pairs = model_of("llama"), make_pairs()
    metric = whole_vocabulary(pairs)
    with context():
        scores = mk.edge_attribution(model, pairs, metric, steps=1)
    assert torch.equal(scores.per_prompt.nan_to_num(), eap("llama").per_prompt.nan_to_num())


def test_the_model_is_left_as_it_was():
    model, pairs = make_model("llama"), make_pairs()
    parameters = list(model.bridge.original_model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.full_like(parameters[1], 3.0)
    before, values = n_hooks(model), [p.detach().clone() for p in parameters]

    def fails_backwards(logits: Tensor) -> Tensor:
        if logits.requires_grad:
            logits.register_hook(_raise)
        return logits[:, -1, 5]

    same_length = pairs[[0, 1]]
    mk.edge_attribution(model, same_length, whole_vocabulary(same_length), steps=2)
    for gradient in ("exact", "relp"):
        with pytest.raises(RuntimeError, match="in the middle"):
            mk.edge_attribution(model, same_length, fails_backwards, gradient=gradient)
    assert n_hooks(model) == before
    assert not model.has_hooks
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert [p.grad is not None for p in parameters] == [False, True] + [False] * (len(parameters) - 2)
    assert bool((parameters[1].grad == 3.0).all())
    assert all(torch.equal(p, value) for p, value in zip(parameters, values, strict=True))
    assert torch.is_grad_enabled()


def _raise(gradient: Tensor) -> None:
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("family", ["gpt2", *PARALLEL[:1]])
def test_other_hooks_on_the_model(family):
    """Somebody else's hook counts: the model with it is the model."""
    model, pairs = model_of(family), make_pairs()
    metric, names = whole_vocabulary(pairs), some_names(model, 6, seed=6)
    with model.hooks([("embed", lambda x, hook: 1.5 * x)]):
        for steps in (1, 2):
            scores = mk.edge_attribution(model, pairs, metric, steps=steps, rule="left")
            assert "hooks" in scores.provenance["runs"]
            if steps == 1:
                expected = torch.stack([derivatives(model, pairs, metric, j, names) for j in (0, 2)], 1)
                assert_equal(found_at(scores, names)[:, [0, 2]], expected, 1e-8)
    assert float((found_at(eap(family), names)[:, [0, 2]] - expected).abs().max()) > 1e-3  # control


# --- refusals


def step_of(pairs: mk.PromptPairs) -> mk.Metric:
    return mk.accuracy(pairs)


def steep_of(pairs: mk.PromptPairs) -> mk.Metric:
    """Finite, but its slope is not: the square root of 0."""
    return mk.Metric(
        "steep", "logits", 3, pairs.positions["END"], None, lambda x, _, __: (0 * x).sum(-1).sqrt() + x[:, 5]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [(step_of, "metric 'accuracy': no gradient"), (steep_of, "gradient|finite")],
)
def test_metrics_without_a_usable_gradient(make: Callable[[mk.PromptPairs], mk.Metric], message: str):
    model, pairs = model_of("llama"), make_pairs()
    with pytest.raises(ValueError, match=message):
        mk.edge_attribution(model, pairs, make(pairs), steps=1)
    assert not model.has_hooks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps: expected a whole number of 1 or more, got 0"),
        ({"steps": 2.5}, "steps: expected a whole number"),
        ({"steps": True}, "steps: expected a whole number"),
        ({"rule": "simpson"}, "rule: expected one of"),
        ({"path": "weights"}, "path: expected 'input' or 'activation'"),
        ({"gradient": "lrp"}, "gradient: expected 'exact' or 'relp'"),
        *WRONG_FOR_EDGES,
    ],
)
def test_refusals(arguments, message):
    model, pairs = model_of("llama"), make_pairs()
    with pytest.raises(ValueError, match=message):
        mk.edge_attribution(model, pairs, whole_vocabulary(pairs), **arguments)
    assert not model.has_hooks


def test_more_refusals():
    model, pairs = model_of("llama"), make_pairs()
    metric = whole_vocabulary(pairs)
    with pytest.raises(ValueError, match="pairs: expected PromptPairs"):
        mk.edge_attribution(model, pairs.clean, metric)
    with pytest.raises(ValueError, match="lengths"):
        mk.edge_attribution(model, pairs, lambda logits: logits[:, -1, 5])
    with pytest.raises(ValueError, match="metric"):
        mk.edge_attribution(model, pairs, whole_vocabulary(pairs[[0, 1]]))
    with pytest.raises(ValueError, match="experts, for which relevance propagation has no rule"):
        mk.edge_attribution(model_of("mixtral"), pairs, metric, gradient="relp")
    bad = mk.Metric("bad", "logits", 3, pairs.positions["END"], None, lambda x, _, __: x[:, 5] / 0)
    with pytest.raises(ValueError, match="finite metric, got NaN or inf for prompts"):
        mk.edge_attribution(model, pairs, bad)
    model.bridge.original_model.train()
    try:
        with pytest.raises(ValueError, match="model: expected evaluation mode"):
            mk.edge_attribution(model, pairs, metric)
    finally:
        model.bridge.original_model.eval()
    assert not model.has_hooks


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_proof_that_fails_leads_to_whole_runs(family, monkeypatch):
    """The first unedited runs are the proof that suffixes may be run; where it fails, everything is run again, whole."""
    from mechkit.engine import GradientRuns

    model, pairs = model_of(family), make_pairs()
    metric = whole_vocabulary(pairs)
    expected = mk.edge_attribution(model, pairs, metric, steps=2)
    assert expected.provenance["runs"] == "suffix"
    monkeypatch.setattr(GradientRuns, "_refuted", lambda self, found: "for the test")
    found = mk.edge_attribution(model, pairs, metric, steps=2)
    assert found.provenance["runs"] == "full: for the test"
    assert torch.allclose(found.per_prompt.nan_to_num(), expected.per_prompt.nan_to_num(), atol=1e-6)
