"""`Result`: the identities that its arithmetic must keep, known answers of its statistics, and the file format."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from safetensors.torch import save_file
from torch import Tensor

from mechkit.result import Cost, Result
from mechkit.result._columns import Columns, columns_of

NAN = float("nan")


def make(
    values: Tensor, clean: Tensor, corrupted: Tensor, *, dims: str = "layer head prompt", **changes: Any
) -> Result:
    names = tuple(dims.split())
    coords = {dim: tuple(range(size)) for dim, size in zip(names, values.shape, strict=True)}
    fields = {
        "values": values,
        "dims": names,
        "coords": coords,
        "baseline": {"clean": clean, "corrupted": corrupted},
        "base": "corrupted",
        "metric": "logit_diff",
        "unit": "logits",
        "provenance": {"model": "tiny", "arguments": {"site": "z", "over": ["layer", "head"]}, "n": 3},
    }
    return Result(**(fields | changes))


def random_result(seed: int, *, ragged: bool = False, shape: tuple[int, ...] = (3, 2, 5), **changes: Any) -> Result:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    values = draw(*shape)
    if ragged:
        values[torch.rand(*shape, generator=generator) < 0.4] = NAN
    return make(values, draw(shape[-1]) + 9, draw(shape[-1]) - 9, **changes)


def assert_same(left: Result, right: Result) -> None:
    """Equal to the last bit, NaN included."""
    assert left.values.dtype == right.values.dtype
    assert left.values.numpy().tobytes() == right.values.numpy().tobytes()
    assert left.baseline.keys() == right.baseline.keys()
    for name in left.baseline:
        assert left.baseline[name].shape == right.baseline[name].shape
        assert left.baseline[name].numpy().tobytes() == right.baseline[name].numpy().tobytes()
    for name in ("dims", "coords", "base", "metric", "unit", "provenance", "cost"):
        assert getattr(left, name) == getattr(right, name)
    types = [[type(label) for label in left.coords[dim]] for dim in left.dims]
    assert types == [[type(label) for label in right.coords[dim]] for dim in right.dims]


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, equal_nan=True, check_dtype=False)


# Making one


def test_is_frozen_and_detached() -> None:
    values = torch.zeros(3, 2, 5, dtype=torch.bfloat16, requires_grad=True)
    result = make(values, torch.ones(5), torch.zeros(5))
    assert result.values.dtype == torch.float32
    assert not result.values.requires_grad
    with pytest.raises(FrozenInstanceError):
        result.unit = "x"  # type: ignore[misc]
    with pytest.raises(TypeError):
        result.baseline["clean"] = torch.zeros(5)  # type: ignore[index]


def test_lists_and_numpy_labels_become_tuples_of_int() -> None:
    coords = {"layer": [np.int64(0), 1], "prompt": range(3)}
    changes = {"dims": ["layer", "prompt"], "coords": coords, "provenance": {"a": (1, 2)}}
    try:
        result = replace(make(torch.zeros(2, 3), torch.ones(3), torch.zeros(3), dims="layer prompt"), **changes)
    except TypeCheckError:
        pytest.skip("with runtime type checks, only tuples of int and str get here")
    assert result.dims == ("layer", "prompt")
    assert result.coords == {"layer": (0, 1), "prompt": (0, 1, 2)}
    assert type(result.coords["layer"][0]) is int
    assert result.provenance == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": ("layer", "head")}, "one per axis"),
        ({"dims": ("layer", "layer", "prompt")}, "distinct names"),
        ({"dims": ("layer", "value", "prompt")}, "none of them 'value'"),
        ({"coords": {"layer": (0, 1, 2), "head": (0, 1)}}, "exactly the dims"),
        (
            {"coords": {"layer": (0, 1), "head": (0, 1), "prompt": tuple(range(5))}},
            r"coords\['layer'\]: expected 3 labels.*got 2",
        ),
        ({"coords": {"layer": (0, 1, 1), "head": (0, 1), "prompt": tuple(range(5))}}, r"repeated ones: \['1'\]"),
        ({"coords": {"layer": (0, 1, 2.5), "head": (0, 1), "prompt": tuple(range(5))}}, "a whole number or a string"),
        ({"base": "noised"}, r"base: expected one of \('clean', 'corrupted'\), got 'noised'"),
        (
            {"baseline": {"corrupted": torch.zeros(4)}},
            r"baseline: expected shape \(\) or \(3, 2, 5\) or \[5\], got \(4,\)",
        ),
        ({"baseline": {"corrupted": torch.tensor([0, 0, NAN, 0, 0])}}, "got NaN"),
        ({"baseline": {"corrupted": torch.zeros(5, dtype=torch.long)}}, "corrupted: expected a floating-point"),
        ({"provenance": {"model": object()}}, r"provenance\['model'\]: expected a JSON value"),
    ],
)
def test_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(random_result(0), **changes)


def test_refuses_values_that_are_no_floating_point_tensor() -> None:
    for values in (np.zeros((3, 2, 5)), torch.zeros(3, 2, 5, dtype=torch.long)):
        with pytest.raises((ValueError, TypeCheckError), match="values"):
            replace(random_result(0), values=values)


def test_baseline_may_be_nan_only_where_the_prompt_has_no_cell() -> None:
    values = torch.tensor([[1.0, NAN], [2.0, NAN]])
    baseline = torch.tensor([1.0, NAN])
    result = make(values, baseline, baseline - 1, dims="layer prompt")
    close(result.mean().baseline["clean"], torch.tensor([1.0, 1.0]))
    with pytest.raises(ValueError, match="got NaN"):
        make(torch.ones(2, 2), baseline, baseline - 1, dims="layer prompt")


def test_can_be_copied_and_sent_to_another_process() -> None:
    result = random_result(0, ragged=True, cost=Cost(10, 200))
    assert_same(copy.deepcopy(result), result)
    assert_same(pickle.loads(pickle.dumps(result)), result)


def test_repr_is_short_and_says_what_it_is() -> None:
    text = repr(random_result(0, cost=Cost(1_000, 20_000)))
    for part in ("logit_diff [logits]", "layer 3 x head 2 x prompt 5", "(base)", "20.0x fewer", "1,000 of 20,000"):
        assert part in text
    assert len(text) < 200
    assert Cost(0, 5).speedup == float("inf")
    for cost, said in (
        (Cost(100, 60, 70), "100 of 60 block-tokens (1.7x more, checks included)"),
        (Cost(100, 60), "100 of 60 block-tokens (1.7x more)"),
        (Cost(100, 98, 9), "100 of 98 block-tokens (as many)"),
        (Cost(98, 100), "98 of 100 block-tokens (as many)"),
        (Cost(5, 0), "5 of 0 block-tokens (more)"),
        (Cost(60, 100, 50), "60 of 100 block-tokens (1.7x fewer)"),
    ):
        assert str(cost) == said


def test_a_result_of_one_value_is_a_number() -> None:
    result = random_result(3)
    one = result.mean("prompt").sel(layer=1, head=0)
    expected = result.values[1, 0].mean().item()
    assert float(one) == one.item() == pytest.approx(expected)
    assert f"logit_diff {expected:.4g} [logits]" in repr(one)
    assert f"{expected:.4g}" not in repr(result)  # the control: of many values none is shown
    assert result.sel(layer=[1], head=[0], prompt=[2]).item() == result.values[1, 0, 2].item()
    for several in (result, result.sel(layer=[]), result.mean("prompt")):
        with pytest.raises(
            ValueError, match=r"item: expected a result with one value, got \d+ \(layer \d x head 2.*sel\(\)"
        ):
            several.item()
        with pytest.raises(ValueError, match="item: expected a result with one value"):
            float(several)


@pytest.mark.parametrize("order", ["layer head prompt", "prompt layer head", "head prompt layer", "prompt head layer"])
def test_numpy_gives_any_order_of_dims_by_name(order: str) -> None:
    result = random_result(5, ragged=True)
    array = result.numpy(order)
    assert array.dtype == np.float64
    sizes = dict(zip(result.dims, result.shape, strict=True))
    assert array.shape == tuple(sizes[dim] for dim in order.split())
    for index in np.ndindex(*result.shape):
        at = dict(zip(result.dims, index, strict=True))
        np.testing.assert_equal(array[tuple(at[dim] for dim in order.split())], result.values[index].item())
    np.testing.assert_array_equal(array, result.numpy(order.split()))
    array[:] = 0
    assert bool((result.values != 0).any())  # a copy


def test_numpy_without_dims_is_as_the_result_is() -> None:
    result = random_result(6)
    np.testing.assert_array_equal(result.numpy(), result.values.numpy())
    one = result.mean("prompt").sel(layer=0, head=0)
    assert one.numpy().shape == one.numpy("").shape == ()


@pytest.mark.parametrize("wrong", ["layer head", "layer head pos", "layer head prompt prompt", "layer,head,prompt", ""])
def test_numpy_names_the_dims(wrong: str) -> None:
    with pytest.raises(
        ValueError, match=r"dims: expected each of 'layer head prompt' once, in any order; got "
    ) as info:
        random_result(7).numpy(wrong)
    assert ("mean()" in str(info.value)) == (wrong in ("layer head", ""))


# Averages and baselines


def test_mean_over_prompts_averages_values_and_baselines() -> None:
    result = random_result(1)
    mean = result.mean("prompt")
    assert mean.dims == ("layer", "head")
    assert "prompt" not in mean.coords
    close(mean.values, result.values.mean(-1))
    close(mean.baseline["clean"], result.baseline["clean"].mean())
    assert mean.baseline["clean"].shape == ()
    assert mean.provenance["n_prompts"] == 5
    with pytest.raises(ValueError, match=r"expected one of the dims \('layer', 'head'\), got 'prompt'"):
        mean.mean("prompt")


def test_ragged_cells_are_compared_with_their_own_prompts() -> None:
    """Prompt 1 lacks position 1. Its baselines, far from prompt 0's, must not touch that cell."""
    values = torch.tensor([[[1.0, 101.0], [2.0, NAN], [NAN, NAN]]])
    clean, corrupted = torch.tensor([4.0, 104.0]), torch.tensor([0.0, 100.0])
    mean = make(values, clean, corrupted, dims="layer pos prompt").mean("prompt")
    close(mean.values, torch.tensor([[51.0, 2.0, NAN]]))
    close(mean.baseline["corrupted"], torch.tensor([[50.0, 0.0, NAN]]))
    close(mean.effect().values, torch.tensor([[1.0, 2.0, NAN]]))
    close(mean.normalized().values, torch.tensor([[0.25, 0.5, NAN]]))
    assert [cell.coords["pos"] for cell in mean.top(5)] == [1, 0]

    full = make(values.nan_to_num(0.0), clean, corrupted, dims="layer pos prompt").mean("prompt")
    assert full.baseline["clean"].shape == ()  # the control: nothing is missing, so one baseline serves all cells
    absent_everywhere = values.clone()
    absent_everywhere[0, 1] = NAN
    assert make(absent_everywhere, clean, corrupted, dims="layer pos prompt").mean().baseline["clean"].shape == ()


