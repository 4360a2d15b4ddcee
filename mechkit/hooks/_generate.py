"""Continuing prompts, each as if it were alone.

1. Padding is removed, and prompts of equal length run together, so that no prompt sees another's padding.
2. Each step runs only the new tokens, on the keys and values of those before them, where the architecture keeps these;
   otherwise it runs the whole prompt again.
3. The most probable token is taken, or one is drawn. Nothing is added to a prompt that has ended.

Hooks that are attached to the model act in every step; from the second step on they see one position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._check import checked
from mechkit._progress import Progress
from mechkit.hooks._context import check_length
from mechkit.hooks._lock import one_at_a_time
from mechkit.hooks._pictures import Pictures, inputs_of
from mechkit.hooks._text import Input, Text
from mechkit.prompts import Prompts, Stacked

# Kinds of rotary embedding whose angles depend on the length so far: kept keys would have the angles of a shorter prompt.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen: the likeliest one, or one drawn from the (cut and sharpened) distribution."""

    do_sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p")}
        if not self.do_sample and (unused := [name for name, value in given.items() if value is not None]):
            raise ValueError(
                f"{unused[0]}: has no effect on the likeliest token, which is taken by default; pass do_sample=True with it"
            )
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature: expected a number above 0, got {self.temperature}. For the likeliest token, pass do_sample=False"
            )
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise ValueError(f"top_k: expected a whole number from 1 on, got {self.top_k!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a share of the probability in (0, 1], got {self.top_p}")

    def next_tokens(
        self, logits: Float[Tensor, "row d_vocab"], generators: list[torch.Generator | None]
    ) -> Int[Tensor, "row"]:
        """One token per row; row i is drawn by the i-th generator (`None`: torch's own)."""
        if not self.do_sample:
            return logits.argmax(-1)
        logits = logits.double() / (1.0 if self.temperature is None else self.temperature)
        ordered, order = logits.sort(dim=-1, descending=True)
        kept = torch.ones_like(ordered, dtype=torch.bool)
        if self.top_k is not None:
            kept[:, self.top_k :] = False
        if self.top_p is not None:  # the fewest tokens that have this probability together
            probabilities = ordered.masked_fill(~kept, -torch.inf).softmax(-1)
            kept &= probabilities.cumsum(-1) - probabilities < self.top_p
        probabilities = ordered.masked_fill(~kept, -torch.inf).softmax(-1)
        pairs = zip(probabilities, generators, strict=True)
        drawn = torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in pairs])
        return order.gather(1, drawn[:, None])[:, 0]


