"""Adapters, scales and other modules in the place of a projection: weights, heads and circuits against the merged model's.

The oracle is the same model with the matrices that its modules really multiply with put into plain layers, and, for patching, the
plain transformers model with PyTorch's own hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mechkit as mk
from helpers.adapted import Adapted
from helpers.families import FAMILIES, N_HEADS, build_hf, build_of
from helpers.plain import layers, run
from helpers.tiny import make_pairs
from mechkit.hooks import Parts

LLAMA = FAMILIES["llama"][1] | {"num_hidden_layers": 2, "attention_bias": True}


class Directed(Adapted):
    """DoRA: the rows of the sum get lengths of their own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base_layer.weight + self.up.weight @ self.down.weight
        weight = weight / weight.norm(dim=1, keepdim=True) * torch.linspace(0.5, 2, len(weight), dtype=x.dtype)[:, None]
        return nn.functional.linear(x, weight, self.base_layer.bias)


class Multiplied(nn.Module):
    """A scale around a layer, with no `weight` of its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.inner = base

    def forward(self, x: Tensor) -> Tensor:
        return 0.6 * self.inner(x)


class Rescaled(nn.Linear):
    """IA3: entries of the input are scaled. A subclass whose `weight` looks like a plain layer's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.linspace(0.2, 2, x.shape[-1], dtype=x.dtype))


class Chained(nn.Sequential):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base, nn.Linear(base.out_features, base.out_features))


class Curved(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x).tanh()


KINDS = {kind.__name__: kind for kind in (Adapted, Directed, Multiplied, Rescaled, Chained)}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def adapted(kind: Callable[[nn.Linear], nn.Module], places: tuple[str, ...] = ATTENTION + MLP, seed: int = 0) -> Any:
    hf = build_of("llama", LLAMA, seed=seed)
    torch.manual_seed(7)
    for block in layers(hf):
        for part in (block.self_attn, block.mlp):
            for name in places:
                if hasattr(part, name):
                    setattr(part, name, kind(getattr(part, name)).double())
    return hf.eval()


def merged(hf: Any) -> Any:
    """The same model with plain layers."""
    hf = copy.deepcopy(hf)
    for block in layers(hf):
        for part, names in ((block.self_attn, ATTENTION), (block.mlp, MLP)):
            for name in names:
                module = getattr(part, name)
                width = part.config.intermediate_size if name == "down_proj" else part.config.hidden_size
                with torch.no_grad():
                    bias = module(torch.zeros(width, dtype=torch.float64))
                    weight = (module(torch.eye(width, dtype=torch.float64)) - bias).T
                plain = nn.Linear(width, len(weight), dtype=torch.float64)
                plain.weight.data, plain.bias.data = weight.contiguous(), bias
                setattr(part, name, plain)
    return hf


def close(found: Any, expected: Any, tolerance: float = 1e-7) -> None:
    found, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected))
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_heads_and_circuits_are_the_merged_models(kind):
    hf = adapted(KINDS[kind])
    expected = mk.HookedModel.from_hf(merged(hf))
    model = mk.HookedModel.from_hf(hf)
    pairs = make_pairs(((6, 2), (6, 3)))
    metric = mk.logit_diff(pairs)
    close(model(pairs.clean.tokens[0][None]).detach(), expected(pairs.clean.tokens[0][None]).detach())
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_in", "W_gate", "W_out"):
        close(getattr(model, name).detach(), getattr(expected, name).detach())
    with torch.no_grad():
        assert model.validate().heads < 1e-9
    edges = ["a0.h1->a1.h2<q>", "a0.h3->a1.kv1<v>", "m0->a1.kv0<k>", "a0.h0->m1", "a1.h3->logits", "a0.h2->m0"]
    for measure in (
        lambda m: mk.ov_circuit(m, 1, 2, [3, 4], [5, 6, 7]).values,
        lambda m: mk.qk_circuit(m, 1, 2, [3, 4], [5, 6, 7]).values,
        lambda m: mk.composition_scores(m, "K").values.nan_to_num(),
        lambda m: mk.head_scores(m, "copying", progress=False).values,
        lambda m: mk.direct_logit_attribution(m, pairs, metric, over="layer head").values,
        lambda m: mk.direct_logit_attribution(m, pairs, metric, over="layer neuron").values,
        lambda m: mk.activation_patching(m, pairs, metric, site="result", progress=False).values,
        lambda m: mk.activation_patching(m, pairs, metric, site="z", progress=False).values,
        lambda m: [mk.edge_patching(m, pairs, metric, edges=edges, progress=False).score(edge) for edge in edges],
    ):
        close(measure(model), measure(expected))


