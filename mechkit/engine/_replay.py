"""Exact suffix replay: recomputing only what an edit can reach.

1. `record` runs the base prompts once and keeps each block's input, its keyword arguments, and each layer's keys and values.
2. A row with an edit in block l at position p joins the batch at block l with the base run's residual stream from p on.
   Rows whose edits are in later blocks join at their block: one pass over the blocks serves all of them.
3. Each block runs only on positions ≥ p. Its attention finds the keys and values of the positions before p in a cache
   that only reads (`PrefixCache`): they are the base run's, because causal attention cannot move a change to earlier positions.
4. In the last block only the position that the metric reads is computed in full; for the others only keys and values.
5. Rows that are edited in a vision tower run all that comes before the first block (the whole tower, where each patch sees all
   others), and are replayed from the first position that a picture stands for.

Nothing is approximated. Its conditions (causality, blocks that can be called by themselves) are checked by the sweep
on a sample of cells; where they do not hold, whole forward passes are run instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit.engine._edits import BEFORE, EditGroup, EditPlan, Rows, ValueLookup, write
from mechkit.engine._in_step import ByLayer
from mechkit.engine._plain import PlainBlocks
from mechkit.hooks._capture import LeaveError, capture
from mechkit.hooks._devices import to_device
from mechkit.hooks._hooking import Hooks
from mechkit.hooks._record import OF_ALL_PROMPTS, CannotReplayError, Run, stream_of
from mechkit.hooks._sites import SITES, as_computed, by_prompt

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel


# What blocks that are called by themselves may raise, our own errors among them.
CANNOT_RUN = (ValueError, TypeError, AttributeError, AssertionError, IndexError, KeyError, RuntimeError)


def why_not(error: Exception) -> str:
    """What an error of a block that was called by itself means to a user: another library's words would not help."""
    ours = isinstance(error, CannotReplayError | UnreachedEditError)
    return str(error) if ours else f"its blocks do not run by themselves ({type(error).__name__})"


class UnreachedEditError(ValueError):
    """A run did not compute a site that is edited in it, so that nothing was changed."""


class PrefixCache:
    """Presents the base run's keys and values before `start` as the past of a batch. Reads only; stores nothing.

    It has the interface of transformers' caches that attention layers use: `update` and `get_seq_length`.
    """

    is_compileable = False

    def __init__(self, keys: Tensor, values: Tensor, prompt: Int[Tensor, "row"], start: int) -> None:
        self._keys, self._values, self._prompt, self._start = keys, values, prompt, start

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._joined(self._keys, keys), self._joined(self._values, values)

    def get_seq_length(self, *_: Any) -> int:
        return self._start

    def _joined(self, past: Float[Tensor, "prompt head past d"], new: Float[Tensor, "row head pos d"]) -> Tensor:
        if self._start == 0:
            return new
        joined = new.new_empty(*new.shape[:2], self._start + new.shape[2], new.shape[3])
        joined[:, :, : self._start] = past[self._prompt, :, : self._start]
        joined[:, :, self._start :] = new
        return joined


class KeysAndValues(LeaveError):
    """Carries a layer's keys and values out of its attention, which needs nothing else computed."""


class _LeavingCache(PrefixCache):
    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise KeysAndValues(*super().update(keys, values))


