"""A recipe's run: dense training, pruning, sparse training, evaluation of both, one file of results. Layer 10.

A run folder holds `recipe.yaml`, one folder per phase with its checkpoints and its finished model, and, once it is done,
the sparse model with its tokenizer and `results.json` on top. Starting the same run again goes on where it stopped.
"""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

import hf_disparse
from hf_disparse.config import UserError
from hf_disparse.masks import sparsity_report
from hf_disparse.model import MultitaskModel, prunable_parameters
from hf_disparse.recipes import Recipe, parse_recipe, read_recipe
from hf_disparse.schedule import update_steps
from hf_disparse.tasks import average, load_task, resolve, tokenize
from hf_disparse.trainer import DisparseTrainer, last_whole_checkpoint

RECIPE_NAME, RESULTS_NAME, PHASE_NAME = "recipe.yaml", "results.json", "phase.json"
Splits = dict[str, dict[str, Dataset]]


def train(recipe: Recipe) -> dict[str, Any]:
    """Runs a recipe, or what is left of it, and returns what it writes to `results.json`.

    Raises:
        UserError: the output folder holds another run, or something the recipe names is not there or not right.
    """
    folder = Path(recipe.output_dir)
    _claim(folder, recipe)
    if (folder / RESULTS_NAME).is_file():
        return json.loads((folder / RESULTS_NAME).read_text())
    start = time.perf_counter()
    tokenizer, data = prepare(recipe)
    seconds = {"data": time.perf_counter() - start}
    dense = _phase(recipe, "dense", tokenizer, data)
    sparse = _phase(recipe, "sparse", tokenizer, data)
    for phase in (dense, sparse):
        seconds |= phase.pop("seconds")
    results = {
        "sparsity": {"target": recipe.pruning.sparsity, **sparse.pop("sparsity")},
        "dense": dense.pop("metrics"),
        "sparse": sparse.pop("metrics"),
        "majority": {name: _majority(recipe.tasks[name][0], rows) for name, rows in data["validation"].items()},
        "examples": {split: {name: len(rows) for name, rows in tasks.items()} for split, tasks in data.items()},
        "bytes": {"dense": dense.pop("bytes"), "sparse": sparse.pop("bytes")},
        "seconds": {**seconds, "total": sum(seconds.values())},
        "environment": environment(),
    }
    model = _load_model(folder / "sparse")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recipe.pruning.save_pretrained(folder)
    _write(folder / RESULTS_NAME, json.dumps(results, indent=2) + "\n")
    return results


