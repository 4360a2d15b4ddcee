"""The hand-built vision-language model: what each head attends to and writes, which patch counts, and what attention hides."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

import mechkit as mk
from mechkit import zoo
from mechkit.zoo import _copied_patch as built

QUIET = {"progress": False}
PLACES = {(2, 0): 6, (1, 1): 4}
N = built.SIDE**2
SEEN = slice(sum(built.UNITS.values()) - built.N_COLOURS, sum(built.UNITS.values()))  # the feature that nothing reads


@pytest.fixture(scope="module", params=PLACES, ids=str)
def known(request: pytest.FixtureRequest) -> zoo.Known:
    return zoo.copied_patch(4, place=request.param)


@pytest.fixture(scope="module")
def default() -> zoo.Known:
    return zoo.copied_patch()


def place_of(known: zoo.Known) -> int:
    """From the weights: where the copying head's keys are."""
    layer, head = known.roles["copier"][0]
    keys = known.model.bridge.original_model.model.language_model.layers[layer].self_attn.k_proj.weight
    first = built.D_VOCAB + built.N_COLOURS
    return int(keys[head * built.D_HEAD + built.STILL + 1, first : first + N].argmax())


def patches_of(prompts: mk.Prompts, i: int) -> list[int]:
    assert prompts.segments is not None
    return [at for segment in prompts.segments[i] if segment.kind == "image" for at in segment.positions]


def only(shape: tuple[int, ...], *cells: tuple[int, ...]) -> Tensor:
    """1 at these cells, 0 elsewhere, with an axis for prompts."""
    wanted = torch.zeros(shape, dtype=torch.float64)
    for cell in cells:
        wanted[cell] = 1
    return wanted[..., None]


def off(result: mk.Result, wanted: Tensor) -> float:
    """The largest deviation over cells and prompts."""
    return float((result.normalized().values - wanted).abs().max())


def test_the_model_is_sound(known):
    model = known.model
    model.validate()
    assert model.dtype == torch.float64
    assert not model.training
    assert not model.has_hooks
    roles = [component for role in known.roles.values() for component in role]
    every = [(layer, head) for layer in range(model.n_layers) for head in (*range(model.n_heads), None)]
    assert sorted(roles, key=str) == sorted(every, key=str)
    assert len({len(row) for row in known.pairs.clean.tokens}) > 1
    assert len({patches_of(known.pairs.clean, i)[0] for i in range(len(known.pairs))}) > 1


def test_the_answer_is_the_colour_of_the_patch(known):
    """Over pictures of all kinds, in an untouched model of transformers; every other token has logit 0."""
    place, generator = place_of(known), torch.Generator().manual_seed(5)
    hf = built._written(place)
    for _ in range(10):
        colours = torch.randint(built.N_COLOURS, (N,), generator=generator)
        tokens = torch.tensor([[built.BOS, 7, *[built.IMAGE] * N, 5, 6, built.ASK]])
        prompts = mk.Prompts.from_inputs(known.model, tokens, [{"pixel_values": built._painted(colours)}])
        with torch.no_grad():
            logits = hf(tokens, **prompts.inputs[0]).logits[0, -1]
        wanted = torch.zeros(built.D_VOCAB, dtype=torch.float64)
        wanted[built.RED + int(colours[place])] = built.LOGIT
        assert torch.allclose(logits, wanted, atol=1e-6, rtol=0)


def test_all_patches_differ_in_each_pair(known):
    base = mk.activation_patching(known.model, known.pairs, known.metric, over="layer", **QUIET).baseline
    assert torch.allclose(base["clean"], torch.tensor(built.LOGIT).double(), atol=1e-6, rtol=0)
    assert torch.allclose(base["corrupted"], -torch.tensor(built.LOGIT).double(), atol=1e-6, rtol=0)
    assert known.pairs.clean.inputs is not None
    assert known.pairs.corrupted.inputs is not None
    for one, other in zip(known.pairs.clean.inputs, known.pairs.corrupted.inputs, strict=True):
        pixels = (one["pixel_values"] - other["pixel_values"]).abs().amax(1)[0]
        assert bool((pixels == 1).all())


