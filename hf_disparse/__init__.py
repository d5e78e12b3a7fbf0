"""Prune one shared Transformer encoder with several task heads: every task judges, and what all can spare goes.

Importing this registers `MultitaskModel` with transformers' Auto classes, and the form of packed checkpoints.
"""

from hf_disparse.config import (
    DataConfig,
    DynamicConfig,
    FlopConfig,
    GroupLassoConfig,
    L0Config,
    MovementConfig,
    PlatonConfig,
    PruningConfig,
    RankConfig,
    TaskConfig,
    UserError,
)
from hf_disparse.config.version import __version__ as __version__
from hf_disparse.export import compact, save_compact, save_onnx, save_packed, save_tasks, task_model
from hf_disparse.methods.again import decide_again, prune_again, vote_masks
from hf_disparse.model.factorise import factorise
from hf_disparse.model.multitask import MultitaskConfig, MultitaskModel
from hf_disparse.model.pipeline import MultitaskPipeline
from hf_disparse.model.prunable import prunable_parameters
from hf_disparse.model.sparsity import sparsity_report
from hf_disparse.model.unshared import unshare
from hf_disparse.pruning.decision import decide, decide_max, decide_mean_rank, decide_sum
from hf_disparse.pruning.masks import MaskHooks, apply_masks, find_masks, load_masks, save_masks
from hf_disparse.pruning.scores import score
from hf_disparse.tasks import TaskMetric, load_task, resolve, tokenize
from hf_disparse.trainer import DisparseTrainer, DisparseTrainingArguments, PruningCallback, last_whole_checkpoint

__all__ = [
    "DataConfig",
    "DisparseTrainer",
    "DisparseTrainingArguments",
    "DynamicConfig",
    "FlopConfig",
    "GroupLassoConfig",
    "L0Config",
    "MaskHooks",
    "MovementConfig",
    "MultitaskConfig",
    "MultitaskModel",
    "MultitaskPipeline",
    "PlatonConfig",
    "PruningCallback",
    "PruningConfig",
    "RankConfig",
    "TaskConfig",
    "TaskMetric",
    "UserError",
    "apply_masks",
    "compact",
    "decide",
    "decide_again",
    "decide_max",
    "decide_mean_rank",
    "decide_sum",
    "factorise",
    "find_masks",
    "last_whole_checkpoint",
    "load_masks",
    "load_task",
    "prunable_parameters",
    "prune_again",
    "resolve",
    "save_compact",
    "save_masks",
    "save_onnx",
    "save_packed",
    "save_tasks",
    "score",
    "sparsity_report",
    "task_model",
    "tokenize",
    "unshare",
    "vote_masks",
]
