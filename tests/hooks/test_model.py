"""HookedModel: loading, running, hooking, caching; and that nothing stays behind."""

from __future__ import annotations

import copy

import pytest
import torch

import mechkit as mk
from helpers.families import D_VOCAB, FAMILIES, N_LAYERS, build_hf
from helpers.tiny import make_model
from mechkit.hooks import SITES

TOKENS = torch.randint(3, D_VOCAB, (2, 6), generator=torch.Generator().manual_seed(3))


def hooks_left(model: mk.HookedModel) -> int:
    points = model.bridge.hook_dict.values()
    on_points = sum(
        len(p.fwd_hooks) + len(p.bwd_hooks) + len(p._forward_hooks) + len(p._backward_hooks) for p in points
    )
    modules = [m.__dict__ for m in model.bridge.modules()]
    patched = sum(("forward" in m) + ("_mechkit_result_seam" in m) + ("_mechkit_softmax_seam" in m) for m in modules)
    return on_points + patched + sum(len(m["_forward_hooks"]) + len(m["_forward_pre_hooks"]) for m in modules)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_hugging_face_and_validates(family):
    dtype = torch.float32 if family == "mixtral" else torch.float64
    reference = build_hf(family, dtype)
    with torch.no_grad():
        expected = reference(TOKENS).logits
    model = make_model(family)
    assert torch.allclose(model(TOKENS), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    report = model.validate()
    assert report.logits is not None
    assert report.logits <= report.tolerance
    assert report.unembed <= report.tolerance


def test_validation_finds_a_model_that_is_computed_wrongly():
    model = make_model("gpt2")
    model.bridge.blocks[1].mlp.register_forward_hook(lambda module, args, output: output * 1.1)
    with pytest.raises(ValueError, match="logits against the Hugging Face model differ"):
        model.validate()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_listed_site_is_cached_with_its_shape(family):
    model = make_model(family)
    _, cache = model.run_with_cache(TOKENS, list(model.sites))
    batch, length = TOKENS.shape
    shapes = {"pos": length, "src": length, "d_head": model.d_head, "d_model": model.d_model}
    for name in model.sites:
        site = SITES[name]
        activation = cache[name, N_LAYERS - 1] if site.in_block else cache[name]
        heads = model.n_kv_heads if name in ("k", "v") else model.n_heads
        expected = [shapes.get(dim, heads if dim == "head" else activation.shape[-1]) for dim in site.dims]
        assert list(activation.shape) == [batch, *expected]
        assert torch.equal(cache[site.hook_name(N_LAYERS - 1)], activation)


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama_mqa", "gemma2", "gptj", "opt", "falcon", "olmo2"])
@torch.no_grad()
def test_edits_at_every_site_change_the_logits_and_hooks_come_off(family):
    model = make_model(family)
    before = hooks_left(model)
    plain = model(TOKENS)
    for name in model.sites:
        where = (name, 1) if SITES[name].in_block else name
        changed = model.run_with_hooks(TOKENS, [(where, lambda x, hook: x * 0.5 + 0.1)])
        assert float((changed - plain).abs().max()) > 1e-6, name
        looked_at = model.run_with_hooks(TOKENS, [(where, lambda x, hook: None)])
        assert torch.equal(looked_at, plain), name
    assert hooks_left(model) == before


@torch.no_grad()
def test_heads_sum_to_attention_output_and_result_edits_act_on_it():
    model = make_model("llama")
    _, cache = model.run_with_cache(TOKENS, ["result", "attn_out", "z"])
    total = cache["result", 2].sum(-2) + model.b_O[2]
    assert torch.allclose(total, cache["attn_out", 2], atol=1e-12)

    def drop_head(x, hook):
        x[:, :, 1] = 0
        return x

    by_result = model.run_with_hooks(TOKENS, [(("result", 2), drop_head)])
    by_z = model.run_with_hooks(TOKENS, [(("z", 2), drop_head)])
    assert torch.allclose(by_result, by_z, atol=1e-12)
    assert float((by_result - model(TOKENS)).abs().max()) > 1e-3


def test_resid_mid_is_the_residual_stream():
    """A *returned* tensor must replace what the residual connection carries too, not only what the MLP reads."""
    model = make_model("llama")
    other = torch.flip(TOKENS, dims=[0])
    _, cache = model.run_with_cache(other, ("resid_mid", 1))
    patched = model.run_with_hooks(TOKENS, [(("resid_mid", 1), lambda x, hook: cache["resid_mid", 1].clone())])
    assert torch.allclose(patched, model(other), atol=1e-12)


@pytest.mark.parametrize("family", ["gptj", "opt", "gpt_neo", "llama"])
@torch.no_grad()
def test_attention_sites_where_hugging_face_computes_attention(family):
    model = make_model(family)
    _, cache = model.run_with_cache(TOKENS, ["pattern", "attn_scores"])
    softmax, pattern = cache["attn_scores", 1].softmax(-1).double(), cache["pattern", 1].double()
    assert torch.allclose(softmax, pattern, atol=1e-6)
    assert torch.allclose(pattern.sum(-1), torch.ones(1, dtype=torch.float64), atol=1e-6)
    assert float(pattern[:, :, 0, 1:].abs().max()) == 0  # causal


def test_backward_hooks_get_gradients():
    model = make_model("llama")
    for name in ("z", "result", "pattern", "resid_pre", "mlp_post"):
        gradients = []
        with model.hooks(bwd_hooks=[((name, 1), lambda g, hook, into=gradients: into.append(g.clone()))]):
            model(TOKENS)[:, -1].sum().backward()
        assert gradients, name
        assert float(gradients[0].abs().max()) > 0, name
    # The gradient of a head's result is that of the attention output, for every head.
    found = {}
    with model.hooks(
        bwd_hooks=[
            (("result", 1), lambda g, hook: found.__setitem__("result", g.clone())),
            (("attn_out", 1), lambda g, hook: found.__setitem__("attn_out", g.clone())),
        ]
    ):
        model(TOKENS)[:, -1].sum().backward()
    assert torch.allclose(found["result"], found["attn_out"][:, :, None].expand_as(found["result"]), atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "gpt_neo", "olmo2"])
