"""Rollout, flow and relevance against loops written independently, and what holds of each by its definition."""

from __future__ import annotations

import itertools
from functools import partial

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import mechkit as mk
from helpers.families import D_VOCAB, FAMILIES
from helpers.reference import activations
from helpers.tiny import make_model, make_pairs, model_of, whole_vocabulary
from mechkit.attribution import attention_attribution as module
from mechkit.attribution.attention_attribution import attention_flow, attention_relevance, attention_rollout

SHARES = [attention_rollout, attention_flow]


def patterns(model: mk.HookedModel, tokens: torch.Tensor) -> np.ndarray:
    """`[layer head dest src]` of one prompt, by TransformerLens alone."""
    found = activations(model.bridge, tokens[None])
    return np.stack([found[f"blocks.{i}.attn.hook_pattern"][0].double().numpy() for i in range(model.n_layers)])


def naive_mixing(pattern: np.ndarray, residual: float = 0.5, heads: str = "mean") -> np.ndarray:
    """`[layer dest src]`, entry by entry."""
    n_layers, n_heads, length, _ = pattern.shape
    mixing = np.zeros((n_layers, length, length))
    for layer, dest in itertools.product(range(n_layers), range(length)):
        row = [[pattern[layer, head, dest, src] for head in range(n_heads)] for src in range(length)]
        joined = [sum(entry) / n_heads if heads == "mean" else max(entry) for entry in row]
        for src in range(length):
            mixing[layer, dest, src] = residual * (dest == src) + (1 - residual) * joined[src] / sum(joined)
    return mixing


def naive_rollout(mixing: np.ndarray, target: int) -> np.ndarray:
    """Probability of ending at each input position on a random walk downwards from the target."""
    at = np.zeros(mixing.shape[-1])
    at[target] = 1
    for layer in reversed(mixing):
        at = np.array([sum(at[dest] * layer[dest, src] for dest in range(len(at))) for src in range(len(at))])
    return at


def networkx_flow(mixing: np.ndarray, target: int) -> np.ndarray:
    n_layers, length, _ = mixing.shape
    graph = nx.DiGraph()
    graph.add_nodes_from((depth, pos) for depth in range(n_layers + 1) for pos in range(length))
    for layer, dest, src in np.argwhere(mixing > 0).tolist():
        graph.add_edge((layer + 1, dest), (layer, src), capacity=mixing[layer, dest, src])
    return np.array([nx.maximum_flow_value(graph, (n_layers, target), (0, pos)) for pos in range(length)])


def linear_program_flow(mixing: np.ndarray, target: int, pos: int) -> float:
    """Maximize what leaves the target, conserving flow at every node but the target and the input position."""
    n_layers, length, _ = mixing.shape
    edges = np.argwhere(mixing > 0)
    ends = {(n_layers, target), (0, pos)}
    inner = [n for n in itertools.product(range(n_layers + 1), range(length)) if n not in ends]
    conserved = np.zeros((len(inner), len(edges)))
    leaves = np.zeros(len(edges))
    for column, (layer, dest, src) in enumerate(edges.tolist()):
        for node, sign in (((layer + 1, dest), 1), ((layer, src), -1)):
            if node in ends:
                leaves[column] += node == (n_layers, target)
            else:
                conserved[inner.index(node), column] += sign
    capacities = [(0, mixing[layer, dest, src]) for layer, dest, src in edges.tolist()]
    return -linprog(-leaves, A_eq=conserved, b_eq=np.zeros(len(inner)), bounds=capacities).fun


def bottleneck(mixing: np.ndarray, target: int) -> np.ndarray:
    """The width of the widest single path from the target to each input position."""
    width = np.zeros(mixing.shape[-1])
    width[target] = np.inf
    for layer in reversed(mixing):
        width = np.array([max(min(width[d], layer[d, s]) for d in range(len(width))) for s in range(len(width))])
    return width


