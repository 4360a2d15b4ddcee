"""Defects that are planted into packed passes with gradients, one by one, to see whether their proof refutes them.

Some change what is computed (`FORWARD`); others nothing but the gradients that flow back through it (`BACKWARD`). `unproved` lets
attribution patching believe its packed passes, so that one can see which defects move an effect at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from helpers.planted import Defect, _patched
from mechkit.engine import _packed_gradients, _packed_together
from mechkit.engine._packed_gradients import PackedGradients
from mechkit.experiment import packed

_Together = _packed_together._Together


@contextmanager
def unproved() -> Iterator[None]:
    """Packed passes inside are believed without a look."""
    with ExitStack() as stack:
        for name in ("_try", "refuted", "gradients_refuted"):
            stack.enter_context(patch.object(PackedGradients, name, lambda *args: None))
        yield


@contextmanager
def one_length_at_a_time() -> Iterator[None]:
    """Nothing is packed inside."""
    with patch.object(packed, "_may_pack", lambda experiment: False):
        yield


def _joined(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Defect:
    """Keys or values of whole prompts are changed."""

    def make(right: Any) -> Any:
        return lambda self, runs, layer, which, new: change(which, right(self, runs, layer, which, new))

    return _patched(_Together, "joined", make)


def _new(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Defect:
    """Keys or values of packed tokens are changed before they join those of the prefix."""

    def make(right: Any) -> Any:
        return lambda self, runs, layer, which, new: right(self, runs, layer, which, change(which, new))

    return _patched(_Together, "joined", make)


def _mask(change: Callable[[torch.Tensor], torch.Tensor]) -> Defect:
    return _patched(_Together, "mask", lambda right: lambda self, *args: change(right(self, *args)))


def _prefix_of_the_prompt_before(right: Any) -> Any:
    def wrong(self: Any, rows: Any, at: Any, device: Any) -> None:
        right(self, rows, at, device)
        self.prompt = (self.prompt - 1).clip(0)

    return wrong


def _queries_of_the_token_before(right: Any) -> Any:
    def wrong(self: Any, rows: Any, at: Any, device: Any) -> None:
        right(self, rows, at, device)
        self.tokens = (self.tokens - 1).clamp(min=0)

    return wrong


def _the_padding_is_kept(right: Any) -> Any:
    def wrong(self: Any, rows: Any, at: Any, device: Any) -> None:
        right(self, rows, at, device)
        self.real = torch.arange(len(self.real), device=device)

    return wrong


def _source_prompts_are_run(right: Any) -> Any:
    def wrong(self: Any, model: Any, pairs: Any, *args: Any, **more: Any) -> None:
        right(self, model, pairs, *args, **more)
        source = PackedGradients.__new__(PackedGradients)
        right(source, model, [replace(one, base=one.source) for one in pairs], *args, **more)
        self._embedded = source._embedded

    return wrong


def _site_of_the_layer_below(right: Any) -> Any:
    def wrong(self: Any, site: str, layer: int) -> Any:
        module, gives = right(self, site, layer)
        return (right(self, "z", layer)[0], True) if site == "mlp_out" else (module, gives)

    return wrong


def _through(change: Callable[[torch.Tensor], torch.Tensor]) -> Defect:
    """What blocks give is changed."""
    return _patched(PackedGradients, "_together", lambda right: lambda self, *args: change(right(self, *args)))


FORWARD: dict[str, Defect] = {
    "keys of the row before": _joined(lambda which, x: x.roll(1, 0)),
    "keys one position late": _joined(lambda which, x: x.roll(1, 2)),
    "values of the token before": _new(lambda which, x: x.roll(1, 1) if which == "values" else x),
    "prefix of the prompt before": _patched(_Together, "__init__", _prefix_of_the_prompt_before),
    "queries of the token before": _patched(_Together, "__init__", _queries_of_the_token_before),
    "the padding is kept": _patched(_Together, "__init__", _the_padding_is_kept),
    "nothing is masked": _mask(torch.zeros_like),
    "mask of the position before": _mask(lambda x: torch.cat([x[:, :, :1], x[:, :, :-1]], 2)),
    "positions one late": _patched(
        PackedGradients, "_at_tokens", lambda right: lambda self, *args: right(self, *args).roll(1, -2)
    ),
    "source prompts are run": _patched(PackedGradients, "__init__", _source_prompts_are_run),
    "a site that is another's": _patched(PackedGradients, "_module", _site_of_the_layer_below),
}
BACKWARD: dict[str, Defect] = {
    "no gradient through keys": _joined(lambda which, x: x.detach() if which == "keys" else x),
    "no gradient through values": _joined(lambda which, x: x.detach() if which == "values" else x),
    "half of the gradient through a block": _through(lambda x: (x + x.detach()) / 2),
    "gradients of the token before": _through(lambda x: _GradientMoved.apply(x)),
}
DEFECTS = FORWARD | BACKWARD


class _GradientMoved(torch.autograd.Function):
    """Changes nothing; gradients come back to the token before."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.roll(1, 0)


def packs_taken(into: list[Any]) -> Any:
    """Inside, every packed pass is put into a list."""

    def make(right: Any) -> Any:
        def counted(self: Any, *args: Any, **more: Any) -> Any:
            into.append(self)
            return right(self, *args, **more)

        return counted

    return patch.object(_packed_gradients.PackedGradients, "forward", make(PackedGradients.forward))
