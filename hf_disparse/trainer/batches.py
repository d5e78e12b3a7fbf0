"""What `DisparseTrainer` gives to samplers and to scoring."""

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from hf_disparse.config import UserError
from hf_disparse.tasks import TaskBatchSampler, TaskDataset
from hf_disparse.trainer.arguments import lengths_by_task


class Resuming(TrainerCallback):
    """Mends what transformers' Trainer does on a resume.

    It tells a sampler its epoch, but not through what Accelerate wraps around it; and it takes a step, which
    `training_step` leaves without a gradient, where no step is left.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.is_multitask:
            self.trainer.task_sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **kwargs):
        state.global_step = min(state.global_step, state.max_steps)


class ScoringBatches:
    """The batches that one task is scored on: seeded by the config and the step, without touching the global generators.

    Of several processes each takes its part of a batch, which is as many times as large.
    """

    def __init__(self, trainer: Trainer, task: str):
        self.trainer, self.task = trainer, task

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trainer = self.trainer
        rows, lengths = trainer.train_dataset, None
        if trainer.is_multitask:
            mine = {self.task: rows[self.task]}
            rows, lengths = TaskDataset(mine), lengths_by_task(mine, trainer.args)
        elif isinstance(rows, IterableDataset):
            raise UserError("train_dataset: scoring draws examples at random, got a stream; load it as a Dataset")
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="scoring")
        seed = trainer.pruning_config.seed + trainer.state.global_step
        rank, world_size = trainer.args.process_index, trainer.args.world_size
        size = trainer._train_batch_size * world_size
        sampler = TaskBatchSampler({self.task: len(rows)}, size, lengths=lengths, seed=seed)
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            for indices in sampler:
                yield trainer._prepare_inputs(collate([rows[i] for i in indices[rank::world_size]]))
