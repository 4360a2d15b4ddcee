"""The error for a wrong argument: the sentence, the value as it is shown, and what to write instead."""

from __future__ import annotations

import difflib
import inspect
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mechkit._check._kinds import STATED, Fault, Kind, in_range

_SHOWN = 60  # characters of a value in a message
# What is expected of an argument, where its annotation says less.
_WORDS = {
    "metric": {
        "a CallableMetric or a Metric or a function": "a Metric or a callable",
        "a CallableMetric or a Metric or a function or None": "a Metric, a callable or None",
    },
    "over": {"a string": "dims in one string, such as 'layer head'"},
}
# What other libraries, and older scripts, call our arguments.
_ALIASES = {
    "names_filter": "names",
    "n_steps": "steps",
    "num_steps": "steps",
    "n_bootstrap": "n_resamples",
    "metric_fn": "metric",
    "activation_name": "site",
    "hook_name": "site",
    "dims": "over",
    "filename": "path",
    "batch_size": "batch",
    "layer": "layers",
    "head": "heads",
    "position": "positions",
    "pos": "positions",
    "random_seed": "seed",
    "top_k": "k",
    "num_edges": "n_edges",
    "pairs": "prompts",
    "prompts": "pairs",
    "verbose": "progress",
    "heads": "head_fusion",
}


class ArgumentTypeError(TypeError, ValueError):
    """An argument of the wrong type. Also a `ValueError`, so that one `except ValueError` catches every wrong argument."""


def refusal(name: str, fault: Fault) -> ValueError:
    """The error for an argument that is at fault."""
    if not fault.where and fault.expected in _WORDS.get(name, {}):
        fault = fault._replace(expected=_WORDS[name][fault.expected])
    cure, got = _cure(fault, name), shown(fault.value)
    if fault.wrong_type and isinstance(fault.value, str | bytes | numbers.Number | list | tuple | dict | set):
        got = f"{type(fault.value).__name__} {got}"
    comma = ";" if ", " in fault.expected else ","
    sentence = f"{name}{fault.where}: expected {fault.expected}{comma} got {got}{f'. {cure}' if cure else ''}"
    return ArgumentTypeError(sentence) if fault.wrong_type else ValueError(sentence)


def out_of_range(name: str, value: Any) -> str | None:
    """What is wrong with a number given as the argument of this name, wherever that is; `None` if nothing is."""
    fault = in_range(name, Kind("", lambda value: None), STATED.get(name)).fault(value)
    return None if fault is None else f"expected {fault.expected}, got {shown(value)}"


