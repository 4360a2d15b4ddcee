"""The hand-built models do what their docstrings say: what each head attends to, what it writes, and what follows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

import mechkit as mk
from helpers.families import D_VOCAB, FAMILIES, build_hf
from helpers.reference_circuits import (
    edge_names,
    patch_edge,
    patch_edges,
    reader_names,
    run_circuit,
    run_circuits,
    whole_run,
    writers_of,
)
from mechkit import zoo
from mechkit.engine import Edit
from mechkit.hooks import SITES
from mechkit.zoo import _build, _cue, _greater_than, _induction, _saturated, _serial_ioi

MODELS: dict[str, Callable[..., zoo.Known]] = {
    "induction": zoo.induction,
    "linear": zoo.linear,
    "saturated query": lambda **kwargs: zoo.saturated_attention("query", **kwargs),
    "saturated key": lambda **kwargs: zoo.saturated_attention("key", **kwargs),
    "cancellation": zoo.cancellation,
    "writer and eraser": zoo.writer_and_eraser,
    "serial ioi": zoo.serial_ioi,
    "greater than": zoo.greater_than,
}
WITH_CIRCUIT = [name for name in MODELS if name != "linear"]


@pytest.fixture(scope="module", params=MODELS)
def known(request: pytest.FixtureRequest) -> zoo.Known:
    return MODELS[request.param]()


def rows(prompts: mk.Prompts) -> list[Tensor]:
    return [row[None] for row in prompts.tokens]


def cache_of(model: mk.HookedModel, tokens: Tensor, *names) -> mk.ActivationCache:
    with torch.no_grad():
        return model.run_with_cache(tokens, list(names) or None)[1]


def read(known: zoo.Known, logits: Tensor, prompt: int) -> Tensor:
    """The metric of one prompt, from all of its logits `[1 pos d_vocab]`."""
    at = logits[:, known.metric.positions[prompt]]
    return known.metric.read(at[:, known.metric.tokens], torch.tensor([prompt]), None)[0]


def gradients(known: zoo.Known, site: str, layer: int, *, keep: Mapping[str, Callable] | None = None) -> list[Tensor]:
    """For each pair, the gradient of the metric at the corrupted run with respect to one activation `[*dims]`.

    `keep` are further hooks, e.g. to cut a path.
    """
    found = []
    for i, tokens in enumerate(rows(known.pairs.corrupted)):
        kept: list[Tensor] = []

        def leaf(x: Tensor, hook, kept: list[Tensor] = kept) -> Tensor:
            kept.append(x.detach().clone().requires_grad_())
            return kept[0]

        hooks = [((site, layer), leaf), *(keep or {}).items()]
        logits = known.model.run_with_hooks(tokens, hooks)
        found.append(torch.autograd.grad(read(known, logits, i), kept[0])[0][0])
    return found


def changes(known: zoo.Known, site: str, layer: int) -> list[Tensor]:
    """For each pair, clean minus corrupted activation `[*dims]`."""
    clean, corrupted = (
        [cache_of(known.model, tokens, (site, layer))[site, layer][0] for tokens in rows(prompts)]
        for prompts in (known.pairs.clean, known.pairs.corrupted)
    )
    return [a - b for a, b in zip(clean, corrupted, strict=True)]


def estimates(known: zoo.Known, site: str, layer: int, **kwargs) -> Tensor:
    """Gradient times change, the plain estimate of attribution patching: `[head prompt]`, or `[prompt]` without heads."""
    axis = SITES[site].axis("head") - 1 if "head" in SITES[site].dims else None
    found = []
    for slope, change in zip(gradients(known, site, layer, **kwargs), changes(known, site, layer), strict=True):
        product = slope * change
        found.append(product.sum() if axis is None else product.movedim(axis, 0).flatten(1).sum(-1))
    return torch.stack(found, -1)


def effects(known: zoo.Known, site: str, over: str = "layer head", **kwargs) -> Tensor:
    """Exact effects of patching, patched minus corrupted, by the library and once more by whole forward passes."""
    patched = mk.activation_patching(known.model, known.pairs, known.metric, site, over, progress=False, **kwargs)
    assert patched.provenance["replay"] == "suffix"
    whole = mk.activation_patching(
        known.model, known.pairs, known.metric, site, over, progress=False, replay=False, **kwargs
    )
    assert torch.allclose(patched.values, whole.values, atol=1e-10, rtol=0, equal_nan=True)
    return patched.effect().values


def baselines(known: zoo.Known) -> Mapping[str, Tensor]:
    return mk.activation_patching(known.model, known.pairs, known.metric, progress=False).baseline


def zero_ablation(known: zoo.Known, site: str = "z", over: str = "layer head") -> Tensor:
    """Effects of zeroing, ablated minus clean."""
    ablated = mk.ablation(known.model, known.pairs, known.metric, site, over, mode="zero", progress=False)
    assert ablated.provenance["replay"] == "suffix"
    return ablated.effect().values


def contributions(known: zoo.Known, prompts: mk.Prompts) -> dict[tuple[int, int | None], Tensor]:
    """What each head and MLP adds to the metric directly `[prompt]`: the metric with it minus without it at the end."""
    model, found = known.model, {}
    for i, tokens in enumerate(rows(prompts)):
        cache = cache_of(model, tokens, "result", "mlp_out", ("resid_post", model.n_layers - 1))
        final = cache["resid_post", model.n_layers - 1]
        whole = read(known, model.unembed(final), i)
        for layer in range(model.n_layers):
            parts = {head: cache["result", layer][:, :, head] for head in range(model.n_heads)}
            for head, part in (parts | {None: cache["mlp_out", layer]}).items():
                without = read(known, model.unembed(final - part), i)
                found.setdefault((layer, head), []).append((whole - without).detach())
    return {component: torch.stack(values) for component, values in found.items()}


# --- every model


def test_the_hooked_model_is_sound(known):
    model = known.model
    assert model.dtype == torch.float64
    assert not model.training
    assert not model.has_hooks
    model.validate()
    assert known.metric.name == "logit_diff"
    assert known.metric.n_prompts == len(known.pairs)
    base = baselines(known)
    assert float((base["clean"] - base["corrupted"]).abs().min()) > 0.1


def test_each_head_and_mlp_has_one_role(known):
    roles = [component for role in known.roles.values() for component in role]
    assert len(roles) == len(set(roles))
    heads = {(layer, head) for layer in range(known.model.n_layers) for head in range(known.model.n_heads)}
    assert {component for component in roles if component[1] is not None} == heads
    with pytest.raises(TypeError):
        known.roles["linear"] = ()


def test_norms_are_a_constant_scaling_that_the_gain_undoes(known):
    """Each pair of dimensions comes out of every norm as it went in, and the scale is the same everywhere."""
    model = known.model
    norms = ["ln_final", *(f"blocks.{layer}.{ln}" for layer in range(model.n_layers) for ln in ("ln1", "ln2"))]
    expected = math.sqrt(2 * _build.BALLAST**2 / model.d_model)
    for tokens in rows(known.pairs.clean) + rows(known.pairs.corrupted):
        cache = cache_of(
            model, tokens, *(f"{norm}.{hook}" for norm in norms for hook in ("hook_in", "hook_out", "hook_scale"))
        )
        for norm in norms:
            before, after = (cache[f"{norm}.{hook}"][..., :-2] for hook in ("hook_in", "hook_out"))
            assert torch.equal(before[..., ::2], -before[..., 1::2])
            features, out = before[..., ::2], (after[..., ::2] - after[..., 1::2]) / 2
            assert float(features.abs().max()) >= 0.5
            assert torch.allclose(out, features, atol=1e-11, rtol=1e-11)
            assert torch.allclose(cache[f"{norm}.hook_scale"] / expected, torch.ones(1).double(), atol=1e-11, rtol=0)


@torch.no_grad()
def test_nothing_reads_or_writes_the_ballast(known):
    model = known.model
    ballast = torch.tensor([_build.BALLAST, -_build.BALLAST]).double()
    assert torch.equal(model.W_E[:, -2:], ballast.expand(model.d_vocab, 2))
    for reads in (model.W_Q, model.W_K, model.W_V, model.W_in, model.W_U):
        assert float(reads[..., -2:, :].abs().max()) == 0
        assert torch.equal(reads[..., :-2:2, :], -reads[..., 1:-2:2, :])
    for writes in (model.W_pos, model.W_O, model.b_O, model.W_out):
        assert float(writes[..., -2:].abs().max()) == 0
        assert torch.equal(writes[..., :-2:2], -writes[..., 1:-2:2])


@pytest.mark.parametrize("name", MODELS)
def test_building_is_deterministic_and_leaves_the_random_state_alone(name):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = MODELS[name](seed=1), MODELS[name](seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert one.model.weights_hash == two.model.weights_hash
    assert one.pairs.clean.hash() == two.pairs.clean.hash()
    assert one.pairs.corrupted.hash() == two.pairs.corrupted.hash()
    other = MODELS[name](seed=2)
    assert other.pairs.clean.hash() != one.pairs.clean.hash()
    assert (other.model.weights_hash == one.model.weights_hash) == (name != "linear")


@pytest.mark.parametrize("name", MODELS)
def test_sizes(name):
    assert len(MODELS[name](n=1).pairs) == 1
    assert len(MODELS[name](n=7).pairs) == 7
    with pytest.raises(ValueError, match="n: expected at least 1 pair, got 0"):
        MODELS[name](n=0)


def test_a_role_must_exist():
    built = zoo.cancellation(n=1)
    with pytest.raises(
        ValueError, match=r"roles\['writer'\]: expected components within 2 layers and 2 heads, got \(0, 2\)"
    ):
        zoo.Known(built.model, built.pairs, built.metric, {"writer": ((0, 2),)})


# --- circuits: the oracle, and every model's own


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_circuits(family):
    """All edges give the clean run and none the corrupted one; writers add up; two ways of patching one edge agree."""
    exact = family != "mixtral"  # its kernels have no float64
    tolerance = 1e-9 if exact else 1e-4
    model = mk.HookedModel.from_hf(build_hf(family, torch.float64 if exact else torch.float32), name=family)
    generator = torch.Generator().manual_seed(1)
    clean, corrupted = (torch.randint(3, D_VOCAB, (1, 7), generator=generator) for _ in range(2))
    corrupted[:, :2] = clean[:, :2]
    edges = edge_names(model)
    assert len(edges) == len(set(edges))
    with torch.no_grad():
        wanted = {"clean": model(clean), "corrupted": model(corrupted)}
    assert float((wanted["clean"] - wanted["corrupted"]).abs().max()) > 1
    assert float((run_circuit(model, clean, corrupted, edges) - wanted["clean"]).abs().max()) <= tolerance
    assert float((run_circuit(model, clean, corrupted, ()) - wanted["corrupted"]).abs().max()) <= tolerance
    source, base = whole_run(model, clean), whole_run(model, corrupted)
    for reader in reader_names(model):
        changes = [source.wrote[writer] - base.wrote[writer] for writer in writers_of(model, reader)]
        change = source.read[reader] - base.read[reader]
        assert torch.allclose(sum(changes), change, atol=100 * tolerance, rtol=0), reader
    # The corrupted run with one edge clean: by itself, and as the circuit of all other edges with the roles swapped.
    some = edges[5 :: len(edges) // 4]
    patched = patch_edges(model, base, source, corrupted, some)
    others = run_circuits(model, corrupted, clean, [set(edges) - {edge} for edge in some])
    for edge, by_itself, other in zip(some, patched, others, strict=True):
        assert float((by_itself - other).abs().max()) <= tolerance, edge
        assert float((by_itself - wanted["corrupted"][0]).abs().max()) > 1e-3, edge
    # Rows do not depend on what else is in their batch.
    alone = (
        patch_edge(model, base, source, corrupted, some[1]),
        run_circuit(model, corrupted, clean, {*edges} - {some[2]}),
    )
    assert float((alone[0] - patched[1]).abs().max()) <= tolerance
    assert float((alone[1] - others[2]).abs().max()) <= tolerance
    with pytest.raises(ValueError, match="edges: the model has no"):
        run_circuit(model, clean, corrupted, {"a0.h0->a0.h1<q>"})
    assert not model.has_hooks


def test_edge_names():
    """Small cases counted by hand; MHA, shared key-value heads, parallel blocks."""

    def count(family: str) -> int:
        return len(edge_names(mk.HookedModel.from_hf(build_hf(family), name=family)))

    layers, heads = 4, 4
    below = [1 + layer * (heads + 1) for layer in range(layers + 1)]  # writers before each layer, and before the logits
    mlps = sum(below[:-1]) + below[-1]
    assert count("gpt2") == 12 * sum(below[:-1]) + mlps + layers * heads
    assert count("llama") == 8 * sum(below[:-1]) + mlps + layers * heads
    assert count("falcon") == 6 * sum(below[:-1]) + mlps  # parallel: an MLP does not see its layer's heads
    built = zoo.cancellation(n=1)
    assert set(edge_names(built.model)) == _build.all_edges(2, 2)
    assert {"input->a0.h0<q>", "m0->a1.h1<v>", "a1.h1->m1", "m1->logits"} < _build.all_edges(2, 2)
    assert not {"a0.h0->a0.h1<q>", "m0->m0", "m1->a1.h0<k>", "logits->m0"} & _build.all_edges(2, 2)


def metric_of(known: zoo.Known, logits: Tensor, prompt: int) -> float:
    return float(read(known, logits, prompt))


@pytest.mark.parametrize("name", WITH_CIRCUIT)
def test_edges_outside_the_circuit_do_nothing(name):
    built = MODELS[name]()
    prompt, model = 1, built.model
    clean, corrupted = (prompts.tokens[prompt][None] for prompts in (built.pairs.clean, built.pairs.corrupted))
    runs = whole_run(model, clean), whole_run(model, corrupted)
    changed = set()  # the control: by the same measure the circuit's edges do something
    edges = edge_names(model)
    for base, source, tokens in ((runs[1], runs[0], corrupted), (runs[0], runs[1], clean)):
        for edge, logits in zip(edges, patch_edges(model, base, source, tokens, edges), strict=True):
            patched = metric_of(built, logits[None], prompt)
            effect = abs(patched - metric_of(built, base.logits, prompt))
            if edge not in built.circuit:
                assert effect < 1e-8, edge
            elif effect > 0.1:
                changed.add(edge)
    # What this edge sends is erased again (see the docstring).
    erased = {"input->a0.h0<v>"} if name == "writer and eraser" else set()
    assert built.circuit - changed == erased


@pytest.mark.parametrize("name", WITH_CIRCUIT)
def test_the_circuit_is_sufficient_complete_and_minimal(name):
    built = MODELS[name]()
    model, circuit = built.model, built.circuit
    everything = set(edge_names(model))
    base = baselines(built)
    for prompt in range(min(4, len(built.pairs))):
        tokens = [prompts.tokens[prompt][None] for prompts in (built.pairs.clean, built.pairs.corrupted)]

        without = {edge: circuit - {edge} for edge in circuit}
        erasing = ("a0.h0->logits", "a0.h0->a1.h0<v>", "a1.h0->logits") if name == "writer and eraser" else ()
        two_less = [one - {other} for other in erasing for one in (circuit, without["input->a0.h0<v>"])]
        every = list(map(frozenset, (circuit, everything - circuit, *without.values(), *two_less)))
        logits = run_circuits(model, *tokens, every)
        values = {edges: metric_of(built, row[None], prompt) for edges, row in zip(every, logits, strict=True)}

        whole = values[circuit]
        assert abs(whole - float(base["clean"][prompt])) < 1e-8  # sufficient
        assert abs(values[frozenset(everything - circuit)] - float(base["corrupted"][prompt])) < 1e-8  # complete
        for edge in circuit:
            effect = abs(values[without[edge]] - whole)
            if name == "writer and eraser" and edge == "input->a0.h0<v>":
                assert (
                    effect < 1e-8
                )  # undone by the eraser, so that it shows only where one edge of the two is missing:
                for other in erasing:
                    assert abs(values[circuit - {edge, other}] - values[circuit - {other}]) > 1
            else:
                assert effect > 0.1, edge  # minimal


def test_a_circuit_must_exist():
    built = zoo.cancellation(n=1)
    for edge in ("a1.h0->m0", "m0->a0.h0<q>", "a0.h0->a1.h2<q>", "a0.h0->a1.h0", "a0.kv0->logits"):
        with pytest.raises(ValueError, match=r"circuit: expected edges of a model of 2 layers and 2 heads.*; got \['"):
            zoo.Known(built.model, built.pairs, built.metric, {}, frozenset({edge, "input->logits"}))
    known = zoo.Known(built.model, built.pairs, built.metric, {}, {"input->logits"})
    assert known.circuit == frozenset({"input->logits"})
    assert zoo.linear(n=1).circuit == frozenset()
    assert len(zoo.writer_and_eraser(n=1, bystander=0).circuit) == 4


# --- induction


def repeated(n_prompts: int, n_tokens: int, *, bos: bool, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    segments = torch.stack(
        [1 + torch.randperm(_induction.D_VOCAB - 1, generator=generator)[:n_tokens] for _ in range(n_prompts)]
    )
    bos_column = torch.zeros(n_prompts, int(bos), dtype=torch.long)
    return torch.cat([bos_column, segments, segments], 1)


def attention_scores(pattern: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Mean attention `[head]` to each place, over the destinations that have one. Pattern is `[head dest src]`."""
    kinds: dict[str, list[Tensor]] = {"previous": [], "duplicate": [], "induction": [], "rest": []}
    for dest in range(1, len(tokens)):
        kinds["previous"].append(pattern[:, dest, dest - 1])
        before = [j for j in range(dest) if tokens[j] == tokens[dest]]
        if before:
            kinds["duplicate"].append(pattern[:, dest, before].sum(-1))
            kinds["induction"].append(pattern[:, dest, before[-1] + 1])
        else:
            kinds["rest"].append(pattern[:, dest, 0])
    return {kind: torch.stack(values).mean(0) for kind, values in kinds.items()}


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("n_tokens", [20, 49])
def test_induction_attention(bos, n_tokens):
    built = zoo.induction(n=1)
    for tokens in repeated(3, n_tokens, bos=bos):
        cache = cache_of(built.model, tokens[None], "pattern")
        scores = [attention_scores(cache["pattern", layer][0], tokens) for layer in range(2)]
        previous, finder = scores[0], scores[1]
        assert float(previous["previous"][0]) >= 0.999
        assert float(cache["pattern", 0][0, 0].diagonal(-1).min()) >= 0.999
        assert float(finder["induction"][0]) >= 0.99
        assert float(finder["rest"][0]) >= 0.99
        for layer, head in built.roles["control"]:
            for kind in ("previous", "duplicate", "induction"):
                assert float(scores[layer][kind][head]) <= 0.05
            assert float(cache["pattern", layer][0, head, :, 0].min()) >= 0.999
        # Neither head is a jack of all trades.
        assert float(previous["induction"][0]) <= 0.05
        assert float(previous["duplicate"][0]) <= 0.05
        assert float(finder["previous"][0]) <= 0.05
        assert float(finder["duplicate"][0]) <= 0.05


