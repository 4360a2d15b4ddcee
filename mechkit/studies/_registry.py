"""What a study may name: techniques, tasks and metrics, and the arguments that it may give them.

1. A name stands for a public function of mechkit (`TECHNIQUES`, `TASKS`, `METRICS`), or for code: `"package.module:function"`.
2. Arguments are checked against the function's own signature and type hints, strictly, before anything runs. Defaults are
   filled in, so that two ways to write one call are one call.
3. A technique's row says what it works on, and along which dims its work may be cut into shards.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import json
import operator
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, Literal, get_args

import numpy as np

from mechkit import attribution, circuits, metrics, tasks
from mechkit._check import out_of_range
from mechkit.circuits import FaithfulnessCurve
from mechkit.hooks import HookedModel
from mechkit.prompts import PromptPairs, Prompts
from mechkit.result import Result

# What the runner gives, and what no file can hold: a study cannot set these.
OURS = {
    *("model", "pairs", "prompts", "metric", "budget", "progress", "replay"),
    *("checkpoint", "source_cache", "lens", "scores"),
}
AS_NAMES = {"site": str, "ablation": str}  # arguments that also take objects; a study gives the name


@dataclass(frozen=True)
class Technique:
    """A row of the table.

    Attributes:
        function: What is called.
        works_on: `"pairs"`; `"prompts"` (pairs serve too); or `"nothing"`: the model alone.
        metric: Whether it needs a metric.
        split: The dims along which shards are cut: `"prompt"` where a prompt's values do not depend on the other prompts,
            `"layer"` where it takes `layers`, `"reader"` where it takes `edges`. Without any, a job is one shard.
        passes: About how many forward passes a prompt takes, where that is not the number of cells.
    """

    function: Callable[..., Any]
    works_on: Literal["pairs", "prompts", "nothing"]
    metric: bool
    split: tuple[str, ...] = ()
    passes: int | None = None


def faithfulness_curve(model: HookedModel, pairs: PromptPairs, metric: Any, **arguments: Any) -> Result:
    """`mechkit.faithfulness_curve` of the edges that `mechkit.edge_attribution` finds: the runs of its circuits."""
    curve: FaithfulnessCurve = circuits.faithfulness_curve(circuits.edge_attribution, model, pairs, metric, **arguments)
    return curve.runs


TECHNIQUES: dict[str, Technique] = {
    "activation_patching": Technique(attribution.activation_patching, "pairs", True, ("prompt", "layer")),
    "ablation": Technique(attribution.ablation, "prompts", True, ("prompt", "layer")),
    "attribution_patching": Technique(attribution.attribution_patching, "pairs", True, ("prompt",), 5),
    "atp_star": Technique(attribution.atp_star, "pairs", True, ("prompt",), 100),
    "relp": Technique(attribution.relp, "pairs", True, ("prompt",), 5),
    "image_patching": Technique(attribution.image_patching, "pairs", True, ("prompt", "layer")),
    "attention_knockout": Technique(attribution.attention_knockout, "pairs", True, ("prompt",), 30),
    "integrated_gradients": Technique(attribution.integrated_gradients, "pairs", True, ("prompt",), 25),
    "neuron_attribution": Technique(attribution.neuron_attribution, "prompts", True, ("prompt",), 100),
    "direct_logit_attribution": Technique(attribution.direct_logit_attribution, "prompts", True),
    "gradient_x_input": Technique(attribution.gradient_x_input, "prompts", True),
    "pixel_attribution": Technique(attribution.pixel_attribution, "prompts", True, ("prompt",), 150),
    "token_integrated_gradients": Technique(attribution.token_integrated_gradients, "prompts", True),
    "logit_lens": Technique(attribution.logit_lens, "prompts", False),
    "hidden_states": Technique(attribution.hidden_states, "prompts", False),
    "attention_patterns": Technique(attribution.attention_patterns, "prompts", False),
    "attention_rollout": Technique(attribution.attention_rollout, "prompts", False),
    "attention_flow": Technique(attribution.attention_flow, "prompts", False),
    "attention_relevance": Technique(attribution.attention_relevance, "prompts", True),
    "head_scores": Technique(attribution.head_scores, "nothing", False),
    "composition_scores": Technique(attribution.composition_scores, "nothing", False),
    "edge_attribution": Technique(circuits.edge_attribution, "pairs", True, ("prompt",), 50),
    "edge_patching": Technique(circuits.edge_patching, "pairs", True, ("prompt", "reader")),
    "path_patching": Technique(circuits.path_patching, "pairs", True, ("prompt",), 500),
    "faithfulness_curve": Technique(faithfulness_curve, "pairs", True),
}
TASKS: dict[str, Callable[..., Any]] = {
    "ioi": tasks.ioi,
    "greater_than": tasks.greater_than,
    "docstring": tasks.docstring,
    "induction": tasks.induction,
    "repeated_tokens": tasks.repeated_tokens,
}
GIVES_PROMPTS = {"repeated_tokens"}  # the others give pairs
METRICS: dict[str, Callable[..., Any]] = {
    "logit_diff": metrics.logit_diff,
    "log_prob": metrics.log_prob,
    "prob_diff": metrics.prob_diff,
    "kl_divergence": metrics.kl_divergence,
    "accuracy": metrics.accuracy,
    "loss": metrics.loss,
    "in_context_score": metrics.in_context_score,
    "answer_log_prob": metrics.answer_log_prob,
}
DEFAULT_METRIC = "logit_diff"


def is_code(name: str) -> bool:
    """Whether a name is `"package.module:function"`, rather than one of ours, a path, or a hub name."""
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *function.split(".")])


def from_code(name: str) -> Callable[..., Any]:
    """The function that `"package.module:function"` names.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"expected an importable function, got {name!r}: {error}") from error
    if not inspect.isfunction(found):
        raise ValueError(f"expected a function, made with `def`, got {name!r}, which is a {type(found).__name__}")
    _refuse_changed(found, name)
    return found


