"""Packed batches: the same numbers as whole passes, whatever runs together; and nothing of it is left on the model."""

from __future__ import annotations

import copy

import pytest
import torch

import mechkit as mk
from helpers.families import FAMILIES, build_hf
from helpers.planted import by_start
from helpers.tiny import D_VOCAB, make_model, make_pairs, model_of, whole_vocabulary
from mechkit.engine import _memory, _proof, _sweep
from mechkit.engine._packed import PackedReplayer
from mechkit.engine._packed_attention import keys_of

# Their attention is computed by a class of its own, takes a bias by distance, or rotates in single precision in a float64 model
SINGLE = {"gptj", "gpt_neo"}  # their attention computes in single precision
BY_START = {"bloom", "falcon", "gpt_neo", "gpt_neox", "gptj"}
RAGGED = ((7, 2), (7, 4), (5, 1), (9, 8), (9, 0), (2, 1), (12, 3), (1, 0))


@pytest.fixture
def packed(monkeypatch) -> list[int]:
    """How many rows each packed batch had, and of how many chunks."""
    batches: list[int] = []
    replay = PackedReplayer.replay

    def counted(self, plan, rows, read_last):
        batches.append(len(set(rows.chunk.tolist())))
        return replay(self, plan, rows, read_last)

    monkeypatch.setattr(PackedReplayer, "replay", counted)
    return batches


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    assert torch.equal(one.isnan(), other.isnan())
    return float((one - other).nan_to_num().abs().max())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mixtral"])
def test_which_families_pack(family, packed):
    """A family that no longer packs would be slower, and no number would show it."""
    model, pairs = model_of(family), make_pairs(RAGGED)
    for site, over in (("z", "layer head"), ("resid_pre", "layer pos"), ("mlp_out", "layer pos")):
        found = mk.activation_patching(model, pairs, whole_vocabulary(pairs), site=site, over=over, progress=False)
        whole = mk.activation_patching(
            model, pairs, whole_vocabulary(pairs), site=site, over=over, progress=False, replay=False
        )
        assert found.provenance["replay"] == "suffix"
        assert off(found.values, whole.values) <= (1e-4 if family in SINGLE else 1e-10)
    assert (max(packed, default=0) > 3) == (family not in BY_START)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("tokens", [1, 13, 64])
def test_batches_cut_anywhere(family, tokens, packed, monkeypatch):
    model, pairs = model_of(family), make_pairs(RAGGED)
    metric = whole_vocabulary(pairs)

    def swept():
        return mk.activation_patching(model, pairs, metric, site="z", over="layer pos head", progress=False).values

    together = swept()
    n = len(packed)
    monkeypatch.setattr(_memory, "CPU_TOKENS", tokens)
    assert off(swept(), together) <= 1e-10
    assert len(packed) - n > n  # the control: more batches


@pytest.mark.parametrize("family", ["llama", "llama_mqa", "qwen3", "gpt2", "gemma2", "olmo2"])
def test_cells_of_several_edits(family, packed):
    """Several sites, layers and positions in one cell; edits that overlap; per-prompt positions; values that broadcast."""
    model, pairs = model_of(family), make_pairs(RAGGED)
    n, last = len(pairs), tuple((pairs.clean.lengths - 1).tolist())
    heads = model.n_kv_heads - 1
    cells = [
        (mk.Edit("z", 0, head=1), mk.Edit("z", 2, head=0)),
        (mk.Edit("q", 1), mk.Edit("k", 1), mk.Edit("v", 1)),
        (mk.Edit("q", 3, head=1), mk.Edit("z", 3, head=1)),
        (mk.Edit("k", 3, head=heads), mk.Edit("v", 3, pos=0)),
        (mk.Edit("z", 1, head=0), mk.Edit("mlp_out", 1)),
        (mk.Edit("resid_pre", 2, pos=last), mk.Edit("v", 2, head=heads)),
        (mk.Edit("z", 2, value="zero"), mk.Edit("z", 2, head=1)),
        (mk.Edit("z", 2, value="zero", head=0, neuron=1),),
        (mk.Edit("z", 1, value="narrow", head=1),),
        (mk.Edit("q", 2, value="narrow", head=1, pos=last),),
    ]
    d = model.width_of("z")
    values = {
        "zero": {("z", 2): torch.zeros(1, 1, model.n_heads, d, dtype=model.dtype)},
        "narrow": {
            (site, layer): torch.full((n, 1, 1, 1), 0.5, dtype=model.dtype) for site, layer in (("z", 1), ("q", 2))
        },
    }
    metric = whole_vocabulary(pairs)

    def swept(**more):
        return mk.engine.sweep(
            model, pairs.corrupted, cells, metric, source=pairs.clean, values=values, progress=False, **more
        )

    found, whole = swept(), swept(replay=False)
    assert found.replay == "suffix"
    assert packed
    assert off(found.values, whole.values) <= 1e-10
    assert all(float((row - found.base).abs().max()) > 1e-6 for row in found.values)  # each cell does something


