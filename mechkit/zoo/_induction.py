"""A two-layer induction circuit (Elhage et al. 2021, https://transformer-circuits.pub/2021/framework/index.html;
Olsson et al. 2022, https://arxiv.org/abs/2209.11895).

On "… A B … A", the model predicts "B":

1. Head (0, 0) attends to the position before, and writes that token into the feature `previous`.
2. Head (1, 0) looks for the position whose `previous` is its own token: the position after A, where B stands
   (K-composition: its keys are what head (0, 0) wrote).
3. It copies the token that it finds there, B, to the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mechkit._check import checked
from mechkit.hooks import HookedModel
from mechkit.metrics import logit_diff
from mechkit.prompts import PromptPairs, Prompts
from mechkit.zoo._build import HandWritten, Known, attend_to_position, attend_to_previous, eye, one

D_VOCAB, N_CTX, N_HEADS = 50, 128, 4
MATCH, OWN_TOKEN, REST = 100.0, 0.6, 20.0
LOGIT = 10.0


@checked
def induction(n: int = 8, *, n_tokens: int = 20, seed: int = 0) -> Known:
    """A model that does induction with two heads, and six heads that do nothing.

    Two layers of four heads, no MLPs, 50 tokens (0 is the beginning of a sequence, BOS), 128 positions.

    | feature | units | written by | value |
    | --- | --- | --- | --- |
    | `token` | 50 | embedding | the token, one-hot |
    | `position` | 128 | position embedding | the position, one-hot |
    | `previous` | 50 | head (0, 0) | the token before, one-hot (at position 0, its own) |
    | `output` | 50 | head (1, 0) | the token that it attends to, one-hot; nothing for BOS |

    | head | score of source j | attends to | writes |
    | --- | --- | --- | --- |
    | (0, 0) | 40 at j = i - 1 | the position before | `previous` |
    | (1, 0) | 100 (previous_j - 0.6 token_j) . token_i, + 20 at j = 0 | the position after its token came before | `output` |
    | the others | 40 at j = 0 | position 0 | nothing |

    Where its token never came before, head (1, 0) attends to position 0. If it came several times, attention is shared
    among the positions after it. Logits are 10 x `output`. The 0.6 keeps position 0, whose `previous` is its own token,
    from being taken for a match in prompts without BOS. (In such a prompt the controls, which attend to position 0, do find
    one duplicate: of the first token. Give segments of 20 tokens or more to keep that share of their score at 0.05.)

    | edge of the circuit | carries |
    | --- | --- |
    | `input->a0.h0<v>` | the two tokens that change places |
    | `a0.h0->a1.h0<k>` | `previous` of the positions after them |
    | `a1.h0->logits` | which token is found |

    Not in it: both heads' queries and head (0, 0)'s keys hold positions and the last token, which are the same in both
    prompts. `input->a1.h0<k>` differs, but turns only scores that lose by 40 or more; `input->a1.h0<v>` differs at the two
    places that change hands, to which head (1, 0) does not attend.

    The prompts: BOS, `n_tokens` distinct tokens, and the first k of them again, for various k. The right answer is token
    k + 1 of the segment. In the corrupted prompt token k and another one have changed places within the first segment, so
    that the model finds the other one's successor: the wrong answer. Logit differences are +10 and -10.

    Args:
        n: How many pairs.
        n_tokens: Length of the repeated segment, 5 to 49.
        seed: Of the prompts; the model is always the same.

    Returns:
        `Known`, with roles `previous_token`, `induction` and `control`, and a circuit of 3 edges.

    Raises:
        ValueError: `n` below 1, `n_tokens` out of range.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 pair, got {n}")
    if not 5 <= n_tokens < D_VOCAB:
        raise ValueError(f"n_tokens: expected 5 to {D_VOCAB - 1}, the tokens that there are; got {n_tokens}")
    pairs = _pairs(n, n_tokens, seed)
    controls = tuple((layer, head) for layer in range(2) for head in range(1, N_HEADS))
    roles = {"previous_token": ((0, 0),), "induction": ((1, 0),), "control": controls}
    circuit = frozenset({"input->a0.h0<v>", "a0.h0->a1.h0<k>", "a1.h0->logits"})
    return Known(_model(controls), pairs, logit_diff(pairs), roles, circuit)


def _model(controls: tuple[tuple[int, int], ...]) -> HookedModel:
    gpt2 = HandWritten(
        {"token": D_VOCAB, "position": N_CTX, "previous": D_VOCAB, "output": D_VOCAB},
        n_layers=2,
        n_heads=N_HEADS,
        d_head=N_CTX,
        d_vocab=D_VOCAB,
        n_ctx=N_CTX,
    )
    tokens = eye(D_VOCAB)
    gpt2.embed("token", tokens)
    gpt2.embed_positions("position", eye(N_CTX))
    gpt2.head(0, 0, **attend_to_previous(N_CTX), v={"token": tokens}, out={"previous": tokens})
    copied = tokens.clone()
    copied[0, 0] = 0  # BOS is a resting place: nothing is copied from there
    gpt2.head(
        1,
        0,
        q={"token": MATCH * tokens},
        q_bias=one(D_VOCAB + 1, D_VOCAB, REST),
        k={
            "previous": tokens,
            "token": -OWN_TOKEN * tokens,
            "position": one(N_CTX, 0)[:, None] * one(D_VOCAB + 1, D_VOCAB),
        },
        v={"token": copied},
        out={"output": tokens},
    )
    for layer, head in controls:
        gpt2.head(layer, head, **attend_to_position(N_CTX, 0))
    gpt2.unembed("output", LOGIT * tokens)
    return gpt2.model("zoo.induction")


def _pairs(n: int, n_tokens: int, seed: int) -> PromptPairs:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    clean, corrupted, answers = [], [], []
    for _ in range(n):
        segment = 1 + torch.randperm(D_VOCAB - 1, generator=generator)[:n_tokens]
        here = draw(0, n_tokens - 1)  # the last token has no successor in the segment
        others = [i for i in range(n_tokens - 1) if abs(i - here) > 1]
        there = others[draw(0, len(others))]
        swapped = segment.clone()
        swapped[here], swapped[there] = segment[there], segment[here]
        clean.append(_prompt(segment, segment[: here + 1]))
        corrupted.append(_prompt(swapped, segment[: here + 1]))
        answers.append((int(segment[here + 1]), int(segment[there + 1])))
    return PromptPairs.from_tokens(
        Prompts.from_tokens(clean), Prompts.from_tokens(corrupted), answers, task="zoo.induction"
    )


def _prompt(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.long), first, second])
