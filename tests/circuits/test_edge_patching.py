"""Exact edge effects against the naive way: one reader's input changed by TransformerLens's own hooks, an edge a row of one
whole forward pass. Then what must hold whatever the numbers are: identities, budgets, checkpoints, refusals.

Gemma 2, Gemma 3 and OLMo 2 take their norms in float32 whatever the model's dtype is (Hugging Face casts inside), and Mixtral
has no float64 kernels: these agree to float32's rounding, the others to float64's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mechkit as mk
from helpers import reference_circuits as reference
from helpers.families import FAMILIES, FLOAT32_INSIDE, build_of
from helpers.reference_circuits import found_at, some_names
from helpers.refusals import WRONG_FOR_EDGES
from helpers.tiny import make_pairs, model_of, read, whole_vocabulary
from mechkit.circuits.edge_scores import EdgeScores

EDGES = ("input->a1.h1<q>", "a0.h2->m2", "m1->logits", "a1.h3->a3.h0<q>")


def tolerance(family: str) -> float:
    """As a share of the largest effect."""
    return 1e-5 if family in FLOAT32_INSIDE else 1e-8


def oracle(
    model: mk.HookedModel, pairs: mk.PromptPairs, metric: mk.Metric, names: list[str], direction: str = "denoise"
) -> Tensor:
    """What each edge's clean value adds, `[edge prompt]`: a row of a whole forward pass a number."""
    base, source = (pairs.corrupted, pairs.clean) if direction == "denoise" else (pairs.clean, pairs.corrupted)
    sign = 1 if direction == "denoise" else -1
    effects = torch.empty(len(names), len(pairs), dtype=torch.float64)
    for j in range(len(pairs)):
        tokens = base.tokens[j][None]
        runs = [reference.whole_run(model, tokens), reference.whole_run(model, source.tokens[j][None])]
        unedited = read(metric, runs[0].logits, j)
        for i, logits in enumerate(reference.patch_edges(model, *runs, tokens, names)):
            effects[i, j] = sign * (read(metric, logits, j) - unedited)
    return effects


@functools.cache
def exact(family: str) -> EdgeScores:
    """All edges of a family's model on the three ragged pairs."""
    pairs = make_pairs()
    return mk.edge_patching(model_of(family), pairs, whole_vocabulary(pairs), progress=False)


def assert_equal(found: Tensor, expected: Tensor, bound: float) -> None:
    size = max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= bound * size
    assert float(expected.abs().max()) > 1e-2  # control: something is there to be found


# --- the oracle


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_of_every_family(family):
    model, pairs = model_of(family), make_pairs()
    names = some_names(model, 24)
    scores = exact(family)
    assert scores.provenance["replay"] == "suffix"
    assert not scores.per_prompt[scores.graph.exists].isnan().any()
    assert_equal(found_at(scores, names), oracle(model, pairs, whole_vocabulary(pairs), names), tolerance(family))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_two_hundred_random_edges(family):
    """The issue's bar is an absolute 1e-8."""
    model, pairs = model_of(family), make_pairs()
    names = some_names(model, 200, seed=1)
    expected = oracle(model, pairs[[0, 2]], whole_vocabulary(pairs[[0, 2]]), names)
    found = found_at(exact(family), names)[:, [0, 2]]
    assert float((found - expected).abs().max()) <= 1e-8
    assert int((expected.abs() > 1e-2).sum()) > 200  # of 400 numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_noise(family):
    model, pairs = model_of(family), make_pairs(((7, 3), (5, 1)))
    metric = whole_vocabulary(pairs)
    names = some_names(model, 10, seed=2)
    scores = mk.edge_patching(model, pairs, metric, names, direction="noise", progress=False)
    expected = oracle(model, pairs, metric, names, "noise")
    assert_equal(found_at(scores, names), expected, tolerance(family))
    assert scores.provenance["direction"] == "noise"
    denoised = mk.edge_patching(model, pairs, metric, names, progress=False)
    assert float((found_at(denoised, names) - expected).abs().max()) > 1e-3  # control: the directions are not the same


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_metrics_that_compare_with_a_run_and_that_read_before_the_end(family):
    """KL from the clean run; and a position in the middle."""
    model, pairs = model_of(family), make_pairs(((7, 2), (7, 3)))
    middle = mk.PromptPairs(pairs.clean, pairs.corrupted, pairs.right, pairs.wrong, {"MIDDLE": torch.tensor([4, 5])})
    mixture = whole_vocabulary(middle, "MIDDLE")
    names = some_names(model, 12, seed=3)
    found = mk.edge_patching(model, middle, mixture, names, progress=False)
    assert_equal(found_at(found, names), oracle(model, middle, mixture, names), 1e-8)
    scores = mk.edge_patching(model, pairs, mk.kl_divergence(pairs), names, progress=False)
    for j in range(2):
        clean, base = (reference.whole_run(model, p.tokens[j][None]) for p in (pairs.clean, pairs.corrupted))
        target = clean.logits[0, -1].log_softmax(-1)

        def kl(logits: Tensor, target: Tensor = target) -> Tensor:
            return (target.exp() * (target - logits[0, -1].log_softmax(-1))).sum()

        tokens = pairs.corrupted.tokens[j][None]
        patched = reference.patch_edges(model, base, clean, tokens, names)
        expected = [kl(logits[None]) - kl(base.logits) for logits in patched]
        assert_equal(found_at(scores, names)[:, j], torch.stack(expected), 1e-8)


