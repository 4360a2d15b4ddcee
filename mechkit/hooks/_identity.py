"""What identifies a model: parameters, buffers, numbers that its modules keep, and its configuration.

Two models of equal weights compute different things if an epsilon, a rotary base, a window or a scale differs. So a model's
fingerprint covers

1. every parameter and buffer (also those that are not saved, such as rotary frequencies): shape, dtype, a checksum and a sample;
2. every plain value (number, text, tuple of these) that a module keeps, such as `variance_epsilon` or `sliding_window`;
3. the configuration: masks, caps and windows are read from it while the model runs.

What does not change numbers is omitted: the implementation of attention, dropout, ids of special tokens, names, and what a
module keeps between runs (how long the longest prompt was). Checksums are of integers, the same on every device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mechkit.hooks._devices import at_hand
from mechkit.hooks._streamed import streamed_of

# Settings of a configuration, and values that a module keeps, which change no number of an evaluation.
_NO_MATTER = {
    "architectures", "chunk_size_feed_forward", "dtype", "finetuning_task", "gradient_checkpointing", "id2label",
    "initializer_range", "inplace", "kernel_config", "label2id", "layerdrop", "loss_type", "max_seq_len_cached", "name_or_path",
    "output_attentions", "output_hidden_states", "output_router_logits", "p", "padding_idx", "prefix", "problem_type",
    "return_dict", "router_aux_loss_coef", "scale_grad_by_freq", "sparse", "task_specific_params", "tokenizer_class",
    "torch_dtype", "torchscript", "training", "transformers_version", "use_cache",
}  # fmt: skip
_NO_MATTER_ENDINGS = ("_token_id", "dropout", "_pdrop", "_dropout_prob")

# What TransformerLens's own attention and norms read from its configuration.
_READ_BY_BRIDGE = (
    "d_head", "eps", "layer_norm_folding", "n_heads", "n_key_value_heads", "positional_embedding_type", "qk_norm_after_rope",
    "rmsnorm_uses_offset", "rotary_adjacent_pairs", "rotary_interleaved_cos_sin", "scale_attn_by_inverse_layer_idx",
    "uses_rms_norm",
)  # fmt: skip

_PLAIN = (int, float, str, type(None), torch.dtype)
_FOLLOWS_THE_PROMPT = (
    "dynamic",
    "longrope",
)  # kinds of rotary embedding whose frequencies depend on the prompt's length
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Identity:
    """A model's fingerprint, computed again only after a change of the model."""

    def __init__(self) -> None:
        self._known: tuple[Any, str] | None = None

    @torch.no_grad()
    def of(self, bridge: Any) -> str:
        """The fingerprint of a bridge's model.

        It is kept until something changes. A change made behind autograd's back (`p.data[3] = 0`) is noticed only if it
        touches one of 64 sampled entries of the tensor.
        """
        modules = list(_own_modules(bridge.original_model))
        settings, tensors = _settings(bridge, modules), [*_parameters(modules), *_buffers(modules)]
        state = settings, _state(tensors)
        if self._known is None or self._known[0] != state:
            digest, streamed = hashlib.sha256(repr(settings).encode()), streamed_of(bridge)
            for name, owner, values in tensors:
                if streamed is not None and id(owner) in streamed.places:
                    checksum, sampled = streamed.fact(owner)
                    digest.update(_weight_described(name, owner, checksum) + sampled)
                else:
                    digest.update(_described(name, owner, values) + _sampled(values).numpy().tobytes())
            self._known = state, digest.hexdigest()[:16]
        return self._known[1]


@torch.no_grad()
def state_of_weights(bridge: Any) -> Any:
    """What differs after a change of parameters or buffers."""
    modules = list(_own_modules(bridge.original_model))
    return _state([*_parameters(modules), *_buffers(modules)])


def _state(tensors: list[Any]) -> list[Any]:
    """Of a weight that is read when it is used (`_streamed`) nothing: a change of its file, or of what was read, is an error."""
    return [(*_version(owner), float(_sampled(x).sum())) for _, owner, x in tensors if x.device.type != "meta"]


def fact_of(parameter: Tensor, before: tuple[int, bytes] | None) -> tuple[int, bytes]:
    """What enters a fingerprint of a parameter: its checksum (taken over from `before`, if that is given) and its sample."""
    checksum = _checksum(parameter) if before is None else before[0]
    return checksum, _sampled(parameter).numpy().tobytes()


def beside_weights(bridge: Any) -> str:
    """A fingerprint of all that decides a model's numbers but its parameters."""
    modules = list(_own_modules(bridge.original_model))
    digest = hashlib.sha256(repr(_settings(bridge, modules)).encode())
    for name, owner, values in _buffers(modules):
        digest.update(_described(name, owner, values))
    return digest.hexdigest()[:16]


def config_settings(config: Any) -> dict[str, Any]:
    """What of a configuration decides a model's numbers."""

    def matters(values: dict[str, Any]) -> dict[str, Any]:
        return {
            key: matters(value) if isinstance(value, dict) else value
            for key, value in values.items()
            if _matters(str(key))
        }

    return matters(config.to_dict())