@pytest.mark.parametrize("bos", [True, False])
def test_induction_predicts_the_second_half_and_nothing_in_the_first(bos):
    built, n_tokens = zoo.induction(n=1), 20
    tokens = repeated(4, n_tokens, bos=bos)
    with torch.no_grad():
        logits = built.model(tokens)
    second = logits[:, -n_tokens:-1]
    assert torch.equal(second.argmax(-1), tokens[:, -n_tokens + 1 :])
    assert torch.allclose(second.amax(-1), torch.tensor(_induction.LOGIT).double(), atol=1e-6)
    first = logits[:, : tokens.shape[1] - n_tokens]
    # Without BOS the first token is what a head at rest copies: that alone, and with BOS nothing at all.
    largest = first.scatter(-1, tokens[:, :1, None].expand(-1, first.shape[1], 1), 0.0)
    assert float(largest.abs().max()) < 1e-4
    assert (float(first.abs().max()) < 1e-4) == bos


def test_induction_with_a_token_twice_in_a_row_and_with_two_earlier_occurrences():
    built = zoo.induction(n=1)
    in_a_row = torch.tensor([[0, 7, 9, 9, 4]])
    pattern = cache_of(built.model, in_a_row, "pattern")["pattern", 1][0, 0]
    assert float(pattern[3, 3]) > 0.99  # the position after the earlier 9 is the destination itself
    several = torch.tensor([[0, 7, 9, 3, 7, 5, 8, 7]])
    pattern = cache_of(built.model, several, "pattern")["pattern", 1][0, 0]
    assert torch.allclose(pattern[7, [2, 5]], torch.tensor([0.5, 0.5]).double(), atol=1e-6)


