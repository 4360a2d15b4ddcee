"""What the prompts of a result say about others: bootstrap bounds of the mean, and p-values, as numbers for each cell."""

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from mechkit._statistics import bootstrap, sign_flip_test
from mechkit.result._checks import check_finite

if TYPE_CHECKING:
    from mechkit.result._result import Result

_DRAWS = 2**29  # prompts that are drawn in all resamples together, at most: 4 GiB of counts


def bootstrap_bounds(
    result: "Result",
    numerator: Tensor,
    denominator: Tensor,
    level: float,
    n_resamples: int,
    seed: int,
    method: str,
) -> np.ndarray:
    """Bounds `[2 cell]` of the mean over prompts of `numerator`, as a share of that of `denominator`.

    Raises:
        ValueError: an argument of `Result.ci` is out of range, or there are too few prompts.
    """
    check_prompts(result, "ci")
    if not 0 < level < 1 or n_resamples < 1 or method not in ("percentile", "basic", "studentized"):
        raise ValueError(
            "ci: expected 0 < level < 1, n_resamples >= 1 and method 'percentile', 'basic' or 'studentized', "
            f"got {level!r}, {n_resamples!r} and {method!r}"
        )
    _check_draws(result, n_resamples)
    quantiles = ((1 - level) / 2, (1 + level) / 2)
    n_prompts = len(result.coords["prompt"])
    draws = np.random.default_rng(seed).multinomial(n_prompts, [1 / n_prompts] * n_prompts, size=n_resamples)
    return bootstrap(_by_prompt(result, numerator), _by_prompt(result, denominator), draws, quantiles, method)


def p_values(result: "Result", n_resamples: int, seed: int, fdr: bool) -> np.ndarray:
    """The p-value of every cell, `[cell]`, as `Result.p_values` describes."""
    from scipy.stats import false_discovery_control

    check_prompts(result, "p_values")
    if n_resamples < 1:
        raise ValueError(f"p_values: expected n_resamples >= 1, got {n_resamples!r}")
    _check_draws(result, min(n_resamples, 2 ** len(result.coords["prompt"])))
    effects = _by_prompt(result, result.effect().values if result.baseline else result.values)
    p = sign_flip_test(effects, n_resamples, np.random.default_rng(seed))
    present = ~np.isnan(p)
    if fdr and present.any():
        p[present] = false_discovery_control(p[present])
    return p


def check_prompts(result: "Result", what: str) -> None:
    """Raises `ValueError` for a result with fewer than two prompts, or with an infinity."""
    if len(result.coords.get("prompt", ())) < 2:
        raise ValueError(f"{what}: expected a result with at least 2 prompts, got dims {result.dims} of {result.shape}")
    check_finite({"values": result.values, **result.baseline})


def _check_draws(result: "Result", n: int) -> None:
    """Raises `ValueError` for more resamples than fit into a few gigabytes."""
    n_prompts = len(result.coords["prompt"])
    most = _DRAWS // n_prompts
    if n > most:
        raise ValueError(f"n_resamples: expected at most {most:,} for {n_prompts} prompts, got {n:,}")


def _by_prompt(result: "Result", tensor: Tensor) -> np.ndarray:
    """`[prompt cell]` in float64."""
    by_prompt = tensor.expand(result.shape).movedim(result.dims.index("prompt"), 0)
    return by_prompt.numpy(force=True).astype(np.float64).reshape(len(by_prompt), -1)
