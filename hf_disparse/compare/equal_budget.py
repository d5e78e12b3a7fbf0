"""Compares the best ensemble of single-task models with one shared model of the same size, trained equally long.

Size: both keep the same number of prunable weights. The ensemble divides them among one encoder per task, by the best choice
along each task's sparsity curve; the shared model has all of them. Training: every single-task model takes the recipe's steps,
and the shared model of T tasks takes T times as many, with its schedule stretched likewise. Helpers are left out on both sides.
Protocol: Xia and Shin 2021 (arXiv 2112.05705).

The folder `equal-budget` in the output folder holds the dense models and one file per finished cell, as in `by_method`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

from hf_disparse.compare.runner import cell_file, run_cells
from hf_disparse.compare.tables import (
    held_out,
    over_seeds,
    shown,
    shown_speed,
    speed_caption,
    times_as_fast,
    write_tables,
)
from hf_disparse.config import UserError, require, without_ignored
from hf_disparse.files import read_json
from hf_disparse.recipes.recipe import Recipe, parse_recipe
from hf_disparse.runs.folder import DELETE, refuse_others
from hf_disparse.runs.setup import environment
from hf_disparse.tasks.averages import average, average_name, counted_tasks

_STRETCHED = (
    "max_steps",
    "warmup_steps",
    "logging_steps",
    "eval_steps",
    "save_steps",
)  # a fraction below 1 stays as it is


@dataclass(frozen=True)
class ModelCell:
    """One training from dense to sparse.

    Args:
        task: the task of a single-task model; None for the shared model.
        sparsity: the encoder's.
    """

    task: str | None
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self._who}-{self.sparsity}-seed{self.seed}"

    @property
    def start(self) -> str:
        """The name of the dense model that it starts from."""
        return f"dense-{self._who}-seed{self.seed}"

    @property
    def _who(self) -> str:
        return "shared" if self.task is None else f"task-{self.task}"


@dataclass(frozen=True)
class EqualBudget:
    """The experiment, checked when it is created; it has the methods of `ByMethod`.

    Args:
        recipe: the recipe of the shared model, whose steps are those of each single-task model.
        sparsities: the points of every task's curve.
        seeds: one dense model and one curve per task, and one shared model per budget, for each seed.
        budgets: kept weights, as fractions of one encoder: at 0.3 the shared model keeps 30 %, and so do the encoders of an
            ensemble together. Default: 1 - `sparsities`, where an ensemble fits.
    """

    recipe: Recipe
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    budgets: tuple[float, ...] = ()

    json_name: ClassVar[str] = "equal-budget.json"
    markdown_name: ClassVar[str] = "equal-budget.md"

    def __post_init__(self):
        _check_recipe(self.recipe)
        for sparsity in self.sparsities:
            require(0 < sparsity < 1, "sparsities", "numbers in (0, 1)", sparsity)
        for budget in self.budgets:
            require(0 < budget <= 1, "budgets", "numbers in (0, 1], fractions of one encoder", budget)
        least = len(self.tasks) * (1 - exact(max(self.sparsities)))
        budgets = [exact(b) for b in self.budgets] or [b for s in self.sparsities if (b := 1 - exact(s)) >= least]
        if not budgets or min(budgets) < least:
            got = f"{float(min(budgets)):g}" if budgets else f"sparsities up to {max(self.sparsities):g}"
            raise UserError(
                f"budgets: expected at least {float(least):g}, which {len(self.tasks)} encoders keep at the highest of the "
                f"`sparsities`, got {got}; add higher sparsities"
            )
        for key, values in (("sparsities", self.sparsities), ("seeds", self.seeds), ("budgets", map(float, budgets))):
            object.__setattr__(self, key, tuple(dict.fromkeys(values)))

    @property
    def tasks(self) -> list[str]:
        """The tasks with a vote."""
        return list(self.recipe.voters)

    @property
    def cells(self) -> list[ModelCell]:
        """All trainings, one seed after the other, the curves first."""
        shared = [float(1 - exact(budget)) for budget in self.budgets]
        who = [(task, sparsity) for task in self.tasks for sparsity in self.sparsities] + [(None, s) for s in shared]
        return [ModelCell(task, sparsity, seed) for seed in self.seeds for task, sparsity in who]

    @property
    def folder(self) -> Path:
        """The folder of the dense models and the cells."""
        return Path(self.recipe.output_dir, "equal-budget")

    def recipe_of(self, cell: ModelCell) -> Recipe:
        """Returns the recipe of a cell: of one task, or of all T tasks with T times the steps."""
        recipe, values, tasks = self.recipe, self.recipe.values, self.tasks if cell.task is None else [cell.task]
        pruning, phases = recipe.pruning, {}
        fields = {"sparsity": cell.sparsity, "keep_scores": False}
        if cell.task is not None and pruning.decision == "quorum":
            fields |= {"decision": "unanimous", "quorum": 1}  # with one task, all decisions are the same
        times = len(tasks)
        for key in ("start_step", "end_step", "update_every"):
            if getattr(pruning, key) is not None:
                fields[key] = times * getattr(pruning, key)
        for phase, section in (("dense", "training"), ("sparse", "recovery")):
            arguments = getattr(recipe, phase)
            steps = arguments.max_steps
            require(
                steps > 0, f"{section}.max_steps", "a number of steps, which the shared model takes per task", steps
            )
            given = {key: getattr(arguments, key) for key in _STRETCHED}
            stretched = {key: times * n if n >= 1 else n for key, n in given.items() if n is not None}
            phases[section] = {**(values.get(section) or {}), **stretched}
        teachers = {task: name for task, name in recipe.teachers.items() if task in tasks}
        return parse_recipe(
            {
                **values,
                **phases,
                "tasks": {task: values["tasks"][task] for task in tasks},
                "helpers": [],
                "teachers": teachers,
                "seed": cell.seed,
                "pruning": without_ignored({**(values.get("pruning") or {}), **fields}),
            }
        )

    def run(self) -> dict[str, Any]:
        """Runs the cells without a result yet, and writes all results to `equal-budget.json` and `equal-budget.md`.

        A cell that fails is reported, and the others still run; the next call tries it again.

        Returns:
            The content of `equal-budget.json`: `rows` (an ensemble and the shared model per budget), `curve` (task -> sparsity ->
            metric, the mean over seeds), `cells`, `failed` (cell -> reason) and `environment`.
        """
        recipe, folder = self.recipe, self.folder
        refuse_others(Path(recipe.output_dir), recipe)
        recipes = {cell: self.recipe_of(cell) for cell in self.cells}  # refuses mistakes before anything runs
        whole = replace(
            recipe, helpers=(), tasks={task: recipe.tasks[task] for task in self.tasks}
        )  # its data is loaded
        of_one_seed = sorted(self.cells[: len(self.cells) // len(self.seeds)], key=lambda cell: cell.sparsity)
        most = {cell.task: cell for cell in of_one_seed}  # the sparsest cell of each model
        failed = run_cells(whole, recipes, folder, list(most.values()))
        results = {
            cell: read_json(cell_file(folder, cell), DELETE) for cell in recipes if cell_file(folder, cell).is_file()
        }
        rows, curve = self.tabulate(results)
        report = {
            "rows": rows,
            "curve": curve,
            "cells": [{**asdict(cell), **{k: v for k, v in r.items() if k != "cell"}} for cell, r in results.items()],
            "failed": failed,
            "environment": environment(),
        }
        if results:
            write_tables(report, Path(recipe.output_dir), self)
        return report

    def tabulate(self, results: Mapping[ModelCell, dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, dict]]:
        """Returns two rows per budget, over the seeds, and the curves by which the ensembles were chosen.

        One choice serves all seeds, by the mean over them. A point that failed for every seed cannot be chosen; a seed that
        lacks any other point has no ensemble. `against_ensemble` compares the seeds that both have.
        """
        curve = {
            task: {s: v for s in self.sparsities if (v := [c for c in results if (c.task, c.sparsity) == (task, s)])}
            for task in self.tasks
        }
        seeds = [
            seed
            for seed in self.seeds
            if all(any(cell.seed == seed for cell in cells) for points in curve.values() for cells in points.values())
        ]
        values = {
            task: {
                s: mean(_value(results[cell], task) for cell in cells if cell.seed in seeds)
                for s, cells in points.items()
            }
            for task, points in (curve.items() if seeds else ())
        }
        counted = {t: v if t in counted_tasks(self.tasks) else dict.fromkeys(v, 0.0) for t, v in values.items()}
        rows = []
        for budget in self.budgets:
            chosen = best_ensemble(counted, budget) if values else None
            averages = {}
            if chosen:
                models = {seed: [ModelCell(task, s, seed) for task, s in chosen.items()] for seed in seeds}
                rows.append(_row("ensemble", budget, chosen, models, results))
                averages = {seed: _metrics(cells, results)["average"] for seed, cells in models.items()}
            sparsity = float(1 - exact(budget))
            shared = {c.seed: [c] for c in results if c.task is None and c.sparsity == sparsity}
            if shared:
                row = _row("shared", budget, dict.fromkeys(self.tasks, sparsity), shared, results)
                paired = [
                    _metrics(c, results)["average"] - averages[seed] for seed, c in shared.items() if seed in averages
                ]
                rows.append(row | {"against_ensemble": mean(paired) if paired else None})
        return rows, values

    @staticmethod
    def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
        """Returns header and rows as text, for the terminal and Markdown; brackets hold the sparsity of a task's encoder."""
        rows = report["rows"]
        tasks = list(rows[0]["sparsities"])
        lines = []
        for row in rows:
            sparsities, model = {task: f" ({100 * s:g} %)" for task, s in row["sparsities"].items()}, row["model"]
            if model == "shared":  # one encoder, one sparsity
                model, sparsities = model + sparsities[tasks[0]], {}
            values = [shown(row, name) + sparsities.get(name, "") for name in (*tasks, "average")]
            difference = "" if row["against_ensemble"] is None else f"{row['against_ensemble']:+.1f}"
            lines.append(
                [model, f"{100 * row['budget']:g} %", *values, difference, str(len(row["seeds"])), shown_speed(row)]
            )
        return ["model", "budget", *tasks, average_name(tasks), "against ensemble", "seeds", "times as fast"], lines

    @staticmethod
    def caption(report: dict[str, Any]) -> str:
        """Returns the sentences below the table."""
        passes = {
            model: ", ".join(
                f"{n:,}" for n in sorted({r["backward_passes"] for r in report["rows"] if r["model"] == model})
            )
            for model in ("ensemble", "shared")
        }
        times = len({task for cell in report["cells"] for task in cell["examples"]["validation"]})
        return (
            f"Mean ± sample standard deviation over seeds of each task's metrics (0 to 100), on {held_out(report)} held-out examples. "
            "A budget is the kept prunable weights as a share of one encoder's; an ensemble has one encoder per task within it, "
            "at the sparsities in brackets, the best choice along the tasks' curves by the mean over seeds on the same "
            f"held-out examples. The shared model trains {times} times as many steps as each single-task model: "
            f"{passes['ensemble'] or 'no'} backward passes per ensemble and {passes['shared'] or 'no'} per shared model, dense "
            f"training and scoring included.{speed_caption(report)}"
        )


