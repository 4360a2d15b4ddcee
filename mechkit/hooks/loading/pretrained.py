"""Loading a model and its tokenizer as transformers reads them. Installs nothing, downloads only what a hub name asks for, and
runs no remote code unless asked to."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mechkit._check import ArgumentTypeError
from mechkit.hooks._devices import out_of_memory
from mechkit.hooks.loading.gguf import load_gguf
from mechkit.hooks.loading.pictures import FAMILIES
from mechkit.hooks.loading.probe import reads_pictures_alone
from mechkit.hooks.loading.quantized import PLAIN
from mechkit.hooks.loading.streamed import read_streamed
from mechkit.hooks.loading.where import locate

# Arguments of TransformerLens's loaders that fold, centre or rearrange weights, and of transformers' that quantize them.
_CHANGE_WEIGHTS = (
    *("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"),
    *("refactor_factored_attn_matrices", "enable_compatibility_mode"),
)
_QUANTIZE = ("load_in_8bit", "load_in_4bit", "quantization_config")


def load_hf(
    name: str | Path,
    *,
    dtype: torch.dtype,
    revision: str | None,
    trust_remote_code: bool,
    stream: torch.device | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """The Hugging Face model and tokenizer that `name` stands for; with a device in `stream` its blocks stay in their files, and
    are read to that device when they are used (`read_streamed`).

    Raises:
        ValueError: an argument that would change the weights, the file or folder is not there, a package that the format needs
            is not installed (it is named), or transformers cannot read a causal language model and a tokenizer there.
    """
    _check_arguments(dtype, kwargs)
    if stream is not None and kwargs:
        raise ValueError(
            f"{next(iter(kwargs))}: has no effect with stream=True, which reads the weights itself; leave it out"
        )
    source, arguments = locate(str(name))
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        common["revision"] = revision
    gguf_file = arguments.get("gguf_file")
    if gguf_file and importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{name!r} is a GGUF file; reading one needs the package `gguf` (pip install gguf)")
    if gguf_file and stream is not None:
        raise ValueError(
            f"stream: expected safetensors files, from which single weights can be read; {name!r} is a GGUF file. Load it once "
            "with transformers (from_pretrained(folder, gguf_file=...)), and save it with its save_pretrained(folder)"
        )
    with _reading(str(name), kwargs):
        if gguf_file and not kwargs:  # these may change what is loaded
            read = partial(_read, dtype=dtype, common={})
            model, tokenizer = load_gguf(Path(source) / gguf_file, dtype, read)
        else:
            model, tokenizer = _read(source, arguments, dtype=dtype, common=common, stream=stream, **kwargs)
    return model.eval(), tokenizer


def _read(
    source: str,
    arguments: dict[str, str],
    *,
    dtype: torch.dtype,
    common: dict[str, Any],
    stream: torch.device | None = None,
    **kwargs: Any,
) -> Any:
    """The model and the tokenizer, as transformers reads them."""
    from transformers import AutoConfig, AutoTokenizer

    common = {**common, **arguments}
    with warnings.catch_warnings():
        config = AutoConfig.from_pretrained(source, **common)
        model_class = _model_class(config)
        warnings.simplefilter("ignore", DeprecationWarning)
        if stream is not None:
            model = read_streamed(source, config, model_class, dtype=dtype, device=stream, common=common)
        else:
            # The config goes along, so that a GGUF file's header (seconds of parsing) is not read again to find it.
            model = model_class.from_pretrained(
                source, config=config, dtype=dtype, attn_implementation="eager", **common, **kwargs
            )
        if reads_pictures_alone(config) or not _has_tokenizer(source, arguments):
            return model, None
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, **common)
    return model, tokenizer


def _has_tokenizer(source: str, arguments: Mapping[str, str]) -> bool:
    """Whether a folder has files of a tokenizer; models of token ids come without. What is elsewhere is looked for."""
    folder = Path(source)
    if arguments or not folder.is_dir():
        return True
    return any(word in file.name for file in folder.iterdir() for word in ("token", "vocab", "spiece", "merges"))


def _check_arguments(dtype: torch.dtype, further: Mapping[str, Any]) -> None:
    """Raises `ValueError` for what would make the weights others than the model's own, or no numbers to compute with."""
    if dtype not in PLAIN:
        raise ValueError(f"dtype: expected torch.float64, float32, bfloat16 or float16, got {dtype}")
    if changing := [name for name in further if name in _CHANGE_WEIGHTS]:
        raise ValueError(
            f"{changing[0]}: HookedModel.from_pretrained() has no such argument. TransformerLens's changes the weights, and here "
            "they stay raw; leave it out"
        )
    if quantizing := [name for name in further if name in _QUANTIZE and further[name]]:
        raise ValueError(
            f"{quantizing[0]}: expected weights in float64, float32, bfloat16 or float16, as mechkit reads them; leave it out"
        )


@contextmanager
def _reading(name: str, further: Mapping[str, Any]) -> Iterator[None]:
    """Turns what transformers raises inside into a `ValueError` that says what was looked for, and the first of its reasons."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and out_of_memory(error)):
            raise
        if isinstance(error, ValueError) and str(error).startswith(("stream: ", "model: ")):
            raise
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        if isinstance(error, TypeError) and (odd := [one for one in further if f"argument '{one}'" in reason]):
            raise ArgumentTypeError(
                f"{odd[0]}: neither HookedModel.from_pretrained() nor transformers has such an argument: {reason[:300]}"
            ) from error
        raise ValueError(
            f"model: expected a hub name, a folder or a .gguf file of a causal language model and its tokenizer; transformers "
            f"finds none that it can read at {name!r}: {type(error).__name__}: {reason[:300]}"
        ) from error


def _model_class(config: Any) -> Any:
    """The class that TransformerLens expects for this architecture (a causal language model nearly always)."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForImageTextToText,
        AutoModelForMaskedLM,
    )

    if reads_pictures_alone(config):
        return AutoModelForImageClassification
    if getattr(config, "model_type", "") in FAMILIES:
        return AutoModelForImageTextToText
    architecture = (getattr(config, "architectures", None) or [""])[0]
    return AutoModelForMaskedLM if architecture.endswith("ForMaskedLM") else AutoModelForCausalLM
