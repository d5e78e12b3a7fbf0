"""A recipe's run: dense training, pruning, sparse training, evaluation of both, one file of results. Layer 10.

A run folder holds `recipe.yaml`, one folder per phase with its checkpoints and its finished model, and, once it is done,
the sparse model with its tokenizer and `results.json` on top. Starting the same run again goes on where it stopped. Of several
processes all train and evaluate, and the main one writes and prints.
"""

import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, TrainerState, set_seed

import hf_disparse
from hf_disparse.model.architectures import token_limit
from hf_disparse.config import UserError, one_line, require
from hf_disparse.runs.dense import expect_dense, take_dense
from hf_disparse.distributed.processes import from_main, is_main
from hf_disparse.export.card import RESULTS_NAME, losses_of_log, write_card
from hf_disparse.files import writing
from hf_disparse.model.low_rank import dense_size
from hf_disparse.pruning.masks import sparsity_report
from hf_disparse.model.multitask import MultitaskModel, prunable_parameters
from hf_disparse.model.loading import load_model, load_pretrained
from hf_disparse.recipes.recipe import Recipe, public, read_recipe
from hf_disparse.runs.folder import PHASE_NAME, RECIPE_NAME, alone_in, check_data, claim, find_json, note_data, refuse_others, write_whole
from hf_disparse.pruning.stored_scores import SCORES_FOLDER
from hf_disparse.tasks import average, load_task, resolve, tokenize
from hf_disparse.runs.teachers import teachers_of, try_teachers
from hf_disparse.trainer import DisparseTrainer, last_whole_checkpoint
from hf_disparse.trainer.checkpoints import sync

Splits = dict[str, dict[str, Dataset]]


def train(recipe: Recipe) -> dict[str, Any]:
    """Runs a recipe, or what is left of it, and returns what it writes to `results.json`.

    Raises:
        UserError: the output folder holds another run, or something the recipe names is not there or not right.
    """
    folder = Path(recipe.output_dir)
    refuse_others(folder, recipe)
    if results := find_json(folder / RESULTS_NAME):
        say(f"{folder} is finished: nothing is left to train")
        return results
    expect_dense(recipe, folder / "dense")
    start = time.perf_counter()
    tokenizer, data, unlabelled = prepare(recipe)
    digests = check_data(folder, recipe, data)
    seconds = {"data": time.perf_counter() - start}
    rehearse(recipe, tokenizer, data)
    claim(folder, recipe)  # only now: a recipe that cannot run must not lay its hand on the folder
    with alone_in(folder):
        refuse_others(folder, recipe)  # another command may have claimed it since that was asked
        note_data(folder, recipe.seed, digests)
        dense = train_phase(recipe, "dense", folder / "dense", tokenizer, data)
        sparse = train_phase(recipe, "sparse", folder / "sparse", tokenizer, data, start=folder / "dense")
        for phase in (dense, sparse):
            seconds |= phase.pop("seconds")
        results = {
            "recipe": public(recipe),
            "sparsity": {"target": recipe.pruning.sparsity, **sparse.pop("sparsity")},
            "dense": dense.pop("metrics"),
            "sparse": sparse.pop("metrics"),
            "majority": {name: _majority(recipe.tasks[name][0], rows) for name, rows in data["validation"].items()},
            "examples": sizes(data),
            "unlabelled": unlabelled,
            "bytes": {"dense": dense.pop("bytes"), "sparse": sparse.pop("bytes")},
            "seconds": {**seconds, "total": sum(seconds.values())},
            "log": [
                {"phase": name, **row} for name, p in (("dense", dense), ("sparse", sparse)) for row in p.pop("log")
            ],
            "environment": environment(),
        }
        if "guard" in sparse:
            results["guard"] = sparse["guard"]
        from_main(lambda: _finish(recipe, folder, tokenizer, results))
    return results


def _finish(recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerBase, results: dict[str, Any]) -> None:
    """Puts the sparse model with all that belongs to it on top of the run's folder, and last what says that it is finished."""
    with writing(folder):
        model = load_model(folder / "sparse")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        recipe.pruning.save_pretrained(folder)
        if (folder / "sparse" / SCORES_FOLDER).is_dir():  # not after a run that stopped right here
            shutil.rmtree(folder / SCORES_FOLDER, ignore_errors=True)
            (folder / "sparse" / SCORES_FOLDER).rename(folder / SCORES_FOLDER)
        write_card(folder, results=results)
        sync(folder)
        write_whole(folder / RESULTS_NAME, json.dumps(results, indent=2) + "\n")


