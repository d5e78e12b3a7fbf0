"""Hard-concrete gates: an L0 norm that gradients can lower, and a Lagrangian that holds it at a target.

a is a gate's log_alpha and z in [0, 1] its value; a gated weight w is used as w z. The gates are from Louizos et al. 2018
(arXiv 1712.01312), the Lagrangian is from Wang et al. 2020 (FLOP, arXiv 1910.04732). `Gates` trains them beside a model.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Adam

from hf_disparse.pruning.schedule import linear_sparsity

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # the paper's temperature, and the interval that is clamped to [0, 1]
_SHIFT = BETA * math.log(-GAMMA / ZETA)
_EDGE = 1e-6  # keeps uniform noise away from 0 and 1, where its logit is infinite


def initial(drop_rate: float) -> float:
    """Returns the log_alpha of a gate that is closed with about this probability: log(1 - d) - log d. The authors' code."""
    return math.log(1 - drop_rate) - math.log(drop_rate)


def logistic(size: int, generator: torch.Generator) -> Tensor:
    """Draws (log u - log(1 - u)) / beta for uniform u: the noise of gates. Shape (size,) float32, on the generator's device."""
    return torch.rand(size, generator=generator, device=generator.device).logit_(_EDGE).mul_(1 / BETA)


def sample(log_alpha: Tensor, noise: Tensor, out: Tensor | None = None) -> Tensor:
    """z = clamp(sigmoid((log u - log(1 - u) + a) / beta) (zeta - gamma) + gamma, 0, 1), eq. 10 and 11.

    Shapes: log_alpha and noise (log u - log(1 - u)) / beta alike -> the same, written to `out` if given, as below.
    """
    z = torch.add(noise, log_alpha, alpha=1 / BETA, out=out).sigmoid_()
    return z.mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def slope(gate: Tensor, out: Tensor | None = None) -> Tensor:
    """dz/da of a sampled gate, from z alone: (z - gamma) (zeta - z) / (beta (zeta - gamma)), 0 where z was clamped.

    Shape of the gate.
    """
    # gamma + zeta = 1, so the product is z - z^2 - gamma zeta; only inside (0, 1) does it exceed its last term.
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
    """Returns the multipliers after a step of gradient ascent on `lagrangian`."""
    gap = sparsity - target
    return multipliers[0] + rate * gap, multipliers[1] + rate * gap**2


_REACH = 8.0  # the largest |log_alpha|, so that a gate can turn round: at -8 it is open with probability 0.002
_RISE = 0.8  # of the steps from start to end, after which the target is the final one: gates lag behind it
_DAMPING = 100.0  # the first quadratic multiplier: the linear one alone is an integrator and lets the sparsity swing
_PLACES = 2**20  # how many places in the pool the noise of a tensor may start from
_LEAST = 0.01  # the least gate to fold into a weight that stays, because that must not become zero