def test_result_is_what_a_head_adds_whatever_stands_there():
    """Patching a head's result, against its slice of the projection's input in the plain model."""
    hf = adapted(Adapted, ("o_proj",))
    plain, model = copy.deepcopy(hf), mk.HookedModel.from_hf(hf)
    pairs = make_pairs(((6, 2), (6, 3)))
    clean, corrupted = (torch.stack(list(prompts.tokens)) for prompts in (pairs.clean, pairs.corrupted))
    got = mk.activation_patching(model, pairs, mk.logit_diff(pairs), site="result", progress=False)
    assert got.provenance["replay"] == "suffix"
    for layer, block in enumerate(layers(plain)):
        kept: list[Tensor] = []
        run(plain, clean, [(block.self_attn.o_proj, "in", lambda x, kept=kept: kept.append(x) or x)])
        for head in range(N_HEADS):
            mine = slice(8 * head, 8 * head + 8)

            def edit(x: Tensor, source: Tensor = kept[0], mine: slice = mine) -> Tensor:
                x[..., mine] = source[..., mine]
                return x

            logits = run(plain, corrupted, [(block.self_attn.o_proj, "in", edit)])[:, -1]
            close(got.values[layer, head], logits[:, 5] - logits[:, 7])


def test_a_projection_that_is_not_linear_is_refused_where_its_matrix_is_needed():
    model = mk.HookedModel.from_hf(adapted(Curved, ("o_proj",)))
    pairs = make_pairs(((6, 2),))
    metric = mk.logit_diff(pairs)
    for refused in (
        lambda: model.W_O,
        lambda: mk.activation_patching(model, pairs, metric, site="result", progress=False),
        lambda: mk.ablation(model, pairs, metric, site="result", progress=False),
        lambda: model.run_with_cache(pairs.clean.tokens[0][None], ["result"]),
        lambda: mk.direct_logit_attribution(model, pairs, metric, over="layer head"),
        lambda: mk.edge_patching(model, pairs, metric, edges=["a0.h1->logits"], progress=False),
        lambda: mk.ov_circuit(model, 0, 0, [3], [4]),
        model.validate,
    ):
        with pytest.raises(ValueError, match="merge_and_unload"):
            refused()
    swept = mk.activation_patching(model, pairs, metric, site="z", progress=False)  # needs no matrix
    assert swept.provenance["replay"] == "suffix"
    assert float(mk.direct_logit_attribution(model, pairs, metric).provenance["residual_error"]) < 1e-5


def test_an_adapter_that_is_put_on_after_wrapping():
    pairs = make_pairs(((6, 2),))
    metric = mk.logit_diff(pairs)

    def value(hf: Any) -> Tensor:
        return mk.activation_patching(mk.HookedModel.from_hf(hf), pairs, metric, site="result", progress=False).values

    model = mk.HookedModel.from_hf(build_of("llama", LLAMA))
    torch.manual_seed(7)
    for block in model.bridge.blocks:  # inside the bridge: the model runs it
        block.attn.o.set_original_component(Adapted(block.attn.o.original_component).double().eval())
    late = mk.activation_patching(model, pairs, metric, site="result", progress=False).values
    close(late, value(adapted(Adapted, ("o_proj",))))
    model = mk.HookedModel.from_hf(build_of("llama", LLAMA))
    attention = model.bridge.original_model.model.layers[1].self_attn
    attention.q_proj = Adapted(attention.q_proj.original_component).double().eval()  # around it: the bridge does not
    for refused in (
        lambda: mk.activation_patching(model, pairs, metric, site="z", progress=False),
        lambda: mk.head_scores(model, "copying", progress=False),
        lambda: mk.edge_attribution(model, pairs, metric),
    ):
        with pytest.raises(ValueError, match=r"'q_proj' of layer 1 was exchanged for a Adapted .*merge_and_unload"):
            refused()


def test_adapters_that_transformer_lens_would_leave_out():
    """It runs copies of a joint matrix of queries, keys and values, and the stored weight where its flag is set."""
    pairs = make_pairs(((6, 2),))
    metric = mk.logit_diff(pairs)
    hf = build_hf("gpt_neox")
    layers(hf)[1].attention.query_key_value = Adapted(layers(hf)[1].attention.query_key_value).double().eval()
    with pytest.raises(ValueError, match=r"with the adapter on .*layers.1.*merge_and_unload"):
        mk.HookedModel.from_hf(hf)
    model = mk.HookedModel.from_hf(build_hf("gpt_neox"))
    joint = model.bridge.blocks[1].attn.qkv
    joint.set_original_component(Adapted(joint.original_component).double().eval())
    with pytest.raises(ValueError, match=r"layer 1 was exchanged for a Adapted .*merge_and_unload"):
        mk.activation_patching(model, pairs, metric, site="z", progress=False)
    model = mk.HookedModel.from_hf(adapted(Adapted, ("o_proj",)))
    before = mk.activation_patching(model, pairs, metric, site="result", progress=False).values
    model.bridge.set_use_attn_result(True)
    with pytest.raises(ValueError, match=r"set_use_attn_result\(False\)"):
        mk.activation_patching(model, pairs, metric, site="result", progress=False)
    model.bridge.set_use_attn_result(False)
    close(mk.activation_patching(copy.deepcopy(model), pairs, metric, site="result", progress=False).values, before)


