"""Training arguments for several tasks, and what they cannot ask for."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from hf_disparse.config import PART_CRITERIA, TaskConfig, UserError, closest, is_number, require
from hf_disparse.distributed.processes import differing_ranks
from hf_disparse.tasks import TaskBatchSampler

_TRUE = ("1", "true", "yes", "on")
LOSS_WEIGHTINGS = ("fixed", "uncertainty", "pcgrad")


@dataclass
class DisparseTrainingArguments(TrainingArguments):
    """TrainingArguments, how the next batch's task is drawn (see `TaskBatchSampler`), and how losses are made and weighed.

    Args:
        task_sampling: `proportional`, `temperature` or `round_robin`.
        sampling_temperature: 1 draws by size, more draws more evenly.
        sampling_cap: with `temperature`, no task counts as larger than this.
        loss_weighting: `fixed` takes each task's `weight`, `uncertainty` divides by a running mean of the task's loss as
            well, `pcgrad` projects conflicting gradients of the tasks that meet in one step, which takes
            `gradient_accumulation_steps` of at least 2.
        distillation: share of the teacher's logits in the loss, in [0, 1]; the labels have the rest.
        distillation_temperature: softens both logits.
        distillation_hidden: weight of the mean squared distance between the teacher's hidden states and ours, added.
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
        TaskBatchSampler({"task": 1}, 1, **self.sampling())  # refuses what it cannot do now rather than at train()
        if self.loss_weighting not in LOSS_WEIGHTINGS:
            known = closest(self.loss_weighting, LOSS_WEIGHTINGS)
            raise UserError(f"loss_weighting: unknown value {self.loss_weighting!r}{known}")
        share, temperature = self.distillation, self.distillation_temperature
        require(is_number(share) and 0 <= share <= 1, "distillation", "a number in [0, 1]", share)
        good = is_number(temperature) and temperature > 0
        require(good, "distillation_temperature", "a number above 0", temperature)
        hidden = self.distillation_hidden
        require(is_number(hidden) and hidden >= 0, "distillation_hidden", "a number of at least 0", hidden)

    def sampling(self) -> dict[str, Any]:
        """The arguments of `TaskBatchSampler` that these are."""
        names = {"sampling": "task_sampling", "temperature": "sampling_temperature", "cap": "sampling_cap"}
        return {argument: getattr(self, name) for argument, name in names.items()}

    @property
    def distils(self) -> bool:
        """Whether there is something to learn from a teacher."""
        return self.distillation > 0 or self.distillation_hidden > 0


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices by instructions for it; without, torch takes ten times as long as float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def refuse_deepspeed(asked: bool) -> None:
    """DeepSpeed's engine steps within the backward pass, out of reach of whatever holds pruned weights at zero."""
    if asked:
        raise UserError(
            "deepspeed: expected no DeepSpeed, whose engine moves pruned weights; start with torchrun or accelerate launch "
            "without it (DDP)"
        )


def check_fsdp(trainer: Trainer) -> None:
    """Refuses of FSDP what is not there, and of pruning what needs whole weights."""
    args, config = trainer.args, trainer.pruning_config
    asked = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in _TRUE
    if asked and not trainer.is_fsdp_enabled:
        raise UserError(
            "fsdp: expected GPUs, got processes on CPUs, where Accelerate leaves FSDP out; start without it (DDP)"
        )
    if not trainer.is_fsdp_enabled:
        return
    version = trainer.accelerator.state.fsdp_plugin.fsdp_version
    require(version == 2, "fsdp", "version 2", version)
    if config is None or not config.sparsity:
        return
    require(
        config.method == "saliency",
        "pruning.method",
        "saliency with FSDP; the others run on DDP (torchrun)",
        config.method,
    )
    require(config.criterion not in PART_CRITERIA, "pruning.criterion", "one of weights with FSDP", config.criterion)
    whole = not {"layer", "channel"} & set(config.granularity)
    require(whole, "pruning.granularity", "weights, patterns, heads or neurons with FSDP", config.granularity)
    for key in ("max_drop", "reconstruct", "reinitialise"):
        value = getattr(config, key)
        require(value is None or value is False, f"pruning.{key}", "nothing with FSDP; use DDP (torchrun)", value)


