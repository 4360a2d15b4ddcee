"""A serial circuit for indirect object identification, one head per layer (after Wang et al. 2022,
https://arxiv.org/abs/2211.00593).

On "BOS Mary . John … John . END" the model predicts "Mary", the name that occurs once:

1. Duplicate-token head (0, 0), at the second subject S2: its query is the name there. It finds the same name earlier
   (S1), and writes which name occurs twice.
2. S-inhibition head (1, 0), at END: looks back at S2, and writes that name as the one to be inhibited.
3. Name mover (2, 0), at END: attends to the two names of the first clause, but not to the inhibited one (Q-composition),
   and copies what it attends to, the indirect object IO, to the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mechkit._check import checked
from mechkit.hooks import HookedModel
from mechkit.metrics import logit_diff
from mechkit.prompts import PromptPairs, Prompts
from mechkit.zoo._build import SHARP, HandWritten, Known, attend_to_position, attend_to_previous, eye, one

BOS, END, FILLER, NAME = 0, 1, 2, 7  # fillers are tokens 2 to 6, names 7 to 16
N_NAMES, D_VOCAB, N_CTX, N_HEADS = 10, 17, 16, 2
FIRST, SECOND = 1, 3  # where the names of the first clause stand
MATCH, LOGIT = 100.0, 4.0


@checked
def serial_ioi(n: int = 8, *, seed: int = 0) -> Known:
    """A model that does IOI with three heads in a row, and three heads that do nothing for it.

    Three layers of two heads, no MLPs, 17 tokens, 16 positions. A prompt is
    `BOS name filler name filler … name filler END`, 8 to 11 tokens: the third name, S2, is one of the first two (S1, the
    wrong answer); the other one, IO, is the right answer.

    | feature | units | written by | value |
    | --- | --- | --- | --- |
    | `position` | 16 | position embedding | the position, one-hot |
    | `name` | 10 | embedding of tokens 7 to 16 | one-hot |
    | `duplicated` | 10 | head (0, 0) | at S2, the name there if it occurred before, one-hot; else nothing |
    | `inhibit` | 10 | head (1, 0) | `duplicated` of two positions before |
    | `output` | 10 | head (2, 0) | `name` of where it attends |
    | `unread` | 10 | heads (1, 1), (2, 1) | names; no one reads it |

    | head | score of source j | attends to | writes |
    | --- | --- | --- | --- |
    | (0, 0) | 100 name_i . name_j, - 100 at j = i, + 40 at j = 0 | the same name earlier, else BOS | `duplicated` |
    | (1, 0) | 40 at j = i - 2 | from END, S2 | `inhibit` |
    | (2, 0) | 40 at the first two names, - 40 inhibit_i . name_j | of these two, what is not inhibited | `output` |
    | (0, 1) | 40 at j = 0 | BOS | nothing |
    | (1, 1) | 40 at j = i - 2 | from END, S2 | its `name` to `unread` |
    | (2, 1) | as (2, 0) | as (2, 0) | what it attends to, to `unread` |

    Logits of names are 4 x `output`. In the corrupted prompt a third name stands at S2 (of the IOI paper's corruptions, the one
    like ABC). No name occurs twice then, the name mover attends to IO and S1 alike, and the logit difference is 0; in the
    clean prompt it is 4. (With the IO's name at S2 the circuit would be the same, but the corrupted run's attention would be
    saturated at the wrong name, which `saturated_attention` is about.)

    | edge of the circuit | carries |
    | --- | --- |
    | `input->a0.h0<q>` | the name at S2 |
    | `a0.h0->a1.h0<v>` | `duplicated` at S2 |
    | `a1.h0->a2.h0<q>` | `inhibit` at END |
    | `a2.h0->logits` | which name is copied |

    Not in it: head (1, 0) attends by position. `input->a0.h0<k>` and `<v>` differ at S2, where head (0, 0) does not attend;
    `input->a2.h0<k>` and `<v>` also differ at S2, which is not in the first clause. Heads (1, 1) and (2, 1) write what differs
    between the prompts, even the answer; but no one reads it.

    Args:
        n: How many pairs.
        seed: Of the prompts; the model is always the same.

    Returns:
        `Known`, with roles `duplicate_token`, `s_inhibition`, `name_mover` and `control`, and a circuit of 4 edges. Its
        pairs have the named positions IO, S1 and S2; IO comes first in every other one.

    Raises:
        ValueError: `n` below 1.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 pair, got {n}")
    pairs = _pairs(n, seed)
    roles = {
        "duplicate_token": ((0, 0),),
        "s_inhibition": ((1, 0),),
        "name_mover": ((2, 0),),
        "control": ((0, 1), (1, 1), (2, 1)),
    }
    circuit = frozenset({"input->a0.h0<q>", "a0.h0->a1.h0<v>", "a1.h0->a2.h0<q>", "a2.h0->logits"})
    return Known(_model(), pairs, logit_diff(pairs), roles, circuit)


