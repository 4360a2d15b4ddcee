"""Models that look ahead: effects at positions before the first difference, which no causal model has, against whole runs."""

from __future__ import annotations

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling_llama
from transformers import AutoConfig, AutoModelForCausalLM

import mechkit as mk
from helpers.families import D_VOCAB, FAMILIES
from helpers.reference_circuits import patch_edges, run_circuit, whole_run
from mechkit.engine import agree_before_difference, frozen_parameters
from mechkit.engine._gradients import GradientRuns
from mechkit.prompts import Stacked

# (length, positions that differ): several first differences, two lengths, and prompts that do not differ.
SHAPES = ((9, (6,)), (9, (4, 6)), (7, (5,)), (9, ()), (7, (6,)))
EARLY = [1, 2, 3, 2, 4]
EDGES = [
    "input->m0",
    "input->a1.h2<q>",
    "a0.h1->a1.kv0<v>",
    "m0->a1.kv1<k>",
    "a0.h2->m0",
    "a1.h3->logits",
    "m0->logits",
]
TOLERANCE = 2e-6  # norms and softmaxes of these models are float32; whole runs are of one prompt, sweeps of several


def make_hf(kind: str, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """`"causal"`, `"bidirectional"`, or one that looks ahead among its first tokens (`"prefix"`), or in blocks of 4."""
    arguments = dict(FAMILIES["gemma3" if kind == "bidirectional" else "llama"][1], num_hidden_layers=2)
    if kind == "bidirectional":
        arguments |= {"use_bidirectional_attention": True, "layer_types": ["sliding_attention", "full_attention"]}
        arguments.pop("sliding_window_pattern")
    looks = {"prefix": lambda b, h, q, k: k < 6, "blocks": lambda b, h, q, k: k // 4 == q // 4}
    if kind in looks:
        make = modeling_llama.create_causal_mask

        def mask(*args, **kwargs):
            return make(*args, **kwargs | {"or_mask_function": looks[kind]})

        monkeypatch.setattr(modeling_llama, "create_causal_mask", mask)
    torch.manual_seed(0)
    model_type = "gemma3_text" if kind == "bidirectional" else "llama"
    config = AutoConfig.for_model(model_type, **arguments)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in hf.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.35)
    return hf.double().eval()


def make_pairs() -> mk.PromptPairs:
    generator = torch.Generator().manual_seed(3)
    clean, corrupted = [], []
    for length, differ in SHAPES:
        clean.append(torch.randint(3, D_VOCAB, (length,), generator=generator))
        corrupted.append(clean[-1].clone())
        for at in differ:
            corrupted[-1][at] = 3 + (clean[-1][at] + 4) % (D_VOCAB - 3)
    return mk.PromptPairs.from_tokens(clean, corrupted, [(5, 9)] * len(SHAPES), positions={"EARLY": EARLY})


def read(logits: torch.Tensor, at: int) -> float:
    return float(logits[0, at, 5] - logits[0, at, 9])


@pytest.fixture(params=["bidirectional", "prefix", "blocks", "causal"])
def setting(request, monkeypatch):
    model = mk.HookedModel.from_hf(make_hf(request.param, monkeypatch))
    pairs = make_pairs()
    runs = [
        tuple(whole_run(model, tokens[None]) for tokens in pair)
        for pair in zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)
    ]
    return request.param, model, pairs, runs


def test_edges_and_paths_before_the_first_difference(setting):
    kind, model, pairs, runs = setting
    graph, largest = mk.Graph.of(model), 0.0
    patched = [
        patch_edges(model, corrupted, clean, tokens[None], EDGES)
        for tokens, (clean, corrupted) in zip(pairs.corrupted.tokens, runs, strict=True)
    ]
    for where, positions in (("EARLY", EARLY), ("END", [len(t) - 1 for t in pairs.clean.tokens])):
        metric = mk.logit_diff(pairs, position=where)
        scores = mk.edge_patching(model, pairs, metric, EDGES, progress=False)
        paths = mk.path_patching(model, pairs, metric, senders=["input", "a0.h2"], receivers=["m0"], progress=False)
        for name in EDGES:
            expected = [
                read(logits[EDGES.index(name)][None], at) - read(run.logits, at)
                for logits, (_, run), at in zip(patched, runs, positions, strict=True)
            ]
            found = scores.per_prompt[graph.index(graph.edge(name))]
            assert found.tolist() == pytest.approx(expected, abs=TOLERANCE), (where, name)
            assert found[3] == 0  # prompts that do not differ
            largest = max(largest, float(found.abs().max()) if where == "EARLY" else 0.0)
            if name.endswith("->m0"):
                assert paths.effect().sel(sender=name[:-4]).values.tolist() == pytest.approx(expected, abs=TOLERANCE)
    assert largest == 0 if kind == "causal" else largest > 0.05


