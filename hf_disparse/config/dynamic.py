"""Settings of dynamic sparse training."""

from dataclasses import dataclass
from typing import Any, ClassVar

from hf_disparse.config.base import UserError, is_number, require
from hf_disparse.config.pruning import TASK_CRITERIA, WEIGHT_CRITERIA, PruningConfig


@dataclass(frozen=True, kw_only=True)
class DynamicConfig(PruningConfig):
    """Dynamic sparse training: at the target sparsity from the first step on, weights are dropped and others grow.

    Args:
        sparsity, target_modules, exclude_modules, quorum, seed: as in `PruningConfig`.
        criterion: decides the first mask, and what is dropped if `drop` is `disentangled`.
        decision: `unanimous` (a weight grows if any task wants it most), `quorum`, or `joint`, which is RigL.
        start_step: step of the first mask.
        update_every: steps from one exchange of weights to the next.
        end_step: step of the last exchange; by default after three quarters of training.
        score_batches: batches per task for every scoring; each takes a backward pass.
        allocation: how many weights each matrix has: `erk` (Erdos-Renyi: the larger, the sparser), `uniform`, or `global`,
            where all weights compete. The first mask matters most for a pretrained encoder at 90 %: `snip` with `global` gives
            the vote's own mask, while `magnitude` with `erk`, as RigL starts, leaves little of the encoder.
        drop: `magnitude`, or `disentangled`: what all tasks can spare by the criterion, which then needs gradients.
        drop_fraction: fraction of the live weights in the first exchange; it falls to 0 along a cosine.
    """

    method: ClassVar[str] = "dynamic"
    criteria: ClassVar[tuple[str, ...]] = WEIGHT_CRITERIA
    decisions: ClassVar[tuple[str, ...]] = ("unanimous", "quorum", "joint")
    schedules: ClassVar[tuple[str, ...]] = ("constant",)
    granularities: ClassVar[tuple[str, ...]] = ("weight",)
    end_share: ClassVar[float | None] = 0.75
    rows: ClassVar[dict[str, dict[str, Any]]] = {"dynamic": {}, "rigl": {"decision": "joint"}}
    open_criterion: ClassVar[bool] = False
    row_defaults: ClassVar[tuple[str, ...]] = ("score_batches",)  # it scores at every exchange: fewer batches each time

    criterion: str = "snip"
    schedule: str = "constant"
    update_every: int = 100
    score_batches: int = 4
    allocation: str = "global"
    drop: str = "magnitude"
    drop_fraction: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        for key, known in (("allocation", ("erk", "uniform", "global")), ("drop", ("magnitude", "disentangled"))):
            value = getattr(self, key)
            require(value in known, key, f"one of {', '.join(known)}", value)
        if self.drop != "magnitude" and self.criterion not in TASK_CRITERIA:
            raise UserError(
                f"drop: expected magnitude with criterion {self.criterion}, got {self.drop!r}; or set criterion: disparse"
            )
        good = is_number(self.drop_fraction) and 0 <= self.drop_fraction < 1
        require(good, "drop_fraction", "a number in [0, 1)", self.drop_fraction)

    def chosen_by(self) -> str:
        grown = {"unanimous": "any task wants", "joint": "the summed loss wants"}
        wanted = grown.get(self.decision, f"at least {self.quorum} tasks want")
        dropped = "magnitude" if self.drop == "magnitude" else self._decided_by()
        return f"in dynamic sparse training: dropped by {dropped}, grown where {wanted} it most"
