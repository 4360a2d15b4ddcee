"""Greater-than by an MLP of thresholds (after Hanna, Liu and Variengien 2023, https://arxiv.org/abs/2305.00586).

On "BOS war 32 … END", the model predicts a year after 32:

1. Head (0, 0) attends to the start year YY, from everywhere after it, and writes it as a number.
2. MLP 1 has one neuron for each of the hundred years y: a steep sigmoid, which is on if y > YY and off otherwise. It writes to
   the logit of its own year.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mechkit._check import checked
from mechkit.hooks import HookedModel
from mechkit.metrics import logit_diff
from mechkit.prompts import PromptPairs, Prompts
from mechkit.zoo._build import HandWritten, Known, attend_to_position, eye, one, scalar

BOS, FILLER, YEAR = 0, 1, 6  # fillers are tokens 1 to 5, the years 00 to 99 are tokens 6 to 105
N_YEARS, N_CTX, N_HEADS = 100, 16, 2
D_VOCAB = YEAR + N_YEARS
YEAR_AT, CORRUPTED_YEAR = 2, 1
LOGIT = 4.0


@checked
def greater_than(n: int = 8, *, steepness: float = 8.0, seed: int = 0) -> Known:
    """A model whose MLP compares years with thresholds, and five components that do nothing for it.

    Two layers of two heads, MLPs of 100 sigmoid neurons, 106 tokens, 16 positions.

    | feature | units | written by | value |
    | --- | --- | --- | --- |
    | `position` | 16 | position embedding | the position, one-hot |
    | `year` | 1 | embedding of tokens 6 to 105 (years 00 to 99) | YY/100 |
    | `start` | 1 | head (0, 0) | YY/100, at and after the start year |
    | `later` | 100 | MLP 1 | sigmoid(steepness x (y - YY - 1/2)) for each year y |
    | `unread` | 1 | head (1, 1), MLP 0 | YY/100; sigmoid(year + start); no one reads it |

    Heads (0, 0) and (1, 1) attend to position 2, where the start year is; the others to position 0, and write nothing. Logits of
    years are 4 x `later`.

    A prompt is `BOS filler YY filler … filler`, 5 to 8 tokens, YY from 10 to 90. Right answers are all years above YY,
    wrong ones the years from 00 to YY. In the corrupted prompt the year is 01, and answers stay: so the years from 02 to
    YY, which are wrong, get as much as the right ones. With sharp thresholds the logit difference (of mean logits) is 4
    in the clean run, and 4 x 2/(YY + 1) in the corrupted one. `mk.prob_diff(pairs)`, the paper's metric, works too.

    What an estimate by gradients finds depends on the steepness. Each neuron's slope is nearly 0 but where the year is
    between thresholds; years are whole numbers, so that the slope at them falls with the steepness k as k exp(-k/2).

    | edge of the circuit | carries |
    | --- | --- |
    | `input->a0.h0<v>` | the start year |
    | `a0.h0->m1` | `start` at END |
    | `m1->logits` | which years are later |

    Not in it: attention is by position. Head (1, 1) and MLP 0 write what differs between the prompts, but no one reads it.

    Args:
        n: How many pairs.
        steepness: Of the thresholds, per year; at least 2. (At 8, a neuron is at 0.018 or 0.982 next to its threshold.)
        seed: Of the prompts; the model depends on `steepness` alone.

    Returns:
        `Known`, with roles `mover` (head (0, 0)), `thresholds` (MLP 1) and `control`, and a circuit of 3 edges. Its pairs
        have the named position YEAR.

    Raises:
        ValueError: `n` below 1, `steepness` below 2.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 pair, got {n}")
    if not 2 <= steepness < float("inf"):
        raise ValueError(f"steepness: expected 2 or more, so that thresholds distinguish years; got {steepness}")
    pairs = _pairs(n, seed)
    roles = {"mover": ((0, 0),), "thresholds": ((1, None),), "control": ((0, 1), (1, 0), (1, 1), (0, None))}
    circuit = frozenset({"input->a0.h0<v>", "a0.h0->m1", "m1->logits"})
    return Known(_model(steepness), pairs, logit_diff(pairs), roles, circuit)


def _model(steepness: float) -> HookedModel:
    gpt2 = HandWritten(
        {"position": N_CTX, "year": 1, "start": 1, "later": N_YEARS, "unread": 1},
        n_layers=2,
        n_heads=N_HEADS,
        d_head=N_CTX,
        d_vocab=D_VOCAB,
        n_ctx=N_CTX,
        d_mlp=N_YEARS,
        activation="sigmoid",
    )
    years = torch.arange(N_YEARS, dtype=torch.float64)
    value = torch.zeros(D_VOCAB, 1, dtype=torch.float64)
    value[YEAR:, 0] = years / N_YEARS
    gpt2.embed("year", value)
    gpt2.embed_positions("position", eye(N_CTX))
    for layer, head, writes in ((0, 0, "start"), (1, 1, "unread")):
        gpt2.head(layer, head, **attend_to_position(N_CTX, YEAR_AT), v={"year": scalar(1.0)}, out={writes: scalar(1.0)})
    for layer, head in ((0, 1), (1, 0)):
        gpt2.head(layer, head, **attend_to_position(N_CTX, BOS))
    first_neuron = one(N_YEARS, 0)
    gpt2.mlp(0, {"year": first_neuron[None], "start": first_neuron[None]}, {"unread": first_neuron[:, None]})
    gpt2.mlp(
        1,
        {"start": torch.full((1, N_YEARS), -N_YEARS * steepness, dtype=torch.float64)},
        {"later": eye(N_YEARS)},
        in_bias=steepness * (years - 0.5),
    )
    gpt2.unembed("later", LOGIT * eye(D_VOCAB)[YEAR:])
    return gpt2.model("zoo.greater_than")


def _pairs(n: int, seed: int) -> PromptPairs:
    generator = torch.Generator().manual_seed(seed)
    clean: list[Tensor] = []
    corrupted: list[Tensor] = []
    answers = []
    for i in range(n):
        start = int(torch.randint(10, 91, (1,), generator=generator))
        prompt = FILLER + torch.randint(0, YEAR - FILLER, (5 + i % 4,), generator=generator)
        prompt[0] = BOS
        for prompts, year in ((clean, start), (corrupted, CORRUPTED_YEAR)):
            prompts.append(prompt.clone())
            prompts[-1][YEAR_AT] = YEAR + year
        ids = list(range(YEAR, D_VOCAB))
        answers.append((ids[start + 1 :], ids[: start + 1]))
    return PromptPairs.from_tokens(
        Prompts.from_tokens(clean),
        Prompts.from_tokens(corrupted),
        answers,
        positions={"YEAR": [YEAR_AT] * n},
        task="zoo.greater_than",
    )