def _model() -> HookedModel:
    features = ("name", "duplicated", "inhibit", "output", "unread")
    gpt2 = HandWritten(
        {"position": N_CTX} | dict.fromkeys(features, N_NAMES),
        n_layers=3,
        n_heads=N_HEADS,
        d_head=2 * N_CTX,
        d_vocab=D_VOCAB,
        n_ctx=N_CTX,
    )
    names, positions = eye(N_NAMES), eye(N_CTX)
    token_to_name = eye(D_VOCAB)[:, NAME:]
    gpt2.embed("name", token_to_name)
    gpt2.embed_positions("position", positions)
    # The head's dimensions: one for each name, one for each position (not itself), one for the resting place.
    width = N_NAMES + N_CTX + 1
    by_name, by_position = eye(width)[:N_NAMES], eye(width)[N_NAMES:-1]
    at_rest = one(N_CTX, BOS)[:, None] * one(width, width - 1)
    gpt2.head(
        0,
        0,
        q={"name": MATCH * by_name, "position": -MATCH * by_position},
        q_bias=one(width, width - 1, SHARP),
        k={"name": by_name, "position": by_position + at_rest},
        v={"name": names},
        out={"duplicated": names},
    )
    gpt2.head(1, 0, **attend_to_previous(N_CTX, 2), v={"duplicated": names}, out={"inhibit": names})
    gpt2.head(1, 1, **attend_to_previous(N_CTX, 2), v={"name": names}, out={"unread": names})
    by_name = eye(N_NAMES + 1)[:N_NAMES]
    first_clause = (one(N_CTX, FIRST) + one(N_CTX, SECOND))[:, None] * one(N_NAMES + 1, N_NAMES)
    for head, writes in ((0, "output"), (1, "unread")):
        gpt2.head(
            2,
            head,
            q={"inhibit": -SHARP * by_name},
            q_bias=one(N_NAMES + 1, N_NAMES, SHARP),
            k={"name": by_name, "position": first_clause},
            v={"name": names},
            out={writes: names},
        )
    gpt2.head(0, 1, **attend_to_position(N_CTX, BOS))
    gpt2.unembed("output", LOGIT * token_to_name.T)
    return gpt2.model("zoo.serial_ioi")


def _pairs(n: int, seed: int) -> PromptPairs:
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted, answers = [], [], []
    positions: dict[str, list[int]] = {"IO": [], "S1": [], "S2": []}
    for i in range(n):
        io, s, third = (NAME + torch.randperm(N_NAMES, generator=generator)[:3]).tolist()
        fillers = FILLER + torch.randint(0, NAME - FILLER, (3 + i // 2 % 4,), generator=generator)
        first, second = (io, s) if i % 2 == 0 else (s, io)
        clean.append(_prompt(first, second, s, fillers))
        corrupted.append(_prompt(first, second, third, fillers))
        answers.append((io, s))
        positions["IO"].append(FIRST if i % 2 == 0 else SECOND)
        positions["S1"].append(SECOND if i % 2 == 0 else FIRST)
        positions["S2"].append(len(clean[-1]) - 3)
    return PromptPairs.from_tokens(
        Prompts.from_tokens(clean), Prompts.from_tokens(corrupted), answers, positions=positions, task="zoo.serial_ioi"
    )


def _prompt(first: int, second: int, last: int, fillers: Tensor) -> Tensor:
    between, middle, after = fillers[0], fillers[1:-1].tolist(), fillers[-1]
    return torch.tensor([BOS, first, between, second, *middle, last, after, END])
