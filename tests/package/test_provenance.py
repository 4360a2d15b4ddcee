"""What every technique says of its result in the same words: its own name, and in its docstring the dims in their order."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

import mechkit as mk
from helpers.valid_calls import Material, _circuits, _techniques

HELD = {  # what a result that is no `Result` holds one of: its attribute
    mk.EdgeScores: "provenance",
    mk.Circuit: "provenance",
    mk.TopTokens: "probs",
    mk.OVSVD: "singular_values",
    mk.Erasure: "direct",
    mk.CircuitReport: "runs",
    mk.FaithfulnessCurve: "runs",
    mk.circuits.LearnedMask: "scores",
    mk.circuits.OptimalConstants: "losses",
    mk.TunedLens: "provenance",
}
# Not techniques: they join results of others, or give no result.
OTHER = {"compare", "verify", "find_circuit", "sweep", "roc", "cpr", "cmd"}


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    material = Material(tmp_path_factory.mktemp("calls"))
    return {**_techniques(material), **_circuits(material)}


def techniques() -> list[str]:
    material = set(mk.__all__) - OTHER
    functions = [name for name in material if inspect.isfunction(getattr(mk, name))]
    makers = {"accuracy", "kl_divergence", "log_prob", "logit_diff", "metric_factory", "prob_diff", "report"}
    makers |= {"answer_log_prob", "in_context_score", "loss"}
    return sorted({*functions, "TunedLens.fit"} - makers)


def provenance_of(found: Any) -> Mapping[str, Any]:
    if isinstance(found, mk.Result):
        return found.provenance
    held = getattr(found, HELD[type(found)])
    return held if isinstance(held, Mapping) else provenance_of(held)


def stated_dims(doc: str, over: str) -> Iterator[tuple[str, ...]]:
    """Every tuple of dims that a docstring has, such as `(*over, "prompt")`."""
    for inside in re.findall(r'\(((?:\*over|"\w+"|, ?|,)+)\)', doc):
        parts = [part.strip() for part in inside.split(",") if part.strip()]
        yield tuple(dim for part in parts for dim in (over.split() if part == "*over" else [part.strip('"')]))


@pytest.mark.parametrize("name", techniques())
def test_a_result_names_the_function_and_its_docstring_the_dims(name: str, calls: dict[str, Any]) -> None:
    function, arguments = calls[name]
    found = function(**arguments)
    assert provenance_of(found)["technique"] == name
    result = found.probs if isinstance(found, mk.TopTokens) else found
    if isinstance(result, mk.Result):
        default = inspect.signature(function).parameters.get("over")
        over = arguments.get("over", default.default if default else "")
        assert result.dims in list(stated_dims(inspect.getdoc(function) or "", over))


def test_dims_are_read_from_docstrings() -> None:
    doc = 'A `Result` with dims `("layer", "head", "prompt")`, or `(*over, "prompt")`, or `("prompt",)` (see "x").'
    assert list(stated_dims(doc, "layer pos")) == [("layer", "head", "prompt"), ("layer", "pos", "prompt"), ("prompt",)]
    assert list(stated_dims("dims as for `ablation`", "layer")) == []