# --- what must hold


def test_identical_prompts_have_no_effects():
    pairs = make_pairs()
    same = mk.PromptPairs(pairs.clean, pairs.clean, pairs.right, pairs.wrong)
    scores = mk.edge_patching(model_of("llama"), same, whole_vocabulary(same), progress=False)
    effects = scores.per_prompt[scores.graph.exists]
    assert torch.equal(effects, torch.zeros_like(effects))
    assert torch.equal(scores.baseline["clean"], scores.baseline["corrupted"])
    assert float(exact("llama").per_prompt[scores.graph.exists].abs().max()) > 1  # control


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "falcon"])
def test_chosen_edges_are_those_of_all_edges(family):
    model, pairs = model_of(family), make_pairs()
    metric, whole = whole_vocabulary(pairs), exact(family)
    names = some_names(model, 15, seed=4)
    chosen = mk.edge_patching(model, pairs, metric, names, progress=False)
    assert {edge.name for edge in chosen.edges} == set(names)
    assert int((~chosen.per_prompt[..., 0].isnan()).sum()) == len(names)
    assert torch.allclose(found_at(chosen, names), found_at(whole, names), rtol=0, atol=1e-10)
    by_type = mk.edge_patching(model, pairs, metric, [whole.graph.edge(name) for name in names], progress=False)
    circuit = mk.edge_patching(model, pairs, metric, mk.Circuit.from_edges(model, names), progress=False)
    for same in (by_type, circuit):
        assert torch.equal(same.per_prompt.nan_to_num(), chosen.per_prompt.nan_to_num())
    assert mk.edge_patching(model, pairs, metric, whole.top(5), progress=False).top(5)[0].edge == whole.top(1)[0].edge
    for run in ("clean", "corrupted"):
        assert torch.allclose(chosen.baseline[run], whole.baseline[run], rtol=0, atol=1e-10)


def test_runs_and_their_baselines():
    pairs = make_pairs()
    metric, scores = whole_vocabulary(pairs), exact("llama")
    for run in ("clean", "corrupted"):
        logits = [model_of("llama")(tokens[None])[0, -1] for tokens in getattr(pairs, run).tokens]
        expected = metric.read(torch.stack(logits), torch.arange(3), None).detach()
        assert torch.allclose(scores.baseline[run], expected, rtol=0, atol=1e-10)
    assert scores.metric == "mixture"
    assert scores.unit == "logits"
    assert scores.cost is not None
    assert scores.cost.block_tokens < scores.cost.naive_block_tokens == 19 * 4 * scores.graph.n_edges


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_every_pair_by_itself_and_in_small_memory(family):
    """Ragged pairs, batches and chunks change nothing."""
    model, pairs, whole = model_of(family), make_pairs(), exact(family)
    names = some_names(model, 20, seed=5)
    for j in range(3):
        one = pairs[[j]]
        alone = mk.edge_patching(model, one, whole_vocabulary(one), names, progress=False)
        found, expected = found_at(alone, names)[:, 0], found_at(whole, names)[:, j]
        assert torch.allclose(found, expected, rtol=0, atol=1e-5 if family == "gemma2" else 1e-10)
    little = mk.edge_patching(model, pairs, whole_vocabulary(pairs), names, budget=200_000, progress=False)
    atol = 1e-5 if family == "gemma2" else 1e-10
    assert torch.allclose(found_at(little, names), found_at(whole, names), rtol=0, atol=atol)


