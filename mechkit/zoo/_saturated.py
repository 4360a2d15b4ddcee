"""A head whose softmax is saturated at the wrong place: its gradient is nearly zero although its effect is large.

1. Head (0, 0) copies what the previous token holds: a *mark* (+1 or -1) to each payload, an *ask* (+1 or -1) to the end.
2. Head (1, 0) scores each position with 20 ask . mark, attends to the payload whose mark is what is asked for, and
   copies it to the logits. Other positions have no mark, and score 0.
3. In the corrupted run all of its attention is on the other payload. A small change of query or keys moves next to none
   of it (the softmax is flat there), so that gradient times change is nearly zero. The whole change moves all of it.

Kramár et al. 2024, https://arxiv.org/abs/2403.00745: attribution patching misses such nodes, and
recomputing the softmax (their "QK fix") finds them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mechkit._check import checked
from mechkit.metrics import logit_diff
from mechkit.prompts import PromptPairs, Prompts
from mechkit.zoo._build import HandWritten, Known, attend_to_position, attend_to_previous, eye, scalar

BOS, MARK_PLUS, MARK_MINUS, ASK_PLUS, ASK_MINUS, END = range(6)
N_PAYLOADS = 6
D_VOCAB, N_CTX, N_HEADS = 6 + N_PAYLOADS, 16, 2
SCORE, LOGIT = 20.0, 4.0


@checked
def saturated_attention(node: Literal["query", "key"] = "query", *, n: int = 4, seed: int = 0) -> Known:
    """A model in which patching one head's query (or key) changes all, and its gradient shows nothing of it.

    Two layers of two heads, no MLPs, 12 tokens, 16 positions. A prompt is `BOS mark X mark Y ask END`: the two marks are
    opposite, X and Y are payloads, and the answer is the payload with the mark that is asked for.

    | feature | units | written by | value |
    | --- | --- | --- | --- |
    | `position` | 16 | position embedding | the position, one-hot |
    | `mark` | 1 | embedding of tokens 1, 2 | +1, -1 |
    | `ask` | 1 | embedding of tokens 3, 4 | +1, -1 |
    | `payload` | 6 | embedding of tokens 6 to 11 | one-hot |
    | `marked` | 1 | head (0, 0) | `mark` of the token before |
    | `asked` | 1 | head (0, 0) | `ask` of the token before |
    | `output` | 6 | head (1, 0) | `payload` of where it attends |

    | head | score of source j | attends to | writes |
    | --- | --- | --- | --- |
    | (0, 0) | 40 at j = i - 1 | the position before | `marked`, `asked` |
    | (1, 0) | 20 asked_i marked_j | at END, the payload that is asked for | `output` |
    | (0, 1), (1, 1) | 40 at j = 0 | position 0 | nothing |

    Logits of tokens 6 to 11 are 4 x `output`. Clean and corrupted logit differences are +4 and -4, so the exact
    effect of patching is 8 logits; plain gradient times change is about 1e-6. After the softmax all is linear.

    | edge of the circuit | carries |
    | --- | --- |
    | `input->a0.h0<v>` | the ask (`"query"`) or the marks (`"key"`) |
    | `a0.h0->a1.h0<q>`, or `a0.h0->a1.h0<k>` | `asked` at END, or `marked` at X and Y |
    | `a1.h0->logits` | which payload is found |

    Not in it: head (0, 0) attends by position; payloads, which head (1, 0)'s values hold, are the same in both prompts; and
    nothing but head (0, 0) reads marks and asks.

    Args:
        node: What differs between the two prompts. `"query"`: the ask, so that the head's query at END differs and its keys
            do not. `"key"`: the marks change places, so that its keys at X and Y differ and its query at END does not.
        n: How many pairs.
        seed: Of the prompts; the model is always the same.

    Returns:
        `Known`, with roles `saturated`, `writer` (of the query or the keys) and `control`, and a circuit of 3 edges. Its
        pairs have the named positions RIGHT and WRONG: the payload to be found, and the other one.

    Raises:
        ValueError: an unknown node, `n` below 1.
    """
    if node not in ("query", "key"):
        raise ValueError(f"node: expected 'query' or 'key', got {node!r}")
    if n < 1:
        raise ValueError(f"n: expected at least 1 pair, got {n}")
    gpt2 = HandWritten(
        {"position": N_CTX, "mark": 1, "ask": 1, "payload": N_PAYLOADS, "marked": 1, "asked": 1, "output": N_PAYLOADS},
        n_layers=2,
        n_heads=N_HEADS,
        d_head=N_CTX,
        d_vocab=D_VOCAB,
        n_ctx=N_CTX,
    )
    signs = torch.zeros(D_VOCAB, 2, dtype=torch.float64)  # what each token says: mark, ask
    signs[[MARK_PLUS, MARK_MINUS], 0] = signs[[ASK_PLUS, ASK_MINUS], 1] = torch.tensor([1.0, -1.0]).double()
    payload = eye(D_VOCAB)[:, END + 1 :]
    gpt2.embed("mark", signs[:, :1])
    gpt2.embed("ask", signs[:, 1:])
    gpt2.embed("payload", payload)
    gpt2.embed_positions("position", eye(N_CTX))
    both = eye(2)  # the first entry of head (0, 0)'s z is for marks, the second for asks
    gpt2.head(
        0,
        0,
        **attend_to_previous(N_CTX),
        v={"mark": both[:1], "ask": both[1:]},
        out={"marked": both[:, :1], "asked": both[:, 1:]},
    )
    gpt2.head(
        1,
        0,
        q={"asked": scalar(SCORE)},
        k={"marked": scalar(1.0)},
        v={"payload": eye(N_PAYLOADS)},
        out={"output": eye(N_PAYLOADS)},
    )
    for layer in range(2):
        gpt2.head(layer, 1, **attend_to_position(N_CTX, 0))
    gpt2.unembed("output", LOGIT * payload.T)
    pairs = _pairs(node, n, seed)
    roles = {"saturated": ((1, 0),), "writer": ((0, 0),), "control": ((0, 1), (1, 1))}
    circuit = frozenset({"input->a0.h0<v>", f"a0.h0->a1.h0<{node[0]}>", "a1.h0->logits"})
    return Known(gpt2.model("zoo.saturated_attention"), pairs, logit_diff(pairs), roles, circuit)


def _pairs(node: str, n: int, seed: int) -> PromptPairs:
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted, answers, right_at = [], [], [], []
    for _ in range(n):
        x, y = (END + 1 + torch.randperm(N_PAYLOADS, generator=generator)[:2]).tolist()
        first_plus, ask_plus = (torch.rand(2, generator=generator) < 0.5).tolist()
        marks = (MARK_PLUS, MARK_MINUS) if first_plus else (MARK_MINUS, MARK_PLUS)
        asks = (ASK_PLUS, ASK_MINUS) if ask_plus else (ASK_MINUS, ASK_PLUS)
        clean.append(_prompt(marks, x, y, asks[0]))
        if node == "query":
            corrupted.append(_prompt(marks, x, y, asks[1]))
        else:
            corrupted.append(_prompt(marks[::-1], x, y, asks[0]))
        found_first = first_plus == ask_plus
        answers.append((x, y) if found_first else (y, x))
        right_at.append(2 if found_first else 4)
    positions = {"RIGHT": right_at, "WRONG": [6 - at for at in right_at]}
    return PromptPairs.from_tokens(
        Prompts.from_tokens(clean),
        Prompts.from_tokens(corrupted),
        answers,
        positions=positions,
        task=f"zoo.saturated_{node}",
    )


def _prompt(marks: tuple[int, int], x: int, y: int, ask: int) -> Tensor:
    return torch.tensor([BOS, marks[0], x, marks[1], y, ask, END])
