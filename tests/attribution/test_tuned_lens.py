"""The tuned lens: what it applies, what it finds where the answer is known, and that it beats the logit lens on a real model."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle

import pytest
import torch

import mechkit as mk
from helpers.families import D_VOCAB, FAMILIES, build_hf
from helpers.tiny import make_model, make_pairs, model_of
from mechkit.attribution import _tuned_fit
from mechkit.attribution.logit_lens import logit_lens, top_tokens
from mechkit.attribution.tuned_lens import TunedLens


def random_lens(model: mk.HookedModel, seed: int = 0) -> TunedLens:
    generator = torch.Generator().manual_seed(seed)
    n, d = model.n_layers - 1, model.d_model
    A, b = (0.3 * torch.randn(*shape, generator=generator, dtype=model.dtype) for shape in ((n, d, d), (n, d)))
    return TunedLens(A, b, tuple(range(n)), model.n_layers, {"weights_hash": model.weights_hash, "model": model.name})


def random_text(n: int, length: int = 12, seed: int = 0) -> mk.Prompts:
    generator = torch.Generator().manual_seed(seed)
    return mk.Prompts.from_tokens(list(torch.randint(D_VOCAB, (n, length), generator=generator)))


def fit(model: mk.HookedModel, text: mk.Prompts, **arguments) -> TunedLens:
    return TunedLens.fit(model, text, **{"steps": 20, "progress": False} | arguments)


def mean_kl(model: mk.HookedModel, text: mk.Prompts, lens: TunedLens | None) -> torch.Tensor:
    """`[layer]`"""
    return logit_lens(model, text, value="kl", lens=lens, progress=False).values.nanmean((1, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_lens_is_translator_then_the_models_own_end(family):
    model, prompts = model_of(family), make_pairs().clean
    lens = random_lens(model)
    found = logit_lens(model, prompts, list(range(D_VOCAB)), lens=lens, progress=False)
    tolerance = 1e-4 if family == "mixtral" else 1e-10
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    for j, tokens in enumerate(prompts.tokens):
        with torch.no_grad():
            cache = model.bridge.run_with_cache(tokens[None])[1]
            streams = []
            for layer in range(model.n_layers):
                h = cache[f"blocks.{layer}.hook_resid_post"].clone()
                if layer < model.n_layers - 1:
                    h = h + torch.einsum("ij,bpj->bpi", lens.A[layer], h) + lens.b[layer]
                streams.append(h)
            every = torch.cat(streams)  # a layer is a row of one pass, which ends in its stream
            hooks = [(last, lambda x, hook, every=every: every)]
            for layer, logits in enumerate(model.bridge.run_with_hooks(tokens.expand(len(every), -1), fwd_hooks=hooks)):
                error = (found.values[layer, : len(tokens), :, j] - logits).abs().max()
                assert float(error) <= tolerance
    plain = logit_lens(model, prompts, list(range(D_VOCAB)), progress=False).values
    difference = (found.values - plain).nan_to_num().abs().amax((1, 2, 3))
    assert float(difference[:-1].min()) > 1e-2  # control
    assert float(difference[-1]) == 0
    assert found.provenance["lens"] == f"tuned lens {lens.hash()}"


def test_identity_is_the_logit_lens():
    model, prompts = model_of("gemma2"), make_pairs().clean
    lens = random_lens(model)
    zero = TunedLens(lens.A * 0, lens.b * 0, lens.layers, lens.n_layers, lens.provenance)
    for value in ("kl", "entropy"):
        with_lens = logit_lens(model, prompts, value=value, lens=zero, progress=False)
        assert torch.equal(
            with_lens.values.nan_to_num(-1),
            logit_lens(model, prompts, value=value, progress=False).values.nan_to_num(-1),
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_fit_is_never_worse_on_validation_and_better_where_it_can_be(family):
    model = model_of(family)
    lens = fit(model, random_text(60))
    report = lens.provenance["validation_kl"]
    assert report["layer"] == list(range(model.n_layers - 1))
    assert all(tuned <= plain for tuned, plain in zip(report["tuned_lens"], report["logit_lens"], strict=True))
    assert sum(report["tuned_lens"]) < 0.8 * sum(report["logit_lens"])
    fresh = random_text(20, seed=1)
    assert float(mean_kl(model, fresh, lens).sum()) < 0.9 * float(mean_kl(model, fresh, None).sum())
    assert not model.has_hooks
    assert all(p.grad is None for p in model.bridge.original_model.parameters())
    assert lens.A.dtype == model.dtype


def last_block_adds(vector: torch.Tensor) -> mk.HookedModel:
    """A GPT-2 whose last block adds a fixed vector whatever it reads: the best translator before it is known."""
    model = make_model("gpt2")
    with torch.no_grad():
        block = model.bridge.original_model.transformer.h[-1]
        for part in (block.attn.c_proj, block.mlp.c_proj):
            part.weight.zero_()
            part.bias.zero_()
        block.mlp.c_proj.bias.copy_(vector)
    return model


@pytest.mark.parametrize("steps", [0, 60])
def test_a_known_translator_is_found(steps):
    """The last block adds a constant `c`, so `h + c` predicts the end exactly: KL 0, which the logit lens is far from."""
    model = last_block_adds(20 * torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    text, fresh = random_text(100), random_text(10, seed=1)
    lens = fit(model, text, steps=steps, layers=[2])
    tuned, plain = mean_kl_at(model, fresh, lens, 2), mean_kl_at(model, fresh, None, 2)
    assert plain > 0.5
    assert tuned < 0.03 * plain


def mean_kl_at(model: mk.HookedModel, text: mk.Prompts, lens: TunedLens | None, layer: int) -> float:
    found = logit_lens(model, text, value="kl", lens=lens, layers=[layer], progress=False)
    return float(found.values.nanmean())


def test_a_layer_that_cannot_be_improved_keeps_the_logit_lens():
    """The last block adds nothing: the logit lens before it is exact, and any fitted translator only nearly so."""
    model = last_block_adds(torch.zeros(32))
    lens = fit(model, random_text(30))
    assert float(lens.A[2].abs().max()) == 0
    assert float(lens.b[2].abs().max()) == 0
    assert float(lens.A[0].abs().max()) > 0
    assert lens.provenance["validation_kl"]["tuned_lens"][2] == 0


def test_gradient_steps_help_on_what_they_are_steered_by():
    """With the whole vocabulary drawn the estimate is exact, so that the best state seen is no worse than the start."""
    model, text = model_of("llama"), random_text(80)
    start, refined = (fit(model, text, steps=steps, lr=1e-3).provenance["validation_kl"] for steps in (0, 100))
    for before, after in zip(start["tuned_lens"], refined["tuned_lens"], strict=True):
        assert after <= before + 1e-9
    assert sum(refined["tuned_lens"]) < 0.99 * sum(start["tuned_lens"])


def test_part_of_the_vocabulary_estimates_the_normalizer_without_bias():
    model = model_of("gemma2")
    resid = 5 * torch.randn(4, model.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.unembed(resid)
        top = logits.topk(3).indices
        whole = logits.exp().sum(-1)
        generator, sums = torch.Generator().manual_seed(1), []
        for _ in range(4000):
            columns, weight = _tuned_fit._draw(top, D_VOCAB, 8, generator)
            assert len(columns.unique()) == len(columns)
            sums.append((logits[:, columns] + weight).exp().sum(-1))
    found = torch.stack(sums)
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - whole).abs() <= 4 * error).all())
    assert bool((found.std(0) > 1e-3 * whole).any())  # control: they are estimates
    columns, weight = _tuned_fit._draw(top, D_VOCAB, 1000, generator)
    assert sorted(columns.tolist()) == list(range(D_VOCAB))
    assert float(weight.abs().max()) == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_the_least_seen_direction(family):
    """The direction that moves differences of logits least, among those that the final norm does not remove."""
    model = model_of(family)
    norm, W_U = mk.hooks.FrozenNorm(model.bridge.ln_final, torch.randn(1, model.d_model).double()), model.W_U.detach()
    hidden = _tuned_fit._least_seen(model, torch.randn(5, model.d_model, dtype=torch.float64))
    assert abs(float(hidden.norm()) - 1) < 1e-10

    def seen(direction: torch.Tensor) -> float:
        logits = norm.linear(direction, torch.ones(1, dtype=torch.float64)) @ W_U
        return float((logits - logits.mean(-1, keepdim=True)).norm())

    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        other = torch.randn(model.d_model, dtype=torch.float64, generator=generator)
        other = other - other.mean() if norm.centres else other
        assert seen(hidden) <= seen(other / other.norm()) + 1e-9
    if norm.centres:
        assert abs(float(hidden.mean())) < 1e-9


@pytest.mark.parametrize("budget", [1, 40_000])
def test_layers_fitted_a_few_at_a_time(budget):
    model, text = model_of("qwen2"), random_text(40)
    whole, apart = fit(model, text, steps=0), fit(model, text, steps=0, budget=budget)
    assert torch.allclose(whole.A, apart.A, atol=1e-8)
    assert torch.allclose(whole.b, apart.b, atol=1e-8)


def test_seed_and_arguments():
    model, text = model_of("llama"), random_text(40)
    first, again, other = fit(model, text), fit(model, text), fit(model, text, seed=1)
    assert first.hash() == again.hash() != other.hash()
    assert first.provenance["seed"] == 0
    assert first.provenance["tokens_hash"] == text.hash()
    assert first.provenance["n_train"] == 32 * 12
    assert fit(model, text, skip_first=2, steps=0).provenance["n_train"] == 32 * 10
    ragged = mk.Prompts.from_tokens([*text.tokens, torch.tensor([1, 2, 3]), torch.tensor([4])])
    fit(model, ragged, steps=2, layers=[1])
    bad = [
        ({"validation": 0.0}, "validation"),
        ({"validation": 1.0}, "validation"),
        ({"steps": -1}, "steps"),
        ({"batch": 0}, "batch"),
        ({"lr": 0.0}, "lr"),
        ({"vocabulary": 0}, "vocabulary"),
        ({"skip_first": -1}, "skip_first"),
        ({"skip_first": 12}, "at least two"),
        ({"layers": [3]}, "needs no translator"),
        ({"layers": [-1]}, "needs no translator"),
        ({"layers": [9]}, "layers"),
        ({"budget": 0}, "budget"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            fit(model, text, **arguments)
    with pytest.raises(ValueError, match="at least two"):
        fit(model, text[[0]])
    model.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        fit(model, text)
    model.eval()
    assert not model.has_hooks


def test_grad_mode_and_random_state_are_left_alone():
    model, text = model_of("llama"), random_text(20)
    before = torch.get_rng_state()
    with torch.no_grad():
        fit(model, text)
        assert not torch.is_grad_enabled()
    fit(model, text)
    assert torch.is_grad_enabled()
    assert torch.equal(before, torch.get_rng_state())


def test_the_first_position_may_be_huge():
    """One position hundreds of times larger than the rest does not spoil the fit of the others."""
    model, text = make_model("llama"), random_text(60)
    with torch.no_grad():
        model.bridge.original_model.model.embed_tokens.weight[5] *= 300
    marked = mk.Prompts.from_tokens([torch.cat([torch.tensor([5]), row]) for row in text.tokens])
    fresh = mk.Prompts.from_tokens([torch.cat([torch.tensor([5]), row]) for row in random_text(20, seed=1).tokens])
    for skip in (0, 1):
        lens = fit(model, marked, skip_first=skip)
        tuned, plain = (
            logit_lens(model, fresh, value="kl", lens=one, progress=False).values[:-1, 1:].mean()
            for one in (lens, None)
        )
        assert float(tuned) < 0.8 * float(plain)


def test_a_lens_can_be_copied_and_sent_to_another_process():
    lens = TunedLens(torch.ones(1, 3, 3), torch.ones(1, 3), (0,), 2, {"model": "tiny"})
    for again in (copy.deepcopy(lens), pickle.loads(pickle.dumps(lens))):
        assert again.hash() == lens.hash()
        assert dict(again.provenance) == {"model": "tiny"}
        assert again.A is not lens.A


def test_save_and_load(tmp_path):
    model, text = model_of("llama"), random_text(20)
    lens = fit(model, text)
    again = TunedLens.load(lens.save(tmp_path / "lens.safetensors"))
    assert torch.equal(lens.A, again.A)
    assert torch.equal(lens.b, again.b)
    assert (again.layers, again.n_layers) == (lens.layers, lens.n_layers)
    assert dict(again.provenance) == dict(lens.provenance)
    assert again.provenance["model"] == "llama"
    assert again.provenance["mechkit"] == mk.__version__
    assert top_tokens(model, text, k=2, lens=again, progress=False).probs.provenance["lens"].endswith(lens.hash())
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"TunedLens\.save"):
        TunedLens.load(tmp_path / "bad.safetensors")
    logit_lens(model, text, value="kl", progress=False).save(tmp_path / "result.safetensors")
    with pytest.raises(ValueError, match=r"TunedLens\.save"):
        TunedLens.load(tmp_path / "result.safetensors")


def test_a_lens_of_another_model_is_refused():
    model, prompts = model_of("llama"), make_pairs().clean
    other = mk.HookedModel.from_hf(build_hf("llama", torch.float64, seed=1), name="other")
    lens = random_lens(model)
    logit_lens(model, prompts, value="kl", lens=lens, progress=False)
    with pytest.raises(ValueError, match="fitted on llama with weights"):
        logit_lens(other, prompts, value="kl", lens=lens, progress=False)
    with pytest.raises(ValueError, match="site 'resid_post'"):
        logit_lens(model, prompts, value="kl", lens=lens, site="resid_pre", progress=False)
    part = TunedLens(lens.A[:1], lens.b[:1], (1,), model.n_layers, lens.provenance)
    logit_lens(model, prompts, value="kl", lens=part, layers=[1, 3], progress=False)
    with pytest.raises(ValueError, match=r"not for \[0, 2\]"):
        logit_lens(model, prompts, value="kl", lens=part, progress=False)
    with pytest.raises(ValueError, match="A, b: expected"):
        TunedLens(lens.A[:1], lens.b, lens.layers, model.n_layers)


TRAINING = ("argparse", "pathlib", "random", "statistics", "logging", "doctest", "email.message", "optparse", "tarfile")
TRAINING += ("unittest.mock", "threading", "difflib", "collections", "subprocess", "zipfile", "turtle")
HELD_OUT = ("tempfile", "mailbox", "ast", "socket", "urllib.request", "codecs", "enum")


def docstrings(model: mk.HookedModel, modules: tuple[str, ...], n: int, length: int = 64) -> mk.Prompts:
    """`n` pieces of `length` tokens of these modules' docstrings: English text that comes with Python."""
    rows: list[torch.Tensor] = []
    for name in modules:
        module = importlib.import_module(name)
        things = [module]
        for thing in (value for _, value in sorted(vars(module).items())):
            if (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__ == name:
                things += [thing, *(vars(thing).values() if inspect.isclass(thing) else ())]
        texts = [t.__doc__ for t in things if isinstance(getattr(t, "__doc__", None), str)]
        tokens = model.to_tokens(
            "\n\n".join(map(inspect.cleandoc, dict.fromkeys(texts))), prepend_bos=False, truncate=False
        )[0]
        rows += tokens[: len(tokens) // length * length].split(length) if len(tokens) >= length else ()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:n]
    return mk.Prompts.from_tokens([rows[i] for i in order])


def test_beats_the_logit_lens_at_every_layer_of_smollm2(smollm2):
    """On the docstrings of modules that it was not fitted on, with 600 positions to fit on."""
    lens = fit(smollm2, docstrings(smollm2, TRAINING, 12), steps=3)
    held_out, at = docstrings(smollm2, HELD_OUT, 4), [0, 18, 36, 63]
    tuned, plain = (
        logit_lens(smollm2, held_out, value="kl", lens=one, positions=at, progress=False).values.mean((1, 2))
        for one in (lens, None)
    )
    print("layer: tuned lens, logit lens (KL to the final layer, nats)")
    for layer in range(smollm2.n_layers):
        print(f"{layer:2d}: {float(tuned[layer]):6.3f} {float(plain[layer]):6.3f}")
    assert bool((tuned[:-1] < 0.5 * plain[:-1]).all())
    assert float(tuned[-1]) == float(plain[-1]) == 0
