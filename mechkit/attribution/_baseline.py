"""Where integrated gradients of the input begin: what the first block reads from tokens without information."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechkit.experiment.estimates import Experiment, GradientChunk
from mechkit.hooks import HookedModel
from mechkit.prompts import Stacked


@dataclass(frozen=True, eq=False)
class Baseline:
    """Where the embeddings' path begins: `stand_in` is `"zero"`, `"mean"` or a token's id, `kept` each prompt's positions."""

    model: HookedModel
    stand_in: str | int
    keep: Literal["bos"] | list[int]
    kept: list[list[int]]

    @classmethod
    def of(cls, experiment: Experiment, baseline: str | int, keep: Sequence[int] | None) -> Baseline:
        """Checks what the user asked for."""
        model, tokens, shortest = experiment.model, experiment.base.tokens, int(experiment.base.lengths.min())
        if keep is not None:
            if any(isinstance(i, bool) or not hasattr(i, "__index__") or not 0 <= i < shortest for i in keep):
                raise ValueError(f"keep: expected positions in 0..{shortest - 1} (the shortest prompt), got {keep!r}")
            chosen = [i.__index__() for i in keep]
            return cls(model, _stand_in(model, baseline), chosen, [chosen] * len(tokens))
        bos = getattr(model.tokenizer, "bos_token_id", None)
        return cls(model, _stand_in(model, baseline), "bos", [[0] if int(row[0]) == bos else [] for row in tokens])

    @torch.no_grad()
    def start(
        self, chunk: GradientChunk, actual: Float[Tensor, "prompt pos d_model"]
    ) -> Float[Tensor, "prompt pos d_model"]:
        """What the first block reads when the tokens' embeddings are replaced where the model looks them up."""
        rows = chunk.inputs[chunk.experiment.base_is]
        token = self.stand_in if isinstance(self.stand_in, int) else None
        if token is None:
            start = self._looked_up(chunk, rows)
        else:
            text = torch.full_like(rows.tokens, token)  # the places of pictures are kept
            text = torch.where(self.model.placeholder_mask(rows.tokens), rows.tokens, text) if rows.inputs else text
            start = chunk.runs.embed(replace(rows, tokens=text))
        for row, i in enumerate(chunk.ids.tolist()):
            start[row, self.kept[i]] = actual[row, self.kept[i]]
        return start

    def _looked_up(self, chunk: GradientChunk, rows: Stacked) -> Float[Tensor, "prompt pos d_model"]:
        found = self.model.bridge.original_model.get_input_embeddings()
        table = getattr(found, "original_component", found)  # itself, without the bridge's hook points
        vector = _mean_embedding(self.model, table) if self.stand_in == "mean" else torch.zeros(())
        fired: list[bool] = []

        def exchange(module: Any, args: Any, output: Tensor) -> Tensor:
            fired.append(True)
            return vector.to(output).expand_as(output).clone()

        handle = table.register_forward_hook(exchange)
        try:
            start = chunk.runs.embed(rows)
        finally:
            handle.remove()
        if not fired:
            raise ValueError(
                f"baseline: expected a token for {self.model.name}, which has no lookup; got {self.stand_in!r}"
            )
        return start


def _stand_in(model: HookedModel, baseline: str | int) -> str | int:
    """A baseline as `"zero"`, `"mean"` or a token's id."""
    wanted = f"expected 'zero', 'mean', a token id in 0..{model.d_vocab - 1}, or the text of one token"
    if isinstance(baseline, str) and baseline not in ("zero", "mean"):
        try:
            return model.to_single_token(baseline)
        except ValueError as error:
            raise ValueError(f"baseline: {wanted}; got {baseline!r}: {error}") from None
    if isinstance(baseline, str):
        return baseline
    if isinstance(baseline, bool) or not hasattr(baseline, "__index__") or not 0 <= baseline < model.d_vocab:
        raise ValueError(f"baseline: {wanted}; got {baseline!r}")
    return baseline.__index__()


def _mean_embedding(model: HookedModel, table: Any) -> Float[Tensor, "d_model"]:
    """The mean over the vocabulary of what the table gives (some models scale what is in it)."""
    ids = torch.arange(model.d_vocab, device=model.device)
    return torch.stack([table(some).double().sum(0) for some in ids.split(4096)]).sum(0) / model.d_vocab
