"""Wrapping a model leaves it as it is: a copy of its modules is hooked, and the two share every weight."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

import mechkit as mk
from helpers.families import GQA, build_hf, build_of
from helpers.plain import layers
from helpers.tiny import make_pairs, whole_vocabulary
from mechkit.engine import _whole
from mechkit.hooks import _model

# Separate and joint projections: side by side (GPT-2, Falcon, Phi-3), interleaved by head (GPT-NeoX, BLOOM), and experts
FAMILIES = ("gpt2", "llama", "gemma2", "qwen2", "opt", "gpt_neox", "bloom", "falcon", "mixtral")
TOKENS = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(5))


def build(family: str) -> Any:
    return build_hf(family, torch.float32 if family == "mixtral" else torch.float64)


@torch.no_grad()
def logits(hf: Any) -> Tensor:
    return hf(TOKENS).logits.clone()


def state(hf: Any) -> dict[str, Any]:
    """What must stay as it is."""
    return {
        "modules": [(name, type(module), id(module), module.training) for name, module in hf.named_modules()],
        "attributes": [sorted(vars(module)) for module in hf.modules()],
        "hooks": [list(module._forward_hooks) + list(module._forward_pre_hooks) for module in hf.modules()],
        "parameters": [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in hf.named_parameters()],
        "buffers": [(name, b.data_ptr()) for name, b in hf.named_buffers()],
        "keys": list(hf.state_dict()),
        "config": (hf.config.to_dict(), hf.config._attn_implementation, hf.config.architectures),
        "generation": hf.generation_config.to_dict(),
    }


def same_as(model: mk.HookedModel, hf: Any, tolerance: float | None = None) -> None:
    """The hooked model's logits are the user's model's."""
    tolerance = close_enough(hf) if tolerance is None else tolerance
    with torch.no_grad():
        found, expected = model(TOKENS).double(), logits(hf).double()
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def close_enough(hf: Any) -> float:
    return {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}[hf.dtype]


