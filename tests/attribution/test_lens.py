"""The logit lens against the naive way: the last layer's output overwritten with an earlier one's, and the model run on."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mechkit as mk
from helpers.families import D_VOCAB, FAMILIES, build_hf
from helpers.tiny import make_model, make_pairs, model_of
from mechkit.attribution.direct_logit_attribution import direct_logit_attribution
from mechkit.attribution.logit_lens import logit_lens, top_tokens
from mechkit.hooks import SITES

RESIDUAL = ("embed", "resid_pre", "resid_mid", "resid_post")
COMPONENTS = ("attn_out", "mlp_out", "result")
EVERY = list(range(D_VOCAB))


def bound(family: str) -> float:
    return 1e-4 if family == "mixtral" else 1e-10  # its kernels have no float64


def naive_logits(model: mk.HookedModel, tokens: torch.Tensor, name: str) -> torch.Tensor:
    """`[pos d_vocab]`: the model with its last layer's output replaced by the activation called `name`."""
    bridge, last = model.bridge, f"blocks.{model.n_layers - 1}.hook_resid_post"
    with torch.no_grad():
        activation = bridge.run_with_cache(tokens[None])[1][name].clone()
        return bridge.run_with_hooks(tokens[None], fwd_hooks=[(last, lambda x, hook: activation)])[0]


def naive_contribution(model: mk.HookedModel, tokens: torch.Tensor, layer: int, site: str) -> torch.Tensor:
    """`[(head) pos d_vocab]` a component's direct contribution, written out by hand from the weights."""
    hf = model.bridge.original_model
    with torch.no_grad():
        cache = model.bridge.run_with_cache(tokens[None])[1]
        where = f"blocks.{layer}."
        written = cache[where + f"hook_{site}"][0] if site != "result" else None
        if written is None:
            z = cache[where + "attn.hook_z"][0]
            written = torch.einsum("phd,hdm->hpm", z, model.bridge.blocks[layer].attn.W_O)
            if hasattr(model.bridge.blocks[layer], "ln1_post"):
                norm = model.bridge.blocks[layer].ln1_post.original_component
                inside = cache[where + "ln1_post.hook_in"][0]
                written = frozen(norm, written, inside)
        final = cache[f"blocks.{model.n_layers - 1}.hook_resid_post"][0]
        norm = model.bridge.ln_final.original_component
        unembedding = hf.get_output_embeddings().weight
        logits = frozen(norm, written, final) @ unembedding.T
        if cap := getattr(hf.config, "final_logit_softcapping", None):
            raw = norm(final) @ unembedding.T
            logits = logits * (cap * torch.tanh(raw / cap) / raw)
    return logits


