"""Vision towers: every site at every position and head, against untouched models; what lies behind the tower is replayed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import mechkit as mk
from helpers import towers, vlm
from mechkit.engine import Edit, sweep
from mechkit.engine._edits import EditPlan

FAMILIES = list(vlm.FAMILIES)
WEIGHTS = torch.randn(61, dtype=torch.float64, generator=torch.Generator().manual_seed(9))  # those of `vlm.mixture`
HEADS = ("q", "k", "v", "z")


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    with vlm.in_double():
        yield


def runs_of(pairs: mk.PromptPairs, direction: str) -> tuple[mk.Prompts, mk.Prompts]:
    return (pairs.corrupted, pairs.clean) if direction == "denoise" else (pairs.clean, pairs.corrupted)


def close(found: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(found, right.to(found.dtype), atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_place_of_every_site_equals_whole_passes_of_the_untouched_model(family: str, direction: Any) -> None:
    hf, model = vlm.pair_of_models(family)
    pairs = vlm.make_pairs(family, model, (False, direction == "noise"))  # of other sizes, where the family has several
    metric, oracle = vlm.mixture(pairs), towers.TowerOracle(family, hf)
    base, source = runs_of(pairs, direction)
    there = [oracle.activations(source, i) for i in range(2)]
    for site in towers.SITES if direction == "noise" else ("z", "mlp_post"):
        overs = ("layer pos", "layer head") if site in HEADS else ("layer pos",)
        for over in overs:
            found = mk.activation_patching(
                model, pairs, metric, f"vision.{site}", over, direction=direction, progress=False
            )
            # What DeepStack adds between blocks comes from the tower too
            assert (found.provenance["replay"] == "suffix") == (family != "qwen3_vl"), found.provenance["replay"]
            assert found.coords["layer"] == tuple(range(len(oracle.blocks)))
            for layer in found.coords["layer"]:
                for i in range(2):
                    n, labels = len(there[i][site, layer]), list(found.coords[over.split()[1]])
                    if over == "layer pos":
                        assert bool(found.values[layer, n:, i].isnan().all())
                        labels = [pos for pos in labels if pos < n]
                    places = [(at, None) if over == "layer pos" else (None, at) for at in labels]
                    right = oracle.patched(base, i, there[i][site, layer], site, layer, places) @ WEIGHTS
                    close(found.values[layer, : len(places), i], right)
            assert found.effect().values.nan_to_num().abs().amax() > 1e-3


@pytest.mark.parametrize("family", [f for f in FAMILIES if "qwen" not in f])
def test_patterns_and_scores(family: str) -> None:
    """A pattern from the source run gives `pattern @ v`, so that it equals writing that into z; scores have the same pattern."""
    hf, model = vlm.pair_of_models(family)
    pairs = vlm.make_pairs(family, model)
    metric, oracle = vlm.mixture(pairs), towers.TowerOracle(family, hf)
    _, cache = model.run_with_cache(pairs.corrupted[[0]], ["vision.pattern", "vision.v", "vision.z"])
    _, of_source = model.run_with_cache(pairs.clean[[0]], ["vision.pattern"])
    for layer in range(2):
        tiles = of_source["vision.pattern", layer] @ cache["vision.v", layer].movedim(2, 1)  # [tile head pos d_head]
        own = cache["vision.pattern", layer] @ cache["vision.v", layer].movedim(2, 1)
        close(own.movedim(1, 2), cache["vision.z", layer])
        there = tiles.movedim(1, 2).flatten(0, 1).flatten(1)
        places = [(None, head) for head in range(3)]
        right = oracle.patched(pairs.corrupted, 0, there, "z", layer, places) @ WEIGHTS
        for site in ("pattern", "attn_scores"):
            found = mk.activation_patching(model, pairs, metric, f"vision.{site}", layers=[layer], progress=False)
            assert found.provenance["replay"] == "suffix"
            close(found.values[0, :, 0], right)
            by_position = mk.activation_patching(
                model, pairs, metric, f"vision.{site}", "layer pos head", layers=[layer], heads=[1], progress=False
            )
            one = own.movedim(1, 2).flatten(0, 1).flatten(1).clone()
            one[3, 8:16] = there[3, 8:16]
            close(
                by_position.values[0, 3, 0, 0],
                oracle.patched(pairs.corrupted, 0, one, "z", layer, [(None, 1)])[0] @ WEIGHTS,
            )


@pytest.mark.parametrize("family", ["llava_next", "gemma3", "qwen2_5_vl"])
def test_ablations(family: str) -> None:
    hf, model = vlm.pair_of_models(family)
    prompts = vlm.make_prompts(family, model, range(3))
    pairs = mk.PromptPairs.from_tokens(prompts, prompts, [(5, 7)] * 3)
    metric, oracle = vlm.mixture(pairs), towers.TowerOracle(family, hf)
    of_each = torch.stack([oracle.activations(prompts, i)["z", 0] for i in range(3)])
    of_heads = of_each.unflatten(-1, (3, -1))
    replaced = {
        "zero": torch.zeros_like(of_each[0]),
        "mean": of_heads.mean((0, 1)).flatten().expand_as(of_each[0]),
        "position_mean": of_each.mean(0),
    }
    places = [(None, head) for head in range(3)]
    for mode, there in replaced.items():
        found = mk.ablation(model, pairs, metric, "vision.z", mode=mode, layers=[0], progress=False)
        for i in range(3):
            close(found.values[0, :, i], oracle.patched(prompts, i, there, "z", 0, places) @ WEIGHTS)
    blurred, found = model.blurred(prompts), mk.ablation(model, pairs, metric, "vision.z", mode="blur", progress=False)
    for i in range(3):
        there = oracle.activations(blurred, i)["z", 1]
        close(found.values[1, :, i], oracle.patched(prompts, i, there, "z", 1, places) @ WEIGHTS)
    resampled = mk.ablation(
        model, pairs[[0]], metric_of_one(pairs), "vision.z", mode="resample", reference=prompts[[2]], progress=False
    )
    right = oracle.patched(prompts, 0, of_each[2], "z", 0, places) @ WEIGHTS
    close(resampled.values[0, :, 0], right)


def metric_of_one(pairs: mk.PromptPairs) -> mk.Metric:
    return vlm.mixture(pairs[[0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_equal_autograd_on_the_untouched_model(family: str) -> None:
    hf, model = vlm.pair_of_models(family)
    pairs = vlm.make_pairs(family, model, (False, True))
    metric, oracle = vlm.mixture(pairs), towers.TowerOracle(family, hf)
    found = mk.attribution_patching(
        model, pairs, metric, {"vision.z": "layer head", "vision.resid_pre": "layer pos"}, progress=False
    )
    for i in range(2):
        there, here = (oracle.activations(one, i) for one in (pairs.clean, pairs.corrupted))
        for layer in range(len(oracle.blocks)):
            for site in ("z", "resid_pre"):
                entries = oracle.slopes(pairs.corrupted, i, WEIGHTS, site, layer) * (
                    there[site, layer] - here[site, layer]
                )
                right = entries.unflatten(-1, (3, -1)).sum((0, 2)) if site == "z" else entries.sum(1)
                close(found[f"vision.{site}"].effect().values[layer, : len(right), i], right)
    assert found["vision.z"].effect().values[0].abs().max() > 1e-3


def test_what_is_missing_is_said() -> None:
    _, model = vlm.pair_of_models("qwen2_5_vl")
    tokens = torch.tensor([[3, 9, 5]])
    with pytest.raises(
        ValueError, match=r"attention of each picture by itself\. Its sites are vision\.resid_pre, vision\.q"
    ):
        model.run_with_cache(tokens, "vision.pattern")
    for run in (
        lambda: model.run_with_cache(tokens, "vision.z"),
        lambda: model.run_with_hooks(tokens, [("vision.z", lambda z, hook: None)]),
    ):
        with pytest.raises(ValueError, match="where a prompt has a picture; expected one with inputs="):
            run()
    _, model = vlm.pair_of_models("llava")  # its features are taken before the last block of two
    pairs = vlm.make_pairs("llava", model)
    with pytest.raises(ValueError, match=r"no gradient path .* to vision\.blocks\.1"):
        mk.attribution_patching(model, pairs, vlm.mixture(pairs), "vision.z", layers=[1], progress=False)
    with pytest.raises(ValueError, match="expected indices from the start at sites of the vision tower"):
        mk.activation_patching(
            model, pairs, vlm.mixture(pairs), "vision.z", "layer pos", positions=[-1], progress=False
        )
    several = vlm.make_pairs("llava_next", vlm.pair_of_models("llava_next")[1], (False, True))
    with pytest.raises(
        ValueError, match="pictures of one size, 'zero' or 'resample'; got 'position_mean' with pictures of several"
    ):
        mk.ablation(
            vlm.pair_of_models("llava_next")[1],
            several,
            vlm.mixture(several),
            "vision.pattern",
            mode="position_mean",
            progress=False,
        )
    with pytest.raises(ValueError, match=r"no hook has this name\. Near: vision\."):
        model.hook_names("vision.embed")
    with pytest.raises(ValueError, match=r"site: 'vision\.z' is in the vision tower.*activation_patching"):
        mk.image_patching(model, pairs, vlm.mixture(pairs), site="vision.z", progress=False)
    with pytest.raises(ValueError, match=r"site='vision\.pattern'"):
        mk.ablation(model, pairs, vlm.mixture(pairs), "vision.attn_scores", mode="zero", progress=False)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_positions_that_a_tower_lacks_are_nan_where_no_gradient_comes_too(family: str) -> None:
    """LLaVA-Next takes features from before the tower's last block: a 0 there belongs to positions that are there."""
    _, model = vlm.pair_of_models(family)
    pairs = vlm.make_pairs(family, model, (True, False))
    found = mk.attribution_patching(model, pairs, vlm.mixture(pairs), "vision.z", "layer pos", progress=False)
    right = mk.activation_patching(model, pairs, vlm.mixture(pairs), "vision.z", "layer pos", progress=False)
    assert right.values.isnan().any()
    assert torch.equal(found.values.isnan(), right.values.isnan())
    if family == "llava_next":
        assert found.effect().values[-1].nan_to_num().eq(0).all()


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_values_of_another_models_tower(family: str) -> None:
    """Towers longer and shorter than the texts, and texts of two lengths."""
    hf, model = vlm.pair_of_models(family)
    hf_other = vlm.build_hf(family, seed=5)
    other = mk.HookedModel.from_hf(vlm.build_hf(family, seed=5), name="other")
    picture = vlm.picture(family, 1)
    rows = [vlm.tokens_for(family, model, picture, tail) for tail in ((7, 11, 5), (7,) * 13 + (5,))]
    prompts = mk.Prompts.from_inputs(model, rows, [picture, picture])
    pairs = mk.PromptPairs.from_tokens(prompts, prompts, [(5, 7)] * 2)
    metric = vlm.mixture(pairs)
    found = mk.activation_patching(
        model, pairs, metric, "vision.resid_pre", "layer pos", source_model=other, layers=[0], progress=False
    )
    oracle = towers.TowerOracle(family, hf)
    for i in range(2):
        there = towers.TowerOracle(family, hf_other).activations(prompts, i)["resid_pre", 0]
        places: list[tuple[int | None, int | None]] = [(pos, None) for pos in range(len(there))]
        right = oracle.patched(prompts, i, there, "resid_pre", 0, places) @ WEIGHTS
        close(found.values[0, :, i], right)
    assert found.effect().values.abs().max() > 1e-3


