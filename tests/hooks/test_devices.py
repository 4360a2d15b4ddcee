"""Models whose layers are not all in one place: accelerate's hooks, and weights that are put away."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mechkit as mk
from helpers.families import N_LAYERS, build_hf
from helpers.tiny import LENGTH, make_model, make_pairs, whole_vocabulary
from mechkit.engine import _memory
from mechkit.engine._plain import PlainBlocks

accelerate = pytest.importorskip("accelerate")


def dispatched(family: str, how: str, folder: str) -> nn.Module:
    hf = build_hf(family)
    if how == "map":
        return accelerate.dispatch_model(hf, {"": "cpu"}, main_device="cpu", force_hooks=True)
    return accelerate.cpu_offload(hf) if how == "cpu offload" else accelerate.disk_offload(hf, folder)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:accelerate")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["map", "cpu offload", "disk offload"])
def test_a_dispatched_model_gives_the_same_numbers(family, how, tmp_path):
    """Weights that were put away are on the device "meta" when nobody uses them, and are again afterwards."""
    pairs = make_pairs()
    metric, plain = whole_vocabulary(pairs), make_model(family)
    model = mk.HookedModel.from_hf(dispatched(family, how, str(tmp_path)), name=family)
    away = any(p.device.type == "meta" for p in model.bridge.original_model.parameters())
    assert away == (how != "map")
    assert model.device == torch.device("cpu")
    for site in ("z", "mlp_out", "pattern"):
        over = "layer pos head" if site != "mlp_out" else "layer pos"
        expected = mk.activation_patching(plain, pairs, metric, site=site, over=over, progress=False)
        found = mk.activation_patching(model, pairs, metric, site=site, over=over, progress=False)
        assert found.provenance["replay"] == "suffix"
        assert float((found.values - expected.values).nan_to_num().abs().max()) <= 1e-10
        assert float((found.values - found.baseline["corrupted"]).nan_to_num().abs().max()) > 1e-3
    assert any(p.device.type == "meta" for p in model.bridge.original_model.parameters()) == away
    few = mk.activation_patching(model, pairs, mk.logit_diff(pairs), progress=False)
    assert torch.allclose(few.values, mk.activation_patching(plain, pairs, mk.logit_diff(pairs), progress=False).values)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:accelerate")
def test_the_fingerprint_is_of_the_weights_that_were_put_away(tmp_path):
    away = mk.HookedModel.from_hf(dispatched("llama", "disk offload", str(tmp_path)))
    assert away.weights_hash == mk.HookedModel.from_hf(build_hf("llama")).weights_hash
    assert away.weights_hash != mk.HookedModel.from_hf(build_hf("llama", seed=1)).weights_hash


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_plain_blocks_keep_accelerates_hooks_and_run_no_bridge(family):
    """A replaced `forward` is bound to the module that it was made for; the copy's must run the copy."""
    hf = build_hf(family)
    if family != "falcon":  # there TransformerLens replaces it
        accelerate.dispatch_model(hf, {"": "cpu"}, main_device="cpu", force_hooks=True)
    model = mk.HookedModel.from_hf(hf)
    seen, moved = [], []
    points = [m for m in model.bridge.modules() if type(m).__name__ == "HookPoint"]
    run = mk.hooks.record(model, make_pairs().clean.tokens[0][None])
    handles = [point.register_forward_hook(lambda *_: seen.append(1)) for point in points]
    original = model.bridge.blocks[1].original_component
    hook = getattr(original, "_hf_hook", None)
    if hook is not None:
        pre = hook.pre_forward
        hook.pre_forward = lambda module, *args, **kwargs: moved.append(module) or pre(module, *args, **kwargs)
    replayer = mk.engine.Replayer(model, run, PlainBlocks(model.stack))
    prompt = torch.zeros(1, dtype=torch.long)
    found = replayer._call(1, run.resid[1], replayer._prefix(1, prompt, 0), 0)
    assert not seen
    assert torch.allclose(found, run.resid[2], atol=1e-12)
    assert family == "falcon" or (len(moved) == 1 and moved[0] is not original)
    replayer._call(1, run.resid[1], replayer._prefix(1, prompt, 0), 0, hooked=True)
    assert seen  # the control: the bridge's block has hook points
    for handle in handles:
        handle.remove()


def test_the_default_budget_looks_at_every_gpu(monkeypatch):
    """The one with the least memory bounds it; a user's own budget is what it is."""
    model = make_model("llama")
    assert _memory.Budget.of(model, None).bytes == _memory.CPU_BUDGET
    free = {"cuda:0": 8 * 2**30, "cuda:1": 2**30}
    monkeypatch.setattr(type(model), "devices", [torch.device(d) for d in ("cpu", "cuda:0", "cuda:1")], raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[str(device)], 0))
    assert _memory.Budget.of(model, None).bytes == 2**29
    assert _memory.Budget.of(model, None).tokens is None
    assert _memory.Budget.of(model, 1000).bytes == 1000


def spread(hf: nn.Module, layers: nn.ModuleList, first: str, second: str) -> nn.Module:
    """The first half of the layers with the embedding on one device, the rest on the other."""
    names = {id(m): n for n, m in hf.named_modules()}
    device_map = {name: second for name, p in hf.named_children() if name == "lm_head"}
    parent = names[id(layers)].rpartition(".")[0]
    for name, child in hf.get_submodule(parent).named_children():
        full = f"{parent}.{name}"
        if child is layers:
            device_map |= {f"{full}.{i}": first if i < N_LAYERS // 2 else second for i in range(N_LAYERS)}
        else:
            device_map[full] = second if name in ("norm", "ln_f") else first
    return accelerate.dispatch_model(copy.deepcopy(hf), device_map, main_device=first)


@pytest.mark.cuda
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("order", [("cpu", "cuda:0"), ("cuda:0", "cpu")])
def test_half_of_the_layers_on_the_cpu_and_half_on_a_gpu(family, order, cuda):
    pairs = make_pairs()
    metric, hf = whole_vocabulary(pairs), build_hf(family)
    layers = hf.model.layers if family == "llama" else hf.transformer.h
    model = mk.HookedModel.from_hf(spread(hf, layers, *order))
    assert {d.type for d in model.devices} == {"cpu", "cuda"}
    for site in ("z", "mlp_out", "pattern", "resid_post"):
        over = "layer pos head" if site in ("z", "pattern") else "layer pos"
        expected = mk.activation_patching(make_model(family), pairs, metric, site=site, over=over, progress=False)
        found = mk.activation_patching(model, pairs, metric, site=site, over=over, progress=False)
        assert found.provenance["replay"] == "suffix"
        assert float((found.values - expected.values).nan_to_num().abs().max()) <= 1e-10
    assert found.values.shape[1] == LENGTH
