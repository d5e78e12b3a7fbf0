"""A recipe's run: dense training, pruning, sparse training, evaluation of both, one file of results. Layer 10.

A run folder holds `recipe.yaml`, one folder per phase with its checkpoints and its finished model, and, once it is done,
the sparse model with its tokenizer and `results.json` on top. Starting the same run again goes on where it stopped.
"""

import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
import transformers
import yaml
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, TrainerState, set_seed

import hf_disparse
from hf_disparse.config import UserError, one_line, require
from hf_disparse.masks import sparsity_report
from hf_disparse.model import MultitaskModel, prunable_parameters
from hf_disparse.recipes import Recipe, read_recipe
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
    _refuse_others(folder, recipe)
    if (folder / RESULTS_NAME).is_file():
        results = _read(folder / RESULTS_NAME)
        say(f"{folder} is finished: nothing is left to train")
        return results
    start = time.perf_counter()
    tokenizer, data, unlabelled = prepare(recipe)
    seconds = {"data": time.perf_counter() - start}
    _rehearse(recipe, tokenizer, data)
    _claim(folder, recipe)  # only now: a recipe that cannot run must not lay its hand on the folder
    dense = _phase(recipe, "dense", tokenizer, data)
    sparse = _phase(recipe, "sparse", tokenizer, data)
    for phase in (dense, sparse):
        seconds |= phase.pop("seconds")
    results = {
        "sparsity": {"target": recipe.pruning.sparsity, **sparse.pop("sparsity")},
        "dense": dense.pop("metrics"),
        "sparse": sparse.pop("metrics"),
        "majority": {name: _majority(recipe.tasks[name][0], rows) for name, rows in data["validation"].items()},
        "examples": _sizes(data),
        "unlabelled": unlabelled,
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
    """Everything `train` does before the first step: loads data and encoder, checks them, trains and writes nothing."""
    _refuse_others(Path(recipe.output_dir), recipe)
    tokenizer, data, unlabelled = prepare(recipe)
    model = _rehearse(recipe, tokenizer, data)
    return {
        "examples": _sizes(data),
        "unlabelled": unlabelled,
        "prunable": sum(p.numel() for p in prunable_parameters(model, recipe.pruning).values()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def evaluate(model_name: str, recipe_path: str | None = None, overrides=()) -> dict[str, Any]:
    """Evaluates a model that `train` wrote on the validation data of its recipe, or of another one.

    Returns:
        {"tasks": {name: {metric: value}}, "average": x, "sparsity": {denominator: fraction}}, metrics in 0 to 100.
    """
    source = resolve(model_name)
    path = recipe_path or Path(source, RECIPE_NAME)
    if not recipe_path and not path.is_file():
        got = "a folder without it; name one by --recipe" if Path(source).is_dir() else "no folder"
        raise UserError(f"{model_name}: expected the folder of a run, which holds {RECIPE_NAME}, got {got}")
    recipe = read_recipe(path, overrides)
    model = _load_pretrained(model_name, MultitaskModel, source)
    _judge_as(recipe, model)
    tokenizer, data, _ = prepare(recipe, source, splits=("validation",))
    with TemporaryDirectory() as folder:  # a Trainer makes its output folder, and evaluation leaves nothing behind
        trainer = _trainer(recipe, "sparse", folder, model, tokenizer, data)
        trainer.remove_callback(PrinterCallback)  # the caller prints the metrics
        metrics = _values(trainer)
    prunable = prunable_parameters(model, recipe.pruning)
    return {**metrics, "sparsity": sparsity_report(model, model.encoder, prunable)}


def _judge_as(recipe: Recipe, model: MultitaskModel) -> None:
    """Gives the model's tasks the recipe's columns and metrics; refuses tasks that its heads were not made for."""
    tasks = model.tasks
    for name, (task, _) in recipe.tasks.items():
        if name in recipe.helpers:
            continue
        if name not in tasks:
            raise UserError(f"tasks.{name}: the model has no such task; it has {', '.join(tasks)}")
        for key in ("problem_type", "labels"):
            expected, got = getattr(tasks[name], key), getattr(task, key)
            require(got == expected, f"tasks.{name}.{key}", f"{expected!r}, as the model was trained", got)
        tasks[name] = task
    model.config.tasks = [task.to_dict() for task in tasks.values()]


def prepare(
    recipe: Recipe, tokenizer_name: str | None = None, splits: tuple[str, ...] = ("train", "validation")
) -> tuple[PreTrainedTokenizerBase, Splits, dict[str, int]]:
    """Loads and tokenizes all tasks.

    Returns:
        The tokenizer, {split: {task: rows}} for `splits`, and {task: examples left out for want of a label}.
    """
    where = "tokenizer" if tokenizer_name else "model.encoder"
    tokenizer = _load_pretrained(where, AutoTokenizer, tokenizer_name or resolve(recipe.model.encoder))
    data: Splits = {split: {} for split in splits}
    unlabelled = dict.fromkeys(recipe.tasks, 0)
    for name, (task, source) in recipe.tasks.items():
        raw = dict(zip(("train", "validation"), load_task(task, source, recipe.seed), strict=True))
        for split in splits:
            if split == "validation" and name in recipe.helpers:
                continue
            rows, left_out = tokenize(raw[split], task, tokenizer, recipe.model.max_length)
            data[split][name] = _by_length(rows) if split == "validation" else rows
            unlabelled[name] += left_out
    return tokenizer, data, unlabelled


def _by_length(rows: Dataset) -> Dataset:
    """The rows from short to long, for evaluation pads a batch to its longest text."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))


def _sizes(data: Splits) -> dict[str, dict[str, int]]:
    return {split: {name: len(rows) for name, rows in tasks.items()} for split, tasks in data.items()}


def _phase(recipe: Recipe, phase: str, tokenizer: PreTrainedTokenizerBase, data: Splits) -> dict[str, Any]:
    """Trains and evaluates one phase, or what is left of it; a finished one is only read."""
    folder = Path(recipe.output_dir, phase)
    if (folder / PHASE_NAME).is_file():
        return _read(folder / PHASE_NAME)
    model = _new_model(recipe) if phase == "dense" else _load_model(Path(recipe.output_dir, "dense"))
    trainer = _trainer(recipe, phase, folder, model, tokenizer, data)
    checkpoint = last_whole_checkpoint(folder)
    say(f"{phase} training, {_steps(trainer)} steps" + (f", resumed from {checkpoint}" if checkpoint else ""))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    trained = time.perf_counter()
    say(f"evaluation of the {phase} model on {', '.join(data['validation'])}")
    metrics = _values(trainer)
    seconds = {f"{phase}_training": trained - start, f"{phase}_evaluation": time.perf_counter() - trained}
    for name in recipe.helpers if phase == "dense" else ():
        model.remove_task(name)
    trainer.save_model(str(folder))
    result = {
        "metrics": metrics,
        "seconds": seconds,
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "sparsity": sparsity_report(model, model.encoder, prunable_parameters(model, recipe.pruning)),
    }
    _write(folder / PHASE_NAME, json.dumps(result))
    return result


def say(line: str) -> None:
    """A line beside the progress bars: what is going on now."""
    tqdm.write(line, file=sys.stderr)


def progress(recipe: Recipe) -> str:
    """Where the next `train` of this recipe would go on."""
    phase = "sparse" if Path(recipe.output_dir, "dense", PHASE_NAME).is_file() else "dense"
    return last_whole_checkpoint(Path(recipe.output_dir, phase)) or f"the start of the {phase} phase"


def _trainer(recipe: Recipe, phase: str, folder: str | Path, model, tokenizer, data: Splits) -> DisparseTrainer:
    arguments = recipe.arguments(phase, folder)
    train = data.get("train")
    if train and phase == "sparse":
        train = {name: rows for name, rows in train.items() if name not in recipe.helpers}
    try:
        return DisparseTrainer(
            model,
            arguments,
            pruning_config=recipe.pruning if phase == "sparse" else None,
            train_dataset=train,
            eval_dataset=data["validation"],
            processing_class=tokenizer,
        )
    except UserError:
        raise
    except (ImportError, RuntimeError, ValueError) as error:  # what the arguments ask for is not installed, or not here
        raise UserError(f"training: Trainer refuses these values: {one_line(error)}") from error


def _rehearse(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: Splits) -> MultitaskModel:
    """Refuses before the first step what would end training hours later; returns the model that would be trained."""
    model = _new_model(recipe)
    _check_length(recipe, model, data)
    for phase in ("dense", "sparse"):
        with TemporaryDirectory() as folder:
            trainer = _trainer(recipe, phase, folder, model, tokenizer, data)
            state = TrainerState(max_steps=_steps(trainer))
            trainer.pruner.on_train_begin(trainer.args, state, trainer.control, model=model)
    return model


def _steps(trainer: DisparseTrainer) -> int:
    """The optimizer steps that training will take."""
    args, batches = trainer.args, len(trainer.get_train_dataloader())
    in_epochs = math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)
    return in_epochs if args.max_steps < 0 else args.max_steps


def _check_length(recipe: Recipe, model: MultitaskModel, data: Splits) -> None:
    """Runs the longest text of each task if it may have more tokens than the encoder has positions."""
    positions = getattr(model.config.encoder_config, "max_position_embeddings", None) or math.inf
    for name in recipe.tasks:
        longest = max((ids for split in data.values() if name in split for ids in split[name]["input_ids"]), key=len)
        if len(longest) <= positions - 2:  # RoBERTa and its kin keep two for themselves
            continue
        try:
            with torch.no_grad():
                model.encoder(input_ids=torch.tensor([longest]))
        except (IndexError, RuntimeError) as error:
            raise UserError(
                f"model.max_length: expected no more tokens than the encoder has positions, {positions}, got a text of "
                f"{len(longest)} in task '{name}'; lower it"
            ) from error


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
    return _load_pretrained("model.encoder", MultitaskModel, resolve(recipe.model.encoder), "from_encoder", tasks)


def _load_model(folder: str | Path) -> MultitaskModel:
    return _load_pretrained("output_dir", MultitaskModel, str(folder))


def _load_pretrained(where: str, cls, name: str, method: str = "from_pretrained", *arguments):
    """`cls.from_pretrained(name)`; a model that is not there or does not load is the user's to mend."""
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise UserError(f"{where}: expected a Hub id or a folder, but there is no folder {name}")
    try:
        return getattr(cls, method)(name, *arguments)
    except UserError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and the Hub raise a dozen kinds here
        got = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{where}: expected a model that loads from {name}, got {got}") from error


def _refuse_others(folder: Path, recipe: Recipe) -> None:
    """Refuses a folder that holds another run or something else, and changes nothing."""
    path = folder / RECIPE_NAME
    try:
        theirs = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
        others = theirs is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"output_dir: cannot read {folder}: {one_line(error)}") from error
    if others or not isinstance(theirs, dict | None):
        raise UserError(
            f"output_dir: expected a new or empty folder, or one of this run, got {folder}, which holds something else.\n"
            "Give this run its own --output_dir."
        )
    mine = recipe.values
    # A run may be moved and go on elsewhere: where it is does not make it another one.
    keys = sorted(k for k in {*(theirs or mine), *mine} - {"output_dir"} if (theirs or mine).get(k) != mine.get(k))
    if keys:
        raise UserError(
            f"output_dir: {folder} holds another run, which differs in {', '.join(keys)}.\n"
            "Give this one its own --output_dir, or delete that folder to start over."
        )


def _claim(folder: Path, recipe: Recipe) -> None:
    """Marks the folder as this recipe's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / RECIPE_NAME).is_file():
            _write(folder / RECIPE_NAME, yaml.safe_dump(recipe.values, sort_keys=False))
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {folder}: {error.strerror}; name another one") from error


def _read(path: Path) -> dict[str, Any]:
    """What `_write` wrote there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"output_dir: expected JSON in {path}, got a file that does not parse: {one_line(error)}.\n"
            "Delete that file, and the same command makes it again."
        ) from error


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
