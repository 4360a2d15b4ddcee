"""Attention knockout: which information goes from where to where, found by forbidding it.

1. In a window of layers no head may attend from the `to` positions to the `from_` positions: those scores are as if masked.
2. The metric of each such run is the window's value; what it lost against the unedited run went along these edges.

Exact, on the engine. Geva et al. 2023, https://arxiv.org/abs/2304.14767 (from the subject to the last token, windows of layers);
for pictures Neo et al. 2024, https://arxiv.org/abs/2410.07149, and Basu et al. 2024, https://arxiv.org/abs/2406.04236.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import pad

from mechkit._check import checked, is_whole
from mechkit.engine import Cell, Edit, Operation, check_can_run, masks_of, sees, sweep
from mechkit.experiment.axes import choose_indices, choose_layers
from mechkit.experiment.patches import patch_positions
from mechkit.experiment.provenance import pictures_of, provenance_of
from mechkit.hooks import HookedModel, get_site, one_at_a_time, record
from mechkit.metrics import AnyMetric, metric_for
from mechkit.prompts import Kind, PromptPairs, Prompts
from mechkit.result import Result

Places = str | int | Sequence[str | int]
_KEY = "blocked"


@dataclass(frozen=True)
class Forbid(Operation):
    """Scores where the operand is not 0 become as low as the causal mask makes those of later positions."""

    keeps_equal: ClassVar[bool] = False
    looks: ClassVar[bool] = True

    def apply(self, x: Tensor, operand: Tensor) -> Tensor:
        return torch.where(operand != 0, torch.finfo(x.dtype).min, x)


@checked
@one_at_a_time
def attention_knockout(
    model: HookedModel,
    pairs: PromptPairs,
    metric: AnyMetric,
    *,
    from_: Places,
    to: Places = "END",
    window: int | None = 1,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    budget: int | None = None,
    progress: bool = True,
    replay: bool = True,
) -> Result:
    """Forbids the attention from some positions to others, in a window of layers around each layer.

    Args:
        model: In evaluation mode, with attention that writes its scores down (the eager one).
        pairs: Whose clean prompts are run.
        metric: As for `ablation`.
        from_: Where information comes from: a named position (`"subject"`), a kind of segment (`"image"`, `"text"`, `"special"`),
            a patch (`"r0c2"`), an index, or several of these. (Keys: those that are attended to.)
        to: Where it must not arrive. (Queries: those that attend.)
        window: How many layers around each one lose the edges together: 1 is that layer alone; an even number has one more layer
            before than behind. `None` is all layers at once.
        layers: The windows' centres; all by default.
        heads: Which heads lose them; all by default.
        budget, progress, replay: As for `activation_patching`.

    Returns:
        A `Result` with dims `("layer", "prompt")`, or `("prompt",)` for all layers at once: the metric of each run, in its unit;
        the baseline is the unedited clean run.

    Raises:
        ValueError: positions that there are not, none that could attend to `from_`, one that would be left with nothing to attend
            to, an architecture without attention scores.

    Example:
        >>> flow = attention_knockout(model, pairs, logit_diff(pairs), from_="image", to="text", window=5)
        >>> flow.mean("prompt").effect
    """
    site, prompts = get_site("attn_scores"), pairs.clean
    model.check_site(site.name)
    centres = choose_layers(model, site, layers)
    if window is not None and (not is_whole(window) or window < 1):
        raise ValueError(f"window: expected a number of layers of 1 or more, or None for all; got {window!r}")
    if window is None and layers is not None:
        raise ValueError("layers: given, but window=None takes all layers at once; give a window, or leave out layers")
    chosen = None if heads is None else choose_indices("heads", heads, model.n_heads)
    measured = metric_for(metric, pairs)
    check_can_run(model, {"prompt": prompts})
    named = {**patch_positions(prompts), **pairs.positions}
    seen = _visible(model, prompts)
    blocked = [_blocked(prompts, named, i, from_, to, seen[i]) for i in range(len(prompts))]
    windows = [tuple(model.layers_with(site.name))]
    if window is not None:
        windows = [_window(layer, window, model.layers_with(site.name)) for layer in centres]
    longest = int(prompts.lengths.max())
    cells = _cells(windows, chosen, blocked)
    value = torch.stack([pad(one, (0, longest - len(one)) * 2) for one in blocked]).to(model.dtype)[:, None]
    values = {_KEY: {(site.name, layer): value for layer in {edit.layer for cell in cells for edit in cell}}}
    answers = sweep(
        model,
        prompts,
        cells,
        measured,
        values=values,
        base_is="clean",
        budget=budget,
        progress=progress,
        replay=replay,
    )
    result = Result(
        values=answers.values,
        dims=("layer", "prompt"),
        coords={"layer": tuple(centres) if window is not None else (0,), "prompt": tuple(range(len(prompts)))},
        baseline={"clean": answers.base},
        base="clean",
        metric=measured.name,
        unit=measured.unit,
        provenance=provenance_of(
            model,
            prompts,
            technique="attention_knockout",
            site=site.name,
            over="layer",
            replay=answers.replay,
            from_=from_ if isinstance(from_, str | int) else list(from_),
            to=to if isinstance(to, str | int) else list(to),
            window=window,
            heads=chosen,
            task=pairs.task,
        ),
        cost=answers.cost,
        pictures=pictures_of(prompts),
    )
    if window is not None:
        return result
    return replace(result, values=answers.values[0], dims=("prompt",), coords={"prompt": result.coords["prompt"]})


def _window(layer: int, size: int, there: Sequence[int]) -> tuple[int, ...]:
    first = layer - size // 2
    return tuple(one for one in range(first, first + size) if one in there)


def _cells(
    windows: Sequence[tuple[int, ...]], heads: Sequence[int] | None, blocked: Sequence[Bool[Tensor, "_ _"]]
) -> list[Cell]:
    """A cell for each window: of every position that loses an edge its row of scores, the first one of each prompt, the second, …
    (the last one again where a prompt has fewer)."""
    rows = [one.any(1).nonzero()[:, 0].tolist() for one in blocked]
    at = [tuple(mine[min(j, len(mine) - 1)] for mine in rows) for j in range(max(map(len, rows)))]
    return [
        tuple(
            Edit("attn_scores", layer, _KEY, head=head, pos=row, operation=Forbid())
            for layer in layers
            for head in ([None] if heads is None else heads)
            for row in at
        )
        for layers in windows
    ]


def _visible(model: HookedModel, prompts: Prompts) -> list[Bool[Tensor, "_ _"]]:
    """For each prompt which position can see which, in some layer, `[pos src]`: later ones too, if the model's masks say so."""
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    for ids in prompts.groups():
        run = record(model, prompts.stack(ids[:1]))
        masks = {id(mask): mask for layer in masks_of(run) for mask in layer}
        everywhere = torch.ones(run.length, run.length, dtype=torch.bool)
        seen = [sees(mask).flatten(0, 1).any(0).cpu() for mask in masks.values()]
        some = torch.stack(seen).any(0) if seen else everywhere if model.reads_pictures_alone else everywhere.tril()
        for i in ids:
            found[i] = some
    return found


