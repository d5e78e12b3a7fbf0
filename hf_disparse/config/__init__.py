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
    FORMAT_VERSION,
    PART_CRITERIA,
    PRUNING_CONFIG_NAME,
    TASK_CRITERIA,
    PruningConfig,
)
from hf_disparse.config.tasks import METRICS, DataConfig, TaskConfig

__all__ = [
    "CRITERIA",
    "FORMAT_VERSION",
    "METRICS",
    "PART_CRITERIA",
    "PRUNING_CONFIG_NAME",
    "TASK_CRITERIA",
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
