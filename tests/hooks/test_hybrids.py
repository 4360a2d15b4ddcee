"""Models whose layers differ, share a latent or lack heads, and settings of usual families that are rarely met: what there is
works as plain transformers computes it, and what there is not is refused by name."""

from __future__ import annotations

import copy
import json
from functools import cache

import pytest
import torch
from torch import nn

import mechkit as mk
from helpers.architectures import Plain, build, check_sentence, difference, make_pairs, tokens_of


@cache
def both(kind: str, **changes: object) -> tuple[Plain, mk.HookedModel]:
    plain = Plain(build(kind, **{name: list(v) if isinstance(v, tuple) else v for name, v in changes.items()}))
    return plain, mk.HookedModel.from_hf(copy.deepcopy(plain.model), name=kind)


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape
    got = got.detach().double()
    assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())


def assert_sweeps_exact(plain: Plain, model: mk.HookedModel) -> mk.Result:
    pairs = make_pairs()
    metric = mk.logit_diff(pairs)
    stream = mk.activation_patching(model, pairs, metric, site="resid_pre", over="layer pos", progress=False)
    assert_near(stream.values, plain.stream_sweep(pairs))
    heads = mk.activation_patching(model, pairs, metric, site="z", over="layer head", progress=False)
    assert_near(heads.values, plain.head_sweep(pairs, model.layers_with("z")))
    return heads


def test_a_hybrid_offers_the_layers_that_have_a_site():
    plain, model = both("lfm2")
    assert model.layers_with("resid_pre") == (0, 1, 2)
    assert model.layers_with("z") == (1,)
    heads = assert_sweeps_exact(plain, model)
    assert heads.coords["layer"] == (1,)
    _, kept = model.run_with_cache(tokens_of(make_pairs().clean))
    assert ("z", 1) in kept
    assert ("z", 0) not in kept
    assert [name for name in kept if name.endswith("hook_z")] == ["blocks.1.attn.hook_z"]


def test_a_hybrid_names_the_layers_when_another_is_asked_for():
    _, model = both("lfm2")
    pairs = make_pairs()
    metric = mk.logit_diff(pairs)
    for refused in (
        lambda: mk.activation_patching(model, pairs, metric, layers=[0], progress=False),
        lambda: mk.ablation(model, pairs, metric, layers=[0, 1], progress=False),
        lambda: mk.attribution_patching(model, pairs, metric, layers=[2]),
        lambda: mk.direct_logit_attribution(model, pairs, metric, over="layer head", layers=[0]),
        lambda: model.run_with_cache(tokens_of(pairs.clean), ("z", 0)),
        lambda: mk.activation_patching(model, pairs, metric, site="blocks.0.attn.hook_z", progress=False),
    ):
        with pytest.raises(ValueError, match=r"'z' does not exist in layer [02].*it is in layer 1") as raised:
            refused()
        check_sentence(raised.value)


@pytest.mark.parametrize("kind", ["lfm2", "bamba", "qwen3_next"])
def test_what_needs_heads_in_every_layer_is_refused(kind):
    _, model = both(kind)
    pairs = make_pairs()
    metric = mk.logit_diff(pairs)
    for refused in (
        lambda: mk.edge_attribution(model, pairs, metric, steps=1),
        lambda: mk.edge_patching(model, pairs, metric, edges=["m0->logits"], progress=False),
        lambda: mk.path_patching(model, pairs, metric, progress=False),
        lambda: mk.acdc(model, pairs, metric, threshold=1.0, progress=False),
        lambda: mk.composition_scores(model),
        lambda: mk.attention_rollout(model, pairs, progress=False),
        lambda: mk.dla_erasure_check(model, pairs, metric, (1, 0)),
        lambda: model.W_Q,
    ):
        with pytest.raises(ValueError, match=r"layer|every|does not exist") as raised:
            refused()
        check_sentence(raised.value)


@pytest.mark.parametrize("kind", ["lfm2", "granitemoehybrid", "mamba2", "rwkv"])
def test_direct_logit_attribution_adds_up_where_layers_show_no_attention(kind):
    plain, model = both(kind)
    pairs = make_pairs()
    metric = mk.logit_diff(pairs)
    own = difference(plain.run(tokens_of(pairs.clean)))
    components = mk.direct_logit_attribution(model, pairs, metric, over="component")
    assert_near(components.values.sum(0), own)
    assert len(components.coords["component"]) == len(components.values)
    cumulative = mk.direct_logit_attribution(model, pairs, metric, over="cumulative")
    assert cumulative.coords["component"] == ("embed", "L0", "L1", "L2", "bias")
    assert_near(cumulative.values[-1], own)
    # A mixer's term is the stream's gain in it: the layer's terms are the step of the cumulative sum.
    layer_0 = [i for i, name in enumerate(components.coords["component"]) if str(name).startswith("L0 ")]
    step = cumulative.values[1] - cumulative.values[0]
    assert_near(components.values[layer_0].sum(0), step)