def _check_recipe(recipe: Recipe) -> None:
    """Refuses recipes that single-task models cannot have."""
    tasks, granularity = list(recipe.voters), recipe.pruning.granularity
    require(len(tasks) > 1, "tasks", "at least two for a comparison at equal budget", tasks)
    require(granularity == ("weight",), "pruning.granularity", "weight, the unit of a budget", granularity)
    if recipe.pruning.max_drop is not None:
        raise UserError("pruning.max_drop: must not be set in a comparison, whose rows have the sparsity they name")
    for arguments in (recipe.dense, recipe.sparse):
        metric = arguments.metric_for_best_model
        if metric is not None and metric.removeprefix("eval_") not in ("average", "loss"):
            raise UserError(
                f"training.metric_for_best_model: expected average or loss at equal budget, where models have one task, got "
                f"{metric!r}"
            )
    if recipe.dense_from is not None:
        raise UserError("dense_from: must not be set at equal budget, where every task has a dense model of its own")


def exact(number: float) -> Fraction:
    """Returns the decimal as a fraction: 0.1 is a tenth, so that three encoders at sparsity 0.9 fit a budget of 0.3."""
    return Fraction(str(number))


def best_ensemble(curve: Mapping[str, Mapping[float, float]], budget: float) -> dict[str, float] | None:
    """Chooses one sparsity per task: the largest sum of metrics whose kept fractions sum to at most the budget.

    Exact, by dynamic programming over the sums of kept fractions; of equally good choices the one that keeps least.

    Args:
        curve: task -> sparsity -> metric, higher is better.
        budget: in units of one encoder.

    Returns:
        Task -> sparsity, or None if no choice fits.
    """
    best: dict[Fraction, tuple[float, tuple[float, ...]]] = {Fraction(0): (0.0, ())}  # kept -> (metrics, choice)
    for points in curve.values():
        longer: dict[Fraction, tuple[float, tuple[float, ...]]] = {}
        for kept, (total, chosen) in best.items():
            for sparsity, metric in points.items():
                now = kept + 1 - exact(sparsity)
                if now <= exact(budget) and (now not in longer or longer[now][0] < total + metric):
                    longer[now] = (total + metric, (*chosen, sparsity))
        best = longer
    if not best:
        return None
    _, chosen = best[max(best, key=lambda kept: (best[kept][0], -kept))]
    return dict(zip(curve, chosen, strict=True))