def storage(*models: nn.Module) -> int:
    """Bytes that the tensors of models take together."""
    found = {}
    for model in models:
        for x in (*model.parameters(), *model.buffers()):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_users_model_is_as_before(family, tmp_path):
    hf = build(family)
    hf.set_attn_implementation("sdpa" if hf._supports_sdpa else "eager")
    next(hf.parameters()).requires_grad_(False)
    before, expected, weights = state(hf), logits(hf), copy.deepcopy(hf.state_dict())
    model = mk.HookedModel.from_hf(hf)
    pairs = make_pairs()
    mk.activation_patching(model, pairs, mk.logit_diff(pairs), progress=False)
    with model.hooks([("resid_pre", lambda x, hook: 2 * x)], []):
        model(TOKENS)
        assert torch.equal(logits(hf), expected)  # nobody's hooks are on it
    assert state(hf) == before
    assert torch.equal(logits(hf), expected)
    hf.save_pretrained(tmp_path)
    kind = hf.config._attn_implementation
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=hf.dtype, attn_implementation=kind).eval()
    assert list(again.state_dict()) == before["keys"]
    assert all(torch.equal(again.state_dict()[key], weights[key]) for key in weights)
    same_as(model, again, close_enough(hf))
    hf.load_state_dict(weights, strict=True)
    assert torch.equal(logits(hf), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_is_copied(family):
    hf = build(family)
    model = mk.HookedModel.from_hf(hf).bridge.original_model
    assert [id(p) for p in model.parameters()] == [id(p) for p in hf.parameters()]
    theirs = {b.data_ptr() for b in hf.buffers()}
    assert theirs <= {b.data_ptr() for b in model.buffers()}
    alone = storage(hf)
    assert storage(hf, model) <= 1.01 * alone
    assert storage(hf, copy.deepcopy(hf)) == 2 * alone  # the control


@pytest.mark.parametrize("trained", ["user's", "hooked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_either_trains_both(family, trained):
    hf = build(family)
    model = mk.HookedModel.from_hf(hf)
    before = logits(hf)
    run = hf if trained == "user's" else model.bridge.original_model
    optimizer = torch.optim.SGD(run.parameters(), lr=0.01)
    loss = (hf(TOKENS).logits if trained == "user's" else model(TOKENS)).log_softmax(-1)[..., 5].sum()
    loss.backward()
    joint = next(
        (p for name, p in hf.named_parameters() if "c_attn.weight" in name or "query_key_value.weight" in name), None
    )
    assert joint is None or float(joint.grad.abs().max()) > 0
    optimizer.step()
    assert float((logits(hf) - before).abs().max()) > 1e-3
    same_as(model, hf, close_enough(hf))
    if family in ("gpt2", "gemma2", "bloom", "falcon"):
        assert hf.lm_head.weight is hf.get_input_embeddings().weight is model.bridge.original_model.lm_head.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_written_to_later_are_both_models(family):
    """Loaded, edited in place, and edited behind autograd's back."""
    hf = build(family)
    model, before = mk.HookedModel.from_hf(hf), logits(hf)
    other = build(family)
    for edit in (
        lambda: hf.load_state_dict({key: 0.7 * value + 0.01 for key, value in other.state_dict().items()}),
        lambda: [p.data.mul_(0.9) for p in hf.parameters()],
        lambda: [p.data.mul_(0.9) for p in model.bridge.original_model.parameters()],
    ):
        edit()
        assert float((logits(hf) - before).abs().max()) > 1e-3
        same_as(model, hf, close_enough(hf))
        before = logits(hf)


@pytest.mark.parametrize("moved", ["user's", "hooked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_moving_either_moves_both(family, moved):
    hf = build(family)
    model = mk.HookedModel.from_hf(hf)
    one, other = (hf, model.bridge.original_model) if moved == "user's" else (model.bridge.original_model, hf)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        one.to(dtype)
        same_as(model, hf)
        assert model.dtype == hf.dtype == dtype
        for moved_too in (one, other):
            tensors = (*moved_too.parameters(), *moved_too.buffers())
            assert {x.dtype for x in tensors if x.is_floating_point()} == {dtype}
    mk.activation_patching(model, pairs := make_pairs(), mk.logit_diff(pairs), layers=[0], progress=False)


def test_what_is_moved_to_meta_is_the_users_alone_or_refused():
    """There are no weights there: the hooked model keeps its own, and says so where it lacks a buffer."""
    hf = build("gpt2")
    model, expected = mk.HookedModel.from_hf(hf), logits(hf)
    hf.to("meta")
    assert torch.allclose(model(TOKENS).detach(), expected, atol=1e-9)
    with pytest.raises(ValueError, match="device: expected a device, got 'meta'"):
        model.to("meta")
    hf = build("llama")
    model = mk.HookedModel.from_hf(hf)
    hf.to("meta")
    with pytest.raises(ValueError, match=r"'inv_freq' of its LlamaRotaryEmbedding is on the device 'meta'.*wrap it"):
        model(TOKENS)


# -- what is on the model before it is wrapped --------------------------------------------------------------------------


class Collects:
    """A hook that is an object, whose list the user reads."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen.append(output)

    def method(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen.append(output)


@pytest.mark.parametrize("kind", ["object", "method", "function"])
def test_hooks_that_are_on_the_model_run_in_both_and_collect_for_the_user(kind):
    hf = build("llama")
    collects = Collects()
    fn: Any = {"object": collects, "method": collects.method, "function": lambda *args: collects.seen.append(args[2])}[
        kind
    ]
    handle = hf.model.layers[1].mlp.register_forward_hook(fn)
    model = mk.HookedModel.from_hf(hf)
    assert not model.has_hooks
    collects.seen.clear()
    model(TOKENS)
    assert len(collects.seen) == 1
    logits(hf)
    assert len(collects.seen) == 2
    handle.remove()
    logits(hf)
    assert len(collects.seen) == 2
    model(TOKENS)  # what was on it when it was wrapped stays on the copy
    assert len(collects.seen) == 3


def test_a_hook_that_edits_is_part_of_the_model():
    hf = build("llama")
    hf.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 0.5 * output)
    hf.model.layers[2].register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] + hf.model.layers[0].mlp.down_proj.weight.sum(),), kwargs),
        with_kwargs=True,
    )
    model = mk.HookedModel.from_hf(hf)
    same_as(model, hf)
    pairs = make_pairs()
    found = mk.activation_patching(model, pairs, mk.logit_diff(pairs), layers=[1], progress=False)
    right = mk.activation_patching(model, pairs, mk.logit_diff(pairs), layers=[1], progress=False, replay=False)
    assert torch.allclose(found.values, right.values, atol=1e-9)


def replaced_forward(hf: Any) -> None:
    block = hf.model.layers[1]
    forward, own = block.forward, block.mlp.forward

    def scaled(hidden_states: Tensor, *args: Any, again: nn.Module = block, **kwargs: Any) -> Any:
        assert again is block
        return forward(hidden_states * 1.25, *args, **kwargs)

    block.forward = scaled
    block.mlp.forward = lambda x: own(x) * 0.5


def pruned(hf: Any) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(hf.model.layers[1].mlp.up_proj, "weight", amount=0.5)  # keeps a tensor that is no leaf


def shared(hf: Any) -> None:
    hf.model.layers[2].mlp = hf.model.layers[1].mlp


class Notes:
    """Something that cannot be copied, and refers to a module."""

    def __init__(self, layer: nn.Module) -> None:
        self.lock, self.layer = threading.Lock(), layer


def locked(hf: Any) -> None:
    """Things that no copy can be made of, and a module that is run through what keeps them."""
    layer, own = hf.model.layers[1], hf.model.layers[1].mlp.forward
    layer.guard, layer.notes = threading.Lock(), {"notes": Notes(layer.mlp)}
    layer.mlp.forward = lambda x: own(x) if layer.notes else x


def frozen(hf: Any) -> None:
    hf.model.layers[1].requires_grad_(False)


CHANGES: list[Callable[[Any], None]] = [replaced_forward, pruned, shared, locked, frozen]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_was_done_to_the_modules_is_in_the_copy(change):
    hf = build("llama")
    change(hf)
    before, expected = state(hf), logits(hf)
    model = mk.HookedModel.from_hf(hf)
    same_as(model, hf)
    own, theirs = set(map(id, model.bridge.original_model.modules())), set(map(id, hf.modules()))
    assert not own & theirs
    seen: list[Tensor] = []
    with model.hooks([(("mlp_out", layer), lambda x, hook: seen.append(x)) for layer in range(4)]):
        model(TOKENS)
    assert len(seen) == 4  # what runs is hooked, not the user's modules
    assert [p.requires_grad for p in model.bridge.original_model.parameters()] == [
        p.requires_grad for p in hf.parameters()
    ]
    assert state(hf) == before
    assert torch.equal(logits(hf), expected)
    with torch.no_grad():
        for p in hf.parameters():
            p.mul_(0.9)
    same_as(model, hf)


def test_what_cannot_be_copied_is_shared_and_what_refers_to_modules_is_not():
    hf = build("llama")
    locked(hf)
    copied = mk.HookedModel.from_hf(hf).bridge.blocks[1].original_component
    assert copied.guard is hf.model.layers[1].guard
    notes, theirs = copied.notes["notes"], hf.model.layers[1].notes["notes"]
    assert notes is not theirs
    assert notes.lock is theirs.lock
    assert notes.layer is not theirs.layer


def test_weights_that_transformer_lens_changes_are_the_copys(monkeypatch):
    """As its adapter of Baichuan 2 does, whose code comes with the model."""
    from transformer_lens.model_bridge.supported_architectures.llama import LlamaArchitectureAdapter

    def prepare_model(self: Any, hf_model: Any) -> None:
        hf_model.lm_head.weight.data = nn.functional.normalize(hf_model.lm_head.weight.data, dim=-1)

    hf = build("llama")
    with torch.no_grad():
        hf.lm_head.weight.copy_(nn.functional.normalize(hf.lm_head.weight, dim=-1))  # so that it computes the same
    before, expected = state(hf), logits(hf)
    monkeypatch.setattr(LlamaArchitectureAdapter, "prepare_model", prepare_model)
    model = mk.HookedModel.from_hf(hf)
    assert model.bridge.original_model.lm_head.weight is not hf.lm_head.weight
    assert state(hf) == before
    assert torch.equal(logits(hf), expected)
    same_as(model, hf)


def test_what_no_copy_can_be_made_of_is_refused():
    class Odd(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise RuntimeError("no copies of me")

    hf = build("llama")
    hf.lm_head.__class__ = Odd
    with pytest.raises(ValueError, match=r"hf_model: expected a model whose modules can be copied.*no copies of me"):
        mk.HookedModel.from_hf(hf)


def test_a_model_that_accelerate_moves(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain = build("gpt2")
    expected = logits(plain)
    hf = accelerate.cpu_offload(build("gpt2"))
    hooks = [module._hf_hook for module in hf.modules() if hasattr(module, "_hf_hook")]
    model = mk.HookedModel.from_hf(hf)
    assert torch.allclose(model(TOKENS).detach(), expected, atol=1e-9)
    assert torch.equal(logits(hf), expected)
    assert [module._hf_hook for module in hf.modules() if hasattr(module, "_hf_hook")] == hooks
    assert {p.device.type for p in hf.parameters()} == {"meta"}
    copies = [module._hf_hook for module in model.bridge.original_model.modules() if hasattr(module, "_hf_hook")]
    kept = {x.data_ptr() for hook in hooks if hook.weights_map for x in hook.weights_map.dataset.values()}
    maps = [hook.weights_map["weight"].data_ptr() for hook in copies if "weight" in (hook.weights_map or ())]
    assert maps
    assert set(maps) <= kept


# -- afterwards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_a_model_is_wrapped_twice(family):
    hf = build(family)
    one, other = mk.HookedModel.from_hf(hf), mk.HookedModel.from_hf(hf)
    expected = logits(hf)
    with one.hooks([("resid_pre", lambda x, hook: 2 * x)]):
        same_as(other, hf)
        assert float((one(TOKENS).detach() - expected).abs().max()) > 1e-3
    assert one.weights_hash == other.weights_hash
    assert one.lock is other.lock  # they freeze the same parameters while they run
    assert copy.deepcopy(one).lock is not one.lock


def test_the_hooked_model_outlives_the_users():
    hf = build("gpt2")
    model, expected, gone = mk.HookedModel.from_hf(hf), logits(hf), weakref.ref(hf)
    hf.transformer.h[0] = nn.Identity()
    hf.lm_head = nn.Linear(32, 61).double()
    parametrize.register_parametrization(hf.transformer.h[1].attn.c_attn, "weight", nn.Identity())
    assert torch.allclose(model(TOKENS).detach(), expected, atol=1e-9)
    del hf
    gc.collect()
    assert gone() is None
    assert torch.allclose(model(TOKENS).detach(), expected, atol=1e-9)


@pytest.mark.parametrize("part", ["mlp.down_proj", "self_attn.o_proj"])
def test_a_parametrized_weight_is_what_its_parameters_make_of_it(part):
    hf = build("llama")
    layer = hf.model.layers[1].get_submodule(part)
    nn.utils.parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.5)
    model, pairs = mk.HookedModel.from_hf(hf), make_pairs()
    same_as(model, hf)
    metric = whole_vocabulary(pairs)
    found, slow = (
        mk.activation_patching(model, pairs, metric, site="z", progress=False, replay=replay).values
        for replay in (True, False)
    )
    assert torch.allclose(found, slow, atol=1e-10, rtol=0)
    assert model.validate().heads < 1e-9
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2.0)  # training goes on, and reaches the hooked model
    same_as(model, hf)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_a_deep_copy_shares_nothing(family):
    hf = build(family)
    model = mk.HookedModel.from_hf(hf)
    copied, expected = copy.deepcopy(model), logits(hf)
    with torch.no_grad():
        for p in copied.bridge.original_model.parameters():
            p.mul_(0.5)
    assert torch.equal(logits(hf), expected)
    same_as(model, hf)
    assert float((copied(TOKENS) - model(TOKENS)).detach().abs().max()) > 1e-3
    assert storage(hf, copied.bridge.original_model) >= 2 * storage(hf)
    copied.bridge.original_model.float()
    assert {x.dtype for x in hf.parameters()} == {torch.float64}


def test_attention_and_mode_are_the_hooked_models_own():
    """A switch of the user's model changes nothing; of the copy, the numbers are the same, and advice names the copy."""
    hf = build("gpt2")
    model, pairs = mk.HookedModel.from_hf(hf), make_pairs()
    metric = mk.logit_diff(pairs)
    expected = mk.activation_patching(model, pairs, metric, site="resid_pre", over="layer pos", progress=False)
    hf.set_attn_implementation("sdpa")
    hf.train()
    hf.config.layer_norm_epsilon = 0.3
    for switched in (False, True):
        if switched:
            model.bridge.original_model.set_attn_implementation("sdpa")
        found = mk.activation_patching(model, pairs, metric, site="resid_pre", over="layer pos", progress=False)
        assert torch.allclose(found.values, expected.values, atol=1e-9, equal_nan=True)
    assert model.bridge.original_model.config._attn_implementation == "sdpa"
    assert 'model.bridge.original_model.set_attn_implementation("eager")' in _whole.advice(model)
    assert hf.config._attn_implementation == "sdpa"
    assert hf.training
    assert not model.training


def test_a_model_that_was_just_loaded_is_not_copied(monkeypatch, tmp_path):
    """Nobody else has it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    hf = build("llama").float()
    hf.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(61)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)

    def never(model: Any) -> Any:
        raise AssertionError("copied")

    monkeypatch.setattr(_model, "shared_tree", never)
    same_as(mk.HookedModel.from_pretrained(tmp_path, device="cpu"), hf, 1e-4)
    with pytest.raises(AssertionError, match="copied"):
        mk.HookedModel.from_hf(hf)  # the control


def test_rotary_frequencies_that_follow_the_prompt_are_each_models_own():
    """transformers keeps those of the longest prompt; the hooked model forgets them, and the user's must not."""
    arguments = GQA | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}
    arguments |= {"max_position_embeddings": 8}
    hf, plain = build_of("llama", arguments), build_of("llama", arguments)
    model = mk.HookedModel.from_hf(hf)
    longer, long = (torch.arange(3, 3 + n)[None] for n in (30, 12))
    with torch.no_grad():
        hf(longer), plain(longer)
        model.bridge(TOKENS), model.bridge(longer)
        assert torch.equal(hf(long).logits, plain(long).logits)
        fresh = build_of("llama", arguments)
        assert torch.allclose(model.bridge(long), fresh(long).logits, atol=1e-9)
        assert not torch.allclose(fresh(long).logits, plain(long).logits, atol=1e-4)  # the control


def test_joint_projections_of_an_mlp():
    hf = build_of("phi3", GQA)
    model = mk.HookedModel.from_hf(hf)
    assert set(model.bridge.original_model.parameters()) == set(hf.parameters())
    same_as(model, hf)
    with torch.no_grad():
        for block in layers(hf):
            block.self_attn.qkv_proj.weight.mul_(0.5)
            block.mlp.gate_up_proj.weight.mul_(0.5)
    same_as(model, hf)


def test_a_trained_model_is_validated_against_the_model_that_shares_its_weights():
    """What was noted at load is of other weights by then."""
    hf = build_hf("llama")
    model = mk.HookedModel.from_hf(hf)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        hf.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    assert model.validate().logits < 1e-9
    assert copied.validate().logits < 1e-9  # whose weights are as they were
    model.bridge.blocks[0].mlp.register_forward_hook(lambda *_: _[2] * 2)
    with pytest.raises(ValueError, match=r"logits against the Hugging Face model .* when it was wrapped"):
        model.validate()
    loaded = mk.HookedModel.from_hf(build_hf("llama"))  # nobody keeps what it was made of
    with torch.no_grad():
        next(loaded.parameters() if hasattr(loaded, "parameters") else loaded.bridge.parameters()).mul_(1.5)
    assert loaded.validate().logits is None


@pytest.mark.parametrize("how", ["assign", "module", "parameter", "setting"])
def test_a_model_that_no_longer_follows_is_found(how: str) -> None:
    """What puts other parameters or modules in the place of those that are shared."""
    hf = build_hf("llama")
    model = mk.HookedModel.from_hf(hf)
    with torch.no_grad():
        hf.model.layers[0].mlp.up_proj.weight.data[1, 1] += 5  # behind autograd's back, in both
    assert model.validate().logits < 1e-9  # the control
    mlp = hf.model.layers[0].mlp
    if how == "assign":
        hf.load_state_dict({name: value * 1.1 for name, value in hf.state_dict().items()}, assign=True)
    elif how == "module":
        mlp.up_proj = nn.Sequential(mlp.up_proj, nn.Linear(*[mlp.up_proj.out_features] * 2, dtype=torch.float64))
    elif how == "parameter":
        mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight * 1.1)
    else:
        hf.model.layers[0].input_layernorm.variance_epsilon = 0.5
    with pytest.raises(ValueError, match="when it was wrapped: one of the two was changed since"):
        model.validate()
