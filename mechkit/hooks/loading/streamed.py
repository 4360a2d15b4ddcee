"""Loading a model whose blocks stay on the disk (`stream=True`): for models that are larger than the memory.

1. The model is made without weights, its buffers with their numbers. No file is read as a whole.
2. Every parameter is looked up in the checkpoint's files, by the names that transformers gives to stored weights. One that is not
   there, or is stored in another form than the model has it (experts one by one, quantized), is a reason to refuse.
3. What is outside the blocks is read; the blocks' parameters are read when they are used (`mechkit.hooks._streamed`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from mechkit.hooks._identity import fact_of
from mechkit.hooks._streamed import StreamedBlocks, attach
from mechkit.hooks.loading.checkpoint import Stored, stored_tensors

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_streamed(
    source: str, config: Any, model_class: Any, *, dtype: torch.dtype, device: torch.device, common: Mapping[str, Any]
) -> Any:
    """A model of transformers in evaluation mode whose blocks' weights are read from its files when they are used.

    Args:
        source: A folder or a hub name.
        config: Its configuration.
        model_class: Which class to make, such as `AutoModelForCausalLM`.
        dtype: What weights are turned into.
        device: Where they are put.
        common: Further arguments for finding files: a revision.

    Raises:
        ValueError: no safetensors files there, or they hold the weights in another form than the model.
    """
    stored: dict[str, Stored] = {}
    for path in _files(source, common):
        stored |= stored_tensors(path)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = model_class.from_config(config, attn_implementation="eager", dtype=dtype)
    _make_buffers(model)
    if plan := model._get_dtype_plan(dtype):
        raise ValueError(
            f"stream: expected a model with weights of one dtype; {type(model).__name__} keeps {sorted(plan)[0]!r} in float32. "
            "Use dtype=torch.float32, or load it without stream=True"
        )
    found = _stored_by_parameter(model, stored)
    blocks = _blocks(model)
    in_blocks = {id(one) for block in blocks for one in block.parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))  # under each name, where several are tied
    outside = {name: one for name, one in every.items() if id(one) not in in_blocks}
    buffers = {name: model.get_buffer(name) for name in _buffer_names(model)}
    for name in buffers:
        if name not in found:
            raise ValueError(_not_there(model, name))
    missing, tensors = {name for name in outside if name not in found}, {**outside, **buffers}
    for name, empty in tensors.items():
        if name in found:
            _put(model, name, _checked(found[name], empty, name).read(empty.dtype).to(device))
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    for name, one in model.named_parameters(remove_duplicate=False):
        if id(one) not in in_blocks and one.device.type == "meta":
            raise ValueError(_not_there(model, name))
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
    names = {id(one): name for name, one in model.named_parameters()}
    where: list[dict[str, Stored]] = []
    for block in blocks:
        of_block: dict[str, Stored] = {}
        for name, empty in block.named_parameters():
            empty.requires_grad_(False)
            if (full := names[id(empty)]) not in found:
                raise ValueError(_not_there(model, full))
            of_block[name] = _checked(found[full], empty, full)
        where.append(of_block)
    attach(model, StreamedBlocks(blocks, where, device, fact_of))
    model.config.name_or_path = model.name_or_path = source
    with suppress(OSError):  # there may be none
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(source, **common)
    return model.eval()


def _make_buffers(model: Any) -> None:
    """Gives buffers their numbers, as transformers does when it loads a model. Those that it leaves as they are are refused: it
    is done twice, on other numbers."""
    made: list[dict[str, Tensor]] = []
    for fill in (0, 1):
        for module in model.modules():
            module._is_hf_initialized = False
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = torch.full(buffer.shape, fill, dtype=buffer.dtype)
        model.initialize_weights()
        made.append({name: buffer.clone() for name, buffer in model.named_buffers()})
    saved = set(model.state_dict())
    for name, buffer in made[1].items():
        if name not in saved and not torch.equal(buffer, made[0][name]):
            raise ValueError(
                f"stream: expected buffers that transformers knows how to make; {name!r} of {type(model).__name__} is not. Load "
                "it without stream=True"
            )


def _files(source: str, common: Mapping[str, Any]) -> list[str]:
    """The safetensors files of a folder or a hub name."""
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    quietly = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_gated_repo": True,
        **{name: value for name, value in common.items() if name == "revision"},
    }
    if (one := cached_file(source, ONE_FILE, **quietly)) is not None:
        return [one]
    if (index := cached_file(source, INDEX, **quietly)) is not None:
        files, _ = get_checkpoint_shard_files(source, index, revision=common.get("revision"))
        return list(files)
    raise ValueError(
        f"stream: expected {ONE_FILE} or {INDEX} at {source!r}, from which single weights can be read; there is none. Load the "
        "model once with transformers' from_pretrained, and save it with its save_pretrained(folder)"
    )


def _blocks(model: Any) -> list[nn.Module]:
    """The blocks: of all lists of as many modules as the model has layers, the one with most weights."""
    n = model.config.get_text_config().num_hidden_layers
    lists = [one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one) == n]
    if not lists:
        raise ValueError(
            f"stream: expected a list of {n} blocks in {type(model).__name__}, found none; load it without stream=True"
        )
    found = max(lists, key=lambda one: sum(p.numel() for p in one.parameters()))
    blocks = list(found)
    seen: set[int] = set()
    for block in blocks:
        mine = {id(p) for p in block.parameters()}
        if mine & seen:
            raise ValueError(
                f"stream: expected blocks with weights of their own; those of {type(model).__name__} share some. Load it without "
                "stream=True"
            )
        seen |= mine
    return blocks


def _buffer_names(model: nn.Module) -> list[str]:
    """Buffers that are saved with the weights."""
    saved = set(model.state_dict())
    return [name for name, _ in model.named_buffers() if name in saved]


def _stored_by_parameter(model: Any, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Where each parameter and buffer is stored, by its name in the model, as transformers renames what it loads.

    Raises:
        ValueError: something is stored in another form than the model has it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    wanted, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Stored] = {}
    for key in sorted(stored, key=_natural):
        name, converted = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, converted = rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            continue  # what the model has no use for
        if converted is not None:
            raise ValueError(
                f"stream: expected weights stored as {type(model).__name__} has them; {key!r} is a part of {name!r}, which "
                "transformers puts together when it loads the model. Load it without stream=True"
            )
        if name in found and not torch.equal(*(one.read(torch.float64) for one in (found[name], stored[key]))):
            raise ValueError(
                f"stream: expected each weight once; {name!r} is in the files as {found[name].name!r} and as {key!r}, and they "
                "differ. Load it without stream=True"
            )
        found[name] = stored[key]
    return found


def _natural(key: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"\.", key)]


def _checked(stored: Stored, empty: Tensor, name: str) -> Stored:
    if stored.shape != tuple(empty.shape):
        raise ValueError(
            f"stream: expected {name!r} {list(empty.shape)}, as the configuration says; it is {list(stored.shape)} in the file"
        )
    if empty.is_floating_point() and not stored.is_floating_point:
        raise ValueError(
            f"stream: expected weights in float64, float32, bfloat16 or float16; {name!r} is {stored.dtype} in the file, as in a "
            "quantized model. Take one that is not"
        )
    return stored


def _not_there(model: Any, name: str) -> str:
    return (
        f"stream: expected every weight of {type(model).__name__} in its files, {name!r} is not there. Load the model once "
        "with transformers' from_pretrained, and save it with its save_pretrained(folder)"
    )


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[key] = tensor
