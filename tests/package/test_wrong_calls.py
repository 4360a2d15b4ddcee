"""Wrong calls of every public function, made from its signature: each is refused by a sentence of ours, and none is accepted.

A good call of each function (`valid_calls.py`) gets one argument that is wrong: of another type, out of range, misspelt, left
out. The table below says which values are wrong for which kind of argument.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn

import mechkit as mk
from helpers.families import build_hf
from helpers.valid_calls import Material, Words, valid_calls
from helpers.words import make_tokenizer
from mechkit._check import checked

PACKAGE = str(Path(mk.__file__).parent)
NAN, HUGE = float("nan"), 2**64

OF_MODEL = [None, "gpt2", 3, nn.Linear(1, 1), [1], mk.HookedModel]
OF_PAIRS = [None, "a text", ["a text"], 5, torch.zeros(1, 2, dtype=torch.long), {"clean": ["a"]}]
OF_PROMPTS = [None, [], [3], ["a", 3], 5, torch.zeros(1, 2, dtype=torch.long), {"clean": ["a"]}]  # text is right
OF_COUNT = [-1, 2.5, True, "3", [3], NAN, None, torch.tensor([1, 2])]
OF_INDEX = [99, -99, 1.5, True, "1", [1], None]
OF_INDICES = [0, "0", [99], [-99], [0.5], [True], ["a"], [[0]], [None], {"a": 1}, [], [0, 0], torch.tensor(0)]
OF_NAMES = [0, "END", [3.5], [["END"]], [None], [], ["nowhere"]]
OF_FLAG = ["no", None, 2, [True]]
OF_NUMBER = ["much", NAN, True, [0.1], torch.zeros(2)]
OF_WORD = ["nonsense", "", 3, ["z"], None, b"z"]
OF_TENSOR = ["a", 3, [0.5], object()]

# What is wrong for an argument of this name, whatever the function.
BY_NAME: dict[str, list[Any]] = {
    "model": OF_MODEL,
    "pairs": OF_PAIRS,
    "prompts": OF_PROMPTS,
    "reference": OF_PROMPTS[1:],
    "metric": ["logit_diff", 3, torch.zeros(2), [1], mk.Metric, nn.Linear(1, 1)],
    "seed": [-1, HUGE, 1.5, True, "0", [0], None, NAN],
    "budget": [0, -1, 2.5, "much", True, NAN, [1]],
    "n": [0, *OF_COUNT],
    "k": [0, *OF_COUNT],
    "top": [0, *OF_COUNT],
    "batch": [0, *OF_COUNT],
    "n_resamples": [0, *OF_COUNT],
    "times": [0, *OF_COUNT],
    "length": [0, *OF_COUNT],
    "layers": OF_INDICES,
    "heads": OF_INDICES,
    "neurons": [0, "0", [9999], [0.5], [True], [], [[0]]],
    "layer": OF_INDEX,
    "head": OF_INDEX,
    "dims": ["layer", 3, ("layer", "layer"), (1,), None],
    "coords": [3, {"layer": 5}, {"layer": (0.5, 1.0)}, {}, {"layer": (0, 0)}, {"other": (0, 1)}, None],
    "path": [3, None, "", [1], b"\0"],
    "store": [3, None, "", " ", [1]],
    "level": [0, 1, 2.0, -0.5, *OF_NUMBER, None],
    "held_out": [1.0, -0.5, 2.0, *OF_NUMBER, None],
    "lr": [0.0, -1.0, float("inf"), *OF_NUMBER, None],
    "residual": [-0.5, 1.5, *OF_NUMBER, None],
    "answers": [None, 3, [], [(5,)], [(5, 5)], [5], "ab", [(5, 6), (5, 6)], [(None, 3)], [(5.5, 6)]],
    "tokens": [3.5, {"a": 1}, object()],
    "edges": [3, "m0->logits", ["nonsense"], [3], [None], object()],
    "edge": ["nonsense", 3, None, ""],
    "senders": ["nonsense", 3, [], ["m99"], [None], None],
    "receivers": ["nonsense", 3, [], ["m99"], [None], None],
    "fractions": [3, "a", [], [-1.0], [2.0], ["a"], [NAN], None],
    "models": [3, None, [], [3], [{"nome": 1}], "tiny"],
    "techniques": [3, None, [], [3], ["nonsense"], [{"name": "ablation", "sight": "z"}]],
    "tasks": [3, None, [3], ["nonsense"], [{"name": "ioi", "n": -1}], [{"name": "ioi", "grid": {"seed": 3}}]],
    "fwd_hooks": [3, "z", [3], [("z",)], [("nonsense", print)], [("z", 3)]],
    "bwd_hooks": [3, "z", [3], [("z",)], [("nonsense", print)], [("z", 3)]],
    "device": ["nowhere", 3.5, [1], "meta", *([] if torch.backends.mps.is_available() else ["mps"])],
    "dtype": ["float33", 3, float],
    "input": [None, 3, 3.5, torch.zeros(1, 2), [3.5], torch.tensor([[9999]]), []],
    "names": [3, "nonsense", [3], [], ("z", 99), None, ("z", "a")],
    "caption": [3, [3]],
    "theme": ["beige", 3, None, ["dark"]],
    "title": [3, ["a"], object()],
    "task": [3, None, ["a"]],
    "unit": [3, None, ["a"]],
    "name": [3, ["a"], 2.5],
    "revision": [3, ["a"]],
    "positions": [3.5, "nonsense", [None], [[0]], object(), {"S": "zzz"}],
    "hf_model": [None, "gpt2", 3],
    "bridge": [None, "gpt2", 3],
    "values": [3, "a", None, [1.0], torch.zeros(2, dtype=torch.long)],
    "right": [3, ((5,),), ((), ()), (("a",), (1,)), None],
    "wrong": [3, ((7,),), ((), ()), (("a",), (1,)), None],
    "clean": [3, None, object()],
    "corrupted": [3, None, object()],
    "text": [3, None, [3], object()],
    "lens": ["a", 3, object()],
    "provenance": [3, "a", None, {"a": object()}],
    "baseline": ["nonsense", 3.5, ["zero"], None],
}
# Functions in which an argument of such a name is something else, or more is right.
OWN: dict[str, dict[str, list[Any]]] = {
    "attention_knockout": {
        "from_": [99, "nowhere", [], 1.5, [None], True],
        "to": [99, "nowhere", [], 1.5, [None], True],
        "window": [0, -1, 1.5, "a", True],
    },
    "Segment": {"tile": [-1, 1.5, "a", True]},
    "attention_flow": {"position": [99, -99, 1.5, "nowhere", True], "head_fusion": OF_WORD},
    "attention_rollout": {"position": [99, -99, 1.5, "nowhere", True], "head_fusion": OF_WORD},
    "direct_logit_attribution": {"metric": [None, 1.5, 9999, [], mk.Metric]},
    "dla_erasure_check": {"metric": [None, 1.5, 9999, [], mk.Metric]},
    "hidden_states": {"position": [99, -99, 1.5, "nowhere", True]},
    "ov_circuit": {"source_tokens": [1.5, [9999]], "output_tokens": [1.5, [9999]]},
    "qk_circuit": {"source_tokens": [1.5, [9999]], "dest_tokens": [1.5, [9999]]},
    "HookedModel.generate": {"input": [None, 3, 3.5, [3.5]]},
    "patchscope": {"target": [None, 3, 1.5, [9999]], "target_position": [99, -99, 1.5], "target_layer": [99, 1.5, "a"]},
    "TunedLens.check": {"layers": [0, [99], ["a"]]},
    "sweep": {"base_is": [3, None], "source_is": [3, None]},
    "find_circuit": {"threshold": ["a", NAN, True], "n_edges": OF_COUNT},
    "faithfulness_curve": {"held_out": [-0.5, 2.0, *OF_NUMBER, None]},
    "learn_mask": {"target": [-1, 2.5, True, "3"]},
    "Circuit": {"model": [3, None], "members": OF_TENSOR},
    "Result.numpy": {"dims": ["layer", 3, ("layer", "layer"), (1,), "layer head prompt pos"]},
    "Result": {"base": ["nonsense", 3, None], "metric": [3, None]},
    "plot.curve": {"size": [3, None]},
    "report": {"code": [3, None]},
    "in_context_score": {
        "early": [1.5, "nowhere", [99], [], True],
        "late": [1.5, ["nowhere"], 99, [0.5], [True], [1, 1]],
    },
    "PromptPairs.teacher_forced": {"continuations": [3, "a", None, [None], [], [3], [[3.5]], [[]], [[-1]], ["a", "b"]]},
}


def wrong_values(name: str, good: Any, parameter: inspect.Parameter, own: list[Any] | None) -> list[Any]:
    """Values that this argument cannot have."""
    if own is not None:
        values = own
    elif name in BY_NAME:
        values = BY_NAME[name]
    elif isinstance(good, bool):
        values = OF_FLAG
    elif isinstance(good, int):
        values = OF_COUNT
    elif isinstance(good, float):
        values = [*OF_NUMBER, None]
    elif isinstance(good, str):
        values = OF_WORD
    elif isinstance(good, torch.Tensor):
        values = [*OF_TENSOR, None]
    elif isinstance(good, list | tuple):
        values = OF_NAMES if good and isinstance(good[0], str) else [3, "a", [None]]
    else:
        values = [3, "nonsense", object()]
    optional = parameter.default is None or "None" in str(parameter.annotation)
    return [value for value in values if not (value is None and optional)]


def wrong_calls(name: str, fn: Callable[..., Any], good: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """`(argument, what is wrong, arguments)` of each wrong call."""
    signature = inspect.signature(fn)
    for argument, value in good.items():
        parameter = signature.parameters.get(argument)
        if parameter is None or parameter.annotation in ("Any", Any):
            continue
        for wrong in wrong_values(argument, value, parameter, OWN.get(name, {}).get(argument)):
            yield argument, f"{argument}={wrong!r}"[:80], {**good, argument: wrong}
        if parameter.default is parameter.empty:
            yield argument, f"no {argument}", {key: other for key, other in good.items() if key != argument}
    last = list(good)[-1]
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        yield f"{last}x", f"{last}x", {**good, f"{last}x": 1}


def complaint(argument: str, fn: Callable[..., Any], given: dict[str, Any]) -> str | None:
    """What is wrong with the answer to a wrong call; `None` if it is refused by a sentence of ours that names the argument."""
    try:
        answer = fn(**given)
        if hasattr(answer, "__enter__"):
            with answer:
                pass
    except (TypeError, ValueError) as error:
        inside = [frame.filename.startswith(PACKAGE) for frame in traceback.extract_tb(error.__traceback__)]
        message = str(error)
        if not inside[-1]:
            return f"raised elsewhere: {type(error).__name__}: {message[:150]}"
        if argument not in message and argument.removesuffix("s") not in message:
            return f"does not name it: {message[:150]}"
        return None
    except Exception as error:
        return f"raw {type(error).__name__}: {str(error)[:150]}"
    return f"accepted, {type(answer).__name__}"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("wrong"))


@pytest.fixture(autouse=True)
def _library_alone() -> Iterator[None]:
    """Without shape checks, so that the library's own sentence is what is tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def test_every_public_function_is_tried(material: Material) -> None:
    tried = {inspect.unwrap(getattr(fn, "func", fn)).__qualname__ for fn, _ in valid_calls(material).values()}
    public = {
        inspect.unwrap(thing).__qualname__
        for place in (mk, mk.tasks, mk.zoo, mk.plot, mk.circuits)
        for name in dir(place)
        if inspect.isfunction(thing := getattr(place, name)) and not name.startswith("_")
        if inspect.signature(thing).parameters
    }
    assert public - tried == {"read_table", "write_html", "html_of", "notebook"}  # files, and what plotly looks at