def source_of(function: Callable[..., Any]) -> bytes:
    """The file in which a function stands; nothing if it is in none."""
    source = inspect.getsourcefile(inspect.unwrap(function))
    return b"" if source is None or not Path(source).is_file() else Path(source).read_bytes()


def _refuse_changed(function: Callable[..., Any], name: str) -> None:
    """A file that was edited after it was imported is not what runs: its hash would stand for other code."""
    function = inspect.unwrap(function)
    module, source = inspect.getmodule(function), source_of(function)
    if module is None or not source:
        return
    written = _functions(source, function.__code__.co_filename)
    for key, one in vars(module).items():
        mine = inspect.isfunction(one) and one.__module__ == module.__name__ and one.__code__.co_name == key
        if mine and key in written and one.__code__ != written[key]:
            raise ValueError(
                f"{name!r}: its file was changed after it was imported ({key} is another); start Python anew"
            )


@functools.lru_cache(maxsize=16)
def _functions(source: bytes, filename: str) -> dict[str, CodeType]:
    """The code of a file's functions, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the file were shown when it was imported
        compiled = compile(source, filename, "exec", dont_inherit=True)
    return {one.co_name: one for one in compiled.co_consts if isinstance(one, CodeType)}


def technique(name: str) -> Technique:
    """The row of a technique. One that is code gets model, pairs and metric, and is never cut into shards."""
    if is_code(name):
        function = from_code(name)
        parameters = inspect.signature(function).parameters
        takes = [what for what in ("pairs", "prompts") if what in parameters]
        works_on: Literal["pairs", "prompts", "nothing"] = takes[0] if takes else "nothing"  # type: ignore[assignment]
        return Technique(function, works_on, "metric" in parameters)
    return _named(TECHNIQUES, name, "technique")


def task(name: str) -> Callable[..., Any]:
    return from_code(name) if is_code(name) else _named(TASKS, name, "task")


def metric(name: str) -> Callable[..., Any]:
    return from_code(name) if is_code(name) else _named(METRICS, name, "metric")


def _named(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(table)}"
    raise ValueError(f"expected a {what} of mechkit, or code as 'package.module:function', got {name!r}{hint}")


def arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments in plain JSON values, checked and with defaults filled in.

    Raises:
        BadArguments: with every argument that is unknown, missing or of the wrong type.
    """
    from pydantic import ValidationError

    parameters, model = _settable(function), _checker(function)
    problems = {
        name: f"unknown; {function.__name__} takes {', '.join(parameters) or 'no arguments here'}"
        for name in given
        if name not in parameters
    }
    known = {name: plain(value) for name, value in given.items() if name in parameters}
    try:
        model(**{f"{name}_": value for name, value in known.items()})
    except ValidationError as error:
        for one in error.errors():
            name = str(one["loc"][0]).removesuffix("_")
            got = "" if one["type"] == "missing" else f", got {json.dumps(known.get(name), default=str)}"
            problems.setdefault(name, f"{one['msg'][0].lower()}{one['msg'][1:]}{got}")
    for name, value in known.items():
        if (wrong := out_of_range(name, value)) is not None:
            problems.setdefault(name, wrong)
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            problems.setdefault(name, f"expected what JSON can hold, got {value!r}")
    if problems:
        raise BadArguments(problems)
    defaults = {name: plain(p.default) for name, p in parameters.items() if p.default is not p.empty}
    return {**defaults, **known}


@functools.lru_cache(maxsize=256)
def _checker(function: Callable[..., Any]) -> Any:
    """A pydantic model of what may be given."""
    from pydantic import ConfigDict, create_model

    fields: dict[str, Any] = {}
    for name, parameter in _settable(function).items():
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[f"{name}_"] = (_hint(function, name, parameter), default)  # `_`: pydantic keeps some names for itself
    return create_model("Arguments", __config__=ConfigDict(strict=True, arbitrary_types_allowed=True), **fields)


class BadArguments(ValueError):
    """Argument -> what is wrong with it."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {problem}" for name, problem in problems.items()))
        self.problems = dict(problems)


def _settable(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    source = circuits.faithfulness_curve if function is faithfulness_curve else function
    return {
        name: parameter
        for name, parameter in inspect.signature(source).parameters.items()
        if name not in OURS
        and ("Prompts" not in str(parameter.annotation) or "Literal" in str(parameter.annotation))
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def _hint(function: Callable[..., Any], name: str, parameter: inspect.Parameter) -> Any:
    """The type of an argument as pydantic wants it; `Any` for what a file cannot hold."""
    if name in AS_NAMES:
        return AS_NAMES[name]
    hint = parameter.annotation
    if isinstance(hint, str):
        source = circuits.faithfulness_curve if function is faithfulness_curve else function
        try:
            hint = eval(hint, inspect.unwrap(source).__globals__)
        except NameError:  # imported for type checkers alone
            return Any
    if Prompts in get_args(hint):  # which no file can hold: what else may be given
        hint = functools.reduce(operator.or_, (one for one in get_args(hint) if one is not Prompts))
    return Any if hint is inspect.Parameter.empty else hint


def plain(value: Any) -> Any:
    """A value as JSON would give it back: lists for tuples and ranges. What JSON cannot hold stays, to be refused."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(one) for one in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    return value
