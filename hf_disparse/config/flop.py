"""Settings of FLOP."""

from dataclasses import dataclass
from typing import Any, ClassVar

from hf_disparse.config.l0 import L0Config


@dataclass(frozen=True, kw_only=True)
class FlopConfig(L0Config):
    """FLOP: a hard-concrete gate for every component of a matrix in two factors, W = up diag(z) down.

    Args:
        sparsity: as in `RankConfig`. The rising target is the fraction of the dense matrices' parameters that is saved. It
            starts below 0, because two factors at full rank have more parameters than the matrix.

    All other settings are as in `L0Config`. The memory is that of one factor of each matrix.

    Source: Wang et al. 2020 (arXiv 1910.04732), sections 3.1 and 3.2.
    """

    method: ClassVar[str] = "flop"
    granularities: ClassVar[tuple[str, ...]] = ("rank",)
    rows: ClassVar[dict[str, dict[str, Any]]] = {"flop": {}}

    granularity: str | tuple[str, ...] = "rank"
