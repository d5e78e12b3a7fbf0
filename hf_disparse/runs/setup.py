"""Builds what a run starts from: tokenizer, data, model and trainer."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from hf_disparse.config import UserError, one_line, require
from hf_disparse.config.version import __version__
from hf_disparse.files import resolve
from hf_disparse.model.loading import load_pretrained
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.model.prunable import prunable_parameters
from hf_disparse.pruning.masks import find_masks
from hf_disparse.recipes.recipe import Recipe
from hf_disparse.tasks.data import load_task, tokenize
from hf_disparse.trainer import DisparseTrainer

Splits = dict[str, dict[str, Dataset]]


def prepare(
    recipe: Recipe, tokenizer_name: str | None = None, splits: tuple[str, ...] = ("train", "validation")
) -> tuple[PreTrainedTokenizerBase, Splits, dict[str, int]]:
    """Loads and tokenizes all tasks.

    Returns:
        The tokenizer, {split: {task: rows}} for `splits`, and {task: number of examples without a label, left out}. If the
        recipe chooses its best model, half of the validation data is in a split `selection`, used for that alone.
    """
    where = "tokenizer" if tokenizer_name else "model.encoder"
    # A byte-level tokenizer needs this to read separate words as those of a text; others ignore it.
    words = any(task.problem_type == "token_classification" for task, _ in recipe.tasks.values())
    options = {"add_prefix_space": True} if words else {}
    tokenizer = load_pretrained(where, AutoTokenizer, tokenizer_name or resolve(recipe.model.encoder), **options)
    data: Splits = {split: {} for split in splits}
    unlabelled = dict.fromkeys(recipe.tasks, 0)
    for name, (task, source) in recipe.tasks.items():
        wanted = [split for split in splits if split == "train" or name not in recipe.helpers]
        if not wanted:
            continue
        for split, raw in zip(wanted, load_task(task, source, recipe.seed, wanted), strict=True):
            data[split][name], left_out = tokenize(raw, task, tokenizer, recipe.model.max_length)
            unlabelled[name] += left_out
    if "validation" not in splits:
        return tokenizer, data, unlabelled
    if recipe.chooses_best:
        data["selection"] = {}
        for name, rows in data["validation"].items():
            require(
                len(rows) > 1, f"tasks.{name}", "two validation examples, one to choose the best model by", len(rows)
            )
            halves = rows.train_test_split(0.5, seed=0)  # the same halves whatever the run's seed
            data["selection"][name], data["validation"][name] = halves["train"], halves["test"]
    data["validation"] = {name: _by_length(rows) for name, rows in data["validation"].items()}
    return tokenizer, data, unlabelled


def _by_length(rows: Dataset) -> Dataset:
    """Sorts the rows from short to long, as evaluation pads each batch to its longest text."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))


def sizes(data: Splits) -> dict[str, dict[str, int]]:
    """Returns split -> task -> number of examples."""
    return {split: {name: len(rows) for name, rows in tasks.items()} for split, tasks in data.items()}


def only_judging(recipe: Recipe) -> Recipe:
    """Returns the recipe without teachers and reporting in the sparse phase, for scoring and evaluation, which need neither."""
    quiet = {"report_to": "none", "distillation": 0.0, "distillation_hidden": 0.0}
    return replace(recipe, sparse=replace(recipe.sparse, **quiet))


def new_trainer(recipe: Recipe, phase: str, folder, model, tokenizer, data: Splits, teachers=None) -> DisparseTrainer:
    """Returns the trainer of a phase, with its checkpoints in `folder`."""
    arguments = replace(getattr(recipe, phase), output_dir=str(folder))
    train = data.get("train")
    if train and phase == "sparse":
        train = {name: train[name] for name in recipe.voters}
    prunes = phase == "sparse" and recipe.pruning.in_training
    holds = bool(train) and phase == "sparse" and not prunes  # the zeros that shrinking left
    with refused_by_trainer(phase, ImportError, RuntimeError, ValueError):
        return DisparseTrainer(
            model,
            arguments,
            pruning_config=recipe.pruning if prunes else None,
            masks=find_masks(prunable_parameters(model, recipe.pruning)) if holds else None,
            teachers=teachers,
            train_dataset=train,
            eval_dataset=data.get("selection", data["validation"]),
            processing_class=tokenizer,
        )


@contextmanager
def refused_by_trainer(phase: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns errors of transformers about arguments that need something missing or impossible into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except errors as error:
        section = "training" if phase == "dense" else "training or recovery"
        raise UserError(f"{section}: Trainer refuses these values: {one_line(error)}") from error


def new_model(recipe: Recipe) -> MultitaskModel:
    """Returns the recipe's pretrained encoder with new heads, initialized by the seed.

    It is in float32 however it is stored: in half precision, rounding would lose most of each step's update.
    """
    set_seed(recipe.seed)
    tasks, encoder = [task for task, _ in recipe.tasks.values()], resolve(recipe.model.encoder)
    return load_pretrained("model.encoder", MultitaskModel, encoder, "from_encoder", tasks, dtype=torch.float32)


def environment() -> dict[str, Any]:
    """Returns the versions and the machine behind a result."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "hf_disparse": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "python": platform.python_version(),
        "device": gpu or f"CPU, {torch.get_num_threads()} threads",
    }
