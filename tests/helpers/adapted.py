"""A layer as adapter libraries wrap it, whose `weight` is not all that it multiplies with."""

from __future__ import annotations

from torch import Tensor, nn


class Adapted(nn.Module):
    """LoRA: the base layer's output, plus a low-rank term. `weight` and `bias` are the base layer's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 3, bias=False)
        self.up = nn.Linear(3, base.out_features, bias=False)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)
    in_features = property(lambda self: self.base_layer.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))
