"""Settings of PLATON."""

from dataclasses import dataclass
from typing import Any, ClassVar

from hf_disparse.config.base import is_number, require
from hf_disparse.config.pruning import PruningConfig


@dataclass(frozen=True, kw_only=True)
class PlatonConfig(PruningConfig):
    """PLATON: every task smooths |w g| and its uncertainty over its own training batches; their product is the score.

    It takes no backward passes of its own, and memory for 2 T float32 numbers per prunable weight until the last update, T
    being the number of tasks (1 if joint).

    Args:
        decision: as in `PruningConfig`; `joint` smooths over the batches of all tasks, one after the other.
        start_step, end_step, update_every: the cubic schedule; by default it ends after 60 % of training.
        beta1, beta2: decay of the moving averages of the importance and of its uncertainty, per batch of the task.
        sparsity, quorum, target_modules, exclude_modules, max_drop: as in `PruningConfig`.

    Source: Zhang et al. 2022 (arXiv 2206.12562).
    """

    method: ClassVar[str] = "platon"
    criteria: ClassVar[tuple[str, ...]] = ("platon",)
    schedules: ClassVar[tuple[str, ...]] = ("cubic",)
    granularities: ClassVar[tuple[str, ...]] = ("weight",)
    end_share: ClassVar[float | None] = 0.6
    unused: ClassVar[tuple[str, ...]] = ("score_batches", "seed")
    rows: ClassVar[dict[str, dict[str, Any]]] = {"platon": {}, "platon_joint": {"decision": "joint"}}
    open_criterion: ClassVar[bool] = False

    criterion: str = "platon"
    schedule: str = "cubic"
    beta1: float = 0.85
    beta2: float = 0.95

    def __post_init__(self):
        super().__post_init__()
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            require(is_number(value) and 0 <= value < 1, key, "a number in [0, 1)", value)

    def chosen_by(self) -> str:
        return f"by PLATON's sensitivity: {self._decided_by()}"
