"""A NaN or an inf is named where it begins: layer, site, head, position, prompt; and nothing that is finite is blamed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechkit as mk
from helpers.families import FAMILIES, N_LAYERS, build_hf
from helpers.tiny import LENGTH, make_model, make_pairs, whole_vocabulary
from mechkit.hooks._nonfinite import first_nonfinite
from mechkit.prompts import Stacked

LAYER, HEAD, D_HEAD = 2, 1, 8
SEPARATE = ["llama", "qwen2", "mistral", "gemma2", "olmo2", "stablelm"]
JOINT = ["gpt2", "gpt_neox", "bloom"]  # the bridge splits their joint weight


@pytest.fixture
def tokens() -> torch.Tensor:
    return make_pairs().clean.tokens[0]


def planted(family: str, component: str) -> tuple[mk.HookedModel, torch.nn.Parameter]:
    """A model, and a weight of a component of layer `LAYER`."""
    model = make_model(family)
    block = model.bridge.blocks[LAYER]
    module = {
        "q": lambda: block.attn.q,
        "o": lambda: block.attn.o,
        "mlp_in": lambda: mlp_in(block.mlp),
        "mlp_out": lambda: block.mlp.out,
        "ln1": lambda: block.ln1,
        "ln2": lambda: block.ln2,
    }[component]()
    return model, module.original_component.weight


def mlp_in(mlp: Any) -> Any:
    """What makes `mlp_pre`: the gate, where there is one."""
    return mlp.gate if hasattr(mlp, "gate") else getattr(mlp, "in")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_healthy_model_is_not_blamed(family, tokens):
    """Masked scores are -inf or as low as the dtype goes in each of them; the control plants a NaN in the same model."""
    model = make_model(family)
    assert first_nonfinite(model, Stacked(tokens[None])) is None
    with torch.no_grad():
        model.bridge.blocks[LAYER].attn.o.original_component.weight[0, 0] = torch.nan
    found = first_nonfinite(model, Stacked(tokens[None]))
    assert (found.site, found.layer, found.kind) == ("attn_out", LAYER, "NaN")
    assert found.positions == tuple(range(LENGTH))
    assert not model.has_hooks


@pytest.mark.parametrize("family", SEPARATE + JOINT)
def test_one_head_of_the_queries(family, tokens):
    model, weight = planted(family, "q")
    row = HEAD * D_HEAD + 3
    if family in ("gpt_neox", "bloom"):  # each head's query, key and value stand together in the joint weight
        weight = model.bridge.blocks[LAYER].attn.original_component.query_key_value.weight
        row = HEAD * 3 * D_HEAD + 3
    with torch.no_grad():
        weight[row, 5] = torch.nan
    found = first_nonfinite(model, Stacked(tokens[None]))
    assert (found.site, found.layer, found.heads, found.n_heads) == ("q", LAYER, (HEAD,), 4)


@pytest.mark.parametrize(
    ("family", "component", "site"),
    [
        (family, component, site)
        for family in ("gpt2", "llama", "gemma2", "gpt_neox", "opt", "bloom", "falcon", "phi")
        for component, site in (("mlp_in", "mlp_pre"), ("mlp_out", "mlp_out"), ("ln1", "q"), ("ln2", "mlp_pre"))
        if component != "ln2" or family not in ("falcon", "phi")  # there attention and MLP share a norm
    ],
)
def test_weights_are_named_by_the_first_site_that_they_reach(family, component, site, tokens):
    model, weight = planted(family, component)
    with torch.no_grad():
        weight.view(-1)[0] = torch.nan
    found = first_nonfinite(model, Stacked(tokens[None]))
    assert (found.site, found.layer, found.kind) == (site, LAYER, "NaN")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "gpt_neo"])
def test_embedding_final_norm_and_unembedding(family, tokens):
    """One token's embedding is named at that token's positions; the final norm and the logits have names of their own."""
    model = make_model(family)
    model.bridge.unembed.original_component.weight = torch.nn.Parameter(
        model.bridge.unembed.original_component.weight.clone()
    )
    with torch.no_grad():
        model.bridge.unembed.original_component.weight[3, 0] = torch.nan
    found = first_nonfinite(model, Stacked(tokens[None]))
    assert (found.site, found.layer, found.heads) == ("logits", None, None)
    with torch.no_grad():
        model.bridge.ln_final.original_component.weight[4] = torch.nan
    assert first_nonfinite(model, Stacked(tokens[None])).site == "final norm"
    with torch.no_grad():
        model.bridge.embed.original_component.weight[tokens[4], 4] = torch.nan
    found = first_nonfinite(model, Stacked(tokens[None]))
    assert (found.site, found.layer) == ("embed", None)
    assert found.positions == tuple((tokens == tokens[4]).nonzero().flatten().tolist())


def test_positions_that_were_learned(tokens):
    model = make_model("gpt2")
    with torch.no_grad():
        model.bridge.pos_embed.original_component.weight[3, 0] = torch.nan
    found = first_nonfinite(model, Stacked(tokens[None]))
    assert (found.site, found.layer, found.positions) == ("block input", 0, (3,))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gemma2", "gpt_neo"])
def test_scores_that_overflow(family, tokens):
    """Scores of +inf are blamed; masked ones in the same row are not. Gemma 2 caps its scores and GPT-Neo computes them in
    float32: there they stay finite, and nothing is blamed."""
    model = make_model(family, torch.float16)
    attention = model.bridge.blocks[LAYER].attn
    handles = [part.register_forward_hook(lambda _, args, out: out * 0 + 2e4) for part in (attention.q, attention.k)]
    found = first_nonfinite(model, Stacked(tokens[None]))
    for handle in handles:
        handle.remove()
    if family in ("gemma2", "gpt_neo"):
        assert found is None
    else:
        assert (found.site, found.layer, found.kind) == ("attn_scores", LAYER, "inf")
        assert found.heads == (0, 1, 2, 3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize(("component", "site"), [("mlp_in", "mlp_pre"), ("mlp_out", "mlp_out")])
def test_float16_overflow_is_named_where_it_overflows(family, component, site, tokens):
    """The same weights in float32 are finite, and huge values are not blamed."""
    for dtype in (torch.float16, torch.float32):
        model = mk.HookedModel.from_hf(build_hf(family, dtype))
        mlp = model.bridge.blocks[LAYER].mlp
        module = mlp_in(mlp) if component == "mlp_in" else mlp.out
        with torch.no_grad():
            module.original_component.weight *= 3e4
        found = first_nonfinite(model, Stacked(tokens[None]))
        if dtype == torch.float32:
            assert found is None
        else:
            assert (found.site, found.layer) == (site, LAYER)
            assert "inf" in found.kind


def test_what_a_sweep_says_of_an_unedited_run():
    model, weight = planted("llama", "q")
    with torch.no_grad():
        weight[HEAD * D_HEAD, 0] = torch.nan
    pairs = make_pairs()
    for argument in ({"replay": True}, {"replay": False}):
        with pytest.raises(
            ValueError, match=rf"^base run: .* prompt 0; the first is NaN in q of layer {LAYER}, head {HEAD},"
        ):
            mk.activation_patching(model, pairs, whole_vocabulary(pairs), progress=False, **argument)
    assert not model.has_hooks


def test_one_bad_token_of_one_prompt_of_the_source_run():
    model, pairs = make_model("llama"), make_pairs()
    only = next(t for t in pairs.clean.tokens[1].tolist() if all(t not in p for p in pairs.corrupted.tokens))
    bad = [i for i, p in enumerate(pairs.clean.tokens) if only in p]
    with torch.no_grad():
        model.bridge.embed.original_component.weight[only] = torch.inf
    at = (pairs.clean.tokens[bad[0]] == only).nonzero().flatten().tolist()
    with pytest.raises(
        ValueError, match=rf"^source run: .* prompt {bad[0]}; the first is inf in embed, position {at[0]};"
    ):
        mk.activation_patching(model, pairs, whole_vocabulary(pairs), progress=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (mk.Edit("resid_pre", 1, "bad", pos=4), "resid_pre of layer 1, position 4"),
        (mk.Edit("z", 1, "bad", head=2, pos=5), "z of layer 1, head 2, position 5"),
        (mk.Edit("result", 1, "bad", head=2, pos=5), "result of layer 1, head 2, position 5"),
        (mk.Edit("pattern", 3, "bad", head=0), "pattern of layer 3, head 0, positions 0, 1, 2, 3, 4 and 2 more"),
        (mk.Edit("attn_scores", 3, "bad", head=0, pos=6), "attn_scores of layer 3, head 0, position 6"),
    ],
)
def test_an_edit_that_writes_it(edit, place, value):
    """Cell 1 of two is the bad one; the other one's value is finite, and huge."""
    model, pairs = make_model("llama"), make_pairs(((LENGTH, 2),))
    site = mk.hooks.SITES[edit.site]
    shape = [1, *(model.site_size(site.name, dim, LENGTH) for dim in site.dims)]
    values = {"bad": {(edit.site, edit.layer): torch.full(shape, value, dtype=torch.float64)}}
    values["fine"] = {("resid_pre", 1): torch.full((1, 1, model.d_model), 1e30, dtype=torch.float64)}
    cells = [(mk.Edit("resid_pre", 1, "fine"),), (edit,)]
    with pytest.raises(ValueError, match=rf"prompt 0 in cell 1 of 2, .* the first is .* in {place}"):
        mk.sweep(model, pairs.clean, cells, whole_vocabulary(pairs), values=values, progress=False)
    assert not model.has_hooks