def plan(recipe: Recipe) -> dict[str, Any]:
    """Everything `train` does before the first step: loads data and encoder, checks them, trains nothing."""
    tokenizer, data = prepare(recipe)
    model = _new_model(recipe)
    prunable = prunable_parameters(model, recipe.pruning)
    arguments = recipe.arguments("sparse", recipe.output_dir)
    steps = update_steps(recipe.pruning)
    if arguments.max_steps > 0 and steps and steps[-1] >= arguments.max_steps:
        raise UserError(
            f"pruning: the last pruning is at step {steps[-1]}, training ends at step {arguments.max_steps}"
        )
    return {
        "examples": {split: {name: len(rows) for name, rows in tasks.items()} for split, tasks in data.items()},
        "prunable": sum(p.numel() for p in prunable.values()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
    }


def evaluate(model_name: str, recipe_path: str | None = None, overrides=(), output_dir: str = "") -> dict[str, Any]:
    """Evaluates a model that `train` wrote on the validation data of its recipe, or of another one.

    Returns:
        {"tasks": {name: {metric: value}}, "average": x, "sparsity": {denominator: fraction}}, metrics in 0 to 100.
    """
    source = resolve(model_name)
    path = recipe_path or Path(source, RECIPE_NAME)
    if not Path(path).is_file():
        raise UserError(f"{model_name}: expected a run folder with {RECIPE_NAME}, got none there; name one by --recipe")
    recipe = read_recipe(path, overrides)
    model = _load_model(source)
    for name in recipe.tasks:
        if name not in model.tasks:
            raise UserError(f"tasks.{name}: the model has no such task; it has {', '.join(model.tasks)}")
    tokenizer, data = prepare(recipe, source)
    arguments = recipe.arguments("sparse", output_dir or recipe.output_dir)
    trainer = DisparseTrainer(model, arguments, eval_dataset=data["validation"], processing_class=tokenizer)
    prunable = prunable_parameters(model, recipe.pruning)
    return {**_values(trainer), "sparsity": sparsity_report(model, model.encoder, prunable)}


def prepare(recipe: Recipe, tokenizer_name: str | None = None) -> tuple[PreTrainedTokenizerBase, Splits]:
    """Loads and tokenizes all tasks: the tokenizer and {"train" and "validation": {task: rows}}."""
    tokenizer = _load_pretrained(AutoTokenizer, tokenizer_name or resolve(recipe.model.encoder))
    data: Splits = {"train": {}, "validation": {}}
    for name, (task, source) in recipe.tasks.items():
        for split, rows in zip(data, load_task(task, source, recipe.seed), strict=True):
            data[split][name], _ = tokenize(rows, task, tokenizer, recipe.model.max_length)
    return tokenizer, data


def _phase(recipe: Recipe, phase: str, tokenizer: PreTrainedTokenizerBase, data: Splits) -> dict[str, Any]:
    """Trains and evaluates one phase, or what is left of it; a finished one is only read."""
    folder = Path(recipe.output_dir, phase)
    if (folder / PHASE_NAME).is_file():
        return json.loads((folder / PHASE_NAME).read_text())
    model = _new_model(recipe) if phase == "dense" else _load_model(Path(recipe.output_dir, "dense"))
    pruning = recipe.pruning if phase == "sparse" else None
    trainer = DisparseTrainer(
        model,
        recipe.arguments(phase, folder),
        pruning_config=pruning,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    trained = time.perf_counter()
    metrics = _values(trainer)
    seconds = {f"{phase}_training": trained - start, f"{phase}_evaluation": time.perf_counter() - trained}
    trainer.save_model(str(folder))
    result = {
        "metrics": metrics,
        "seconds": seconds,
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "sparsity": sparsity_report(model, model.encoder, prunable_parameters(model, recipe.pruning)),
    }
    _write(folder / PHASE_NAME, json.dumps(result))
    return result


def _values(trainer: DisparseTrainer) -> dict[str, Any]:
    """{"tasks": {name: {metric: value}}, "average": x} in GLUE's 0 to 100."""
    metrics = trainer.evaluate()
    tasks = {
        name: {metric: 100 * metrics[f"eval_{name}_{metric}"] for metric in trainer.model.tasks[name].metric}
        for name in trainer.eval_dataset
    }
    return {"tasks": tasks, "average": average(tasks)}


def _majority(task, rows: Dataset) -> float | None:
    """Accuracy, in 0 to 100, of always answering the most frequent class; None where that has no meaning."""
    if task.problem_type != "single_label_classification":
        return None
    counts = torch.bincount(torch.tensor(rows["labels"]))
    return 100 * counts.max().item() / len(rows)


def _new_model(recipe: Recipe) -> MultitaskModel:
    set_seed(recipe.seed)
    tasks = [task for task, _ in recipe.tasks.values()]
    return _load_pretrained(MultitaskModel, resolve(recipe.model.encoder), "from_encoder", tasks)


def _load_model(folder: str | Path) -> MultitaskModel:
    return _load_pretrained(MultitaskModel, str(folder))


def _load_pretrained(cls, name: str, method: str = "from_pretrained", *arguments):
    """`cls.from_pretrained(name)`; a model that is not there or does not load is the user's to mend."""
    try:
        return getattr(cls, method)(name, *arguments)
    except UserError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and the Hub raise a dozen kinds here
        text = " ".join(str(error).split())[:300]
        raise UserError(f"model: expected a model that loads from {name}, got {type(error).__name__}: {text}") from None


def _claim(folder: Path, recipe: Recipe) -> None:
    """Marks the folder as this recipe's; refuses one that holds another run or something else."""
    path = folder / RECIPE_NAME
    if path.is_file():
        theirs = yaml.safe_load(path.read_text())
        if theirs != recipe.values:
            keys = sorted(k for k in {*theirs, *recipe.values} if theirs.get(k) != recipe.values.get(k))
            raise UserError(
                f"output_dir: {folder} holds another run, which differs in {', '.join(keys)}.\n"
                "Give this one its own --output_dir, or delete that folder to start over."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output_dir: expected a new or empty folder, or one of this run, got {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, yaml.safe_dump(recipe.values, sort_keys=False))
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {folder}: {error.strerror}") from None


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def environment() -> dict[str, Any]:
    """The versions and the machine behind a result."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "hf_disparse": hf_disparse.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "python": platform.python_version(),
        "device": gpu or f"CPU, {torch.get_num_threads()} threads",
    }


__all__ = ["environment", "evaluate", "parse_recipe", "plan", "prepare", "train"]