def _row(model: str, budget: float, sparsities: dict[str, float], cells: dict[int, list[ModelCell]], results) -> dict:
    """Returns the row of a model; `cells` maps each seed to the cells that make the model of that seed."""
    metrics = [_metrics(of_seed, results) for of_seed in cells.values()]
    every = [[results[cell] for cell in of_seed] for of_seed in cells.values()]
    size = every[0][0]["prunable"]
    return {
        "budget": budget,
        "model": model,
        "sparsities": sparsities,
        "kept": sum(size - round(cell.sparsity * size) for cell in next(iter(cells.values()))),
        "seeds": list(cells),
        **over_seeds(metrics),
        "against_ensemble": None,
        "backward_passes": max(sum(r["backward_passes"] + r["dense_backward_passes"] for r in rs) for rs in every),
        "seconds": mean(sum(sum(r["seconds"].values()) for r in rs) for rs in every),
        "times_as_fast": times_as_fast(every),
    }


def _metrics(cells: Sequence[ModelCell], results: Mapping[ModelCell, dict[str, Any]]) -> dict[str, Any]:
    """Returns the metrics of a model, or of all models of an ensemble together."""
    tasks = {task: metrics for cell in cells for task, metrics in results[cell]["metrics"]["tasks"].items()}
    return {"tasks": tasks, "average": average(tasks)}


def _value(result: dict[str, Any], task: str) -> float:
    return average({task: result["metrics"]["tasks"][task]})
