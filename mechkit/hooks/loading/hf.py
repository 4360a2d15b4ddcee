"""Wraps a transformers model in TransformerLens's bridge; errors of other libraries become mechkit's own."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechkit._check import ArgumentTypeError, shown
from mechkit.hooks._devices import out_of_memory
from mechkit.hooks._joint import read_joint_projections
from mechkit.hooks._shared_tree import follow_weight
from mechkit.hooks._streamed import streamed_of

_ADAPTERS = threading.RLock()  # whose class is changed for a moment


def check_hf_model(hf_model: Any) -> None:
    """Raises `TypeError` for what is no model of transformers."""
    a_bridge = hasattr(hf_model, "original_model")
    of_transformers = hasattr(getattr(hf_model, "config", None), "get_text_config")
    if isinstance(hf_model, torch.nn.Module) and of_transformers and not a_bridge:
        return
    cure = ""
    if type(hf_model).__name__ == "HookedModel":
        cure = ". It is wrapped already: use it as it is"
    elif a_bridge:
        cure = ". Wrap it: HookedModel.from_bridge(bridge)"
    elif isinstance(hf_model, str | Path):
        cure = f". Load it: HookedModel.from_pretrained({str(hf_model)[:60]!r})"
    elif isinstance(hf_model, type) or hasattr(hf_model, "get_text_config"):
        cure = ". Make the model first: AutoModelForCausalLM.from_pretrained(name), or .from_config(config)"
    raise ArgumentTypeError(
        f"hf_model: expected a model of transformers, such as a GPT2LMHeadModel; got {shown(hf_model)}{cure}"
    )


def check_bridge(bridge: Any) -> None:
    """Raises `TypeError` for what is no TransformerBridge."""
    if isinstance(bridge, torch.nn.Module) and all(
        hasattr(bridge, name) for name in ("original_model", "cfg", "adapter")
    ):
        return
    cure = ""
    if type(bridge).__name__ == "HookedModel":
        cure = ". It is wrapped already: use it as it is"
    elif hasattr(getattr(bridge, "config", None), "get_text_config"):
        cure = ". Wrap it: HookedModel.from_hf(model, tokenizer)"
    raise ArgumentTypeError(f"bridge: expected a TransformerBridge of TransformerLens, got {shown(bridge)}{cure}")


def build_bridge(hf_model: Any, tokenizer: Any | None, name: str) -> Any:
    """A TransformerBridge around a loaded model, on its raw weights.

    The model's submodules are wrapped in place and its attention is switched to the eager implementation: the bridge and the
    model are one and the same from here on. A model that the user goes on with is copied before (`shared_tree`).
    """
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    architecture = type(hf_model).__name__
    check_tokenizer(tokenizer)
    if not getattr(hf_model.config, "architectures", None):
        hf_model.config.architectures = [architecture]  # some configs lack it, and TransformerLens then refuses
    if getattr(hf_model.config, "position_embedding_type", "") is None:
        hf_model.config.position_embedding_type = (
            "nope"  # the same to transformers; TransformerLens would look for rotations
        )
    if hasattr(hf_model, "set_attn_implementation"):
        hf_model.set_attn_implementation("eager")
    refused = refusing(f"TransformerLens cannot hook {architecture}", hf_model)
    with warnings.catch_warnings(), refused, _zero_biases(hf_model), _head_with_a_weight(hf_model), _no_torchvision():
        warnings.simplefilter("ignore")  # notes on optional aliases that this architecture lacks
        streamed = streamed_of(hf_model)
        # TransformerLens's copies of joint projections' parts would be as many as there are blocks
        with nullcontext() if streamed is None else streamed.zeros():
            bridge = build_bridge_from_module(hf_model, architecture, hf_config=hf_model.config, model_name=name)
    read_joint_projections(bridge)
    head = getattr(hf_model.get_output_embeddings(), "original_component", None)
    if isinstance(head, torch.nn.Linear) and "bias" in head._buffers:
        head.register_forward_pre_hook(follow_weight)
    _place(bridge, hf_model)
    if tokenizer is not None:
        _give(bridge, tokenizer)
    return bridge


def check_tokenizer(tokenizer: Any | None) -> None:
    """Raises `TypeError` for what is no tokenizer of transformers."""
    if tokenizer is not None and not all(
        hasattr(tokenizer, name) for name in ("encode", "batch_decode", "bos_token_id")
    ):
        raise TypeError(
            "tokenizer: expected a tokenizer of transformers (AutoTokenizer.from_pretrained, or PreTrainedTokenizerFast with "
            f"tokenizer_object=...), got {type(tokenizer).__name__}"
        )


def _place(bridge: Any, hf_model: Any) -> None:
    """Sets the device on which TransformerLens puts token ids, for a model that was loaded with a `device_map`."""
    from transformer_lens.utilities.multi_gpu import count_unique_devices, find_embedding_device

    device = find_embedding_device(hf_model)
    if device is not None:
        bridge.cfg.device, bridge.cfg.n_devices = str(device), count_unique_devices(hf_model)


def _give(bridge: Any, tokenizer: Any) -> None:
    """Gives a bridge the user's own tokenizer. TransformerLens would read it again from its folder and change it. Its flags
    about special tokens are set accordingly."""
    from transformer_lens.model_bridge.sources._bridge_builder import detect_tokenizer_bos_eos

    bridge._tokenizer = bridge._driver.tokenizer = tokenizer  # the property `tokenizer` would do that
    bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(tokenizer)


@contextmanager
def _zero_biases(hf_model: Any) -> Iterator[None]:
    """Zeros, inside, for the biases that GPT-NeoX's fused projections lack with `attention_bias=False`: TransformerLens, which
    splits them into queries, keys and values, counts on them."""
    fused = [m for name, m in hf_model.named_modules() if name.endswith("query_key_value") and m.bias is None]
    fused = fused if getattr(hf_model.config, "model_type", "") == "gpt_neox" else []
    for module in fused:
        module.bias = torch.nn.Parameter(module.weight.new_zeros(module.weight.shape[0]))
    try:
        yield
    finally:
        for module in fused:
            module.bias = None


@contextmanager
def _no_torchvision() -> Iterator[None]:
    """TransformerLens asks for torchvision where a family's processor needs it. The models do not, and mechkit never uses it."""
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

    name = "_check_required_libraries"
    asks = getattr(ArchitectureAdapter, name, None)
    if asks is None:
        yield
        return

    def without(adapter: Any) -> None:
        adapter.required_libraries = [one for one in adapter.required_libraries if one != "torchvision"]
        asks(adapter)

    with _ADAPTERS:
        setattr(ArchitectureAdapter, name, without)
        try:
            yield
        finally:
            setattr(ArchitectureAdapter, name, asks)


