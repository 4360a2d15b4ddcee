"""Models whose head is more than a final norm and a matrix: what is read off their streams, against the models themselves.

Every expected number is the plain transformers model's, copied before it was wrapped, with PyTorch's own hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM

import mechkit as mk
from helpers.adapted import Adapted
from helpers.families import COMMON, D_MODEL, D_VOCAB, FAMILIES, build_hf, build_of
from helpers.plain import last_stream, layers, run
from helpers.tiny import make_pairs
from mechkit.hooks import record
from mechkit.hooks._readout import own_logits

LLAMA = FAMILIES["llama"][1] | {"num_hidden_layers": 2, "tie_word_embeddings": False}


class Squashed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(x))


class Clamped(nn.Linear):
    """Only large logits show that it is more than a matrix."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-2, 2)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0.3 * super().forward(x)


class Saturating(nn.Module):
    """Stands in a norm's place and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


def llama(change: Callable[[Any], None]) -> Any:
    torch.manual_seed(1)
    hf = build_of("llama", LLAMA)
    change(hf)
    return hf.double().eval()


def of_class(kind: type[nn.Linear]) -> Callable[[Any], None]:
    def change(hf: Any) -> None:
        head = kind(D_MODEL, D_VOCAB, bias=False)
        head.weight.data = hf.lm_head.weight.data
        hf.lm_head = head

    return change


def several(*modules: nn.Module) -> Callable[[Any], None]:
    return lambda hf: setattr(hf, "lm_head", nn.Sequential(*modules))


# The logits of these are not linear in the stream behind a norm ...
CURVED: dict[str, Callable[[], Any]] = {
    "squashed": lambda: llama(of_class(Squashed)),
    "clamped": lambda: llama(of_class(Clamped)),
    "sequential": lambda: llama(several(nn.Linear(D_MODEL, 9), nn.GELU(), nn.Linear(9, D_VOCAB))),
    "hooked": lambda: llama(lambda hf: hf.lm_head.register_forward_hook(lambda module, args, out: out + out.sin())),
    "not a norm": lambda: llama(lambda hf: setattr(hf.model, "norm", Saturating())),
    "modernbert": lambda: build_of(
        "modernbert-decoder", COMMON | {"num_hidden_layers": 2, "local_attention": 4, "global_attn_every_n_layers": 2}
    ),
    "bert": lambda: build_of("bert", COMMON | {"num_hidden_layers": 2}, auto=AutoModelForMaskedLM),
}
# ... and those of these are
STRAIGHT: dict[str, Callable[[], Any]] = {
    "scaled": lambda: llama(of_class(Scaled)),
    "two matrices": lambda: llama(several(nn.Linear(D_MODEL, 9), nn.Linear(9, D_VOCAB))),
    "adapter": lambda: llama(lambda hf: setattr(hf, "lm_head", Adapted(hf.lm_head))),
    "no final norm": lambda: llama(lambda hf: setattr(hf.model, "norm", nn.Identity())),
    "granite": lambda: build_of("granite", LLAMA | {"residual_multiplier": 0.4, "logits_scaling": 3.0}),
    "nanochat": lambda: build_of("nanochat", LLAMA),
    "soft cap": lambda: build_of("gemma2", FAMILIES["gemma2"][1] | {"final_logit_softcapping": 2.0}),
}
HEADS = CURVED | STRAIGHT


def both(head: str) -> tuple[Any, mk.HookedModel]:
    plain = HEADS[head]()
    return plain, mk.HookedModel.from_hf(copy.deepcopy(plain), name=head)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("head", HEADS)
def test_the_lens_at_the_last_layer_is_the_model(head):
    plain, model = both(head)
    pairs = make_pairs()
    lens = mk.logit_lens(model, pairs, list(range(D_VOCAB)), progress=False)
    for i, tokens in enumerate(pairs.clean.tokens):
        close(lens.values[-1, : len(tokens), :, i], run(plain, tokens[None])[0])
    few = torch.tensor([4, 2])
    resid = last_stream(plain, pairs.clean.tokens[0][None])
    close(model.unembed(resid, few).detach(), run(plain, pairs.clean.tokens[0][None])[..., few])
    assert "entropy" in mk.logit_lens(model, pairs, value="entropy", progress=False).metric


@pytest.mark.parametrize("head", STRAIGHT)
def test_parts_add_up_to_the_models_own_logits(head):
    plain, model = both(head)
    pairs = make_pairs()
    metric = mk.logit_diff(pairs)
    logits = [run(plain, tokens[None])[0, -1] for tokens in pairs.clean.tokens]
    expected = torch.stack([one[5] - one[7] for one in logits])
    for over in ("component", "cumulative"):
        parts = mk.direct_logit_attribution(model, pairs, metric, over=over)
        close(parts.values.sum(0) if over == "component" else parts.values[-1], expected)


@pytest.mark.parametrize("head", CURVED)
def test_what_needs_a_linear_head_names_the_head(head):
    _, model = both(head)
    pairs = make_pairs()
    metric = mk.logit_diff(pairs)
    for refused in (
        lambda: mk.direct_logit_attribution(model, pairs, metric),
        lambda: mk.direct_logit_attribution(model, pairs, torch.ones(D_MODEL)),
        lambda: mk.dla_erasure_check(model, pairs, metric, (0, 0)),
        lambda: mk.logit_lens(model, pairs, site="mlp_out", over="layer", progress=False),
        lambda: mk.head_scores(model, "copying", layers=[0], progress=False),
        lambda: mk.relp(model, pairs, metric, site="resid_post", over="layer"),
    ):
        with pytest.raises(ValueError, match=r"the head of .* is not: "):
            refused()


@pytest.mark.parametrize("head", ["squashed", "sequential", "hooked", "modernbert", "two matrices", "nanochat"])
def test_sweeps_and_edges_are_the_models(head):
    """Patching the stream, and an edge into the logits: that head's change, added to the last block's output."""
    plain, model = both(head)
    pairs = make_pairs(((6, 2), (6, 3)))
    metric = mk.logit_diff(pairs)
    clean, corrupted = (torch.stack(list(prompts.tokens)) for prompts in (pairs.clean, pairs.corrupted))

    def value(edits: Any = ()) -> Tensor:
        logits = run(plain, corrupted, edits)[:, -1]
        return logits[:, 5] - logits[:, 7]

    swept = mk.activation_patching(model, pairs, metric, site="resid_pre", over="layer pos", progress=False)
    assert swept.provenance["replay"] == "suffix"
    block = layers(plain)[1]
    for pos in (2, 5):
        source = read_input(plain, clean, block)
        close(swept.values[1, pos], value([(block, "in", at(source, pos))]))
    edges = mk.edge_patching(model, pairs, metric, edges=["m0->logits", "a1.h2->logits"], progress=False)
    change = read_output(plain, clean, layers(plain)[0].mlp) - read_output(plain, corrupted, layers(plain)[0].mlp)
    effect = value([(layers(plain)[-1], "out", lambda x: x + change)]) - value()
    close(torch.tensor(edges.score("m0->logits")), effect.mean())
    gradient = mk.edge_attribution(model, pairs, metric, steps=1)
    resid = last_stream(plain, corrupted).requires_grad_()
    logits = run(plain, corrupted, [(layers(plain)[-1], "out", lambda x: resid)], grad=True)[:, -1]
    (slope,) = torch.autograd.grad((logits[:, 5] - logits[:, 7]).sum(), resid)
    close(torch.tensor(gradient.score("m0->logits")), (slope * change).sum((1, 2)).mean())


def at(source: Tensor, pos: int) -> Callable[[Tensor], Tensor]:
    def edit(x: Tensor) -> Tensor:
        x[:, pos] = source[:, pos]
        return x

    return edit


def read_input(plain: Any, tokens: Tensor, module: nn.Module) -> Tensor:
    kept: list[Tensor] = []
    run(plain, tokens, [(module, "in", lambda x: kept.append(x.clone()) or x)])
    return kept[0]


def read_output(plain: Any, tokens: Tensor, module: nn.Module) -> Tensor:
    kept: list[Tensor] = []
    run(plain, tokens, [(module, "out", lambda x: kept.append(x.clone()) or x)])
    return kept[0]


def test_a_patchscope_is_the_model():
    plain, model = both("modernbert")
    pairs = make_pairs(((6, 2),))
    goal = pairs.corrupted.tokens[0]
    found = mk.patchscope(model, pairs.clean, goal, positions=3, target_position=2, layers=[0], k=3, progress=False)
    source = read_output(plain, pairs.clean.tokens[0][None], layers(plain)[0])

    def edit(x: Tensor) -> Tensor:
        x[:, 2] = source[:, 3]
        return x

    expected = run(plain, goal[None], [(layers(plain)[0], "out", edit)])[0, -1].softmax(-1).topk(3)
    close(found.probs.values[0, :, 0], expected.values)
    assert found.ids[0, :, 0].tolist() == expected.indices.tolist()


@pytest.mark.parametrize("head", ["modernbert", "no final norm"])
def test_a_tuned_lens_reads_through_the_head(head):
    _, model = both(head)
    text = mk.Prompts.from_tokens(torch.randint(3, D_VOCAB, (12, 12), generator=torch.Generator().manual_seed(2)))
    lens = mk.TunedLens.fit(model, text, steps=10, progress=False)
    report = lens.provenance["validation_kl"]
    ratios = [after / before for before, after in zip(report["logit_lens"], report["tuned_lens"], strict=True)]
    assert max(ratios) <= 1
    assert head == "no final norm" or min(ratios) < 0.9


def test_a_head_that_is_exchanged_after_wrapping_is_seen():
    model = mk.HookedModel.from_hf(build_of("llama", LLAMA))
    pairs = make_pairs()
    mk.direct_logit_attribution(model, pairs, mk.logit_diff(pairs))
    hf = model.bridge.original_model
    own = copy.deepcopy(hf.lm_head.original_component)

    class Late(nn.Module):
        weight, bias = own.weight, own.bias

        def forward(self, x: Tensor) -> Tensor:
            return own(x).tanh()

    hf.lm_head = Late().eval()
    tokens = pairs.clean.tokens[0][None]
    lens = mk.logit_lens(model, pairs.clean, list(range(D_VOCAB)), over="layer", progress=False)
    close(lens.values[-1, :, 0], model(tokens)[0, -1].detach())
    with pytest.raises(ValueError, match="head"):
        mk.direct_logit_attribution(model, pairs, mk.logit_diff(pairs))


@pytest.mark.parametrize("family", ["gpt2", "gptj", "bloom", "gpt_neo", "opt"])
def test_the_models_own_code_after_its_blocks(family):
    """Blocks that return tuples, learned positions, ALiBi: the model runs without its blocks, and nothing of it is changed."""
    hf = build_hf(family)
    model = mk.HookedModel.from_hf(hf)
    tokens = torch.randint(3, D_VOCAB, (2, 5), generator=torch.Generator().manual_seed(3))
    final = record(model, tokens, blocks=False).resid[-1]
    fired = []
    with model.hooks([(lambda name: "embed" in name or "ln_final" in name, lambda x, hook: fired.append(hook.name))]):
        with torch.no_grad():
            found = own_logits(model, final.flatten(0, 1)).reshape(2, 5, -1)
        assert not fired  # nobody's hooks see it
        close(model(tokens).detach(), found, 1e-9)
        assert fired