@pytest.mark.filterwarnings("ignore")
def test_good_calls_are_good(material: Material) -> None:
    """The control: it is the one changed argument that is refused."""
    for name, (fn, good) in valid_calls(material).items():
        try:
            fn(**good)
        except Exception as error:
            pytest.fail(f"{name}: {type(error).__name__}: {error}")


@pytest.mark.filterwarnings("ignore")
def test_wrong_calls_are_refused_by_a_sentence_that_names_the_argument(material: Material) -> None:
    complaints, n = [], 0
    for name, (fn, good) in valid_calls(material).items():
        for argument, what, given in wrong_calls(name, fn, good):
            n += 1
            if (wrong := complaint(argument, fn, given)) is not None:
                complaints.append(f"{name}({what}): {wrong}")
    assert complaints == []
    assert n >= 400


def test_what_is_accepted_or_raised_elsewhere_is_seen() -> None:
    """The control of `complaint`."""

    def raw(n: int) -> list[int]:
        return [1, 2][n:] if n < 2 else int("x")  # type: ignore[return-value]

    assert complaint("n", raw, {"n": 1}) == "accepted, list"
    assert complaint("n", raw, {"n": 2}).startswith("raised elsewhere: ValueError")
    assert complaint("n", raw, {"n": "a"}).startswith("raised elsewhere: TypeError")


