"""Head scores against naive loops over the model's own patterns, whole OV matrices, and models whose heads are known."""

from __future__ import annotations

import pytest
import torch

import mechkit as mk
from helpers.families import D_VOCAB, FAMILIES, build_hf
from helpers.tiny import make_model, model_of
from mechkit import zoo
from mechkit._random_tokens import ordinary_tokens
from mechkit.attribution.head_scores import composition_scores, head_scores, random_prompts
from mechkit.prompts import Prompts

PATTERN_KINDS = ("previous_token", "duplicate_token", "induction", "prefix_matching")
# Hugging Face's RMSNorms compute in float32 even in a float64 model, so the gains measured from them are float32's.
LAYER_NORM = {"gpt2", "gpt_neox", "gptj", "phi", "opt", "bloom", "gpt_neo", "falcon", "stablelm"}


def tolerance(family: str) -> float:
    return 1e-8 if family in LAYER_NORM else 1e-5


def ragged(seed: int = 0) -> Prompts:
    """Few different tokens, so that they come again in every way; the last prompt has no token twice."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(3, 3 + few, (length,), generator=generator) for length, few in ((9, 3), (6, 2), (9, 5), (12, 4))
    ]
    return Prompts.from_tokens([*rows, torch.tensor([5, 6, 7, 8])])


def naive_sources(tokens: list[int], dest: int, kind: str) -> list[int]:
    """Straight from the definitions."""
    earlier = [j for j in range(dest) if tokens[j] == tokens[dest]]
    if kind == "previous_token":
        return [dest - 1] if dest > 0 else []
    if kind == "duplicate_token":
        return earlier
    if kind == "induction":
        earlier = earlier[-1:]
    return [j + 1 for j in earlier if j + 1 != dest]


def naive_scores(model: mk.HookedModel, prompts: Prompts, kind: str) -> torch.Tensor:
    values = torch.full((model.n_layers, model.n_heads, len(prompts)), torch.nan, dtype=torch.float64)
    for i, row in enumerate(prompts.tokens):
        with torch.no_grad():
            _, cache = model.run_with_cache(row, "pattern")
        for layer in range(model.n_layers):
            for head in range(model.n_heads):
                found = []
                for dest in range(len(row)):
                    sources = naive_sources(row.tolist(), dest, kind)
                    if sources:
                        found.append(sum(float(cache["pattern", layer][0, head, dest, j]) for j in sources))
                if found:
                    values[layer, head, i] = sum(found) / len(found)
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_equal_the_definitions(family):
    model, prompts = model_of(family), ragged()
    for kind in PATTERN_KINDS:
        result = head_scores(model, kind, prompts=prompts, progress=False)
        expected = naive_scores(model, prompts, kind)
        assert torch.equal(result.values.isnan(), expected.isnan())
        assert result.dims == ("layer", "head", "prompt")
        atol = 1e-5 if family == "mixtral" else 1e-12
        assert torch.allclose(result.values.double(), expected, atol=atol, rtol=0, equal_nan=True)
        assert bool(expected[..., -1].isnan().all()) == (kind != "previous_token")
        assert float(result.values.nan_to_num().max()) > 0.2  # control: there is something to measure


def test_the_kinds_differ():
    model, prompts = model_of("llama"), ragged()
    found = [head_scores(model, kind, prompts=prompts, progress=False).values for kind in PATTERN_KINDS]
    for i in range(len(found)):
        for j in range(i):
            assert float((found[i] - found[j]).nan_to_num().abs().max()) > 0.05


def test_known_heads():
    """The hand-written model: its previous-token and induction heads score 1, the others nothing."""
    known = zoo.induction()
    generator = torch.Generator().manual_seed(3)
    rows = [
        torch.cat([torch.zeros(1, dtype=torch.long), (1 + torch.randperm(49, generator=generator)[:20]).repeat(2)])
    ] * 2
    prompts = Prompts.from_tokens(rows)
    for kind in PATTERN_KINDS:
        scores = head_scores(known.model, kind, prompts=prompts, progress=False).mean("prompt")
        for role, heads in known.roles.items():
            for layer, head in heads:
                value = float(scores.sel(layer=layer, head=head).values)
                of_this_kind = {"previous_token": "previous_token", "induction": "induction"}.get(kind, "")
                if role == of_this_kind or (role == "induction" and kind == "prefix_matching"):
                    assert value >= 0.99, (kind, role, value)
                elif role == "control":
                    assert value <= 0.05, (kind, role, value)


def test_random_tokens_that_do_not_repeat_find_no_induction():
    """Control: the same model on the prompts' own tokens in another order has nothing to attend to."""
    model = zoo.induction().model
    once = head_scores(model, "induction", prompts=Prompts.from_tokens([torch.arange(1, 40)]), progress=False)
    assert bool(once.values.isnan().all())
    twice = head_scores(model, "induction", n=2, length=20, progress=False)
    assert float(twice.mean("prompt").sel(layer=1, head=0).values) >= 0.99
    # A random model scores about what uniform attention would.
    untrained = head_scores(model_of("gpt2"), "induction", n=4, length=20, progress=False)
    assert float(untrained.mean("prompt").values.mean()) < 0.1


