"""Trainers of the tiny multitask model, and what tests watch and compare in them."""

import torch
from transformers import (
    AutoModelForSequenceClassification,
    TrainerCallback,
)

from hf_disparse import (
    DisparseTrainer,
    DisparseTrainingArguments,
    PruningConfig,
    TaskConfig,
    prunable_parameters,
)
from hf_disparse.pruning.schedule import sparsity_at, update_steps
from tests.helpers.tiny import CONFIGS, three_datasets, tiny_model, tiny_tokenizer

BINARY = TaskConfig(name="two", columns="text", labels=["no", "yes"])


def arguments(folder, **changes) -> DisparseTrainingArguments:
    values = dict(max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.1, use_cpu=True)
    values |= dict(save_strategy="no", logging_strategy="no", disable_tqdm=True, report_to="none")
    return DisparseTrainingArguments(output_dir=str(folder), **values | changes)


def multitask_trainer(
    folder, pruning_config=None, model=None, callbacks=None, masks=None, **changes
) -> DisparseTrainer:
    return DisparseTrainer(
        model or tiny_model(),
        arguments(folder, **changes),
        pruning_config=pruning_config,
        masks=masks,
        train_dataset=three_datasets(),
        eval_dataset=three_datasets(30, seed=9),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def plain_model():
    torch.manual_seed(0)
    config = CONFIGS["bert"]()
    config.num_labels = 2
    return AutoModelForSequenceClassification.from_config(config)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


class Watch(TrainerCallback):
    """After every optimizer step, how many prunable weights are exactly zero, and whether the masks say which."""

    def __init__(self):
        self.trainer, self.zeros, self.agree = None, [], []

    def on_step_end(self, args, state, control, *, model, **kwargs):
        parameters = prunable_parameters(model)
        self.zeros.append(sum(int((p == 0).sum()) for p in parameters.values()))
        masks = self.trainer.pruner.masks
        self.agree.append(masks is None or all(torch.equal(p != 0, masks[n]) for n, p in parameters.items()))


class StateAt(TrainerCallback):
    """Weights of the model and the optimizer's state at the start of some steps, once the pruner has been there."""

    def __init__(self, *steps):
        self.steps, self.weights, self.state, self.random = steps, {}, {}, {}

    def on_step_begin(self, args, state, control, *, model, optimizer, **kwargs):
        if state.global_step in self.steps:
            named = dict(model.named_parameters())
            self.weights[state.global_step] = weights(model)
            self.state[state.global_step] = {n for n, p in named.items() if optimizer.state.get(p)}
            self.random[state.global_step] = torch.get_rng_state()


def zeros(model) -> tuple[int, int]:
    parameters = prunable_parameters(model).values()
    return sum(int((p == 0).sum()) for p in parameters), sum(p.numel() for p in parameters)


SCORED = PruningConfig(sparsity=0.7, score_batches=3, keep_scores=True)


def saved_run(folder, config=SCORED, tasks=None, **changes) -> DisparseTrainer:
    """A trainer that has pruned and saved its model to `folder`."""
    if not tasks:
        trainer = multitask_trainer(folder, config, **changes)
    else:
        trainer = DisparseTrainer(
            tiny_model(),
            arguments(folder, **changes),
            pruning_config=config,
            train_dataset={task: rows for task, rows in three_datasets().items() if task in tasks},
            processing_class=tiny_tokenizer(),
        )
    trainer.train()
    trainer.save_model()
    return trainer


def count_pruned(masks) -> int:
    return sum(int((~keep).sum()) for keep in masks.values())


def scheduled_zeros(config: PruningConfig, total: int, steps: int) -> list[int]:
    """How many of `total` weights the schedule of `config` has pruned after each of the first steps."""
    expected, now = [], 0
    for step in range(steps):
        now = round(sparsity_at(config, step) * total) if step in update_steps(config) else now
        expected.append(now)
    return expected
