"""L0: a hard-concrete gate for every weight, trained beside it under a Lagrangian on the expected sparsity: `method: l0`.

The equations are in `hf_disparse.methods.gates`. Sources: Louizos et al. 2018 (arXiv 1712.01312) for the gates, Wang et al.
2020 (FLOP, arXiv 1910.04732) for the Lagrangian.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_disparse.methods.base import Method, Update
from hf_disparse.methods.gates import Gates
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.masks import count_pruned
from hf_disparse.pruning.rules import decide_by


class L0(Method):
    """Trains a gate for every weight; at the end the gates with the largest log_alpha stay open for good.

    At the end the gate without noise is multiplied into the weight, so that only the pruned weights change the outputs.

    Attributes:
        gates: the gates and the weights that they multiply; None before the first training.
    """

    sees_gradients = True  # in `before_optimizer`; like `gradient`, it cannot use gradients that fp16 has scaled
    keeps_state = True

    def __init__(self, config):
        super().__init__(config)
        self.gates: Gates | None = None

    def begin(self, parameters: Mapping[str, nn.Parameter], tasks: Iterable[str], max_steps: int) -> None:
        super().begin(parameters, tasks, max_steps)
        self.gates = self._new_gates(parameters)

    def _new_gates(self, parameters: Mapping[str, nn.Parameter]) -> Gates:
        return Gates(self.config, parameters, self.last)

    def before_step(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Samples the gates of this step."""
        self.gates.draw(step)

    def before_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Turns gradients of w z into those of w and of the gates; moves the gates and the multipliers."""
        if self.gates.drawn:
            self.gates.backward()
            self.gates.move()

    def after_optimizer(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> None:
        """Takes the new latent weights and leaves the effective ones."""
        self.gates.settle()

    def end(self) -> None:
        """Leaves the effective weights, also where training died within a step."""
        if self.gates:
            self.gates.settle()

    @torch.no_grad()
    def update(self, now: Update) -> Masks:
        """Returns the masks by log_alpha, once and for all; what was pruned before training stays pruned and counts."""
        masks = self._masks(now)
        self.gates.fold()
        return masks

    def _masks(self, now: Update) -> Masks:
        pruned, size = count_pruned(now.masks)
        if pruned >= round(self.config.sparsity * size):
            return dict(now.masks)
        return decide_by(self.config, {"joint": self.gates.log_alpha}, self.config.sparsity, active=now.masks)

    def state(self) -> dict[str, Tensor]:
        return self.gates.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.gates.load_state(state)


METHOD = L0
