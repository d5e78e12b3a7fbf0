"""What tests/distributed/test_ddp.py does in one process and in two: trainings on the same examples, and what they leave behind."""

from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_disparse import (
    DisparseTrainer,
    DynamicConfig,
    FlopConfig,
    GroupLassoConfig,
    L0Config,
    MovementConfig,
    MultitaskConfig,
    MultitaskModel,
    PlatonConfig,
    PruningConfig,
    RankConfig,
    TaskConfig,
    UserError,
)
from hf_disparse.distributed.fsdp import local
from hf_disparse.distributed.processes import processes
from tests.helpers.tiny import three_datasets, three_tasks, tiny_bert_config, tiny_tokenizer, tokenized_rows
from tests.helpers.training import arguments

CUBIC = dict(schedule="cubic", start_step=2, end_step=8, update_every=3, score_batches=2)
RISING = dict(sparsity=0.7, end_step=8, update_every=3)
METHODS = {
    "saliency": PruningConfig(sparsity=0.8, **CUBIC),
    "fisher quorum": PruningConfig(sparsity=0.8, criterion="fisher", decision="quorum", quorum=2, score_batches=3),
    "joint heads": PruningConfig(sparsity=0.5, granularity="head", decision="joint", score_batches=2),
    "agreement": PruningConfig(
        sparsity=0.5, granularity="neuron", criterion="agreement", decision="joint", score_batches=2
    ),
    "reconstructed": PruningConfig(sparsity=0.8, reconstruct=True, **CUBIC),
    "movement": MovementConfig(**RISING),
    "movement soft": MovementConfig(mode="soft", score_learning_rate=0.5, penalty=4.0, **RISING),
    "movement joint": MovementConfig(decision="joint", **RISING),
    "platon": PlatonConfig(**RISING),
    "dynamic": DynamicConfig(sparsity=0.7, end_step=8, update_every=3, score_batches=2),
    "l0": L0Config(sparsity=0.5, end_step=8),
    "group_lasso": GroupLassoConfig(sparsity=0.5, end_step=8),
    "rank": RankConfig(sparsity=0.5, score_batches=2),
    "flop": FlopConfig(sparsity=0.5, end_step=8),
}
VARIANTS = {
    "accumulated": dict(gradient_accumulation_steps=2),
    "checkpointed": dict(gradient_checkpointing=True),
    "bf16": dict(bf16=True),
    "compiled": dict(torch_compile=True, torch_compile_backend="aot_eager"),
}
ODD = {"two": 9, "three": 1, "real": 6}  # rows that no number of processes divides


def model_without_dropout(tasks: list[TaskConfig] | None = None) -> MultitaskModel:
    """Every process draws its own dropout, and one process another: there is none here."""
    torch.manual_seed(0)
    encoder = tiny_bert_config()
    encoder.hidden_dropout_prob = encoder.attention_probs_dropout_prob = 0.0
    return MultitaskModel(MultitaskConfig(encoder_config=encoder, tasks=tasks or three_tasks()))


class Log(TrainerCallback):
    """The task of every step, the masks after each change, and how often a pruned weight was not zero."""

    def __init__(self):
        self.trainer, self.tasks, self.masks, self.alive = None, [], [], 0

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.tasks.append(self.trainer.pruner.task)
        masks = self.trainer.pruner.masks
        if masks is None:
            return
        parameters = dict(model.named_parameters())
        self.alive += sum(int(local(parameters[n])[~local(mask)].count_nonzero()) for n, mask in masks.items())
        whole = {n: mask.full_tensor() if isinstance(mask, DTensor) else mask.clone() for n, mask in masks.items()}
        if not self.masks or any(not torch.equal(mask, self.masks[-1][n]) for n, mask in whole.items()):
            self.masks.append(whole)


def trainer_of(folder, pruning=None, callbacks=(), **changes) -> DisparseTrainer:
    """A batch has 4 rows, whatever the number of processes."""
    values = dict(per_device_train_batch_size=4 // processes(), per_device_eval_batch_size=2, learning_rate=1e-3)
    log = Log()
    log.trainer = DisparseTrainer(
        model_without_dropout(),
        arguments(folder, **values | {"max_steps": 10} | changes),
        pruning_config=pruning,
        train_dataset=three_datasets(),
        eval_dataset={task.name: tokenized_rows(task, ODD[task.name], 9) for task in three_tasks()},
        processing_class=tiny_tokenizer(),
        callbacks=[log, *callbacks],
    )
    return log.trainer


def trained(folder: Path, pruning: PruningConfig, **changes) -> dict:
    """What a training leaves: the masks after each change, the tasks of its steps, its weights."""
    trainer = trainer_of(folder, pruning, **changes)
    trainer.train()
    log = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Log))
    weights = {name: p.detach().clone() for name, p in trainer.model.state_dict().items()}
    return {
        "alive": log.alive,
        "masks": log.masks,
        "tasks": log.tasks,
        "weights": weights,
        "passes": trainer.backward_passes,
    }


def evaluated(folder: Path) -> dict:
    """Metrics and losses of data that no number of processes divides, and how many predictions there are."""
    trainer = trainer_of(folder)
    metrics = {k: v for k, v in trainer.evaluate().items() if "per_second" not in k and "runtime" not in k}
    counts = {task: len(trainer.predict({task: rows}).predictions) for task, rows in trainer.eval_dataset.items()}
    return {"metrics": metrics, "counts": counts}


class Disturb(TrainerCallback):
    """Changes a weight on rank 1, before the masks are decided anew."""

    def on_step_begin(self, args, state, control, *, model, **kwargs):
        if state.global_step == 5 and args.process_index == 1:
            with torch.no_grad():
                model.encoder.encoder.layer[0].attention.self.query.weight.normal_()


def disturbed(folder: Path) -> str:
    """What is said to a process whose weights are not those of the others."""
    trainer = trainer_of(folder, METHODS["saliency"])
    trainer.callback_handler.callbacks.insert(0, Disturb())
    return said(trainer.train)


def other_data(folder: Path) -> str:
    """What is said where rank 1 has other rows."""
    trainer = trainer_of(folder)
    if trainer.args.process_index == 1:
        trainer.train_dataset = {**trainer.train_dataset, "two": trainer.train_dataset["two"].select(range(20))}
    return said(trainer.train)


def said(function) -> str:
    try:
        function()
    except UserError as error:
        return str(error)
    return ""


def main(report, folder: Path, names: list[str]) -> None:
    trainer_of(folder)  # begins torch.distributed
    rank = torch.distributed.get_rank()
    for name in names:
        if name in METHODS:
            result = trained(folder / name, METHODS[name])
        elif name in VARIANTS:
            result = trained(folder / name, METHODS["saliency"], **VARIANTS[name])
        else:
            result = {"evaluated": evaluated, "disturbed": disturbed, "other_data": other_data}[name](folder / name)
        torch.save(result, folder / f"{name}-{rank}.pt")