def test_metrics_that_read_elsewhere(packed):
    model, pairs = model_of("llama"), make_pairs(((7, 2), (7, 4), (9, 3)))
    ids = torch.randint(3, D_VOCAB, (len(pairs), 2), generator=torch.Generator().manual_seed(0))
    for positions in (torch.tensor([3, 5, 2]), torch.tensor([[0, 6], [4, 5], [2, 8]])):

        def read(logits, prompt, reference):
            picked = logits.flatten(1)[:, :7] * torch.arange(1, 8)
            return picked.sum(-1) + ids[prompt, 0]

        metric = mk.Metric("m", "", len(pairs), positions, None, read, None)
        one, other = (
            mk.activation_patching(
                model, pairs, metric, site="z", over="layer pos head", progress=False, replay=replay
            ).values
            for replay in (True, False)
        )
        assert off(one, other) <= 1e-10
    assert packed


def test_nothing_is_left_on_the_model():
    """Plain blocks share the model's parameters, and nothing else that an edit could be attached to."""
    hf = build_hf("llama", torch.float64)
    model, pairs = mk.HookedModel.from_hf(hf), make_pairs(RAGGED)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.bridge.modules()]
    before = hf(pairs.clean.tokens[0][None]).logits
    for site in ("z", "q", "k", "v"):
        mk.activation_patching(model, pairs, whole_vocabulary(pairs), site=site, progress=False)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.bridge.modules()]
    assert hf.config._attn_implementation == "eager"
    assert torch.equal(hf(pairs.clean.tokens[0][None]).logits, before)


def test_an_error_inside_leaves_nothing(monkeypatch):
    model, pairs = make_model("llama"), make_pairs()
    expected = mk.activation_patching(model, pairs, whole_vocabulary(pairs), site="v", progress=False)

    def fails(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mechkit.engine._packed.write_tokens", fails)
        with pytest.raises(KeyboardInterrupt):
            mk.activation_patching(model, pairs, whole_vocabulary(pairs), site="v", progress=False)
    again = mk.activation_patching(model, pairs, whole_vocabulary(pairs), site="v", progress=False)
    assert torch.equal(again.values, expected.values)


def test_an_attention_of_ones_own_is_not_packed_and_right():
    """A class that computes its attention by itself: it never asks for ours, and whole rows would see one another."""
    hf = build_hf("llama", torch.float64)
    kind = type(hf.model.layers[1].self_attn)

    class Own(kind):
        def forward(self, hidden_states, *args, **kwargs):
            config, self.config = self.config, copy.copy(self.config)
            self.config._attn_implementation_internal = "eager"
            try:
                return super().forward(hidden_states, *args, **kwargs)
            finally:
                self.config = config

    hf.model.layers[1].self_attn.__class__ = Own
    model, pairs = mk.HookedModel.from_hf(hf), make_pairs(RAGGED)
    metric = whole_vocabulary(pairs)
    kinds = []
    replayer = _proof._replayer

    def seen(several):
        kinds.append(several[0].chunk.state.proof.candidates[0].packs)
        return replayer(several)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_proof, "_replayer", seen)
        found = mk.activation_patching(model, pairs, metric, site="z", progress=False)
    assert kinds[0]
    assert not kinds[-1]
    whole = mk.activation_patching(model, pairs, metric, site="z", progress=False, replay=False)
    assert off(found.values, whole.values) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_are_added_where_vectors_are_longer(dtype):
    """In single precision short rows are given more keys, which are masked: as close to double precision as before."""
    assert keys_of(5, dtype) == 16
    assert keys_of(5, torch.float64) == 5
    assert keys_of(40, dtype) == 40
    pairs = make_pairs(RAGGED)
    metric = whole_vocabulary(pairs)
    exact = mk.activation_patching(model_of("llama"), pairs, metric, site="z", progress=False).values
    model = mk.HookedModel.from_hf(build_hf("llama", dtype))
    spread = float(exact.abs().max())

    def error():
        found = mk.activation_patching(model, pairs, metric, site="z", progress=False)
        assert found.provenance["replay"] == "suffix"
        return float((found.values - exact).abs().max()) / spread

    together = error()
    with by_start():
        apart = error()
    assert together <= max(2 * apart, 1e-6)


def test_several_lengths_cost_two_passes_each_and_one_proof(monkeypatch):
    """Per length: base and source recorded together, and whole passes of a few rows. Blocks are proved for all at once."""
    model, pairs = model_of("llama"), make_pairs(RAGGED)
    records, proofs = [], []
    record, proved = _sweep.record, _sweep.proved_replayer
    monkeypatch.setattr(_sweep, "record", lambda *a, **k: records.append(1) or record(*a, **k))
    monkeypatch.setattr(_sweep, "proved_replayer", lambda several: proofs.append(len(several)) or proved(several))
    mk.activation_patching(model, pairs, whole_vocabulary(pairs), site="z", progress=False)
    lengths = len({length for length, _ in RAGGED})
    assert len(records) == lengths
    assert proofs == [lengths]


