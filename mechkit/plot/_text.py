"""Text in figures: tokens and names appear as they are, numbers are short, captions say where the numbers come from.

plotly reads titles, ticks and hover texts as a kind of HTML, and `%{…}` in templates as variables. Everything that comes from a
user or a tokenizer goes through `plain` first, and hover texts are given as texts, not as templates.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]+")
_MAX_LABEL = 24  # characters of a tick label


def visible(text: str) -> str:
    """The text with what breaks a line, turns it around or cannot be seen written as an escape: a newline is `\\n`.

    A space is a space. A mark after right-to-left text keeps what follows it to its right.
    """

    if text.isascii() and text.isprintable():
        return text

    def shown(character: str) -> str:
        joins_emoji = character == "\u200d"
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and not joins_emoji
        return character.encode("unicode_escape").decode() if hidden else character

    return _RIGHT_TO_LEFT.sub("\\g<0>\u200e", "".join(map(shown, text)))


def plain(text: str) -> str:
    """Text that plotly shows as it is: `visible`, without tags, entities or TeX."""
    return re.sub(r"[&<>$]", lambda match: f"&#{ord(match[0])};", visible(text))


def lines(*texts: str) -> str:
    """Several lines of plain text."""
    return "<br>".join(map(plain, texts))


def number(value: float, digits: int = 3, *, sign: str = "") -> str:
    """`value` with so many significant digits, a true minus sign and no negative zero."""
    return f"{value + 0.0:{sign}.{digits}g}".replace("-", "−")


def spaced(unit: str) -> str:
    """A unit behind its number, `' logits'`; nothing of normalized values, which have none."""
    return "" if unit == "normalized" else f" {unit}"


def from_base(change: float, unit: str, base: str) -> str:
    """`'+0.25 logits from the corrupted run'`; `unit` as `spaced` gives it."""
    return f"{number(change, 5, sign='+')}{unit} from the {base} run"


def shortened(label: object, most: int = _MAX_LABEL) -> str:
    """A label that fits on an axis: its middle is left out if it is long, its end (a position) is kept."""
    text = str(label)
    return text if len(text) <= most else f"{text[: most - 9]}…{text[-8:]}"


def display_width(text: str) -> int:
    """Columns that a text takes in a monospace font, escapes included: 2 for a wide character, 0 for a combining mark."""

    def columns(character: str) -> int:
        if unicodedata.category(character) in ("Mn", "Me", "Cf"):
            return 0
        return 2 if unicodedata.east_asian_width(character) in "WF" else 1

    return sum(map(columns, visible(text)))


def fitted(text: str, columns: int) -> str:
    """The beginning of a text that takes no more columns, with an ellipsis if that is not all."""
    if display_width(text) <= columns:
        return text
    end = min(len(text), columns)
    while end and display_width(text[:end]) > columns - 1:
        end -= 1
    return f"{text[:end]}…"


def technique_of(provenance: Mapping[str, Any]) -> str:
    """`'activation patching'`, the public function's name in words; empty if unknown."""
    return str(provenance.get("technique") or "").replace("_", " ")


def caption_of(provenance: Mapping[str, Any], *, averaged: bool = True) -> list[str]:
    """What a reader must know to judge a figure: model, task, number of prompts, technique, and what was put in place of what.

    Args:
        provenance: Of a result.
        averaged: Whether the figure shows a mean over those prompts, now or already in the result; not so for p-values.
    """
    known = {key: str(value) for key, value in provenance.items() if value is not None and value != ""}
    n_prompts = known.get("n_prompts")
    prompts = f"{n_prompts} prompts" if n_prompts != "1" else "1 prompt"
    if averaged and n_prompts != "1":
        prompts = f"mean over {prompts}"
    names = {"site": "site", "direction": "direction", "mode": "mode", "ablation": "ablation", "lens": ""}
    details = [f"{name} {known[key]}".strip() for key, name in names.items() if key in known]
    if isinstance(receivers := provenance.get("receivers"), list):
        details += [f"receivers {', '.join(map(str, receivers))}"]
    if "freeze" in known:
        details += ["all else frozen" if known["freeze"] == "all" else f"{known['freeze']} frozen"]
    parts = [known.get("model"), known.get("task"), prompts if n_prompts else None, technique_of(provenance)]
    return list(dict.fromkeys(part for part in [*parts, *details, known.get("caution")] if part))


def title_of(provenance: Mapping[str, Any], metric: str, dims: Sequence[str] = ()) -> str:
    """`'Activation patching of z: logit_diff by layer and head'`."""
    technique = technique_of(provenance)
    technique = technique[:1].upper() + technique[1:]
    site = f" of {provenance['site']}" if technique and provenance.get("site") else ""
    if isinstance(receivers := provenance.get("receivers"), list) and technique:
        named = ", ".join(map(str, receivers[:3])) if len(receivers) <= 3 else f"{len(receivers)} receivers"
        site = f" to {named}"
    what = f"{metric} by {' and '.join(', '.join(dims).rsplit(', ', 1))}" if dims else metric
    return f"{technique}{site}: {what}" if technique else what
