"""A model that is linear in each of its activations: attribution by gradients is exact on it.

1. Queries and keys are zero, so that attention is uniform over the positions so far, whatever the prompt.
2. The MLPs' activation function is the identity.
3. The norms' scale is constant (see `mechkit.zoo._build`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mechkit._check import checked
from mechkit.metrics import logit_diff
from mechkit.prompts import PromptPairs, Prompts
from mechkit.zoo._build import HandWritten, Known

N_LAYERS, N_HEADS, N_FEATURES, D_MLP, D_VOCAB, N_CTX = 3, 4, 15, 12, 40, 16


@checked
def linear(seed: int = 0, *, n: int = 4) -> Known:
    """A random model whose logits are linear in `resid_*`, `z`, `v`, `result`, `attn_out`, `mlp_pre`, `mlp_post`, `mlp_out`.

    So gradient times change is the exact effect of patching, to about 1e-11 logits (the norms: see `mechkit.zoo._build`).
    Patching several heads of one layer has the sum of their effects. So have heads of different layers, except for what
    the earlier one sends through the later one: patching the later one overwrites that.

    Three layers of four heads, MLPs of 12 neurons, 40 tokens, 16 positions.

    | feature | units | written by |
    | --- | --- | --- |
    | `stream` | 15 | everything: token and position embeddings, heads, MLPs, their biases, all drawn at random |

    The prompts have 6 to 9 random tokens; clean and corrupted ones differ from the middle on. Answers are random tokens.

    Args:
        seed: Of the weights and of the prompts.
        n: How many pairs.

    Returns:
        `Known`, with the one role `linear`: all heads and MLPs. Its `circuit` is left empty: every edge matters, but those to
        queries and keys.

    Raises:
        ValueError: `n` below 1.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 pair, got {n}")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator) / shape[0] ** 0.5

    gpt2 = HandWritten(
        {"stream": N_FEATURES},
        n_layers=N_LAYERS,
        n_heads=N_HEADS,
        d_head=2 * (N_FEATURES + 1) // N_HEADS,
        d_vocab=D_VOCAB,
        n_ctx=N_CTX,
        d_mlp=D_MLP,
    )
    gpt2.embed("stream", D_VOCAB**0.5 * draw(D_VOCAB, N_FEATURES))
    gpt2.embed_positions("stream", N_CTX**0.5 * draw(N_CTX, N_FEATURES))
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            gpt2.head(
                layer,
                head,
                v={"stream": draw(N_FEATURES, gpt2.d_head)},
                v_bias=draw(gpt2.d_head),
                out={"stream": draw(gpt2.d_head, N_FEATURES) / 2},
            )
        gpt2.mlp(
            layer, {"stream": draw(N_FEATURES, D_MLP)}, {"stream": draw(D_MLP, N_FEATURES) / 2}, in_bias=draw(D_MLP)
        )
        gpt2.output_bias(layer, "stream", attention=draw(N_FEATURES), mlp=draw(N_FEATURES))
    gpt2.unembed("stream", draw(N_FEATURES, D_VOCAB))
    pairs = _pairs(n, generator)
    everything = tuple((layer, head) for layer in range(N_LAYERS) for head in (*range(N_HEADS), None))
    return Known(gpt2.model(f"zoo.linear({seed})"), pairs, logit_diff(pairs), {"linear": everything})


def _pairs(n: int, generator: torch.Generator) -> PromptPairs:
    clean, corrupted, answers = [], [], []
    for i in range(n):
        length = 6 + i % 4
        middle = length // 2
        a, b = (torch.randint(0, D_VOCAB, (length,), generator=generator) for _ in range(2))
        b[:middle] = a[:middle]
        b[middle:] += (b[middle:] == a[middle:]).long()  # differ everywhere from the middle on
        clean.append(a)
        corrupted.append(b % D_VOCAB)
        answers.append(tuple(torch.randperm(D_VOCAB, generator=generator)[:2].tolist()))
    return PromptPairs.from_tokens(
        Prompts.from_tokens(clean), Prompts.from_tokens(corrupted), answers, task="zoo.linear"
    )
