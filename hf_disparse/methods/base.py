"""The interface between a pruning method and training: it decides masks, and may look at every gradient on the way."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hf_disparse.config import PruningConfig
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.parts import Sites
from hf_disparse.pruning.rules import parts_to_prune
from hf_disparse.pruning.schedule import end_of, sparsity_at, update_steps
from hf_disparse.pruning.scores import Stream


@dataclass(frozen=True)
class Update:
    """What a method is given to change the masks.

    Args:
        step: the optimizer step that is about to begin.
        parameters: the prunable weights by name; they hold +0.0 where they are pruned.
        masks: the masks in force, by the same names; all True before the first pruning.
        sites: the parts that are pruned as a whole; empty where single weights are.
        score: (criterion) -> (task, scores) one task at a time, on batches of its own; (criterion, True) -> one pair
            "joint", by the summed losses. Every call takes backward passes.
        optimizer: None if the training loop hides it.
        gradients: () -> (task, its gradients batch by batch) one task at a time; (True) -> one pair "joint", as `score`.
    """

    step: int
    parameters: Mapping[str, nn.Parameter]
    masks: Masks
    sites: Sites
    score: Callable[..., Stream]
    optimizer: Optimizer | None
    gradients: Callable[..., Iterator[tuple[str, Iterator[dict[str, Tensor]]]]] | None = None


class Method:
    """A pruning method in training. Between steps the model holds the effective weights, with pruned ones at zero.

    Args:
        config: an instance of the subclass of PruningConfig that names this method.

    Attributes:
        sees_gradients: whether `gradient` has to be called.
        keeps_state: whether training can only resume with what `state` returned, until the last update is done.
        max_steps: length of the current training.
        steps: the steps before which `update` is called.
        last: the step at which the schedule ends.
    """

    sees_gradients = False
    keeps_state = False

    def __init__(self, config: PruningConfig):
        self.config = config
        self.max_steps: int | None = None
        self.steps: Sequence[int] = range(0)

    def prepare(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Called before there is an optimizer, when the method may put new modules into the model, and again once there is."""

    def check(self, parameters: Mapping[str, Tensor], sites: Sites) -> None:
        """Raises UserError before the first step if `update` would fail."""
        for kind, places in sites.items():
            parts_to_prune(kind, [site.parts for site in places.values()], self.config.sparsity)

    def begin(self, parameters: Mapping[str, nn.Parameter], tasks: Iterable[str], max_steps: int) -> None:
        """Called before the first step of a training; one that resumes then gets its state by `load_state`."""
        self.max_steps, self.last = max_steps, end_of(self.config, max_steps)
        self.steps = update_steps(self.config, max_steps)

    def sparsity_at(self, step: int, masks: Masks, sites: Sites) -> float:
        """Returns the sparsity of a model, as its granularity counts it, after the update at `step`."""
        return sparsity_at(self.config, step, self.max_steps)

    @staticmethod
    def scorings(config: PruningConfig, max_steps: int) -> int:
        """Returns how often a training of `max_steps` scores by gradients, at most; each time takes `score_batches` per task."""
        return 0

    def update(self, now: Update) -> Masks | None:
        """Returns the masks of all prunable weights from this step on; None leaves them as they are."""
        raise NotImplementedError

    def gradient(self, name: str, weight: Tensor, gradient: Tensor, task: str) -> Tensor | None:
        """Sees the gradient of one backward pass before it is added to others; a returned tensor replaces it."""

    def before_step(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Called before the first forward pass of a step, after `update`."""

    def before_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Called once a step's gradients are complete and clipped."""

    def after_optimizer(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> None:
        """Called once the optimizer has moved the weights; pruned ones are zeroed afterwards."""

    def end(self) -> None:
        """Called once training has ended or failed, possibly within a step; may be called again."""

    def state(self) -> dict[str, Tensor]:
        """Returns what a checkpoint has to hold so that the next step has the same bits."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes what `state` returned."""
