"""`DisparseTrainer`: transformers' Trainer on several tasks, with pruning."""

import contextlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size

from hf_disparse.config import PruningConfig, UserError
from hf_disparse.distributed.processes import among_processes, mean_over_processes, processes
from hf_disparse.export.card import write_card
from hf_disparse.export.results import results_of_log
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.model.sparsity import masked_share
from hf_disparse.pruning.stored_scores import SCORES_FOLDER
from hf_disparse.tasks.averages import average
from hf_disparse.tasks.batches import MultitaskCollator, TaskDataset
from hf_disparse.tasks.metrics import compute_metrics
from hf_disparse.trainer.arguments import check_arguments, check_datasets, check_same_rows, rows_to_evaluate
from hf_disparse.trainer.batches import Resuming, training_batches
from hf_disparse.trainer.callback import PruningCallback
from hf_disparse.trainer.checkpoints import checkpointing, load_state, save_state, seal, to_resume, whole_weights
from hf_disparse.trainer.distillation import check_teachers, distilled
from hf_disparse.trainer.guard import new_guard
from hf_disparse.trainer.losses import GradientSurgery, uncertainty_weight
from hf_disparse.trainer.scoring import ScoringBatches, checkpointed_layers


class DisparseTrainer(Trainer):
    """A Trainer for several tasks on one encoder that prunes it during training.

    With a `MultitaskModel`, `train_dataset` and `eval_dataset` map each task to its tokenized rows; `train_dataset` may map to
    streams (IterableDataset). Every batch holds one task, whose head gives the loss, multiplied by the task's weight.
    Evaluation returns `eval_<task>_<metric>` and one `eval_average`. Any other model, such as an
    `AutoModelForSequenceClassification`, counts as one task and takes the data sets of a plain Trainer.

    Args:
        pruning_config: what to prune and when; without it this is a multitask Trainer.
        masks: weights of a sparse model to hold at zero, as `find_masks` returns them.
        teachers: a MultitaskModel, or task -> model, to distil from as `args` says.
        args: `TrainingArguments`, or `DisparseTrainingArguments` to choose how tasks are sampled and losses combined.
        kwargs: passed on to `transformers.Trainer`, like the remaining arguments.

    Raises:
        UserError: `nn.DataParallel`, DeepSpeed, an unsupported use of FSDP, or data sets that do not match the model's
            tasks; during training also a loss or gradient that is not finite.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        pruning_config: PruningConfig | None = None,
        masks: Mapping[str, Tensor] | None = None,
        teachers: nn.Module | Mapping[str, nn.Module] | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs: Any,
    ):
        maybe_multitask = model is None or isinstance(model, MultitaskModel)  # None: made by model_init
        if maybe_multitask and args is not None and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # in each step, only one task's head gets a gradient
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.is_multitask = isinstance(self.model, MultitaskModel)
        self.tasks = self.model.tasks if self.is_multitask else {}
        self.loss_means: dict[str, float] = {}  # running means, with loss_weighting="uncertainty"
        self._trained = 0  # backward passes
        self._surgery = GradientSurgery() if self._weighting == "pcgrad" else None
        self.pruning_config, self.given_masks = pruning_config, masks
        check_arguments(self)
        if self.is_multitask:
            check_datasets(self.tasks, train_dataset=train_dataset, eval_dataset=eval_dataset)
            self.data_collator = MultitaskCollator(processing_class, self.tasks, pad=data_collator)
        self._teachers = check_teachers(teachers, self.args, self.tasks, train_dataset or ())
        judges = (train_dataset or self.tasks) if self.is_multitask else ["train"]  # a head without data does not vote
        self.pruner = PruningCallback(
            pruning_config,
            {task: ScoringBatches(self, task) for task in judges},
            masks=masks,
            loss_fn=self.scoring_loss,
            task_weights={name: task.weight for name, task in self.tasks.items()},
            guard=new_guard(self),
        )
        self.add_callback(self.pruner)
        self.add_callback(Resuming(self))

    # Data: one task per batch

    def get_train_dataloader(self) -> DataLoader:
        """Batches of one task each, sampled as the arguments say."""
        return training_batches(self) if self.is_multitask else super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """As in Trainer, for one task given by its name or as {task: rows}."""
        if not self.is_multitask:
            return super().get_eval_dataloader(eval_dataset)
        loader = super().get_eval_dataloader(self._joined(rows_to_evaluate(eval_dataset, self.eval_dataset)))
        self.__dict__.pop("_eval_dataloaders", None)  # Trainer keeps persistent loaders under one key for all tasks
        return loader

    def _get_eval_sampler(self, eval_dataset):
        # Trainer's sampler may group by length, and would return predictions in that order.
        return SequentialSampler(eval_dataset) if self.is_multitask else super()._get_eval_sampler(eval_dataset)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        """As in Trainer; a MultitaskModel takes {task: rows}."""
        return super().get_test_dataloader(self._joined(test_dataset) if self.is_multitask else test_dataset)

    def _joined(self, dataset):
        if isinstance(dataset, TaskDataset):
            return dataset
        check_datasets(self.tasks, dataset=dataset)
        if len(dataset) != 1:
            raise UserError(
                f"dataset: expected the rows of one task, got {', '.join(dataset)}; predict one task at a time"
            )
        return TaskDataset(dataset)

    # Training: one task's loss at a time, always finite

    @property
    def backward_passes(self) -> int:
        """Backward passes so far, in training and scoring, including those before a resume."""
        return self._trained + self.pruner.backward_passes

    @property
    def seconds(self) -> float:
        """Training time in seconds, including the time before a resume."""
        return self._earlier + time.perf_counter() - self._begun

    @property
    def _weighting(self) -> str:
        return getattr(self.args, "loss_weighting", "fixed")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Returns the task's loss; in training including distillation, and multiplied by the task's weight."""
        if not (self.is_multitask and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.pruner.task = inputs["task"]
        task, teacher = inputs["task"], self._teachers.get(inputs["task"])
        if teacher is not None:
            inputs = {**inputs, "output_hidden_states": self.args.distillation_hidden > 0}
        labels = inputs.get("labels")
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if teacher is not None:
            with self.accelerator.autocast():  # Accelerate wraps our model's forward, but not the teacher's
                loss = distilled(loss, outputs, teacher, {**inputs, "labels": labels}, self.tasks[task], self.args)
        weight = self.tasks[task].weight
        if self._weighting == "uncertainty":
            weight *= self._uncertainty_weight(task, loss)
        loss = loss if weight == 1.0 else loss * weight
        return (loss, outputs) if return_outputs else loss

    def _uncertainty_weight(self, task: str, loss: Tensor) -> float:
        """1 / running mean of the task's loss, the same on all processes."""
        now = self.accelerator.reduce(loss.detach().float(), "mean").item()
        self.loss_means[task] = 0.99 * self.loss_means.get(task, now) + 0.01 * now
        return uncertainty_weight(self.loss_means[task])

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """One forward and backward pass; a loss that is not finite ends training before the weights change."""
        if self.state.global_step >= self.state.max_steps:  # transformers takes a step even if resumed at the end
            return torch.zeros((), device=self.args.device)
        task = inputs["task"] if self.is_multitask else None
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._trained += 1
        self._require_finite(loss, f"loss of task '{task}'" if task else "loss of the batch")
        if self._surgery:
            self._surgery.take(task, self.model.shared_parameters())
            if self.accelerator.sync_gradients:
                self._surgery.give(torch.Generator().manual_seed(self.args.seed + self.state.global_step))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # a loss scaler causes overflows and skips those steps
            self._require_finite(torch.as_tensor(grad_norm), "gradient norm")
        return grad_norm

    def _require_finite(self, value: Tensor, what: str) -> None:
        if not torch.isfinite(value).all():
            raise UserError(
                f"training: expected a finite {what}, got {value.item()} at step {self.state.global_step + 1}; the weights "
                "have not changed in this step.\nTry a lower learning_rate, or max_grad_norm: 1.0."
            )

    def scoring_loss(self, model: nn.Module, batch) -> Tensor:
        """Returns the loss used for scoring, computed in the training precision and with its gradient checkpointing.

        With several processes, each returns its share; their mean is the loss of the whole batch.
        """
        labels = batch.get("labels")  # kept, because a label smoother removes them from the batch
        with self.compute_loss_context_manager(), checkpointed_layers(model):
            loss = self.compute_loss(model, batch)
        if processes() == 1 or not isinstance(labels, Tensor) or labels.ndim < 2 or labels.is_floating_point():
            return loss  # a mean over equally many examples on every process
        mine = (labels != -100).sum().float()  # labelled tokens on this process
        return loss * (mine / mean_over_processes([mine.clone()])[0])

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in Trainer, plus the sparsity of the prunable weights and, after an update, how far the tasks agreed."""
        masks = self.pruner.masks
        if "loss" in logs:
            logs |= self.pruner.measures
            self.pruner.scorer.measures = {}
        if masks and "loss" in logs:
            logs["sparsity"] = masked_share(self.model, masks)
        super().log(logs, *args, **kwargs)

    # Evaluation: every task by its own metrics, one average

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluates every task: `eval_<task>_loss`, `eval_<task>_<metric>`, and the means `eval_loss` and `eval_average`.

        Callbacks are called once, with all metrics, so that best-model selection and early stopping can use the average.
        """
        if not self.is_multitask:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        datasets = rows_to_evaluate(eval_dataset, self.eval_dataset)
        check_datasets(self.tasks, eval_dataset=datasets)
        metrics, values = self.evaluate_tasks(datasets, ignore_keys, metric_key_prefix)
        losses = [metrics[key] for key in (f"{metric_key_prefix}_{task}_loss" for task in datasets) if key in metrics]
        if losses:
            metrics[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        if values and all(values.values()):
            metrics[f"{metric_key_prefix}_average"] = average(values)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_tasks(self, datasets, ignore_keys=None, metric_key_prefix: str = "eval"):
        """As `evaluate`, but without logging; returns all metrics under their prefix, and task -> metric -> value."""
        metrics, values = {}, {}
        for task, rows in datasets.items():
            prefix = f"{metric_key_prefix}_{task}"
            output = self.evaluation_loop(
                self.get_eval_dataloader({task: rows}), f"Evaluation of {task}", None, ignore_keys, prefix
            )
            # Ends this task's progress bar, as on_evaluate would.
            self.callback_handler.on_predict(self.args, self.state, self.control, output.metrics)
            metrics |= output.metrics
            values[task] = {
                m: output.metrics[f"{prefix}_{m}"] for m in self.tasks[task].metric if f"{prefix}_{m}" in output.metrics
            }
        return metrics, values

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """As in Trainer, with the metrics of the batches' task unless `compute_metrics` was given."""
        own = self.compute_metrics
        if own is None and isinstance(dataloader.dataset, TaskDataset):
            task = self.tasks[next(iter(dataloader.dataset.sizes))]
            self.compute_metrics = lambda p: compute_metrics(task, p.predictions, p.label_ids)
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.compute_metrics = own

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As in Trainer; the loss excludes rows that only pad the last batches of several processes.

        Accelerate removes them from predictions and labels when it gathers those.
        """
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        state = self.accelerator.gradient_state
        if processes() > 1 and loss is not None and state.end_of_dataloader and state.remainder > 0:
            rows = find_batch_size(inputs)
            # A process without any row of its own counts one.
            mine = min(max(state.remainder - self.args.process_index * rows, 1), rows)
            kept = {key: value[:mine] if isinstance(value, Tensor) else value for key, value in inputs.items()}
            loss = super().prediction_step(model, kept, True, ignore_keys)[0]
        return loss, logits, labels

    def _determine_best_metric(self, metrics, trial) -> bool:
        """A model that is not yet at its final sparsity is never the best one."""
        return self.state.global_step > self.pruner.last_update and super()._determine_best_metric(metrics, trial)

    # Checkpoints: masks beside the optimizer's state, the pruning config beside the weights

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in Trainer; `resume_from_checkpoint=True` takes the last complete checkpoint."""
        resume_from_checkpoint = self._resumed = to_resume(resume_from_checkpoint, self.args.output_dir)
        if self.is_multitask and self.train_dataset:
            check_same_rows(self.train_dataset)
        if self.model_init is not None:
            self.pruner.masks = self.given_masks  # the masks of an earlier trial belong to another model
        self._begun, self._earlier = time.perf_counter(), 0.0
        self.pruner.restart()
        self.pruner.prepare(self.model, self.optimizer)
        try:
            with among_processes("Training resumes from the last whole checkpoint."):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.pruner.end()  # also if training failed

    def _inner_training_loop(self, *args, **kwargs):
        # Here, because `auto_find_batch_size` starts again here after running out of memory.
        self._trained, self.loss_means = 0, {}
        if self._surgery:
            self._surgery = GradientSurgery()  # a failed step may have left gradients in the old one
        return super()._inner_training_loop(*args, **kwargs)

    def call_model_init(self, trial=None) -> nn.Module:
        """As in Trainer; also prepares the models of later trials for pruning."""
        model = super().call_model_init(trial)
        if hasattr(self, "pruner"):
            self.pruner.prepare(model)
        return model

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self._resumed and folder.resolve() == Path(self._resumed).resolve():
            return  # no step was taken since, and rewriting would delete it first
        with checkpointing(self, folder):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """As in Trainer, then seals the checkpoint: all that processes still write is `trainer_state.json`."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(Path(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_state(self, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (state := load_state(self, Path(checkpoint))):
            self._trained, self.loss_means = state["backward_passes"], state["loss_means"]
            # The total includes scoring; what is counted here comes from a try that ran out of memory.
            self.pruner.scorer.backward_passes = 0
            self._earlier = state.get("seconds", 0.0)  # an earlier version did not write them

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_multitask and self.model.adapters:
            self.model.load_checkpoint(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.is_multitask and self.model.adapters:
            self.model.load_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def create_model_card(self, language=None, license=None, tags=None, model_name=None, **kwargs) -> None:
        """Writes the card of a MultitaskModel saved in `output_dir`; for other models as in Trainer."""
        if not self.is_multitask:
            super().create_model_card(language, license, tags, model_name, **kwargs)
        elif self.is_world_process_zero():
            results = results_of_log(self.state.log_history, self.tasks)
            if self.pruner.guard:
                results["guard"] = self.pruner.guard.report()
            write_card(self.args.output_dir, self.hub_model_id or model_name, license, results)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer, plus the scores of `keep_scores`, which checkpoints omit; with FSDP, saves the full model."""
        with contextlib.nullcontext() if _internal_call else whole_weights(self):
            super().save_model(output_dir, _internal_call)
        scores = Path(self.args.output_dir, SCORES_FOLDER)
        target = Path(output_dir or self.args.output_dir, SCORES_FOLDER)
        kept = self.pruning_config is not None and self.pruning_config.keep_scores and scores.is_dir()
        if kept and self.args.should_save and not _internal_call and scores.resolve() != target.resolve():
            shutil.copytree(scores, target, dirs_exist_ok=True)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.pruning_config is not None:
            self.pruning_config.save_pretrained(output_dir or self.args.output_dir)
