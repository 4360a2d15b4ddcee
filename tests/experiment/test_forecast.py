"""Forecasts are what sweeps then take: block-tokens, batches and passes of the weights, counted while a sweep runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mechkit as mk
from helpers.families import FAMILIES, build_hf
from helpers.tiny import make_pairs, model_of
from mechkit.engine import Budget
from mechkit.experiment.forecast import Forecast, answer, block_tokens, forecast, recorded_of
from mechkit.experiment.sizes import Sizes, sizes_of

SWEEPS = [("z", "layer head"), ("resid_pre", "layer pos"), ("z", "layer pos head"), ("resid_post", "layer pos")]
PROMPTS, LENGTH = 5, 7
SMALL = 2**17  # bytes, with which each prompt is a chunk of its own


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The configuration of a tiny Llama, and nothing else."""
    build_hf("llama").config.save_pretrained(tmp_path)
    return tmp_path


def sizes(folder: Path, family: str) -> Sizes:
    build_hf(family).config.save_pretrained(folder)
    return sizes_of(str(folder), dtype=model_of(family).dtype, device="cpu")


def both(
    folder: Path, site: str, over: str, first: int, budget: int | None = None, **more: Any
) -> tuple[Forecast, Any]:
    """The forecast, and a sweep as it is foreseen."""
    model, pairs = model_of("llama"), make_pairs(((LENGTH, first),) * PROMPTS)
    assert pairs.first_difference.tolist() == [first] * PROMPTS
    pair = {"prompts": PROMPTS, "length": LENGTH, "first_difference": first}
    foreseen = forecast(sizes(folder, "llama"), site, over, budget=budget, **pair)
    result = mk.activation_patching(
        model, pairs, mk.logit_diff(pairs), site=site, over=over, progress=False, budget=budget, **more
    )
    assert result.provenance["replay"] == "suffix"
    return foreseen, result


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_the_models_own(tmp_path, family):
    model, found = model_of(family), sizes(tmp_path, family)
    for name in ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head"):
        assert getattr(found, name) == getattr(model, name), name
    assert found.d_mlp == model.cfg.d_mlp
    original = model.bridge.original_model
    assert found.parameters == sum(p.numel() for p in original.parameters())
    assert found.block_parameters == sum(p.numel() for block in model.stack.blocks for p in set(block.parameters()))
    assert found.dtype == model.dtype
    assert found.experts == (family == "mixtral")


@pytest.mark.parametrize(("site", "over"), SWEEPS)
@pytest.mark.parametrize("first", [0, 1, 4])
@pytest.mark.parametrize("budget", [None, SMALL])
def test_block_tokens_are_what_a_sweep_counts(tmp_path, site, over, first, budget):
    foreseen, result = both(tmp_path, site, over, first, budget)
    cost = result.cost
    assert foreseen.block_tokens == cost.block_tokens - cost.proof_block_tokens
    assert foreseen.naive == cost.naive_block_tokens
    assert foreseen.cells == result.values[..., 0].numel()
    assert foreseen.proof == pytest.approx(cost.proof_block_tokens, rel=0.5)
    assert len(foreseen.chunks) == (1 if budget is None else PROMPTS)


@pytest.mark.parametrize(("site", "over"), SWEEPS)
@pytest.mark.parametrize("budget", [None, SMALL, 2**19])
def test_batches_are_those_of_a_sweep(tmp_path, monkeypatch, site, over, budget):
    sizes_of_batches = []
    cut = Budget.packed_rows_at_once

    def counted(self: Budget, model: Any, length: Any, *rest: Any) -> int:
        found = cut(self, model, length, *rest)
        sizes_of_batches.append(min(found, len(length)))
        return found

    monkeypatch.setattr(Budget, "packed_rows_at_once", counted)
    foreseen, _ = both(tmp_path, site, over, 1, budget)
    assert foreseen.batches == len(sizes_of_batches)
    assert foreseen.rows == sum(sizes_of_batches)
    assert foreseen.rows_at_once == max(sizes_of_batches)
    assert 0 < foreseen.largest <= foreseen.budget // 2


