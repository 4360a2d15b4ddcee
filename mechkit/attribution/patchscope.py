"""Patchscopes: let the model itself say what a hidden state means, by reading it in another prompt.

1. Run the source prompts; take the hidden state at a layer and position.
2. Run a target prompt that makes the model speak about whatever stands at its target position, such as the `?` of
   `"cat -> cat; 1135 -> 1135; hello -> hello; ? ->"`, with the hidden state written there, at the same layer or at another.
3. Read the next token at the target's end, or let the model continue.

Ghandeharioun et al. 2024, https://arxiv.org/abs/2401.06102.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._check import checked
from mechkit._precision import widen
from mechkit._progress import Progress
from mechkit.attribution.logit_lens import TopTokens, check_k, make_top_tokens
from mechkit.engine import Budget, check_can_run, check_tokens
from mechkit.experiment.axes import choose_indices
from mechkit.experiment.positions import choose_positions, places_of, split_prompts
from mechkit.experiment.provenance import provenance_of
from mechkit.hooks import SITES, HookedModel, get_site, one_at_a_time, record
from mechkit.hooks._nonfinite import where_it_began
from mechkit.prompts import AnyPrompts, Prompts, Stacked, as_prompts

# Makes a model repeat what stands at its `?`, which is at position -2 wherever `?` and `->` are one token each.
IDENTITY = "cat -> cat; 1135 -> 1135; hello -> hello; ? ->"
Position = int | str


@checked
@one_at_a_time
def patchscope(
    model: HookedModel,
    prompts: AnyPrompts,
    target: str | Tensor | Sequence[int] | Prompts,
    *,
    positions: Position | Sequence[int] | Sequence[str] = -1,
    target_position: int = -1,
    site: str = "resid_post",
    layers: Sequence[int] | None = None,
    target_layer: int | None = None,
    k: int = 5,
    max_new_tokens: int = 0,
    budget: int | None = None,
    progress: bool = True,
) -> TopTokens:
    """Writes hidden states of the prompts into a target prompt, and reads what the model predicts at the target's end.

    Args:
        model: In evaluation mode.
        prompts: The sources: the clean prompts of pairs.
        target: The target prompt: text (tokenized as the model does by default, so perhaps with a beginning-of-sequence
            token), token ids, or one prompt. `IDENTITY` (with `target_position=-2`) asks the model to repeat what it is given.
        positions: Where hidden states are taken: an index, negative from each prompt's end; a name of a position of pairs; or
            several of either, which then are a dim of the result (`"pos"` or `"position"`).
        target_position: Where they are written: an index into the target, negative from its end.
        site: `"resid_pre"`, `"resid_mid"`, `"resid_post"`, `"attn_out"` or `"mlp_out"`.
        layers: Layers that hidden states are taken from; all by default.
        target_layer: The layer that they are written at; by default the one that they came from.
        k: How many tokens to report.
        max_new_tokens: How many tokens to continue with, greedily, the hidden state in place all along. A text ends before
            the end-of-sequence token.
        budget: Bytes of working memory; default half of the GPU's free memory, 1 GiB on a CPU.
        progress: Show a progress bar when it takes long.

    Returns:
        The `k` most probable next tokens of every layer and prompt: dims `("layer", "k", "prompt")`, with `"pos"` or
        `"position"` after the layer if there are several. Where a prompt has no such position: NaN, id -1 and empty text.
        `.text` holds the continuations `[layer, (position,) prompt]`, if any were asked for.

    Raises:
        ValueError: an unknown site, an index out of range, an empty target, training mode, NaN in a run.

    Example:
        >>> prompts = mk.Prompts.from_text(model, ["I like Paris", "I like music"])
        >>> patchscope(model, prompts, IDENTITY, target_position=-2, layers=[6], k=1).strings
        array([[[' Paris', ' music']]], dtype=object)
    """
    prompts = as_prompts(model, prompts)
    base, named, task = split_prompts(prompts)
    goal = _target(model, target)
    _check_arguments(model, base, goal, k, max_new_tokens)
    found_site = get_site(site)
    if found_site.dims != ("pos", "d_model") or not found_site.in_block or not model.has_site(found_site.name):
        choices = [s for s in model.sites if SITES[s].dims == ("pos", "d_model") and SITES[s].in_block]
        raise ValueError(f"site: expected one of {', '.join(choices)}, got {site!r}")
    source_layers = choose_indices("layers", layers, model.n_layers)
    if target_layer is not None:
        target_layer = choose_indices("target_layer", [target_layer], model.n_layers)[0]
    target_position = choose_indices("target_position", [target_position], goal.tokens.shape[1])[0]
    dim, labels, places = _places(base, named, positions)
    room = Budget.of(model, budget)
    hidden = _hidden_states(model, base, [(found_site.name, layer) for layer in source_layers], places, room)
    exists = ~hidden.isnan().any(-1).cpu()  # [layer place prompt]
    written = exists.nonzero()
    row_layers = [source_layers[int(i)] if target_layer is None else target_layer for i in written[:, 0]]
    probs, ids, text, computed = _run_rows(
        model,
        goal,
        hidden[exists.to(hidden.device)],
        found_site.name,
        row_layers,
        target_position,
        k,
        max_new_tokens,
        room,
        progress,
    )
    shape = tuple(exists.shape)
    all_probs = torch.full((*shape, k), torch.nan, dtype=probs.dtype)
    all_ids, all_text = torch.full((*shape, k), -1), np.full(shape, "", dtype=object)
    all_probs[exists], all_ids[exists] = probs, ids
    for where, one in zip(written.tolist(), text, strict=True):
        all_text[tuple(where)] = one
    dims = ["layer"]
    coords: dict[str, tuple[Position, ...]] = {"layer": tuple(source_layers)}
    if dim is None:
        all_probs, all_ids, all_text = all_probs[:, 0], all_ids[:, 0], all_text[:, 0]
    else:
        dims, coords[dim] = ["layer", dim], labels
    provenance = provenance_of(
        model,
        base,
        technique="patchscope",
        site=found_site.name,
        over=" ".join(dims),
        task=task,
        target=goal.tokens[0].tolist(),
        target_position=target_position,
        target_layer=target_layer,
        positions=list(labels),
        k=k,
        max_new_tokens=max_new_tokens,
    )
    computed += int(base.lengths.sum()) * model.n_layers
    return make_top_tokens(
        model,
        all_probs.movedim(-1, -2),
        all_ids.movedim(-1, -2),
        dims,
        coords,
        provenance,
        computed,
        all_text if max_new_tokens else None,
    )


def _target(model: HookedModel, target: str | Tensor | Sequence[int] | Prompts) -> Stacked:
    """The target prompt, as one row."""
    if isinstance(target, Prompts):
        if len(target) != 1:
            raise ValueError(f"target: expected one prompt, got {len(target)}")
        check_can_run(model, {"target": target})
        return target.stack([0])
    if model.reads_pictures_alone:
        raise ValueError(f"target: expected Prompts with a picture, since {model.name} reads pictures alone")
    if isinstance(target, str):
        return Stacked(model.to_tokens(target)[:1].cpu())
    tokens = torch.as_tensor(target).cpu()
    if tokens.ndim == 2 and len(tokens) == 1:
        tokens = tokens[0]
    if tokens.ndim != 1 or tokens.is_floating_point() or len(tokens) == 0:
        raise ValueError(f"target: expected token ids [pos], got {tokens.dtype} {list(tokens.shape)}")
    model.check_placeholders(tokens, "target")
    return Stacked(tokens.long()[None])


def _check_arguments(model: HookedModel, base: Prompts, goal: Stacked, k: int, max_new_tokens: int) -> None:
    check_can_run(model, {"prompt": base})
    check_k(model, k)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected 0 or more, got {max_new_tokens!r}")
    tokens = goal.tokens[0]
    longest = torch.cat([tokens, tokens[-1:].expand(max(0, max_new_tokens - 1))])  # the last new token is never read
    check_tokens(model, longest, "target" if max_new_tokens < 2 else "target with its continuation")


def _places(
    prompts: Prompts, named: Mapping[str, Tensor], positions: Position | Sequence[int] | Sequence[str]
) -> tuple[str | None, tuple[int | str, ...], Int[Tensor, "place prompt"]]:
    """The dim (`None` for a single position), its labels, and each prompt's positions; -1 where it has none."""
    single = isinstance(positions, str) or not isinstance(positions, Sequence)
    several: list[Any] = (
        [positions] if isinstance(positions, str) or not isinstance(positions, Sequence) else [*positions]
    )
    if several and all(isinstance(one, str) for one in several) and len(set(several)) == len(several):
        names = choose_positions(named, several)
        return None if single else "position", tuple(names), places_of(prompts.lengths, named, names)
    if (
        not several
        or any(isinstance(one, bool) or not isinstance(one, int) for one in several)
        or len(set(several)) < len(several)
    ):
        raise ValueError(f"positions: expected indices or names, at least one and each once; got {positions!r}")
    at = places_of(prompts.lengths, named, several)
    if bool((at < 0).all(1).any()):
        raise ValueError(
            f"positions: expected indices into at most {int(prompts.lengths.max())} tokens, got {positions!r}"
        )
    return None if single else "pos", tuple(several), at


