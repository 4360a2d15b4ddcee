"""The proof of the replay, put to the test: it must refute every defect that moves a cell, and accept the right replay."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch

import mechkit as mk
from helpers.families import FAMILIES, build_hf
from helpers.planted import DEFECTS, SWEEPS, off, outcome, swept, unproved_outcome
from helpers.tiny import make_pairs, whole_vocabulary
from mechkit._precision import Rounding

# Windows (gemma2, gemma3, mistral), parallel blocks (gptj, gpt_neox, falcon), a bias by distance (bloom), learned positions (opt)
TRIED = [name for name in FAMILIES if name not in ("mixtral", "qwen2", "qwen3", "phi")]
TOLERANCE = 1e-8


@cache
def ground(family: str, seed: int, sweep: tuple[str, str], dtype: torch.dtype = torch.float64):
    model = build(family, seed, dtype)
    pairs = make_pairs(seed=seed)
    metric = whole_vocabulary(pairs)
    return model, pairs, metric, swept(model, pairs, metric, sweep, replay=False)


@cache
def build(family: str, seed: int, dtype: torch.dtype) -> mk.HookedModel:
    return mk.HookedModel.from_hf(build_hf(family, dtype, seed), name=family)


@pytest.mark.parametrize("family", TRIED)
def test_every_defect_that_moves_a_cell_is_refuted(family):
    """A sample with every defect in every family and in every kind of sweep. `benchmarks/truth/replay_proof.py` tries all."""
    n, moving, missed = TRIED.index(family), 0, []
    for i, name in enumerate(DEFECTS):
        sweep = SWEEPS[(n + 3 * i) % len(SWEEPS)]
        model, pairs, metric, right = ground(family, n % 5, sweep)
        moved, left = outcome(model, pairs, metric, sweep, name, right)
        if left is not None and not left <= TOLERANCE:
            missed.append(f"{name}, {sweep}: off by {left:.1e} (unproved: {moved:.1e})")
        moving += moved > TOLERANCE
    assert not missed, "; ".join(missed)
    assert moving >= 5  # most defects do something nearly everywhere: the test would be empty otherwise


def test_every_defect_moves_a_cell_somewhere():
    """The control: without a proof each of them gives wrong numbers in one of two families."""
    for name in DEFECTS:
        worst = 0.0
        for family, sweep in (("gemma3", ("z", "layer pos head")), ("gemma3", ("mlp_out", "layer pos"))):
            model, pairs, metric, right = ground(family, 0, sweep)
            worst = max(worst, unproved_outcome(model, pairs, metric, sweep, name, right))
        assert worst > 1e-3, name


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("llama", torch.float16),
        ("gemma3", torch.bfloat16),
        ("gpt2", torch.float16),
        ("gpt_neox", torch.bfloat16),
    ],
)
def test_half_precision(family, dtype):
    """The right replay is accepted, and defects that move cells by more than rounding does are refuted."""
    sweep = SWEEPS[0] if family in ("llama", "gpt2") else SWEEPS[1]
    model, pairs, metric, right = ground(family, 0, sweep, dtype)
    accepted = swept(model, pairs, metric, sweep)
    assert accepted.provenance["replay"] == "suffix"
    rounding, missed = off(accepted, right), []
    for name in DEFECTS:
        moved, left = outcome(model, pairs, metric, sweep, name, right)
        if left is not None and not left <= max(3 * rounding, 0.05):
            missed.append(f"{name}: off by {left:.1e} (unproved {moved:.1e})")
    assert not missed, f"rounding {rounding:.1e}: " + "; ".join(missed)


def test_float64_models_that_compute_partly_in_float32_are_held_to_float32():
    """Phi-3's rotations are float32: the hooked model's logits may be off by more than float64 rounds, but not by 1e-3."""
    from mechkit.hooks.loading import validate as _validate

    model = build("llama", 0, torch.float64)
    assert _validate._allowed(model, 1e-7) == 1e-6
    assert _validate._allowed(model, 2e-6) == 1e-4  # its norms are float32
    with pytest.raises(ValueError, match="expected at most 1e-04"):
        _validate._checked(model, "logits", 1e-3)
    assert _validate._allowed(build("gpt2", 0, torch.float64), 2e-6) in (1e-6, 1e-4)


# -- what no block is given by itself, and what a model's own code may do ----------------------------------------------


def masked(sees) -> mk.HookedModel:
    """A Llama that makes its own mask: which positions each one sees, `(tokens [row pos], destination, source) -> bool`."""
    hf = build_hf("llama")

    def give(module, args, kwargs):
        tokens = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        at = torch.arange(tokens.shape[1])
        seen = sees(tokens, at[:, None], at[None]).expand(len(tokens), 1, len(at), len(at))
        lowest = torch.finfo(torch.float64).min
        kwargs["attention_mask"] = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, lowest)
        return args, kwargs

    hf.model.register_forward_pre_hook(give, with_kwargs=True)
    return mk.HookedModel.from_hf(hf, name="masked")


def between_documents(tokens, to, of):
    """Token 1 begins a document."""
    document = (tokens == 1).cumsum(1)
    return ((document[:, :, None] == document[:, None]) & (of <= to))[:, None]


MASKS = {
    "causal": lambda tokens, to, of: of <= to,
    "between documents": between_documents,
    "prefix of 4": lambda tokens, to, of: (of <= to) | ((to < 4) & (of < 4)),
    "blocks of 2": lambda tokens, to, of: of // 2 <= to // 2,
}


def ragged_documents(separator_in: int) -> mk.PromptPairs:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(3, 60, (8, 9), generator=generator)
    clean[separator_in, 3] = 1
    corrupted = clean.clone()
    corrupted[:, 5] = (clean[:, 5] + 4) % 50 + 3
    return mk.PromptPairs.from_tokens(list(clean), list(corrupted), [(5, 6)] * 8)


@pytest.mark.parametrize(
    ("name", "separator_in"), [*((name, 0) for name in MASKS), ("between documents", 2), ("between documents", 7)]
)
def test_masks_of_a_models_own(name, separator_in):
    """Documents have another mask in each prompt; prefixes and blocks look ahead, but not over every boundary."""
    model, pairs = masked(MASKS[name]), ragged_documents(separator_in)
    metric = mk.logit_diff(pairs)
    quiet = {"progress": False}
    calls = {
        "ablation": partial(
            mk.ablation, model, pairs, metric, site="resid_pre", over="layer pos", mode="zero", **quiet
        ),
        "patching": partial(mk.activation_patching, model, pairs, metric, over="layer head", **quiet),
    }
    for what, call in calls.items():
        found, right = call(), call(replay=False)
        assert off(found, right) <= TOLERANCE, what
        # Documents end elsewhere in each prompt; who looks ahead within a block or a prefix is seen in the mask.
        assert (found.provenance["replay"] == "suffix") == (name != "between documents"), (what, found.provenance)


def test_which_masks_show_later_positions():
    from mechkit.engine._causality import sees

    def shows(mask: torch.Tensor) -> bool:
        return bool(sees(mask).triu(1).any())

    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    ahead = causal.clone()
    ahead[1, 2] = True
    for mask, shown in ((causal, False), (ahead, True)):
        assert shows(mask) is shown
        assert shows(~mask) is shown  # where True means hidden
        for lowest in (-torch.inf, torch.finfo(torch.float64).min):
            assert shows(torch.zeros(2, 1, 4, 4).double().masked_fill(~mask, lowest)) is shown
        assert shows(torch.cat([mask, torch.ones(4, 2, dtype=torch.bool)], 1)) is shown  # a longer cache


class ReadsTheOneBefore(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.weight = inner, inner.weight

    def forward(self, x):
        return self.inner(x + 0.5 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


class ScalesEarlierPositions(ReadsTheOneBefore):
    def forward(self, x):
        scale = torch.ones(1, x.shape[1], 1, dtype=x.dtype)
        scale[:, :-1] = 3.0
        return self.inner(x * scale)


@pytest.mark.parametrize("head", [ReadsTheOneBefore, ScalesEarlierPositions])
def test_heads_that_read_other_positions(head):
    """What a model says at a position is read from the whole of its own run, and gradients and circuits refuse."""
    hf = build_hf("llama")
    hf.lm_head = head(hf.lm_head)
    model = mk.HookedModel.from_hf(hf, name="head")
    clean, corrupted = [[5, 6, 7, 8, 9, 10]] * 2, [[5, 6, 11, 8, 9, 10], [5, 6, 7, 12, 9, 10]]
    pairs = mk.PromptPairs.from_tokens(clean, corrupted, [(5, 6), (7, 8)], positions={"middle": [3, 4]})
    for position in ("END", "middle"):
        metric = mk.logit_diff(pairs, position=position)
        at = pairs.positions[position]
        for kind, prompts in (("clean", pairs.clean), ("corrupted", pairs.corrupted)):
            logits = hf(torch.stack(prompts.tokens)).logits[torch.arange(2), at]
            expected = torch.stack([logits[0, 5] - logits[0, 6], logits[1, 7] - logits[1, 8]])
            for more in ({}, {"replay": False}):
                found = mk.activation_patching(model, pairs, metric, over="layer head", progress=False, **more)
                assert torch.allclose(found.baseline[kind], expected, atol=1e-12), (position, kind, more)
                assert found.provenance["replay"].startswith("full")
        for technique in (mk.integrated_gradients, mk.attribution_patching, mk.direct_logit_attribution):
            with pytest.raises(ValueError, match="not"):
                technique(model, pairs, metric)
        with pytest.raises(ValueError, match="at the same position alone"):
            mk.evaluate_circuit(mk.Circuit.full(model), model, pairs, metric, random=0, sets=0, progress=False)


def test_an_embedding_of_another_width():
    """OPT-350m's stream is wider than what its unembedding reads: a projection stands between the two."""
    from helpers.families import build_of

    kind, settings = FAMILIES["opt"]
    hf = build_of(kind, {**settings, "word_embed_proj_dim": 16})
    model = mk.HookedModel.from_hf(hf, name="projected")
    pairs = make_pairs(seed=0)
    metric = mk.logit_diff(pairs)
    found = mk.activation_patching(model, pairs, metric, over="layer head", progress=False)
    right = mk.activation_patching(model, pairs, metric, over="layer head", progress=False, replay=False)
    assert found.provenance["replay"] == "suffix"
    assert off(found, right) <= TOLERANCE
    lens = mk.logit_lens(model, pairs.clean[[0]], tokens=[5, 6], value="logit", over="layer pos", positions=[-1])
    assert lens.dims == ("layer", "pos", "token", "prompt")
    assert torch.allclose(lens.values[-1, 0, :, 0], hf(pairs.clean.tokens[0][None]).logits[0, -1, [5, 6]], atol=1e-10)
    with pytest.raises(ValueError, match="its unembedding reads 16 features, and the residual stream has"):
        mk.direct_logit_attribution(model, pairs, metric)


