"""Settings of the group lasso."""

from dataclasses import dataclass
from typing import Any, ClassVar

from hf_disparse.config.base import UserError, is_number
from hf_disparse.config.pruning import PruningConfig


@dataclass(frozen=True, kw_only=True)
class GroupLassoConfig(PruningConfig):
    """Group sparsity by proximal AdamW: a penalty on the norms of groups drives them to zero while the model trains.

    At `end_step` exactly `round(sparsity * groups)` of each kind, those with the smallest norms, are pruned for good. The norms
    are those of the one model that all tasks train, hence `joint`.

    Args:
        sparsity: fraction of the groups of each kind.
        granularity: the groups: `head`, `neuron` (or both), or `channel`, an input channel: a column of one prunable matrix.
            Pruned channels stay in the matrix as zeros; `compact` cannot remove them.
        penalty: lambda; times the learning rate, it is what a group's root mean square loses per step. The default adapts it
            so that the groups are zero by `end_step`.
        start_step: the first proximal step.
        end_step: the step of the pruning; by default after three quarters of training.
        target_modules, exclude_modules: as in `PruningConfig`, only with channels.
    """

    method: ClassVar[str] = "group_lasso"
    criteria: ClassVar[tuple[str, ...]] = ("magnitude",)
    decisions: ClassVar[tuple[str, ...]] = ("joint",)
    schedules: ClassVar[tuple[str, ...]] = ("linear",)
    granularities: ClassVar[tuple[str, ...]] = ("head", "neuron", "channel")
    end_share: ClassVar[float | None] = 0.75
    unused: ClassVar[tuple[str, ...]] = ("update_every", "score_batches", "seed")
    rows: ClassVar[dict[str, dict[str, Any]]] = {"group_lasso": {}}
    open_criterion: ClassVar[bool] = False

    granularity: str | tuple[str, ...] = ("head", "neuron")
    criterion: str = "magnitude"
    decision: str = "joint"
    schedule: str = "linear"
    penalty: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.penalty is not None and not (is_number(self.penalty) and self.penalty > 0):
            raise UserError(f"penalty: expected a number above 0, or none at all, got {self.penalty!r}")

    def chosen_by(self) -> str:
        return "those of the smallest norms after training with a penalty on them (group lasso)"
