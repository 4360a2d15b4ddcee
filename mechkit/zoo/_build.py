"""Writing the weights of a GPT-2 by hand, feature by feature.

1. The residual stream carries named *features*. Feature f of value x is held by two dimensions, 2f and 2f + 1, as
   (+x, -x): whatever is written, the mean over dimensions stays zero, and LayerNorm's centring does nothing.
2. The embedding also writes a *ballast*, (+1e7, -1e7), into the last two dimensions. Next to it the features are
   nothing, so that LayerNorm's scale is the ballast's own. It varies by sum(x^2) / 2e14 of itself, and that is all the
   nonlinearity that is left of it. (What float64 loses next to numbers of this size is the same for both dimensions of
   a pair, and cancels.)
3. Every norm's gain is that scale, so that each block reads the features themselves.
4. A matrix that reads features takes (+1/2, -1/2) of each pair; one that writes them writes (+1, -1). Nothing reads
   the ballast.

All in float64, on the CPU, without a tokenizer. Do not zero `embed` or `resid_*` as a whole in these models: the
ballast would go with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechkit.hooks import HookedModel
from mechkit.metrics import Metric
from mechkit.prompts import PromptPairs

BALLAST = 1e7
SHARP = 40.0  # a score that lets exp(-40) = 4e-18 of the attention go elsewhere: nothing, next to 1 in float64

Role = tuple[tuple[int, int | None], ...]
Weights = Mapping[str, Tensor]  # feature -> matrix with one row per unit of that feature


@dataclass(frozen=True, eq=False)
class Known:
    """A model whose circuit is known.

    Attributes:
        model: In evaluation mode, float64.
        pairs: Prompts on which the circuit shows.
        metric: `logit_diff(pairs)`.
        roles: Role -> its components: `(layer, head)`, or `(layer, None)` for an MLP.
        circuit: The edges on which the difference between clean and corrupted prompt reaches the metric, by name:
            `"a0.h0->a1.h0<k>"`. Writers are `input` (token and position embedding), `a1.h0` (a head), `m1` (an MLP); readers
            `a1.h0<q>`, `a1.h0<k>`, `a1.h0<v>`, `m1`, `logits`. An edge is in it if and only if patching it changes the metric,
            alone or together with other edges of the circuit. So the circuit on clean values with all else corrupted
            gives the clean metric, and no edge of it is there in vain. Empty where every edge matters.
    """

    model: HookedModel
    pairs: PromptPairs
    metric: Metric
    roles: Mapping[str, Role]
    circuit: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for role, components in self.roles.items():
            for layer, head in components:
                if not (0 <= layer < self.model.n_layers and (head is None or 0 <= head < self.model.n_heads)):
                    raise ValueError(
                        f"roles[{role!r}]: expected components within {self.model.n_layers} layers and "
                        f"{self.model.n_heads} heads, got {(layer, head)}"
                    )
        known = all_edges(self.model.n_layers, self.model.n_heads)
        if unknown := sorted(set(self.circuit) - known):
            raise ValueError(
                f"circuit: expected edges of a model of {self.model.n_layers} layers and {self.model.n_heads} heads, such as "
                f"'input->a0.h0<v>', from a writer to a reader after it; got {unknown}"
            )
        object.__setattr__(self, "roles", MappingProxyType(dict(self.roles)))
        object.__setattr__(self, "circuit", frozenset(self.circuit))

    def __reduce__(self) -> tuple[Any, ...]:  # a mappingproxy can be neither pickled nor deep-copied
        return Known, (self.model, self.pairs, self.metric, dict(self.roles), self.circuit)


class HandWritten:
    """A GPT-2 whose weights are all zero until they are written, in terms of named features.

    Args:
        features: Feature -> how many units it has, e.g. one for each token.
        n_layers, n_heads, d_vocab, n_ctx: As usual.
        d_head: At least this wide; it is made wider where `n_heads * d_head` would not hold all features.
        d_mlp: Neurons in each MLP.
        activation: The MLPs' activation function, by transformers' name.
    """

    def __init__(
        self,
        features: Mapping[str, int],
        *,
        n_layers: int,
        n_heads: int,
        d_head: int,
        d_vocab: int,
        n_ctx: int,
        d_mlp: int = 1,
        activation: str = "linear",
    ) -> None:
        self.units: dict[str, slice] = {}
        n_units = 0
        for name, size in features.items():
            self.units[name] = slice(n_units, n_units + size)
            n_units += size
        self.d_head = max(d_head, math.ceil(2 * (n_units + 1) / n_heads))
        self.d_model = n_heads * self.d_head
        self.hf = _blank(
            n_layer=n_layers,
            n_head=n_heads,
            n_embd=self.d_model,
            vocab_size=d_vocab,
            n_positions=n_ctx,
            n_inner=d_mlp,
            activation_function=activation,
        )
        self._pairs = torch.zeros(n_units, self.d_model, dtype=torch.float64)  # P: features -> dimensions
        for unit in range(n_units):
            self._pairs[unit, 2 * unit : 2 * unit + 2] = torch.tensor([1.0, -1.0], dtype=torch.float64)
        self._write(self.hf.transformer.wte.weight, (slice(None), slice(-2, None)), torch.tensor([BALLAST, -BALLAST]))

    def embed(self, feature: str, values: Float[Tensor, "d_vocab unit"]) -> None:
        """What each token writes into a feature."""
        self._write(self.hf.transformer.wte.weight, slice(None), self._out(values, feature))

    def embed_positions(self, feature: str, values: Float[Tensor, "n_ctx unit"]) -> None:
        """What each position writes into a feature."""
        self._write(self.hf.transformer.wpe.weight, slice(None), self._out(values, feature))

    def head(
        self,
        layer: int,
        head: int,
        *,
        q: Weights | None = None,
        k: Weights | None = None,
        v: Weights | None = None,
        out: Mapping[str, Tensor] | None = None,
        q_bias: Tensor | None = None,
        v_bias: Tensor | None = None,
    ) -> None:
        """One head's weights. The attention score is `q . k`: the model's division by sqrt(d_head) is undone in `q`.

        Args:
            q, k, v: Feature -> `[unit, d]`, d at most d_head.
            out: Feature -> `[d, unit]`, written from the head's z.
            q_bias, v_bias: `[d]`.
        """
        attention, own = self.hf.transformer.h[layer].attn, head * self.d_head
        for i, (reads, bias, scale) in enumerate(
            ((q, q_bias, math.sqrt(self.d_head)), (k, None, 1.0), (v, v_bias, 1.0))
        ):
            first = i * self.d_model + own  # queries, keys and values side by side
            for feature, matrix in (reads or {}).items():
                columns = slice(first, first + matrix.shape[1])
                self._write(attention.c_attn.weight, (slice(None), columns), scale * self._in(matrix, feature))
            if bias is not None:
                self._write(attention.c_attn.bias, slice(first, first + len(bias)), scale * bias)
        for feature, matrix in (out or {}).items():
            rows = slice(own, own + len(matrix))
            self._write(attention.c_proj.weight, rows, self._out(matrix, feature))

    def mlp(
        self,
        layer: int,
        reads: Weights,
        writes: Mapping[str, Tensor],
        *,
        in_bias: Tensor | None = None,
    ) -> None:
        """An MLP: `reads` is feature -> `[unit, d_mlp]`, `writes` is feature -> `[d_mlp, unit]`, `in_bias` is `[d_mlp]`."""
        mlp = self.hf.transformer.h[layer].mlp
        for feature, matrix in reads.items():
            self._write(mlp.c_fc.weight, slice(None), self._in(matrix, feature))
        for feature, matrix in writes.items():
            self._write(mlp.c_proj.weight, slice(None), self._out(matrix, feature))
        if in_bias is not None:
            self._write(mlp.c_fc.bias, slice(None), in_bias)

    def output_bias(self, layer: int, feature: str, *, attention: Tensor, mlp: Tensor) -> None:
        """What a layer's attention and its MLP write whatever they read, each `[unit]`."""
        block = self.hf.transformer.h[layer]
        self._write(block.attn.c_proj.bias, slice(None), self._out(attention, feature))
        self._write(block.mlp.c_proj.bias, slice(None), self._out(mlp, feature))

    def unembed(self, feature: str, matrix: Float[Tensor, "unit d_vocab"]) -> None:
        """What each unit of a feature adds to the logits."""
        self._write(self.hf.lm_head.weight, slice(None), self._in(matrix, feature).T)

    def model(self, name: str) -> HookedModel:
        """The finished model."""
        with torch.random.fork_rng(
            devices=[]
        ):  # TransformerLens draws weights before it sets them, as transformers does
            return HookedModel.from_hf(self.hf, name=name)

    def _in(self, matrix: Tensor, feature: str) -> Float[Tensor, "d_model out"]:
        return self._pairs[self.units[feature]].T / 2 @ matrix.double()

    def _out(self, matrix: Tensor, feature: str) -> Float[Tensor, "... d_model"]:
        return matrix.double() @ self._pairs[self.units[feature]]

    @staticmethod
    @torch.no_grad()
    def _write(parameter: Tensor, where: Any, value: Tensor) -> None:
        parameter[where] += value.to(parameter.dtype)


