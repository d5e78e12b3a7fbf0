"""Settings of movement pruning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_disparse.config.base import UserError, above_zero, is_number, require
from hf_disparse.config.pruning import PruningConfig


@dataclass(frozen=True, kw_only=True)
class MovementConfig(PruningConfig):
    """Movement pruning: every task sums -w g over its own training batches, and what it moves towards zero is pruned.

    Scores of pruned weights go on, and such weights may come back with the value they had. It takes no backward passes of
    its own, and memory for T + 1 float32 numbers per prunable weight until the last update, T being the number of tasks (1 if
    joint).

    Args:
        decision: `unanimous`, `quorum`, `mean_rank` or `joint`, which has one sum over all tasks. Scores have signs, so there
            is no `sum` or `max`.
        start_step, end_step, update_every: the cubic schedule; by default it ends after 60 % of training.
        mode: `hard` keeps the exact count of the schedule at every update. `soft` keeps the weights whose sigmoid of the score
            is above `threshold` for one task (with a quorum, for that many), but never fewer than the final sparsity leaves,
            and ends in the exact count by `decision`.
        threshold: below 0.73, where the scores start; soft mode only.
        penalty: how strongly the sum of the sigmoids of the scores is pulled down; soft mode only.
        score_learning_rate: learning rate of the scores; soft mode only. It and `penalty` are in units of the root mean square
            of w g, so the scale of the loss does not matter.
        sparsity, quorum, target_modules, exclude_modules, max_drop: as in `PruningConfig`.

    Source: Sanh et al. 2020 (arXiv 2005.07683).
    """

    method: ClassVar[str] = "movement"
    criteria: ClassVar[tuple[str, ...]] = ("movement",)
    decisions: ClassVar[tuple[str, ...]] = ("unanimous", "quorum", "joint", "mean_rank")
    schedules: ClassVar[tuple[str, ...]] = ("cubic",)
    granularities: ClassVar[tuple[str, ...]] = ("weight",)
    end_share: ClassVar[float | None] = 0.6
    unused: ClassVar[tuple[str, ...]] = ("score_batches", "seed")
    rows: ClassVar[dict[str, dict[str, Any]]] = {
        "movement": {"mode": "hard"},
        "movement_joint": {"mode": "hard", "decision": "joint"},
        "movement_soft": {"mode": "soft"},
    }
    open_criterion: ClassVar[bool] = False

    criterion: str = "movement"
    schedule: str = "cubic"
    mode: str = "hard"
    threshold: float = 0.1
    penalty: float = 1.0
    score_learning_rate: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        require(self.mode in ("hard", "soft"), "mode", "one of hard, soft", self.mode)
        if self.mode == "soft" and self.decision == "mean_rank":
            raise UserError("decision: expected one of unanimous, quorum, joint with mode soft, got 'mean_rank'")
        if not (is_number(self.threshold) and 0 < self.threshold < 0.73):
            raise UserError(
                f"threshold: expected a number in (0, 0.73), because scores start at sigmoid(1), got {self.threshold!r}"
            )
        above_zero(self, "penalty", "score_learning_rate")

    @classmethod
    def ignored(cls, settings: Mapping[str, Any]) -> dict[str, str]:
        soft_only = ("threshold", "penalty", "score_learning_rate") if settings["mode"] == "hard" else ()
        return super().ignored(settings) | dict.fromkeys(soft_only, "with mode hard")

    def chosen_by(self) -> str:
        return f"by movement pruning: {self._decided_by()}"
