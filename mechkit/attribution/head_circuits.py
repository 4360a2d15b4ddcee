"""What a head's weights say it does: which tokens it looks for, what it writes when it finds them, and which heads feed it.

1. A head is two low-rank maps: QK = W_Q W_Kᵀ says where it attends, OV = W_V W_O what it moves from there.
2. Between token and head stands the block's norm, between head and logits the final norm. A norm is a gain (and in LayerNorm
   a centring) times a scale that depends on the token. Gains and centring are *folded* into the adjacent weights: what
   reads the stream (W_Q, W_K, W_V, W_U) takes those of the norm in front of it, W_O those of the norm behind it where a
   block has one (Gemma 2 and 3, OLMo 2), W_Q and W_K those of query and key norms. Each function says what becomes of the scales.
3. All is computed from the factors: nothing of size vocabulary², and no d_model² matrix for each head or pair of heads.
4. Before that, random vectors are run through the layer: if its queries, keys, values, scores and output are not what the
   weights say, the model is refused.

In GQA models query head h has the keys and values of key-value head `h // (n_heads // n_kv_heads)`.

Elhage et al. 2021, https://transformer-circuits.pub/2021/framework (QK and OV circuits, composition); Millidge and Black
2022, https://www.lesswrong.com/posts/mkbGjzxD8d8XqKHzA (singular vectors of OV).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._check import checked
from mechkit._drawn import Drawn
from mechkit._precision import widen
from mechkit.attribution._head_weights import (
    block_norm,
    embedded_chunks,
    final_norm,
    folded_weights,
    normed,
    probe_attention,
    project,
    soft_capped,
    through_ov,
    weights_result,
)
from mechkit.experiment.axes import choose_indices
from mechkit.hooks import HookedModel, check_linear_readout, one_at_a_time
from mechkit.result import Result

Tokens = str | int | Sequence[str | int] | Tensor | None


@dataclass(frozen=True)
class TokenScore:
    """A token with its score on a direction."""

    token: str
    id: int
    value: float


@dataclass(frozen=True)
class OVDirection:
    """One singular direction of a head's OV matrix.

    Attributes:
        singular_value: How much it stretches what it reads.
        reads, reads_negative: The tokens whose embeddings, after the block's norm, have the largest and the most negative
            component along what is read.
        writes, writes_negative: The tokens whose logits one unit of what is written raises and lowers most (final norm: gain
            alone). A token of `reads` raises those of `writes`; one of `reads_negative` lowers them.
    """

    singular_value: float
    reads: tuple[TokenScore, ...]
    reads_negative: tuple[TokenScore, ...]
    writes: tuple[TokenScore, ...]
    writes_negative: tuple[TokenScore, ...]


@dataclass(frozen=True, eq=False)
class OVSVD(Drawn):
    """Singular value decomposition of a head's OV matrix: `OV = Σ singular_value * outer(read, write)`.

    Attributes:
        singular_values: All `d_head` of them, dim `("direction",)`, largest first.
        read_vectors, write_vectors: The unit vectors of the first k, dims `("direction", "d_model")`.
        directions: The first k with their tokens.
    """

    singular_values: Result
    read_vectors: Result
    write_vectors: Result
    directions: tuple[OVDirection, ...]


@checked
@one_at_a_time
@torch.no_grad()
def ov_circuit(
    model: HookedModel, layer: int, head: int, source_tokens: Tokens = None, output_tokens: Tokens = None
) -> Result:
    """What a head adds to each output token's logit if it attends fully to a source token, as its weights say.

    The source token's embedding (as the model scales or normalizes it, without its position) goes through the block's norm
    exactly, W_V and b_V, W_O, the norm behind the attention where there is one, the final norm and W_U. Of the last two norms
    there is gain and centring alone, with scale 1 and no bias. Left out: b_O, b_U, and what scales or caps logits. So within
    a row values compare as the model would, but their unit is that of a residual stream of scale 1.

    Args:
        model: In evaluation mode.
        layer, head: Which (query) head.
        source_tokens, output_tokens: Ids, or texts that are one token each; `None` is the whole vocabulary, for one of them.

    Returns:
        A `Result` with dims `("source", "output")`, labelled with the tokens' text (and id where a text comes twice).

    Raises:
        ValueError: a token that is not one or is given twice, the whole vocabulary on both sides, training mode, attention
            that is not what its weights say.

    Example:
        >>> ov_circuit(model, 9, 6, [" Mary", " John"], [" Mary", " John"])   # a copying head is large on the diagonal
    """
    layer, head = _head(model, layer, head)
    sources, outputs = _token_pair(model, ("source_tokens", source_tokens), ("output_tokens", output_tokens))
    probe_attention(model, [layer])
    check_linear_readout(model, "an OV circuit")
    weight = widen(model.W_U[:, outputs])
    written = [through_ov(model, layer, head, x) for x in embedded_chunks(model, sources)]
    values = torch.cat([final_norm(model, x) @ weight for x in written])
    coords = {"source": token_labels(model, sources), "output": token_labels(model, outputs)}
    about: dict[str, Any] = {"technique": "ov_circuit", "layer": layer, "head": head}
    return weights_result(values, coords, model, "ov_circuit", "logits at scale 1", **about)


@checked
@one_at_a_time
@torch.no_grad()
def qk_circuit(
    model: HookedModel, layer: int, head: int, dest_tokens: Tokens = None, source_tokens: Tokens = None
) -> Result:
    """How strongly a head at one token looks at another token, as its weights say: the score before the softmax.

    Both embeddings (as for `ov_circuit`, without positions) go through the block's norm exactly, W_Q and b_Q or W_K and b_K,
    and query and key norms where there are any. Their product is multiplied by the model's own attention scale, and soft-capped
    where the model does (Gemma 2). It is the score at relative position 0: rotary turns and ALiBi are left out.

    Args:
        model: In evaluation mode.
        layer, head: Which (query) head.
        dest_tokens, source_tokens: As for `ov_circuit`.

    Returns:
        A `Result` with dims `("dest", "source")`. Only differences within a row matter to the softmax.

    Raises:
        ValueError: as `ov_circuit`.
    """
    layer, head = _head(model, layer, head)
    dests, sources = _token_pair(model, ("dest_tokens", dest_tokens), ("source_tokens", source_tokens))
    scale = probe_attention(model, [layer])[layer]
    kv_head = head // (model.n_heads // model.n_kv_heads)
    q = torch.cat([project(model, layer, x, "Q")[:, head] for x in embedded_chunks(model, dests)])
    k = torch.cat([project(model, layer, x, "K")[:, kv_head] for x in embedded_chunks(model, sources)])
    values = soft_capped(model, layer, scale * (widen(q) @ widen(k).mT))
    coords = {"dest": token_labels(model, dests), "source": token_labels(model, sources)}
    about: dict[str, Any] = {"technique": "qk_circuit", "layer": layer, "head": head}
    return weights_result(values, coords, model, "qk_circuit", "attention score", **about)


@checked
@one_at_a_time
@torch.no_grad()
def ov_svd(model: HookedModel, layer: int, head: int, k: int = 10, top: int = 10) -> OVSVD:
    """The directions that a head reads and writes: singular vectors of its OV matrix, with the tokens that they stand for.

    The block's norm's gain and centring are folded into the matrix, and those of a norm behind the attention. Tokens: reading
    is measured on embeddings after the block's norm (its exact scale, without its bias); writing on W_U with the final norm's
    gain and centring. So `Σ singular_value * read value * write value` over all directions is `ov_circuit` without what the
    biases add.

    Both vectors of a direction may change sign together. Here the token with the largest write value in magnitude has a
    positive one.

    Args:
        model: In evaluation mode.
        layer, head: Which (query) head.
        k: How many directions, the largest first; at most `d_head`.
        top: How many tokens for each side of a direction.

    Returns:
        An `OVSVD`.

    Raises:
        ValueError: an index out of range, training mode, attention that is not what its weights say.
    """
    layer, head = _head(model, layer, head)
    for name, value, most in (("k", k, model.d_head), ("top", top, model.d_vocab)):
        if not 1 <= value <= most:
            raise ValueError(f"{name}: expected 1..{most}, got {value}")
    probe_attention(model, [layer])
    check_linear_readout(model, "an OV circuit")
    weights = next(folded_weights(model, [layer]))
    q_read, r_read = torch.linalg.qr(weights.W_V[head].double())
    q_write, r_write = torch.linalg.qr(weights.W_O[head].mT.double())
    left, singular, right = torch.linalg.svd(r_read @ r_write.mT)
    dtype = weights.W_V.dtype
    u, v = ((q_read @ left)[:, :k].to(dtype), (q_write @ right.mT)[:, :k].to(dtype))
    norm = block_norm(model, layer)
    writes = final_norm(model, v.mT) @ widen(model.W_U)  # [direction token]
    everything = torch.arange(model.d_vocab)
    reads = torch.cat([normed(norm, x) @ u for x in embedded_chunks(model, everything)]).mT
    sign = writes.gather(1, writes.abs().argmax(1, keepdim=True)).sign()
    sign = torch.where(sign == 0, 1.0, sign)
    u, v, reads, writes = u * sign[:, 0], v * sign[:, 0], reads * sign, writes * sign
    given: dict[str, Any] = {"technique": "ov_svd", "layer": layer, "head": head}
    order, entries = tuple(range(k)), tuple(range(model.d_model))
    return OVSVD(
        weights_result(
            singular.to(dtype), {"direction": tuple(range(len(singular)))}, model, "ov_svd", "gain", **given
        ),
        weights_result(u.mT, {"direction": order, "d_model": entries}, model, "read vectors", "unit vector", **given),
        weights_result(v.mT, {"direction": order, "d_model": entries}, model, "write vectors", "unit vector", **given),
        tuple(
            OVDirection(float(singular[i]), *_extremes(model, reads[i], top), *_extremes(model, writes[i], top))
            for i in order
        ),
    )


# -- tokens and results ----------------------------------------------------------------------------------------------------


def _head(model: HookedModel, layer: int, head: int) -> tuple[int, int]:
    return choose_indices("layer", [layer], model.n_layers)[0], choose_indices("head", [head], model.n_heads)[0]


def _token_pair(model: HookedModel, *given: tuple[str, Tokens]) -> tuple[Tensor, Tensor]:
    if all(tokens is None for _, tokens in given):
        names = " or ".join(name for name, _ in given)
        raise ValueError(f"{names}: expected tokens for at least one, got the whole vocabulary for both; choose some")
    first, second = (_token_ids(model, name, tokens) for name, tokens in given)
    return first, second


def _token_ids(model: HookedModel, name: str, tokens: Tokens) -> Int[Tensor, "token"]:
    if tokens is None:
        return torch.arange(model.d_vocab)
    several = tokens.tolist() if isinstance(tokens, Tensor) else [tokens] if isinstance(tokens, str | int) else tokens
    try:
        ids = [model.to_single_token(token) if isinstance(token, str) else int(token) for token in several]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not ids or min(ids) < 0 or max(ids) >= model.d_vocab or len(set(ids)) != len(ids):
        raise ValueError(f"{name}: expected distinct token ids in 0..{model.d_vocab - 1}, got {ids}")
    return torch.tensor(ids)


def token_labels(model: HookedModel, ids: Int[Tensor, "token"]) -> tuple[str, ...]:
    """Each token's text; with its id behind it where several have the same text (or a text that looks like such a label)."""
    texts = model.to_str_tokens(ids)
    often = Counter(texts)
    labels = [text if often[text] == 1 else f"{text} ({i})" for text, i in zip(texts, ids.tolist(), strict=True)]
    if len(set(labels)) < len(labels):
        labels = [f"{text} ({i})" for text, i in zip(texts, ids.tolist(), strict=True)]
    return tuple(labels)


def _extremes(
    model: HookedModel, scores: Float[Tensor, "token"], top: int
) -> tuple[tuple[TokenScore, ...], tuple[TokenScore, ...]]:
    """The tokens with the largest and with the smallest scores, the most extreme first."""
    found = []
    for order in (scores.topk(top), scores.topk(top, largest=False)):
        texts = model.to_str_tokens(order.indices.cpu())
        found.append(tuple(map(TokenScore, texts, order.indices.tolist(), order.values.tolist())))
    return found[0], found[1]
