"""Evaluates a model on the validation data of a recipe."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PrinterCallback

from hf_disparse.config import UserError, require
from hf_disparse.distributed.processes import on_main
from hf_disparse.export.measurements import measure_speed
from hf_disparse.fast.speed_up import speed_up
from hf_disparse.files import resolve
from hf_disparse.model.loading import load_pretrained
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.model.prunable import prunable_parameters
from hf_disparse.model.sparsity import sparsity_report
from hf_disparse.recipes.recipe import Recipe, read_recipe
from hf_disparse.runs.folder import RECIPE_NAME
from hf_disparse.runs.setup import Splits, new_trainer, only_judging, prepare
from hf_disparse.tasks.averages import average
from hf_disparse.trainer import DisparseTrainer


def evaluate(model_name: str, recipe_path: str | None = None, overrides=(), fast: bool = False) -> dict[str, Any]:
    """Evaluates a model that `train` wrote on the validation data of its recipe, or of another recipe.

    `fast` speeds the model up first, see `speed_up`.

    Returns:
        {"tasks": {name: {metric: value}}, "average": x, "sparsity": {denominator: fraction}, "speed": y}, metrics in 0 to 100,
        `speed` as `measure_speed` returns it.
    """
    source, recipe = open_run(model_name, recipe_path, overrides)
    recipe = only_judging(recipe)
    model = load_pretrained(model_name, MultitaskModel, source)
    judge_as(recipe, model)
    tokenizer, data, _ = prepare(recipe, source, splits=("validation",))
    sparsity = sparsity_report(model, model.encoder, prunable_parameters(model, recipe.pruning))
    speed = on_main(measure_speed)(model, recipe.model.max_length)
    if fast:
        speed_up(model)
    with TemporaryDirectory() as folder:  # a Trainer creates its output folder, and evaluation leaves none behind
        trainer = new_trainer(recipe, "sparse", folder, model, tokenizer, data)
        trainer.remove_callback(PrinterCallback)  # the caller prints the metrics
        metrics = metrics_on(trainer, data)
    return {**metrics, "sparsity": sparsity, "speed": speed}


def open_run(model_name: str, recipe_path: str | None, overrides=()) -> tuple[str, Recipe]:
    """Returns a model's folder or Hub id, resolved, and the recipe in it, or that of `recipe_path`."""
    source = resolve(model_name)
    path = recipe_path or Path(source, RECIPE_NAME)
    if not recipe_path and not path.is_file():
        got = "a folder without it" if Path(source).is_dir() else "no folder"
        raise UserError(
            f"{model_name}: expected the folder of a run, which holds {RECIPE_NAME}, got {got}; give a `recipe_path`"
        )
    return source, read_recipe(path, overrides, of_run=True)


def judge_as(recipe: Recipe, model: MultitaskModel) -> None:
    """Gives the model's tasks the recipe's columns and metrics; raises UserError if its heads do not fit the tasks."""
    tasks = model.tasks
    for name, (task, _) in recipe.voters.items():
        if name not in tasks:
            raise UserError(f"tasks.{name}: the model has no such task; it has {', '.join(tasks)}")
        for key in ("problem_type", "labels"):
            expected, got = getattr(tasks[name], key), getattr(task, key)
            require(got == expected, f"tasks.{name}.{key}", f"{expected!r}, as in the model's training", got)
        tasks[name] = task
    model.config.tasks = [task.to_dict() for task in tasks.values()]


def metrics_on(trainer: DisparseTrainer, data: Splits) -> dict[str, Any]:
    """Returns {"tasks": {name: {metric: value}}, "average": x} on the validation data, 0 to 100."""
    metrics = trainer.evaluate(data["validation"])
    tasks = {
        name: {metric: 100 * metrics[f"eval_{name}_{metric}"] for metric in trainer.model.tasks[name].metric}
        for name in data["validation"]
    }
    return {"tasks": tasks, "average": average(tasks)}