def test_pairs_of_one_picture_leave_the_tower_as_it_is() -> None:
    """Another word is no other picture (a control: another picture is)."""
    _, model = vlm.pair_of_models("llava")
    prompts = vlm.make_prompts("llava", model, [0, 1])
    rows = [row.clone() for row in prompts.tokens]
    for row in rows:
        row[-2] = 20
    words = mk.Prompts.from_inputs(model, rows, prompts.inputs)
    pairs = mk.PromptPairs.from_tokens(words, prompts, [(5, 7)] * 2)
    found = mk.activation_patching(model, pairs, vlm.mixture(pairs), "vision.z", progress=False)
    assert found.effect().values.abs().max() == 0
    assert found.baseline["clean"].ne(found.baseline["corrupted"]).all()
    other = vlm.make_pairs("llava", model)
    moved = mk.activation_patching(model, other, vlm.mixture(other), "vision.z", layers=[0], progress=False)
    assert (moved.effect().values != 0).all()


def test_cost_counts_towers_and_sets_are_one_cell() -> None:
    _, model = vlm.pair_of_models("llava_next")
    pairs = vlm.make_pairs("llava_next", model)
    metric = vlm.mixture(pairs)
    one = mk.activation_patching(model, pairs, metric, "vision.z", "layer pos head", progress=False)
    whole = mk.activation_patching(model, pairs, metric, "vision.z", "layer pos head", progress=False, replay=False)
    close(one.values, whole.values)
    length, positions = len(pairs.clean.tokens[0]), 3 * 5
    assert one.cost.naive_block_tokens == 2 * 3 * positions * 2 * (4 * length + 2 * positions)
    assert one.cost.block_tokens < whole.cost.block_tokens
    sets = mk.activation_patching(
        model, pairs, metric, "vision.z", cells={"layer 0": [(0, 0), (0, 1), (0, 2)]}, progress=False
    )
    all_heads = mk.activation_patching(model, pairs, metric, "vision.z", "layer", layers=[0], progress=False)
    close(sets.values, all_heads.values)


