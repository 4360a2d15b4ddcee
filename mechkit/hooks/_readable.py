"""Properties read from another library: its errors become a sentence, and a stack that lacks layers is refused."""

from __future__ import annotations

from functools import wraps
from typing import Any, TypeVar

from torch import Tensor

C = TypeVar("C", bound=type)

# Not stacked over layers
_OF_THE_MODEL = ("W_E", "W_pos", "W_U", "b_U")


def readable_weights(cls: C) -> C:
    """A class whose properties `W_…` and `b_…` raise a `ValueError`, where a model has no such weight, that says so."""
    for name, attribute in list(vars(cls).items()):
        if isinstance(attribute, property) and attribute.fget is not None and name.startswith(("W_", "b_")):
            setattr(cls, name, property(_in_words(name, attribute.fget), doc=attribute.__doc__))
    return cls


def _in_words(name: str, read: Any) -> Any:
    @wraps(read)
    def call(model: Any) -> Tensor | None:
        try:
            weight = read(model)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{name}: {model.name} ({model.cfg.architecture}) has no such weight by layer and head, or none in every layer "
                f"({reason[:200]}). model.bridge.original_model has the weights as they are"
            ) from error
        if isinstance(weight, Tensor) and name not in _OF_THE_MODEL and len(weight) != model.n_layers:
            raise ValueError(
                f"{name}: expected a weight in each of {model.n_layers} layers; {model.name} ({model.cfg.architecture}) has it "
                f"in {len(weight)} of them. model.bridge.blocks[layer] has each layer's own"
            )
        return weight

    return call
