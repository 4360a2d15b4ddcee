"""Patchscopes against one whole forward pass per layer, position and prompt."""

from __future__ import annotations

import pytest
import torch

import mechkit as mk
from helpers.families import D_VOCAB, FAMILIES
from helpers.tiny import make_model, make_pairs, model_of
from mechkit.attribution.patchscope import IDENTITY, patchscope
from mechkit.hooks import SITES

TARGET = [3, 17, 40, 8, 25]


def run(model: mk.HookedModel, source: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(model.bridge.run_with_cache(source[None])[1])


def naive(
    model: mk.HookedModel, cache: dict, site: str, layer: int, pos: int, target: list[int], at: int, into: int
) -> torch.Tensor:
    """The target's last logits `[d_vocab]`, with one hidden state of the source (its `cache`) written in."""
    state = cache[SITES[site].hook_name(layer)][0, pos].clone()

    def write(x, hook):
        x[:, at] = state
        return x

    with torch.no_grad():
        tokens = torch.tensor(target)[None]
        return model.bridge.run_with_hooks(tokens, fwd_hooks=[(SITES[site].hook_name(into), write)])[0, -1]


def check_row(probs: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, tolerance: float) -> None:
    expected = logits.softmax(-1).sort(descending=True)
    assert float((probs - expected.values[: len(probs)]).abs().max()) <= tolerance
    assert torch.equal(ids, expected.indices[: len(ids)])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_position_and_prompt(family):
    model, prompts = model_of(family), make_pairs().clean
    tolerance = 1e-5 if family == "mixtral" else 1e-10
    caches = [run(model, source) for source in prompts.tokens]
    for site in ("resid_post", "resid_mid", "mlp_out"):
        if not model.has_site(site):
            continue
        positions = [0, 2, 5]
        found = patchscope(
            model, prompts, TARGET, positions=positions, target_position=1, site=site, k=3, progress=False
        )
        assert found.probs.dims == ("layer", "pos", "k", "prompt")
        for layer in range(model.n_layers):
            for i, pos in enumerate(positions):
                for j, source in enumerate(prompts.tokens):
                    probs, ids = found.probs.values[layer, i, :, j], found.ids[layer, i, :, j]
                    if pos >= len(source):
                        assert bool(probs.isnan().all())
                        assert ids.tolist() == [-1] * 3
                        assert set(found.strings[layer, i, :, j]) == {""}
                        continue
                    check_row(probs, ids, naive(model, caches[j], site, layer, pos, TARGET, 1, layer), tolerance)
        # Control: what is written matters, so long as a later position can still see it.
        first = found.probs.values[:, 0]
        assert float((first[0] - first[1]).abs().max()) > 1e-4


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_into_another_layer(family):
    model, prompts = model_of(family), make_pairs().clean
    found = patchscope(model, prompts, TARGET, target_layer=-3, layers=[3, 0], k=4, progress=False)
    assert found.probs.dims == ("layer", "k", "prompt")
    assert found.probs.coords["layer"] == (3, 0)
    for i, layer in enumerate((3, 0)):
        for j, source in enumerate(prompts.tokens):
            logits = naive(model, run(model, source), "resid_post", layer, -1, TARGET, -1, 1)
            check_row(found.probs.values[i, :, j], found.ids[i, :, j], logits, 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_written_into_itself_is_the_unpatched_model(family):
    model, prompts = model_of(family), make_pairs().clean[[0]]
    tolerance = 1e-5 if family == "mixtral" else 1e-12
    with torch.no_grad():
        logits = model(prompts.tokens[0][None])[0, -1]
    for at in (-1, 3):
        found = patchscope(model, prompts, prompts, positions=at, target_position=at, k=D_VOCAB, progress=False)
        for layer in range(model.n_layers):
            check_row(found.probs.values[layer, :, 0], found.ids[layer, :, 0], logits, tolerance)
        other = patchscope(model, prompts, prompts, positions=1, target_position=at, k=D_VOCAB, progress=False)
        different = other.probs.values[0].sort(0).values - found.probs.values[0].sort(0).values
        assert float(different.abs().max()) > 1e-4  # control: another position's state changes the prediction


def test_last_layer_at_the_end_is_the_source():
    """Nothing follows the last layer: the target's prediction is then the source's own."""
    model, prompts = make_model("qwen2"), make_pairs().clean
    found = patchscope(model, prompts, TARGET, layers=[-1], k=D_VOCAB, progress=False)
    for j, source in enumerate(prompts.tokens):
        with torch.no_grad():
            check_row(found.probs.values[0, :, j], found.ids[0, :, j], model(source[None])[0, -1], 1e-12)


def test_named_positions_and_one_position():
    model, pairs = make_model("llama"), make_pairs()
    pairs = mk.PromptPairs(pairs.clean, pairs.corrupted, pairs.right, pairs.wrong, {"MID": torch.tensor([4, 5, 3])})
    named = patchscope(model, pairs, TARGET, positions=["END", "MID"], k=2, progress=False)
    assert named.probs.dims == ("layer", "position", "k", "prompt")
    assert named.probs.coords["position"] == ("END", "MID")
    one = patchscope(model, pairs, TARGET, positions="MID", k=2, progress=False)
    assert one.probs.dims == ("layer", "k", "prompt")
    assert torch.allclose(one.probs.values, named.probs.values[:, 1], atol=1e-12, rtol=0)
    last = patchscope(model, pairs.clean, TARGET, positions=[-1], k=2, progress=False)
    assert torch.allclose(last.probs.values[:, 0], named.probs.values[:, 0], atol=1e-12, rtol=0)
    assert named.probs.provenance["technique"] == "patchscope"
    assert named.probs.provenance["target"] == TARGET


@pytest.mark.parametrize("family", ["gpt2", "mistral", "falcon"])
def test_continuation_is_greedy_with_the_state_in_place(family):
    model, prompts = model_of(family), make_pairs().clean
    found = patchscope(model, prompts, TARGET, target_position=2, k=1, max_new_tokens=4, progress=False)
    caches, changed = [run(model, source) for source in prompts.tokens], 0
    with torch.no_grad():
        plain = list(TARGET)
        for _ in range(4):
            plain.append(int(model(torch.tensor([plain]))[0, -1].argmax()))
    for layer in range(model.n_layers):
        for j, cache in enumerate(caches):
            tokens = list(TARGET)
            for _ in range(4):
                logits = naive(model, cache, "resid_post", layer, -1, tokens, 2, layer)
                tokens.append(int(logits.argmax()))
            assert found.text[layer, j] == " ".join(map(str, tokens[len(TARGET) :]))
            changed += tokens != plain
    assert changed  # control: the model says something else without the state
    assert patchscope(model, prompts, TARGET, progress=False).text is None


def test_any_budget_gives_the_same():
    model, prompts = make_model("olmo2"), make_pairs().clean
    whole, tiny = (
        patchscope(model, prompts, TARGET, positions=[1, 6], k=3, max_new_tokens=2, budget=budget, progress=False)
        for budget in (None, 1)
    )
    assert torch.allclose(whole.probs.values, tiny.probs.values, atol=1e-12, rtol=0, equal_nan=True)
    assert torch.equal(whole.ids, tiny.ids)
    assert (whole.text == tiny.text).all()
    assert whole.probs.cost.block_tokens == tiny.probs.cost.block_tokens


def test_refusals_leave_no_hook():
    model, prompts = make_model("llama"), make_pairs().clean
    bad = [
        ({"site": "z"}, "site: expected one of resid_pre"),
        ({"site": "embed"}, "site: expected"),
        ({"layers": [4]}, "layers"),
        ({"target_layer": 4}, "target_layer"),
        ({"target_position": 5}, "target_position"),
        ({"positions": 7}, "positions"),
        ({"positions": [1, 1]}, "positions"),
        ({"positions": []}, "positions"),
        ({"positions": "S2"}, "positions: expected names"),
        ({"positions": 1.5}, "positions"),
        ({"k": 0}, "k: expected"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"target": []}, "target"),
        ({"target": [D_VOCAB]}, "target"),
        ({"target": prompts}, "target: expected one prompt, got 3"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            patchscope(model, prompts, **{"target": TARGET, "progress": False} | arguments)
    with pytest.raises(ValueError, match="the model's context"):
        patchscope(make_model("gpt2"), prompts, TARGET, max_new_tokens=100, progress=False)
    model.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        patchscope(model, prompts, TARGET, progress=False)
    model.eval()
    assert not model.has_hooks


def test_smollm2_repeats_what_it_is_given(smollm2):
    """The identity prompt makes the model repeat the word whose hidden state stands at its `?`: from early layers always, from
    the last ones, which hold the next word instead, never. Continued, it says the word and closes the item."""
    words = [" Paris", " elephant", " music", " water", " Mary", " green", " London", " doctor"]
    prompts = mk.Prompts.from_text(smollm2, ["I like" + word for word in words])
    found = patchscope(smollm2, prompts, IDENTITY, target_position=-2, layers=[1, 6, 11, 28], k=1, progress=False)
    assert found.strings[:3, 0].tolist() == [words] * 3
    assert not set(found.strings[3, 0]) & set(words)
    early = patchscope(
        smollm2, prompts[[0, 1]], IDENTITY, target_position=-2, layers=[6], max_new_tokens=2, progress=False
    )
    assert early.text.tolist() == [[" Paris;", " elephant;"]]