def test_edits_of_a_tower_and_of_the_language_model_in_one_cell() -> None:
    hf, model = vlm.pair_of_models("gemma3")
    pairs = vlm.make_pairs("gemma3", model)
    metric, oracle = vlm.mixture(pairs), towers.TowerOracle("gemma3", hf)
    cells = [
        (Edit("vision.z", 1, head=0), Edit("resid_pre", 2, pos=len(pairs.clean.tokens[0]) - 1)),
        (Edit("z", 3, head=1),),
    ]
    found = sweep(model, pairs.corrupted, cells, metric, source=pairs.clean, progress=False)
    assert found.replay == "suffix"
    place = vlm.Oracle(hf)
    for i in range(2):
        there = oracle.activations(pairs.clean, i)["z", 1]
        stream = place.activations(pairs.clean, i)["resid_pre", 2][-1]
        module, side, _ = oracle.place("z", 1)

        def head(x: torch.Tensor, there: torch.Tensor = there) -> torch.Tensor:
            x = x.clone()
            x[0, :, :8] = there[:, :8]
            return x

        def last(x: torch.Tensor, stream: torch.Tensor = stream) -> torch.Tensor:
            x = x.clone()
            x[:, -1] = stream
            return x

        right = oracle.run(pairs.corrupted, i, [(module, side, head), (place.layers[2], "in", last)])[0] @ WEIGHTS
        close(found.values[0, i], right)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_the_proof_refuses_a_tower_that_reaches_further(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: edits of the tower are taken to show behind the picture's first patches only (in Gemma 3, where those see the
    others: behind the picture)."""
    _, model = vlm.pair_of_models(family)
    pairs = vlm.make_pairs(family, model)
    metric, starts, later = vlm.mixture(pairs), EditPlan.starts, 2 if family == "llava" else 4

    def late(self: Any, prompts: Any, length: Any, first: Any, derived: Any = (), tower: Any = None) -> Any:
        return starts(self, prompts, length, first, derived, replace(tower, start=tower.start + later))

    right = mk.activation_patching(model, pairs, metric, "vision.z", progress=False)
    assert right.provenance["replay"] == "suffix"
    monkeypatch.setattr(EditPlan, "starts", late)
    found = mk.activation_patching(model, pairs, metric, "vision.z", progress=False)
    assert found.provenance["replay"].startswith("full: ")
    close(found.values, right.values)


def test_the_proof_refuses_features_that_are_added_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: Qwen3-VL's DeepStack is taken to add what it adds in the unedited run, though the tower is edited."""
    _, model = vlm.pair_of_models("qwen3_vl")
    pairs = vlm.make_pairs("qwen3_vl", model)
    metric = vlm.mixture(pairs)
    right = mk.activation_patching(model, pairs, metric, "vision.z", progress=False)
    assert "between its blocks" in right.provenance["replay"]

    class Hidden(dict[int, torch.Tensor]):
        def __bool__(self) -> bool:
            return False

    import mechkit.engine._sweep as engine

    recorded, taken_apart = engine.record, engine.taken_apart

    def record(*args: Any, **options: Any) -> Any:
        run = recorded(*args, **options)
        return replace(run, between=Hidden(run.between))

    def apart(run: Any, n: int) -> Any:
        mine, others = taken_apart(run, n)
        return replace(mine, between=Hidden(mine.between)), others

    monkeypatch.setattr(engine, "record", record)
    monkeypatch.setattr(engine, "taken_apart", apart)
    found = mk.activation_patching(model, pairs, metric, "vision.z", progress=False)
    assert found.provenance["replay"].startswith("full: ")
    assert "differ" in found.provenance["replay"]
    close(found.values, right.values)


