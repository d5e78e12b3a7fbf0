"""Settings of L0 with hard-concrete gates."""

from dataclasses import dataclass
from typing import Any, ClassVar

from hf_disparse.config.base import above_zero, is_number, require
from hf_disparse.config.pruning import PruningConfig


@dataclass(frozen=True, kw_only=True)
class L0Config(PruningConfig):
    """L0: a hard-concrete gate for every weight, and a Lagrangian that pulls the expected sparsity to a rising target.

    The gates belong to the one model that all tasks train, hence `joint`. It takes no backward passes of its own, and memory
    for 6 float32 numbers per prunable weight until the last update. Gradient clipping sees the gradients of the gated weights.

    Args:
        start_step, end_step: the target rises linearly over the first 80 % of the steps between them. At the end the weights
            with the largest log_alpha stay, an exact count, and their gates are multiplied into them. The default end is after
            60 % of training. It takes hundreds of steps: a gate moves by at most its learning rate per step.
        drop_rate: about the probability that a gate is closed at first; 0.05 leaves every gate without noise at 1.
        gate_learning_rate: learning rate of Adam on log_alpha.
        multiplier_learning_rate: learning rate of the gradient ascent on the two multipliers, which are in units of the root
            mean square of the gates' gradients, so neither the scale of the loss nor the size of the model matters.
        seed: seed of the gates' noise, together with the step.
        sparsity, target_modules, exclude_modules: as in `PruningConfig`.

    Sources: Louizos et al. 2018 (arXiv 1712.01312); the Lagrangian is from Wang et al. 2020 (arXiv 1910.04732).
    """

    method: ClassVar[str] = "l0"
    criteria: ClassVar[tuple[str, ...]] = ("l0",)
    decisions: ClassVar[tuple[str, ...]] = ("joint",)
    schedules: ClassVar[tuple[str, ...]] = ("linear",)
    granularities: ClassVar[tuple[str, ...]] = ("weight",)
    end_share: ClassVar[float | None] = 0.6
    unused: ClassVar[tuple[str, ...]] = ("update_every", "score_batches")
    rows: ClassVar[dict[str, dict[str, Any]]] = {"l0": {}}
    open_criterion: ClassVar[bool] = False

    criterion: str = "l0"
    decision: str = "joint"
    schedule: str = "linear"
    drop_rate: float = 0.05
    gate_learning_rate: float = 0.1
    multiplier_learning_rate: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        good = is_number(self.drop_rate) and 0 < self.drop_rate < 1
        require(good, "drop_rate", "a number in (0, 1)", self.drop_rate)
        above_zero(self, "gate_learning_rate", "multiplier_learning_rate")

    def chosen_by(self) -> str:
        return f"by the hard-concrete gates that all tasks trained together ({self.method.upper()})"
