"""Models whose blocks stay in their files: the same numbers to the bit, each block read a few times, in little memory."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mechkit as mk
from helpers.families import FAMILIES, N_LAYERS, build_hf
from helpers.tiny import make_pairs, whole_vocabulary
from helpers.valid_calls import Material, _circuits, _techniques
from mechkit.engine import _answers, _proof
from mechkit.engine._in_step import at_once, in_step
from mechkit.engine._memory import Budget
from mechkit.hooks._streamed import StreamedBlocks, streamed_of

ONE_LENGTH, RAGGED = ((7, 2), (7, 4)), ((7, 2), (5, 1), (9, 0), (7, 4))
SWEEPS = (("z", "layer head"), ("resid_pre", "layer pos"), ("mlp_out", "layer pos"))
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "patching" / "streaming.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of a tiny model of a family, in several files."""
    made = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            build_hf(family, torch.float32).save_pretrained(made[family], max_shard_size="40KB")
        return made[family]

    return folder


def both(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[mk.HookedModel, mk.HookedModel]:
    """A model in memory, and one whose blocks stay in their files."""
    in_memory = mk.HookedModel.from_pretrained(folder, dtype=dtype, device="cpu")
    for (
        parameter
    ) in in_memory.bridge.original_model.parameters():  # else they lie at odd addresses, where kernels differ
        parameter.data = parameter.data.clone()
    return in_memory, mk.HookedModel.from_pretrained(folder, dtype=dtype, device="cpu", stream=True)


def swept(model: mk.HookedModel, shapes=ONE_LENGTH, site: str = "z", over: str = "layer head", **more) -> mk.Result:
    pairs = make_pairs(shapes)
    return mk.activation_patching(model, pairs, whole_vocabulary(pairs), site=site, over=over, progress=False, **more)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num()) and torch.equal(one.isnan(), other.isnan())


def reads_of(model: mk.HookedModel, run) -> list[int]:
    """How often each block is read meanwhile."""
    blocks = streamed_of(model.bridge)
    before = list(blocks.reads)
    run()
    return [now - then for now, then in zip(blocks.reads, before, strict=True)]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mixtral"])
def test_every_family_to_the_bit(family, folders):
    in_memory, streamed = both(folders(family))
    assert streamed.weights_hash == in_memory.weights_hash
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(streamed(tokens), in_memory(tokens))
    for shapes in (ONE_LENGTH, RAGGED):
        for site, over in SWEEPS:
            expected, found = (swept(model, shapes, site, over) for model in (in_memory, streamed))
            assert same(found.values, expected.values), (site, shapes)
            assert found.provenance["replay"] == expected.provenance["replay"] == "suffix"
            assert found.cost == expected.cost
    assert not streamed.has_hooks


def test_float64_and_another_dtype_in_the_file(folders):
    for dtype in (torch.float64, torch.bfloat16):
        in_memory, streamed = both(folders("llama"), dtype)
        assert streamed.dtype == dtype
        assert streamed.weights_hash == in_memory.weights_hash
        assert same(swept(streamed).values, swept(in_memory).values)


def test_each_block_is_read_a_few_times(folders, monkeypatch):
    """Once to record, once for the proof's whole passes, once for the proof and all batches together."""
    _, model = both(folders("llama"))
    expected = swept(model).values
    monkeypatch.setattr("mechkit.engine._memory.CPU_TOKENS", 24)  # many batches
    assert reads_of(model, lambda: swept(model)) == [3] * N_LAYERS
    monkeypatch.setattr(Budget, "tokens_waiting", lambda *_: 40)  # of which few may wait
    found = []
    reads = reads_of(model, lambda: found.append(swept(model)))
    assert max(reads) > 4
    assert float((found[0].values - expected).abs().max()) <= 1e-4