def test_hooks_and_caches() -> None:
    """As the model computes them: tiles are rows of the batch. Nothing stays attached, and nothing else sees a change."""
    _, model = vlm.pair_of_models("llava_next")
    prompts = vlm.make_prompts("llava_next", model, [0, 1])
    logits, cache = model.run_with_cache(prompts, ["vision.z", ("vision.resid_pre", -1)])
    assert cache["vision.z", 1].shape == (6, 5, 3, 8)
    assert cache["vision.resid_pre", 1].shape == (6, 5, 24)
    assert torch.equal(cache["vision.z"], torch.stack([cache["vision.z", 0], cache["vision.z", -1]]))
    close(cache["vision.z", 0], cache["vision.blocks.0.attn.hook_z"])
    _, everything = model.run_with_cache(prompts)
    assert not [name for name in everything if name.startswith("vision.")]
    _, first = model.run_with_cache(prompts, ("vision.z", 0))
    assert torch.equal(first["vision.z", 0], cache["vision.z", 0])
    for missing in (("vision.z", -1), "vision.z"):  # a tower of two layers, whatever is in the cache
        with pytest.raises(KeyError, match=r"vision\.blocks\.1|1 of 2 layers"):
            first[missing]
    seen = []

    def zero(z: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append((hook.name, hook.layer()))
        return torch.zeros_like(z)

    changed = model.run_with_hooks(prompts, [(("vision.z", 0), zero)])
    assert seen == [("vision.blocks.0.attn.hook_z", 0)]
    assert (changed - logits).abs().max() > 1e-3
    assert torch.equal(model(prompts), logits)
    assert not model.has_hooks
    by_hand = mk.activation_patching  # a cache of the source run serves, tiles and all
    pairs = vlm.make_pairs("llava_next", model)
    _, source = model.run_with_cache(pairs.clean, "vision.z")
    metric = vlm.mixture(pairs)
    with_cache = by_hand(model, pairs, metric, "vision.z", source_cache=source, progress=False)
    close(with_cache.values, by_hand(model, pairs, metric, "vision.z", progress=False).values)
    gradients: list[torch.Tensor] = []
    pixels = prompts.stack([0, 1]).arguments
    pixels["pixel_values"] = pixels["pixel_values"].double().requires_grad_()
    with torch.enable_grad(), model.hooks(bwd_hooks=[(("vision.resid_post", 0), lambda g, hook: gradients.append(g))]):
        model.bridge(prompts.stack([0, 1]).tokens, **pixels)[:, -1].sum().backward()
    assert gradients[0].shape == (6, 5, 24)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"site": "vision.resid_mid"}, "site: expected one of"),
        ({"site": "vision.z", "layers": [2]}, "layers: expected indices into 2"),
        ({"site": "vision.z", "heads": [3]}, "heads: expected indices into 3"),
        ({"site": "vision.z", "over": "layer pos", "positions": [15]}, "positions: expected indices into 15"),
        ({"site": "vision.z", "over": "layer position"}, "in the vision tower"),
        ({"site": "vision.z", "over": "layer patch"}, "in the vision tower"),
    ],
)
def test_refusals(options: dict[str, Any], said: str) -> None:
    _, model = vlm.pair_of_models("llava_next")
    pairs = vlm.make_pairs("llava_next", model)
    with pytest.raises(ValueError, match=said):
        mk.activation_patching(model, pairs, vlm.mixture(pairs), **options, progress=False)