@given(seed=st.integers(0, 10**6), ragged=st.booleans(), dim=st.sampled_from(["layer", "head", "prompt"]))
@settings(deadline=None, max_examples=60)
def test_effect_commutes_with_every_mean(seed: int, ragged: bool, dim: str) -> None:
    result = random_result(seed, ragged=ragged)
    late, early = result.mean(dim).effect(), result.effect().mean(dim)
    close(late.values, early.values)
    mask = ~late.values.isnan()
    for name in result.baseline:
        cells = [r._cells(name).expand(r.shape)[mask] for r in (late, early)]
        close(*cells)
    assert (late._cells("corrupted").nan_to_num() == 0).all()


@given(seed=st.integers(0, 10**6), order=st.permutations(["layer", "head", "prompt"]))
@settings(deadline=None, max_examples=30)
def test_effect_survives_any_order_of_means(seed: int, order: list[str]) -> None:
    late = early = random_result(seed, ragged=True)
    early = early.effect()
    for dim in order:
        late, early = late.mean(dim), early.mean(dim)
    assert late.shape == ()
    close(late.effect().values, early.values)


@given(seed=st.integers(0, 10**6), ragged=st.booleans())
@settings(deadline=None, max_examples=40)
def test_normalized_mean_is_the_ratio_of_means_over_the_prompts_of_the_cell(seed: int, ragged: bool) -> None:
    result = random_result(seed, ragged=ragged)
    normalized = result.mean("prompt").normalized()
    assert normalized.unit == "normalized"
    clean, corrupted = result.baseline["clean"], result.baseline["corrupted"]
    for layer in range(3):
        for head in range(2):
            cell = result.values[layer, head]
            here = ~cell.isnan()
            gap = clean[here].mean() - corrupted[here].mean()
            close(normalized.values[layer, head], (cell[here].mean() - corrupted[here].mean()) / gap)
    present = ~normalized.values.isnan()
    assert (normalized._cells("clean").expand(3, 2)[present] == 1).all()
    assert (normalized._cells("corrupted").expand(3, 2)[present] == 0).all()


