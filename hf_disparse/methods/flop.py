"""Ranks by hard-concrete gates and a Lagrangian over parameters: `method: flop`."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_disparse.methods.base import Update
from hf_disparse.methods.l0 import L0, ascend, open_probability, pull, slope
from hf_disparse.methods.rank import Rank
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.parts import parameters_saved
from hf_disparse.pruning.schedule import linear_sparsity

_UP, _DOWN = ".up.weight", ".down.weight"


class Flop(L0, Rank):
    """As `L0`, but a gate is of a component: W = up diag(z) down. At the end the largest log_alpha that fit the budget stay.

    The sparsity that the Lagrangian holds is of the parameters of the dense matrices; a gate counts for out + in of them.
    """

    def begin(self, parameters: Mapping[str, nn.Parameter], tasks: Iterable[str], max_steps: int) -> None:
        super().begin(_gated(parameters), tasks, max_steps)
        down = {name: parameters[name.removesuffix(_UP) + _DOWN] for name in self._parameters}
        shapes = {name: (p.shape[0], down[name].shape[1]) for name, p in self._parameters.items()}
        self._sizes = {name: sum(shape) for name, shape in shapes.items()}  # of a component
        self._dense = sum(rows * columns for rows, columns in shapes.values())

    def _open(self, log_alpha: Mapping[str, Tensor], latent: Mapping[str, Tensor]) -> None:
        rows = {name: a if a.ndim == 1 else a[0].clone() for name, a in log_alpha.items()}  # (r,): one for each column
        super()._open(rows, latent)

    def before_step(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        super().before_step(_gated(parameters), step)

    @torch.no_grad()
    def before_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Turns gradients of up z into those of up and of the gates; moves the gates and the multipliers."""
        if not self._drawn:
            return
        square, kept, full = 0.0, 0.0, 0
        gates = sum(len(log_alpha) for log_alpha in self.log_alpha.values())
        mean = sum(self._sizes[name] * len(a) for name, a in self.log_alpha.items()) / gates
        for name, p in _gated(parameters).items():
            z, log_alpha, latent, size = self._drawn[name], self.log_alpha[name], self.latent[name], self._sizes[name]
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            self._drawn[name] = slope(z).mul_((latent * gradient).sum(0))  # dL/dz of (r,)
            gradient.mul_(z)
            self._lend(name, p)
            chance = open_probability(log_alpha)
            square, kept = square + self._drawn[name].square().sum(), kept + size * chance.sum()
            full += size * len(log_alpha)
            log_alpha.grad = chance.addcmul_(chance, chance, value=-1).mul_(size / mean)
        config, sparsity, first = self.config, 1 - float(kept) / self._dense, 1 - full / self._dense
        share = linear_sparsity(self._step + 1, config.start_step, self.risen, 1.0)
        target = first + (config.sparsity - first) * share
        force, unit = pull(sparsity, target, self.multipliers), max(float(square) / gates, 1e-60) ** 0.5
        self._move(force, unit)
        self.multipliers = ascend(sparsity, target, self.multipliers, config.multiplier_learning_rate)

    def after_optimizer(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> None:
        super().after_optimizer(_gated(parameters), optimizer)

    @torch.no_grad()
    def update(self, now: Update) -> Masks:
        """The masks by log_alpha, once and for all; what was pruned before training stays pruned and counts."""
        masks, sites = dict(now.masks), now.sites["rank"]
        saved, dense = parameters_saved(now.masks, sites)
        if dense - saved > self.allowed(now.step, now.masks, now.sites):
            masks = self.decide([("joint", {name: self.log_alpha[name + _UP] for name in sites})], now)
        self._fold()
        return masks


def _gated(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The factors whose columns have gates; none before the matrices are in two."""
    return {n: p for n, p in parameters.items() if n.endswith(_UP) and n.removesuffix(_UP) + _DOWN in parameters}
