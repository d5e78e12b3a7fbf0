from .config import (
    DataConfig as DataConfig,
)
from .config import (
    DynamicConfig as DynamicConfig,
)
from .config import (
    FlopConfig as FlopConfig,
)
from .config import (
    GroupLassoConfig as GroupLassoConfig,
)
from .config import (
    L0Config as L0Config,
)
from .config import (
    MovementConfig as MovementConfig,
)
from .config import (
    PlatonConfig as PlatonConfig,
)
from .config import (
    PruningConfig as PruningConfig,
)
from .config import (
    RankConfig as RankConfig,
)
from .config import (
    SpeedConfig as SpeedConfig,
)
from .config import (
    TaskConfig as TaskConfig,
)
from .config import (
    UserError as UserError,
)
from .export.compact import compact as compact
from .export.compact import save_compact as save_compact
from .export.packed import save_packed as save_packed
from .export.task import save_tasks as save_tasks
from .export.task import task_model as task_model
from .export.to_onnx import save_onnx as save_onnx
from .fast.speed_up import load_fast as load_fast
from .fast.speed_up import speed_up as speed_up
from .fast.speed_up import undo_speed_up as undo_speed_up
from .files import resolve as resolve
from .methods.again import decide_again as decide_again
from .methods.again import prune_again as prune_again
from .methods.again import vote_masks as vote_masks
from .model.factorise import factorise as factorise
from .model.multitask import MultitaskConfig as MultitaskConfig
from .model.multitask import MultitaskModel as MultitaskModel
from .model.pipeline import MultitaskPipeline as MultitaskPipeline
from .model.prunable import prunable_parameters as prunable_parameters
from .model.sparsity import sparsity_report as sparsity_report
from .model.unshared import unshare as unshare
from .pruning.decision import (
    decide as decide,
)
from .pruning.decision import (
    decide_max as decide_max,
)
from .pruning.decision import (
    decide_mean_rank as decide_mean_rank,
)
from .pruning.decision import (
    decide_sum as decide_sum,
)
from .pruning.masks import (
    MaskHooks as MaskHooks,
)
from .pruning.masks import (
    apply_masks as apply_masks,
)
from .pruning.masks import (
    find_masks as find_masks,
)
from .pruning.masks import (
    load_masks as load_masks,
)
from .pruning.masks import (
    save_masks as save_masks,
)
from .pruning.scores import score as score
from .speed.shrink import Shrunk as Shrunk
from .speed.shrink import shrink as shrink
from .tasks.data import load_task as load_task
from .tasks.data import tokenize as tokenize
from .tasks.task_metric import TaskMetric as TaskMetric
from .trainer import (
    DisparseTrainer as DisparseTrainer,
)
from .trainer import (
    DisparseTrainingArguments as DisparseTrainingArguments,
)
from .trainer import (
    PruningCallback as PruningCallback,
)
from .trainer import (
    last_whole_checkpoint as last_whole_checkpoint,
)