def test_normalized_is_0_for_the_corrupted_run_and_1_for_the_clean_run() -> None:
    clean, corrupted = torch.tensor([4.0, 3.0]), torch.tensor([-1.0, -2.0])
    result = make(torch.stack([clean, corrupted]), clean, corrupted, dims="layer prompt")
    for normalized in (result.normalized(), result.mean().normalized().sel()):
        assert normalized.sel(layer=0).values.unique().item() == 1
        assert normalized.sel(layer=1).values.unique().item() == 0
        assert normalized.baseline["clean"].unique().item() == 1
        assert normalized.baseline["corrupted"].unique().item() == 0
    noising = replace(result, base="clean").mean().normalized()
    assert noising.base == "clean"
    assert noising.effect().sel(layer=0).values == 0  # the cell that does nothing to the clean run


def test_normalized_refuses_a_gap_of_nothing_and_names_the_prompts() -> None:
    clean = torch.tensor([4.0, 3.0, -2.0])
    corrupted = torch.tensor([-1.0, 3.0, -2.0000002])
    result = make(torch.zeros(1, 3), clean, corrupted, dims="layer prompt", coords={"layer": (0,), "prompt": (7, 8, 9)})
    with pytest.raises(ValueError, match="equal ones at prompt 8, prompt 9;"):
        result.normalized()
    assert result.sel(prompt=[7]).normalized().values.item() == pytest.approx(0.2)
    assert result.mean().normalized().values.isfinite().all()  # the mean gap is not 0
    with pytest.raises(ValueError, match="equal ones;"):
        result.sel(prompt=8).normalized()
    with pytest.raises(ValueError, match=r"expected a baseline 'clean', got baselines \('corrupted',\)"):
        replace(result, baseline={"corrupted": corrupted}).normalized()