@torch.no_grad()
def _hidden_states(
    model: HookedModel,
    prompts: Prompts,
    sites: Sequence[tuple[str, int]],
    places: Int[Tensor, "place prompt"],
    room: Budget,
) -> Float[Tensor, "layer place prompt d_model"]:
    """The sources' hidden states, on the model's device; NaN where a prompt has no such position."""
    shape = (len(sites), *places.shape, model.d_model)
    hidden = torch.full(shape, torch.nan, dtype=model.dtype, device=model.device)
    for batch in prompts.batches(lambda length, _: room.prompts_at_once(model, length, sites)):
        run = record(model, batch.stacked, sites, blocks=False)
        member, place = (places[:, batch.ids].T >= 0).nonzero(as_tuple=True)
        pos = places[:, batch.ids].T[member, place]
        for i, site in enumerate(sites):
            states = run.sites[site]
            states = states[member.to(states.device), pos.to(states.device)]
            if len(bad := (~torch.isfinite(states)).any(-1).nonzero().flatten().tolist()):
                first_bad = int(member[bad[0]])
                raise ValueError(
                    f"prompts: expected finite activations, got NaN or inf in {site} of prompt {batch.ids[first_bad]}; "
                    f"{where_it_began(model, run.rows[[first_bad]])}"
                )
            hidden[i, place, torch.tensor(batch.ids)[member]] = states.to(hidden)
    return hidden