class Reads(TorchDispatchMode):
    """Counts how often some weights are multiplied with."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.at = {weight.data_ptr() for weight in weights}
        self.counts: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and args[1].data_ptr() in self.at:
            self.counts[args[1].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("site", "over"), SWEEPS)
@pytest.mark.parametrize("budget", [None, SMALL])
def test_weights_are_read_as_often_as_foreseen(tmp_path, site, over, budget):
    original = model_of("llama").bridge.original_model
    weights = [parameter for name, parameter in original.named_parameters() if "down_proj" in name]
    assert len(weights) == model_of("llama").n_layers
    with Reads(weights) as seen:
        foreseen, _ = both(tmp_path, site, over, 1, budget)
    assert len(seen.counts) == len(weights)
    found = seen.counts.total() / len(weights)
    assert foreseen.weight_passes == pytest.approx(found, abs=1 + len(foreseen.chunks) / 2)
    assert foreseen.replays < found


def test_what_is_recorded_is_what_a_run_keeps(tmp_path):
    model = model_of("llama")
    found = forecast(sizes(tmp_path, "llama"), "z", "layer head", prompts=1, length=LENGTH)
    assert sum(found.recorded.values()) == recorded_of(model, [("z", i) for i in range(model.n_layers)], LENGTH)
    assert set(found.recorded) == {"streams", "keys and values", "z"}
    rows = forecast(sizes(tmp_path, "llama"), "z", "layer head", prompts=3, length=LENGTH)
    assert rows.block_tokens == block_tokens(model.n_layers, model.n_heads, "layer head", 3, LENGTH)


def test_arithmetic_is_what_is_counted(tmp_path):
    """Of one block and token; in a sweep the last block does less, and unembedding and rotations come on top."""
    from torch.utils.flop_counter import FlopCounterMode

    found = forecast(sizes(tmp_path, "llama"), "z", "layer head", prompts=PROMPTS, length=LENGTH)
    model = model_of("llama")
    tokens = torch.zeros(1, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.run(tokens)
    unembedding = 2 * LENGTH * model.d_model * model.d_vocab
    each = (counter.get_total_flops() - unembedding) / LENGTH / model.n_layers
    assert found.flop_per_block_token == pytest.approx(each, rel=0.03)  # norms have parameters and no products
    assert found.flop == (found.block_tokens + found.proof) * found.flop_per_block_token


def test_no_weights_are_needed(folder):
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    text = answer(
        str(folder), "z over layer head", prompts=4, length=9, first_difference=5, budget="1 MiB", rate=2, device="cpu"
    )
    assert "16 cells for 4 pairs of 9 tokens that differ from position 5 on" in text
    rows = 4 * 4 * (4 + 3 + 2 + 1) * 4
    assert f"block-tokens: {288 + rows:,} (288 for unedited runs, {rows:,} for rows)" in text
    assert "s at 2 GFLOP/s" in text
    assert "the budget is 1 MiB" in text
    assert "all experts" not in text
    later = answer(str(folder), "resid_pre over layer pos", prompts=1, length=9, first_difference=5, device="cpu")
    assert "rows: 36, of which 16 are computed; the other 20 change nothing" in later
    assert "GFLOP/s" not in later


def test_half_the_bytes_in_half_the_precision(folder):
    full, half = (sizes_of(str(folder), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.bfloat16))
    assert half == replace(full, dtype=torch.bfloat16)
    each = [forecast(one, "z", "layer head", prompts=2, length=LENGTH) for one in (full, half)]
    assert each[0].weight_bytes == 2 * each[1].weight_bytes
    assert sum(each[0].recorded.values()) == 2 * sum(each[1].recorded.values())


@pytest.mark.parametrize(
    ("sweep", "given", "match"),
    [
        ("z", {}, r"sweep: expected SITE over AXES, such as 'z over layer head', got 'z'"),
        ("zz over layer", {}, "site: expected one of"),
        ("embed over pos", {}, "site: expected one in the language model's blocks"),
        ("vision.z over layer head", {}, "site: expected one in the language model's blocks"),
        ("z over layer place", {}, "over: expected dims among"),
        ("resid_pre over layer head", {}, "no 'head'"),
        ("z over layer position", {}, "over: expected 'layer' among the dims, and 'pos'"),
        ("z over head", {}, "over: expected 'layer' among the dims"),
        ("z over layer", {"first_difference": 7}, r"first_difference: expected a position .* \(0 to 6\), got 7"),
        ("z over layer", {"budget": "much"}, "budget: expected bytes, such as 1073741824 or '1 GiB', got 'much'"),
        ("z over layer", {"budget": 0}, "budget: expected a positive number of bytes"),
    ],
)
def test_what_cannot_be_foreseen_is_refused(folder, sweep, given, match):
    with pytest.raises(ValueError, match=match):
        answer(str(folder), sweep, **{"prompts": 2, "length": 7, "device": "cpu", **given})


def test_lengths_beyond_learned_positions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="length: expected at most 64 tokens, the model's context, got 65"):
        forecast(sizes(tmp_path, "gpt2"), "z", "layer head", prompts=1, length=65)
    assert forecast(sizes(tmp_path, "llama"), "z", "layer head", prompts=1, length=65).length == 65  # rotary


SMALL_SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("mamba", {}, "some of its layers are no attention over keys and values"),
        ("bert", {"num_attention_heads": 4, "architectures": ["BertForMaskedLM"]}, "it is no causal language model"),
        ("deepseek_v3", {"num_attention_heads": 4, "n_routed_experts": 8, "n_group": 2}, "made of a shared latent"),
    ],
)
def test_models_that_are_not_replayed_are_refused(tmp_path, kind, more, why):
    from transformers import AutoConfig

    AutoConfig.for_model(kind, **SMALL_SIZES, **more).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model: expected one whose blocks can be replayed .*{why}"):
        sizes_of(str(tmp_path), device="cpu")


def test_experts_are_named(tmp_path):
    text = "\n".join(forecast(sizes(tmp_path, "mixtral"), "z", "layer head", prompts=1, length=LENGTH).lines())
    assert "million parameters, all experts, and attention" in text