def test_without_baselines_there_is_no_effect() -> None:
    scores = make(torch.eye(2), torch.tensor(0.0), torch.tensor(0.0), dims="layer head", baseline={}, base="")
    with pytest.raises(ValueError, match="expected a baseline"):
        scores.effect()
    assert scores.top(1)[0].effect == 1.0  # ranked by distance from 0


def test_infinite_values_are_refused_rather_than_turned_into_missing_cells() -> None:
    result = make(
        torch.tensor([[torch.inf, -torch.inf], [1.0, 2.0]]), torch.ones(2), torch.zeros(2), dims="layer prompt"
    )
    for method in (result.mean, result.effect, result.normalized, result.ci, result.p_values, result.top):
        with pytest.raises(ValueError, match="values: expected finite numbers, got 2 infinite ones"):
            method()
    assert result.sel(layer=1).mean().values == 1.5


# Choosing cells


def test_top_ranks_by_effect_value_and_never_shows_missing_cells() -> None:
    values = torch.tensor([[5.0, NAN], [-3.0, 1.5], [2.0, 1.0]])
    result = make(values, torch.tensor(3.0), torch.tensor(1.0), dims="layer head")
    assert [cell.label for cell in result.top()] == ["L0H0", "L1H0", "L2H0", "L1H1", "L2H1"]
    assert [cell.label for cell in result.top(2, by="max")] == ["L0H0", "L2H0"]
    assert [cell.label for cell in result.top(1, by="min")] == ["L1H0"]
    best = result.top(1)[0]
    assert (best.value, best.effect, dict(best.coords)) == (5.0, 4.0, {"layer": 0, "head": 0})
    assert repr(best) == "TopCell(L0H0: value 5, effect +4)"
    assert hash(best) == hash(result.top(1)[0])
    with pytest.raises(ValueError, match="k >= 1"):
        result.top(0)
    with pytest.raises((ValueError, TypeCheckError), match="by"):
        result.top(by="mean")  # type: ignore[arg-type]


def test_top_averages_over_prompts_first() -> None:
    values = torch.tensor([[10.0, -10.0], [1.0, 1.0]])
    assert make(values, torch.ones(2), torch.zeros(2), dims="layer prompt").top(1)[0].label == "L1"


@pytest.mark.parametrize(
    ("coords", "label"),
    [
        ({"layer": (9,)}, "L9"),
        ({"layer": (9,), "head": (6,)}, "L9H6"),
        ({"head": (6,), "layer": (9,)}, "L9H6"),
        ({"layer": (9,), "pos": ('" Mary" 3',)}, 'L9 " Mary" 3'),
        ({"layer": (9,), "pos": ('" Mary" 3',), "head": (6,)}, 'L9H6 " Mary" 3'),
        ({"layer": (9,), "head": (6,), "position": ("IO",)}, "L9H6 IO"),
        ({"layer": (4,), "neuron": (133,)}, "L4N133"),
        ({"layer": (9,), "pos": (3,)}, "L9 pos 3"),
        ({"component": ("mlp 3",)}, "mlp 3"),
        ({"sender": ("a9.h6",)}, "L9H6"),
        ({"sender": ("m3",)}, "m3"),
        ({"sender": ("input",), "position": ("IO",)}, "input IO"),
    ],
)
def test_labels_of_cells(coords: dict[str, tuple[int | str, ...]], label: str) -> None:
    values = torch.ones([1] * len(coords))
    result = make(values, torch.tensor(1.0), torch.tensor(0.0), dims=" ".join(coords), coords=coords)
    assert result.top()[0].label == label