def test_induction_features_are_what_the_table_says():
    built = zoo.induction(n=1)
    tokens = repeated(1, 12, bos=True)
    cache = cache_of(built.model, tokens, "resid_pre", ("resid_post", 1))
    n, n_ctx = _induction.D_VOCAB, _induction.N_CTX
    token, previous, output = 0, n + n_ctx, 2 * n + n_ctx  # where each feature begins
    one_hot = torch.nn.functional.one_hot(tokens, n).double()
    before = torch.cat([one_hot[:, :1], one_hot[:, :-1]], 1)
    features = [cache["resid_pre", 0], cache["resid_pre", 1], cache["resid_post", 1]]
    features = [x[..., ::2] for x in features]
    assert torch.equal(features[0][..., token:n], one_hot)
    assert torch.equal(features[0][0, :, n : n + n_ctx], torch.eye(n_ctx).double()[: tokens.shape[1]])
    assert torch.equal(features[0][..., previous:output], torch.zeros_like(one_hot))
    assert torch.allclose(features[1][..., previous:output], before, atol=1e-9)
    successor = one_hot[:, 2:-12]  # of the first 11 tokens of the segment
    assert torch.allclose(features[2][:, -12:-1, output : output + n], successor, atol=1e-6)


def test_induction_patching_and_ablation():
    built = zoo.induction(n=3)
    base = baselines(built)
    assert len(set(built.pairs.clean.lengths.tolist())) > 1  # ragged
    assert torch.allclose(base["clean"], torch.tensor(10.0).double(), atol=1e-6)
    assert torch.allclose(base["corrupted"], torch.tensor(-10.0).double(), atol=1e-6)
    z = effects(built, "z")
    for component in built.roles["previous_token"] + built.roles["induction"]:
        assert torch.allclose(z[component], torch.tensor(20.0).double(), atol=1e-6)
    for component in built.roles["control"]:
        assert float(z[component].abs().max()) < 1e-9
    # K-composition: the induction head's keys carry the change, its queries and values do not.
    keys, queries, values = (effects(built, site)[1, 0] for site in ("k", "q", "v"))
    assert torch.allclose(keys, torch.tensor(20.0).double(), atol=1e-6)
    assert float(queries.abs().max()) < 1e-6
    # (At the two places that change hands: what stands after them does not change.)
    assert float(values.abs().max()) < 1e-6
    zeroed = zero_ablation(built)
    assert torch.allclose(zeroed[0, 0], torch.tensor(-10.0).double(), atol=1e-6)
    assert torch.allclose(zeroed[1, 0], torch.tensor(-10.0).double(), atol=1e-6)
    assert float(zeroed[:, 1:].abs().max()) < 1e-9