def test_circuits_and_gradients_before_the_first_difference(setting):
    kind, model, pairs, runs = setting
    metric = mk.logit_diff(pairs, position="EARLY")
    if kind == "causal":
        return  # nothing differs there, so that there is nothing to be faithful to
    names = [edge.name for edge in mk.Graph.of(model).edges]
    some = [name for i, name in enumerate(names) if i % 5 < 3]
    for edges in (some, names):
        circuit = mk.Circuit.from_edges(model, edges)
        report = mk.evaluate_circuit(
            circuit, model, pairs, metric, random=0, sets=0, minimality=None, progress=False
        ).runs
        tokens = zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)
        expected = [
            read(run_circuit(model, a[None], b[None], edges), at) for (a, b), at in zip(tokens, EARLY, strict=True)
        ]
        assert report.sel(run="circuit").values.tolist() == pytest.approx(expected, abs=TOLERANCE)
        assert report.baseline["corrupted"].tolist() == pytest.approx(
            [read(corrupted.logits, at) for (_, corrupted), at in zip(runs, EARLY, strict=True)], abs=TOLERANCE
        )
    gap = torch.tensor([read(a.logits, at) - read(b.logits, at) for (a, b), at in zip(runs, EARLY, strict=True)])
    assert float(gap.abs().max()) > 0.05
    scores = mk.edge_attribution(model, pairs, metric, steps=60)
    assert scores.provenance["completeness_error"] < 0.01
    assert torch.allclose(scores.per_prompt[0].nansum(0).float(), gap, atol=0.02 * float(gap.abs().max()))
    # First order, against autograd through whole runs.
    found = mk.attribution_patching(model, pairs, metric, "resid_pre", "layer pos").effect().values[1]
    for i, (clean, corrupted) in enumerate(runs):
        kept = []

        def enter(x, hook, kept=kept):
            kept.append(x.detach().requires_grad_())
            return kept[0]

        with model.hooks([(("resid_pre", 1), enter)]), frozen_parameters(model):
            logits = model.bridge(pairs.corrupted.tokens[i][None])
            slope = torch.autograd.grad(logits[0, EARLY[i], 5] - logits[0, EARLY[i], 9], kept[0])[0][0]
        name = "blocks.1.hook_resid_pre"
        change = clean.activations[name][0] - corrupted.activations[name][0]
        expected = (change * slope).sum(-1).tolist()
        assert found[: len(expected), i].tolist() == pytest.approx(expected, abs=TOLERANCE)


def test_each_set_of_prompts_is_looked_at_by_itself(monkeypatch):
    """A proof on prompts whose runs agree (they differ behind the prefix) says nothing about others."""
    model = mk.HookedModel.from_hf(make_hf("prefix", monkeypatch))
    proofs: dict[tuple[int, int], str | None] = {}
    tokens = torch.randint(3, D_VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
    behind, within = tokens.clone(), tokens.clone()
    behind[0, 7], within[0, 4] = 3 + (tokens[0, 7] - 2) % 50, 3 + (tokens[0, 4] - 2) % 50
    assert GradientRuns(model, Stacked(tokens), Stacked(behind), 7, proofs=proofs).how == "suffix"
    assert list(proofs.values()) == [None]
    assert (
        GradientRuns(model, Stacked(tokens), Stacked(tokens), 7, proofs=proofs).how == "suffix"
    )  # alike: nothing to see, nothing to change
    several = torch.cat([behind, within])
    assert (
        "not a causal model"
        in GradientRuns(model, Stacked(tokens.repeat(2, 1)), Stacked(several), 4, proofs=proofs).how
    )


def test_agreement_is_that_of_runs_until_the_tokens_differ():
    tokens = torch.tensor([[1, 2, 3, 4]] * 3)
    others = torch.tensor([[1, 2, 9, 4], [1, 2, 9, 4], [1, 2, 3, 4]])
    stream = torch.ones(3, 4, 2)
    apart = stream.clone()
    apart[:, 2:] += 1  # from the difference on
    apart[1, 1] += 0.01  # before it
    apart[2] += 1  # equal tokens: batches may round differently, and nothing else is known
    assert agree_before_difference(Stacked(tokens), Stacked(others), stream, apart).tolist() == [True, False, True]
    assert agree_before_difference(Stacked(tokens), Stacked(others), stream[:, 2:], apart[:, 2:]).tolist() == [True] * 3


def test_a_metric_that_reads_before_what_is_edited(setting):
    """Places before a row's start are read off the unedited run: the start is the first position that a change reaches."""
    kind, model, pairs, _ = setting
    metric = mk.loss(pairs)
    found = mk.activation_patching(model, pairs, metric, site="resid_pre", over="layer pos", progress=False)
    assert (found.provenance["replay"] == "suffix") == (
        kind != "bidirectional"
    )  # in others the masks show who looks ahead
    for i, (clean, corrupted) in enumerate(zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)):
        pos = len(clean) - 2
        with torch.no_grad():
            source = model.run_with_cache(clean[None], ("resid_pre", 1))[1]["resid_pre", 1]

            def write(x, hook, source=source, pos=pos):
                x = x.clone()
                x[:, pos] = source[:, pos]
                return x

            logits = model.run_with_hooks(corrupted[None], [(("resid_pre", 1), write)])[0]
        expected = -logits[:-1].log_softmax(-1).gather(-1, clean[1:, None]).mean()
        assert float(found.values[1, pos, i]) == pytest.approx(float(expected), abs=TOLERANCE)