def test_the_error_for_a_misspelt_argument_names_the_nearest(material: Material) -> None:
    model, tokens = material.model, torch.tensor([[4, 5]])
    with pytest.raises(
        TypeError, match=r"names_filter: HookedModel.run_with_cache\(\) has no such argument. .* 'names'\?"
    ) as seen:
        model.run_with_cache(tokens, names_filter="z")
    assert "forward" not in str(seen.value)
    with pytest.raises(TypeError, match=r"return_typ: .*'return_type'\?"):
        model.run_with_cache(tokens, return_typ="loss")
    with pytest.raises(TypeError, match=r"stie: .*'site'\?"):
        mk.activation_patching(model, material.pairs, material.metric, stie="z")
    with pytest.raises(TypeError, match=r"modle: .*'model'\?"):
        mk.activation_patching(modle=model, pairs=material.pairs, metric=material.metric)


@pytest.mark.parametrize(
    ("wrong", "cure"),
    [
        ("hf", r"Wrap it: HookedModel.from_hf\(model, tokenizer\)"),
        ("bridge", r"Wrap it: HookedModel.from_bridge\(bridge\)"),
        ("name", r"Load it: HookedModel.from_pretrained\('gpt2'\)"),
    ],
)
def test_the_error_for_what_is_often_taken_for_a_model_has_the_fix(material: Material, wrong: str, cure: str) -> None:
    given = {"hf": material.hf, "bridge": material.model.bridge, "name": "gpt2"}[wrong]
    with pytest.raises(TypeError, match=f"model: expected a HookedModel, got .*{cure}"):
        mk.hidden_states(given, material.pairs)