def test_knocking_scores_out_is_no_fault():
    """-inf at some sources of a row is a way to knock attention out: where something else is not finite, that is named."""
    model, pairs = make_model("llama"), make_pairs(((LENGTH, 2),))
    scores = torch.zeros(1, 4, LENGTH, LENGTH, dtype=torch.float64)
    scores[..., 3:] = -torch.inf
    knock = mk.Edit("attn_scores", 1, "knock", head=2)
    bad = mk.Edit("mlp_out", 2, "bad", pos=6)
    values = {
        "knock": {("attn_scores", 1): scores},
        "bad": {("mlp_out", 2): torch.full((1, 1, model.d_model), torch.nan, dtype=torch.float64)},
    }
    sweep = {"values": values, "progress": False}
    fine = mk.sweep(model, pairs.clean, [(knock,)], whole_vocabulary(pairs), **sweep)
    assert bool(fine.values.isfinite().all())
    assert not torch.allclose(fine.values[0], fine.base, atol=1e-3)
    with pytest.raises(ValueError, match="NaN in mlp_out of layer 2, position 6"):
        mk.sweep(model, pairs.clean, [(knock, bad)], whole_vocabulary(pairs), **sweep)


def test_a_metric_that_is_infinite_of_its_own():
    """Where all logits are finite: an edited run may have it; an unedited one may not, and no activation is blamed."""
    model, pairs = make_model("llama"), make_pairs()
    plain = whole_vocabulary(pairs)

    def read(logits, prompt, reference):
        value = plain.read(logits, prompt, reference)
        return torch.where(torch.isclose(value, base[prompt], atol=1e-9), value, torch.inf)

    base = mk.activation_patching(model, pairs, plain, layers=[3], progress=False).baseline["corrupted"]
    metric = mk.Metric("m", "", len(pairs), plain.positions, None, read)
    found = mk.sweep(
        model,
        pairs.corrupted,
        [(mk.Edit("z", 0, "zero"),)],
        metric,
        progress=False,
        values={"zero": {("z", 0): torch.zeros(1, 1, 1, 1, dtype=torch.float64)}},
    )
    assert bool(found.values.isinf().all())
    with pytest.raises(ValueError, match=r"source run: .* the metric is not finite of its own"):
        mk.activation_patching(model, pairs, metric, progress=False)


