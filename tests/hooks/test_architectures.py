"""Every architecture that TransformerLens hooks, against a plain transformers model: exact, or refused by a sentence. And the
page that says which is which."""

from __future__ import annotations

import pytest

from helpers.architectures import KINDS, PAGE, examine, reasons_of, row_of

TABLE = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
REASONS = [line for line in PAGE.read_text().splitlines() if line.startswith("- ")]


@pytest.mark.parametrize("kind", KINDS)
def test_an_architecture_is_exact_or_refused_as_the_page_says(kind):
    found = examine(kind)
    assert row_of(kind, found) in TABLE, "docs/models.md is not current: run tests/helpers/architectures.py"
    assert [line for line in REASONS if line.startswith(f"- {kind}, ")] == reasons_of(kind, found)


def test_the_page_lists_all_and_nearly_all_can_be_swept():
    rows = [row for row in TABLE if row.split("|")[1].strip() in KINDS]
    assert len(rows) == len(KINDS) == 85
    swept = [row for row in rows if row.split("|")[3].strip() in ("replay", "whole passes")]
    assert len(swept) >= 80