def test_prompts_that_do_not_fit_together(monkeypatch):
    """Little memory: chunks are recorded and answered one after the other, with the same answers."""
    model, pairs = model_of("gpt2"), make_pairs((*RAGGED, (9, 2), (9, 3)))
    metric = whole_vocabulary(pairs)
    expected = mk.activation_patching(model, pairs, metric, site="z", progress=False)
    together = []
    answers = _sweep.packed_answers
    monkeypatch.setattr(_sweep, "packed_answers", lambda *a: together.append(len(a[1])) or answers(*a))
    found = mk.activation_patching(model, pairs, metric, site="z", progress=False, budget=1)
    assert set(together) == {1}
    assert len(together) == len(pairs)
    assert off(found.values, expected.values) <= 1e-10


def test_recordings_are_made_once_and_change_nothing():
    model, pairs = model_of("llama"), make_pairs(RAGGED)
    metric = whole_vocabulary(pairs)
    calls = []

    def make(base, source, ids, site, layer):
        calls.append((site, layer))
        return base.sites[site, layer] + 0.5 * (source.sites[site, layer] - base.sites[site, layer])

    def swept(layer, recordings):
        return mk.engine.sweep(
            model,
            pairs.corrupted,
            [(mk.Edit("z", layer, "half", head=head),) for head in range(model.n_heads)],
            metric,
            source=pairs.clean,
            derived={"half": mk.engine.Derived((("z", layer),), make)},
            progress=False,
            recordings=recordings,
        )

    shared = mk.engine.Recordings(frozenset(("z", layer) for layer in range(model.n_layers)))
    costs = []
    for layer in range(model.n_layers):
        one, other = swept(layer, shared), swept(layer, None)
        assert off(one.values, other.values) <= 1e-10
        assert torch.allclose(one.base, other.base, atol=1e-11)
        costs.append((one.cost.block_tokens, other.cost.block_tokens))
    two_runs = 2 * int(pairs.clean.lengths.sum()) * model.n_layers
    assert costs[0][0] == costs[0][1]
    assert all(one <= other - two_runs for one, other in costs[1:])


def test_a_block_that_numbers_tokens_is_not_packed():
    """As Llama 4 does: harmless among the few tokens of the proof, wrong among the many of a batch."""
    hf = build_hf("llama", torch.float64)

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            output = super().forward(x)
            return output * (1.0 + (torch.arange(output.shape[1]) >= 400)[None, :, None])

    for layer in hf.model.layers:
        layer.self_attn.q_proj.__class__ = Scaled
    model, pairs = mk.HookedModel.from_hf(hf), make_pairs(RAGGED * 3)
    metric = whole_vocabulary(pairs)
    found = mk.activation_patching(model, pairs, metric, site="resid_pre", over="layer pos", progress=False)
    whole = mk.activation_patching(
        model, pairs, metric, site="resid_pre", over="layer pos", progress=False, replay=False
    )
    assert off(found.values, whole.values) <= 1e-10
    assert found.provenance["replay"] == "suffix"  # by starts
    with pytest.MonkeyPatch.context() as patch:  # the control
        patch.setattr("mechkit.engine._packed_attention.TokensNumbered.__torch_dispatch__", unwatched)
        patch.setattr("mechkit.engine._answers.check_packed_batch", lambda *_: None)
        wrong = mk.activation_patching(model, pairs, metric, site="resid_pre", over="layer pos", progress=False)
    assert off(wrong.values, whole.values) > 1e-3


def unwatched(self, func, types, args=(), kwargs=None):
    return func(*args, **(kwargs or {}))


def test_values_of_one_entry_in_one_layer():
    """A value's shape says nothing of how wide a head is."""
    model, pairs = model_of("llama"), make_pairs(RAGGED)
    metric, d = whole_vocabulary(pairs), model.width_of("z")
    cells = [
        (mk.Edit("z", layer, "zero", head=head),) for layer in range(model.n_layers) for head in range(model.n_heads)
    ]
    wide = torch.zeros(1, 1, 1, d, dtype=model.dtype)
    expected = mk.engine.sweep(
        model,
        pairs.clean,
        cells,
        metric,
        values={"zero": {("z", i): wide for i in range(model.n_layers)}},
        progress=False,
    )
    for narrow in range(model.n_layers):
        values = {("z", i): wide[..., :1] if i == narrow else wide for i in range(model.n_layers)}
        found = mk.engine.sweep(model, pairs.clean, cells, metric, values={"zero": values}, progress=False)
        assert found.replay == "suffix"
        assert off(found.values, expected.values) <= 1e-10
