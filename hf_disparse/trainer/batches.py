"""The batches that this process trains on."""

from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from hf_disparse.config import UserError
from hf_disparse.tasks.batches import TaskBatchSampler, TaskDataset, TaskStream
from hf_disparse.trainer.arguments import DisparseTrainingArguments, is_streamed, lengths_by_task


class Resuming(TrainerCallback):
    """Corrects two things that transformers' Trainer does on a resume.

    It sets the epoch only on Accelerate's wrapper, so that our sampler would repeat epoch 0. And if resumed at its last step
    it takes one step too many, which `training_step` turns into a no-op and this callback does not count.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.is_multitask and self.trainer.task_sampler is not None:
            self.trainer.task_sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **kwargs):
        state.global_step = min(state.global_step, state.max_steps)


def training_batches(trainer: Trainer) -> DataLoader:
    """Batches of one task each for this process, sampled as the arguments say; with streams, tasks take turns."""
    args, rows = trainer.args, trainer.train_dataset
    if not rows:
        raise UserError("train_dataset: training needs a dict of task -> Dataset")
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")
    trainer.task_sampler = None
    if is_streamed(rows, args):  # every process takes its own share, without Accelerate
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
