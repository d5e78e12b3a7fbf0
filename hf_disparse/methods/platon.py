"""PLATON: importance times its uncertainty, both smoothed over batches: `method: platon`.

w is a weight, g the gradient of one task's loss on one batch. Source: Zhang et al. 2022 (arXiv 2206.12562).
"""

import torch
from torch import Tensor

from hf_disparse.methods.base import Update
from hf_disparse.methods.by_task import ByTask
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.schedule import sparsity_at


def smooth(
    importance: Tensor, uncertainty: Tensor, weight: Tensor, gradient: Tensor, beta1: float, beta2: float
) -> None:
    """I = |w g|, Ibar <- b1 Ibar + (1 - b1) I, U = |I - Ibar|, Ubar <- b2 Ubar + (1 - b2) U, in place. Section 3.

    Shapes: all alike; `importance` is Ibar, `uncertainty` Ubar, both 0 before the first batch.
    """
    now = torch.mul(weight, gradient).abs_()
    importance.lerp_(now.to(importance.dtype), 1 - beta1)
    uncertainty.lerp_(now.sub(importance).abs_(), 1 - beta2)


def upper_confidence(importance: Tensor, uncertainty: Tensor) -> Tensor:
    """Ibar * Ubar: high for what matters and for what may matter, an upper confidence bound. Shapes alike -> the same."""
    return importance * uncertainty


class Platon(ByTask):
    """Prunes by importance times uncertainty, smoothed over every task's own batches; what is pruned stays pruned."""

    kinds = ("importance", "uncertainty")

    def see(self, task: str, name: str, weight: Tensor, gradient: Tensor, *buffers: Tensor) -> None:
        smooth(*buffers, weight, gradient, self.config.beta1, self.config.beta2)

    def update(self, now: Update) -> Masks:
        scores = {
            task: {
                name: upper_confidence(kinds["importance"][name], kinds["uncertainty"][name]) for name in now.parameters
            }
            for task, kinds in self.ordered_buffers().items()
        }
        return self.decide(scores, sparsity_at(self.config, now.step, self.max_steps), now.masks)


METHOD = Platon