def test_equals_transformer_lens_conventions():
    """Its detection patterns; and on tokens repeated once, its stripe at 1 - length over the second half."""
    from transformer_lens import head_detector

    model, length = model_of("gpt2"), 12
    prompts = random_prompts(model, "induction", 2, length, seed=0)
    result = head_scores(model, "induction", prompts=prompts, progress=False).values
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.stack(prompts.tokens), "pattern")
    stripes = torch.stack([cache["pattern", i].diagonal(1 - length, -2, -1)[..., 1:].mean(-1) for i in range(4)])
    assert torch.allclose(result, stripes.permute(0, 2, 1), atol=1e-12, rtol=0)
    detectors = {
        "previous_token": head_detector.get_previous_token_head_detection_pattern,
        "duplicate_token": head_detector.get_duplicate_token_head_detection_pattern,
        "prefix_matching": head_detector.get_induction_head_detection_pattern,
    }
    for kind, detector in detectors.items():
        ours = head_scores(model, kind, prompts=prompts, progress=False).values
        for i, row in enumerate(prompts.tokens):
            mask = detector(row[None]).double()
            dests = mask.sum(-1) > 0
            theirs = torch.stack([(cache["pattern", k][i] * mask).sum(-1)[:, dests].mean(-1) for k in range(4)])
            assert torch.allclose(ours[:, :, i], theirs, atol=1e-12, rtol=0)


def test_random_prompts():
    model = model_of("llama")
    prompts = random_prompts(model, "prefix_matching", 3, 10, seed=1)
    assert set(ordinary_tokens(model).tolist()) == set(range(3, D_VOCAB))  # without bos, eos and pad
    for row in prompts.tokens:
        assert len(row) == 40
        assert torch.equal(row[:10].repeat(4), row)
        assert len(set(row.tolist())) == 10
    assert random_prompts(model, "prefix_matching", 3, 10, seed=1).hash() == prompts.hash()
    assert random_prompts(model, "prefix_matching", 3, 10, seed=2).hash() != prompts.hash()
    assert len(random_prompts(model, "induction", 1, 10, seed=1).tokens[0]) == 20


def test_batches_change_nothing_and_choice_is_a_choice():
    model, prompts = model_of("llama"), ragged()
    whole = head_scores(model, "prefix_matching", prompts=prompts, progress=False)
    single = head_scores(model, "prefix_matching", prompts=prompts, budget=1, progress=False)
    assert torch.allclose(whole.values, single.values, atol=1e-12, rtol=0, equal_nan=True)
    some = head_scores(model, "prefix_matching", prompts=prompts, layers=[3, 1], heads=[-1, 0], progress=False)
    assert some.coords["layer"] == (3, 1)
    assert some.coords["head"] == (3, 0)
    assert torch.equal(some.values.nan_to_num(), whole.values[[3, 1]][:, [3, 0]].nan_to_num())


def folded(hf_weight: torch.Tensor, gain: torch.Tensor, centres: bool) -> torch.Tensor:
    """What reads the normalized stream, as a matrix on the stream itself."""
    weight = gain[:, None] * hf_weight
    return weight - weight.mean(0) if centres else weight


