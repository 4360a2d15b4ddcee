"""The engine against the naive way: every site, layer, head and position, on a tiny random model of every family."""

from __future__ import annotations

import itertools

import pytest
import torch

import mechkit as mk
from helpers.families import FAMILIES
from helpers.reference import Cell, activations, patched_logits
from helpers.tiny import LENGTH, make_pairs, model_of, whole_vocabulary
from mechkit.hooks import SITES

Runs = list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]


def runs_of(model: mk.HookedModel, pairs: mk.PromptPairs) -> Runs:
    """Every activation of each pair's two runs: the clean one, which cells are taken from, and the corrupted one."""
    both = zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)
    return [(activations(model.bridge, clean[None]), activations(model.bridge, bad[None])) for clean, bad in both]


def naive(
    model: mk.HookedModel, pairs: mk.PromptPairs, metric: mk.Metric, site: str, grid: list[dict], runs: Runs
) -> torch.Tensor:
    """`[cell prompt]`: a row of a whole forward pass for each cell and prompt; NaN where the prompt has no such position."""
    answers = torch.full((len(grid), len(pairs)), torch.nan, dtype=torch.float64)
    for j, (tokens, (source, base)) in enumerate(zip(pairs.corrupted.tokens, runs, strict=True)):
        here = [i for i, at in enumerate(grid) if (at.get("pos") or 0) < len(tokens)]
        logits = patched_logits(model.bridge, tokens[None], base, source, site, [Cell(**grid[i]) for i in here])
        rows = logits[:, metric.positions[j]]
        answers[here, j] = metric.read(rows, torch.full((len(here),), j), None).double()
    return answers


def sizes(model: mk.HookedModel, site: str) -> dict[str, int]:
    heads = model.n_kv_heads if site in ("k", "v") else model.n_heads
    return {"layer": model.n_layers, "pos": LENGTH, "head": heads}


def compare(
    model: mk.HookedModel,
    pairs: mk.PromptPairs,
    site: str,
    over: str,
    tolerance: float,
    position: str = "END",
    runs: Runs | None = None,
) -> mk.Result:
    metric = whole_vocabulary(pairs, position)
    result = mk.activation_patching(model, pairs, metric, site=site, over=over, progress=False)
    assert result.provenance["replay"] == "suffix", result.provenance["replay"]
    dims = over.split()
    grid = [
        dict(zip(dims, labels, strict=True))
        for labels in itertools.product(*(range(sizes(model, site)[dim]) for dim in dims))
    ]
    expected = naive(model, pairs, metric, site, grid, runs or runs_of(model, pairs))
    found = result.values.reshape(expected.shape).double()
    assert torch.equal(found.isnan(), expected.isnan())
    scale = max(1.0, float(expected.nan_to_num().abs().max())) if tolerance > 1e-9 else 1.0
    assert float((found - expected).nan_to_num().abs().max()) <= tolerance * scale
    # Control: the sweep does something at this site.
    assert float((found - answers_of_base(result)).nan_to_num().abs().max()) > 1e-3
    return result


def alone(model: mk.HookedModel, pairs: mk.PromptPairs, site: str, runs: Runs, tolerance: float) -> None:
    """The naive way does not depend on what else is in its batch: three cells' rows are those of passes of one cell."""
    tokens, (source, base) = pairs.corrupted.tokens[1][None], runs[1]
    heads = sizes(model, site)["head"] if "head" in SITES[site].dims else None
    cells = [
        Cell(layer, None if heads is None else pos % heads, pos)
        for layer in range(model.n_layers)
        for pos in range(LENGTH)
    ]
    together = patched_logits(model.bridge, tokens, base, source, site, cells)
    for i in (4, LENGTH + 6, len(cells) - 2):
        by_itself = patched_logits(model.bridge, tokens, base, source, site, cells[i : i + 1])[0]
        assert torch.allclose(together[i], by_itself, atol=tolerance * max(1.0, float(by_itself.abs().max())), rtol=0)


