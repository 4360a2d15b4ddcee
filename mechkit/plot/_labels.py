"""Which prompt is drawn, and which token each position of it holds."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mechkit.plot._text import plain
from mechkit.prompts import PromptPairs, Prompts
from mechkit.result import Label, Result

_TOKEN = re.compile(r'"(.*)" (\d+)', re.DOTALL)


def token_of(label: Label) -> str:
    """The token of a position's label: `' Mary'` of `'" Mary" 3'`; a label of another form is itself."""
    match = _TOKEN.fullmatch(label) if isinstance(label, str) else None
    return match[1] if match else str(label)


def place_label(token: str, position: Label) -> str:
    """The inverse: `'" Mary" 3'`."""
    return f'"{token}" {position}'


def text_of(prompts: Prompts | PromptPairs | None, result: Result, prompt: Label | None) -> tuple[str, ...] | None:
    """The tokens of the prompt that a result is about; None without prompts.

    Raises:
        ValueError: these are other prompts than the result's, or have no text, or there is no such prompt, or (`prompt` None)
            they differ.
    """
    if prompts is None:
        return None
    choices = [prompts.clean, prompts.corrupted] if isinstance(prompts, PromptPairs) else [prompts]
    known = result.provenance.get("tokens_hash")
    own = next((one for one in choices if known is None or one.hash() == known), None)
    if own is None:
        raise ValueError(
            f"prompts: expected those that the values were computed on (hash {known}), "
            f"got {' and '.join(one.hash() for one in choices)}; pass the very prompts that the technique was given"
        )
    if own.str_tokens is None:
        raise ValueError(
            "prompts: expected tokens as text, got ids alone; make them with Prompts.from_tokens(…, model)"
        )
    if prompt is None and len(set(own.str_tokens)) > 1:
        raise ValueError(f"prompt: expected the one of {len(own)} different texts that is to be shown, got None")
    if prompt is not None and (isinstance(prompt, str) or not 0 <= prompt < len(own)):
        raise ValueError(f"prompt: expected an index into {len(own)} prompts, got {prompt!r}")
    return own.str_tokens[prompt or 0]


def position_of(label: Label) -> int | None:
    """The position in its label: 3 of `3`, `'3'` and `'" Mary" 3'`; None if there is none."""
    match = re.fullmatch(r'(?:".*" )?(\d+)', str(label), re.DOTALL)
    return int(match[1]) if match else None


def check_label(dim: str, asked: Label | None, labels: Sequence[Label]) -> None:
    """Raises `ValueError` for a label that is not among a dim's; `None` asks for none."""
    if asked is not None and asked not in labels:
        shown = ", ".join(map(repr, labels[:10])) + (", …" if len(labels) > 10 else "")
        raise ValueError(f"{dim}: expected one of {shown or f'none, for there is no dim {dim!r}'}; got {asked!r}")


def choose_prompt(labels: Sequence[Label], prompt: Label | None) -> Label:
    """The first prompt, or the one asked for.

    Raises:
        ValueError: there is none of that label.
    """
    if not labels:
        raise ValueError("prompt: expected a result with at least one prompt, got none")
    check_label("prompt", prompt, labels)
    return labels[0] if prompt is None else prompt


def prompt_note(prompt: Label, labels: Sequence[Label]) -> str:
    """For the caption: which prompt is shown, and of how many."""
    return f"prompt {prompt}, one of {len(labels)}" if len(labels) > 1 else f"prompt {prompt}"


def axis_title(dim: str | None) -> str:
    """What an axis of a dim's labels is called."""
    return {None: "", "pos": "token and position", "position": "named position"}.get(dim, plain(dim or ""))


def check_result(result: object, name: str = "result") -> None:
    """Raises `ValueError` unless it is a `Result`."""
    if not isinstance(result, Result):
        raise ValueError(f"{name}: expected a Result, got {type(result).__name__}")


def is_ragged(result: Result) -> bool:
    """Whether some cells exist in some prompts and not in others, so that their means are over different prompts."""
    if "prompt" not in result.dims:
        return False
    absent, axis = result.values.isnan(), result.dims.index("prompt")
    return bool((absent.any(axis) & ~absent.all(axis)).any())


RAGGED = "each cell is averaged over the prompts that have it"