@pytest.mark.parametrize("model_type", ["granite", "granitemoe", "gemma2", "olmo2", "gpt_neox"])
def test_heads_are_what_the_block_adds(model_type):
    """All heads and the bias are the change of the stream: through the multiplier, and through the norm behind the attention."""
    arguments = FAMILIES.get(model_type, ("", LLAMA))[1]
    if model_type.startswith("granite"):
        arguments = LLAMA | {"residual_multiplier": 0.22, "attention_multiplier": 0.3, "embedding_multiplier": 4.0}
        arguments |= {"num_local_experts": 3, "num_experts_per_tok": 2} if model_type == "granitemoe" else {}
    dtype = torch.float32 if model_type == "granitemoe" else torch.float64
    model = mk.HookedModel.from_hf(build_of(model_type, arguments, dtype))
    tokens = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    cache = model.run_with_cache(tokens, ["result", "z", "resid_pre", "resid_post", "attn_out", "mlp_out"])[1]
    parts, tolerance = Parts(model), 1e-3 if dtype == torch.float32 else 1e-6
    for layer in range(model.n_layers):
        z = cache["z", layer].reshape(2, 6, model.n_heads, -1)
        added = cache["resid_post", layer] - cache["resid_pre", layer] - cache["mlp_out", layer]
        close(parts.heads(layer, z).sum(-2) + parts.written_by_bias(layer, z), added, tolerance)
        if model_type.startswith("granite"):
            close(cache["result", layer].sum(-2) + 0.22 * model.b_O[layer], added, tolerance)
    model.validate()
    pairs = make_pairs(((6, 2),))
    metric = mk.logit_diff(pairs)
    result, z = (mk.activation_patching(model, pairs, metric, site=site, progress=False) for site in ("result", "z"))
    close(result.values, z.values, tolerance)
    assert float((z.values - z.baseline["corrupted"]).abs().max()) > 1e-3


def test_granites_heads_neurons_and_edges():
    hf = build_of("granite", LLAMA | {"residual_multiplier": 0.22, "logits_scaling": 3.0, "mlp_bias": True})
    plain, model = copy.deepcopy(hf), mk.HookedModel.from_hf(hf)
    pairs = make_pairs(((6, 2), (6, 3)))
    metric = mk.logit_diff(pairs)
    whole = mk.direct_logit_attribution(model, pairs, metric)
    heads = mk.direct_logit_attribution(model, pairs, metric, over="layer head")
    mk.direct_logit_attribution(model, pairs, metric, over="layer neuron")  # checks its sums
    lens = mk.logit_lens(model, pairs.clean, [5, 7], site="result", over="layer head", progress=False)
    close(lens.values[..., 0, :] - lens.values[..., 1, :], heads.values)
    clean, corrupted = (torch.stack(list(prompts.tokens)) for prompts in (pairs.clean, pairs.corrupted))
    logits = run(plain, clean)[:, -1]
    close(whole.values.sum(0), logits[:, 5] - logits[:, 7])
    output, change = layers(plain)[1].self_attn.o_proj, []
    for tokens in (clean, corrupted):
        run(plain, tokens, [(output, "in", lambda x: change.append(x) or x)])
    head = (change[0] - change[1])[..., 16:24] @ output.weight[:, 16:24].T
    base = run(plain, corrupted)[:, -1]
    edited = run(plain, corrupted, [(plain.model.norm, "in", lambda x: x + 0.22 * head)])[:, -1]
    effect = (edited - base)[:, 5] - (edited - base)[:, 7]
    edges = mk.edge_patching(model, pairs, metric, edges=["a1.h2->logits"], progress=False)
    close(edges.score("a1.h2->logits"), effect.mean().detach())
    circuit = mk.Circuit.from_scores(mk.edge_attribution(model, pairs, metric, steps=2), n_edges=10)
    mk.evaluate_circuit(circuit, model, pairs, metric)  # checks the full and the empty circuit against the model


def test_a_block_that_scales_what_it_adds_is_seen_when_it_is_loaded():
    """The bridge takes this block for a plain Llama's, whose attention is added as it is."""
    hf = build_of("llama", LLAMA)
    block = layers(hf)[0]

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)[0]
        hidden_states = hidden_states + 0.5 * attended
        return hidden_states + block.mlp(block.post_attention_layernorm(hidden_states))

    block.forward = forward
    model = mk.HookedModel.from_hf(hf)
    pairs = make_pairs(((6, 2),))
    with pytest.raises(ValueError, match="the heads of layer 0 differ from what its block adds"):
        mk.activation_patching(model, pairs, mk.logit_diff(pairs), site="result", layers=[0], progress=False)
    with pytest.raises(ValueError, match="sum of heads in layer 0"):
        model.validate()
