"""Scoring in training: on which batches, and the scores and gradients that a method asks for."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_disparse.analysis import Watch
from hf_disparse.config import TASK_CRITERIA, PruningConfig, UserError
from hf_disparse.distributed.fsdp import decide_on_main, is_sharded
from hf_disparse.distributed.processes import mean_over_processes, processes
from hf_disparse.methods import Update
from hf_disparse.methods.base import Method
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.scores import (
    GRADIENT_CRITERIA,
    Average,
    Batch,
    LossFunction,
    Stream,
    again_and_again,
    gradients,
    score,
)
from hf_disparse.pruning.stored_scores import keep_scores
from hf_disparse.tasks.batches import TaskBatchSampler, blocks_of
from hf_disparse.trainer.arguments import lengths_by_task

_FAR = 1_000_000_000  # an epoch of a stream that training never reaches
_RECONSTRUCTION_BATCHES = 8  # per task at most; docs/glue.md shows that 4 are nearly as good


@dataclass
class Scorer:
    """Scores the tasks on their `loaders` when a pruning method asks for it.

    Args:
        config: says how many batches to score on, and with which seed.
        loaders: task -> batches, iterated from the start at every update.
        loss_fn: (model, batch) -> loss.
        task_weights: task -> weight in the joint decision.

    Attributes:
        backward_passes: taken so far.
        measures: how far the tasks agreed at the last update.
        scores_folder: where every task's scores are written, None to keep none.
    """

    config: PruningConfig | None
    loaders: Mapping[str, Iterable[Batch]]
    loss_fn: LossFunction
    task_weights: Mapping[str, float] | None = None
    backward_passes: int = 0
    measures: dict[str, float] = field(default_factory=dict)
    scores_folder: Path | None = None

    def score(self, model, parameters, masks: Masks, progress: bool, criterion: str, joint: bool = False) -> Stream:
        """Yields (task, scores), observed on the way; scores of FSDP are in parts and observed by `decide_sharded`."""
        if criterion in GRADIENT_CRITERIA:
            self.backward_passes += len(self.loaders) * self.config.score_batches
        options = self._options(parameters, progress, joint)
        stream = score(model, self.loaders, criterion, seed=self.config.seed, **options)
        return stream if is_sharded(parameters) else self._observed(stream, parameters, masks, criterion, joint)

    def gradients(self, model, parameters, progress: bool, joint: bool = False) -> Iterator[tuple[str, Iterator]]:
        """Yields (task, its gradients batch by batch)."""
        self.backward_passes += len(self.loaders) * self.config.score_batches
        return gradients(model, self.loaders, **self._options(parameters, progress, joint))

    def decide_sharded(self, method: Method, now: Update) -> Masks | None:
        """Returns what `method.update` decides on the main process, the only one that sees whole scores."""

        def update(masks: Masks, score) -> Masks | None:
            def observed(criterion: str, joint: bool = False) -> Stream:  # a weight is zero where its mask is False
                return self._observed(score(criterion, joint), masks, masks, criterion, joint)

            return method.update(replace(now, masks=masks, score=observed))

        return decide_on_main(update, now.score, now.masks, now.parameters)

    def reconstruction_batches(self) -> list[Batch]:
        """The batches of all tasks that remaining weights are fitted on."""
        count, batches = min(self.config.score_batches, _RECONSTRUCTION_BATCHES), []
        for task, loader in self.loaders.items():
            mine = list(itertools.islice(again_and_again(loader), count))
            if len(mine) < count:
                raise UserError(
                    f"pruning.reconstruct: needs {count} batches of task '{task}', but its loader gave {len(mine)}; pass a "
                    "loader that can be iterated again"
                )
            batches += mine
        return batches

    @property
    def average(self) -> Average | None:
        """Averages gradients over processes; None with one process, which then needs no copy of them."""
        return mean_over_processes if processes() > 1 else None

    def _options(self, parameters, progress: bool, joint: bool) -> dict[str, Any]:
        """The arguments that `score` and `gradients` share."""
        return {
            "parameters": parameters,
            "num_batches": self.config.score_batches,
            "joint": joint,
            "task_weights": self.task_weights,
            "loss_fn": self.loss_fn,
            "average": self.average,
            "progress": progress,
        }

    def _observed(self, stream: Stream, weights, masks: Masks, criterion: str, joint: bool) -> Stream:
        """Yields whole scores on; writes them to `scores_folder` and measures how far the tasks agree."""
        if self.scores_folder:
            stream = keep_scores(stream, self.scores_folder, masks)
        if joint or criterion not in TASK_CRITERIA or len(self.loaders) < 2:
            return stream  # these scores do not tell tasks apart, or rank weights to grow, which are zero now
        return self._measured(stream, Watch(weights, self.config.sparsity, self.config.seed))

    def _measured(self, stream: Stream, watch: Watch) -> Stream:
        yield from watch.watch(stream)
        self.measures = watch.scalars()


class ScoringBatches:
    """The batches that one task is scored on, seeded by the config and the step; global random state is not touched.

    With several processes, a batch is as many times larger and each takes its share. A stream is read from its start, in
    another order every time if it is shuffled.
    """

    def __init__(self, trainer: Trainer, task: str, seed: int | None = None):
        self.trainer, self.task, self.seed = trainer, task, seed  # None: the pruning config's, read when it is needed

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
        """Yields the rows of one batch, for all processes together, after another."""
        seed = self.trainer.pruning_config.seed if self.seed is None else self.seed
        seed += self.trainer.state.global_step
        if isinstance(rows, IterableDataset):  # in an epoch that training never reaches
            yield from blocks_of(rows, size, f"tasks.{self.task}", _FAR + seed)
        lengths = lengths_by_task({self.task: rows}, self.trainer.args) if self.trainer.is_multitask else None
        sampler = TaskBatchSampler({self.task: len(rows)}, size, lengths=lengths, seed=seed)
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            for indices in sampler:
                yield [rows[i] for i in indices]


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Keeps gradient checkpointing on during scoring, which would otherwise need more memory than training.

    Scoring runs in eval mode, where transformers turns checkpointing off by a layer's `training`; nothing else in the layer
    itself depends on it.
    """

    def is_checkpointed(layer: nn.Module) -> bool:
        if not isinstance(layer, GradientCheckpointingLayer) or not layer.gradient_checkpointing or layer.training:
            return False
        options = getattr(layer._gradient_checkpointing_func, "keywords", {})
        return options.get("use_reentrant") is False  # torch.autograd.grad refuses reentrant checkpoints

    layers = [module for module in model.modules() if is_checkpointed(module)] if torch.is_grad_enabled() else []
    for layer in layers:
        layer.training = True  # not train(), which would also turn on dropout
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
