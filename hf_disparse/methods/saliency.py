"""Pruning by scores, in one shot or step by step: `method: saliency`."""

from hf_disparse.config import PART_CRITERIA, PruningConfig
from hf_disparse.methods.base import Method, Update
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.granularity import granularity_of
from hf_disparse.pruning.part_criteria import PartScores, agreement_and_need, agreement_score, taylor
from hf_disparse.pruning.rules import decide_scored_parts
from hf_disparse.pruning.schedule import sparsity_at, update_steps
from hf_disparse.pruning.scores import GRADIENT_CRITERIA


class Saliency(Method):
    """Scores every task on the weights as they are and decides; what is pruned stays pruned."""

    @staticmethod
    def scorings(config: PruningConfig, max_steps: int) -> int:
        """Once for each change of the masks."""
        by_gradients = config.criterion in (*GRADIENT_CRITERIA, *PART_CRITERIA)
        return len(update_steps(config, max_steps)) if by_gradients else 0

    def update(self, now: Update) -> Masks | None:
        """Returns the new masks, or None if the model is as sparse already."""
        config, sparsity = self.config, sparsity_at(self.config, now.step)
        granularity = granularity_of(config)
        done = granularity.count(now.masks, now.sites).values()
        if all(pruned >= round(sparsity * size) for pruned, size in done):
            return None
        if config.criterion in PART_CRITERIA:
            return decide_scored_parts(config, self._of_parts(now), sparsity, now.masks, now.sites)
        stream = now.score(config.criterion, config.decision == "joint")
        return granularity.decide(config, stream, sparsity, now.masks, now.sites)

    def _of_parts(self, now: Update) -> list[tuple[str, PartScores]]:
        """(task, its scores of the parts), or one pair of all tasks."""
        if self.config.criterion == "agreement":
            return [("joint", agreement_score(*agreement_and_need(now.parameters, now.gradients(), now.sites)))]
        stream = now.gradients(self.config.decision == "joint")
        return [(task, taylor(now.parameters, gradients, now.sites)) for task, gradients in stream]


METHOD = Saliency