def _blank(**config: Any) -> Any:
    """A GPT-2 of zeros, except for the norms' gains, which undo the ballast."""
    from transformers import AutoModelForCausalLM, GPT2Config

    arguments = GPT2Config(**config, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights; nobody else's draws may change
        hf = AutoModelForCausalLM.from_config(arguments, attn_implementation="eager").double().eval()
    scale = math.sqrt(2 * BALLAST**2 / arguments.n_embd + arguments.layer_norm_epsilon)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
        for norm in (hf.transformer.ln_f, *(ln for block in hf.transformer.h for ln in (block.ln_1, block.ln_2))):
            norm.weight.fill_(scale)
    return hf


def all_edges(n_layers: int, n_heads: int) -> frozenset[str]:
    """Every edge of a GPT-2, by name."""
    edges, writers = set(), ["input"]
    for layer in range(n_layers):
        heads = [f"a{layer}.h{head}" for head in range(n_heads)]
        edges |= {f"{writer}->{head}<{site}>" for writer in writers for head in heads for site in "qkv"}
        writers += heads
        edges |= {f"{writer}->m{layer}" for writer in writers}
        writers.append(f"m{layer}")
    return frozenset(edges | {f"{writer}->logits" for writer in writers})


def one(size: int, index: int, value: float = 1.0) -> Float[Tensor, "size"]:
    """Zero except for `value` at `index`."""
    vector = torch.zeros(size, dtype=torch.float64)
    vector[index] = value
    return vector


def scalar(value: float) -> Float[Tensor, "1 1"]:
    """The matrix of a feature with a single unit."""
    return torch.tensor([[value]], dtype=torch.float64)


def eye(size: int) -> Float[Tensor, "size size"]:
    return torch.eye(size, dtype=torch.float64)


def attend_to_position(n_ctx: int, position: int) -> dict[str, Any]:
    """Arguments of `HandWritten.head` for a head that attends to one position from everywhere after it."""
    return {"q_bias": one(1, 0, SHARP), "k": {"position": one(n_ctx, position)[:, None]}}


def attend_to_previous(n_ctx: int, back: int = 1) -> dict[str, Any]:
    """Arguments of `HandWritten.head` for a head that attends to the position `back` before; where there is none, evenly to
    all that there are."""
    return {"q": {"position": SHARP * torch.roll(eye(n_ctx), -back, dims=1)}, "k": {"position": eye(n_ctx)}}


def attend_to_self(n_ctx: int) -> dict[str, Any]:
    """Arguments of `HandWritten.head` for a head that attends to its own position."""
    return {"q": {"position": SHARP * eye(n_ctx)}, "k": {"position": eye(n_ctx)}}
