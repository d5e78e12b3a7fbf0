"""Measures a model, or the stages of a run, on the data of its recipe, with `hf_disparse.analysis`."""

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
from hf_disparse.export.results import read_results
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
from hf_disparse.runs.setup import Splits, new_model, new_trainer, only_judging, prepare
from hf_disparse.runs.train import load_model
from hf_disparse.tasks.averages import average
from hf_disparse.trainer import DisparseTrainer

ANALYSIS_NAME, VERSION = "analysis.json", 1
CURVE_ROWS = 1000  # validation examples per task, drawn once for all points


@dataclass(frozen=True)
class Curve:
    """The cost curve to measure.

    Args:
        sparsities: the points; there is no curve if none is above 0.
        within: ends the curve where a task loses more than this many points.
        recover: trains each point for this many steps as well.
    """

    sparsities: tuple[float, ...] = ()
    within: float | None = None
    recover: int = 0

    def __post_init__(self):
        for sparsity in self.sparsities:
            require(0 <= sparsity < 1, "sparsities", "numbers in [0, 1)", sparsity)
        if self.within is not None and not (is_number(self.within) and self.within >= 0):
            raise UserError(f"within: expected points of at least 0, got {self.within!r}")
        require(is_count(self.recover, 0), "recover", "a number of steps", self.recover)


@dataclass(frozen=True)
class _Setup:
    """What all stages of an analysis share."""

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
    """Measures a model, or the stages of a run that its folder holds, and writes analysis.json, the report and its figures.

    Returns:
        The content of analysis.json, and the folder that it is in.

    Raises:
        UserError: the folder, the recipe or its data is missing, there are several processes, or a loss is not finite.
    """
    require(launched() == 1, "analyze", "one process, without torchrun", launched())
    source, recipe = open_run(model_name, recipe_path, overrides)
    folder = output_dir or source
    if not output_dir and not Path(source).is_dir():
        raise UserError(f"{model_name}: expected a folder to write to, got a Hub id; give an `output_dir`")
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
        say("no cost curve: it starts from a dense model, which is missing here")
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
    write(result, folder, read_results(Path(source)))
    return result, folder


def after_training(recipe: Recipe) -> dict[str, Any] | None:
    """Analyzes a finished run with few batches and draws, and no curve; returns None if there is an analysis already.

    With several processes it is skipped. An error is printed rather than raised, as the training itself succeeded.
    """
    folder = Path(recipe.output_dir)
    if (folder / ANALYSIS_NAME).is_file():
        return None
    if launched() > 1:
        say(f"no analysis with several processes; afterwards, run: hf-disparse analyze {folder}")
        return None
    batches = min(4, recipe.pruning.score_batches)
    try:
        return analyze(str(folder), None, [f"pruning.score_batches={batches}"], draws=50)[0]
    except UserError as error:
        say(f"no analysis: {error}")
        return None


def write(analysis: Mapping[str, Any], folder: str | Path, results: Mapping[str, Any]) -> None:
    """Writes analysis.json, and the report, with the run's `results` on top, if its libraries are installed."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_whole(Path(folder, ANALYSIS_NAME), json.dumps(analysis, indent=1, allow_nan=False) + "\n")
    try:
        write_report(analysis, Path(folder), results)
    except UserError as error:  # a library for plots is not installed
        say(f"no {error}")


def _plain(recipe: Recipe) -> Recipe:
    """Returns the recipe with its weights, batches and seed, but scoring single weights, without teachers or reporting."""
    own, asked = recipe.pruning, recipe.values.get("pruning") or {}  # its method may ignore what scoring here needs
    pruning = PruningConfig(
        sparsity=own.sparsity or 0.5,
        criterion=own.criterion if own.criterion in TASK_CRITERIA else "disparse",
        decision="sum" if own.decision == "joint" else own.decision,  # joint scores do not belong to a task
        quorum=own.quorum,
        score_batches=asked.get("score_batches", own.score_batches),
        target_modules=own.target_modules,
        exclude_modules=own.exclude_modules,
        seed=asked.get("seed", recipe.seed),
    )
    return only_judging(replace(recipe, pruning=pruning))


def _stages(source: Path, recipe: Recipe) -> dict[str, Callable[[], MultitaskModel]]:
    """Returns stage -> what loads its model, in order; a model outside a run's folder gets its name once it is loaded."""
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
    """Returns the prunable weights that tasks share."""
    found = prunable_parameters(model, recipe.pruning)
    return {name: weight for name, weight in found.items() if not name.startswith(f"encoder.{PRIVATE}.")}


def _examine(
    setup: _Setup, model: MultitaskModel, draws: int, ranked: bool
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """Returns the measures of one stage; if `ranked`, also the cost at which each weight is pruned, from the same scores."""
    config = setup.recipe.pruning
    try:
        sites = find_sites(model.encoder, "encoder.")
    except UserError:  # the layers of this encoder are unknown, so no heads or neurons are shown
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
        except ValueError as error:  # from scoring: a loss or scores that are not finite
            raise UserError(f"analysis: {error}") from error
    return exam.measures(draws), costs


def _costs(config: PruningConfig, task_scores) -> dict[str, Tensor]:
    """Returns parameter name -> the value by which `config.decision` ranks each weight, at any sparsity."""
    held = []

    def cut(cost: Tensor) -> Tensor:
        held.append(cost)
        return torch.ones_like(cost, dtype=torch.bool)

    masks = decide_by(config, task_scores, 0.0, cut=cut)
    pieces = held[0].split([keep.numel() for keep in masks.values()])
    return {name: piece.reshape(keep.shape) for piece, (name, keep) in zip(pieces, masks.items(), strict=True)}


def _measure_curve(setup: _Setup, load: Callable, costs: Mapping[str, Tensor], curve: Curve) -> dict[str, Any]:
    """Prunes the dense model further and further by one set of scores; evaluates each point, and again after recovery."""
    rows = {task: _some(rows, setup.recipe.pruning.seed) for task, rows in setup.data["validation"].items()}
    with TemporaryDirectory() as folder:
        model = load()
        trainer = setup.trainer(model, folder)

        def measure(sparsity: float, recovered: bool) -> dict[str, float]:
            say(f"cost of {100 * sparsity:g} %" + (", recovered" if recovered else ""))
            masks = {name: keep.to(model.device) for name, keep in masks_at(costs, sparsity).items()}
            if recovered:
                return _evaluate(_recovered(setup, load(), masks, curve.recover, folder), rows)
            apply_masks(model, masks)  # in place: the masks are nested, so one model can be pruned further and further
            return _evaluate(trainer, rows)

        return cost_curve(measure, curve.sparsities, recover=curve.recover > 0, within=curve.within)


def _recovered(setup: _Setup, model: MultitaskModel, masks, steps: int, folder: str) -> DisparseTrainer:
    """Returns the trainer of a pruned model after so many steps of the recipe's recovery."""
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
    """Returns task -> the mean of its metrics, 0 to 100."""
    values = trainer.evaluate_tasks(rows)[1]
    return {task: 100 * average({task: metrics}) for task, metrics in values.items()}


def _some(rows, seed: int):
    """Returns at most CURVE_ROWS rows, drawn by the seed, in their order."""
    if len(rows) <= CURVE_ROWS:
        return rows
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:CURVE_ROWS]
    return rows.select(sorted(drawn.tolist()))