def test_sel_is_by_label_and_takes_the_baselines_along() -> None:
    names = ('" Mary" 1', '" and" 2', '" Mary" 3')
    values = torch.arange(24.0).reshape(2, 3, 4)
    coords = {"layer": (10, 20), "pos": names, "prompt": (0, 1, 2, 3)}
    result = make(values, torch.arange(4.0) + 5, torch.arange(4.0), dims="layer pos prompt", coords=coords)
    assert torch.equal(result.sel(layer=20, pos=names[2]).values, values[1, 2])
    assert result.sel(layer=20).dims == ("pos", "prompt")
    kept = result.sel(pos=[names[2], names[0]], layer=(10,))
    assert kept.coords["pos"] == (names[2], names[0])
    assert torch.equal(kept.values, values[:1, [2, 0]])
    assert result.sel(pos=slice(names[1], names[2])).coords["pos"] == names[1:]
    assert result.sel(pos=slice(None)).shape == result.shape
    assert result.sel(prompt=[1, 3]).baseline["clean"].tolist() == [6, 8]
    assert result.sel(prompt=[1, 3]).provenance["n_prompts"] == 2
    assert result.sel(prompt=2).baseline["clean"].item() == 7
    assert torch.equal(result.sel(prompt=2).effect().values, values[..., 2] - 2)
    assert torch.equal(result.sel().values, values)
    assert result.sel(pos=[]).shape == (2, 0, 4)


def test_sel_follows_baselines_of_single_cells() -> None:
    result = random_result(3, ragged=True).mean("prompt")
    assert result.baseline["clean"].shape == (3, 2)
    close(result.sel(layer=1).baseline["clean"], result.baseline["clean"][1])
    close(result.sel(layer=1, head=0).effect().values, result.effect().values[1, 0])


def test_sel_names_what_exists() -> None:
    result = random_result(0)
    for wanted in (7, "0", -1, [0, 7], slice(0, 7), slice(0, 2, 2)):
        with pytest.raises(ValueError, match=r"expected labels of 'layer', which are \[0, 1, 2\]"):
            result.sel(layer=wanted)
    with pytest.raises(ValueError, match=r"expected one of the dims \('layer', 'head', 'prompt'\), got 'neuron'"):
        result.sel(neuron=0)


# Statistics


@pytest.mark.parametrize("mask", [[False, True], np.array([False, True]), torch.tensor([False, True])], ids=str)
def test_a_mask_chooses_where_it_is_true(mask: Any) -> None:
    """And is no list of the labels 0 and 1, which False and True are equal to."""
    result = Result(torch.tensor([10.0, 20.0]), ("layer",), {"layer": (0, 1)}, {}, "", "m", "u", {})
    chosen = result.sel(layer=mask)
    assert (chosen.values.tolist(), chosen.coords["layer"]) == ([20.0], (1,))
    with pytest.raises(ValueError, match="sel: expected a mask of 2 booleans for 'layer', got 3"):
        result.sel(layer=[True, False, True])
    for label in (True, np.bool_(True), [True, 1]):
        with pytest.raises(ValueError, match="sel: expected labels of 'layer'"):
            result.sel(layer=label)  # type: ignore[arg-type]


def test_labels_of_other_libraries_are_labels() -> None:
    result = Result(torch.tensor([10.0, 20.0]), ("layer",), {"layer": (0, 1)}, {}, "", "m", "u", {})
    for wanted in ([1], np.array([1]), torch.tensor([1]), [torch.tensor(1)], [np.int64(1)], {1: "a"}.keys()):
        assert result.sel(layer=wanted).values.tolist() == [20.0]  # type: ignore[arg-type]


def test_a_dim_that_is_not_there_is_reported_with_its_argument() -> None:
    result = Result(torch.zeros(2), ("layer",), {"layer": (0, 1)}, {}, "", "m", "u", {})
    with pytest.raises(ValueError, match=r"dim: expected one of the dims \('layer',\), got 'nope'"):
        result.mean("nope")
    with pytest.raises(ValueError, match=r"sel: expected one of the dims \('layer',\), got 'nope'"):
        result.sel(nope=0)


def test_resamples_fit_into_memory() -> None:
    coords = {"prompt": tuple(range(40))}
    result = Result(torch.arange(40.0), ("prompt",), coords, {}, "", "m", "u", {})
    for ask in (result.ci, result.p_values):
        with pytest.raises(
            ValueError, match="n_resamples: expected at most 13,421,772 for 40 prompts, got 1,000,000,000,000"
        ):
            ask(n_resamples=10**12)
    few = result.sel(prompt=[1, 2, 3])
    assert float(few.p_values(n_resamples=10**12).values) == 0.25  # exact, of 8 sign flips