def answers_of_base(result: mk.Result) -> torch.Tensor:
    return result.baseline["corrupted"][None].double()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_layer_head_and_position(family):
    model, pairs = model_of(family), make_pairs()
    runs, tolerance = runs_of(model, pairs), 1e-4 if family == "mixtral" else 1e-10
    for site in model.sites:
        if SITES[site].in_block:
            over = "layer pos head" if "head" in SITES[site].dims else "layer pos"
            compare(model, pairs, site, over, tolerance, runs=runs)
            alone(model, pairs, site, runs, tolerance)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gptj", "falcon"])
def test_whole_heads_and_layers(family):
    model, pairs = model_of(family), make_pairs()
    compare(model, pairs, "z", "layer head", 1e-10)
    compare(model, pairs, "pattern", "layer head", 1e-10)
    compare(model, pairs, "mlp_out", "layer", 1e-10)
    compare(model, pairs, "resid_mid" if model.has_site("resid_mid") else "attn_out", "layer", 1e-10)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "gpt_neo"])
def test_metric_that_reads_before_the_end(family):
    model, pairs = model_of(family), make_pairs()
    positions = dict(pairs.positions) | {"MIDDLE": torch.tensor([4, 5, 3])}
    pairs = mk.PromptPairs(pairs.clean, pairs.corrupted, pairs.right, pairs.wrong, positions)
    compare(model, pairs, "z", "layer pos head", 1e-10, position="MIDDLE")


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gpt_neox"])
def test_float32(family):
    compare(model_of(family, torch.float32), make_pairs(), "z", "layer pos head", 1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_neurons(family):
    model, pairs = model_of(family), make_pairs()
    metric = whole_vocabulary(pairs)
    result = mk.activation_patching(
        model, pairs, metric, site="mlp_post", over="layer neuron", layers=[1], neurons=[0, 5, 11], progress=False
    )
    expected = naive(
        model, pairs, metric, "mlp_post", [{"layer": 1, "neuron": n} for n in (0, 5, 11)], runs_of(model, pairs)
    )
    assert torch.allclose(result.values[0].double(), expected, atol=1e-10, rtol=0)
    assert float((expected - answers_of_base(result)).abs().max()) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_patched_into_itself_and_everything_patched(family):
    """Identities: the base's own activations change nothing; the whole residual stream of the source gives the source run."""
    model, pairs = model_of(family), make_pairs()
    metric = whole_vocabulary(pairs)
    tolerance = 1e-3 if family == "mixtral" else 1e-10
    same = mk.PromptPairs(pairs.clean, pairs.clean, pairs.right, pairs.wrong)
    unchanged = mk.activation_patching(model, same, metric, site="z", over="layer head", progress=False)
    assert torch.equal(unchanged.values, unchanged.baseline["corrupted"].expand_as(unchanged.values))
    for site in ("resid_pre", "resid_mid", "resid_post"):
        if not model.has_site(site):
            continue
        patched = mk.activation_patching(model, pairs, metric, site=site, over="layer", progress=False)
        clean = patched.baseline["clean"].expand_as(patched.values)
        assert torch.allclose(patched.values, clean, atol=tolerance, rtol=0)
        assert not torch.allclose(patched.values, patched.baseline["corrupted"].expand_as(clean), atol=1e-2)


def test_noising_is_denoising_with_the_roles_swapped():
    model, pairs = model_of("llama"), make_pairs()
    metric = whole_vocabulary(pairs)
    swapped = mk.PromptPairs(pairs.corrupted, pairs.clean, pairs.right, pairs.wrong)
    noised = mk.activation_patching(model, pairs, metric, site="z", direction="noise", progress=False)
    denoised = mk.activation_patching(model, swapped, metric, site="z", progress=False)
    assert torch.equal(noised.values, denoised.values)
    assert noised.base == "clean"
    assert torch.equal(noised.baseline["clean"], denoised.baseline["corrupted"])