class Gates:
    """Gates on weights in training. In a step the model holds w z, for the optimizer w, between steps w E[z].

    w are the latent weights, z the sampled gates and E[z] the gates without noise. A tensor's noise is a stretch of a pool
    that is drawn once, from a random place in every step: fresh noise for every weight would take longer than all the rest.

    Args:
        config: an L0Config or a subclass.
        parameters: the gated weights by name, (rows, columns) each.
        last: the step of the pruning, by which the target has risen.
        sizes: parameters that a gate stands for, by the name of the weight; 1 each by default.
        dense: of how many parameters the sparsity is a fraction; by default of the gates.
        by_column: one gate for every column, not for every weight.

    Attributes:
        log_alpha: a of every gate, (rows, columns) or (columns,) float32; empty while there are no gates.
        latent: w, shaped as the weights.
        drawn: z in a step, then the gradient of the loss by a; empty between steps.
        multipliers: l1 and l2 of the Lagrangian.
    """

    def __init__(
        self,
        config,
        parameters: Mapping[str, nn.Parameter],
        last: int,
        *,
        sizes: Mapping[str, int] | None = None,
        dense: int | None = None,
        by_column: bool = False,
    ):
        self.config, self.parameters, self.last = config, parameters, last
        self.sizes = sizes or dict.fromkeys(parameters, 1)
        self.dense, self.by_column = dense, by_column
        self.multipliers = (0.0, _DAMPING)
        self.log_alpha: dict[str, Tensor] = {}
        self.latent: dict[str, Tensor] = {}
        self.drawn: dict[str, Tensor] = {}
        self._step = 0
        self._adam: dict[str, Adam] = {}  # one per tensor, so that its step finds the gradient in the cache
        self._room: dict[str, Tensor] = {}  # where `drawn` is kept from step to step
        self._pool: Tensor | None = None
        self._lent: dict[str, Tensor] = {}  # the weights' own memory while the optimizer works on the latent ones

    def draw(self, step: int) -> None:
        """Samples the gates of a step and puts w z into the model; makes the gates first if there are none."""
        self._step = step
        if step >= self.last or step < self.config.start_step:
            return
        if not self.latent:
            self._open(
                {n: self._gates_of(p, initial(self.config.drop_rate)) for n, p in self.parameters.items()},
                {name: p.detach().clone() for name, p in self.parameters.items()},
            )
        generator = torch.Generator().manual_seed(self.config.seed * 2**31 + step)
        places = torch.randint(_PLACES, (len(self.parameters),), generator=generator).tolist()
        with torch.no_grad():
            for place, (name, p) in zip(places, self.parameters.items(), strict=True):
                log_alpha = self.log_alpha[name]
                noise = self._pool[place : place + log_alpha.numel()].view_as(log_alpha)
                self.drawn[name] = sample(log_alpha, noise, out=self._room[name])
                torch.mul(self.latent[name], self.drawn[name], out=p.detach())

    def _gates_of(self, weight: Tensor, value: float) -> Tensor:
        return torch.full_like(weight[0] if self.by_column else weight, value, dtype=torch.float32).detach()

    def _open(self, log_alpha: Mapping[str, Tensor], latent: Mapping[str, Tensor]) -> None:
        self.log_alpha, self.latent = dict(log_alpha), dict(latent)
        rate = self.config.gate_learning_rate
        self._adam = {name: Adam([a], lr=rate, fused=True) for name, a in self.log_alpha.items()}
        generator = torch.Generator(next(iter(self.log_alpha.values())).device).manual_seed(self.config.seed)
        self._room = {name: torch.empty_like(a) for name, a in self.log_alpha.items()}
        for a in self.log_alpha.values():
            a.grad = torch.empty_like(a)
        self._pool = logistic(max(a.numel() for a in self.log_alpha.values()) + _PLACES, generator)

    @torch.no_grad()
    def backward(self) -> None:
        """Turns the gradients by w z into those by w, in the weights' `grad`, and those by a, in `drawn`; lends out w."""
        for name, p in self.parameters.items():
            z = self.drawn[name]
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            by_gate = torch.mul(gradient, self.latent[name], out=p)  # dL/dz, where there is room until w z comes back
            gradient.mul_(z)
            slope(z, out=z).mul_(by_gate.sum(0) if self.by_column else by_gate)
            # The optimizer works on the latent weights in place, which saves two copies of all weights in every step.
            self._lent[name] = p.data
            p.data = self.latent[name]

    @torch.no_grad()
    def move(self) -> None:
        """Takes a step on loss and Lagrangian: Adam for a, gradient ascent for the multipliers.

        The Lagrangian is in units of the root mean square of the loss's gradients by a.
        """
        count = sum(a.numel() for a in self.log_alpha.values())
        full = sum(self.sizes[name] * a.numel() for name, a in self.log_alpha.items())
        mean, square, kept = full / count, 0.0, 0.0
        for name, log_alpha in self.log_alpha.items():
            gradient, size = self.drawn[name], self.sizes[name]
            chance = open_probability(log_alpha, out=log_alpha.grad)
            kept = kept + size * chance.sum()
            chance.addcmul_(chance, chance, value=-1)  # P' = P - P^2
            if size != mean:
                chance.mul_(size / mean)
            flat = gradient.reshape(-1)  # `dot` needs no copy of what is as large as all weights
            square = square + (gradient.square().sum() if self.by_column else torch.dot(flat, flat))
        sparsity, target = 1 - float(kept) / (self.dense or full), self._target(1 - full / (self.dense or full))
        unit = max(float(square) / count, 1e-60) ** 0.5
        self._step_adam(pull(sparsity, target, self.multipliers), unit)
        self.multipliers = ascend(sparsity, target, self.multipliers, self.config.multiplier_learning_rate)

    def _target(self, first: float) -> float:
        """Returns the sparsity to hold after this step; `first` is that with all gates open."""
        start = self.config.start_step
        risen = start + max(1, round(_RISE * (self.last - start)))
        return first + (self.config.sparsity - first) * linear_sparsity(self._step + 1, start, risen, 1.0)

    def _step_adam(self, force: float, unit: float) -> None:
        """Adds to `force` times ds/da, which `grad` holds, the gradient of the loss, and takes Adam's step."""
        for name, log_alpha in self.log_alpha.items():
            log_alpha.grad.mul_(force).add_(self.drawn[name], alpha=1 / unit)
            self._adam[name].step()

    @torch.no_grad()
    def settle(self) -> None:
        """Ends a step, also one that died within: takes w back and leaves w E[z] in the model."""
        for name in self.drawn:
            p = self.parameters[name]
            p.data = self._lent.pop(name, p.data)
            gate = expected_gate(self.log_alpha[name].clamp_(-_REACH, _REACH), out=self._room[name])
            torch.mul(self.latent[name], gate, out=p).add_(0.0)  # -0.0 becomes +0.0
        self.drawn = {}

    @torch.no_grad()
    def fold(self) -> None:
        """Multiplies the gates without noise into the weights and frees the memory of both."""
        for name, p in self.parameters.items():
            p.copy_(self.latent[name]).mul_(expected_gate(self.log_alpha[name]).clamp_(min=_LEAST))
        self._pool, self._room = None, {}
        self.latent, self.log_alpha, self._adam = {}, {}, {}

    def state(self) -> dict[str, Tensor]:
        """Returns what the next step needs for the same bits; nothing is needed after the pruning."""
        if self._step >= self.last:
            return {}
        state = {"multipliers": torch.tensor(self.multipliers, dtype=torch.float64)}
        for name, log_alpha in self.log_alpha.items():
            state |= {f"latent/{name}": self.latent[name], f"log_alpha/{name}": log_alpha}
            state |= {f"{key}/{name}": value.clone() for key, value in self._adam[name].state[log_alpha].items()}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` returned."""
        self.multipliers = tuple(state["multipliers"].tolist())
        kinds: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            if name:
                kinds.setdefault(kind, {})[name] = tensor.to(self.parameters[name].device)
        if kinds:
            log_alpha, latent = ({n: kinds[kind][n] for n in self.parameters} for kind in ("log_alpha", "latent"))
            self._open(log_alpha, latent)
            for name, gates in self.log_alpha.items():
                self._adam[name].state[gates] = {key: kinds[key][name] for key in ("step", "exp_avg", "exp_avg_sq")}
