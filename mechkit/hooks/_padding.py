"""Which tokens of a batch are padding: from an attention mask, or from the token ids where they are unambiguous."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._precision import tolerance


@dataclass(frozen=True)
class Masks:
    """Whether a masked prompt gives what it gives without its padding, by the side that is padded.

    Recurrent layers may read padding whatever the mask says, and TransformerLens's attention for OpenAI GPT forgets to be causal
    when it is given a mask.
    """

    left: bool = True
    right: bool = True
    unmasked: bool = True  # whether padding on the right that is not masked changes nothing either: causal models

    def needed(self, mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"] | None:
        """The mask that a run is given: `None` where nothing is masked, and where a mask on the right is not understood (what
        comes later changes nothing in a causal model).

        Raises:
            ValueError: padding on the left in a model that reads it.
        """
        if bool(mask.all()):
            return None
        on_the_left = bool((mask[:, 0] == 0).any())
        if self.left if on_the_left else self.right:
            return mask
        if not on_the_left and self.unmasked:
            return None
        side, instead = ("left", "pad on the right, or ") if on_the_left else ("right", "")
        raise ValueError(
            f"attention_mask: this architecture reads padding on the {side} whatever the mask says; {instead}give the prompts "
            "unpadded, one by one"
        )


@torch.no_grad()
def measure_masks(
    bridge: Any, tokens: Int[Tensor, "prompt pos"], alone: Float[Tensor, "prompt pos d_vocab"], context: int | None
) -> Masks:
    """Runs a few tokens with padding, of which the logits without padding are `alone`."""
    model = bridge.original_model
    room = 11 if context is None else min(11, context)
    if model.training or room < 2:
        return Masks()  # dropout would differ; no room
    if tokens.shape[1] > max(1, room - 3):  # a short context
        tokens = tokens[:, : max(1, room - 3)]
        alone = bridge(tokens)
    padding, ones = tokens.new_zeros(len(tokens), room - tokens.shape[1]), torch.ones_like(tokens)

    def works(rows: list[Tensor], masks: list[Tensor], where: list[slice], of: list[Tensor]) -> bool:
        try:
            found = bridge(torch.cat(rows), attention_mask=torch.cat(masks) if masks else None)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return False
        parts = found.split([len(part) for part in rows])
        return all(same(part[:, at], expected) for part, at, expected in zip(parts, where, of, strict=True))

    def same(found: Tensor, expected: Tensor) -> bool:
        if expected.dtype == torch.float64 and bool(found.isnan().any()):
            return True  # Hugging Face's mask overflows there: see `check_float64`
        off = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
        return off <= tolerance("heads", expected.dtype)

    n, empty = tokens.shape[1], torch.zeros_like(padding)
    on_left, on_right = torch.cat([padding, tokens], 1), torch.cat([tokens, padding], 1)
    left_mask, right_mask = torch.cat([empty, ones], 1), torch.cat([ones, empty], 1)
    last, first = slice(-n, None), slice(0, n)
    # Nearly always: one run of both, with one prompt on each side.
    both = [on_left[:1], on_right[-1:]], [left_mask[:1], right_mask[-1:]], [last, first], [alone[:1], alone[-1:]]
    if works(*both):
        return Masks()
    right = works([on_right], [right_mask], [first], [alone])
    left = works([on_left], [left_mask], [last], [alone])
    return Masks(left, right, unmasked=right or works([on_right], [], [first], [alone]))


def checked_mask(mask: Any, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """An attention mask as integers on the tokens' device, if it can be one for these tokens.

    Args:
        mask: 1 (or true) at tokens, 0 at padding; padding on the left, on the right or on both sides.
        tokens: What it belongs to.

    Raises:
        TypeError: it is no tensor.
        ValueError: another shape, other values, a row without a token, or padding between tokens.
    """
    expected = f"attention_mask: expected 1 at tokens and 0 at padding, {list(tokens.shape)} as the tokens"
    if not isinstance(mask, Tensor):
        raise TypeError(f"{expected}, as a tensor; got {type(mask).__name__}")
    if mask.shape != tokens.shape:
        raise ValueError(f"{expected}; got shape {list(mask.shape)}")
    if mask.is_complex():
        raise ValueError(f"{expected}; got {mask.dtype}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{expected}; got other values: {mask.unique()[:5].tolist()}")
    mask = mask.to(tokens.device).long()
    if bool((empty := mask.sum(1) == 0).any()):
        raise ValueError(f"{expected}; rows {_numbers(empty)} are all padding. Leave these prompts out")
    if bool((holes := (mask.diff(dim=1) == 1).sum(1) + mask[:, 0] > 1).any()):
        raise ValueError(
            f"{expected}; rows {_numbers(holes)} have padding between tokens. To keep a token from being attended to, edit the "
            'site "attn_scores" with a hook'
        )
    return mask


def left_padded_rows(tokens: Int[Tensor, "batch pos"], pad: int | None, bos: int | None) -> list[int]:
    """Rows that begin with padding. One leading token that is also the beginning-of-sequence token (GPT-2 has one id for
    both) is not padding."""
    if pad is None or tokens.shape[1] < 2:
        return []
    leading = (tokens == pad).long().cumprod(1).sum(1)
    return (leading > (1 if pad == bos else 0)).nonzero().flatten().tolist()


def padding_on_the_right(
    tokens: Int[Tensor, "batch pos"], pad: int | None, also: tuple[int | None, ...]
) -> Int[Tensor, "batch pos"] | None:
    """The mask of token ids that came without one; `None` if no row ends with padding.

    Args:
        tokens: Unpadded, or padded on the right.
        pad: The padding token.
        also: The tokens that begin and end a text. If padding is one of them, a row's last token may be text.

    Raises:
        ValueError: rows end with what may be padding or text.
    """
    if pad is None or tokens.shape[1] < 2:
        return None
    trailing = (tokens == pad).flip(1).long().cumprod(1).sum(1).clamp(max=tokens.shape[1] - 1)
    if not bool(trailing.any()):
        return None
    if pad in also:
        if bool((trailing == 1).all()):
            return None  # every text ends with its end
        rows = _numbers(trailing > 0)
        raise ValueError(
            f"input: rows {rows} end with token {pad}, which is padding and also ends a text. Pass attention_mask (1 at tokens, "
            "0 at padding), or give the prompts as texts, or one by one"
        )
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    return (positions < tokens.shape[1] - trailing[:, None]).long()


def check_float64(logits: Float[Tensor, "batch pos d_vocab"], mask: Int[Tensor, "batch pos"]) -> None:
    """Raises `ValueError` where padding on the left has made a prompt's logits NaN: in float64 Hugging Face's masks overflow."""
    if bool((mask[:, 0] == 0).any()) and bool(logits[mask.to(logits.device).bool()].isnan().any()):
        raise ValueError(
            "attention_mask: padding on the left gives NaN in float64, since Hugging Face's mask overflows there. Pad on the "
            "right, give the prompts unpadded, one by one, or use float32"
        )


def _numbers(rows: Tensor) -> list[int]:
    return rows.nonzero().flatten()[:5].tolist()
