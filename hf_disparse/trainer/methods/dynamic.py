"""Dynamic sparse training: `method: dynamic`, DiSparse's dynamic variant, and RigL with `decision: joint`."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_disparse.config import PruningConfig
from hf_disparse.methods.base import Method, Update
from hf_disparse.methods.dynamic import allocate, count_live, drop_counts, grow, select
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.masks import zero_pruned
from hf_disparse.pruning.schedule import cosine_decay, end_of, update_steps
from hf_disparse.pruning.scores import GRADIENT_CRITERIA


class Dynamic(Method):
    """Prunes to the target at once, then drops and grows as many; the masks in force are all there is to remember.

    Masks that are there before, of a sparse model, are where it starts: they are brought to the budget by the first update.
    """

    @staticmethod
    def scorings(config: PruningConfig, max_steps: int) -> int:
        """For the first mask, and for each exchange once, twice if what is dropped is by gradients, too."""
        steps = update_steps(config, max_steps)
        last = int(bool(steps) and steps[-1] == end_of(config, max_steps))  # nothing is exchanged any more
        each = 1 if config.drop == "magnitude" else 2
        return int(config.criterion in GRADIENT_CRITERIA) + each * max(0, len(steps) - 1 - last)

    def update(self, now: Update) -> Masks | None:
        """None where nothing is dropped any more."""
        config, joint = self.config, self.config.decision == "joint"
        size = sum(mask.numel() for mask in now.masks.values())
        count = size - round(config.sparsity * size)
        budget = allocate(config.allocation, {name: mask.shape for name, mask in now.masks.items()}, count)
        if all(mask.all() for mask in now.masks.values()):
            return select(now.score(config.criterion, joint), now.masks, budget, config.quorum)
        kept = drop_counts(
            now.masks, budget, cosine_decay(now.step, config.start_step, self.last, config.drop_fraction)
        )
        if kept == budget == count_live(now.masks, budget):
            return None
        if config.drop == "magnitude":  # one opinion, which needs no quorum
            live = select(now.score("magnitude", True), now.masks, kept)
        else:
            live = select(now.score(config.criterion, joint), now.masks, kept, config.quorum)
        masks = grow(now.score("gradient", joint), live, budget, config.quorum)
        for name, mask in masks.items():
            forget(now.optimizer, now.parameters[name], mask & ~now.masks[name])
        return masks


def forget(optimizer: Optimizer | None, weight: torch.nn.Parameter, grown: Tensor) -> None:
    """Sets to zero what the optimizer holds for grown weights, number by number; that of others keeps its bits.

    Shapes: grown bool, as the weight. A weight that was dropped and grown again at once was never gone.
    """
    for value in optimizer.state.get(weight, {}).values() if optimizer else ():
        if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
            zero_pruned(value, ~grown)
