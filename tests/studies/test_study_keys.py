"""What a review found: numbers that would have been reused, mixed up or cut wrongly. Each test failed before."""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch

import mechkit as mk
from helpers.studies import fresh_llama, one_thread, tiny_llama
from mechkit.studies import InProcess

MODEL = {"name": "helpers.studies:tiny_llama", "dtype": "float64", "label": "llama"}
TASK = {"name": "helpers.studies:tiny_pairs", "label": "pairs"}
ABLATION = {"name": "ablation", "site": "mlp_out", "over": "layer", "mode": "zero"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with one_thread():
        yield


def study(store: Path, tasks=(TASK,), techniques=(ABLATION,), models=(MODEL,), **settings) -> mk.Study:
    return mk.Study(models, tasks, techniques, store=store, **settings)


def test_an_old_shard_put_back_is_not_taken(tmp_path):
    """The weights changed in between: record and chunks of before fit each other, but not the job."""
    weights = tmp_path / "weights.json"
    models = [{"name": "helpers.studies:llama_of_file", "path": str(weights), "dtype": "float64", "label": "llama"}]
    one = study(tmp_path / "store", models=models)
    weights.write_text("1")
    one.run(progress=False)
    old = shutil.copytree(tmp_path / "store", tmp_path / "old")
    weights.write_text("2")
    assert one.run(progress=False).computed == 1
    right = one.results().result().values
    (job,) = one.jobs
    for part in (f"shards/{job.id}", f"data/{job.id}/values", f"data/{job.id}/baseline_clean"):
        shutil.rmtree(tmp_path / "store" / part)
        shutil.copytree(old / part, tmp_path / "store" / part)
    report = one.run(progress=False)
    assert report.computed == 1
    assert "another key" in "".join(report.damage)
    assert torch.equal(one.results().result().values, right)


def test_code_that_was_edited_after_its_import_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = tmp_path / "edited_metric.py"
    code.write_text("import mechkit as mk\n\ndef metric(pairs):\n    return mk.logit_diff(pairs)\n")
    one = study(tmp_path / "store", techniques=[ABLATION | {"metric": "edited_metric:metric"}])
    assert one.run(progress=False).failed == {}
    code.write_text("import mechkit as mk\n\ndef metric(pairs):\n    return mk.prob_diff(pairs)\n")
    with pytest.raises(ValueError, match="changed after it was imported"):
        study(tmp_path / "store", techniques=[ABLATION | {"metric": "edited_metric:metric"}])
    importlib.invalidate_caches()
    del sys.modules["edited_metric"]  # as in a new process
    again = study(tmp_path / "store", techniques=[ABLATION | {"metric": "edited_metric:metric"}])
    assert again.run(progress=False).computed == 1
    assert again.results().result().metric == "prob_diff"


def test_every_byte_of_the_weights_counts(tmp_path):
    """Two rows of the embedding change places: sums and most samples stay."""
    model = fresh_llama()
    model.name = "mine"
    one = study(tmp_path / "store", models=[{"name": "mine", "dtype": "float64"}])
    executor = InProcess(loaded={"mine": model})
    assert one.run(executor, progress=False).computed == 1
    assert one.run(executor, progress=False).kept == 1
    weight = model.bridge.original_model.get_input_embeddings().weight
    with torch.no_grad():
        weight[[7, 8]] = weight[[8, 7]].clone()
    assert one.run(InProcess(loaded={"mine": model}), progress=False).computed == 1


def test_a_loaded_model_is_the_one_that_is_stated(tmp_path):
    models = [{"name": "mine", "revision": "step1", "dtype": "float64"}]
    report = study(tmp_path / "store", models=models).run(InProcess(loaded={"mine": tiny_llama()}), progress=False)
    assert "expected 'mine' as it is stated (revision 'step1'" in "".join(report.failed.values())


def test_a_model_that_could_not_be_hashed_is_not_gone_on_with(tmp_path, monkeypatch):
    """Its shards would have been kept under the hash of the model before it."""
    from mechkit.studies import _materials
    from mechkit.studies._work import PlanWork, WorkerSettings
    from mechkit.studies._worker import Worker

    (job,) = study(tmp_path / "store").jobs
    worker = Worker(WorkerSettings(str(tmp_path / "store")))
    digest = _materials.weights_digest
    monkeypatch.setattr(_materials, "weights_digest", lambda _: 1 / 0)
    for _ in range(2):
        assert "ZeroDivisionError" in str(worker.run(PlanWork(job.model, (job,))))
    monkeypatch.setattr(_materials, "weights_digest", digest)
    assert worker.materials.model(job.model) is tiny_llama()
    assert worker.materials._weights == digest(tiny_llama())


def test_memory_of_a_model_that_failed_to_load_is_given_back(tmp_path, monkeypatch):
    from mechkit.studies._materials import Materials

    class Half:
        """As a model of which a part is loaded: in a cycle, which only the collector takes away."""

        def __init__(self) -> None:
            self.me = self
            halves.append(weakref.ref(self))

    halves: list[weakref.ref] = []

    def load(self, spec):
        left.append(sum(half() is not None for half in halves))
        Half()
        raise MemoryError

    left: list[int] = []
    monkeypatch.setattr(Materials, "_load", load)
    materials = Materials()
    (job,) = study(tmp_path / "store").jobs
    gc.disable()
    try:
        for _ in range(3):
            with pytest.raises(MemoryError):
                materials.model(job.model)
    finally:
        gc.enable()
    assert left == [0, 0, 0]


def test_prompts_that_differ_from_call_to_call_are_refused(tmp_path):
    """A task without a seed: what a second worker would make are other prompts than those that were planned."""
    from mechkit.studies._work import PlanWork, ShardWork, WorkerSettings
    from mechkit.studies._worker import Worker

    drawn = tmp_path / "seed"
    drawn.write_text("0")
    one = study(
        tmp_path / "store", tasks=[{"name": "helpers.studies:pairs_of_file", "path": str(drawn), "label": "pairs"}]
    )
    (job,) = one.jobs
    settings = WorkerSettings(one.store.url)
    Worker(settings).run(PlanWork(job.model, one.jobs))
    drawn.write_text("1")
    outcome = Worker(settings).run(ShardWork(job, 0))
    assert "prompts: expected what the job was planned with" in str(outcome)


def test_jobs_of_another_mechkit_are_not_gone_on_with(tmp_path):
    one = study(tmp_path / "store")
    from dataclasses import replace

    one.jobs = tuple(replace(job, mechkit="0.0.1") for job in one.jobs)
    with pytest.raises(ValueError, match=r"jobs of mechkit 0\.0\.1, this is"):
        one.run(progress=False)


def test_seed_is_the_tasks(tmp_path):
    """`ablation` has a seed of its own, 0 by default, which is not what the prompts are drawn with."""
    one = study(tmp_path / "store", tasks=[{**TASK, "grid": {"seed": [0, 1]}}])
    one.run(progress=False)
    table = one.results()
    assert [job.labels[1] for job in table.sel(seed=0).jobs] == ["pairs seed=0"]
    assert len(table.sel(**{"technique.seed": 0})) == 2
    assert len(table.sel(seed=[0, 1])) == 2
    with pytest.raises(ValueError, match="sedd: expected a key among"):
        table.sel(sedd=0)


def test_a_metric_that_looks_at_all_prompts_gets_all_of_them(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "whole_metric.py").write_text(
        "from dataclasses import replace\nimport mechkit as mk\n\n"
        "def metric(pairs):\n    plain = mk.logit_diff(pairs)\n    n = len(pairs)\n"
        "    return replace(plain, read=lambda logits, prompt, ref: plain.read(logits, prompt, ref) / n)\n"
    )
    techniques = [ABLATION | {"metric": "whole_metric:metric"}]
    cut = study(tmp_path / "cut", techniques=techniques, shard=4)
    whole = study(tmp_path / "whole", techniques=techniques, shard=10_000)
    assert cut.run(progress=False).computed > whole.run(progress=False).computed == 1
    assert torch.allclose(cut.results().result().values, whole.results().result().values, atol=1e-12)


def test_jobs_have_different_ids(tmp_path):
    """By a metric's arguments; across statements over one store; and with labels that xarray would take for a path."""
    metrics = [{"name": "kl_divergence", "reference": reference} for reference in ("clean", "corrupted")]
    patching = {"name": "activation_patching", "site": "mlp_out", "over": "layer"}
    one = study(tmp_path / "a", techniques=[{**patching, "metric": metric} for metric in metrics])
    one.run(progress=False)
    assert len({job.labels for job in one.jobs}) == 2
    assert len(one.results().sel(**{"metric.reference": "clean"})) == 1
    for mode in ("zero", "mean"):
        study(tmp_path / "b", techniques=[ABLATION | {"mode": mode}], name=mode).run(progress=False)
    both = mk.Study.open(tmp_path / "b").results()
    assert len(both) == 2
    assert both.to_dataframe()["technique"].nunique() == 2
    assert len(both.to_xarray().leaves) == 2
    slashes = study(tmp_path / "c", tasks=[{**TASK, "label": "a/b"}, {**TASK, "label": "a∕b", "seed": 1}])
    slashes.run(progress=False)
    assert len(slashes.results().to_xarray().leaves) == 2


def test_a_failure_is_no_damage(tmp_path):
    one = study(tmp_path / "store", techniques=[ABLATION | {"layers": [100]}])
    for _ in range(3):
        report = one.run(progress=False)
        assert len(report.failed) == 1
        assert report.damage == []
    assert not (tmp_path / "store/aside").exists()
    assert one.status().count("failed") == 1


def test_what_json_lacks_is_refused_or_made_plain(tmp_path):
    import numpy as np

    from mechkit.studies._registry import plain

    assert plain({"a": (Path("x"), np.int64(3), range(2))}) == {"a": ["x", 3, [0, 1]]}
    assert json.dumps(plain(np.float32(0.5))) == "0.5"
    path = tmp_path / "study.toml"
    path.write_text(
        '[[model]]\nname = "gpt2"\n[[task]]\nname = "ioi"\nseed = 1979-05-27\n[[technique]]\nname = "ablation"\n'
    )
    with pytest.raises(ValueError, match=r"line 5, task\[0\]\.seed: input should be a valid integer"):
        mk.Study.from_toml(path)


def test_ten_thousand_seeds_expand_in_no_time(tmp_path):
    import time

    begin = time.perf_counter()
    one = study(tmp_path / "store", tasks=[{**TASK, "grid": {"seed": list(range(10_000))}}])
    assert len({job.id for job in one.jobs}) == 10_000
    assert time.perf_counter() - begin < 10


def test_devices_are_looked_at_first():
    for device in ("foo", "cuda:99"):
        with pytest.raises(ValueError, match="device: expected"):
            InProcess(device)
