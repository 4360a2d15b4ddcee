"""Learned masks: one gate an edge (or a writer), trained by gradient descent until few are open and the model still does its task.

1. Every edge e has a gate z_e in [0, 1]: its reader sees `ablated + z_e (live - ablated)` of its writer (`CircuitRuns`). With
   `over="node"` all edges of a writer share one gate.
2. Gates are drawn from the hard concrete distribution, with one number log a_e to learn each. From u uniform in (0, 1)

       s_e = sigmoid((log u - log(1 - u) + log a_e) / t),    z_e = min(1, max(0, 1.2 s_e - 0.1)),

   t the temperature. So a gate is exactly 0 or exactly 1 with a probability above 0, and still has a gradient in between:
   P(z_e > 0) = sigmoid(log a_e - t log(0.1 / 1.1)).
3. Adam minimizes, by log a,

       mean over prompts and draws of loss(z) / loss(0)  +  penalty * (expected open gates / gates).

   `loss` is the KL divergence KL(clean || circuit) of next-token distributions in nats, or (metric(circuit) - metric(clean))^2;
   `loss(0)` is its mean over the training prompts with everything ablated: 1 means as bad as no circuit at all. So a gate is worth
   its while if it saves more than `penalty / gates` of what there is to lose.
4. With a `target` in place of a penalty, its multiplier p is learned too: the second term is p log(expected open gates / T), T goes
   down from all gates to the target geometrically in the first half of the steps, and p rises by gradient ascent where more
   gates are open than T, and falls (to 0 at least) where fewer are.
5. After training a gate is what its distribution has in the middle, z_e = min(1, max(0, 1.2 sigmoid(log a_e) - 0.1)).

Every row of a minibatch has gates of its own draw, which makes the gradient less noisy at no cost. All draws are from one seed.

What is found is *a* small circuit that does the task. Edges that cancel each other are dropped together; of two that do the
same, one may be. Edges that matter alone or in company are what patching finds.

Gates: Louizos et al. 2018, https://arxiv.org/abs/1712.01312. Nodes: Cao et al. 2021 (subnetwork probing),
https://arxiv.org/abs/2104.03514. Edges: Bhaskar et al. 2024 (edge pruning), https://arxiv.org/abs/2406.16778; Li and Janson 2024
(UGS), https://arxiv.org/abs/2409.09951, whose constants `optimal_ablation` finds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mechkit.metrics import Metric
from mechkit.prompts import PromptPairs

MetricOrMaker = Metric | Callable[[PromptPairs], Metric]
LOW, HIGH = -0.1, 1.1  # the hard concrete's stretch
ASCENT = 1.0  # how much the multiplier of a target grows in a step in which e times too many gates are open


def gates_drawn(
    log_alpha: Float[Tensor, "writer any"], temperature: float, uniform: Float[Tensor, "row writer any"]
) -> Float[Tensor, "row writer any"]:
    """Gates of the hard concrete distribution, with gradients."""
    s = torch.sigmoid((uniform.logit(1e-9) + log_alpha) / temperature)
    return (LOW + (HIGH - LOW) * s).clamp(0, 1)


def gates_of(log_alpha: Float[Tensor, "writer any"]) -> Float[Tensor, "writer any"]:
    """The gates to test with."""
    return (LOW + (HIGH - LOW) * log_alpha.sigmoid()).clamp(0, 1)


def open_probability(log_alpha: Float[Tensor, "writer any"], temperature: float) -> Float[Tensor, "writer any"]:
    """How likely a gate is open, wide or not."""
    return torch.sigmoid(log_alpha - temperature * torch.tensor(-LOW / HIGH).log())