class Generate(Pictures, Text):
    """The part of `HookedModel` that continues text."""

    @checked
    @one_at_a_time
    @torch.no_grad()
    def generate(
        self,
        input: Input,
        max_new_tokens: int = 10,
        *,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_at_eos: bool = True,
        eos_token_id: int | list[int] | None = None,
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        verbose: bool = False,
    ) -> Any:
        """Continues each prompt as it would be continued alone, with the likeliest token by default. Run it inside `hooks()` to
        intervene: hooks act in every step, and see one position from the second step on.

        Args:
            input: Text, texts, or token ids `[batch pos]`.
            max_new_tokens: How many tokens to add at most.
            do_sample: Whether to draw tokens rather than take the likeliest.
            temperature: By which logits are divided before a token is drawn.
            top_k: Draw among so many of the likeliest tokens.
            top_p: Draw among the likeliest tokens that have this probability together.
            seed: Makes draws repeatable: row i is drawn with `seed + i`.
            stop_at_eos: Whether a prompt ends at an end-of-sequence token.
            eos_token_id: What ends a prompt; default the model's and the tokenizer's end-of-sequence tokens.
            prepend_bos: As for `to_tokens`.
            attention_mask: 1 at tokens, 0 at padding; needed where ids are padded.
            inputs: What the model reads beside the tokens, as for `forward`; for prompts without padding.
            verbose: Whether to show a progress bar.

        Returns:
            Text for a text, a list for several. For token ids, the ids with the new ones behind (behind its padding, where a
            row is padded on the right), `[batch pos+new]`; what has ended is filled with padding.

        Raises:
            ValueError: padding that is not marked, more tokens than the model has positions for, settings of sampling
                without `do_sample`, an end that is no token.
        """
        choice = Choice(do_sample, temperature, top_k, top_p)
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected a whole number from 1 on, got {max_new_tokens!r}")
        if not getattr(self.bridge.adapter, "supports_generation", True):
            raise ValueError(f"model: {self.name} ({self.cfg.architecture}) does not continue text")
        tokens, mask = self._tokens_and_mask(input, prepend_bos, attention_mask)
        mask = self._padding_of(tokens, mask) if isinstance(input, Tensor | Prompts) else mask
        inputs = inputs_of(input, inputs)
        if inputs is not None and mask is not None and not bool(mask.all()):
            raise ValueError("inputs: expected prompts of one length, got some with padding; continue them one by one")
        given = self.with_inputs(tokens, inputs)
        prompts = list(tokens) if mask is None else [row[real.bool()] for row, real in zip(tokens, mask, strict=True)]
        longest = max(len(prompt) for prompt in prompts)
        check_length(self, longest + max_new_tokens - 1, "input and max_new_tokens")  # the last one is not run
        ends = self._ends(eos_token_id) if stop_at_eos else frozenset()
        generators = [None if seed is None else _generator(seed + i, self.device) for i in range(len(prompts))]
        new: list[list[int]] = [[] for _ in prompts]
        bar = Progress(max_new_tokens * len(prompts), "token", verbose)
        with bar:
            for batch in Prompts(tuple(prompts)).batches():
                ids = batch.ids
                rows = batch.stacked if inputs is None else given[ids]
                steps = self._continued(rows, choice, [generators[i] for i in ids])
                for _ in range(max_new_tokens):
                    drawn = next(steps).tolist()
                    bar.update(len(ids))
                    for i, token in zip(ids, drawn, strict=True):
                        if not (new[i] and new[i][-1] in ends):
                            new[i].append(token)
                    if all(new[i][-1] in ends for i in ids):
                        break
        if isinstance(input, Tensor | Prompts):
            return _appended(tokens, new, self._pad_id or 0)
        whole = [[*prompt.tolist(), *more] for prompt, more in zip(prompts, new, strict=True)]
        texts = self._decoded(whole, skip_special_tokens=True)
        return texts[0] if isinstance(input, str) else texts

    def _continued(
        self, rows: Stacked, choice: Choice, generators: list[torch.Generator | None]
    ) -> Iterator[Int[Tensor, "row"]]:
        """The next token of each of these prompts of equal length, without end."""
        keeps, unread = self._keeps_keys(), rows
        cache: Any = None
        while True:
            if keeps:
                logits, cache = self.run(unread, return_type="logits_and_cache", use_cache=True, past_key_values=cache)
                keeps = cache is not None
            else:
                logits = self.run(rows)
            chosen = choice.next_tokens(logits[:, -1].to(rows.tokens.device), generators)
            yield chosen
            unread = Stacked(chosen[:, None])
            rows = rows.and_one(chosen)

    def _keeps_keys(self) -> bool:
        """Whether a step may run on the keys and values of the steps before."""
        config = self.bridge.original_model.config
        rope = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or "")
        all_attend = sum(site == "z" for site, _ in self.stack.sites) == self.n_layers and not getattr(
            self.cfg, "is_stateful", False
        )
        return all_attend and not any(kind in rope for kind in _LENGTH_DEPENDENT)

    def _ends(self, given: int | list[int] | None) -> frozenset[int]:
        """Tokens at which a prompt ends."""
        both = [getattr(self.cfg, "eos_token_id", None), self._eos_id]
        several = [one if isinstance(one, list | tuple) else [one] for one in ([given] if given is not None else both)]
        ends = frozenset(int(one) for some in several for one in some if one is not None)
        if given is not None and (odd := sorted(one for one in ends if not 0 <= one < self.d_vocab)):
            raise ValueError(f"eos_token_id: expected token ids in 0..{self.d_vocab - 1}, got {odd[0]}")
        return ends


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _appended(tokens: Int[Tensor, "batch pos"], new: list[list[int]], pad: int) -> Int[Tensor, "batch longer"]:
    longest = max(len(row) for row in new)
    filled = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in new], device=tokens.device)
    return torch.cat([tokens, filled], 1)