def test_means_over_prompts():
    model, pairs = model_of("llama"), make_pairs()
    means = mk.edge_patching(model, pairs, whole_vocabulary(pairs), list(EDGES), per_prompt=False, progress=False)
    assert means.result.dims == ("writer", "reader")
    for name in EDGES:
        assert means.score(name) == pytest.approx(exact("llama").score(name), abs=1e-10)


def test_positions():
    """The writer's change counts only at the given positions."""
    model, pairs = model_of("llama"), make_pairs(((7, 2), (7, 4)))
    pairs = mk.PromptPairs(pairs.clean, pairs.corrupted, pairs.right, pairs.wrong, {"S": torch.tensor([3, 5])})
    metric = whole_vocabulary(pairs)
    names = some_names(model, 8, seed=6)
    for positions, at in (([3, 5, 0], [[3, 5], [3, 5]]), (["S"], [[3], [5]]), (["S", "END"], [[3, 6], [5, 6]])):
        found = found_at(mk.edge_patching(model, pairs, metric, names, positions=positions, progress=False), names)
        for j in range(2):
            tokens = pairs.corrupted.tokens[j][None]
            base, clean = (reference.whole_run(model, p.tokens[j][None]) for p in (pairs.corrupted, pairs.clean))
            source = reference.Run({}, clean.read, clean.activations, clean.logits)
            for writer, there in clean.wrote.items():
                source.wrote[writer] = base.wrote[writer].clone()
                source.wrote[writer][at[j]] = there[at[j]]
            for i, logits in enumerate(reference.patch_edges(model, base, source, tokens, names)):
                assert float(found[i, j]) == pytest.approx(
                    read(metric, logits, j) - read(metric, base.logits, j), abs=1e-8
                )
    everywhere = mk.edge_patching(model, pairs, metric, names, positions=list(range(7)), progress=False)
    default = mk.edge_patching(model, pairs, metric, names, progress=False)
    assert torch.equal(found_at(everywhere, names), found_at(default, names))
    assert float((found - found_at(default, names)).abs().max()) > 1e-2  # control


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_other_hooks_on_the_model(family):
    """Somebody else's hook: whole forward passes are run, with it, and are still right. It edits what no block computes."""
    model, pairs = model_of(family), make_pairs()
    metric = whole_vocabulary(pairs)
    names = some_names(model, 10, seed=7)
    with model.hooks([("embed", lambda x, hook: 1.5 * x)]):
        scores = mk.edge_patching(model, pairs, metric, names, progress=False)
        expected = oracle(model, pairs, metric, names)
    assert "hooks" in scores.provenance["replay"]
    assert_equal(found_at(scores, names), expected, 1e-8)
    assert (
        float((found_at(scores, names) - found_at(exact(family), names)).abs().max()) > 1e-3
    )  # control: it did something
    assert not model.has_hooks


def test_callables():
    model, pairs = model_of("llama"), make_pairs(((7, 2), (7, 4)))
    metric = whole_vocabulary(pairs)

    def mixture(logits: Tensor) -> Tensor:
        return metric.read(logits[:, -1], torch.arange(2), None)

    found = mk.edge_patching(model, pairs, mixture, list(EDGES), progress=False)
    expected = mk.edge_patching(model, pairs, metric, list(EDGES), progress=False)
    assert torch.allclose(found_at(found, list(EDGES)), found_at(expected, list(EDGES)), rtol=0, atol=1e-10)


# --- checkpoints


class Interrupted(Exception):
    pass