def test_ci_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20, 40, 40, generator=generator) * 2 + 1  # 800 cells with true mean 1
    result = make(values, torch.ones(40), torch.zeros(40))
    for level in (0.95, 0.5):
        for method in ("percentile", "basic"):
            interval = result.ci(level, method=method)  # type: ignore[arg-type]
            covered = (interval.low.values < 1) & (interval.high.values > 1)
            assert abs(covered.double().mean().item() - level) < 0.05
            assert interval.level == level


def test_ci_agrees_with_scipy() -> None:
    result = random_result(5, shape=(2, 1, 30))
    interval = result.ci(n_resamples=20_000)
    assert interval.low.dims == ("layer", "head")
    for layer in range(2):
        sample = (result.values[layer, 0].numpy(),)
        expected = scipy.stats.bootstrap(
            sample, np.mean, n_resamples=20_000, method="percentile", rng=1, vectorized=True
        ).confidence_interval
        assert interval.low.values[layer, 0].item() == pytest.approx(expected.low, abs=0.02)
        assert interval.high.values[layer, 0].item() == pytest.approx(expected.high, abs=0.02)


def test_ci_is_seeded_paired_and_needs_two_prompts() -> None:
    result = random_result(6, shape=(3, 2, 20))
    assert torch.equal(result.ci().low.values, result.ci().low.values)
    assert not torch.equal(result.ci().low.values, result.ci(seed=1).low.values)
    twice = replace(result, values=result.values[[0, 0, 0]])  # equal cells see the same resamples
    assert torch.equal(twice.ci().low.values[0], twice.ci().low.values[2])
    with pytest.raises(ValueError, match="at least 2 prompts"):
        result.sel(prompt=[0]).ci()
    with pytest.raises(ValueError, match="at least 2 prompts"):
        result.mean().ci()
    with pytest.raises(ValueError, match="0 < level < 1"):
        result.ci(95.0)
    with pytest.raises(ValueError, match="expected a baseline"):
        result.ci().low.effect()  # would subtract an unpaired baseline


def test_ci_of_a_paired_effect_is_narrower_than_that_of_the_value() -> None:
    base = torch.linspace(-10, 10, 20)
    result = make((base + 1 + 0.01 * torch.sin(base)).reshape(1, -1), base + 5, base, dims="layer prompt")
    effect, value = result.effect().ci(), result.ci()
    assert (effect.high.values - effect.low.values).item() < 0.02
    assert (value.high.values - value.low.values).item() > 2


def test_ci_normalized_is_the_interval_of_the_ratio_of_means() -> None:
    result = random_result(7, shape=(2, 3, 12))
    interval = result.ci(normalized=True, n_resamples=500)
    draws = np.random.default_rng(0).multinomial(12, [1 / 12] * 12, size=500)
    ratios = []
    for counts in draws:
        chosen = [prompt for prompt, count in enumerate(counts) for _ in range(count)]
        v, c, d = (
            t[..., chosen].mean(-1) for t in (result.values, result.baseline["clean"], result.baseline["corrupted"])
        )
        ratios.append((v - d) / (c - d))
    close(interval.low.values, torch.stack(ratios).quantile(0.025, 0))
    close(interval.high.values, torch.stack(ratios).quantile(0.975, 0))
    point = result.mean().normalized().values
    assert ((interval.low.values < point) & (point < interval.high.values)).all()
    assert interval.low.unit == "normalized"


def test_ci_normalized_refuses_a_gap_that_changes_its_sign() -> None:
    clean = torch.tensor([5.0, -4.0, 6.0, -5.0])
    result = make(torch.ones(1, 4), clean, torch.zeros(4), dims="layer prompt")
    with pytest.raises(ValueError, match="keep its sign"):
        result.ci(normalized=True)
    assert replace(result, baseline={**result.baseline, "clean": clean.abs()}).ci(normalized=True)


def test_ci_of_ragged_cells_uses_the_prompts_that_have_them() -> None:
    values = torch.full((4, 10), NAN)
    values[0, :6] = torch.arange(6.0)
    values[1, 0] = 3.0  # one prompt: there is no interval
    values[2, :2] = torch.tensor([1.0, 2.0])  # one resample in nine has neither prompt
    interval = make(values, torch.ones(10), torch.zeros(10), dims="layer prompt").ci()
    assert interval.low.values[0] < 2.5 < interval.high.values[0]
    assert interval.low.values[0] >= 0
    assert interval.high.values[0] <= 5
    assert interval.low.values[[1, 3]].isnan().all()
    assert (interval.low.values[2].item(), interval.high.values[2].item()) == (1.0, 2.0)