def check_arguments(trainer: Trainer) -> None:
    """Refuses what would be ignored, or go wrong, without a word."""
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
            "training.loss_weighting: pcgrad expects several tasks in a step, that is, a MultitaskModel with "
            "gradient_accumulation_steps of at least 2, in one process"
        )
    if not trainer.is_multitask:
        return
    if args.train_sampling_strategy not in ("random", "group_by_length"):
        got = args.train_sampling_strategy
        raise UserError(
            f"training.train_sampling_strategy: expected random or group_by_length with several tasks, got {got!r}"
        )
    if args.dataloader_drop_last:  # training gives every batch its size; only evaluation would lose examples
        raise UserError(
            "training.dataloader_drop_last: expected false with several tasks, of which every example is evaluated"
        )
    if args.batch_eval_metrics or not args.eval_do_concat_batches:
        raise UserError(
            "training: metrics of a task are taken over all of its batches; leave batch_eval_metrics and "
            "eval_do_concat_batches as they are"
        )
    other = [t.name for t in trainer.tasks.values() if t.problem_type in ("regression", "multi_label_classification")]
    if args.label_smoothing_factor and other:
        raise UserError(
            f"training.label_smoothing_factor: expected 0 with task '{other[0]}', whose labels are no classes"
        )


def check_datasets(tasks: Mapping[str, TaskConfig], **datasets) -> None:
    """Refuses what is no dict of the model's tasks to rows; each keyword is the name to say it by, None is let pass."""
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


def check_same_rows(datasets: Mapping[str, Any]) -> None:
    """Refuses other tasks or numbers of rows on another process, which would be at another task in the same step."""
    sizes = {task: None if isinstance(rows, IterableDataset) else len(rows) for task, rows in datasets.items()}
    if others := differing_ranks(repr(sizes).encode()):
        raise UserError(
            f"train_dataset: expected the same rows on all processes, which share them out by themselves, but rank "
            f"{', '.join(map(str, others))} has other numbers of them than rank 0"
        )


def is_streamed(datasets: Mapping[str, Any], args: TrainingArguments) -> bool:
    """Whether the tasks' rows are streams; refuses what has to know how many they are."""
    streams = [isinstance(rows, IterableDataset) for rows in datasets.values()]
    if not any(streams):
        return False
    if not all(streams):
        raise UserError(
            "train_dataset: expected streams for all tasks or for none, got both; use to_iterable_dataset()"
        )
    for key, expected, default in (
        ("task_sampling", "round_robin", "round_robin"),
        ("train_sampling_strategy", "random", None),
    ):
        got = getattr(args, key, default)
        require(got == expected, f"training.{key}", f"{expected} with streams, whose rows are not counted", got)
    require(
        args.max_steps > 0, "training.max_steps", "a number of steps with streams, which do not end", args.max_steps
    )
    require(
        args.dataloader_num_workers == 0,
        "training.dataloader_num_workers",
        "0 with streams",
        args.dataloader_num_workers,
    )
    return True


def lengths_by_task(datasets: Mapping[str, Any], args: TrainingArguments) -> dict[str, list[int]] | None:
    """Task -> the number of tokens of each example, if batches are grouped by length."""
    if args.train_sampling_strategy != "group_by_length":
        return None
    try:
        return {task: [len(ids) for ids in rows["input_ids"]] for task, rows in datasets.items()}
    except (KeyError, TypeError) as error:  # rows of the user's own, which need not be a Dataset
        raise UserError(
            "training.train_sampling_strategy: group_by_length expects a Dataset with a column 'input_ids' per task"
        ) from error
