"""Studies on prompts with pictures: shards of patches add up, and no job takes what was computed for another picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mechkit as mk
from helpers import studies
from helpers.studies import one_thread, pairs_with_pictures, tiny_llava

MODEL = {"name": "helpers.studies:tiny_llava", "dtype": "float64", "label": "llava"}
TASK: dict[str, Any] = {"name": "helpers.studies:pairs_with_pictures", "label": "pictures"}
TECHNIQUES: list[dict[str, Any]] = [
    {"name": "image_patching", "label": "patches", "layers": [0, 1, 3]},
    {"name": "image_patching", "label": "squares", "group": 2, "site": "z", "over": "patch layer head", "layers": [2]},
    {"name": "activation_patching", "label": "some", "site": "z", "over": "layer patch", "positions": ["r0c1", "r2c2"]},
    {"name": "attribution_patching", "label": "estimates", "site": "resid_pre", "over": "layer patch"},
    {"name": "logit_lens", "label": "lens", "over": "layer patch", "value": "entropy"},
    {"name": "attention_knockout", "label": "flow", "from_": "image", "to": "text", "window": 2},
    {"name": "pixel_attribution", "label": "pixels", "steps": 2, "baseline": "blur"},
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with one_thread():
        yield


def study(store: Path, tasks: Any = (TASK,), techniques: Any = tuple(TECHNIQUES), shard: int = 8) -> mk.Study:
    return mk.Study([MODEL], tasks, techniques, store=store, shard=shard, retries=0)


def direct(entry: dict[str, Any], pairs: mk.PromptPairs) -> mk.Result:
    given = {name: value for name, value in entry.items() if name not in ("name", "label")}
    metric = [] if entry["name"] == "logit_lens" else [mk.logit_diff(pairs)]
    found = getattr(mk, entry["name"])(tiny_llava(), pairs, *metric, **given, progress=False)
    assert isinstance(found, mk.Result)
    return found


def test_shards_give_what_a_direct_call_gives(tmp_path):
    one = study(tmp_path / "cut")
    report = one.run(progress=False)
    assert not report.failed, str(report)
    shards = {job.job.labels[2]: job.shards for job in one.status().jobs}
    assert shards["patches"] == 3  # the control: they are cut, here by layers
    assert min(shards["estimates"], shards["flow"], shards["pixels"]) == 3  # and by prompts
    for entry in TECHNIQUES:
        found, wanted = one.results().result(technique=entry["label"]), direct(entry, pairs_with_pictures(tiny_llava()))
        assert (found.dims, dict(found.coords), found.unit) == (wanted.dims, dict(wanted.coords), wanted.unit)
        torch.testing.assert_close(found.values, wanted.values, atol=1e-10, rtol=0, equal_nan=True)
        assert found.provenance.get("patches") == wanted.provenance.get("patches")
        assert found.plot().data


def test_same_words_and_another_picture_are_another_job(tmp_path):
    """Both in one study, and one behind the other in one store: nothing is taken for the other's."""
    patches = [{**TECHNIQUES[0], "layers": [0]}]
    tasks = [{**TASK, "picture": i, "label": f"picture {i}"} for i in (0, 1)]
    one = study(tmp_path / "store", tasks, patches)
    assert not one.run(progress=False).failed
    model = tiny_llava()
    for i in (0, 1):
        pairs = pairs_with_pictures(model, i)
        assert pairs.clean.tokens[0].tolist() == pairs_with_pictures(model, 0).clean.tokens[0].tolist()
        found, wanted = one.results().result(task=f"picture {i}"), direct(patches[0], pairs)
        torch.testing.assert_close(found.values, wanted.values, atol=1e-10, rtol=0)
    both = [one.results().result(task=f"picture {i}") for i in (0, 1)]
    assert float((both[0].values - both[1].values).abs().max()) > 1e-4
    assert both[0].provenance["prompts_hash"] != both[1].provenance["prompts_hash"]


def test_a_task_that_gives_another_picture_is_computed_again(tmp_path, monkeypatch):
    """The words, the arguments and the code are the same: the key knows the picture."""
    patches = [{**TECHNIQUES[0], "layers": [0]}]
    one = study(tmp_path, techniques=patches, shard=10**9)
    assert one.run(progress=False).computed == 1
    before = one.results().result()
    assert study(tmp_path, techniques=patches, shard=10**9).run(progress=False).kept == 1  # the control
    monkeypatch.setitem(studies.PICTURES, "shift", 0.5)
    again = study(tmp_path, techniques=patches, shard=10**9)
    assert again.run(progress=False).computed == 1
    after = again.results().result()
    assert float((after.values - before.values).abs().max()) > 1e-4
    assert after.provenance["prompts_hash"] != before.provenance["prompts_hash"]


def test_wrong_arguments_are_refused_before_anything_runs(tmp_path):
    wrong: list[dict[str, Any]] = [
        {"name": "image_patching", "over": "layer patch tile"},
        {"name": "pixel_attribution", "baseline": "noise"},
        {"name": "attention_knockout"},
    ]
    for entry, sentence in zip(wrong, ("over.*'tile'", "baseline.*'zero' or 'blur'", "from_"), strict=True):
        with pytest.raises(ValueError, match=sentence):
            study(tmp_path, techniques=[entry])