def test_wrong_types_are_type_errors_and_wrong_values_value_errors(material: Material) -> None:
    def refused(**wrong: Any) -> BaseException:
        with pytest.raises(ValueError, match=r"expected|no such argument") as seen:
            mk.tasks.induction(**{"model": material.model, "n": 1, "length": 4, "seed": 0} | wrong)
        return seen.value

    for wrong in ({"n": "1"}, {"n": 1.5}, {"n": True}, {"seed": None}, {"model": 3}, {"nn": 1}):
        assert isinstance(refused(**wrong), TypeError), wrong
    for wrong in ({"n": 0}, {"n": -1}, {"seed": -1}, {"seed": 2**64}, {"length": 10**6}):
        assert not isinstance(refused(**wrong), TypeError), wrong


def of_numpy(value: Any) -> Any:
    """Numbers, and lists of numbers or of strings, as numpy's."""
    if isinstance(value, bool | int | float):
        return np.asarray(value)[()]
    if type(value) in (list, tuple) and {type(one) for one in value} in ({int}, {float}, {str}):
        return np.array(value)
    return value


@pytest.mark.filterwarnings("ignore")
def test_good_calls_are_good_with_numpys_numbers(material: Material) -> None:
    refused, changed = [], 0
    for name, (fn, good) in valid_calls(material).items():
        given = {argument: of_numpy(value) for argument, value in good.items()}
        changed += sum(given[argument] is not value for argument, value in good.items())
        try:
            fn(**given)
        except Exception as error:
            refused.append(f"{name}: {type(error).__name__}: {error}")
    assert refused == []
    assert changed >= 100


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        (5, np.int64(5)),
        (5, torch.tensor(5)),
        ([5, 9], np.array([5, 9])),
        ([5, 9], torch.tensor([5, 9])),
        ([5, 9], {5: 0, 9: 0}.keys()),
    ],
    ids=str,
)
def test_tokens_of_other_libraries_are_tokens(material: Material, wanted: Any, given: Any) -> None:
    here = material.model, material.pairs
    of_tokens = [mk.direct_logit_attribution(*here, tokens) for tokens in (wanted, given)]
    assert torch.equal(of_tokens[0].values, of_tokens[1].values)
    assert of_tokens[0].provenance == of_tokens[1].provenance