class Replayer:
    """Replays blocks of one recorded run. Counts the (block, token) pairs that it computes.

    Args:
        model: The model that was recorded.
        run: The unedited run.
        plain: Blocks to use where nothing is edited; `None` uses the bridge's everywhere.
        tower_tokens: (block, position) pairs of the vision tower in one row.
    """

    def __init__(self, model: HookedModel, run: Run, plain: PlainBlocks | None, tower_tokens: int = 0) -> None:
        self.model, self.run, self.plain, self.tower_tokens = model, run, plain, tower_tokens
        self.block_tokens = 0
        if run.refused is not None:
            raise CannotReplayError(run.refused)
        kept = run.cache.layers
        if {len(run.calls), len(kept)} != {model.n_layers} or any(layer.keys is None for layer in kept):
            raise CannotReplayError("its layers do not run once each, or keep no keys and values")
        if (name := self._other_for_some_prompt()) is not None:
            raise CannotReplayError(f"its blocks take another {name!r} for some prompts than for others")

    def replay(self, plan: EditPlan, rows: Rows, lookup: ValueLookup, read_last: bool) -> ByLayer[Tensor]:
        """The final residual stream of edited rows, computed block by block.

        Args:
            plan: The cells.
            rows: Rows to compute, sorted by `plan.entry` of their cells.
            lookup: Values to write.
            read_last: Whether only the last position is wanted.

        Returns:
            `[row pos d_model]` from `rows.start` on; one position if `read_last`.
        """
        entry, n_layers = plan.entry[rows.cell], self.model.n_layers
        prompt = to_device(rows.prompt, self.run.tokens.device)
        n_before = int((entry < 0).sum())
        hidden = self.run.resid[max(0, int(entry[0]))][:0, rows.start :]
        if n_before:
            hidden = self._before_the_blocks(plan, rows[:n_before], lookup)
        for layer in range(max(0, int(entry[0])), n_layers):
            yield layer
            n_edited, n = len(hidden), int((entry <= layer).sum())
            joining = self.run.resid[layer]
            hidden, prompt = (
                hidden.to(joining.device),
                prompt.to(joining.device),
            )  # a layer may have a device of its own
            if n > n_edited:
                hidden = torch.cat([hidden, joining[prompt[n_edited:n], rows.start :]])
            groups = plan.groups.get(layer, [])
            for group in groups:
                if group.site.name == "resid_post":
                    hidden = self._write_before(layer, group, rows[:n], hidden, prompt[:n], lookup)
                elif group.site.name == "resid_pre":
                    write(group, rows[:n], hidden, lookup)  # what the block is about to read: no hook is needed
            groups = [group for group in groups if group.site.name not in ("resid_pre", "resid_post")]
            # The first rows have their edits behind them, unless a cell edits several layers.
            n_plain = 0 if any(len(group.match(rows.cell[:n_edited])[0]) for group in groups) else n_edited
            n_plain = n_plain if groups else n
            last = read_last and layer == n_layers - 1
            hidden = self._block(layer, hidden, prompt[:n], rows[:n], groups, lookup, n_plain, last)
            hidden = self._and_between(layer, hidden, prompt[:n], rows.start)
        if read_last:
            rows = replace(rows, start=self.run.length - 1)
        final = self.run.resid[n_layers]
        joining = final[prompt.to(final.device)[len(hidden) :], rows.start :]
        hidden = torch.cat([hidden[:, -joining.shape[1] :].to(final.device), joining])
        for group in plan.groups.get(n_layers, ()):
            write(group, rows, hidden, lookup)
        return hidden

    def _before_the_blocks(self, plan: EditPlan, rows: Rows, lookup: ValueLookup) -> Tensor:
        """What the first block reads, from `rows.start` on, in rows that are edited in a vision tower."""
        read = ("resid_pre", 0)
        prompts = self.run.rows[to_device(rows.prompt, self.run.tokens.device)]
        with (
            attached_edits(self.model, plan.groups[BEFORE], replace(rows, start=0), lookup),
            capture(self.model, [read], stop=read) as kept,
        ):
            self.model.run(prompts)
        self.block_tokens += len(rows) * self.tower_tokens
        return kept[read][:, rows.start :]

    def block(self, layer: int, hidden: Tensor, prompt: Int[Tensor, "row"], start: int) -> Tensor:
        """One whole block, with the bridge's hook points, for rows `[row pos d_model]` that begin at position `start`; and what
        the model adds behind it."""
        output = self._call(layer, hidden, self._prefix(layer, prompt, start), start, hooked=True)
        return self._and_between(layer, output, prompt, start)

    def hooked(self, layer: int, hidden: Tensor, rows: Rows) -> Tensor:
        """One whole block, with the bridge's hook points, for rows `[row pos d_model]` that begin at one position."""
        prompt = to_device(rows.prompt, hidden.device)
        return self._call(layer, hidden, self._prefix(layer, prompt, rows.start), rows.start, hooked=True)

    def unedited(self, layer: int, prompt: Int[Tensor, "row"], start: int, hooked: bool = False) -> Tensor:
        """What a block makes of the recorded run, from position `start` on: where all is well, what the next block read.

        Args:
            layer: The block.
            prompt: Prompts of the run.
            start: The first position that is run.
            hooked: Whether the bridge's block is run rather than the plain one.
        """
        at = prompt.to(self.run.resid[layer].device)
        hidden = self.run.resid[layer][at, start:]
        output = self._call(layer, hidden, self._prefix(layer, at, start), start, hooked)
        return self._and_between(layer, output, at, start)

    def _and_between(self, layer: int, hidden: Tensor, prompt: Int[Tensor, "row"], start: int) -> Tensor:
        """A block's output, and what the model adds to it in the recorded run before the next block reads it."""
        added = self.run.between.get(layer)
        return hidden if added is None else hidden + added[prompt.to(added.device), start:].to(hidden.device)

    def _write_before(
        self, layer: int, group: EditGroup, rows: Rows, hidden: Tensor, prompt: Int[Tensor, "row"], lookup: ValueLookup
    ) -> Tensor:
        """Writes what the block before has written: what the model adds between the two comes after it."""
        added = self.run.between.get(layer - 1)
        if added is None:
            write(group, rows, hidden, lookup)
            return hidden
        added = added[prompt.to(added.device), rows.start :].to(hidden.device)
        before = hidden - added
        written = before.clone()
        write(group, rows, written, lookup)
        return torch.where(written == before, hidden, written + added)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "row pos head d_head"],
        k: Float[Tensor, "row pos kv_head d_head"],
        v: Float[Tensor, "row pos kv_head d_head"],
        prompt: Int[Tensor, "row"],
        start: int,
    ) -> Float[Tensor, "row pos head d_head"]:
        """What a layer's heads make of given queries, keys and values (before rotations and norms of them): their z.

        Gradients flow through. What the block would read is not used, nor is anything computed that comes after z.
        """
        given = {"q": q, "k": k, "v": v}

        def put(activation: Tensor, hook: Any, which: str) -> Tensor:
            return given[which].reshape(activation.shape)

        hidden = self.run.resid[layer][prompt.to(self.run.resid[layer].device), start:]
        puts = [(SITES[which].hook_name(layer), partial(put, which=which)) for which in given]
        z = ("z", layer)
        with capture(self.model, [z], lambda activation, _: activation, stop=z, hooks=puts) as kept:
            self._call(layer, hidden, self._prefix(layer, prompt, start), start, hooked=True)
        return kept[z].reshape(*q.shape[:3], -1)

    def _block(
        self,
        layer: int,
        hidden: Tensor,
        prompt: Tensor,
        rows: Rows,
        groups: Sequence[EditGroup],
        lookup: ValueLookup,
        n_plain: int,
        last: bool,
    ) -> Tensor:
        """One block. Rows from `n_plain` on are edited in it; of the others only the last position if `last`."""
        if n_plain == len(hidden) and not last:
            return self._call(layer, hidden, self._prefix(layer, prompt, rows.start), rows.start)
        parts = []
        if n_plain:
            run_part = self._last_position if last else self._whole_suffix
            parts.append(run_part(layer, hidden[:n_plain], prompt[:n_plain], rows.start))
        if n_plain < len(hidden):
            edited = rows[n_plain:]
            with attached_edits(self.model, groups, edited, lookup):
                cache = self._prefix(layer, prompt[n_plain:], rows.start)
                output = self._call(layer, hidden[n_plain:], cache, rows.start, hooked=True)
            parts.append(output[:, -1:] if last else output)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _whole_suffix(self, layer: int, hidden: Tensor, prompt: Tensor, start: int) -> Tensor:
        return self._call(layer, hidden, self._prefix(layer, prompt, start), start)

    def _last_position(self, layer: int, hidden: Tensor, prompt: Tensor, start: int) -> Tensor:
        """A block's output at the last position: of the others, keys and values are all that it needs."""
        end = self.run.length - 1
        if start == end:
            return self._whole_suffix(layer, hidden, prompt, start)
        layer_cache = self.run.cache.layers[layer]
        try:
            at = prompt.to(layer_cache.keys.device)
            self._call(layer, hidden, _LeavingCache(layer_cache.keys, layer_cache.values, at, start), start)
        except KeysAndValues as found:
            keys, values = found.args
        else:
            raise CannotReplayError("its attention does not use the cache")
        self.block_tokens -= len(hidden)  # the last position, which is counted again below
        everyone = torch.arange(len(prompt), device=keys.device)
        return self._call(layer, hidden[:, -1:], PrefixCache(keys, values, everyone, end), end)

    def _prefix(self, layer: int, prompt: Tensor, start: int) -> PrefixCache:
        layer_cache = self.run.cache.layers[layer]
        return PrefixCache(layer_cache.keys, layer_cache.values, prompt.to(layer_cache.keys.device), start)

    def _call(self, layer: int, hidden: Tensor, cache: PrefixCache, start: int, hooked: bool = False) -> Tensor:
        self.block_tokens += hidden.shape[0] * hidden.shape[1]
        arguments = {
            name: cache if value is self.run.cache else self._suffix(name, value, start, len(hidden))
            for name, value in self.run.calls[layer].items()
        }
        if self.plain is None or hooked:
            output = self.model.stack.blocks[layer](hidden, **arguments)
        else:
            output = self.plain(layer, hidden, arguments)
        return stream_of(output)

    def _other_for_some_prompt(self) -> str | None:
        """An argument of a block that is not the same for all prompts, as `_suffix` needs it (masks between documents, say)."""
        looked_at: set[int] = set()
        for call in self.run.calls:
            for name, value in call.items():
                for part in value if isinstance(value, tuple) else (value,):
                    known = isinstance(part, Tensor) and (part.ndim == 4 or name in OF_ALL_PROMPTS)
                    if known and id(part) not in looked_at:
                        looked_at.add(id(part))
                        if not self._same_for_all(part):
                            return name
        return None

    def _same_for_all(self, value: Tensor) -> bool:
        n_prompts = len(self.run.tokens)
        if value.ndim < 2 or n_prompts == 1 or value.shape[0] % n_prompts:
            return True
        by_prompt = value.reshape(n_prompts, -1)  # [prompt * head, 1, pos] in Bloom
        return bool((by_prompt == by_prompt[:1]).all())

    def _suffix(self, name: str, value: Any, start: int, n_rows: int) -> Any:
        """A block's argument for positions ≥ start and any batch. Prompts in a run have equal length and no padding, so
        masks and position encodings are the same for all of them (`_other_for_some_prompt`): the first row's serve."""
        if isinstance(value, tuple) and value and all(isinstance(part, Tensor) for part in value):
            return tuple(self._suffix(name, part, start, n_rows) for part in value)
        if not isinstance(value, Tensor):
            return value
        length, n_prompts = self.run.length, len(self.run.tokens)
        if name == "cache_position" or (name == "position_ids" and value.ndim == 1):
            return value[start:]
        if name == "alibi" and value.ndim == 4:  # [prompt, head, 1, pos] in Falcon
            return value[:1].expand(n_rows, -1, -1, -1)
        if name == "alibi":  # [prompt * head, 1, pos] in Bloom
            n_heads = value.shape[0] // n_prompts
            return value[:n_heads].repeat(n_rows, 1, 1)
        if value.ndim == 4 and value.shape[-2] == length:  # a mask [prompt or 1, head or 1, destination, source]
            return value[:1, :, start:].expand(n_rows, -1, -1, -1)  # XGLM asks for as many masks as rows
        if name == "position_bias" and value.shape[1] == 1:  # [head, 1, source]: MPT counts its columns from the end
            return value
        if name in ("position_ids", "position_embeddings") and value.shape[1] == length:
            return value[:1, start:]
        raise CannotReplayError(f"its blocks take an argument {name!r} {list(value.shape)} of unknown meaning")