def frozen(norm: torch.nn.Module, written: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
    if isinstance(norm, torch.nn.LayerNorm):
        std = (x.var(-1, unbiased=False, keepdim=True) + epsilon).sqrt()
        return (written - written.mean(-1, keepdim=True)) / std * norm.weight
    gain = 1 + norm.weight if "Gemma" in type(norm).__name__ else norm.weight
    return written / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * gain


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    assert float((found.double() - expected.double()).nan_to_num().abs().max()) <= tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_sites_equal_a_model_that_ends_there(family):
    model, prompts = model_of(family), make_pairs().clean
    for site in RESIDUAL:
        if not model.has_site(site):
            continue
        over = "layer pos" if SITES[site].in_block else "pos"
        result = logit_lens(model, prompts, EVERY, site=site, over=over, progress=False)
        assert result.dims == (*over.split(), "token", "prompt")
        for j, tokens in enumerate(prompts.tokens):
            layers = range(model.n_layers) if SITES[site].in_block else [None]
            expected = torch.stack([naive_logits(model, tokens, SITES[site].hook_name(layer)) for layer in layers])
            found = result.values[..., j].reshape(len(expected), -1, D_VOCAB)
            close(found[:, : len(tokens)], expected, bound(family))
            assert bool(found[:, len(tokens) :].isnan().all())
            assert site == "embed" or float((expected[0] - expected[-1]).abs().max()) > 1e-2  # layers differ


@pytest.mark.parametrize("family", FAMILIES)
def test_last_layer_is_the_model(family):
    model, prompts = model_of(family), make_pairs().clean
    for value, of_logits in (("logit", lambda x: x), ("log_prob", lambda x: x.log_softmax(-1))):
        result = logit_lens(model, prompts, EVERY, value=value, layers=[-1], progress=False)
        for j, tokens in enumerate(prompts.tokens):
            expected = of_logits(model(tokens[None])[0].detach())
            close(result.values[0, : len(tokens), :, j], expected, bound(family))
    assert float(logit_lens(model, prompts, value="kl", layers=[-1], progress=False).values.nan_to_num().max()) == 0
    assert float(logit_lens(model, prompts, value="kl", layers=[0], progress=False).values.nanmean()) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_components_are_their_direct_contribution(family):
    model, prompts = model_of(family), make_pairs().clean
    for site in COMPONENTS:
        over = "layer head pos" if site == "result" else "layer pos"
        result = logit_lens(model, prompts, EVERY, site=site, over=over, progress=False)
        for j, tokens in enumerate(prompts.tokens):
            for layer in range(model.n_layers):
                expected = naive_contribution(model, tokens, layer, site)
                found = result.values[layer, ..., : len(tokens), :, j]
                # transformers computes RMS norms in float32 whatever the model's dtype; LayerNorm in the model's own
                layer_norm = isinstance(model.bridge.ln_final.original_component, torch.nn.LayerNorm)
                close(found, expected, 1e-10 if layer_norm else max(bound(family), 3e-6))
                assert float(expected.abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "gptj"])
def test_components_agree_with_direct_logit_attribution(family):
    model, pairs = model_of(family), make_pairs()
    dla = direct_logit_attribution(model, pairs, mk.logit_diff(pairs), over="component")
    for site, kind in (("attn_out", "attn"), ("mlp_out", "mlp")):
        lens = logit_lens(model, pairs, site=site, over="layer", progress=False)
        difference = lens.sel(token="right").values - lens.sel(token="wrong").values
        for layer in range(model.n_layers):
            close(difference[layer], dla.sel(component=f"L{layer} {kind}").values, 1e-10)
    heads = direct_logit_attribution(model, pairs, mk.logit_diff(pairs), over="layer head")
    lens = logit_lens(model, pairs, site="result", over="layer head", progress=False)
    close(lens.sel(token="right").values - lens.sel(token="wrong").values, heads.values, 1e-10)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_every_value(family):
    model, prompts = model_of(family), make_pairs().clean
    chosen = [5, 7, 60]
    found = {
        v: logit_lens(model, prompts, chosen, value=v, progress=False).values for v in ("log_prob", "prob", "rank")
    }
    found |= {v: logit_lens(model, prompts, value=v, progress=False).values for v in ("entropy", "kl")}
    for j, tokens in enumerate(prompts.tokens):
        n = len(tokens)
        final = model(tokens[None])[0].detach().log_softmax(-1)
        for layer in range(model.n_layers):
            logits = naive_logits(model, tokens, f"blocks.{layer}.hook_resid_post")
            log_q = logits.log_softmax(-1)
            close(found["log_prob"][layer, :n, :, j], log_q[:, chosen], 1e-10)
            close(found["prob"][layer, :n, :, j], log_q[:, chosen].exp(), 1e-10)
            order = logits.argsort(-1, descending=True).tolist()
            ranks = torch.tensor([[row.index(t) for t in chosen] for row in order])
            assert torch.equal(found["rank"][layer, :n, :, j].long(), ranks)
            close(found["entropy"][layer, :n, j], torch.distributions.Categorical(logits=logits).entropy(), 1e-10)
            kl = torch.nn.functional.kl_div(log_q, final, log_target=True, reduction="none").sum(-1)
            close(found["kl"][layer, :n, j], kl, 1e-10)
    assert float(found["kl"].nan_to_num().min()) >= 0


