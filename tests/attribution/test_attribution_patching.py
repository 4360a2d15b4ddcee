"""Attribution patching against finite differences of the exact engine, on every family and site; and against itself."""

from __future__ import annotations

import pytest
import torch

import mechkit as mk
from helpers.families import FAMILIES, build_hf
from helpers.tiny import make_model, make_pairs, model_of, whole_vocabulary
from mechkit.experiment.axes import make_axes, make_grid
from mechkit.hooks import SITES

# The families that transformers computes in float64 throughout. In the others a norm or a softmax is in float32, whatever the
# model's dtype, and small steps drown in its rounding.
ALL_FLOAT64 = {"gpt2", "gpt_neox", "falcon"}


def over_of(site: str) -> str:
    dims = [dim for dim in ("layer", "pos", "head") if dim != "layer" or SITES[site].in_block]
    return " ".join(dim for dim in dims if dim == "layer" or dim in SITES[site].dims)


def directional_derivative(model, pairs, metric, site, over, step):
    """The metric's derivative along `source - base` at each node: Richardson's extrapolation of central differences, from exact
    sweeps of the activation moved a little to either side."""
    steps = (step, -step, step / 2, -step / 2)
    shape = make_axes(model, pairs.clean, pairs.positions, site, over).shape
    moved = torch.full((len(steps), *shape, len(pairs)), torch.nan, dtype=torch.float64)
    for ids in pairs.clean.by_length().values():
        some = pairs[ids]
        base, source = (model.run_with_cache(torch.stack(p.tokens), site)[1] for p in (some.corrupted, some.clean))
        keys = [(site, i) for i in range(model.n_layers)] if SITES[site].in_block else [site]
        values = {
            f"moved by {h}": {
                (site, i): (base[key] + h * (source[key] - base[key])).detach() for i, key in enumerate(keys)
            }
            for h in steps
        }
        grids = [make_grid(model, some.clean, some.positions, site, over, value=key) for key in values]
        here = mk.Metric("mixture", "", len(some), some.positions["END"], None, metric.read)
        cells = [cell for grid in grids for cell in grid.cells]
        answers = mk.sweep(model, some.corrupted, cells, here, values=values, progress=False)
        found = answers.values.reshape(len(steps), *grids[0].shape, len(ids))
        where = (slice(None), *(slice(0, n) for n in grids[0].shape))
        for k, i in enumerate(ids):
            moved[where][..., i] = found[..., k].double()
    whole, half = (moved[0] - moved[1]) / (2 * step), (moved[2] - moved[3]) / step
    return (4 * half - whole) / 3


@pytest.mark.parametrize("family", sorted(ALL_FLOAT64))
def test_every_site_equals_finite_differences(family):
    model, pairs = model_of(family), make_pairs(((7, 3), (5, 1)))
    metric = whole_vocabulary(pairs)
    sites = {site: over_of(site) for site in model.sites if site != "embed"}
    approx = mk.attribution_patching(model, pairs, metric, sites)
    for site, over in sites.items():
        expected = directional_derivative(model, pairs, metric, site, over, step=1e-3)
        found = approx[site].effect().values.double()
        assert torch.equal(found.isnan(), expected.isnan()), site
        scale = float(expected.nan_to_num().abs().max())
        assert scale > 1e-3, site  # control
        assert float((found - expected).nan_to_num().abs().max()) <= 1e-6 * scale, site


def runs_of(model, pairs):
    """Every activation of each pair's clean and corrupted run, by itself."""
    both = zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)
    names = [(site, layer) for site in model.sites if SITES[site].in_block for layer in range(model.n_layers)]
    return [[model.run_with_cache(tokens[None], names)[1] for tokens in pair] for pair in both]


