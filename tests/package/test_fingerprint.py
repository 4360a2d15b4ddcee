"""`benchmarks/fingerprint/fingerprint.py`: what it computes, that keys are unique, and that it reports changes."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechkit as mk

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks/fingerprint"
NO_NUMBERS = {"report"}
OF_PICTURES = {"image_patching", "pixel_attribution"}
METRICS = {
    "accuracy",
    "answer_log_prob",
    "in_context_score",
    "kl_divergence",
    "log_prob",
    "logit_diff",
    "loss",
    "metric_factory",
    "prob_diff",
}


@pytest.fixture
def finger(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fingerprint")


@pytest.fixture
def listed(finger: Any) -> list[Any]:
    """All calls on one family; none is run."""
    return list(finger.calls_of("gpt2"))


def test_no_benchmark_is_named_like_an_installed_package():
    """They import each other by bare names, which an installed package of that name (`material`) would take over."""
    names = {path.stem for path in BENCHMARKS.parent.rglob("*.py")}
    assert not names & set(importlib.metadata.packages_distributions())


def test_every_call_has_a_key_of_its_own(listed):
    keys = [(call.technique, call.options) for call in listed]
    assert len(keys) == len(set(keys)) > 500


def test_every_technique_is_in_it(finger, listed):
    functions = {name for name, thing in vars(mk).items() if inspect.isfunction(thing) and not name.startswith("_")}
    of_pictures = {call.technique for call in finger.calls_of("llava")}
    assert of_pictures >= OF_PICTURES
    assert functions - METRICS - NO_NUMBERS - of_pictures - {call.technique for call in listed} == set()


def test_renamed_words_are_used(finger, listed):
    """A line of the table that nothing needs any more must be removed."""
    table = importlib.import_module("family_material").RENAMED
    for technique, words in table.items():
        options = " ".join(call.options for call in listed if call.technique == technique)
        assert all(word in options for word in words), technique


def test_it_computes_what_the_library_does(finger):
    logged: list[str] = []
    found = finger.made(["gpt2"], ["forward", "sweep", "top_tokens"], log=logged.append)
    material = importlib.import_module("family_material").Material("gpt2")
    logits = material.model(material.tokens).detach().numpy()
    assert np.array_equal(found["forward|gpt2||"], logits)
    assert found["sweep|gpt2|cells=two+heads replay=True|values"].shape == (2, len(material.pairs))
    given, refused = finger.count(list(found))
    assert given["forward"] == 10
    assert refused.total() == 0
    assert len(logged) == 1


def test_a_refused_call_is_stored(finger):
    def refuse() -> None:
        raise ValueError("no such site")

    assert list(finger.answered(finger.Call("t", "o", refuse))) == ["refused"]
    assert finger.count(["t|gpt2|o|refused", "t|gpt2|p|values", "t|gpt2|p|baseline.clean"]) == ({"t": 1}, {"t": 1})


def test_what_a_call_returns_is_split_into_arrays(finger):
    result = mk.Result(torch.tensor([1.0, 2.0]), ("layer",), {"layer": (0, 1)}, {}, "", "m", "u", {"seed": 3})
    found = finger.values_of({"one": result, "several": [result, result], "numbers": [1, 2], "word": "x"})
    assert {name: array.tolist() for name, array in found.items()} == {
        "one.values": [1.0, 2.0],
        "several.values": [[1.0, 2.0], [1.0, 2.0]],
        "numbers": [1, 2],
    }


OLD = {"a|": np.array([1.0, 1e-9, np.nan]), "b|": np.array([True, False]), "c|": np.array(3)}


@pytest.mark.parametrize(
    ("key", "new", "kind"),
    [
        ("a|", np.array([1.0, 1e-9, np.nan]), "equal"),
        ("a|", np.array([1 + 2.0**-52, 1e-9, np.nan]), "rounding"),
        ("a|", np.array([1.0, 1e-9 + 1e-11, np.nan]), "different"),
        ("a|", np.array([1.0, 1e-9, 0.0]), "different"),
        ("a|", np.array([1.0, np.nan, np.nan]), "different"),
        ("a|", np.array([1.0, 1e-9, np.nan], dtype=np.float32), "different"),
        ("a|", np.array([[1.0, 1e-9, np.nan]]), "different"),
        ("b|", np.array([True, True]), "different"),
        ("c|", np.array(4), "different"),
    ],
)
def test_a_change_is_reported(finger, tmp_path, capsys, key, new, kind):
    paths = [tmp_path / "old.npz", tmp_path / "new.npz"]
    for path, arrays in zip(paths, (OLD, OLD | {key: new}), strict=True):
        np.savez(path, **arrays)
    assert finger.main(["--compare", *map(str, paths)]) == (1 if kind == "different" else 0)
    counts = {"equal": 2, "rounding": 0, "different": 0}
    counts[kind] += 1
    printed = capsys.readouterr().out
    assert f"equal to the bit: {counts['equal']}\nequal to 1e-12: {counts['rounding']}\n" in printed
    assert f"different: {counts['different']}\n" in printed
    assert (f"  {key}" in printed) == (kind != "equal")


def test_missing_and_new_are_reported(finger):
    fewer = {"a|": OLD["a|"]}
    assert finger.compared_with(OLD, fewer).missing == ["b|", "c|"]
    assert not finger.compared_with(OLD, fewer).ok
    assert finger.compared_with(fewer, OLD).new == ["b|", "c|"]
    assert finger.compared_with(fewer, OLD).ok