def test_tied_tokens_share_the_best_rank():
    model = make_model("llama")
    with torch.no_grad():
        weight = model.bridge.unembed.original_component.weight
        weight[9] = weight[5]
    result = logit_lens(model, make_pairs().clean, [5, 9], value="rank", progress=False)
    assert torch.equal(result.values[..., 0, :].nan_to_num(-1), result.values[..., 1, :].nan_to_num(-1))
    order = logit_lens(model, make_pairs().clean, EVERY, progress=False).values
    higher = (order > order[:, :, 5:6]).sum(2).double().masked_fill(order[:, :, 5].isnan(), torch.nan)
    close(result.values[..., 0, :], higher, 0)


def test_ways_to_name_tokens():
    model, pairs = model_of("llama"), make_pairs()
    every = logit_lens(model, pairs, EVERY, progress=False).values
    default = logit_lens(model, pairs, progress=False)
    assert default.coords["token"] == ("right", "wrong")
    close(default.values, every[:, :, [5, 7]], 1e-12)
    mapped = logit_lens(model, pairs.clean, {"a": [5, 6, 7], "b": [0, 1, 2]}, progress=False)
    for j in range(3):
        close(mapped.values[..., j], every[:, :, [5 + j, j], j], 1e-12)
    following = logit_lens(model, pairs.clean, "next", value="log_prob", progress=False)
    for j, tokens in enumerate(pairs.clean.tokens):
        log_probs = every[:, : len(tokens), :, j].log_softmax(-1)
        expected = torch.stack([log_probs[:, p, tokens[p + 1]] for p in range(len(tokens) - 1)], 1)
        close(following.values[:, : len(tokens) - 1, 0, j], expected, 1e-10)
        assert bool(following.values[:, len(tokens) - 1 :, 0, j].isnan().all())
    logits = logit_lens(model, pairs.clean, "next", progress=False)
    close(logits.values.isnan(), following.values.isnan(), 0)


def test_dims_positions_and_restrictions():
    model, pairs = model_of("gemma2"), make_pairs()
    pairs = mk.PromptPairs(pairs.clean, pairs.corrupted, pairs.right, pairs.wrong, {"MID": torch.tensor([4, 5, 3])})
    whole = logit_lens(model, pairs, [3, 4], progress=False)
    turned = logit_lens(model, pairs, [3, 4], over="pos layer", progress=False)
    close(turned.values, whole.values.transpose(0, 1), 0)
    part = logit_lens(model, pairs, [3, 4], layers=[2, 0], positions=[1, 6], progress=False)
    close(part.values, whole.values[[2, 0]][:, [1, 6]], 1e-12)
    assert part.coords["layer"] == (2, 0)
    assert part.coords["pos"] == (1, 6)
    named = logit_lens(model, pairs, [3, 4], over="layer position", progress=False)
    assert named.coords["position"] == ("MID", "END")
    for j, (mid, end) in enumerate(((4, 6), (5, 6), (3, 4))):
        close(named.values[..., j], whole.values[:, [mid, end], :, j], 1e-12)
    last = logit_lens(model, pairs, [3, 4], over="layer", progress=False)
    close(last.values, named.sel(position="END").values, 1e-12)
    heads = logit_lens(model, pairs, [3, 4], site="result", over="head pos layer", heads=[3, 1], progress=False)
    all_heads = logit_lens(model, pairs, [3, 4], site="result", over="layer head pos", progress=False)
    close(heads.values, all_heads.values[:, [3, 1]].permute(1, 2, 0, 3, 4), 1e-12)


