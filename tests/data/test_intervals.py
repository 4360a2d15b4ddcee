"""What numbers mean: studentized intervals against a loop, cautions, ranks among random circuits, poor estimates."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mechkit as mk
from helpers.families import GQA, build_of
from helpers.tiny import make_model, make_pairs, whole_vocabulary
from mechkit._statistics import caution
from mechkit.circuits import FRACTIONS
from mechkit.circuits.evaluation import ratio


def ratio_result(n: int, seed: int, skew: bool = False) -> mk.Result:
    """One run of a circuit that keeps four fifths of the model's behaviour; or all of it except on a few prompts."""
    rng = np.random.default_rng(seed)
    clean, empty = rng.normal(5, 1, n), rng.normal(0, 1, n)
    lost = np.where(np.arange(n) % 20 == 0, 30.0, 0.01) if skew else rng.normal(1, 1, n)
    values, clean, empty = (torch.from_numpy(x) for x in (clean - lost, clean, empty))
    coords = {"run": ("circuit",), "prompt": tuple(range(n))}
    baseline = {"clean": clean, "corrupted": empty}
    return mk.Result(values[None], ("run", "prompt"), coords, baseline, "corrupted", "metric", "", {})


def test_studentized_intervals_are_those_of_the_definition():
    run = ratio_result(12, 0)
    values, clean, empty = (x.numpy() for x in (run.values[0], run.baseline["clean"], run.baseline["corrupted"]))
    top, bottom = values - empty, clean - empty

    def of(chosen: list[int]) -> tuple[float, float]:
        a, b = top[chosen], bottom[chosen]
        share = a.sum() / b.sum()
        return share, math.sqrt((a - share * b).var(ddof=1) / len(chosen)) / abs(b.mean())

    share, error = of(list(range(12)))
    students = []
    for counts in np.random.default_rng(0).multinomial(12, [1 / 12] * 12, size=1000):
        drawn, its_error = of([prompt for prompt, count in enumerate(counts) for _ in range(count)])
        students.append((drawn - share) / max(its_error, 0.2 * error))
    low, high = np.quantile(students, [0.025, 0.975])
    interval = run.ci(normalized=True, method="studentized")
    assert interval.low.values.item() == pytest.approx(share - high * error, abs=1e-9)
    assert interval.high.values.item() == pytest.approx(share - low * error, abs=1e-9)
    found = ratio(run)
    assert (found.low, found.high) == (interval.low.values.item(), interval.high.values.item())


def test_studentized_intervals_where_prompts_are_few_or_do_not_vary():
    few = ratio_result(4, 1)
    for end in ("low", "high"):
        assert torch.equal(
            getattr(few.ci(normalized=True, method="studentized"), end).values,
            getattr(few.ci(normalized=True), end).values,
        )
    same = replace(few, values=few.baseline["clean"][None])
    assert (ratio(same).low, ratio(same).value, ratio(same).high) == pytest.approx((1, 1, 1), abs=1e-12)
    holes = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    holes[0, 7:], holes[1, 1:] = torch.nan, torch.nan
    cells = mk.Result(holes, ("layer", "prompt"), {"layer": (0, 1, 2), "prompt": tuple(range(40))}, {}, "", "m", "", {})
    interval = cells.ci(method="studentized")
    width = (interval.high.values - interval.low.values).tolist()
    assert width[0] > width[2] > 0
    assert math.isnan(width[1])


def test_cautions_and_warnings_have_reasons():
    many = ratio_result(60, 2)
    assert ratio(many).caution == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ratio(many).warn()
    assert ratio(ratio_result(8, 2)).caution == "8 prompts are few (expected 30 or more)"
    skewed = ratio(ratio_result(60, 2, skew=True))
    assert skewed.caution.startswith("4 of 60 prompts carry half of the deviations (skewness")
    assert -1 < skewed.low < skewed.value < skewed.high < 1.2  # resamples without the rare prompts do not blow it up
    with pytest.warns(
        UserWarning, match=r"faithfulness: the 95 % interval covers less often .* 4 of 60 prompts carry half"
    ):
        skewed.warn()
    assert caution(np.array([1.0]), np.array([1.0])) == "1 prompt is few (expected 30 or more)"
    model, pairs = make_model("gpt2"), make_pairs(((7, 2), (7, 3)))
    with pytest.warns(UserWarning, match="2 prompts are few"):
        report = mk.evaluate_circuit(
            mk.Circuit.random(model, 40, 1), model, pairs, whole_vocabulary(pairs), random=0, sets=0, minimality=None
        )
    assert "the interval covers less often than 95 %: 2 prompts are few" in repr(report)
    assert math.isnan(report.random_p)


def test_a_learned_mask_says_what_its_interval_is_worth():
    model, pairs = make_model("gpt2"), make_pairs(((7, 2), (7, 3)))
    with pytest.warns(UserWarning, match="faithfulness: the 95 % interval covers less often .*2 prompts are few"):
        mask = mk.learn_mask(model, pairs, steps=1, held_out=0, progress=False)
    assert "training prompts; the interval covers less often than 95 %: 2 prompts are few" in repr(mask)


