"""The examples in docstrings run, and print what they say, as far as they need no model or prompts that they do not make."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re

import mechkit as mk

TAKEN = ("model", "pairs", "prompts", "metric", "heads", "approx", "exact", "edges", "circuit", "scores", "hf_model")


def failure(test: doctest.DocTest) -> str | None:
    """The wrong output of an example; empty if none, `None` if it uses an undefined name."""
    if any("from_pretrained" in example.source for example in test.examples):
        return None
    output: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False).run(test, out=output.append)
    text = "".join(output)
    missing = re.findall(r"NameError: name '(\w+)' is not defined", text)
    return None if missing and missing[0] in TAKEN else text


def test_examples_that_stand_alone_run() -> None:
    found = {}
    for module in pkgutil.walk_packages(mk.__path__, "mechkit."):
        loaded = importlib.import_module(module.name)
        for test in doctest.DocTestFinder(exclude_empty=True).find(loaded, extraglobs={"mk": mk}):
            if test.examples:
                found[test.filename, test.lineno] = failure(test)
    alone = [text for text in found.values() if text is not None]
    assert len(alone) >= 10
    assert [text for text in alone if text] == []


def test_a_wrong_example_is_seen() -> None:
    def wrong_output(source: str) -> str | None:
        return failure(doctest.DocTestParser().get_doctest(source, {}, "example", None, 0))

    assert "Expected" in wrong_output(">>> 1 + 1\n3\n")
    assert "NameError" in wrong_output(">>> mistyped\n")
    assert wrong_output(">>> model.n_layers\n30\n") is None
    assert wrong_output(">>> model = 3\n>>> model\n3\n") == ""