@contextmanager
def attached_edits(model: HookedModel, groups: Sequence[EditGroup], rows: Rows, lookup: ValueLookup) -> Iterator[None]:
    """Edit groups, written inside whenever the model computes their sites.

    Raises:
        UnreachedEditError: what ran inside did not compute one of the sites, so that its edit was not made.
    """
    unreached = {(group.site.name, group.layer) for group in groups}
    with Hooks(model.bridge) as hooks:
        for group in groups:
            attach_edit(hooks, group, rows, lookup, unreached.discard)
        yield
    if unreached:
        site, layer = min(unreached)
        raise UnreachedEditError(
            f"site: {site!r} of layer {layer} is edited, but {model.name} ({model.cfg.architecture}) does not compute it in a "
            f"forward pass as it is set up now, so that the edit would change nothing.{_how_to_reach(model, site)}"
        )


def _how_to_reach(model: HookedModel, site: str) -> str:
    """What keeps a model from computing a site, if that is known."""
    implementation = getattr(model.bridge.original_model.config, "_attn_implementation", "eager")
    if "src" in SITES[site].dims and implementation not in ("eager", None):
        return (
            f" Its attention implementation is {implementation!r}, which never writes a pattern down: call "
            'model.bridge.original_model.set_attn_implementation("eager")'
        )
    if site == "result" and getattr(model.cfg, "use_attn_result", False):
        return " The bridge's flag use_attn_result is on: call model.bridge.set_use_attn_result(False)"
    return ""


def attach_edit(
    hooks: Hooks,
    group: EditGroup,
    rows: Rows,
    lookup: ValueLookup,
    reached: Callable[[tuple[str, int]], None] | None = None,
) -> None:
    """Writes an edit group whenever the model computes its site, and reports the site to `reached` then."""

    def edit(activation: Tensor, hook: Any) -> Tensor:
        if reached is not None:
            reached((group.site.name, group.layer))
        of_prompts = by_prompt(group.site, activation, len(rows))
        write(group, rows, of_prompts, lookup)
        return as_computed(group.site, of_prompts, activation.shape)

    hooks.attach(group.site.hook_name(group.layer), edit)