def test_fractions_are_numbers_and_sets_no_lists(material: Material) -> None:
    here = material.model, material.pairs
    half = mk.attention_flow(*here, residual=Fraction(1, 2), progress=False)  # type: ignore[arg-type]
    assert torch.equal(half.values, mk.attention_flow(*here, residual=0.5, progress=False).values)
    interval = material.heads.ci(level=Fraction(9, 10), n_resamples=10)  # type: ignore[arg-type]
    assert torch.equal(interval.low.values, material.heads.ci(level=0.9, n_resamples=10).low.values)
    with pytest.raises(
        TypeError, match=r"target: expected .*, got set \{3, 4\}. A set has no order: write target=sorted\(...\)"
    ):
        mk.patchscope(*here, {3, 4})  # type: ignore[arg-type]


def test_numbers_of_other_libraries_are_numbers(material: Material) -> None:
    once = mk.tasks.induction(material.model, np.int64(2), torch.tensor(4), seed=np.uint8(3))
    assert [row.tolist() for row in once.clean.tokens] == [
        row.tolist() for row in mk.tasks.induction(material.model, 2, 4, seed=3).clean.tokens
    ]
    heads = mk.activation_patching(
        material.model,
        material.pairs,
        material.metric,
        layers=np.array([0, 2]),
        heads=torch.tensor([1]),
        progress=False,
    )
    assert heads.coords["layer"] == (0, 2)
    assert heads.coords["head"] == (1,)


TOKENS = torch.tensor([[4, 9, 11, 7, 5]])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_whole_numbers_of_any_size_are_token_ids(material: Material, dtype: torch.dtype) -> None:
    assert torch.equal(material.model(TOKENS.to(dtype)), material.model(TOKENS))


@pytest.mark.parametrize(
    "tokens", [TOKENS > 0, torch.tensor(3), TOKENS.to("meta"), TOKENS.to_sparse(), TOKENS.to(torch.complex64)], ids=str
)
def test_what_is_no_row_of_token_ids_is_refused(material: Material, tokens: torch.Tensor) -> None:
    assert complaint("input", material.model.forward, {"input": tokens}) is None