def test_result_is_labelled():
    model, pairs = model_of("qwen3"), make_pairs()
    result = logit_lens(model, pairs, value="prob", over="layer", progress=False)
    assert (result.metric, result.unit, dict(result.baseline)) == ("prob", "probability", {})
    assert result.provenance["technique"] == "logit_lens"
    assert result.provenance["weights_hash"] == model.weights_hash
    assert (result.provenance["site"], result.provenance["over"]) == ("resid_post", "layer")
    assert result.provenance["lens"] == "logit lens"
    assert result.cost.block_tokens == int(pairs.clean.lengths.sum()) * model.n_layers
    assert logit_lens(model, pairs, value="kl", progress=False).dims == ("layer", "pos", "prompt")


@pytest.mark.parametrize(("site", "over"), [("resid_post", "layer pos"), ("result", "layer head pos")])
def test_any_budget_gives_the_same(site, over):
    model, prompts = model_of("olmo2"), make_pairs().clean
    for value, tokens in (("kl", None), ("logit", [4, 9]), ("rank", [4]), ("log_prob", "next")):
        found = [
            logit_lens(model, prompts, tokens, value=value, site=site, over=over, budget=budget, progress=False)
            for budget in (None, 1, 20_000)
        ]
        close(found[1].values, found[0].values, 1e-10)
        close(found[2].values, found[0].values, 1e-10)