def test_induction_prompts():
    built = zoo.induction(n=20, n_tokens=8, seed=4)
    for clean, corrupted, (right, wrong) in zip(
        built.pairs.clean.tokens, built.pairs.corrupted.tokens, built.pairs.answers, strict=True
    ):
        assert int(clean[0]) == int(corrupted[0]) == 0
        assert (clean != corrupted).sum() == 2
        end = clean[-1]
        for tokens, answer in ((clean, right[0]), (corrupted, wrong[0])):
            assert int(tokens[1 : 1 + 8].unique().numel()) == 8
            at = (tokens[:9] == end).nonzero().item()
            assert int(tokens[at + 1]) == answer
    with pytest.raises(ValueError, match="n_tokens: expected 5 to 49, the tokens that there are; got 50"):
        zoo.induction(n_tokens=50)
    with pytest.raises(ValueError, match="n_tokens: expected 5"):
        zoo.induction(n_tokens=4)
    assert len(zoo.induction(n=30, n_tokens=5).pairs) == 30


# --- linear


@pytest.fixture(scope="module", params=[0, 1])
def straight(request: pytest.FixtureRequest) -> zoo.Known:
    return zoo.linear(request.param)


def test_linear_attention_is_uniform(straight):
    for tokens in rows(straight.pairs.clean):
        cache = cache_of(straight.model, tokens, "pattern")
        length = tokens.shape[1]
        uniform = torch.tril(torch.ones(length, length)).double() / torch.arange(1, length + 1)[:, None]
        for layer in range(3):
            assert torch.allclose(cache["pattern", layer][0], uniform.expand(4, -1, -1), atol=1e-12)


