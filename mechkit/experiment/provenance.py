"""Where a result comes from: the model, the prompts, the arguments; for circuits also each prompt, so that it can
be checked whether they are evaluated on the prompts that they were found on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from mechkit._thumbnails import PromptPictures, limited
from mechkit._version import __version__
from mechkit.hooks import HookedModel
from mechkit.prompts import Prompts


def provenance_of(model: HookedModel, prompts: Prompts, **more: Any) -> dict[str, Any]:
    """Where a result comes from: the model, the prompts, this mechkit, and the technique's own arguments."""
    return {
        "model": model.name,
        "revision": model.revision,
        "weights_hash": model.weights_hash,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens_hash": prompts.hash(),
        "n_prompts": len(prompts),
        "mechkit": __version__,
        **more,
    }


def pictures_of(prompts: Prompts) -> PromptPictures | None:
    """What figures of a result about these prompts know of their pictures; `None` where all is text."""
    if prompts.segments is None or not any(s.kind == "image" for segments in prompts.segments for s in segments):
        return None
    segments = tuple(tuple(asdict(segment) for segment in one) for one in prompts.segments)
    return PromptPictures(segments, limited(prompts.thumbnails or ((),) * len(prompts)))


def prompt_hashes(prompts: Prompts) -> list[str]:
    """A short fingerprint of each prompt, by which it is known again."""
    return [prompts[[i]].hash()[:12] for i in range(len(prompts))]


def merged(*several: Iterable[str] | None) -> list[str] | None:
    """All prompts that something was found on, if they are known of every part of it."""
    if any(one is None for one in several):
        return None
    return sorted({prompt for one in several for prompt in one or ()})


def circuit_provenance(model: HookedModel, clean: Prompts, corrupted: Prompts, **more: Any) -> dict[str, Any]:
    """As all techniques say it, and each prompt by itself, clean and corrupted."""
    prompts = merged(prompt_hashes(clean), prompt_hashes(corrupted))
    return provenance_of(model, clean, d_model=model.d_model, **more) | {"prompts": prompts}
