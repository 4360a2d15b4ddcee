"""QK and OV circuits against whole matrices, and against the models' own forward passes."""

from __future__ import annotations

import pytest
import torch

import mechkit as mk
from helpers.families import D_VOCAB, FAMILIES, build_hf
from helpers.shapes import unchecked
from helpers.tiny import make_model, model_of
from mechkit import zoo
from mechkit.attribution._head_weights import embeddings, folded_weights, probe_attention
from mechkit.attribution.head_circuits import ov_circuit, ov_svd, qk_circuit, token_labels

# Hugging Face's RMSNorms compute in float32 even in a float64 model, and GPT-J's and GPT-Neo's scores are float32.
LAYER_NORM = {"gpt2", "gpt_neox", "gptj", "phi", "opt", "bloom", "gpt_neo", "falcon", "stablelm"}
FLOAT32 = {"gptj", "gpt_neo", "mixtral"}
SOME, OTHERS = [3, 9, 17, 40, 60], [5, 9, 22]


def tolerance(family: str) -> float:
    return 1e-8 if family in LAYER_NORM else 1e-5


def gain_of(norm: torch.nn.Module | None, d_model: int) -> torch.Tensor:
    """From the module's weights, class by class."""
    if norm is None:
        return torch.ones(d_model, dtype=torch.float64)
    weight = norm.original_component.weight.detach().double()
    return 1 + weight if type(norm.original_component).__name__.startswith("Gemma") else weight


def centred(x: torch.Tensor, family: str) -> torch.Tensor:
    return x - x.mean(-1, keepdim=True) if family in LAYER_NORM else x


def embedding(model: mk.HookedModel) -> torch.Tensor:
    """What the tokens put into the stream, family by family."""
    E = model.W_E
    if model.name.startswith("gemma"):
        E = E * model.bridge.embed.original_component.embed_scale.to(E.dtype)
    return model.bridge.embed_ln.original_component(E) if model.name == "bloom" else E


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_embeddings(family):
    model, tokens = model_of(family), torch.arange(3, 12)
    before = model(tokens)
    assert torch.allclose(embeddings(model, torch.arange(D_VOCAB)), embedding(model), atol=1e-12, rtol=0)
    assert not model.has_hooks
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ov_equals_whole_matrices(family):
    model = model_of(family)
    for layer, head in ((0, 0), (2, 3)):
        block = model.bridge.blocks[layer]
        kv_head = head // (model.n_heads // model.n_kv_heads)
        x = embedding(model)
        x = block.ln1.original_component(x) if hasattr(block, "ln1") else x
        written = (x @ model.W_V[layer, kv_head] + model.b_V[layer, kv_head]) @ model.W_O[layer, head]
        if hasattr(block, "ln1_post"):
            written = written * gain_of(block.ln1_post, model.d_model)
        whole = (centred(written.double(), family) * gain_of(model.bridge.ln_final, model.d_model)) @ model.W_U.double()
        some = ov_circuit(model, layer, head, SOME, OTHERS)
        assert some.dims == ("source", "output")
        size = float(whole.abs().max())
        assert torch.allclose(some.values.double(), whole[SOME][:, OTHERS], atol=tolerance(family) * size, rtol=0)
        everything = ov_circuit(model, layer, head, None, OTHERS)
        assert torch.allclose(everything.values.double(), whole[:, OTHERS], atol=tolerance(family) * size, rtol=0)
        assert torch.allclose(ov_circuit(model, layer, head, SOME).values[:, OTHERS], some.values, atol=1e-4 * size)


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama_mqa", "falcon", "gpt_neox", "gemma2", "olmo2", "bloom"])
@torch.no_grad()
def test_ov_is_what_the_model_does(family):
    """A prompt of one token attends to itself: the head's own output, read off a run in which the token's embedding alone is
    in the stream, through the real final norm divided by its scale."""
    model, layer, head = model_of(family), 1, 2
    x = embeddings(model, torch.tensor(SOME))[:, None]
    with model.hooks([(("resid_pre", layer), lambda _, hook: x.clone())]):
        _, cache = model.run_with_cache(torch.zeros(len(SOME), 1, dtype=torch.long), ("z", layer))
    written = cache["z", layer].reshape(len(SOME), model.n_heads, -1)[:, head] @ model.W_O[layer, head]
    if hasattr(model.bridge.blocks[layer], "ln1_post"):
        written = written * gain_of(model.bridge.blocks[layer].ln1_post, model.d_model)
    norm, middle = model.bridge.ln_final, centred(written, family)
    scale = (middle.pow(2).mean(-1, keepdim=True) + model.cfg.eps).rsqrt()
    bias = getattr(norm.original_component, "bias", None)
    normed = norm.original_component(written) - (0 if bias is None else bias)
    expected = normed / scale @ model.W_U
    found = ov_circuit(model, layer, head, SOME).values
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_qk_diagonal_is_the_models_own_score(family):
    """A prompt of one token: the score of a token on itself, at relative position 0."""
    model = model_of(family)
    for layer, head in ((0, 1), (3, 3)):
        x = embeddings(model, torch.tensor(SOME))[:, None]
        with model.hooks([(("resid_pre", layer), lambda _, hook, x=x: x.clone())]):
            _, cache = model.run_with_cache(torch.zeros(len(SOME), 1, dtype=torch.long), ("attn_scores", layer))
        expected = cache["attn_scores", layer][:, head, 0, 0].double()
        found = qk_circuit(model, layer, head, SOME, SOME).values.diagonal().double()
        assert torch.allclose(found, expected, atol=(1e-4 if family in FLOAT32 else 1e-5) * float(expected.abs().max()))
        assert float(expected.std()) > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neo", "bloom"])
