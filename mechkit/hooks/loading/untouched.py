"""What a model of transformers computes before anything is done to it: what its hooked copy is compared with."""

from __future__ import annotations

from typing import Any

import torch

from mechkit.hooks._context import context_of
from mechkit.hooks._devices import input_device
from mechkit.hooks._streamed import streamed_of
from mechkit.hooks.loading import hf
from mechkit.hooks.loading.probe import Probe, pictured_probe, placeholder_of, probe_tokens, reads_pictures_alone
from mechkit.hooks.loading.quantized import check_plain_weights
from mechkit.prompts import Stacked


def probe_of(hf_model: Any) -> Probe | None:
    """What a model computes that nothing was done to yet; `None` in training mode.

    Raises:
        ValueError: quantized weights, a model that does not run on token ids (or pictures) alone.
    """
    if streamed_of(hf_model) is None:  # whose weights were looked at in their files
        check_plain_weights(hf_model)
    if hf_model.training:
        return None
    config, device = hf_model.config, input_device(hf_model)
    pictured = pictured_probe(hf_model)

    def given(rows: Stacked) -> dict[str, Any]:
        inputs = rows.to(device).arguments
        return {name: one.to(hf_model.dtype) if one.is_floating_point() else one for name, one in inputs.items()}

    with torch.no_grad():
        if reads_pictures_alone(config) and pictured is not None:
            with hf.refusing(f"{type(hf_model).__name__} does not run on pictures alone", hf_model):
                return Probe(pictured, hf_model(**given(pictured)).logits[:, None])
        text = config.get_text_config()
        rows = Stacked(probe_tokens(text.vocab_size, context_of(text), placeholder_of(config))).to(device)
        with hf.refusing(f"{type(hf_model).__name__} does not run on token ids alone", hf_model):
            logits = hf_model(rows.tokens).logits
        if pictured is None:
            return Probe(rows, logits)
        with hf.refusing(f"{type(hf_model).__name__} does not run on a picture", hf_model):
            seen = hf_model(pictured.tokens.to(device), **given(pictured)).logits
        return Probe(rows, logits, (pictured, seen))