def _matters(name: str) -> bool:
    return not (name.startswith("_") or name in _NO_MATTER or name.endswith(_NO_MATTER_ENDINGS))


Modules = list[tuple[str, nn.Module]]


def _settings(bridge: Any, modules: Modules) -> tuple[Any, ...]:
    """Everything but tensors."""
    config = getattr(bridge.original_model, "config", None)
    kept = [
        (
            name,
            type(module).__qualname__,
            [(key, value) for key, value in vars(module).items() if _is_setting(key, value)],
        )
        for name, module in modules
        if not _wraps(module)
    ]
    theirs = [(key, getattr(bridge.cfg, key, None)) for key in _READ_BY_BRIDGE]
    own = config_settings(config) if hasattr(config, "to_dict") else {}
    return kept, theirs, json.dumps(own, sort_keys=True, default=str)


def _is_setting(key: str, value: Any) -> bool:
    if key[0] == "_" or key in _NO_MATTER:
        return False
    if isinstance(value, tuple | list):
        return all(isinstance(part, _PLAIN) for part in value) and _matters(key)
    return isinstance(value, _PLAIN) and _matters(key)


def _own_modules(module: nn.Module, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """All modules once, except hook points, by their names in the model before it was wrapped."""
    seen = set() if seen is None else seen
    seen.add(id(module))
    yield path, module
    for name, child in module._modules.items():
        if child is not None and id(child) not in seen and type(child).__name__ != "HookPoint":
            inside = path if name == "_original_component" else f"{path}.{name}"
            yield from _own_modules(child, inside, seen)


def _wraps(module: nn.Module) -> bool:
    """Whether it is a module that TransformerLens has put around one of the model's own."""
    return type(module).__module__.startswith("transformer_lens.model_bridge.generalized_")


def _parameters(modules: Modules) -> Iterator[tuple[str, Tensor, Tensor]]:
    """`(name, parameter, its values)`, tied ones once."""
    seen: set[int] = set()
    for path, module in modules:
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{key}", parameter, at_hand(module, key, parameter)


def _buffers(modules: Modules) -> Iterator[tuple[str, Tensor, Tensor]]:
    """`(name, buffer, its values)`, also of tensors that a module keeps as it does numbers."""
    for path, module in modules:
        if _wraps(module):
            continue
        plain = [(key, value) for key, value in vars(module).items() if key[0] != "_" and isinstance(value, Tensor)]
        for key, value in [*module._buffers.items(), *plain]:
            if value is not None and value.device.type != "meta" and not _follows_the_prompt(module, key):
                yield f"{path}.{key}", value, value


def _follows_the_prompt(module: nn.Module, key: str) -> bool:
    """Whether it is a rotary frequency that the last prompt's length decides; the one that it is made from stays the same."""
    kinds = getattr(module, "rope_type", "")
    several = kinds.values() if isinstance(kinds, dict) else [kinds]
    varies = any(str(kind) in _FOLLOWS_THE_PROMPT for kind in several)
    return varies and key.endswith("inv_freq") and "original" not in key


def _described(name: str, owner: Tensor, values: Tensor) -> bytes:
    """A tensor's name, shape and checksum, and the dtype of a weight. Buffers of models that were converted are wider than those
    of models that were loaded, with the same numbers in them."""
    if isinstance(owner, nn.Parameter) or not values.is_floating_point():
        return _weight_described(name, values, _checksum(values))
    return f"{name}{tuple(values.shape)}{_checksum(values.double())}".encode()


def _weight_described(name: str, values: Tensor, checksum: int) -> bytes:
    return f"{name}{tuple(values.shape)}{values.dtype}{checksum}".encode()


def _version(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor is, and how often it was written to."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _sampled(values: Tensor) -> Tensor:
    flat = values.detach().flatten()
    return flat[:: max(1, flat.numel() // 64)].double().cpu()


def _checksum(values: Tensor) -> int:
    """A number that every bit of a tensor enters, and where it stands, on every device the same."""
    values = values.detach().contiguous()
    if values.numel() == 0:
        return 0
    bits = (torch.view_as_real(values) if values.is_complex() else values).view(_INTEGERS[values.element_size()])
    within = _weights(min(bits.numel(), _AT_ONCE), bits.device)
    sums = torch.stack([(part * within[: len(part)]).sum() for part in bits.reshape(-1).split(_AT_ONCE)])
    return int((sums * _weights(len(sums), bits.device)).sum())


_AT_ONCE = 2**18  # numbers that are weighed together, each by 8 bytes


def _weights(n: int, device: torch.device) -> Tensor:
    """Odd numbers without a pattern: with 1, 3, 5 … what moves up and what moves down by as much would cancel."""
    x = torch.arange(1, n + 1, device=device) * 0x1E3779B97F4A7C15
    x = (x ^ (x >> 29)) * 0x3F58476D1CE4E5B9
    return (x ^ (x >> 32)) | 1