@contextmanager
def refusing(what: str, hf_model: Any) -> Iterator[None]:
    """Turns whatever another library raises inside into a `ValueError` that names the architecture, the reason and a cure."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("model: "):
            raise
        raise _refusal(what, hf_model, error) from error
    except Exception as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        raise _refusal(what, hf_model, error) from error


def _refusal(what: str, hf_model: Any, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()).rstrip(".") or "no message"
    kind = getattr(getattr(hf_model, "config", None), "model_type", None)
    return ValueError(
        f"model: {what} (model_type {kind!r}): {type(error).__name__}: {reason[:300]}. Other settings of this architecture may "
        "work; docs/models.md lists what does"
    )


@contextmanager
def _head_with_a_weight(hf_model: Any) -> Iterator[None]:
    """TransformerLens looks at the `weight` of a head while it wraps a model, and fails where that is a `Sequential` of several.
    Such a head has one without content meanwhile."""
    head, config = hf_model.get_output_embeddings(), hf_model.config.get_text_config()
    if not isinstance(head, torch.nn.Module) or isinstance(getattr(head, "weight", None), Tensor):
        yield
        return
    size = config.vocab_size, config.hidden_size
    head.__dict__["weight"] = torch.empty(size, dtype=hf_model.dtype, device="meta")
    try:
        yield
    finally:
        del head.__dict__["weight"]
