"""Runs a recipe: dense training, pruning, sparse training, evaluation of both, one file of results.

A run folder holds `recipe.yaml` and one folder per phase with its checkpoints and its finished model. A finished run also has
the sparse model, its tokenizer and `results.json` at the top. Starting the same run again goes on where it stopped. All
processes train and evaluate; the main one writes and prints.
"""

import json
import math
import shutil
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_disparse.config import UserError
from hf_disparse.distributed.processes import on_main, say
from hf_disparse.export.card import write_card
from hf_disparse.export.measurements import measure_speed
from hf_disparse.export.results import RESULTS_NAME, losses_of_log
from hf_disparse.fast.families import token_limit
from hf_disparse.files import sync, write_whole, writing
from hf_disparse.model.loading import load_model
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.model.prunable import prunable_parameters
from hf_disparse.model.sparsity import dense_size, sparsity_report
from hf_disparse.pruning.stored_scores import SCORES_FOLDER
from hf_disparse.recipes.recipe import Recipe, public
from hf_disparse.runs.dense import expect_dense, take_dense
from hf_disparse.runs.evaluate import metrics_on
from hf_disparse.runs.folder import PHASE_NAME, alone_in, check_data, claim, find_json, note_data, refuse_others
from hf_disparse.runs.setup import Splits, environment, new_model, new_trainer, prepare, refused_by_trainer, sizes
from hf_disparse.runs.shrink import shrink_phase
from hf_disparse.runs.teachers import teachers_of, try_teachers
from hf_disparse.trainer import DisparseTrainer, last_whole_checkpoint