@pytest.mark.parametrize("replay", [True, False])
def test_one_patch_carries_the_answer(known, replay):
    """Up to the layer that copies it; then none does."""
    found = mk.image_patching(known.model, known.pairs, known.metric, replay=replay, **QUIET)
    place = place_of(known)
    assert found.coords["patch"][place] == f"r{place // 3}c{place % 3}"
    assert place == PLACES[place // 3, place % 3]
    assert off(found, only((built.N_LAYERS, N), (0, place), (1, place))) <= 1e-6
    noise = mk.image_patching(known.model, known.pairs, known.metric, direction="noise", replay=replay, **QUIET)
    assert off(noise, 1 - only((built.N_LAYERS, N), (0, place), (1, place))) <= 1e-6


def test_one_head_copies_it(known):
    wanted = only((built.N_LAYERS, built.N_HEADS), *known.roles["copier"])
    args = known.model, known.pairs, known.metric
    assert off(mk.activation_patching(*args, "z", "layer head", **QUIET), wanted) <= 1e-6
    at_end = mk.activation_patching(*args, "z", "layer head position", positions=["END"], **QUIET)
    assert off(at_end, wanted[:, :, None]) <= 1e-6
    estimated = mk.attribution_patching(*args, site="z", over="layer head")
    assert off(estimated, wanted) <= 1e-6  # attention is by place, so that all the rest is linear


def test_what_else_carries_it(default):
    """The copying head's value at the patch; no query, key, pattern or MLP, which are the same in both runs."""
    args = default.model, default.pairs[[0, 1]], default.metric[[0, 1]]
    values = mk.activation_patching(*args, "v", "layer head patch", **QUIET)
    assert off(values, only((built.N_LAYERS, built.N_HEADS, N), (*built.COPIER, 6))) <= 1e-6
    for site in ("q", "k", "pattern", "mlp_out"):
        over = "layer" if site == "mlp_out" else "layer head"
        assert float(mk.activation_patching(*args, site, over, **QUIET).normalized().values.abs().max()) <= 1e-6


def test_attention_does_not_tell_what_matters(known):
    """From the last position the distractors look at the picture as much as the head that copies; patching clears them."""
    place, other = place_of(known), built.opposite(place_of(known))
    assert other != place
    looks = {at: torch.zeros(N, dtype=torch.float64) for at in itertools.product(range(3), range(4))}
    looks[built.COPIER][place] = looks[built.DISTRACTOR][other] = 1
    looks[built.WATCHER][:] = 1 / N
    for i in range(len(known.pairs)):
        patterns = mk.attention_patterns(known.model, known.pairs.clean[[i]], **QUIET)
        assert patterns.dims == ("layer", "head", "dest", "src", "prompt")
        for (layer, head), wanted in looks.items():
            row = patterns.values[layer, head, -1, :, 0].double()
            assert torch.allclose(row[patches_of(known.pairs.clean, i)], wanted, atol=1e-6, rtol=0)
            assert float(row[0]) == pytest.approx(1 - float(wanted.sum()), abs=1e-6)  # the rest of it: to BOS
    patched = mk.activation_patching(known.model, known.pairs, known.metric, "z", "layer head", **QUIET)
    for layer, head in known.roles["distractor"]:
        assert float(patched.normalized().values[layer, head].abs().max()) <= 1e-6


def recorded(place: int, prompts: mk.Prompts, path: str) -> list[tuple[Tensor, Tensor]]:
    """What a module of an untouched model read and gave at the last position, for each prompt."""
    hf, found = built._written(place), []
    hf.get_submodule(path).register_forward_hook(lambda _, args, out: found.append((args[0][0, -1], out[0, -1])))
    assert prompts.inputs is not None
    with torch.no_grad():
        for tokens, inputs in zip(prompts.tokens, prompts.inputs, strict=True):
            hf(tokens[None], **inputs)
    return found


def test_the_distractor_knows_the_colours(known):
    """It copies what it sees into a feature of its own, and that differs in every pair: it has no effect because nothing reads
    it."""
    layer, head = built.DISTRACTOR
    path = f"model.language_model.layers.{layer}.self_attn.o_proj"
    place, seen = place_of(known), []
    for prompts in (known.pairs.clean, known.pairs.corrupted):
        assert prompts.inputs is not None
        colours = [one["pixel_values"][0, :, :: built.PIXELS, :: built.PIXELS].flatten(1) for one in prompts.inputs]
        for z, written in recorded(place, prompts, path):
            colour = colours.pop(0)[:, built.opposite(place)]
            assert torch.allclose(z[head * built.D_HEAD :][: built.N_COLOURS], colour, atol=1e-6, rtol=0)
            assert torch.allclose(written[SEEN], colour, atol=1e-6, rtol=0)
            seen.append(colour)
    half = len(known.pairs)
    assert all(float((one - two).abs().max()) == 1 for one, two in zip(seen[:half], seen[half:], strict=True))


def test_knockout(default):
    """Without its look at the picture the head copies nothing; the last layer needs no picture any more."""
    found = mk.attention_knockout(
        default.model, default.pairs, default.metric, from_="image", to="END", window=1, **QUIET
    )
    assert torch.allclose(found.values[1], torch.zeros(1).double(), atol=1e-6, rtol=0)
    for layer in (0, 2):
        assert torch.allclose(found.values[layer], found.baseline["clean"], atol=1e-6, rtol=0)
    alone = mk.attention_knockout(
        default.model,
        default.pairs,
        default.metric,
        from_="image",
        to="END",
        window=1,
        heads=[built.DISTRACTOR[1]],
        **QUIET,
    )
    assert float((alone.values - alone.baseline["clean"]).abs().max()) <= 1e-6


def test_the_circuit(default):
    args = default.model, default.pairs, default.metric
    exact = mk.edge_patching(*args, **QUIET)
    true = mk.Circuit.from_edges(default.model, default.circuit)
    assert mk.circuits.roc(exact, true).auroc == 1
    top = {edge.name: edge.score for edge in exact.top(4)}
    assert {name for name, score in top.items() if abs(score) > 1e-6} == default.circuit
    assert [top[name] for name in default.circuit] == pytest.approx([2 * built.LOGIT] * 2, abs=1e-6)
    report = mk.evaluate_circuit(true, *args, random=0, sets=2, minimality="edge", **QUIET)
    assert report.faithfulness.value == pytest.approx(1, abs=1e-8)
    assert min(map(abs, report.minimality.values())) > 0.9
    half = mk.evaluate_circuit(true.without(next(iter(true))), *args, random=0, sets=0, minimality=None)
    assert half.faithfulness.value < 0.1


def test_norms_lose_nothing(default):
    """Every norm gives the features as they come, though it computes in float32."""
    layers = [
        f"layers.{layer}.{norm}" for layer in range(3) for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    for norm in (*layers, "norm"):
        for before, after in recorded(6, default.pairs.clean, f"model.language_model.{norm}"):
            assert float((before - after).abs().max()) <= 1e-30  # what attention leaves to others: exp(-80)
            assert float(before[:-1].abs().max()) == 1


def _no_copy(text, hf) -> None:
    text.layers[1].self_attn.v_proj.weight[: built.D_HEAD] = 0


def _no_look(text, hf) -> None:
    text.layers[1].self_attn.q_proj.weight[: built.D_HEAD] = 0


def _read_the_distractor(text, hf) -> None:
    hf.lm_head.weight[built.RED : built.RED + built.N_COLOURS, SEEN] = torch.eye(built.N_COLOURS).double()


@pytest.mark.parametrize("defect", [_no_copy, _no_look, _read_the_distractor])
@torch.no_grad()
def test_planted_defects_are_seen(defect, monkeypatch):
    """The same claims fail on a model that is written otherwise."""
    plain = built._written

    def defective(place):
        hf = plain(place)
        defect(hf.model.language_model, hf)
        return hf

    monkeypatch.setattr(built, "_written", defective)
    known = zoo.copied_patch()
    args = known.model, known.pairs, known.metric
    patches = mk.image_patching(*args, **QUIET)
    heads = mk.activation_patching(*args, "z", "layer head", **QUIET)
    answered = torch.allclose(patches.baseline["clean"], torch.tensor(built.LOGIT).double(), atol=1e-6, rtol=0)
    right = answered and off(patches, only((3, N), (0, 6), (1, 6))) <= 1e-6
    assert not (right and off(heads, only((3, 4), built.COPIER)) <= 1e-6)


def test_building_is_deterministic_and_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two, other = zoo.copied_patch(seed=1), zoo.copied_patch(seed=1), zoo.copied_patch(seed=2, place=(0, 0))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32
    assert one.model.weights_hash == two.model.weights_hash != other.model.weights_hash
    assert one.pairs.clean.hash() == two.pairs.clean.hash() != other.pairs.clean.hash()
    again = copy.deepcopy(one)
    assert again.model.weights_hash == one.model.weights_hash


def test_wrong_arguments():
    with pytest.raises(ValueError, match="n: expected at least 1 pair, got 0"):
        zoo.copied_patch(n=0)
    with pytest.raises(ValueError, match=r"place: expected a row and a column in 0..2, got \(3, 0\)"):
        zoo.copied_patch(place=(3, 0))
    assert len(zoo.copied_patch(n=7).pairs) == 7