def test_gradient_methods_and_readouts_name_it_too():
    model, weight = planted("gpt2", "mlp_out")
    with torch.no_grad():
        weight[:] = torch.inf
    pairs = make_pairs()
    place = rf"mlp_out of layer {LAYER}"
    with pytest.raises(ValueError, match=place):
        mk.attribution_patching(model, pairs, mk.logit_diff(pairs), site="z", over="layer head")
    with pytest.raises(ValueError, match=place):
        mk.logit_lens(model, pairs, value="log_prob", over="layer")
    with pytest.raises(ValueError, match=place):
        mk.hidden_states(model, pairs.clean, position=-1, layers=[N_LAYERS - 1], progress=False)
    assert not model.has_hooks


def test_a_gradient_that_is_not_finite_is_refused():
    """The runs are finite, and so is the metric; its square root has no gradient at 0. As NaN it would look like a cell that
    does not exist. Control: the same metric a little above 0."""
    model, pairs = make_model("llama"), make_pairs()

    def root(above: float) -> mk.Metric:
        plain = mk.logit_diff(pairs)

        def read(logits: torch.Tensor, prompt: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
            return (0 * plain.read(logits, prompt, reference) + above).sqrt()

        return mk.Metric("root", "", plain.n_prompts, plain.positions, plain.tokens, read, lengths=plain.lengths)

    assert torch.isfinite(mk.attribution_patching(model, pairs, root(1.0)).values).all()
    with pytest.raises(ValueError, match=r"gradient: expected finite effects at 'z' of layer \d"):
        mk.attribution_patching(model, pairs, root(0.0))
