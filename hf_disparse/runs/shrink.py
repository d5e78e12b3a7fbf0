"""Shrinks a model to a speed: that of a run between dense training and recovery, or a finished one by itself."""

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase, PrinterCallback

from hf_disparse.config import SpeedConfig, UserError
from hf_disparse.distributed.processes import launched, on_main, say
from hf_disparse.export.card import write_card
from hf_disparse.export.measurements import measure_speed
from hf_disparse.export.results import RESULTS_NAME
from hf_disparse.files import new_folder, sync, write_whole, writing
from hf_disparse.model.loading import load_model, load_pretrained
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.model.prunable import prunable_parameters
from hf_disparse.model.sparsity import sparsity_report
from hf_disparse.recipes.recipe import Recipe, public
from hf_disparse.recipes.yaml_text import dump_yaml
from hf_disparse.runs.evaluate import judge_as, metrics_on, open_run
from hf_disparse.runs.folder import PHASE_NAME, RECIPE_NAME, find_json
from hf_disparse.runs.setup import Splits, environment, new_trainer, only_judging, prepare, sizes
from hf_disparse.speed.shrink import Shrunk, shrink
from hf_disparse.trainer import DisparseTrainer
from hf_disparse.trainer.scoring import ScoringBatches

TABLE_NAME = "latency.json"  # seconds of heads and neurons on the machine that shrank the model


@on_main
def shrink_phase(
    recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerBase, data: Splits, start: Path
) -> dict[str, Any]:
    """Writes the shrunk model into `folder`; the result of a finished phase is read. One process does it, the others wait.

    Args:
        start: the folder of the dense model.

    Returns:
        The fields of `Shrunk`, and `seconds`.
    """
    if done := find_json(folder / PHASE_NAME):
        return done
    begin, model, config = time.perf_counter(), load_model(start).float(), recipe.pruning
    trainer = new_trainer(only_judging(recipe), "sparse", folder, model, tokenizer, data)
    found = _shrink(model, trainer, recipe, config)
    result = {**found.to_dict(), "seconds": time.perf_counter() - begin}
    with writing(folder):
        _save(model, config, found, folder)
        sync(folder)
        write_whole(folder / PHASE_NAME, json.dumps(result))
    return result


def shrink_model(
    model_name: str,
    output_dir: str | Path,
    config: SpeedConfig,
    recipe_path: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes a faster copy of a finished model into the new folder `output_dir`; nothing is trained.

    Args:
        model_name: a folder that `train` wrote, or the Hub id of a MultitaskModel.
        recipe_path: the recipe with the tasks and data; default: the model's own.

    Returns:
        The content of the copy's `results.json`: metrics before (`dense`) and after (`sparse`), and `shrunk`.

    Raises:
        UserError: as `shrink`; also if `output_dir` is not new.
    """
    if launched() != 1:
        raise UserError("shrink: expected one process, without torchrun")
    source, recipe = open_run(model_name, recipe_path, overrides)
    recipe = only_judging(replace(recipe, pruning=config, output_dir=str(output_dir)))
    with new_folder(output_dir) as folder:
        model = load_pretrained(model_name, MultitaskModel, source).float()
        judge_as(recipe, model)
        tokenizer, data, unlabelled = prepare(recipe, source)
        with TemporaryDirectory() as scratch:  # a Trainer creates its output folder
            trainer = new_trainer(recipe, "sparse", scratch, model, tokenizer, data)
            trainer.remove_callback(PrinterCallback)
            say(f"evaluation before, on {', '.join(data['validation'])}")
            before = metrics_on(trainer, data)
            found = _shrink(model, trainer, recipe, config)
            say("evaluation after")
            after = metrics_on(trainer, data)
        results = {
            "recipe": public(recipe),
            "dense": before,
            "sparse": after,
            "shrunk": found.to_dict(),
            "sparsity": sparsity_report(model, model.encoder, prunable_parameters(model)),
            "examples": sizes(data),
            "unlabelled": unlabelled,
            "speed": measure_speed(model, recipe.model.max_length, load_pretrained(model_name, MultitaskModel, source)),
            "environment": environment(),
        }
        _save(model, config, found, folder)
        tokenizer.save_pretrained(folder)
        write_whole(folder / RECIPE_NAME, dump_yaml(recipe.values))
        write_whole(folder / RESULTS_NAME, json.dumps(results, indent=2) + "\n")
        write_card(folder, Path(output_dir).resolve().name, results=results)
    return results


def _save(model: MultitaskModel, config: SpeedConfig, found: Shrunk, folder: Path) -> None:
    """Writes a shrunk model, its config and the table that it was shrunk by."""
    model.save_pretrained(folder)
    config.save_pretrained(folder)
    write_whole(folder / TABLE_NAME, json.dumps(asdict(found.table), indent=1) + "\n")


def _shrink(model: MultitaskModel, trainer: DisparseTrainer, recipe: Recipe, config: SpeedConfig) -> Shrunk:
    """Shrinks a model in place by batches of its training data, and says so."""
    streams = {task: ScoringBatches(trainer, task, config.seed) for task in recipe.voters}
    batches = {task: list(itertools.islice(stream, config.score_batches)) for task, stream in streams.items()}
    config = replace(config, length=config.length or recipe.model.max_length)
    say(f"shrinking, {config.aim()} in the runtime {config.runtime}")
    found = shrink(model, batches, config, progress=not recipe.sparse.disable_tqdm)
    say(found.sentence())
    return found