def test_p_values_separate_an_effect_from_none() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(29, 9, 32, generator=generator)
    constant = torch.full((1, 9, 32), 0.7)
    base = torch.randn(32, generator=generator)
    result = make(torch.cat([constant, noise]) + base, base + 1, base)
    p = result.p_values().values
    assert (p[0] < 0.01).all()
    assert (p[1:] > 0.05).float().mean() > 0.98
    raw = result.p_values(fdr=False).values
    assert 0.02 < (raw[1:] < 0.05).float().mean() < 0.09  # of null cells, one in twenty
    assert torch.equal(raw, result.p_values(fdr=False).values)
    unchanged = make(base.expand(3, 32), base + 1, base, dims="layer prompt")
    assert (unchanged.p_values().values == 1).all()


@pytest.mark.parametrize("n_prompts", [2, 5, 9])
def test_exact_p_values_equal_scipys(n_prompts: int) -> None:
    result = random_result(n_prompts, shape=(4, 3, n_prompts))
    result = replace(result, baseline={"corrupted": result.baseline["corrupted"] + 9})  # small effects of either sign
    effects = result.effect().values.numpy()
    expected = scipy.stats.permutation_test(
        (effects,), np.mean, permutation_type="samples", n_resamples=np.inf, axis=-1, vectorized=True
    ).pvalue
    np.testing.assert_allclose(result.p_values(fdr=False).values.numpy(), expected)
    assert np.unique(expected).size > 1
    adjusted = scipy.stats.false_discovery_control(expected, axis=None).reshape(4, 3)
    np.testing.assert_allclose(result.p_values().values.numpy(), adjusted)


def test_random_p_values_approach_the_exact_ones() -> None:
    result = random_result(1, shape=(4, 3, 16))
    result = replace(result, baseline={"corrupted": result.baseline["corrupted"] + 9})
    exact = result.p_values(n_resamples=2**16, fdr=False).values
    random = result.p_values(fdr=False).values
    assert 0 < (random - exact).abs().max() < 0.02