def shown(value: Any) -> str:
    """A value in a message: short, and with its type where the value alone does not show it."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{'a tensor' if isinstance(value, torch.Tensor) else 'an array'} {value.dtype} {list(value.shape)}"
    if value is None or isinstance(value, str | numbers.Number | bytes):
        text = repr(value)
    elif isinstance(value, type):
        text = f"the class {value.__name__}"
    elif isinstance(value, list | tuple | set | frozenset | dict | range):
        try:
            text = repr(value)
        except Exception:  # somebody else's repr may raise anything
            text = f"a {type(value).__name__}"
    elif callable(value) and not isinstance(value, torch.nn.Module) and hasattr(value, "__name__"):
        text = f"the function {value.__name__}"
    else:
        text = f"{'an' if type(value).__name__[:1] in 'AEIOUaeiou' else 'a'} {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _cure(fault: Fault, name: str) -> str:
    """What to write instead, for mistakes that are often made."""
    expected, value = fault.expected, fault.value
    kind, either = type(value).__name__, "or Prompts" in expected  # prompts do as well as pairs
    if "HookedModel" in expected:
        if isinstance(value, str):
            return f"Load it: HookedModel.from_pretrained({value!r})"
        if "Bridge" in kind:
            return "Wrap it: HookedModel.from_bridge(bridge)"
        if hasattr(value, "config") or isinstance(value, torch.nn.Module):
            return "Wrap it: HookedModel.from_hf(model, tokenizer)"
    elif "PromptPairs" in expected:
        if kind == "Result":
            return "A result keeps no prompts: pass the pairs that it was computed from"
        if either and isinstance(value, str | list | tuple):
            return "Make them: Prompts.from_text(model, text)"
        if isinstance(value, str | list | tuple):
            return "Make them: PromptPairs.from_text(model, clean, corrupted, answers)"
        if kind == "Prompts":
            return "Pairs are a clean and a corrupted prompt each: PromptPairs.from_tokens(clean, corrupted, answers)"
        if kind == "HookedModel":
            return "The model comes first, then the prompts"
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return "A function of your own is called with logits, unless it is marked with mk.metric_factory"
        if either and isinstance(value, torch.Tensor | np.ndarray):
            return "Make them: Prompts.from_tokens(tokens)"
        if isinstance(value, torch.Tensor | np.ndarray):
            return "Make them: PromptPairs.from_tokens(clean, corrupted, answers)"
    elif "Prompts" in expected and isinstance(value, str | list | tuple):
        return "Make them: Prompts.from_text(model, text)"
    elif "Prompts" in expected and isinstance(value, torch.Tensor | np.ndarray):
        return "Make them: Prompts.from_tokens(tokens)"
    elif "Metric" in expected:
        return "Make one: mechkit.logit_diff(pairs)"
    if isinstance(value, set | frozenset) and "a list" in expected:
        return f"A set has no order: write {name}=sorted(...)"
    fits = (isinstance(value, str) and "string" in expected) or (isinstance(value, int) and "whole number" in expected)
    if fits and "a list" in expected:
        if not fault.where:
            return f"Write {name}=[{value!r}]"
        several = fault.where.removeprefix("[").removesuffix("]").isdecimal()  # of several items, or one by its name
        return (
            f"Write {name}=[[…]], each in a list of its own"
            if several
            else f"Write {name}={{{fault.where[1:-1]}: [{value!r}]}}"
        )
    if isinstance(value, str) and (
        near := difflib.get_close_matches(value.replace("-", "_"), re.findall("'([^']+)'", expected), n=1)
    ):
        return f"Did you mean {near[0]!r}?"
    return ""


def misfit(
    called: str,
    signature: inspect.Signature,
    passes: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    error: TypeError,
) -> TypeError:
    """The error for a call that does not fit the signature."""
    known = _argument_names(signature)
    unknown = [name for name in kwargs if name not in known]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    needed = [
        name
        for i, (name, p) in enumerate(signature.parameters.items())
        if p.default is p.empty and name not in kwargs and (i >= len(args) or p.kind is p.KEYWORD_ONLY)
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]  # fmt: skip
    if unknown and not takes_any:
        return _unknown(called, unknown[0], known, needed)
    if needed:
        return ArgumentTypeError(
            f"{needed[0]}: {called}() needs it, and it was not given. Its arguments: {_listed(known)}"
        )
    reason = re.sub(r"\s+", " ", str(error))
    placed = [n for n, p in signature.parameters.items() if p.kind is not p.KEYWORD_ONLY and n in known]
    return ArgumentTypeError(f"{called}(): {reason}. By position it takes {_listed(placed) or 'none'}; name the others")


def check_passed(
    called: str, signature: inspect.Signature, passes: Callable[..., Any], given: Mapping[str, Any]
) -> None:
    further = _argument_names(inspect.signature(passes))
    for name in given:
        if name not in further:
            raise _unknown(called, name, [*_argument_names(signature), *further])


def _argument_names(signature: inspect.Signature) -> list[str]:
    return [
        name
        for i, (name, p) in enumerate(signature.parameters.items())
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and not (i == 0 and name in ("self", "cls"))
    ]


def _unknown(called: str, name: str, known: list[str], needed: Sequence[str] = ()) -> TypeError:
    alias = _ALIASES.get(name)
    near = [alias] if alias in known else []
    near += difflib.get_close_matches(name, needed, n=1) + difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return ArgumentTypeError(f"{name}: {called}() has no such argument. {hint}Its arguments: {_listed(known)}")


def _listed(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))