@pytest.mark.parametrize("kind", ["mamba", "rwkv", "recurrent_gemma"])
def test_without_attention_heads_are_refused_by_name(kind):
    _, model = both(kind)
    pairs = make_pairs()
    metric = mk.logit_diff(pairs)
    for refused in (
        lambda: mk.activation_patching(model, pairs, metric, progress=False),
        lambda: mk.ablation(model, pairs, metric, progress=False),
        lambda: mk.head_scores(model, n=2, length=4, progress=False),
        lambda: mk.attention_patterns(model, pairs, progress=False),
        lambda: mk.integrated_gradients(model, pairs, metric),
        lambda: mk.Graph.of(model),
    ):
        with pytest.raises(ValueError, match="no attention in it") as raised:
            refused()
        check_sentence(raised.value)
    for name in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_pos"):
        with pytest.raises(ValueError, match=name):
            getattr(model, name)


@pytest.mark.parametrize("changes", [{}, {"v_head_dim": 4}, {"q_lora_rank": None}])
def test_latent_attention_has_heads_of_its_own_width_and_no_keys(changes):
    plain, model = both("deepseek_v3", **changes)
    assert_sweeps_exact(plain, model)
    width = changes.get("v_head_dim", 8)
    assert (model.n_heads, model.n_kv_heads, model.d_head) == (4, 4, width)
    _, kept = model.run_with_cache(tokens_of(make_pairs().clean), "z")
    assert kept["z", 0].shape == (2, 6, 4, width)
    assert {"q", "k", "v"}.isdisjoint(model.sites)
    with pytest.raises(ValueError, match="latent"):
        mk.activation_patching(model, make_pairs(), mk.logit_diff(make_pairs()), site="k", progress=False)
    with pytest.raises(ValueError, match="layers of one width"):
        mk.activation_patching(
            model, make_pairs(), mk.logit_diff(make_pairs()), site="mlp_post", over="layer neuron", progress=False
        )


@pytest.mark.parametrize("kind", ["lfm2", "bamba", "deepseek_v3", "mamba", "openai-gpt"])
def test_gradients_are_those_of_the_plain_model(kind):
    plain, model = both(kind)
    pairs = make_pairs()
    clean, corrupted = tokens_of(pairs.clean), tokens_of(pairs.corrupted)

    def first_order(module: nn.Module) -> torch.Tensor:
        change = plain.read(clean, module) - plain.read(corrupted, module)
        return change.double() * plain.gradient(corrupted, module)

    found = mk.attribution_patching(model, pairs, mk.logit_diff(pairs), site="resid_pre", over="layer pos")
    expected = torch.stack([first_order(block).sum(-1).T for block in plain.blocks])
    assert_near(found.values - found.baseline["corrupted"], expected)
    if model.has_site("z"):
        found = mk.attribution_patching(model, pairs, mk.logit_diff(pairs), site="z", over="layer head")
        modules = [plain.projection(layer) for layer in model.layers_with("z")]
        terms = [
            first_order(module).reshape(*clean.shape, 4, -1).sum((1, 3)).T for module in modules if module is not None
        ]
        assert_near(found.values - found.baseline["corrupted"], torch.stack(terms))


def test_a_hook_on_latent_attentions_heads_edits_the_head_it_is_given():
    plain, model = both("deepseek_v3")
    tokens = tokens_of(make_pairs().clean)

    def silence(z: torch.Tensor, hook: object) -> torch.Tensor:
        z[:, :, 2] = 0
        return z

    def silence_slice(x: torch.Tensor) -> torch.Tensor:
        x[..., 16:24] = 0
        return x

    projection = plain.projection(1)
    assert projection is not None
    assert_near(model.run_with_hooks(tokens, [(("z", 1), silence)]), plain.run(tokens, (projection, silence_slice)))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("falcon", {"alibi": True}),
        ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False}),
        ("gpt_neox", {"attention_bias": False}),
        ("xglm", {"attention_heads": 2}),
        ("mpt", {"no_bias": False}),
        ("nanochat", {}),
    ],
)
def test_settings_that_did_not_replay_do(kind, changes):
    plain, model = both(kind, **changes)
    assert assert_sweeps_exact(plain, model).provenance["replay"] == "suffix"