@torch.no_grad()
def _run_rows(
    model: HookedModel,
    goal: Stacked,
    hidden: Float[Tensor, "row d_model"],
    site: str,
    layers: Sequence[int],
    position: int,
    k: int,
    max_new_tokens: int,
    room: Budget,
    progress: bool,
) -> tuple[Tensor, Tensor, list[str], int]:
    """Probabilities and ids of the top tokens `[row k]`, continuations, and how many block-tokens were computed."""
    length = goal.tokens.shape[1] + max(0, max_new_tokens - 1)
    fits = room.prompts_at_once(model, length, [(site, 0)])
    fits = max(1, min(fits, room.bytes // 4 // (3 * model.d_vocab * hidden.element_size())))
    probs, ids, text, computed = [], [], [], 0
    with Progress(len(hidden), "row", progress) as bar:
        for first in range(0, len(hidden), fits):
            rows = slice(first, first + fits)
            n = len(hidden[rows])
            writes = _writes(hidden[rows], site, layers[rows], position)
            rows_of_goal = goal.to(model.device)[torch.zeros(n, dtype=torch.long, device=model.device)]
            for step in range(max(1, max_new_tokens)):
                with model.hooks(writes):
                    logits = widen(record(model, rows_of_goal, blocks=False).last_logits)
                computed += rows_of_goal.tokens.numel() * model.n_layers
                if step == 0:
                    best = logits.softmax(-1).topk(k)
                    if bool(logits.isnan().any()):
                        raise ValueError("target: the model's logits are NaN where the hidden state was written")
                    probs.append(best.values.cpu())
                    ids.append(best.indices.cpu())
                rows_of_goal = rows_of_goal.and_one(logits.argmax(-1).to(rows_of_goal.tokens))
            text += _texts(model, rows_of_goal.tokens[:, goal.tokens.shape[1] :]) if max_new_tokens else [""] * n
            bar.update(n)
    return torch.cat(probs), torch.cat(ids), text, computed


def _writes(
    hidden: Float[Tensor, "row d_model"], site: str, layers: Sequence[int], position: int
) -> list[tuple[tuple[str, int], Any]]:
    """Hooks that write each row's hidden state into that row alone, at its own layer."""

    def write(activation: Tensor, hook: Any, rows: Tensor) -> Tensor:
        activation = activation.clone()
        rows = rows.to(activation.device)
        activation[rows, position] = hidden.to(activation)[rows]
        return activation

    by_layer: dict[int, list[int]] = {}
    for row, layer in enumerate(layers):
        by_layer.setdefault(layer, []).append(row)
    return [((site, layer), partial(write, rows=torch.tensor(rows))) for layer, rows in by_layer.items()]


def _texts(model: HookedModel, tokens: Int[Tensor, "row pos"]) -> list[str]:
    """Each row as text, up to the end-of-sequence token; without a tokenizer, the ids."""
    end = getattr(model.tokenizer, "eos_token_id", None)
    texts = []
    for row in tokens.tolist():
        kept = row[: row.index(end)] if end in row else row
        texts.append(
            " ".join(map(str, kept)) if model.tokenizer is None else str(model.to_string(kept)) if kept else ""
        )
    return texts