def test_labels_are_of_token_ids(material: Material) -> None:
    with pytest.raises(ValueError, match=r"text: expected a text or token ids, got torch.float32 \[1, 5\]"):
        material.model.to_str_tokens(TOKENS.float())
    assert material.model.to_str_tokens(TOKENS) == ["4", "9", "11", "7", "5"]


def test_a_model_is_called_as_its_forward_is(material: Material) -> None:
    assert torch.equal(material.model(TOKENS, "loss"), material.model.forward(TOKENS, return_type="loss"))


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("forward", {"prepend_bos": True}),
        ("forward", {"attention_mask": torch.ones(1, 5, dtype=torch.complex64)}),
        ("generate", {"eos_token_id": -1}),
        ("generate", {"eos_token_id": [5, 10**6]}),
        *(
            ("run_with_cache", {"positions": positions})
            for positions in (5, -6, [0, 5], slice(0, 3, 0), slice("a"), slice(0.5, 2))
        ),
        *(("run_with_cache", {"dtype": dtype}) for dtype in (torch.int64, torch.bool, torch.complex64)),
    ],
    ids=str,
)
def test_what_a_run_cannot_be_asked_for_is_refused(material: Material, method: str, given: dict[str, Any]) -> None:
    """The control: `test_good_calls_are_good`."""
    assert complaint(next(iter(given)), getattr(material.model, method), {"input": TOKENS, **given}) is None


@pytest.mark.parametrize("key", [("z", True), ("z", 0, "attn"), ("z", 1.0), 0, None, ()], ids=str)
def test_a_cache_has_names_and_layers(material: Material, key: Any) -> None:
    with pytest.raises(TypeError, match=r"expected cache\[name\], or cache\[name, layer\]"):
        material.cache[key]
    assert torch.equal(material.cache["z", np.int64(1)], material.cache["z"][1])


def test_activations_stay_numbers_with_fractions(material: Material) -> None:
    with pytest.raises(ValueError, match="dtype: expected a floating-point dtype"):
        material.cache.to(dtype=torch.int8)
    source = torch.stack(material.pairs.clean.tokens)
    here = material.model, material.pairs, material.metric
    rounded = material.model.run_with_cache(source, "z", dtype=torch.bfloat16)[1]
    with pytest.raises(
        ValueError, match=r"source_cache: expected 'z' in the model's torch.float32, got torch.bfloat16"
    ):
        mk.activation_patching(*here, source_cache=rounded, progress=False)
    whole = material.model.run_with_cache(source, "z")[1]
    found = mk.activation_patching(*here, source_cache=whole, progress=False)
    assert torch.allclose(found.values, material.heads.values, atol=1e-5)


@pytest.mark.parametrize("stream", [torch.zeros(1, 7), torch.zeros(1, 32, dtype=torch.long)], ids=str)
def test_a_stream_has_the_models_width(material: Material, stream: torch.Tensor) -> None:
    for fn, more in ((material.model.unembed, {}), (material.lens.translate, {"layer": 0})):
        assert complaint("resid", fn, {"resid": stream, **more}) is None
    good = torch.zeros(1, material.model.d_model)
    assert complaint("tokens", material.model.unembed, {"resid": good, "tokens": torch.tensor([999])}) is None
    assert material.model.unembed(good, torch.tensor([3])).shape == (1, 1)


@pytest.mark.parametrize(
    ("wrong", "cure"),
    [
        ("model", "use it as it is"),
        ("bridge", "from_bridge"),
        ("config", "Make the model first"),
        ("class", "Make the model first"),
        ("name", "from_pretrained"),
        ("linear", ""),
    ],
)
def test_the_error_for_what_is_no_model_of_transformers_has_the_fix(material: Material, wrong: str, cure: str) -> None:
    given = {
        "model": material.model,
        "bridge": material.model.bridge,
        "config": material.hf.config,
        "class": type(material.hf),
        "name": "gpt2",
        "linear": nn.Linear(2, 2),
    }[wrong]
    with pytest.raises(TypeError, match=f"hf_model: expected a model of transformers, .*{cure}"):
        mk.HookedModel.from_hf(given)


