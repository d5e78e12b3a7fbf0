"""Checks teachers, and adds distillation to the loss."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_disparse.config import TaskConfig, UserError, require
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.trainer.arguments import DisparseTrainingArguments
from hf_disparse.trainer.losses import distillation_loss, hidden_loss


def check_teachers(
    teachers, args: TrainingArguments, tasks: Mapping[str, TaskConfig], trained: Iterable[str]
) -> Mapping[str, nn.Module]:
    """Returns task -> teacher, on the right device and in eval mode; empty if `args` asks for no distillation.

    Args:
        tasks: the model's tasks; empty if it is no MultitaskModel.
        trained: names of the tasks with training data.

    Raises:
        UserError: a trained task has no teacher, or a teacher does not fit its task.
    """
    if not getattr(args, "distils", False):
        return {}
    if not tasks:
        raise UserError("training.distillation: only a MultitaskModel can be distilled to, got another model")
    if isinstance(teachers, MultitaskModel):
        teachers = {task: teachers for task in teachers.tasks}
    teachers = {} if teachers is None else teachers
    if not isinstance(teachers, Mapping):
        got = type(teachers).__name__
        raise UserError(f"teachers: expected a MultitaskModel or a dict of task -> model, got {got}")
    for name in trained:
        if name not in teachers:
            raise UserError(f"training.distillation: there is no teacher for task '{name}'; pass teachers=")
        if isinstance(teachers[name], MultitaskModel):
            _check_task(tasks[name], teachers[name].tasks)
        else:
            _check_order(tasks[name], teachers[name])
    for teacher in teachers.values():
        teacher.to(args.device).eval()
    return teachers


def _check_task(task: TaskConfig, taught: Mapping[str, TaskConfig]) -> None:
    """Refuses a teacher trained for something else: one with classes in another order would teach the opposite."""
    if task.name not in taught:
        has = ", ".join(taught)
        raise UserError(f"teachers: expected a teacher for task '{task.name}', got a model with {has}")
    for key in ("problem_type", "labels"):
        expected, got = getattr(task, key), getattr(taught[task.name], key)
        require(got == expected, f"teachers.{task.name}", f"a teacher with the task's {key}, {expected!r}", got)


def _check_order(task: TaskConfig, teacher: nn.Module) -> None:
    """Refuses another kind of teacher if its classes are the task's in another order; other names cannot be compared."""
    names = getattr(getattr(teacher, "config", None), "id2label", None) or {}
    got = [str(names[place]).lower() for place in sorted(names)]
    expected = [label.lower() for label in task.labels]
    if got != expected and sorted(got) == sorted(expected):
        raise UserError(
            f"teachers.{task.name}: expected a teacher with the classes {expected} in this order, got {got}"
        )


def distilled(
    loss: Tensor,
    outputs,
    teacher: nn.Module,
    inputs: Mapping[str, Any],
    task: TaskConfig,
    args: DisparseTrainingArguments,
) -> Tensor:
    """Returns (1 - a) loss + a distillation of the logits + b distance of the hidden states."""
    seen = {k: v for k, v in inputs.items() if k != "labels" and (k != "task" or isinstance(teacher, MultitaskModel))}
    with torch.no_grad():
        taught = teacher(**seen)
    if taught.logits.shape != outputs.logits.shape:
        got = f"{tuple(taught.logits.shape)} instead of {tuple(outputs.logits.shape)}"
        raise UserError(f"teachers: expected a teacher with the classes of task '{task.name}', got logits of {got}")
    if args.distillation:
        soft = distillation_loss(
            outputs.logits, taught.logits, task.problem_type, args.distillation_temperature, inputs["labels"]
        )
        loss = (1 - args.distillation) * loss + args.distillation * soft
    if args.distillation_hidden:
        ours, theirs = (out.hidden_states for out in (outputs, taught))
        if [h.shape for h in ours] != [h.shape for h in theirs]:
            got = f"{len(theirs)} of width {theirs[0].shape[-1]} instead of {len(ours)} of {ours[0].shape[-1]}"
            raise UserError(
                f"training.distillation_hidden: the teacher's hidden states must match the model's, got {got}"
            )
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        loss = loss + args.distillation_hidden * hidden_loss(ours, theirs, mask)
    return loss