@pytest.mark.parametrize("kind", ["mpt", "xglm"])
def test_edges_run_where_blocks_take_biases_by_distance_or_a_mask_a_row(kind):
    _, model = both(kind)
    pairs = make_pairs()
    metric = mk.logit_diff(pairs)
    edge = mk.edge_patching(model, pairs, metric, edges=["m2->logits"], progress=False)
    # The last MLP has one edge alone: patching its output is patching that edge.
    whole = mk.activation_patching(
        model, pairs, metric, site="mlp_out", over="layer", layers=[2], replay=False, progress=False
    )
    effect = (whole.values - whole.baseline["corrupted"]).mean().double()
    assert_near(torch.tensor(edge.score("m2->logits")).abs(), effect.abs())


def test_layers_with_another_number_of_heads_are_left_out():
    plain, model = both("laguna", num_attention_heads_per_layer=(4, 8, 4))
    assert model.layers_with("z") == (0, 2)
    assert_sweeps_exact(plain, model)


def test_queries_that_carry_a_gate_are_not_taken_for_queries():
    _, model = both("qwen3_next")
    assert "q" not in model.sites  # twice as wide: each head's queries and its gate
    assert model.layers_with("k") == (1,)


def test_a_router_is_not_a_pattern():
    """JetMoE routes within its attention: the softmax over experts is not the softmax over sources."""
    _, model = both("jetmoe")
    _, kept = model.run_with_cache(tokens_of(make_pairs().clean), "pattern")
    assert kept["pattern", 0].shape == (2, 4, 6, 6)
    assert_near(kept["pattern", 0].sum(-1), torch.ones(2, 4, 6, dtype=torch.float64))


# -- refused when they are wrapped -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, "falcon"),
        ("gpt_bigcode", {"multi_query": False}, "multi_query"),
        ("phi", {"qk_layernorm": True}, "q_layernorm"),
        ("hrm_text", {}, "stack of blocks"),
    ],
)
def test_what_transformerlens_cannot_hook_is_refused_with_its_reason(kind, changes, why):
    model = build(kind, **changes)
    with pytest.raises(ValueError, match=why) as raised:
        mk.HookedModel.from_hf(model)
    check_sentence(raised.value)
    assert str(raised.value).startswith("model: ")


@pytest.mark.parametrize("config", [None, {"model_type": "nonsense"}, {"model_type": "vit"}])
def test_a_folder_without_a_language_model_is_refused_with_the_reason(config, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    for name in (tmp_path, "nobody/has-this-model"):
        with pytest.raises(
            ValueError, match=r"model: expected a hub name, a folder .* causal language model"
        ) as raised:
            mk.HookedModel.from_pretrained(name)
        check_sentence(raised.value)


def test_quantized_weights_are_refused():
    narrow = build("qwen2").float()
    in_eight_bits = copy.deepcopy(narrow)
    in_eight_bits.lm_head.weight.data = in_eight_bits.lm_head.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"lm_head.weight.*float8_e4m3fn.*dequantize"):
        mk.HookedModel.from_hf(in_eight_bits)
    whole_numbers = copy.deepcopy(narrow)
    layer = whole_numbers.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj.weight.*int8"):
        mk.HookedModel.from_hf(whole_numbers)
    packed = copy.deepcopy(narrow)
    packed.model.layers[0].self_attn.q_proj.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"q_proj.qweight.*int32"):
        mk.HookedModel.from_hf(packed)
    mk.HookedModel.from_hf(narrow)  # as it was, it is taken


def test_the_stream_behind_a_block_that_returns_a_list():
    """For the first GPT, in which TransformerLens shows none."""
    plain, model = both("openai-gpt")
    tokens = tokens_of(make_pairs().clean)
    _, kept = model.run_with_cache(tokens, "resid_post")
    assert_near(kept["resid_post", 0], plain.read(tokens, plain.blocks[1]))
    edited = model.run_with_hooks(tokens, [(("resid_post", 0), lambda x, hook: 2 * x)])
    assert_near(edited, plain.run(tokens, (plain.blocks[1], lambda x: 2 * x)))
    assert not model.has_hooks