def test_techniques_and_models_without_towers() -> None:
    _, model = vlm.pair_of_models("llava")
    pairs = vlm.make_pairs("llava", model)
    metric = vlm.mixture(pairs)
    for technique in (mk.integrated_gradients, mk.atp_star, mk.relp):
        with pytest.raises(ValueError, match="vision tower"):
            technique(model, pairs, metric, "vision.z", progress=False)
    with pytest.raises(ValueError, match="vision tower"):
        mk.image_patching(model, pairs, metric, site="vision.resid_pre", progress=False)
    with pytest.raises(ValueError, match="site"):
        mk.logit_lens(model, pairs.clean, site="vision.resid_pre", tokens="next")
    with pytest.raises(ValueError, match="positions"):
        model.run_with_cache(pairs.clean, "vision.z", positions=-1)
    with pytest.raises(ValueError, match="one call, got both"):
        mk.attribution_patching(model, pairs, metric, {"vision.z": "layer head", "z": "layer head"}, progress=False)
    words = mk.Prompts.from_tokens([[3, 9, 7], [3, 8, 7]])
    text = mk.PromptPairs.from_tokens(words[[0]], words[[1]], [(5, 7)])
    with pytest.raises(ValueError, match="each prompt needs one"):
        mk.activation_patching(model, text, vlm.mixture(text), "vision.z", progress=False)
    known = mk.zoo.induction()
    with pytest.raises(ValueError, match="does not exist"):
        known.model.run_with_cache(known.pairs.clean, "vision.z")
