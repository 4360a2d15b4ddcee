"""What the tests' studies name as code, `"helpers.studies:tiny_llama"`: models, tasks, techniques that go wrong on purpose."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import mechkit as mk
from helpers.families import D_VOCAB, build_hf
from mechkit.studies import _registry as registry

LENGTHS = (6, 4, 5, 4, 6, 3, 5)  # of tiny_pairs' prompts, over and over


# -- models and tasks --------------------------------------------------------------------------------------------------


@functools.cache
def _model(family: str, scale: float) -> mk.HookedModel:
    hf_model = build_hf(family)
    with torch.no_grad():
        hf_model.get_output_embeddings().weight.mul_(scale)
    return mk.HookedModel.from_hf(hf_model, None, name=f"tiny {family}")


def tiny_llama() -> mk.HookedModel:
    """Four layers of four heads, random weights, float64. One model per process, which no test may change."""
    return _model("llama", 1.0)


def fresh_llama() -> mk.HookedModel:
    """The same, built again, for a test that changes it."""
    return _model.__wrapped__("llama", 1.0)


def tiny_gpt2() -> mk.HookedModel:
    return _model("gpt2", 1.0)


def llama_of_file(path: str) -> mk.HookedModel:
    """A model whose weights depend on a file: its unembedding is scaled by the number that the file holds."""
    return _model("llama", float(Path(path).read_text()))


def tiny_pairs(model: mk.HookedModel, n: int = 6, seed: int = 0) -> mk.PromptPairs:
    """Pairs of random tokens behind one that all have, ragged; one token differs, and a named position says which."""
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted, answers, where = [], [], [], []
    for i in range(n):
        tokens = torch.randint(3, D_VOCAB, (LENGTHS[i % len(LENGTHS)],), generator=generator)
        tokens[0] = 0
        at = int(torch.randint(1, len(tokens) - 1, (1,), generator=generator))
        other = tokens.clone()
        other[at] = 3 + (int(tokens[at]) - 2) % (D_VOCAB - 3)
        right, wrong = (int(token) for token in torch.randperm(D_VOCAB, generator=generator)[:2])
        clean.append(tokens)
        corrupted.append(other)
        answers.append((right, wrong))
        where.append(at)
    sides = [
        mk.Prompts(tuple(side), tuple(tuple(f"t{int(one)}" for one in row) for row in side))
        for side in (clean, corrupted)
    ]
    return mk.PromptPairs.from_tokens(*sides, answers, positions={"CHANGED": where}, task="tiny pairs")


PICTURES = {"shift": 0.0}  # what tests change to get other pictures for the very same words


def tiny_llava() -> mk.HookedModel:
    """A vision-language model of random weights, float64."""
    from helpers.vlm import pair_of_models

    return pair_of_models("llava")[1]


def pairs_with_pictures(model: mk.HookedModel, picture: int = 0, n: int = 3) -> mk.PromptPairs:
    """The same words whatever the `picture`; both prompts of a pair differ in theirs."""
    from helpers.vlm import make_prompts

    clean, corrupted = ([100 * picture + offset + i for i in range(n)] for offset in (0, 50))
    prompts = [_shifted(model, make_prompts("llava", model, seeds)) for seeds in (clean, corrupted)]
    return mk.PromptPairs.from_tokens(*prompts, [(5, 7)] * n, task="pictures")


def _shifted(model: mk.HookedModel, prompts: mk.Prompts) -> mk.Prompts:
    inputs = [{name: value + PICTURES["shift"] for name, value in one.items()} for one in prompts.inputs or ()]
    return mk.Prompts.from_inputs(model, prompts.tokens, inputs)


def pairs_of_one_length(model: mk.HookedModel, seed: int = 0) -> mk.PromptPairs:
    """Those of them that have five tokens."""
    pairs = tiny_pairs(model, 14, seed)
    return pairs[[i for i, row in enumerate(pairs.clean.tokens) if len(row) == 5]]


def pairs_of_odd_arguments(
    model: mk.HookedModel, baseline_clean: int = 0, layer: int = 0, task_layer: int = 0
) -> mk.PromptPairs:
    """The arguments are called like columns of a table."""
    return tiny_pairs(model, 3, 1)


def pairs_of_file(model: mk.HookedModel, path: str) -> mk.PromptPairs:
    """Prompts that depend on a file: its number is their seed."""
    return tiny_pairs(model, 4, int(Path(path).read_text()))


def no_pairs(model: mk.HookedModel) -> mk.PromptPairs:
    raise RuntimeError("this task cannot be made")


# -- techniques --------------------------------------------------------------------------------------------------------


def _numbers(pairs: mk.PromptPairs) -> mk.Result:
    """Numbers that depend on the prompts, and cost nothing."""
    values = torch.stack([tokens.double().mean() / 7 for tokens in pairs.clean.tokens])
    labels = {"cell": ("a", "b"), "prompt": tuple(range(len(pairs)))}
    return mk.Result(torch.stack([values, -values]), ("cell", "prompt"), labels, {}, "", "logit_diff", "logits", {})


def note(path: str, line: str = "run") -> int:
    """Appends a line to a file, in one write. Returns how many there are now."""
    with open(path, "ab", buffering=0) as file:
        file.write(f"{line}\n".encode())
    return len(Path(path).read_text().splitlines())


def quick(model: mk.HookedModel, pairs: mk.PromptPairs, metric: Any, log: str = "") -> mk.Result:
    """Works; says so in a file, if one is named."""
    if log:
        note(log)
    return _numbers(pairs)


def always_fails(model: mk.HookedModel, pairs: mk.PromptPairs, metric: Any, log: str = "") -> mk.Result:
    if log:
        note(log)
    raise RuntimeError("this technique always fails")


def fails_once(model: mk.HookedModel, pairs: mk.PromptPairs, metric: Any, log: str, times: int = 1) -> mk.Result:
    """Fails the first `times` times that it is called, counted in a file."""
    if note(log) <= times:
        raise RuntimeError("this technique fails at first")
    return _numbers(pairs)


def waits(model: mk.HookedModel, pairs: mk.PromptPairs, metric: Any, log: str, gate: str, free: int = 0) -> mk.Result:
    """Says that it has begun, and waits until the file `gate` is there; the first `free` calls do not."""
    if note(log) > free:
        wait_for(Path(gate).exists, 120)
    return _numbers(pairs)


def interrupts(model: mk.HookedModel, pairs: mk.PromptPairs, metric: Any, log: str) -> mk.Result:
    """As if Ctrl-C were pressed, the first time."""
    if note(log) == 1:
        raise KeyboardInterrupt
    return _numbers(pairs)


def gives_nan(model: mk.HookedModel, pairs: mk.PromptPairs, metric: Any) -> mk.Result:
    """NaN in one cell of every prompt, and in all cells of the first."""
    found = _numbers(pairs)
    values = found.values.clone()
    values[0], values[:, 0] = torch.nan, torch.nan
    return mk.Result(values, found.dims, found.coords, {}, "", found.metric, found.unit, {})


def not_a_result(model: mk.HookedModel, pairs: mk.PromptPairs, metric: Any) -> int:
    return 3


def counted(function: Callable[..., Any], log: str | os.PathLike[str]) -> Callable[..., Any]:
    """The function, which says in a file that it is called, and on how many prompts."""

    @functools.wraps(function)
    def wrapper(model: mk.HookedModel, *args: Any, **arguments: Any) -> Any:
        pairs = arguments.get("pairs", arguments.get("prompts", ()))
        note(os.fspath(log), f"{function.__name__} {len(pairs)}")
        return function(model, *args, **arguments)

    return wrapper


def out_of_memory(function: Callable[..., Any], times: int, seen: list[int]) -> Callable[..., Any]:
    """The function, except its first `times` calls, which run out of memory. `seen` gets every budget that it is given."""

    @functools.wraps(function)
    def wrapper(model: mk.HookedModel, *args: Any, budget: int, **arguments: Any) -> Any:
        seen.append(budget)
        if len(seen) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        return function(model, *args, budget=budget, **arguments)

    return wrapper


# -- what is compared --------------------------------------------------------------------------------------------------


def records(store: str | os.PathLike[str]) -> list[str]:
    """The finished shards in a folder, `job/number.json`, sorted."""
    folder = Path(store) / "shards"
    return sorted(
        f"{path.parent.name}/{path.name}" for path in folder.glob("*/*.json") if not path.name.endswith(".partial")
    )


def files(store: str | os.PathLike[str], *, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Every file in a folder, with its bytes."""
    root = Path(store)
    found = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(but)}