def test_batch_after_batch_would_read_more(folders, monkeypatch):
    """The control: without going in step, each batch reads the blocks for itself."""
    _, model = both(folders("llama"))
    monkeypatch.setattr("mechkit.engine._memory.CPU_TOKENS", 24)
    monkeypatch.setattr(_proof, "in_step", lambda several: [at_once(one) for one in several])
    assert max(reads_of(model, lambda: swept(model))) > 5


GRADIENTS = {
    "attribution_patching", "integrated_gradients", "relp", "atp_star", "edge_attribution", "find_circuit",
    "gradient_x_input", "learn_mask", "neuron_attribution", "optimal_ablation", "token_integrated_gradients",
}  # fmt: skip


def test_every_technique(folders, tmp_path):
    """The same numbers, or one sentence: what takes gradients through the blocks is refused."""
    in_memory, streamed = both(folders("gpt2"))
    refused, compared = set(), 0
    material = Material(tmp_path)
    material.__dict__["model"] = in_memory
    for name, (call, arguments) in {**_techniques(material), **_circuits(material)}.items():
        if arguments.get("model") is not in_memory:
            continue
        expected = call(**arguments)
        if name in GRADIENTS:
            with pytest.raises(ValueError, match="expected a model whose weights are in memory for gradients"):
                call(**{**arguments, "model": streamed})
            refused.add(name)
            continue
        found = call(**{**arguments, "model": streamed})
        if isinstance(expected, mk.Result):
            assert same(torch.as_tensor(found.values), torch.as_tensor(expected.values)), name
            compared += 1
    assert compared > 10
    assert refused == GRADIENTS
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(streamed.generate(tokens, max_new_tokens=3), in_memory.generate(tokens, max_new_tokens=3))
    for name in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "b_O"):
        assert torch.equal(getattr(streamed, name), getattr(in_memory, name))


def test_what_it_cannot_do_is_refused(folders):
    _, model = both(folders("gpt2"))
    pairs = make_pairs()
    metric = whole_vocabulary(pairs)
    for call in (
        lambda: mk.attribution_patching(model, pairs, metric, progress=False),
        lambda: mk.edge_attribution(model, pairs, metric, progress=False),
        lambda: model.to("cpu"),
        lambda: copy.deepcopy(model),
        lambda: model.bridge.original_model.load_state_dict({}),
    ):
        with pytest.raises(ValueError, match="expected a model whose weights are in memory"):
            call()