def test_top_tokens():
    model, prompts = model_of("falcon"), make_pairs().clean
    found = top_tokens(model, prompts, k=4, progress=False)
    assert found.probs.dims == ("layer", "pos", "k", "prompt")
    assert found.ids.shape == found.strings.shape == found.probs.values.shape
    for j, tokens in enumerate(prompts.tokens):
        for layer in range(model.n_layers):
            probs = naive_logits(model, tokens, f"blocks.{layer}.hook_resid_post").softmax(-1)
            expected = probs.sort(-1, descending=True)
            close(found.probs.values[layer, : len(tokens), :, j], expected.values[:, :4], 1e-10)
            assert torch.equal(found.ids[layer, : len(tokens), :, j], expected.indices[:, :4])
    assert bool((found.ids[:, 5:, :, 2] == -1).all())
    assert set(found.strings[:, 5:, :, 2].flatten()) == {""}
    assert found.strings[0, 0, 0, 0] == str(int(found.ids[0, 0, 0, 0]))  # no tokenizer: the id


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor made inside had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("value", ["logit", "entropy", "kl"])
def test_all_logits_are_never_held(value, monkeypatch):
    """2,000 positions of a vocabulary of 128,000 would be 256 million logits; a budget of 64 MiB allows 16 million numbers."""
    monkeypatch.setitem(FAMILIES, "wide", ("gpt2", dict(FAMILIES["gpt2"][1])))
    FAMILIES["wide"][1].update(vocab_size=128_000, n_positions=2000, n_layer=2, n_embd=8, n_head=1, n_inner=8)
    model = mk.HookedModel.from_hf(build_hf("wide", torch.float32), name="wide")
    tokens = torch.randint(128_000, (2000,), generator=torch.Generator().manual_seed(0))
    prompts = mk.Prompts.from_tokens([tokens])
    budget = 2**26
    with Largest() as largest:
        wanted = [5, 7] if value == "logit" else None
        positions = None if value == "logit" else list(range(0, 2000, 10))  # to save time; control below
        found = logit_lens(model, prompts, wanted, value=value, positions=positions, budget=budget, progress=False)
    assert not bool(found.values.isnan().any())
    assert largest.elements <= max(budget // 4, 2000 * 2000)  # attention patterns are 2000 x 2000
    with Largest() as all_at_once, torch.no_grad():
        model(tokens[None, :200])
    assert all_at_once.elements >= 200 * 128_000 > largest.elements  # control: the same positions' logits would show


def test_refusals_leave_no_hook():
    model, pairs = make_model("llama"), make_pairs()
    prompts = pairs.clean
    bad = [
        ({"tokens": None}, "about single tokens"),
        ({"tokens": [5], "value": "kl"}, "whole distribution"),
        ({"tokens": [5], "value": "odds"}, "value: expected one of"),
        ({"tokens": [5, 5]}, "each once"),
        ({"tokens": []}, "at least one"),
        ({"tokens": [D_VOCAB]}, "ids in 0"),
        ({"tokens": "after"}, "Write"),
        ({"tokens": "next", "over": "layer"}, "'next' is unknown"),
        ({"tokens": {"a": [5, 6]}}, "for each of 3 prompts"),
        ({"tokens": [5], "site": "z", "over": "layer head pos"}, "site: expected one of embed"),
        ({"tokens": [5], "site": "result"}, "'head'"),
        ({"tokens": [5], "over": "layer neuron"}, "no 'neuron'"),
        ({"tokens": [5], "over": "pos"}, "in every layer"),
        ({"tokens": [5], "budget": 0}, "budget"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            logit_lens(model, prompts, progress=False, **arguments)
    for k in (0, D_VOCAB + 1, True):
        with pytest.raises(ValueError, match="k: expected"):
            top_tokens(model, prompts, k, progress=False)
    outside = mk.Prompts((torch.tensor([D_VOCAB]),))
    with pytest.raises(ValueError, match="token ids"):
        logit_lens(model, outside, [5], progress=False)
    model.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        logit_lens(model, prompts, [5], progress=False)
    model.eval()
    with torch.no_grad():
        model.bridge.blocks[1].mlp.original_component.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        logit_lens(model, prompts, [5], progress=False)
    assert not model.has_hooks


def test_a_model_whose_logits_are_something_else_is_refused():
    """A hook that mixes positions stands for an architecture whose logits are no function of the last block's output alone."""
    model, pairs = model_of("llama"), make_pairs()
    handle = model.bridge.unembed.register_forward_hook(lambda module, args, logits: logits + torch.rand(logits.shape))
    with pytest.raises(ValueError, match="is not a function of the last block's output at the same position alone"):
        logit_lens(model, pairs, progress=False)
    handle.remove()
    logit_lens(model, pairs, progress=False)


def test_components_that_do_not_add_up_are_refused():
    """A block that multiplies its MLP's output before adding it, unlike what TransformerLens knows of its architecture."""
    model, pairs = make_model("llama"), make_pairs()
    logit_lens(model, pairs, site="attn_out", over="layer", progress=False)
    model.bridge.blocks[1].mlp.register_forward_hook(lambda module, args, written: 0.5 * written)
    logit_lens(model, pairs, progress=False)
    with pytest.raises(ValueError, match="block 1 does not add"):
        logit_lens(model, pairs, site="attn_out", over="layer", progress=False)


def test_grad_mode_is_left_alone():
    model, pairs = model_of("gpt2"), make_pairs()
    assert torch.is_grad_enabled()
    assert not logit_lens(model, pairs, progress=False).values.requires_grad
    assert torch.is_grad_enabled()


def test_smollm2(smollm2):
    text = ["When Mary and John went to the store, John gave a drink to", "The capital of France is"]
    prompts = mk.Prompts.from_text(smollm2, text)
    lens = logit_lens(smollm2, prompts, tokens=[" Mary", " John"], progress=False)
    assert lens.dims == ("layer", "pos", "token", "prompt")
    columns = [smollm2.to_single_token(" Mary"), smollm2.to_single_token(" John")]
    for j, tokens in enumerate(prompts.tokens):
        with torch.no_grad():
            logits = smollm2(tokens[None])[0]
        close(lens.values[-1, : len(tokens), :, j], logits[:, columns], 1e-4)
    best = top_tokens(smollm2, prompts, k=3, over="layer", progress=False)
    assert best.strings[-1, 0, 0] == " Mary"
    assert best.strings[-1, 0, 1] == " Paris"
    assert math.isclose(
        float(best.probs.values[-1, 0, 0]), float(logit_probability(smollm2, prompts.tokens[0])), rel_tol=1e-4
    )


def logit_probability(model: mk.HookedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens[None])[0, -1].softmax(-1).max()
