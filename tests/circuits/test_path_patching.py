"""Path patching against its definition, run by run with whole forward passes; and against edge patching."""

from __future__ import annotations

import pytest
import torch

import mechkit as mk
from helpers.reference_circuits import whole_run
from helpers.tiny import make_pairs, model_of, whole_vocabulary

FAMILIES = ["gpt2", "llama", "llama_mqa", "gemma2", "gptj", "falcon", "opt", "bloom", "olmo2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_receiver_is_one_edge(family):
    model, pairs = model_of(family), make_pairs()
    metric = whole_vocabulary(pairs)
    graph = mk.Graph.of(model)
    value = next(reader.name for reader in graph.readers if reader.kind == "v" and reader.layer == 2)
    for direction in ("denoise", "noise"):
        exact = mk.edge_patching(model, pairs, metric, direction=direction, progress=False)
        sign = 1 if direction == "denoise" else -1
        for receiver in ("logits", "m2", "a3.h2<q>", value):
            paths = mk.path_patching(
                model, pairs, metric, receivers=[receiver], direction=direction, progress=False
            ).effect()
            r = graph.reader_index[receiver]
            for writer in graph.writers:
                if writer.head is None:
                    continue
                w = graph.writer_index[writer.name]
                found = paths.sel(layer=writer.layer, head=writer.head).values
                if not graph.exists[w, r]:  # no path: no number either
                    assert found.isnan().all(), (writer.name, receiver)
                    continue
                assert torch.allclose(found, sign * exact.per_prompt[w, r], atol=1e-9), (writer.name, receiver)


def naive_to_logits(
    model: mk.HookedModel, base: torch.Tensor, source: torch.Tensor, layer: int, head: int
) -> torch.Tensor:
    """The IOI paper's procedure, hook by hook: every head's z is frozen at the base run's, except the sender's, which is the
    source run's; MLPs are recomputed. The final stream of that run is what the unembedding sees."""
    kept: dict[tuple[str, int], torch.Tensor] = {}

    def keep(name: str, at: int):
        def fn(z, hook):
            kept[name, at] = z.clone()

        return fn

    for name, tokens in (("base", base), ("source", source)):
        with torch.no_grad(), model.hooks([(("z", i), keep(name, i)) for i in range(model.n_layers)]):
            model.bridge(tokens)

    def freeze(at: int):
        def fn(z, hook):
            z = kept["base", at].clone()
            if at == layer:
                heads, source_heads = (x.view(*x.shape[:2], model.n_heads, -1) for x in (z, kept["source", at]))
                heads[:, :, head] = source_heads[:, :, head]
            return z

        return fn

    with torch.no_grad(), model.hooks([(("z", i), freeze(i)) for i in range(model.n_layers)]):
        return model.bridge(base)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "falcon", "opt"])
def test_heads_frozen_as_in_the_ioi_paper(family):
    model, pairs = model_of(family), make_pairs()
    metric = whole_vocabulary(pairs)
    paths = mk.path_patching(model, pairs, metric, freeze="heads", direction="noise", progress=False)
    frozen = mk.path_patching(model, pairs, metric, freeze="all", direction="noise", progress=False)
    for layer, head in ((0, 1), (1, 3), (3, 0)):
        for i, (clean, corrupted) in enumerate(zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)):
            logits = naive_to_logits(model, clean[None], corrupted[None], layer, head)
            expected = metric.read(logits[:, metric.positions[i]], torch.tensor([i]), None)
            assert float(paths.sel(layer=layer, head=head).values[i]) == pytest.approx(float(expected), abs=1e-9)
    # Control: MLPs in between do something (but not behind the last layer's heads of a parallel block).
    assert float((paths.values - frozen.values).abs().max()) > 1e-3


def test_several_receivers_keep_the_values_they_were_given():
    """Each receiver's value is computed from its own input, by the weights; then both are written into one run."""
    model, pairs = model_of("gpt2"), make_pairs(((7, 2),))
    metric, tokens = whole_vocabulary(pairs), pairs.clean.tokens[0][None]
    base, source = whole_run(model.bridge, tokens), whole_run(model.bridge, pairs.corrupted.tokens[0][None])
    change = source.wrote["a0.h1"] - base.wrote["a0.h1"]
    with torch.no_grad():
        second, last = model.bridge.blocks[2], model.bridge.blocks[3]
        q = second.ln1(base.read["a2.h1<q>"] + change) @ second.attn.W_Q[1] + second.attn.b_Q[1]
        mlp = last.mlp(last.ln2((base.read["m3"] + change)[None]))

    def write_q(x, hook):
        x = x.clone()
        x[:, :, 1] = q
        return x

    with torch.no_grad(), model.hooks([(("q", 2), write_q), (("mlp_out", 3), lambda x, hook: mlp)]):
        logits = model.bridge(tokens)
    expected = metric.read(logits[:, metric.positions[0]], torch.tensor([0]), None)
    found = mk.path_patching(
        model, pairs, metric, senders=["a0.h1"], receivers=["a2.h1<q>", "m3"], direction="noise", progress=False
    )
    assert float(found.values[0, 0]) == pytest.approx(float(expected), abs=1e-9)
    assert abs(float(found.effect().values[0, 0])) > 1e-3


