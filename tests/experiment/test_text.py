"""Text where prompts are expected, named positions by the text that stands there, and a task that is not done."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mechkit as mk
from helpers.words import build, make_tokenizer

TEXTS = ["the cat", "two dog", "red hen"]


@pytest.fixture(scope="module")
def model() -> mk.HookedModel:
    return mk.HookedModel.from_hf(build("gpt2"), make_tokenizer(), name="bytes")


def last(logits: Tensor) -> Tensor:
    return logits[:, -1, 5]


TAKES_TEXT: dict[str, Callable[[mk.HookedModel, Any, mk.Metric], Any]] = {
    "ablation": lambda m, p, loss: mk.ablation(m, p, loss, progress=False),
    "reference": lambda m, p, loss: mk.ablation(m, TEXTS, loss, reference=p, progress=False),
    "direct_logit_attribution": lambda m, p, _: mk.direct_logit_attribution(m, p, torch.tensor([1.0] * m.d_model)),
    "gradient_x_input": lambda m, p, loss: mk.gradient_x_input(m, p, loss),
    "token_integrated_gradients": lambda m, p, loss: mk.token_integrated_gradients(m, p, loss, steps=2),
    "neuron_attribution": lambda m, p, loss: mk.neuron_attribution(m, p, loss, steps=2),
    "hidden_states": lambda m, p, _: mk.hidden_states(m, p),
    "attention_patterns": lambda m, p, _: mk.attention_patterns(m, p),
    "attention_rollout": lambda m, p, _: mk.attention_rollout(m, p),
    "attention_flow": lambda m, p, _: mk.attention_flow(m, p),
    "attention_relevance": lambda m, p, _: mk.attention_relevance(m, p, last),
    "logit_lens": lambda m, p, _: mk.logit_lens(m, p, tokens=[3]),
    "top_tokens": lambda m, p, _: mk.top_tokens(m, p, k=2).probs,
    "patchscope": lambda m, p, _: mk.patchscope(m, p, "x x", layers=[0], k=2).probs,
    "head_scores": lambda m, p, _: mk.head_scores(m, "previous_token", prompts=p),
    "dla_erasure_check": lambda m, p, _: mk.dla_erasure_check(m, p, torch.tensor([1.0] * m.d_model), (0, 0)).direct,
    "TunedLens.fit": lambda m, p, _: mk.TunedLens.fit(m, p, steps=1, validation=0.4, progress=False).A,
}


def numbers(found: Any) -> Tensor:
    return found.values if isinstance(found, mk.Result) else found


@pytest.mark.parametrize("name", TAKES_TEXT)
def test_text_is_prompts(model: mk.HookedModel, name: str) -> None:
    prompts = mk.Prompts.from_text(model, TEXTS)
    from_text, from_prompts = (TAKES_TEXT[name](model, given, mk.loss(prompts)) for given in (TEXTS, prompts))
    assert torch.equal(numbers(from_text).nan_to_num(7), numbers(from_prompts).nan_to_num(7))


def test_one_text_is_one_prompt(model: mk.HookedModel) -> None:
    assert mk.hidden_states(model, "the cat").shape == mk.hidden_states(model, ["the cat"]).shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_direction_that_the_stream_hardly_has_is_no_fault_of_the_model(dtype: torch.dtype) -> None:
    """What is compared must be judged by its terms: a value near 0 of terms near 1 is not exact to 1e-5 of itself."""
    model = mk.HookedModel.from_hf(build("gpt2", dtype), make_tokenizer())
    along = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1), dtype=dtype)
    there = mk.direct_logit_attribution(model, "the cat", along).values.sum()
    ones = torch.ones(model.d_model, dtype=dtype)  # 0 after the norm's centering, but for rounding
    found = mk.direct_logit_attribution(model, "the cat", ones).values
    assert found.sum().abs() < 1e-5 * there.abs()


# -- positions by text ---------------------------------------------------------------------------------------------------


def pairs_at(model: mk.HookedModel, **positions: Any) -> mk.PromptPairs:
    return mk.PromptPairs.from_text(
        model, ["a key, a key", "on a key to"], ["a dog, a dog", "on a dog to"], [("x", "y")] * 2, **positions
    )


def test_a_text_is_its_last_token(model: mk.HookedModel) -> None:
    pairs = pairs_at(
        model, positions={"key": [(" key", 0), " key"], "END": [-1, -1], "last": [("key", -1), 7], "to": ["y, ", " to"]}
    )
    found = {name: at.tolist() for name, at in pairs.positions.items()}
    text = [model.to_str_tokens(row) for row in pairs.clean.tokens]
    assert "".join(text[0][: found["key"][0] + 1]).endswith("a key")
    assert found == {"key": [5, 8], "END": [12, 11], "last": [12, 7], "to": [7, 11]}


def test_one_text_serves_all_pairs_and_corrupted_ones_are_aligned_by_text(model: mk.HookedModel) -> None:
    pairs = mk.PromptPairs.from_text(
        model,
        ["the key is", "the door is"],
        ["one cat is", "my mouse is"],
        [("x", "y")] * 2,
        positions={"verb": " is", "noun": [" key", " door"]},
        align={"verb": " is", "noun": [" cat", " mouse"]},
    )
    assert pairs.align is not None
    assert pairs.positions["verb"].tolist() == [10, 11]
    assert pairs.align["noun"].tolist() == [7, 8]
    forced = mk.PromptPairs.teacher_forced(model, ["the key"], ["the cat"], ["ab"], positions={"the": "the"})
    assert forced.positions["the"].tolist() == [3]


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["key", " key"], r"positions\['it'\]\[0\]: 'key' stands 2 times in prompt 0 \(at 5, 12\)"),
        ([("key", 0), " keys"], r"positions\['it'\]\[1\]: ' keys' stands nowhere in prompt 1"),
        ([("key", 2), "key"], "stands 2 times in prompt 0; got occurrence 2"),
        (["key"], r"expected 2 places, one for each prompt; got 1"),
        (["", "key"], "expected a text of at least one token"),
        ([1.5, "key"], "positions"),
    ],
)
def test_a_text_that_is_not_there_once_is_refused(model: mk.HookedModel, places: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs_at(model, positions={"it": places})


def test_a_text_within_a_token_is_refused(smollm2: mk.HookedModel) -> None:
    with pytest.raises(ValueError, match="stands only inside tokens"):
        mk.PromptPairs.from_text(smollm2, " The keys", " The dogs", (" a", " b"), positions={"it": [" ke"]})
    keys = mk.PromptPairs.from_text(
        smollm2, "The old keys", "The old dogs", (" a", " b"), positions={"it": [" old keys"]}
    )
    assert keys.positions["it"].tolist() == [keys.clean.lengths[0] - 1]
    bare = mk.PromptPairs.from_text(smollm2, "The old keys", "The old dogs", (" a", " b"), positions={"it": "keys"})
    assert bare.positions["it"].tolist() == [keys.clean.lengths[0] - 1]
    with pytest.raises(ValueError, match="stands only inside tokens"):
        mk.PromptPairs.from_text(smollm2, "The old keys", "The old dogs", (" a", " b"), positions={"it": "eys"})


@pytest.mark.parametrize(
    ("text", "place", "upto"),
    [
        ("I love 😀 much", "😀", "I love 😀"),
        ("I love 😀 much", " much", "I love 😀 much"),
        ("安全", "安", "安"),
        ("安全", "安全", "安全"),
        ("שלום", "שלום", "שלום"),
        ("π ≈ 3", " ≈", "π ≈"),
        ("∀x ∃y", " ∃", "∀x ∃"),
        ("The 😀. keys 😀. to", (".", 1), "The 😀. keys 😀."),
        ("The 😀. keys", "keys", "The 😀. keys"),
        ("é\u0301 e\u0301", "e\u0301", "é\u0301 e\u0301"),
    ],
)
@pytest.mark.parametrize("real", [True, False], ids=["smollm2", "bytes"])
def test_a_character_of_several_tokens_ends_with_the_last_of_them(
    model: mk.HookedModel, smollm2: mk.HookedModel, text: str, place: Any, upto: str, real: bool
) -> None:
    """By what is decoded up to there; one token less is another text."""
    model = smollm2 if real else model
    pairs = mk.PromptPairs.from_text(model, text, text, (5, 6), positions={"it": [place]})
    at, row = int(pairs.positions["it"][0]), pairs.clean.tokens[0]
    bos = str(model.to_string(row[:1])) if int(row[0]) == model.tokenizer.bos_token_id else ""
    assert str(model.to_string(row[: at + 1])).removeprefix(bos) == upto
    assert str(model.to_string(row[:at])).removeprefix(bos) != upto


def test_one_occurrence_serves_two_pairs(model: mk.HookedModel) -> None:
    """It is not a place for each."""
    pairs = mk.PromptPairs.from_text(
        model,
        ["a key is", "no key, a key of"],
        ["a dog is", "no dog, a dog of"],
        [("x", "y")] * 2,
        positions={"it": ("key", -1)},
    )
    ends = [
        str(model.to_string(row[: int(at) + 1]))
        for row, at in zip(pairs.clean.tokens, pairs.positions["it"], strict=True)
    ]
    assert [end[-5:] for end in ends] == ["a key", "a key"]
    assert len(ends[1]) > 12


# -- a task that is not done ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "technique",
    [
        mk.activation_patching,
        mk.attribution_patching,
        mk.edge_attribution,
        lambda m, p, metric: mk.path_patching(m, p, metric, senders="layer head", receivers=["logits"]),
        lambda m, p, metric: mk.evaluate_circuit(mk.Circuit.full(m), m, p, metric),
    ],
    ids=["activation_patching", "attribution_patching", "edge_attribution", "path_patching", "evaluate_circuit"],
)
def test_a_task_that_is_not_done_is_said_with_both_numbers(model: mk.HookedModel, technique: Any) -> None:
    tokens, metric = torch.tensor([[5, 6, 7, 8]]), mk.logit_diff
    corrupted = torch.tensor([[5, 6, 9, 8]])
    logits = model(tokens).detach()[0, -1]
    best, worst = int(logits.argmax()), int(logits.argmin())
    wrong = mk.PromptPairs.from_tokens(tokens, corrupted, [(worst, best)])
    right = mk.PromptPairs.from_tokens(tokens, corrupted, [(best, worst)])
    clean, other = (
        float(logits[worst] - logits[best]),
        float((lambda x: x[worst] - x[best])(model(corrupted).detach()[0, -1])),
    )
    message = (
        f"logit_diff is {clean:.4g} in the clean run and {other:.4g} in the corrupted one, on average over 1 prompt"
    )
    with pytest.warns(mk.GapWarning, match=re.escape(message)) as caught:
        technique(model, wrong, metric)
    assert all(one.filename == __file__ for one in caught if "task: " in str(one.message))
    with warnings.catch_warnings():
        warnings.simplefilter("error", mk.GapWarning)
        technique(model, right, metric)  # the control


def test_two_runs_that_answer_alike_are_said_to(model: mk.HookedModel) -> None:
    tokens = torch.tensor([[5, 6, 7, 8]])
    best = int(model(tokens)[0, -1].argmax())
    same = mk.PromptPairs.from_tokens(tokens, tokens, [(best, (best + 1) % 250)])
    with pytest.warns(mk.GapWarning, match="task: clean and corrupted run answer alike"):
        mk.activation_patching(model, same, mk.logit_diff)


@pytest.mark.parametrize("metric", [mk.loss, mk.kl_divergence])
def test_of_what_is_better_low_a_lower_clean_run_is_in_order(model: mk.HookedModel, metric: Any) -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    pairs = mk.PromptPairs.from_tokens(tokens, torch.tensor([[5, 6, 30, 8, 9]]), [(1, 2)])
    result = mk.activation_patching(model, pairs, metric, layers=[0], progress=False).mean("prompt")
    low, high = sorted((result.baseline["clean"].item(), result.baseline["corrupted"].item()))
    ordered = replace(result, baseline={"clean": torch.tensor(low), "corrupted": torch.tensor(high)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", mk.GapWarning)
        ordered.normalized()
    turned = replace(ordered, metric="log_prob")  # the control
    with pytest.warns(mk.GapWarning, match="in the wrong order"):
        turned.normalized()


def of_lengths(model: mk.HookedModel, right: list[bool]) -> mk.PromptPairs:
    """One prompt of each length, the longest last; whether the clean run does the task is chosen."""
    clean, corrupted, answers = [], [], []
    for n, good in enumerate(right, 4):
        row = torch.arange(5, 5 + n)
        logits = model(row[None]).detach()[0, -1]
        best, worst = int(logits.argmax()), int(logits.argmin())
        clean.append(row)
        corrupted.append(torch.where(torch.arange(n) == 2, 99, row))
        answers.append((best, worst) if good else (worst, best))
    return mk.PromptPairs.from_tokens(clean, corrupted, answers)


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("technique", [mk.activation_patching, mk.attribution_patching, mk.edge_attribution])
def test_all_prompts_are_judged_together(model: mk.HookedModel, technique: Any, budget: int | None) -> None:
    """Not those that happen to run first."""
    most, least = of_lengths(model, [True, True, True, False]), of_lengths(model, [False, False, False, True])
    with warnings.catch_warnings():
        warnings.simplefilter("error", mk.GapWarning)
        technique(model, most, mk.logit_diff, budget=budget)
    with pytest.warns(mk.GapWarning, match="task: .* on average over 4 prompts"):
        technique(model, least, mk.logit_diff, budget=budget)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_source_model_changes_nothing_about_it(model: mk.HookedModel, direction: Any) -> None:
    pairs = of_lengths(model, [False, False])
    with pytest.warns(mk.GapWarning, match="task: the clean run does not do it"):
        mk.activation_patching(model, pairs, mk.logit_diff, source_model=model, direction=direction)


def test_metrics_of_which_runs_may_be_alike_and_functions_are_not_judged(model: mk.HookedModel) -> None:
    pairs = of_lengths(model, [True])

    def logit_diff(logits: Tensor) -> Tensor:
        return logits[:, -1, 0] * 0 - 1.0

    with warnings.catch_warnings():
        warnings.simplefilter("error", mk.GapWarning)
        mk.activation_patching(model, pairs, [mk.loss, mk.accuracy, mk.kl_divergence])
        mk.activation_patching(model, pairs, logit_diff)


def test_what_was_accepted_in_silence_is_refused(model: mk.HookedModel) -> None:
    with pytest.raises(ValueError, match="positions: 'ANSWER' is where the answer's first token is predicted"):
        mk.PromptPairs.teacher_forced(model, ["ab"], ["ac"], ["de"], positions={"ANSWER": [0]})
    with pytest.raises(ValueError, match="metric: expected a direction of finite numbers"):
        mk.direct_logit_attribution(model, "ab", torch.full((model.d_model,), torch.nan, dtype=torch.float64))
