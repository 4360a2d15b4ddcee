"""What makes a model this model and no other: parameters, buffers, numbers that its modules keep, and its configuration.

Two models of equal weights compute different things if an epsilon, a rotary base, a window or a scale differs. So a model's
fingerprint is of

1. every parameter and buffer (also those that are not saved, such as rotary frequencies): shape, dtype, a checksum and a sample;
2. every plain value (number, text, tuple of these) that a module keeps, such as `variance_epsilon` or `sliding_window`;
3. the configuration: masks, caps and windows are read from it while the model runs.

What does not change numbers is left out: the implementation of attention, dropout, ids of special tokens, names, and what a
module keeps between runs (how long the longest prompt was). Checksums are of integers, the same on every device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mechkit.hooks._devices import weights_at_hand

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
    """A model's fingerprint, computed anew only when something of it has changed."""

    def __init__(self) -> None:
        self._known: tuple[Any, str] | None = None

    @torch.no_grad()
    def of(self, bridge: Any) -> str:
        """The fingerprint of a bridge's model.

        It is kept until something changes. A change made behind autograd's back (`p.data[3] = 0`) is noticed only if it
        touches one of 64 sampled entries of the tensor.
        """
        settings, tensors = _settings(bridge), list(_tensors(bridge.original_model))
        state = settings, tuple((*_version(owner), float(_sampled(x).sum())) for _, owner, x in tensors)
        if self._known is None or self._known[0] != state:
            digest = hashlib.sha256(settings.encode())
            for name, _, values in tensors:
                digest.update(f"{name}{tuple(values.shape)}{values.dtype}{_checksum(values)}".encode())
                digest.update(_sampled(values).numpy().tobytes())
            self._known = state, digest.hexdigest()[:16]
        return self._known[1]


def beside_weights(bridge: Any) -> str:
    """A fingerprint of all that decides a model's numbers but its parameters."""
    digest = hashlib.sha256(_settings(bridge).encode())
    for name, values in _buffers(bridge.original_model):
        wide = values.double() if values.is_floating_point() else values
        digest.update(f"{name}{tuple(values.shape)}{_checksum(wide)}".encode())
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


def _settings(bridge: Any) -> str:
    """Everything but tensors, as one text."""
    model = bridge.original_model
    config = getattr(model, "config", None)
    kept = [
        (
            name,
            type(module).__qualname__,
            [(key, value) for key, value in vars(module).items() if _is_setting(key, value)],
        )
        for name, module in _own_modules(model)
    ]
    theirs = [(key, getattr(bridge.cfg, key, None)) for key in _READ_BY_BRIDGE]
    own = config_settings(config) if hasattr(config, "to_dict") else {}
    return repr(kept) + repr(theirs) + json.dumps(own, sort_keys=True, default=str)


def _is_setting(key: str, value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(part, _PLAIN) for part in value) and _matters(key)
    return isinstance(value, _PLAIN) and _matters(key)


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules by their names in the model as it was before it was wrapped."""
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(
            ("transformer_lens.model_bridge.generalized_", "transformer_lens.hook_")
        ):
            yield _own_name(name), module


def _own_name(name: str) -> str:
    return name.replace("._original_component", "")


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """`(name, tensor, its values)` of all parameters and buffers."""
    for name, parameter, values in weights_at_hand(model):
        yield _own_name(name), parameter, values
    for name, buffer in _buffers(model):
        # Models that were converted have wider buffers than those that were loaded, of the same numbers.
        yield name, buffer, buffer.double() if buffer.is_floating_point() else buffer


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers, and tensors that a module keeps as it does numbers."""
    for path, module in _own_modules(model):
        buffers = {key: value for key, value in module._buffers.items() if value is not None}
        plain = {key: value for key, value in vars(module).items() if isinstance(value, Tensor) and _matters(key)}
        for key, value in (buffers | plain).items():
            if not _follows_the_prompt(module, key) and value.device.type != "meta":
                yield f"{path}.{key}", value


def _follows_the_prompt(module: nn.Module, key: str) -> bool:
    """Whether it is a rotary frequency that the last prompt's length decides; the one that it is made from stays the same."""
    kinds = getattr(module, "rope_type", "")
    several = kinds.values() if isinstance(kinds, dict) else [kinds]
    varies = any(str(kind) in _FOLLOWS_THE_PROMPT for kind in several)
    return varies and key.endswith("inv_freq") and "original" not in key


def _version(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor is, and how often it was written to."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _sampled(values: Tensor) -> Tensor:
    flat = values.detach().flatten()
    return flat[:: max(1, flat.numel() // 64)].double().cpu()


def _checksum(values: Tensor) -> int:
    """A number that every bit of a tensor enters, on every device the same."""
    values = values.detach().contiguous()
    if values.numel() == 0:
        return 0
    bits = (torch.view_as_real(values) if values.is_complex() else values).view(_INTEGERS[values.element_size()])
    rows = bits.reshape(len(bits) if bits.ndim > 1 else -1, *([-1] if bits.ndim > 1 else [1])).sum(1, dtype=torch.int64)
    return int((rows * torch.arange(1, 2 * len(rows), 2, device=rows.device)).sum())
