"""Sets of places as cells: each equals one whole pass in which all its places are edited."""

from __future__ import annotations

import pytest
import torch

import mechkit as mk
from helpers.families import FAMILIES
from helpers.reference import activations
from helpers.tiny import LENGTH, make_pairs, model_of, whole_vocabulary

SHAPES = ((LENGTH, 2), (LENGTH, 4), (5, 1))


def one_pass(model, tokens, edits):
    """Logits `[pos d_vocab]` of a whole pass; `edits` are `(hook name, index into [pos …], value [pos …])`."""
    hooks = []
    for name in dict.fromkeys(name for name, _, _ in edits):

        def write(x, hook, name=name):
            x = x.clone()
            for other, index, value in edits:
                if other == name:
                    x[0][index] = value[index]
            return x

        hooks.append((name, write))
    with torch.no_grad():
        return model.bridge.run_with_hooks(tokens[None], fwd_hooks=hooks)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_sets_of_heads_in_every_family(family):
    model, pairs = model_of(family), make_pairs(SHAPES)
    metric, tolerance = whole_vocabulary(pairs), 1e-4 if family == "mixtral" else 1e-10
    cells = {
        "two layers": [(1, 0), (3, 2)],
        "one layer": [(2, 1), (2, 3)],
        "one head": [(0, 1)],
        "all": [(3, 1), (0, 0), (1, 2)],
    }
    found = mk.activation_patching(model, pairs, metric, cells=cells, progress=False)
    assert found.provenance["replay"] == "suffix"
    assert (found.dims, found.coords["cell"]) == (("cell", "prompt"), tuple(cells))
    assert found.provenance["over"] == "layer head"
    assert found.provenance["cells"]["two layers"] == [[1, 0], [3, 2]]
    for i, (clean, corrupted) in enumerate(zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)):
        source = activations(model.bridge, clean[None])
        for k, places in enumerate(cells.values()):
            edits = [
                (f"blocks.{layer}.attn.hook_z", (slice(None), head), source[f"blocks.{layer}.attn.hook_z"][0])
                for layer, head in places
            ]
            logits = one_pass(model, corrupted, edits)
            expected = float(metric.read(logits[metric.positions[i]][None], torch.tensor([i]), None))
            assert abs(float(found.values[k, i]) - expected) <= tolerance * max(1, abs(expected)), (i, k)
    one = mk.activation_patching(model, pairs, metric, layers=[0], heads=[1], progress=False)
    assert torch.allclose(found.sel(cell="one head").values, one.values.flatten(), atol=tolerance * 10)
    assert float((found.values[0] - found.values[1]).abs().max()) > 1e-3


def test_sets_of_positions_and_neurons():
    model, pairs = model_of("llama"), make_pairs(SHAPES)
    metric = whole_vocabulary(pairs)
    found = mk.activation_patching(
        model,
        pairs,
        metric,
        site="resid_pre",
        over="layer pos",
        cells=[[(1, 2), (1, 4)], [(3, 1), (0, 4)]],
        progress=False,
    )
    assert found.coords["cell"] == ("L1 pos 2 + L1 pos 4", "L3 pos 1 + L0 pos 4")
    for i, (clean, corrupted) in enumerate(zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)):
        source = activations(model.bridge, clean[None])
        for k, places in enumerate((((1, 2), (1, 4)), ((3, 1), (0, 4)))):
            edits = [
                (f"blocks.{at}.hook_resid_pre", (pos,), source[f"blocks.{at}.hook_resid_pre"][0]) for at, pos in places
            ]
            logits = one_pass(model, corrupted, edits)
            expected = float(metric.read(logits[metric.positions[i]][None], torch.tensor([i]), None))
            assert abs(float(found.values[k, i]) - expected) <= 1e-10
    late = mk.activation_patching(
        model, pairs, metric, site="resid_pre", over="layer pos", cells=[[(1, 0), (1, 6)]], progress=False
    )
    assert late.values.isnan().tolist() == [[False, False, True]]  # the third prompt has five tokens
    neurons = mk.ablation(
        model,
        pairs,
        metric,
        site="mlp_post",
        over="layer neuron",
        cells={"both": [(1, 3), (2, 8)]},
        mode="zero",
        progress=False,
    )
    for i, clean in enumerate(pairs.clean.tokens):
        zero = torch.zeros(len(clean), model.width_of("mlp_post", 1), dtype=torch.float64)
        edits = [(f"blocks.{layer}.mlp.hook_post", (slice(None), at), zero) for layer, at in ((1, 3), (2, 8))]
        logits = one_pass(model, clean, edits)
        expected = float(metric.read(logits[metric.positions[i]][None], torch.tensor([i]), None))
        assert abs(float(neurons.values[0, i]) - expected) <= 1e-10