def test_an_interrupted_study_goes_on_where_it_was(tmp_path: Path, monkeypatch):
    import importlib

    module = importlib.import_module("mechkit.circuits.edge_patching")
    kind, arguments = FAMILIES["llama"]
    model = mk.HookedModel.from_hf(build_of(kind, arguments | {"num_hidden_layers": 2}), name="llama of two layers")
    pairs = make_pairs()
    metric, file, budget = whole_vocabulary(pairs), tmp_path / "edges.safetensors", 2**17
    study = functools.partial(mk.edge_patching, model, pairs, metric, budget=budget, progress=False)
    uninterrupted = study()
    patched: list[int] = []
    patch = module._Work.patch

    def fail_at_the_fourth(self, edges):
        if len(patched) == 3:
            raise Interrupted
        patched.append(len(edges))
        patch(self, edges)

    monkeypatch.setattr(module, "SAVE_EVERY", -1.0)
    with monkeypatch.context() as failing:
        failing.setattr(module._Work, "patch", fail_at_the_fourth)
        with pytest.raises(Interrupted):
            study(checkpoint=file)
    done = EdgeScores.load(file)
    assert len(done.edges) == sum(patched) < uninterrupted.graph.n_edges

    def count(self, edges):
        patched.append(len(edges))
        patch(self, edges)

    monkeypatch.setattr(module._Work, "patch", count)
    resumed = study(checkpoint=file)
    check = 3  # edges that are computed again, to see that it is the same study
    assert sum(patched) == resumed.graph.n_edges + check
    assert torch.equal(resumed.per_prompt.nan_to_num(), uninterrupted.per_prompt.nan_to_num())
    assert all(torch.equal(resumed.baseline[run], uninterrupted.baseline[run]) for run in ("clean", "corrupted"))
    again = study(checkpoint=file)  # nothing is left to do
    assert sum(patched) == resumed.graph.n_edges + 2 * check
    assert torch.equal(again.per_prompt.nan_to_num(), uninterrupted.per_prompt.nan_to_num())
    assert torch.equal(EdgeScores.load(file).per_prompt.nan_to_num(), uninterrupted.per_prompt.nan_to_num())


def other_corrupted(pairs: mk.PromptPairs) -> mk.PromptPairs:
    changed = [(tokens + 1) % 58 + 3 for tokens in pairs.corrupted.tokens]
    changed = [torch.cat([old[:-1], new[-1:]]) for old, new in zip(pairs.corrupted.tokens, changed, strict=True)]
    return mk.PromptPairs.from_tokens(list(pairs.clean.tokens), changed, pairs.answers, positions=pairs.positions)


def swapped(pairs: mk.PromptPairs) -> mk.PromptPairs:
    return mk.PromptPairs(pairs.corrupted, pairs.clean, pairs.right, pairs.wrong, pairs.positions)


def refused_for_its_checkpoint(study: Callable[[], EdgeScores]) -> bool:
    try:
        study()
    except ValueError as error:
        return "checkpoint" in str(error)
    return False


def test_checkpoints_of_other_studies(tmp_path: Path):
    model, pairs = model_of("llama"), make_pairs()
    pairs = mk.PromptPairs(pairs.clean, pairs.corrupted, pairs.right, pairs.wrong, {"S": torch.tensor([5, 5, 3])})
    moved = mk.PromptPairs(pairs.clean, pairs.corrupted, pairs.right, pairs.wrong, {"S": torch.tensor([6, 6, 4])})
    metric, file = whole_vocabulary(pairs), tmp_path / "edges.safetensors"

    def study(model=model, pairs=pairs, metric=metric, **more):
        return mk.edge_patching(model, pairs, metric, list(EDGES), checkpoint=file, progress=False, **more)

    study(positions=["S"])
    same = study(positions=["S"])
    assert len(same.edges) == len(EDGES)
    others = {
        "model": lambda: study(model_of("mistral"), positions=["S"]),
        "clean prompts": lambda: study(pairs=swapped(pairs), positions=["S"]),
        "corrupted prompts": lambda: study(pairs=other_corrupted(pairs), positions=["S"]),
        "metric": lambda: study(metric=mk.logit_diff(pairs), positions=["S"]),
        "another position of the metric": lambda: study(metric=whole_vocabulary(pairs, "S"), positions=["S"]),
        "direction": lambda: study(direction="noise", positions=["S"]),
        "positions": lambda: study(),
        "where the named positions are": lambda: study(pairs=moved, positions=["S"]),
    }
    accepted = [what for what, other in others.items() if not refused_for_its_checkpoint(other)]
    assert accepted == []


