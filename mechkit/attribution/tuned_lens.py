"""Tuned lens: an affine map for each layer that predicts the final residual stream from the layer's.

1. For each layer but the last, a translator `h -> h + A h + b`, applied to `resid_post`; then the model's own final norm and
   unembedding. With A = 0 and b = 0 it is the logit lens.
2. The translators are fitted so that the distribution that they read is close to the model's own, in KL(final ‖ lens), on
   running text: first in closed form, then by gradient steps (`_tuned_fit.py`).
3. A translator is kept only where it is better than the logit lens on text that it was not fitted on.

A translator predicts the *direction* of the final residual stream, on its usual scale: the final norm follows.

Belrose et al. 2023, https://arxiv.org/abs/2303.08112.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechkit._check import checked
from mechkit._drawn import Drawn
from mechkit._files import decoding, read_tensors, write_tensors
from mechkit.attribution._tuned_fit import FitSettings, fit_translators
from mechkit.engine import check_can_run
from mechkit.experiment.axes import choose_indices
from mechkit.experiment.positions import split_prompts
from mechkit.experiment.provenance import provenance_of
from mechkit.hooks import HookedModel, check_stream, one_at_a_time
from mechkit.prompts import AnyPrompts, as_prompts

_FORMAT = 1


@checked
@dataclass(frozen=True, eq=False)
class TunedLens(Drawn):
    """Translators of the residual stream after each layer. Make one with `TunedLens.fit` or `TunedLens.load`.

    Attributes:
        A, b: The translators `h -> h + A h + b`.
        layers: The layer that each belongs to. The last layer needs none.
        n_layers: Of the model.
        provenance: JSON values: the model's name and weights hash, the hash of the text, how it was fitted, and
            `validation_kl`: for each layer, mean KL to the final distribution (nats) of the logit lens and of this lens, on
            at most 128 positions of the validation prompts. These also chose the ridge and when to stop, so the lens's is a
            little optimistic: measure it on other text.
    """

    A: Float[Tensor, "layer d_model d_model"]
    b: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]
    n_layers: int
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.b.ndim != 2 or not (self.A.is_floating_point() and self.b.is_floating_point()):
            raise ValueError(
                f"A, b: expected floating-point [layer d d] and [layer d], got {self.A.dtype} {list(self.A.shape)} and "
                f"{self.b.dtype} {list(self.b.shape)}"
            )
        n, d = len(self.layers), self.b.shape[-1]
        if self.A.shape != (n, d, d) or self.b.shape != (n, d):
            raise ValueError(
                f"A, b: expected [{n} d d] and [{n} d] for {n} layers, got {list(self.A.shape)} and {list(self.b.shape)}"
            )
        if not (self.A.isfinite().all() and self.b.isfinite().all()):
            raise ValueError("A, b: expected finite numbers, got NaN or infinite ones")
        if len(set(self.layers)) != n or not all(0 <= layer < self.n_layers for layer in self.layers):
            raise ValueError(
                f"layers: expected distinct layers below n_layers, {self.n_layers}; got {list(self.layers)}"
            )
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def __reduce__(self) -> tuple[Any, ...]:  # a mappingproxy can be neither pickled nor deep-copied
        return TunedLens, (self.A, self.b, self.layers, self.n_layers, dict(self.provenance))

    @classmethod
    @checked
    @one_at_a_time
    def fit(
        cls,
        model: HookedModel,
        prompts: AnyPrompts,
        *,
        validation: float = 0.2,
        layers: Sequence[int] | None = None,
        steps: int = 100,
        batch: int = 128,
        lr: float = 1e-4,
        vocabulary: int = 2048,
        skip_first: int = 0,
        seed: int = 0,
        budget: int | None = None,
        progress: bool = True,
    ) -> TunedLens:
        """Fits a lens on running text.

        A few thousand positions are enough to be far better than the logit lens at every layer; more text makes it better.

        Args:
            model: In evaluation mode.
            prompts: Text such as the lens will be used on, cut into prompts of tens or hundreds of tokens.
            validation: Share of the prompts that is kept apart, to choose the ridge, to stop early, and to decide between
                the translator and the logit lens. At least one prompt.
            layers: Which layers get a translator; all but the last by default.
            steps: Gradient steps after the closed form. 0 leaves it at that: a third of the time, and on SmolLM2 6 % more KL, and
                a first position that the middle layers' translators read worse than the logit lens does.
            batch: Positions in a step.
            lr: Adam's learning rate, in whitened coordinates; falls linearly to 0.
            vocabulary: Tokens drawn for each step, in addition to the most probable ones. The KL of a step is estimated from
                these: the normalizer is estimated without bias, its logarithm with a small one. What is kept at the end is
                decided with the whole vocabulary.
            skip_first: How many positions at the start of each prompt are left out of fitting and validation. The first
                position of many models has an activation hundreds of times larger than any other; by default it is kept, but
                each position counts inversely to its squared norm in the closed form, so that the lens can be used there too.
            seed: Of the split and the batches.
            budget: Bytes for activations, which also decides how many layers are fitted together; default half of what the
                device has free (1 GiB on a CPU). One layer is always fitted, however many bytes that takes.
            progress: Show a progress bar when it takes long.

        Raises:
            ValueError: fewer than two prompts, an argument out of range, training mode, a model whose logits are not a
                function of its last block's output.
        """
        prompts = as_prompts(model, prompts)
        text, _, _ = split_prompts(prompts)
        check_can_run(model, {"prompt": text})
        chosen = choose_indices("layers", range(model.n_layers - 1) if layers is None else layers, model.n_layers)
        if model.n_layers - 1 in chosen:
            raise ValueError(f"layers: the last layer, {model.n_layers - 1}, needs no translator; leave it out")
        settings = FitSettings(validation, steps, batch, lr, vocabulary, skip_first, seed)
        with torch.inference_mode(False):
            A, b, report = fit_translators(model, text, chosen, settings, budget, progress)
        provenance = provenance_of(model, text, technique="TunedLens.fit", **vars(settings), **report)
        return cls(A, b, tuple(chosen), model.n_layers, provenance)

    @checked
    def translate(self, layer: int, resid: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """What the lens expects `resid_post` of `layer` to have become after the last layer. The last layer's is itself.

        Raises:
            ValueError: a layer that the lens was not fitted for, a stream of another width or of whole numbers.
        """
        check_stream(resid, self.b.shape[-1])
        if layer == self.n_layers - 1:
            return resid
        if layer not in self.layers:
            raise ValueError(
                f"layer: expected one of the layers that this lens was fitted for, {list(self.layers)}; got {layer!r}"
            )
        i = self.layers.index(layer)
        wide = resid.to(torch.promote_types(resid.dtype, self.b.dtype))  # half precision would lose the sum
        A, b = (part.to(wide) for part in (self.A[i], self.b[i]))
        return (wide + wide @ A.T + b).to(resid.dtype)

    @checked
    def check(self, model: HookedModel, layers: Sequence[int] = ()) -> None:
        """Raises `ValueError` unless the lens was fitted on this very model, and has what these layers need."""
        fitted_on = self.provenance.get("weights_hash")
        if fitted_on != model.weights_hash:
            raise ValueError(
                f"lens: it was fitted on {self.provenance.get('model')} with weights {fitted_on}, but this is {model.name} with "
                f"weights {model.weights_hash}. Fit one for this model"
            )
        if missing := [layer for layer in layers if layer not in (*self.layers, self.n_layers - 1)]:
            raise ValueError(f"lens: it has translators for layers {list(self.layers)}, but not for {missing}")

    def hash(self) -> str:
        """A short hash of the translators, for provenance."""
        digest = hashlib.sha256(repr((self.layers, self.n_layers)).encode())
        for part in (self.A, self.b):
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        return f"TunedLens({self.provenance.get('model', 'no model')}: {len(self.layers)} of {self.n_layers} layers)"

    @checked
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a safetensors file that `load` reads back bit for bit."""
        header = {
            "format": _FORMAT,
            "layers": self.layers,
            "n_layers": self.n_layers,
            "provenance": dict(self.provenance),
        }
        return write_tensors(path, {"A": self.A, "b": self.b}, "mechkit_tuned_lens", header)

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str]) -> TunedLens:
        """Reads what `save` wrote, onto the CPU. Raises `ValueError` if the file is something else, or of another version."""
        tensors, header = read_tensors(path, "mechkit_tuned_lens", writer="TunedLens.save", names=("A", "b"))
        if header.get("format") != _FORMAT:
            raise ValueError(
                f"{path}: expected format {_FORMAT}, got {header.get('format')!r}: read it with the mechkit that wrote it"
            )
        with decoding(path, "a file written by TunedLens.save"):
            return cls(tensors["A"], tensors["b"], tuple(header["layers"]), header["n_layers"], header["provenance"])
