"""`hf-disparse analyze`: the measures of `hf_disparse.analysis` on a model or the stages of a run, with its recipe's data. Layer 10."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_disparse.analysis import Examination, cost_curve, footprint, masks_at
from hf_disparse.analysis.bootstrap import DRAWS
from hf_disparse.config import TASK_CRITERIA, PruningConfig, UserError, is_count, is_number, require
from hf_disparse.distributed.processes import launched, say
from hf_disparse.files import write_whole
from hf_disparse.model.architectures import find_sites
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.model.prunable import prunable_parameters
from hf_disparse.model.unshared import PRIVATE
from hf_disparse.pruning.masks import apply_masks
from hf_disparse.pruning.rules import decide_by
from hf_disparse.pruning.scores import gradients
from hf_disparse.recipes.recipe import Recipe
from hf_disparse.report.write import write_report
from hf_disparse.runs.evaluate import judge_as, open_run
from hf_disparse.runs.folder import RECIPE_NAME
from hf_disparse.runs.setup import Splits, new_model, new_trainer, prepare
from hf_disparse.runs.train import load_model
from hf_disparse.tasks import average
from hf_disparse.trainer import DisparseTrainer

ANALYSIS_NAME, VERSION = "analysis.json", 1
CURVE_ROWS = 1000  # validation examples per task and point, drawn once


@dataclass(frozen=True)
class Curve:
    """What cost curve to measure: `sparsities` (none above 0: no curve), and `within` and `recover` (steps) as the command has them."""

    sparsities: tuple[float, ...] = ()
    within: float | None = None
    recover: int = 0

    def __post_init__(self):
        for sparsity in self.sparsities:
            require(0 <= sparsity < 1, "--sparsities", "numbers in [0, 1)", sparsity)
        good = self.within is None or (is_number(self.within) and self.within >= 0)
        require(good, "--within", "points of at least 0", self.within)
        require(is_count(self.recover, 0), "--recover", "a number of steps", self.recover)


@dataclass(frozen=True)
class _Setup:
    """What all stages share."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    data: Splits

    def trainer(self, model: MultitaskModel, folder: str) -> DisparseTrainer:
        judge_as(self.recipe, model)
        return new_trainer(self.recipe, "sparse", folder, model, self.tokenizer, self.data)


def analyze(
    model_name: str,
    recipe_path: str | None = None,
    overrides=(),
    *,
    curve: Curve | None = None,
    draws: int = DRAWS,
    output_dir: str | None = None,
) -> tuple[dict[str, Any], str]:
    """Measures a model, or what a run's folder has of its stages, and writes analysis.json, the report and its figures.

    Returns:
        What analysis.json holds, and the folder that it is in.

    Raises:
        UserError: there is no such folder, recipe or data, there are several processes, or scoring met a loss that is not
            finite.
    """
    require(launched() == 1, "analyze", "one process, without torchrun", launched())
    source, recipe = open_run(model_name, recipe_path, overrides)
    folder = output_dir or source
    if not output_dir and not Path(source).is_dir():
        raise UserError(f"{model_name}: expected a folder to write to, got a Hub id; name one by --output_dir")
    recipe = _plain(recipe)
    loads = _stages(Path(source), recipe)
    tokenizer, data, _ = prepare(recipe, source if Path(source, "tokenizer_config.json").is_file() else None)
    setup, stages, costs, model = _Setup(recipe, tokenizer, data), [], None, None
    wanted = curve is not None and any(curve.sparsities)
    for name, load in loads.items():
        model = load()
        name = name or _stage_of(model, recipe)
        say(f"analysis: {name}")
        measures, found = _examine(setup, model, draws, wanted and name == "dense")
        stages.append({"name": name, **measures})
        costs = costs if found is None else (load, found)
    if wanted and costs is None:
        say("no cost curve: it starts from a dense model, and there is none here")
    result = {
        "version": VERSION,
        "model": Path(source).resolve().name if Path(source).is_dir() else model_name,
        "tasks": list(recipe.voters),
        "criterion": recipe.pruning.criterion,
        "sparsity": recipe.pruning.sparsity,
        "score_batches": recipe.pruning.score_batches,
        "seed": recipe.seed,
        "stages": stages,
        "curve": _measure_curve(setup, *costs, curve) if wanted and costs else None,
        "footprint": footprint(model),
    }
    write(result, folder)
    return result, folder


def after_training(recipe: Recipe) -> dict[str, Any] | None:
    """A short analysis of a finished run: few batches and draws, no curve; None if the folder has one already.

    Where there are several processes it is left out. What goes wrong here does not undo the training: it is said, and nothing
    is written.
    """
    folder = Path(recipe.output_dir)
    if (folder / ANALYSIS_NAME).is_file():
        return None
    if launched() > 1:
        say(f"no analysis, which one process makes afterwards: hf-disparse analyze {folder}")
        return None
    batches = min(4, recipe.pruning.score_batches)
    try:
        return analyze(str(folder), None, [f"pruning.score_batches={batches}"], draws=50)[0]
    except UserError as error:
        say(f"no analysis: {error}")
        return None


def write(analysis: Mapping[str, Any], folder: str | Path) -> None:
    """Writes analysis.json, and the report if the libraries for it are there."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_whole(Path(folder, ANALYSIS_NAME), json.dumps(analysis, indent=1, allow_nan=False) + "\n")
    try:
        write_report(analysis, Path(folder))
    except UserError as error:  # a library that draws is not installed
        say(f"no {error}")


def _plain(recipe: Recipe) -> Recipe:
    """The recipe's weights, batches and seed, scored weight by weight whatever its method prunes by; no teacher, no reporting."""
    own = recipe.pruning
    pruning = PruningConfig(
        sparsity=own.sparsity or 0.5,
        criterion=own.criterion if own.criterion in TASK_CRITERIA else "disparse",
        decision="sum" if own.decision == "joint" else own.decision,  # joint scores are of no task
        quorum=own.quorum,
        score_batches=own.score_batches,
        target_modules=own.target_modules,
        exclude_modules=own.exclude_modules,
        seed=own.seed,
    )
    quiet = {"report_to": "none", "distillation": 0.0, "distillation_hidden": 0.0}
    return replace(recipe, pruning=pruning, sparse=replace(recipe.sparse, **quiet))


