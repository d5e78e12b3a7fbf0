"""What a user asks for, as frozen dataclasses that refuse nonsense at birth.

Layer 0: nothing here knows torch or transformers.
"""

from hf_disparse.config.base import Config, UserError, closest, is_count, is_number, one_line, require
from hf_disparse.config.methods import (
    DynamicConfig,
    FlopConfig,
    GroupLassoConfig,
    L0Config,
    MovementConfig,
    PlatonConfig,
    RankConfig,
)
from hf_disparse.config.pruning import (
    CRITERIA,
    DECISIONS,
    FORMAT_VERSION,
    GRANULARITIES,
    PART_CRITERIA,
    PRUNING_CONFIG_NAME,
    SCHEDULES,
    PruningConfig,
)
from hf_disparse.config.tasks import METRICS, DataConfig, TaskConfig

__all__ = [
    "CRITERIA",
    "DECISIONS",
    "FORMAT_VERSION",
    "GRANULARITIES",
    "METRICS",
    "PART_CRITERIA",
    "PRUNING_CONFIG_NAME",
    "SCHEDULES",
    "Config",
    "DataConfig",
    "DynamicConfig",
    "FlopConfig",
    "GroupLassoConfig",
    "L0Config",
    "MovementConfig",
    "PlatonConfig",
    "PruningConfig",
    "RankConfig",
    "TaskConfig",
    "UserError",
    "closest",
    "is_count",
    "is_number",
    "one_line",
    "require",
]
