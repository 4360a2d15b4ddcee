"""Attribution to input tokens and neurons against naive loops, exact models, completeness, and captum."""

from __future__ import annotations

import functools

import pytest
import torch

import mechkit as mk
from helpers.families import D_VOCAB, FAMILIES, build_hf
from helpers.tiny import make_model, make_pairs, model_of, whole_vocabulary
from mechkit.attribution.input_attribution import gradient_x_input, neuron_attribution, token_integrated_gradients
from mechkit.engine import Budget
from mechkit.experiment.quadrature import quadrature
from mechkit.hooks import SITES
from mechkit.zoo import linear

# The families that transformers computes in float64 throughout; in the others a norm or a softmax is in float32.
ALL_FLOAT64 = {"gpt2", "gpt_neox", "falcon"}
PAIRS = ((7, 3), (5, 1), (7, 4))
INPUT = "blocks.0.hook_resid_pre"


def tolerance_of(family):
    return 2e-3 if family == "mixtral" else 1e-10 if family in ALL_FLOAT64 else 1e-5


def assert_same(found, expected, tolerance, what=""):
    """Up to `tolerance` of the largest entry, which must be something."""
    assert found.shape == expected.shape, what
    assert torch.equal(found.isnan(), expected.isnan()), what
    scale = float(expected.nan_to_num().abs().max())
    assert scale > 1e-3, what  # control
    assert float((found.double() - expected.double()).nan_to_num().abs().max()) <= tolerance * scale, what


def assert_untouched(model):
    assert not model.has_hooks
    assert not model.bridge.original_model.get_input_embeddings()._forward_hooks
    assert all(p.grad is None and p.requires_grad for p in model.bridge.original_model.parameters())


def stack_ragged(rows, axis=0):
    """Tensors that differ in length along one axis, as one with the prompt last and NaN at the ends."""
    longest = max(row.shape[axis] for row in rows)
    padded = []
    for row in rows:
        shape = list(row.shape)
        shape[axis] = longest - shape[axis]
        padded.append(torch.cat([row, row.new_full(shape, torch.nan)], axis))
    return torch.stack(padded, -1)


def value_with(model, metric, i, tokens, edits):
    """The metric of prompt i `[row]` with activations (full hook name -> `[row ...]`) replaced: a row of a whole pass each."""
    rows = len(next(iter(edits.values())))
    hooks = [(name, lambda x, hook, at=at: at) for name, at in edits.items()]
    logits = model.run_with_hooks(tokens.expand(rows, -1), hooks)
    return metric.read(logits[:, metric.positions[i]], torch.full((rows,), i), None)


def activation(model, tokens, name, edits=None):
    """One activation `[row ...]` of a whole forward pass, with others replaced: one row of them, if none are."""
    rows = len(next(iter(edits.values()))) if edits else 1
    with torch.no_grad(), model.hooks([(n, lambda x, hook, at=at: at) for n, at in (edits or {}).items()]):
        return model.run_with_cache(tokens.expand(rows, -1), name)[1][name]


def slope_at(model, metric, i, tokens, name, at):
    """The metric's gradient with respect to one activation, at each of some values `[row ...]` of it."""
    leaf = at.detach().clone().requires_grad_()
    return torch.autograd.grad(value_with(model, metric, i, tokens, {name: leaf}).sum(), leaf)[0]


build_cached = functools.lru_cache(maxsize=1)(build_hf)


def first_reads(family, model, tokens, baseline):
    """What the first block reads when the tokens' embeddings are replaced: from Hugging Face's own `inputs_embeds`."""
    if isinstance(baseline, int):
        return activation(model, torch.full_like(tokens, baseline), INPUT)
    hf = build_cached(family, model.dtype)
    with torch.no_grad():
        table = hf.get_input_embeddings()(torch.arange(D_VOCAB))
        vector = table.mean(0) if baseline == "mean" else torch.zeros_like(table[0])
        seen = []
        first = next(m for m in hf.modules() if isinstance(m, torch.nn.ModuleList))[0]
        handle = first.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        hf(inputs_embeds=vector.expand(1, len(tokens), -1).clone())
        handle.remove()
    return seen[0]


