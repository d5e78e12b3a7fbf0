"""PLATON: `method: platon`."""

from torch import Tensor

from hf_disparse.methods.base import Update
from hf_disparse.methods.by_task import ByTask
from hf_disparse.methods.platon import score, smooth
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.schedule import sparsity_at


class Platon(ByTask):
    """Prunes by importance times uncertainty, smoothed over every task's own batches; what is pruned stays pruned."""

    kinds = ("importance", "uncertainty")

    def see(self, task: str, name: str, weight: Tensor, gradient: Tensor, *buffers: Tensor) -> None:
        smooth(*buffers, weight, gradient, self.config.beta1, self.config.beta2)

    def update(self, now: Update) -> Masks:
        scores = {
            task: {name: score(kinds["importance"][name], kinds["uncertainty"][name]) for name in now.parameters}
            for task, kinds in self.ordered_buffers().items()
        }
        return self.decide(scores, sparsity_at(self.config, now.step, self.max_steps), now.masks)
