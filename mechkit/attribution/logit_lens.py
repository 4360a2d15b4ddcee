"""Logit lens: what the model would predict if it stopped here.

1. Take the residual stream after each layer (or before, or between; see `site`).
2. Put it through the model's own final norm and unembedding, as if no layer were left.
3. Read from these logits what is asked: single tokens, their rank, the entropy, the distance to the final prediction.

At the last layer the lens is the model. With a `TunedLens` each layer's stream is first translated by an affine map that was
fitted to predict the final one: without it, early layers are read in a basis that they may not use.

At sites that are parts of the stream (`attn_out`, `mlp_out`, a head's `result`) the logits are the part's direct contribution:
see `_readout.py`.

nostalgebraist 2020, https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens; Belrose et al. 2023,
https://arxiv.org/abs/2303.08112.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechkit._check import checked
from mechkit._drawn import Drawn
from mechkit._precision import widen
from mechkit._thumbnails import PromptPictures
from mechkit.attribution._readout import LensChunk, Logits, Reader, read_cells
from mechkit.experiment.axes import Axes, make_axes
from mechkit.experiment.patches import takes_patches
from mechkit.experiment.positions import split_prompts
from mechkit.experiment.provenance import pictures_of, provenance_of
from mechkit.hooks import HookedModel, one_at_a_time
from mechkit.metrics import kl
from mechkit.prompts import AnyPrompts, PromptPairs, Prompts, as_prompts
from mechkit.result import Cost, Result

if TYPE_CHECKING:
    from mechkit.attribution.tuned_lens import TunedLens

Token = str | int
Tokens = Sequence[Token] | Mapping[str, Sequence[Token]] | Literal["next"]
UNITS = {
    "logit": "logits",
    "log_prob": "nats",
    "prob": "probability",
    "rank": "rank",
    "entropy": "nats",
    "kl": "nats",
}
OF_TOKENS = ("logit", "log_prob", "prob", "rank")


@checked
@one_at_a_time
@takes_patches
def logit_lens(
    model: HookedModel,
    prompts: AnyPrompts,
    tokens: Tokens | None = None,
    *,
    value: Literal["logit", "log_prob", "prob", "rank", "entropy", "kl"] | None = None,
    site: str = "resid_post",
    over: str = "layer pos",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    lens: TunedLens | None = None,
    budget: int | None = None,
    progress: bool = True,
) -> Result:
    """Reads predictions off intermediate activations.

    Args:
        model: In evaluation mode.
        prompts: The prompts to run: the clean ones of pairs.
        tokens: Which tokens to read. A list of single tokens (text or ids), the same for all prompts; or a mapping from a
            label to one token for each prompt, `{"IO": [" Mary", …], "S": [" John", …]}`; or `"next"`, the token that really
            follows each position (NaN at a prompt's last one). For pairs the default is each pair's first right and first
            wrong answer, labelled `"right"` and `"wrong"`.
        value: `"logit"` (the default), `"log_prob"` (nats), `"prob"`, or `"rank"`: how many tokens of the vocabulary have a
            higher logit, so that 0 is the top and tied tokens share the best rank. Without tokens: `"entropy"` (nats) of the
            distribution, or `"kl"`: KL(final layer's ‖ this one) in nats, 0 where the lens already predicts what the model
            will.
        site: `"embed"`, `"resid_pre"`, `"resid_mid"` or `"resid_post"`: read as if the model ended there. `"attn_out"`,
            `"mlp_out"` or `"result"` (single heads): what the component adds to the final logits directly, biases of the final
            norm and the unembedding left out; its `"prob"`, `"rank"`, `"entropy"` and `"kl"` are those of these logits alone.
        over: Dims of the result: `"layer pos"`; `"layer position"` (named positions of pairs, `"END"` of plain prompts);
            `"layer patch"` (of pictures);
            `"layer"` (each prompt's last position alone); with `"head"` at site `"result"`; without `"layer"` at site `"embed"`.
        layers, positions, heads: Restrict those dims. `positions` are indices with `pos`, names with `position`.
        lens: A tuned lens of this model, for site `"resid_post"`.
        budget: Bytes of working memory; default half of the GPU's free memory, 1 GiB on a CPU. All logits are never held.
        progress: Show a progress bar when it takes long.

    Returns:
        A `Result` with dims `(*over, "token", "prompt")`, without `"token"` for `"entropy"` and `"kl"`, and no baselines. NaN
        at positions that a prompt lacks.

    Raises:
        ValueError: an unknown site, dim, token or value; a lens of another model; a model whose logits are not the final norm
            and unembedding of its last residual stream, or whose components do not add up to it; training mode.

    Example:
        >>> lens = logit_lens(model, pairs.clean, tokens=[" Mary", " John"])
        >>> lens.mean("prompt").sel(token=" Mary")
    """
    prompts = as_prompts(model, prompts)
    base, named, task = split_prompts(prompts)
    if tokens is None and isinstance(prompts, PromptPairs) and value not in ("entropy", "kl"):
        tokens = {"right": [ids[0] for ids in prompts.right], "wrong": [ids[0] for ids in prompts.wrong]}
    value = _checked_value(value, tokens)
    axes = make_axes(model, base, named, site, over, layers=layers, heads=heads, positions=positions)
    _check_lens(lens, model, axes)
    labels: tuple[Token, ...] = ()
    n_logits, width = model.d_vocab, 1
    if tokens is None:
        read: Reader = partial(_read_distribution, value)
    else:
        labels, ids = _token_ids(model, base, tokens, axes)
        read, width = partial(_read_tokens, value, ids, base.tokens), len(labels)
        n_logits = model.d_vocab if value != "logit" else min(model.d_vocab, _n_columns(ids, base))
    values, _, computed = read_cells(
        model, base, axes, named, read, width=width, n_logits=n_logits, lens=lens, budget=budget, progress=progress
    )
    dims, coords = [*axes.dims, "token", "prompt"], {**axes.coords, "token": labels, "prompt": tuple(range(len(base)))}
    if tokens is None:
        values, dims = values[..., 0, :], [dim for dim in dims if dim != "token"]
        del coords["token"]
    return Result(
        values=values,
        dims=tuple(dims),
        coords=coords,
        baseline={},
        base="",
        metric=value,
        unit=UNITS[value],
        provenance=provenance_of(
            model, base, technique="logit_lens", value=value, task=task, **_axes_provenance(axes, lens)
        ),
        cost=Cost(computed, computed),
        pictures=pictures_of(base),
    )


@dataclass(frozen=True, eq=False)
class TopTokens(Drawn):
    """The most probable tokens of every cell.

    Attributes:
        probs: Probabilities, dims `(*over, "k", "prompt")`, `k` 0 the most probable.
        ids: Token ids of the same shape; -1 where a prompt lacks the position.
        strings: The tokens as text, of the same shape; empty there.
        text: The greedy continuation of every cell `[*over prompt]`, where one was asked for (`patchscope`).
    """

    probs: Result
    ids: Int[Tensor, "*over k prompt"]
    strings: np.ndarray
    text: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, shape in (("ids", tuple(self.ids.shape)), ("strings", self.strings.shape)):
            if shape != self.probs.values.shape:
                raise ValueError(f"{name}: expected the shape of probs, {tuple(self.probs.values.shape)}, got {shape}")

    def __repr__(self) -> str:
        sizes = ", ".join(f"{dim} {len(self.probs.coords[dim])}" for dim in self.probs.dims)
        return f"TopTokens({sizes}; {self.probs.provenance.get('technique', '')})"


@checked
@one_at_a_time
@takes_patches
def top_tokens(
    model: HookedModel,
    prompts: AnyPrompts,
    k: int = 5,
    *,
    site: str = "resid_post",
    over: str = "layer pos",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    lens: TunedLens | None = None,
    budget: int | None = None,
    progress: bool = True,
) -> TopTokens:
    """The `k` most probable tokens that the lens reads at each cell.

    Args:
        model, prompts, site, over, layers, positions, heads, lens, budget, progress: As for `logit_lens`.
        k: How many tokens, the most probable first.

    Returns:
        `TopTokens`, whose probabilities have dims `(*over, "k", "prompt")`.

    Raises:
        ValueError: `k` is no number of tokens of the vocabulary; what `logit_lens` refuses.
    """
    prompts = as_prompts(model, prompts)
    base, named, task = split_prompts(prompts)
    check_k(model, k)
    axes = make_axes(model, base, named, site, over, layers=layers, heads=heads, positions=positions)
    _check_lens(lens, model, axes)

    def read(logits: Logits, chunk: LensChunk) -> tuple[Tensor, Tensor]:
        best = widen(logits(None)).softmax(-1).topk(k)
        return best.values, best.indices

    values, ids, computed = read_cells(
        model, base, axes, named, read, width=k, n_logits=model.d_vocab, lens=lens, budget=budget, progress=progress
    )
    provenance = provenance_of(model, base, technique="top_tokens", k=k, task=task, **_axes_provenance(axes, lens))
    return make_top_tokens(model, values, ids, axes.dims, axes.coords, provenance, computed, pictures=pictures_of(base))


def check_k(model: HookedModel, k: int) -> None:
    """Raises `ValueError` unless `k` is a number of tokens that the vocabulary has."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= model.d_vocab:
        raise ValueError(f"k: expected a number of tokens in 1..{model.d_vocab}, got {k!r}")


def make_top_tokens(
    model: HookedModel,
    probs: Tensor,
    ids: Tensor,
    dims: Sequence[str],
    coords: Mapping[str, tuple[int | str, ...]],
    provenance: Mapping[str, Any],
    computed: int,
    text: np.ndarray | None = None,
    pictures: PromptPictures | None = None,
) -> TopTokens:
    """`TopTokens` of probabilities and ids `[*dims k prompt]`."""
    found = ids[ids >= 0].unique()
    texts = dict(zip(found.tolist(), model.to_str_tokens(found), strict=True)) | {-1: ""}
    result = Result(
        values=probs,
        dims=(*dims, "k", "prompt"),
        coords={**coords, "k": tuple(range(probs.shape[-2])), "prompt": tuple(range(probs.shape[-1]))},
        baseline={},
        base="",
        metric="prob",
        unit="probability",
        provenance=provenance,
        cost=Cost(computed, computed),
        pictures=pictures,
    )
    strings = np.array([texts[i] for i in ids.flatten().tolist()], dtype=object).reshape(ids.shape)
    return TopTokens(result, ids, strings, text)


# -- arguments ---------------------------------------------------------------------------------------------------------


def _checked_value(value: str | None, tokens: Tokens | None) -> Any:
    if value is not None and value not in UNITS:
        raise ValueError(f"value: expected one of {', '.join(UNITS)}; got {value!r}")
    if tokens is None and (value is None or value in OF_TOKENS):
        raise ValueError(
            f"tokens: value={value or 'logit'!r} is about single tokens; expected some, such as [' Mary'] or 'next', or "
            "value='entropy' or 'kl', got None"
        )
    if tokens is not None and value in ("entropy", "kl"):
        raise ValueError(f"tokens: value={value!r} is about the whole distribution; expected None, got {tokens!r}")
    return value or "logit"


def _check_lens(lens: TunedLens | None, model: HookedModel, axes: Axes) -> None:
    if lens is None:
        return
    if axes.site.name != "resid_post":
        raise ValueError(f"lens: a tuned lens translates site 'resid_post'; got site {axes.site.name!r}")
    lens.check(model, axes.layers)


def _axes_provenance(axes: Axes, lens: TunedLens | None) -> dict[str, Any]:
    return {
        "site": axes.site.name,
        "over": " ".join(axes.dims),
        "lens": "logit lens" if lens is None else f"tuned lens {lens.hash()}",
    }


def _token_ids(
    model: HookedModel, prompts: Prompts, tokens: Tokens, axes: Axes
) -> tuple[tuple[Token, ...], Int[Tensor, "prompt token"] | None]:
    """Labels, and each prompt's token ids; `None` stands for each position's own next token."""
    n = len(prompts)
    if isinstance(tokens, str):
        if tokens != "next":
            raise ValueError(
                f"tokens: expected a list of tokens, a mapping or 'next'; got {tokens!r}. Write [{tokens!r}]"
            )
        if not {"pos", "position"} & set(axes.dims):
            raise ValueError(
                "tokens: 'next' is unknown at the last position; expected 'pos' or 'position' in over, got neither"
            )
        return ("next",), None
    if not isinstance(tokens, Mapping | Sequence | Tensor):
        raise ValueError(f"tokens: expected a list of tokens, a mapping or 'next'; got {tokens!r}. Write [{tokens!r}]")
    if isinstance(tokens, Mapping):
        for label, several in tokens.items():
            if isinstance(several, str | int) or len(several) != n:
                raise ValueError(f"tokens[{label!r}]: expected one token for each of {n} prompts, got {several!r}")
        labels: tuple[Token, ...] = tuple(tokens)
        columns = [[_single(model, token) for token in several] for several in tokens.values()]
    else:
        columns = [[_single(model, token)] * n for token in tokens]
        labels = tuple(token if isinstance(token, str) else int(token) for token in tokens)
    if not labels or len(set(labels)) != len(labels):
        raise ValueError(f"tokens: expected at least one, each once; got {list(labels)}")
    return labels, torch.tensor(columns).T


def _single(model: HookedModel, token: Token) -> int:
    if isinstance(token, str):
        try:
            return model.to_single_token(token)
        except ValueError as error:
            raise ValueError(f"tokens: {error}") from None
    whole = hasattr(token, "__index__") and not isinstance(token, bool)
    if not whole or not 0 <= int(token) < model.d_vocab:
        raise ValueError(f"tokens: expected text, or ids in 0..{model.d_vocab - 1}; got {token!r}")
    return int(token)


def _n_columns(ids: Tensor | None, prompts: Prompts) -> int:
    """The most tokens that a chunk of rows asks for."""
    return int(prompts.lengths.sum()) if ids is None else len(ids.unique())


# -- what is read off one cell's logits --------------------------------------------------------------------------------


def _read_tokens(
    value: str, ids: Int[Tensor, "prompt token"] | None, texts: Sequence[Tensor], logits: Logits, chunk: LensChunk
) -> tuple[Tensor, None]:
    if ids is not None:
        wanted = ids[chunk.prompt]
    else:
        after = zip(chunk.prompt.tolist(), (chunk.pos + 1).tolist(), strict=True)
        wanted = torch.tensor([int(texts[i][p]) if p < len(texts[i]) else -1 for i, p in after])[:, None]
    missing, wanted = wanted < 0, wanted.clamp(min=0)
    if value == "logit":
        columns, which = wanted.unique(return_inverse=True)
        found = widen(logits(columns))
        found = found.gather(-1, which.to(found.device))
    else:
        found = _of_tokens(value, widen(logits(None)), wanted)
    return found.masked_fill(missing.to(found.device), torch.nan), None


def _of_tokens(value: str, logits: Tensor, wanted: Int[Tensor, "row token"]) -> Tensor:
    wanted = wanted.to(logits.device)
    if value == "rank":
        own = logits.gather(-1, wanted)
        return torch.stack([(logits > column[:, None]).sum(-1) for column in own.unbind(-1)], -1).to(logits.dtype)
    log_probs = logits.log_softmax(-1).gather(-1, wanted)
    return log_probs.exp() if value == "prob" else log_probs


def _read_distribution(value: str, logits: Logits, chunk: LensChunk) -> tuple[Tensor, None]:
    log_q = widen(logits(None)).log_softmax(-1)
    if value == "entropy":
        terms = -log_q.exp() * log_q
        return terms.masked_fill(log_q == -torch.inf, 0.0).sum(-1, keepdim=True), None
    return kl(chunk.final_log_probs, log_q).clamp(min=0)[:, None], None
