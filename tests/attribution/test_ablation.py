"""Ablation against means and samples worked out by hand."""

from __future__ import annotations

import pytest
import torch

import mechkit as mk
from helpers.tiny import LENGTH, make_model, make_pairs, whole_vocabulary

ONE_LENGTH = ((LENGTH, 2), (LENGTH, 4), (LENGTH, 1))


def by_hand(model, pairs, metric, layer, head, replacement):
    """The metric with head `head`'s z replaced; `replacement(i, length)` is `[pos or 1, d_head]`."""
    answers = []
    for i, tokens in enumerate(pairs.clean.tokens):

        def write(x, hook, i=i, tokens=tokens):
            x[:, :, head] = replacement(i, len(tokens))
            return x

        with torch.no_grad():
            logits = model.run_with_hooks(tokens, [(("z", layer), write)])[0, metric.positions[i]]
        answers.append(metric.read(logits[None], torch.tensor([i]), None))
    return torch.cat(answers)


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def z_of(model, prompts, layer, head):
    return [model.run_with_cache(t, ("z", layer))[1]["z", layer][0, :, head].detach() for t in prompts.tokens]


@pytest.mark.parametrize("mode", ["zero", "mean", "position_mean"])
def test_zero_and_means(model, mode):
    pairs = make_pairs()  # ragged
    metric = whole_vocabulary(pairs)
    result = mk.ablation(model, pairs, metric, mode=mode, progress=False)
    assert result.base == "clean"
    assert set(result.baseline) == {"clean"}
    for layer, head in ((0, 0), (2, 3), (3, 1)):
        z = z_of(model, pairs.clean, layer, head)
        mean = torch.cat(z).mean(0)
        at = [torch.stack([row[p] for row in z if p < len(row)]).mean(0) for p in range(LENGTH)]
        value = {
            "zero": lambda i, n: 0.0,
            "mean": lambda i, n, mean=mean: mean,
            "position_mean": lambda i, n, at=at: torch.stack(at[:n]),
        }[mode]
        expected = by_hand(model, pairs, metric, layer, head, value)
        assert torch.allclose(result.values[layer, head], expected, atol=1e-10, rtol=0)
        assert float((expected - result.baseline["clean"]).abs().max()) > 1e-3


def test_mean_over_another_reference(model):
    pairs, others = make_pairs(), make_pairs(ONE_LENGTH, seed=5)
    metric = whole_vocabulary(pairs)
    result = mk.ablation(model, pairs, metric, mode="mean", reference=others, progress=False)
    mean = torch.cat(z_of(model, others.clean, 1, 2)).mean(0)
    expected = by_hand(model, pairs, metric, 1, 2, lambda i, n: mean)
    assert torch.allclose(result.values[1, 2], expected, atol=1e-10, rtol=0)


def test_resampling_swaps_prompts_of_equal_length(model):
    pairs = make_pairs(ONE_LENGTH)
    metric = whole_vocabulary(pairs)
    result = mk.ablation(model, pairs, metric, mode="resample", seed=3, progress=False)
    z = z_of(model, pairs.clean, 2, 1)
    options = torch.stack([by_hand(model, pairs, metric, 2, 1, lambda i, n, s=s: z[(i + s) % 3]) for s in (1, 2)])
    matches = (options - result.values[2, 1]).abs() < 1e-10
    assert bool(matches.any(0).all())  # every prompt met one of the other two
    again = mk.ablation(model, pairs, metric, mode="resample", seed=3, progress=False)
    assert torch.equal(result.values, again.values)
    with pytest.raises(ValueError, match="nobody to swap with"):
        mk.ablation(
            model, make_pairs(((7, 2), (5, 1))), whole_vocabulary(make_pairs(((7, 2), (5, 1)))), mode="resample"
        )


def test_resampling_from_the_corrupted_prompts_is_noising(model):
    pairs = make_pairs()
    metric = whole_vocabulary(pairs)
    ablated = mk.ablation(model, pairs, metric, mode="resample", reference=pairs.corrupted, progress=False)
    noised = mk.activation_patching(model, pairs, metric, direction="noise", progress=False)
    assert torch.equal(ablated.values, noised.values)


def test_named_positions_and_neurons(model):
    pairs = make_pairs()
    metric = whole_vocabulary(pairs)
    at_end = mk.ablation(model, pairs, metric, site="mlp_out", over="layer position", mode="zero", progress=False)
    by_pos = mk.ablation(model, pairs, metric, site="mlp_out", over="layer pos", mode="zero", progress=False)
    assert at_end.coords["position"] == ("END",)
    for i, tokens in enumerate(pairs.clean.tokens):
        assert torch.allclose(at_end.values[:, 0, i], by_pos.values[:, len(tokens) - 1, i], atol=1e-11)
    one = mk.ablation(
        model, pairs, metric, site="mlp_post", over="layer neuron", layers=[1], neurons=[4], mode="zero", progress=False
    )

    def silence(x, hook):
        x[:, :, 4] = 0
        return x

    for i, tokens in enumerate(pairs.clean.tokens):
        with torch.no_grad():
            logits = model.run_with_hooks(tokens, [(("mlp_post", 1), silence)])[:, -1]
        assert torch.allclose(one.values[0, 0, i], metric.read(logits, torch.tensor([i]), None)[0], atol=1e-10)


def test_refuses_what_has_no_meaning(model):
    pairs = make_pairs()
    metric = whole_vocabulary(pairs)
    with pytest.raises(ValueError, match="mode: expected one of"):
        mk.ablation(model, pairs, metric, mode="delete")
    with pytest.raises(ValueError, match="one value for each source position"):
        mk.ablation(model, pairs, metric, site="pattern", mode="mean")
    with pytest.raises(ValueError, match="reference: expected prompts of at least 7 tokens"):
        mk.ablation(model, pairs, metric, mode="position_mean", reference=make_pairs(((5, 1),)))
    with pytest.raises(ValueError, match="a zero score is not zero attention"):
        mk.ablation(model, pairs, metric, site="attn_scores", mode="zero")
    with pytest.raises(ValueError, match="source: expected 3 prompts, one for each base prompt; got 1"):
        mk.ablation(model, pairs, metric, mode="resample", reference=pairs.clean[[0]])
    with pytest.raises(ValueError, match=r"prompts\[0\]: expected a string, got int 1"):
        mk.ablation(model, [1, 2], metric)
