"""Resampling over prompts, for all cells at once: the bootstrap of a ratio of sums, and the sign-flip test of a mean.

Percentile bootstrap, Efron and Tibshirani (1993), chapter 13; studentized (bootstrap-t), chapter 12; sign-flip permutation test,
Good (2005), section 3.2. How often the intervals cover: `benchmarks/truth/intervals.py`.
"""

from collections.abc import Iterator

import numpy as np

_CHUNK = 2**22  # numbers held at once: 32 MiB of float64
FEW = 30  # prompts, below which an interval covers less often than it should
SKEWED = 1.5  # skewness of the prompts' residuals from which it does so with more of them
_STUDENTS = 5  # prompts from which resamples of a single prompt are rare
_LEAST = 0.2  # a resample's standard error is taken to be at least this share of the sample's


def bootstrap(
    numerator: np.ndarray, denominator: np.ndarray, draws: np.ndarray, quantiles: tuple[float, float], method: str
) -> np.ndarray:
    """Bounds `[2 cell]` of sum(numerator) / sum(denominator) over the prompts that have the cell.

    Drawing a set of prompts is counting how often each is drawn, so all resamples are one matrix product.
    """
    bounds = np.full((2, numerator.shape[1]), np.nan)
    exists = ~np.isnan(numerator)
    enough = (exists.sum(0) >= 2).nonzero()[0]
    weights = np.concatenate([np.ones_like(draws[:1]), draws]).astype(np.float64)  # first row: the prompts themselves
    for cells in _chunks(enough, len(weights)):
        here = exists[:, cells]
        total = weights @ np.where(here, numerator[:, cells], 0)
        scale = weights @ np.where(here, denominator[:, cells], 0)
        drawn = weights @ here > 0  # a resample may lack every prompt that has the cell
        flips = (drawn & (scale * scale[0] <= 0)).mean(0)
        if (flips > quantiles[0]).any():
            raise ValueError(
                f"ci: expected clean - corrupted to keep its sign, but it changes in {flips.max():.0%} of the "
                "resamples: too noisy to divide by; use effect().ci()"
            )
        ratio = np.divide(total, scale, out=np.full_like(total, np.nan), where=drawn & (scale != 0))
        if method == "studentized":
            n = weights @ here
            error = _standard_errors(weights, numerator[:, cells], denominator[:, cells], ratio, n, scale)
            least = _LEAST * error[0]  # a resample that lacks the rare prompts has hardly any
            student = (ratio[1:] - ratio[0]) / np.where(error[0] > 0, np.maximum(error[1:], least), np.inf)
            few = (n[0] < _STUDENTS) | (error[0] == 0)
            ends = ratio[0] - np.nanquantile(student, quantiles, axis=0)[::-1] * error[0]
            bounds[:, cells] = np.where(few, np.nanquantile(ratio[1:], quantiles, axis=0), ends)
            continue
        quantile = np.nanquantile if np.isnan(ratio).any() else np.quantile
        bounds[:, cells] = quantile(ratio[1:], quantiles, axis=0)
        if method == "basic":
            bounds[:, cells] = 2 * ratio[0] - bounds[::-1, cells]
    return bounds


def _standard_errors(
    weights: np.ndarray,
    numerator: np.ndarray,
    denominator: np.ndarray,
    ratio: np.ndarray,
    n: np.ndarray,
    scale: np.ndarray,
) -> np.ndarray:
    """The standard error `[resample cell]` of each resample's ratio, from the residuals `numerator - ratio denominator` (the
    delta method); 0 where they are 0 to rounding."""
    exists = ~np.isnan(numerator)
    a, b = np.where(exists, numerator, 0), np.where(exists, denominator, 0)
    squares, products, scales = weights @ (a * a), weights @ (a * b), weights @ (b * b)
    explained = ratio * ratio * scales
    residual = squares - 2 * ratio * products + explained
    residual[~(residual > 1e-12 * (squares + explained))] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        error: np.ndarray = np.sqrt(residual * n / (n - 1)) / np.abs(scale)
    return np.where(np.isfinite(error), error, 0)


def caution(numerator: np.ndarray, denominator: np.ndarray) -> str:
    """Why an interval of sum(numerator) / sum(denominator) over these prompts may cover too seldom; empty if nothing is known.

    Residuals `numerator - ratio denominator` that are skewed come from a few prompts: sets of prompts that lack them look alike.
    """
    n, reasons = len(numerator), []
    if n < FEW:
        reasons.append(f"{n} {'prompt is' if n == 1 else 'prompts are'} few (expected {FEW} or more)")
    with np.errstate(divide="ignore", invalid="ignore"):
        residual = numerator - numerator.sum() / denominator.sum() * denominator
        skewness = float((residual**3).mean() / (residual**2).mean() ** 1.5)
    if n >= 3 and abs(skewness) > SKEWED:
        parts = np.sort(np.abs(residual))[::-1]
        carry = int(np.searchsorted(np.cumsum(parts), parts.sum() / 2)) + 1
        reasons.append(f"{carry} of {n} prompts carry half of the deviations (skewness {skewness:+.1f})")
    return " and ".join(reasons)


def sign_flip_test(effects: np.ndarray, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """p-value `[cell]` of effects `[prompt cell]`, under the null hypothesis that each prompt's effect is as likely as its
    opposite; a prompt that lacks the cell adds 0 to every sum."""
    n_prompts, n_cells = effects.shape
    exact = 2**n_prompts <= n_resamples + 1
    if exact:
        flips = np.arange(2**n_prompts)[:, None] >> np.arange(n_prompts) & 1
    else:
        flips = rng.integers(0, 2, size=(n_resamples, n_prompts))
    signs = 1.0 - 2.0 * flips
    p = np.full(n_cells, np.nan)
    for cells in _chunks((~np.isnan(effects)).any(0).nonzero()[0], len(signs)):
        here = np.nan_to_num(effects[:, cells])
        rounding = 1e-12 * np.abs(here).sum(0)
        extreme = (np.abs(signs @ here) >= np.abs(here.sum(0)) - rounding).sum(0)
        p[cells] = extreme / len(signs) if exact else (extreme + 1) / (len(signs) + 1)
    return p


def _chunks(cells: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    size = max(1, _CHUNK // rows)
    return (cells[start : start + size] for start in range(0, len(cells), size))