def test_named_positions_and_single_dims():
    model, pairs = model_of("gpt2"), make_pairs(SHAPES)
    positions = dict(pairs.positions) | {"SECOND": torch.tensor([1, 1, 1])}
    pairs = mk.PromptPairs(pairs.clean, pairs.corrupted, pairs.right, pairs.wrong, positions)
    metric = whole_vocabulary(pairs)
    both = mk.activation_patching(
        model,
        pairs,
        metric,
        site="resid_pre",
        over="layer position",
        cells=[[(0, "SECOND"), (0, "END")]],
        progress=False,
    )
    assert both.coords["cell"] == ("L0 SECOND + L0 END",)
    layers = mk.activation_patching(
        model, pairs, metric, site="mlp_out", over="layer", cells=[[1, 2], [-1]], progress=False
    )
    assert layers.coords["cell"] == ("L1 + L2", "L3")
    last = mk.activation_patching(model, pairs, metric, site="mlp_out", over="layer", layers=[3], progress=False)
    assert torch.allclose(layers.values[1], last.values[0], atol=1e-12)


@pytest.mark.parametrize("mode", ["zero", "mean", "position_mean", "resample"])
def test_the_best_cells_of_a_result_are_a_set(mode):
    model, pairs = model_of("llama"), make_pairs(((LENGTH, 2), (LENGTH, 4), (LENGTH, 1)))
    metric = whole_vocabulary(pairs)
    single = mk.ablation(model, pairs, metric, mode=mode, progress=False)
    best = single.top(6)
    found = mk.ablation(model, pairs, metric, mode=mode, cells=[best, best[:1]], progress=False)
    assert found.coords["cell"] == (f"{best[0].label} + 5 more", best[0].label)
    where = {dim: best[0].coords[dim] for dim in ("layer", "head")}
    assert torch.allclose(found.values[1], single.sel(**where).values, atol=1e-10)
    slow = mk.ablation(model, pairs, metric, mode=mode, cells=[best, best[:1]], progress=False, replay=False)
    assert torch.allclose(found.values, slow.values, atol=1e-10)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([], "got none"),
        ([[]], "at least one place"),
        ([[(0, 1), (0, 1)]], "each place once"),
        ([(0, 1)], "got 0"),
        ([[(0, 1, 2)]], r"each place \(layer, head\)"),
        ([[0]], r"such as \[\[\(0, 0\)\]\]"),
        ([[(9, 0)]], "expected a layer among 0, 1, 2, 3; got 9"),
        ([[(0, "x")]], "expected a head among"),
        ([[(0, True)]], "expected a head among"),
    ],
)
def test_refusals(cells, message):
    model, pairs = model_of("llama"), make_pairs(SHAPES)
    with pytest.raises(ValueError, match=message):
        mk.ablation(model, pairs, whole_vocabulary(pairs), cells=cells, progress=False)


def test_names_of_sets_are_text():
    model, pairs = model_of("llama"), make_pairs(SHAPES)
    with pytest.raises(TypeError, match="cells"):
        mk.ablation(model, pairs, whole_vocabulary(pairs), cells={3: [(0, 1)]}, progress=False)


def test_cells_and_restrictions_do_not_go_together():
    model, pairs = model_of("llama"), make_pairs(SHAPES)
    with pytest.raises(ValueError, match="layers: given beside cells"):
        mk.ablation(model, pairs, whole_vocabulary(pairs), cells=[[(0, 1)]], layers=[0], progress=False)
    layers = mk.ablation(model, pairs, whole_vocabulary(pairs), site="mlp_out", over="layer", progress=False)
    with pytest.raises(ValueError, match="which is a cell over 'layer'"):
        mk.ablation(model, pairs, whole_vocabulary(pairs), cells=[layers.top(2)], progress=False)