def test_gradients_equal_finite_differences(family):
    """The derivative of a logit in a random direction of each activation; `resid_mid` must count the whole stream."""
    model = make_model(family)
    for name in ("resid_pre", "resid_mid", "z", "attn_out", "mlp_out", "resid_post"):
        found, step = {}, 1e-4
        with model.hooks(bwd_hooks=[((name, 1), lambda g, hook, into=found: into.__setitem__("g", g.clone()))]):
            model(TOKENS)[:, -1, 7].sum().backward()
        change = torch.randn(found["g"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            up, down = (
                model.run_with_hooks(TOKENS, [((name, 1), lambda x, hook, d=s * step * change: x + d)])[:, -1, 7].sum()
                for s in (1, -1)
            )
        expected = float(up - down) / (2 * step)
        assert float((found["g"] * change).sum()) == pytest.approx(expected, rel=0.02, abs=1e-3), name


# Where each family's block first reads the stream between attention and MLP.
MIDDLE = {
    "gpt2": "ln_2",
    "llama": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "bloom": "post_attention_layernorm",
    "olmo2": "mlp",
}


@pytest.mark.parametrize("family", MIDDLE)
def test_an_edit_of_the_gradient_at_resid_mid_acts_on_the_whole_stream(family):
    """Against the Hugging Face model with a tensor hook of one's own; the block's input has all that comes back."""
    plain = build_hf(family)
    model, names = mk.HookedModel.from_hf(copy.deepcopy(plain)), []
    blocks = next(m for m in plain.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == N_LAYERS)

    def expected(factor: float) -> torch.Tensor:
        kept: dict[str, torch.Tensor] = {}

        def enter(_, args, kwargs):
            kept["x"] = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
            return (kept["x"], *args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}

        def middle(_, args):
            args[0].register_hook(lambda grad: grad * factor)

        handles = [
            blocks[1].register_forward_pre_hook(enter, with_kwargs=True),
            blocks[1].get_submodule(MIDDLE[family]).register_forward_pre_hook(middle),
        ]
        loss = plain(TOKENS).logits[:, -1, 7].sum()
        for handle in handles:
            handle.remove()
        return torch.autograd.grad(loss, kept["x"])[0]

    def found(factor: float) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def scale(grad, hook):
            names.append(hook.name)
            return grad * factor

        backward = [(("resid_mid", 1), scale), (("resid_pre", 1), lambda grad, hook: seen.append(grad.clone()))]
        with model.hooks(bwd_hooks=backward):
            model(TOKENS)[:, -1, 7].sum().backward()
        return seen[0]

    for factor in (1.0, 0.0, -2.0):
        assert torch.allclose(found(factor), expected(factor), atol=1e-12), factor
    assert float(expected(1.0).abs().max()) > 1e-3
    assert set(names) == {"blocks.1.hook_resid_mid"}
    assert not model.has_hooks


def test_backward_functions_at_resid_mid_see_the_stream_after_all_edits_in_their_order():
    model, seen, kept = make_model("llama"), [], []
    mid, pre = ("resid_mid", 1), ("resid_pre", 1)
    edit = (mid, lambda x, hook: x * torch.tensor(3.0, dtype=torch.float64))
    twice_then_one_more = [(mid, lambda g, hook: g * 2), (mid, lambda g, hook: g + 1)]
    with (
        model.hooks(bwd_hooks=twice_then_one_more),
        model.hooks([edit], [(pre, lambda g, hook: seen.append(g.clone()))]),
    ):
        model(TOKENS)[:, -1, 7].sum().backward()
    with model.hooks([edit], [(mid, lambda g, hook: kept.append(g.clone()))]):
        model(TOKENS)[:, -1, 7].sum().backward()
    # From the gradient at resid_mid on, back through the block's first half alone.
    start, middle = [], []
    enter = (pre, lambda x, hook: start.append(x.detach().requires_grad_()) or start[0])
    model.run_with_hooks(TOKENS, [enter, edit, (mid, lambda x, hook: middle.append(x))])
    expected = torch.autograd.grad(middle[0], start[0], kept[0] * 2 + 1)[0]
    assert torch.allclose(seen[0], expected, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_a_hook_has_the_name_that_it_was_attached_under(family):
    model, names = make_model(family), {}
    for direction in ("fwd", "bwd"):
        for site in [name for name in model.sites if name != "embed"]:
            (full,) = model.hook_names((site, 1))

            def note(x, hook, key=(full, direction)):
                names.setdefault(key, hook.name)

            hooks = [(full, note)]
            with model.hooks(*((hooks, ()) if direction == "fwd" else ((), hooks))):
                model(TOKENS)[:, -1, 7].sum().backward()
    assert {key[0]: name for key, name in names.items() if key[0] != name} == {}


def test_edits_of_resid_mid_can_be_differentiated():
    model, scale = make_model("llama"), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    model.run_with_hooks(TOKENS, [(("resid_mid", 1), lambda x, hook: x * scale)])[:, -1, 7].sum().backward()
    assert scale.grad is not None
    assert float(scale.grad.abs()) > 1e-6


@pytest.mark.parametrize("family", ["llama", "gptj", "opt"])
@torch.no_grad()
def test_hooks_on_one_site_run_in_order_and_are_seen_by_the_cache(family):
    model = make_model(family)

    def drop(x, hook):
        x = x.clone()
        x[:, :, 0] = 0
        return x

    for name in ("pattern", "result", "z", "resid_mid"):
        if not model.has_site(name):
            continue
        where = (name, 1)
        two = model.run_with_hooks(TOKENS, [(where, lambda x, hook: x * 0.5), (where, lambda x, hook: x + 0.1)])
        one = model.run_with_hooks(TOKENS, [(where, lambda x, hook: x * 0.5 + 0.1)])
        assert torch.allclose(two, one, atol=1e-12), name
        with model.hooks([(where, lambda x, hook: x * 0)]):
            _, cache = model.run_with_cache(TOKENS, where)
        assert float(cache[where].abs().max()) == 0, name
    by_order = [
        model.run_with_hooks(TOKENS, hooks)
        for hooks in (
            [(("result", 1), drop), (("z", 1), lambda x, hook: x * 2)],
            [(("z", 1), lambda x, hook: x * 2), (("result", 1), drop)],
        )
    ]
    assert torch.allclose(*by_order, atol=1e-12)


def test_nothing_is_left_after_an_exception():
    model = make_model("gptj")
    before, plain = hooks_left(model), model(TOKENS)

    def fails(x, hook):
        raise RuntimeError("on purpose")

    for name in ("z", "result", "pattern", "resid_mid"):
        if not model.has_site(name):
            continue
        with pytest.raises(RuntimeError, match="on purpose"):
            model.run_with_hooks(TOKENS, [((name, 1), fails)])
    with pytest.raises(KeyError), model.hooks([(("z", 0), lambda x, hook: x * 0)]):
        raise KeyError
    assert hooks_left(model) == before
    assert torch.equal(model(TOKENS), plain)


def test_names_that_match_nothing_raise():
    model = make_model("llama")
    for names in ("blocks.0.attn.hook_zz", "zz", ("z", 99), ["z", "nope"], lambda name: False):
        with pytest.raises(ValueError, match=r"hook name|layer|names"):
            model.run_with_cache(TOKENS, names)
        with pytest.raises(ValueError, match=r"hook name|layer|names"):
            model.run_with_hooks(TOKENS, [(names if not isinstance(names, list) else names[1], lambda x, hook: x)])
    with pytest.raises(ValueError, match="does not exist in gpt_neox"):
        make_model("gpt_neox").run_with_cache(TOKENS, "resid_mid")


def test_a_hook_that_never_fires_says_so():
    with pytest.raises(ValueError, match="never fired"):
        make_model("llama").run_with_hooks(TOKENS, [("blocks.0.attn.hook_q_input", lambda x, hook: x)])


def test_a_hook_that_returns_another_shape_is_refused():
    model = make_model("llama")
    with pytest.raises(ValueError, match=r"hook on blocks.0.attn.hook_z: expected .* got"):
        model.run_with_hooks(TOKENS, [(("z", 0), lambda x, hook: x[:, :1])])


def test_cache_positions_dtype_names_and_stack():
    model = make_model("llama")
    _, full = model.run_with_cache(TOKENS)
    _, last = model.run_with_cache(TOKENS, ["z", "pattern"], positions=-1, dtype=torch.float32)
    assert last["z", 0].shape == (2, model.n_heads, model.d_head)
    assert last["z", 0].dtype == torch.float32
    assert torch.equal(last["z", 0], full["z", 0][:, -1].float())
    assert torch.equal(last["pattern", 0], full["pattern", 0][:, :, -1].float())
    _, some = model.run_with_cache(TOKENS, ("z", 1), positions=[0, 2])
    assert torch.equal(some["z", 1], full["z", 1][:, [0, 2]])
    assert torch.equal(full["z"], torch.stack([full["z", layer] for layer in range(N_LAYERS)]))
    assert torch.equal(full["z", -1], full[f"blocks.{N_LAYERS - 1}.attn.hook_z"])
    assert ("z", 0) in full
    assert ("z", 99) not in full
    assert "result" not in {name.rsplit("hook_", 1)[-1] for name in full}
    with pytest.raises(KeyError, match="1 of 4 layers"):
        some["z"]
    with pytest.raises(KeyError, match="not in this cache"):
        some["k", 0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama_mqa", "falcon", "gpt_neox"])
def test_weights_by_head_compute_what_the_model_computes(family):
    model = make_model(family)
    _, cache = model.run_with_cache(TOKENS, ["z", "blocks.1.attn.hook_in", "v", "result"])
    assert model.W_Q.shape == (N_LAYERS, model.n_heads, model.d_model, model.d_head)
    assert model.W_K.shape == (N_LAYERS, model.n_kv_heads, model.d_model, model.d_head)
    assert model.W_O.shape == (N_LAYERS, model.n_heads, model.d_head, model.d_model)
    normed = cache["blocks.1.attn.hook_in"]
    v = torch.einsum("bpm,hmd->bphd", normed, model.W_V[1]) + model.b_V[1]
    assert torch.allclose(v, cache["v", 1], atol=1e-10)
    assert model.W_U.shape == (model.d_model, model.d_vocab)
    assert model.W_E.shape == (model.d_vocab, model.d_model)


def test_padded_texts_give_the_logits_of_each_alone(smollm2):
    texts = ["Paris is the capital of", "The cat sat on the mat and the dog sat on the"]
    together = smollm2(texts)
    for i, text in enumerate(texts):
        alone = smollm2(text)
        assert torch.allclose(together[i, : alone.shape[1]], alone[0], atol=2e-4)


def test_left_padding_without_a_mask_is_refused(smollm2):
    tokens = smollm2.to_tokens("Paris is the capital of", prepend_bos=False)
    pad = torch.full((1, 3), smollm2.tokenizer.pad_token_id)
    padded = torch.cat([pad, tokens], 1)
    with pytest.raises(ValueError, match="begin with padding"):
        smollm2(padded)
    with pytest.raises(ValueError, match="begins with padding"):
        mk.Prompts.from_tokens(padded, smollm2)
    mask = torch.cat([torch.zeros_like(pad), torch.ones_like(tokens)], 1)
    assert torch.allclose(smollm2(padded, attention_mask=mask)[:, 3:], smollm2(tokens), atol=2e-4)


def test_tokens(smollm2):
    text = "When Mary and John"
    tokens = smollm2.to_tokens(text)
    assert smollm2.to_str_tokens(text, prepend_bos=False) == ["When", " Mary", " and", " John"]
    assert smollm2.to_string(tokens[0, 1:]) == text
    assert smollm2.to_tokens(text).shape == (1, 5)
    assert smollm2.to_single_token(" Mary") == int(tokens[0, 2])
    with pytest.raises(ValueError, match=r"single token, but it is \d"):
        smollm2.to_single_token(" Hippopotamus")
    with pytest.raises(ValueError, match="without a tokenizer"):
        make_model("llama").to_tokens("a")


def test_generation_with_hooks(smollm2):
    prompt = "The capital of France is"
    plain = smollm2.generate(prompt, max_new_tokens=3)
    assert "Paris" in plain
    with smollm2.hooks([("resid_pre", lambda x, hook: x * 0.0)]):
        broken = smollm2.generate(prompt, max_new_tokens=3)
    assert broken != plain
    assert smollm2.generate(prompt, max_new_tokens=3) == plain


def test_loading_refuses_what_is_not_there():
    with pytest.raises(ValueError, match="no such folder"):
        mk.HookedModel.from_pretrained("./no/such/folder")
    with pytest.raises(ValueError, match="expected a GGUF file"):
        mk.HookedModel.from_pretrained("nowhere.gguf")


def test_local_folder_round_trip(tmp_path):
    hf = build_hf("llama", torch.float32)
    hf.save_pretrained(tmp_path)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(D_VOCAB)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), bos_token="w0"
    ).save_pretrained(tmp_path)
    model = mk.HookedModel.from_pretrained(tmp_path, device="cpu")
    with torch.no_grad():
        assert torch.allclose(model(TOKENS), hf(TOKENS).logits, atol=1e-5)


def test_bridge_in_compatibility_mode_is_refused():
    bridge = make_model("gpt2", torch.float32).bridge
    assert mk.HookedModel.from_bridge(bridge)(TOKENS).shape == (2, 6, D_VOCAB)
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(ValueError, match="compatibility mode"):
        mk.HookedModel.from_bridge(bridge)


def test_weights_hash_follows_the_weights():
    model, twin = make_model("llama"), make_model("llama")
    assert model.weights_hash == twin.weights_hash
    with torch.no_grad():
        twin.bridge.blocks[0].mlp.out.original_component.weight[3, 5] += 1e-3
    assert model.weights_hash != twin.weights_hash