def test_what_rounding_may_do_to_a_stream_that_came_through_many_blocks():
    """At the first position of many models a stream is a thousand times larger than what one block adds to it: each of the sums
    that it came through rounds it, and its rounding must not look like a defect, nor a defect like rounding."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(2, 1, 1, 64, generator=generator), dim=-1)
    before, added = 25_000 * unit[0], 20 * unit[1]
    expected = before + added

    def refuted(dtype: torch.dtype, apart: float, blocks: int) -> bool:
        rounding = Rounding.of(dtype)
        found = expected.double() + apart * torch.roll(unit[1], 1, -1).double()
        return not rounding.off(found, expected, before, blocks=blocks) <= rounding.of_block

    eps = 25_000 * torch.finfo(torch.float32).eps
    assert not refuted(torch.float32, 8 * eps, 13)
    assert refuted(torch.float32, 8 * eps, 0)
    assert refuted(torch.float32, 30 * eps, 13)
    before, expected = 0 * before, added  # an ordinary position: a hundredth of what a block adds is missing
    assert refuted(torch.float32, 0.2, 13)
    assert refuted(torch.float64, 1e-6, 13)
    expected = before = 25_000 * unit[0]
    half = Rounding.of(torch.bfloat16)
    one, many = (half.off(expected * 1.01, expected, before, blocks=blocks) for blocks in (0, 13))
    assert one == many  # half precision's allowance does not grow
