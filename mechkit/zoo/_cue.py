"""Two models that read one cue: a component whose gradient cancels, and a component whose work is undone downstream.

A prompt is `BOS cue filler … filler`, 5 to 8 tokens. Cues are tokens 1 to 4, of strength 0, 1, 1.5 and 2: the clean
prompt has a strength above 0, the corrupted one 0, and they differ in nothing else.

1. Head (0, 0) attends to the cue from everywhere, and writes its strength into the feature `answer`.
2. The metric reads `answer`: the logit of token 5, the right answer, is +answer/2, and that of token 6, the wrong one,
   -answer/2. So the logit difference is `answer` at the last position.
3. What layer 1 does to `answer` is what the two models differ in.
"""

from __future__ import annotations

import torch

from mechkit._check import checked
from mechkit.metrics import logit_diff
from mechkit.prompts import PromptPairs, Prompts
from mechkit.zoo._build import HandWritten, Known, attend_to_position, attend_to_self, scalar

BOS, OFF, RIGHT, WRONG = 0, 1, 5, 6
STRENGTHS = (0.0, 1.0, 1.5, 2.0)  # of tokens 1 to 4
N_FILLERS = 5
D_VOCAB, N_CTX, N_HEADS = 7 + N_FILLERS, 16, 2


@checked
def cancellation(n: int = 6, *, size: float = 2.0, steepness: float = 10.0, seed: int = 0) -> Known:
    """A head whose effect reaches the metric on two paths: their gradients cancel at the base run, their effects do not.

    Two layers of two heads, a tanh MLP, 12 tokens, 16 positions.

    | feature | units | written by | value |
    | --- | --- | --- | --- |
    | `position` | 16 | position embedding | the position, one-hot |
    | `cue` | 1 | embedding of tokens 1 to 4 | strength: 0, 1, 1.5, 2 |
    | `answer` | 1 | head (0, 0) | size x strength = a |
    | | | MLP 1 | -size/steepness x tanh(steepness x a/size) |

    The corrupted run has a = 0, where the MLP's slope is -1: it cancels the direct path's +1 exactly. But it saturates at
    once: the exact effect of patching head (0, 0) is a - size/steepness x tanh(steepness x a/size), which is
    size x (strength - 1/steepness) to six digits at least: 1.8, 2.8 or 3.8 logits. Gradient times change is 0. Without
    layer 1's gradient it is a, the direct path: 2, 3 or 4 logits (Kramár et al. 2024, https://arxiv.org/abs/2403.00745:
    brittle cancellation, and their "GradDrop").

    | edge of the circuit | carries |
    | --- | --- |
    | `input->a0.h0<v>` | the strength |
    | `a0.h0->logits` | the direct path, +a |
    | `a0.h0->m1` | a, which the MLP reads |
    | `m1->logits` | -size/steepness x tanh(steepness x a/size) |

    Not in it: attention is by position, and the cue itself is read by head (0, 0) alone.

    Args:
        n: How many pairs.
        size: Logits for a cue of strength 1.
        steepness: How fast the MLP saturates; at least 8, so that it has done so at strength 1.
        seed: Of the prompts; the model depends on `size` and `steepness` alone.

    Returns:
        `Known`, with roles `writer` (head (0, 0)), `canceller` (MLP 1) and `control` (the other heads, which attend to
        position 0 and write nothing, and MLP 0, which is zero), and a circuit of 4 edges.

    Raises:
        ValueError: `n` below 1, `size` of 0 or less, `steepness` below 8.
    """
    _check(n, size)
    if not steepness >= 8:
        raise ValueError(f"steepness: expected 8 or more, so that the MLP saturates, got {steepness}")
    gpt2 = _reads_the_cue({"position": N_CTX, "cue": 1, "answer": 1}, size, activation="tanh")
    gpt2.mlp(1, {"answer": scalar(steepness / size)}, {"answer": scalar(-size / steepness)})
    for layer, head in ((0, 1), (1, 0), (1, 1)):
        gpt2.head(layer, head, **attend_to_position(N_CTX, 0))
    pairs = _pairs(n, seed, "zoo.cancellation")
    roles = {"writer": ((0, 0),), "canceller": ((1, None),), "control": ((0, 1), (1, 0), (1, 1), (0, None))}
    circuit = frozenset({"input->a0.h0<v>", "a0.h0->logits", "a0.h0->m1", "m1->logits"})
    return Known(gpt2.model("zoo.cancellation"), pairs, logit_diff(pairs), roles, circuit)