@pytest.mark.parametrize("edges", [["input->logits"], None], ids=["one edge", "all edges"])
def test_random_circuits_that_are_the_circuit_are_as_near_as_it_is(edges):
    """Whatever the size of their batches rounds otherwise: in float32 the numbers of one circuit differ between batches."""
    model = mk.HookedModel.from_hf(build_of("llama", GQA | {"num_hidden_layers": 3}, dtype=torch.float32), name="llama")
    tokens = torch.randint(3, 61, (7, 9), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 3] = (other[:, 3] + 5) % 58 + 3
    pairs = mk.PromptPairs.from_tokens(tokens, other, [(5, 9)] * 7)
    circuit = mk.Circuit.full(model)
    if edges is not None:
        circuit = mk.Circuit.random(model, 1, 0)
    quiet = {"sets": 0, "minimality": None, "progress": False}
    report = mk.evaluate_circuit(circuit, model, pairs, mk.logit_diff, random=70, **quiet)
    assert report.random_p == 1
    assert report.n_distinct == 1
    assert "70 random circuits (1 different ones)" in repr(report)
    shaken = replace(report, random=tuple(one * (1 - 1e-6) - 1e-6 for one in report.random))
    assert shaken.random_p == 1
    farther = replace(report, random=tuple(one + math.copysign(0.1, one - 1) for one in report.random))
    assert farther.random_p == 1 / 71  # control
    some = mk.evaluate_circuit(mk.Circuit.random(model, 20, 0), model, pairs, mk.logit_diff, random=3, **quiet)
    assert some.n_distinct == 3
    assert "3 random circuits: " in repr(some)


def test_a_circuit_is_ranked_among_random_ones():
    known = mk.zoo.serial_ioi()
    circuit = mk.Circuit.from_edges(known.model, known.circuit)
    report = mk.evaluate_circuit(
        circuit, known.model, known.pairs, known.metric, sets=0, minimality=None, progress=False
    )
    assert len(report.random) == 100
    nearer = sum(abs(1 - f) <= abs(1 - report.faithfulness.value) for f in report.random)
    assert report.random_p == (1 + nearer) / 101 < 0.05
    assert f"p = {report.random_p:.2g}" in repr(report)
    labels = set(re.findall(r"random \d+", mk.plot.default(report).to_json()))
    assert len(labels) == 5
    # Control: a random circuit is one among many.
    some = mk.Circuit.random(known.model, 12, 999)
    middling = mk.evaluate_circuit(some, known.model, known.pairs, known.metric, random=19, sets=0, minimality=None)
    assert middling.random_p > 0.05


def test_curves_of_small_graphs_merge_equal_sizes():
    known = mk.zoo.serial_ioi(n=4)
    scores = mk.edge_patching(known.model, known.pairs, known.metric, direction="noise", progress=False)
    assert scores.graph.n_edges < 750
    curve = mk.faithfulness_curve(scores, known.model, known.pairs, known.metric, random=1, progress=False)
    sizes = [max(1, round(share * scores.graph.n_edges)) for share in FRACTIONS]
    assert curve.n_edges == tuple(sorted(set(sizes)))
    for size, share in zip(curve.n_edges, curve.fractions, strict=True):
        assert share == max(f for f, n in zip(FRACTIONS, sizes, strict=True) if n == size)
    assert curve.faithfulness[-1] == pytest.approx(1, abs=1e-6)
    assert math.isfinite(curve.cpr)


def test_poor_estimates_say_so():
    model, pairs = make_model("gpt2"), make_pairs(((7, 2), (7, 3)))
    scores = mk.edge_attribution(model, pairs, whole_vocabulary(pairs), steps=1)
    error = scores.provenance["completeness_error"]
    assert error > 0.1  # a random model is far from linear
    note = f"completeness error {error:.2f}: scores are far from adding up"
    assert note in repr(scores)
    assert note in repr(mk.Circuit.from_scores(scores, n_edges=20))
    good = mk.edge_attribution(model, pairs, whole_vocabulary(pairs), steps=100)
    assert good.provenance["completeness_error"] < 0.1
    assert "completeness" not in repr(good)
    assert "completeness" not in repr(mk.Circuit.from_scores(good, n_edges=20))


def test_the_simulation_runs_and_its_committed_figures_hold(tmp_path, monkeypatch, capsys):
    root = Path(__file__).parents[2] / "benchmarks"
    spec = importlib.util.spec_from_file_location("intervals_benchmark", root / "truth" / "intervals.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setattr("sys.argv", ["intervals.py", "--draws", "60", "--json", str(tmp_path / "found.json")])
    bench.main()
    assert "| percentile covers | studentized covers |" in capsys.readouterr().out
    ours, committed = (json.loads(p.read_text()) for p in (tmp_path / "found.json", root / "results" / "coverage.json"))
    for mine, theirs in zip(ours["coverage"], committed["coverage"], strict=True):
        assert (mine["population"], mine["prompts"]) == (theirs["population"], theirs["prompts"])
        assert mine["studentized"] == pytest.approx(theirs["studentized"], abs=0.25)  # 60 draws
        assert theirs["studentized"] >= theirs["percentile"] - 0.01