def chunks(store: str | os.PathLike[str]) -> dict[str, bytes]:
    """Every chunk of values."""
    return {name: data for name, data in files(store).items() if name.startswith("data/") and "/values/c/" in name}


def parquet(study: mk.studies.Study, path: Path) -> bytes:
    return study.results().to_parquet(path).read_bytes()


# -- other processes ---------------------------------------------------------------------------------------------------

WARM = "MECHKIT_TESTS_WARM"  # set in the fork server, which makes the model and imports what is slow to import once for all


@functools.cache
def forkserver() -> Any:
    """A context whose processes start with everything imported. Each is a process of its own, to be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "helpers.studies"])
    with_path = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.getcwd()]), WARM: "1"}
    before = {name: os.environ.get(name) for name in with_path}
    os.environ.update(with_path)
    try:
        process = context.Process(target=int)
        process.start()
        process.join()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def run_in_process(store: str, stated: dict[str, Any], log: str) -> None:
    """Runs a study of activation patching, and counts its calls in a file. The first line is the process's own."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what was begun in the background ignores it
    row = registry.TECHNIQUES["activation_patching"]
    registry.TECHNIQUES["activation_patching"] = replace(row, function=counted(row.function, log))
    study = mk.Study(**stated, store=store)
    note(f"{log}.started")
    study.run(progress=False)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For fixtures of modules, which begin before the fixture of `conftest.py` that does the same for tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lines(path: str | os.PathLike[str]) -> int:
    return len(Path(path).read_text().splitlines()) if Path(path).exists() else 0


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


if os.environ.get(WARM):
    import pyarrow.parquet  # noqa: F401
    import zarr  # noqa: F401

    import mechkit.studies

    torch.set_num_threads(1)
    tiny_llama()
