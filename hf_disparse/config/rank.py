"""Settings of pruning the rank of matrices."""

from dataclasses import dataclass
from typing import Any, ClassVar

from hf_disparse.config.pruning import WEIGHT_CRITERIA, PruningConfig


@dataclass(frozen=True, kw_only=True)
class RankConfig(PruningConfig):
    """Pruning of the rank: every prunable matrix becomes a product of two, and components of that product are pruned.

    Args:
        sparsity: fraction of the parameters of the prunable matrices, in their dense form, that is saved. There is one budget
            for all matrices, and one component of each stays.
        criterion, decision, quorum, schedule, start_step, end_step, update_every, score_batches, target_modules,
            exclude_modules, seed, max_drop: as in `PruningConfig`; a component's score is the sum of its weights' scores,
            per weight.
    """

    method: ClassVar[str] = "rank"
    criteria: ClassVar[tuple[str, ...]] = WEIGHT_CRITERIA
    granularities: ClassVar[tuple[str, ...]] = ("rank",)
    rows: ClassVar[dict[str, dict[str, Any]]] = {"rank": {"decision": "unanimous"}}

    granularity: str | tuple[str, ...] = "rank"
