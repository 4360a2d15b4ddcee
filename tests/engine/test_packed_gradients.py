"""Gradients of pairs of several lengths in one pass: against autograd through whole runs of each pair, and planted defects."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch

import mechkit as mk
from helpers.families import FAMILIES as FAMILIES_OF
from helpers.families import build_of
from helpers.planted_gradients import BACKWARD, DEFECTS, one_length_at_a_time, packs_taken, unproved
from helpers.tiny import make_pairs, model_of, whole_vocabulary
from mechkit.engine import SITES_PACKED, _packed_together
from mechkit.experiment import packed
from mechkit.hooks import SITES
from mechkit.hooks._hooking import Hooks
from mechkit.hooks._record import record

# (length, first difference): at the start, at the end, several in one length, lengths with one pair, longer than a window.
SHAPES = ((7, 3), (5, 1), (7, 4), (9, 0), (9, 8), (9, 2), (12, 2), (12, 11), (6, 5), (18, 3), (18, 13))
FAMILIES = ("llama", "llama_mqa", "mistral", "gemma2", "gemma3", "qwen3", "gpt2", "opt", "olmo2", "phi")
WHOLE = ("result", "pattern", "attn_scores")  # no module reads or gives these: they are run one length at a time


def over_of(site: str) -> str:
    return " ".join(dim for dim in ("layer", "pos", "head") if dim == "layer" or dim in SITES[site].dims)


def sites_of(model: mk.HookedModel) -> list[str]:
    """Sites that can be packed: where queries, keys and values come from one matrix, these are not among them."""
    joint = model.bridge.blocks[0].attn.__class__.__name__.startswith("Joint")
    return [site for site in SITES_PACKED if model.has_site(site) and not (joint and site in ("q", "k", "v"))]


def effects(model, pairs, metric, sites, **options):
    found = mk.attribution_patching(model, pairs, metric, sites, progress=False, **options)
    assert not model.has_hooks
    return found


def naive(model, pairs, metric, sites, direction):
    """Each pair by itself, whole runs, gradients at every site: `[layer pos (head) prompt]`, NaN where a prompt is short."""
    sides = (pairs.corrupted, pairs.clean) if direction == "denoise" else (pairs.clean, pairs.corrupted)
    longest, out = int(pairs.clean.lengths.max()), {}
    names = [(site, layer) for site in sites for layer in range(model.n_layers)]
    for i in range(len(pairs)):
        base, source = (model.run_with_cache(side.tokens[i][None], names)[1] for side in sides)
        slopes = {}
        with torch.enable_grad(), _Backward(model, names, slopes):
            logits = model.run_with_hooks(sides[0].tokens[i][None], [])
            value = metric.read(logits[:, metric.positions[i]], torch.tensor([i]), None)
            value.sum().backward(inputs=list(model.bridge.original_model.parameters()))
        model.bridge.original_model.zero_grad(set_to_none=True)
        for site, layer in names:
            name = SITES[site].hook_name(layer)
            summed = ((source[name] - base[name]).detach() * slopes[site, layer])[0].sum(-1).double()
            shape = (model.n_layers, longest, *summed.shape[1:], len(pairs))
            into = out.setdefault(site, torch.full(shape, torch.nan, dtype=torch.float64))
            into[layer, : len(summed), ..., i] = summed
    return out


class _Backward:
    """Keeps the gradient that arrives at each site."""

    def __init__(self, model, names, slopes):
        self._model, self._names, self._slopes = model, names, slopes

    def __enter__(self):
        self._hooks = Hooks(self._model.bridge).__enter__()
        for key in self._names:
            self._hooks.attach(
                SITES[key[0]].hook_name(key[1]),
                lambda gradient, hook, key=key: self._slopes.update({key: gradient.detach().clone()}),
                "bwd",
            )

    def __exit__(self, *error):
        self._hooks.__exit__(*error)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.equal(found.isnan(), expected.isnan())
    found, expected = found.double().nan_to_num(), expected.double().nan_to_num()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_effects_are_those_of_whole_runs_and_of_one_length_at_a_time(family, direction):
    model, pairs = model_of(family), make_pairs(SHAPES)
    metric = whole_vocabulary(pairs)
    sites = {site: over_of(site) for site in sites_of(model)}
    taken: list = []
    with packs_taken(taken):
        found = effects(model, pairs, metric, sites, direction=direction)
    assert len(taken) == 1
    assert len(taken[0].rows) == len(pairs)
    assert {one.provenance["runs"] for one in found.values()} == {"suffix"}
    with one_length_at_a_time():
        apiece = effects(model, pairs, metric, sites, direction=direction)
    expected = naive(model, pairs, metric, sites, direction)
    for site, one in found.items():
        assert float(one.effect().values.nan_to_num().abs().max()) > 1e-3  # control
        assert apart(one.effect().values, apiece[site].effect().values) <= 1e-12, site
        allowed = 1e-10 if family == "gpt2" else 1e-5  # norms and softmaxes of others are float32
        assert apart(one.effect().values, expected[site]) <= allowed, site
        for run in ("clean", "corrupted"):
            assert apart(one.baseline[run], apiece[site].baseline[run]) <= 1e-12
        assert one.cost.block_tokens < apiece[site].cost.block_tokens


def test_dims_and_restrictions():
    model, pairs = model_of("llama"), make_pairs(SHAPES)
    metric = whole_vocabulary(pairs)
    asked = [
        ("z", "head layer", {}),
        ("z", "layer position head", {"heads": [2, 0], "layers": [2, 1]}),
        ("k", "pos layer", {"positions": [1, 11, 4]}),
        ("mlp_post", "layer neuron", {"neurons": [5, 3]}),
        ("resid_post", "layer neuron position", {}),
    ]
    for site, over, options in asked:
        taken: list = []
        with packs_taken(taken):
            found = effects(model, pairs, metric, {site: over}, **options)[site]
        with one_length_at_a_time():
            expected = effects(model, pairs, metric, {site: over}, **options)[site]
        assert len(taken) == 1
        assert (found.dims, found.coords) == (expected.dims, expected.coords)
        assert apart(found.effect().values, expected.effect().values) <= 1e-12


@pytest.mark.parametrize("factory", [mk.logit_diff, mk.prob_diff, mk.log_prob, mk.kl_divergence, mk.loss])
def test_metrics(factory):
    """Those that compare with the other run, and those that read positions before the first difference."""
    model, pairs = model_of("mistral"), make_pairs(SHAPES)
    metric, sites = factory(pairs), {"z": "layer head", "resid_pre": "layer pos"}
    found = effects(model, pairs, metric, sites)
    with one_length_at_a_time():
        expected = effects(model, pairs, metric, sites)
    for site, one in found.items():
        assert apart(one.effect().values, expected[site].effect().values) <= 1e-11
        assert one.provenance["runs"] == "suffix"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_lengths_share_a_call_in_single_precision(family):
    pairs = make_pairs(SHAPES)
    sites, taken = {"z": "layer pos head", "mlp_out": "layer pos"}, []
    single, double = model_of(family, torch.float32), model_of(family)
    with packs_taken(taken):
        found = effects(single, pairs, mk.logit_diff(pairs), sites)
    expected = effects(double, pairs, mk.logit_diff(pairs), sites)
    dtype, device = torch.float32, single.device
    assert (
        len(_packed_together.GeometryTogether(taken[0].rows, dtype, device).parts) == 2
    )  # up to 16 positions, and more
    for site, one in found.items():
        assert apart(one.effect().values, expected[site].effect().values) <= 1e-4


def test_lengths_that_share_a_call_change_nothing():
    """GPT-2 computes in float64 throughout, so that one can see it to the last digits."""
    model, pairs = model_of("gpt2"), make_pairs(SHAPES)
    sites, metric = {"z": "layer pos head", "mlp_out": "layer pos"}, whole_vocabulary(pairs)
    expected = effects(model, pairs, metric, sites)
    make = _packed_together.GeometryTogether.__init__
    with patch.object(
        _packed_together.GeometryTogether,
        "__init__",
        lambda self, rows, dtype, device: make(self, rows, torch.float32, device),
    ):
        found = effects(model, pairs, metric, sites)
    for site, one in found.items():
        assert one.provenance["runs"] == "suffix"
        assert apart(one.effect().values, expected[site].effect().values) <= 1e-12


def test_budgets_make_several_packs():
    model, pairs = model_of("llama"), make_pairs(SHAPES)
    metric, sites = whole_vocabulary(pairs), {"z": "layer pos head", "mlp_out": "layer pos"}
    expected = effects(model, pairs, metric, sites)
    for budget in (1, 400_000, 1_000_000):
        taken: list = []
        with packs_taken(taken):
            found = effects(model, pairs, metric, sites, budget=budget)
        assert len(taken) == len(pairs) if budget == 1 else 1 < len(taken) < len(pairs)
        assert sorted(np.concatenate([one.rows.prompt_id for one in taken]).tolist()) == list(range(len(pairs)))
        for site, one in found.items():
            assert apart(one.effect().values, expected[site].effect().values) <= 1e-12


def test_equal_beginnings_are_not_run_for_each_pair():
    model = model_of("llama")
    pairs = make_pairs(((14, 11),) * 4)
    tokens = [
        torch.cat([pairs.clean.tokens[0][:11], one[11:]]) for one in (*pairs.clean.tokens, *pairs.corrupted.tokens)
    ]
    alike = mk.PromptPairs.from_tokens(tokens[:4], tokens[4:], [(5, 7)] * 4)
    for some, packs in ((pairs, 1), (alike, 0)):
        taken: list = []
        with packs_taken(taken):
            effects(model, some, mk.logit_diff(some), {"z": "layer head"})
        assert len(taken) == packs


def test_lengths_with_many_tokens_are_run_by_themselves():
    model = model_of("gpt2")
    for n, packs in ((11, 1), (13, 0)):  # 121 or 143 tokens behind the first differences
        some, taken = make_pairs(((14, 3),) * n), []
        with packs_taken(taken):
            effects(model, some, mk.logit_diff(some), {"z": "layer head"})
        assert len(taken) == packs


@pytest.mark.parametrize("family", ["bloom", "falcon", "gpt_neox"])
def test_what_cannot_be_packed_is_run_one_length_at_a_time(family):
    model, pairs = model_of(family), make_pairs(SHAPES)
    metric, sites = whole_vocabulary(pairs), {"z": "layer pos head"}
    taken: list = []
    with packs_taken(taken):
        found = effects(model, pairs, metric, sites)["z"]
    assert taken == []  # found with the first length
    assert found.provenance["runs"].startswith("suffix, one length at a time: ")
    with one_length_at_a_time():
        assert torch.equal(found.values.nan_to_num(), effects(model, pairs, metric, sites)["z"].values.nan_to_num())


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defects_are_refuted(name, family):
    model, pairs = model_of(family), make_pairs(SHAPES)
    metric = whole_vocabulary(pairs)
    sites = {"z": "layer pos head", "mlp_out": "layer pos", "resid_pre": "layer pos"}
    right = effects(model, pairs, metric, sites)
    with DEFECTS[name]():
        with unproved():
            wrong = effects(model, pairs, metric, sites)
        left = effects(model, pairs, metric, sites)
    moved = max(apart(wrong[site].effect().values, right[site].effect().values) for site in sites)
    assert moved > 1e-3  # control: it does something
    for site in sites:
        assert left[site].provenance["runs"].startswith("suffix, one length at a time: "), left[site].provenance["runs"]
        assert ("gradients of" in left[site].provenance["runs"]) == (name in BACKWARD)
        assert apart(left[site].effect().values, right[site].effect().values) <= 1e-12


def test_values_that_are_stale_are_refuted():
    """What was recorded of the source runs is changed afterwards."""
    model, pairs = model_of("llama"), make_pairs(SHAPES)
    metric, sites = whole_vocabulary(pairs), {"z": "layer pos head"}
    right = effects(model, pairs, metric, sites)["z"]

    def stale(*args):
        run = record(*args)
        run.cache.layers[1].values = run.cache.layers[1].values.roll(1, 2)
        return run

    with patch("mechkit.engine._packed_gradients.record", stale):
        left = effects(model, pairs, metric, sites)["z"]
    assert "differ from whole runs" in left.provenance["runs"]
    assert apart(left.effect().values, right.effect().values) <= 1e-12


def test_an_experiment_that_was_refuted_is_not_half_added():
    """The second pack is refuted: the first does not stand either, all is run one length at a time."""
    model, pairs = model_of("llama"), make_pairs(SHAPES)
    metric, sites = whole_vocabulary(pairs), {"z": "layer pos head"}
    right = effects(model, pairs, metric, sites)["z"]
    refuted = packed.PackedGradients.refuted
    calls: list = []

    def second(self, *args):
        calls.append(self)
        return refuted(self, *args) if len(calls) == 1 else "for the test"

    with patch.object(packed.PackedGradients, "refuted", second):
        found = effects(model, pairs, metric, sites, budget=400_000)["z"]
    assert len(calls) == 2
    assert found.provenance["runs"] == "suffix, one length at a time: for the test"
    assert apart(found.effect().values, right.effect().values) <= 1e-12


def against_one_length(model, pairs, **options):
    """How far effects are from those of one length at a time, and how they were run."""
    metric, sites = whole_vocabulary(pairs), {"z": "layer pos head", "resid_pre": "layer pos"}
    found = effects(model, pairs, metric, sites, **options)
    with one_length_at_a_time():
        right = effects(model, pairs, metric, sites)
    off = max(apart(found[site].effect().values, right[site].effect().values) for site in sites)
    return off, found["z"].provenance["runs"]


@pytest.mark.parametrize("budget", [None, 600_000, 800_000])
def test_positions_that_see_later_ones_show_in_no_row_that_begins_at_the_start(budget):
    """Every length has a pair that differs at once, and the first pack no other: only later rows have beginnings."""
    kind, arguments = FAMILIES_OF["gemma3"]
    model = mk.HookedModel.from_hf(build_of(kind, arguments | {"use_bidirectional_attention": True}), name="seeing")
    shapes = [(length, 0) for length in range(60, 40, -1)] + [(n, at) for n in (20, 18, 16) for at in (0, 10)]
    off, runs = against_one_length(model, make_pairs(tuple(shapes)), budget=budget)
    assert off <= 1e-12
    assert runs.startswith(("suffix, one length at a time: ", "full: "))


def test_a_block_that_numbers_the_tokens_of_its_call():
    """By whatever operation: the first tokens have the right numbers, so that the last row is looked at."""
    hf = build_of(*FAMILIES_OF["llama"])
    mlp = hf.model.layers[1].mlp
    kind = type(mlp)

    def numbered(self, x):
        number = torch.ones(x.shape[1], dtype=x.dtype).cumsum(0)
        return kind.forward(self, x) * (1 + (number > 13).to(x.dtype))[:, None]

    mlp.__class__ = type("Numbered", (kind,), {"forward": numbered})
    model = mk.HookedModel.from_hf(hf, name="numbered")
    off, runs = against_one_length(model, make_pairs(((12, 3),) * 6))
    assert off <= 1e-12
    assert runs.startswith("suffix, one length at a time: ")


def test_a_metric_that_fails_on_several_lengths():
    model, pairs = model_of("llama"), make_pairs(SHAPES)

    def read(logits, prompt, reference):
        if len(set(pairs.clean.lengths[prompt].tolist())) > 1:
            raise ValueError("mine")
        return logits[:, 5]

    metric = mk.Metric("mine", "logits", len(pairs), pairs.positions["END"], None, read)
    found = effects(model, pairs, metric, {"z": "layer head"})["z"]
    assert "the metric raises ValueError" in found.provenance["runs"]
