"""Hard-concrete gates: an L0 norm that gradients can lower. Pure functions on tensors.

a is a weight's log_alpha and z in [0, 1] its gate; the weight in use is w z. Sources: Louizos et al. 2018 (arXiv 1712.01312)
for the gates, Wang et al. 2020 (FLOP, arXiv 1910.04732) for the Lagrangian that holds a target.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from hf_disparse.methods.base import Method, Update
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.masks import count_pruned
from hf_disparse.pruning.rules import decide_by
from hf_disparse.pruning.schedule import linear_sparsity

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


_REACH = 8.0  # |log_alpha| at most, so that a gate can turn round; open with probability 0.002 there
_RISE = 0.8  # of the steps from start to end, after which the target is the final one: gates lag behind it
_DAMPING = 100.0  # the quadratic multiplier at first: the linear one alone, an integral, lets the sparsity swing
_PLACES = 2**20  # where the noise of a tensor may begin in the pool of all noise
_LEAST = 0.01  # of a gate that is folded into a weight that stays, which must not be zero


class L0(Method):
    """Trains a gate for every weight beside it; at the end the gates with the largest log_alpha are open for good.

    In a step the model has w z with sampled gates z, for the optimizer the latent w, between steps w times the gate without
    noise. At the end the gate without noise is multiplied into the weight, so that the outputs change by the pruned weights
    alone. The noise of a tensor is a stretch, from a random place in every step, of a pool that is drawn once.
    """

    sees_gradients = True  # in `before_optimizer`; as with `gradient`, not those that fp16 scales
    keeps_state = True

    def __init__(self, config):
        super().__init__(config)
        self._drawn: dict[str, Tensor] = {}  # the gates of the step, then their gradients, in `_room`

    def begin(self, parameters: Mapping[str, nn.Parameter], tasks: Iterable[str], max_steps: int) -> None:
        super().begin(parameters, tasks, max_steps)
        self.risen = self.config.start_step + max(1, round(_RISE * (self.last - self.config.start_step)))
        self.multipliers = (0.0, _DAMPING)
        self.over = False
        self._parameters, self._step = parameters, 0
        self.latent: dict[str, Tensor] = {}
        self.log_alpha: dict[str, Tensor] = {}
        self._adam: dict[str, Adam] = {}  # one for each tensor, which is in the cache when its gradient is made
        self._pool: Tensor | None = None
        self._room: dict[str, Tensor] = {}
        self._lent: dict[str, Tensor] = {}  # where the effective weights are while the optimizer has the latent ones

    def _open(self, log_alpha: Mapping[str, Tensor], latent: Mapping[str, Tensor]) -> None:
        self.log_alpha, self.latent = dict(log_alpha), dict(latent)
        rate = self.config.gate_learning_rate
        self._adam = {name: Adam([a], lr=rate, fused=True) for name, a in self.log_alpha.items()}
        generator = torch.Generator(next(iter(self.log_alpha.values())).device).manual_seed(self.config.seed)
        self._room = {name: torch.empty_like(a) for name, a in self.log_alpha.items()}
        for a in self.log_alpha.values():
            a.grad = torch.empty_like(a)
        self._pool = logistic(max(a.numel() for a in self.log_alpha.values()) + _PLACES, generator)

    def before_step(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Samples the gates of this step."""
        self._step, self.over = step, step >= self.last
        if self.over or step < self.config.start_step:
            return
        if not self.latent:
            first = initial(self.config.drop_rate)
            gates = {name: torch.full_like(p, first, dtype=torch.float32).detach() for name, p in parameters.items()}
            self._open(gates, {name: p.detach().clone() for name, p in parameters.items()})
        # Noise drawn anew for every weight and step would take longer than all the rest of this method.
        generator = torch.Generator().manual_seed(self.config.seed * 2**31 + step)
        places = torch.randint(_PLACES, (len(parameters),), generator=generator).tolist()
        with torch.no_grad():
            for place, (name, p) in zip(places, parameters.items(), strict=True):
                log_alpha = self.log_alpha[name]
                noise = self._pool[place : place + log_alpha.numel()].view_as(log_alpha)
                self._drawn[name] = sample(log_alpha, noise, out=self._room[name])
                torch.mul(self.latent[name], self._drawn[name], out=p.detach())

    @torch.no_grad()
    def before_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Turns gradients of w z into those of w and of the gates; moves the gates and the multipliers."""
        if not self._drawn:
            return
        square, size, kept = 0.0, 0, 0.0
        for name, p in parameters.items():
            z, log_alpha, latent = self._drawn[name], self.log_alpha[name], self.latent[name]
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            torch.mul(gradient, latent, out=p)  # dL/dz, where there is room until the weights come back
            gradient.mul_(z)
            slope(z, out=z).mul_(p)
            self._lend(name, p)
            chance = open_probability(log_alpha, out=log_alpha.grad)
            square, size = square + torch.dot(z.reshape(-1), z.reshape(-1)), size + p.numel()
            kept = kept + chance.sum()
            chance.addcmul_(chance, chance, value=-1)  # P' = P - P^2
        config, sparsity = self.config, 1 - float(kept) / size
        target = linear_sparsity(self._step + 1, config.start_step, self.risen, config.sparsity)
        force, unit = pull(sparsity, target, self.multipliers), max(float(square) / size, 1e-60) ** 0.5
        self._move(force, unit)
        self.multipliers = ascend(sparsity, target, self.multipliers, config.multiplier_learning_rate)

    def _move(self, force: float, unit: float) -> None:
        """A step of the gates, by `force` times what `grad` has of the expected sparsity and by the gradient of the loss."""
        for name, log_alpha in self.log_alpha.items():
            log_alpha.grad.mul_(force).add_(self._drawn[name], alpha=1 / unit)
            self._adam[name].step()

    def _lend(self, name: str, p: nn.Parameter) -> None:
        """Has the optimizer work on the latent weights in place: two copies of all weights less in every step."""
        self._lent[name] = p.data
        p.data = self.latent[name]

    @torch.no_grad()
    def after_optimizer(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> None:
        """Takes the new latent weights and leaves the effective ones."""
        self.end()

    @torch.no_grad()
    def end(self) -> None:
        """The effective weights, also where training died within a step."""
        for name in self._drawn:
            p = self._parameters[name]
            p.data = self._lent.pop(name, p.data)
            gate = expected_gate(self.log_alpha[name].clamp_(-_REACH, _REACH), out=self._room[name])
            torch.mul(self.latent[name], gate, out=p).add_(0.0)  # -0.0 becomes +0.0
        self._drawn = {}

    @torch.no_grad()
    def update(self, now: Update) -> Masks:
        """The masks by log_alpha, once and for all; what was pruned before training stays pruned and counts."""
        masks, (pruned, size) = dict(now.masks), count_pruned(now.masks)
        if pruned < round(self.config.sparsity * size):
            masks = decide_by(self.config, {"joint": self.log_alpha}, self.config.sparsity, active=now.masks)
        self._fold()
        return masks

    def _fold(self) -> None:
        """Makes the gates part of the weights and lets go of all that was for them."""
        for name, p in self._parameters.items():
            p.copy_(self.latent[name]).mul_(expected_gate(self.log_alpha[name]).clamp_(min=_LEAST))
        self._pool, self._room = None, {}
        self.latent, self.log_alpha, self._adam = {}, {}, {}

    def state(self) -> dict[str, Tensor]:
        if self.over:
            return {}
        state = {"multipliers": torch.tensor(self.multipliers, dtype=torch.float64)}
        for name, log_alpha in self.log_alpha.items():
            state |= {f"latent/{name}": self.latent[name], f"log_alpha/{name}": log_alpha}
            state |= {f"{key}/{name}": value.clone() for key, value in self._adam[name].state[log_alpha].items()}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.multipliers = tuple(state["multipliers"].tolist())
        kinds: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            if name:
                kinds.setdefault(kind, {})[name] = tensor.to(self._parameters[name].device)
        if kinds:
            log_alpha, latent = ({n: kinds[kind][n] for n in self._parameters} for kind in ("log_alpha", "latent"))
            self._open(log_alpha, latent)
            for name, gates in self.log_alpha.items():
                self._adam[name].state[gates] = {key: kinds[key][name] for key in ("step", "exp_avg", "exp_avg_sq")}
