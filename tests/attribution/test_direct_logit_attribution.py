"""Direct logit attribution: its terms sum to the metric on every family, and equal what ablating a term by hand says."""

from __future__ import annotations

import pytest
import torch

import mechkit as mk
from helpers.families import D_VOCAB, FAMILIES, build_hf
from helpers.tiny import make_model, make_pairs, model_of, whole_vocabulary


def clean_metric(model, pairs, metric):
    """The metric of the clean run, by the model's own logits."""
    values = []
    for i, tokens in enumerate(pairs.clean.tokens):
        with torch.no_grad():
            logits = model(tokens[None])[0, metric.positions[i]][None]
        rows = logits if metric.tokens is None else logits[:, metric.tokens]
        values.append(metric.read(rows, torch.tensor([i]), None)[0])
    return torch.stack(values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_terms_sum_to_the_metric(family, dtype):
    if family == "mixtral":
        dtype = torch.float32
    model, pairs = model_of(family, dtype), make_pairs()
    # transformers' RMSNorm computes in float32 whatever the model's dtype.
    tolerance = 1e-5 if dtype == torch.float64 else 1e-4
    for metric in (mk.logit_diff(pairs), whole_vocabulary(pairs)):
        dla = mk.direct_logit_attribution(model, pairs, metric)
        expected = clean_metric(model, pairs, metric)
        scale = float(expected.abs().max().clamp(min=1))
        assert float((dla.values.sum(0) - expected).abs().max()) <= tolerance * scale
        assert dla.provenance["residual_error"] <= tolerance * scale
        assert float(dla.values.abs().max()) > 0.01 * scale  # control: there is something to sum
        cumulative = mk.direct_logit_attribution(model, pairs, metric, over="cumulative")
        assert torch.allclose(cumulative.values[-1].double(), expected.double(), atol=tolerance * scale)
        assert torch.allclose(
            cumulative.values[-1] - cumulative.values[-2], dla.sel(component="bias").values, atol=1e-4
        )
        heads = mk.direct_logit_attribution(model, pairs, metric, over="layer head")
        src = mk.direct_logit_attribution(model, pairs, metric, over="layer head src")
        assert torch.allclose(src.values.nansum(2), heads.values, atol=tolerance * scale)
        assert torch.equal(src.values[0, 0].isnan(), torch.arange(7)[:, None] >= pairs.clean.lengths)
        named = mk.direct_logit_attribution(model, pairs, metric, over="layer head position")
        last = torch.stack([src.values[..., int(n) - 1, i] for i, n in enumerate(pairs.clean.lengths)], -1)
        assert torch.allclose(named.sel(position="END").values, last, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_and_a_neuron_are_what_they_add_to_the_stream(family):
    """The naive way: take the head's own write out of the final residual stream, and let a frozen final norm read it."""
    model, pairs = model_of(family), make_pairs()
    metric = mk.logit_diff(pairs)
    layer, tokens = 2, pairs.clean.tokens[0][None]
    _, cache = model.run_with_cache(tokens, lambda name: True)
    final = cache["resid_post", 3][0, -1].detach()
    norm = model.bridge.ln_final
    block = model.bridge.blocks[layer]

    def frozen(x):  # the final norm with its scale as in this run, without its bias
        centred, mean = final - final.mean(), x - x.mean()
        of_zero = norm(torch.zeros_like(final)[None])[0]
        rms = not torch.allclose(norm(torch.ones_like(final)[None])[0], of_zero, atol=1e-2)
        full, part = (final, x) if rms else (centred, mean)
        return (norm(final[None])[0] - of_zero) / full * part

    def frozen_post(module, whole, part):  # the same for a block's norm on its own output: RMS norms all of them
        return part if module is None else module(whole[None])[0] / whole * part

    def logit_difference(written):
        logits = frozen(written) @ model.W_U
        cap = getattr(model.bridge.original_model.config, "final_logit_softcapping", None)
        if cap:
            raw = norm(final[None])[0] @ model.W_U
            logits = logits * cap * torch.tanh(raw / cap) / raw
        return float((logits[5] - logits[7]).detach())

    heads = mk.direct_logit_attribution(model, pairs, metric, over="layer head", layers=[layer])
    for head in range(model.n_heads):
        write = cache["z", layer][0, -1, head] @ model.W_O[layer, head]
        post = getattr(block, "ln1_post", None)
        raw = None if post is None else cache[f"blocks.{layer}.ln1_post.hook_in"][0, -1]
        expected = logit_difference(frozen_post(post, raw, write))
        assert float(heads.values[0, head, 0]) == pytest.approx(expected, abs=1e-5)
    if family == "mixtral":
        with pytest.raises(ValueError, match="neurons"):
            mk.direct_logit_attribution(model, pairs, metric, over="layer neuron")
        return
    neurons = mk.direct_logit_attribution(model, pairs, metric, over="layer neuron", layers=[layer], neurons=[0, 5, 11])
    assert neurons.shape == (1, 3, 3)
    for i, neuron in enumerate((0, 5, 11)):
        write = cache["mlp_post", layer].reshape(1, 7, -1)[0, -1, neuron] * block.mlp.W_out[neuron]
        post = getattr(block, "ln2_post", None)
        raw = None if post is None else cache[f"blocks.{layer}.ln2_post.hook_in"][0, -1]
        expected = logit_difference(frozen_post(post, raw, write))
        assert float(neurons.values[0, i, 0]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["gpt2", "llama_mqa", "gemma2", "qwen3", "gptj"])
def test_half_precision(family, dtype):
    model, pairs = model_of(family, dtype), make_pairs()
    metric = mk.logit_diff(pairs)
    dla = mk.direct_logit_attribution(model, pairs, metric)
    exact = mk.direct_logit_attribution(model_of(family, torch.float32), pairs, metric)
    size = float(exact.values.abs().max())
    assert dla.provenance["residual_error"] <= 0.1 * size
    assert float((dla.values - exact.values).abs().max()) <= 0.25 * size


def test_a_metric_that_is_linear_at_most_points_only():
    model = model_of("gpt2")
    for seed in range(8):
        pairs = make_pairs(seed=seed)
        for read in (lambda x, p, _: x.amax(-1), lambda x, p, _: x.abs().sum(-1)):
            metric = mk.Metric("bent", "", 3, pairs.positions["END"], torch.tensor([5, 6, 7]), read)
            with pytest.raises(ValueError, match="linear"):
                mk.direct_logit_attribution(model, pairs, metric)


def test_soft_capped_logits_are_decomposed_exactly():
    """Gemma 2 with a cap that bites: the terms sum to the difference of the capped logits."""
    hf = build_hf("gemma2")
    hf.config.final_logit_softcapping = 2.0
    model, pairs = mk.HookedModel.from_hf(hf, name="gemma2"), make_pairs()
    metric = mk.logit_diff(pairs)
    expected = clean_metric(model, pairs, metric)
    with torch.no_grad():
        assert float(model(pairs.clean.tokens[0][None]).abs().max()) > 1.9  # control: it does bite
    dla = mk.direct_logit_attribution(model, pairs, metric)
    assert torch.allclose(dla.values.sum(0), expected, atol=1e-5)


def test_tokens_and_directions():
    model, pairs = model_of("gpt2"), make_pairs()
    logit = mk.direct_logit_attribution(model, pairs, 5)
    with torch.no_grad():
        expected = torch.stack([model(tokens[None])[0, -1, 5] for tokens in pairs.clean.tokens])
    assert torch.allclose(logit.values.sum(0), expected, atol=1e-8)
    each = mk.direct_logit_attribution(model, pairs.clean, [5, 6, 7])
    assert torch.allclose(each.values[:, 0], logit.values[:, 0])
    direction = mk.direct_logit_attribution(model, pairs, model.W_U[:, 5].detach())
    bias = float(model.b_U[5].detach())
    assert torch.allclose(direction.values.sum(0) + bias, expected, atol=1e-8)
    assert torch.allclose(direction.values[:-1], logit.values[:-1], atol=1e-8)
    difference = mk.direct_logit_attribution(model, pairs, mk.logit_diff(pairs))
    seven = mk.direct_logit_attribution(model, pairs, 7)
    assert torch.allclose(difference.values, logit.values - seven.values, atol=1e-8)


def test_another_position():
    model, pairs = model_of("llama"), make_pairs()
    positions = dict(pairs.positions) | {"MIDDLE": torch.tensor([4, 5, 3])}
    pairs = mk.PromptPairs(pairs.clean, pairs.corrupted, pairs.right, pairs.wrong, positions)
    metric = mk.logit_diff(pairs, position="MIDDLE")
    src = mk.direct_logit_attribution(model, pairs, metric, over="layer head src")
    assert torch.allclose(
        mk.direct_logit_attribution(model, pairs, metric).values.sum(0), clean_metric(model, pairs, metric), atol=1e-5
    )
    assert float(src.values[:, :, 5:, 0].abs().max()) == 0  # nothing comes from after the position that is read
    assert float(src.values[:, :, :5, 0].abs().max()) > 0.01


def test_a_small_budget_changes_nothing():
    model, pairs = model_of("gpt_neox"), make_pairs()
    metric = mk.logit_diff(pairs)
    for over in ("component", "layer head src"):
        whole = mk.direct_logit_attribution(model, pairs, metric, over=over)
        one_by_one = mk.direct_logit_attribution(model, pairs, metric, over=over, budget=1)
        assert torch.allclose(whole.values, one_by_one.values, atol=1e-12, equal_nan=True)


def test_selections():
    model, pairs = model_of("gpt2"), make_pairs()
    metric = mk.logit_diff(pairs)
    whole = mk.direct_logit_attribution(model, pairs, metric, over="layer head src")
    some = mk.direct_logit_attribution(
        model, pairs, metric, over="layer head src", layers=[3, 1], heads=[2], positions=[0, 5]
    )
    assert some.coords["layer"] == (3, 1)
    assert torch.equal(some.values.isnan(), whole.values[[3, 1]][:, [2]][:, :, [0, 5]].isnan())
    assert torch.allclose(some.values, whole.values[[3, 1]][:, [2]][:, :, [0, 5]], equal_nan=True)


def reading(positions: torch.Tensor, tokens: torch.Tensor | None) -> mk.Metric:
    """A sum of logits, read where one says."""
    return mk.Metric("sum", "logits", len(positions), positions, tokens, lambda logits, *_: logits.sum(-1))


@pytest.mark.parametrize(
    ("metric", "match"),
    [
        (mk.log_prob, "linear"),
        (mk.prob_diff, "linear"),
        (mk.accuracy, "no gradient"),
        (mk.kl_divergence, "linear"),
        (lambda pairs: lambda logits: logits[:, -1, 0], "callable"),
        (lambda pairs: torch.zeros(5), "d_model"),
        (lambda pairs: [5, 6], "one for each of 3 prompts"),
        (lambda pairs: D_VOCAB, "token ids"),
        (lambda pairs: mk.logit_diff(pairs[[0, 1]]), "made for 2"),
        (lambda pairs: reading(torch.full((3,), 6), None), "positions within the prompts"),  # the third has 5 tokens
        (lambda pairs: reading(pairs.clean.lengths - 1, torch.tensor([D_VOCAB])), "answer tokens in"),
    ],
)
def test_metrics_that_cannot_be_split_are_refused(metric, match):
    model, pairs = model_of("gpt2"), make_pairs()
    with pytest.raises(ValueError, match=match):
        mk.direct_logit_attribution(model, pairs, metric(pairs))
    assert not model.has_hooks


def test_bad_arguments():
    model, pairs = make_model("gpt2"), make_pairs()
    metric = mk.logit_diff(pairs)
    for arguments, match in (
        ({"over": "layer"}, "over"),
        ({"over": "component", "heads": [0]}, "heads"),
        ({"over": "layer head", "layers": [9]}, "layers"),
        ({"over": "layer head position", "positions": ["IO"]}, "positions"),
    ):
        with pytest.raises(ValueError, match=match):
            mk.direct_logit_attribution(model, pairs, metric, **arguments)
    model.train()
    with pytest.raises(ValueError, match="training"):
        mk.direct_logit_attribution(model, pairs, metric)


def test_a_model_that_does_not_add_up_is_refused():
    """A block that scales the residual stream: the sum of its parts is not the whole."""
    model, pairs = model_of("llama"), make_pairs()
    handle = model.bridge.blocks[1].register_forward_hook(
        lambda module, args, output: (output[0] * 1.1, *output[1:]) if isinstance(output, tuple) else output * 1.1
    )
    try:
        with pytest.raises(ValueError, match="residual stream is not the sum"):
            mk.direct_logit_attribution(model, pairs, mk.logit_diff(pairs))
    finally:
        handle.remove()


def test_smollm2(smollm2):
    pairs = mk.tasks.ioi(smollm2, n=4, seed=0)
    metric = mk.logit_diff(pairs)
    dla = mk.direct_logit_attribution(smollm2, pairs, metric)
    with torch.no_grad():
        logits = [smollm2(tokens[None])[0, -1] for tokens in pairs.clean.tokens]
    expected = clean_metric(smollm2, pairs, metric)
    scale = float(torch.stack(logits).abs().max())
    assert float((dla.values.sum(0) - expected).abs().max()) <= 1e-4 * scale
    heads = mk.direct_logit_attribution(smollm2, pairs, metric, over="layer head position")
    assert heads.dims == ("layer", "head", "position", "prompt")
    best = heads.mean("prompt").top(1)[0].coords
    assert (best["layer"], best["head"]) == (23, 3)  # the head that activation patching finds