@pytest.mark.parametrize(
    "site", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_pre", "mlp_post", "mlp_out", "z", "v", "result"]
)
def test_linear_gradient_times_change_is_the_exact_effect(straight, site):
    if site == "result":  # it is no leaf of the forward pass; z is the same up to a matrix
        exact = effects(straight, "result")
        assert torch.allclose(exact, effects(straight, "z"), atol=1e-10, rtol=0)
        return
    heads = "head" in SITES[site].dims
    exact = effects(straight, site, "layer head" if heads else "layer")
    assert float(exact.abs().max()) > 0.1
    for layer in range(3):
        assert torch.allclose(estimates(straight, site, layer), exact[layer], atol=1e-8, rtol=0)


def test_linear_effects_add_up(straight):
    """Heads of a layer, and an MLP with heads that are not below it; the control: heads of two layers share a path."""

    def joint(*edits: Edit) -> Tensor:
        answers = mk.sweep(
            straight.model,
            straight.pairs.corrupted,
            [*((edit,) for edit in edits), edits],
            straight.metric,
            source=straight.pairs.clean,
            progress=False,
        )
        assert answers.replay == "suffix"
        effect = answers.values - answers.base
        assert float(effect[:-1].abs().amax(1).min()) > 1e-3
        return (effect[:-1].sum(0) - effect[-1]).abs().max()

    for layer in range(3):
        assert float(joint(Edit("z", layer, head=0), Edit("z", layer, head=2))) <= 1e-8
        assert float(joint(*(Edit("z", layer, head=head) for head in range(4)))) <= 1e-8
    assert float(joint(Edit("z", 0, head=0), Edit("z", 2, head=1))) > 1e-4


