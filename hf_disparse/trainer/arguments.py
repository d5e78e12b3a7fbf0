"""Training arguments for several tasks, and checks of arguments and data sets."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from hf_disparse.config import PART_CRITERIA, PruningConfig, TaskConfig, UserError, closest, is_number, require
from hf_disparse.distributed.processes import differing_ranks
from hf_disparse.tasks.batches import TaskBatchSampler

_TRUE = ("1", "true", "yes", "on")
LOSS_WEIGHTINGS = ("fixed", "uncertainty", "pcgrad")


@dataclass
class DisparseTrainingArguments(TrainingArguments):
    """TrainingArguments, plus how tasks are sampled (see `TaskBatchSampler`) and how their losses are combined.

    Args:
        task_sampling: `proportional`, `temperature` or `round_robin`.
        sampling_temperature: 1 samples by size, higher values more evenly.
        sampling_cap: with `temperature`, the size above which no task counts as larger.
        loss_weighting: `fixed` uses each task's `weight`; `uncertainty` also divides by a running mean of the task's loss;
            `pcgrad` projects conflicting gradients of the tasks in one step, which needs `gradient_accumulation_steps` of
            at least 2.
        distillation: share of the teacher's logits in the loss, in [0, 1]; the labels have the rest.
        distillation_temperature: softens the logits of both models.
        distillation_hidden: weight of the added mean squared distance between the hidden states of both models.
    """

    task_sampling: str = "proportional"
    sampling_temperature: float = 1.0
    sampling_cap: int | None = None
    loss_weighting: str = "fixed"
    distillation: float = 0.0
    distillation_temperature: float = 2.0
    distillation_hidden: float = 0.0

    def __post_init__(self):
        refuse_deepspeed(bool(self.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in _TRUE)
        super().__post_init__()
        TaskBatchSampler({"task": 1}, 1, **self.sampling())  # refuses invalid values now rather than at train()
        if self.loss_weighting not in LOSS_WEIGHTINGS:
            known = closest(self.loss_weighting, LOSS_WEIGHTINGS)
            raise UserError(f"loss_weighting: unknown value {self.loss_weighting!r}{known}")
        share, temperature, hidden = self.distillation, self.distillation_temperature, self.distillation_hidden
        if not is_number(share) or not 0 <= share <= 1:
            raise UserError(f"distillation: expected a number in [0, 1], got {share!r}")
        if not is_number(temperature) or not temperature > 0:
            raise UserError(f"distillation_temperature: expected a number above 0, got {temperature!r}")
        if not is_number(hidden) or not hidden >= 0:
            raise UserError(f"distillation_hidden: expected a number of at least 0, got {hidden!r}")

    def sampling(self) -> dict[str, Any]:
        """The same settings as arguments of `TaskBatchSampler`."""
        names = {"sampling": "task_sampling", "temperature": "sampling_temperature", "cap": "sampling_cap"}
        return {argument: getattr(self, name) for argument, name in names.items()}

    @property
    def distils(self) -> bool:
        """Whether the loss uses a teacher."""
        return self.distillation > 0 or self.distillation_hidden > 0


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 matrix instructions; without them, bfloat16 takes ten times as long as float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def refuse_deepspeed(asked: bool) -> None:
    """Refuses DeepSpeed, whose optimizer steps where pruned weights cannot be held at zero."""
    if asked:
        raise UserError(
            "deepspeed: not supported, because its optimizer step would update pruned weights; start with torchrun or "
            "accelerate launch without it (DDP)"
        )


def check_fsdp(trainer: Trainer) -> None:
    """Refuses FSDP on CPUs and in version 1, and pruning that FSDP does not support because it needs whole weights."""
    args, config = trainer.args, trainer.pruning_config
    asked = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in _TRUE
    if asked and not trainer.is_fsdp_enabled:
        raise UserError("fsdp: needs GPUs, because Accelerate ignores it on CPUs; start without it (DDP)")
    if not trainer.is_fsdp_enabled:
        return
    version = trainer.accelerator.state.fsdp_plugin.fsdp_version
    require(version == 2, "fsdp", "version 2", version)
    if config is None or not config.sparsity:
        return
    if config.method != PruningConfig.method:
        got = config.method
        raise UserError(f"pruning.method: expected saliency with FSDP; the others run on DDP (torchrun), got {got!r}")
    require(config.criterion not in PART_CRITERIA, "pruning.criterion", "one of weights with FSDP", config.criterion)
    if "layer" in config.granularity:
        got = config.granularity
        raise UserError(f"pruning.granularity: expected weights, patterns, heads or neurons with FSDP, got {got!r}")
    for key in ("max_drop", "reconstruct", "reinitialise"):
        if (value := getattr(config, key)) is not None and value is not False:
            raise UserError(f"pruning.{key}: not supported with FSDP, got {value!r}; use DDP (torchrun)")


def check_arguments(trainer: Trainer) -> None:
    """Refuses arguments that would be silently ignored or silently give wrong results."""
    args = trainer.args
    if args.n_gpu > 1:
        raise UserError(
            f"training: expected one process per GPU, got one process for {args.n_gpu} (nn.DataParallel); "
            "start with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES"
        )
    refuse_deepspeed(trainer.is_deepspeed_enabled)
    check_fsdp(trainer)
    surgery = getattr(args, "loss_weighting", "fixed") == "pcgrad"
    if surgery and (not trainer.is_multitask or args.gradient_accumulation_steps < 2 or args.world_size > 1):
        raise UserError(
            "training.loss_weighting: pcgrad needs several tasks in a step, that is, a MultitaskModel with "
            "gradient_accumulation_steps of at least 2, in one process"
        )
    if not trainer.is_multitask:
        return
    if args.train_sampling_strategy not in ("random", "group_by_length"):
        got = args.train_sampling_strategy
        raise UserError(
            f"training.train_sampling_strategy: expected random or group_by_length with several tasks, got {got!r}"
        )
    if args.dataloader_drop_last:  # training batches are always full; only evaluation would lose examples
        raise UserError(
            "training.dataloader_drop_last: must be false with several tasks, so that every example is evaluated"
        )
    if args.batch_eval_metrics or not args.eval_do_concat_batches:
        raise UserError(
            "training: metrics need all batches of a task at once; leave batch_eval_metrics and eval_do_concat_batches at "
            "their defaults"
        )
    other = [t.name for t in trainer.tasks.values() if t.problem_type in ("regression", "multi_label_classification")]
    if args.label_smoothing_factor and other:
        raise UserError(
            f"training.label_smoothing_factor: must be 0 with task '{other[0]}', whose labels are not classes"
        )


def check_datasets(tasks: Mapping[str, TaskConfig], **datasets) -> None:
    """Checks that each of `datasets` is None or maps tasks of the model to rows; errors name its keyword."""
    for key, value in datasets.items():
        if value is None:
            continue
        if not isinstance(value, Mapping):
            example = next(iter(tasks))
            got = type(value).__name__
            raise UserError(f"{key}: expected a dict of task -> Dataset, got {got}. Did you mean {{'{example}': ...}}?")
        for task in value:
            if task not in tasks:
                raise UserError(f"{key}: the model has no task '{task}'{closest(task, tasks)}")


def rows_to_evaluate(asked, known: Mapping[str, Any] | None):
    """Returns the {task: rows} to evaluate: `asked` itself, the `known` rows of the task that it names, or all if it is None."""
    rows = known if asked is None else asked
    if rows is None or (isinstance(rows, str) and not known):
        raise UserError("eval_dataset: expected a dict of task -> Dataset to evaluate on, got None")
    if isinstance(rows, str):
        if rows not in known:
            raise UserError(f"eval_dataset: there are no rows for a task '{rows}'{closest(rows, known)}")
        rows = {rows: known[rows]}
    return rows


def check_same_rows(datasets: Mapping[str, Any]) -> None:
    """Refuses data sets that differ between processes, which would then train different tasks in the same step."""
    sizes = {task: None if isinstance(rows, IterableDataset) else len(rows) for task, rows in datasets.items()}
    if others := differing_ranks(repr(sizes).encode()):
        raise UserError(
            f"train_dataset: expected the same rows on all processes, which take their shares by themselves, but rank "
            f"{', '.join(map(str, others))} has other tasks or numbers of rows than rank 0"
        )


def is_streamed(datasets: Mapping[str, Any], args: TrainingArguments) -> bool:
    """Returns whether the tasks' rows are streams; refuses arguments that need to know their number."""
    streams = [isinstance(rows, IterableDataset) for rows in datasets.values()]
    if not any(streams):
        return False
    if not all(streams):
        raise UserError(
            "train_dataset: expected streams for all tasks or for none, got a mixture; use to_iterable_dataset()"
        )
    for key, expected, default in (
        ("task_sampling", "round_robin", "round_robin"),
        ("train_sampling_strategy", "random", None),
    ):
        got = getattr(args, key, default)
        require(got == expected, f"training.{key}", f"{expected} with streams, whose rows are not counted", got)
    if args.max_steps <= 0:
        raise UserError(f"training.max_steps: must be set with streams, which do not end, got {args.max_steps}")
    if args.dataloader_num_workers:
        raise UserError(f"training.dataloader_num_workers: must be 0 with streams, got {args.dataloader_num_workers}")
    return True


def lengths_by_task(datasets: Mapping[str, Any], args: TrainingArguments) -> dict[str, list[int]] | None:
    """Returns task -> the number of tokens of each example, or None if batches are not grouped by length."""
    if args.train_sampling_strategy != "group_by_length":
        return None
    try:
        return {task: [len(ids) for ids in rows["input_ids"]] for task, rows in datasets.items()}
    except (KeyError, TypeError) as error:  # the user's rows need not be a Dataset
        raise UserError(
            "training.train_sampling_strategy: group_by_length needs a Dataset with a column 'input_ids' per task"
        ) from error
