"""What a pruning method is to the trainer: it decides masks, and may look at every gradient on the way."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hf_disparse.config import PruningConfig
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.rules import Sites, parts_to_prune
from hf_disparse.pruning.schedule import end_of, sparsity_at, update_steps

Stream = Iterator[tuple[str, dict[str, Tensor]]]


@dataclass(frozen=True)
class Update:
    """What a method may ask for when it changes the masks.

    Args:
        step: the optimizer step that is about to begin.
        parameters: the prunable weights by name; they hold +0.0 where they are pruned.
        masks: those in force, by the same names; all True before the first pruning.
        sites: the parts that go as a whole, empty where weights do.
        score: (criterion) -> (task, scores) one task at a time, on batches of its own; (criterion, True) -> one pair
            "joint", of the summed losses. Every call takes backward passes.
        optimizer: None in a loop that hides it.
        gradients: () -> (task, its gradients batch by batch) one task at a time; (True) -> one pair "joint". As `score`.
    """

    step: int
    parameters: Mapping[str, nn.Parameter]
    masks: Masks
    sites: Sites
    score: Callable[..., Stream]
    optimizer: Optimizer | None
    gradients: Callable[..., Iterator[tuple[str, Iterator[dict[str, Tensor]]]]] | None = None


class Method:
    """A pruning method in training. Between steps the weights of the model are the effective ones, pruned ones zero.

    Args:
        config: of the subclass of PruningConfig that names this method.

    Attributes:
        sees_gradients: whether `gradient` is to be called.
        keeps_state: whether a training cannot go on without what `state` returned, until the last update is done.
        max_steps, steps, last: of the training that began, the steps before which `update` is called, and that of the end of the
            schedule.
    """

    sees_gradients = False
    keeps_state = False

    def __init__(self, config: PruningConfig):
        self.config = config
        self.max_steps: int | None = None
        self.steps: Sequence[int] = range(0)

    def prepare(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Before there is an optimizer: the method may put new modules into the model. Called again once there is one."""

    def check(self, parameters: Mapping[str, Tensor], sites: Sites) -> None:
        """Refuses before the first step what `update` could not do."""
        for kind, places in sites.items():
            parts_to_prune(kind, [site.parts for site in places.values()], self.config.sparsity)

    def begin(self, parameters: Mapping[str, nn.Parameter], tasks: Iterable[str], max_steps: int) -> None:
        """Before the first step of a training, also of one that goes on: the state of that comes by `load_state`."""
        self.max_steps, self.last = max_steps, end_of(self.config, max_steps)
        self.steps = update_steps(self.config, max_steps)

    def sparsity_at(self, step: int, masks: Masks, sites: Sites) -> float:
        """How far a model has to be pruned, as `count_pruned_parts` counts it, once `step` has updated its masks."""
        return sparsity_at(self.config, step, self.max_steps)

    @staticmethod
    def scorings(config: PruningConfig, max_steps: int) -> int:
        """How often a training of so many steps scores by gradients, at most: each takes `score_batches` batches per task."""
        return 0

    def update(self, now: Update) -> Masks | None:
        """The masks from this step on, of all prunable weights; None leaves them."""
        raise NotImplementedError

    def gradient(self, name: str, weight: Tensor, gradient: Tensor, task: str) -> Tensor | None:
        """Sees the gradient of one backward pass, before it is added to others; what it returns is put in its place."""

    def before_step(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Before the first forward pass of a step, after `update`."""

    def before_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Once a step's gradients are complete and clipped."""

    def after_optimizer(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> None:
        """Once the optimizer has moved the weights; pruned ones are zeroed afterwards."""

    def end(self) -> None:
        """Once training has ended or died, maybe within a step; may be called again."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold for the next step to have the same bits."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes what `state` returned."""