def _blocked(
    prompts: Prompts, named: Mapping[str, Tensor], i: int, from_: Places, to: Places, seen: Bool[Tensor, "pos src"]
) -> Bool[Tensor, "pos src"]:
    """Which position may not attend to which, in prompt `i`, among those that it can see."""
    length = len(prompts.tokens[i])
    sources, targets = (_positions(prompts, named, i, places, name) for name, places in (("from_", from_), ("to", to)))
    blocked = torch.zeros(length, length, dtype=torch.bool)
    blocked[np.ix_(targets, sources)] = True
    blocked = blocked & seen
    if not blocked.any():
        raise ValueError(
            f"from_, to: expected positions of which the second attend to the first; in prompt {i}, {targets} see nothing of "
            f"{sources}"
        )
    if alone := (~(seen & ~blocked).any(1)).nonzero()[:, 0].tolist():
        raise ValueError(
            f"from_: position {alone[0]} of prompt {i} would be left with nothing to attend to; leave it out of to, or itself "
            "out of from_"
        )
    return blocked


def _positions(prompts: Prompts, named: Mapping[str, Tensor], i: int, places: Places, argument: str) -> list[int]:
    several: list[str | int] = [places] if isinstance(places, str | int) else list(places)
    found: set[int] = set()
    length = len(prompts.tokens[i])
    for one in several:
        if isinstance(one, str) and one in named:
            found.add(int(named[one][i]))
        elif isinstance(one, str) and one in get_args(Kind):
            segments = prompts.segments[i] if prompts.segments is not None else ()
            inside = [at for s in segments if s.kind == one for at in s.positions]
            inside = list(range(length)) if one == "text" and not segments else inside
            if not inside:
                raise ValueError(f"{argument}: prompt {i} has no {one!r} segment")
            found.update(inside)
        elif not isinstance(one, str) and is_whole(one) and -length <= one < length:
            found.add(one % length)
        else:
            kinds = ", ".join(map(repr, get_args(Kind)))
            raise ValueError(
                f"{argument}: expected named positions ({', '.join(list(named)[-8:])}), kinds of segment ({kinds}), or indices "
                f"into {length} tokens; got {one!r}"
            )
    if not found:
        raise ValueError(f"{argument}: expected at least one position, got none")
    return sorted(found)
