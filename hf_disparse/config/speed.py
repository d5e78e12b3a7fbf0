"""Settings of pruning to a speed."""

from dataclasses import dataclass
from typing import Any, ClassVar

from hf_disparse.config.base import UserError, above_zero, closest, is_count, require
from hf_disparse.config.pruning import PruningConfig

RUNTIMES = ("fast", "torch")


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(PruningConfig):
    """Pruning to a speed: as many heads, neurons and, where the runtime gains by it, weights as a budget of time asks for.

    What goes is what costs the tasks least for the time it saves on this machine, where it is measured. It happens once, between
    dense training and recovery; the result is compact. Give `speedup` or `latency_ms`.

    Args:
        speedup: how many times as fast as the model before, in the same runtime.
        latency_ms: milliseconds of one pass of the encoder.
        runtime: `fast`, where `speed_up` runs the model, or `torch`.
        batch, length: texts in a pass, and tokens of each. Default length: the recipe's.
        threads: cores that a pass takes.
        decision: `unanimous` (the worst-off task loses least), `sum` (the mean over tasks of their losses, in each task's own
            unit) or `joint` (one curvature of the summed losses: the control without disentangling).
        criterion: `curvature`, the rise of each task's loss once the rest is refitted; or `magnitude` or `random`, the controls.
        score_batches: batches per task for the curvature and for the refit.
        seed: as in `PruningConfig`.
    """

    method: ClassVar[str] = "speed"
    criteria: ClassVar[tuple[str, ...]] = ("curvature", "magnitude", "random")
    decisions: ClassVar[tuple[str, ...]] = ("unanimous", "sum", "joint")
    schedules: ClassVar[tuple[str, ...]] = ("one_shot",)
    granularities: ClassVar[tuple[str, ...]] = ("head", "neuron")
    unused: ClassVar[tuple[str, ...]] = (
        "sparsity",
        "granularity",
        "start_step",
        "target_modules",
        "exclude_modules",
        "max_drop",
        "reconstruct",
        "reinitialise",
        "keep_scores",
    )
    in_training: ClassVar[bool] = False
    rows: ClassVar[dict[str, dict[str, Any]]] = {}

    sparsity: float = 0.0
    granularity: str | tuple[str, ...] = ("head", "neuron")
    criterion: str = "curvature"
    score_batches: int = 16
    speedup: float | None = None
    latency_ms: float | None = None
    runtime: str = "fast"
    batch: int = 32
    length: int | None = None
    threads: int = 1

    def __post_init__(self):
        super().__post_init__()
        given = [key for key in ("speedup", "latency_ms") if getattr(self, key) is not None]
        if len(given) != 1:
            raise UserError(f"speedup: expected either speedup or latency_ms, got {' and '.join(given) or 'neither'}")
        above_zero(self, *given)
        if self.speedup is not None and self.speedup <= 1:
            raise UserError(f"speedup: expected a number above 1, got {self.speedup}")
        if self.runtime not in RUNTIMES:
            raise UserError(f"runtime: unknown value {self.runtime!r}{closest(self.runtime, RUNTIMES)}")
        for key in ("batch", "threads", *(("length",) if self.length is not None else ())):
            require(is_count(getattr(self, key), 1), key, "a whole number of at least 1", getattr(self, key))
        if self.criterion != "curvature" and self.decision != "unanimous":
            raise UserError(
                f"decision: must be unanimous with criterion {self.criterion}, which is the same for all tasks, got "
                f"'{self.decision}'"
            )

    def aim(self) -> str:
        """Returns how fast the model is to become, in words."""
        return f"{self.speedup:g} times as fast" if self.speedup else f"to {self.latency_ms:g} ms"

    def chosen_by(self) -> str:
        if self.criterion != "curvature":
            return super().chosen_by()
        return (
            "by "
            + {
                "unanimous": "what costs the worst-off task least for the time that it saves",
                "sum": "what costs the tasks least on average for the time that it saves",
                "joint": "what costs the summed loss of all tasks least for the time that it saves",
            }[self.decision]
        )