def test_linear_prompts(straight):
    assert sorted(set(straight.pairs.clean.lengths.tolist())) == [6, 7, 8, 9]
    assert torch.equal(straight.pairs.first_difference, straight.pairs.clean.lengths // 2)
    for clean, corrupted, middle in zip(
        straight.pairs.clean.tokens, straight.pairs.corrupted.tokens, straight.pairs.first_difference, strict=True
    ):
        assert bool((clean[middle:] != corrupted[middle:]).all())


# --- saturated attention


@pytest.mark.parametrize(("node", "site"), [("query", "q"), ("key", "k")])
def test_saturated_attention(node, site):
    built = zoo.saturated_attention(node, n=8)
    base = baselines(built)
    assert torch.allclose(base["clean"], torch.tensor(4.0).double(), atol=1e-6)
    assert torch.allclose(base["corrupted"], torch.tensor(-4.0).double(), atol=1e-6)
    for prompts, place in ((built.pairs.clean, "RIGHT"), (built.pairs.corrupted, "WRONG")):
        for i, tokens in enumerate(rows(prompts)):
            cache = cache_of(built.model, tokens, "pattern")
            assert float(cache["pattern", 1][0, 0, -1, built.pairs.positions[place][i]]) > 0.9999
            assert float(cache["pattern", 0][0, 0].diagonal(-1).min()) > 0.9999
    exact = effects(built, site)
    assert torch.allclose(exact[1, 0], torch.tensor(8.0).double(), atol=1e-6)
    estimate = estimates(built, site, 1)[0]
    assert float((estimate / exact[1, 0]).abs().max()) < 1e-5
    assert float(estimate.abs().min()) > 0  # tiny, but there is a path
    # Upstream of it the same: the writer.
    assert torch.allclose(effects(built, "z")[0, 0], torch.tensor(8.0).double(), atol=1e-6)
    assert float((estimates(built, "z", 0)[0] / 8).abs().max()) < 1e-5
    # The other side of the product does not differ, and controls do nothing.
    other = {"q": "k", "k": "q"}[site]
    assert float(effects(built, other)[1, 0].abs().max()) < 1e-9
    assert float(effects(built, "z")[:, 1].abs().max()) < 1e-9
    # The head's own output is linear: there the gradient is exact.
    assert torch.allclose(estimates(built, "z", 1)[0], effects(built, "z")[1, 0], atol=1e-8)


@pytest.mark.parametrize("node", ["query", "key"])
def test_saturated_attention_recomputing_the_softmax_gives_the_exact_effect(node):
    built = zoo.saturated_attention(node, n=5, seed=2)
    site = {"query": "q", "key": "k"}[node]
    exact = effects(built, site)[1, 0]
    slopes = gradients(built, "z", 1)
    for i, (clean, corrupted) in enumerate(zip(rows(built.pairs.clean), rows(built.pairs.corrupted), strict=True)):
        source, base = (cache_of(built.model, tokens, "q", "k", "v", "z") for tokens in (clean, corrupted))
        q, k = ((source if s == site else base)[s, 1][0, :, 0] for s in ("q", "k"))
        scores = q @ k.T / built.model.d_head**0.5
        mask = torch.ones_like(scores).tril().bool()
        z = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ base["v", 1][0, :, 0]
        estimate = ((z - base["z", 1][0, :, 0]) * slopes[i][:, 0]).sum()
        assert float((estimate - exact[i]).abs()) < 1e-8


@pytest.mark.parametrize("node", ["query", "key"])
def test_saturated_attention_prompts(node):
    built = zoo.saturated_attention(node, n=12)
    different = {"query": [5], "key": [1, 3]}[node]
    for i, (clean, corrupted) in enumerate(zip(built.pairs.clean.tokens, built.pairs.corrupted.tokens, strict=True)):
        assert (clean != corrupted).nonzero().flatten().tolist() == different
        assert int(clean[built.pairs.positions["RIGHT"][i]]) == built.pairs.right[i][0]
        assert int(clean[built.pairs.positions["WRONG"][i]]) == built.pairs.wrong[i][0]
    assert set(built.pairs.positions["RIGHT"].tolist()) == {2, 4}
    with pytest.raises(ValueError, match="node: expected 'query' or 'key', got 'value'"):
        zoo.saturated_attention("value")


# --- cancellation


@pytest.mark.parametrize(("size", "steepness"), [(2.0, 10.0), (0.9, 25.0)])
def test_cancellation(size, steepness):
    built = zoo.cancellation(size=size, steepness=steepness)
    strength = torch.tensor([1.0, 1.5, 2.0, 1.0, 1.5, 2.0]).double()
    expected = size * (strength - (steepness * strength).tanh() / steepness)
    base = baselines(built)
    assert float(base["corrupted"].abs().max()) < 1e-12
    assert torch.allclose(base["clean"], expected, atol=1e-9)
    z = effects(built, "z")
    assert torch.allclose(z[0, 0], expected, atol=1e-9)
    assert torch.allclose(z[0, 0], size * (strength - 1 / steepness), atol=1e-6)
    assert float(z.flatten(0, 1)[1:].abs().max()) < 1e-12
    assert float(estimates(built, "z", 0)[0].abs().max()) < 1e-9
    # The two paths. Without layer 1's gradient (its MLP held fixed) the direct one is left.
    direct = estimates(built, "z", 0, keep={("mlp_out", 1): lambda x, hook: x.detach()})[0]
    assert torch.allclose(direct, size * strength, atol=1e-9)
    assert float((direct / expected).min()) > 0.5
    also_direct = estimates(built, "z", 0, keep={("mlp_out", 0): lambda x, hook: x.detach()})[0]
    assert float(also_direct.abs().max()) < 1e-9  # layer 0's MLP carries nothing of it
    through = effects(built, "mlp_out", "layer")
    assert torch.allclose(through[1], -size / steepness * (steepness * strength).tanh(), atol=1e-9)
    assert float(through[0].abs().max()) < 1e-12
    assert torch.allclose(zero_ablation(built)[0, 0], -expected, atol=1e-9)


def test_cancellation_refuses():
    with pytest.raises(ValueError, match="steepness: expected 8 or more"):
        zoo.cancellation(steepness=2)
    with pytest.raises(ValueError, match="size: expected more than 0 logits, got -1"):
        zoo.cancellation(size=-1)
    with pytest.raises(ValueError, match="size: expected more than 0 logits, got nan"):
        zoo.writer_and_eraser(size=float("nan"))


# --- writer and eraser


@pytest.mark.parametrize(("size", "bystander"), [(4.0, 1.0), (2.5, -3.0)])
def test_writer_and_eraser(size, bystander):
    built = zoo.writer_and_eraser(size=size, bystander=bystander)
    strength = torch.tensor([1.0, 1.5, 2.0, 1.0, 1.5, 2.0]).double()
    base = baselines(built)
    assert float(base["corrupted"].abs().max()) < 1e-12
    assert torch.allclose(base["clean"], bystander * strength, atol=1e-8, rtol=0)
    added = contributions(built, built.pairs.clean)
    expected = {(0, 0): size * strength, (1, 0): -size * strength, (0, 1): bystander * strength}
    for component, found in added.items():
        assert torch.allclose(found, expected.get(component, torch.zeros(6).double()), atol=1e-8, rtol=0), component
    for found in contributions(built, built.pairs.corrupted).values():  # there the writer writes nothing
        assert float(found.abs().max()) < 1e-12
    zeroed = zero_ablation(built)
    assert float(zeroed[0, 0].abs().max()) <= 1e-8 * size
    assert torch.allclose(zeroed[1, 0], size * strength, atol=1e-8, rtol=0)
    assert torch.allclose(zeroed[0, 1], -bystander * strength, atol=1e-8, rtol=0)
    assert float(zeroed[1, 1].abs().max()) < 1e-12
    patched = effects(built, "z")
    assert float(patched[0, 0].abs().max()) <= 1e-8 * size
    assert torch.allclose(patched[1, 0], -size * strength, atol=1e-8, rtol=0)
    assert torch.allclose(patched[0, 1], bystander * strength, atol=1e-8, rtol=0)
    # Control: with the eraser held as it was in the corrupted run, the writer's work shows.
    answers = mk.sweep(
        built.model,
        built.pairs.corrupted,
        [(Edit("z", 0, head=0), Edit("z", 1, "zero", head=0))],
        built.metric,
        source=built.pairs.clean,
        values={"zero": {("z", 1): torch.zeros(1, 1, 1, 1).double()}},
        progress=False,
    )
    assert torch.allclose(answers.values[0] - answers.base, size * strength, atol=1e-8, rtol=0)


def test_cue_models_attend_where_they_say():
    for built, places in (
        (zoo.writer_and_eraser(), {(0, 0): "cue", (0, 1): "cue", (1, 0): "self", (1, 1): "start"}),
        (zoo.cancellation(), {(0, 0): "cue", (0, 1): "start", (1, 0): "start", (1, 1): "start"}),
    ):
        for tokens in rows(built.pairs.clean) + rows(built.pairs.corrupted):
            at = torch.arange(tokens.shape[1])
            sources = {"cue": at.clamp(max=1), "self": at, "start": torch.zeros_like(at)}
            cache = cache_of(built.model, tokens, "pattern")
            for (layer, head), place in places.items():
                attention = cache["pattern", layer][0, head][at, sources[place]]
                assert float(attention.min()) > 1 - 1e-12


def test_cue_prompts():
    for built in (zoo.writer_and_eraser(n=5), zoo.cancellation(n=5)):
        assert built.pairs.clean.lengths.tolist() == [5, 6, 7, 8, 5]
        for clean, corrupted in zip(built.pairs.clean.tokens, built.pairs.corrupted.tokens, strict=True):
            assert (clean != corrupted).nonzero().flatten().tolist() == [1]
            assert int(corrupted[1]) == _cue.OFF
            assert _cue.OFF < int(clean[1]) < _cue.RIGHT
            assert int(clean[2:].min()) > _cue.WRONG


# --- serial IOI


def test_serial_ioi_heads_attend_where_they_say():
    built = zoo.serial_ioi(n=8)
    for kind, prompts in (("clean", built.pairs.clean), ("corrupted", built.pairs.corrupted)):
        for i, tokens in enumerate(rows(prompts)):
            cache = cache_of(built.model, tokens, "pattern")
            io, s1, s2, end = (int(built.pairs.positions[name][i]) for name in ("IO", "S1", "S2", "END"))
            duplicate = cache["pattern", 0][0, 0, s2]
            assert float(duplicate[s1 if kind == "clean" else 0]) > 1 - 1e-12
            assert float(cache["pattern", 0][0, 1, :, 0].min()) > 1 - 1e-12
            for head in range(2):
                assert float(cache["pattern", 1][0, head, end, s2]) > 1 - 1e-12
                mover = cache["pattern", 2][0, head, end]
                shares = [float(mover[io]), float(mover[s1])]
                assert shares == pytest.approx([1, 0] if kind == "clean" else [0.5, 0.5], abs=1e-12)


def test_serial_ioi_features_are_what_the_table_says():
    built, n = zoo.serial_ioi(n=8), _serial_ioi.N_NAMES
    name, duplicated, inhibit, output, unread = (
        slice(_serial_ioi.N_CTX + i * n, _serial_ioi.N_CTX + (i + 1) * n) for i in range(5)
    )
    for kind, prompts in (("clean", built.pairs.clean), ("corrupted", built.pairs.corrupted)):
        for i, tokens in enumerate(rows(prompts)):
            features = cache_of(built.model, tokens, ("resid_post", 2))["resid_post", 2][0, :, ::2]
            one_hot = torch.nn.functional.one_hot(tokens[0], _serial_ioi.D_VOCAB).double()[:, _serial_ioi.NAME :]
            io, s1, s2 = (int(built.pairs.positions[at][i]) for at in ("IO", "S1", "S2"))
            s_if_clean = one_hot[s1] * (kind == "clean")
            mixture = one_hot[io] if kind == "clean" else (one_hot[io] + one_hot[s1]) / 2
            assert torch.equal(features[:, name], one_hot)
            assert torch.allclose(features[s2, duplicated], s_if_clean, atol=1e-9)
            assert torch.allclose(features[-1, inhibit], s_if_clean, atol=1e-9)
            assert torch.allclose(features[-1, output], mixture, atol=1e-9)
            assert torch.allclose(features[-1, unread], mixture + one_hot[s2], atol=1e-9)


def test_serial_ioi_patching_and_ablation():
    built = zoo.serial_ioi(n=8)
    base = baselines(built)
    four = torch.tensor(4.0).double()
    assert torch.allclose(base["clean"], four, atol=1e-8)
    assert torch.allclose(base["corrupted"], 0 * four, atol=1e-8)
    z, zeroed = effects(built, "z"), zero_ablation(built)
    for role in ("duplicate_token", "s_inhibition", "name_mover"):
        for component in built.roles[role]:
            assert torch.allclose(z[component], four, atol=1e-8)
            assert torch.allclose(zeroed[component], -four, atol=1e-8)
    for component in built.roles["control"]:
        assert float(z[component].abs().max()) < 1e-8
        assert float(zeroed[component].abs().max()) < 1e-8
    # Two of the controls do write what differs between the prompts.
    for layer in (1, 2):
        assert min(float(change[-1, 1].abs().max()) for change in changes(built, "result", layer)) > 0.4
    assert torch.allclose(effects(built, "q")[0, 0], four, atol=1e-8)
    assert torch.allclose(effects(built, "v")[1, 0], four, atol=1e-8)
    assert torch.allclose(effects(built, "q")[2, 0], four, atol=1e-8)
    for layer, site in ((0, "k"), (0, "v"), (1, "q"), (1, "k"), (2, "k"), (2, "v")):
        assert float(effects(built, site)[layer, 0].abs().max()) < 1e-8
    # The corrupted name mover is not saturated: its gradient sees the change, if not its size.
    assert float(estimates(built, "q", 2)[0].min()) > 4


def test_serial_ioi_prompts():
    built = zoo.serial_ioi(n=16)
    assert built.pairs.clean.lengths.tolist() == [8, 8, 9, 9, 10, 10, 11, 11] * 2
    for i, (clean, corrupted) in enumerate(zip(built.pairs.clean.tokens, built.pairs.corrupted.tokens, strict=True)):
        io, s1, s2 = (int(built.pairs.positions[name][i]) for name in ("IO", "S1", "S2"))
        assert (io, s1) == ((1, 3) if i % 2 == 0 else (3, 1))
        assert (clean != corrupted).nonzero().flatten().tolist() == [s2]
        assert (int(clean[io]),) == built.pairs.right[i]
        assert int(clean[s1]) == int(clean[s2]) == built.pairs.wrong[i][0]
        assert int(corrupted[s2]) not in (int(clean[io]), int(clean[s1]))
        for tokens in (clean, corrupted):
            names = (tokens >= _serial_ioi.NAME).nonzero().flatten().tolist()
            assert names == [1, 3, s2]
            assert int(tokens[0]) == _serial_ioi.BOS
            assert int(tokens[-1]) == _serial_ioi.END


# --- greater-than


@pytest.mark.parametrize("steepness", [2.0, 8.0, 50.0])
def test_greater_than(steepness):
    built = zoo.greater_than(n=8, steepness=steepness)
    base = baselines(built)
    years = torch.arange(100).double()
    for i, (clean, corrupted) in enumerate(zip(built.pairs.clean.tokens, built.pairs.corrupted.tokens, strict=True)):
        start = int(clean[2]) - _greater_than.YEAR
        right, wrong = (torch.tensor(side[i]) - _greater_than.YEAR for side in (built.pairs.right, built.pairs.wrong))
        assert right.tolist() == list(range(start + 1, 100))
        assert wrong.tolist() == list(range(start + 1))
        for kind, tokens, year in (("clean", clean, start), ("corrupted", corrupted, 1)):
            later = torch.sigmoid(steepness * (years - year - 0.5))
            with torch.no_grad():
                logits = built.model(tokens[None])[0, -1]
            assert torch.allclose(logits[_greater_than.YEAR :], 4 * later, atol=1e-8, rtol=0)
            assert torch.equal(logits[: _greater_than.YEAR], torch.zeros(_greater_than.YEAR).double())
            expected = 4 * (later[right].mean() - later[wrong].mean())
            assert float((base[kind][i] - expected).abs()) < 1e-8
            sharp = 4.0 if kind == "clean" else 8 / (start + 1)
            assert abs(float(expected) - sharp) < {2.0: 0.4, 8.0: 0.05, 50.0: 1e-8}[steepness]
    gap = base["clean"] - base["corrupted"]
    assert torch.allclose(effects(built, "z")[0, 0], gap, atol=1e-8, rtol=0)
    assert torch.allclose(effects(built, "mlp_out", "layer")[1], gap, atol=1e-8, rtol=0)
    assert float(effects(built, "z").flatten(0, 1)[1:].abs().max()) < 1e-8
    assert float(effects(built, "mlp_out", "layer")[0].abs().max()) < 1e-8
    # The controls do write what differs between the prompts.
    assert min(float(change[-1, 1].abs().max()) for change in changes(built, "result", 1)) > 0.08
    assert min(float(change[-1].abs().max()) for change in changes(built, "mlp_out", 0)) > 0.01
    assert torch.allclose(zero_ablation(built)[0, 0], -gap - (base["corrupted"] - year_zero(built)), atol=1e-8, rtol=0)
    # Gradients see the thresholds from afar only where they are not steep.
    share = estimates(built, "z", 0)[0] / gap
    assert float(share.min()) > 0.7 if steepness == 2 else float(share.max()) < {8.0: 0.5, 50.0: 1e-6}[steepness]


def year_zero(built: zoo.Known) -> Tensor:
    """The metric of each pair with 00 as the start year."""
    found = []
    for i, tokens in enumerate(rows(built.pairs.clean)):
        tokens = tokens.clone()
        tokens[0, 2] = _greater_than.YEAR
        with torch.no_grad():
            found.append(read(built, built.model(tokens), i))
    return torch.stack(found)


def test_greater_than_prompts_and_attention():
    built = zoo.greater_than(n=12)
    assert built.pairs.clean.lengths.tolist() == [5, 6, 7, 8] * 3
    assert built.pairs.positions["YEAR"].tolist() == [2] * 12
    for clean, corrupted in zip(built.pairs.clean.tokens, built.pairs.corrupted.tokens, strict=True):
        assert (clean != corrupted).nonzero().flatten().tolist() == [2]
        assert int(corrupted[2]) == _greater_than.YEAR + 1
        assert _greater_than.YEAR + 10 <= int(clean[2]) <= _greater_than.YEAR + 90
        assert int(clean[0]) == _greater_than.BOS
        others = torch.cat([clean[1:2], clean[3:]])
        assert _greater_than.FILLER <= int(others.min()) <= int(others.max()) < _greater_than.YEAR
        cache = cache_of(built.model, clean[None], "pattern")
        for layer, head, at in ((0, 0, 2), (1, 1, 2), (0, 1, 0), (1, 0, 0)):
            assert float(cache["pattern", layer][0, head, 2:, at].min()) > 1 - 1e-12
    # The paper's metric.
    metric = mk.prob_diff(built.pairs)
    base = mk.activation_patching(built.model, built.pairs, metric, progress=False).baseline
    assert float((base["clean"] - base["corrupted"]).min()) > 0.1
    for value in (1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"steepness: expected 2 or more, .* got {value}"):
            zoo.greater_than(steepness=value)


def test_token_layouts_do_not_overlap():
    assert _serial_ioi.NAME + _serial_ioi.N_NAMES == _serial_ioi.D_VOCAB
    assert _serial_ioi.FIRST < _serial_ioi.SECOND < _serial_ioi.N_CTX
    assert _greater_than.BOS < _greater_than.FILLER < _greater_than.YEAR
    assert _cue.OFF + len(_cue.STRENGTHS) == _cue.RIGHT < _cue.WRONG < _cue.D_VOCAB - _cue.N_FILLERS + 1
    assert _saturated.END + 1 + _saturated.N_PAYLOADS == _saturated.D_VOCAB


def test_a_known_model_can_be_copied() -> None:
    known = zoo.linear(n=1)
    again = copy.deepcopy(known)
    assert again.model.bridge is not known.model.bridge
    assert (dict(again.roles), again.circuit) == (dict(known.roles), known.circuit)
