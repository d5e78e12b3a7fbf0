"""What a user asks for: frozen dataclasses that validate themselves when created, without torch or transformers."""

from hf_disparse.config.base import Config, UserError, closest, is_count, is_number, one_line, require
from hf_disparse.config.dynamic import DynamicConfig
from hf_disparse.config.flop import FlopConfig
from hf_disparse.config.group_lasso import GroupLassoConfig
from hf_disparse.config.l0 import L0Config
from hf_disparse.config.movement import MovementConfig
from hf_disparse.config.platon import PlatonConfig
from hf_disparse.config.pruning import (
    CRITERIA,
    FORMAT_VERSION,
    PART_CRITERIA,
    PRUNING_CONFIG_NAME,
    TASK_CRITERIA,
    PruningConfig,
    ignored_settings,
    without_ignored,
)
from hf_disparse.config.rank import RankConfig
from hf_disparse.config.speed import SpeedConfig
from hf_disparse.config.tasks import METRICS, DataConfig, TaskConfig

# Every pruning method, in the order of help and tables.
METHOD_CONFIGS: tuple[type[PruningConfig], ...] = (
    PruningConfig,
    DynamicConfig,
    MovementConfig,
    PlatonConfig,
    L0Config,
    RankConfig,
    FlopConfig,
    GroupLassoConfig,
)

__all__ = [
    "CRITERIA",
    "FORMAT_VERSION",
    "METHOD_CONFIGS",
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
    "SpeedConfig",
    "TaskConfig",
    "UserError",
    "closest",
    "ignored_settings",
    "is_count",
    "is_number",
    "one_line",
    "require",
    "without_ignored",
]