def gain_of(norm: torch.nn.Module | None, d_model: int) -> torch.Tensor:
    """From the module's weights, class by class."""
    if norm is None:
        return torch.ones(d_model, dtype=torch.float64)
    weight = norm.original_component.weight.detach().double()
    return 1 + weight if type(norm.original_component).__name__.startswith("Gemma") else weight


def whole_ov(model: mk.HookedModel, layer: int, head: int, centres: bool) -> torch.Tensor:
    """`[d_model d_model]`, norms' gains folded in."""
    block = model.bridge.blocks[layer]
    kv_head = head // (model.n_heads // model.n_kv_heads)
    V = folded(model.W_V[layer, kv_head].double(), gain_of(getattr(block, "ln1", None), model.d_model), centres)
    written = V @ model.W_O[layer, head].double()
    return written * gain_of(getattr(block, "ln1_post", None), model.d_model)


def whole_qk(model: mk.HookedModel, layer: int, head: int, centres: bool) -> torch.Tensor:
    block = model.bridge.blocks[layer]
    shared = model.n_heads // model.n_kv_heads
    gain = gain_of(getattr(block, "ln1", None), model.d_model)
    q = folded(model.W_Q[layer, head].double(), gain, centres)
    k = folded(model.W_K[layer, head // shared].double(), gain, centres)
    if getattr(block.attn, "q_norm", None) is not None:
        q_gain, k_gain = (gain_of(getattr(block.attn, name), model.d_head) for name in ("q_norm", "k_norm"))
        q = q * q_gain.reshape(-1, model.d_head)[head % (len(q_gain) // model.d_head)]
        k = k * k_gain.reshape(-1, model.d_head)[(head // shared) % (len(k_gain) // model.d_head)]
    return q @ k.mT


def embedding(model: mk.HookedModel) -> torch.Tensor:
    """What the tokens put into the stream, family by family."""
    E = model.W_E.double()
    if model.name.startswith("gemma"):
        E = E * model.bridge.embed.original_component.embed_scale.double()
    if model.name == "bloom":
        E = model.bridge.embed_ln.original_component(E)
    return E


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_copying_equals_the_eigenvalues_of_the_whole_matrix(family):
    model, centres = model_of(family), family in LAYER_NORM
    result = head_scores(model, "copying", progress=False)
    assert result.dims == ("layer", "head")
    U = folded(model.W_U.double(), gain_of(model.bridge.ln_final, model.d_model), centres)
    for layer in range(model.n_layers):
        for head in range(model.n_heads):
            whole = embedding(model) @ whole_ov(model, layer, head, centres) @ U  # [vocabulary vocabulary]
            eigenvalues = torch.linalg.eigvals(whole)
            # All but d_head of the vocabulary's eigenvalues are 0, which rounding makes tiny.
            large = eigenvalues[eigenvalues.abs().argsort(descending=True)[: model.d_head]]
            expected = float(large.real.sum() / large.abs().sum())
            assert abs(float(result.values[layer, head]) - expected) < tolerance(family)
    assert float(result.values.std()) > 0.1


def test_copying_of_known_heads():
    known = zoo.induction()
    scores = head_scores(known.model, "copying", progress=False)
    assert float(scores.values[1, 0]) > 0.999  # copies every token to its own logit
    for layer, head in known.roles["control"]:
        assert not float(scores.values[layer, head]) > 0.05  # NaN: writes nothing


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_name_mover_copy_equals_the_paper_step_by_step(family):
    """With the model's own modules, one position and head at a time, and the five largest logits."""
    model, prompts = model_of(family), ragged()
    for sign in (1, -1):
        result = head_scores(model, "name_mover_copy", prompts=prompts, sign=sign, progress=False)
        expected = torch.zeros_like(result.values)
        for i, row in enumerate(prompts.tokens):
            _, cache = model.run_with_cache(row, ("resid_post", 0))
            for layer in range(model.n_layers):
                block = model.bridge.blocks[layer]
                x = cache["resid_post", 0][0]
                x = block.ln1(x) if hasattr(block, "ln1") else x
                for head in range(model.n_heads):
                    kv_head = head // (model.n_heads // model.n_kv_heads)
                    out = sign * (x @ model.W_V[layer, kv_head] + model.b_V[layer, kv_head]) @ model.W_O[layer, head]
                    out = block.ln1_post(out) if hasattr(block, "ln1_post") else out
                    top = model.unembed(out).topk(5).indices
                    expected[layer, head, i] = (top == row[:, None]).any(1).float().mean()
        expected[0] = torch.nan
        assert torch.allclose(result.values, expected, atol=1e-6, rtol=0, equal_nan=True)
        assert float(result.values.nan_to_num().max()) > 0.2


def test_name_mover_copy_at_named_positions():
    model, prompts = model_of("gpt2"), ragged()
    where = {"A": [2, 1, 3, 0, 1], "B": [4, 5, 6, 7, 2]}
    pairs = mk.PromptPairs.from_tokens(prompts, prompts, [(5, 7)] * 5, positions=where)
    both = head_scores(model, "name_mover_copy", prompts=pairs, positions=("A", "B"), progress=False).values
    one = [
        head_scores(model, "name_mover_copy", prompts=pairs, positions=(name,), progress=False).values for name in "AB"
    ]
    assert torch.allclose(both, (one[0] + one[1]) / 2, equal_nan=True)
    assert set(one[0][1:].unique().tolist()) <= {0.0, 1.0}
    small = head_scores(model, "name_mover_copy", prompts=pairs, positions=("A", "B"), budget=1, progress=False).values
    assert torch.equal(small.nan_to_num(), both.nan_to_num())


def test_known_name_mover():
    """The induction head copies what it reads, so it is a name mover for any token; its negative is not."""
    known = zoo.induction()
    prompts = Prompts.from_tokens([torch.arange(1, 20)])
    scores = head_scores(known.model, "name_mover_copy", prompts=prompts, progress=False)
    assert float(scores.values[1, 0, 0]) == 1
    negative = head_scores(known.model, "name_mover_copy", prompts=prompts, sign=-1, progress=False)
    assert float(negative.values[1, 0, 0]) == 0


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_composition_equals_whole_matrices(family):
    model, centres = model_of(family), family in LAYER_NORM
    ov, qk = (
        {(i, h): make(model, i, h, centres) for i in range(model.n_layers) for h in range(model.n_heads)}
        for make in (whole_ov, whole_qk)
    )
    for kind in ("Q", "K", "V"):
        result = composition_scores(model, kind)
        assert result.dims == ("layer", "head", "to_layer", "to_head")
        for i, h in ov:
            for j, g in ov:
                found = float(result.values[i, h, j, g])
                if j <= i:
                    assert found != found
                    continue
                receiver = {"Q": qk[j, g], "K": qk[j, g].mT, "V": ov[j, g]}[kind]
                expected = float((ov[i, h] @ receiver).norm() / ov[i, h].norm() / receiver.norm())
                assert abs(found - expected) < tolerance(family)


@torch.no_grad()
def test_composition_equals_transformer_lens():
    """It has no gains, so they are set to 1 here, in a model whose norms do not centre."""
    model = make_model("llama")  # a new one: it is changed behind autograd's back
    for block in model.bridge.blocks:
        block.ln1.original_component.weight.data.fill_(1.0)
    for kind in ("Q", "K", "V"):
        ours = composition_scores(model, kind).values
        theirs = model.bridge.all_composition_scores(kind).scores
        there = ~ours.isnan()
        assert int(there.sum()) == 6 * 16
        assert torch.allclose(ours[there], theirs[there], atol=1e-6, rtol=0)


def test_known_composition():
    """The hand-written induction head reads what the previous-token head writes through its keys, and through nothing else."""
    known = zoo.induction()
    sender, receiver = known.roles["previous_token"][0], known.roles["induction"][0]
    for kind in ("Q", "K", "V"):
        value = float(composition_scores(known.model, kind).values[(*sender, *receiver)])
        assert value > 0.05 if kind == "K" else value < 1e-6


def test_the_random_baseline_is_that_of_random_turns():
    generator = torch.Generator().manual_seed(0)
    model = model_of("gpt2")
    width, random = model.d_model, composition_scores(model, "V").baseline["random"]
    a, b = (torch.randn(width, 3, generator=generator) @ torch.randn(3, width, generator=generator) for _ in range(2))
    squares = []
    for _ in range(2000):
        turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        squares.append(float(((a @ turn @ b).norm() / a.norm() / b.norm()) ** 2))
    mean = sum(squares) / len(squares)
    assert abs(mean**0.5 - float(random)) < 0.05 * float(random)
    scores = composition_scores(model, "V")
    assert torch.allclose(scores.effect().values, scores.values - random, equal_nan=True)


def test_errors_and_nothing_stays_hooked():
    model, prompts = model_of("gpt2"), ragged()
    pairs = mk.PromptPairs.from_tokens(prompts, prompts, [(5, 7)] * 5)
    for message, arguments in (
        ("kind: expected", {"kind": "indution"}),
        ("sign: expected", {"kind": "name_mover_copy", "sign": 2}),
        ("sign: given", {"kind": "induction", "sign": -1}),
        ("prompts: given", {"kind": "copying", "prompts": prompts}),
        ("positions: given", {"positions": ("END",), "prompts": pairs}),
        ("positions: expected PromptPairs", {"kind": "name_mover_copy", "positions": ("END",), "prompts": prompts}),
        ("positions: expected names", {"kind": "name_mover_copy", "positions": ("IO",), "prompts": pairs}),
        ("length: given", {"prompts": prompts, "length": 5}),
        ("n: given", {"kind": "copying", "n": 5}),
        ("n, times, length: expected", {"length": 1000}),
        ("n, times, length: expected", {"n": 0}),
        ("length: expected prompts of at most 64", {"length": 50}),
        ("prompt 0: expected token ids", {"prompts": Prompts.from_tokens([[70, 1]])}),
        ("layers: expected", {"layers": [9], "length": 5}),
        ("heads: expected", {"heads": [], "length": 5}),
    ):
        with pytest.raises(ValueError, match=message):
            head_scores(model, progress=False, **arguments)
    with pytest.raises(ValueError, match="kind: expected one of 'Q'"):
        composition_scores(model, "k")
    model.train()
    for call in (head_scores, composition_scores, lambda m: head_scores(m, "copying")):
        with pytest.raises(ValueError, match="evaluation mode"):
            call(model)
    model.eval()
    for kind in ("copying", "name_mover_copy", "induction"):
        head_scores(model, kind, progress=False, **({} if kind == "copying" else {"length": 5}))
    assert not model.has_hooks


def test_half_precision_is_close():
    full = mk.HookedModel.from_hf(build_hf("llama", torch.float32))
    half = mk.HookedModel.from_hf(build_hf("llama", torch.bfloat16))
    for kind, given in (("induction", {"prompts": ragged()}), ("copying", {})):
        a, b = (head_scores(model, kind, progress=False, **given).values for model in (full, half))
        assert b.dtype == torch.float32
        assert torch.allclose(a, b, atol=0.15, equal_nan=True)


def test_results_survive_the_disk(tmp_path):
    model = model_of("gpt2")
    for i, result in enumerate((head_scores(model, n=2, length=5, progress=False), composition_scores(model))):
        again = mk.Result.load(result.save(tmp_path / f"{i}.safetensors"))
        assert torch.equal(again.values.nan_to_num(), result.values.nan_to_num())
        assert dict(again.provenance) == dict(result.provenance)


def test_smollm2_has_induction_heads(smollm2):
    best = head_scores(smollm2, "induction", n=2, progress=False).mean("prompt").top(5)
    previous = head_scores(smollm2, "previous_token", n=2, progress=False).mean("prompt").top(5)
    print(best, previous, sep="\n")
    assert best[0].label == "L18H6"
    assert best[0].value > 0.8
    assert {"L17H3", "L17H4"} <= {cell.label for cell in best}
    assert {"L16H0", "L11H1"} <= {cell.label for cell in previous if cell.value > 0.8}
    # Control: the same head's attention at the same distance, on tokens that do not come again.
    once = random_prompts(smollm2, "name_mover_copy", 2, 100, seed=0)
    with torch.no_grad():
        _, cache = smollm2.run_with_cache(torch.stack(once.tokens), ("pattern", 18))
    assert float(cache["pattern", 18][:, 6].diagonal(-49, -2, -1).mean()) < 0.05