def naive_relevance(model, tokens: torch.Tensor, metric, prompt: int, target: int) -> list[np.ndarray]:
    """R's row after each layer. A head's output is pattern @ v, so the gradient of entry [q, k] of its pattern is
    <gradient of z[q], v[k]>: this reads gradients at z, and never hooks a pattern."""
    bridge, length, n_layers, n_heads = model.bridge, len(tokens), model.n_layers, model.n_heads
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(n_layers)]
    cache = activations(bridge, tokens[None])
    zeros = {name: torch.zeros_like(cache[name], requires_grad=True) for name in names}

    def add(x, hook, name):
        return x + zeros[name]

    logits = bridge.run_with_hooks(tokens[None], fwd_hooks=[(name, partial(add, name=name)) for name in names])
    row = logits[0, metric.positions[prompt]][None]
    row = row if metric.tokens is None else row[:, metric.tokens]
    gradients = torch.autograd.grad(metric.read(row, torch.tensor([prompt]), None).sum(), [zeros[n] for n in names])
    relevance, rows = np.eye(length), []
    for layer in range(n_layers):
        pattern, v = cache[f"blocks.{layer}.attn.hook_pattern"][0], cache[f"blocks.{layer}.attn.hook_v"][0]
        mean = np.zeros((length, length))
        for head, q, k in itertools.product(range(n_heads), range(length), range(length)):
            gradient = float(gradients[layer][0, q, head].double() @ v[k, head * v.shape[1] // n_heads].double())
            mean[q, k] += max(0.0, gradient * float(pattern[head, q, k])) / n_heads
        relevance = relevance + np.array([[mean[q] @ relevance[:, k] for k in range(length)] for q in range(length)])
        rows.append(relevance[target])
    return rows


def random_mixing(seed: int, n_layers: int, length: int, residual: float, peak: float = 2.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scores = np.where(
        np.tril(np.ones((length, length))) > 0, peak * rng.normal(size=(n_layers, length, length)), -np.inf
    )
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return residual * np.eye(length) + (1 - residual) * shares


def ragged(result: mk.Result, prompts: mk.Prompts) -> None:
    """NaN exactly where a prompt has no such position."""
    absent = torch.arange(int(prompts.lengths.max()))[:, None] >= prompts.lengths
    assert torch.equal(result.values.isnan(), absent.expand_as(result.values))


# -- rollout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_is_the_random_walk_at_every_depth_and_conserves(family):
    model, pairs = model_of(family), make_pairs()
    tolerance = 1e-6 if family == "mixtral" else 1e-12
    result = attention_rollout(model, pairs, over="layer pos")
    assert result.dims == ("layer", "pos", "prompt")
    ragged(result, pairs.clean)
    for j, tokens in enumerate(pairs.clean.tokens):
        mixing = naive_mixing(patterns(model, tokens))
        for layer in range(model.n_layers):
            expected = naive_rollout(mixing[: layer + 1], len(tokens) - 1)
            assert np.abs(result.values[layer, : len(tokens), j].numpy() - expected).max() <= tolerance
            assert not np.allclose(expected, naive_rollout(mixing[:layer], len(tokens) - 1), atol=1e-3)  # control
    assert torch.allclose(result.values.nansum(1), torch.ones(()).to(result.values), atol=tolerance, rtol=0)
    last = attention_rollout(model, pairs)
    assert last.dims == ("pos", "prompt")
    assert torch.equal(last.values.nan_to_num(), result.values[-1].nan_to_num())


@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("residual", [0, 0.3, 1.0])
def test_options(heads, residual):
    model, pairs = model_of("llama"), make_pairs()
    rollout = attention_rollout(model, pairs, residual=residual, head_fusion=heads, position=-2)
    flow = attention_flow(model, pairs, residual=residual, head_fusion=heads, position=-2)
    for j, tokens in enumerate(pairs.clean.tokens):
        n = len(tokens)
        mixing = naive_mixing(patterns(model, tokens), residual, heads)
        assert np.allclose(rollout.values[:n, j].numpy(), naive_rollout(mixing, n - 2), atol=1e-12, rtol=0)
        assert np.allclose(flow.values[:n, j].numpy(), networkx_flow(mixing, n - 2), atol=1e-9, rtol=0)
        assert float(rollout.values[n - 1, j]) == float(flow.values[n - 1, j]) == 0  # nothing flows from the future
        if residual == 1:
            assert rollout.values[:n, j].tolist() == flow.values[:n, j].tolist() == [0] * (n - 2) + [1, 0]
    assert torch.allclose(rollout.values.nansum(0), torch.ones(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_one_layer_without_residual_is_its_attention_and_max_is_not_mean():
    model, pairs = model_of("gpt2"), make_pairs()
    tokens = pairs.clean.tokens[0]
    for technique in SHARES:
        first = technique(model, pairs, residual=0, over="layer pos").values[0, :, 0].numpy()
        assert np.allclose(first, patterns(model, tokens)[0].mean(0)[-1], atol=1e-12, rtol=0)
        joined = technique(model, pairs, residual=0, over="layer pos", head_fusion="max").values[0, :, 0].numpy()
        assert np.abs(first - joined).max() > 1e-2


@pytest.mark.parametrize("technique", SHARES)
def test_named_positions_indices_and_labels(technique):
    model, pairs = model_of("gpt2"), make_pairs()
    positions = dict(pairs.positions) | {"MIDDLE": torch.tensor([3, 3, 3])}
    pairs = mk.PromptPairs(pairs.clean, pairs.corrupted, pairs.right, pairs.wrong, positions)
    middle, third, end = (technique(model, pairs, position=where) for where in ("MIDDLE", 3, "END"))
    assert torch.equal(middle.values.nan_to_num(), third.values.nan_to_num())
    assert bool((middle.values[4:] == 0)[:, :2].all())
    assert not torch.allclose(middle.values.nan_to_num(), end.values.nan_to_num(), atol=1e-2)
    labelled = mk.Prompts.from_tokens(pairs.clean.tokens[:1], model)
    assert technique(model, labelled).coords["pos"] == tuple(
        f'"{int(t)}" {i}' for i, t in enumerate(labelled.tokens[0])
    )
    assert (end.baseline, end.base) == ({}, "")
    assert end.provenance["technique"] == technique.__name__
    assert {"weights_hash", "tokens_hash", "residual", "head_fusion", "position", "over", "site"} <= set(end.provenance)


@pytest.mark.parametrize("technique", SHARES)
def test_rows_that_are_no_shares_are_refused(technique):
    model, pairs = model_of("llama"), make_pairs()
    technique(model, pairs)  # control

    def half(pattern, hook):
        return pattern * 0.5

    def negative(pattern, hook):
        pattern = pattern.clone()
        pattern[..., 0] += 1
        pattern[..., -1] -= 1
        return pattern

    for edit in (half, negative, lambda pattern, hook: pattern * torch.nan):
        with (
            model.hooks([(("pattern", 2), edit)]),
            pytest.raises(ValueError, match="pattern of layer 2: expected rows that are shares"),
        ):
            technique(model, pairs)
    assert not model.has_hooks


def test_half_precision_rows_are_shares_too():
    model, pairs = model_of("llama", torch.bfloat16), make_pairs()
    result = attention_rollout(model, pairs)
    assert result.values.dtype == torch.float32
    assert torch.allclose(result.values.nansum(0), torch.ones(3), atol=1e-6, rtol=0)


# -- flow ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_flow_is_networkx_flow_and_keeps_its_bounds(family):
    model, pairs = model_of(family), make_pairs()
    result, rollout = attention_flow(model, pairs), attention_rollout(model, pairs)
    ragged(result, pairs.clean)
    for j, tokens in enumerate(pairs.clean.tokens):
        n, flow = len(tokens), result.values[: len(tokens), j].double().numpy()
        mixing = naive_mixing(patterns(model, tokens))
        assert np.abs(flow - networkx_flow(mixing, n - 1)).max() <= (1e-6 if family == "mixtral" else 1e-9)
        assert bool((flow <= 1 + 1e-12).all())
        assert bool((flow >= bottleneck(mixing, n - 1) - 1e-6).all())
        assert bool((flow >= rollout.values[:n, j].double().numpy() - 1e-6).all())
        assert flow.sum() >= 1 - 1e-6
        assert np.abs(flow - rollout.values[:n, j].double().numpy()).max() > 1e-2  # control: they are two things


def test_flow_at_every_depth():
    model, pairs = model_of("gpt2"), make_pairs()
    result, tokens = attention_flow(model, pairs, over="layer pos"), pairs.clean.tokens[0]
    mixing = naive_mixing(patterns(model, tokens))
    for layer in range(model.n_layers):
        expected = networkx_flow(mixing[: layer + 1], len(tokens) - 1)
        assert np.abs(result.values[layer, :, 0].numpy() - expected).max() <= 1e-9
    assert torch.equal(result.values[-1].nan_to_num(), attention_flow(model, pairs).values.nan_to_num())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    n_layers=st.integers(1, 4),
    length=st.integers(1, 5),
    residual=st.sampled_from([0.0, 0.3, 0.5]),
    peak=st.sampled_from([0.1, 2.0, 12.0]),
)
def test_flow_solves_the_linear_program(seed, n_layers, length, residual, peak):
    mixing = random_mixing(seed, n_layers, length, residual, peak)
    target = seed % length
    flow = module._flows(mixing, [n_layers], target)[0]
    for pos in range(length):
        assert abs(flow[pos] - linear_program_flow(mixing, target, pos)) <= 1e-7  # the solver's own tolerance
    assert np.abs(flow - networkx_flow(mixing, target)).max() <= 1e-9


def test_flow_of_a_large_graph_is_within_the_stated_bound():
    mixing = random_mixing(3, 12, 20, 0.5, peak=4.0)
    flow, expected = module._flows(mixing, [12], 19)[0], networkx_flow(mixing, 19)
    assert bool((flow >= expected - 1e-12).all())
    assert bool((flow <= expected + (mixing > 0).sum() * 2**-30).all())
    assert np.abs(flow - expected).max() <= 1e-9  # and in fact


def test_flow_known_by_hand():
    """Two layers, three positions. From position 2: 0.2 goes by way of 0, 0.3 by 1, 0.5 by 2; then each way to 0 is as wide
    as the narrower of its two edges: min(.2, 1) + min(.3, .4) + min(.5, .1) = 0.6."""
    lower = np.array([[1.0, 0, 0], [0.4, 0.6, 0], [0.1, 0, 0.9]])
    upper = np.array([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])
    flow = module._flows(np.stack([lower, upper]), [1, 2], 2)
    assert np.allclose(flow, [[0.1, 0, 0.9], [0.6, 0.3, 0.5]], atol=1e-12, rtol=0)


def test_edges_too_narrow_for_a_step_still_count():
    """Capacities below 2^-30 vanish when rounded, but a cut adds them up as they are."""
    tiny = np.array([[[1.0, 0.0], [1e-12, 1 - 1e-12]]])
    assert module._flows(tiny, [1], 1)[0].tolist() == pytest.approx([1e-12, 1 - 1e-12], rel=1e-9)


# -- relevance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_relevance_is_the_rule_at_every_depth(family):
    model, pairs = model_of(family), make_pairs()
    metric = whole_vocabulary(pairs)
    result = attention_relevance(model, pairs, metric, over="layer pos")
    ragged(result, pairs.clean)
    for j, tokens in enumerate(pairs.clean.tokens):
        n = len(tokens)
        for layer, expected in enumerate(naive_relevance(model, tokens, metric, j, n - 1)):
            found = result.values[layer, :n, j].double().numpy()
            # Mixtral is in float32; OPT hands its patterns over in float32, and their gradients come back in it.
            tolerance = {"mixtral": 1e-4, "opt": 1e-6}.get(family, 1e-10)
            assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())
        assert np.abs(expected - np.eye(n)[-1]).max() > 1e-2  # control: the rule did something
    assert bool((result.values.nan_to_num() >= 0).all())
    last = attention_relevance(model, pairs, metric)
    assert torch.equal(last.values.nan_to_num(), result.values[-1].nan_to_num())


@pytest.mark.parametrize(
    ("family", "step", "tolerance"),
    [
        ("gpt2", 1e-5, 1e-6),
        ("gpt_neox", 1e-5, 1e-6),
        ("falcon", 1e-5, 1e-6),
        # Their attention goes through float32, whose rounding drowns a smaller step.
        ("gptj", 1e-3, 1e-3),
        ("opt", 1e-3, 1e-3),
        ("gemma2", 1e-3, 1e-3),
    ],
)
def test_gradients_are_those_of_a_small_change(family, step, tolerance):
    """The weighted patterns of one layer by central differences, editing one entry of one pattern at a time."""
    model, pairs = model_of(family), make_pairs(((4, 2),))
    metric, tokens, layer = whole_vocabulary(pairs), pairs.clean.tokens[0], 1
    pattern = patterns(model, tokens)[layer]

    def value(head: int, q: int, k: int, by: float) -> float:
        def edit(x, hook):
            x = x.clone()
            x[0, head, q, k] += by
            return x

        logits = model.run_with_hooks(tokens[None], [(("pattern", layer), edit)])
        return float(metric.read(logits[0, -1][None].detach(), torch.tensor([0]), None))

    expected = np.zeros((4, 4))
    for head, q, k in itertools.product(range(model.n_heads), range(4), range(4)):
        gradient = (value(head, q, k, step) - value(head, q, k, -step)) / (2 * step)
        expected[q, k] += max(0.0, gradient * pattern[head, q, k]) / model.n_heads
    found = module._weighted_patterns(model, tokens[None], metric, [0])[layer, 0].numpy()
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
    assert np.abs(expected).max() > 1e-2


@pytest.mark.parametrize("make", [mk.logit_diff, mk.log_prob, mk.prob_diff], ids=lambda f: f.__name__)
def test_relevance_of_mechkits_metrics(make):
    model, pairs = model_of("llama"), make_pairs()
    positions = dict(pairs.positions) | {"MIDDLE": torch.tensor([4, 5, 3])}
    right, wrong = ((5, 8), (6,), (9,)), ((7,), (10, 11), (12,))  # each pair's own
    pairs = mk.PromptPairs(pairs.clean, pairs.corrupted, right, wrong, positions)
    for position in ("END", "MIDDLE"):
        metric = make(pairs, position=position)
        result = attention_relevance(model, pairs, metric)
        for j, tokens in enumerate(pairs.clean.tokens):
            target = int(pairs.positions[position][j])
            expected = naive_relevance(model, tokens, metric, j, target)[-1]
            assert np.abs(result.values[: len(tokens), j].numpy() - expected).max() <= 1e-10
            assert not result.values[target + 1 : len(tokens), j].any()
        assert (result.metric, result.provenance["of_metric"]) == ("attention_relevance", metric.name)


def test_relevance_of_a_callable_is_that_of_the_same_metric():
    model, pairs = model_of("qwen3"), make_pairs(((7, 2), (7, 4)))
    weights = torch.randn(D_VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    found = attention_relevance(model, pairs, lambda logits: logits[:, -1] @ weights)
    expected = attention_relevance(model, pairs, whole_vocabulary(pairs))
    assert torch.allclose(found.values, expected.values, atol=1e-12, rtol=1e-12)
    earlier = attention_relevance(model, pairs, lambda logits: logits[:, 4] @ weights, position=4)
    assert not earlier.values[5:].any()
    assert float((earlier.values - found.values).abs().max()) > 1e-2


def test_a_metric_and_its_multiple():
    """Ā is linear in the metric where it is positive: with k times the metric, R = I + k Ā after the first layer; and with the
    sign turned, other entries count."""
    model, pairs = model_of("gpt2"), make_pairs(((7, 2),))
    one, ten, minus = (
        attention_relevance(model, pairs, lambda x, k=k: k * x[:, -1, 5], over="layer pos").values[-1, :, 0]
        - torch.eye(7, dtype=torch.float64)[-1]
        for k in (1e-6, 1e-5, -1e-6)
    )
    assert torch.allclose(10 * one, ten, rtol=1e-4, atol=0)  # products of layers are of the order 1e-5
    assert not torch.allclose(one, minus, rtol=0.1, atol=0)


# -- the surroundings ------------------------------------------------------------------------------------------------


def every_technique(model, pairs, metric=None, **options):
    metric = metric or whole_vocabulary(pairs)
    return [
        attention_rollout(model, pairs, **options),
        attention_flow(model, pairs, **options),
        attention_relevance(model, pairs, metric, **options),
    ]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_batches_chunks_and_single_prompts_agree(family):
    model, pairs = model_of(family), make_pairs(((7, 2), (5, 1), (7, 4), (7, 3), (5, 2)))
    together, chunked = every_technique(model, pairs), every_technique(model, pairs, budget=1)
    for i, (whole, parts) in enumerate(zip(together, chunked, strict=True)):
        assert torch.allclose(whole.values, parts.values, atol=1e-10, rtol=1e-10, equal_nan=True)
        for j, length in enumerate(pairs.clean.lengths.tolist()):
            alone = every_technique(model, pairs[[j]])[i].values[:, 0]
            assert torch.allclose(whole.values[:length, j], alone, atol=1e-10, rtol=1e-10)
            other = whole.values[:length, (j + 1) % len(pairs)]
            assert not torch.allclose(other.nan_to_num(), alone, atol=1e-3)  # control: prompts differ


def test_a_small_budget_takes_several_batches(monkeypatch):
    model, pairs = model_of("gpt2"), make_pairs(((7, 2), (7, 4), (7, 3)))
    sizes = []
    inner = mk.HookedModel.run
    monkeypatch.setattr(
        mk.HookedModel, "run", lambda self, x, *of, **kw: sizes.append(len(x)) or inner(self, x, *of, **kw)
    )
    every_technique(model, pairs)
    assert sizes == [3, 3, 3]
    every_technique(model, pairs, budget=1)
    assert sizes[3:] == [1] * 9


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("around", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_parameters_gradients_and_modes_are_left_alone(frozen, around):
    model, pairs = make_model("gpt2"), make_pairs()
    metric = whole_vocabulary(pairs)
    expected = [result.values for result in every_technique(model, pairs, metric)]
    parameters = list(model.bridge.original_model.parameters())
    for parameter in parameters[::2] if frozen else []:
        parameter.requires_grad_(False)
    flags = [p.requires_grad for p in parameters]
    with around():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        results = every_technique(model, pairs, metric)
        with pytest.raises(ValueError, match="finite"):
            attention_relevance(model, pairs[[0]], lambda x: x[:, -1, 0] * torch.nan)
        with pytest.raises(RuntimeError, match="on purpose"):
            attention_relevance(model, pairs[[0]], _raise)
        assert before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    for found, values in zip(results, expected, strict=True):
        assert torch.allclose(found.values, values, atol=1e-12, rtol=1e-12, equal_nan=True)
    assert [p.requires_grad for p in parameters] == flags
    assert all(p.grad is None for p in parameters)
    assert not model.has_hooks


def _raise(logits):
    raise RuntimeError("on purpose")


def test_all_parameters_frozen():
    model, pairs = make_model("llama"), make_pairs()
    expected = attention_relevance(model, pairs, whole_vocabulary(pairs)).values
    model.bridge.original_model.requires_grad_(False)
    found = attention_relevance(model, pairs, whole_vocabulary(pairs)).values
    assert torch.allclose(found, expected, atol=1e-12, rtol=1e-12, equal_nan=True)


def test_float32():
    model, exact, pairs = model_of("llama", torch.float32), model_of("llama"), make_pairs()
    for found, expected in zip(every_technique(model, pairs), every_technique(exact, pairs), strict=True):
        assert found.values.dtype == torch.float32
        assert torch.allclose(found.values.double(), expected.values, atol=1e-3, rtol=1e-3, equal_nan=True)


def test_results_save_and_load(tmp_path):
    for i, result in enumerate(every_technique(model_of("gpt2"), make_pairs())):
        result.save(tmp_path / f"{i}.safetensors")
        loaded = mk.Result.load(tmp_path / f"{i}.safetensors")
        assert loaded.coords == result.coords
        assert loaded.provenance == result.provenance


@pytest.mark.parametrize("technique", SHARES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": 1.5}, "residual: expected a"),
        ({"residual": True}, "residual: expected a"),
        ({"head_fusion": "min"}, "head_fusion: expected 'mean' or 'max'"),
        ({"over": "layer head"}, "over: expected 'pos' or 'layer pos'"),
        ({"position": "S2"}, "position: expected"),
        ({"position": 5}, "position: expected an index that every prompt has"),
        ({"position": -6}, "position: expected an index that every prompt has"),
        ({"position": True}, "position: expected"),
        ({"budget": 0}, "budget: expected a positive number"),
    ],
)
def test_options_that_are_refused(technique, options, message):
    model, pairs = model_of("gpt2"), make_pairs()
    with pytest.raises(ValueError, match=message):
        technique(model, pairs, **options)


def test_refused_by_all():
    model, pairs = model_of("gpt2"), make_pairs(((7, 2), (7, 4)))
    techniques = [*SHARES, lambda model, prompts: attention_relevance(model, prompts, lambda logits: logits[:, -1, 5])]
    for technique in techniques:
        with pytest.raises(ValueError, match=r"prompts\[0\]: expected a string, got a tensor"):
            technique(model, pairs.clean.tokens)
        with pytest.raises(ValueError, match="prompt 1: expected token ids in"):
            technique(model, mk.Prompts.from_tokens([[3, 4], [5, D_VOCAB]]))
        with pytest.raises(ValueError, match="expected evaluation mode"):
            technique(model.train(), pairs)
        model.eval()
    assert not model.has_hooks


def test_metrics_that_are_refused():
    model, pairs = model_of("gpt2"), make_pairs()

    def relevance(metric, prompts=pairs, **options):
        attention_relevance(model, prompts, metric, **options)

    with pytest.raises(ValueError, match="compares with the clean run"):
        relevance(mk.kl_divergence(pairs))
    with pytest.raises(ValueError, match="'accuracy': expected one with a gradient"):
        relevance(mk.accuracy(pairs))
    with pytest.raises(ValueError, match="made for 3 prompts, but there are 2"):
        relevance(mk.logit_diff(pairs), pairs[[0, 1]])
    with pytest.raises(ValueError, match="made for other prompts"):
        relevance(mk.logit_diff(pairs), pairs[[1, 2, 0]])
    with pytest.raises(ValueError, match="position: expected none"):
        relevance(mk.logit_diff(pairs), position="END")
    outside = whole_vocabulary(pairs)
    with pytest.raises(ValueError, match="expected positions within"):
        relevance(mk.Metric("late", "", 3, torch.tensor([6, 6, 6]), None, outside.read))
    with pytest.raises(ValueError, match="expected answer tokens in"):
        relevance(mk.Metric("high", "", 3, pairs.clean.lengths - 1, torch.tensor([D_VOCAB]), outside.read))
    with pytest.raises(ValueError, match="needs prompts of one length"):
        relevance(lambda logits: logits[:, -1, 0])
    with pytest.raises(
        ValueError, match=r"expected one real value per prompt, a tensor of shape \[1\], got torch.float64 \[\]"
    ):
        relevance(lambda logits: logits.mean(), pairs[[0]])
    with pytest.raises(TypeError, match="metric: expected a Metric"):
        relevance(3.0)
    assert not model.has_hooks