@torch.no_grad()
def test_qk_is_the_models_own_score_of_two_tokens(family):
    """Without rotary turns the score of one token on another one before it is the circuit's; ALiBi is a known addition."""
    model, layer, head = model_of(family), 1, 2
    found = qk_circuit(model, layer, head, SOME, OTHERS)
    assert found.dims == ("dest", "source")
    for i, dest in enumerate(SOME):
        for j, source in enumerate(OTHERS):
            x = embeddings(model, torch.tensor([source, dest]))[None]
            with model.hooks([(("resid_pre", layer), lambda _, hook, x=x: x.clone())]):
                _, cache = model.run_with_cache(torch.zeros(1, 2, dtype=torch.long), ("attn_scores", layer))
            scores = cache["attn_scores", layer][0, head]
            assert abs(float(scores[1, 0]) - float(found.values[i, j])) < 1e-5 * float(found.values.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_qk_equals_the_product_of_queries_and_keys(family):
    """Off the diagonal too, with the norms spelled out."""
    model, layer, head = model_of(family), 2, 3
    block, kv_head = model.bridge.blocks[layer], 3 // (model.n_heads // model.n_kv_heads)
    x = embedding(model)
    x = block.ln1.original_component(x) if hasattr(block, "ln1") else x
    q = torch.einsum("tm,hmd->thd", x, model.W_Q[layer]) + model.b_Q[layer]
    k = torch.einsum("tm,hmd->thd", x, model.W_K[layer]) + model.b_K[layer]
    if family == "olmo2":
        q, k = block.attn.q_norm(q.flatten(1)).reshape(q.shape), block.attn.k_norm(k.flatten(1)).reshape(k.shape)
    elif family in ("qwen3", "gemma3"):
        q, k = block.attn.q_norm(q), block.attn.k_norm(k)
    scores = q[:, head].double() @ k[:, kv_head].double().mT * (1 if family == "gpt_neo" else model.d_head**-0.5)
    if family == "gemma2":
        scores = 50 * torch.tanh(scores / 50)
    found = qk_circuit(model, layer, head, SOME, OTHERS).values.double()
    size = float(scores.abs().max())
    assert torch.allclose(found, scores[SOME][:, OTHERS], atol=(1e-5 if family in FLOAT32 else 1e-9) * size, rtol=0)
    whole = qk_circuit(model, layer, head, SOME).values.double()
    assert torch.allclose(whole[:, OTHERS], found, atol=1e-5 * size, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama_mqa", "gemma2", "olmo2", "falcon", "bloom"])
@torch.no_grad()
def test_svd_is_the_svd_of_the_whole_matrix(family):
    model, layer, head = model_of(family), 1, 2
    weights = next(folded_weights(model, [layer]))
    whole = weights.W_V[head] @ weights.W_O[head]
    found = ov_svd(model, layer, head, k=4, top=3)
    expected = torch.linalg.svdvals(whole.double())
    assert torch.allclose(found.singular_values.values.double(), expected[: model.d_head], atol=1e-9, rtol=0)
    assert float(expected[model.d_head :].max()) < 1e-9
    read, write = found.read_vectors.values, found.write_vectors.values
    sizes = found.singular_values.values[:4]
    assert torch.allclose(read @ whole, sizes[:, None] * write, atol=1e-8)
    assert torch.allclose(read @ read.mT, torch.eye(4, dtype=read.dtype), atol=1e-9)
    assert torch.allclose(write @ write.mT, torch.eye(4, dtype=read.dtype), atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "falcon", "bloom"])
@torch.no_grad()
def test_all_directions_sum_to_the_ov_circuit(family):
    """`Σ singular_value * read * write` of the tokens is the OV circuit, up to a constant of the biases for each output."""
    model, layer, head = model_of(family), 1, 2
    found = ov_svd(model, layer, head, k=model.d_head, top=D_VOCAB)
    read, write = (torch.zeros(model.d_head, D_VOCAB, dtype=model.dtype) for _ in range(2))
    for i, direction in enumerate(found.directions):
        for score in direction.reads:
            read[i, score.id] = score.value
        for score in direction.writes:
            write[i, score.id] = score.value
        assert [s.value for s in direction.reads] == sorted((s.value for s in direction.reads), reverse=True)
        assert [s.id for s in direction.reads_negative] == [s.id for s in direction.reads][::-1]
        assert abs(direction.writes[0].value) >= abs(direction.writes_negative[0].value)  # the sign's convention
    total = torch.einsum("k,ks,ko->so", found.singular_values.values, read, write)
    # The whole vocabulary against itself, in two halves.
    circuit = torch.cat([ov_circuit(model, layer, head, part, None).values for part in torch.arange(D_VOCAB).split(31)])
    bias = circuit - total
    size = float(circuit.abs().max())
    assert float((bias - bias[:1]).abs().max()) < tolerance(family) * size
    assert float((total - total[:1]).abs().max()) > 0.1 * size  # control: what is compared is not a constant


def test_svd_signs_are_the_same_every_time():
    model = make_model("llama")
    first, again = ov_svd(model, 1, 2, k=3, top=4), ov_svd(model, 1, 2, k=3, top=4)
    assert first.directions == again.directions
    flipped = make_model("llama")
    with torch.no_grad():  # the same OV matrix from other factors: both negated
        attention = flipped.bridge.blocks[1].attn.original_component
        attention.v_proj.original_component.weight.neg_()
        attention.o_proj.original_component.weight.neg_()
    for a, b in zip(first.directions, ov_svd(flipped, 1, 2, k=3, top=4).directions, strict=True):
        assert [s.id for s in a.writes] == [s.id for s in b.writes]
        assert [s.id for s in a.reads_negative] == [s.id for s in b.reads_negative]


def test_known_circuits():
    """The hand-written induction head copies: each token raises its own logit and no other. Its matching is K-composition, so
    its QK circuit on embeddings alone has nothing on the diagonal that stands out from below; the control heads write nothing."""
    known = zoo.induction()
    tokens = list(range(1, 12))
    ov = ov_circuit(known.model, 1, 0, tokens, tokens).values
    off = ov - torch.diag(ov.diagonal())
    assert float(ov.diagonal().min()) > 0
    assert float(off.abs().max()) < 1e-6 * float(ov.diagonal().min())
    control = ov_circuit(known.model, *known.roles["control"][0], tokens, tokens).values
    assert float(control.abs().max()) < 1e-9 * float(ov.diagonal().min())
    qk = qk_circuit(known.model, 1, 0, tokens, tokens).values
    # -60 where the source's own token is the destination's (100 * -0.6), the same elsewhere.
    rest = qk[~torch.eye(len(tokens), dtype=torch.bool)]
    assert float(rest.std()) < 1e-3
    assert torch.allclose(qk.diagonal() - rest.mean(), torch.full((11,), -60.0, dtype=qk.dtype), atol=1e-2)


def test_labels():
    model = make_model("gpt2")
    result = ov_circuit(model, 0, 0, [5, 3], torch.tensor([7]))
    assert result.coords["source"] == ("5", "3")
    assert result.coords["output"] == ("7",)
    alone = ov_circuit(model, 0, 0, 3, 7).values[0]
    assert torch.allclose(result.sel(source="3").values, alone, atol=1e-12)
    assert not torch.allclose(result.sel(source="5").values, alone, atol=1e-3)

    class Repeating:
        def to_str_tokens(self, ids):
            return ["a", "a", "b", "a (0)"]

    with unchecked():  # it is no model
        labels = token_labels(Repeating(), torch.tensor([0, 1, 2, 3]))
    assert labels == ("a (0)", "a (1)", "b (2)", "a (0) (3)")
    assert len(set(labels)) == 4


def test_a_model_that_its_weights_do_not_describe_is_refused():
    """Controls for the probe: attention that scales its values, its scores, or its output in ways the weights do not say."""
    for site, what in (("v", "values"), ("attn_out", "output")):
        model = make_model("llama")
        with (
            model.hooks([((site, 1), lambda x, hook: x * 2)]),
            pytest.raises(ValueError, match=f"attention {what} of layer 1"),
        ):
            ov_circuit(model, 1, 0, [3], [4])
    model = make_model("llama")
    with (
        model.hooks([(("attn_scores", 1), lambda x, hook: x.abs())]),
        pytest.raises(ValueError, match="attention scores of layer 1"),
    ):
        qk_circuit(model, 1, 0, [3], [4])
    ov_circuit(model, 1, 0, [3], [4])
    assert not model.has_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_finds_the_attention_scale(family):
    scales = probe_attention(model_of(family), [0, 3])
    expected = 1.0 if family == "gpt_neo" else 8**-0.5
    assert all(abs(scale - expected) < 1e-6 for scale in scales.values())


def test_errors():
    model = make_model("gpt2")
    for message, call in (
        ("source_tokens or output_tokens", lambda: ov_circuit(model, 0, 0)),
        ("dest_tokens or source_tokens", lambda: qk_circuit(model, 0, 0)),
        ("source_tokens: expected distinct", lambda: ov_circuit(model, 0, 0, [3, 3], [4])),
        ("output_tokens: expected distinct", lambda: ov_circuit(model, 0, 0, [3], [D_VOCAB])),
        ("dest_tokens: expected distinct", lambda: qk_circuit(model, 0, 0, [], [4])),
        ("source_tokens: gpt2 was loaded without a tokenizer", lambda: ov_circuit(model, 0, 0, [" Mary"], [4])),
        ("layer: expected", lambda: ov_circuit(model, 4, 0, [3], [4])),
        ("head: expected", lambda: qk_circuit(model, 0, 4, [3], [4])),
        ("k: expected 1..8", lambda: ov_svd(model, 0, 0, k=9)),
        ("top: expected", lambda: ov_svd(model, 0, 0, k=2, top=0)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    model.train()
    for call in (
        lambda: ov_circuit(model, 0, 0, [3]),
        lambda: qk_circuit(model, 0, 0, [3]),
        lambda: ov_svd(model, 0, 0, k=2),
    ):
        with pytest.raises(ValueError, match="evaluation mode"):
            call()


def test_half_precision_is_close():
    full = mk.HookedModel.from_hf(build_hf("llama", torch.float32))
    half = mk.HookedModel.from_hf(build_hf("llama", torch.bfloat16))
    for call in (lambda m: ov_circuit(m, 1, 2, SOME), lambda m: qk_circuit(m, 1, 2, SOME)):
        a, b = call(full).values, call(half).values
        assert b.dtype == torch.float32
        assert float((a - b).abs().max()) < 0.05 * float(a.abs().max())


def test_smollm2_copies_names(smollm2):
    """Two heads whose copying score is nearly 1 raise each name's own logit most, and one at -1 lowers it most."""
    names = [" Mary", " John", " Tom", " Sarah"]
    for layer, head, sign in ((27, 1, 1), (28, 5, 1), (11, 6, -1)):
        result = ov_circuit(smollm2, layer, head, names, names)
        assert result.coords["source"] == result.coords["output"] == tuple(names)
        assert torch.equal((sign * result.values).argmax(1), torch.arange(4))
