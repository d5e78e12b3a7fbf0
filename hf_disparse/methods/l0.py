"""Hard-concrete gates: an L0 norm that gradients can lower. Pure functions on tensors.

a is a weight's log_alpha and z in [0, 1] its gate; the weight in use is w z. Sources: Louizos et al. 2018 (arXiv 1712.01312)
for the gates, Wang et al. 2020 (FLOP, arXiv 1910.04732) for the Lagrangian that holds a target.
"""

import math

import torch
from torch import Tensor, nn

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # of the paper: temperature, and the interval that is clamped to [0, 1]
_SHIFT = BETA * math.log(-GAMMA / ZETA)
_EDGE = 1e-6  # of the noise, whose logarithm is taken


def initial(drop_rate: float) -> float:
    """The log_alpha of a gate that is closed with about this probability: log(1 - d) - log d. The authors' code."""
    return math.log(1 - drop_rate) - math.log(drop_rate)


def logistic(size: int, generator: torch.Generator) -> Tensor:
    """(log u - log(1 - u)) / beta for uniform u, the noise of gates. Shape (size,) float32, on the generator's device."""
    return torch.rand(size, generator=generator, device=generator.device).logit_(_EDGE).mul_(1 / BETA)


def sample(log_alpha: Tensor, noise: Tensor, out: Tensor | None = None) -> Tensor:
    """z = clamp(sigmoid((log u - log(1 - u) + a) / beta) (zeta - gamma) + gamma, 0, 1), eq. 10 and 11.

    Shapes: log_alpha and noise (log u - log(1 - u)) / beta alike -> the same, in `out` if that is given, as in all that follow.
    """
    z = torch.add(noise, log_alpha, alpha=1 / BETA, out=out).sigmoid_()
    return z.mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def slope(gate: Tensor, out: Tensor | None = None) -> Tensor:
    """dz/da of a sampled gate, from z alone: (z - gamma) (zeta - z) / (beta (zeta - gamma)), 0 where z was clamped.

    Shape of the gate.
    """
    # As gamma + zeta = 1, the product is z - z^2 - gamma zeta, which is more than its last term inside (0, 1) alone.
    product = torch.addcmul(gate, gate, gate, value=-1, out=out).sub_(GAMMA * ZETA)
    return nn.functional.threshold_(product, -GAMMA * ZETA, 0.0).mul_(1 / (BETA * (ZETA - GAMMA)))


def expected_gate(log_alpha: Tensor, out: Tensor | None = None) -> Tensor:
    """The gate without noise, clamp(sigmoid(a) (zeta - gamma) + gamma, 0, 1), eq. 13. Shape of log_alpha."""
    return torch.sigmoid(log_alpha, out=out).mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def open_probability(log_alpha: Tensor, out: Tensor | None = None) -> Tensor:
    """P(z > 0) = sigmoid(a - beta log(-gamma / zeta)), eq. 12. Shape of log_alpha.

    The expected sparsity s is 1 minus its mean over all gates.
    """
    return torch.sub(log_alpha, _SHIFT, out=out).sigmoid_()


def lagrangian(sparsity: float, target: float, multipliers: tuple[float, float]) -> float:
    """l1 (s - target) + l2 (s - target)^2, FLOP, section 3.2."""
    return multipliers[0] * (sparsity - target) + multipliers[1] * (sparsity - target) ** 2


def pull(sparsity: float, target: float, multipliers: tuple[float, float]) -> float:
    """Minus the derivative of `lagrangian` by s: how hard every gate is pulled shut, in units of -ds/da."""
    return -(multipliers[0] + 2 * multipliers[1] * (sparsity - target))


def ascend(sparsity: float, target: float, multipliers: tuple[float, float], rate: float) -> tuple[float, float]:
    """The multipliers after a step of gradient ascent on `lagrangian`."""
    gap = sparsity - target
    return multipliers[0] + rate * gap, multipliers[1] + rate * gap**2