@pytest.mark.parametrize(("wrong", "cure"), [("model", "use it as it is"), ("hf", "from_hf"), ("linear", "")])
def test_the_error_for_what_is_no_bridge_has_the_fix(material: Material, wrong: str, cure: str) -> None:
    given = {"model": material.model, "hf": material.hf, "linear": nn.Linear(2, 2)}[wrong]
    with pytest.raises(TypeError, match=f"bridge: expected a TransformerBridge .*{cure}"):
        mk.HookedModel.from_bridge(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fold_ln": True}, "fold_ln: .*stay raw; leave it out"),
        ({"center_writing_weights": False}, "center_writing_weights: .*stay raw; leave it out"),
        ({"load_in_8bit": True}, "load_in_8bit: expected weights in"),
        ({"dtype": torch.int64}, "dtype: expected torch.float64"),
        ({"nonsense": 1}, "nonsense: neither HookedModel.from_pretrained"),
    ],
    ids=str,
)
def test_arguments_of_loading_are_named(material: Material, given: dict[str, Any], message: str) -> None:
    folder = material.folder / "model"
    if not folder.exists():
        build_hf("gpt2", torch.float32).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match=f"^{message}"):
        mk.HookedModel.from_pretrained(folder, **given)


def test_a_name_too_long_for_a_file_is_no_model() -> None:
    with pytest.raises(ValueError, match=r"model: expected a hub name, a folder or a .gguf file, got 'xxx"):
        mk.HookedModel.from_pretrained("x" * 5000)


def test_weights_that_are_no_numbers_are_named() -> None:
    hf = build_hf("gpt2", torch.float32)
    hf.transformer.h[1].mlp.c_fc.weight.data[0, 0] = NAN
    with pytest.raises(ValueError, match=r"hold NaN or infinite numbers, first in 'transformer.h.1.mlp.c_fc.weight'"):
        mk.HookedModel.from_hf(hf, name="tiny")


@pytest.mark.parametrize(
    ("tokens", "cure"),
    [
        (torch.zeros(1, 5), "A function of your own is called with logits"),
        (TOKENS, r"Make them: PromptPairs\.from_tokens\(clean, corrupted, answers\)"),
    ],
    ids=["logits", "token ids"],
)
def test_the_error_for_tensors_as_pairs_has_the_fix(material: Material, tokens: torch.Tensor, cure: str) -> None:
    with pytest.raises(TypeError, match=f"pairs: expected PromptPairs, got a tensor .*{cure}"):
        mk.activation_patching(material.model, tokens, material.metric)  # type: ignore[arg-type]


def test_the_error_for_token_ids_as_prompts_has_the_fix(material: Material) -> None:
    for tokens in (TOKENS, TOKENS.numpy()):
        with pytest.raises(TypeError, match=r"prompts: .*Make them: Prompts\.from_tokens\(tokens\)"):
            mk.logit_lens(material.model, tokens)  # type: ignore[arg-type]
    assert mk.logit_lens(material.model, mk.Prompts.from_tokens(TOKENS), tokens=[4], progress=False).shape[-1] == 1


def test_cures_work(material: Material) -> None:
    pairs = {"clean": [[1, 2, 3]], "corrupted": [[1, 4, 3]], "answers": [(5, 6)]}
    with pytest.raises(TypeError, match=r"tokens\[0\]: .*Write tokens=\[\[…\]\], each in a list of its own"):
        mk.Prompts.from_tokens([1, 2, 3])
    assert len(mk.Prompts.from_tokens([[1, 2, 3]])) == 1
    with pytest.raises(TypeError, match=r"positions\['S'\]: .*Write positions=\{'S': \[1\]\}"):
        mk.PromptPairs.from_tokens(**pairs, positions={"S": 1})
    assert mk.PromptPairs.from_tokens(**pairs, positions={"S": [1]}).positions["S"].tolist() == [1]
    with pytest.raises(ValueError, match=r"tokens: expected \[prompt pos\], got shape \[3\]; write tokens\[None\]"):
        mk.Prompts.from_tokens(torch.tensor([1, 2, 3]), material.model)
    assert len(mk.Prompts.from_tokens(torch.tensor([1, 2, 3])[None], material.model)) == 1