def test_positions_are_patched_one_at_a_time():
    model, pairs = model_of("llama"), make_pairs(((7, 2), (7, 4)))
    metric = whole_vocabulary(pairs)
    by_position = mk.path_patching(model, pairs, metric, senders="layer head pos", receivers=["m3"], progress=False)
    assert by_position.dims == ("layer", "head", "pos", "prompt")
    for pos in (0, 3, 6):
        alone = mk.path_patching(model, pairs, metric, receivers=["m3"], positions=[pos], progress=False)
        at = by_position.values[:, :, pos]
        assert torch.allclose(alone.values, at, atol=1e-12, equal_nan=True)
    assert torch.allclose(
        by_position.effect().values[:, :, 0], torch.zeros(1, dtype=torch.float64), atol=1e-12
    )  # alike
    named = mk.path_patching(model, pairs, metric, senders="layer position", receivers=["logits"], progress=False)
    assert named.dims == ("layer", "position", "prompt")
    assert named.coords["position"] == ("END",)


def test_senders_by_name_and_mlps():
    model, pairs = model_of("gpt2"), make_pairs()
    metric = whole_vocabulary(pairs)
    named = mk.path_patching(model, pairs, metric, senders=["input", "a1.h2", "m1"], progress=False)
    heads = mk.path_patching(model, pairs, metric, progress=False)
    mlps = mk.path_patching(model, pairs, metric, senders="layer", progress=False)
    (one,) = heads.sel(layer=[1], head=[2]).top(1)
    assert one.label == next(cell.label for cell in named.top(3) if cell.coords["sender"] == "a1.h2") == "L1H2"
    again = mk.path_patching(model, pairs, metric, senders=["input", one.label, "m1"], progress=False)
    assert again.coords == named.coords  # a label of a grid is a name
    assert torch.equal(again.values, named.values)
    assert torch.allclose(named.sel(sender="a1.h2").values, heads.sel(layer=1, head=2).values, atol=1e-12)
    assert torch.allclose(named.sel(sender="m1").values, mlps.sel(layer=1).values, atol=1e-12)
    assert float((named.sel(sender="input").effect().values).abs().max()) > 1e-3


def test_there_is_no_number_where_there_is_no_path():
    model, pairs = model_of("gptj"), make_pairs()
    metric = whole_vocabulary(pairs)
    with pytest.raises(ValueError, match=r"no path leads from a1.h2 to m1"):  # parallel blocks
        mk.path_patching(model, pairs, metric, senders=["a1.h2"], receivers=["m1"], progress=False)
    several = mk.path_patching(model, pairs, metric, senders=["m1"], receivers=["m1", "m2"], progress=False)
    alone = mk.path_patching(model, pairs, metric, senders=["m1"], receivers=["m2"], progress=False)
    assert torch.equal(several.values, alone.values)
    assert float(several.effect().values.abs().max()) > 1e-3
    grid = mk.path_patching(model, pairs, metric, senders="layer", receivers=["m2"], freeze="heads", progress=False)
    assert grid.values.isnan().all(1).tolist() == [False, False, True, True]
    assert [cell.effect != 0 for cell in grid.mean("prompt").top(4)] == [True, True]


def test_small_budgets_and_leftover_hooks():
    model, pairs = model_of("gptj"), make_pairs()
    metric = whole_vocabulary(pairs)
    large = mk.path_patching(model, pairs, metric, receivers=["m3"], freeze="heads", progress=False)
    small = mk.path_patching(model, pairs, metric, receivers=["m3"], freeze="heads", budget=2**16, progress=False)
    assert torch.allclose(large.values, small.values, atol=1e-10, equal_nan=True)
    assert not model.has_hooks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"receivers": ["logits", "m3"]}, "receivers: expected 'logits' alone"),
        (
            {"receivers": "logits"},
            r"receivers: expected a list of strings, got str 'logits'. Write receivers=\['logits'\]",
        ),
        ({"receivers": []}, "receivers: expected at least one"),
        ({"receivers": ["a9.h0<q>"]}, "reader: expected"),
        ({"senders": "head"}, "senders: expected 'layer head'"),
        ({"senders": ["a0.h9"]}, "writer: expected"),
        ({"senders": []}, "senders: expected at least one"),
        ({"freeze": "mlps"}, "freeze: expected 'all' or 'heads'"),
        ({"direction": "up"}, "direction: expected"),
        ({"positions": ["S2"]}, "positions: expected names among END"),
        (
            {"senders": ["m3"], "receivers": ["m1"]},
            "senders: .* m1 can read, got m3: no path leads from m3 to m1, which reads",
        ),
        (
            {"senders": ["m0", "a1.h2"], "receivers": ["a1.h0<q>", "a1.h1<v>"]},
            "no path leads from a1.h2 to a1.h0<q>, a1.h1<v>",
        ),
        (
            {"senders": "layer head pos", "receivers": ["a0.h1<k>"]},
            "no path leads from a0.h0 to a0.h1<k>.* may be input;",
        ),
        (
            {"senders": ["logits"], "receivers": ["m1"]},
            "senders: .* got 'logits', which reads: no path leads from logits to m1",
        ),
        (
            {"senders": ["m0"], "receivers": ["input"]},
            "receivers: .* got 'input', which writes: no path leads from m0 to input",
        ),
    ],
)
def test_refusals(arguments, message):
    model, pairs = model_of("gpt2"), make_pairs()
    with pytest.raises(ValueError, match=message):
        mk.path_patching(model, pairs, whole_vocabulary(pairs), progress=False, **arguments)
    assert not model.has_hooks
