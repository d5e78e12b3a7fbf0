"""Movement pruning: what moves away from zero stays. Pure functions on tensors.

w is a weight's latent value, M in {0, 1} its mask, g the gradient of one task's loss with respect to the effective weight
w M, S the weight's score for that task. Source: Sanh et al. 2020 (arXiv 2005.07683).
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def accumulate(score: Tensor, weight: Tensor, gradient: Tensor, held: Tensor | None = None) -> None:
    """S <- S - w g, in place: the straight-through gradient step on S. Section 4, without its constant rate.

    Shapes: all alike; `weight` is the effective weight, +0.0 where pruned, and `held` the latent value there, 0 elsewhere.
    """
    score.addcmul_(weight, gradient, value=-1)
    if held is not None:
        score.addcmul_(held, gradient, value=-1)


def soft_step(score: Tensor, movement: Tensor, rate: float, penalty: float) -> None:
    """S <- S - rate (movement + penalty sigmoid'(S)), in place: descent on the loss plus penalty * sum sigmoid(S).

    Shapes: score and movement (w g, in a unit of the caller's) alike. Soft movement pruning, section 4.
    """
    falls = torch.sigmoid(score)
    falls.addcmul_(falls, falls, value=-1)  # sigmoid' = sigmoid - sigmoid^2
    score.sub_(falls.mul_(penalty).add_(movement), alpha=rate)


def above(task_scores: Mapping[str, Mapping[str, Tensor]], threshold: float, quorum: int = 1) -> dict[str, Tensor]:
    """The masks that keep {w : sigmoid(S_t(w)) > threshold for at least `quorum` tasks}; one task gives the paper's.

    Args:
        task_scores: task -> parameter name -> scores, weight-shaped.
        threshold: in (0, 1).
    """
    limit = math.log(threshold / (1 - threshold))
    first = next(iter(task_scores.values()))
    return {name: _votes(scores[name] > limit for scores in task_scores.values()) >= quorum for name in first}


def _votes(opinions: Iterable[Tensor]) -> Tensor:
    return sum(opinion.to(torch.int16) for opinion in opinions)