def test_a_checkpoint_of_more_edges_gives_those_that_are_asked_for(tmp_path: Path):
    model, pairs = model_of("llama"), make_pairs()
    study = functools.partial(
        mk.edge_patching, model, pairs, whole_vocabulary(pairs), checkpoint=tmp_path / "edges", progress=False
    )
    study(list(EDGES))
    assert {edge.name for edge in study([EDGES[0]]).edges} == {EDGES[0]}
    assert len(study(list(EDGES)).edges) == len(EDGES)


def test_a_checkpoint_that_cannot_be_written_is_refused_at_once(tmp_path: Path, monkeypatch):
    import importlib

    def never(self, edges):
        raise AssertionError("edges were computed, though they cannot be kept")

    monkeypatch.setattr(importlib.import_module("mechkit.circuits.edge_patching")._Work, "patch", never)
    model, pairs = model_of("llama"), make_pairs()
    with pytest.raises((ValueError, OSError), match="no_such_folder"):
        mk.edge_patching(
            model, pairs, whole_vocabulary(pairs), checkpoint=tmp_path / "no_such_folder" / "edges", progress=False
        )


# --- refusals


def test_edges_by_whole_passes_are_the_same():
    """Other people's hooks rule a replay out; what readers make of the streams is still computed from recorded ones."""
    model, pairs = model_of("gpt2"), make_pairs(((7, 2), (7, 4)))
    edges = ["input->m0", "a0.h1->a2.h0<q>", "m1->m3", "m2->logits"]
    replayed = mk.edge_patching(model, pairs, whole_vocabulary(pairs), edges, progress=False)
    with model.hooks([("mlp_out", lambda x, hook: None)]):
        whole = mk.edge_patching(model, pairs, whole_vocabulary(pairs), edges, progress=False)
    assert whole.provenance["replay"].startswith("full: other hooks")
    assert torch.allclose(whole.per_prompt, replayed.per_prompt, atol=1e-10, equal_nan=True)
    assert float(whole.values.nan_to_num().abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"edges": "input->logits"}, r"edges: expected a Circuit or a list .*Write edges=\['input->logits'\]"),
        ({"edges": []}, "edges: expected at least one"),
        ({"edges": ["input->logits", "input -> logits"]}, "edges: expected each edge once, got 'input->logits'"),
        ({"edges": ["logits->input"]}, "not a writer's name"),
        ({"edges": ["a2.h0->a1.h0<q>"]}, "reads before a2.h0 writes"),
        ({"edges": ["input->a1.h0<k>"]}, "expected 'a1.kv0<k>'"),
        ({"edges": [1]}, r"edges\[0\]: expected an Edge"),
        *WRONG_FOR_EDGES,
    ],
)
def test_refusals(arguments, message):
    model, pairs = model_of("llama"), make_pairs()
    arguments = {"edges": ["input->logits"], "progress": False} | arguments
    with pytest.raises(ValueError, match=message):
        mk.edge_patching(model, pairs, whole_vocabulary(pairs), **arguments)
    assert not model.has_hooks


def test_more_refusals():
    model, pairs = model_of("llama"), make_pairs()
    metric = whole_vocabulary(pairs)
    with pytest.raises(ValueError, match="pairs: expected PromptPairs"):
        mk.edge_patching(model, pairs.clean, metric)
    with pytest.raises(ValueError, match="lengths"):
        mk.edge_patching(model, pairs, lambda logits: logits[:, -1, 5])  # a callable for ragged prompts
    with pytest.raises(ValueError, match="metric"):
        mk.edge_patching(model, pairs, whole_vocabulary(pairs[[0, 1]]))
    with pytest.raises(ValueError, match=r"circuit: a circuit of another model: expected weights"):
        mk.edge_patching(model, pairs, metric, mk.Circuit.from_edges(model_of("qwen2"), list(EDGES)))
    model.bridge.original_model.train()
    try:
        with pytest.raises(ValueError, match="model: expected evaluation mode"):
            mk.edge_patching(model, pairs, metric)
    finally:
        model.bridge.original_model.eval()
    assert not model.has_hooks