def test_p_values_of_ragged_cells() -> None:
    result = random_result(8, ragged=True, shape=(4, 3, 9))
    values = result.values.clone()
    values[0, 0] = NAN
    result = replace(result, values=values)
    p = result.p_values(fdr=False)
    assert p.values[0, 0].isnan()
    assert (p.unit, p.dims, dict(p.baseline)) == ("p", ("layer", "head"), {})
    assert result.p_values().values.isnan().sum() == p.values.isnan().sum()
    effects = result.effect().values[1, 1]
    present = effects[~effects.isnan()].numpy()
    expected = scipy.stats.permutation_test((present,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert p.values[1, 1].item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least 2 prompts"):
        result.mean().p_values()
    with pytest.raises(ValueError, match="n_resamples >= 1"):
        result.p_values(0)


def test_chunks_do_not_change_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    result = random_result(9, shape=(5, 4, 20), ragged=True)
    before = result.p_values(n_resamples=99).values, result.ci().high.values
    monkeypatch.setattr("mechkit._statistics._CHUNK", 1)
    after = result.p_values(n_resamples=99).values, result.ci().high.values
    close(before[0], after[0])
    close(before[1], after[1])


# To disk and to other libraries

LABELS = st.lists(st.integers(-9, 99) | st.text(max_size=4), min_size=1, max_size=4, unique=True).map(tuple)


@given(
    labels=st.dictionaries(st.sampled_from(["layer", "pos", "head", "prompt"]), LABELS, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    provenance=st.dictionaries(st.text(max_size=3), st.none() | st.booleans() | st.floats(allow_nan=False) | st.text()),
    cost=st.none() | st.builds(Cost, st.integers(0, 2**60), st.integers(0, 2**60)),
    seed=st.integers(0, 99),
    averaged=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_save_and_load_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    labels: Any,
    dtype: Any,
    provenance: Any,
    cost: Any,
    seed: int,
    averaged: bool,
) -> None:
    dims = tuple(labels)
    values = torch.randn([len(labels[dim]) for dim in dims], generator=torch.Generator().manual_seed(seed), dtype=dtype)
    values = torch.where(values > 1, torch.tensor(NAN, dtype=dtype), values)
    baseline = torch.arange(len(labels["prompt"]), dtype=dtype) if "prompt" in dims else torch.tensor(0.1, dtype=dtype)
    result = Result(values, dims, labels, {"clean": baseline}, "clean", "m", "u", provenance, cost)
    if averaged and "prompt" in dims:
        result = result.mean("prompt")
    path = tmp_path_factory.mktemp("result") / "r.safetensors"
    assert result.save(path) == path
    assert_same(Result.load(path), result)
    assert list(path.parent.iterdir()) == [path]  # no partial file is left


def test_saving_over_a_file_that_is_open_leaves_what_was_read(tmp_path: Any) -> None:
    path = tmp_path / "r.safetensors"
    first, second = random_result(0), random_result(1)
    first.save(path)
    loaded = Result.load(str(path))
    second.save(path)
    assert_same(loaded, first)
    assert_same(Result.load(path), second)


def test_load_refuses_what_is_not_a_result(tmp_path: Any) -> None:
    path = tmp_path / "x.safetensors"
    header = {"schema_version": 99}
    for metadata in (None, {"format": "pt"}, {"mechkit_result": "{"}, {"mechkit_result": json.dumps(header)}):
        save_file({"values": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(ValueError, match="expected"):
            Result.load(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=r"expected a file written by Result\.save"):
        Result.load(path)
    with pytest.raises(FileNotFoundError):
        Result.load(tmp_path / "missing")


def test_dataframe_is_tidy() -> None:
    names = ('" Mary" 1', '" Mary" 3')
    result = make(
        torch.tensor([[1.0, 2.0], [3.0, NAN]]),
        torch.ones(2),
        torch.zeros(2),
        dims="pos prompt",
        coords={"pos": names, "prompt": (4, 5)},
    )
    frame = result.to_dataframe()
    assert list(frame.columns) == ["pos", "prompt", "value"]
    assert frame["pos"].tolist() == [names[0], names[0], names[1], names[1]]
    assert frame["prompt"].tolist() == [4, 5, 4, 5]
    assert frame["value"].tolist()[:3] == [1, 2, 3]
    assert len(frame) == 4
    frame["value"] = 0.0
    assert result.values[0, 0] == 1  # a copy
    assert result.mean("pos").mean().to_dataframe().shape == (1, 1)
    mixed = replace(result, coords={"pos": (1, "1"), "prompt": (4, 5)})
    assert mixed.to_dataframe()["pos"].tolist() == [1, 1, "1", "1"]


def test_columns_spread_baselines_and_leave_out_what_is_absent() -> None:
    values = torch.tensor([[1.0, NAN, 3.0], [4.0, 5.0, NAN]])
    result = make(values, torch.tensor([7.0, 8.0, 9.0]), torch.tensor(0.5), dims="layer prompt")
    cells = columns_of(result)
    assert list(cells.table()) == ["layer", "prompt", "value", "baseline clean", "baseline corrupted"]
    assert cells.table()["baseline clean"].tolist() == [7, 8, 9, 7, 8, 9]
    there = cells.present().table()
    assert {name: column.tolist() for name, column in there.items()} == {
        "layer": [0, 0, 1, 1],
        "prompt": [0, 2, 0, 1],
        "value": [1, 3, 4, 5],
        "baseline clean": [7, 9, 7, 8],
        "baseline corrupted": [0.5] * 4,
    }
    assert cells.present().names() == ["L0 prompt 0", "L0 prompt 2", "L1 prompt 0", "L1 prompt 1"]
    cells.table()["value"][:] = 0.0
    assert result.values[0, 0] == 1  # a copy
    means = Columns(("layer",), {"layer": (0, 1)}, np.zeros(2), {"clean": (("prompt",), np.array([1.0, 2.0]))})
    assert means.baseline("clean").tolist() == [1.5, 1.5]
    scalar = result.mean("layer").mean()
    assert {name: column.tolist() for name, column in columns_of(scalar).table().items()}.keys() >= {"value"}
    assert len(columns_of(scalar)) == 1


@pytest.mark.parametrize("averaged", [False, True])
def test_xarray_keeps_labels_baselines_and_provenance(averaged: bool) -> None:
    result = random_result(2, ragged=True, provenance={"model": "m", "seed": 3, "arguments": {"a": [1]}, "x": None})
    result = result.mean() if averaged else result
    array = result.to_xarray()
    assert (array.name, array.dims, array.shape) == ("logit_diff", result.dims, result.shape)
    np.testing.assert_array_equal(array.sel(layer=2, head=1).values, result.sel(layer=2, head=1).values)
    np.testing.assert_array_equal((array - array["baseline_corrupted"]).values, result.effect().values)
    assert (array.attrs["model"], array.attrs["unit"], array.attrs["base"]) == ("m", "logits", "corrupted")
    assert array.attrs["arguments"] == '{"a": [1]}'
    assert array.attrs["x"] == "null"
