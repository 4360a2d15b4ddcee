"""What stands in a norm's place is measured: nothing, a gain, a centring, a norm without weights, something else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mechkit as mk
from helpers.families import D_MODEL, FAMILIES, N_HEADS, build_of
from helpers.plain import layers, run
from helpers.tiny import make_pairs
from mechkit.hooks import FrozenNorm

LLAMA = FAMILIES["llama"][1] | {"num_hidden_layers": 2, "num_key_value_heads": N_HEADS, "tie_word_embeddings": False}


class Gain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(0.5, 2, x.shape[-1], dtype=x.dtype)


class Centring(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


class BareRMS(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Saturating(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


def bare(x: Tensor) -> Tensor:
    return x


# What stands there, and what of it is linear (its gain and centring, with scale 1)
LINEAR: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "identity": (nn.Identity, bare),
    "gain": (Gain, Gain()),
    "centring": (Centring, Centring()),
    "rms without gain": (BareRMS, bare),
    "layer norm without weights": (lambda: nn.LayerNorm(D_MODEL, elementwise_affine=False), Centring()),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_the_measured_norm_is_the_module(kind):
    module, linear = LINEAR[kind][0](), LINEAR[kind][1]
    x, v = torch.randn(2, 5, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = FrozenNorm(module, x)
    scale = norm.scale(x)
    assert torch.allclose(norm.linear(x, scale) + norm.bias, module(x), atol=1e-9)
    assert torch.allclose(norm.linear(v, torch.ones_like(scale)), linear(v), atol=1e-9)
    assert norm.normalizes == ("without" in kind)
    assert torch.equal(scale, torch.ones_like(scale)) != norm.normalizes
    x.requires_grad_()
    assert torch.allclose(norm.live_scale(x), scale, atol=1e-9)
    nothing = FrozenNorm(None, x.detach())
    assert torch.equal(nothing.linear(v, nothing.scale(v)), v)


def model_with(change: Callable[[Any], None]) -> tuple[Any, mk.HookedModel]:
    hf = build_of("llama", LLAMA)
    change(hf)
    plain = hf.double().eval()
    return plain, mk.HookedModel.from_hf(copy.deepcopy(plain))


def factors(plain: Any, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`W_Q`, `W_K`, `W_V` `[head d_model d_head]` and `W_O` `[head d_head d_model]`, read off the plain layers."""
    attention = layers(plain)[layer].self_attn
    into = (
        getattr(attention, name).weight.detach().T.reshape(D_MODEL, N_HEADS, -1)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    q, k, v = (weight.transpose(0, 1) for weight in into)
    return q, k, v, attention.o_proj.weight.detach().T.reshape(N_HEADS, -1, D_MODEL)


@pytest.mark.parametrize("kind", LINEAR)
def test_circuits_read_off_the_weights(kind):
    """No norm in front of attention, and one of each kind in front of the unembedding: nothing else is folded in."""
    make, linear = LINEAR[kind]

    def change(hf: Any) -> None:
        hf.model.norm = make()
        for block in layers(hf):
            block.input_layernorm = nn.Identity()

    plain, model = model_with(change)
    embed, unembed = plain.model.embed_tokens.weight.detach(), plain.lm_head.weight.detach()
    _, _, v, o = factors(plain, 1)
    full = linear(embed @ v[2] @ o[2]) @ unembed.T
    found = mk.ov_circuit(model, 1, 2, [3, 4, 9], None).values
    assert torch.allclose(found, full[[3, 4, 9]], atol=1e-7)
    values = torch.linalg.eigvals(full)
    copying = mk.head_scores(model, "copying", layers=[1], progress=False).values
    assert torch.allclose(copying[0, 2], values.real.sum() / values.abs().sum(), atol=1e-6)
    svd = mk.ov_svd(model, 1, 2, k=1, top=1)
    assert torch.allclose(svd.singular_values.values, torch.linalg.svdvals(v[2] @ o[2])[:8], atol=1e-7)
    earlier, (q, k, *_) = factors(plain, 0), factors(plain, 1)
    a, b = earlier[2][1] @ earlier[3][1], k[3] @ q[3].T
    composition = mk.composition_scores(model, "K").values
    assert torch.allclose(composition[0, 1, 1, 3], (a @ b).norm() / a.norm() / b.norm(), atol=1e-7)


@pytest.mark.parametrize("where", ["ln1", "ln2", "final", "all"])
def test_a_norm_that_does_nothing(where):
    """Attribution and edges where some norms, or all, are identities."""

    def change(hf: Any) -> None:
        for block in layers(hf):
            if where in ("ln1", "all"):
                block.input_layernorm = nn.Identity()
            if where in ("ln2", "all"):
                block.post_attention_layernorm = nn.Identity()
        if where in ("final", "all"):
            hf.model.norm = nn.Identity()

    plain, model = model_with(change)
    pairs = make_pairs(((6, 2), (6, 3)))
    metric = mk.logit_diff(pairs)
    clean, corrupted = (torch.stack(list(prompts.tokens)) for prompts in (pairs.clean, pairs.corrupted))
    logits = run(plain, clean)[:, -1]
    parts = mk.direct_logit_attribution(model, pairs, metric).values
    assert torch.allclose(parts.sum(0), logits[:, 5] - logits[:, 7], rtol=1e-5)
    mk.direct_logit_attribution(model, pairs, metric, over="layer head")  # checks its sums
    writes = layers(plain)[0].mlp
    kept: list[Tensor] = []
    for tokens in (clean, corrupted):
        run(plain, tokens, [(writes, "out", lambda x: kept.append(x) or x)])
    edited = run(plain, corrupted, [(plain.model.norm, "in", lambda x: x + kept[0] - kept[1])]) - run(plain, corrupted)
    effect = (edited[:, -1, 5] - edited[:, -1, 7]).mean()
    found = mk.edge_patching(model, pairs, metric, edges=["m0->logits"], progress=False).score("m0->logits")
    assert abs(found - float(effect)) <= 1e-6 * max(1.0, abs(float(effect)))


def test_what_is_not_a_norm_is_refused():
    def change(hf: Any) -> None:
        for block in layers(hf):
            block.input_layernorm = Saturating()

    _, model = model_with(change)
    for refused in (
        lambda: mk.composition_scores(model, "K"),
        lambda: mk.head_scores(model, "copying", progress=False),
        lambda: mk.ov_svd(model, 1, 2, k=1),
    ):
        with pytest.raises(ValueError, match=r"ln1 of layer \d: expected a norm"):
            refused()
    assert mk.ov_circuit(model, 1, 2, [3], [4]).values.shape == (1, 1)  # runs what stands there as it is
