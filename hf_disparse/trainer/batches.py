"""The batches of training and of scoring, of this process."""

from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from hf_disparse.config import UserError
from hf_disparse.tasks import TaskBatchSampler, TaskDataset
from hf_disparse.tasks.batches import TaskStream
from hf_disparse.trainer.arguments import DisparseTrainingArguments, is_streamed, lengths_by_task

_FAR = 1_000_000_000  # an epoch of a stream that training never comes to


class Resuming(TrainerCallback):
    """Mends what transformers' Trainer does on a resume.

    On a resume it sets the epoch on Accelerate's wrapper alone, so that our sampler would repeat epoch 0; and a run that is
    resumed at its last step takes a step too many, which `training_step` makes none and this takes off the count.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.is_multitask and self.trainer.task_sampler is not None:
            self.trainer.task_sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **kwargs):
        state.global_step = min(state.global_step, state.max_steps)


def training_batches(trainer: Trainer) -> DataLoader:
    """Batches of one task each for this process, drawn as the arguments say; of streams in turn."""
    args, rows = trainer.args, trainer.train_dataset
    if not rows:
        raise UserError("train_dataset: training expects a dict of task -> Dataset, got none")
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")
    trainer.task_sampler = None
    if is_streamed(rows, args):  # a process takes its part by itself: Accelerate has nothing to share out
        stream = TaskStream(rows, trainer._train_batch_size, args.process_index, args.world_size)
        return DataLoader(stream, batch_size=None, collate_fn=collate, pin_memory=args.dataloader_pin_memory)
    dataset = TaskDataset(rows)
    trainer.task_sampler = TaskBatchSampler(
        dataset.sizes,
        trainer._train_batch_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        world_size=args.world_size,
        lengths=lengths_by_task(rows, args),
        **(args.sampling() if isinstance(args, DisparseTrainingArguments) else {}),
    )
    loader = DataLoader(
        dataset,
        batch_sampler=trainer.task_sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return trainer.accelerator.prepare(loader)