def train(recipe: Recipe) -> dict[str, Any]:
    """Runs a recipe, or the rest of an interrupted run, and returns the content of `results.json`.

    Raises:
        UserError: the output folder holds another run, or something that the recipe names is missing or wrong.
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
    claim(folder, recipe)  # only now, so that a recipe that cannot run leaves the folder untouched
    with alone_in(folder):
        refuse_others(folder, recipe)  # another command may have claimed it since the first check
        note_data(folder, recipe.seed, digests)
        dense = train_phase(recipe, "dense", folder / "dense", tokenizer, data)
        start = folder / "dense"
        shrunk = None
        if not recipe.pruning.in_training:
            start, shrunk = folder / "shrunk", shrink_phase(recipe, folder / "shrunk", tokenizer, data, start)
            seconds["shrinking"] = shrunk.pop("seconds")
        sparse = train_phase(recipe, "sparse", folder / "sparse", tokenizer, data, start)
        for phase in (dense, sparse):
            seconds |= phase.pop("seconds")
        results = {
            "recipe": public(recipe),
            "sparsity": {**_target(recipe), **sparse.pop("sparsity")},
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
        if shrunk:
            results["shrunk"] = shrunk
        if "guard" in sparse:
            results["guard"] = sparse["guard"]
        _finish(recipe, folder, tokenizer, results)
    return results


def _target(recipe: Recipe) -> dict[str, float]:
    """Returns the sparsity that pruning aims at; none if it aims at a speed."""
    return {"target": recipe.pruning.sparsity} if recipe.pruning.in_training else {}


@on_main
def _finish(recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerBase, results: dict[str, Any]) -> None:
    """Measures the sparse model's speed; writes model, tokenizer and card to the run's folder, and last `results.json`, which marks it finished."""
    model = load_model(folder / "sparse")
    say("speed of the sparse model")
    dense = None if recipe.pruning.in_training else load_model(folder / "dense")
    results["speed"] = measure_speed(model, recipe.model.max_length, dense)
    with writing(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        recipe.pruning.save_pretrained(folder)
        if (folder / "sparse" / SCORES_FOLDER).is_dir():  # already moved if an earlier try stopped right here
            shutil.rmtree(folder / SCORES_FOLDER, ignore_errors=True)
            (folder / "sparse" / SCORES_FOLDER).rename(folder / SCORES_FOLDER)
        write_card(folder, results=results)
        sync(folder)
        write_whole(folder / RESULTS_NAME, json.dumps(results, indent=2) + "\n")


def plan(recipe: Recipe) -> dict[str, Any]:
    """Does what `train` does before the first step: loads and checks data and encoder; trains and writes nothing."""
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


def train_phase(
    recipe: Recipe,
    phase: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    data: Splits,
    start: Path | None = None,
) -> dict[str, Any]:
    """Trains and evaluates one phase in `folder`, or the rest of it; the result of a finished phase is read.

    Args:
        start: the folder of the model to start from, for the sparse phase.
    """
    if phase == "dense":
        take_dense(recipe, folder)
    if done := find_json(folder / PHASE_NAME):
        return done
    model = load_model(start) if start else new_model(recipe)
    taught_by = start if recipe.pruning.in_training else folder.parent / "dense"
    teachers = teachers_of(recipe, phase, tokenizer, partial(load_model, taught_by) if start else None)
    trainer = new_trainer(recipe, phase, folder, model, tokenizer, data, teachers)
    checkpoint = on_main(last_whole_checkpoint)(folder)
    say(f"{phase} training, {_steps(trainer)} steps" + (f", resumed from {checkpoint}" if checkpoint else ""))
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds, trained = {f"{phase}_training": trainer.seconds}, time.perf_counter()
    say(f"evaluation of the {phase} model on {', '.join(data['validation'])}")
    metrics = metrics_on(trainer, data)
    seconds[f"{phase}_evaluation"] = time.perf_counter() - trained
    for name in recipe.helpers if phase == "dense" else ():
        model.remove_task(name)
    with writing(folder):
        trainer.save_model(str(folder))
        on_main(sync)(folder)  # before the file that marks the phase as finished
    prunable = prunable_parameters(model, recipe.pruning)
    result = {
        "metrics": metrics,
        "seconds": seconds,
        "backward_passes": trainer.backward_passes,
        "precision": next((p for p in ("bf16", "fp16") if getattr(trainer.args, p)), "float32"),
        "bytes": _weight_bytes(folder),
        "sparsity": sparsity_report(model, model.encoder, prunable),
        "prunable": dense_size(model, prunable.values()),
        "log": losses_of_log(trainer.state.log_history),
    }
    if trainer.pruner.guard:
        result["guard"] = trainer.pruner.guard.report()
    with writing(folder):
        on_main(write_whole)(folder / PHASE_NAME, json.dumps(result))
    return result


@on_main
def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def progress(recipe: Recipe) -> str:
    """Returns where the next `train` of this recipe would go on; called by one process."""
    phase = "sparse" if Path(recipe.output_dir, "dense", PHASE_NAME).is_file() else "dense"
    return last_whole_checkpoint(Path(recipe.output_dir, phase)) or f"the start of the {phase} phase"


def rehearse(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: Splits) -> MultitaskModel:
    """Raises UserError for what would end training hours later, and returns the model that would be trained."""
    model = new_model(recipe)
    _check_length(recipe, model, data)
    for phase in ("dense", "sparse"):
        teachers = teachers_of(recipe, phase, tokenizer, (lambda: model) if phase == "sparse" else None)
        with TemporaryDirectory() as folder:
            trainer = new_trainer(recipe, phase, folder, model, tokenizer, data, teachers)
            steps = _steps(trainer)
            trainer.pruner.check(model, trainer.args, steps)
            try_teachers(trainer)
            with refused_by_trainer(phase, ArithmeticError, ImportError, RuntimeError, TypeError, ValueError):
                trainer.create_optimizer_and_scheduler(steps)
    return model


def _steps(trainer: DisparseTrainer) -> int:
    """Returns the number of optimizer steps of a training."""
    args, batches = trainer.args, len(trainer.get_train_dataloader())
    in_epochs = math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)
    return in_epochs if args.max_steps < 0 else args.max_steps


def _check_length(recipe: Recipe, model: MultitaskModel, data: Splits) -> None:
    """Encodes the longest text of each task if it may have more tokens than the encoder has positions."""
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
                f"model.max_length: the encoder has {positions} positions, but a text of task '{name}' has {len(longest)} "
                "tokens; lower it"
            ) from error


def _majority(task, rows: Dataset) -> float | None:
    """Returns the accuracy, in 0 to 100, of always answering the most frequent class; None unless each text has one class."""
    if task.problem_type != "single_label_classification":
        return None
    counts = torch.bincount(torch.tensor(rows["labels"]))
    return 100 * counts.max().item() / len(rows)
