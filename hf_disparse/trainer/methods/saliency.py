"""Pruning by scores, in one shot or step by step: `method: saliency`."""

from hf_disparse.decision import Masks
from hf_disparse.schedule import sparsity_at
from hf_disparse.trainer.methods.base import Method, Update
from hf_disparse.trainer.rules import decide_by, decide_parts, pruned_fractions


class Saliency(Method):
    """Scores every task on the weights as they are and decides; what is pruned stays pruned."""

    def update(self, now: Update) -> Masks | None:
        """None for a model that is as sparse already."""
        config, sparsity = self.config, sparsity_at(self.config, now.step)
        done = pruned_fractions(now.masks, now.sites).values()
        if all(pruned >= round(sparsity * size) for pruned, size in done):
            return None
        stream = now.score(config.criterion, config.decision == "joint")
        if now.sites:
            return decide_parts(config, stream, sparsity, now.masks, now.sites)
        return decide_by(config, stream, sparsity, now.masks)