def naive_effects(model, pairs, metric, site, runs):
    """One pair at a time, whole runs, each layer's activation made a leaf in a row of its own: `[layer pos (head) prompt]`."""
    effects = []
    n, names = model.n_layers, [SITES[site].hook_name(layer) for layer in range(model.n_layers)]
    head_axis, pos_axis = ("head" in SITES[site].dims), SITES[site].axis("pos")
    for i, (corrupted, (clean_run, corrupted_run)) in enumerate(zip(pairs.corrupted.tokens, runs, strict=True)):
        base, source = (torch.cat([run[name] for name in names]).detach() for run in (corrupted_run, clean_run))
        leaf = base.clone().requires_grad_()

        def of_layer(layer, leaf=leaf):
            return lambda x, hook: torch.cat([x[:layer], leaf[layer : layer + 1], x[layer + 1 :]])

        hooks = [(name, of_layer(layer)) for layer, name in enumerate(names)]
        logits = model.run_with_hooks(corrupted.expand(n, -1), hooks)
        value = metric.read(logits[:, metric.positions[i]], torch.full((n,), i), None)
        product = (source - base) * torch.autograd.grad(value.sum(), leaf)[0]
        kept = (0, pos_axis, SITES[site].axis("head")) if head_axis else (0, pos_axis)
        summed = product.sum([d for d in range(product.ndim) if d not in kept])
        if head_axis and SITES[site].axis("head") < pos_axis:
            summed = summed.transpose(1, 2)
        effects.append(summed)
    longest = max(e.shape[1] for e in effects)
    padded = [torch.cat([e, e.new_full((n, longest - e.shape[1], *e.shape[2:]), torch.nan)], 1) for e in effects]
    return torch.stack(padded, -1).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_equals_the_naive_way(family):
    model, pairs = model_of(family), make_pairs(((7, 3), (5, 1), (7, 4)))
    metric = whole_vocabulary(pairs)
    tolerance = 1e-3 if family == "mixtral" else 1e-10 if family in ALL_FLOAT64 else 1e-5
    sites = {site: over_of(site) for site in model.sites if site != "embed"}
    approx, runs = mk.attribution_patching(model, pairs, metric, sites), runs_of(model, pairs)
    for site in sites:
        assert approx[site].provenance["runs"] == "suffix"
        found = approx[site].effect().values.double()
        every = naive_effects(model, pairs, metric, site, runs)
        for layer, expected in enumerate(every):
            assert torch.equal(found[layer].isnan(), expected.isnan()), site
            scale = float(expected.nan_to_num().abs().max())
            assert scale > 1e-3 or (site == "q" and layer == 0), site  # control
            assert float((found[layer] - expected).nan_to_num().abs().max()) <= tolerance * max(scale, 1.0), site
    assert not model.has_hooks
    assert all(p.grad is None and p.requires_grad for p in model.bridge.original_model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_suffixes_batches_and_budgets_change_nothing(family):
    """Against whole runs, one pair at a time."""
    model, pairs = model_of(family), make_pairs(((7, 4), (7, 3), (6, 5), (5, 1)))
    metric = whole_vocabulary(pairs)
    sites = {"z": "layer pos head", "k": "layer pos head", "mlp_out": "layer pos", "pattern": "layer head"}
    tolerance = 1e-3 if family == "mixtral" else 1e-9 if family in ALL_FLOAT64 else 1e-5
    together = mk.attribution_patching(model, pairs, metric, sites)
    tight = mk.attribution_patching(model, pairs, metric, sites, budget=1)
    for i in range(len(pairs)):
        one = pairs[[i]]
        alone = mk.Metric("mixture", "", 1, one.positions["END"], None, metric.read)
        with model.hooks([("resid_pre", lambda x, hook: None)]):  # somebody's hooks: whole runs
            expected = mk.attribution_patching(model, one, alone, sites)
        for site, result in together.items():
            assert expected[site].provenance["runs"].startswith("full")
            a, b = result.effect().values[..., i], expected[site].effect().values[..., 0]
            a = a[:, : b.shape[1]] if "pos" in result.dims else a
            scale = max(1.0, float(b.abs().max()))
            assert float((a - b).abs().max()) <= tolerance * scale
            c = tight[site].effect().values[..., i]
            assert float((result.effect().values[..., i] - c).nan_to_num().abs().max()) <= tolerance * scale


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gptj"])
def test_dims_are_sums_of_finer_ones(family):
    model, pairs = model_of(family), make_pairs()
    metric = whole_vocabulary(pairs)

    def effect(site, over, **options):
        return mk.attribution_patching(model, pairs, metric, site, over, **options).effect().values

    fine = effect("z", "layer pos head")
    assert torch.allclose(fine.nansum(1), effect("z", "layer head"), atol=1e-6)
    assert torch.allclose(fine.nansum(2).nansum(1), effect("z", "layer"), atol=1e-6)
    assert torch.allclose(fine.movedim(0, 2), effect("z", "pos head layer"), atol=1e-6, equal_nan=True)
    ends = torch.stack([fine[:, int(n) - 1, :, i] for i, n in enumerate(pairs.clean.lengths)], -1)
    assert torch.allclose(ends, effect("z", "layer head position")[:, :, 0], atol=1e-6)
    some = effect("z", "layer pos head", layers=[2, 0], positions=[1, 6], heads=[3])
    assert torch.allclose(some, fine[[2, 0]][:, [1, 6]][:, :, [3]], atol=1e-6, equal_nan=True)
    neurons = effect("mlp_post", "layer neuron")
    assert torch.allclose(neurons.sum(1), effect("mlp_post", "layer"), atol=1e-6)


def test_noise_and_metrics():
    model, pairs = model_of("llama"), make_pairs(((7, 2), (7, 4)))
    for metric in (mk.logit_diff(pairs), mk.log_prob(pairs), mk.prob_diff(pairs), mk.kl_divergence(pairs)):
        approx = mk.attribution_patching(model, pairs, metric, "resid_mid", "layer pos")
        exact = mk.activation_patching(model, pairs, metric, "resid_mid", "layer pos", progress=False)
        for run in ("clean", "corrupted"):
            assert torch.allclose(approx.baseline[run], exact.baseline[run], atol=1e-5)
        noise = mk.attribution_patching(model, pairs, metric, "z", "layer head", direction="noise")
        assert noise.base == "clean"
    # At its own reference a divergence is 0 with gradient 0: first order sees nothing there.
    assert float(noise.effect().values.abs().max()) < 1e-9
    assert float(approx.effect().values.abs().max()) > 1e-3  # control: at the corrupted run it does

    def last_logit(logits):
        return logits[:, -1, 5] - logits[:, 3, 7]

    by_callable = mk.attribution_patching(model, pairs, last_logit, "z", "layer pos head")
    assert float(by_callable.effect().values.abs().max()) > 1e-2
    one = mk.attribution_patching(model, pairs[[1]], last_logit, "z", "layer pos head")
    assert torch.allclose(by_callable.effect().values[..., 1], one.effect().values[..., 0], atol=1e-6)


def test_the_embedding_and_an_encoder_run_whole():
    model, pairs = model_of("bloom"), make_pairs()
    metric = whole_vocabulary(pairs)
    embed = mk.attribution_patching(model, pairs, metric, "embed", "pos")
    assert embed.dims == ("pos", "prompt")
    assert embed.provenance["runs"].startswith("full")
    first = mk.attribution_patching(model, pairs, metric, "resid_pre", "layer pos", layers=[0])
    # Bloom's hook_embed comes after the norm of its embedding: nothing is between it and the first block.
    assert torch.allclose(embed.values, first.values[0], atol=1e-8, equal_nan=True)


@pytest.mark.parametrize(
    ("metric", "match"),
    [
        (mk.accuracy, "no gradient path"),
        (lambda pairs: lambda logits: logits[:, -1, 5].mean(), "one real value per prompt"),
        (lambda pairs: lambda logits: logits.detach()[:, -1, 5], "no gradient path"),
        (lambda pairs: lambda logits: 3.0, "one real value per prompt"),
        (lambda pairs: mk.logit_diff(pairs[[0]]), "made for 1 prompts"),
        (lambda pairs: 3, "callable"),
    ],
)
def test_bad_metrics(metric, match):
    model, pairs = model_of("gpt2"), make_pairs(((7, 2), (7, 4)))
    with pytest.raises((TypeError, ValueError), match=match):
        mk.attribution_patching(model, pairs, metric(pairs))
    assert not model.has_hooks
    assert all(p.requires_grad for p in model.bridge.original_model.parameters())


def test_bad_arguments():
    model, pairs = make_model("gpt2"), make_pairs()
    metric = mk.logit_diff(pairs)
    with pytest.raises(ValueError, match="direction"):
        mk.attribution_patching(model, pairs, metric, direction="up")
    with pytest.raises(ValueError, match="pairs"):
        mk.attribution_patching(model, pairs.clean, metric)
    with pytest.raises(ValueError, match="site"):
        mk.attribution_patching(model, pairs, metric, "heads")
    with pytest.raises(ValueError, match="one length"):
        mk.attribution_patching(model, pairs, lambda logits: logits[:, -1, 0])
    model.train()
    with pytest.raises(ValueError, match="training"):
        mk.attribution_patching(model, pairs, metric)


def test_parameters_that_were_frozen_stay_frozen():
    model, pairs = make_model("gpt2"), make_pairs()
    first = next(model.bridge.original_model.parameters())
    first.requires_grad_(False)
    mk.attribution_patching(model, pairs, mk.logit_diff(pairs))
    assert not first.requires_grad
    with torch.no_grad():  # a caller's grad mode does not matter
        mk.attribution_patching(model, pairs, mk.logit_diff(pairs))
        assert not torch.is_grad_enabled()


def test_inference_mode():
    model, pairs = model_of("llama"), make_pairs()
    metric = mk.logit_diff(pairs)
    expected = mk.attribution_patching(model, pairs, metric)
    dla = mk.direct_logit_attribution(model, pairs, metric)
    with torch.inference_mode():
        assert torch.equal(mk.attribution_patching(model, pairs, metric).values, expected.values)
        assert torch.equal(mk.direct_logit_attribution(model, pairs, metric).values, dla.values)
        assert torch.is_inference_mode_enabled()


def test_full_hook_names_mean_their_layer():
    model, pairs = model_of("gpt2"), make_pairs()
    metric = mk.logit_diff(pairs)
    whole = mk.attribution_patching(model, pairs, metric)
    one = mk.attribution_patching(model, pairs, metric, "blocks.2.attn.hook_z")
    assert one.coords["layer"] == (2,)
    assert torch.allclose(one.values[0], whole.values[2], atol=1e-9)
    exact = mk.activation_patching(model, pairs, metric, "blocks.2.attn.hook_z", progress=False)
    assert exact.coords["layer"] == (2,)
    with pytest.raises(ValueError, match="layers"):
        mk.attribution_patching(model, pairs, metric, "blocks.2.attn.hook_z", layers=[1])
    with pytest.raises(ValueError, match="twice"):
        mk.attribution_patching(model, pairs, metric, {"z": "layer head", "blocks.0.attn.hook_z": "layer"})
    with pytest.raises(ValueError, match="from the end"):
        mk.attribution_patching(model, pairs, metric, "z", "layer pos head", positions=[-1])
    with pytest.raises(ValueError, match="one string"):
        mk.attribution_patching(model, pairs, metric, "z", ["layer", "head"])


def test_half_precision_is_summed_in_float32():
    hf = build_hf("llama", torch.bfloat16)
    model, pairs = mk.HookedModel.from_hf(hf, name="llama"), make_pairs()
    metric = mk.logit_diff(pairs)
    by_head = mk.attribution_patching(model, pairs, metric, "z", "layer head").effect().values
    by_layer = mk.attribution_patching(model, pairs, metric, "z", "layer").effect().values
    assert torch.allclose(by_head.sum(1), by_layer, atol=1e-5 * float(by_layer.abs().max()))


def test_blocks_that_cannot_be_run_alone_fall_back():
    """Falcon's older form, whose alibi this library does not cut to a suffix."""
    from transformers import AutoConfig, AutoModelForCausalLM

    arguments = FAMILIES["falcon"][1] | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **arguments), attn_implementation="eager")
    model, pairs = mk.HookedModel.from_hf(hf.eval(), name="falcon-alibi"), make_pairs()
    metric = mk.logit_diff(pairs)
    found = mk.attribution_patching(model, pairs, metric)
    for i in range(len(pairs)):
        alone = mk.attribution_patching(model, pairs[[i]], mk.logit_diff(pairs[[i]]))
        assert torch.allclose(found.values[..., i], alone.values[..., 0], atol=1e-5)