@pytest.mark.parametrize("name", ["attention_rollout", "attention_flow"])
def test_the_error_for_the_old_word_for_how_heads_are_joined_has_the_new_one(material: Material, name: str) -> None:
    with pytest.raises(TypeError, match=r"heads: attention_\w+\(\) has no such argument. Did you mean 'head_fusion'\?"):
        getattr(mk, name)(material.model, material.pairs, heads="mean")
    assert getattr(mk, name)(material.model, material.pairs, head_fusion="max", progress=False).shape[-1] == 2


@pytest.mark.parametrize("word", ["pos_mean", "position-mean"])
def test_the_error_for_other_words_for_the_mean_at_each_position_has_ours(material: Material, word: str) -> None:
    here = material.model, material.pairs, material.metric
    with pytest.raises(ValueError, match=r"mode: expected .*Did you mean 'position_mean'\?"):
        mk.ablation(*here, mode=word)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mode: expected .*Did you mean 'position_mean'\?"):
        mk.dla_erasure_check(*here, head=(0, 1), mode=word)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ablation: expected .*'position_mean'"):
        mk.evaluate_circuit(material.circuit, *here, ablation=word)  # type: ignore[arg-type]


def test_errors_about_edges_and_nodes_name_their_argument(material: Material) -> None:
    here = material.model, material.pairs, material.metric
    with pytest.raises(ValueError, match="edges: writer: expected 'input'"):
        mk.edge_patching(*here, edges=["mo->logits"])
    with pytest.raises(ValueError, match="edges: reader: expected"):
        mk.Circuit.from_edges(material.model, ["m0->logit"])
    with pytest.raises(ValueError, match="senders: writer: expected 'input'"):
        mk.path_patching(*here, senders=["mo"])
    with pytest.raises(ValueError, match="receivers: reader: expected"):
        mk.path_patching(*here, senders=["m0"], receivers=["logit"])


def test_a_metric_is_a_real_number(material: Material) -> None:
    for metric in (lambda logits: logits[:, -1, 5] * (1 + 2j), lambda logits: logits[:, -1, 5].to(torch.complex64)):
        with pytest.raises(ValueError, match=r"expected one real value per prompt, .* got torch.complex64"):
            mk.activation_patching(material.model, material.pairs, metric, progress=False)


def test_no_task_makes_prompts_without_end(material: Material) -> None:
    for task in (mk.tasks.ioi, mk.tasks.docstring, mk.tasks.greater_than):
        with pytest.raises(ValueError, match="n: expected 1 to 100,000 pairs, got 10,000,000"):
            task(Words(), n=10**7)


def test_signature_and_docstring_are_the_functions_own() -> None:
    assert list(inspect.signature(mk.acdc).parameters)[:3] == ["model", "pairs", "metric"]
    assert mk.acdc.__doc__.startswith("Removes all edges")
    assert mk.acdc.__module__ == "mechkit.circuits.acdc"
    assert list(inspect.signature(mk.Result).parameters)[:2] == ["values", "dims"]


def test_a_class_that_is_named_for_type_checkers_alone_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not somebody has used it before: public names are loaded when they are asked for."""
    monkeypatch.delitem(vars(mk), "TunedLens", raising=False)

    @checked
    def read(lens: TunedLens | None = None) -> None:  # type: ignore[name-defined]
        """It is in no scope here."""

    read(None)
    with pytest.raises(TypeError, match="lens: expected TunedLens or None, got str 'a'"):
        read("a")