@checked(bystander=(-1e6, 1e6))
def writer_and_eraser(n: int = 6, *, size: float = 4.0, bystander: float = 1.0, seed: int = 0) -> Known:
    """A head that writes the answer, and a later head that erases what it wrote.

    So the writer's direct contribution is large and its ablation changes nothing (as with copy suppression, McDougall
    et al. 2023, https://arxiv.org/abs/2310.04625, and self-repair, McGrath et al. 2023, https://arxiv.org/abs/2307.15771).

    Two layers of two heads, no MLPs, 12 tokens, 16 positions.

    | feature | units | written by | value |
    | --- | --- | --- | --- |
    | `position` | 16 | position embedding | the position, one-hot |
    | `cue` | 1 | embedding of tokens 1 to 4 | strength: 0, 1, 1.5, 2 |
    | `answer` | 1 | head (0, 0), attends to the cue | size x strength |
    | | | head (1, 0), attends to its own position | minus what it reads there |
    | `other` | 1 | head (0, 1), attends to the cue | bystander x strength |

    The metric reads answer + other. Direct contributions to it: writer +size x strength, eraser the opposite, bystander
    bystander x strength; all others 0. The corrupted run, whose strength is 0, has metric 0; the clean run has the
    bystander's alone. Ablating (zero) or patching the writer changes nothing; ablating the eraser adds size x strength.

    | edge of the circuit | carries |
    | --- | --- |
    | `input->a0.h0<v>`, `input->a0.h1<v>` | the strength |
    | `a0.h0->logits` | +size x strength |
    | `a0.h0->a1.h0<v>` | the same, to the eraser |
    | `a1.h0->logits` | -size x strength |
    | `a0.h1->logits` | bystander x strength |

    Not in it: attention is by position, and nothing else reads `cue`, `answer` or `other`. The effect of `input->a0.h0<v>`
    is 0 by itself, and 0 with the whole circuit: what it sends is erased. It is in the circuit because it changes the
    metric as soon as one of the three edges that write and erase is taken away. A method that looks at one edge at a
    time cannot distinguish it from an edge that is not in the circuit.

    Args:
        n: How many pairs.
        size: Logits that the writer writes for a cue of strength 1.
        bystander: Logits that head (0, 1) writes for it, which nobody erases.
        seed: Of the prompts; the model depends on the sizes alone.

    Returns:
        `Known`, with roles `writer`, `eraser`, `bystander` and `control` (head (1, 1), which attends to position 0 and
        writes nothing), and a circuit of 6 edges, or 4 where `bystander` is 0.

    Raises:
        ValueError: `n` below 1, `size` of 0 or less.
    """
    _check(n, size)
    gpt2 = _reads_the_cue({"position": N_CTX, "cue": 1, "answer": 1, "other": 1}, size, activation="linear")
    gpt2.head(0, 1, **attend_to_position(N_CTX, 1), v={"cue": scalar(1.0)}, out={"other": scalar(bystander)})
    gpt2.head(1, 0, **attend_to_self(N_CTX), v={"answer": scalar(1.0)}, out={"answer": scalar(-1.0)})
    gpt2.head(1, 1, **attend_to_position(N_CTX, 0))
    gpt2.unembed("other", _answers())
    pairs = _pairs(n, seed, "zoo.writer_and_eraser")
    roles = {"writer": ((0, 0),), "eraser": ((1, 0),), "bystander": ((0, 1),), "control": ((1, 1),)}
    circuit = {"input->a0.h0<v>", "a0.h0->logits", "a0.h0->a1.h0<v>", "a1.h0->logits"}
    circuit |= {"input->a0.h1<v>", "a0.h1->logits"} if bystander else set()
    return Known(gpt2.model("zoo.writer_and_eraser"), pairs, logit_diff(pairs), roles, frozenset(circuit))


def _check(n: int, size: float) -> None:
    if n < 1:
        raise ValueError(f"n: expected at least 1 pair, got {n}")
    if not size > 0:
        raise ValueError(f"size: expected more than 0 logits, got {size}")


def _reads_the_cue(features: dict[str, int], size: float, *, activation: str) -> HandWritten:
    """What both models share: the embedding, head (0, 0), and the unembedding of `answer`."""
    gpt2 = HandWritten(
        features, n_layers=2, n_heads=N_HEADS, d_head=N_CTX, d_vocab=D_VOCAB, n_ctx=N_CTX, activation=activation
    )
    strength = torch.zeros(D_VOCAB, 1, dtype=torch.float64)
    strength[OFF : OFF + len(STRENGTHS), 0] = torch.tensor(STRENGTHS, dtype=torch.float64)
    gpt2.embed("cue", strength)
    gpt2.embed_positions("position", torch.eye(N_CTX, dtype=torch.float64))
    gpt2.head(0, 0, **attend_to_position(N_CTX, 1), v={"cue": scalar(1.0)}, out={"answer": scalar(size)})
    gpt2.unembed("answer", _answers())
    return gpt2


def _answers() -> torch.Tensor:
    """One unit of a feature to the logits: half for the right answer, half against the wrong one."""
    logits = torch.zeros(1, D_VOCAB, dtype=torch.float64)
    logits[0, RIGHT], logits[0, WRONG] = 0.5, -0.5
    return logits


def _pairs(n: int, seed: int, task: str) -> PromptPairs:
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted = [], []
    for i in range(n):
        cue = OFF + 1 + i % (len(STRENGTHS) - 1)  # every strength in turn
        fillers = WRONG + 1 + torch.randint(0, N_FILLERS, (3 + i % 4,), generator=generator)
        clean.append(torch.cat([torch.tensor([BOS, cue]), fillers]))
        corrupted.append(torch.cat([torch.tensor([BOS, OFF]), fillers]))
    return PromptPairs.from_tokens(
        Prompts.from_tokens(clean), Prompts.from_tokens(corrupted), [(RIGHT, WRONG)] * n, task=task
    )
