"""FLOP: a hard-concrete gate for every component of a matrix in two factors, W = up diag(z) down: `method: flop`.

The sparsity that the Lagrangian holds is a fraction of the parameters of the dense matrices; a gate stands for out + in of them.
Source: Wang et al. 2020 (arXiv 1910.04732), sections 3.1 and 3.2. The equations of gates are in `hf_disparse.methods.gates`,
those of the budget in `hf_disparse.methods.rank`.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from hf_disparse.methods.base import Update
from hf_disparse.methods.gates import Gates
from hf_disparse.methods.l0 import L0
from hf_disparse.methods.rank import Rank
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.parts import Sites, parameters_saved

_UP, _DOWN = ".up.weight", ".down.weight"


class Flop(L0):
    """`L0` with a gate for each column of `up`; at the end the components of the largest log_alpha that fit the budget stay."""

    def __init__(self, config):
        super().__init__(config)
        self.rank = Rank(config)  # whose budget it is, and which makes the factors

    def prepare(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self.rank.prepare(model, optimizer)

    def check(self, parameters: Mapping[str, Tensor], sites: Sites) -> None:
        self.rank.check(parameters, sites)

    def sparsity_at(self, step: int, masks: Masks, sites: Sites) -> float:
        return self.rank.sparsity_at(step, masks, sites)

    def begin(self, parameters: Mapping[str, nn.Parameter], tasks: Iterable[str], max_steps: int) -> None:
        super().begin(parameters, tasks, max_steps)
        self.rank.begin(parameters, tasks, max_steps)

    def _new_gates(self, parameters: Mapping[str, nn.Parameter]) -> Gates:
        """Gates the columns of every `up`; there are none before the matrices are in two factors."""
        ups = {n: p for n, p in parameters.items() if n.endswith(_UP) and n.removesuffix(_UP) + _DOWN in parameters}
        shapes = {n: (len(p), parameters[n.removesuffix(_UP) + _DOWN].shape[1]) for n, p in ups.items()}
        sizes, dense = {n: sum(shape) for n, shape in shapes.items()}, sum(out * ins for out, ins in shapes.values())
        return Gates(self.config, ups, self.last, sizes=sizes, dense=dense, by_column=True)

    def _masks(self, now: Update) -> Masks:
        sites = now.sites["rank"]
        saved, dense = parameters_saved(now.masks, sites)
        if dense - saved <= self.rank.allowed(now.step, now.masks, now.sites):
            return dict(now.masks)
        log_alpha = {name: self.gates.log_alpha[name + _UP] for name in sites}
        return self.rank.decide([("joint", log_alpha)], now)


METHOD = Flop