def test_files_that_do_not_serve(folders, tmp_path):
    def load(folder, **more):
        return mk.HookedModel.from_pretrained(folder, device="cpu", stream=True, **more)

    def changed(name: str, change) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        build_hf("gpt2", torch.float32).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    with pytest.raises(ValueError, match=r"^stream: expected weights stored as MixtralForCausalLM has them"):
        load(folders("mixtral"))
    with pytest.raises(ValueError, match=r"^stream: expected safetensors files.*GGUF"):
        load("smollm2-135m")
    with pytest.raises(ValueError, match=r"^device_map: has no effect with stream=True"):
        load(folders("gpt2"), device_map="auto")
    missing = changed("missing", lambda t: t.pop("transformer.h.1.mlp.c_fc.weight"))
    with pytest.raises(ValueError, match=r"'transformer.h.1.mlp.c_fc.weight' is not there"):
        load(missing)
    other = changed("shape", lambda t: t.update({"transformer.h.1.ln_1.bias": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"'transformer.h.1.ln_1.bias' \[32\], as the configuration says; it is \[3\]"):
        load(other)
    key = "transformer.h.0.mlp.c_fc.weight"
    quantized = changed("quantized", lambda t: t.update({key: t[key].to(torch.int8)}))
    with pytest.raises(ValueError, match="as in a quantized model"):
        load(quantized)
    damaged = changed("damaged", lambda t: None)
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="it is damaged"):
        load(damaged)
    key = "transformer.h.0.ln_1.weight"
    twice = changed("twice", lambda t: t.update({key.removeprefix("transformer."): t[key] + 1}))
    with pytest.raises(ValueError, match="expected each weight once"):
        load(twice)
    key = "transformer.h.2.ln_1.weight"
    nan = changed("nan", lambda t: t.update({key: t[key] * float("nan")}))
    with pytest.raises(ValueError, match=r"hold NaN or infinite numbers, first in '.*h.2.ln_1.weight'"):
        load(nan)
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(folders("gpt2") / "config.json", empty)
    with pytest.raises(ValueError, match="there is none"):
        load(empty)


def test_names_without_the_models_prefix(folders, tmp_path):
    """As in the hub's GPT-2: transformers adds "transformer." itself."""
    hf = build_hf("gpt2", torch.float32)
    hf.save_pretrained(tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    in_memory, streamed = both(tmp_path)
    assert streamed.weights_hash == in_memory.weights_hash


def test_a_file_that_changes_is_noticed(tmp_path):
    build_hf("llama", torch.float32).save_pretrained(tmp_path)
    _, model = both(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="was changed after the model was loaded"):
        swept(model)
    file.unlink()
    with pytest.raises(ValueError, match="as long as it is used"):
        swept(model)


@pytest.mark.parametrize("in_place", [True, False])
def test_weights_that_are_written_to(in_place, folders):
    """They would be read again from the file, and nobody would notice."""
    _, model = both(folders("llama"))
    weight = model.stack.blocks[1].mlp.out.original_component.weight
    with torch.no_grad():
        (weight if in_place else weight.data).mul_(2)
    with pytest.raises(ValueError, match="those of block 1 were written to"):
        swept(model)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_another_blocks_weights_are_refuted(family, folders, monkeypatch):
    """The planted defect: while work goes in step, one block has the weights of its neighbour."""
    in_memory, model = both(folders(family))
    expected, stepping = swept(in_memory).values, []
    right, step = StreamedBlocks.parameters_of, _proof.in_step

    def wrong(self, layer):
        return right(self, 1 if stepping and layer == 2 else layer)

    def stepped(several):
        stepping.append(1)
        try:
            return step(several)
        finally:
            stepping.clear()

    monkeypatch.setattr(StreamedBlocks, "parameters_of", wrong)
    for module in (_proof, _answers):
        monkeypatch.setattr(module, "in_step", stepped)
    found = swept(model)
    assert found.provenance["replay"].startswith("full: ")
    assert float((found.values - expected).abs().max()) <= 1e-3
    with monkeypatch.context() as patch:  # the control: it moves cells
        patch.setattr(_proof, "_checked_in_step", lambda checks, others: ([None for _ in stepped(others)], None))
        patch.setattr(_answers, "check_batch", lambda *_: None)
        patch.setattr(_answers, "check_packed_batch", lambda *_: None)
        assert float((swept(model).values - expected).abs().max()) > 0.01


@pytest.mark.parametrize("where", ["ahead", "among batches"])
def test_out_of_memory(where, folders, monkeypatch):
    in_memory, model = both(folders("llama"))
    expected, failed = swept(in_memory).values, []
    if where == "ahead":
        read = StreamedBlocks._read

        def fails(self, layer):
            if threading.current_thread() is not threading.main_thread() and layer in (1, 2):
                failed.append(layer)
                raise RuntimeError("can't allocate memory: on purpose")
            return read(self, layer)

        monkeypatch.setattr(StreamedBlocks, "_read", fails)
    else:
        readout = _answers.read_logits

        def fails(*args):
            if not failed:
                failed.append(1)
                raise torch.OutOfMemoryError("on purpose")
            return readout(*args)

        monkeypatch.setattr(_answers, "read_logits", fails)
    assert float((swept(model).values - expected).abs().max()) <= 1e-5
    assert failed


def test_a_read_that_fails(folders, monkeypatch):
    """What was there before is gone, and the next call reads again."""
    _, model = both(folders("llama"))
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(tokens)
        for error in (KeyboardInterrupt, RuntimeError):
            with monkeypatch.context() as patch:

                def fails(self, layer, error=error):
                    raise error("on purpose")

                patch.setattr(StreamedBlocks, "_read", fails)
                streamed_of(model.bridge)._next.clear()
                with pytest.raises(error):
                    model(tokens)
            assert torch.equal(model(tokens), expected)


def test_a_thread_that_reads_weights_meanwhile(folders):
    _, model = both(folders("llama"))
    tokens, weights, stop, wrong = torch.tensor([[5, 6, 7]]), model.W_in, threading.Event(), []

    def reads():
        while not stop.is_set():
            if not torch.equal(model.W_in, weights):
                wrong.append(1)

    with torch.no_grad():
        expected = model(tokens)
        thread = threading.Thread(target=reads)
        thread.start()
        try:
            assert all(torch.equal(model(tokens), expected) for _ in range(20))
        finally:
            stop.set()
            thread.join()
    assert not wrong


@pytest.mark.parametrize("error", [RuntimeError, ValueError, ZeroDivisionError])
def test_errors_of_a_metric_are_the_users(error, folders):
    _, model = both(folders("llama"))
    pairs, calls = make_pairs(ONE_LENGTH), []

    def metric(logits):
        calls.append(1)
        if len(calls) > 2:  # those of the unedited runs
            raise error("my own")
        return logits[:, -1, 5]

    with pytest.raises(error, match="my own"):
        mk.activation_patching(model, pairs, metric, site="z", progress=False)
    assert len(calls) <= 2 + model.n_layers * model.n_heads
    assert not model.has_hooks


def test_a_failed_second_wrapping_leaves_the_blocks_as_they_are(folders, monkeypatch):
    _, model = both(folders("llama"))
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(tokens)
        with pytest.raises(KeyboardInterrupt), streamed_of(model.bridge).zeros():
            raise KeyboardInterrupt
        assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("failing", [2, 3, 5])
def test_out_of_memory_in_a_later_group(failing, folders, monkeypatch):
    """The batches that had an answer are run again with the others of their group, and count once."""
    in_memory, model = both(folders("llama"))
    expected, calls, halved = swept(in_memory).values, [], []
    readout, halve = _answers.read_logits, Budget.halve
    monkeypatch.setattr("mechkit.engine._memory.CPU_TOKENS", 24)
    monkeypatch.setattr(Budget, "tokens_waiting", lambda *_: 40)
    monkeypatch.setattr(Budget, "halve", lambda self: halved.append(1) or halve(self))

    def fails(*args):
        calls.append(1)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("on purpose")
        return readout(*args)

    monkeypatch.setattr(_answers, "read_logits", fails)
    assert float((swept(model).values - expected).abs().max()) <= 1e-4
    assert halved == [1]


def test_in_step():
    log = []

    def work(name, layers):
        for layer in layers:
            yield layer
            log.append((layer, name))
        return name

    assert in_step([work("a", range(4)), work("b", range(2, 4)), work("c", ())]) == ["a", "b", "c"]
    assert log == [(0, "a"), (1, "a"), (2, "a"), (2, "b"), (3, "a"), (3, "b")]
    assert at_once(work("d", range(2))) == "d"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs a limit of the address space")
def test_a_model_four_times_as_large_as_the_memory(tmp_path):
    arguments = ["--layers", "24", "--width", "896", "--prompts", "1", "--first-difference", "13"]
    out = tmp_path / "figures.json"
    command = [sys.executable, BENCHMARK, *arguments, "--budget", str(48 * 2**20), "--json", out]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    found = json.loads(out.read_text())
    streamed = found["streamed"]
    assert streamed["allowed"] <= found["block_bytes"] / 3.9
    assert streamed["replay"] == found["memory"]["replay"] == "suffix"
    if streamed["halvings"]:  # addresses ran out, as they may: batches are others then
        assert found["largest_difference"] <= 1e-4
    else:
        assert found["equal_to_the_bit"]
        assert streamed["reads"] == 3