# -- input tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_x_input_equals_the_naive_way(family):
    model, pairs = model_of(family), make_pairs(PAIRS)
    metric = whole_vocabulary(pairs)
    found = gradient_x_input(model, pairs, metric)
    assert (found.dims, found.baseline, found.unit) == (("pos", "prompt"), {}, "logits")
    assert found.provenance["runs"] == "suffix"
    rows = []
    for i, tokens in enumerate(pairs.clean.tokens):
        embedding = activation(model, tokens, INPUT)
        rows.append((embedding * slope_at(model, metric, i, tokens, INPUT, embedding)).sum(-1)[0])
    assert_same(found.values, stack_ragged(rows), tolerance_of(family))
    assert_untouched(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_integrated_gradients_equal_the_naive_way(family):
    model, pairs = model_of(family), make_pairs(PAIRS)
    metric = whole_vocabulary(pairs)
    read = [activation(model, tokens, INPUT) for tokens in pairs.clean.tokens]
    for baseline, rule in (("zero", "midpoint"), ("mean", "left"), (7, "gauss-legendre")):
        points, weights = quadrature(3, rule)
        rows, ends = [], []
        for i, (tokens, end) in enumerate(zip(pairs.clean.tokens, read, strict=True)):
            start = first_reads(family, model, tokens, baseline)
            between = torch.cat([start + a * (end - start) for a in points])
            slopes = slope_at(model, metric, i, tokens, INPUT, between)
            mean = sum(w * slope for w, slope in zip(weights, slopes, strict=True))
            rows.append(((end - start)[0] * mean).sum(-1))
            with torch.no_grad():
                ends.append(value_with(model, metric, i, tokens, {INPUT: torch.cat([end, start])}).tolist())
        expected = stack_ragged(rows)
        found = token_integrated_gradients(model, pairs, metric, baseline=baseline, steps=3, rule=rule)
        assert_same(found.values, expected, tolerance_of(family), baseline)
        actual, begin = torch.tensor(ends, dtype=torch.float64).T
        off = (expected.nansum(0) - (actual - begin)).abs().mean() / (actual - begin).abs().mean()
        close = {"rel": 1e-9 if family in ALL_FLOAT64 else 1e-2}
        assert found.provenance["completeness_error"] == pytest.approx(float(off), **close)
        assert found.provenance["metric_actual"] == pytest.approx(float(actual.mean()), **close)
        assert found.provenance["metric_baseline"] == pytest.approx(float(begin.mean()), **close)
    assert_untouched(model)


@pytest.mark.parametrize("family", ["gpt2", "falcon", "gpt_neox", "bloom", "olmo2"])
def test_token_integrated_gradients_are_complete(family):
    model, pairs = model_of(family), make_pairs()
    metric = whole_vocabulary(pairs)
    fine = token_integrated_gradients(model, pairs, metric, baseline=7, steps=300)
    coarse = token_integrated_gradients(model, pairs, metric, baseline=7, steps=5)
    assert fine.provenance["completeness_error"] < 1e-4
    assert coarse.provenance["completeness_error"] > 1e-2  # control: it is not small by itself
    kept = token_integrated_gradients(model, pairs, metric, baseline=7, steps=300, keep=[0, 3])
    assert float(kept.values[[0, 3]].abs().max()) == 0
    assert float(fine.values[[0, 3]].abs().min()) > 1e-3  # control
    assert kept.provenance["completeness_error"] < 1e-3
    assert kept.provenance["metric_baseline"] != pytest.approx(fine.provenance["metric_baseline"], rel=1e-3)


def test_the_baseline_itself_gets_nothing():
    model, pairs = make_model("llama"), make_pairs()
    tokens = int(pairs.clean.tokens[0][2])
    found = token_integrated_gradients(model, pairs, whole_vocabulary(pairs), baseline=tokens, steps=3)
    assert float(found.values[2, 0].abs()) == 0
    assert float(found.values[3, 0].abs()) > 1e-3  # control


def test_exact_on_a_linear_model():
    """There one step is enough, and each position's value is the effect of that position's token alone."""
    known = linear(0)
    model, pairs, metric = known.model, known.pairs, known.metric
    found = token_integrated_gradients(model, pairs, metric, baseline=3, steps=1)
    for i, tokens in enumerate(pairs.clean.tokens):
        with torch.no_grad():
            actual = value_of(model, metric, i, tokens)
            for pos in range(len(tokens)):
                other = tokens.clone()
                other[pos] = 3
                effect = actual - value_of(model, metric, i, other)
                assert float(found.values[pos, i]) == pytest.approx(float(effect), abs=1e-7)
    assert float(found.values.nan_to_num().abs().max()) > 0.1  # control
    assert found.provenance["completeness_error"] < 1e-7


def value_of(model, metric, i, tokens):
    logits = model(tokens[None])[:, metric.positions[i]][:, metric.tokens]
    return metric.read(logits, torch.tensor([i]), None).sum()


def test_gradient_x_input_sums_to_the_metric_of_a_linear_model():
    """With the norms' scale held fixed the model is linear in its input: the sum is the metric up to a constant."""
    known = linear(1)
    model, pairs, metric = known.model, known.pairs, known.metric
    norms = ["ln_final", *(f"blocks.{i}.{ln}" for i in range(model.n_layers) for ln in ("ln1", "ln2"))]
    handles = [model.bridge.get_submodule(norm).register_forward_hook(_fixed_scale(model)) for norm in norms]
    try:
        found = gradient_x_input(model, pairs, metric)
        assert found.provenance["runs"].startswith("full")
        for i, tokens in enumerate(pairs.clean.tokens):
            with torch.no_grad():
                actual = value_of(model, metric, i, tokens)
                zeroed = model.run_with_hooks(tokens[None], [(INPUT, lambda x, hook: x * 0)])
                constant = metric.read(zeroed[:, metric.positions[i]][:, metric.tokens], torch.tensor([i]), None).sum()
            assert float(actual - constant) == pytest.approx(float(found.values[:, i].nansum()), abs=1e-6)
            assert abs(float(actual - constant)) > 1e-2  # control
    finally:
        for handle in handles:
            handle.remove()


def _fixed_scale(model):
    """Replaces what a norm gives by the centred input: in these models its gain undoes a scale that is the same everywhere."""
    return lambda module, args, output: args[0] - args[0].mean(-1, keepdim=True)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gptj"])
def test_tokens_alone_together_and_within_any_budget(family):
    model, pairs = model_of(family), make_pairs(((7, 4), (6, 5), (7, 3), (5, 1)))
    metric = whole_vocabulary(pairs)
    tolerance = 1e-9 if family in ALL_FLOAT64 else 1e-5

    def both(prompts, m, **options):
        yield gradient_x_input(model, prompts, m, **options)
        yield token_integrated_gradients(model, prompts, m, baseline="mean", steps=4, **options)

    for together, tight in zip(both(pairs, metric), both(pairs, metric, budget=1), strict=True):
        assert_same(tight.values, together.values, tolerance)
    for i in range(len(pairs)):
        one = pairs[[i]]
        alone = mk.Metric("mixture", "logits", 1, one.positions["END"], None, metric.read)
        with model.hooks([("resid_pre", lambda x, hook: None)]):  # somebody's hooks: whole runs
            expected = list(both(one.clean, alone))
        for result, single in zip(both(pairs, metric), expected, strict=True):
            assert single.provenance["runs"].startswith("full")
            assert_same(result.values[: len(single.values), [i]], single.values, tolerance)


def test_positions_after_the_one_that_is_read_have_nothing():
    model, pairs = make_model("qwen3"), make_pairs()
    positions = dict(pairs.positions) | {"MIDDLE": torch.tensor([4, 5, 3])}
    pairs = mk.PromptPairs(pairs.clean, pairs.corrupted, pairs.right, pairs.wrong, positions)
    metric = mk.logit_diff(pairs, position="MIDDLE")
    for found in (
        gradient_x_input(model, pairs, metric),
        token_integrated_gradients(model, pairs, metric, baseline="mean", steps=2),
    ):
        assert torch.equal(found.values[5:, 0], torch.zeros(2, dtype=torch.float64))
        assert bool((found.values[:5, 0] != 0).all())  # control
        assert bool(found.values[5:, 2].isnan().all())


def test_divergence_from_the_run_itself():
    model, pairs = make_model("gpt2"), make_pairs()
    metric = mk.kl_divergence(pairs)
    found = token_integrated_gradients(model, pairs, metric, baseline=7, steps=300)
    assert found.provenance["metric_actual"] == pytest.approx(0, abs=1e-12)
    assert found.provenance["metric_baseline"] > 0.1
    assert found.provenance["completeness_error"] < 1e-3
    with pytest.raises(ValueError, match="compares with the clean run"):
        gradient_x_input(model, pairs, metric)
    with pytest.raises(ValueError, match="compares with the corrupted run"):
        token_integrated_gradients(model, pairs, mk.kl_divergence(pairs, reference="corrupted"))


def test_a_callable_sees_the_prompts_in_their_order():
    model, pairs = make_model("llama"), make_pairs(((7, 2), (7, 4), (7, 3)))
    right = torch.tensor([5, 6, 9])

    def own_answer(logits):
        return logits[torch.arange(3), -1, right]

    tokens = torch.tensor([5, 6, 9])
    metric = mk.Metric(
        "own", "", 3, pairs.positions["END"], tokens, lambda logits, prompt, _: logits.gather(1, prompt[:, None])[:, 0]
    )
    for run in (
        gradient_x_input,
        lambda *args: token_integrated_gradients(*args, baseline="mean", steps=3),
        lambda *args: neuron_attribution(*args, steps=2),
        lambda *args: neuron_attribution(*args, steps=2, path="input", baseline="mean"),
    ):
        assert_same(run(model, pairs, own_answer).values, run(model, pairs, metric).values, 1e-5)


# -- neurons ----------------------------------------------------------------------------------------------------------

OVER = {
    "mlp_post": "layer pos neuron",
    "z": "layer pos head",
    "mlp_out": "layer pos neuron",
    "resid_pre": "layer pos",
    "pattern": "layer pos head",
}


def reduced(entries, site):
    """A whole activation's entries `[1 *dims]` at `OVER`'s dims but the layer."""
    dims, over = list(SITES[site].dims), OVER[site].split()
    x = entries[0]
    kept = {"neuron" if i == len(dims) - 1 and "neuron" in over else dim: i for i, dim in enumerate(dims)}
    x = x.sum([i for dim, i in kept.items() if dim not in over]) if len(over) - 1 < x.ndim else x
    return x.T if site == "pattern" else x  # heads come before positions there


def naive_neurons(model, pairs, metric, site, layer, steps):
    name, rows = SITES[site].hook_name(layer), []
    for i, tokens in enumerate(pairs.clean.tokens):
        actual = activation(model, tokens, name)
        on_the_way = torch.cat([(k + 0.5) / steps * actual for k in range(steps)])
        slopes = slope_at(model, metric, i, tokens, name, on_the_way)
        rows.append(reduced(actual * slopes.sum(0, keepdim=True) / steps, site))
    return stack_ragged(rows)


def naive_conductance(model, family, pairs, metric, site, layer, steps, baseline):
    name, rows = SITES[site].hook_name(layer), []
    for i, tokens in enumerate(pairs.clean.tokens):
        end, start = activation(model, tokens, INPUT), first_reads(family, model, tokens, baseline)
        points = torch.arange(steps, dtype=end.dtype)[:, None, None]
        ends = torch.cat([start + a / steps * (end - start) for a in range(steps + 1)])
        reached = activation(model, tokens, name, {INPUT: ends})
        moved, middle = reached[1:] - reached[:-1], start + (points + 0.5) / steps * (end - start)
        zero = torch.zeros_like(moved).requires_grad_()
        hooks = [(INPUT, lambda x, hook, at=middle: at), (name, lambda x, hook, zero=zero: x + zero)]
        logits = model.run_with_hooks(tokens.expand(steps, -1), hooks)
        value = metric.read(logits[:, metric.positions[i]], torch.full((steps,), i), None).sum()
        total = moved * torch.autograd.grad(value, zero)[0]
        rows.append(reduced(total.sum(0, keepdim=True), site))
    return stack_ragged(rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", ["activation", "input"])
def test_neurons_equal_the_naive_way(family, path):
    model, pairs = model_of(family), make_pairs(PAIRS)
    metric, steps, layers = whole_vocabulary(pairs), 2, [1, 3] if path == "activation" else [2]
    baseline = {"baseline": "mean"} if path == "input" else {}
    for site, over in OVER.items():
        found = neuron_attribution(
            model, pairs, metric, site=site, over=over, path=path, steps=steps, layers=layers, **baseline
        )
        assert found.dims == (*over.split(), "prompt")
        assert (found.baseline, found.provenance["runs"]) == ({}, "suffix")
        for k, layer in enumerate(layers):
            if path == "activation":
                expected = naive_neurons(model, pairs, metric, site, layer, steps)
            else:
                expected = naive_conductance(model, family, pairs, metric, site, layer, steps, "mean")
            # Next to zero a norm multiplies float32's rounding of a softmax by a thousand.
            tolerance = tolerance_of(family) if family in ALL_FLOAT64 else max(tolerance_of(family), 1e-4)
            assert_same(found.values[k], expected, tolerance, (site, layer))
    assert_untouched(model)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gptj", "phi", "falcon", "bloom"])
def test_a_layers_neurons_sum_to_what_zeroing_it_takes_away(family):
    model, pairs = model_of(family), make_pairs()
    metric = whole_vocabulary(pairs)
    zeroed = mk.ablation(model, pairs.clean, metric, site="mlp_post", over="layer", mode="zero", progress=False)
    fine = neuron_attribution(model, pairs, metric, steps=150)
    assert_same(fine.values.sum(1), -zeroed.effect().values, 3e-3)
    assert fine.provenance["completeness_error"] < 3e-3
    assert len(fine.provenance["completeness_errors"]) == model.n_layers
    coarse = neuron_attribution(model, pairs, metric, steps=2)
    assert coarse.provenance["completeness_error"] > 1e-2  # control


@pytest.mark.parametrize("family", ["gpt2", "gptj", "qwen3"])
def test_conductance_of_a_cut_is_complete(family):
    """Each layer's residual stream passes all of it on; an MLP, with the stream around it, does not."""
    model, pairs = model_of(family), make_pairs()
    metric = whole_vocabulary(pairs)
    options = {"over": "layer", "path": "input", "baseline": 7, "steps": 200}
    tokens = token_integrated_gradients(model, pairs, metric, baseline=7, steps=200)
    gap = tokens.values.nansum(0)
    for site in ("resid_pre", "resid_post", *(["resid_mid"] if model.has_site("resid_mid") else [])):
        found = neuron_attribution(model, pairs, metric, site=site, **options)
        assert float((found.values - gap).abs().max()) < 5e-3 * float(gap.abs().max())
        assert found.provenance["completeness_error"] < 5e-3
    mlp = neuron_attribution(model, pairs, metric, site="mlp_out", **options)
    assert float((mlp.values - gap).abs().max()) > 0.1 * float(gap.abs().max())  # control
    first = neuron_attribution(model, pairs, metric, site="resid_pre", **{**options, "over": "layer pos"}, layers=[0])
    assert_same(first.values[0], tokens.values, 1e-4 if family == "qwen3" else 1e-8)  # the input's own conductance


def test_exact_on_a_linear_models_neurons():
    known = linear(2)
    zeroed = mk.ablation(
        known.model, known.pairs, known.metric, site="mlp_post", over="layer neuron", mode="zero", progress=False
    )
    found = neuron_attribution(known.model, known.pairs, known.metric, steps=1)
    assert_same(found.values, -zeroed.effect().values, 1e-8)
    assert found.provenance["completeness_error"] < 1e-7


@pytest.mark.parametrize("path", ["activation", "input"])
def test_a_neuron_that_writes_nothing_gets_nothing(path):
    hf = build_hf("gpt2")
    with torch.no_grad():
        hf.transformer.h[1].mlp.c_proj.weight[5] = 0
    model, pairs = mk.HookedModel.from_hf(hf, name="gpt2"), make_pairs()
    found = neuron_attribution(model, pairs, whole_vocabulary(pairs), path=path, steps=3)
    assert float(found.values[1, 5].abs().max()) == 0
    others = torch.cat([found.values[1, :5], found.values[1, 6:], found.values[2]])
    assert float(others.abs().amax(1).min()) > 1e-6  # control


def budget_of_rows(model, rows, length=5):
    """Bytes in which so many prompts of a length run at once, with all layers' neurons."""
    keys = [("mlp_post", layer) for layer in range(model.n_layers)]
    for budget in range(10_000, 100_000_000, 10_000):
        if Budget.of(model, budget).prompts_with_gradients(model, length, length, keys) == rows:
            return budget
    raise AssertionError


@pytest.mark.parametrize("path", ["activation", "input"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mixtral"])
def test_neurons_of_other_dims_and_budgets(family, path):
    model, pairs = model_of(family), make_pairs()
    metric, options = whole_vocabulary(pairs), {"path": path, "steps": 3}
    options |= {"baseline": "mean"} if path == "input" else {}
    tolerance = 1e-2 if family == "mixtral" else 1e-9 if family in ALL_FLOAT64 else 1e-4

    def values(site, over, **more):
        return neuron_attribution(model, pairs, metric, site=site, over=over, **options, **more).values

    fine = values("mlp_post", "layer pos neuron")
    assert_same(values("mlp_post", "layer neuron"), fine.nansum(1), tolerance)
    assert_same(values("mlp_post", "layer"), fine.nansum(2).nansum(1), tolerance)
    ends = torch.stack([fine[:, int(n) - 1, :, i] for i, n in enumerate(pairs.clean.lengths)], -1)
    assert_same(values("mlp_post", "layer position neuron")[:, 0], ends, tolerance)
    some = values("mlp_post", "layer pos neuron", layers=[2, 0], positions=[1, 6], neurons=[3, 30])
    assert_same(some, fine[[2, 0]][:, [1, 6]][:, :, [3, 30]], tolerance)
    for budget in (1, budget_of_rows(model, 2)):  # one point at a time, and two of the three where a prompt is alone
        assert_same(values("mlp_post", "layer pos neuron", budget=budget), fine, tolerance)
    heads = values("z", "layer head")
    assert_same(values("z", "layer head", heads=[2]), heads[:, [2]], tolerance)
    with model.hooks([("resid_pre", lambda x, hook: None)]):
        whole = neuron_attribution(model, pairs, metric, site="z", over="layer head", **options)
    assert whole.provenance["runs"].startswith("full")
    assert_same(whole.values, heads, tolerance)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "arguments", "match"),
    [
        (gradient_x_input, {"metric": mk.accuracy}, "no gradient path"),
        (
            gradient_x_input,
            {"metric": lambda pairs: lambda logits: logits[:, -1, 5].mean()},
            "one real value per prompt",
        ),
        (gradient_x_input, {"metric": lambda pairs: mk.logit_diff(pairs[[0]])}, "made for 1 prompts"),
        (gradient_x_input, {"metric": lambda pairs: lambda logits: logits[:, -1, 5] / 0}, "finite"),
        (gradient_x_input, {"budget": 0}, "budget"),
        (token_integrated_gradients, {"metric": mk.accuracy}, "no gradient path"),
        (token_integrated_gradients, {"baseline": "median"}, "baseline: expected 'zero', 'mean'"),
        (token_integrated_gradients, {"baseline": D_VOCAB}, "baseline"),
        (token_integrated_gradients, {"baseline": -1}, "baseline"),
        (token_integrated_gradients, {"baseline": 1.5}, "baseline"),
        (token_integrated_gradients, {"baseline": True}, "baseline"),
        (token_integrated_gradients, {"keep": [7]}, "keep: expected positions in 0..6"),
        (token_integrated_gradients, {"keep": [-1]}, "keep"),
        (token_integrated_gradients, {"steps": 0}, "steps"),
        (token_integrated_gradients, {"rule": "simpson"}, "rule"),
        (neuron_attribution, {"metric": mk.accuracy}, "no gradient path"),
        (neuron_attribution, {"metric": mk.accuracy, "path": "input"}, "no gradient path"),
        (neuron_attribution, {"site": "neurons"}, "site"),
        (neuron_attribution, {"site": "embed", "over": "pos"}, "inside the blocks"),
        (neuron_attribution, {"site": "attn_scores", "over": "layer head"}, "'pattern'"),
        (neuron_attribution, {"over": "neuron"}, "over"),
        (neuron_attribution, {"path": "output"}, "path"),
        (neuron_attribution, {"baseline": "mean"}, "path='input'"),
        (neuron_attribution, {"keep": [0]}, "path='input'"),
        (neuron_attribution, {"neurons": [48]}, "neuron"),
    ],
)
def test_refusals(run, arguments, match):
    model, pairs = make_model("gpt2"), make_pairs(((7, 2), (7, 4)))
    metric = arguments.pop("metric", mk.logit_diff)(pairs)
    with pytest.raises(ValueError, match=match):
        run(model, pairs, metric, **arguments)
    assert_untouched(model)


@pytest.mark.parametrize("run", [gradient_x_input, token_integrated_gradients, neuron_attribution])
def test_more_refusals(run):
    model, pairs = make_model("gpt2"), make_pairs()
    with pytest.raises(ValueError, match="one length"):
        run(model, pairs, lambda logits: logits[:, -1, 0])
    with pytest.raises(ValueError, match=r"prompts: .* was loaded without a tokenizer"):
        run(model, "text", mk.logit_diff(pairs))
    too_large = mk.Prompts.from_tokens([[3, D_VOCAB]])
    with pytest.raises(ValueError, match="token ids"):
        run(model, too_large, lambda logits: logits[:, -1, 0])
    frozen = next(model.bridge.original_model.parameters()).requires_grad_(False)
    with torch.no_grad():  # a caller's grad mode does not matter
        run(model, pairs, mk.logit_diff(pairs))
        assert not torch.is_grad_enabled()
    assert not frozen.requires_grad
    model.train()
    with pytest.raises(ValueError, match="training"):
        run(model, pairs, mk.logit_diff(pairs))


# -- captum, and the real model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "falcon"])
def test_equals_captum(family):
    captum = pytest.importorskip("captum.attr")
    model, pairs = model_of(family), make_pairs()
    metric, hf = whole_vocabulary(pairs), build_hf(family)

    def values(tokens=None, embeds=None):
        logits = hf(**({"input_ids": tokens} if embeds is None else {"inputs_embeds": embeds})).logits[:, -1]
        return metric.read(logits, torch.zeros(len(logits), dtype=torch.long), None)

    layer = captum.LayerIntegratedGradients(values, hf.get_input_embeddings())
    plain = captum.IntegratedGradients(lambda embeds: values(embeds=embeds))
    options = {"n_steps": 20, "method": "riemann_middle"}
    by_token, from_zero = [], []
    for tokens in pairs.clean.tokens:
        found = layer.attribute(tokens[None], torch.full_like(tokens, 7)[None], **options)
        by_token.append(found.sum(-1)[0].detach())
        embeds = hf.get_input_embeddings()(tokens[None]).detach()
        from_zero.append(plain.attribute(embeds, torch.zeros_like(embeds), **options).sum(-1)[0])
    for baseline, expected in ((7, by_token), ("zero", from_zero)):
        found = token_integrated_gradients(model, pairs, metric, baseline=baseline, steps=20)
        # captum's own weights are in float32
        assert_same(found.values, stack_ragged(expected), 1e-6 if family in ALL_FLOAT64 else 1e-5, baseline)


def test_conductance_near_captums():
    """captum sums along the path by another rule: both come near each other with many steps."""
    captum = pytest.importorskip("captum.attr")
    model, pairs = make_model("gpt2"), make_pairs(((7, 3), (7, 2)))
    metric, hf = whole_vocabulary(pairs), build_hf("gpt2")

    def values(embeds):
        logits = hf(inputs_embeds=embeds).logits[:, -1]
        return metric.read(logits, torch.zeros(len(logits), dtype=torch.long), None)

    conductance = captum.LayerConductance(values, hf.transformer.h[1].mlp.act)
    rows = []
    for tokens in pairs.clean.tokens:
        embeds, start = (hf.transformer.wte(t[None]).detach() for t in (tokens, torch.full_like(tokens, 7)))
        rows.append(conductance.attribute(embeds, start, n_steps=2000, method="riemann_trapezoid")[0].detach())
    found = neuron_attribution(
        model, pairs, metric, over="layer pos neuron", layers=[1], path="input", baseline=7, steps=400
    )
    assert_same(found.values[0], torch.stack(rows, -1), 5e-3)


NAMES = (("Mary", "John", "Tom"), ("Sarah", "James", "David"), ("Anna", "Peter", "Paul"), ("Alice", "Mark", "Jack"))
TEMPLATE = "When {} and {} went to the store, {} gave a drink to"


@pytest.fixture(scope="module")
def ioi(smollm2):
    clean = [TEMPLATE.format(a, b, b) for a, b, _ in NAMES]
    corrupted = [TEMPLATE.format(a, b, c) for a, b, c in NAMES]
    return mk.PromptPairs.from_text(smollm2, clean, corrupted, [(" " + a, " " + b) for a, b, _ in NAMES])


def test_smollm2_tokens_are_complete(smollm2, ioi):
    """With a baseline that the model can read. From the vocabulary's mean, or from zero, its logits jump about on the way."""
    three = ioi[[0, 1, 3]]
    found = token_integrated_gradients(smollm2, three, mk.logit_diff(three), baseline=" the")
    assert found.provenance["completeness_error"] < 0.01
    assert found.provenance["keep"] == "bos"
    assert float(found.values[0].abs().max()) == 0
    values = found.values.mean(-1)
    assert float(values[7]) == 0  # " the" itself
    assert (int(values.argmax()), int(values.argmin())) == (2, 10)  # the answer's name; the name that occurs twice


def test_smollm2_does_not_work_without_its_attention_sink(smollm2, ioi):
    one = ioi[[0]]
    found = token_integrated_gradients(smollm2, one, mk.logit_diff(one), baseline=" the", keep=(), steps=20)
    assert found.provenance["completeness_error"] > 0.1
