"""Fitting a tuned lens's translators in minutes on a laptop's CPU.

The KL to the final distribution over a whole vocabulary costs `2 * d_model * d_vocab` operations per position and layer, and
twice that for its gradient; so it is computed as rarely as possible.

1. *Closed form.* Ridge regression from a layer's residual stream to the final one, scaled to unit RMS; towards a multiple of
   the identity. Positions count inversely to their squared norm. The ridge with the least KL on validation prompts is taken.
2. *Confidence.* A regression's prediction is an average, and the final norm scales it to full length: the lens would be too
   confident (or not confident enough). A shift along the direction that the unembedding reads least shortens all
   others, as a temperature would, and stays within an affine map. Its size is chosen on validation prompts.
3. *Gradient steps* on the KL: Adam in coordinates that are whitened for each layer, all layers at once, on the tokens that are
   most probable in the batch and a random draw of the others, which stand for the rest of the normalizer. The best state that
   was seen on validation prompts is kept for each layer.
4. *Verdict.* With the whole vocabulary on validation prompts, each layer keeps its translator if it is better than none.

Measured on SmolLM2-135M with 3,300 positions, mean KL of layers 0 to 28 on other text: 12.7 nats without a lens, 1.66 after
steps 1 and 2 (an eighth of it by step 2), 1.56 after 100 gradient steps. More steps did not help: with so little text
it overfits. A draw of the vocabulary makes a step eight times cheaper, and the KL that is reached is the same to within noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._precision import wide_dtype, widen
from mechkit._progress import Progress
from mechkit.attribution._readout import COPIES
from mechkit.engine import Budget
from mechkit.hooks import HookedModel, check_readout, final_norm, is_linear_readout, record
from mechkit.metrics import kl
from mechkit.prompts import Prompts

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # relative to the mean eigenvalue of the covariance
SHIFTS = (-0.5, -0.3, -0.15, 0.0, 0.15, 0.3, 0.5)  # relative to the final stream's length
DAMPING = 1e-3  # of the whitening
TOP = 16  # most probable tokens of each position that a step always has
HELD = 128  # validation positions that are looked at
EVERY, PATIENCE = 10, 4  # gradient steps between two looks at the validation prompts; looks without progress


@dataclass(frozen=True)
class FitSettings:
    """The arguments of `TunedLens.fit` that decide what is fitted."""

    validation: float
    steps: int
    batch: int
    lr: float
    vocabulary: int
    skip_first: int
    seed: int

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("validation", 0 < self.validation < 1, "a share between 0 and 1"),
            ("steps", self.steps >= 0, "0 or more"),
            ("batch", self.batch >= 1, "1 or more"),
            ("lr", self.lr > 0, "a positive number"),
            ("vocabulary", self.vocabulary >= 1, "1 or more"),
            ("skip_first", self.skip_first >= 0, "0 or more"),
        ):
            if not good:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


@dataclass(frozen=True, eq=False)
class Positions:
    """Residual streams at some positions of some prompts: those of a group of layers, and the final one."""

    layers: Float[Tensor, "layer row d_model"]
    final: Float[Tensor, "row d_model"]


@dataclass(frozen=True, eq=False)
class Quick:
    """Validation positions with a part of the vocabulary, for estimates of the KL.

    Attributes:
        resid: `[layer row d_model]`.
        columns, weight: The tokens, and the logarithm of how many each stands for.
        log_p: The final distribution over these tokens, `[row token]`.
    """

    resid: Tensor
    columns: Tensor
    weight: Tensor
    log_p: Tensor


def fit_translators(
    model: HookedModel,
    prompts: Prompts,
    layers: Sequence[int],
    settings: FitSettings,
    budget: int | None,
    progress: bool,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """`A` `[layer d_model d_model]`, `b` `[layer d_model]` on the CPU, and the report for provenance.

    Raises:
        ValueError: not enough prompts or positions, or NaN in a run.
    """
    train, held = _split(prompts, settings)
    room = Budget.of(model, budget)
    A: list[Tensor] = []
    b: list[Tensor] = []
    kls: list[Tensor] = []
    n_rows = sum(max(0, len(row) - settings.skip_first) for row in prompts.tokens)
    with Progress(len(layers), "layer", progress) as bar:
        for group in _groups(model, layers, n_rows, room):
            training, validation = (_collect(model, part, group, settings.skip_first, room) for part in (train, held))
            found = _fit_group(model, training, validation, settings, room)
            for part, parts in zip(found, (A, b, kls), strict=True):
                parts.append(part)
            bar.update(len(group))
    before, after = torch.cat(kls).T.tolist()
    report = {
        "n_train": sum(max(0, len(row) - settings.skip_first) for row in train.tokens),
        "validation_kl": {"layer": list(layers), "logit_lens": before, "tuned_lens": after},
    }
    return torch.cat(A), torch.cat(b), report


def _split(prompts: Prompts, settings: FitSettings) -> tuple[Prompts, Prompts]:
    """Training and validation prompts: whole prompts, since positions of one prompt resemble each other."""
    usable = [i for i, row in enumerate(prompts.tokens) if len(row) > settings.skip_first]
    if len(usable) < 2:
        raise ValueError(
            f"prompts: expected at least two of more than {settings.skip_first} tokens, one to fit on and one to validate on; "
            f"got {len(usable)}. Cut the text into shorter prompts"
        )
    n = min(len(usable) - 1, max(1, round(settings.validation * len(usable))))
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    return prompts[[usable[i] for i in order[n:]]], prompts[[usable[i] for i in order[:n]]]


def _groups(model: HookedModel, layers: Sequence[int], n_rows: int, room: Budget) -> Iterator[list[int]]:
    """As many layers at a time as the budget has room for: their activations, and six matrices while they are fitted."""
    a_layer = (2 * n_rows * model.d_model + 6 * model.d_model**2) * wide_dtype(model.dtype).itemsize
    size = max(1, room.bytes // a_layer)
    for first in range(0, len(layers), size):
        yield list(layers[first : first + size])


@torch.no_grad()
def _collect(model: HookedModel, prompts: Prompts, layers: Sequence[int], skip: int, room: Budget) -> Positions:
    """Runs the prompts and keeps `resid_post` of these layers, and the final residual stream, at every position ≥ `skip`."""
    sites = [("resid_post", layer) for layer in layers]
    resid, final = [], []

    def fit(length: int, ids: Sequence[int]) -> int:
        unembedded = room.bytes // 4 // (model.d_vocab * 4)  # of each prompt, the last position is
        return max(1, min(room.prompts_at_once(model, length, sites), unembedded))

    for batch in prompts.batches(fit):
        run = record(model, batch.stacked, sites, blocks=False)
        check_readout(model, run, "a lens")
        end = run.resid[-1]
        resid.append(torch.stack([run.sites[site].to(end.device) for site in sites])[:, :, skip:].flatten(1, 2))
        final.append(end[:, skip:].flatten(0, 1))
    wide = wide_dtype(model.dtype)
    found = Positions(torch.cat(resid, 1).to(wide), torch.cat(final).to(wide))
    if not bool(torch.isfinite(found.layers).all() and torch.isfinite(found.final).all()):
        raise ValueError("model: expected finite activations, got NaN or inf in a residual stream")
    return found


def _fit_group(
    model: HookedModel, train: Positions, held: Positions, settings: FitSettings, room: Budget
) -> tuple[Tensor, Tensor, Tensor]:
    """`A`, `b`, and the KL on validation positions of the logit lens and of the kept translator, `[layer 2]`."""
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(held.final), generator=generator)[:HELD].to(held.final.device)
    held = Positions(held.layers[:, order], held.final[order])
    quick = _quick(model, held, settings, room, generator)
    length = train.final.pow(2).mean(-1).sqrt().mean()  # the final stream's usual RMS
    # Where the head norms what it reads, only the direction counts: positions with a huge stream should not decide everything.
    target = train.final
    if _is_scale_free(model, train.final[:8]):
        target = target / target.pow(2).mean(-1, keepdim=True).sqrt() * length
    hidden = _least_seen(model, train.final) * length * model.d_model**0.5
    whitened = [_Whitened(resid, target) for resid in train.layers]
    start = [_closed_form(model, one, hidden, quick, i) for i, one in enumerate(whitened)]
    W, bias = (torch.stack(parts) for parts in zip(*start, strict=True))
    if settings.steps:
        W, bias = _refine(model, train, whitened, W, bias, quick, settings, room, generator)
    A, b = [], []
    for one, w, b_w in zip(whitened, W, bias, strict=True):
        B, b_ = one.unwhiten(w, b_w)
        A.append((B - torch.eye(len(B), dtype=B.dtype, device=B.device)).T)
        b.append(b_)
    return _verdict(model, torch.stack(A), torch.stack(b), held, room)


class _Whitened:
    """One layer's training positions in coordinates in which they are uncorrelated and of unit variance.

    `x_w = (x - mean) @ P`. Positions count with 1 / their mean square, so that a few huge ones do not decide everything.
    """

    def __init__(self, resid: Float[Tensor, "row d_model"], target: Float[Tensor, "row d_model"]) -> None:
        x, y = resid.double(), target.double()
        weight = 1 / x.pow(2).mean(-1, keepdim=True).clamp(min=1e-12)
        weight = weight / weight.sum()
        mean, self.target_mean = (weight * x).sum(0), (weight * y).sum(0)
        x, y = x - mean, y - self.target_mean
        covariance = (weight * x).T @ x
        self.towards = float((weight * x * y).sum() / covariance.trace().clamp(min=1e-30))  # c in y = c x + ...
        self.values, self.vectors = torch.linalg.eigh(covariance)
        self.values = self.values.clamp(min=0)
        self.rest = self.vectors.T @ ((weight * x).T @ y - self.towards * covariance)
        self.spread = self.values.mean().clamp(min=1e-30)
        root = (self.values + DAMPING * self.spread).sqrt()
        self.P, self.unP = ((self.vectors * scale) @ self.vectors.T for scale in (1 / root, root))
        self.mean, self.dtype = mean, resid.dtype

    def ridge(self, strength: float) -> Float[Tensor, "d_model d_model"]:
        """The regression's matrix in whitened coordinates: `y = x_w @ W + target_mean`."""
        solved = self.vectors @ (self.rest / (self.values + strength * self.spread)[:, None])
        identity = torch.eye(len(solved), dtype=solved.dtype, device=solved.device)
        return (self.unP @ (solved + self.towards * identity)).to(self.dtype)

    def __call__(self, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        return (resid - self.mean.to(resid)) @ self.P.to(resid)

    def unwhiten(self, W: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """`B` and `b` of `y = x @ B + b`."""
        B = self.P @ W.double()
        return B.to(self.dtype), (bias.double() - self.mean @ B).to(self.dtype)


def _least_seen(model: HookedModel, like: Tensor) -> Float[Tensor, "d_model"]:
    """The unit vector in the residual stream whose effect on differences of logits is least, through the final norm."""
    if not is_linear_readout(model):
        return torch.linalg.eigh(_gram_of_gradients(model, like)).eigenvectors[:, 0].to(like)
    with torch.no_grad():
        norm = final_norm(model, like[:1].to(model.dtype))
        reads = norm.gain.to(like)[:, None] * model.W_U.detach().to(like)  # [d_model d_vocab]
        reads = reads - reads.mean(1, keepdim=True)
        gram = (reads @ reads.T).double()
        if norm.centres:  # the direction of ones is lost in the norm: make it the last to be chosen
            gram = gram - gram.mean(0)
            gram = gram - gram.mean(1, keepdim=True) + gram.trace() / len(gram)
        return torch.linalg.eigh(gram).eigenvectors[:, 0].to(like)


def _gram_of_gradients(model: HookedModel, like: Tensor) -> Float[Tensor, "d_model d_model"]:
    """What a head that is not a norm and a matrix reads: the second moments of gradients of random sums of its logits."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(like), (4 * model.d_model,), generator=generator)
    gram = torch.zeros(model.d_model, model.d_model, dtype=torch.float64, device=like.device)
    for rows in chosen.split(max(1, 2**24 // model.d_vocab)):
        with torch.enable_grad():
            at = like[rows.to(like.device)].to(model.dtype).detach().requires_grad_()
            logits = widen(model.unembed(at))
            signs = torch.randn(logits.shape, generator=generator).to(logits)
            (gradient,) = torch.autograd.grad((logits * (signs - signs.mean(1, keepdim=True))).sum(), at)
        gram += gradient.double().T @ gradient.double()
    return gram


@torch.no_grad()
def _is_scale_free(model: HookedModel, like: Float[Tensor, "row d_model"]) -> bool:
    """Whether logits are the same where the final stream is twice as long, as they are behind a norm."""
    at = like.to(model.dtype)
    logits, doubled = widen(model.unembed(at)), widen(model.unembed(2 * at))
    return float((doubled - logits).abs().max()) < 0.05 * float(logits.abs().max())


@torch.no_grad()
def _closed_form(model: HookedModel, one: _Whitened, hidden: Tensor, quick: Quick, i: int) -> tuple[Tensor, Tensor]:
    """The ridge and then the shift with the least estimated KL, in whitened coordinates."""
    resid, bias = one(quick.resid[i]), one.target_mean.to(one.dtype)

    def divergence(W: Tensor, b: Tensor) -> float:
        return float(_divergence(model, resid @ W + b, quick.columns, quick.weight, quick.log_p).mean())

    W = min((one.ridge(strength) for strength in RIDGES), key=lambda W: divergence(W, bias))
    return W, min((bias + shift * hidden for shift in SHIFTS), key=lambda b: divergence(W, b))


def _refine(
    model: HookedModel,
    train: Positions,
    whitened: Sequence[_Whitened],
    W: Float[Tensor, "layer d_model d_model"],
    bias: Float[Tensor, "layer d_model"],
    quick: Quick,
    settings: FitSettings,
    room: Budget,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Adam on the estimated KL of all layers at once; each layer's best state on the validation positions."""
    resid = torch.stack([one(x) for one, x in zip(whitened, train.layers, strict=True)])
    held = torch.stack([one(x) for one, x in zip(whitened, quick.resid, strict=True)])
    top = _top(model, train.final, room)
    length = train.final.pow(2).mean(-1).sqrt().mean()

    def estimate(W: Tensor, bias: Tensor) -> Tensor:
        with torch.no_grad():
            found = [
                _divergence(model, x @ w + b, quick.columns, quick.weight, quick.log_p).mean()
                for x, w, b in zip(held, W, bias, strict=True)
            ]
        return torch.stack(found)

    best, best_W, best_bias = estimate(W, bias), W.clone(), bias.clone()
    # Steps are taken in units of the final stream's RMS, so that the learning rate means the same for every model.
    D, d = torch.zeros_like(W).requires_grad_(), torch.zeros_like(bias).requires_grad_()
    optimizer = torch.optim.Adam([D, d], lr=settings.lr, betas=(0.9, 0.99))
    stale = 0
    for step in range(settings.steps):
        rows = torch.randint(len(train.final), (settings.batch,), generator=generator).to(resid.device)
        columns, weight = _draw(top[rows], model.d_vocab, settings.vocabulary, generator)
        with torch.no_grad():
            log_p = _log_probs(model, train.final[rows], columns, weight)
        with torch.enable_grad():
            predicted = resid[:, rows] @ (W + length * D) + (bias + length * d)[:, None]
            loss = _divergence(model, predicted, columns, weight, log_p).mean(-1).sum()
            D.grad, d.grad = torch.autograd.grad(loss, [D, d])
        optimizer.param_groups[0]["lr"] = settings.lr * (1 - step / settings.steps)
        optimizer.step()
        if (step + 1) % EVERY == 0 or step + 1 == settings.steps:
            with torch.no_grad():
                now_W, now_bias = W + length * D, bias + length * d
            now = estimate(now_W, now_bias)
            better = now < best
            best = torch.where(better, now, best)
            best_W[better], best_bias[better] = now_W[better], now_bias[better]
            stale = 0 if bool(better.any()) else stale + 1
            if stale == PATIENCE:
                break
    return best_W, best_bias


@torch.no_grad()
def _verdict(model: HookedModel, A: Tensor, b: Tensor, held: Positions, room: Budget) -> tuple[Tensor, Tensor, Tensor]:
    """Zeroes the translators of layers where the logit lens has the smaller KL."""
    n = len(A)
    sums = torch.zeros(n, 2, dtype=torch.float64)
    for rows in _chunks(model, len(held.final), room):
        log_p = widen(model.unembed(held.final[rows].to(model.dtype))).log_softmax(-1)
        for i in range(n):
            plain = held.layers[i, rows]
            for j, resid in enumerate((plain, plain + plain @ A[i].T + b[i])):
                log_q = widen(model.unembed(resid.to(model.dtype))).log_softmax(-1)
                sums[i, j] += kl(log_p, log_q).clamp(min=0).sum().cpu()
    mean = sums / len(held.final)
    keep = mean[:, 1] < mean[:, 0]
    mean[:, 1] = mean.amin(1)
    return A.cpu() * keep[:, None, None], b.cpu() * keep[:, None], mean


# -- a part of the vocabulary ------------------------------------------------------------------------------------------


def _draw(
    top: Int[Tensor, "row k"], d_vocab: int, n: int, generator: torch.Generator
) -> tuple[Int[Tensor, "token"], Float[Tensor, "token"]]:
    """The top tokens, `n` of the others at random, and the logarithm of how many tokens each stands for."""
    always = top.unique()
    others = torch.ones(d_vocab, dtype=torch.bool)
    others[always.cpu()] = False
    drawn = torch.randperm(d_vocab, generator=generator)
    drawn = drawn[others[drawn]][:n].to(top.device)
    n_others = d_vocab - len(always)
    weight = torch.zeros(len(always) + len(drawn), device=top.device)
    if len(drawn):
        weight[len(always) :] = log(n_others / len(drawn))
    return torch.cat([always, drawn]), weight


def _log_probs(model: HookedModel, resid: Tensor, columns: Tensor, weight: Tensor) -> Float[Tensor, "... token"]:
    """Log-probabilities of the drawn tokens, each times the number of tokens that it stands for."""
    logits = widen(model.unembed(resid.to(model.dtype), columns))
    return (logits + weight.to(logits)).log_softmax(-1)


def _divergence(model: HookedModel, resid: Tensor, columns: Tensor, weight: Tensor, log_p: Tensor) -> Tensor:
    """The estimated KL(final ‖ lens), one per row. Its mean is at least 0."""
    log_q = _log_probs(model, resid, columns, weight)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def _top(model: HookedModel, final: Float[Tensor, "row d_model"], room: Budget) -> Int[Tensor, "row k"]:
    """The most probable next tokens at each position."""
    k = min(TOP, model.d_vocab)
    return torch.cat(
        [model.unembed(final[rows].to(model.dtype)).topk(k).indices for rows in _chunks(model, len(final), room)]
    )


@torch.no_grad()
def _quick(
    model: HookedModel, held: Positions, settings: FitSettings, room: Budget, generator: torch.Generator
) -> Quick:
    columns, weight = _draw(_top(model, held.final, room), model.d_vocab, settings.vocabulary, generator)
    return Quick(held.layers, columns, weight, _log_probs(model, held.final, columns, weight))


def _chunks(model: HookedModel, n: int, room: Budget) -> Iterator[slice]:
    """Rows whose logits over the whole vocabulary fit the budget."""
    step = max(1, room.bytes // 2 // (COPIES * model.d_vocab * wide_dtype(model.dtype).itemsize))
    return (slice(first, first + step) for first in range(0, n, step))