def _stages(source: Path, recipe: Recipe) -> dict[str, Callable[[], MultitaskModel]]:
    """Name of a stage -> what loads its model, in their order; a model that is not in a run's folder has no name yet."""
    if not (source / RECIPE_NAME).is_file():
        return {"": lambda: load_model(source, "MODEL")}
    stages = {"before training": lambda: new_model(recipe)}
    for name, folder in (("dense", source / "dense"), ("sparse", source)):
        if (folder / "config.json").is_file():
            stages[name] = lambda folder=folder: load_model(folder)
    return stages


def _stage_of(model: MultitaskModel, recipe: Recipe) -> str:
    weights = _weights(model, recipe)
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    return "sparse" if zeros > 0.01 * sum(weight.numel() for weight in weights.values()) else "dense"


def _weights(model: MultitaskModel, recipe: Recipe) -> dict[str, Tensor]:
    """The prunable weights that tasks share."""
    found = prunable_parameters(model, recipe.pruning)
    return {name: weight for name, weight in found.items() if not name.startswith(f"encoder.{PRIVATE}.")}


def _examine(
    setup: _Setup, model: MultitaskModel, draws: int, ranked: bool
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """The measures of one stage; if it is to be `ranked`, also what keeping each weight costs, from the same scores."""
    config = setup.recipe.pruning
    try:
        sites = find_sites(model.encoder, "encoder.")
    except UserError:  # an encoder whose layers are not known has no heads and neurons to show
        sites = {}
    with TemporaryDirectory() as folder:
        trainer = setup.trainer(model, folder)
        weights = _weights(model, setup.recipe)
        wanted = {kind: sites[kind] for kind in ("head", "neuron") if kind in sites}
        exam = Examination(weights, config.criterion, config.sparsity, wanted, seed=config.seed)
        stream = exam.watch(
            gradients(
                model,
                trainer.pruner.loaders,
                parameters=weights,
                num_batches=config.score_batches,
                loss_fn=trainer.scoring_loss,
                progress=True,
            )
        )
        try:
            costs = _costs(config, stream) if ranked else None
            for _ in stream:
                pass
        except UserError:
            raise
        except ValueError as error:  # of scoring: a loss or scores that are not finite
            raise UserError(f"analysis: {error}") from error
    return exam.measures(draws), costs


def _costs(config: PruningConfig, task_scores) -> dict[str, Tensor]:
    """Parameter name -> what keeping each weight costs by `config.decision`, whatever the sparsity."""
    held = []

    def cut(cost: Tensor) -> Tensor:
        held.append(cost)
        return torch.ones_like(cost, dtype=torch.bool)

    masks = decide_by(config, task_scores, 0.0, cut=cut)
    pieces = held[0].split([keep.numel() for keep in masks.values()])
    return {name: piece.reshape(keep.shape) for piece, (name, keep) in zip(pieces, masks.items(), strict=True)}


def _measure_curve(setup: _Setup, load: Callable, costs: Mapping[str, Tensor], curve: Curve) -> dict[str, Any]:
    """Prunes the dense model further and further by one set of scores, and evaluates it, as it is and trained on."""
    rows = {task: _some(rows, setup.recipe.pruning.seed) for task, rows in setup.data["validation"].items()}
    with TemporaryDirectory() as folder:
        model = load()
        trainer = setup.trainer(model, folder)

        def measure(sparsity: float, recovered: bool) -> dict[str, float]:
            say(f"cost of {100 * sparsity:g} %" + (", recovered" if recovered else ""))
            masks = {name: keep.to(model.device) for name, keep in masks_at(costs, sparsity).items()}
            if recovered:
                return _evaluate(_recovered(setup, load(), masks, curve.recover, folder), rows)
            apply_masks(model, masks)  # in place: they are nested, so that pruning one model further is pruning it anew
            return _evaluate(trainer, rows)

        return cost_curve(measure, curve.sparsities, recover=curve.recover > 0, within=curve.within)


def _recovered(setup: _Setup, model: MultitaskModel, masks, steps: int, folder: str) -> DisparseTrainer:
    """The trainer of a model that was pruned and then trained for so many steps, as the recipe recovers."""
    recipe, never = setup.recipe, {f"{what}_strategy": "no" for what in ("save", "eval", "logging")}
    arguments = replace(recipe.sparse, output_dir=folder, max_steps=steps, load_best_model_at_end=False, **never)
    judge_as(recipe, model)
    trainer = DisparseTrainer(
        model,
        arguments,
        masks=masks,
        train_dataset={task: setup.data["train"][task] for task in recipe.voters},
        processing_class=setup.tokenizer,
    )
    trainer.train()
    return trainer


def _evaluate(trainer: DisparseTrainer, rows: Mapping[str, Any]) -> dict[str, float]:
    """Task -> the mean of its metrics, 0 to 100."""
    values = trainer.evaluate_tasks(rows)[1]
    return {task: 100 * average({task: metrics}) for task, metrics in values.items()}


def _some(rows, seed: int):
    """At most CURVE_ROWS of them, drawn by the seed, in the order they have."""
    if len(rows) <= CURVE_ROWS:
        return rows
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:CURVE_ROWS]
    return rows.select(sorted(drawn.tolist()))
