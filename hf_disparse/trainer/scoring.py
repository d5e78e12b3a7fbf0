"""What pruning scores on."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_disparse.tasks import TaskBatchSampler
from hf_disparse.tasks.batches import blocks_of
from hf_disparse.trainer.arguments import lengths_by_task
from hf_disparse.trainer.batches import _FAR


class ScoringBatches:
    """The batches that one task is scored on: seeded by the config and the step, without touching the global generators.

    Of several processes each takes its part of a batch, which is as many times as large. A stream is read from its start, if
    it is shuffled in another order every time.
    """

    def __init__(self, trainer: Trainer, task: str):
        self.trainer, self.task = trainer, task

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trainer = self.trainer
        rows, added = trainer.train_dataset, {}
        if trainer.is_multitask:
            rows, added = rows[self.task], {"task": self.task}
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="scoring")
        rank, world_size = trainer.args.process_index, trainer.args.world_size
        for block in self._blocks(rows, trainer._train_batch_size * world_size):
            yield trainer._prepare_inputs(
                collate([{**row, **added} if added else row for row in block[rank::world_size]])
            )

    def _blocks(self, rows, size: int) -> Iterator[list]:
        """The rows of one batch of all processes after another."""
        seed = self.trainer.pruning_config.seed + self.trainer.state.global_step
        if isinstance(rows, IterableDataset):  # another epoch than those that training is in
            yield from blocks_of(rows, size, f"tasks.{self.task}", _FAR + seed)
        lengths = lengths_by_task({self.task: rows}, self.trainer.args) if self.trainer.is_multitask else None
        sampler = TaskBatchSampler({self.task: len(rows)}, size, lengths=lengths, seed=seed)
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            for indices in sampler:
                yield [rows[i] for i in indices]


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Keeps gradient checkpointing on while scores are taken: that is in eval mode, where transformers turns it off, and scoring
    would need more memory than training. Layers go by their own `training`, which changes nothing else in them.
    """

    def drops(layer: nn.Module) -> bool:
        if not isinstance(layer, GradientCheckpointingLayer) or not layer.gradient_checkpointing or layer.training:
            return False
        options = getattr(layer._gradient_checkpointing_func, "keywords", {})
        return options.get("use_reentrant") is False  # torch.autograd.grad refuses the other way

    layers = [module for module in model.modules() if drops(module)] if torch.is_grad_enabled() else []
    for layer in layers:
        layer.training = True  # not train(), which would set its dropout, too
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
