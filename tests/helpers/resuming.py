"""Runs that die at a step and are resumed by another trainer, with the schedules they follow."""

import pytest
import torch
from transformers import TrainerCallback

from hf_disparse import (
    DisparseTrainer,
    PruningConfig,
)
from tests.helpers.training import multitask_trainer

FIELDS = dict(sparsity=0.8, schedule="cubic", start_step=2, end_step=16, update_every=4, score_batches=2)
CUBIC = PruningConfig(**FIELDS)
GUARDED = PruningConfig(**FIELDS, max_drop=5.0)

# 3 tasks of 40, 31 and 22 rows in batches of 4 are 24 batches an epoch, 12 steps of 2: 20 steps end in the second epoch.
STEPS = dict(max_steps=20, gradient_accumulation_steps=2, save_strategy="steps", save_steps=3, learning_rate=3e-3)


def slow(*values) -> list:
    """Parameters whose tests run with the slow ones."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


class Died(Exception):
    pass


class DieAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Died


def killed_and_resumed(folder, config, step: int, **changes) -> DisparseTrainer:
    """The trainer that has ended a run which died at `step`; a fresh one, as of another process."""
    with pytest.raises(Died):
        multitask_trainer(folder, config, callbacks=[DieAt(step)], **changes).train()
    trainer = multitask_trainer(folder, config, **changes)
    torch.manual_seed(99)  # what the new process did before must not matter
    trainer.train(resume_from_checkpoint=True)
    return trainer