def plan(recipe: Recipe) -> dict[str, Any]:
    """Everything `train` does before the first step: loads data and encoder, checks them, trains and writes nothing."""
    refuse_others(Path(recipe.output_dir), recipe)
    expect_dense(recipe, Path(recipe.output_dir, "dense"))
    tokenizer, data, unlabelled = prepare(recipe)
    check_data(Path(recipe.output_dir), recipe, data)
    model = rehearse(recipe, tokenizer, data)
    return {
        "examples": sizes(data),
        "unlabelled": unlabelled,
        "prunable": dense_size(model, prunable_parameters(model, recipe.pruning).values()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def evaluate(model_name: str, recipe_path: str | None = None, overrides=()) -> dict[str, Any]:
    """Evaluates a model that `train` wrote on the validation data of its recipe, or of another one.

    Returns:
        {"tasks": {name: {metric: value}}, "average": x, "sparsity": {denominator: fraction}}, metrics in 0 to 100.
    """
    source, recipe = open_run(model_name, recipe_path, overrides)
    # It trains nothing that a tracker would show.
    recipe = replace(recipe, recovery={**recipe.recovery, "report_to": "none"})
    model = load_pretrained(model_name, MultitaskModel, source)
    judge_as(recipe, model)
    tokenizer, data, _ = prepare(recipe, source, splits=("validation",))
    with TemporaryDirectory() as folder:  # a Trainer makes its output folder, and evaluation leaves nothing behind
        trainer = new_trainer(recipe, "sparse", folder, model, tokenizer, data)
        trainer.remove_callback(PrinterCallback)  # the caller prints the metrics
        metrics = _values(trainer, data)
    prunable = prunable_parameters(model, recipe.pruning)
    return {**metrics, "sparsity": sparsity_report(model, model.encoder, prunable)}


def open_run(model_name: str, recipe_path: str | None, overrides=()) -> tuple[str, Recipe]:
    """A model's folder or Hub id, resolved, and the recipe it comes with, or another one."""
    source = resolve(model_name)
    path = recipe_path or Path(source, RECIPE_NAME)
    if not recipe_path and not path.is_file():
        got = "a folder without it" if Path(source).is_dir() else "no folder"
        raise UserError(
            f"{model_name}: expected the folder of a run, which holds {RECIPE_NAME}, got {got}; name a recipe by --recipe"
        )
    return source, read_recipe(path, overrides)


def judge_as(recipe: Recipe, model: MultitaskModel) -> None:
    """Gives the model's tasks the recipe's columns and metrics; refuses tasks that its heads were not made for."""
    tasks = model.tasks
    for name, (task, _) in recipe.voters.items():
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
        The tokenizer, {split: {task: rows}} for `splits`, and {task: examples left out for want of a label}. A recipe
        that chooses its best model has half of the validation data in a split `selection`, for that and nothing else.
    """
    where = "tokenizer" if tokenizer_name else "model.encoder"
    # Words that come one by one are those of a text to a byte-level tokenizer only with this, which others ignore.
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
    """The rows from short to long, for evaluation pads a batch to its longest text."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))


def sizes(data: Splits) -> dict[str, dict[str, int]]:
    """Split -> task -> number of examples."""
    return {split: {name: len(rows) for name, rows in tasks.items()} for split, tasks in data.items()}


def train_phase(
    recipe: Recipe,
    phase: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    data: Splits,
    start: Path | None = None,
) -> dict[str, Any]:
    """Trains and evaluates one phase in `folder`, or what is left of it; a finished one is only read.

    Args:
        start: the folder of the finished dense phase, for the sparse one.
    """
    if phase == "dense":
        take_dense(recipe, folder)
    if done := find_json(folder / PHASE_NAME):
        return done
    model = load_model(start) if start else new_model(recipe)
    teachers = teachers_of(recipe, phase, tokenizer, partial(load_model, start) if start else None)
    trainer = new_trainer(recipe, phase, folder, model, tokenizer, data, teachers)
    checkpoint = from_main(lambda: last_whole_checkpoint(folder))
    say(f"{phase} training, {_steps(trainer)} steps" + (f", resumed from {checkpoint}" if checkpoint else ""))
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds, trained = {f"{phase}_training": trainer.seconds}, time.perf_counter()
    say(f"evaluation of the {phase} model on {', '.join(data['validation'])}")
    metrics = _values(trainer, data)
    seconds[f"{phase}_evaluation"] = time.perf_counter() - trained
    for name in recipe.helpers if phase == "dense" else ():
        model.remove_task(name)
    with writing(folder):
        trainer.save_model(str(folder))
        from_main(lambda: sync(folder))  # before the file that says that the phase is done
    result = {
        "metrics": metrics,
        "seconds": seconds,
        "backward_passes": trainer.backward_passes,
        "precision": next((p for p in ("bf16", "fp16") if getattr(trainer.args, p)), "float32"),
        "bytes": from_main(lambda: sum(file.stat().st_size for file in folder.glob("*.safetensors"))),
        "sparsity": sparsity_report(model, model.encoder, prunable_parameters(model, recipe.pruning)),
        "prunable": dense_size(model, prunable_parameters(model, recipe.pruning).values()),
        "log": losses_of_log(trainer.state.log_history),
    }
    if trainer.pruner.guard:
        result["guard"] = trainer.pruner.guard.report()
    with writing(folder):
        from_main(lambda: write_whole(folder / PHASE_NAME, json.dumps(result)))
    return result


def say(line: str) -> None:
    """A line beside the progress bars: what is going on now."""
    if is_main():
        tqdm.write(line, file=sys.stderr)


def progress(recipe: Recipe) -> str:
    """Where the next `train` of this recipe would go on."""
    phase = "sparse" if Path(recipe.output_dir, "dense", PHASE_NAME).is_file() else "dense"
    return last_whole_checkpoint(Path(recipe.output_dir, phase)) or f"the start of the {phase} phase"


def new_trainer(recipe: Recipe, phase: str, folder, model, tokenizer, data: Splits, teachers=None) -> DisparseTrainer:
    """The trainer of a phase, its checkpoints in `folder`."""
    arguments = recipe.arguments(phase, folder)
    train = data.get("train")
    if train and phase == "sparse":
        train = {name: train[name] for name in recipe.voters}
    with _judged_by_trainer(phase, ImportError, RuntimeError, ValueError):
        return DisparseTrainer(
            model,
            arguments,
            pruning_config=recipe.pruning if phase == "sparse" else None,
            teachers=teachers,
            train_dataset=train,
            eval_dataset=data.get("selection", data["validation"]),
            processing_class=tokenizer,
        )


@contextmanager
def _judged_by_trainer(phase: str, *errors: type[Exception]) -> Iterator[None]:
    """Makes one line of what transformers raises where arguments ask for what is not installed, not here or not possible."""
    try:
        yield
    except UserError:
        raise
    except errors as error:
        section = "training" if phase == "dense" else "training or recovery"
        raise UserError(f"{section}: Trainer refuses these values: {one_line(error)}") from error


def rehearse(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: Splits) -> MultitaskModel:
    """Refuses before the first step what would end training hours later; returns the model that would be trained."""
    model = new_model(recipe)
    _check_length(recipe, model, data)
    for phase in ("dense", "sparse"):
        teachers = teachers_of(recipe, phase, tokenizer, (lambda: model) if phase == "sparse" else None)
        with TemporaryDirectory() as folder:
            trainer = new_trainer(recipe, phase, folder, model, tokenizer, data, teachers)
            state = TrainerState(max_steps=_steps(trainer))
            trainer.pruner.on_train_begin(trainer.args, state, trainer.control, model=model)
            try_teachers(trainer)
            with _judged_by_trainer(phase, ArithmeticError, ImportError, RuntimeError, TypeError, ValueError):
                trainer.create_optimizer_and_scheduler(state.max_steps)
    return model


def _steps(trainer: DisparseTrainer) -> int:
    """The optimizer steps that training will take."""
    args, batches = trainer.args, len(trainer.get_train_dataloader())
    in_epochs = math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)
    return in_epochs if args.max_steps < 0 else args.max_steps


def _check_length(recipe: Recipe, model: MultitaskModel, data: Splits) -> None:
    """Runs the longest text of each task if it may have more tokens than the encoder has positions."""
    limit = token_limit(model.config.encoder_config)
    for name in recipe.tasks:
        longest = max((ids for split in data.values() if name in split for ids in split[name]["input_ids"]), key=len)
        if limit is None or len(longest) <= limit:
            continue
        try:
            with torch.no_grad():
                model.encoder(input_ids=torch.tensor([longest]))
        except (IndexError, RuntimeError) as error:
            positions = model.config.encoder_config.max_position_embeddings
            raise UserError(
                f"model.max_length: expected no more tokens than the encoder has positions, {positions}, got a text of "
                f"{len(longest)} in task '{name}'; lower it"
            ) from error


def _values(trainer: DisparseTrainer, data: Splits) -> dict[str, Any]:
    """{"tasks": {name: {metric: value}}, "average": x} on the validation data, in GLUE's 0 to 100."""
    metrics = trainer.evaluate(data["validation"])
    tasks = {
        name: {metric: 100 * metrics[f"eval_{name}_{metric}"] for metric in trainer.model.tasks[name].metric}
        for name in data["validation"]
    }
    return {"tasks": tasks, "average": average(tasks)}


def _majority(task, rows: Dataset) -> float | None:
    """Accuracy, in 0 to 100, of always answering the most frequent class; None where that has no meaning."""
    if task.problem_type != "single_label_classification":
        return None
    counts = torch.bincount(torch.tensor(rows["labels"]))
    return 100 * counts.max().item() / len(rows)


def new_model(recipe: Recipe) -> MultitaskModel:
    """The recipe's pretrained encoder with fresh heads, the same for the same seed.

    In float32 however it is stored: in half precision most of what a step adds to a weight is rounded away.
    """
    set_seed(recipe.seed)
    tasks, encoder = [task for task, _ in recipe.tasks.values()], resolve(recipe.model.encoder)
    return load_pretrained("model.encoder", MultitaskModel, encoder, "from_encoder", tasks, dtype=torch.float32)


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
